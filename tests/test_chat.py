"""A conversation with models: what they say is what transformers generates."""

import builtins
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT

import eval as evaluation
from data import Tokenizer
from lora import LoRAConfig, add_lora, lora_layers, save_adapter
from model import generate, load_model
from support.errors import UserError

TINY = ROOT / "examples" / "tiny-qwen3"
ASKED = "Which is an animal: dog, stone or cup?"


@pytest.fixture(scope="module")
def reference():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(TINY)


def say(reference, *contents, count=12, **options):
    """What transformers' greedy generation adds to a conversation, user first."""
    model, tokenizer = reference
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)
    ]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=False, **options
    )
    ends = Tokenizer(TINY).end_ids
    new = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=ends)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def chat(capsys, *words, lines=None, monkeypatch=None, count=12):
    """What `python eval.py chat` prints after its header, with these lines typed."""
    if lines is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    argv = ["chat", "--dtype", "float32", "--device", "cpu", "--max_new_tokens", str(count)]
    evaluation.main([*argv, *map(str, words)])
    return capsys.readouterr().out


def answers(output, name="base"):
    return [
        line.partition("] ")[2] for line in output.splitlines() if line.startswith(f"[{name}]")
    ]


def test_a_prompt_is_answered_as_transformers_does(reference, capsys):
    output = chat(capsys, "--model", f"base={TINY}", "--prompt", ASKED, "What barks?")
    assert f"> {ASKED}\n[base] " in output
    assert answers(output) == [say(reference, ASKED), say(reference, "What barks?")]
    assert len({*answers(output)}) == 2 and all(answers(output))


def test_a_conversation_keeps_its_history_until_it_is_cleared(reference, capsys, monkeypatch):
    lines = [ASKED, "Why?", "/clear", ASKED, "/exit", "not read"]
    output = chat(capsys, "--model", f"base={TINY}", lines=lines, monkeypatch=monkeypatch)
    first = say(reference, ASKED)
    assert answers(output) == [first, say(reference, ASKED, first, "Why?"), first]
    assert say(reference, ASKED, first, "Why?") != say(reference, "Why?")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of adapters of TINY: two with random B, one that trained norms too."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, saved) in enumerate({"one": [], "two": [], "norms": ["norm"]}.items()):
        model = load_model(TINY, dtype="float32")
        add_lora(model, LoRAConfig(lora_r=4, modules_to_save=saved), seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=generator))
            if saved:
                model.model.norm.weight.mul_(-0.5)
        save_adapter(model, folder / name, TINY)
    return folder


def test_models_side_by_side_share_their_base(adapters, reference, capsys, monkeypatch):
    """Whatever is loaded after it, each says what it says alone; the base is loaded once, and once
    more for the adapter that changes it in place."""
    loads, load = [], evaluation.load_4bit
    monkeypatch.setattr(
        evaluation, "load_4bit", lambda *args, **kw: loads.append(1) or load(*args, **kw)
    )
    names = ["base", "one", "norms", "two"]
    places = {name: adapters / name for name in names} | {"base": TINY}
    alone = {}
    for name in names:
        output = chat(capsys, "--model", f"{name}={places[name]}", "--prompt", ASKED)
        alone[name] = answers(output, name)
    assert alone["base"] == [say(reference, ASKED)] and len({*map(str, alone.values())}) == 4
    loads.clear()
    models = [f"{name}={places[name]}" for name in names]
    lines = [ASKED, "/clear", ASKED]
    output = chat(capsys, "--model", *models, lines=lines, monkeypatch=monkeypatch)
    for name in names:
        assert answers(output, name) == 2 * alone[name]
    assert len(loads) == 3  # two comes after norms, which nothing can be put on any more


def test_an_answer_ends_where_the_model_ends_it(reference, capsys, tmp_path):
    """The fifth token of an answer made an end token: the answer is the four before it."""
    folder = shutil.copytree(TINY, tmp_path / "ends")
    tokenizer = Tokenizer(TINY)
    prompt = tokenizer.render([{"role": "user", "content": ASKED}], True)
    (ids,) = generate(load_model(TINY, "float32"), [tokenizer.encode(prompt)], 12)
    raw = json.loads((folder / "generation_config.json").read_text())
    ends = ids[next(n for n in range(4, 12) if ids[n] not in ids[:n])]
    raw["eos_token_id"] = [*np.atleast_1d(raw["eos_token_id"]).tolist(), ends]
    (folder / "generation_config.json").write_text(json.dumps(raw))
    (said,) = answers(chat(capsys, "--model", f"base={folder}", "--prompt", ASKED))
    assert said == tokenizer.decode(ids[: ids.index(ends)]) and said != say(reference, ASKED)


def test_sampling_is_that_of_generate(capsys):
    tokenizer = Tokenizer(TINY)
    prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": ASKED}], True))
    model, words = load_model(TINY, "float32"), ("--model", f"base={TINY}", "--prompt", ASKED)
    flags = "--temperature 1.5 --top_k 50 --top_p 0.9 --seed".split()
    said = []
    for seed in (1, 2, 1):
        (ids,) = generate(model, [prompt], 12, 1.5, 50, 0.9, eos_ids=tokenizer.end_ids, seed=seed)
        said += answers(chat(capsys, *words, *flags, seed))
        assert said[-1] == tokenizer.decode(ids)
    assert said[0] == said[2] != said[1]


def test_the_template_gets_system_prompt_and_thinking(capsys, tmp_path, monkeypatch):
    folder = shutil.copytree(TINY, tmp_path / "thinks")
    template = "{{ enable_thinking }}|" + (TINY / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    encoded, encode = [], Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda *args, **kw: encoded.append(args[1]) or encode(*args, **kw)
    )
    turns = [{"role": "user", "content": "Hi"}]
    for words, system, kwargs in (
        ((), [], {}),
        (("--enable_thinking", "false"), [], {"enable_thinking": False}),
        (("--system", "Be brief."), [{"role": "system", "content": "Be brief."}], {}),
    ):
        chat(capsys, "--model", folder, "--prompt", "Hi", *words, count=1)
        assert encoded[-1] == Tokenizer(folder).render(system + turns, True, **kwargs)
    row = {"messages": turns, "chat_template_kwargs": {"enable_thinking": "deep"}}
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    for words, start in (((), "deep|"), (("--enable_thinking", "false"), "False|")):
        chat(capsys, "--model", folder, "--data", tmp_path / "row.jsonl", *words, count=1)
        assert encoded[-1].startswith(start)


def test_files_of_prompts(reference, capsys, tmp_path):
    """Lines of a text, and rows as an evaluation reads them, the last of plain text."""
    (tmp_path / "p.txt").write_text(f"{ASKED}\n\nWhat barks?\n")
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "A dog"}]
    rows = [{"messages": turns}, {"messages": [*turns, turns[0]]}, {"question": ASKED}]
    rows += [{"prompt": "A dog is", "completion": " old"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = tmp_path / "p.txt", tmp_path / "p.jsonl"
    said = answers(chat(capsys, "--model", f"base={TINY}", "--data", *files))
    (text,) = generate(load_model(TINY, "float32"), [Tokenizer(TINY).encode("A dog is")], 12)
    first = say(reference, ASKED)
    expected = [first, say(reference, "What barks?"), first]
    expected += [say(reference, ASKED, "A dog", ASKED), first, Tokenizer(TINY).decode(text)]
    assert said == expected


def test_a_model_without_a_template_continues_the_text(shared, capsys, monkeypatch):
    """What it adds is printed with the space that SentencePiece leaves out of a first token."""
    folder = shared / "models" / "stories260K"
    lines = ["Once upon a time", " The"]
    output = chat(
        capsys, "--model", f"s={folder}", lines=lines, monkeypatch=monkeypatch, count=24
    )
    assert "s: no chat template" in output
    tokenizer, model = Tokenizer(folder), load_model(folder, "float32")
    text = ""
    for line, said in zip(lines, answers(output, "s")):
        ids = tokenizer.head + tokenizer.encode(text + line)
        whole = tokenizer.decode(ids + generate(model, [ids], 24)[0])
        assert text + line + said == whole
        text = whole
    with pytest.raises(UserError, match="s: --system and --enable_thinking need a chat template"):
        chat(capsys, "--model", f"s={folder}", "--system", "x", "--prompt", "y")


def test_what_a_model_writes_moves_no_cursor(capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, _=True: "\x1b[2J" * (len(ids) - 1))
    output = chat(capsys, "--model", f"base={TINY}", "--prompt", "Hi", count=3)
    assert "\x1b" not in output and r"[base] \x1b[2J\x1b[2J\x1b[2J" in output


@pytest.mark.parametrize("ends", [EOFError, KeyboardInterrupt])
def test_ctrl_c_and_ctrl_d_leave(ends, capsys, monkeypatch):
    def leave(prompt):
        raise ends

    monkeypatch.setattr(builtins, "input", leave)
    assert chat(capsys, "--model", f"base={TINY}").endswith("/exit leaves\n\n")


MISTAKES = {
    "--top_p 0": "--top_p: 0.0 is not from|--top_p: 0.0 is below",
    "--temperature -1": "--temperature: -1.0 is below 0",
    "--max_new_tokens 0": "--max_new_tokens: 0 is below 1",
    "--dtype int8": "dtype: 'int8' is not one of",
    "--promt x": r"unknown argument --promt \(nearest: prompt",
    "--data nowhere.txt": "nowhere.txt",
    "--model nowhere": "nowhere: neither a folder nor a hub id",
    "--prompt": "expected at least one argument",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, capsys):
    with pytest.raises((UserError, OSError), match=MISTAKES[words]):
        chat(capsys, "--model", f"base={TINY}", *words.split())


def test_a_prompt_longer_than_the_context(capsys):
    with pytest.raises(UserError, match="base: no room for an answer after 6,0"):
        chat(capsys, "--model", f"base={TINY}", "--prompt", "a dog " * 3000)
    capsys.readouterr()


def test_in_a_process(tmp_path):
    """Typed lines, bytes that are no UTF-8 among them; a mistake ends in a line and status 2."""
    argv = [sys.executable, ROOT / "eval.py", "chat", "--max_new_tokens", "3", "--model"]
    typed = ASKED.encode() + b"\nA \xff dog\n"
    ran = subprocess.run([*argv, TINY], input=typed, capture_output=True, cwd=tmp_path)
    assert ran.returncode == 0 and ran.stdout.count(b"[tiny-qwen3] ") == 2, ran.stderr
    ran = subprocess.run([*argv, "nowhere"], input=b"", capture_output=True, cwd=tmp_path)
    assert ran.returncode == 2 and b"Traceback" not in ran.stderr
    assert ran.stderr.startswith(b"error: ") and not list(tmp_path.iterdir())

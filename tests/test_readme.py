"""The worked changes of README.md, run as they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import make_dataclass
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, write_checkpoint
from test_sft import write_tokenizer

import data
import dpo
import eval as evaluation
import lora
import model
import qlora
import sft
from model import IGNORE, Batch, Segment, load_model

MODULES = {
    "dpo.py": dpo,
    "lora.py": lora,
    "data.py": data,
    "sft.py": sft,
    "eval.py": evaluation,
}
MODULES |= {"model.py": model, "qlora.py": qlora}
TABLES = [
    dpo.LOSSES,
    lora.VARIANTS,
    data.RECIPES,
    sft.SCHEDULES,
    evaluation.TASKS,
    model.FAMILIES,
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Where to change what")[2].partition("\n## ")[0]
SECTION += (ROOT / "examples" / "README.md").read_text(encoding="utf-8").partition("\n## ")[2]
BLOCKS = dict(re.findall(r"\*\*An? ([\w ]+)\*\*(?:(?!```).)*```python\n(.*?)```", SECTION, re.S))


@pytest.fixture
def change(request):
    """Runs the block of a change in its module, and takes the entry out again."""
    before = [dict(table) for table in TABLES]
    block = BLOCKS[request.param]
    file = re.match(r"# (\w+\.py)", block)[1]
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 15
    exec(block, vars(MODULES[file]))
    yield request.param
    for table, entries in zip(TABLES, before):
        table.clear()
        table.update(entries)


def logits(net, count=20):
    ids = np.arange(3, 3 + count)
    batch = Batch.pack([[Segment(ids, np.full(count, IGNORE))]])
    with torch.no_grad():
        return net.logits(net(batch))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("base") / "model", vocab_size=259)
    return write_tokenizer(folder) or folder


def flags(base, rows, out, **settings):
    settings = {
        "max_steps": 2,
        "eval_answers": 0,
        "logging_steps": 1,
        "lora_r": 4,
    } | settings
    settings |= {"model": base, "data": rows, "output_dir": out, "report_to": "none"}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def write_rows(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_every_change_has_its_block():
    assert list(BLOCKS) == [
        "loss",
        "loss with a parameter",
        "LoRA variant",
        "recipe",
        "schedule",
        "evaluation task",
        "model family",
        "loss from a teacher",
    ]


@pytest.mark.parametrize("change", ["loss", "loss with a parameter"], indirect=True)
def test_a_loss(change, base, tmp_path, monkeypatch):
    """Step 0 has margin 0, so the first loss is known: 1, and -log sigmoid(-0.5)."""
    monkeypatch.setattr(dpo.DPOConfig, "odpo_offset", 0.5, raising=False)
    name, first = {"loss": ("squared_hinge", 1.0)}.get(change, ("odpo", 0.974077))
    pairs = [{"prompt": f"{n}? ", "chosen": "yes", "rejected": "no"} for n in range(8)]
    rows = write_rows(tmp_path / "pairs.jsonl", pairs)
    more = {"loss_type": name, "ref_cache": tmp_path / "cache"}
    dpo.main(flags(base, rows, tmp_path / "run", **more))
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("change", ["loss from a teacher"], indirect=True)
def test_a_loss_from_a_teacher(change, base, tmp_path, monkeypatch):
    """Over the whole vocabulary it is the KL of the two models, and 0 to the model itself; a run
    comes nearer to the teacher."""
    other = write_checkpoint(tmp_path / "teacher", seed=5, vocab_size=259)
    student, teacher = load_model(base), load_model(other)
    ids = np.arange(20)
    batch = Batch.pack([[Segment(ids, ids)]])
    p, q = (net.logits(net(batch)[batch.scored]).log_softmax(-1) for net in (teacher, student))
    kl = (p.exp() * (p - q)).sum()
    assert kl > 0.1 and abs(sft.distill_loss(student, batch, teacher, k=259)[0] - kl) < 1e-4 * kl
    assert abs(sft.distill_loss(student, batch, student, k=259)[0]) < 1e-4
    rows = [{"prompt": f"{n}? ", "completion": "yes"} for n in range(8)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    argv = flags(base, file, tmp_path / "run", max_steps=6, learning_rate=1e-2)
    monkeypatch.setattr(sft, "sft_loss", partial(sft.distill_loss, teacher=teacher))
    sft.main(argv)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("change", ["LoRA variant"], indirect=True)
def test_a_lora_variant(change, base, tmp_path, monkeypatch):
    """Its own parameter trains, and the merged model computes what the adapter does."""
    monkeypatch.setitem(lora.PEFT_FIELDS, "use_diagonal", "use_diagonal")
    config = make_dataclass(
        "LoRAConfig", [("use_diagonal", bool, False)], bases=(lora.LoRAConfig,)
    )
    monkeypatch.setattr(lora, "LoRAConfig", config)
    net = load_model(base)
    lora.add_lora(net, config(lora_r=4, use_diagonal=True), seed=1)
    for layer in lora.lora_layers(net).values():
        assert type(layer).__name__ == "DiagonalLoRALinear" and layer.lora_E.requires_grad
        torch.nn.init.normal_(layer.lora_B, std=0.05)
        torch.nn.init.normal_(layer.lora_E)
    lora.save_adapter(net, tmp_path / "adapter", base)
    lora.merge(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), logits(net.eval()))
    assert (logits(load_model(base)) - logits(net)).abs().max() > 0.1


@pytest.mark.parametrize("change", ["recipe"], indirect=True)
def test_a_recipe(change):
    make, _ = data.use_recipe("boolq", {}, 0)
    row = make({"passage": "Grass is green.", "question": "is grass red", "answer": False})
    assert row["prompt"][0]["content"] == "Grass is green.\nis grass red?"
    assert row["completion"] == data.as_turn("assistant", "No")


@pytest.mark.parametrize("change", ["schedule"], indirect=True)
def test_a_schedule(change, base, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(8)])
    more = {"lr_scheduler_type": "quadratic", "learning_rate": 1e-3, "warmup_ratio": 0}
    sft.main(flags(base, rows, tmp_path / "run", **more))
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([1e-3, 0.25e-3])


@pytest.mark.parametrize("change", ["evaluation task"], indirect=True)
def test_an_evaluation_task(change, base, tmp_path):
    (tmp_path / "piqa").mkdir()
    row = {"goal": "open a jar", "sol1": "twist the lid", "sol2": "eat it", "label": 1}
    write_rows(tmp_path / "piqa" / "validation.jsonl", [row])
    argv = ["--model", f"m={base}", "--tasks", "piqa", "--data_dir", str(tmp_path)]
    evaluation.main([*argv, "--output_dir", str(tmp_path / "out")])
    sample = json.loads((tmp_path / "out" / "samples_m_piqa.jsonl").read_text())
    assert sample["gold"] == 1 and sample["answers"] == ["twist the lid", "eat it"]


@pytest.mark.parametrize("change", ["model family"], indirect=True)
def test_a_model_family(change, tmp_path):
    """Mistral's logits are transformers'; a sliding window, which is not computed, is refused."""
    folder = write_checkpoint(tmp_path / "mistral", model_type="mistral", sliding_window=None)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = reference(torch.arange(3, 23)[None]).logits[0]
    torch.testing.assert_close(logits(load_model(folder)), expected, atol=1e-5, rtol=1e-5)
    raw = json.loads((folder / "config.json").read_text()) | {"sliding_window": 4096}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(model.UserError, match="sliding"):
        load_model(folder)


# --- the commands by task, run as they stand there ------------------------------------------------

BY_TASK = README.partition("## By task")[2].partition("\n## ")[0]
COMMANDS = []
for block in re.findall(r"```\n(.*?)```", BY_TASK, re.S):
    COMMANDS += [shlex.split(line, comments=True) for line in block.splitlines()]
SHORTER = {
    "sft.py": ["--max_steps", "2", "--eval_answers", "2", "--max_new_tokens", "4"],
    "dpo.py": ["--max_steps", "1", "--eval_answers", "0"],
    "eval.py": ["--max_new_tokens", "4"],
    "data.py": ["--max_samples", "4"],
}


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A folder with the files that the commands name: Qwen/Qwen3-0.6B is the embedded model."""
    folder, mcqa = tmp_path_factory.mktemp("newcomer"), ROOT / "examples" / "mcqa"
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen3-0.6B").symlink_to(ROOT / "examples" / "tiny-qwen3")
    files = {"rows": "train", "pairs": "train_pairs", "questions": "validation"}
    for name, source in files.items():
        lines = (mcqa / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:20]))
    item = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    blank = {"sentence": "The _ is big.", "option1": "cat", "option2": "sun", "answer": "2"}
    tasks = {"arc_challenge/test": item | {"answerKey": "A"}, "winogrande/validation": blank}
    for name, row in tasks.items():
        file = folder / "tasks" / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        write_rows(file, [row])
    return folder


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_by_task(number, newcomer, monkeypatch, capfd, hub):
    """Each goes on from what those before it wrote. Benchmarks come from a folder, as there is no
    hub of data sets here, and the runs are cut short."""
    program, script, *words = COMMANDS[number]
    monkeypatch.chdir(newcomer)
    if "--tasks" in words:
        words += ["--data_dir", "tasks"]
    if program == "torchrun":
        script = words[words.index("sft.py")]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        words = [str(ROOT / script), *words[words.index("sft.py") + 1 :], *SHORTER[script]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run([*command, *words], capture_output=True, env=environment)
        assert ended.returncode == 0, ended.stderr.decode()[-2000:]
        return
    assert program == "python"
    if words[0] != "show":
        words += SHORTER.get(script, [])
    monkeypatch.setattr(sys, "argv", [script, *words])
    if "--generate" in words:  # of a model of two steps
        with pytest.raises(SystemExit):
            MODULES[script].main()
        assert "questions.jsonl: no pairs; no answer in the text" in capfd.readouterr().err
        return
    MODULES[script].main()


def test_what_the_commands_by_task_wrote(newcomer):
    output = newcomer / "output"
    for run in ("mine", "four", "mine-dpo", "two"):
        assert (output / run / "adapter" / "adapter_model.safetensors").is_file()
        assert (output / run / "merged" / "model.safetensors").is_file()
    assert (newcomer / "merged" / "model.safetensors").is_file()
    assert "| sft |" in (output / "eval" / "report.md").read_text()


# --- the table of rows ----------------------------------------------------------------------------

Q = {"role": "user", "content": "q"}
A, B = ({"role": "assistant", "content": text} for text in "ab")
REFERENCE = {"question": "q", "reference": "a"}
CHOICES = {"question": "q", "choices": ["a", "b"], "answer": "A"}
TABLE = {  # the keys of a line: its rows, what SFT scores, whether it is a pair, what is asked
    "`messages` or": ([{"messages": [Q, A]}, {"conversations": [Q, A]}], "a", False, [Q]),
    "`prompt`, `completion`": ([{"prompt": "q", "completion": "a"}], "a", False, "q"),
    "`label`": ([{"prompt": "q", "completion": "a", "label": True}], "a", False, "q"),
    "`text`": ([{"text": "a"}], "a", False, "a"),
    "`prompt` (or": ([{"prompt": [Q], "chosen": [A], "rejected": [B]}], "a", True, [Q]),
    "`question`, `choices`": ([CHOICES, CHOICES | {"answer": 0}], None, False, [Q]),
    "`question`, `prompt`": ([{"question": "q"}, REFERENCE], None, False, [Q]),
}


@pytest.mark.parametrize("keys", TABLE)
def test_rows_of_the_table(keys, base, tmp_path):
    """Each line is there, and training, preferences and a chat read its rows as it says."""
    assert README.count(f"| {keys}") == 1
    rows, scored, is_pair, asked = TABLE[keys]
    tokenizer = data.Tokenizer(base)
    for row in rows:
        if scored is None:
            with pytest.raises(model.UserError, match="fits no schema"):
                data.render_row(row, tokenizer)
        else:
            (segment,) = data.render_row(row, tokenizer)
            text = tokenizer.decode(segment.labels[segment.labels != IGNORE])
            assert text.strip() == scored.strip() or keys == "`text`"
        if is_pair:
            assert len(data.render_row(row, tokenizer, preference=True)) == 3
        file = write_rows(tmp_path / "rows.jsonl", [row])
        assert evaluation.read_prompts(str(file), evaluation.ChatConfig()) == [(asked, {})]

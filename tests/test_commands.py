"""The help of every command, and what the commands of data.py do with their rows."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_data import SHARED, chatml  # noqa: F401

import data
import dpo
import eval as evaluation
import lora
import qlora
import sft
from data import render_row
from support import VERSION
from support.errors import UserError
from support.readers import read_rows
from support.settings import comments_of

WHOLE = {"sft.py": (sft, sft.SFTConfig), "dpo.py": (dpo, dpo.DPOConfig)}
WHOLE["eval.py"] = evaluation, evaluation.EvalConfig
GROUPS = {"data.py": data, "lora.py": lora, "qlora.py": qlora, "eval.py": evaluation}
CALLS = {name: (module, cls, []) for name, (module, cls) in WHOLE.items()}
for name, module in GROUPS.items():
    for command, (cls, _) in module.COMMANDS.items():
        CALLS[f"{name} {command}"] = module, cls, [command]


def output_of(module, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("call", CALLS)
def test_help_has_every_setting_in_its_section(call, monkeypatch, capsys):
    module, cls, command = CALLS[call]
    text = output_of(module, [*command, "--help"], monkeypatch, capsys)
    for field in fields(cls):
        kind = getattr(field.type, "__name__", "")
        assert f" --{field.name} " in text and (kind != "int" or f"--{field.name} INT" in text)
    comments = comments_of(cls)
    assert comments.keys() == {field.name for field in fields(cls)}
    for title, comment in comments.values():
        assert f" {title}: --" in text and title != "settings" and comment
    if "recipe" in comments:
        for part in ("mcqa(cot=1.0, topic='')", "movielens(liked=4)", "ultrafeedback()"):
            assert part in text
    assert f"plaintune {VERSION}" in output_of(
        module, [*command, "--version"], monkeypatch, capsys
    )


@pytest.mark.parametrize("name", ["data.py", "lora.py", "qlora.py"])
def test_help_lists_the_commands(name, monkeypatch, capsys):
    module = GROUPS[name]
    text = output_of(module, ["--help"], monkeypatch, capsys)
    for command, (_, function) in module.COMMANDS.items():
        assert f" {command} {' '.join(function.__doc__.splitlines()[0].split())}" in text
    monkeypatch.setattr(sys, "argv", [name, "--dta"])
    with pytest.raises(UserError, match="unknown command '--dta'; one of .* is needed"):
        module.main()


# --- show, audit, pairs ---------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "four"}, {"role": "assistant", "content": "five"}]
ROWS = [
    {"prompt": "a cat", "completion": " sat"},
    {"messages": TURNS},
    {"instruction": "six", "output": "seven"},
]


@pytest.fixture
def run(chatml, tmp_path, monkeypatch, capsys):  # noqa: F811
    """run(rows, *words) -> what `python data.py` prints in an empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(rows, command, *words, model=chatml.folder):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        argv = ["data.py", command, "--data", str(tmp_path / "rows.jsonl"), *words]
        argv += ["--model", str(model)] if model else []
        monkeypatch.setattr(sys, "argv", argv)
        data.main()
        return capsys.readouterr().out

    return run


def test_no_colour_where_none_is_wanted(run, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\033[32m" in run(ROWS[:1], "show")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run(ROWS[:1], "show") and "⟦" in run(ROWS[:1], "show")


def test_an_audit_by_characters_needs_no_model(run):
    line = run(ROWS, "audit", "--by", "characters", model=None).splitlines()[1]
    lengths = [len("a cat sat"), len("fourfive"), len("sixseven")]
    assert [float(x) for x in line.split()[1:4]] == [8, round(np.mean(lengths), 1), 9]
    with pytest.raises(UserError, match="--model is needed"):
        run(ROWS, "audit", model=None)
    with pytest.raises(UserError, match=r"rows.jsonl:1: fits no schema"):
        run([{"txt": "x"}], "audit", "--by", "characters", model=None)


def test_an_audit_leaves_a_file_where_it_is_asked_to_and_reads_both_sets(run, tmp_path):
    (tmp_path / "held_out.jsonl").write_text(json.dumps(ROWS[0]))
    output = run(ROWS, "audit", "--eval_data", str(tmp_path / "held_out.jsonl"))
    assert not list(Path().iterdir())
    assert "0 duplicates; 3 of 3 score" in output and "0 duplicates; 1 of 1 score" in output
    assert output.index("evaluation rows:") > output.index("3 of 3")
    run(ROWS, "audit", "--output", "lengths.png")
    assert [path.name for path in Path().iterdir()] == ["lengths.png"]
    with pytest.raises(UserError, match="a histogram is a .png"):
        run(ROWS, "audit", "--output", "lengths.pdf")


def test_pairs_read_what_an_evaluation_reads(run, chatml, tmp_path):  # noqa: F811
    choices = ["the cat", "the mat", "an owl"]
    rows = [
        {"question": "which", "choices": choices, "answer": "B"},
        {"question": "who", "choices": choices, "answer": 2},
        {"question": "what", "choices": choices, "answer": "the cat"},
        {"question": "how", "reference": "so\nAnswer: on"},
    ]
    output = run(rows, "pairs", "--output", "pairs.jsonl")
    assert "3 pairs; no wrong answer known: 1" in output
    pairs = [row for _, row in read_rows("pairs.jsonl")]
    for pair, row, right in zip(pairs, rows, (choices[1], choices[2], choices[0])):
        assert pair["prompt"] == [{"role": "user", "content": row["question"]}]
        assert pair["chosen"] == [{"role": "assistant", "content": right}]
        assert pair["rejected"][0]["content"] in set(choices) - {right}
        assert pair["choices"] == choices  # a held-out pair is asked among them
        assert not isinstance(render_row(pair, chatml, preference=True), str)
    for row, message in (
        ({"question": "why"}, "no answer that could be chosen"),
        ({"text": "a text"}, "no answer that could be chosen"),
        ({"question": "q", "choices": choices, "answer": "a dog"}, "not a row of choices"),
        ({"prompt": "q", "completion": "a", "answer": 1}, "text of the right choice"),
        ({"messages": [*TURNS, TURNS[0]]}, "no answer that could be chosen"),
        ({"prompt": "q", "completion": "a cat " * 40}, "answer longer than max_length"),
        (
            {"question": "q", "choices": choices, "answer": 0, "context": "It rains."},
            "'context' is not read beside question, choices",
        ),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        argv = ["pairs", "--model", str(chatml.folder), "--data", str(tmp_path / "rows.jsonl")]
        with pytest.raises(UserError, match=rf"rows.jsonl:1: .*{message}"):
            evaluation.main([*argv, "--max_length", "50", "--output", "other.jsonl"])


def test_pairs_keep_what_stands_beside_a_row(run):
    """What the template and the loss need of a row, and the thought before its answer."""
    answer = {"role": "assistant", "content": "so\nAnswer: owl", "reasoning_content": "because"}
    beside = {"weight": 0.5, "tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}}
    row = {"messages": [TURNS[0], answer], "choices": ["owl", "cat"]} | beside
    run([row], "pairs", "--output", "pairs.jsonl")
    ((_, pair),) = read_rows("pairs.jsonl")
    assert pair["chosen"] == [answer] and beside.items() <= pair.items()
    assert pair["rejected"] == [answer | {"content": "so\nAnswer: cat"}]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared folder beside the repository")
def test_a_call_of_a_tool_is_no_answer_to_choose():
    tokenizer = data.Tokenizer(SHARED / "tokenizers" / "qwen3")
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    with pytest.raises(UserError, match="here: it has no answer that could be chosen"):
        row = {"messages": [TURNS[0], call]}
        evaluation.with_answer("here", row, tokenizer, data.DataConfig(data=["d"]))

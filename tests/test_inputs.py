"""Hostile input to all commands: one line that names file, row, key or flag, soon; nothing is lost.

`pytest tests/test_inputs.py -rP` prints the fault list: each case, its message and its seconds.
"""

import csv
import gzip
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import data
import dpo
import eval as evaluation
import lora
import model as M
import qlora
import sft
from model import ModelConfig, load_model
from support import errors, files, hub, readers, sandbox
from support.errors import UserError, sanitize
from support.settings import parse_config

TINY = ROOT / "examples" / "tiny-qwen3"
CONFIG = json.loads((TINY / "config.json").read_text())
COMMANDS = {
    "sft": sft,
    "dpo": dpo,
    "eval": evaluation,
    "data": data,
    "lora": lora,
    "qlora": qlora,
}
TALK = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is 4.\nAnswer: B"},
    ]
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(adapter's folder, 4-bit model's folder)."""
    folder, model = tmp_path_factory.mktemp("made"), load_model(TINY)
    lora.add_lora(model, lora.LoRAConfig(lora_r=4, target_modules=["q_proj", "v_proj"]))
    lora.save_adapter(model, folder / "a", TINY)
    quant = qlora.QuantConfig(load_in_4bit=True)
    qlora.save_4bit(qlora.load_4bit(TINY, quant), folder / "q", quant)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch, adapter):
    """The working directory: m, the tiny model; a, an adapter; q, a model in 4 bit; rows.jsonl."""
    for source, name in ((TINY, "m"), (adapter / "a", "a"), (adapter / "q", "q")):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(4 * (json.dumps(TALK) + "\n"))
    (tmp_path / "precious.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sandbox.bounded.__wrapped__, "__defaults__", (1, 2**28)
    )  # seconds, bytes: the same, sooner
    return tmp_path


# --- the fault list -------------------------------------------------------------------------------


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(target):
    def make(path):
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def changed(source, **changes):
    """A JSON file of the home with other values."""
    return lambda path: path.write_text(
        json.dumps(json.loads((path.parent / source).read_text()) | changes)
    )


ADDED = {
    "id": 500,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}


def tokenizer_of(**changes):
    return {"m/tokenizer.json": changed("tokenizer.json", **changes)}


def tensors(change):
    def make(path):
        found = load_file(path)
        change(found)
        save_file(found, path)

    return make


def config(**changes):
    return {"m/config.json": changed("config.json", **changes)}


def adapter_config(**changes):
    return {"a/adapter_config.json": changed("adapter_config.json", **changes)}


def state(**changes):
    """The first 4-bit weight's description, with other values."""

    def change(found):
        name = next(name for name in found if "quant_state" in name)
        text = json.dumps(json.loads(bytes(found[name].tolist())) | changes)
        found[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return {"q/model.safetensors": tensors(change)}


def sharded(**shards):
    """The model behind an index, which names these files for tensors it holds or invents."""

    def make(path):
        (path.parent / "model.safetensors").rename(path.parent / "one.safetensors")
        names = dict.fromkeys(load_file(path.parent / "one.safetensors"), "one.safetensors")
        path.write_text(json.dumps({"weight_map": names | shards}))

    return {"m/model.safetensors.index.json": make}


def row(value):
    return {"rows.jsonl": value if isinstance(value, (str, bytes)) else json.dumps(value)}


def kwargs(value):
    return row(TALK | {"chat_template_kwargs": value})


def template(text):
    return {"m/chat_template.jinja": text}


def cut_short(path):
    path.write_bytes(gzip.compress(json.dumps(TALK).encode() * 50)[:-20])


def bomb(path):
    path.write_bytes(gzip.compress(b"a" * 2**26))


def parquet(**columns):
    def make(path):
        import pyarrow
        import pyarrow.parquet

        names = [name.rstrip("_") for name in columns]
        table = pyarrow.Table.from_arrays(
            [pyarrow.array(column) for column in columns.values()], names=names
        )
        pyarrow.parquet.write_table(table, path)

    return make


def not_utf8(path):
    parquet(text=["hello"] * 9)(path)
    path.write_bytes(path.read_bytes().replace(b"hello", b"\xff\xfe\xfd\xfc\xfb"))


TRAIN = "sft --model m --data rows.jsonl --output_dir out --max_steps 1 --eval_answers 0 --merge false "  # noqa: E501
PAIRS = (
    "dpo --model m --data rows.jsonl --output_dir out --max_steps 1 --eval_answers 0 --merge false "
    "--ref_cache cache "
)
SHOW = "data show --model m --data rows.jsonl "
MERGE = "lora merge --model m --adapter a --output_dir out "
ASK = "eval --model m --data rows.jsonl --output_dir out --max_new_tokens 3 "
ASK4 = "eval --model q --data rows.jsonl --output_dir out --max_new_tokens 3 "
BOMB = "(([a-z._0-9])+)+Q"  # 2^30 ways to fail on a module's path
NORM, FIRST = "model.norm.weight", "model.embed_tokens.weight"
CASES = {
    # files of a model that are none, and what they say
    "config is a pipe": (TRAIN, {"m/config.json": pipe}, "config.json: not a regular file"),
    "config never ends": (
        TRAIN,
        {"m/config.json": link("/dev/zero")},
        "config.json: not a regular file",
    ),
    "config twice": (
        TRAIN,
        {"m/config.json": json.dumps(CONFIG)[:-1] + ', "hidden_size": 64}'},
        "'hidden_size' twice",
    ),
    "config in UTF-16": (
        TRAIN,
        {"m/config.json": json.dumps(CONFIG).encode("utf-16")},
        "config.json: not valid JSON",
    ),
    "config with escapes": (
        TRAIN,
        config(model_type="\x1b[31m\n"),
        r"model_type '\x1b[31m",
    ),
    "config with a long name": (
        TRAIN,
        config(torch_dtype="x" * 10**6),
        "config.json: dtype 'xxx",
        "bfloat16",
    ),
    "config of 4096 layers": (
        TRAIN,
        config(num_hidden_layers=4096),
        "num_hidden_layers is 4096, of 46 tensors",
    ),
    "config eps is NaN": (TRAIN, config(rms_norm_eps=math.nan), "rms_norm_eps is 'nan'"),
    "config yarn of 1": (
        TRAIN,
        config(rope_scaling={"type": "yarn", "factor": 4, "rope_theta": 1}),
        "rope can't",
    ),
    "weights are a pipe": (
        TRAIN,
        {"m/model.safetensors": pipe},
        "model.safetensors: not a regular file",
    ),
    "weights are a folder": (
        TRAIN,
        {"m/model.safetensors": folder},
        "model.safetensors: not a regular file",
    ),
    "one weight is -inf": (
        TRAIN,
        {"m/model.safetensors": tensors(lambda t: t[NORM].view(-1)[3:4].fill_(-math.inf))},
        NORM,
        "infinity",
    ),
    "weights are NaN": (
        TRAIN,
        {"m/model.safetensors": tensors(lambda t: t[NORM].fill_(math.nan))},
        NORM,
        "NaN",
    ),
    "weights of a small vocabulary": (
        TRAIN,
        config(vocab_size=300)
        | {"m/model.safetensors": tensors(lambda t: t.update({FIRST: t[FIRST][:300].clone()}))},
        "outside the model's vocabulary of 300",
    ),
    "weights named in colour": (
        TRAIN,
        {"m/model.safetensors": tensors(lambda t: t.update({"\x1b[31mx": t.pop(NORM)}))},
        r"\x1b[31mx",
        f"missing {NORM}",
    ),
    "index leaves in a name": (
        TRAIN,
        sharded(x="..\\..\\x\n\x1b.safetensors"),
        "index.json",
        r"\x1b",
    ),
    "index to a pipe": (
        TRAIN,
        sharded(x="p.safetensors") | {"m/p.safetensors": pipe},
        "p.safetensors: not a regular",
    ),
    "index to half a character": (
        TRAIN,
        sharded(x="\ud800.safetensors"),
        "index.json",
        r"\ud800",
    ),
    "row of 5 MB": (
        SHOW,
        row({"text": "word " * 10**6}),
        "rows.jsonl:1: a row of 5,000,000 characters; split it into rows of at most 2,097,152",
    ),
    "tokenizer is huge": (
        TRAIN,
        {"m/tokenizer.json": link("/dev/zero")},
        "error: m/tokenizer.json: not a regular file",
    ),
    "tokenizer's regex never ends": (
        SHOW,
        {
            "m/tokenizer.json": lambda path: path.write_text(
                json.dumps(
                    json.loads(path.read_text())
                    | {
                        "pre_tokenizer": {
                            "type": "Split",
                            "pattern": {"Regex": r"(\w+\s?)+$"},
                            "behavior": "Isolated",
                            "invert": False,
                        }
                    }
                )
            ),
            **row({"text": "a" * 60 + "!"}),
        },
        "tokenizer.json: cannot encode",
        "retry-limit",
    ),
    "tokenizer whose decoder makes texts longer": (
        SHOW,
        tokenizer_of(
            decoder={
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1000},
                    {"type": "Replace", "pattern": {"String": "b"}, "content": "c" * 1000},
                ],
            }
        ),
        "m/tokenizer.json: its decoder makes a text up to 1,000,000 times longer",
    ),
    "tokenizer whose decoder writes between characters": (
        SHOW,
        tokenizer_of(
            decoder={"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 10**6}
        ),
        "m/tokenizer.json: its decoder makes a text up to 1,000,001 times longer",
    ),
    "tokenizer whose normalizer makes texts longer": (
        SHOW,
        tokenizer_of(normalizer={"type": "Prepend", "prepend": "b" * 10**6}),
        "m/tokenizer.json: its normalizer makes a text up to 1,000,001 times longer",
    ),
    "tokenizer that repeats a text": (
        SHOW,
        tokenizer_of(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 999,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
                "special_tokens": {},
            }
        ),
        "m/tokenizer.json: its post_processor makes a text up to 999 times longer",
    ),
    "tokenizer with a token of 1 MB": (
        SHOW,
        tokenizer_of(added_tokens=[ADDED | {"content": "b" * 10**6}]),
        "m/tokenizer.json: has a token of 1,000,000 characters",
    ),
    "tokenizer config is a pipe": (
        TRAIN,
        {"m/tokenizer_config.json": pipe},
        "tokenizer_config.json: not a regular",
    ),
    # templates
    "template with a loop in a loop": (
        SHOW,
        template(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        ),
        "rows.jsonl:1",
        "timed out after",
    ),
    "template that writes and writes": (
        SHOW,
        template(
            "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaa{% endfor %}{% endfor %}"
        ),
        "chat_template.jinja",
    ),
    "template of 10 GB": (
        SHOW,
        template("{{ 'a' * 10**10 }}"),
        "the chat template failed: line 1: MemoryError",
    ),
    "template that doubles": (
        SHOW,
        template(
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}"
        ),
        "MemoryError",
    ),
    "template of a huge power": (
        SHOW,
        template("{{ 7 ** (10 ** 9) }}"),
        "chat_template.jinja",
        "timed out after",
    ),
    "template that pads": (SHOW, template("{{ 'a'|center(10**10) }}"), "MemoryError"),
    "template that calls itself": (
        SHOW,
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "recursion",
    ),
    "template that reads files": (
        SHOW,
        template("{% include '/etc/passwd' %}"),
        "no loader",
    ),
    "template that looks behind": (
        SHOW,
        template("\n\n{{ cycler.__init__.__globals__ }}"),
        "line 3",
        "unsafe",
    ),
    "template that formats": (
        SHOW,
        template("{{ '{0.__class__.__mro__}'.format('') }}"),
        "unsafe",
    ),
    "template with a wrong line": (
        SHOW,
        template("a\nb\n{% endif %}"),
        "chat_template.jinja",
        "line 3",
    ),
    "template of a megabyte": (
        SHOW,
        template("x" * 2**21),
        "chat_template.jinja: larger than 1,048,576 bytes",
    ),
    "template that lists a billion": (
        SHOW,
        template("{{ [1]|slice(10**9)|list }}"),
        "chat_template.jinja",
    ),
    "template that asks in colour": (
        SHOW,
        template("{{ raise_exception('\x1b[2J' * 10000) }}"),
        r"line 1: \x1b[2J",
    ),
    # rows and their files
    "row twice": (
        SHOW,
        row('{"text": "a", "text": "b"}'),
        "rows.jsonl:1: not JSON: 'text' twice",
    ),
    "row of a huge weight": (
        SHOW,
        row('{"text": "a", "weight": 1' + "0" * 400 + "}"),
        "rows.jsonl:1: 'weight'",
    ),
    "row of tools too deep": (
        SHOW,
        row(TALK | {"tools": "[" * 10**5}),
        "rows.jsonl:1: 'tools' must be",
    ),
    "row that renames the template's self": (
        SHOW,
        kwargs({"self": 1}),
        "rows.jsonl:1",
        "'chat_template_kwargs' must be",
    ),
    "row of a million keys": (
        SHOW,
        row({f"\x1bk{n}": 1 for n in range(10**5)}),
        "fits no schema: it has",
        "one of messages",
    ),
    "row of 10 MB": (
        SHOW,
        row({"text": ["a" * 10**7]}),
        "rows.jsonl:1: 'text' must be a string",
        "aaa…",
    ),
    "row cut at 10 MB": (SHOW, row('{"text": "' + "a" * 10**7), "rows.jsonl:1: not JSON"),
    "row of 10 MB of spaces": (SHOW, row({"text": " " * 10**7}), "10,000,000 characters; split"),
    "row of 5,000 messages": (
        SHOW,
        row({"messages": TALK["messages"] * 2500}),
        "rendering 5,000 messages: timed out",
    ),
    "row of a line without end": (
        SHOW,
        row("x" * (2**26 + 1)),
        "rows.jsonl:1: a line of more than",
    ),
    "rows from a pipe": (SHOW, {"rows.jsonl": pipe}, "rows.jsonl: not a regular file"),
    "rows from a device": (
        SHOW,
        {"rows.jsonl": link("/dev/zero")},
        "rows.jsonl: not a regular file",
    ),
    "rows with NULs in UTF-16": (
        SHOW,
        row('{"text": "a"}'.encode("utf-16")),
        "rows.jsonl:1: not UTF-8",
    ),
    "gzip that expands": (
        "data show --model m --data x.jsonl.gz",
        {"x.jsonl.gz": bomb},
        "more than a hundred times",
    ),
    "gzip of a list that expands": (
        "data show --model m --data x.json.gz",
        {"x.json.gz": bomb},
        "a hundred times",
    ),
    "gzip cut short": (
        "data show --model m --data x.jsonl.gz",
        {"x.jsonl.gz": cut_short},
        "gz: cannot be read",
    ),
    "CSV with a column twice": (
        "data show --model m --data x.csv",
        {"x.csv": "text,text\na,b\n"},
        "'text' twice",
    ),
    "parquet with a column twice": (
        "data show --model m --data x.parquet",
        {"x.parquet": parquet(text=["a"], text_=["b"])},
        "x.parquet: not a parquet file: 'text' twice",
    ),
    "parquet not in UTF-8": (
        "data show --model m --data x.parquet",
        {"x.parquet": not_utf8},
        "x.parquet: not a",
    ),
    "parquet from a pipe": (
        "data show --model m --data x.parquet",
        {"x.parquet": pipe},
        "not a regular file",
    ),
    "data without a name": (
        "data show --model m --data=",
        {},
        "'': a source of rows needs a name",
    ),
    "data of nothing": (
        "sft --model m --output_dir out --data",
        {},
        "--data: expected at least one argument",
    ),
    "data of a repeated dot": (
        "data show --model m --data org/na..me",
        {},
        "org/na..me: no file here",
    ),
    "data of weight inf": (
        "data show --model m --data rows.jsonl@1e300",
        {},
        "the weight after @",
    ),
    "data of bytes": (
        "data show --model m --data \udcff.jsonl",
        {},
        "--data: expected list[str]",
    ),
    "recipe of nested choices": (
        SHOW + "--recipe mcqa",
        row({"question": "q", "choices": [["a"], "b"], "answer": "b"}),
        "rows.jsonl:1: does not fit recipe mcqa",
    ),
    # settings
    "YAML of a billion": (
        TRAIN + "--config c.yaml",
        {"c.yaml": "recipe_args:\n  a: &a [x, x]\n  b: &b [*a, *a]\n"},
        "c.yaml: has aliases",
    ),
    "YAML that runs": (
        TRAIN + "--config c.yaml",
        {"c.yaml": "recipe_args: {a: !!python/name:os.system }"},
        "c.yaml",
    ),
    "YAML of a long number": (
        TRAIN + "--config c.yaml",
        {"c.yaml": "seed: " + "9" * 5000},
        "c.yaml:1: seed: expected int, found '999",
    ),
    "YAML from a pipe": (
        "sft --config c.yaml",
        {"c.yaml": pipe},
        "c.yaml: not a regular file",
    ),
    "config of nothing": (
        TRAIN + "--config",
        {},
        "--config: expected at least one argument",
    ),
    "rank that is no number": (
        TRAIN + '--rank_pattern {"q_proj":2.5}',
        {},
        "--rank_pattern: expected dict[str, int]",
    ),
    "rank beyond everything": (
        TRAIN + "--lora_r 1000000000",
        {},
        "lora_r: 1000000000 is not above 0 and",
    ),
    "rank of a deep flag": (
        TRAIN + "--rank_pattern " + "[" * 10**5,
        {},
        "--rank_pattern: expected dict",
    ),
    "regex that never ends": (
        TRAIN + f"--target_modules {BOMB}",
        {},
        "matching target_modules",
    ),
    "steps without end": (
        TRAIN.replace("_steps 1", "_steps 1" + "0" * 30),
        {},
        "--max_steps: expected int",
    ),
    "steps to infinity": (
        TRAIN.replace("_steps 1", "_steps inf"),
        {},
        "--max_steps: expected int",
    ),
    "rate that is NaN": (
        TRAIN + "--learning_rate nan",
        {},
        "--learning_rate: expected float, found 'nan'",
    ),
    "warmup of five runs": (
        TRAIN + "--warmup_ratio 5",
        {},
        "--warmup_ratio: 5.0 is not from 0 to 1",
    ),
    "samples below none": (TRAIN + "--max_samples -1", {}, "--max_samples: -1 is below 1"),
    "a device that computes nothing": (
        TRAIN + "--device meta",
        {},
        "device: meta can't be used here",
    ),
    "a run in a model's folder": (
        TRAIN.replace("out ", "m ") + "--overwrite_output_dir",
        {},
        "m: holds files",
    ),
    "preference of no weight": (
        PAIRS + "--loss_weights 0",
        {},
        "loss_weights, rpo_alpha: [0.0, 0.0]",
    ),
    "preference to infinity": (
        PAIRS + "--simpo_gamma inf",
        {},
        "--simpo_gamma: expected float",
    ),
    "preference without pairs": (PAIRS, {}, "rows.jsonl:1: fits no schema"),
    # adapters and 4 bits
    "adapter of a bomb": (
        MERGE,
        adapter_config(target_modules=BOMB),
        "a: not an adapter",
        "timed out after",
    ),
    "adapter of a bomb in ranks": (
        MERGE,
        adapter_config(rank_pattern={BOMB: 2}),
        "a: not an adapter",
        "timed out",
    ),
    "adapter of a nested regex": (
        MERGE,
        adapter_config(target_modules="(" * 5000),
        "is no regex",
    ),
    "adapter alpha NaN": (MERGE, adapter_config(lora_alpha=math.nan), "lora_alpha = NaN"),
    "adapter rank 10^9": (
        MERGE,
        adapter_config(r=10**9),
        "lora_r: 1000000000 is not above 0 and",
    ),
    "adapter of a base that is no name": (
        MERGE,
        adapter_config(base_model_name_or_path=5),
        "base_model_name_or_path",
    ),
    "adapter's weights a pipe": (
        MERGE,
        {"a/adapter_model.safetensors": pipe},
        "not a regular file",
    ),
    "adapter of whole numbers": (
        MERGE,
        {
            "a/adapter_model.safetensors": tensors(
                lambda t: t.update({key: x.int() for key, x in t.items()})
            )
        },
        "missing base_model",
    ),
    "adapter that overflows": (
        MERGE,
        {"a/adapter_model.safetensors": tensors(lambda t: [x.fill_(1e30) for x in t.values()])},
        "out: not written",
        "would hold NaN or infinity",
    ),
    "adapter that is nowhere": (
        MERGE.replace("a --out", "x/y --out"),
        {},
        "adapter x/y: no",
    ),
    "4 bits of offset NaN": (
        ASK4,
        state(nested_offset=math.nan),
        "does not describe 4-bit weights",
    ),
    "4 bits of blocks of 0": (ASK4, state(blocksize=0), "does not describe 4-bit weights"),
    "4 bits in whole numbers": (
        ASK4,
        {
            "q/model.safetensors": tensors(
                lambda t: t.update(
                    {n: x.int() for n, x in t.items() if n.endswith("q_proj.weight")}
                )
            )
        },
        "another dtype",
    ),
    "4 bits onto something": (
        "qlora quantize --model m --output_dir m",
        {},
        "--output_dir m: exists already",
    ),
    # evaluation, and what data.py writes
    "evaluation of an empty name": (
        ASK.replace("model m", "model="),
        {},
        "--model: '' is empty",
    ),
    "evaluation of a name that leaves": (
        ASK.replace("model m", "model ../../x=m"),
        {},
        "neither a folder nor",
    ),
    "evaluation of an empty text": (ASK, row({"text": ""}), "rows.jsonl:1: an empty text"),
    "evaluation of half a character": (
        ASK,
        row('{"text": "\\ud800"}'),
        r"cannot encode '\ud800'",
    ),
    "evaluation of a damaged run": (
        "eval --model run --data rows.jsonl --output_dir out",
        {
            "run/config.json": '{"bnb_4bit_quant_type": [1]}',
            "run/adapter_config.json": None,
        },
        "run/config.json: not",
    ),
    "samples that are a pipe": (
        ASK,
        {"out/samples_m_rows.jsonl": pipe},
        "samples_m_rows.jsonl: not a regular file",
    ),
    "answers without end": (
        ASK.replace("tokens 3", "tokens 9999999"),
        {},
        "--max_new_tokens: 9999999 is not from 1",
    ),
    "pairs of a number": (
        "data pairs --model m --data rows.jsonl --output o",
        row({"prompt": "a", "completion": "b", "choices": ["b", "c"], "answer": 5}),
        "'answer' must be the text",
    ),
    "histogram over a file": (
        "data audit --model m --data rows.jsonl --output precious.txt",
        {},
        "is a .png",
    ),
    "mix over a file": (
        "data mix --model m --data rows.jsonl --output precious.txt",
        {},
        "exists already",
    ),
    "show of a number below 0": (SHOW + "--n -1", {}, "--n: -1 is below 0"),
}


def contents(root):
    return {
        path: path.is_file() and path.read_bytes()
        for path in root.rglob("*")
        if not path.is_fifo()
    }


@pytest.mark.parametrize("case", CASES)
def test_it_ends_in_one_line_and_nothing_is_lost(case, home, monkeypatch, capsys):
    """Exit status 2 and one line that names what is wrong and is safe to print, within seconds.

    Every file that was there is there.
    """
    line, files, *parts = CASES[case]
    for name, content in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "run/adapter_config.json":
            shutil.copytree(home / "a", home / "run" / "adapter")
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    command, *argv = line.split()
    before = contents(home)
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *argv])
    began = time.perf_counter()
    with pytest.raises(SystemExit) as ended:
        errors.run_command(COMMANDS[command].main)
    seconds, told = time.perf_counter() - began, capsys.readouterr().err
    print(f"{case} -> {told.strip()} ({seconds:.1f} s)")
    told = [
        text
        for text in told.splitlines()
        if not text.startswith(("thread '<unnamed>'", "note: run with"))
    ]
    assert (
        ended.value.code == 2
        and len(told) == 1
        and told[0].startswith("error: ")
        and len(told[0]) < 1010
    )
    assert all(part in told[0] for part in parts), told
    assert sanitize(told[0]) == told[0] and seconds < 8
    after = contents(home)
    assert {path: after.get(path) for path in before} == before
    assert {path.relative_to(home).parts[0] for path in after.keys() - before.keys()} <= {"out"}


def test_a_name_may_hold_control_characters_only_as_escapes(home, monkeypatch, capsys):
    """What `show` prints of rows and templates leaves the terminal as it is."""
    content = "a\x1b]0;pwned\x07\x1b[2J\u202eb\0c\ttab"
    rows = {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": content},
        ]
    }
    (home / "rows.jsonl").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["data.py", *SHOW.split()[1:]])
    errors.run_command(data.main)
    shown = capsys.readouterr().out
    assert (
        shown.count(r"a\x1b]0;pwned\x07\x1b[2J\u202eb\x00c" + "\ttab") == 2
        and sanitize(shown) == shown
    )


def test_mixed_rows_keep_half_a_character_as_it_was(home, monkeypatch):
    (home / "rows.jsonl").write_text('{"text": "a", "x": "\\ud800"}\n')
    monkeypatch.setattr(
        sys, "argv", "data.py mix --model m --data rows.jsonl --output o.jsonl".split()
    )
    errors.run_command(data.main)
    assert json.loads((home / "o.jsonl").read_text()) == {"text": "a", "x": "\ud800"}


def test_long_texts_are_encoded_a_part_at_a_time(monkeypatch):
    """The library is given at most 2^20 characters and a text at a time; the ids are the same."""
    tokenizer, sizes = data.Tokenizer(TINY), []
    texts = ["ab cd " * 200_000] * 4 + ["x", ""]
    wanted = [
        tokenizer.backend.encode(text, add_special_tokens=False).ids
        for text in ("ab cd " * 200_000, "x", "")
    ]

    class Counting:
        def encode_batch_fast(self, texts, **options):
            sizes.append(sum(map(len, texts)))
            return backend.encode_batch_fast(texts, **options)

    backend, tokenizer.backend = tokenizer.backend, Counting()
    found = list(tokenizer.encode_all(texts))
    assert (
        found == [wanted[0]] * 4 + wanted[1:]
        and max(sizes) < 2**20 + 1_200_000
        and len(sizes) > 1
    )


def test_the_limits_leave_no_trace():
    """After a block, stopped or not, the timer, its handler and the memory limit are as before.

    A block inside another one has no time limit of its own.
    """
    import resource
    import signal

    def state():
        return signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_DATA)

    before = state()
    with pytest.raises(UserError, match="^x: timed out after 0.2 s"):
        with sandbox.bounded("x", 0.2):
            time.sleep(0.5)  # a busy machine's time does not count
            try:
                with sandbox.bounded("y", 99):
                    while True:
                        pass
            except Exception:
                pytest.fail("what is inside takes the end for its own")
    with sandbox.bounded("x"):
        pass
    assert state() == before and signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_sleep_is_no_work():
    """Only the processor's time counts: a block that waits longer than its limit is no fault."""
    with sandbox.bounded("x", 0.1):
        time.sleep(0.3)


# --- values of settings ---------------------------------------------------------------------------

SETTINGS = {
    "eval_strategy: no": "no",
    "merge: no": False,
    "merge: Off": False,
    "output_dir: no": "no",
    "output_dir: 1.10": "1.10",
    "output_dir: 010": "010",
    "output_dir: 1:30": "1:30",
    "output_dir: 2026-11-25": "2026-11-25",
    "output_dir: true": "true",
    "max_steps: 010": 10,
    "max_steps: 1_000": 1000,
    "max_steps: 1:30": UserError,
    "max_steps: 0x10": UserError,
    "max_steps: 0b11": UserError,
    "max_steps: true": UserError,
    "learning_rate: 1:30.5": UserError,
    "learning_rate: 2e-4": 2e-4,
    "learning_rate: .inf": UserError,
    "seed: 2026-11-25": UserError,
    "seed: 2026-13-45": UserError,
    "max_samples: ~": None,
    "rank_pattern: {q_proj: 1:30}": UserError,
    "rank_pattern: {no: 4}": {"no": 4},
    "recipe_args: {cot: 0.5, n: 1:30, m: 010, on: 3, day: 2026-11-25, yes: '5'}": {
        "cot": 0.5,
        "n": "1:30",
        "m": "010",
        "on": 3,
        "day": "2026-11-25",
        "yes": "5",
    },
}


@pytest.mark.parametrize("line", SETTINGS)
def test_a_value_in_yaml_is_what_is_written(line, tmp_path):
    """As a flag reads it: YAML 1.1 made False, 90, 8 and a date of no, 1:30, 010 and 2026-11-25."""
    (tmp_path / "c.yaml").write_text(line)
    name, argv = line.partition(":")[0], ["--model", "m", "--data", "d", "--config"]
    if SETTINGS[line] is UserError:
        with pytest.raises(UserError, match=f"c.yaml:1: {name}: expected"):
            parse_config(sft.SFTConfig, [*argv, str(tmp_path / "c.yaml")])
    else:
        value = getattr(parse_config(sft.SFTConfig, [*argv, str(tmp_path / "c.yaml")]), name)
        assert value == SETTINGS[line] and type(value) is type(SETTINGS[line])


# --- files and folders ----------------------------------------------------------------------------


def write_folder(target, text="new"):
    with files.atomic_folder(target) as aside:
        (aside / "a").write_text(text)


def tree(folder):
    """{path: content} of all files below, through links; '->' marks the links."""
    paths = {p: "->" for p in folder.rglob("*") if p.is_symlink()}
    paths |= {p: p.read_text() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    return {str(path.relative_to(folder)): content for path, content in paths.items()}


def test_a_folder_is_written_through_a_link(tmp_path):
    """To a full folder, to an empty one and to none yet: the link stays a link."""
    for name in ("full", "empty"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    (tmp_path / "disk" / "full" / "b").write_text("old")
    for name in ("full", "empty", "none"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        write_folder(tmp_path / name)
    wanted = {f"disk/{name}/a": "new" for name in ("full", "empty", "none")}
    assert tree(tmp_path) == wanted | dict.fromkeys(("full", "empty", "none"), "->")


def test_a_mount_point_and_the_working_directory_stay(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "out" / "lost+found").mkdir()
    rename, node = type(tmp_path).rename, (tmp_path / "here").stat().st_ino

    def refuse(path, to):
        if "out" in (path.name, to.name):
            raise OSError(16, "Device or resource busy", str(path))
        return rename(path, to)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "out")
    monkeypatch.chdir(tmp_path / "here")
    for text in ("one", "two"):
        write_folder(tmp_path / "out", text)
    write_folder(".")
    assert tree(tmp_path) == {"out/a": "two", "here/a": "new"}
    assert (tmp_path / "out" / "lost+found").is_dir()
    assert (tmp_path / "here").stat().st_ino == node


def test_what_others_named_like_ours_is_left_and_what_a_kill_left_goes(tmp_path):
    for name in (".out.partial", ".out.old", ".f.partial", "f.partial", ".f"):
        (tmp_path / name).write_text("mine")
    left = files.aside_of(tmp_path / "out")
    left.mkdir()
    (left / "b").write_text("of a killed command")
    files.aside_of(tmp_path / "f").write_text("of a killed command, longer than the new one")
    write_folder(tmp_path / "out")
    files.write_text(tmp_path / "f", ["two\n", "lines"])
    mine = dict.fromkeys((".out.partial", ".out.old", ".f.partial", "f.partial", ".f"), "mine")
    assert tree(tmp_path) == mine | {"out/a": "new", "f": "two\nlines"}


def test_a_folder_with_what_a_kill_left_inside_is_free(tmp_path):
    (tmp_path / ".files.plaintune.partial").mkdir()
    assert files.is_free(tmp_path)
    write_folder(tmp_path)
    assert tree(tmp_path) == {"a": "new"} and not files.is_free(tmp_path)


@pytest.mark.parametrize("place", ["missing", "empty", "full"])
def test_two_commands_do_not_write_one_folder_or_file(place, tmp_path):
    """The second is refused and the first ends as if it had been alone."""
    out = tmp_path / "new" / "out"
    if place != "missing":
        out.mkdir(parents=True)
    if place == "full":
        (out / "a").write_text("old")
    with files.atomic_folder(out) as aside:
        (aside / "a").write_text("first")
        with pytest.raises(UserError, match="another run is using"):
            write_folder(out, "second")
    assert tree(out) == {"a": "first"} and [p.name for p in out.parent.iterdir()] == ["out"]

    def lines():
        yield "first"
        with pytest.raises(UserError, match="another run is using"):
            files.write_text(out / "f", "second")

    files.write_text(out / "f", lines())
    assert tree(out) == {"a": "first", "f": "first"}


def test_a_block_that_fails_leaves_all_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "f").write_text("old")

    def fail():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "f", fail())
    for name in ("out", "a/b/c"):
        with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path / name) as aside:
            (aside / "x").write_text("new")
            raise KeyboardInterrupt
    assert tree(tmp_path) == {"f": "old"} and len(list(tmp_path.iterdir())) == 2


def test_a_file_in_the_folders_place_stays(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError):
        write_folder(tmp_path / "out")
    assert tree(tmp_path) == {"out": "mine"}


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert tree(tmp_path) == {"real": "new", "link": "->"}


def test_clearing_deletes_nothing_behind_links(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("years of work")
    run = tmp_path / "run"
    (run / "sub").mkdir(parents=True)
    (run / "sub" / "b").write_text("old")
    (run / "sub" / "deep").symlink_to("../../precious")
    (run / "folder").symlink_to("../precious")
    (run / "file").symlink_to("../precious/a")
    (run / "nowhere").symlink_to("missing")
    files.clear_folder(run)
    (tmp_path / "link").symlink_to("precious")
    with pytest.raises(
        UserError, match="link: a link, nothing behind it is deleted; name .*precious"
    ):
        files.clear_folder(tmp_path / "link")
    assert tree(tmp_path) == {"precious/a": "years of work", "link": "->"}
    assert not list(run.iterdir())


def test_a_lock_follows_links_also_to_a_folder_that_is_yet_to_be_made(tmp_path):
    (tmp_path / "link").symlink_to("disk/run")
    with files.locked_folder(tmp_path / "link"):
        assert (tmp_path / "disk" / "run").is_dir()
        with pytest.raises(UserError), files.locked_folder(tmp_path / "disk" / "run"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


# --- streams and homes ----------------------------------------------------------------------------

STREAMS = {
    "stdout closed": (">&-", "{}", 0, ""),
    "stderr closed": ("2>&-", "{}", 0, ""),
    "all closed": ("<&- >&- 2>&-", "{}", 0, ""),
    "all closed and a mistake": ("<&- >&- 2>&-", "nowhere.jsonl", 2, ""),
    "stdout on a full disk": (">/dev/full", "{}", 2, "No space left on device"),
    "all on a full disk": (">/dev/full 2>&1", "{}", 2, ""),
    "stderr on a full disk and a mistake": ("2>/dev/full", "nowhere.jsonl", 2, ""),
    "stdout for reading": ("1</dev/null", "{}", 2, "Bad file descriptor"),
    "help on a full disk": ("--help >/dev/full", "{}", 2, "No space left on device"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_that_take_nothing_end_in_a_line_or_do_no_harm(case, tmp_path):
    """No traceback, no exit status but ours, and nothing of the output in another file."""
    words, rows, status, line = STREAMS[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(TALK))
    command = f"{sys.executable} {ROOT}/data.py show --model {TINY} --data {rows} {words}"
    command = command.format(tmp_path / "rows.jsonl")
    ran = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == status and "Traceback" not in ran.stderr, ran.stderr
    assert line in ran.stderr and "Exception ignored" not in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


HOMELESS = """
import os, pwd, runpy, sys

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"HOME": ""},
        {"HOME": "/dev/null"},
        {"HOME": "{0}", "HF_HOME": "", "PLAINTUNE_CACHE": "", "HF_HUB_ETAG_TIMEOUT": ""},
        {"HOME": "{0}", "HF_TOKEN_PATH": "{0}"},
        {"HOME": "{0}", "PLAINTUNE_CACHE": "{0}/rows.jsonl"},
    ],
)
def test_no_home_and_empty_caches_work_or_end_in_a_line(changes, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TALK))
    env = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    env |= {key: value.format(tmp_path) for key, value in changes.items()}
    argv = [ROOT / "data.py", "show", "--model", TINY, "--data", "rows.jsonl"]
    ran = subprocess.run(
        [sys.executable, "-c", HOMELESS, *map(str, argv)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    told = ran.stderr
    assert "Traceback" not in told and told.count("error: ") == (ran.returncode == 2), told
    assert ran.returncode == 2 * any("rows" in v or "null" in v for v in changes.values()), told
    assert {path.name for path in tmp_path.iterdir()} <= {"rows.jsonl", ".cache"}


def test_a_print_is_safe_wherever_it_stands(monkeypatch, capsys):
    """No command's print reaches the terminal's controls, but for the green of data.py show."""
    errors.run_command(
        lambda: print("a\x1b[2J\x1b[31mb\r\u202ec\x9b\udc80 \x1b[32mgreen\x1b[0m\tä")
    )
    shown = capsys.readouterr().out
    escaped = r"a\x1b[2J\x1b[31mb\r\u202ec\x9b\udc80 "
    assert shown == escaped + "\x1b[32mgreen\x1b[0m\tä\n"


@pytest.mark.parametrize("path", ["files", "model", "whoami"])
def test_a_hub_that_accepts_and_never_answers_ends_in_one_line(path, monkeypatch, capsys):
    """Also in calls that huggingface_hub itself makes without a timeout."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:  # the system accepts, nobody answers
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "ENDPOINT", "http://127.0.0.1:%d" % server.getsockname()[1]
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub, "TIMEOUT", 0.2)
        monkeypatch.setattr(hub, "list_repo_files", hub.HfApi().list_repo_files)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        asks = {
            "files": lambda: hub.hub_files("org/x", bool),
            "model": lambda: hub.resolve("org/x"),
            "whoami": lambda: hub.call_hub("push", hub.HfApi().whoami),
        }
        with pytest.raises(SystemExit) as ended:
            errors.run_command(asks[path])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(told) == 1 and "timed out" in told[0]


# --- secrets and pickles --------------------------------------------------------------------------

TOKEN = "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"
ASKING = """
import sys
sys.path.insert(0, sys.argv[1])
import lora
from support import errors, hub, readers

for ask in (hub.resolve, readers.read_rows, lora.find_adapter):
    for status in ("401", "403", "404", "500", "200", "302"):
        try:
            errors.run_command(lambda: ask(f"org/answers-{status}"))
        except SystemExit as ended:
            assert ended.code == 2
"""


class Echo(BaseHTTPRequestHandler):
    """A hub that says back what it was sent."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked, sent = (
            re.search(r"answers-(\d+)", self.path),
            self.headers.get("Authorization", "nothing"),
        )
        status = int(asked[1]) if asked else 404
        self.server.seen.append(sent)
        self.send_response(status)
        self.send_header("X-Error-Message", f"I was sent {sent}")
        self.send_header(
            "X-Error-Code", {403: "GatedRepo", 404: "RepoNotFound"}.get(status, "Other")
        )
        self.send_header("Location", f"{self.path}?{sent.split()[-1]}")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent.encode())

    do_HEAD = do_GET


@pytest.mark.parametrize("given", ["in the environment", "in a file"])
def test_the_token_is_in_no_message_and_no_file(given, tmp_path):
    """Whatever a hub answers, no part of the token that it was sent is printed or written."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
    }
    (tmp_path / "token").write_text(TOKEN)
    env |= (
        {"HF_TOKEN": TOKEN}
        if given == "in the environment"
        else {"HF_TOKEN_PATH": str(tmp_path / "token")}
    )
    ran = subprocess.run(
        [sys.executable, "-c", ASKING, ROOT],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    server.shutdown()
    told = ran.stdout + ran.stderr
    print(told)
    assert ran.returncode == 0 and told.count("error: ") == 18 and "Traceback" not in told, told
    assert f"Bearer {TOKEN}" in server.seen and TOKEN[:12] not in told
    written = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(TOKEN in text for text in written) == 1  # the token's own file


def test_no_module_reads_pickles():
    """What unpickles appears nowhere, and torch's own reader neither."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        text = path.read_text()
        assert not re.search(
            r"import pickle|pickle\.load|torch\.load|allow_pickle|joblib|yaml\.(unsafe_)?load\(",
            text,
        )
        assert not re.search(r"(?<![\w.])(eval|exec|os\.system)\(", text)


# --- fuzzing --------------------------------------------------------------------------------------

steady = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
WORDS = st.text(st.characters(exclude_categories=()), max_size=9)  # halves of characters too
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -1, 2**63, math.nan, math.inf])
SIMPLE = st.none() | st.booleans() | NUMBERS | WORDS
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"]) | VALUES
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLES,
        "content": WORDS | VALUES,
        "from": ROLES | st.sampled_from(["human", "gpt"]),
        "value": VALUES,
        "tool_calls": VALUES,
        "reasoning_content": VALUES,
    },
)
TALKS = st.lists(MESSAGE, max_size=3) | VALUES
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": TALKS,
        "conversations": TALKS,
        "prompt": TALKS | WORDS,
        "completion": TALKS | WORDS,
        "chosen": TALKS | WORDS,
        "rejected": TALKS | WORDS,
        "text": WORDS | VALUES,
        "instruction": WORDS | VALUES,
        "output": WORDS | VALUES,
        "system": WORDS | VALUES,
        "weight": VALUES,
        "tools": VALUES,
        "choices": VALUES,
        "chat_template_kwargs": VALUES,
    },
)
fuzzed_tokenizer = data.Tokenizer(TINY)


def attempt(what, *arguments, **options):
    """Its result, or None where it ends in a UserError that says something."""
    try:
        return what(*arguments, **options)
    except UserError as error:
        assert str(error).strip()


@settings(steady, max_examples=400)
@given(ROWS, st.booleans(), st.sampled_from(["", *data.RECIPES]))
def test_any_row_is_rendered_or_refused(row, preference, recipe):
    make, _ = data.use_recipe(recipe, {}, 0)
    found = attempt(data.render_row, row, fuzzed_tokenizer, 64, make=make, preference=preference)
    assert (
        found is None or isinstance(found, str) or all(len(segment.ids) for segment in found[:1])
    )


@settings(steady, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "head_dim", "dtype", "rope_parameters", "rope_scaling"]),
        VALUES,
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(
        st.sampled_from(
            [
                "rope_type",
                "factor",
                "rope_theta",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
                "attention_factor",
            ]
        ),
        NUMBERS | st.sampled_from(["yarn", "linear", "llama3", "default"]),
    ),
)
def test_any_config_is_understood_or_refused(changes, rope):
    found = attempt(ModelConfig.from_dict, CONFIG | {"rope_scaling": rope or None} | changes)
    assert found is None or M.rope_frequencies(found)[0].isfinite().all()


@settings(steady, max_examples=50)
@given(st.data())
def test_any_setting_is_taken_or_refused(tmp_path_factory, data_of):
    kind = data_of.draw(
        st.sampled_from([sft.SFTConfig, dpo.DPOConfig, data.DataConfig, evaluation.EvalConfig])
    )
    names = sorted(field.name for field in fields(kind))
    flags = data_of.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    file = tmp_path_factory.getbasetemp() / "settings.json"
    file.write_text(json.dumps(flags))
    must = ["--model", "m", "--data", "d"]
    attempt(parse_config, kind, [*must, "--config", str(file)])
    attempt(
        parse_config,
        kind,
        [
            *must,
            *(word for key, value in flags.items() for word in (f"--{key}", str(value))),
        ],
    )
    attempt(parse_config, kind, [*must, *map(str, flags.values())])


@settings(steady, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "r",
                "lora_alpha",
                "target_modules",
                "modules_to_save",
                "bias",
                "rank_pattern",
                "peft_type",
                "layers_to_transform",
                "lora_dropout",
                "use_dora",
                "x",
            ]
        ),
        VALUES,
    )
)
def test_any_adapter_config_is_read_or_refused(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp()
    raw = {"peft_type": "LORA", "target_modules": ["q_proj"]} | changes
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    if found := attempt(lora.read_adapter_config, folder):
        with torch.device("meta"):
            network = M.Transformer(ModelConfig.read(TINY))
        attempt(lora.add_lora, network, found[0], strict=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, bytes of its model.safetensors): a model so small that it is read in no time."""
    folder = tmp_path_factory.mktemp("small")
    raw = CONFIG | {
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    network = M.Transformer(ModelConfig.read(folder))
    return folder, save({name: tensor.detach() for name, tensor in network.state_dict().items()})


@settings(steady, max_examples=300)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 2),
    st.binary(max_size=3),
)
def test_any_header_is_read_or_refused(small, changes, cut, more):
    """Bytes of the header changed, the file cut or longer: it loads, or a UserError says why."""
    folder, whole = small
    whole, header = bytearray(whole), 8 + int.from_bytes(whole[:8], "little")
    for at, byte in changes:
        whole[int(at * (header - 1))] = byte
    (folder / "model.safetensors").write_bytes(
        whole[: int(cut * len(whole)) if cut < 1 else None] + more
    )
    found = attempt(load_model, folder)
    assert found is None or all(torch.isfinite(p).all() for p in found.parameters())


@settings(steady, max_examples=100)
@given(
    st.binary(max_size=60)
    | st.lists(st.lists(WORDS, max_size=4), max_size=4).map(
        lambda cells: "\n".join(map(",".join, cells)).encode(errors="surrogatepass")
    ),
    st.sampled_from(list(readers.READERS)),
)
def test_any_file_is_read_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    path.write_bytes(content)
    attempt(readers.read_rows, path)
    assert csv.field_size_limit() > 0

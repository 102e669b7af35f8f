"""configs/: each recipe loads, with the projects' numbers and numbers of trained parameters.

Each runs for two steps on a tiny model and a few rows of its own kind of data.
"""

import json
import shutil
from dataclasses import fields

import pytest
import torch
import yaml
from conftest import ROOT, write_checkpoint
from safetensors.torch import load_file
from test_sft import write_tokenizer

import dpo
import sft
from lora import add_lora
from model import ModelConfig, Transformer
from support import tracking
from support.files import read_json
from support.settings import parse_config

CHAT = {
    "messages": [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
    ]
}
QUESTION = {
    "question": "Where is it?",
    "choices": ["here", "there", "up"],
    "answer": "there",
    "rationale": "It is not.",
}
PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
FILM = {"history": [["A", 5], ["B", 1]], "title": "C", "rating": 4}
# name: (shape, LoRA parameters at it, a row of its data, some of the project's numbers)
CONFIGS = {
    "qwen3-0.6b-mcqa": (
        "qwen3-0.6b",
        66_060_288,
        QUESTION,
        dict(lora_r=128, lora_alpha=256, learning_rate=3e-5, weight_decay=0.01),
    ),
    "llama3.2-3b-qlora-chat": (
        "llama-3.2-3b",
        24_313_856,
        CHAT,
        dict(lora_r=16, num_train_epochs=3, max_length=2048, val_size=0.1),
    ),
    "llama3.2-1b-ecqa-sft": (
        "llama-3.2-1b",
        3_407_872,
        QUESTION,
        dict(lora_alpha=32, max_length=512, learning_rate=2e-4),
    ),
    "llama3.2-1b-ecqa-dpo": (
        "llama-3.2-1b",
        3_407_872,
        PAIR,
        dict(beta=0.1, max_length=512, learning_rate=5e-5),
    ),
    "qwen3-4b-sft": (
        "qwen3-4b",
        132_120_576,
        {"instruction": "Do", "input": "", "output": "Done"},
        dict(lora_r=64, learning_rate=2e-4),
    ),
    "qwen3-4b-dpo": (
        "qwen3-4b",
        132_120_576,
        PAIR,
        dict(beta=0.1, max_steps=2000, learning_rate=5e-5),
    ),
    "qwen3-0.6b-movielens": (
        "qwen3-0.6b",
        10_092_544,
        FILM,
        dict(lora_alpha=64, max_length=1024, learning_rate=1.5e-4),
    ),
}
CONFIGS["t4"] = (
    "qwen3-4b",
    33_030_144,
    {"instruction": "Do", "input": "", "output": "Done"},
    dict(dtype="float16", load_in_4bit=True, gradient_checkpointing=True, lora_r=16),
)
STEPS = {
    "t4": 16,
    "qwen3-0.6b-mcqa": 256,
    "llama3.2-3b-qlora-chat": 8,
    "llama3.2-1b-ecqa-sft": 16,
    "llama3.2-1b-ecqa-dpo": 8,
    "qwen3-4b-sft": 128,
    "qwen3-4b-dpo": 16,
    "qwen3-0.6b-movielens": 16,
}


def script(name):
    """(module, config class) of a recipe."""
    return (dpo, dpo.DPOConfig) if name.endswith("dpo") else (sft, sft.SFTConfig)


def test_every_recipe_is_tested():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_load_with_the_projects_numbers(name):
    _, cls = script(name)
    config = parse_config(cls, ["--config", str(ROOT / "configs" / f"{name}.yaml")])
    assert {key: getattr(config, key) for key in CONFIGS[name][3]} == CONFIGS[name][3]
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == STEPS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_as_many_parameters_train_as_in_the_projects(name, shared):
    """Counted on `meta` at the model's full shape, with the LoRA part of the recipe itself."""
    from lora import LoRAConfig

    shape, count, *_ = CONFIGS[name]
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    known = {f.name for f in fields(LoRAConfig)}
    with torch.device("meta"):
        model = Transformer(
            ModelConfig.from_dict(read_json(shared / "models" / "configs" / f"{shape}.json"))
        )
    notices = add_lora(
        model, LoRAConfig(**{key: value for key, value in settings.items() if key in known})
    )
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(size for n, size in sizes.items() if ".lora_" in n) == count
    rest = {n.rpartition(".")[0].rpartition(".")[2] for n in sizes if ".lora_" not in n}
    assert rest == ({"input_layernorm", "post_attention_layernorm"} if "mcqa" in name else set())
    assert any("bias: all trains none" in notice for notice in notices) == ("mcqa" in name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_checkpoint(
        tmp_path_factory.mktemp("base") / "model",
        vocab_size=259,
        hidden_size=64,
        num_attention_heads=4,
    )
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_run_for_two_steps(name, base, tmp_path):
    module, _ = script(name)
    rows = [
        json.dumps(CONFIGS[name][2] | {"id": n}).replace("?", f" {n}?").replace("Do", f"Do {n}")
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = (
        [f"{tmp_path / 'rows.jsonl'}@{weight}" for weight in (2, 1)]
        if "chat" in name
        else [str(tmp_path / "rows.jsonl")]
    )
    words = [
        "--config",
        str(ROOT / "configs" / f"{name}.yaml"),
        "--model",
        str(base),
        "--data",
        *data,
        "--eval_data",
        str(tmp_path / "rows.jsonl"),
    ]
    words += [
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "run"),
        "--dtype",
        "float32",
        "--merge",
        "false",
        "--eval_answers",
        "0",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
        "--max_length",
        "512",
    ]
    module.main(words + ["--adapter", ""] * name.endswith("dpo"))
    lines = tracking.read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2] and all(
        line.get("loss", 0) >= 0 for line in lines
    )
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_recipe_that_draws_and_weights_resume_bit_for_bit(base, tmp_path):
    """Three epochs, each with its own wordings and rows, equal the same resumed in the second one.

    A second reading of an epoch's examples gives the same ones.
    """
    for name in "ab":
        rows = [json.dumps(QUESTION | {"question": f"Where is {name}{n}?"}) for n in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    words = [
        "--model",
        str(base),
        "--data",
        f"{tmp_path / 'a.jsonl'}@3",
        f"{tmp_path / 'b.jsonl'}@1",
        "--recipe",
        "mcqa",
        "--recipe_args",
        '{"cot": 0.5}',
        "--per_device_train_batch_size",
        "4",
        "--num_train_epochs",
        "3",
        "--save_steps",
        "7",
        "--logging_steps",
        "1",
        "--merge",
        "false",
        "--eval_answers",
        "0",
        "--lora_dropout",
        "0.1",
    ]
    for run in ("whole", "halves"):
        sft.main([*words, "--output_dir", str(tmp_path / run)])
        if run == "halves":
            for name in ("adapter", "checkpoint-000014", "checkpoint-000015"):
                shutil.rmtree(tmp_path / run / name)
            log = (tmp_path / run / "log.jsonl").read_text().splitlines()
            (tmp_path / run / "log.jsonl").write_text("\n".join(log[:7]) + "\n")
            sft.main([*words, "--output_dir", str(tmp_path / run)])
    whole, halves = (
        load_file(tmp_path / run / "checkpoint-000015" / "adapter_model.safetensors")
        for run in ("whole", "halves")
    )
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    losses = [
        [
            line["loss"]
            for line in tracking.read_log(tmp_path / run / "log.jsonl")
            if "loss" in line
        ]
        for run in ("whole", "halves")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 15
    examples = sft.load_examples(
        [f"{tmp_path / 'a.jsonl'}@3", f"{tmp_path / 'b.jsonl'}@1"],
        sft.Tokenizer(base),
        recipe="mcqa",
        seed=42,
    )[0]
    plan = sft.Plan(
        examples,
        sft.SFTConfig(model="m", data=["d"], per_device_train_batch_size=20, num_train_epochs=3),
    )
    epochs = [[bytes(example[0].ids) for example in plan[step]] for step in (0, 1, 1)]
    assert epochs[1] == epochs[2] and len({*epochs[0]} & {*epochs[1]}) < 10

"""Names of other tools: each field of their dataclasses is known, and no default is refused."""

import inspect
import json
import os
import re
from dataclasses import MISSING, fields

import pytest

from dpo import DPOConfig
from sft import SFTConfig
from support.errors import UserError
from support.names import ALIASES, ANSWERED, FOREIGN, MEANINGS, REFUSED
from support.settings import find_name, parse_config


def read(text, tmp_path, cls=SFTConfig, words=(), name="c.yaml"):
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return parse_config(cls, ["--config", str(tmp_path / name), *words])


def library_fields():
    """[(class name, field, default)] of the dataclasses that users write configs for."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments
    from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig

    entries = []
    for cls in (
        TrainingArguments,
        SFTConfig,
        DPOConfig,
        KTOConfig,
        ModelConfig,
        ScriptArguments,
        LoraConfig,
    ):
        for field in fields(cls):
            default = None if field.default is MISSING else field.default
            entries.append((cls.__name__, field.name, getattr(default, "value", default)))
    for name, parameter in inspect.signature(BitsAndBytesConfig.__init__).parameters.items():
        if name not in ("self", "kwargs"):
            entries.append(("BitsAndBytesConfig", name, parameter.default))
    return entries


def test_every_field_of_the_libraries_is_known_and_takes_its_default(tmp_path):
    kinds = {field.name: field.type for field in fields(DPOConfig)}
    entries = library_fields()
    assert len({name for _, name, _ in entries}) > 200
    unknown = {f"{cls}.{name}" for cls, name, _ in entries if find_name(name, kinds) is None}
    assert not unknown
    classes = {}
    for cls, name, default in entries:
        if isinstance(default, (str, int, float, bool, list, type(None))):
            classes.setdefault(cls, {})[name] = default
    del classes["ModelConfig"]["use_peft"]  # false is full fine-tuning, against its lora_r 16
    for cls, defaults in classes.items():
        read(defaults, tmp_path, SFTConfig if cls == "SFTConfig" else DPOConfig)


def test_every_name_stands_in_one_table_and_means_a_setting():
    kinds = {field.name for field in fields(DPOConfig)}
    others = [*MEANINGS.keys() - kinds, *ANSWERED, *REFUSED]
    both = set(ANSWERED) & set(REFUSED) | (kinds | set(ALIASES)) & {*ANSWERED, *REFUSED}
    assert not both and not kinds & set(ALIASES) and not set(ALIASES) & set(others)
    assert set(ALIASES.values()) <= kinds
    for meanings in MEANINGS.values():
        for _, *meaning in meanings:
            assert not meaning or meaning[0] in kinds or meaning[0].startswith("$")
    known = {*ALIASES, *FOREIGN} - kinds
    assert len(known) > 200


TRANSLATED = [  # a file's lines, what they mean
    ("bf16: true", dict(dtype="bfloat16")),
    ("bf16: true\ntorch_dtype: bfloat16\nfp16: false", dict(dtype="bfloat16")),
    ("fp16: true\nbf16: false", dict(dtype="float16")),
    ("torch_dtype: torch.bfloat16", dict(dtype="bfloat16")),
    ("flash_attn: fa2", dict(attn_implementation="flash")),
    ("flash_attn: false", dict(attn_implementation="sdpa")),
    ("attn_implementation: flash_attention_2", dict(attn_implementation="flash")),
    ("lora_target: all", dict(target_modules=["all-linear"])),
    ("lora_target: q_proj,v_proj", dict(target_modules=["q_proj", "v_proj"])),
    ("report_to: tensorboard,wandb", dict(report_to=["tensorboard", "wandb"])),
    ("resume_from_checkpoint: true", dict(resume="auto")),
    ("resume_from_checkpoint: null", dict(resume="auto")),
    ("finetuning_type: full", dict(lora_r=0)),
    ("use_peft: true\nlora: {r: 8}", dict(lora_r=8)),
    ("quantization_bit: 4", dict(load_in_4bit=True)),
    ("warmup_steps: 0.05", dict(warmup_ratio=0.05, warmup_steps=0)),
    ("warmup_steps: 20", dict(warmup_steps=20)),
    ("gradient_checkpointing: offload", dict(gradient_checkpointing=True)),
    ("activation_offloading: true", dict(activation_offloading=True)),
    ("hub_strategy: checkpoint", dict(hub_strategy="every_save")),
    ("cot_prob: 0.5\nrecipe: mcqa", dict(recipe_args={"cot": 0.5})),
    ("lr_scheduler_kwargs: {min_lr: 1e-5}\nlr_scheduler_type: cosine_with_min_lr",
     dict(lr_scheduler_kwargs={"min_lr": 1e-5})),
    ("loss_type: null\nmodel_revision: main", dict(loss_type="nll", revision="main")),
]  # fmt: skip


TRANSLATED_FOR_DPO = [
    ("stage: kto\nkto_chosen_weight: 2", dict(loss_type=["kto"], desirable_weight=2.0)),
    ("rl: kto\nkto_undesirable_weight: 0.5", dict(loss_type=["kto"], undesirable_weight=0.5)),
    ("rl: dpo", dict(loss_type=["sigmoid"])),
    ("rl: simpo\npref_ftx: 0.1", dict(loss_type=["simpo"], rpo_alpha=0.1)),
]


@pytest.mark.parametrize("text, meaning", TRANSLATED + TRANSLATED_FOR_DPO)
def test_values_of_other_tools_are_translated(text, meaning, tmp_path):
    cls = DPOConfig if (text, meaning) in TRANSLATED_FOR_DPO else SFTConfig
    config = read(text, tmp_path, cls)
    assert {key: getattr(config, key) for key in meaning} == meaning


REFUSED_SETTINGS = [
    ("fsdp: full_shard", "c.yaml:1: fsdp full_shard: torchrun --nproc_per_node"),
    (
        "fsdp: full_shard\nsed: 3\nuse_vllm: true",
        "'sed'.*fsdp full_shard.*use_vllm true: nothing",
    ),
    (
        "bf16: true\ntorch_dtype: float32",
        "c.yaml:2: dtype is given twice, the second time as 'torch",
    ),
    ("load_in_8bit: true", "load_in_8bit true: --load_in_4bit"),
    ("cv_weight: 2.0", "cv_weight 2.0: write it behind the source"),
    ("finetuning_type: freeze", "finetuning_type freeze: it has no counterpart"),
    ("streaming: true", "streaming true: a set is read whole"),
    ("teacher_model_name_or_path: x", "teacher_model_name_or_path x: README"),
    ("foo: 1", "unknown key 'foo';"),
]


@pytest.mark.parametrize("text, message", REFUSED_SETTINGS)
def test_what_cannot_be_done_is_refused_with_the_way_out(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(text, tmp_path)


def test_what_needs_nothing_is_answered_in_one_line_a_reason(tmp_path, capsys):
    text = "packing: true\ngroup_by_length: true\nuse_liger_kernel: true\nfsdp: ''\n"
    text += "push_to_hub: false\npadding_free: false\nremove_unused_columns: false\n"
    words = [
        "--dataloader_num_workers",
        "4",
        "--trust-remote-code",
        "--bf16",
        "--deepspeed",
        "none",
    ]
    config = read(text, tmp_path, words=words)
    lines = capsys.readouterr().err.splitlines()
    assert config.dtype == "bfloat16" and len(lines) == 5
    assert lines[0].startswith("packing, group_by_length: rows are packed")
    assert lines[2].startswith("remove_unused_columns, dataloader_num_workers: rows are rendered")
    assert "bf16 true: dtype bfloat16" in lines
    read("packing: false\nsave_safetensors: true", tmp_path)
    assert capsys.readouterr().err == ""
    read("average_tokens_across_devices: false", tmp_path)
    assert "average_tokens_across_devices: the loss" in capsys.readouterr().err


def test_a_flag_takes_back_what_a_file_may_not_say(tmp_path):
    text = "fsdp: full_shard\nload_in_8bit: true"
    read(text, tmp_path, words=["--fsdp", "none", "--load_in_8bit", "false"])


def test_flags_win_over_what_a_file_means_and_secrets_are_not_kept(tmp_path, monkeypatch, capsys):
    for name in ("HF_TOKEN", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    text = "bf16: true\nhub_token: hf_secret\nwandb_project: mine"
    config = read(text, tmp_path, words=["--torch_dtype", "float32"])
    assert config.dtype == "float32" and "hf_secret" not in str(config)
    assert os.environ["HF_TOKEN"] == "hf_secret" and os.environ["WANDB_PROJECT"] == "mine"
    assert "hf_secret" not in str(capsys.readouterr())


@pytest.mark.parametrize("name", ["fsdp_x", "data_subsets", "cutoff", "seeed", "xyz", "lora_rnk"])
def test_a_nearest_name_is_near(name, tmp_path):
    nearest = {"seeed": "seed", "lora_rnk": "lora_r"}.get(name)
    with pytest.raises(UserError) as error:
        read(f"{name}: 1", tmp_path)
    assert re.findall(r"nearest: (\w+)", str(error.value)) == ([nearest] if nearest else [])

"""Names of other tools: every field of their dataclasses is known here, and no default is refused."""

import inspect
import json
import os
import re
from dataclasses import MISSING, fields

import pytest
import yaml
from conftest import ROOT

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
    from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

    entries = []
    for cls in (TrainingArguments, SFTConfig, DPOConfig, ModelConfig, ScriptArguments, LoraConfig):
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
    faults = []
    for cls, name, default in entries:
        config = SFTConfig if cls == "SFTConfig" else DPOConfig
        try:
            read({"data": "d", "model": "m", name: default} if name != "dataset_name" else {}, tmp_path, config)
        except UserError as error:
            faults.append(f"{cls}.{name} = {default!r}: {error}")
    assert not faults

"""A dataclass is a command: its fields are the flags and the keys of a settings file, and hold the only defaults."""

import json
import re
import sys
import types
from contextlib import suppress
from dataclasses import MISSING, fields
from inspect import getsource
from typing import Literal, get_args, get_origin, get_type_hints

import yaml

from support.errors import UserError, as_user_error, brief, nearest
from support.files import regular_file

# names in TRL, PEFT, LLaMA-Factory, Axolotl and plain scripts; one counts where a dataclass has its target but not it
ALIASES = {alias: name for name, aliases in {
    "model": "model_name_or_path model_name model_id base_model", "data": "dataset dataset_name train_file data_path",
    "eval_data": "eval_dataset eval_file validation_file", "val_size": "val_set_size test_size", "dtype": "torch_dtype",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len", "lora_r": "lora_rank r rank",
    "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "lora_target_modules lora_target",
    "modules_to_save": "lora_modules_to_save additional_target", "num_train_epochs": "num_epochs epochs",
    "per_device_train_batch_size": "micro_batch_size train_batch_size batch_size", "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler", "optim": "optimizer", "max_grad_norm": "gradient_clipping",
    "eval_strategy": "evaluation_strategy", "resume": "resume_from_checkpoint", "attn_implementation": "flash_attn",
    "bnb_4bit_quant_type": "quant_type", "bnb_4bit_use_double_quant": "double_quantization use_double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype", "beta": "pref_beta", "loss_type": "pref_loss",
    "adapter": "adapter_name_or_path",
}.items() for alias in aliases.split()}  # fmt: skip


BOOLS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def types_of(kind):
    """The types that a union allows, without their arguments; or the one type."""
    return [
        get_origin(k) or k
        for k in (get_args(kind) if isinstance(kind, types.UnionType) else [kind])
    ]


def convert(value, kind):
    """`value`, a flag's text or what YAML made of it, as the type `kind`; ValueError or TypeError if it is none."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if isinstance(kind, types.UnionType):
        if types.NoneType in args and str(value).lower() in ("none", "null"):
            return None
        for option in sorted(
            args, key=lambda option: (get_origin(option) is list) != ("," in str(value))
        ):
            with suppress(ValueError, TypeError):
                return convert(value, option)
    elif origin is Literal and str(value) in map(str, args):
        return next(option for option in args if str(option) == str(value))
    elif origin is bool and str(value).lower() in BOOLS:
        return BOOLS[str(value).lower()]
    elif origin in (int, float) and not isinstance(value, bool):
        number = (
            value if isinstance(value, int) else float(value)
        )  # YAML 1.1 reads 2e-4 as a string
        if abs(number) < 2**53 and (
            origin is float or number == int(number)
        ):  # NaN and infinity are none
            return origin(number)
    elif (
        origin is str
        and isinstance(value, (str, int, float))
        and "\0" not in str(value).encode().decode()
    ):
        return str(value)
    elif origin is dict and isinstance(
        value := json.loads(value) if isinstance(value, str) else value, dict
    ):
        return (
            {convert(key, str): convert(item, args[1]) for key, item in value.items()}
            if args
            else value
        )
    elif origin is list and not isinstance(value, dict):
        if isinstance(value, str):  # names may come as one word, a,b; a path keeps its comma
            value = (
                re.split(r"\s*,\s*", value)
                if re.fullmatch(r"[\w.:@-]+(\s*,\s*[\w.:@-]+)+", value)
                else [value]
            )
        items = [value] if isinstance(value, (int, float)) else value
        return [convert(item, args[0] if args else str) for item in items]
    raise ValueError(value)


def choices_of(cls):
    """{setting: the table or tuple of its values} of a dataclass and its bases, each of which has CHOICES."""
    return {
        key: table
        for base in cls.__mro__[::-1]
        for key, table in vars(base).get("CHOICES", {}).items()
    }


def check_choices(config):
    """UserError where a setting, or one of its list, is not in its table."""
    for key, table in choices_of(type(config)).items():
        given = getattr(config, key)
        for value in given if isinstance(given, list) else [given]:
            if value not in table:
                raise UserError(
                    f"{key}: {value!r} is not one of {', '.join(map(str, table))}{nearest(value, table)}"
                )


def check_range(config, least, *keys, most=2**53):
    """UserError where one of these settings, if it is given, is not from `least` to `most`."""
    for key in keys:
        if (value := getattr(config, key)) is not None and not least <= value <= most:
            told = f"below {least}" if value < least else f"not from {least} to {most}"
            raise UserError(f"--{key}: {value} is {told}")


def find_name(where, kinds, aliases):
    """The field that a key in its sections means: [lora, r] is `lora_r`, else `r`; None where there is none."""
    names = ["_".join(where[n:]) for n in range(len(where))]
    return next(
        (aliases.get(name, name) for name in names if aliases.get(name, name) in kinds), None
    )


def read_settings(path, kinds, aliases):
    """{field: value} of a YAML or JSON file, flat or in sections."""
    settings = {}

    def enter(node, sections):
        for key, value in node.value:
            where = [*sections, str(key.value)]
            name, line = find_name(where, kinds, aliases), f"{path}:{key.start_mark.line + 1}"
            if isinstance(value, yaml.MappingNode) and (
                name is None or dict not in types_of(kinds[name])
            ):
                enter(value, where)
            elif name is None:
                raise UserError(
                    f"{line}: unknown key {'.'.join(where)!r}{nearest('_'.join(where), kinds)}"
                )
            elif name in settings:
                raise UserError(
                    f"{line}: {name} is given twice, the second time as {'.'.join(where)!r}"
                )
            else:
                settings[name] = loader.construct_object(value, deep=True)

    with as_user_error(f"--config {path}", OSError, UnicodeDecodeError):
        text = regular_file(path, 2**20).read_text(encoding="utf-8")
        text = text.replace("\t", "  ") if str(path).endswith(".json") else text
    with as_user_error(f"{path}: not YAML", yaml.YAMLError, RecursionError, ValueError):
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(
                f"{path}: has aliases (*name), which can make a few lines endless; write the values out"
            )
        loader = yaml.SafeLoader(text)
        if not isinstance(root := loader.get_single_node(), yaml.MappingNode):
            raise UserError(
                f"{path}: expected settings, found {brief(root and loader.construct_object(root, True))}"
            )
        enter(root, [])
    return settings


def parse_config(cls, argv=None, description="", aliases=ALIASES):
    """A command line -> an instance of the dataclass `cls`, whose fields are the flags and hold the only defaults.

    `--config FILE ...` (YAML or JSON) comes first, a later file over an earlier, flags (`--lora_r`, `--lora-r`,
    `--lora.r`) over all; the comment at the end of a field's line is its help. UserError: an unknown flag or key, with
    the nearest; a value of another type, with the expected; a field left open.
    """
    kinds = get_type_hints(cls)
    names = {name: str(kind) if get_args(kind) else kind.__name__ for name, kind in kinds.items()}
    aliases = {
        alias: name for alias, name in aliases.items() if name in kinds and alias not in kinds
    }
    tables = choices_of(cls)
    lines = [line for base in cls.__mro__[-2::-1] for line in getsource(base).splitlines()]
    notes = {
        found[1]: found[2] for line in lines if (found := re.match(r"    (\w+):.*?  # (.*)", line))
    }
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(cls)
    }
    given, values, name, see = {}, {}, None, "; --help explains every flag"
    for word in sys.argv[1:] if argv is None else argv:
        if word in ("-h", "--help"):
            print(
                f"{description}\n\n--config FILE ...\n      settings in YAML or JSON, flat or in sections; flags win"
            )
            for name, default in defaults.items():
                default = " ".join(map(str, default)) if isinstance(default, list) else default
                note = notes.get(name, "") + (
                    f" (default: {default})" if default is not MISSING else ""
                )
                if name in tables:
                    note += f"; one of {', '.join(str(value) for value in tables[name] if value)}"
                print(
                    f"--{name} {getattr(types_of(kinds[name])[0], '__name__', 'value').upper()}\n      {note}"
                )
            sys.exit(0)
        if found := re.match(r"--([A-Za-z][\w.-]*)(=?)", word):
            name = find_name(
                found[1].replace("-", "_").split("."), {**kinds, "config": list}, aliases
            )
            if name is None:
                raise UserError(f"unknown flag --{found[1]}{nearest(found[1], kinds)}{see}")
            before = (
                given.get(name, []) if list in types_of(kinds.get(name, list)) else []
            )  # a list goes on
            given[name] = before + ([word[found.end() :]] if found[2] else [])
        elif name is None:
            raise UserError(f"unrecognized arguments: {word}{see}")
        else:
            given[name].append(word)
    if given.get("config") == []:
        raise UserError(f"--config: its value is missing{see}")
    for file in given.pop("config", []):
        values |= {
            name: (value, f"{file}: {name}")
            for name, value in read_settings(file, kinds, aliases).items()
        }
    for name, found in given.items():
        found = found or ["true"] * (bool in types_of(kinds[name]))
        if not found and list in types_of(
            kinds[name]
        ):  # a variable of the shell's that is empty, say
            raise UserError(f"--{name}: its values are missing{see}")
        values[name] = found[0] if len(found) == 1 else found, f"--{name}"
    for name, (value, where) in values.items():
        try:
            values[name] = convert(value, kinds[name])
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{where}: expected {names[name]}, found {brief(value)}") from None
    if left := [
        name for name, default in defaults.items() if default is MISSING and name not in values
    ]:
        raise UserError(f"--{left[0]} is needed ({notes.get(left[0], names[left[0]])}){see}")
    return cls(**values)

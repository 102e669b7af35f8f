"""A dataclass is a command: its fields are the flags and the keys of --config files.

The dataclass holds the only defaults. argparse reads the flags and prints --help; what it lacks is
here: names of other tools, sections (`lora: {r: 8}`, `--lora.r 8`), files, all mistakes at once.
"""

import argparse
import json
import os
import re
import sys
import types
from collections import defaultdict
from contextlib import suppress
from dataclasses import MISSING, fields
from importlib.metadata import version
from inspect import formatannotation, getsource
from pathlib import Path
from typing import get_args, get_origin

import yaml

from support import VERSION
from support.errors import UserError, as_user_error, brief, nearest
from support.files import regular_file
from support.names import ALIASES, FOREIGN, translate

BOOLS = yaml.SafeLoader.bool_values | {"1": True, "0": False}
TYPING = 0.61  # similarity of a name to what it is mistyped from: `fsdp` is not meant as `seed`
NAME_LIST = r"[\w.:@-]+(\s*,\s*[\w.:@-]+)+"  # a,b as one word; no path, which keeps its comma
# a section's title, or a field and the comment at its end
SECTION = r"^    # (.*)|^    (\w+):(?:(?!\n    [^\s)])[^#])*# (.*)"


def plain_value(loader, node):
    """What JSON reads, else the text: to YAML 1.1 `no` is False, 1:30 is 90 and 010 is 8."""
    try:
        return json.loads(node.value)
    except ValueError:
        return loader.construct_scalar(node)


class PlainLoader(yaml.SafeLoader):
    """YAML whose numbers, truth values and dates are plain values."""


for tag in ("bool", "int", "float", "timestamp"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{tag}", plain_value)
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+$", re.IGNORECASE)  # 1e-5 has no dot to YAML 1.1
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, [*"-+0123456789"])


def type_of(kind):
    """(list, (str,)) of `list[str] | None`: a field's type without None, and its items' types."""
    if isinstance(kind, types.UnionType):
        kind = get_args(kind)[0]
    return get_origin(kind) or kind, get_args(kind)


def convert(value, kind):
    """`value`, a flag's text or what a file holds, as a field's type: T or `T | None`.

    ValueError or TypeError: it is no value of that type.
    """
    word = str(value).lower()
    if isinstance(kind, types.UnionType) and word in ("none", "null"):
        return None
    kind, item_types = type_of(kind)
    if kind is bool and word in BOOLS:
        return BOOLS[word]
    if kind in (int, float):
        number = float(word)
        if abs(number) < 2**53 and kind(number) == number:  # neither NaN nor infinity
            return kind(number)
    if kind is str and isinstance(value, (str, int, float)) and b"\0" not in str(value).encode():
        return str(value)
    if kind is list:
        items = []
        for item in value if isinstance(value, list) else [value]:
            is_list = re.fullmatch(NAME_LIST, str(item))
            items += re.split(r"\s*,\s*", item) if is_list else [item]
        return [convert(item, item_types[0]) for item in items]
    if kind is dict:
        pairs = json.loads(value) if isinstance(value, str) else value
        if isinstance(pairs, dict) and item_types:
            return {convert(key, str): convert(pairs[key], item_types[1]) for key in pairs}
        if isinstance(pairs, dict):
            return pairs
    raise ValueError(value)


def choices_of(cls):
    """{field: the table or tuple of its values}: CHOICES of a dataclass and of its bases."""
    choices = {}
    for base in reversed(cls.__mro__):
        choices |= vars(base).get("CHOICES", {})
    return choices


def check_choices(config):
    """UserError where a value, or an item of a list, is not in the field's table in CHOICES."""
    for key, table in choices_of(type(config)).items():
        value = getattr(config, key)
        for item in value if isinstance(value, list) else [value]:
            check_choice(key, item, table)


def check_choice(key, value, choices):
    """UserError: a setting's value is none of its choices."""
    if value not in choices:
        options = ", ".join(map(str, choices))
        raise UserError(f"{key}: {value!r} is not one of {options}{nearest(value, choices)}")


def check_range(config, least, *keys, most=2**53):
    """UserError where one of these fields is neither None nor from `least` to `most`."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not least <= value <= most:
            limit = f"below {least}" if value < least else f"not from {least} to {most}"
            raise UserError(f"--{key}: {value} is {limit}")


def find_name(key, names):
    """The one of `names`, or of other tools' names, that a key in its sections means: `lora.r` is
    lora_r, else r; or None."""
    sections = key.replace("-", "_").split(".")
    for start in range(len(sections)):
        name = "_".join(sections[start:])
        if name not in names:
            name = ALIASES.get(name, name)
        if name in names or name in FOREIGN:
            return name


def comments_of(cls):
    """{field: (title of its section, comment)} from the sources of a dataclass and its bases."""
    comments = {}
    for base in cls.__mro__[:-1]:
        title = "settings"
        for heading, name, comment in re.findall(SECTION, getsource(base), re.MULTILINE):
            title = heading or title
            if name:
                comments.setdefault(name, (title, comment))
    return comments


class Parser(argparse.ArgumentParser):
    def print_help(self, file=None):
        """An error of the disk is raised, which argparse's own drops in some versions of Python."""
        print(self.format_help(), end="", file=file, flush=True)


def new_parser(description, **options):
    """A parser that knows --version."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        **options,
    )
    libraries = f"plaintune {VERSION}, torch {version('torch')}"
    parser.add_argument("--version", action="version", version=libraries)
    return parser


def make_parser(cls, description, command=""):
    """A parser for the fields' flags; --help has their sections, comments, defaults and choices."""
    usage = f"%(prog)s {command}[--config FILE ...] [--FLAG VALUE ...]"
    parser = new_parser(description, usage=usage)
    note = "settings in YAML or JSON, flat or in sections; later files win, flags win over files"
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--config", default=[], metavar="FILE", help=note, **several)
    comments, choices, groups = comments_of(cls), choices_of(cls), {}
    options = {list: several, bool: {"nargs": "?", "const": "true"}}
    settings = {field.name: field for field in fields(cls)}
    for name in comments | settings:
        field = settings[name]
        kind, _ = type_of(field.type)
        title, note = comments.get(name, ("settings", ""))
        note += field.metadata.get("note", "")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if isinstance(default, list):
            default = " ".join(map(str, default))
        if name in choices:
            note += f"; one of {', '.join(map(str, choices[name]))}"
        if default not in (MISSING, "", {}):
            note += f" (default: {default})"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            f"--{name}",
            metavar=kind.__name__.upper(),
            help=note.replace("%", "%%"),
            **options.get(kind, {}),
        )
    for name in FOREIGN - settings.keys():
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, nargs="?", const="true")
    return parser


def read_settings(path, kinds):
    """[(key in its sections, 'file:line: ', value)] of a YAML or JSON file; kinds: {field: type}.

    UserError: a file that cannot be read.
    """
    entries = []

    def walk(node, section):
        """A mapping is a section unless it is the value of a dict field, or of another tool's."""
        for key_node, value in node.value:
            key = f"{section}{key_node.value}"
            name = find_name(key, kinds)
            is_dict = name and (name not in kinds or type_of(kinds[name])[0] is dict)
            if isinstance(value, yaml.MappingNode) and not is_dict:
                walk(value, f"{key}.")
            else:
                setting = loader.construct_object(value, deep=True)
                if isinstance(setting, (bool, int, float)):
                    setting = value.value  # as it is written: a folder may be named 1.10
                entries.append((key, f"{path}:{key_node.start_mark.line + 1}: ", setting))

    unreadable = OSError, ValueError, RecursionError, yaml.YAMLError
    with as_user_error(f"--config {path}: cannot be read", *unreadable):
        text = regular_file(path, 2**20).read_text(encoding="utf-8")
        if path.endswith(".json"):
            text = text.expandtabs()  # YAML does not indent by tabs
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(
                f"{path}: has aliases (*name), which may expand without end; write the values out"
            )
        loader = PlainLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: holds no settings of the form `key: value`")
        walk(root, "")
    return entries


def translate_entries(entries, kinds, notices, refused, problems):
    """{field: (where, value)} of (key, where, value); see support/names.py.

    Appends to `problems` what is unknown or given twice, to `notices` as `translate` does. What is
    refused goes into `refused` by name, so that a later source can take it back.
    """
    settings = {}
    for key, where, value in entries:
        name = find_name(key, kinds) or key
        refused.pop(name, None)
        try:
            meanings = translate(name, value, notices)
        except UserError as error:
            refused[name] = f"{where}{error}"
            continue
        for name, value in meanings.items():
            unset = value is None and type_of(kinds.get(name))[0] in (str, list, dict, bool)
            if name.startswith("$"):
                os.environ[name[1:]] = value
            elif name not in kinds:
                problems.append(f"{where}unknown key {name!r}{nearest(name, kinds, TYPING)}")
            elif settings.get(name, (0, value))[1] != value:
                problems.append(f"{where}{name} is given twice, the second time as {key!r}")
            elif not unset:
                settings[name] = f"{where}{name}", value
    return settings


def parse_config(cls, argv=None, description="", command=""):
    """A command line as an instance of the dataclass `cls`: files of --config in order, then flags.

    UserError: all mistakes in one message: unknown flags and keys with the nearest, values of
    another type, fields without a value.
    """
    kinds = {field.name: field.type for field in fields(cls)}
    values, notices, refused, problems = {}, defaultdict(list), {}, []

    def rename(flag):
        return f"--{find_name(flag[1], kinds) or flag[1]}"

    words = sys.argv[1:] if argv is None else argv
    words = [re.sub(r"^--([\w.-]+)", rename, word) for word in words]
    with as_user_error("command line", argparse.ArgumentError):
        flags, unknown = make_parser(cls, description, command).parse_known_args(words)
    flags = vars(flags)
    for word in unknown:
        if word.startswith("--") or not problems:  # else it may be an unknown flag's value
            name = word.lstrip("-").partition("=")[0]
            problems.append(f"unknown argument {word}{nearest(name, kinds, TYPING)}")
    sources = [read_settings(path, kinds) for path in flags.pop("config")]
    sources.append([(name, "--", value) for name, value in flags.items()])
    settings = {}
    for entries in sources:
        settings |= translate_entries(entries, kinds, notices, refused, problems)
    for name, (where, value) in settings.items():
        try:
            values[name] = convert(value, kinds[name])
        except (ValueError, TypeError, RecursionError):
            expected = formatannotation(kinds[name])
            problems.append(f"{where}: expected {expected}, found {brief(value)}")
    problems += refused.values()
    for field in fields(cls):
        if field.default is field.default_factory is MISSING and field.name not in settings:
            problems.append(f"--{field.name} is needed")
    if problems:
        raise UserError(f"{'; '.join(problems)}; --help explains every flag")
    for reason, names in notices.items():
        print(f"{', '.join(names)}: {reason}", file=sys.stderr)
    return cls(**values)


def run_subcommand(commands, description, argv):
    """Runs the command that `argv` begins with; commands: {name: (dataclass, function of one)}.

    --help lists the first lines of their docstrings. UserError: no such command.
    """
    name, *words = argv or [""]
    if name in commands:
        cls, function = commands[name]
        return function(parse_config(cls, words, function.__doc__, f"{name} "))
    names = ", ".join(commands)
    if name in ("-h", "--help", "--version"):
        parser = new_parser(description, usage="%(prog)s COMMAND [--FLAG VALUE ...]")
        group = parser.add_argument_group("commands, each with its own --help")
        for command, (_, function) in commands.items():
            group.add_argument(command, help=function.__doc__.partition("\n")[0])
        parser.parse_args([name])
    raise UserError(
        f"unknown command {name!r}{nearest(name, commands)}; one of {names} is needed"
    )


def by_name(sources, flag):
    """[NAME=]SOURCE ... -> {name: source}; a source without a name is named after itself."""
    named = {}
    for source in sources:
        name, source = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", source, re.S).groups()
        if not source.strip():
            raise UserError(f"--{flag}: {source!r} is empty; give a path, or NAME=PATH")
        if not name:
            path = Path(source)
            name = re.sub(r"[^\w.-]", "_", path.name if flag == "model" else path.stem)
        if name in named:
            raise UserError(f"--{flag}: two are named {name}; give names: NAME={source}")
        named[name] = source
    return named


def pick_fields(kind, values, file):
    """A dataclass `kind` from those of its fields that a run's settings have; else its defaults."""
    with as_user_error(f"{file}: not the settings of a run", ValueError, TypeError):
        settings = {}
        for f in fields(kind):
            settings[f.name] = convert(values.get(f.name, f.default), f.type)
        return kind(**settings)


def from_json(value, kind):
    """A JSON value as a dataclass field's type; None if it has another one."""
    if get_origin(kind) is list and isinstance(value, (int, str)):
        value = [value]
    with suppress(ValueError, TypeError, RecursionError):
        converted = convert(value, kind)
        if converted == value:  # "8" is no number here
            return converted

"""PEFT's rules by which names and regexes mean layers, and messages for those that mean none.

`config` is a LoRAConfig; a path is a module's in the checkpoint, as model.layers.0.mlp.up_proj.
"""

import re

from support.errors import brief, nearest

PATTERNS = "rank_pattern", "alpha_pattern"


def is_regex(names):
    return len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0])


def matches(path, names):
    """PEFT's rule for layers: one regex for the whole path, or names that end it at a dot."""
    if is_regex(names):
        return bool(re.fullmatch(names[0], path))
    return any(f".{path}".endswith(f".{name}") for name in names)


def whole_modules(paths, modules_to_save):
    """PEFT's rule for modules_to_save: names that end the path anywhere (`norm` is every norm)."""
    return [path for path in paths if path.endswith(tuple(modules_to_save))]


def by_pattern(patterns, path, default):
    """PEFT's rule for rank_pattern and alpha_pattern: the first regex that ends the path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def within(path, modules):
    return any(f"{path}.".startswith(f"{module}.") for module in modules)


def is_selected(path, config, saved):
    """Whether a target may be adapted: not left out by the other settings."""
    block = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    index = int(block[1]) if block else None
    named = path in config.target_modules  # in full, which layers_to_transform leaves alone
    if config.layers_to_transform and index not in config.layers_to_transform and not named:
        return False
    return not within(path, saved) and not matches(path, config.exclude_modules)


def setting_faults(config):
    """What is wrong with names, patterns and numbers of a LoRAConfig, whatever the model."""
    faults = []
    for key in ("target_modules", "exclude_modules", *PATTERNS):
        for pattern in getattr(config, key):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                faults.append(f"{key}: {brief(pattern)} is no regex: {error}")
    regexes = [target for target in config.target_modules if is_regex([target])]
    if regexes and len(config.target_modules) > 1:
        faults.append(f"target_modules: {regexes[0]!r} among other names; a regex stands alone")
    if regexes and config.layers_to_transform:
        faults.append("layers_to_transform goes with names; a regex can name the layers itself")
    if not 0 <= config.lora_dropout < 1:
        faults.append(f"lora_dropout: {config.lora_dropout} is not in [0, 1)")
    for key in ("lora_r", "lora_alpha", *PATTERNS):
        numbers = getattr(config, key)
        if key not in PATTERNS:
            numbers = {"": numbers}
        for number in numbers.values():
            if not 0 < number < 2**16:
                faults.append(f"{key}: {number} is not above 0 and below 65536")
    return faults


def unmatched_names(config, hits, paths, adapted, trainable, depth):
    """A line for each name that matches nothing, with the nearest.

    hits: {target: paths it matches}; paths: all modules; adapted, trainable: those of the layers
    that are, or could be, adapted or trained; depth: number of blocks.
    """
    names = [("target_modules", target) for target in hits if not hits[target]]
    for name in config.modules_to_save:
        if not whole_modules(paths, [name]):
            names.append(("modules_to_save", name))
    for key in PATTERNS:
        for pattern in getattr(config, key):
            if not any(by_pattern({pattern: True}, path, False) for path in adapted):
                names.append((key, pattern))
    near = list(dict.fromkeys(path.split(".")[-1] for path in trainable))
    lines = []
    for key, name in names:
        lines.append(f"{key}: {name!r} matches nothing here{resembling(name, near)}")
    for index in set(config.layers_to_transform) - set(range(depth)):
        lines.append(
            f"layers_to_transform: {index} is not a layer of this model (0 to {depth - 1})"
        )
    return lines


def serving_notice(config):
    """A line for what vLLM refuses of an adapter, or scales wrongly (its lora/peft_helper.py)."""
    keys = [key for key in ("modules_to_save", "use_dora", *PATTERNS) if getattr(config, key)]
    keys += ["bias"] if config.bias != "none" else []
    if keys:
        return f"vLLM takes no adapter with {', '.join(keys)}: serve the merged model there"
    return ""


def resembling(name, options):
    """The nearest options, preferably those that contain the name's letters, or all of them."""

    def letters(text):
        return re.sub("[^a-z]", "", text.lower())

    name = name.rpartition(".")[2]
    close = [option for option in options if letters(name) in letters(option)]
    return nearest(name, close or options) or f" (there are: {', '.join(options)})"

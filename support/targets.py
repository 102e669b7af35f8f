"""PEFT's rules by which names and regexes mean layers, and messages for those that mean none.

`config` is a LoRAConfig; a path is a module's in the checkpoint, as model.layers.0.mlp.up_proj.
"""

import re
from typing import NamedTuple

from support.errors import UserError, brief, nearest

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PATTERNS = "rank_pattern", "alpha_pattern"


class Modules(NamedTuple):
    """A model's modules, as paths in the checkpoint."""

    paths: list  # all of them, a tied head too
    linear: list  # those that can be adapted
    norms: list
    quantized: list  # those whose weight is no parameter
    is_tied: bool  # embedding and head are one tensor
    num_layers: int
    vocab_size: int


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


def unmatched_names(config, hits, modules, adapted):
    """A line for each name that matches nothing, with the nearest.

    hits: {target: paths it matches}; adapted: the paths of the layers to adapt.
    """
    names = [("target_modules", target) for target in hits if not hits[target]]
    for name in config.modules_to_save:
        if not whole_modules(modules.paths, [name]):
            names.append(("modules_to_save", name))
    for key in PATTERNS:
        for pattern in getattr(config, key):
            if not any(by_pattern({pattern: True}, path, False) for path in adapted):
                names.append((key, pattern))
    trainable = [*modules.linear, *modules.norms, EMBEDDING, HEAD]
    options = list(dict.fromkeys(path.split(".")[-1] for path in trainable))
    lines = []
    for key, name in names:
        lines.append(f"{key}: {name!r} matches nothing here{resembling(name, options)}")
    depth = modules.num_layers
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


def resolve_targets(config, modules, faults, strict=True):
    """(paths of the layers to adapt, notices), see lora.add_lora. `config` becomes the resolved
    form: no all-linear, norms in modules_to_save. UserError: all faults, those given first.

    modules_to_save wins over a target; a targeted norm moves there; a tied head and embedding are
    there together or not at all.
    """
    if [target.lower() for target in config.target_modules] == ["all-linear"]:
        names = {path.split(".")[-1] for path in modules.linear}
        config.target_modules = sorted(names - {HEAD})
    stop_at(setting_faults(config) + faults)
    saved = whole_modules(modules.paths, config.modules_to_save)
    hits = {}
    for target in config.target_modules:
        hits[target] = [path for path in modules.paths if matches(path, [target])]
    targeted = [path for path in modules.linear if matches(path, config.target_modules)]
    adapted = [path for path in targeted if is_selected(path, config, saved)]
    unmatched = unmatched_names(config, hits, modules, adapted)
    ignored = []
    if not strict:
        unmatched, ignored = [], unmatched[:8]
    faults = unmatched + layer_faults(config, hits, modules, adapted, saved)
    only_whole = saved or config.trainable_token_indices
    if not (faults or adapted or only_whole and not strict):
        faults = ["target_modules: no linear layer is left to adapt"]
    stop_at(faults)
    notices = train_norms_whole(config, hits, modules, saved)
    if modules.is_tied and whole_modules([EMBEDDING, HEAD], config.modules_to_save):
        config.modules_to_save = [*config.modules_to_save, "embed_tokens", HEAD]
        notices.append(
            "modules_to_save: embed_tokens and lm_head are one tied tensor: both train"
        )
    config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return adapted, notices + ignored


def stop_at(faults):
    if faults:
        raise UserError("; ".join(faults))


def layer_faults(config, hits, modules, adapted, saved):
    """What these layers can't do."""
    faults, layers = [], modules.linear + modules.norms
    for paths in hits.values():
        others = [path for path in paths if path not in layers and not within(path, saved)]
        if others:
            faults.append(
                f"target_modules: LoRA has no form for {others[0]}; modules_to_save trains it whole"
            )
    quantized = modules.quantized
    if frozen := whole_modules(quantized, config.modules_to_save):
        faults.append(
            f"modules_to_save: {frozen[0]} is held in 4 bit, which can't be trained; "
            "give it as a target"
        )
    if config.init_lora_weights == "loftq" and not set(adapted) <= set(quantized):
        faults.append("init_lora_weights: loftq corrects 4-bit weights; give --load_in_4bit too")
    tokens, ids = config.trainable_token_indices, range(modules.vocab_size)
    if len(set(tokens) & set(ids)) < len(tokens):
        faults.append(f"trainable_token_indices: not different ids from 0 to {ids[-1]}")
    if tokens and {EMBEDDING, HEAD} & {*saved, *adapted}:
        faults.append("trainable_token_indices: embedding or head is trained already")
    return faults


def train_norms_whole(config, hits, modules, saved):
    """Moves targeted norms to modules_to_save, by the target's name if that means no other module.

    Returns notices.
    """
    notices, others = [], []
    for target, paths in hits.items():
        norms = [path for path in paths if path in modules.norms]
        if len(norms) < len(paths):
            others.append(target)
        norms = [path for path in norms if is_selected(path, config, saved)]
        if norms:
            same = whole_modules(modules.paths, [target]) == norms
            config.modules_to_save = config.modules_to_save + ([target] if same else norms)
            notices.append(
                f"target_modules: {target} has no low-rank form, so it is trained whole"
            )
    config.target_modules = others
    return notices

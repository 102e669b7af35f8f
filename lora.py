"""LoRA: train a low-rank update of a frozen model, keep it in PEFT's file format, merge it.

A linear layer's weight W (out, in) stays as it is; beside it two small matrices learn y = W x + s·B A x, A (R, in)
and B (out, R). B starts at zero, so a fresh LoRA changes nothing. Norms, embeddings and the head have no low-rank form
here: they are trained whole (`modules_to_save`); biases as `bias` says.

The decision that is not obvious: what trains, trains in place, under PEFT's own paths. `LoRALinear` keeps what it wraps
as `base_layer`, so a parameter's path is its key in adapter_model.safetensors but for a prefix, and no norm, embedding
or bias exists twice. Hence one tensor has one owner: where the head is tied to the embedding, both train or neither.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. Format and matching rules: PEFT.

    python lora.py merge --adapter runs/sft/adapter --output_dir merged
    python lora.py push runs/sft --hub_model_id me/mine      # what of a finished run is not on the hub yet
"""

import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol, get_args, get_origin, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from model import (
    DTYPES,
    FLOATS,
    Linear,
    RMSNorm,
    check_names,
    open_model,
    save_model,
    set_tensor,
)
from support.errors import UserError, as_user_error, brief, nearest, run_command
from support.files import (
    atomic_folder,
    read_header,
    read_json,
    read_tensor,
    write_tensors,
)
from support.hub import HubConfig, push, resolve
from support.sandbox import bounded
from support.settings import parse_config


@dataclass
class LoRAConfig:
    """The LoRA part of a run's settings; names and matching rules are those of `peft.LoraConfig`."""

    lora_r: int = 16  # rank of the update; 0 trains every weight of the model instead
    lora_alpha: float = 32  # strength: the update is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.0  # dropout on the update's input while training
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # layers: names, one regex, or all-linear
    exclude_modules: list[str] = field(
        default_factory=list
    )  # layers to leave out: names, or one regex
    modules_to_save: list[str] = field(
        default_factory=list
    )  # modules to train whole: norms, embed_tokens, lm_head
    bias: str = "none"  # biases to train: none, all, or lora_only (those of the adapted layers)
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r) instead: steadier at high ranks
    rank_pattern: dict[str, int] = field(
        default_factory=dict
    )  # ranks of their own: {name or regex: rank}
    alpha_pattern: dict[str, float] = field(
        default_factory=dict
    )  # alphas of their own: {name or regex: alpha}
    layers_to_transform: list[int] = field(
        default_factory=list
    )  # adapt these layers only; empty: all of them
    use_dora: bool = False  # train the length of each weight row apart from its direction
    init_lora_weights: str = (
        "true"  # true, gaussian, pissa, pissa_niter_N (a faster SVD), loftq (of 4-bit weights)
    )


@runtime_checkable
class AdaptableLinear(Protocol):
    """A linear layer that can be adapted: model.py's Linear, qlora.py's Linear4bit."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    quantized: bool  # the weight is no parameter, so it can't be trained

    def dense_weight(self):
        """W (out, in) as the products use it."""

    def original_weight(self):
        """W (out, in) as the checkpoint has it; UserError where the checkpoint holds 4 bits itself."""

    def replace_weight(self, weight):
        """Holds `weight` (out, in) from here on, quantised if the layer is."""


class LoRALinear(nn.Module):
    """y = base(x) + s·B A dropout(x), over any linear layer, plain or quantised. Source: arXiv:2106.09685 section 4.1.

    base: a module with `in_features`, `out_features`, `bias` and base(x), and with `weight` (out, in) or, where it is
    quantised, `dense_weight()` that returns it. A (R, in) ~ U(±1/√in) from `generator`, B (out, R) = 0; both are fp32 and
    multiplied in x's dtype. s = alpha / R, or alpha / √R for rsLoRA. With `use_dora` row i of W + s·B A has the trained
    length m_i (Liu et al. 2024, arXiv:2402.09353, eq. 5; the length it is divided by passes no gradient, section 4.3).
    """

    def __init__(
        self, base, r, alpha, dropout=0.0, use_rslora=False, use_dora=False, generator=None
    ):
        super().__init__()
        self.base_layer, self.dropout, self.enabled = base, dropout, True
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling = alpha / (math.sqrt(r) if use_rslora else r)
        self.start = None  # A and B of a start that was taken out of the base (PiSSA)
        device = next(iter(base.state_dict().values())).device
        A = torch.empty(r, self.in_features, device="meta" if device.type == "meta" else "cpu")
        nn.init.kaiming_uniform_(
            A, a=math.sqrt(5), generator=generator
        )  # drawn on the CPU: the same on every device
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.lora_magnitude_vector = None
        if use_dora:
            length = (
                torch.empty(self.out_features, device=device)
                if device.type == "meta"
                else self.lengths()
            )
            self.lora_magnitude_vector = nn.Parameter(length)

    def forward(self, x):  # (T, in) -> (T, out)
        if x.dim() != 2:
            return self(x.reshape(-1, self.in_features)).unflatten(0, x.shape[:-1])
        y = self.base_layer(x)
        if not self.enabled:
            return y
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        h = F.linear(dropped, self.lora_A.to(x.dtype))  # (T, R)
        if self.lora_magnitude_vector is None:
            return y.addmm_(
                h, self.lora_B.to(x.dtype).t(), alpha=self.scaling
            )  # in place: never a second (T, out)
        stretch = (self.lora_magnitude_vector / self.lengths()).to(x.dtype)  # (out,)
        turned = (
            y if dropped is x else self.base_layer(dropped)
        )  # as in PEFT, all that DoRA adds is of the dropped x
        turned = (
            turned if self.base_layer.bias is None else turned - self.base_layer.bias.to(x.dtype)
        )
        return (
            y + (stretch - 1) * turned + stretch * self.scaling * (h @ self.lora_B.to(x.dtype).t())
        )

    @torch.no_grad()
    def lengths(self):
        """(out,) fp32: the lengths of the rows of W + s·B A, from |W|² + 2s W·BA + s²|BA|²; BA is never made."""
        A, B, W = self.lora_A, self.lora_B, self.base_weight()
        if not hasattr(self, "squares"):
            self.squares = W.float().square().sum(1)
        twice = (F.linear(A.to(W.dtype), W).t().float() + self.scaling / 2 * (B @ (A @ A.t()))) * B
        return (self.squares + 2 * self.scaling * twice.sum(1)).sqrt()

    def base_weight(self):
        return self.base_layer.dense_weight()

    def merged(self, W):
        """(out, in): W (out, in), this layer's or another base's, with the update, summed in fp32, in W's dtype."""
        W, dtype = torch.addmm(W.float(), self.lora_B, self.lora_A, alpha=self.scaling), W.dtype
        if self.lora_magnitude_vector is not None:
            W = W * (self.lora_magnitude_vector / W.detach().norm(dim=1))[:, None]
        return W.to(dtype)

    @property
    def weight(self):
        """(out, in): W with the update. A head is read so; what trains gets its gradient."""
        return self.merged(self.base_weight()) if self.enabled else self.base_weight()

    @torch.no_grad()
    def merge(self):
        """The plain layer that computes the same, whatever the base is."""
        return plain_linear(self.base_layer, self.weight)

    @torch.no_grad()
    def init_weights(self, kind, generator):
        """Sets A and B by `init_lora_weights`. gaussian: A ~ N(0, 1/R²), B = 0. pissa: s·B A is the weight's part of
        rank R, by its SVD or `niter` rounds of a randomised one, and is taken out of the base (Meng et al. 2024,
        arXiv:2404.02948, eqs. 2-4). loftq: s·B A is rank R of what 4 bits lost, one round (Li et al. 2023,
        arXiv:2310.08659, algorithm 1). Sources: peft's pissa_init and replace_lora_weights_loftq, which has s = 1."""
        base, r = self.base_layer, len(self.lora_A)
        if kind == "gaussian":
            self.lora_A.copy_(torch.randn(self.lora_A.shape, generator=generator) / r)
        if kind in ("true", "gaussian") or self.lora_A.is_meta:
            return
        quantised = base.quantized
        W = base.original_weight().float()
        of = W - base.dense_weight().float() if kind == "loftq" else W
        if niter := re.fullmatch(r"pissa_niter_(\d+)", kind):
            with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
                torch.manual_seed(generator.initial_seed())
                U, S, V = torch.svd_lowrank(of, r, niter=int(niter[1]))
            Vh = V.t()
        else:
            U, S, Vh = torch.linalg.svd(of, full_matrices=False)
        root = (S[:r] / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * Vh[:r])
        self.lora_B.copy_(U[:, :r] * root)
        if kind != "loftq":
            self.start = self.lora_A.clone(), self.lora_B.clone()
            rest = torch.addmm(W, *self.start[::-1], alpha=-self.scaling)
            base.replace_weight(rest.to(base.original_weight().dtype))


def plain_linear(layer, weight):
    """A plain layer of this weight (out, in) with the bias of `layer`."""
    plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return plain


def lora_layers(model) -> dict[str, LoRALinear]:
    """The adapted layers by module path."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def count_parameters(model) -> tuple[int, int]:
    """(trainable, all) parameters. A tied tensor counts once, a weight in 4 bit as what it stands for."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    quantised = sum(
        m.in_features * m.out_features for m in model.modules() if getattr(m, "quantized", False)
    )
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes) + quantised


# --- what is adapted --------------------------------------------------------------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def add_lora(model, config, seed=0, strict=True) -> list[str]:
    """Freezes `model` and puts on it, in place, the LoRA layers, whole modules and biases that `config` names.

    config: a LoRAConfig or a subclass. What trains is turned into fp32, what is frozen keeps its dtype; lora_r 0 trains
    everything. A is drawn from `seed`, never from the global state. `model.adapter` becomes the config in resolved
    form: no all-linear, norms moved to modules_to_save. Returns what the user should be told, a line each. Raises one
    UserError for all names, patterns and layers that the model has not, with the nearest; not strict (they came with an
    adapter's file), they are told and let be, as in PEFT. Source: peft's BaseTuner.inject_adapter.
    """
    if lora_layers(model):
        raise UserError("the model carries a LoRA already: merge it first, or go on training it")
    if config.lora_r == 0:
        hold_in_fp32(model.parameters())
        return []
    with bounded("matching target_modules and what else has names", seconds=3):
        config, names, notices = resolve_targets(model, config, strict)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        r = by_pattern(config.rank_pattern, name, config.lora_r)
        alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
        base = model.get_submodule(name)
        layer = LoRALinear(
            base, r, alpha, config.lora_dropout, config.use_rslora, config.use_dora, generator
        )
        most = min(base.in_features, base.out_features)
        if r > most and config.init_lora_weights not in ("true", "gaussian"):
            raise UserError(f"lora_r: {r} singular values are wanted of {name}, which has {most}")
        layer.init_weights(config.init_lora_weights, generator)
        model.set_submodule(name, layer)
    model.adapter = config
    model.requires_grad_(False)
    trained = adapter_parameters(model)
    hold_in_fp32(trained.values())
    if config.bias != "none" and not any(key.endswith(".bias") for key in trained):
        notices.append(
            f"bias: {config.bias} found none: these layers have no bias, so none is trained"
        )
    return notices


def hold_in_fp32(parameters):
    for p in parameters:
        p.data = p.data.float()
        p.requires_grad_(True)


def module_paths(model):
    """The checkpoint's module paths: a LoRA layer is what it wraps, and a tied head is there, as it is in PEFT."""
    paths = [path for path, _ in model.named_modules() if path and not path.endswith(".base_layer")]
    return paths + [HEAD] * (model.lm_head is None)


def is_regex(names):
    return len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0])


def matches(path, names):
    """PEFT's rule for targets and exclude_modules: one regex for the whole path, or names that end it at a dot."""
    return (
        bool(re.fullmatch(*names, path))
        if is_regex(names)
        else f".{path}".endswith(tuple(f".{n}" for n in names))
    )


def whole_modules(paths, modules_to_save):
    """PEFT's rule for modules_to_save: names that end the path, at a dot or not (`norm` is every norm)."""
    return [path for path in paths if path.endswith(tuple(modules_to_save))]


def by_pattern(patterns, path, default):
    """PEFT's rule for rank_pattern and alpha_pattern: the first regex that ends the path, from a dot on."""
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default
    )


def within(path, modules):
    return any(path == module or path.startswith(module + ".") for module in modules)


def resembling(name, options):
    """`nearest`, among what contains the name's letters if something does: layer_norm1 is in input_layernorm."""
    letters, *others = (
        re.sub("[^a-z]", "", text.rpartition(".")[2].lower()) for text in (name, *options)
    )
    close = [option for option, other in zip(options, others) if letters in other]
    return (
        nearest(name.rpartition(".")[2], close or options) or f" (there are: {', '.join(options)})"
    )


def resolve_targets(model, config, strict=True):
    """(LoRAConfig without all-linear or norm targets, paths of the layers to wrap, notices). modules_to_save wins over
    a target; a targeted norm moves there; a tied head and embedding are there together or not at all."""
    config = LoRAConfig(**{f.name: getattr(config, f.name) for f in fields(LoRAConfig)})
    config.init_lora_weights = config.init_lora_weights.lower()
    paths, modules, depth = (
        module_paths(model),
        dict(model.named_modules()),
        len(model.model.layers),
    )
    linear = [path for path in paths if hasattr(modules.get(path), "in_features")]
    norms = [path for path in paths if isinstance(modules.get(path), RMSNorm)]
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in linear + norms))
    config.target_modules = [t] if isinstance(t := config.target_modules, str) else t
    if [t.lower() for t in config.target_modules] == ["all-linear"]:
        config.target_modules = sorted({path.rpartition(".")[2] for path in linear if path != HEAD})
    patterns = [
        (key, *item)
        for key in ("rank_pattern", "alpha_pattern")
        for item in getattr(config, key).items()
    ]
    faults, lost, notices = config_faults(config, patterns), [], []
    if faults:
        raise UserError("; ".join(faults))

    def wanted(path):
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        inside = (
            not config.layers_to_transform or layer and int(layer[1]) in config.layers_to_transform
        )
        return inside and not within(path, saved) and not matches(path, config.exclude_modules)

    save, saved, adapted, wrapped = (
        [*config.modules_to_save],
        whole_modules(paths, config.modules_to_save),
        [],
        set(),
    )
    for target in config.target_modules:
        hits = [path for path in paths if matches(path, [target])]
        if not hits:
            lost.append(
                f"target_modules: {target!r} matches nothing in this model"
                + resembling(target, leaves)
            )
        if odd := [path for path in hits if path not in linear + norms and not within(path, saved)]:
            faults.append(
                f"target_modules: LoRA has no form for {odd[0]}; modules_to_save trains it whole"
            )
        if whole := [path for path in hits if path in norms and wanted(path)]:
            save += [target] if whole_modules(paths, [target]) == whole else whole
            notices.append(
                f"target_modules: {target} has no low-rank form: trained whole, as modules_to_save"
            )
        adapted += [target] * bool(set(hits) - set(norms))
        wrapped |= {path for path in hits if path in linear and wanted(path)}
    names = [path for path in linear if path in wrapped]
    lost += [
        f"modules_to_save: {name!r} matches nothing in this model"
        + resembling(name, [*leaves, EMBEDDING, HEAD])
        for name in config.modules_to_save
        if not whole_modules(paths, [name])
    ]
    lost += [
        f"{key}: {name!r} matches no adapted layer" + resembling(name, leaves)
        for key, name, _ in patterns
        if not any(by_pattern({name: True}, path, False) for path in names)
    ]
    lost += [
        f"layers_to_transform: {i} is not one of this model's layers 0 to {depth - 1}"
        for i in config.layers_to_transform
        if i not in range(depth)
    ]
    faults += lost if strict else []
    faults += [
        f"modules_to_save: {path} is held in 4 bit, which can't be trained; give it as a target"
        for path in whole_modules(linear, config.modules_to_save)
        if getattr(modules[path], "quantized", False)
    ][:1]
    if config.init_lora_weights == "loftq" and not all(
        getattr(modules[path], "quantized", False) for path in names
    ):
        faults.append(
            "init_lora_weights: loftq makes up for what 4 bits lose; give --load_in_4bit too"
        )
    if faults or not names:
        raise UserError("; ".join(faults or ["target_modules: no linear layer is left to adapt"]))
    if model.lm_head is None and {EMBEDDING, HEAD} & set(whole_modules(paths, save)):
        save = [name for name in save if set(whole_modules(paths, [name])) - {EMBEDDING, HEAD}] + [
            "embed_tokens",
            HEAD,
        ]
        notices.append(
            "modules_to_save: embed_tokens and lm_head are one tied tensor, which is trained for both"
        )
    return (
        replace(config, target_modules=adapted, modules_to_save=list(dict.fromkeys(save))),
        names,
        notices + lost[:8],
    )


def config_faults(config, patterns):
    """What is wrong with the values, whatever the model."""
    faults = []
    for key, name in [("target_modules", t) for t in config.target_modules] + [
        pattern[:2] for pattern in patterns
    ]:
        try:
            re.compile(name)
        except (re.error, RecursionError, OverflowError) as error:
            faults.append(f"{key}: {brief(name)} is no regex: {error}")
    if len(config.target_modules) > 1 and (
        odd := [t for t in config.target_modules if is_regex([t])]
    ):
        faults.append(f"target_modules: {odd[0]!r} among other names; a regex stands alone")
    if is_regex(config.target_modules) and config.layers_to_transform:
        faults.append("layers_to_transform goes with names; a regex can name the layers itself")
    if not re.fullmatch(r"true|gaussian|pissa(_niter_\d+)?|loftq", config.init_lora_weights):
        faults.append(
            f"init_lora_weights: {config.init_lora_weights!r} is not one of true, gaussian, pissa, "
            "pissa_niter_N, loftq"
        )
    elif config.use_dora and config.init_lora_weights not in ("true", "gaussian"):
        faults.append(f"use_dora does not go with init_lora_weights {config.init_lora_weights}")
    if config.bias not in ("none", "all", "lora_only"):
        faults.append(f"bias: {config.bias!r} is not one of none, all, lora_only")
    if not 0 <= config.lora_dropout < 1:
        faults.append(f"lora_dropout: {config.lora_dropout} is not in [0, 1)")
    numbers = [("lora_r", "", config.lora_r), ("lora_alpha", "", config.lora_alpha), *patterns]
    return faults + [
        f"{key}: {value} is not {'below 65536' if value > 0 else 'above 0'}"
        + f", for {name!r}" * bool(name)
        for key, name, value in numbers
        if not 0 < value < 2**16
    ]


# --- PEFT's files -----------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."  # PeftModel.LoraModel.(our module path)
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}  # not the maths
COMPUTED = {  # what these may be; initialisations that leave the base weights as they were
    "peft_type": ["LORA"],
    "task_type": ["CAUSAL_LM", None],
    "layers_pattern": ["layers", ["layers"], [], "", None],
    "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "eva", "mica"],
}


def adapter_names(model) -> dict[str, str]:
    """All that the model's adapter consists of, {key in PEFT's file: parameter's name}; a tied tensor has two keys, as
    it has there. Source: peft.utils.get_peft_model_state_dict."""
    whole = whole_modules(module_paths(model), model.adapter.modules_to_save)
    ends = (
        ".lora_magnitude_vector",
        *{"none": (), "all": (".bias",), "lora_only": (".base_layer.bias",)}[model.adapter.bias],
    )
    found = {}
    for name, _ in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            found[f"{PREFIX}{name}.weight"] = name
        elif within(name, whole) or name.endswith(ends):
            found[PREFIX + name] = name
    if HEAD in whole and model.lm_head is None:
        found[f"{PREFIX}{HEAD}.weight"] = f"{EMBEDDING}.weight"
    return found


def adapter_parameters(model) -> dict[str, nn.Parameter]:
    """`adapter_names` with the parameters themselves."""
    return {key: model.get_parameter(name) for key, name in adapter_names(model).items()}


def plain_lora(model):
    """(config, {key: tensor}) of an adapter as it is told to others: one that began as a part of the base (PiSSA)
    becomes B A − B₀ A₀, a plain LoRA of twice the rank on the base as it was. Source: peft's subtract_mutated_init."""
    config, tensors = (
        model.adapter,
        {key: p.detach() for key, p in adapter_parameters(model).items()},
    )
    layers = lora_layers(model)
    if not any(layer.start for layer in layers.values()):
        return replace(config, init_lora_weights="true"), tensors
    for path, layer in layers.items():
        A, B = layer.start
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([layer.lora_A.detach(), A])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat([layer.lora_B.detach(), -B], 1)
    louder = math.sqrt(2) if config.use_rslora else 2  # the scale stays what it was
    return replace(
        config,
        lora_r=2 * config.lora_r,
        lora_alpha=louder * config.lora_alpha,
        init_lora_weights="true",
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: louder * a for key, a in config.alpha_pattern.items()},
    ), tensors


def write_adapter(model, folder, base_model=None):
    """Writes adapter_config.json and adapter_model.safetensors, fp32 as trained, into an existing folder, as
    `plain_lora`. base_model: the path or hub id that a reader should start from. Returns the tensors."""
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model and str(base_model),
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    config, tensors = plain_lora(model)
    for name, value in asdict(config).items():
        if value != []:  # the default, and some of these names are unknown to PEFT's older releases
            regex = name in ("target_modules", "exclude_modules") and is_regex(value)
            raw["r" if name == "lora_r" else name] = value[0] if regex else value
    raw["init_lora_weights"] = True
    if model.lm_head is None and f"{PREFIX}{HEAD}.weight" in tensors:
        raw["ensure_weight_tying"] = True
    (Path(folder) / "adapter_config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    tensors = {key: t.to("cpu", torch.float32, copy=True) for key, t in tensors.items()}
    write_tensors(tensors, Path(folder) / "adapter_model.safetensors")
    return tensors


def save_adapter(model, folder, base_model=None):
    """`write_adapter` to a folder of its own, written aside and renamed into place."""
    with atomic_folder(folder) as aside:
        write_adapter(model, aside, base_model)


def find_adapter(name) -> Path:
    """The folder of an adapter: itself, a run folder's adapter/, or a hub id, downloaded. UserError if none is."""
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() else resolve(name, kind="adapter")
    if not (folder / "adapter_config.json").exists():
        if not (folder / "adapter" / "adapter_config.json").exists():
            raise UserError(
                f"{folder}: no adapter_config.json in it; an adapter is a folder in PEFT's layout"
            )
        folder = folder / "adapter"
    if not (folder / "adapter_model.safetensors").exists():
        pickled = "; adapter_model.bin is a pickle and never read: if you trust it, load it in PEFT and save it again"
        raise UserError(
            f"{folder}: no adapter_model.safetensors"
            + pickled * (folder / "adapter_model.bin").exists()
        )
    return folder


def fits(value, kind):
    """Whether a JSON value is of a dataclass field's type; a whole number is a float too."""
    if container := get_origin(kind):
        items = value.values() if type(value) is dict else value
        return type(value) is container and all(fits(item, get_args(kind)[-1]) for item in items)
    return type(value) is kind or kind is float and type(value) is int


def read_adapter_config(folder) -> tuple[LoRAConfig, dict]:
    """(its LoRAConfig, all of adapter_config.json). One UserError for everything in it that is not computed here."""
    file = Path(folder) / "adapter_config.json"
    raw, faults, config = (
        read_json(file),
        [],
        LoRAConfig(lora_r=8, lora_alpha=8, target_modules=[]),
    )  # PEFT's defaults
    ours = {
        "r" if f.name == "lora_r" else f.name: f
        for f in fields(LoRAConfig)
        if f.name not in COMPUTED
    }
    for key, f in ours.items():
        value = raw.get(key)
        value = [value] if get_origin(f.type) is list and type(value) in (int, str) else value
        if fits(value, f.type):
            setattr(config, f.name, value)
        elif value is not None:
            faults.append(f"{key} is {json.dumps(value)[:60]}")
    faults += [
        f"{key} is {json.dumps(raw.get(key))[:60]}; {json.dumps(values[0])} is supported"
        for key, values in COMPUTED.items()
        if raw.get(key) not in values
    ]
    if str(raw.get("init_lora_weights")).startswith(
        ("pissa", "olora", "corda", "loftq", "lora_ga")
    ):
        faults.append(
            "its base was changed too: save it as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    faults += [
        f"{k} = {json.dumps(v)[:60]} is not supported"
        for k, v in raw.items()
        if v and k not in HARMLESS | COMPUTED.keys() | ours.keys()
    ]
    if not isinstance(raw.get("base_model_name_or_path"), (str, type(None))):
        faults.append("base_model_name_or_path is no name")
    if config.lora_r < 1 or not config.target_modules:
        faults.append("a rank r from 1 and target_modules are needed")
    if faults:
        raise UserError(f"{file}: " + "; ".join(faults))
    return config, raw


def load_adapter(model, folder, trainable=False) -> list[str]:
    """Puts the adapter of a PEFT folder on a plain model, in place; frozen and in eval mode, unless it is to train on.
    Every key and shape is checked before a value is read, all faults at once. Values become fp32. Returns add_lora's
    notices. PEFT may have trained a tied model's two ends apart (no ensure_weight_tying): then the model is untied."""
    names, file, notices = open_adapter(model, folder)
    with torch.no_grad():
        for key, name in names.items():
            model.get_parameter(name).copy_(read_tensor(file, key))
    model.train(trainable)
    if not trainable:
        model.requires_grad_(False)
    return notices


def open_adapter(model, folder):
    """Makes room on a plain model, which may be on `meta`, for the adapter of a PEFT folder, and checks that it fits:
    ({key in its file: parameter's name}, the file, notices)."""
    folder = find_adapter(folder)
    config, raw = read_adapter_config(folder)
    ends = {EMBEDDING, HEAD} & set(whole_modules(module_paths(model), config.modules_to_save))
    if model.lm_head is None and ends and not raw.get("ensure_weight_tying"):
        untie(model)
    with as_user_error(f"{folder}: not an adapter of this model", UserError):
        notices = add_lora(model, config, strict=False)
    names, file = adapter_names(model), folder / "adapter_model.safetensors"
    found = {key: shape for key, (_, shape, kind) in read_header(file).items() if kind in FLOATS}
    if (key := f"{PREFIX}{HEAD}.base_layer.weight") in found and HEAD in lora_layers(model):
        names[key] = f"{HEAD}.base_layer.weight"  # PEFT stores the frozen weight of an adapted head
    twice = (
        ".modules_to_save.bias",
        ".original_module.bias",
    )  # and, with bias "all", the biases inside its wrapper
    check_names(
        {key: tuple(model.get_parameter(name).shape) for key, name in names.items()},
        {key: shape for key, shape in found.items() if not key.endswith(twice)},
        file,
    )
    return names, file, notices


def untie(model):
    """Gives the head of a tied model its own copy of the embedding."""
    embedding = model.model.embed_tokens.weight
    model.lm_head = Linear(*reversed(embedding.shape), bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model.config = replace(model.config, tie_word_embeddings=False)


# --- without it, and into the model -----------------------------------------------------------------------------------


@contextmanager
def disable_lora(model):
    """The base model, while the block runs. UserError where a norm, a bias or the like is trained: that is in place."""
    layers = lora_layers(model).values()
    if whole := [
        key for key in (adapter_parameters(model) if layers else ()) if ".lora_" not in key
    ]:
        raise UserError(
            f"disable_lora: {whole[0].removeprefix(PREFIX)} is trained in place; load the base instead"
        )
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model):
    """The plain model again, in place and frozen: W + s·B A summed in fp32 and rounded once to the base's dtype; what
    was trained whole goes back to that dtype (after full fine-tuning, that is all). Source: peft's merge_and_unload."""
    for path, layer in [
        (path, layer) for path, layer in model.named_modules() if hasattr(layer, "merge")
    ]:
        if not path.endswith(".base_layer"):
            model.set_submodule(path, layer.merge())
    for p in model.parameters():
        p.data = p.data.to(model.dtype)
    vars(model).pop("adapter", None)
    return model.requires_grad_(False)


def merge(adapter, output_dir, base=None, swap_layers=None):
    """Writes the merge of an adapter and its base (default: the one its config names) to a folder, in the base's dtype
    and the Hugging Face layout. A layer at a time: no more than a shard is held. `swap_layers` as in `open_model`: layers
    in 4 bit are merged as what they stand for. Returns notices."""
    adapter = find_adapter(adapter)
    base = base or read_adapter_config(adapter)[1].get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}: its config names no base model; give it with --model")
    model, found = open_model(base, swap_layers=swap_layers)
    was = model.config
    names, file, notices = open_adapter(model, adapter)
    trained = {name: key for key, name in names.items()}

    def fill(name):
        if name in trained:
            return set_tensor(model, name, read_tensor(file, trained[name]), "cpu", torch.float32)
        stored = name.replace(".base_layer.", ".")
        stored = stored if stored in found else f"{EMBEDDING}.weight"  # a head that was tied to it
        set_tensor(model, name, read_tensor(found[stored][0], stored), "cpu", DTYPES[was.dtype])

    @torch.no_grad()
    def merged():
        for path, layer in list(model.named_modules()):
            if path.endswith(".base_layer") or not (
                hasattr(layer, "merge") or hasattr(layer, "weight")
            ):
                continue
            for leaf in list(layer.state_dict()):
                fill(f"{path}.{leaf}")
            plain = layer.merge() if hasattr(layer, "merge") else layer
            yield from ((f"{path}.{leaf}", tensor) for leaf, tensor in plain.state_dict().items())
            layer.to("meta")  # this one has been told: it need not be held any longer

    changes = {"quantization_config": None} if was.quantized else {}
    if was.tie_word_embeddings and not model.config.tie_word_embeddings:
        changes["tie_word_embeddings"] = False
        notices.append(
            "the adapter holds an embedding and a head of their own: the merged model is untied"
        )
    save_model(merged(), output_dir, model.folder, **changes)
    return notices


def new_folder(path):
    """--output_dir's Path; UserError if there is something already."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output_dir {path}: there is something already; name a new folder")
    return path


# --- the hub ----------------------------------------------------------------------------------------------------------


# --- the commands -----------------------------------------------------------------------------------------------------


@dataclass
class MergeConfig:
    adapter: str  # the adapter's folder, a run folder, or a hub id
    output_dir: str  # the merged model's folder, a new one
    model: str | None = None  # folder or hub id of the base model; none: the one the adapter names


@dataclass
class PushConfig(HubConfig):
    run: str = field(kw_only=True)  # the run folder, named right after the command


def main():
    command, *argv = sys.argv[1:] or [""]
    if command == "push":
        argv = ["--run"] * (argv[:1] != [] and argv[0][:1] != "-") + argv
        config = parse_config(
            PushConfig, argv, "Brings to the hub what it lacks of a finished run."
        )
        return push(config.run, config)
    if command != "merge":
        raise UserError(
            f"unknown command {command!r}; usage: python lora.py merge --adapter DIR --output_dir DIR, "
            "python lora.py push RUN"
        )
    config = parse_config(MergeConfig, argv, "Merges an adapter into its base model.")
    print(
        *merge(config.adapter, new_folder(config.output_dir), config.model),
        f"merged {config.adapter} into {config.output_dir}",
        sep="\n",
    )


if __name__ == "__main__":
    run_command(main)

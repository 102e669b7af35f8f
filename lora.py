"""LoRA: train a low-rank update of a frozen model, store it in PEFT's file format, merge it.

A linear layer's weight W (out, in) stays frozen; two small matrices beside it learn
y = W x + s·B A x, with A (R, in) and B (out, R). B starts at zero, so a fresh LoRA changes nothing.
Norms, embeddings and the head can be trained whole (`modules_to_save`), biases as `bias` says.

The decision that is not obvious: what trains, trains in place, under PEFT's own paths. `LoRALinear`
keeps the layer it wraps as `base_layer`, so a parameter's path is its key in
adapter_model.safetensors but for a prefix, and no norm, embedding or bias exists twice. Hence a
tensor has one owner: where the head is tied to the embedding, both train or neither.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
DoRA: Liu et al. 2024, arXiv:2402.09353. File format and matching rules: PEFT.

    python lora.py merge --adapter runs/sft/adapter --output_dir merged
    python lora.py push runs/sft --hub_model_id me/mine      # uploads what the hub lacks of a run
"""

import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar, Protocol, get_type_hints, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from model import (
    DTYPES,
    FLOATS,
    Linear,
    RMSNorm,
    check_names,
    checkpoint_tensors,
    open_model,
    save_model,
    set_tensor,
)
from support.errors import UserError, as_user_error, run_command
from support.files import (
    atomic_folder,
    new_folder,
    read_header,
    read_json,
    read_tensor,
    write_tensors,
)
from support.hub import HubConfig, find_adapter, push
from support.sandbox import bounded
from support.settings import check_choices, from_json, run_subcommand
from support.targets import (
    EMBEDDING,
    HEAD,
    Modules,
    by_pattern,
    is_regex,
    matches,
    resolve_targets,
    whole_modules,
    within,
)

# the ends of the names of biases that train
BIASES = {"none": (), "all": (".bias",), "lora_only": (".base_layer.bias",)}


@dataclass
class LoRAConfig:
    """The LoRA fields of a run's settings; names and matching rules are `peft.LoraConfig`'s.

    A name matches the end of a layer's path; a regex stands alone and matches a whole path.
    """

    # LoRA
    lora_r: int = 16  # rank of the update; 0 trains every weight of the model instead
    lora_alpha: float = 32  # strength: the update is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.0  # dropout on the update's input while training
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # layers to adapt: names, one regex, or all-linear
    exclude_modules: list[str] = field(
        default_factory=list
    )  # layers to skip: names, or one regex
    modules_to_save: list[str] = field(
        default_factory=list
    )  # modules to train whole: norms, embed_tokens, lm_head
    trainable_token_indices: list[int] = field(
        default_factory=list
    )  # ids of tokens whose rows of the embedding, and of a head tied to it, train alone
    bias: str = "none"  # biases to train: none, all, or lora_only (those of the adapted layers)
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_r) instead: steadier at high ranks
    rank_pattern: dict[str, int] = field(default_factory=dict)  # ranks by layer: {name: rank}
    alpha_pattern: dict[str, float] = field(
        default_factory=dict
    )  # alphas by layer: {name: alpha}
    layers_to_transform: list[int] = field(
        default_factory=list
    )  # indices of the blocks to adapt; empty: all
    use_dora: bool = False  # train the length of each weight row apart from its direction
    init_lora_weights: str = "true"  # true, gaussian, pissa, pissa_niter_N (faster), olora, loftq

    CHOICES: ClassVar[dict] = {"bias": BIASES}


# --- the layers -----------------------------------------------------------------------------------


@runtime_checkable
class AdaptableLinear(Protocol):
    """A linear layer that can be adapted: model.py's Linear, qlora.py's Linear4bit.

    It is a module with a `bias` (None or a parameter) too, which isinstance can't check: PyTorch
    keeps parameters out of a module's attributes.
    """

    in_features: int
    out_features: int
    quantized: bool  # the weight is no parameter, so it can't be trained

    def dense_weight(self):
        """W (out, in) as the products use it."""

    def original_weight(self):
        """W (out, in) as in the checkpoint; UserError if the checkpoint itself holds 4 bits."""

    def replace_weight(self, weight):
        """Sets W to `weight` (out, in), which is quantised if the layer is."""


class LoRALinear(nn.Module):
    """y = base(x) + s·B A dropout(x), over an AdaptableLinear. arXiv:2106.09685 section 4.1.

    A (R, in) ~ U(±1/√in) from `generator`, B (out, R) = 0; both are fp32 and multiplied in x's
    dtype. s = alpha / R, or alpha / √R for rsLoRA.
    """

    def __init__(self, base_layer, r, alpha, config=LoRAConfig(), generator=None):
        super().__init__()
        self.base_layer, self.dropout, self.enabled = base_layer, config.lora_dropout, True
        self.scaling = scale(r, alpha, config)
        self.start = None  # (A, B) that an initialisation subtracted from the base
        device = next(iter(base_layer.state_dict().values())).device
        # drawn on the CPU, so that a seed gives the same A on every device
        A = torch.empty(r, base_layer.in_features, device="cpu")
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r, device=device))

    def forward(self, x):  # (T, in) -> (T, out)
        y = self.base_layer(x)
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training)
        h = F.linear(x, self.lora_A.to(x.dtype))  # (T, R)
        # in place, so that there is never a second (T, out)
        return y.addmm_(h, self.lora_B.to(x.dtype).t(), alpha=self.scaling)

    def merged_weight(self, W):
        """W (out, in), this base's or another's, with the update: summed in fp32, in W's dtype."""
        return torch.addmm(W.float(), self.lora_B, self.lora_A, alpha=self.scaling).to(W.dtype)

    @property
    def weight(self):
        """(out, in): W with the update; an adapted head is read so. A and B get their gradients."""
        W = self.base_layer.dense_weight()
        return self.merged_weight(W) if self.enabled else W

    def original_weight(self):
        """(out, in): what a merge into the checkpoint's weights starts from; see `start`."""
        W = self.base_layer.original_weight()
        if self.start is None:
            return W
        A, B = self.start
        return torch.addmm(W.float(), B, A, alpha=-self.scaling).to(W.dtype)


class DoRALinear(LoRALinear):
    """LoRA in which row i of W + s·B A is scaled to a trained length m_i. arXiv:2402.09353 eq. 5.

    m (out,) starts as the lengths of W's rows. The length that a row is divided by passes no
    gradient (section 4.3).
    """

    def __init__(self, *args):
        super().__init__(*args)
        # on meta there are no lengths to take, and 4-bit weights can't be dequantised
        m = torch.empty_like(self.lora_B[:, 0]) if self.lora_B.is_meta else self.lengths()
        self.lora_magnitude_vector = nn.Parameter(m)

    def forward(self, x):  # (T, in) -> (T, out)
        y = self.base_layer(x)
        if not self.enabled:
            return y
        # as in PEFT, dropout applies to all that DoRA adds, W x included
        dropped = F.dropout(x, self.dropout, self.training)
        Wx = y if dropped is x else self.base_layer(dropped)
        if self.base_layer.bias is not None:
            Wx = Wx - self.base_layer.bias.to(x.dtype)
        h = F.linear(dropped, self.lora_A.to(x.dtype))  # (T, R)
        BAx = F.linear(h, self.lora_B.to(x.dtype))
        ratio = (self.lora_magnitude_vector / self.lengths()).to(x.dtype)  # (out,)
        return y + (ratio - 1) * Wx + ratio * self.scaling * BAx

    @torch.no_grad()
    def lengths(self):
        """(out,) fp32: the row lengths of W + s·B A."""
        W = self.base_layer.dense_weight()
        return super().merged_weight(W.float()).norm(dim=1)

    def merged_weight(self, W):
        updated = super().merged_weight(W.float())
        ratio = self.lora_magnitude_vector / updated.detach().norm(dim=1)
        return (updated * ratio[:, None]).to(W.dtype)


class TokenRows(nn.Module):
    """An embedding (V, C) of which the rows of a few tokens (n,) train, held apart and alone in
    fp32. Source: peft's TrainableTokensLayer."""

    def __init__(self, base_layer, tokens):
        super().__init__()
        self.base_layer, self.tokens = base_layer, tokens
        self.trainable_tokens_delta = nn.Parameter(base_layer.weight.detach()[tokens])  # (n, C)

    def forward(self, ids):  # (T,) -> (T, C)
        x, equal = self.base_layer(ids), ids[:, None] == ids.new_tensor(self.tokens)  # (T, n)
        rows = F.embedding(equal.int().argmax(1), self.trainable_tokens_delta)
        return torch.where(equal.any(1, keepdim=True), rows.to(x.dtype), x)

    @property
    def weight(self):
        """(V, C) with the trained rows: what a tied head multiplies by."""
        W = self.base_layer.weight
        tokens = torch.tensor(self.tokens, device=W.device)
        return W.index_copy(0, tokens, self.trainable_tokens_delta.to(W.dtype))


VARIANTS = {"use_dora": DoRALinear}  # the field of LoRAConfig that selects it: layer class


def plain_linear(weight, bias=None):
    """A frozen Linear of this weight (out, in)."""
    linear = Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


def is_quantized(module):
    return getattr(module, "quantized", False)


@torch.no_grad()
def merged_layer(layer):
    """The plain layer that computes the same as an adapted or 4-bit one; any other as it is."""
    if isinstance(layer, LoRALinear):
        return plain_linear(layer.weight, layer.base_layer.bias)
    if isinstance(layer, TokenRows):
        return nn.Embedding.from_pretrained(layer.weight)
    if is_quantized(layer):
        return plain_linear(layer.dense_weight(), layer.bias)
    return layer


def lora_layers(model) -> dict[str, LoRALinear]:
    """The adapted layers by module path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def count_parameters(model) -> tuple[int, int]:
    """(trainable, all) parameters. A tied tensor counts once, a 4-bit weight as its W."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if is_quantized(layer):
            total += layer.in_features * layer.out_features
    return trainable, total


# --- initialisations ------------------------------------------------------------------------------


def init_true(layer, generator):
    """A as LoRALinear draws it, B = 0."""


def init_gaussian(layer, generator):
    """A ~ N(0, 1/R²), B = 0."""
    A = torch.randn(layer.lora_A.shape, generator=generator)
    layer.lora_A.copy_(A / len(A))


def init_pissa(layer, generator, niter=None):
    """s·B A is W's best approximation of rank R, and is subtracted from the base.

    niter: rounds of a randomised SVD instead of the exact one. Meng et al. 2024, arXiv:2404.02948,
    eqs. 2-4; peft's pissa_init.
    """
    set_low_rank(layer, layer.base_layer.original_weight().float(), generator, niter)
    subtract_start(layer)


def init_olora(layer, generator):
    """B has the first R columns of W = QR, A the first rows of R, and s·B A is subtracted from the
    base. Büyükakyüz 2024, arXiv:2406.01775; peft's olora_init."""
    Q, R = torch.linalg.qr(layer.base_layer.original_weight().float())
    rank = len(layer.lora_A)
    layer.lora_A.copy_(R[:rank])
    layer.lora_B.copy_(Q[:, :rank])
    subtract_start(layer)


def subtract_start(layer):
    """Takes s·B A off the base, so that the layer computes at first what its base did."""
    layer.start = layer.lora_A.clone(), layer.lora_B.clone()
    layer.base_layer.replace_weight(layer.original_weight())


def init_loftq(layer, generator):
    """s·B A approximates the error of quantisation, in one round.

    Li et al. 2023, arXiv:2310.08659, algorithm 1; peft's replace_lora_weights_loftq, with s = 1.
    """
    base = layer.base_layer
    error = base.original_weight().float() - base.dense_weight().float()
    set_low_rank(layer, error, generator)


def set_low_rank(layer, W, generator, niter=None):
    """Sets s·B A to the R largest singular values and vectors of W, √S on either side."""
    r = len(layer.lora_A)
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(generator.initial_seed())
            U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vh = V.t()
    root = (S[:r] / layer.scaling).sqrt()
    layer.lora_A.copy_(root[:, None] * Vh[:r])
    layer.lora_B.copy_(U[:, :r] * root)


INITIALISATIONS = {
    "true": init_true,
    "gaussian": init_gaussian,
    "pissa": init_pissa,
    "pissa_niter_N": init_pissa,
    "olora": init_olora,
    "loftq": init_loftq,
}
ZERO_STARTS = (
    "true",
    "gaussian",
)  # those that change neither output nor base; others need an SVD


def initialisation(name):
    """(key in INITIALISATIONS, [N] or []) of a setting's value: the N of pissa_niter_N."""
    return re.sub(r"\d+$", "N", name), [int(n) for n in re.findall(r"\d+$", name)]


def initialisation_faults(config):
    init = config.init_lora_weights
    if initialisation(init)[0] not in INITIALISATIONS:
        return [f"init_lora_weights: {init!r} is not one of {', '.join(INITIALISATIONS)}"]
    if config.use_dora and init not in ZERO_STARTS:
        return [f"use_dora does not go with init_lora_weights {init}"]
    return []


# --- attaching ------------------------------------------------------------------------------------


@torch.no_grad()
def add_lora(model, config, seed=0, strict=True) -> list[str]:
    """Freezes `model`, then adds the adapted layers, whole modules and biases that `config` names.

    In place. config: a LoRAConfig or a subclass. What trains becomes fp32, what is frozen keeps its
    dtype; lora_r 0 trains everything. A is drawn from `seed`, never from the global state.
    `model.adapter` becomes the config in resolved form: no all-linear, norms in modules_to_save.
    Returns notices for the user, a line each. Raises one UserError for all names, patterns and
    layers that the model lacks, with the nearest; if not strict (they came with an adapter's file),
    these are reported and ignored, as in PEFT. Source: peft's BaseTuner.inject_adapter.
    """
    if lora_layers(model):
        raise UserError("the model has a LoRA already: merge it first, or continue its training")
    if config.lora_r == 0:
        train_in_fp32(model.parameters())
        return []
    config = LoRAConfig(**{f.name: getattr(config, f.name) for f in fields(LoRAConfig)})
    check_choices(config)
    config.init_lora_weights = config.init_lora_weights.lower()
    faults = initialisation_faults(config)
    with bounded("matching target_modules and the other patterns", seconds=3):
        paths, notices = resolve_targets(config, list_modules(model), faults, strict)
    generator = torch.Generator().manual_seed(seed)
    layer_class = LoRALinear
    for name, variant in VARIANTS.items():
        if getattr(config, name):
            layer_class = variant
    kind, niter = initialisation(config.init_lora_weights)
    for path in paths:
        base = model.get_submodule(path)
        r, alpha = rank_and_alpha(config, path)
        most = min(base.in_features, base.out_features)
        if r > most and kind not in ZERO_STARTS:
            raise UserError(f"lora_r: {r} is above the {most} singular values of {path}")
        layer = layer_class(base, r, alpha, config, generator)
        if not layer.lora_A.is_meta:
            INITIALISATIONS[kind](layer, generator, *niter)
        model.set_submodule(path, layer)
    if config.trainable_token_indices:
        rows = TokenRows(model.model.embed_tokens, config.trainable_token_indices)
        model.model.embed_tokens = rows
    model.adapter = config
    model.requires_grad_(False)
    trained = adapter_parameters(model)
    train_in_fp32(trained.values())
    if config.bias != "none" and not any(key.endswith(".bias") for key in trained):
        notices.append(f"bias: {config.bias} trains none: these layers have no bias")
    return notices


def scale(r, alpha, config):
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def rank_and_alpha(config, path):
    r = by_pattern(config.rank_pattern, path, config.lora_r)
    return r, by_pattern(config.alpha_pattern, path, config.lora_alpha)


def train_in_fp32(parameters):
    for p in parameters:
        p.data = p.data.float()
        p.requires_grad_(True)


def checkpoint_modules(model) -> dict:
    """The modules by path in the checkpoint: without base_layer, and with a tied head (None)."""
    modules = {
        path: module
        for path, module in model.named_modules()
        if path and not path.endswith(".base_layer")
    }
    return modules if model.lm_head is not None else modules | {HEAD: None}


def list_modules(model) -> Modules:
    """What a model has to adapt or to train, by path in the checkpoint."""
    modules = checkpoint_modules(model)

    def paths(kind):
        return [path for path, module in modules.items() if isinstance(module, kind)]

    return Modules(
        paths=[*modules],
        linear=paths(AdaptableLinear),
        norms=paths(RMSNorm),
        quantized=[path for path, module in modules.items() if is_quantized(module)],
        is_tied=model.lm_head is None,
        num_layers=len(model.model.layers),
        vocab_size=model.config.vocab_size,
    )


def trains_tied_ends(model, modules_to_save):
    """Whether modules_to_save names the embedding or the head of a model that ties the two."""
    return model.lm_head is None and bool(whole_modules([EMBEDDING, HEAD], modules_to_save))


# --- PEFT's files ---------------------------------------------------------------------------------

PREFIX = "base_model.model."  # PeftModel.LoraModel.(our module path)
# what it stores of an embedding: a LoRA (A and B), or the rows of the tokens that train
LORA_EMBEDDING, TOKENS = "lora_embedding_A", "token_adapter.trainable_tokens_delta"

# {name in adapter_config.json: ours}. A field that is not here is not written: what it does to the
# result must be in the tensors that `exportable_adapter` returns
PEFT_FIELDS = {"r": "lora_r"} | {
    name: name
    for name in "lora_alpha lora_dropout target_modules exclude_modules modules_to_save bias "
    "use_rslora rank_pattern alpha_pattern layers_to_transform use_dora "
    "trainable_token_indices".split()
}
# keys that don't change the result
IGNORED = set(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config inference_mode "
    "megatron_core peft_version qalora_group_size revision runtime_config "
    "trainable_token_indices".split()  # read by open_adapter
)
# the values of other keys that are computed here, the usual one first
SUPPORTED: dict[str, list] = {
    "peft_type": ["LORA"],
    "task_type": ["CAUSAL_LM", None],
    "layers_pattern": ["layers", ["layers"], [], "", None],
    # initialisations that leave the base as it was
    "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "eva", "mica"],
}


def adapter_names(model) -> dict[str, str]:
    """{key in PEFT's file: parameter's name} of all that the model's adapter consists of.

    A tied tensor has two keys, as in PEFT. Source: peft.utils.get_peft_model_state_dict.
    """
    config, names = model.adapter, {}
    whole = whole_modules(checkpoint_modules(model), config.modules_to_save)
    for name, _ in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            names[f"{PREFIX}{name}.weight"] = name
        elif name.endswith("trainable_tokens_delta"):
            names[f"{PREFIX}{EMBEDDING}.{TOKENS}"] = name
        elif ".lora_" in name or within(name, whole) or name.endswith(BIASES[config.bias]):
            names[PREFIX + name] = name
    if trains_tied_ends(model, config.modules_to_save):
        names[f"{PREFIX}{HEAD}.weight"] = f"{EMBEDDING}.weight"
    return names


def adapter_parameters(model) -> dict[str, nn.Parameter]:
    """`adapter_names` with the parameters themselves."""
    return {key: model.get_parameter(name) for key, name in adapter_names(model).items()}


def exportable_adapter(model):
    """(config, {key: tensor}) of the adapter in exportable form: a LoRA of the unchanged base.

    One that began as a part of the base (PiSSA) becomes B A − B₀ A₀, a LoRA of twice the rank.
    Source: peft's subtract_mutated_init.
    """
    config = replace(model.adapter, init_lora_weights="true")
    tensors = {key: p.detach() for key, p in adapter_parameters(model).items()}
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.start}
    for path, layer in layers.items():
        A, B = layer.start
        # what trained stays first and as it is: a checkpoint is resumed from there
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([layer.lora_A.detach(), A])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat([layer.lora_B.detach(), -B], dim=1)
    if layers:
        factor = math.sqrt(2) if config.use_rslora else 2  # keeps the scale at twice the rank
        config.lora_r, config.lora_alpha = 2 * config.lora_r, factor * config.lora_alpha
        config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
        config.alpha_pattern = {name: factor * a for name, a in config.alpha_pattern.items()}
    return config, tensors


def write_adapter(model, folder, base_model=None):
    """Writes adapter_config.json and adapter_model.safetensors into an existing folder.

    In fp32 as trained, in exportable form. base_model: the path or hub id of the base for readers.
    Returns the tensors.
    """
    config, tensors = exportable_adapter(model)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model and str(base_model),
    }
    for key, name in PEFT_FIELDS.items():
        value = getattr(config, name)
        if key in ("target_modules", "exclude_modules") and is_regex(value):
            raw[key] = value[0]
        elif value != []:  # the default: PEFT's older releases don't know some of these keys
            raw[key] = value
    if trains_tied_ends(model, config.modules_to_save):
        raw["ensure_weight_tying"] = True
    (Path(folder) / "adapter_config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    tensors = {key: t.to("cpu", torch.float32, copy=True) for key, t in tensors.items()}
    write_tensors(tensors, Path(folder) / "adapter_model.safetensors")
    return tensors


def save_adapter(model, folder, base_model=None):
    """`write_adapter` into a temporary folder, which is then renamed to `folder`."""
    with atomic_folder(folder) as temporary:
        write_adapter(model, temporary, base_model)


def read_adapter_config(folder) -> tuple[LoRAConfig, dict]:
    """(its LoRAConfig, all of adapter_config.json). UserError: all of it that isn't supported."""
    file = Path(folder) / "adapter_config.json"
    raw, faults = read_json(file), []
    config = LoRAConfig(lora_r=8, lora_alpha=8, target_modules=[])  # PEFT's defaults
    types = get_type_hints(LoRAConfig)
    unsupported = [key for key, values in SUPPORTED.items() if raw.get(key) not in values]
    for key, value in raw.items():
        if value is None or key in IGNORED | SUPPORTED.keys():
            continue
        name = PEFT_FIELDS.get(key, "")
        converted = from_json(value, types[name]) if name else None
        if converted is not None:
            setattr(config, name, converted)
        elif name or value:
            unsupported.append(key)
    for key in unsupported:
        faults.append(f"{key} = {json.dumps(raw.get(key))[:60]} is not supported")
        if key in SUPPORTED:
            faults[-1] += f", {json.dumps(SUPPORTED[key][0])} is"
    if "init_lora_weights" in unsupported:
        faults.append(
            "its base was changed too: save it as plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
    if not isinstance(raw.get("base_model_name_or_path"), (str, type(None))):
        faults.append("base_model_name_or_path is not a name")
    if config.lora_r < 1 or not config.target_modules:
        faults.append("a rank r from 1 and target_modules are needed")
    if faults:
        raise UserError(f"{file}: " + "; ".join(faults))
    return config, raw


def load_adapter(model, folder, trainable=False) -> list[str]:
    """Adds the adapter of a PEFT folder to a plain model, in place, in fp32; returns notices.

    Frozen and in eval mode, unless `trainable`. Every key and shape is checked before a value is
    read; UserError: all faults at once.
    """
    values, notices = open_adapter(model, folder)
    with torch.no_grad():
        for name, read in values.items():
            model.get_parameter(name).copy_(read())
    model.train(trainable)
    if not trainable:
        model.requires_grad_(False)
    return notices


def open_adapter(model, folder):
    """Adds an adapter's layers to a plain model, which may be on `meta`, without their values.

    Returns ({parameter's name: function that reads its value}, notices). A LoRA on the embedding,
    and single tokens trained in the head, become a module that is trained whole. Where the adapter
    changes one end of a tied model, or both apart (no ensure_weight_tying), the model is untied.
    """
    folder = find_adapter(folder)
    config, raw = read_adapter_config(folder)
    file = folder / "adapter_model.safetensors"
    repeated = ".modules_to_save.bias", ".original_module.bias"  # by PEFT with bias "all"
    shapes = {
        key: shape
        for key, (_, shape, dtype) in read_header(file).items()
        if dtype in FLOATS and not key.endswith(repeated)
    }
    check_vocabulary(shapes, model.config.vocab_size, file)
    updates = {  # {end of the model: how it is changed}
        path: kind
        for path, kind in product((EMBEDDING, HEAD), (LORA_EMBEDDING, TOKENS))
        if f"{PREFIX}{path}.{kind}" in shapes
    }
    adapted = f"{PREFIX}{HEAD}.lora_A.weight" in shapes
    if updates == {EMBEDDING: TOKENS} and not adapted:
        config.trainable_token_indices = trained_tokens(model, raw, file, EMBEDDING)
        updates = {}
    config.modules_to_save = [*config.modules_to_save, *updates]
    if adapted and not is_regex(config.target_modules):  # ensure_weight_tying implies it
        config.target_modules = [*config.target_modules, HEAD]
    low_rank = adapted or LORA_EMBEDDING in updates.values()
    apart = trains_tied_ends(model, config.modules_to_save) and not raw.get("ensure_weight_tying")
    if model.lm_head is None and (apart or low_rank):
        if TOKENS in updates.values() and low_rank:
            raise UserError(
                f"{file}: single tokens are trained, and an end of a tied model is adapted; "
                "merge it in PEFT"
            )
        model.lm_head = plain_linear(model.model.embed_tokens.weight.detach().clone())
        model.config = replace(model.config, tie_word_embeddings=False)
    with as_user_error(f"{folder}: not an adapter of this model", UserError):
        notices = add_lora(model, config, strict=False)

    values, expected = {}, {}
    for path, kind in updates.items():
        parts, values[f"{path}.weight"] = updated_end(model, config, raw, file, path, kind)
        expected |= parts
    rows = config.trainable_token_indices or TOKENS in updates.values()
    if raw.get("trainable_token_indices") and not rows:
        expected[f"{PREFIX}{EMBEDDING}.{TOKENS}"] = ()
    for key, name in adapter_names(model).items():
        if not within(name, updates):
            expected[key] = model.get_parameter(name).shape
            values[name] = partial(read_tensor, file, key)
    for key in saved_along(model, file, shapes.keys() - expected):
        del shapes[key]
    check_names(expected, shapes, file)
    return values, notices


def check_vocabulary(shapes, size, file):
    """UserError if the adapter was trained on another vocabulary size than the base has."""
    ends = r"(embed_tokens|lm_head)\.((base_layer\.)?weight|lora_B\.weight|lora_embedding_A)$"
    for key, shape in shapes.items():
        if re.search(ends, key) and size not in shape:
            raise UserError(
                f"{file}: {key} is {list(shape)}, of another vocabulary size than this base's "
                f"{size}; name the resized base that the adapter was trained on"
            )


def updated_end(model, config, raw, file, path, kind):
    """({key: shape} of a LoRA or of trained rows on the embedding or head, function that reads W).

    W (V, C) fp32 has the update in it. Source: peft's lora.Embedding and TrainableTokensLayer.
    """
    (V, C), prefix = model.get_parameter(f"{path}.weight").shape, f"{PREFIX}{path}."
    r, alpha = rank_and_alpha(config, path)
    shapes = {prefix + kind: (r, V), f"{prefix}lora_embedding_B": (C, r)}
    if kind == TOKENS:
        tokens = trained_tokens(model, raw, file, path)
        shapes = {prefix + kind: (len(tokens), C)}

    def read():
        W = read_base(checkpoint_tensors(model.folder), f"{path}.weight").float()
        update, *B = (read_tensor(file, key).float() for key in shapes)
        if kind == TOKENS:
            return W.index_copy(0, torch.tensor(tokens), update)
        return torch.addmm(W, update.t(), B[0].t(), alpha=scale(r, alpha, config))

    return shapes, read


def trained_tokens(model, raw, file, path):
    """The tokens that an adapter's config trains in the embedding or head at `path`."""
    tokens = raw.get("trainable_token_indices")
    if isinstance(tokens, dict):
        named = [tokens[name] for name in tokens if matches(path, [name])]
        tokens = named[0] if named else None
    size = model.config.vocab_size
    if not isinstance(tokens, list) or not all(token in range(size) for token in tokens):
        raise UserError(f"{file.parent}: trainable_token_indices are no tokens of {path}")
    return tokens


def read_base(stored, name):
    """The base's value of a parameter, from `stored`; None if it has none.

    A tied head's is the embedding's.
    """
    name = name.replace(".base_layer.", ".")
    if name == f"{HEAD}.weight" and name not in stored:
        name = f"{EMBEDDING}.weight"
    return read_tensor(stored[name][0], name) if name in stored else None


def saved_along(model, file, keys):
    """Those of an adapter file's keys that hold the base's own weights; UserError if others."""
    stored = checkpoint_tensors(model.folder) if keys else {}
    along = []
    for key in keys:
        weight, base = read_tensor(file, key), read_base(stored, key.removeprefix(PREFIX))
        if base is None:
            continue
        if not torch.equal(weight, base.to(weight.dtype)):
            raise UserError(
                f"{file}: {key} differs from this base's weight: it belongs to another base, or "
                "was trained; load it in PEFT and merge it there"
            )
        along.append(key)
    return along


# --- the base alone, and the merge ----------------------------------------------------------------


@contextmanager
def disable_lora(model):
    """The base model, while the block runs. UserError if more than A and B is trained: in place."""
    layers = lora_layers(model).values()
    for name in adapter_names(model).values() if hasattr(model, "adapter") else ():
        if ".lora_" not in name:
            raise UserError(f"disable_lora: {name} is trained in place; load the base instead")
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model):
    """The plain model again, in place and frozen: W + s·B A summed in fp32, rounded once.

    All of it is in the base's dtype then; after full fine-tuning that is the only change.
    Source: peft's merge_and_unload.
    """
    for path, layer in layers_with_weights(model).items():
        model.set_submodule(path, merged_layer(layer))
    for p in model.parameters():
        p.data = p.data.to(model.dtype)
    vars(model).pop("adapter", None)
    return model.requires_grad_(False)


def layers_with_weights(model) -> dict:
    """{path: layer}: adapted layers with what they wrap, and the other modules without children."""
    return {
        path: module
        for path, module in checkpoint_modules(model).items()
        if isinstance(module, (LoRALinear, TokenRows)) or module and not list(module.children())
    }


def merge(adapter, output_dir, base=None, swap_layers=None):
    """Writes an adapter merged into its base in the Hugging Face layout, in the base's dtype.

    base: by default the one that the adapter's config names. A layer is merged at a time: at most a
    shard is held. `swap_layers` as in `open_model`: 4-bit layers are dequantised. Returns notices.
    """
    adapter = find_adapter(adapter)
    base = base or read_adapter_config(adapter)[1].get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}: its config names no base model; give it with --model")
    model, stored = open_model(base, swap_layers=swap_layers)
    original = model.config
    values, notices = open_adapter(model, adapter)

    def read(name):
        """(a parameter's value, its dtype) from the adapter, else from the base."""
        if name in values:
            return values[name](), torch.float32
        return read_base(stored, name), DTYPES[original.dtype]

    @torch.no_grad()
    def merged_tensors():
        for path, layer in layers_with_weights(model).items():
            for name in [f"{path}.{leaf}" for leaf in layer.state_dict()]:
                value, dtype = read(name)
                set_tensor(model, name, value, "cpu", dtype)
            for leaf, tensor in merged_layer(layer).state_dict().items():
                yield f"{path}.{leaf}", tensor
            layer.to("meta")  # frees it

    changes = {"quantization_config": None} if original.quantized else {}
    if original.tie_word_embeddings and not model.config.tie_word_embeddings:
        changes["tie_word_embeddings"] = False
        notices.append("the adapter trained embedding and head apart: the merged model is untied")
    save_model(merged_tensors(), output_dir, model.folder, adapter=adapter, **changes)
    return notices


# --- the commands ---------------------------------------------------------------------------------


@dataclass
class MergeConfig:
    # merge
    adapter: str  # the adapter's folder, a run folder, or a hub id
    output_dir: str  # the merged model's folder, a new one
    model: str | None = None  # folder or hub id of the base; none: the one the adapter names


@dataclass
class PushConfig(HubConfig):
    # push
    run: str = field(kw_only=True)  # the run folder, right after the command


def merge_command(config, swap_layers=None):
    """Merges an adapter into its base model."""
    with new_folder(config.output_dir) as folder:
        notices = merge(config.adapter, folder, config.model, swap_layers)
    print(*notices, f"merged {config.adapter} into {config.output_dir}", sep="\n")


def push_command(config):
    """Uploads what the hub lacks of a finished run: python lora.py push RUN."""
    push(config.run, config)


COMMANDS = {"merge": (MergeConfig, merge_command), "push": (PushConfig, push_command)}


def main():
    command, *words = sys.argv[1:] or [""]
    if command == "push" and words and not words[0].startswith("-"):
        words = ["--run", *words]
    run_subcommand(COMMANDS, __doc__, [command, *words])


if __name__ == "__main__":
    run_command(main)

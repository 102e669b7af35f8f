"""Qwen3, Llama (2, 3, 3.1, 3.2) and Qwen2 in plain PyTorch, straight from Hugging Face safetensors.

The decision that is not obvious: there is no batch dimension and no padding. A batch is one stream of T tokens cut into
segments; a segment may continue another one (its prefix), whose tokens it then sees too. Documents are segments without
a prefix, a preference pair is a prompt with two continuations, a multiple-choice question is one context with k
continuations: what they share is computed once. Module paths are the checkpoint's tensor names, so loading needs no
mapping.

Shape letters, here and in the other modules: T packed tokens, S scored positions, B sequences, C hidden size, H heads,
K key/value heads, D head dim, V vocabulary, L layers, R LoRA rank.

    model = load_model("Qwen/Qwen3-0.6B")
    generate(model, [prompt_ids], max_new_tokens=32)
"""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.errors import UserError, as_user_error, brief, nearest
from support.files import (
    atomic_folder,
    finite,
    read_header,
    read_json,
    read_tensor,
    write_tensors,
)
from support.hub import COMPANIONS, resolve
from support.memory import set_malloc_threshold

# --- the packed batch -------------------------------------------------------------------------------------------------

IGNORE = -100  # the label of a token that is not scored


class Segment(NamedTuple):
    """A run of tokens. An example is a list of segments: one for SFT, a prompt and two continuations for a DPO pair."""

    ids: np.ndarray  # int32 token ids
    labels: np.ndarray  # int32: the id again where the token is scored, IGNORE where it is not
    prefix: int = -1  # which segment of the example, earlier than this one, it continues; -1: none
    sequence: int = 0  # which of the example's sequences its scored tokens count for
    weight: float = 1.0  # what each of its scored tokens counts
    reference: np.ndarray | float = (
        0.0  # (n,) log-probs of its n scored tokens under DPO's reference
    )


@dataclass
class Batch:
    """Examples packed into one stream.

    tokens (T,), positions (T,); segments [(start, stop, prefix)], prefix the index of a segment or -1; and for every
    scored token: scored (S,) the position whose hidden state predicts it, targets (S,) its id, sequence (S,) the
    sequence it belongs to, numbered over the batch up to num_sequences, weights (S,) what it counts, reference (S,) its
    segment's.
    """

    tokens: Tensor
    positions: Tensor
    segments: list
    scored: Tensor
    targets: Tensor
    sequence: Tensor
    weights: Tensor
    reference: Tensor
    num_sequences: int
    largest: int = 0  # of the token ids
    biases: dict = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def pack(cls, examples, device="cpu"):
        """examples: a list of lists of Segment. A segment's first token is scored only where its prefix predicts it."""
        segments, rows, start, num_sequences = [], [], 0, 0
        for example in examples:
            first = len(segments)
            for segment in example:
                labels, stop = np.asarray(segment.labels), start + len(segment.ids)
                prefix = first + segment.prefix if segment.prefix >= 0 else -1
                before, offset = (
                    (segments[prefix][1], rows[prefix][1][-1] + 1) if prefix >= 0 else (0, 0)
                )
                at = np.flatnonzero(labels != IGNORE)
                at = at if prefix >= 0 else at[at > 0]
                segments.append((start, stop, prefix))
                rows.append(
                    (
                        segment.ids,
                        np.arange(offset, offset + stop - start),
                        np.where(at > 0, start + at - 1, before - 1),
                        labels[at],
                        *(
                            np.full(len(at), value)
                            for value in (
                                num_sequences + segment.sequence,
                                segment.weight,
                                segment.reference,
                            )
                        ),
                    )
                )
                start = stop
            num_sequences += 1 + max(segment.sequence for segment in example)
        kinds = [np.int64] * 5 + [np.float32] * 2
        tokens, positions, *scored = (
            torch.from_numpy(np.concatenate(parts).astype(kind)).to(device)
            for parts, kind in zip(zip(*rows), kinds)
        )
        return cls(
            tokens,
            positions,
            segments,
            *scored,
            num_sequences,
            int(max(np.max(row[0]) for row in rows)),
        )

    def lineage(self, index):
        """The segments that segment `index` sees, oldest first, itself last."""
        line = [index]
        while (index := self.segments[index][2]) >= 0:
            line.append(index)
        return line[::-1]

    @cached_property
    def keys(self):
        """Per segment the positions it sees, ancestors first: a slice where they are adjacent, else (n,)."""
        found = []
        for index in range(len(self.segments)):
            spans = [self.segments[i][:2] for i in self.lineage(index)]
            if all(a[1] == b[0] for a, b in zip(spans, spans[1:])):
                found.append(slice(spans[0][0], spans[-1][1]))
            else:
                found.append(
                    torch.cat([torch.arange(*span, device=self.tokens.device) for span in spans])
                )
        return found

    @cached_property
    def mask(self):
        """(T, T) bool: who sees whom, spelled out. A token sees the tokens of its lineage that do not come after it."""
        sees = torch.zeros(2 * [len(self.tokens)], dtype=torch.bool, device=self.tokens.device)
        for (start, stop, _), keys in zip(self.segments, self.keys):
            sees[start:stop, keys] = True
        return sees & (self.positions <= self.positions[:, None])

    def bias(self, own, seen, dtype):
        """(own, seen): -inf where one of a segment's `own` tokens would see what comes after it, 0 elsewhere."""
        if (own, seen, dtype) not in self.biases:
            future = torch.full((own, seen), float("-inf"), dtype=dtype, device=self.tokens.device)
            self.biases[own, seen, dtype] = future.triu(seen - own + 1)
        return self.biases[own, seen, dtype]

    @cached_property
    def varlen(self):
        """What varlen_attn is told: key positions (None: the stream itself), cu_q, cu_k, max_q, max_k."""
        queries = [stop - start for start, stop, _ in self.segments]
        spans = [
            [self.segments[i][:2] for i in self.lineage(index)]
            for index in range(len(self.segments))
        ]
        lengths = [sum(stop - start for start, stop in line) for line in spans]
        gather = (
            None
            if lengths == queries
            else torch.from_numpy(
                np.concatenate([np.arange(*span) for line in spans for span in line])
            ).to(self.tokens.device)
        )
        cu = [
            torch.tensor(
                np.concatenate([[0], np.cumsum(n)]), dtype=torch.int32, device=self.tokens.device
            )
            for n in (queries, lengths)
        ]
        return gather, *cu, max(queries), max(lengths)


# --- attention: three ways to the same numbers ------------------------------------------------------------------------


def eager_attention(q, k, v, batch):
    """The maths, for readers and tests. q (T, H, D), k and v (T, K, D) -> (T, H, D); softmax in fp32."""
    group = q.shape[1] // k.shape[1]  # query head h reads key/value head h // group
    q, k, v = (
        x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    scores = (q @ k.transpose(1, 2)).float() / math.sqrt(q.shape[-1])  # (H, T, T)
    weights = scores.masked_fill(~batch.mask, float("-inf")).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(0, 1)


def sdpa_attention(q, k, v, batch):
    """One segment at a time over what it sees; never a (T, T) mask. Short ones on a CPU: product_attention."""
    outputs = []
    for (start, stop, _), keys in zip(batch.segments, batch.keys):
        one = q[start:stop], k[keys], v[keys]
        own, seen = len(one[0]), len(one[1])
        if q.device.type == "cpu" and (seen <= 512 or not torch.is_grad_enabled()):
            for at in range(0, own, 512):  # so the products with what comes after are not made
                rows, stop = one[0][at : at + 512], seen - own + min(at + 512, own)
                bias = batch.bias(len(rows), stop, q.dtype)
                outputs.append(product_attention(rows, one[1][:stop], one[2][:stop], bias))
            continue
        mask = None if own == seen else batch.bias(own, seen, q.dtype)
        one = (x.transpose(0, 1)[None] for x in one)  # (1, heads, tokens, D)
        out = F.scaled_dot_product_attention(
            *one, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def product_attention(q, k, v, bias):
    """One segment as plain matrix products, a group's query heads stacked on their key head. On a CPU with 16-bit
    products up to 2.8 times as fast, forward and backward, as the flash kernel, made for long sequences."""
    (own, H, D), K = q.shape, k.shape[1]
    rows = q.view(own, K, H // K, D).permute(1, 2, 0, 3).reshape(K, -1, D)  # (K, H/K · own, D)
    scores = torch.baddbmm(bias.repeat(H // K, 1), rows, k.permute(1, 2, 0), alpha=D**-0.5)
    return (
        (scores.softmax(-1) @ v.transpose(0, 1))
        .view(K, H // K, own, D)
        .permute(2, 0, 1, 3)
        .reshape(own, H, D)
    )


def varlen_attention(q, k, v, batch):
    """PyTorch's variable-length flash attention (CUDA, 16 bit): bottom-right causal, so prefixes are just more keys."""
    from torch.nn.attention.varlen import varlen_attn

    gather, cu_q, cu_k, max_q, max_k = batch.varlen
    if gather is not None:
        k, v = k[gather], v[gather]
    return varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1]
    )


ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention, "varlen": varlen_attention}


def choose_attention(wanted, config, dtype, device):
    """(name, notice): 'auto' is varlen where it runs (tried on two tokens), else sdpa; notice is '' or a line."""
    if wanted not in ("auto", "flash", *ATTENTION):
        raise UserError(
            f"attn_implementation: {wanted!r} is not one of auto, flash, {', '.join(ATTENTION)}"
            + nearest(wanted, ATTENTION)
        )
    if wanted in ("eager", "sdpa") or wanted == "auto" and torch.device(device).type != "cuda":
        return ("sdpa" if wanted == "auto" else wanted), ""
    try:
        one = [Segment(np.zeros(2, np.int32), np.full(2, IGNORE, np.int32))]
        q = torch.zeros(2, config.num_attention_heads, config.head_dim, dtype=dtype, device=device)
        k = torch.zeros(2, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device)
        varlen_attention(q, k, k, Batch.pack([one], device))
        return "varlen", ""
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        return "sdpa", f"attention: varlen does not run here ({reason}); using sdpa"


# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """What config.json says of a model, in either of its two dialects. `from_dict` names everything it can't honour."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict  # rope_type, rope_theta and the type's own numbers
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str  # of the checkpoint's tensors
    eos_token_id: tuple
    quantized: bool  # the checkpoint holds bitsandbytes' 4-bit weights, which qlora.py reads

    @classmethod
    def read(cls, folder):
        return cls.from_dict(read_json(Path(folder) / "config.json"), Path(folder) / "config.json")

    @classmethod
    def from_dict(cls, raw, where="config.json"):
        """Raises UserError with one line for all that this code does not compute."""
        faults, kind = [], raw.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise UserError(
                f"{where}: model_type {brief(kind)} is not supported; llama, qwen2 and qwen3 are"
            )

        def take(key, default, fine, wanted):
            value = default if raw.get(key) is None else raw[key]
            if fine(value):
                return value
            faults.append(f"{key} is {str(value)[:40]!r}, not {wanted}")
            return 1

        def number(key, default=None, most=2**31):
            return take(
                key,
                default,
                lambda n: type(n) is int and 1 <= n <= most,
                f"a whole number from 1 to {most}",
            )

        def flag(key):
            return take(key, False, lambda value: isinstance(value, bool), "true or false")

        hidden, heads = number("hidden_size", most=2**20), number("num_attention_heads", most=2**16)
        kv_heads = number("num_key_value_heads", heads, most=2**16)
        head_dim = number(
            "head_dim", 128 if kind == "qwen3" else max(hidden // heads, 1), most=2**16
        )
        rope = rope_parameters(raw, faults)
        if heads % kv_heads:
            faults.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            faults.append(f"head_dim {head_dim} is odd, rotary positions need an even one")
        if raw.get("hidden_act", "silu") != "silu":
            faults.append(f"hidden_act {brief(raw['hidden_act'])} is not supported (silu is)")
        layers = raw.get("layer_types") or []
        if (
            raw.get("sliding_window")
            and raw.get("use_sliding_window")
            or not isinstance(layers, list)
            or any(layer != "full_attention" for layer in layers)
        ):
            faults.append(
                "sliding-window attention (use_sliding_window, layer_types) is not supported"
            )
        quantization = raw.get("quantization_config") or {}
        if quantization and not (
            isinstance(quantization, dict) and quantization.get("load_in_4bit")
        ):
            faults.append(
                "quantization_config: only bitsandbytes' 4-bit weights are read; take those, or 16-bit ones"
            )
        bias, eos = flag("attention_bias"), raw.get("eos_token_id")
        eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if any(type(token) is not int for token in eos):
            faults.append(f"eos_token_id is {str(eos)[:40]}, not a token id or a list of them")
        config = cls(
            model_type=kind,
            vocab_size=number("vocab_size", most=2**24),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size", most=2**22),
            num_hidden_layers=number("num_hidden_layers", most=2**12),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            rms_norm_eps=float(take("rms_norm_eps", 1e-6, positive, "a positive number")),
            max_position_embeddings=number("max_position_embeddings", 2048),
            tie_word_embeddings=flag("tie_word_embeddings"),
            qkv_bias=kind == "qwen2" or bias,
            o_bias=kind != "qwen2" and bias,
            mlp_bias=kind == "llama" and flag("mlp_bias"),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix(
                "torch."
            ),
            eos_token_id=eos,
            quantized=bool(quantization),
        )
        if config.dtype not in DTYPES:
            faults.append(f"dtype {brief(config.dtype)} is not one of {', '.join(DTYPES)}")
        if faults:
            raise UserError(f"{where}: " + "; ".join(faults))
        fault = f"{where}: rope can't be computed from these numbers"
        with torch.device("cpu"), as_user_error(fault, ArithmeticError, ValueError):
            frequencies, scale = rope_frequencies(config)
            if not math.isfinite(frequencies.sum() * scale):
                raise ValueError(config.rope)
        return config


FLOATS = "BF16", "F16", "F32", "F64"  # in a safetensors header
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
ROPE_OPTIONS = (
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)  # of yarn, which has defaults


def positive(value):
    return type(value) in (int, float) and 0 < value < 1e30


def rope_parameters(raw, faults):
    """The rope settings of both dialects as one dict: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        faults.append("rope_parameters / rope_scaling is not an object")
        rope = {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    rope = {**rope, "rope_type": kind, "rope_theta": 10000.0 if theta is None else theta}
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        faults.append(f"rope type {brief(kind)} is not supported ({', '.join(ROPE_NUMBERS)} are)")
        kind = "default"
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        faults.append("partial_rotary_factor is not supported")
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    numbers = ("rope_theta", *ROPE_NUMBERS[kind], *filter(rope.get, ROPE_OPTIONS))
    wrong = [key for key in numbers if not positive(rope.get(key))]
    faults += [f"rope {key} is {str(rope.get(key))[:40]!r}, not a positive number" for key in wrong]
    if kind == "llama3" and not wrong and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        faults.append("rope low_freq_factor is not below high_freq_factor")
    return rope


def rope_frequencies(config):
    """(inv_freq (D/2,) fp32, the factor on cos and sin). Plain and linear: Su et al. 2021, arXiv:2104.09864, Chen et
    al. 2023, arXiv:2306.15595; yarn: Peng et al. 2023, arXiv:2309.00071, eqs. 17-22; llama3: as Llama 3.1's reference
    code scales."""
    rope, dim = config.rope, config.head_dim
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor") or 1.0
    plain = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if (
        kind == "llama3"
    ):  # long wavelengths are stretched by factor, short ones kept, those between blended
        old, low, high = (
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
        wavelength = 2 * math.pi / plain
        blend = (old / wavelength - low) / (high - low)
        blended = (1 - blend) * plain / factor + blend * plain
        stretched = torch.where(wavelength > old / low, plain / factor, plain)
        return torch.where(
            (wavelength >= old / high) & (wavelength <= old / low), blended, stretched
        ), 1.0
    if kind == "yarn":

        def magnitude(m=1.0):
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1  # over the original context
        waves = [rope["original_max_position_embeddings"] / (n * 2 * math.pi) for n in turns]
        low, high = (
            dim * math.log(wave) / (2 * math.log(theta)) for wave in waves
        )  # the dimensions that turn so
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(
            0, 1
        )
        scale = rope.get("attention_factor")
        if scale is None:
            both = rope.get("mscale") and rope.get("mscale_all_dim")
            scale = (
                magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
                if both
                else magnitude()
            )
        return plain / factor * ramp + plain * (1 - ramp), scale
    return plain / (factor if kind == "linear" else 1.0), 1.0


# --- the network ------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """The matmul runs in the stream's dtype: a weight that trains is held in fp32 and cast here. The other members are
    what lora.py asks of a layer that can be adapted, see AdaptableLinear there."""

    quantized = False

    def dense_weight(self):
        return self.weight

    def original_weight(self):
        return self.weight

    def replace_weight(self, weight):
        self.weight.copy_(weight)

    def forward(self, x):
        return F.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class Normalise(torch.autograd.Function):
    """x / rms(x) * weight in fp32. Keeps x and 1 / rms where autograd would keep two fp32 copies of x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit, grad = x.float() * scale, grad.float()
        d_weight = (
            (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        grad = grad * weight
        return (
            (scale * (grad - unit * (grad * unit).mean(-1, keepdim=True))).to(x.dtype),
            d_weight,
            None,
        )


class RMSNorm(nn.Module):
    """Root mean square normalisation, statistics in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if x.is_cuda:  # one kernel each way
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return Normalise.apply(x, self.weight, self.eps)


class Rotate(torch.autograd.Function):
    """Rotary positions on x (T, heads, D), halves paired; cos and sin (T, 1, D/2) fp32, the product rounded once to
    x.dtype. A rotation's gradient is the rotation back, so x need not be kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        a, b = grad.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(grad.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202); silu(gate) is made again in backward rather than kept."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        if (
            c.model_type == "qwen3"
        ):  # normalises each head's queries and keys before they are rotated
            self.q_norm, self.k_norm = (
                RMSNorm(c.head_dim, c.rms_norm_eps),
                RMSNorm(c.head_dim, c.rms_norm_eps),
            )

    def forward(self, x, rope, attend):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(Rotate.apply(q, *rope), Rotate.apply(k, *rope), v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """The causal language model. Its state_dict is the checkpoint: with tied embeddings there is no lm_head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.dtype = torch.float32  # of the stream and the matmuls
        self.attention = "sdpa"
        self.gradient_checkpointing = False
        self.folder = None  # where config and tokenizer came from

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def head_weight(self):
        """(V, C): the matrix that turns hidden states into logits, whoever owns it."""
        return (self.lm_head if self.lm_head is not None else self.model.embed_tokens).weight

    def forward(self, batch, cache=None):
        """Final, normalised hidden states (T, C). With a cache, keys and values are kept and seen as `KVCache` says."""
        if batch.largest >= self.config.vocab_size:
            raise UserError(
                f"token {batch.largest} is beyond the model's vocabulary of {self.config.vocab_size}: "
                "its tokenizer is another model's"
            )
        inv_freq, scale = rope_frequencies(self.config)
        angles = batch.positions[:, None, None].float() * inv_freq.to(
            batch.positions.device
        )  # (T, 1, D/2)
        rope = angles.cos() * scale, angles.sin() * scale
        attend = partial(ATTENTION[self.attention], batch=batch)
        x = self.model.embed_tokens(batch.tokens).to(self.dtype)
        for i, layer in enumerate(self.model.layers):
            if cache is not None:
                x = layer(x, rope, partial(cache.attend, i, attend, batch))
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend, use_reentrant=False)
            else:
                x = layer(x, rope, attend)
        return self.model.norm(x)

    def logits(self, hidden):
        """fp32 logits (..., V) of hidden states (..., C). Training never calls it: see token_logps."""
        return F.linear(hidden, self.head_weight().to(hidden.dtype)).float()

    def logps(self, batch):
        """Log-probabilities (S,) fp32 of the batch's scored tokens. The head runs on those positions alone."""
        return token_logps(self(batch)[batch.scored], self.head_weight(), batch.targets)


# --- the one primitive that scores tokens -----------------------------------------------------------------------------

CHUNK = 256  # scored positions whose logits exist at a time: (256, V) in the stream's dtype


def log_softmax_(logits, targets, keep_grad):
    """Log-probabilities (n,) fp32 of targets under logits (n, V). keep_grad: logits become d logp / d logits, in place.
    On a CPU a few rows at a time, whose fp32 copy stays in cache: half the time of the head would go there else."""
    rows, found = (
        len(logits) if logits.device.type != "cpu" else max(1, 2**21 // logits.shape[1]),
        [],
    )
    for part, target in zip(logits.split(rows), targets.split(rows)):
        logps = F.log_softmax(part, -1, dtype=torch.float32)
        found.append(logps.gather(1, target[:, None])[:, 0])
        if keep_grad:
            part.copy_(logps.exp_().neg_())
    found = torch.cat(found)
    if keep_grad:  # 1 - p from log p: a 16-bit p near 1 has no digits left for it
        logits[torch.arange(len(targets), device=logits.device), targets] = -torch.expm1(found).to(
            logits.dtype
        )
    return found


class FrozenHead(torch.autograd.Function):
    """token_logps of a head that does not train. d logp_s / d hidden_s = W[target] - softmax W is known in the forward
    pass, a row per position, so backward is one multiplication by the upstream gradient and saves (S, C) alone."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        keep, weight, found = ctx.needs_input_grad[0], weight.to(hidden.dtype), []
        rows = torch.empty_like(hidden) if keep else None
        wide = (
            {"out_dtype": torch.float32} if hidden.is_cuda and hidden.dtype != torch.float32 else {}
        )
        for at in range(0, len(hidden), CHUNK):
            logits = torch.mm(
                hidden[at : at + CHUNK], weight.T, **wide
            )  # CUDA keeps the fp32 accumulator
            found.append(log_softmax_(logits, targets[at : at + CHUNK], keep))
            if keep:
                rows[at : at + CHUNK] = logits.to(hidden.dtype) @ weight
        ctx.save_for_backward(rows)
        return torch.cat(found)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return (grad[:, None] * rows).to(rows.dtype), None, None


def token_logps(hidden, weight, targets):
    """Log-probabilities (S,) fp32 of targets (S,) given hidden (S, C) and the head's weight (V, C). Never holds (S, V):
    chunks of CHUNK positions; a head that trains is recomputed chunk by chunk in backward. Reference: cross entropy
    over the whole logits, torch.nn.functional.cross_entropy(reduction='none'), negated."""
    if len(targets) == 0:
        return hidden.sum(-1).float()
    if not weight.requires_grad:
        return FrozenHead.apply(hidden, weight, targets)

    def score(hidden, weight, targets):
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        return -F.cross_entropy(logits, targets, reduction="none")

    return torch.cat(
        [
            checkpoint(score, h, weight, t, use_reentrant=False)
            for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK))
        ]
    )


# --- generation -------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of B rows of up to N tokens, per layer (B, K, N, D). A pass over prompts is a packed batch, which
    attends as any batch does; every other pass adds one token to each row and attends over the row. A header that all
    rows begin with is read once and stands in every row."""

    def __init__(self, model, rows, room, header=()):
        c = model.config
        shape = rows, c.num_key_value_heads, room, c.head_dim
        self.keys = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(c.num_hidden_layers)
        ]
        self.values, self.header = [torch.zeros_like(k) for k in self.keys], []
        if len(header):
            model(self.read([header], [0], model.device), self)
            for x in self.keys + self.values:
                x[:, :, : len(header)] = x[:1, :, : len(header)].clone()
            self.header = header

    def read(self, prompts, rows, device):
        """The batch of the next pass: id lists, each behind the header, into these rows."""
        head, none = len(self.header), np.full(len(self.header) + max(map(len, prompts)), IGNORE)
        segments = [
            Segment(np.asarray(p, np.int32), none[: len(p)], 0 if head else -1) for p in prompts
        ]
        first = [Segment(np.asarray(self.header, np.int32), none[:head])] if head else []
        self.batch = Batch.pack([first + segments], device)
        lengths = torch.tensor([len(p) for p in prompts])
        self.decoding, self.rows = False, torch.tensor(rows).repeat_interleave(lengths).to(device)
        return replace(
            self.batch, tokens=self.batch.tokens[head:], positions=self.batch.positions[head:]
        )

    def attend(self, layer, attend, batch, q, k, v):
        keys, values, head = self.keys[layer], self.values[layer], len(self.header)
        keys[self.rows, :, batch.positions], values[self.rows, :, batch.positions] = k, v
        if (
            not self.decoding
        ):  # the header's queries are left blank, and what comes of them is dropped
            q, k, v = (
                torch.cat([x, y])
                for x, y in zip(
                    (
                        q.new_zeros(head, *q.shape[1:]),
                        *(x[0, :, :head].transpose(0, 1) for x in (keys, values)),
                    ),
                    (q, k, v),
                )
            )
            return attend(q, k, v, batch=self.batch)[head:]
        q, head_dim = q.unflatten(1, (keys.shape[1], -1)), q.shape[-1]  # (B, K, H/K, D)
        mask = (torch.arange(keys.shape[2], device=q.device) <= batch.positions[:, None])[
            :, None, None
        ]  # (B, 1, 1, N)
        if q.device.type != "cpu":
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1, 2)
        scores = (q @ keys.transpose(2, 3) * head_dim**-0.5).masked_fill_(~mask, float("-inf"))
        return (scores.softmax(-1) @ values).flatten(
            1, 2
        )  # plain products: a tenth of the kernel's time

    def keep(self, rows):
        """Drops all other rows; the next pass adds one token to each of these."""
        if len(rows) < len(self.keys[0]):
            self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.decoding, self.rows = True, torch.arange(len(rows), device=self.keys[0].device)


def sample(logits, uniform, temperature, top_k, top_p):
    """One token per row of logits (B, V) by inverse transform of uniform (B,) in [0, 1). temperature 0 is greedy. Order
    as in transformers: temperature, the top_k likeliest, the smallest set of them whose mass reaches top_p (Holtzman et
    al. 2020, arXiv:1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    if top_k:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0
    mass = probs.cumsum(-1)
    pick = (mass <= uniform[:, None] * mass[:, -1:]).sum(-1).minimum((probs > 0).sum(-1) - 1)
    return order.gather(1, pick[:, None])[:, 0]


def generate(model, prompts, max_new_tokens=128, *args, **options):
    """Continues prompts, B id lists of any lengths -> B lists of new ids. Options and ends as in `generate_each`."""
    found = dict(generate_each(model, prompts, max_new_tokens, *args, **options))
    return [found[row] for row in range(len(prompts))]


@torch.inference_mode()
def generate_each(
    model,
    prompts,
    max_new_tokens=128,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    eos_ids=None,
    seed=0,
    stop=None,
    batch_size=64,
):
    """Yields (row, its new ids) as the rows end. batch_size of them are written at a time; one that ends makes room for
    the next, and what all prompts begin with is read once.

    eos_ids: end tokens (default: the config's), left out of what is yielded; stop(ids): whether a row ends otherwise.
    Row i draws from (seed, i), whatever else is in the batch.
    """
    if any(len(p) == 0 for p in prompts):
        raise UserError("generate: an empty prompt has nothing to continue")
    ends, device = set(model.config.eos_token_id if eos_ids is None else eos_ids), model.device
    outputs, waiting = [[] for _ in prompts], list(range(len(prompts)))
    if not prompts or max_new_tokens < 1:
        yield from enumerate(outputs)
        return
    draws = [np.random.default_rng((seed, row)) for row in waiting]
    head = (
        min(len(os.path.commonprefix(prompts)), *(len(p) - 1 for p in prompts))
        if len(prompts) > 1
        else 0
    )
    head = head if head >= 16 else 0  # a shorter one costs more in bookkeeping than it saves
    cache = KVCache(
        model,
        min(batch_size, len(prompts)),
        max(map(len, prompts)) + max_new_tokens,
        prompts[0][:head],
    )
    rows = [None] * len(cache.keys[0])  # the prompt that each row of the cache holds
    tokens, positions = torch.zeros(2, len(rows), dtype=torch.long)
    while waiting or any(row is not None for row in rows):
        ats = [at for at, row in enumerate(rows) if row is None]
        if ats and waiting:
            room = np.cumsum([len(prompts[row]) - head for row in waiting[: len(ats)]])
            ats = ats[: max(1, int((room <= 4096).sum()))][: len(waiting)]  # tokens a pass
            for at in ats:
                rows[at] = waiting.pop(0)
            batch = cache.read([prompts[rows[at]][head:] for at in ats], ats, device)
            last = torch.tensor(
                [stop - 1 - head for _, stop, _ in batch.segments[bool(head) :]], device=device
            )
            positions[ats] = batch.positions[last].cpu()
        else:
            live = [at for at, row in enumerate(rows) if row is not None]
            cache.keep(live)
            rows, tokens, positions = [rows[at] for at in live], tokens[live], positions[live] + 1
            ats, last = list(range(len(rows))), slice(None)
            batch = replace(cache.batch, tokens=tokens.to(device), positions=positions.to(device))
        logits = model.logits(model(batch, cache)[last])
        uniform = torch.tensor(
            [draws[rows[at]].random(dtype=np.float32) for at in ats], device=device
        )
        tokens[ats] = sample(logits, uniform, temperature, top_k, top_p).cpu()
        for at in ats:
            ids, token = outputs[rows[at]], int(tokens[at])
            if token not in ends:
                ids.append(token)
            if token in ends or len(ids) == max_new_tokens or stop and stop(ids):
                yield rows[at], ids
                rows[at] = None


# --- checkpoints: read strictly, streamed; written aside and renamed --------------------------------------------------


def pick_device(name):
    """torch.device of 'auto' (CUDA, then MPS, then the CPU) or of a device's name."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    with as_user_error(f"device: {name} can't be used here", RuntimeError, AssertionError):
        torch.zeros(1, device=name).item()
    return torch.device(name)


def checkpoint_tensors(folder):
    """{tensor name: (file, shape, dtype name)} from the headers of a checkpoint, one file or sharded."""
    folder = Path(folder)
    index, single, found = folder / "model.safetensors.index.json", folder / "model.safetensors", {}
    if single.exists():
        return read_header(single)
    if not index.exists():
        pickled = (
            " (pickle files are never read: convert them to safetensors)"
            if list(folder.glob("*.bin"))
            else ""
        )
        raise UserError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json{pickled}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: names {file!r}; a shard is a .safetensors file of the same folder"
            )
        if not (folder / file).exists():
            raise UserError(f"{index}: names {file}, which is not there")
        found |= {
            name: at
            for name, at in read_header(folder / file).items()
            if weight_map.get(name) == file
        }
    if lost := sorted(set(weight_map) - set(found)):
        raise UserError(
            f"{index}: {len(lost)} tensors are not in the files it names, {lost[0]} first"
        )
    return found


def check_names(wanted, found, where):
    """Raises one UserError for all missing, unexpected and misshapen tensors; wanted and found are {name: shape}."""
    missing, odd = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    faults = [
        f"missing {name}" + (nearest(name, odd[:1000]) if at < 8 else "")
        for at, name in enumerate(missing)
    ]
    faults += [f"unexpected {name}" for name in odd]
    faults += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(
            f"{where}: {len(faults)} tensor(s) do not fit: " + "; ".join(faults[:8]) + more
        )


def open_model(name, revision=None, swap_layers=None):
    """(a Transformer on `meta`, where its tensors are: {name: (file, shape, dtype name)}) of folder or hub id `name`.
    Every name, shape and kind is checked against the model, all faults in one UserError; no weight is read.
    swap_layers(model, found) may put other layers in place first, those of 4-bit weights say."""
    folder = resolve(name, revision)
    config = ModelConfig.read(folder)
    if config.quantized and swap_layers is None:
        raise UserError(
            f"{folder}: holds 4-bit weights, which have no place here; name the 16-bit model"
        )
    found = checkpoint_tensors(folder)
    if config.num_hidden_layers > len(found):
        raise UserError(
            f"{folder}: num_hidden_layers is {config.num_hidden_layers}, of {len(found)} tensors in all"
        )
    with torch.device("meta"):
        model = Transformer(config)
    found = {
        n: at for n, at in found.items() if not n.endswith("rotary_emb.inv_freq")
    }  # old Llama files carry it
    ends = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and found.keys() >= {
        *ends
    }:  # some tied checkpoints store the one tensor twice
        if not torch.equal(*(read_tensor(found[end][0], end) for end in ends)):
            raise UserError(
                f"{found[ends[0]][0]}: {ends[0]} differs from {ends[1]}, yet config.json ties them; "
                "set tie_word_embeddings to false there"
            )
        del found["lm_head.weight"]
    if swap_layers:
        swap_layers(model, found)
    wanted = model.state_dict()
    check_names(
        {n: tuple(t.shape) for n, t in wanted.items()},
        {n: at[1] for n, at in found.items()},
        folder,
    )
    if odd := [
        f"{n} ({kind})"
        for n, (_, _, kind) in found.items()
        if kind not in (FLOATS if wanted[n].is_floating_point() else ("U8",))
    ]:
        raise UserError(
            f"{folder}: {len(odd)} tensors are of another kind than the model's, {odd[0]} first; "
            "use a 16-bit checkpoint"
        )
    model.folder = folder
    return model, found


def set_tensor(model, name, tensor, device, dtype):
    """Puts a tensor where its name says: frozen, on the device, in dtype; a layer with a `place` of its own decides."""
    path, leaf = re.fullmatch(r"(.+?)\.(weight.*|bias|lora_\w+)", name).groups()
    module = model.get_submodule(path)
    if hasattr(module, "set_tensor"):
        module.set_tensor(leaf, tensor, device, dtype)
    else:
        setattr(
            module,
            leaf,
            nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True), requires_grad=False),
        )


def load_model(
    name, dtype="auto", device="cpu", attn_implementation="auto", revision=None, swap_layers=None
):
    """A Transformer with the weights of folder or hub id `name`, frozen, in dtype ('auto': the checkpoint's own). Made
    by `open_model`, which see, and filled a tensor at a time: peak memory is the model and one tensor."""
    if dtype not in ("auto", *DTYPES):
        raise UserError(
            f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}" + nearest(dtype, DTYPES)
        )
    model, found = open_model(name, revision, swap_layers)
    model.dtype = DTYPES[model.config.dtype if dtype == "auto" else dtype]
    model.attention, notice = choose_attention(
        attn_implementation, model.config, model.dtype, device
    )
    if notice:
        print(notice, file=sys.stderr)
    for name, (file, _, _) in found.items():
        set_tensor(model, name, read_tensor(file, name), device, model.dtype)
    return model


# on a CPU oneDNN keeps the last 1,024 products it compiled, 0.6 GB of them where each batch has another length, and
# scatters them among the tensors; a batch of one length needs about 100. It reads this before its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


set_malloc_threshold(
    2**22
)  # left alone it goes up to 32 MB: a model read tensor by tensor then lay among up to 2 GB of holes


def save_model(tensors, folder, source, max_shard_bytes=2 * 10**9, **changes):
    """Writes a checkpoint in the Hugging Face layout; it opens in transformers.

    tensors: (name, tensor) pairs, taken one at a time: a shard of them is held, and its bytes once more. Weights and
    biases are stored in the dtype that the config of `source` names; its tokenizer and chat template are copied as they
    are, its config with `changes` (None takes a key out).
    """
    dtype = DTYPES[ModelConfig.read(source).dtype]
    with atomic_folder(folder) as aside:
        shard, total, shards = {}, 0, []

        def flush():
            shards.append(list(shard))
            write_tensors(shard, aside / f"shard-{len(shards)}")
            shard.clear()

        for name, tensor in tensors:
            whole = tensor.is_floating_point() and name.endswith(
                (".weight", ".bias")
            )  # else a part of 4-bit weights
            tensor = tensor.detach().to(device="cpu", dtype=dtype if whole else tensor.dtype)
            if not finite(tensor):
                raise UserError(
                    f"{folder}: is not written, {name} would hold NaN or infinity (in {tensor.dtype})"
                )
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_shard_bytes:
                flush()
            shard[name], total = tensor, total + tensor.nbytes
        flush()
        files = (
            ["model.safetensors"]
            if len(shards) == 1
            else [
                f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
            ]
        )
        for n, file in enumerate(files, 1):
            (aside / f"shard-{n}").rename(aside / file)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: file for file, names in zip(files, shards) for name in names},
            }
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for file in COMPANIONS:
            if (Path(source) / file).is_file():
                shutil.copyfile(Path(source) / file, aside / file)
        if changes:
            raw = read_json(aside / "config.json") | changes
            raw = {
                key: value for key, value in raw.items() if value is not None or key not in changes
            }
            (aside / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")


# --- what every command shares: mistakes that are the user's ----------------------------------------------------------


# --- settings ---------------------------------------------------------------------------------------------------------

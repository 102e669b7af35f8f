"""Qwen3, Llama (2, 3, 3.1, 3.2) and Qwen2 in plain PyTorch, straight from Hugging Face safetensors.

The decision that is not obvious: there is no batch dimension and no padding. A batch is one stream
of T tokens cut into segments; a segment may continue another one (its prefix), whose tokens it then
sees too. Documents are segments without a prefix, a preference pair is a prompt with two
continuations, a multiple-choice question is one context with k continuations: what they share is
computed once. Module paths are the checkpoint's tensor names, so loading needs no mapping.

To add a model family or a rope type, see the tables FAMILIES and ROPE_TYPES.

Shape letters, here and in the other modules: T packed tokens, S scored positions, B sequences,
C hidden size, H heads, K key/value heads, D head dim, V vocabulary, L layers, R LoRA rank.

    model = load_model("Qwen/Qwen3-0.6B")
    generate(model, [prompt_ids], max_new_tokens=32)
"""

import json
import math
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.distributed import assign, is_divided, read_into, whole
from support.errors import UserError, as_user_error, brief, nearest
from support.files import (
    atomic_folder,
    finite,
    read_header,
    read_json,
    read_tensor,
    write_tensors,
)
from support.hub import companions, resolve

# --- the packed batch -----------------------------------------------------------------------------

IGNORE = -100  # the label of a token that is not scored


def to_device(tensor, device):
    """A CPU tensor on `device`. From pinned memory CUDA copies it without the host waiting, which
    would leave the device idle before each micro-batch."""
    if (
        torch.device(device).type != "cuda" or type(tensor) is not Tensor
    ):  # the planner's are fake
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Segment(NamedTuple):
    """A run of tokens. An example is a list of segments: one for SFT, three for a DPO pair (a
    prompt and two continuations)."""

    ids: np.ndarray  # (n,) int32 token ids
    labels: np.ndarray  # (n,) int32: the id where the token is scored, else IGNORE
    prefix: int = -1  # index in the example of the earlier segment it continues; -1: none
    sequence: int = 0  # which of the example's sequences its scored tokens belong to
    weight: float = 1.0  # weight of each of its scored tokens in the loss
    reference: np.ndarray | float = 0.0  # log-probs of its scored tokens under DPO's reference


@dataclass
class Batch:
    """Examples packed into one stream. Built by `pack`."""

    tokens: Tensor  # (T,)
    positions: Tensor  # (T,) position in the sequence: a continuation counts on from its prefix
    segments: list  # [(start, stop, prefix)], prefix: index of a segment, or -1
    scored: Tensor  # (S,) for each scored token, the position whose hidden state predicts it
    targets: Tensor  # (S,) its id
    sequence: Tensor  # (S,) the sequence it belongs to, numbered over the batch
    weights: Tensor  # (S,) fp32
    reference: Tensor  # (S,) fp32
    num_sequences: int
    largest: int = 0  # token id of the batch
    biases: dict = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def pack(cls, examples, device="cpu"):
        """examples: a list of lists of Segment. A segment's first token is scored only if a prefix
        predicts it."""
        segments, rows = [], []
        stops, lengths = (
            {-1: 0},
            {-1: 0},
        )  # of segments; lengths with all that they continue
        start = num_sequences = 0
        for example in examples:
            first = len(segments)
            for segment in example:
                stop = start + len(segment.ids)
                prefix = first + segment.prefix if segment.prefix >= 0 else -1
                length = lengths[prefix] + stop - start
                predictors = np.arange(start - 1, stop - 1)
                predictors[:1] = stops[prefix] - 1
                labels = np.asarray(segment.labels)
                scored = (labels != IGNORE) & (predictors >= 0)
                stops[len(segments)], lengths[len(segments)] = stop, length
                segments.append((start, stop, prefix))
                per_token = (
                    num_sequences + segment.sequence,
                    segment.weight,
                    segment.reference,
                )
                rows.append(
                    (
                        segment.ids,
                        np.arange(lengths[prefix], length),
                        predictors[scored],
                        labels[scored],
                        *(np.full(scored.sum(), value) for value in per_token),
                    )
                )
                start = stop
            num_sequences += 1 + max(segment.sequence for segment in example)
        columns = [np.concatenate(column) for column in zip(*rows)]
        dtypes = [torch.int64] * 5 + [torch.float32] * 2
        tokens, positions, *per_score = (
            to_device(torch.from_numpy(column).to(dtype), device)
            for column, dtype in zip(columns, dtypes)
        )
        return cls(tokens, positions, segments, *per_score, num_sequences, int(columns[0].max()))

    @cached_property
    def spans(self):
        """Per segment the ranges (start, stop) that it sees, oldest first, adjacent ones merged."""
        spans = []
        for start, stop, prefix in self.segments:
            *before, last = spans[prefix] if prefix >= 0 else [(start, start)]
            merged = [(last[0], stop)] if last[1] == start else [last, (start, stop)]
            spans.append(before + merged)
        return spans

    @cached_property
    def lengths(self):
        """Per segment the length of the longest sequence that shares its beginning, as if these
        were a batch of transformers'."""
        longest = {}  # {where a tree begins: its length}
        for ((root, _), *_), (start, stop, _) in zip(self.spans, self.segments):
            length = max(self.positions[start:stop].tolist(), default=-1) + 1
            longest[root] = max(length, longest.get(root, 0))
        return [longest[root] for (root, _), *_ in self.spans]

    def indices(self, spans):
        """The positions (n,) in these ranges."""
        positions = np.concatenate([np.arange(*span) for span in spans])
        return to_device(torch.from_numpy(positions), self.tokens.device)

    @cached_property
    def keys(self):
        """Per segment the positions it sees: a slice if they are adjacent, else an index (n,)."""
        return [
            slice(*spans[0]) if len(spans) == 1 else self.indices(spans) for spans in self.spans
        ]

    @cached_property
    def mask(self):
        """(T, T) bool: whether a query (row) sees a key (column)."""
        sees = torch.zeros(2 * [len(self.tokens)], dtype=torch.bool, device=self.tokens.device)
        for (start, stop, _), keys in zip(self.segments, self.keys):
            sees[start:stop, keys] = True
        return sees & (self.positions <= self.positions[:, None])

    def bias(self, own, seen, dtype):
        """(own, seen): -inf where one of the last `own` of `seen` tokens would see a later one."""
        key = own, seen, dtype
        if key not in self.biases:
            future = torch.full((own, seen), -torch.inf, dtype=dtype, device=self.tokens.device)
            self.biases[key] = future.triu(seen - own + 1)
        return self.biases[key]

    @cached_property
    def varlen(self):
        """Arguments of varlen_attn: key positions (None: the stream itself), cu_q, cu_k, max_q,
        max_k."""
        queries = [stop - start for start, stop, _ in self.segments]
        keys = [sum(stop - start for start, stop in spans) for spans in self.spans]
        gather = None
        if keys != queries:
            gather = self.indices([span for spans in self.spans for span in spans])
        cu_q, cu_k = (
            to_device(
                torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), self.tokens.device
            )
            for lengths in (queries, keys)
        )
        return gather, cu_q, cu_k, max(queries), max(keys)


# --- attention: three implementations, the same numbers -------------------------------------------


def eager_attention(q, k, v, batch):
    """The maths, for readers and tests. q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    group = q.shape[1] // k.shape[1]  # query head h reads key/value head h // group
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.transpose(1, 2)).float() / math.sqrt(q.shape[-1])  # (H, T, T)
    weights = scores.masked_fill(~batch.mask, -torch.inf).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(0, 1)


def sdpa_attention(q, k, v, batch):
    """One segment at a time over what it sees, never with a (T, T) mask."""
    outputs = []
    for (start, stop, _), seen in zip(batch.segments, batch.keys):
        queries, keys, values = q[start:stop], k[seen], v[seen]
        past = len(keys) - len(queries)
        if q.is_cpu and (len(keys) <= 512 or not torch.is_grad_enabled()):
            for block in queries.split(512):  # a block is not multiplied with what comes after it
                past += len(block)
                bias = batch.bias(len(block), past, q.dtype)
                outputs.append(product_attention(block, keys[:past], values[:past], bias))
            continue
        mask = batch.bias(len(queries), len(keys), q.dtype) if past else None
        heads = (
            x.transpose(0, 1)[None] for x in (queries, keys, values)
        )  # (1, heads, tokens, D)
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def product_attention(q, k, v, bias):
    """One segment as plain matrix products, a group's query heads stacked on their key head. On a
    CPU with 16-bit products up to 2.8 times as fast, forward and backward, as the flash kernel,
    which is made for long sequences."""
    (own, H, D), K = q.shape, k.shape[1]
    q = q.view(own, K, H // K, D).permute(1, 2, 0, 3).reshape(K, -1, D)  # (K, H/K · own, D)
    scores = torch.baddbmm(bias.repeat(H // K, 1), q, k.permute(1, 2, 0), alpha=D**-0.5)
    out = (scores.softmax(-1) @ v.transpose(0, 1)).view(K, H // K, own, D)
    return out.permute(2, 0, 1, 3).reshape(own, H, D)


def varlen_attention(q, k, v, batch):
    """PyTorch's variable-length flash attention (CUDA, 16 bit). It is causal from the bottom right,
    so a prefix is just more keys."""
    from torch.nn.attention.varlen import varlen_attn

    gather, *lengths = batch.varlen
    if gather is not None:
        k, v = k[gather], v[gather]
    gqa = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *lengths, window_size=(-1, 0), enable_gqa=gqa)


ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention, "varlen": varlen_attention}


def choose_attention(wanted, config, dtype, device):
    """(name, notice): 'auto' is varlen where it works (tried on two tokens), else sdpa; notice is
    '' or a line for the user."""
    check_choice("attn_implementation", wanted, ("auto", "flash", *ATTENTION))
    if wanted == "auto" and torch.device(device).type != "cuda":
        return "sdpa", ""
    if wanted in ("eager", "sdpa"):
        return wanted, ""
    try:
        batch = Batch.pack([[unscored([0, 0])]], device)
        q, k = (
            torch.zeros(2, heads, config.head_dim, dtype=dtype, device=device)
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        varlen_attention(q, k, k, batch)
        return "varlen", ""
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        return "sdpa", f"attention: varlen does not work here ({reason[:80]}); using sdpa"


def check_choice(key, value, choices):
    if value not in choices:
        raise UserError(
            f"{key}: {value!r} is not one of {', '.join(choices)}{nearest(value, choices)}"
        )


# --- the network ----------------------------------------------------------------------------------


class Linear(nn.Linear):
    """Multiplies in x's dtype: a weight that trains is stored in fp32 and cast here. The other
    members are what lora.py needs of a layer that can be adapted, see AdaptableLinear there."""

    quantized = False

    def dense_weight(self):
        return whole(self.weight)

    def original_weight(self):
        return whole(self.weight)

    def replace_weight(self, weight):
        assign(self.weight, weight)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Normalise(torch.autograd.Function):
    """x / rms(x) * weight in fp32. Saves x and 1 / rms, where autograd saves two fp32 copies."""

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
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        d_x = scale * (grad - unit * (grad * unit).mean(-1, keepdim=True))
        return d_x.to(x.dtype), d_weight, None


class RMSNorm(nn.Module):
    """Root mean square normalisation, statistics in fp32 (Zhang & Sennrich 2019,
    arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if x.is_cuda:  # one kernel each way
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return Normalise.apply(x, self.weight, self.eps)


class Rotate(torch.autograd.Function):
    """Rotary positions on x (T, heads, D), halves paired; cos and sin (T, 1, D/2) fp32, the product
    rounded once to x.dtype. A rotation's gradient is the rotation back, so x need not be saved."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        a, b = grad.chunk(2, dim=-1)
        return (
            torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(grad.dtype),
            None,
            None,
        )


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202); backward recomputes silu(gate)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        q_size, kv_size = (
            c.num_attention_heads * c.head_dim,
            c.num_key_value_heads * c.head_dim,
        )
        self.q_proj = Linear(c.hidden_size, q_size, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.o_proj = Linear(q_size, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x, rope, attend):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in projections)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(Rotate.apply(q, *rope), Rotate.apply(k, *rope), v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """The causal language model of a ModelConfig. Its state_dict is the checkpoint: with tied
    embeddings there is no lm_head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dtype = torch.float32  # of hidden states and matrix products
        self.attention = "sdpa"
        self.gradient_checkpointing = False
        self.folder = None  # where config and tokenizer came from

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def head_weight(self):
        """(V, C): the matrix that turns hidden states into logits, whoever owns it."""
        return (self.lm_head if self.lm_head is not None else self.model.embed_tokens).weight

    def forward(self, batch, attend=None):
        """Final, normalised hidden states (T, C). attend(layer, q, k, v) replaces the attention
        within the batch (see KVCache)."""
        if batch.largest >= self.config.vocab_size:
            raise UserError(
                f"token {batch.largest} is outside the model's vocabulary of "
                f"{self.config.vocab_size}: the tokenizer belongs to another model"
            )
        inv_freq, scale = rope_frequencies(self.config)
        if self.config.rope["rope_type"] in ROPE_BY_LENGTH:
            rows = []  # (tokens of a segment, 1, D/2)
            for (start, stop, _), length in zip(batch.segments, batch.lengths):
                frequencies, _ = rope_frequencies(self.config, length)
                rows.append(frequencies.expand(stop - start, 1, -1))
            inv_freq = torch.cat(rows)
        inv_freq = to_device(inv_freq, batch.positions.device)
        angles = batch.positions[:, None, None].float() * inv_freq  # (T, 1, D/2)
        rope = angles.cos() * scale, angles.sin() * scale
        within_batch = partial(ATTENTION[self.attention], batch=batch)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        x = self.model.embed_tokens(batch.tokens).to(self.dtype)
        for index, layer in enumerate(self.model.layers):
            attention = partial(attend, index) if attend else within_batch
            if recompute:
                x = checkpoint(layer, x, rope, attention, use_reentrant=False)
            else:
                x = layer(x, rope, attention)
        return self.model.norm(x)

    def logits(self, hidden):
        """fp32 logits (..., V) of hidden states (..., C). Training never calls it: see
        token_logps."""
        weight = self.head_weight().to(hidden.dtype)
        if hidden.is_cpu and hidden.dtype == torch.float32 and len(hidden) < 16:
            return (weight @ hidden.mT).mT  # for so few rows up to three times as fast
        return F.linear(hidden, weight).float()

    def logps(self, batch):
        """Log-probabilities (S,) fp32 of the scored tokens. The head sees their positions alone."""
        return token_logps(self(batch)[batch.scored], self.head_weight(), batch.targets)


# --- the one primitive that scores tokens ---------------------------------------------------------

CHUNK = (
    256  # scored positions whose logits exist at a time: (256, V) in the dtype of the products
)


def log_softmax_(logits, targets, keep_grad):
    """Log-probabilities (n,) fp32 of targets under logits (n, V). keep_grad: logits become
    d logp / d logits, in place. On a CPU a few rows at a time, so that their fp32 copy stays in
    cache: all at once, half the head's time would go there."""
    rows = max(1, 2**21 // logits.shape[1]) if logits.is_cpu else len(logits)
    results = []
    for block, target in zip(logits.split(rows), targets.split(rows)):
        logps = F.log_softmax(block, -1, dtype=torch.float32)
        results.append(logps.gather(1, target[:, None])[:, 0])
        if keep_grad:
            torch.exp(logps, out=block).neg_()
    results = torch.cat(results)
    if keep_grad:  # 1 - p from log p: a 16-bit p near 1 has no digits left for it
        row = torch.arange(len(targets), device=logits.device)
        logits[row, targets] = -torch.expm1(results).to(logits.dtype)
    return results


class FrozenHead(torch.autograd.Function):
    """token_logps of a head that does not train. d logp_s / d hidden_s = W[target] - softmax W is
    known in the forward pass, a row per position, so backward is one multiplication by the upstream
    gradient and saves (S, C) alone."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        keep_grad, weight = ctx.needs_input_grad[0], weight.to(hidden.dtype)
        rows = torch.empty_like(hidden) if keep_grad else None
        wide = {}
        if hidden.is_cuda and hidden.dtype != torch.float32:
            wide["out_dtype"] = torch.float32  # CUDA keeps the fp32 accumulator
        logps = []
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = torch.mm(hidden[chunk], weight.T, **wide)
            logps.append(log_softmax_(logits, targets[chunk], keep_grad))
            if keep_grad:
                rows[chunk] = logits.to(hidden.dtype) @ weight
        ctx.save_for_backward(rows)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return (grad[:, None] * rows).to(rows.dtype), None, None


def token_logps(hidden, weight, targets):
    """Log-probabilities (S,) fp32 of targets (S,) given hidden (S, C) and the head's weight (V, C).
    Never holds (S, V): chunks of CHUNK positions; a head that trains is recomputed chunk by chunk
    in backward. Reference: cross entropy over the whole logits,
    torch.nn.functional.cross_entropy(reduction='none'), negated."""
    if len(targets) == 0:
        return hidden.sum(-1).float()
    if not weight.requires_grad:
        return FrozenHead.apply(hidden, weight, targets)

    def score(hidden, targets):
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        return -F.cross_entropy(logits, targets, reduction="none")

    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK))
    return torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])


# --- generation -----------------------------------------------------------------------------------


def unscored(ids, prefix=-1):
    return Segment(np.asarray(ids, np.int32), np.full(len(ids), IGNORE), prefix)


class KVCache:
    """Keys and values (L, B, K, N, D) of B rows of up to N tokens. A header, with which all prompts
    begin, is computed once and copied into every row."""

    def __init__(self, model, rows, length, header):
        c = model.config
        shape = c.num_hidden_layers, rows, c.num_key_value_heads, length, c.head_dim
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.model, self.header = model, []
        if header:
            self.add_prompts([header], [0])
            for x in (self.keys, self.values):
                x[:, 1:, :, : len(header)] = x[:, :1, :, : len(header)]
            self.header = header

    def add_prompts(self, prompts, rows):
        """Stores prompts (id lists without the header) in `rows`. Returns their last tokens' hidden
        states (len(rows), C)."""
        device, head = self.model.device, len(self.header)
        header = [unscored(self.header)] if head else []
        prompts = [unscored(ids, len(header) - 1) for ids in prompts]
        batch = Batch.pack([header + prompts], device)
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
        rows = torch.tensor(rows, device=device).repeat_interleave(lengths)
        tokens, positions = batch.tokens[head:], batch.positions[head:]
        within_batch = ATTENTION[self.model.attention]

        def attend(layer, q, k, v):
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions], values[rows, :, positions] = k, v
            # the batch begins with the header: its keys are cached, its queries are left blank
            q = F.pad(q, (0, 0, 0, 0, head, 0))
            k = torch.cat([keys[0, :, :head].transpose(0, 1), k])
            v = torch.cat([values[0, :, :head].transpose(0, 1), v])
            return within_batch(q, k, v, batch)[head:]

        self.batch = replace(batch, tokens=tokens, positions=positions)
        return self.model(self.batch, attend)[lengths.cumsum(0) - 1]

    def add_tokens(self, tokens, positions):
        """Stores one more token in each row and returns their hidden states (B, C)."""
        tokens, positions = torch.tensor([tokens, positions], device=self.model.device)
        rows = torch.arange(len(tokens), device=tokens.device)
        mask = torch.arange(self.keys.shape[3], device=tokens.device) <= positions[:, None]
        mask = mask[:, None, None]  # (B, 1, 1, N)

        def attend(layer, q, k, v):
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions], values[rows, :, positions] = k, v
            q = q.unflatten(1, (keys.shape[1], -1))  # (B, K, H/K, D)
            if not q.is_cpu:
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            else:  # plain products: a tenth of the kernel's time
                scores = q @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
                out = scores.masked_fill_(~mask, -torch.inf).softmax(-1) @ values
            return out.flatten(1, 2)

        segments = [(row, row + 1, -1) for row in range(len(tokens))]
        batch = replace(self.batch, tokens=tokens, positions=positions, segments=segments)
        return self.model(batch, attend)

    def keep(self, rows):
        """Drops all other rows."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def sample(logits, uniform, temperature, top_k, top_p):
    """One token per row of logits (B, V) by inverse transform of uniform (B,) in [0, 1).
    temperature 0 is greedy. Order as in transformers: temperature, the top_k likeliest, the
    smallest set of them whose mass reaches top_p (Holtzman et al. 2020, arXiv:1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    if top_k:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0
    mass = probs.cumsum(-1)
    below = (mass <= uniform[:, None] * mass[:, -1:]).sum(-1)
    choice = below.minimum((probs > 0).sum(-1) - 1)  # rounding must not leave the set
    return order.gather(1, choice[:, None])[:, 0]


def generate(model, prompts, max_new_tokens=128, *args, **options):
    """Continues prompts, B id lists of any lengths -> B lists of new ids. Options: see
    `generate_each`."""
    outputs = dict(generate_each(model, prompts, max_new_tokens, *args, **options))
    return [outputs[row] for row in range(len(prompts))]


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
    """Yields (row, its new ids) as rows end. Up to batch_size of them are generated at a time; one
    that ends makes room for the next, and the header that all prompts share is computed once.

    eos_ids: end tokens (default: the config's), left out of the result; stop(ids) -> bool ends a
    row otherwise. Row i draws from (seed, i), whatever else is in the batch."""
    if not all(map(len, prompts)):
        raise UserError("generate: an empty prompt has nothing to continue")
    outputs, waiting = [[] for _ in prompts], list(range(len(prompts)))
    if not prompts or max_new_tokens < 1:
        return (yield from enumerate(outputs))
    ends = set(model.config.eos_token_id if eos_ids is None else eos_ids)
    draws = [np.random.default_rng((seed, row)) for row in waiting]
    lengths = [len(prompt) for prompt in prompts]
    shared = min(len(os.path.commonprefix(prompts)), min(lengths) - 1)
    by_length = model.config.rope["rope_type"] in ROPE_BY_LENGTH
    if shared < 16 or len(prompts) == 1 or by_length:  # costs more than it saves, or differs
        shared = 0
    slots = [None] * min(batch_size, len(prompts))  # the row in each row of the cache
    cache = KVCache(model, len(slots), max(lengths) + max_new_tokens, prompts[0][:shared])
    while waiting or slots.count(None) < len(slots):
        free = [slot for slot, row in enumerate(slots) if row is None]
        if free and waiting:
            sizes = np.cumsum([lengths[row] - shared for row in waiting[: len(free)]])
            count = max(1, int((sizes <= 4096).sum()))  # tokens a pass
            rows, waiting, active = waiting[:count], waiting[count:], free[:count]
            for slot, row in zip(active, rows):
                slots[slot] = row
            hidden = cache.add_prompts([prompts[row][shared:] for row in rows], active)
        else:
            if free:
                cache.keep([slot for slot, row in enumerate(slots) if row is not None])
                slots = [row for row in slots if row is not None]
            rows, active = list(slots), range(len(slots))
            hidden = cache.add_tokens(
                [outputs[row][-1] for row in rows],
                [lengths[row] + len(outputs[row]) - 1 for row in rows],
            )
        uniform = [draws[row].random(dtype=np.float32) for row in rows]
        uniform = torch.tensor(uniform, device=model.device)
        tokens = sample(model.logits(hidden), uniform, temperature, top_k, top_p).tolist()
        for slot, row, token in zip(active, rows, tokens):
            ids = outputs[row]
            if token not in ends:
                ids.append(token)
            if token in ends or len(ids) == max_new_tokens or stop and stop(ids):
                yield row, ids
                slots[slot] = None


# --- configuration --------------------------------------------------------------------------------

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# in a safetensors header
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

# A model family: {model_type: the settings, in ModelConfig's names, that its config.json leaves
# unsaid}. A family with another block also changes `Block`.
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "o_bias": False, "mlp_bias": False},
    "qwen3": {"head_dim": 128, "qk_norm": True, "mlp_bias": False},
}
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "mlp_bias": False,
    "qk_norm": False,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "eos_token_id": [],
}
LIMIT = 2**20  # of every size: larger ones would overflow a tensor's byte count


@dataclass
class ModelConfig:
    """A model's config.json, in either of its two dialects."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict  # rope_type, and the arguments of its function in ROPE_TYPES
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # each head's queries and keys are normalised before they are rotated
    dtype: str  # of the checkpoint's tensors
    eos_token_id: tuple
    quantized: bool  # the checkpoint holds bitsandbytes' 4-bit weights, which qlora.py reads

    @classmethod
    def read(cls, folder):
        """The config of a checkpoint's folder. Where it names no dtype, the first weight does."""
        file = Path(folder) / "config.json"
        raw = read_json(file)
        if not (raw.get("dtype") or raw.get("torch_dtype")):
            stored = [dtype for _, _, dtype in checkpoint_tensors(folder).values()]
            raw["dtype"] = next((FLOATS[name] for name in stored if name in FLOATS), "float32")
        return cls.from_dict(raw, file)

    @classmethod
    def from_dict(cls, raw, where="config.json"):
        """Raises one UserError for everything in it that this code does not compute."""
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(
                f"{where}: model_type {brief(kind)} is not supported; {', '.join(FAMILIES)} are"
            )
        window = {"sliding_window": raw.get("sliding_window", 4096)}  # null means none
        raw = {key: value for key, value in raw.items() if value is not None} | window
        bias = raw.get("attention_bias", False)
        values = DEFAULTS | {
            "attention_bias": bias,
            "qkv_bias": bias,
            "o_bias": bias,
            "num_key_value_heads": raw.get("num_attention_heads"),
            "dtype": raw.get("torch_dtype", "float32"),
        }
        with suppress(KeyError, TypeError, ZeroDivisionError):  # reported below
            values["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        values |= FAMILIES[kind] | raw
        rope, faults = rope_settings(values)
        faults += unsupported(values)
        if faults:
            raise UserError(f"{where}: " + "; ".join(faults))
        values |= {
            "rope": rope,
            "rms_norm_eps": float(values["rms_norm_eps"]),
            "dtype": values["dtype"].removeprefix("torch."),
            "eos_token_id": tuple(as_list(values["eos_token_id"])),
            "quantized": bool(values.get("quantization_config")),
        }
        config = cls(**{key: values[key] for key in cls.__annotations__})
        fault = f"{where}: rope can't be computed from these numbers"
        kinds = ArithmeticError, ValueError, TypeError, RuntimeError
        with torch.device("cpu"), as_user_error(fault, *kinds):
            for length in (0, 2**31):
                frequencies, scale = rope_frequencies(config, length)
                if not math.isfinite(frequencies.sum() * scale):
                    raise ValueError(rope)
        return config


def unsupported(values):
    """A line for each setting that is malformed, or that this code does not compute."""
    faults = []

    def expect(key, valid, expected):
        if not valid:
            faults.append(f"{key} is {str(values.get(key))[:40]!r}, not {expected}")

    types = ModelConfig.__annotations__ | {"attention_bias": bool}
    del types["quantized"]
    for key, kind in types.items():
        value = values.get(key)
        if kind is int:
            most = 2**31 if key == "max_position_embeddings" else LIMIT
            valid = type(value) is int and 1 <= value <= most
            expect(key, valid, f"a whole number from 1 to {most}")
        if kind is bool:
            expect(key, isinstance(value, bool), "true or false")
    expect("rms_norm_eps", positive(values["rms_norm_eps"]), "a positive number")
    swish = values["hidden_act"] in ("silu", "swish")
    expect("hidden_act", swish, "silu (swish), the only one supported")
    tokens = as_list(values["eos_token_id"])
    expect(
        "eos_token_id",
        all(type(token) is int for token in tokens),
        "a token id or a list of them",
    )
    if str(values["dtype"]).removeprefix("torch.") not in DTYPES:
        faults.append(f"dtype {brief(values['dtype'])} is not one of {', '.join(DTYPES)}")
    quantization = values.get("quantization_config") or {"load_in_4bit": True}
    if not isinstance(quantization, dict) or not quantization.get("load_in_4bit"):
        faults.append("quantization_config: only bitsandbytes' 4-bit weights can be read")
    if not faults:
        if slides(values):
            faults.append(
                "sliding-window attention (use_sliding_window, max_window_layers, layer_types) is "
                "not supported"
            )
        heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        if heads % kv_heads:
            faults.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        if values["head_dim"] % 2:
            faults.append(
                f"head_dim {values['head_dim']} is odd; rotary positions need an even one"
            )
    return faults


def slides(values):
    """Whether a layer's attention slides, as Qwen2Config and Qwen3Config of transformers decide."""
    if "layer_types" in values:
        return any(layer != "full_attention" for layer in as_list(values["layer_types"]))
    if not values.get("use_sliding_window") or values["sliding_window"] is None:
        return False
    first = values["max_window_layers"]
    return type(first) is not int or first < values["num_hidden_layers"]


def as_list(value):
    return value if isinstance(value, list) else [value]


def positive(value):
    return type(value) in (int, float) and 0 < value < 1e30


# --- rotary frequencies ---------------------------------------------------------------------------
# A rope type: a function (plain frequencies (D/2,), length of the sequence, rope_theta, the type's
# own numbers in the names of config.json) -> (frequencies (D/2,), factor on cos and sin).


def wavelengths(base, count):
    """(count,) fp32, in tokens per radian."""
    return base ** (torch.arange(0, 2 * count, 2, dtype=torch.float32) / (2 * count))


def default_rope(plain, length, rope_theta):
    """Su et al. 2021, arXiv:2104.09864."""
    return plain, 1.0


def linear_rope(plain, length, rope_theta, factor):
    """Chen et al. 2023, arXiv:2306.15595."""
    return plain / factor, 1.0


def llama3_rope(
    plain,
    length,
    rope_theta,
    factor,
    low_freq_factor,
    high_freq_factor,
    original_max_position_embeddings,
):
    """Llama 3.1's reference code: long wavelengths are stretched by factor, short ones kept, those
    between blended."""
    if low_freq_factor >= high_freq_factor:
        raise ValueError("low_freq_factor is not below high_freq_factor")
    turns = original_max_position_embeddings / (2 * math.pi / plain)
    blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - blend) * plain / factor + blend * plain
    stretched = torch.where(turns < low_freq_factor, plain / factor, blended)
    return torch.where(turns > high_freq_factor, plain, stretched), 1.0


def yarn_rope(
    plain,
    length,
    rope_theta,
    factor,
    original_max_position_embeddings,
    beta_fast=32,
    beta_slow=1,
    mscale=None,
    mscale_all_dim=None,
    attention_factor=None,
    truncate=True,
):
    """Peng et al. 2023, arXiv:2309.00071, eqs. 17-22."""

    def dimension(turns):  # the one that turns so often over the original context
        wave = original_max_position_embeddings / (turns * 2 * math.pi)
        return 2 * len(plain) * math.log(wave) / (2 * math.log(rope_theta))

    def magnitude(scale):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(plain) - 1)
    # beta_fast < beta_slow makes it a ramp down, as in transformers
    ramp = (torch.arange(len(plain), dtype=torch.float32) - low) / (high - low or 0.001)
    ramp = ramp.clamp(0, 1)
    if attention_factor is None:
        attention_factor = magnitude(1.0)
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
    return plain / factor * ramp + plain * (1 - ramp), attention_factor


def dynamic_rope(plain, length, rope_theta, factor, max_position_embeddings):
    """transformers' dynamic NTK scaling: the base grows with a sequence beyond the maximum."""
    dim = 2 * len(plain)
    length = torch.tensor(max(length, max_position_embeddings))
    growth = factor * length / max_position_embeddings - (factor - 1)
    return 1.0 / wavelengths(rope_theta * growth ** (dim / (dim - 2)), len(plain)), 1.0


def longrope(
    plain,
    length,
    rope_theta,
    factor,
    short_factor,
    long_factor,
    original_max_position_embeddings,
    attention_factor=None,
):
    """Ding et al. 2024, arXiv:2402.13753: a factor for each frequency, another list of them for a
    sequence beyond the original context."""
    original = original_max_position_embeddings
    stretch = torch.tensor(long_factor if length > original else short_factor)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    return 1.0 / (stretch * wavelengths(rope_theta, len(plain))), attention_factor


ROPE_TYPES = {
    "default": default_rope,
    "linear": linear_rope,
    "dynamic": dynamic_rope,
    "llama3": llama3_rope,
    "yarn": yarn_rope,
    "longrope": longrope,
}
ROPE_BY_LENGTH = "dynamic", "longrope"


def rope_settings(values):
    """(rope_type and the arguments of its function, faults) of config.json in both dialects:
    `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    raw = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(raw, dict):
        return {}, ["rope_parameters / rope_scaling is not an object"]
    raw = {"rope_theta": values.get("rope_theta", 10000.0)} | {
        key: value for key, value in raw.items() if value is not None
    }
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        types = ", ".join(ROPE_TYPES)
        return {}, [f"rope type {brief(kind)} is not supported ({types} are)"]
    original = "original_max_position_embeddings"
    longest = raw["max_position_embeddings"] = values["max_position_embeddings"]
    raw[original] = values.get(original, raw.get(original, longest))
    with suppress(TypeError, ZeroDivisionError):  # reported below
        if kind in ("yarn", "longrope"):
            raw.setdefault("factor", longest / raw[original])
    rope, faults = {"rope_type": kind}, []
    share = raw.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if share != 1.0 and kind != "default":  # where transformers does not look at it
        faults.append(f"partial_rotary_factor is not supported with rope type {kind}")
    for key, parameter in list(signature(ROPE_TYPES[kind]).parameters.items())[2:]:
        if key not in raw and parameter.default is not parameter.empty:
            continue
        value = rope[key] = raw.get(key)
        valid = all(map(positive, as_list(value)))
        if not valid and not isinstance(parameter.default, bool):
            faults.append(f"rope {key} is {str(value)[:40]!r}, not a positive number")
    return rope, faults


def rope_frequencies(config, length=0):
    """(inv_freq (D/2,) fp32, the factor on cos and sin) for a sequence of this length."""
    rope = dict(config.rope)
    function = ROPE_TYPES[rope.pop("rope_type")]
    plain = 1.0 / wavelengths(rope["rope_theta"], config.head_dim // 2)
    return function(plain, length, **rope)


# --- checkpoints: read strictly, a tensor at a time -----------------------------------------------


def pick_device(name):
    """torch.device of a device's name; 'auto' is the accelerator that PyTorch was built for (CUDA,
    MPS, XPU, ...), the CPU if none is there. UserError if it can't be used."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with as_user_error(f"device: {name} can't be used here", RuntimeError, AssertionError):
        torch.zeros(1, device=name).item()
    return torch.device(name)


SHORT = {"bfloat16": "bf16", "float16": "fp16"}  # in the names of a CPU's capabilities


def pick_dtype(dtype, stored, device):
    """The name of the dtype to compute in. 'auto' is the checkpoint's, `stored`, if the device has
    products in it: on a CPU without (AVX2 alone) float32 is 6 to 80 times faster, on a GPU without
    bfloat16 (a T4) it is float16. A line on stderr says so."""
    if dtype != "auto":
        return dtype
    device, choice = torch.device(device), stored
    if device.type == "cpu" and stored in SHORT:
        capabilities = torch.cpu.get_capabilities().items()
        if not any(has for name, has in capabilities if SHORT[stored] in name):
            choice = "float32"
    if device.type == "cuda" and stored == "bfloat16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            choice = "float16"
    if choice != stored:
        print(f"dtype: no {stored} products on this {device.type}; {choice}", file=sys.stderr)
    return choice


def checkpoint_tensors(folder):
    """{tensor name: (file, shape, dtype name)} from the headers of a checkpoint, one file or
    sharded."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return read_header(single)
    if not index.exists():
        hint = ""
        if list(folder.glob("*.bin")):
            hint = " (pickle files are never read: convert them to safetensors)"
        raise UserError(f"{folder}: neither {single.name} nor {index.name} in it{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    tensors = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: names {file!r}; a shard is a .safetensors file of the same folder"
            )
        if not (folder / file).exists():
            raise UserError(f"{index}: names {file}, which is not there")
        for name, entry in read_header(folder / file).items():
            if weight_map.get(name) == file:
                tensors[name] = entry
    if missing := sorted(weight_map.keys() - tensors):
        raise UserError(
            f"{index}: {len(missing)} tensors are not in the files it names, first: {missing[0]}"
        )
    return tensors


def check_names(expected, actual, where):
    """Raises one UserError for all missing, unexpected and misshapen tensors; expected and actual
    are {name: shape}."""
    missing = [name for name in expected if name not in actual]
    unexpected = [name for name in actual if name not in expected]
    faults = [f"missing {name}" for name in missing]
    for n, name in enumerate(missing[:8]):
        faults[n] += nearest(name, unexpected[:1000])
    faults += [f"unexpected {name}" for name in unexpected]
    for name, shape in expected.items():
        if name in actual and tuple(actual[name]) != tuple(shape):
            faults.append(f"{name} is {list(actual[name])}, expected {list(shape)}")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        shown = "; ".join(faults[:8])
        raise UserError(f"{where}: {len(faults)} tensor(s) do not fit: {shown}{more}")


def open_model(name, revision=None, swap_layers=None):
    """(a Transformer on `meta`, {tensor name: (file, shape, dtype name)}) of folder or hub id
    `name`. Every name, shape and dtype is checked against the model, all faults in one UserError;
    no weight is read. swap_layers(model, tensors) may replace layers first, as 4-bit ones need."""
    folder = resolve(name, revision)
    config = ModelConfig.read(folder)
    if config.quantized and swap_layers is None:
        raise UserError(f"{folder}: holds 4-bit weights, not usable here; name the 16-bit model")
    tensors = checkpoint_tensors(folder)
    if config.num_hidden_layers > len(tensors):
        layers = config.num_hidden_layers
        raise UserError(
            f"{folder}: num_hidden_layers is {layers}, of {len(tensors)} tensors in all"
        )
    with torch.device("meta"):
        model = Transformer(config)
    for key in list(tensors):
        if key.endswith("rotary_emb.inv_freq"):  # in old Llama files
            del tensors[key]
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and {head, embedding} <= tensors.keys():  # stored twice
        first, second = (read_tensor(tensors[key][0], key) for key in (head, embedding))
        if not torch.equal(first, second):
            raise UserError(
                f"{tensors[head][0]}: {head} differs from {embedding}, yet config.json ties them; "
                "set tie_word_embeddings to false there"
            )
        del tensors[head]
    if swap_layers:
        swap_layers(model, tensors)
    expected = model.state_dict()
    shapes = {key: shape for key, (_, shape, _) in tensors.items()}
    check_names({key: tensor.shape for key, tensor in expected.items()}, shapes, folder)
    wrong = [
        f"{key} ({dtype})"
        for key, (_, _, dtype) in tensors.items()
        if dtype not in (FLOATS if expected[key].is_floating_point() else ["U8"])
    ]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} tensors have another dtype than the model needs, first: "
            f"{wrong[0]}; use a 16-bit checkpoint"
        )
    model.folder = folder
    return model, tensors


def set_tensor(model, name, tensor, device, dtype):
    """Makes `tensor` the frozen parameter `name`, on device, in dtype; a quantized layer stores it
    its own way."""
    path, leaf = re.fullmatch(r"(.+?)\.(weight.*|bias|lora_\w+|trainable_\w+)", name).groups()
    module = model.get_submodule(path)
    if getattr(module, "quantized", False):
        return module.set_tensor(leaf, tensor, device, dtype)
    tensor = tensor.to(device=device, dtype=dtype, copy=True)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def load_model(
    name,
    dtype="auto",
    device="cpu",
    attn_implementation="auto",
    revision=None,
    swap_layers=None,
    divide=None,
):
    """A Transformer with the weights of folder or hub id `name`, frozen, in dtype (see
    `pick_dtype`). Checked by `open_model`, then filled a tensor at a time: peak memory is the model
    and one tensor. divide(model) may divide it among ranks first, each of which reads its part."""
    check_choice("dtype", dtype, ("auto", *DTYPES))
    model, tensors = open_model(name, revision, swap_layers)
    model.dtype = DTYPES[pick_dtype(dtype, model.config.dtype, device)]
    model.attention, notice = choose_attention(
        attn_implementation, model.config, model.dtype, device
    )
    if notice:
        print(notice, file=sys.stderr)
    if divide:
        divide(model)
    empty = model.state_dict(keep_vars=True)
    for key, (file, shape, _) in tensors.items():
        if is_divided(empty[key]) and empty[key].shape == shape:
            read_into(empty[key], file, key)
        else:
            set_tensor(model, key, read_tensor(file, key), device, model.dtype)
    return model


# --- checkpoints: written a shard at a time, then renamed into place ------------------------------


def save_model(tensors, folder, source, max_shard_bytes=2 * 10**9, adapter=None, **changes):
    """Writes a checkpoint in the Hugging Face layout; it opens in transformers.

    tensors: (name, tensor) pairs, taken one at a time; memory holds one shard, twice while it is
    written. Weights and biases are stored in the dtype that the config of `source` names; its
    tokenizer and chat template are copied (the adapter's, where its folder has them), and its
    config with `changes` (None removes a key).
    """
    dtype = DTYPES[ModelConfig.read(source).dtype]

    def converted():
        for name, tensor in tensors:
            # other names and dtypes belong to 4-bit weights
            plain = tensor.is_floating_point() and name.endswith((".weight", ".bias"))
            tensor = tensor.detach().to(device="cpu", dtype=dtype if plain else tensor.dtype)
            if not finite(tensor):
                raise UserError(
                    f"{folder}: not written, {name} would hold NaN or infinity (in {tensor.dtype})"
                )
            yield name, tensor

    with atomic_folder(folder) as aside:
        names, total = [], 0  # of each shard; bytes of all
        for shard in in_shards(converted(), max_shard_bytes):
            names.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
            write_tensors(shard, aside / f"shard-{len(names)}")
        weight_map = {}
        for n, shard_names in enumerate(names, 1):
            file = f"model-{n:05d}-of-{len(names):05d}.safetensors"
            file = file if len(names) > 1 else "model.safetensors"
            (aside / f"shard-{n}").rename(aside / file)
            weight_map |= dict.fromkeys(shard_names, file)
        if len(names) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for name, file in companions(source, adapter).items():
            shutil.copyfile(file, aside / name)
        if changes:
            raw = read_json(aside / "config.json") | changes
            removed = {key for key, value in changes.items() if value is None}
            raw = {key: value for key, value in raw.items() if key not in removed}
            (aside / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")


def in_shards(tensors, max_bytes):
    """The (name, tensor) pairs as dicts of up to max_bytes. One dict, filled again and again: the
    last shard's memory is free before the next one fills."""
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard.clear()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard

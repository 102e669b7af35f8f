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
from collections import Counter
from contextlib import nullcontext, suppress
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

from support.config_json import as_list, rope_settings, setting_faults
from support.devices import pick_dtype
from support.distributed import assign, is_divided, read_into, whole
from support.errors import UserError, as_user_error, brief
from support.files import atomic_folder, finite, read_json, read_tensor
from support.hub import companions, resolve
from support.memory import offload_activations
from support.settings import check_choice
from support.weights import check_names, checkpoint_tensors, write_shards

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
    largest: int = 0  # the largest token id
    biases: dict = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def pack(cls, examples, device="cpu"):
        """examples: a list of lists of Segment. A segment's first token is scored only if a prefix
        predicts it."""
        segments, rows = [], []
        stops = {-1: 0}  # of segments
        lengths = {-1: 0}  # with all that they continue
        start = num_sequences = 0
        for example in examples:
            first = len(segments)
            for segment in example:
                stop = start + len(segment.ids)
                prefix = first + segment.prefix if segment.prefix >= 0 else -1
                length = lengths[prefix] + len(segment.ids)
                predictors = np.arange(start - 1, stop - 1)
                predictors[:1] = stops[prefix] - 1
                labels = np.asarray(segment.labels)
                scored = (labels != IGNORE) & (predictors >= 0)
                count = scored.sum()
                rows.append(
                    (
                        segment.ids,
                        np.arange(lengths[prefix], length),
                        predictors[scored],
                        labels[scored],
                        np.full(count, num_sequences + segment.sequence),
                        np.full(count, segment.weight),
                        np.full(count, segment.reference),
                    )
                )
                stops[len(segments)] = stop
                lengths[len(segments)] = length
                segments.append((start, stop, prefix))
                start = stop
            num_sequences += 1 + max(segment.sequence for segment in example)
        columns = [np.concatenate(column) for column in zip(*rows)]
        largest = int(columns[0].max())
        dtypes = [torch.int64] * 5 + [torch.float32] * 2
        tokens, positions, *per_score = (
            to_device(torch.from_numpy(column).to(dtype), device)
            for column, dtype in zip(columns, dtypes)
        )
        return cls(tokens, positions, segments, *per_score, num_sequences, largest)

    @cached_property
    def sizes(self):
        """Per segment its number of tokens."""
        return [stop - start for start, stop, _ in self.segments]

    @cached_property
    def paths(self):
        """Per segment the indices of the segments that it sees: its prefixes, oldest first, and
        itself."""
        paths = []
        for index, (_, _, prefix) in enumerate(self.segments):
            seen = paths[prefix] if prefix >= 0 else []
            paths.append([*seen, index])
        return paths

    def positions_seen(self, segment):
        """The positions (n,) of the tokens that the segment of this index sees, on the CPU."""
        spans = []
        for index in self.paths[segment]:
            start, stop, _ = self.segments[index]
            spans.append(torch.arange(start, stop))
        return torch.cat(spans)

    @cached_property
    def lengths(self):
        """Per segment the length of the longest sequence that shares its beginning, as if these
        were a batch of transformers'."""
        longest = Counter()
        roots = [path[0] for path in self.paths]
        for root, positions in zip(roots, self.positions.split(self.sizes)):
            last = max(positions.tolist(), default=-1)
            longest[root] = max(last + 1, longest[root])
        return [longest[root] for root in roots]

    @cached_property
    def mask(self):
        """(T, T) bool: whether a query (row) sees a key (column)."""
        shape = 2 * [len(self.tokens)]
        device = self.tokens.device
        sees = torch.zeros(shape, dtype=torch.bool, device=device)
        for index, (start, stop, _) in enumerate(self.segments):
            sees[start:stop, self.positions_seen(index)] = True
        return sees & (self.positions <= self.positions[:, None])

    def bias(self, own, seen, dtype):
        """(own, seen): -inf where one of the last `own` of `seen` tokens would see a later one."""
        key = own, seen, dtype
        if key not in self.biases:
            device = self.tokens.device
            future = torch.full((own, seen), -torch.inf, dtype=dtype, device=device)
            self.biases[key] = future.triu(seen - own + 1)
        return self.biases[key]

    @cached_property
    def varlen(self):
        """Arguments of varlen_attn: key positions (None: the stream itself), cu_q, cu_k, max_q,
        max_k."""
        seen = [self.positions_seen(index) for index in range(len(self.segments))]
        keys = [len(positions) for positions in seen]
        gather = None
        if keys != self.sizes:
            gather = to_device(torch.cat(seen), self.tokens.device)

        def cumulative(lengths):
            ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
            return to_device(ends, self.tokens.device)

        cu_q = cumulative(self.sizes)
        cu_k = cumulative(keys)
        return gather, cu_q, cu_k, max(self.sizes), max(keys)


# --- attention: three implementations, the same numbers -------------------------------------------


def eager_attention(q, k, v, batch):
    """The maths, for readers and tests. q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    group = q.shape[1] // k.shape[1]  # query head h reads key/value head h // group
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.transpose(1, 2)).float()  # (H, T, T)
    scores = scores / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~batch.mask, -torch.inf)
    weights = scores.softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(0, 1)


def sdpa_attention(q, k, v, batch):
    """One segment at a time over what it sees, never with a (T, T) mask."""
    outputs = []
    all_keys = k.split(batch.sizes)  # backward joins the parts in one copy, where slices add up
    all_values = v.split(batch.sizes)
    for queries, path in zip(q.split(batch.sizes), batch.paths):
        keys, values = all_keys[path[-1]], all_values[path[-1]]
        if len(path) > 1:
            keys = torch.cat([all_keys[index] for index in path])
            values = torch.cat([all_values[index] for index in path])
        past = len(keys) - len(queries)
        if q.is_cpu and (len(keys) <= 512 or not torch.is_grad_enabled()):
            for block in queries.split(512):  # a block is not multiplied with what comes after it
                past += len(block)
                bias = batch.bias(len(block), past, q.dtype)
                outputs.append(product_attention(block, keys[:past], values[:past], bias))
            continue
        mask = None
        if past:
            mask = batch.bias(len(queries), len(keys), q.dtype)
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
    own, H, D = q.shape
    K = k.shape[1]
    group = H // K
    q = q.view(own, K, group, D)
    q = q.permute(1, 2, 0, 3)
    q = q.reshape(K, -1, D)  # (K, H/K · own, D)
    k = k.permute(1, 2, 0)
    bias = bias.repeat(group, 1)
    scores = torch.baddbmm(bias, q, k, alpha=D**-0.5)
    weights = scores.softmax(-1)
    out = weights @ v.transpose(0, 1)
    out = out.view(K, group, own, D)
    out = out.permute(2, 0, 1, 3)
    return out.reshape(own, H, D)


def varlen_attention(q, k, v, batch):
    """PyTorch's variable-length flash attention (CUDA, 16 bit). It is causal from the bottom right,
    so a prefix is just more keys. Versions without `enable_gqa` group query heads unasked."""
    from torch.nn.attention.varlen import varlen_attn

    gather, *lengths = batch.varlen
    if gather is not None:
        k, v = k[gather], v[gather]
    options = {"window_size": (-1, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *lengths, **options)


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
        weight, bias = self.weight.to(x.dtype), self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, weight, bias)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # where drawing it would import torch's compiler, a second
            super().reset_parameters()


class Normalise(torch.autograd.Function):
    """x / rms(x) * weight in fp32. Saves x and 1 / rms, where autograd saves two fp32 copies."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        mean_square = wide.square().mean(-1, keepdim=True)
        scale = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * wide * scale).flatten(0, -2).sum(0)
            d_weight = d_weight.to(weight.dtype)
        grad = grad * weight
        along = (grad * wide).mean(-1, keepdim=True)
        along *= scale**3
        d_x = grad.mul_(scale).addcmul_(wide, along, value=-1)
        return d_x.to(x.dtype), d_weight, None


class RMSNorm(nn.Module):
    """Root mean square normalisation, statistics in fp32 (Zhang & Sennrich 2019,
    arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if x.is_cuda:  # one kernel each way
            weight = self.weight.to(x.dtype)
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return Normalise.apply(x, self.weight, self.eps)


def rotate(x, cos, sin):
    """x (T, heads, D), halves paired, turned in fp32 and rounded once to its own dtype."""
    a, b = x.float().chunk(2, dim=-1)
    first = (a * cos).addcmul_(b, sin, value=-1)
    second = (b * cos).addcmul_(a, sin)
    rotated = torch.cat([first, second], dim=-1)
    return rotated.to(x.dtype)


class Rotate(torch.autograd.Function):
    """Rotary positions on x (T, heads, D); cos and sin (T, 1, D/2) fp32. A rotation's gradient is
    the rotation back, so x need not be saved."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202); backward recomputes silu(gate)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, F.silu(gate).mul_(grad)


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
        heads = -1, self.head_dim
        q = self.q_proj(x).unflatten(-1, heads)
        k = self.k_proj(x).unflatten(-1, heads)
        v = self.v_proj(x).unflatten(-1, heads)
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = Rotate.apply(q, *rope)
        k = Rotate.apply(k, *rope)
        out = attend(q, k, v).flatten(-2)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        return self.down_proj(SwiGLU.apply(gate, up))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, attend, recompute_mlp=False):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        if recompute_mlp:
            return x + checkpoint(self.feed_forward, x, use_reentrant=False)
        return x + self.feed_forward(x)

    def feed_forward(self, x):
        return self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
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
        self.gradient_checkpointing = False  # these three: see SFTConfig
        self.selective_checkpointing = False
        self.activation_offloading = False
        self.folder = None  # where config and tokenizer came from

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def head_weight(self):
        """(V, C): the matrix that turns hidden states into logits, whoever owns it."""
        owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return owner.weight

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
            for size, length in zip(batch.sizes, batch.lengths):
                frequencies, _ = rope_frequencies(self.config, length)
                rows.append(frequencies.expand(size, 1, -1))
            inv_freq = torch.cat(rows)
        inv_freq = to_device(inv_freq, batch.positions.device)
        angles = batch.positions[:, None, None].float() * inv_freq  # (T, 1, D/2)
        rope = angles.cos() * scale, angles.sin() * scale
        within_batch = partial(ATTENTION[self.attention], batch=batch)
        trains = torch.is_grad_enabled()
        recompute_mlp = self.selective_checkpointing and trains
        x = self.model.embed_tokens(batch.tokens).to(self.dtype)
        offloads = self.activation_offloading and trains and x.is_cuda
        with offload_activations(self) if offloads else nullcontext():
            for index, layer in enumerate(self.model.layers):
                attention = partial(attend, index) if attend else within_batch
                if self.gradient_checkpointing and trains:
                    x = checkpoint(layer, x, rope, attention, use_reentrant=False)
                else:
                    x = layer(x, rope, attention, recompute_mlp)
            return self.model.norm(x)

    def logits(self, hidden):
        """fp32 logits (..., V) of hidden states (..., C). Training never calls it: see
        token_logps."""
        weight = self.head_weight().to(hidden.dtype)
        if hidden.is_cpu and hidden.dtype == torch.float32 and len(hidden) < 16:
            return (weight @ hidden.mT).mT  # for so few rows up to three times as fast
        if not torch.is_grad_enabled():
            return multiply_head(hidden, weight).float()
        return F.linear(hidden, weight).float()

    def logps(self, batch):
        """Log-probabilities (S,) fp32 of the scored tokens. The head sees their positions alone."""
        hidden = self(batch)[batch.scored]
        return token_logps(hidden, self.head_weight(), batch.targets)


# --- the one primitive that scores tokens ---------------------------------------------------------

CHUNK = (
    256  # scored positions whose logits exist at a time: (256, V) in the dtype of the products
)


def log_softmax_(logits, targets, keep_grad):
    """Log-probabilities (n,) fp32 of targets under logits (n, V). keep_grad: logits become
    d logp / d logits, in place. On a CPU a few rows at a time, so that their fp32 copy stays in
    cache: all at once, half the head's time would go there."""
    rows = len(logits)
    if logits.is_cpu:
        rows = max(1, 2**21 // logits.shape[1])
    results = []
    for block, target in zip(logits.split(rows), targets.split(rows)):
        logps = F.log_softmax(block, -1, dtype=torch.float32)
        picked = logps.gather(1, target[:, None])
        results.append(picked[:, 0])
        if keep_grad:
            torch.exp(logps, out=block).neg_()
    results = torch.cat(results)
    if keep_grad:  # 1 - p from log p: a 16-bit p near 1 has no digits left for it
        row = torch.arange(len(targets), device=logits.device)
        logits[row, targets] = -torch.expm1(results).to(logits.dtype)
    return results


def multiply_head(hidden, weight):
    """Logits (n, V) of hidden (n, C) and the head's weight (V, C), without a gradient; on CUDA in
    fp32, which its products add up in."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if not (hidden.is_cpu and hidden.dtype == torch.float32):
        return hidden @ weight.T
    logits = hidden.new_empty(len(hidden), len(weight))
    for start in range(0, len(weight), 1536):  # all at once is a fifth to a third slower there
        block = slice(start, start + 1536)
        torch.mm(hidden, weight[block].T, out=logits[:, block])
    return logits


class FrozenHead(torch.autograd.Function):
    """token_logps of a head that does not train. d logp_s / d hidden_s = W[target] - softmax W is
    known in the forward pass, a row per position, so backward is one multiplication by the upstream
    gradient and saves (S, C) alone."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        keep_grad = ctx.needs_input_grad[0]
        weight = weight.to(hidden.dtype)
        rows = torch.empty_like(hidden) if keep_grad else None
        logps = []
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = multiply_head(hidden[chunk], weight)
            logps.append(log_softmax_(logits, targets[chunk], keep_grad))
            if keep_grad:
                rows[chunk] = logits.to(hidden.dtype) @ weight
        ctx.save_for_backward(rows)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        d_hidden = grad[:, None] * rows
        return d_hidden.to(rows.dtype), None, None


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
        logits = F.linear(hidden, weight.to(hidden.dtype))
        logits = logits.float()
        return -F.cross_entropy(logits, targets, reduction="none")

    logps = []
    for chunk in zip(hidden.split(CHUNK), targets.split(CHUNK)):
        logps.append(checkpoint(score, *chunk, use_reentrant=False))
    return torch.cat(logps)


# --- generation -----------------------------------------------------------------------------------


def unscored(ids, prefix=-1):
    labels = np.full(len(ids), IGNORE)
    ids = np.asarray(ids, np.int32)
    return Segment(ids, labels, prefix)


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
        tokens = batch.tokens[head:]
        positions = batch.positions[head:]
        within_batch = ATTENTION[self.model.attention]

        def attend(layer, q, k, v):
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            # the batch begins with the header: its keys are cached, its queries are left blank
            q = F.pad(q, (0, 0, 0, 0, head, 0))
            cached = keys[0, :, :head].transpose(0, 1)
            k = torch.cat([cached, k])
            cached = values[0, :, :head].transpose(0, 1)
            v = torch.cat([cached, v])
            return within_batch(q, k, v, batch)[head:]

        self.batch = replace(batch, tokens=tokens, positions=positions)
        hidden = self.model(self.batch, attend)
        return hidden[lengths.cumsum(0) - 1]

    def add_tokens(self, tokens, positions):
        """Stores one more token in each row and returns their hidden states (B, C)."""
        tokens, positions = torch.tensor([tokens, positions], device=self.model.device)
        rows = torch.arange(len(tokens), device=tokens.device)
        columns = torch.arange(self.keys.shape[3], device=tokens.device)
        mask = columns <= positions[:, None]
        mask = mask[:, None, None]  # (B, 1, 1, N)

        def attend(layer, q, k, v):
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            q = q.unflatten(1, (keys.shape[1], -1))  # (B, K, H/K, D)
            if not q.is_cpu:
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            else:  # plain products: a tenth of the kernel's time
                scores = q @ keys.transpose(2, 3)
                scores = scores * q.shape[-1] ** -0.5
                scores.masked_fill_(~mask, -torch.inf)
                out = scores.softmax(-1) @ values
            return out.flatten(1, 2)

        segments = [(row, row + 1, -1) for row in range(len(tokens))]
        batch = replace(self.batch, tokens=tokens, positions=positions, segments=segments)
        return self.model(batch, attend)

    def keep(self, rows):
        """Drops all other rows."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]


def sample(logits, uniform, temperature, top_k, top_p):
    """One token per row of logits (B, V) by inverse transform of uniform (B,) in [0, 1).
    temperature 0 is greedy. Order as in transformers: temperature, the top_k likeliest, the
    smallest set of them whose mass reaches top_p (Holtzman et al. 2020, arXiv:1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    probs, order = probs.sort(-1, descending=True)
    if top_k:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0
    mass = probs.cumsum(-1)
    drawn = uniform[:, None] * mass[:, -1:]
    below = (mass <= drawn).sum(-1)
    last = (probs > 0).sum(-1) - 1
    choice = below.minimum(last)  # rounding must not leave the set
    return order.gather(1, choice[:, None])[:, 0]


def generate(model, prompts, *args, **options):
    """Continues prompts, B id lists of any lengths -> B lists of new ids. Options: see
    `generate_each`."""
    outputs = dict(generate_each(model, prompts, *args, **options))
    return [outputs[row] for row in range(len(prompts))]


def header_length(model, prompts):
    """How many tokens all prompts begin with, if to compute them once is worth it; else 0."""
    shared = len(os.path.commonprefix(prompts))
    shared = min(shared, min(map(len, prompts)) - 1)
    by_length = model.config.rope["rope_type"] in ROPE_BY_LENGTH  # differs by prompt
    if shared < 16 or len(prompts) == 1 or by_length:
        return 0
    return shared


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
    shared = header_length(model, prompts)
    slots = [None] * min(batch_size, len(prompts))  # the row in each row of the cache
    longest = max(lengths) + max_new_tokens
    cache = KVCache(model, len(slots), longest, prompts[0][:shared])
    while waiting or slots.count(None) < len(slots):
        free = [slot for slot, row in enumerate(slots) if row is None]
        if free and waiting:
            sizes = np.cumsum([lengths[row] - shared for row in waiting[: len(free)]])
            count = max(1, int((sizes <= 4096).sum()))  # tokens a pass
            rows, waiting = waiting[:count], waiting[count:]
            active = free[:count]
            for slot, row in zip(active, rows):
                slots[slot] = row
            hidden = cache.add_prompts([prompts[row][shared:] for row in rows], active)
        else:
            if free:
                kept = [slot for slot, row in enumerate(slots) if row is not None]
                cache.keep(kept)
                slots = [slots[slot] for slot in kept]
            rows, active = list(slots), range(len(slots))
            hidden = cache.add_tokens(
                [outputs[row][-1] for row in rows],
                [lengths[row] + len(outputs[row]) - 1 for row in rows],
            )
        uniform = [draws[row].random(dtype=np.float32) for row in rows]
        uniform = torch.tensor(uniform, device=model.device)
        logits = model.logits(hidden)
        tokens = sample(logits, uniform, temperature, top_k, top_p).tolist()
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
            known = [FLOATS[name] for name in stored if name in FLOATS]
            raw["dtype"] = known[0] if known else "float32"
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
        rope, faults = rope_settings(values, ROPE_TYPES)
        faults += setting_faults(values, cls.__annotations__, DTYPES)
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


# --- rotary frequencies ---------------------------------------------------------------------------
# A rope type: a function (plain frequencies (D/2,), length of the sequence, rope_theta, the type's
# own numbers in the names of config.json) -> (frequencies (D/2,), factor on cos and sin).


def wavelengths(base, count):
    """(count,) fp32, in tokens per radian."""
    size = 2 * count
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    return base**exponents


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
    low = max(low, 0)
    high = min(high, 2 * len(plain) - 1)
    # beta_fast < beta_slow makes it a ramp down, as in transformers
    ramp = torch.arange(len(plain), dtype=torch.float32) - low
    ramp = (ramp / (high - low or 0.001)).clamp(0, 1)
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
    base = rope_theta * growth ** (dim / (dim - 2))
    return 1.0 / wavelengths(base, len(plain)), 1.0


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


def rope_frequencies(config, length=0):
    """(inv_freq (D/2,) fp32, the factor on cos and sin) for a sequence of this length."""
    rope = dict(config.rope)
    function = ROPE_TYPES[rope.pop("rope_type")]
    plain = 1.0 / wavelengths(rope["rope_theta"], config.head_dim // 2)
    return function(plain, length, **rope)


# --- checkpoints: read strictly, a tensor at a time -----------------------------------------------


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
    stored = {key: shape for key, (_, shape, _) in tensors.items()}
    needed = {key: expected[key].shape for key in expected}
    check_names(needed, stored, folder)
    wrong = []
    for key, (_, _, dtype) in tensors.items():
        usable = FLOATS if expected[key].is_floating_point() else ["U8"]
        if dtype not in usable:
            wrong.append(f"{key} ({dtype})")
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
    dtype = pick_dtype(dtype, model.config.dtype, device)
    model.dtype = DTYPES[dtype]
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
            stored = dtype if plain else tensor.dtype
            tensor = tensor.detach().to(device="cpu", dtype=stored)
            if not finite(tensor):
                raise UserError(
                    f"{folder}: not written, {name} would hold NaN or infinity (in {tensor.dtype})"
                )
            yield name, tensor

    with atomic_folder(folder) as aside:
        write_shards(converted(), aside, max_shard_bytes)
        for name, file in companions(source, adapter).items():
            shutil.copyfile(file, aside / name)
        if changes:
            raw = read_json(aside / "config.json") | changes
            for key, value in changes.items():
                if value is None:
                    del raw[key]
            text = json.dumps(raw, indent=2)
            (aside / "config.json").write_text(text, encoding="utf-8")

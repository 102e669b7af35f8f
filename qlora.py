"""QLoRA: the base in 4 bit, the adapter in fp32 on top. On bitsandbytes' kernels, not its modules.

The decision that is not obvious: a layer's buffers have the names that transformers and
bitsandbytes give them in a file (`weight`, `weight.absmax`, ...). So a 4-bit model's state_dict is
a 4-bit checkpoint, and reading one, moving, `meta` and saving need no code of their own.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314 (NF4 and double quantisation: section 3).
Kernels and format: bitsandbytes.

    python sft.py --model Qwen/Qwen3-4B --load_in_4bit --data rows.jsonl
    python qlora.py quantize --model Qwen/Qwen3-4B --output_dir qwen3-4b-nf4
    python qlora.py merge --adapter runs/sft/adapter --output_dir merged  # into the 4-bit weights
"""

import json
import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lora import (
    LoRALinear,
    MergeConfig,
    layers_with_weights,
    lora_layers,
    merge_command,
    plain_linear,
)
from model import CHUNK, DTYPES, Linear, ModelConfig, load_model, save_model
from support.distributed import assign, is_divided, whole
from support.errors import UserError, as_user_error, run_command
from support.files import new_folder, read_tensor, unique_keys
from support.hub import resolve
from support.settings import check_choices, run_subcommand

BLOCK, NESTED_BLOCK = 64, 256  # values that share a scale, scales that share one
QUANT_STATE = ".quant_state.bitsandbytes__"  # a weight's name + this + nf4: its description


@dataclass
class QuantConfig:
    """The 4-bit fields of a run's settings; names are transformers' BitsAndBytesConfig's."""

    # 4 bit
    load_in_4bit: bool = False  # hold linear layers in 4 bit; embeddings, norms, head stay
    bnb_4bit_quant_type: str = "nf4"  # format of the 4-bit values
    bnb_4bit_use_double_quant: bool = True  # quantise the scales too: 0.37 bit less a weight
    bnb_4bit_compute_dtype: str | None = None  # of the products; none: the model's dtype

    CHOICES: ClassVar[dict] = {
        "bnb_4bit_quant_type": ("nf4", "fp4"),
        "bnb_4bit_compute_dtype": (None, *DTYPES),
    }


@cache
def bitsandbytes():
    """The library, imported when it is needed; UserError if it can't be."""
    # it warns that an optional CPU kernel is missing
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    need = "4-bit weights and 8-bit optimizers need it: pip install bitsandbytes"
    with as_user_error(f"bitsandbytes can't be imported; {need}", ImportError):
        import bitsandbytes
    return bitsandbytes


class Matmul4bit(torch.autograd.Function):
    """x Wᵀ. W, which gets no gradient, is dequantised in forward and in backward, never kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense_weight().to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dense_weight().to(grad.dtype), None


class Linear4bit(nn.Module):
    """y = x Wᵀ + b, W (out, in) in blocks of 64 4-bit values with a scale each.

    arXiv:2305.14314, eqs. 5-6. Starts as `plain`, a Linear on meta; `model.set_tensor` gives it a
    float weight, which is quantised, or the parts of a stored one. Buffers then: weight
    (out · in / 2, 1) uint8; weight.absmax (blocks,), fp32, or uint8 with weight.nested_absmax and
    weight.nested_quant_map; weight.quant_map (16,). `state` has bitsandbytes' other values.
    file, name: where the checkpoint's 16-bit weight is, None if it holds 4 bits.
    """

    quantized = True

    def __init__(self, plain, quant, file=None, name=None):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias, self.quant, self.file, self.name = plain.bias, quant, file, name
        self.compute_dtype = DTYPES.get(quant.bnb_4bit_compute_dtype)
        self.register_buffer("weight", plain.weight.data)

    def expect(self, state):
        """Makes the buffers, on meta, of a stored weight that `state` describes."""
        values = self.in_features * self.out_features
        blocks, double = -(-values // state["blocksize"]), "nested_offset" in state
        empty = partial(torch.empty, device="meta")
        self._buffers["weight"] = empty((values + 1) // 2, 1, dtype=torch.uint8)
        self._buffers["weight.quant_map"] = empty(16)
        self._buffers["weight.absmax"] = empty(blocks, dtype=torch.uint8 if double else None)
        if double:
            self._buffers["weight.nested_absmax"] = empty(-(-blocks // NESTED_BLOCK))
            self._buffers["weight.nested_quant_map"] = empty(256)
        self.state = state

    def expect_own(self, dtype):
        """Makes the buffers, on meta, of the weight as `replace_weight` will quantise it."""
        state = {
            "blocksize": BLOCK,
            "quant_type": self.quant.bnb_4bit_quant_type,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if self.quant.bnb_4bit_use_double_quant:
            state["nested_offset"] = 0.0
        self.expect(state)

    def set_tensor(self, leaf, tensor, device, dtype):
        """See model.set_tensor. A float weight is converted to `dtype`, then quantised."""
        if leaf == "bias":
            bias = tensor.to(device=device, dtype=dtype, copy=True)
            self.bias = nn.Parameter(bias, requires_grad=False)
        elif leaf == "weight" and tensor.is_floating_point():
            self.dtype = dtype
            self.replace_weight(tensor.to(device=device, dtype=dtype))
        else:
            self._buffers[leaf] = tensor.to(device, copy=True)

    def replace_weight(self, weight):
        """Quantises `weight` (out, in), 16- or 32-bit, in place of the present one."""
        packed, state = bitsandbytes().functional.quantize_4bit(
            weight.contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.quant.bnb_4bit_use_double_quant,
            quant_type=self.quant.bnb_4bit_quant_type,
        )
        if is_divided(self.weight):
            assign(self.weight, packed)
        else:
            self._buffers["weight"] = packed
        self.state = state.as_dict()
        for leaf, tensor in state.as_dict(packed=True).items():
            self._buffers[f"weight.{leaf}"] = tensor
            self.state.pop(leaf, None)

    def dense_weight(self):
        """W (out, in), in the dtype it was quantised from."""
        functional, state, parts = bitsandbytes().functional, self.state, self._buffers
        scales = None
        if "nested_offset" in state:
            scales = functional.QuantState(
                parts["weight.nested_absmax"],
                code=parts["weight.nested_quant_map"],
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        blocks = functional.QuantState(
            parts["weight.absmax"],
            shape=(self.out_features, self.in_features),
            blocksize=state["blocksize"],
            quant_type=state["quant_type"],
            dtype=DTYPES[state["dtype"]],
            offset=state.get("nested_offset"),
            state2=scales,
        )
        return functional.dequantize_4bit(whole(self.weight), blocks)

    def original_weight(self):
        """W as in the checkpoint, in the model's dtype; UserError if that holds 4 bits."""
        if self.file is None:
            raise UserError(
                f"{self.name}: the checkpoint holds 4 bits; "
                "name the 16-bit model, with --load_in_4bit"
            )
        return read_tensor(self.file, self.name).to(self.weight.device, self.dtype)

    def forward(self, x):  # (..., in) -> (..., out)
        y = Matmul4bit.apply(x.to(self.compute_dtype or x.dtype), self).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# --- checkpoints ----------------------------------------------------------------------------------


def swap_linear4bit(quant, model, stored):
    """`open_model`'s swap_layers: Linear4bit for the linear layers that are held in 4 bit.

    Those that the checkpoint stores so and, if `quant` asks for it, all others but the head.
    stored: {tensor name: (file, shape, dtype name)}. UserError for what bitsandbytes can't hold.
    """
    check_choices(quant)
    states = {name.partition(QUANT_STATE)[0]: name for name in stored if QUANT_STATE in name}
    for path, plain in list(model.named_modules()):
        weight = f"{path}.weight"
        if type(plain) is not Linear:
            continue
        if weight in states:
            name, layer = states[weight], Linear4bit(plain, quant, name=weight)
            layer.expect(read_state(stored, name, (plain.out_features, plain.in_features)))
            description = torch.empty(stored[name][1], dtype=torch.uint8, device="meta")
            layer._buffers[name.removeprefix(f"{path}.")] = description
            model.set_submodule(path, layer)
        elif quant.load_in_4bit and path != "lm_head":
            bitsandbytes()
            file = stored[weight][0] if weight in stored else None
            model.set_submodule(path, Linear4bit(plain, quant, file, weight))


def read_state(stored, name, shape):
    """The description of a stored 4-bit weight; UserError if it is broken or another weight's."""
    file = stored[name][0]
    weight, _, kind = name.partition(QUANT_STATE)
    try:
        state = json.loads(bytes(read_tensor(file, name).tolist()), object_pairs_hook=unique_keys)
        valid = (
            state["quant_type"] == kind
            and state["blocksize"] in [2**n for n in range(5, 13)]
            and tuple(state["shape"]) == shape
            and state["dtype"] in DTYPES
            and ("nested_offset" in state) == (f"{weight}.nested_absmax" in stored)
            and state.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
            and abs(state.get("nested_offset", 0.0)) < 1e30
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(
            f"{file}: {name} does not describe 4-bit weights of shape {list(shape)}; "
            "save the model again"
        )
    return state


def load_4bit(name, quant=QuantConfig(), **options):
    """`load_model`, with linear layers in 4 bit if `quant` asks for it or the checkpoint has them.

    Quantised tensor by tensor: peak memory is the 4-bit model and the largest tensor.
    """
    return load_model(name, swap_layers=partial(swap_linear4bit, quant), **options)


def save_4bit(model, folder, quant):
    """Writes a model of Linear4bit layers, without an adapter, as transformers reads it."""
    quantization = {f.name: getattr(quant, f.name) for f in fields(QuantConfig)}
    quantization |= {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": quant.bnb_4bit_compute_dtype or model.config.dtype,
    }
    tensors = model.state_dict().items()
    save_model(tensors, folder, model.folder, quantization_config=quantization)


# --- the measured merge ---------------------------------------------------------------------------


@contextmanager
def as_merged(model, base):
    """While the block runs, the model computes what its merge into `base` would.

    base: 'original', the checkpoint's 16-bit weights, or 'dequantized'. A merged weight is made for
    its product and dropped.
    """

    def forward(layer, x):
        inner = layer.base_layer if isinstance(layer, LoRALinear) else layer
        W = layer.original_weight() if base == "original" else inner.dense_weight()
        if inner is not layer:
            W = layer.merged_weight(W)
        return plain_linear(W, inner.bias)(x)

    layers = layers_with_weights(model).values()
    changed = [layer for layer in layers if isinstance(layer, (LoRALinear, Linear4bit))]
    for layer in changed:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


@torch.inference_mode()
def measure_merge(model, batches):
    """What merging an adapter that was trained on 4 bits changes, for each base it can go into.

    {base: {'kl', 'top1', 'tokens'}}. kl: mean KL(adapter on 4 bits ‖ merged), nats per scored
    token; top1: share of them whose likeliest next token stays. Keeps the hidden states (S, C)
    alone; there is no second model.
    """
    training = model.training
    model.eval()
    before = [model(batch)[batch.scored] for batch in batches]
    bases = []
    if all(layer.file for layer in model.modules() if isinstance(layer, Linear4bit)):
        bases.append("original")
    if not any(layer.start for layer in lora_layers(model).values()):
        bases.append("dequantized")
    count, figures = sum(map(len, before)), {}
    for base in bases:
        kl, same = 0.0, 0
        with as_merged(model, base):
            for hidden, batch in zip(before, batches):
                merged = model(batch)[batch.scored]
                for a, b in zip(hidden.split(CHUNK), merged.split(CHUNK)):
                    p, q = model.logits(a).log_softmax(-1), model.logits(b).log_softmax(-1)
                    kl += float(F.kl_div(q, p, reduction="sum", log_target=True))
                    same += int((p.argmax(-1) == q.argmax(-1)).sum())
        figures[base] = {"kl": max(kl / count, 0.0), "top1": same / count, "tokens": count}
    model.train(training)
    return figures


# --- the command ----------------------------------------------------------------------------------


@dataclass
class QuantizeConfig(QuantConfig):
    # quantize
    model: str = field(kw_only=True)  # folder or hub id of the 16-bit model
    output_dir: str = field(kw_only=True)  # a new folder for the 4-bit model


@dataclass
class Merge4bitConfig(QuantConfig, MergeConfig):
    """MergeConfig, with how the base is quantised unless its checkpoint holds 4 bits."""


def quantize_command(config):
    """Writes a model in 4 bit."""
    config.load_in_4bit, dtype = True, ModelConfig.read(resolve(config.model)).dtype
    with new_folder(config.output_dir) as folder:
        save_4bit(load_4bit(config.model, config, dtype=dtype), folder, config)
    print(f"quantized {config.model} into {folder}")


def merge_4bit(config):
    """Merges an adapter into 4-bit weights."""
    config.load_in_4bit = True
    merge_command(config, partial(swap_linear4bit, config))


COMMANDS = {
    "quantize": (QuantizeConfig, quantize_command),
    "merge": (Merge4bitConfig, merge_4bit),
}


def main():
    run_subcommand(COMMANDS, __doc__, sys.argv[1:])


if __name__ == "__main__":
    run_command(main)

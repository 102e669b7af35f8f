"""QLoRA: the base in 4 bit, the adapter in fp32 on top. Built on bitsandbytes' kernels, not on its modules.

The decision that is not obvious: a layer's buffers carry the names that transformers and bitsandbytes give its parts in
a file (`weight`, `weight.absmax`, ...). So a 4-bit model's state_dict is a 4-bit checkpoint, reading one is the strict
load of any checkpoint, and moving, `meta` and saving need no code here.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314 (NF4 and double quantisation: section 3). Kernels, format: bitsandbytes.

    python sft.py --model Qwen/Qwen3-4B --load_in_4bit --data rows.jsonl           # trains on it
    python qlora.py quantize --model Qwen/Qwen3-4B --output_dir qwen3-4b-nf4       # a checkpoint transformers reads too
    python qlora.py merge --adapter runs/sft/adapter --output_dir merged           # into the dequantised 4-bit weights
"""

import json
import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALinear, merge, new_folder, plain_linear
from model import CHUNK, DTYPES, Linear, load_model, save_model
from support.errors import UserError, as_user_error, nearest, run_command
from support.files import read_tensor, unique_keys
from support.settings import parse_config


@dataclass
class QuantConfig:
    """The 4-bit part of a run's settings; names and meaning are those of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = (
        False  # hold the base's linear layers in 4 bit; embeddings, norms and head stay as they are
    )
    bnb_4bit_quant_type: str = "nf4"  # nf4 or fp4
    bnb_4bit_use_double_quant: bool = (
        True  # quantise the blocks' scales too: 0.37 bit less a weight
    )
    bnb_4bit_compute_dtype: str | None = (
        None  # of their products: bfloat16, float16, float32; none: the model's
    )


@cache
def bitsandbytes():
    """The library, imported when it is needed; UserError where it can't be."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
        logging.ERROR
    )  # an optional kernel it does without
    need = "4-bit weights and 8-bit optimizers need it: pip install bitsandbytes"
    with as_user_error(f"bitsandbytes can't be imported; {need}", ImportError):
        import bitsandbytes
    return bitsandbytes


class Matmul4bit(torch.autograd.Function):
    """x Wᵀ. W is made from its 4 bits when it is needed, in backward again, and never kept. It has no gradient."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense_weight().to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dense_weight().to(grad.dtype), None


class Linear4bit(nn.Module):
    """y = x Wᵀ + b, W (out, in) held in blocks of 64 4-bit values with a scale each. arXiv:2305.14314, equations 5-6.

    It begins as `plain`, a linear layer on meta, and takes what `place` gives it: a float weight, quantised there, or
    the parts of a stored one. Buffers then: weight (out · in / 2, 1) uint8, weight.absmax (blocks,), fp32 or uint8 with
    weight.nested_absmax and weight.nested_quant_map, weight.quant_map (16,), and the description `state` as JSON.
    """

    quantized = True

    def __init__(self, plain, quant, file=None, name=None):
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            plain.in_features,
            plain.out_features,
            plain.bias,
        )
        self.quant, self.file, self.name = quant, file, name
        self.compute_dtype = DTYPES.get(quant.bnb_4bit_compute_dtype)
        self.register_buffer("weight", plain.weight.data)

    def expect(self, state):
        """Makes room, on meta, for a stored weight that `state` describes."""
        n, meta = self.in_features * self.out_features, partial(torch.empty, device="meta")
        blocks, double = -(-n // state["blocksize"]), "nested_offset" in state
        self._buffers |= {
            "weight": meta((n + 1) // 2, 1, dtype=torch.uint8),
            "weight.quant_map": meta(16),
            "weight.absmax": meta(blocks, dtype=torch.uint8 if double else torch.float32),
        }
        if double:
            self._buffers |= {
                "weight.nested_absmax": meta(-(-blocks // 256)),
                "weight.nested_quant_map": meta(256),
            }
        self.state = state

    def expect_own(self, dtype):
        """Makes room, on meta, for the weight as `quantize_` will hold it."""
        self.expect(
            {
                "blocksize": 64,
                "quant_type": self.quant.bnb_4bit_quant_type,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": [self.out_features, self.in_features],
            }
            | ({"nested_offset": 0.0} if self.quant.bnb_4bit_use_double_quant else {})
        )

    def set_tensor(self, leaf, tensor, device, dtype):
        """See model.place. A float weight is quantised from `dtype`, as bitsandbytes would find it."""
        if leaf == "bias":
            self.bias = nn.Parameter(
                tensor.to(device=device, dtype=dtype, copy=True), requires_grad=False
            )
        elif tensor.is_floating_point() and leaf == "weight":
            self.dtype = dtype
            self.replace_weight(tensor.to(device=device, dtype=dtype))
        else:
            self._buffers[leaf] = tensor.to(device, copy=True)

    def replace_weight(self, weight):
        """Holds `weight` (out, in), 16- or 32-bit, from here on."""
        packed, state = bitsandbytes().functional.quantize_4bit(
            weight.contiguous(),
            blocksize=64,
            compress_statistics=self.quant.bnb_4bit_use_double_quant,
            quant_type=self.quant.bnb_4bit_quant_type,
        )
        parts = state.as_dict(packed=True)
        self._buffers |= {
            "weight": packed,
            **{f"weight.{leaf}": tensor for leaf, tensor in parts.items()},
        }
        self.state = {
            key: value
            for key, value in state.as_dict().items()
            if not isinstance(value, torch.Tensor)
        }

    def dense_weight(self):
        """W (out, in), in the dtype it was quantised from."""
        F4, state, parts = bitsandbytes().functional, self.state, self._buffers
        nested = (
            F4.QuantState(
                parts["weight.nested_absmax"],
                code=parts["weight.nested_quant_map"],
                dtype=torch.float32,
                blocksize=256,
            )
            if "nested_offset" in state
            else None
        )
        return F4.dequantize_4bit(
            self.weight,
            F4.QuantState(
                parts["weight.absmax"],
                tuple(state["shape"]),
                None,
                state["blocksize"],
                state["quant_type"],
                DTYPES[state["dtype"]],
                state.get("nested_offset"),
                nested,
            ),
        )

    def original_weight(self):
        """W as the checkpoint has it, in the dtype of this model; UserError where that holds 4 bits itself."""
        if self.file is None:
            raise UserError(
                f"{self.name}: the checkpoint holds 4 bits; name the 16-bit model, with --load_in_4bit"
            )
        return read_tensor(self.file, self.name).to(self.weight.device, self.dtype)

    def forward(self, x):  # (..., in) -> (..., out)
        y = Matmul4bit.apply(x.to(self.compute_dtype or x.dtype), self).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merge(self):
        """The plain layer of the same weights."""
        return plain_linear(self, self.dense_weight())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def swap_linear4bit(quant, model, found):
    """`open_model`'s swap_layers: Linear4bit for every linear layer but the head, where `quant` asks for it, or where the
    checkpoint holds 4 bits. UserError for what bitsandbytes does not hold."""
    for key, options in (
        ("bnb_4bit_quant_type", ("nf4", "fp4")),
        ("bnb_4bit_compute_dtype", (None, *DTYPES)),
    ):
        if (value := getattr(quant, key)) not in options:
            raise UserError(
                f"{key}: {value!r} is not one of {', '.join(map(str, options))}"
                + nearest(value, options)
            )
    for path, plain in [
        (path, module) for path, module in model.named_modules() if type(module) is Linear
    ]:
        weight = f"{path}.weight"
        stored = next(
            (name for name in found if name.startswith(f"{weight}.quant_state.bitsandbytes__")),
            None,
        )
        if stored:
            layer = Linear4bit(plain, quant, name=weight)
            layer.expect(read_state(found, stored, (plain.out_features, plain.in_features)))
            layer._buffers[stored.removeprefix(f"{path}.")] = torch.empty(
                found[stored][1], dtype=torch.uint8, device="meta"
            )
            model.set_submodule(path, layer)
        elif quant.load_in_4bit and path != "lm_head":
            bitsandbytes()
            model.set_submodule(
                path, Linear4bit(plain, quant, found.get(weight, [None])[0], weight)
            )


def read_state(found, name, shape):
    """The description of a stored 4-bit weight; UserError where it is none, or of another weight."""
    file = found[name][0]
    try:
        state = json.loads(bytes(read_tensor(file, name).tolist()), object_pairs_hook=unique_keys)
        double = name.partition(".quant_state.")[0] + ".nested_absmax" in found
        fine = (
            state["quant_type"] == name.rpartition("__")[2]
            and state["blocksize"] in [2**n for n in range(5, 13)]
            and tuple(state["shape"]) == shape
            and state["dtype"] in DTYPES
            and double == ("nested_offset" in state)
            and state.get("nested_blocksize", 256) == 256
            and abs(state.get("nested_offset", 0.0)) < 1e30
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        fine = False
    if not fine:
        raise UserError(
            f"{file}: {name} does not describe 4-bit weights of shape {list(shape)}; save the model again"
        )
    return state


def load_4bit(name, quant=QuantConfig(), **options):
    """`load_model`, with linear layers in 4 bit where `quant` asks for it or the checkpoint holds them so. Quantised as
    they arrive: peak memory is the 4-bit model and the largest tensor."""
    return load_model(name, swap_layers=partial(swap_linear4bit, quant), **options)


def save_4bit(model, folder, quant):
    """Writes a model of Linear4bit layers without an adapter as a checkpoint that transformers reads."""
    about = {f.name: getattr(quant, f.name) for f in fields(QuantConfig)}
    about |= {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": quant.bnb_4bit_compute_dtype or model.config.dtype,
    }
    save_model(model.state_dict().items(), folder, model.folder, quantization_config=about)


# --- the measured merge -----------------------------------------------------------------------------------------------


@contextmanager
def as_merged(model, base):
    """While the block runs, the model computes what its merge would: into 'original', the checkpoint's 16-bit weights,
    or 'dequantized'. A merged weight is there for its product alone."""

    def forward(layer, x):
        wrapped = isinstance(layer, LoRALinear)
        inner = layer.base_layer if wrapped else layer
        W = inner.dense_weight() if base == "dequantized" else inner.original_weight()
        if wrapped and layer.start and base == "original":
            W = torch.addmm(W.float(), *layer.start[::-1], alpha=-layer.scaling).to(W.dtype)
        return plain_linear(inner, layer.merged(W) if wrapped else W)(x)

    layers = [
        layer
        for layer in model.modules()
        if isinstance(getattr(layer, "base_layer", layer), Linear4bit)
    ]
    for layer in layers:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.inference_mode()
def measure_merge(model, batches):
    """What merging an adapter that was trained on 4 bits changes: {base: {'kl', 'top1'}} for the bases it can be merged
    into. kl: mean KL(adapter on 4 bits ‖ merged) in nats per scored token, top1: the share of them whose likeliest next
    token stays. Only hidden states (S, C) are kept; no second model."""
    training = model.training
    model.eval()
    before, found = [model(batch)[batch.scored] for batch in batches], {}
    bases = ["original"] * all(
        layer.file for layer in model.modules() if isinstance(layer, Linear4bit)
    )
    bases += ["dequantized"] * (
        not any(layer.start for layer in model.modules() if isinstance(layer, LoRALinear))
    )
    for base in bases:
        kl, same, count = 0.0, 0, 0
        with as_merged(model, base):
            for hidden, batch in zip(before, batches):
                for h, other in zip(hidden.split(CHUNK), model(batch)[batch.scored].split(CHUNK)):
                    p, q = (model.logits(x).log_softmax(-1) for x in (h, other))
                    kl += float((p.exp() * (p - q)).sum())
                    same += int((p.argmax(-1) == q.argmax(-1)).sum())
                    count += len(h)
        found[base] = {"kl": max(kl / count, 0.0), "top1": same / count, "tokens": count}
    model.train(training)
    return found


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class CommandConfig(QuantConfig):
    output_dir: str = ""  # a new folder for the model that is written
    model: str = ""  # folder or hub id of the 16-bit model; merge takes the one the adapter names
    adapter: str = ""  # merge: the adapter's folder, a run folder, or a hub id


def main():
    command, *argv = sys.argv[1:] or [""]
    needs = {"quantize": ["model", "output_dir"], "merge": ["adapter", "output_dir"]}
    if command not in needs:
        raise UserError(
            f"unknown command {command!r}{nearest(command, needs)}; it is quantize or merge"
        )
    config = parse_config(
        CommandConfig, argv, "Writes a model in 4 bit, or merges an adapter into such weights."
    )
    if missing := [key for key in needs[command] if not getattr(config, key)]:
        raise UserError(f"--{missing[0]} is needed; --help explains every flag")
    config.load_in_4bit, folder = True, new_folder(config.output_dir)
    if command == "quantize":
        save_4bit(load_4bit(config.model, config), folder, config)
    else:
        print(
            *merge(config.adapter, folder, config.model, partial(swap_linear4bit, config)), sep="\n"
        )
    print(f"{command}: {folder} holds {config.model or config.adapter}")


if __name__ == "__main__":
    run_command(main)

"""Which device a run uses, and which dtype that device multiplies."""

import sys
from functools import cache

import torch

from support.errors import as_user_error

SHORT = {"bfloat16": "bf16", "float16": "fp16"}  # in the names of a CPU's capabilities


def pick_device(name):
    """torch.device of a device's name; 'auto' is the accelerator that PyTorch was built for (CUDA,
    MPS, XPU, ...), the CPU if none is there. UserError if it can't be used."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with as_user_error(f"device: {name} can't be used here", RuntimeError, AssertionError):
        torch.zeros(1, device=name).item()
    return torch.device(name)


def pick_dtype(dtype, stored, device):
    """The name of the dtype to compute in. 'auto' is the checkpoint's, `stored`, if the device has
    products in it: on a CPU without (AVX2 alone) float32 is 6 to 80 times faster, on a GPU without
    bfloat16 (a T4) it is float16. A line on stderr says so, or that `dtype` is slow here."""
    device, asked = torch.device(device), stored if dtype == "auto" else dtype
    choice = asked
    if device.type == "cpu" and asked in SHORT:
        capabilities = torch.cpu.get_capabilities().items()
        if not any(has for name, has in capabilities if SHORT[asked] in name):
            choice = "float32"
    if device.type == "cuda" and asked == "bfloat16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            choice = "float16"
    if choice == asked:
        return asked
    if dtype == "auto":
        notice(f"dtype: {choice}, no {asked} products on this {device.type}")
        return choice
    notice(f"dtype: {asked} is slow, no products in it on this {device.type}; auto is {choice}")
    return asked


@cache
def notice(line):
    """Prints a line to stderr, once however many models are loaded."""
    print(line, file=sys.stderr)

"""The memory that a process holds, and how its allocators keep or return it."""

import ctypes
import math
import os
import re
import resource
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def tune_allocator():
    """Called once by every command.

    On a CPU oneDNN keeps the last 1,024 kernels it compiled, 0.6 GB where each batch has another
    length, scattered among the tensors; batches of one length need about 100. glibc by default
    keeps freed blocks of up to 32 MB, which left 2 GB of holes around a model read by tensors.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # read at its first product
    set_malloc_threshold(2**22)


def glibc():
    """The C library if it is glibc, else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def set_malloc_threshold(size):
    """From here on glibc keeps freed blocks of up to `size` bytes, and returns larger ones."""
    libc = glibc()
    if libc:
        libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, min(16 * size, 2**31 - 1))  # M_TRIM_THRESHOLD


@contextmanager
def keep_freed_memory(keep=True):
    """While the block runs, glibc keeps freed memory of any size.

    Getting it back from the system page by page takes 4 % of a training step on a CPU. Weights that
    are gathered and dropped block by block would leave holes: over 2 GB at the Qwen3-0.6B shape.
    """
    set_malloc_threshold(2**30 if keep else 2**22)
    try:
        yield
    finally:
        set_malloc_threshold(2**22)
        free_cached_memory()


def offload_activations(model):
    """A context in which what is saved for backward, weights aside, waits in memory of the CPU.

    From pinned memory a GPU copies it back without the host waiting. Source:
    torch.autograd.graph.save_on_cpu, which would copy the weights at each use too.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage()._cdata for tensor in tensors}

    def pack(x):
        if x.untyped_storage()._cdata in weights:
            return x, x.device
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return copy.copy_(x, non_blocking=True), x.device

    def unpack(packed):
        x, device = packed
        return x.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def free_cached_memory():
    """Returns to the system the freed memory that CUDA's allocator or glibc holds."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    libc = glibc()
    if libc:
        libc.malloc_trim(0)


def peak_memory_gb(device):
    """Peak memory in GB (10^9 bytes) since the last call; outside CUDA and Linux since the start.

    On CUDA it is what the allocator handed out, elsewhere the process's resident set.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident set
    return peak / 1e9


def free_memory_gb(device):
    """GB (10^9 bytes) of free memory; infinite if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    file = Path("/proc/meminfo")
    if not file.exists():
        return math.inf
    return int(re.search(r"MemAvailable:\s+(\d+)", file.read_text())[1]) * 1024 / 1e9

"""What memory a process holds, and how its allocators keep or return it."""

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
    """Called by every command. On a CPU oneDNN keeps the last 1,024 products it compiled, 0.6 GB of them where each
    batch has another length, and scatters them among the tensors; a batch of one length needs about 100. Left alone,
    glibc keeps freed blocks of up to 32 MB: a model read tensor by tensor then lay among up to 2 GB of holes."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # read before its first product
    set_malloc_threshold(2**22)


def glibc():
    """The C library where it is glibc, else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None


def set_malloc_threshold(size):
    """From here on glibc keeps freed blocks of up to `size` bytes for itself."""
    if libc := glibc():
        (
            libc.mallopt(-3, size),
            libc.mallopt(-1, min(16 * size, 2**31 - 1)),
        )  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


@contextmanager
def keep_freed_memory():
    """While the block runs, glibc keeps freed memory of any size. To get it again from the system page by page takes
    4 % of a training step on a CPU."""
    set_malloc_threshold(2**30)
    try:
        yield
    finally:
        set_malloc_threshold(2**22)
        free_cached_memory()


def free_cached_memory():
    """Freed memory that CUDA's allocator or glibc still holds goes back to the system."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if libc := glibc():
        libc.malloc_trim(0)


def peak_memory_gb(device):
    """Peak memory in GB (10^9 bytes) since this was last asked (outside CUDA and Linux: so far): what CUDA's allocator
    handed out, elsewhere the process's resident set."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the mark goes down to what is resident now
    return peak / 1e9


def free_memory_gb(device):
    """GB that this machine has free; infinite where it doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    file = Path("/proc/meminfo")
    return (
        int(re.search(r"MemAvailable:\s+(\d+)", file.read_text())[1]) * 1024 / 1e9
        if file.exists()
        else math.inf
    )

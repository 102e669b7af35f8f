"""Files and folders: untrusted ones read within limits, ours written aside and renamed into place.

A folder is locked by flock on the folder itself. The lock ends with the process, however that ends,
and leaves no file behind; `filelock` locks a file of its own, which stays.
"""

import fcntl
import json
import math
import os
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.errors import UserError, as_user_error, brief


def regular_file(path, most=math.inf):
    """`path` if it is missing or a file of at most `most` bytes, else UserError.

    A pipe would block for ever, a device never end.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
    if path.exists() and path.stat().st_size > most:
        raise UserError(f"{path}: larger than {most:,} bytes")
    return path


def unique_keys(pairs):
    """A JSON object's pairs as a dict; ValueError: a repeated key, where readers differ."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{brief(key)} twice")
    return unique


def read_json(path):
    """The object in a JSON file; UserError: it is missing, broken or something else."""
    missing = as_user_error(path, FileNotFoundError)
    with missing, as_user_error(f"{path}: not valid JSON", ValueError, RecursionError):
        text = regular_file(path, 2**26).read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_header(file):
    """{tensor name: (file, shape, dtype name)} of a safetensors file."""
    header, where = {}, f"{regular_file(file)}: not a whole safetensors file"
    with as_user_error(where, SafetensorError, OSError), safe_open(file, "pt") as tensors:
        names = tensors.keys()
        if len(names) > 10**5:
            raise UserError(f"{file}: holds {len(names):,} tensors, more than any model")
        for name in names:
            tensor = tensors.get_slice(name)
            header[name] = file, tuple(tensor.get_shape()), tensor.get_dtype()
    return header


def read_tensor(file, name):
    """One tensor; UserError: it holds NaN or infinity.

    The file is opened anew: a mapping kept open would count every page read so far as memory.
    """
    with safe_open(file, "pt") as tensors:
        tensor = tensors.get_tensor(name)
    if not finite(tensor):
        raise UserError(
            f"{file}: {name} holds NaN or infinity; it is damaged, or its run diverged"
        )
    return tensor


def finite(tensor):
    """False: it holds NaN or positive infinity, in fp32 too. One pass, a tenth of a read's time."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return math.isfinite(tensor.amax().float())


def write_tensors(tensors, file):
    """Writes a safetensors file; UserError: the write is refused."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with as_user_error(f"{file}: could not be written", SafetensorError):
        save_file(tensors, file, metadata={"format": "pt"})


def write_text(path, text):
    """Writes a file aside and renames it into place: a stop leaves the old one or the new one."""
    aside = Path(path).with_name(f".{Path(path).name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def clear_folder(folder):
    """Deletes what is in a folder; of a link only the link. UserError: the folder is one."""
    folder = Path(folder)
    if folder.is_symlink():
        raise UserError(
            f"{folder}: a link, nothing behind it is deleted; name {folder.resolve()}"
        )
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def atomic_folder(target):
    """A new folder to write into, synced and renamed to `target` if the block ends well.

    A block that raises leaves `target` as it was.
    """
    target = Path(target)
    aside = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")

    def clean_up():
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    clean_up()
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in [*aside.iterdir(), aside]:
            sync(file)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        sync(target.parent)
    finally:
        clean_up()


def sync(path):
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def locked_folder(folder):
    """While the block runs, `folder` is this process's alone; UserError: another process has it.

    It is made if it is missing, and removed if the block leaves nothing in it.
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run is using this folder; wait for it or choose --output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
        with suppress(OSError):
            for path in new:
                path.rmdir()

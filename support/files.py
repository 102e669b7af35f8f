"""Files and folders: untrusted ones read within limits, ours written aside and renamed into place.

A folder is locked by flock on the folder itself. The lock ends with the process, however that ends,
and leaves no file behind; `filelock` locks a file of its own, which stays.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.errors import UserError, as_user_error, brief

# safetensors' names
CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


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
    try:
        with as_user_error(path, FileNotFoundError):
            text = regular_file(path, 2**26).read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # its text names the line
        raise UserError(f"{path}: not valid JSON: {error}") from None
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


def read_tensor(file, name, rows=None):
    """One tensor, or a slice of its rows; UserError: it holds NaN or infinity.

    The file is opened anew: a mapping kept open would count every page read so far as memory.
    """
    with safe_open(file, "pt") as tensors:
        tensor = tensors.get_slice(name)[rows] if rows else tensors.get_tensor(name)
    if not finite(tensor):
        raise UserError(
            f"{file}: {name} holds NaN or infinity; it is damaged, or its run diverged"
        )
    return tensor


def finite(tensor):
    """False: it holds NaN or infinity, in fp32 too. One pass, a tenth of a read's time."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return all(math.isfinite(extreme.float()) for extreme in tensor.aminmax())


def write_tensors(tensors, file):
    """Writes a safetensors file; UserError: the write is refused."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with as_user_error(f"{file}: could not be written", SafetensorError):
        save_file(tensors, file, metadata={"format": "pt"})


def write_stream(pairs, file, headers):
    """`write_tensors` of (name, tensor) pairs, taken one at a time in the order of headers, {name:
    tensor of that dtype and shape}. Source: safetensors' description of its format."""
    table, end = {}, 0
    for name, tensor in headers.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        table[name] = {"dtype": CODES[tensor.dtype], "shape": [*tensor.shape]}
        table[name]["data_offsets"] = start, end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in pairs:
            out.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())


def aside_of(path):
    """Where `path` is written before it is renamed; the name says that what is there is ours."""
    return path.with_name(f".{path.name}.plaintune.partial")


def write_text(path, text):
    """Writes a file, from a text or its lines, aside and renames it into place.

    A stop leaves the old file or the new one. UserError: another process is writing it.
    """
    path = Path(path).resolve()  # a link stays one
    aside = aside_of(path)
    aside.touch()
    with locked(aside), open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        try:
            file.writelines(text)
            file.flush()
            sync(aside)
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)


def is_free(folder):
    """Whether a folder holds nothing but what a killed command left aside."""
    return all(path.name.endswith(".plaintune.partial") for path in folder.iterdir())


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

    A block that raises leaves `target` as it was. A mount point, or an empty folder, which may be
    the working directory, stays where it is: the files move in. UserError: another process is
    writing it.
    """
    target = Path(target).resolve()  # a link stays one
    stays = target.is_dir() and (target.is_mount() or is_free(target))
    aside = aside_of(target / "files" if stays else target)
    old = aside.with_suffix(".old")

    def clean_up():
        if old.exists() and not target.exists():  # stopped between the two renames
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    with locked_folder(aside):
        try:
            clear_folder(aside)  # of a killed command
            clean_up()
            yield aside
            for file in [*aside.iterdir(), aside]:
                sync(file)
            if stays:
                for file in aside.iterdir():
                    file.rename(target / file.name)
            else:
                if target.is_dir():
                    target.rename(old)
                aside.rename(target)
            sync(aside.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            clean_up()


def sync(path):
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def locked(path):
    """While the block runs, a file or folder is this process's; UserError: another one has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another run is using this folder; wait for it or choose another"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_folder(folder):
    """`locked` of a folder, which is made if it is missing and removed if it stays empty.

    A link stays one, also to a folder that is yet to be made.
    """
    real = Path(folder).resolve()
    new = [path for path in (real, *real.parents) if not path.exists()]
    real.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def new_folder(path):
    """--output_dir as a Path, this process's while the block runs; UserError: it is none, or holds
    more than what a killed command left aside."""
    path = Path(path)
    taken = UserError(f"--output_dir {path}: exists already; name a new folder")
    if path.exists() and not path.is_dir():
        raise taken
    with locked_folder(path):
        if not is_free(path):
            raise taken
        yield path


def new_file(path):
    """UserError unless --output is a new file. Its folder is made, before the work begins."""
    if not path or Path(path).exists():
        fault = "exists already" if path else "is needed"
        raise UserError(f"--output {path}: {fault}; name a new one")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def write_rows(path, rows, summary):
    """Writes rows as JSON lines and says so."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {summary}")


def hash_weights(folder):
    """SHA-256 of the content of a folder's weights and configs: sizes and times may be equal where
    weights are not."""
    digest = hashlib.sha256()
    for pattern in ("*.safetensors", "*config.json"):
        for path in sorted(folder.glob(pattern)):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

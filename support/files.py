"""Files and folders: read with care, written aside and renamed into place, locked."""

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
    """`path`, unless it is there and no file of at most so many bytes: a pipe waits for ever, a device never ends."""
    if (path := Path(path)).exists() and not (path.is_file() and path.stat().st_size <= most):
        raise UserError(
            f"{path}: larger than {most:,} bytes"
            if path.is_file()
            else f"{path}: not a regular file"
        )
    return path


def unique_keys(pairs):
    """A JSON object's pairs as a dict. ValueError: a key is given twice, of which some readers take the other one."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"{brief(Counter(key for key, _ in pairs).most_common(1)[0][0])} twice")
    return found


def read_json(path):
    """The object in a JSON file; UserError with the file and line where it is missing, broken or no object."""
    try:
        value = json.loads(
            regular_file(path, 2**26).read_text(encoding="utf-8"), object_pairs_hook=unique_keys
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_header(file):
    """{tensor name: (file, shape, dtype name)} of a safetensors file."""
    with (
        as_user_error(
            f"{regular_file(file)}: not a whole safetensors file", SafetensorError, OSError
        ),
        safe_open(file, "pt") as f,
    ):
        if len(names := f.keys()) > 10**5:
            raise UserError(f"{file}: holds {len(names):,} tensors, which no model has")
        parts = ((name, f.get_slice(name)) for name in names)
        return {name: (file, tuple(part.get_shape()), part.get_dtype()) for name, part in parts}


def read_tensor(file, name):
    """One tensor. The file is opened for it alone: a mapping kept open would count every page read so far as memory."""
    with safe_open(file, "pt") as f:
        tensor = f.get_tensor(name)
    if not finite(tensor):
        raise UserError(
            f"{file}: {name} holds NaN or infinity; it is damaged, or what trained it diverged"
        )
    return tensor


def finite(tensor):
    """False where it holds NaN or positive infinity, in fp32 too. One pass, a tenth of the time that reading takes."""
    return (
        not tensor.is_floating_point()
        or tensor.numel() == 0
        or math.isfinite(tensor.amax().float())
    )


def write_tensors(tensors, file):
    """save_file; UserError where the write is refused."""
    with as_user_error(f"{file}: could not be written", SafetensorError):
        save_file(
            {name: t.detach().contiguous() for name, t in tensors.items()},
            file,
            metadata={"format": "pt"},
        )


@contextmanager
def atomic_folder(target):
    """A folder to write into. It is synced and takes target's place when the block ends well, else it is removed."""
    target = Path(target)
    aside, old = (
        target.with_name(f".{target.name}.partial"),
        target.with_name(f".{target.name}.old"),
    )

    def put_back():  # a stop between the two renames leaves the old folder beside its place
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)

    put_back()
    shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in [*aside.iterdir(), aside]:
            sync(file)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        put_back()
        raise


def sync(path):
    """Waits until a file, or which names a folder has, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def locked_folder(folder):
    """While the block runs `folder`, made if need be, is this process's; UserError where it is another's. The lock goes
    with the process, however that ends, and a new folder in which nothing was left goes too."""
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks has to do without
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another run is at work there; wait for its end, or choose another "
                    "--output_dir"
                ) from None
        yield
    finally:
        os.close(handle)
        with suppress(OSError):
            for path in new:
                path.rmdir()

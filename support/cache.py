"""Rendered examples on disk, memory-mapped: the memory used does not grow with the rows.

A folder is named by a hash of everything its examples depend on. It has data.bin (of an example its
up to three int32 arrays, then [where, row] in JSON), index.bin (where these four begin and the last
ends), and ledger.json, whose CRC tells a damaged folder.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from support.errors import UserError, as_user_error
from support.files import locked_folder, read_json, sync

LAYOUT = np.dtype(
    [
        ("offsets", np.int64, 5),
        ("weight", float),
        ("source", np.int64),
        ("row", np.int64),
    ]
)


@dataclass(eq=False)
class Cache:
    """A folder of at least one example, mapped once, so that a run outlives its removal."""

    folder: Path
    crc: int

    def __post_init__(self):
        self.entries = np.memmap(self.folder / "index.bin", LAYOUT, "r")  # (examples,)
        self.data = np.memmap(self.folder / "data.bin", np.uint8, "r")

    def parts(self, n):
        """(the arrays of example `n`, its weight)."""
        (*offsets, _), weight, *_ = self.entries[n]
        pairs = itertools.pairwise(offsets)
        return [self.data[start:end].view(np.int32) for start, end in pairs], float(weight)

    def row(self, n):
        """(where it stands, as 'file:line'; the row as it was read) of example `n`."""
        *_, start, end = self.entries["offsets"][n]
        return json.loads(self.data[start:end].tobytes())


def cache_folder(settings, files):
    """The folder for examples made by these settings from these files. UserError: none is there."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for path in files:
        digest.update(str(path).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    with as_user_error("PLAINTUNE_CACHE: no folder for rendered rows", OSError, RuntimeError):
        cache = Path(os.environ.get("PLAINTUNE_CACHE") or "~/.cache/plaintune").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    return cache / digest.hexdigest()


def checksum(folder):
    """CRC-32 of a folder's examples."""
    crc = 0
    for name in ("data.bin", "index.bin"):
        with open(folder / name, "rb") as file:
            while block := file.read(2**24):
                crc = zlib.crc32(block, crc)
    return crc


def read_ledger(folder, kind):
    """The ledger, a dataclass `kind` with a field `crc`; None: it is missing or damaged."""
    with suppress(OSError, UserError, TypeError):
        ledger = kind(**read_json(folder / "ledger.json"))
        if ledger.crc == checksum(folder):
            return ledger


def write_cache(folder, examples, ledger):
    """Writes (parts, weight, source, row number, (where, row)) tuples into a new folder, renamed
    into place when it is complete; then the ledger, filled on the way, which it returns as read."""
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    for stale in folder.parent.glob("*.partial"):  # a kill's: nobody has its lock
        with suppress(UserError), locked_folder(stale):
            shutil.rmtree(stale, ignore_errors=True)
    aside = tempfile.TemporaryDirectory(
        suffix=".partial", dir=folder.parent, ignore_cleanup_errors=True
    )
    with aside as partial, locked_folder(partial):
        partial = Path(partial)
        write_examples(partial, examples)
        ledger.crc = checksum(partial)
        (partial / "ledger.json").write_text(json.dumps(asdict(ledger)))
        for file in partial.iterdir():
            sync(file)
        with suppress(OSError):  # another process may have been first
            os.rename(partial, folder)
    ledger = read_ledger(folder, type(ledger))
    if not ledger:
        raise UserError(f"{folder}: does not read back as written; check the disk")
    return ledger


def write_examples(folder, examples):
    end, examples = 0, iter(examples)
    with open(folder / "data.bin", "wb") as data, open(folder / "index.bin", "wb") as index:
        while chunk := list(itertools.islice(examples, 256)):
            entries = []
            for parts, weight, source, number, row in chunk:
                blobs = [part.tobytes() for part in parts]
                blobs += [b""] * (3 - len(parts))
                blobs.append(json.dumps(row, default=str).encode())
                data.writelines(blobs)
                *offsets, end = itertools.accumulate(map(len, blobs), initial=end)
                entries.append(([*offsets, end], weight, source, number))
            index.write(np.array(entries, LAYOUT).tobytes())

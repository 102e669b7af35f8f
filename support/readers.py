"""Files to rows: a source (file, folder, glob, data set of the hub) is read as (where, row) pairs.

`where` is 'file:line' or 'file[index]' and stands in front of every message about the row.
READERS is the one table of file types; each also reads `.gz`, within a limit on what it unzips to.
"""

import csv
import glob
import gzip
import json
import re
import zlib
from pathlib import Path

import numpy as np

from support.errors import UserError, as_user_error, brief, nearest
from support.files import regular_file, unique_keys
from support.hub import hub_files

BLOCK = 2**26  # bytes read at once; the longest line


def read_blocks(path, lines=True):
    """Yields a file's bytes, unzipped if its name ends in .gz: by lines, or by blocks."""
    with as_user_error(f"{path}: cannot be read", OSError, EOFError, zlib.error):
        limit = max(100 * regular_file(path).stat().st_size, 2**25)
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            read = file.readline if lines else file.read
            while block := read(BLOCK):
                limit -= len(block)
                if limit < 0:
                    raise UserError(
                        f"{path}: unzips to more than a hundred times its size; "
                        "if you trust it, unzip it"
                    )
                yield block


def read_lines(path, encoding="utf-8-sig"):
    """Yields (line number from 1, line) without holding the file."""
    for number, line in enumerate(read_blocks(path), 1):
        if len(line) == BLOCK:
            raise UserError(f"{path}:{number}: a line of more than {BLOCK:,} bytes; split it")
        with as_user_error(f"{path}:{number}: not UTF-8", UnicodeDecodeError):
            line = line.decode(encoding)
        yield number, line


def read_text(path):
    """A whole file as one string."""
    with as_user_error(f"{path}: not UTF-8", UnicodeDecodeError):
        return b"".join(read_blocks(path, lines=False)).decode("utf-8-sig")


def read_jsonl(path):
    for number, line in read_lines(path):
        if line.strip():
            with as_user_error(f"{path}:{number}: not JSON", ValueError, RecursionError, on=line):
                row = json.loads(line, object_pairs_hook=unique_keys)
            yield f"{path}:{number}", row


def read_json_list(path):
    """A list of rows, {"data": [...]}, or one row; JSON lines under this name are read as such."""
    text = read_text(path)
    try:
        rows = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        if reason == "Extra data" and text.lstrip().startswith("{"):
            return read_jsonl(path)
        number = getattr(error, "lineno", 1)
        line = "".join(text.splitlines()[number - 1 : number])
        line = brief(line or "end of file")
        raise UserError(f"{path}:{number}: not JSON: {reason}: {line}") from None
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected rows, found {brief(rows)}")
    return number_rows(path, rows)


def read_csv(path):
    csv.field_size_limit(2**31 - 1)
    with as_user_error(f"{path}: not CSV", csv.Error, ValueError):
        rows = csv.DictReader(line for _, line in read_lines(path))
        unique_keys([(name, None) for name in rows.fieldnames or ()])
        for where, row in number_rows(path, rows):
            if None in row:
                width = len(row) - 1
                extra = brief(row[None])
                raise UserError(f"{where}: more fields than the header's {width}: {extra}")
            yield where, row


def without_nulls(value):
    """`value` without the nulls by which Arrow gives all structs of a column the same keys.
    Source: trl's remove_none_values."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [*map(without_nulls, value)] if isinstance(value, list) else value


def read_parquet(path):
    import pyarrow.parquet

    faults = pyarrow.ArrowException, OSError, ValueError, KeyError
    with as_user_error(f"{path}: not a parquet file", *faults):
        file = pyarrow.parquet.ParquetFile(path)
        unique_keys([(name, None) for name in file.schema_arrow.names])
        rows = (
            without_nulls(row)
            for batch in file.iter_batches(256)
            for row in batch.to_pylist(maps_as_pydicts="strict")
        )
        yield from number_rows(path, rows)


def number_rows(path, rows):
    return ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def read_movielens(path, context=10):
    """MovieLens 100K's u.data with u.item beside it -> a row for each rating that a user gave after
    the first `context`: {"history": [[title, rating], ...] of those before it, "title", "rating"}.
    """

    def read_table(path, separator):
        for number, line in read_lines(path, "latin-1"):
            yield number, line.rstrip("\r\n").split(separator)

    users = {}
    with as_user_error(f"{path}: not tables of MovieLens", ValueError, LookupError):
        titles = {
            item: title for _, (item, title, *_) in read_table(path.with_name("u.item"), "|")
        }
        for number, (user, item, rating, time) in read_table(path, "\t"):
            rated = [titles[item], int(rating)]
            users.setdefault(user, []).append((int(time), number, rated))
    for ratings in users.values():
        ratings.sort()
        for n, (_, number, (title, rating)) in enumerate(ratings[context:]):
            history = [rated for *_, rated in ratings[n : n + context]]
            yield f"{path}:{number}", {"history": history, "title": title, "rating": rating}


READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json_list,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".data": read_movielens,
}


def reader_of(path):
    """The function that reads this type of file, or None."""
    return READERS.get(Path(str(path).removesuffix(".gz")).suffix)


SPLITS = {  # a file is one of a data set's splits if a word of its name is here
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def split_of(path):
    """'train', 'validation' or 'test' if the name says so, as `datasets` reads names; else None."""
    words = {*re.findall("[a-z]+", path.name.lower())}
    return next((split for split, names in SPLITS.items() if words & names), None)


def files_in(folder):
    """The files of a folder and of its data/: all, or where they are a data set's splits, those of
    train. UserError: several splits without train, or no file."""
    paths, splits = [*folder.iterdir(), *folder.glob("data/*")], {}
    paths = sorted(filter(reader_of, paths))
    for path in paths:
        splits.setdefault(split_of(path), []).append(path)
    if not splits:
        raise UserError(f"{folder}: no file in it of a kind in {', '.join(READERS)}")
    files = splits.get("train", paths)
    if len(splits) > 1:
        names = brief(", ".join(path.name for path in paths), 200)
        if files is paths:
            raise UserError(f"{folder}: has several splits; name one: {names}")
        print(f"{folder}: its train split, {len(files)} of {len(paths)} files: {names}")
    return files


def find_files(name):
    """The files of one source, sorted; UserError where one is missing or of an unknown type."""
    path = Path(name)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(#[\w.-]+)?(:[\w.-]+){0,2}", name)
    if path.is_dir():
        paths = files_in(path)
    elif path.exists():
        paths = [path]
    elif matches := glob.glob(name, recursive=True):
        paths = sorted(map(Path, matches))
    elif is_hub_id and not reader_of(path):
        paths = hub_files(name, reader_of)
    else:
        paths = [path]
    for path in paths:
        if not regular_file(path).exists():
            raise UserError(f"{path}: no such file{nearest(path, path.parent.glob('*'))}")
        if not reader_of(path):
            known = ", ".join(READERS)
            raise UserError(f"{path}: not a known kind of file; known are {known}, also with .gz")
    return paths


def find_sources(sources):
    """Sources -> [(name, weight, files), ...]. A source is a file of a type in READERS, a folder of
    them, a glob, or a data set as in `hub_files`, each perhaps with @weight: 1 where only others
    have one, None where none has."""
    parsed = []
    for source in map(str, [sources] if isinstance(sources, (str, Path)) else sources):
        name, mark, weight = source.rpartition("@")
        if not mark or Path(source).exists():
            name, weight = source, None
        with as_user_error(f"{source}: the weight after @ must be a number above 0", ValueError):
            if weight is not None:
                weight = float(weight)
                if not 0 < weight < 1e30:
                    raise ValueError(weight)
        if not name.strip():
            raise UserError(f"{source!r}: a source of rows needs a name")
        parsed.append((name, weight, find_files(name)))
    if any(weight for _, weight, _ in parsed):
        parsed = [(name, weight or 1.0, paths) for name, weight, paths in parsed]
    return parsed


def stream_rows(sources):
    """Yields (where, row, number of its source) of what `find_sources` returns."""
    for number, (name, _, paths) in enumerate(sources):
        where = None
        for path in paths:
            for where, row in reader_of(path)(path):
                if not isinstance(row, dict):
                    raise UserError(f"{where}: a row is an object, found {brief(row)}")
                yield where, row, number
        if where is None:
            raise UserError(f"{name}: no rows in it")


def sample_rows(sources, count, seed):
    """(rows of `stream_rows`, how many are left out): `count` drawn by `seed`, in their order; all
    if it is None."""
    rows = stream_rows(sources)
    if count is None:
        return rows, 0
    total = sum(1 for _ in stream_rows(sources))
    sample = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    return (row for n, row in enumerate(rows) if n in sample), total - len(sample)


def read_rows(source):
    """[(where, row), ...] of a source, see `find_sources`."""
    return [(where, row) for where, row, _ in stream_rows(find_sources(source))]

"""A file of graded answers, a JSON line each: what it has is not asked again."""

import hashlib
import json
import os
from contextlib import suppress

from tqdm import tqdm

from support.distributed import is_first, on_first
from support.files import regular_file, write_text


def sample_key(content):
    """A hash of everything that a sample depends on."""
    digest = hashlib.sha256(repr(content).encode())
    return digest.hexdigest()[:16]


def read_samples(file, keys):
    """[(number, sample), ...] of the whole lines of a samples file whose key is the question's. The
    others are taken out of it."""
    samples = {}
    if file.exists():
        text = regular_file(file).read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n")[:-1]:
            # a line that is not ours is answered again
            with suppress(ValueError, KeyError, TypeError, IndexError, RecursionError):
                sample = json.loads(line)
                if keys[sample["id"]] == sample["key"]:
                    samples[sample["id"]] = sample
    write_samples(file, samples)
    return [*samples.items()]


def write_samples(file, samples):
    lines = [json.dumps(samples[n]) + "\n" for n in sorted(samples)]
    write_text(file, lines)


def complete_samples(file, keys, answer):
    """A sample for each key, in order. answer(numbers) yields (index, sample) for those that the
    file lacks, on every rank; the first rank writes each down at once."""
    samples = dict(on_first(read_samples, file, keys))
    missing = [n for n in range(len(keys)) if n not in samples]
    bar = tqdm(
        total=len(keys),
        initial=len(samples),
        desc=file.stem,
        leave=False,
        disable=None,
    )
    path = file if is_first() else os.devnull
    with open(path, "a", encoding="utf-8") as out, bar:
        for index, sample in answer(missing):
            n = missing[index]
            samples[n] = {"id": n, "key": keys[n], **sample}
            out.write(json.dumps(samples[n]) + "\n")
            out.flush()
            bar.update()
    on_first(write_samples, file, samples)
    return [samples[n] for n in range(len(keys))]

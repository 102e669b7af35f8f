"""Data: the checkpoint's tokenizer and chat template, readers, recipes, rows rendered to ids and labels, the ledger.

The decision that is not obvious: assistant turns are looked for in the *full* rendering. A template may render a turn
differently once others follow (Qwen3 drops earlier thoughts), so masks made by rendering turn after turn are wrong.
Each turn is replaced by a sentinel instead, which brackets it for any template. Pieces are tokenised one by one and
their ids concatenated, so no token straddles prompt and answer, and a prompt has the ids it will have at generation.
What was rendered is kept on disk and memory-mapped: a million rows take the memory of a thousand, and no second time.

    python data.py show --model Qwen/Qwen3-0.6B --data rows.jsonl --n 3     # rows as rendered, what is scored in colour
    python data.py audit --model Qwen/Qwen3-0.6B --data rows.jsonl          # lengths, what max_length cuts, duplicates
    python data.py mix --model Qwen/Qwen3-0.6B --data a.jsonl@2 b.csv@1 --output mixed.jsonl
    python data.py pairs --model Qwen/Qwen3-0.6B --data ecqa.csv --recipe ecqa --output pairs.jsonl
"""

import csv
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import runpy
import secrets
import sys
import tempfile
import types
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Literal

import jinja2.ext
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from model import IGNORE, Segment
from support.errors import (
    UserError,
    as_user_error,
    brief,
    nearest,
    run_command,
    sanitize,
)
from support.files import read_json, regular_file, unique_keys
from support.hub import COMPANIONS, hub_files, resolve
from support.sandbox import Overrun, bounded
from support.settings import check_range, parse_config


def as_turn(role, content):
    return [{"role": role, "content": content}]


# --- the tokenizer and the chat template ------------------------------------------------------------------------------

# in place of an answer, and around {% generation %}; unguessable, or a row could forge one and move its own mask
SENTINEL, OPEN, CLOSE = (f"\ue000{secrets.token_hex(8)}\ue001" for _ in range(3))


class Generation(jinja2.ext.Extension):
    """The tags `{% generation %} ... {% endgeneration %}`, by which a template says what the model itself writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return OPEN + caller() + CLOSE


class Tokenizer:
    """A checkpoint's `tokenizer.json` with its special tokens, end tokens and chat template. `now`, by default the
    start, is what `strftime_now` tells: Llama 3.2 writes the date into its system turn, so a run that goes on tomorrow
    needs the day it began. UserError: a file is missing or broken. Source: transformers' PreTrainedTokenizerFast."""

    def __init__(self, folder, now=None):
        self.folder, self.now = Path(folder), now or datetime.now()
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{self.folder}: no tokenizer.json in it; give a checkpoint's folder that has one"
            )
        with as_user_error(
            f"{path}: not a tokenizer", Exception
        ):  # the library raises nothing more special
            self.backend = tokenizers.Tokenizer.from_file(str(regular_file(path, 2**28)))
        self.backend.no_truncation()  # the file may carry either from an earlier use
        self.backend.no_padding()
        config = self.read("special_tokens_map.json") | self.read("tokenizer_config.json")
        names = [f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
        tokens = {
            name: t.get("content") if isinstance(t := config.get(name), dict) else t
            for name in names
        }
        self.special = {name: token for name, token in tokens.items() if isinstance(token, str)}
        self.bos_id, eos, self.pad_id = (
            self.backend.token_to_id(self.special.get(name, "")) for name in names[:3]
        )
        added = self.backend.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = {id for id, token in added.items() if token.special}
        ends = [
            self.read(name).get("eos_token_id")
            for name in ("generation_config.json", "config.json")
        ]
        ends = [
            eos,
            *(id for found in ends for id in (found if isinstance(found, list) else [found])),
        ]
        self.eos_ids = list(
            dict.fromkeys(id for id in ends if isinstance(id, int) and 0 <= id < 2**24)
        )
        self.head = self.encode("", special=True)[:1]  # BOS, where texts begin with one
        self.newline = self.encode("\n")
        self.prepends = self.encode("\na") != self.newline + self.encode(
            "a"
        )  # SentencePiece: a space before all

        path, found = self.folder / "chat_template.jinja", config.get("chat_template")
        self.template_file = path if path.exists() else self.folder / "tokenizer_config.json"
        found = (
            regular_file(path, 2**20).read_text(encoding="utf-8", errors="replace")
            if path.exists()
            else found
        )
        found = [{"name": "default", "template": found}] if isinstance(found, str) else found or []
        tags = [Generation, jinja2.ext.loopcontrols]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        # as transformers has it; jinja's own escapes HTML and sorts keys
        env.filters["tojson"] = lambda x, ensure_ascii=False, **more: json.dumps(
            x, ensure_ascii=ensure_ascii, **more
        )
        env.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: self.now.strftime(form),
        }
        fault = f"{self.template_file}: not a chat template, nor a list of them by name"
        with bounded(fault), as_user_error(fault, Exception):
            self.templates = {t["name"]: env.from_string(t["template"]) for t in found}
        self.has_template, self.tells_date = bool(self.templates), "strftime_now" in str(found)

    def read(self, name):
        return read_json(self.folder / name) if (self.folder / name).exists() else {}

    def __len__(self):
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text, special=False):
        """str -> list of ids; `special` applies the tokenizer's own post-processor (Llama's BOS)."""
        return next(self.encode_all([text], special))

    def encode_all(self, texts, special=False):
        """Yields the ids of each text; 2^22 characters are encoded together, on every core, at 170 bytes for each."""
        ends = itertools.accumulate(map(len, texts))
        for _, group in itertools.groupby(zip(texts, ends), lambda pair: pair[1] >> 22):
            group = [text for text, _ in group]
            try:
                found = self.backend.encode_batch_fast(group, add_special_tokens=special)
            except BaseException as error:  # the library's panics are no Exception
                if isinstance(error, (KeyboardInterrupt, Overrun)):
                    raise
                words = f"cannot encode {brief(max(group, key=len))}: {brief(str(error))}"
                raise UserError(f"{self.folder / 'tokenizer.json'}: {words}") from None
            yield from (e.ids for e in found)

    def decode(self, ids, skip_special=True):
        """Ids -> str, without special tokens unless they are asked for."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def render(
        self, messages, /, add_generation_prompt=False, tools=None, keep_marks=False, **kwargs
    ):
        """Messages -> text by the checkpoint's template, which also gets `kwargs`. UserError: none, or it fails."""
        if not self.templates:
            raise UserError(
                f"{self.folder}: no chat template; use prompt/completion or text rows, or a chat model"
            )
        template = self.templates.get(
            "tool_use" if tools and "tool_use" in self.templates else "default"
        )
        if template is None:
            raise UserError(
                f"{self.template_file}: no template is named 'default': {', '.join(self.templates)}"
            )
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        for m in messages:  # reasoning has had three names
            if thought := next(
                (m[key] for key in ("reasoning_content", "thinking", "reasoning") if key in m), None
            ):
                m |= {"thinking": m.get("thinking", thought), "reasoning_content": thought}
        kwargs = self.special | {"tools": tools or None, "documents": None} | kwargs
        fault = f"{self.template_file}: the chat template failed"
        with bounded(fault), as_user_error(fault, Exception):  # untrusted code, untrusted rows
            text = template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **kwargs
            )
        return text if keep_marks else text.replace(OPEN, "").replace(CLOSE, "")

    @cached_property
    def end_ids(self):
        """Ids that end a turn: the end tokens, and what the template writes after an answer (in Qwen3-Base not eos)."""
        tail = ""
        with suppress(UserError):  # no template, or one that insists on a system turn, say
            tail = (
                self.render(as_turn("user", "a") + as_turn("assistant", SENTINEL))
                .partition(SENTINEL)[2]
                .lstrip()
            )
        after = [
            self.added[token]
            for token in sorted(self.added, key=len)[::-1]
            if tail.startswith(token)
        ]
        return list(dict.fromkeys([*self.eos_ids, *after[:1]]))

    @cached_property
    def turn_end(self):
        """Those as a pattern, with the space that a template may leave before them."""
        tokens = sorted(filter(None, map(self.backend.id_to_token, self.end_ids)), key=len)[::-1]
        return r"(?:\s*(?:" + "|".join(map(re.escape, tokens)) + "))+" if tokens else r"(?!)"

    def turns(self, messages, wanted=None, /, **kwargs):
        """The full rendering, and where the model speaks in it, for any template: (text, spans, open).

        spans: (start, end) of each rendered assistant message whose index is in `wanted` (default: all), from the end
        of the generation prompt (so with a <think> that it does not open) through the token that ends the turn; as
        `{% generation %}` marks them, where each turn has one. open: the text ends in an answer without that token."""
        speaks, spans, is_open = (
            [i for i, m in enumerate(messages) if m["role"] == "assistant"],
            [],
            False,
        )
        with bounded(f"{self.template_file}: rendering {len(messages):,} messages"):
            pieces = re.split(f"{OPEN}|{CLOSE}", self.render(messages, keep_marks=True, **kwargs))
            text, at = "".join(pieces), np.cumsum([len(piece) for piece in pieces]).tolist()
            marked = (
                dict(zip(speaks, zip(at[::2], at[1::2])))
                if len(pieces) == 2 * len(speaks) + 1
                else {}
            )
            for i in speaks if wanted is None else [i for i in speaks if i in wanted]:
                span = marked.get(i) or self.find_turn(
                    messages, i, text, spans[-1][1] if spans else 0, **kwargs
                )
                if span is None:
                    continue
                start, end = span
                if not re.compile(self.turn_end + r"\s*\Z").search(text, start, end):
                    if after := re.compile(self.turn_end).match(text, end):
                        end = after.end()
                    elif i == len(messages) - 1:
                        text, is_open = text[:end], True
                spans.append((start, end))
        return text, spans, is_open

    def find_turn(self, messages, i, text, floor, /, **kwargs):
        """(start, end) of assistant message `i` in `text`, not before `floor`; None if the template leaves it out."""
        prompt, seen = SENTINEL, False
        with suppress(UserError):  # of no messages, say, when the assistant speaks first
            prompt = self.render(messages[:i], True, **kwargs)
        # without its tool calls, which are the model's words too; or with them, if the template insists
        for stand_in in (*as_turn("assistant", SENTINEL), messages[i] | {"content": SENTINEL}):
            try:
                other = self.render([*messages[:i], stand_in, *messages[i + 1 :]], **kwargs)
            except UserError:
                continue
            before, mark, after = other.partition(SENTINEL)
            end, seen = len(text) - len(after), seen or bool(mark)
            start = (
                len(prompt)
                if text.startswith(prompt)
                else self.find_start(text, before, floor, **kwargs)
            )
            if mark and start <= end and text.endswith(after):
                calls = "tool_calls" in stand_in and re.compile(self.turn_end).search(text, end)
                return start, calls.end() if calls else end
        if seen:
            fault = f"{self.template_file}: cannot tell where message {i} is in the rendering"
            raise UserError(
                fault
                + "; mark it with {% generation %} in the template, or use prompt/completion rows"
            )
        return None

    def find_start(self, text, before, floor, /, **kwargs):
        """Where a turn that `before` leads up to begins: after the template's header, or as much of it as is there (an
        earlier turn may lack the <think> that the generation prompt opens); beyond the text where nothing fits."""
        ask, same = as_turn("user", "a"), len(os.path.commonprefix([text, before]))
        header = self.render(ask, True, **kwargs).removeprefix(self.render(ask, **kwargs))
        heads = [header[:n] for n in range(len(header), 0, -1) if header[:n] in before[floor:]]
        starts = [before.rfind(head, floor) + len(head) for head in heads]
        return next((start for start in [*starts, len(before)] if start <= same), sys.maxsize)

    def encode_sides(self, rows):
        """[[side, ...], ...], a side [(str or ids, scored), ...] -> yields each, a side (ids, scored), both (T,)."""
        texts, inside, added = [], [], tuple(self.added)
        for sides in rows:
            for side in sides:
                before = (
                    ""
                    if side is sides[0]
                    else "".join(piece for piece, _ in sides[0] if isinstance(piece, str))
                )
                for piece in (piece for piece, _ in side if isinstance(piece, str)):
                    inside.append(self.prepends and piece and before and not before.endswith(added))
                    texts.append(
                        "\n" + piece if inside[-1] else piece
                    )  # no space is prepended after it; it comes off
                    before = piece or before
        batch = (
            ids[len(self.newline) :] if cut else ids
            for ids, cut in zip(self.encode_all(texts), inside)
        )

        def join(side):
            ids = [next(batch) if isinstance(piece, str) else piece for piece, _ in side]
            scored = np.repeat(
                np.array([flag for _, flag in side], bool), [len(piece) for piece in ids]
            )
            return np.array([id for piece in ids for id in piece], np.int32), scored

        yield from ([join(side) for side in sides] for sides in rows)


# --- reading ----------------------------------------------------------------------------------------------------------


def pieces_of(path, lines=True):
    """Yields a file's bytes, unzipped if its name ends in .gz: lines, those above 2^26 bytes in pieces, or pieces."""
    with as_user_error(f"{path}: cannot be read", OSError, EOFError, zlib.error):
        total, size = 0, regular_file(path).stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while piece := (file.readline if lines else file.read)(2**26):
                if (total := total + len(piece)) > max(100 * size, 2**25):
                    raise UserError(
                        f"{path}: unzips to more than a hundred times its size; if you trust it, unzip it"
                    )
                yield piece


def lines_of(path, encoding="utf-8-sig"):
    """Yields (number, line) of a text file as it reads."""
    for number, line in enumerate(pieces_of(path), 1):
        if len(line) == 2**26:
            raise UserError(
                f"{path}:{number}: a line of more than {2**26:,} bytes; a row is a line of its own"
            )
        with as_user_error(f"{path}:{number}: not UTF-8", UnicodeDecodeError):
            line = line.decode(encoding)
        yield number, line


def read_jsonl(path):
    for number, line in lines_of(path):
        if line.strip():
            with as_user_error(f"{path}:{number}: not JSON", ValueError, RecursionError, on=line):
                row = json.loads(line, object_pairs_hook=unique_keys)
            yield f"{path}:{number}", row


def read_text(path):
    with as_user_error(f"{path}: not UTF-8", UnicodeDecodeError):
        return b"".join(pieces_of(path, lines=False)).decode("utf-8-sig")


def read_list(path):
    text = read_text(path)
    try:
        rows = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        why, line = getattr(error, "msg", str(error)), getattr(error, "lineno", 1)
        if why == "Extra data" and text.lstrip().startswith("{"):  # lines under another name
            return read_jsonl(path)
        found = brief("".join(text.splitlines()[line - 1 : line]) or "the end")
        raise UserError(f"{path}:{line}: not JSON: {why}: {found}") from None
    rows = rows.get("data", rows) if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(
            f'{path}: expected a list of rows or {{"data": [...]}}, found {brief(rows)}'
        )
    return ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def read_csv(path):
    csv.field_size_limit(2**31 - 1)
    with as_user_error(f"{path}: not CSV", csv.Error, ValueError):
        rows = csv.DictReader(line for _, line in lines_of(path))
        unique_keys([(name, None) for name in rows.fieldnames or ()])
        for number, row in enumerate(rows):
            if None in row:
                raise UserError(
                    f"{path}[{number}]: more fields than the header's {len(row) - 1}: {brief(row[None])}"
                )
            yield f"{path}[{number}]", row


def read_parquet(path):
    import pyarrow.parquet

    with as_user_error(f"{path}: not a parquet file", pyarrow.ArrowException, OSError, ValueError):
        file = pyarrow.parquet.ParquetFile(path)
        unique_keys([(name, None) for name in file.schema_arrow.names])
        rows = (row for batch in file.iter_batches(256) for row in batch.to_pylist())
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def read_movielens(path, seen=10):
    """MovieLens 100K's u.data with u.item beside it -> a row for each rating that a user gave after the first `seen`:
    {"history": [[title, rating], ...], the `seen` before it; "title", "rating"}."""
    split = lambda path, mark: (
        (n, line.rstrip("\r\n").split(mark)) for n, line in lines_of(path, "latin-1")
    )
    users = {}
    with as_user_error(f"{path}: not tables of MovieLens", ValueError, LookupError):
        titles = {cells[0]: cells[1] for _, cells in split(path.with_name("u.item"), "|")}
        for number, (user, item, rating, when) in split(path, "\t"):
            users.setdefault(user, []).append((int(when), number, [titles[item], int(rating)]))
    for rated in map(sorted, users.values()):
        for n, (_, number, (title, rating)) in enumerate(rated[seen:]):
            history = [pair for *_, pair in rated[n : n + seen]]
            yield f"{path}:{number}", {"history": history, "title": title, "rating": rating}


READERS = {".jsonl": read_jsonl, ".json": read_list, ".csv": read_csv, ".parquet": read_parquet,
           ".data": read_movielens}  # fmt: skip


def kind_of(path):
    return Path(str(path).removesuffix(".gz")).suffix


def find_sources(sources):
    """Sources -> [(name, weight, files), ...], the weight None where no source has one. A source is a file that READERS
    know, .gz too, a folder of them, a glob, or a hub's data set as in `hub_files`; each perhaps with @weight."""
    found = []
    for source in map(str, [sources] if isinstance(sources, (str, Path)) else sources):
        name, mark, weight = source.rpartition("@")
        name, weight = (name, weight) if mark and not Path(source).exists() else (source, None)
        with as_user_error(f"{source}: the weight after @ must be a number above 0", ValueError):
            if weight is not None and not 0 < (weight := float(weight)) < 1e30:
                raise ValueError(weight)
        if not name.strip():
            raise UserError(f"{source!r}: a source of rows has a name")
        path = Path(name)
        if path.is_dir():
            paths = sorted(file for file in path.iterdir() if kind_of(file) in READERS)
        elif path.exists() or not (paths := sorted(map(Path, glob.glob(name, recursive=True)))):
            hub = kind_of(path) not in READERS and re.fullmatch(
                r"[\w.-]+/[\w.-]+(#[\w.-]+)?(:[\w.-]+){0,2}", name
            )
            paths = (
                hub_files(name, lambda file: kind_of(file) in READERS)
                if hub and not path.exists()
                else [path]
            )
        for path in paths:
            if not regular_file(path).exists():
                raise UserError(f"{path}: no such file{nearest(path, path.parent.glob('*'))}")
            if kind_of(path) not in READERS:
                raise UserError(
                    f"{path}: not a known kind of file; known are {', '.join(READERS)}, each also with .gz"
                )
        found.append((name, weight, paths))
    weighted = any(weight for _, weight, _ in found)
    return [(name, weight or 1.0 if weighted else None, paths) for name, weight, paths in found]


def stream_rows(sources):
    """Yields (where: 'file:line' or 'file[index]', row, number of its source) of what `find_sources` returns."""
    for number, (name, _, paths) in enumerate(sources):
        where = None
        for where, row in (found for path in paths for found in READERS[kind_of(path)](path)):
            if not isinstance(row, dict):
                raise UserError(f"{where}: a row is an object, found {brief(row)}")
            yield where, row, number
        if where is None:
            raise UserError(f"{name}: no rows in it")


def read_rows(source):
    """[(where, row), ...] of a source, see `find_sources`."""
    return [(where, row) for where, row, _ in stream_rows(find_sources(source))]


# --- rows to pieces of text -------------------------------------------------------------------------------------------

SCHEMAS = ["messages", "conversations", "prompt completion", "prompt chosen rejected", "chosen rejected",
           "instruction output", "text"]  # fmt: skip
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}


def text_of(row, key):
    if not isinstance(row[key], str):
        raise UserError(f"'{key}' must be a string, found {brief(row[key])}")
    return row[key]


def messages_of(row, key):
    """A row's messages as templates want them: ShareGPT's names mapped, parts of text joined, None left out."""
    if not isinstance(row[key], list) or not row[key]:
        raise UserError(f"'{key}' must be a list of messages, found {brief(row[key])}")
    messages = []
    for i, given in enumerate(row[key]):
        if not isinstance(given, dict):
            raise UserError(
                f"{key}[{i}] must be a message with role and content, found {brief(given)}"
            )
        m = {name: value for name, value in given.items() if value is not None}
        if "from" in m:
            m = {"role": SHAREGPT.get(str(m["from"]), m["from"]), "content": m.get("value")}
        content = m.get("content")
        if isinstance(content, list) and all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in content
        ):
            m["content"] = content = "".join(part["text"] for part in content)
        if not isinstance(m.get("role"), str):
            raise UserError(f"{key}[{i}] has no role: {brief(given)}")
        if (
            not isinstance(content, str)
            and not m.get("tool_calls")
            and (content is None or m["role"] == "assistant")
        ):
            raise UserError(
                f"{key}[{i}] ({m['role']}) must have text as its content, found {brief(content)}"
            )
        messages.append(m)
    return messages


def split_row(row, chat, preference=False):
    """A row -> (prompt, answers): strings, or lists of messages if the row has such (Alpaca if `chat`). The prompt of a
    text or conversation is empty; answers are one, or chosen and rejected."""
    has = {key for key, value in row.items() if value is not None}
    schemas = [schema for schema in SCHEMAS if not preference or "chosen" in schema]
    keys = next((schema.split() for schema in schemas if has.issuperset(schema.split())), None)
    if keys is None:
        there = f"it has {', '.join(sorted(map(str, has)))[:200]}" if has else "it is empty"
        wanted = ", ".join(schema.replace(" ", "+") for schema in schemas)
        raise UserError(f"fits no schema: {there}; wanted is one of {wanted}")
    if keys == ["text"]:
        return "", [text_of(row, "text")]
    system = as_turn("system", text_of(row, "system")) if row.get("system") else []
    if len(keys) == 1:
        return [], [(system if keys == ["conversations"] else []) + messages_of(row, keys[0])]
    if keys[0] == "instruction":
        instruction, output, given = (
            text_of(row, key) if row.get(key) else "" for key in (*keys, "input")
        )
        if chat:
            return system + as_turn("user", f"{instruction}\n{given}" if given else instruction), [
                as_turn("assistant", output)
            ]
        return alpaca(row)["prompt"], [output]
    if any(isinstance(row[key], list) for key in keys):
        roles = ["user" if key == "prompt" else "assistant" for key in keys]
        sides = [
            as_turn(r, row[k]) if isinstance(row[k], str) else messages_of(row, k)
            for r, k in zip(roles, keys)
        ]
    else:
        sides = [text_of(row, key) for key in keys]
    if keys[0] == "prompt":
        prompt, *answers = sides
        if isinstance(prompt, list):  # some sets say the prompt again in the answers
            answers = [
                side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in answers
            ]
        return prompt, answers
    same = next((n for n, (a, b) in enumerate(zip(*sides)) if a != b), min(map(len, sides)))
    prompt = sides[0][
        :same
    ]  # what both sides begin with; in a text the last space belongs to the answer
    prompt = prompt[: max(prompt.rfind(" "), 0)] if isinstance(prompt, str) else prompt
    return prompt, [side[len(prompt) :] for side in sides]


def to_pieces(
    row, tokenizer, completion_only_loss=None, assistant_only_loss=True, preference=False
):
    """A row -> its sides, each a list of (text or ids, scored): one side, or prompt, chosen, rejected if `preference`;
    or why it is of no use (str). Scored are, in TRL's names, every assistant turn of a conversation
    (`assistant_only_loss`, here the default) or its last alone (`completion_only_loss` true), a completion without its
    prompt (unless `completion_only_loss` is false), all of a text; after each answer the token that ends the turn."""
    prompt, answers = split_row(row, tokenizer.has_template, preference)
    if preference and answers[0] == answers[1]:
        return "chosen and rejected are the same"
    if preference and not prompt:
        return "chosen and rejected share no prompt"
    answers, eos = answers if preference else answers[:1], (tokenizer.eos_ids[:1], True)
    whole = completion_only_loss is False and not preference  # the prompt is scored too
    if isinstance(prompt, str):
        ask = [(tokenizer.head, False), (prompt, whole)]
        said = tokenizer.special.get("eos_token")  # some sets end their answers themselves
        sides = [[(side, True)] + [eos] * (not said or not side.endswith(said)) for side in answers]
        return [ask, *sides] if preference else [ask + sides[0]]
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or kwargs.keys() & {
        "messages",
        "add_generation_prompt",
        "keep_marks",
    }:
        raise UserError(
            f"'chat_template_kwargs' must be an object of the template's variables, found {brief(kwargs)}"
        )
    if row.get("tools"):
        with as_user_error(
            "'tools' must be a list or one in JSON", ValueError, RecursionError, on=row["tools"]
        ):
            kwargs = kwargs | {
                "tools": json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
            }
    sides = []
    for answer in answers:
        messages, first = prompt + answer, 0 if whole else len(prompt)
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        wanted = wanted[-1:] if completion_only_loss and not prompt else wanted
        text, spans, is_open = tokenizer.turns(messages, wanted, **kwargs)
        rest = not assistant_only_loss and not first  # whether what nobody answered is scored too
        cuts = [0, *(at for span in spans for at in span), len(text)]
        side = [
            (text[start:end], rest or n % 2 == 1)
            for n, (start, end) in enumerate(zip(cuts, cuts[1:]))
        ]
        sides.append(side + [eos] * is_open)
    return [[], *sides] if preference else sides


# --- recipes: plain functions of a data set's own row, to a row of a schema above -------------------------------------

LETTERS = "ABCDEFGHIJ"
STYLES = ("{A}.", "{A})", "({A})", "{A} –", "{a})", "{n}.", "•")
INTRODUCTIONS = ("Here is a multiple-choice question about {topic}.", "Which of the choices answers this question?",
                 "Read the question, then give the one right choice.")  # fmt: skip
ALPACA = (  # tatsu-lab/stanford_alpaca, train.py
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{given}\n\n### Response:"
)


def question_of(row):
    """(question, choices, index of the right one, rationale or "") of a multiple-choice row: ECQA's columns, the hub's
    (ARC, CommonsenseQA), or {"question", "choices": [...], "answer": its text, letter or index}."""
    choices = [row[f"q_op{n}"] for n in range(1, 6)] if "q_text" in row else row["choices"]
    labels, choices = (
        (choices["label"], choices["text"]) if isinstance(choices, dict) else (LETTERS, choices)
    )
    answer = next(
        (row[key] for key in ("answerKey", "q_ans", "answer") if row.get(key) is not None),
        "no answer",
    )
    known = (labels, choices) if "answerKey" in row else (choices, labels)
    places = (list(names).index(answer) for names in known if answer in names)
    right = answer if type(answer) is int else next(places, -1)
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise ValueError("the choices are not a list of texts")
    if not 0 <= right < len(choices) <= len(LETTERS):
        raise ValueError(f"{answer} is not one of the choices")
    why = next(
        (row[key] for key in ("rationale", "explanation", "taskB", "support") if row.get(key)), ""
    )
    return row["q_text"] if "q_text" in row else row["question"], choices, right, why.strip()


def mcqa(row, rng, cot=1.0, topic=""):
    """question, choices, answer, perhaps rationale -> a text, asked in one of three ways with labels of one style, the
    rationale as a thought in it at probability `cot`; the answer alone is scored."""
    question, choices, right, why = question_of(row)
    topic, style = topic or row.get("dataset") or "any topic", rng.choice(STYLES)
    lines = [
        f"{style.format(A=A, a=A.lower(), n=n)} {text}"
        for n, (A, text) in enumerate(zip(LETTERS, choices), 1)
    ]
    answers = choices if style == STYLES[-1] else lines
    thought = f"\nSolve step-by-step.\n<think> {why} </think>" if why and rng.random() < cot else ""
    prompt = (
        "\n".join([rng.choice(INTRODUCTIONS).format(topic=topic), question, *lines])
        + f"{thought}\n Answer:"
    )
    return {
        "prompt": prompt,
        "completion": f" {answers[right]}",
        "choices": answers,
        "answer": answers[right],
    }


def ecqa(row):
    """question, choices, answer, explanation -> the explanation, then `Answer: X`."""
    question, choices, right, why = question_of(row)
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))]
    ask = as_turn(
        "user",
        "\n".join([*lines, "Explain, then end with `Answer:` and the letter of your choice."]),
    )
    return {"prompt": ask, "completion": as_turn("assistant", f"{why}\nAnswer: {LETTERS[right]}".strip()),
            "choices": [*LETTERS[: len(choices)]], "answer": LETTERS[right]}  # fmt: skip


def alpaca(row):
    """instruction, output, perhaps input -> Stanford Alpaca's text, whatever template there is."""
    given = row.get("input") or ""
    paired = ", paired with an input that provides further context" if given else ""
    given = f"\n\n### Input:\n{given}" if given else ""
    prompt = ALPACA.format(paired=paired, instruction=row["instruction"], given=given)
    return {"prompt": prompt, "completion": row["output"]}


def chatml(row):
    """messages, or text in ChatML's markup -> messages, for the model's own template."""
    if "messages" in row or "text" not in row:
        return row
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", row["text"], re.S)
    return {"messages": [message for turn in found for message in as_turn(*turn)]}


def movielens(row, liked=4):
    """history, title, rating (as of `read_movielens`), or instruction, output -> Yes or No: is it `liked` or better?"""
    if "instruction" in row:
        return row | {
            "output": (said := row["output"].strip(" .")),
            "choices": ["Yes", "No"],
            "answer": said,
        }
    sides = [
        [title for title, rating in row["history"] if (rating >= liked) == side]
        for side in (True, False)
    ]
    ask, answer = "Liked films: {}\nDisliked films: {}\n", "Yes" if row["rating"] >= liked else "No"
    ask = ask.format(*("; ".join(side) or "none" for side in sides))
    return {"prompt": as_turn("user", f"{ask}Will this viewer like {row['title']}? Answer Yes or No."),
            "completion": as_turn("assistant", answer), "choices": ["Yes", "No"], "answer": answer}  # fmt: skip


def ultrafeedback(row, rng):
    """prompt, chosen, rejected, or instruction, completions with scores -> a conversation's best end, and a worse."""
    if "completions" in row:
        *others, best = sorted(row["completions"], key=lambda one: float(one["overall_score"]))
        if not (
            others := [
                one for one in others if float(one["overall_score"]) < float(best["overall_score"])
            ]
        ):
            return "all completions are rated alike"
        worse = others[rng.integers(len(others))]
        row = {
            "prompt": row["instruction"],
            "chosen": best["response"],
            "rejected": worse["response"],
        }
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {
        key: row[key] if isinstance(row[key], list) else as_turn(role, row[key])
        for key, role in roles.items()
    }


def gsm8k(row, mark="Answer:"):
    """question, answer -> the reasoning without its calculator notes, then `mark` and the number."""
    why, answer = re.sub(r"<<.*?>>", "", row["answer"]).split("####")
    ask, answer = as_turn("user", row["question"]), answer.strip()
    return {
        "prompt": ask,
        "completion": as_turn("assistant", f"{why.strip()}\n{mark} {answer}"),
        "answer": answer,
    }


RECIPES = {
    recipe.__name__: recipe
    for recipe in (mcqa, ecqa, alpaca, chatml, movielens, ultrafeedback, gsm8k)
}


def use_recipe(name, args, seed):
    """(make(row, epoch=0) -> the row that the recipe makes of it, or why it is left out (str); whether it draws). What
    it draws follows from (seed, epoch, the row): the same after a resume, and whatever else is in the data."""
    if not name:
        return (lambda row, epoch=0: row), False
    if name not in RECIPES:
        raise UserError(
            f"recipe: {name!r} is not one of {', '.join(RECIPES)}{nearest(name, RECIPES)}"
        )
    recipe, args, (_, *takes) = RECIPES[name], args or {}, signature(RECIPES[name]).parameters
    draws, takes = "rng" in takes, [key for key in takes if key != "rng"]
    if odd := [key for key in args if key not in takes]:
        raise UserError(f"recipe_args: {name} takes no {odd[0]!r}{nearest(odd[0], takes)}")
    wanted = " ".join(recipe.__doc__.partition("->")[0].split())
    faults = LookupError, TypeError, ValueError, AttributeError, StopIteration

    def make(row, epoch=0):
        key = draws and zlib.crc32(json.dumps(row, default=str).encode())
        with as_user_error(f"does not fit recipe {name} ({wanted})", *faults, on=row):
            made = recipe(row, *[np.random.default_rng([seed, epoch, key])] * draws, **args)
        return made if isinstance(made, str) else {"weight": row.get("weight")} | made

    return make, draws


# --- pieces to segments -----------------------------------------------------------------------------------------------


def fit(ids, scored, room, special):
    """ids, scored (T,) -> the same in at most `room` tokens; None where the last answer does not fit. The prompt gives
    way from its left, but for a first token that is one of the `special`; one token always stays, to predict the
    answer's first. An earlier answer that loses its prompt is no longer scored. A text is cut at its end."""
    if len(ids) <= room:
        return ids, scored
    keep = int(int(ids[0]) in special)
    last = (
        int(np.flatnonzero(scored)[-1]) + 1 if scored.any() else len(ids)
    )  # nothing is learnt from what follows
    gaps = np.flatnonzero(~scored[:last])
    if not len(gaps) or gaps[-1] < keep:
        return ids[:room], scored[:room]
    if last - gaps[-1] > room:
        return None
    start = max(last - room + keep, keep)
    if keep < start < gaps[-1] and scored[start]:
        scored = scored & (np.arange(len(ids)) >= start + int(np.argmin(scored[start:])))
    return np.concatenate([ids[:keep], ids[start:last]]), np.concatenate(
        [scored[:keep], scored[start:last]]
    )


def share_prompt(sides):
    """Encoded sides; of a pair's, the unscored tokens that both answers begin with are moved to the prompt."""
    (ids, scored), *answers = sides
    heads = [np.where(flags, -n, side).tolist() for n, (side, flags) in enumerate(answers, 1)]
    if not (same := len(os.path.commonprefix(heads))):
        return sides
    prompt = np.append(ids, answers[0][0][:same]), np.append(scored, answers[0][1][:same])
    return [prompt, *((side[same:], flags[same:]) for side, flags in answers)]


def assemble(sides, tokenizer, max_length=None):
    """Encoded sides -> an example's parts, int32 (T,) with ~id where a token is not scored; or why there are none."""
    (ids, scored), *answers = sides
    if any(set(side[flags].tolist()) <= set(tokenizer.end_ids) for side, flags in answers or sides):
        return "nothing scored"
    room = (max_length or sys.maxsize) - max((len(side) for side, _ in answers), default=0)
    if (fitted := fit(ids, scored, room, tokenizer.special_ids)) is None or len(fitted[0]) == 0:
        return "answer longer than max_length"
    first, *rest = [np.where(scored, ids, ~ids) for ids, scored in (fitted, *answers)]
    first[0] = min(first[0], ~first[0])  # nothing predicts a first token
    return [first, *rest]


def to_segments(parts, weight):
    """An example's parts -> its Segments: one, or a prompt and what continues it."""
    parts = [
        (np.where(ids < 0, ~ids, ids), np.where(ids < 0, np.int32(IGNORE), ids)) for ids in parts
    ]
    return [Segment(*part, 0 if n else -1, max(n - 1, 0), weight) for n, part in enumerate(parts)]


def render_rows(rows, tokenizer, max_length=None, make=None, **options):
    """[(where, row), ...] -> per row (parts as of `assemble` or why it is dropped, weight, tokens before truncation,
    scored ones). `make` is a recipe's, `options` as in `to_pieces`. UserError: `where` a row is malformed, and how."""
    laid = []
    for where, row, *_ in rows:
        with as_user_error(where, UserError):
            row = make(row) if make else row
            dropped = isinstance(row, str)
            weight = 1.0 if dropped or row.get("weight") is None else row["weight"]
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not 0 <= weight < 1e30
            ):
                raise UserError(f"'weight' must be a number of at least 0, found {brief(weight)}")
            sides = row if dropped else to_pieces(row, tokenizer, **options)
            pieces = (
                [] if isinstance(sides, str) else [piece for side in sides for piece, _ in side]
            )
            with as_user_error(
                "half a surrogate pair in its text, which was cut inside a character",
                UnicodeEncodeError,
            ):
                "".join(piece for piece in pieces if isinstance(piece, str)).encode()
        laid.append((sides, float(weight)))
    encoded = tokenizer.encode_sides([sides for sides, _ in laid if not isinstance(sides, str)])
    for sides, weight in laid:
        if isinstance(sides, str):
            yield sides, weight, 0, 0
            continue
        sides = share_prompt(next(encoded))
        tokens, scored = (
            sum(len(ids) for ids, _ in sides),
            sum(int(flags.sum()) for _, flags in sides),
        )
        yield (
            assemble(sides, tokenizer, max_length),
            weight,
            tokens,
            scored - int(sides[0][1][:1].sum()),
        )


def render_row(row, tokenizer, max_length=None, where="row", **options):
    """One row -> list[Segment], or why it is dropped (str). Options as in `to_pieces`, truncation as in `fit`."""
    found, weight, *_ = next(render_rows([(where, row)], tokenizer, max_length, **options))
    return found if isinstance(found, str) else to_segments(found, weight)


# --- the ledger, and examples on disk ---------------------------------------------------------------------------------


class Ledger(types.SimpleNamespace):
    """What became of every row and token: rows = examples + rows_dropped + rows_not_sampled, tokens = scored + masked +
    truncated + dropped. rows_ended: examples that score an end of turn; truncated_scored: truncated tokens that would
    have been scored; reasons: {why dropped: {"rows", "tokens", "where": the first few}}; crc: of the examples."""

    COUNTS = ("rows", "examples", "rows_dropped", "rows_not_sampled", "rows_truncated", "rows_ended", "tokens",
              "scored", "masked", "truncated", "truncated_scored", "dropped", "crc")  # fmt: skip

    def __init__(self, **known):
        super().__init__(**dict.fromkeys(self.COUNTS, 0) | {"reasons": {}, "sources": []} | known)

    def add(self, where, found, tokens, scored, ends):
        """Enters a row as `render_rows` yields it; `ends`: the ids that end a turn."""
        new = {"rows": 1, "tokens": tokens}
        if isinstance(found, str):
            new |= {"rows_dropped": 1, "dropped": tokens}
            reason = self.reasons.setdefault(found, {"rows": 0, "tokens": 0, "where": []})
            reason["where"] += [where] * (reason["rows"] < 5)
            reason |= {"rows": reason["rows"] + 1, "tokens": reason["tokens"] + tokens}
        else:
            ids = np.concatenate(found)
            kept = ids[ids >= 0].tolist()
            new |= {"examples": 1, "scored": len(kept), "masked": len(ids) - len(kept), "truncated": tokens - len(ids),
                    "truncated_scored": scored - len(kept), "rows_truncated": len(ids) < tokens,
                    "rows_ended": not ends.isdisjoint(kept)}  # fmt: skip
        for name, count in new.items():
            vars(self)[name] += count

    def check(self):
        """UserError where this would teach nothing, or never to stop."""
        if not self.scored:
            raise UserError(
                f"nothing to train on: no token of {self.rows} rows is scored{self.why()}"
            )
        if not self.rows_ended:
            raise UserError(
                "no row scores the end of a turn, so the model would never learn to stop: raise max_length"
            )

    def why(self):
        return "".join(
            f"; {why}: {found['rows']:,}, as {found['where'][0]}"
            for why, found in self.reasons.items()
        )

    def as_dict(self):
        return dict(vars(self))

    def __str__(self):
        counts = [
            (getattr(self, name), name) for name in ("scored", "masked", "truncated", "dropped")
        ]
        shares = [f"{n:,} {name} ({n / max(self.tokens, 1):.1%})" for n, name in counts if n]
        text = f"{self.rows:,} rows: {self.examples:,} examples"
        text += f", {self.rows_truncated:,} cut to max_length" * bool(self.rows_truncated)
        text += f", {self.rows_dropped:,} dropped{self.why()}" * bool(self.rows_dropped)
        text += f", {self.rows_not_sampled:,} not sampled" * bool(self.rows_not_sampled)
        seen = " · ".join(
            f"{s['share']:.1%} from {s['name']} ({s['examples']:,})" for s in self.sources
        )
        text += f"\nof the rows seen {seen}" * (len(self.sources) > 1)
        return f"{text}\n{self.tokens:,} tokens: {' · '.join(shares)}"


# an example in data.bin: its parts as of `assemble`, its place and row in JSON; `at`: where each begins, the last ends
LAYOUT = np.dtype([("at", np.int64, 5), ("weight", float), ("source", np.int64)])


@dataclass(eq=False)
class Examples(Sequence):
    """Examples on disk, memory-mapped: those of `folder` that `at` (N,) names, as epoch `number` sees them; or the rows
    they came from. Where the recipe draws, an epoch after the first is rendered when it is asked for, and a rendering
    that does not fit gives way to the first epoch's."""

    folder: Path
    at: np.ndarray
    shares: (
        list  # of the rows seen that are expected from each source; [] where every row is seen once
    )
    seed: int
    make: object  # the recipe: (row, epoch) -> row
    render: object  # where that draws: row -> list[Segment], or why not
    number: int = 0
    as_rows: bool = False

    @cached_property
    def files(self):
        return np.memmap(self.folder / "index.bin", LAYOUT, "r"), np.memmap(
            self.folder / "data.bin", np.uint8, "r"
        )

    def __len__(self):
        return len(self.at)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(len(self))[i]]
        index, data = self.files
        (*at, _), weight, _ = index[self.at[i]]
        if self.as_rows or self.number and self.render:
            row = self.make(self.row(i)[1], self.number)
            found = row if self.as_rows or isinstance(row, str) else self.render(row)
            if not isinstance(found, str):
                return found
        return to_segments(
            [data[a:b].view(np.int32) for a, b in itertools.pairwise(at) if a < b], float(weight)
        )

    def row(self, i):
        """(where it stands, as 'file:line', the row as it was read) of example `i`."""
        index, data = self.files
        return json.loads(data[slice(*index["at"][self.at[i], -2:])].tobytes())

    def epoch(self, number):
        """As many as epoch `number` sees: of a source with a weight all as often as fits its share, the rest drawn."""
        at, draw = self.at, np.random.default_rng([self.seed, number]).permutation
        if self.shares:
            groups = [at[self.files[0]["source"][at] == n] for n in range(len(self.shares))]
            ends = np.cumsum(
                [share * (len(group) > 0) for group, share in zip(groups, self.shares)]
            )
            counts = np.diff(np.round(ends / ends[-1] * len(at)).astype(int), prepend=0)
            parts = [
                (group, *divmod(count, max(len(group), 1))) for group, count in zip(groups, counts)
            ]
            at = np.concatenate(
                [part for g, times, rest in parts for part in [g] * times + [draw(g)[:rest]]]
            )
        return replace(self, at=at, number=number)

    @property
    def fingerprint(self):
        """Changes when the examples do."""
        return f"{len(self)}-{zlib.crc32(self.at.tobytes(), read_json(self.folder / 'ledger.json')['crc']):08x}"


def write_examples(folder, rows, ledger, tokenizer, **options):
    """Renders (where, row, number of its source) into a new folder, which takes its name when it is whole."""
    end, ends = 0, set(tokenizer.end_ids)
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = iter(
        tqdm(rows, "tokenising", unit=" rows", disable=not sys.stderr.isatty(), leave=False)
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as aside:
        while chunk := list(itertools.islice(rows, 256)):
            data, index = [], []
            for (where, row, source), (found, weight, *counts) in zip(
                chunk, render_rows(chunk, tokenizer, **options)
            ):
                ledger.add(where, found, *counts, ends)
                if not isinstance(found, str):
                    parts = [part.tobytes() for part in found] + [b""] * (3 - len(found))
                    data += [*parts, json.dumps([where, row], default=str).encode()]
                    *at, end = itertools.accumulate(map(len, data[-4:]), initial=end)
                    index.append(([*at, end], weight, source))
                    ledger.sources[source]["examples"] += 1
            for name, part in (
                ("data", b"".join(data)),
                ("index", np.array(index, LAYOUT).tobytes()),
            ):
                with open(f"{aside}/{name}.bin", "ab") as file:
                    file.write(part)
                ledger.crc = zlib.crc32(part, ledger.crc)
        Path(aside, "ledger.json").write_text(json.dumps(ledger.as_dict()))
        with suppress(OSError):  # another process may have been first
            os.rename(aside, folder)


def load_examples(
    sources, tokenizer, *, max_samples=None, seed=0, recipe="", recipe_args=None, **options
):
    """Sources as in `find_sources` -> (Examples, their rows, ledger). `max_samples` rows are drawn by `seed` and keep
    their order; `recipe` as in `use_recipe`, `options` (`max_length`, ...) as in `render_rows`. Kept in
    $PLAINTUNE_CACHE (~/.cache/plaintune) under a hash of all they follow from, so that a second start renders nothing.
    UserError: a file or row is wrong; nothing, or no end of turn, is scored."""
    sources, (make, draws) = find_sources(sources), use_recipe(recipe, recipe_args, seed)
    known = [max_samples, recipe, recipe_args, options, (draws or max_samples is not None) and seed]
    digest = hashlib.blake2b(
        repr((known, tokenizer.tells_date and f"{tokenizer.now:%F}")).encode(), digest_size=16
    )
    files = [
        Path(__file__),
        *(file for name in COMPANIONS if (file := tokenizer.folder / name).is_file()),
    ]
    for path in files + [path for _, _, paths in sources for path in paths]:
        digest.update(str(path).encode())
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
    folder = (
        Path(os.environ.get("PLAINTUNE_CACHE", "~/.cache/plaintune")).expanduser()
        / digest.hexdigest()
    )
    if not (folder / "ledger.json").exists():
        ledger, rows = (
            Ledger(sources=[{"name": name, "examples": 0} for name, _, _ in sources]),
            stream_rows(sources),
        )
        if max_samples is not None:
            total = sum(1 for _ in stream_rows(sources))
            picked = set(np.random.default_rng(seed).permutation(total)[:max_samples].tolist())
            rows = (row for n, row in enumerate(rows) if n in picked)
            ledger.rows = ledger.rows_not_sampled = total - len(picked)
        write_examples(folder, rows, ledger, tokenizer, make=make, **options)
    ledger = Ledger(**read_json(folder / "ledger.json"))
    ledger.check()
    shares = [
        weight or source["examples"] for source, (_, weight, _) in zip(ledger.sources, sources)
    ]
    for source, share in zip(ledger.sources, shares):
        source["share"] = share / sum(shares)
    render = (lambda row: render_row(row, tokenizer, **options)) if draws else None
    examples = Examples(
        folder, np.arange(ledger.examples), shares if sources[0][1] else [], seed, make, render
    )
    return examples, replace(examples, as_rows=True), ledger


def split_holdout(examples, rows, size, seed=0):
    """-> (examples, rows), (held-out examples, their rows), drawn by `seed`; `size` is a share below 1 or a count."""
    held = round(size * len(examples)) if 0 < size < 1 else int(size)
    if not 0 <= held < len(examples):
        raise UserError(
            f"cannot hold out {size} of {len(examples)} examples; give a share below 1 or a smaller count"
        )
    out = np.isin(
        np.arange(len(examples)), np.random.default_rng(seed).permutation(len(examples))[:held]
    )
    return [
        tuple(replace(part, at=part.at[where]) for part in (examples, rows))
        for where in (~out, out)
    ]


# --- answers in what was rendered --------------------------------------------------------------------------------------


def find_answer(text):
    """What stands behind the last 'Answer:', or None: a letter ('B', '(B)', 'B. dog'), else the rest of the line."""
    if not (found := re.findall(r"[Aa]nswer:[ \t]*(\S.*)", text)):
        return None
    letter = re.match(r"\(?([A-Z])(?![\w'])", found[-1])
    return letter[1] if letter else found[-1].strip().rstrip(".")


def split_prompt(example):
    """(prompt ids, reference ids); the reference is the last run of scored tokens, of a pair its chosen answer."""
    ids, labels = (
        np.concatenate(parts) for parts in zip(*((s.ids, s.labels) for s in example[:2]))
    )
    masked = labels == IGNORE
    stop = int(np.flatnonzero(~masked)[-1]) + 1
    start = int((np.flatnonzero(masked[:stop])[-1:] + 1).sum())
    return ids[:start].tolist(), ids[start:stop].tolist()


def texts_of(choices):
    """A row's choices, if they are a list of texts; else none."""
    return (
        choices
        if isinstance(choices, list) and all(isinstance(text, str) for text in choices)
        else []
    )


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    model: str  # folder or hub id whose tokenizer and chat template render the rows
    data: list[str]  # files, folders, globs or data sets of the hub, each perhaps with @weight
    recipe: str = ""  # reads a data set's own rows: mcqa, ecqa, alpaca, chatml, movielens, ultrafeedback, gsm8k
    recipe_args: dict = field(default_factory=dict)  # its arguments
    preference: bool = False  # rows are prompt, chosen and rejected
    max_length: int | None = None  # tokens; what is longer loses the start of its prompt
    max_samples: int | None = None  # use this many rows, drawn by seed
    seed: int = 42  # of whatever is drawn
    output: str = ""  # file to write: the rows of mix and pairs, in JSONL; audit's histogram, a PNG
    n: int = 3  # show: so many rows
    by: Literal["tokens", "characters"] = "tokens"  # audit: what is counted
    generate: bool = False  # pairs: reject wrong answers that the model gives, not wrong choices
    max_new_tokens: int = 256  # pairs: the longest of those answers
    temperature: float = 0.8  # pairs: at which they are drawn

    def __post_init__(self):
        check_range(self, 1, "max_length", "max_samples")
        check_range(self, 0, "n", "seed", "temperature")
        check_range(self, 1, "max_new_tokens", most=2**20)


def load_rows(config, **options):
    """(tokenizer, examples, rows, ledger) of a command's settings."""
    plain = (Path(config.model) / "tokenizer.json").is_file()  # a tokenizer's folder will do
    tokenizer = Tokenizer(config.model if plain else resolve(config.model))
    names = ("max_length", "max_samples", "seed", "recipe", "recipe_args", "preference")
    return tokenizer, *load_examples(
        config.data, tokenizer, **{n: getattr(config, n) for n in names} | options
    )


def show(config):
    """Rows as the model sees them, what is scored in green, or between ⟦ ⟧ where there is no terminal."""
    tokenizer, examples, _, ledger = load_rows(config)
    start, stop = ("\033[32m", "\033[0m") if sys.stdout.isatty() else "⟦⟧"
    for example in examples[: config.n]:
        for segment in example:
            scored = segment.labels != IGNORE
            for run in np.split(np.arange(len(scored)), np.flatnonzero(np.diff(scored)) + 1):
                piece = sanitize(tokenizer.decode(segment.ids[run], skip_special=False))
                print(start + piece + stop if scored[run].any() else piece, end="")
        print("\n")
    print(ledger)


def audit(config):
    """How long examples are, what max_length cuts, what is there twice, whether each teaches where to stop."""
    from matplotlib.figure import Figure

    if not (config.output or ".png").endswith(".png"):
        raise UserError(f"--output {config.output}: a histogram is a .png")
    tokenizer, examples, _, ledger = load_rows(config, max_length=None)
    count = (
        len if config.by == "tokens" else lambda ids: len(tokenizer.decode(ids, skip_special=False))
    )
    sizes, seen = [], set()
    for example in examples:
        scored, (prompt, *ends) = (
            [s.ids[s.labels != IGNORE] for s in example],
            [s.ids for s in example],
        )
        size = lambda count: count(prompt) + max(map(count, ends), default=0)
        sizes.append((size(count), sum(map(count, scored)), size(len)))
        seen.add(hash(b"".join(ids.tobytes() for ids in (prompt, *ends))))
    sizes = np.array(sizes)
    names, points = (
        ["min", "mean", "max", "p50", "p90", "p95", "p99", "p100"],
        [0, 100, 50, 90, 95, 99, 100],
    )
    print(config.by.ljust(12), *(f"{name:>8}" for name in names))
    for name, column in zip(("example", "scored"), sizes.T):
        found = np.insert(np.percentile(column, points), 1, column.mean())
        print(name.ljust(12), *(f"{x:8.1f}".replace(".0", "  ") for x in found))
    fits = int(-(-np.percentile(sizes[:, 2], 99) // 64) * 64)
    print(
        f"suggested max_length: {fits} tokens, which leaves {(sizes[:, 2] <= fits).mean():.1%} of the examples whole"
    )
    print(
        f"with max_length {config.max_length or fits}: {load_rows(config, max_length=config.max_length or fits)[3]}"
    )
    print(
        f"{len(examples) - len(seen):,} duplicates; {ledger.rows_ended:,} of {len(examples):,} score an end of turn"
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    figure.add_subplot(xlabel=f"{config.by} of an example", ylabel="examples").hist(
        sizes[:, 0], bins=60
    )
    figure.savefig(config.output or "lengths.png", dpi=130, format="png")
    print(f"histogram: {config.output or 'lengths.png'}")


def mix(config):
    """All sources' rows as the recipe makes them, shuffled in one file, each source's share as its weight says."""
    *_, rows, ledger = load_rows(config)
    rows = rows.epoch(0)
    return (
        rows[i] for i in np.random.default_rng(config.seed).permutation(len(rows))
    ), f"{len(rows):,} rows: {ledger}"


COMMANDS = {command.__name__: command for command in (show, audit, mix)}


def write_rows(config, make):
    """Writes the rows of make(config) -> (rows, a line that sums them up) to --output, a new file."""
    if not config.output or Path(config.output).exists():
        fault = "exists already" if config.output else "is needed"
        raise UserError(f"--output {config.output}: {fault}; name a new one")
    rows, summary = make(config)
    with open(f"{config.output}.partial", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.rename(file.name, config.output)
    print(f"{config.output}: {summary}")


def main():
    command, *argv = sys.argv[1:] or [""]
    if command == "pairs":  # a model answers there, so it stands in eval.py
        return runpy.run_path(str(Path(__file__).with_name("eval.py")), run_name="__main__")
    if command not in COMMANDS:
        usage = f"python data.py {'|'.join([*COMMANDS, 'pairs'])} --model MODEL --data SOURCE ... (--help says more)"
        raise UserError(
            f"unknown command {command!r}{nearest(command, [*COMMANDS, 'pairs'])}; usage: {usage}"
        )
    config = parse_config(DataConfig, argv, COMMANDS[command].__doc__)
    if command == "mix":
        write_rows(config, mix)
    else:
        COMMANDS[command](config)


if __name__ == "__main__":
    run_command(main)

"""Data: the checkpoint's tokenizer and chat template, readers, rows rendered to ids and labels, the ledger, settings.

The decision that is not obvious: assistant turns are looked for in the *full* rendering. A template may render a turn
differently once others follow (Qwen3 drops earlier thoughts), so masks made by rendering turn after turn are wrong.
Each turn is replaced by a sentinel instead, which brackets it for any template. Pieces are tokenised one by one and
their ids concatenated, so no token straddles prompt and answer, and a prompt has the ids it will have at generation.

    python data.py show --model Qwen/Qwen3-0.6B --data rows.jsonl --n 3     # rows as rendered, what is scored in colour
"""

import argparse
import csv
import gzip
import io
import json
import os
import re
import secrets
import sys
import types
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from functools import cached_property
from inspect import getsource
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import jinja2.ext
import numpy as np
import tokenizers
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model import IGNORE, Segment, UserError, cli, nearest, read_json, resolve


def brief(value, width=60):
    """`value` as one short quoted line, for messages."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    return repr(text[:width] + "…" if len(text) > width else text)


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


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers has it; jinja's own escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Tokenizer:
    """A checkpoint's `tokenizer.json` with its special tokens, end tokens and chat template.

    `now` is what a template's `strftime_now` tells, the program's start unless given: Llama 3.2 writes the date into
    its system turn, so a run that goes on tomorrow has to be given the day it began.
    UserError: a file that is missing or broken. Source: transformers' PreTrainedTokenizerFast and its chat templates.
    """

    def __init__(self, folder, now=None):
        self.folder, self.now = Path(folder), now or datetime.now()
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{self.folder}: no tokenizer.json in it; give a checkpoint's folder that has one")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path}: not a tokenizer: {brief(str(error), 120)}") from None
        self.backend.no_truncation()  # the file may carry either from an earlier use
        self.backend.no_padding()
        config = self.read("special_tokens_map.json") | self.read("tokenizer_config.json")
        names = [f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
        tokens = {name: config.get(name) for name in names}
        tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        self.special = {name: token for name, token in tokens.items() if isinstance(token, str)}
        self.bos_id, eos, self.pad_id = (self.backend.token_to_id(self.special.get(name, "")) for name in names[:3])
        added = self.backend.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = {id for id, token in added.items() if token.special}
        ends = [self.read(name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        ends = [eos, *(id for found in ends for id in (found if isinstance(found, list) else [found]))]
        self.eos_ids = [id for id in dict.fromkeys(ends) if isinstance(id, int)]
        self.head = self.backend.encode("", add_special_tokens=True).ids[:1]  # BOS, where texts begin with one
        self.newline = self.encode("\n")
        self.prepends = self.encode("\na") != self.newline + self.encode("a")  # SentencePiece: a space before all

        path, found = self.folder / "chat_template.jinja", config.get("chat_template")
        self.template_file = path if path.is_file() else self.folder / "tokenizer_config.json"
        if path.is_file():
            found = path.read_text(encoding="utf-8", errors="replace")
        found = [{"name": "default", "template": found}] if isinstance(found, str) else found or []
        extensions = [Generation, jinja2.ext.loopcontrols]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        env.filters["tojson"] = tojson
        env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: self.now.strftime(form)}
        try:
            self.templates = {t["name"]: env.from_string(t["template"]) for t in found}
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.template_file}: chat template, line {error.lineno}: {error.message}") from None
        except (TypeError, KeyError, RecursionError):
            raise UserError(f"{self.template_file}: not a chat template, nor a list of them by name") from None
        self.has_template = bool(self.templates)

    def read(self, name):
        return read_json(self.folder / name) if (self.folder / name).is_file() else {}

    def __len__(self):
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text, special=False):
        """str -> list of ids; `special` applies the tokenizer's own post-processor (Llama's BOS)."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids, skip_special=True):
        """Ids -> str, without special tokens unless they are asked for."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def render(self, messages, add_generation_prompt=False, tools=None, keep_marks=False, **kwargs):
        """Messages -> text by the checkpoint's template, which also gets `kwargs` (`enable_thinking`, ...). UserError
        names the template's file where there is none, or it raises or fails."""
        if not self.templates:
            raise UserError(f"{self.folder}: no chat template; use prompt/completion or text rows, or a chat model")
        template = self.templates.get("tool_use" if tools and "tool_use" in self.templates else "default")
        if template is None:
            raise UserError(f"{self.template_file}: no template is named 'default': {', '.join(self.templates)}")
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        for m in messages:  # reasoning has had three names
            if thought := next((m[key] for key in ("reasoning_content", "thinking", "reasoning") if key in m), None):
                m |= {"thinking": m.get("thinking", thought), "reasoning_content": thought}
        kwargs = self.special | {"tools": tools or None, "documents": None} | kwargs
        try:
            text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **kwargs)
        except Exception as error:  # untrusted code over untrusted rows: whatever it raises is theirs
            raise UserError(f"{self.template_file}: the chat template failed: {brief(str(error), 160)}") from None
        return text if keep_marks else text.replace(OPEN, "").replace(CLOSE, "")

    @cached_property
    def end_ids(self):
        """Ids that end a turn: the end tokens, and what the template writes after an answer (in Qwen3-Base not eos)."""
        try:
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
            tail = self.render(messages).partition(SENTINEL)[2].lstrip()
        except UserError:  # no template, or one that insists on a system turn, say
            tail = ""
        after = [self.added[token] for token in sorted(self.added, key=len)[::-1] if tail.startswith(token)]
        return list(dict.fromkeys([*self.eos_ids, *after[:1]]))

    @cached_property
    def turn_end(self):
        """Those as a pattern, with the space that a template may leave before them."""
        tokens = sorted(filter(None, map(self.backend.id_to_token, self.end_ids)), key=len)[::-1]
        return r"(?:\s*(?:" + "|".join(map(re.escape, tokens)) + "))+" if tokens else r"(?!)"

    def turns(self, messages, wanted=None, /, **kwargs):
        """The full rendering, and where the model speaks in it, for any template.

        Returns (text, spans, open). spans: (start, end) of each rendered assistant message whose index is in `wanted`
        (default: all): what the model writes itself, from the end of the generation prompt (so with a <think> that the
        prompt does not open) through the token that ends the turn. open: the text ends in an answer without that token.
        `{% generation %}` spans are taken where each turn has one, as for transformers' assistant masks.
        """
        speaks = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        pieces = re.split(f"{OPEN}|{CLOSE}", self.render(messages, keep_marks=True, **kwargs))
        text, at = "".join(pieces), np.cumsum([len(piece) for piece in pieces]).tolist()
        marked = dict(zip(speaks, zip(at[::2], at[1::2]))) if len(pieces) == 2 * len(speaks) + 1 else {}
        spans, is_open = [], False
        for i in speaks if wanted is None else [i for i in speaks if i in wanted]:
            span = marked.get(i) or self.find_turn(messages, i, text, spans[-1][1] if spans else 0, **kwargs)
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
        try:
            prompt, seen = self.render(messages[:i], True, **kwargs), False
        except UserError:  # of no messages, say, when the assistant speaks first
            prompt, seen = SENTINEL, False
        # without its tool calls, which are the model's words too; or with them, if the template insists
        for stand_in in ({"role": "assistant", "content": SENTINEL}, {**messages[i], "content": SENTINEL}):
            try:
                other = self.render([*messages[:i], stand_in, *messages[i + 1 :]], **kwargs)
            except UserError:
                continue
            before, mark, after = other.partition(SENTINEL)
            end, seen = len(text) - len(after), seen or bool(mark)
            start = len(prompt) if text.startswith(prompt) else self.find_start(text, before, floor, **kwargs)
            if mark and start <= end and text.endswith(after):
                calls = "tool_calls" in stand_in and re.compile(self.turn_end).search(text, end)
                return start, calls.end() if calls else end
        if seen:
            fault = f"{self.template_file}: cannot tell where message {i} is in the rendering"
            raise UserError(fault + "; mark it with {% generation %} in the template, or use prompt/completion rows")
        return None

    def find_start(self, text, before, floor, /, **kwargs):
        """Where a turn that `before` leads up to begins: after the template's header, or as much of it as is there (an
        earlier turn may lack the <think> that the generation prompt opens); beyond the text where nothing fits."""
        ask = [{"role": "user", "content": "a"}]
        header = self.render(ask, True, **kwargs).removeprefix(self.render(ask, **kwargs))
        same = len(os.path.commonprefix([text, before]))
        starts = [before.rfind(header[:n], floor) + n for n in range(len(header), 0, -1)]
        starts = [start for n, start in zip(range(len(header), 0, -1), starts) if start >= n]  # those found
        return next((start for start in [*starts, len(before)] if start <= same), sys.maxsize)

    def encode_sides(self, rows):
        """[[side, ...], ...] with a side a list of (str or ids, scored) -> the same with a side as ids int32 (T,) and
        scored bool (T,). One batch for all, which uses every core."""
        texts, inside = [], []
        for sides in rows:
            for side in sides:
                before = "" if side is sides[0] else "".join(piece for piece, _ in sides[0] if isinstance(piece, str))
                for piece, _ in side:
                    if isinstance(piece, str):
                        # inside a text no space is to be prepended: after a newline, which is then taken off again
                        cut = self.prepends and piece and before and not before.endswith(tuple(self.added))
                        texts.append("\n" + piece if cut else piece)
                        inside.append(cut)
                        before = piece or before
        batch = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        batch = iter([e.ids[len(self.newline) :] if cut else e.ids for e, cut in zip(batch, inside)])

        def join(side):
            ids = [next(batch) if isinstance(piece, str) else piece for piece, _ in side]
            scored = np.repeat(np.array([flag for _, flag in side], bool), [len(piece) for piece in ids])
            return np.array([id for piece in ids for id in piece], np.int32), scored

        return [[join(side) for side in sides] for sides in rows]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_text(path):
    """A file's text, unzipped if its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_jsonl(path):
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON: {getattr(error, 'msg', error)}: {brief(line)}") from None


def read_list(path):
    text = read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        why, line = getattr(error, "msg", str(error)), getattr(error, "lineno", 1)
        if why == "Extra data" and text.lstrip().startswith("{"):  # lines under another name
            return read_jsonl(path)
        found = brief(text.split("\n")[line - 1] or "the end")
        raise UserError(f"{path}:{line}: not JSON: {why}: {found}") from None
    rows = rows.get("data", rows) if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(f'{path}: expected a list of rows or {{"data": [...]}}, found {brief(rows)}')
    return ((f"{path}[{number}]", row) for number, row in enumerate(rows))


def read_csv(path):
    csv.field_size_limit(2**31 - 1)
    for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path), newline=""))):
        if None in row:
            raise UserError(f"{path}[{number}]: more fields than the header's {len(row) - 1}: {brief(row[None])}")
        yield f"{path}[{number}]", row


def read_parquet(path):
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(4096)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(rows))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {brief(str(error))}") from None


READERS = {".jsonl": read_jsonl, ".json": read_list, ".csv": read_csv, ".parquet": read_parquet}


def kind_of(path):
    return Path(str(path).removesuffix(".gz")).suffix


def hub_files(source):
    """`org/name[:config][:split]` -> local paths of its files, downloaded into the hub's cache. The split defaults to
    train, the configuration to `default` or the only one."""
    import huggingface_hub

    repo, *wanted = source.split(":")
    try:
        files = sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset"))
        found = {}  # (config, split): [data/train-00000-of-00002.parquet, ...], [main/test.jsonl], [x/train/0.parquet]
        for file in (file for file in files if kind_of(file) in READERS):
            *folders, name = file.split("/")
            split = re.split(r"-\d{5}-of-|\.", name)[0]
            split = folders.pop() if split.isdigit() and folders else split
            config = folders[-1] if folders not in ([], ["data"]) else "default"
            found.setdefault((config, split), []).append(file)
        keys = [key for key in found if set(wanted) <= set(key)]
        for default in ("train", "default"):
            keys = [key for key in keys if default in key] or keys if len(keys) > 1 else keys
        if len(keys) != 1:
            what = "has several parts" if keys else "has no such part"
            there = ", ".join(f"{repo}:{config}:{split}" for config, split in keys or found) or "no data file"
            raise UserError(f"{source} {what}; name one of: {there}")
        folder = huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=found[keys[0]])
        return [Path(folder) / file for file in found[keys[0]]]
    except OSError as error:  # which the hub's own are
        raise UserError(f"{source}: no file here, and the hub does not give it: {brief(str(error), 100)}") from None


def read_rows(source):
    """[(where, row), ...] of a .jsonl, .json, .csv or .parquet file, .gz too, a folder of them, or a hub's `org/name`.

    `where` is 'file:line' of lines, 'file[index]' of anything else; a UserError begins with it and says what is there.
    """
    path, name = Path(source), r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}"
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if kind_of(file) in READERS)
    elif path.exists() or kind_of(path) in READERS or not re.fullmatch(name, str(source)):
        paths = [path]
    else:
        paths = hub_files(str(source))
    rows = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file{nearest(path, path.parent.glob('*'))}")
        if kind_of(path) not in READERS:
            raise UserError(f"{path}: not a known kind of file; known are {', '.join(READERS)}, each also with .gz")
        rows += READERS[kind_of(path)](path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row is an object, found {brief(row)}")
    if not rows:
        raise UserError(f"{source}: no rows in it")
    return rows


# --- rows to pieces of text -------------------------------------------------------------------------------------------

SCHEMAS = ["messages", "conversations", "prompt completion", "prompt chosen rejected", "chosen rejected",
           "instruction output", "text"]  # fmt: skip
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
ALPACA = (  # tatsu-lab/stanford_alpaca, train.py
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{given}\n\n### Response:"
)


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
            raise UserError(f"{key}[{i}] must be a message with role and content, found {brief(given)}")
        m = {name: value for name, value in given.items() if value is not None}
        if "from" in m:
            m = {"role": SHAREGPT.get(str(m["from"]), m["from"]), "content": m.get("value")}
        content = m.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            m["content"] = content = "".join(part["text"] for part in content)
        if not isinstance(m.get("role"), str):
            raise UserError(f"{key}[{i}] has no role: {brief(given)}")
        if not isinstance(content, str) and not m.get("tool_calls") and (content is None or m["role"] == "assistant"):
            raise UserError(f"{key}[{i}] ({m['role']}) must have text as its content, found {brief(content)}")
        messages.append(m)
    return messages


def split_row(row, chat, preference=False):
    """A row -> (prompt, answers): strings, or lists of messages if the row has such (Alpaca if `chat`). The prompt of a
    text or conversation is empty; answers are one, or chosen and rejected."""
    has = {key for key, value in row.items() if value is not None}
    schemas = [schema for schema in SCHEMAS if not preference or "chosen" in schema]
    keys = next((schema.split() for schema in schemas if has.issuperset(schema.split())), None)
    if keys is None:
        there = f"it has {', '.join(sorted(map(str, has)))}" if has else "it is empty"
        wanted = ", ".join(schema.replace(" ", "+") for schema in schemas)
        raise UserError(f"fits no schema: {there}; wanted is one of {wanted}")
    if keys == ["text"]:
        return "", [text_of(row, "text")]
    system = [{"role": "system", "content": text_of(row, "system")}] if row.get("system") else []
    if len(keys) == 1:
        return [], [(system if keys == ["conversations"] else []) + messages_of(row, keys[0])]
    if keys[0] == "instruction":
        instruction, output, given = (text_of(row, key) if row.get(key) else "" for key in (*keys, "input"))
        if chat:
            ask = {"role": "user", "content": instruction + ("\n" + given if given else "")}
            return [*system, ask], [[{"role": "assistant", "content": output}]]
        paired = ", paired with an input that provides further context" if given else ""
        given = f"\n\n### Input:\n{given}" if given else ""
        return ALPACA.format(paired=paired, instruction=instruction, given=given), [output]
    if any(isinstance(row[key], list) for key in keys):
        say = lambda key: [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}]
        sides = [say(key) if isinstance(row[key], str) else messages_of(row, key) for key in keys]
    else:
        sides = [text_of(row, key) for key in keys]
    if keys[0] == "prompt":
        prompt, *answers = sides
        if isinstance(prompt, list):  # some sets say the prompt again in the answers
            answers = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in answers]
        return prompt, answers
    same = next((n for n, (a, b) in enumerate(zip(*sides)) if a != b), min(map(len, sides)))
    prompt = sides[0][:same]  # what both sides begin with; in a text the last space belongs to the answer
    prompt = prompt[: max(prompt.rfind(" "), 0)] if isinstance(prompt, str) else prompt
    return prompt, [side[len(prompt) :] for side in sides]


def lay_out(row, tokenizer, completion_only_loss=None, assistant_only_loss=True, preference=False):
    """A row -> its sides, each a list of (text or ids, scored): one side, or prompt, chosen, rejected if `preference`;
    or why it is of no use (str). UserError: it is malformed.

    Scored are, in TRL's names, every assistant turn of a conversation (`assistant_only_loss`, here the default) or its
    last alone (`completion_only_loss` true), a completion without its prompt (unless `completion_only_loss` is false),
    all of a text; and after every answer the token that ends the turn. Unless `preference`, chosen is the completion.
    """
    prompt, answers = split_row(row, tokenizer.has_template, preference)
    answers = answers if preference else answers[:1]
    if preference and answers[0] == answers[1]:
        return "chosen and rejected are the same"
    if preference and not prompt:
        return "chosen and rejected share no prompt"
    eos = (tokenizer.eos_ids[:1], True)
    if isinstance(prompt, str):
        ask = [(tokenizer.head, False), (prompt, completion_only_loss is False and not preference)]
        said = tokenizer.special.get("eos_token")  # some sets end their answers themselves
        sides = [[(side, True)] + [eos] * (not said or not side.endswith(said)) for side in answers]
        return [ask, *sides] if preference else [ask + sides[0]]
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or kwargs.keys() & {"messages", "add_generation_prompt", "keep_marks"}:
        raise UserError(f"'chat_template_kwargs' must be an object of the template's variables, found {brief(kwargs)}")
    if row.get("tools"):
        try:
            kwargs = kwargs | {"tools": json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]}
        except ValueError:
            raise UserError(f"'tools' must be a list or one in JSON, found {brief(row['tools'])}") from None
    sides = []
    for answer in answers:
        messages, first = prompt + answer, 0 if completion_only_loss is False and not preference else len(prompt)
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        wanted = wanted[-1:] if completion_only_loss and not prompt else wanted
        text, spans, is_open = tokenizer.turns(messages, wanted, **kwargs)
        rest = not assistant_only_loss and not first and not preference  # whether what nobody answered is scored too
        cuts = [0, *(at for span in spans for at in span), len(text)]
        side = [(text[start:end], rest or n % 2 == 1) for n, (start, end) in enumerate(zip(cuts, cuts[1:]))]
        sides.append(side + [eos] * is_open)
    return [[], *sides] if preference else sides


# --- pieces to segments -----------------------------------------------------------------------------------------------


def fit(ids, scored, room, special):
    """ids, scored (T,) -> the same in at most `room` tokens; None where the last answer does not fit.

    The prompt gives way from its left. Its first token stays if it is one of the `special`, and one always stays, or
    nothing could predict the answer's first. An earlier answer that loses its prompt is no longer scored. A text is cut
    at its end.
    """
    if len(ids) <= room:
        return ids, scored
    keep = int(int(ids[0]) in special)
    last = int(np.flatnonzero(scored)[-1]) + 1 if scored.any() else len(ids)  # nothing is learnt from what follows
    gaps = np.flatnonzero(~scored[:last])
    if not len(gaps) or gaps[-1] < keep:
        return ids[:room], scored[:room]
    if last - gaps[-1] > room:
        return None
    start = max(last - room + keep, keep)
    if keep < start < gaps[-1] and scored[start]:
        scored = scored & (np.arange(len(ids)) >= start + int(np.argmin(scored[start:])))
    return np.concatenate([ids[:keep], ids[start:last]]), np.concatenate([scored[:keep], scored[start:last]])


def share_prompt(sides):
    """Encoded sides; of a pair's, the unscored tokens that both answers begin with are moved to the prompt."""
    (ids, scored), *answers = sides
    heads = [np.where(flags, -n, side).tolist() for n, (side, flags) in enumerate(answers, 1)]
    same = len(os.path.commonprefix(heads))
    if not same:
        return sides
    prompt = np.append(ids, answers[0][0][:same]), np.append(scored, answers[0][1][:same])
    return [prompt, *((side[same:], flags[same:]) for side, flags in answers)]


def assemble(sides, tokenizer, max_length=None, weight=1.0):
    """Encoded sides -> an example's segments, at most `max_length` tokens a sequence, or why there are none (str)."""
    (ids, scored), *answers = sides
    if not all(np.any(flags & ~np.isin(side, tokenizer.end_ids)) for side, flags in answers or sides):
        return "nothing scored"
    longest = max((len(side) for side, _ in answers), default=0)
    fitted = fit(ids, scored, (max_length or sys.maxsize) - longest, tokenizer.special_ids)
    if fitted is None or len(fitted[0]) == 0:
        return "answer longer than max_length"
    ids, scored = fitted
    parts = [(ids, scored & (np.arange(len(ids)) > 0)), *answers]  # nothing predicts a first token
    labels = [np.where(scored, ids, IGNORE).astype(np.int32) for ids, scored in parts]
    return [Segment(ids, labels[n], 0 if n else -1, max(n - 1, 0), weight) for n, (ids, _) in enumerate(parts)]


def render_rows(rows, tokenizer, max_length=None, **options):
    """[(where, row), ...] -> per row (list[Segment] or why it is dropped, its tokens before truncation, scored ones).
    `options` as in `lay_out`. UserError: a row is malformed, beginning with its `where`."""
    laid = []
    for where, row in rows:
        try:
            weight = 1.0 if row.get("weight") is None else row["weight"]
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise UserError(f"'weight' must be a number of at least 0, found {brief(weight)}")
            sides = lay_out(row, tokenizer, **options)
            for side in [] if isinstance(sides, str) else sides:
                "".join(piece for piece, _ in side if isinstance(piece, str)).encode()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except UnicodeEncodeError:
            raise UserError(f"{where}: half a surrogate pair in its text, which was cut inside a character") from None
        laid.append((sides, float(weight)))
    encoded = iter(tokenizer.encode_sides([sides for sides, _ in laid if not isinstance(sides, str)]))
    for sides, weight in laid:
        if isinstance(sides, str):
            yield sides, 0, 0
        else:
            sides = share_prompt(next(encoded))
            tokens, scored = sum(len(ids) for ids, _ in sides), sum(int(flags.sum()) for _, flags in sides)
            yield assemble(sides, tokenizer, max_length, weight), tokens, scored - int(sides[0][1][:1].sum())


def render_row(row, tokenizer, max_length=None, **options):
    """One row -> list[Segment], or why it is dropped (str). Options as in `lay_out`, truncation as in `fit`."""
    return next(render_rows([("row", row)], tokenizer, max_length, **options))[0]


# --- the ledger and data sets -----------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What became of every row and token: rows = examples + rows_dropped + rows_not_sampled,
    tokens = scored + masked + truncated + dropped."""

    rows: int = 0
    examples: int = 0
    rows_dropped: int = 0
    rows_not_sampled: int = 0
    rows_truncated: int = 0
    rows_ended: int = 0  # examples that score an end of turn
    tokens: int = 0
    scored: int = 0
    masked: int = 0
    truncated: int = 0
    truncated_scored: int = 0  # truncated tokens that would have been scored
    dropped: int = 0
    reasons: dict = field(default_factory=dict)  # reason: {"rows", "tokens", "where": the first few}

    def add(self, where, found, tokens, scored, end_ids):
        """Enters a row as `render_rows` yields it."""
        self.tokens += tokens
        if isinstance(found, str):
            self.rows_dropped += 1
            self.dropped += tokens
            reason = self.reasons.setdefault(found, {"rows": 0, "tokens": 0, "where": []})
            reason["where"] += [where] * (reason["rows"] < 5)
            reason |= {"rows": reason["rows"] + 1, "tokens": reason["tokens"] + tokens}
            return
        labels = np.concatenate([segment.labels for segment in found])
        kept = int((labels != IGNORE).sum())
        self.examples += 1
        self.scored += kept
        self.masked += len(labels) - kept
        self.truncated += tokens - len(labels)
        self.truncated_scored += scored - kept
        self.rows_truncated += len(labels) < tokens
        self.rows_ended += bool(np.isin(labels, end_ids).any())

    def check(self):
        """UserError where this would teach nothing, or never to stop."""
        if not self.scored:
            raise UserError(f"nothing to train on: no token of {self.rows} rows is scored{self.why()}")
        if not self.rows_ended:
            raise UserError("no row scores the end of a turn, so the model would never learn to stop: raise max_length")

    def why(self):
        return "".join(f"; {why}: {found['rows']:,}, as {found['where'][0]}" for why, found in self.reasons.items())

    def as_dict(self):
        return asdict(self)

    def __str__(self):
        counts = {"scored": self.scored, "masked": self.masked, "truncated": self.truncated, "dropped": self.dropped}
        shares = [f"{n:,} {name} ({n / max(self.tokens, 1):.1%})" for name, n in counts.items() if n]
        text = f"{self.rows:,} rows: {self.examples:,} examples"
        text += f", {self.rows_truncated:,} cut to max_length" * bool(self.rows_truncated)
        text += f", {self.rows_dropped:,} dropped{self.why()}" * bool(self.rows_dropped)
        text += f", {self.rows_not_sampled:,} not sampled" * bool(self.rows_not_sampled)
        return f"{text}\n{self.tokens:,} tokens: {' · '.join(shares)}"


def load_examples(sources, tokenizer, *, max_length=None, max_samples=None, seed=0, **options):
    """Sources (see `read_rows`) -> (examples: a list of list[Segment], the rows they came from, ledger).

    `max_samples` rows are drawn by `seed` and keep their order; `options` as in `lay_out`. UserError: a file or row is
    wrong, nothing is scored, or no end of turn is scored in any row.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    rows = [found for source in sources for found in read_rows(source)]
    ledger, examples, kept = Ledger(len(rows)), [], []
    if max_samples is not None and max_samples < len(rows):
        ledger.rows_not_sampled = len(rows) - max_samples
        rows = [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:max_samples])]
    for chunk in (rows[at : at + 4096] for at in range(0, len(rows), 4096)):
        for (where, row), (found, *counts) in zip(chunk, render_rows(chunk, tokenizer, max_length, **options)):
            ledger.add(where, found, *counts, tokenizer.end_ids)
            if not isinstance(found, str):
                examples.append(found)
                kept.append(row)
    ledger.check()
    return examples, kept, ledger


def split_holdout(examples, rows, size, seed=0):
    """-> (examples, rows), (held-out examples, their rows), drawn by `seed`; `size` is a share below 1 or a count."""
    held = round(size * len(examples)) if 0 < size < 1 else int(size)
    if not 0 <= held < len(examples):
        raise UserError(f"cannot hold out {size} of {len(examples)} examples; give a share below 1 or a smaller count")
    out = set(np.random.default_rng(seed).permutation(len(examples))[:held].tolist())
    pick = lambda inside: tuple([x for i, x in enumerate(xs) if (i in out) == inside] for xs in (examples, rows))
    return pick(False), pick(True)


# --- settings ---------------------------------------------------------------------------------------------------------

# the names of LLaMA-Factory, Axolotl, PEFT and older TRL; they count where a dataclass has the target and not the name
ALIASES = {
    "cutoff_len": "max_length", "max_seq_length": "max_length", "sequence_len": "max_length",
    "model_name_or_path": "model", "base_model": "model", "dataset": "data", "dataset_name": "data",
    "lora_rank": "lora_r", "r": "lora_r", "lora_target_modules": "target_modules", "lora_target": "target_modules",
    "num_epochs": "num_train_epochs", "micro_batch_size": "per_device_train_batch_size", "lr": "learning_rate",
}  # fmt: skip
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def types_of(kind):
    """The types that a union or Optional allows, without their arguments; or the one type."""
    return [get_origin(k) or k for k in (get_args(kind) if get_origin(kind) in (Union, types.UnionType) else [kind])]


class UniqueKeys(yaml.SafeLoader):
    """YAML, of which JSON is a part, where a key that is given twice is an error and not a silent last word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for n, key in enumerate(keys):
            if key in keys[:n]:
                mark = node.value[n][0].start_mark
                raise UserError(f"{mark.name}:{mark.line + 1}: key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def convert(value, kind):
    """`value`, a flag's text or what YAML made of it, as the type `kind`; ValueError or TypeError if it is none."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        if types.NoneType in args and str(value).lower() in ("none", "null"):
            return None
        order = [bool, int, float, dict, str, list] if isinstance(value, str) and "," not in value else [list]
        rank = {option: order.index(o) if (o := get_origin(option) or option) in order else 9 for option in args}
        for option in sorted(args, key=rank.get):
            with suppress(ValueError, TypeError):
                return convert(value, option)
    elif origin is Literal and str(value) in map(str, args):
        return next(option for option in args if str(option) == str(value))
    elif origin is bool and str(value).lower() in BOOLS:
        return BOOLS[str(value).lower()]
    elif origin in (int, float) and not isinstance(value, bool):
        number = value if isinstance(value, int) else float(value)  # YAML 1.1 reads 2e-4 as a string
        if origin is float or number == int(number):
            return origin(number)
    elif origin is str and isinstance(value, (str, int, float)):
        return str(value)
    elif origin is dict and isinstance(value := json.loads(value) if isinstance(value, str) else value, dict):
        return value
    elif origin in (list, tuple) and not isinstance(value, dict):
        if isinstance(value, str):  # names may come as one word, a,b; a path keeps its comma
            value = re.split(r"\s*,\s*", value) if re.fullmatch(r"[\w.:@-]+(\s*,\s*[\w.:@-]+)+", value) else [value]
        items = [value] if isinstance(value, (int, float)) else value
        return origin(convert(item, args[0] if args else str) for item in items)
    raise ValueError(value)


def read_settings(path, kinds, aliases):
    """{field: value} of a YAML or JSON file, flat or in sections: `lora: {r: 32}` is `lora_r`, else `r`."""
    settings = {}

    def enter(tree, sections):
        for key, value in tree.items():
            where = [*sections, str(key)]
            names = ["_".join(where[n:]) for n in range(len(where))]
            name = next((aliases.get(name, name) for name in names if aliases.get(name, name) in kinds), None)
            if isinstance(value, dict) and (name is None or dict not in types_of(kinds[name])):
                enter(value, where)
            elif name is None:
                raise UserError(f"{path}: unknown key {'.'.join(where)!r}{nearest(names[0], kinds)}")
            elif name in settings:
                raise UserError(f"{path}: {name} is given twice, the second time as {'.'.join(where)!r}")
            else:
                settings[name] = value

    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.load(file.read().replace("\t", "  ") if str(path).endswith(".json") else file, UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = f":{error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected settings, found {brief(tree)}")
    enter(tree, [])
    return settings


def parse_config(cls, argv=None, description="", aliases=ALIASES):
    """A command line -> an instance of the dataclass `cls`, whose fields are the flags and hold the only defaults.

    `--config FILE` (YAML or JSON) comes first, flags override it; the comment at the end of a field's line is its help.
    UserError: an unknown flag or key, with the nearest; a value of another type, with the expected; a field left open.
    """
    hints = get_type_hints(cls)
    kinds = {f.name: hints[f.name] for f in fields(cls)}
    names = {name: str(k) if get_args(k) else getattr(k, "__name__", str(k)) for name, k in kinds.items()}
    aliases = {alias: name for alias, name in aliases.items() if name in kinds and alias not in kinds}
    lines = [line for base in cls.__mro__[::-1] if is_dataclass(base) for line in getsource(base).splitlines()]
    notes = {found[1]: found[2] for line in lines if (found := re.match(r"    (\w+):.*?  # (.*)", line))}

    def fail(message):
        raise UserError(f"{message}; --help explains every flag")

    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=plain)
    parser.error = fail
    parser.add_argument("--config", metavar="FILE", help="settings in YAML or JSON, flat or in sections; flags win")
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        help = notes.get(f.name, "") + (f" (default: {default})" if default is not MISSING else "")
        allowed = types_of(kinds[f.name])
        options = {"help": help.replace("%", "%%"), "metavar": getattr(allowed[0], "__name__", "value").upper()}
        options |= {"nargs": "?", "const": "true"} if bool in allowed else {}
        options |= {"nargs": "*", "action": "extend"} if list in allowed or tuple in allowed else {}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        if found := re.match(r"--([A-Za-z][\w-]*)", word):
            name = found[1].replace("-", "_")
            name = aliases.get(name, name)
            if name not in kinds and name not in ("config", "help"):
                fail(f"unknown flag {found[0]}{nearest(name, kinds)}")
            word = f"--{name}{word[found.end() :]}"
        words.append(word)
    given = vars(parser.parse_args(words))
    given |= {name: value[0] for name, value in given.items() if isinstance(value, list) and len(value) == 1}
    file = given.pop("config")
    values = (read_settings(file, kinds, aliases) if file else {}) | given
    for name, value in values.items():
        try:
            values[name] = convert(value, kinds[name])
        except (ValueError, TypeError):
            where = f"--{name}" if name in given else f"{file}: {name}"
            raise UserError(f"{where}: expected {names[name]}, found {brief(value)}") from None
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            fail(f"--{f.name} is needed ({notes.get(f.name, names[f.name])})")
    return cls(**values)


# --- commands ---------------------------------------------------------------------------------------------------------


def coloured(example, tokenizer):
    """An example as text, what is scored in green, or between ⟦ ⟧ where there is no terminal."""
    start, stop, text = *(("\033[32m", "\033[0m") if sys.stdout.isatty() else "⟦⟧"), ""
    for segment in example:
        scored = segment.labels != IGNORE
        for run in np.split(np.arange(len(scored)), np.flatnonzero(np.diff(scored)) + 1):
            piece = tokenizer.decode(segment.ids[run], skip_special=False)
            text += start + piece + stop if scored[run].any() else piece
    return text


@dataclass
class ShowConfig:
    model: str  # folder or hub id whose tokenizer and chat template render the rows
    data: list[str]  # files, folders or data sets of the hub
    n: int = 3  # rows to show
    max_length: int | None = None  # tokens; what is longer loses the start of its prompt


def main():
    command, *argv = sys.argv[1:] or [""]
    if command != "show":
        raise UserError(f"unknown command {command!r}; usage: python data.py show --model MODEL --data FILE [--n 3]")
    config = parse_config(ShowConfig, argv, "Rows as the model sees them, what is scored in colour.")
    plain = (Path(config.model) / "tokenizer.json").is_file()  # a tokenizer's folder will do
    tokenizer = Tokenizer(config.model if plain else resolve(config.model))
    examples, _, ledger = load_examples(config.data, tokenizer, max_length=config.max_length)
    print(*(coloured(example, tokenizer) for example in examples[: config.n]), ledger, sep="\n\n")


if __name__ == "__main__":
    cli(main)

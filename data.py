"""Data: rows are rendered by the checkpoint's own chat template to token ids and labels.

The decision that is not obvious: assistant turns are looked for in the *full* rendering. A template
may render a turn differently once others follow (Qwen3 drops earlier thoughts), so masks made by
rendering turn after turn are wrong. Each turn is replaced by a sentinel instead, which brackets it
for any template. Texts are tokenized segment by segment and their ids concatenated, so no token
straddles prompt and answer, and a prompt has the same ids in training and at generation.
Rendered examples are cached on disk and memory-mapped: the memory used does not grow with the rows,
and a second start renders nothing.

    python data.py show --model Qwen/Qwen3-0.6B --data rows.jsonl --n 3   # scored tokens in colour
    python data.py audit --model Qwen/Qwen3-0.6B --data rows.jsonl        # lengths, duplicates
    python data.py mix --model Qwen/Qwen3-0.6B --data a.jsonl@2 b.csv@1 --output mixed.jsonl
    python data.py pairs --model Qwen/Qwen3-0.6B --data ecqa.csv --recipe ecqa --output pairs.jsonl
"""

import hashlib
import itertools
import json
import os
import re
import runpy
import secrets
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from inspect import getfile, signature
from pathlib import Path
from typing import ClassVar

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
from support.files import locked_folder, read_json, regular_file, sync, write_text
from support.hub import companions, resolve
from support.messages import messages_of
from support.readers import find_sources, stream_rows
from support.sandbox import Overrun, bounded, check_growth
from support.settings import check_choices, check_range, run_subcommand


def as_turn(role, content):
    return [{"role": role, "content": content}]


# --- the tokenizer and the chat template ----------------------------------------------------------

# Stand for an answer, and for the ends of {% generation %}. Random: a row that contained one could
# move its own mask.
SENTINEL, OPEN, CLOSE = (f"\ue000{secrets.token_hex(8)}\ue001" for _ in range(3))
MARK = 10**18 + secrets.randbits(59)  # this number and the next ones stand for contents

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a message


class Generation(jinja2.ext.Extension):
    """The tags `{% generation %} ... {% endgeneration %}`, which mark what the model writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return OPEN + caller() + CLOSE


def template_environment(now):
    """jinja2's sandbox with the functions that transformers gives to chat templates."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **kwargs):  # jinja's own escapes HTML and sorts keys
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


class Tokenizer:
    """A checkpoint's `tokenizer.json` with its special tokens, end tokens and chat template.

    `now` (default: the time of the call) is what `strftime_now` formats: Llama 3.2 writes the date
    into its system turn, so a run that is resumed tomorrow needs the day on which it began.
    `adapter`: a folder whose tokenizer files go before the checkpoint's.
    UserError: a file is missing or broken. Source: transformers' PreTrainedTokenizerFast.
    """

    def __init__(self, folder, now=None, adapter=None):
        self.folder, self.files = Path(folder), companions(folder, adapter)
        self.now = now or datetime.now()
        path = self.files.get("tokenizer.json")
        if not path:
            raise UserError(f"{self.folder}: no tokenizer.json in it; give a checkpoint's folder")
        file = str(regular_file(path, 2**28))
        with as_user_error(f"{path}: not a tokenizer", Exception):  # the library has no subclass
            self.backend = tokenizers.Tokenizer.from_file(file)
        check_growth(self.backend, path)
        self.backend.no_truncation()  # the file may carry either from an earlier use
        self.backend.no_padding()
        config = self.read("special_tokens_map.json") | self.read("tokenizer_config.json")
        self.read_special_tokens(config)
        self.read_templates(config)
        self.checked = set()  # shapes of conversations, see check_messages
        self.head = self.encode("", special=True)[:1]  # BOS, where texts begin with one
        self.newline = self.encode("\n")
        # SentencePiece puts a space before every text
        self.prepends = self.encode("\na") != self.newline + self.encode("a")

    def read(self, name):
        return read_json(self.files[name]) if name in self.files else {}

    def read_special_tokens(self, config):
        self.special = {}  # {"bos_token": "<s>", ...}
        for name, token in config.items():
            if isinstance(token, dict):
                token = token.get("content")
            if name.endswith("_token") and isinstance(token, str):
                self.special[name] = token
        fault = f"{self.files.get('tokenizer_config.json')}: its tokens are malformed"
        with as_user_error(fault, Exception):
            self.add_tokens(config)
        self.bos_id, eos_id, self.pad_id = (
            self.backend.token_to_id(self.special.get(name, ""))
            for name in ("bos_token", "eos_token", "pad_token")
        )
        added = self.backend.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = {id for id, token in added.items() if token.special}
        ends = [eos_id]
        for name in ("generation_config.json", "config.json"):
            ids = self.read(name).get("eos_token_id")
            ends += ids if isinstance(ids, list) else [ids]
        ends = [id for id in ends if isinstance(id, int) and 0 <= id < 2**24]
        self.eos_ids = list(dict.fromkeys(ends))

    def add_tokens(self, config):
        """Gives those that tokenizer_config.json alone names the next ids, as transformers does."""
        tokens = config.get("added_tokens_decoder") or {}
        tokens = [tokenizers.AddedToken(**tokens[id]) for id in sorted(tokens, key=int)]
        self.backend.add_tokens(tokens)
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        more = more.values() if isinstance(more, dict) else more or ()
        texts = [token["content"] if isinstance(token, dict) else token for token in more]
        added = self.backend.get_added_tokens_decoder().values()
        new = dict.fromkeys([*self.special.values(), *texts])
        known = {token.content for token in added}
        self.backend.add_special_tokens([text for text in new if text not in known])

    def read_templates(self, config):
        self.template_file = self.files.get("chat_template.jinja")
        if self.template_file:
            file = regular_file(self.template_file, 2**20)
            templates = file.read_text(encoding="utf-8", errors="replace")
        else:
            self.template_file = self.files.get("tokenizer_config.json", self.folder)
            templates = config.get("chat_template") or []
        if isinstance(templates, str):
            templates = [{"name": "default", "template": templates}]
        self.tells_date = "strftime_now" in str(templates)
        environment = template_environment(self.now)
        fault = f"{self.template_file}: not a chat template, nor a list of them by name"
        with bounded(fault), as_user_error(fault, Exception):
            self.templates = {
                t["name"]: environment.from_string(t["template"]) for t in templates
            }
        self.has_template = bool(self.templates)

    def __len__(self):
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text, special=False):
        """str -> list of ids; `special` applies the tokenizer's post-processor (Llama's BOS)."""
        return next(self.encode_all([text], special))

    def encode_all(self, texts, special=False):
        """Yields the ids of each text. The library encodes 2^20 characters at once, on every core;
        that takes 170 bytes per character."""
        ends = itertools.accumulate(map(len, texts))
        for _, group in itertools.groupby(zip(texts, ends), lambda pair: pair[1] >> 20):
            batch = [text for text, _ in group]
            try:
                encodings = self.backend.encode_batch_fast(batch, add_special_tokens=special)
            except BaseException as error:  # the library's panics are no Exception
                if isinstance(error, (KeyboardInterrupt, Overrun)):
                    raise
                message = f"cannot encode {brief(max(batch, key=len))}: {brief(str(error))}"
                raise UserError(f"{self.files['tokenizer.json']}: {message}") from None
            for encoding in encodings:
                yield encoding.ids

    def decode(self, ids, skip_special=True):
        """Ids -> str, by default without special tokens."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def render(
        self,
        messages,
        /,
        add_generation_prompt=False,
        tools=None,
        keep_marks=False,
        **kwargs,
    ):
        """Messages -> text by the checkpoint's template, which also gets `kwargs`.
        UserError: there is no template, or it fails."""
        if not self.templates:
            raise UserError(
                f"{self.folder}: no chat template; "
                "use prompt/completion or text rows, or a chat model"
            )
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            names = ", ".join(self.templates)
            raise UserError(f"{self.template_file}: no template is named 'default': {names}")
        messages = [
            {key: value for key, value in m.items() if value is not None} for m in messages
        ]
        for m in messages:  # templates know the reasoning by one of two names, rows by three
            keys = [key for key in THOUGHTS if key in m]
            if keys and m[keys[0]]:
                m["reasoning_content"] = m[keys[0]]
                m.setdefault("thinking", m[keys[0]])
        variables = self.special | {"tools": tools or None, "documents": None} | kwargs
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        fault = f"{self.template_file}: the chat template failed"
        with (
            bounded(fault),
            as_user_error(fault, Exception),
        ):  # untrusted code, untrusted rows
            text = self.templates[name].render(variables)
        return text if keep_marks else text.replace(OPEN, "").replace(CLOSE, "")

    @cached_property
    def end_ids(self):
        """Ids that end a turn: eos_ids, and the token that the template writes after an answer,
        which in Qwen3-Base is not among them."""
        tail = ""
        with suppress(UserError):  # no template, or one that insists on a system turn, say
            text = self.render(as_turn("user", "a") + as_turn("assistant", SENTINEL))
            tail = text.partition(SENTINEL)[2].lstrip()
        after = sorted(filter(tail.startswith, self.added), key=len)[-1:]
        return list(dict.fromkeys(self.eos_ids + [self.added[token] for token in after]))

    @cached_property
    def turn_end(self):
        """A pattern of those tokens, with the space that a template may leave before them."""
        tokens = sorted(filter(None, map(self.backend.id_to_token, self.end_ids)), key=len)
        tokens = "|".join(map(re.escape, tokens[::-1]))
        return rf"(?:\s*(?:{tokens}))+" if tokens else r"(?!)"

    def check_messages(self, messages, /, **kwargs):
        """UserError: the template leaves out a content or a tool call, as it does where it doesn't
        know the role. Numbers stand for them, so one rendering checks every conversation of the
        same shape."""
        marked, owners = [], []

        def mark(value):
            if isinstance(value, dict):
                return {k: v if k in ("type", "id") else mark(v) for k, v in value.items()}
            if isinstance(value, list):
                return [*map(mark, value)]
            if value is None or not str(value).strip():
                return value
            owners.append(m)
            number = MARK + len(owners)
            return str(number) if isinstance(value, str) else number

        for m in messages:
            marks = {key: mark(m[key]) for key in ("content", "tool_calls") if key in m}
            marked.append({"role": m["role"], **marks})
        shape = hash(repr((marked, kwargs)))
        if shape in self.checked:
            return
        text = self.render([m | marks for m, marks in zip(messages, marked)], **kwargs)
        for number, m in enumerate(owners, MARK + 1):
            if str(number) not in text:
                raise UserError(
                    f"{self.template_file}: leaves out what this message says, whose role or "
                    f"form it doesn't know: {brief(m)}"
                )
        self.checked.add(shape)

    def turns(self, messages, first=0, /, **kwargs):
        """The full rendering, and where the assistant speaks in it: (text, spans, is_open).

        spans: {i: (start, end)} of each assistant message i >= `first` that is rendered. It begins
        after the generation prompt (so a <think> that this does not open is inside) and ends
        with the token that ends the turn; where the template marks every turn by
        `{% generation %}`, the marks decide. is_open: the last answer lacks the end token.
        """
        speaks = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans, is_open, marked, floor = {}, False, {}, 0
        self.check_messages(messages, **kwargs)
        with bounded(f"{self.template_file}: rendering {len(messages):,} messages"):
            pieces = re.split(f"{OPEN}|{CLOSE}", self.render(messages, keep_marks=True, **kwargs))
            text = "".join(pieces)
            if len(pieces) == 2 * len(speaks) + 1:
                cuts = list(itertools.accumulate(map(len, pieces)))
                marked = dict(zip(speaks, zip(cuts[::2], cuts[1::2])))
            for i in speaks:
                if i < first:
                    continue
                span = marked.get(i) or self.find_turn(messages, i, text, floor, **kwargs)
                if span is None:
                    continue
                start, end = span
                if not re.compile(self.turn_end + r"\s*\Z").search(text, start, end):
                    after = re.compile(self.turn_end).match(text, end)
                    if after:
                        end = after.end()
                    elif i == len(messages) - 1:
                        text, is_open = text[:end], True
                spans[i], floor = (start, end), end
        return text, spans, is_open

    def find_turn(self, messages, i, text, floor, /, **kwargs):
        """(start, end) of assistant message `i` in `text`, at `floor` or later; None if the
        template leaves it out. UserError: it is rendered, but its place is not clear."""
        prompt, is_rendered = SENTINEL, False
        with suppress(UserError):  # the assistant speaks first, and the template wants a message
            prompt = self.render(messages[:i], True, **kwargs)
        # without its tool calls, which are the model's words too; else with them
        for stand_in in (
            *as_turn("assistant", SENTINEL),
            messages[i] | {"content": SENTINEL},
        ):
            try:
                other = self.render([*messages[:i], stand_in, *messages[i + 1 :]], **kwargs)
            except UserError:
                continue
            before, sentinel, after = other.partition(SENTINEL)
            if not sentinel:
                continue
            is_rendered = True
            if text.startswith(prompt):
                start = len(prompt)
            else:
                start = self.find_start(text, before, floor, **kwargs)
            end = len(text) - len(after)
            if start <= end and text.endswith(after):
                calls = "tool_calls" in stand_in and re.compile(self.turn_end).search(text, end)
                return start, calls.end() if calls else end
        if is_rendered:
            raise UserError(
                f"{self.template_file}: cannot tell where message {i} is in the rendering; "
                "mark it with {% generation %} in the template, or use prompt/completion rows"
            )

    def find_start(self, text, before, floor, /, **kwargs):
        """Where the turn begins that `before` leads up to: after the template's header for the
        assistant, or the longest start of it that is there (an earlier turn may lack the <think>
        that the generation prompt opens). sys.maxsize if `text` does not begin that way."""
        ask = as_turn("user", "a")
        header = self.render(ask, True, **kwargs).removeprefix(self.render(ask, **kwargs))
        same = common_length(text, before)
        for n in range(len(header), 0, -1):
            offset = before.rfind(header[:n], floor)
            if 0 <= offset <= same - n:
                return offset + n
        return len(before) if same == len(before) else sys.maxsize

    def encode_sides(self, rows):
        """[[side, ...], ...] -> yields each row with its sides encoded, all rows in one batch.
        A side is [(str or ids, scored), ...], encoded (ids (T,) int32, scored (T,) bool)."""
        texts, skips, added = [], [], tuple(self.added)
        for sides in rows:
            prompt = "".join(text for text, _ in sides[0] if isinstance(text, str))
            for number, side in enumerate(sides):
                before = prompt if number else ""
                for text, _ in side:
                    if not isinstance(text, str):
                        continue
                    # after a newline SentencePiece adds no space; the newline's ids are removed
                    joins = self.prepends and text and before and not before.endswith(added)
                    texts.append("\n" + text if joins else text)
                    skips.append(len(self.newline) if joins else 0)
                    before = text or before
        encoded = (ids[skip:] for ids, skip in zip(self.encode_all(texts), skips))
        for sides in rows:
            yield [join_pieces(side, encoded) for side in sides]


def join_pieces(side, encoded):
    ids, scored = [], []
    for piece, is_scored in side:
        piece = next(encoded) if isinstance(piece, str) else piece
        ids += piece
        scored += [is_scored] * len(piece)
    return np.array(ids, np.int32), np.array(scored, bool)


def common_length(first, second):
    """How many elements two sequences have in common from the start."""
    pairs = enumerate(zip(first, second))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


# --- rows to prompt and answers -------------------------------------------------------------------

SCHEMAS = (
    "messages",
    "conversations chosen rejected",
    "conversations",
    "prompt completion",
    "prompt chosen rejected",
    "instruction output",
    "instruction chosen rejected",
    "question chosen rejected",
    "chosen rejected",
    "text",
)
FOR_CHATS = {"system", "history", "tools", "chat_template_kwargs"}
CONTEXT = {"functions", "instruction", "input", "question", "query", "context", "documents"}
KEPT = ("weight", "choices", "answer", "tools", "chat_template_kwargs")
METADATA = (
    "id idx index uuid prompt_id conversation_id source dataset subset split "
    "category topic type tags language lang model score score_chosen score_rejected"
)


def text_of(row, key):
    if not isinstance(row[key], str):
        raise UserError(f"'{key}' must be a string, found {brief(row[key])}")
    return row[key]


def turns_of(row, key):
    """A row's prompt or answer as messages: a string is one turn."""
    if isinstance(row[key], (list, dict)):
        return messages_of(row, key)
    is_answer = key in ("completion", "output", "chosen", "rejected")
    return as_turn("assistant" if is_answer else "user", text_of(row, key))


def context_of(row):
    """The turns that `system` and `history` ([question, answer] pairs or messages) put before a
    row's own."""
    turns, history = [], row.get("history")
    if row.get("system"):
        turns = as_turn("system", text_of(row, "system"))
    if not history:
        return turns
    if isinstance(history, list) and all(isinstance(pair, list) for pair in history):
        roles = itertools.cycle(("user", "assistant"))
        history = [{"role": next(roles), "content": t} for pair in history for t in pair]
    return turns + messages_of({"history": history}, "history")


def schema_of(row, preference=False):
    """The first of SCHEMAS that a row fits. UserError: there is none."""
    filled = {key for key, value in row.items() if value is not None}
    schemas = [schema for schema in SCHEMAS if "chosen" in schema or preference is not True]
    schema = next((schema for schema in schemas if filled.issuperset(schema.split())), None)
    if schema is None:
        names = ", ".join(sorted(map(str, filled)))[:200]
        expected = ", ".join(schema.replace(" ", "+") for schema in schemas)
        raise UserError(
            f"fits no schema: it has {names or 'no keys'}; expected one of {expected}"
        )
    return schema


def split_sides(row, keys, chat):
    """(prompt, answers) of a row whose schema has several keys: strings, or lists of messages."""
    first = keys[0]
    is_chat = any(isinstance(row[key], (list, dict)) for key in keys)
    if first in CONTEXT or any(map(row.get, FOR_CHATS)):
        is_chat = is_chat or chat
    if first == "instruction" and is_chat and row.get("input"):
        text = text_of(row, "instruction") + "\n" + text_of(row, "input")
        row = row | {"instruction": text}
    elif first == "instruction" and not is_chat:
        row = row | {"instruction": alpaca({"output": ""} | row)["prompt"]}
    sides = [turns_of(row, key) if is_chat else text_of(row, key) for key in keys]
    answers, shared = sides[1:], []
    if "chosen" in keys:  # as in TRL, the prompt is what both begin with
        answers = sides[-2:]
        ends = [side[:-1] if is_chat else side for side in answers]
        shared = ends[0][: common_length(*ends)]
    prompt = sides[0]
    if first == "chosen":  # a space before the difference is the answer's
        prompt = shared if is_chat else shared[: max(shared.rfind(" "), 0)]
    elif is_chat and all(m in shared for m in prompt):
        prompt = shared
    if is_chat or first == "chosen":  # some data sets repeat the prompt in the answers
        n = len(prompt)
        answers = [side[n:] if side[:n] == prompt else side for side in answers]
    return prompt, answers


def split_row(row, chat, preference=False):
    """A row -> (prompt, answers): strings, or lists of messages if the row has them (if `chat`,
    also where it has a system turn, a history or tools, and Alpaca's rows). The prompt of a text or
    conversation is empty; answers are one, or chosen and rejected.
    UserError: it fits none of SCHEMAS, a value is of a wrong type, or a context would be lost."""
    schema = schema_of(row, preference)
    keys = schema.split()
    if schema == "text":
        prompt, answers = "", [text_of(row, "text")]
    elif len(keys) == 1:
        prompt, answers = [], [messages_of(row, schema)]
    else:
        prompt, answers = split_sides(row, keys, chat)
    lost, texts = FOR_CHATS | CONTEXT, [prompt, *answers]
    if isinstance(prompt, list):
        if row.get("history") and not preference:  # LLaMA-Factory scores its answers too
            answers, prompt = [prompt + answer for answer in answers], []
        context = context_of(row)
        if context[:1] == (prompt or answers[0])[:1]:
            del context[:1]
        answers = answers if prompt else [context + answer for answer in answers]
        prompt = prompt and context + prompt
        texts = [str(m["content"]) for m in itertools.chain(prompt, *answers)]
        lost = CONTEXT
    for key in lost.difference(keys):
        value = row.get(key)
        read = key == "input" and keys[0] == "instruction"
        if value and not read and str(value) not in "\n".join(texts):
            advice = "put it into the prompt or the messages, or drop it"
            raise UserError(f"'{key}' is not read beside {', '.join(keys)}: {advice}")
    return prompt, answers


def template_kwargs(row):
    """The template's variables that a row sets: `chat_template_kwargs` and `tools`."""
    kwargs, tools = row.get("chat_template_kwargs") or {}, row.get("tools")
    reserved = {"messages", "add_generation_prompt", "keep_marks", "self"}
    if not isinstance(kwargs, dict) or kwargs.keys() & reserved:
        expected = "must be an object of the template's variables"
        raise UserError(f"'chat_template_kwargs' {expected}, found {brief(kwargs)}")
    if tools and isinstance(tools, str):
        expected = "'tools' must be a list or one in JSON"
        with as_user_error(expected, ValueError, RecursionError, on=tools):
            tools = json.loads(tools)
    return kwargs | {"tools": tools} if tools else kwargs


REASONING = {  # --reasoning: what it leaves unscored in an answer
    "last": None,
    "every_turn": None,
    "mask": r"(?s)((?:<think>|\A)(?:(?!<think>).)*?</think>\s*)",
    "mask_empty": r"(<think>\s*</think>\s*)",
}


def thought_of(m):
    """A message's thought, or "": where templates look for it."""
    written, end, _ = (m["content"] or "").partition("</think>")
    thought = next((m[key] for key in THOUGHTS if m.get(key)), written if end else "")
    return str(thought).rpartition("<think>")[2].strip()


def split_turns(row, chat):
    """A row -> the rows, one for each of the assistant's turns, that train it as it is asked for:
    as the last. Templates may render a turn otherwise once others follow. None where the row is
    such a row itself, or a text."""
    prompt, (answer, *_) = split_row(row, chat)
    if isinstance(prompt, str):
        return []
    messages, rows = prompt + answer, []
    rest = {key: row[key] for key in KEPT if key in row}
    for i, m in enumerate(messages):
        if i >= len(prompt) and m["role"] == "assistant" and m.get("weight", 1):
            rows.append(rest | {"prompt": messages[:i], "completion": m})
    return [] if rows and rows[0]["completion"] is messages[-1] else rows


def unpair(row, chat):
    """A row -> rows of prompt, completion and label (true: desirable): its own, or one for each
    side of a pair, as TRL's unpair_preference_dataset. UserError: there is no label."""
    is_pair = {"chosen", "rejected"} <= row.keys()
    prompt, answers = split_row(row, chat, is_pair or "unpaired")
    labels = [True, False] if is_pair else [row.get("label")]
    if labels[0] not in (True, False):
        fault = f"'label' must be true or false, found {brief(labels[0])}"
        raise UserError(f"{fault}; or give chosen and rejected")
    if prompt == [] and not is_pair:  # a conversation: its last turn is the answer
        prompt, answers = answers[0][:-1], [answers[0][-1:]]
    rest = {key: row[key] for key in KEPT if key in row} | {"prompt": prompt}
    rows = [rest | {"completion": a, "label": label} for a, label in zip(answers, labels)]
    return rows if prompt else [row]  # which is dropped


def to_pieces(
    row,
    tokenizer,
    completion_only_loss=None,
    assistant_only_loss=True,
    preference=False,
    reasoning="last",
):
    """A row -> (its sides, notes for the ledger). A side is [(text or ids, scored), ...]: one; with
    `preference` prompt and answers, two or one ("unpaired"). Or why the row is dropped (str).

    Scored are, in TRL's names, every assistant turn of a conversation (`assistant_only_loss`, here
    the default) or its last alone (`completion_only_loss` true), a completion without its prompt
    (with it if `completion_only_loss` is false), all of a text; always the token that ends a turn;
    never a turn of weight 0, nor what `reasoning` leaves out.
    """
    prompt, answers = split_row(row, tokenizer.has_template, preference)
    schema = schema_of(row, preference)
    known = {*schema.split(), *FOR_CHATS, *CONTEXT, *KEPT, *METADATA.split()}
    known |= {"label"} if preference == "unpaired" else set()
    unread = [key for key in row if row[key] and key not in known]
    notes = [f"rows whose {key!r} is not read" for key in unread]
    if preference and answers[:1] == answers[1:]:
        return "chosen and rejected are the same", notes
    if preference and not prompt:
        return "chosen and rejected share no prompt" if answers[1:] else "no prompt", notes
    answers = answers if preference else answers[:1]
    score_prompt = completion_only_loss is False and not preference
    end = (tokenizer.eos_ids[:1], True)
    head, sides = [], []
    if isinstance(prompt, str):
        head = [(tokenizer.head, False), (prompt, score_prompt)]
        eos = tokenizer.special.get("eos_token")
        for answer in answers:  # some data sets end their answers themselves
            has_end = bool(eos) and answer.endswith(eos)
            sides.append([(answer, True)] if has_end else [(answer, True), end])
    else:
        kwargs = template_kwargs(row)
        for answer in answers:
            messages = prompt + answer
            first = 0 if score_prompt else len(prompt)
            score_all = first == 0 and not assistant_only_loss
            if completion_only_loss and not prompt:
                speaks = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
                first = max(speaks, default=0)
            text, spans, is_open = tokenizer.turns(messages, first, **kwargs)
            flags = [score_all]  # every second piece is an answer
            for i in spans:
                flags += [messages[i].get("weight", 1) == 1, score_all]
                if thought_of(messages[i]) not in text:
                    notes.append("turns whose thoughts the template leaves out (see --reasoning)")
            cuts = [0, *itertools.chain(*spans.values()), len(text)]
            side = []
            for (start, stop), scored in zip(itertools.pairwise(cuts), flags):
                pieces = [text[start:stop]]
                if scored and REASONING[reasoning]:  # every second one is a thought
                    pieces = re.split(REASONING[reasoning], pieces[0])
                side += [(piece, scored and n % 2 == 0) for n, piece in enumerate(pieces)]
            sides.append(side + [end] if is_open else side)
    return ([head, *sides] if preference else [head + sides[0]]), notes


# --- recipes: plain functions from a data set's own row to a row of a schema above ----------------

LETTERS = "ABCDEFGHIJ"
STYLES = ("{A}.", "{A})", "({A})", "{A} –", "{a})", "{n}.", "•")
INTRODUCTIONS = (
    "Here is a multiple-choice question about {topic}.",
    "Which of the choices answers this question?",
    "Read the question, then give the one right choice.",
)
ALPACA = (  # tatsu-lab/stanford_alpaca, train.py
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)


RATIONALES = "rationale", "explanation", "taskB", "support"


def first_of(row, *keys):
    """The first of these columns that is filled."""
    return next((row[key] for key in keys if row.get(key) not in (None, "")), "")


def question_of(row):
    """(question, choices, index of the right one, rationale or "") of a multiple-choice row: ECQA's
    columns, the hub's (ARC, CommonsenseQA), or {"question", "choices": [...], "answer": its text,
    letter or index}. ValueError: no choices, or none of them is the answer."""
    if "q_text" in row:
        question, choices = row["q_text"], [row[f"q_op{n}"] for n in range(1, 6)]
    else:
        question, choices = row["question"], row["choices"]
    labels = list(LETTERS)
    if isinstance(choices, dict):
        labels, choices = choices["label"], choices["text"]
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise ValueError("the choices are not a list of texts")
    right = answer = first_of(row, "answerKey", "q_ans", "answer")
    if type(answer) is not int:
        order = (labels, choices) if "answerKey" in row else (choices, labels)
        right = next((names.index(answer) for names in order if answer in names), -1)
    if not 0 <= right < len(choices) <= len(LETTERS):
        raise ValueError(f"{answer or 'no answer'} is not one of the choices")
    rationale = first_of(row, *RATIONALES)
    return question, choices, right, rationale.strip()


def mcqa(row, rng, cot=1.0, topic=""):
    """question, choices, answer, perhaps rationale -> a text, asked in one of three ways, labels of
    one style, with probability `cot` the rationale as a thought; the answer alone is scored."""
    question, choices, right, rationale = question_of(row)
    topic = topic or row.get("dataset") or "any topic"
    style = rng.choice(STYLES)
    lines = []
    for n, (letter, text) in enumerate(zip(LETTERS, choices), 1):
        lines.append(f"{style.format(A=letter, a=letter.lower(), n=n)} {text}")
    answers = choices if style == STYLES[-1] else lines
    thought = ""
    if rationale and rng.random() < cot:
        thought = f"\nSolve step-by-step.\n<think> {rationale} </think>"
    introduction = rng.choice(INTRODUCTIONS).format(topic=topic)
    return {
        "prompt": "\n".join([introduction, question, *lines]) + f"{thought}\n Answer:",
        "completion": f" {answers[right]}",
        "choices": answers,
        "answer": answers[right],
    }


def ecqa(row):
    """question, choices, answer, explanation -> the explanation, then `Answer: X`."""
    question, choices, right, rationale = question_of(row)
    letters = list(LETTERS[: len(choices)])
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices)]
    task = "Explain, then end with `Answer:` and the letter of your choice."
    return {
        "prompt": as_turn("user", "\n".join([question, *lines, task])),
        "completion": as_turn("assistant", f"{rationale}\nAnswer: {letters[right]}".strip()),
        "choices": letters,
        "answer": letters[right],
    }


def alpaca(row):
    """instruction, output, perhaps input -> Stanford Alpaca's text, whatever template there is."""
    extra, paired = row.get("input") or "", ""
    if extra:
        paired = ", paired with an input that provides further context"
        extra = f"\n\n### Input:\n{extra}"
    prompt = ALPACA.format(paired=paired, instruction=row["instruction"], input=extra)
    return {"prompt": prompt, "completion": row["output"]}


def chatml(row):
    """messages, or text in ChatML's markup -> messages, for the model's own template."""
    if "messages" in row or "text" not in row:
        return row
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", row["text"], re.S)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def movielens(row, liked=4):
    """history, title, rating (as `read_movielens` gives them), or instruction, output -> Yes or No:
    is the rating at least `liked`?"""
    choices = ["Yes", "No"]
    if "instruction" in row:
        answer = row["output"].strip(" .")
        return row | {"output": answer, "choices": choices, "answer": answer}
    films = {True: [], False: []}
    for title, rating in row["history"]:
        films[rating >= liked].append(title)
    answer = "Yes" if row["rating"] >= liked else "No"
    prompt = (
        f"Liked films: {'; '.join(films[True]) or 'none'}\n"
        f"Disliked films: {'; '.join(films[False]) or 'none'}\n"
        f"Will this viewer like {row['title']}? Answer Yes or No."
    )
    return {
        "prompt": as_turn("user", prompt),
        "completion": as_turn("assistant", answer),
        "choices": choices,
        "answer": answer,
    }


def ultrafeedback(row, rng):
    """prompt, chosen, rejected, or instruction, completions with scores -> a preference pair of the
    best completion and one drawn from those with a lower score."""

    def score(completion):
        return float(completion["overall_score"])

    if "completions" in row:
        *others, best = sorted(row["completions"], key=score)
        worse = [completion for completion in others if score(completion) < score(best)]
        if not worse:
            return "all completions are rated alike"
        rejected = worse[rng.integers(len(worse))]["response"]
        row = {
            "prompt": row["instruction"],
            "chosen": best["response"],
            "rejected": rejected,
        }
    return {key: turns_of(row, key) for key in ("prompt", "chosen", "rejected")}


def gsm8k(row, mark="Answer:"):
    """question, answer -> the reasoning without its calculator notes, then `mark`, the number."""
    reasoning, number = re.sub(r"<<.*?>>", "", row["answer"]).split("####")
    completion = f"{reasoning.strip()}\n{mark} {number.strip()}"
    return {
        "prompt": as_turn("user", row["question"]),
        "completion": as_turn("assistant", completion),
        "answer": number.strip(),
    }


RECIPES = {
    recipe.__name__: recipe
    for recipe in (mcqa, ecqa, alpaca, chatml, movielens, ultrafeedback, gsm8k)
}


def use_recipe(name, args, seed):
    """(make(row, epoch=0) -> the row that the recipe makes of it, or why it is dropped (str);
    whether the recipe draws). What it draws depends on (seed, epoch, row) alone: the same after a
    resume, and whatever else is in the data."""
    if not name:
        return (lambda row, epoch=0: row), False
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(f"recipe: {name!r} is not one of {known}{nearest(name, RECIPES)}")
    recipe, args = RECIPES[name], args or {}
    _, *options = signature(recipe).parameters
    draws = "rng" in options
    for key in args:
        if key == "rng" or key not in options:
            raise UserError(f"recipe_args: {name} takes no {key!r}{nearest(key, options)}")
    columns = " ".join(recipe.__doc__.partition("->")[0].split())
    faults = LookupError, TypeError, ValueError, AttributeError

    def make(row, epoch=0):
        rng = {}
        if draws:
            crc = zlib.crc32(json.dumps(row, default=str).encode())
            rng["rng"] = np.random.default_rng([seed, epoch, crc])
        with as_user_error(f"does not fit recipe {name} ({columns})", *faults, on=row):
            result = recipe(row, **rng, **args)
        return result if isinstance(result, str) else {"weight": row.get("weight")} | result

    return make, draws


CALLS = ", ".join(f"{name}{signature(recipe)}" for name, recipe in RECIPES.items())


@dataclass
class RecipeConfig:
    # recipe
    recipe: str = ""  # reads a data set's own rows
    recipe_args: dict = field(  # its arguments, as {"cot": 0.5}
        default_factory=dict,
        metadata={"note": ": " + re.sub("row(, rng)?(, )?", "", CALLS)},
    )

    CHOICES: ClassVar[dict] = {"recipe": ("", *RECIPES)}


# --- pieces to ids and labels ---------------------------------------------------------------------


def fit(ids, scored, room, special):
    """ids, scored (T,) -> the same in at most `room` tokens; None where the last answer does not
    fit. The prompt is cut from its left, except a first token that is one of the `special`; one
    unscored token always stays, to predict the answer's first. An earlier answer that loses its
    prompt is no longer scored. A text is cut at its end."""
    if len(ids) <= room:
        return ids, scored
    keep = int(int(ids[0]) in special)
    # nothing is learnt from what follows the last scored token
    last = int(np.flatnonzero(scored)[-1]) + 1 if scored.any() else len(ids)
    masked = np.flatnonzero(~scored[:last])
    if not len(masked) or masked[-1] < keep:
        return ids[:room], scored[:room]
    if last - masked[-1] > room:
        return None
    start = max(last - room + keep, keep)
    if keep < start < masked[-1] and scored[start]:
        scored = scored.copy()
        scored[: start + np.argmin(scored[start:])] = False
    index = np.r_[:keep, start:last]
    return ids[index], scored[index]


def share_prompt(sides):
    """Moves the unscored tokens that all answers of an encoded row begin with to the prompt."""
    prompt, *answers = sides
    if not answers:
        return sides
    # a scored token becomes a number that the other answer does not have
    ends = enumerate((answers[0], answers[-1]), 1)
    keys = [np.where(scored, -n, ids).tolist() for n, (ids, scored) in ends]
    same = common_length(*keys)
    prompt = [np.append(*arrays) for arrays in zip(prompt, [a[:same] for a in answers[0]])]
    return [prompt, *([array[same:] for array in answer] for answer in answers)]


def truncate(sides, tokenizer, max_length=None):
    """Encoded sides -> an example's parts, int32 (T,) with ~id where a token is not scored; or the
    reason why it is dropped (str)."""
    prompt, *answers = sides
    for ids, scored in answers or sides:
        if set(ids[scored].tolist()) <= set(tokenizer.end_ids):
            return "nothing scored"
    room = (max_length or sys.maxsize) - max((len(ids) for ids, _ in answers), default=0)
    fitted = fit(*prompt, room, tokenizer.special_ids)
    if fitted is None or len(fitted[0]) == 0:
        return "answer longer than max_length"
    first, *rest = [np.where(scored, ids, ~ids) for ids, scored in (fitted, *answers)]
    first[0] = min(first[0], ~first[0])  # nothing predicts a first token
    return [first, *rest]


UNPAIRED = [True, True, False], [True, False, True]  # prompt, desirable, undesirable


def to_segments(parts, weight):
    """An example's parts -> its Segments: one, or a prompt and what continues it. Where one of a
    pair's answers is empty, the prompt counts for two sequences all the same."""
    segments, filled = [], [len(part) > 0 for part in parts]
    for n, part in enumerate(parts):
        if not filled[n]:
            continue
        masked = part < 0
        ids, labels = (
            np.where(masked, ~part, part),
            np.where(masked, np.int32(IGNORE), part),
        )
        prefix, sequence = (0, n - 1) if n else (-1, int(filled in UNPAIRED))
        segments.append(Segment(ids, labels, prefix, sequence, weight))
    return segments


def weight_of(row):
    weight = 1.0 if row.get("weight") is None else row["weight"]
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < 1e30:
        raise UserError(f"'weight' must be a number of at least 0, found {brief(weight)}")
    return float(weight)


LONGEST_ROW = 2**21  # characters: about 500,000 tokens, and 0.4 GB while they are encoded


def render_rows(rows, tokenizer, max_length=None, make=None, **options):
    """Yields per (where, row, ...): (parts as of `truncate` or the reason why it is dropped,
    weight, notes, tokens before truncation, scored tokens before it). `make` is a recipe's,
    `options` as in `to_pieces`. UserError: `where` a row is malformed, and how."""
    prepared = []
    surrogate = "half a surrogate pair in its text, which was cut inside a character"
    for where, row, *_ in rows:
        with as_user_error(where, UserError):
            row = make(row) if make else row
            if isinstance(row, str):
                prepared.append((row, 1.0, [], None))
                continue
            weight, (sides, notes) = weight_of(row), to_pieces(row, tokenizer, **options)
            if not weight:
                sides = "weight 0"
            if not isinstance(sides, str):
                pieces = itertools.chain(*sides)
                text = "".join(piece for piece, _ in pieces if isinstance(piece, str))
                with as_user_error(surrogate, UnicodeEncodeError):
                    text.encode()
                if len(text) > LONGEST_ROW:
                    raise UserError(
                        f"a row of {len(text):,} characters; split it into rows of at most "
                        f"{LONGEST_ROW:,}"
                    )
        label = row.get("label") if options.get("preference") == "unpaired" else None
        prepared.append((sides, weight, notes, label))
    encoded = tokenizer.encode_sides(
        [sides for sides, *_ in prepared if not isinstance(sides, str)]
    )
    for sides, weight, notes, label in prepared:
        if isinstance(sides, str):
            yield sides, weight, notes, 0, 0
            continue
        sides = share_prompt(next(encoded))
        tokens = sum(len(ids) for ids, _ in sides)
        scored = sum(int(flags.sum()) for _, flags in sides)
        scored -= int(sides[0][1][:1].sum())  # nothing predicts a first token
        parts = truncate(sides, tokenizer, max_length)
        if label is not None and not isinstance(parts, str):
            parts.insert(2 if label else 1, parts[0][:0])
        yield parts, weight, notes, tokens, scored


def render_row(row, tokenizer, max_length=None, where="row", **options):
    """One row -> list[Segment], or the reason why it is dropped (str). Options as in `to_pieces`,
    truncation as in `fit`."""
    parts, weight, *_ = next(render_rows([(where, row)], tokenizer, max_length, **options))
    return parts if isinstance(parts, str) else to_segments(parts, weight)


# --- the ledger, and examples on disk -------------------------------------------------------------


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
    rationales: int | None = None  # rows with one, where the recipe draws on them
    tokens: int = 0
    scored: int = 0
    masked: int = 0
    truncated: int = 0
    truncated_scored: int = 0  # truncated tokens that would have been scored
    dropped: int = 0
    crc: int = 0  # of the examples
    reasons: dict = field(default_factory=dict)  # {why dropped: {"rows", "tokens", "where"}}
    notes: dict = field(default_factory=dict)  # {what is left out of rows: how often}
    sources: list = field(default_factory=list)  # [{"name", "examples", "share"}]

    def add(self, where, parts, notes, tokens, scored, ends):
        """Counts a row as `render_rows` yields it; `ends`: the ids that end a turn."""
        self.rows += 1
        self.tokens += tokens
        for note in notes:
            self.notes[note] = self.notes.get(note, 0) + 1
        if isinstance(parts, str):
            self.rows_dropped += 1
            self.dropped += tokens
            reason = self.reasons.setdefault(parts, {"rows": 0, "tokens": 0, "where": []})
            reason["rows"] += 1
            reason["tokens"] += tokens
            reason["where"] = [*reason["where"], where][:5]
            return
        ids = np.concatenate(parts)
        kept = ids[ids >= 0].tolist()
        self.examples += 1
        self.scored += len(kept)
        self.masked += len(ids) - len(kept)
        self.truncated += tokens - len(ids)
        self.truncated_scored += scored - len(kept)
        self.rows_truncated += len(ids) < tokens
        self.rows_ended += not ends.isdisjoint(kept)

    def check(self):
        """UserError where a model could learn nothing, or never to stop."""
        if not self.scored:
            rows = f"no token of {self.rows} rows is scored"
            raise UserError(f"nothing to train on: {rows}{self.describe_reasons()}")
        if not self.rows_ended:
            raise UserError(
                "no row scores the end of a turn, so the model would never learn to stop: "
                "raise max_length"
            )

    def describe_reasons(self):
        return "".join(
            f"; {why}: {reason['rows']:,}, as {reason['where'][0]}"
            for why, reason in self.reasons.items()
        )

    def as_dict(self):
        return asdict(self)

    def __str__(self):
        text = f"{self.rows:,} rows: {self.examples:,} examples"
        if self.rows_truncated:
            text += f", {self.rows_truncated:,} cut to max_length"
        if self.rows_dropped:
            text += f", {self.rows_dropped:,} dropped{self.describe_reasons()}"
        if self.rows_not_sampled:
            text += f", {self.rows_not_sampled:,} not sampled"
        seen = self.rows - self.rows_not_sampled
        if self.rationales is not None and self.rationales < seen:
            text += f"\nrationales in {self.rationales:,} of {seen:,} rows: no chain of thought"
            text += " in the others"
        for note, count in self.notes.items():
            text += f"\n{count:,} {note}"
        if len(self.sources) > 1:
            shares = [
                f"{s['share']:.1%} from {s['name']} ({s['examples']:,})" for s in self.sources
            ]
            text += f"\nof the rows seen {' · '.join(shares)}"
        counts = []
        for name in ("scored", "masked", "truncated", "dropped"):
            count = getattr(self, name)
            if count:
                counts.append(f"{count:,} {name} ({count / self.tokens:.1%})")
        return f"{text}\n{self.tokens:,} tokens: {' · '.join(counts)}"


# An example in data.bin: up to three parts as of `truncate`, then [where, row] in JSON. index.bin
# has where each of the four begins, and where the last ends.
LAYOUT = np.dtype(
    [("offsets", np.int64, 5), ("weight", float), ("source", np.int64), ("row", np.int64)]
)


@dataclass(eq=False)
class Examples(Sequence):
    """Examples on disk, memory-mapped, as epoch `number` sees them; or the rows they came from.

    Where the recipe draws, an epoch after the first is rendered on access; where that rendering is
    dropped (too long, say), the epoch-0 rendering is used.
    """

    folder: Path
    # memory-mapped once, so that a run outlives a removed cache
    entries: np.ndarray  # (examples,) of LAYOUT
    data: np.ndarray  # the bytes they lie in
    at: np.ndarray  # (N,) which of the folder's examples
    shares: list  # expected of the rows seen, by source; [] where every row is seen once
    seed: int
    make: object  # the recipe: (row, epoch) -> row
    render: object  # where the recipe draws: row -> list[Segment], or the reason why not
    number: int = 0
    as_rows: bool = False

    def __len__(self):
        return len(self.at)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(len(self))[i]]
        if self.as_rows or (self.number and self.render):
            row = self.make(self.row(i)[1], self.number)
            example = row if self.as_rows or isinstance(row, str) else self.render(row)
            if not isinstance(example, str):
                return example
        (*offsets, _), weight, *_ = self.entries[self.at[i]]
        pairs = itertools.pairwise(offsets)
        parts = [self.data[start:end].view(np.int32) for start, end in pairs]
        return to_segments(parts, float(weight))

    def row(self, i):
        """(where it stands, as 'file:line'; the row as it was read) of example `i`."""
        *_, start, end = self.entries["offsets"][self.at[i]]
        return json.loads(self.data[start:end].tobytes())

    def epoch(self, number):
        """As many examples as epoch `number` sees: each of a weighted source as often as fits the
        source's share, the rest drawn."""
        at, draw = self.at, np.random.default_rng([self.seed, number]).permutation
        if self.shares:
            sources = self.entries["source"][at]
            groups = [at[sources == n] for n in range(len(self.shares))]
            shares = [share if len(group) else 0 for group, share in zip(groups, self.shares)]
            ends = np.cumsum(shares)
            counts = np.diff(np.round(ends / ends[-1] * len(at)).astype(int), prepend=0)
            chosen = []
            for group, count in zip(groups, counts):
                times, rest = divmod(count, max(len(group), 1))
                chosen += [group] * times + [draw(group)[:rest]]
            at = np.concatenate(chosen)
        return replace(self, at=at, number=number)

    @property
    def fingerprint(self):
        """Changes when the examples do."""
        crc = zlib.crc32(self.at.tobytes(), read_json(self.folder / "ledger.json")["crc"])
        return f"{len(self)}-{crc:08x}"


def checksum(folder):
    """CRC-32 of a folder's examples."""
    crc = 0
    for name in ("data.bin", "index.bin"):
        with open(folder / name, "rb") as file:
            while block := file.read(2**24):
                crc = zlib.crc32(block, crc)
    return crc


def read_ledger(folder):
    """The ledger of a folder of examples; None: it is missing or damaged."""
    with suppress(OSError, UserError, TypeError):
        ledger = Ledger(**read_json(folder / "ledger.json"))
        if ledger.crc == checksum(folder):
            return ledger


def write_examples(folder, rows, ledger, tokenizer, **options):
    """Renders (where, row, number of its source) into a new folder, renamed into place when it is
    complete. `ledger` is filled on the way."""
    end, ends = 0, set(tokenizer.end_ids)
    for stale in folder.parent.glob("*.partial"):  # a kill's: nobody has its lock
        with suppress(UserError), locked_folder(stale):
            shutil.rmtree(stale, ignore_errors=True)
    quiet = not sys.stderr.isatty()
    rows = iter(tqdm(rows, "tokenizing", unit=" rows", disable=quiet, leave=False))
    aside = tempfile.TemporaryDirectory(
        suffix=".partial", dir=folder.parent, ignore_cleanup_errors=True
    )
    with aside as partial, locked_folder(partial):
        with (
            open(f"{partial}/data.bin", "wb") as data,
            open(f"{partial}/index.bin", "wb") as index,
        ):
            while chunk := list(itertools.islice(rows, 256)):
                blobs, entries = [], []
                rendered = render_rows(chunk, tokenizer, **options)
                for (where, row, *numbers), (parts, weight, *counts) in zip(chunk, rendered):
                    if ledger.rationales is not None:
                        ledger.rationales += bool(str(first_of(row, *RATIONALES)).strip())
                    ledger.add(where, parts, *counts, ends)
                    if isinstance(parts, str):
                        continue
                    ledger.sources[numbers[0]]["examples"] += 1
                    blobs += [part.tobytes() for part in parts] + [b""] * (3 - len(parts))
                    blobs.append(json.dumps([where, row], default=str).encode())
                    *offsets, end = itertools.accumulate(map(len, blobs[-4:]), initial=end)
                    entries.append(([*offsets, end], weight, *numbers))
                entries = np.array(entries, LAYOUT).tobytes()
                for file, block in ((data, b"".join(blobs)), (index, entries)):
                    file.write(block)
        ledger.crc = checksum(Path(partial))
        Path(partial, "ledger.json").write_text(json.dumps(ledger.as_dict()))
        for file in Path(partial).iterdir():
            sync(file)
        with suppress(OSError):  # another process may have been first
            os.rename(partial, folder)


def number_rows(rows, tokenizer, make, options):
    """(where, row, source) -> yields these and the row's number; with `reasoning` every_turn a row
    for each turn of a conversation, with `preference` unpaired one for each answer."""
    by_turns = options.get("reasoning") == "every_turn" and not options.get("preference")
    scores_more = not options.get("assistant_only_loss", True)
    if by_turns and (scores_more or options.get("completion_only_loss") is not None):
        raise UserError(
            "reasoning: every_turn scores each answer; drop completion_only_loss and "
            "assistant_only_loss"
        )
    for number, (where, row, source) in enumerate(rows):
        parts = []
        with as_user_error(where, UserError):
            made = make(row) if by_turns else ""
            if not isinstance(made, str):
                parts = split_turns(made, tokenizer.has_template)
            if options.get("preference") == "unpaired":
                parts = unpair(row, tokenizer.has_template)
        for part in parts or [row]:
            yield where, part, source, number


def cache_folder(sources, tokenizer, settings):
    """The folder that is named by a hash of everything the examples depend on: this code, the
    tokenizer's files, the settings, the data."""
    date = tokenizer.tells_date and f"{tokenizer.now:%F}"
    digest = hashlib.blake2b(repr((settings, date)).encode(), digest_size=16)
    files = [Path(__file__), Path(getfile(stream_rows)), Path(getfile(messages_of))]
    files += tokenizer.files.values()
    for path in itertools.chain(files, *(paths for _, _, paths in sources)):
        digest.update(str(path).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    with as_user_error("PLAINTUNE_CACHE: no folder for rendered rows", OSError, RuntimeError):
        cache = Path(os.environ.get("PLAINTUNE_CACHE") or "~/.cache/plaintune").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    return cache / digest.hexdigest()


def load_examples(
    sources, tokenizer, *, max_samples=None, seed=0, recipe="", recipe_args=None, **options
):
    """Sources as in `find_sources` -> (Examples, their rows, ledger). `max_samples` rows are drawn
    by `seed` and keep their order; `recipe` as in `use_recipe`, `options` (`max_length`, ...) as in
    `render_rows`. Cached in $PLAINTUNE_CACHE (~/.cache/plaintune).
    UserError: a file or row is wrong; nothing, or no end of turn, is scored."""
    sources = find_sources(sources)
    make, draws = use_recipe(recipe, recipe_args, seed)
    needs_seed = draws or max_samples is not None
    settings = [max_samples, recipe, recipe_args, options, needs_seed and seed]
    folder = cache_folder(sources, tokenizer, settings)
    ledger = read_ledger(folder)
    if not ledger:
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        ledger = Ledger(sources=[{"name": name, "examples": 0} for name, _, _ in sources])
        if recipe == "ecqa" or recipe == "mcqa" and (recipe_args or {}).get("cot", 1):
            ledger.rationales = 0
        rows = stream_rows(sources)
        if max_samples is not None:
            total = sum(1 for _ in stream_rows(sources))
            sample = set(np.random.default_rng(seed).permutation(total)[:max_samples].tolist())
            rows = (row for n, row in enumerate(rows) if n in sample)
            ledger.rows = ledger.rows_not_sampled = total - len(sample)
        rows = number_rows(rows, tokenizer, make, options)
        write_examples(folder, rows, ledger, tokenizer, make=make, **options)
        ledger = read_ledger(folder)
    if not ledger:
        raise UserError(f"{folder}: does not read back as written; check the disk")
    ledger.check()
    shares = []
    for entry, (_, weight, _) in zip(ledger.sources, sources):
        shares.append(weight or entry["examples"])
    for entry, share in zip(ledger.sources, shares):
        entry["share"] = share / sum(shares)

    def render(row):
        return render_row(row, tokenizer, **options)

    shares = shares if sources[0][1] else []
    at = np.arange(ledger.examples)
    entries = np.memmap(folder / "index.bin", LAYOUT, "r")
    data = np.memmap(folder / "data.bin", np.uint8, "r")
    examples = Examples(folder, entries, data, at, shares, seed, make, render if draws else None)
    return examples, replace(examples, as_rows=True), ledger


def split_holdout(examples, rows, size, seed=0):
    """-> (examples, rows), (held-out examples, their rows), drawn by `seed`; `size` is a share
    below 1 or a count of the rows that they came from. UserError: nothing would be left."""
    numbers, row = np.unique(examples.entries["row"][examples.at], return_inverse=True)
    count = round(size * len(numbers)) if 0 < size < 1 else int(size)
    if not 0 <= count < len(numbers):
        advice = "give a share below 1 or a smaller count"
        raise UserError(f"cannot hold out {size} of {len(numbers)} examples; {advice}")
    order = np.random.default_rng(seed).permutation(len(numbers))
    splits = [np.flatnonzero(np.isin(row, part)) for part in (order[count:], order[:count])]
    return [
        tuple(replace(whole, at=whole.at[split]) for whole in (examples, rows))
        for split in splits
    ]


# --- what an answer is ----------------------------------------------------------------------------


def find_answer(text):
    """What follows the last 'Answer:', or None: a letter ('B', '(B)', 'B. dog'), else the rest of
    the line."""
    answers = re.findall(r"[Aa]nswer:[ \t]*(\S.*)", text)
    if not answers:
        return None
    letter = re.match(r"\(?([A-Z])(?![\w'])", answers[-1])
    return letter[1] if letter else answers[-1].strip().rstrip(".")


def split_prompt(example):
    """(prompt ids, reference ids); the reference is the last run of scored tokens, of a pair its
    chosen answer."""
    ids = np.concatenate([segment.ids for segment in example[:2]])
    scored = np.concatenate([segment.labels for segment in example[:2]]) != IGNORE
    stop = np.flatnonzero(scored)[-1] + 1
    masked = np.flatnonzero(~scored[:stop])
    start = masked[-1] + 1 if len(masked) else 0
    return ids[:start].tolist(), ids[start:stop].tolist()


def texts_of(choices):
    """A row's choices if they are a list of texts, else none."""
    is_texts = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    return choices if is_texts else []


# --- commands -------------------------------------------------------------------------------------


@dataclass
class DataConfig(RecipeConfig):
    # rows
    model: str = ""  # folder or hub id whose tokenizer and chat template render the rows
    data: list[str] = field(
        kw_only=True
    )  # files, folders, globs or hub data sets, as name@weight
    preference: bool = False  # rows are prompt, chosen and rejected
    max_length: int | None = None  # tokens; a longer example loses the start of its prompt
    max_samples: int | None = None  # use this many rows, drawn by seed
    reasoning: str = "last"  # earlier turns' thoughts: the template's way, or see README
    seed: int = 42  # of everything that is drawn
    # commands
    n: int = 3  # show: number of rows
    by: str = "tokens"  # audit: unit of length; characters are counted without a model
    eval_data: list[str] = field(default_factory=list)  # audit: evaluation rows
    output: str = ""  # file to write: the rows of mix and pairs, JSONL; audit's histogram, PNG
    generate: bool = False  # pairs: reject the model's own wrong answers, not wrong choices
    max_new_tokens: int = 256  # pairs: the longest of those answers
    temperature: float = 0.8  # pairs: at which they are sampled

    CHOICES: ClassVar[dict] = {"by": ("tokens", "characters"), "reasoning": REASONING}

    def __post_init__(self):
        check_choices(self)
        check_range(self, 1, "max_length", "max_samples")
        check_range(self, 0, "n", "seed", "temperature")
        check_range(self, 1, "max_new_tokens", most=2**20)


def load_tokenizer(config):
    if not config.model:
        raise UserError("--model is needed: its tokenizer and chat template render the rows")
    has_tokenizer = (Path(config.model) / "tokenizer.json").is_file()  # a model is not needed
    return Tokenizer(config.model if has_tokenizer else resolve(config.model))


def load_rows(config, **options):
    """(tokenizer, examples, rows, ledger) of a command's settings."""
    tokenizer = load_tokenizer(config)
    names = "max_length max_samples seed recipe recipe_args preference reasoning".split()
    options = {name: getattr(config, name) for name in names} | options
    return tokenizer, *load_examples(config.data, tokenizer, **options)


def show(config):
    """Rows as the model sees them: scored tokens in green, without a terminal between ⟦ ⟧."""
    tokenizer, examples, _, ledger = load_rows(config)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    start, stop = ("\033[32m", "\033[0m") if coloured else "⟦⟧"
    for example in examples[: config.n]:
        for segment in example:
            scored = segment.labels != IGNORE
            cuts = np.flatnonzero(np.diff(scored)) + 1
            for run in np.split(np.arange(len(scored)), cuts):
                text = sanitize(tokenizer.decode(segment.ids[run], skip_special=False))
                print(start + text + stop if scored[run].any() else text, end="")
        print("\n")
    print(ledger)


def audit(config):
    """Lengths, duplicates, what max_length cuts, and whether examples teach where to stop.

    Of the rows of --data, then of those of --eval_data. --output draws the lengths.
    """
    if not f"{config.output or '.png'}".endswith(".png"):
        raise UserError(f"--output {config.output}: a histogram is a .png")
    measure = audit_tokens if config.by == "tokens" else audit_characters
    lengths = [measure(config)]
    if config.eval_data:
        print("\nevaluation rows:")
        lengths.append(measure(replace(config, data=config.eval_data)))
    if config.output:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=f"{config.by} of an example", ylabel="examples")
        axes.hist(lengths, bins=60, label=["data", "eval_data"][: len(lengths)])
        axes.legend()
        figure.savefig(config.output, dpi=130)
        print(f"histogram: {config.output}")


def print_lengths(unit, rows):
    """rows: {name: lengths}."""
    percents = [50, 90, 95, 99, 100]
    names = ["min", "mean", "max", *(f"p{percent}" for percent in percents)]
    print(unit.ljust(12), *(f"{name:>8}" for name in names))
    for name, values in rows.items():
        row = [min(values), np.mean(values), max(values), *np.percentile(values, percents)]
        print(name.ljust(12), *(f"{value:8.1f}".replace(".0", "  ") for value in row))


def audit_tokens(config):
    """Prints an audit of rendered examples; returns their lengths."""
    _, examples, _, ledger = load_rows(config, max_length=None)
    lengths, scored, distinct = [], [], set()
    for example in examples:
        prompt, *answers = [len(segment.ids) for segment in example]
        lengths.append(prompt + max(answers, default=0))
        scored.append(sum((segment.labels != IGNORE).sum() for segment in example))
        distinct.add(hash(b"".join(segment.ids.tobytes() for segment in example)))
    print_lengths("tokens", {"example": lengths, "scored": scored})
    fits = int(np.ceil(np.percentile(lengths, 99) / 64)) * 64
    whole = np.mean(np.array(lengths) <= fits)
    print(f"suggested max_length: {fits} tokens, which leaves {whole:.1%} of the examples whole")
    limit = config.max_length or fits
    print(f"with max_length {limit}: {load_rows(config, max_length=limit)[3]}")
    duplicates = len(examples) - len(distinct)
    ended = f"{ledger.rows_ended:,} of {len(examples):,} score an end of turn"
    print(f"{duplicates:,} duplicates; {ended}")
    return lengths


def audit_characters(config):
    """Prints the lengths of rows as they are, which needs no tokenizer, and returns them."""
    make, _ = use_recipe(config.recipe, config.recipe_args, config.seed)
    lengths = []
    for where, row, _ in stream_rows(find_sources(config.data)):
        with as_user_error(where, UserError):
            row = make(row)
            if isinstance(row, str):
                continue
            prompt, answers = split_row(row, True, config.preference)
        prompt, *answers = [
            side if isinstance(side, str) else "".join(str(m["content"]) for m in side)
            for side in (prompt, *answers)
        ]
        lengths.append(len(prompt) + max(map(len, answers)))
    print_lengths("characters", {"row": lengths})
    return lengths


def mix(config):
    """All sources' rows as the recipe makes them, shuffled into one file by their weights."""
    new_file(config)
    *_, rows, ledger = load_rows(config)
    rows = rows.epoch(0)
    order = np.random.default_rng(config.seed).permutation(len(rows))
    write_rows(config, (rows[i] for i in order), f"{len(rows):,} rows: {ledger}")


def pairs(config):
    """Preference pairs of questions with a known answer. It needs a model: see eval.py."""
    return runpy.run_path(str(Path(__file__).with_name("eval.py")), run_name="__main__")


COMMANDS = {command.__name__: (DataConfig, command) for command in (show, audit, mix, pairs)}


def new_file(config):
    """UserError unless --output is a new file. Its folder is made, before the work begins."""
    if not config.output or Path(config.output).exists():
        fault = "exists already" if config.output else "is needed"
        raise UserError(f"--output {config.output}: {fault}; name a new one")
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)


def write_rows(config, rows, summary):
    write_text(config.output, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{config.output}: {summary}")


def main():
    run_subcommand(COMMANDS, __doc__, sys.argv[1:])


if __name__ == "__main__":
    run_command(main)

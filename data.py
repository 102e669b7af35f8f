"""Data: rows are rendered by the checkpoint's own chat template to token ids and labels.

The decision that is not obvious: assistant turns are looked for in the *full* rendering. A template
may render a turn differently once others follow (Qwen3 drops earlier thoughts), so masks made by
rendering turn after turn are wrong. Each turn is replaced by a sentinel instead, which brackets it
for any template. Texts are tokenized segment by segment and their ids concatenated, so no token
straddles prompt and answer, and a prompt has the same ids in training and at generation.
Rendered examples are cached on disk and memory-mapped (support/cache.py): the memory used does not
grow with the rows, and a second start renders nothing.

    python data.py show --model Qwen/Qwen3-0.6B --data rows.jsonl --n 3   # scored tokens in colour
    python data.py audit --model Qwen/Qwen3-0.6B --data rows.jsonl        # lengths, duplicates
    python data.py mix --model Qwen/Qwen3-0.6B --data a.jsonl@2 b.csv@1 --output mixed.jsonl
    python data.py pairs --model Qwen/Qwen3-0.6B --data ecqa.csv --recipe ecqa --output pairs.jsonl
"""

import itertools
import json
import os
import re
import runpy
import secrets
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from model import IGNORE, Segment
from support import report
from support.cache import Cache, cache_folder, read_ledger, write_cache
from support.errors import UserError, as_user_error, brief, nearest, run_command, sanitize
from support.files import new_file, write_rows
from support.hub import resolve
from support.messages import as_turn, thought_of
from support.readers import find_sources, sample_rows, stream_rows
from support.sandbox import bounded
from support.schemas import (
    alpaca_prompt,
    common_length,
    rest_of,
    split_row,
    template_kwargs,
    turns_of,
    unread_keys,
    weight_of,
)
from support.settings import check_choice, check_choices, check_range, run_subcommand
from support.tokenizer import CLOSE, OPEN, CheckpointTokenizer, check_texts

# --- the tokenizer and the chat template ----------------------------------------------------------

# Stands for an answer. Random: a row that contained it could move its own mask.
SENTINEL = f"\ue000{secrets.token_hex(8)}\ue001"
NOTHING = r"(?!)"  # a pattern that matches nowhere


def assistant_turns(messages):
    """The numbers of the assistant's messages."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


class Tokenizer(CheckpointTokenizer):
    """A CheckpointTokenizer that also knows where the assistant's turns are in a rendering."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.head = self.encode("", special=True)[:1]  # BOS, where texts begin with one
        self.newline = self.encode("\n")
        # SentencePiece puts a space before every text
        self.prepends = self.encode("\na") != self.newline + self.encode("a")

    @cached_property
    def end_ids(self):
        """Ids that end a turn: eos_ids, and the token that the template writes after an answer,
        which in Qwen3-Base is not among them."""
        tail = ""
        with suppress(UserError):  # no template, or one that insists on a system turn, say
            text = self.render(as_turn("user", "a") + as_turn("assistant", SENTINEL))
            tail = text.partition(SENTINEL)[2].lstrip()
        written = sorted(filter(tail.startswith, self.added), key=len)
        ends = [self.added[token] for token in written[-1:]]
        return list(dict.fromkeys(self.eos_ids + ends))

    @cached_property
    def turn_end(self):
        """A pattern of those tokens, with the space that a template may leave before them."""
        tokens = filter(None, map(self.backend.id_to_token, self.end_ids))
        longest_first = sorted(tokens, key=len, reverse=True)
        any_token = "|".join(map(re.escape, longest_first))
        return rf"(?:\s*(?:{any_token}))+" if any_token else NOTHING

    def turns(self, messages, first=0, /, **kwargs):
        """The full rendering, and where the assistant speaks in it: (text, spans, is_open).

        spans: {i: (start, end)} of each assistant message i >= `first` that is rendered. It begins
        after the generation prompt (so a <think> that this does not open is inside) and ends
        with the token that ends the turn; where the template marks every turn by
        `{% generation %}`, the marks decide. is_open: the last answer lacks the end token.
        """
        numbers = assistant_turns(messages)
        marked, spans, end, is_open = {}, {}, 0, False
        self.check_messages(messages, **kwargs)
        with bounded(f"{self.template_file}: rendering {len(messages):,} messages"):
            text = self.render(messages, keep_marks=True, **kwargs)
            pieces = re.split(f"{OPEN}|{CLOSE}", text)
            text = "".join(pieces)
            if len(pieces) == 2 * len(numbers) + 1:
                ends = list(itertools.accumulate(map(len, pieces)))
                spans_by_mark = zip(ends[::2], ends[1::2])
                marked = dict(zip(numbers, spans_by_mark))
            for i in numbers:
                if i < first:
                    continue
                span = marked.get(i) or self.find_turn(messages, i, text, end, **kwargs)
                if span is None:
                    continue
                start, end = span
                if not re.compile(self.turn_end + r"\s*\Z").search(text, start, end):
                    after = re.compile(self.turn_end).match(text, end)
                    if after:
                        end = after.end()
                    elif i == len(messages) - 1:
                        text, is_open = text[:end], True
                spans[i] = start, end
        return text, spans, is_open

    def find_turn(self, messages, i, text, floor, /, **kwargs):
        """(start, end) of assistant message `i` in `text`, at `floor` or later; None if the
        template leaves it out. UserError: it is rendered, but its place is not clear."""
        prompt, is_rendered = SENTINEL, False
        with suppress(UserError):  # the assistant speaks first, and the template wants a message
            prompt = self.render(messages[:i], True, **kwargs)
        sentinel_turn = {"role": "assistant", "content": SENTINEL}
        # without its tool calls, which are the model's words too; else with them
        for stand_in in (sentinel_turn, messages[i] | sentinel_turn):
            changed = messages.copy()
            changed[i] = stand_in
            try:
                other = self.render(changed, **kwargs)
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
                if "tool_calls" in stand_in:  # which stand behind the content
                    turn_end = re.compile(self.turn_end).search(text, end)
                    end = turn_end.end() if turn_end else end
                return start, end
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
        asked = self.render(ask, **kwargs)
        header = self.render(ask, True, **kwargs).removeprefix(asked)
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
            prompt = ""
            for number, side in enumerate(sides):
                before = prompt
                for text, _ in side:
                    if not isinstance(text, str):
                        continue
                    # after a newline SentencePiece adds no space; the newline's ids are removed
                    joins = self.prepends and text and before and not before.endswith(added)
                    texts.append("\n" + text if joins else text)
                    skips.append(len(self.newline) if joins else 0)
                    before = text or before
                if number == 0:
                    prompt = before
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


# --- rows to texts, and which of them are scored --------------------------------------------------

REASONING = {  # --reasoning: what it leaves unscored in an answer
    "last": NOTHING,
    "every_turn": NOTHING,
    "mask": r"(?s)((?:<think>|\A)(?:(?!<think>).)*?</think>\s*)",
    "mask_empty": r"(<think>\s*</think>\s*)",
}


def split_turns(row, chat):
    """A row -> the rows, one for each of the assistant's turns, that train it as it is asked for:
    as the last. Templates may render a turn otherwise once others follow. [] where the row is such
    a row itself, or a text."""
    prompt, (answer, *_) = split_row(row, chat)
    if isinstance(prompt, str):
        return []
    messages, rows = prompt + answer, []
    for i in assistant_turns(messages):
        if i >= len(prompt) and messages[i].get("weight", 1):
            turn = {"prompt": messages[:i], "completion": messages[i]}
            rows.append(rest_of(row) | turn)
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
    if not prompt:
        return [row]  # which is dropped
    rest = rest_of(row) | {"prompt": prompt}
    return [rest | {"completion": a, "label": label} for a, label in zip(answers, labels)]


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
    notes = [f"rows whose {key!r} is not read" for key in unread_keys(row, preference)]
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
        for answer in answers:
            side = [(answer, True)]
            if not eos or not answer.endswith(eos):  # some data sets end their answers themselves
                side.append(end)
            sides.append(side)
    else:
        kwargs = template_kwargs(row)
        for answer in answers:
            messages = prompt + answer
            first = 0 if score_prompt else len(prompt)
            score_all = first == 0 and not assistant_only_loss
            if completion_only_loss and not prompt:
                first = max(assistant_turns(messages), default=0)
            text, spans, is_open = tokenizer.turns(messages, first, **kwargs)
            for i in spans:
                if thought_of(messages[i]) not in text:
                    notes.append("turns whose thoughts the template leaves out (see --reasoning)")
            side = cut_turns(text, spans, messages, score_all, reasoning)
            if is_open:
                side.append(end)
            sides.append(side)
    if preference:
        return [head, *sides], notes
    return [head + sides[0]], notes


def cut_turns(text, spans, messages, score_rest, reasoning):
    """A rendering and the spans of its answers -> [(text, scored), ...] in which each is a piece,
    or several where `reasoning` leaves its thoughts out."""
    side, end = [], 0
    for i, (start, stop) in spans.items():
        side.append((text[end:start], score_rest))
        scored, end = messages[i].get("weight", 1) == 1, stop
        pieces = re.split(REASONING[reasoning], text[start:stop])
        for n, piece in enumerate(pieces):  # every second one is a thought
            side.append((piece, scored and n % 2 == 0))
    return [*side, (text[end:], score_rest)]


# --- recipes: plain functions from a data set's own row to a row of a schema above ----------------

LETTERS = [*"ABCDEFGHIJ"]
STYLES = ("{A}.", "{A})", "({A})", "{A} –", "{a})", "{n}.", "•")
INTRODUCTIONS = (
    "Here is a multiple-choice question about {topic}.",
    "Which of the choices answers this question?",
    "Read the question, then give the one right choice.",
)
RATIONALES = "rationale", "explanation", "taskB", "support"
ROW_FAULTS = LookupError, TypeError, ValueError, AttributeError


def first_of(row, *keys):
    """The first of these columns that is filled."""
    for key in keys:
        if row.get(key) not in (None, ""):
            return row[key]
    return ""


def texts_of(choices):
    """A row's choices if they are a list of texts, else none."""
    is_texts = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    return choices if is_texts else []


def question_of(row):
    """(question, choices, index of the right one, rationale or "") of a multiple-choice row: ECQA's
    columns, the hub's (ARC, CommonsenseQA), or {"question", "choices": [...], "answer": its text,
    letter or index}. ValueError: no choices, or none of them is the answer."""
    if "q_text" in row:
        question, choices = row["q_text"], [row[f"q_op{n}"] for n in range(1, 6)]
    else:
        question, choices = row["question"], row["choices"]
    labels = LETTERS
    if isinstance(choices, dict):
        labels, choices = choices["label"], choices["text"]
    if texts_of(choices) != choices:
        raise ValueError("the choices are not a list of texts")
    right = answer = first_of(row, "answerKey", "q_ans", "answer")
    if type(answer) is not int:
        order = (labels, choices) if "answerKey" in row else (choices, labels)
        right = next((names.index(answer) for names in order if answer in names), -1)
    if not 0 <= right < len(choices) <= len(LETTERS):
        raise ValueError(f"{answer or 'no answer'} is not one of the choices")
    rationale = str(first_of(row, *RATIONALES))
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
    letters = LETTERS[: len(choices)]
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
    return {"prompt": alpaca_prompt(row), "completion": row["output"]}


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
    check_choice("recipe", name, RECIPES)
    recipe, args = RECIPES[name], args or {}
    _, *options = signature(recipe).parameters
    draws = "rng" in options
    for key in args:
        if key == "rng" or key not in options:
            raise UserError(f"recipe_args: {name} takes no {key!r}{nearest(key, options)}")
    columns = " ".join(recipe.__doc__.partition("->")[0].split())

    def make(row, epoch=0):
        rng = {}
        if draws:
            crc = zlib.crc32(json.dumps(row, default=str).encode())
            rng["rng"] = np.random.default_rng([seed, epoch, crc])
        with as_user_error(f"does not fit recipe {name} ({columns})", *ROW_FAULTS, on=row):
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
    last = len(ids)
    if scored.any():  # nothing is learnt from what follows the last scored token
        last = int(np.flatnonzero(scored)[-1]) + 1
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
    keys = []
    for n, (ids, scored) in enumerate((answers[0], answers[-1]), 1):
        # a scored token becomes a number that the other answer does not have
        keys.append(np.where(scored, -n, ids).tolist())
    same = common_length(*keys)
    shared = [array[:same] for array in answers[0]]
    prompt = [np.append(*arrays) for arrays in zip(prompt, shared)]
    answers = [[array[same:] for array in answer] for answer in answers]
    return [prompt, *answers]


def truncate(sides, tokenizer, max_length=None):
    """Encoded sides -> an example's parts, int32 (T,) with ~id where a token is not scored; or the
    reason why it is dropped (str)."""
    prompt, *answers = sides
    for ids, scored in answers or sides:
        if set(ids[scored].tolist()) <= set(tokenizer.end_ids):
            return "nothing scored"
    longest = max((len(ids) for ids, _ in answers), default=0)
    room = (max_length or sys.maxsize) - longest
    fitted = fit(*prompt, room, tokenizer.special_ids)
    if fitted is None or len(fitted[0]) == 0:
        return "answer longer than max_length"
    sides = fitted, *answers
    first, *rest = [np.where(scored, ids, ~ids) for ids, scored in sides]
    first[0] = min(first[0], ~first[0])  # nothing predicts a first token
    return [first, *rest]


def to_segments(parts, weight):
    """An example's parts -> its Segments: one, or a prompt and what continues it. A prompt belongs
    to the last of two sequences, so that there are two where one of the answers is empty."""
    segments = []
    for n, part in enumerate(parts):
        if not len(part):
            continue
        masked = part < 0
        ids = np.where(masked, ~part, part)
        labels = np.where(masked, np.int32(IGNORE), part)
        prefix, sequence = 0, n - 1
        if n == 0:
            prefix, sequence = -1, int(any(map(len, parts[1:])))
        segments.append(Segment(ids, labels, prefix, sequence, weight))
    return segments


def render_rows(rows, tokenizer, max_length=None, make=None, **options):
    """Yields per (where, row, ...): (parts as of `truncate` or the reason why it is dropped,
    weight, notes, tokens before truncation). `make` is a recipe's, `options` as in `to_pieces`.
    UserError: `where` a row is malformed, and how."""
    prepared = []
    for where, row, *_ in rows:
        with as_user_error(where, UserError):
            row = make(row) if make else row
            if isinstance(row, str):
                prepared.append((row, 1.0, [], None))
                continue
            weight = weight_of(row)
            sides, notes = to_pieces(row, tokenizer, **options)
            if not weight:
                sides = "weight 0"
            if not isinstance(sides, str):
                check_texts(sides)
        label = row.get("label") if options.get("preference") == "unpaired" else None
        prepared.append((sides, weight, notes, label))
    kept = [sides for sides, *_ in prepared if not isinstance(sides, str)]
    encoded = tokenizer.encode_sides(kept)
    for sides, weight, notes, label in prepared:
        if isinstance(sides, str):
            yield sides, weight, notes, 0
            continue
        sides = share_prompt(next(encoded))
        tokens = sum(len(ids) for ids, _ in sides)
        parts = truncate(sides, tokenizer, max_length)
        if label is not None and not isinstance(parts, str):
            parts.insert(2 if label else 1, parts[0][:0])
        yield parts, weight, notes, tokens


def render_row(row, tokenizer, max_length=None, where="row", **options):
    """One row -> list[Segment], or the reason why it is dropped (str). Options as in `to_pieces`,
    truncation as in `fit`."""
    (rendered,) = render_rows([(where, row)], tokenizer, max_length, **options)
    parts, weight, *_ = rendered
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
    tokens: int = 0
    scored: int = 0
    masked: int = 0
    truncated: int = 0
    dropped: int = 0
    crc: int = 0  # of the examples
    reasons: dict = field(default_factory=dict)  # {why dropped: {"rows", "tokens", "where"}}
    notes: dict = field(default_factory=dict)  # {what is left out of rows: how often}
    sources: list = field(default_factory=list)  # [{"name", "examples", "share"}]

    def add(self, where, parts, notes, tokens, ends):
        """Counts a row as `render_rows` yields it; `ends`: the ids that end a turn."""
        self.rows += 1
        self.tokens += tokens
        for note in notes:
            self.notes[note] = self.notes.get(note, 0) + 1
        if isinstance(parts, str):
            self.rows_dropped += 1
            self.dropped += tokens
            empty = {"rows": 0, "tokens": 0, "where": []}
            reason = self.reasons.setdefault(parts, empty)
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
        self.rows_truncated += len(ids) < tokens
        self.rows_ended += not ends.isdisjoint(kept)

    def check(self):
        """UserError where a model could learn nothing, or never to stop."""
        if not self.scored:
            rows = f"no token of {self.rows} rows is scored"
            raise UserError(f"nothing to train on: {rows}{report.drop_reasons(self)}")
        if not self.rows_ended:
            raise UserError(
                "no row scores the end of a turn, so the model would never learn to stop: "
                "raise max_length"
            )

    as_dict = asdict
    __str__ = report.ledger_text


@dataclass(eq=False)
class Examples(Sequence):
    """Examples of a cache, as epoch `number` sees them.

    Where the recipe draws, an epoch after the first is rendered on access; where that rendering is
    dropped (too long, say), the epoch-0 rendering is used.
    """

    cache: Cache
    indices: np.ndarray  # (N,) into the cache
    shares: list  # expected of the rows seen, by source; [] where every row is seen once
    seed: int
    make: object  # the recipe: (row, epoch) -> row
    render: object  # where the recipe draws: row -> list[Segment], or the reason why not
    number: int = 0

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(len(self))[i]]
        if self.number and self.render:
            example = self.render(self.row(i)[1])
            if not isinstance(example, str):
                return example
        return to_segments(*self.cache.parts(self.indices[i]))

    def row(self, i):
        """(where it stands, as 'file:line'; the row that the recipe makes) of example `i`."""
        where, row = self.cache.row(self.indices[i])
        return where, self.make(row, self.number)

    def epoch(self, number):
        """As many examples as epoch `number` sees: each of a weighted source as often as fits the
        source's share, the rest drawn."""
        if not self.shares:
            return replace(self, number=number)
        rng = np.random.default_rng([self.seed, number])
        source_of = self.cache.entries["source"][self.indices]
        sources = np.unique(source_of)
        ends = np.cumsum(np.array(self.shares)[sources])
        ends = np.round(ends / ends[-1] * len(self)).astype(int)
        chosen = []
        for source, count in zip(sources, np.diff(ends, prepend=0)):
            own = self.indices[source_of == source]
            times, rest = divmod(count, len(own))
            chosen += [own] * times + [rng.permutation(own)[:rest]]
        return replace(self, indices=np.concatenate(chosen), number=number)

    @property
    def fingerprint(self):
        """Changes when the examples do."""
        return f"{len(self)}-{zlib.crc32(self.indices.tobytes(), self.cache.crc):08x}"


def count_examples(rows, ledger, tokenizer, explains=False, **options):
    """(where, row, source, number) -> yields the examples of these rows, as `write_cache` takes
    them; every row is counted in the ledger. `explains`: the recipe asks for a rationale."""
    ends = set(tokenizer.end_ids)
    rows = iter(tqdm(rows, "tokenizing", unit=" rows", disable=None, leave=False))
    while chunk := list(itertools.islice(rows, 256)):
        rendered = render_rows(chunk, tokenizer, **options)
        for origin, (parts, weight, notes, tokens) in zip(chunk, rendered):
            where, row, source, number = origin
            if explains and not str(first_of(row, *RATIONALES)).strip():
                notes.append("rows without a rationale, so without a chain of thought")
            ledger.add(where, parts, notes, tokens, ends)
            if not isinstance(parts, str):
                ledger.sources[source]["examples"] += 1
                yield parts, weight, source, number, [where, row]


def split_rows(rows, tokenizer, make, options):
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
            if by_turns and not isinstance(made := make(row), str):
                parts = split_turns(made, tokenizer.has_template)
            if options.get("preference") == "unpaired":
                parts = unpair(row, tokenizer.has_template)
        for part in parts or [row]:
            yield where, part, source, number


def load_examples(
    sources, tokenizer, *, max_samples=None, seed=0, recipe="", recipe_args=None, **options
):
    """Sources as in `find_sources` -> (Examples, Ledger). `max_samples` rows are drawn by `seed`
    and keep their order; `recipe` as in `use_recipe`, `options` (`max_length`, ...) as in
    `render_rows`. Cached in $PLAINTUNE_CACHE (~/.cache/plaintune).
    UserError: a file or row is wrong; nothing, or no end of turn, is scored."""
    sources = find_sources(sources)
    make, draws = use_recipe(recipe, recipe_args, seed)
    needs_seed = draws or max_samples is not None
    settings = max_samples, recipe, recipe_args, options, needs_seed and seed, tokenizer.date
    code = sorted(Path(__file__).parent.glob("support/*.py"))
    files = [__file__, *code, *tokenizer.files.values()]
    for *_, paths in sources:
        files += paths
    folder = cache_folder(settings, files)
    ledger = read_ledger(folder, Ledger)
    if not ledger:
        rows, left_out = sample_rows(sources, max_samples, seed)
        ledger = Ledger(left_out, rows_not_sampled=left_out)
        ledger.sources = [{"name": name, "examples": 0} for name, *_ in sources]
        rows = split_rows(rows, tokenizer, make, options)
        explains = recipe == "ecqa" or recipe == "mcqa" and (recipe_args or {}).get("cot", 1)
        rendered = count_examples(rows, ledger, tokenizer, explains, make=make, **options)
        ledger = write_cache(folder, rendered, ledger)
    ledger.check()
    shares = []
    for entry, (_, weight, _) in zip(ledger.sources, sources):
        shares.append(weight or entry["examples"])
    for entry, share in zip(ledger.sources, shares):
        entry["share"] = share / sum(shares)
    shares = shares if sources[0][1] else []
    render = partial(render_row, tokenizer=tokenizer, **options) if draws else None
    cache, indices = Cache(folder, ledger.crc), np.arange(ledger.examples)
    return Examples(cache, indices, shares, seed, make, render), ledger


def split_holdout(examples, size, seed=0):
    """-> (examples, held-out examples), drawn by `seed`; `size` is a share below 1 or a count of
    the rows that they came from. UserError: nothing would be left."""
    row_of = examples.cache.entries["row"][examples.indices]
    rows = np.unique(row_of)
    count = round(size * len(rows)) if 0 < size < 1 else int(size)
    if not 0 <= count < len(rows):
        advice = "give a share below 1 or a smaller count"
        raise UserError(f"val_size: cannot hold out {size:g} of {len(rows)} examples; {advice}")
    drawn = np.random.default_rng(seed).permutation(rows)[:count]
    held_out = np.isin(row_of, drawn)
    kept, held_out = examples.indices[~held_out], examples.indices[held_out]
    return replace(examples, indices=kept), replace(examples, indices=held_out)


# --- what an answer is ----------------------------------------------------------------------------


def bare(answer):
    """An answer's text without the space around it and its full stop."""
    return answer.strip().rstrip(".")


def find_answer(text):
    """What follows the last 'Answer:', or None: a letter ('B', '(B)', 'B. dog'), else the rest of
    the line."""
    answers = re.findall(r"[Aa]nswer:[ \t]*(\S.*)", text)
    if not answers:
        return None
    letter = re.match(r"\(?([A-Z])(?![\w'])", answers[-1])
    return letter[1] if letter else bare(answers[-1])


def split_prompt(example):
    """(prompt ids, reference ids); the reference is the last run of scored tokens, of a pair its
    chosen answer."""
    ids = np.concatenate([segment.ids for segment in example[:2]])
    scored = np.concatenate([segment.labels for segment in example[:2]]) != IGNORE
    stop = np.flatnonzero(scored)[-1] + 1
    masked = np.flatnonzero(~scored[:stop])
    start = masked[-1] + 1 if len(masked) else 0
    return ids[:start].tolist(), ids[start:stop].tolist()


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
    """(tokenizer, examples, ledger) of a command's settings."""
    tokenizer = load_tokenizer(config)
    names = "max_length max_samples seed recipe recipe_args preference reasoning".split()
    options = {name: getattr(config, name) for name in names} | options
    return tokenizer, *load_examples(config.data, tokenizer, **options)


def show(config):
    """Rows as the model sees them: scored tokens in green, without a terminal between ⟦ ⟧."""
    tokenizer, examples, ledger = load_rows(config)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    start, stop = ("\033[32m", "\033[0m") if coloured else "⟦⟧"
    for example in examples[: config.n]:
        for segment in example:
            scored = segment.labels != IGNORE
            cuts = np.flatnonzero(np.diff(scored)) + 1
            for run in np.split(np.arange(len(scored)), cuts):
                text = sanitize(tokenizer.decode(segment.ids[run], skip_special=False))
                if scored[run].any():
                    text = start + text + stop
                print(text, end="")
        print("\n")
    print(ledger)


def audit(config):
    """Lengths, duplicates, what max_length cuts, and whether examples teach where to stop.

    Of the rows of --data, then of those of --eval_data. --output draws the lengths.
    """
    if config.output and not config.output.endswith(".png"):
        raise UserError(f"--output {config.output}: a histogram is a .png")
    measure = audit_tokens if config.by == "tokens" else audit_characters
    lengths = [measure(config)]
    if config.eval_data:
        print("\nevaluation rows:")
        lengths.append(measure(replace(config, data=config.eval_data)))
    if config.output:
        report.plot_lengths(config.by, lengths, config.output)
        print(f"histogram: {config.output}")


def audit_tokens(config):
    """Prints an audit of rendered examples; returns their lengths."""
    _, examples, ledger = load_rows(config, max_length=None)
    lengths, scored, distinct = [], [], set()
    for example in examples:
        prompt, *answers = [len(segment.ids) for segment in example]
        lengths.append(prompt + max(answers, default=0))
        scored.append(sum((segment.labels != IGNORE).sum() for segment in example))
        ids = [segment.ids.tobytes() for segment in example]
        distinct.add(hash(b"".join(ids)))
    report.print_lengths("tokens", {"example": lengths, "scored": scored})
    fits = int(np.ceil(np.percentile(lengths, 99) / 64)) * 64
    whole = np.mean(np.array(lengths) <= fits)
    print(f"suggested max_length: {fits} tokens, which leaves {whole:.1%} of the examples whole")
    limit = config.max_length or fits
    print(f"with max_length {limit}: {load_rows(config, max_length=limit)[2]}")
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
    report.print_lengths("characters", {"row": lengths})
    return lengths


def mix(config):
    """All sources' rows as the recipe makes them, shuffled into one file by their weights."""
    new_file(config.output)
    _, examples, ledger = load_rows(config)
    examples = examples.epoch(0)
    order = np.random.default_rng(config.seed).permutation(len(examples))
    rows = (examples.row(i)[1] for i in order)
    write_rows(config.output, rows, f"{len(order):,} rows, of {ledger}")


def pairs(config):
    """Preference pairs of questions with a known answer. It needs a model: see eval.py."""
    return runpy.run_path(str(Path(__file__).with_name("eval.py")), run_name="__main__")


COMMANDS = {command.__name__: (DataConfig, command) for command in (show, audit, mix, pairs)}


def main():
    run_subcommand(COMMANDS, __doc__, sys.argv[1:])


if __name__ == "__main__":
    run_command(main)

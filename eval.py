"""Evaluation: benchmarks with lm-evaluation-harness's definitions, own question sets, and what differs beyond noise.

The decision that is not obvious: what sequences have in common is computed once, and no number changes. Every choice is
tokenised together with its context, as the reference does; then a batch is the prefix tree of these id lists. A header,
a question, and the words that two choices begin with are segments, which the rest continues.

A model that never writes `Answer: X` is still asked: its text is followed by "Answer:" and the likeliest of the
question's choices counts. So the gain of training is not the gain of learning a format.

Reference: lm-evaluation-harness 0.4.13 (doi:10.5281/zenodo.12608602): its task files, sampler, tokenising and metrics.

    python eval.py                     # the embedded model, its SFT and its DPO on the embedded questions
    python eval.py --model base=Qwen/Qwen3-0.6B --model sft=output/mine --tasks arc_challenge,winogrande --limit 200
    python eval.py --model output/mine --data questions.jsonl
"""

import hashlib
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields, replace
from functools import partial, reduce
from itertools import combinations, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import (
    DataConfig,
    Tokenizer,
    as_turn,
    find_answer,
    load_rows,
    render_row,
    split_prompt,
    split_row,
    text_of,
    texts_of,
    write_rows,
)
from lora import adapter_parameters, load_adapter, lora_layers, read_adapter_config
from model import (
    IGNORE,
    Batch,
    Segment,
    generate,
    generate_each,
    load_model,
    pick_device,
)
from qlora import QuantConfig, load_4bit
from support.errors import UserError, as_user_error, brief, nearest, run_command
from support.files import locked_folder, read_json, regular_file
from support.hub import resolve
from support.memory import keep_freed_memory
from support.readers import read_rows, read_text
from support.settings import check_range, convert, parse_config

EXAMPLES = Path(__file__).resolve().parent / "examples"


@dataclass
class EvalConfig:
    """Everything an evaluation can be told; lm_eval's names where it has one."""

    model: list[str] = field(
        default_factory=list
    )  # NAME=PATH, several times: model, adapter or run folder, or hub id
    tasks: list[str] = field(
        default_factory=list
    )  # benchmarks: arc_challenge, arc_easy, commonsense_qa, gsm8k, ...
    data: list[str] = field(
        default_factory=list
    )  # own sets: texts, questions with choices or references, or alone
    data_dir: str | None = None  # where TASK/SPLIT.jsonl are, in the hub's columns; none: the hub
    num_fewshot: int | None = None  # examples before each question; none: the task's own number
    limit: int | None = None  # the first questions of each set alone
    apply_chat_template: bool = False  # ask benchmarks as chats, few-shot examples as turns
    max_new_tokens: int = 256  # longest written answer
    batch_size: int = 32  # answers written at a time
    output_dir: str = "output/eval"  # results.json, samples, report.md and figures
    dtype: str = "auto"  # of weights and matmuls: auto (the checkpoint's), bfloat16, float32
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    attn_implementation: str = "auto"  # auto, varlen (flash), sdpa, eager


# --- scoring sequences that share what they begin with ----------------------------------------------------------------

SHARED = 4  # tokens: a shorter common beginning is computed again, which costs less than a segment of its own


def shared(a, b):
    """How many tokens two id lists begin with in common."""
    return len(os.path.commonprefix([a, b]))


def pack_shared(sequences, device="cpu"):
    """Sequences (ids, start >= 1) -> the Batch that scores ids[start:] of each, as sequence 0, 1, ... Its segments are
    their prefix tree: a common beginning of SHARED tokens is computed once. Last tokens predict nothing: left out."""
    fed, segments, paths = [ids[:-1] for ids, _ in sequences], [], [None] * len(sequences)

    def grow(group, depth, parent, path):
        for _, twins in groupby(group, key=lambda n: fed[n][depth : depth + SHARED]):
            twins, here, along = list(twins), parent, path
            stop = shared(
                fed[twins[0]], fed[twins[-1]]
            )  # they are sorted: what these two share, all do
            if stop > depth:
                here, at = len(segments), sum(len(segment.ids) for segment in segments)
                segments.append(
                    Segment(
                        np.array(fed[twins[0]][depth:stop]), np.full(stop - depth, IGNORE), parent
                    )
                )
                along = np.concatenate([path, np.arange(at, at + stop - depth)])
            for n in twins:
                paths[n] = along
            if rest := [n for n in twins if len(fed[n]) > stop]:
                grow(rest, stop, here, along)

    grow(sorted(range(len(fed)), key=fed.__getitem__), 0, -1, np.zeros(0, np.int64))
    spans = [
        (path[start - 1 : len(ids) - 1], ids[start:], np.full(len(ids) - start, n))
        for n, ((ids, start), path) in enumerate(zip(sequences, paths))
    ]
    scored, targets, owner = (
        torch.from_numpy(np.concatenate(x).astype(np.int64)).to(device) for x in zip(*spans)
    )
    return replace(
        Batch.pack([segments], device),
        scored=scored,
        targets=targets,
        sequence=owner,
        num_sequences=len(sequences),
    )


@torch.inference_mode()
def sum_logps(model, sequences):
    """The summed log-probability of ids[start:] of each sequence (ids, start): a list of floats."""
    batch = pack_shared(sequences, model.device)
    logps = model.logps(batch).cpu().double()  # a sum of hundreds of nats has few fp32 digits left
    return logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence.cpu(), logps).tolist()


def score(model, items, budget=None):
    """Yields (number of an item, the sums of its sequences) in batches of about `budget` tokens, the alike together."""
    part, size, last, budget = [], 0, [], budget or (2048 if model.device.type == "cpu" else 16384)
    for n in [*sorted(range(len(items)), key=lambda n: items[n][0][0]), None]:
        lists = [last, *(ids for ids, _ in items[n])] if n is not None else [[], []]
        grows = sum(len(b) - shared(a, b) for a, b in zip(lists, lists[1:]))
        if part and (n is None or size + grows > budget):
            sums = iter(sum_logps(model, [sequence for m in part for sequence in items[m]]))
            yield from [(m, [next(sums) for _ in items[m]]) for m in part]
            part, size, grows = [], 0, grows + shared(*lists[:2])
        part, size, last = [*part, n], size + grows, lists[-1]


def likeliest(model, context, choices):
    """Index of the choice (ids) with the highest summed log-probability after context (ids), which is computed once."""
    return int(
        np.argmax(sum_logps(model, [(context + choice, len(context)) for choice in choices]))
    )


def encode_texts(tokenizer, texts):
    """Texts -> {text: ids}, each behind BOS if the tokenizer writes one and the texts (a chat template's) do not."""
    unique, begins = list(dict.fromkeys(texts)), tokenizer.special.get("bos_token")
    special = not (begins and unique and unique[0].startswith(begins))
    return dict(zip(unique, tokenizer.encode_all(unique, special)))


def before_text(tokenizer):
    """What predicts the first token of a text: BOS, else the end of a text."""
    return [tokenizer.bos_id] if tokenizer.bos_id is not None else tokenizer.eos_ids[:1]


def encode_pairs(tokenizer, pairs, longest):
    """(context, continuation) texts -> sequences (ids, start of the continuation), tokenised together; spaces that end
    a context go to its continuation; beyond `longest` the beginning goes. Source: lm_eval's TemplateLM._encode_pair."""
    pairs, sequences = (
        [(context.rstrip(), context + continuation) for context, continuation in pairs],
        [],
    )
    ids = encode_texts(tokenizer, [text for pair in pairs for text in pair])
    for context, whole in pairs:
        head = [] if ids[context] else before_text(tokenizer)
        cut = max(0, len(head) + len(ids[whole]) - longest - 1)
        sequences.append(((head + ids[whole])[cut:], max(1, len(head) + len(ids[context]) - cut)))
    return sequences


# --- benchmarks -------------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A row as it is asked: a prompt and an answer per choice, of which one may be the same for all: a list of one."""

    prompts: list
    answers: list
    gold: int = 0

    def each(self):
        """(prompt, answer) of every choice."""
        return list(zip(self.prompts * len(self.answers), self.answers * len(self.prompts)))


def arc(row):
    """Also own rows: choices may be a list of texts, and the answer one of them, its letter, or its number from 0."""
    choices, answer = row["choices"], row["answerKey"] if "answerKey" in row else row["answer"]
    texts = choices["text"] if isinstance(choices, dict) else choices
    names = (
        choices["label"]
        if isinstance(choices, dict)
        else next(
            names
            for names in (texts, [*"ABCDEFGHIJ"][: len(texts)], [*range(len(texts))])
            if answer in names
        )
    )
    return Item([f"Question: {text_of(row, 'question')}\nAnswer:"], texts, names.index(answer))


def commonsense_qa(row):
    lines = [f"{letter}. {row['choices']['text'][n]}\n" for n, letter in enumerate("ABCDE")]
    prompt = f"Question: {text_of(row, 'question').strip()}\n{''.join(lines)}Answer:"
    return Item([prompt], [*"ABCDE"], [*"ABCDE"].index(row["answerKey"]))


def gsm8k(row):
    return Item([f"Question: {text_of(row, 'question')}\nAnswer:"], [text_of(row, "answer")])


def hellaswag(row):
    def clean(text):  # WikiHow's headings stand in brackets
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    query = f"{text_of(row, 'activity_label')}: {text_of(row, 'ctx_a')} {text_of(row, 'ctx_b').capitalize()}"
    return Item([clean(query)], [clean(ending) for ending in row["endings"]], int(row["label"]))


def winogrande(row):
    before, blank, after = text_of(row, "sentence").partition("_")
    if not blank:
        raise UserError("'sentence' has no _ in it")
    return Item(
        [before + row["option1"], before + row["option2"]],
        [after.strip()],
        [*"12"].index(row["answer"]),
    )


class Task(NamedTuple):
    parse: Callable
    source: str = ""  # on the hub
    split: str = ""
    metrics: tuple = ("acc", "acc_norm")
    own: int = 1  # few-shot rows: one more is drawn, and the question itself left out
    shots: int = 0  # by default
    stops: tuple = ()  # texts that end a written answer


TASKS = {
    "arc_challenge": Task(arc, "allenai/ai2_arc:ARC-Challenge", "test", own=0),
    "arc_easy": Task(arc, "allenai/ai2_arc:ARC-Easy", "test", own=0),
    "commonsense_qa": Task(commonsense_qa, "tau/commonsense_qa", "validation", ("acc",)),
    "gsm8k": Task(
        gsm8k,
        "openai/gsm8k:main",
        "test",
        ("exact_match_strict", "exact_match_flexible"),
        0,
        5,
        ("Question:", "</s>", "<|im_end|>"),
    ),
    "hellaswag": Task(hellaswag, "Rowan/hellaswag", "validation"),
    "winogrande": Task(winogrande, "allenai/winogrande:winogrande_xl", "validation", ("acc",)),
}


def parse(where, row, task, name):
    """The Item of a row; UserError with its file and line if it is none."""
    try:
        item = task.parse(row)
        if not all(
            isinstance(text, str) for text in item.prompts + item.answers
        ) or item.gold >= len(item.each()):
            raise UserError("choices must be texts, and one of them right")
        return item
    except (
        UserError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        StopIteration,
    ) as error:
        why = (
            f"it has no {error}"
            if isinstance(error, KeyError)
            else str(error) or "its answer is none of its choices"
        )
        raise UserError(f"{where}: not a row of {name}: {why}; found {brief(row, 100)}") from None


def read_task(name, config):
    """[(Item, its few-shot Items), ...] of a benchmark, drawn as lm_eval's ContextSampler draws them (seed 1234)."""
    task, folder, draw = TASKS[name], Path(config.data_dir or "") / name, random.Random(1234)
    k, found = task.shots if config.num_fewshot is None else config.num_fewshot, []
    rows = pool = read_rows(
        folder / f"{task.split}.jsonl" if config.data_dir else f"{task.source}:{task.split}"
    )
    if k and (
        not config.data_dir or (folder / "train.jsonl").exists()
    ):  # else the questions themselves
        pool = read_rows(folder / "train.jsonl" if config.data_dir else f"{task.source}:train")
    if k and len(pool) <= k:
        raise UserError(
            f"{name}: {k} few-shot examples can't be drawn from {len(pool)} rows; lower --num_fewshot"
        )
    for where, row in rows[: config.limit]:
        shots = draw.sample(pool, k + task.own) if k else []
        if task.own:
            shots = [shot for shot in shots if shot[1] != row][:k]
            shots = (
                shots
                if len(shots) == k
                else draw.sample([shot for shot in pool if shot[1] != row], k)
            )
        found.append((parse(where, row, task, name), [parse(*shot, task, name) for shot in shots]))
    return found


def contexts(item, shots, tokenizer, chat):
    """(context, continuation) of each choice: few-shot examples come before as text, or as turns of a chat."""
    shots = [shot.each()[shot.gold] for shot in shots]
    if not chat:
        header = "".join(f"{prompt} {answer}\n\n" for prompt, answer in shots)
        return [(header + prompt, f" {answer}") for prompt, answer in item.each()]
    said = [
        turn
        for asked, answer in shots
        for turn in as_turn("user", asked) + as_turn("assistant", answer)
    ]
    return Item(
        [tokenizer.render(said + as_turn("user", text), True) for text in item.prompts],
        item.answers,
    ).each()


# --- questions: what is asked of a model, and how what comes of it is graded ------------------------------------------


class Question(NamedTuple):
    """What becomes a line of a samples file. Sequences (ids, start) are scored, or else the prompt (ids) is continued;
    grade(their sums, or the new ids) -> the line's other fields, its `metrics` among them."""

    shown: dict
    sequences: list
    prompt: list
    grade: Callable
    stops: tuple = ()


def grade_choices(item, metrics, sums):
    """acc: the likeliest choice is right; acc_norm: it is so when divided by its characters."""
    norm = [total / max(len(answer), 1) for total, (_, answer) in zip(sums, item.each())]
    right = {
        "acc": int(np.argmax(sums)) == item.gold,
        "acc_norm": int(np.argmax(norm)) == item.gold,
    }
    return {
        "logps": sums,
        "pred": int(np.argmax(sums)),
        "metrics": {name: float(right[name]) for name in metrics},
    }


def grade_gsm8k(item, task, tokenizer, ids):
    """The number behind '####', or the last one anywhere, against the reference's. Source: lm_eval's gsm8k.yaml."""
    text, none = (
        re.split("|".join(map(re.escape, task.stops)), tokenizer.decode(ids))[0],
        "[invalid]",
    )
    strict = (re.findall(r"#### (\-?[0-9\.\,]+)", text) or [none])[0]
    flexible = next(
        filter(None, (re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text) or [[none]])[-1])
    )
    patterns = ",", r"\$", r"(?s).*#### ", r"\.$"
    bare = lambda answer: reduce(
        lambda text, pattern: re.sub(pattern, "", text), patterns, answer
    ).lower()
    right = [float(bare(found.strip()) == bare(item.answers[0])) for found in (strict, flexible)]
    return {
        "output": text,
        "strict": strict,
        "flexible": flexible,
        "metrics": dict(zip(task.metrics, right)),
    }


def ask_items(found, task, model, tokenizer, config):
    """[(Item, its few-shot Items), ...] -> Questions."""
    longest = model.config.max_position_embeddings
    asked = [contexts(item, shots, tokenizer, config.apply_chat_template) for item, shots in found]
    if task.stops:
        ids, room = (
            encode_texts(tokenizer, [pairs[0][0] for pairs in asked]),
            longest - config.max_new_tokens,
        )
        return [
            Question(
                item._asdict(),
                [],
                ids[pairs[0][0]][-max(room, 1) :],
                partial(grade_gsm8k, item, task, tokenizer),
                task.stops,
            )
            for (item, _), pairs in zip(found, asked)
        ]
    sequences = iter(encode_pairs(tokenizer, [pair for pairs in asked for pair in pairs], longest))
    return [
        Question(
            item._asdict(),
            [next(sequences) for _ in pairs],
            [],
            partial(grade_choices, item, task.metrics),
        )
        for (item, _), pairs in zip(found, asked)
    ]


def read_answer(model, tokenizer, prompt, wanted, options, ids):
    """A written answer (ids): `gold` is the reference's (`wanted`) answer, `answer` its own or, `forced`, an option."""
    text, gold = tokenizer.decode(ids).strip(), find_answer(wanted)
    answer, forced = find_answer(text), bool(gold and not find_answer(text))
    if forced:
        after = prompt + ids + tokenizer.encode("\nAnswer:")
        answer = options[
            likeliest(model, after, [tokenizer.encode(f" {option}") for option in options])
        ]
    return {
        "output": text,
        "gold": gold,
        "answer": answer,
        "forced": forced,
        "choices": options,
        "metrics": {"accuracy": float(answer == gold)},
    }


def ask_answers(model, tokenizer, examples, choices):
    """SFT examples, each with the answers it may have (None: all that are right for some), -> Questions to write on."""
    split = [split_prompt(example) for example in examples]
    wanted = [tokenizer.decode(reference).strip() for _, reference in split]
    golds = sorted(
        {find_answer(text) for text in wanted} - {None}
    )  # letters stand for choices otherwise
    options = [
        own if find_answer(text) in texts_of(own) else golds for text, own in zip(wanted, choices)
    ]
    return [
        Question(
            {"prompt": tokenizer.decode(prompt).strip(), "reference": text},
            [],
            prompt,
            partial(read_answer, model, tokenizer, prompt, text, own),
        )
        for (prompt, _), text, own in zip(split, wanted, options)
    ]


def answer_questions(model, tokenizer, examples, choices, max_new_tokens=128, batch_size=64):
    """Greedy answers to SFT examples, as `read_answer` reads them; examples and choices as in `ask_answers`."""
    asked, ends = ask_answers(model, tokenizer, examples, choices), tokenizer.end_ids
    outputs = generate(
        model, [q.prompt for q in asked], max_new_tokens, eos_ids=ends, batch_size=batch_size
    )
    return [question.shown | question.grade(ids) for question, ids in zip(asked, outputs)]


def accuracy(answers):
    """(share right, number) over the answers that have a gold; (None, 0) where none has."""
    right = [row["answer"] == row["gold"] for row in answers if row["gold"]]
    return (sum(right) / len(right), len(right)) if right else (None, 0)


def ask_choice(tokenizer, example, choices):
    """An SFT example as a forced choice between `choices`, their letters, or Yes and No; None if it is none. Of a
    reference with reasoning the answer alone is scored, right behind the prompt: no reasoning is given or written."""
    prompt, reference = split_prompt(example)
    wanted, asked = tokenizer.decode(reference), tokenizer.decode(prompt)
    choices = texts_of(choices)
    said, lines = find_answer(wanted), choices or re.findall(r"(?m)^\(?([A-Z])[.):]", asked)
    gold = said or wanted.strip().rstrip(".")
    offers = [choices, [*"ABCDEFGHIJ"][: len(lines)], ["Yes", "No"], ["yes", "no"]]
    options = next((offer for offer in offers if gold in offer), None)
    context = prompt + (tokenizer.encode("Answer:") if said else [])
    lead = " " if said else wanted[: len(wanted) - len(wanted.lstrip())]

    def grade(sums):
        answer = options[int(np.argmax(sums))]
        return {"logps": sums, "answer": answer, "metrics": {"accuracy": float(answer == gold)}}

    return options and Question(
        {"prompt": asked.strip(), "choices": options, "gold": gold},
        [(context + tokenizer.encode(lead + option), len(context)) for option in options],
        [],
        grade,
    )


def choice_metrics(model, questions):
    """{'eval_accuracy', 'eval_f1', ...} of forced choices while a model trains, without dropout; {} without any."""
    training = model.training
    model.eval()
    scored = score(model, [q.sequences for q in questions])
    found = summarise([questions[n].shown | questions[n].grade(sums) for n, sums in scored])
    model.train(training)
    return {
        f"eval_{name}": value
        for name, value in found.items()
        if name != "n" and not name.endswith("_stderr")
    }


def ask_text(text, tokenizer, longest):
    """A text -> a Question whose log-probability counts: windows of `longest` tokens, each behind the last token of the
    one before it, the last one behind all that fits. Source: lm_eval's get_rolling_token_windows."""
    ids = before_text(tokenizer) + tokenizer.encode(text)
    cuts = [*range(1, len(ids), longest), len(ids)]
    windows = [ids[max(0, stop - longest - 1) : stop] for stop in cuts[1:]]
    counts = {
        "tokens": len(ids) - 1,
        "words": len(re.split(r"\s+", text)),
        "bytes": len(text.encode()),
    }
    sequences = [
        (part, len(part) - (stop - start)) for part, start, stop in zip(windows, cuts, cuts[1:])
    ]
    return Question(
        {"text": text[:200], **counts},
        sequences,
        [],
        lambda sums: {
            "logp": sum(sums),
            "metrics": {"bits_per_byte": -sum(sums) / math.log(2) / counts["bytes"]},
        },
    )


def grade_text(tokenizer, wanted, ids):
    """A written text beside its reference, if there is one: exact match, and ROUGE F-measures by rouge_score."""
    text, metrics = tokenizer.decode(ids).strip(), {}
    if wanted is not None:
        with as_user_error(
            "answers are compared with references by ROUGE; pip install rouge_score", ImportError
        ):
            from rouge_score.rouge_scorer import RougeScorer
        found = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(wanted, text)
        metrics = {
            "exact_match": float(text == wanted),
            **{name: score.fmeasure for name, score in found.items()},
        }
    return {"output": text, "metrics": metrics}


def read_own(source):
    """[(where, row), ...] of an own set; a .txt is one row."""
    return (
        [(source, {"text": read_text(Path(source))})]
        if source.endswith(".txt")
        else read_rows(source)
    )


def ask_own(rows, model, tokenizer, config):
    """The rows of an own set -> Questions. What a row holds says what is asked: a text, a question with choices, a
    prompt with a reference (an answer behind reasoning, a choice, Yes or No, any text), a question alone."""
    rows, task, examples, alone = rows[: config.limit], Task(arc), [], []
    if all({"question", "choices"} <= set(row) for _, row in rows):
        return ask_items(
            [(parse(*at, task, "choices"), []) for at in rows], task, model, tokenizer, config
        )
    if all(isinstance(row.get("text"), str) for _, row in rows):
        if empty := [where for where, row in rows if not row["text"]]:
            raise UserError(f"{empty[0]}: an empty text has nothing to score")
        return [
            ask_text(row["text"], tokenizer, model.config.max_position_embeddings)
            for _, row in rows
        ]
    for where, row in rows:
        alone.append(
            "question" in row or "prompt" in row and not {"completion", "chosen"} & set(row)
        )
        if alone[-1]:  # the renderer wants an answer
            asked = row.get("question", row.get("prompt"))
            asked = (
                as_turn("user", asked) if "question" in row and tokenizer.has_template else asked
            )
            row = {"prompt": asked, "completion": "?"}
        examples.append(render_row(row, tokenizer, where=where))
        if isinstance(examples[-1], str):
            raise UserError(f"{where}: {examples[-1]}")
    questions = ask_answers(model, tokenizer, examples, [row.get("choices") for _, row in rows])
    for n, (example, (_, row)) in enumerate(zip(examples, rows)):
        shown = questions[n].shown | ({"reference": None} if alone[n] else {})
        if not find_answer(shown["reference"] or ""):
            written = Question(
                shown, [], questions[n].prompt, partial(grade_text, tokenizer, shown["reference"])
            )
            questions[n] = (
                not alone[n] and ask_choice(tokenizer, example, row.get("choices")) or written
            )
    return questions


# --- running and summing up -------------------------------------------------------------------------------------------


def run(model, tokenizer, questions, file, identity, config):
    """Answers questions into a samples file, going on from the lines that it holds; returns its lines in order. A line
    counts if its key does: a hash of the model's files, of what is asked, and of the settings that matter."""
    keys = [
        hashlib.sha256(
            repr((identity, q[:3], q.prompt and config.max_new_tokens)).encode()
        ).hexdigest()[:16]
        for q in questions
    ]
    done, aside = {}, file.with_suffix(".partial")
    for line in (
        regular_file(file).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        if file.exists()
        else []
    ):
        with suppress(
            ValueError, KeyError, TypeError, IndexError, RecursionError
        ):  # not one of ours: asked anew
            sample = json.loads(line)
            done |= {sample["id"]: sample} if keys[sample["id"]] == sample["key"] else {}

    def write():
        aside.write_text(
            "".join(json.dumps(done[n]) + "\n" for n in sorted(done)), encoding="utf-8"
        )
        aside.replace(file)

    write()
    scored, written = (
        [n for n, q in enumerate(questions) if n not in done and bool(q.prompt) == kind]
        for kind in (False, True)
    )
    stops = questions[written[0]].stops if written else ()
    reach = max(
        (len(tokenizer.encode(stop)) + 2 for stop in stops), default=0
    )  # tokens looked back, as lm_eval does
    texts = generate_each(
        model,
        [questions[n].prompt for n in written],
        config.max_new_tokens,
        eos_ids=tokenizer.eos_ids if stops else tokenizer.end_ids,
        batch_size=config.batch_size,
        stop=lambda ids: any(stop in tokenizer.decode(ids[-reach:], False) for stop in stops),
    )
    bar = tqdm(
        total=len(keys),
        initial=len(done),
        desc=file.stem,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with open(file, "a", encoding="utf-8") as out, bar, keep_freed_memory():
        for numbers, answers in (
            (scored, score(model, [questions[n].sequences for n in scored])),
            (written, texts),
        ):
            for n, answer in ((numbers[at], answer) for at, answer in answers):
                done[n] = {
                    "id": n,
                    "key": keys[n],
                    **questions[n].shown,
                    **questions[n].grade(answer),
                }
                out.write(json.dumps(done[n]) + "\n")
                out.flush()
                bar.update()
    write()
    return [done[n] for n in range(len(keys))]


def columns(samples):
    """{metric: (values, weights)} over the samples that have it; a text weighs as many bytes as it has."""
    names = dict.fromkeys(name for sample in samples for name in sample["metrics"])
    return {
        name: np.array(
            [(s["metrics"][name], s.get("bytes", 1)) for s in samples if name in s["metrics"]]
        ).T
        for name in names
    }


def summarise(samples):
    """Samples -> {"n", metric: mean, metric_stderr: its standard error (lm_eval's mean_stderr), and what only a whole
    set has: f1, of Yes with its precision and recall, else the mean over the answers; perplexities}."""
    found, graded = (
        {"n": len(samples)},
        [(s["gold"], s["answer"]) for s in samples if s.get("gold") and "answer" in s],
    )
    for name, (values, weights) in columns(samples).items():
        found[name] = mean = float(np.average(values, weights=weights))
        spread = ((weights * (values - mean)) ** 2).sum() * len(values) / max(len(values) - 1, 1)
        found[f"{name}_stderr"] = float(spread**0.5 / weights.sum())
    golds = sorted({gold for gold, _ in graded})
    yes = [gold for gold in golds if gold.lower() == "yes" and len(golds) < 3]
    for label in yes or golds:
        right, (held, said) = (
            graded.count((label, label)),
            (row.count(label) for row in zip(*graded)),
        )
        found["f1"] = found.get("f1", 0) + 2 * right / (said + held) / len(yes or golds)
        found |= {"precision": right / max(said, 1), "recall": right / held} if yes else {}
    if samples and "logp" in samples[0]:
        total = sum(sample["logp"] for sample in samples)
        found |= {
            f"{unit}_perplexity": math.exp(-total / sum(sample[f"{unit}s"] for sample in samples))
            for unit in ("token", "word", "byte")
        }
    return found


# --- what differs, and what is noise ----------------------------------------------------------------------------------

MAIN = (
    "acc_norm",
    "acc",
    "exact_match_flexible",
    "accuracy",
    "exact_match",
    "bits_per_byte",
)  # what stands for a set


def compare(name, a, b, resamples=2000):
    """A metric's name and its (values, weights) for two models, question by question -> their paired difference b - a:
    {"delta", "low", "high": a 95 % bootstrap interval, "verdict": rose, fell, or noise where the interval holds 0, and
    for values 0 or 1 "gained", "lost", "mcnemar_p": McNemar's exact test}."""
    (x, weights), (y, _) = a, b
    kinds, counts = np.unique(np.stack([weights * (y - x), weights]), axis=1, return_counts=True)
    drawn = kinds @ np.random.default_rng(0).multinomial(len(x), counts / len(x), resamples).T
    low, high = map(float, np.quantile(drawn[0] / drawn[1], (0.025, 0.975)))
    better = ((low > 0) - (high < 0)) * (-1 if name == "bits_per_byte" else 1)
    found = {
        "n": len(x),
        "delta": float((weights * (y - x)).sum() / weights.sum()),
        "low": low,
        "high": high,
        "verdict": ("noise", "rose", "fell")[better],
    }
    if {*x, *y} <= {0.0, 1.0}:
        gained, lost = int((y > x).sum()), int((y < x).sum())
        tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
        found |= {
            "gained": gained,
            "lost": lost,
            "mcnemar_p": min(1.0, 2 * tail / 2 ** (gained + lost)),
        }
    return found


def compare_all(samples):
    """{model: {set: samples}} -> `compare` of every two models, set and metric; `main` is what stands for the set."""
    found = {
        model: {task: columns(rows) for task, rows in sets.items()}
        for model, sets in samples.items()
    }
    return [
        {
            "a": a,
            "b": b,
            "task": task,
            "metric": name,
            "main": name == main_metric(rows),
            **compare(name, rows[name], other[task][name]),
        }
        for (a, own), (b, other) in combinations(found.items(), 2)
        for task, rows in own.items()
        for name in rows
    ]


def main_metric(found):
    return next((name for name in MAIN if name in found), None)


def headline(a, b, pairs):
    """What becomes of model a as model b, in a sentence or two: the average, and what it hides."""
    shown = [p for p in pairs if p["main"] and (p["a"], p["b"]) == (a, b)]
    said = {
        v: ", ".join(p["task"] for p in shown if p["verdict"] == v) or "none"
        for v in ("rose", "fell", "noise")
    }
    shares = [
        p["delta"] for p in shown if p["metric"] != "bits_per_byte"
    ]  # which are no points, and fewer are better
    mean = sum(shares) / max(len(shares), 1)
    hides = " The average hides what fell." * (
        said["fell"] != "none" and mean >= 0 and len(shares) > 0
    )
    return (
        f"{a} → {b}: "
        + f"{100 * mean:+.2f} points on average of {len(shares)} sets. " * bool(shares)
        + f"Rose beyond noise: {said['rose']}; fell beyond noise: {said['fell']}; no more than noise: "
        f"{said['noise']}.{hides}"
    )


def table(results):
    """{model: {set: summary}} -> Markdown: a line per set and metric, a column per model, ± the standard error."""
    lines = [["set", "metric", "n", *results], ["---"] * (len(results) + 3)]
    for task, found in next(iter(results.values())).items():
        for name in [name for name in found if name != "n" and not name.endswith("_stderr")]:
            cells = [
                f"{r[task].get(name, math.nan):.4f}"
                + (f" ± {r[task][f'{name}_stderr']:.4f}" if f"{name}_stderr" in r[task] else "")
                for r in results.values()
            ]
            lines.append([task, name, str(found["n"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(results, pairs, samples):
    """The comparison as Markdown: the table, the sentences, every difference, and written answers side by side."""
    lines = [
        "| from | to | set | metric | difference | 95 % interval | McNemar p | verdict |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {p['a']} | {p['b']} | {p['task']} | {p['metric']} | {p['delta']:+.4f} | {p['low']:+.4f} to "
        f"{p['high']:+.4f} | {p.get('mcnemar_p', math.nan):.3g} | {p['verdict']} |"
        for p in pairs
    ]
    parts = [
        "# Evaluation",
        table(results),
        *(headline(*two, pairs) for two in combinations(results, 2)),
        "Both of two models answered the same questions, so intervals come from paired differences (bootstrap). "
        "Where one holds 0, the difference is no more than noise.",
        "\n".join(lines),
    ]
    for task, rows in next(iter(samples.values())).items():
        for n, row in enumerate(row for row in rows[:20] if "output" in row):
            asked = str(row.get("prompt") or row["prompts"][0])[-600:].replace("\n", "\n> ")
            parts += [
                f"## {task}, question {n + 1}",
                f"> {asked}",
                *(f"**{name}:** {found[task][n]['output']}" for name, found in samples.items()),
            ]
    return "\n\n".join(parts) + "\n"


def draw(results, pairs, file):
    """A figure: each set's metric as bars grouped by set, and the paired differences with their intervals."""
    from matplotlib.figure import Figure

    mains = {
        task: name for task, r in next(iter(results.values())).items() if (name := main_metric(r))
    }
    pairs = [p for p in pairs if p["main"]][::-1]
    figure = Figure(
        figsize=(max(7, 3 + 1.3 * len(mains)), 4 + 0.25 * len(pairs)), layout="constrained"
    )
    top, low = figure.subplots(2, height_ratios=(4, 1 + 0.25 * len(pairs)))
    for n, (name, found) in enumerate(results.items()):
        at = np.arange(len(mains)) + (n - (len(results) - 1) / 2) * 0.8 / len(results)
        top.bar(
            at,
            [found[t][m] for t, m in mains.items()],
            0.8 / len(results),
            label=name,
            capsize=2,
            yerr=[found[t][f"{m}_stderr"] for t, m in mains.items()],
        )
    top.set_xticks(
        range(len(mains)), [f"{task}\n{name}" for task, name in mains.items()], fontsize=8
    )
    top.legend()
    for n, p in enumerate(pairs):
        colour = {"rose": "tab:green", "fell": "tab:red", "noise": "tab:gray"}[p["verdict"]]
        low.plot([p["low"], p["delta"], p["high"]], [n] * 3, "-o", markevery=[1], color=colour)
    low.set_yticks(
        range(len(pairs)), [f"{p['a']} → {p['b']}, {p['task']}" for p in pairs], fontsize=8
    )
    low.set_xlabel("paired difference, 95 % interval; gray: no more than noise")
    low.axvline(0, color="black", linewidth=0.8)
    low.set_visible(bool(pairs))
    figure.savefig(file, dpi=130)


def pairs(config):
    """Preference rows of questions with a known answer. Chosen is the row's own answer; rejected the same with a wrong
    choice in its place or, with --generate, a wrong answer of the model's."""
    tokenizer, examples, rows, _ = load_rows(config)
    given, counts, found, draw = [], Counter(), {}, np.random.default_rng(config.seed)
    model = load_model(config.model, device=pick_device("auto")) if config.generate else None
    for at in range(0, len(examples) if model else 0, 32):
        ids = [split_prompt(example)[0] for example in examples[at : at + 32]]
        ends = {"eos_ids": tokenizer.end_ids, "seed": config.seed + at}
        given += map(
            tokenizer.decode,
            generate(model, ids, config.max_new_tokens, config.temperature, **ends),
        )
    for n, row in enumerate(rows):
        prompt, (answer, *_) = split_row(row, tokenizer.has_template)
        if chat := isinstance(answer, list):
            prompt, answer = prompt + answer[:-1], answer[-1]["content"]
        read = find_answer if find_answer(answer) else str.strip
        gold = row.get("answer") or read(answer)
        if not isinstance(gold, str):
            raise UserError(
                f"example {n}: 'answer' must be the text of the right choice, found {brief(row)}"
            )
        others = [
            choice
            for choice in texts_of(row.get("choices"))
            if choice != gold and answer.endswith(gold)
        ]
        wrong = (
            given[n] if model else answer.removesuffix(gold) + draw.choice(others) if others else ""
        )
        if not (said := read(wrong)) or said == gold:
            counts["answered right" if said else "no wrong answer known"] += 1
            continue
        chosen, rejected = (
            as_turn("assistant", side) if chat else side for side in (answer, wrong)
        )
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        counts["the same as another"] += json.dumps(pair) in found
        found[json.dumps(pair)] = pair
    return found.values(), f"{len(found):,} pairs" + "".join(
        f"; {why}: {n:,}" for why, n in counts.items() if n
    )


# --- the command ------------------------------------------------------------------------------------------------------


def find_model(path):
    """(base: folder or hub id, adapter folder or None, QuantConfig of its run) of a model, adapter or run folder."""
    folder = Path(path).expanduser() if Path(path).expanduser().is_dir() else resolve(path)
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").exists():
            if not (base := read_adapter_config(adapter)[1].get("base_model_name_or_path")):
                raise UserError(
                    f"{adapter}: its config names no base model; merge it and evaluate the merged folder"
                )
            trained = read_json(at) if (at := adapter.parent / "config.json").exists() else {}
            with as_user_error(f"{at}: not the settings of a run", ValueError, TypeError):
                settings = {
                    f.name: convert(trained.get(f.name, f.default), f.type)
                    for f in fields(QuantConfig)
                }
            return base, adapter, QuantConfig(**settings)
    return str(folder / "merged" if (folder / "merged").is_dir() else folder), None, QuantConfig()


def load(path, held, config):
    """-> (model, tokenizer, what identifies its files). `held` keeps the base for adapters that follow: a plain one,
    from which LoRA layers come off again. An adapter that trained more of it takes it along."""
    base, adapter, quant = find_model(path)
    if (key := (base, astuple(quant))) not in held:
        held.clear()
        held[key] = load_4bit(
            base,
            quant,
            dtype=config.dtype,
            device=pick_device(config.device),
            attn_implementation=config.attn_implementation,
        )
    model = held[key]
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base_layer)
    vars(model).pop("adapter", None)
    if adapter:
        load_adapter(model, adapter)
        if not all(".lora_" in key for key in adapter_parameters(model)):
            held.clear()
    files = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for folder in (model.folder, adapter)
        if folder
        for file in sorted(folder.glob("*.safetensors"))
    ]
    own = adapter if adapter and (adapter / "tokenizer.json").exists() else model.folder
    return model.eval(), Tokenizer(own), (files, str(model.dtype), astuple(quant))


def named(sources, kind):
    """NAME=SOURCE, or SOURCE, which is then named after itself -> {name: source}."""
    found = {}
    for source in sources:
        name, source = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", source, re.S).groups()
        if not source.strip():
            raise UserError(f"--{kind}: {source!r} is empty; give a path, or NAME=PATH")
        name = name or re.sub(
            r"[^\w.-]", "_", Path(source).name if kind == "model" else Path(source).stem
        )
        if name in found:
            raise UserError(f"--{kind}: two are named {name}; give names: NAME={source}")
        found[name] = source
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["pairs"]:
        return write_rows(parse_config(DataConfig, argv[1:], pairs.__doc__), pairs)
    config = parse_config(EvalConfig, argv, __doc__)
    models, own, failed, held, samples = (
        named(config.model, "model"),
        named(config.data, "data"),
        {},
        {},
        {},
    )
    if not config.tasks and not own:
        if models:
            raise UserError(f"nothing to ask: give --data FILE, or --tasks of {', '.join(TASKS)}")
        own = {"mcqa": str(EXAMPLES / "mcqa" / "validation.jsonl")}
    if odd := [task for task in config.tasks if task not in TASKS]:
        raise UserError(
            f"--tasks: {odd[0]!r} is not one of {', '.join(TASKS)}{nearest(odd[0], TASKS)}"
        )
    if odd := [name for name in own if name in TASKS]:
        raise UserError(f"--data: {odd[0]} is a benchmark's name; give NAME={own[odd[0]]}")
    check_range(config, 1, "limit", "batch_size")
    check_range(config, 0, "num_fewshot")
    check_range(config, 1, "max_new_tokens", most=2**20)
    items, folder = (
        {task: read_task(task, config) for task in config.tasks},
        Path(config.output_dir),
    )
    rows = {name: read_own(source) for name, source in own.items()}
    if not models:
        models = {"base": str(EXAMPLES / "tiny-qwen3"), "sft": "output/sft", "dpo": "output/dpo"}
        for name in [name for name, path in models.items() if not Path(path).exists()]:
            print(f"{name}: there is no {models.pop(name)} yet, left out")
    with locked_folder(folder):
        for name, path in models.items():
            try:
                model, tokenizer, identity = load(path, held, config)
                asked = {
                    task: ask_items(found, TASKS[task], model, tokenizer, config)
                    for task, found in items.items()
                }
                asked |= {
                    task: ask_own(found, model, tokenizer, config) for task, found in rows.items()
                }
                samples[name] = {
                    task: run(
                        model,
                        tokenizer,
                        questions,
                        folder / f"samples_{name}_{task}.jsonl",
                        identity,
                        config,
                    )
                    for task, questions in asked.items()
                }
            except (UserError, RuntimeError) as error:  # the other models' results stand
                failed[name] = str(error).splitlines()[0]
                held.clear()
        results = {
            name: {task: summarise(rows) for task, rows in found.items()}
            for name, found in samples.items()
        }
        pairs = compare_all(samples)
        if results:
            found = json.dumps({"models": results, "pairs": pairs, "failed": failed}, indent=2)
            for name, text in (
                ("results.json", found),
                ("report.md", report(results, pairs, samples)),
            ):
                (folder / f".{name}").write_text(text, encoding="utf-8")
                (folder / f".{name}").replace(folder / name)
            draw(results, pairs, folder / "results.png")
            print(
                table(results),
                *(headline(*two, pairs) for two in combinations(results, 2)),
                sep="\n",
            )
    if failed:
        raise UserError(
            f"{len(failed)} of {len(models)} models failed: {'; '.join(map(': '.join, failed.items()))}"
        )
    print(f"saved in {folder}: results.json, report.md, results.png and the samples")


if __name__ == "__main__":
    run_command(main)

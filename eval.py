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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import combinations, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import Tokenizer, brief, parse_config, read_rows, read_text, render_rows, text_of
from lora import adapter_parameters, load_adapter, lora_layers, read_adapter_config
from model import (IGNORE, Batch, Segment, UserError, cli, generate, generate_each, load_model, nearest, pick_device,
                   resolve)

EXAMPLES = Path(__file__).resolve().parent / "examples"


@dataclass
class EvalConfig:
    """Everything an evaluation can be told. The names of flags are lm_eval's where it has them."""

    model: list[str] = field(default_factory=list)  # NAME=PATH, several times: model, adapter or run folder, or hub id
    tasks: list[str] = field(default_factory=list)  # benchmarks: arc_challenge, arc_easy, commonsense_qa, gsm8k, ...
    data: list[str] = field(default_factory=list)  # own sets: texts, questions with choices, or with references
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
            stop = shared(fed[twins[0]], fed[twins[-1]])  # they are sorted: what these two share, all do
            if stop > depth:
                here, at = len(segments), sum(len(segment.ids) for segment in segments)
                segments.append(Segment(np.array(fed[twins[0]][depth:stop]), np.full(stop - depth, IGNORE), parent))
                along = np.concatenate([path, np.arange(at, at + stop - depth)])
            for n in twins:
                paths[n] = along
            if rest := [n for n in twins if len(fed[n]) > stop]:
                grow(rest, stop, here, along)

    grow(sorted(range(len(fed)), key=fed.__getitem__), 0, -1, np.zeros(0, np.int64))
    spans = [(path[start - 1 : len(ids) - 1], ids[start:], np.full(len(ids) - start, n))
             for n, ((ids, start), path) in enumerate(zip(sequences, paths))]
    scored, targets, owner = (torch.from_numpy(np.concatenate(x).astype(np.int64)).to(device) for x in zip(*spans))
    return replace(Batch.pack([segments], device), scored=scored, targets=targets, sequence=owner,
                   num_sequences=len(sequences))


@torch.inference_mode()
def sum_logps(model, sequences):
    """The summed log-probability of ids[start:] of each sequence (ids, start): a list of floats."""
    batch = pack_shared(sequences, model.device)
    logps = model.logps(batch)
    return logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence, logps).tolist()


def score(model, items, budget=None):
    """Items, each a list of sequences, -> yields (its number, the sums of its sequences) in batches of about `budget`
    tokens; what has most in common comes together."""
    budget, part, size, last = budget or (2048 if model.device.type == "cpu" else 16384), [], 0, []
    for n in [*sorted(range(len(items)), key=lambda n: items[n][0][0]), None]:
        lists = [last, *(ids for ids, _ in items[n])] if n is not None else []
        grows = sum(len(b) - shared(a, b) for a, b in zip(lists, lists[1:]))
        if part and (n is None or size + grows > budget):
            sums = iter(sum_logps(model, [sequence for m in part for sequence in items[m]]))
            yield from [(m, [next(sums) for _ in items[m]]) for m in part]
            part, size, grows = [], 0, grows + shared(*lists[:2]) if lists else 0
        part, size, last = [*part, n], size + grows, lists[-1:] and lists[-1]


def likeliest(model, context, choices):
    """Index of the choice (ids) with the highest summed log-probability after context (ids), which is computed once."""
    return int(np.argmax(sum_logps(model, [(context + choice, len(context)) for choice in choices])))


def encode_texts(tokenizer, texts):
    """Texts -> {text: ids}, each behind BOS if the tokenizer writes one and the texts (a chat template's) do not."""
    unique, begins = list(dict.fromkeys(texts)), tokenizer.special.get("bos_token")
    special = not (begins and unique and unique[0].startswith(begins))
    encoded = tokenizer.backend.encode_batch_fast(unique, add_special_tokens=special)
    return {text: found.ids for text, found in zip(unique, encoded)}


def encode_pairs(tokenizer, pairs, longest):
    """(context, continuation) texts -> sequences (ids, start of the continuation), tokenised together; spaces that end
    a context go to its continuation; beyond `longest` the beginning goes. Source: lm_eval's TemplateLM._encode_pair."""
    pairs, sequences = [(context.rstrip(), context + continuation) for context, continuation in pairs], []
    ids = encode_texts(tokenizer, [text for pair in pairs for text in pair])
    for context, whole in pairs:
        head = [] if ids[context] else before_text(tokenizer)
        cut = max(0, len(head) + len(ids[whole]) - longest - 1)
        sequences.append(((head + ids[whole])[cut:], max(1, len(head) + len(ids[context]) - cut)))
    return sequences


def before_text(tokenizer):
    """What predicts the first token of a text: BOS, else the end of a text."""
    return [tokenizer.bos_id] if tokenizer.bos_id is not None else tokenizer.eos_ids[:1]


# --- benchmarks -------------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A row as it is asked: a prompt and an answer per choice, of which one may be the same for all: a list of one."""

    prompts: list
    answers: list
    gold: int = 0

    def each(self):
        """(prompt, answer) of every choice."""
        count = max(len(self.prompts), len(self.answers))
        return [(self.prompts[n % len(self.prompts)], self.answers[n % len(self.answers)]) for n in range(count)]


def arc(row):
    choices = row["choices"]
    return Item([f"Question: {text_of(row, 'question')}\nAnswer:"], choices["text"],
                choices["label"].index(row["answerKey"]))


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
    before, _, after = text_of(row, "sentence").partition("_")
    return Item([before + row["option1"], before + row["option2"]], [after.strip()], [*"12"].index(row["answer"]))


def own_choices(row):
    """question, choices (texts, or the hub's text and label), answer (its text, letter or number from 0)."""
    choices = row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]
    answer = next(row[key] for key in ("answer", "answerKey", "gold", "label") if row.get(key) is not None)
    names = [choices, [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], [*range(len(choices))]]
    gold = next(names.index(answer) for names in names if answer in names)
    return Item([f"Question: {text_of(row, 'question')}\nAnswer:"], choices, gold)


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
    "gsm8k": Task(gsm8k, "openai/gsm8k:main", "test", ("exact_match_strict", "exact_match_flexible"), 0, 5,
                  ("Question:", "</s>", "<|im_end|>")),
    "hellaswag": Task(hellaswag, "Rowan/hellaswag", "validation"),
    "winogrande": Task(winogrande, "allenai/winogrande:winogrande_xl", "validation", ("acc",)),
}


def parse(where, row, task, name):
    """The Item of a row; UserError with its file and line if it is none."""
    try:
        item = task.parse(row)
        if not all(isinstance(text, str) for text in item.prompts + item.answers) or item.gold >= len(item.each()):
            raise UserError("choices must be texts, and one of them right")
        return item
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error) or "its answer is none of its choices"
        raise UserError(f"{where}: not a row of {name}: {why}; found {brief(row, 100)}") from None


def read_task(name, config):
    """[(Item, its few-shot Items), ...] of a benchmark, drawn as lm_eval's ContextSampler draws them (seed 1234)."""
    task, folder, draw = TASKS[name], Path(config.data_dir or "") / name, random.Random(1234)
    k, found = task.shots if config.num_fewshot is None else config.num_fewshot, []
    rows = read_rows(folder / f"{task.split}.jsonl" if config.data_dir else f"{task.source}:{task.split}")
    pool = rows if k else []
    if k and (not config.data_dir or (folder / "train.jsonl").exists()):  # else the questions themselves
        pool = read_rows(folder / "train.jsonl" if config.data_dir else f"{task.source}:train")
    if k and len(pool) <= k:
        raise UserError(f"{name}: {k} few-shot examples can't be drawn from {len(pool)} rows; lower --num_fewshot")
    for where, row in rows[: config.limit]:
        shots = draw.sample(pool, k + task.own) if k else []
        if task.own:
            shots = [shot for shot in shots if shot[1] != row][:k]
            shots = shots if len(shots) == k else draw.sample([shot for shot in pool if shot[1] != row], k)
        found.append((parse(where, row, task, name), [parse(*shot, task, name) for shot in shots]))
    return found


def contexts(item, shots, tokenizer, chat):
    """(context, continuation) of each choice: few-shot examples come before as text, or as turns of a chat."""
    shots = [shot.each()[shot.gold] for shot in shots]
    if not chat:
        header = "".join(f"{prompt} {answer}\n\n" for prompt, answer in shots)
        return [(header + prompt, f" {answer}") for prompt, answer in item.each()]
    said = [{"role": role, "content": text} for shot in shots for role, text in zip(("user", "assistant"), shot)]
    asked = [tokenizer.render([*said, {"role": "user", "content": text}], True) for text in item.prompts]
    return [(asked[n % len(asked)], answer) for n, (_, answer) in enumerate(item.each())]


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
    right = {"acc": int(np.argmax(sums)) == item.gold, "acc_norm": int(np.argmax(norm)) == item.gold}
    return {"logps": sums, "pred": int(np.argmax(sums)), "metrics": {name: float(right[name]) for name in metrics}}


def grade_gsm8k(item, task, tokenizer, ids):
    """The number behind '####', or the last one anywhere, against the reference's. Source: lm_eval's gsm8k.yaml."""
    text, none = re.split("|".join(map(re.escape, task.stops)), tokenizer.decode(ids))[0], "[invalid]"
    strict = (re.findall(r"#### (\-?[0-9\.\,]+)", text) or [none])[0]
    flexible = next(filter(None, (re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text) or [[none]])[-1]))
    patterns = ",", r"\$", r"(?s).*#### ", r"\.$"
    bare = lambda answer: reduce(lambda text, pattern: re.sub(pattern, "", text), patterns, answer).lower()
    right = [float(bare(found.strip()) == bare(item.answers[0])) for found in (strict, flexible)]
    return {"output": text, "strict": strict, "flexible": flexible, "metrics": dict(zip(task.metrics, right))}


def ask_items(found, task, model, tokenizer, config):
    """[(Item, its few-shot Items), ...] -> Questions."""
    longest, asked = model.config.max_position_embeddings, []
    asked = [contexts(item, shots, tokenizer, config.apply_chat_template) for item, shots in found]
    if task.stops:
        ids, room = encode_texts(tokenizer, [pairs[0][0] for pairs in asked]), longest - config.max_new_tokens
        return [Question(item._asdict(), [], ids[pairs[0][0]][-max(room, 1) :],
                         partial(grade_gsm8k, item, task, tokenizer), task.stops)
                for (item, _), pairs in zip(found, asked)]
    sequences = iter(encode_pairs(tokenizer, [pair for pairs in asked for pair in pairs], longest))
    return [Question(item._asdict(), [next(sequences) for _ in pairs], [], partial(grade_choices, item, task.metrics))
            for (item, _), pairs in zip(found, asked)]


def find_answer(text):
    """What stands behind the last 'Answer:', or None: a letter ('B', '(B)', 'B. dog'), else the rest of the line."""
    found = re.findall(r"[Aa]nswer:[ \t]*(\S.*)", text)
    if not found:
        return None
    letter = re.match(r"\(?([A-Z])(?![\w'])", found[-1])
    return letter[1] if letter else found[-1].strip().rstrip(".")


def split_prompt(example):
    """(prompt ids, reference ids): the reference is the last run of scored tokens of an SFT example."""
    segment = example[-1]
    masked = np.asarray(segment.labels) == IGNORE
    stop = int(np.flatnonzero(~masked)[-1]) + 1
    start = int((np.flatnonzero(masked[:stop])[-1:] + 1).sum())
    return segment.ids[:start].tolist(), segment.ids[start:stop].tolist()


def read_answer(model, tokenizer, prompt, wanted, options, ids):
    """A written answer (ids) to a prompt (ids) beside the reference `wanted`. gold is the answer of the reference, None
    where it has none; answer is the text's or, `forced`, the likeliest of the options."""
    text, gold = tokenizer.decode(ids).strip(), find_answer(wanted)
    answer, forced = find_answer(text), bool(gold and not find_answer(text))
    if forced:
        after = prompt + ids + tokenizer.encode("\nAnswer:")
        answer = options[likeliest(model, after, [tokenizer.encode(f" {option}") for option in options])]
    return {"prompt": tokenizer.decode(prompt).strip(), "reference": wanted, "output": text, "gold": gold,
            "answer": answer, "forced": forced, "choices": options, "metrics": {"accuracy": float(answer == gold)}}


def ask_answers(model, tokenizer, examples, choices):
    """SFT examples, and for each the answers it may have, or None (all that are right for some), -> Questions that are
    answered in writing."""
    split = [split_prompt(example) for example in examples]
    wanted = [tokenizer.decode(reference).strip() for _, reference in split]
    golds = sorted({find_answer(text) for text in wanted} - {None})  # letters stand for choices otherwise
    return [Question({}, [], prompt, partial(read_answer, model, tokenizer, prompt, text,
                                             options if find_answer(text) in (options or ()) else golds))
            for (prompt, _), text, options in zip(split, wanted, choices)]


def answer_questions(model, tokenizer, examples, choices, max_new_tokens=128, batch_size=64):
    """Greedy answers to SFT examples, as `read_answer` reads them; examples and choices as in `ask_answers`."""
    questions = ask_answers(model, tokenizer, examples, choices)
    outputs = generate(model, [q.prompt for q in questions], max_new_tokens, eos_ids=tokenizer.end_ids,
                       batch_size=batch_size)
    return [question.grade(ids) for question, ids in zip(questions, outputs)]


def accuracy(answers):
    """(share right, number) over the answers that have a gold; (None, 0) where none has."""
    right = [row["answer"] == row["gold"] for row in answers if row["gold"]]
    return (sum(right) / len(right), len(right)) if right else (None, 0)


def ask_choice(tokenizer, example, choices):
    """An SFT example as a forced choice, or None if it is none: between `choices`, their letters, or Yes and No. Of a
    reference with reasoning the answer alone is scored, right behind the prompt: the model's own reasoning is not
    written, and the reference's is not given."""
    (prompt, reference), yes_no = split_prompt(example), [("Yes", "No"), ("yes", "no"), ("YES", "NO")]
    wanted = tokenizer.decode(reference)
    gold = find_answer(wanted) or wanted.strip().rstrip(".")
    lines = re.findall(r"(?m)^\(?([A-Z])[.):]", tokenizer.decode(prompt))
    options = next((o for o in [choices or (), [*"ABCDEFGHIJ"][: len(choices or lines)], *yes_no] if gold in o), None)
    if options is None:
        return None
    lead = " " if find_answer(wanted) else wanted[: len(wanted) - len(wanted.lstrip())]
    asked = prompt + (tokenizer.encode("Answer:") if find_answer(wanted) else [])

    def grade(sums):
        answer = options[int(np.argmax(sums))]
        return {"logps": sums, "answer": answer, "metrics": {"accuracy": float(answer == gold)}, "gold": gold}

    sequences = [(asked + tokenizer.encode(lead + option), len(asked)) for option in options]
    return Question({"prompt": tokenizer.decode(prompt).strip(), "choices": list(options)}, sequences, [], grade)


def choice_metrics(model, questions):
    """{'eval_accuracy', 'eval_f1', ...} of forced choices while a model trains, without dropout; {} without any."""
    training = model.training
    model.eval()
    found = summarise([questions[n].grade(sums) for n, sums in score(model, [q.sequences for q in questions])])
    model.train(training)
    return {f"eval_{name}": value for name, value in found.items() if name != "n" and not name.endswith("_stderr")}


def ask_text(text, tokenizer, longest):
    """A text -> a Question whose log-probability counts: windows of `longest` tokens, each behind the last token of the
    one before it, the last one behind all that fits. Source: lm_eval's get_rolling_token_windows."""
    ids = before_text(tokenizer) + tokenizer.encode(text)
    ends = [*range(1 + longest, len(ids), longest), len(ids)]
    windows = [(ids[max(0, end - longest - 1) : end], start) for start, end in zip([1, *ends], ends)]
    sequences = [(part, len(part) - (end - start)) for (part, start), end in zip(windows, ends)]
    counts = {"tokens": len(ids) - 1, "words": len(re.split(r"\s+", text)), "bytes": len(text.encode())}

    def grade(sums):
        return {**counts, "logp": sum(sums), "metrics": {"bits_per_byte": -sum(sums) / math.log(2) / counts["bytes"]}}

    return Question({"text": text[:200]}, sequences, [], grade)


def grade_text(tokenizer, prompt, wanted, ids):
    """A written text beside its reference: exact match, and ROUGE F-measures as rouge_score computes them."""
    text, metrics = tokenizer.decode(ids).strip(), {}
    if wanted is not None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise UserError("answers are compared with references by ROUGE: pip install rouge_score") from None
        found = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(wanted, text)
        metrics = {"exact_match": float(text == wanted), **{name: score.fmeasure for name, score in found.items()}}
    return {"prompt": tokenizer.decode(prompt).strip(), "reference": wanted, "output": text, "metrics": metrics}


def ask_own(source, model, tokenizer, config):
    """The rows of an own set -> Questions. What a row holds says what is asked: a text, a question with choices, a
    prompt with a reference (an answer behind reasoning, a choice, Yes or No, any text), a question alone."""
    rows = [(source, {"text": read_text(Path(source))})] if source.endswith(".txt") else read_rows(source)
    rows, task, examples, alone = rows[: config.limit], Task(own_choices), [], []
    if all({"question", "choices"} <= set(row) for _, row in rows):
        return ask_items([(parse(*at, task, source), []) for at in rows], task, model, tokenizer, config)
    if all(isinstance(row.get("text"), str) for _, row in rows):
        return [ask_text(row["text"], tokenizer, model.config.max_position_embeddings) for _, row in rows]
    for where, row in rows:
        ask = row.get("question") or row.get("prompt")
        alone.append("question" in row or "prompt" in row and not {"completion", "chosen"} & set(row))
        if alone[-1]:  # the renderer wants an answer
            turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": "?"}]
            row = ({"messages": turns} if "question" in row and tokenizer.has_template else
                   {"prompt": ask, "completion": "?"})
        examples.append(next(render_rows([(where, row)], tokenizer))[0])
        if isinstance(examples[-1], str):
            raise UserError(f"{where}: {examples[-1]}")
    questions = ask_answers(model, tokenizer, examples, [row.get("choices") for _, row in rows])
    for n, (example, (_, row)) in enumerate(zip(examples, rows)):
        prompt, reference = split_prompt(example)
        wanted = None if alone[n] else tokenizer.decode(reference).strip()
        if wanted is None or not find_answer(wanted):
            written = Question({}, [], prompt, partial(grade_text, tokenizer, prompt, wanted))
            questions[n] = wanted and ask_choice(tokenizer, example, row.get("choices")) or written
    return questions


# --- running ----------------------------------------------------------------------------------------------------------


def answer_all(model, tokenizer, questions, config):
    """Yields (number of the question, its graded fields) as they come."""
    scored = [n for n, question in enumerate(questions) if question.sequences]
    for n, sums in score(model, [questions[n].sequences for n in scored]):
        yield scored[n], questions[scored[n]].grade(sums)
    written = [n for n, question in enumerate(questions) if question.prompt]
    stops = questions[written[0]].stops if written else ()
    reach = max((len(tokenizer.encode(stop)) + 2 for stop in stops), default=0)  # tokens looked back, as lm_eval does
    ended = lambda ids: any(stop in tokenizer.decode(ids[-reach:], skip_special=False) for stop in stops)
    for n, ids in generate_each(model, [questions[n].prompt for n in written], config.max_new_tokens, stop=ended,
                                eos_ids=tokenizer.eos_ids if stops else tokenizer.end_ids,
                                batch_size=config.batch_size):
        yield written[n], questions[written[n]].grade(ids)


def run(model, tokenizer, questions, file, identity, config):
    """Answers questions into a samples file, going on from the lines that it holds; returns its lines in order.

    A line counts if its key does: a hash of the model's files, of what is asked, and of the settings that matter.
    """
    keys = [hashlib.sha256(repr((identity, question[:3], bool(question.prompt) and config.max_new_tokens)).encode())
            .hexdigest()[:16] for question in questions]
    found, done = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else [], {}

    def write():  # beside the file, and renamed into place
        file.with_suffix(".partial").write_text("".join(json.dumps(done[n]) + "\n" for n in sorted(done)))
        file.with_suffix(".partial").replace(file)

    for line in found:
        with suppress(ValueError, KeyError, TypeError, IndexError):
            sample = json.loads(line)
            if keys[sample["id"]] == sample["key"]:
                done[sample["id"]] = sample
    write()
    left = [n for n in range(len(keys)) if n not in done]
    with (open(file, "a") as out, tqdm(total=len(keys), initial=len(done), desc=file.stem, leave=False,
                                       disable=not sys.stderr.isatty()) as bar):
        for at, graded in answer_all(model, tokenizer, [questions[n] for n in left], config):
            n = left[at]
            done[n] = {"id": n, "key": keys[n], **questions[n].shown, **graded}
            out.write(json.dumps(done[n]) + "\n")
            out.flush()
            bar.update()
    write()
    return [done[n] for n in range(len(keys))]


def column(samples, name):
    """(values, weights) of a metric over the samples that have it; a text weighs as many bytes as it has."""
    return np.array([(s["metrics"][name], s.get("bytes", 1)) for s in samples if name in s["metrics"]]).T


def summarise(samples):
    """Samples -> {"n", metric: mean, metric_stderr: its standard error (lm_eval's mean_stderr), ...}."""
    found = {"n": len(samples)}
    for name in dict.fromkeys(name for sample in samples for name in sample["metrics"]):
        values, weights = column(samples, name)
        found[name] = mean = float(np.average(values, weights=weights))
        spread = ((weights * (values - mean)) ** 2).sum() * len(values) / max(len(values) - 1, 1)
        found[f"{name}_stderr"] = float(spread**0.5 / weights.sum())
    if graded := [(s["gold"], s["answer"]) for s in samples if "answer" in s and s.get("gold")]:
        golds, scores = sorted({gold for gold, _ in graded}), {}
        for label in golds:
            right, said = graded.count((label, label)), sum(answer == label for _, answer in graded)
            held = sum(gold == label for gold, _ in graded)
            scores[label] = {"f1": 2 * right / (said + held), "precision": right / max(said, 1), "recall": right / held}
        yes = next((label for label in golds if label.lower() == "yes"), None)
        found |= scores[yes] if yes else {"f1": sum(one["f1"] for one in scores.values()) / len(golds)}
    if samples and "logp" in samples[0]:
        total = sum(sample["logp"] for sample in samples)
        for unit in ("token", "word", "byte"):
            found[f"{unit}_perplexity"] = math.exp(-total / sum(sample[f"{unit}s"] for sample in samples))
    return found


# --- what differs, and what is noise ----------------------------------------------------------------------------------

MAIN = ("acc_norm", "acc", "exact_match_flexible", "accuracy", "exact_match", "bits_per_byte")  # what a table shows


def compare(a, b, name, resamples=2000):
    """Samples of two models and a metric -> their paired difference b - a: {"delta", "low", "high": a 95 % bootstrap
    interval, "mcnemar_p": the exact test's, where values are 0 or 1, "gained", "lost", "n"}."""
    (x, weights), (y, _) = column(a, name), column(b, name)
    kinds, counts = np.unique(np.stack([weights * (y - x), weights]), axis=1, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(x), counts / len(x), resamples) @ kinds.T
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    delta = float((weights * (y - x)).sum() / weights.sum())
    found = {"delta": delta, "low": float(low), "high": float(high), "n": len(x)}
    if set(x) | set(y) <= {0.0, 1.0}:
        gained, lost = int((y > x).sum()), int((y < x).sum())
        tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
        found |= {"gained": gained, "lost": lost, "mcnemar_p": min(1.0, 2 * tail / 2 ** (gained + lost))}
    return found


def compare_all(samples):
    """{model: {task: samples}} -> `compare` of every two models, task and metric, with a verdict: rose, fell, noise."""
    pairs = []
    for (a, mine), (b, other) in combinations(samples.items(), 2):
        for task in mine:
            for name in dict.fromkeys(name for sample in mine[task] for name in sample["metrics"]):
                found = compare(mine[task], other[task], name)
                better = (found["low"] > 0) - (found["high"] < 0)
                verdict = ("fell", "noise", "rose")[1 + (-better if name == "bits_per_byte" else better)]
                pairs.append({"a": a, "b": b, "task": task, "metric": name, **found, "verdict": verdict})
    return pairs


def headline(a, b, results, pairs):
    """What became of model a as model b, in a sentence or two: the average, and what it hides."""
    shown = [p for p in pairs if (p["a"], p["b"]) == (a, b) and p["metric"] == main_metric(results[a][p["task"]])]
    mean = sum(p["delta"] for p in shown) / max(len(shown), 1)
    tasks = {verdict: ", ".join(p["task"] for p in shown if p["verdict"] == verdict) or "none"
             for verdict in ("rose", "fell", "noise")}
    hidden = " The average hides what fell." if tasks["fell"] != "none" and mean >= 0 else ""
    return (f"{a} → {b}: {100 * mean:+.2f} points on average of {len(shown)} sets. Beyond noise rose: {tasks['rose']}; "
            f"fell: {tasks['fell']}. No more than noise: {tasks['noise']}.{hidden}")


def main_metric(found):
    return next((name for name in MAIN if name in found), "n")


def table(results):
    """{model: {task: summary}} -> Markdown: a line per task and metric, a column per model, ± the standard error."""
    lines = [["set", "metric", "n", *results], ["---"] * (len(results) + 3)]
    for task, found in next(iter(results.values())).items():
        for name in [name for name in found if name != "n" and not name.endswith("_stderr")]:
            cells = [f"{r[task][name]:.4f}" + (f" ± {r[task][f'{name}_stderr']:.4f}" if f"{name}_stderr" in r[task]
                     else "") if name in r[task] else "" for r in results.values()]
            lines.append([task, name, str(found["n"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(results, pairs, samples):
    """The whole comparison as Markdown: the table, every difference, and written answers side by side."""
    parts = ["# Evaluation", table(results)]
    if pairs:
        lines = ["| from | to | set | metric | difference | 95 % interval | McNemar p | verdict |", "|" + "---|" * 8]
        lines += [f"| {p['a']} | {p['b']} | {p['task']} | {p['metric']} | {p['delta']:+.4f} | {p['low']:+.4f} to "
                  f"{p['high']:+.4f} | {p.get('mcnemar_p', math.nan):.3g} | {p['verdict']} |" for p in pairs]
        said = [headline(a, b, results, pairs) for a, b in combinations(results, 2)]
        parts += ["## What differs", "\n\n".join(said), "Both models answered the same questions, so intervals are "
                  "bootstrapped over paired differences. Where one holds 0, the difference is no more than noise.",
                  "\n".join(lines)]
    for task, rows in next(iter(samples.values())).items():
        for n, row in enumerate(rows[:20] if rows and "output" in rows[0] else []):
            outputs = [f"**{name}**: {found[task][n]['output']}" for name, found in samples.items()]
            ask = row.get("prompt") or row["prompts"][0]
            parts += [f"## {task}, question {n}", f"> {ask[-600:]}".replace("\n", "\n> "), *outputs]
    return "\n\n".join(parts) + "\n"


def draw(results, pairs, folder):
    """results.png, grouped bars with standard errors, and deltas.png, paired differences with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task, found in next(iter(results.values())).items() if main_metric(found) != "n"]
    mains = {task: main_metric(next(iter(results.values()))[task]) for task in tasks}
    pairs = [p for p in pairs if mains.get(p["task"]) == p["metric"]]
    if not tasks:
        return
    figure, axes = pyplot.subplots(figsize=(2 + 1.4 * len(tasks), 4), layout="constrained")
    for n, (name, found) in enumerate(results.items()):
        at, width = np.arange(len(tasks)) + (n - (len(results) - 1) / 2) * 0.8 / len(results), 0.8 / len(results)
        axes.bar(at, [found[task][mains[task]] for task in tasks], width, label=name, capsize=2,
                 yerr=[found[task][f"{mains[task]}_stderr"] for task in tasks])
    axes.set_xticks(range(len(tasks)), [f"{task}\n{mains[task]}" for task in tasks], fontsize=8)
    axes.legend()
    figure.savefig(folder / "results.png", dpi=130)
    if pairs:
        figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.3 * len(pairs)), layout="constrained")
        for n, p in enumerate(pairs[::-1]):
            colour = {"rose": "tab:green", "fell": "tab:red", "noise": "tab:gray"}[p["verdict"]]
            axes.plot([p["low"], p["high"]], [n, n], color=colour)
            axes.plot(p["delta"], n, "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(pairs)), [f"{p['a']} → {p['b']}, {p['task']}" for p in pairs[::-1]], fontsize=8)
        axes.set_xlabel("paired difference with 95 % interval; gray: no more than noise")
        figure.savefig(folder / "deltas.png", dpi=130)
    pyplot.close("all")


# --- the command ------------------------------------------------------------------------------------------------------


def find_model(path):
    """(base: folder or hub id, adapter folder or None) of a model, an adapter, or a run folder."""
    folder = Path(path).expanduser() if Path(path).expanduser().is_dir() else resolve(path)
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").exists():
            base = read_adapter_config(adapter)[1].get("base_model_name_or_path")
            if not base:
                raise UserError(f"{adapter}: its config names no base model; merge it, and give the merged folder")
            return base, adapter
    return str(folder / "merged" if (folder / "merged").is_dir() else folder), None


class Models:
    """Loads models one after another; a base is kept while adapters of it follow."""

    def __init__(self, config):
        self.config, self.base, self.model = config, None, None

    def load(self, path):
        """-> (model, tokenizer, what identifies its files)."""
        base, adapter = find_model(path)
        if self.base != base:
            self.model, c = None, self.config
            self.model, self.base = load_model(base, c.dtype, pick_device(c.device), c.attn_implementation), base
        if adapter:
            load_adapter(self.model, adapter)
            if not all(".lora_" in key for key in adapter_parameters(self.model)):
                self.base = None  # it trains more of the base than LoRA layers: not to be used again
        folders = [self.model.folder, *([adapter] if adapter else [])]
        files = [(str(f), s.st_size, s.st_mtime_ns) for d in folders for f in sorted(d.glob("*.safetensors"))
                 for s in [f.stat()]]
        own = adapter and (adapter / "tokenizer.json").exists()
        return self.model.eval(), Tokenizer(adapter if own else self.model.folder), (files, str(self.model.dtype))

    def take_off(self):
        """The plain base again."""
        for name, layer in lora_layers(self.model).items():
            self.model.set_submodule(name, layer.base_layer)
        vars(self.model).pop("adapter", None)


def named(sources, kind):
    """NAME=SOURCE, or SOURCE, which is then named after itself -> {name: source}."""
    found = {}
    for source in sources:
        name, mark, rest = source.partition("=")
        name, source = (name, rest) if mark and re.fullmatch(r"[\w.-]+", name) else (Path(source).stem, source)
        if name in found:
            raise UserError(f"--{kind}: two are named {name}; give names: NAME={source}")
        found[name] = source
    return found


def main(argv=None):
    config = parse_config(EvalConfig, argv, __doc__)
    models, own, embedded = named(config.model, "model"), named(config.data, "data"), not config.model
    if embedded:
        models = {"base": str(EXAMPLES / "tiny-qwen3"), "sft": "output/sft", "dpo": "output/dpo"}
    if not config.tasks and not own:
        if not embedded:
            raise UserError(f"nothing to ask: give --data FILE, or --tasks of {', '.join(TASKS)}")
        own = {"mcqa": str(EXAMPLES / "mcqa" / "validation.jsonl")}
    for task in config.tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: {task!r} is not one of {', '.join(TASKS)}{nearest(task, TASKS)}")
    for key in ("limit", "max_new_tokens", "batch_size"):
        if getattr(config, key) is not None and getattr(config, key) < 1:
            raise UserError(f"--{key}: {getattr(config, key)} is below 1")
    items = {task: read_task(task, config) for task in config.tasks}
    folder, loaded, samples, failed = Path(config.output_dir), Models(config), {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in models.items():
        if embedded and not Path(path).exists():
            print(f"{name}: no {path} yet, left out")
            continue
        try:
            model, tokenizer, identity = loaded.load(path)
            found = {}
            for task in [*items, *own]:
                questions = (ask_items(items[task], TASKS[task], model, tokenizer, config) if task in items else
                             ask_own(own[task], model, tokenizer, config))
                file = folder / f"samples_{name}_{task}.jsonl"
                found[task] = run(model, tokenizer, questions, file, identity, config)
            samples[name] = found
            loaded.take_off()
        except (UserError, RuntimeError) as error:
            failed[name], loaded.base = str(error).splitlines()[0], None
            print(f"{name} failed: {failed[name]}", file=sys.stderr)
    results = {name: {task: summarise(rows) for task, rows in found.items()} for name, found in samples.items()}
    pairs = compare_all(samples)
    (folder / "results.json").write_text(json.dumps({"models": results, "pairs": pairs, "failed": failed}, indent=2))
    if results:
        (folder / "report.md").write_text(report(results, pairs, samples), encoding="utf-8")
        draw(results, pairs, folder)
        print(table(results), *(headline(a, b, results, pairs) for a, b in combinations(results, 2)), sep="\n")
    if failed:
        raise UserError(f"{len(failed)} of {len(models)} models failed: {'; '.join(map(': '.join, failed.items()))}")
    print(f"saved in {folder}: results.json, report.md, samples and figures")


if __name__ == "__main__":
    cli(main)

"""Evaluation: benchmarks as lm-evaluation-harness defines them, own question sets, and which
differences between models are more than noise.

The decision that is not obvious: a shared prefix is computed once, and no number changes. Every
choice is tokenized together with its context, as in the reference; then a batch is the prefix tree
of these id lists. A few-shot header, a question, and the words that two choices begin with are
segments that others continue (see model.py).

A model that never writes `Answer: X` still gets an answer: its text is followed by "Answer:", and
the choice with the highest log-prob counts. So learning a format is not taken for learning a task.

Reference: lm-evaluation-harness 0.4.13 (doi:10.5281/zenodo.12608602): task files, few-shot sampler,
tokenization and metrics.

    python eval.py                     # the embedded model, its SFT and its DPO
    python eval.py --model base=Qwen/Qwen3-0.6B --model sft=output/mine --tasks arc_challenge
    torchrun --nproc_per_node 4 eval.py --model output/mine --data questions.jsonl
    python eval.py chat --model base=Qwen/Qwen3-0.6B --model sft=output/mine
    python eval.py pairs --model output/mine/merged --data ecqa.csv --recipe ecqa --output o.jsonl
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
from functools import partial
from itertools import combinations, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import (
    DataConfig,
    RecipeConfig,
    Tokenizer,
    as_turn,
    common_length,
    find_answer,
    load_tokenizer,
    new_file,
    render_row,
    split_prompt,
    split_row,
    text_of,
    texts_of,
    use_recipe,
    write_rows,
)
from lora import find_adapter, load_adapter, lora_layers, read_adapter_config
from model import (
    ATTENTION,
    DTYPES,
    IGNORE,
    Batch,
    Segment,
    generate,
    generate_each,
    load_model,
    pick_device,
)
from qlora import QuantConfig, load_4bit
from support import report
from support.distributed import every, gather_each, is_first, join_ranks, on_first, size
from support.errors import UserError, as_user_error, brief, run_command, sanitize
from support.files import locked_folder, read_header, read_json, regular_file, write_text
from support.hub import resolve
from support.memory import keep_freed_memory
from support.readers import read_rows, read_text
from support.settings import check_choices, check_range, convert, parse_config, run_subcommand

EXAMPLES = Path(__file__).resolve().parent / "examples"
LETTERS = [*"ABCDEFGHIJ"]

# --- scoring sequences that share a prefix --------------------------------------------------------

SHARED = 4  # tokens: computing a shorter shared prefix again costs less than a segment of its own


def pack_shared(sequences, device="cpu"):
    """Sequences (ids, start >= 1) -> the Batch that scores ids[start:] of each, in this order.

    Its segments are the prefix tree of the sequences: a shared prefix of SHARED tokens is computed
    once. A sequence's last token predicts nothing and is left out.
    """
    inputs = [ids[:-1] for ids, _ in sequences]
    segments, stream_length = [], 0
    positions = [None] * len(inputs)  # of each input's tokens in the stream

    def add(group, depth, parent, path):
        """Adds the tokens from `depth` on of a sorted group of inputs that share what is before."""
        nonlocal stream_length
        for _, branch in groupby(group, key=lambda n: inputs[n][depth : depth + SHARED]):
            branch = list(branch)
            first, last = inputs[branch[0]], inputs[branch[-1]]
            stop = common_length(first, last)  # sorted: what these two share, all share
            segment, branch_path = parent, path
            if stop > depth:
                segment, length = len(segments), stop - depth
                segments.append(
                    Segment(np.array(first[depth:stop]), np.full(length, IGNORE), parent)
                )
                branch_path = np.append(path, np.arange(stream_length, stream_length + length))
                stream_length += length
            for n in branch:
                positions[n] = branch_path
            add([n for n in branch if len(inputs[n]) > stop], stop, segment, branch_path)

    add(sorted(range(len(inputs)), key=inputs.__getitem__), 0, -1, np.zeros(0, np.int64))
    scored, targets, owners = [], [], []
    for n, (ids, start) in enumerate(sequences):
        scored.append(positions[n][start - 1 :])
        targets.append(np.array(ids[start:], np.int64))
        owners.append(np.full(len(ids) - start, n))
    return replace(
        Batch.pack([segments], device),
        scored=torch.from_numpy(np.concatenate(scored)).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        sequence=torch.from_numpy(np.concatenate(owners)).to(device),
        num_sequences=len(sequences),
    )


@torch.inference_mode()
def sum_logps(model, sequences):
    """The summed log-probability of ids[start:] of each sequence (ids, start): a list of floats."""
    batch = pack_shared(sequences, model.device)
    # a sum of hundreds of nats has few fp32 digits left
    logps = model.logps(batch).cpu().double()
    sums = logps.new_zeros(batch.num_sequences)
    return sums.index_add(0, batch.sequence.cpu(), logps).tolist()


def batch_items(items, budget):
    """Yields lists of item numbers, grouped by shared prefix, of about `budget` tokens each."""
    batch, size, previous = [], 0, []
    for n in sorted(range(len(items)), key=lambda n: items[n][0][0]):
        chain = [previous, *(ids for ids, _ in items[n])]
        new_tokens = sum(len(b) - common_length(a, b) for a, b in pairwise(chain))
        if batch and size + new_tokens > budget:
            yield batch
            batch, size = [], 0
            new_tokens += common_length(previous, chain[1])
        batch.append(n)
        size += new_tokens
        previous = chain[-1]
    if batch:
        yield batch


def score(model, items, budget=None):
    """Items, lists of sequences (ids, start) -> yields (number of an item, its sequences' sums) for
    the batches of this rank."""
    budget = budget or (2048 if model.device.type == "cpu" else 16384)
    for numbers in every(batch_items(items, budget), model):
        sums = iter(sum_logps(model, [sequence for n in numbers for sequence in items[n]]))
        for n in numbers:
            yield n, [next(sums) for _ in items[n]]


def likeliest(model, context, choices):
    """Index of the choice (ids) with the highest summed log-probability after context (ids)."""
    sums = sum_logps(model, [(context + choice, len(context)) for choice in choices])
    return int(np.argmax(sums))


def encode_texts(tokenizer, texts):
    """Texts -> {text: ids}, with BOS if the tokenizer adds one and no chat template has done so."""
    texts = list(dict.fromkeys(texts))
    bos = tokenizer.special.get("bos_token")
    has_bos = bool(bos and texts and texts[0].startswith(bos))
    return dict(zip(texts, tokenizer.encode_all(texts, not has_bos)))


def before_text(tokenizer):
    """Ids that predict the first token of a text: BOS, else EOS."""
    return tokenizer.eos_ids[:1] if tokenizer.bos_id is None else [tokenizer.bos_id]


def encode_pairs(tokenizer, pairs, max_length):
    """(context, continuation) texts -> sequences (ids, start of the continuation).

    Both are tokenized together; spaces that end a context belong to its continuation; of more than
    `max_length` tokens the first are cut. Source: lm_eval's TemplateLM._encode_pair.
    """
    pairs = [(context.rstrip(), context + continuation) for context, continuation in pairs]
    ids = encode_texts(tokenizer, [text for pair in pairs for text in pair])
    sequences = []
    for context, whole in pairs:
        head = [] if ids[context] else before_text(tokenizer)
        cut = max(0, len(head) + len(ids[whole]) - max_length - 1)
        start = len(head) + len(ids[context]) - cut
        sequences.append(((head + ids[whole])[cut:], max(1, start)))
    return sequences


# --- benchmarks -----------------------------------------------------------------------------------


class Item(NamedTuple):
    """A benchmark row: a prompt and an answer per choice. What all choices share is listed once."""

    prompts: list
    answers: list
    gold: int = 0  # index of the right choice

    def choices(self):
        """[(prompt, answer), ...]."""
        return list(zip(self.prompts * len(self.answers), self.answers * len(self.prompts)))


def arc(row):
    """Own rows too: their choices are a list, the answer one of them, its letter or its index."""
    choices = row["choices"]
    answer = row["answerKey"] if "answerKey" in row else row["answer"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts = choices
        namings = texts, LETTERS[: len(texts)], list(range(len(texts)))
        labels = next(names for names in namings if answer in names)
    return Item([f"Question: {text_of(row, 'question')}\nAnswer:"], texts, labels.index(answer))


def commonsense_qa(row):
    letters, texts = LETTERS[:5], row["choices"]["text"]
    lines = [f"{letter}. {texts[n]}\n" for n, letter in enumerate(letters)]
    prompt = f"Question: {text_of(row, 'question').strip()}\n{''.join(lines)}Answer:"
    return Item([prompt], letters, letters.index(row["answerKey"]))


def gsm8k(row):
    return Item([f"Question: {text_of(row, 'question')}\nAnswer:"], [text_of(row, "answer")])


def hellaswag(row):
    def clean(text):  # WikiHow's headings stand in brackets
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{text_of(row, 'ctx_a')} {text_of(row, 'ctx_b').capitalize()}"
    prompt = clean(f"{text_of(row, 'activity_label')}: {context}")
    return Item([prompt], [clean(ending) for ending in row["endings"]], int(row["label"]))


def winogrande(row):
    before, blank, after = text_of(row, "sentence").partition("_")
    if not blank:
        raise UserError("'sentence' has no _ in it")
    prompts = [before + row["option1"], before + row["option2"]]
    return Item(prompts, [after.strip()], ["1", "2"].index(row["answer"]))


class Task(NamedTuple):
    parse: Callable  # row -> Item
    source: str = ""  # data set on the hub
    split: str = ""
    metrics: tuple = ("acc", "acc_norm")
    spare: int = 1  # few-shot rows sampled in excess, in case one is the question itself
    num_fewshot: int = 0
    stops: tuple = ()  # texts that end a generated answer; none: the choices are scored


TASKS = {
    "arc_challenge": Task(arc, "allenai/ai2_arc:ARC-Challenge", "test", spare=0),
    "arc_easy": Task(arc, "allenai/ai2_arc:ARC-Easy", "test", spare=0),
    "commonsense_qa": Task(commonsense_qa, "tau/commonsense_qa", "validation", ("acc",)),
    "gsm8k": Task(
        gsm8k,
        "openai/gsm8k:main",
        "test",
        metrics=("exact_match_strict", "exact_match_flexible"),
        spare=0,
        num_fewshot=5,
        stops=("Question:", "</s>", "<|im_end|>"),
    ),
    "hellaswag": Task(hellaswag, "Rowan/hellaswag", "validation"),
    "winogrande": Task(winogrande, "allenai/winogrande:winogrande_xl", "validation", ("acc",)),
}
ROW_FAULTS = KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration


def parse_item(where, row, task, name):
    """The Item of a row; UserError with its file and line if it is none."""
    try:
        item = task.parse(row)
        if not all(isinstance(text, str) for text in item.prompts + item.answers):
            raise UserError("choices must be texts")
        if not 0 <= item.gold < len(item.choices()):
            raise UserError("its answer is none of its choices")
        return item
    except (UserError, *ROW_FAULTS) as error:
        reason = str(error) or "its answer is none of its choices"
        if isinstance(error, KeyError):
            reason = f"it has no {error}"
        row = brief(row, 100)
        raise UserError(f"{where}: not a row of {name}: {reason}; found {row}") from None


def read_task(name, config):
    """[(Item, its few-shot Items), ...] of a benchmark. The few-shot rows are those that lm_eval's
    ContextSampler samples (seed 1234)."""
    task, rng = TASKS[name], random.Random(1234)
    shots = task.num_fewshot if config.num_fewshot is None else config.num_fewshot

    def source(split):
        if config.data_dir:
            return Path(config.data_dir, name, f"{split}.jsonl")
        return f"{task.source}:{split}"

    rows = pool = read_rows(source(task.split))
    if shots and (not config.data_dir or source("train").exists()):
        pool = read_rows(source("train"))
    if shots and len(pool) <= shots:
        raise UserError(
            f"{name}: {shots} few-shot examples can't be sampled from {len(pool)} rows; lower "
            "--num_fewshot"
        )
    items = []
    for where, row in rows[: config.limit]:
        examples = rng.sample(pool, shots + task.spare) if shots else []
        if task.spare:
            examples = [example for example in examples if example[1] != row][:shots]
            if len(examples) < shots:  # the question was sampled more than once
                examples = rng.sample([example for example in pool if example[1] != row], shots)
        few_shot = [parse_item(*example, task, name) for example in examples]
        items.append((parse_item(where, row, task, name), few_shot))
    return items


def add_context(item, few_shot, tokenizer, as_chat):
    """[(context, continuation), ...] of the choices: the few-shot examples come first, as text or
    as turns of a chat."""
    examples = [example.choices()[example.gold] for example in few_shot]
    if not as_chat:
        header = "".join(f"{prompt} {answer}\n\n" for prompt, answer in examples)
        return [(header + prompt, f" {answer}") for prompt, answer in item.choices()]
    turns = []
    for prompt, answer in examples:
        turns += as_turn("user", prompt) + as_turn("assistant", answer)
    prompts = [tokenizer.render(turns + as_turn("user", text), True) for text in item.prompts]
    return item._replace(prompts=prompts).choices()


# --- questions: what a model is asked, and how its answer is graded -------------------------------


class Question(NamedTuple):
    """One line of a samples file. Either its sequences (ids, start) are scored or its prompt (ids)
    is continued; grade(sums or new ids) -> the line's other fields, `metrics` among them."""

    shown: dict
    sequences: list
    prompt: list
    grade: Callable
    stops: tuple = ()


def grade_choices(item, metrics, sums):
    """acc: the right choice has the highest log-prob; acc_norm: the highest per character."""
    lengths = [max(len(answer), 1) for _, answer in item.choices()]
    best, best_norm = np.argmax(sums), np.argmax(np.array(sums) / lengths)
    right = {"acc": float(best == item.gold), "acc_norm": float(best_norm == item.gold)}
    return {
        "logps": sums,
        "pred": int(best),
        "metrics": {name: right[name] for name in metrics},
    }


def grade_gsm8k(item, task, tokenizer, ids):
    """strict: the number after '####'; flexible: the last number. Source: lm_eval's gsm8k.yaml."""

    def normalize(answer):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            answer = re.sub(pattern, "", answer)
        return answer.lower()

    text = tokenizer.decode(ids)
    text = re.split("|".join(map(re.escape, task.stops)), text)[0]
    after_mark = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    strict = after_mark[0] if after_mark else "[invalid]"
    flexible = "".join(numbers[-1]) if numbers else "[invalid]"
    gold = normalize(item.answers[0])
    right = [float(normalize(number.strip()) == gold) for number in (strict, flexible)]
    metrics = dict(zip(task.metrics, right))
    return {"output": text, "strict": strict, "flexible": flexible, "metrics": metrics}


def ask_items(items, task, model, tokenizer, config):
    """[(Item, its few-shot Items), ...] -> Questions."""
    max_length = model.config.max_position_embeddings
    as_chat = config.apply_chat_template
    contexts = [add_context(item, few_shot, tokenizer, as_chat) for item, few_shot in items]
    questions = []
    if task.stops:
        room = max(max_length - config.max_new_tokens, 1)
        ids = encode_texts(tokenizer, [choices[0][0] for choices in contexts])
        for (item, _), choices in zip(items, contexts):
            prompt = ids[choices[0][0]][-room:]
            grade = partial(grade_gsm8k, item, task, tokenizer)
            questions.append(Question(item._asdict(), [], prompt, grade, task.stops))
        return questions
    choices = [choice for choices in contexts for choice in choices]
    sequences = iter(encode_pairs(tokenizer, choices, max_length))
    for (item, _), choices in zip(items, contexts):
        grade = partial(grade_choices, item, task.metrics)
        questions.append(Question(item._asdict(), [next(sequences) for _ in choices], [], grade))
    return questions


def grade_answer(model, tokenizer, prompt, reference, options, ids):
    """A generated answer (ids): `gold` is the reference's `Answer: X`, `answer` the text's own, or
    where it has none, `forced`, the likeliest option."""
    text, gold = tokenizer.decode(ids).strip(), find_answer(reference)
    answer = find_answer(text)
    forced = bool(gold and not answer)
    if forced:
        context = prompt + ids + tokenizer.encode("\nAnswer:")
        choices = [tokenizer.encode(f" {option}") for option in options]
        answer = options[likeliest(model, context, choices)]
    return {
        "output": text,
        "gold": gold,
        "answer": answer,
        "forced": forced,
        "choices": options,
        "metrics": {"accuracy": float(answer == gold)},
    }


def ask_answers(model, tokenizer, examples, choices):
    """SFT examples -> Questions whose answer is generated. choices: of each, or None; without its
    own choices an example may have the answer of any."""
    prompts, references = zip(*map(split_prompt, examples)) if examples else ((), ())
    references = [tokenizer.decode(ids).strip() for ids in references]
    golds = {find_answer(text) for text in references} - {None}
    questions = []
    for prompt, reference, own in zip(prompts, references, choices):
        options = own if find_answer(reference) in texts_of(own) else sorted(golds)
        grade = partial(grade_answer, model, tokenizer, prompt, reference, options)
        shown = {"prompt": tokenizer.decode(prompt).strip(), "reference": reference}
        questions.append(Question(shown, [], prompt, grade))
    return questions


def answer_questions(model, tokenizer, examples, choices, max_new_tokens=128, batch_size=64):
    """Greedy answers to SFT examples, graded by `grade_answer`; arguments as in `ask_answers`."""
    questions = ask_answers(model, tokenizer, examples, choices)
    options = {"eos_ids": tokenizer.end_ids, "batch_size": batch_size}
    answers = generate_own(model, questions, max_new_tokens, **options)
    with keep_freed_memory():
        samples = sorted(gather_each(graded(questions, answers), model), key=itemgetter(0))
    return [sample for _, sample in samples]


def generate_own(model, questions, max_new_tokens, **options):
    """Yields (number of a question, new ids) for this rank's questions. Options: `generate_each`'s.
    Other questions in its batches than in one process change the rounding, and nothing else."""
    own = [*every(range(len(questions)), model)]
    prompts = [questions[n].prompt for n in own]
    for row, ids in generate_each(model, prompts, max_new_tokens, **options):
        yield own[row], ids


def graded(questions, answers):
    """(number of a question, its sums or new ids) -> yields (number, the question's sample)."""
    for n, answer in answers:
        yield n, questions[n].shown | questions[n].grade(answer)


def ask_choice(tokenizer, example, choices):
    """An SFT example as a forced choice between `choices`, their letters, or Yes and No; None if
    its answer is none of these. A reference's reasoning is left out: its answer alone is scored,
    right after the prompt."""
    prompt, reference = map(tokenizer.decode, split_prompt(example))
    marked, choices = find_answer(reference), texts_of(choices)
    lines = choices or re.findall(r"(?m)^\(?([A-Z])[.):]", prompt)
    lead = re.match(r"\s*(<think>\s*</think>\s*)?", reference)[0]  # Qwen3's template writes this
    gold = marked or reference.removeprefix(lead).strip().rstrip(".")
    offers = choices, LETTERS[: len(lines)], ["Yes", "No"], ["yes", "no"]
    options = next((offer for offer in offers if gold in offer), None)
    if not options:
        return None
    context = split_prompt(example)[0]
    if marked:
        context, lead = context + tokenizer.encode("Answer:"), " "
    sequences = [(context + tokenizer.encode(lead + text), len(context)) for text in options]

    def grade(sums):
        answer = options[int(np.argmax(sums))]
        metrics = {"accuracy": float(answer == gold)}
        return {"logps": sums, "answer": answer, "metrics": metrics}

    shown = {"prompt": prompt.strip(), "choices": options, "gold": gold}
    return Question(shown, sequences, [], grade)


def choice_metrics(model, questions):
    """{'eval_accuracy', 'eval_f1', ...} of forced choices during training; {} without any."""
    training = model.training
    model.eval()
    scores = score(model, [question.sequences for question in questions])
    samples = [sample for _, sample in gather_each(graded(questions, scores), model)]
    model.train(training)
    means = summarise(samples)
    return {f"eval_{name}": means[name] for name in report.metrics_of(means)}


def ask_text(text, tokenizer, max_length):
    """A text -> a Question whose log-probability counts, in windows of `max_length` tokens: each is
    predicted from the last token before it, the last one from all that fits before it. Source:
    lm_eval's get_rolling_token_windows."""
    ids = before_text(tokenizer) + tokenizer.encode(text)
    counts = {
        "tokens": len(ids) - 1,
        "words": len(re.split(r"\s+", text)),
        "bytes": len(text.encode()),
    }
    sequences = []
    for start, stop in pairwise([*range(1, len(ids), max_length), len(ids)]):
        window = ids[max(0, stop - max_length - 1) : stop]
        sequences.append((window, len(window) - (stop - start)))

    def grade(sums):
        bits = -sum(sums) / math.log(2)
        return {"logp": sum(sums), "metrics": {"bits_per_byte": bits / counts["bytes"]}}

    return Question({"text": text[:200], **counts}, sequences, [], grade)


def grade_text(tokenizer, reference, ids):
    """A generated text against its reference, if any: exact match, and ROUGE F-measures."""
    text = tokenizer.decode(ids).strip()
    if reference is None:
        return {"output": text, "metrics": {}}
    from rouge_score.rouge_scorer import RougeScorer  # imports a language toolkit, slowly

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    metrics = {"exact_match": float(text == reference)}
    for name, rouge in scorer.score(reference, text).items():
        metrics[name] = rouge.fmeasure
    return {"output": text, "metrics": metrics}


def read_own(source, config):
    """[(where, row), ...] of an own set, as --recipe makes them; a .txt is one row."""
    if source.endswith(".txt"):
        return [(source, {"text": read_text(Path(source))})]
    make, _ = use_recipe(config.recipe, config.recipe_args, config.seed)
    rows, dropped = [], Counter()
    for where, row in read_rows(source):
        with as_user_error(where, UserError):
            row = make(row)
        if isinstance(row, str):
            dropped[row] += 1
        else:
            rows.append((where, row))
    for reason, count in dropped.items():
        print(f"{source}: {count:,} rows are not asked: {reason}")
    if not rows:
        raise UserError(f"{source}: no rows to ask")
    return rows


def ask_own(rows, model, tokenizer, config):
    """The rows of an own set -> Questions. What a row holds decides: a question with choices, a
    text, a prompt with a reference (`Answer: X`, a choice, Yes or No, any text), a prompt alone."""
    if all({"question", "choices"} <= row.keys() for _, row in rows):
        task = Task(arc)
        items = [(parse_item(where, row, task, "choices"), []) for where, row in rows]
        return ask_items(items, task, model, tokenizer, config)
    if all(isinstance(row.get("text"), str) for _, row in rows):
        for where, row in rows:
            if not row["text"]:
                raise UserError(f"{where}: an empty text has nothing to score")
        max_length = model.config.max_position_embeddings
        return [ask_text(row["text"], tokenizer, max_length) for _, row in rows]
    return ask_prompts(rows, model, tokenizer)


def with_completion(row, has_template):
    """(a row of an own set with its reference as the completion, whether it has a reference).
    UserError: it has two questions or two references."""
    row = {key: value for key, value in row.items() if value is not None}
    if row.keys() >= {"messages", "reference"}:
        row["prompt"] = row.pop("messages")
    columns = row.keys() & {"reference", "completion", "chosen"} or row.keys() & {"answer"}
    for names in (columns, row.keys() & {"prompt", "question"}):
        if len(names) > 1:
            raise UserError(f"has {' and '.join(sorted(names))}; leave one of them")
    if "question" in row:
        question = text_of(row, "question")
        row["prompt"] = as_turn("user", question) if has_template else question
    if "prompt" not in row:
        if "reference" in row:
            raise UserError("'reference' needs a 'question', 'prompt' or 'messages'")
        return row, True
    for key in columns & {"reference", "answer"}:
        row["completion"] = text_of(row, key)
    if not columns:
        row["completion"] = "?"  # the renderer needs one
    for key in ("question", "reference", "answer"):
        row.pop(key, None)
    return row, bool(columns)


def ask_prompts(rows, model, tokenizer):
    """Rows with prompts, some with a reference -> Questions."""
    examples, has_reference = [], []
    for where, row in rows:
        with as_user_error(where, UserError):
            row, answered = with_completion(row, tokenizer.has_template)
        example = render_row(row, tokenizer, where=where)
        if isinstance(example, str):
            raise UserError(f"{where}: {example}")
        examples.append(example)
        has_reference.append(answered)
    choices = [row.get("choices") for _, row in rows]
    questions = ask_answers(model, tokenizer, examples, choices)
    for n, question in enumerate(questions):
        reference = question.shown["reference"] if has_reference[n] else None
        if find_answer(reference or ""):
            continue
        shown = question.shown | {"reference": reference}
        written = Question(shown, [], question.prompt, partial(grade_text, tokenizer, reference))
        choice = ask_choice(tokenizer, examples[n], choices[n]) if has_reference[n] else None
        questions[n] = choice or written
    return questions


# --- answering all questions, and summing up ------------------------------------------------------


def question_key(question, identity, config):
    """A hash of everything a sample depends on: the model's files, the question, the settings."""
    settings = question.prompt and config.max_new_tokens
    content = repr((identity, question[:3], settings))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
    write_text(file, "".join(json.dumps(samples[n]) + "\n" for n in sorted(samples)))


def generate_answers(model, tokenizer, questions, config):
    """Yields (number of the question, new ids)."""
    stops = questions[0].stops if questions else ()
    # how far lm_eval looks back for a text that stops
    window = max((len(tokenizer.encode(stop)) + 2 for stop in stops), default=0)

    def stop(ids):
        text = tokenizer.decode(ids[-window:], False)
        return any(stop in text for stop in stops)

    return generate_own(
        model,
        questions,
        config.max_new_tokens,
        eos_ids=tokenizer.eos_ids if stops else tokenizer.end_ids,
        batch_size=config.batch_size,
        stop=stop if stops else None,  # without stops, no decoding per token
    )


def answer_all(model, tokenizer, questions, file, identity, config):
    """Answers questions into a samples file, resuming from its lines; returns them in order."""
    keys = [question_key(question, identity, config) for question in questions]
    samples = dict(on_first(read_samples, file, keys))
    missing = [n for n in range(len(questions)) if n not in samples]
    to_score = [n for n in missing if not questions[n].prompt]
    to_write = [n for n in missing if questions[n].prompt]
    scores = score(model, [questions[n].sequences for n in to_score])
    texts = generate_answers(model, tokenizer, [questions[n] for n in to_write], config)
    bar = tqdm(total=len(keys), initial=len(samples), desc=file.stem, leave=False, disable=None)
    path = file if is_first() else os.devnull
    with open(path, "a", encoding="utf-8") as out, bar, keep_freed_memory():
        for numbers, answers in ((to_score, scores), (to_write, texts)):
            asked = [questions[n] for n in numbers]
            for index, sample in gather_each(graded(asked, answers), model):
                n = numbers[index]
                samples[n] = {"id": n, "key": keys[n], **sample}
                out.write(json.dumps(samples[n]) + "\n")
                out.flush()
                bar.update()
    on_first(write_samples, file, samples)
    return [samples[n] for n in range(len(keys))]


def values_by_metric(samples):
    """{metric: (values, weights)} over the samples that have it; a text's weight is its bytes."""
    values = {}
    for sample in samples:
        for name, value in sample["metrics"].items():
            values.setdefault(name, []).append((value, sample.get("bytes", 1)))
    return {name: np.array(pairs).T for name, pairs in values.items()}


def summarise(samples):
    """Samples -> {"n", metric: mean, metric_stderr: its standard error (lm_eval's mean_stderr),
    metric_n: of how many samples}, and what only a whole set has: F1 scores, perplexities."""
    summary = {"n": len(samples)}
    for name, (values, weights) in values_by_metric(samples).items():
        mean, n = np.average(values, weights=weights), len(values)
        spread = ((weights * (values - mean)) ** 2).sum() * n / max(n - 1, 1)
        summary[name] = float(mean)
        summary[f"{name}_stderr"] = float(spread**0.5 / weights.sum())
        summary[f"{name}_n"] = n
    answered = [s for s in samples if s.get("gold") and "answer" in s]
    scores = f1_scores([(sample["gold"], sample["answer"]) for sample in answered])
    summary |= scores | {f"{name}_n": len(answered) for name in scores}
    if samples and "logp" in samples[0]:
        total = sum(sample["logp"] for sample in samples)
        for unit in ("token", "word", "byte"):
            count = sum(sample[f"{unit}s"] for sample in samples)
            summary[f"{unit}_perplexity"] = math.exp(-total / count)
    return summary


def f1_scores(graded):
    """[(gold, answer), ...] -> {"f1"}: the mean over the answers; of Yes and No that of Yes, with
    its precision and recall."""
    golds = sorted({gold for gold, _ in graded})
    yes = [gold for gold in golds if gold.lower() == "yes" and len(golds) < 3]
    scores = {}
    for label in yes or golds:
        right = graded.count((label, label))
        actual = sum(gold == label for gold, _ in graded)
        predicted = sum(answer == label for _, answer in graded)
        f1 = 2 * right / (predicted + actual)
        scores["f1"] = scores.get("f1", 0) + f1 / len(yes or golds)
        if yes:
            scores |= {"precision": right / max(predicted, 1), "recall": right / actual}
    return scores


# --- which differences are more than noise --------------------------------------------------------

# the first of these that a set has represents it
MAIN = "acc_norm", "acc", "exact_match_flexible", "accuracy", "exact_match", "bits_per_byte"


FEWEST_DIFFERING = 6  # five that all differ in one way still have p = 2 / 2^5 = 0.06


def main_metric(metrics):
    return next((name for name in MAIN if name in metrics), None)


def compare(name, a, b, resamples=2000):
    """The paired difference b - a of a metric, from its (values, weights) for two models.

    {"n", "delta", "low", "high": a 95 % bootstrap interval over questions, "verdict": rose, fell,
    or noise}; for values 0 or 1 also "gained", "lost", and "mcnemar_p", McNemar's exact test. Noise
    is what has 0 in its interval, or p of 0.05 or more. Too few, without an interval, is what has
    less than FEWEST rows, where bootstrap intervals are too narrow (Hesterberg 2015,
    arXiv:1411.5279), or less than FEWEST_DIFFERING that differ. Rows that all differ by the same
    have no interval either.
    """
    (x, weights), (y, _) = a, b
    gained, lost = int((y > x).sum()), int((y < x).sum())
    delta = float((weights * (y - x)).sum() / weights.sum())
    result = {"n": len(x), "delta": delta, "low": None, "high": None, "verdict": "too few"}
    if {*x, *y} <= {0.0, 1.0}:
        tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
        p = min(1.0, 2 * tail / 2 ** (gained + lost))
        result |= {"gained": gained, "lost": lost, "mcnemar_p": p}
    if len(x) < report.FEWEST or gained + lost < FEWEST_DIFFERING:
        return result
    pairs, counts = np.unique(np.stack([weights * (y - x), weights]), axis=1, return_counts=True)
    rng = np.random.default_rng(0)
    differences, totals = pairs @ rng.multinomial(len(x), counts / len(x), resamples).T
    low, high = map(float, np.quantile(differences / totals, (0.025, 0.975)))
    verdict = "noise"
    if (low > 0 or high < 0) and result.get("mcnemar_p", 0) < 0.05:
        is_better = (low > 0) != (name == "bits_per_byte")  # fewer bits are better
        verdict = "rose" if is_better else "fell"
    result["verdict"] = verdict
    return result | {"low": low, "high": high} if low < high else result


def compare_all(samples):
    """{model: {set: samples}} -> `compare` of every two models, set and metric; `main` marks the
    metric that represents the set."""
    values = {}
    for model, sets in samples.items():
        values[model] = {task: values_by_metric(rows) for task, rows in sets.items()}
    comparisons = []
    for a, b in combinations(values, 2):
        for task, metrics in values[a].items():
            for name in metrics:
                about = {"a": a, "b": b, "task": task, "metric": name}
                about["main"] = name == main_metric(metrics)
                result = compare(name, metrics[name], values[b][task][name])
                comparisons.append(about | result)
    return comparisons


# --- preference pairs from answers ----------------------------------------------------------------


def pairs(config):
    """Preference pairs of questions with a known answer, in any form that eval.py --data reads.

    Chosen is the row's own answer; rejected is the same with a wrong choice in its place or, with
    --generate, a wrong answer of the model.
    """
    new_file(config)
    tokenizer, counts, rng = load_tokenizer(config), Counter(), np.random.default_rng(config.seed)
    rows = [row for source in config.data for row in read_own(source, config)]
    rows = [rows[n] for n in sorted(rng.permutation(len(rows))[: config.max_samples])]
    rows = [with_answer(where, row, tokenizer, config) for where, row in rows]
    generated = generate_for(config, tokenizer, rows) if config.generate else None
    pairs = {}
    for n, (row, gold, _) in enumerate(rows):
        prompt, (answer, *_) = split_row(row, tokenizer.has_template)
        is_chat = isinstance(answer, list)
        if is_chat:
            prompt, answer = prompt + answer[:-1], answer[-1]["content"]
        parse_answer = find_answer if find_answer(answer) else str.strip
        gold = gold or parse_answer(answer)
        wrong = generated[n] if generated else swap_answer(row, answer, gold, rng)
        wrong_answer = parse_answer(wrong)
        if not wrong_answer or wrong_answer == gold:
            counts["answered right" if wrong_answer else "no wrong answer known"] += 1
            continue
        pair = {"prompt": prompt, "chosen": answer, "rejected": wrong}
        if is_chat:
            for side in ("chosen", "rejected"):
                pair[side] = as_turn("assistant", pair[side])
        key = json.dumps(pair)
        if key in pairs:
            counts["the same as another"] += 1
        pairs[key] = pair
    skipped = "".join(f"; {reason}: {n:,}" for reason, n in counts.items())
    write_rows(config, pairs.values(), f"{len(pairs):,} pairs{skipped}")


def name_choice(where, row):
    """A question with choices as a row whose answer is the right one's text; others as they are."""
    if not {"question", "choices"} <= row.keys():
        return row
    item = parse_item(where, row, Task(arc), "choices")
    answer = item.answers[item.gold]
    return {"question": row["question"], "answer": answer, "choices": item.answers}


def with_answer(where, row, tokenizer, config):
    """A row of an own set -> (the row with its answer as the completion, the right choice if it
    names one, the prompt's ids). UserError: it has no answer."""
    row = name_choice(where, row)
    gold = row.get("answer")
    with as_user_error(where, UserError):
        if not isinstance(gold, (str, type(None))):
            raise UserError(f"'answer' must be the text of the right choice, found {brief(gold)}")
        row, has_answer = with_completion(row, tokenizer.has_template)
        example = render_row(row, tokenizer, config.max_length)
        if not has_answer or "text" in row or isinstance(example, str):
            raise UserError("it has no answer that could be chosen")
    return row, gold, split_prompt(example)[0]


def generate_for(config, tokenizer, rows):
    """The model's sampled answers to rows, as texts."""
    model = load_model(config.model, device=pick_device("auto"))
    prompts, length, ends = [ids for *_, ids in rows], config.max_new_tokens, tokenizer.end_ids
    outputs = generate(
        model, prompts, length, config.temperature, eos_ids=ends, seed=config.seed, batch_size=32
    )
    return [*map(tokenizer.decode, outputs)]


def swap_answer(row, answer, gold, rng):
    """The answer with a wrong choice in place of the gold one; "" where none is known."""
    others = [choice for choice in texts_of(row.get("choices")) if choice != gold]
    if not others or not answer.endswith(gold):
        return ""
    return answer.removesuffix(gold) + rng.choice(others)


# --- models and questions of a command ------------------------------------------------------------


@dataclass
class LoadConfig:
    # loading
    model: list[str] = field(default_factory=list)  # [NAME=]PATH ...: models, adapters, runs
    dtype: str = "auto"  # of weights and matmuls; auto: see model.pick_dtype
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    attn_implementation: str = "auto"  # auto: varlen where it runs, else sdpa

    CHOICES: ClassVar[dict] = {
        "dtype": ("auto", *DTYPES),
        "attn_implementation": ("auto", "flash", *ATTENTION),
    }


@dataclass
class EvalConfig(LoadConfig, RecipeConfig):
    """The settings of an evaluation; lm_eval's names where it has one."""

    # questions
    tasks: list[str] = field(default_factory=list)  # benchmarks
    data: list[str] = field(default_factory=list)  # [NAME=]SOURCE ...: own rows, or a .txt
    data_dir: str | None = None  # has TASK/SPLIT.jsonl in the hub's columns; none: the hub
    num_fewshot: int | None = None  # few-shot examples; none: the task's own number
    limit: int | None = None  # evaluate this many questions of each set, the first ones
    apply_chat_template: bool = False  # ask benchmarks as chats, few-shot examples as turns
    seed: int = 42  # of what the recipe draws
    max_new_tokens: int = 256  # longest generated answer
    batch_size: int = 32  # answers generated at a time
    output_dir: str = "output/eval"  # results.json, samples, report.md and figures

    CHOICES: ClassVar[dict] = {"tasks": TASKS}

    def __post_init__(self):
        check_choices(self)
        check_range(self, 1, "limit", "batch_size")
        check_range(self, 0, "num_fewshot", "seed")
        check_range(self, 1, "max_new_tokens", most=2**20)


def find_base(path):
    """(base: folder or hub id, adapter folder or None, QuantConfig of its run) of a model, adapter
    or run folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = resolve(path)
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").exists():
            base = read_adapter_config(adapter)[1].get("base_model_name_or_path")
            if not base:
                raise UserError(
                    f"{adapter}: its config names no base model; merge it and evaluate the result"
                )
            return base, adapter, read_quantization(adapter.parent / "config.json")
    merged = folder / "merged"
    return str(merged if merged.is_dir() else folder), None, QuantConfig()


def read_quantization(file):
    """The QuantConfig of a run's config.json; the default where there is none."""
    run = read_json(file) if file.exists() else {}
    with as_user_error(f"{file}: not the settings of a run", ValueError, TypeError):
        settings = {}
        for f in fields(QuantConfig):
            settings[f.name] = convert(run.get(f.name, f.default), f.type)
        return QuantConfig(**settings)


def attach(model, layers):
    """Takes a model's LoRA layers off and puts `layers`, {path: layer}, on the same base."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base_layer)
    vars(model).pop("adapter", None)
    for path, layer in layers.items():
        model.set_submodule(path, layer)


def load_evaluated(path, cache, config, keep=False):
    """-> (model, tokenizer, (its folders, QuantConfig)). `cache` keeps the base for the adapters
    that follow, unless an adapter trained more than LoRA layers: that can't be taken off again, so
    where models loaded before are to stay (`keep`), it gets a base of its own."""
    base, adapter, quant = find_base(path)
    key, in_place = (base, astuple(quant)), False
    if adapter:
        keys = read_header(find_adapter(adapter) / "adapter_model.safetensors")
        in_place = not all(re.search(r"\.lora_(?!embedding)", key) for key in keys)
    if key not in cache or in_place and keep:
        cache.clear()
        cache[key] = load_4bit(
            base,
            quant,
            dtype=config.dtype,
            device=pick_device(config.device),
            attn_implementation=config.attn_implementation,
        )
    model = cache[key]
    if in_place:
        cache.clear()
    attach(model, {})
    folders = [model.folder]
    if adapter:
        load_adapter(model, adapter)
        folders.append(adapter)
    return model.eval(), Tokenizer(model.folder, adapter=adapter), (folders, quant)


def hash_weights(folder):
    """SHA-256 of the content of a folder's weights and configs: sizes and times may be equal where
    weights are not."""
    digest = hashlib.sha256()
    for pattern in ("*.safetensors", "*config.json"):
        for path in sorted(folder.glob(pattern)):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def by_name(sources, flag):
    """[NAME=]SOURCE ... -> {name: source}; a source without a name is named after itself."""
    named = {}
    for source in sources:
        name, source = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", source, re.S).groups()
        if not source.strip():
            raise UserError(f"--{flag}: {source!r} is empty; give a path, or NAME=PATH")
        if not name:
            path = Path(source)
            name = re.sub(r"[^\w.-]", "_", path.name if flag == "model" else path.stem)
        if name in named:
            raise UserError(f"--{flag}: two are named {name}; give names: NAME={source}")
        named[name] = source
    return named


def embedded_models():
    """The embedded model and what `python sft.py` and `python dpo.py` have made of it so far."""
    base = str(EXAMPLES / "tiny-qwen3")
    models = {"base": base, "sft": "output/sft", "dpo": "output/dpo"}
    for name, path in list(models.items()):
        if not Path(path).exists():
            print(f"{name}: there is no {models.pop(name)} yet, skipped")
    return models


def read_questions(config, has_models):
    """{set: a function (model, tokenizer) -> Questions} of the benchmarks and the own sets."""
    own = by_name(config.data, "data")
    if not config.tasks and not own:
        if has_models:
            raise UserError(f"nothing to ask: give --data FILE, or --tasks of {', '.join(TASKS)}")
        own = {"mcqa": str(EXAMPLES / "mcqa" / "validation.jsonl")}
    if config.recipe and not config.data:
        raise UserError("--recipe: reads the rows of --data, and there is none")
    for name in own:
        if name in TASKS:
            raise UserError(f"--data: {name} is a benchmark's name; give NAME={own[name]}")
    ask = {}
    for name in config.tasks:
        ask[name] = partial(ask_items, read_task(name, config), TASKS[name], config=config)
    for name, source in own.items():
        ask[name] = partial(ask_own, read_own(source, config)[: config.limit], config=config)
    return ask


def evaluate(models, ask, config):
    """Every model on every set -> ({model: {set: samples}}, {model: why it failed})."""
    samples, failed, cache, hashes = {}, {}, {}, {}
    folder = Path(config.output_dir)
    for name, path in models.items():
        try:
            model, tokenizer, (folders, quant) = load_evaluated(path, cache, config)
            for path in folders:
                hashes[path] = hashes.get(path) or hash_weights(path)
            identity = [hashes[path] for path in folders], str(model.dtype), astuple(quant)
            questions = {
                task: make(model=model, tokenizer=tokenizer) for task, make in ask.items()
            }
            answered = {}
            for task, asked in questions.items():
                file = folder / f"samples_{name}_{task}.jsonl"
                answered[task] = answer_all(model, tokenizer, asked, file, identity, config)
            samples[name] = answered
        except (UserError, RuntimeError) as error:  # the other models' results stand
            if size() > 1:  # the other ranks may be at another place
                raise
            failed[name] = str(error).splitlines()[0]
            cache.clear()
    return samples, failed


# --- a conversation -------------------------------------------------------------------------------


@dataclass
class ChatConfig(LoadConfig, RecipeConfig):
    # prompts
    prompt: list[str] = field(default_factory=list)  # prompts; none, nor data: a conversation
    data: list[str] = field(default_factory=list)  # files of prompts: lines of a .txt, or rows
    system: str = ""  # system prompt
    enable_thinking: bool | None = None  # a variable of Qwen3's template; none: as it has it
    # sampling
    max_new_tokens: int = 512  # longest answer
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # and from the fewest whose probability reaches p
    seed: int = 42  # of what is drawn

    def __post_init__(self):
        check_choices(self)
        check_range(self, 1, "max_new_tokens", most=2**20)
        check_range(self, 0, "temperature", "top_k", "seed")
        check_range(self, 1e-9, "top_p", most=1)


def load_speakers(config):
    """{name: (model, tokenizer, its LoRA layers)} of --model. Adapters of one base share it."""
    speakers, cache = {}, {}
    for name, path in (by_name(config.model, "model") or embedded_models()).items():
        model, tokenizer, _ = load_evaluated(path, cache, config, keep=True)
        speakers[name] = model, tokenizer, lora_layers(model)
        print(f"{name}: {path} on {model.device}, {model.dtype}")
        if not tokenizer.has_template:
            print(f"{name}: no chat template, it continues your words as a text")
            if config.system or config.enable_thinking is not None:
                raise UserError(f"{name}: --system and --enable_thinking need a chat template")
    return speakers


def read_prompts(source, config):
    """A file's prompts: the lines of a .txt, or conversations and texts of rows."""
    if source.endswith(".txt"):
        lines = read_text(Path(source)).splitlines()
        return [as_turn("user", line) for line in lines if line.strip()]
    prompts = []
    for where, row in read_own(source, config):
        with as_user_error(where, UserError):
            row, _ = with_completion(name_choice(where, row), True)
            prompt, (answer, *_) = split_row(row, True)
        if isinstance(answer, list) and answer[-1]["role"] == "assistant":
            answer = answer[:-1]
        prompts.append(prompt or answer)
    return prompts


def encode_prompt(tokenizer, prompt, config):
    """A conversation by the chat template, a text as it is -> ids. Without a template the turns of
    a conversation are one text."""
    if isinstance(prompt, list) and tokenizer.has_template:
        kwargs = {}
        if config.enable_thinking is not None:
            kwargs["enable_thinking"] = config.enable_thinking
        if config.system and prompt[0]["role"] != "system":
            prompt = as_turn("system", config.system) + prompt
        return tokenizer.encode(tokenizer.render(prompt, True, **kwargs))
    if isinstance(prompt, list):
        prompt = "".join(m["content"] for m in prompt)
    return tokenizer.head + tokenizer.encode(prompt)


def answer(name, speaker, prompt, config):
    """Prints a model's answer to a conversation or text, token by token, and returns it."""
    model, tokenizer, layers = speaker
    attach(model, layers)
    ids, printed = encode_prompt(tokenizer, prompt, config), ""
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(
            f"{name}: no room for an answer after {len(ids):,} tokens; shorten the prompt"
        )

    def show(new):
        nonlocal printed
        # the token before decides about a space; at the end may be half a character
        before = tokenizer.decode(ids[-1:])
        text = tokenizer.decode(ids[-1:] + new).removeprefix(before).rstrip("\ufffd")
        print(sanitize(text[len(printed) :]), end="", flush=True)
        printed = text

    print(f"[{name}] ", end="", flush=True)
    sampling = config.temperature, config.top_k, config.top_p, tokenizer.end_ids, config.seed
    (new,) = generate(model, [ids], min(config.max_new_tokens, room), *sampling, show)
    show(new)
    print()
    return printed


def converse(speakers, config):
    """A conversation on the terminal; each model has its own history."""
    print("/clear forgets the conversation, /exit leaves")
    histories = dict.fromkeys(speakers, [])
    with suppress(EOFError, KeyboardInterrupt):
        while (line := input("> " if sys.stdin.isatty() else "")).strip() != "/exit":
            if line.strip() == "/clear":
                histories = dict.fromkeys(speakers, [])
                continue
            for name, speaker in speakers.items():
                turns = histories[name] + as_turn("user", line)
                text = answer(name, speaker, turns, config)
                histories[name] = turns + as_turn("assistant", text)
    print()


def chat(config):
    """Answers prompts, or talks on the terminal, with one model or several side by side."""
    speakers = load_speakers(config)
    prompts = [as_turn("user", text) for text in config.prompt]
    for source in config.data:
        prompts += read_prompts(source, config)
    for prompt in prompts:
        print(f"\n> {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
        for name, speaker in speakers.items():
            answer(name, speaker, prompt, config)
    if not prompts:
        converse(speakers, config)


# --- the command ----------------------------------------------------------------------------------

COMMANDS = {"pairs": (DataConfig, pairs), "chat": (ChatConfig, chat)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return run_subcommand(COMMANDS, __doc__, argv)
    config = parse_config(EvalConfig, argv, __doc__)
    models, folder = by_name(config.model, "model"), Path(config.output_dir)
    with join_ranks(config.device, locked_folder(folder)):
        ask = read_questions(config, bool(models))
        models = models or embedded_models()
        samples, failed = evaluate(models, ask, config)
        if samples and is_first():
            results = {}
            for name, sets in samples.items():
                results[name] = {task: summarise(rows) for task, rows in sets.items()}
            comparisons = compare_all(samples)
            content = {"models": results, "pairs": comparisons, "failed": failed}
            write_text(folder / "results.json", json.dumps(content, indent=2))
            text = report.comparison_report(results, comparisons, samples)
            write_text(folder / "report.md", text)
            metrics = next(iter(results.values()))
            mains = {task: main_metric(summary) for task, summary in metrics.items()}
            report.plot_comparison(results, mains, comparisons, folder / "results.png")
            print(
                report.results_table(results),
                *report.headlines(results, comparisons),
                sep="\n",
            )
        if failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise UserError(f"{len(failed)} of {len(models)} models failed: {reasons}")
        print(f"saved in {folder}: results.json, report.md, results.png and the samples")


if __name__ == "__main__":
    run_command(main)

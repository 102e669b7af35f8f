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

import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from functools import cache, partial
from itertools import combinations, groupby, pairwise, product
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from data import (
    LETTERS,
    ROW_FAULTS,
    DataConfig,
    RecipeConfig,
    Tokenizer,
    bare,
    find_answer,
    load_tokenizer,
    question_of,
    render_row,
    split_prompt,
    texts_of,
    use_recipe,
)
from lora import find_adapter, load_adapter, lora_layers, read_adapter_config
from model import (
    ATTENTION,
    DTYPES,
    Batch,
    generate,
    generate_each,
    load_model,
    unscored,
)
from qlora import QuantConfig, load_4bit
from support import report
from support.chat import Printer, converse, encode_prompt
from support.devices import pick_device
from support.distributed import every, gather_each, is_first, join_ranks, size
from support.errors import UserError, as_user_error, brief, run_command
from support.files import (
    hash_weights,
    locked_folder,
    new_file,
    read_header,
    read_json,
    write_rows,
)
from support.hub import adapter_in, resolve
from support.memory import keep_freed_memory
from support.messages import as_turn
from support.readers import read_rows, read_text
from support.samples import complete_samples, sample_key
from support.schemas import (
    CONTEXT,
    FOR_CHATS,
    check_lost,
    common_length,
    rest_of,
    split_row,
    template_kwargs,
    text_of,
    with_completion,
)
from support.settings import (
    by_name,
    check_choices,
    check_range,
    parse_config,
    pick_fields,
    run_subcommand,
)

EXAMPLES = Path(__file__).resolve().parent / "examples"

# --- scoring sequences that share a prefix --------------------------------------------------------

SHARED = 4  # tokens: computing a shorter shared prefix again costs less than a segment of its own


def pack_shared(sequences, device="cpu"):
    """Sequences (ids, start >= 1) -> the Batch that scores ids[start:] of each, in this order.

    Its segments are the prefix tree of the sequences: a shared prefix of SHARED tokens is computed
    once. A sequence's last token predicts nothing and is left out.
    """
    inputs = [ids[:-1] for ids, _ in sequences]
    segments = []
    ends = [-1] * len(inputs)  # the last segment of each input

    def add(group, depth, parent):
        """Adds the tokens from `depth` on of a sorted group of inputs that share what is before."""

        def next_tokens(n):
            return inputs[n][depth : depth + SHARED]

        for _, branch in groupby(group, key=next_tokens):
            branch = list(branch)
            first, last = inputs[branch[0]], inputs[branch[-1]]
            stop = common_length(first, last)  # sorted: what these two share, all share
            segment = parent
            if stop > depth:
                segment = len(segments)
                segments.append(unscored(first[depth:stop], parent))
            for n in branch:
                ends[n] = segment
            longer = [n for n in branch if len(inputs[n]) > stop]
            add(longer, stop, segment)

    order = sorted(range(len(inputs)), key=inputs.__getitem__)
    add(order, 0, -1)
    batch = Batch.pack([segments], device)
    scored, targets, owners = [], [], []
    for n, (ids, start) in enumerate(sequences):
        positions = batch.positions_seen(ends[n])
        scored.append(positions[start - 1 : len(ids) - 1])
        targets.append(torch.tensor(ids[start:], dtype=torch.int64))
        owners.append(torch.full((len(ids) - start,), n))
    columns = scored, targets, owners
    scored, targets, owners = (torch.cat(column).to(device) for column in columns)
    return replace(
        batch, scored=scored, targets=targets, sequence=owners, num_sequences=len(sequences)
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

    def first_ids(n):
        return items[n][0][0]

    for n in sorted(range(len(items)), key=first_ids):
        chain = [previous, *(ids for ids, _ in items[n])]
        new_tokens = 0
        for before, ids in pairwise(chain):
            new_tokens += len(ids) - common_length(before, ids)
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
        sequences = [sequence for n in numbers for sequence in items[n]]
        sums = iter(sum_logps(model, sequences))
        for n in numbers:
            yield n, [next(sums) for _ in items[n]]


def likeliest(model, context, choices):
    """Index of the choice (ids) with the highest summed log-probability after context (ids)."""
    sequences = [(context + choice, len(context)) for choice in choices]
    sums = sum_logps(model, sequences)
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
        sequence = head + ids[whole]
        cut = max(0, len(sequence) - max_length - 1)
        start = len(head) + len(ids[context]) - cut
        sequences.append((sequence[cut:], max(1, start)))
    return sequences


# --- benchmarks -----------------------------------------------------------------------------------


class Item(NamedTuple):
    """A benchmark row: a prompt and an answer per choice. What all choices share is listed once."""

    prompts: list
    answers: list
    gold: int = 0  # index of the right choice

    def choices(self):
        """[(prompt, answer), ...]."""
        return [*product(self.prompts, self.answers)]


def arc(row):
    """Own rows too, in the forms that `question_of` reads."""
    _, choices, right, _ = question_of(row)
    question = text_of(row, "question")
    check_lost(row, FOR_CHATS | CONTEXT, ["question", "choices"], question)
    return Item([f"Question: {question}\nAnswer:"], choices, right)


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
    endings = [*map(clean, row["endings"])]
    return Item([prompt], endings, int(row["label"]))


def winogrande(row):
    before, blank, after = text_of(row, "sentence").partition("_")
    if not blank:
        raise UserError("'sentence' has no _ in it")
    prompts = [before + row["option1"], before + row["option2"]]
    right = ["1", "2"].index(row["answer"])
    return Item(prompts, [after.strip()], right)


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


def parse_item(where, row, parse, name):
    """The Item of a row; UserError with its file and line if it is none."""
    try:
        item = parse(row)
        if not all(isinstance(text, str) for text in item.prompts + item.answers):
            raise UserError("choices must be texts")
        if not 0 <= item.gold < len(item.choices()):
            raise UserError("its answer is none of its choices")
        return item
    except (UserError, *ROW_FAULTS) as error:
        reason = str(error)
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
                others = [example for example in pool if example[1] != row]
                examples = rng.sample(others, shots)
        few_shot = [parse_item(*example, task.parse, name) for example in examples]
        items.append((parse_item(where, row, task.parse, name), few_shot))
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
    prompts = []
    for text in item.prompts:
        prompts.append(tokenizer.render(turns + as_turn("user", text), True))
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
    per_character = np.array(sums) / lengths
    best = {"acc": int(np.argmax(sums))}
    best["acc_norm"] = int(np.argmax(per_character))
    return {
        "logps": sums,
        "pred": best["acc"],
        "metrics": {name: float(best[name] == item.gold) for name in metrics},
    }


def grade_gsm8k(item, task, tokenizer, ids):
    """strict: the number after '####'; flexible: the last number. Source: lm_eval's gsm8k.yaml."""

    def normalize(answer):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            answer = re.sub(pattern, "", answer)
        return answer.lower()

    text = tokenizer.decode(ids)
    stops = "|".join(map(re.escape, task.stops))
    text = re.split(stops, text)[0]
    after_mark = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    strict = after_mark[0] if after_mark else "[invalid]"
    flexible = "".join(numbers[-1]) if numbers else "[invalid]"
    gold = normalize(item.answers[0])
    metrics = {}
    for name, number in zip(task.metrics, (strict, flexible)):
        metrics[name] = float(normalize(number.strip()) == gold)
    return {"output": text, "strict": strict, "flexible": flexible, "metrics": metrics}


def ask_items(items, task, model, tokenizer, config):
    """[(Item, its few-shot Items), ...] -> Questions."""
    max_length = model.config.max_position_embeddings
    as_chat = config.apply_chat_template
    contexts = [add_context(item, few_shot, tokenizer, as_chat) for item, few_shot in items]
    questions = []
    if task.stops:
        room = max(max_length - config.max_new_tokens, 1)
        prompts = [prompt for ((prompt, _),) in contexts]
        ids = encode_texts(tokenizer, prompts)
        for (item, _), prompt in zip(items, prompts):
            grade = partial(grade_gsm8k, item, task, tokenizer)
            prompt = ids[prompt][-room:]
            questions.append(Question(item._asdict(), [], prompt, grade, task.stops))
        return questions
    choices = [choice for choices in contexts for choice in choices]
    sequences = iter(encode_pairs(tokenizer, choices, max_length))
    for (item, _), choices in zip(items, contexts):
        grade = partial(grade_choices, item, task.metrics)
        own = [next(sequences) for _ in choices]
        questions.append(Question(item._asdict(), own, [], grade))
    return questions


def grade_answer(model, tokenizer, prompt, reference, options, ids):
    """A generated answer (ids): `gold` is the reference's `Answer: X`, `answer` the text's own, or
    where it has none, `forced`, the likeliest option."""
    text = tokenizer.decode(ids).strip()
    gold = find_answer(reference)
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
    asked = []
    for example in examples:
        prompt, reference = split_prompt(example)
        asked.append((prompt, tokenizer.decode(reference).strip()))
    golds = {find_answer(reference) for _, reference in asked} - {None}
    questions = []
    for (prompt, reference), own in zip(asked, choices):
        options = [bare(text) for text in texts_of(own)]
        if find_answer(reference) not in options:
            options = sorted(golds)
        grade = partial(grade_answer, model, tokenizer, prompt, reference, options)
        shown = {"prompt": tokenizer.decode(prompt).strip(), "reference": reference}
        questions.append(Question(shown, [], prompt, grade))
    return questions


def answer_questions(model, tokenizer, examples, choices, max_new_tokens=128, batch_size=64):
    """Greedy answers to SFT examples, graded by `grade_answer`; arguments as in `ask_answers`."""
    questions = ask_answers(model, tokenizer, examples, choices)
    with keep_freed_memory():
        answers = dict(answer_each(model, questions, tokenizer, max_new_tokens, batch_size))
    return [answers[n] for n in range(len(questions))]


def ask_choice(tokenizer, example, choices):
    """An SFT example as a forced choice between `choices`, their letters, or Yes and No; None if
    its answer is none of these. A reference's reasoning is left out: its answer alone is scored,
    right after the prompt."""
    context, ids = split_prompt(example)
    prompt = tokenizer.decode(context)
    reference = tokenizer.decode(ids)
    marked = find_answer(reference)
    choices = texts_of(choices)
    lines = choices or re.findall(r"(?m)^\(?([A-Z])[.):]", prompt)
    lead = re.match(r"\s*(<think>\s*</think>\s*)?", reference)[0]  # Qwen3's template writes this
    answer = marked or reference.removeprefix(lead).strip()

    def find_gold(offer):
        """The choice that the answer is, with a full stop or without."""
        named = {bare(text): text for text in offer}
        return answer if answer in offer else named.get(bare(answer))

    offers = choices, LETTERS[: len(lines)], ["Yes", "No"], ["yes", "no"]
    options = next(filter(find_gold, offers), None)
    if not options:
        return None
    gold = find_gold(options)
    if marked:
        context, lead = context + tokenizer.encode("Answer:"), " "
    sequences = []
    for text in options:
        sequences.append((context + tokenizer.encode(lead + text), len(context)))

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
    samples = [sample for _, sample in answer_each(model, questions)]
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
    cuts = [*range(1, len(ids), max_length), len(ids)]
    for start, stop in pairwise(cuts):
        window = ids[max(0, stop - max_length - 1) : stop]
        sequences.append((window, len(window) - (stop - start)))

    def grade(sums):
        bits = -sum(sums) / math.log(2)
        metrics = {"bits_per_byte": bits / counts["bytes"]}
        return {"logp": sum(sums), "metrics": metrics}

    shown = {"text": text[:200], **counts}
    return Question(shown, sequences, [], grade)


THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


def grade_text(tokenizer, reference, ids):
    """A generated text against its reference, if any, both without their thoughts: exact match, and
    ROUGE F-measures."""
    text = tokenizer.decode(ids).strip()
    if reference is None:
        return {"output": text, "metrics": {}}
    from rouge_score.rouge_scorer import RougeScorer  # imports a language toolkit, slowly

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    answer, reference = THOUGHT.sub("", text), THOUGHT.sub("", reference)
    metrics = {"exact_match": float(answer == reference)}
    for name, rouge in scorer.score(reference, answer).items():
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
        items = []
        for where, row in rows:
            items.append((parse_item(where, row, arc, "choices"), []))
        return ask_items(items, Task(arc), model, tokenizer, config)
    if all(isinstance(row.get("text"), str) for _, row in rows):
        for where, row in rows:
            if not row["text"]:
                raise UserError(f"{where}: an empty text has nothing to score")
        max_length = model.config.max_position_embeddings
        return [ask_text(row["text"], tokenizer, max_length) for _, row in rows]
    return ask_prompts(rows, model, tokenizer)


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
        grade = partial(grade_text, tokenizer, reference)
        shown = question.shown | {"reference": reference}
        choice = has_reference[n] and ask_choice(tokenizer, examples[n], choices[n])
        questions[n] = choice or question._replace(shown=shown, grade=grade)
    return questions


# --- answering all questions, and summing up ------------------------------------------------------


def stop_at(tokenizer, stops):
    """A function of new ids: whether their text has one of `stops` in it. None without any, so that
    nothing is decoded per token."""
    if not stops:
        return None
    # how far lm_eval looks back for a text that stops
    window = max(len(tokenizer.encode(stop)) + 2 for stop in stops)

    def stop(ids):
        text = tokenizer.decode(ids[-window:], False)
        return any(stop in text for stop in stops)

    return stop


def answer_each(model, questions, tokenizer=None, max_new_tokens=128, batch_size=64):
    """Yields (number of a question, its sample) on every rank, as they are answered.

    Each rank answers its share. Other questions in a batch than in one process change the rounding,
    and nothing else.
    """
    to_write = [n for n, question in enumerate(questions) if question.prompt]
    to_score = [n for n, question in enumerate(questions) if not question.prompt]

    def sample(n, answer):
        question = questions[n]
        return n, question.shown | question.grade(answer)

    def samples():  # this rank's
        sequences = [questions[n].sequences for n in to_score]
        for index, sums in score(model, sequences):
            yield sample(to_score[index], sums)
        if not to_write:
            return
        own = [*every(to_write, model)]
        stops = questions[to_write[0]].stops
        ends = tokenizer.eos_ids if stops else tokenizer.end_ids
        for index, ids in generate_each(
            model,
            [questions[n].prompt for n in own],
            max_new_tokens,
            eos_ids=ends,
            batch_size=batch_size,
            stop=stop_at(tokenizer, stops),
        ):
            yield sample(own[index], ids)

    return gather_each(samples(), model)


def answer_all(model, tokenizer, questions, file, identity, config):
    """Answers questions into a samples file, resuming from its lines; returns them in order.
    `identity` stands for the model's files."""
    keys = []
    for question in questions:
        length = question.prompt and config.max_new_tokens
        keys.append(sample_key((identity, question[:3], length)))

    def answer(missing):
        asked = [questions[n] for n in missing]
        return answer_each(model, asked, tokenizer, config.max_new_tokens, config.batch_size)

    with keep_freed_memory():
        return complete_samples(file, keys, answer)


def values_by_metric(samples):
    """{metric: (values, weights)} over the samples that have it; a text's weight is its bytes."""
    values = {}
    for sample in samples:
        for name, value in sample["metrics"].items():
            weighted = value, sample.get("bytes", 1)
            values.setdefault(name, []).append(weighted)
    return {name: np.array(pairs).T for name, pairs in values.items()}


def summarise(samples):
    """Samples -> {"n", metric: mean, metric_stderr: its standard error (lm_eval's mean_stderr),
    metric_n: of how many samples}, and what only a whole set has: F1 scores, perplexities."""
    summary = {"n": len(samples)}
    for name, (values, weights) in values_by_metric(samples).items():
        mean, n = np.average(values, weights=weights), len(values)
        squares = (weights * (values - mean)) ** 2
        spread = squares.sum() * n / max(n - 1, 1)
        summary[name] = float(mean)
        summary[f"{name}_stderr"] = float(spread**0.5 / weights.sum())
        summary[f"{name}_n"] = n
    answers = []
    for sample in samples:
        if sample.get("gold") and "answer" in sample:
            answers.append((sample["gold"], sample["answer"]))
    scores = f1_scores(answers)
    summary |= scores | {f"{name}_n": len(answers) for name in scores}
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
    labels, scores = yes or golds, {}
    for label in labels:
        right = graded.count((label, label))
        actual = sum(gold == label for gold, _ in graded)
        predicted = sum(answer == label for _, answer in graded)
        f1 = 2 * right / (predicted + actual)
        scores["f1"] = scores.get("f1", 0) + f1 / len(labels)
        if yes:
            scores |= {"precision": right / max(predicted, 1), "recall": right / actual}
    return scores


# --- which differences are more than noise --------------------------------------------------------


FEWEST_DIFFERING = 6  # five that all differ in one way still have p = 2 / 2^5 = 0.06


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
    gained = int((y > x).sum())
    lost = int((y < x).sum())
    differing = gained + lost
    differences = weights * (y - x)
    delta = float(differences.sum() / weights.sum())
    result = {"n": len(x), "delta": delta, "low": None, "high": None, "verdict": "too few"}
    if {*x, *y} <= {0.0, 1.0}:
        tail = sum(math.comb(differing, k) for k in range(min(gained, lost) + 1))
        p = min(1.0, 2 * tail / 2**differing)
        result |= {"gained": gained, "lost": lost, "mcnemar_p": p}
    if len(x) < report.FEWEST or differing < FEWEST_DIFFERING:
        return result
    pairs = np.stack([differences, weights])
    pairs, counts = np.unique(pairs, axis=1, return_counts=True)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(x), counts / len(x), resamples)
    differences, totals = pairs @ drawn.T
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
        values[model] = {task: values_by_metric(sets[task]) for task in sets}
    comparisons = []
    for a, b in combinations(values, 2):
        for task, metrics in values[a].items():
            for name in metrics:
                about = {"a": a, "b": b, "task": task, "metric": name}
                about["main"] = name == report.main_metric(metrics)
                result = compare(name, metrics[name], values[b][task][name])
                comparisons.append(about | result)
    return comparisons


# --- preference pairs from answers ----------------------------------------------------------------


def pairs(config):
    """Preference pairs of questions with a known answer, in any form that eval.py --data reads.

    Chosen is the row's own answer; rejected is the same with a wrong choice in its place or, with
    --generate, a wrong answer of the model.
    """
    new_file(config.output)
    tokenizer, rng = load_tokenizer(config), np.random.default_rng(config.seed)
    rows = [row for source in config.data for row in read_own(source, config)]
    drawn = rng.permutation(len(rows))[: config.max_samples]
    rows = [with_answer(*rows[n], tokenizer, config) for n in sorted(drawn)]
    if config.generate:
        model = load_model(config.model, device=pick_device("auto"))
        options = {"temperature": config.temperature, "seed": config.seed, "batch_size": 32}
        prompts, ends = [ids for *_, ids in rows], tokenizer.end_ids
        generated = generate(model, prompts, config.max_new_tokens, eos_ids=ends, **options)
    pairs, counts = {}, Counter()
    unknown = "no answer in the text" if config.generate else "no wrong answer known"
    for n, (row, gold, _) in enumerate(rows):
        chosen = row["completion"]
        is_chat = isinstance(chosen, dict)
        answer = chosen["content"] if is_chat else chosen
        parse_answer = find_answer if find_answer(answer) else str.strip
        gold = gold or parse_answer(answer)
        if config.generate:
            wrong = tokenizer.decode(generated[n])
        else:
            wrong = swap_answer(row, answer, gold, rng)
        wrong_answer = parse_answer(wrong)
        if not wrong_answer or bare(wrong_answer) == bare(gold):
            counts["answered right" if wrong_answer else unknown] += 1
            continue
        pair = rest_of(row) | {"prompt": row["prompt"], "chosen": chosen, "rejected": wrong}
        if is_chat:
            message = {"role": "assistant"} if config.generate else chosen
            pair |= {"chosen": [chosen], "rejected": [message | {"content": wrong}]}
        key = json.dumps(pair)
        if key in pairs:
            counts["the same as another"] += 1
        pairs[key] = pair
    skipped = "".join(f"; {reason}: {n:,}" for reason, n in counts.items())
    if not pairs:
        raise UserError(f"{', '.join(config.data)}: no pairs{skipped}")
    write_rows(config.output, pairs.values(), f"{len(pairs):,} pairs{skipped}")


def name_choice(where, row):
    """A question with choices as a row whose answer is the right one's text; others as they are."""
    if not {"question", "choices"} <= row.keys():
        return row
    item = parse_item(where, row, arc, "choices")
    answer = item.answers[item.gold]
    question = {"question": row["question"], "answer": answer, "choices": item.answers}
    return rest_of(row) | question


def with_answer(where, row, tokenizer, config):
    """A row of an own set -> (the row with its answer, a text or message, as the completion; the
    right choice if it names one; the prompt's ids). UserError: it has no answer."""
    row = name_choice(where, row)
    gold = row.get("answer")
    with as_user_error(where, UserError):
        if not isinstance(gold, (str, type(None))):
            raise UserError(f"'answer' must be the text of the right choice, found {brief(gold)}")
        row, has_answer = with_completion(row, tokenizer.has_template)
        prompt, (answer, *_) = split_row(row, tokenizer.has_template)
        content = answer
        if isinstance(answer, list):
            prompt, answer = prompt + answer[:-1], answer[-1]
            content = answer["content"]
        if not has_answer or not content or "text" in row:
            raise UserError("it has no answer that could be chosen")
        example = render_row(row, tokenizer, config.max_length)
        if isinstance(example, str):
            raise UserError(example)
    row = rest_of(row) | {"prompt": prompt, "completion": answer}
    return row, gold, split_prompt(example)[0]


def swap_answer(row, answer, gold, rng):
    """The answer with a wrong choice in place of the gold one, and its full stop if it has one; ""
    where none is known."""
    others = [text for text in texts_of(row.get("choices")) if bare(text) != bare(gold)]
    kept = answer.rstrip().rstrip(".")
    if not others or not kept.endswith(bare(gold)):
        return ""
    stop = answer.removeprefix(kept)
    return kept.removesuffix(bare(gold)) + bare(rng.choice(others)) + stop


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
    folder = Path(os.path.expanduser(path))  # which leaves the ~ of an unknown user
    if not folder.is_dir():
        folder = resolve(path)
    adapter, merged = adapter_in(folder), folder / "merged"
    if not adapter:
        return str(merged if merged.is_dir() else folder), None, QuantConfig()
    base = read_adapter_config(adapter)[1].get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{adapter}: its config names no base model; merge it and evaluate the result"
        )
    file = adapter.parent / "config.json"
    run = read_json(file) if file.exists() else {}
    return base, adapter, pick_fields(QuantConfig, run, file)


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
    tokenizer = Tokenizer(model.folder, adapter=adapter)
    return model.eval(), tokenizer, (folders, quant)


def embedded_models():
    """The embedded model and what `python sft.py` and `python dpo.py` have made of it so far."""
    base = str(EXAMPLES / "tiny-qwen3")
    models = {"base": base, "sft": "output/sft", "dpo": "output/dpo"}
    for name, path in list(models.items()):
        if not Path(path).exists():
            print(f"{name}: there is no {path} yet, skipped")
            del models[name]
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
        items = read_task(name, config)
        ask[name] = partial(ask_items, items, TASKS[name], config=config)
    for name, source in own.items():
        rows = read_own(source, config)[: config.limit]
        ask[name] = partial(ask_own, rows, config=config)
    return ask


def evaluate(models, ask, config):
    """Every model on every set -> ({model: {set: samples}}, {model: why it failed})."""
    samples, failed, loaded, hashed = {}, {}, {}, cache(hash_weights)
    folder = Path(config.output_dir)
    for name, path in models.items():
        try:
            model, tokenizer, (folders, quant) = load_evaluated(path, loaded, config)
            identity = [*map(hashed, folders)], str(model.dtype), astuple(quant)
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
            loaded.clear()
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
    models = by_name(config.model, "model") or embedded_models()
    for name, path in models.items():
        model, tokenizer, _ = load_evaluated(path, cache, config, keep=True)
        speakers[name] = model, tokenizer, lora_layers(model)
        print(f"{name}: {path} on {model.device}, {model.dtype}")
        if not tokenizer.has_template:
            print(f"{name}: no chat template, it continues your words as a text")
            if config.system or config.enable_thinking is not None:
                raise UserError(f"{name}: --system and --enable_thinking need a chat template")
    return speakers


def read_prompts(source, config):
    """A file's prompts, the lines of a .txt, or conversations and texts of rows, each with the
    template's variables of its row."""
    if source.endswith(".txt"):
        lines = read_text(Path(source)).splitlines()
        return [(as_turn("user", line), {}) for line in lines if line.strip()]
    prompts = []
    for where, row in read_own(source, config):
        with as_user_error(where, UserError):
            row, _ = with_completion(name_choice(where, row), True)
            prompt, (answer, *_) = split_row(row, True)
            variables = template_kwargs(row)
        if isinstance(answer, list):
            answer = answer[:-1]
        prompts.append((prompt or answer, variables))
    return prompts


def answer(name, speaker, prompt, variables, config):
    """Prints a model's answer to a conversation or text, token by token, and returns it."""
    model, tokenizer, layers = speaker
    attach(model, layers)
    ids = encode_prompt(tokenizer, prompt, variables, config)
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(
            f"{name}: no room for an answer after {len(ids):,} tokens; shorten the prompt"
        )
    print(f"[{name}] ", end="", flush=True)
    show = Printer(tokenizer.decode, ids[-1:])
    (new,) = generate(
        model,
        [ids],
        min(config.max_new_tokens, room),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_ids=tokenizer.end_ids,
        seed=config.seed,
        stop=show,  # called after each token; stops nothing
    )
    show(new)
    print()
    return show.text


def chat(config):
    """Answers prompts, or talks on the terminal, with one model or several side by side."""
    speakers = load_speakers(config)
    prompts = [(as_turn("user", text), {}) for text in config.prompt]
    for source in config.data:
        prompts += read_prompts(source, config)

    def ask(name, prompt, variables=()):
        return answer(name, speakers[name], prompt, dict(variables), config)

    for prompt, variables in prompts:
        print(f"\n> {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
        for name in speakers:
            ask(name, prompt, variables)
    if not prompts:
        converse(speakers, ask)


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
            report.write_comparison(folder, results, compare_all(samples), samples, failed)
        if failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise UserError(f"{len(failed)} of {len(models)} models failed: {reasons}")
        print(f"saved in {folder}: results.json, report.md, results.png and the samples")


if __name__ == "__main__":
    run_command(main)

"""Evaluation: answers read out of generated reasoning.

The decision that is not obvious: a model that never writes `Answer: X` is still asked. Its text is followed by
"Answer:" and the likeliest of the question's choices counts, so a base model that knows nothing of the format lands at
chance instead of at zero, and the gain of training is not the gain of learning a format.
"""

import re

import numpy as np
import torch

from model import IGNORE, Batch, Segment, generate


def find_answer(text):
    """What stands behind the last 'Answer:', or None: a letter ('B', '(B)', 'B. dog'), else the rest of the line."""
    found = re.findall(r"[Aa]nswer:[ \t]*(\S.*)", text)
    if not found:
        return None
    letter = re.match(r"\(?([A-Z])(?![\w'])", found[-1])
    return letter[1] if letter else found[-1].strip().rstrip(".")


def split_prompt(example):
    """(prompt ids, reference ids): the reference is the last run of scored tokens of an SFT example, or of a preference
    pair's prompt with its chosen answer."""
    ids, labels = (np.concatenate(parts) for parts in zip(*((s.ids, s.labels) for s in example[:2])))
    masked = labels == IGNORE
    stop = int(np.flatnonzero(~masked)[-1]) + 1
    start = int((np.flatnonzero(masked[:stop])[-1:] + 1).sum())
    return ids[:start].tolist(), ids[start:stop].tolist()


@torch.inference_mode()
def likeliest(model, context, choices):
    """Index of the choice (ids) with the highest summed log-probability after context (ids), which is computed once."""
    ends = [Segment(np.asarray(ids), np.asarray(ids), 0, n) for n, ids in enumerate(choices)]
    batch = Batch.pack([[Segment(np.asarray(context), np.full(len(context), IGNORE)), *ends]], model.device)
    logps = model.logps(batch)
    return int(logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence, logps).argmax())


def answer_questions(model, tokenizer, examples, choices, max_new_tokens=128, batch_size=64):
    """Greedy answers to SFT examples: [{'prompt', 'reference', 'output', 'gold', 'answer', 'forced', 'choices'}].

    choices: for each example the answers it may have, or None (then: all that are right for some example). gold is the
    answer of the reference, None where it has none; answer is the output's or, `forced`, the likeliest of the choices.
    """
    split, found = [split_prompt(example) for example in examples], []
    for at in range(0, len(split), batch_size):
        part = split[at : at + batch_size]
        outputs = generate(model, [prompt for prompt, _ in part], max_new_tokens, eos_ids=tokenizer.end_ids)
        for (prompt, reference), output in zip(part, outputs):
            text, wanted = tokenizer.decode(output).strip(), tokenizer.decode(reference).strip()
            found.append({"prompt": tokenizer.decode(prompt).strip(), "reference": wanted, "output": text,
                          "gold": find_answer(wanted), "answer": find_answer(text), "ids": prompt + output})
    golds, asked = sorted({row["gold"] for row in found} - {None}), tokenizer.encode("\nAnswer:")
    for row, options in zip(found, choices):
        row["choices"] = options if row["gold"] in (options or ()) else golds  # letters stand for choices otherwise
        row["forced"] = bool(row["gold"] and not row["answer"])
        context = row.pop("ids") + asked
        if row["forced"]:
            pick = likeliest(model, context, [tokenizer.encode(f" {choice}") for choice in row["choices"]])
            row["answer"] = row["choices"][pick]
    return found


def accuracy(answers):
    """(share right, number) over the answers that have a gold; (None, 0) where none has."""
    right = [row["answer"] == row["gold"] for row in answers if row["gold"]]
    return (sum(right) / len(right), len(right)) if right else (None, 0)

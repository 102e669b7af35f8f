"""Evaluation: answers parsed out of generated reasoning.

The decision that is not obvious: a model that never writes `Answer: X` is still asked. Its text is followed by
"Answer:" and the likeliest letter counts, so a base model that knows nothing of the format lands at chance instead of
at zero, and the gain of training is not the gain of learning a format.
"""

import re

import numpy as np
import torch

from model import IGNORE, Batch, Segment, generate

ANSWER = re.compile(r"[Aa]nswer:\s*\(?([A-Z])\b")


def find_answer(text):
    """The letter after the last 'Answer:' in text, or None."""
    return (ANSWER.findall(text) or [None])[-1]


def split_prompt(example):
    """(prompt ids, reference ids): the reference is the last run of scored tokens of an SFT example."""
    segment = example[-1]
    masked = np.asarray(segment.labels) == IGNORE
    stop = int(np.flatnonzero(~masked)[-1]) + 1
    start = int((np.flatnonzero(masked[:stop])[-1:] + 1).sum())
    return segment.ids[:start].tolist(), segment.ids[start:stop].tolist()


@torch.inference_mode()
def likeliest(model, contexts, choices):
    """For each context (ids), the index of the choice (ids) with the highest summed log-probability; contexts are
    computed once."""
    ends = [Segment(np.asarray(ids), np.asarray(ids), 0, n) for n, ids in enumerate(choices)]
    examples = [[Segment(np.asarray(ids), np.full(len(ids), IGNORE)), *ends] for ids in contexts]
    batch = Batch.pack(examples, model.device)
    logps = model.logps(batch)
    sums = logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence, logps)
    return sums.view(-1, len(choices)).argmax(-1).tolist()


def answer_questions(model, tokenizer, examples, max_new_tokens=128, batch_size=64):
    """Greedy answers to SFT examples: [{'prompt', 'reference', 'output', 'gold', 'answer', 'forced'}], texts and
    letters.

    gold is the letter of the reference, None where it has none; answer is the output's letter, or, `forced`, the
    likeliest of the letters that occur as gold. Accuracy is the share of rows with a gold whose answer equals it.
    """
    split = [split_prompt(example) for example in examples]
    found = []
    for at in range(0, len(split), batch_size):
        part = split[at : at + batch_size]
        outputs = generate(model, [prompt for prompt, _ in part], max_new_tokens, eos_ids=tokenizer.end_ids)
        for (prompt, reference), output in zip(part, outputs):
            text, wanted = tokenizer.decode(output), tokenizer.decode(reference)
            found.append({"prompt": tokenizer.decode(prompt).strip(), "reference": wanted.strip(),
                          "output": text.strip(), "gold": find_answer(wanted), "answer": find_answer(text),
                          "ids": prompt + output})
    letters = sorted({row["gold"] for row in found} - {None})
    mute = [row for row in found if row["gold"] and not row["answer"]]
    asked, choices = tokenizer.encode("\nAnswer:"), [tokenizer.encode(" " + letter) for letter in letters]
    for at in range(0, len(mute), 16):
        part = mute[at : at + 16]
        for row, pick in zip(part, likeliest(model, [row["ids"] + asked for row in part], choices)):
            row.update(answer=letters[pick], forced=True)
    return [{"forced": False, **{key: value for key, value in row.items() if key != "ids"}} for row in found]


def accuracy(answers):
    """(share right, number) over the answers that have a gold; (None, 0) where none has."""
    right = [row["answer"] == row["gold"] for row in answers if row["gold"]]
    return (sum(right) / len(right), len(right)) if right else (None, 0)

"""Answers: read out of text, forced where there is none, and right for the reasons given."""

import numpy as np
import pytest
import torch

import eval as evaluation
from conftest import write_checkpoint
from model import IGNORE, Batch, Segment, load_model
from test_sft import write_tokenizer


@pytest.mark.parametrize("text, letter", [
    ("so it is C.\nAnswer: C", "C"), ("answer: (a)\nAnswer: (D)", "D"), ("Answer:B", "B"), ("Answer: Bread", "Bread"),
    ("Answer: B) a dog", "B"), ("Answer: swan.\n", "swan"), ("Answer: I'm not sure", "I'm not sure"), ("It is B", None),
    ("", None), ("Answer: \nB", None), ("Answer: A\nAnswer: B", "B"),
])
def test_find_answer(text, letter):
    """What follows the last 'Answer:' on its line: a letter by itself, else the words, and no letter of a longer word."""
    assert evaluation.find_answer(text) == letter


def test_the_prompt_ends_where_the_last_answer_begins():
    """Of two answers the last is the reference; what follows it (a newline of the template) belongs to neither."""
    ids = np.arange(10, 22)
    labels = np.where(np.isin(np.arange(12), [3, 4, 8, 9, 10]), ids, IGNORE)
    prompt, reference = evaluation.split_prompt([Segment(ids, labels)])
    assert prompt == list(range(10, 18)) and reference == [18, 19, 20]
    whole = [Segment(ids, np.where(np.arange(12) > 0, ids, IGNORE))]
    assert evaluation.split_prompt(whole) == ([10], list(range(11, 22)))


def test_likeliest_is_the_choice_a_plain_forward_pass_likes_best(tiny_checkpoint):
    """Shared contexts change nothing: the same pick as scoring every context with every choice alone."""
    model, rng = load_model(tiny_checkpoint()), np.random.default_rng(0)
    contexts = [rng.integers(3, 190, n).tolist() for n in (5, 9, 2, 14)]
    choices = [rng.integers(3, 190, n).tolist() for n in (1, 2, 3)]
    expected = []
    for context in contexts:
        sums = []
        for choice in choices:
            ids = np.array(context + choice)
            labels = np.where(np.arange(len(ids)) >= len(context), ids, IGNORE)
            with torch.no_grad():
                sums.append(float(model.logps(Batch.pack([[Segment(ids, labels)]])).sum()))
        expected.append(int(np.argmax(sums)))
    assert [evaluation.likeliest(model, context, choices) for context in contexts] == expected


def test_a_model_that_never_answers_is_asked(tmp_path):
    """Random weights write no 'Answer:'; every row still gets one of the letters, marked as forced, and gold-less rows none."""
    from data import Tokenizer

    folder = write_checkpoint(tmp_path / "model", vocab_size=259)
    write_tokenizer(folder)
    tokenizer, model = Tokenizer(folder), load_model(folder)

    def example(question, answer):
        prompt, answer = tokenizer.encode(question), tokenizer.encode(answer)
        return [Segment(np.array(prompt + answer), np.array([IGNORE] * len(prompt) + answer))]

    rows = [example(f"{i}? ", f"Because.\nAnswer: {'AB'[i % 2]}") for i in range(6)] + [example("hello ", "hi")]
    choices = [["B", "A"], ["x", "y"]] + [None] * 5
    answers = evaluation.answer_questions(model, tokenizer, rows, choices, max_new_tokens=5, batch_size=4)
    assert [row["gold"] for row in answers] == ["A", "B"] * 3 + [None]
    assert all(row["forced"] and row["answer"] in "AB" for row in answers[:6]) and not answers[6]["forced"]
    assert [row["choices"] for row in answers[:3]] == [["B", "A"], ["A", "B"], ["A", "B"]]
    assert [row["prompt"] for row in answers[:2]] == ["0?", "1?"] and answers[0]["reference"].endswith("Answer: A")
    right = [row["answer"] == row["gold"] for row in answers[:6]]
    assert evaluation.accuracy(answers) == (sum(right) / 6, 6)
    assert evaluation.accuracy(answers[6:]) == (None, 0)

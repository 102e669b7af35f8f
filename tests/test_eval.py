"""Answers: read out of text, forced where there is none, and right for the reasons given."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from conftest import ROOT, write_checkpoint
from data import Tokenizer
from model import IGNORE, Batch, Segment, UserError, generate, generate_each, load_model
from test_sft import write_tokenizer


@pytest.mark.parametrize("text, letter", [
    ("so it is C.\nAnswer: C", "C"), ("answer: (a)\nAnswer: (D)", "D"), ("Answer:B", "B"), ("Answer: Bread", "Bread"),
    ("Answer: B) a dog", "B"), ("Answer: swan.\n", "swan"), ("Answer: I'm not sure", "I'm not sure"), ("It is B", None),
    ("", None), ("Answer: \nB", None), ("Answer: A\nAnswer: B", "B"),
])
def test_find_answer(text, letter):
    """What follows the last 'Answer:' on its line: a letter by itself, else the words, no letter of a longer word."""
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
    """Random weights write no 'Answer:'; every row still gets one of the letters, marked as forced; a row without an
    answer gets none."""
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


# --- benchmarks beside lm-evaluation-harness --------------------------------------------------------------------------

FILES = {"arc_challenge": "arc/arc_challenge", "arc_easy": "arc/arc_easy", "commonsense_qa": "commonsense_qa/default",
         "gsm8k": "gsm8k/gsm8k", "hellaswag": "hellaswag/hellaswag", "winogrande": "winogrande/default"}
WORDS = ["at  on", *"the cat sat a mat, Zoë ran w[step] away ; 12 dogs' ½ cup \u4f60\u597d red".split()]


def make_rows(task, count, seed):
    """Rows in the hub's columns; one in five is there twice, which few-shot sampling has to bear with."""
    rng, rows = random.Random(f"{task}{seed}"), []

    def words(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    for n in range(count):
        if task == "gsm8k":
            number = f"{rng.randint(1, 9)},{rng.randint(100, 999)}"
            row = {"question": words(2, 6) + " ", "answer": f"{words(1, 4)} <<1+1=2>>2\n#### {number}"}
        elif task == "hellaswag":
            ends = [words(1, 5) + rng.choice(["", " [title] x", "  ", " [a b] y"]) for _ in range(4)]
            row = {"activity_label": words(1, 2), "ctx_a": words(2, 5), "ctx_b": words(1, 3), "endings": ends,
                   "label": str(rng.randrange(4)), "ind": n}
        elif task == "winogrande":
            row = {"sentence": f"{words(0, 3)} _ {words(1, 4)}.", "option1": words(1, 2), "option2": words(1, 2),
                   "answer": rng.choice("12")}
        else:
            names = "ABCDE" if task == "commonsense_qa" else rng.choice(["ABCD", "1234", "ABC", "ABCDE"])
            row = {"id": str(n), "question": f" {words(2, 7)}?", "answerKey": rng.choice(names),
                   "choices": {"text": [words(1, 4) for _ in names], "label": list(names)}}
        rows += [row] * (1 + (n % 5 == 4))
    return rows


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, spec in evaluation.TASKS.items():
        (folder / task).mkdir()
        for split, count in ((spec.split, 12), ("train", 9)):
            rows = make_rows(task, count, split)
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("base") / "model", vocab_size=259, max_position_embeddings=400)
    write_tokenizer(folder)
    return folder


def lm_eval_results(folder, data_dir, tasks, shots, chat, limit, monkeypatch, cache):
    """lm_eval's own tasks, with its hf backend in fp32 one at a time, on the files of data_dir."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    built = []
    for task in tasks:
        config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{FILES[task]}.yaml")
        config.pop("tag", None)
        split = evaluation.TASKS[task].split
        files = {s: str(data_dir / task / f"{s}.jsonl") for s in (split, "train")}
        if not Path(files["train"]).exists():
            files["train"] = files[split]
        built.append(ConfigurableTask(config=config | {
            "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}))
    special = json.loads((folder / "tokenizer_config.json").read_text())
    special = {key: special[key] for key in ("bos_token", "eos_token", "pad_token") if special.get(key)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if (folder / "chat_template.jinja").exists():
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"), tasks=built, num_fewshot=shots,
        limit=limit, apply_chat_template=chat, task_manager=TaskManager(include_defaults=False), bootstrap_iters=10)


def our_results(folder, data_dir, tasks, shots, chat, limit, out):
    """The same with eval.py's command: (results, {task: samples})."""
    argv = ["--model", f"m={folder}", "--tasks", ",".join(tasks), "--data_dir", str(data_dir), "--dtype", "float32",
            "--output_dir", str(out), "--device", "cpu", "--apply_chat_template", str(chat)]
    argv += ["--num_fewshot", str(shots)] if shots is not None else []
    evaluation.main(argv + (["--limit", str(limit)] if limit else []))
    samples = {task: [json.loads(line) for line in (out / f"samples_m_{task}.jsonl").open()] for task in tasks}
    return json.loads((out / "results.json").read_text())["models"]["m"], samples


def check_parity(folder, data_dir, tasks, shots, chat, limit, monkeypatch, tmp_path):
    theirs = lm_eval_results(folder, data_dir, tasks, shots, chat, limit, monkeypatch, tmp_path / "cache")
    ours, samples = our_results(folder, data_dir, tasks, shots, chat, limit, tmp_path / "out")
    names = {"acc": "acc,none", "acc_norm": "acc_norm,none", "exact_match_strict": "exact_match,strict-match",
             "exact_match_flexible": "exact_match,flexible-extract"}
    for task in tasks:
        seen = sorted((s for s in theirs["samples"][task] if s["filter"] != "flexible-extract"),
                      key=lambda s: s["doc_id"])
        assert len(seen) == len(samples[task]) == ours[task]["n"]
        for mine, other in zip(samples[task], seen):
            if task == "gsm8k":
                assert mine["output"] == other["resps"][0][0]
            else:
                np.testing.assert_allclose(mine["logps"], [r[0][0] for r in other["resps"]], atol=1e-4, rtol=0)
        for name, value in ((name, value) for name, value in ours[task].items() if name in names):
            assert value == pytest.approx(theirs["results"][task][names[name]], abs=1e-12)
            other = theirs["results"][task][names[name].replace(",", "_stderr,")]
            assert ours[task][f"{name}_stderr"] == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("shots, chat", [(0, False), (3, False), (2, True)])
def test_all_six_tasks_equal_lm_eval(base, data_dir, shots, chat, monkeypatch, tmp_path):
    """Log-likelihoods to 1e-4 nat (they are sums over hundreds of bytes, up to 500 nat), texts and metrics exactly;
    some contexts are longer than the model's 400 positions."""
    check_parity(base, data_dir, list(FILES), shots, chat, None, monkeypatch, tmp_path)


def test_a_missing_train_file_means_the_questions_themselves(base, data_dir, monkeypatch, tmp_path):
    for task in ("commonsense_qa", "winogrande"):
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "validation.jsonl").write_text((data_dir / task / "validation.jsonl").read_text())
    check_parity(base, tmp_path / "data", ["commonsense_qa", "winogrande"], 2, False, 5, monkeypatch, tmp_path)


@pytest.mark.parametrize("shots", [0, 3])
def test_real_data_equals_lm_eval(shared, shots, monkeypatch, tmp_path):
    """A trained model with a BOS token and a SentencePiece-like tokenizer."""
    check_parity(shared / "models" / "stories260K", shared / "data", ["arc_challenge", "commonsense_qa", "winogrande"],
                 shots, False, 12, monkeypatch, tmp_path)

"""Answers: read out of text, forced where there is none, and right for the reasons given."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_checkpoint
from test_sft import write_tokenizer

import eval as evaluation
from data import Tokenizer, find_answer, split_prompt
from model import IGNORE, Batch, Segment, generate, generate_each, load_model
from qlora import load_4bit
from support import report, tracking
from support.errors import UserError


@pytest.mark.parametrize(
    "text, letter",
    [
        ("so it is C.\nAnswer: C", "C"),
        ("answer: (a)\nAnswer: (D)", "D"),
        ("Answer:B", "B"),
        ("Answer: Bread", "Bread"),
        ("Answer: B) a dog", "B"),
        ("Answer: swan.\n", "swan"),
        ("Answer: I'm not sure", "I'm not sure"),
        ("It is B", None),
        ("", None),
        ("Answer: \nB", None),
        ("Answer: A\nAnswer: B", "B"),
    ],
)
def test_find_answer(text, letter):
    """What follows the last 'Answer:' on its line: a letter by itself, else the words, no letter
    of a longer word."""
    assert find_answer(text) == letter


def test_the_prompt_ends_where_the_last_answer_begins():
    """Of two answers the last is the reference; what follows it (a newline of the template)
    belongs to neither."""
    ids = np.arange(10, 22)
    labels = np.where(np.isin(np.arange(12), [3, 4, 8, 9, 10]), ids, IGNORE)
    prompt, reference = split_prompt([Segment(ids, labels)])
    assert prompt == list(range(10, 18)) and reference == [18, 19, 20]
    whole = [Segment(ids, np.where(np.arange(12) > 0, ids, IGNORE))]
    assert split_prompt(whole) == ([10], list(range(11, 22)))


def test_likeliest_is_the_choice_a_plain_forward_pass_likes_best(tiny_checkpoint):
    """Shared contexts change nothing: the same pick as scoring every context with every choice
    alone."""
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
    """Random weights write no 'Answer:'; every row still gets one of the letters, marked as
    forced; a row without an answer gets none."""
    folder = write_checkpoint(tmp_path / "model", vocab_size=259)
    write_tokenizer(folder)
    tokenizer, model = Tokenizer(folder), load_model(folder)

    def example(question, answer):
        prompt, answer = tokenizer.encode(question), tokenizer.encode(answer)
        return [Segment(np.array(prompt + answer), np.array([IGNORE] * len(prompt) + answer))]

    rows = [example(f"{i}? ", f"Because.\nAnswer: {'AB'[i % 2]}") for i in range(6)] + [
        example("hello ", "hi")
    ]
    choices = [["B", "A"], ["x", "y"]] + [None] * 5
    answers = evaluation.answer_questions(
        model, tokenizer, rows, choices, max_new_tokens=5, batch_size=4
    )
    assert [row["gold"] for row in answers] == ["A", "B"] * 3 + [None]
    assert (
        all(row["forced"] and row["answer"] in "AB" for row in answers[:6])
        and not answers[6]["forced"]
    )
    assert [row["choices"] for row in answers[:3]] == [["B", "A"], ["A", "B"], ["A", "B"]]
    assert [row["prompt"] for row in answers[:2]] == ["0?", "1?"] and answers[0][
        "reference"
    ].endswith("Answer: A")
    right = [row["answer"] == row["gold"] for row in answers[:6]]
    shares = report.show_answers(answers, answers, 0)
    assert shares == {"eval_answers_before": sum(right) / 6, "eval_answers": sum(right) / 6}
    assert report.show_answers(answers[6:], answers[6:], 0) == {}


# --- benchmarks beside lm-evaluation-harness ------------------------------------------------------

FILES = {
    "arc_challenge": "arc/arc_challenge",
    "arc_easy": "arc/arc_easy",
    "commonsense_qa": "commonsense_qa/default",
    "gsm8k": "gsm8k/gsm8k",
    "hellaswag": "hellaswag/hellaswag",
    "winogrande": "winogrande/default",
}
WORDS = [
    "at  on",
    *"the cat sat a mat, Zoë ran w[step] away ; 12 dogs' ½ cup \u4f60\u597d red".split(),
]


def make_rows(task, count, seed):
    """Rows in the hub's columns; one in five is there twice, which few-shot sampling has to bear
    with."""
    rng, rows = random.Random(f"{task}{seed}"), []

    def words(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    for n in range(count):
        if task == "gsm8k":
            number = f"{rng.randint(1, 9)},{rng.randint(100, 999)}"
            row = {
                "question": words(2, 6) + " ",
                "answer": f"{words(1, 4)} <<1+1=2>>2\n#### {number}",
            }
        elif task == "hellaswag":
            ends = [
                words(1, 5) + rng.choice(["", " [title] x", "  ", " [a b] y"]) for _ in range(4)
            ]
            row = {
                "activity_label": words(1, 2),
                "ctx_a": words(2, 5),
                "ctx_b": words(1, 3),
                "endings": ends,
                "label": str(rng.randrange(4)),
                "ind": n,
            }
        elif task == "winogrande":
            row = {
                "sentence": f"{words(0, 3)} _ {words(1, 4)}.",
                "option1": words(1, 2),
                "option2": words(1, 2),
                "answer": rng.choice("12"),
            }
        else:
            names = (
                "ABCDE"
                if task == "commonsense_qa"
                else rng.choice(["ABCD", "1234", "ABC", "ABCDE"])
            )
            row = {
                "id": str(n),
                "question": f" {words(2, 7)}?",
                "answerKey": rng.choice(names),
                "choices": {"text": [words(1, 4) for _ in names], "label": list(names)},
            }
        rows += [row] * (1 + (n % 5 == 4))
    return rows


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, spec in evaluation.TASKS.items():
        (folder / task).mkdir()
        for split, count in ((spec.split, 12), ("train", 9)):
            rows = make_rows(task, count, split)
            (folder / task / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_checkpoint(
        tmp_path_factory.mktemp("base") / "model",
        vocab_size=259,
        max_position_embeddings=400,
    )
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
        built.append(
            ConfigurableTask(
                config=config
                | {
                    "dataset_path": "json",
                    "dataset_name": None,
                    "dataset_kwargs": {"data_files": files},
                }
            )
        )
    special = json.loads((folder / "tokenizer_config.json").read_text())
    special = {
        key: special[key] for key in ("bos_token", "eos_token", "pad_token") if special.get(key)
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if (folder / "chat_template.jinja").exists():
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"),
        tasks=built,
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=10,
    )


def our_results(folder, data_dir, tasks, shots, chat, limit, out):
    """The same with eval.py's command: (results, {task: samples})."""
    argv = [
        "--model",
        f"m={folder}",
        "--tasks",
        ",".join(tasks),
        "--data_dir",
        str(data_dir),
        "--dtype",
        "float32",
        "--output_dir",
        str(out),
        "--device",
        "cpu",
        "--apply_chat_template",
        str(chat),
    ]
    argv += ["--num_fewshot", str(shots)] if shots is not None else []
    evaluation.main(argv + (["--limit", str(limit)] if limit else []))
    samples = {
        task: [json.loads(line) for line in (out / f"samples_m_{task}.jsonl").open()]
        for task in tasks
    }
    return json.loads((out / "results.json").read_text())["models"]["m"], samples


def check_parity(folder, data_dir, tasks, shots, chat, limit, monkeypatch, tmp_path):
    theirs = lm_eval_results(
        folder, data_dir, tasks, shots, chat, limit, monkeypatch, tmp_path / "cache"
    )
    ours, samples = our_results(folder, data_dir, tasks, shots, chat, limit, tmp_path / "out")
    names = {
        "acc": "acc,none",
        "acc_norm": "acc_norm,none",
        "exact_match_strict": "exact_match,strict-match",
        "exact_match_flexible": "exact_match,flexible-extract",
    }
    for task in tasks:
        seen = sorted(
            (s for s in theirs["samples"][task] if s["filter"] != "flexible-extract"),
            key=lambda s: s["doc_id"],
        )
        assert len(seen) == len(samples[task]) == ours[task]["n"]
        for mine, other in zip(samples[task], seen):
            if task == "gsm8k":
                assert mine["output"] == other["resps"][0][0]
            else:  # sums of some hundred nats, which each side has to 6e-5 of float64's
                np.testing.assert_allclose(
                    mine["logps"], [r[0][0] for r in other["resps"]], atol=1.5e-4, rtol=0
                )
        for name, value in ((name, value) for name, value in ours[task].items() if name in names):
            assert value == pytest.approx(theirs["results"][task][names[name]], abs=1e-12)
            other = theirs["results"][task][names[name].replace(",", "_stderr,")]
            assert ours[task][f"{name}_stderr"] == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("shots, chat", [(0, False), (3, False), (2, True)])
def test_all_six_tasks_equal_lm_eval(base, data_dir, shots, chat, monkeypatch, tmp_path):
    """Log-likelihoods to 1e-4 nat (they are sums over hundreds of bytes, up to 500 nat), texts and
    metrics exactly; some contexts are longer than the model's 400 positions."""
    check_parity(base, data_dir, list(FILES), shots, chat, None, monkeypatch, tmp_path)


def test_gsm8k_is_graded_as_lm_eval_grades():
    """lm_eval's own filters and metric on texts that a model might write."""
    from types import SimpleNamespace

    import lm_eval
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml")
    task, options = evaluation.TASKS["gsm8k"], config["metric_list"][0]
    assert (
        list(task.stops) == config["generation_kwargs"]["until"]
        and task.num_fewshot == config["num_fewshot"]
    )
    options = {
        key: value for key, value in options.items() if key.startswith(("ignore", "regexes"))
    }
    texts = [
        "so 3.\n#### 72",
        "#### 1,072.",
        "It is $1,072.",
        "#### -5 or 72",
        "72",
        "",
        "none",
        "a #### 7",
        "$ . ,",
        "4. #### 3.0",
        "#### 72 Question: 5",
        "5 Question: 72",
        "#### 72</s>9",
        "#### 72\n#### 1072",
        "is 72.",
        "####  72",
    ]
    for answer in (
        "x <<1+1=2>>\n#### 72",
        "so #### 1,072",
        "#### -5",
        "#### 3.0",
        "#,### 72",
    ):
        for text in texts:
            ours = evaluation.grade_gsm8k(
                evaluation.Item(["q"], [answer]), task, SimpleNamespace(decode=str), text
            )
            cut = postprocess_generated_text(text, config["generation_kwargs"]["until"], None)
            for spec, name in zip(config["filter_list"], task.metrics):
                pattern = {k: v for k, v in spec["filter"][0].items() if k != "function"}
                found = RegexFilter(**pattern).apply([[cut]], [{}])[0][0]
                right = exact_match_hf_evaluate(
                    predictions=[found], references=[answer], **options
                )["exact_match"]
                assert ours["metrics"][name] == right, (answer, text, name)


def test_a_missing_train_file_means_the_questions_themselves(
    base, data_dir, monkeypatch, tmp_path
):
    for task in ("commonsense_qa", "winogrande"):
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "validation.jsonl").write_text(
            (data_dir / task / "validation.jsonl").read_text()
        )
    check_parity(
        base,
        tmp_path / "data",
        ["commonsense_qa", "winogrande"],
        2,
        False,
        5,
        monkeypatch,
        tmp_path,
    )


@pytest.mark.parametrize("shots", [0, 3])
def test_real_data_equals_lm_eval(shared, shots, monkeypatch, tmp_path):
    """A trained model with a BOS token and a SentencePiece-like tokenizer."""
    check_parity(
        shared / "models" / "stories260K",
        shared / "data",
        ["arc_challenge", "commonsense_qa", "winogrande"],
        shots,
        False,
        12,
        monkeypatch,
        tmp_path,
    )


# --- sharing changes no number --------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_tree_scores_what_single_sequences_score(tiny_checkpoint, attention):
    """Sequences that share much, little, all, or end inside another; a tree of any shape gives
    each its own sum."""
    model, rng = (
        load_model(tiny_checkpoint(), attn_implementation=attention),
        random.Random(0),
    )
    words, sequences = (
        [[rng.randrange(3, 190) for _ in range(n)] for n in (9, 1, 5, 3, 12, 4)],
        [],
    )
    for _ in range(40):
        ids = [1] + [token for _ in range(rng.randint(1, 4)) for token in rng.choice(words)]
        sequences.append((ids, rng.randint(1, len(ids) - 1)))
    sequences += [sequences[0], (sequences[0][0][:-1] + [7], 1)]
    batch = evaluation.pack_shared(sequences)
    assert len(batch.tokens) < 0.6 * sum(len(ids) - 1 for ids, _ in sequences)
    alone = [evaluation.sum_logps(model, [sequence])[0] for sequence in sequences]
    np.testing.assert_allclose(evaluation.sum_logps(model, sequences), alone, atol=1e-4)
    ids, start = sequences[5]
    labels = np.where(np.arange(len(ids)) >= start, ids, IGNORE)
    assert alone[5] == pytest.approx(
        float(model.logps(Batch.pack([[Segment(np.array(ids), labels)]])).sum()), abs=1e-4
    )
    items = [sequences[n : n + 3] for n in range(0, 42, 3)]
    for budget in (1, 60, 10**6):  # whatever comes together
        found = dict(evaluation.score(model, items, budget))
        np.testing.assert_allclose(
            [found[n] for n in range(14)], np.reshape(alone, (14, 3)), atol=1e-4
        )
    assert list(evaluation.score(model, [])) == []


def test_the_header_is_computed_once():
    header, question = list(range(10, 40)), [[50, 51, 52, 53, 54], [60, 61, 62, 63, 64, 65]]
    sequences = [(header + q + [70, n], 35) for q in question for n in range(4)]
    batch = evaluation.pack_shared(sequences)
    assert len(batch.tokens) == 30 + 6 + 7 and [s[2] for s in batch.segments] == [-1, 0, 0]
    assert batch.num_sequences == 8 and batch.scored.shape == batch.targets.shape


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_that_refills_itself_writes_the_same(tiny_checkpoint, attention):
    """Rows that end make room for others, behind a header or not; every row is what it is alone."""
    model, rng = (
        load_model(tiny_checkpoint(), attn_implementation=attention),
        random.Random(1),
    )
    for header in ([], [rng.randrange(3, 190) for _ in range(20)]):
        prompts = [
            header + [rng.randrange(3, 190) for _ in range(rng.randint(1, 9))] for _ in range(11)
        ]
        ends = {
            n for p in prompts for n in generate(model, [p], 9)[0][4:5]
        }  # some rows end early
        alone = [generate(model, [p], 9, eos_ids=ends)[0] for p in prompts]
        assert len({len(ids) for ids in alone}) > 1
        for size in (1, 3, 64):
            assert generate(model, prompts, 9, eos_ids=ends, batch_size=size) == alone
        order = [row for row, _ in generate_each(model, prompts, 9, eos_ids=ends, batch_size=3)]
        assert sorted(order) == list(range(11)) and order != list(range(11))  # as they end
        cut = generate(model, prompts, 9, eos_ids=[], stop=lambda ids: len(ids) == 2)
        assert [len(ids) for ids in cut] == [2] * 11


def test_long_prompts_and_decoding_equal_eager(tiny_checkpoint):
    """Above 512 keys a CPU cuts queries into blocks; without gradients that is what every long
    segment goes through."""
    folder, rng = tiny_checkpoint(max_position_embeddings=2048), np.random.default_rng(2)
    ids = rng.integers(3, 190, 1300).tolist()
    sums = [
        evaluation.sum_logps(
            load_model(folder, attn_implementation=name),
            [(ids, 1), (ids[:900] + [5] * 30, 2)],
        )
        for name in ("sdpa", "eager")
    ]
    np.testing.assert_allclose(*sums, rtol=1e-5)


# --- own sets -------------------------------------------------------------------------------------


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def settings(**changes):
    return evaluation.EvalConfig(**{"max_new_tokens": 12, "device": "cpu", **changes})


def ask(source, folder, tmp_path, name="own", **changes):
    """An own set's samples and summary."""
    model, tokenizer, config = load_model(folder), Tokenizer(folder), settings(**changes)
    questions = evaluation.ask_own(evaluation.read_own(source, config), model, tokenizer, config)
    samples = evaluation.answer_all(
        model, tokenizer, questions, tmp_path / f"samples_m_{name}.jsonl", "", config
    )
    return samples, evaluation.summarise(samples)


def test_perplexity_equals_lm_eval(base, tmp_path):
    """Texts longer than the model's 400 positions go through windows, each scored behind what
    lm_eval puts before."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    texts = [
        "One day a dog ran.",
        "A cat. " * 90,
        "ü" * 200,
        "x" * 400,
        "y" * 401,
        "z" * 801,
    ]
    reference = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(base),
        batch_size=1,
        device="cpu",
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(base / "tokenizer.json"), eos_token="<|im_end|>"
        ),
    )
    reference.tokenizer.pad_token = "<|endoftext|>"
    expected = reference.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1)) for text in texts]
    )
    samples, summary = ask(
        write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts]), base, tmp_path
    )
    np.testing.assert_allclose([s["logp"] for s in samples], expected, rtol=1e-6)
    bits = -sum(expected) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert summary["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert summary["byte_perplexity"] == pytest.approx(
        2**bits, rel=1e-5
    )  # an exponential of many bits
    (tmp_path / "one.txt").write_text(texts[1])
    assert ask(str(tmp_path / "one.txt"), base, tmp_path, "one")[1]["n"] == 1


def test_own_choices_are_scored_as_arc_is(base, tmp_path):
    rows = make_rows("arc_easy", 8, "own")
    plain = [
        {
            "question": r["question"],
            "choices": r["choices"]["text"],
            "answer": r["choices"]["label"].index(r["answerKey"]),
        }
        for r in rows
    ]
    by_letter = [row | {"answer": "ABCDE"[row["answer"]]} for row in plain]
    found = [
        ask(write_rows(tmp_path / f"{n}.jsonl", rows), base, tmp_path, str(n))
        for n, rows in enumerate((rows, plain, by_letter))
    ]
    for samples, summary in found:
        assert summary == found[0][1] and [s["logps"] for s in samples] == [
            s["logps"] for s in found[0][0]
        ]


def test_yes_and_no(base, tmp_path):
    """accuracy, and precision, recall and F1 of Yes, against scikit-learn's."""
    from sklearn.metrics import f1_score, precision_score, recall_score

    rows = [
        {"prompt": f"{'word ' * (n % 4)}{n}? ", "completion": "Yes" if n % 3 else "No"}
        for n in range(20)
    ]
    samples, summary = ask(write_rows(tmp_path / "yes.jsonl", rows), base, tmp_path)
    golds, answers = ([s[key] for s in samples] for key in ("gold", "answer"))
    assert golds == [row["completion"] for row in rows] and len(set(answers)) == 2
    assert summary["accuracy"] == np.mean([a == b for a, b in zip(golds, answers)])
    for name, metric in (
        ("f1", f1_score),
        ("precision", precision_score),
        ("recall", recall_score),
    ):
        assert summary[name] == pytest.approx(metric(golds, answers, pos_label="Yes"))


def test_references_reasoning_and_questions_alone(base, tmp_path):
    from rouge_score.rouge_scorer import RougeScorer

    rows = [
        {"prompt": f"say {n} ", "completion": f"the answer number {n} is here"} for n in range(3)
    ]
    samples, summary = ask(write_rows(tmp_path / "r.jsonl", rows), base, tmp_path)
    for row, sample in zip(rows, samples):
        wanted = (
            RougeScorer(["rougeL"], use_stemmer=True)
            .score(row["completion"], sample["output"])["rougeL"]
            .fmeasure
        )
        assert sample["metrics"]["rougeL"] == wanted and sample["reference"] == row["completion"]
    assert {"exact_match", "rouge1", "rouge2", "rougeL", "n"} <= set(summary)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": f"So.\nAnswer: {n}"},
            ],
            "choices": [str(n), "9"],
        }
        for n in range(4)
    ]
    samples, summary = ask(write_rows(tmp_path / "c.jsonl", rows), base, tmp_path, "c")
    assert [s["gold"] for s in samples] == [str(n) for n in range(4)] and all(
        s["forced"] for s in samples
    )
    assert all(s["answer"] in s["choices"] for s in samples) and "accuracy" in summary
    samples, summary = ask(
        write_rows(tmp_path / "q.jsonl", [{"question": "Why?"}, {"prompt": "Once"}]),
        base,
        tmp_path,
        "q",
    )
    assert (
        samples[0]["prompt"].startswith("user\nWhy?")
        and samples[1]["prompt"] == "Once"
        and summary == {"n": 2}
    )


def test_an_answer_without_stop_texts_is_decoded_once(base, tmp_path, monkeypatch):
    """However long it is: only a task with stop texts looks for them at every token."""
    decoded, decode = [], Tokenizer.decode

    def count(tokenizer, ids, *options):
        decoded.append(ids)
        return decode(tokenizer, ids, *options)

    file = write_rows(tmp_path / "q.jsonl", [{"prompt": f"Once {n}"} for n in range(3)])
    monkeypatch.setattr(Tokenizer, "decode", count)
    counts = []
    for length in (2, 12):
        decoded.clear()
        ask(file, base, tmp_path, f"q{length}", max_new_tokens=length)
        counts.append(len(decoded))
    assert counts[0] == counts[1]


def test_forced_choices_in_training(base):
    """Letters, the choices' own words, and Yes or No are choices; a free text is none; reasoning
    is not given away."""
    from data import render_row

    tokenizer, model = Tokenizer(base), load_model(base)
    rows = [
        (
            {"prompt": "Which?\nA. x\nB. y\nC. z\n", "completion": "It is y.\nAnswer: B"},
            None,
            ["A", "B", "C"],
        ),
        (
            {"prompt": "Which? ", "completion": "Because.\nAnswer: cat"},
            ["dog", "cat"],
            ["dog", "cat"],
        ),
        ({"prompt": "Which? ", "completion": " cat"}, ["dog", "cat"], ["dog", "cat"]),
        ({"prompt": "Is it? ", "completion": "no"}, None, ["yes", "no"]),
        ({"prompt": "Say ", "completion": "hello"}, None, None),
    ]
    asked = [
        evaluation.ask_choice(tokenizer, render_row(row, tokenizer), choices)
        for row, choices, _ in rows
    ]
    assert [q and q.shown["choices"] for q in asked] == [options for *_, options in rows]
    texts = [[tokenizer.decode(ids) for ids, _ in q.sequences] for q in asked[:4]]
    assert texts[0] == [rows[0][0]["prompt"] + f"Answer: {letter}" for letter in "ABC"]
    assert texts[2] == ["Which?  dog", "Which?  cat"] and texts[3] == [
        "Is it? yes",
        "Is it? no",
    ]
    model.train()
    found = evaluation.choice_metrics(model, asked[:4])
    assert model.training and set(found) == {"eval_accuracy", "eval_f1"}
    picks = [
        q.shown["choices"][int(np.argmax(evaluation.sum_logps(model, q.sequences)))]
        for q in asked[:4]
    ]
    assert found["eval_accuracy"] == np.mean(
        [a == b for a, b in zip(picks, ["B", "cat", "cat", "no"])]
    )
    assert evaluation.choice_metrics(model, []) == {}


def test_a_choice_after_the_empty_thought_of_a_template(shared):
    """Qwen3's template writes one; the choices are scored after it."""
    tokenizer = Tokenizer(shared / "tokenizers" / "qwen3")
    row = {"prompt": [{"role": "user", "content": "Is it?"}], "completion": "No"}
    example = evaluation.render_row(row, tokenizer)
    prompt, reference = split_prompt(example)
    assert tokenizer.decode(reference).startswith("<think>")
    question = evaluation.ask_choice(tokenizer, example, None)
    assert question.shown["gold"] == "No" and question.shown["choices"] == ["Yes", "No"]
    assert question.sequences[1] == (prompt + reference[:-1], len(prompt))


def test_a_choice_with_a_full_stop_is_a_choice(shared):
    """ARC's choices are sentences as often as not. Graded as texts, half of a set would have no
    accuracy."""
    tokenizer = Tokenizer(shared / "tokenizers" / "qwen3")
    for answer, choices, gold in (
        ("A) It rains.", ["A) It rains.", "B) It snows."], "A) It rains."),
        ("It snows.", ["It rains", "It snows"], "It snows"),
        ("no.", ["no", "no."], "no."),
        ("Yes.", None, "Yes"),
    ):
        row = {"prompt": [{"role": "user", "content": "What?"}], "completion": answer}
        example = evaluation.render_row(row, tokenizer)
        question = evaluation.ask_choice(tokenizer, example, choices)
        assert question.shown["gold"] == gold
        assert question.shown["choices"] == (choices or ["Yes", "No"])
    row = {"prompt": "What?", "completion": "It is wet. Answer: It rains."}
    choices = ["It rains.", "It snows."]
    (question,) = evaluation.ask_answers(
        None, tokenizer, [evaluation.render_row(row, tokenizer)], [choices]
    )
    assert question.grade.args[-1] == ["It rains", "It snows"]


# --- what differs ---------------------------------------------------------------------------------


def results_of(rates, n=1000, seed=0, common=0.8):
    """Synthetic samples: {set: n rows right at a rate}; most questions are right or wrong for
    every model alike."""
    rng, samples = np.random.default_rng(seed), {}
    for task, rate in rates.items():
        same = np.random.default_rng(len(task)).random(
            n
        )  # how hard each question is, whoever answers
        luck = np.where(np.random.default_rng(7).random(n) < common, same, rng.random(n))
        samples[task] = [{"metrics": {"acc": float(value < rate)}} for value in luck]
    return samples


def test_an_average_that_rises_while_two_sets_fall():
    """Question by question results with the figures of a published SFT and DPO run: the average
    rises at every stage, and every stage loses on two sets of five."""
    sets = {
        "arc": 1172,
        "csqa": 1221,
        "gsm8k": 1319,
        "hellaswag": 10042,
        "winogrande": 1267,
    }
    stages = {
        "base": (48.1, 82.7, 75.4, 54.5, 70.3),
        "sft": (54.2, 81.4, 78.5, 58.2, 69.0),
        "dpo": (54.7, 79.9, 79.5, 61.9, 67.9),
    }
    samples = {
        name: {
            task: results_of({task: rate / 100}, size, n, 0.85)[task]
            for (task, size), rate in zip(sets.items(), rates)
        }
        for n, (name, rates) in enumerate(stages.items())
    }
    pairs = evaluation.compare_all(samples)
    verdicts = {p["task"]: p["verdict"] for p in pairs if (p["a"], p["b"]) == ("base", "dpo")}
    assert verdicts == dict(zip(sets, ("rose", "fell", "rose", "rose", "fell")))
    assert all(
        p["delta"] < 0 for p in pairs if p["task"] in ("csqa", "winogrande")
    )  # at every stage
    results = {
        name: {task: evaluation.summarise(rows) for task, rows in found.items()}
        for name, found in samples.items()
    }
    said = report.headlines(results, pairs)[1]
    assert (
        "+2." in said
        and "fell beyond noise: csqa acc, winogrande acc" in said
        and "The average hides what fell." in said
    )
    text = report.comparison_report(results, pairs, samples)
    assert said in text and text.count("| fell |") == 2


def test_two_percent_of_a_hundred_is_noise():
    a, b = results_of({"x": 0.50}, 100, 1)["x"], results_of({"x": 0.52}, 100, 2)["x"]
    a, b = (evaluation.values_by_metric(rows)["acc"] for rows in (a, b))
    found = evaluation.compare("acc", a, b)
    assert (
        found["verdict"] == "noise"
        and found["low"] < found["delta"] < found["high"]
        and found["mcnemar_p"] > 0.05
    )
    assert evaluation.compare("acc", a, a)["verdict"] == "too few"  # rows that differ


def test_paired_statistics_against_scipy():
    from scipy.stats import binomtest

    a, b = results_of({"x": 0.6}, 400, 1)["x"], results_of({"x": 0.7}, 400, 2)["x"]
    x, y = (np.array([s["metrics"]["acc"] for s in rows]) for rows in (a, b))
    found = evaluation.compare(
        "acc", *(evaluation.values_by_metric(rows)["acc"] for rows in (a, b)), 20000
    )
    gained, lost = int((y > x).sum()), int((y < x).sum())
    assert (found["gained"], found["lost"], found["n"]) == (gained, lost, 400)
    assert found["mcnemar_p"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert found["delta"] == pytest.approx((y - x).mean())
    error = (y - x).std() / 20  # the interval of so many bounded values is nearly normal
    expected = found["delta"] + np.array([-1.96, 1.96]) * error
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.004)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two adapters of the base, one of which trains the norms too."""
    from lora import LoRAConfig, add_lora, save_adapter

    folders = []
    for n, more in enumerate(([], ["norm"], [])):
        model = load_model(base)
        add_lora(
            model,
            LoRAConfig(lora_r=2, target_modules=["q_proj"], modules_to_save=more),
            seed=n,
        )
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
        folders.append(tmp_path_factory.mktemp("adapters") / f"a{n}" / "adapter")
        save_adapter(model, folders[-1], base)
    return folders


def command(*argv):
    evaluation.main([str(arg) for arg in argv])


def test_models_side_by_side(base, adapters, data_dir, tmp_path, monkeypatch, capsys):
    """Base, adapters and run folders in one run score what each scores alone; a base is loaded
    once for plain LoRA."""
    loads = []
    monkeypatch.setattr(
        evaluation,
        "load_4bit",
        lambda *args, **more: loads.append(1) or load_4bit(*args, **more),
    )
    options = [
        "--tasks",
        "winogrande,arc_easy",
        "--data_dir",
        data_dir,
        "--limit",
        5,
        "--output_dir",
    ]
    models = {
        "base": base,
        "one": adapters[0],
        "two": adapters[2].parent,
        "norms": adapters[1],
        "again": adapters[0],
    }
    command(
        *(x for name, path in models.items() for x in ("--model", f"{name}={path}")),
        *options,
        tmp_path / "all",
    )
    assert len(loads) == 2  # the trained norms took the base along
    found = json.loads((tmp_path / "all" / "results.json").read_text())
    assert found["models"]["one"] == found["models"]["again"] and len(found["pairs"]) == 10 * 3
    lines = {
        name: (tmp_path / "all" / f"samples_{name}_arc_easy.jsonl").read_text() for name in models
    }
    assert len({json.loads(text.split("\n")[0])["logps"][0] for text in lines.values()}) == 4
    for name, path in models.items():
        command("--model", f"{name}={path}", *options, tmp_path / name)
        assert (
            json.loads((tmp_path / name / "results.json").read_text())["models"][name]
            == found["models"][name]
        )
    said = capsys.readouterr().out
    assert "| winogrande | acc | 5 |" in said and "base → one" in said
    assert {"report.md", "results.png", "results.json"} <= {
        p.name for p in (tmp_path / "all").iterdir()
    }


def test_names():
    """A source without a name is named after itself, in letters that a file's name may have."""
    assert evaluation.by_name(["Qwen/Qwen3-0.6B", "a.b=x=y", "runs/mine"], "model") == {
        "Qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "a.b": "x=y",
        "mine": "runs/mine",
    }
    assert evaluation.by_name(["d/q.jsonl", "org/set:test"], "data") == {
        "q": "d/q.jsonl",
        "set_test": "org/set:test",
    }


def test_an_interrupted_evaluation_goes_on(base, data_dir, tmp_path, monkeypatch):
    """Half a line is dropped, whole ones count, and what has other weights or settings is asked
    anew."""
    argv = [
        "--model",
        f"m={base}",
        "--tasks",
        "winogrande,gsm8k",
        "--num_fewshot",
        "1",
        "--data_dir",
        str(data_dir),
        "--max_new_tokens",
        "4",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    command(*argv)
    files = [tmp_path / "out" / f"samples_m_{task}.jsonl" for task in ("winogrande", "gsm8k")]
    whole = [file.read_text() for file in files]
    scored, written = [], []
    score, generate_each = evaluation.score, evaluation.generate_each
    monkeypatch.setattr(
        evaluation, "score", lambda m, items: scored.append(len(items)) or score(m, items)
    )
    monkeypatch.setattr(
        evaluation,
        "generate_each",
        lambda m, p, *a, **k: written.append(len(p)) or generate_each(m, p, *a, **k),
    )
    for file, text in zip(files, whole):
        lines = text.splitlines(keepends=True)
        file.write_text("".join(lines[3:9][::-1]) + lines[9][:-20])
    command(*argv)
    for file, text in zip(files, whole):
        again, before = (
            [json.loads(line) for line in x.splitlines()] for x in (file.read_text(), text)
        )
        for one, other in zip(
            again, before, strict=True
        ):  # in other company sums round differently
            assert (
                one.pop("logps", []) == pytest.approx(other.pop("logps", []), abs=1e-4)
                and one == other
            )
    assert sum(scored) == 14 - 6 and sum(written) == 14 - 6
    command(*argv)
    assert sum(scored) == 8 and sum(written) == 8
    command(*argv[:-4], "--max_new_tokens", "5", *argv[-2:])
    assert sum(scored) == 8 and sum(written) == 8 + 14


def test_a_reference_that_changes_is_asked_anew(base, tmp_path):
    """What a stored line says of the gold answer holds for the file as it is now: choices, texts,
    and reasoning."""
    for name, old, new in (
        ("yes", "Yes", "No"),
        ("text", "so", "no, not so"),
        ("why", "a\nAnswer: x", "a\nAnswer: y"),
    ):
        files = [
            write_rows(tmp_path / f"{n}.jsonl", [{"prompt": "Is it? ", "completion": answer}])
            for n, answer in enumerate((old, new, new))
        ]
        found = [ask(file, base, tmp_path, name)[0][0] for file in files]
        told = [sample.get("gold") or sample["reference"] for sample in found]
        assert told[0] == old.removeprefix("a\nAnswer: ") and told[1] == told[
            2
        ] == new.removeprefix("a\nAnswer: ")


def test_a_model_that_fails_leaves_the_others(base, data_dir, tmp_path):
    broken = write_checkpoint(tmp_path / "broken", vocab_size=259)
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(
        UserError, match="1 of 2 models failed: broken: .*not a whole safetensors"
    ):
        command(
            "--model",
            f"broken={broken}",
            "--model",
            f"m={base}",
            "--tasks",
            "winogrande",
            "--data_dir",
            data_dir,
            "--output_dir",
            tmp_path / "out",
        )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["models"]) == ["m"] and "broken" in found["failed"]
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(
        UserError, match="1 of 1 models failed: lost: .*neither a folder nor a hub id"
    ):
        command(
            "--model",
            f"lost={tmp_path / 'lost'}",
            "--tasks",
            "winogrande",
            "--data_dir",
            data_dir,
            "--output_dir",
            tmp_path / "out",
        )
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--tasks", "winogrand"],
            "tasks: 'winogrand' is not one of .*nearest: winogrande",
        ),
        (["--model", "a=x", "--model", "a=y", "--tasks", "winogrande"], "two are named a"),
        ([], "nothing to ask: give --data FILE, or --tasks of arc_challenge"),
        (["--tasks", "winogrande", "--limit", "0"], "--limit: 0 is below 1"),
        (["--tasks", "winogrande", "--num_fewshot", "-1"], "--num_fewshot: -1 is below 0"),
        (
            ["--tasks", "winogrande", "--num_fewshot", "99"],
            "99 few-shot examples can't be sampled from 10 rows",
        ),
        (["--data", "winogrande=x.jsonl"], "a benchmark's name"),
        (["--tsks", "x"], "unknown argument --tsks.*tasks"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (
            ["--tasks", "winogrande", "--recipe", "ecqa"],
            "--recipe: reads the rows of --data",
        ),
    ],
)
def test_mistakes(base, data_dir, tmp_path, argv, message):
    models = [] if "--model" in argv else ["--model", base]
    with pytest.raises(UserError, match=message):
        command(*models, *argv, "--data_dir", data_dir, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "task, row, message",
    [
        (
            "arc_easy",
            {"question": "x"},
            "samples.jsonl:1: not a row of arc_easy: it has no 'choices'",
        ),
        (
            "arc_easy",
            {"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "B is not one of the choices",
        ),
        (
            "hellaswag",
            {
                "activity_label": "x",
                "ctx_a": "x",
                "ctx_b": "x",
                "endings": ["a"],
                "label": 2,
            },
            "its answer is none of its choices",
        ),
        (
            "winogrande",
            {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "3"},
            "winogrande",
        ),
        (
            "winogrande",
            {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"},
            "no _",
        ),
        (
            "commonsense_qa",
            {"question": 3, "choices": {"text": list("abcde")}, "answerKey": "A"},
            "'question' must be",
        ),
        ("gsm8k", {"question": "x", "answer": None}, "'answer' must be a string"),
    ],
)
def test_rows_that_are_none(tmp_path, task, row, message):
    split = evaluation.TASKS[task].split
    (tmp_path / task).mkdir()
    write_rows(tmp_path / task / f"{split}.jsonl", [row])
    with pytest.raises(UserError, match=message.replace("samples", split)):
        evaluation.read_task(task, settings(data_dir=str(tmp_path), num_fewshot=0))


def test_without_arguments_in_a_process(tmp_path):
    """`python eval.py` in a folder without runs: the embedded base alone, and one line for each
    that is missing."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", "--limit", "8", "--max_new_tokens", "20"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "sft: there is no output/sft yet" in done.stdout
        and "dpo: there is no output/dpo yet" in done.stdout
    )
    assert "| mcqa | accuracy | 8 |" in done.stdout
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", "--tasks", "arc"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: tasks: 'arc'")
        and "Traceback" not in done.stderr
    )


# --- inside training ------------------------------------------------------------------------------


def training_rows(tmp_path, first="A", second="B"):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "word " * (n % 5) + f"number {n}?"},
                {"role": "assistant", "content": f"Answer: {(first, second)[n % 2]}"},
            ],
            "choices": ["A", "B"],
        }
        for n in range(16)
    ]
    return write_rows(tmp_path / f"{first}.jsonl", rows)


def train(base, tmp_path, name, **changes):
    """A run of sft.py; (its folder, its evaluations). The held-out answers are the wrong ones:
    what is learnt of the form makes their loss fall, what is learnt of the answers makes it
    rise."""
    import sft

    options = (
        dict(
            model=base,
            data=training_rows(tmp_path),
            eval_data=training_rows(tmp_path, "B", "A"),
            lora_r=4,
            max_steps=24,
            per_device_train_batch_size=4,
            learning_rate=0.03,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            output_dir=tmp_path / name,
            merge="false",
            eval_answers=0,
            device="cpu",
            lr_scheduler_type="constant",
        )
        | changes
    )
    sft.main(
        [
            str(x)
            for key, value in options.items()
            if value is not None
            for x in (f"--{key}", value)
        ]
    )
    log = [
        line for line in tracking.read_log(tmp_path / name / "log.jsonl") if "eval_loss" in line
    ]
    return tmp_path / name, log


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_training_measures_choices_and_keeps_the_best(base, tmp_path):
    """The lowest held-out loss of the log is the step whose weights adapter/ holds, and rotation
    spared it."""
    folder, log = train(
        base,
        tmp_path,
        "a",
        load_best_model_at_end="true",
        save_total_limit=2,
        learning_rate=0.1,
    )
    assert [line["step"] for line in log] == list(range(25)) and all(
        0 <= line["eval_accuracy"] <= 1 for line in log
    )
    best = min(log[1:], key=lambda line: line["eval_loss"])["step"]
    assert best != 24, "this run was meant to get worse"
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{best:06d}", "checkpoint-000024"]
    assert weights(folder / "adapter") == weights(folder / kept[0]) != weights(folder / kept[1])


def test_a_best_step_between_checkpoints_is_saved(base, tmp_path):
    folder, log = train(
        base,
        tmp_path,
        "a",
        load_best_model_at_end="true",
        save_steps=100,
        learning_rate=0.1,
    )
    best = min(log[1:], key=lambda line: line["eval_loss"])["step"]
    assert best != 24 and (folder / f"checkpoint-{best:06d}").exists()
    assert weights(folder / "adapter") == weights(folder / f"checkpoint-{best:06d}")


@pytest.mark.parametrize(
    "metric, options",
    [
        ("loss", {}),
        ("accuracy", {}),
        ("eval_loss", {"early_stopping_threshold": 0.5}),
        ("loss", {"greater_is_better": "true"}),
    ],
)
def test_stopping_early_as_transformers_does(base, tmp_path, metric, options):
    """The step at which transformers' own EarlyStoppingCallback and best-metric rule would stop on
    the same figures."""
    from transformers import (
        EarlyStoppingCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

    _, log = train(base, tmp_path, "free", learning_rate=0.1, max_steps=10)
    folder, stopped = train(
        base,
        tmp_path,
        "stopped",
        learning_rate=0.1,
        max_steps=10,
        metric_for_best_model=metric,
        early_stopping_patience=2,
        **options,
    )
    name = "eval_" + metric.removeprefix("eval_")
    greater = options.get("greater_is_better") == "true" or name == "eval_accuracy"
    args = TrainingArguments(
        output_dir=str(tmp_path),
        metric_for_best_model=metric,
        greater_is_better=greater,
        eval_strategy="steps",
        report_to="none",
        use_cpu=True,
    )
    callback = EarlyStoppingCallback(2, options.get("early_stopping_threshold", 0.0))
    state, control, last = TrainerState(), TrainerControl(), 10
    for line in log[1:]:
        callback.on_evaluate(args, state, control, metrics=line)
        if state.best_metric is None or (
            line[name] > state.best_metric if greater else line[name] < state.best_metric
        ):
            state.best_metric = line[name]
        if control.should_training_stop:
            last = line["step"]
            break
    assert stopped == log[: last + 1] and (folder / f"checkpoint-{last:06d}").exists()


def test_the_best_and_the_patience_survive_a_resume(base, tmp_path):
    """Stopped at any step and gone on, a run ends as one that never stopped: same step, same best,
    same bytes."""
    import shutil

    options = dict(
        load_best_model_at_end="true",
        early_stopping_patience=2,
        learning_rate=0.1,
        max_steps=24,
    )
    whole, log = train(base, tmp_path, "whole", **options)
    last = log[-1]["step"]
    assert 3 < last < 24
    for cut in (2, last - 1, last):
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "adapter")
        for path in folder.glob("checkpoint-*"):
            if int(path.name[-6:]) > cut:
                shutil.rmtree(path)
        (folder / "config.json").write_text(
            (whole / "config.json").read_text().replace(str(whole), str(folder))
        )
        lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
        (folder / "log.jsonl").write_text("".join(lines[:-1]))  # its end was never written
        again = train(base, tmp_path, folder.name, **options)
        assert again[1] == log and weights(folder / "adapter") == weights(whole / "adapter")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"metric_for_best_model": "acuracy"},
            "the evaluation gives loss, accuracy, f1, not acuracy.*nearest",
        ),
        (
            {"load_best_model_at_end": "true", "save_strategy": "no"},
            "a save_strategy other than no",
        ),
        (
            {"early_stopping_patience": 1, "eval_strategy": "no"},
            "early_stopping_patience: needs an eval_strategy",
        ),
        (
            {"save_strategy": "best", "eval_strategy": "no"},
            "save_strategy best: needs an eval_strategy",
        ),
        (
            {"early_stopping_patience": 1, "eval_data": None},
            "no held-out rows; give eval_data or val_size",
        ),
    ],
)
def test_mistakes_about_the_best(base, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(base, tmp_path, "x", **options)


def test_a_home_of_nobody_is_no_model():
    with pytest.raises(UserError, match="~no-such-user/a: neither a folder nor a hub id"):
        evaluation.find_base("~no-such-user/a")


# --- what a handful of rows can't say -------------------------------------------------------------


def pair_of(gained, lost, same, metric="acc"):
    """Samples of two models: `gained` questions right for b alone, `lost` for a alone."""
    values = [(0.0, 1.0)] * gained + [(1.0, 0.0)] * lost + [(1.0, 1.0)] * same
    sets = {}
    for n, name in enumerate("ab"):
        sets[name] = {"s": [{"metrics": {metric: value[n]}} for value in values]}
    return sets


@pytest.mark.parametrize(
    "gained, lost, same, verdict",
    [
        (3, 0, 0, "too few"),  # three of three: the bootstrap gives [1, 1]
        (0, 0, 1000, "too few"),  # none differs
        (19, 0, 0, "too few"),
        (20, 0, 0, "rose"),
        (5, 0, 1000, "too few"),  # p = 0.0625 at best
        (6, 0, 1000, "rose"),
        (0, 6, 1000, "fell"),
        (8, 1, 12, "rose"),
        (8, 2, 12, "noise"),  # the interval lacks 0, but p = 0.11
    ],
)
def test_a_handful_of_rows_carries_no_verdict(gained, lost, same, verdict):
    from scipy.stats import binomtest

    (found,) = evaluation.compare_all(pair_of(gained, lost, same))
    assert found["verdict"] == verdict and found["n"] == gained + lost + same
    assert (found["low"] is None) == (verdict == "too few" or same == lost == 0)
    assert found["low"] is None or found["low"] < found["high"]
    if gained + lost:
        assert found["mcnemar_p"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
        assert verdict not in ("rose", "fell") or found["mcnemar_p"] < 0.05


@pytest.mark.parametrize("name, better", [("bits_per_byte", -1), ("rougeL", 1)])
def test_values_that_are_no_counts(name, better):
    """Fewer bits are better; a difference that is the same in every row is no chance."""
    values = np.random.default_rng(0).random(40)
    weights = np.ones(40)
    found = evaluation.compare(name, (values, weights), (values + 0.1 * better * values, weights))
    assert found["verdict"] == "rose" and "mcnemar_p" not in found
    few = evaluation.compare(
        name, (values[:19], weights[:19]), (values[:19] + better, weights[:19])
    )
    assert few["verdict"] == "too few" and few["low"] is None


def report_of(samples):
    results = {}
    for name, sets in samples.items():
        results[name] = {task: evaluation.summarise(rows) for task, rows in sets.items()}
    pairs = evaluation.compare_all(samples)
    return report.comparison_report(results, pairs, samples), results, pairs


def test_the_report_says_of_how_many_rows_each_metric_is():
    """Rows with choices and rows with texts in one set: each metric has its own n."""
    choice = {"metrics": {"accuracy": 1.0}, "gold": "Yes", "answer": "Yes"}
    text = {"metrics": {"exact_match": 0.0, "rougeL": 0.25}}
    samples = {name: {"s": [choice] * 30 + [text] * 3} for name in "ab"}
    text, results, _ = report_of(samples)
    assert results["a"]["s"]["accuracy_n"] == 30 and results["a"]["s"]["rougeL_n"] == 3
    assert results["a"]["s"]["f1_n"] == 30 and results["a"]["s"]["n"] == 33
    for line in (
        "| s | accuracy | 30 | 1.0000 | 1.0000 |",  # no ± 0.0000: rows all alike
        "| s | rougeL | 3 | 0.2500 | 0.2500 |",
        "| s | f1 | 30 | 1.0000 | 1.0000 |",
    ):
        assert line in text


def test_the_sentence_covers_every_metric_that_is_shown(tmp_path):
    samples = pair_of(40, 2, 100)
    for name, sets in samples.items():
        sets["t"] = [{"metrics": {"acc": 1.0}, "gold": "Yes", "answer": "Yes"}] * 3
        for n, row in enumerate(sets["s"]):
            row["metrics"]["acc_norm"] = float(n % 2 == 0 and name == "a")
    text, results, pairs = report_of(samples)
    (line,) = report.headlines(results, pairs)
    for task, summary in results["a"].items():
        for name in report.metrics_of(summary):
            assert f"{task} {name}" in line
    assert "rose beyond noise: s acc;" in line and "fell beyond noise: s acc_norm;" in line
    assert "too few rows differ for a verdict: t acc;" in line
    assert "no interval for a score of the whole set: t f1, t precision, t recall" in line
    assert "points (sets: 1)" in line  # three rows are no set
    report.plot_comparison(results, pairs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


# --- own rows: references and recipes -------------------------------------------------------------


@pytest.mark.parametrize(
    "row, reference",
    [
        ({"prompt": "Say ", "reference": "so it is"}, "so it is"),
        ({"question": "Why?", "reference": "so it is"}, "so it is"),
        ({"question": "Why?", "answer": "so it is"}, "so it is"),
        ({"question": "Why?", "completion": "so it is"}, "so it is"),
        ({"messages": [{"role": "user", "content": "Why?"}], "reference": "so"}, "so"),
        ({"prompt": "Say ", "completion": "so", "answer": "x"}, "so"),
        ({"prompt": "Say ", "reference": "so", "answer": None}, "so"),
        ({"prompt": "Say ", "reference": None}, None),
        ({"question": "Why?"}, None),
    ],
)
def test_every_column_that_names_a_reference_is_read(base, tmp_path, row, reference):
    samples, summary = ask(write_rows(tmp_path / "r.jsonl", [row]), base, tmp_path)
    assert samples[0]["reference"] == reference
    assert ("rougeL" in summary) == (reference is not None)


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_conversation_that_ends_in_a_question_asks_that(key, base, tmp_path):
    turns = [("user", "Who?"), ("assistant", "I."), ("user", "Why?")]
    row = {key: [{"role": role, "content": content} for role, content in turns]}
    ((sample,), _) = ask(write_rows(tmp_path / "r.jsonl", [row]), base, tmp_path)
    assert "Why?" in sample["prompt"] and sample["reference"] is None


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completion": "b", "reference": "c"}, "completion and reference"),
        ({"prompt": "a", "question": "b"}, "prompt and question"),
        ({"question": "a", "answer": 4}, "'answer' must be a string, found '4'"),
        ({"prompt": "a", "reference": ["b", "c"]}, "'reference' must be a string"),
        ({"instruction": "a", "output": "b", "reference": "c"}, "'reference' needs a"),
        ({"question": ["a"]}, "'question' must be a string"),
    ],
)
def test_references_that_are_none(base, tmp_path, row, message):
    file = write_rows(tmp_path / "r.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(UserError, match=f"r.jsonl:2: .*{message}"):
        ask(file, base, tmp_path)


ECQA = {"q_text": "Where?", "q_ans": "b", "taskB": "It is so."}
ECQA |= {f"q_op{n}": letter for n, letter in enumerate("abcde", 1)}


def test_own_rows_go_through_a_recipe(base, tmp_path):
    """The same prompts and references as the recipe's rows written out."""
    from data import RECIPES

    source = write_rows(tmp_path / "ecqa.jsonl", [ECQA, ECQA | {"q_ans": "c"}])
    made = [RECIPES["ecqa"](row) for row in (ECQA, ECQA | {"q_ans": "c"})]
    expected, _ = ask(write_rows(tmp_path / "made.jsonl", made), base, tmp_path, "made")
    samples, summary = ask(source, base, tmp_path, "recipe", recipe="ecqa")
    for sample, other in zip(samples, expected):
        assert sample["prompt"] == other["prompt"] and sample["gold"] == other["gold"]
    assert [sample["gold"] for sample in samples] == ["B", "C"] and "accuracy" in summary
    with pytest.raises(UserError, match="ecqa.jsonl:1: fits no schema"):
        ask(source, base, tmp_path, "plain")


def test_what_a_recipe_draws_and_drops(base, tmp_path, capsys):
    rows = [
        {"question": "Why?", "choices": ["a", "b"], "answer": "a", "rationale": "So."},
        {"question": "Who?", "choices": ["a", "b"], "answer": "b", "rationale": "So."},
    ]
    source = write_rows(tmp_path / "q.jsonl", rows)
    config = settings(recipe="mcqa", seed=3)
    assert evaluation.read_own(source, config) == evaluation.read_own(source, config)
    texts = {str(evaluation.read_own(source, settings(recipe="mcqa", seed=n))) for n in range(9)}
    assert len(texts) > 1
    plain = evaluation.read_own(source, settings(recipe="mcqa", recipe_args={"cot": 0}))
    assert not any("<think>" in row["prompt"] for _, row in plain)
    alike = {"response": "x", "overall_score": 3}
    ties = {"instruction": "a", "completions": [alike, alike]}
    wins = {"instruction": "a", "completions": [alike, alike | {"overall_score": 4}]}
    source = write_rows(tmp_path / "u.jsonl", [ties, wins, ties])
    assert len(evaluation.read_own(source, settings(recipe="ultrafeedback"))) == 1
    assert "2 rows are not asked: all completions are rated alike" in capsys.readouterr().out
    with pytest.raises(UserError, match="no rows to ask"):
        evaluation.read_own(
            write_rows(tmp_path / "t.jsonl", [ties]), settings(recipe="ultrafeedback")
        )
    with pytest.raises(UserError, match="recipe: 'eqca' is not one of .*nearest: ecqa"):
        settings(recipe="eqca")
    with pytest.raises(UserError, match="recipe_args: mcqa takes no 'cott'.*nearest: cot"):
        evaluation.read_own(source, settings(recipe="mcqa", recipe_args={"cott": 1}))


# --- which model answered -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "config", "adapter", "alpha"])
def test_other_weights_of_the_same_size_and_time_are_asked_anew(base, adapters, tmp_path, part):
    import shutil

    model, adapter = tmp_path / "m", tmp_path / "a"
    shutil.copytree(base, model)
    shutil.copytree(adapters[0], adapter)
    raw = json.loads((adapter / "adapter_config.json").read_text())
    raw["base_model_name_or_path"] = str(model)
    (adapter / "adapter_config.json").write_text(json.dumps(raw))
    source = write_rows(tmp_path / "t.jsonl", [{"text": "One day a dog ran."}])
    argv = ["--model", f"m={adapter}", "--data", source, "--output_dir", tmp_path / "out"]

    def scored():
        command(*argv)
        return json.loads((tmp_path / "out" / "samples_m_t.jsonl").read_text())

    before = scored()
    assert scored() == before
    file, old, new = {
        "weight": (model / "model.safetensors", None, None),
        "adapter": (adapter / "adapter_model.safetensors", None, None),
        "config": (model / "config.json", '"rope_theta": 1', '"rope_theta": 2'),
        "alpha": (adapter / "adapter_config.json", '"lora_alpha": ', '"lora_alpha": 2'),
    }[part]
    times, content = file.stat(), bytearray(file.read_bytes())
    if old is None:
        content[-2] ^= 0x40  # a bit of the last number's fraction
    else:
        assert old.encode() in content
        content = content.replace(old.encode(), new.encode())
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = scored()
    assert after["key"] != before["key"] and after["logp"] != before["logp"]


def test_the_same_weights_in_another_folder_are_not_asked_again(base, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "copy")
    assert evaluation.hash_weights(base) == evaluation.hash_weights(tmp_path / "copy")


def test_thoughts_are_not_graded():
    """What a template or a model writes before the answer counts on neither side."""

    class Ids:
        decode = staticmethod(str)

    reference, thought = "<think>\n\n</think>\n\nthe cat", "<think>a dog?</think> "
    for text in ("the cat", reference, f"{thought}the cat"):
        graded = evaluation.grade_text(Ids, reference, text)
        assert [*graded["metrics"].values()] == [1.0] * 4 and graded["output"] == text
    assert (
        evaluation.grade_text(Ids, reference, f"{thought}an owl")["metrics"]["exact_match"] == 0
    )

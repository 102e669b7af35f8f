"""Evaluation beside lm-evaluation-harness (hf backend): the same questions, checkpoint and shots.

Every measurement is a fresh process, and the sides take turns (A B A B), so that a machine that
slows down slows down both. The clock starts when rows are read and the model is loaded, and stops
at the metrics: prompts, tokenising, scoring. Weights on both sides in --dtype (auto: bf16, or fp32
on a CPU without bf16 products); lm_eval uses the fastest of --batch_sizes, measured on a quarter of
the questions first. The metrics of both sides are printed, and how many choices differ: in bf16
lm_eval rounds each token's log-probability to three digits, and random weights make choices about
equally likely, so some do. (tests/test_eval.py compares the two in fp32, where none may differ.)

Generation: GSM8K's 5-shot prompts continued greedily by plaintune's generate and by transformers'
generate, sorted by length, each in batches of its fastest of --batch_sizes; new tokens per second,
prompts included in the time.

Needs lm_eval and transformers, and `shared/` beside the repository unless --shared says where.

    python benchmarks/evaluate.py [--model FOLDER] [--tasks arc_challenge,winogrande] [--limit 32]
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

# the benchmark of this folder, before the repository's own sft.py can be meant
from sft import machine, set_up

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
FILES = {  # lm_eval's task files
    "arc_challenge": "arc/arc_challenge",
    "commonsense_qa": "commonsense_qa/default",
    "gsm8k": "gsm8k/gsm8k",
    "winogrande": "winogrande/default",
}


# --------------------------------------------------------------------------------------------------
# The sides, each in its own process: {"seconds", "metrics", "preds"} or {"seconds", "tokens"}


def pick_device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def ours(model, dtype, task, shots, limit, data, **_):
    import eval as plaintune
    from data import Tokenizer
    from model import load_model

    config = SimpleNamespace(
        data_dir=data,
        limit=limit,
        num_fewshot=shots,
        apply_chat_template=False,
        max_new_tokens=256,
        batch_size=1,
    )
    model, tokenizer = load_model(model, dtype, pick_device()), Tokenizer(model)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        items = plaintune.read_task(task, config)
        questions = plaintune.ask_items(items, plaintune.TASKS[task], model, tokenizer, config)
        samples = plaintune.answer_all(model, tokenizer, questions, file, "", config)
        summary = plaintune.summarise(samples)
    seconds = time.perf_counter() - start
    metrics = {name: summary[name] for name in ("acc", "acc_norm") if name in summary}
    return {
        "seconds": seconds,
        "metrics": metrics,
        "preds": [sample["pred"] for sample in samples],
    }


def harness_task(task, data):
    """lm_eval's own task, on the local rows."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{FILES[task]}.yaml")
    config.pop("tag", None)
    split = config.get("test_split") or config["validation_split"]
    file, train = (Path(data) / task / f"{name}.jsonl" for name in (split, "train"))
    files = {split: str(file), "train": str(train if train.exists() else file)}
    local = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    return ConfigurableTask(config=config | local)


def load_transformers(model, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return loaded.eval().to(pick_device())


def theirs(model, dtype, task, shots, limit, data, batch_size):
    import logging

    import lm_eval
    import numpy as np
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    logging.disable(logging.WARNING)
    harness = HFLM(
        pretrained=load_transformers(model, dtype),
        tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=batch_size,
        device=pick_device(),
    )
    options = {
        "tasks": [harness_task(task, data)],
        "num_fewshot": shots,
        "limit": limit,
        "task_manager": TaskManager(include_defaults=False),
        "bootstrap_iters": 1,
    }
    start = time.perf_counter()
    output = lm_eval.simple_evaluate(harness, **options)
    seconds = time.perf_counter() - start
    samples = sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
    preds = [int(np.argmax([resp[0][0] for resp in sample["resps"]])) for sample in samples]
    results = output["results"][task]
    names = [name for name in ("acc", "acc_norm") if f"{name},none" in results]
    metrics = {name: results[f"{name},none"] for name in names}
    return {"seconds": seconds, "metrics": metrics, "preds": preds}


def gsm8k_prompts(model, shots, limit, data):
    """GSM8K's prompts as ids, longest first."""
    import eval as plaintune
    from data import Tokenizer

    config = SimpleNamespace(data_dir=data, limit=limit, num_fewshot=shots)
    tokenizer = Tokenizer(model)
    prompts = []
    for item, examples in plaintune.read_task("gsm8k", config):
        text = plaintune.add_context(item, examples, tokenizer, False)[0][0]
        prompts.append(tokenizer.encode(text))
    return sorted(prompts, key=len, reverse=True)


def ours_generating(model, dtype, shots, limit, data, batch_size, new):
    from model import generate, load_model
    from support.memory import keep_freed_memory

    prompts = gsm8k_prompts(model, shots, limit, data)
    loaded = load_model(model, dtype, pick_device())
    start = time.perf_counter()
    with keep_freed_memory():  # as in eval.py
        answers = generate(loaded, prompts, new, eos_ids=[], batch_size=batch_size)
    return {"seconds": time.perf_counter() - start, "tokens": sum(map(len, answers))}


def theirs_generating(model, dtype, shots, limit, data, batch_size, new):
    import torch

    prompts = gsm8k_prompts(model, shots, limit, data)
    loaded, tokens = load_transformers(model, dtype), 0
    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        longest = max(map(len, batch))
        padding = [longest - len(prompt) for prompt in batch]
        ids = [[0] * n + prompt for n, prompt in zip(padding, batch)]
        mask = [[0] * n + [1] * len(prompt) for n, prompt in zip(padding, batch)]
        output = loaded.generate(
            torch.tensor(ids, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )
        tokens += output.shape[0] * (output.shape[1] - longest)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


SIDES = {
    "ours": ours,
    "theirs": theirs,
    "ours_generating": ours_generating,
    "theirs_generating": theirs_generating,
}


# --------------------------------------------------------------------------------------------------
# Measuring


def measure(side, env, **task):
    command = [
        sys.executable,
        HERE,
        "--child",
        json.dumps({"side": side, **task}, default=str),
    ]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{side} {task}\nexit status {process.returncode}:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def best_size(side, sizes, env, **task):
    """The batch size that is fastest on a quarter of the questions."""
    if len(sizes) == 1:
        return sizes[0]
    task["limit"] = max(2, task["limit"] // 4)
    seconds = {size: measure(side, env, batch_size=size, **task)["seconds"] for size in sizes}
    return min(sizes, key=seconds.get)


def compare_scoring(name, sizes, repeats, env, **task):
    """Prints one task's line -> the median seconds of both sides"""
    size = best_size("theirs", sizes, env, task=name, **task)
    runs = []
    for _ in range(repeats):
        a = measure("ours", env, task=name, **task)
        b = measure("theirs", env, task=name, batch_size=size, **task)
        runs.append((a, b))
    differing = sum(x != y for x, y in zip(a["preds"], b["preds"]))
    ratios = [b["seconds"] / a["seconds"] for a, b in runs]
    seconds = [median(run[side]["seconds"] for run in runs) for side in (0, 1)]
    rates = [task["limit"] / s for s in seconds]
    print(
        f"{name}, {task['shots']}-shot: plaintune {rates[0]:.3g} items/s, lm_eval {rates[1]:.3g} "
        f"(batches of {size}): {median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{a['metrics']} and {b['metrics']}, {differing} of {len(a['preds'])} choices differ",
        flush=True,
    )
    return seconds


def compare_generation(sizes, repeats, env, **task):
    sides, rates = {}, {}
    for side in ("ours_generating", "theirs_generating"):
        sides[side] = best_size(
            side, [s for s in sizes if s <= task["limit"]] or [task["limit"]], env, **task
        )
        rates[side] = []
    for _ in range(repeats):
        for side, size in sides.items():
            result = measure(side, env, batch_size=size, **task)
            rates[side].append(result["tokens"] / result["seconds"])
    a, b = map(median, rates.values())
    print(
        f"gsm8k, {task['shots']}-shot, {task['new']} new tokens: plaintune {a:.4g} tokens/s "
        f"(batches of {sides['ours_generating']}), transformers {b:.4g} "
        f"({sides['theirs_generating']}): {a / b:.2f} x"
    )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add(
        "--shared",
        type=Path,
        default=HERE.parents[2] / "shared",
        help="where data/ and tools/ are",
    )
    add("--model", type=Path, help="checkpoint folder (default: random weights at --shape)")
    add("--shape", default="qwen3-0.6b", help=f"shape to make without --model {shown}")
    add("--layers", type=int, help="layers of that shape (default: all)")
    dtypes = ("auto", "bfloat16", "float32", "float16")
    add("--dtype", default="auto", choices=dtypes, help=f"of the weights on both sides {shown}")
    add("--tasks", default="arc_challenge,commonsense_qa,winogrande", help=shown)
    add("--shots", default="0,5", help=f"few-shot examples {shown}")
    add("--limit", type=int, default=32, help=f"questions of each task {shown}")
    add("--repeats", type=int, default=2, help=f"rounds {shown}")
    add("--batch_sizes", default="1,8,32", help=f"tried for lm_eval and generation {shown}")
    add("--prompts", type=int, default=8, help=f"GSM8K prompts to continue; 0: none {shown}")
    add("--new", type=int, default=64, help=f"new tokens per prompt {shown}")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.child is not None:
        side = SIDES[args.child.pop("side")]
        print(json.dumps(side(**args.child)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        env = set_up(args, Path(folder))
        print(f"{args.dtype} on {machine()}", flush=True)
        common = {"model": args.model, "dtype": args.dtype, "data": args.shared / "data"}
        for shots in map(int, args.shots.split(",")):
            task = common | {"shots": shots, "limit": args.limit}
            a = b = 0
            for name in args.tasks.split(","):
                seconds = compare_scoring(name, sizes, args.repeats, env, **task)
                a, b = a + seconds[0], b + seconds[1]
            print(f"{shots}-shot, all: plaintune {a:.1f} s, lm_eval {b:.1f} s: {b / a:.2f} x")
        if args.prompts:
            task = common | {"shots": 5, "limit": args.prompts, "new": args.new}
            compare_generation(sizes, args.repeats, env, **task)


if __name__ == "__main__":
    main()

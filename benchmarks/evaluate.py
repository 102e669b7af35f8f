"""plaintune beside lm-evaluation-harness (hf backend): the same questions, checkpoint and few-shot examples in one run.

Every measurement is a fresh process, and the sides take turns (A B A B), so that a machine that slows down slows down
for both. What is timed begins with the rows read and the model loaded, and ends with the metrics: prompts, tokenising,
scoring. bf16 weights on both sides; lm_eval gets the best of --batch_sizes, found on a quarter of the questions first.
Both sides' metrics are printed, and how many choices differ: in bf16 lm_eval rounds each token's log-probability to
three digits, and of random weights choices are about equally likely, so some do. (tests/test_eval.py holds the two
against each other in fp32, where none may.)

Generation: GSM8K's 5-shot prompts continued greedily by plaintune's generate and by transformers' generate, sorted by
length and in batches of the best of --batch_sizes for each; new tokens per second, prompts included in the time.

Needs lm_eval and transformers, and `shared/` beside the repository unless --shared says where.

    python benchmarks/evaluate.py [--model FOLDER] [--tasks arc_challenge,winogrande] [--limit 32] [--repeats 2]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
FILES = {
    "arc_challenge": "arc/arc_challenge",
    "commonsense_qa": "commonsense_qa/default",
    "gsm8k": "gsm8k/gsm8k",
    "winogrande": "winogrande/default",
}  # of lm_eval's tasks


# ----------------------------------------------------------------------------------------------------------------------
# The sides, each in a process of its own: {"seconds", "items", "metrics", "preds"} or {"seconds", "tokens"}


def ours(model, task, shots, limit, data, **_):
    import torch

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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(model, "bfloat16", device), Tokenizer(model)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = plaintune.read_task(task, config)
        questions = plaintune.ask_items(found, plaintune.TASKS[task], model, tokenizer, config)
        samples = plaintune.run(
            model, tokenizer, questions, Path(folder) / "samples.jsonl", "", config
        )
        summary = plaintune.summarise(samples)
    seconds = time.perf_counter() - began
    metrics = {name: summary[name] for name in ("acc", "acc_norm") if name in summary}
    return {"seconds": seconds, "metrics": metrics, "preds": [sample["pred"] for sample in samples]}


def theirs(model, task, shots, limit, data, batch_size):
    import logging

    import lm_eval
    import numpy as np
    import torch
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.disable(logging.WARNING)
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{FILES[task]}.yaml")
    config.pop("tag", None)
    split = config.get("test_split") or config["validation_split"]
    file, train = (Path(data) / task / f"{name}.jsonl" for name in (split, "train"))
    files = {split: str(file), "train": str(train if train.exists() else file)}
    built = ConfigurableTask(
        config=config
        | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(device)
    lm = HFLM(
        pretrained=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=batch_size,
        device=device,
    )
    manager, began = TaskManager(include_defaults=False), time.perf_counter()
    found = lm_eval.simple_evaluate(
        lm, tasks=[built], num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=1
    )
    seconds = time.perf_counter() - began
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    metrics = {name: found["results"][task].get(f"{name},none") for name in ("acc", "acc_norm")}
    preds = [int(np.argmax([resp[0][0] for resp in sample["resps"]])) for sample in samples]
    return {
        "seconds": seconds,
        "metrics": {k: v for k, v in metrics.items() if v is not None},
        "preds": preds,
    }


def prompts(model, shots, limit, data):
    """GSM8K's prompts as ids, longest first."""
    import eval as plaintune
    from data import Tokenizer

    config = SimpleNamespace(data_dir=data, limit=limit, num_fewshot=shots)
    tokenizer = Tokenizer(model)
    texts = [
        plaintune.contexts(*at, tokenizer, False)[0][0]
        for at in plaintune.read_task("gsm8k", config)
    ]
    return sorted((tokenizer.encode(text) for text in texts), key=len, reverse=True)


def ours_generating(model, shots, limit, data, batch_size, new, **_):
    from model import generate, keep_freed_memory, load_model

    asked, loaded = prompts(model, shots, limit, data), load_model(model, "bfloat16")
    began = time.perf_counter()
    with keep_freed_memory():  # as eval.py has it
        found = generate(loaded, asked, new, eos_ids=[], batch_size=batch_size)
    return {"seconds": time.perf_counter() - began, "tokens": sum(map(len, found))}


def theirs_generating(model, shots, limit, data, batch_size, new, **_):
    import torch
    from transformers import AutoModelForCausalLM

    asked = prompts(model, shots, limit, data)
    loaded, tokens = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval(), 0
    began = time.perf_counter()
    for part in (asked[at : at + batch_size] for at in range(0, len(asked), batch_size)):
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        out = loaded.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )
        tokens += out.shape[0] * (out.shape[1] - longest)
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


SIDES = {
    "ours": ours,
    "theirs": theirs,
    "ours_generating": ours_generating,
    "theirs_generating": theirs_generating,
}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(side, env, **task):
    command = [sys.executable, HERE, "--child", json.dumps({"side": side, **task}, default=str)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} {task}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best_size(side, sizes, env, **task):
    """The batch size that is fastest on a quarter of the questions."""
    few = task | {"limit": max(2, task["limit"] // 4)}
    if len(sizes) == 1:
        return sizes[0]
    return min(sizes, key=lambda size: measure(side, env, batch_size=size, **few)["seconds"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shared", type=Path, default=HERE.parents[2] / "shared", help="where data/ and tools/ are"
    )
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder (default: random weights at --shape)"
    )
    parser.add_argument(
        "--shape", default="qwen3-0.6b", help="shape to make without --model (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks", default="arc_challenge,commonsense_qa,winogrande", help="(default: %(default)s)"
    )
    parser.add_argument("--shots", default="0,5", help="few-shot examples (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=32, help="questions of each (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="rounds (default: %(default)s)")
    parser.add_argument("--batch_sizes", default="1,8,32", help="tried for lm_eval and generation")
    parser.add_argument(
        "--prompts",
        type=int,
        default=8,
        help="of GSM8K, to continue; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--new", type=int, default=64, help="new tokens each (default: %(default)s)"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return print(json.dumps(SIDES[args.child.pop("side")](**args.child)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sizes, totals = [int(size) for size in args.batch_sizes.split(",")], {}
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(folder) / "hf")}
        if args.model is None:
            args.model = Path(folder) / "model"
            tool = args.shared / "tools/make_checkpoint.py"
            subprocess.run([sys.executable, tool, args.shape, args.model], check=True)
        shared = {"model": args.model, "data": args.shared / "data"}
        for shots in map(int, args.shots.split(",")):
            for name in args.tasks.split(","):
                task, runs = {"task": name, "shots": shots, "limit": args.limit, **shared}, []
                size = best_size("theirs", sizes, env, **task)
                for _ in range(args.repeats):
                    runs.append(
                        (
                            measure("ours", env, **task),
                            measure("theirs", env, batch_size=size, **task),
                        )
                    )
                a, b = runs[-1]
                other = sum(x != y for x, y in zip(a["preds"], b["preds"]))
                speeds = [y["seconds"] / x["seconds"] for x, y in runs]
                totals.setdefault(shots, []).append(
                    [median(r[n]["seconds"] for r in runs) for n in (0, 1)]
                )
                print(
                    f"{name}, {shots}-shot: plaintune {args.limit / totals[shots][-1][0]:.3g} items/s, lm_eval "
                    f"{args.limit / totals[shots][-1][1]:.3g} (batches of {size}): {median(speeds):.2f} x "
                    f"({min(speeds):.2f} to {max(speeds):.2f}); {a['metrics']} and {b['metrics']}, "
                    f"{other} of {len(a['preds'])} choices differ",
                    flush=True,
                )
        for shots, found in totals.items():
            spent = [sum(seconds) for seconds in zip(*found)]
            print(
                f"{shots}-shot, all: plaintune {spent[0]:.1f} s, lm_eval {spent[1]:.1f} s: "
                f"{spent[1] / spent[0]:.2f} x"
            )
        if args.prompts:
            task = {"shots": 5, "limit": args.prompts, "new": args.new, **shared}
            best = {
                side: best_size(side, [s for s in sizes if s <= args.prompts], env, **task)
                for side in ("ours_generating", "theirs_generating")
            }
            runs = [
                [measure(side, env, batch_size=best[side], **task) for side in best]
                for _ in range(args.repeats)
            ]
            mine, other = (median(r[n]["tokens"] / r[n]["seconds"] for r in runs) for n in (0, 1))
            print(
                f"gsm8k, 5-shot, {args.new} new tokens: plaintune {mine:.4g} tokens/s (batches of "
                f"{best['ours_generating']}), transformers {other:.4g} ({best['theirs_generating']}): "
                f"{mine / other:.2f} x"
            )


if __name__ == "__main__":
    main()

"""Bit-exact resume: runs killed with SIGKILL at random moments, and started again, against runs left alone.

Every case trains the embedded model twice by the same command. The first run is left alone. The second is killed over
and over: once in four at any moment of the process, else at one drawn over the time from its first new log line on, so
that a kill falls into a step, a checkpoint half written, an evaluation, the merge. Then the command is run to its end,
and every tensor file of the last checkpoint, of adapter/ and of merged/ has to be equal byte for byte, as have state
and log.jsonl, whose only difference may be what a clock or the memory says. Checkpoints are written every 2 steps, in
mid-epoch; steps are accumulated from several micro-batches; dropout is on.

    python benchmarks/resume.py [--kills 50] [--cases lora,dpo-qlora] [--seed 0]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "mcqa"
COMMON = """--max_samples 56 --max_eval_samples 24 --eval_answers 0 --per_device_train_batch_size 4
    --gradient_accumulation_steps 2 --micro_batch_tokens 256 --num_train_epochs 2 --lora_r 8 --lora_dropout 0.1
    --save_steps 2 --logging_steps 1 --eval_strategy epoch --save_total_limit 2"""
CASES = {
    "lora": ("sft", "--weight_decay 0.1"),
    "lora-bf16-checkpointing": (
        "sft",
        "--dtype bfloat16 --gradient_checkpointing true --loraplus_lr_ratio 4",
    ),
    "lora-fp16-scaler": ("sft", "--dtype float16"),
    "lora-adamw_8bit": ("sft", "--optim adamw_8bit --lora_r 32"),
    "lora-norms-best-step": (
        "sft",
        "--modules_to_save norm --use_rslora true --load_best_model_at_end true "
        "--early_stopping_patience 2 --eval_strategy steps --eval_steps 3",
    ),
    "lora-drawing-recipe": (
        "sft",
        '--recipe mcqa --recipe_args {"cot":0.5} --val_size 8',
    ),  # data: see `command`
    "dora": ("sft", "--use_dora true"),
    "pissa": ("sft", "--init_lora_weights pissa"),
    "qlora-paged_adamw_8bit": ("sft", "--load_in_4bit true --optim paged_adamw_8bit"),
    "qlora-loftq": ("sft", "--load_in_4bit true --init_lora_weights loftq"),
    "full": ("sft", "--lora_r 0 --learning_rate 1e-3"),
    "full-adamw_8bit": ("sft", "--lora_r 0 --learning_rate 1e-3 --optim adamw_8bit"),
    "dpo": ("dpo", "--disable_dropout false --rpo_alpha 0.5"),
    "dpo-qlora-paged_adamw_8bit": (
        "dpo",
        "--load_in_4bit true --optim paged_adamw_8bit --disable_dropout false",
    ),
    "dpo-full-aot": ("dpo", "--lora_r 0 --loss_type aot ipo"),
}
TIMED = {
    "tokens_per_second",
    "examples_per_second",
    "peak_memory_gb",
    "predicted_memory_gb",
    "train_runtime",
    "seconds",
    "share_of_roof",
}


def command(case, out):
    script, settings = CASES[case]
    kind = "_pairs" * (script == "dpo")
    given = {
        "model": ROOT / "examples" / "tiny-qwen3",
        "data": DATA / f"train{kind}.jsonl",
        "output_dir": out,
    }
    if "--recipe" in settings:  # rows of two sources at two weights, drawn anew in every epoch
        rows = [
            {
                "question": f"What is {n} plus 3?",
                "choices": [f"{n + 1}", f"{n + 3}", f"{n + 4}"],
                "answer": "B",
                "rationale": f"3 and {n} make {n + 3}.",
            }
            for n in range(40)
        ]
        for name, part in (("few", rows[:10]), ("many", rows[10:])):
            (out.parent / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
        given["data"] = [f"{out.parent}/few.jsonl@3", f"{out.parent}/many.jsonl@1"]
    else:
        given["eval_data"] = DATA / f"validation{kind}.jsonl"
    if script == "dpo":
        given["ref_cache"] = f"{out}-reference"
    flags = [
        word
        for key, value in given.items()
        for word in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]
    return [sys.executable, str(ROOT / f"{script}.py"), *flags, *COMMON.split(), *settings.split()]


def start(case, out):
    one_thread = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # another number of threads adds up in another order
    with open(f"{out}.txt", "a") as output:
        return subprocess.Popen(
            command(case, out), env=one_thread, stdout=output, stderr=subprocess.STDOUT
        )


def finish(case, out, process):
    if process.wait():
        sys.exit(f"{case} failed:\n{Path(f'{out}.txt').read_text()[-2000:]}")


def kill(case, out, draw, seconds):
    """Starts the command and kills it; returns what it was at, '' where it had ended before."""
    log, process = out / "log.jsonl", start(case, out)
    before = log.stat().st_mtime_ns if log.exists() else 0
    if draw.random() < 0.25:
        delay = draw.uniform(0, seconds["all"])
    else:
        while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns != before):
            time.sleep(0.002)
        delay = draw.uniform(0, seconds["trained"])
    try:
        process.wait(delay)
        return ""
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if aside := sorted(p.name for p in out.glob(".*.partial")) if out.exists() else []:
        return f"writing {aside[0].split('.')[1].split('-')[0]}"
    if not log.exists() or log.stat().st_mtime_ns == before:
        return "starting"
    return "finishing" if (out / "adapter").exists() or (out / "merged").exists() else "training"


def lines(out):
    """The log without what a clock or the memory says."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in found]


def content(out):
    """{name: bytes or values} of all that has to be equal."""
    (*_, checkpoint) = sorted(out.glob("checkpoint-*"))
    folders = [checkpoint, *(out / name for name in ("adapter", "merged") if (out / name).exists())]
    found = {
        f"{f.name}/{p.name}": p.read_bytes()
        for f in folders
        for p in f.iterdir()
        if p.suffix == ".safetensors"
    }
    state = json.loads((checkpoint / "state.json").read_text())
    return {
        **found,
        "state": {k: v for k, v in state.items() if k != "log_bytes"},
        "log": lines(out),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases, draw, broken, total = args.cases.split(","), random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for n, case in enumerate(cases):
            whole, killed = Path(folder, case, "whole"), Path(folder, case, "killed")
            whole.parent.mkdir()
            began, process = time.time(), start(case, whole)
            while process.poll() is None and not (whole / "log.jsonl").exists():
                time.sleep(0.01)
            logged = time.time()
            finish(case, whole, process)
            trained = max(path.stat().st_mtime for path in whole.glob("checkpoint-*")) - logged
            seconds = {"all": time.time() - began, "trained": 1.2 * trained}
            hits, tries = [], args.kills // len(cases) + (n < args.kills % len(cases))
            while len(hits) < tries:
                if hit := kill(case, killed, draw, seconds):
                    hits.append(hit)
                else:  # it had ended: from the start again
                    subprocess.run(["rm", "-r", killed], check=True)
            finish(case, killed, start(case, killed))
            a, b = content(whole), content(killed)
            differ = [name for name in {**a, **b} if a.get(name) != b.get(name)]
            size = sum(len(value) for value in a.values() if isinstance(value, bytes))
            broken, total = broken + bool(differ), total + len(hits)
            told = f"equal: {len(a) - 2} files of {size:,} bytes, state, {len(a['log'])} log lines"
            told = f"DIFFER: {', '.join(differ)}" if differ else told
            print(f"{case:28} {len(hits)} kills ({', '.join(hits)}): {told}", flush=True)
    print(f"{total} kills, {len(cases)} cases, {broken} of them not equal")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()

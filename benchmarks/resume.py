"""Bit-exact resume: runs killed at random moments and restarted, against undisturbed runs.

Every case trains the embedded model twice with the same command. The first run is left alone. The
second is killed again and again: one kill in four at any moment of the process, the others at a
random time after its first new log line, so that kills hit a step, a half-written checkpoint, an
evaluation, the merge. Then the command runs to its end, and every tensor file of the last
checkpoint, of adapter/ and of merged/ must be equal byte for byte, and so must the state and
log.jsonl, except for times and memory. Checkpoints are written every 2 steps, in mid-epoch; a step
has several micro-batches; dropout is on.

    python benchmarks/resume.py [--kills 50] [--cases lora,dpo-qlora-paged_adamw_8bit] [--seed 0]
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "mcqa"
COMMON = """
    --max_samples 56 --max_eval_samples 24 --eval_answers 0 --per_device_train_batch_size 4
    --gradient_accumulation_steps 2 --micro_batch_tokens 256 --num_train_epochs 2 --lora_r 8
    --lora_dropout 0.1 --save_steps 2 --logging_steps 1 --eval_strategy epoch --save_total_limit 2
"""
BEST_STEP = """
    --modules_to_save norm --use_rslora true --load_best_model_at_end true
    --early_stopping_patience 2 --eval_strategy steps --eval_steps 3
"""
BF16 = "--dtype bfloat16 --gradient_checkpointing true --loraplus_lr_ratio 4"
QLORA = "--load_in_4bit true --optim paged_adamw_8bit"
FULL = "--lora_r 0 --learning_rate 1e-3"
RECIPE = '--recipe mcqa --recipe_args {"cot":0.5} --val_size 8'  # its data: see `command`
CASES = {
    "lora": ("sft", "--weight_decay 0.1"),
    "lora-bf16-checkpointing": ("sft", BF16),
    "lora-fp16-scaler": ("sft", "--dtype float16"),
    "lora-adamw_8bit": ("sft", "--optim adamw_8bit --lora_r 32"),
    "lora-norms-best-step": ("sft", BEST_STEP),
    "lora-drawing-recipe": ("sft", RECIPE),
    "dora": ("sft", "--use_dora true"),
    "pissa": ("sft", "--init_lora_weights pissa"),
    "qlora-paged_adamw_8bit": ("sft", QLORA),
    "qlora-loftq": ("sft", "--load_in_4bit true --init_lora_weights loftq"),
    "full": ("sft", FULL),
    "full-adamw_8bit": ("sft", f"{FULL} --optim adamw_8bit"),
    "dpo": ("dpo", "--disable_dropout false --rpo_alpha 0.5"),
    "dpo-qlora-paged_adamw_8bit": ("dpo", f"{QLORA} --disable_dropout false"),
    "dpo-full-aot": ("dpo", "--lora_r 0 --loss_type aot ipo"),
}
# log values that depend on the clock or on memory
MEASURED = {
    "tokens_per_second",
    "examples_per_second",
    "peak_memory_gb",
    "train_runtime",
    "seconds",
}


def write_recipe_rows(folder):
    """Rows of two sources with different weights, sampled anew in every epoch -> value of --data"""
    rows = []
    for n in range(40):
        choices = [f"{n + 1}", f"{n + 3}", f"{n + 4}"]
        rationale = f"3 and {n} make {n + 3}."
        question = {"question": f"What is {n} plus 3?", "choices": choices, "answer": "B"}
        rows.append(question | {"rationale": rationale})
    for name, source in (("few", rows[:10]), ("many", rows[10:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, source)))
    return [f"{folder}/few.jsonl@3", f"{folder}/many.jsonl@1"]


def command(case, out):
    script, settings = CASES[case]
    suffix = "_pairs" if script == "dpo" else ""
    flags = ["--model", ROOT / "examples" / "tiny-qwen3", "--output_dir", out]
    if "--recipe" in settings:
        flags += ["--data", *write_recipe_rows(out.parent)]
    else:
        flags += ["--data", DATA / f"train{suffix}.jsonl"]
        flags += ["--eval_data", DATA / f"validation{suffix}.jsonl"]
    if script == "dpo":
        flags += ["--ref_cache", f"{out}-reference"]
    script = ROOT / f"{script}.py"
    return [sys.executable, script, *flags, *COMMON.split(), *settings.split()]


def start(case, out):
    # with another number of threads, sums are added in another order
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{out}.txt", "a") as console:
        return subprocess.Popen(
            command(case, out), env=one_thread, stdout=console, stderr=subprocess.STDOUT
        )


def wait(case, out, process):
    if process.wait():
        sys.exit(f"{case} failed:\n{Path(f'{out}.txt').read_text()[-2000:]}")


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def kill(case, out, rng, seconds):
    """Starts the command and kills it -> what it was doing, '' where it had ended before."""
    log = out / "log.jsonl"
    before = modified(log)
    process = start(case, out)
    if rng.random() < 0.25:
        delay = rng.uniform(0, seconds["all"])
    else:
        while process.poll() is None and modified(log) in (0, before):
            time.sleep(0.002)
        delay = rng.uniform(0, seconds["trained"])
    try:
        process.wait(delay)
        return ""
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    unfinished = sorted(path.name for path in out.glob(".*.partial"))
    if unfinished:  # .checkpoint-4.partial
        return f"writing {unfinished[0].split('.')[1].split('-')[0]}"
    if modified(log) in (0, before):
        return "starting"
    if (out / "adapter").exists() or (out / "merged").exists():
        return "exporting"
    return "training"


def log_lines(out):
    """The log without its times and memory."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def content(out):
    """{name: bytes or values} of everything that must be equal."""
    *_, checkpoint = sorted(out.glob("checkpoint-*"))
    files = {}
    for folder in (checkpoint, out / "adapter", out / "merged"):
        for path in folder.glob("*.safetensors"):
            files[f"{folder.name}/{path.name}"] = path.read_bytes()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["log_bytes"]  # the length of the log, with its times
    return files | {"state": state, "log": log_lines(out)}


def undisturbed(case, out):
    """Runs the command to its end -> {"all", "trained"}: seconds of the process, and of training"""
    began = time.time()
    process = start(case, out)
    while process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.01)
    logged = time.time()
    wait(case, out, process)
    ended = time.time()
    last = max(path.stat().st_mtime for path in out.glob("checkpoint-*"))
    return {"all": ended - began, "trained": 1.2 * (last - logged)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases, rng, unequal, total = args.cases.split(","), random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for n, case in enumerate(cases):
            whole, killed = Path(folder, case, "whole"), Path(folder, case, "killed")
            whole.parent.mkdir()
            seconds = undisturbed(case, whole)
            kills = args.kills // len(cases) + (n < args.kills % len(cases))
            moments = []
            while len(moments) < kills:
                moment = kill(case, killed, rng, seconds)
                if moment:
                    moments.append(moment)
                else:  # it had ended: from the start again
                    shutil.rmtree(killed)
            wait(case, killed, start(case, killed))
            a, b = content(whole), content(killed)
            differing = [name for name in a | b if a.get(name) != b.get(name)]
            unequal, total = unequal + bool(differing), total + len(moments)
            size = sum(len(value) for value in a.values() if isinstance(value, bytes))
            result = (
                f"equal: {len(a) - 2} files of {size:,} bytes, state, {len(a['log'])} log lines"
            )
            if differing:
                result = f"DIFFER: {', '.join(differing)}"
            print(
                f"{case:28} {len(moments)} kills ({', '.join(moments)}): {result}",
                flush=True,
            )
    print(f"{total} kills, {len(cases)} cases, {unequal} of them not equal")
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()

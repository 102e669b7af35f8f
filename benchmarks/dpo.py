"""plaintune beside TRL's DPOTrainer + PEFT: the same pairs, checkpoint and LoRA, in one run.

Measured as in sft.py in this folder: fresh processes that take turns, one step's pairs repeated,
the first step left out, times and memory measured from outside. What DPO adds is the reference
model. TRL's default computes it in every step; plaintune and TRL with precompute_ref_log_probs
compute it once, before the first. Each side reports the time of that pass, and over one epoch a
pair costs its share of a step and of the pass: `pairs/s` is for one epoch, `3 epochs` for three.

- plaintune        `python dpo.py` as a user runs it; the reference from the model itself, a prompt
                   computed once per pair
- trl              DPOTrainer with its defaults: batches of 8 pairs, padded, gradient checkpointing,
                   autocast where --dtype is bf16
- trl-precompute   the same with precompute_ref_log_probs
- trl-tuned        trl-precompute with the settings TUNED
                   (--trl_tuned '{"per_device_train_batch_size": 4}' tries others)

All sides: weights and products in --dtype, LoRA (r 16, alpha 32) on the seven projections, AdamW at
5e-5 with linear decay, beta 0.1. TRL would also score the newline that the template writes after an
answer; its rows are cut here, so that the scored tokens must agree (they are checked) and losses
and margins can be compared.

Needs trl, peft and transformers, and `shared/` beside the repository unless --shared says where.

    python benchmarks/dpo.py [--model FOLDER] [--sets ecqa,ultrafeedback] [--pairs 8] [--steps 1]
"""

import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

# the benchmark of this folder: a script's own folder comes first
from sft import (
    BATCH,
    by_set,
    log_callback,
    make_parser,
    print_medians,
    ratios,
    read_run,
    script_command,
    set_up,
    trl_data,
    trl_settings,
    watch,
)
from sft import child_command as roof_command

HERE = Path(__file__).resolve()
# little padding, nothing computed twice
TUNED = {"per_device_train_batch_size": 2, "gradient_checkpointing": False}


def ecqa(shared):
    """ECQA: a question and five choices -> the explanation and right letter, the points against and
    a wrong letter."""
    with open(shared / "data/ecqa/val.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            choices = [row[f"q_op{i}"] for i in range(1, 6)]
            right = choices.index(row["q_ans"])
            wrong = (right + 1) % 5
            lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices)]
            chosen = f"{row['taskB']}\nAnswer: {'ABCDE'[right]}"
            rejected = f"{row['taskA_neg']}\nAnswer: {'ABCDE'[wrong]}"
            yield "\n".join([row["q_text"], *lines]), chosen, rejected


def ultrafeedback(shared):
    with open(shared / "data/ultrafeedback/train.jsonl", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["prompt"], row["chosen"], row["rejected"]


# the most characters of a pair: no side truncates any
SETS = {"ecqa": (ecqa, 2500), "ultrafeedback": (ultrafeedback, 3600)}


# --------------------------------------------------------------------------------------------------
# The sides. Each writes log.jsonl and data_report.json into `out`, and prints the time of the
# reference pass


def plaintune_command(model, data, out, steps, pairs, dtype):
    return script_command(
        "dpo.py",
        dtype=dtype,
        model=model,
        data=data,
        output_dir=out,
        ref_cache=out.parent / "reference",
        max_steps=steps,
        gradient_accumulation_steps=pairs // BATCH,
        learning_rate=5e-5,
        max_length=2048,
    )


def trl_side(side, model, data, out, steps, pairs, dtype, **overrides):
    """DPOTrainer, in its own process. `overrides` replace settings of trl-tuned."""
    from trl import DPOConfig, DPOTrainer

    out = Path(out)
    settings = trl_settings(
        out,
        steps,
        dtype,
        learning_rate=5e-5,
        max_length=2048,
        precompute_ref_log_probs=side != "trl",
        model_init_kwargs={"dtype": dtype, "attn_implementation": "sdpa"},
    )
    if side == "trl-tuned":
        settings |= TUNED | overrides
    settings["gradient_accumulation_steps"] = pairs // settings["per_device_train_batch_size"]

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, processing_class, *args):
            keys, end = ("chosen_ids", "rejected_ids"), processing_class.eos_token_id

            def until_end(row):
                return {key: row[key][: row[key].index(end) + 1] for key in keys}

            dataset = super()._prepare_dataset(dataset, processing_class, *args).map(until_end)
            scored = sum(len(ids) for key in keys for ids in dataset[key])
            (out / "data_report.json").write_text(json.dumps({"train": {"scored": scored}}))
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            start = time.perf_counter()
            logps = super()._precompute_ref_logps(*args, **kwargs)
            print(f"reference: scored in {time.perf_counter() - start:.2f} s", flush=True)
            return logps

    trainer = Trainer(
        args=DPOConfig(**settings),
        callbacks=[log_callback(out, "loss", "rewards/margins")],
        **trl_data(model, data),
    )
    trainer.train()


# --------------------------------------------------------------------------------------------------
# Measuring


def measure(side, name, n, rows, folder, args, env):
    """One measurement -> the values of its JSON line."""
    data, out = folder / f"{name}-{n}.jsonl", folder / f"{name}-{n}-{side}"
    with open(data, "w", encoding="utf-8") as file:
        for prompt, chosen, rejected in rows:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            file.write(json.dumps(row) + "\n")
    # so that no round reads the reference of another
    shutil.rmtree(folder / "reference", ignore_errors=True)
    task = dict(model=args.model, data=data, out=out, steps=args.steps + 1, pairs=len(rows))
    task["dtype"] = args.dtype
    if side == "plaintune":
        command = plaintune_command(**task)
    else:
        task_json = json.dumps(task | {"side": side} | args.trl_tuned, default=str)
        command = [sys.executable, HERE, "--child", task_json]
    seen, peak = watch(command, out, env)
    lines, ledger = read_run(side, out, task["steps"], seen)
    console = out.with_suffix(".txt").read_text()
    passes = re.findall(r"reference: .*scored in ([\d.]+) s", console)
    if side != "trl" and not passes:
        sys.exit(f"{side}: its output names no time of the reference pass:\n{console[-3000:]}")
    step, reference = (seen[args.steps] - seen[0]) / args.steps, sum(map(float, passes))
    gpu = {"peak_gpu_gb": lines[-1]["peak_memory_gb"]} if args.cuda else {}
    return {
        "set": name,
        "round": n,
        "side": side,
        "pairs_per_second": len(rows) / (step + reference),
        "pairs_per_second_3_epochs": len(rows) / (step + reference / 3),
        "step_seconds": step,
        "reference_seconds": reference,
        "first_step_done": seen[0],
        "peak_gb": peak["VmHWM"],
        "peak_anon_gb": peak["RssAnon"],
        **gpu,
        "pairs": len(rows),
        "scored_tokens": ledger["scored"],
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "last_margin": lines[-1]["rewards/margins"],
    }


COLUMNS = {
    "pairs/s": "pairs_per_second",
    "3 epochs": "pairs_per_second_3_epochs",
    "step s": "step_seconds",
    "reference s": "reference_seconds",
    "1st step at": "first_step_done",
    "peak GB": "peak_gb",
    "anon GB": "peak_anon_gb",
    "scored": "scored_tokens",
    "first loss": "first_loss",
    "last loss": "last_loss",
    "last margin": "last_margin",
}


def report(results, cuda):
    """Prints the median of every side, and the medians of the rounds' ratios."""
    memory = "peak_gpu_gb" if cuda else "peak_gb"
    for name, sides in by_set(results).items():
        title = f"{name}, {results[0]['pairs']} pairs a step"
        print_medians(title, sides, COLUMNS | {"peak GB": memory})
        ours = sides.pop("plaintune", None)
        if ours is None:
            continue
        for side, runs in sides.items():
            once = ratios(ours, runs, "pairs_per_second")
            thrice = ratios(ours, runs, "pairs_per_second_3_epochs")
            space = median(ratios(ours, runs, memory))
            print(
                f"plaintune / {side}: {median(once):.2f} x the speed ({min(once):.2f} to "
                f"{max(once):.2f}), {median(thrice):.2f} x over three epochs, "
                f"{space:.2f} x the memory"
            )
            more = [b["scored_tokens"] - a["scored_tokens"] for a, b in zip(ours, runs)]
            if any(more):
                print(f"  but {side} scores {more} tokens more")


def main():
    sides = "plaintune,trl,trl-precompute,trl-tuned"
    parser = make_parser(__doc__, sets="ecqa,ultrafeedback", sides=sides)
    parser.add_argument(
        "--pairs", type=int, default=8, help="pairs a step, a multiple of 8 (default: 8)"
    )
    parser.add_argument(
        "--trl_tuned", type=json.loads, default={}, help="JSON: DPOConfig fields over TUNED"
    )
    args = parser.parse_args()
    if args.child is not None:
        return trl_side(**args.child)
    if args.pairs < BATCH or args.pairs % BATCH:
        parser.error(f"--pairs {args.pairs}: must be a multiple of {BATCH}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # remove child and folder
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        env = set_up(args, folder)
        roof = json.loads(subprocess.check_output(roof_command(dtype=args.dtype), env=env))
        args.cuda = roof["cuda"]
        for n in range(args.repeats):
            for name in args.sets.split(","):
                read, longest = SETS[name]
                rows = [row for row in read(args.shared) if row[1] != row[2]]
                rows = [row for row in rows if sum(map(len, row)) <= longest]
                random.Random(0).shuffle(rows)
                rows = rows[n * args.pairs : (n + 1) * args.pairs]
                for side in args.sides.split(","):
                    results.append(measure(side, name, n, rows, folder, args, env))
                    print(json.dumps(results[-1]), flush=True)
    report(results, args.cuda)
    print(
        f"\nroof: {roof['flops'] / 1e9:.0f} GFLOP/s, a {roof['dtype']} product of "
        f"(2048 x 1024) and (1024 x 3072) on {roof['machine']}"
    )


if __name__ == "__main__":
    main()

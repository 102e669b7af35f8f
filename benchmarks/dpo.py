"""plaintune beside TRL's DPOTrainer + PEFT: the same pairs, checkpoint and LoRA, in one run.

Measured as in sft.py beside this: fresh processes that take turns, a step's pairs taken again and again, the first step
left out, times and memory noted from outside. What DPO adds is the reference. TRL's default computes it in every step;
plaintune and TRL with precompute_ref_log_probs compute it once, before the first. Each side says how long that pass
took, and one epoch costs a pair its share of a step and of the pass: `pairs/s` is of one epoch, `3 epochs` of three.

- plaintune        `python dpo.py` as a user runs it; the reference from the model itself, a prompt computed once a pair
- trl              DPOTrainer with its defaults: batches of 8 pairs, padded, gradient checkpointing, bf16 autocast
- trl-precompute   the same with precompute_ref_log_probs
- trl-tuned        trl-precompute with TUNED over it (--trl_tuned '{"per_device_train_batch_size": 4}' tries others)
All of them: bf16 weights, LoRA (r 16, alpha 32) on the seven projections, AdamW at 5e-5 falling linearly, beta 0.1.
TRL would also score the newline that the template writes after an answer; here it is told not to, so that scored tokens
must agree (they are checked) and losses and margins can be laid side by side.

Needs trl, peft and transformers, and `shared/` beside the repository unless --shared says where.

    python benchmarks/dpo.py [--model FOLDER] [--sets ecqa,ultrafeedback] [--pairs 8] [--steps 1] [--repeats 2]
"""

import argparse
import csv
import json
import os
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

from sft import child_command as sft_child
from sft import (
    watch,  # the benchmark beside this one: a script's own folder comes first
)

HERE = Path(__file__).resolve()
BATCH = 8  # per_device_train_batch_size: TRL's default
TUNED = {
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
}  # little padding, nothing computed twice


def ecqa(shared):
    """ECQA: a question and five choices -> the explanation and right letter, the points against and a wrong letter."""
    for row in csv.DictReader((shared / "data/ecqa/val.csv").open(newline="", encoding="utf-8")):
        choices = [row[f"q_op{i}"] for i in range(1, 6)]
        right = choices.index(row["q_ans"])
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices)]
        yield ("\n".join([row["q_text"], *lines]), f"{row['taskB']}\nAnswer: {'ABCDE'[right]}",
               f"{row['taskA_neg']}\nAnswer: {'ABCDE'[(right + 1) % 5]}")  # fmt: skip


def ultrafeedback(shared):
    for line in (shared / "data/ultrafeedback/train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        yield row["prompt"], row["chosen"], row["rejected"]


SETS = {
    "ecqa": (ecqa, 2500),
    "ultrafeedback": (ultrafeedback, 3600),
}  # most characters of a pair: no side cuts any


# ----------------------------------------------------------------------------------------------------------------------
# The sides. Each writes log.jsonl into `out`, and on its console how long the reference's pass took


def plaintune_command(model, data, out, steps, pairs, **_):
    settings = dict(
        model=model, data=data, output_dir=out, ref_cache=out.parent / "reference", max_steps=steps,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=pairs // BATCH, learning_rate=5e-5,
        lr_scheduler_type="linear", warmup_ratio=0, lora_r=16, lora_alpha=32, max_length=2048, logging_steps=1,
        save_strategy="no", eval_strategy="no", merge="false", report_to="none",
    )  # fmt: skip
    return [
        sys.executable,
        HERE.parents[1] / "dpo.py",
        *(str(x) for k, v in settings.items() for x in (f"--{k}", v)),
    ]


def trl_side(side, model, data, out, steps, pairs, **tuned):
    """DPOTrainer, in a process of its own."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    out, cuda = Path(out), torch.cuda.is_available()
    settings = dict(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=5e-5, logging_steps=1,
        max_length=2048, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda,
        precompute_ref_log_probs=side != "trl", model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa"},
    ) | (TUNED | tuned if side == "trl-tuned" else {})  # fmt: skip
    settings["gradient_accumulation_steps"] = pairs // settings["per_device_train_batch_size"]

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, processing_class, *args):
            end = processing_class.eos_token_id
            cut = lambda ids: ids[: ids.index(end) + 1]
            dataset = super()._prepare_dataset(dataset, processing_class, *args)
            dataset = dataset.map(
                lambda row: {key: cut(row[key]) for key in ("chosen_ids", "rejected_ids")}
            )
            scored = sum(len(ids) for key in ("chosen_ids", "rejected_ids") for ids in dataset[key])
            (out / "data_report.json").write_text(json.dumps({"train": {"scored": scored}}))
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            print(f"reference: scored in {time.perf_counter() - began:.2f} s", flush=True)
            return found

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                line = {
                    "step": state.global_step,
                    "loss": logs["loss"],
                    "rewards/margins": logs["rewards/margins"],
                }
                if cuda:
                    line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")

    Trainer(
        model=str(model),
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(
            [json.loads(line) for line in open(data, encoding="utf-8")]
        ),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Log()],
    ).train()


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(side, name, n, rows, folder, args, env):
    """One measurement -> what it found, for its JSON line."""
    data, out = folder / f"{name}-{n}.jsonl", folder / f"{name}-{n}-{side}"
    say = lambda role, text: [{"role": role, "content": text}]
    chats = [{"prompt": say("user", a), "chosen": say("assistant", b), "rejected": say("assistant", c)}
             for a, b, c in rows]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    shutil.rmtree(
        folder / "reference", ignore_errors=True
    )  # or a second round would find the first one's
    task = dict(model=args.model, data=data, out=out, steps=args.steps + 1, pairs=len(rows))
    child = [
        sys.executable,
        HERE,
        "--child",
        json.dumps(task | {"side": side} | args.trl_tuned, default=str),
    ]
    seen, peak = watch(plaintune_command(**task) if side == "plaintune" else child, out, env)
    lines = [
        line
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    passed = re.findall(r"reference: .*scored in ([\d.]+) s", out.with_suffix(".txt").read_text())
    scored = json.loads((out / "data_report.json").read_text())["train"]["scored"]
    shutil.rmtree(out)
    if len(lines) != task["steps"] or len(seen) < task["steps"]:
        sys.exit(f"{side}: {len(lines)} steps in its log, expected {task['steps']}")
    step, reference = (seen[args.steps] - seen[0]) / args.steps, sum(map(float, passed))
    gpu = {"peak_gpu_gb": lines[-1]["peak_memory_gb"]} if args.cuda else {}
    return {
        "set": name, "round": n, "side": side, "pairs_per_second": len(rows) / (step + reference),
        "pairs_per_second_3_epochs": len(rows) / (step + reference / 3), "step_seconds": step,
        "reference_seconds": reference, "first_step_done": seen[0], "peak_gb": peak["VmHWM"],
        "peak_anon_gb": peak["RssAnon"], **gpu, "pairs": len(rows), "scored_tokens": scored,
        "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"], "last_margin": lines[-1]["rewards/margins"],
    }  # fmt: skip


def report(results, cuda):
    """Prints the median of every side, and the medians of the rounds' ratios."""
    memory = "peak_gpu_gb" if cuda else "peak_gb"
    columns = {
        "pairs/s": "pairs_per_second", "3 epochs": "pairs_per_second_3_epochs", "step s": "step_seconds",
        "reference s": "reference_seconds", "1st step at": "first_step_done", "peak GB": memory,
        "anon GB": "peak_anon_gb", "scored": "scored_tokens", "first loss": "first_loss", "last loss": "last_loss",
        "last margin": "last_margin",
    }  # fmt: skip
    for name in dict.fromkeys(r["set"] for r in results):
        sides = {}
        for r in results:
            if r["set"] == name:
                sides.setdefault(r["side"], []).append(r)
        print(
            f"\n{name}, {results[0]['pairs']} pairs a step, median of {len(next(iter(sides.values())))}"
        )
        print(f"{'':>15}" + "".join(f"{title:>12}" for title in columns))
        for side, runs in sides.items():
            print(
                f"{side:>15}"
                + "".join(f"{median(r[key] for r in runs):>12.5g}" for key in columns.values())
            )
        ours = sides.pop("plaintune", [])
        for side, runs in sides.items() if ours else ():
            one, three = ([a[key] / b[key] for a, b in zip(ours, runs)]
                          for key in ("pairs_per_second", "pairs_per_second_3_epochs"))  # fmt: skip
            space = median(a[memory] / b[memory] for a, b in zip(ours, runs))
            print(f"plaintune / {side}: {median(one):.2f} x the speed ({min(one):.2f} to {max(one):.2f}), "
                  f"{median(three):.2f} x over three epochs, {space:.2f} x the memory")  # fmt: skip
            if any(a["scored_tokens"] != b["scored_tokens"] for a, b in zip(ours, runs)):
                more = [b["scored_tokens"] - a["scored_tokens"] for a, b in zip(ours, runs)]
                print(f"  but {side} scores {more} tokens more")


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
    parser.add_argument("--sets", default="ecqa,ultrafeedback", help="(default: %(default)s)")
    parser.add_argument(
        "--sides", default="plaintune,trl,trl-precompute,trl-tuned", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=int, default=8, help="pairs a step, a multiple of 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=2, help="steps measured after the first (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="rounds, each with other pairs (default: %(default)s)",
    )
    parser.add_argument(
        "--trl_tuned", type=json.loads, default={}, help="JSON: DPOConfig fields over TUNED"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return trl_side(**args.child)
    if args.pairs < BATCH or args.pairs % BATCH:
        parser.error(f"--pairs {args.pairs}: give a multiple of {BATCH}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no child and no folder behind
    with tempfile.TemporaryDirectory() as folder:
        folder, results = Path(folder), []
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
        }  # nothing cached, nothing fetched
        if args.model is None:
            args.model = folder / "model"
            tool = args.shared / "tools/make_checkpoint.py"
            subprocess.run([sys.executable, tool, args.shape, args.model], check=True)
        roof = json.loads(subprocess.check_output(sft_child(), env=env))
        args.cuda = roof["cuda"]
        for n in range(args.repeats):
            for name in args.sets.split(","):
                read, longest = SETS[name]
                rows = [
                    row
                    for row in read(args.shared)
                    if sum(map(len, row)) <= longest and row[1] != row[2]
                ]
                random.Random(0).shuffle(rows)
                for side in args.sides.split(","):
                    part = rows[n * args.pairs : (n + 1) * args.pairs]
                    results.append(measure(side, name, n, part, folder, args, env))
                    print(json.dumps(results[-1]), flush=True)
    report(results, args.cuda)
    print(f"\nroof: {roof['flops'] / 1e9:.0f} GFLOP/s, a bf16 product of (2048 x 1024) and (1024 x 3072) on "
          f"{roof['machine']}")  # fmt: skip


if __name__ == "__main__":
    main()

"""plaintune beside TRL's SFTTrainer + PEFT: the same rows, checkpoint and LoRA, in one run.

Every measurement is a fresh process, and the sides take turns (A B C A B C), so that a machine that slows down slows
down for all. A measurement's rows are exactly one optimizer step, taken again and again: each step has the same work
and the same examples on every side, shuffled or packed as they may be, so losses can be laid side by side, and leaving
out the first step (allocation, choice of kernels) favours nobody. Each round takes the next rows.

Nobody times himself: both sides write a line of `log.jsonl` per step; this process notes when the lines appear, and how
far the other's memory rises (VmHWM). The sides:
- plaintune   `python sft.py` as a user runs it
- trl         SFTTrainer with its defaults: batches of 8, padded, gradient checkpointing, bf16 autocast
- trl-packed  SFTTrainer with its best settings (PACKED; --trl_packed '{"max_length": 1024}' tries others)
- trl-tuned   trl-packed, with transformers' own loss for TRL's fused head. Without Triton that head scores every
              position, with products in fp32, and takes as long as all the layers. Not a setting: three lines of code
Any of them with -4bit behind its name (plaintune-4bit, trl-packed-4bit) holds the base in NF4, doubly quantised.
All of them: bf16 weights, LoRA (r 16, alpha 32) on the seven projections, AdamW at 2e-4 falling linearly, loss on the
completion through its end token (TRL would also score the newline that the template writes after that; here it is told
not to, so that the first losses must agree).

Needs trl, peft and transformers, and `shared/` beside the repository unless --shared says where.

    python benchmarks/sft.py [--model FOLDER] [--sets ecqa,alpaca] [--sides plaintune,trl-packed] [--repeats 3]
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

HERE = Path(__file__).resolve()
BATCH = 8  # per_device_train_batch_size: TRL's default
LONGEST = 1800  # characters of a row, under 512 tokens: no side cuts one off
# Found by trial. On a CPU attention computes a pack's masked squares too, so one short pack at a time is fastest;
# `wrapped` would be about as fast, but lets examples see each other.
PACKED = {
    "cpu": {
        "packing": True,
        "max_length": 512,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
    },
    "cuda": {
        "packing": True,
        "max_length": 2048,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
    },
}


def ecqa(shared):
    """ECQA: a question and five choices -> the free-flow explanation and the answer's letter."""
    for row in csv.DictReader((shared / "data/ecqa/val.csv").open(newline="", encoding="utf-8")):
        choices = [row[f"q_op{i}"] for i in range(1, 6)]
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices)]
        yield (
            "\n".join([row["q_text"], *lines]),
            f"{row['taskB']}\nAnswer: {'ABCDE'[choices.index(row['q_ans'])]}",
        )


def alpaca(shared):
    """Alpaca: an instruction, with its input if there is one -> the output."""
    for row in json.loads((shared / "data/alpaca/alpaca_en_999.json").read_text(encoding="utf-8")):
        yield "\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]


SETS = {"ecqa": ecqa, "alpaca": alpaca}


# ----------------------------------------------------------------------------------------------------------------------
# The sides. Each writes log.jsonl and data_report.json into `out`


def plaintune_command(side, model, data, out, steps, rows):
    settings = dict(
        model=model, data=data, output_dir=out, max_steps=steps, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=rows // BATCH, learning_rate=2e-4, lr_scheduler_type="linear", warmup_ratio=0,
        lora_r=16, lora_alpha=32, max_length=1024, logging_steps=1,
        save_strategy="no", eval_strategy="no", merge="false", report_to="none",
        load_in_4bit=side.endswith("-4bit"),
    )  # fmt: skip
    return [
        sys.executable,
        HERE.parents[1] / "sft.py",
        *(str(x) for k, v in settings.items() for x in (f"--{k}", v)),
    ]


def trl_side(side, model, data, out, steps, rows, **settings):
    """SFTTrainer, in a process of its own. `settings` go over those of the side."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, Trainer, TrainerCallback
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    out, cuda = Path(out), torch.cuda.is_available()
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    quant = {"quantization_config": quant} if side.endswith("-4bit") else {}
    side = side.removesuffix("-4bit")
    attention = (
        "flash_attention_2" if cuda and side != "trl" and is_flash_attn_2_available() else "sdpa"
    )
    fixed = dict(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=2e-4, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda,
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": attention, **quant},
    )  # fmt: skip
    settings = fixed | ({} if side == "trl" else PACKED["cuda" if cuda else "cpu"] | settings)
    # one step is one pass over the rows, however many packs they make: the Trainer ends a step with the epoch
    each = 1 if settings.get("packing") else settings["per_device_train_batch_size"]
    settings["gradient_accumulation_steps"] = rows // each

    class OwnLoss(SFTTrainer):
        def compute_loss(
            self, model, inputs, **kwargs
        ):  # with a cache, the mask would not see where examples end
            return Trainer.compute_loss(self, model, inputs | {"use_cache": False}, **kwargs)

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                line = {"step": state.global_step, "loss": logs["loss"]}
                if cuda:
                    line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")

    trainer = (OwnLoss if side == "trl-tuned" else SFTTrainer)(
        model=str(model),
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(
            [json.loads(line) for line in open(data, encoding="utf-8")]
        ),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Log()],
    )
    end = trainer.processing_class.eos_token_id

    def until_end(row):
        ids, labels = row["input_ids"], row["labels"]
        return {
            "labels": [-100 if i and ids[i - 1] == end else label for i, label in enumerate(labels)]
        }

    trainer.train_dataset = trainer.train_dataset.map(until_end)
    labels = [label for row in trainer.train_dataset["labels"] for label in row]
    ledger = {"scored": len(labels) - labels.count(-100), "masked": labels.count(-100)}
    (out / "data_report.json").write_text(json.dumps({"train": ledger}))
    trainer.train()
    trainer.save_model()


def roof_side():
    """FLOP/s of a bf16 product of the model's own shape: the most that training could reach on this machine now."""
    import torch

    cuda = torch.cuda.is_available()
    x, w = (
        torch.randn(n, 1024, device="cuda" if cuda else "cpu", dtype=torch.bfloat16)
        for n in (2048, 3072)
    )
    many, seconds = 50 if cuda else 5, []
    for _ in range(12):
        began = time.perf_counter()
        for _ in range(many):
            y = torch.nn.functional.linear(x, w)
        y[0, 0].item()  # waits for a GPU
        seconds.append((time.perf_counter() - began) / many)
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    flops = 2 * 2048 * 1024 * 3072 / median(seconds[2:])
    print(
        json.dumps(
            {"flops": flops, "cuda": cuda, "machine": f"{device}, torch {torch.__version__}"}
        )
    )


def child_command(**task):
    return [sys.executable, HERE, "--child", json.dumps(task, default=str)]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def memory_of(pid):
    """[(VmHWM, kB), (RssAnon, kB)] of a process; [] once it has ended, and on systems without /proc."""
    try:
        return re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return []


def watch(command, out, env):
    """Runs `command`, which logs to out/log.jsonl. -> (when each line appeared, {VmHWM, RssAnon: peak in GB})"""
    out.mkdir()
    log, seen, peak, began = out / "log.jsonl", [], {"VmHWM": 0, "RssAnon": 0}, time.perf_counter()
    with open(out.with_suffix(".txt"), "w+") as console:
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                lines = log.read_bytes().count(b"\n") if log.exists() else 0
                seen += [time.perf_counter() - began] * (lines - len(seen))
                for key, kb in memory_of(process.pid):
                    peak[key] = max(peak[key], int(kb) * 1024 / 1e9)
                time.sleep(0.02)
        finally:
            process.kill()
        console.seek(0)
        if process.returncode:
            sys.exit(
                f"{' '.join(map(str, command))}\nended with {process.returncode}:\n{console.read()[-3000:]}"
            )
    return seen, peak


def useful_flops(c, tokens, scored):
    """FLOPs that a step cannot do without, of a config.json `c`: 2 per weight and token forward, 2 backward (a frozen
    weight has no gradient of its own), LoRA's 2 + 4, the head's 2 + 2 on scored tokens alone. Attention's products,
    norms, padding and recomputation are not counted."""
    size, wide = c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim") or size // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    linears = [
        (size, q),
        (size, kv),
        (size, kv),
        (q, size),
        (size, wide),
        (size, wide),
        (wide, size),
    ]
    layer = sum(4 * i * o + 6 * 16 * (i + o) for i, o in linears)
    return c["num_hidden_layers"] * layer * tokens + 4 * c["vocab_size"] * size * scored


def measure(side, name, n, pairs, folder, args, env, roof):
    """One measurement -> what it found, for its JSON line."""
    data, out, rows = folder / f"{name}-{n}.jsonl", folder / f"{name}-{n}-{side}", len(pairs)
    roles = {"prompt": "user", "completion": "assistant"}
    chats = [
        {k: [{"role": role, "content": text}] for (k, role), text in zip(roles.items(), pair)}
        for pair in pairs
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    task = dict(model=args.model, data=data, out=out, steps=args.steps + 1, rows=rows)
    ours = plaintune_command(side, **task)
    theirs = child_command(side=side, **task, **args.trl_packed)
    seen, peak = watch(ours if side.startswith("plaintune") else theirs, out, env)
    lines = [
        line
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    ledger = json.loads((out / "data_report.json").read_text())["train"]
    shutil.rmtree(out)
    if len(lines) != task["steps"] or len(seen) < task["steps"]:
        sys.exit(f"{side}: {len(lines)} steps in its log, expected {task['steps']}")
    seconds, tokens = (seen[args.steps] - seen[0]) / args.steps, ledger["scored"] + ledger["masked"]
    flops = useful_flops(
        json.loads((args.model / "config.json").read_text()), tokens, ledger["scored"]
    )
    gpu = {"peak_gpu_gb": lines[-1]["peak_memory_gb"]} if roof["cuda"] else {}
    return {
        "set": name, "round": n, "side": side, "examples_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds, "step_seconds": seconds, "first_step_done": seen[0],
        "peak_gb": peak["VmHWM"], "peak_anon_gb": peak["RssAnon"], **gpu, "roof_share": flops / seconds / roof["flops"],
        "examples": rows, "tokens": tokens, "scored_tokens": ledger["scored"],
        "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"],
    }  # fmt: skip


def report(results, cuda):
    """Prints the median of every side, and the medians of the rounds' ratios."""
    memory = "peak_gpu_gb" if cuda else "peak_gb"
    columns = {
        "examples/s": "examples_per_second", "tokens/s": "tokens_per_second", "step s": "step_seconds",
        "1st step at": "first_step_done", "peak GB": memory, "anon GB": "peak_anon_gb", "of roof": "roof_share",
        "tokens": "tokens", "scored": "scored_tokens", "first loss": "first_loss", "last loss": "last_loss",
    }  # fmt: skip
    for name in dict.fromkeys(r["set"] for r in results):
        sides = {}
        for r in results:
            if r["set"] == name:
                sides.setdefault(r["side"], []).append(r)
        print(
            f"\n{name}, {results[0]['examples']} examples a step, median of {len(next(iter(sides.values())))}"
        )
        print("".join(f"{title:>12}" for title in ("", *columns)))
        for side, runs in sides.items():
            print(
                f"{side:>12}"
                + "".join(f"{median(r[key] for r in runs):>12.5g}" for key in columns.values())
            )
        ours = sides.pop("plaintune", [])
        for side, runs in sides.items() if ours else ():
            speed = [
                a["examples_per_second"] / b["examples_per_second"] for a, b in zip(ours, runs)
            ]
            space = median(a[memory] / b[memory] for a, b in zip(ours, runs))
            apart = max(abs(a["first_loss"] - b["first_loss"]) for a, b in zip(ours, runs))
            print(f"plaintune / {side}: {median(speed):.2f} x the speed ({min(speed):.2f} to {max(speed):.2f}), "
                  f"{space:.2f} x the memory, first losses within {apart:.4f}")  # fmt: skip


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
    parser.add_argument("--sets", default="ecqa,alpaca", help="(default: %(default)s)")
    parser.add_argument(
        "--sides", default="plaintune,trl,trl-packed,trl-tuned", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="examples a step, a multiple of 8 (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=2, help="steps measured after the first (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds, each with other rows (default: %(default)s)"
    )
    parser.add_argument(
        "--trl_packed", type=json.loads, default={}, help="JSON: SFTConfig fields over PACKED"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return trl_side(**args.child) if args.child else roof_side()
    if args.rows < BATCH or args.rows % BATCH:
        parser.error(f"--rows {args.rows}: give a multiple of {BATCH}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no child and no folder behind
    with tempfile.TemporaryDirectory() as folder:
        folder, results, roofs = Path(folder), [], []
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
        }  # nothing cached, nothing fetched
        if args.model is None:
            args.model = folder / "model"
            tool = args.shared / "tools/make_checkpoint.py"
            subprocess.run([sys.executable, tool, args.shape, args.model], check=True)
        for n in range(args.repeats):
            for name in args.sets.split(","):
                pairs = [pair for pair in SETS[name](args.shared) if sum(map(len, pair)) <= LONGEST]
                random.Random(0).shuffle(pairs)
                roofs.append(json.loads(subprocess.check_output(child_command(), env=env)))
                for side in args.sides.split(","):
                    rows = pairs[n * args.rows : (n + 1) * args.rows]
                    results.append(measure(side, name, n, rows, folder, args, env, roofs[-1]))
                    print(json.dumps(results[-1]), flush=True)
    report(results, roofs[0]["cuda"])
    flops = [r["flops"] / 1e9 for r in roofs]
    print(f"\nroof: {median(flops):.0f} GFLOP/s ({min(flops):.0f} to {max(flops):.0f}), a bf16 product of "
          f"(2048 x 1024) and (1024 x 3072) on {roofs[0]['machine']}")  # fmt: skip


if __name__ == "__main__":
    main()

"""plaintune beside TRL's SFTTrainer + PEFT: the same rows, checkpoint and LoRA, in one run.

Every measurement is a fresh process, and the sides take turns (A B C A B C), so that a machine that
slows down slows down all of them. A measurement's rows are exactly one optimizer step, repeated:
every step has the same work and the same examples on every side, however they are shuffled or
packed, so losses can be compared, and leaving out the first step (allocation, choice of kernels)
favours no side. Each round takes the next rows.

Both sides write a line of `log.jsonl` per step; this process measures from outside when the lines
appear and how far the memory of the other process rises (VmHWM). The sides:

- plaintune   `python sft.py` as a user runs it
- trl         SFTTrainer with its defaults: batches of 8, padded, gradient checkpointing, autocast
              where --dtype is bf16
- trl-packed  SFTTrainer with its best settings (PACKED; --trl_packed '{"max_length": 1024}' tries
              others)
- trl-tuned   trl-packed, with transformers' own loss in place of TRL's fused head. Without Triton
              that head scores every position, with products in fp32, and takes as long as all the
              layers. Not a setting: three lines of code

A side with -4bit appended (plaintune-4bit, trl-packed-4bit) holds the base in NF4, doubly
quantised. All sides: weights and products in --dtype (auto: bf16, or fp32 on a CPU without bf16
products), LoRA (r 16, alpha 32) on the seven projections, AdamW at 2e-4
with linear decay, loss on the completion up to its end token. (TRL would also score the newline
that the template writes after that token; its labels are cut here, so that the first losses must
agree.)

Needs trl, peft and transformers, and `shared/` beside the repository unless --shared says where.

    python benchmarks/sft.py [--model FOLDER] [--sets ecqa,alpaca] [--sides plaintune,trl-packed]
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
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median

HERE = Path(__file__).resolve()
BATCH = 8  # per_device_train_batch_size: TRL's default
LONGEST = 1800  # characters of a row, under 512 tokens: no side truncates it
# Found by trial. On a CPU attention also computes the masked part of a pack, so one short pack at a
# time is fastest; `wrapped` would be about as fast, but lets examples see each other.
SMALL_PACKS = {"max_length": 512, "per_device_train_batch_size": 1}
LARGE_PACKS = {"max_length": 2048, "per_device_train_batch_size": 2}
PACKED = {"packing": True, "gradient_checkpointing": False}


def ecqa(shared):
    """ECQA: a question and five choices -> the free-flow explanation and the answer's letter."""
    with open(shared / "data/ecqa/val.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            choices = [row[f"q_op{i}"] for i in range(1, 6)]
            lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices)]
            right = "ABCDE"[choices.index(row["q_ans"])]
            yield "\n".join([row["q_text"], *lines]), f"{row['taskB']}\nAnswer: {right}"


def alpaca(shared):
    """Alpaca: an instruction, with its input if there is one -> the output."""
    for row in json.loads(
        (shared / "data/alpaca/alpaca_en_999.json").read_text(encoding="utf-8")
    ):
        yield "\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]


SETS = {"ecqa": ecqa, "alpaca": alpaca}


# --------------------------------------------------------------------------------------------------
# The sides. Each writes log.jsonl and data_report.json into `out`


def script_command(name, **settings):
    """`python NAME --key value ...` of this repository, with what both benchmarks set."""
    settings |= {
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "lora_r": 16,
        "lora_alpha": 32,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "merge": "false",
        "report_to": "none",
    }
    flags = []
    for key, value in settings.items():
        flags += [f"--{key}", str(value)]
    return [sys.executable, HERE.parents[1] / name, *flags]


def plaintune_command(side, model, data, out, steps, rows, dtype):
    return script_command(
        "sft.py",
        dtype=dtype,
        model=model,
        data=data,
        output_dir=out,
        max_steps=steps,
        gradient_accumulation_steps=rows // BATCH,
        learning_rate=2e-4,
        max_length=1024,
        load_in_4bit=side.endswith("-4bit"),
    )


def trl_settings(out, steps, dtype, **settings):
    """What both benchmarks set of TRL's config."""
    import torch

    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": dtype == "bfloat16",
    } | settings


def log_callback(out, *keys):
    """A callback that writes log.jsonl: step, the values of `keys`, peak GPU memory"""
    import torch
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            if "loss" not in logs:
                return
            line = {"step": state.global_step} | {key: logs[key] for key in keys}
            if torch.cuda.is_available():
                line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    return Log()


def trl_data(model, data):
    """What both benchmarks give a TRL trainer besides its config."""
    from datasets import Dataset
    from peft import LoraConfig

    with open(data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "model": str(model),
        "train_dataset": Dataset.from_list(rows),
        "peft_config": lora,
    }


def model_options(side, dtype):
    """from_pretrained's arguments: dtype or NF4, the fastest attention that is installed"""
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_flash_attn_2_available

    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    packs = side.removesuffix("-4bit") != "trl"
    if packs and torch.cuda.is_available() and is_flash_attn_2_available():
        options["attn_implementation"] = "flash_attention_2"
    if side.endswith("-4bit"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    return options


def trl_side(side, model, data, out, steps, rows, dtype, **overrides):
    """SFTTrainer, in its own process. `overrides` replace settings of a packed side."""
    import torch
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    out = Path(out)
    options = model_options(side, dtype)
    settings = trl_settings(out, steps, dtype, learning_rate=2e-4, model_init_kwargs=options)
    side = side.removesuffix("-4bit")
    if side != "trl":
        packs = LARGE_PACKS if torch.cuda.is_available() else SMALL_PACKS
        settings |= PACKED | packs | overrides
    # one step is one pass over the rows, however many packs they make: the Trainer ends a step with
    # the epoch
    batch = 1 if settings.get("packing") else settings["per_device_train_batch_size"]
    settings["gradient_accumulation_steps"] = rows // batch

    class OwnLoss(SFTTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            # with a cache, the mask would not see where examples end
            return Trainer.compute_loss(self, model, inputs | {"use_cache": False}, **kwargs)

    trainer = (OwnLoss if side == "trl-tuned" else SFTTrainer)(
        args=SFTConfig(**settings),
        callbacks=[log_callback(out, "loss")],
        **trl_data(model, data),
    )
    end = trainer.processing_class.eos_token_id

    def until_end(row):
        labels = list(row["labels"])
        for i, token in enumerate(row["input_ids"][:-1]):
            if token == end:
                labels[i + 1] = -100
        return {"labels": labels}

    trainer.train_dataset = trainer.train_dataset.map(until_end)
    labels = [label for row in trainer.train_dataset["labels"] for label in row]
    ledger = {"scored": len(labels) - labels.count(-100), "masked": labels.count(-100)}
    (out / "data_report.json").write_text(json.dumps({"train": ledger}))
    trainer.train()
    trainer.save_model()


def machine():
    """The device and what a reader needs to compare with another: its kind of products, versions"""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        has = torch.cpu.get_capabilities()
        kinds = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
        kind = next((kind for kind in kinds if has.get(kind)), has.get("architecture", ""))
        name = f"{has.get('cpu_name', 'CPU')} ({kind}, {torch.get_num_threads()} threads)"
    versions = [f"torch {torch.__version__}"]
    for package in ("transformers", "peft", "trl", "lm_eval"):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return ", ".join([name, *versions])


def roof_side(dtype):
    """FLOP/s of a product of the model's shape: the most that training could reach now."""
    import torch

    cuda = torch.cuda.is_available()
    options = {"device": "cuda" if cuda else "cpu", "dtype": getattr(torch, dtype)}
    x, w = torch.randn(2048, 1024, **options), torch.randn(3072, 1024, **options)
    products, seconds = 50 if cuda else 5, []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(products):
            y = torch.nn.functional.linear(x, w)
        y[0, 0].item()  # waits for a GPU
        seconds.append((time.perf_counter() - start) / products)
    flops = 2 * 2048 * 1024 * 3072 / median(seconds[2:])
    print(json.dumps({"flops": flops, "cuda": cuda, "machine": machine(), "dtype": dtype}))


def child_command(**task):
    return [sys.executable, HERE, "--child", json.dumps(task, default=str)]


# --------------------------------------------------------------------------------------------------
# Measuring


def memory_of(pid):
    """[(VmHWM, kB), (RssAnon, kB)] of a process; [] once it has ended, or without /proc."""
    try:
        return re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return []


def watch(command, out, env):
    """Runs `command`, logging to out/log.jsonl -> (second of each line, {VmHWM, RssAnon: GB})"""
    out.mkdir()
    log, console = out / "log.jsonl", out.with_suffix(".txt")
    seconds, peak, start = [], {"VmHWM": 0, "RssAnon": 0}, time.perf_counter()
    with open(console, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                lines = log.read_bytes().count(b"\n") if log.exists() else 0
                seconds += [time.perf_counter() - start] * (lines - len(seconds))
                for key, kb in memory_of(process.pid):
                    peak[key] = max(peak[key], int(kb) * 1024 / 1e9)
                time.sleep(0.02)
        finally:
            process.kill()
    if process.returncode:
        text = " ".join(map(str, command))
        sys.exit(f"{text}\nexit status {process.returncode}:\n{console.read_text()[-3000:]}")
    return seconds, peak


def read_run(side, out, steps, seconds):
    """-> (log lines with a loss, the ledger of data_report.json); stops if steps are missing"""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    ledger = json.loads((out / "data_report.json").read_text())["train"]
    shutil.rmtree(out)
    if len(lines) != steps or len(seconds) < steps:
        sys.exit(f"{side}: {len(lines)} steps in its log, expected {steps}")
    return lines, ledger


def useful_flops(config, tokens, scored):
    """FLOPs that a step cannot do without, from a config.json: 2 per weight and token forward, 2
    backward (a frozen weight has no gradient of its own), 2 + 4 for LoRA, 2 + 2 for the head, on
    scored tokens alone. Attention's products, norms, padding and recomputation are not counted."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or size // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = [(size, q), (size, kv), (size, kv), (q, size)]
    mlp = [(size, inner), (size, inner), (inner, size)]
    layer = sum(4 * i * o + 6 * 16 * (i + o) for i, o in attention + mlp)
    layers = config["num_hidden_layers"] * layer
    return layers * tokens + 4 * config["vocab_size"] * size * scored


def measure_roof(args, env):
    """`roof_side` in a process of its own -> its JSON line"""
    return json.loads(subprocess.check_output(child_command(dtype=args.dtype), env=env))


def measure(side, name, n, pairs, folder, args, env, roofs):
    """One measurement -> the values of its JSON line. The roof is measured before and after it:
    a shared machine is not the same machine a minute later."""
    data, out, rows = (
        folder / f"{name}-{n}.jsonl",
        folder / f"{name}-{n}-{side}",
        len(pairs),
    )
    with open(data, "w", encoding="utf-8") as file:
        for prompt, completion in pairs:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
            file.write(json.dumps(row) + "\n")
    task = dict(model=args.model, data=data, out=out, steps=args.steps + 1, rows=rows)
    task["dtype"] = args.dtype
    if side.startswith("plaintune"):
        command = plaintune_command(side, **task)
    else:
        command = child_command(side=side, **task, **args.trl_packed)
    seen, peak = watch(command, out, env)
    roofs.append(measure_roof(args, env))
    roof = {"flops": mean(roof["flops"] for roof in roofs[-2:]), "cuda": roofs[-1]["cuda"]}
    lines, ledger = read_run(side, out, task["steps"], seen)
    seconds, tokens = (
        (seen[args.steps] - seen[0]) / args.steps,
        ledger["scored"] + ledger["masked"],
    )
    config = json.loads((args.model / "config.json").read_text())
    flops = useful_flops(config, tokens, ledger["scored"])
    gpu = {"peak_gpu_gb": lines[-1]["peak_memory_gb"]} if roof["cuda"] else {}
    return {
        "set": name,
        "round": n,
        "side": side,
        "examples_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "first_step_done": seen[0],
        "peak_gb": peak["VmHWM"],
        "peak_anon_gb": peak["RssAnon"],
        **gpu,
        "roof_share": flops / seconds / roof["flops"],
        "examples": rows,
        "tokens": tokens,
        "scored_tokens": ledger["scored"],
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
    }


COLUMNS = {
    "examples/s": "examples_per_second",
    "tokens/s": "tokens_per_second",
    "step s": "step_seconds",
    "1st step at": "first_step_done",
    "peak GB": "peak_gb",
    "anon GB": "peak_anon_gb",
    "of roof": "roof_share",
    "tokens": "tokens",
    "scored": "scored_tokens",
    "first loss": "first_loss",
    "last loss": "last_loss",
}


def by_set(results):
    """{set: {side: its results, one per round}}"""
    sets = {}
    for result in results:
        sides = sets.setdefault(result["set"], {})
        sides.setdefault(result["side"], []).append(result)
    return sets


def print_medians(title, sides, columns):
    rounds = len(next(iter(sides.values())))
    print(f"\n{title}, median of {rounds}")
    print(f"{'':>15}" + "".join(f"{heading:>12}" for heading in columns))
    for side, runs in sides.items():
        cells = [f"{median(run[key] for run in runs):>12.5g}" for key in columns.values()]
        print(f"{side:>15}" + "".join(cells))


def ratios(ours, theirs, key):
    return [a[key] / b[key] for a, b in zip(ours, theirs)]


def report(results, cuda):
    """Prints the median of every side, and the medians of the rounds' ratios."""
    memory = "peak_gpu_gb" if cuda else "peak_gb"
    for name, sides in by_set(results).items():
        title = f"{name}, {results[0]['examples']} examples a step"
        print_medians(title, sides, COLUMNS | {"peak GB": memory})
        ours = sides.pop("plaintune", None)
        if ours is None:
            continue
        for side, runs in sides.items():
            speed = ratios(ours, runs, "examples_per_second")
            space = median(ratios(ours, runs, memory))
            apart = max(abs(a["first_loss"] - b["first_loss"]) for a, b in zip(ours, runs))
            print(
                f"plaintune / {side}: {median(speed):.2f} x the speed ({min(speed):.2f} to "
                f"{max(speed):.2f}), {space:.2f} x the memory, first losses within {apart:.4f}"
            )


def make_parser(description, shown="(default: %(default)s)", **defaults):
    """The flags of both benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
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
    add("--dtype", default="auto", choices=dtypes, help=f"of weights and products {shown}")
    add("--sets", help=shown)
    add("--sides", help=shown)
    add("--steps", type=int, default=2, help=f"steps measured after the first {shown}")
    add("--repeats", type=int, default=3, help=f"rounds, each with other rows {shown}")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def usual_dtype():
    """bfloat16, or another where the device has no products in it: see support/devices.py"""
    code = "from support.devices import *; device = pick_device('auto'); "
    code += "print(pick_dtype('auto', 'bfloat16', device))"
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, cwd=HERE.parents[1], text=True).strip()


def set_up(args, folder):
    """Makes the checkpoint if none is named, and settles the dtype -> the environment of the sides,
    without network"""
    if args.dtype == "auto":
        args.dtype = usual_dtype()
    if args.model is None:
        args.model = folder / "model"
        tool = args.shared / "tools/make_checkpoint.py"
        shape = folder / "shape.json"
        config = json.loads((args.shared / f"models/configs/{args.shape}.json").read_text())
        config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
        shape.write_text(json.dumps(config))
        subprocess.run([sys.executable, tool, shape, args.model], check=True)
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}


def main():
    parser = make_parser(__doc__, sets="ecqa,alpaca", sides="plaintune,trl,trl-packed,trl-tuned")
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="examples a step, a multiple of 8 (default: 16)",
    )
    parser.add_argument(
        "--trl_packed",
        type=json.loads,
        default={},
        help="JSON: SFTConfig fields over PACKED",
    )
    args = parser.parse_args()
    if args.child is not None:
        return trl_side(**args.child) if "side" in args.child else roof_side(**args.child)
    if args.rows < BATCH or args.rows % BATCH:
        parser.error(f"--rows {args.rows}: must be a multiple of {BATCH}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # remove child and folder
    results, roofs = [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        env = set_up(args, folder)
        for n in range(args.repeats):
            for name in args.sets.split(","):
                pairs = [
                    pair for pair in SETS[name](args.shared) if sum(map(len, pair)) <= LONGEST
                ]
                random.Random(0).shuffle(pairs)
                rows = pairs[n * args.rows : (n + 1) * args.rows]
                roofs.append(measure_roof(args, env))
                for side in args.sides.split(","):
                    results.append(measure(side, name, n, rows, folder, args, env, roofs))
                    print(json.dumps(results[-1]), flush=True)
    report(results, roofs[0]["cuda"])
    flops = [roof["flops"] / 1e9 for roof in roofs]
    print(
        f"\nroof: {median(flops):.0f} GFLOP/s ({min(flops):.0f} to {max(flops):.0f}), a "
        f"{args.dtype} product of (2048 x 1024) and (1024 x 3072) on {roofs[0]['machine']}"
    )


if __name__ == "__main__":
    main()

"""How time and memory of a training step grow, beside transformers + PEFT: a table and a figure.

One thing grows at a time - tokens of a step, length of a row, LoRA's rank, vocabulary - and the
rest stays: Qwen3-0.6B's widths with few layers and random weights, LoRA on the seven projections,
the second half of every row scored. A point is a process of its own; the sides take turns (A B A
B). A step is forward, backward, clipping and AdamW; the first is left out.

- plaintune    `sft.accumulate` as `python sft.py` calls it, in its usual micro-batches
- transformers Qwen3ForCausalLM + PEFT with sdpa attention and its own loss, at most 8 rows a batch,
               no gradient checkpointing. Rows of one length: neither side has padding

Memory is the process's peak (VmHWM) with libraries, weights and optimizer.

    python benchmarks/growth.py [--layers 2] [--repeats 2] [--output growth.png]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve()
sys.path[0] = str(HERE.parents[1])  # the repository's sft.py, not the benchmark of this folder

USUAL = {"tokens": 1024, "length": 256, "rank": 16, "vocabulary": 32768}
POINTS = {
    "tokens": (256, 512, 1024, 2048, 4096),
    "length": (64, 256, 1024, 2048),
    "rank": (4, 16, 64, 256),
    "vocabulary": (8192, 32768, 131072, 262144),
}
LONGEST_STEP = {"length": {"tokens": 2048}}  # what else changes for all points of a curve
BATCH = 8
COLUMNS = ("seconds", "peak_gb")


def shape(point, layers):
    """Qwen3-0.6B's config.json, with its vocabulary and depth replaced."""
    return {
        "model_type": "qwen3",
        "vocab_size": point["vocabulary"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
    }


def make_rows(point):
    """(ids, labels), each (rows, length): a row's second half is scored."""
    import numpy as np

    size = point["tokens"] // point["length"], point["length"]
    ids = np.random.default_rng(0).integers(0, point["vocabulary"], size)
    labels = ids.copy()
    labels[:, : point["length"] // 2] = -100
    return ids, labels


def random_weights(model, dtype):
    """(name, tensor) of every parameter: the same on both sides, as the names and order are."""
    import torch

    torch.manual_seed(0)
    for name, p in [*model.named_parameters()]:
        value = torch.ones(p.shape) if p.dim() == 1 else torch.randn(p.shape) * 0.02
        yield name, value.to(dtype)


def plaintune_step(point, layers, dtype):
    import torch
    from torch.nn.utils import clip_grad_norm_

    from lora import add_lora
    from model import ModelConfig, Segment, Transformer, choose_attention, set_tensor
    from sft import SFTConfig, accumulate, count_scored, make_optimizer, sft_loss, token_budget

    config = SFTConfig(lora_r=point["rank"], lora_alpha=32)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(shape(point, layers)))
    for name, weight in random_weights(model, dtype):
        set_tensor(model, name, weight, "cpu", dtype)
    model.dtype = dtype
    model.attention, _ = choose_attention("auto", model.config, dtype, "cpu")
    add_lora(model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, budget = make_optimizer(trained, config), token_budget(config, model.device)
    examples = [[Segment(*row)] for row in zip(*make_rows(point))]
    count = sum(map(count_scored, examples))
    model.train()

    def step():
        loss, _ = accumulate(model, examples, count, sft_loss, budget)
        clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss / count

    return step


def transformers_step(point, layers, dtype):
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils import clip_grad_norm_
    from transformers import AutoModelForCausalLM, Qwen3Config

    raw = shape(point, layers)
    del raw["model_type"]
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(**raw, use_cache=False), dtype=dtype, attn_implementation="sdpa"
    )
    weights = dict(random_weights(model, dtype))
    model.load_state_dict(weights, strict=False)  # the head is the embedding
    lora = LoraConfig(
        r=point["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids, labels = map(torch.from_numpy, make_rows(point))
    count = int((labels != -100).sum())

    def step():
        total = 0.0
        for rows, targets in zip(ids.split(BATCH), labels.split(BATCH)):
            loss = model(input_ids=rows, labels=targets, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


SIDES = {"plaintune": plaintune_step, "transformers": transformers_step}


def run_child(side, point, layers, dtype, steps):
    import torch

    from support.memory import keep_freed_memory, peak_memory_gb

    step = SIDES[side](point, layers, getattr(torch, dtype))
    seconds = []
    with keep_freed_memory():
        first = step()
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    peak = peak_memory_gb(torch.device("cpu"))
    print(json.dumps({"seconds": median(seconds), "peak_gb": peak, "first_loss": first}))


def measure(side, point, args):
    task = {"side": side, "point": point, "layers": args.layers, "dtype": args.dtype}
    task["steps"] = args.steps
    command = [sys.executable, HERE, "--child", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{side} {point}\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_point(point, args):
    """{side: {column: its median over the rounds}}. The sides' first losses must agree."""
    runs = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side in SIDES:
            runs[side].append(measure(side, point, args))
    losses = [run["first_loss"] for results in runs.values() for run in results]
    if max(losses) - min(losses) > 1e-3 * max(losses):
        sys.exit(f"{point}: the first losses differ: {losses}")
    return {
        side: {column: median(run[column] for run in results) for column in COLUMNS}
        for side, results in runs.items()
    }


def plot(curves, path):
    """Time above, memory below; a column for each thing that grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 5.5), layout="constrained")
    axes = figure.subplots(len(COLUMNS), len(curves), squeeze=False)
    labels = {"seconds": "seconds a step", "peak_gb": "peak memory, GB"}
    for i, (name, points) in enumerate(curves.items()):
        for row, column in zip(axes, COLUMNS):
            for side in SIDES:
                values = [sides[side][column] for sides in points.values()]
                row[i].plot([*points], values, marker="o", label=side)
            row[i].set_xscale("log", base=2)
            row[i].set_ylim(bottom=0)
            row[i].set_xlabel(name)
            row[0].set_ylabel(labels[column])
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = "(default: %(default)s)"
    add = parser.add_argument
    add("--layers", type=int, default=2, help=shown)
    add("--steps", type=int, default=3, help=f"steps measured after the first {shown}")
    add("--repeats", type=int, default=2, help=f"rounds {shown}")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help=shown)
    add("--curves", default=",".join(POINTS), help=shown)
    add("--output", type=Path, default=Path("growth.png"), help=shown)
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return run_child(**args.child)
    print(f"{'':>22}{'plaintune':>20}{'transformers':>20}")
    curves = {}
    for name in args.curves.split(","):
        curves[name] = {}
        for value in POINTS[name]:
            point = USUAL | LONGEST_STEP.get(name, {}) | {name: value}
            sides = curves[name][value] = measure_point(point, args)
            ours, theirs = sides.values()
            cells = "".join(
                f"{s['seconds']:10.3f} s{s['peak_gb']:5.2f} GB" for s in (ours, theirs)
            )
            speed = theirs["seconds"] / ours["seconds"]
            space = ours["peak_gb"] / theirs["peak_gb"]
            print(
                f"{name:>12}{value:10,}{cells}   {speed:.2f} x the speed, "
                f"{space:.2f} x the memory",
                flush=True,
            )
        plot(curves, args.output)  # what there is so far
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()

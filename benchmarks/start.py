"""From a checkpoint on disk to the end of the first step, beside transformers + PEFT.

A measurement is a fresh process that imports, loads the checkpoint, adds a LoRA (r 16 on the seven
projections), and makes one step of AdamW on one row of 64 tokens. The sides take turns, and the
checkpoint's file is in the system's cache. Seconds of each part, and the process's peak memory
(VmHWM, which counts the pages of a memory-mapped file).

- plaintune       `load_4bit`, which reads 16-bit weights too, and `add_lora`, as sft.py calls them
- transformers    from_pretrained and get_peft_model; with --load_in_4bit through bitsandbytes

    python benchmarks/start.py [--model FOLDER] [--load_in_4bit] [--dtype float32]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve()
sys.path[0] = str(HERE.parents[1])  # the repository's sft.py, not the benchmark of this folder

from benchmarks.sft import make_parser, set_up  # noqa: E402

PARTS = ("import", "load", "adapter", "step", "total", "peak_gb")
TOKENS = list(range(100, 164))


def make_step(model, loss):
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    loss.backward()
    optimizer.step()


def plaintune_parts(model, dtype, load_in_4bit):
    import numpy as np

    from model import Batch, Segment
    from sft import SFTConfig, add_lora, load_4bit, sft_loss

    yield "import"
    config = SFTConfig(model=model, dtype=dtype, load_in_4bit=load_in_4bit)
    model = load_4bit(model, config, dtype=dtype)
    yield "load"
    add_lora(model, config)
    yield "adapter"
    ids = np.array(TOKENS, np.int32)
    loss, _ = sft_loss(model.train(), Batch.pack([[Segment(ids, ids)]]))
    loss = loss / (len(ids) - 1)
    make_step(model, loss)
    yield float(loss)


def transformers_parts(model, dtype, load_in_4bit):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    yield "import"
    options = {}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options)
    yield "load"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    yield "adapter"
    ids = torch.tensor([TOKENS])
    loss = model(input_ids=ids, labels=ids).loss
    make_step(model, loss)
    yield float(loss)


SIDES = {"plaintune": plaintune_parts, "transformers": transformers_parts}


def run_child(side, **options):
    began = last = time.perf_counter()
    seconds = {}
    for part in SIDES[side](**options):
        now = time.perf_counter()
        seconds[part if isinstance(part, str) else "step"] = now - last
        last = now
    import torch

    from support.memory import peak_memory_gb

    seconds["total"] = last - began
    seconds["peak_gb"] = peak_memory_gb(torch.device("cpu"))
    print(json.dumps({"loss": part, **seconds}))


def measure(side, args, env):
    task = {"side": side, "model": str(args.model), "dtype": args.dtype}
    task["load_in_4bit"] = args.load_in_4bit
    command = [sys.executable, HERE, "--child", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    if result.returncode:
        sys.exit(f"{side}\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = make_parser(__doc__, sides=",".join(SIDES))
    parser.add_argument("--load_in_4bit", action="store_true", help="hold the base in NF4")
    args = parser.parse_args()
    if args.child is not None:
        return run_child(**args.child)
    runs = {side: [] for side in args.sides.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        env = set_up(args, Path(folder))
        for side in runs:
            measure(side, args, env)  # the files of both are in the system's cache
        for _ in range(args.repeats):
            for side in runs:
                runs[side].append(measure(side, args, env))
                print(json.dumps({"side": side, **runs[side][-1]}), flush=True)
    losses = [run["loss"] for results in runs.values() for run in results]
    spread = f"{min(losses):.4f} to {max(losses):.4f}"
    print(f"\n{args.dtype}, median of {args.repeats}; losses {spread}")
    print(" " * 14 + "".join(f"{part:>10}" for part in PARTS))
    for side, results in runs.items():
        cells = [median(run[part] for run in results) for part in PARTS]
        print(f"{side:>14}" + "".join(f"{cell:10.2f}" for cell in cells))


if __name__ == "__main__":
    main()

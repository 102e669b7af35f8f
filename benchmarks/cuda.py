"""Everything that a GPU must show, in one call of under 8 minutes: one table and one JSON file.

    python benchmarks/cuda.py [--output cuda.json]         # on a GPU
    python benchmarks/cuda.py --device cpu                 # the same sections, tiny, in a minute

Five sections, each a process of its own with a limit of time. What fails is a row `FAILED: why` and
loses no other row; after an error that breaks the CUDA context the section's later rows fail too,
the other sections do not.

- resume       `resume.py`: runs killed with SIGKILL end byte for byte as undisturbed ones
- correctness  log-probabilities, gradients, answers and optimizers on the device beside the CPU's
               fp32: relative distance and its bound. Batches hold documents, a preference pair and
               a tree of three levels
- memory       a micro-batch that really does not fit is split and gives the same gradient; whether
               a step makes the host wait
- speed        tokens/s, peak memory beside the planner's estimate, and the share of a measured
               product's speed, for LoRA, QLoRA, full fine-tuning and DPO, beside transformers +
               PEFT on the same tokens; random weights, every token scored
- options      what checkpointing, attention, compiled blocks and offloaded activations change

`of roof` counts what a step can't do without by the usual rule: 4 FLOPs for a weight and token, 6
where the weights train; attention, LoRA and recomputation are left out. `published` are other
projects' own figures for the shape, not measured here and not always of the same settings:
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
if __name__ == "cuda":  # torch looks for a package of this name
    raise ImportError(f"{HERE} is a script")
if sys.path[0] == str(HERE.parent):
    sys.path[0] = str(ROOT)

# ruff: noqa: E402
import argparse
import gc
import json
import queue
import subprocess
import tempfile
import threading
import time
from functools import cache, partial
from statistics import median

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from dpo import DPOConfig, count_pairs, dpo_loss
from lora import adapter_parameters, add_lora
from model import (
    DTYPES,
    IGNORE,
    Batch,
    ModelConfig,
    Segment,
    Transformer,
    choose_attention,
    generate,
    load_model,
    set_tensor,
    token_logps,
)
from qlora import Linear4bit, load_4bit, swap_linear4bit
from sft import (
    SAVINGS,
    SFTConfig,
    accumulate,
    compute_gradient,
    count_scored,
    count_tokens,
    make_optimizer,
    sft_loss,
)
from support.memory import free_cached_memory, peak_memory_gb
from support.planner import estimate_memory

TINY = ROOT / "examples" / "tiny-qwen3"
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}
SHAPES = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "dtype": "float32",
    },
}
PUBLISHED = {
    "0.6B": "Unsloth 21.3k, Surogate 53.9k tokens/s",
    "4B": "Unsloth 12.4k, Surogate 15.9k tokens/s",
    "8B": "NeMo Automodel, H100: 40.6 % of 989 TFLOP/s (8B), 42.8 % by 4 FLOPs a weight (7B)",
}
__doc__ += "\n".join(f"    {shape:6}{figures}" for shape, figures in PUBLISHED.items())

# the seconds that each section may take
SECTIONS = {"resume": 90, "correctness": 100, "memory": 40, "speed": 170, "options": 70}


# --------------------------------------------------------------------------------------------------
# What is computed


def segment(rng, length, vocab, prefix=-1, sequence=0, scored=True):
    ids = rng.integers(3, vocab, length).astype(np.int32)
    labels = ids if scored else np.full_like(ids, IGNORE)
    return Segment(ids, labels, prefix, sequence)


def documents(count, length, vocab, seed=0):
    rng = np.random.default_rng(seed)
    return [[segment(rng, length, vocab)] for _ in range(count)]


def pairs(count, prompt, answer, vocab, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [
            segment(rng, prompt, vocab, scored=False),
            segment(rng, answer, vocab, 0, 0),
            segment(rng, answer, vocab, 0, 1),
        ]
        for _ in range(count)
    ]


def tree(vocab):
    """A header, two questions, two choices of each."""
    rng = np.random.default_rng(7)
    segments = [segment(rng, 20, vocab, scored=False)]
    for question in (1, 4):
        segments.append(segment(rng, 9, vocab, 0, scored=False))
        for choice in (0, 1):
            segments.append(segment(rng, 3 + choice, vocab, question, question // 2 + choice))
    return segments


def mixed_batch(device, vocab=2048):
    examples = [*documents(2, 33, vocab), *pairs(1, 12, 15, vocab), tree(vocab)]
    return Batch.pack(examples, device)


def settings(**changes):
    return SFTConfig(model=str(TINY), data=["none"], **changes)


def random_model(shape, config, device):
    """A model of a shape with random weights, and what trains in place; on meta as the planner
    needs it."""
    torch.manual_seed(0)
    model_config = ModelConfig.from_dict(QWEN3 | SHAPES[shape])
    with torch.device("meta"):
        model = Transformer(model_config)
    model.dtype = DTYPES[model_config.dtype]
    model.attention, _ = choose_attention("auto", model_config, model.dtype, device)
    weights = {name: p.shape for name, p in model.named_parameters()}
    swap_linear4bit(config, model, {})
    if device == "meta":
        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                layer.expect_own(model.dtype)
        for p in model.parameters():
            p.data = p.data.to(model.dtype)
    else:
        for name, size in weights.items():
            weight = torch.randn(size, device=device, dtype=model.dtype) * 0.02
            set_tensor(model, name, weight + ("norm" in name), device, model.dtype)
    add_lora(model, config)
    for name in SAVINGS:
        setattr(model, name, getattr(config, name))
    return model


def distance(ours, reference):
    """|ours - reference| / |reference|, over lists of tensors."""
    ours = torch.cat([x.detach().double().cpu().flatten() for x in ours])
    reference = torch.cat([x.detach().double().cpu().flatten() for x in reference])
    return float((ours - reference).norm() / reference.norm())


# --------------------------------------------------------------------------------------------------
# Sections: each yields (name, function); the function returns the row's values


BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def log_probabilities(device, dtype, attention, quant="", checkpointing=False, **changes):
    """(log-probs, gradients of what trains) of the embedded model, whose LoRA's B is not zero."""
    config = settings(load_in_4bit=bool(quant), bnb_4bit_quant_type=quant or "nf4", **changes)
    model = load_4bit(
        str(TINY), config, dtype=dtype, device=device, attn_implementation=attention
    )
    add_lora(model, config)
    model.gradient_checkpointing = checkpointing
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if name.endswith("lora_B"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    logps = model.train().logps(mixed_batch(device))
    scale = 1024.0 if dtype == "float16" else 1.0  # as a gradient scaler does
    (logps.mean() * scale).backward()
    return [logps], [p.grad / scale for p in trained.values()]


reference_of = cache(partial(log_probabilities, "cpu", "float32", "eager"))


def compare_logps(device, dtype, attention, **changes):
    reference = reference_of(**changes)
    ours = log_probabilities(device, dtype, attention, **changes)
    values, gradients = map(distance, ours, reference)
    return checked(max(values, gradients), BOUNDS[dtype], logps=values, gradients=gradients)


def checked(value, bound, **more):
    return {"distance": value, "bound": bound, "ok": value <= bound, **more}


def compare_head(device, dtype, trains):
    """token_logps alone, at a vocabulary that no block size divides."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 64, generator=generator) for n in (301, 5003))
        targets = torch.randint(5003, (301,), generator=generator).to(device)
        hidden, weight = (
            x.to(device, DTYPES[dtype]).requires_grad_(grad)
            for x, grad in ((hidden, True), (weight, trains))
        )
        logps = token_logps(hidden, weight, targets)
        logps.mean().backward()
        return [logps], [hidden.grad, *([weight.grad] if trains else [])]

    values, gradients = map(distance, run(device, dtype), run("cpu", "float32"))
    return checked(max(values, gradients), BOUNDS[dtype], logps=values, gradients=gradients)


def compare_answers(device, dtype):
    """The share of greedy tokens that differ from the CPU's."""
    rng = np.random.default_rng(0)
    header = rng.integers(3, 2048, 20).tolist()
    prompts = [header + rng.integers(3, 2048, n).tolist() for n in (3, 9, 5)]
    ours, reference = (
        generate(load_model(str(TINY), *where), prompts, 24, eos_ids=[], batch_size=2)
        for where in ((dtype, device), ("float32", "cpu"))
    )
    differing = np.mean([a != b for x, y in zip(ours, reference) for a, b in zip(x, y)])
    return checked(float(differing), 0.0 if dtype == "float32" else 0.5)


def compare_optimizer(device, name):
    """20 steps on a quadratic function, beside AdamW in fp32 on the CPU."""

    def run(device, name):
        target = torch.linspace(-1, 1, 8192, device=device).view(64, 128)
        p = torch.nn.Parameter(torch.zeros_like(target))
        optimizer = make_optimizer({"lora_B": p}, settings(optim=name, learning_rate=0.02))
        for _ in range(20):
            optimizer.zero_grad()
            (p - target).square().sum().backward()
            optimizer.step()
        return [p]

    bound = 1e-4 if name == "adamw" else 5e-2
    return checked(distance(run(device, name), run("cpu", "adamw")), bound)


def correctness(device):
    narrow = ["float32", "bfloat16", "float16"]
    for attention, dtypes in (("eager", narrow), ("sdpa", narrow), ("varlen", narrow[1:])):
        for dtype in dtypes:
            if attention == "varlen" and device == "cpu":
                continue  # it is CUDA's
            compare = partial(compare_logps, device, dtype, attention)
            yield f"{attention}, {dtype}", compare
    variants = {
        "checkpointing": {"checkpointing": True},
        "DoRA": {"use_dora": True},
        "full": {"lora_r": 0},
        "nf4": {"quant": "nf4"},
        "fp4": {"quant": "fp4"},
    }
    for name, changes in variants.items():
        yield f"{name}, float32", partial(compare_logps, device, "float32", "sdpa", **changes)
        if device != "cpu":
            compare = partial(compare_logps, device, "bfloat16", "auto", **changes)
            yield f"{name}, bfloat16", compare
    for trains in (False, True):
        for dtype in ("float32", "bfloat16"):
            name = f"token_logps, head {'trains' if trains else 'frozen'}, {dtype}"
            yield name, partial(compare_head, device, dtype, trains)
    for dtype in ("float32", "bfloat16"):
        yield f"generation, {dtype}", partial(compare_answers, device, dtype)
    for name in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        yield name, partial(compare_optimizer, device, name)


def resume(device):
    if device == "cpu":
        return  # tests/test_sft.py runs it there
    processes = {}
    for case in ("lora-fp16-scaler", "qlora-paged_adamw_8bit", "full", "dpo"):  # side by side
        command = [sys.executable, HERE.parent / "resume.py", "--kills", "1", "--cases", case]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes[case] = subprocess.Popen(command, **pipes)
    for case, process in processes.items():
        yield case, partial(end_of, process)


def end_of(process):
    lines = process.communicate()[0].strip().splitlines()
    return {"ok": process.returncode == 0, "result": lines[0] if lines else ""}


def split_after_out_of_memory(device):
    """The gradient of a step whose first try does not fit, beside one that was small at once. On a
    CPU the shortage is simulated."""
    shape = "0.6B" if device == "cuda" else "tiny"
    tokens, examples = (16384, 8) if device == "cuda" else (256, 8)
    config = settings(micro_batch_tokens=tokens)
    model = random_model(shape, config, device).train()
    rows = documents(examples, tokens // examples, model.config.vocab_size)
    most = tokens // 3

    def loss_fn(model, batch):
        if device == "cpu" and len(batch.tokens) > most:
            raise MemoryError("simulated")
        return sft_loss(model, batch)

    def gradient():
        model.zero_grad()
        count = sum(map(count_scored, rows))
        compute_gradient(model, rows, count, loss_fn, config, [0], lambda loss: loss)
        return [p.grad.clone() for p in adapter_parameters(model).values()]

    used = 0
    if device == "cuda":  # room for about half of a micro-batch's activations
        config.micro_batch_tokens = tokens // 4
        gradient()
        free_cached_memory()
        peak_memory_gb(torch.device(device))
        gradient()
        used = peak_memory_gb(torch.device(device))
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        free_cached_memory()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.3 * used / total))
        config.micro_batch_tokens = tokens
    try:
        split = gradient()
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    lowered = config.micro_batch_tokens
    small = gradient()
    bound = 1e-6 if device == "cpu" else 1e-2  # attention's backward has no fixed order on CUDA
    return checked(distance(split, small), bound, split_to=lowered, asked=tokens, limit_gb=used)


def waits_of_the_host(device):
    """Every operation of a step, packing included, that makes the host wait for the device."""
    if device == "cpu":
        return {"ok": True, "result": "a CPU does not wait"}
    model = random_model("0.6B", settings(), device)
    rows = pairs(2, 12, 20, model.config.vocab_size)
    config = DPOConfig(model=str(TINY), data=["none"])
    losses = {"sft": sft_loss, "dpo": partial(dpo_loss, config=config)}
    for loss_fn in losses.values():
        for mode in ("default", "error"):  # the first time libraries start
            torch.cuda.set_sync_debug_mode(mode)
            try:
                loss_fn(model, Batch.pack(rows, device))[0].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return {"ok": True, "result": "none"}


def memory(device):
    yield "split after out of memory", partial(split_after_out_of_memory, device)
    yield "host waits within a step", partial(waits_of_the_host, device)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def roof(device):
    """FLOP/s of a large plain product, the most that training could reach now."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / median(seconds[2:])


def timed(step, device, steps=5):
    """(median seconds, peak GB) of step(), the first ones left out."""
    for _ in range(2):
        step()
    wait(device)
    peak_memory_gb(torch.device(device))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds), peak_memory_gb(torch.device(device))


def speed_values(model, rows, seconds, flops, per_weight):
    tokens = sum(map(count_tokens, rows))
    weights = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "lora" not in name
    )
    weights += sum(
        layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, Linear4bit)
    )
    share = per_weight * weights * tokens / seconds / flops
    return {"tokens_per_second": tokens / seconds, "of_roof": share, "tokens": tokens}


def train_steps(shape, kind, rows, device, flops, prepare=lambda model: model, **changes):
    """plaintune's optimizer steps on `rows`, one micro-batch; the planner's estimate beside."""
    kinds = {
        "LoRA": {},
        "QLoRA": {"load_in_4bit": True},
        "full": {"lora_r": 0},
        "full, 8-bit AdamW": {"lora_r": 0, "optim": "adamw_8bit"},
        "DPO": {},
    }
    config, loss_fn, count = settings(**kinds[kind], **changes), sft_loss, count_scored
    if kind == "DPO":
        preferences = DPOConfig(model=str(TINY), data=["none"])
        loss_fn, count = partial(dpo_loss, config=preferences), count_pairs
    planned = random_model(shape, config, "meta")
    planned.attention, _ = choose_attention("auto", planned.config, planned.dtype, device)
    pack = partial(Batch.pack, rows, device)
    parts, _ = estimate_memory(planned, pack, torch.device(device), loss_fn, config, True, 8)
    model = random_model(shape, config, device).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, config)
    model, total = prepare(model), sum(map(count, rows))

    def step():
        accumulate(model, rows, total, loss_fn, sys.maxsize)
        clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds, peak = timed(step, device)
    values = speed_values(model, rows, seconds, flops, 6 if config.lora_r == 0 else 4)
    return values | {
        "peak_gb": peak,
        "planned_gb": sum(parts.values()),
        "attention": model.attention,
        "published": PUBLISHED.get(shape, ""),
    }


def peer_steps(shape, rows, device, flops, checkpointing):
    """LoRA by transformers + PEFT, with the loss of transformers, in one batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3Config

    raw = QWEN3 | SHAPES[shape]
    dtype = DTYPES[raw["dtype"]]
    config = Qwen3Config(**{key: raw[key] for key in raw.keys() - {"model_type", "dtype"}})
    config.use_cache = False
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    ids = torch.from_numpy(np.stack([row[0].ids for row in rows])).long().to(device)
    model.train()

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds, peak = timed(step, device)
    return speed_values(model, rows, seconds, flops, 4) | {"peak_gb": peak}


def speed(device):
    flops = roof(device)
    yield "roof", lambda: {"tflops": flops / 1e12}
    shapes, short, long = ["0.6B", "4B"], (2, 2048), (8, 2048)
    if device == "cpu":
        shapes, short, long = ["tiny"], (2, 64), (2, 64)
    for shape in shapes:
        vocab = (QWEN3 | SHAPES[shape])["vocab_size"]
        half = short[1] // 2
        for size in dict.fromkeys((short, long)):
            rows, name = documents(*size, vocab), f"{size[0]} x {size[1]:,}"
            recompute = shape == "4B" and size == long  # its activations would not fit
            extra = ", checkpointing" if recompute else ""
            for kind in ("LoRA", "QLoRA"):
                run = partial(train_steps, shape, kind, rows, device, flops)
                yield (
                    f"{shape}, {name}: {kind}{extra}",
                    partial(run, gradient_checkpointing=recompute),
                )
            run = partial(peer_steps, shape, rows, device, flops, recompute)
            yield f"{shape}, {name}: transformers + PEFT, LoRA{extra}", run
        rows, name = documents(*short, vocab), f"{short[0]} x {short[1]:,}"
        kind = "full, 8-bit AdamW" if shape == "4B" else "full"
        run = partial(train_steps, shape, kind, rows, device, flops)
        yield f"{shape}, {name}: {kind}", run
        rows = pairs(short[0], half, half // 2, vocab)
        run = partial(train_steps, shape, "DPO", rows, device, flops)
        yield f"{shape}, {short[0]} pairs of {half} + 2 x {half // 2}: DPO", run


def compile_blocks(model):
    for layer in model.model.layers:
        layer.compile()
    return model


def use_attention(name, model):
    model.attention = name
    return model


def options(device):
    flops = roof(device)
    shape, size = ("0.6B", (2, 2048)) if device == "cuda" else ("tiny", (2, 64))
    rows = documents(*size, (QWEN3 | SHAPES[shape])["vocab_size"])
    run = partial(train_steps, shape, "LoRA", rows, device, flops)
    yield "as it is", run
    yield "gradient checkpointing", partial(run, gradient_checkpointing=True)
    yield "selective checkpointing", partial(run, selective_checkpointing=True)
    if device == "cuda":
        yield "sdpa attention", partial(run, prepare=partial(use_attention, "sdpa"))
        yield "8-bit AdamW", partial(run, optim="adamw_8bit")
        yield "activations on the CPU", partial(run, activation_offloading=True)
        yield "compiled blocks", partial(run, prepare=compile_blocks)


# --------------------------------------------------------------------------------------------------
# Running


def run_section(name, device):
    """The child: prints a JSON line for each row as it is there."""
    for case, function in globals()[name](device):
        began = time.perf_counter()
        row = {"section": name, "case": case}
        try:
            row |= function()
        except Exception as error:  # a row that fails must not lose the others
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            row |= {"ok": False, "failed": reason[:200]}
        del function
        gc.collect()
        free_cached_memory()
        print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 2)}), flush=True)


def read_lines(stream, lines):
    for line in stream:
        lines.put(line)
    lines.put(None)


def run_child(name, device, seconds):
    """Yields a section's rows; at the end of its time a row that says so."""
    command = [sys.executable, HERE, "--device", device, "--child", name]
    console, lines, deadline = tempfile.TemporaryFile("w+"), queue.Queue(), time.time() + seconds
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=console, text=True) as process:
        threading.Thread(target=read_lines, args=(process.stdout, lines), daemon=True).start()
        try:
            while line := lines.get(timeout=max(0.0, deadline - time.time())):
                if line.startswith("{"):
                    yield json.loads(line)
        except queue.Empty:
            process.kill()
            yield {"section": name, "case": "rest", "failed": f"stopped after {seconds} s"}
            return
    if process.returncode:
        console.seek(0)
        reason = (console.read().strip().splitlines() or [f"exit {process.returncode}"])[-1]
        yield {"section": name, "case": "rest", "failed": reason[:200]}


def describe(row):
    """The row's result as a line of the table."""
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    words = ["FAILED: beyond its bound"] if row.get("ok") is False else []
    for key, value in row.items():
        if key in ("section", "case", "seconds", "ok") or value == "":
            continue
        words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(words)


def machine(device):
    name = torch.cuda.get_device_name() if device == "cuda" else torch.cpu.get_capabilities()
    name = name if isinstance(name, str) else name.get("cpu_name", "CPU")
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default="cuda.json", help="default: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_section(args.child, args.device)
    report = {"machine": machine(args.device), "rows": []}
    print(report["machine"])
    for name in args.sections.split(","):
        print(f"\n{name}", flush=True)
        limit = SECTIONS[name] if args.device == "cuda" else 600
        for row in run_child(name, args.device, limit):
            report["rows"].append(row)
            print(f"  {row['case']:58} {describe(row)}", flush=True)
            args.output.write_text(json.dumps(report, indent=1))
    failed = [row["case"] for row in report["rows"] if "failed" in row or row.get("ok") is False]
    print(f"\n{len(report['rows'])} rows, {len(failed)} failed; written to {args.output}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

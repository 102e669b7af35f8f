"""What a run will need: memory by part, from settings and headers alone, and time."""

import math
import time
import weakref
from collections import Counter, defaultdict

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from support.errors import brief
from support.memory import free_memory_gb, keep_freed_memory, peak_memory_gb
from support.report import aligned_columns

PARTS = (
    "weights",
    "adapter",
    "gradients",
    "activations",
    "logits",
)
FLOPS = {str(op): count for op, count in flop_registry.items()}


class Meter(TorchDispatchMode):
    """Counts the bytes of live tensors by kind, keeps them at their peak, and adds up the products'
    floating-point operations. It sees what operators return, not what they hold inside."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.flops = 0
        self.busy = 0  # bytes of activations and logits at the peak of forward and backward
        self.kinds = {}  # of the storages alive
        self.live = Counter()
        self.peak = Counter()

    def note(self, tensor, kind):
        """Counts a tensor's storage as of this kind from here on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self.kinds:
            self.live[self.kinds[key]] -= size
        else:
            weakref.finalize(storage, lambda: self.live.subtract({self.kinds.pop(key): size}))
        self.kinds[key] = kind
        self.live[kind] += size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if kwargs.get("pin_memory"):  # of the CPU, beside a GPU
            return result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.untyped_storage()._cdata not in self.kinds:
                logits = tensor.shape[-1:] == (self.vocab_size,)
                self.note(tensor, "logits" if logits else "activations")
        count = FLOPS.get(str(op.overloadpacket).rstrip("_"))
        if count:
            self.flops += count(*args, **kwargs, out_val=result)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return result


def estimate_memory(model, pack, device, loss_fn, config, first, micro_batches):
    """({part: GB} at the peak of a run's steps, Meter of its largest micro-batch), from headers,
    settings and examples alone: that micro-batch runs forward and backward under FakeTensorMode.
    model: on meta, with what trains in place; pack() -> the micro-batch on `device`; first: whether
    it is the first of its step; micro_batches: of the run. No parts where the loss needs values."""
    meter = Meter(model.config.vocab_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), meter:
            model.to_empty(device=device).train()
            for tensor in model.state_dict(keep_vars=True).values():
                trains = tensor.requires_grad and config.lora_r
                meter.note(tensor, "adapter" if trains else "weights")
            if config.init_lora_weights.startswith(("pissa", "olora")):
                for layer in model.modules():
                    if hasattr(layer, "lora_A"):
                        layer.start = layer.lora_A.clone(), layer.lora_B.clone()
            trained = [p for p in model.parameters() if p.requires_grad]
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: meter.note(p.grad, "gradients"))
                if not first:
                    p.grad = torch.empty_like(p)
                    meter.note(p.grad, "gradients")
            loss_fn(model, pack())[0].backward()  # packed here: all of it is fake
    except Exception as error:  # the run itself may still work
        print(f"memory: can't be estimated here ({brief(str(error), 80)})")
        return {}, meter
    memory = {part: meter.peak[part] for part in PARTS}
    gradients = sum(p.nbytes for p in trained)
    meter.busy = busy = memory["activations"] + memory["logits"]
    if gradients > busy + memory["gradients"]:  # then the optimizer's step is the peak
        memory["gradients"] = gradients
        memory["activations"] = 0
        memory["logits"] = 0
    memory["optimizer"] = sum(optimizer_bytes(p, config) for p in trained)
    if device.type != "cuda":
        memory |= process_bytes(model, busy, meter.peak["logits"], micro_batches)
    return {part: size / 1e9 for part, size in memory.items()}, meter


def process_bytes(model, busy, logits, micro_batches):
    """What a CPU's process holds beside tensors. Fitted to runs at the Qwen3-0.6B shape:
    micro-batches of other lengths have 16-bit kernels of their own, and leave holes in the heap."""
    lengths = math.log2(min(64, micro_batches))
    kernels = 0.05e9 if model.dtype == torch.float32 else 0.2e9 + 0.1e9 * lengths
    holes = busy / 8 * lengths + 2 * logits * model.head_weight().requires_grad
    peak_memory_gb(torch.device("cpu"))  # starts a new measurement
    process = peak_memory_gb(torch.device("cpu")) * 1e9
    return {"process": process, "kernels and holes": kernels + holes}


# states of a parameter's size; AdamW has 2
STATES = {"sgd": 0, "lion": 1, "adagrad": 1, "rmsprop": 1}


def optimizer_bytes(parameter, config):
    """Bytes of an optimizer's state: fp32 values; in 8 bit with a scale for 256 of them, which
    bitsandbytes leaves out below 4,096; Adafactor has a row and a column for a matrix."""
    n, states = parameter.numel(), 2
    for name, count in STATES.items():
        if name in config.optim:
            states = count
    if config.optim == "adafactor":
        return 4 * (sum(parameter.shape) if parameter.dim() > 1 else n)
    if "8bit" in config.optim and n >= 4096:
        return states * (n + 4 * math.ceil(n / 256))
    return 4 * states * n


def by_module(model):
    """{module's name, like q_proj: [trainable, all parameters]}; sums to count_parameters."""
    counts = defaultdict(lambda: [0, 0])
    for path, module in model.named_modules():
        row = counts[path.removesuffix(".base_layer").rpartition(".")[2]]
        for p in module.parameters(recurse=False):
            row[0] += p.numel() * p.requires_grad
            row[1] += p.numel()
        if getattr(module, "quantized", False):
            row[1] += module.in_features * module.out_features
    return {name: row for name, row in counts.items() if row[1]}


def print_plan(modules, memory, steps, tokens, scored):
    """Prints parameters by module, the plan's tokens, and the peak memory by part."""
    totals = [sum(counts) for counts in zip(*modules.values())]
    rows = [("parameters", "train", "all")]
    for name, (trained, count) in {**modules, "all": totals}.items():
        rows.append((name, f"{trained:,}", f"{count:,}"))
    print(f"\n{aligned_columns(*rows)}")
    print(f"\n{steps}: {tokens:,} tokens, {round(scored):,} of them scored\n")
    rows = [("peak memory", "GB")]
    for part, size in {**memory, "all": sum(memory.values())}.items():
        rows.append((part, f"{size:.3f}"))
    print(aligned_columns(*rows))


def print_hint(config, batch_size):
    """What a LoRA asks of learning rate and batch. Source: Schulman et al. 2025, LoRA Without
    Regret, thinkingmachines.ai/blog/lora; the 32 is from TRL's guide to it."""
    print(
        "\nthe best learning rate of a LoRA is about 10 times that of full fine-tuning, and fewer "
        f"than 32 examples a step serve it best: here {config.learning_rate:g} and {batch_size}"
    )


def plan_ranks(model, blocks, memory, busy, ranks, micro_batches):
    """{what --sharding divides: (GB of memory, GB sent in a step of so many micro-batches)}, each
    of a rank. Adding up sends 2 (N-1)/N of the gradients, gathering (N-1)/N of the weights, forward
    and backward, scattering sums (N-1)/N of the gradients. Two blocks are whole at a time, the next
    one being gathered ahead. busy: GB of activations and logits, where the optimizer's step is the
    peak of `memory`."""
    away, total = (ranks - 1) / ranks, sum(memory.values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / 1e9
    adapted, sizes = hasattr(model, "adapter"), []  # GB of what is divided of each block
    for block in blocks:
        divided = block.state_dict(keep_vars=True)
        if adapted:  # less norms, biases and the scales of 4-bit weights
            divided = {
                key: x
                for key, x in divided.items()
                if x.dim() > 1 and not x.requires_grad and ".weight." not in key
            }
        sizes.append(sum(x.nbytes for x in divided.values()) / 1e9)
    modes = {"no": (total, 2 * away * trained)}
    if adapted:
        kept = total - away * sum(sizes) + 2 * max(sizes)
        modes["base"] = kept, 2 * away * (trained + micro_batches * sum(sizes))
        return modes
    kept = sum(memory.get(part, 0) for part in ("process", "kernels and holes")) + busy
    kept += (memory.get("weights", 0) + trained + memory.get("optimizer", 0)) / ranks
    # the embedding and the head, and their gradient, are whole; so is a block's gradient, twice
    # while it is sent
    root = trained - sum(sizes)
    modes["grad_op"] = (
        kept + trained + root + max(root, 2 * max(sizes)),
        away * trained * (1 + micro_batches),
    )
    modes["full"] = (
        kept + 2 * root + max(root, 4 * max(sizes)),
        away * micro_batches * (2 * trained + sum(sizes)),
    )
    return modes


def print_ranks(modes, ranks):
    rows = [("--sharding", "GB of memory", "GB sent a step")]
    for mode, (memory, sent) in modes.items():
        rows.append((mode, f"{memory:.3f}", f"{sent:.4f}"))
    print(f"\neach of {ranks} processes:\n{aligned_columns(*rows)}")


def fits(memory, device, config, longest, estimate):
    """Whether the memory is free. If not, prints the peak of settings that need less, each with
    those before, until it is. longest: tokens of an example; estimate({setting: value}) -> GB."""
    free = free_memory_gb(device) + memory.get("process", 0)
    if sum(memory.values()) <= free:
        return True
    print(
        f"\n{free:.2f} GB are free: it does not fit and is not tried. What needs less, combined:"
    )
    options = {"gradient_checkpointing": True, "micro_batch_tokens": longest}
    if config.lora_r:
        options["load_in_4bit"] = True
    else:
        options["optim"] = "adamw_8bit"
    changes = {}
    for key, value in options.items():
        changes[key] = value
        peak = estimate(changes)
        print(f"  --{key} {str(value).lower()}: {peak:.2f} GB")
        if peak <= free:
            return False
    print("  a smaller --max_length or --model")
    return False


def print_speed(model, run_micro_batch, size, flops, tokens, steps):
    """Times a micro-batch of `size` tokens and prints what that means for a run, and its share of
    the speed of plain products (T, C) x (C, I) of the model's shapes."""
    with keep_freed_memory():
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            run_micro_batch()
            seconds = time.perf_counter() - began
    options = {"dtype": model.dtype, "device": model.device}
    tensors = {
        "x": torch.randn(size, model.config.hidden_size, **options),
        "w": torch.randn(model.config.intermediate_size, model.config.hidden_size, **options),
    }
    timer = Timer("x @ w.t()", globals=tensors, num_threads=torch.get_num_threads())
    product = min(timer.blocked_autorange(min_run_time=0.3).times)
    share = flops / seconds * product / (2 * size * tensors["w"].numel())
    rate = size / seconds
    print(
        f"\nthe largest micro-batch runs, forward and backward, at {rate:,.0f} tokens/s "
        f"({share:.0%} of what plain products of the model's shapes reach): "
        f"{tokens / rate / steps:.2f} s a step, {tokens / rate / 60:,.1f} min without evaluation "
        "and answers"
    )

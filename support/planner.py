"""What a run will need, before it runs: memory by part, from settings and headers alone, and time."""

import math
import weakref
from collections import Counter

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from support.errors import brief
from support.memory import peak_memory_gb
from support.report import aligned_columns

FLOPS = {str(op): count for op, count in flop_registry.items()}


class Meter(TorchDispatchMode):
    """Counts the bytes of live tensors by kind while the block runs, keeps them at their peak, and adds up the
    products' floating-point operations. It sees what PyTorch's operators return, not what one holds inside."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.kinds, self.live, self.peak, self.flops = (
            vocab_size,
            {},
            Counter(),
            Counter(),
            0,
        )

    def note(self, tensor, kind):
        """Counts a tensor's storage as of this kind from here on."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.kinds:
            self.live[self.kinds[key]] -= size
        else:
            weakref.finalize(storage, lambda: self.live.subtract({self.kinds.pop(key): size}))
        self.kinds[key] = kind
        self.live[kind] += size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **kwargs or {})
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in self.kinds
            ):
                self.note(
                    tensor, "logits" if tensor.shape[-1:] == (self.vocab_size,) else "activations"
                )
        if count := FLOPS.get(str(op.overloadpacket).rstrip("_")):
            self.flops += count(*args, **kwargs or {}, out_val=found)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return found


def estimate_memory(model, batch, loss_fn, config, first=False, micro_batches=1):
    """What the steps of a run will need, from headers, settings and examples alone: ({part: GB} at their peak, FLOPs of
    `batch`, the largest micro-batch, which is `first` of its step). The program itself runs that batch, forward and
    backward, on tensors without content (FakeTensorMode). model: on meta, with what trains in place; micro_batches: of
    the whole run, whose lengths differ."""
    device, memory, meter = batch.tokens.device, {}, Meter(model.config.vocab_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), meter:
            model.to_empty(device=device).train()
            for tensor in model.state_dict(keep_vars=True).values():
                meter.note(
                    tensor, "adapter" if tensor.requires_grad and config.lora_r else "weights"
                )
            for layer in model.modules() if config.init_lora_weights.startswith("pissa") else ():
                if hasattr(layer, "lora_A"):
                    layer.start = torch.empty_like(layer.lora_A), torch.empty_like(layer.lora_B)
            trained = [p for p in model.parameters() if p.requires_grad]
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: meter.note(p.grad, "gradients"))
                if not first:  # the step's earlier micro-batches have made it
                    p.grad = torch.empty_like(p)
                    meter.note(p.grad, "gradients")
            loss_fn(model, batch)[0].backward()
        memory = {
            kind: meter.peak[kind]
            for kind in ("weights", "adapter", "gradients", "activations", "logits")
        }
        gradients = 4 * sum(p.numel() for p in trained)
        busy = memory["activations"] + memory["logits"]
        if gradients > busy + memory["gradients"]:  # then the optimizer's moment is the largest
            memory |= {"gradients": gradients, "activations": 0, "logits": 0}
        memory["optimizer"] = sum(optimizer_bytes(p, config) for p in trained)
        if (
            device.type != "cuda"
        ):  # there the peak is the process's. Fitted to runs at the Qwen3-0.6B shape:
            # micro-batches of other lengths have 16-bit kernels of their own, and leave holes in glibc's heap
            more = math.log2(min(64, micro_batches))
            kernels = 0.05e9 if model.dtype == torch.float32 else 0.2e9 + 0.1e9 * more
            holes = busy / 8 * more + 2 * memory["logits"] * model.head_weight().requires_grad
            peak_memory_gb(device)
            memory |= {
                "process": peak_memory_gb(device) * 1e9,
                "kernels and holes": kernels + holes,
            }
    except Exception as error:  # a loss that hangs on values, say; the run itself may still do
        memory = {}
        print(f"memory: can't be estimated here ({brief(str(error), 80)})")
    return {part: size / 1e9 for part, size in memory.items()}, meter.flops


def optimizer_bytes(parameter, config):
    """Bytes of AdamW's state; in 8 bit with two scales for 256 values, which bitsandbytes leaves out below 4,096."""
    n = parameter.numel()
    return 2 * n + 8 * -(-n // 256) if "8bit" in config.optim and n >= 4096 else 8 * n


def by_module(model):
    """{modules' name, like q_proj: [trainable, all parameters]}; sums to count_parameters."""
    found = {}
    for path, module in model.named_modules():
        own = [(p.numel() * p.requires_grad, p.numel()) for p in module.parameters(recurse=False)]
        own += (
            [(0, module.in_features * module.out_features)]
            if getattr(module, "quantized", False)
            else []
        )
        name = path.removesuffix(".base_layer").rpartition(".")[2]
        found[name] = [sum(counts) for counts in zip(found.get(name, (0, 0)), *own)]
    return {name: counts for name, counts in found.items() if counts[1]}


def print_plan(modules, memory, steps, tokens, scored):
    """Prints parameters by module, the plan's tokens, and the peak memory by part."""
    modules = [*modules.items(), ("all", map(sum, zip(*modules.values())))]
    print(
        "\n"
        + aligned_columns(
            ("parameters", "train", "all"), *((name, *map("{:,}".format, n)) for name, n in modules)
        )
    )
    print(
        f"\n{len(steps)} steps of {steps.batch_size} examples: {tokens:,} tokens, {round(scored):,} of them scored\n"
    )
    parts = [*memory.items(), ("all", sum(memory.values()))]
    print(aligned_columns(("peak memory", "GB"), *((part, f"{size:.3f}") for part, size in parts)))


def print_what_fits(peak, free, changes, estimate):
    """Prints the peaks of `changes`, [(setting, value), ...] each with those before, until one fits into `free` GB.
    estimate({setting: value}) -> GB."""
    print(
        f"\n{free:.2f} GB are free: it does not fit and is not tried. What needs less, each with those before:"
    )
    given = {}
    for key, value in changes:
        given[key] = value
        peak = estimate(given)
        print(f"  --{key} {str(value).lower()}: {peak:.2f} GB")
        if peak <= free:
            return
    print("  a smaller --max_length or --model")


def share_of_roof(model, tokens, flops, seconds):
    """The speed of `flops` in `seconds` as a share of what plain products (tokens, C) x (C, I) of the model's shapes
    reach."""
    c = model.config
    x, w = (
        torch.randn(n, c.hidden_size, dtype=model.dtype, device=model.device)
        for n in (tokens, c.intermediate_size)
    )
    timer = Timer("x @ w.t()", globals={"x": x, "w": w}, num_threads=torch.get_num_threads())
    return (
        flops
        / seconds
        / (2 * len(x) * w.numel() / min(timer.blocked_autorange(min_run_time=0.3).times))
    )

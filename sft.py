"""Supervised fine-tuning, and the training loop that SFT and DPO share.

The decision that is not obvious: a step is planned before it runs. Which examples it holds follows from (seed, epoch,
step) alone, and the number that divides its loss (scored tokens, or pairs) is known from the data. So how a step is cut
into micro-batches is a matter of memory, never of the result; and going on at step k needs no random state.

    python sft.py                                        # the embedded tiny model and question set, about a minute
    python sft.py --model Qwen/Qwen3-0.6B --data my.jsonl --output_dir output/mine
    python sft.py --config configs/mine.yaml --learning_rate 1e-4
"""

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import weakref
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from data import Tokenizer, load_examples, parse_config, split_holdout
from eval import accuracy, answer_questions, ask_choice, choice_metrics
from lora import (HubConfig, LoRAConfig, adapter_parameters, add_lora, ask_hub, count_parameters, load_adapter,
                  lora_layers, merge, merge_lora, open_adapter, open_repositories, push, write_adapter)
from model import (COMPANIONS, DTYPES, IGNORE, Batch, ModelConfig, UserError, blamed, brief, check_least,
                   choose_attention, cli, give_back, kept_pages, locked, nearest, open_model, pick_device, plain,
                   read_json, read_tensor, resolve, save_model, write_tensors, written_aside)
from qlora import QuantConfig, bitsandbytes, hold_4bit, load_4bit, measure_merge

EXAMPLES = Path(__file__).resolve().parent / "examples"


@dataclass
class SFTConfig(LoRAConfig, QuantConfig, HubConfig):
    """Everything a run can be told. Names are those of transformers' TrainingArguments and BitsAndBytesConfig, TRL's
    SFTConfig and PEFT's LoraConfig."""

    model: str = ""  # folder or hub id of the model to train; none: the embedded tiny one
    revision: str | None = None  # branch, tag or commit of a hub id
    adapter: str = ""  # a LoRA (PEFT's layout, or a run folder) to go on training, with its own rank and targets
    data: list[str] = field(default_factory=list)  # training rows: files or hub ids; none: the embedded questions
    eval_data: list[str] = field(default_factory=list)  # held-out rows: files or hub ids
    val_size: float = 0.0  # without eval_data: rows held out of data, a share below 1 or a number of rows
    output_dir: str = "output/sft"  # the run folder
    dry_run: bool = False  # print parameters, steps, the peak memory and the time to expect; train and write nothing
    max_samples: int | None = None  # use this many rows of data, drawn by seed
    max_eval_samples: int | None = None  # use this many held-out rows
    recipe: str = ""  # reads a data set's own rows: mcqa, ecqa, alpaca, chatml, movielens, ultrafeedback, gsm8k
    recipe_args: dict = field(default_factory=dict)  # its arguments, as {"cot": 0.5}
    max_length: int = 1024  # tokens per example; a longer one loses the start of its prompt
    completion_only_loss: bool | None = None  # true: the last assistant turn alone; false: completions' prompts too
    assistant_only_loss: bool = True  # of conversations, score the assistant's turns; false: everything
    eval_answers: int = 64  # held-out rows whose "Answer: X" is generated and checked before and after; 0: none
    num_samples: int = 3  # of those, how many are shown
    max_new_tokens: int = 128  # longest generated answer

    dtype: str = "auto"  # of base weights and matmuls: auto (the checkpoint's), bfloat16, float16, float32
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    attn_implementation: str = "auto"  # auto, varlen (flash), sdpa, eager
    gradient_checkpointing: bool = False  # recompute each block in backward: a third more time, far less memory
    micro_batch_tokens: int = 0  # tokens per forward pass; 0: 512 on a CPU, 1024 there in 4 bit, 16384 on a GPU

    num_train_epochs: float = 3.0  # passes over the data
    max_steps: int = -1  # optimizer steps; overrides num_train_epochs when positive
    per_device_train_batch_size: int = 8  # examples per step, times gradient_accumulation_steps
    gradient_accumulation_steps: int = 1  # times this many; memory is micro_batch_tokens' matter
    learning_rate: float = 2e-4  # peak learning rate
    lr_scheduler_type: str = "cosine"  # cosine, linear, constant
    warmup_ratio: float = 0.03  # share of the steps over which the learning rate rises from 0
    warmup_steps: int = 0  # number of those steps; overrides warmup_ratio when positive
    optim: str = "adamw"  # adamw; adamw_8bit, paged_adamw_8bit: state in 8 bit, that of the latter in CPU memory too
    loraplus_lr_ratio: float | None = None  # LoRA+: B's learning rate is this many times A's
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.999  # decay of the gradient's square
    adam_epsilon: float = 1e-8  # added to the root of the square
    weight_decay: float = 0.0  # AdamW's, on everything but norms and biases
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    max_skipped_steps: int = 3  # stop after so many steps in a row whose loss or gradient is not finite
    seed: int = 42  # of order, dropout, adapter start and row choice

    logging_steps: int = 10  # steps between lines of log.jsonl
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])  # and wandb, trackio; or all, or none
    eval_strategy: str = "epoch"  # when the held-out loss is measured: no, steps, epoch
    eval_steps: int = 100  # steps between evaluations with eval_strategy steps
    save_strategy: str = "steps"  # when a checkpoint is written: no, steps, epoch
    save_steps: int = 500  # steps between checkpoints with save_strategy steps
    save_total_limit: int | None = None  # keep this many newest checkpoints, the best one among them
    metric_for_best_model: str | None = None  # what tells the best step: loss, accuracy, f1, ...; none: loss
    greater_is_better: bool | None = None  # whether more of it is better; none: yes, unless it is a loss
    load_best_model_at_end: bool = False  # adapter/ and merged/ are those of the best checkpoint
    early_stopping_patience: int | None = None  # stop after so many evaluations without a new best; none: never
    early_stopping_threshold: float = 0.0  # by how much the metric has to be better to count
    resume: str = "auto"  # auto: go on from the last checkpoint in output_dir; never; or a checkpoint's path
    overwrite_output_dir: bool = False  # delete what output_dir holds and start anew
    merge: bool = True  # write merged/, the model with the adapter merged in
    merge_base: str = "auto"  # of a 4-bit run: original weights, dequantized ones, or auto: what changes least
    push_to_hub: bool = False  # bring adapter/ and merged/ to the hub at the end, see hub_model_id

    def __post_init__(self):
        self.model = self.model or str(EXAMPLES / "tiny-qwen3")
        if not self.data:
            self.data = [str(EXAMPLES / "mcqa" / "train.jsonl")]
            self.eval_data = self.eval_data or [str(EXAMPLES / "mcqa" / "validation.jsonl")]
        for key, options in CHOICES.items():
            for value in [given] if isinstance(given := getattr(self, key), str) else given:
                if value not in options:
                    raise UserError(f"{key}: {value!r} is not one of {', '.join(options)}" + nearest(value, options))
        if self.adapter and not self.lora_r:
            raise UserError("lora_r: 0 trains the model itself; merge --adapter first (python lora.py merge)")
        check_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps",
                    "eval_steps", "save_steps", "max_length", "max_samples", "max_eval_samples", "max_skipped_steps")
        check_least(self, 1, "max_new_tokens", most=2**20)
        check_least(self, 0, "warmup_ratio", most=1)
        check_least(self, 0, "learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "val_size", "seed",
                    "adam_epsilon", "loraplus_lr_ratio", "warmup_steps", "micro_batch_tokens", "eval_answers",
                    "num_samples", "save_total_limit", "early_stopping_patience", "early_stopping_threshold")
        if self.load_best_model_at_end and "no" in (self.eval_strategy, self.save_strategy):
            raise UserError("load_best_model_at_end: needs an eval_strategy and a save_strategy other than no")
        if not 0 <= self.adam_beta1 < 1 or not 0 <= self.adam_beta2 < 1:
            raise UserError(f"adam_beta1, adam_beta2 are from 0 to below 1, not {self.adam_beta1}, {self.adam_beta2}")
        if self.load_in_4bit and not self.lora_r:
            raise UserError("lora_r: 0 trains every weight, which 4-bit ones can't be; give a rank, or no load_in_4bit")


TRACKERS = ("tensorboard", "wandb", "trackio")
CHOICES = {
    "optim": ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup"),
    "eval_strategy": ("no", "steps", "epoch"), "save_strategy": ("no", "steps", "epoch"),
    "dtype": ("auto", *DTYPES), "merge_base": ("auto", "original", "dequantized"),
    "report_to": (*TRACKERS, "all", "none"),
}


# --- the plan ---------------------------------------------------------------------------------------------------------


def count_tokens(example):
    """Tokens of an example, over its segments."""
    return sum(len(segment.ids) for segment in example)


def count_scored(example):
    """What SFT's loss of an example is divided by: its scored tokens, each at its weight."""
    return sum(segment.weight * int((np.asarray(segment.labels) != IGNORE).sum()) for segment in example)


class Plan:
    """Which examples each optimizer step holds. `count(example)` is what an example adds to the number that divides the
    loss.

    Every epoch is a permutation drawn from (seed, epoch), cut into steps of per_device_train_batch_size ×
    gradient_accumulation_steps examples; the last step of an epoch may be smaller, as in transformers' Trainer.
    """

    def __init__(self, examples, config, count=count_scored, row=lambda i: (int(i), None)):
        self.examples, self.seed, self.count, self.row = examples, config.seed, count, row
        self.batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = max(1, -(-len(examples) // self.batch_size))
        self.steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        if config.max_steps > 0:
            self.steps = config.max_steps

    def __len__(self):
        return self.steps

    def draw(self, step):
        """(the examples of the epoch of a step, counted from 0, the numbers of those that the step holds)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        examples = self.examples.epoch(epoch) if hasattr(self.examples, "epoch") else self.examples
        order = np.random.default_rng([self.seed, epoch]).permutation(len(examples))
        return examples, order[at * self.batch_size : (at + 1) * self.batch_size]

    def __getitem__(self, step):
        """The examples of a step."""
        examples, numbers = self.draw(step)
        return [examples[i] for i in numbers]

    def rows(self, step):
        """Where the rows of a step stand, as 'file:line'."""
        examples, numbers = self.draw(step)
        return [getattr(examples, "row", self.row)(i)[0] for i in numbers]

    def epoch(self, step):
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def due(self, step, strategy, every):
        """Whether something that happens by 'steps', 'epoch' or 'no' happens after `step` steps."""
        return strategy == "steps" and step % every == 0 or strategy == "epoch" and step % self.steps_per_epoch == 0

    @cached_property
    def fingerprint(self):
        """Changes when the examples do."""
        if hasattr(self.examples, "fingerprint"):
            return self.examples.fingerprint
        crc = 0
        for example in self.examples:
            for segment in example:
                crc = zlib.crc32(np.asarray(segment.labels, np.int32).tobytes(),
                                 zlib.crc32(np.asarray(segment.ids, np.int32).tobytes(), crc))
        return f"{len(self.examples)}-{crc:08x}"


def cut(examples, budget):
    """The examples in parts of about equal size, at most `budget` tokens each (an example is never cut)."""
    sizes = [count_tokens(example) for example in examples]
    share = sum(sizes) / max(1, math.ceil(sum(sizes) / budget))
    part, held = [], 0
    for example, size in zip(examples, sizes):
        if part and (held + size > budget or held >= share):
            yield part
            part, held = [], 0
        part.append(example)
        held += size
    yield part


def micro_batches(examples, budget, device):
    """The parts that `cut` makes of the examples, packed."""
    return (Batch.pack(part, device) for part in cut(examples, budget))


def learning_rate(step, steps, config):
    """The learning rate of step `step` (from 0) of `steps`: linear warmup, then as transformers' schedules of the same
    names."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant_with_warmup": 1.0}
    return config.learning_rate * shape[config.lr_scheduler_type]


# --- the loop ---------------------------------------------------------------------------------------------------------


def sft_loss(model, batch):
    """Minus the summed log-probability of the scored tokens, each at its weight; train divides by the planned count."""
    return -(model.logps(batch) * batch.weights).sum(), {}


def make_optimizer(parameters, config):
    """AdamW over {name: parameter}; weight decay leaves norms and biases alone, as in transformers' Trainer. A group's
    `ratio` is what the step's learning rate is multiplied by: loraplus_lr_ratio for LoRA's B and for vectors, else 1
    (Hayou et al. 2024, arXiv:2402.12354; groups as in peft's create_loraplus_optimizer)."""
    groups = {}
    for name, p in parameters.items():
        decay = 0.0 if name.endswith("bias") or "norm" in name else config.weight_decay
        ratio = config.loraplus_lr_ratio if name.endswith("lora_B") or p.dim() == 1 else None
        groups.setdefault((decay, ratio or 1.0), []).append(p)
    groups = [{"params": ps, "weight_decay": decay, "ratio": ratio} for (decay, ratio), ps in groups.items()]
    options = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if "8bit" not in config.optim:
        return torch.optim.AdamW(groups, fused=True, **options)
    paged = "paged" in config.optim
    if paged and not groups[0]["params"][0].is_cuda:
        print("paged_adamw_8bit: pages between a GPU and the CPU; without a GPU it is adamw_8bit", file=sys.stderr)
        paged = False
    library = bitsandbytes().optim
    return (library.PagedAdamW8bit if paged else library.AdamW8bit)(groups, **options)


def accumulate(model, examples, count, loss_fn, budget, scale=lambda loss: loss):
    """Adds the gradient of loss / count over the examples to the parameters; returns (summed loss, summed metrics)."""
    total, sums = 0.0, {}
    for batch in micro_batches(examples, budget, model.device):
        loss, metrics = loss_fn(model, batch)
        scale(loss / count).backward()
        total += loss.detach()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    return float(total), {name: float(value) for name, value in sums.items()}


def find_gradient(model, examples, count, loss_fn, config, seed, scale):
    """`accumulate`, dropout drawn from `seed`. Where memory gives out it is done again in micro-batches of half the
    tokens, as is the rest of the run: the planned count divides, so the gradient is the same. UserError where examples
    stand alone already."""
    before = config.micro_batch_tokens
    while True:
        budget = token_budget(config, model.device)
        try:
            torch.manual_seed(seed)
            return accumulate(model, examples, count, loss_fn, budget, scale)
        except (RuntimeError, MemoryError) as error:  # a CPU's allocator, oneDNN and MPS have no class of their own
            words = str(error).partition("\n")[0].lower()
            if not isinstance(error, MemoryError) and "memory" not in words and "create a primitive" not in words:
                raise
        model.zero_grad()  # backward may have got halfway; out here nothing holds what it had made
        give_back()
        tokens = sum(map(count_tokens, examples))
        if budget == sys.maxsize or len([*micro_batches(examples, budget, "cpu")]) == len(examples):
            config.micro_batch_tokens = before  # smaller ones were no help
            longest = max(map(count_tokens, examples))
            raise UserError(f"out of memory at {longest:,} tokens that can't be split ({words}); run again with "
                            "--gradient_checkpointing, else with --load_in_4bit or a smaller max_length")
        config.micro_batch_tokens = min(budget, tokens) // 2
        tqdm.write(f"out of memory at {min(budget, tokens):,} tokens in a micro-batch; {config.micro_batch_tokens:,} "
                   "from here on, with the same gradient")


@torch.no_grad()
def evaluate_loss(model, examples, loss_fn, config, count=count_scored):
    """{'eval_loss': mean per scored token (or pair), and loss_fn's metrics likewise} on held-out examples, without
    dropout."""
    training = model.training
    model.eval()
    total, sums = 0.0, {}
    for batch in micro_batches(examples, token_budget(config, model.device), model.device):
        loss, metrics = loss_fn(model, batch)
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    model.train(training)
    total = sum(count(example) for example in examples)
    return {f"eval_{name}": value / total for name, value in sums.items()}


def token_budget(config, device):
    """Tokens of a micro-batch. Every one makes 4-bit weights anew, so there it is larger."""
    return config.micro_batch_tokens or (16384 if device.type != "cpu" else 1024 if config.load_in_4bit else 512)


def peak_memory_gb(device):
    """Peak memory in GB (10^9 bytes) since this was last asked (outside CUDA and Linux: so far): what CUDA's allocator
    handed out, elsewhere the process's resident set."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the mark goes down to what is resident now
    return peak / 1e9


@contextmanager
def stop_signals():
    """A list that holds the signal's number once SIGINT, SIGTERM or SIGHUP came. A second one interrupts at once."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(number) != signal.SIG_IGN}  # nohup has SIGHUP ignored
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model, steps, loss_fn, config, evaluate=None, trackers=None, clock=None):
    """Runs the plan `steps` from the last checkpoint in config.output_dir, if any, to its end.

    loss_fn(model, batch) -> (summed loss, {metric: summed value}); both are divided by the step's planned count.
    evaluate() -> {name: value}, called when config says so; trackers: takes those of start_trackers; clock: the run's.
    Ctrl-C, SIGTERM and SIGHUP save at the step's end and exit 130 / 143 / 129.
    """
    folder, device, asked = Path(config.output_dir), model.device, config.micro_batch_tokens
    clock = clock or Clock(device)
    clock.turn("evaluation")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, config)
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    state = {"step": 0, "log_bytes": 0, "window": {}, "data": steps.fingerprint, "best": {}, "skipped": 0, "lowered": 0}
    if checkpoint := find_checkpoint(config):
        state = load_checkpoint(checkpoint, model, parameters, optimizer, steps)
        scaler.load_state_dict(state["scaler"])
        print(f"going on from {checkpoint}: step {state['step']} of {len(steps)}")
    if not evaluate and (config.load_best_model_at_end or config.early_stopping_patience):
        raise UserError("load_best_model_at_end, early_stopping_patience: no held-out rows; give eval_data or val_size")
    if state["lowered"]:  # memory gave out before
        config.micro_batch_tokens = min(state["lowered"], token_budget(config, device))
    if trackers is not None:
        trackers |= start_trackers(config, state["step"] and state["step"] + 1)
    log, began = Log(folder, state["log_bytes"], trackers), time.perf_counter()
    window, best, skipped = state["window"], state["best"], state["skipped"]

    def save(step):  # what stands after `step`, unless that is kept already
        nonlocal state
        if step == state["step"] or config.save_strategy == "no":
            return
        clock.turn("checkpoints")
        lowered = config.micro_batch_tokens * (config.micro_batch_tokens != asked)
        state = {"step": step, "log_bytes": log.sync(), "window": window, "data": steps.fingerprint, "best": best,
                 "skipped": skipped, "lowered": lowered, "scaler": scaler.state_dict()}
        save_checkpoint(folder, model, parameters, optimizer, state, config)
        clock.turn("log")

    model.train()
    if evaluate and config.eval_strategy != "no" and state["step"] == 0:
        found = evaluate()
        judge({}, found, 0, config)  # a metric that is none is told now
        log.write({"step": 0, "epoch": 0.0, **found})
    bar = tqdm(total=len(steps), initial=state["step"], unit="step", disable=not sys.stderr.isatty(), leave=False)
    with stop_signals() as stopped, kept_pages():
        for step in range(state["step"] + 1, len(steps) + 1):
            if best.get("stop"):
                break
            clock.turn("forward and backward")
            examples, lr, last = steps[step - 1], learning_rate(step - 1, len(steps), config), step == len(steps)
            count, place = sum(map(steps.count, examples)), {"step": step, "epoch": round(steps.epoch(step), 4)}
            seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0])  # of dropout
            try:
                loss, metrics = find_gradient(model, examples, count, loss_fn, config, seed, scaler.scale)
            except UserError:
                save(step - 1)
                raise
            clock.turn("optimizer")
            scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf))
            if math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1):  # that of float16 shrinks first
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["ratio"]
                scaler.step(optimizer)
                metrics |= {"loss": loss, "count": count, "scored_tokens": sum(map(count_scored, examples))}
                window = {name: window.get(name, 0.0) + value for name, value in metrics.items()}
                skipped = 0
            else:
                if not skipped:
                    save(step - 1)
                skipped += 1
                log.write({**place, "skipped": f"loss {loss}, gradient norm {norm}", "rows": steps.rows(step - 1)})
                if skipped >= config.max_skipped_steps:
                    raise UserError(f"{skipped} steps in a row, up to {step}, had no finite loss and gradient; their "
                                    f"rows are in {log.path}. The last good step is kept; try a lower learning_rate")
            scaler.update()
            optimizer.zero_grad()
            clock.add(sum(map(count_tokens, examples)), len(examples))
            bar.update()
            if window and (step % config.logging_steps == 0 or last):
                total, scored = window.pop("count"), window.pop("scored_tokens")
                means = {"loss": window.pop("loss") / total, **{name: value / total for name, value in window.items()}}
                log.write({**place, **means, "grad_norm": norm, "learning_rate": lr, "scored_tokens": round(scored),
                           **clock.read()})
                window = {}
            if evaluate and (steps.due(step, config.eval_strategy, config.eval_steps)
                             or last and config.eval_strategy != "no"):
                clock.turn("evaluation")
                found = evaluate()
                log.write({**place, **found})
                best = judge(best, found, step, config)
                last = last or best["stop"]
            improved = config.load_best_model_at_end and best.get("step") == step
            if last or stopped or improved or steps.due(step, config.save_strategy, config.save_steps):
                save(step)
            if stopped:
                bar.close()
                kept = "" if config.save_strategy == "no" else "; the same command goes on from here"
                print(f"stopped after step {step} of {len(steps)}{kept}", flush=True)
                sys.exit(128 + stopped[0])
    bar.close()
    if best.get("stop"):
        print(f"stopped early after step {state['step']}: no new best for {config.early_stopping_patience} evaluations")
    if config.load_best_model_at_end and (fault := damage(kept := folder / f"checkpoint-{best['step']:06d}")):
        print(f"{kept}, the best step's, is damaged ({fault}); the last step is taken")
    elif config.load_best_model_at_end:
        load_trained(kept, model, parameters)
        print(f"the best step is taken: {best['step']}, {best['metric']} {best['value']:.4g}")
    best_step = {"best_step": best["step"]} if config.load_best_model_at_end else {}
    peak = clock.read()["peak_memory_gb"]
    return {"train_runtime": round(time.perf_counter() - began, 2), "peak_memory_gb": peak, **best_step}


def judge(best, found, step, config):
    """What is known of the best evaluation, {"step", "metric", "value", "waited", "stop"}, after another one. Source:
    transformers' Trainer and EarlyStoppingCallback: patience looks at the best so far, with the threshold."""
    metric = "eval_" + (config.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in found:
        names = ", ".join(name.removeprefix("eval_") for name in found)
        raise UserError(f"metric_for_best_model: the evaluation gives {names}, not {metric.removeprefix('eval_')}"
                        + nearest(metric, found))
    more = config.greater_is_better if config.greater_is_better is not None else not metric.endswith("loss")
    gain = (found[metric] - best["value"]) * (1 if more else -1) if best else math.inf
    waited = 0 if gain > 0 and gain > config.early_stopping_threshold else best["waited"] + 1
    stop = bool(config.early_stopping_patience) and waited >= config.early_stopping_patience
    kept = {"step": step, "metric": metric, "value": found[metric]} if gain > 0 else best
    return {**kept, "waited": waited, "stop": stop}


class Clock:
    """Seconds and peak memory of a run by part, and the throughput of its steps since it was last read."""

    STEP = "forward and backward", "optimizer"  # evaluation, logging and saving are not counted

    def __init__(self, device):
        self.device, self.part, self.last, self.parts = device, "data", time.perf_counter(), {}
        self.tokens, self.examples, self.before = 0, 0, (0, 0, 0.0)
        peak_memory_gb(device)

    def turn(self, part):
        """What comes from here on is `part`'s."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        (seconds, peak), now = self.parts.get(self.part, (0.0, 0.0)), time.perf_counter()
        self.parts[self.part] = seconds + now - self.last, max(peak, peak_memory_gb(self.device))
        self.part, self.last = part, now

    def add(self, tokens, examples):
        self.turn("log")
        self.tokens, self.examples = self.tokens + tokens, self.examples + examples

    def steps(self):
        """(seconds, peak GB) of the steps so far."""
        seconds, peaks = zip(*(self.parts.get(part, (0.0, 0.0)) for part in self.STEP))
        return sum(seconds), max(peaks)

    def read(self):
        seconds, peak = self.steps()
        done = self.tokens, self.examples, seconds
        tokens, examples, took = (new - old for new, old in zip(done, self.before))
        self.before = done
        return {"tokens_per_second": round(tokens / max(took, 1e-9), 1),
                "examples_per_second": round(examples / max(took, 1e-9), 3), "peak_memory_gb": round(peak, 3)}


UNSHOWN = ("epoch", "scored_tokens", "examples_per_second", "seconds", "logps/chosen", "logps/rejected", "rows")


class Log:
    """log.jsonl, cut back to `size` bytes (what the checkpoint saw), echoed to the terminal, drawn as
    training_loss.png, told to the trackers. Neither drawing nor a tracker can cost the run more than a warning."""

    def __init__(self, folder, size=0, trackers=None):
        self.path, self.next, self.trackers = folder / "log.jsonl", 0.0, trackers or {}
        self.path.touch()
        os.truncate(self.path, min(size, self.path.stat().st_size))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        shown = {k: v for k, v in line.items() if k.removeprefix("eval_") not in UNSHOWN}
        tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))
        if time.perf_counter() > self.next:
            self.draw()
        numbers = {("eval/" if k.startswith("eval_") else "train/") + k.removeprefix("eval_"): v
                   for k, v in line.items() if ("loss" in line or k.startswith(("eval_", "train_"))) and k != "step"}
        for name, (log, _) in list(self.trackers.items()):
            with warned(f"report_to: the run goes on without {name}"):
                log(numbers, line["step"])
                continue
            del self.trackers[name]  # it failed

    def draw(self):
        began = time.perf_counter()
        with warned("training_loss.png is not drawn"):
            plot_losses(self.path)
        now = time.perf_counter()
        self.next = now + 50 * (now - began)  # drawing takes a fiftieth of the time

    def sync(self):
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self):
        for name, (_, finish) in self.trackers.items():
            with warned(f"report_to: {name} does not end"):
                finish()


@contextmanager
def warned(what):
    """An error in the block is told in a line, no more."""
    try:
        yield
    except Exception as error:
        print(f"{what} ({type(error).__name__}: {brief(str(error), 160)})", file=sys.stderr)


def read_log(path):
    """The whole lines of a log.jsonl, as dicts; what a kill cut short is left out."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").rpartition("\n")[0].splitlines()]


def plot_losses(path):
    """Draws training_loss.png beside a log.jsonl: the loss, and what else of PLOTTED was logged, in training and held
    out."""
    from matplotlib.figure import Figure  # without pyplot, which would take a notebook's own figures over

    lines = read_log(path)
    keys = [key for key in PLOTTED if any(key in line or f"eval_{key}" in line for line in lines)]
    figure = Figure(figsize=(3 + 4 * len(keys), 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for key, label, style in ((title, "training", "-"), (f"eval_{title}", "held out", "o-")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points), style, label=label, markersize=4)
        axes.set(xlabel="step", ylabel=PLOTTED[title])
        axes.grid(alpha=0.3)
        axes.legend()
    aside = Path(path).with_name(".training_loss.png")
    figure.savefig(aside, dpi=130, format="png")
    aside.replace(Path(path).with_name("training_loss.png"))


PLOTTED = {"loss": "loss (per scored token or pair)", "rewards/margins": "reward margin",
           "rewards/accuracies": "pairs ranked right"}


# --- trackers, and what was printed -----------------------------------------------------------------------------------


def find_trackers(config):
    """The names that report_to means; UserError for one that is not installed."""
    found = [name for name in TRACKERS if sys.modules.get(name) or find_spec(name)]
    wanted = found if "all" in config.report_to else [name for name in config.report_to if name != "none"]
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"report_to: {missing[0]} is not installed; pip install {missing[0]}, or name another tracker")
    return wanted


def start_trackers(config, step):
    """{name: (log(numbers, step), finish())} of report_to, and of a notebook that runs this. What a killed process told
    from `step` on, which is done again, is not there twice."""
    folder, trackers = Path(config.output_dir), {}
    for name in find_trackers(config):
        with blamed(f"report_to: {name} does not start; set it up, or leave it out", Exception):
            trackers[name] = tensorboard(folder / "runs", step) if name == "tensorboard" else dashboard(name, config)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return trackers | ({"notebook": notebook(folder / "training_loss.png")} if hasattr(shell, "kernel") else {})


def tensorboard(folder, step):
    """TensorBoard's files; what they already hold from `step` on counts no more."""
    from torch.utils.tensorboard import SummaryWriter

    writer, hook = SummaryWriter(folder, purge_step=step), threading.excepthook
    threading.excepthook = lambda at: issubclass(at.exc_type, OSError) or hook(at)  # its thread's; `log` tells it

    def log(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a kill loses nothing

    return log, writer.close


def dashboard(library, config):
    """wandb or trackio; a run that goes on goes on there."""
    folder = Path(config.output_dir).resolve()
    name = re.sub(r"\W+", "-", f"{folder.name}-{read_json(folder / 'config.json')['began'][:19]}")
    options = {"id": name, "dir": folder} if library == "wandb" else {}
    run = import_module(library).init(project=os.environ.get(f"{library.upper()}_PROJECT", "plaintune"), name=name,
                                      resume="allow", config=asdict(config), **options)
    known = getattr(run, "_next_step", 0)  # trackio's; wandb itself passes over the steps that it has
    return lambda numbers, step: step < known or run.log(numbers, step=step), run.finish


def notebook(file):
    """The figure in the cell that runs this, redrawn in place."""
    from IPython.display import Image, display

    def log(numbers, step):
        image = Image(filename=str(file))
        shown.append(shown[0].update(image) if shown else display(image, display_id=True))

    shown = []
    return log, shown.clear


@contextmanager
def kept_output(folder):
    """While the block runs, what is printed goes to folder/run.log too, each line with its time. It is held back until
    this command has written config.json: one that is refused leaves no trace."""
    file, held, streams = folder / "config.json", [], {sys.stdout, sys.stderr}
    written = lambda: file.stat().st_mtime_ns if file.exists() else None
    before = written()

    def keep(write, text):
        held.extend([text] * ("\r" not in text))  # a progress bar has it
        if text.endswith("\n") and written() != before:
            with suppress(OSError), open(folder / "run.log", "a", encoding="utf-8") as log:
                log.writelines(f"{datetime.now():%F %T} {line}\n" for line in plain("".join(held)).splitlines())
            held.clear()
        return write(text)

    for stream in streams:
        stream.write = partial(keep, stream.write)
    try:
        yield
    except Exception as error:
        keep(len, f"error: {error}\n" if isinstance(error, (UserError, OSError)) else traceback.format_exc())
        raise
    finally:
        for stream in streams:
            del stream.write


# --- checkpoints and the run folder -----------------------------------------------------------------------------------


def save_checkpoint(folder, model, parameters, optimizer, state, config):
    """checkpoint-000500/: the trained tensors in fp32 (as an adapter, or as a whole model), the optimizer's,
    state.json, and manifest.json, which has every file's size and hash."""
    names = {p: name for name, p in parameters.items()}
    tensors = {f"{names[p]}:{key}": torch.as_tensor(value) for p, values in optimizer.state.items()
               for key, value in values.items() if not key.startswith("qmap")}  # bitsandbytes' tables, always the same
    with written_aside(folder / f"checkpoint-{state['step']:06d}") as aside:
        if config.lora_r:
            write_adapter(model, aside, config.model)
        else:
            write_tensors(parameters, aside / "model.safetensors")
        write_tensors(tensors, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=2))
        (aside / "manifest.json").write_text(json.dumps(manifest(aside), indent=2))
    if config.save_total_limit:
        found, limit = checkpoints(folder), config.save_total_limit
        best = folder / f"checkpoint-{state.get('best', {}).get('step', 0):06d}"
        if config.load_best_model_at_end and best in found[:-1]:  # it stays, beside the newest
            found, limit = [path for path in found if path != best], max(limit - 1, 1)
        for old in found[:-limit]:
            shutil.rmtree(old)


def manifest(folder):
    """{file: [its bytes, their SHA-256]} of a folder's files but manifest.json."""
    found = {}
    for path in sorted(set(folder.iterdir()) - {folder / "manifest.json"}):
        with open(path, "rb") as file:
            found[path.name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return found


def damage(checkpoint):
    """What is wrong with a checkpoint's files, '' where they are as they were written."""
    try:
        wanted, found = read_json(checkpoint / "manifest.json"), manifest(checkpoint)
    except (OSError, UserError) as error:
        return str(error)
    return ", ".join(f"{name} is {'not the file written' if name in found else 'missing'}"
                     for name in {"state.json": 0, **wanted} if name not in wanted or found.get(name) != wanted[name])


def checkpoints(folder):
    """A run's checkpoints, oldest first."""
    return sorted(path for path in Path(folder).glob("checkpoint-*") if path.is_dir())


def find_checkpoint(config):
    """The checkpoint to go on from, the newest one that is whole, or None."""
    if config.resume not in ("auto", "never"):
        if not (Path(config.resume) / "state.json").exists():
            raise UserError(f"resume: {config.resume} is no checkpoint (no state.json in it); else give auto or never")
        if fault := damage(Path(config.resume)):
            raise UserError(f"resume: {config.resume} is damaged ({fault}); auto takes the newest that is not")
        return Path(config.resume)
    for path in checkpoints(config.output_dir)[::-1] if config.resume == "auto" else []:
        if not (fault := damage(path)):
            return path
        print(f"{path} is damaged and left out: {fault}")
    return None


@torch.no_grad()
def load_checkpoint(path, model, parameters, optimizer, steps):
    """Puts a checkpoint's tensors back where they were and returns its state."""
    state = read_json(path / "state.json")
    if state["data"] != steps.fingerprint:
        raise UserError(f"{path}: was trained on other data than --data gives now; take the old data, "
                        "another --output_dir, or --overwrite_output_dir")
    load_trained(path, model, parameters)
    for g, group in enumerate(optimizer.param_groups if hasattr(optimizer, "init_state") else ()):
        for n, p in enumerate(group["params"]):  # bitsandbytes says where its state lies, paged or not
            optimizer.init_state(group, p, g, n)
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, slot = key.rpartition(":")
        held = optimizer.state[parameters[name]]
        if slot == "step":
            held[slot] = type(held.get(slot, value))(value)
        elif slot in held:
            held[slot].copy_(value)
        else:
            held[slot] = value.to(parameters[name].device)
    return state


@torch.no_grad()
def load_trained(path, model, parameters):
    """Puts a checkpoint's trained tensors back where they were."""
    file, trained = (("adapter_model.safetensors", adapter_parameters(model)) if hasattr(model, "adapter")
                     else ("model.safetensors", parameters))
    for name, parameter in trained.items():  # PiSSA's start is written behind what was trained
        parameter.copy_(read_tensor(path / file, name)[tuple(map(slice, parameter.shape))])


FREE = {"output_dir", "dry_run", "resume", "overwrite_output_dir", "merge", "eval_answers", "num_samples",
        "max_new_tokens", "logging_steps", "save_total_limit", "device", "micro_batch_tokens", "gradient_checkpointing",
        "report_to", "attn_implementation", "ref_cache", "push_to_hub", "max_skipped_steps", *vars(HubConfig())}


def open_run(config):
    """Looks at the run folder: (the day its run began, for templates that tell the date; whether it is finished).

    Raises UserError where it holds a run of another configuration, naming the keys, or files that are no run's.
    """
    folder, file = Path(config.output_dir), Path(config.output_dir) / "config.json"
    if config.resume != "auto":
        find_checkpoint(config)  # one that is none is told before anything else happens
    old, new = read_json(file) if file.exists() else {}, json.loads(json.dumps(asdict(config)))
    if "began" not in old and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: holds files that are not a run's; choose another --output_dir")
    for path in folder.iterdir() if config.overwrite_output_dir and old else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not file.exists():
        return datetime.now(), False
    if differ := [key for key in new if key not in FREE and old.get(key) != new[key]]:
        shown = ", ".join(f"{k} ({json.dumps(old.get(k))} there, {json.dumps(new[k])} now)" for k in differ[:4])
        raise UserError(f"{folder} holds a run of another configuration: {shown}"
                        + (f" and {len(differ) - 4} more" if len(differ) > 4 else "")
                        + "; choose another --output_dir, or --overwrite_output_dir to start anew")
    for left in folder.glob(".checkpoint-*.partial"):  # by a kill
        shutil.rmtree(left)
    log = folder / "log.jsonl"
    last = read_log(log)[-1:] if log.exists() and config.resume == "auto" else []
    return datetime.fromisoformat(old["began"]), any("train_runtime" in line for line in last)


def describe_run(config, began, report):
    """Writes config.json and data_report.json: the run exists from here on. Nothing is written while data or model may
    be wrong."""
    for name, value in (("config.json", {**asdict(config), "began": began.isoformat()}), ("data_report.json", report)):
        aside = Path(config.output_dir) / f".{name}"
        aside.write_text(json.dumps(value, indent=2))
        aside.replace(Path(config.output_dir) / name)


# --- the planner ------------------------------------------------------------------------------------------------------

FLOPS = {str(op): count for op, count in flop_registry.items()}


class Meter(TorchDispatchMode):
    """Counts the bytes of live tensors by kind while the block runs, keeps them at their peak, and adds up the
    products' floating-point operations. It sees what PyTorch's operators return, not what one holds inside."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.kinds, self.live, self.peak, self.flops = vocab_size, {}, Counter(), Counter(), 0

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
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.kinds:
                self.note(tensor, "logits" if tensor.shape[-1:] == (self.vocab_size,) else "activations")
        if count := FLOPS.get(str(op.overloadpacket).rstrip("_")):
            self.flops += count(*args, **kwargs or {}, out_val=found)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return found


def foresee(config, source, steps, loss_fn, device, dtype):
    """What a run will need, from headers, settings and examples alone: ({modules' name: [trainable, all parameters]},
    {part: GB} at the steps' peak, FLOPs of a token, the examples of the largest micro-batch). The program itself runs
    that one, forward and backward, on tensors that hold nothing."""
    model, _ = open_model(source, prepare=partial(hold_4bit, config))
    model.dtype = DTYPES[model.config.dtype if dtype == "auto" else dtype]
    model.attention, _ = choose_attention(config.attn_implementation, model.config, model.dtype, device)
    for layer in model.modules():
        if hasattr(layer, "expect_own") and not hasattr(layer, "state"):  # to be quantised as it is loaded
            layer.expect_own(model.dtype)
    equip(model, config)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else model.dtype)
    count = min(len(steps), steps.steps_per_epoch)
    groups = [[*cut(steps[step], token_budget(config, device))] for step in range(0, count, count // 256 + 1)]
    tokens, largest, alone = max(((sum(map(count_tokens, part)), part, len(group) == 1)
                                  for group in groups for part in group), key=lambda found: found[0])
    memory, meter = {}, Meter(model.config.vocab_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), meter:
            model.to_empty(device=device).train()
            for tensor in model.state_dict(keep_vars=True).values():
                meter.note(tensor, "adapter" if tensor.requires_grad and config.lora_r else "weights")
            for layer in lora_layers(model).values() if config.init_lora_weights.startswith("pissa") else ():
                layer.start = torch.empty_like(layer.lora_A), torch.empty_like(layer.lora_B)
            trained = [p for p in model.parameters() if p.requires_grad]
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: meter.note(p.grad, "gradients"))
                if not alone:  # the step's earlier micro-batches have made it
                    p.grad = torch.empty_like(p)
                    meter.note(p.grad, "gradients")
            loss_fn(model, Batch.pack(largest, device))[0].backward()
        memory = {kind: meter.peak[kind] for kind in ("weights", "adapter", "gradients", "activations", "logits")}
        gradients = 4 * sum(p.numel() for p in trained)
        busy = memory["activations"] + memory["logits"]
        if gradients > busy + memory["gradients"]:  # then the optimizer's moment is the largest
            memory |= {"gradients": gradients, "activations": 0, "logits": 0}
        memory["optimizer"] = sum(optimizer_bytes(p, config) for p in trained)
        if device.type != "cuda":  # there the peak is the process's. Fitted to runs at the Qwen3-0.6B shape:
            # micro-batches of other lengths have 16-bit kernels of their own, and leave holes in glibc's heap
            more = math.log2(min(64, len(steps) * sum(map(len, groups)) / len(groups)))
            kernels = 0.05e9 if model.dtype == torch.float32 else 0.2e9 + 0.1e9 * more
            holes = busy / 8 * more + 2 * memory["logits"] * model.head_weight().requires_grad
            peak_memory_gb(device)
            memory |= {"process": peak_memory_gb(device) * 1e9, "kernels and holes": kernels + holes}
    except Exception as error:  # a loss that hangs on values, say; the run itself may still do
        memory = {}
        print(f"memory: can't be foreseen here ({brief(str(error), 80)})")
    return by_module(model), {part: size / 1e9 for part, size in memory.items()}, meter.flops / tokens, largest


def optimizer_bytes(parameter, config):
    """Bytes of AdamW's state; in 8 bit with two scales for 256 values, which bitsandbytes leaves out below 4,096."""
    n = parameter.numel()
    return 2 * n + 8 * -(-n // 256) if "8bit" in config.optim and n >= 4096 else 8 * n


def by_module(model):
    """{modules' name, like q_proj: [trainable, all parameters]}; sums to count_parameters."""
    found = {}
    for path, module in model.named_modules():
        own = [(p.numel() * p.requires_grad, p.numel()) for p in module.parameters(recurse=False)]
        own += [(0, module.in_features * module.out_features)] if hasattr(module, "dequantize") else []
        name = path.removesuffix(".base_layer").rpartition(".")[2]
        found[name] = [sum(counts) for counts in zip(found.get(name, (0, 0)), *own)]
    return {name: counts for name, counts in found.items() if counts[1]}


def free_memory(device):
    """GB that this machine has free; infinite where it doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    file = Path("/proc/meminfo")
    return int(re.search(r"MemAvailable:\s+(\d+)", file.read_text())[1]) * 1024 / 1e9 if file.exists() else math.inf


def columns(*rows):
    """Rows of words as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def rehearse(config, source, steps, loss_fn, device, dtype, forecast):
    """--dry_run: prints what `foresee` found and the time that one micro-batch foretells; where it does not fit, what
    needs less."""
    modules, memory, _, largest = forecast
    planned = [(count_tokens(example), count_scored(example)) for n in range(len(steps)) for example in steps[n]]
    (tokens, scored), peak = map(sum, zip(*planned)), sum(memory.values())
    modules = [*modules.items(), ("all", map(sum, zip(*modules.values())))]
    print("\n" + columns(("parameters", "train", "all"), *((name, *map("{:,}".format, n)) for name, n in modules)))
    print(f"\n{len(steps)} steps of {steps.batch_size} examples: {tokens:,} tokens, {round(scored):,} of them scored\n")
    print(columns(("peak memory", "GB"), *((part, f"{size:.3f}") for part, size in [*memory.items(), ("all", peak)])))
    free = free_memory(device) + memory.get("process", 0)
    if peak > free:
        print(f"\n{free:.2f} GB are free: it does not fit and is not tried. What needs less, each with those before:")
        for key, value in (("gradient_checkpointing", True), ("micro_batch_tokens", max(planned)[0]),
                           ("load_in_4bit", True) if config.lora_r else ("optim", "adamw_8bit")):
            config = replace(config, **{key: value})
            peak = sum(foresee(config, source, steps, loss_fn, device, dtype)[1].values())
            print(f"  --{key} {str(value).lower()}: {peak:.2f} GB")
            if peak <= free:
                return
        print("  a smaller --max_length or --model")
        return
    model = load_4bit(source, config, dtype=dtype, device=device, attn_implementation=config.attn_implementation)
    equip(model, config)
    model.train()
    with kept_pages():
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            accumulate(model, largest, 1, loss_fn, sys.maxsize)
    rate = sum(map(count_tokens, largest)) / (time.perf_counter() - began)
    print(f"\nthe largest micro-batch runs, forward and backward, at {rate:,.0f} tokens/s: "
          f"{tokens / rate / len(steps):.2f} s a step, {tokens / rate / 60:,.1f} min without evaluation and answers")


def conclude(clock, forecast, model):
    """Prints a run's time and memory by part, its speed beside that of plain products (T, C) x (C, I) of its shapes,
    the predicted beside the measured peak. Returns them for the last line of the log."""
    clock.turn("log")
    rows = ((part, f"{took:.1f}", f"{peak:.2f}") for part, (took, peak) in clock.parts.items())
    print(f"\n{columns(('', 'seconds', 'peak GB'), *rows)}")
    found = {"seconds": {part: round(took, 1) for part, (took, _) in clock.parts.items()}}
    _, memory, flops, largest = forecast
    if clock.tokens and memory:
        (took, measured), predicted, c = clock.steps(), sum(memory.values()), model.config
        rate, sizes = clock.tokens / took, (sum(map(count_tokens, largest)), c.intermediate_size)
        x, w = (torch.randn(n, c.hidden_size, dtype=model.dtype, device=model.device) for n in sizes)
        timer = Timer("x @ w.t()", globals={"x": x, "w": w}, num_threads=torch.get_num_threads())
        share = rate * flops / (2 * len(x) * w.numel() / min(timer.blocked_autorange(min_run_time=0.3).times))
        found |= {"share_of_roof": round(share, 3), "predicted_memory_gb": round(predicted, 3)}
        print(f"{rate:,.1f} tokens/s, {share:.0%} of what plain products of the model's shapes reach\npeak memory of "
              f"the steps: {predicted:.2f} GB predicted, {measured:.2f} measured ({predicted / measured - 1:+.0%})")
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def read_config(cls, argv, embedded):
    """The config of a command line. Without --model and --config it is the embedded example's,
    examples/{embedded}.yaml."""
    given = {arg.split("=")[0] for arg in argv}
    if not given & {"--model", "--config", "-h", "--help"}:
        argv = ["--config", str(EXAMPLES / f"{embedded}.yaml"), *argv]
    return parse_config(cls, argv, sys.modules[cls.__module__].__doc__)


def ask(model, tokenizer, questions, choices, config):
    """The model's answers to held-out rows, without dropout; [] where there are none to ask."""
    model.eval()
    answers = answer_questions(model, tokenizer, questions, choices, config.max_new_tokens) if questions else []
    model.train()
    return answers


def show_answers(before, after, config):
    """Prints the first questions with the answer before and after, and the accuracy of all of them."""
    for old, new in list(zip(before, after))[: config.num_samples]:
        print(f"\n{old['prompt'][-400:]}\n  before: {old['output'][:200]!r}\n  after:  {new['output'][:200]!r}")
    (was, count), (now, _) = accuracy(before), accuracy(after)
    if count:
        chance = sum(1 / len(row["choices"]) for row in after if row["gold"]) / count
        print(f"\nanswers right on {count} held-out questions: {was:.1%} before, {now:.1%} after "
              f"(chance {chance:.0%})")


def pick_dtype(config, source, device):
    """The dtype to load in: float16 where the checkpoint's bfloat16 has no hardware (a T4), said in one line."""
    if (config.dtype == "auto" and device.type == "cuda" and ModelConfig.read(source).dtype == "bfloat16"
            and not torch.cuda.is_bf16_supported(including_emulation=False)):
        print(f"dtype: {torch.cuda.get_device_name(device)} has no bfloat16; float16 with a gradient scaler")
        return "float16"
    return config.dtype


def finish(model, config, examples):
    """Writes adapter/, reads it back, then merged/. After full fine-tuning there is only merged/, the model itself.

    An adapter trained on 4 bits is merged into what changes it least on `examples`, the 16-bit weights or the
    dequantised ones; returns what each changes, as `measure_merge` does, and under 'merged' which was taken.
    """
    folder, figures = Path(config.output_dir), {}
    if not config.lora_r:
        save_model(merge_lora(model).state_dict().items(), folder / "merged", model.folder)
        return figures
    with written_aside(folder / "adapter") as aside:
        tensors = write_adapter(model, aside, config.model)
        for file in COMPANIONS:
            if "config.json" != file and (model.folder / file).is_file():
                shutil.copyfile(model.folder / file, aside / file)
    file = folder / "adapter" / "adapter_model.safetensors"
    for name, tensor in tensors.items():
        if not torch.equal(read_tensor(file, name), tensor):
            raise UserError(f"{file}: {name} does not read back as it was written; is the disk sound?")
    if not config.merge:
        return figures
    if config.load_in_4bit or model.config.quantized:
        batches = list(micro_batches(examples[:MERGE_ROWS], token_budget(config, model.device), model.device))
        figures = measure_merge(model, batches)
        best = min(figures, key=lambda base: figures[base]["kl"])
        figures["merged"] = config.merge_base if config.merge_base in figures else best
    dequantized = figures.get("merged") == "dequantized"
    merge(folder / "adapter", folder / "merged", model.folder, partial(hold_4bit, config) if dequantized else None)
    return figures


MERGE_ROWS = 32  # held-out rows on which the two ways to merge are compared


def show_merge(figures):
    """The table of a measured merge, as text for the terminal and the model card."""
    names = {"original": "the 16-bit weights", "dequantized": "the dequantised 4-bit weights"}
    tokens = next(iter(figures.values()))["tokens"]
    rows = [[name + ", written" * (base == figures["merged"]), f"{figures[base]['kl']:.6f}",
             f"{figures[base]['top1']:.2%}"] for base, name in names.items() if base in figures]
    return (f"against the adapter on 4 bits, over {tokens:,} scored tokens of held-out rows:\n\n"
            + table(["merged into", "KL, nats per token", "same likeliest token"], *rows))


SHOWN = {"lora_r", "lora_alpha", "lora_dropout", "target_modules", "max_length", "per_device_train_batch_size",
         "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "optim", "weight_decay",
         "seed", "beta", "loss_type"}  # settings that the card has, be they the defaults or not


def table(head, *rows):
    """Rows as a table in Markdown."""
    told = lambda v: f"{v:.4g}" if isinstance(v, float) else v if isinstance(v, str) else json.dumps(v)
    return "\n".join(f"| {' | '.join(map(told, row))} |" for row in (head, ["---"] * len(head), *rows))


def write_card(config, ledger, results, figures):
    """README.md, the model card, and the curve, in merged/ and adapter/; last in the run folder, which then is whole:
    base, how to open it, results, the data's ledger, settings, the measured merge. Of a path it has the name alone."""
    folder, local = Path(config.output_dir), Path(config.model).expanduser().resolve()
    base = re.sub(r"[^\w.-]+", "-", local.name) if local.is_dir() else config.model
    log, taken = read_log(folder / "log.jsonl"), results.get("best_step", results["step"])
    before = next((line for line in log if "eval_loss" in line), {})
    before = before | {"eval_answers": results.get("eval_answers_before", "")}
    after = {k: v for line in log if line["step"] <= taken for k, v in line.items() if k == "loss" or k[:5] == "eval_"}
    after = [[k, before.get(k, ""), v] for k, v in (after | results).items()
             if k not in ("eval_answers_before", "seconds")]
    default, hidden = type(config)(), FREE | {"model", "data", "eval_data"}
    hidden |= vars(LoRAConfig()).keys() if config.adapter else set()  # the adapter has its own
    settings = [[k, v] for k, v in asdict(config).items() if k not in hidden
                and (k in SHOWN or v != getattr(default, k))]
    sources = [*config.data, *config.eval_data]
    hub = [re.fullmatch(r"([\w.-]+/[\w.-]+)([#:@].*)?", source) for source in sources]
    parts = [f"## Results\n\n{table(['', 'before', 'after'], *after)}", "![the loss by step](training_loss.png)",
             f"## Data\n\n{', '.join(f'`{source}`' for source in sources)}\n\n{ledger}",
             f"## Settings\n\n{table(['', ''], *settings)}", figures and f"## Merge\n\nMeasured {show_merge(figures)}",
             ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "tokenizers"))]
    body = re.sub(r"(?<![\w.:/~-])~?/[^\s\"'`|]*/", "", "\n\n".join(filter(None, parts)))
    for part, library, opener in (("merged", "transformers", "AutoModelForCausalLM"),
                                  ("adapter", "peft", "AutoPeftModelForCausalLM")):
        if (folder / part).is_dir():
            alone, kind = part == "adapter" or not config.lora_r, "dpo" if hasattr(config, "beta") else "sft"
            name = (config.hub_model_id or folder.resolve().name) + ("" if alone else "-merged")
            front = {"base_model": base, "base_model_relation": "adapter" if part == "adapter" else "finetune",
                     "library_name": library, "pipeline_tag": "text-generation", "tags": ["plaintune", kind],
                     "datasets": sorted({found[1] for found in hub if found and not Path(found[1]).exists()})}
            front = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False)
            what = f"{kind.upper()} of `{base}`{', by a LoRA,' * (config.lora_r > 0)} with plaintune."
            use = f'from {library} import {opener}\n\nmodel = {opener}.from_pretrained("{name}")'
            card = f"---\n{front}---\n\n# {name}\n\n{what}\n\n```python\n{use}\n```\n\n{body}\n"
            (folder / part / "README.md").write_text(card, encoding="utf-8")
            with warned("the card has no curve"):
                shutil.copyfile(folder / "training_loss.png", folder / part / "training_loss.png")
    (folder / "README.md").write_text(card, encoding="utf-8")


def equip(model, config):
    """Makes a model, which may be on `meta`, the one that trains; returns what the user should be told."""
    model.gradient_checkpointing, tied = config.gradient_checkpointing, model.config.tie_word_embeddings
    if not config.adapter:
        notices = add_lora(model, config, config.seed)
    else:
        notices = (open_adapter(model, config.adapter)[2] if model.device.type == "meta" else
                   load_adapter(model, config.adapter, trainable=True))
        r, alpha = model.adapter.lora_r, model.adapter.lora_alpha
        notices = [f"going on from {config.adapter}: r {r}, alpha {alpha:g}", *notices]
    if tied != model.config.tie_word_embeddings:
        raise UserError(f"adapter: {config.adapter} unties the model's embeddings; merge it first: "
                        "python lora.py merge")
    for layer in lora_layers(model).values() if getattr(config, "disable_dropout", False) else ():
        layer.dropout = 0.0
    return notices


def run(config, loss_fn, count=count_scored, prepare=None, **options):
    """A run from its settings to its folder; what SFT and DPO share. loss_fn and count: as for train and Plan; options:
    more of load_examples's; prepare(model, steps, held examples) is called once, with the model that training starts
    from."""
    folder = Path(config.output_dir)
    began, finished = (datetime.now(), False) if config.dry_run else open_run(config)
    if finished:
        print(f"{folder} holds this run, finished; --overwrite_output_dir trains anew")
        return push(folder, config) if config.push_to_hub else None
    find_trackers(config)  # what is missing outside is told before anything is loaded
    if config.push_to_hub and not config.dry_run:
        ask_hub("push_to_hub", partial(open_repositories, config, folder))
    device = pick_device(config.device)
    clock = Clock(device)
    source = resolve(config.model, config.revision)
    tokenizer = Tokenizer(source, began)
    wants = {"max_length": config.max_length, "completion_only_loss": config.completion_only_loss,
             "assistant_only_loss": config.assistant_only_loss, "seed": config.seed,
             "max_samples": config.max_samples, "recipe": config.recipe, "recipe_args": config.recipe_args, **options}
    examples, rows, ledger = load_examples(config.data, tokenizer, **wants)
    held, held_rows, report = [], [], {"train": ledger.as_dict()}
    print(f"training rows: {ledger}")
    trained_on = ledger
    if config.eval_data:
        wants["max_samples"] = config.max_eval_samples
        held, held_rows, ledger = load_examples(config.eval_data, tokenizer, **wants)
        report["eval"] = ledger.as_dict()
        print(f"held-out rows: {ledger}")
    elif config.val_size:
        (examples, _), (held, held_rows) = split_holdout(examples, rows, config.val_size, config.seed)
        report["held_out"] = len(held)
        print(f"held out: {len(held)} of these examples")

    first = examples.epoch(0)
    if prepare:
        examples, held = [*first], [*held]  # what it finds is kept with them
    steps, dtype = Plan(examples, config, count, first.row), pick_dtype(config, source, device)
    clock.turn("forecast")
    forecast = foresee(config, source, steps, loss_fn, device, dtype)
    if config.dry_run:
        rehearse(config, source, steps, loss_fn, device, dtype, forecast)
        return
    clock.turn("loading")
    model = load_4bit(source, config, dtype=dtype, device=device, attn_implementation=config.attn_implementation)
    notices = equip(model, config)
    print(*notices, sep="\n", end="\n" * bool(notices))
    trained, total = count_parameters(model)
    print(f"{config.model}: {total:,} parameters, {trained:,} train; {len(steps)} steps of {steps.batch_size} examples "
          f"on {device} ({model.attention} attention, {model.dtype})")

    if prepare:
        clock.turn("reference")
        prepare(model, steps, held)
    describe_run(config, began, report)
    questions, choices = held[: config.eval_answers], [row.get("choices") for row in held_rows[: config.eval_answers]]
    clock.turn("answers")
    before = ask(model, tokenizer, questions, choices, config)
    forced = list(filter(None, (ask_choice(tokenizer, *at) for at in zip(held, (r.get("choices") for r in held_rows)))))
    evaluate = (lambda: evaluate_loss(model, held, loss_fn, config, count) | choice_metrics(model, forced))
    trackers = {}
    summary = train(model, steps, loss_fn, config, evaluate if held else None, trackers, clock)
    clock.turn("answers")
    after = ask(model, tokenizer, questions, choices, config)
    clock.turn("saving and merging")
    figures = finish(model, config, held or examples)
    if figures:
        print(f"\n{show_merge(figures)}")
    show_answers(before, after, config)
    log = Log(folder, (folder / "log.jsonl").stat().st_size, trackers)
    answers = {"eval_answers_before": accuracy(before)[0], "eval_answers": accuracy(after)[0]}
    summary |= conclude(clock, forecast, model)
    results = {"step": len(steps), **summary, **{k: v for k, v in answers.items() if v is not None}}
    log.draw()
    write_card(config, trained_on, results, figures)
    log.write(results)
    log.close()
    print(f"saved in {folder}: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}")
    if config.push_to_hub:
        push(folder, config)


def main(argv=None):
    config = read_config(SFTConfig, sys.argv[1:] if argv is None else argv, "sft")
    with locked(config.output_dir), kept_output(Path(config.output_dir)):
        run(config, sft_loss)


if __name__ == "__main__":
    cli(main)

"""Supervised fine-tuning, and the training loop that SFT and DPO share.

The decision that is not obvious: a step is planned before it runs. Which examples it holds follows from (seed, epoch,
step) alone, and the number that divides its loss (scored tokens, or pairs) is known from the data. So how a step is cut
into micro-batches is a matter of memory, never of the result; and going on at step k needs no random state.

    python sft.py                                        # the embedded tiny model and question set, about a minute
    python sft.py --model Qwen/Qwen3-0.6B --data my.jsonl --output_dir output/mine
    python sft.py --config configs/mine.yaml --learning_rate 1e-4
"""

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from data import Tokenizer, load_examples, parse_config, split_holdout
from eval import accuracy, answer_questions
from lora import LoRAConfig, adapter_parameters, add_lora, count_parameters, merge_lora, write_adapter
from model import (COMPANIONS, IGNORE, Batch, UserError, cli, load_model, nearest, read_json, read_tensor, resolve,
                   save_model, write_tensors, written_aside)

EXAMPLES = Path(__file__).resolve().parent / "examples"


@dataclass
class SFTConfig(LoRAConfig):
    """Everything a run can be told. Names are those of transformers' TrainingArguments, TRL's SFTConfig and PEFT's
    LoraConfig."""

    model: str = ""  # folder or hub id of the model to train; none: the embedded tiny one
    revision: str | None = None  # branch, tag or commit of a hub id
    data: list[str] = field(default_factory=list)  # training rows: files or hub ids; none: the embedded questions
    eval_data: list[str] = field(default_factory=list)  # held-out rows: files or hub ids
    val_size: float = 0.0  # without eval_data: rows held out of data, a share below 1 or a number of rows
    output_dir: str = "output/sft"  # the run folder
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

    dtype: str = "auto"  # of base weights and matmuls: auto (the checkpoint's), bfloat16, float32
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    attn_implementation: str = "auto"  # auto, varlen (flash), sdpa, eager
    gradient_checkpointing: bool = False  # recompute each block in backward: a third more time, far less memory
    micro_batch_tokens: int = 0  # tokens per forward pass, whatever the batch size; 0: 512 on a CPU, 16384 on a GPU

    num_train_epochs: float = 3.0  # passes over the data
    max_steps: int = -1  # optimizer steps; overrides num_train_epochs when positive
    per_device_train_batch_size: int = 8  # examples per step, times gradient_accumulation_steps
    gradient_accumulation_steps: int = 1  # times this many; memory is micro_batch_tokens' matter
    learning_rate: float = 2e-4  # peak learning rate
    lr_scheduler_type: str = "cosine"  # cosine, linear, constant
    warmup_ratio: float = 0.03  # share of the steps over which the learning rate rises from 0
    warmup_steps: int = 0  # number of those steps; overrides warmup_ratio when positive
    optim: str = "adamw"  # adamw
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.999  # decay of the gradient's square
    adam_epsilon: float = 1e-8  # added to the root of the square
    weight_decay: float = 0.0  # AdamW's, on everything but norms and biases
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    seed: int = 42  # of order, dropout, adapter start and row choice

    logging_steps: int = 10  # steps between lines of log.jsonl
    eval_strategy: str = "epoch"  # when the held-out loss is measured: no, steps, epoch
    eval_steps: int = 100  # steps between evaluations with eval_strategy steps
    save_strategy: str = "steps"  # when a checkpoint is written: no, steps, epoch
    save_steps: int = 500  # steps between checkpoints with save_strategy steps
    save_total_limit: int | None = None  # keep this many newest checkpoints
    resume: str = "auto"  # auto: go on from the last checkpoint in output_dir; never; or a checkpoint's path
    overwrite_output_dir: bool = False  # delete what output_dir holds and start anew
    merge: bool = True  # write merged/, the model with the adapter merged in

    def __post_init__(self):
        self.model = self.model or str(EXAMPLES / "tiny-qwen3")
        if not self.data:
            self.data = [str(EXAMPLES / "mcqa" / "train.jsonl")]
            self.eval_data = self.eval_data or [str(EXAMPLES / "mcqa" / "validation.jsonl")]
        for key, options in CHOICES.items():
            if (value := getattr(self, key)) not in options:
                raise UserError(f"{key}: {value!r} is not one of {', '.join(options)}" + nearest(value, options))
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "eval_steps",
                    "save_steps", "max_length", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)} is below 1")
        for key in ("learning_rate", "num_train_epochs", "warmup_ratio", "weight_decay", "max_grad_norm", "val_size"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{key}: {getattr(self, key)} is not a number from 0 up")


CHOICES = {
    "optim": ("adamw", "adamw_torch", "adamw_torch_fused"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup"),
    "eval_strategy": ("no", "steps", "epoch"), "save_strategy": ("no", "steps", "epoch"),
    "dtype": ("auto", "bfloat16", "float32"),
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

    def __init__(self, examples, config, count=count_scored):
        self.examples, self.seed, self.count = examples, config.seed, count
        self.batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = max(1, -(-len(examples) // self.batch_size))
        self.steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        if config.max_steps > 0:
            self.steps = config.max_steps

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        """The examples of a step, counted from 0."""
        epoch, at = divmod(step, self.steps_per_epoch)
        examples = self.examples.epoch(epoch) if hasattr(self.examples, "epoch") else self.examples
        order = np.random.default_rng([self.seed, epoch]).permutation(len(examples))
        return [examples[i] for i in order[at * self.batch_size : (at + 1) * self.batch_size]]

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


def micro_batches(examples, budget, device):
    """The examples in packed batches of about equal size, at most `budget` tokens each (an example is never cut)."""
    sizes = [count_tokens(example) for example in examples]
    share = sum(sizes) / max(1, math.ceil(sum(sizes) / budget))
    part, held = [], 0
    for example, size in zip(examples, sizes):
        if part and (held + size > budget or held >= share):
            yield Batch.pack(part, device)
            part, held = [], 0
        part.append(example)
        held += size
    yield Batch.pack(part, device)


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
    """AdamW over {name: parameter}; weight decay leaves norms and biases alone, as transformers' Trainer does."""
    plain = {name for name in parameters if name.endswith("bias") or "norm" in name}
    groups = [{"params": [p for n, p in parameters.items() if n not in plain], "weight_decay": config.weight_decay},
              {"params": [p for n, p in parameters.items() if n in plain], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True,
                             betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)


def accumulate(model, examples, count, loss_fn, budget):
    """Adds the gradient of loss / count over the examples to the parameters; returns (summed loss, summed metrics)."""
    total, sums = 0.0, {}
    for batch in micro_batches(examples, budget, model.device):
        loss, metrics = loss_fn(model, batch)
        (loss / count).backward()
        total += loss.detach()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    return float(total), {name: float(value) for name, value in sums.items()}


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
    return config.micro_batch_tokens or (512 if device.type == "cpu" else 16384)


def peak_memory_gb(device):
    """Peak memory so far in GB (10^9 bytes): what CUDA's allocator handed out, elsewhere the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextmanager
def stop_signals():
    """A list that holds the signal's number once SIGINT or SIGTERM came. A second one interrupts at once."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model, steps, loss_fn, config, evaluate=None):
    """Runs the plan `steps` from the last checkpoint in config.output_dir, if any, to its end.

    loss_fn(model, batch) -> (summed loss, {metric: summed value}); both are divided by the step's planned count.
    evaluate() -> {name: value}, called when config says so. Ctrl-C and SIGTERM save at the step's end and exit 130 /
    143.
    """
    folder, device = Path(config.output_dir), model.device
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, config)
    state = {"step": 0, "log_bytes": 0, "window": {}, "data": steps.fingerprint}
    if checkpoint := find_checkpoint(config):
        state = load_checkpoint(checkpoint, model, parameters, optimizer, steps)
        print(f"going on from {checkpoint}: step {state['step']} of {len(steps)}")
    log, window = Log(folder, state["log_bytes"]), state["window"]
    budget, began = token_budget(config, device), time.perf_counter()
    model.train()
    if evaluate and config.eval_strategy != "no" and state["step"] == 0:
        log.write({"step": 0, "epoch": 0.0, **evaluate()})
    bar = tqdm(total=len(steps), initial=state["step"], unit="step", disable=not sys.stderr.isatty(), leave=False)
    clock = Clock()
    with stop_signals() as stopped:
        for step in range(state["step"] + 1, len(steps) + 1):
            examples, lr, last = steps[step - 1], learning_rate(step - 1, len(steps), config), step == len(steps)
            count = sum(map(steps.count, examples))
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))  # dropout
            loss, metrics = accumulate(model, examples, count, loss_fn, budget)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            clock.add(sum(map(count_tokens, examples)), len(examples))
            metrics |= {"loss": loss, "count": count, "scored_tokens": sum(map(count_scored, examples))}
            window = {name: window.get(name, 0.0) + value for name, value in metrics.items()}
            bar.update()
            if step % config.logging_steps == 0 or last:
                total, scored = window.pop("count"), window.pop("scored_tokens")
                means = {"loss": window.pop("loss") / total, **{name: value / total for name, value in window.items()}}
                log.write({"step": step, "epoch": round(steps.epoch(step), 4), **means, "grad_norm": float(norm),
                           "learning_rate": lr, "scored_tokens": round(scored), **clock.read(),
                           "peak_memory_gb": round(peak_memory_gb(device), 3)})
                window = {}
                clock.skip()
            if evaluate and (steps.due(step, config.eval_strategy, config.eval_steps)
                             or last and config.eval_strategy != "no"):
                log.write({"step": step, "epoch": round(steps.epoch(step), 4), **evaluate()})
                clock.skip()
            if (steps.due(step, config.save_strategy, config.save_steps)
                    or (last or stopped) and config.save_strategy != "no"):
                state = {"step": step, "log_bytes": log.sync(), "window": window, "data": steps.fingerprint}
                save_checkpoint(folder, model, parameters, optimizer, state, config)
                clock.skip()
            if stopped:
                bar.close()
                kept = "" if config.save_strategy == "no" else "; the same command goes on from here"
                print(f"stopped after step {step} of {len(steps)}{kept}", flush=True)
                sys.exit(128 + stopped[0])
    bar.close()
    return {"train_runtime": round(time.perf_counter() - began, 2), "peak_memory_gb": round(peak_memory_gb(device), 3)}


class Clock:
    """Throughput since it was last read; evaluation, drawing and saving are not counted."""

    def __init__(self):
        self.tokens = self.examples = self.seconds = 0
        self.skip()

    def skip(self):
        self.last = time.perf_counter()

    def add(self, tokens, examples):
        now = time.perf_counter()
        self.tokens, self.examples, self.seconds = (
            self.tokens + tokens, self.examples + examples, self.seconds + now - self.last)
        self.last = now

    def read(self):
        seconds = max(self.seconds, 1e-9)
        found = {"tokens_per_second": round(self.tokens / seconds, 1),
                 "examples_per_second": round(self.examples / seconds, 3)}
        self.tokens = self.examples = self.seconds = 0
        return found


class Log:
    """log.jsonl, cut back to `size` bytes (what the checkpoint saw), echoed to the terminal, drawn as
    training_loss.png."""

    def __init__(self, folder, size=0):
        self.path, self.drawn = folder / "log.jsonl", 0.0
        self.path.touch()
        os.truncate(self.path, size)
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        shown = {k: v for k, v in line.items() if k not in ("epoch", "scored_tokens", "examples_per_second")}
        tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))
        if time.perf_counter() - self.drawn > 20:  # drawing takes a third of a second
            self.draw()

    def draw(self):
        plot_losses(self.path)
        self.drawn = time.perf_counter()

    def sync(self):
        os.fsync(self.file.fileno())
        return self.path.stat().st_size


def read_log(path):
    """The whole lines of a log.jsonl, as dicts; what a kill cut short is left out."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").rpartition("\n")[0].splitlines()]


def plot_losses(path):
    """Draws training_loss.png beside a log.jsonl: the training loss of each logged step and the held-out loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in read_log(path) if key in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss per scored token")
    axes.grid(alpha=0.3)
    axes.legend()
    aside = Path(path).with_name(".training_loss.png")
    figure.savefig(aside, dpi=130, format="png")
    aside.replace(Path(path).with_name("training_loss.png"))
    pyplot.close(figure)


# --- checkpoints and the run folder -----------------------------------------------------------------------------------


def save_checkpoint(folder, model, parameters, optimizer, state, config):
    """checkpoint-000500/: the trained tensors in fp32 (as an adapter, or as a whole model), the optimizer's, and
    state.json."""
    names = {p: name for name, p in parameters.items()}
    tensors = {f"{names[p]}:{key}": torch.as_tensor(value)
               for p, values in optimizer.state.items() for key, value in values.items()}
    with written_aside(folder / f"checkpoint-{state['step']:06d}") as aside:
        if config.lora_r:
            write_adapter(model, aside, config.model)
        else:
            write_tensors(parameters, aside / "model.safetensors")
        write_tensors(tensors, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=2))
    if config.save_total_limit:
        for old in checkpoints(folder)[: -config.save_total_limit]:
            shutil.rmtree(old)


def checkpoints(folder):
    """A run's checkpoints, oldest first."""
    return sorted(path for path in Path(folder).glob("checkpoint-*") if (path / "state.json").exists())


def find_checkpoint(config):
    """The checkpoint to go on from, or None."""
    if config.resume not in ("auto", "never"):
        if not (Path(config.resume) / "state.json").exists():
            raise UserError(f"resume: {config.resume} is no checkpoint (no state.json in it); else give auto or never")
        return Path(config.resume)
    found = checkpoints(config.output_dir) if config.resume == "auto" else []
    return found[-1] if found else None


@torch.no_grad()
def load_checkpoint(path, model, parameters, optimizer, steps):
    """Puts a checkpoint's tensors back where they were and returns its state."""
    state = read_json(path / "state.json")
    if state["data"] != steps.fingerprint:
        raise UserError(f"{path}: was trained on other data than --data gives now; take the old data, "
                        "another --output_dir, or --overwrite_output_dir")
    file, trained = (("adapter_model.safetensors", adapter_parameters(model)) if hasattr(model, "adapter")
                     else ("model.safetensors", parameters))
    for name, parameter in trained.items():
        parameter.copy_(read_tensor(path / file, name))
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, slot = key.rpartition(":")
        p = parameters[name]
        optimizer.state[p][slot] = value if slot == "step" else value.to(p.device)
    return state


FREE = {"output_dir", "resume", "overwrite_output_dir", "merge", "eval_answers", "num_samples", "max_new_tokens",
        "logging_steps", "save_total_limit", "device", "micro_batch_tokens", "gradient_checkpointing",
        "attn_implementation"}  # may differ when a command is run again


def open_run(config):
    """Makes or reopens the run folder: (the day its run began, for templates that tell the date; whether it is
    finished).

    Raises UserError where it holds a run of another configuration, naming the keys, or files that are no run's.
    """
    folder = Path(config.output_dir)
    find_checkpoint(config)  # a --resume that is none is told before anything else happens
    if config.overwrite_output_dir and (folder / "config.json").exists():
        shutil.rmtree(folder)
    if (folder / "config.json").exists():
        old, new = read_json(folder / "config.json"), json.loads(json.dumps(asdict(config)))
        if differ := [key for key in new if key not in FREE and old.get(key) != new[key]]:
            shown = ", ".join(f"{k} ({json.dumps(old.get(k))} there, {json.dumps(new[k])} now)" for k in differ[:4])
            raise UserError(f"{folder} holds a run of another configuration: {shown}"
                            + (f" and {len(differ) - 4} more" if len(differ) > 4 else "")
                            + "; choose another --output_dir, or --overwrite_output_dir to start anew")
        log = folder / "log.jsonl"
        last = read_log(log)[-1:] if log.exists() and config.resume == "auto" else []
        return datetime.fromisoformat(old["began"]), any("train_runtime" in line for line in last)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files that are not a run's; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return datetime.now(), False


def describe_run(config, began, report):
    """Writes config.json and data_report.json: the run exists from here on. Nothing is written while data or model may
    be wrong."""
    for name, value in (("data_report.json", report), ("config.json", {**asdict(config), "began": began.isoformat()})):
        aside = Path(config.output_dir) / f".{name}"
        aside.write_text(json.dumps(value, indent=2))
        aside.replace(Path(config.output_dir) / name)


def pick_device(name):
    """torch.device of 'auto' (CUDA, then MPS, then the CPU) or of a device's name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name} can't be used here ({str(error).splitlines()[0][:80]})") from None


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


def finish(model, config):
    """Writes adapter/, reads it back, then merged/. After full fine-tuning there is only merged/, the model itself."""
    folder = Path(config.output_dir)
    if config.lora_r:
        with written_aside(folder / "adapter") as aside:
            write_adapter(model, aside, config.model)
            for file in COMPANIONS:
                if "config.json" != file and (model.folder / file).exists():
                    shutil.copyfile(model.folder / file, aside / file)
        file = folder / "adapter" / "adapter_model.safetensors"
        for name, parameter in adapter_parameters(model).items():
            if not torch.equal(read_tensor(file, name), parameter.detach().cpu()):
                raise UserError(f"{file}: {name} does not read back as it was written; is the disk sound?")
    if config.merge or not config.lora_r:
        save_model(merge_lora(model).state_dict().items(), folder / "merged", model.folder)


def main(argv=None):
    config = read_config(SFTConfig, sys.argv[1:] if argv is None else argv, "sft")
    folder = Path(config.output_dir)
    began, finished = open_run(config)
    if finished:
        print(f"{folder} holds this run, finished; --overwrite_output_dir trains anew")
        return
    device = pick_device(config.device)
    source = resolve(config.model, config.revision)
    tokenizer = Tokenizer(source, began)
    wants = {"max_length": config.max_length, "completion_only_loss": config.completion_only_loss,
             "assistant_only_loss": config.assistant_only_loss, "seed": config.seed,
             "max_samples": config.max_samples, "recipe": config.recipe, "recipe_args": config.recipe_args}
    examples, rows, ledger = load_examples(config.data, tokenizer, **wants)
    held, held_rows, report = [], [], {"train": ledger.as_dict()}
    print(f"training rows: {ledger}")
    if config.eval_data:
        wants["max_samples"] = config.max_eval_samples
        held, held_rows, ledger = load_examples(config.eval_data, tokenizer, **wants)
        report["eval"] = ledger.as_dict()
        print(f"held-out rows: {ledger}")
    elif config.val_size:
        (examples, _), (held, held_rows) = split_holdout(examples, rows, config.val_size, config.seed)
        report["held_out"] = len(held)
        print(f"held out: {len(held)} of these examples")

    model = load_model(source, config.dtype, device, config.attn_implementation)
    model.gradient_checkpointing = config.gradient_checkpointing
    for notice in add_lora(model, config, config.seed):
        print(notice)
    trained, total = count_parameters(model)
    steps = Plan(examples, config)
    print(f"{config.model}: {total:,} parameters, {trained:,} train; {len(steps)} steps of {steps.batch_size} examples "
          f"on {device} ({model.attention} attention, {model.dtype})")

    describe_run(config, began, report)
    questions, choices = held[: config.eval_answers], [row.get("choices") for row in held_rows[: config.eval_answers]]
    before = ask(model, tokenizer, questions, choices, config)
    evaluate = (lambda: evaluate_loss(model, held, sft_loss, config)) if held else None
    summary = train(model, steps, sft_loss, config, evaluate)
    after = ask(model, tokenizer, questions, choices, config)
    finish(model, config)
    show_answers(before, after, config)
    log = Log(folder, (folder / "log.jsonl").stat().st_size)
    answers = {"eval_accuracy_before": accuracy(before)[0], "eval_accuracy": accuracy(after)[0]}
    log.write({"step": len(steps), **summary, **{k: v for k, v in answers.items() if v is not None}})
    log.draw()
    print(f"saved in {folder}: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}")


if __name__ == "__main__":
    cli(main)

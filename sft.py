"""Supervised fine-tuning, and the training loop that SFT and DPO share.

The decision that is not obvious: a step is planned before it runs. Which examples it holds follows from (seed, epoch,
step) alone, and the number that divides its loss (scored tokens, or pairs) is known from the data. So how a step is cut
into micro-batches is a matter of memory, never of the result; and going on at step k needs no random state.

    python sft.py                                        # the embedded tiny model and question set, about a minute
    python sft.py --model Qwen/Qwen3-0.6B --data my.jsonl --output_dir output/mine
    python sft.py --config configs/mine.yaml --learning_rate 1e-4
"""

import math
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Tokenizer, load_examples, split_holdout
from eval import accuracy, answer_questions, ask_choice, choice_metrics
from lora import (
    LoRAConfig,
    adapter_parameters,
    add_lora,
    count_parameters,
    load_adapter,
    lora_layers,
    merge,
    merge_lora,
    open_adapter,
    write_adapter,
)
from model import (
    DTYPES,
    IGNORE,
    Batch,
    ModelConfig,
    choose_attention,
    open_model,
    pick_device,
    save_model,
)
from qlora import (
    Linear4bit,
    QuantConfig,
    bitsandbytes,
    load_4bit,
    measure_merge,
    swap_linear4bit,
)
from support.card import merge_table, write_card
from support.checkpoints import (
    damage,
    find_checkpoint,
    load_checkpoint,
    load_trained,
    open_run,
    save_checkpoint,
    write_run_config,
)
from support.errors import UserError, nearest, run_command
from support.files import atomic_folder, locked_folder, read_tensor, write_tensors
from support.hub import (
    COMPANIONS,
    HubConfig,
    call_hub,
    create_repositories,
    push,
    resolve,
)
from support.memory import free_cached_memory, free_memory_gb, keep_freed_memory
from support.planner import (
    by_module,
    estimate_memory,
    print_plan,
    print_what_fits,
    share_of_roof,
)
from support.settings import check_choices, check_range, parse_config
from support.tracking import (
    TRACKERS,
    Clock,
    Log,
    copy_output,
    find_trackers,
    print_summary,
    start_trackers,
)

EXAMPLES = Path(__file__).resolve().parent / "examples"


@dataclass
class SFTConfig(LoRAConfig, QuantConfig, HubConfig):
    """Everything a run can be told. Names are those of transformers' TrainingArguments and BitsAndBytesConfig, TRL's
    SFTConfig and PEFT's LoraConfig."""

    model: str = ""  # folder or hub id of the model to train; none: the embedded tiny one
    revision: str | None = None  # branch, tag or commit of a hub id
    adapter: str = ""  # a LoRA (PEFT's layout, or a run folder) to go on training, with its own rank and targets
    data: list[str] = field(
        default_factory=list
    )  # training rows: files or hub ids; none: the embedded questions
    eval_data: list[str] = field(default_factory=list)  # held-out rows: files or hub ids
    val_size: float = (
        0.0  # without eval_data: rows held out of data, a share below 1 or a number of rows
    )
    output_dir: str = "output/sft"  # the run folder
    dry_run: bool = False  # print parameters, steps, the peak memory and the time to expect; train and write nothing
    max_samples: int | None = None  # use this many rows of data, drawn by seed
    max_eval_samples: int | None = None  # use this many held-out rows
    recipe: str = ""  # reads a data set's own rows: mcqa, ecqa, alpaca, chatml, movielens, ultrafeedback, gsm8k
    recipe_args: dict = field(default_factory=dict)  # its arguments, as {"cot": 0.5}
    max_length: int = 1024  # tokens per example; a longer one loses the start of its prompt
    completion_only_loss: bool | None = (
        None  # true: the last assistant turn alone; false: completions' prompts too
    )
    assistant_only_loss: bool = (
        True  # of conversations, score the assistant's turns; false: everything
    )
    eval_answers: int = (
        64  # held-out rows whose "Answer: X" is generated and checked before and after; 0: none
    )
    num_samples: int = 3  # of those, how many are shown
    max_new_tokens: int = 128  # longest generated answer

    dtype: str = (
        "auto"  # of base weights and matmuls: auto (the checkpoint's), bfloat16, float16, float32
    )
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    attn_implementation: str = "auto"  # auto, varlen (flash), sdpa, eager
    gradient_checkpointing: bool = (
        False  # recompute each block in backward: a third more time, far less memory
    )
    micro_batch_tokens: int = (
        0  # tokens per forward pass; 0: 512 on a CPU, 1024 there in 4 bit, 16384 on a GPU
    )

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
    max_skipped_steps: int = (
        3  # stop after so many steps in a row whose loss or gradient is not finite
    )
    seed: int = 42  # of order, dropout, adapter start and row choice

    logging_steps: int = 10  # steps between lines of log.jsonl
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"]
    )  # and wandb, trackio; or all, or none
    eval_strategy: str = "epoch"  # when the held-out loss is measured: no, steps, epoch
    eval_steps: int = 100  # steps between evaluations with eval_strategy steps
    save_strategy: str = "steps"  # when a checkpoint is written: no, steps, epoch
    save_steps: int = 500  # steps between checkpoints with save_strategy steps
    save_total_limit: int | None = (
        None  # keep this many newest checkpoints, the best one among them
    )
    metric_for_best_model: str | None = (
        None  # what tells the best step: loss, accuracy, f1, ...; none: loss
    )
    greater_is_better: bool | None = (
        None  # whether more of it is better; none: yes, unless it is a loss
    )
    load_best_model_at_end: bool = False  # adapter/ and merged/ are those of the best checkpoint
    early_stopping_patience: int | None = (
        None  # stop after so many evaluations without a new best; none: never
    )
    early_stopping_threshold: float = 0.0  # by how much the metric has to be better to count
    resume: str = (
        "auto"  # auto: go on from the last checkpoint in output_dir; never; or a checkpoint's path
    )
    overwrite_output_dir: bool = False  # delete what output_dir holds and start anew
    merge: bool = True  # write merged/, the model with the adapter merged in
    merge_base: str = (
        "auto"  # of a 4-bit run: original weights, dequantized ones, or auto: what changes least
    )
    push_to_hub: bool = False  # bring adapter/ and merged/ to the hub at the end, see hub_model_id

    CHOICES = {
        "optim": (
            "adamw",
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_8bit",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
        ),
        "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup"),
        "eval_strategy": ("no", "steps", "epoch"),
        "save_strategy": ("no", "steps", "epoch"),
        "dtype": ("auto", *DTYPES),
        "merge_base": ("auto", "original", "dequantized"),
        "report_to": (*TRACKERS, "all", "none"),
    }

    def __post_init__(self):
        self.model = self.model or str(EXAMPLES / "tiny-qwen3")
        if not self.data:
            self.data = [str(EXAMPLES / "mcqa" / "train.jsonl")]
            self.eval_data = self.eval_data or [str(EXAMPLES / "mcqa" / "validation.jsonl")]
        check_choices(self)
        if self.adapter and not self.lora_r:
            raise UserError(
                "lora_r: 0 trains the model itself; merge --adapter first (python lora.py merge)"
            )
        check_range(
            self,
            1,
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "max_length",
            "max_samples",
            "max_eval_samples",
            "max_skipped_steps",
        )
        check_range(self, 1, "max_new_tokens", most=2**20)
        check_range(self, 0, "warmup_ratio", most=1)
        check_range(
            self,
            0,
            "learning_rate",
            "num_train_epochs",
            "weight_decay",
            "max_grad_norm",
            "val_size",
            "seed",
            "adam_epsilon",
            "loraplus_lr_ratio",
            "warmup_steps",
            "micro_batch_tokens",
            "eval_answers",
            "num_samples",
            "save_total_limit",
            "early_stopping_patience",
            "early_stopping_threshold",
        )
        if self.load_best_model_at_end and "no" in (self.eval_strategy, self.save_strategy):
            raise UserError(
                "load_best_model_at_end: needs an eval_strategy and a save_strategy other than no"
            )
        if not 0 <= self.adam_beta1 < 1 or not 0 <= self.adam_beta2 < 1:
            raise UserError(
                f"adam_beta1, adam_beta2 are from 0 to below 1, not {self.adam_beta1}, {self.adam_beta2}"
            )
        if self.load_in_4bit and not self.lora_r:
            raise UserError(
                "lora_r: 0 trains every weight, which 4-bit ones can't be; give a rank, or no load_in_4bit"
            )


# --- the plan ---------------------------------------------------------------------------------------------------------


def count_tokens(example):
    """Tokens of an example, over its segments."""
    return sum(len(segment.ids) for segment in example)


def count_scored(example):
    """What SFT's loss of an example is divided by: its scored tokens, each at its weight."""
    return sum(
        segment.weight * int((np.asarray(segment.labels) != IGNORE).sum()) for segment in example
    )


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

    def select(self, step):
        """(the examples of the epoch of a step, counted from 0, the numbers of those that the step holds)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        examples = self.examples.epoch(epoch) if hasattr(self.examples, "epoch") else self.examples
        order = np.random.default_rng([self.seed, epoch]).permutation(len(examples))
        return examples, order[at * self.batch_size : (at + 1) * self.batch_size]

    def __getitem__(self, step):
        """The examples of a step."""
        examples, numbers = self.select(step)
        return [examples[i] for i in numbers]

    def rows(self, step):
        """Where the rows of a step stand, as 'file:line'."""
        examples, numbers = self.select(step)
        return [getattr(examples, "row", self.row)(i)[0] for i in numbers]

    def epoch(self, step):
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def due(self, step, strategy, every):
        """Whether something that happens by 'steps', 'epoch' or 'no' happens after `step` steps."""
        return (
            strategy == "steps"
            and step % every == 0
            or strategy == "epoch"
            and step % self.steps_per_epoch == 0
        )

    @cached_property
    def fingerprint(self):
        """Changes when the examples do."""
        if hasattr(self.examples, "fingerprint"):
            return self.examples.fingerprint
        crc = 0
        for example in self.examples:
            for segment in example:
                crc = zlib.crc32(
                    np.asarray(segment.labels, np.int32).tobytes(),
                    zlib.crc32(np.asarray(segment.ids, np.int32).tobytes(), crc),
                )
        return f"{len(self.examples)}-{crc:08x}"


def split_by_tokens(examples, budget):
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
    return (Batch.pack(part, device) for part in split_by_tokens(examples, budget))


def learning_rate(step, steps, config):
    """The learning rate of step `step` (from 0) of `steps`: linear warmup, then as transformers' schedules of the same
    names."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant_with_warmup": 1.0,
    }
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
    groups = [
        {"params": ps, "weight_decay": decay, "ratio": ratio}
        for (decay, ratio), ps in groups.items()
    ]
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if "8bit" not in config.optim:
        return torch.optim.AdamW(groups, fused=True, **options)
    paged = "paged" in config.optim
    if paged and not groups[0]["params"][0].is_cuda:
        print(
            "paged_adamw_8bit: pages between a GPU and the CPU; without a GPU it is adamw_8bit",
            file=sys.stderr,
        )
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


def compute_gradient(model, examples, count, loss_fn, config, seed, scale):
    """`accumulate`, dropout drawn from `seed`. Where memory gives out it is done again in micro-batches of half the
    tokens, as is the rest of the run: the planned count divides, so the gradient is the same. UserError where examples
    stand alone already."""
    before = config.micro_batch_tokens
    while True:
        budget = token_budget(config, model.device)
        try:
            torch.manual_seed(seed)
            return accumulate(model, examples, count, loss_fn, budget, scale)
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # a CPU's allocator, oneDNN and MPS have no class of their own
            words = str(error).partition("\n")[0].lower()
            if (
                not isinstance(error, MemoryError)
                and "memory" not in words
                and "create a primitive" not in words
            ):
                raise
        model.zero_grad()  # backward may have got halfway; out here nothing holds what it had made
        free_cached_memory()
        tokens = sum(map(count_tokens, examples))
        if budget == sys.maxsize or len([*micro_batches(examples, budget, "cpu")]) == len(examples):
            config.micro_batch_tokens = before  # smaller ones were no help
            longest = max(map(count_tokens, examples))
            raise UserError(
                f"out of memory at {longest:,} tokens that can't be split ({words}); run again with "
                "--gradient_checkpointing, else with --load_in_4bit or a smaller max_length"
            )
        config.micro_batch_tokens = min(budget, tokens) // 2
        tqdm.write(
            f"out of memory at {min(budget, tokens):,} tokens in a micro-batch; {config.micro_batch_tokens:,} "
            "from here on, with the same gradient"
        )


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
    return config.micro_batch_tokens or (
        16384 if device.type != "cpu" else 1024 if config.load_in_4bit else 512
    )


@contextmanager
def stop_signals():
    """A list that holds the signal's number once SIGINT, SIGTERM or SIGHUP came. A second one interrupts at once."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }  # nohup has SIGHUP ignored
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
    clock.enter("evaluation")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, config)
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    state = {
        "step": 0,
        "log_bytes": 0,
        "window": {},
        "data": steps.fingerprint,
        "best": {},
        "skipped": 0,
        "lowered": 0,
    }
    if checkpoint := find_checkpoint(config):
        trained = adapter_parameters(model) if hasattr(model, "adapter") else parameters
        state = load_checkpoint(checkpoint, trained, parameters, optimizer, steps.fingerprint)
        scaler.load_state_dict(state["scaler"])
        print(f"going on from {checkpoint}: step {state['step']} of {len(steps)}")
    if not evaluate and (config.load_best_model_at_end or config.early_stopping_patience):
        raise UserError(
            "load_best_model_at_end, early_stopping_patience: no held-out rows; give eval_data or val_size"
        )
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
        clock.enter("checkpoints")
        lowered = config.micro_batch_tokens * (config.micro_batch_tokens != asked)
        state = {
            "step": step,
            "log_bytes": log.sync(),
            "window": window,
            "data": steps.fingerprint,
            "best": best,
            "skipped": skipped,
            "lowered": lowered,
            "scaler": scaler.state_dict(),
        }
        write = (
            partial(write_adapter, model, base_model=config.model)
            if config.lora_r
            else (lambda aside: write_tensors(parameters, aside / "model.safetensors"))
        )
        save_checkpoint(folder, parameters, optimizer, state, config, write)
        clock.enter("log")

    model.train()
    if evaluate and config.eval_strategy != "no" and state["step"] == 0:
        found = evaluate()
        update_best({}, found, 0, config)  # a metric that is none is told now
        log.write({"step": 0, "epoch": 0.0, **found})
    bar = tqdm(
        total=len(steps),
        initial=state["step"],
        unit="step",
        disable=not sys.stderr.isatty(),
        leave=False,
    )
    with stop_signals() as stopped, keep_freed_memory():
        for step in range(state["step"] + 1, len(steps) + 1):
            if best.get("stop"):
                break
            clock.enter("forward and backward")
            examples, lr, last = (
                steps[step - 1],
                learning_rate(step - 1, len(steps), config),
                step == len(steps),
            )
            count, place = (
                sum(map(steps.count, examples)),
                {"step": step, "epoch": round(steps.epoch(step), 4)},
            )
            seed = int(
                np.random.SeedSequence([config.seed, step]).generate_state(1)[0]
            )  # of dropout
            try:
                loss, metrics = compute_gradient(
                    model, examples, count, loss_fn, config, seed, scaler.scale
                )
            except UserError:
                save(step - 1)
                raise
            clock.enter("optimizer")
            scaler.unscale_(optimizer)
            norm = float(
                torch.nn.utils.clip_grad_norm_(
                    parameters.values(), config.max_grad_norm or math.inf
                )
            )
            if math.isfinite(loss) and (
                math.isfinite(norm) or scaler.get_scale() > 1
            ):  # that of float16 shrinks first
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["ratio"]
                scaler.step(optimizer)
                metrics |= {
                    "loss": loss,
                    "count": count,
                    "scored_tokens": sum(map(count_scored, examples)),
                }
                window = {name: window.get(name, 0.0) + value for name, value in metrics.items()}
                skipped = 0
            else:
                if not skipped:
                    save(step - 1)
                skipped += 1
                log.write(
                    {
                        **place,
                        "skipped": f"loss {loss}, gradient norm {norm}",
                        "rows": steps.rows(step - 1),
                    }
                )
                if skipped >= config.max_skipped_steps:
                    raise UserError(
                        f"{skipped} steps in a row, up to {step}, had no finite loss and gradient; their "
                        f"rows are in {log.path}. The last good step is kept; try a lower learning_rate"
                    )
            scaler.update()
            optimizer.zero_grad()
            clock.count_step(sum(map(count_tokens, examples)), len(examples))
            bar.update()
            if window and (step % config.logging_steps == 0 or last):
                total, scored = window.pop("count"), window.pop("scored_tokens")
                means = {
                    "loss": window.pop("loss") / total,
                    **{name: value / total for name, value in window.items()},
                }
                log.write(
                    {
                        **place,
                        **means,
                        "grad_norm": norm,
                        "learning_rate": lr,
                        "scored_tokens": round(scored),
                        **clock.throughput(),
                    }
                )
                window = {}
            if evaluate and (
                steps.due(step, config.eval_strategy, config.eval_steps)
                or last
                and config.eval_strategy != "no"
            ):
                clock.enter("evaluation")
                found = evaluate()
                log.write({**place, **found})
                best = update_best(best, found, step, config)
                last = last or best["stop"]
            improved = config.load_best_model_at_end and best.get("step") == step
            if (
                last
                or stopped
                or improved
                or steps.due(step, config.save_strategy, config.save_steps)
            ):
                save(step)
            if stopped:
                bar.close()
                kept = (
                    "" if config.save_strategy == "no" else "; the same command goes on from here"
                )
                print(f"stopped after step {step} of {len(steps)}{kept}", flush=True)
                sys.exit(128 + stopped[0])
    bar.close()
    if best.get("stop"):
        print(
            f"stopped early after step {state['step']}: no new best for {config.early_stopping_patience} evaluations"
        )
    if config.load_best_model_at_end and (
        fault := damage(kept := folder / f"checkpoint-{best['step']:06d}")
    ):
        print(f"{kept}, the best step's, is damaged ({fault}); the last step is taken")
    elif config.load_best_model_at_end:
        load_trained(kept, adapter_parameters(model) if hasattr(model, "adapter") else parameters)
        print(f"the best step is taken: {best['step']}, {best['metric']} {best['value']:.4g}")
    best_step = {"best_step": best["step"]} if config.load_best_model_at_end else {}
    peak = clock.throughput()["peak_memory_gb"]
    return {
        "train_runtime": round(time.perf_counter() - began, 2),
        "peak_memory_gb": peak,
        **best_step,
    }


def update_best(best, found, step, config):
    """What is known of the best evaluation, {"step", "metric", "value", "waited", "stop"}, after another one. Source:
    transformers' Trainer and EarlyStoppingCallback: patience looks at the best so far, with the threshold."""
    metric = "eval_" + (config.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in found:
        names = ", ".join(name.removeprefix("eval_") for name in found)
        raise UserError(
            f"metric_for_best_model: the evaluation gives {names}, not {metric.removeprefix('eval_')}"
            + nearest(metric, found)
        )
    more = (
        config.greater_is_better
        if config.greater_is_better is not None
        else not metric.endswith("loss")
    )
    gain = (found[metric] - best["value"]) * (1 if more else -1) if best else math.inf
    waited = 0 if gain > 0 and gain > config.early_stopping_threshold else best["waited"] + 1
    stop = bool(config.early_stopping_patience) and waited >= config.early_stopping_patience
    kept = {"step": step, "metric": metric, "value": found[metric]} if gain > 0 else best
    return {**kept, "waited": waited, "stop": stop}


# --- trackers, and what was printed -----------------------------------------------------------------------------------


# --- the planner's view -----------------------------------------------------------------------------------------------


def plan_memory(config, source, steps, loss_fn, device, dtype):
    """(parameters by module, {part: GB} at the steps' peak, FLOPs of the largest micro-batch, its examples) of a run,
    see `estimate_memory`; no weight is read."""
    model, _ = open_model(source, swap_layers=partial(swap_linear4bit, config))
    model.dtype = DTYPES[model.config.dtype if dtype == "auto" else dtype]
    model.attention, _ = choose_attention(
        config.attn_implementation, model.config, model.dtype, device
    )
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and not hasattr(
            layer, "state"
        ):  # to be quantised as it is loaded
            layer.expect_own(model.dtype)
    attach_adapter(model, config)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else model.dtype)
    modules, count = by_module(model), min(len(steps), steps.steps_per_epoch)
    budget = token_budget(config, device)
    groups = [[*split_by_tokens(steps[step], budget)] for step in range(0, count, count // 256 + 1)]
    _, largest, first = max(
        (
            (sum(map(count_tokens, part)), part, len(group) == 1)
            for group in groups
            for part in group
        ),
        key=lambda sized: sized[0],
    )
    parts = len(steps) * sum(map(len, groups)) / len(groups)
    batch = Batch.pack(largest, device)
    return modules, *estimate_memory(model, batch, loss_fn, config, first, parts), largest


def dry_run(config, source, steps, loss_fn, device, dtype):
    """--dry_run: prints what `plan_memory` found and the time that one micro-batch predicts; where it does not fit,
    what needs less."""
    modules, memory, flops, largest = plan_memory(config, source, steps, loss_fn, device, dtype)
    planned = [
        (count_tokens(example), count_scored(example))
        for n in range(len(steps))
        for example in steps[n]
    ]
    tokens, scored = map(sum, zip(*planned))
    print_plan(modules, memory, steps, tokens, scored)
    peak, free = sum(memory.values()), free_memory_gb(device) + memory.get("process", 0)
    if peak > free:
        fewer_bits = ("load_in_4bit", True) if config.lora_r else ("optim", "adamw_8bit")
        changes = [
            ("gradient_checkpointing", True),
            ("micro_batch_tokens", max(planned)[0]),
            fewer_bits,
        ]

        def estimate(changed):
            return sum(
                plan_memory(replace(config, **changed), source, steps, loss_fn, device, dtype)[
                    1
                ].values()
            )

        return print_what_fits(peak, free, changes, estimate)
    model = load_4bit(
        source, config, dtype=dtype, device=device, attn_implementation=config.attn_implementation
    )
    attach_adapter(model, config)
    model.train()
    with keep_freed_memory():
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            accumulate(model, largest, 1, loss_fn, sys.maxsize)
            seconds = time.perf_counter() - began
    size = sum(map(count_tokens, largest))
    rate, share = size / seconds, share_of_roof(model, size, flops, seconds)
    print(
        f"\nthe largest micro-batch runs, forward and backward, at {rate:,.0f} tokens/s ({share:.0%} of what plain "
        f"products of the model's shapes reach): {tokens / rate / len(steps):.2f} s a step, "
        f"{tokens / rate / 60:,.1f} min without evaluation and answers"
    )


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
    answers = (
        answer_questions(model, tokenizer, questions, choices, config.max_new_tokens)
        if questions
        else []
    )
    model.train()
    return answers


def show_answers(before, after, config):
    """Prints the first questions with the answer before and after, and the accuracy of all of them."""
    for old, new in list(zip(before, after))[: config.num_samples]:
        print(
            f"\n{old['prompt'][-400:]}\n  before: {old['output'][:200]!r}\n  after:  {new['output'][:200]!r}"
        )
    (was, count), (now, _) = accuracy(before), accuracy(after)
    if count:
        chance = sum(1 / len(row["choices"]) for row in after if row["gold"]) / count
        print(
            f"\nanswers right on {count} held-out questions: {was:.1%} before, {now:.1%} after "
            f"(chance {chance:.0%})"
        )


def pick_dtype(config, source, device):
    """The dtype to load in: float16 where the checkpoint's bfloat16 has no hardware (a T4), said in one line."""
    if (
        config.dtype == "auto"
        and device.type == "cuda"
        and ModelConfig.read(source).dtype == "bfloat16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        print(
            f"dtype: {torch.cuda.get_device_name(device)} has no bfloat16; float16 with a gradient scaler"
        )
        return "float16"
    return config.dtype


def export(model, config, examples):
    """Writes adapter/, reads it back, then merged/. After full fine-tuning there is only merged/, the model itself.

    An adapter trained on 4 bits is merged into what changes it least on `examples`, the 16-bit weights or the
    dequantised ones; returns what each changes, as `measure_merge` does, and under 'merged' which was taken.
    """
    folder, figures = Path(config.output_dir), {}
    if not config.lora_r:
        save_model(merge_lora(model).state_dict().items(), folder / "merged", model.folder)
        return figures
    with atomic_folder(folder / "adapter") as aside:
        tensors = write_adapter(model, aside, config.model)
        for file in COMPANIONS:
            if "config.json" != file and (model.folder / file).is_file():
                shutil.copyfile(model.folder / file, aside / file)
    file = folder / "adapter" / "adapter_model.safetensors"
    for name, tensor in tensors.items():
        if not torch.equal(read_tensor(file, name), tensor):
            raise UserError(
                f"{file}: {name} does not read back as it was written; is the disk sound?"
            )
    if not config.merge:
        return figures
    if config.load_in_4bit or model.config.quantized:
        batches = list(
            micro_batches(examples[:MERGE_ROWS], token_budget(config, model.device), model.device)
        )
        figures = measure_merge(model, batches)
        best = min(figures, key=lambda base: figures[base]["kl"])
        figures["merged"] = config.merge_base if config.merge_base in figures else best
    dequantized = figures.get("merged") == "dequantized"
    merge(
        folder / "adapter",
        folder / "merged",
        model.folder,
        partial(swap_linear4bit, config) if dequantized else None,
    )
    return figures


MERGE_ROWS = 32  # held-out rows on which the two ways to merge are compared


def attach_adapter(model, config):
    """Makes a model, which may be on `meta`, the one that trains; returns what the user should be told."""
    model.gradient_checkpointing, tied = (
        config.gradient_checkpointing,
        model.config.tie_word_embeddings,
    )
    if not config.adapter:
        notices = add_lora(model, config, config.seed)
    else:
        notices = (
            open_adapter(model, config.adapter)[2]
            if model.device.type == "meta"
            else load_adapter(model, config.adapter, trainable=True)
        )
        r, alpha = model.adapter.lora_r, model.adapter.lora_alpha
        notices = [f"going on from {config.adapter}: r {r}, alpha {alpha:g}", *notices]
    if tied != model.config.tie_word_embeddings:
        raise UserError(
            f"adapter: {config.adapter} unties the model's embeddings; merge it first: "
            "python lora.py merge"
        )
    return notices


def run(config, loss_fn, count=count_scored, before_training=None, **options):
    """A run from its settings to its folder; what SFT and DPO share. loss_fn and count: as for train and Plan; options:
    more of load_examples's; before_training(model, steps, held-out examples) is called once, with the model that training starts
    from."""
    folder = Path(config.output_dir)
    began, finished = (datetime.now(), False) if config.dry_run else open_run(config)
    if finished:
        print(f"{folder} holds this run, finished; --overwrite_output_dir trains anew")
        return push(folder, config) if config.push_to_hub else None
    find_trackers(config)  # what is missing outside is told before anything is loaded
    if config.push_to_hub and not config.dry_run:
        call_hub("push_to_hub", partial(create_repositories, config, folder))
    device = pick_device(config.device)
    clock = Clock(device)
    source = resolve(config.model, config.revision)
    tokenizer = Tokenizer(source, began)
    wants = {
        "max_length": config.max_length,
        "completion_only_loss": config.completion_only_loss,
        "assistant_only_loss": config.assistant_only_loss,
        "seed": config.seed,
        "max_samples": config.max_samples,
        "recipe": config.recipe,
        "recipe_args": config.recipe_args,
        **options,
    }
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
        (examples, _), (held, held_rows) = split_holdout(
            examples, rows, config.val_size, config.seed
        )
        report["held_out"] = len(held)
        print(f"held out: {len(held)} of these examples")

    first = examples.epoch(0)
    if before_training:
        examples, held = [*first], [*held]  # what it finds is kept with them
    steps, dtype = Plan(examples, config, count, first.row), pick_dtype(config, source, device)
    if config.dry_run:
        return dry_run(config, source, steps, loss_fn, device, dtype)
    clock.enter("loading")
    model = load_4bit(
        source, config, dtype=dtype, device=device, attn_implementation=config.attn_implementation
    )
    notices = attach_adapter(model, config)
    print(*notices, sep="\n", end="\n" * bool(notices))
    trained, total = count_parameters(model)
    print(
        f"{config.model}: {total:,} parameters, {trained:,} train; {len(steps)} steps of {steps.batch_size} examples "
        f"on {device} ({model.attention} attention, {model.dtype})"
    )

    if before_training:
        clock.enter("reference")
        before_training(model, steps, held)
    write_run_config(config, began, report)
    questions, choices = (
        held[: config.eval_answers],
        [row.get("choices") for row in held_rows[: config.eval_answers]],
    )
    clock.enter("answers")
    before = ask(model, tokenizer, questions, choices, config)
    forced = list(
        filter(
            None,
            (ask_choice(tokenizer, *at) for at in zip(held, (r.get("choices") for r in held_rows))),
        )
    )
    evaluate = lambda: (
        evaluate_loss(model, held, loss_fn, config, count) | choice_metrics(model, forced)
    )
    trackers = {}
    summary = train(model, steps, loss_fn, config, evaluate if held else None, trackers, clock)
    clock.enter("answers")
    after = ask(model, tokenizer, questions, choices, config)
    clock.enter("saving and merging")
    figures = export(model, config, held or examples)
    if figures:
        print(f"\n{merge_table(figures)}")
    show_answers(before, after, config)
    log = Log(folder, (folder / "log.jsonl").stat().st_size, trackers)
    answers = {"eval_answers_before": accuracy(before)[0], "eval_answers": accuracy(after)[0]}
    summary |= print_summary(clock)
    results = {"step": len(steps), **summary, **{k: v for k, v in answers.items() if v is not None}}
    log.plot()
    write_card(config, trained_on, results, figures, vars(LoRAConfig()) if config.adapter else ())
    log.write(results)
    log.close()
    print(
        f"saved in {folder}: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}"
    )
    if config.push_to_hub:
        push(folder, config)


def main(argv=None):
    config = read_config(SFTConfig, sys.argv[1:] if argv is None else argv, "sft")
    with locked_folder(config.output_dir), copy_output(Path(config.output_dir)):
        run(config, sft_loss)


if __name__ == "__main__":
    run_command(main)

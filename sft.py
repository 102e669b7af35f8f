"""Supervised fine-tuning, and the training loop that SFT and DPO share.

The decision that is not obvious: a step is planned before it runs. Its examples follow from
(seed, epoch, step) alone, and the denominator of its loss (scored tokens, or pairs) is known from
the data. So micro-batches are a matter of memory, never of the result, and resuming at step k needs
no random state.

    python sft.py                        # the embedded model and questions
    python sft.py --model Qwen/Qwen3-0.6B --data my.jsonl --output_dir output/mine
    python sft.py --config configs/mine.yaml --learning_rate 1e-4
    torchrun --nproc_per_node 4 sft.py --config configs/mine.yaml          # the same on four GPUs
"""

import math
import re
import shutil
import sys
import time
from collections import Counter
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import REASONING, RecipeConfig, Tokenizer, load_examples, split_holdout
from eval import EXAMPLES, answer_questions, ask_choice, choice_metrics
from lora import (
    LoRAConfig,
    adapter_parameters,
    add_lora,
    count_parameters,
    find_adapter,
    load_adapter,
    merge,
    merge_lora,
    open_adapter,
    write_adapter,
)
from model import (
    ATTENTION,
    DTYPES,
    IGNORE,
    Batch,
    ModelConfig,
    checkpoint_tensors,
    choose_attention,
    open_model,
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
    load_best,
    resume,
    sample_weights,
    save_checkpoint,
    save_on_error,
    start_run,
    update_best,
    write_run_config,
)
from support.devices import pick_device, pick_dtype
from support.distributed import (
    agree,
    divide,
    end_pass,
    every,
    first_of_node,
    gather_each,
    is_divided,
    is_first,
    is_sharded,
    join_ranks,
    on_first,
    rank,
    reshard,
    shard,
    size,
    sum_numbers,
    sum_tensors,
    use_shards,
    wait,
    whole,
    write_on_first,
    write_whole,
)
from support.errors import UserError, as_user_error, run_command
from support.files import (
    atomic_folder,
    locked_folder,
    read_header,
    read_tensor,
)
from support.hub import (
    HubConfig,
    call_hub,
    companions,
    create_repositories,
    push,
    push_checkpoint,
    resolve,
)
from support.memory import free_cached_memory, keep_freed_memory
from support.planner import (
    by_module,
    estimate_memory,
    fits,
    plan_ranks,
    print_hint,
    print_plan,
    print_ranks,
    print_speed,
)
from support.report import show_answers
from support.settings import check_choices, check_range, parse_config
from support.signals import stop_signals
from support.targets import serving_notice
from support.tracking import (
    TRACKERS,
    Clock,
    Log,
    copy_output,
    find_trackers,
    print_summary,
    start_trackers,
    warn_on_error,
)


@dataclass
class SFTConfig(LoRAConfig, QuantConfig, RecipeConfig, HubConfig):
    """The settings of a run. Names are those of transformers' TrainingArguments and
    BitsAndBytesConfig, TRL's SFTConfig and PEFT's LoraConfig."""

    # model, data and run folder
    model: str = ""  # folder or hub id of the model to train; none: the embedded tiny one
    revision: str | None = None  # branch, tag or commit of a hub id
    adapter: str = ""  # a LoRA (a folder of PEFT's or a run's) to train further, with its rank
    data: list[str] = field(default_factory=list)  # training rows: files, hub ids; none: embedded
    eval_data: list[str] = field(default_factory=list)  # evaluation rows: files or hub ids
    val_size: float = 0.0  # without eval_data: rows held out of data, a share below 1 or a number
    output_dir: str = "output/sft"  # the run folder
    dry_run: bool = False  # print parameters, steps, expected memory and time; train nothing
    nproc: int = 1  # of dry_run: the processes that torchrun would start
    max_samples: int | None = None  # use this many rows of data, drawn by seed
    max_eval_samples: int | None = None  # use this many evaluation rows
    max_length: int = 1024  # tokens per example; a longer one loses the start of its prompt
    completion_only_loss: bool | None = None  # true: score the last turn only; false: prompts too
    assistant_only_loss: bool = True  # score the assistant's turns; false: the whole conversation
    loss_type: str = "nll"  # dft: a token's loss times its probability, which has no gradient
    reasoning: str = "last"  # thoughts: as the template has them, every_turn's, or unscored
    eval_answers: int = 64  # evaluation rows answered before and after; fewer in short runs
    num_samples: int = 3  # of those, how many are shown
    max_new_tokens: int = 128  # longest generated answer

    # precision and memory
    dtype: str = "auto"  # of base weights and matmuls; auto: the checkpoint's, if fast here
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    attn_implementation: str = "auto"  # how attention is computed; varlen is flash attention
    gradient_checkpointing: bool = False  # recompute blocks in backward: slower, far less memory
    selective_checkpointing: bool = False  # recompute their MLPs alone: less slow, 0.6 of it
    activation_offloading: bool = False  # on a GPU: activations wait for backward in CPU memory
    sharding: str = "no"  # what torchrun's processes divide, see configs/README.md
    cpu_offload: bool = False  # of base: its weights wait in CPU memory
    micro_batch_tokens: int = 0  # of a forward pass; 0: 512 on a CPU (4 bit: 1024), else 16384

    # optimisation
    num_train_epochs: float = 3.0  # passes over the data
    max_steps: int = -1  # optimizer steps; overrides num_train_epochs when positive
    per_device_train_batch_size: int = 8  # examples per step, times gradient_accumulation_steps
    gradient_accumulation_steps: int = 1  # times this many; memory depends on micro_batch_tokens
    learning_rate: float = 2e-4  # peak learning rate
    lr_scheduler_type: str = "cosine"  # the learning rate after warmup
    warmup_ratio: float = 0.03  # share of the steps over which the learning rate rises from 0
    warmup_steps: int = 0  # number of those steps; overrides warmup_ratio when positive
    lr_scheduler_kwargs: dict = field(default_factory=dict)  # the schedule's, as {"min_lr": 1e-5}
    optim: str = "adamw"  # 8bit: states in 8 bit; paged: which may move to CPU memory
    loraplus_lr_ratio: float | None = None  # LoRA+: B's learning rate is this many times A's
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.999  # decay of the gradient's square
    adam_epsilon: float = 1e-8  # added to the root of the square
    weight_decay: float = 0.0  # AdamW's, on everything but norms and biases
    neftune_noise_alpha: float | None = None  # strength of noise on the embeddings (NEFTune)
    max_grad_norm: float = 1.0  # clip gradients to this norm; 0: never
    max_skipped_steps: int = 3  # stop after so many non-finite steps in a row
    seed: int = 42  # of order, dropout, adapter start and row choice

    # log, evaluation, checkpoints and export
    logging_steps: int = 10  # steps between lines of log.jsonl
    logging_first_step: bool = False  # a line for the first step too
    logging_dir: str | None = None  # TensorBoard's folder; none: runs/ of output_dir
    run_name: str | None = None  # the run's name in wandb and trackio; none: folder and time
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])  # experiment trackers
    eval_strategy: str = "epoch"  # when to evaluate
    eval_steps: int = 100  # steps between evaluations with eval_strategy steps
    save_strategy: str = "steps"  # when to write a checkpoint; best: at each new best evaluation
    save_steps: int = 500  # steps between checkpoints with save_strategy steps
    save_only_model: bool = False  # checkpoints to use, not to resume from: no optimizer states
    save_total_limit: int | None = None  # keep this many newest checkpoints, and the best one
    metric_for_best_model: str | None = None  # loss, accuracy, f1, ...; none: loss
    greater_is_better: bool | None = None  # none: yes, unless the metric is a loss
    load_best_model_at_end: bool = False  # export the best checkpoint instead of the last step
    early_stopping_patience: int | None = None  # evaluations without a new best; none: never stop
    early_stopping_threshold: float = 0.0  # improvement that counts as a new best
    resume: str = "auto"  # auto: from output_dir's last checkpoint; never; or a checkpoint's path
    overwrite_output_dir: bool = False  # delete the run in output_dir and start anew
    merge: bool = True  # write merged/, the model with the adapter merged in
    merge_base: str = "auto"  # of a 4-bit run; auto: whichever changes the model least
    push_to_hub: bool = False  # upload adapter/ and merged/ at the end, see hub_model_id

    unit = "scored token"  # what the loss is a mean over
    EMBEDDED = "train.jsonl", "validation.jsonl"
    STRATEGIES = ("no", "steps", "epoch")
    CHOICES: ClassVar[dict] = {
        "reasoning": REASONING,
        "loss_type": ("nll", "dft"),
        "dtype": ("auto", *DTYPES),
        "attn_implementation": ("auto", "flash", *ATTENTION),
        "sharding": ("no", "base", "grad_op", "full"),
        "report_to": (*TRACKERS, "all", "none"),
        "eval_strategy": STRATEGIES,
        "save_strategy": (*STRATEGIES, "best"),
        "merge_base": ("auto", "original", "dequantized"),
    }  # optim and lr_scheduler_type: see their tables below

    def __post_init__(self):
        self.model = self.model or str(EXAMPLES / "tiny-qwen3")
        if not self.data:
            train, validation = (str(EXAMPLES / "mcqa" / file) for file in self.EMBEDDED)
            self.data, self.eval_data = [train], self.eval_data or [validation]
        check_choices(self)
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
            "nproc",
        )
        check_range(self, 1, "max_new_tokens", most=2**20)
        numbers = [name for name, value in vars(self).items() if isinstance(value, (int, float))]
        numbers.remove("max_steps")
        check_range(self, 0, *numbers)
        check_range(self, 0, "warmup_ratio", most=1)
        check_range(self, 0, "adam_beta1", "adam_beta2", most=math.nextafter(1, 0))
        if self.max_steps <= 0 and not self.num_train_epochs:
            raise UserError("num_train_epochs: 0 trains nothing; give more, or max_steps")
        if self.load_best_model_at_end and self.save_strategy == "no":
            raise UserError("load_best_model_at_end: needs a save_strategy other than no")
        if self.needs_evaluations and self.eval_strategy == "no":
            raise UserError(f"{self.needs_evaluations}: needs an eval_strategy other than no")
        with as_user_error("lr_scheduler_kwargs", TypeError, KeyError, ZeroDivisionError):
            timing = Timing(1, 0, 2, self.learning_rate)
            SCHEDULES[self.lr_scheduler_type](timing, **self.lr_scheduler_kwargs)
        savings = [name for name in SAVINGS if getattr(self, name)]
        if self.gradient_checkpointing and len(savings) > 1:
            raise UserError(f"{savings[1]}: gradient_checkpointing leaves it nothing; give one")
        if self.activation_offloading and self.sharding == "base":
            raise UserError("activation_offloading: is for whole weights; leave sharding out")
        if self.adapter and not self.lora_r:
            raise UserError(
                "lora_r: 0 trains the model itself; merge --adapter first (python lora.py merge)"
            )
        self.check_sharding()
        if self.load_in_4bit and not self.lora_r:
            raise UserError(
                "lora_r: 0 trains every weight, which 4-bit weights can't be; "
                "give a rank, or drop load_in_4bit"
            )

    @property
    def needs_evaluations(self):
        """The first setting that does, or ''."""
        flags = "load_best_model_at_end", "early_stopping_patience"
        names = [name for name in flags if getattr(self, name)]
        if self.save_strategy == "best":
            names.append("save_strategy best")
        return names[0] if names else ""

    def check_sharding(self):
        """UserError: what is to be divided does not go with what trains."""
        if self.sharding == "base" and not self.lora_r:
            raise UserError("sharding: with lora_r 0 no weight is frozen; give grad_op or full")
        if self.sharding in ("grad_op", "full"):
            if self.lora_r:
                raise UserError("sharding: is base for a LoRA; grad_op and full are for lora_r 0")
            optimizer = OPTIMIZERS[self.optim]
            if isinstance(optimizer, str) or optimizer is adafactor:
                raise UserError(
                    f"optim: {self.optim} has states for whole blocks or rows, which can't be "
                    "divided; give adamw, or --sharding no"
                )
        if self.cpu_offload and self.sharding != "base":
            raise UserError("cpu_offload: is for divided weights; give --sharding base")


def sft_loss(model, batch):
    """(minus the summed log-probability of the scored tokens, each times its weight; no metrics).
    `train` divides it by the planned count."""
    return -(model.logps(batch) * batch.weights).sum(), {}


def dft_loss(model, batch):
    """`sft_loss` with every token's loss times its probability, which passes no gradient: dynamic
    fine-tuning, Wu et al. 2025, arXiv:2508.05629, eq. 9."""
    logps = model.logps(batch)
    return -(logps * logps.detach().exp() * batch.weights).sum(), {}


def add_embedding_noise(model, alpha):
    """NEFTune: while the model trains, uniform noise up to ±α/√(L C) on the embeddings (T, C), L
    the tokens of a row. Jain et al. 2023, arXiv:2310.05914, algorithm 1; transformers' hook."""
    batches = []

    def remember(model, inputs):
        batches[:] = inputs[:1]

    def add(embedding, inputs, x):
        if not model.training:
            return x
        (batch,) = batches
        lengths = torch.tensor(batch.lengths)
        lengths = lengths.repeat_interleave(torch.tensor(batch.sizes))  # (T,)
        bound = alpha / (lengths * x.shape[1]).sqrt()
        return x + torch.empty_like(x).uniform_(-1, 1) * bound[:, None].to(x)

    model.register_forward_pre_hook(remember)
    model.model.embed_tokens.register_forward_hook(add)


# --- the loop -------------------------------------------------------------------------------------


def train(model, steps, loss_fn, config, evaluate=None, clock=None):
    """Runs the plan `steps` from the last checkpoint to its end. Returns (results, the open Log).

    loss_fn(model, batch) -> (summed loss, {metric: summed value}); the step's planned count divides
    both. evaluate() -> {name: value}. A signal to stop saves at the step's end, then exits; an
    error saves the last whole step, with what of it is yet to be logged and evaluated.
    """
    began, clock = time.perf_counter(), clock or Clock(model.device)
    state, parameters, optimizer, scaler, log, save = set_up(model, steps, config, clock)
    if evaluate and config.eval_strategy != "no" and state.step == 0:
        with keep_freed_memory(not is_sharded(model)):
            metrics = evaluate()
        update_best({}, metrics, 0, config)  # refuses an unknown metric_for_best_model now
        log.write({"step": 0, "epoch": 0.0, **metrics})
    model.train()
    gradient = partial(sum_gradients, model, parameters, config=config, scale=scaler.scale)
    bar = tqdm(total=len(steps), initial=state.step, unit="step", leave=False, disable=None)
    with stop_signals() as signals, keep_freed_memory(not is_sharded(model)), bar:
        while True:
            with save_on_error(save):  # up to the next update the state is a whole step's
                due = state.unreported and report_step(state, steps, log, evaluate, config, clock)
                if agree(bool(due)):
                    save()
                stop = agree(max(signals, default=0))  # a signal's number
                if state.step >= len(steps) or stop or state.best.get("stop"):
                    break
                clock.enter("forward and backward")
                step, examples = state.step + 1, steps[state.step]
                count = sum(map(steps.count, examples))
                step_loss = steps.prepare(loss_fn, examples)
                loss, sums = gradient(examples, count, step_loss, seed=[config.seed, step])

            clock.enter("optimizer")
            scaler.unscale_(optimizer)
            norm = float(whole(clip_grad_norm_(parameters, config.max_grad_norm or math.inf)))
            lr = set_learning_rate(optimizer, state.step, len(steps), config)
            if math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1):
                scaler.step(optimizer)  # skips an overflow of float16 by itself
                sums["scored_tokens"] = sum(map(count_scored, examples))
                state.window.update({**sums, "loss": loss, "count": count})
                state.skipped = 0
            else:
                reason = f"loss {loss}, gradient norm {norm}"
                skip_step(state, steps, log, reason, save, config)
            scaler.update()
            optimizer.zero_grad()
            state.step, state.log_bytes = step, log.size()
            state.unreported = {"grad_norm": norm, "learning_rate": lr}
            clock.count_step(sum(map(count_tokens, examples)), len(examples))
            bar.update()
        save()
        wait()
    return finish_training(model, state, stop, config, clock, began), log


def set_up(model, steps, config, clock):
    """What `train` works with, as the last checkpoint left it: state, trained parameters,
    optimizer, gradient scaler, log and save()."""
    clock.enter("evaluation")
    reshard(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    divided = any(map(is_divided, parameters.values()))
    optimizer = make_optimizer(parameters, config)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    trained = trained_tensors(model, config)
    origin = describe_origin(model, optimizer, config) | steps.origin
    state = resume(config, trained, parameters, optimizer, scaler, steps, origin)
    asked = config.micro_batch_tokens
    if state.lowered:  # memory ran out before
        config.micro_batch_tokens = min(state.lowered, token_budget(config, model.device))
    if agree(state.step) != state.step:
        raise UserError("output_dir: the nodes see different checkpoints; give a shared folder")
    trackers = {}
    if is_first():
        trackers = start_trackers(config, state.step and state.step + (not state.unreported))
    log = Log(Path(config.output_dir), state.log_bytes, trackers, config.unit)

    def save(alone=False):
        if divided and alone:
            raise UserError("its parts are on other ranks too, which may have ended")
        if not (is_first() or divided):
            return
        clock.enter("checkpoints")
        if config.micro_batch_tokens != asked:
            state.lowered = config.micro_batch_tokens
        write = partial(write_trained, model, config)
        path = save_checkpoint(state, parameters, optimizer, scaler, log, config, write)
        if path and config.push_to_hub and config.hub_strategy == "every_save":
            with warn_on_error(f"{path.name} is not pushed"):
                call_hub("push_to_hub", partial(push_checkpoint, config, path))
        clock.enter("log")

    return state, [*parameters.values()], optimizer, scaler, log, save


def describe_origin(model, optimizer, config):
    """What a resumed run must have in common with its checkpoint, beside the data."""
    adapter = model.adapter if config.lora_r else config
    origin = {name: getattr(adapter, name) for name in vars(LoRAConfig())}
    del origin["lora_dropout"]
    origin["optimizer"] = type(optimizer).__name__.removeprefix("Paged")
    origin["weights of --model"] = sample_weights(checkpoint_tensors(model.folder))
    if config.adapter:
        file = find_adapter(config.adapter) / "adapter_model.safetensors"
        origin["weights of --adapter"] = sample_weights(read_header(file))
    return origin


def report_step(state, steps, log, evaluate, config, clock):
    """Logs and evaluates the last step where that is due; whether a checkpoint is due. The state
    changes at the end alone: after an error a resume does all of it again."""
    step, window, best = state.step, state.window, state.best
    first = config.logging_first_step and step == 1
    if window and (first or steps.due(step, "steps", config.logging_steps)):
        log.write(
            {**steps.place(step), **means(window), **state.unreported, **clock.throughput()}
        )
        window = Counter()
    if evaluate and steps.due(step, config.eval_strategy, config.eval_steps):
        clock.enter("evaluation")
        metrics = evaluate()
        best = update_best(best, metrics, step, config)
        log.write({**steps.place(step), **metrics})
    state.window, state.best, state.unreported = window, best, {}
    keeps_best = config.load_best_model_at_end or config.save_strategy == "best"
    new_best = keeps_best and best.get("step") == step
    return new_best or steps.due(step, config.save_strategy, config.save_steps)


def skip_step(state, steps, log, reason, save, config):
    """Logs the rows of a step without a finite loss and gradient; UserError after too many in a
    row. The step before the first of them is saved."""
    if not state.skipped:
        save()
    state.skipped += 1
    step = state.step + 1
    log.write({**steps.place(step), "skipped": reason, "rows": steps.rows(state.step)})
    if state.skipped >= config.max_skipped_steps:
        raise UserError(
            f"{state.skipped} steps in a row, up to {step}, had no finite loss and "
            f"gradient; their rows are in {log.path}. The last good step is kept; "
            "try a lower learning_rate"
        )


def means(window):
    """The means of a window of summed losses and metrics, over its loss denominators."""
    sums = dict(window)
    count, scored = sums.pop("count"), round(sums.pop("scored_tokens"))
    return {name: total / count for name, total in sums.items()} | {"scored_tokens": scored}


def finish_training(model, state, stop, config, clock, began):
    """Exits after the signal `stop`; else loads the best checkpoint if asked to and returns the
    results."""
    if stop:
        print(
            f"stopped after step {state.step}; the same command resumes from step {state.saved}"
        )
        sys.exit(128 + stop)
    results = {
        "step": state.step,
        "train_runtime": round(time.perf_counter() - began, 2),
        "peak_memory_gb": round(clock.steps()[1], 3),
    }
    if config.load_best_model_at_end:
        load_best(config, state.best, trained_tensors(model, config))
        results["best_step"] = state.best["step"]
    return results


def trained_tensors(model, config):
    """{name in a checkpoint's file: trained parameter}."""
    reshard(model)
    return adapter_parameters(model) if config.lora_r else dict(model.named_parameters())


def write_trained(model, config, folder):
    """Writes the adapter's two files, or after full fine-tuning model.safetensors."""
    if config.lora_r:
        write_adapter(model, folder, config.model)
    else:
        write_whole(trained_tensors(model, config), folder, "model.safetensors")


def accumulate(model, examples, count, loss_fn, budget, scale=lambda loss: loss):
    """Adds the gradient of loss / count over the examples to the parameters, in micro-batches of at
    most `budget` tokens; returns (summed loss, summed metrics)."""
    losses, sums = [], Counter()
    groups = [*split_by_tokens(examples, budget)]
    if is_sharded(model):  # each pass gathers weights from all ranks
        groups += [lightest(examples)] * (model.exchange.agree_passes(len(groups)) - len(groups))
    for group in groups:
        loss, metrics = loss_fn(model, Batch.pack(group, model.device))
        if torch.is_grad_enabled():
            scale(loss / count).backward()
        losses.append({"loss": loss.detach(), **metrics})
    for values in losses:  # read at the end: the device does not wait in between
        sums.update({name: float(value) for name, value in values.items()})
    return sums.pop("loss"), dict(sums)


def compute_gradient(model, examples, count, loss_fn, config, seed, scale):
    """`accumulate`, with dropout drawn from `seed`. Out of memory, it retries with half the tokens
    in a micro-batch, and the rest of the run keeps to that: the planned count divides the loss, so
    the gradient is the same. UserError where the examples are alone in their micro-batches."""
    asked = config.micro_batch_tokens
    while True:
        budget, message = token_budget(config, model.device), ""
        try:
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            result = accumulate(model, examples, count, loss_fn, budget, scale)
        except (RuntimeError, MemoryError) as error:  # not every device has a class for it
            message = f"{type(error).__name__}: {error}".partition("\n")[0]
            if not re.search("memory|create a primitive", message, re.IGNORECASE):
                raise
        if message:  # out here the graph is freed
            sizes = [*map(count_tokens, examples)]
            groups = [*split_by_tokens(examples, budget)]
            if budget == sys.maxsize or len(groups) == len(examples):
                config.micro_batch_tokens = asked
                raise UserError(
                    f"out of memory at {max(sizes):,} tokens that can't be split ({message}); run "
                    "again with --gradient_checkpointing, else --load_in_4bit or a smaller "
                    "--max_length"
                )
            budget = min(budget, sum(sizes))
            config.micro_batch_tokens = budget // 2
            tqdm.write(
                f"out of memory at {budget:,} tokens in a micro-batch; retrying with "
                f"{budget // 2:,}, which gives the same gradient"
            )
            if is_sharded(model):
                end_pass(model, accumulate, lightest(examples), count, loss_fn, budget)
        if not (agree(bool(message)) if is_sharded(model) else message):
            return result
        reshard(model)
        model.zero_grad()  # backward may have got halfway
        free_cached_memory()


def sum_gradients(model, parameters, examples, count, loss_fn, config, seed, scale):
    """`compute_gradient` of each rank's share of a step's examples; then the gradients, loss and
    metrics are added up over the ranks. A rank without a share computes an example of weight 0."""
    own = shares_of(examples)[rank()] or weightless(examples[0])
    seed = [*seed, rank()]
    loss, sums = compute_gradient(model, own, count, loss_fn, config, seed, scale)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    reshard(model)
    sum_tensors([p.grad for p in parameters])
    sums = sum_numbers({"loss": loss, **sums})
    return sums.pop("loss"), sums


def weightless(example):
    """A micro-batch without influence, for a rank that has no other."""
    return [[segment._replace(weight=0.0) for segment in example]]


def lightest(examples):
    """A micro-batch without influence, of the shortest example."""
    return weightless(min(examples, key=count_tokens))


def evaluate_loss(model, examples, loss_fn, config, count):
    """{"eval_loss": mean per scored token (or pair), and loss_fn's metrics likewise} on evaluation
    examples, without dropout. The micro-batches are those of one process, divided among ranks."""
    model.eval()
    budget, total = -agree(-token_budget(config, model.device)), sum(map(count, examples))
    score = partial(accumulate, model, count=1, loss_fn=loss_fn, budget=sys.maxsize)
    sums = Counter()
    with torch.no_grad():
        own = [*every(split_by_tokens(examples, budget), model)]
        bar = tqdm(own, "evaluation", unit="batch", leave=False, disable=None)
        for loss, metrics in gather_each(map(score, bar), model):
            sums.update({"loss": loss, **metrics})
    model.train()
    return {f"eval_{name}": value / total for name, value in sums.items()}


# --- the plan -------------------------------------------------------------------------------------


def count_tokens(example):
    """Tokens of an example, over its segments."""
    return sum(len(segment.ids) for segment in example)


def count_scored(example):
    """What SFT's loss of an example is divided by: its scored tokens, each times its weight."""
    return sum(
        segment.weight * int((np.asarray(segment.labels) != IGNORE).sum()) for segment in example
    )


def shares_of(examples, ranks=None):
    """Each rank's share of a step's examples, with about as many tokens as the others'."""
    shares = divide([*map(count_tokens, examples)], ranks)
    return [[examples[n] for n in share] for share in shares]


class Plan:
    """Which examples each optimizer step has. `count(example)` is what an example contributes to
    the loss denominator; `source`, where `examples` is a list: the data.Examples they come from.

    Every epoch is a permutation drawn from (seed, epoch), cut into steps of
    per_device_train_batch_size x gradient_accumulation_steps examples; the last step of an epoch
    may be smaller, as in transformers' Trainer.
    """

    def __init__(self, examples, config, count=count_scored, source=None):
        self.examples, self.source = examples, source or examples
        self.seed, self.count = config.seed, count
        self.fingerprint = getattr(self.source, "fingerprint", str(len(examples)))
        self.origin = {}  # what else the examples come from: {name: hash}
        asked = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.batch_size = min(asked, len(examples))
        self.steps_per_epoch = math.ceil(len(examples) / self.batch_size)
        self.steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        if config.max_steps > 0:
            self.steps = config.max_steps

    def __len__(self):
        return self.steps

    def __str__(self):
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        examples = "1 example" if self.batch_size == 1 else f"{self.batch_size} examples"
        return f"{steps} of {examples}"

    @lru_cache(1)
    def epoch(self, number):
        """(the examples of an epoch, their order)."""
        examples = self.examples
        if hasattr(examples, "epoch"):
            examples = examples.epoch(number)
        return examples, np.random.default_rng([self.seed, number]).permutation(len(examples))

    def select(self, step):
        """(the examples of the epoch of a step, counted from 0; those of them in the step)."""
        epoch, n = divmod(step, self.steps_per_epoch)
        examples, order = self.epoch(epoch)
        return examples, order[n * self.batch_size : (n + 1) * self.batch_size]

    def prepare(self, loss_fn, examples):
        """The loss_fn of a step, or evaluation set, of these examples, for a loss that depends on
        all of them, whatever micro-batch it is of; before_training may put another in its place."""
        return loss_fn

    def place(self, step):
        """Where a run is after `step` steps."""
        return {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}

    def __getitem__(self, step):
        """The examples of a step."""
        examples, numbers = self.select(step)
        return [examples[i] for i in numbers]

    def rows(self, step):
        """The places of a step's rows, as 'file:line'."""
        examples, numbers = self.select(step)
        source = examples if hasattr(examples, "row") else self.source
        return [source.row(i)[0] for i in numbers]

    def due(self, step, strategy, every):
        """Whether what happens by 'steps', 'epoch' or 'no' happens after `step` steps; after the
        last one all but 'no' does."""
        interval = {"steps": every, "epoch": self.steps_per_epoch}.get(strategy)
        return interval is not None and (step % interval == 0 or step == self.steps)


def split_by_tokens(examples, budget):
    """The examples in groups of about equal size, of at most `budget` tokens each where an example
    alone is not longer."""
    sizes = [count_tokens(example) for example in examples]
    share = sum(sizes) / max(1, math.ceil(sum(sizes) / budget))
    group, tokens = [], 0
    for example, length in zip(examples, sizes):
        if group and (tokens + length > budget or tokens >= share):
            yield group
            group, tokens = [], 0
        group.append(example)
        tokens += length
    if group:
        yield group


def token_budget(config, device):
    """Tokens of a micro-batch. Each one dequantises 4-bit weights anew, so there it is larger."""
    if config.micro_batch_tokens or device.type != "cpu":
        return config.micro_batch_tokens or 16384
    return 1024 if config.load_in_4bit else 512


# --- schedule and optimizer -----------------------------------------------------------------------


class Timing(NamedTuple):
    """What a schedule may go by, beside the share of the steps after warmup that are done."""

    step: int  # from 0
    warmup: int  # steps of it
    steps: int
    peak: float  # learning rate

    @property
    def progress(self):
        return (self.step - self.warmup) / max(1, self.steps - self.warmup)


def wave(progress, num_cycles=0.5):
    return 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress))


def cosine(timing, num_cycles=0.5):
    return wave(timing.progress, num_cycles)


def cosine_with_restarts(timing, num_cycles=1):
    return wave(timing.progress * num_cycles % 1)


def cosine_with_min_lr(timing, min_lr=0.0, min_lr_rate=0.0, num_cycles=0.5):
    least = min_lr / timing.peak or min_lr_rate
    return least + (1 - least) * wave(timing.progress, num_cycles)


def linear(timing):
    return 1 - timing.progress


def polynomial(timing, lr_end=1e-7, power=1.0):
    least = lr_end / timing.peak
    return least + (1 - least) * (1 - timing.progress) ** power


def inverse_sqrt(timing, timescale=None):
    timescale = timescale or timing.warmup or 10_000
    return (timescale / (timing.step - timing.warmup + timescale)) ** 0.5


DECAYS = {
    "linear": lambda progress: 1 - progress,
    "cosine": wave,
    "1-sqrt": lambda progress: 1 - progress**0.5,
}


def warmup_stable_decay(
    timing, num_decay_steps, min_lr_ratio=0.0, decay_type="cosine", num_stable_steps=None
):
    start = timing.steps - num_decay_steps
    if num_stable_steps is not None:
        start = timing.warmup + num_stable_steps
    if timing.step < start:
        return 1.0
    progress = min(1.0, (timing.step - start) / num_decay_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * DECAYS[decay_type](progress)


def constant(timing):
    return 1.0


# a schedule gives the share of the peak learning rate after warmup; names, lr_scheduler_kwargs and
# values as in transformers
SCHEDULES = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,  # without warmup
    "constant_with_warmup": constant,
    "cosine_with_restarts": cosine_with_restarts,
    "cosine_with_min_lr": cosine_with_min_lr,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "warmup_stable_decay": warmup_stable_decay,
}
SFTConfig.CHOICES["lr_scheduler_type"] = SCHEDULES


def learning_rate(step, steps, config):
    """The learning rate of step `step` (from 0) of `steps`: linear warmup, then the schedule."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if config.lr_scheduler_type == "constant":
        warmup = 0
    if step < warmup:
        least = config.lr_scheduler_kwargs.get("min_lr_ratio", 0.0)
        return config.learning_rate * (least + (1 - least) * step / warmup)
    schedule = SCHEDULES[config.lr_scheduler_type]
    timing = Timing(step, warmup, steps, config.learning_rate)
    return config.learning_rate * schedule(timing, **config.lr_scheduler_kwargs)


def set_learning_rate(optimizer, step, steps, config):
    lr = learning_rate(step, steps, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    return lr


def adam_options(config):
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def adamw(groups, config):
    return torch.optim.AdamW(groups, fused=True, **adam_options(config))


def adafactor(groups, config):
    """Shazeer & Stern 2018, arXiv:1804.04235, at the schedule's learning rate, as transformers'
    with scale_parameter and relative_step off; a parameter whose values' root mean square is above
    1 moves that much faster. Without a mean, and with a row and a column for a matrix's squares."""
    return torch.optim.Adafactor(groups, eps=(1e-15, 1.0))


def plain(optimizer, groups, config):
    """One of torch.optim, with its own defaults."""
    return optimizer(groups)


def from_bitsandbytes(name, groups, config):
    """The class `name` of bitsandbytes.optim; a paged one's states may move to CPU memory."""
    if not groups[0]["params"][0].is_cuda and name.startswith("Paged"):
        name = name.removeprefix("Paged")
        print(f"{config.optim}: without a GPU to page from it is {name}", file=sys.stderr)
    options = adam_options(config)
    if "Lion" in name:
        del options["eps"]
    return getattr(bitsandbytes().optim, name)(groups, **options)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw_torch": adamw,
    "adamw_torch_fused": adamw,
    "adamw_8bit": "AdamW8bit",  # of bitsandbytes.optim
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion_32bit": "Lion32bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_32bit": "PagedLion32bit",
    "paged_lion_8bit": "PagedLion8bit",
    "adafactor": adafactor,
    "adagrad": partial(plain, torch.optim.Adagrad),
    "rmsprop": partial(plain, torch.optim.RMSprop),
    "sgd": partial(plain, torch.optim.SGD),
}
SFTConfig.CHOICES["optim"] = OPTIMIZERS


def make_optimizer(parameters, config):
    """An optimizer over {name: parameter}. Weight decay leaves norms and biases alone, as in
    transformers' Trainer. A group's `ratio` multiplies the learning rate: loraplus_lr_ratio for
    LoRA's B and for vectors, else 1 (LoRA+: Hayou et al. 2024, arXiv:2402.12354; groups as in
    peft's create_loraplus_optimizer)."""
    groups = {}
    for name, p in parameters.items():
        decay, ratio = config.weight_decay, 1.0
        if name.endswith("bias") or "norm" in name:
            decay = 0.0
        if name.endswith("lora_B") or p.dim() == 1:
            ratio = config.loraplus_lr_ratio or 1.0
        group = {"params": [], "weight_decay": decay, "ratio": ratio}
        groups.setdefault((decay, ratio), group)["params"].append(p)
    for group in groups.values():
        group["lr"] = config.learning_rate
    make = OPTIMIZERS[config.optim]
    if isinstance(make, str):
        make = partial(from_bitsandbytes, make)
    return make([*groups.values()], config)


# --- a run ----------------------------------------------------------------------------------------


def run(config, loss_fn, count=count_scored, before_training=None, **options):
    """A run from its settings to its folder; what SFT and DPO share. loss_fn, count: as for `train`
    and `Plan`; options: more of load_examples's; before_training(model, steps, eval_examples) is
    called once, with the model that training starts from."""
    # 1. the folder, and what it needs from outside
    folder = Path(config.output_dir)
    began, finished = on_first(start_run, config)
    if finished:
        print(f"{folder} holds this run, finished; --overwrite_output_dir trains anew")
        return on_first(push, folder, config) if config.push_to_hub else None
    find_trackers(config)
    if config.push_to_hub and not config.dry_run:
        on_first(call_hub, "push_to_hub", partial(create_repositories, config, folder))

    # 2. data and plan
    device, source = pick_device(config.device), resolve(config.model, config.revision)
    adapter = config.adapter and find_adapter(config.adapter)
    clock, tokenizer = Clock(device), Tokenizer(source, datetime.fromisoformat(began), adapter)
    dtype = pick_dtype(config.dtype, ModelConfig.read(source).dtype, device)
    examples, eval_examples, choices, ledger, report = load_data(config, tokenizer, options)
    source_examples = examples.epoch(0)
    if before_training:  # it may change the examples in place
        examples, eval_examples = [*source_examples], [*eval_examples]
    steps = Plan(examples, config, count, source_examples)
    if config.dry_run:
        return dry_run(config, source, steps, loss_fn, device, dtype)

    # 3. model and adapter
    clock.enter("loading")
    model = load_to_train(config, source, steps, device, dtype)
    if before_training:
        clock.enter("reference")
        before_training(model, steps, eval_examples)
    on_first(write_run_config, config, began, report)

    # 4. training, between two rounds of answers, where these are not to be avoided (KTO)
    rows = [row for row in zip(eval_examples, choices) if row[0][:2][-1].sequence == 0]
    forced = [*filter(None, (ask_choice(tokenizer, *row) for row in rows))]
    asked = rows[: count_questions(steps, rows, config)]

    def ask():
        clock.enter("answers")
        model.eval()
        return asked and answer_questions(model, tokenizer, *zip(*asked), config.max_new_tokens)

    def evaluate():
        step_loss = steps.prepare(loss_fn, eval_examples)
        losses = evaluate_loss(model, eval_examples, step_loss, config, count)
        return losses | choice_metrics(model, forced)

    before = ask()
    results, log = train(model, steps, loss_fn, config, eval_examples and evaluate, clock)
    answers = show_answers(before, ask(), config.num_samples)

    # 5. export and report
    clock.enter("saving and merging")
    merged = export(model, config, eval_examples or examples, bool(eval_examples))
    results = {**results, **answers, **print_summary(clock)}
    if is_first():
        write_results(config, log, ledger, results, merged)


def count_questions(steps, rows, config):
    """How many evaluation rows [(example, choices)] are answered: as many as generate, before and
    after, no more tokens than the run trains on. Counted, not timed, so that a resumed run asks the
    same; a generated token takes about as long as a trained one, one that is scored a third."""
    asked = min(config.eval_answers, len(rows))
    if not rows:
        return 0
    trained = sum(map(count_tokens, steps[0])) * len(steps)
    affordable = max(config.num_samples, trained // (2 * config.max_new_tokens))
    if affordable < asked:
        print(
            f"asking {affordable} of {asked} evaluation questions: to ask more would take longer "
            f"than the run, of about {trained:,} tokens"
        )
    scored = 2 * sum(count_tokens(example) for example, _ in rows)
    if scored > 3 * trained and config.eval_strategy != "no":
        print(
            f"evaluating {len(rows):,} rows, before and after, takes longer than the run, of about "
            f"{trained:,} tokens: --max_eval_samples takes fewer, --eval_strategy no leaves it out"
        )
    return min(asked, affordable)


def write_results(config, log, ledger, results, merged):
    """Writes the figure, the model card and the log's last line, which makes the run finished, and
    pushes it."""
    folder = Path(config.output_dir)
    log.plot()
    write_card(config, ledger, results, merged, vars(LoRAConfig()) if config.adapter else ())
    log.write(results)
    log.close()
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    print(f"saved in {folder}: {', '.join(files)}")
    if config.push_to_hub:
        push(folder, config)


@first_of_node()
def load_data(config, tokenizer, options):
    """(training examples, evaluation examples, the choices of each of these or None, the training
    rows' ledger, data_report.json)."""
    names = (
        "max_length",
        "completion_only_loss",
        "assistant_only_loss",
        "reasoning",
        "seed",
        "recipe",
        "recipe_args",
    )
    options |= {name: getattr(config, name) for name in names}
    load = partial(load_examples, tokenizer=tokenizer, **options)
    examples, ledger = load(config.data, max_samples=config.max_samples)
    report = {"train": ledger.as_dict()}
    print(f"training data, {ledger}")
    eval_examples = []
    if config.eval_data:
        limit = config.max_eval_samples
        eval_examples, eval_ledger = load(config.eval_data, max_samples=limit)
        report["eval"] = eval_ledger.as_dict()
        print(f"evaluation data, {eval_ledger}")
    elif config.val_size:
        examples, eval_examples = split_holdout(examples, config.val_size, config.seed)
        report["held_out"] = len(eval_examples)
        print(f"evaluation data: {len(eval_examples):,} examples held out of these")
    if not eval_examples and config.needs_evaluations:
        raise UserError(
            f"{config.needs_evaluations}: no held-out rows; give eval_data or val_size"
        )
    choices = [eval_examples.row(n)[1].get("choices") for n in range(len(eval_examples))]
    return examples, eval_examples, choices, ledger, report


def load_to_train(config, source, steps, device, dtype):
    """The model of a run, with what trains in place."""
    shards = config.sharding != "no" and size() > 1
    if config.sharding != "no" and size() == 1:
        print("sharding: one process has the whole model; torchrun starts more")
    model = load_4bit(
        source,
        config,
        dtype=dtype,
        device=device,
        attn_implementation=config.attn_implementation,
        divide=partial(divide_model, config, device) if shards else None,
    )
    for notice in attach_adapter(model, config):
        print(notice)
    if config.activation_offloading and device.type != "cuda":
        print("activation_offloading: without a GPU activations stay where they are")
    if config.neftune_noise_alpha:
        add_embedding_noise(model, config.neftune_noise_alpha)
    trained, total = count_parameters(model)
    if shards:
        if config.lora_r and any(p.requires_grad for p in model.parameters() if is_divided(p)):
            raise UserError(
                "modules_to_save: --sharding base divides layers of the blocks, frozen"
            )
        use_shards(model, device)
    print(
        f"{config.model}: {total:,} parameters, {trained:,} train; {steps} on {device} "
        f"({model.attention} attention, {model.dtype})"
    )
    return model


# how activations take less memory: settings, and attributes of a model
SAVINGS = "gradient_checkpointing", "selective_checkpointing", "activation_offloading"


def divide_model(config, device, model):
    """Divides a model on `meta` among the ranks. A LoRA is added when the weights are there, whose
    values it may need."""
    prepare_layers(model)
    if not config.lora_r:
        attach_adapter(model, config)
    shard(model, model.model.layers, config.sharding, device, config.cpu_offload)


def prepare_layers(model):
    """Gives a model on `meta` the dtypes and 4-bit buffers that it has when it is loaded."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and not hasattr(layer, "state"):
            layer.expect_own(model.dtype)
    for p in model.parameters():
        p.data = p.data.to(model.dtype)


def attach_adapter(model, config):
    """Makes a model, which may be on `meta`, the one that trains; returns notices for the user."""
    for name in SAVINGS:
        setattr(model, name, getattr(config, name))
    if not config.adapter:
        return add_lora(model, config, config.seed)
    tied = model.config.tie_word_embeddings
    if model.device.type == "meta":
        _, notices = open_adapter(model, config.adapter)
    else:
        notices = load_adapter(model, config.adapter, trainable=True)
    if tied != model.config.tie_word_embeddings:
        raise UserError(
            f"adapter: {config.adapter} unties the model's embeddings; merge it first: "
            "python lora.py merge"
        )
    r, alpha = model.adapter.lora_r, model.adapter.lora_alpha
    return [f"training {config.adapter} further: r {r}, alpha {alpha:g}", *notices]


def export(model, config, examples, held_out):
    """Writes adapter/ and merged/; after full fine-tuning merged/ alone.

    An adapter trained on 4 bits is merged into what changes it least on `examples`, the 16-bit
    weights or the dequantised ones; returns what each changes as a table. held_out: whether the
    examples are the evaluation set's.
    """
    folder, table, swap = Path(config.output_dir), "", None
    if not config.lora_r:
        tensors = merge_lora(model).state_dict()
        write_on_first(save_model, tensors, folder / "merged", model.folder)
        return table
    on_first(export_adapter, model, config, folder / "adapter")
    if not config.merge:
        return table
    if config.load_in_4bit or model.config.quantized:
        groups = split_by_tokens(examples[:MERGE_ROWS], token_budget(config, model.device))
        figures = measure_merge(model, [Batch.pack(group, model.device) for group in groups])
        base = min(figures, key=lambda base: figures[base]["kl"])
        if config.merge_base in figures:
            base = config.merge_base
        rows_of = "evaluation" if held_out else "training"
        table = merge_table(figures, base, rows_of)
        print(f"\n{table}")
        if base == "dequantized":
            swap = partial(swap_linear4bit, config)
    if is_first():
        merge(folder / "adapter", folder / "merged", model.folder, swap)
    return table


MERGE_ROWS = 32  # evaluation rows on which the two ways to merge are compared


def export_adapter(model, config, folder):
    """Writes PEFT's files and the tokenizer, and reads the tensors back."""
    with atomic_folder(folder) as partial_folder:
        tensors = write_adapter(model, partial_folder, config.model)
        files = companions(model.folder, config.adapter and find_adapter(config.adapter))
        for name in files.keys() - {"config.json"}:
            shutil.copyfile(files[name], partial_folder / name)
    if notice := serving_notice(model.adapter):
        print(f"{folder}: {notice}")
    file = folder / "adapter_model.safetensors"
    for name, tensor in tensors.items():
        if not torch.equal(read_tensor(file, name), tensor):
            raise UserError(f"{file}: {name} does not read back as written; check the disk")


# --- the dry run ----------------------------------------------------------------------------------


def plan_memory(config, source, steps, loss_fn, device, dtype):
    """(parameters by module, {part: GB} at the steps' peak, FLOPs of the largest micro-batch, its
    examples, `plan_ranks`) of a run on config.nproc ranks, see `estimate_memory`; no weight is
    read."""
    model, _ = open_model(source, swap_layers=partial(swap_linear4bit, config))
    model.dtype = DTYPES[dtype]
    model.attention, _ = choose_attention(
        config.attn_implementation, model.config, model.dtype, device
    )
    prepare_layers(model)
    attach_adapter(model, config)

    def length(group):
        return sum(map(count_tokens, group))

    count, budget = min(len(steps), steps.steps_per_epoch), token_budget(config, device)
    sample = range(0, count, count // 256 + 1)
    shares = [share for step in sample for share in shares_of(steps[step], config.nproc)]
    splits = [[*split_by_tokens(share, budget)] for share in shares if share]
    split = max(splits, key=lambda split: max(map(length, split)))
    largest = max(split, key=length)
    micro = len(steps) * sum(map(len, splits)) / len(splits)
    pack = partial(Batch.pack, largest, device)
    first = len(split) == 1
    memory, meter = estimate_memory(model, pack, device, loss_fn, config, first, micro)
    plan = memory, meter.busy / 1e9, config.nproc, micro / len(steps)
    ranks = plan_ranks(model, model.model.layers, *plan)
    return by_module(model), memory, meter.flops, largest, ranks


def dry_run(config, source, steps, loss_fn, device, dtype):
    """Prints the plan, the estimated memory, and the time that one micro-batch predicts; where it
    does not fit, what needs less."""
    modules, memory, flops, largest, ranks = plan_memory(
        config, source, steps, loss_fn, device, dtype
    )
    sample = range(0, len(steps), len(steps) // 1024 + 1)  # all steps of most runs
    counts = [(count_tokens(e), count_scored(e)) for step in sample for e in steps[step]]
    lengths, scored = zip(*counts)
    tokens = sum(lengths) * len(steps) // len(sample)
    print_plan(modules, memory, steps, tokens, sum(scored) * len(steps) / len(sample))
    if config.lora_r:
        print_hint(config, steps.batch_size)
    if config.nproc > 1:
        return print_ranks(ranks, config.nproc)

    def estimate(changes):
        changed = copy(config)
        vars(changed).update(changes)
        return sum(plan_memory(changed, source, steps, loss_fn, device, dtype)[1].values())

    if not fits(memory, device, config, max(lengths), estimate):
        return
    model = load_to_train(config, source, steps, device, dtype)
    model.train()
    step = partial(accumulate, model, largest, 1, loss_fn, sys.maxsize)
    print_speed(model, step, sum(map(count_tokens, largest)), flops, tokens, len(steps))


# --- the command ----------------------------------------------------------------------------------


def read_config(cls, argv, embedded):
    """The config of a command line, sys.argv's where argv is None. Without --model and --config it
    is examples/{embedded}.yaml."""
    argv = sys.argv[1:] if argv is None else argv
    flags = {word.split("=")[0] for word in argv}
    if not flags & {"--model", "--config", "-h", "--help"}:
        argv = ["--config", str(EXAMPLES / f"{embedded}.yaml"), *argv]
    return parse_config(cls, argv, sys.modules[cls.__module__].__doc__)


def main(argv=None):
    config = read_config(SFTConfig, argv, "sft")
    folder = Path(config.output_dir)
    with join_ranks(config.device, locked_folder(folder), copy_output(folder)):
        run(config, dft_loss if config.loss_type == "dft" else sft_loss)


if __name__ == "__main__":
    run_command(main)

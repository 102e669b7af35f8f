"""The run folder and its checkpoints: written whole or not at all, verified, resumed from."""

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from safetensors import safe_open

from support.distributed import is_divided, is_first, read_into, write_whole
from support.errors import UserError, as_user_error, nearest
from support.files import (
    atomic_folder,
    clear_folder,
    read_header,
    read_json,
    read_tensor,
    write_text,
)
from support.hub import HubConfig
from support.tracking import read_log, warn_on_error


@dataclass
class RunState:
    """What a checkpoint keeps of a run beside its tensors."""

    data: str  # the plan's fingerprint
    origin: dict  # what else must be the same to go on: {name: value}
    step: int = 0  # steps done
    unreported: dict = field(default_factory=dict)  # of the last step, until it is logged
    saved: int = 0  # steps of the last checkpoint
    log_bytes: int = 0  # size of log.jsonl, without what an unreported step has written
    window: Counter = field(default_factory=Counter)  # sums since its last line
    best: dict = field(default_factory=dict)  # see update_best
    skipped: int = 0  # last steps in a row that were not finite
    lowered: int = 0  # micro_batch_tokens, once memory ran out
    scaler: dict = field(default_factory=dict)  # the gradient scaler's


def update_best(best, metrics, step, config):
    """The best evaluation, {"step", "metric", "value", "waited", "stop"}, after another one.
    Source: transformers' Trainer and EarlyStoppingCallback: patience counts from the best so far,
    with the threshold."""
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    metric = (config.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in metrics:
        raise UserError(
            f"metric_for_best_model: the evaluation gives {', '.join(metrics)}, not {metric}"
            f"{nearest(metric, metrics)}"
        )
    value, greater, gain = metrics[metric], config.greater_is_better, math.inf
    if greater is None:
        greater = not metric.endswith("loss")
    if best:
        gain = value - best["value"] if greater else best["value"] - value
    waited = 0 if gain > config.early_stopping_threshold else best["waited"] + 1
    if gain > 0:
        best = {"step": step, "metric": metric, "value": value}
    stop = bool(config.early_stopping_patience) and waited >= config.early_stopping_patience
    if stop:
        print(f"stopping early after step {step}: evaluations without a new best: {waited}")
    return {**best, "waited": waited, "stop": stop}


def checkpoint_path(config, step):
    return Path(config.output_dir) / f"checkpoint-{step:06d}"


def save_checkpoint(state, parameters, optimizer, scaler, log, config, write_weights):
    """checkpoint-000500/: the trained tensors in fp32, which write_weights(folder) writes, the
    optimizer's, state.json, and manifest.json with every file's hash. Returns its path; None, and
    nothing is written, where the step is saved already, or with save_strategy no. Where what trains
    is divided, all ranks call it, and the first one writes."""
    if state.saved == state.step or config.save_strategy == "no":
        return
    size = log.sync() if is_first() else 0
    if not state.unreported:
        state.log_bytes = size
    state.saved, state.scaler = state.step, scaler.state_dict()
    tensors = {}
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            if not key.startswith("qmap"):  # bitsandbytes' constant tables
                tensors[f"{name}:{key}"] = torch.as_tensor(value)
    path = checkpoint_path(config, state.step)
    with atomic_folder(path) if is_first() else nullcontext() as folder:
        write_weights(folder)
        if not config.save_only_model:
            write_whole(tensors, folder, "optimizer.safetensors")
        if folder is None:
            return
        (folder / "state.json").write_text(json.dumps(vars(state), indent=2))
        (folder / "manifest.json").write_text(json.dumps(hash_files(folder), indent=2))
    if config.save_total_limit:
        paths, kept = checkpoints(config.output_dir), {path}
        if config.load_best_model_at_end:
            kept.add(checkpoint_path(config, state.best.get("step", 0)))
        others = [path for path in paths if path not in kept]
        for old in others[: max(0, len(paths) - config.save_total_limit)]:
            shutil.rmtree(old)
    return path


@contextmanager
def save_on_error(save):
    """Whatever ends the block, save() comes first; that it fails too is only printed."""
    try:
        yield
    except BaseException:
        with warn_on_error("the last step is not saved"):
            save(alone=True)
        raise


def hash_files(folder):
    """{file: SHA-256} of a folder's files."""
    hashes = {}
    for path in filter(Path.is_file, folder.iterdir()):
        with open(path, "rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def sample_weights(tensors):
    """A hash of {name: (file, shape, dtype name)}: of names, shapes, dtypes, and 64 values of each
    tensor, evenly spaced. Training changes it; a few values changed by hand may not. Reading all of
    them would take as long as loading the model."""
    digest = hashlib.sha256()
    for name, (file, *header) in sorted(tensors.items()):
        with safe_open(file, "pt") as weights:
            values = weights.get_tensor(name).flatten()
        sample = values[:: max(1, len(values) // 64)].contiguous()
        digest.update(repr((name, header)).encode())
        digest.update(sample.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def read_state(checkpoint):
    """Its RunState; UserError: fields are missing, unknown or of another type."""
    file = checkpoint / "state.json"
    values, state = read_json(file), RunState("", {})
    for name in values.keys() | vars(state).keys():
        if not isinstance(vars(state).get(name), type(values.get(name, ...))):
            raise UserError(f"{file}: {name} is {json.dumps(values.get(name))}")
    numbers = [values["step"], *values["window"].values()]
    if values["step"] < 0 or not all(isinstance(number, (int, float)) for number in numbers):
        raise UserError(f"{file}: step or window is not made of numbers")
    vars(state).update(values, window=Counter(values["window"]))
    return state


def damage(checkpoint):
    """What is wrong with a checkpoint's files, '' where they are as they were written."""
    try:
        expected, actual = read_json(checkpoint / "manifest.json"), hash_files(checkpoint)
        faults = []
        for name, digest in {"state.json": "", **expected}.items():
            if name not in actual:
                faults.append(f"{name} is missing")
            elif actual[name] != digest:
                faults.append(f"{name} is not the file written")
        if not faults:
            read_state(checkpoint)
    except (OSError, UserError) as error:
        return str(error)
    return ", ".join(faults)


def checkpoints(folder):
    """A run's checkpoints by step: folders named checkpoint-<number>. Any other, as
    checkpoint-best, and a link, is the user's own."""
    steps = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch("checkpoint-([0-9]+)", path.name)
        if number and path.is_dir() and not path.is_symlink():
            steps[path] = int(number[1])
    return sorted(steps, key=steps.get)


def find_checkpoint(config):
    """The checkpoint to resume from, the newest undamaged one, or None."""
    if config.resume == "never":
        return None
    if config.resume != "auto":
        if fault := damage(Path(config.resume)):
            raise UserError(
                f"resume: {config.resume} is no checkpoint, or damaged ({fault}); "
                "give auto for the newest whole one, or never"
            )
        return Path(config.resume)
    for path in reversed(checkpoints(config.output_dir)):
        fault = damage(path)
        if not fault:
            return path
        print(f"{path} is damaged and skipped: {fault}")


@torch.no_grad()
def resume(config, trained, parameters, optimizer, scaler, steps, origin):
    """The state that the last checkpoint left, its tensors put back, or a new run's. trained: as
    for `load_trained`; parameters: by the optimizer's names; origin: as in RunState."""
    path, origin = find_checkpoint(config), json.loads(json.dumps(origin))
    if path is None:
        return RunState(steps.fingerprint, origin)
    state = read_state(path)
    advice = "another --output_dir, or --overwrite_output_dir"
    if state.data != steps.fingerprint:
        raise UserError(
            f"{path}: was trained on other data than --data gives now; take the old data, {advice}"
        )
    changed = differences(state.origin, origin)
    if changed:
        raise UserError(f"{path}: was trained with {changed}; take the old ones, {advice}")
    if not (path / "optimizer.safetensors").exists():
        raise UserError(f"{path}: save_only_model left out what a resume needs; take {advice}")
    scaler.load_state_dict(state.scaler)
    load_trained(path, trained)
    if hasattr(optimizer, "init_state"):  # bitsandbytes decides where a state lies, paged or not
        for g, group in enumerate(optimizer.param_groups):
            for n, p in enumerate(group["params"]):
                optimizer.init_state(group, p, g, n)
    file = path / "optimizer.safetensors"
    for key, (_, shape, _) in read_header(file).items():
        name, _, slot = key.rpartition(":")
        p = parameters[name]
        slots = optimizer.state[p]
        if is_divided(p) and shape == p.shape:
            slots.setdefault(slot, torch.empty_like(p))
            read_into(slots[slot], file, key)
            continue
        value = read_tensor(file, key)
        if isinstance(slots.get(slot), int):  # bitsandbytes' step
            slots[slot] = int(value)
        elif slot in slots:
            slots[slot].copy_(value)
        else:
            slots[slot] = value.to(parameters[name].device)
    print(f"resuming from {path}: step {state.step} of {len(steps)}")
    return state


def load_trained(path, trained):
    """Puts a checkpoint's trained tensors, {name in its file: parameter}, back."""
    (file,) = path.glob("*model.safetensors")
    for name, parameter in trained.items():
        read_into(parameter, file, name)


def load_best(config, best, trained):
    """Puts the best checkpoint's trained tensors back, unless it is damaged."""
    path = checkpoint_path(config, best["step"])
    if fault := damage(path):
        print(f"{path}, the best step's, is damaged ({fault}); keeping the last step")
    else:
        load_trained(path, trained)
        print(f"loaded the best step: {best['step']}, {best['metric']} {best['value']:.4g}")


# settings that may change when a run is resumed
MAY_CHANGE = {
    "output_dir",
    "dry_run",
    "nproc",
    "resume",
    "overwrite_output_dir",
    "merge",
    "eval_answers",
    "num_samples",
    "max_new_tokens",
    "logging_steps",
    "logging_first_step",
    "logging_dir",
    "run_name",
    "save_total_limit",
    "device",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "selective_checkpointing",
    "activation_offloading",
    "report_to",
    "attn_implementation",
    "ref_cache",
    "push_to_hub",
    "max_skipped_steps",
    "sharding",
    "cpu_offload",
    *vars(HubConfig()),
}


def differences(old, new):
    """What differs in `new`, as 'lora_r (8 there, 4 now)'; '' for nothing."""
    shown = []
    for key, value in new.items():
        if old.get(key) != value:
            shown.append(f"{key} ({json.dumps(old.get(key))} there, {json.dumps(value)} now)")
    if len(shown) > 4:
        shown[4:] = [f"{len(shown) - 4} more"]
    return ", ".join(shown)


def start_run(config):
    """Makes the run folder ready: (the day its run began, for templates that state the date;
    whether it is finished). Deletes the old run with overwrite_output_dir, unless torchrun starts
    it again. UserError where it holds a run of another configuration, naming the keys, or files
    that are not a run's."""
    folder, began, finished = Path(config.output_dir), datetime.now().isoformat(), False
    if config.dry_run:
        return began, finished
    file = folder / "config.json"
    if config.resume != "auto":
        find_checkpoint(config)  # a wrong path is refused before anything else happens
    new = json.loads(json.dumps(asdict(config)))
    old = read_json(file) if file.exists() else {}
    if "began" not in old and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(
            f"{folder}: holds files that are not a run's; choose another --output_dir"
        )
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if config.overwrite_output_dir and old and not restarted:
        clear_folder(folder)
        old = {}
    if old:
        changed = differences(old, {key: new[key] for key in new if key not in MAY_CHANGE})
        if changed:
            raise UserError(
                f"{folder} holds a run of another configuration: {changed}; "
                "choose another --output_dir, or --overwrite_output_dir"
            )
        with as_user_error(f"{file}: began", ValueError, TypeError):
            began = datetime.fromisoformat(old["began"]).isoformat()
        log = folder / "log.jsonl"
        last = read_log(log)[-1:] if log.exists() and config.resume == "auto" else []
        finished = any("train_runtime" in line for line in last)
    if not (finished or os.access(folder, os.W_OK)):
        raise UserError(f"{folder}: can't be written to; choose another --output_dir")
    for path in folder.glob(".checkpoint-[0-9]*"):  # left by a kill
        shutil.rmtree(path)
    return began, finished


def write_run_config(config, began, report):
    """Writes config.json and data_report.json: from here on the run exists. Nothing is written
    while data or model may be wrong."""
    settings = {**asdict(config), "began": began}
    for name, value in {"config.json": settings, "data_report.json": report}.items():
        write_text(Path(config.output_dir) / name, json.dumps(value, indent=2))

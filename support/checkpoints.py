"""Checkpoints and the run folder: written whole or not at all, found, checked, gone on from."""

import hashlib
import json
import shutil
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.errors import UserError
from support.files import atomic_folder, read_json, read_tensor, write_tensors
from support.hub import HubConfig
from support.tracking import read_log


def save_checkpoint(folder, parameters, optimizer, state, config, write_weights):
    """checkpoint-000500/: the trained tensors in fp32, which write_weights(folder) writes, the optimizer's, state.json,
    and manifest.json, which has every file's size and hash."""
    names = {p: name for name, p in parameters.items()}
    tensors = {
        f"{names[p]}:{key}": torch.as_tensor(value)
        for p, values in optimizer.state.items()
        for key, value in values.items()
        if not key.startswith("qmap")
    }  # bitsandbytes' tables, always the same
    with atomic_folder(folder / f"checkpoint-{state['step']:06d}") as aside:
        write_weights(aside)
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
            found[path.name] = [
                path.stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            ]
    return found


def damage(checkpoint):
    """What is wrong with a checkpoint's files, '' where they are as they were written."""
    try:
        wanted, found = read_json(checkpoint / "manifest.json"), manifest(checkpoint)
    except (OSError, UserError) as error:
        return str(error)
    return ", ".join(
        f"{name} is {'not the file written' if name in found else 'missing'}"
        for name in {"state.json": 0, **wanted}
        if name not in wanted or found.get(name) != wanted[name]
    )


def checkpoints(folder):
    """A run's checkpoints, oldest first."""
    return sorted(path for path in Path(folder).glob("checkpoint-*") if path.is_dir())


def find_checkpoint(config):
    """The checkpoint to go on from, the newest one that is whole, or None."""
    if config.resume not in ("auto", "never"):
        if not (Path(config.resume) / "state.json").exists():
            raise UserError(
                f"resume: {config.resume} is no checkpoint (no state.json in it); else give auto or never"
            )
        if fault := damage(Path(config.resume)):
            raise UserError(
                f"resume: {config.resume} is damaged ({fault}); auto takes the newest that is not"
            )
        return Path(config.resume)
    for path in checkpoints(config.output_dir)[::-1] if config.resume == "auto" else []:
        if not (fault := damage(path)):
            return path
        print(f"{path} is damaged and left out: {fault}")
    return None


@torch.no_grad()
def load_checkpoint(path, trained, parameters, optimizer, fingerprint):
    """Puts a checkpoint's tensors back where they were and returns its state. trained: as for `load_trained`."""
    state = read_json(path / "state.json")
    if state["data"] != fingerprint:
        raise UserError(
            f"{path}: was trained on other data than --data gives now; take the old data, "
            "another --output_dir, or --overwrite_output_dir"
        )
    load_trained(path, trained)
    for g, group in enumerate(optimizer.param_groups if hasattr(optimizer, "init_state") else ()):
        for n, p in enumerate(
            group["params"]
        ):  # bitsandbytes says where its state lies, paged or not
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
def load_trained(path, trained):
    """Puts a checkpoint's trained tensors, {name in its file: parameter}, back where they were."""
    file = next(
        path / name
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (path / name).exists()
    )
    for name, parameter in trained.items():  # PiSSA's start is written behind what was trained
        parameter.copy_(read_tensor(file, name)[tuple(map(slice, parameter.shape))])


FREE = {
    "output_dir",
    "dry_run",
    "resume",
    "overwrite_output_dir",
    "merge",
    "eval_answers",
    "num_samples",
    "max_new_tokens",
    "logging_steps",
    "save_total_limit",
    "device",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "report_to",
    "attn_implementation",
    "ref_cache",
    "push_to_hub",
    "max_skipped_steps",
    *vars(HubConfig()),
}


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
        shown = ", ".join(
            f"{k} ({json.dumps(old.get(k))} there, {json.dumps(new[k])} now)" for k in differ[:4]
        )
        raise UserError(
            f"{folder} holds a run of another configuration: {shown}"
            + (f" and {len(differ) - 4} more" if len(differ) > 4 else "")
            + "; choose another --output_dir, or --overwrite_output_dir to start anew"
        )
    for left in folder.glob(".checkpoint-*.partial"):  # by a kill
        shutil.rmtree(left)
    log = folder / "log.jsonl"
    last = read_log(log)[-1:] if log.exists() and config.resume == "auto" else []
    return datetime.fromisoformat(old["began"]), any("train_runtime" in line for line in last)


def write_run_config(config, began, report):
    """Writes config.json and data_report.json: the run exists from here on. Nothing is written while data or model may
    be wrong."""
    for name, value in (
        ("config.json", {**asdict(config), "began": began.isoformat()}),
        ("data_report.json", report),
    ):
        aside = Path(config.output_dir) / f".{name}"
        aside.write_text(json.dumps(value, indent=2))
        aside.replace(Path(config.output_dir) / name)

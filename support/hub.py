"""The hub: models and data sets that are read from it, runs that are pushed to it."""

import json
import os
import re
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from support.errors import UserError, as_user_error, sanitize
from support.files import read_json

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def resolve(name, revision=None, kind="model"):
    """The folder of a model: a folder as it stands, or a hub id 'org/name', downloaded (safetensors and text alone)."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(
                f"{folder}: no config.json in it; a model is a folder in Hugging Face's layout or a hub id"
            )
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"{kind} {name}: neither a folder nor a hub id of the form org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", *COMPANIONS]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        raise UserError(
            f"{kind} {name}: accept its licence on the hub first, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{kind} {name}: no such folder here and no such {kind} on the hub "
            "(a private one needs HF_TOKEN)"
        ) from None
    except (
        Exception
    ) as error:  # the client's own errors and those of whichever http library it stands on
        reason = (sanitize(str(error)).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"{kind} {name}: no folder here, and the hub can't be reached or breaks off ({reason})"
        ) from None


def hub_files(source, readable):
    """`org/name[#revision][:config][:split]` -> local paths of its files, downloaded into the hub's cache. The split
    defaults to train, the configuration to `default` or the only one. readable(file): whether rows can be read from it."""
    import huggingface_hub

    name, *wanted = source.split(":")
    repo, _, revision = name.partition("#")
    where = {"repo_type": "dataset", "revision": revision or None}
    lost = f"{source}: no file here, and the hub does not give it (a private one needs HF_TOKEN)"
    with as_user_error(
        lost, Exception
    ):  # the client's errors and those of whichever http library it stands on
        info = huggingface_hub.HfApi().dataset_info(repo, revision=where["revision"])
        files = sorted(file.rfilename for file in info.siblings)
    found = {}  # (config, split): [data/train-00000-of-00002.parquet, ...], [main/test.jsonl], [x/train/0.parquet]
    for file in filter(readable, files):
        *folders, name = file.split("/")
        split = re.split(r"-\d{5}-of-|\.", name)[0]
        split = folders.pop() if split.isdigit() and folders else split
        config = folders[-1] if folders not in ([], ["data"]) else "default"
        found.setdefault((config, split), []).append(file)
    keys = [key for key in found if set(wanted) <= set(key)]
    for default in ("train", "default"):
        keys = [key for key in keys if default in key] or keys if len(keys) > 1 else keys
    if len(keys) != 1:
        what = "has several parts" if keys else "has no such part"
        there = (
            ", ".join(f"{repo}:{config}:{split}" for config, split in keys or found)
            or "no data file"
        )
        raise UserError(f"{source} {what}; name one of: {there}")
    with as_user_error(lost, Exception):
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=found[keys[0]], **where)
    return [Path(folder) / file for file in found[keys[0]]]


@dataclass
class HubConfig:
    """Where a run is pushed to; names are those of transformers' TrainingArguments and push_to_hub."""

    hub_model_id: str = ""  # user/name, where adapter/ goes; merged/ goes to user/name-merged; none: the folder's name
    hub_commit_message: str = "Trained with plaintune"  # of what is pushed
    hub_private_repo: bool | None = (
        None  # whether a repository that has to be made is private; none: as the hub has it
    )


WAITS = (1, 2, 4, 8, 16)  # seconds before a push is tried again


def call_hub(what, ask, waits=(), advice=""):
    """ask()'s answer, asked again after each of `waits` seconds while the hub is out of reach or at fault (5xx, 429).
    Else UserError: `what`, the hub's words in a line, and the advice."""
    if not get_token():
        raise UserError(
            f"{what}: no token; set HF_TOKEN to one that may write, or log in (hf auth login){advice}"
        )
    for wait in (*waits, None):
        try:
            return ask()
        except (
            Exception
        ) as error:  # the client's own errors and those of whichever http library it stands on
            words = " ".join(sanitize(str(error)).split()).partition(" For more information")[0]
            reason = words[:200] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if (
                wait is None
                or isinstance(error, ValueError)
                or 400 <= status < 500
                and status != 429
            ):
                raise UserError(f"{what}: {reason}{advice}") from None
            print(f"{what}: {reason}; again in {wait} s", flush=True)
            time.sleep(wait)


def create_repositories(config, run):
    """{folder of the run: repository that has it as its root, so that PEFT, transformers and vLLM open it by its id}.
    They are made where they are not there, and asked for what a commit begins with, which takes the right to write."""
    api, name = HfApi(), config.hub_model_id or Path(run).resolve().name
    user = api.whoami()["name"]
    name = name if "/" in name else f"{user}/{name}"
    parts = ["adapter"] * bool(config.lora_r) + ["merged"] * (config.merge or not config.lora_r)
    names = dict(zip(parts, (name, f"{name}-merged")))
    for name in names.values():
        api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        api.preupload_lfs_files(name, [CommitOperationAdd("README.md", b"-")])
    return names


def push(run, given=HubConfig()):
    """Brings to the hub what it lacks of a finished run's adapter/ and merged/; what is `given` wins over the run's
    config.json. pushed.json keeps {repository: commit and files}. UserError: an unfinished run, or a hub that refuses
    or fails for good, which takes nothing from the run."""
    run, api = Path(run), HfApi()
    ask = partial(
        call_hub,
        waits=WAITS,
        advice=f"; nothing is lost: `python lora.py push {run}` goes on from here",
    )
    config = vars(HubConfig()) | read_json(run / "config.json")
    if (
        not {"lora_r", "merge"} <= config.keys() or not (run / "README.md").exists()
    ):  # the last that a run writes
        raise UserError(
            f"{run}: no run's folder, or not finished; then the command that began it goes on, and pushes"
        )
    config |= {
        f.name: getattr(given, f.name)
        for f in fields(HubConfig)
        if getattr(given, f.name) != f.default
    }
    names = ask("push", lambda: create_repositories(SimpleNamespace(**config), run))
    pushed = read_json(run / "pushed.json") if (run / "pushed.json").exists() else {}
    for part, name in names.items():
        files = {file.name: file.stat().st_mtime_ns for file in sorted((run / part).iterdir())}
        there = ask(f"push to {name}", lambda: api.list_repo_files(name))
        if pushed.get(name, {}).get("files") == files and files.keys() <= set(there):
            print(f"{name} holds {part}/ already")
            continue
        others = [
            file
            for file in {*there} - {*files}
            if re.fullmatch(r"[^/]*\.safetensors(\.index\.json)?", file)
        ]
        changes = [CommitOperationAdd(file, run / part / file) for file in files]
        changes += map(CommitOperationDelete, others)
        commit = ask(
            f"push to {name}",
            lambda: api.create_commit(name, changes, commit_message=config["hub_commit_message"]),
        )
        pushed[name] = {"commit": commit.oid, "files": files}
        (run / ".pushed.json").write_text(json.dumps(pushed, indent=2))
        (run / ".pushed.json").replace(run / "pushed.json")
        print(f"pushed {part}/ to {name}", flush=True)

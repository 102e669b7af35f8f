"""Reads models and data sets from Hugging Face's hub, and pushes runs to it.

A push is one commit a repository, made by create_commit: upload_folder may cut it into several,
between which a repository holds shards of two models.
"""

import os
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    list_repo_files,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory

from support.errors import UserError, sanitize
from support.files import read_json

COMPANIONS = tuple(
    "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja "
    "special_tokens_map.json added_tokens.json vocab.json merges.txt tokenizer.model".split()
)


def companions(base, adapter=None):
    """{name: path} of a model's COMPANIONS. An adapter's own go before its base's: it is asked with
    the tokenizer and chat template that it was trained with."""
    files = {}
    for folder in filter(None, (base, adapter)):
        paths = [Path(folder, name) for name in COMPANIONS]
        own = {path.name: path for path in paths if path.exists()}
        if folder is adapter:
            own.pop("config.json", None)
        if "tokenizer_config.json" in own:  # the template is in it or beside it
            files.pop("chat_template.jinja", None)
        files |= own
    return files


NOT_LOADED = "not loaded from the hub (a private repository needs HF_TOKEN)"
TIMEOUT = 30  # seconds that a connection or the next piece of an answer may take
WAITS = (1, 2, 4, 8, 16)  # seconds before each retry of a push


@dataclass
class HubConfig:
    """Where a run is pushed to; names as in transformers' TrainingArguments and push_to_hub."""

    # the hub
    hub_model_id: str = (
        ""  # user/name of adapter/; merged/: user/name-merged; none: folder's name
    )
    hub_commit_message: str = "Trained with plaintune"  # message of the commits
    hub_private_repo: bool | None = None  # of a new repository: private; none: the hub's default
    hub_strategy: str = "end"  # push when the run ends, or what has trained at every_save too

    CHOICES: ClassVar[dict] = {"hub_strategy": ("end", "every_save")}


def make_client():
    """The hub's http client, with a timeout also for those of its calls that wait for ever."""

    def limit(request):
        limits = request.extensions["timeout"]
        limits |= {phase: limits[phase] or TIMEOUT for phase in limits}

    client = default_client_factory()
    client.event_hooks["request"].append(limit)
    return client


set_client_factory(make_client)


def call_hub(what, ask, waits=(), advice=""):
    """ask()'s result, retried after each of `waits` seconds on connection errors, 429 and 5xx.

    UserError: `what`, the reason in a line, and the advice.
    """
    for wait in (*waits, None):
        try:
            return ask()
        except Exception as error:  # huggingface_hub's, or those of its http library
            reason = " ".join(sanitize(str(error)).split()).partition(" For more information")[0]
            reason = reason[:200] or type(error).__name__
            if isinstance(error, RepositoryNotFoundError):
                reason = "no such repository"
            if isinstance(error, GatedRepoError):
                reason = "accept its licence on the hub first, then set HF_TOKEN"
            status = getattr(getattr(error, "response", None), "status_code", 500)
            refused = isinstance(error, (ValueError, UserError)) or (
                status < 500 and status != 429
            )
            if refused or wait is None:
                raise UserError(f"{what}: {reason}{advice}") from None
            print(f"{what}: {reason}; retrying in {wait} s", flush=True)
            time.sleep(wait)


def resolve(name, revision=None, kind="model"):
    """The folder of a model: a local one as it is, or that of a hub id 'org/name', downloaded.

    Only safetensors and text files are downloaded.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(
                f"{folder}: not a model in Hugging Face's layout: no config.json in it"
            )
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"{kind} {name}: neither a folder nor a hub id of the form org/name")
    patterns = ["*.safetensors", "*.json", *COMPANIONS]
    download = partial(snapshot_download, str(name), revision=revision, allow_patterns=patterns)
    folder = Path(call_hub(f"{kind} {name}: no folder here, and {NOT_LOADED}", download))
    if not folder.is_dir():
        raise UserError(f"{kind} {name}: its repository on the hub has no such files yet")
    return folder


def hub_files(source, readable):
    """`org/name[#revision][:config][:split]` -> local paths of its files, downloaded to the cache.

    The split defaults to train, the configuration to `default` or the only one. readable(file):
    whether rows can be read from it.
    """
    name, *parts = source.split(":")
    repo, _, revision = name.partition("#")
    where = {"repo_type": "dataset", "revision": revision or None}
    ask = partial(call_hub, f"{source}: no file here, and {NOT_LOADED}")
    groups = {}  # (config, split): [data/train-00000-of-00002.parquet, ...], [main/test.jsonl]
    for file in sorted(filter(readable, ask(partial(list_repo_files, repo, **where)))):
        *folders, stem = file.split("/")
        split = re.split(r"-\d{5}-of-|\.", stem)[0]
        if split.isdigit() and folders:  # main/train/0.parquet
            split = folders.pop()
        config = "default" if folders in ([], ["data"]) else folders[-1]
        groups.setdefault((config, split), []).append(file)
    keys = [key for key in groups if set(parts) <= set(key)]
    for default in ("train", "default"):
        if len(keys) > 1:
            keys = [key for key in keys if default in key] or keys
    if len(keys) != 1:
        problem = "has several parts" if keys else "has no such part"
        options = [f"{repo}:{config}:{split}" for config, split in keys or groups]
        raise UserError(
            f"{source} {problem}; name one of: {', '.join(options) or 'no data file'}"
        )
    files = groups[keys[0]]
    folder = ask(partial(snapshot_download, repo, allow_patterns=files, **where))
    return [Path(folder, file) for file in files]


def create_repositories(config, run):
    """{folder of the run: its repository}, made if missing; an error without the right to write.

    Each folder is the root of a repository, so that PEFT, transformers and vLLM open it by its id.
    """
    if not get_token():
        raise UserError("no token; set HF_TOKEN to one that may write, or log in (hf auth login)")
    api, name = HfApi(), config.hub_model_id or Path(run).resolve().name
    user = api.whoami()["name"]
    name = name if "/" in name else f"{user}/{name}"
    names = {"adapter" if config.lora_r else "merged": name}
    if config.lora_r and config.merge:
        names["merged"] = f"{name}-merged"
    for name in names.values():
        api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        api.preupload_lfs_files(name, [CommitOperationAdd("README.md", b"-")])  # a commit's start
    return names


def push_checkpoint(config, checkpoint):
    """Uploads the tensors of a checkpoint, and an adapter's config, in one commit."""
    name, *_ = create_repositories(config, config.output_dir).values()
    files = [*checkpoint.glob("*model.safetensors"), *checkpoint.glob("adapter_config.json")]
    changes = [CommitOperationAdd(file.name, file) for file in files]
    HfApi().create_commit(name, changes, commit_message=checkpoint.name)
    print(f"pushed {checkpoint.name} to {name}", flush=True)


def push(run, flags=HubConfig()):
    """Uploads what the hub lacks of a finished run's adapter/ and merged/.

    flags: what differs from HubConfig's defaults overrides the run's config.json. create_commit
    leaves out what the hub has. UserError: an unfinished run, or a refusal of the hub.
    """
    run, api = Path(run), HfApi()
    advice = f"; nothing is lost: `python lora.py push {run}` goes on from here"
    ask = partial(call_hub, waits=WAITS, advice=advice)
    saved, defaults = read_json(run / "config.json"), vars(HubConfig())
    if not {"lora_r", "merge"} <= saved.keys() or not (run / "README.md").exists():
        raise UserError(f"{run}: not a finished run; run the command that began it again")
    settings = {key: getattr(flags, key) for key in defaults}
    changed = dict(settings.items() - defaults.items())
    config = SimpleNamespace(**defaults | saved | changed)
    names = ask("push", partial(create_repositories, config, run))
    for folder, name in names.items():
        files = {file.name: file for file in (run / folder).iterdir()}
        changes = [CommitOperationAdd(*file) for file in files.items()]
        on_hub = set(ask(f"push to {name}", partial(api.list_repo_files, name)))
        for file in on_hub - files.keys():
            if re.fullmatch(r"[^/]*\.safetensors(\.index\.json)?", file):  # of an earlier model
                changes.append(CommitOperationDelete(file))
        commit = partial(
            api.create_commit, name, changes, commit_message=config.hub_commit_message
        )
        ask(f"push to {name}", commit)
        print(f"pushed {folder}/ to {name}", flush=True)


def adapter_in(folder):
    """The adapter that a folder is, or holds as a run does; else None."""
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").exists():
            return adapter


def find_adapter(name) -> Path:
    """The folder of an adapter: itself, a run folder's adapter/, or a hub id, downloaded."""
    folder = Path(os.path.expanduser(name))
    folder = folder if folder.is_dir() else resolve(name, kind="adapter")
    adapter = adapter_in(folder)
    if not adapter:
        raise UserError(
            f"{folder}: not an adapter in PEFT's layout: no adapter_config.json in it"
        )
    if not (adapter / "adapter_model.safetensors").exists():
        raise UserError(
            f"{adapter}: no adapter_model.safetensors; adapter_model.bin is a pickle and never "
            "read: if you trust it, load it in PEFT and save it again"
        )
    return adapter

"""README.md of a run: the model card."""

import re
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData

from support.checkpoints import MAY_CHANGE
from support.report import markdown_table
from support.tracking import read_log, warn_on_error

MERGE_BASES = {
    "original": "the 16-bit weights",
    "dequantized": "the dequantised 4-bit weights",
}


def merge_table(figures, written, rows_of):
    """The table of a measured merge, as text for the terminal and the model card. figures: as of
    `measure_merge`; written: the base that was taken; rows_of: the kind of rows measured on."""
    rows = []
    for base, values in figures.items():
        name = MERGE_BASES[base]
        if base == written:
            name += ", written"
        rows.append([name, f"{values['kl']:.6f}", f"{values['top1']:.2%}"])
    tokens = figures[written]["tokens"]
    table = markdown_table(["merged into", "KL, nats per token", "same likeliest token"], *rows)
    heading = f"against the adapter on 4 bits, over {tokens:,} scored tokens of {rows_of} rows:"
    return f"{heading}\n\n{table}"


SHOWN = {  # settings that the card has even where they are the defaults
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "optim",
    "weight_decay",
    "seed",
    "beta",
    "loss_type",
}
LIBRARIES = {  # which library opens a folder of the run, and with which class
    "merged": ("transformers", "AutoModelForCausalLM"),
    "adapter": ("peft", "AutoPeftModelForCausalLM"),
}


def result_rows(log, results):
    """Rows [name, before, after]: the first evaluation, and the best or last step."""
    before, after = {}, {}
    for line in log:
        if "eval_loss" in line and not before:
            before = line
        if line["step"] <= results.get("best_step", results["step"]):
            after |= {key: line[key] for key in line if key == "loss" or key.startswith("eval_")}
    after |= results
    after.pop("seconds", None)
    before = before | {"eval_answers": after.pop("eval_answers_before", "")}
    return [[key, before.get(key, ""), value] for key, value in after.items()]


def result_notes(rows, config):
    """What of the results is easily taken for one another."""
    if not {"eval_accuracy", "eval_answers"} <= {name for name, *_ in rows}:
        return ""
    return (
        "`eval_accuracy` takes the likeliest of a question's choices, on all evaluation rows; "
        f"`eval_answers` grades a generated answer, on up to {config.eval_answers} of them."
    )


def setting_rows(config, hidden):
    """Rows [name, value] of the settings that differ from the defaults or are in SHOWN."""
    defaults = asdict(type(config)())
    hidden = MAY_CHANGE | {"model", "data", "eval_data", *hidden}
    rows = []
    for key, value in asdict(config).items():
        if key not in hidden and (key in SHOWN or value != defaults[key]):
            rows.append([key, value])
    return rows


def hub_datasets(sources):
    """The hub ids among sources of rows."""
    ids = set()
    for source in sources:
        hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)([#:@].*)?", source)
        if hub_id and not Path(hub_id[1]).exists():
            ids.add(hub_id[1])
    return sorted(ids)


def write_card(config, ledger, results, merged, hidden=()):
    """Writes README.md, the model card, and the loss curve into merged/ and adapter/, and last into
    the run folder. Of a path the card has the name alone. merged: the measured merge's table;
    hidden: settings it leaves out."""
    folder, model = Path(config.output_dir), Path(config.model).expanduser().resolve()
    base = re.sub(r"[^\w.-]+", "-", model.name) if model.is_dir() else config.model
    sources = [*config.data, *config.eval_data]
    names = ", ".join(f"`{source}`" for source in sources)
    libraries = [f"{name} {version(name)}" for name in ("torch", "safetensors", "tokenizers")]
    metrics = result_rows(read_log(folder / "log.jsonl"), results)
    sections = [
        f"## Results\n\n{markdown_table(['', 'before', 'after'], *metrics)}",
        result_notes(metrics, config),
        "![the loss by step](training_loss.png)",
        f"## Data\n\n{names}\n\n{ledger}",
        f"## Settings\n\n{markdown_table(['', ''], *setting_rows(config, hidden))}",
        f"## Merge\n\nMeasured {merged}" if merged else "",
        ", ".join(libraries),
    ]
    body = "\n\n".join(filter(None, sections))
    body = re.sub(r"(?<![\w.:/~-])~?/[^\s\"'`|]*/", "", body)  # folders
    method = "dpo" if hasattr(config, "beta") else "sft"
    by = ", by a LoRA," if config.lora_r else ""
    for part, (library, opener) in LIBRARIES.items():
        if (folder / part).is_dir():
            name = config.hub_model_id or folder.resolve().name
            if part == "merged" and config.lora_r:
                name += "-merged"
            front = ModelCardData(
                base_model=base,
                base_model_relation="adapter" if part == "adapter" else "finetune",
                library_name=library,
                pipeline_tag="text-generation",
                tags=["plaintune", method],
                datasets=hub_datasets(sources) or None,
            ).to_yaml()
            source = name if config.hub_model_id else f"{name}/{part}"
            use = (
                f'from {library} import {opener}\n\nmodel = {opener}.from_pretrained("{source}")'
            )
            card = (
                f"---\n{front}\n---\n\n# {name}\n\n{method.upper()} of `{base}`{by} with plaintune."
                f"\n\n```python\n{use}\n```\n\n{body}\n"
            )
            (folder / part / "README.md").write_text(card, encoding="utf-8")
            with warn_on_error("the card has no curve"):
                shutil.copyfile(folder / "training_loss.png", folder / part / "training_loss.png")
    (folder / "README.md").write_text(card, encoding="utf-8")

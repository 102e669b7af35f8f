"""README.md of a run: the model card."""

import re
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import yaml

from support.checkpoints import FREE
from support.report import markdown_table
from support.tracking import read_log, warn_on_error


def merge_table(figures):
    """The table of a measured merge, as text for the terminal and the model card."""
    names = {"original": "the 16-bit weights", "dequantized": "the dequantised 4-bit weights"}
    tokens = next(iter(figures.values()))["tokens"]
    rows = [
        [
            name + ", written" * (base == figures["merged"]),
            f"{figures[base]['kl']:.6f}",
            f"{figures[base]['top1']:.2%}",
        ]
        for base, name in names.items()
        if base in figures
    ]
    return (
        f"against the adapter on 4 bits, over {tokens:,} scored tokens of held-out rows:\n\n"
        + markdown_table(["merged into", "KL, nats per token", "same likeliest token"], *rows)
    )


SHOWN = {
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
}  # settings that the card has, be they the defaults or not


def write_card(config, ledger, results, figures, hidden=()):
    """README.md, the model card, and the curve, in merged/ and adapter/; last in the run folder, which then is whole:
    base, how to open it, results, the data's ledger, settings, the measured merge. Of a path it has the name alone."""
    folder, local = Path(config.output_dir), Path(config.model).expanduser().resolve()
    base = re.sub(r"[^\w.-]+", "-", local.name) if local.is_dir() else config.model
    log, taken = read_log(folder / "log.jsonl"), results.get("best_step", results["step"])
    before = next((line for line in log if "eval_loss" in line), {})
    before = before | {"eval_answers": results.get("eval_answers_before", "")}
    after = {
        k: v
        for line in log
        if line["step"] <= taken
        for k, v in line.items()
        if k == "loss" or k[:5] == "eval_"
    }
    after = [
        [k, before.get(k, ""), v]
        for k, v in (after | results).items()
        if k not in ("eval_answers_before", "seconds")
    ]
    default, hidden = type(config)(), FREE | {"model", "data", "eval_data", *hidden}
    settings = [
        [k, v]
        for k, v in asdict(config).items()
        if k not in hidden and (k in SHOWN or v != getattr(default, k))
    ]
    sources = [*config.data, *config.eval_data]
    hub = [re.fullmatch(r"([\w.-]+/[\w.-]+)([#:@].*)?", source) for source in sources]
    parts = [
        f"## Results\n\n{markdown_table(['', 'before', 'after'], *after)}",
        "![the loss by step](training_loss.png)",
        f"## Data\n\n{', '.join(f'`{source}`' for source in sources)}\n\n{ledger}",
        f"## Settings\n\n{markdown_table(['', ''], *settings)}",
        figures and f"## Merge\n\nMeasured {merge_table(figures)}",
        ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "tokenizers")),
    ]
    body = re.sub(r"(?<![\w.:/~-])~?/[^\s\"'`|]*/", "", "\n\n".join(filter(None, parts)))
    for part, library, opener in (
        ("merged", "transformers", "AutoModelForCausalLM"),
        ("adapter", "peft", "AutoPeftModelForCausalLM"),
    ):
        if (folder / part).is_dir():
            alone, kind = (
                part == "adapter" or not config.lora_r,
                "dpo" if hasattr(config, "beta") else "sft",
            )
            name = (config.hub_model_id or folder.resolve().name) + ("" if alone else "-merged")
            front = {
                "base_model": base,
                "base_model_relation": "adapter" if part == "adapter" else "finetune",
                "library_name": library,
                "pipeline_tag": "text-generation",
                "tags": ["plaintune", kind],
                "datasets": sorted(
                    {found[1] for found in hub if found and not Path(found[1]).exists()}
                ),
            }
            front = yaml.safe_dump(
                {key: value for key, value in front.items() if value}, sort_keys=False
            )
            what = (
                f"{kind.upper()} of `{base}`{', by a LoRA,' * (config.lora_r > 0)} with plaintune."
            )
            use = f'from {library} import {opener}\n\nmodel = {opener}.from_pretrained("{name}")'
            card = f"---\n{front}---\n\n# {name}\n\n{what}\n\n```python\n{use}\n```\n\n{body}\n"
            (folder / part / "README.md").write_text(card, encoding="utf-8")
            with warn_on_error("the card has no curve"):
                shutil.copyfile(folder / "training_loss.png", folder / part / "training_loss.png")
    (folder / "README.md").write_text(card, encoding="utf-8")

"""DPO: TRL's numbers, a reference that is the start to the last bit, and a plan that still never
changes the maths."""

# ruff: noqa: F811  fixtures are imported from test_sft

import json
import math
import shutil
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file
from test_sft import base, same_tensors, without_times, write_tokenizer  # noqa: F401  base is a fixture

import dpo
import sft
from data import render_row, unpair
from lora import adapter_parameters, add_lora, load_adapter, lora_layers, write_adapter
from model import Segment, load_model
from support import tracking
from support.errors import UserError, run_command

COUNT = 8


def pair(i):
    """A pair whose sides differ in length; the longer one is chosen as often as rejected."""
    sides = [f" it is {i}, surely" + "!" * (i % 5), " no" + " way" * (i % 4 + 1)]
    return {
        "prompt": "word " * (i % 4) + f"what is {i}?",
        "chosen": sides[i % 2],
        "rejected": sides[1 - i % 2],
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(pair(i)) for i in range(COUNT)))
    return file


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """21 pairs: the last step of an epoch is a partial one."""
    file = tmp_path_factory.mktemp("rows") / "many.jsonl"
    file.write_text("\n".join(json.dumps(pair(i)) for i in range(21)))
    return file


def config(**settings):
    return dpo.DPOConfig(
        **{"model": "m", "data": ["d"], "lora_r": 4, "lora_alpha": 8, **settings}
    )


def flags(base, rows, out, **settings):
    settings = {
        "model": base, "data": rows, "output_dir": out, "ref_cache": out.parent / "reference", "lora_r": 4,  # noqa: E501
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "num_train_epochs": 2, "save_steps": 2,  # noqa: E501
        "logging_steps": 1, "eval_answers": 0, "merge": False, **settings,
    }  # fmt: skip
    return [
        word
        for key, value in settings.items()
        if value is not None
        for word in (f"--{key}", str(value))
    ]


def load_pairs(base, rows):
    return [*sft.load_examples([str(rows)], sft.Tokenizer(base), preference=True)[0]]


def give_reference(model, examples, settings, tmp_path):
    settings.ref_cache = str(tmp_path / "reference")
    plan = sft.Plan(examples, settings, dpo.count_pairs)
    dpo.add_reference(model, plan, [], settings)


def move(model, seed=0):
    """The adapter after some training: B far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))


def gradient(model, examples, settings, budget=10**6):
    """(mean loss, mean metrics, {parameter: gradient}) of one step over the examples."""
    model.zero_grad()
    loss, sums = sft.accumulate(
        model, examples, len(examples), partial(dpo.dpo_loss, config=settings), budget
    )
    found = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    return (
        loss / len(examples),
        {name: value / len(examples) for name, value in sums.items()},
        found,
    )


# --- TRL ------------------------------------------------------------------------------------------


def peft_twin(base, model):
    """PEFT's model of the same base, with the adapter of ours."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = model.adapter
    twin = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            target_modules=settings.target_modules,
        ),
    )
    copy_adapter(model, twin)
    return twin


@torch.no_grad()
def copy_adapter(model, twin):
    ours = adapter_parameters(model)
    for name, p in twin.named_parameters():
        if p.requires_grad:
            p.copy_(ours[name.replace(".default", "")])


def trl_trainer(cls, settings, base, rows, model, out, **options):
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    fixed = dict(output_dir=str(out), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,  # noqa: E501
                 per_device_train_batch_size=COUNT, disable_tqdm=True, save_strategy="no", logging_steps=1)  # fmt: skip # noqa: E501
    return cls(model=model, args=settings(**{**fixed, **options}), processing_class=tokenizer,
               train_dataset=Dataset.from_list([json.loads(line) for line in open(rows)]))  # fmt: skip # noqa: E501


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory):
    """(our model with an adapter that has moved, our examples with their reference, TRL's trainer
    of the same)"""
    from trl import DPOConfig, DPOTrainer

    settings, folder = config(), tmp_path_factory.mktemp("trained")
    model, examples = load_model(base), load_pairs(base, rows)
    add_lora(model, settings, seed=1)
    give_reference(model, examples, settings, folder)
    trainer = trl_trainer(
        DPOTrainer, DPOConfig, base, rows, peft_twin(base, model), folder
    )  # copies its reference
    move(model)
    copy_adapter(model, trainer.model)
    return model, examples, trainer


def trl_gradient(trainer, parts):
    """As `gradient`, of TRL's trainer: the mean over `parts`, lists of row indices that are a batch
    each."""
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    trainer.model.train()
    loss = 0.0
    for part in parts:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in part])
        one = trainer.compute_loss(trainer.model, batch) / len(parts)
        one.backward()
        loss += float(one)
    found = {
        name.replace(".default", ""): p.grad
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    return (
        loss,
        {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()},
        found,
    )


def close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= tolerance * max(
            1.0, float(value.abs().max())
        ), name


WHOLE = [list(range(COUNT))]
ONE_BY_ONE = [[i] for i in range(COUNT)]
CASES = {
    "sigmoid": {}, "hinge": dict(beta=0.3), "ipo": dict(beta=0.05), "robust": dict(label_smoothing=0.1),  # noqa: E501
    "exo_pair": dict(label_smoothing=1e-3), "nca_pair": {}, "bco_pair": {}, "sppo_hard": dict(beta=0.2),  # noqa: E501
    "aot": dict(label_smoothing=0.1), "aot_unpaired": {}, "apo_zero": {}, "apo_down": {}, "discopop": {},  # noqa: E501
    "sigmoid_norm": {}, "sft": {}, "sigmoid,bco_pair,sft": dict(loss_weights=[0.8, 0.2, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_losses_rewards_and_gradients_are_trls(kind, trained):
    """DPOTrainer on the same rows and weights, fp32, 1e-5. Its sft term is a mean over a batch's
    tokens: a batch of one pair at a time is what ours is."""
    model, examples, trainer = trained
    settings = config(loss_type=kind.split(","), **CASES[kind])
    trainer.loss_types, trainer.loss_weights = settings.loss_type, settings.loss_weights
    trainer.beta, trainer.label_smoothing = settings.beta, settings.label_smoothing
    loss, metrics, found = gradient(model, examples, settings)
    theirs = trl_gradient(trainer, ONE_BY_ONE if "sft" in kind else WHOLE)
    assert loss == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    close(found, theirs[2])
    assert max(float(g.abs().max()) for g in found.values()) > 1e-3
    if kind != "sft":  # TRL has a reference for it all the same
        shared = metrics.keys() & theirs[1].keys()
        assert {
            f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")
        } <= shared
        assert {"logps/chosen", "logps/rejected"} <= shared
        for name in shared:
            assert metrics[name] == pytest.approx(theirs[1][name], rel=1e-5, abs=2e-5), name


VARIANTS = {
    "js_divergence": dict(f_divergence_type="js_divergence"),
    "forward_kl": dict(f_divergence_type="forward_kl", loss_type=["ipo"], beta=0.3),
    "alpha_divergence": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
    "alpha_1": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    "js_norm": dict(f_divergence_type="js_divergence", loss_type=["sigmoid_norm", "hinge"]),
    "ld_alpha": dict(ld_alpha=0.4, loss_type=["sigmoid", "bco_pair"]),
    "ld_alpha_sft": dict(ld_alpha=0.4, loss_type=["sigmoid", "sft"]),
    "wpo": dict(use_weighting=True, loss_type=["sigmoid", "ipo"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_divergences_and_weights_are_trls(variant, trained, base, rows, tmp_path):
    from trl import DPOConfig, DPOTrainer

    model, examples, trainer = trained
    settings = config(**VARIANTS[variant])
    if settings.use_weighting:  # it sets up more outputs
        twin = peft_twin(base, model)
        weighted = trl_trainer(
            DPOTrainer, DPOConfig, base, rows, twin, tmp_path, use_weighting=True
        )
        with torch.no_grad():  # its reference is a copy of what it starts from
            theirs = dict(trainer.model.named_parameters())
            for name, p in weighted.model.named_parameters():
                p.copy_(theirs[name])
        trainer = weighted
    before = {name: getattr(trainer, name) for name in ("ld_alpha", "f_divergence_type")}
    names = "beta label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef loss_weights"
    for name in names.split():
        setattr(trainer, name, getattr(settings, name))
    trainer.loss_types = settings.loss_type
    loss, metrics, found = gradient(model, examples, settings)
    theirs = trl_gradient(trainer, ONE_BY_ONE if "sft" in settings.loss_type else WHOLE)
    vars(trainer).update(before)
    assert loss == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    close(found, theirs[2])
    for name in ("rewards/chosen", "rewards/margins", "logps/rejected"):
        assert metrics[name] == pytest.approx(theirs[1][name], rel=1e-5, abs=2e-5), name
    plain = gradient(model, examples, config(loss_type=settings.loss_type, beta=settings.beta))
    assert variant == "alpha_1" or abs(plain[0] - loss) > 1e-3


def test_every_loss_type_of_trl_is_here():
    from trl import DPOConfig

    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    theirs = set(
        text.partition("Possible values are:")[2]
        .partition(". If")[0]
        .replace("`", "")
        .split(", ")
    )
    assert {name.strip(" '") for name in theirs} <= set(dpo.LOSSES) and len(theirs) > 10


@pytest.mark.parametrize("kind", ["cpo", "simpo", "orpo"])
@pytest.mark.filterwarnings("ignore")
def test_reference_free_losses_are_trls(kind, trained, base, rows, tmp_path):
    """CPOTrainer and ORPOTrainer on the same rows and weights, a pair at a time. ORPOTrainer also
    scores the prompt in its sft term: each prompt is one token here, which nothing predicts."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "\n".join(json.dumps(pair(i) | {"prompt": "abcdefgh"[i]}) for i in range(COUNT))
    )
    model, examples = trained[0], load_pairs(base, file)
    options = {"cpo": dict(cpo_alpha=0.7, label_smoothing=0.1, beta=0.2), "orpo": dict(beta=0.3),
               "simpo": dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.4, beta=2.0)}[kind]  # fmt: skip # noqa: E501
    which = (ORPOTrainer, ORPOConfig) if kind == "orpo" else (CPOTrainer, CPOConfig)
    trainer = trl_trainer(
        *which,
        base,
        file,
        peft_twin(base, model),
        tmp_path,
        remove_unused_columns=False,
        **options,
    )
    settings = config(**options | {"loss_type": [kind]})
    assert settings.reference_free
    loss, metrics, found = gradient(model, examples, settings)
    trainer.model.train()
    total, sums = 0.0, {}
    for i in range(COUNT):
        one, logged = trainer.get_batch_loss_metrics(
            trainer.model, trainer.data_collator([trainer.train_dataset[i]])
        )
        (one / COUNT).backward()
        total += float(one) / COUNT
        for name, value in logged.items():
            sums[name] = sums.get(name, 0.0) + value / COUNT
    assert loss == pytest.approx(total, rel=1e-5)
    close(
        found,
        {
            n.replace(".default", ""): p.grad
            for n, p in trainer.model.named_parameters()
            if p.requires_grad
        },
    )
    for name in metrics.keys() & sums.keys():
        assert metrics[name] == pytest.approx(sums[name], rel=1e-5, abs=2e-5), name
    assert "rewards/margins" in sums and "kl" not in metrics


def test_twenty_steps_are_trls(base, rows, tmp_path):
    """20 AdamW steps of 8 pairs each, as a user runs them: losses and adapter are TRL's to 1e-4."""
    from trl import DPOConfig, DPOTrainer

    settings = dict(
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        num_train_epochs=20,
        warmup_steps=2,
        beta=0.5,
    )
    model = load_model(base)
    add_lora(model, config(lora_alpha=32), seed=42)
    trainer = trl_trainer(
        DPOTrainer,
        DPOConfig,
        base,
        rows,
        peft_twin(base, model),
        tmp_path / "trl",
        **settings,
    )
    trainer.train()
    dpo.main(flags(base, rows, tmp_path / "run", **settings))
    lines = [line for line in tracking.read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(theirs) == 20 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    for ours, their in zip(lines, theirs):
        for name in (
            "loss",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "grad_norm",
        ):
            assert ours[name] == pytest.approx(float(their[name]), rel=1e-4, abs=1e-4), (
                name,
                ours["step"],
            )
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    close(
        found,
        {
            n.replace(".default", ""): p
            for n, p in trainer.model.named_parameters()
            if p.requires_grad
        },
        1e-4,
    )


# --- KTO ------------------------------------------------------------------------------------------


def answer(i):
    """A labelled answer; every third one is desirable, and their lengths differ."""
    sides = pair(i)
    return {"prompt": sides["prompt"], "completion": sides["chosen"], "label": i % 3 == 0}


def load_answers(base, file, **options):
    options = {"preference": "unpaired", **options}
    return [*sft.load_examples([str(file)], sft.Tokenizer(base), **options)[0]]


def prepare(model, examples, settings, tmp_path):
    """The loss of a step of all examples, which have their reference from now on."""
    settings.ref_cache = str(tmp_path / "reference")
    settings.per_device_train_batch_size = len(examples)
    plan = sft.Plan(examples, settings, dpo.count_pairs)
    dpo.before_training(model, plan, [], settings)
    return plan, partial(plan.prepare, partial(dpo.unpaired_loss, config=settings), examples)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.filterwarnings("ignore")
def test_losses_of_unpaired_answers_are_trls(kind, base, tmp_path):
    """KTOTrainer on the same rows in the plan's order, which its mismatched answers follow; loss,
    gradient, KL and rewards to 1e-5."""
    from trl import KTOConfig, KTOTrainer

    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    lines = [json.dumps(answer(i)) for i in range(COUNT)]
    ours.write_text("\n".join(lines))
    weights = dict(desirable_weight=1.7, undesirable_weight=0.6, beta=0.3)
    settings, examples = config(loss_type=[kind], **weights), load_answers(base, ours)
    model = load_model(base)
    add_lora(model, settings, seed=1)
    plan, step_loss = prepare(model, examples, settings, tmp_path)
    theirs.write_text("\n".join(lines[i] for i in plan.select(0)[1]))
    twin = peft_twin(base, model)
    options = dict(loss_type=kind, **weights)
    trainer = trl_trainer(KTOTrainer, KTOConfig, base, theirs, twin, tmp_path, **options)
    for seed in (0, 1):  # a mean log-ratio above 0, and one below
        move(model, seed)
        copy_adapter(model, trainer.model)
        loss, metrics, found = unpaired_gradient(model, examples, step_loss())
        their_loss, their_metrics, their_gradient = trl_gradient(trainer, WHOLE)
        assert loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
        close(found, {n: g for n, g in their_gradient.items() if ".ref." not in n})
        assert len(metrics.keys() & their_metrics.keys()) == 6
        for name in metrics.keys() & their_metrics.keys():
            assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-5, abs=2e-5), name
        assert (metrics["kl"] > 1) == (kind == "kto" and seed == 0) == (metrics["kl"] != 0)


def unpaired_gradient(model, examples, loss_fn, budget=10**6):
    model.zero_grad()
    loss, sums = sft.accumulate(model, examples, len(examples), loss_fn, budget)
    found = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    sums = {name: value / len(examples) for name, value in sums.items()}
    return loss / len(examples), sums, found


def test_one_answer_has_no_other_to_estimate_a_kl_on():
    with pytest.raises(UserError, match="give 2 rows or more"):
        dpo.mismatch([["prompt", "answer"]], 8)
    assert dpo.mismatch([], 8) == {}


def test_any_cut_of_unpaired_answers_gives_the_same_gradient(base, tmp_path, monkeypatch):
    """1×8 = 8×1 with the step's KL, and the ranks' shares of it add up to it."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(answer(i)) for i in range(COUNT)))
    settings, examples = config(loss_type=["kto"]), load_answers(base, file)
    model = load_model(base)
    add_lora(model, settings, seed=1)
    _, step_loss = prepare(model, examples, settings, tmp_path)
    move(model)
    loss_fn = step_loss()
    assert loss_fn.keywords["kl"] > 1
    loss, metrics, found = unpaired_gradient(model, examples, loss_fn)
    again, same, cut = unpaired_gradient(model, examples, loss_fn, budget=1)
    assert loss == pytest.approx(again, rel=1e-6)
    assert metrics == pytest.approx(same, rel=1e-5, abs=1e-6)
    close(found, cut, 2e-6)
    settings.micro_batch_tokens = 1
    parts = []
    for number in range(3):
        monkeypatch.setattr(dpo, "rank", lambda number=number: number)
        monkeypatch.setattr(dpo, "shares_of", lambda examples: sft.shares_of(examples, 3))
        monkeypatch.setattr(dpo, "sum_numbers", lambda sums: parts.append(sums["kl"]) or sums)
        step_loss()
    assert sum(parts) / COUNT == pytest.approx(loss_fn.keywords["kl"], rel=1e-5)


def test_pairs_are_split_as_in_trl_and_labels_are_read(base, tmp_path):
    """unpair_preference_dataset's rows; labels as numbers, conversations, and a prompt
    with what its answer of another length left of it."""
    from datasets import Dataset
    from trl import unpair_preference_dataset

    pairs = [pair(i) for i in range(3)]
    theirs = unpair_preference_dataset(Dataset.from_list(pairs))
    expected = sorted((row["prompt"], row["completion"], row["label"]) for row in theirs)
    own = [row for one in pairs for row in unpair(one, True)]
    assert sorted((row["prompt"], row["completion"], row["label"]) for row in own) == expected
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": turns, "label": 0}, {"prompt": "a", "completion": "b", "label": 1}]
    rows.append({"prompt": turns[:3], "completion": turns[3:], "label": False})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, pairs[0]])))
    examples = load_answers(base, file)
    assert [example[1].sequence for example in examples] == [1, 0, 1, 0, 1]
    assert all(example[0].sequence == 1 and example[1].prefix == 0 for example in examples)
    first, _, third, *_ = examples
    for mine, same in zip(first, third):
        assert (mine.ids == same.ids).all() and (mine.labels == same.labels).all()
    (prompt, chosen), (_, rejected) = examples[3:]
    whole, *sides = load_pairs(base, write_lines(tmp_path / "pair.jsonl", pairs[:1]))[0]
    for part, side in zip((chosen, rejected), sides):
        assert (
            np.concatenate([prompt.ids, part.ids]) == np.concatenate([whole.ids, side.ids])
        ).all()
    others = dpo.mismatch(examples, max_length=len(first[0].ids) + 1)
    assert len(others[id(first)][1].ids) == 1 and others[id(first)][1].ids[0] == rejected.ids[0]


def write_lines(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_kto_starts_at_one_half_resumes_bit_for_bit_and_learns(base, many, tmp_path):
    """On pairs, split: KL and rewards are 0 at first and the loss 1/2, to the last bit, in
    micro-batches of a few answers; then desirable answers gain on the others."""
    settings = dict(loss_type="kto", num_train_epochs=4, learning_rate=2e-3, eval_data=many)
    settings |= dict(micro_batch_tokens=150, save_steps=10)
    for name in ("whole", "halves"):
        dpo.main(flags(base, many, tmp_path / name, **settings))
    held, first, *_, last = [
        line for line in tracking.read_log(tmp_path / "whole" / "log.jsonl") if "step" in line
    ][:-1]
    for prefix, line in (("eval_", held), ("", first)):
        names = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins")
        assert all(line[prefix + name] == 0.0 for name in names)
        assert line[prefix + "loss"] == 0.5
    assert last["eval_loss"] < 0.4 and last["eval_rewards/margins"] > 0.8 and last["eval_kl"] > 1
    for name in ("checkpoint-000020", "checkpoint-000024", "adapter"):
        shutil.rmtree(tmp_path / "halves" / name)
    log = tmp_path / "halves" / "log.jsonl"
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= 10]
    log.write_text("\n".join(kept) + "\n")
    dpo.main(flags(base, many, tmp_path / "halves", **settings))
    assert without_times(tmp_path / "whole" / "log.jsonl") == without_times(log)


# --- the reference --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A Qwen2 with biases, for what trains them."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("base") / "biased", vocab_size=259, model_type="qwen2"
    )
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter as SFT leaves it: B is not zero, a norm trained, dropout in its settings."""
    model, folder = load_model(base), tmp_path_factory.mktemp("adapter") / "adapter"
    add_lora(
        model,
        config(lora_dropout=0.1, modules_to_save=["post_attention_layernorm"]),
        seed=3,
    )
    move(model)
    write_adapter(model, folder.mkdir() or folder, "base")
    return folder


STARTS = {
    "lora": {}, "adapter": dict(adapter="adapter"), "bias and norms": dict(bias="all", modules_to_save="norm"),  # noqa: E501
    "head": dict(modules_to_save="lm_head"), "adapted head": dict(target_modules="q_proj,lm_head"),
    "full": dict(lora_r=0), "checkpointing": dict(gradient_checkpointing=True),
    "eager": dict(attn_implementation="eager"), "qlora": dict(load_in_4bit=True),
    "qlora on an adapter": dict(load_in_4bit=True, adapter="adapter"),
    "dora": dict(use_dora=True), "pissa on 4 bits": dict(load_in_4bit=True, init_lora_weights="pissa"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", STARTS)
def test_step_0_has_margin_0_and_loss_ln_2(start, dtype, base, biased, adapter, many, tmp_path):
    """Whatever trains and in bf16 too, to the last bit, in micro-batches of a few pairs; held-out
    pairs as well."""
    settings = STARTS[start] | ({"adapter": adapter} if "adapter" in STARTS[start] else {})
    model = base
    if start == "bias and norms":
        model = biased
    if start == "adapted head":
        model = write_checkpoint(tmp_path / "untied", vocab_size=259, tie_word_embeddings=False)
        write_tokenizer(model)
    argv = flags(model, many, tmp_path / "run", max_steps=1, micro_batch_tokens=150, dtype=dtype, eval_data=many,  # noqa: E501
                 save_strategy="no", warmup_ratio=0, **settings)  # fmt: skip
    dpo.main(argv)
    held, first, moved, _ = tracking.read_log(tmp_path / "run" / "log.jsonl")
    for prefix, line in (("eval_", held), ("", first)):
        assert (
            line[prefix + "rewards/margins"]
            == line[prefix + "rewards/chosen"]
            == line[prefix + "kl"]
            == 0.0
        )
        assert line[prefix + "loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert moved["eval_rewards/margins"] != 0 and moved["eval_kl"] > 0


def test_dropout_is_off_unless_it_is_wanted(base, many, tmp_path):
    """With --disable_dropout false the reference still has none: a margin from the first step on,
    but not held out."""
    model, folder = load_model(base), tmp_path / "adapter"
    add_lora(model, config(lora_dropout=0.5), seed=42)
    move(model)
    write_adapter(model, folder.mkdir() or folder, "base")
    for wanted in ("false", "true"):
        dpo.main(flags(base, many, tmp_path / wanted, max_steps=1, adapter=folder, eval_data=many,
                       disable_dropout=wanted))  # fmt: skip
        held, first = tracking.read_log(tmp_path / wanted / "log.jsonl")[:2]
        assert held["eval_rewards/chosen"] == 0.0 and (first["rewards/chosen"] == 0.0) == (
            wanted == "true"
        )


def scored_under(base, examples, **options):
    """What the model of `base` gives the scored tokens, an example at a time."""
    model = load_model(base, **options)
    return [model.logps(sft.Batch.pack([example])).detach() for example in examples]


def test_another_reference(base, biased, rows, tmp_path):
    """--ref_model: margins are those to that model; its size may be another, its vocabulary may not
    be smaller."""
    other = write_checkpoint(tmp_path / "other", seed=5, vocab_size=259, num_hidden_layers=1)
    dpo.main(flags(base, rows, tmp_path / "run", max_steps=1, ref_model=other))
    line = tracking.read_log(tmp_path / "run" / "log.jsonl")[0]
    examples = load_pairs(base, rows)
    policy, reference = scored_under(base, examples), scored_under(other, examples)
    margins = [
        (p - r).split([len(e[1].ids), len(e[2].ids)])
        for p, r, e in zip(policy, reference, examples)
    ]
    margin = sum(float(chosen.sum() - rejected.sum()) for chosen, rejected in margins) / len(
        examples
    )
    assert line["rewards/margins"] == pytest.approx(0.1 * margin, rel=1e-4)
    small = write_checkpoint(tmp_path / "small", vocab_size=60)
    with pytest.raises(UserError, match="ref_model: .*tokenizer"):
        dpo.main(flags(base, rows, tmp_path / "again", ref_model=small))


def test_a_resume_under_another_reference_is_refused(base, rows, tmp_path):
    """The weights behind --ref_model changed since the checkpoint."""
    other = write_checkpoint(tmp_path / "other", seed=5, vocab_size=259, num_hidden_layers=1)
    argv = flags(base, rows, tmp_path / "run", save_steps=1, ref_model=other)
    dpo.main(argv)
    log = tmp_path / "run" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # as before the end
    write_checkpoint(other, seed=6, vocab_size=259, num_hidden_layers=1)
    with pytest.raises(UserError, match="was trained with weights of --ref_model"):
        dpo.main(argv)


def test_the_rankings_are_those_of_the_model_that_is_kept(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    names = "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/accuracies"
    lines = [{"step": step, **dict.fromkeys(names, step / 8)} for step in (0, 2, 4)]
    for results, kept in (({"best_step": 2}, 2), ({}, 4), ({"best_step": 0}, 0)):
        log.write_text("\n".join(map(json.dumps, [*lines, {"step": 4, **results}])))
        dpo.print_rankings(log)
        printed = capsys.readouterr().out.splitlines()
        expected = ["evaluation set at step 0: margin 0.000, 0.0% by log-prob"]
        if kept:  # before, no pair has another reward than its counterpart
            ranked = f"{kept / 8:.1%} ranked right by reward, {kept / 8:.1%} by log-prob"
            expected.append(f"evaluation set at step {kept}: margin {kept / 8:.3f}, {ranked}")
        assert printed == expected


def test_the_reference_is_kept_by_what_it_hangs_on(base, adapter, many, tmp_path, capsys):
    """Other betas, rates, losses and ranks read it; other weights, rows, packings do not."""

    def reads(name, model=base, data=many, **settings):
        dpo.main(flags(model, data, tmp_path / name, **{"max_steps": 1, **settings}))
        assert tracking.read_log(tmp_path / name / "log.jsonl")[0]["rewards/margins"] == 0.0
        return "reference: read" in capsys.readouterr().out

    assert not reads("first")
    assert (
        reads("rate", learning_rate=1e-3)
        and reads("beta", beta=0.5, loss_type="ipo")
        and reads("rank", lora_r=2)
    )
    assert not reads("adapter", adapter=adapter) and reads("again", adapter=adapter, beta=1)
    assert not reads("order", seed=1) and not reads("packing", micro_batch_tokens=100)
    other = tmp_path / "rows.jsonl"
    other.write_text(many.read_text().replace("surely", "truly"))
    assert not reads("rows", data=other)
    reseeded = write_checkpoint(tmp_path / "reseeded", seed=9, vocab_size=259)
    write_tokenizer(reseeded)
    assert not reads("weights", model=reseeded)
    broken = sorted((tmp_path / "reference").iterdir())
    for file in broken:
        file.write_bytes(b"half a file")
    assert not reads("broken")
    first, last = (
        tracking.read_log(tmp_path / name / "log.jsonl")[0]["loss"]
        for name in ("first", "broken")
    )
    assert first == last


@pytest.mark.parametrize(
    "damage",
    ["bit", "nan", "cut", "old layout", "empty", "folder", "no place", "left over"],
)
def test_a_damaged_reference_is_made_anew(damage, base, many, tmp_path, monkeypatch, capsys):
    """A bit that changes one log-prob a little, NaN, a file without its checksum: the same values
    again. Where it can't be kept, the run goes on with them."""
    from safetensors.torch import save_file

    folder = tmp_path / "reference"
    settings = dpo.DPOConfig(model=str(base), data=[str(many)], ref_cache=str(folder))

    def references():
        examples = load_pairs(base, many)
        plan = sft.Plan(examples, settings, dpo.count_pairs)
        dpo.add_reference(model, plan, [], settings)
        return [part.reference for example in examples for part in example]

    model = load_model(base)
    before = references()
    (file,) = folder.iterdir()
    written = file.read_bytes()
    logps = load_file(file)["logps"]
    if damage == "bit":
        place = written.index(logps.numpy().tobytes())
        file.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
    elif damage == "nan":
        save_file({**load_file(file), "logps": logps * float("nan")}, file)
    elif damage == "cut":
        file.write_bytes(written[:-5])
    elif damage == "old layout":
        save_file({"logps": logps + 1}, file)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "no place":
        settings.ref_cache = str(many / "reference")  # below a file
    else:
        file.with_suffix(".partial").write_bytes(b"half")
        file.unlink()
    capsys.readouterr()
    after = references()
    assert all(map(np.array_equal, before, after))
    printed = capsys.readouterr()
    assert "tokens scored" in printed.out and "read from" not in printed.out
    if damage in ("folder", "no place"):
        assert "not kept for the next run" in printed.err
    else:
        assert [path.read_bytes() for path in folder.iterdir()] == [written]


def test_no_reference_where_none_is_needed(base, rows, tmp_path):
    dpo.main(flags(base, rows, tmp_path / "run", loss_type="simpo", max_steps=1))
    dpo.main(flags(base, rows, tmp_path / "flag", reference_free="true", max_steps=1))
    assert not (tmp_path / "reference").exists()
    free, flag = (tracking.read_log(tmp_path / name / "log.jsonl")[0] for name in ("run", "flag"))
    assert "kl" not in free and flag["rewards/chosen"] == pytest.approx(
        0.1 * flag["logps/chosen"]
    )


# --- the plan -------------------------------------------------------------------------------------


def unshared(example):
    """The pair as two sequences, each with the prompt of its own."""
    prompt, *sides = example
    return [Segment(*(np.concatenate([a, b]) for a, b in ((prompt.ids, side.ids), (prompt.labels, side.labels))),  # noqa: E501
                    sequence=side.sequence, reference=side.reference) for side in sides]  # fmt: skip # noqa: E501


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "orpo"])
def test_a_shared_prompt_has_the_gradient_of_two(kind, trained):
    model, examples, _ = trained
    settings = config(loss_type=[kind])
    loss, metrics, shared = gradient(model, examples, settings)
    again, same, apart = gradient(model, [unshared(example) for example in examples], settings)
    assert loss == pytest.approx(again, rel=1e-6)
    for name, value in metrics.items():
        assert value == pytest.approx(same[name], rel=1e-5, abs=1e-5)
    close(shared, apart, 2e-6)


@pytest.mark.parametrize("kind", [name for name in dpo.LOSSES if not dpo.LOSSES[name].unpaired])
def test_any_cut_into_micro_batches_gives_the_same_gradient(kind, trained):
    """1×8 = 8×1 for every loss. Those that sort the step's pairs have it in one micro-batch,
    whatever is asked for."""
    model, examples, _ = trained
    settings = config(loss_type=[kind], label_smoothing=0.1, micro_batch_tokens=1)
    loss, metrics, found = gradient(model, examples, settings)
    budget = sft.token_budget(settings, model.device)
    assert len(list(sft.split_by_tokens(examples, budget))) == (1 if "aot" in kind else COUNT)
    again, same, cut = gradient(model, examples, settings, budget)
    assert loss == pytest.approx(again, rel=1e-6) and metrics == pytest.approx(
        same, rel=1e-5, abs=1e-5
    )
    close(found, cut, 5e-6)  # sppo_hard is a difference of two large squares


def test_a_weight_of_two_is_the_pair_twice(trained):
    model, examples, _ = trained
    heavy = [[s._replace(weight=2.0) for s in examples[0]], *examples[1:]]
    count = sum(map(dpo.count_pairs, heavy))
    assert count == COUNT + 1
    loss = partial(dpo.dpo_loss, config=config(rpo_alpha=0.3))
    ours = sft.accumulate(model, heavy, count, loss, 10**6)
    twice = sft.accumulate(model, [examples[0], *examples], count, loss, 10**6)
    assert ours[0] == pytest.approx(twice[0], rel=1e-6) and ours[1] == pytest.approx(
        twice[1], rel=1e-5, abs=1e-5
    )


def test_rpo_alpha_is_the_sft_loss_beside(trained):
    model, examples, _ = trained
    one = gradient(model, examples, config(rpo_alpha=0.3))
    other = gradient(
        model, examples, config(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    )
    assert one[0] == other[0] and one[1] == other[1]


def test_label_smoothing_is_the_mean_over_flipped_labels(trained):
    """Conservative DPO: the expected loss if each pair is flipped with probability ε."""
    model, examples, _ = trained
    flipped = [[p, b._replace(sequence=0), a._replace(sequence=1)] for p, a, b in examples]
    right, wrong = (gradient(model, part, config())[0] for part in (examples, flipped))
    smooth = gradient(model, examples, config(label_smoothing=0.2))[0]
    assert smooth == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "orpo"])
def test_training_prefers_what_is_chosen(kind, base, many, tmp_path):
    dpo.main(
        flags(
            base,
            many,
            tmp_path / "run",
            loss_type=kind,
            num_train_epochs=8,
            beta=0.5,
            eval_data=many,
        )
    )
    lines = [
        line for line in tracking.read_log(tmp_path / "run" / "log.jsonl") if "eval_loss" in line
    ]
    assert (
        lines[-1]["eval_rewards/accuracies"] > 0.7
        and lines[-1]["eval_loss"] < 0.8 * lines[0]["eval_loss"]
    )
    assert lines[-1]["eval_rewards/margins"] > lines[0]["eval_rewards/margins"] + 0.3


# --- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(lora_r=0, learning_rate=1e-3),
        dict(adapter="adapter", loss_type="sigmoid,sft"),
    ],
    ids=["lora", "full", "adapter"],
)
def test_two_halves_are_the_whole_bit_for_bit(settings, base, adapter, many, tmp_path):
    """6 steps, against 6 of which the last 4 were done again from a checkpoint, without the cache:
    the reference is that of the start, not of the checkpoint. Weights, optimizer and log are
    equal to the last bit."""
    settings = settings | ({"adapter": adapter} if "adapter" in settings else {})
    dpo.main(flags(base, many, tmp_path / "whole", **settings))
    dpo.main(flags(base, many, tmp_path / "halves", **settings))
    for name in ("checkpoint-000004", "checkpoint-000006", "adapter", "merged"):
        shutil.rmtree(tmp_path / "halves" / name, ignore_errors=True)
    log = tmp_path / "halves" / "log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:4]) + "\n")
    shutil.rmtree(tmp_path / "reference")
    dpo.main(flags(base, many, tmp_path / "halves", **settings))
    kept = "model.safetensors" if settings.get("lora_r") == 0 else "adapter_model.safetensors"
    for name in ("optimizer.safetensors", kept):
        assert same_tensors(
            *(tmp_path / run / "checkpoint-000006" / name for run in ("whole", "halves"))
        ), name
    assert without_times(tmp_path / "whole" / "log.jsonl") == without_times(log)


def test_a_dry_run_foresees_and_leaves_nothing(base, many, tmp_path, capsys):
    dpo.main([*flags(base, many, tmp_path / "run"), "--dry_run"])
    told = capsys.readouterr().out
    assert (
        "peak memory" in told
        and "forward and backward, at" in told
        and not (tmp_path / "run").exists()
    )


def test_a_run_logs_trls_names_and_draws_them(base, adapter, tmp_path, capsys):
    """Going on from an adapter with questions to answer: log, curves, adapter and merged model are
    all there."""
    file = tmp_path / "chats.jsonl"
    chats = [
        {
            "prompt": [{"role": "user", "content": f"number {i}?"}],
            "chosen": f"It is {i}.\nAnswer: {'ABCD'[i % 4]}",
            "rejected": f"It is not {i}.\nAnswer: {'BCDA'[i % 4]}",
            "choices": ["A", "B", "C", "D"],
        }
        for i in range(12)
    ]
    file.write_text("\n".join(map(json.dumps, chats)))
    dpo.main(flags(base, file, tmp_path / "run", adapter=adapter, val_size=4, eval_answers=4, max_new_tokens=8,  # noqa: E501
                   num_train_epochs=1, merge=True))  # fmt: skip
    run, output = tmp_path / "run", capsys.readouterr().out
    names = {
        "adapter",
        "merged",
        "config.json",
        "data_report.json",
        "log.jsonl",
        "training_loss.png",
    }
    assert names <= {p.name for p in run.iterdir()}
    lines = tracking.read_log(run / "log.jsonl")
    wanted = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",  # noqa: E501
              "logps/rejected", "loss", "kl"}  # fmt: skip
    assert wanted <= lines[1].keys() and {f"eval_{name}" for name in wanted} <= lines[0].keys()
    assert (
        "answers right on 4 evaluation questions" in output
        and "evaluation set at step 1" in output
    )
    assert "r 4, alpha 8" in output and "eval_answers" in lines[-1]
    assert "on up to 4 of them" in (run / "README.md").read_text()
    plain, merged = load_model(base), load_model(run / "merged")
    load_adapter(plain, run / "adapter")
    examples = load_pairs(base, file)
    batch = sft.Batch.pack(examples)
    assert (plain.logps(batch) - merged.logps(batch)).abs().max() < 1e-4
    assert plain.adapter.lora_dropout == 0.1  # off while training, still the adapter's


def test_the_plot_has_a_panel_for_each_thing_logged(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, file, **_: (
            file.touch() or seen.append([axes.get_ylabel() for axes in figure.axes])
        ),
    )
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "eval_loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
    tracking.plot_losses(log, sft.SFTConfig().unit)
    log.write_text(
        '{"step": 1, "loss": 1.0, "rewards/margins": 0.1, "rewards/accuracies": 0.5}\n'
    )
    tracking.Log(tmp_path, 10**6, unit=dpo.DPOConfig().unit).plot()
    tracking.plot_losses(log, dpo.DPOConfig(loss_type=["kto"]).unit)
    assert seen == [
        ["loss (mean per scored token)"],
        ["loss (mean per pair)", "reward margin", "pairs ranked right"],
        ["loss (mean per answer)", "reward margin", "answers ranked right"],
    ]


def test_without_arguments_the_embedded_sft_comes_first(tmp_path, monkeypatch):
    """`python dpo.py`: what sft.py makes is made first where it is not there, finished, and is what
    training goes on from. With a model of one's own nothing is made."""
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(sft, "main", lambda argv: calls.append(argv))
    monkeypatch.setattr(sft, "run", lambda config, *_, **options: calls.append(config))
    monkeypatch.setattr(dpo, "read_log", lambda path: [{"step": 1}])
    dpo.main([])
    assert (
        calls[0] == []
        and calls[1].adapter == "output/sft"
        and calls[1].output_dir == "output/dpo"
    )
    assert all(file.endswith("_pairs.jsonl") for file in calls[1].data + calls[1].eval_data)
    (tmp_path / "output" / "sft" / "checkpoint-000100").mkdir(parents=True)
    dpo.main(["--beta", "0.2"])
    assert calls[2] == [] and calls[3].beta == 0.2
    (tmp_path / "output" / "sft" / "adapter").mkdir()
    dpo.main([])
    dpo.main(["--model", "some/other", "--adapter", "output/sft"])
    assert [call.model for call in calls[4:]] == [calls[1].model, "some/other"]


# --- rows and mistakes ----------------------------------------------------------------------------

ROWS = {
    "the same": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same"),
    "empty side": ({"prompt": "q", "chosen": "", "rejected": "a"}, "nothing scored"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "share no prompt"),
    "no prompt in chats": (
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}, "share no prompt"),  # noqa: E501
    "answer too long": ({"prompt": "q", "chosen": "a" * 200, "rejected": "b"}, "answer longer than max_length"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_a_row_of_no_use_is_counted_and_all_of_them_stop_the_run(
    case, base, many, tmp_path, capsys
):
    row, reason = ROWS[case]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*many.read_text().splitlines(), json.dumps(row)]))
    examples, ledger = sft.load_examples(
        [file], sft.Tokenizer(base), max_length=100, preference=True
    )
    (found,) = ledger.reasons
    assert reason in found and ledger.reasons[found]["rows"] == 1 and len(examples) == 21
    assert ledger.tokens == ledger.scored + ledger.masked + ledger.truncated + ledger.dropped
    file.write_text(json.dumps(row))
    error = refuse(flags(base, file, tmp_path / "run", max_length=100), capsys)
    assert (
        "nothing to train on" in error
        and reason in error
        and not list((tmp_path / "run").glob("*"))
    )


def test_a_prompt_longer_than_max_length_gives_way(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"prompt": "long " * 50 + "end", "chosen": " yes", "rejected": " no, never"})
    )
    ((prompt, chosen, rejected),), ledger = sft.load_examples(
        [file], sft.Tokenizer(base), max_length=30, preference=True
    )
    assert (
        len(prompt.ids) + len(rejected.ids) == 30
        and len(chosen.ids) == 5
        and ledger.rows_truncated == 1
    )


def test_sides_share_tokens_not_characters(base):
    """What both sides begin with, unscored, is the prompt, however it was said; every side reads as
    it would alone."""
    tokenizer = sft.Tokenizer(base)

    def as_turn(*texts):
        return [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(texts)
        ]

    row = {"prompt": as_turn("hello", "hi"), "chosen": as_turn("once more", "yes"),
           "rejected": as_turn("once again", "no", "why", "so")}  # fmt: skip
    prompt, *sides = render_row(row, tokenizer, preference=True)
    for side, answer in zip(sides, (row["chosen"], row["rejected"])):
        text = tokenizer.render(row["prompt"] + answer).removesuffix("\n")
        whole = np.concatenate([prompt.ids, side.ids]).tolist()
        assert whole[: len(tokenizer.encode(text))] == tokenizer.encode(text)
    assert (prompt.labels < 0).all() and sides[0].ids[0] != sides[1].ids[0]
    assert tokenizer.decode(prompt.ids, False).endswith("once ")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_unties_the_model_is_to_be_merged_first(base, rows, tmp_path):
    """PEFT trains the two ends of a tied model apart; merged/ would come with a config.json that
    ties them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        ensure_weight_tying=False,
    )
    get_peft_model(reference, settings).save_pretrained(tmp_path / "apart")
    with pytest.raises(UserError, match="merge it first"):
        dpo.main(flags(base, rows, tmp_path / "run", adapter=tmp_path / "apart"))


def refuse(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: dpo.main(argv))
    error = capsys.readouterr().err.strip()
    assert (
        stopped.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) <= 2
    )
    return error


MISTAKES = {
    "loss": (dict(loss_type="sigmod"), ["loss_type", "sigmoid"]),
    "one of several": (dict(loss_type="sigmoid,hing"), ["loss_type", "hinge"]),
    "weights": (dict(loss_type="sigmoid,sft", loss_weights=0.5), ["loss_weights", "2"]),
    "beta": (dict(beta=0), ["beta"]),
    "smoothing": (dict(label_smoothing=0.5), ["label_smoothing"]),
    "exo": (dict(loss_type="exo_pair"), ["label_smoothing", "exo_pair"]),
    "two references": (
        dict(ref_model="m", reference_free="true"),
        ["ref_model", "reference_free"],
    ),
    "no reference for these": (dict(ref_model="m", loss_type="orpo"), ["ref_model"]),
    "no such reference": (dict(ref_model="nowhere/at/all"), ["nowhere/at/all"]),
    "no such adapter": (dict(adapter="nowhere/at/all"), ["nowhere/at/all"]),
    "full from an adapter": (dict(adapter="a", lora_r=0), ["lora_r", "merge"]),
    "unknown flag": (dict(bta=1), ["--bta", "beta"]),
    "kto and another": (dict(loss_type="kto,sigmoid"), ["loss_type", "another"]),
    "not for kto": (dict(loss_type="kto", ld_alpha=0.5), ["kto does not go with ld_alpha"]),
    "for kto": (dict(desirable_weight=2), ["sigmoid does not go with desirable_weight"]),
    "kto's recipe": (dict(loss_type="kto", recipe="ultrafeedback"), ["kto", "recipe"]),
    "no label": (dict(loss_type="kto", data="sft.jsonl"), ["sft.jsonl:1", "label", "chosen"]),
    "sft rows": (dict(data="sft.jsonl"), ["sft.jsonl:1", "chosen"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_and_costs_nothing(case, base, rows, tmp_path, capsys):
    settings, names = MISTAKES[case]
    if "data" in settings:
        (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}')
        settings = settings | {"data": tmp_path / "sft.jsonl"}
    error = refuse(flags(base, rows, tmp_path / "run", **settings), capsys)
    assert all(name in error for name in names), error
    assert not list((tmp_path / "run").glob("*"))


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        dpo.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = [field.name for field in fields(dpo.DPOConfig)]
    assert all(f"--{name}" in text for name in names)
    assert "(default: 1e-06)" in text and "DPO: " in text

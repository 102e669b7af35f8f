"""Direct preference optimisation: the losses, the reference, and the command. The loop is that of sft.py.

The decision that is not obvious: the reference is the model that training starts from, and never a second one in
memory. Before the first step the policy itself, without dropout, walks the micro-batches that the plan's first epoch
will have, and what it gives every scored token goes with the data from then on. The same packing rounds the same, so
step 0 has margin 0 and loss ln 2 to the last bit, whatever trains. What was found is kept under a hash of all it hangs
on (weights, adapter, tokens, packing), for the runs of a sweep and for a resume.

A pair is one prompt with two continuations (see model.py): the prompt is computed once. A step's loss is the mean over
its pairs, also where TRL's is one over a batch's tokens (sft): there it equals TRL's per_device_train_batch_size 1. aot
compares all pairs of a step, which then is one micro-batch, whatever micro_batch_tokens: its size must fit the memory.

DPO: Rafailov et al. 2023, arXiv:2305.18290. Names and definitions are those of TRL's DPOConfig, if not said otherwise.

    python dpo.py                                        # goes on from what `python sft.py` makes, half a minute
    python dpo.py --model Qwen/Qwen3-0.6B --adapter output/mine --data pairs.jsonl --output_dir output/mine-dpo
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn.functional import logsigmoid, relu
from tqdm import tqdm

import sft
from eval import EXAMPLES
from lora import lora_layers
from model import IGNORE
from qlora import load_4bit
from sft import SFTConfig, micro_batches, read_config, token_budget
from support.errors import UserError, nearest, run_command
from support.files import locked_folder, read_tensor, write_tensors
from support.settings import check_range
from support.tracking import read_log


@dataclass
class DPOConfig(SFTConfig):
    """The settings of SFT, and those of TRL's DPOConfig and CPOConfig."""

    output_dir: str = "output/dpo"  # the run folder
    learning_rate: float = (
        1e-6  # peak learning rate: TRL's, for full fine-tuning; a LoRA wants about ten times that
    )
    beta: float = 0.1  # how dear it is to leave the reference; ipo's tau, orpo's lambda
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"]
    )  # one or several of preference_loss's
    loss_weights: list[float] = field(default_factory=list)  # of several losses; none: 1 each
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round, below 0.5
    rpo_alpha: float = 0.0  # adds this much of the chosen answer's mean token loss (RPO; loss_type sft is the same)
    simpo_gamma: float = 0.5  # simpo: the margin wanted between the average log-probs times beta
    cpo_alpha: float = 1.0  # cpo: weight of the chosen answer's mean token loss
    discopop_tau: float = 0.05  # discopop: temperature of the blend
    ref_model: str = ""  # folder or hub id of another reference than the model training starts from
    reference_free: bool = False  # a reference that finds every answer equally likely
    ref_cache: str = (
        "output/reference"  # where the reference's log-probs are kept, by what they hang on
    )
    disable_dropout: bool = True  # train without the adapter's dropout

    def __post_init__(self):
        if not self.data:
            self.data = [str(EXAMPLES / "mcqa" / "train_pairs.jsonl")]
            self.eval_data = self.eval_data or [str(EXAMPLES / "mcqa" / "validation_pairs.jsonl")]
        super().__post_init__()
        for name in self.loss_type or [""]:
            if name not in LOSSES:
                raise UserError(
                    f"loss_type: {name!r} is not one of {', '.join(LOSSES)}" + nearest(name, LOSSES)
                )
        self.loss_weights = self.loss_weights or [1.0] * len(self.loss_type)
        if len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"loss_weights: {len(self.loss_weights)} for {len(self.loss_type)} loss types; one each"
            )
        if not self.beta > 0 or not self.discopop_tau > 0:
            raise UserError(
                f"beta and discopop_tau are above 0, not {self.beta} and {self.discopop_tau}"
            )
        if (
            not 0 <= self.label_smoothing < 0.5
            or "exo_pair" in self.loss_type
            and not self.label_smoothing
        ):
            raise UserError(
                f"label_smoothing: {self.label_smoothing} is not from 0 to below 0.5, and for exo_pair "
                "above 0 (its paper: 0.001)"
            )
        check_range(self, 0, "rpo_alpha", "cpo_alpha", "simpo_gamma")
        if min(self.loss_weights) < 0 or not sum(self.loss_weights) + self.rpo_alpha > 0:
            raise UserError(
                f"loss_weights: {self.loss_weights} are not from 0 up, and one of them above it"
            )
        self.reference_free |= set(self.loss_type) <= REFERENCE_FREE
        if self.ref_model and self.reference_free:
            raise UserError(
                "ref_model: has no use with reference_free or losses that compare with none; leave it out"
            )
        if SORTING & set(self.loss_type):
            self.micro_batch_tokens = sys.maxsize


# --- the losses -------------------------------------------------------------------------------------------------------

LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "aot_pair",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
    "simpo",
    "orpo",
    "cpo",
)
SORTING = {
    "aot",
    "aot_unpaired",
    "aot_pair",
}  # all pairs of a step: it is one micro-batch, as is the held-out set
REFERENCE_FREE, AVERAGED = (
    {"sft", "simpo", "orpo", "cpo"},
    {"simpo", "orpo"},
)  # AVERAGED: rewards are means over tokens


def preference_loss(
    kind, chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, c
):
    """Losses (P,) of P pairs, from both answers' log-probs (P,) under policy and reference, summed over their tokens,
    and the tokens' numbers (P,). c: DPOConfig.

    Below, p is log π(y), w and l are log π(y) - log π_ref(y) of the chosen and the rejected answer, x = β(w - l), and
    |·| divides by the answer's number of tokens. S(z) = -(1-ε) log σ(z) - ε log σ(-z) with ε = label_smoothing
    (conservative DPO: Mitchell 2023; TRL has ε in robust, exo_pair, aot, cpo and simpo alone).

    sigmoid       S(x)                                        DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7
    sigmoid_norm  S(β(|w| - |l|))                             Tülu 3's DPO: Lambert et al. 2024, arXiv:2411.15124
    hinge         max(0, 1 - x)                               RSO's hinge-norm: Liu et al. 2023, arXiv:2309.06657
    ipo           (|w| - |l| - 1/(2β))²                       Azar et al. 2023, arXiv:2310.12036, eq. 17
    robust        (-(1-ε) log σ(x) + ε log σ(-x)) / (1-2ε)    rDPO: Chowdhury et al. 2024, arXiv:2403.00409
    exo_pair      KL((σ(x), σ(-x)) ‖ (1-ε, ε))                Ji et al. 2024, arXiv:2402.00856, eq. 16
    nca_pair      -log σ(βw) - ½ log σ(-βw) - ½ log σ(-βl)    Chen et al. 2024, arXiv:2402.05369, two answers
    bco_pair      -log σ(βw) - log σ(-βl)                     Jung et al. 2024, arXiv:2404.04656, without its shift
    sppo_hard     (w - 1/(2β))² + (l + 1/(2β))²               Wu et al. 2024, arXiv:2405.00675, eq. 4.7
    aot           S(β(sorted(p_w - p_l) - sorted(its reference's)))   Melnyk et al. 2024, arXiv:2406.05882
    aot_unpaired  S(β(sorted(w) - sorted(l))), once aot_pair          the same
    apo_zero      1 - σ(βw) + σ(βl)                           D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7
    apo_down      σ(βw) + 1 - σ(x)                            the same, eq. 8
    discopop      -(1-m) log σ(x) + m exp(-x), m = σ(x/τ)     Lu et al. 2024, arXiv:2406.08414, eq. 5
    sft           -|p_w|                                      RPO's term: Pang et al. 2024, arXiv:2404.19733, eq. 1
    cpo           S(β(p_w - p_l)) + cpo_alpha·sft             Xu et al. 2024, arXiv:2401.08417, eqs. 3 and 4
    simpo         S(β|p_w| - β|p_l| - γ)                      Meng et al. 2024, arXiv:2405.14734, eq. 6
    orpo          sft - β log σ(o(|p_w|) - o(|p_l|)),         Hong et al. 2024, arXiv:2403.07691, eqs. 3 to 7
                  o(q) = q - log(1 - e^q)                     (TRL's sft term scores the prompt too)
    """
    beta, e = c.beta, torch.tensor(c.label_smoothing)
    w, l = chosen - ref_chosen, rejected - ref_rejected
    x, norm_w, norm_l = beta * (w - l), w / chosen_tokens, l / rejected_tokens
    mean_w, mean_l = chosen / chosen_tokens, rejected / rejected_tokens
    ordered = lambda values: values.sort()[0]
    odds = lambda q: q - (-q.expm1()).log()
    smooth = lambda z: -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)
    unpaired = lambda: smooth(beta * (ordered(w) - ordered(l)))
    return {
        "sigmoid": lambda: smooth(x),
        "sigmoid_norm": lambda: smooth(beta * (norm_w - norm_l)),
        "hinge": lambda: relu(1 - x),
        "ipo": lambda: (norm_w - norm_l - 0.5 / beta) ** 2,
        "robust": lambda: (e * logsigmoid(-x) - (1 - e) * logsigmoid(x)) / (1 - 2 * e),
        "exo_pair": lambda: (
            x.sigmoid() * (logsigmoid(x) - (-e).log1p())
            + (-x).sigmoid() * (logsigmoid(-x) - e.log())
        ),
        "nca_pair": lambda: (
            -logsigmoid(beta * w) - 0.5 * logsigmoid(-beta * w) - 0.5 * logsigmoid(-beta * l)
        ),
        "bco_pair": lambda: -logsigmoid(beta * w) - logsigmoid(-beta * l),
        "sppo_hard": lambda: (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2,
        "aot": lambda: smooth(
            beta * (ordered(chosen - rejected) - ordered(ref_chosen - ref_rejected))
        ),
        "aot_unpaired": unpaired,
        "aot_pair": unpaired,
        "apo_zero": lambda: (-beta * w).sigmoid() + (beta * l).sigmoid(),
        "apo_down": lambda: (beta * w).sigmoid() + (-x).sigmoid(),
        "discopop": lambda: torch.lerp(-logsigmoid(x), (-x).exp(), (x / c.discopop_tau).sigmoid()),
        "sft": lambda: -mean_w,
        "cpo": lambda: smooth(beta * (chosen - rejected)) - c.cpo_alpha * mean_w,
        "simpo": lambda: smooth(beta * (mean_w - mean_l) - c.simpo_gamma),
        "orpo": lambda: -mean_w - beta * logsigmoid(odds(mean_w) - odds(mean_l)),
    }[kind]()


def dpo_loss(model, batch, config):
    """(the pairs' summed loss, {metric, mostly TRL's: its sum over the pairs}) of a batch of preference examples.

    kl: r - 1 - log r summed over an answer's tokens, r = π/π_ref, mean of both answers: an estimate of KL(π_ref ‖ π)
    that is never negative (Schulman 2020, joschu.net/blog/kl-approx.html), as if the reference had written them."""
    logps = model.logps(batch)
    member = (
        batch.sequence == torch.arange(batch.num_sequences, device=logps.device)[:, None]
    ).float()

    def by_answer(
        values,
    ):  # (S,) -> chosen (P,), rejected (P,); a product, since index_add on CUDA adds in any order
        return (member @ values).view(-1, 2).unbind(1)

    tokens, (chosen, rejected), reference = map(
        by_answer, (torch.ones_like(logps), logps, batch.reference)
    )
    kinds = zip([*config.loss_type, "sft"], [*config.loss_weights, config.rpo_alpha])
    loss = sum(
        share * preference_loss(kind, chosen, rejected, *reference, *tokens, config)
        for kind, share in kinds
        if share
    )
    weight = by_answer(batch.weights)[0] / tokens[0]
    with torch.no_grad():
        if set(config.loss_type) <= AVERAGED:
            chosen, rejected = chosen / tokens[0], rejected / tokens[1]
        w, l, ratio = chosen - reference[0], rejected - reference[1], logps - batch.reference
        metrics = {
            "rewards/chosen": config.beta * w,
            "rewards/rejected": config.beta * l,
            "rewards/margins": config.beta * (w - l),
            "rewards/accuracies": w > l,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps/accuracies": chosen > rejected,
        }
        if not config.reference_free:
            metrics["kl"] = sum(by_answer(ratio.exp() - 1 - ratio)) / 2
        metrics = {name: (weight * value).sum() for name, value in metrics.items()}
    return (weight * loss).sum(), metrics


def count_pairs(example):
    """What a pair adds to the number that divides a step's loss: its weight."""
    return example[1].weight


# --- the reference ----------------------------------------------------------------------------------------------------


def content_hash(model, groups, budget):
    """Changes when anything does that the reference's log-probs hang on, down to the rounding: weights, adapter,
    arithmetic, tokens and their packing. A LoRA that has learned nothing yet is left out."""
    layers = lora_layers(model)
    fresh = {
        f"{name}.lora_{x}" for name, layer in layers.items() if not layer.lora_B.any() for x in "AB"
    }
    adapter = asdict(model.adapter) if len(fresh) < 2 * len(layers) else None
    digest = hashlib.sha256(
        json.dumps(
            [
                asdict(model.config),
                adapter,
                str(model.dtype),
                model.attention,
                model.device.type,
                budget,
                [len(group) for group in groups],
            ]
        ).encode()
    )
    for name, tensor in model.state_dict().items():
        if name not in fresh:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for segment in (segment for group in groups for example in group for segment in example):
        digest.update(
            np.int64(len(segment.ids)).tobytes()
            + np.asarray(segment.ids, np.int32).tobytes()
            + np.asarray(segment.labels, np.int32).tobytes()
        )
    return digest.hexdigest()[:32]


def add_reference(model, steps, held, config):
    """Gives every segment of the plan's and the held-out examples, in place, its scored tokens' log-probs under
    `model`: from the cache, or in one pass over the micro-batches that the first epoch and an evaluation will have."""
    budget, began = token_budget(config, model.device), time.perf_counter()
    groups = [steps[step] for step in range(min(len(steps), steps.steps_per_epoch))]
    groups += [held] * (len(held) > 0 and config.eval_strategy != "no")
    file = Path(config.ref_cache) / f"{content_hash(model, groups, budget)}.safetensors"
    try:
        found = read_tensor(file, "logps").numpy()
        print(f"reference: read from {file}")
    except (FileNotFoundError, SafetensorError):
        training, parts = model.training, []
        model.eval()
        with torch.set_grad_enabled(
            model.head_weight().requires_grad
        ):  # token_logps scores such a head another way
            for group in tqdm(groups, "reference", disable=not sys.stderr.isatty(), leave=False):
                parts += [
                    model.logps(batch).detach().cpu()
                    for batch in micro_batches(group, budget, model.device)
                ]
        model.train(training)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors({"logps": torch.cat(parts)}, aside := file.with_suffix(f".{os.getpid()}"))
        aside.replace(file)
        found = torch.cat(parts).numpy()
        print(
            f"reference: {len(found):,} tokens scored in {time.perf_counter() - began:.2f} s, kept in {file}"
        )
    at = 0
    for example in (example for group in groups for example in group):
        for n, segment in enumerate(example):
            scored = int((np.asarray(segment.labels) != IGNORE).sum())
            example[n] = segment._replace(reference=found[at : at + scored])
            at += scored


def prepare_reference(model, steps, held, config):
    """What DPO does before the first step: the reference."""
    if config.reference_free:
        return
    reference = model
    if config.ref_model:
        reference = load_4bit(
            config.ref_model,
            config,
            dtype=config.dtype,
            device=model.device,
            attn_implementation=config.attn_implementation,
        )
        largest = max(
            int(segment.ids.max()) for example in [*steps.examples, *held] for segment in example
        )
        if largest >= reference.config.vocab_size:
            raise UserError(
                f"ref_model: {config.ref_model} has no token {largest}; its tokenizer must be the model's"
            )
    add_reference(reference, steps, held, config)


SUMMARY = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/accuracies")


def main(argv=None):
    config = read_config(DPOConfig, sys.argv[1:] if argv is None else argv, "dpo")
    embedded = [config.model, config.adapter] == [str(EXAMPLES / "tiny-qwen3"), "output/sft"]
    if embedded and not Path("output/sft/adapter").exists():
        sft.main([])  # the embedded example goes on from the other's result
    with locked_folder(config.output_dir), sft.copy_output(Path(config.output_dir)):
        sft.run(
            config,
            partial(dpo_loss, config=config),
            count_pairs,
            partial(prepare_reference, config=config),
            preference=True,
        )
        lines = [] if config.dry_run else read_log(Path(config.output_dir) / "log.jsonl")
        lines = [line for line in lines if "eval_rewards/margins" in line]
        for line in lines[:: max(1, len(lines) - 1)]:
            right, margin, likelier = map(line.get, SUMMARY)
            print(
                f"held-out pairs at step {line['step']}: {right:.1%} ranked right by reward (margin {margin:.3f}), "
                f"{likelier:.1%} by log-prob"
            )


if __name__ == "__main__":
    run_command(main)

"""Direct preference optimisation: the losses, the reference, and the command. The loop is sft.py's.

The decision that is not obvious: the reference is the model that training starts from, never a
second one in memory. Before the first step the policy itself, without dropout, scores the
micro-batches of the plan's first epoch, and those log-probs stay with the data from then on. The
same packing rounds the same way, so step 0 has margin 0 and loss ln 2 to the last bit, whatever
trains. They are cached under a hash of everything they depend on (weights, adapter, tokens,
packing), for the runs of a sweep and for a resume.

A pair is one prompt with two continuations (see model.py): the prompt is computed once. A step's
loss is the mean over its pairs, also where TRL's is a mean over a batch's tokens (sft): there it
equals TRL's with per_device_train_batch_size 1. KTO takes answers without a counterpart, and
averages its estimate of the KL over the step, where TRL does over the batch of a forward pass.

DPO: Rafailov et al. 2023, arXiv:2305.18290. Names and definitions are those of TRL's DPOConfig,
unless stated otherwise.

    python dpo.py                                      # goes on from `python sft.py`
    python dpo.py --model Qwen/Qwen3-0.6B --adapter output/mine --data pairs.jsonl \
        --output_dir output/mine-dpo
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import linear, log_softmax, logsigmoid, relu
from tqdm import tqdm

import sft
from eval import EXAMPLES
from lora import lora_layers
from model import CHUNK, IGNORE, Batch, checkpoint_tensors, token_logps
from qlora import load_4bit
from sft import (
    SFTConfig,
    accumulate,
    read_config,
    shares_of,
    split_by_tokens,
    token_budget,
    weightless,
)
from support.checkpoints import sample_weights
from support.distributed import (
    agree,
    gather,
    is_first,
    join_ranks,
    rank,
    size,
    sum_numbers,
    whole,
)
from support.errors import UserError, as_user_error, run_command
from support.files import locked_folder, read_tensor, sync, write_tensors
from support.settings import check_range
from support.tracking import copy_output, read_log, warn_on_error

# --- the losses -----------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """What a loss of P pairs is computed from; tensors have shape (P,)."""

    chosen: Tensor  # log π(y) of the chosen answers, summed over their tokens
    rejected: Tensor  # and of the rejected answers
    ref_chosen: Tensor  # the same under the reference, log π_ref(y)
    ref_rejected: Tensor
    chosen_tokens: Tensor  # number of tokens
    rejected_tokens: Tensor
    nll: Tensor  # the chosen answer's mean token loss
    config: "DPOConfig"

    @property
    def chosen_reward(self):
        """β log(π(y) / π_ref(y)): the reward that the policy implies (DPO, eq. 5)."""
        return self.config.beta * (self.chosen - self.ref_chosen)

    @property
    def rejected_reward(self):
        return self.config.beta * (self.rejected - self.ref_rejected)

    @property
    def margin(self):
        """β (f'(r_chosen) - f'(r_rejected)) of the ratios r = π/π_ref; see DIVERGENCES."""
        return self.margin_over(1, 1)

    @property
    def mean_margin(self):
        """`margin` with each f' divided by its answer's tokens."""
        return self.margin_over(self.chosen_tokens, self.rejected_tokens)

    def margin_over(self, chosen_size, rejected_size):
        slope = partial(DIVERGENCES[self.config.f_divergence_type], self.config)
        chosen = slope(self.chosen - self.ref_chosen) / chosen_size
        rejected = slope(self.rejected - self.ref_rejected) / rejected_size
        return self.config.beta * (chosen - rejected)

    def per_token(self):
        """The pairs with log-probs averaged over an answer's tokens instead of summed."""
        return self._replace(
            chosen=self.chosen / self.chosen_tokens,
            rejected=self.rejected / self.rejected_tokens,
            ref_chosen=self.ref_chosen / self.chosen_tokens,
            ref_rejected=self.ref_rejected / self.rejected_tokens,
        )


# f' of the divergence that keeps the policy near the reference, of log r, r = π/π_ref: Wang et al.
# 2023, arXiv:2309.16240, table 1


def reverse_kl(config, log_ratio):
    return log_ratio


def forward_kl(config, log_ratio):
    return -(-log_ratio).expm1()


def js_divergence(config, log_ratio):
    return math.log(2) + logsigmoid(log_ratio)


def alpha_divergence(config, log_ratio):
    """(r^(α-1) - 1) / (α-1), log r at α = 1."""
    power = config.f_alpha_divergence_coef - 1
    return (power * log_ratio).clamp(max=80).expm1() / power if power else log_ratio


DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def smoothed(z, pairs):
    """-(1-ε) log σ(z) - ε log σ(-z): with ε > 0, conservative DPO (Mitchell 2023).

    TRL has label_smoothing in robust, exo_pair, aot, cpo and simpo alone."""
    noise = pairs.config.label_smoothing
    return -(1 - noise) * logsigmoid(z) - noise * logsigmoid(-z)


def ordered(values):
    return values.sort().values


def log_odds(logp):
    return logp - (-logp.expm1()).log()


def sigmoid(pairs):
    """DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7."""
    return smoothed(pairs.margin, pairs)


def sigmoid_norm(pairs):
    """Tülu 3's DPO, averaged over tokens: Lambert et al. 2024, arXiv:2411.15124."""
    return smoothed(pairs.mean_margin, pairs)


def hinge(pairs):
    """RSO's hinge-norm: Liu et al. 2023, arXiv:2309.06657."""
    return relu(1 - pairs.margin)


def ipo(pairs):
    """(log-ratio margin - 1/(2β))²: Azar et al. 2023, arXiv:2310.12036, eq. 17, over tokens."""
    return ((pairs.mean_margin - 0.5) / pairs.config.beta) ** 2


def robust(pairs):
    """rDPO: Chowdhury et al. 2024, arXiv:2403.00409."""
    noise = pairs.config.label_smoothing
    loss = noise * logsigmoid(-pairs.margin) - (1 - noise) * logsigmoid(pairs.margin)
    return loss / (1 - 2 * noise)


def exo_pair(pairs):
    """KL((σ(m), σ(-m)) ‖ (1-ε, ε)) of the margin m: Ji et al. 2024, arXiv:2402.00856, eq. 16."""
    noise, margin = pairs.config.label_smoothing, pairs.margin
    kl = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-noise))
    return kl + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(noise))


def nca_pair(pairs):
    """NCA of two answers: Chen et al. 2024, arXiv:2402.05369."""
    chosen, rejected = pairs.chosen_reward, pairs.rejected_reward
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs):
    """BCO without its reward shift: Jung et al. 2024, arXiv:2404.04656."""
    return -logsigmoid(pairs.chosen_reward) - logsigmoid(-pairs.rejected_reward)


def sppo_hard(pairs):
    """(log-ratio ∓ 1/(2β))² of chosen and rejected: Wu et al. 2024, arXiv:2405.00675, eq. 4.7."""
    loss = (pairs.chosen_reward - 0.5) ** 2 + (pairs.rejected_reward + 0.5) ** 2
    return loss / pairs.config.beta**2


def aot(pairs):
    """Alignment by optimal transport, paired: Melnyk et al. 2024, arXiv:2406.05882."""
    policy = ordered(pairs.chosen - pairs.rejected)
    reference = ordered(pairs.ref_chosen - pairs.ref_rejected)
    return smoothed(pairs.config.beta * (policy - reference), pairs)


def aot_unpaired(pairs):
    """The same paper's loss of unpaired answers."""
    return smoothed(ordered(pairs.chosen_reward) - ordered(pairs.rejected_reward), pairs)


def apo_zero(pairs):
    """1 - σ(chosen) + σ(rejected): D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7."""
    return (-pairs.chosen_reward).sigmoid() + pairs.rejected_reward.sigmoid()


def apo_down(pairs):
    """σ(chosen) + 1 - σ(margin): the same paper, eq. 8."""
    return pairs.chosen_reward.sigmoid() + (-pairs.margin).sigmoid()


def discopop(pairs):
    """Logistic and exponential loss, blended by σ(m/τ): Lu et al. 2024, arXiv:2406.08414, eq. 5."""
    blend = (pairs.margin / pairs.config.discopop_tau).sigmoid()
    return torch.lerp(-logsigmoid(pairs.margin), (-pairs.margin).exp(), blend)


def nll(pairs):
    """The chosen answer's mean token loss (RPO): Pang et al. 2024, arXiv:2404.19733, eq. 1."""
    return pairs.nll


def cpo(pairs):
    """Xu et al. 2024, arXiv:2401.08417, eqs. 3 and 4."""
    margin = pairs.config.beta * (pairs.chosen - pairs.rejected)
    return smoothed(margin, pairs) + pairs.config.cpo_alpha * pairs.nll


def simpo(pairs):
    """Meng et al. 2024, arXiv:2405.14734, eq. 6."""
    mean = pairs.per_token()
    margin = pairs.config.beta * (mean.chosen - mean.rejected)
    return smoothed(margin - pairs.config.simpo_gamma, pairs)


def orpo(pairs):
    """Hong et al. 2024, arXiv:2403.07691, eqs. 3 to 7. TRL's first term scores the prompt too."""
    mean = pairs.per_token()
    odds_ratio = log_odds(mean.chosen) - log_odds(mean.rejected)
    return pairs.nll - pairs.config.beta * logsigmoid(odds_ratio)


def kto(lead, config):
    """1 - σ(β lead) of N answers; lead: log π(y)/π_ref(y) - KL of a desirable one, KL - log-ratio
    of another. Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7."""
    return (-config.beta * lead).sigmoid()


class Loss(NamedTuple):
    """A value of --loss_type."""

    function: Callable  # Pairs -> losses (P,); if unpaired, as kto
    reference_free: bool = False  # does not use the reference's log-probs
    averaged: bool = False  # its rewards and log-probs are logged as means over tokens
    by_margin: bool = False  # sees the ratios in the margin alone: any f_divergence_type goes
    whole_step: bool = False  # compares all pairs of a step, so a step is one micro-batch
    unpaired: bool = False  # of answers without a counterpart


LOSSES = {
    "sigmoid": Loss(sigmoid, by_margin=True),
    "hinge": Loss(hinge, by_margin=True),
    "ipo": Loss(ipo, by_margin=True),
    "robust": Loss(robust, by_margin=True),
    "exo_pair": Loss(exo_pair, by_margin=True),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot, whole_step=True),
    "aot_unpaired": Loss(aot_unpaired, whole_step=True),
    "aot_pair": Loss(aot_unpaired, whole_step=True),  # its former name
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop, by_margin=True),
    "sigmoid_norm": Loss(sigmoid_norm, by_margin=True),
    "sft": Loss(nll, reference_free=True, by_margin=True),
    "simpo": Loss(simpo, reference_free=True, averaged=True),
    "orpo": Loss(orpo, reference_free=True, averaged=True),
    "cpo": Loss(cpo, reference_free=True),
    "kto": Loss(kto, unpaired=True),
    "apo_zero_unpaired": Loss(kto, unpaired=True),  # with a KL of 0
}
# settings that the losses of pairs alone have, and those of unpaired answers alone
FOR_PAIRS = (
    "label_smoothing",
    "f_divergence_type",
    "ld_alpha",
    "use_weighting",
    "reference_free",
    "recipe",  # labels are read from rows as they are: make these by data.py mix
)
FOR_ANSWERS = "desirable_weight", "undesirable_weight"


# --- the settings ---------------------------------------------------------------------------------


@dataclass
class DPOConfig(SFTConfig):
    """The settings of SFT, and those of TRL's DPOConfig, CPOConfig and KTOConfig."""

    # preferences
    output_dir: str = "output/dpo"  # the run folder
    learning_rate: float = 1e-6  # peak, as TRL's: for full fine-tuning; a LoRA needs 10 times it
    beta: float = 0.1  # strength of the KL penalty; ipo's tau, orpo's lambda
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # one loss, or several
    loss_weights: list[float] = field(default_factory=list)  # of several losses; none: 1 each
    label_smoothing: float = 0.0  # assumed label-noise rate, below 0.5
    rpo_alpha: float = 0.0  # weight of an added sft loss (RPO), of desirable answers with kto
    simpo_gamma: float = 0.5  # simpo: target margin of the mean log-probs times beta
    cpo_alpha: float = 1.0  # cpo: weight of the chosen answer's mean token loss
    discopop_tau: float = 0.05  # discopop: temperature of the blend
    f_divergence_type: str = "reverse_kl"  # what keeps the policy near the reference
    f_alpha_divergence_coef: float = 0.5  # alpha_divergence: its alpha
    ld_alpha: float | None = None  # weight of tokens beyond the shorter answer's (LD-DPO)
    use_weighting: bool = False  # weight pairs by how probable the policy finds them (WPO)
    desirable_weight: float = 1.0  # kto: of the losses of answers labelled true
    undesirable_weight: float = 1.0  # kto: and of those labelled false
    ref_model: str = ""  # another reference than the model training starts from: folder or hub id
    reference_free: bool = False  # a reference to which all answers are equally likely
    ref_cache: str = "output/reference"  # folder of cached reference log-probs
    disable_dropout: bool = True  # train without the adapter's dropout

    EMBEDDED = "train_pairs.jsonl", "validation_pairs.jsonl"
    CHOICES: ClassVar[dict] = {"loss_type": LOSSES, "f_divergence_type": DIVERGENCES}

    def __post_init__(self):
        super().__post_init__()
        self.unit = "answer" if self.unpaired else "pair"
        losses = [LOSSES[name] for name in self.loss_type]
        self.loss_weights = self.loss_weights or [1.0] * len(losses)
        if len(self.loss_weights) != len(losses):
            raise UserError(
                f"loss_weights: {len(self.loss_weights)} for {len(losses)} losses; give one each"
            )
        weights = [*self.loss_weights, self.rpo_alpha]
        if min(weights) < 0 or max(weights) == 0:
            raise UserError(
                f"loss_weights, rpo_alpha: {weights}; none may be below 0, and one must be above"
            )
        foreign = FOR_PAIRS if self.unpaired else FOR_ANSWERS
        wrong = [name for name in foreign if getattr(self, name) != getattr(DPOConfig, name)]
        if self.unpaired and len(losses) > 1:
            wrong.append("another loss")
        if wrong:
            raise UserError(f"loss_type: {self.loss_type[0]} does not go with {', '.join(wrong)}")
        check_range(self, 0, "cpo_alpha", "simpo_gamma")
        check_range(self, 0, "ld_alpha", most=1)
        others = [name for name in self.loss_type if not LOSSES[name].by_margin]
        if others and self.f_divergence_type != "reverse_kl":
            raise UserError(f"f_divergence_type: does not go with loss_type {', '.join(others)}")
        check_range(self, 1e-9, "beta", "discopop_tau")
        least = 1e-9 if "exo_pair" in self.loss_type else 0
        if not least <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing: {self.label_smoothing} is not from 0 to below 0.5; exo_pair "
                "needs it above 0 (its paper: 0.001)"
            )
        self.reference_free |= all(loss.reference_free for loss in losses)
        if self.ref_model and self.reference_free:
            raise UserError("ref_model: reference_free and these losses use none; leave it out")
        if any(loss.whole_step for loss in losses):
            if self.use_weighting:
                raise UserError("use_weighting: does not go with losses that sort a step's pairs")
            self.micro_batch_tokens = sys.maxsize

    @property
    def unpaired(self):
        """Whether rows are answers without a counterpart."""
        return any(LOSSES[name].unpaired for name in self.loss_type)


# --- the loss of a batch --------------------------------------------------------------------------


@torch.no_grad()
def log_square_sums(hidden, head):
    """log Σ p² (S,) over the vocabulary, of hidden states (S, C) and the head's weight (V, C)."""
    sums = []
    for chunk in hidden.split(CHUNK):
        logps = log_softmax(linear(chunk, head.to(chunk.dtype)), -1, dtype=torch.float32)
        sums.append((2 * logps).logsumexp(-1))
    return torch.cat(sums)


def discount_tails(membership, alpha):
    """membership (B, S), with α for an answer's tokens beyond the other's length. LD-DPO: Liu et
    al. 2024, arXiv:2409.06411, eq. 11."""
    shared = membership.sum(1).view(-1, 2).amin(1).repeat_interleave(2)
    tail = membership.cumsum(1) > shared[:, None]
    return torch.where(tail, alpha * membership, membership)


def dpo_loss(model, batch, config):
    """(the pairs' summed loss, {metric, mostly TRL's: its sum over the pairs}) of a batch of pairs.

    kl: r - 1 - log r summed over an answer's tokens, r = π/π_ref, mean of both answers: an
    estimate of KL(π_ref ‖ π) that is never negative, as if the reference had written them
    (Schulman 2020, joschu.net/blog/kl-approx.html)."""
    hidden, head = model(batch)[batch.scored], model.head_weight()
    logps = token_logps(hidden, head, batch.targets)
    answers = torch.arange(batch.num_sequences, device=logps.device)
    membership = (batch.sequence == answers[:, None]).float()

    def by_answer(values, membership=membership):
        """(S,) -> chosen (P,), rejected (P,); a product: index_add on CUDA has no fixed order."""
        return (membership @ values).view(-1, 2).unbind(1)

    tokens, shares = by_answer(torch.ones_like(logps)), membership
    if config.ld_alpha is not None:
        shares = discount_tails(membership, config.ld_alpha)
    sums = *by_answer(logps, shares), *by_answer(batch.reference, shares)
    mean_nll = -by_answer(logps)[0] / tokens[0]
    pairs = Pairs(*sums, *tokens, mean_nll, config)
    weighted = [*zip(config.loss_type, config.loss_weights), ("sft", config.rpo_alpha)]
    loss = sum(weight * LOSSES[name].function(pairs) for name, weight in weighted if weight)
    if config.use_weighting:  # WPO: Zhou et al. 2024, arXiv:2406.11827, eq. 2
        relative = by_answer(logps.detach() - log_square_sums(hidden, head))
        loss = loss * (relative[0] / tokens[0] + relative[1] / tokens[1]).exp()

    if all(LOSSES[name].averaged for name in config.loss_type):
        pairs = pairs.per_token()
    metrics = {
        "rewards/chosen": pairs.chosen_reward,
        "rewards/rejected": pairs.rejected_reward,
        "rewards/margins": pairs.chosen_reward - pairs.rejected_reward,
        "rewards/accuracies": pairs.chosen_reward > pairs.rejected_reward,
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "logps/accuracies": pairs.chosen > pairs.rejected,
    }
    if not config.reference_free:
        ratio = logps - batch.reference
        metrics["kl"] = sum(by_answer(ratio.exp() - 1 - ratio)) / 2
    pair_weights = by_answer(batch.weights)[0] / pairs.chosen_tokens
    sums = {name: (pair_weights * value).sum().detach() for name, value in metrics.items()}
    return (pair_weights * loss).sum(), sums


def unpaired_loss(model, batch, config, kl=0.0, shares=(1.0, 1.0)):
    """As `dpo_loss`, of prompts with one answer each: the first of two sequences if it is
    desirable, else the second. kl: the step's; shares: of the step's weight, the desirable answers'
    and the others', so that rewards and log-probs become means over their own kind, as in TRL.

    rewards/accuracies: the share of answers whose reward is on the right side of β KL."""
    logps = model.logps(batch)
    answers = torch.arange(batch.num_sequences // 2, device=logps.device)
    membership = (batch.sequence // 2 == answers[:, None]).float()  # (N, S)
    desirable = membership @ (batch.sequence % 2).float() == 0
    logp, tokens = membership @ logps, membership.sum(1)
    weights = membership @ batch.weights / tokens
    log_ratio = logp - membership @ batch.reference
    lead = torch.where(desirable, log_ratio - kl, kl - log_ratio)
    losses = config.loss_weights[0] * LOSSES[config.loss_type[0]].function(lead, config)
    losses *= torch.where(desirable, config.desirable_weight, config.undesirable_weight)
    losses -= config.rpo_alpha * desirable * logp / tokens
    metrics = {"kl": weights.sum() * kl, "rewards/accuracies": weights @ (lead > 0).float()}
    for name, kind, share in zip(("chosen", "rejected"), (desirable, ~desirable), shares):
        own = weights * kind / share
        metrics[f"rewards/{name}"] = own @ (config.beta * log_ratio)
        metrics[f"logps/{name}"] = own @ logp
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return weights @ losses, {name: value.detach() for name, value in metrics.items()}


def sum_log_ratios(model, batch):
    """(Σ weight · log π/π_ref over the sequences; no metrics)."""
    return ((model.logps(batch) - batch.reference) * batch.weights).sum(), {}


def mismatch(examples, max_length):
    """{id of an example: its prompt with the answer of the example before it}, of at most
    max_length tokens. The KL of KTO is estimated on such answers (section 4.1).
    UserError: one answer alone has no other."""
    if len(examples) == 1:
        raise UserError(
            "loss_type: kto estimates its KL on other rows' answers; give 2 rows or more"
        )
    others = {}
    for example, (_, answer) in zip(examples, examples[-1:] + examples[:-1]):
        prompt, own = example
        room = slice(max_length - len(prompt.ids))
        ids, labels = answer.ids[room], answer.labels[room]
        others[id(example)] = [prompt, own._replace(ids=ids, labels=labels)]
    return others


@torch.no_grad()
def with_step_values(model, mismatched, config, loss_fn, examples):
    """Plan.prepare: `loss_fn` with what it needs of all examples of a step. The KL is the mean
    log-ratio of the mismatched answers, without dropout, where it is above 0."""
    total = sum(map(count_pairs, examples))
    desirable = sum(answer.weight for _, answer in examples if answer.sequence == 0)
    shares = [max(weight / total, 1e-9) for weight in (desirable, total - desirable)]
    if not mismatched:
        return partial(loss_fn, shares=shares)
    own = [mismatched[id(example)] for example in shares_of(examples)[rank()]]
    own = own or weightless(mismatched[id(examples[0])])
    model.eval()
    ratios, _ = accumulate(model, own, 1, sum_log_ratios, token_budget(config, model.device))
    model.train()
    kl = sum_numbers({"kl": ratios})["kl"] / total
    return partial(loss_fn, kl=max(0.0, kl), shares=shares)


def count_pairs(example):
    """What a pair, or an answer, contributes to the loss denominator of its step: its weight."""
    return example[1].weight


# --- the reference --------------------------------------------------------------------------------


def content_hash(model, groups, budget):
    """A hash of everything the reference's log-probs depend on, down to their rounding: weights,
    adapter, arithmetic, tokens, packing. An untrained LoRA changes nothing and is left out."""
    trained = any(layer.lora_B.any() for layer in lora_layers(model).values())
    adapter = model.adapter if trained else None
    arithmetic = model.dtype, model.attention, model.device.type
    sizes = [[[len(segment.ids) for segment in example] for example in group] for group in groups]
    digest = hashlib.sha256(repr((model.config, adapter, arithmetic, budget, sizes)).encode())
    for name, tensor in model.state_dict().items():
        if trained or not name.endswith((".lora_A", ".lora_B")):
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(whole(tensor).cpu().flatten().view(torch.uint8).numpy())
    for group in groups:
        for example in group:
            for segment in example:
                digest.update(np.array([segment.ids, segment.labels], np.int32).tobytes())
    return digest.hexdigest()[:32]


def score(model, groups, budget):
    """Log-probs (S,) of the scored tokens of groups of examples, without dropout, on the CPU. The
    micro-batches are divided among the ranks."""
    batches = [batch for group in groups for batch in split_by_tokens(group, budget)]
    parts = []
    model.eval()
    # token_logps takes another path where the head trains, and rounds differently there
    with torch.set_grad_enabled(model.head_weight().requires_grad):
        for turn in tqdm(range(0, len(batches), size()), "reference", disable=None, leave=False):
            batch = batches[
                min(turn + rank(), len(batches) - 1)
            ]  # a divided base needs all ranks
            logps = model.logps(Batch.pack(batch, model.device))
            parts += map(torch.tensor, gather(logps.tolist()))
    model.train()
    return torch.cat(parts[: len(batches)])


def checksum(logps):
    """SHA-256 of a tensor, as a tensor of 32 bytes."""
    return torch.tensor([*hashlib.sha256(logps.numpy()).digest()], dtype=torch.uint8)


def read_reference(path):
    """The cached log-probs (S,); None where there are none, or not those written."""
    if path.exists():
        with suppress(OSError, SafetensorError, UserError):
            logps = read_tensor(path, "logps")
            if torch.equal(read_tensor(path, "sha256"), checksum(logps)):
                return logps
        print(f"reference: {path} is damaged and made anew")


def write_reference(path, logps):
    with warn_on_error("reference: not kept for the next run"):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")  # a kill's is replaced by the next run's
        write_tensors({"logps": logps, "sha256": checksum(logps)}, unfinished)
        sync(unfinished)
        unfinished.replace(path)
        print(f"reference: kept in {path}")


def first_epoch(steps):
    """The examples of each step of the first epoch."""
    return [steps[n] for n in range(min(len(steps), steps.steps_per_epoch))]


def add_reference(model, steps, eval_examples, config, mismatched=None):
    """Gives every segment of the plan, of the evaluation set and of `mismatched`, in place, the
    log-probs of its scored tokens under `model`: from the cache, or from one pass over the first
    epoch's batches."""
    budget = token_budget(config, model.device)
    groups = [share for examples in first_epoch(steps) for share in shares_of(examples)]
    if eval_examples and config.eval_strategy != "no":
        groups.append(eval_examples)
    if mismatched:
        groups += [[mismatched[id(example)] for example in group] for group in groups]
    path = Path(config.ref_cache) / f"{content_hash(model, groups, budget)}.safetensors"
    logps = read_reference(path)
    if not agree(logps is None):
        print(f"reference: read from {path}")
    else:
        began = time.perf_counter()
        logps = score(model, groups, budget)
        seconds = time.perf_counter() - began
        print(f"reference: {len(logps):,} tokens scored in {seconds:.2f} s")
        if is_first():
            write_reference(path, logps)
    offset = 0
    for group in groups:
        for example in group:
            for n, segment in enumerate(example):
                end = offset + (segment.labels != IGNORE).sum()
                example[n] = segment._replace(reference=logps[offset:end].numpy())
                offset = end


def before_training(model, steps, eval_examples, config):
    """sft.run's hook, called with the model that training starts from: dropout, the reference."""
    if config.disable_dropout:
        for layer in lora_layers(model).values():
            layer.dropout = 0.0
    reference = model
    if config.ref_model:
        reference = load_4bit(
            config.ref_model,
            config,
            dtype=config.dtype,
            device=model.device,
            attn_implementation=config.attn_implementation,
        )
        tensors = checkpoint_tensors(reference.folder)
        steps.origin["weights of --ref_model"] = sample_weights(tensors)
    mismatched = {}
    if config.unpaired:
        examples = [example for step in first_epoch(steps) for example in step]
        desirable = sum(answer.sequence == 0 for _, answer in examples)
        print(f"{desirable:,} of {len(examples):,} answers are desirable")
        if config.loss_type == ["kto"]:  # in later epochs a prompt keeps its other answer
            for group in (examples, eval_examples):
                mismatched |= mismatch(group, config.max_length)
        steps.prepare = partial(with_step_values, model, mismatched, config)
    if not config.reference_free:
        with as_user_error(f"ref_model: {config.ref_model or config.model}", UserError):
            add_reference(reference, steps, eval_examples, config, mismatched)


# --- the command ----------------------------------------------------------------------------------


def print_rankings(path):
    """Prints how many pairs of the evaluation set, or answers, were ranked right, at first and by
    the model that is kept: the last step's, or the best."""
    lines = read_log(path)
    last = lines[-1].get("best_step", math.inf)
    lines = [line for line in lines if "eval_rewards/margins" in line and line["step"] <= last]
    for line in lines[:1] + lines[1:][-1:]:
        margin = line["eval_rewards/margins"]
        text = f"evaluation set at step {line['step']}: margin {margin:.3f}"
        if margin:
            text += f", {line['eval_rewards/accuracies']:.1%} ranked right by reward"
        if "eval_logps/accuracies" in line:
            text += f", {line['eval_logps/accuracies']:.1%} by log-prob"
        print(text)


def main(argv=None):
    config = read_config(DPOConfig, argv, "dpo")
    folder = Path(config.output_dir)
    embedded = [config.model, config.adapter] == [
        str(EXAMPLES / "tiny-qwen3"),
        "output/sft",
    ]
    if embedded and not Path("output/sft/adapter").exists():
        sft.main([])  # the embedded example continues the SFT example's adapter
    with join_ranks(config.device, locked_folder(folder), copy_output(folder)):
        if size() > 1 and any(LOSSES[name].whole_step for name in config.loss_type):
            raise UserError("loss_type: aot compares all pairs of a step; it runs in one process")
        loss_fn, preference = dpo_loss, True
        if config.unpaired:
            loss_fn, preference = unpaired_loss, "unpaired"
        loss_fn, hook = partial(loss_fn, config=config), partial(before_training, config=config)
        sft.run(config, loss_fn, count_pairs, hook, preference=preference)
        if is_first() and not config.dry_run:
            print_rankings(folder / "log.jsonl")


if __name__ == "__main__":
    run_command(main)

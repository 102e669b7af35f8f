"""What this installation computes, beside the reference implementations.

Each line is a quantity, the reference, the largest error, how much is allowed, and a verdict. The
shapes are tiny and the weights random, in fp32: an error is rounding, or it is a mistake. Errors
are relative to the reference's largest value, counts are of tokens or characters that differ.

    python tests/parity.py                      # about a minute on two cores; status 1: one fails
    python tests/parity.py --device cuda        # not yet run on one
    python tests/parity.py --only logits NF4    # the quantities that begin so
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import conftest  # first: it sets the environment
import numpy as np
import torch

import model as M
from model import IGNORE, Batch, Segment

HERE = Path(__file__).parent
NETWORKS = {
    "Qwen3": {},
    "Llama": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "Qwen2": dict(model_type="qwen2", num_attention_heads=4, head_dim=10),
}
LORA = dict(r=4, lora_alpha=8, target_modules="all-linear")
IDS = np.random.default_rng(0).integers(0, 199, 40)
PAIR_LOSSES = "sigmoid", "ipo", "apo_zero", "robust"


class Place(NamedTuple):
    """Where a check works: an empty folder, and the device."""

    folder: Path
    device: str

    def checkpoint(self, **config):
        return conftest.write_checkpoint(self.folder / "model", **config)

    def chat_model(self):
        """A checkpoint with a byte-level tokenizer and a chat template."""
        from test_sft import write_tokenizer

        folder = self.checkpoint(vocab_size=259, max_position_embeddings=400)
        write_tokenizer(folder)
        return folder

    def theirs(self, folder, **options):
        """transformers' model of a checkpoint."""
        from transformers import AutoModelForCausalLM

        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return net.to(self.device).eval()


def ours(folder, place):
    return M.load_model(folder, "float32", place.device).eval()


def error(a, b):
    """The largest difference, of tensors or of dicts of them, relative to b's largest value."""
    if isinstance(b, dict):
        if a.keys() != b.keys():
            raise ValueError(f"names differ: {sorted(a.keys() ^ b.keys())[:3]}")
        return max(error(a[name], b[name]) for name in b)
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (a, b))
    return float((a - b).abs().max() / b.abs().max())


def differing(a, b):
    """How many items of two sequences differ."""
    return sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))


def stream(place, ids=IDS):
    ids = ids.astype(np.int32)
    return Batch.pack([[Segment(ids, ids)]], place.device)


@torch.no_grad()
def our_logits(net, place):
    return net.logits(net(stream(place)))


@torch.no_grad()
def their_logits(net, place):
    return net(torch.tensor(IDS)[None].to(place.device)).logits[0].float()


# --- the checks: (place) -> the largest error -----------------------------------------------------


def logits(place, network):
    folder = place.checkpoint(**NETWORKS[network])
    return error(
        our_logits(ours(folder, place), place), their_logits(place.theirs(folder), place)
    )


def gradients(place, network):
    """Of every weight, from the mean loss over a document."""
    folder = place.checkpoint(**NETWORKS[network])
    net, reference = ours(folder, place).requires_grad_(True), place.theirs(folder)
    (-net.logps(stream(place)).mean()).backward()
    labels = torch.tensor(IDS)[None].to(place.device)
    reference(labels, labels=labels).loss.backward()
    parameters = [dict(n.named_parameters()) for n in (net, reference)]
    return error(*({name: p.grad for name, p in named.items()} for named in parameters))


def generation(place):
    """Greedy, prompts of different lengths."""
    folder = place.checkpoint()
    net, reference = ours(folder, place), place.theirs(folder)
    prompts = [IDS[:n].tolist() for n in (3, 17, 30)]
    count = 0
    for prompt, new in zip(prompts, M.generate(net, prompts, 24, eos_ids=())):
        ids = torch.tensor(prompt)[None].to(place.device)
        out = reference.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
        count += differing(new, out[0, len(prompt) :].tolist())
    return count


def templates(place):
    """The chat templates of Qwen3 and Llama 3 as TRL ships them, on conversations of each form."""
    import test_data

    count = 0
    for name in ("qwen3", "llama3"):
        (place.folder / name).mkdir()
        folder, _ = test_data.write_wild(place.folder / name, name)
        own, their = test_data.Tokenizer(folder), test_data.reference(folder)
        for chat in test_data.CHATS.values():
            for ask in (False, True):
                text = their.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
                count += differing(own.render(chat, ask), text)
    return count


def masks(place):
    """Which tokens are scored, beside TRL's templates with {% generation %} in them."""
    import test_data

    folder, training = test_data.write_wild(place.folder, "llama3")
    own, their, count = test_data.Tokenizer(folder), test_data.reference(folder, training), 0
    for chat in (test_data.CHATS["single"], test_data.CHATS["multi"]):
        found = their.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True
        )
        (segment,) = test_data.render_row({"messages": chat}, own)
        scored = (segment.labels != IGNORE).astype(int)
        count += differing(scored.tolist(), found["assistant_masks"])
    return count


def with_adapter(place, **settings):
    """(the folder, PEFT's model with an adapter that has moved, the folder it is saved in)."""
    import peft
    from test_lora import shake

    folder = place.checkpoint()
    twin = peft.get_peft_model(place.theirs(folder), peft.LoraConfig(**LORA | settings))
    shake(twin)
    twin.save_pretrained(place.folder / "adapter")
    return folder, twin.eval(), place.folder / "adapter"


def adapter_logits(place, **settings):
    from lora import load_adapter

    folder, twin, adapter = with_adapter(place, **settings)
    net = ours(folder, place)
    load_adapter(net, adapter)
    return error(our_logits(net, place), their_logits(twin, place))


def merged_weights(place):
    from lora import merge

    folder, twin, adapter = with_adapter(place)
    merge(adapter, place.folder / "merged", folder)
    merged = ours(place.folder / "merged", place).state_dict()
    return error(merged, {name: twin.merge_and_unload().state_dict()[name] for name in merged})


def sft_loss(place):
    """Loss and gradients of prompt and completion rows, beside SFTTrainer's."""
    import test_dpo
    from trl import SFTConfig, SFTTrainer

    import sft
    from lora import LoRAConfig, adapter_parameters, add_lora

    folder, rows = place.chat_model(), place.folder / "rows.jsonl"
    texts = [{"prompt": f"what is {n}?", "completion": " it is" + " so" * n} for n in range(8)]
    rows.write_text("\n".join(map(json.dumps, texts)))
    net = ours(folder, place)
    add_lora(net, LoRAConfig(lora_r=4, lora_alpha=8), seed=1)
    test_dpo.move(net)
    twin = test_dpo.peft_twin(folder, net).to(place.device)
    work, on_cpu = (folder, rows, twin, place.folder), place.device == "cpu"
    trainer = test_dpo.trl_trainer(SFTTrainer, SFTConfig, *work, use_cpu=on_cpu)
    examples = [*sft.load_examples([str(rows)], sft.Tokenizer(folder))[0]]
    count = sum(map(sft.count_scored, examples))
    loss, _ = sft.accumulate(net, examples, count, sft.sft_loss, sys.maxsize)
    gradient = {name: p.grad for name, p in adapter_parameters(net).items()}
    their_loss, _, their_gradient = test_dpo.trl_gradient(trainer, test_dpo.WHOLE)
    return max(error(loss / count, their_loss), error(gradient, their_gradient))


def dpo_losses(place):
    """Losses and gradients of PAIR_LOSSES, beside DPOTrainer's."""
    import test_dpo
    from trl import DPOConfig, DPOTrainer

    from lora import add_lora

    folder, rows = place.chat_model(), place.folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(test_dpo.pair(n)) for n in range(test_dpo.COUNT)))
    net, examples = ours(folder, place), test_dpo.load_pairs(folder, rows)
    add_lora(net, test_dpo.config(), seed=1)
    test_dpo.give_reference(net, examples, test_dpo.config(), place.folder)
    twin = test_dpo.peft_twin(folder, net).to(place.device)
    work, on_cpu = (folder, rows, twin, place.folder), place.device == "cpu"
    trainer = test_dpo.trl_trainer(DPOTrainer, DPOConfig, *work, use_cpu=on_cpu)
    test_dpo.move(net)
    test_dpo.copy_adapter(net, trainer.model)
    errors = []
    for kind in PAIR_LOSSES:
        settings = test_dpo.config(loss_type=[kind], label_smoothing=0.1 * (kind == "robust"))
        trainer.loss_types, trainer.loss_weights = settings.loss_type, settings.loss_weights
        trainer.beta, trainer.label_smoothing = settings.beta, settings.label_smoothing
        loss, _, gradient = test_dpo.gradient(net, examples, settings)
        their_loss, _, their_gradient = test_dpo.trl_gradient(trainer, test_dpo.WHOLE)
        errors += [error(loss, their_loss), error(gradient, their_gradient)]
    return max(errors)


def kto_loss(place):
    """Loss and gradients of labelled answers, beside KTOTrainer's, whose mismatched answers follow
    the rows' order as ours do the plan's."""
    import test_dpo
    from trl import KTOConfig, KTOTrainer

    from lora import add_lora

    folder, rows = place.chat_model(), place.folder / "rows.jsonl"
    lines = [json.dumps(test_dpo.answer(n)) for n in range(test_dpo.COUNT)]
    rows.write_text("\n".join(lines))
    net, examples = ours(folder, place), test_dpo.load_answers(folder, rows)
    settings = test_dpo.config(loss_type=["kto"])
    add_lora(net, settings, seed=1)
    plan, step_loss = test_dpo.prepare(net, examples, settings, place.folder)
    rows.write_text("\n".join(lines[n] for n in plan.select(0)[1]))
    twin = test_dpo.peft_twin(folder, net).to(place.device)
    work, on_cpu = (folder, rows, twin, place.folder), place.device == "cpu"
    trainer = test_dpo.trl_trainer(KTOTrainer, KTOConfig, *work, use_cpu=on_cpu)
    test_dpo.move(net)
    test_dpo.copy_adapter(net, trainer.model)
    loss, _, gradient = test_dpo.unpaired_gradient(net, examples, step_loss())
    their_loss, _, found = test_dpo.trl_gradient(trainer, test_dpo.WHOLE)
    their_gradient = {name: g for name, g in found.items() if ".ref." not in name}
    return max(error(loss, their_loss), error(gradient, their_gradient))


def quantized(place):
    """(our model in NF4 with double quantisation, transformers' with bitsandbytes)."""
    from transformers import BitsAndBytesConfig

    from qlora import QuantConfig, load_4bit

    folder = place.checkpoint(hidden_size=64, intermediate_size=96)
    net = load_4bit(folder, QuantConfig(load_in_4bit=True), dtype="float32", device=place.device)
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    # in training mode, where a CPU multiplies in fp32 too
    return net, place.theirs(folder, quantization_config=quant).train()


def nf4_bits(place):
    from test_qlora import layers_4bit

    net, reference = quantized(place)
    count = 0
    for path, layer in layers_4bit(net).items():
        count += int((layer.weight != reference.get_submodule(path).weight.data).sum())
    return count


def nf4_logits(place):
    net, reference = quantized(place)
    return error(our_logits(net, place), their_logits(reference, place))


def benchmarks(place, metrics):
    """Log-likelihoods (nats), or metrics, of two benchmarks; always on the CPU."""
    import pytest
    import test_eval

    folder, tasks = place.chat_model(), ["arc_challenge", "winogrande"]
    for task in tasks:
        (place.folder / task).mkdir()
        split = test_eval.evaluation.TASKS[task].split
        for name, count in ((split, 8), ("train", 6)):
            lines = map(json.dumps, test_eval.make_rows(task, count, name))
            (place.folder / task / f"{name}.jsonl").write_text("\n".join(lines))
    settings = place.folder, tasks, 1, False, None
    with pytest.MonkeyPatch.context() as patch:
        theirs = test_eval.lm_eval_results(folder, *settings, patch, place.folder / "cache")
    results, samples = test_eval.our_results(folder, *settings, place.folder / "out")
    errors = []
    for task in tasks:
        if metrics:
            errors.append(abs(results[task]["acc"] - theirs["results"][task]["acc,none"]))
            continue
        rows = sorted(theirs["samples"][task], key=lambda row: row["doc_id"])
        for own, row in zip(samples[task], rows, strict=True):
            other = [answer[0][0] for answer in row["resps"]]
            errors.append(float(np.abs(np.array(own["logps"]) - other).max()))
    return max(errors)


class Check(NamedTuple):
    library: str  # the reference, beside transformers
    tolerance: float
    measure: object


CHECKS = {}
for what in (logits, gradients):
    for name in NETWORKS:
        measure = partial(what, network=name)
        CHECKS[f"{what.__name__}, {name}"] = Check("transformers", 1e-5, measure)
CHECKS |= {
    "generation, tokens": Check("transformers", 0, generation),
    "chat templates, characters": Check("trl", 0, templates),
    "assistant masks, tokens": Check("trl", 0, masks),
    "LoRA adapter, logits": Check("peft", 1e-5, adapter_logits),
    "DoRA adapter, logits": Check("peft", 1e-5, partial(adapter_logits, use_dora=True)),
    "merge, weights": Check("peft", 1e-6, merged_weights),
    "SFT, loss and gradients": Check("trl", 1e-5, sft_loss),
    "DPO, losses and gradients": Check("trl", 1e-5, dpo_losses),
    "KTO, loss and gradients": Check("trl", 1e-5, kto_loss),
    "NF4, bytes": Check("bitsandbytes", 0, nf4_bits),
    "NF4, logits": Check("bitsandbytes", 1e-5, nf4_logits),
    "log-likelihoods, nats": Check("lm_eval", 1e-4, partial(benchmarks, metrics=False)),
    "benchmark metrics": Check("lm_eval", 1e-12, partial(benchmarks, metrics=True)),
}


def run(check, device):
    """(error or None, verdict)."""
    if not find_spec(check.library):
        return None, "not installed"
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                largest = check.measure(Place(Path(folder), device))
        except Exception as fault:  # the other checks are still of interest
            return None, f"FAILS: {type(fault).__name__}: {str(fault).splitlines()[0][:80]}"
    return largest, "ok" if largest <= check.tolerance else "FAILS"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: cpu)")
    parser.add_argument("--only", nargs="+", default=[""], help="the quantities that begin so")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    began, failed = time.perf_counter(), 0
    print(f"{'quantity':28}{'reference':14}{'largest error':>14}{'allowed':>10}  verdict")
    for name, check in CHECKS.items():
        if not name.startswith(tuple(args.only)):
            continue
        largest, verdict = run(check, args.device)
        failed += verdict.startswith("FAILS")
        shown = "-" if largest is None else f"{largest:.1e}" if largest else "0"
        allowed = f"{check.tolerance:.0e}" if check.tolerance else "0"
        print(f"{name:28}{check.library:14}{shown:>14}{allowed:>10}  {verdict}", flush=True)
    print(f"{failed} failed; {time.perf_counter() - began:.0f} s on {args.device}")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()

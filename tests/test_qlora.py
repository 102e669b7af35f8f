"""qlora.py and LoRA's variants against bitsandbytes, transformers and PEFT; users' mistakes."""

import copy
import json
import sys
from functools import partial

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import adamw_steps, their_loss, write_checkpoint
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import nn

import qlora
import sft
from lora import LoRAConfig, add_lora, load_adapter, lora_layers, merge, save_adapter
from model import Batch, Linear, Segment, load_model, pick_dtype
from qlora import (
    Linear4bit,
    QuantConfig,
    as_merged,
    load_4bit,
    measure_merge,
    save_4bit,
    swap_linear4bit,
)
from support.errors import UserError, run_command

pytestmark = pytest.mark.filterwarnings("ignore")
# head_dim != C/H, K < H, an odd vocabulary (conftest), and rows that are no multiple of a block
SHAPES = {
    "qwen3": dict(),
    "qwen3-untied": dict(tie_word_embeddings=False, dtype="bfloat16", max_shard_size="60KB"),
    "llama": dict(
        model_type="llama",
        tie_word_embeddings=False,
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
    ),
}
DOCUMENTS = [np.random.default_rng(n).integers(0, 199, n) for n in (23, 9)]
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {
        name: write_checkpoint(tmp_path_factory.mktemp("base") / name, **options)
        for name, options in SHAPES.items()
    }


def pack(documents=DOCUMENTS):
    return Batch.pack(
        [[Segment(ids.astype(np.int32), ids.astype(np.int32))] for ids in documents]
    )


def theirs(folder, quant=None, dtype=torch.float32):
    """transformers' model, in bitsandbytes' 4 bits if `quant`.

    In training mode, where a CPU computes in fp32 too.
    """
    options = (
        {
            "quantization_config": transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant.bnb_4bit_quant_type,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=quant.bnb_4bit_use_double_quant,
            )
        }
        if quant
        else {}
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, **options
    ).train()


@torch.no_grad()
def logits(model):
    if hasattr(model, "head_weight"):
        return model.logits(model(pack()))
    return torch.cat([model(torch.tensor(ids)[None]).logits[0] for ids in DOCUMENTS]).float()


def assert_close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (
        f"{(a - b).abs().max() / b.abs().max():.1e}"
    )


@torch.no_grad()
def shake(model, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=generator)


def layers_4bit(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear4bit)}


# --- the layer ------------------------------------------------------------------------------------


def a_layer(out, inside, kind="nf4", double=True, dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    plain = Linear(inside, out, bias=bias)
    with torch.device("meta"):
        layer = Linear4bit(Linear(inside, out, bias=bias), QuantConfig(True, kind, double))
    layer.set_tensor("weight", plain.weight.data, "cpu", dtype)
    if bias:
        layer.set_tensor("bias", plain.bias.data, "cpu", dtype)
    return layer, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind,double", KINDS)
@pytest.mark.parametrize("shape", [(64, 128), (7, 33), (5, 3), (300, 172)])
def test_bits_and_values_are_those_of_bitsandbytes_modules(shape, kind, double, dtype):
    layer, plain = a_layer(*shape, kind, double, dtype)
    module = bitsandbytes.nn.Linear4bit(
        *shape[::-1], bias=False, quant_type=kind, compress_statistics=double
    )
    module.weight = bitsandbytes.nn.Params4bit(
        plain.weight.data.to(dtype),
        requires_grad=False,
        quant_type=kind,
        compress_statistics=double,
        blocksize=64,
    ).to("cpu")
    stored = module.state_dict()
    assert set(stored) == set(layer.state_dict())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, stored[name]) and tensor.dtype == stored[name].dtype, name
    wanted = bitsandbytes.functional.dequantize_4bit(
        module.weight.data, module.weight.quant_state
    )
    assert torch.equal(layer.dense_weight(), wanted) and layer.dense_weight().dtype == dtype


def test_the_known_error_of_nf4():
    """Mean absolute error of N(0, 1) at block 64; the figure is that of bitsandbytes' own test."""
    layer, _ = a_layer(1024, 1024, double=False)
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    layer.replace_weight(W)
    assert abs((layer.dense_weight() - W).abs().mean() - 0.0728) < 0.0002


@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_forward_and_gradients_are_those_of_the_dequantised_layer_and_no_weight_is_kept(
    compute,
):
    layer, _ = a_layer(40, 72, bias=True)
    layer.compute_dtype = compute and torch.bfloat16
    layer.bias.requires_grad_(True)
    W, bias = layer.dense_weight(), layer.bias.detach().clone().requires_grad_(True)
    x = torch.randn(11, 72, requires_grad=True)
    same = x.detach().clone().requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        y = layer(x)
    kind = layer.compute_dtype or x.dtype
    expected = nn.functional.linear(same.to(kind), W.to(kind)).to(x.dtype) + bias
    assert torch.equal(y, expected) and max(kept, default=0) < W.numel()
    (y**2).sum().backward(), (expected**2).sum().backward()
    assert torch.equal(x.grad, same.grad) and torch.equal(layer.bias.grad, bias.grad)
    assert not any(b.requires_grad for b in layer.buffers()) and x.grad.abs().max() > 0


def test_it_copies_and_goes_to_meta_as_any_module():
    layer, _ = a_layer(16, 64)
    other = copy.deepcopy(layer)
    other.replace_weight(torch.zeros(16, 64))
    assert not other.dense_weight().any() and layer.dense_weight().any()
    assert {b.device.type for b in layer.to("meta").buffers()} == {"meta"}
    assert set(layer.state_dict()) == set(other.state_dict())


# --- loading, and files both ways -----------------------------------------------------------------


@pytest.mark.parametrize("kind,double", KINDS)
@pytest.mark.parametrize("base", SHAPES)
def test_a_quantised_load_computes_what_transformers_and_bitsandbytes_do(
    base, kind, double, bases
):
    quant = QuantConfig(True, kind, double)
    model = load_4bit(bases[base], quant, dtype="float32")
    assert len(layers_4bit(model)) == 14 and "lm_head" not in layers_4bit(model)
    reference = theirs(bases[base], quant)
    for path, layer in layers_4bit(model).items():
        module = reference.get_submodule(path)
        assert torch.equal(layer.weight, module.weight.data), path
    rest = load_model(bases[base], dtype="float32")
    for name, p in model.named_parameters():
        assert torch.equal(p, rest.get_parameter(name)) and not p.requires_grad, name
    assert_close(logits(model), logits(reference))
    assert (logits(model) - logits(rest)).abs().max() > 1e-2 * logits(rest).abs().max()


@pytest.mark.parametrize("kind,double", KINDS)
@pytest.mark.parametrize("base", SHAPES)
def test_4bit_checkpoints_go_both_ways(base, kind, double, bases, tmp_path):
    quant = QuantConfig(True, kind, double, "float32")
    reference = theirs(bases[base], quant)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    model = load_4bit(
        tmp_path / "theirs", dtype="float32"
    )  # that it holds 4 bits is told by the files alone
    assert_close(logits(model), logits(reference))

    ours = load_4bit(bases[base], quant, dtype="float32")
    save_4bit(ours, tmp_path / "ours", quant)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    again = load_4bit(tmp_path / "ours", dtype="float32")
    exact = ours.config.dtype == "float32"  # what is not quantised is stored in the base's dtype
    assert_close(logits(again), logits(ours), 0 if exact else 1e-5)
    # what is not quantised in a bfloat16 checkpoint, transformers always computes in bfloat16
    assert_close(logits(theirs(tmp_path / "ours")), logits(ours), 1e-5 if exact else 0.03)


def test_a_model_trained_from_a_stored_4bit_checkpoint_needs_no_flag(bases, tmp_path):
    quant = QuantConfig(True)
    save_4bit(load_4bit(bases["qwen3"], quant), tmp_path / "stored", quant)
    a, b = load_4bit(tmp_path / "stored"), load_4bit(bases["qwen3"], quant)
    for model in (a, b):
        add_lora(model, LoRAConfig(lora_r=2), seed=1)
        shake(model)
    assert torch.equal(logits(a), logits(b))


# --- training -------------------------------------------------------------------------------------


def our_loss(model, documents):
    return -model.logps(pack(documents)).sum()


@pytest.mark.parametrize(
    "base,settings",
    [
        ("qwen3", dict(target_modules="all-linear", r=4, lora_alpha=8)),
        (
            "llama",
            dict(
                target_modules=["q_proj", "up_proj"],
                r=3,
                lora_alpha=8,
                bias="all",
                modules_to_save=["norm"],
            ),
        ),
        ("qwen3-untied", dict(target_modules="all-linear", r=4, use_dora=True)),
    ],
)
def test_qlora_training_is_pefts(base, settings, bases, tmp_path):
    """20 steps in fp32 beside PEFT on transformers' 4-bit model, from one adapter.

    DoRA's tolerance is 1e-4: PEFT takes the rows' lengths from the whole W + BA, lora.py sums them.
    """
    quant, tolerance = QuantConfig(True), 1e-4 if settings.get("use_dora") else 1e-5
    torch.manual_seed(0)
    start = peft.get_peft_model(
        theirs(bases[base], quant), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    shake(start)
    start.save_pretrained(tmp_path / "start")
    reference = peft.PeftModel.from_pretrained(
        theirs(bases[base], quant), tmp_path / "start", is_trainable=True
    )
    model = load_4bit(bases[base], quant, dtype="float32")
    load_adapter(model, tmp_path / "start", trainable=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    rng = np.random.default_rng(0)
    batches = [[rng.integers(0, 199, n) for n in rng.integers(6, 20, 2)] for _ in range(4)] * 5
    expected, losses = (
        adamw_steps(reference, their_loss, batches),
        adamw_steps(model, our_loss, batches),
    )
    assert expected[-4:].mean() < expected[:4].mean() - 0.1
    assert_close(losses, expected, tolerance)
    reference.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    end = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "ours" / "adapter_model.safetensors").items():
        assert_close(tensor, end[key], 10 * tolerance if "bias" in key else tolerance)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in trains), name


def test_checkpointing_changes_no_gradient(bases):
    grads = []
    for checkpointing in (False, True):
        model = load_4bit(bases["qwen3"], QuantConfig(True), dtype="float32")
        add_lora(model, LoRAConfig(lora_r=4), seed=1)
        shake(model)
        model.gradient_checkpointing = checkpointing
        our_loss(model, DOCUMENTS).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items()) and grads[0]


# --- the measured merge ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(target_modules=["q_proj", "up_proj"]),
        dict(use_dora=True),
        dict(init_lora_weights="pissa"),
    ],
)
@pytest.mark.parametrize("base", ["qwen3", "llama"])
def test_a_merge_is_measured_as_it_comes_out(base, settings, bases, tmp_path):
    """KL and agreement of `measure_merge` are those of the merged folders in transformers."""
    quant = QuantConfig(True)
    model = load_4bit(bases[base], quant, dtype="float32")
    add_lora(model, LoRAConfig(lora_r=4, **settings), seed=1)
    shake(model, size=0.02)
    figures = measure_merge(model, [pack()])
    save_adapter(model, tmp_path / "adapter", bases[base])
    held = logits(model)[pack().scored].log_softmax(-1)
    assert ("dequantized" in figures) == ("init_lora_weights" not in settings)
    for name in figures:
        swap_layers = None
        if name == "dequantized":
            swap_layers = partial(swap_linear4bit, quant)
        merge(tmp_path / "adapter", tmp_path / name, swap_layers=swap_layers)
        merged = theirs(tmp_path / name).eval()
        assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
        other = logits(merged)[pack().scored].log_softmax(-1)
        kl = (held.exp() * (held - other)).sum(-1).mean()
        assert abs(kl - figures[name]["kl"]) < 1e-5 + 1e-3 * kl
        assert (held.argmax(-1) == other.argmax(-1)).float().mean() == pytest.approx(
            figures[name]["top1"]
        )
    assert figures["original"]["kl"] > 1e-3
    if "dequantized" in figures:
        assert abs(figures["dequantized"]["kl"]) < 1e-6 and figures["dequantized"]["top1"] == 1.0


def test_while_it_is_measured_nothing_changes(bases):
    model = load_4bit(bases["llama"], QuantConfig(True), dtype="float32")
    add_lora(model, LoRAConfig(lora_r=4, target_modules=["q_proj"]), seed=1)
    before = logits(model)
    with as_merged(model, "original"):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


# --- LoRA's family --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "gaussian"])
def test_a_start_is_pefts(kind, bases):
    """Singular vectors agree up to their sign, so B A is compared, and what is left of the base.

    The randomised SVD draws numbers, which PEFT takes from the global state: there torch's function
    is the reference.
    """
    settings = dict(target_modules=["k_proj", "down_proj"], lora_alpha=6, init_lora_weights=kind)
    reference = peft.get_peft_model(
        theirs(bases["qwen3"]), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    )
    model, base = (load_model(bases["qwen3"], dtype="float32") for _ in range(2))
    plain = logits(model)
    add_lora(model, LoRAConfig(lora_r=4, **settings), seed=11)
    assert_close(logits(model), plain)
    for path, layer in lora_layers(model).items():
        other = reference.get_submodule(f"base_model.model.{path}")
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        if kind == "gaussian":
            assert (
                abs(layer.lora_A.std() * 4 - 1) < 0.25 > abs(A.std() * 4 - 1)
                and not layer.lora_B.any()
            )
            continue
        rest = other.base_layer.weight
        if kind == "pissa_niter_4":
            torch.manual_seed(11)
            U, S, V = torch.svd_lowrank(W := base.get_submodule(path).weight, 4, niter=4)
            B, A = U * (S / 1.5).sqrt(), (S / 1.5).sqrt()[:, None] * V.t()
            rest = W - 1.5 * B @ A
        assert_close(layer.lora_B @ layer.lora_A, B @ A)
        assert_close(layer.base_layer.weight, rest)
        if kind == "olora":  # B's columns are orthonormal
            assert_close(layer.lora_B.t() @ layer.lora_B, torch.eye(4))
            continue
        assert_close(
            layer.lora_A @ layer.lora_A.t(), layer.lora_B.t() @ layer.lora_B
        )  # the root of S on either side
    assert (
        kind != "gaussian"
        or len({layer.lora_A[0, 0].item() for layer in lora_layers(model).values()}) == 4
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(init_lora_weights="olora"),
        dict(use_rslora=True),
        dict(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3.0}),
    ],
)
def test_pissa_is_exported_as_plain_lora(settings, bases, tmp_path):
    model = load_model(bases["llama"], dtype="float32")
    settings = {"init_lora_weights": "pissa"} | settings
    add_lora(model, LoRAConfig(lora_r=4, **settings), seed=1)
    shake(model)
    save_adapter(model, tmp_path / "ours", bases["llama"])
    reference = peft.PeftModel.from_pretrained(theirs(bases["llama"]), tmp_path / "ours").eval()
    assert reference.peft_config["default"].r == 8
    assert_close(logits(reference), logits(model))
    again = load_model(bases["llama"], dtype="float32")
    load_adapter(again, tmp_path / "ours")
    assert_close(logits(again), logits(model))


def test_loftq_makes_up_for_what_4_bits_lose(bases, tmp_path):
    """A and B against PEFT's decomposition of the error (which has alpha = r); weights improve."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    model = load_4bit(bases["qwen3"], QuantConfig(True), dtype="float32")
    add_lora(model, LoRAConfig(lora_r=8, lora_alpha=8, init_lora_weights="loftq"), seed=1)
    other = load_4bit(bases["qwen3"], QuantConfig(True), dtype="float32")
    add_lora(other, LoRAConfig(lora_r=8, lora_alpha=20, init_lora_weights="loftq"), seed=1)
    for path, layer in lora_layers(model).items():
        W, held = layer.base_layer.original_weight(), layer.base_layer.dense_weight()
        found = _low_rank_decomposition(W - held, reduced_rank=8)
        assert_close(layer.lora_B @ layer.lora_A, found["L"] @ found["R"])
        assert (W - layer.weight).norm() < 0.9 * (W - held).norm()
        assert_close(lora_layers(other)[path].weight, layer.weight)  # whatever the scale
    save_adapter(
        model, tmp_path / "ours", bases["qwen3"]
    )  # a plain LoRA of the 4-bit base as it is
    reference = peft.PeftModel.from_pretrained(
        theirs(bases["qwen3"], QuantConfig(True)), tmp_path / "ours"
    ).train()
    assert_close(logits(reference), logits(model))


def test_pissa_on_4_bits_quantises_the_rest(bases):
    model = load_4bit(bases["qwen3"], QuantConfig(True), dtype="float32")
    add_lora(model, LoRAConfig(lora_r=8, lora_alpha=4, init_lora_weights="pissa"), seed=1)
    for layer in lora_layers(model).values():
        held = layer.base_layer.weight.clone()
        rest = layer.base_layer.original_weight() - 0.5 * layer.lora_B @ layer.lora_A
        layer.base_layer.replace_weight(rest.detach())
        assert (
            layer.base_layer.weight == held
        ).float().mean() > 0.999  # a value between two may fall either way


def test_loraplus_steps_are_pefts(bases, tmp_path):
    settings = dict(
        target_modules=["q_proj", "down_proj"],
        r=4,
        bias="all",
        modules_to_save=["embed_tokens", "lm_head"],
    )
    torch.manual_seed(0)
    start = peft.get_peft_model(
        theirs(bases["llama"]), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    shake(start)
    start.save_pretrained(tmp_path / "start")
    reference = peft.PeftModel.from_pretrained(
        theirs(bases["llama"]), tmp_path / "start", is_trainable=True
    )
    optimizer = create_loraplus_optimizer(
        reference,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.1,
        eps=1e-5,
    )
    model = load_model(bases["llama"], dtype="float32")
    load_adapter(model, tmp_path / "start", trainable=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = sft.SFTConfig(
        learning_rate=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.1, adam_epsilon=1e-5
    )
    mine = sft.make_optimizer(parameters, config)
    assert sorted({group["ratio"] for group in mine.param_groups}) == [1.0, 16.0]
    for group in mine.param_groups:
        group["lr"] *= group["ratio"]  # as the loop does at every step
    for _ in range(5):
        for network, loss_fn, steps in (
            (reference, their_loss, optimizer),
            (model, our_loss, mine),
        ):
            steps.zero_grad()
            loss_fn(network, DOCUMENTS).backward()
            steps.step()
    reference.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    end = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "ours" / "adapter_model.safetensors").items():
        assert_close(
            tensor, end[key], 1e-4 if "bias" in key else 2e-5
        )  # some biases' gradients are rounding alone


# --- optimizers and fp16 in the loop --------------------------------------------------------------


class Halfway(Exception):
    pass


def trained(folder, base, output, stop_at=None, monkeypatch=None, **settings):
    """One run of the loop over random rows; stop_at: interrupted there and gone on with."""
    rng = np.random.default_rng(3)
    examples = []
    for n in rng.integers(8, 30, 24):
        ids = rng.integers(0, 199, n).astype(np.int32)
        examples.append([Segment(ids, ids)])
    config = sft.SFTConfig(
        model=str(base),
        data=["-"],
        output_dir=str(folder / output),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        **settings,
    )
    (folder / output).mkdir(exist_ok=True)
    model = load_4bit(base, config, dtype=config.dtype)
    add_lora(model, config, config.seed)
    loss, calls = sft.sft_loss, []

    def counted(model, batch):
        calls.append(1)
        if stop_at and len(calls) > stop_at:
            raise Halfway
        return loss(model, batch)

    sft.train(model, sft.Plan(examples, config), counted, config)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        dict(
            load_in_4bit=True, optim="adamw_8bit", lora_r=128, lora_dropout=0.2
        ),  # r 128: matrices big enough for 8 bit
        dict(load_in_4bit=True, optim="paged_adamw_8bit", loraplus_lr_ratio=4.0, lora_r=96),
        dict(lora_r=0, optim="adamw_8bit"),
        dict(dtype="float16", lora_r=4),
        dict(init_lora_weights="pissa", lora_r=2),
        dict(load_in_4bit=True, use_dora=True, init_lora_weights="gaussian", bias="all"),
    ],
    ids=str,
)
def test_stopped_and_gone_on_with_is_the_same_run(settings, bases, tmp_path):
    trained(tmp_path, bases["llama"], "whole", **settings)
    with pytest.raises(Halfway):
        trained(tmp_path, bases["llama"], "halves", stop_at=4, **settings)
    trained(tmp_path, bases["llama"], "halves", **settings)
    for file in ("model", "adapter_model", "optimizer"):
        file = f"checkpoint-000006/{file}.safetensors"
        if (tmp_path / "whole" / file).exists():
            a, b = (
                load_file(tmp_path / "whole" / file),
                load_file(tmp_path / "halves" / file),
            )
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
            if "optimizer" in file and "8bit" in settings.get("optim", ""):
                assert any(t.dtype == torch.uint8 for t in a.values())
    states = [
        json.loads((tmp_path / run / "checkpoint-000006" / "state.json").read_text())
        for run in ("whole", "halves")
    ]
    assert [state.pop("log_bytes") > 0 for state in states]  # lines of the log tell the speed too
    assert states[0] == states[1] and bool(states[0]["scaler"]) == (
        settings.get("dtype") == "float16"
    )


def test_adamw_8bit_is_bitsandbytes(bases):
    model = load_4bit(bases["qwen3"], QuantConfig(True), dtype="float32")
    add_lora(model, LoRAConfig(lora_r=128), seed=1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    copies = [nn.Parameter(p.detach().clone()) for p in parameters.values()]
    config = sft.SFTConfig(
        optim="adamw_8bit", learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.95
    )
    ours = sft.make_optimizer(parameters, config)
    theirs = bitsandbytes.optim.AdamW8bit(
        copies, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    for _ in range(3):
        ours.zero_grad()
        our_loss(model, DOCUMENTS).backward()
        for p, other in zip(parameters.values(), copies):
            other.grad = p.grad.clone()
        ours.step(), theirs.step()
    assert all(torch.equal(p, copy) for p, copy in zip(parameters.values(), copies))


def test_fp16_scales_its_loss_and_skips_what_overflows(bases, tmp_path):
    """With gradients that overflow at first, the scale is halved and those steps change nothing."""

    def run(output, scale):
        def loss(model, batch):
            return sft.sft_loss(model, batch)[0] * scale, {}

        config = sft.SFTConfig(
            model="-",
            data=["-"],
            output_dir=str(tmp_path / output),
            max_steps=4,
            dtype="float16",
            lora_r=4,
            logging_steps=1,
            learning_rate=1e-2,
            warmup_ratio=0,
        )
        (tmp_path / output).mkdir()
        model = load_model(bases["qwen3"], dtype="float16")
        add_lora(model, config, 1)
        start = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }
        examples = [[Segment(ids.astype(np.int32), ids.astype(np.int32))] for ids in DOCUMENTS]
        sft.train(model, sft.Plan(examples, config), loss, config)
        state = json.loads((tmp_path / output / "checkpoint-000004" / "state.json").read_text())
        return state["scaler"], {
            name: not torch.equal(model.get_parameter(name), p) for name, p in start.items()
        }

    calm, moved = run("calm", 1.0)
    assert calm["scale"] >= 2.0**14 and any(moved.values())
    wild, moved = run("wild", 1e9)
    assert wild["scale"] == 2.0**12 and not any(moved.values())


def test_dtype_is_the_devices_matter(monkeypatch, bases, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    cuda = torch.device("cuda")
    assert pick_dtype("auto", "bfloat16", cuda) == "float16"
    line = "dtype: float16, no bfloat16 products on this cuda\n"
    assert capsys.readouterr().err == line
    assert pick_dtype("auto", "float32", cuda) == "float32"
    assert capsys.readouterr().err == ""
    assert pick_dtype("bfloat16", "bfloat16", cuda) == "bfloat16"
    line = "dtype: bfloat16 is slow, no products in it on this cuda; auto is float16\n"
    assert capsys.readouterr().err == line


def test_4_bit_follows_the_cpu_and_files_the_checkpoint(monkeypatch, bases, tmp_path):
    """Without bf16 products 4-bit layers compute in fp32; what is written says bf16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    folder, quant = bases["qwen3-untied"], QuantConfig(load_in_4bit=True)
    model = load_4bit(folder, quant)
    layer = model.model.layers[0].mlp.up_proj
    assert model.dtype == torch.float32 and layer.dense_weight().dtype == torch.float32
    named = load_4bit(folder, quant, dtype="bfloat16").model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, named.weight), "the same 4 bits"
    argv = [
        "qlora.py",
        "quantize",
        "--model",
        str(folder),
        "--output_dir",
        str(tmp_path / "q"),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    qlora.main()
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    states = [bytes(t.tolist()) for name, t in stored.items() if "quant_state" in name]
    assert states and all(json.loads(state)["dtype"] == "bfloat16" for state in states)


# --- mistakes -------------------------------------------------------------------------------------


def stored_4bit(base, folder):
    quant = QuantConfig(True)
    save_4bit(load_4bit(base, quant), folder, quant)
    return folder


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def described(text):
    def change(tensors):
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    "change,parts",
    [
        (lambda t: t.pop(f"{Q}.absmax"), ("missing", "q_proj.weight.absmax")),
        (lambda t: t.pop(f"{Q}.nested_quant_map"), ("missing", "nested_quant_map")),
        (lambda t: t.pop(STATE), ("unexpected", "q_proj.weight.absmax")),
        (
            lambda t: t.update({Q: t[Q][:7].clone()}),
            ("q_proj.weight is [7, 1], expected [1728, 1]",),
        ),
        (
            lambda t: t.update({Q: t[Q].reshape(-1).view(torch.bfloat16)[:, None].clone()}),
            ("q_proj.weight is [864, 1]",),
        ),
        (
            lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"].float()}),
            ("q_proj.weight.absmax (F32)", "another dtype"),
        ),
        (described("{"), ("does not describe 4-bit weights of shape [72, 48]",)),
        (
            described(
                '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [48, 72]}'
            ),
            ("shape [72, 48]",),
        ),
        (
            described(
                '{"quant_type": "nf4", "blocksize": 63, "dtype": "float32", "shape": [72, 48]}'
            ),
            ("does not describe",),
        ),
        (
            described(
                '{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [72, 48]}'
            ),
            ("does not describe",),
        ),
        (
            described(
                '{"quant_type": "nf4", "blocksize": 64, "dtype": "int8", "shape": [72, 48]}'
            ),
            ("does not describe",),
        ),
    ],
    ids=range(11),
)
def test_a_stored_weight_that_does_not_fit_is_named(change, parts, bases, tmp_path):
    folder = stored_4bit(bases["qwen3"], tmp_path / "stored")
    rewritten(folder, change)
    with pytest.raises(UserError) as caught:
        load_4bit(folder)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_does_not_go_together_is_said(bases, tmp_path, monkeypatch, capsys):
    folder = stored_4bit(bases["qwen3"], tmp_path / "stored")

    def add(model, **settings):
        add_lora(model, LoRAConfig(**settings))

    def quantized():
        return load_4bit(bases["qwen3"], QuantConfig(True))

    model = quantized()
    add(model)
    save_adapter(model, tmp_path / "adapter", folder)
    for message, mistake in {
        "bnb_4bit_quant_type: 'nf5' is not one of nf4, fp4": lambda: load_4bit(
            bases["qwen3"], QuantConfig(True, "nf5")
        ),
        "bnb_4bit_compute_dtype: 'bf16'": lambda: load_4bit(
            bases["qwen3"], QuantConfig(True, bnb_4bit_compute_dtype="bf16")
        ),
        "lora_r: 0 trains every weight": lambda: sft.SFTConfig(load_in_4bit=True, lora_r=0),
        "holds 4-bit weights": lambda: load_model(folder),
        "name the 16-bit model": lambda: merge(tmp_path / "adapter", tmp_path / "out"),
        "modules_to_save: model.layers.0.self_attn.k_proj is held in 4 bit": lambda: add(
            quantized(), modules_to_save=["k_proj"]
        ),
        "loftq corrects 4-bit weights; give --load_in_4bit": lambda: add(
            load_model(bases["qwen3"]), init_lora_weights="loftq"
        ),
        "the checkpoint holds 4 bits; name the 16-bit model": lambda: add(
            load_4bit(folder), init_lora_weights="pissa"
        ),
        "init_lora_weights: 'pisa' is not one of": lambda: add(
            quantized(), init_lora_weights="pisa"
        ),
        "lora_r: 49 is above the 48 singular values of model.layers.0.self_attn.q_proj": lambda: (
            add(quantized(), init_lora_weights="pissa", lora_r=49)
        ),
        "use_dora does not go with init_lora_weights pissa": lambda: add(
            quantized(), init_lora_weights="pissa", use_dora=True
        ),
    }.items():
        with pytest.raises(UserError, match=message):
            mistake()
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    qlora.bitsandbytes.cache_clear()
    with pytest.raises(
        UserError,
        match="4-bit weights and 8-bit optimizers need it: pip install bitsandbytes",
    ):
        quantized()
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        sft.make_optimizer({"a": nn.Parameter(torch.zeros(2))}, sft.SFTConfig(optim="adamw_8bit"))


def test_the_commands(bases, tmp_path, monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["qlora.py", *map(str, argv)])
        run_command(qlora.main)
        return capsys.readouterr().out

    written = run("quantize", "--model", bases["qwen3"], "--output_dir", tmp_path / "stored")
    assert written == f"quantized {bases['qwen3']} into {tmp_path / 'stored'}\n"
    model = load_4bit(tmp_path / "stored", dtype="float32")
    assert len(layers_4bit(model)) == 14
    add_lora(model, LoRAConfig(lora_r=2))
    shake(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "stored")
    written = run("merge", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert written == f"merged {tmp_path / 'adapter'} into {tmp_path / 'merged'}\n"
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    assert_close(logits(theirs(tmp_path / "merged").eval()), logits(model))
    with pytest.raises(SystemExit) as caught:
        run("quantize", "--model", bases["qwen3"], "--output_dir", tmp_path / "merged")
    assert caught.value.code == 2 and "exists already" in capsys.readouterr().err

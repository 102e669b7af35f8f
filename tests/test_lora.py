"""lora.py against PEFT and transformers, and its properties.

Tiny shapes that break wrong code: head_dim != C / H, K < H, biases, tied and untied, a vocabulary
of odd size.
"""

import json
import re
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import adamw_steps, their_loss
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    count_parameters,
    disable_lora,
    load_adapter,
    lora_layers,
    merge,
    merge_lora,
    merged_layer,
    save_adapter,
)
from model import Batch, Linear, ModelConfig, Segment, Transformer, load_model
from support.errors import UserError, run_command
from support.files import new_folder

SHARED = Path(__file__).parents[2] / "shared" / "models" / "configs"
SHAPE = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
)
FAMILIES = {
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=False),
    "qwen3-tied": dict(model_type="qwen3", tie_word_embeddings=True),
    "qwen2-tied": dict(
        model_type="qwen2", tie_word_embeddings=True, head_dim=6
    ),  # q, k, v biases
    "llama": dict(
        model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
}
DOCUMENTS = [np.random.default_rng(n).integers(0, 67, n) for n in (11, 7)]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: folder}, written by transformers; norms and biases random: defaults hide faults."""
    folders = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(len(folders))
        hf = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**{**SHAPE, **config})
        )
        with torch.no_grad():
            for name, p in hf.named_parameters():
                if p.dim() == 1:
                    p += 0.3 * torch.randn_like(p)
                else:
                    p *= 8
        folders[family] = tmp_path_factory.mktemp("base") / family
        hf.save_pretrained(folders[family])
    return folders


def ours(folder, dtype="float32"):
    return load_model(folder, dtype=dtype).eval()


def theirs(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def pack(documents):
    return Batch.pack(
        [[Segment(ids.astype(np.int32), ids.astype(np.int32))] for ids in documents]
    )


@torch.no_grad()
def logits(model):
    if isinstance(model, Transformer):
        return model.logits(model(pack(DOCUMENTS)))
    return torch.cat([model(torch.tensor(ids)[None]).logits[0] for ids in DOCUMENTS])


def assert_close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (
        f"{(a - b).abs().max() / b.abs().max():.1e}"
    )


@torch.no_grad()
def shake(model, seed=1):
    """Every trainable parameter a little elsewhere, as training would have left it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += 0.1 * torch.randn(p.shape, generator=generator)


def stored(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def peft_model(folder, settings, seed=0):
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        theirs(folder), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    shake(model)
    return model.eval()


CASES = {  # name: family, PEFT's settings
    "tokens": ("qwen3", dict(target_modules=["q_proj"], trainable_token_indices=[66, 3])),
    "tokens, tied": ("qwen3-tied", dict(target_modules=["k_proj"], trainable_token_indices=[5])),
    "names": ("qwen3", dict(target_modules=["q_proj", "v_proj"])),
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "regex": ("qwen3", dict(target_modules=r".*layers\.1\.(mlp|self_attn)\.(up|o)_proj")),
    "paths": (
        "qwen3",
        dict(target_modules=["model.layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]),
    ),
    "layers": (
        "qwen3",
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    ),
    "bias none": ("llama", dict(target_modules=["q_proj", "down_proj"])),
    "bias all": ("llama", dict(target_modules=["q_proj", "down_proj"], bias="all")),
    "bias lora_only": (
        "qwen2-tied",
        dict(target_modules=["q_proj", "up_proj"], bias="lora_only"),
    ),
    "norms": (
        "qwen3",
        dict(
            target_modules=["q_proj"],
            modules_to_save=["input_layernorm", "post_attention_layernorm"],
        ),
    ),
    "every norm": ("qwen3", dict(target_modules=["q_proj"], modules_to_save=["norm"])),
    "both ends": (
        "qwen3",
        dict(target_modules=["o_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "embedding": (
        "llama",
        dict(target_modules=["o_proj"], modules_to_save=["embed_tokens"]),
    ),
    "tied embedding": (
        "qwen3-tied",
        dict(
            target_modules=["k_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
    ),
    "tied head": (
        "qwen2-tied",
        dict(target_modules=["k_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "rslora": ("qwen3", dict(target_modules="all-linear", use_rslora=True)),
    "dora": ("qwen3", dict(target_modules="all-linear", use_dora=True)),
    "dora and biases": (
        "llama",
        dict(
            target_modules=["q_proj", "down_proj"],
            use_dora=True,
            bias="lora_only",
            use_rslora=True,
        ),
    ),
    "patterns": (
        "qwen3",
        dict(
            target_modules=["q_proj", "k_proj", "up_proj"],
            alpha_pattern={r"layers\.1\..*": 5, "q_proj": 3},
            rank_pattern={"q_proj": 5, r"layers\.0\.self_attn\.k_proj": 2},
        ),
    ),
    "whole layers": (
        "llama",
        dict(target_modules="all-linear", modules_to_save=["mlp", "k_proj"]),
    ),
    "whole biases": (
        "llama",
        dict(target_modules=["q_proj"], modules_to_save=["k_proj"], bias="all"),
    ),
    "head": ("llama", dict(target_modules=["q_proj", "lm_head"])),
    "everything": (
        "llama",
        dict(
            target_modules="all-linear",
            modules_to_save=["norm", "lm_head"],
            bias="all",
            use_rslora=True,
            rank_pattern={"o_proj": 3},
        ),
    ),
}
for _, settings in CASES.values():
    settings |= dict(r=4, lora_alpha=6) | settings


def config_of(settings):
    """PEFT's settings as ours."""
    rename = {"r": "lora_r"}
    config = {
        rename.get(key, key): value
        for key, value in settings.items()
        if key != "ensure_weight_tying"
    }
    config["target_modules"] = [t] if isinstance(t := config["target_modules"], str) else t
    return LoRAConfig(**config)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_opens_here_and_ours_in_peft(case, bases, tmp_path):
    family, settings = CASES[case]
    reference = peft_model(bases[family], settings)
    reference.save_pretrained(tmp_path / "theirs")
    model = ours(bases[family])
    plain = logits(model)
    load_adapter(model, tmp_path / "theirs")
    expected = logits(reference)
    assert (expected - plain).abs().max() > 1e-2 * expected.abs().max()
    assert_close(logits(model), expected)
    assert not any(p.requires_grad for p in model.parameters())

    save_adapter(model, tmp_path / "ours", bases[family])
    stray = (
        ".base_layer.weight",
        ".modules_to_save.bias",
        ".original_module.bias",
    )  # frozen, or there twice
    assert set(stored(tmp_path / "ours")) == {
        key for key in stored(tmp_path / "theirs") if not key.endswith(stray)
    }
    for key, tensor in stored(tmp_path / "ours").items():
        assert torch.equal(tensor, stored(tmp_path / "theirs")[key]), key
    again = peft.PeftModel.from_pretrained(theirs(bases[family]), tmp_path / "ours").eval()
    assert_close(logits(again), expected, 1e-6)

    merge(tmp_path / "ours", tmp_path / "merged")  # the base from the adapter's own config
    opened = theirs(tmp_path / "merged")
    assert_close(logits(opened), expected)
    assert_close(logits(ours(tmp_path / "merged")), expected)
    if not family.endswith("tied"):  # PEFT's own merge leaves a tied pair in two
        wanted = reference.merge_and_unload().state_dict()
        for name, tensor in opened.state_dict().items():
            assert_close(tensor, wanted[name], 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_made_here_opens_in_peft(case, bases, tmp_path):
    family, settings = CASES[case]
    model = ours(bases[family])
    add_lora(model, config_of(settings), seed=3)
    shake(model)
    save_adapter(model, tmp_path / "ours", bases[family])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        reference = peft.PeftModel.from_pretrained(
            theirs(bases[family]), tmp_path / "ours"
        ).eval()
    assert_close(logits(reference), logits(model))
    assert {p.dtype for p in stored(tmp_path / "ours").values()} == {torch.float32}
    trainable, total = count_parameters(model)
    tied = family.endswith("tied") and settings.get("modules_to_save")
    assert trainable == sum(
        t.numel() for k, t in stored(tmp_path / "ours").items() if not (tied and "lm_head" in k)
    )
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("whole", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_pair_that_peft_trained_apart_is_untied(whole, bases, tmp_path):
    base = bases["qwen3-tied"]
    reference = peft_model(base, dict(r=2, target_modules=["q_proj"], modules_to_save=whole))
    reference.save_pretrained(tmp_path / "theirs")
    model = ours(base)
    load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model), logits(reference))
    save_adapter(model, tmp_path / "ours", base)
    assert set(stored(tmp_path / "ours")) == set(stored(tmp_path / "theirs"))
    assert "untied" in merge(tmp_path / "ours", tmp_path / "merged")[0]
    assert_close(logits(theirs(tmp_path / "merged")), logits(reference))
    assert_close(logits(ours(tmp_path / "merged")), logits(reference))


TOKENS = "trainable_token_indices"
ENDS = {  # name: families, PEFT's settings of embedding and head; all are r 3, alpha 7
    "lora on the embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "rslora on the embedding": dict(
        target_modules=["q_proj", "embed_tokens"],
        use_rslora=True,
        rank_pattern={"embed_tokens": 2},
    ),
    "embedding alone": dict(target_modules=["embed_tokens"]),
    "embedding by regex": dict(target_modules=r".*(q_proj|embed_tokens)"),
    "both adapted": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "embedding, tied": dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "head adapted": dict(target_modules=["q_proj", "lm_head"]),
    "head, tied": dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    "head adapted, embedding whole": dict(
        target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]
    ),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 66]),
    "tokens by name": dict(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]}
    ),
    "tokens of both": dict(
        target_modules=["q_proj"],
        trainable_token_indices={"lm_head": [3], "embed_tokens": [3]},
    ),
    "tokens apart": dict(
        target_modules=["q_proj"],
        trainable_token_indices={"lm_head": [3, 9], "embed_tokens": [1, 2]},
    ),
    "tokens of the head": dict(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]}
    ),
    "tokens and the head adapted": dict(
        target_modules=["q_proj", "lm_head"],
        trainable_token_indices={"embed_tokens": [4, 3]},
    ),
}


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize("case", ENDS)
def test_adapted_ends_are_pefts(case, family, bases, tmp_path):
    """Embedding and head: adapted, or single tokens trained; tied and not. What opens computes what
    PEFT computes, merges to that, can be saved again, and is dry-run on meta."""
    reference = peft_model(bases[family], dict(r=3, lora_alpha=7) | ENDS[case])
    reference.save_pretrained(tmp_path / "theirs")
    if case == "tokens and the head adapted" and family == "qwen3-tied":
        with pytest.raises(UserError, match="single tokens are trained, and an end"):
            load_adapter(ours(bases[family]), tmp_path / "theirs")
        return
    expected = logits(peft.PeftModel.from_pretrained(theirs(bases[family]), tmp_path / "theirs"))
    model = ours(bases[family])
    plain = logits(model)
    load_adapter(model, tmp_path / "theirs")
    assert (expected - plain).abs().max() > 1e-2 * expected.abs().max()
    assert_close(logits(model), expected)
    merge(tmp_path / "theirs", tmp_path / "merged", bases[family])
    assert_close(logits(ours(tmp_path / "merged")), expected)
    assert_close(logits(theirs(tmp_path / "merged")), expected)
    save_adapter(model, tmp_path / "again", bases[family])
    again = ours(bases[family])
    load_adapter(again, tmp_path / "again")
    assert_close(logits(again), expected)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_peft_saved_along(dtype, family, bases, tmp_path):
    """Equal to the base's: opened as if they were not there. Others: refused; PEFT uses them."""
    reference = peft_model(bases[family], dict(r=2, target_modules=["q_proj"])).to(dtype)
    reference.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    tensors = stored(tmp_path / "theirs")
    assert f"{lora.PREFIX}lm_head.weight" in tensors
    model = ours(bases[family])
    load_adapter(model, tmp_path / "theirs")
    assert_close(
        logits(model), logits(reference.float()), 1e-5 if dtype == torch.float32 else 0.05
    )
    assert (model.lm_head is None) == (family == "qwen3-tied")
    tensors[f"{lora.PREFIX}model.embed_tokens.weight"][3] *= 1.1
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    for open_it in (partial(load_adapter, ours(bases[family])), merge_into(tmp_path)):
        with pytest.raises(
            UserError, match="embed_tokens.weight differs from this base's weight"
        ):
            open_it(tmp_path / "theirs")


def merge_into(folder):
    return lambda adapter: merge(adapter, folder / "merged")


@pytest.mark.parametrize("key", ["lm_head", "model.layers.0.self_attn.q_proj"])
def test_a_frozen_weight_of_an_adapted_layer_is_compared(key, bases, tmp_path):
    reference = peft_model(bases["qwen3"], dict(r=2, target_modules=["q_proj", "lm_head"]))
    reference.save_pretrained(tmp_path / "theirs")
    tensors, name = stored(tmp_path / "theirs"), f"{lora.PREFIX}{key}.base_layer.weight"
    tensors[name] = reference.state_dict()[name].clone()
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    model = ours(bases["qwen3"])
    load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model), logits(reference))
    tensors[name][1, 2] += 0.5
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{key}.base_layer.weight differs from this base's"):
        load_adapter(ours(bases["qwen3"]), tmp_path / "theirs")


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(target_modules=["q_proj"]),
    ],
    ids=["whole", "adapted", "head", "saved along"],
)
def test_another_vocabulary_size_is_named(settings, bases, tmp_path):
    resized = theirs(bases["qwen3"])
    resized.resize_token_embeddings(70)
    model = peft.get_peft_model(resized, peft.LoraConfig(r=2, **settings))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    with pytest.raises(
        UserError, match="70.* another vocabulary size than this base's 67"
    ) as error:
        load_adapter(ours(bases["qwen3"]), tmp_path / "theirs")
    assert "modules_to_save" not in str(error.value)


BAD_ENDS = {  # name: settings, change of the config, change of the tensors, parts of the message
    "token outside": (dict(trainable_token_indices=[3]), {TOKENS: [67]}, {}, TOKENS),
    "negative token": (dict(trainable_token_indices=[3]), {TOKENS: [-1]}, {}, TOKENS),
    "no number": (dict(trainable_token_indices=[3]), {TOKENS: ["a"]}, {}, TOKENS),
    "text": (dict(trainable_token_indices=[3]), {TOKENS: "3"}, {}, TOKENS),
    "another module": (
        dict(trainable_token_indices=[3]),
        {TOKENS: {"q_proj": [3]}},
        {},
        TOKENS,
    ),
    "one token more": (
        dict(trainable_token_indices=[3]),
        {TOKENS: [3, 4]},
        {},
        r"tokens_delta is \[1, 24\], expected \[2, 24\]",
    ),
    "tokens not named": (dict(trainable_token_indices=[3]), {TOKENS: None}, {}, TOKENS),
    "tokens not in the file": (
        {},
        {TOKENS: [3]},
        {},
        "missing base_model.model.model.embed_tokens.token_adapter",
    ),
    "half of a LoRA": (
        dict(target_modules=["q_proj", "embed_tokens"]),
        {},
        {"model.embed_tokens.lora_embedding_B": None},
        "missing .*lora_embedding_B",
    ),
    "another rank": (
        dict(target_modules=["q_proj", "embed_tokens"]),
        {},
        {"model.embed_tokens.lora_embedding_B": torch.zeros(24, 5)},
        r"lora_embedding_B is \[24, 5\], expected \[24, 2\]",
    ),
    "dora": (
        dict(target_modules=["q_proj", "embed_tokens"], use_dora=True),
        {},
        {},
        "embed_tokens.lora_magnitude_vector",
    ),
}


@pytest.mark.parametrize("case", BAD_ENDS)
def test_ends_that_do_not_fit_are_named(case, bases, tmp_path):
    settings, changes, parts, message = BAD_ENDS[case]
    settings = dict(r=2, target_modules=["q_proj"]) | settings
    peft_model(bases["qwen3"], settings).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    tensors = stored(tmp_path) | {lora.PREFIX + key: value for key, value in parts.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_adapter(ours(bases["qwen3"]), tmp_path)


def test_an_adapted_embedding_trains_on_as_a_whole(bases, tmp_path):
    reference = peft_model(bases["qwen3"], dict(r=2, target_modules=["q_proj", "embed_tokens"]))
    reference.save_pretrained(tmp_path / "theirs")
    model = ours(bases["qwen3"])
    load_adapter(model, tmp_path / "theirs", trainable=True)
    assert_close(logits(model), logits(reference))
    assert model.model.embed_tokens.weight.requires_grad
    with pytest.raises(UserError, match="embed_tokens.weight is trained in place"):
        with disable_lora(model):
            pass


PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "k_proj"]
LAYERS = {  # targets, layers_to_transform
    "a full path elsewhere": (PATHS, [1]),
    "a full path and its name": ([*PATHS, "q_proj"], [1]),
    "the head": (["lm_head", "v_proj"], [0]),
    "most of a path": (["layers.0.self_attn.q_proj", "v_proj"], [1]),
    "excluded all the same": (PATHS, [1], ["q_proj"]),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_to_transform_leaves_full_paths_alone(case, bases, tmp_path):
    targets, layers, *excluded = LAYERS[case]
    excluded = excluded[0] if excluded else None
    settings = dict(
        r=2, target_modules=targets, layers_to_transform=layers, exclude_modules=excluded
    )
    reference = peft_model(bases["qwen3"], settings)
    wanted = {
        name.removeprefix(lora.PREFIX)
        for name, module in reference.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    model = ours(bases["qwen3"])
    add_lora(
        model,
        LoRAConfig(
            lora_r=2,
            target_modules=targets,
            layers_to_transform=layers,
            exclude_modules=excluded or [],
        ),
    )
    assert set(lora_layers(model)) == wanted
    reference.save_pretrained(tmp_path)
    model = ours(bases["qwen3"])
    load_adapter(model, tmp_path)
    assert_close(logits(model), logits(reference))


def test_a_list_of_targets_from_elsewhere_is_read_as_peft_reads_it(bases, tmp_path):
    settings = dict(
        r=2,
        target_modules=["q_proj", "query_key_value"],
        rank_pattern={"wi": 3},
        exclude_modules=r".*\.1\..*",
    )
    reference = peft_model(bases["qwen3"], settings)
    reference.save_pretrained(tmp_path / "theirs")
    model = ours(bases["qwen3"])
    notices = load_adapter(model, tmp_path / "theirs")
    assert list(lora_layers(model)) == ["model.layers.0.self_attn.q_proj"]
    assert len(notices) == 2 and "query_key_value" in notices[0] and "wi" in notices[1]
    assert_close(logits(model), logits(reference))


@pytest.mark.parametrize(
    "case",
    ["all-linear", "norms", "tied embedding", "everything", "dora", "dora and biases"],
)
def test_training_is_pefts(case, bases, tmp_path):
    """20 AdamW steps from the same adapter on the same batches."""
    family, settings = CASES[case]
    peft_model(bases[family], settings).save_pretrained(tmp_path / "start")
    reference = peft.PeftModel.from_pretrained(
        theirs(bases[family]), tmp_path / "start", is_trainable=True
    )
    model = ours(bases[family])
    load_adapter(model, tmp_path / "start", trainable=True)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    rng = np.random.default_rng(0)
    batches = [[rng.integers(0, 67, n) for n in rng.integers(4, 12, 2)] for _ in range(4)] * 5

    expected = adamw_steps(reference, their_loss, batches)
    losses = adamw_steps(
        model, lambda model, documents: -model.logps(pack(documents)).sum(), batches
    )
    assert expected[-4:].mean() < expected[:4].mean() - 0.1
    assert_close(losses, expected)
    reference.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours", bases[family])
    start, end = stored(tmp_path / "start"), stored(tmp_path / "theirs")
    for key, tensor in stored(tmp_path / "ours").items():
        assert_close(tensor, end[key])
        assert not torch.equal(tensor, start[key]), key
    for name, p in frozen.items():
        assert torch.equal(model.get_parameter(name), p), name


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_lora_changes_nothing_and_comes_from_its_seed_alone(dtype, bases):
    model, other = ours(bases["llama"], dtype), ours(bases["llama"], dtype)
    before = logits(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert (
        add_lora(
            model,
            LoRAConfig(bias="all", modules_to_save=["norm", "embed_tokens", "lm_head"]),
            seed=7,
        )
        == []
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    add_lora(other, LoRAConfig(), seed=7)
    for a, b in zip(lora_layers(model).values(), lora_layers(other).values()):
        assert torch.equal(a.lora_A, b.lora_A)
        bound = a.base_layer.in_features**-0.5  # kaiming_uniform_(a=sqrt(5)), as in PEFT
        assert (
            0.9 * bound < a.lora_A.abs().max() <= bound
            and abs(a.lora_A.std() / bound * 3**0.5 - 1) < 0.15
        )
        assert (
            a.lora_A.dtype == a.lora_B.dtype == torch.float32
            and a.base_layer.weight.dtype == getattr(torch, dtype)
        )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(model.get_parameter(n).dtype == torch.float32 for n in trained)
    assert all(
        ("lora_" in n or "norm" in n or n.endswith("bias") or "embed" in n or "lm_head" in n)
        for n in trained
    )
    assert torch.equal(logits(merge_lora(model)), before)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_layer_by_hand():
    """r 1, alpha 3: y = W x + 3 b a·x; rsLoRA at r 4 divides by 2."""
    layer = LoRALinear(Linear(2, 2, bias=False), 1, 3)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0], [1.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[1.0 + 6, 0.0 + 3], [3.0, 1.0]])
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight, torch.tensor([[7.0, -4.0], [3.0, -2.0]]))
    assert LoRALinear(Linear(2, 2), 4, 3, LoRAConfig(use_rslora=True)).scaling == 1.5


def test_dropout_is_on_the_update_alone():
    layer = LoRALinear(Linear(1, 1, bias=False), 1, 1, LoRAConfig(lora_dropout=0.25))
    with torch.no_grad():
        layer.base_layer.weight.fill_(10), layer.lora_A.fill_(3), layer.lora_B.fill_(1)
        torch.manual_seed(0)
        y = layer(torch.ones(20000, 1))[:, 0]
        assert set(y.unique().tolist()) == {10.0, 14.0}  # 10, or 10 + 3 / 0.75
        assert abs((y == 10).float().mean() - 0.25) < 0.015
        assert torch.equal(layer.eval()(torch.ones(4, 1)), torch.full((4, 1), 13.0))


def test_merge_sums_in_fp32_and_rounds_once(bases):
    model = ours(bases["llama"], "bfloat16")
    add_lora(
        model,
        LoRAConfig(
            lora_r=4,
            target_modules=["q_proj", "lm_head"],
            bias="all",
            modules_to_save=["norm"],
        ),
    )
    shake(model)
    expected = {}
    for path, layer in lora_layers(model).items():
        W = (
            layer.base_layer.weight.double()
            + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        )
        expected[path + ".weight"] = W.float().bfloat16()
    expected |= {n: p.detach().bfloat16() for n, p in model.named_parameters() if "norm" in n}
    before = logits(model)
    merge_lora(model)
    for name, tensor in expected.items():
        wrong = model.get_parameter(name) != tensor
        assert wrong.float().mean() < 0.01, (
            name
        )  # fp32 and fp64 sums fall on two sides of a tie now and then
    assert not lora_layers(model) and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and type(
        model.lm_head
    ) is Linear
    assert (logits(model) - before).abs().max() < 0.1 * before.abs().max()


def test_an_adapted_head_trains_through_its_matrix(bases):
    model = ours(bases["llama"])
    add_lora(model, LoRAConfig(lora_r=2, target_modules=["q_proj", "lm_head"]))
    shake(model)
    (-model.logps(pack(DOCUMENTS)).sum()).backward()
    head = model.lm_head
    grads = head.lora_A.grad.clone(), head.lora_B.grad.clone()
    model.zero_grad()
    out = nn.functional.log_softmax(head(model(pack(DOCUMENTS))), -1)
    batch = pack(DOCUMENTS)
    (-out[batch.scored, batch.targets].sum()).backward()
    assert_close(head.lora_A.grad, grads[0])
    assert_close(head.lora_B.grad, grads[1])


def test_disable_lora_is_the_base_for_as_long_as_it_lasts(bases, tmp_path):
    model = ours(bases["qwen3"])
    before = logits(model)
    with disable_lora(model):  # nothing to switch off
        assert torch.equal(logits(model), before)
    add_lora(model, LoRAConfig())
    shake(model)
    after = logits(model)
    with pytest.raises(KeyError), disable_lora(model):
        assert torch.equal(logits(model), before)
        raise KeyError
    assert torch.equal(logits(model), after) and not torch.equal(after, before)
    model = ours(bases["qwen3"])
    add_lora(model, LoRAConfig(modules_to_save=["norm"]))
    with (
        pytest.raises(UserError, match="norm.weight is trained in place"),
        disable_lora(model),
    ):
        pass
    reference = peft_model(bases["llama"], dict(r=2, target_modules=["embed_tokens"]))
    reference.save_pretrained(tmp_path)
    model = ours(bases["llama"])
    load_adapter(model, tmp_path)  # which has no layer to switch off
    with (
        pytest.raises(UserError, match="embed_tokens.weight is trained in place"),
        disable_lora(model),
    ):
        pass


def test_any_linear_can_be_the_base():
    class Halves(nn.Module):  # a stand-in for a quantised layer: no weight, but `dequantize`
        in_features, out_features, bias = 6, 4, None

        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.randint(-8, 8, (4, 6), dtype=torch.int8))

        def dense_weight(self):
            return self.packed.bfloat16() / 2

        def forward(self, x):
            return nn.functional.linear(x, self.dense_weight().to(x.dtype))

    layer = LoRALinear(Halves(), 2, 4)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None
    merged = merged_layer(layer)
    assert type(merged) is Linear and merged.weight.dtype == torch.bfloat16
    wanted = (
        layer.base_layer.dense_weight().float() + 2 * layer.lora_B @ layer.lora_A
    ).bfloat16()
    assert torch.equal(merged.weight, wanted)


def test_rank_0_is_full_fine_tuning(bases):
    model = ours(bases["qwen2-tied"], "bfloat16")
    assert add_lora(model, LoRAConfig(lora_r=0)) == [] and not lora_layers(model)
    trainable, total = count_parameters(model)
    assert trainable == total == sum(p.numel() for p in theirs(bases["qwen2-tied"]).parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in merge_lora(model).parameters()} == {torch.bfloat16}


def test_targeted_norms_are_trained_whole_and_said_so(bases, tmp_path):
    model = ours(bases["qwen3"])
    notices = add_lora(
        model, LoRAConfig(target_modules=["q_proj", "input_layernorm", "norm"], bias="all")
    )
    assert [n.split()[1] for n in notices] == ["input_layernorm", "norm", "all"]
    assert model.adapter.target_modules == ["q_proj"]
    assert model.adapter.modules_to_save == [
        "input_layernorm",
        "model.norm",
    ]  # PEFT's `norm` would be every norm
    shake(model)
    save_adapter(model, tmp_path / "a", bases["qwen3"])
    assert_close(
        logits(peft.PeftModel.from_pretrained(theirs(bases["qwen3"]), tmp_path / "a")),
        logits(model),
    )
    model = ours(bases["qwen3"])
    add_lora(
        model,
        LoRAConfig(target_modules=["q_proj", "input_layernorm"], layers_to_transform=[1]),
    )
    assert model.adapter.modules_to_save == ["model.layers.1.input_layernorm"]
    assert [n for n, p in model.named_parameters() if p.requires_grad and "norm" in n] == [
        "model.layers.1.input_layernorm.weight"
    ]


def test_one_of_a_tied_pair_trains_both(bases):
    for name in ("embed_tokens", "lm_head"):
        model = ours(bases["qwen3-tied"])
        (notice,) = add_lora(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=[name]))
        assert (
            "tied" in notice
            and model.model.embed_tokens.weight.requires_grad
            and model.lm_head is None
        )
        assert sum("embed" in n for n, p in model.named_parameters() if p.requires_grad) == 1


def count_lora(raw, config):
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(raw))
    add_lora(model, config)
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n), count_parameters(
        model
    )


def test_parameter_counts_of_a_real_shape():
    raw = dict(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    number, (trainable, total) = count_lora(
        raw, LoRAConfig(lora_r=128, target_modules=targets + norms, bias="all")
    )
    assert (
        number == 66_060_288
        and trainable == number + 28 * 2 * 1024
        and total == 596_049_920 + number
    )


@pytest.mark.parametrize(
    "shape, r, targets, number",
    [
        (
            "qwen3-0.6b",
            128,
            ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            66_060_288,
        ),
        ("llama-3.2-3b", 16, ["all-linear"], 24_313_856),
        ("llama-3.2-1b", 16, ["q_proj", "k_proj", "v_proj", "o_proj"], 3_407_872),
        ("qwen3-4b", 64, ["all-linear"], 132_120_576),
        ("qwen3-0.6b", 16, ["all-linear"], 10_092_544),
    ],
)
def test_parameter_counts_of_the_recipes(shape, r, targets, number):
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the repository")
    raw = json.loads((SHARED / f"{shape}.json").read_text())
    assert count_lora(raw, LoRAConfig(lora_r=r, target_modules=targets))[0] == number


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(target_modules=["q_proj", "layer_norm1"]),
            "'layer_norm1'.*nearest: input_layernorm, post_attention_layern",
        ),
        (
            dict(target_modules=["q_porj", "gate"]),
            "'q_porj' matches.*nearest: q_proj.*'gate' matches.*nearest: gate_proj",
        ),
        (dict(target_modules=["c_attn2"]), r"'c_attn2'"),
        (
            dict(target_modules=["model.layers.9.self_attn.q_proj"]),
            "layers.9.*nearest: q_proj",
        ),
        (
            dict(target_modules=["embed_tokens"]),
            "no form for model.embed_tokens; modules_to_save",
        ),
        (dict(target_modules=["lm_head", "q_proj"]), "no form for lm_head"),
        (dict(target_modules=["mlp"]), "no form for model.layers.0.mlp"),
        (dict(target_modules=[r"q_proj|("]), "is no regex: missing"),
        (dict(target_modules=[r".*q_projection$"]), "matches nothing"),
        (dict(target_modules=["q_proj", ".*k_proj"]), "a regex stands alone"),
        (dict(target_modules=["norm"]), "no linear layer is left"),
        (dict(target_modules=[]), "no linear layer is left"),
        (
            dict(target_modules=["q_proj"], modules_to_save=["q_proj"]),
            "no linear layer is left",
        ),
        (
            dict(target_modules=[".*q_proj"], layers_to_transform=[0]),
            "layers_to_transform goes with names",
        ),
        (dict(layers_to_transform=[0, 2]), r"2 is not a layer of this model \(0 to 1\)"),
        (
            dict(modules_to_save=["final_layernorm"]),
            "modules_to_save: 'final_layernorm'.*nearest: .*input_layernorm",
        ),
        (dict(trainable_token_indices=[66, 67]), "token_indices: not different ids from 0 to 66"),
        (dict(trainable_token_indices=[-1]), "token_indices: not different ids from 0 to 66"),
        (dict(trainable_token_indices=[3, 3]), "token_indices: not different ids from 0 to 66"),
        (
            dict(trainable_token_indices=[3], modules_to_save=["embed_tokens"]),
            "trainable_token_indices: embedding or head is trained already",
        ),
        (dict(modules_to_save=["embed_in"]), "'embed_in'.*nearest: .*embed_tokens"),
        (
            dict(rank_pattern={"qproj": 4}),
            "rank_pattern: 'qproj' matches nothing here.*nearest: q_proj",
        ),
        (
            dict(target_modules=["q_proj"], alpha_pattern={"k_proj": 4}),
            "alpha_pattern: 'k_proj' matches nothing here",
        ),
        (dict(alpha_pattern={"(": 4}), "alpha_pattern: '\\(' is no regex"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern: 0 is not above 0"),
        (dict(lora_r=-1), "lora_r: -1 is not above 0"),
        (dict(lora_alpha=0), "lora_alpha: 0 is not above 0"),
        (dict(lora_dropout=1.0), "lora_dropout: 1.0 is not in"),
        (dict(bias="yes"), "bias: 'yes' is not one of none, all, lora_only"),
    ],
)
def test_a_wrong_setting_is_named(settings, message, bases):
    model = ours(bases["qwen3-tied"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=message) as caught:
        add_lora(model, LoRAConfig(**settings))
    assert "\n" not in str(caught.value)
    assert not lora_layers(model) and all(
        torch.equal(model.get_parameter(n), p) for n, p in before.items()
    )


def test_one_lora_at_a_time(bases):
    model = ours(bases["qwen3"])
    add_lora(model, LoRAConfig())
    with pytest.raises(UserError, match="a LoRA already"):
        add_lora(model, LoRAConfig())


@pytest.fixture
def adapter(bases, tmp_path):
    model = ours(bases["qwen3"])
    add_lora(model, LoRAConfig(lora_r=2, target_modules=["q_proj", "up_proj"]))
    save_adapter(model, tmp_path / "adapter", bases["qwen3"])
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(peft_type="LOHA"), 'peft_type = "LOHA" is not supported, "LORA" is'),
        (dict(task_type="SEQ_CLS"), 'task_type = "SEQ_CLS" is not'),
        (dict(use_dora=True), r"missing .*lora_magnitude_vector"),
        (
            dict(fan_in_fan_out=True, lora_bias=True),
            "fan_in_fan_out = true is not.*lora_bias = true is not",
        ),
        (dict(megatron_config={"a": 1}), "megatron_config = .* is not supported"),
        (dict(layer_replication=[[0, 2]]), "layer_replication"),
        (dict(trainable_token_indices=[3]), "missing .*trainable_tokens_delta"),
        (dict(a_field_of_next_year=2), "a_field_of_next_year = 2 is not supported"),
        (
            dict(init_lora_weights="pissa"),
            "pissa.*base was changed too: save it as plain LoRA",
        ),
        (dict(r="16", bias=3), 'r = "16" is not supported; bias = 3 is not'),
        (dict(r=0), "a rank r from 1"),
        (dict(target_modules=None), "target_modules are needed"),
        (dict(rank_pattern={"q_proj": "8"}), "rank_pattern = .* is not supported"),
        (dict(layers_pattern="h"), 'layers_pattern = "h"'),
        (dict(bias="lora"), "not an adapter of this model: bias: 'lora'"),
        (
            dict(target_modules=["c_attn"]),
            "not an adapter of this model: target_modules: no linear layer",
        ),
        (dict(target_modules="(("), "not an adapter of this model: .*no regex"),
        (
            dict(r=3),
            r"8 tensor\(s\) do not fit: .*lora_A.weight is \[2, 24\], expected \[3, 24\]",
        ),
        (
            dict(target_modules=["q_proj", "down_proj"]),
            r"missing .*down_proj.*unexpected .*up_proj",
        ),
    ],
)
def test_an_adapter_config_that_does_not_fit_is_named(changes, message, bases, adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        load_adapter(ours(bases["qwen3"]), adapter)


def test_all_faults_of_the_weights_at_once(bases, adapter):
    tensors = stored(adapter)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]].T.contiguous()
    tensors["base_model.model.extra"] = torch.zeros(1)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=f"3 tensor.*missing {names[0]}.*unexpected .*extra.*{names[1]} is"
    ):
        load_adapter(ours(bases["qwen3"]), adapter)


def test_files_that_are_not_there_or_not_whole(bases, adapter, tmp_path):
    model, weights = ours(bases["qwen3"]), adapter / "adapter_model.safetensors"
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(adapter, run / "adapter")
    load_adapter(ours(bases["qwen3"]), run)  # a run folder will do
    with pytest.raises(UserError, match="~no-such-user/a: neither a folder nor a hub id"):
        load_adapter(model, "~no-such-user/a")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_adapter(ours(bases["qwen3"]), adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(
        UserError,
        match="no adapter_model.safetensors; adapter_model.bin is a pickle and never read",
    ):
        load_adapter(model, adapter)
    (adapter / "adapter_config.json").write_text('{"r": 2,')
    weights.touch()
    with pytest.raises(UserError, match="adapter_config.json: not valid JSON"):
        load_adapter(model, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no adapter_config.json in it"):
        load_adapter(model, adapter)
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        load_adapter(model, tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_adapter(bases, adapter, monkeypatch):
    model = ours(bases["qwen3"])
    load_adapter(model, adapter, trainable=True)
    shake(model)
    before = stored(adapter)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora, "write_tensors", full)
    with pytest.raises(OSError):
        save_adapter(model, adapter)
    assert all(torch.equal(stored(adapter)[key], tensor) for key, tensor in before.items())
    assert sorted(p.name for p in adapter.parent.iterdir()) == ["adapter"]


def test_one_merge_at_a_time_writes_a_folder(bases, adapter, tmp_path):
    """What a killed one left aside is in nobody's way."""
    folder = tmp_path / "merged"
    with new_folder(folder), pytest.raises(UserError, match="merged: another run is using this"):
        with new_folder(folder):
            pass
    assert not folder.exists()
    (folder / ".files.plaintune.partial").mkdir(parents=True)
    with new_folder(folder) as free:
        merge(adapter, free, bases["qwen3"])
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names and ".files.plaintune.partial" not in names


def test_the_merge_command(bases, adapter, tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora.py", "merge", *map(str, arguments)])
        run_command(lora.main)

    command("--adapter", adapter, "--output-dir", tmp_path / "merged", "--model", bases["qwen3"])
    assert "merged" in capsys.readouterr().out
    assert (tmp_path / "merged" / "config.json").read_text() == (
        bases["qwen3"] / "config.json"
    ).read_text()
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert_close(
        logits(theirs(tmp_path / "merged")), logits(theirs(bases["qwen3"]))
    )  # its B is still zero
    for arguments, message in [
        (("--output_dir", tmp_path / "merged"), "merged: exists already"),
        (
            ("--output_dir", tmp_path / "new", "--model", tmp_path / "nowhere"),
            "nowhere: neither a folder nor a hub id",
        ),
        (
            ("--output_dir", tmp_path / "new", "--model", bases["qwen2-tied"]),
            "2 tensor.s. do not fit",
        ),
    ]:
        with pytest.raises(SystemExit) as left:
            command("--adapter", adapter, *arguments)
        error = capsys.readouterr().err
        assert not (tmp_path / "new").exists()
        assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") <= 2
        assert re.search(message, error), error
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model; give it with --model"):
        merge(adapter, tmp_path / "new")


# --- pushing --------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder as far as push looks at it, with a model in two shards; no wait lasts."""
    monkeypatch.setattr("support.hub.WAITS", (0, 0, 0, 0))
    run = tmp_path / "run"
    config = {
        "lora_r": 4,
        "merge": True,
        "hub_model_id": "me/mine",
        "hub_commit_message": "of the run",
    }
    for name, text in {
        "config.json": json.dumps(config),
        "README.md": "# card",
        "log.jsonl": "",
        "adapter/README.md": "# adapter",
        "adapter/adapter_config.json": "{}",
        "adapter/adapter_model.safetensors": "A B",
        "merged/README.md": "# merged",
        "merged/config.json": "{}",
        "merged/model-00001-of-00002.safetensors": "first half",
        "merged/model-00002-of-00002.safetensors": "second half",
        "merged/model.safetensors.index.json": "{}",
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    return run


def pushed(run, *flags):
    """Runs `python lora.py push RUN ...` here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora.py", "push", *map(str, [run, *flags])])
        run_command(lora.main)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_folders_become_roots_and_nothing_is_pushed_twice(finished, hub):
    """Each repository holds its folder's files, under the run's own message.

    A second push commits nothing, or only what changed or is gone from the hub.
    """
    pushed(finished)
    assert hub.files == {
        "me/mine": contents(finished / "adapter"),
        "me/mine-merged": contents(finished / "merged"),
    }
    assert hub.commits == [("me/mine", "of the run"), ("me/mine-merged", "of the run")]
    pushed(finished)
    assert len(hub.commits) == 2
    (finished / "adapter" / "README.md").write_text("# a better card")
    pushed(finished, "--hub_commit_message", "a better card")
    assert (
        hub.commits[2:] == [("me/mine", "a better card")]
        and hub.files["me/mine"]["README.md"] == b"# a better card"
    )
    hub.files["me/mine-merged"].clear()
    pushed(finished)
    assert hub.commits[3:] == [("me/mine-merged", "of the run")]
    assert hub.files["me/mine-merged"] == contents(finished / "merged")


def test_weights_of_an_earlier_model_do_not_stay(finished, hub):
    """A repository's one shard goes: readers would take it, not the new ones. Other files stay."""
    hub.files["me/mine-merged"] = {
        "model.safetensors": b"old",
        "notes.md": b"mine",
        "gguf/model.safetensors": b"too",
    }
    pushed(finished)
    kept = {"notes.md": b"mine", "gguf/model.safetensors": b"too"}
    assert hub.files["me/mine-merged"] == contents(finished / "merged") | kept


@pytest.mark.parametrize(
    "changes, names",
    [
        (dict(merge=False), {"me/mine": "adapter"}),
        (dict(lora_r=0), {"me/mine": "merged"}),
        (dict(hub_model_id="short"), {"me/short": "adapter", "me/short-merged": "merged"}),
        (dict(hub_model_id=""), {"me/run": "adapter", "me/run-merged": "merged"}),
    ],
    ids=["not merged", "full", "without user", "unnamed"],
)
def test_where_a_run_goes(changes, names, finished, hub):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | changes))
    pushed(finished)
    assert hub.files == {name: contents(finished / part) for name, part in names.items()}


def test_a_push_survives_a_hub_that_fails_for_a_while(finished, hub, capsys):
    hub.faults += [503, 500, 429]
    pushed(finished)
    assert len(hub.commits) == 2 and capsys.readouterr().out.count("; retrying in") == 3


def test_a_push_that_fails_for_good_is_taken_up_again(finished, hub, capsys):
    """The second repository refuses: exit 2, a line with the way on, the run as it was.

    Then it alone is pushed.
    """
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    real, hub.faults = hub.faults, None

    class After(list):  # the first commit goes through
        def __bool__(self):
            return len(hub.commits) > 0

        def pop(self, _):
            return 503

    hub.faults = After()
    with pytest.raises(SystemExit) as left:
        pushed(finished)
    error = capsys.readouterr().err
    assert (
        left.value.code == 2
        and error.startswith("error: push to me/mine-merged: ")
        and error.count("\n") == 1
    )
    assert f"`python lora.py push {finished}` goes on from here" in error
    assert all(path.read_bytes() == data for path, data in before.items())
    assert hub.commits == [("me/mine", "of the run")]
    hub.faults = real
    pushed(finished)
    assert hub.commits == [("me/mine", "of the run"), ("me/mine-merged", "of the run")]
    assert hub.files["me/mine-merged"] == contents(finished / "merged")


def test_what_is_refused_is_not_asked_again(finished, hub, capsys, monkeypatch):
    """403 and 401 in one line, at once; the hub tells the token back, and it is not shown."""

    def refused():
        hub.asked.clear()
        with pytest.raises(SystemExit) as left:
            pushed(finished)
        shown = "".join(capsys.readouterr())
        assert left.value.code == 2 and "retrying in" not in shown and not hub.commits
        assert "hf_" not in shown and "Traceback" not in shown
        return shown

    hub.closed.add("me/mine-merged")
    assert "403" in refused() and not any("/commit/" in path for path in hub.asked)
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherSecret")
    assert "oken" in refused() and hub.asked == ["/api/whoami-v2"]
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(finished / "no-token"))
    assert "no token; set HF_TOKEN" in refused() and not hub.asked


@pytest.mark.parametrize(
    "part, missing, message",
    [
        ("", "config.json", "config.json: No such file"),
        ("", "README.md", "run: not a finished run"),
        ("merged", "", "merged: not a finished run"),
    ],
)  # it has a config.json and a card too
def test_what_is_no_finished_run_is_not_pushed(part, missing, message, finished, hub, capsys):
    if missing:
        (finished / missing).unlink()
    with pytest.raises(SystemExit) as left:
        pushed(finished / part)
    assert left.value.code == 2 and message in capsys.readouterr().err and not hub.asked

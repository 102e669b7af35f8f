"""A model's config.json, untrusted: its settings checked, its two dialects of rope read as one."""

from contextlib import suppress
from inspect import signature

from support.errors import brief

LIMIT = 2**20  # of every size: larger ones would overflow a tensor's byte count


def as_list(value):
    return value if isinstance(value, list) else [value]


def positive(value):
    return type(value) in (int, float) and 0 < value < 1e30


def setting_faults(values, types, dtypes):
    """A line for each setting that is malformed, or that model.py does not compute. types: of the
    fields of its ModelConfig; dtypes: the names of those that it has."""
    faults = []

    def expect(key, valid, expected):
        if not valid:
            faults.append(f"{key} is {str(values.get(key))[:40]!r}, not {expected}")

    for key, kind in (types | {"attention_bias": bool}).items():
        value = values.get(key)
        if kind is int:
            most = 2**31 if key == "max_position_embeddings" else LIMIT
            valid = type(value) is int and 1 <= value <= most
            expect(key, valid, f"a whole number from 1 to {most}")
        if kind is bool and key != "quantized":  # not one of the file's keys
            expect(key, isinstance(value, bool), "true or false")
    expect("rms_norm_eps", positive(values["rms_norm_eps"]), "a positive number")
    swish = values["hidden_act"] in ("silu", "swish")
    expect("hidden_act", swish, "silu (swish), the only one supported")
    tokens = as_list(values["eos_token_id"])
    expect(
        "eos_token_id",
        all(type(token) is int for token in tokens),
        "a token id or a list of them",
    )
    if str(values["dtype"]).removeprefix("torch.") not in dtypes:
        faults.append(f"dtype {brief(values['dtype'])} is not one of {', '.join(dtypes)}")
    quantization = values.get("quantization_config") or {"load_in_4bit": True}
    if not isinstance(quantization, dict) or not quantization.get("load_in_4bit"):
        faults.append("quantization_config: only bitsandbytes' 4-bit weights can be read")
    if not faults:
        if slides(values):
            faults.append(
                "sliding-window attention (use_sliding_window, max_window_layers, layer_types) is "
                "not supported"
            )
        heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        if heads % kv_heads:
            faults.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        if values["head_dim"] % 2:
            faults.append(
                f"head_dim {values['head_dim']} is odd; rotary positions need an even one"
            )
    return faults


def slides(values):
    """Whether a layer's attention slides, as Qwen2Config and Qwen3Config of transformers decide."""
    if "layer_types" in values:
        return any(layer != "full_attention" for layer in as_list(values["layer_types"]))
    if not values.get("use_sliding_window") or values["sliding_window"] is None:
        return False
    first = values["max_window_layers"]
    return type(first) is not int or first < values["num_hidden_layers"]


def rope_settings(values, rope_types):
    """(rope_type and the arguments of its function, faults) of config.json in both dialects:
    `rope_parameters`, or `rope_theta` beside `rope_scaling`. rope_types: {name: function}."""
    raw = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(raw, dict):
        return {}, ["rope_parameters / rope_scaling is not an object"]
    raw = {"rope_theta": values.get("rope_theta", 10000.0)} | {
        key: value for key, value in raw.items() if value is not None
    }
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in rope_types:
        types = ", ".join(rope_types)
        return {}, [f"rope type {brief(kind)} is not supported ({types} are)"]
    original = "original_max_position_embeddings"
    longest = raw["max_position_embeddings"] = values["max_position_embeddings"]
    raw[original] = values.get(original, raw.get(original, longest))
    with suppress(TypeError, ZeroDivisionError):  # reported below
        if kind in ("yarn", "longrope"):
            raw.setdefault("factor", longest / raw[original])
    rope, faults = {"rope_type": kind}, []
    share = raw.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if share != 1.0 and kind != "default":  # where transformers does not look at it
        faults.append(f"partial_rotary_factor is not supported with rope type {kind}")
    for key, parameter in list(signature(rope_types[kind]).parameters.items())[2:]:
        if key not in raw and parameter.default is not parameter.empty:
            continue
        value = rope[key] = raw.get(key)
        valid = all(map(positive, as_list(value)))
        if not valid and not isinstance(parameter.default, bool):
            faults.append(f"rope {key} is {str(value)[:40]!r}, not a positive number")
    return rope, faults

"""A `config.json` of any era -> one of today, checked; which family it is; what is not served here.

    modern({"model_type": "phi-msft", "n_embd": 2560, ...}) -> {"model_type": "phi", "hidden_size": 2560, ...}

What cannot be honoured is a ValueError that names key and value: nothing is guessed, nothing silently dropped
that would change a number. Nothing heavy is imported.
"""

import json
from pathlib import Path
from typing import Any

from .checks import (
    ACTIVATIONS,
    Fields,
    abridged,
    check_absent,
    check_choice,
    check_complete,
    check_divides,
    check_ids,
    check_memory,
    check_pad,
    check_quantized,
    check_rates,
    check_sizes,
    with_labels,
    without_packing,
)
from .folder import (
    RELEASE,
    adapter_base,
    gguf_files,
    is_adapter,
    read_json,
    read_json_if_any,
    read_text,
)
from .gguf_config import gguf_config, gguf_generation_config
from .rope import check_rotation, flat_rope, longrope, scaled_rope

# ---- Families ----------------------------------------------------------------------------------------------

# model_type in config.json -> (module, the class that generates text)
FAMILIES = {
    "gpt_neo": ("gpt_neo", "GPTNeoForCausalLM"),
    "openai-gpt": ("openai_gpt", "OpenAIGPTLMHeadModel"),
    "phi": ("phi", "PhiForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "persimmon": ("persimmon", "PersimmonForCausalLM"),
    "fuyu": ("fuyu", "FuyuForCausalLM"),
}
OLD_NAMES = {"phi-msft": "phi", "mixformer-sequential": "phi"}  # model_type of the time before Transformers
OWN_NAMES: dict[str, str] = {}  # model_type of somebody's own class -> the family that it is of

REFUSED = {  # model_type -> what it is; their names suggest Phi-3
    "phi3small": "Phi-3-small has another architecture: block-sparse attention, muP scaling, LayerNorm",
    "phi3_v": "Phi-3-vision and Phi-3.5-vision add a picture encoder (CLIP)",
    "phimoe": "Phi-3.5-MoE chooses two of sixteen experts for every token",
    "phi4mm": "Phi-4-multimodal adds encoders for pictures and speech",
    "phi4_multimodal": "Phi-4-multimodal adds encoders for pictures and speech",
}


def family(config: dict) -> str:
    """The key of FAMILIES for a config.json: its `model_type`, else by its `architectures`."""
    model_type = config.get("model_type")
    if model_type is None:
        named = [key for key, (_, name) in FAMILIES.items() if name in architectures(config)]
        model_type = named[0] if named else None
    if isinstance(model_type, str):
        model_type = OLD_NAMES.get(model_type, model_type)
        if model_type in REFUSED:
            raise ValueError(f"model_type {model_type!r} is not served here: {REFUSED[model_type]}")
        if model_type in FAMILIES:
            return model_type
    raise ValueError(
        f"model_type {abridged(model_type)} is not one of those served here: {', '.join(FAMILIES)}"
    )


def family_type(model_type: str) -> str:
    """The `model_type` of the family, for one of somebody's own class too."""
    return OWN_NAMES.get(model_type, model_type)


def architectures(config: dict) -> list[str]:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures must be a list of class names, not {abridged(names)}")
    return names


def read_config(folder: Path) -> Fields:
    """What a GGUF file's metadata says, or `config.json`; where there is none, what OpenAI's list of shapes
    says about GPT-1, or the arguments stored in Adept's release of Persimmon and Fuyu."""
    if gguf_files(folder):
        return gguf_config(folder)
    file, shapes = folder / "config.json", folder / "params_shapes.json"
    if not file.exists() and is_adapter(folder):
        return read_config(adapter_base(folder))
    if not file.exists() and (folder / RELEASE).exists():
        from .adept import release_config  # which needs torch

        return release_config(folder)
    if not file.exists() and shapes.exists():
        return openai_config(shapes)
    config = read_json(file)
    try:
        if isinstance(config.get("model_type"), str):
            config["model_type"] = family_type(config["model_type"])
        family(config)
        architectures(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def config_file(folder: Path) -> Path:
    """The file that says what `read_config` says, for errors."""
    files = gguf_files(folder)
    return files[0] if files else folder / "config.json"


def read_generation_config(folder: Path) -> Fields:
    """`generation_config.json`, {} where there is none; of a GGUF file what its vocabulary says."""
    if gguf_files(folder):
        return gguf_generation_config(folder)
    if not (folder / "config.json").exists() and is_adapter(folder):
        return read_generation_config(adapter_base(folder))
    return read_json_if_any(folder / "generation_config.json")


def openai_config(shapes: Path) -> Fields:
    """The config of OpenAI's release of GPT-1, from its list of array shapes. Heads have size 64."""
    try:
        (positions, width), (rows, _), *layers = json.loads(read_text(shapes))
        if not layers or len(layers) % 12:
            raise ValueError(f"{len(layers)} arrays of layers, not 12 for each")
        sizes = {"vocab_size": rows, "n_positions": positions, "n_embd": width, "n_layer": len(layers) // 12}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shapes} is not the list of shapes of OpenAI's release: {error}") from None
    return {"model_type": "openai-gpt", **sizes, "n_head": max(1, width // 64)}


# ---- Each family's own -------------------------------------------------------------------------------------


def modern(d: Fields, kind: str | None = None) -> Fields:
    """A `config.json` of any era as one of today. `kind`: the family that it must be of, if that is known.

    Fields that are nobody's stay, for `weights.save`. ValueError, with key and value, for what cannot be
    honoured.
    """
    if kind is None:
        kind = family(d)
    else:
        check_family(d, kind)
    check_quantized(d)
    d = without_packing(d)
    check_ids(d)
    current = {**with_labels(MODERN[kind](dict(d))), "model_type": kind}
    decoder = current["text_config"] if kind == "fuyu" else current
    check_ids(decoder)
    check_memory(decoder)
    return current


def check_family(d: Fields, kind: str) -> None:
    model_type = d.get("model_type", kind)  # the oldest files have none
    if not isinstance(model_type, str) or OLD_NAMES.get(model_type, model_type) != kind:
        raise ValueError(f"model_type {abridged(model_type)} is not {kind}")


def renamed(d: Fields, names: dict[str, str]) -> Fields:
    return {names.get(key, key): value for key, value in d.items()}


def modern_gpt_neo(d: Fields) -> Fields:
    d = renamed(d, {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"})
    needed = ["vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads"]
    check_complete(d, needed if "attention_layers" in d else [*needed, "attention_types"])
    check_sizes(d, [*needed, "window_size"], ["intermediate_size"])
    check_rates(
        d,
        [
            "resid_dropout",
            "embed_dropout",
            "attention_dropout",
            "classifier_dropout",
            "layer_norm_epsilon",
            "initializer_range",
        ],
    )
    check_choice(d, "activation_function", ACTIVATIONS)
    check_divides(d, "num_heads", "hidden_size")
    if d.get("attention_layers") is None and "attention_types" in d:
        try:
            d["attention_layers"] = [name for names, n in d["attention_types"] for name in names * n]
        except (TypeError, ValueError):
            types = d["attention_types"]
            raise ValueError(f"attention_types is no list of [names, times]: {types!r}") from None
    layers, kinds = d.get("attention_layers"), ("global", "local")
    if layers is not None and (not isinstance(layers, list) or any(kind not in kinds for kind in layers)):
        raise ValueError(f"attention_layers knows global and local only, not {layers!r}")
    if layers is not None and "num_layers" in d and len(layers) != d["num_layers"]:
        raise ValueError(f"num_layers {d['num_layers']}, but attention_layers has {len(layers)}")
    return d


def modern_openai_gpt(d: Fields) -> Fields:
    d = renamed(
        d,
        {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    )
    needed = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    check_complete(d, needed)
    check_sizes(d, needed)
    check_rates(
        d,
        [
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "summary_first_dropout",
            "summary_last_dropout",
            "layer_norm_epsilon",
            "initializer_range",
        ],
    )
    known = ("gelu", "gelu_new", "relu", "silu", "swish")
    check_choice(d, "afn", known)
    check_choice(d, "summary_activation", (None, *known, "sigmoid", "tanh"))
    check_choice(d, "summary_type", ("cls_index", "last", "first", "mean"))
    check_divides(d, "n_head", "n_embd")
    return d


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*NEEDED, "max_position_embeddings")


def modern_phi(d: Fields) -> Fields:
    """2023's `phi-msft` and `mixformer-sequential` included."""
    d = flat_rope(d if d.get("model_type", "phi") == "phi" else phi_of_2023(d))
    check_complete(d, NEEDED)
    check_sizes(d, SIZES, ["num_key_value_heads"])
    check_rates(
        d,
        [
            "resid_pdrop",
            "embd_pdrop",
            "attention_dropout",
            "layer_norm_eps",
            "initializer_range",
            "partial_rotary_factor",
        ],
        ["classifier_dropout", "hidden_dropout"],
    )
    check_choice(d, "hidden_act", ACTIVATIONS)
    check_divides(d, "num_attention_heads", "hidden_size")
    check_divides(d, "num_key_value_heads", "num_attention_heads")
    check_pad(d)
    return scaled_rope(d, check_rotation(d, d["hidden_size"] // d["num_attention_heads"], 0.5))


def phi_of_2023(d: Fields) -> Fields:
    """The fields of the remote-code configs under today's names. These name no stop id."""
    d = renamed(
        d,
        {
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_head_kv": "num_key_value_heads",
            "n_inner": "intermediate_size",
            "n_positions": "max_position_embeddings",
            "attn_pdrop": "attention_dropout",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "layer_norm_eps",
        },
    )
    d = {"bos_token_id": None, "eos_token_id": None, **d}
    needed = ("hidden_size", "num_attention_heads", "rotary_dim")
    if missing := [key for key in needed if type(d.get(key)) is not int or d[key] < 1]:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    d["intermediate_size"] = d.get("intermediate_size") or 4 * d["hidden_size"]
    D = max(1, d["hidden_size"] // d["num_attention_heads"])
    d["partial_rotary_factor"] = min(1.0, (d.pop("rotary_dim") + 0.5) / D)  # 0.5: int() must not cut one off
    return d


def modern_phi3(d: Fields) -> Fields:
    check_absent(d, ["attention_bias", "mlp_bias", "lm_head_bias"])
    d = flat_rope(d)
    check_complete(d, NEEDED)
    check_sizes(
        d, [*SIZES, "original_max_position_embeddings"], ["num_key_value_heads", "head_dim", "sliding_window"]
    )
    check_rates(
        d,
        [
            "resid_pdrop",
            "embd_pdrop",
            "attention_dropout",
            "rms_norm_eps",
            "initializer_range",
            "partial_rotary_factor",
        ],
        ["classifier_dropout", "hidden_dropout"],
    )
    check_choice(d, "hidden_act", ACTIVATIONS)
    if d.get("head_dim") is None:
        check_divides(d, "num_attention_heads", "hidden_size")
    check_divides(d, "num_key_value_heads", "num_attention_heads")
    check_pad({"pad_token_id": 32000, **d})  # the documented default
    size = d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"]
    return longrope(d, check_rotation(d, size, 1.0))


def modern_persimmon(d: Fields) -> Fields:
    d = flat_rope(d)
    check_complete(d, NEEDED)
    check_sizes(d, SIZES)
    check_rates(
        d,
        [
            "hidden_dropout",
            "attention_dropout",
            "layer_norm_eps",
            "initializer_range",
            "partial_rotary_factor",
        ],
        ["classifier_dropout"],
    )
    check_choice(d, "hidden_act", (*ACTIVATIONS, "relu2"))
    check_divides(d, "num_attention_heads", "hidden_size")
    check_pad(d)
    return scaled_rope(d, check_rotation(d, d["hidden_size"] // d["num_attention_heads"], 0.5))


def modern_fuyu(d: Fields) -> Fields:
    """The decoder's fields stand in `text_config`, or beside it, or have their default: the hub's file has
    nothing but a model_type in `text_config`, from which Transformers 5.23 gets another rotary base."""
    check_sizes(d, ["patch_size", "num_channels"])
    inner = d.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ValueError(f"text_config must be an object, not {abridged(inner)}")
    if inner.get("model_type", "persimmon") != "persimmon":
        raise ValueError(f"text_config: model_type {inner['model_type']!r} is not persimmon")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # of the whole: the decoder's are wrong by default
    d = flat_rope(d)
    beside = {key: value for key, value in d.items() if key not in (*ids, "text_config", "model_type")}
    text = modern_persimmon({**FUYU_8B, **beside, **flat_rope(inner), "model_type": "persimmon"})
    return {**d, "text_config": text}


FUYU_8B = {
    "vocab_size": 262144,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
}

MODERN = {
    "gpt_neo": modern_gpt_neo,
    "openai-gpt": modern_openai_gpt,
    "phi": modern_phi,
    "phi3": modern_phi3,
    "persimmon": modern_persimmon,
    "fuyu": modern_fuyu,
}


# ---- Beside the config -------------------------------------------------------------------------------------


def cache_shape(config: Any) -> tuple[int, int, int]:
    """(layers, heads, head size) of the keys, and of the values, of a model with this config object."""
    fields = vars(getattr(config, "text_config", None) or config)

    def one(*names: str) -> int:
        return next(fields[name] for name in names if fields.get(name))

    heads = one("num_attention_heads", "num_heads", "n_head")
    size = fields.get("head_dim") or one("hidden_size", "n_embd") // heads
    return one("num_hidden_layers", "num_layers", "n_layer"), fields.get("num_key_value_heads") or heads, size

"""A `config.json` of any era -> one of today, checked; which family it is; what is not served here.

    modern({"model_type": "phi-msft", "n_embd": 2560, ...}) -> {"model_type": "phi", "hidden_size": 2560, ...}

What cannot be honoured is a ValueError that names key and value: nothing is guessed, nothing silently dropped
that would change a number. Nothing heavy is imported.
"""

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folder import RELEASE, read_json, read_json_if_any, read_text

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
    raise ValueError(f"model_type {shown(model_type)} is not one of those served here: {', '.join(FAMILIES)}")


def architectures(config: dict) -> list[str]:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures must be a list of class names, not {shown(names)}")
    return names


def model_class(config: dict) -> type:
    """The class named in `architectures` if this package has it, else the one that generates text."""
    module, default = FAMILIES[family(config)]
    module = importlib.import_module(f"decoders.{module}")
    names = [name for name in architectures(config) if is_model(module, name)]
    return getattr(module, names[0] if names else default)


def is_model(module: Any, name: str) -> bool:
    """Whether the module has a documented class of that name: one with a config, not something it imports."""
    return hasattr(getattr(module, name, None), "config_class")


def read_config(folder: Path) -> dict:
    """`config.json`; where there is none, what OpenAI's list of shapes tells of GPT-1, or the arguments
    stored in Adept's release of Persimmon and Fuyu."""
    shapes = folder / "params_shapes.json"
    if not (folder / "config.json").exists() and (folder / RELEASE).exists():
        from .files import release_config

        return release_config(folder)
    if (folder / "config.json").exists() or not shapes.exists():
        config = read_json(folder / "config.json")
        try:
            family(config)
            architectures(config)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        return config
    try:
        (positions, width), (rows, _), *layers = json.loads(read_text(shapes))
        if not layers or len(layers) % 12:
            raise ValueError(f"{len(layers)} arrays of layers, not 12 for each")
        sizes = {"vocab_size": rows, "n_positions": positions, "n_embd": width, "n_layer": len(layers) // 12}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shapes} is not the list of shapes of OpenAI's release: {error}") from None
    return {"model_type": "openai-gpt", **sizes, "n_head": max(1, width // 64)}  # heads of size 64


# ---- Checks ------------------------------------------------------------------------------------------------

ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "silu",
    "swish",
    "mish",
    "relu",
    "relu6",
    "leaky_relu",
    "sigmoid",
    "tanh",
)
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


MOST = 2**31 - 1  # of a size; of layers and of all weights together see `check_memory`


def shown(value: Any) -> str:
    """For an error: what was found, cut short where it is long; escape codes are spelled out."""
    if type(value) is int and abs(value) > 10**40:
        return f"a number of more than {40 if abs(value) < 10**400 else 400} digits"
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def check_sizes(d: dict, keys: Iterable[str], optional: Iterable[str] = ()) -> None:
    """ValueError unless what is there of `keys` are positive integers; `optional` ones may be None."""
    for key in (*keys, *optional):
        if key in d and not (key in optional and d[key] is None):
            if type(d[key]) is not int or d[key] < 1:
                raise ValueError(f"{key} must be a positive integer, not {shown(d[key])}")
            if d[key] > MOST:
                raise ValueError(f"{key} must be at most {MOST}, not {shown(d[key])}")


def check_rates(d: dict, keys: Iterable[str], optional: Iterable[str] = ()) -> None:
    """ValueError unless what is there of `keys` are numbers from 0 to 1; `optional` ones may be None."""
    for key in (*keys, *optional):
        fine = key not in d or (key in optional and d[key] is None)
        if not fine and (type(d[key]) not in (int, float) or not 0 <= d[key] <= 1):
            raise ValueError(f"{key} must be a number from 0 to 1, not {shown(d[key])}")


def check_choice(d: dict, key: str, known: Iterable[Any]) -> None:
    if key in d and d[key] not in list(known):
        raise ValueError(f"{key} {shown(d[key])} is not one of {', '.join(map(str, known))}")


def check_absent(d: dict, keys: Iterable[str]) -> None:
    """ValueError for what would change the model and is not built here."""
    for key in keys:
        if d.get(key):
            raise ValueError(f"{key} {shown(d[key])} is not supported")


def check_quantized(told: Any) -> None:
    """ValueError for weights in other bits than those that `kernels.quantize` makes."""
    if told and (not isinstance(told, dict) or told.get("quant_method") != "decoders"):
        raise ValueError("quantization_config: quantised weights of another method are not supported")


def check_divides(d: dict, part: str, whole: str) -> None:
    if d.get(part) and d.get(whole) and d[whole] % d[part]:
        raise ValueError(f"{part} {d[part]} does not divide {whole} {d[whole]}")


def check_pad(d: dict) -> None:
    """The padding token has a row of the token table, which never trains."""
    pad, rows = d.get("pad_token_id"), d.get("vocab_size")
    if pad is not None and rows is not None and not 0 <= pad < rows:
        raise ValueError(f"pad_token_id {pad} is outside vocab_size {rows}")


def check_ids(d: dict) -> None:
    """The special tokens of `config.json` and `generation_config.json`: an id, None, or several stop ids."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = d.get(key)
        ids = found if key == "eos_token_id" and isinstance(found, list) else [] if found is None else [found]
        if not all(type(id) is int and -1 <= id <= MOST for id in ids):
            raise ValueError(f"{key} must be a token id or null, not {shown(found)}")


def check_memory(d: dict) -> None:
    """Sizes whose product no memory holds are refused before a model is built; so are layers without end."""
    V, C, layers = (
        next((d[key] for key in names if key in d), 1)
        for names in (
            ["vocab_size"],
            ["hidden_size", "n_embd"],
            ["num_hidden_layers", "num_layers", "n_layer"],
        )
    )
    inner = d.get("intermediate_size") or 4 * C
    weights = V * C + layers * C * (4 * C + 2 * inner)
    if layers > 10_000 or weights > 2**45:
        told = f"{layers} layers of width {C} and {inner}, {V} tokens"
        raise ValueError(f"{told}: no memory holds {weights:.1g} weights")


def check_positive(d: dict, key: str, name: str | None = None) -> None:
    """Whole numbers that torch has no room for become floats."""
    if key in d:
        if type(d[key]) not in (int, float) or not 0 < d[key] <= sys.float_info.max:
            raise ValueError(f"{name or key} must be a positive number, not {shown(d[key])}")
        if d[key] > MOST:
            d[key] = float(d[key])


def with_labels(d: dict) -> dict:
    """`num_labels` may stand there as `id2label` alone."""
    if "num_labels" not in d and isinstance(d.get("id2label"), dict) and d["id2label"]:
        d["num_labels"] = len(d["id2label"])
    check_sizes(d, ["num_labels"])
    check_choice(d, "problem_type", PROBLEM_TYPES)
    return d


# ---- Rotary fields -----------------------------------------------------------------------------------------


def flat_rope(d: dict) -> dict:
    """Transformers 5's nested `rope_parameters` as the flat fields of all earlier versions."""
    d, nested = dict(d), dict(d.get("rope_parameters") or {})
    d.pop("rope_parameters", None)
    kind = nested.pop("rope_type", nested.pop("type", "default"))
    d |= {key: nested.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in nested}
    if kind != "default":
        d["rope_scaling"] = {"type": kind, **nested}
    return d


def rope_type(scaling: dict) -> Any:
    return scaling.get("type", scaling.get("rope_type"))


def check_rotation(d: dict, size: int, factor: float) -> int:
    """How many dimensions of a head of `size` turn, cut off as the reference does: int(0.29 * 100) is 28."""
    check_positive(d, "rope_theta")
    factor = d.get("partial_rotary_factor", factor)
    R = int(factor * size)
    if R < 2 or R % 2:
        told = f"partial_rotary_factor {factor!r} turns {R} dimensions of a head"
        raise ValueError(f"{told}: it must be an even number of them")
    return R


def scaled_rope(d: dict, R: int) -> dict:
    """`rope_scaling` of Phi and Persimmon: None, or linear or dynamic with a factor above 1."""
    scaling, known = d.get("rope_scaling"), ("linear", "dynamic")
    if scaling is None:
        return d
    if not isinstance(scaling, dict) or rope_type(scaling) not in known:
        raise ValueError(f"rope_scaling {shown(scaling)} has none of the types {', '.join(known)}")
    scaling = {"factor": None, **scaling}
    if type(scaling["factor"]) not in (int, float) or scaling["factor"] <= 1:
        raise ValueError(f"rope_scaling factor must be a number above 1, not {shown(scaling['factor'])}")
    check_positive(scaling, "factor", "rope_scaling factor")
    if rope_type(scaling) == "dynamic" and R == 2:
        raise ValueError("dynamic rope_scaling needs more than 2 rotary dimensions of a head")
    return {**d, "rope_scaling": {"type": rope_type(scaling), "factor": scaling["factor"]}}


LONGROPE = ("longrope", "su", "yarn")  # the last two are its names of 2024
LONGROPE_KEYS = {
    "type",
    "rope_type",
    "short_factor",
    "long_factor",
    "factor",
    "attention_factor",
    "original_max_position_embeddings",
}


def longrope(d: dict, R: int) -> dict:
    """`rope_scaling` of Phi-3: None, or longrope with R / 2 positive numbers in both lists."""
    scaling = d.get("rope_scaling")
    if scaling is None:
        return d
    if not isinstance(scaling, dict) or rope_type(scaling) not in LONGROPE:
        raise ValueError(f"rope_scaling {shown(scaling)} has none of the types {', '.join(LONGROPE)}")
    if unknown := scaling.keys() - LONGROPE_KEYS:
        raise ValueError(f"rope_scaling has {', '.join(sorted(unknown))}, which longrope does not know")
    for key in ("short_factor", "long_factor"):
        numbers = scaling.get(key)
        if not isinstance(numbers, list) or len(numbers) != R // 2:
            found = f"a list of {len(numbers)}" if isinstance(numbers, list) else repr(numbers)
            raise ValueError(f"rope_scaling {key} must be a list of {R // 2} numbers, not {found}")
        if bad := [n for n in numbers if type(n) not in (int, float) or not 0 < n < MOST]:
            raise ValueError(f"rope_scaling {key} must hold positive numbers, not {shown(bad[0])}")
    scaling = {key: value for key, value in scaling.items() if value is not None}
    for key in ("factor", "attention_factor"):
        check_positive(scaling, key, f"rope_scaling {key}")
    nested = scaling.get("original_max_position_embeddings")
    if nested is not None:  # Transformers 5 writes it there, and reads 4,096 if it stands only there
        d.setdefault("original_max_position_embeddings", nested)
    check_sizes(d, ["original_max_position_embeddings"])
    left_out = ("type", "rope_type", "original_max_position_embeddings")
    others = {key: value for key, value in scaling.items() if key not in left_out}
    return {**d, "rope_scaling": {"type": "longrope", **others}}  # the name that every version can read


# ---- Each family's own -------------------------------------------------------------------------------------


def modern(d: dict, kind: str | None = None) -> dict:
    """A `config.json` of any era as one of today. `kind`: the family that it must be of, if that is known.

    Fields that are nobody's stay, for `weights.save`. ValueError, with key and value, for what cannot be
    honoured.
    """
    found = d.get("model_type", kind)  # the oldest files have none
    if kind is None:
        kind = family(d)
    elif not isinstance(found, str) or OLD_NAMES.get(found, found) != kind:
        raise ValueError(f"model_type {shown(found)} is not {kind}")
    check_quantized(d.get("quantization_config"))
    check_ids(d)
    current = {**with_labels(MODERN[kind](dict(d))), "model_type": kind}
    decoder = current["text_config"] if kind == "fuyu" else current
    check_ids(decoder)
    check_memory(decoder)
    return current


def check_complete(d: dict, keys: Iterable[str]) -> None:
    """What the shapes depend on is never silently a default."""
    if missing := [key for key in keys if key not in d]:
        raise ValueError(f"the config lacks {', '.join(missing)}")


def renamed(d: dict, names: dict[str, str]) -> dict:
    return {names.get(key, key): value for key, value in d.items()}


def modern_gpt_neo(d: dict) -> dict:
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
            told = repr(d["attention_types"])
            raise ValueError(f"attention_types is no list of [names, times]: {told}") from None
    layers, kinds = d.get("attention_layers"), ("global", "local")
    if layers is not None and (not isinstance(layers, list) or any(kind not in kinds for kind in layers)):
        raise ValueError(f"attention_layers knows global and local only, not {layers!r}")
    if layers is not None and "num_layers" in d and len(layers) != d["num_layers"]:
        raise ValueError(f"num_layers {d['num_layers']}, but attention_layers has {len(layers)}")
    return d


def modern_openai_gpt(d: dict) -> dict:
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


def modern_phi(d: dict) -> dict:
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


def phi_of_2023(d: dict) -> dict:
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


def modern_phi3(d: dict) -> dict:
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


def modern_persimmon(d: dict) -> dict:
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


def modern_fuyu(d: dict) -> dict:
    """The decoder's fields stand in `text_config`, or beside it, or have their default: the hub's file has
    nothing but a model_type in `text_config`, from which Transformers 5.23 gets another rotary base."""
    check_sizes(d, ["patch_size", "num_channels"])
    inner = d.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ValueError(f"text_config must be an object, not {shown(inner)}")
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


PICTURE_STEPS = {  # of Fuyu's image processor: what it does and cannot do otherwise
    "do_resize": True,
    "resample": 2,
    "do_pad": True,
    "padding_mode": "constant",
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


def preprocessor(folder: Path, config: dict) -> dict[str, Any]:
    """Arguments of Fuyu's image processor, by `preprocessor_config.json` if there is one. ValueError for what
    the picture code does not do. The hub's target_height and target_width are of no use to any version."""
    file = folder / "preprocessor_config.json"
    stored = read_json_if_any(file)
    for key, value in PICTURE_STEPS.items():
        if stored.get(key, value) not in (value, [value] * 3):
            raise ValueError(f"{file}: {key} {stored[key]!r} is not supported, only {value!r}")
    found: dict[str, Any] = {"patch_size": stored.get("patch_size") or config.get("patch_size", 30)}
    if (size := stored.get("size")) is not None:
        found["size"] = size
    for name, edges in found.items():
        for edge in edges.values() if isinstance(edges, dict) else [edges]:
            if type(edge) is not int or edge < 1:
                raise ValueError(f"{file}: {name} must be height and width in pixels, not {edges!r}")
    if isinstance(size, dict) and not size.keys() >= {"height", "width"}:
        raise ValueError(f"{file}: size must be height and width in pixels, not {size!r}")
    padding = stored.get("padding_value", 1.0)
    if type(padding) not in (int, float) or not 0 <= padding <= 255:
        raise ValueError(f"{file}: padding_value must be a number from 0 to 255, not {padding!r}")
    return {**found, "padding_value": padding}

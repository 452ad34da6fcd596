"""Checks of the fields of a `config.json`: each a ValueError that names key and value."""

import sys
from collections.abc import Iterable
from typing import Any

Fields = dict[str, Any]

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
MAX_SIZE = 2**31 - 1  # of one size; for layers and all weights together see `check_memory`
MAX_LAYERS = 10_000
MAX_WEIGHTS = 2**45


def abridged(value: Any) -> str:
    """A value for an error message: long ones are cut, escape codes are spelled out."""
    if type(value) is int and abs(value) > 10**40:
        digits = 40 if abs(value) < 10**400 else 400
        return f"a number of more than {digits} digits"
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def is_number(value: Any) -> bool:
    """int or float; True and False are neither."""
    return type(value) in (int, float)


def check_complete(d: Fields, keys: Iterable[str]) -> None:
    """What the shapes depend on is never silently a default."""
    if missing := [key for key in keys if key not in d]:
        raise ValueError(f"the config lacks {', '.join(missing)}")


def check_sizes(d: Fields, keys: Iterable[str], optional: Iterable[str] = ()) -> None:
    """ValueError unless what is there of `keys` are positive integers; `optional` ones may be None."""
    for key in (*keys, *optional):
        if key not in d or (key in optional and d[key] is None):
            continue
        if type(d[key]) is not int or d[key] < 1:
            raise ValueError(f"{key} must be a positive integer, not {abridged(d[key])}")
        if d[key] > MAX_SIZE:
            raise ValueError(f"{key} must be at most {MAX_SIZE}, not {abridged(d[key])}")


def check_rates(d: Fields, keys: Iterable[str], optional: Iterable[str] = ()) -> None:
    """ValueError unless what is there of `keys` are numbers from 0 to 1; `optional` ones may be None."""
    for key in (*keys, *optional):
        if key not in d or (key in optional and d[key] is None):
            continue
        if not is_number(d[key]) or not 0 <= d[key] <= 1:
            raise ValueError(f"{key} must be a number from 0 to 1, not {abridged(d[key])}")


def check_choice(d: Fields, key: str, known: Iterable[Any]) -> None:
    if key in d and d[key] not in list(known):
        raise ValueError(f"{key} {abridged(d[key])} is not one of {', '.join(map(str, known))}")


def check_absent(d: Fields, keys: Iterable[str]) -> None:
    """ValueError for what would change the model and is not built here."""
    for key in keys:
        if d.get(key):
            raise ValueError(f"{key} {abridged(d[key])} is not supported")


PACKED = ("quantization_config", "quantization", "compression_config")  # say how weights are packed
PACKED_BY = ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "torchao", "hqq")


def check_quantized(d: Fields) -> None:
    """ValueError, with the way out, for weights in other bits than `packagings.py` and `kernels` read."""
    stated = d.get("quantization_config") or d.get("compression_config")
    if not stated:
        return
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    is_mlx = isinstance(stated, dict) and method is None and "bits" in stated
    if method not in (*PACKED_BY, "decoders") and not is_mlx:
        known = f"{', '.join(PACKED_BY)}, MLX and GGUF are"
        way_out = "save it dequantized with the tool that wrote it, or get its plain or GGUF files"
        raise ValueError(
            f"quantization_config: quant_method {abridged(method)} is not supported ({known}): {way_out}"
        )


def without_packing(d: Fields) -> Fields:
    """The fields of the plain model: how its weights are packed is no matter of the model."""
    stated = d.get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method") == "decoders":
        return d
    return {key: value for key, value in d.items() if key not in PACKED}


def check_divides(d: Fields, part: str, total: str) -> None:
    if d.get(part) and d.get(total) and d[total] % d[part]:
        raise ValueError(f"{part} {d[part]} does not divide {total} {d[total]}")


def check_pad(d: Fields) -> None:
    """The padding token has a row of the embedding, which never trains."""
    pad, rows = d.get("pad_token_id"), d.get("vocab_size")
    if pad is not None and rows is not None and not 0 <= pad < rows:
        raise ValueError(f"pad_token_id {pad} is outside vocab_size {rows}")


def check_ids(d: Fields) -> None:
    """The special tokens of `config.json` and `generation_config.json`: an id, None, or several stop ids."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = d.get(key)
        if value is None:
            continue
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if not all(type(id) is int and -1 <= id <= MAX_SIZE for id in ids):
            raise ValueError(f"{key} must be a token id or null, not {abridged(value)}")


def first_of(d: Fields, *keys: str) -> Any:
    """The value of the first key that is there; 1 where none is."""
    return next((d[key] for key in keys if key in d), 1)


def check_memory(d: Fields) -> None:
    """Sizes whose product no memory holds are refused before a model is built; so are layers without end."""
    V = first_of(d, "vocab_size")
    C = first_of(d, "hidden_size", "n_embd")
    layers = first_of(d, "num_hidden_layers", "num_layers", "n_layer")
    inner = d.get("intermediate_size") or 4 * C
    weights = V * C + layers * C * (4 * C + 2 * inner)
    if layers > MAX_LAYERS or weights > MAX_WEIGHTS:
        sizes = f"{layers} layers of width {C} and {inner}, {V} tokens"
        raise ValueError(f"{sizes}: no memory holds {weights:.1g} weights")


def check_positive(d: Fields, key: str, name: str | None = None) -> None:
    """A positive number; whole ones that are too large for an int32 become floats."""
    if key not in d:
        return
    if not is_number(d[key]) or not 0 < d[key] <= sys.float_info.max:
        raise ValueError(f"{name or key} must be a positive number, not {abridged(d[key])}")
    if d[key] > MAX_SIZE:
        d[key] = float(d[key])


def with_labels(d: Fields) -> Fields:
    """`num_labels` may stand there as `id2label` alone."""
    if "num_labels" not in d and isinstance(d.get("id2label"), dict) and d["id2label"]:
        d["num_labels"] = len(d["id2label"])
    check_sizes(d, ["num_labels"])
    check_choice(d, "problem_type", PROBLEM_TYPES)
    return d

"""The rotary fields of a `config.json`, of any era, checked."""

from typing import Any

from .checks import MAX_SIZE, Fields, abridged, check_positive, check_sizes, is_number

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


def flat_rope(d: Fields) -> Fields:
    """Transformers 5's nested `rope_parameters` as the flat fields of all earlier versions."""
    d, nested = dict(d), dict(d.get("rope_parameters") or {})
    d.pop("rope_parameters", None)
    kind = nested.pop("rope_type", nested.pop("type", "default"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in nested:
            d[key] = nested.pop(key)
    if kind != "default":
        d["rope_scaling"] = {"type": kind, **nested}
    return d


def rope_type(scaling: dict) -> Any:
    return scaling.get("type", scaling.get("rope_type"))


def check_rotation(d: Fields, head_dim: int, factor: float) -> int:
    """How many dimensions of a head rotate, cut off as the reference does: int(0.29 * 100) is 28."""
    check_positive(d, "rope_theta")
    factor = d.get("partial_rotary_factor", factor)
    rotary_dim = int(factor * head_dim)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"partial_rotary_factor {factor!r} turns {rotary_dim} dimensions of a head: "
            "it must be an even number of them"
        )
    return rotary_dim


def check_rope_type(scaling: Any, known: tuple[str, ...]) -> None:
    if not isinstance(scaling, dict) or rope_type(scaling) not in known:
        raise ValueError(f"rope_scaling {abridged(scaling)} has none of the types {', '.join(known)}")


def scaled_rope(d: Fields, rotary_dim: int) -> Fields:
    """`rope_scaling` of Phi and Persimmon: None, or linear or dynamic (NTK) with a factor above 1."""
    scaling = d.get("rope_scaling")
    if scaling is None:
        return d
    check_rope_type(scaling, ("linear", "dynamic"))
    scaling = {"factor": None, **scaling}
    if not is_number(scaling["factor"]) or scaling["factor"] <= 1:
        raise ValueError(f"rope_scaling factor must be a number above 1, not {abridged(scaling['factor'])}")
    check_positive(scaling, "factor", "rope_scaling factor")
    if rope_type(scaling) == "dynamic" and rotary_dim == 2:
        raise ValueError("dynamic rope_scaling needs more than 2 rotary dimensions of a head")
    return {**d, "rope_scaling": {"type": rope_type(scaling), "factor": scaling["factor"]}}


def longrope(d: Fields, rotary_dim: int) -> Fields:
    """`rope_scaling` of Phi-3: None, or longrope with a positive number per pair of rotary dimensions in
    both lists."""
    scaling = d.get("rope_scaling")
    if scaling is None:
        return d
    check_rope_type(scaling, LONGROPE)
    if unknown := scaling.keys() - LONGROPE_KEYS:
        raise ValueError(f"rope_scaling has {', '.join(sorted(unknown))}, which longrope does not know")
    for key in ("short_factor", "long_factor"):
        check_factors(key, scaling.get(key), rotary_dim // 2)
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


def check_factors(key: str, numbers: Any, n: int) -> None:
    """ValueError unless it is a list of `n` positive numbers."""
    if not isinstance(numbers, list):
        raise ValueError(f"rope_scaling {key} must be a list of {n} numbers, not {numbers!r}")
    if len(numbers) != n:
        raise ValueError(f"rope_scaling {key} must be a list of {n} numbers, not a list of {len(numbers)}")
    if bad := [x for x in numbers if not is_number(x) or not 0 < x < MAX_SIZE]:
        raise ValueError(f"rope_scaling {key} must hold positive numbers, not {abridged(bad[0])}")

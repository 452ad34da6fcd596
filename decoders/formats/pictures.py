"""Fuyu's `preprocessor_config.json`: what the image processor is asked to do, checked."""

from pathlib import Path
from typing import Any

from .folder import read_json_if_any

PICTURE_STEPS = {  # what the image processor does, and cannot do otherwise
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
    """Arguments of Fuyu's image processor, by `preprocessor_config.json` if there is one.

    ValueError for what the picture code does not do. The hub's target_height and target_width are of no use
    to any version.
    """
    file = folder / "preprocessor_config.json"
    stored = read_json_if_any(file)
    for key, value in PICTURE_STEPS.items():
        if stored.get(key, value) not in (value, [value] * 3):
            raise ValueError(f"{file}: {key} {stored[key]!r} is not supported, only {value!r}")
    arguments: dict[str, Any] = {"patch_size": stored.get("patch_size") or config.get("patch_size", 30)}
    if stored.get("size") is not None:
        arguments["size"] = stored["size"]
    check_pixels(file, arguments)
    padding = stored.get("padding_value", 1.0)
    if type(padding) not in (int, float) or not 0 <= padding <= 255:
        raise ValueError(f"{file}: padding_value must be a number from 0 to 255, not {padding!r}")
    return {**arguments, "padding_value": padding}


def check_pixels(file: Path, arguments: dict[str, Any]) -> None:
    """ValueError for sizes that are no positive whole numbers, or that lack height or width."""
    for name, edges in arguments.items():
        for edge in edges.values() if isinstance(edges, dict) else [edges]:
            if type(edge) is not int or edge < 1:
                raise ValueError(f"{file}: {name} must be height and width in pixels, not {edges!r}")
    size = arguments.get("size")
    if isinstance(size, dict) and not size.keys() >= {"height", "width"}:
        raise ValueError(f"{file}: size must be height and width in pixels, not {size!r}")

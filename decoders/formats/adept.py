"""Adept's release of Persimmon and Fuyu: one pickle of a nested dictionary -> tensors, and a config.

Only `argparse.Namespace` and stand-ins for a few classes known by name are allowed in it. Anything else is
refused before any of it is run.
"""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .folder import RELEASE, check_file, first_line, read_json
from .names import flattened
from .pickles import foreign


class StandIn:
    """For the classes of others in the pickle: it takes whatever it is given, and does nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS = (
    "tool_use.megatron.megatron_utils.ModelBackend",
    "megatron.model.enums.ModelType",
    "numpy.core.multiarray._reconstruct",  # this and the next for the state of the random generator
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)
HARMLESS = {"_codecs.encode", "collections.defaultdict", "collections.Counter"}
CONFIG_FIELDS = {  # training argument -> field of config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "padded_vocab_size": "vocab_size",
    "layernorm_epsilon": "layer_norm_eps",
    "rotary_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
}
REQUIRED = {"sq_relu": True, "untie_embeddings": True, "qk_layernorm": "weights_per_layer"}


class Release(NamedTuple):
    file: Path
    tensors: dict[str, Tensor]
    arguments: dict[str, Any]  # of the training


def open_release(folder: Path) -> Release:
    """ValueError, with the file, for anything but a sound release on one rank."""
    file = release_file(folder)
    try:
        asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        asked |= foreign(file) - HARMLESS
        if others := sorted(asked - {"argparse.Namespace", *STAND_INS}):
            raise ValueError(f"it asks for {', '.join(others)}; nothing was run")
        allowed: list[Any] = [argparse.Namespace, *((StandIn, name) for name in STAND_INS)]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return Release(file, dict(flattened(content["model"])), vars(content["args"]))
    except Exception as error:  # torch raises RuntimeError, OSError, UnpicklingError ... for damaged files
        raise ValueError(f"{file} is not a sound release of Adept's: {first_line(error)}") from None


def release_file(folder: Path) -> Path:
    """The pickle of the iteration that the marker names."""
    marker = check_file(folder / RELEASE)
    step = marker.read_text("utf-8", errors="replace").strip()
    if not re.fullmatch(r"\d{1,7}|release", step):
        raise ValueError(f"{marker} must hold the number of an iteration, not {step[:40]!r}")
    name = f"iter_{int(step):07}" if step.isdigit() else step
    file = check_file(folder / name / "mp_rank_00" / "model_optim_rng.pt")
    if (folder / name / "mp_rank_01").exists():
        raise ValueError(f"{folder / name} is split over several ranks, which is not supported")
    return file


def release_config(folder: Path) -> dict[str, Any]:
    """`config.json` by the training arguments. ValueError for another model."""
    return stated_config(open_release(folder))


def stated_config(release: Release) -> dict[str, Any]:
    file, tensors, arguments = release
    if missing := [key for key in CONFIG_FIELDS if key not in arguments]:
        raise ValueError(f"{file}: its arguments lack {', '.join(missing)}")
    wrong = [
        f"{key} is {arguments[key]!r}"
        for key, value in REQUIRED.items()
        if arguments.get(key, value) != value
    ]
    if wrong:
        raise ValueError(f"{file} is of another model: {', '.join(wrong)}")
    has_pictures = any(name.startswith("vit_encoder.") for name in tensors)
    fields = {ours: arguments[key] for key, ours in CONFIG_FIELDS.items()}
    no_ids = {"eos_token_id": None, "bos_token_id": None}  # the tokenizer knows them
    return {"model_type": "fuyu" if has_pictures else "persimmon", **no_ids, **fields}


def read_release(marker: Path) -> dict[str, Tensor]:
    """The tensors of a release. A `config.json` beside it must agree with its training arguments."""
    release = open_release(marker.parent)
    stated, file = stated_config(release), marker.parent / "config.json"
    if file.exists():
        config = read_json(file)
        config = {**config, **(config.get("text_config") or {})}
        differs = [
            f"{key} {config[key]!r}, not {stated[key]!r}"
            for key in CONFIG_FIELDS.values()
            if key in config and config[key] != stated[key]
        ]
        if differs:
            raise ValueError(f"{file} has {', '.join(differs)} as {release.file.name} says")
    return release.tensors

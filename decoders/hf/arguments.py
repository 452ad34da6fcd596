"""Arguments of the documented calls: those for the hub, those without effect, and those that nobody knows."""

import difflib
import math
import warnings
from collections.abc import Iterable
from typing import Any

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "gguf_file")
OLD_HUB = (
    "resume_download",
    "proxies",
    "mirror",
    "_commit_hash",
    "_from_auto",
    "user_agent",
    "code_revision",
)
already_said: set[str] = set()  # arguments without effect that were warned of


def hub_options(kwargs: dict[str, Any]) -> tuple[dict, dict]:
    """(what is for the hub, what is left)."""
    options = {name: value for name, value in kwargs.items() if name in HUB and value is not None}
    if kwargs.get("use_auth_token") is not None:
        options.setdefault("token", kwargs["use_auth_token"])
    not_left = {*HUB, *OLD_HUB, "use_auth_token"}
    return options, {name: value for name, value in kwargs.items() if name not in not_left}


def no_effect(name: str, why: str) -> None:
    """Warn once of a documented argument that makes no difference here."""
    if name not in already_said:
        already_said.add(name)
        warnings.warn(f"{name} has no effect: {why}", stacklevel=4)


MEANT = {  # what other libraries and versions call it -> how it is called here, if it is known there
    "cache": "past_key_values",
    "embeds": "inputs_embeds",
    "ids": "input_ids",
    "mask": "attention_mask",
    "max_len": "max_length",
    "n_labels": "num_labels",
    "positions": "position_ids",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Example: ": did you mean 'padding'?". Nothing where no name means the same or differs by a slip: a hint
    must not lead astray."""
    known = [*known]
    meant = MEANT.get(name)
    near = [meant] if meant in known else difflib.get_close_matches(name, known, 1, cutoff=0.85)
    return f": did you mean {near[0]!r}?" if near else ""


def unexpected(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for the first of `names`, if there is one."""
    if name := min(names, default=None):
        raise TypeError(f"{where} got an unexpected keyword argument {name!r}{nearest(name, known)}")


def check_single(given: dict[str, Any]) -> None:
    """ValueError for a tensor or an array of several numbers where one value is wanted, as True or False."""
    for name, value in given.items():
        shape = getattr(value, "shape", ())
        if math.prod(shape) != 1:
            raise ValueError(f"{name} must be one value, not an array of shape {tuple(shape)}")

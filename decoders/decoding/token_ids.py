"""Settings that hold token ids: each must be an id of the vocabulary, since -1 would mean its last one to
PyTorch."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .constraints import Constraint
from .settings import GenerationConfig, shown


def listed(ids: Any) -> list:
    """An id, several, a tensor of them or None, as a list."""
    if ids is None:
        return []
    if isinstance(ids, Tensor):
        return ids.flatten().tolist()
    return list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]


def check_ids(name: str, ids: Iterable[Any], vocab_size: int) -> None:
    """ValueError for what is no id of the vocabulary."""
    for id in ids:
        if not isinstance(id, int) or not 0 <= id < vocab_size:
            raise ValueError(f"{name} must hold token ids from 0 to {vocab_size - 1}, not {shown(id)}")


def check_settings_of_ids(s: GenerationConfig, constraints: Iterable[Constraint], vocab_size: int) -> None:
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"):
        check_ids(name, listed(getattr(s, name)), vocab_size)
    for ids in s.bad_words_ids or ():
        check_sequence("bad_words_ids", ids, vocab_size)
    for ids, _ in bias_pairs(s.sequence_bias):
        check_sequence("sequence_bias", ids, vocab_size)
    for constraint in constraints:
        for phrase in constraint.phrases:
            check_ids("a constraint", phrase, vocab_size)


def check_sequence(name: str, ids: Any, vocab_size: int) -> None:
    if not isinstance(ids, Iterable) or isinstance(ids, str) or not listed(ids):
        raise ValueError(f"{name} must hold lists of token ids that are not empty, not {shown(ids)}")
    check_ids(name, listed(ids), vocab_size)


def bias_pairs(sequence_bias: Any) -> list[tuple[Any, Any]]:
    """[(ids, bias)] of a dict or a list. ValueError for anything else."""
    if sequence_bias is None:
        return []
    try:
        pairs = sequence_bias.items() if isinstance(sequence_bias, dict) else sequence_bias
        return [(ids, float(bias)) for ids, bias in pairs]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"sequence_bias must be {{(ids): number}} or [[ids, number]], not {shown(sequence_bias)}"
        ) from error


# ---- Stop ids and padding ----------------------------------------------------------------------------------


def stop_and_pad_ids(
    model: Any, s: GenerationConfig, given: Iterable[str], vocab_size: int
) -> tuple[list[int], int]:
    """The ids to stop at, and the one that fills sequences that have ended: `pad_token_id`, else the
    checkpoint's, else the first stop id.

    What is `given` with the call must be in the vocabulary. A checkpoint's own counts only if it is: files of
    small models keep the ids of large ones.
    """
    eos, pad = s.eos_token_id, s.pad_token_id
    if eos == "checkpoint":
        eos = model.generation_config.get("eos_token_id", model.config.eos_token_id)
    stops = listed(eos)
    if not all(isinstance(id, int) for id in stops) or not isinstance(pad, int | None):
        raise ValueError(
            f"eos_token_id and pad_token_id must be token ids or None, not {shown(stops)}, {shown(pad)}"
        )
    if "eos_token_id" in given:
        check_ids("eos_token_id", stops, vocab_size)
    if "pad_token_id" in given:
        check_ids("pad_token_id", listed(pad), vocab_size)
    stops = [id for id in stops if 0 <= id < vocab_size]
    pads = (pad, model.generation_config.get("pad_token_id"), model.config.pad_token_id, *stops, 0)
    return stops, next(id for id in pads if isinstance(id, int) and 0 <= id < vocab_size)

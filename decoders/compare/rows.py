"""Differences in units of noise, stage by stage."""

import math

from torch import Tensor

from .inner_values import arranged
from .kit import Kit
from .noise import BEYOND, spread
from .report import Row


def fitted(kit: Kit, case: str, name: str, value: Tensor) -> Tensor:
    """Their value in our shape, in float64. ValueError, with the likely reason, where it cannot be."""
    wanted = kit.expected[case][name]
    found = arranged(value.double(), wanted)
    if found is not None:
        return found
    shape, theirs = tuple(wanted.shape), tuple(value.shape)
    reason = ""
    if sorted(shape) == sorted(theirs):
        reason = ": transposed?"
    elif len(shape) == 3 and theirs[-1:] == shape[2:] and math.prod(theirs) <= shape[0] * shape[2]:
        reason = ": of the last token only? give all of them"
    elif len(shape) == 3 and len(theirs) == 3 and theirs[:2] == shape[:2] and theirs[2] > shape[2]:
        reason = ": a vocabulary padded to a round size? cut it off"
    elif case == "cached" and len(shape) > 1 and math.prod(theirs) > math.prod(shape):
        reason = ": with the tokens of past_ids? give those of input_ids only"
    elif len(theirs) and theirs[0] == 1 and shape and shape[0] > 1:
        reason = ": one row only? the case has several"
    raise ValueError(f"{case}/{name} is {theirs}, the kit has {shape}{reason}")


def measured(kit: Kit, case: str, name: str, value: Tensor, dtype: str, seen: str = "") -> Row:
    largest, typical = spread(kit.expected[case][name], value)
    units = in_units((largest, typical), kit.unit(case, name, dtype))
    return Row(case, name, largest, typical, units, "", seen)


def in_units(difference: tuple[float, float], unit: tuple[float, float]) -> float:
    return max(d / u if u else (math.inf if d else 0.0) for d, u in zip(difference, unit, strict=True))


TOGETHER = ("q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated")  # none is made of all others


def marked(rows: list[Row], parallel_block: bool = False) -> list[Row]:
    """Of one case: "x" beyond the noise, or "~" if the next stage made of it agrees: then the port calls
    something else so, or keeps it in another order, which is no mistake. `parallel_block`: the MLP reads
    nothing of attention."""
    found: list[Row] = []  # from the last stage to the first
    for row in reversed(rows):
        mark = "=" if row.units <= BEYOND else "x"
        layer, _, stage = row.stage.rpartition(".")
        gradient = row.stage.startswith("grad.")
        if mark == "x" and not gradient and stage not in ("loss", "logits"):
            apart = TOGETHER if stage in TOGETHER else ()
            if parallel_block and not stage.startswith(("mlp", "out")):
                apart = (*apart, "mlp_in", "mlp_up", "mlp_act", "mlp_out")
            made_of_it = (
                r.mark
                for r in reversed(found)
                if not r.stage.startswith("grad.")
                and not (r.stage.startswith(layer) and r.stage.rpartition(".")[2] in apart)
            )
            mark = "~" if next(made_of_it, "x") != "x" else "x"
        found.append(row._replace(mark=mark))
    return found[::-1]

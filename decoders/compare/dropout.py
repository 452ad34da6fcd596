"""Dropout that is active: its rate, from the zeros it leaves and from how much larger the others are.

No formula computes it again, since it is drawn. But out of what the port had before it, each number is either
gone or 1 / (1 - p) times itself, which nothing else does.
"""

import torch
from torch import Tensor

from .mistakes import Mistake
from .mistakes.numbers import with_error
from .noise import BEYOND, compared
from .search import Search

WHERE = {  # stage -> what is dropped of it: itself, or the branch that it adds to the residual stream
    "embeddings": "embeddings",
    "weights": "weights",
    "heads": "heads",
    "attn_out": "attn_out",
    "attn_sum": "attn_out",
    "mlp_act": "mlp_act",
    "mlp_out": "mlp_out",
    "out": "mlp_out",
}
FAR = 1000.0  # numbers of at least so many units of noise are looked at


def active_dropout(search: Search) -> Mistake | None:
    """The mistake, with its rate, if every stage that does not follow from what the port had before it is one
    from which a constant share was dropped."""
    kept: list[Tensor] = []
    stages: dict[str, None] = {}
    for case in search.cases:
        for name, (ours, branch) in stages_off(search, case).items():
            one = kept_ratios(search, case, name, ours, branch)
            if one is None:
                return None
            kept.append(one)
            stages[name.rpartition(".")[2]] = None
    if not kept:
        return None
    ratios = torch.cat(kept)
    scale = 1 + ratios.median().item()
    if scale < 1.001 or (ratios + 1 - scale).abs().max() > 0.01 * scale:
        return None
    rate = 1 - 1 / scale
    error = 2 * ratios.std().item() / len(ratios) ** 0.5 / scale**2
    name = f"dropout: active, with a rate of {with_error(rate, error)}, in {', '.join(stages)}"
    families = (search.kit.family,)
    return Mistake(name, "none when a model is used: .eval()", families, {}, number=rate, error=error)


def stages_off(search: Search, case: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Stage -> (our value out of what the port had before it, what may be dropped of it), for each stage that
    does not follow from that."""
    theirs = search.values[case]
    latest: dict[str, Tensor] = {}
    off: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, value: Tensor) -> Tensor:
        kind = name.rpartition(".")[2]
        latest[kind] = value
        if name not in theirs:
            return value
        if search.far(case, name, compared(name, value, search.kit.inputs[case])) > BEYOND:
            off[name] = value, latest.get(WHERE.get(kind, ""), value)
        latest[kind] = search.theirs(case, name, value)
        return latest[kind]

    search.stages(case, (), note=note)
    return off


def kept_ratios(search: Search, case: str, name: str, ours: Tensor, branch: Tensor) -> Tensor | None:
    """By how much the numbers that were kept are larger, 1 / (1 - p) - 1 each; None where that is not what
    the difference looks like."""
    if name.rpartition(".")[2] not in WHERE:
        return None
    unit = search.kit.unit(case, name, search.dtype)[0]
    seen = ~search.kit.expected[case][name].isnan() & (branch.abs() > FAR * unit)
    ratio = ((search.values[case][name] - ours) / branch)[seen]
    dropped = (ratio + 1).abs() < 0.01
    share = dropped.double().mean().item() if len(ratio) else 0.0
    if not 0.001 < share < 0.99 or dropped.all():
        return None
    return ratio[~dropped]

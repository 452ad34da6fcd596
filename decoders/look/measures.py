"""What the numbers of a pass say: how attention heads read, and how large the activations get."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from decoders.compare.formula import Formula, upcast

FLOAT16 = torch.finfo(torch.float16).max  # 65,504


class Magnitude(NamedTuple):
    """The largest number of a stage, and where it is."""

    stage: str
    largest: float
    row: int
    position: int  # of a query, in scores
    index: tuple[int, ...]  # the others: head, and key or dimension


# ---- Magnitudes --------------------------------------------------------------------------------------------


def magnitudes(stages: Mapping[str, Tensor], scale: float) -> list[Magnitude]:
    """The largest number of every stage, and of q k^T before it is scaled by `scale` ("products")."""
    rows = []
    for name, value in stages.items():
        if name == "loss":
            continue
        rows.append(largest(name, value))
        if name.endswith(".scores") and scale != 1:
            row = rows[-1]._replace(stage=name.replace("scores", "products"))
            rows.append(row._replace(largest=row.largest / scale))
    return rows


def largest(name: str, value: Tensor) -> Magnitude:
    """NaN counts as the largest, but in scores, where it says hidden."""
    x = upcast(value).abs()
    x = x.nan_to_num(0.0 if name.endswith("scores") else math.inf, math.inf)
    at = [int(i) for i in torch.unravel_index(x.argmax(), x.shape)]
    number = float(value[tuple(at)].abs())
    if x.dim() == 4:
        return Magnitude(name, number, at[0], at[2], (at[1], at[3]))
    return Magnitude(name, number, at[0], at[1], (at[2],))


def first_beyond(rows: list[Magnitude], limit: float) -> Magnitude | None:
    """The first number beyond `limit`; NaN is beyond any."""
    return next((row for row in rows if not row.largest <= limit), None)


def safe_dtypes(rows: list[Magnitude]) -> str:
    """In which dtypes all numbers of a pass can be held, as a sentence."""
    row = first_beyond(rows, FLOAT16)
    if row is None:
        top = max(rows, key=lambda row: row.largest)
        return f"float16 holds all of it: the largest number is {top.largest:,.4g}, in {top.stage}"
    if not math.isfinite(row.largest):
        return f"{row.stage} is not finite at token {row.position}: it begins there"
    sentence = f"{row.stage} reaches {row.largest:,.0f} at token {row.position}, and float16 ends at 65,504"
    if row.stage.endswith(".products"):
        return (
            f"{sentence}: it overflows where scores are computed in float16, as in Transformers 4.50 and "
            "5; here they are float32. bfloat16 and float32 hold it"
        )
    return f"{sentence}: take bfloat16 or float32"


# ---- Attention heads ---------------------------------------------------------------------------------------


def measures(w: Tensor) -> dict[str, Tensor]:
    """Name -> (H,) of attention weights w (B, H, T, S), 0 where nothing is read: means over the queries that
    see two keys at least; see `Trace.heads`."""
    T, S = w.shape[2:]
    query = torch.arange(S - T, S, device=w.device)[:, None]
    distance = (query - torch.arange(S, device=w.device)).to(w.dtype)  # (T, S)
    counts = (w > 0).any(1, keepdim=True).sum(-1) > 1  # (B, 1, T)
    each = {
        "entropy": torch.special.entr(w).sum(-1) / math.log(2),
        "distance": (w * distance).sum(-1),
        "itself": (w * (distance == 0)).sum(-1),
        "previous": (w * (distance == 1)).sum(-1),
        "first": w[..., 0],
    }
    return {name: (value * counts).sum((0, 2)) / counts.sum() for name, value in each.items()}


def induction_score(w: Tensor, ids: Tensor) -> Tensor:
    """(H,) the weight that a token which stood earlier gives to what came after it there; NaN where nothing
    is repeated. w (B, H, T, S), ids (B, T)."""
    if w.shape[2] != w.shape[3]:
        return w.new_full((w.shape[1],), math.nan)
    same = (ids[:, :, None] == ids[:, None]).tril(-1)  # (B, T, S)
    after = same.roll(1, -1)
    after[..., 0] = False
    after &= torch.ones_like(after).tril()
    repeats = after.any(-1)
    return ((w * after[:, None]).sum(-1) * repeats[:, None]).sum((0, 2)) / repeats.sum()


# ---- Rotary embedding --------------------------------------------------------------------------------------


def rotary(f: Formula, T: int) -> list[dict[str, float]]:
    """For each pair of dimensions that is rotated together: the dimensions, the angle from one token to the
    next ("angle", in radians), after how many tokens it is round ("period"), and of longrope the factor that
    it was divided by. Empty where positions are an embedding."""
    if not f.R:
        return []
    position_ids = torch.arange(T)[None]
    scaling = getattr(f.config, "rope_scaling", None) or {}
    longrope = "long_factor" in scaling
    factors = f.rope_factors(scaling, position_ids) if longrope else [1.0] * (f.R // 2)
    return [
        {"first": i, "second": i + f.R // 2, "angle": angle, "period": 2 * math.pi / angle, "factor": factor}
        for i, (angle, factor) in enumerate(zip(f.inv_freq(position_ids).tolist(), factors, strict=True))
    ]

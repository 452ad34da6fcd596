"""What a difference looks like, in a sentence, where it has no name."""

from collections.abc import Mapping

import torch
from torch import Tensor


def likeness(
    expected: Tensor, theirs: Tensor, tolerance: float, stage: str, inputs: Mapping[str, Tensor]
) -> list[str]:
    """Sentences about `theirs` beside `expected`, NaN where nothing is compared. Differences up to
    `tolerance` are none."""
    wanted = ~expected.isnan()
    a, b = torch.where(wanted, expected, 0.0), torch.where(wanted, theirs, 0.0)
    lost = wanted & ~theirs.isfinite()
    if lost.any():
        first = tuple(lost.nonzero()[0].tolist())
        share = lost.sum().item() / wanted.sum().item()
        return [f"It looks like this: {share:.0%} of {stage} is NaN or infinite, first at {list(first)}."]
    bad = (a - b).abs() > tolerance
    found = whole(a, b, wanted, tolerance)
    if not found:
        found = parts(bad, wanted, inputs) + order(a, b, tolerance)
    return [f"It looks like this: {message}." for message in found[:2]]


def whole(a: Tensor, b: Tensor, wanted: Tensor, tolerance: float) -> list[str]:
    """One number for all of it."""
    x, y = a[wanted], b[wanted]
    if x.numel() < 2 or not x.square().sum():
        return []
    factor = (x * y).sum() / x.square().sum()
    left = (y - factor * x).abs().max()
    if left <= tolerance * max(1.0, factor.abs().item()) and (y - x).abs().max() > 2 * left:
        return [f"all of it is {factor.item():.6g} times what it should be"]
    shift = (y - x).mean()
    if (y - x - shift).abs().max() <= tolerance:
        return [f"all of it is {shift.item():+.6g} off"]
    zero = (y == 0) & (x != 0)
    share = zero.double().mean().item()
    if 0.02 < share < 0.9:
        scale = (y[~zero] * x[~zero]).sum() / x[~zero].square().sum()
        if (y[~zero] - scale * x[~zero]).abs().max() <= 2 * tolerance * max(1.0, scale.item()) and scale > 1:
            return [
                f"{share:.0%} of it are zero and the others {scale.item():.3f} times too large: dropout "
                f"of {1 - 1 / scale.item():.2g} is active"
            ]
        return [f"{share:.0%} of it are exactly zero where they should not be"]
    return []


def parts(bad: Tensor, wanted: Tensor, inputs: Mapping[str, Tensor]) -> list[str]:
    """Where it differs and where not, axis by axis."""
    names = {
        3: ("row", "position", "dimension"),
        4: ("row", "head", "position", "dimension"),
        2: ("row of the matrix", "column of the matrix"),
        1: ("dimension",),
    }.get(bad.dim(), ())
    found = []
    for axis, name in enumerate(names):
        others = [i for i in range(bad.dim()) if i != axis]
        hit = bad.sum(others) > 0 if others else bad
        seen = wanted.sum(others) > 0 if others else wanted
        where, n = hit.nonzero().flatten().tolist(), int(seen.sum())
        if not where or len(where) == n:
            continue
        if len(where) <= 3:
            found.append(f"only {name} {', '.join(map(str, where))} of {n} differs")
        elif where == list(range(where[0], bad.shape[axis])) and where[0] > 0:
            found.append(f"it differs from {name} {where[0]} on")
        elif where == list(range(where[-1] + 1)):
            found.append(f"it differs up to {name} {where[-1]}")
    mask = inputs.get("attention_mask")
    if mask is not None and bad.dim() > 2 and bad.shape[0] == len(mask):
        rows = bad.flatten(1).any(1)
        padded = (mask == 0).any(1)
        if rows.any() and padded.any() and not (rows & ~padded).any():
            found.insert(0, "only rows with padding differ")
    return found


def order(a: Tensor, b: Tensor, tolerance: float) -> list[str]:
    """The same numbers in other places, or an error that grows along the text."""
    if a.dim() < 2:
        return []
    for axis, name in ((-1, "dimensions"), (1, "heads" if a.dim() == 4 else "positions")):
        x, y = a.movedim(axis, 0).flatten(1), b.movedim(axis, 0).flatten(1)
        if len(x) > 1 and x.shape[1] > 3:
            distance, nearest = torch.cdist(y, x, p=float("inf")).min(1)
            if distance.max() <= tolerance and len(set(nearest.tolist())) == len(x):
                return [f"the same numbers with the {name} in another order: {nearest.tolist()[:12]} ..."]
    axis = a.dim() - 2
    others = [i for i in range(a.dim()) if i != axis]
    error = (a - b).square().mean(others).sqrt()
    if len(error) > 4:
        ranks = error.argsort().argsort().double()
        along = torch.arange(len(error), dtype=torch.float64)
        if torch.corrcoef(torch.stack([ranks, along]))[0, 1] > 0.95:
            return ["it grows with the position"]
    return []

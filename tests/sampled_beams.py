"""The one order in which versions of Transformers differ: beams that were sampled."""

from importlib.metadata import PackageNotFoundError, version

from torch import Tensor


def as_drawn(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Before 5.24; ours are sorted, as from 5.24 on. It takes the place of `beams.best_first`."""
    return values, index


def are_sorted() -> bool:
    """Whether the installed Transformers sorts them."""
    try:
        numbers = version("transformers").split(".")[:2]
    except PackageNotFoundError:
        return True
    return tuple(map(int, numbers)) >= (5, 24)

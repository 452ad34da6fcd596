"""What people get wrong when they write these models again, as data.

One list, for two uses: `compare` names the mistake of a port by it, and the tests make each of them to see
that a comparison notices. A mistake replaces steps of `formula.Formula`: `step=lambda f, right: wrong`, where
`f` is the formula and `right` its own step, a number or a method. `numbers.py` has those with a number in
them, which is fitted to what the port gave.
"""

from . import attention, layers, positions, others  # each adds its own to the list  # isort: skip
from .numbers import QUANTITIES, Quantity, quantities_of
from .table import MISTAKES, Mistake, of

__all__ = [
    "MISTAKES",
    "QUANTITIES",
    "Mistake",
    "Quantity",
    "attention",
    "layers",
    "of",
    "others",
    "positions",
    "quantities_of",
]

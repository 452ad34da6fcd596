"""For `isinstance`: objects of ours that other libraries take for Transformers' own, where that is loaded."""

import sys
from functools import cache
from typing import Any


class SeenAs:
    """To `isinstance`, which asks for the class as well as for the type, of a kind of Transformers' too where
    that is loaded. Its Trainer saves of other models the tensors alone, without a config, and peft adapts
    no other transposed matrices. `type(x)` stays ours."""

    theirs: tuple[str, str]  # module and class

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return blank, (type(self),), vars(self).copy()

    @property
    def __class__(self) -> type:
        kind = getattr(sys.modules.get(self.theirs[0]), self.theirs[1], None)
        return both(type(self), kind) if kind else type(self)


@cache
def both(own: type, theirs: type) -> type:
    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        """`x.__class__(...)` makes another one of ours."""
        return own(*args, **kwargs) if cls is kind else own.__new__(cls)

    kept = {"__module__": own.__module__, "__doc__": own.__doc__, "__new__": __new__}
    kind = type(own.__name__, (own, theirs), kept)
    for name in vars(kind).keys() - kept.keys() - vars(type("Empty", (), {})).keys():
        delattr(kind, name)  # which theirs puts into each class below it, as a constructor
    return kind


def blank(kind: type) -> Any:
    """For pickle: `__class__` may say another class's name."""
    return kind.__new__(kind)

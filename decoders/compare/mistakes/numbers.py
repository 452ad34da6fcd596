"""Mistakes with a number in them: what a port may have another value of, and between which bounds.

`fit.py` finds the value. A quantity replaces steps of the formula as any mistake does, by `steps(value)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import gelu_tanh, relu2, silu, upcast
from ..formula import Formula
from .positions import moved
from .table import ALL, LEARNED, ROTARY, Mistake, Step


@dataclass(frozen=True, eq=False)
class Quantity:
    name: str  # "rotary: base"
    families: tuple[str, ...]
    right: Callable[[Formula], float | None]  # its value in this model; None where it has none
    steps: Callable[[float], dict[str, Step]]
    low: float  # where a port's value is looked for
    high: float
    grid: str = "log"  # how the first guesses lie between them: "log", "linear", or "whole" numbers
    points: int = 25  # how many guesses; of whole numbers the distance between two
    bound: Callable[[Formula], float] = lambda f: math.inf  # no value of this model is above

    def guesses(self, f: Formula) -> list[float]:
        """Values to begin with."""
        if self.grid == "whole":
            high = min(self.high, self.bound(f))
            return [float(v) for v in range(int(self.low), int(high) + 1, self.points) if v != self.right(f)]
        shares = [i / (self.points - 1) for i in range(self.points)]
        if self.grid == "linear":
            return [self.low + share * (self.high - self.low) for share in shares]
        return [self.low * (self.high / self.low) ** share for share in shares]

    def mistake(self, f: Formula, value: float, error: float = 0.0) -> Mistake:
        """The mistake to have this value, known to +- error."""
        right = self.right(f)
        own = "none" if right is None else number(right)
        written = number(value) if self.grid == "whole" else with_error(value, error)
        name = f"{self.name} {written} where this model has {own}"
        fix = "leave it out" if right is None else f"take {own}"
        steps = self.steps(value)
        return Mistake(name, fix, self.families, steps, number=value, error=error, quantity=self)

    def fits(self, f: Formula) -> bool:
        """Whether this model has it, or may have it where it has none."""
        return self.right is none or self.right(f) is not None

    # The coordinate in which a value is moved

    @property
    def moves(self) -> bool:
        """Whether a value has neighbours; whole numbers are tried one by one."""
        return self.grid != "whole"

    @property
    def spacing(self) -> float:
        """Between two guesses."""
        return (self.coordinate(self.high) - self.coordinate(self.low)) / (self.points - 1)

    def coordinate(self, value: float) -> float:
        return math.log(value) if self.grid == "log" else value

    def value(self, coordinate: float) -> float:
        return math.exp(coordinate) if self.grid == "log" else coordinate


QUANTITIES: list[Quantity] = []


def quantity(families: str, name: str, right: Callable, steps: Callable, *bounds: float, **how: Any) -> None:
    QUANTITIES.append(Quantity(name, tuple(families.split()), right, steps, *bounds, **how))


def quantities_of(family: str) -> list[Quantity]:
    return [known for known in QUANTITIES if family in known.families]


def number(value: float) -> str:
    """Example: 10,000, 0.044715, 1e-05"""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.7g}"


def with_error(value: float, error: float) -> str:
    """Example: 39,810 +- 60, or 3.020e-06 +- 1.3e-08. The error is rounded up, so that what is printed holds
    what was meant. No more than seven digits are."""
    error = max(error, abs(value) * 1e-7, 1e-300)
    power = math.floor(math.log10(error))
    if error < 3 * 10.0**power:
        power -= 1  # two digits of 1.3, one of 6
    unit = 10.0**power
    shown = round(value / unit) * unit
    error = math.ceil((error + abs(value - shown)) / unit - 1e-6) * unit
    decimals = max(0, -power)
    written = f"{error:,.{decimals}f}" if 1e-4 <= error < 1e7 else f"{error:.2g}"
    if 1e-3 <= max(abs(value), error) < 1e7:
        return f"{shown:,.{decimals}f} +- {written}"
    digits = max(0, math.floor(math.log10(abs(value) or error)) - power)
    return f"{shown:.{digits}e} +- {written}"


# ---- Attention ---------------------------------------------------------------------------------------------


def soft_cap(value: float) -> Step:
    return lambda f, right: lambda *given: value * torch.tanh(right(*given) / value)


def clamped(value: float) -> Step:
    return lambda f, right: lambda *given: tuple(part.clamp(-value, value) for part in right(*given))


def none(f: Formula) -> None:
    return None


quantity(
    ALL,
    "attention: scores multiplied by",
    lambda f: f.scale,
    lambda v: {"scale": lambda f, right: v},
    0.003,
    30.0,
    points=33,
)
quantity(ALL, "attention: scores capped by tanh at", none, lambda v: {"scores": soft_cap(v)}, 0.1, 300.0)
quantity(ALL, "attention: q, k and v clamped at", none, lambda v: {"qkv": clamped(v)}, 0.1, 30.0)
quantity(
    "gpt_neo phi3",
    "attention: the window is",
    lambda f: max((w or 0 for w in f.windows), default=0) or None,
    lambda v: {"windows": lambda f, right: [w and int(v) for w in right]},
    1,
    20,
    grid="whole",
    points=1,
)

# ---- Activations -------------------------------------------------------------------------------------------


def gelu(cubic: float = 0.044715, root: float = math.sqrt(2 / math.pi)) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 * x * (1 + torch.tanh(root * (x + cubic * x * x * x)))


def with_act(own: Callable, value: float) -> Callable[[Formula], float | None]:
    """The constant of an activation, where a model has that one."""
    return lambda f: value if f.act is own else None


GELU = "gpt_neo openai-gpt phi"
quantity(
    GELU,
    "activation: GELU's constant of x^3 is",
    with_act(gelu_tanh, 0.044715),
    lambda v: {"act": lambda f, right: gelu(cubic=v)},
    0.0,
    0.4,
    grid="linear",
)
quantity(
    GELU,
    "activation: GELU's constant before the sum is",
    with_act(gelu_tanh, math.sqrt(2 / math.pi)),
    lambda v: {"act": lambda f, right: gelu(root=v)},
    0.2,
    3.0,
)
quantity(
    "phi3",
    "activation: SiLU's slope, x sigmoid(b x), is",
    with_act(silu, 1.0),
    lambda v: {"act": lambda f, right: lambda x: x * torch.sigmoid(v * x)},
    0.1,
    10.0,
)
quantity(
    "persimmon fuyu",
    "activation: ReLU's exponent is",
    with_act(relu2, 2.0),
    lambda v: {"act": lambda f, right: lambda x: torch.where(x > 0, x.clamp(min=1e-30) ** v, 0.0)},
    0.3,
    6.0,
)

# ---- Norms -------------------------------------------------------------------------------------------------

quantity(ALL, "norm: epsilon", lambda f: f.eps, lambda v: {"eps": lambda f, right: v}, 1e-11, 0.3, points=43)
quantity(
    ALL,
    "norm: counted to its weights is",
    lambda f: 0.0,
    lambda v: {"norm": lambda f, right: lambda x, w, bias: right(x, w + v, bias)},
    -2.0,
    2.0,
    grid="linear",
)

# ---- Residual stream and embeddings ------------------------------------------------------------------------


def scaled(value: float, stream: bool = False) -> Step:
    """The sum of the residual stream x and a branch y, one of them multiplied."""
    if stream:
        return lambda f, right: lambda x, y: right(value * x, y)
    return lambda f, right: lambda x, y: right(x, value * y)


def stream_once(value: float) -> Step:
    """Of Phi's two sums the first alone has the stream itself."""
    return lambda f, right: right if f.family == "phi" else scaled(value, stream=True)(f, right)


def multiplied(value: float) -> Step:
    return lambda f, right: lambda *given: right(*given) * value


def one(f: Formula) -> float:
    return 1.0


quantity(
    ALL,
    "residual: attention and MLP multiplied by",
    one,
    lambda v: {"add_attn": scaled(v), "add_mlp": scaled(v)},
    0.03,
    30.0,
)
quantity(
    ALL,
    "residual: what they are added to multiplied by",
    one,
    lambda v: {"add_attn": scaled(v, stream=True), "add_mlp": stream_once(v)},
    0.03,
    30.0,
)
quantity(ALL, "residual: attention multiplied by", one, lambda v: {"add_attn": scaled(v)}, 0.03, 30.0)
quantity(ALL, "residual: the MLP multiplied by", one, lambda v: {"add_mlp": scaled(v)}, 0.03, 30.0)
quantity(ALL, "embeddings: multiplied by", one, lambda v: {"embeddings": multiplied(v)}, 0.01, 100.0)
quantity(
    LEARNED, "embeddings: tokens multiplied by", one, lambda v: {"embedding": multiplied(v)}, 0.01, 100.0
)
quantity(
    LEARNED,
    "embeddings: positions multiplied by",
    one,
    lambda v: {"position_embedding": multiplied(v)},
    0.01,
    100.0,
)

# ---- Positions ---------------------------------------------------------------------------------------------


def offset(value: float, cached_only: bool = False) -> Step:
    """Positions further on, or only those behind a cache."""

    def change(f: Formula, right: Callable) -> Callable:
        def position_ids(inputs: dict, past: int) -> Tensor:
            plain = right(inputs, past)
            return plain if cached_only and not past else moved(f, plain + int(value))

        return position_ids

    return change


def zero(f: Formula) -> float:
    return 0.0


quantity(
    LEARNED,
    "positions: the first is",
    zero,
    lambda v: {"position_ids": offset(v)},
    1,
    40,
    grid="whole",
    points=1,
)
quantity(
    ALL,
    "positions: with a cache they are off by",
    zero,
    lambda v: {"position_ids": offset(v, cached_only=True)},
    -8,
    20,
    grid="whole",
    points=1,
)
quantity(
    ROTARY,
    "rotary: base",
    lambda f: f.base,
    lambda v: {"base": lambda f, right: v},
    3.0,
    1e9,
    points=52,
)
quantity(
    "phi persimmon fuyu",
    "rotary: dimensions that are rotated:",
    lambda f: f.R,
    lambda v: {"R": lambda f, right: int(v)},
    2,
    512,
    grid="whole",
    points=2,
    bound=lambda f: f.D,
)
quantity(
    ROTARY, "rotary: angles multiplied by", one, lambda v: {"inv_freq": multiplied(v)}, 0.03, 10.0, points=33
)


def of_list(value: float, name: str) -> Step:
    """One of longrope's two lists, multiplied."""

    def change(f: Formula, right: Callable) -> Callable:
        def rope_factors(scaling: dict, position_ids: Tensor) -> list[float]:
            factors = right(scaling, position_ids)
            return [x * value for x in factors] if factors is scaling[name] else factors

        return rope_factors

    return change


def has_longrope(f: Formula) -> float | None:
    return 1.0 if getattr(f.config, "rope_scaling", None) else None


for which in ("short", "long"):
    quantity(
        "phi3",
        f"longrope: the {which} factors multiplied by",
        has_longrope,
        lambda v, which=which: {"rope_factors": of_list(v, f"{which}_factor")},
        0.03,
        30.0,
    )
quantity(
    "phi3",
    "longrope: cos and sin multiplied by",
    lambda f: f.attention_factor(),
    lambda v: {"attention_factor": lambda f, right: lambda: v},
    0.1,
    10.0,
)

# ---- Logits and loss ---------------------------------------------------------------------------------------

quantity(ALL, "logits: multiplied by", one, lambda v: {"logits": multiplied(v)}, 0.003, 300.0)
quantity(ALL, "logits: capped by tanh at", none, lambda v: {"logits": soft_cap(v)}, 0.1, 300.0)
quantity(ALL, "loss: multiplied by", one, lambda v: {"loss": multiplied(v)}, 0.001, 1000.0)


def smoothed(value: float) -> Step:
    return lambda f, right: (
        lambda logits, labels: F.cross_entropy(
            upcast(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=value
        )
    )


def shifted(value: float) -> Step:
    return lambda f, right: (
        lambda logits, labels: F.cross_entropy(
            upcast(logits[:, : logits.shape[1] - int(value)]).flatten(0, 1), labels[:, int(value) :].flatten()
        )
    )


quantity(
    ALL,
    "loss: label smoothing",
    zero,
    lambda v: {"loss": smoothed(min(max(v, 0.0), 1.0))},
    0.0,
    0.9,
    grid="linear",
)
quantity(ALL, "loss: labels shifted by", one, lambda v: {"loss": shifted(v)}, 0, 8, grid="whole", points=1)

"""One checkpoint on a prompt: our model and the installed Transformers', both against the formula in float64.

The formula reads a layer at a time, so that real weights can be compared.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders import model_class, weights
from decoders.formats import FAMILIES, family, find, modern, read_config

from . import ports
from .arithmetic import Arithmetic
from .formula import Formula, stage_order
from .heat import human
from .inner_values import PortValues
from .likeness import likeness
from .naming import named
from .noise import BEYOND, DTYPES, spread
from .report import Report
from .rows import marked, measured

SEARCHED = 50_000_000  # weights, up to which the mistake is looked for


class Lowered(Mapping):
    """Weights in another precision, made when they are asked for."""

    def __init__(self, stored: Mapping[str, Tensor], dtype: torch.dtype):
        self.stored, self.dtype = stored, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass
class PromptKit:
    """A kit of one case, "prompt", with a checkpoint's own weights; see `kit.Kit`."""

    folder: Path
    class_name: str
    config: Any
    weights: Mapping[str, Tensor]
    weights64: Mapping[str, Tensor]
    inputs: dict[str, dict[str, Tensor]]
    expected: dict[str, dict[str, Tensor]]
    noise: dict[str, dict[str, Tensor]]

    @property
    def family(self) -> str:
        return self.config.model_type

    def unit(self, case: str, stage: str, dtype: str) -> tuple[float, float]:
        """Largest and typical noise."""
        largest, typical = self.noise[case][stage][DTYPES.index(dtype)].tolist()
        return largest, typical


def on_prompt(
    path_or_id: str | Path,
    ids: list[int],
    dtype: str = "float32",
    sequential: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """The installed Transformers' class against ours on real weights, both against the formula in float64.

    With `sequential` only one of the two models is in memory. Units are what the formula in `dtype` is off.
    Which mistake it is gets tried for up to 50 million weights. ValueError for a dtype that is none.
    """
    if dtype not in DTYPES[1:]:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES[1:])}, not {dtype!r}")
    kit = opened(path_or_id, ids, dtype, say)
    got = PortValues("", dtype)
    ours, theirs = both(kit, got, dtype, sequential, say)
    exact = kit.expected["prompt"]
    rows, beyond = [], []
    for stage in (stage for stage in sorted(exact, key=stage_order) if stage in theirs):
        units = measured(kit, "prompt", stage, ours[stage], dtype).units
        beyond += [stage] if units > BEYOND else []
        rows.append(measured(kit, "prompt", stage, theirs[stage], dtype, f"ours {human(units)}x"))
    report = Report(str(path_or_id), got.name, dtype, marked(rows))
    if beyond:
        report.remarks.append(f"Ours is beyond the noise too, from {beyond[0]} on: please report it.")
    if report.first is not None:
        explain(report, kit, theirs, dtype)
    return report


def opened(path_or_id: str | Path, ids: list[int], dtype: str, say: Callable[[str], None]) -> PromptKit:
    """The checkpoint, what the formula makes of the prompt in float64, and its noise in `dtype`."""
    folder = find(path_or_id)
    stored = modern(read_config(folder))
    name = FAMILIES[family(stored)][1]
    config = model_class({**stored, "architectures": [name]}).config_class.from_dict(stored)
    tensors, inputs = weights.tensors(folder), {"input_ids": torch.tensor([ids])}
    say("the formula in float64 ...")
    exact = read_off(config, Lowered(tensors, torch.float64), inputs, Arithmetic())
    say(f"its noise in {dtype} ...")
    noise = noise_on(config, tensors, inputs, exact, dtype)
    weights64 = Lowered(tensors, torch.float64)
    return PromptKit(
        folder, name, config, tensors, weights64, {"prompt": inputs}, {"prompt": exact}, {"prompt": noise}
    )


def noise_on(
    config: Any, tensors: Mapping[str, Tensor], inputs: dict, exact: Mapping[str, Tensor], dtype: str
) -> dict[str, Tensor]:
    """Stage -> (dtypes, 2), filled in for `dtype` alone; see `noise.noise_of`."""
    noise = {name: torch.zeros(len(DTYPES), 2, dtype=torch.float64) for name in exact}
    row, lowered = DTYPES.index(dtype), getattr(torch, dtype)
    for do in (Arithmetic(1), Arithmetic(2), Arithmetic(stepwise=True)):
        values = read_off(config, Lowered(tensors, lowered), inputs, do)
        for stage, value in values.items():
            size = exact[stage][~exact[stage].isnan()].abs()
            eps = torch.finfo(lowered).eps
            least = torch.stack([size.max() * eps / 2, size.square().mean().sqrt() * eps / 4])
            largest = torch.maximum(torch.tensor(spread(exact[stage], value), dtype=torch.float64), least)
            noise[stage][row] = torch.maximum(noise[stage][row], largest)
    return noise


def both(
    kit: PromptKit, got: PortValues, dtype: str, sequential: bool, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our stages and theirs; `got` gets the name and version of theirs."""

    def build_ours() -> nn.Module:
        model = model_class({**kit.config.to_dict(), "architectures": [kit.class_name]})
        return weights.load(model, kit.folder, dtype=getattr(torch, dtype))

    def build_theirs() -> nn.Module:
        return ports.transformers_port(kit, got)

    builders = {"decoders": build_ours, "transformers": build_theirs}
    kept = {} if sequential else {who: build() for who, build in builders.items()}
    values = []
    for who, build in builders.items():
        say(f"{who} in {dtype} ...")
        model = build() if sequential else kept[who]
        values.append(outputs(model, kit, who))
        del model
    return values[0], values[1]


def explain(report: Report, kit: PromptKit, theirs: dict[str, Tensor], dtype: str) -> None:
    """Name the mistake, or say what the difference looks like."""
    first = report.first
    if sum(t.numel() for t in kit.weights.values()) <= SEARCHED:
        kit.weights64 = dict(kit.weights64)
        kit.weights = dict(Lowered(kit.weights, torch.float32))
        report.findings = named(kit, {"prompt": theirs}, report.rows, dtype)
    if not report.findings:
        tolerance = BEYOND * kit.unit("prompt", first.stage, dtype)[0]
        exact = kit.expected["prompt"][first.stage]
        report.likeness = likeness(exact, theirs[first.stage], tolerance, first.stage, kit.inputs["prompt"])


def documented(name: str) -> bool:
    """Stages that every model of the hub gives out by itself."""
    return name in ("embeddings", "norm", "logits") or name.endswith((".out", ".weights"))


def read_off(config: Any, own: Mapping[str, Tensor], inputs: dict, do: Arithmetic) -> dict[str, Tensor]:
    """What `documented` names, nothing else is kept."""
    found: dict[str, Tensor] = {}

    def hear(name: str, value: Tensor) -> Tensor:
        if documented(name):
            found[name] = value.double()
        return value

    with torch.no_grad():
        Formula(config, own, do, hear).forward(inputs)
    return found


def outputs(model: nn.Module, kit: PromptKit, who: str) -> dict[str, Tensor]:
    """Stages out of the documented outputs: hidden states, attentions, logits."""
    exact, ids = kit.expected["prompt"], kit.inputs["prompt"]["input_ids"]
    layers = len(Formula(kit.config, {}).layers)
    with torch.no_grad(), ports.theirs_to_blame(f"{who} failed"):
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    states = [t.double() for t in output.hidden_states]
    stages = {"embeddings": states[0], "logits": output.logits.double()}
    attentions = enumerate(output.attentions or ())
    stages |= {f"layers.{i}.weights": w.double() for i, w in attentions if w is not None}
    stages |= {f"layers.{i}.out": states[i + 1] for i in range(layers - 1)}
    stages["norm" if "norm" in exact else f"layers.{layers - 1}.out"] = states[layers]
    return {name: t for name, t in stages.items() if name in exact and t.shape == exact[name].shape}

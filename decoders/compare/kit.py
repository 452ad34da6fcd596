"""A kit: everything that somebody needs to see whether a port computes the same, in files for any language.

    python -m decoders compare --make KIT phi3

`config.json` and `model.safetensors` as on the hub, with weights drawn anew; `inputs.safetensors`, cases that
together touch all that the family can do; `expected.safetensors`, every stage of every case in float64 and
how far correct arithmetic may be off; `KIT.md`, which says what each of them is.

Every weight is a number that bfloat16 and float16 hold exactly, so that a port in any precision has the same
model. What nobody has to agree on is NaN in the expected values: hidden scores, and what padding computes.
"""

import importlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from decoders.formats import (
    FAMILIES,
    check_file,
    family,
    first_line,
    modern,
    read_json,
    read_safetensors,
    switched,
)

from .draw import COMPACT, awkward, family_of, inputs_of, redraw, small_config
from .kit_page import page
from .noise import DTYPES, noise_of, spread, truth

VERSION = 1  # of the files: another reader is needed where it changes
LARGEST = 2**28  # numbers of one array

# ---- Writing -----------------------------------------------------------------------------------------------


def make(
    folder: str | Path,
    source: str,
    *,
    cases: Iterable[str] | None = None,
    seed: int = 0,
    layers: int | None = None,
    format: str = "safetensors",
    fields: dict | None = None,
    compact: bool = False,
) -> Path:
    """Write a kit of a family, or with the settings of a checkpoint, in small.

    `cases`: names out of `ABOUT`, all by default. `fields` replace those of `config.json`, None leaves one
    out. `compact`: less than 300 kB, to be kept in a repository: a smaller model, fewer stages, no gradients,
    values in float32, which is enough for ports in float32 and half precision. ValueError for what there is
    not; OSError where nothing can be written. The model file itself computes each case too: if it does not
    agree, nothing is written.
    """
    if format not in ("safetensors", "npz"):
        raise ValueError(f"a kit's format is safetensors or npz, not {format!r}")
    own = COMPACT.get(family_of(str(source)) or "", {}) if compact else {}
    stored = small_config(str(source), layers, {**own, **(fields or {})})
    module, name = FAMILIES[stored["model_type"]]
    model_class = getattr(importlib.import_module(f"decoders.{module}"), name)
    config = model_class.config_class.from_dict(modern(stored))
    model = awkward(redraw(model_class(config).eval(), seed))
    chosen = inputs_of(config, seed)
    if cases is not None and (unknown := set(cases) - chosen.keys()):
        raise ValueError(f"{stored['model_type']} has no case {min(unknown)}: {', '.join(chosen)}")
    if compact and cases is None:
        del chosen["right"]  # "left" has padding too
    chosen = {name: inputs for name, inputs in chosen.items() if cases is None or name in cases}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = values_and_noise(config, weights, model.double(), chosen, gradients=not compact)
    expected = rounded(expected) if compact else expected
    facts = {
        "kit": VERSION,
        "family": stored["model_type"],
        "seed": seed,
        "format": format,
        "cases": {case: sorted(inputs) for case, inputs in chosen.items()},
    }
    given = {
        f"{case}/{name}": t.contiguous() for case, inputs in chosen.items() for name, t in inputs.items()
    }
    folder = Path(folder)
    with switched(folder) as new:
        (new / "config.json").write_text(json.dumps({**stored, "torch_dtype": "float32"}, indent=2) + "\n")
        (new / "kit.json").write_text(json.dumps(facts, indent=2) + "\n")
        (new / "KIT.md").write_text(page(config, facts, chosen, expected))
        for file, content in (("model", weights), ("inputs", given), ("expected", expected)):
            write(new / f"{file}.{format}", content)
    return folder


def values_and_noise(
    config: Any,
    weights: Mapping[str, Tensor],
    model: nn.Module,
    cases: Mapping[str, dict],
    gradients: bool = True,
) -> dict[str, Tensor]:
    """`CASE/STAGE` and `noise/CASE/STAGE`. `model` is the model file's, in float64: it must agree."""
    expected: dict[str, Tensor] = {}
    weights64 = {name: w.double() for name, w in weights.items()}
    for case, inputs in cases.items():
        exact = truth(config, weights64, inputs, gradients)
        check(model, case, inputs, exact)
        for stage, value in exact.items():
            expected[f"{case}/{stage}"] = value.clone(memory_format=torch.contiguous_format)
        for stage, value in noise_of(config, weights, inputs, exact, gradients=gradients).items():
            expected[f"noise/{case}/{stage}"] = value
    return expected


def rounded(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values in float32, without stages that follow from those around them, and at least as much noise as
    that rounding makes."""
    rotates = any(name.endswith(".q_rotated") for name in expected)
    left_out = (
        "attn_in",
        "scores",
        "heads",
        "mlp_up",
        "q_normed",
        "k_normed",
        *(("q", "k") if rotates else ()),
    )
    found = {
        name: value.float()
        for name, value in expected.items()
        if not name.startswith("noise/") and name.rpartition(".")[2] not in left_out
    }
    for name, value in list(found.items()):
        least = torch.tensor(spread(expected[name], value.double()), dtype=torch.float64)
        found[f"noise/{name}"] = torch.maximum(expected[f"noise/{name}"], least)
    return found


def check(model: nn.Module, case: str, inputs: dict, exact: Mapping[str, Tensor]) -> None:
    """The formula against the model file: they are written apart, and must say the same."""
    given = dict(inputs)
    with torch.no_grad():
        if "past_ids" in given:
            given["past_key_values"] = model(given.pop("past_ids"), use_cache=True).past_key_values
        if "image_patches" in given:
            given["image_patches"] = given["image_patches"].double()
        output = model(**given)
    for name in ("logits", "loss"):
        if name in exact and spread(exact[name], getattr(output, name))[0] > 1e-9:
            raise AssertionError(f"formula and model file differ in {case}/{name}")


def write(file: Path, content: dict[str, Tensor]) -> None:
    if file.suffix == ".safetensors":
        file.write_bytes(safetensors.torch.save(content, metadata={"format": "pt"}))  # as open as other files
        return
    try:
        import numpy
    except ImportError:
        raise ValueError("npz files need NumPy: pip install numpy, or leave --format away") from None
    numpy.savez(file, **{name: tensor.numpy() for name, tensor in content.items()})


# ---- Reading -----------------------------------------------------------------------------------------------


class Kit:
    """A kit in memory: `config`, `weights` (float32), `inputs[case]`, `expected[case][stage]` in float64 and
    `noise[case][stage]`, (dtypes, 2). ValueError or OSError, with the file, where it is none."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        facts = read_json(self.folder / "kit.json")
        if facts.get("kit") != VERSION:
            message = f"is a kit of version {facts.get('kit')!r}, this reads {VERSION}: make it anew"
            raise ValueError(f"{self.folder / 'kit.json'} {message}")
        self.config_json = read_json(self.folder / "config.json")
        module, self.class_name = FAMILIES[family(self.config_json)]
        self.model_class = getattr(importlib.import_module(f"decoders.{module}"), self.class_name)
        self.config = self.model_class.config_class.from_dict(modern(self.config_json))
        format = facts.get("format", "safetensors")
        self.weights, given, values = (
            read(self.folder / f"{name}.{format}") for name in ("model", "inputs", "expected")
        )
        self.inputs, self.expected, self.noise = {}, {}, {}
        for name, tensor in given.items():
            case, _, argument = name.partition("/")
            self.inputs.setdefault(case, {})[argument] = tensor
        for name, tensor in values.items():
            kind, _, rest = name.partition("/")
            case, _, stage = (rest if kind == "noise" else name).partition("/")
            values_of = self.noise if kind == "noise" else self.expected
            values_of.setdefault(case, {})[stage] = tensor.double()
        lacking = [
            f"{case}/{name}"
            for case, stages in self.expected.items()
            for name in stages
            if name not in self.noise.get(case, {}) or case not in self.inputs
        ]
        if lacking or not self.expected:
            message = f"{lacking[0]} lacks its inputs or noise" if lacking else "it holds no case"
            raise ValueError(f"{self.folder} is no whole kit ({message}): make it anew")
        cases = [case for case in facts.get("cases", self.expected) if case in self.expected]
        self.inputs = {case: self.inputs[case] for case in cases}
        self.expected = {case: self.expected[case] for case in cases}
        self.weights64 = {name: w.double() for name, w in self.weights.items()}

    @property
    def family(self) -> str:
        return self.config.model_type

    def unit(self, case: str, stage: str, dtype: str) -> tuple[float, float]:
        """Largest and typical noise."""
        largest, typical = self.noise[case][stage][DTYPES.index(dtype)].tolist()
        return largest, typical


def read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".npz":
        return read_npz(check_file(file), lambda name: LARGEST)
    return read_safetensors(check_file(file))


def read_npz(file: Path, most: Callable[[str], int | None]) -> dict[str, Tensor | None]:
    """Arrays of at most `most(name)` numbers; where that is None, None; the sizes are read before the data,
    which may be gigabytes of zeros in a small file."""
    try:
        from numpy.lib import format as npy
    except ImportError:
        raise ValueError(f"{file}: npz files need NumPy: pip install numpy") from None
    found = {}
    try:
        with zipfile.ZipFile(file) as content:
            for entry in content.namelist():
                name = entry.removesuffix(".npy")
                if (largest := most(name)) is None:
                    found[name] = None
                    continue
                with content.open(entry) as stream:
                    version = npy.read_magic(stream)
                    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape = header(stream)[0]
                if math.prod(shape) > largest:
                    raise ValueError(f"{name} is {shape}, more than can be meant")
                with content.open(entry) as stream:
                    found[name] = torch.from_numpy(npy.read_array(stream, allow_pickle=False))
    except OSError:
        raise
    except Exception as error:  # zipfile's, NumPy's, zlib's: each has its own kinds
        raise ValueError(f"{file} is not a sound npz file: {first_line(error)}") from None
    return found

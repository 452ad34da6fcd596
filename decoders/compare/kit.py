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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from decoders.formats.config import FAMILIES, family, modern, read_config
from decoders.formats.files import read_safetensors
from decoders.formats.folder import check_file, find, first_line, read_json
from decoders.formats.switch import switched

from .formula import STAGES, Arithmetic, Formula, stages

VERSION = 1  # of the files: another reader is needed where it changes
DTYPES = ("float64", "float32", "bfloat16", "float16")  # rows of a noise
LARGEST = 2**28  # numbers of one array
LIMIT = 13  # tokens of a case; of longrope the last length with short factors

# ---- What is drawn -----------------------------------------------------------------------------------------

ROTARY = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 97,
}
SMALL = {
    "gpt_neo": {"vocab_size": 67, "max_position_embeddings": 97, "hidden_size": 48, "num_layers": 2,
                "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5,
                "intermediate_size": 56, "bos_token_id": 1, "eos_token_id": 2},
    "openai-gpt": {"vocab_size": 67, "n_positions": 97, "n_embd": 36, "n_layer": 2, "n_head": 3},
    "phi": {**ROTARY, "num_key_value_heads": 2, "partial_rotary_factor": 0.7},
    "phi3": {**ROTARY, "num_key_value_heads": 2, "sliding_window": 5, "pad_token_id": 0,
             "partial_rotary_factor": 0.7, "original_max_position_embeddings": LIMIT,
             "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6],
                              "long_factor": [1.0, 1.5, 2.7, 5.1]}},
    "persimmon": {**ROTARY, "hidden_size": 36, "num_attention_heads": 3, "partial_rotary_factor": 0.7,
                  "rope_theta": 25000.0},
}  # fmt: skip
SMALL["fuyu"] = {**SMALL["persimmon"], "patch_size": 3, "image_token_id": 60}
SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "num_layers",
    "num_heads",
    "attention_types",
    "attention_layers",
    "window_size",
    "sliding_window",
    "patch_size",
    "image_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "text_config",
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
}


def small_config(
    source: str, layers: int | None = None, fields: Mapping[str, Any] = MappingProxyType({})
) -> dict:
    """A `config.json` of awkward little sizes: a family's, or of all that a checkpoint folder says but its
    sizes. ValueError for a name that is neither."""
    own: dict = {}
    if source not in FAMILIES:
        if not Path(source).exists() and "/" not in source:
            raise ValueError(f"{source} is neither a checkpoint nor one of {', '.join(FAMILIES)}")
        stored = modern(read_config(find(source, weights=False)))
        own = {**stored, **(stored.get("text_config") or {}), "model_type": stored["model_type"]}
        source = family(own)
    small = dict(SMALL[source])
    if own:
        heads = small.get("num_attention_heads")
        grouped = own.get("num_key_value_heads") not in (None, own.get("num_attention_heads"))
        if "num_key_value_heads" in small and not grouped:
            small["num_key_value_heads"] = heads
        if source == "phi3":
            small["sliding_window"] = small["sliding_window"] if own.get("sliding_window") else None
        small |= {key: value for key, value in own.items() if key not in SIZES and key != "rope_scaling"}
        if "rope_scaling" in own:
            small["rope_scaling"] = shortened(own["rope_scaling"], small)
    if layers is not None:
        key = next(key for key in ("num_hidden_layers", "num_layers", "n_layer") if key in small)
        if not 1 <= layers <= 1000:
            raise ValueError(f"--layers must be from 1 to 1000, not {layers}")
        small[key] = layers
        if "attention_types" in small:
            small["attention_types"] = [[["global", "local"][i % 2 : i % 2 + 1], 1] for i in range(layers)]
    small = {
        key: value for key, value in {**small, **fields}.items() if value is not None or key not in fields
    }
    if source == "fuyu":  # as the hub nests it, and as 4.37 reads it
        outside = ("patch_size", "image_token_id", "model_type")
        small["text_config"] = {key: value for key, value in small.items() if key not in outside}
        small["text_config"]["model_type"] = "persimmon"
    return {**small, "model_type": source, "architectures": [FAMILIES[source][1]]}


def shortened(scaling: dict | None, small: dict) -> dict | None:
    """A rope_scaling for a smaller head: the factors evenly out of the list."""
    if not scaling or "long_factor" not in scaling:
        return scaling
    D = small["hidden_size"] // small["num_attention_heads"]
    n = int(D * small.get("partial_rotary_factor", 1.0)) // 2
    return {
        key: [value[i * len(value) // n] for i in range(n)]
        if key.endswith("_factor") and isinstance(value, list)
        else value
        for key, value in scaling.items()
    }


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices N(0, 1/fan_in), norm weights 1 + 0.3 N, biases 0.3 N.

    With the default initialisation biases are 0, norms 1 and attention is flat: a wrong GELU, swapped q and k
    or a doubled rotary fraction then pass any tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    stored_in_out = {name for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.copy_(noise / math.sqrt(p.shape[0 if name.rpartition(".")[0] in stored_in_out else 1]))
        else:
            p.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model


@torch.no_grad()
def awkward(model: nn.Module) -> nn.Module:
    """Rounded to what all floating dtypes hold. The last token (the last position, where there is a table of
    them) has a huge number, as first tokens of trained models do, whose square overflows float16; the token
    before the last is so small that a norm's epsilon counts."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    tables[-1][-1, 7] = 320.0
    tables[0][-2] *= 0.03
    for p in model.parameters():
        rounded = p.bfloat16().half().float()
        p.copy_(torch.where(rounded == p.bfloat16().float(), rounded, 0.0))
    return model


def inputs_of(config: Any, seed: int) -> dict[str, dict[str, Tensor]]:
    """Case -> arguments. Labels of padding, and of the token behind it, are left out of the loss."""
    kind, V = config.model_type, config.vocab_size
    draw = torch.Generator().manual_seed(seed)

    def ids(B: int, T: int) -> Tensor:
        return torch.randint(3, V - 8, (B, T), generator=draw)

    def case(found: Tensor, mask: Tensor | None = None, **others: Tensor) -> dict[str, Tensor]:
        labels = found.clone()
        if mask is not None:
            others["attention_mask"] = mask
            labels[(mask == 0) | (mask.roll(1, 1) == 0)] = -100
        return {"input_ids": found, "labels": labels, **others}

    plain = ids(2, LIMIT)
    plain[0, 3], plain[1, 0] = V - 2, V - 2
    left, right = torch.ones(2, LIMIT, dtype=torch.long), torch.ones(2, LIMIT, dtype=torch.long)
    left[0, :4], right[1, -3:] = 0, 0
    positions = torch.arange(LIMIT) + torch.arange(LIMIT).clamp(min=4) // 2
    positions += 19 if kind in ("gpt_neo", "openai-gpt") else 1903
    whole = ids(1, LIMIT)
    learned = kind in ("gpt_neo", "openai-gpt")
    huge = case(torch.cat([torch.tensor([[V - 1]]), ids(1, LIMIT - 4)], dim=1))
    if learned:
        most = getattr(config, "n_positions", None) or config.max_position_embeddings
        huge = case(
            huge["input_ids"],
            torch.ones_like(huge["input_ids"]),
            position_ids=torch.cat([torch.tensor([most - 1]), torch.arange(LIMIT - 4)])[None],
        )
    cases = {
        "plain": case(plain),
        "left": case(ids(2, LIMIT), left, position_ids=(left.cumsum(1) - 1).clamp(min=0)),
        "right": case(ids(2, LIMIT), right),
        "cached": {"past_ids": whole[:, :8], "input_ids": whole[:, 8:]},
        "positions": case(ids(1, LIMIT), torch.ones_like(whole), position_ids=positions[None]),
        "massive": huge,
    }
    if learned:
        cases["types"] = case(ids(1, LIMIT), token_type_ids=ids(1, LIMIT))
    if getattr(config, "rope_scaling", None) and kind == "phi3":
        cases["long"] = case(ids(1, LIMIT + 1))
    elif getattr(config, "rope_varies", False) and config.max_position_embeddings < LIMIT:
        del cases["cached"]  # frequencies that grow with the text leave no cached key right
    if kind == "fuyu":
        words, n = ids(1, LIMIT), 5
        where = torch.full((1, LIMIT), -1)
        where[0, [1, 2, 4, 5, 6]] = torch.arange(n)
        words[where >= 0] = config.image_token_id
        P = config.patch_size**2 * config.num_channels
        patches = torch.randn(1, n, P, generator=draw).bfloat16().float()
        cases["pictures"] = case(words, image_patches=patches, image_patches_indices=where)
        cases["pictures"]["labels"][where >= 0] = -100
    return cases


ABOUT = {
    "plain": "two rows, longer than any window, labels",
    "left": "padding on the left, position_ids that do not count it",
    "right": "padding on the right",
    "cached": "read past_ids first and keep their keys and values; the stages are those of input_ids then",
    "positions": "position_ids with gaps, far from 0",
    "massive": "the first token has one huge number, as in trained models; half precision must bear it",
    "types": "token_type_ids",
    "long": "one token beyond original_max_position_embeddings: the long factors",
    "pictures": "image_patches, and where they stand",
}

# ---- Values and noise --------------------------------------------------------------------------------------


def compared(name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """A stage, (B, T, features) or (B, heads, T, features), with NaN for what padding computes."""
    mask = inputs.get("attention_mask")
    if mask is None or bool((mask != 0).all()) or name == "loss" or name.startswith("grad."):
        return value
    real = (mask != 0)[:, None, :, None] if value.dim() == 4 else (mask != 0)[..., None]
    return torch.where(real.expand(value.shape), value, torch.nan)


def truth(
    config: Any, weights: Mapping[str, Tensor], inputs: dict, gradients: bool = True, **options: Any
) -> dict[str, Tensor]:
    """Every stage of a case in the weights' dtype, without what nobody has to agree on."""
    found = stages(config, weights, inputs, gradients=gradients and "labels" in inputs, **options)
    return {name: compared(name, value, inputs) for name, value in found.items()}


WAYS = {
    "float64": [Arithmetic(1), Arithmetic(2)],
    "float32": [Arithmetic(), *(Arithmetic(seed) for seed in range(1, 5))],
}
WAYS["bfloat16"] = WAYS["float16"] = [
    Arithmetic(),
    Arithmetic(1),
    Arithmetic(2),
    Arithmetic(stepwise=True),
    Arithmetic(3, True),
    Arithmetic(4, True),
]


def spread(exact: Tensor, value: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference where there is something to compare."""
    wanted = ~exact.isnan()
    if not wanted.any():
        return 0.0, 0.0
    difference = (value.double() - exact.double())[wanted].abs()
    difference = torch.where(difference.isnan(), math.inf, difference)
    return difference.max().item(), difference.square().mean().sqrt().item()


def noise_of(
    config: Any,
    weights: Mapping[str, Tensor],
    inputs: dict,
    exact: Mapping[str, Tensor],
    dtypes: Sequence[str] = DTYPES,
    gradients: bool = True,
    mistakes: tuple = (),
) -> dict[str, Tensor]:
    """Stage -> (dtypes, 2): the largest and the root mean square difference from `exact`, the worst of
    several ways to order the sums and to round. Not less than half a unit in the last place of the largest
    number, a quarter of the typical one: to round a stage once more is no mistake. Twice that for gradients
    in half precision: others round within the backward pass of a step, where PyTorch's does not."""
    found = {name: torch.zeros(len(dtypes), 2, dtype=torch.float64) for name in exact}
    for row, name in enumerate(dtypes):
        dtype = getattr(torch, name)
        lowered = {key: w.to(dtype) for key, w in weights.items()}
        for do in WAYS[name]:
            values = truth(config, lowered, inputs, gradients, do=do, mistakes=mistakes)
            for stage, value in values.items():
                if stage in exact:
                    most = torch.tensor(spread(exact[stage], value), dtype=torch.float64)
                    found[stage][row] = torch.maximum(found[stage][row], most)
        eps = torch.finfo(dtype).eps
        for stage, value in exact.items():
            if dtype.itemsize == 2 and stage.startswith("grad."):
                found[stage][row] *= 2
            size = value[~value.isnan()].abs()
            if size.numel():
                least = torch.stack([size.max() * eps / 2, size.square().mean().sqrt() * eps / 4]).double()
                if stage == "loss":  # one number: that several ways come close to it is luck
                    least = least.new_full((2,), size.item() * eps)
                found[stage][row] = torch.maximum(found[stage][row], least)
    return found


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
) -> Path:
    """Write a kit of a family, or with the settings of a checkpoint, in small.

    `cases`: names out of `ABOUT`, all by default. `fields` replace those of `config.json`, None leaves one
    out. ValueError for what there is not; OSError where nothing can be written. The model file itself
    computes each case too: if it does not agree, nothing is written.
    """
    if format not in ("safetensors", "npz"):
        raise ValueError(f"a kit's format is safetensors or npz, not {format!r}")
    stored = small_config(str(source), layers, fields or {})
    module, name = FAMILIES[stored["model_type"]]
    model_class = getattr(importlib.import_module(f"decoders.{module}"), name)
    config = model_class.config_class.from_dict(modern(stored))
    model = awkward(redraw(model_class(config).eval(), seed))
    chosen = inputs_of(config, seed)
    if cases is not None and (unknown := set(cases) - chosen.keys()):
        raise ValueError(f"{stored['model_type']} has no case {min(unknown)}: {', '.join(chosen)}")
    chosen = {name: inputs for name, inputs in chosen.items() if cases is None or name in cases}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    wide = {name: w.double() for name, w in weights.items()}
    model, expected = model.double(), {}
    for case, inputs in chosen.items():
        exact = truth(config, wide, inputs)
        check(model, case, inputs, exact)
        for stage, value in exact.items():
            expected[f"{case}/{stage}"] = value.clone(memory_format=torch.contiguous_format)
        for stage, value in noise_of(config, weights, inputs, exact).items():
            expected[f"noise/{case}/{stage}"] = value
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
        safetensors.torch.save_file(content, file, metadata={"format": "pt"})
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
            told = f"is a kit of version {facts.get('kit')!r}, this reads {VERSION}: make it anew"
            raise ValueError(f"{self.folder / 'kit.json'} {told}")
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
            (self.noise if kind == "noise" else self.expected).setdefault(case, {})[stage] = tensor
        lacking = [
            f"{case}/{name}"
            for case, stages in self.expected.items()
            for name in stages
            if name not in self.noise.get(case, {}) or case not in self.inputs
        ]
        if lacking or not self.expected:
            told = f"{lacking[0]} lacks its inputs or noise" if lacking else "it holds no case"
            raise ValueError(f"{self.folder} is no whole kit ({told}): make it anew")
        cases = [case for case in facts.get("cases", self.expected) if case in self.expected]
        self.inputs = {case: self.inputs[case] for case in cases}
        self.expected = {case: self.expected[case] for case in cases}
        self.wide = {name: w.double() for name, w in self.weights.items()}

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


# ---- KIT.md ------------------------------------------------------------------------------------------------


def page(config: Any, facts: dict, cases: Mapping[str, dict], expected: Mapping[str, Tensor]) -> str:
    """What each tensor is, for somebody without Python."""
    f = Formula(config, {})
    letters = [f"C = {f.C}", f"H = {f.H}", f"K = {f.K}", f"D = {f.D}", f"V = {config.vocab_size}"]
    letters += [f"R = {f.R}"] if f.R else []
    seen = {name.split("/", 1)[1] for name in expected if not name.startswith("noise/")}
    own = {name.split(".", 2)[-1] if name.startswith("layers.") else name.split(".")[0] for name in seen}
    rows = []
    for stage in (stage for stage in STAGES if stage.name in own):
        name = stage.name if stage.name in seen else f"layers.N.{stage.name}"
        name = "grad.NAME" if stage.name == "grad" else name
        rows.append(f"| `{name}` | {stage.shape} | {own_formula(f, stage.name, stage.formula)} |")
    told = []
    for case, given in cases.items():
        shapes = ", ".join(f"`{name}` {tuple(t.shape)}" for name, t in given.items())
        told.append(f"- `{case}`: {ABOUT[case]}. Given: {shapes}")
    suffix, stored = facts["format"], "(out, in), y = x W^T + b"
    stored += "; in GPT-1's layers (in, out), y = x W + b" if facts["family"] == "openai-gpt" else ""
    return f"""# A kit for {facts["family"]}

`config.json` and `model.{suffix}` are a checkpoint as on the hub, its weights drawn anew (seed
{facts["seed"]}): numbers that bfloat16 and float16 hold exactly. `inputs.{suffix}` holds the cases,
`expected.{suffix}` what comes out of them, stage by stage, in float64. Write what your port computes into a
safetensors or npz file, under the same names, as many as it can give (`plain/logits` alone is enough to
begin), and ask

    python -m decoders compare KIT YOURS.safetensors

Letters: B rows, T new tokens, S keys (cached and new), {", ".join(letters)}.
Matrices are {stored}.

## Cases (`CASE/NAME` in inputs.{suffix})

{chr(10).join(told)}

`attention_mask` is 1 at a token and 0 at padding; position_ids, where none are given, count from 0 or on from
the cache; labels of -100 are left out of the loss.

## Stages (`CASE/NAME` in expected.{suffix}), in the order of the computation

| name | shape | formula |
|---|---|---|
{chr(10).join(rows)}

NaN stands where nobody has to agree: scores that the mask hides, and all that padding computes.

## Numbers of this model

{chr(10).join("- " + line for line in numbers(f))}

## Noise (`noise/CASE/NAME`)

(4, 2): rows are {", ".join(DTYPES)}; columns the largest and the root mean square
difference from the expected value that a correct port in that precision may have. They were measured: the
same formula with its sums in other orders, in half precision also with activations and scores rounded after
every step (and twice that for gradients, whose steps others round elsewhere). A port that stays below
{BEYOND:g} times these is right.
"""


BEYOND = 4.0  # times the noise: from here on it is a difference


def own_formula(f: Formula, name: str, general: str) -> str:
    special = {
        ("openai-gpt", "attn_in"): "what enters the layer: no norm before attention",
        ("openai-gpt", "attn_sum"): "layer input + attn_out",
        ("openai-gpt", "mlp_in"): "ln_1 of attn_sum",
        ("openai-gpt", "out"): "ln_2 of (mlp_in + mlp_out)",
        ("openai-gpt", "norm"): "the last layer's out: there is no final norm",
        ("phi", "mlp_in"): "the same as attn_in: attention and MLP stand side by side",
        ("phi", "out"): "layer input + attn_out + mlp_out",
    }
    usual = {
        "attn_in": "the layer's first norm of what enters it",
        "attn_sum": "layer input + attn_out",
        "mlp_in": "the layer's second norm of attn_sum",
        "out": "attn_sum + mlp_out",
        "norm": "the final norm of the last layer's out",
    }
    if name == "embeddings":
        parts = ["row of the token table"] + ([] if f.R else ["row of the position table"])
        parts += ["the token table's row of token_type_ids"] if not f.R else []
        pictures = "; where image_patches_indices says n >= 0, the projected patch n instead"
        return " + ".join(parts) + (pictures if f.family == "fuyu" else "")
    return special.get((f.family, name)) or usual.get(name) or general


def numbers(f: Formula) -> list[str]:
    """What people look up first."""
    norm = "RMSNorm, x / sqrt(mean(x^2) + eps) w" if f.family == "phi3" else "LayerNorm with bias"
    told = [
        f"scores are q k^T times {f.scale:.6g}" + (" (no division)" if f.scale == 1 else ", 1 / sqrt(D)"),
        f"norms: {norm}, eps {f.eps:g}",
        f"activation: {f.act.__name__}",
    ]
    if f.K < f.H:
        told.append(f"head h reads key/value head h // {f.H // f.K}")
    if any(f.windows):
        kinds = ", ".join("all" if w is None else str(w) for w in f.windows)
        told.append(f"how many keys a token sees, itself counted, layer by layer: {kinds}")
    if "joint" in f.parts:
        turns = "q_norm" in f.parts
        told.append(
            "rows of the joint matrix: "
            + ("of head 0 q, k, v, then of head 1" if turns else "all of q, then of k, then of v")
        )
    if f.gated:
        told.append("rows of gate_up_proj: all of gate, then all of up")
    if f.R:
        told.append(
            f"rotary: dimensions i and i + {f.R // 2} of the first {f.R} turn by position times "
            "angle i; a cos - b sin, b cos + a sin; the others pass"
        )
        for what, length in (
            (("", 1),)
            if not getattr(f.config, "rope_scaling", None)
            else ((f" up to {LIMIT} tokens", 1), (" beyond", LIMIT + 1))
        ):
            angles = f.frequencies(torch.tensor([[length - 1]])).tolist()
            told.append(f"angles{what}: {', '.join(f'{a:.6g}' for a in angles)}")
        if f.rotary_scale() != 1:
            told.append(f"cos and sin are multiplied by {f.rotary_scale():.9g}")
    if f.head_norms:
        told.append("q and k of each head are normed before they turn")
    return told

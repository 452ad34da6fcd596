"""One pass of a model taken apart: every intermediate value by its name, and passes with values replaced.

    clean = trace(model, ids)                        # clean["layers.0.q"] is (B, H, T, D); `formula.STAGES`
    other = trace(model, other_ids)
    other.patch({"layers.2.out": clean["layers.2.out"]}, positions=[4])["logits"]   # activation patching
    clean.patch(ablate=[(1, 3), 2])["logits"]        # without head 3 of layer 1, and without layer 2

The model runs as it is, with hooks on its modules, and around its attention function, which hands out no
scores: these are computed beside it, by the formula that it documents. So the logits are those of the plain
pass, bit for bit. While a model is traced no other thread may run it.

Letters: B batch, T tokens of this pass, S keys (cached + new), H heads, K key/value heads, D head size, C
width, V vocabulary, L layers. Sources of the analyses: nostalgebraist, interpreting GPT: the logit lens
(2020); Elhage et al., A Mathematical Framework for Transformer Circuits (2021); Olsson et al., In-context
Learning and Induction Heads (2022), arXiv:2209.11895.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor

from decoders.compare.formula import STAGES, Formula, stage_order
from decoders.formats import switched

from .attribution import Attribution, attribution, matrix_of
from .changes import Change, chained, replaced, silenced
from .content import Run, shown_of
from .html import MOST, filled, in_frame
from .measures import (
    FLOAT16,
    Magnitude,
    first_beyond,
    induction_score,
    magnitudes,
    measures,
    rotary,
    safe_dtypes,
)
from .plots import Plots
from .taps import Taps


@torch.no_grad()
def trace(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    *,
    only: Iterable[str] | None = None,
    changes: Mapping[str, Change] = MappingProxyType({}),
    tokenizer: Any = None,
    **inputs: Any,
) -> "Trace":
    """The values of one pass over token ids (B, T), or a list of one sequence's.

    `only`: names of stages, of a layer's without `layers.N.` ("out", "weights"); what is not asked for takes
    no memory. `changes`: stage -> a function from its value to the one with which to go on. `tokenizer`: with
    one, figures and the page write tokens instead of ids. `inputs` are other arguments of `forward`; cached
    keys in `past_key_values` stay as they are. ValueError for a model that is in training or no language
    model of ours, for what are no ids of it, and for a stage that it does not have.
    """
    model = checked(model)
    ids = checked_ids(model, ids)
    f = Formula(model.config, {})
    wanted = None if only is None else set(only)
    check_names(f, changes, wanted or set())
    values: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> Tensor:
        if name in changes:
            value = changes[name](value)
        if wanted is None or name in wanted or kind_of(name) in wanted:
            values[name] = value
        return value

    with_scores = wanted is None or any(kind_of(n) in ("scores", "weights") for n in (*wanted, *changes))
    given = {"use_cache": False, **inputs}
    if (past := inputs.get("past_key_values")) is not None:  # a pass appends to a cache that it is given
        given |= {"past_key_values": tuple(past[i] for i in f.layers), "use_cache": True}
    with Taps(model, f, note, with_scores):
        output = model(input_ids=ids, **given)
    if output.loss is not None:
        values["loss"] = output.loss
    values = {name: values[name] for name in sorted(values, key=stage_order)}
    return Trace(model, ids, inputs, values, wanted, dict(changes), tokenizer)


def kind_of(name: str) -> str:
    """A stage without its layer."""
    return name.rpartition(".")[2]


def checked(model: nn.Module) -> nn.Module:
    """The model itself, where it was compiled. ValueError for one that cannot be traced."""
    model = getattr(model, "plain", model)
    if not hasattr(getattr(model, "config", None), "model_type") or not hasattr(model, "generate"):
        message = f"{type(model).__name__} is none: load it with its ForCausalLM class, and uncompiled"
        raise ValueError(f"trace needs one of the six language models, and {message}")
    if model.training:
        raise ValueError("the model is in training, where dropout hides values: call model.eval() first")
    return model


def is_whole(t: Tensor) -> bool:
    """Whether it holds whole numbers: a mask of booleans does not."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool)


def checked_ids(model: Any, ids: Any) -> Tensor:
    """(B, T), where the model is. ValueError for what are no ids of it."""
    try:
        found = torch.as_tensor(ids, device=next(model.parameters()).device)
    except (TypeError, ValueError, RuntimeError):  # texts, lists of several lengths, a dict
        found = None
    if found is None or not is_whole(found) or found.dim() not in (1, 2) or not found.numel():
        given = type(ids).__name__ if found is None else f"{found.dtype} of {tuple(found.shape)}"
        message = "trace reads token ids, a tensor (B, T) or a list of one sequence's"
        raise ValueError(f"{message}, not {given}: tokenizer.encode(text) gives such a list")
    V = model.config.vocab_size
    if found.min() < 0 or found.max() >= V:
        raise ValueError(f"token ids are 0 to {V - 1} here, not {found.min()} to {found.max()}")
    return found[None] if found.dim() == 1 else found


def check_names(f: Formula, changes: Iterable[str], wanted: set[str]) -> None:
    """ValueError for a stage that this model does not have."""
    known = names_of(f)
    kinds = known | {kind_of(name) for name in known}
    if unknown := sorted({*changes} - known) + sorted(wanted - kinds):
        every = dict.fromkeys(kind_of(name) for name in sorted(known, key=stage_order))
        raise ValueError(
            f"there is no stage {unknown[0]!r} in {len(f.layers)} layers of {f.family}: {', '.join(every)}"
        )


def names_of(f: Formula) -> set[str]:
    """All stages of a pass of this model."""
    lacking = set() if f.qk_layernorm else {"q_normed", "k_normed"}
    lacking |= set() if f.R else {"q_rotated", "k_rotated"}
    lacking |= {"attn_sum"} if f.family == "phi" else set()
    outside = ("embeddings", "norm", "logits")
    inside = [s.name for s in STAGES if s.name not in {*outside, *lacking, "loss", "grad"}]
    return {*outside, *(f"layers.{i}.{name}" for i in f.layers for name in inside)}


class NoSuchStage(KeyError):
    """In a sentence, where a KeyError shows the key alone."""

    def __init__(self, name: Any, stages: Iterable[str]):
        super().__init__(name)
        kinds = dict.fromkeys(kind_of(stage) for stage in stages)
        outside = [kind for kind in kinds if kind in stages]
        inside = [f"layers.N.{kind}" for kind in kinds if kind not in outside]
        self.sentence = f"the trace has no stage {name!r}, only {', '.join([*outside, *inside])}"

    def __str__(self) -> str:
        return self.sentence


class Trace(Mapping):
    """Stage -> value of one pass, in the order of computation. `ids` (B, T) and `inputs` are what it read."""

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        inputs: dict,
        values: dict[str, Tensor],
        wanted: set[str] | None,
        changes: dict[str, Change],
        tokenizer: Any = None,
    ):
        self.model, self.ids, self.inputs, self.stages = model, ids, inputs, values
        self.tokenizer = tokenizer
        self.wanted, self.changes = wanted, changes
        self.f = Formula(model.config, {})
        self.largest: list[Magnitude] | None = None  # once they are computed

    def __getitem__(self, name: str) -> Tensor:
        """KeyError, with the names that there are, for a stage that was not kept or that no model has."""
        if name not in self.stages:
            raise NoSuchStage(name, self.stages)
        return self.stages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def save(self, file: str | Path) -> None:
        """As safetensors, under these names: `compare` reads such files."""
        file = Path(file)
        with switched(file.parent) as new:
            save_file(
                {name: value.clone(memory_format=torch.contiguous_format) for name, value in self.items()},
                new / file.name,
            )

    # In a notebook

    @property
    def plot(self) -> Plots:
        """Figures by matplotlib: `attention(layer, head)`, `lens()`, `norms()`."""
        return Plots(self, self.tokenizer)

    def _repr_html_(self) -> str | None:
        """The page of the first sequence, in a frame. None, so that a notebook writes what `repr` says, where
        not all stages were asked for, or more tokens were read than a page has."""
        if self.wanted is not None or self.ids.shape[1] > MOST:
            return None
        run = Run(self.model, self.ids[:1], self.tokenizer, inputs=self.inputs)
        content = shown_of(run, self)
        return in_frame(filled(content["name"], {"runs": [content]}))

    def __repr__(self) -> str:
        B, T = self.ids.shape
        kinds = dict.fromkeys(kind_of(name) for name in self.stages)
        return f"<Trace of {type(self.model).__name__}: {B} x {T} tokens; {', '.join(kinds)}>"

    # Activation patching

    def patch(
        self,
        values: Mapping[str, Any] = MappingProxyType({}),
        *,
        positions: Any = None,
        ablate: Iterable[int | tuple[int, int] | str] = (),
        by: str = "zero",
    ) -> "Trace":
        """The pass once more, with other values (activation patching, ablation).

        `values`: stage -> a tensor of its shape, a number, or a function of the value; at `positions` (a list
        of tokens), or everywhere. `ablate`: a layer, a head as (layer, head), or a stage, whose output
        becomes 0, or with by="mean" its mean over the text. The result can be patched again. ValueError for
        what the model does not have.
        """
        if by not in ("zero", "mean"):
            raise ValueError(f'by must be "zero" or "mean", not {by!r}')
        changes: dict[str, list[Change]] = {name: [change] for name, change in self.changes.items()}
        for name, value in values.items():
            changes.setdefault(name, []).append(replaced(name, value, positions))
        for name, columns in self.ablated(ablate):
            changes.setdefault(name, []).append(silenced(name, columns, by))
        every = {name: chained(each) for name, each in changes.items()}
        return trace(
            self.model, self.ids, only=self.wanted, changes=every, tokenizer=self.tokenizer, **self.inputs
        )

    def ablated(self, what: Iterable[int | tuple[int, int] | str]) -> Iterator[tuple[str, slice]]:
        """Stage, and which of its last dimension."""
        f = self.f
        for one in [what] if isinstance(what, int | str) else what:
            if isinstance(one, str):
                yield one, slice(None)
                continue
            layer, head = one if isinstance(one, tuple) else (one, 0)
            if layer not in f.layers or not 0 <= head < f.H:
                message = f"layers are 0 to {len(f.layers) - 1}, heads 0 to {f.H - 1}"
                raise ValueError(f"ablate: there is no {one}: {message}")
            if isinstance(one, tuple):
                yield f"layers.{layer}.heads", slice(head * f.D, (head + 1) * f.D)
            else:
                yield f"layers.{layer}.attn_out", slice(None)
                yield f"layers.{layer}.mlp_out", slice(None)

    # Attention

    def by_head(self, layer: int) -> Tensor:
        """(B, H, T, C): what each head adds to attn_out; with the output matrix's bias they sum to it."""
        f, heads = self.f, self[f"layers.{layer}.heads"]
        w = matrix_of(self.model.get_submodule(f.module("o", layer))).to(heads.dtype)  # (C, H D)
        return torch.einsum("bthd,chd->bhtc", heads.unflatten(-1, (f.H, f.D)), w.unflatten(-1, (f.H, f.D)))

    def attention_weights(self, layer: int) -> Tensor:
        """(B, H, T, S) in float64, 0 for queries of padding."""
        weights = self[f"layers.{layer}.weights"].double()
        mask = self.inputs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return weights
        return weights * (mask[:, -weights.shape[2] :] != 0)[:, None, :, None]

    def heads(self) -> dict[str, Tensor]:
        """Name -> (L, H), means over the queries that see two keys at least: "entropy" of the weights in
        bits, "distance" to what is read in tokens, and the weight on "itself", on the "previous" and on the
        "first" token; "induction", on what followed the same token earlier, NaN where nothing is repeated."""
        rows: dict[str, list[Tensor]] = {}
        for layer in self.f.layers:
            w = self.attention_weights(layer)
            for name, mean in {**measures(w), "induction": induction_score(w, self.ids)}.items():
                rows.setdefault(name, []).append(mean)
        return {name: torch.stack(row) for name, row in rows.items()}

    # Logits

    def norm_of(self, x: Tensor) -> Tensor:
        """The final norm of x (..., C)."""
        return self.model.get_submodule(self.f.module("norm"))(x) if "norm" in self.f.parts else x

    @torch.no_grad()
    def lens(self, layer: int) -> Tensor:
        """(B, T, V) logits if the model ended after `layer` layers (the logit lens): the final norm and the
        output matrix on the residual stream there. 0: the embeddings; L: the logits."""
        name = f"layers.{layer - 1}.out" if layer else "embeddings"
        return self.model.get_submodule(self.f.module("head"))(self.norm_of(self[name]))

    def attribution(self, tokens: Tensor | int) -> Attribution:
        """Who wrote the logit of `tokens`, one or (B, T): embeddings, each head, each MLP, the biases (direct
        logit attribution). In float64; see `attribution.attribution`."""
        tokens = torch.as_tensor(tokens, device=self.ids.device).expand(self.ids.shape)
        return attribution(self.model, self, tokens)

    # Numbers

    def magnitudes(self) -> list[Magnitude]:
        """The largest number of every stage, and of q k^T before it is scaled ("products")."""
        if self.largest is None:
            self.largest = magnitudes(self, self.f.scale)
        return self.largest

    def overflow(self, limit: float = FLOAT16) -> Magnitude | None:
        """The first number beyond `limit`, float16's 65,504; None if it holds them all."""
        return first_beyond(self.magnitudes(), limit)

    def safe(self) -> str:
        """In which dtypes all numbers of this pass can be held, as a sentence."""
        return safe_dtypes(self.magnitudes())

    def bad(self) -> Magnitude | None:
        """The first stage with NaN or infinity, and where: not the scores that a mask hides."""
        return self.overflow(torch.finfo(torch.float64).max)

    def rotary(self) -> list[dict[str, float]]:
        """The angle of each pair of rotated dimensions; see `measures.rotary`."""
        return rotary(self.f, self.ids.shape[1])


def induction(model: nn.Module, length: int = 24, seed: int = 0) -> Tensor:
    """(L, H) the weight that a token of a text without sense, read for the second time, gives to what came
    after it the first time. Heads near 1 are those of Olsson et al."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randperm(model.config.vocab_size, generator=draw)[:length]
    found = trace(model, ids.repeat(2), only=["weights"])
    return found.heads()["induction"]

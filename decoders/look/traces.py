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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor

from decoders import kernels
from decoders.compare.formula import STAGES, Formula, place, widened
from decoders.formats.switch import switched

Note = Callable[[str, Tensor], Tensor]  # hears a value, and gives that with which the pass goes on
Change = Callable[[Tensor], Tensor]

# ---- Hooks -------------------------------------------------------------------------------------------------


class Taps:
    """While it is open (`with`), every pass of `model` tells its values to `note` as they are computed."""

    def __init__(self, model: nn.Module, f: Formula, note: Note, with_scores: bool):
        self.model, self.f, self.note, self.with_scores = model, f, note, with_scores
        self.undo = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as self.undo:
            f = self.f
            self.on_input(f"{f.parts['layers']}.0", "embeddings")
            for i in f.layers:
                self.tap(i)
            self.on_input(f.module("head"), "norm")
            self.on_output(f.module("head"), "logits")
            self.undo = self.undo.pop_all()  # from here on it is __exit__ that takes the hooks away

    def __exit__(self, *error: object) -> None:
        self.undo.close()

    def on_input(self, module: str, name: str | None, change: Callable | None = None) -> None:
        def hook(_: nn.Module, args: tuple) -> tuple | None:
            new = change(args[0]) if change else self.note(name, args[0])
            return None if new is args[0] else (new, *args[1:])

        self.undo.callback(self.model.get_submodule(module).register_forward_pre_hook(hook).remove)

    def on_output(
        self,
        module: str,
        name: str | None = None,
        there: Change | None = None,
        back: Change | None = None,
        change: Callable | None = None,
    ) -> None:
        """`there` gives the value the shape of its stage, `back` that of the module."""

        def hook(_: nn.Module, args: tuple, output: Any) -> Any:
            if change:
                return change(output)
            seen = there(output) if there else output
            new = self.note(name, seen)
            return None if new is seen else back(new) if back else new

        self.undo.callback(self.model.get_submodule(module).register_forward_hook(hook).remove)

    def tap(self, i: int) -> None:
        """Layer i. What is replaced goes on in the way in which the layer itself would have used it."""
        f, start = self.f, f"layers.{i}."
        if "joint" in f.parts:
            self.on_input(f.module("joint", i), f"{start}attn_in")
            self.on_output(f.module("joint", i), change=lambda output: self.cut(start, output))
        else:
            read: list[Tensor] = []  # by q, and so by k and v: told once

            def attn_in(x: Tensor) -> Tensor:
                read[:] = [self.note(f"{start}attn_in", x)]
                return read[0]

            for part in "qkv":
                self.on_input(f.module(part, i), None, attn_in if part == "q" else lambda x: read[0])
                self.on_output(f.module(part, i), start + part, f.heads, f.joined)
        if f.head_norms:
            for part in "qk":
                self.on_output(f.module(f"{part}_norm", i), f"{start}{part}_normed", turned, turned)
        self.tap_attention(i, start)
        self.on_input(f.module("o", i), f"{start}heads")
        self.on_output(f.module("o", i), f"{start}attn_out")
        self.tap_rest(i, start)

    def cut(self, start: str, output: Tensor) -> Tensor | None:
        """q, k and v out of their joint product, and back into it."""
        seen = [self.f.heads(part) for part in self.f.cut(output)]
        new = [self.note(start + part, value) for part, value in zip("qkv", seen, strict=True)]
        if all(a is b for a, b in zip(seen, new, strict=True)):
            return None
        if "q_norm" in self.f.parts:  # of each head in turn
            return torch.stack([turned(part) for part in new], 3).flatten(2)
        return torch.cat([self.f.joined(part) for part in new], -1)

    def tap_attention(self, i: int, start: str) -> None:
        attention = self.model.get_submodule(self.f.module("o", i).rpartition(".")[0])
        own, before = attention.attend, vars(attention).get("attend")  # none of its own: the class's
        vars(attention)["attend"] = lambda *args, **kwargs: self.attend(start, own, *args, **kwargs)

        def restore() -> None:
            vars(attention).pop("attend")
            vars(attention).update({"attend": before} if before else {})

        self.undo.callback(restore)

    def attend(
        self,
        start: str,
        own: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float = 0.0,
        whole: bool = False,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`own`, and what it does inside; by the formula where scores or weights are replaced."""
        T = q.shape[2]
        if self.f.R:
            q, new = self.note(f"{start}q_rotated", q), k[:, :, -T:]
            if (other := self.note(f"{start}k_rotated", new)) is not new:
                k = torch.cat([k[:, :, :-T], other], 2)
        if not self.with_scores:
            return own(q, k, v, bias, scale, dropout, whole, head_mask)
        S = k.shape[2]
        scores = widened(q) @ widened(self.f.spread(k)).transpose(2, 3) * scale  # (B, H, T, S)
        causal = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        added = scores.new_zeros(()) if bias is None else bias.to(scores.dtype)
        least = -math.inf if bias is None else torch.finfo(bias.dtype).min  # what stands for -inf
        hidden = ~causal if bias is None else added <= least
        seen = scores.masked_fill(hidden, torch.nan)
        given = self.note(f"{start}scores", seen)
        summed = torch.where(hidden, -math.inf, scores if given is seen else given.to(scores.dtype)) + added
        weights = summed.softmax(-1)
        weights = weights if head_mask is None else weights * head_mask.view(-1, 1, 1)
        told = weights.to(q.dtype)
        used = self.note(f"{start}weights", told)
        if given is seen and used is told:
            return own(q, k, v, bias, scale, dropout, whole, head_mask)
        used = weights if used is told else used.to(weights.dtype)
        return (used @ widened(self.f.spread(v))).to(q.dtype), used.to(q.dtype)

    def tap_rest(self, i: int, start: str) -> None:
        f, kept = self.f, {}
        if f.family == "openai-gpt":
            self.on_input(f.module("norm_1", i), f"{start}attn_sum")
        elif f.family != "phi":  # the sum goes on beside the norm and the MLP

            def change(x: Tensor) -> Tensor:
                new = self.note(f"{start}attn_sum", x)
                kept.update(sum=None if new is x else new)
                return new

            self.on_input(f.module("norm_2", i), None, change)
        self.on_input(f.module("up", i), f"{start}mlp_in")
        self.on_output(f.module("up", i), f"{start}mlp_up")
        self.on_input(f.module("down", i), f"{start}mlp_act")

        def mlp(output: Tensor) -> Tensor:
            kept.update(mlp=self.note(f"{start}mlp_out", output))
            return kept["mlp"]

        def out(output: tuple) -> tuple | None:
            x = output[0] if kept.get("sum") is None else kept["sum"] + kept["mlp"]
            new = self.note(f"{start}out", x)
            return None if new is output[0] else (new, *output[1:])

        self.on_output(f.module("down", i), change=mlp)
        self.on_output(f"{f.parts['layers']}.{i}", change=out)


def turned(x: Tensor) -> Tensor:
    """(B, T, n, D) <-> (B, n, T, D)"""
    return x.transpose(1, 2)


# ---- A trace -----------------------------------------------------------------------------------------------


@torch.no_grad()
def trace(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    *,
    only: Iterable[str] | None = None,
    changes: Mapping[str, Change] = MappingProxyType({}),
    **inputs: Any,
) -> "Trace":
    """The values of one pass over ids (B, T), or a list of one row's.

    `only`: names of stages, of a layer's without `layers.N.` ("out", "weights"); what is not asked for takes
    no memory. `changes`: stage -> a function from its value to the one with which to go on. `inputs` are
    other arguments of `forward`; cached keys in `past_key_values` stay as they are. ValueError for a model
    that is in training or no language model of ours, and for a stage that it does not have.
    """
    model = getattr(model, "plain", model)
    if not hasattr(getattr(model, "config", None), "model_type") or not hasattr(model, "generate"):
        told = f"{type(model).__name__} is none: load it with its ForCausalLM class, and uncompiled"
        raise ValueError(f"trace needs one of the six language models, and {told}")
    if model.training:
        raise ValueError("the model is in training, where dropout hides values: call model.eval() first")
    device = next(model.parameters()).device
    ids = torch.as_tensor(ids, device=device)
    ids = ids[None] if ids.dim() == 1 else ids
    f = Formula(model.config, {})
    known = names_of(f)
    wanted = None if only is None else set(only)
    kinds = known | {name.rpartition(".")[2] for name in known}
    if unknown := sorted({*changes} - known) + sorted((wanted or set()) - kinds):
        every = dict.fromkeys(name.rpartition(".")[2] for name in sorted(known, key=place))
        raise ValueError(
            f"there is no stage {unknown[0]!r} in {len(f.layers)} layers of {f.family}: {', '.join(every)}"
        )
    found: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> Tensor:
        if name in changes:
            value = changes[name](value)
        if wanted is None or name in wanted or name.rpartition(".")[2] in wanted:
            found[name] = value
        return value

    inside = {"scores", "weights"}
    with_scores = wanted is None or bool({n.rpartition(".")[2] for n in (*wanted, *changes)} & inside)
    given = {"use_cache": False, **inputs}
    if (past := inputs.get("past_key_values")) is not None:  # a pass appends to a cache that it is given
        given |= {"past_key_values": tuple(past[i] for i in f.layers), "use_cache": True}
    with Taps(model, f, note, with_scores):
        output = model(input_ids=ids, **given)
    if output.loss is not None:
        found["loss"] = output.loss
    found = {name: found[name] for name in sorted(found, key=place)}
    return Trace(model, ids, inputs, found, wanted, dict(changes))


def names_of(f: Formula) -> set[str]:
    """All stages of a pass of this model."""
    lacking = set() if f.head_norms else {"q_normed", "k_normed"}
    lacking |= set() if f.R else {"q_rotated", "k_rotated"}
    lacking |= {"attn_sum"} if f.family == "phi" else set()
    outside = ("embeddings", "norm", "logits")
    inside = [s.name for s in STAGES if s.name not in {*outside, *lacking, "loss", "grad"}]
    return {*outside, *(f"layers.{i}.{name}" for i in f.layers for name in inside)}


class Attribution(NamedTuple):
    """What each part of the model added to one logit at each position: `values[n]` is (B, T), of `names[n]`,
    and they sum to `logits` (B, T). "rounding" is what the pass's dtype left over."""

    names: list[str]
    values: Tensor
    logits: Tensor


class Magnitude(NamedTuple):
    """The largest number of a stage, and where it is."""

    stage: str
    largest: float
    row: int
    position: int  # of a query, in scores
    index: tuple[int, ...]  # the others: head, and key or dimension


class Trace(Mapping):
    """Stage -> value of one pass, in the order of computation. `ids` (B, T) and `inputs` are what it read."""

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        inputs: dict,
        found: dict[str, Tensor],
        wanted: set[str] | None,
        changes: dict[str, Change],
    ):
        self.model, self.ids, self.inputs, self.found = model, ids, inputs, found
        self.wanted, self.changes = wanted, changes
        self.f = Formula(model.config, {})
        self.told: list[Magnitude] = []  # once they are computed

    def __getitem__(self, name: str) -> Tensor:
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def save(self, file: str | Path) -> None:
        """As safetensors, under these names: `compare` reads such files."""
        file = Path(file)
        with switched(file.parent) as new:
            save_file(
                {name: value.clone(memory_format=torch.contiguous_format) for name, value in self.items()},
                new / file.name,
            )

    # Replacing

    def patch(
        self,
        values: Mapping[str, Any] = MappingProxyType({}),
        *,
        positions: Any = None,
        ablate: Iterable[int | tuple[int, int] | str] = (),
        by: str = "zero",
    ) -> "Trace":
        """The pass once more, with other values.

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
        return trace(self.model, self.ids, only=self.wanted, changes=every, **self.inputs)

    def ablated(self, what: Iterable[int | tuple[int, int] | str]) -> Iterator[tuple[str, slice]]:
        """Stage, and which of its last dimension."""
        f = self.f
        for one in [what] if isinstance(what, int | str) else what:
            if isinstance(one, str):
                yield one, slice(None)
                continue
            layer, head = one if isinstance(one, tuple) else (one, 0)
            if layer not in f.layers or not 0 <= head < f.H:
                told = f"layers are 0 to {len(f.layers) - 1}, heads 0 to {f.H - 1}"
                raise ValueError(f"ablate: there is no {one}: {told}")
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

    def read_by(self, layer: int) -> Tensor:
        """(B, H, T, S) weights in float64, 0 for queries of padding."""
        weights = self[f"layers.{layer}.weights"].double()
        mask = self.inputs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return weights
        return weights * (mask[:, -weights.shape[2] :] != 0)[:, None, :, None]

    def heads(self) -> dict[str, Tensor]:
        """Name -> (L, H), means over the queries that see two keys at least: "entropy" of the weights in
        bits, "distance" to what is read in tokens, and the weight on "itself", on the "previous" and on the
        "first" token; "induction", on what followed the same token earlier, NaN where nothing is repeated."""
        found: dict[str, list[Tensor]] = {}
        for layer in self.f.layers:
            w = self.read_by(layer)
            T, S = w.shape[2:]
            q = torch.arange(S - T, S, device=w.device)[:, None]
            far = (q - torch.arange(S, device=w.device)).to(w.dtype)  # (T, S)
            counts = (w > 0).any(1, keepdim=True).sum(-1) > 1  # (B, 1, T)
            each = {
                "entropy": torch.special.entr(w).sum(-1) / math.log(2),
                "distance": (w * far).sum(-1),
                "itself": (w * (far == 0)).sum(-1),
                "previous": (w * (far == 1)).sum(-1),
                "first": w[..., 0],
            }
            for name, value in each.items():
                mean = (value * counts).sum((0, 2)) / counts.sum()
                found.setdefault(name, []).append(mean)
            found.setdefault("induction", []).append(self.induction_of(w))
        return {name: torch.stack(rows) for name, rows in found.items()}

    def induction_of(self, w: Tensor) -> Tensor:
        """(H,) the weight that a token which stood earlier gives to what came after it there."""
        if w.shape[2] != w.shape[3]:
            return w.new_full((w.shape[1],), math.nan)
        same = (self.ids[:, :, None] == self.ids[:, None]).tril(-1)  # (B, T, S)
        after = same.roll(1, -1)
        after[..., 0] = False
        after &= torch.ones_like(after).tril()
        repeats = after.any(-1)
        return ((w * after[:, None]).sum(-1) * repeats[:, None]).sum((0, 2)) / repeats.sum()

    # Logits

    def norm_of(self, x: Tensor) -> Tensor:
        """The final norm of x (..., C)."""
        return self.model.get_submodule(self.f.module("norm"))(x) if "norm" in self.f.parts else x

    @torch.no_grad()
    def lens(self, layer: int) -> Tensor:
        """(B, T, V) logits if the model ended after `layer` layers: the final norm and the output matrix on
        the sum there. 0: the embeddings; L: the logits."""
        name = f"layers.{layer - 1}.out" if layer else "embeddings"
        return self.model.get_submodule(self.f.module("head"))(self.norm_of(self[name]))

    @torch.no_grad()
    def attribution(self, tokens: Tensor | int) -> Attribution:
        """Who wrote the logit of `tokens`, one or (B, T): embeddings, each head, each MLP, the biases.

        A norm divides by a number that depends on all of its input; here it is the one that this pass had, so
        that the rest is linear, and a direction can be followed back from the logit to every sum. Computed in
        float64.
        """
        f, get = self.f, self.model.get_submodule
        tokens = torch.as_tensor(tokens, device=self.ids.device).expand(self.ids.shape)
        head = get(f.module("head"))
        u = matrix_of(head).double()[tokens]  # (B, T, C): how a sum turns into the logit
        constant = self.bias(f.module("head"), None)
        constant = torch.zeros_like(u[..., 0]) if constant is None else constant[tokens]
        parts: dict[str, Tensor] = {}

        def back(module: str, x: Tensor) -> None:
            nonlocal u, constant
            norm = get(module)
            if (bias := self.bias(module, None)) is not None:
                constant = constant + u @ bias
            u = u * norm.weight.double() * scale_of(norm, x.double(), f.eps)[..., None]
            u = u - u.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else u

        if "norm" in f.parts:
            back(f.module("norm"), self[f"layers.{len(f.layers) - 1}.out"])
        for i in reversed(f.layers):
            value = {stage: self[f"layers.{i}.{stage}"].double() for stage in ("heads", "mlp_out", "mlp_in")}
            if f.family == "openai-gpt":
                back(f.module("norm_2", i), value["mlp_in"] + value["mlp_out"])
            parts[f"layers.{i}.mlp_out"] = (u * value["mlp_out"]).sum(-1)
            if f.family == "openai-gpt":
                back(f.module("norm_1", i), self[f"layers.{i}.attn_sum"])
            through = u @ matrix_of(get(f.module("o", i))).double()  # (B, T, H D)
            by_head = (through * value["heads"]).unflatten(-1, (f.H, f.D)).sum(-1)
            for h in range(f.H):
                parts[f"layers.{i}.head {h}"] = by_head[..., h]
            if (bias := self.bias(f.module("o", i), None)) is not None:
                constant = constant + u @ bias
        parts["embeddings"] = (u * self["embeddings"].double()).sum(-1)
        parts["biases"] = constant
        logits = self["logits"].gather(-1, tokens[..., None])[..., 0].double()
        values = torch.stack(list(parts.values()))
        names = [
            "embeddings",
            *(
                name
                for i in f.layers
                for name in (*(f"layers.{i}.head {h}" for h in range(f.H)), f"layers.{i}.mlp_out")
            ),
            "biases",
        ]
        order = [list(parts).index(name) for name in names]
        values = torch.cat([values[order], (logits - values.sum(0))[None]])
        return Attribution([*names, "rounding"], values, logits)

    def bias(self, module: str, missing: Any) -> Any:
        found = getattr(self.model.get_submodule(module), "bias", None)
        return missing if found is None else found.double()

    # Numbers

    def magnitudes(self) -> list[Magnitude]:
        """The largest number of every stage, and of q k^T before it is scaled ("products")."""
        if self.told:
            return self.told
        rows = self.told
        for name, value in self.items():
            if name == "loss":
                continue
            rows.append(largest(name, value))
            if name.endswith(".scores") and self.f.scale != 1:
                row = rows[-1]._replace(stage=name.replace("scores", "products"))
                rows.append(row._replace(largest=row.largest / self.f.scale))
        return rows

    def overflow(self, most: float = torch.finfo(torch.float16).max) -> Magnitude | None:
        """The first number beyond `most`, float16's 65,504; None if it holds them all."""
        return next((row for row in self.magnitudes() if not row.largest <= most), None)

    def safe(self) -> str:
        """In which dtypes all numbers of this pass can be held, as a sentence."""
        row = self.overflow()
        if row is None:
            top = max(self.magnitudes(), key=lambda row: row.largest)
            return f"float16 holds all of it: the largest number is {top.largest:,.4g}, in {top.stage}"
        if not math.isfinite(row.largest):
            return f"{row.stage} is not finite at token {row.position}: it begins there"
        told = f"{row.stage} reaches {row.largest:,.0f} at token {row.position}, and float16 ends at 65,504"
        if row.stage.endswith(".products"):
            return (
                f"{told}: it overflows where scores are computed in float16, as in Transformers 4.50 and "
                "5; here they are float32. bfloat16 and float32 hold it"
            )
        return f"{told}: take bfloat16 or float32"

    def bad(self) -> Magnitude | None:
        """The first stage with NaN or infinity, and where: not the scores that a mask hides."""
        return self.overflow(torch.finfo(torch.float64).max)

    def rotary(self) -> list[dict[str, float]]:
        """For each pair of dimensions that is turned together: the dimensions, the angle from one token to
        the next ("angle", in radians), after how many tokens it is round ("period"), and of longrope the
        factor that it was divided by. Empty where positions are a table."""
        f = self.f
        if not f.R:
            return []
        places = torch.arange(self.ids.shape[1])[None]
        scaling = getattr(f.config, "rope_scaling", None) or {}
        factors = f.factors(scaling, places) if "long_factor" in scaling else [1.0] * (f.R // 2)
        return [
            {
                "first": i,
                "second": i + f.R // 2,
                "angle": angle,
                "period": 2 * math.pi / angle,
                "factor": factors[i],
            }
            for i, angle in enumerate(f.frequencies(places).tolist())
        ]


# ---- Small parts -------------------------------------------------------------------------------------------


def matrix_of(layer: nn.Module) -> Tensor:
    """(out, in), also of Conv1D and of 8 or 4 bits."""
    if isinstance(layer, kernels.Quantized):
        return layer.dequantize()
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


def scale_of(norm: nn.Module, x: Tensor, eps: float) -> Tensor:
    """(B, T) what the norm of x (B, T, C) multiplies with, before its weight."""
    square = x.var(-1, unbiased=False) if isinstance(norm, nn.LayerNorm) else x.square().mean(-1)
    return (square + eps).rsqrt()


def largest(name: str, value: Tensor) -> Magnitude:
    """NaN counts as the largest, but in scores, where it says hidden."""
    x = widened(value).abs()
    x = x.nan_to_num(0.0 if name.endswith("scores") else math.inf, math.inf)
    at = [int(i) for i in torch.unravel_index(x.argmax(), x.shape)]
    found = float(value[tuple(at)].abs())
    if x.dim() == 4:
        return Magnitude(name, found, at[0], at[2], (at[1], at[3]))
    return Magnitude(name, found, at[0], at[1], (at[2],))


def chained(changes: list[Change]) -> Change:
    def change(value: Tensor) -> Tensor:
        for each in changes:
            value = each(value)
        return value

    return change


def replaced(name: str, new: Any, positions: Any) -> Change:
    def change(value: Tensor) -> Tensor:
        other = new(value) if callable(new) else torch.as_tensor(new).to(value)
        try:
            other = other.expand_as(value)
        except RuntimeError:
            told = f"{tuple(value.shape)}, not {tuple(other.shape)}: take a text of the same length"
            raise ValueError(f"{name} has the shape {told}") from None
        if positions is None:
            return other.clone()
        at = (slice(None),) * (2 if value.dim() == 4 else 1) + (positions,)
        value = value.clone()
        value[at] = other[at]
        return value

    return change


def silenced(name: str, columns: slice, by: str) -> Change:
    def change(value: Tensor) -> Tensor:
        value, at = value.clone(), 2 if value.dim() == 4 else 1
        part = value[..., columns]
        value[..., columns] = part.mean(at, keepdim=True) if by == "mean" else 0
        return value

    return change


def induction(model: nn.Module, length: int = 24, seed: int = 0) -> Tensor:
    """(L, H) the weight that a token of a text without sense, read for the second time, gives to what came
    after it the first time. Heads near 1 are those of Olsson et al."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randperm(model.config.vocab_size, generator=draw)[:length]
    found = trace(model, ids.repeat(2), only=["weights"])
    return found.heads()["induction"]

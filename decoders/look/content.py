"""What a page shows of a run and its trace (`found`), as JSON has it: rounded to what can be seen.

Of a large model the largest values are kept, and the page says what was left out. Letters: see `traces.py`.
"""

import base64
import ctypes
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders.compare.formula import STAGES, Formula

from .diagram import plan
from .drawing import drawing
from .source import source
from .words import word

LIKELIEST = 10  # next tokens that are listed; in the lens of a large model fewer
WHOLE = 2**20  # attention weights that a page holds whole; beyond, of each query up to KEPT, the largest
KEPT = 8
STRIP = 32  # parts of a value that are drawn, each by its largest number
MANY = 2**12  # tokens times layers, of which all values are told; beyond, of the last tokens
PARTS = 2**17  # tokens times heads of all layers, whose share of a logit is told; beyond, of whole layers
PER_HEAD = ("q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated")  # (B, n, T, D)


@dataclass
class Run:
    """One text in one model. `ids` (T,) or (1, T), the first `prompt` of them given, the others generated."""

    model: nn.Module
    ids: Any
    tokenizer: Any = None  # None: tokens are shown as their ids
    prompt: int | None = None
    name: str = ""
    title: str = ""  # the prompt as it was typed
    last: int | None = None  # show the last so many tokens only; all are read
    inputs: dict[str, Any] = field(default_factory=dict)  # other arguments of forward
    picture: dict[str, Any] | None = None  # see `seen_picture`
    spelled: dict[int, str] = field(default_factory=dict)  # tokens that are written otherwise than they look


def shown_of(run: Run, found: Any, start: int = 0) -> dict[str, Any]:
    """What the page shows of a run whose trace begins behind `start` tokens, as JSON has it."""
    f, ids, T = found.f, found.ids[0], found.ids.shape[1]
    logits = found["logits"][0].double()
    chances = logits.softmax(-1)
    words = dict(run.spelled)
    following = ids.roll(-1).clone()
    following[-1] = logits[-1].argmax()
    mask = run.inputs.get("attention_mask")
    shown = {
        "name": run.name or type(found.model).__name__,
        "family": f.family,
        "title": titled(run)[:160],
        "class": type(found.model).__name__,
        "dtype": str(found["logits"].dtype).removeprefix("torch."),
        "facts": facts(found),
        "layers": len(f.layers),
        "heads": f.H,
        "ids": ids.tolist(),
        "start": start,
        "prompt": (T + start if run.prompt is None else run.prompt) - start,
        "padding": None if mask is None else (mask[0, -T:] == 0).tolist(),
        "words": words,
        "next": likeliest(chances, words, run.tokenizer),
        "given": given(chances, ids),
        "attention": attention(found),
        "windows": f.windows,
        "head_numbers": {name: rounded(value) for name, value in found.heads().items()},
        "lens": [
            likeliest(
                found.lens(i)[0].float().softmax(-1),
                words,
                run.tokenizer,
                LIKELIEST if T * len(f.layers) <= MANY else 3,
            )
            for i in range(len(f.layers) + 1)
        ],
        "writers": writers(found, following),
        "magnitudes": magnitudes(found),
        "safe": found.safe(),
        "bad": found.safe() if found.bad() else None,
        "values": values(found),
        "rotary": [{name: finite(value) for name, value in row.items()} for row in found.rotary()],
        "stages": {stage.name: [stage.shape, stage.formula] for stage in STAGES},
        "picture": run.picture,
        "diagrams": diagrams(found.model, run.name),
    }
    for id in {*ids.tolist(), *following.tolist()}:
        words.setdefault(id, word(run.tokenizer, id))
    return shown


def titled(run: Run) -> str:
    if run.title or run.tokenizer is None:
        return run.title.strip()
    ids = torch.as_tensor(run.ids).flatten()[: run.prompt].tolist()
    return run.tokenizer.decode(ids, skip_special_tokens=True).strip()


def facts(found: Any) -> list[list[str]]:
    f = found.f
    heads = f"{f.H}" if f.K == f.H else f"{f.H}, sharing {f.K} of keys and values"
    numbers = sum(p.numel() for p in found.model.parameters())
    rows = [
        ("layers", f"{len(f.layers)}"),
        ("width", f"{f.C:,}"),
        ("heads", heads),
        ("head size", f"{f.D}"),
        ("rotated", f"{f.R} of {f.D}" if f.R else "none: positions are a table"),
        ("vocabulary", f"{found['logits'].shape[-1]:,}"),
        ("parameters", f"{numbers:,}"),
    ]
    return [list(row) for row in rows]


def likeliest(chances: Tensor, words: dict[int, str], tokenizer: Any, n: int = LIKELIEST) -> dict[str, list]:
    """Of chances (T, V): ids and chances of the n likeliest at each place, and the entropy in bits."""
    p, ids = chances.nan_to_num(0).topk(min(n, chances.shape[-1]))
    for id in set(ids.flatten().tolist()):
        words.setdefault(id, word(tokenizer, id))
    return {
        "ids": ids.tolist(),
        "p": rounded(p),
        "entropy": rounded(torch.special.entr(chances).sum(-1) / math.log(2)),
    }


def given(chances: Tensor, ids: Tensor) -> dict[str, list]:
    """How likely each token was where it came: of the first nothing is known."""
    p = chances[:-1].gather(-1, ids[1:, None])  # (T - 1, 1)
    rank = (chances[:-1] > p).sum(-1) + 1
    p = p[:, 0]
    return {"p": [None, *rounded(p)], "rank": [None, *rank.tolist()], "bits": [None, *rounded(-p.log2())]}


def attention(found: Any) -> dict[str, Any]:
    """Bytes of sqrt(weight) * 255 (L, H, T, T), whole, or of each query the largest with their keys. What
    goes to keys before the text that is shown is `earlier`."""
    T, L, H = found.ids.shape[1], len(found.f.layers), found.f.H
    layers, earlier = [], []
    for i in found.f.layers:
        w = found[f"layers.{i}.weights"][0].float().nan_to_num(0)  # (H, T, S)
        layers.append(w[..., -T:])
        earlier.append(w[..., : w.shape[-1] - T].sum(-1))
    cut = found["layers.0.scores"].shape[-1] > T
    before = {"earlier": encoded(torch.stack(earlier)) if cut else None}
    if L * H * T * T <= WHOLE:
        return {"kind": "whole", "bytes": encoded(torch.stack(layers)), **before}
    n = min(max(2, 2 * WHOLE // (L * H * T)), KEPT, T)
    kept = [w.topk(n) for w in layers]
    keys = torch.stack([k.indices.to(torch.int16) for k in kept])
    held = torch.stack([k.values for k in kept])
    lost = 1 - held.sum(-1) - torch.stack(earlier)
    return {
        "kind": "largest",
        "kept": n,
        "bytes": encoded(held),
        "keys": as_text(keys),
        "lost": round(lost.clamp(min=0).mean().item(), 4),
        **before,
    }


def encoded(weights: Tensor) -> str:
    """Chances as bytes; of the square root, so that small ones can be told apart."""
    return as_text((weights.clamp(0, 1).sqrt() * 255).round().to(torch.uint8))


def as_text(numbers: Tensor) -> str:
    """Their bytes, as they lie in memory, in base64."""
    numbers = numbers.cpu().contiguous()
    return base64.b64encode(ctypes.string_at(numbers.data_ptr(), numbers.nbytes)).decode()


def writers(found: Any, following: Tensor) -> dict[str, Any]:
    """Who wrote the logit of what follows; at the last place of what is likeliest."""
    shares_of, f = found.attribution(following[None]), found.f
    names, shares = shares_of.names, shares_of.values[:, 0]  # (n, T)
    if shares.numel() > PARTS:
        of = [name.partition(".head ")[0] for name in names]
        names = list(dict.fromkeys(of))
        shares = torch.stack([shares[[one == name for one in of]].sum(0) for name in names])
        names = [f"{name}.heads" if name.count(".") == 1 else name for name in names]
    return {
        "targets": following.tolist(),
        "names": names,
        "logits": rounded(shares_of.logits[0]),
        "values": rounded(shares),
        "by_head": len(names) > 3 + 2 * len(f.layers) or f.H == 1,
    }


def magnitudes(found: Any) -> list[list]:
    return [[row.stage, finite(row.largest), row.position, list(row.index)] for row in found.magnitudes()]


def values(found: Any) -> dict[str, dict]:
    """Of each stage at each token, from `first` on: root mean square, largest number, and some to draw."""
    shown: dict[str, dict] = {}
    T = found.ids.shape[1]
    first = max(0, T - max(1, MANY // len(found.f.layers)))
    for name, value in found.items():
        if name == "loss":
            continue
        stage = name.rpartition(".")[2]
        x = value[0].float()
        if stage in PER_HEAD:
            x = x.transpose(0, 1).flatten(1)  # (T, n D)
        if stage in ("scores", "weights"):
            continue  # the page has the weights
        entry = shown.setdefault(
            stage, {"width": x.shape[-1], "first": first, "rms": [], "largest": [], "where": [], "strips": []}
        )
        x = x[first:]
        top = x.abs().nan_to_num(math.inf, math.inf)
        most = top.amax(-1)
        strip = parted(x / most.clamp(min=1e-30)[:, None]).nan_to_num(0).clamp(-1, 1)
        strip = (strip * 127).round().to(torch.int8)
        entry["rms"].append(rounded(x.square().mean(-1).sqrt()))
        entry["largest"].append(rounded(most))
        entry["where"].append(top.argmax(-1).tolist())
        entry["strips"].append(as_text(strip))
    return shown


def parted(x: Tensor) -> Tensor:
    """(T, n) of x (T, width): the largest number of each of up to STRIP parts, with its sign."""
    n = min(STRIP, x.shape[1])
    size = -(-x.shape[1] // n)
    parts = torch.nn.functional.pad(x, (0, n * size - x.shape[1])).unflatten(1, (n, size))
    return parts.gather(2, parts.abs().argmax(2, keepdim=True))[..., 0]


def diagrams(model: nn.Module, name: str) -> list[dict]:
    """A block for each kind of layer (GPT-Neo has two), with the lines that compute it."""
    f = Formula(model.config, {})
    kinds: dict[Any, int] = {}
    for layer in f.layers:
        kinds.setdefault(f.windows[layer], layer)
    found = []
    for window, layer in kinds.items():
        code = source(model, layer)
        stages = {box.key: [box.stage, box.label] for box in plan(model, layer).boxes}
        found.append(
            {
                "svg": drawing(model, layer, standalone=False, title=name),
                "layer": layer,
                "window": window,
                "file": code.file,
                "lines": code.lines,
                "boxes": code.boxes,
                "stages": stages,
            }
        )
    return found


def finite(x: float) -> float | None:
    """JSON has no NaN; four digits are more than can be seen."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def rounded(x: Tensor) -> list:
    def each(part: Any) -> Any:
        return [each(one) for one in part] if isinstance(part, list) else finite(part)

    return each(x.tolist())

"""A page that shows a model think: one HTML file that needs nothing else, no network, no server.

    python -m decoders look checkpoints/tiny-phi "Once upon a time" -o page.html

    found = look.trace(model, ids)                       # traces.py: every value of a pass, by name
    look.write("page.html", look.page([look.Run(model, ids, tokenizer, prompt=4)]))

`data` turns a trace into what the page shows, rounded to what can be seen; `look.js` and `look.css` show it.
Of a large model the largest values are kept, and the page says what was left out. Letters: see `traces.py`.
"""

import base64
import ctypes
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders.compare.formula import STAGES

from . import diagram
from .traces import Trace, induction, trace

__all__ = ["Run", "Trace", "data", "induction", "page", "trace", "write"]

MOST = 512  # tokens that a page shows
LIKELIEST = 10  # next tokens that are listed; in the lens of a large model fewer
WHOLE = 2**20  # attention weights that a page holds whole; beyond, of each query up to KEPT, the largest
KEPT = 8
STRIP = 32  # parts of a value that are drawn, each by its largest number
MANY = 2**12  # tokens times layers, of which all values are told; beyond, of the last tokens
PARTS = 2**17  # tokens times heads of all layers, whose share of a logit is told; beyond, of whole layers
BESIDE = ("q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated")  # (B, n, T, D)


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


# ---- What the page shows -----------------------------------------------------------------------------------


@torch.no_grad()
def traced(run: Run) -> tuple[Trace, int]:
    """The trace of what is shown, and how many tokens stand before it. ValueError for too many tokens."""
    ids = torch.as_tensor(run.ids).reshape(1, -1).to(next(run.model.parameters()).device)
    T = ids.shape[1]
    if T == 0:
        raise ValueError("the prompt is empty: there is no token to look at")
    start = T - check_length(T, run.last)
    if not start:
        return trace(run.model, ids, **run.inputs), 0
    if run.inputs:  # a picture, a mask: they belong to the whole text
        raise ValueError(f"--last cannot cut a text with {', '.join(run.inputs)}")
    past = None
    for part in ids[:, :start].split(256, 1):  # bounded memory
        past = run.model(
            input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=1
        ).past_key_values
    return trace(run.model, ids[:, start:], past_key_values=past), start


def check_length(T: int, last: int | None) -> int:
    """How many of T tokens are shown. ValueError for more than a page holds."""
    if last is None and T > MOST:
        raise ValueError(
            f"{T:,} tokens, with those to come, are more than the {MOST} of a page: with "
            "--last 256 all are read, and the last 256 are shown"
        )
    if last is not None and not 1 <= last <= MOST:
        raise ValueError(f"--last must be from 1 to {MOST}, not {last}")
    return T if last is None else min(last, T)


def data(run: Run) -> tuple[dict[str, Any], Trace]:
    """What the page shows of a run, as JSON has it."""
    found, start = traced(run)
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
    return shown, found


def titled(run: Run) -> str:
    if run.title or run.tokenizer is None:
        return run.title.strip()
    ids = torch.as_tensor(run.ids).flatten()[: run.prompt].tolist()
    return run.tokenizer.decode(ids, skip_special_tokens=True).strip()


def word(tokenizer: Any, id: int) -> str:
    """How a token is written; without a tokenizer its id. What is no whole character is spelled in bytes."""
    if tokenizer is None:
        return f" {id}"
    content = tokenizer.bytes_of.get(id)
    if content is None:
        return f"[{id}]"
    text = content.decode(errors="backslashreplace").replace("▁", " ")
    if byte := re.fullmatch("<0x([2-7][0-9A-F])>", text):  # a letter without a piece of its own
        return chr(int(byte[1], 16))
    return text.removesuffix("</w>") + " " * text.endswith("</w>")


def facts(found: Trace) -> list[list[str]]:
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


def attention(found: Trace) -> dict[str, Any]:
    """Bytes of sqrt(weight) * 255 (L, H, T, T), whole, or of each query the largest with their keys. What
    goes to keys before the text that is shown is `earlier`."""
    T, L, H = found.ids.shape[1], len(found.f.layers), found.f.H
    layers, earlier = [], []
    for i in found.f.layers:
        w = found[f"layers.{i}.weights"][0].float().nan_to_num(0)  # (H, T, S)
        layers.append(w[..., -T:])
        earlier.append(w[..., : w.shape[-1] - T].sum(-1))
    cut = found["layers.0.scores"].shape[-1] > T
    told = {"earlier": encoded(torch.stack(earlier)) if cut else None}
    if L * H * T * T <= WHOLE:
        return {"kind": "whole", "bytes": encoded(torch.stack(layers)), **told}
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
        **told,
    }


def encoded(weights: Tensor) -> str:
    """Chances as bytes; of the square root, so that small ones can be told apart."""
    return as_text((weights.clamp(0, 1).sqrt() * 255).round().to(torch.uint8))


def as_text(numbers: Tensor) -> str:
    """Their bytes, as they lie in memory, in base64."""
    numbers = numbers.cpu().contiguous()
    return base64.b64encode(ctypes.string_at(numbers.data_ptr(), numbers.nbytes)).decode()


def writers(found: Trace, following: Tensor) -> dict[str, Any]:
    """Who wrote the logit of what follows; at the last place of what is likeliest."""
    told, f = found.attribution(following[None]), found.f
    names, shares = told.names, told.values[:, 0]  # (n, T)
    if shares.numel() > PARTS:
        of = [name.partition(".head ")[0] for name in names]
        names = list(dict.fromkeys(of))
        shares = torch.stack([shares[[one == name for one in of]].sum(0) for name in names])
        names = [f"{name}.heads" if name.count(".") == 1 else name for name in names]
    return {
        "targets": following.tolist(),
        "names": names,
        "logits": rounded(told.logits[0]),
        "values": rounded(shares),
        "by_head": len(names) > 3 + 2 * len(f.layers) or f.H == 1,
    }


def magnitudes(found: Trace) -> list[list]:
    return [[row.stage, finite(row.largest), row.position, list(row.index)] for row in found.magnitudes()]


def values(found: Trace) -> dict[str, dict]:
    """Of each stage at each token, from `first` on: root mean square, largest number, and some to draw."""
    shown: dict[str, dict] = {}
    T = found.ids.shape[1]
    first = max(0, T - max(1, MANY // len(found.f.layers)))
    for name, value in found.items():
        if name == "loss":
            continue
        stage = name.rpartition(".")[2]
        x = value[0].float()
        if stage in BESIDE:
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
    f = diagram.Formula(model.config, {})
    kinds: dict[Any, int] = {}
    for layer in f.layers:
        kinds.setdefault(f.windows[layer], layer)
    found = []
    for window, layer in kinds.items():
        source = diagram.source(model, layer)
        stages = {box.key: [box.stage, box.label] for box in diagram.plan(model, layer).boxes}
        found.append(
            {
                "svg": diagram.drawing(model, layer, standalone=False, title=name),
                "layer": layer,
                "window": window,
                "file": source.file,
                "lines": source.lines,
                "boxes": source.boxes,
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


# ---- Two runs ----------------------------------------------------------------------------------------------


def compared(a: Trace, b: Trace, first: dict, second: dict, alike: bool) -> dict[str, Any]:
    """How two runs differ, at tokens that both have: the same place where the texts are of one length, else
    where they say the same. `alike`: one vocabulary serves both."""
    x, y = ([each["words"][id].strip() for id in each["ids"]] for each in (first, second))
    if len(x) == len(y) and alike:
        pairs = list(zip(range(len(x)), range(len(y)), strict=True))
    else:
        blocks = SequenceMatcher(None, x, y, autojunk=False).get_matching_blocks()
        pairs = [(m.a + i, m.b + i) for m in blocks for i in range(m.size)]
    told: dict[str, Any] = {"pairs": pairs, "remarks": []}
    if not pairs:
        told["remarks"].append("The two texts have no token in common")
        return told
    at, to = (torch.tensor(side) for side in zip(*pairs, strict=True))
    p, q = a["logits"][0, at].double().log_softmax(-1), b["logits"][0, to].double().log_softmax(-1)
    if alike and p.shape == q.shape:
        told["bits"] = rounded((p.exp() * (p - q)).nan_to_num(0).sum(-1) / math.log(2))
    else:
        told["remarks"].append("The models have other vocabularies, so their chances are not compared")
    if alike and (len(a.f.layers), a.f.C) == (len(b.f.layers), b.f.C):
        names = ["embeddings", *(f"layers.{i}.out" for i in a.f.layers)]
        u, v = (torch.stack([t[n][0, i].double() for n in names]) for t, i in ((a, at), (b, to)))
        told["sums"] = rounded((u - v).norm(dim=-1) / u.norm(dim=-1))
    else:
        told["remarks"].append("The models have other sizes or vocabularies, so their sums are not compared")
    if len(x) == len(y) == len(pairs) and (len(a.f.layers), a.f.H) == (len(b.f.layers), b.f.H):
        apart = [
            (a[n] - b[n])[0].abs().double().sum(-1).mean(-1) / 2
            for n in (f"layers.{i}.weights" for i in a.f.layers)
            if a[n].shape == b[n].shape
        ]
        told["heads"] = rounded(torch.stack(apart)) if apart else None
    else:
        told["remarks"].append(
            "The texts have other lengths, or the models other heads, so attention is not subtracted"
        )
    told["writers"] = alike and first["writers"]["names"] == second["writers"]["names"]
    return told


# ---- The page ----------------------------------------------------------------------------------------------


def page(runs: Sequence[Run], title: str = "") -> str:
    """HTML of one run, or of two side by side with their difference."""
    if not 1 <= len(runs) <= 2:
        raise ValueError(f"a page shows one run or two, not {len(runs)}")
    shown = [data(run) for run in runs]
    content: dict[str, Any] = {"runs": [each for each, _ in shown]}
    if len(shown) == 2:
        written = [getattr(run.tokenizer, "bytes_of", None) for run in runs]
        content["compared"] = compared(
            shown[0][1], shown[1][1], shown[0][0], shown[1][0], written[0] == written[1]
        )
    title = title or " and ".join(dict.fromkeys(each["name"] for each in content["runs"]))
    return filled(title, content)


def filled(title: str, content: dict) -> str:
    """The file: text of others stays text, in JSON without `<`, which no HTML parser can take for a tag."""
    here = Path(__file__).parent
    told = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, written in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        told = told.replace(char, written)
    style = (here / "look.css").read_text(encoding="utf-8") + diagram.STYLE
    script = (here / "look.js").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title><style>{style}</style></head>
<body><noscript>This page draws itself: it needs JavaScript, but no network.</noscript>
<script type="application/json" id="data">{told}</script>
<script>{script}</script></body></html>
"""


def write(file: str | Path, text: str) -> Path:
    """All of it or nothing. OSError where no file can be written."""
    file = Path(file)
    descriptor, aside = tempfile.mkstemp(prefix=f".{file.name}-", dir=check_place(file))
    try:
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, file)
    except BaseException:  # Ctrl-C too
        Path(aside).unlink(missing_ok=True)
        raise
    return file


def check_place(file: str | Path) -> Path:
    """The folder of a page that is to be written. OSError before anything is computed."""
    folder = Path(file).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(file).is_dir():
        raise OSError(f"{str(file)!r}: no page can be written there, give a file in a folder that exists")
    return folder


# ---- Pictures ----------------------------------------------------------------------------------------------


def seen_picture(
    processor: Any, picture: Any, ids: Sequence[int], image_token: int, places: Iterable[Any] = ()
) -> dict[str, Any]:
    """A picture as Fuyu saw it, in whole patches, and which token is which patch. `places` are boxes and
    points of the answer, in pixels of `picture`."""
    from PIL import Image

    pixels, height, width, scale = processor.prepared(picture)
    pixels = processor.cropped(pixels, height, width)
    size = processor.patch_size
    image = Image.fromarray(((pixels.permute(1, 2, 0) * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    rows, columns = image.height // size, image.width // size
    tokens = [i for i, id in enumerate(ids) if id == image_token][: rows * columns]
    return {
        "source": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "patch": size,
        "width": image.width,
        "height": image.height,
        "columns": columns,
        "tokens": tokens,
        "places": [[round(float(n) * scale, 1) for n in place] for place in places],
    }

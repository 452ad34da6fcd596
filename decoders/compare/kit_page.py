"""KIT.md: what each tensor of a kit is, for somebody without Python."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .draw import ABOUT, LIMIT
from .formula import STAGES, Formula
from .noise import BEYOND, DTYPES


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
    message = []
    for case, given in cases.items():
        shapes = ", ".join(f"`{name}` {tuple(t.shape)}" for name, t in given.items())
        message.append(f"- `{case}`: {ABOUT[case]}. Given: {shapes}")
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

{chr(10).join(message)}

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


def own_formula(f: Formula, name: str, general: str) -> str:
    special = {
        ("openai-gpt", "attn_in"): "what enters the layer: no norm before attention",
        ("openai-gpt", "attn_sum"): "layer input + attn_out",
        ("openai-gpt", "mlp_in"): "ln_1 of attn_sum",
        ("openai-gpt", "out"): "ln_2 of (mlp_in + mlp_out)",
        ("openai-gpt", "norm"): "the last layer's out: there is no final norm",
        ("phi", "mlp_in"): "the layer's norm of what enters it, as for attention: the two stand side by side",
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
    message = [
        f"scores are q k^T times {f.scale:.6g}" + (" (no division)" if f.scale == 1 else ", 1 / sqrt(D)"),
        f"norms: {norm}, eps {f.eps:g}",
        f"activation: {f.act.__name__}",
    ]
    if f.K < f.H:
        message.append(f"head h reads key/value head h // {f.H // f.K}")
    if any(f.windows):
        kinds = ", ".join("all" if w is None else str(w) for w in f.windows)
        message.append(f"how many keys a token sees, itself counted, layer by layer: {kinds}")
    if "qkv" in f.parts:
        turns = "q_norm" in f.parts
        message.append(
            "rows of the fused matrix: "
            + ("of head 0 q, k, v, then of head 1" if turns else "all of q, then of k, then of v")
        )
    if f.gated:
        message.append("rows of gate_up_proj: all of gate, then all of up")
    if f.R:
        message.append(
            f"rotary: dimensions i and i + {f.R // 2} of the first {f.R} turn by position times "
            "angle i; a cos - b sin, b cos + a sin; the others pass"
        )
        for what, length in (
            (("", 1),)
            if not getattr(f.config, "rope_scaling", None)
            else ((f" up to {LIMIT} tokens", 1), (" beyond", LIMIT + 1))
        ):
            angles = f.inv_freq(torch.tensor([[length - 1]])).tolist()
            message.append(f"angles{what}: {', '.join(f'{a:.6g}' for a in angles)}")
        if f.attention_factor() != 1:
            message.append(f"cos and sin are multiplied by {f.attention_factor():.9g}")
    if f.qk_layernorm:
        message.append("q and k of each head are normed before they turn")
    return message

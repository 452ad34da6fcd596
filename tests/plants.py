"""How to make each mistake of `decoders/compare/mistakes.py` in our own six files: as an edit of the source, of the
config or of the weights. A mistake in the formula and the same mistake in a model file are written apart: where
`compare` names one by the other, it has understood what a stranger did."""

import importlib
import itertools
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from decoders.compare import mistakes
from decoders.compare.formula import Formula
from decoders.formats.config import FAMILIES

ROOT = Path(__file__).parents[1] / "decoders"
numbers = itertools.count()

# ---- Edits -------------------------------------------------------------------------------------------------


class Plant:
    """`source`: (pattern, replacement) pairs, all of which must be found; `behind`: text added to the file's end."""

    def __init__(
        self,
        *source: tuple[str, str],
        behind: str = "",
        config: Callable | None = None,
        state: Callable | None = None,
        not_in: str = "",
        only_in: str = "",
    ):
        self.source, self.behind, self.config, self.state = source, behind, config, state
        self.not_in, self.only_in = not_in.split(), only_in.split()

    def fits(self, family: str) -> bool:
        return family not in self.not_in and (not self.only_in or family in self.only_in)


def act(expression: str) -> Plant:
    return Plant((r"self\.act = .*", f"self.act = {expression}"))


def scale(expression: str) -> Plant:
    return Plant((r"attn_mask, (self\.head_dim\*\*-0\.5|1\.0), dropout", f"attn_mask, {expression}, dropout"))


MASKED = (r"if mask is None and not need_weights\b", "if False")
SPELLED = (
    MASKED,
    (r"if not need_weights and attn_mask is None", "if False and attn_mask is None"),
    (r"if not need_weights:", "if False:"),
)


def norm(body: str) -> str:
    """A LayerNorm with another forward; put in the place of nn.LayerNorm."""
    return f"\n\nclass WrongNorm(nn.LayerNorm):\n    def forward(self, x):\n        w, b, eps = self.weight, self.bias, self.eps\n        {body}\n"


LAYER_NORM = (r"nn\.LayerNorm\(", "WrongNorm(")


def rms(expression: str) -> tuple[str, str]:
    return (
        r"self\.weight \* F\.rms_norm\(upcast\(x\), x\.shape\[-1:\], eps=self\.eps\)\.to\(x\.dtype\)",
        expression,
    )


def fields(**values) -> Callable:
    def change(d: dict) -> dict:
        inner = {"text_config": {**d["text_config"], **values}} if d.get("text_config") else {}
        return {**d, **values, **inner}

    return change


def layers_of(d: dict) -> list[str]:
    return [kind for kinds, n in d["attention_types"] for kind in kinds * n]


def kinds_of(layers: list[str]) -> dict:
    return {"attention_types": [[layers, 1]], "attention_layers": layers}


def kinds(change: Callable) -> Plant:
    return Plant(config=lambda d: fields(**kinds_of(change(layers_of(d))))(d))


def rotated(d: dict) -> int:
    return int(d["partial_rotary_factor"] * d["hidden_size"] // d["num_attention_heads"])


def eps_of(value: float) -> Plant:
    return Plant(
        config=lambda d: fields(
            **{
                next(
                    (k for k in ("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon") if k in d),
                    EPS[d["model_type"]],
                ): value
            }
        )(d)
    )


EPS = {
    "gpt_neo": "layer_norm_epsilon",
    "openai-gpt": "layer_norm_epsilon",
    "phi": "layer_norm_eps",
    "phi3": "rms_norm_eps",
    "persimmon": "layer_norm_eps",
    "fuyu": "layer_norm_eps",
}


def tensors(change: Callable) -> Plant:
    """`change(part, tensor, f)` for each weight, where `part` is its name in `formula.PARTS` with .weight or .bias."""

    def edit(state: dict, f: Formula) -> dict:
        known = {f"{f.parts['layers']}.{i}.{name}": part for i in f.layers for part, name in f.parts.items()}
        known |= {
            f.parts[part]: part
            for part in ("embedding", "position_embedding", "norm", "head", "patches")
            if part in f.parts
        }
        found = {}
        for name, t in state.items():
            module, _, kind = name.rpartition(".")
            found[name] = change(f"{known.get(module, '')}.{kind}", t, f)
        return found

    return Plant(state=edit)


def exchanged(first: str, second: str) -> Plant:
    def edit(state: dict, f: Formula) -> dict:
        a, b = f.parts[first], f.parts[second]
        return {
            name.replace(a, "#").replace(b, a).replace("#", b) if a in name or b in name else name: t
            for name, t in state.items()
        }

    return Plant(state=edit)


def zero(name: str) -> Plant:
    return tensors(lambda part, t, f: t * 0 if part == f"{name}.bias" else t)


def turned(name: str) -> Plant:
    return tensors(
        lambda part, t, f: t.t().contiguous() if part == f"{name}.weight" and t.shape[0] == t.shape[1] else t
    )


def norms(change: Callable) -> Plant:
    return tensors(lambda part, t, f: change(part, t) if "norm" in part else t)


def rows(order: Callable) -> Plant:
    """Rows of a joint matrix (columns in GPT-1's files) in another order."""

    def change(part: str, t: torch.Tensor, f: Formula) -> torch.Tensor:
        if not part.startswith("qkv"):
            return t
        index = order(f)
        return t[:, index] if f.family == "openai-gpt" and t.dim() == 2 else t[index]

    return tensors(change)


def head_by_head(f: Formula) -> torch.Tensor:
    if f.K == f.H:
        return torch.arange(3 * f.H * f.D).view(f.H, 3, f.D).transpose(0, 1).flatten()
    groups = torch.arange((f.H + 2 * f.K) * f.D).view(f.K, f.H // f.K + 2, f.D)
    return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])


def thirds(f: Formula) -> torch.Tensor:
    return torch.arange(3 * f.H * f.D).view(3, f.H, f.D).transpose(0, 1).flatten()


def every_nth(part: str, t: torch.Tensor, f: Formula) -> torch.Tensor:
    """A head of every H-th row."""

    def order(n: int, start: int = 0) -> torch.Tensor:
        return torch.arange(n * f.D).view(f.D, n).t().flatten() + start

    kind = part.split(".")[0]
    if kind in ("q", "k", "v"):
        return t[order(f.H if kind == "q" else f.K)]
    if kind != "qkv":
        return t
    index = torch.cat([order(f.H), order(f.K, f.H * f.D), order(f.K, (f.H + f.K) * f.D)])
    return t[:, index] if f.family == "openai-gpt" and t.dim() == 2 else t[index]


def first_weights(state: dict, f: Formula) -> dict:
    at = f.parts["layers"]
    return {name: state[re.sub(rf"{re.escape(at)}\.\d+\.", f"{at}.0.", name)] for name in state}


def rotation(body: str) -> str:
    attention = "next(c for name, c in list(globals().items()) if name.endswith('Attention'))"
    return f"\n\ndef rotate(x, cos, sin):\n    R = cos.shape[-1]\n    {body}\n\n\n{attention}.rotate = staticmethod(rotate)\n"


PLACES = r"if position_ids is None:\n            (position_ids = torch\.arange\(past, past \+ T, device=x\.device\))"
BLOCK = r"x = x \+ (?:self\.resid_attn_dropout\(y\)|y)  # into.*\n        return x \+ (self\.\w+\(?.*)self\.(ln_2|post_attention_layernorm)\(x\)(.*), weights"
LOSS = r"F\.cross_entropy\(upcast\(logits\[:, :-1\]\)\.flatten\(0, 1\), labels\[:, 1:\]\.flatten\(\)"

# ---- One for each mistake ----------------------------------------------------------------------------------

FUNCTIONS = {
    "the tanh approximation of GELU": 'partial(F.gelu, approximate="tanh")',
    "GELU with the exact erf": "F.gelu",
    "GELU as x sigmoid(1.702 x)": "lambda x: x * torch.sigmoid(1.702 * x)",
    "SiLU": "F.silu",
    "ReLU": "F.relu",
    "squared ReLU": "lambda x: F.relu(x).square()",
}
OWN = {
    "gpt_neo": "the tanh approximation of GELU",
    "openai-gpt": "the tanh approximation of GELU",
    "phi": "the tanh approximation of GELU",
    "phi3": "SiLU",
    "persimmon": "squared ReLU",
    "fuyu": "squared ReLU",
}

PLANTS: dict[str, Plant] = {
    f"activation: {name} where this model has {own}": act(expression)
    for name, expression in FUNCTIONS.items()
    for own in set(OWN.values())
    if own != name
}
PLANTS |= {
    "activation: none": act("lambda x: x"),
    "attention: scores divided by sqrt(D), which GPT-Neo does not": scale("q.shape[-1]**-0.5"),
    "attention: scores not divided by sqrt(D)": scale("1.0"),
    "attention: scores divided by D, not by its root": scale("1 / q.shape[-1]"),
    "attention: scores divided by the root of the width C": scale("(q.shape[1] * q.shape[-1])**-0.5"),
    "attention: a token sees the one after it": Plant(MASKED, (r"\.tril\(S - T\)", ".tril(S - T + 1)")),
    "attention: no causal mask": Plant(MASKED, (r"\.tril\(S - T\)", "")),
    "attention: with a cache, the mask is aligned at the top left": Plant(
        MASKED, (r"\.tril\(S - T\)", ".tril()"), not_in="gpt_neo phi3"),
    "attention: hidden scores are set to 0": Plant(
        *SPELLED, (r"scores if attn_mask is None else scores \+ attn_mask\b", "scores.masked_fill(attn_mask < 0, 0.0)")),
    "attention: hidden weights are set to 0 behind the softmax": Plant(
        *SPELLED, (r"scores if attn_mask is None else scores \+ attn_mask\b", "scores"), (r"scores\.softmax\(-1\)", "scores.softmax(-1) * (attn_mask == 0)")),
    "attention: softmax over the queries": Plant(*SPELLED, (r"\.softmax\(-1\), dropout\)", ".softmax(2).nan_to_num(), dropout)")),
    "attention: padding is not hidden": Plant((r"\(mask != 0\)\[:, None, None\]", "(mask > -1)[:, None, None]")),
    "attention: a row of padding sees nothing and is NaN, which reaches the others as 0 times NaN": Plant(
        (r"visible = visible \| \(itself.*", "pass"), *SPELLED),
    "attention: attention_mask inverted (1 hides)": Plant((r"\(mask != 0\)\[:, None, None\]", "(mask == 0)[:, None, None]")),
    "attention: the window counts one token too many": Plant(config=lambda d: fields(
        **{k: d[k] + 1 for k in ("window_size", "sliding_window") if d.get(k)})(d)),
    "attention: the window counts one token too few": Plant(config=lambda d: fields(
        **{k: d[k] - 1 for k in ("window_size", "sliding_window") if d.get(k)})(d)),
    "attention: no window": Plant(config=lambda d: fields(sliding_window=None, window_size=90)(d)),
    "attention: every layer is local": kinds(lambda old: ["local"] * len(old)),
    "attention: global and local layers swapped": kinds(lambda old: [{"global": "local", "local": "global"}[k] for k in old]),
    "attention: q and k swapped": Plant((r"q, k, v = (\(\n|self\.query|q\.transpose)", r"k, q, v = \1")),
    "attention: k and v swapped": Plant((r"q, k, v = (\(\n|self\.query|q\.transpose)", r"q, v, k = \1"), not_in="phi"),
    "attention: the joint matrix cut head by head": rows(head_by_head),
    "attention: the joint matrix cut into thirds": rows(thirds),
    "attention: a head takes every H-th dimension": Plant(state=tensors(every_nth).state, not_in="persimmon fuyu"),
    "attention: heads joined without swapping H and T back": Plant(
        (r"y\.transpose\(1, 2\)\.(reshape\(B, T, C\)|flatten\(2\))", "y.reshape(len(y), y.shape[2], -1)")),
    "attention: the output matrix is transposed": turned("o"),
    "attention: the matrix of q is transposed": turned("q"),
    "attention: the matrix of k is transposed": turned("k"),
    "attention: the matrix of v is transposed": turned("v"),
    "attention: key/value heads taken in turns": Plant((r"repeat_interleave\(groups, dim=1\)", "repeat(1, groups, 1, 1)")),
    "attention: all heads read the first key/value head": Plant(
        (r"(\w)\.repeat_interleave\(groups, dim=1\)", r"\1[:, :1].expand(-1, q.shape[1], -1, -1)")),
    "attention: q and k without their norms": Plant(config=fields(qk_layernorm=False)),
    "attention: q's norm on k and k's on q": exchanged("q_norm", "k_norm"),
    "attention: q normed, k not": Plant((r"self\.k_layernorm\(k\)", "k")),
    "attention: heads normed after the rotation": Plant(
        (r"self\.q_layernorm\(q\), self\.k_layernorm\(k\)", "q, k"),
        (r"self\.rotate\(q, \*cos_sin\), self\.rotate\(k, \*cos_sin\)", "self.q_layernorm(self.rotate(q, *cos_sin)), self.k_layernorm(self.rotate(k, *cos_sin))")),
    "bias of q missing": zero("q"), "bias of v missing": zero("v"), "bias of q, k and v missing": zero("qkv"),
    "bias of attention's output missing": zero("o"), "bias of the MLP's first product missing": zero("up"),
    "bias of the MLP's last product missing": zero("down"), "bias of the logits missing": zero("head"),
    "bias of the picture's projection missing": zero("patches"),
    **{f"norm: epsilon {eps:g}": eps_of(eps) for eps in (1e-3, 1e-4, 1e-6, 1e-12)},
    "norm: variance divided by n - 1": Plant(LAYER_NORM, behind=norm("return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * w + b")),
    "norm: no mean subtracted (RMSNorm)": Plant(LAYER_NORM, behind=norm("return F.rms_norm(x, x.shape[-1:], w, eps) + b")),
    "norm: mean subtracted (LayerNorm)": Plant(rms("self.weight * F.layer_norm(upcast(x), x.shape[-1:], eps=self.eps).to(x.dtype)")),
    "norm: sum of squares, not their mean": Plant(rms("self.weight * x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt()")),
    "norm: weights left out": norms(lambda part, t: torch.ones_like(t) if part.endswith("weight") else t),
    "norm: weights counted from one (1 + weight, as in Gemma)": norms(lambda part, t: t + 1 if part.endswith("weight") else t),
    "norm: biases left out": norms(lambda part, t: t * 0 if part.endswith("bias") else t),
    "norm: a layer's two norms swapped": exchanged("norm_1", "norm_2"),
    "norm: none before the logits": Plant((r"x = self\.(final_layernorm|ln_f|norm)\(x\)", "x = x")),
    "norm: one before the logits": Plant((r"self\.lm_head\(x\[:, kept\]\)", "self.lm_head(F.layer_norm(x[:, kept], x.shape[-1:], eps=1e-5))")),
    "layer: attention first, the MLP on its sum": Plant(
        (r"return self\.resid_dropout\(y\) \+ self\.resid_dropout\(self\.mlp\(n\)\) \+ x, weights",
         "x = x + y\n        return x + self.mlp(self.input_layernorm(x)), weights")),
    "layer: attention and MLP side by side": Plant((BLOCK, r"return x + y + \1self.\2(x)\3, weights")),
    "layer: norms before attention and MLP (GPT-2)": Plant(
        (r"self\.attn\(x, \*attention_inputs\)\n        x = self\.ln_1\(x \+ y\)  # post-norm.*\n        return self\.ln_2\(x \+ self\.mlp\(x\)\), weights",
         "self.attn(self.ln_1(x), *attention_inputs)\n        x = x + y\n        return x + self.mlp(self.ln_2(x)), weights")),
    "layer: attention's input is not added": Plant((r"x = x \+ (y|self\.resid_attn_dropout\(y\))  # into.*\n|x \+ y\)  # post|self\.mlp\(n\)\) \+ x, weights", lambda m: {"x = x": "x = y\n", "x + y)": "y)  # post"}.get(m[0][:5] if m[0].startswith("x = x") else m[0][:6], "self.mlp(n)), weights"))),
    "layer: the last one is missing": Plant(config=lambda d: fields(
        **{k: d[k] - 1 for k in ("num_hidden_layers", "num_layers", "n_layer") if k in d},
        **(kinds_of(layers_of(d)[:-1]) if "attention_types" in d else {}))(d)),
    "layer: all have the first one's weights": Plant(state=first_weights),
    "MLP: gate and up swapped": tensors(lambda part, t, f: torch.cat(t.chunk(2)[::-1]) if part == "up.weight" else t),
    "MLP: gate and up taken in turns": tensors(lambda part, t, f: torch.cat([t[::2], t[1::2]]) if part == "up.weight" else t),
    "MLP: the activation is behind the product of gate and up": Plant((r"up \* self\.act\(gate\)", "self.act(up * gate)")),
    "embeddings multiplied by sqrt(C)": Plant(
        (r"(embed\(self\.(embed_tokens|wte|tokens_embed|language_model\.model\.embed_tokens), input_ids, \w+\))", r"\1 * self.ROOT"),
        behind="\n\nPreTrainedModel.ROOT = property(lambda self: vars(getattr(self.config, 'text_config', self.config)).get('hidden_size', getattr(self.config, 'n_embd', 0))**0.5)\n",
        not_in="gpt_neo openai-gpt fuyu"),
    "position_ids are not read": Plant((PLACES, r"if True:\n            \1")),
    "positions begin anew with a cache": Plant((r"torch\.arange\(past, past \+ T", "torch.arange(0, T")),
    "positions start at one": Plant((f"({PLACES})", r"\1\n        position_ids = (position_ids + 1) % 97"), only_in="gpt_neo openai-gpt"),
    "positions start at two (OPT)": Plant((f"({PLACES})", r"\1\n        position_ids = (position_ids + 2) % 97")),
    "positions are not added": tensors(lambda part, t, f: t * 0 if part == "position_embedding.weight" else t),
    "token_type_ids are not read": Plant((r"x if token_type_ids is None else x \+ self\.\w+\(token_type_ids\)", "x")),
    "token_type_ids go through the position table": Plant(
        (r"x \+ self\.(wte|tokens_embed)\(token_type_ids\)", lambda m: f"x + self.{'wpe' if m[1] == 'wte' else 'positions_embed'}(token_type_ids)")),
    "logits: the token table is the output matrix": Plant(state=lambda state, f: {
        **state, f"{f.parts['head']}.weight": state[f"{f.parts['embedding']}.weight"]}),
    "rotary: neighbours paired (GPT-J) instead of halves": Plant(behind=rotation(
        "a, b = x[..., :R:2], x[..., 1:R:2]\n    c, s = cos[..., : R // 2], sin[..., : R // 2]\n    return torch.cat([torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2), x[..., R:]], -1)")),
    "rotary: tables of neighbours, rotation of halves": Plant((r"torch\.cat\(\[angles, angles\], dim=-1\)", "angles.repeat_interleave(2, -1)")),
    "rotary: turned the other way": Plant((r"torch\.cat\(\[-second, first\], dim=-1\)", "torch.cat([second, -first], dim=-1)")),
    "rotary: only q is turned": Plant((r"self\.rotate\(k, \*cos_sin\)", "k")),
    "rotary: only k is turned": Plant((r"self\.rotate\(q, \*cos_sin\)", "q")),
    "rotary: v is turned too": Plant((r"(q, k = self\.rotate\(q, \*cos_sin\), self\.rotate\(k, \*cos_sin\).*)", r"\1\n        v = self.rotate(v, *cos_sin)")),
    "rotary: the last dimensions of a head are turned": Plant(behind=rotation(
        "n = x.shape[-1] - R\n    x_rot = x[..., n:]\n    first, second = x_rot.chunk(2, -1)\n    return torch.cat([x[..., :n], x_rot * cos + torch.cat([-second, first], -1) * sin], -1)")),
    "rotary: all dimensions of a head are turned": Plant(config=fields(partial_rotary_factor=1.0)),
    "rotary: one pair of dimensions too few": Plant(config=lambda d: fields(partial_rotary_factor=(rotated(d) - 1.5) / 12)(d)),
    "rotary: frequencies of the whole head (exponents over D)": Plant((r"\.to\(compute_dtype\) / R\b", ".to(compute_dtype) / 12")),
    "rotary: exponents i / R, not 2 i / R": Plant((r"torch\.arange\(0, R, 2, device=x\.device\)", "torch.arange(0, R // 2, device=x.device)")),
    **{f"rotary: base {base}": Plant(config=fields(rope_theta=float(base))) for base in (10000, 25000, 500000, 1000000)},
    "longrope: short factors beyond the limit": Plant((r"return lengths > self\.original", "return lengths > 10**9 + self.original")),
    "longrope: long factors below the limit": Plant((r"return lengths > self\.original", "return lengths > 0 * self.original")),
    "longrope: long factors at the limit already": Plant((r"if not same_rope\(cache, expected, rope\):.*", "if False:"), (r"return lengths > self\.original", "return lengths >= self.original")),
    "longrope: long factors one token too late": Plant((r"return lengths > self\.original", "return lengths - 1 > self.original")),
    "longrope: no factors": Plant((r"torch\.where\(long\[:, None, None, None\], long_factor, short_factor\) \* powers", "powers")),
    "longrope: frequencies multiplied by the factors": Plant((r"long_factor, short_factor\) \* powers", "1 / long_factor, 1 / short_factor) * powers")),
    "longrope: cos and sin not scaled": Plant((r"scale = config\.attention_factor", "scale = 1.0")),
    "longrope: scores scaled once, not q and k both": Plant((r"scale = config\.attention_factor", "scale = config.attention_factor**0.5")),
    "longrope: cos and sin scaled as YaRN does": Plant(
        (r"scale = config\.attention_factor", "scale = 1 + 0.1 * math.log(config.max_position_embeddings / config.original_max_position_embeddings)")),
    "pictures: patches one place late": Plant((r"(indices = F\.pad\(indices.*)", r"\1.roll(1, 1)")),
    "pictures: patches one place early": Plant((r"(indices = F\.pad\(indices.*)", r"\1.roll(-1, 1)")),
    "pictures: patches in reversed order": Plant((r"self\.vision_embed_tokens\(patches\)\[order\]", "self.vision_embed_tokens(patches).flip(0)[order]")),
    "pictures: a patch has its channels first": Plant(
        (r"self\.vision_embed_tokens\(patches\)", "self.vision_embed_tokens(patches.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2))")),
    "pictures: added to the words in their place": Plant((r"\[order\]\.to\(x\.dtype\)", "[order].to(x.dtype) + x")),
    "pictures: left out": Plant((r"if not len\(patches\):", "if True:")),
    "loss: labels are not shifted": Plant((LOSS, "F.cross_entropy(upcast(logits).flatten(0, 1), labels.flatten()"), not_in="persimmon fuyu"),
    "loss: shifted twice": Plant((LOSS, "F.cross_entropy(upcast(logits[:, :-2]).flatten(0, 1), labels[:, 2:].flatten()"), not_in="persimmon fuyu"),
    "loss: summed, not averaged": Plant((rf"({LOSS})", r'\1, reduction="sum"'), not_in="persimmon fuyu"),
    "loss: labels of -100 count in the mean": Plant((rf"({LOSS})\)", r'\1, reduction="sum") / labels[:, 1:].numel()'), not_in="persimmon fuyu"),
    "half precision: rotary angles are computed in it": Plant((r"(\.to\(compute_dtype\) \* (inv_freq))", r".to(x.dtype) * \2.to(x.dtype)")),
    "half precision: the norm is rounded after its weight": Plant(
        rms("(self.weight * F.rms_norm(upcast(x), x.shape[-1:], eps=self.eps)).to(x.dtype)")),
}  # fmt: skip


def fitting(family: str) -> list[mistakes.Mistake]:
    """The mistakes that can be made in this family's file."""
    return [m for m in mistakes.of(family) if m.name in PLANTS and PLANTS[m.name].fits(family)]


def planted(family: str, config: dict, weights: dict, *names: str) -> nn.Module:
    """Our model with these mistakes, in float32."""
    file, class_name = FAMILIES[family]
    text = (ROOT / f"{file}.py").read_text()
    for name in names:
        plant = PLANTS[name]
        for pattern, replacement in plant.source:
            text, n = re.subn(pattern, replacement, text)
            if not n:
                raise LookupError(f"{name}: nothing in {file}.py matches {pattern}")
        text += plant.behind
        config = plant.config(config) if plant.config else config
    module = types.ModuleType(f"planted_{next(numbers)}")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(text, module.__name__, "exec"), module.__dict__)
    real = importlib.import_module(f"decoders.{file}")
    right = getattr(real, class_name).config_class.from_dict(config)
    f = Formula(right, {})
    for name in names:
        if PLANTS[name].state:
            weights = PLANTS[name].state(weights, f)
    model_class = getattr(module, class_name)
    model = model_class(model_class.config_class.from_dict(config)).eval()
    own = model.state_dict()
    missing, _ = model.load_state_dict({name: t for name, t in weights.items() if name in own}, strict=False)
    assert {*missing} <= {"lm_head.weight"} and (not missing or model.config.tie_word_embeddings), missing
    del sys.modules[module.__name__]
    return model


assert all(name in {m.name for m in mistakes.MISTAKES} for name in PLANTS), sorted(
    PLANTS.keys() - {m.name for m in mistakes.MISTAKES}
)

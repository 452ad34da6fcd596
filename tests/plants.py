"""How to make each mistake of `decoders/compare/mistakes/` in our own six models: as another function or attribute of a
model that is built from the real file, as another field of the config, or as other weights. No line of a file is
quoted, so that lines may be rewritten. A mistake in the formula and the same mistake in a model are written apart: where
`compare` names one by the other, it has understood what a stranger did."""

import importlib
import inspect
import itertools
import math
import re
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from decoders.compare import mistakes
from decoders.compare.formula import Formula
from decoders.formats.config import FAMILIES

ROOT = Path(mistakes.__file__).parents[2]
numbers = itertools.count()

# ---- What is changed ---------------------------------------------------------------------------------------


class Plant:
    """`module(module)` changes functions of the file, `config(dict)` fields, `state(weights, f)` weights, and
    `model(model, f)` the model that is built of them. Two plants of one `key` would undo each other."""

    def __init__(
        self,
        model: Callable | None = None,
        *,
        module: Callable | None = None,
        config: Callable | None = None,
        state: Callable | None = None,
        key: str = "",
        not_in: str = "",
        only_in: str = "",
    ):
        self.model, self.module, self.config, self.state = model, module, config, state
        self.key, self.not_in, self.only_in = key, not_in.split(), only_in.split()

    def fits(self, family: str) -> bool:
        return family not in self.not_in and (not self.only_in or family in self.only_in)


def wrapped(name: str, change: Callable, key: str = "") -> Plant:
    """`change(own, module, f)` gives another `name`, an attribute of every module that has one."""

    def plant(model: nn.Module, f: Formula) -> None:
        found = [m for m in model.modules() if hasattr(m, name)]
        assert found, name
        for m in found:
            setattr(m, name, change(getattr(m, name), m, f))

    return Plant(plant, key=key or name)


def act(function: Callable) -> Plant:
    return wrapped("act", lambda own, m, f: function)


def scale(number: Callable) -> Plant:
    """Scores multiplied by `number(q)`, q (B, H, T, D)."""
    return wrapped(
        "attend",
        lambda own, m, f: lambda q, k, v, attn_mask, scale, *rest: own(q, k, v, attn_mask, number(q), *rest),
    )


# The mask


def mask_functions(module: types.ModuleType) -> list[str]:
    """Of a model file: what makes the mask for the scores."""
    wanted = {"T", "S", "mask", "need_weights"}
    return [
        name
        for name, one in vars(module).items()
        if inspect.isfunction(one) and wanted <= inspect.signature(one).parameters.keys()
    ]


def masks(change: Callable, key: str = "mask", **how: str) -> Plant:
    """`change(own, arguments)` in the place of a mask function, which always makes a mask then."""

    def plant(module: types.ModuleType) -> None:
        names = mask_functions(module)
        assert names
        for name in names:
            own = getattr(module, name)

            def wrong(*args, own=own):
                given = inspect.signature(own).bind(*args).arguments
                return change(lambda: own(**given), given)

            setattr(module, name, wrong)

    return Plant(module=plant, key=key, **how)


def always(own: Callable, given: dict) -> torch.Tensor:
    given["need_weights"] = True
    return own()


def tril(diagonal: Callable | None, **how: str) -> Plant:
    """Another diagonal where the mask is cut, S - T in the file; None: no cut."""
    right = torch.Tensor.tril

    def wrong(x: torch.Tensor, at: int = 0) -> torch.Tensor:
        return x if diagonal is None else right(x, diagonal(at))

    def change(own: Callable, given: dict) -> torch.Tensor:
        with mock.patch.object(torch.Tensor, "tril", wrong):
            return always(own, given)

    return masks(change, key="causal", **how)


def padding(change: Callable) -> Plant:
    """Another attention_mask."""

    def other(own: Callable, given: dict) -> torch.Tensor | None:
        given["mask"] = None if given["mask"] is None else change(given["mask"])
        return own()

    return masks(other)


def blind_padding(own: Callable, given: dict) -> torch.Tensor:
    mask, allowed = given["mask"], always(own, given)
    return allowed if mask is None else allowed.masked_fill((mask == 0)[:, None, None], -math.inf)


def spelled(weights: Callable, change: Callable = always) -> Plant:
    """Attention by the formula, with other `weights(scores, attn_mask)`, both (B, H, T, S)."""

    def attend(q, k, v, attn_mask, scale, dropout=0.0, need_weights=False, head_mask=None):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        w = weights(q @ k.transpose(2, 3) * scale, attn_mask)
        return w @ v, w

    plant = wrapped("attend", lambda own, m, f: attend)
    plant.module = masks(change).module
    return plant


# q, k, v and heads


def swapped(a: int, b: int) -> Plant:
    """Two of q, k and v for each other: of three matrices, or in the product of the fused one."""

    def exchange(parts) -> list:
        parts = list(parts)
        parts[a], parts[b] = parts[b], parts[a]
        return parts

    def plant(model: nn.Module, f: Formula) -> None:
        if "qkv" not in f.parts:
            for m in [m for m in model.modules() if hasattr(m, "qkv")]:
                m.qkv = lambda x, own=m.qkv: exchange(own(x))
            return
        for layer in f.layers:
            fused = model.get_submodule(f.module("qkv", layer))
            fused.register_forward_hook(lambda m, args, output: fuse(f, exchange(f.split_qkv(output))))

    return Plant(plant, key="qkv")


def fuse(f: Formula, parts: list) -> torch.Tensor:
    """q, k and v, (B, T, n D) each, as their fused matrix gives them."""
    if "q_norm" not in f.parts:
        return torch.cat(parts, -1)
    return torch.stack([part.unflatten(-1, (f.H, f.D)) for part in parts], 3).flatten(2)


def into(part: str, change: Callable) -> Plant:
    """Another input of a module of each layer: `change(x, f)`."""

    def plant(model: nn.Module, f: Formula) -> None:
        for layer in f.layers:
            module = model.get_submodule(f.module(part, layer))
            module.register_forward_pre_hook(lambda m, args: (change(args[0], f), *args[1:]))

    return Plant(plant, key=f"into {part}")


def key_value_heads(change: Callable) -> Plant:
    """Other heads of k and v, `change(x, H)`, as many as q has."""

    def wrong(own: Callable, m: nn.Module, f: Formula) -> Callable:
        def attend(q, k, v, *rest):
            return own(q, change(k, q.shape[1]), change(v, q.shape[1]), *rest)

        return attend

    plant = wrapped("attend", wrong)
    plant.key = "heads of k and v"
    return plant


# Norms and layers


def norm(function: Callable, kind: type | str = nn.LayerNorm) -> Plant:
    """`function(norm, x)` in the place of every norm of a kind."""

    def plant(model: nn.Module, f: Formula) -> None:
        for m in model.modules():
            if type(m).__name__ == (kind if isinstance(kind, str) else kind.__name__):
                m.forward = partial(function, m)

    return Plant(plant, key="norm")


def without_mean(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], m.weight, m.eps) + m.bias


def sample_variance(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + m.eps).sqrt() * m.weight + m.bias


def with_mean(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.weight * F.layer_norm(x, x.shape[-1:], eps=m.eps)


def sum_of_squares(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.weight * x * (x.square().sum(-1, keepdim=True) + m.eps).rsqrt()


def rounded_last(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (m.weight * F.rms_norm(wide, x.shape[-1:], eps=m.eps)).to(x.dtype)


def identity(*parts: str, outside: bool = False) -> Plant:
    """Norms that do nothing."""

    def plant(model: nn.Module, f: Formula) -> None:
        for part in parts:
            for layer in [None] if outside else f.layers:
                name, _, last = f.module(part, layer).rpartition(".")
                setattr(model.get_submodule(name), last, nn.Identity())

    return Plant(plant, key="identity")


def layer(forward: Callable) -> Plant:
    """`forward(x, attend, mlp, norm_1, norm_2)` in the place of a block's; attend(x) gives what attention adds."""

    def plant(model: nn.Module, f: Formula) -> None:
        for i in f.layers:
            block = model.get_submodule(f"{f.parts['layers']}.{i}")
            block.forward = partial(wrong, block, f)

    def wrong(block: nn.Module, f: Formula, x: torch.Tensor, *inputs):
        attention, weights = block.get_submodule(f.parts["o"].rpartition(".")[0]), []

        def attend(x: torch.Tensor) -> torch.Tensor:
            y, w = attention(x, *inputs)
            weights.append(w)
            return y

        parts = (block.get_submodule(f.parts[part]) for part in ("norm_1", "norm_2"))
        return forward(x, attend, block.mlp, *parts), weights[0]

    return Plant(plant, key="layer")


def in_order(x, attend, mlp, norm_1, norm_2):
    x = x + attend(norm_1(x))
    return x + mlp(norm_2(x))


def parallel(x, attend, mlp, norm_1, norm_2):
    return x + attend(norm_1(x)) + mlp(norm_2(x))


def stream_lost(plant_family: str) -> Callable:
    return {"phi": lost_in_parallel, "openai-gpt": lost_in_post_norm}.get(plant_family, lost_in_pre_norm)


def lost_in_parallel(x, attend, mlp, norm_1, norm_2):
    n = norm_1(x)
    return attend(n) + mlp(n)


def lost_in_post_norm(x, attend, mlp, norm_1, norm_2):
    x = norm_1(attend(x))
    return norm_2(x + mlp(x))


def lost_in_pre_norm(x, attend, mlp, norm_1, norm_2):
    x = attend(norm_1(x))
    return x + mlp(norm_2(x))


def any_layer(choose: Callable) -> Plant:
    """A layer that depends on the family."""
    return Plant(lambda model, f: layer(choose(f.family)).model(model, f), key="layer")


def gated_last(model: nn.Module, f: Formula) -> None:
    for m in [m for m in model.modules() if hasattr(m, "gate_up_proj")]:

        def forward(x: torch.Tensor, m=m) -> torch.Tensor:
            gate, up = m.gate_up_proj(x).chunk(2, dim=-1)
            return m.down_proj(m.act(up * gate))

        m.forward = forward


# Arguments and positions


def arguments(change: Callable, key: str = "", **how: str) -> Plant:
    """`change(kwargs, f)` of a call of the model."""

    def plant(model: nn.Module, f: Formula) -> None:
        def hook(m: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            names = list(inspect.signature(m.forward).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            change(kwargs, f)
            return (), kwargs

        model.register_forward_pre_hook(hook, with_kwargs=True)

    return Plant(plant, key=key, **how)


def begin_anew(kwargs: dict, f: Formula) -> None:
    if kwargs.get("past_key_values") is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]


def shifted(n: int, **how: str) -> Plant:
    """Learned positions further on."""

    def plant(model: nn.Module, f: Formula) -> None:
        table = model.get_submodule(f.module("position_embedding"))
        table.register_forward_pre_hook(lambda m, args: ((args[0] + n) % m.num_embeddings,))

    return Plant(plant, key="shifted", **how)


def types_are_positions(model: nn.Module, f: Formula) -> None:
    """token_type_ids are looked up in the position table."""
    words, places = (model.get_submodule(f.module(part)) for part in ("embedding", "position_embedding"))
    own, given = words.forward, {}
    arguments(lambda kwargs, f: given.update(ids=kwargs.get("token_type_ids"))).model(model, f)
    words.forward = lambda ids: F.embedding(ids, places.weight) if ids is given.get("ids") else own(ids)


def wider_words(model: nn.Module, f: Formula) -> None:
    table = model.get_submodule(f.module("embedding"))
    table.register_forward_hook(lambda m, args, output: output * f.C**0.5)


# Rotation


def rotation(function: Callable) -> Plant:
    """`function(own, x, cos, sin)` in the place of a rotation."""
    return wrapped("rotate", lambda own, m, f: partial(function, own))


def rotations(of_q: Callable, of_k: Callable) -> Plant:
    """Apart for q and k: attention rotates q first."""

    def wrong(own: Callable, m: nn.Module, f: Formula) -> Callable:
        turns = itertools.cycle([of_q, of_k])
        return lambda x, cos, sin: next(turns)(own, m, x, cos, sin)

    return wrapped("rotate", wrong)


def as_it_is(
    own: Callable, m: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    return x


def rotated_rightly(own: Callable, m: nn.Module, x: torch.Tensor, cos, sin) -> torch.Tensor:
    return own(x, cos, sin)


def neighbours(own: Callable, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    R = cos.shape[-1]
    a, b = x[..., :R:2], x[..., 1:R:2]
    c, s = cos[..., : R // 2], sin[..., : R // 2]
    return torch.cat([torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2), x[..., R:]], -1)


def mixed(own: Callable, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1] // 2
    return own(x, *(part[..., :half].repeat_interleave(2, -1) for part in (cos, sin)))


def last_dimensions(own: Callable, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1] - cos.shape[-1]
    return own(x.roll(-n, -1), cos, sin).roll(n, -1)


def norms_after_rotation(model: nn.Module, f: Formula) -> None:
    for m in [m for m in model.modules() if hasattr(m, "rotate")]:
        m.kept = nn.ModuleList([m.q_layernorm, m.k_layernorm])  # so that they follow .to()
        norms = itertools.cycle(m.kept)
        m.q_layernorm, m.k_layernorm = nn.Identity(), nn.Identity()
        m.rotate = lambda x, cos, sin, own=m.rotate, norms=norms: next(norms)(own(x, cos, sin))


def values_rotated(model: nn.Module, f: Formula) -> None:
    """v turns with the angles that its attention is given."""
    for i in f.layers:
        attention = model.get_submodule(f.module("o", i).rpartition(".")[0])
        angles: dict[str, tuple] = {}
        attention.register_forward_pre_hook(
            lambda m, args, angles=angles: angles.update(now=next(a for a in args if isinstance(a, tuple)))
        )

        def turn(v: torch.Tensor, attention=attention, angles=angles) -> torch.Tensor:
            return f.merge_heads(attention.rotate(f.split_heads(v), *angles["now"]))

        if "qkv" in f.parts:
            fused = model.get_submodule(f.module("qkv", i))
            fused.register_forward_hook(
                lambda m, args, output, turn=turn: fuse(
                    f, [*(parts := f.split_qkv(output))[:2], turn(parts[2])]
                )
            )
        else:
            own = model.get_submodule(f.module("v", i))
            own.register_forward_hook(lambda m, args, output, turn=turn: turn(output))


def theta(change: Callable) -> Plant:
    """Exponents of the base, as another base: base ** (c 2 i / R) is (base ** c) ** (2 i / R)."""
    return Plant(config=lambda d: fields(rope_theta=change(d.get("rope_theta") or 10000.0, d))(d), key="base")


def angles_in_half(module: types.ModuleType) -> None:
    for name, one in list(vars(module).items()):
        if inspect.isfunction(one) and name.endswith("cos_sin"):
            setattr(module, name, cos_sin_in_half)


def cos_sin_in_half(position_ids: torch.Tensor, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    config, x = rest[-2:]
    f = Formula(config, {})
    angles = position_ids[:, None, :, None].to(x.dtype) * f.inv_freq(position_ids).to(x.dtype)
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * f.attention_factor()).to(x.dtype), (angles.sin() * f.attention_factor()).to(
        x.dtype
    )


def factors(change: Callable) -> Plant:
    """Other lists of longrope: `change(short, long)`."""

    def config(d: dict) -> dict:
        scaling = d["rope_scaling"]
        short, long = change(scaling["short_factor"], scaling["long_factor"])
        return {**d, "rope_scaling": {**scaling, "short_factor": short, "long_factor": long}}

    return Plant(config=config, key="factors")


def right_factor(d: dict) -> float:
    """What cos and sin are multiplied with."""
    ratio = d["max_position_embeddings"] / d["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(ratio) / math.log(d["original_max_position_embeddings"]))


def longrope_scale(change: Callable) -> Plant:
    def config(d: dict) -> dict:
        own = d["rope_scaling"].get("attention_factor") or right_factor(d)
        return {**d, "rope_scaling": {**d["rope_scaling"], "attention_factor": change(own, d)}}

    return Plant(config=config, key="longrope scale")


def limit(n: int) -> Plant:
    """The long factors begin n tokens late; a cache is not asked with which factors it was filled."""

    def config(d: dict) -> dict:
        scaling = {"attention_factor": right_factor(d), **d["rope_scaling"]}
        original = d["original_max_position_embeddings"] + n
        return {**d, "rope_scaling": scaling, "original_max_position_embeddings": original}

    def module(file: types.ModuleType) -> None:
        file.note_rope, file.same_rope = (lambda *given: None), (lambda *given: True)

    return Plant(config=config, module=module, key="limit")


def yarn(own: float, d: dict) -> float:
    return 1 + 0.1 * math.log(d["max_position_embeddings"] / d["original_max_position_embeddings"])


# Pictures


def places_of(n: int) -> Plant:
    def change(kwargs: dict, f: Formula) -> None:
        if kwargs.get("image_patches_indices") is not None:
            kwargs["image_patches_indices"] = kwargs["image_patches_indices"].roll(n, 1)

    return arguments(change, key="places of pictures")


def patches_of(change: Callable) -> Plant:
    def other(kwargs: dict, f: Formula) -> None:
        if kwargs.get("image_patches") is not None:
            kwargs["image_patches"] = change(kwargs["image_patches"])

    return arguments(other, key="patches")


def no_pictures(kwargs: dict, f: Formula) -> None:
    kwargs.pop("image_patches", None), kwargs.pop("image_patches_indices", None)


def pictures_added(model: nn.Module, f: Formula) -> None:
    own, table = model.with_patches, model.get_submodule(f.module("embedding"))

    def with_patches(ids, patches, indices):
        x = own(ids, patches, indices)
        return torch.where((indices >= 0)[..., None], x + table(ids), x)

    model.with_patches = with_patches


# Loss


def loss(function: Callable) -> Plant:
    """`function(logits, labels)` in the place of the loss of a file."""

    def plant(module: types.ModuleType) -> None:
        if hasattr(module, "causal_lm_loss"):
            module.causal_lm_loss = function
        else:
            module.next_token_loss = lambda x, labels, head, *rest: function(head(x), labels)

    return Plant(module=plant, key="loss")


def entropy(logits: torch.Tensor, labels: torch.Tensor, **how) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **how)


# Fields and weights


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
        key="eps",
        config=lambda d: fields(
            **{
                next(
                    (k for k in ("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon") if k in d),
                    EPS[d["model_type"]],
                ): value
            }
        )(d),
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
    """Rows of a fused matrix (columns in GPT-1's files) in another order."""

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


# ---- One for each mistake ----------------------------------------------------------------------------------

FUNCTIONS = {
    "the tanh approximation of GELU": partial(F.gelu, approximate="tanh"),
    "GELU with the exact erf": F.gelu,
    "GELU as x sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "SiLU": F.silu,
    "ReLU": F.relu,
    "squared ReLU": lambda x: F.relu(x).square(),
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
    "activation: none": act(lambda x: x),
    "attention: scores divided by sqrt(D), which GPT-Neo does not": scale(lambda q: q.shape[-1] ** -0.5),
    "attention: scores not divided by sqrt(D)": scale(lambda q: 1.0),
    "attention: scores divided by D, not by its root": scale(lambda q: 1 / q.shape[-1]),
    "attention: scores divided by the root of the width C": scale(lambda q: (q.shape[1] * q.shape[-1]) ** -0.5),
    "attention: a token sees the one after it": tril(lambda at: at + 1),
    "attention: no causal mask": tril(None),
    "attention: with a cache, the mask is aligned at the top left": tril(lambda at: 0, not_in="gpt_neo phi3"),
    "attention: hidden scores are set to 0": spelled(
        lambda scores, mask: scores.masked_fill(mask < 0, 0.0).softmax(-1)),
    "attention: hidden weights are set to 0 behind the softmax": spelled(
        lambda scores, mask: scores.softmax(-1) * (mask == 0)),
    "attention: softmax over the queries": spelled(lambda scores, mask: (scores + mask).softmax(2).nan_to_num()),
    "attention: padding is not hidden": padding(lambda mask: mask * 0 + 1),
    "attention: a row of padding sees nothing and is NaN, which reaches the others as 0 times NaN": spelled(
        lambda scores, mask: (scores + mask).softmax(-1), blind_padding),
    "attention: attention_mask inverted (1 hides)": padding(lambda mask: (mask == 0).to(mask.dtype)),
    "attention: the window counts one token too many": Plant(config=lambda d: fields(
        **{k: d[k] + 1 for k in ("window_size", "sliding_window") if d.get(k)})(d)),
    "attention: the window counts one token too few": Plant(config=lambda d: fields(
        **{k: d[k] - 1 for k in ("window_size", "sliding_window") if d.get(k)})(d)),
    "attention: no window": Plant(config=lambda d: fields(sliding_window=None, window_size=90)(d)),
    "attention: every layer is local": kinds(lambda old: ["local"] * len(old)),
    "attention: global and local layers swapped": kinds(lambda old: [{"global": "local", "local": "global"}[k] for k in old]),
    "attention: q and k swapped": swapped(0, 1),
    "attention: k and v swapped": swapped(1, 2),
    "attention: the fused matrix cut head by head": rows(head_by_head),
    "attention: the fused matrix cut into thirds": rows(thirds),
    "attention: a head takes every H-th dimension": Plant(state=tensors(every_nth).state, not_in="persimmon fuyu"),
    "attention: heads joined without swapping H and T back": into(
        "o", lambda x, f: f.split_heads(x).reshape(len(x), x.shape[1], -1)),
    "attention: the output matrix is transposed": turned("o"),
    "attention: the matrix of q is transposed": turned("q"),
    "attention: the matrix of k is transposed": turned("k"),
    "attention: the matrix of v is transposed": turned("v"),
    "attention: key/value heads taken in turns": key_value_heads(lambda x, H: x.repeat(1, H // x.shape[1], 1, 1)),
    "attention: all heads read the first key/value head": key_value_heads(lambda x, H: x[:, :1].expand(-1, H, -1, -1)),
    "attention: q and k without their norms": Plant(config=fields(qk_layernorm=False)),
    "attention: q's norm on k and k's on q": exchanged("q_norm", "k_norm"),
    "attention: q normed, k not": identity("k_norm"),
    "attention: heads normed after the rotation": Plant(norms_after_rotation, key="rotate"),
    "bias of q missing": zero("q"), "bias of v missing": zero("v"), "bias of q, k and v missing": zero("qkv"),
    "bias of attention's output missing": zero("o"), "bias of the MLP's first product missing": zero("up"),
    "bias of the MLP's last product missing": zero("down"), "bias of the logits missing": zero("head"),
    "bias of the picture's projection missing": zero("patches"),
    **{f"norm: epsilon {eps:g}": eps_of(eps) for eps in (1e-3, 1e-4, 1e-6, 1e-12)},
    "norm: variance divided by n - 1": norm(sample_variance),
    "norm: no mean subtracted (RMSNorm)": norm(without_mean),
    "norm: mean subtracted (LayerNorm)": norm(with_mean, "RMSNorm"),
    "norm: sum of squares, not their mean": norm(sum_of_squares, "RMSNorm"),
    "norm: weights left out": norms(lambda part, t: torch.ones_like(t) if part.endswith("weight") else t),
    "norm: weights counted from one (1 + weight, as in Gemma)": norms(lambda part, t: t + 1 if part.endswith("weight") else t),
    "norm: biases left out": norms(lambda part, t: t * 0 if part.endswith("bias") else t),
    "norm: a layer's two norms swapped": exchanged("norm_1", "norm_2"),
    "norm: none before the logits": identity("norm", outside=True),
    "norm: one before the logits": Plant(lambda model, f: model.get_submodule(f.module("head")).register_forward_pre_hook(
        lambda m, args: (F.layer_norm(args[0], args[0].shape[-1:], eps=1e-5),))),
    "layer: attention first, the MLP on its sum": layer(in_order),
    "layer: attention and MLP side by side": layer(parallel),
    "layer: norms before attention and MLP (GPT-2)": layer(in_order),
    "layer: attention's input is not added": any_layer(stream_lost),
    "layer: the last one is missing": Plant(config=lambda d: fields(
        **{k: d[k] - 1 for k in ("num_hidden_layers", "num_layers", "n_layer") if k in d},
        **(kinds_of(layers_of(d)[:-1]) if "attention_types" in d else {}))(d)),
    "layer: all have the first one's weights": Plant(state=first_weights),
    "MLP: gate and up swapped": tensors(lambda part, t, f: torch.cat(t.chunk(2)[::-1]) if part == "up.weight" else t),
    "MLP: gate and up taken in turns": tensors(lambda part, t, f: torch.cat([t[::2], t[1::2]]) if part == "up.weight" else t),
    "MLP: the activation is behind the product of gate and up": Plant(gated_last, key="mlp"),
    "embeddings multiplied by sqrt(C)": Plant(wider_words, not_in="gpt_neo openai-gpt"),
    "position_ids are not read": arguments(lambda kwargs, f: kwargs.pop("position_ids", None), "positions"),
    "positions begin anew with a cache": arguments(begin_anew, "positions"),
    "positions start at one": shifted(1, only_in="gpt_neo openai-gpt"),
    "positions start at two (OPT)": shifted(2),
    "positions are not added": tensors(lambda part, t, f: t * 0 if part == "position_embedding.weight" else t),
    "token_type_ids are not read": arguments(lambda kwargs, f: kwargs.pop("token_type_ids", None), "types"),
    "token_type_ids go through the position table": Plant(types_are_positions, key="types"),
    "logits: the token table is the output matrix": Plant(state=lambda state, f: {
        **state, f"{f.parts['head']}.weight": state[f"{f.parts['embedding']}.weight"]}),
    "rotary: neighbours paired (GPT-J) instead of halves": rotation(neighbours),
    "rotary: tables of neighbours, rotation of halves": rotation(mixed),
    "rotary: turned the other way": rotation(lambda own, x, cos, sin: own(x, cos, -sin)),
    "rotary: only q is turned": rotations(rotated_rightly, as_it_is),
    "rotary: only k is turned": rotations(as_it_is, rotated_rightly),
    "rotary: v is turned too": Plant(values_rotated, key="rotate"),
    "rotary: the last dimensions of a head are turned": rotation(last_dimensions),
    "rotary: all dimensions of a head are turned": Plant(config=fields(partial_rotary_factor=1.0)),
    "rotary: one pair of dimensions too few": Plant(config=lambda d: fields(partial_rotary_factor=(rotated(d) - 1.5) / 12)(d)),
    "rotary: frequencies of the whole head (exponents over D)": theta(lambda base, d: base ** (rotated(d) / 12)),
    "rotary: exponents i / R, not 2 i / R": theta(lambda base, d: base**0.5),
    **{f"rotary: base {base}": theta(lambda _, d, base=base: float(base)) for base in (10000, 25000, 500000, 1000000)},
    "longrope: short factors beyond the limit": factors(lambda short, long: (short, short)),
    "longrope: long factors below the limit": factors(lambda short, long: (long, long)),
    "longrope: long factors at the limit already": limit(-1),
    "longrope: long factors one token too late": limit(1),
    "longrope: no factors": factors(lambda short, long: ([1.0] * len(short), [1.0] * len(long))),
    "longrope: frequencies multiplied by the factors": factors(
        lambda short, long: ([1 / x for x in short], [1 / x for x in long])),
    "longrope: cos and sin not scaled": longrope_scale(lambda own, d: 1.0),
    "longrope: scores scaled once, not q and k both": longrope_scale(lambda own, d: own**0.5),
    "longrope: cos and sin scaled as YaRN does": longrope_scale(yarn),
    "pictures: patches one place late": places_of(1),
    "pictures: patches one place early": places_of(-1),
    "pictures: patches in reversed order": patches_of(lambda patches: patches.flip(1)),
    "pictures: a patch has its channels first": patches_of(
        lambda patches: patches.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)),
    "pictures: added to the words in their place": Plant(pictures_added),
    "pictures: left out": arguments(no_pictures, "patches"),
    "loss: labels are not shifted": loss(entropy),
    "loss: shifted twice": loss(lambda logits, labels: entropy(logits[:, :-2], labels[:, 2:])),
    "loss: summed, not averaged": loss(lambda logits, labels: entropy(logits[:, :-1], labels[:, 1:], reduction="sum")),
    "loss: labels of -100 count in the mean": loss(
        lambda logits, labels: entropy(logits[:, :-1], labels[:, 1:], reduction="sum") / labels[:, 1:].numel()),
    "half precision: rotary angles are computed in it": Plant(module=angles_in_half, key="cos_sin"),
    "half precision: the norm is rounded after its weight": norm(rounded_last, "RMSNorm"),
}  # fmt: skip


def fitting(family: str) -> list[mistakes.Mistake]:
    """The mistakes that can be made in this family's file."""
    return [m for m in mistakes.of(family) if m.name in PLANTS and PLANTS[m.name].fits(family)]


def planted(family: str, config: dict, weights: dict, *names: str) -> nn.Module:
    """Our model with these mistakes, in float32."""
    plants = [PLANTS[name] for name in names]
    keys = [plant.key for plant in plants if plant.key]
    if len({*keys}) < len(keys):
        raise LookupError(f"{' and '.join(names)} would change the same")
    file, class_name = FAMILIES[family]
    module = types.ModuleType(f"planted_{next(numbers)}")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile((ROOT / f"{file}.py").read_text(), module.__name__, "exec"), module.__dict__)
    del sys.modules[module.__name__]
    for plant in plants:
        config = plant.config(config) if plant.config else config
        if plant.module:
            plant.module(module)
    real = importlib.import_module(f"decoders.{file}")
    f = Formula(getattr(real, class_name).config_class.from_dict(config), {})
    for plant in plants:
        weights = plant.state(weights, f) if plant.state else weights
    model_class = getattr(module, class_name)
    model = model_class(model_class.config_class.from_dict(config)).eval()
    own = model.state_dict()
    missing, _ = model.load_state_dict({name: t for name, t in weights.items() if name in own}, strict=False)
    assert {*missing} <= {"lm_head.weight"} and (not missing or model.config.tie_word_embeddings), missing
    for plant in plants:
        if plant.model:
            plant.model(model, f)
    return model


assert all(name in {m.name for m in mistakes.MISTAKES} for name in PLANTS), sorted(
    PLANTS.keys() - {m.name for m in mistakes.MISTAKES}
)

"""The six models once more, as formulas: every stage by name, every step replaceable.

The model files are for reading and running; here the same computation is cut into the steps that somebody
who writes it again has to get right. `Formula.forward` hands each value to `note(name, value)`, in the order
of the computation, under the names of `STAGES`. A mistake (`mistakes/`) is another step in the place of a
right one. `Arithmetic` says how sums are ordered and where is rounded: what that changes is noise, all else a
mistake.

Tests hold this equal to the six files, stage by stage in float64, so it proves them a second time.
Letters: B batch, T new tokens, S keys (cached + new), H heads, K key/value heads, D head size, R rotary
dimensions, C width, F width of the MLP, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import ACTIVATIONS, Arithmetic, gelu_tanh, upcast

# ---- Stages ------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    name: str  # of a layer: behind `layers.N.`
    shape: str
    formula: str


STAGES = (
    Stage("embeddings", "(B, T, C)", "what enters the first layer"),
    Stage("attn_in", "(B, T, C)", "what q, k and v are made of"),
    Stage(
        "q", "(B, H, T, D)", "attn_in times the matrix of q, and its bias where there is one, cut into heads"
    ),
    Stage(
        "k", "(B, K, T, D)", "attn_in times the matrix of k, and its bias where there is one, cut into heads"
    ),
    Stage(
        "v", "(B, K, T, D)", "attn_in times the matrix of v, and its bias where there is one, cut into heads"
    ),
    Stage("q_normed", "(B, H, T, D)", "q after the norm of heads"),
    Stage("k_normed", "(B, K, T, D)", "k after the norm of heads"),
    Stage("q_rotated", "(B, H, T, D)", "q after the rotary embedding"),
    Stage("k_rotated", "(B, K, T, D)", "k after the rotary embedding"),
    Stage("scores", "(B, H, T, S)", "q k^T, scaled, before the mask; NaN where the mask hides"),
    Stage("weights", "(B, H, T, S)", "softmax over S of the scores that are not hidden"),
    Stage("heads", "(B, T, H D)", "weights times v, the heads side by side"),
    Stage("attn_out", "(B, T, C)", "heads times the output matrix, and its bias"),
    Stage("attn_sum", "(B, T, C)", "attn_out and what it is added to"),
    Stage("mlp_in", "(B, T, C)", "what enters the MLP"),
    Stage("mlp_up", "(B, T, F)", "mlp_in times the first matrix, and its bias; of gate and up: [gate | up]"),
    Stage("mlp_act", "(B, T, F)", "after the activation; of gate and up: act(gate) up"),
    Stage("mlp_out", "(B, T, C)", "mlp_act times the last matrix, and its bias"),
    Stage("out", "(B, T, C)", "what leaves the layer"),
    Stage("norm", "(B, T, C)", "what the logits are made of"),
    Stage("logits", "(B, T, V)", "norm times the output matrix"),
    Stage("loss", "()", "mean cross-entropy of logits[:, :-1] with labels[:, 1:], -100 left out"),
    Stage("grad", "as the parameter", "`grad.NAME`: the loss's gradient by each parameter"),
)
ORDER = {stage.name: i for i, stage in enumerate(STAGES)}


def stage_order(name: str) -> tuple:
    """Sorts stages as they are computed: embeddings, layer by layer, the end, gradients."""
    if name.startswith("grad."):
        return math.inf, ORDER["grad"], name
    _, i, stage = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
    layer = int(i) if i else -1 if name == "embeddings" else math.inf
    return layer, ORDER.get(stage, len(ORDER)), name


# ---- Names of the weights ----------------------------------------------------------------------------------

PARTS = {
    "gpt_neo": {
        "embedding": "transformer.wte", "position_embedding": "transformer.wpe",
        "layers": "transformer.h", "norm_1": "ln_1",
        "q": "attn.attention.q_proj", "k": "attn.attention.k_proj", "v": "attn.attention.v_proj",
        "o": "attn.attention.out_proj", "norm_2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj",
        "norm": "transformer.ln_f", "head": "lm_head",
    },
    "openai-gpt": {
        "embedding": "transformer.tokens_embed", "position_embedding": "transformer.positions_embed",
        "layers": "transformer.h", "qkv": "attn.c_attn", "o": "attn.c_proj", "norm_1": "ln_1",
        "up": "mlp.c_fc", "down": "mlp.c_proj", "norm_2": "ln_2", "head": "lm_head",
    },
    "phi": {
        "embedding": "model.embed_tokens", "layers": "model.layers", "norm_1": "input_layernorm",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.dense",
        "q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm", "norm_2": "input_layernorm",
        "up": "mlp.fc1", "down": "mlp.fc2", "norm": "model.final_layernorm", "head": "lm_head",
    },
    "phi3": {
        "embedding": "model.embed_tokens", "layers": "model.layers", "norm_1": "input_layernorm",
        "qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "norm_2": "post_attention_layernorm",
        "up": "mlp.gate_up_proj", "down": "mlp.down_proj", "norm": "model.norm", "head": "lm_head",
    },
    "persimmon": {
        "embedding": "model.embed_tokens", "layers": "model.layers", "norm_1": "input_layernorm",
        "qkv": "self_attn.query_key_value", "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm", "o": "self_attn.dense", "norm_2": "post_attention_layernorm",
        "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h", "norm": "model.final_layernorm",
        "head": "lm_head",
    },
}  # fmt: skip
OUTSIDE = ("embedding", "position_embedding", "layers", "norm", "head")  # the others are behind `layers.N.`
PARTS["fuyu"] = {
    key: f"language_model.{name}" if key in OUTSIDE else name for key, name in PARTS["persimmon"].items()
} | {"patches": "vision_embed_tokens"}

# ---- The formula -------------------------------------------------------------------------------------------


def unchanged(name: str, value: Tensor) -> Tensor:
    return value


class Formula:
    """A model out of the config's fields and weights under the hub's names (all of one dtype).

    Numbers and methods are the steps; whoever replaces one changes the model. `note(name, value)` may return
    another value to go on with.
    """

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Tensor],
        do: Arithmetic | None = None,
        note: Callable[[str, Tensor], Tensor] = unchanged,
    ):
        self.family, self.weights, self.do, self.note = config.model_type, weights, do or Arithmetic(), note
        self.parts, self.image_token = PARTS[self.family], getattr(config, "image_token_id", None)
        self.config = config = getattr(config, "text_config", config)
        get = vars(config).get
        self.C = get("hidden_size") or get("n_embd")
        self.H = get("num_attention_heads") or get("num_heads") or get("n_head")
        self.K = get("num_key_value_heads") or self.H
        self.D = get("head_dim") or self.C // self.H
        self.layers = range(get("num_hidden_layers") or get("num_layers") or get("n_layer"))
        self.eps = next(get(n) for n in ("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon") if get(n))
        self.scale = 1.0 if self.family == "gpt_neo" else self.D**-0.5
        name = get("hidden_act") or get("activation_function") or get("afn")
        self.act = gelu_tanh if self.family == "openai-gpt" and name == "gelu" else ACTIVATIONS[name]
        self.gated = self.family == "phi3"
        self.qk_layernorm, self.current = get("qk_layernorm", False), 0  # the layer that is computed
        self.R = getattr(config, "rotary_dim", 0)  # 0: positions are a table
        self.base = get("rope_theta")
        kinds = get("attention_layers") or ["local" if get("sliding_window") else "global"] * len(self.layers)
        window = get("window_size") or get("sliding_window")
        self.windows = [window if kind == "local" else None for kind in kinds]

    # Weights

    def weight(self, name: str) -> Tensor | None:
        return self.weights.get(name)

    def module(self, part: str, layer: int | None = None) -> str:
        return self.parts[part] if layer is None else f"{self.parts['layers']}.{layer}.{self.parts[part]}"

    def matrix(self, part: str, layer: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(out, in), and the bias if there is one."""
        name = self.module(part, layer)
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        stored_in_out = self.family == "openai-gpt" and layer is not None
        return weight.t() if stored_in_out else weight, bias

    def output_matrix(self) -> tuple[Tensor, Tensor | None]:
        """Of the logits: the token table where no other is stored."""
        weight, bias = self.matrix("head")
        return (self.matrix("embedding")[0] if weight is None else weight), bias

    # Before the layers

    def embedding(self) -> Tensor:
        return self.matrix("embedding")[0]

    def embeddings(self, inputs: dict, position_ids: Tensor) -> Tensor:
        ids = inputs["input_ids"]
        x = self.embedding()[ids]
        if "token_type_ids" in inputs:
            x = x + self.token_types(inputs["token_type_ids"])
        if self.R == 0:
            x = x + self.position_embedding()[position_ids]
        if "image_patches" in inputs:
            x = self.put_patches(x, ids, inputs)
        return x

    def token_types(self, ids: Tensor) -> Tensor:
        return self.embedding()[ids]

    def position_embedding(self) -> Tensor:
        return self.matrix("position_embedding")[0]

    def put_patches(self, x: Tensor, ids: Tensor, inputs: dict) -> Tensor:
        """Patch number n of a row stands where `image_patches_indices` (B, T) says n; -1 says a word."""
        patches = self.do.linear(inputs["image_patches"].to(x.dtype), *self.matrix("patches"))  # (B, N, C)
        indices = inputs["image_patches_indices"]
        chosen = patches.gather(1, indices.clamp(min=0)[..., None].expand_as(x))
        return torch.where((indices >= 0)[..., None], chosen, x)

    def position_ids(self, inputs: dict, past: int) -> Tensor:
        """(B or 1, T) position of each new token."""
        T = inputs["input_ids"].shape[1]
        given = inputs.get("position_ids")
        return torch.arange(past, past + T)[None] if given is None else given

    # Norms

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.rms_norm(x, weight) if bias is None else self.layer_norm(x, weight, bias)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = upcast(x)
        wide = wide - self.do.mean(wide)
        wide = wide * (self.do.mean(wide * wide) + self.eps).rsqrt()
        return (wide * upcast(weight) + upcast(bias)).to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = upcast(x)
        return weight * (wide * (self.do.mean(wide * wide) + self.eps).rsqrt()).to(x.dtype)

    def normed(self, x: Tensor, part: str, layer: int | None = None) -> Tensor:
        name = self.module(part, layer)
        return self.norm(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    # Rotary embedding

    def inv_freq(self, position_ids: Tensor) -> Tensor:
        """(R / 2,) angle of one position to the next. Of "longrope" they depend on the longest text."""
        powers = self.base ** (torch.arange(0, self.R, 2, dtype=torch.float64) / self.R)
        scaling = getattr(self.config, "rope_scaling", None)
        if not scaling:
            return 1 / powers
        if "factor" in scaling and "long_factor" not in scaling:
            return self.scaled_inv_freq(powers, scaling, position_ids)
        return 1 / (powers * torch.tensor(self.rope_factors(scaling, position_ids), dtype=torch.float64))

    def rope_factors(self, scaling: dict, position_ids: Tensor) -> list[float]:
        long = int(position_ids.max()) + 1 > self.config.original_max_position_embeddings
        return scaling["long_factor" if long else "short_factor"]

    def scaled_inv_freq(self, powers: Tensor, scaling: dict, position_ids: Tensor) -> Tensor:
        """ "linear" and "dynamic"."""
        most, factor = self.config.max_position_embeddings, scaling["factor"]
        if scaling["type"] == "linear":
            return 1 / powers / factor
        length = max(int(position_ids.max()) + 1, most)
        grown = math.log(factor * length / most - (factor - 1), self.base) * self.R / (self.R - 2)
        return powers ** -(1 + grown)

    def attention_factor(self) -> float:
        """What cos and sin are multiplied with."""
        longrope = self.family == "phi3" and self.config.rope_scaling
        return self.config.attention_factor if longrope else 1.0

    def angles(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B or 1, 1, T, R / 2), in float32 at least: half precision has no position above 256 exactly."""
        wide = torch.promote_types(dtype, torch.float32)
        return position_ids[:, None, :, None].to(wide) * self.inv_freq(position_ids).to(wide)

    def cos_sin(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles, scale = self.angles(position_ids, dtype), self.attention_factor()
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Dimension i with dimension i + R / 2 of the first R; the others pass."""
        a, b, rest = x.split((self.R // 2, self.R // 2, x.shape[-1] - self.R // 2 * 2), dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def rotate_q(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(q, cos, sin)

    def rotate_k(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(k, cos, sin)

    # Attention

    def qkv(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H D), (B, T, K D) twice."""
        if "qkv" in self.parts:
            return self.split_qkv(self.do.linear(x, *self.matrix("qkv", layer)))
        return tuple(self.do.linear(x, *self.matrix(part, layer)) for part in "qkv")

    def split_qkv(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v out of one product: one after the other, or of each head in turn."""
        if "q_norm" in self.parts:
            return tuple(part.flatten(2) for part in fused.unflatten(-1, (self.H, 3, self.D)).unbind(3))
        return fused.split((self.H * self.D, self.K * self.D, self.K * self.D), dim=-1)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, n D) -> (B, n, T, D)"""
        return x.unflatten(-1, (-1, self.D)).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, H D)"""
        return x.transpose(1, 2).flatten(2)

    def repeat_kv(self, x: Tensor) -> Tensor:
        """(B, K, S, D) -> (B, H, S, D): head h reads key/value head h // (H / K)."""
        return x.repeat_interleave(self.H // self.K, dim=1)

    def visible(self, T: int, S: int, window: int | None, attention_mask: Tensor | None) -> Tensor:
        """(B or 1, 1, T, S) which keys the last T of S positions see; padding itself looks at itself."""
        causal_mask = self.causal_mask(T, S)[None, None]
        allowed = causal_mask if window is None else causal_mask & self.in_window(T, S, window)
        if attention_mask is not None:
            allowed = allowed & (attention_mask != 0)[:, None, None]
        itself = torch.ones(T, S, dtype=torch.bool).tril(S - T).triu(S - T)
        return allowed | (itself & ~allowed.any(-1, keepdim=True))

    def causal_mask(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).tril(S - T)

    def in_window(self, T: int, S: int, window: int) -> Tensor:
        """The last `window` positions, itself counted."""
        return torch.ones(T, S, dtype=torch.bool).triu(S - T - window + 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, T, S), in float32 at least, as the sums are in any fused kernel."""
        if self.do.stepwise:
            return upcast(self.do.matmul(q, k.transpose(2, 3)) * self.scale)
        return self.do.matmul(upcast(q), upcast(k).transpose(2, 3)) * self.scale

    def softmax(self, scores: Tensor, visible: Tensor) -> Tensor:
        return self.masked(scores, visible).softmax(-1)

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores.masked_fill(~visible, -math.inf)

    def attention(
        self, x: Tensor, layer: int, position_ids: Tensor, attention_mask: Tensor | None, cache: dict
    ) -> Tensor:
        def note(name: str, value: Tensor) -> Tensor:
            return self.note(f"layers.{layer}.{name}", value)

        x = note("attn_in", x)
        q, k, v = (
            note(name, self.split_heads(part)) for name, part in zip("qkv", self.qkv(x, layer), strict=True)
        )
        self.current = layer
        if self.qk_layernorm:
            q, k = note("q_normed", self.q_norm(q)), note("k_normed", self.k_norm(k))
        if self.R:
            tables = self.cos_sin(position_ids, q.dtype)
            q, k = note("q_rotated", self.rotate_q(q, *tables)), note("k_rotated", self.rotate_k(k, *tables))
        k, v = self.update_cache(cache, layer, k, v)
        T, S = q.shape[2], k.shape[2]
        visible = self.visible(T, S, self.windows[layer], attention_mask)
        scores = self.scores(q, self.repeat_kv(k))
        scores = note("scores", torch.where(visible, scores, torch.nan)).where(visible, scores)
        weights = note("weights", self.softmax(scores, visible).to(q.dtype))
        given = weights if self.do.stepwise else upcast(weights)
        y = self.do.matmul(given, self.repeat_kv(v).to(given.dtype)).to(q.dtype)
        return note("attn_out", self.attn_out(note("heads", self.merge_heads(y)), layer))

    def q_norm(self, q: Tensor) -> Tensor:
        return self.normed(q, "q_norm", self.current)

    def k_norm(self, k: Tensor) -> Tensor:
        return self.normed(k, "k_norm", self.current)

    def update_cache(self, cache: dict, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far; `past` holds those of each layer, and gets these."""
        if layer in cache:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache[layer], (k, v), strict=True))
        cache[layer] = k, v
        return k, v

    def attn_out(self, y: Tensor, layer: int) -> Tensor:
        return self.do.linear(y, *self.matrix("o", layer))

    # MLP

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        def note(name: str, value: Tensor) -> Tensor:
            return self.note(f"layers.{layer}.{name}", value)

        up = note("mlp_up", self.mlp_up(note("mlp_in", x), layer))
        return note("mlp_out", self.mlp_out(note("mlp_act", self.apply_act(up)), layer))

    def mlp_up(self, x: Tensor, layer: int) -> Tensor:
        return self.do.linear(x, *self.matrix("up", layer))

    def apply_act(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.do.once(self.act, x)
        gate, up = x.chunk(2, dim=-1)
        return up * self.do.once(self.act, gate)

    def mlp_out(self, x: Tensor, layer: int) -> Tensor:
        return self.do.linear(x, *self.matrix("down", layer))

    # Layer and model

    def layer(self, x: Tensor, layer: int, attend: Callable) -> Tensor:
        """Norms come before (and the MLP after attention), in GPT-1 behind the sums; in Phi attention and MLP
        read the same."""
        if self.family == "phi":
            n = self.normed(x, "norm_1", layer)
            return self.add_mlp(self.add_attn(x, attend(n, layer)), self.mlp(n, layer))
        if self.family == "openai-gpt":
            total = self.note(f"layers.{layer}.attn_sum", self.add_attn(x, attend(x, layer)))
            n = self.normed(total, "norm_1", layer)
            return self.normed(self.add_mlp(n, self.mlp(n, layer)), "norm_2", layer)
        y = attend(self.normed(x, "norm_1", layer), layer)
        x = self.note(f"layers.{layer}.attn_sum", self.add_attn(x, y))
        return self.add_mlp(x, self.mlp(self.normed(x, "norm_2", layer), layer))

    def add_attn(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def add_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def final_norm(self, x: Tensor) -> Tensor:
        return self.normed(x, "norm") if "norm" in self.parts else x

    def logits(self, x: Tensor) -> Tensor:
        return self.do.linear(x, *self.output_matrix())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(upcast(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())

    def forward(self, inputs: dict[str, Tensor], cache: dict | None = None) -> Tensor:
        """Logits (B, T, V) of `input_ids`, or with `labels` the loss. `past` gets the keys and values."""
        cache = {} if cache is None else cache
        length = next(iter(cache.values()))[0].shape[2] if cache else 0
        position_ids, attention_mask = self.position_ids(inputs, length), self.attention_mask(inputs)
        x = self.note("embeddings", self.embeddings(inputs, position_ids))
        for layer in self.layers:
            attend = lambda n, i: self.attention(n, i, position_ids, attention_mask, cache)  # noqa: E731
            x = self.note(f"layers.{layer}.out", self.layer(x, layer, attend))
        logits = self.note("logits", self.logits(self.note("norm", self.final_norm(x))))
        return logits if "labels" not in inputs else self.note("loss", self.loss(logits, inputs["labels"]))

    def attention_mask(self, inputs: dict) -> Tensor | None:
        return inputs.get("attention_mask")


# ---- A whole case ------------------------------------------------------------------------------------------


def stages(
    config: Any,
    weights: Mapping[str, Tensor],
    inputs: dict[str, Tensor],
    *,
    mistakes: tuple = (),
    do: Arithmetic | None = None,
    note: Callable | None = None,
    gradients: bool = False,
) -> dict[str, Tensor]:
    """Name -> value of every stage for one case of a kit, as computed in the weights' dtype. `past_ids` are
    read first, and not told. `note(name, value)` hears every stage as it comes, and may return another value
    to go on with."""
    found: dict[str, Tensor] = {}

    def hear(name: str, value: Tensor) -> Tensor:
        found[name] = value
        other = None if note is None else note(name, value)
        return value if other is None else other

    if gradients:
        weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    formula = Formula(config, weights, do)
    for mistake in mistakes:
        mistake.into(formula)
    with torch.set_grad_enabled(gradients):
        cache: dict = {}
        if "past_ids" in inputs:
            formula.forward({"input_ids": inputs["past_ids"]}, cache)
        formula.note = hear
        total = formula.forward({k: v for k, v in inputs.items() if k != "past_ids"}, cache)
    if gradients and "labels" in inputs:
        total.backward()
        for name, w in weights.items():
            found[f"grad.{name}"] = torch.zeros_like(w) if w.grad is None else w.grad
    return {name: value.detach() for name, value in found.items()}

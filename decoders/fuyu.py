"""Fuyu (8B), all of it in this file: pictures, prompts, model, boxes. Torch and the standard library are
enough to copy it; Pillow's pictures, and scaling, take Pillow besides.

What is unusual about Fuyu
- It has no picture encoder: a picture is cut into patches of 30 x 30 pixels, one linear layer makes a token
  of each, and the decoder (Persimmon's, copied here) reads them row by row, a newline token after each.
- Any size and shape of picture up to 1080 x 1920; larger ones are scaled down, none is stretched.
- Places are tokens too: `<box>top, left, bottom, right</box>` in a prompt becomes six ids, with coordinates
  halved and scaled, and the model answers in the same way.
- Padding of a picture is nearly black, (1 / 255 - 0.5) / 0.5, in every version of Transformers, which pads
  before it rescales. Adept's own was white.

Source: Bavishi et al., Fuyu-8B (2023), adept.ai/blog/fuyu-8b. Checkpoint: adept/fuyu-8b, of both eras, and
Adept's own release. The model agrees with Transformers 4.37.2, 4.50.3 and 5.24.0 (eager attention, rotary
base written out), the pictures bit for bit and the prompts id for id with 4.37.2. 5.23 leaves boxes in a
prompt as text, and its processor fails without torchvision.

Letters: B batch, T new tokens, S keys (cached + new), H heads, K as many, D head_dim, R rotary dimensions,
C hidden_size, V vocabulary, N patches, P numbers of a patch (30 * 30 * 3).
"""

import ctypes
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---- Config ----

gelu_tanh = partial(F.gelu, approximate="tanh")  # one kernel; in half precision more exact than step by step
ACTIVATIONS = {name: getattr(F, name) for name in "gelu silu mish relu relu6 leaky_relu sigmoid tanh".split()}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh) | {"swish": F.silu}


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


@dataclass
class PersimmonConfig:
    """The fields of `config.json` that decide the numbers, with the documented defaults (8B)."""

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384  # of use to dynamic rope_scaling only: longer texts work
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 25000.0
    rope_scaling: dict | None = None  # {"type": "linear" or "dynamic", "factor": above 1}
    qk_layernorm: bool = True
    hidden_dropout: float = 0.0  # after the MLP, the only one beside attention's; the hub's configs say 0.6
    attention_dropout: float = 0.0
    partial_rotary_factor: float = 0.5
    classifier_dropout: float | None = None  # of the token classifier; None: hidden_dropout
    num_labels: int = 2
    problem_type: str | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2  # the hub's configs say 71013
    pad_token_id: int | None = None

    model_type = "persimmon"

    @property
    def rotary_dim(self) -> int:
        """R, cut off as the reference does: int(0.29 * 100) is 28."""
        return int(self.partial_rotary_factor * (self.hidden_size // self.num_attention_heads))

    @property
    def rope_varies(self) -> bool:
        """Whether the rotary frequencies depend on the length of the text (dynamic NTK scaling)."""
        return self.rope_scaling is not None and self.rope_scaling["type"] == "dynamic"

    @classmethod
    def from_dict(cls, d: dict) -> "PersimmonConfig":
        """From a `config.json` of today; `formats/config.py` checks it, and makes one of any other era."""
        return cls(**{key: d[key] for key in cls.__dataclass_fields__ if key in d})

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, **asdict(self)}


@dataclass
class FuyuConfig:
    """The decoder's fields, and what its pictures are cut into. `text_config`, an object of the decoder's
    fields, wins over those beside it; afterwards it is the decoder's PersimmonConfig."""

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    image_size: int = 300  # of no use to any version
    patch_size: int = 30
    num_channels: int = 3
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 25000.0
    rope_scaling: dict | None = None
    qk_layernorm: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    partial_rotary_factor: float = 0.5
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2  # the hub's config says 71013, and text_config's is wrong
    text_config: Any = None
    image_token_id: int = 71011  # |SPEAKER|: where patches go if a call does not say

    model_type = "fuyu"

    def __post_init__(self) -> None:
        own, text = PersimmonConfig.__dataclass_fields__, self.text_config or {}
        text = text if isinstance(text, dict) else vars(text)
        beside = {key: value for key, value in vars(self).items() if not key.endswith("_token_id")}
        self.text_config = PersimmonConfig(**{k: v for k, v in {**beside, **text}.items() if k in own})
        vars(self).update({key: getattr(self.text_config, key) for key in beside if key in own})

    @classmethod
    def from_dict(cls, d: dict) -> "FuyuConfig":
        """From a `config.json` of today; `formats/config.py` checks it, and makes one of any other era."""
        return cls(**{key: d[key] for key in cls.__dataclass_fields__ if key in d})

    def to_dict(self) -> dict:
        """With the decoder's fields in `text_config` and beside it: 4.x reads some of them there."""
        return {"model_type": self.model_type, **asdict(self), "text_config": self.text_config.to_dict()}


def upcast(x: Tensor) -> Tensor:
    """x in float32 at least: float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- Rotary position embedding ----

OTHER_FREQUENCIES = (
    "rope_scaling gives a text of this length other frequencies than past_key_values has: "
    "pass the whole text without it, as generate does"
)


def rope_cos_sin(position_ids: Tensor, config: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, R) of the angles at `position_ids` (B, T), in x's dtype.

    Computed anew for every call, in float32 at least: there is no buffer that `.half()` could spoil.
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    R, theta, factor = config.rotary_dim, config.rope_theta, 1.0
    if config.rope_scaling:  # linear: positions are stretched
        factor = config.rope_scaling["factor"]
    if config.rope_varies:  # dynamic NTK: the base grows with the longest text of this call
        limit = config.max_position_embeddings
        length = (position_ids.amax() + 1).clamp(min=limit).to(compute_dtype)
        theta = theta * (factor * length / limit - (factor - 1)) ** (R / (R - 2))
        factor = 1.0
    exponents = torch.arange(0, R, 2, device=x.device).to(compute_dtype) / R
    inv_freq = 1.0 / theta**exponents / factor  # (R / 2,)
    angles = position_ids[:, None, :, None].to(compute_dtype) * inv_freq  # (B, 1, T, R / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with its first R dimensions rotated, i with i + R / 2: rotate_half, as in GPT-NeoX."""
    R = cos.shape[-1]
    x_rot, x_pass = x[..., :R], x[..., R:]
    first, second = x_rot.chunk(2, dim=-1)
    rotated_half = torch.cat([-second, first], dim=-1)
    return torch.cat([x_rot * cos + rotated_half * sin, x_pass], dim=-1)


# ---- Key/value cache ----


class KVCache:
    """Keys and values of every layer. `cache[i]` is layer i's `(k, v)`, (B, K, S, D) each; `len(cache)` is S.
    It grows by doubling, so that no step copies the past. `past`, a tuple of `(k, v)`, stays as it is."""

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = ()):
        self.buffers = [(k, v) for k, v in past]  # may be longer than what has been written
        self.lengths = [k.shape[2] for k, v in past]

    def __len__(self) -> int:
        return self.lengths[0] if self.lengths else 0

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.buffers[layer]
        return k[:, :, : self.lengths[layer]], v[:, :, : self.lengths[layer]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self.buffers)))  # as many as layers, not as positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, `(B, K, T, D)`; returns views of all S."""
        if layer == len(self.buffers):
            self.buffers.append((k, v))
            self.lengths.append(k.shape[2])
            return k, v
        (past_k, past_v), start = self.buffers[layer], self.lengths[layer]
        self.buffers[layer] = self.append(past_k, k, start), self.append(past_v, v, start)
        self.lengths[layer] = start + k.shape[2]
        return self[layer]

    def append(self, buffer: Tensor, new: Tensor, start: int) -> Tensor:
        """`buffer` with `new` written from `start` on: the same one, or if full one of twice the length."""
        if new.requires_grad:  # autograd needs the past as it was
            return torch.cat([buffer[:, :, :start], new], dim=2)
        B, K, T, D = new.shape
        if start + T > buffer.shape[2]:
            more = new.new_empty(B, K, max(start, T), D)
            buffer = torch.cat([buffer[:, :, :start], more], dim=2)
        buffer[:, :, start : start + T] = new
        return buffer

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        self.buffers = [(k[:, :, :n], v[:, :, :n]) for k, v in self]
        self.lengths = [min(n, length) for length in self.lengths]

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes what sequence `index[i]` was, as beam search needs it."""
        self.buffers = [(k[index], v[index]) for k, v in self]


def cache_of(past_key_values: Any, use_cache: bool) -> KVCache | None:
    """What was given, a tuple as a cache; where nothing was, with `use_cache` a new one."""
    if past_key_values is None and not use_cache:
        return None
    return past_key_values if isinstance(past_key_values, KVCache) else KVCache(past_key_values or ())


# ---- Attention ----


def check_attention_mask(mask: Tensor, B: int, T: int, S: int) -> None:
    shape = mask.shape if isinstance(mask, Tensor) else ()
    fits = shape[1:] == (S,) or (len(shape) == 4 and shape[2:] == (T, S))
    if not fits or shape[0] not in (1, B):
        wanted = f"a tensor ({B}, {S}), with the cached tokens, or ({B}, 1 or heads, {T}, {S})"
        raise ValueError(f"attention_mask must be {wanted}, not {tuple(shape) or type(mask).__name__}")


def packed_mask(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T) of documents packed into one sequence, which do not see each other: one begins wherever
    positions (B, T) do not go on."""
    segment_ids = F.pad((position_ids.diff(dim=1) != 1).long(), (1, 0)).cumsum(1)
    return (segment_ids[:, None, :, None] == segment_ids[:, None, None]).tril()


def causal_mask(T: int, S: int, mask: Tensor | None, x: Tensor, need_weights: bool) -> Tensor | None:
    """(1 or B, 1 or H, T, S) to add to the scores of the last T of S positions: 0 where a query sees a key,
    else -inf. None, unless `need_weights`, where the fused kernel needs none: plain causal, or one query.

    `mask`, the attention mask, is (B, S), 0 at padding; or replaces all else: (B, 1 or H, T, S), true where a
    query sees a key, or numbers to add.
    """
    if mask is None and not need_weights and (T == 1 or T == S):
        return None
    if mask is not None:
        check_attention_mask(mask, len(x), T, S)
        if mask.dim() == 4 and mask.dtype != torch.bool:
            return mask.to(x.dtype).clamp(min=torch.finfo(x.dtype).min)
    visible = causal = x.new_ones(1, 1, T, S, dtype=torch.bool).tril(S - T)
    if mask is not None:
        visible = mask if mask.dim() == 4 else visible & (mask != 0)[:, None, None]
    # A query that sees nothing, as padding on the left would, sees itself: softmax over nothing is NaN, and
    # the fused kernel's gradient of it wrong. Nobody reads the result.
    itself = causal.triu(S - T)  # of a tril: the diagonal
    visible = visible | (itself & ~visible.any(-1, keepdim=True))
    return x.new_zeros(visible.shape).masked_fill(~visible, -math.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(B, H, T, D) of q (B, H, T, D), k and v (B, H, S, D) by PyTorch's fused kernel; with `need_weights` by
    the formula, and the weights (B, H, T, S) as they multiply v. The fused kernel has no forward-mode
    derivative but in `sdpa_kernel(SDPBackend.MATH)` of `torch.nn.attention`."""
    # Two calls: torch.export refuses `is_causal=attn_mask is None and T > 1`, which is a symbol there.
    # T > 1 without a mask has no past, so that is_causal may count from the top left.
    if not need_weights and attn_mask is None and q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale), None
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, scale=scale), None
    scores = upcast(q) @ upcast(k).transpose(2, 3) * scale  # (B, H, T, S); they overflow float16
    scores = scores if attn_mask is None else scores + attn_mask
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ upcast(v)).to(q.dtype), weights.to(q.dtype)


class PersimmonAttention(nn.Module):
    # On a loaded model `kernels.prepare` replaces these two by faster ones of the same result.
    attend = staticmethod(attention)
    rotate = staticmethod(rotate)

    def __init__(self, config: PersimmonConfig, layer: int):
        super().__init__()
        C, D = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.layer, self.head_dim = layer, D
        self.query_key_value = nn.Linear(C, 3 * C)
        self.dense = nn.Linear(C, C)
        self.attention_dropout = config.attention_dropout
        self.q_layernorm: nn.Module = nn.Identity()
        self.k_layernorm: nn.Module = nn.Identity()
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None, cos_sin: tuple, cache: KVCache | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        # fused QKV: the rows of the first head's q, k and v, then the second's
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(3)  # (B, T, H, D)
        q, k, v = (part.transpose(1, 2) for part in (self.q_layernorm(q), self.k_layernorm(k), v))
        q, k = self.rotate(q, *cos_sin), self.rotate(k, *cos_sin)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = self.attend(q, k, v, attn_mask, self.head_dim**-0.5, dropout, need_weights)
        return self.dense(y.transpose(1, 2).flatten(2)), weights


# ---- MLP and layer ----


class PersimmonMLP(nn.Module):
    def __init__(self, config: PersimmonConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = (ACTIVATIONS | {"relu2": relu2})[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class PersimmonBlock(nn.Module):
    def __init__(self, config: PersimmonConfig, layer: int):
        super().__init__()
        self.self_attn = PersimmonAttention(config, layer)
        self.mlp = PersimmonMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, *attention_inputs: Any) -> tuple[Tensor, Tensor | None]:
        y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)  # pre-norm
        x = x + y  # into the residual stream
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x))), weights


# ---- Decoder ----


class ModelOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, T, C), after the final norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, each layer's output; the last is normed
    attentions: tuple[Tensor, ...] | None = None  # (B, H, T, S) per layer, as they multiply v


class PreTrainedModel(nn.Module):
    """What all models share: how weights start, and what a checkpoint says beside its tensors."""

    gradient_checkpointing = False  # true: in training keep what enters a layer, and compute the rest again

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.config_json: dict[str, Any] = {}  # what the checkpoint's files of these names say
        self.generation_config: dict[str, Any] = {}

    def init_weights(self, part: nn.Module | None = None) -> "PreTrainedModel":
        """Draw anew (all, or `part`): matrices N(0, initializer_range), norms 1, biases and padding 0."""
        part = self if part is None else part
        for name, p in part.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0.0, self.config.initializer_range)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        for module in part.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        return self

    def tie_weights(self) -> None:
        """Nothing, where there is no output layer."""


def check_ids(ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1]:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a tensor (batch, tokens), one token at least, not {found}")


def embed(embedding: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """(B, T, C) of whichever was given. ValueError for what are no ids of the vocabulary."""
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("give either input_ids or inputs_embeds")
    check_ids(input_ids)
    try:
        return embedding(input_ids)
    except (IndexError, RuntimeError) as error:
        wanted = f"int64 or int32, from 0 to {embedding.num_embeddings - 1} and on {embedding.weight.device}"
        raise ValueError(f"input_ids must be {wanted}: {str(error).splitlines()[0]}") from error


class PersimmonModel(PreTrainedModel):
    config_class = PersimmonConfig

    def __init__(self, config: PersimmonConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(PersimmonBlock(config, layer) for layer in layers)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C).

        `attention_mask`: see `causal_mask`. `position_ids` (B, T) or (T,), left out, go on from the cache's
        length. If they begin anew, without mask and with use_cache=False, packed documents are kept
        apart: 4.x sees one.
        """
        x = embed(self.embed_tokens, input_ids, inputs_embeds)
        checkpointing = self.gradient_checkpointing and self.training and past_key_values is None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = cache_of(past_key_values, use_cache and not checkpointing)
        (B, T, _), past = x.shape, len(cache or ())
        if self.config.rope_varies and past + T > self.config.max_position_embeddings:
            if past:  # hidden states of the past would have to change too; Transformers mixes frequencies
                raise ValueError(OTHER_FREQUENCIES)
            cache = None
        packed = position_ids is not None and attention_mask is None and cache is None
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)
        position_ids = position_ids.expand(B, T)
        if packed:
            attention_mask = packed_mask(position_ids)
        cos_sin = rope_cos_sin(position_ids, self.config, x)
        attn_mask = causal_mask(T, past + T, attention_mask, x, output_attentions)
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states.append(x)
            run = partial(checkpoint, layer, use_reentrant=False) if checkpointing else layer
            x, weights = run(x, attn_mask, cos_sin, cache, output_attentions)
            attentions.append(weights)
        x = self.final_layernorm(x)
        states = (*hidden_states, x) if output_hidden_states else None
        weights = tuple(attentions) if output_attentions else None
        return ModelOutput(x, cache if use_cache else None, states, weights)


# ---- Causal language model ----


class CausalLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, V), of the positions asked for
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def next_token_loss(x: Tensor, labels: Tensor, head: nn.Module, rows: int = 256) -> Tensor:
    """Mean cross-entropy of the tokens after the hidden states x (B, T, C): labels (B, T) are shifted here,
    not by the caller, and -100 is left out.

    The logits of `rows` positions at a time, which the backward pass computes again: all at once, those of
    4,096 positions would fill 4 GB, and their gradient as much.
    """
    x, labels = x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def part(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(upcast(head(x)), labels, reduction="sum")

    parts = list(zip(x.split(rows), labels.split(rows), strict=True))
    if len(parts) == 1:  # which torch.func can follow
        return part(x, labels) / (labels != -100).sum()
    total = sum(checkpoint(part, *both, use_reentrant=False) for both in parts)
    return total / (labels != -100).sum()


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: Any
) -> Tensor:
    """(B,) ids drawn from (B, V) float32 logits, in Transformers' order: a seed draws the same there."""
    logits = logits / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p is not None and top_p < 1:  # nucleus sampling: the likeliest whose probabilities reach top_p
        ascending, order = logits.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[:, -1] = False  # the likeliest token always stays
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)
    try:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    except RuntimeError as error:
        raise ValueError("no token can be drawn: the logits hold NaN, or -inf for every token") from error


class CausalLM(PreTrainedModel):
    """What a model with logits can do besides: `generate`. Every other way to decode is in `decoding`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | str | None = "checkpoint",
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        past_key_values: KVCache | None = None,
        **inputs: Any,
    ) -> Tensor:
        """(B, T + new) ids: the prompts (B, T), shorter ones padded on the left, and what follows them.

        `eos_token_id`: an id or several; left out the checkpoint's own, None never stops. `streamer` gets
        `put(prompts)`, `put(new ids)` a step, `end()`. `past_key_values` may hold the beginning of the
        prompts; in the end it holds all ids but the last, which is never fed. `inputs`: of `forward`.
        """
        check_prompt(input_ids, attention_mask, max_new_tokens)
        if do_sample:
            check_sampling(temperature, top_k, top_p)
        ids, cache = input_ids, past_key_values
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.long()
        eos, pad = self.special_ids(eos_token_id, pad_token_id)
        unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if streamer is not None:
            streamer.put(ids.cpu())
        for _ in range(max_new_tokens):
            output = self(**self.prepare_inputs(ids, mask, cache, **inputs), logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            new = sample(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
            new = torch.where(unfinished, new, pad)  # what has ended is padded while others go on
            if streamer is not None:
                streamer.put(new.cpu())
            ids = torch.cat([ids, new[:, None]], 1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
            unfinished &= ~torch.isin(new, eos.to(new.device))
            if not unfinished.any():
                break
        if streamer is not None:
            streamer.end()
        return ids

    def special_ids(self, eos: Any, pad: int | None) -> tuple[Tensor, int]:
        """The ids to stop at (n,), and the one that pads: `pad`, the checkpoint's, or the first stop id."""
        if eos == "checkpoint":
            eos = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        eos = [] if eos is None else list(eos) if isinstance(eos, Sequence) else [eos]
        if not all(isinstance(id, int) for id in eos) or not isinstance(pad, int | None):
            raise ValueError(f"eos_token_id and pad_token_id must be token ids or None, not {eos}, {pad!r}")
        stored = self.generation_config.get("pad_token_id")
        candidates = (pad, stored, self.config.pad_token_id, *eos, 0)
        return torch.tensor(eos, dtype=torch.long), next(id for id in candidates if id is not None)

    def prepare_inputs(self, ids: Tensor, mask: Tensor | None, cache: KVCache | None, **inputs: Any) -> dict:
        """Arguments of `forward` for those of `ids` (B, T) that `cache` does not hold yet."""
        past = len(cache or ())
        if past >= ids.shape[1]:
            raise ValueError(
                f"past_key_values holds {past} tokens of a prompt of {ids.shape[1]}: one must be new"
            )
        position_ids = None
        if mask is not None:  # count real tokens: padding on the left, itself at 0, moves no position
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        own = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}
        return {"input_ids": ids[:, past:], **own, **inputs}


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError for numbers by which nothing can be drawn."""
    for name, n, kind, low, high in (
        ("temperature", temperature, float, 1e-30, 1e30),
        ("top_k", top_k, int, 1, math.inf),
        ("top_p", top_p, float, 1e-30, 1),
    ):
        if n is not None and (not isinstance(n, int | kind) or not low <= n <= high):
            raise ValueError(f"{name} must be of type {kind.__name__}, from {low} to {high}, not {n!r}")


def check_prompt(ids: Tensor, mask: Tensor | None, max_new_tokens: int) -> None:
    """ValueError for what `generate` cannot begin with."""
    check_ids(ids)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number from 0 on, not {max_new_tokens!r}")
    if mask is not None and (getattr(mask, "shape", 0) != ids.shape or ((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"attention_mask must be a tensor {tuple(ids.shape)}, 0 at padding and 1 elsewhere")


class PersimmonForCausalLM(CausalLM):
    config_class = PersimmonConfig

    def __init__(self, config: PersimmonConfig):
        super().__init__(config)
        self.model = PersimmonModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights(self.lm_head).tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:  # weight tying
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """Logits (B, T, V) after `PersimmonModel.forward`; with `labels` (B, T) the `next_token_loss`.
        `logits_to_keep`: of how many last positions (0: all), or of which. The loss is that of all positions
        in any case, and needs no logits but its own: with long texts keep 1."""
        x, *rest = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None if labels is None else next_token_loss(x, labels, self.lm_head)
        return CausalLMOutput(loss, self.lm_head(x[:, kept]), *rest)

    def prepare_inputs(self, ids: Tensor, mask: Tensor | None, cache: KVCache | None, **inputs: Any) -> dict:
        """Past the limit of dynamic scaling every token takes a pass over the whole text."""
        too_long = self.config.rope_varies and ids.shape[1] > self.config.max_position_embeddings
        return super().prepare_inputs(ids, mask, None if too_long else cache, **inputs)


# ---- Fuyu ----


def check_patches(image_patches: Tensor | Sequence[Tensor], indices: Tensor, T: int) -> None:
    """ValueError unless each row has as many patches as places, which count them from 0."""
    counts = (indices >= 0).sum(1).tolist()
    if (indices[:, T:] >= 0).any():
        raise ValueError(f"image_patches_indices has patches beyond the {T} tokens of input_ids")
    if isinstance(image_patches, Tensor):
        size = len(image_patches.flatten(0, -2))
        if size != sum(counts):
            raise ValueError(f"{size} patches for {sum(counts)} places in input_ids")
    else:
        sizes = [len(row.flatten(0, -2)) for row in image_patches]
        if len(sizes) != len(counts):
            raise ValueError(f"image_patches has {len(sizes)} rows, input_ids {len(counts)}")
        for i, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            if size != count:
                raise ValueError(f"row {i} has {size} patches for {count} places in input_ids")
    if (indices >= (indices >= 0).sum(1, keepdim=True)).any():
        raise ValueError("image_patches_indices must count the patches of its row from 0")


class FuyuForCausalLM(CausalLM):
    config_class = FuyuConfig

    def __init__(self, config: FuyuConfig):
        super().__init__(config)
        self.vision_embed_tokens = nn.Linear(config.patch_size**2 * config.num_channels, config.hidden_size)
        self.language_model = PersimmonForCausalLM(config.text_config)
        self.init_weights(self.vision_embed_tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        image_patches: Tensor | Sequence[Tensor] | None = None,
        image_patches_indices: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """`PersimmonForCausalLM.forward`, with patches among the tokens.

        `image_patches`: one (N, P) or (1, N, P) per row, which may have none, or a tensor with all of them.
        `image_patches_indices` (B, T) says which patch of its row stands where, -1 where there is a word;
        left out, patches go in order wherever `input_ids` has `config.image_token_id`. Pictures belong to the
        first call; with a cache there is only text. ValueError if patches and places differ in number.
        """
        if image_patches is not None:
            if len(past_key_values or ()):
                raise ValueError("pictures belong to the first call, not to one with cached tokens")
            if inputs_embeds is not None:
                raise ValueError("give image_patches with input_ids, not with inputs_embeds")
            inputs_embeds = self.with_patches(input_ids, image_patches, image_patches_indices)
            input_ids = None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return self.language_model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            use_cache,
            output_attentions,
            output_hidden_states,
            logits_to_keep,
        )

    def with_patches(self, input_ids: Any, image_patches: Any, indices: Tensor | None) -> Tensor:
        """(B, T, C): words, and patches where they belong."""
        x = embed(self.language_model.model.embed_tokens, input_ids, None)
        T = x.shape[1]
        if indices is None:
            mask = input_ids == self.config.image_token_id
            indices = torch.where(mask, mask.long().cumsum(1) - 1, -1)
        if not torch.compiler.is_compiling():  # compilers cannot follow values
            check_patches(image_patches, indices, T)
        indices = F.pad(indices[:, :T], (0, T - min(T, indices.shape[1])), value=-1).to(x.device)
        rows = [image_patches] if isinstance(image_patches, Tensor) else image_patches
        patches = torch.cat([row.flatten(0, -2) for row in rows])
        patches = patches.to(x.device, x.dtype)
        if not len(patches):
            return x
        counts = (indices >= 0).sum(1)
        order = (indices + (counts.cumsum(0) - counts)[:, None]).clamp(min=0)
        return torch.where((indices >= 0)[..., None], self.vision_embed_tokens(patches)[order].to(x.dtype), x)

    def prepare_inputs(self, ids: Tensor, mask: Tensor | None, cache: KVCache | None, **inputs: Any) -> dict:
        """Pictures go in when a text begins."""
        text = self.config.text_config
        too_long = text.rope_varies and ids.shape[1] > text.max_position_embeddings
        if cache and not too_long:
            inputs = {key: value for key, value in inputs.items() if not key.startswith("image_patches")}
        return super().prepare_inputs(ids, mask, None if too_long else cache, **inputs)


# ---- Pictures ----


class FuyuImages(NamedTuple):
    """Pictures ready to be cut into patches; one list per text, of one picture or none."""

    images: list[list[Tensor]]  # (3, height, width), padded below and on the right to whole patches only
    image_unpadded_heights: list[list[int]]
    image_unpadded_widths: list[list[int]]
    image_scale_factors: list[list[float]]  # how much smaller than it was


class FuyuImageProcessor:
    """Pictures -> patches, bit for bit as Transformers 4.37.2 with Pillow; but any kind of picture works.

    `size` is the largest that is not scaled down. A picture is a Pillow image, an array or a tensor: (H, W),
    (H, W, colours) or (colours, H, W), of bytes, 16-bit numbers, or floats from 0 to 1.
    """

    def __init__(self, size: dict | None = None, patch_size: int | dict = 30, padding_value: float = 1.0):
        self.size, self.padding_value = size or {"height": 1080, "width": 1920}, padding_value
        self.patch_size = patch_size if isinstance(patch_size, int) else patch_size["height"]

    def preprocess(self, images: Any) -> FuyuImages:
        """One picture, a list, or a list of lists of at most one. ValueError for what is no picture."""
        rows = [[self.prepared(image) for image in row] for row in rows_of(images)]
        columns: list[Any] = [[[one[i] for one in row] for row in rows] for i in range(4)]
        return FuyuImages(*columns)

    def prepared(self, image: Any) -> tuple[Tensor, int, int, float]:
        """(picture (3, H, W) in whole patches, height and width without padding, scale)."""
        pixels = rgb(image)
        height, width, _ = pixels.shape
        scale = 1.0
        if height > self.size["height"] or width > self.size["width"]:
            fit = min(self.size["height"] / height, self.size["width"] / width)
            new = max(1, int(height * fit)), max(1, int(width * fit))  # cut off, as the reference: 1079 too
            pixels, scale = resized(pixels, *new), new[0] / height
            height, width = new
        bottom, right = -height % self.patch_size, -width % self.patch_size
        padding = round(self.padding_value)  # of 255: before rescaling
        pixels = F.pad(pixels, (0, 0, 0, right, 0, bottom), value=padding)
        values = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
        values = (values - 0.5) / 0.5
        return values[pixels.long()].permute(2, 0, 1), height, width, scale

    def patchify_image(self, image: Tensor) -> Tensor:
        """(..., N, P) of (..., 3, H, W): patches row by row, in each pixels row by row, of each 3 colours."""
        size = self.patch_size
        *batch, channels, height, width = image.shape
        cut = image.reshape(*batch, channels, height // size, size, width // size, size)
        b = len(batch)
        order = [*range(b), b + 1, b + 3, b + 2, b + 4, b]  # rows, columns, then inside a patch
        return cut.permute(order).reshape(*batch, -1, size * size * channels)

    def preprocess_with_tokenizer_info(
        self,
        image_input: Any,
        image_present: Any,
        image_unpadded_h: Any,
        image_unpadded_w: Any,
        image_placeholder_id: int,
        image_newline_id: int,
        variable_sized: bool = True,
    ) -> dict[str, list[list[Tensor]]]:
        """Patches, and the ids that stand for them: a placeholder for each, a newline after each row.

        `image_input` is a list of lists of pictures (3, H, W), or a tensor (B, pictures, 3, H, W);
        `image_present` says which of them are there. Without `variable_sized` padding counts as picture, and
        rows have no newline. The result has lists of lists; its indices count patches, -1 is elsewhere.
        """
        names = (
            "images",
            "image_input_ids",
            "image_patches",
            "image_patch_indices_per_batch",
            "image_patch_indices_per_subsequence",
        )
        result: dict[str, list] = {name: [] for name in names}
        for b, row in enumerate(image_input):
            ids, patches, row_indices, picture_indices, n = [], [], [], [], 0
            for i, image in enumerate(row):
                present = bool(torch.as_tensor(image_present[b][i]).any())
                if present and variable_sized:
                    image = self.cropped(image, int(image_unpadded_h[b][i]), int(image_unpadded_w[b][i]))
                if present:
                    patches.append(self.patchify_image(image))
                    result["images"].append([image])
                rows, columns = (n // self.patch_size * present for n in image.shape[1:])
                lines = torch.full((rows, columns), image_placeholder_id)
                lines = F.pad(lines, (0, 1), value=image_newline_id) if variable_sized else lines
                ids.append(lines.flatten())
                indices = counted(ids[-1] == image_placeholder_id)
                picture_indices.append(indices)
                row_indices.append(torch.where(indices >= 0, indices + n, -1))
                n += int((indices >= 0).sum())
            columns_of_row = (ids, patches, row_indices, picture_indices)
            for name, value in zip(names[1:], columns_of_row, strict=True):
                result[name].append(value)
        return result

    def cropped(self, image: Tensor, height: int, width: int) -> Tensor:
        """To the whole patches that hold anything of the picture."""
        bottom, right = (math.ceil(n / self.patch_size) * self.patch_size for n in (height, width))
        return image[:, :bottom, :right]


def counted(mask: Tensor) -> Tensor:
    """0, 1, 2 ... where `mask` (T,) holds, -1 elsewhere."""
    return torch.where(mask, mask.long().cumsum(0) - 1, -1)


def rows_of(images: Any) -> list[list]:
    """One picture, several, or lists of at most one, as the last."""
    if not isinstance(images, list | tuple):
        images = [images]
    rows = [list(row) if isinstance(row, list | tuple) else [] if row is None else [row] for row in images]
    if many := [len(row) for row in rows if len(row) > 1]:
        raise ValueError(f"a text has {many[0]} pictures: Fuyu sees one at a time")
    return rows


def rgb(image: Any) -> Tensor:
    """(H, W, 3) bytes of any picture: turned as its EXIF says, 16 bits cut to 8, transparency dropped."""
    if hasattr(image, "convert"):
        return pillow_rgb(image)
    writable = getattr(getattr(image, "flags", None), "writeable", True)  # PyTorch warns of others
    pixels = torch.as_tensor(image if writable else image.copy())
    if pixels.dim() == 2:
        pixels = pixels[..., None]
    if pixels.dim() == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.permute(1, 2, 0)
    if pixels.dim() != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.numel():
        raise ValueError(f"a picture is (height, width, 1, 3 or 4 colours), not {tuple(pixels.shape)}")
    if pixels.is_floating_point():
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("a picture of floats has values from 0 to 1; give bytes for 0 to 255")
        pixels = (pixels * 255).round()
    elif pixels.dtype == torch.uint16:
        pixels = pixels.int() >> 8
    elif pixels.dtype != torch.uint8:
        raise ValueError(f"a picture is of bytes, 16-bit numbers or floats, not of {pixels.dtype}")
    return pixels[..., :3].to(torch.uint8).expand(-1, -1, 3)


def pillow_rgb(image: Any) -> Tensor:
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow itself warns, and stops at the double
        raise ValueError(f"a picture of {width} x {height} pixels is larger than any that is honest")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    image = image.convert("RGB")
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bilinear filter, which looks at all pixels that become one."""
    from PIL import Image

    pixels = pixels.contiguous()
    content = ctypes.string_at(pixels.data_ptr(), pixels.numel())
    image = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), content)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)


# ---- Prompts and places ----


class Box(NamedTuple):
    """In pixels of the picture as it was."""

    top: int
    left: int
    bottom: int
    right: int


class Point(NamedTuple):
    x: int
    y: int


class Located(NamedTuple):
    """A generated text with its places."""

    ids: Tensor  # with the ids of `<box>12, 34, 56, 78</box>` for those of a box
    text: str
    places: list[Box | Point]  # in the order of the text


TAGS = {"<box>": "<0x00>", "</box>": "<0x01>", "<point>": "<0x02>", "</point>": "<0x03>"}
ANSWER = "<0x04>"  # the piece after which the model answers


class FuyuProcessor:
    """Texts and pictures -> the model's inputs, and its answers -> texts and places.

    `tokenizer` offers encode, decode and token_id (`decoders.tokenize`). Control tokens in a text stay text.
    """

    pad_token_id = 0

    def __init__(self, image_processor: FuyuImageProcessor, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.placeholder, self.newline = self.id_of("|SPEAKER|"), self.id_of("|NEWLINE|")

    def id_of(self, piece: str) -> int:
        id = self.tokenizer.token_id(piece)
        if id is None:
            raise ValueError(f"the vocabulary has no {piece}: it is not Fuyu's")
        return id

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` (B, T), padded on the left; with pictures also `image_patches`,
        one (1, N, P) per row, and `image_patches_indices` (B, T): which patch stands where, -1 elsewhere.

        A row is the picture, `<s>`, the text, `<0x04>`; without a picture, in a batch that has some, the same
        without it. Texts alone have `|ENDOFTEXT|` before them, and no `<0x04>`. ValueError for numbers of
        texts and pictures that differ, and for truncation, which would cut a picture.
        """
        if truncation or max_length is not None:
            raise ValueError("truncation would cut a picture or its question: shorten the text instead")
        if text is None and images is None:
            raise ValueError("give text, images, or both")
        texts = [text] if isinstance(text, str) else list(text or ())
        if images is None:
            return padded([self.tokenizer.encode(one, split_special_tokens=True) for one in texts])
        pictures = self.image_processor.preprocess(images)
        n = len(pictures.images)
        texts = [""] * n if text is None else texts
        if len(texts) != n:
            raise ValueError(f"{len(texts)} texts and {n} pictures: give [] for a text without a picture")
        present = [[1] * len(row) for row in pictures.images]
        info = self.image_processor.preprocess_with_tokenizer_info(
            pictures.images,
            present,
            pictures.image_unpadded_heights,
            pictures.image_unpadded_widths,
            self.placeholder,
            self.newline,
        )
        rows, places, patches = [], [], []
        for i, prompt in enumerate(texts):
            scale = pictures.image_scale_factors[i][0] if present[i] else 1.0
            words = [self.id_of("<s>"), *self.prompt_ids(prompt, scale), self.id_of(ANSWER)]
            rows.append([*(id for line in info["image_input_ids"][i] for id in line.tolist()), *words])
            known = [index for line in info["image_patch_indices_per_batch"][i] for index in line.tolist()]
            places.append(known + [-1] * len(words))
            size = self.image_processor.patch_size
            patches.append(torch.cat([torch.empty(0, 3 * size * size), *info["image_patches"][i]])[None])
        indices = padded(places, -1)["input_ids"]
        return {**padded(rows, self.pad_token_id), "image_patches": patches, "image_patches_indices": indices}

    def prompt_ids(self, prompt: str, scale: float) -> list[int]:
        """Ids of a text with `<box>` and `<point>`, each piece of text encoded by itself. How many numbers
        there are decides between box and point, and an open tag needs no end."""
        ids: list[int] = []
        after = ""
        for part in re.split("(" + "|".join(TAGS) + ")", prompt):
            if part and part not in TAGS:
                if after in ("<box>", "<point>"):
                    ids += self.place_ids(part, scale)
                else:
                    ids += self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
            after = part
        return ids

    def place_ids(self, numbers: str, scale: float) -> list[int]:
        """Six ids of "top, left, bottom, right", four of "x, y": halved, scaled, a token for each number."""
        try:
            values = [float(number) for number in numbers.split(",")]
            if not all(map(math.isfinite, values)):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{numbers!r} is no place: give <box>top, left, bottom, right</box> or <point>x, y</point>"
            ) from None
        if len(values) not in (2, 4):
            raise ValueError(f"{numbers!r} has {len(values)} numbers: a box has four, a point two")
        scale = torch.tensor(scale).item()  # in float32, as the reference: it decides between two roundings
        pieces = [str(round(value / 2 * scale)) for value in values]  # half to even
        if missing := [piece for piece in pieces if self.tokenizer.token_id(piece) is None]:
            raise ValueError(f"{numbers!r} lies outside: there is no token for {missing[0]:.20}")
        tags = ("<0x02>", "<0x03>") if len(values) == 2 else ("<0x00>", "<0x01>")
        return [self.id_of(tags[0]), *map(self.tokenizer.token_id, pieces), self.id_of(tags[1])]

    def post_process_box_coordinates(
        self, outputs: Sequence[Tensor], target_sizes: Any = None
    ) -> list[Located]:
        """Each row of ids with its boxes and points as text and in pixels.

        `target_sizes`: (height, width) of each picture as it was; left out, none was larger than 1080 x 1920.
        What is not an open tag, four numbers (two for a point) and the close tag stays as it is.
        """
        sizes = [None] * len(outputs) if target_sizes is None else list(target_sizes)
        if len(sizes) != len(outputs):
            raise ValueError(f"{len(outputs)} texts and {len(sizes)} target_sizes: give one for each")
        return [self.located(torch.as_tensor(row), size) for row, size in zip(outputs, sizes, strict=True)]

    def located(self, output: Tensor, size: Any) -> Located:
        limit, scale = self.image_processor.size, 1.0
        if size is not None and (size[0] > limit["height"] or size[1] > limit["width"]):
            scale = min(limit["height"] / float(size[0]), limit["width"] / float(size[1]))
        row, i = output.tolist(), 0
        ids: list[int] = []
        places: list[Box | Point] = []
        while i < len(row):
            place, n = self.place_at(row, i, scale)
            if place is None:
                ids.append(row[i])
                i += 1
                continue
            tag = "box" if isinstance(place, Box) else "point"
            text = f" <{tag}>{', '.join(map(str, place))}</{tag}>"
            ids += self.tokenizer.encode(text, add_special_tokens=False)[1:]
            places.append(place)
            i += n
        return Located(torch.tensor(ids, dtype=torch.long), self.tokenizer.decode(ids), places)

    def place_at(self, row: list[int], i: int, scale: float) -> tuple[Box | Point | None, int]:
        """The place that begins at position i, if one does, and how many ids it has."""
        for kind, start, end, n in ((Box, "<0x00>", "<0x01>", 4), (Point, "<0x02>", "<0x03>", 2)):
            if row[i] == self.id_of(start) and row[i + n + 1 : i + n + 2] == [self.id_of(end)]:
                inside = row[i + 1 : i + n + 1]
                numbers = [self.tokenizer.decode([id]) for id in inside]
                digits = all(number.isascii() and number.isdigit() for number in numbers)
                if digits and [self.tokenizer.token_id(number) for number in numbers] == inside:
                    return kind(*(2 * int(float(number) / scale) for number in numbers)), n + 2
        return None, 1


def padded(rows: list[list[int]], pad_id: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, T), shorter rows padded on the left."""
    T = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad_id] * (T - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows]),
    }

"""Persimmon (8B base and chat), all of it in this file: torch and the standard library are enough to copy it.

What is unusual about Persimmon
- The MLP's activation is the square of a ReLU. In float16 it overflows above 256: fine-tune in bfloat16.
- q and k go through a LayerNorm over each head, with weights that all heads share, before they are rotated
  (QK norm).
- One matrix gives q, k and v (fused QKV), and its rows belong to one head after the other: q, k, v of the
  first head, then of the second ... Biases everywhere except in the output layer.
- Rotary embedding (RoPE, rotate_half as in GPT-NeoX) of half of each head with base 25,000. Transformers 5.23
  takes 10,000 where `config.json` names none, and so changes every number of such a checkpoint; 4.x and
  Adept's own code take 25,000.
- 262,144 tokens: the logits of one position are a megabyte in float32. Generation computes those of the last
  position only, the loss those of a few hundred at a time.

Source: Elsen et al., Releasing Persimmon-8B (2023), adept.ai/blog/persimmon-8b. Checkpoints:
adept/persimmon-8b-base and -chat, and Adept's own release of both (`weights.py`). Agrees with Transformers
4.37.2, 4.50.3 and 5.24.0 (eager attention, base written out); comments tell where these differ.

Letters: B batch, T new tokens, S keys (cached + new), H heads, K as many, D head_dim, R rotary dimensions,
C hidden_size, V vocabulary.
"""

import math
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


# ---- Model ----


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

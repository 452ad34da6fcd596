"""GPT-Neo, all of it in this file: torch and the standard library are enough to copy it away.

What is unusual about GPT-Neo
- Global and local attention alternate. A local layer sees the last `window_size` tokens, itself counted.
- Scores are not divided by sqrt(D): the scale went into the initialisation. They grow large, so half
  precision computes them in float32.
- q, k and v have no bias, the output projection and the MLP do. Positions are learned, the output layer is
  tied to the token table.
- `token_type_ids` are looked up in the token table too: they have none of their own.

Source: Black et al., GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow (2021),
https://doi.org/10.5281/zenodo.5297715. Checkpoints: EleutherAI/gpt-neo-125m, -1.3B, -2.7B.
Agrees with Transformers 4.37.2, 4.50.3 and 5.23.0 (eager attention); comments tell where these differ.

Letters: B batch, T new tokens, S keys (cached + new), H heads, D head size, C width, V vocabulary.
The hub's files hold masks beside the weights, and no `lm_head.weight`: `load_state_dict(..., strict=False)`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- Config ------------------------------------------------------------------------------------------------

gelu_tanh = partial(F.gelu, approximate="tanh")  # one kernel; in half precision more exact than step by step
ACTIVATIONS = {
    "gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "silu": F.silu, "swish": F.silu, "mish": F.mish,
    "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "relu6": F.relu6, "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "linear": nn.Identity(),
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def check_fields(fields: dict, sizes: Sequence[str], rates: Sequence[str], choices: dict) -> None:
    """ValueError with key and value unless sizes are positive integers, rates in [0, 1], choices known."""
    for key in sizes:
        if type(fields[key]) is not int or fields[key] < 1:
            raise ValueError(f"{key} must be a positive integer, not {fields[key]!r}")
    for key in rates:
        if type(fields[key]) not in (int, float) or not 0 <= fields[key] <= 1:
            raise ValueError(f"{key} must be a number from 0 to 1, not {fields[key]!r}")
    for key, known in choices.items():
        if fields[key] not in list(known):
            raise ValueError(f"{key} {fields[key]!r} is not one of {', '.join(map(str, known))}")


@dataclass
class GPTNeoConfig:
    """The fields of `config.json` that decide the numbers, with the documented defaults."""

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: list = field(default_factory=lambda: [[["global", "local"], 12]])
    attention_layers: list[str] | None = None  # a name per layer; where given it wins over attention_types
    num_heads: int = 16
    intermediate_size: int | None = None  # None: 4 * hidden_size
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.attention_layers is None:
            try:
                self.attention_layers = [kind for kinds, n in self.attention_types for kind in kinds * n]
            except (TypeError, ValueError):
                told = repr(self.attention_types)
                raise ValueError(f"attention_types is no list of [names, times]: {told}") from None
        sizes = ["vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads",
                 "window_size", "num_labels"]
        sizes += [] if self.intermediate_size is None else ["intermediate_size"]
        rates = [key for key in self.__dataclass_fields__ if key.endswith("_dropout")]
        choices = {"activation_function": ACTIVATIONS, "problem_type": PROBLEM_TYPES}
        check_fields(vars(self), sizes, [*rates, "layer_norm_epsilon", "initializer_range"], choices)
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        if any(kind not in ("global", "local") for kind in self.attention_layers):
            raise ValueError(f"attention_layers knows global and local only, not {self.attention_layers!r}")
        if len(self.attention_layers) != self.num_layers:
            named = len(self.attention_layers)
            raise ValueError(f"num_layers {self.num_layers}, but attention_layers has {named}")

    @classmethod
    def from_dict(cls, d: dict) -> "GPTNeoConfig":
        """From a `config.json` of any era. ValueError for what is missing or cannot be honoured."""
        renamed = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
        d = {renamed.get(key, key): value for key, value in d.items()}
        if d.get("model_type", "gpt_neo") != "gpt_neo":
            raise ValueError(f"model_type {d['model_type']!r} is not gpt_neo")
        if d.get("quantization_config"):
            raise ValueError("quantization_config: quantised weights are not supported")
        needed = ["vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads"]
        if "attention_layers" not in d:
            needed.append("attention_types")
        if missing := [key for key in needed if key not in d]:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        if "num_labels" not in d and d.get("id2label"):
            d["num_labels"] = len(d["id2label"])
        return cls(**{key: d[key] for key in cls.__dataclass_fields__ if key in d})

    def to_dict(self) -> dict:
        return {"model_type": "gpt_neo", **asdict(self)}

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head size) of the keys, and of the values."""
        return self.num_layers, self.num_heads, self.hidden_size // self.num_heads


# ---- Linear ------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, which on a CPU and without autograd takes the kernel that reads the weights fastest.

    For float32 PyTorch calls MKL; oneDNN takes half its time for few rows, and less for many (measured on an
    AMD EPYC). For bfloat16 it calls oneDNN; its own product takes half the time of that for a single row.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if not (x.is_cpu and onednn) or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    torch.backends.mkldnn.enabled = x.numel() > x.shape[-1]  # off for one row
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = True


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


# ---- Key/value cache ---------------------------------------------------------------------------------------


def append(buffer: Tensor, new: Tensor, start: int) -> Tensor:
    """`buffer` with `new` written at position `start`: the same one, or if full one of twice the length."""
    B, K, T, D = new.shape
    if new.requires_grad:  # autograd needs the past as it was
        return torch.cat([buffer[:, :, :start], new], dim=2)
    if start + T > buffer.shape[2]:
        grown = new.new_empty(B, K, max(2 * start, start + T), D)
        grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    buffer[:, :, start : start + T] = new
    return buffer


class KVCache:
    """Keys and values of every layer. `cache[i]` is layer i's `(k, v)`, (B, K, S, D) each; `len(cache)` is S.

    It grows by doubling, so that no step copies the past. `past`, a tuple of `(k, v)`, stays as it is.
    """

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = ()):
        self.buffers = [(k, v) for k, v in past]  # may be longer than what has been written
        self.lengths = [k.shape[2] for k, v in past]
        self.rope: Tensor | None = None  # (B,) which frequencies turned each row's keys, where these vary
        self.memory = torch.empty(0)

    def __len__(self) -> int:
        return self.lengths[0] if self.lengths else 0

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.buffers[layer]
        return k[:, :, : self.lengths[layer]], v[:, :, : self.lengths[layer]]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, `(B, K, T, D)`; returns views of all S."""
        if layer == len(self.buffers):
            self.buffers.append((k, v))
            self.lengths.append(k.shape[2])
            return k, v
        start, (past_k, past_v) = self.lengths[layer], self.buffers[layer]
        self.buffers[layer] = append(past_k, k, start), append(past_v, v, start)
        self.lengths[layer] = start + k.shape[2]
        return self[layer]

    def scratch(self, wanted: int, needed: int) -> Tensor:
        """At least `needed` float32 numbers of memory on the CPU, kept for the next call."""
        if len(self.memory) < needed:
            self.memory = torch.empty(max(wanted, needed))
        return self.memory

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        self.buffers = [(k[:, :, :n], v[:, :, :n]) for k, v in self]
        self.lengths = [min(n, length) for length in self.lengths]

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was, as beam search needs it."""
        self.buffers = [(k[index], v[index]) for k, v in self]
        self.rope = None if self.rope is None else self.rope[index]


# ---- Attention ---------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Some queries, the keys that they need, and what to add to the scores between them."""

    queries: slice
    keys: slice
    mask: Tensor | None  # (1 or B, 1, queries, keys); None: plain causal, or one query that sees every key


def attention_blocks(T: int, S: int, window: int, padding: Tensor | None, like: Tensor,
                     whole: bool) -> list[Block]:
    """Cut causal attention of the last T of S positions into blocks; a query sees `window` keys with itself.

    A short window gives blocks of `window` queries and at most 2 * window - 1 keys: there is no T x T mask,
    and a decoding step reads its window only. `whole` asks for one block with all keys and a mask.
    """
    past, step, blocks = S - T, T if whole else min(window, T), []
    for start in range(0, T, step):
        stop = min(start + step, T)
        first = 0 if whole else max(0, past + start - window + 1)
        mask = None
        if whole or padding is not None or not (T == 1 or (past == 0 and window >= T)):
            rows = torch.arange(past + start, past + stop, device=like.device)
            distance = rows[:, None] - torch.arange(first, past + stop, device=like.device)
            mask = like.new_zeros(1, 1, *distance.shape)
            mask = mask.masked_fill((distance < 0) | (distance >= window), -math.inf)
            if padding is not None:  # finite: a row that sees only padding must not become NaN
                mask = mask + padding[..., first : past + stop]
        blocks.append(Block(slice(start, stop), slice(first, past + stop), mask))
    return blocks


def padding_bias(attention_mask: Tensor | None, S: int, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, S) to add to the scores: the lowest finite number at padding. None if there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != S:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be (batch, {S}), with the cached tokens, not {shape}")
    padding = attention_mask == 0
    if not padding.any():
        return None
    return torch.zeros_like(padding, dtype=dtype).masked_fill(padding, torch.finfo(dtype).min)[:, None, None]


def spelled_out_attention(q, k, v, mask, scale, dropout=0.0, head_mask=None) -> tuple[Tensor, Tensor]:
    """The formula: (B, H, T, D), and the weights (B, H, T, S) as they multiply v. Head h of q reads head
    h // (H / K) of k and v."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)  # scores of half-precision q and k overflow float16
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) * scale  # (B, H, T, S)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout)
    if head_mask is not None:
        weights = weights * head_mask.view(-1, 1, 1)
    return (weights @ v.to(wide)).to(q.dtype), weights.to(q.dtype)


def fast_attention(q, k, v, mask, scale, dropout=0.0, cache=None) -> Tensor:
    """What `spelled_out_attention` computes, by PyTorch's fused kernel."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if T == 1:  # heads that share keys are rows of one product
        q = q.reshape(B, K, H // K, D)
        if q.is_cpu and q.dtype.itemsize == 2 and cache is not None and not torch.is_grad_enabled():
            y = one_query_attention(q, k, v, mask, scale, cache.scratch(2**19, k[0, 0].numel()))
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return y.view(B, H, 1, D)
    if K < H:
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    causal = mask is None  # aligned to the top left: right, as there is no past then
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)


def one_query_attention(q, k, v, mask, scale, scratch: Tensor) -> Tensor:
    """The same for one half-precision token on a CPU, where the fused kernel takes three times as long.
    q is (B, K, H / K, D).

    The keys of a few heads, then their values, become float32 in `scratch`, which is the same memory for all
    layers and steps: asking the system for new memory would cost more than the copying.
    """
    S, D = k.shape[2:]
    step, y = scratch.numel() // (S * D), torch.empty_like(q)
    for b in range(len(q)):
        for start in range(0, q.shape[1], step):
            heads = slice(start, start + step)
            wide = scratch[: k[b, heads].numel()].view(-1, S, D)
            scores = q[b, heads].float() @ wide.copy_(k[b, heads]).transpose(1, 2) * scale
            weights = (scores if mask is None else scores + mask[b % len(mask)]).softmax(-1)
            y[b, heads] = (weights @ wide.copy_(v[b, heads])).to(q.dtype)
    return y


class GPTNeoSelfAttention(nn.Module):
    def __init__(self, config: GPTNeoConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.layer, self.num_heads = layer, config.num_heads
        self.k_proj = Linear(C, C, bias=False)
        self.v_proj = Linear(C, C, bias=False)
        self.q_proj = Linear(C, C, bias=False)
        self.out_proj = Linear(C, C)
        self.attention_dropout = config.attention_dropout
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, blocks: list[Block], cache: KVCache, head_mask: Tensor | None, whole: bool):
        B, T, C = x.shape
        q, k, v = (
            proj(x).view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)  # (B, H, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        dropout, weights = self.attention_dropout if self.training else 0.0, None
        if whole:
            y, weights = spelled_out_attention(q, k, v, blocks[0].mask, 1.0, dropout, head_mask)
        else:
            y = torch.cat([
                fast_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, 1.0, dropout, cache)
                for queries, keys, mask in blocks
            ], dim=2)
        return self.resid_dropout(self.out_proj(y.transpose(1, 2).reshape(B, T, C))), weights


# ---- MLP and layer -----------------------------------------------------------------------------------------


class GPTNeoMLP(nn.Module):
    def __init__(self, config: GPTNeoConfig):
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GPTNeoBlock(nn.Module):
    def __init__(self, config: GPTNeoConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = nn.ModuleDict({"attention": GPTNeoSelfAttention(config, layer)})  # the hub's double name
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPTNeoMLP(config)

    def forward(self, x: Tensor, *attention_inputs) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attn["attention"](self.ln_1(x), *attention_inputs)
        x = x + y
        return x + self.mlp(self.ln_2(x)), weights


# ---- Model -------------------------------------------------------------------------------------------------


class ModelOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, T, C), after the final norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, each layer's output; the last is normed
    attentions: tuple[Tensor, ...] | None = None  # (B, H, T, S) per layer, after dropout and head_mask


class PreTrainedModel(nn.Module):
    """What all models share: how weights start, what is tied, what the checkpoint says about generation."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.generation_config: dict[str, Any] = {}  # the content of generation_config.json

    def tie_weights(self) -> None:
        """Make tied tensors one again; needed after `load_state_dict(..., assign=True)`."""

    @torch.no_grad()
    def init_weights(self, part: nn.Module | None = None) -> "PreTrainedModel":
        """Draw all weights or those of `part`: matrices N(0, initializer_range), biases 0, norms 1."""
        for name, p in (part or self).named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, self.config.initializer_range)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


class GPTNeoModel(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embed_dropout)
        self.h = nn.ModuleList(GPTNeoBlock(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor | None = None, *, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None, position_ids: Tensor | None = None,
                head_mask: Tensor | None = None, inputs_embeds: Tensor | None = None,
                past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
                use_cache: bool | None = None, output_attentions: bool = False,
                output_hidden_states: bool = False) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C).

        `attention_mask` (B, S) is 1 for tokens and 0 for padding. `position_ids` (B, T), left out, go on from
        the cache's length whatever the mask says. `head_mask` (H,) or (layers, H) multiplies the weights.
        ValueError where shapes disagree or the text is longer than `max_position_embeddings`.
        """
        x = embed(self.wte, input_ids, inputs_embeds)
        cache = past_key_values if isinstance(past_key_values, KVCache) else KVCache(past_key_values or ())
        T, S, positions = x.shape[1], len(cache) + x.shape[1], self.config.max_position_embeddings
        if S > positions:
            raise ValueError(f"{S} tokens, but the model has {positions} positions")
        if position_ids is None:
            position_ids = torch.arange(S - T, S, device=x.device)
        x = x + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = self.drop(x)

        padding = padding_bias(attention_mask, S, x.dtype)
        # Spelled out where weights are asked for; and in training on left padding, since the fused kernel's
        # gradients are wrong for rows that see only padding: log(n) drowns in the mask's lowest number.
        whole = output_attentions or head_mask is not None
        whole = whole or (torch.is_grad_enabled() and padding is not None and bool(padding[..., 0].any()))
        windows = {"global": S, "local": self.config.window_size}
        blocks = {kind: attention_blocks(T, S, windows[kind], padding, x, whole) for kind in windows}
        hidden_states, attentions = [], []
        for i, layer in enumerate(self.h):
            if output_hidden_states:
                hidden_states.append(x)
            layer_heads = head_mask if head_mask is None or head_mask.dim() == 1 else head_mask[i]
            x, weights = layer(x, blocks[self.config.attention_layers[i]], cache, layer_heads, whole)
            attentions.append(weights)
        x = self.ln_f(x)
        cached = self.config.use_cache if use_cache is None else use_cache
        return ModelOutput(
            last_hidden_state=x,
            past_key_values=cache if cached else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def embed(table: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """(B, T, C) of whichever was given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is None:
        return inputs_embeds
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, tokens), not {tuple(input_ids.shape)}")
    return table(input_ids)


# ---- Causal language model ---------------------------------------------------------------------------------


class CausalLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, V), of the positions that logits_to_keep asks for; (B, labels) from a classifier
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def check_generation(T, cached, positions, max_new_tokens, temperature, top_k, top_p,
                     repetition_penalty) -> None:
    if T < 1 or max_new_tokens < 0:
        raise ValueError(f"the prompt has {T} tokens, max_new_tokens is {max_new_tokens}: 1 and 0 at least")
    if cached >= T:
        raise ValueError(f"past_key_values holds {cached} tokens of a prompt of {T}: one must be new")
    if positions is not None and T + max_new_tokens - 1 > positions:  # the last new token is not fed
        raise ValueError(f"{T} prompt + {max_new_tokens} new tokens do not fit into {positions} positions")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}; for greedy text do_sample=False")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if repetition_penalty is not None and not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be above 0, not {repetition_penalty}")


def next_token(seen, logits, do_sample, temperature, top_k, top_p, repetition_penalty, generator) -> Tensor:
    """(B,) ids from (B, V) float32 logits, in Transformers' order: a seed draws the same tokens there."""
    if repetition_penalty is not None:
        old = logits.gather(1, seen)
        old = torch.where(old < 0, old * repetition_penalty, old / repetition_penalty)
        logits = logits.scatter(1, seen, old)
    if not do_sample:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[:, -1] = False  # the likeliest token always stays
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class GenerationMixin:
    """`generate`, for a model with logits, a cache and `max_positions` (None: no limit)."""

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int,
                 do_sample: bool = False, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, repetition_penalty: float | None = None,
                 eos_token_id: int | Sequence[int] | str | None = "checkpoint",
                 pad_token_id: int | None = None, generator: torch.Generator | None = None,
                 streamer: Any = None, logits_processor: Sequence[Callable] = (),
                 stopping_criteria: Sequence[Callable] = (), use_cache: bool = True,
                 past_key_values: KVCache | None = None, **inputs) -> Tensor:
        """(B, T + new) ids: the prompts (B, T), shorter ones padded on the left, and what follows them.

        `eos_token_id`: an id or several; left out it is the checkpoint's own, None never stops. Finished rows
        are filled with `pad_token_id`. Each processor maps (ids, float32 logits) to logits, each criterion to
        True or (B,) booleans where to stop. `streamer` gets `put(prompts)`, `put(new ids)` a step, `end()`.
        `past_key_values` holds the beginning of the prompts already, and in the end all but the last ids.
        `inputs`, such as pictures, go to the forward passes that begin a text.
        """
        cache = past_key_values if past_key_values is not None else KVCache() if use_cache else None
        check_generation(input_ids.shape[1], len(cache or ()), self.max_positions, max_new_tokens,
                         temperature, top_k, top_p, repetition_penalty)
        eos, pad = self.special_ids(eos_token_id, pad_token_id, input_ids.device)
        ids, mask = input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if streamer is not None:
            streamer.put(ids.cpu())
        for _ in range(max_new_tokens):
            if cache is not None and not self.cache_serves(cache, mask):
                cache.truncate(0)
            new = ids[:, len(cache or ()) :]  # the whole prompt first, then one token a step
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            logits = self(new, attention_mask=mask, position_ids=places, past_key_values=cache,
                          use_cache=cache is not None, logits_to_keep=1,
                          **({} if cache else inputs)).logits[:, -1].float()
            for processor in logits_processor:
                logits = processor(ids, logits)
            seen = ids.where(mask.bool(), ids[:, -1:])  # padding earns no penalty, as in Transformers 5
            token = next_token(seen, logits, do_sample, temperature, top_k, top_p, repetition_penalty,
                               generator)
            token = torch.where(running, token, pad)
            ids, mask = torch.cat([ids, token[:, None]], 1), F.pad(mask, (0, 1), value=1)
            if streamer is not None:
                streamer.put(token.cpu())
            running &= ~torch.isin(token, eos)
            for criterion in stopping_criteria:
                running &= ~torch.as_tensor(criterion(ids, logits), device=ids.device)
            if not running.any():
                break
        if streamer is not None:
            streamer.end()
        return ids

    def cache_serves(self, cache: KVCache, mask: Tensor) -> bool:
        """Whether what is cached holds for texts of `mask`'s length; if not it is computed anew."""
        return True

    def special_ids(self, eos, pad: int | None, device) -> tuple[Tensor, int]:
        """The ids to stop at (n,), and the filler: `pad`, else the checkpoint's, else the first stop id."""
        if eos == "checkpoint":
            eos = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        fillers = (pad, self.generation_config.get("pad_token_id"), self.config.pad_token_id, *eos, 0)
        return torch.tensor(eos, dtype=torch.long, device=device), next(i for i in fillers if i is not None)


class GPTNeoForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.max_positions = config.max_position_embeddings
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                logits_to_keep: int | Tensor = 0, **inputs) -> CausalLMOutput:
        """Logits (B, T, V) after `GPTNeoModel.forward`; with `labels` (B, T) the loss of the next tokens too.

        Labels are not shifted, -100 is left out. `logits_to_keep`: how many last ones (0: all), or which.
        """
        output = self.transformer(input_ids, **inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:  # in float32, as Transformers 5; 4.x rounds it to the logits' dtype
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss, logits, *output[1:])


# ---- Heads -------------------------------------------------------------------------------------------------


class TokenClassifierOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, labels)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class QuestionAnsweringOutput(NamedTuple):
    loss: Tensor | None
    start_logits: Tensor  # (B, T)
    end_logits: Tensor  # (B, T)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def last_token(input_ids: Tensor | None, x: Tensor, pad_token_id: int | None) -> Tensor | int:
    """(B,) index of each row's last token that is not padding, as Transformers 4.50 and 5. 4.37 looks for the
    first pad id instead, and so cuts a text that contains it. The mask has no say in any version."""
    B, T, _ = x.shape
    if pad_token_id is None and B > 1:
        raise ValueError(f"a batch of {B} needs config.pad_token_id to find the end of each row")
    if pad_token_id is None or input_ids is None:
        return T - 1
    return (torch.arange(T, device=x.device) * (input_ids != pad_token_id)).argmax(-1)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Regression, one label or several: as `problem_type` says, else as the labels suggest."""
    num_labels = logits.shape[-1]
    if problem_type is None:
        kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem_type = "regression" if num_labels == 1 else kind
    if problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


class GPTNeoForSequenceClassification(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                **inputs) -> CausalLMOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""
        output = self.transformer(input_ids, **inputs)
        x = output.last_hidden_state
        last = last_token(input_ids, x, self.config.pad_token_id)
        logits = self.score(x[torch.arange(len(x), device=x.device), last])
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return CausalLMOutput(loss, logits, *output[1:])


class GPTNeoForTokenClassification(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                **inputs) -> TokenClassifierOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""
        output = self.transformer(input_ids, **inputs)
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss, logits, output.hidden_states, output.attentions)


class GPTNeoForQuestionAnswering(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.qa_outputs = Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor | None = None, *, start_positions: Tensor | None = None,
                end_positions: Tensor | None = None, **inputs) -> QuestionAnsweringOutput:
        """Logits (B, T) of where the answer starts and ends. Positions (B,) are clamped to the text; those
        past its end do not count in the loss."""
        output = self.transformer(input_ids, **inputs)
        start, end = self.qa_outputs(output.last_hidden_state).unbind(-1)  # (B, T) each
        loss = None
        if start_positions is not None and end_positions is not None:
            T = start.shape[1]
            first, last = (positions.view(-1).clamp(0, T) for positions in (start_positions, end_positions))
            cross_entropy = partial(F.cross_entropy, ignore_index=T)
            loss = (cross_entropy(start, first) + cross_entropy(end, last)) / 2
        return QuestionAnsweringOutput(loss, start, end, output.hidden_states, output.attentions)

"""Phi-3 (mini, medium, 3.5, phi-4, phi-4-mini), all of it in this file: torch and the standard library are
enough to copy it.

What is unusual about Phi-3
- q, k and v come out of one matrix, the MLP's gate and up out of another: [q | k | v] and [gate | up].
- RMSNorm rounds to the model's dtype before it multiplies by its weight. No bias anywhere.
- Fewer key/value heads than heads in medium, phi-4 and phi-4-mini; rotary on three quarters of a head in
  phi-4-mini, whose output layer is tied to the token table.
- A window: mini-4k and medium-4k see 2,047 tokens, the token itself counted.
- longrope, for 128k tokens: each rotary frequency is divided by a factor of its own, out of one list up to
  4,096 tokens and out of another beyond. The longest text of a call decides for all its positions and rows,
  so that the keys of a text that grows past the limit are computed anew, once (docs/longrope.md). With
  `rope_per_row=True` every row decides for itself.

Source: Abdin et al., Phi-3 Technical Report (2024), arXiv:2404.14219; Phi-4 (2024), arXiv:2412.08905; Ding et
al., LongRoPE (2024), arXiv:2402.13753. Checkpoints: microsoft/Phi-3-mini-4k-instruct, -mini-128k-instruct,
-medium-4k-instruct, -medium-128k-instruct, Phi-3.5-mini-instruct, phi-4, Phi-4-mini-instruct and -reasoning;
Phi-3-small, -vision and -MoE are other architectures. Agrees with Transformers 4.50.3 and 5.23.0 (eager
attention); comments tell where these differ.

Letters: B batch, T new tokens, S keys (cached + new), H heads, K key/value heads, D head size, R rotary
dimensions, C width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


def rope_type(scaling: dict) -> str | None:
    return scaling.get("type", scaling.get("rope_type"))


def flat_rope(d: dict) -> dict:
    """A config with Transformers 5's nested `rope_parameters` as the flat fields of all earlier versions."""
    nested = dict(d.get("rope_parameters") or {})
    kind = nested.pop("rope_type", nested.pop("type", "default"))
    flat = {key: nested.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in nested}
    if kind != "default":
        flat["rope_scaling"] = {"type": kind, **nested}
    return {**d, **flat}


LONGROPE = ("longrope", "su", "yarn")  # the last two are its names of 2024
LONGROPE_KEYS = {"type", "rope_type", "short_factor", "long_factor", "factor", "attention_factor",
                 "original_max_position_embeddings"}


def check_longrope(scaling: dict | None, R: int) -> None:
    """ValueError unless `rope_scaling` is None or longrope with R / 2 positive numbers in both lists."""
    if scaling is None:
        return
    if not isinstance(scaling, dict) or rope_type(scaling) not in LONGROPE:
        raise ValueError(f"rope_scaling {scaling!r} has none of the types {', '.join(LONGROPE)}")
    if unknown := scaling.keys() - LONGROPE_KEYS:
        raise ValueError(f"rope_scaling has {', '.join(sorted(unknown))}, which longrope does not know")
    for key in ("short_factor", "long_factor"):
        numbers = scaling.get(key)
        if not isinstance(numbers, list) or len(numbers) != R // 2:
            found = f"a list of {len(numbers)}" if isinstance(numbers, list) else repr(numbers)
            raise ValueError(f"rope_scaling {key} must be a list of {R // 2} numbers, not {found}")
        if bad := [n for n in numbers if type(n) not in (int, float) or not 0 < n < math.inf]:
            raise ValueError(f"rope_scaling {key} must hold positive numbers, not {bad[0]!r}")
    for key in ("factor", "attention_factor"):
        number = scaling.get(key)
        if number is not None and (type(number) not in (int, float) or not 0 < number < math.inf):
            raise ValueError(f"rope_scaling {key} must be a positive number, not {number!r}")


@dataclass
class Phi3Config:
    """The fields of `config.json` that decide the numbers, with the documented defaults (mini-4k)."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    resid_pdrop: float = 0.0  # twice: after attention and after the MLP
    embd_pdrop: float = 0.0  # without effect, as in every version of Transformers
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096  # of use to longrope only: longer texts work
    original_max_position_embeddings: int = 4096  # from here on the long factors
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"type": "longrope", "short_factor": [R / 2], "long_factor": [R / 2]}
    partial_rotary_factor: float = 1.0
    rope_per_row: bool = False  # True: each row of a batch takes the factors of its own length
    sliding_window: int | None = None  # how many tokens a token sees, itself counted
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None  # of the token classifier, where classifier_dropout is None; else 0.1
    num_labels: int = 2
    problem_type: str | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings",
                 "num_labels"]
        sizes += [key for key in ("head_dim", "sliding_window") if getattr(self, key) is not None]
        rates = ["resid_pdrop", "embd_pdrop", "attention_dropout", "rms_norm_eps", "initializer_range",
                 "partial_rotary_factor"]
        rates += [key for key in ("classifier_dropout", "hidden_dropout") if getattr(self, key) is not None]
        check_fields(vars(self), sizes, rates, {"hidden_act": ACTIVATIONS, "problem_type": PROBLEM_TYPES})
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and C % H:
            raise ValueError(f"num_attention_heads {H} does not divide hidden_size {C}")
        if H % K:
            raise ValueError(f"num_key_value_heads {K} does not divide num_attention_heads {H}")
        if type(self.rope_theta) not in (int, float) or not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be a positive number, not {self.rope_theta!r}")
        if self.rotary_size < 2 or self.rotary_size % 2:
            told = f"partial_rotary_factor {self.partial_rotary_factor!r} turns {self.rotary_size} dimensions"
            raise ValueError(f"{told} of a head: it must be an even number of them")
        check_longrope(self.rope_scaling, self.rotary_size)
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside vocab_size {self.vocab_size}")

    @property
    def head_size(self) -> int:
        """D."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """R, cut off as the reference does."""
        return int(self.partial_rotary_factor * self.head_size)

    @property
    def rope_varies(self) -> bool:
        """Whether the rotary frequencies depend on the length of the text."""
        return self.rope_scaling is not None

    def rope_of(self, lengths: Tensor) -> Tensor:
        """(B,) whether texts of `lengths` (B,) tokens take the long factors: as the longest does, or each for
        itself."""
        if not self.rope_varies:
            return torch.zeros_like(lengths)
        lengths = lengths if self.rope_per_row else lengths.max().expand_as(lengths)
        return lengths > self.original_max_position_embeddings

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied with under both lists: sqrt(1 + ln(max / original) / ln(original)).
        That is 1.1902 for 128k. `yarn` meant 0.1 ln(max / original) + 1 in 4.40, but no known checkpoint."""
        scaling = self.rope_scaling or {}
        if scaling.get("attention_factor") is not None:
            return scaling["attention_factor"]
        original = self.original_max_position_embeddings
        stretch = scaling.get("factor") or self.max_position_embeddings / original
        return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head size) of the keys, and of the values."""
        return self.num_hidden_layers, self.num_key_value_heads, self.head_size

    @classmethod
    def from_dict(cls, d: dict) -> "Phi3Config":
        """From a `config.json` of any era. ValueError for what is missing or cannot be honoured."""
        if d.get("model_type", "phi3") != "phi3":
            raise ValueError(f"model_type {d['model_type']!r} is not phi3")
        for key in ("quantization_config", "attention_bias", "mlp_bias", "lm_head_bias"):
            if d.get(key):
                raise ValueError(f"{key} {d[key]!r} is not supported")
        d = flat_rope(d)
        needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads"]
        if missing := [key for key in needed if key not in d]:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        if "num_labels" not in d and d.get("id2label"):
            d["num_labels"] = len(d["id2label"])
        if isinstance(scaling := d.get("rope_scaling"), dict) and rope_type(scaling) in LONGROPE:
            nested = scaling.get("original_max_position_embeddings")
            if nested is not None:  # Transformers 5 writes it there, and reads 4,096 if it stands only there
                d.setdefault("original_max_position_embeddings", nested)
            left_out = ("type", "rope_type", "original_max_position_embeddings")
            others = {key: value for key, value in scaling.items() if key not in left_out}
            d["rope_scaling"] = {"type": "longrope", **others}  # the name that every version can read
        return cls(**{key: d[key] for key in cls.__dataclass_fields__ if key in d})

    def to_dict(self) -> dict:
        """Without our own rope_per_row where it is off, and without a head_dim of None, an error there."""
        silent = {"head_dim": None, "rope_per_row": False}
        fields = {key: v for key, v in asdict(self).items() if key not in silent or v != silent[key]}
        return {"model_type": "phi3", **fields}


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


# ---- Norm --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in float32, rounded to x's dtype, and only then times the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, x.shape[-1:], eps=self.eps).to(x.dtype)


# ---- Rotary position embedding -----------------------------------------------------------------------------


def longrope_tables(position_ids: Tensor, long: Tensor, config: Phi3Config,
                    x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, R) for `position_ids` (B, T), in x's dtype. `long` (B,) chooses the factors.

    Computed anew for every call, in float32 at least: there is no buffer that `.half()` could spoil.
    """
    wide, R = torch.promote_types(x.dtype, torch.float32), config.rotary_size
    powers = config.rope_theta ** (torch.arange(0, R, 2, device=x.device).to(wide) / R)  # (R / 2,)
    scale, scaling = 1.0, config.rope_scaling
    if scaling is not None:
        short, far = (x.new_tensor(scaling[key], dtype=wide) for key in ("short_factor", "long_factor"))
        powers = torch.where(long[:, None, None, None], far, short) * powers  # (B, 1, 1, R / 2)
        scale = config.attention_factor
    angles = position_ids[:, None, :, None].to(wide) * (1.0 / powers)  # (B, 1, T, R / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of x (B, H, T, D): dimension i pairs with i + R / 2. The others pass."""
    R = cos.shape[-1]
    turned, passed = x[..., :R], x[..., R:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, passed], dim=-1)


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


def rope_holds(cache: KVCache, before: Tensor, now: Tensor) -> bool:
    """Whether what is cached has the frequencies `now` (B,); `before` (B,) are what its length tells, for a
    cache that does not know. Transformers mixes frequencies."""
    return len(cache) == 0 or torch.equal(before if cache.rope is None else cache.rope, now)


def note_rope(cache: KVCache, before: Tensor, now: Tensor) -> None:
    """ValueError unless `rope_holds`, since hidden states of the past would have to change as well."""
    if not rope_holds(cache, before, now):
        told = "rope_scaling gives a text of this length other frequencies than past_key_values has"
        raise ValueError(f"{told}: pass the whole text without it, as generate does")
    cache.rope = now


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


class Phi3Attention(nn.Module):
    def __init__(self, config: Phi3Config, layer: int):
        super().__init__()
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_size
        self.layer, self.parts, self.D = layer, (H * D, K * D, K * D), D
        self.qkv_proj = Linear(config.hidden_size, sum(self.parts), bias=False)
        self.o_proj = Linear(H * D, config.hidden_size, bias=False)
        self.attention_dropout = config.attention_dropout

    def forward(self, x: Tensor, blocks: list[Block], tables: tuple, cache: KVCache | None, whole: bool):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, -1, self.D).transpose(1, 2)  # (B, H, T, D), (B, K, T, D) twice
            for part in self.qkv_proj(x).split(self.parts, dim=-1)
        )
        q, k = rotate(q, *tables), rotate(k, *tables)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        scale, dropout, weights = self.D**-0.5, self.attention_dropout if self.training else 0.0, None
        if whole:
            y, weights = spelled_out_attention(q, k, v, blocks[0].mask, scale, dropout)
        else:
            y = torch.cat([
                fast_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, scale, dropout, cache)
                for queries, keys, mask in blocks
            ], dim=2)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), weights


# ---- MLP and layer -----------------------------------------------------------------------------------------


class Phi3MLP(nn.Module):
    def __init__(self, config: Phi3Config):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act(gate))


class Phi3Block(nn.Module):
    def __init__(self, config: Phi3Config, layer: int):
        super().__init__()
        self.self_attn = Phi3Attention(config, layer)
        self.mlp = Phi3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, *attention_inputs) -> tuple[Tensor, Tensor | None]:
        y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + self.resid_dropout(y)
        return x + self.resid_dropout(self.mlp(self.post_attention_layernorm(x))), weights


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


class Phi3Model(PreTrainedModel):
    config_class = Phi3Config

    def __init__(self, config: Phi3Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Phi3Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # True: training computes layers twice instead of keeping them

    def forward(self, input_ids: Tensor | None = None, *, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
                use_cache: bool | None = None, output_attentions: bool = False,
                output_hidden_states: bool = False) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C).

        `attention_mask` (B, S) is 1 for tokens and 0 for padding. `position_ids` (B, T), left out, go on from
        the cache's length whatever the mask says. ValueError where shapes disagree.
        """
        x = embed(self.embed_tokens, input_ids, inputs_embeds)
        saving = self.gradient_checkpointing and self.training
        cache = past_key_values if isinstance(past_key_values, KVCache) else KVCache(past_key_values or ())
        T, S = x.shape[1], len(cache) + x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(S - T, S, device=x.device).expand(len(x), T)
        config = self.config
        long = config.rope_of(position_ids.amax(1) + 1)
        if config.rope_varies:
            note_rope(cache, config.rope_of(position_ids[:, 0]), long)
        tables = longrope_tables(position_ids, long, config, x)
        padding = padding_bias(attention_mask, S, x.dtype)
        # Spelled out where weights are asked for; and in training on left padding, since the fused kernel's
        # gradients are wrong for rows that see only padding: log(n) drowns in the mask's lowest number.
        whole = output_attentions
        whole = whole or (torch.is_grad_enabled() and padding is not None and bool(padding[..., 0].any()))
        blocks = attention_blocks(T, S, config.sliding_window or S, padding, x, whole)
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            run = partial(checkpoint, layer, use_reentrant=False) if saving else layer
            x, weights = run(x, blocks, tables, None if saving else cache, whole)
            attentions.append(weights)
        x = self.norm(x)
        cached = (self.config.use_cache if use_cache is None else use_cache) and not saving
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


class Phi3ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = Phi3Config

    def __init__(self, config: Phi3Config):
        super().__init__(config)
        self.model = Phi3Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.max_positions = None  # rotary positions have no end
        self.tie_weights()

    def cache_serves(self, cache: KVCache, mask: Tensor) -> bool:
        """Not when the text has just grown past original_max_position_embeddings: then the factors change."""
        return rope_holds(cache, *(self.config.rope_of(m.sum(-1)) for m in (mask[:, : len(cache)], mask)))

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                logits_to_keep: int | Tensor = 0, **inputs) -> CausalLMOutput:
        """Logits (B, T, V) after `Phi3Model.forward`; with `labels` (B, T) the loss of the next tokens.

        Labels are not shifted, -100 is left out. `logits_to_keep`: how many last ones (0: all), or which.
        """
        output = self.model(input_ids, **inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss, logits, *output[1:])


# ---- Heads -------------------------------------------------------------------------------------------------


class TokenClassifierOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, labels)
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


class Phi3ForSequenceClassification(PreTrainedModel):
    config_class = Phi3Config

    def __init__(self, config: Phi3Config):
        super().__init__(config)
        self.model = Phi3Model(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                **inputs) -> CausalLMOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""
        output = self.model(input_ids, **inputs)
        x = output.last_hidden_state
        last = last_token(input_ids, x, self.config.pad_token_id)
        logits = self.score(x[torch.arange(len(x), device=x.device), last])
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return CausalLMOutput(loss, logits, *output[1:])


class Phi3ForTokenClassification(PreTrainedModel):
    config_class = Phi3Config

    def __init__(self, config: Phi3Config):
        super().__init__(config)
        self.model = Phi3Model(config)
        rates = (config.classifier_dropout, config.hidden_dropout, 0.1)
        self.dropout = nn.Dropout(next(rate for rate in rates if rate is not None))
        self.score = Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                **inputs) -> TokenClassifierOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""
        output = self.model(input_ids, **inputs)
        logits = self.score(self.dropout(output.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return TokenClassifierOutput(loss, logits, output.hidden_states, output.attentions)

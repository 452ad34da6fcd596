"""OpenAI GPT, the first one, all of it in this file: torch and the standard library are enough to copy it.

What is unusual about GPT-1
- The norms come after the residual sums (post-norm), and there is none at the end.
- Projections are stored [in, out], as TensorFlow does: `Conv1D`, and q, k, v in one matrix (fused QKV).
- "gelu" means the tanh approximation, not the exact one; `gelu_new`, which the documentation offers and
  Transformers refuses, is the same.
- Dropouts of 0.1 act in training. Positions are learned, the output layer is tied to the embedding (weight
  tying), and so are the token types: they have no embedding of their own.
- It was published without a key/value cache, and no other implementation gives it one. This file does.

Source: Radford et al., Improving Language Understanding by Generative Pre-Training (2018). Checkpoint:
openai-community/openai-gpt, and OpenAI's own release (`weights.py` reads it).
Agrees with Transformers 4.37.2, 4.50.3 and 5.24.0 (eager attention); comments tell where these differ.

Letters: B batch, T new tokens, S keys (cached + new), H heads, K as many, D head_dim, C hidden size (n_embd),
V vocabulary. The hub's files hold masks beside the weights, and no `lm_head`, which is tied:
`load_state_dict(..., strict=False)` takes them.
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
AFN: dict[str, Any] = {"gelu": gelu_tanh, "gelu_new": gelu_tanh, "relu": F.relu}
AFN |= {"silu": F.silu, "swish": F.silu}


@dataclass
class OpenAIGPTConfig:
    """The fields of `config.json` that decide the numbers, with the documented defaults."""

    vocab_size: int = 40478
    n_positions: int = 512
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    afn: str = "gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"  # which token stands for a choice: cls_index, last, first, or the mean
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1  # before the projection; the documentation says after
    summary_last_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    model_type = "openai-gpt"

    @classmethod
    def from_dict(cls, d: dict) -> "OpenAIGPTConfig":
        """From a `config.json` of today; `formats/config.py` checks it, and makes one of any other era."""
        return cls(**{key: d[key] for key in cls.__dataclass_fields__ if key in d})

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, **asdict(self)}


def upcast(x: Tensor) -> Tensor:
    """x in float32 at least: float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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


def head_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    need_weights: bool = False,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(B, H, T, D) of q (B, H, T, D), k and v (B, H, S, D) by PyTorch's fused kernel; with `need_weights` by
    the formula, with `head_mask` (H,) on the weights, and these (B, H, T, S) as they multiply v. The fused
    kernel has no forward-mode derivative but in `sdpa_kernel(SDPBackend.MATH)` of `torch.nn.attention`."""
    # Two calls: torch.export refuses `is_causal=attn_mask is None and T > 1`, which is a symbol there.
    # T > 1 without a mask has no past, so that is_causal may count from the top left.
    if not need_weights and attn_mask is None and q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale), None
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, scale=scale), None
    scores = upcast(q) @ upcast(k).transpose(2, 3) * scale  # (B, H, T, S); they overflow float16
    scores = scores if attn_mask is None else scores + attn_mask
    weights = F.dropout(scores.softmax(-1), dropout)
    if head_mask is not None:
        weights = weights * head_mask.view(-1, 1, 1)
    return (weights @ upcast(v)).to(q.dtype), weights.to(q.dtype)


class Conv1D(nn.Module):
    """A linear layer whose matrix is stored [in, out]."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class OpenAIGPTAttention(nn.Module):
    # On a loaded model `kernels.prepare` replaces this by a faster one of the same result.
    attend = staticmethod(head_masked_attention)

    def __init__(self, config: OpenAIGPTConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.n_embd // config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)  # q | k | v
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        cache: KVCache | None,
        head_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        dropout = self.attn_pdrop if self.training else 0.0
        y, weights = self.attend(q, k, v, attn_mask, self.head_dim**-0.5, dropout, need_weights, head_mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2))), weights


# ---- MLP and layer ----


class OpenAIGPTMLP(nn.Module):
    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)
        self.act = AFN[config.afn]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class OpenAIGPTBlock(nn.Module):
    def __init__(self, config: OpenAIGPTConfig, layer: int):
        super().__init__()
        self.attn = OpenAIGPTAttention(config, layer)
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = OpenAIGPTMLP(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, *attention_inputs: Any) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attn(x, *attention_inputs)
        x = self.ln_1(x + y)  # post-norm: the residual stream is normed
        return self.ln_2(x + self.mlp(x)), weights


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


class OpenAIGPTModel(PreTrainedModel):
    config_class = OpenAIGPTConfig

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.tokens_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions_embed = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(OpenAIGPTBlock(config, layer) for layer in range(config.n_layer))
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C).

        `attention_mask`: see `causal_mask`. `position_ids` (B, T) or (T,), left out, go on from the cache's
        length; packed documents see each other, as in all versions of Transformers. `head_mask` (H,) or
        (layers, H) scales the weights. ValueError for a text longer than the positions.
        """
        x = embed(self.tokens_embed, input_ids, inputs_embeds)
        checkpointing = self.gradient_checkpointing and self.training and past_key_values is None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = cache_of(past_key_values, use_cache and not checkpointing)
        T, past, limit = x.shape[1], len(cache or ()), self.config.n_positions
        if past + T > limit:
            raise ValueError(f"{past + T} tokens, but the model has {limit} positions")
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)
        x = x + self.positions_embed(position_ids)
        x = self.drop(x if token_type_ids is None else x + self.tokens_embed(token_type_ids))
        need_weights = output_attentions or head_mask is not None
        attn_mask = causal_mask(T, past + T, attention_mask, x, need_weights)
        hidden_states, attentions = [x], []
        for i, layer in enumerate(self.h):
            heads = head_mask if head_mask is None or head_mask.dim() == 1 else head_mask[i]
            run = partial(checkpoint, layer, use_reentrant=False) if checkpointing else layer
            x, weights = run(x, attn_mask, cache, heads, need_weights)
            hidden_states.append(x)
            attentions.append(weights)
        states = tuple(hidden_states) if output_hidden_states else None
        weights = tuple(attentions) if output_attentions else None
        return ModelOutput(x, cache if use_cache else None, states, weights)


# ---- Causal language model ----


class CausalLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, V), of the positions asked for
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each position's logits (B, T, V) and the label after it: labels (B, T) are
    shifted here, not by the caller, and -100 is left out."""
    return F.cross_entropy(upcast(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())


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


class GPTCausalLM(CausalLM):
    """What GPT-1 and GPT-Neo have besides: learned positions, which end, and token types."""

    max_positions: int

    def generate(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, **options: Any
    ) -> Tensor:
        """As `CausalLM.generate`; ValueError for a text longer than the positions."""
        check_prompt(input_ids, attention_mask, max_new_tokens)
        T, limit = input_ids.shape[1], self.max_positions
        if T + max_new_tokens - 1 > limit:  # the last new token is not fed
            raise ValueError(f"{T} prompt + {max_new_tokens} new tokens do not fit into {limit} positions")
        return super().generate(input_ids, attention_mask, max_new_tokens=max_new_tokens, **options)

    def prepare_inputs(self, ids: Tensor, mask: Tensor | None, cache: KVCache | None, **inputs: Any) -> dict:
        """New tokens have the type of the last one before them."""
        if (types := inputs.pop("token_type_ids", None)) is not None:
            new = types[:, -1:].expand(-1, ids.shape[1] - types.shape[1])
            inputs["token_type_ids"] = torch.cat([types, new], dim=1)[:, len(cache or ()) :]
        return super().prepare_inputs(ids, mask, cache, **inputs)


class OpenAIGPTLMHeadModel(GPTCausalLM):
    config_class = OpenAIGPTConfig

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.transformer = OpenAIGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.max_positions = config.n_positions
        self.init_weights(self.lm_head).tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:  # weight tying
            self.lm_head.weight = self.transformer.tokens_embed.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """Logits (B, T, V) after `OpenAIGPTModel.forward`; with `labels` (B, T) the `causal_lm_loss`.
        `logits_to_keep`: of how many last positions (0: all), or of which."""
        x, *rest = self.transformer(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            past_key_values,
            use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:  # in float32, as Transformers 5; 4.37 rounds it to the logits' dtype
            loss = causal_lm_loss(logits, labels)
        return CausalLMOutput(loss, logits, *rest)

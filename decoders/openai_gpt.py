"""OpenAI GPT, the first one, all of it in this file: torch and the standard library are enough to copy it.

What is unusual about GPT-1
- The norms come after the residual sums (post-LayerNorm), and there is none at the end.
- Projections are stored [in, out], as TensorFlow does: `Conv1D`, and q, k, v in one matrix.
- "gelu" means the tanh approximation, not the exact one; `gelu_new`, which the documentation offers and
  Transformers refuses, is the same.
- Dropouts of 0.1 act in training. Positions are learned, the output layer is tied to the token table, and so
  are the token types: they have no table of their own.
- It was published without a key/value cache, and no other implementation gives it one. This file does.

Source: Radford et al., Improving Language Understanding by Generative Pre-Training (2018). Checkpoint:
openai-community/openai-gpt, and OpenAI's own release (`weights.py` reads it).
Agrees with Transformers 4.37.2, 4.50.3 and 5.23.0 (eager attention); comments tell where these differ.

Letters: B batch, T new tokens, S keys (cached + new), H heads, D head size, C width, V vocabulary, M choices.
The hub's files hold masks beside the weights: `load_state_dict(..., strict=False)` leaves them out.
"""

import inspect
import math
import warnings
from collections.abc import Sequence
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
AFN = {"gelu": gelu_tanh, "gelu_new": gelu_tanh, "relu": F.relu, "silu": F.silu, "swish": F.silu}
SUMMARY_ACTIVATIONS = {**AFN, "sigmoid": torch.sigmoid, "tanh": torch.tanh, None: nn.Identity()}


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


# ---- Key/value cache ---------------------------------------------------------------------------------------


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

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, `(B, K, T, D)`; returns views of all S."""
        if layer == len(self.buffers):
            self.buffers.append((k, v))
            self.lengths.append(k.shape[2])
            return k, v
        start, (past_k, past_v) = self.lengths[layer], self.buffers[layer]
        self.buffers[layer] = self.append(past_k, k, start), self.append(past_v, v, start)
        self.lengths[layer] = start + k.shape[2]
        return self[layer]

    def append(self, buffer: Tensor, new: Tensor, start: int) -> Tensor:
        """`buffer` with `new` written from `start` on: the same one, or if full one of twice the length."""
        if new.requires_grad:  # autograd needs the past as it was
            return torch.cat([buffer[:, :, :start], new], dim=2)
        B, K, T, D = new.shape
        if start + T > buffer.shape[2]:
            buffer = torch.cat([buffer[:, :, :start], new.new_empty(B, K, max(start, T), D)], dim=2)
        buffer[:, :, start : start + T] = new
        return buffer

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        self.buffers = [(k[:, :, :n], v[:, :, :n]) for k, v in self]
        self.lengths = [min(n, length) for length in self.lengths]

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was, as beam search needs it."""
        self.buffers = [(k[index], v[index]) for k, v in self]


# ---- Attention ---------------------------------------------------------------------------------------------


def causal_mask(
    T: int, S: int, mask: Tensor | None, segment_ids: Tensor | None, x: Tensor, need_weights: bool
) -> Tensor | None:
    """(1 or B, 1 or H, T, S) to add to the scores of the last T of S positions. None, unless `need_weights`,
    where the fused kernel needs none: plain causal, or one query that sees every key.

    `mask` is (B, S), 0 at padding, or says all by itself: (B, 1 or H, T, S), true where a query looks, or
    numbers to add. `segment_ids` (B, T) tells packed texts apart. A row that sees nothing, as one of padding
    may, looks at itself: it is finite so, and the fused kernel's gradient right. ValueError for other shapes.
    """
    if mask is None and segment_ids is None and not need_weights and (T == 1 or T == S):
        return None
    shape, B = mask.shape if isinstance(mask, Tensor) else (), len(x)
    fits = shape[1:] == (S,) or (len(shape) == 4 and shape[2:] == (T, S))
    if mask is not None and not (fits and shape[0] in (1, B)):
        told = f"a tensor ({B}, {S}), with the cached tokens, or ({B}, 1 or heads, {T}, {S})"
        raise ValueError(f"attention_mask must be {told}, not {tuple(shape) or type(mask).__name__}")
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool:
        return mask.to(x.dtype).clamp(min=torch.finfo(x.dtype).min)
    visible = causal = x.new_ones(1, 1, T, S, dtype=torch.bool).tril(S - T)
    if mask is not None:
        visible = mask if mask.dim() == 4 else visible & (mask != 0)[:, None, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None])
    visible = visible | (causal.triu(S - T) & ~visible.any(-1, keepdim=True))
    return x.new_zeros(visible.shape).masked_fill(~visible, -math.inf)


def attention(
    q, k, v, attn_mask, scale, dropout=0.0, need_weights=False, head_mask=None
) -> tuple[Tensor, Tensor | None]:
    """(B, H, T, D), and if `need_weights` the weights (B, H, T, S) as they multiply v: then by the formula,
    else by PyTorch's fused kernel. That has no forward-mode derivative but in `sdpa_kernel(SDPBackend.MATH)`
    of `torch.nn.attention`. Head h of q reads head h // (H / K) of k and v."""
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if not need_weights and attn_mask is None and q.shape[2] > 1:
        # there is no past: is_causal counts from the top left
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale), None
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, scale=scale), None
    # scores of half-precision q and k overflow float16
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(compute_dtype) @ k.to(compute_dtype).transpose(2, 3) * scale  # (B, H, T, S)
    weights = F.dropout((scores if attn_mask is None else scores + attn_mask).softmax(-1), dropout)
    weights = weights if head_mask is None else weights * head_mask.view(-1, 1, 1)
    return (weights @ v.to(compute_dtype)).to(q.dtype), weights.to(q.dtype)


class Conv1D(nn.Module):
    """A linear layer whose matrix is stored [in, out]."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class OpenAIGPTAttention(nn.Module):
    attend = staticmethod(attention)

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
    ):
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        dropout = self.attn_pdrop if self.training else 0.0
        y, weights = self.attend(q, k, v, attn_mask, self.head_dim**-0.5, dropout, need_weights, head_mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2))), weights


# ---- MLP and layer -----------------------------------------------------------------------------------------


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

    def forward(self, x: Tensor, *attention_inputs) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attn(x, *attention_inputs)
        x = self.ln_1(x + y)
        return self.ln_2(x + self.mlp(x)), weights


# ---- Model -------------------------------------------------------------------------------------------------


class ModelOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, T, C), after the final norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, each layer's output; the last is normed
    attentions: tuple[Tensor, ...] | None = None  # (B, H, T, S) per layer, after dropout and head_mask


def forget_tied(model: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
    """In a state dict a tied matrix has one name, the table's, as in the hub's files: safetensors asks so."""
    if model.tied_to and model.lm_head.weight is model.get_submodule(model.tied_to).weight:
        state.pop(f"{prefix}lm_head.weight", None)


def recall_tied(model: nn.Module, state: dict, prefix: str, *rest) -> None:
    if model.tied_to and model.config.tie_word_embeddings and f"{prefix}{model.tied_to}.weight" in state:
        state.setdefault(f"{prefix}lm_head.weight", state[f"{prefix}{model.tied_to}.weight"])


class PreTrainedModel(nn.Module):
    """What all models share: how weights start, and what a checkpoint says beside its tensors."""

    gradient_checkpointing = False
    tied_to = ""  # the name of the token embedding, where the output layer may be tied to it

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.register_state_dict_post_hook(forget_tied)
        self.register_load_state_dict_pre_hook(recall_tied)
        self.config_json, self.generation_config = {}, {}  # what the checkpoint's files of these names say

    def init_weights(self, part: nn.Module | None = None) -> "PreTrainedModel":
        """Draw anew (all, or `part`): matrices N(0, initializer_range), norms 1, biases and padding 0."""
        for name, p in (part or self).named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0.0, self.config.initializer_range)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        for module in (part or self).modules():
            if getattr(module, "padding_idx", None) is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        return self

    def tie_weights(self) -> None:
        if self.tied_to and self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_submodule(self.tied_to).weight  # a bias stays its own

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """In training keep only what enters a layer, and compute the rest again in the backward pass."""
        for part in self.modules():
            part.gradient_checkpointing = True

    def train(self, mode: bool = True) -> "PreTrainedModel":
        inner = any(isinstance(part, PreTrainedModel) for part in self.children())  # which warns in our place
        if mode and not (self.training or inner) and (dtype := next(self.parameters()).dtype).itemsize == 2:
            warnings.warn(
                f"weights in {dtype}: AdamW makes float16 NaN and loses small steps in bfloat16. "
                "Train float32 weights, under torch.autocast for speed",
                stacklevel=2,
            )
        return super().train(mode)


def check_ids(ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1]:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a tensor (batch, tokens), one token at least, not {found}")


def embed(embedding: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """(B, T, C) of whichever was given. ValueError for what are no ids of the table."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is None:
        return inputs_embeds
    check_ids(input_ids)
    try:
        return embedding(input_ids)
    except (IndexError, RuntimeError) as error:
        told = f"int64 or int32, from 0 to {embedding.num_embeddings - 1} and on {embedding.weight.device}"
        raise ValueError(f"input_ids must be {told}: {str(error).splitlines()[0]}") from error


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
        length whatever the mask says; packed texts see each other, as in all versions of Transformers.
        `head_mask` (H,) or (layers, H) multiplies the weights. ValueError where shapes disagree or the text
        is longer than `n_positions`.
        """
        x = embed(self.tokens_embed, input_ids, inputs_embeds)
        checkpointing = self.gradient_checkpointing and self.training and past_key_values is None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = KVCache() if past_key_values is None and use_cache and not checkpointing else past_key_values
        cache = cache if cache is None or isinstance(cache, KVCache) else KVCache(cache)
        T, past, max_length = x.shape[1], len(cache or ()), self.config.n_positions
        if past + T > max_length:
            raise ValueError(f"{past + T} tokens, but the model has {max_length} positions")
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)
        x = x + self.positions_embed(position_ids)
        x = self.drop(x if token_type_ids is None else x + self.tokens_embed(token_type_ids))
        need_weights = output_attentions or head_mask is not None
        attn_mask = causal_mask(T, past + T, attention_mask, None, x, need_weights)
        hidden_states, attentions = [x], []
        for i, layer in enumerate(self.h):
            heads = head_mask if head_mask is None or head_mask.dim() == 1 else head_mask[i]
            run = partial(checkpoint, layer, use_reentrant=False) if checkpointing else layer
            x, weights = run(x, attn_mask, cache, heads, need_weights)
            hidden_states.append(x)
            attentions.append(weights)
        hidden_states = tuple(hidden_states) if output_hidden_states else None
        attentions = tuple(attentions) if output_attentions else None
        return ModelOutput(x, cache if use_cache else None, hidden_states, attentions)


# ---- Causal language model ---------------------------------------------------------------------------------


class CausalLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, V), of the positions asked for; (B, labels) and (B, T, labels) from classifiers
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def sample(logits, temperature, top_k, top_p, generator) -> Tensor:
    """(B,) ids drawn from (B, V) float32 logits, in Transformers' order: a seed draws the same there."""
    for name, n, kind, least, greatest in (
        ("temperature", temperature, float, 1e-30, 1e30),
        ("top_k", top_k, int, 1, math.inf),
        ("top_p", top_p, float, 1e-30, 1),
    ):
        if n is not None and (not isinstance(n, int | kind) or not least <= n <= greatest):
            raise ValueError(f"{name} must be of type {kind.__name__}, from {least} to {greatest}, not {n!r}")
    logits = logits / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[:, -1] = False  # the likeliest token always stays
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)
    try:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    except RuntimeError as error:
        raise ValueError("no token can be drawn: the logits hold NaN, or -inf for every token") from error


class GenerationMixin:
    """`generate`, for a model with logits and `max_positions` (None: no limit)."""

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
        **inputs,
    ) -> Tensor:
        """(B, T + new) ids: the prompts (B, T), shorter ones padded on the left, and what follows them.

        `eos_token_id`: an id or several; left out it is the checkpoint's own, None never stops. Finished rows
        are filled with `pad_token_id`. `streamer` gets `put(prompts)`, `put(new ids)` a step, `end()`.
        `past_key_values` holds the beginning of the prompts already, and in the end all but the last ids.
        `inputs` are other arguments of `forward`. ValueError for what cannot be, TypeError for the unknown.
        """
        check_ids(input_ids)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be a whole number from 0 on, not {max_new_tokens!r}")
        shape, mask = input_ids.shape, attention_mask
        if mask is not None and (getattr(mask, "shape", 0) != shape or ((mask != 0) & (mask != 1)).any()):
            raise ValueError(f"attention_mask must be a tensor {tuple(shape)}, 0 at padding and 1 elsewhere")
        T, limit = shape[1], self.max_positions or math.inf
        if T + max_new_tokens - 1 > limit:  # the last new token is not fed
            raise ValueError(f"{T} prompt + {max_new_tokens} new tokens do not fit into {limit} positions")
        ids, cache, (eos, pad) = input_ids, past_key_values, self.special_ids(eos_token_id, pad_token_id)
        mask = None if mask is None or mask.all() else mask.long()
        unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        put = (lambda new: None) if streamer is None else (lambda new: streamer.put(new.cpu()))
        put(ids)
        for _ in range(max_new_tokens):
            output = self(**self.prepare_inputs(ids, mask, cache, **inputs), logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            new = sample(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
            new = torch.where(unfinished, new, pad)
            put(new)
            ids = torch.cat([ids, new[:, None]], 1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
            unfinished &= ~torch.isin(new, eos.to(new.device))
            if not unfinished.any():
                break
        if streamer is not None:
            streamer.end()
        return ids

    def special_ids(self, eos: Any, pad: int | None) -> tuple[Tensor, int]:
        """The ids to stop at (n,), and the filler: `pad`, else the checkpoint's, else the first stop id."""
        if eos == "checkpoint":
            eos = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        eos = [] if eos is None else list(eos) if isinstance(eos, Sequence) else [eos]
        if not all(isinstance(id, int) for id in eos) or not isinstance(pad, int | None):
            raise ValueError(f"eos_token_id and pad_token_id must be token ids or None, not {eos}, {pad!r}")
        fillers = (pad, self.generation_config.get("pad_token_id"), self.config.pad_token_id, *eos, 0)
        return torch.tensor(eos, dtype=torch.long), next(i for i in fillers if i is not None)

    def prepare_inputs(self, ids: Tensor, mask: Tensor | None, cache: KVCache | None, **inputs) -> dict:
        """Arguments of `forward` for those of `ids` (B, T) that `cache` does not hold yet."""
        past = len(cache or ())
        if past >= ids.shape[1]:
            told = f"past_key_values holds {past} tokens of a prompt of {ids.shape[1]}"
            raise ValueError(f"{told}: one must be new")
        if unknown := inputs.keys() - inspect.signature(self.forward).parameters:
            raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
        position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        own = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}
        return dict(input_ids=ids[:, past:], **own, **inputs)


class OpenAIGPTLMHeadModel(PreTrainedModel, GenerationMixin):
    config_class, tied_to = OpenAIGPTConfig, "transformer.tokens_embed"

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.transformer = OpenAIGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.max_positions = config.n_positions
        self.init_weights(self.lm_head).tie_weights()

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
        """Logits (B, T, V) after `OpenAIGPTModel.forward`; with `labels` (B, T) the loss of the next tokens.

        Labels are not shifted, -100 is left out. `logits_to_keep`: how many last ones (0: all), or which.
        """
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
        logits, loss = self.lm_head(x[:, kept]), None
        if labels is not None:  # in float32, as Transformers 5; 4.37 rounds it to the logits' dtype
            compute_dtype = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits[:, :-1].to(compute_dtype).flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss, logits, *rest)

    def prepare_inputs(self, ids: Tensor, mask: Tensor | None, cache: KVCache | None, **inputs) -> dict:
        """New tokens have the type of the last one before them."""
        if (types := inputs.pop("token_type_ids", None)) is not None:
            new = types[:, -1:].expand(-1, ids.shape[1] - types.shape[1])
            inputs["token_type_ids"] = torch.cat([types, new], dim=1)[:, len(cache or ()) :]
        return super().prepare_inputs(ids, mask, cache, **inputs)


# ---- Heads -------------------------------------------------------------------------------------------------


def pool_last_token(
    logits: Tensor, input_ids: Tensor | None, labels: Tensor | None, config: Any
) -> tuple[Tensor | None, Tensor]:
    """Loss, and of logits (B, T, labels) those of each row's last token that is not padding, as Transformers
    4.50 and 5: 4.37 cuts a text that contains the pad id, and no version asks the mask. The loss is that of a
    regression, of one label or of several, as `problem_type` says, else as the labels suggest."""
    (B, T, n), pad, last, kind = logits.shape, config.pad_token_id, -1, config.problem_type
    if pad is None and B > 1:
        raise ValueError(f"a batch of {B} needs config.pad_token_id to find the end of each row")
    if pad is not None and input_ids is not None:
        last = (torch.arange(T, device=logits.device) * (input_ids != pad)).argmax(-1)
    logits = logits[range(B), last]
    if labels is None:
        return None, logits
    if kind == "regression" or (kind is None and n == 1):
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype)), logits
    if kind == "single_label_classification" or (kind is None and not labels.is_floating_point()):
        return F.cross_entropy(logits, labels.view(-1)), logits
    return F.binary_cross_entropy_with_logits(logits, labels), logits


class OpenAIGPTForSequenceClassification(PreTrainedModel):
    config_class = OpenAIGPTConfig

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        self.transformer = OpenAIGPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.init_weights(self.score)

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
    ) -> CausalLMOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""
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
        return CausalLMOutput(*pool_last_token(self.score(x), input_ids, labels, self.config), *rest)


class DoubleHeadsOutput(NamedTuple):
    loss: Tensor | None
    mc_loss: Tensor | None
    logits: Tensor  # (B, M, T, V)
    mc_logits: Tensor  # (B, M)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # (B, M, T, C) each
    attentions: tuple[Tensor, ...] | None = None  # (B * M, H, T, S) per layer


class OpenAIGPTSummary(nn.Module):
    """One vector or number per choice: pick or pool tokens, dropout, project, activate, dropout."""

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        self.summary_type = config.summary_type
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.summary = nn.Linear(config.n_embd, 1)
        self.activation = SUMMARY_ACTIVATIONS[config.summary_activation]
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, x: Tensor, mc_token_ids: Tensor | None) -> Tensor:
        """(B, M) from (B, M, T, C). `mc_token_ids` (B, M): which token to take; left out, the last."""
        # last, first and mean go over the tokens of each choice. Transformers takes axis 1, the choices: its
        # mc_logits come out (B, T), and the loss compares tokens instead of choices.
        if self.summary_type == "mean":
            x = x.mean(2)
        elif self.summary_type == "first":
            x = x[:, :, 0]
        elif self.summary_type == "last" or mc_token_ids is None:
            x = x[:, :, -1]
        else:
            x = x.gather(2, mc_token_ids[..., None, None].expand(-1, -1, 1, x.shape[-1])).squeeze(2)
        return self.last_dropout(self.activation(self.summary(self.first_dropout(x)))).squeeze(-1)


class OpenAIGPTDoubleHeadsModel(PreTrainedModel):
    """A language model and a multiple choice head over the same text."""

    config_class, tied_to = OpenAIGPTConfig, "transformer.tokens_embed"

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        if not (config.summary_use_proj and config.summary_proj_to_labels):
            raise ValueError("summary_use_proj and summary_proj_to_labels must be true: one number a choice")
        self.transformer = OpenAIGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = OpenAIGPTSummary(config)
        self.init_weights(self.lm_head).init_weights(self.multiple_choice_head).tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> DoubleHeadsOutput:
        """Logits of M choices per item; ids, mask, types, positions and `labels` are (B, M, T).

        `mc_token_ids` (B, M) says which token of each choice is read, `mc_labels` (B,) which choice is right.
        The two losses are not added up.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.dim() != (3 if inputs_embeds is None else 4):
            told = "nothing" if given is None else tuple(given.shape)
            raise ValueError(f"input_ids must be (batch, choices, tokens), not {told}")
        B, M, T = given.shape[:3]
        ids, mask, types, places, vectors = (
            None if part is None else part.flatten(0, 1)
            for part in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        x, cache, states, attentions = self.transformer(
            ids,
            mask,
            types,
            places,
            head_mask,
            vectors,
            output_attentions,
            output_hidden_states,
            past_key_values,
            use_cache,
        )
        x, states = x.view(B, M, T, -1), states and tuple(h.view(B, M, T, -1) for h in states)
        logits, mc_logits = self.lm_head(x), self.multiple_choice_head(x, mc_token_ids)
        loss = mc_loss = None  # Transformers rounds these two to the logits' dtype
        compute_dtype = torch.promote_types(logits.dtype, torch.float32)
        if labels is not None:
            loss = F.cross_entropy(
                logits[..., :-1, :].to(compute_dtype).flatten(0, 2), labels[..., 1:].flatten()
            )
        if mc_labels is not None:
            mc_loss = F.cross_entropy(mc_logits.to(compute_dtype), mc_labels.view(-1))
        return DoubleHeadsOutput(loss, mc_loss, logits, mc_logits, cache, states, attentions)

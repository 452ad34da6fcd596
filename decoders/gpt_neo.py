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
The hub's files hold masks beside the weights: `load_state_dict(..., strict=False)` leaves them out.
"""

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---- Config ------------------------------------------------------------------------------------------------

gelu_tanh = partial(F.gelu, approximate="tanh")  # one kernel; in half precision more exact than step by step
ACTIVATIONS = {name: getattr(F, name) for name in "gelu silu mish relu relu6 leaky_relu sigmoid tanh".split()}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh) | {"swish": F.silu}


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

    model_type = "gpt_neo"

    def __post_init__(self):
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        if self.attention_layers is None:
            self.attention_layers = [kind for kinds, n in self.attention_types for kind in kinds * n]

    @classmethod
    def from_dict(cls, d: dict) -> "GPTNeoConfig":
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


def local_mask(
    T: int,
    S: int,
    window: int | None,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    x: Tensor,
    need_weights: bool,
) -> Tensor | None:
    """(1 or B, 1 or H, T, S) to add to the scores of the last T of S positions, which see `window` keys each
    (None: all), itself counted. One query gets those of its window only. None, unless `need_weights`,
    where none is needed: plain causal, or one query that sees every key.

    `mask` is (B, S), 0 at padding, or (B, 1 or H, T, S), true where a query may look, or numbers to add:
    order and windows hide besides. `segment_ids` (B, T) tells packed texts apart. A row that sees nothing,
    as one of padding may, looks at itself: it is finite so, and the fused kernel's gradient right. ValueError
    for other shapes.
    """
    short = window is None or (not torch.compiler.is_compiling() and S <= window)  # a graph holds for any S
    if mask is None and segment_ids is None and not need_weights and short and (T == 1 or T == S):
        return None
    shape, B = mask.shape if isinstance(mask, Tensor) else (), len(x)
    fits = shape[1:] == (S,) or (len(shape) == 4 and shape[2:] == (T, S))
    if mask is not None and not (fits and shape[0] in (1, B)):
        told = f"a tensor ({B}, {S}), with the cached tokens, or ({B}, 1 or heads, {T}, {S})"
        raise ValueError(f"attention_mask must be {told}, not {tuple(shape) or type(mask).__name__}")
    added = mask if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool else None
    causal = x.new_ones(1, 1, T, S, dtype=torch.bool).tril(S - T)
    visible = causal.triu(S - T - (window or S) + 1)
    if mask is not None and added is None:
        visible = visible & (mask if mask.dim() == 4 else (mask != 0)[:, None, None])
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None])
    visible = visible | (causal.triu(S - T) & ~visible.any(-1, keepdim=True))
    attn_mask = x.new_zeros(visible.shape).masked_fill(~visible, -math.inf)
    attn_mask = (
        attn_mask if added is None else (attn_mask + added.to(x.dtype)).clamp(min=torch.finfo(x.dtype).min)
    )
    return attn_mask if T > 1 or need_weights else attn_mask[..., -(window or S) :]


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


class GPTNeoSelfAttention(nn.Module):
    attend = staticmethod(attention)

    def __init__(self, config: GPTNeoConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.layer, self.head_dim = layer, C // config.num_heads
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)
        self.attention_dropout = config.attention_dropout
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def qkv(self, x: Tensor) -> list[Tensor]:
        return [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        cache: KVCache | None,
        head_mask: Tensor | None,
        need_weights: bool,
    ):
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        if attn_mask is not None:  # a decoding step reads its window only
            k, v = k[:, :, -attn_mask.shape[-1] :], v[:, :, -attn_mask.shape[-1] :]
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = self.attend(q, k, v, attn_mask, 1.0, dropout, need_weights, head_mask)
        return self.resid_dropout(self.out_proj(y.transpose(1, 2).flatten(2))), weights


# ---- MLP and layer -----------------------------------------------------------------------------------------


class GPTNeoMLP(nn.Module):
    def __init__(self, config: GPTNeoConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)
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


class GPTNeoModel(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embed_dropout)
        self.h = nn.ModuleList(GPTNeoBlock(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C).

        `attention_mask`: see `local_mask`. `position_ids` (B, T) or (T,), left out, go on from the cache's
        length whatever the mask says. Where they begin anew, without mask and with use_cache=False, packed
        texts are kept apart: as in Transformers 5, 4.x sees one text. `head_mask` (H,) or (layers, H) scales
        the weights. ValueError where shapes disagree or the text is longer than `max_position_embeddings`.
        """
        if isinstance(past_key_values, Tensor):  # model(ids, mask), as all other models take it
            past_key_values, attention_mask = None, past_key_values
        x = embed(self.wte, input_ids, inputs_embeds)
        checkpointing = self.gradient_checkpointing and self.training and past_key_values is None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = KVCache() if past_key_values is None and use_cache and not checkpointing else past_key_values
        cache = cache if cache is None or isinstance(cache, KVCache) else KVCache(cache)
        (B, T, _), past, max_length = x.shape, len(cache or ()), self.config.max_position_embeddings
        if past + T > max_length:
            raise ValueError(f"{past + T} tokens, but the model has {max_length} positions")
        packed = position_ids is not None and attention_mask is None and cache is None
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)
        segment_ids = None
        if packed:
            segment_ids = F.pad((position_ids.expand(B, T).diff(dim=1) != 1).long(), (1, 0)).cumsum(1)
        x = x + self.wpe(position_ids)
        x = self.drop(x if token_type_ids is None else x + self.wte(token_type_ids))
        need_weights = output_attentions or head_mask is not None
        attn_masks = {
            kind: local_mask(T, past + T, window, attention_mask, segment_ids, x, need_weights)
            for kind, window in (("global", None), ("local", self.config.window_size))
        }
        hidden_states, attentions = [], []
        for i, layer in enumerate(self.h):
            hidden_states.append(x)
            heads = head_mask if head_mask is None or head_mask.dim() == 1 else head_mask[i]
            run = partial(checkpoint, layer, use_reentrant=False) if checkpointing else layer
            x, weights = run(x, attn_masks[self.config.attention_layers[i]], cache, heads, need_weights)
            attentions.append(weights)
        x = self.ln_f(x)
        hidden_states = (*hidden_states, x) if output_hidden_states else None
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


class GPTNeoForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, tied_to = GPTNeoConfig, "transformer.wte"

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.max_positions = config.max_position_embeddings
        self.init_weights(self.lm_head).tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """Logits (B, T, V) after `GPTNeoModel.forward`; with `labels` (B, T) the loss of the next tokens too.

        Labels are not shifted, -100 is left out. `logits_to_keep`: how many last ones (0: all), or which.
        """
        x, *rest = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(x[:, kept]), None
        if labels is not None:  # in float32, as Transformers 5; 4.x rounds it to the logits' dtype
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


class GPTNeoForSequenceClassification(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_weights(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""
        x, *rest = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        return CausalLMOutput(*pool_last_token(self.score(x), input_ids, labels, self.config), *rest)


class GPTNeoForTokenClassification(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""
        x, *rest = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        logits = self.classifier(self.dropout(x))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss, logits, *rest)


class QuestionAnsweringOutput(NamedTuple):
    loss: Tensor | None
    start_logits: Tensor  # (B, T)
    end_logits: Tensor  # (B, T)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class GPTNeoForQuestionAnswering(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights(self.qa_outputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> QuestionAnsweringOutput:
        """Logits (B, T) of where the answer starts and ends. Positions (B,) are clamped to the text; those
        past its end do not count in the loss."""
        x, _, *rest = self.transformer(
            input_ids,
            None,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            False,
            output_attentions,
            output_hidden_states,
        )
        start, end = self.qa_outputs(x).unbind(-1)  # (B, T) each
        loss = None
        if start_positions is not None and end_positions is not None:
            T = start.shape[1]
            first, last = (positions.view(-1).clamp(0, T) for positions in (start_positions, end_positions))
            cross_entropy = partial(F.cross_entropy, ignore_index=T)
            loss = (cross_entropy(start, first) + cross_entropy(end, last)) / 2
        return QuestionAnsweringOutput(loss, start, end, *rest)

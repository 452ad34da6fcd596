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

Maybe = Tensor | None  # of an argument that may be left out

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

class Block(NamedTuple):
    """Some queries, the keys that they need, and what to add to the scores between them."""

    queries: slice
    keys: slice
    bias: Tensor | None  # (1 or B, 1 or H, queries, keys); None: plain causal, or one query that sees all


def window_bias(T: int, S: int, window: int, mask: Maybe, texts: Maybe, x: Tensor) -> Tensor:
    """(1 or B, 1 or H, T, S) to add to the scores of the last T of S keys; each sees `window`, itself too.

    `mask` is (B, S), 0 at padding, or says all by itself: (B, 1 or H, T, S), true where a query looks, or
    numbers to add. `texts` (B, S) tells packed ones apart. A row that sees nothing, as one of padding may,
    looks at itself: so it is finite, and the fused kernel's gradient right. ValueError for another shape.
    """
    if mask is not None and mask.shape[1:] != (S,) and (mask.dim() != 4 or mask.shape[2:] != (T, S)):
        told = f"(batch, {S}), with the cached tokens, or (batch, 1 or heads, {T}, {S})"
        raise ValueError(f"attention_mask must be {told}, not {tuple(mask.shape)}")
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool:
        return mask.to(x.dtype).clamp(min=torch.finfo(x.dtype).min)
    causal = x.new_ones(1, 1, T, S, dtype=torch.bool).tril(S - T)
    look = causal.triu(S - T - window + 1)
    if mask is not None:
        look = mask if mask.dim() == 4 else look & (mask != 0)[:, None, None]
    if texts is not None:
        look = look & (texts[:, None, S - T :, None] == texts[:, None, None])
    look = look | (causal.triu(S - T) & ~look.any(-1, keepdim=True))
    return x.new_zeros(look.shape).masked_fill(~look, -math.inf)


def attention_blocks(T: int, S: int, window: int | None, mask: Maybe, texts: Maybe, x: Tensor,
                     whole: bool) -> list[Block]:
    """Causal attention of the last T of S positions in blocks; a query sees `window` keys, itself counted.

    A short window gives blocks of `window` queries and at most 2 * window - 1 keys: there is no T x T mask,
    and a decoding step reads its window only. `whole` asks for one block with all keys and a bias.
    """
    past, simple, blocks = S - T, mask is None and texts is None, []
    alone = mask is not None and mask.shape[1:] != (S,)  # a mask that says all by itself
    if whole or alone or window is None or torch.compiler.is_compiling():  # which would unroll the blocks
        bare = simple and not whole and window is None and (T == 1 or T == S)
        bias = None if bare else window_bias(T, S, window or S, mask, texts, x)
        return [Block(slice(None), slice(None), bias)]
    for start in range(0, T, window):
        queries = slice(start, min(start + window, T))
        keys = slice(max(0, past + start - window + 1), past + queries.stop)
        masks, bias = (None if part is None else part[:, keys] for part in (mask, texts)), None
        if not simple or (T > 1 and (past > 0 or S > window)):
            bias = window_bias(queries.stop - start, keys.stop - keys.start, window, *masks, x)
        blocks.append(Block(queries, keys, bias))
    return blocks


def spelled_out_attention(q, k, v, bias, scale, dropout=0.0, head_mask=None) -> tuple[Tensor, Tensor]:
    """The formula: (B, H, T, D), and the weights (B, H, T, S) as they multiply v. Head h of q reads head
    h // (H / K) of k and v."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)  # scores of half-precision q and k overflow float16
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) * scale  # (B, H, T, S)
    weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
    weights = weights if head_mask is None else weights * head_mask.view(-1, 1, 1)
    return (weights @ v.to(wide)).to(q.dtype), weights.to(q.dtype)


def attention(q, k, v, bias, scale, dropout=0.0) -> Tensor:
    """What `spelled_out_attention` computes, by PyTorch's fused kernel. It has no forward-mode derivative:
    for that, run inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if T == 1 and K < H and (bias is None or bias.shape[1] == 1):  # heads that share keys are rows
        rows = q.reshape(B, K, H // K, D)
        return F.scaled_dot_product_attention(rows, k, v, bias, dropout, scale=scale).view(B, H, T, D)
    k, v = (part if K == H else part.repeat_interleave(H // K, dim=1) for part in (k, v))
    if bias is None and T > 1:  # is_causal is aligned to the top left: right, as there is no past then
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)


class GPTNeoSelfAttention(nn.Module):
    attend = staticmethod(attention)

    def __init__(self, config: GPTNeoConfig, layer: int):
        super().__init__()
        C = config.hidden_size
        self.layer, self.num_heads = layer, config.num_heads
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)
        self.attention_dropout = config.attention_dropout
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, blocks: list[Block], cache: KVCache | None, head_mask: Maybe, whole: bool):
        B, T, C = x.shape
        q, k, v = (
            proj(x).view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)  # (B, H, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        dropout, weights = self.attention_dropout if self.training else 0.0, None
        if whole:
            y, weights = spelled_out_attention(q, k, v, blocks[0].bias, 1.0, dropout, head_mask)
        else:
            y = torch.cat([
                self.attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], bias, 1.0, dropout)
                for queries, keys, bias in blocks
            ], dim=2)
        return self.resid_dropout(self.out_proj(y.transpose(1, 2).reshape(B, T, C))), weights

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


class PreTrainedModel(nn.Module):
    """What all models share: how weights start, and what a checkpoint says beside its tensors."""

    gradient_checkpointing = False

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.config_json, self.generation_config = {}, {}  # what the checkpoint's files of these names say

    @torch.no_grad()
    def init_weights(self, part: nn.Module | None = None) -> "PreTrainedModel":
        """Draw all weights or those of `part`: matrices N(0, initializer_range), biases 0, norms 1."""
        part = part or self
        for name, p in part.named_parameters() if not next(part.parameters()).is_meta else ():
            if p.dim() > 1:
                p.normal_(0.0, self.config.initializer_range)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        for table in part.modules():
            if getattr(table, "padding_idx", None) is not None and not table.weight.is_meta:
                table.weight[table.padding_idx] = 0.0
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """In training keep only what enters a layer, and compute the rest again in the backward pass."""
        for part in self.modules():
            part.gradient_checkpointing = True

    def train(self, mode: bool = True) -> "PreTrainedModel":
        inner = any(isinstance(part, PreTrainedModel) for part in self.children())  # which warns in our place
        if mode and not self.training and not inner and (dtype := next(self.parameters()).dtype).itemsize == 2:
            warnings.warn(f"weights in {dtype}: AdamW makes float16 NaN and loses small steps in bfloat16. "
                          "Train float32 weights, under torch.autocast for speed", stacklevel=2)
        return super().train(mode)


def embed(table: nn.Embedding, input_ids: Maybe, inputs_embeds: Maybe) -> Tensor:
    """(B, T, C) of whichever was given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is not None and (input_ids.dim() != 2 or not input_ids.shape[1]):
        raise ValueError(f"input_ids must be (batch, tokens), one at least, not {tuple(input_ids.shape)}")
    return inputs_embeds if input_ids is None else table(input_ids)


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

    def forward(self, input_ids: Maybe = None, past_key_values: Any = None, attention_mask: Maybe = None,
                token_type_ids: Maybe = None, position_ids: Maybe = None, head_mask: Maybe = None,
                inputs_embeds: Maybe = None, use_cache: bool | None = None,
                output_attentions: bool = False, output_hidden_states: bool = False) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C).

        `attention_mask`: see `window_bias`; one of (B, 1 or H, T, S) hides besides what order and windows
        hide, as in Transformers. `position_ids` (B, T) or (T,), left out, go on from the cache's length
        whatever the mask says. Where they begin anew, without mask and with use_cache=False, packed texts
        are kept apart: as in Transformers 5, 4.x sees one text. `head_mask` (H,) or (layers, H) multiplies
        the weights. ValueError where shapes disagree or the text is longer than `max_position_embeddings`.
        """
        if isinstance(past_key_values, Tensor):  # model(ids, mask), as all other models take it
            past_key_values, attention_mask = None, past_key_values
        x = embed(self.wte, input_ids, inputs_embeds)
        saving = self.gradient_checkpointing and self.training and past_key_values is None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = KVCache() if past_key_values is None and use_cache and not saving else past_key_values
        cache = cache if cache is None or isinstance(cache, KVCache) else KVCache(cache)
        (B, T, _), past, most = x.shape, len(cache or ()), self.config.max_position_embeddings
        if past + T > most:
            raise ValueError(f"{past + T} tokens, but the model has {most} positions")
        places = torch.arange(past, past + T, device=x.device) if position_ids is None else position_ids
        texts = None
        if position_ids is not None and attention_mask is None and cache is None:
            texts = F.pad((places.expand(B, T).diff(dim=1) != 1).long(), (1, 0)).cumsum(1)
        x = x + self.wpe(places)
        x = self.drop(x if token_type_ids is None else x + self.wte(token_type_ids))
        whole = output_attentions or head_mask is not None
        blocks = {kind: self.blocks(T, past + T, window, attention_mask, texts, x, whole)
                  for kind, window in (("global", None), ("local", self.config.window_size))}
        hidden_states, attentions = [], []
        for i, layer in enumerate(self.h):
            hidden_states.append(x)
            heads = head_mask if head_mask is None or head_mask.dim() == 1 else head_mask[i]
            run = partial(checkpoint, layer, use_reentrant=False) if saving else layer
            x, weights = run(x, blocks[self.config.attention_layers[i]], cache, heads, whole)
            attentions.append(weights)
        x = self.ln_f(x)
        hidden_states = (*hidden_states, x) if output_hidden_states else None
        attentions = tuple(attentions) if output_attentions else None
        return ModelOutput(x, cache if use_cache else None, hidden_states, attentions)

    def blocks(self, T: int, S: int, window: int | None, mask: Maybe, texts: Maybe, x: Tensor,
               whole: bool) -> list[Block]:
        """`attention_blocks`, but a mask for every query and key does not replace order and windows."""
        if mask is None or mask.dim() == 2:
            return attention_blocks(T, S, window, mask, texts, x, whole)
        both = window_bias(T, S, S, mask, texts, x) + window_bias(T, S, window or S, None, None, x)
        return [Block(slice(0, T), slice(0, S), both.clamp(min=torch.finfo(x.dtype).min))]

# ---- Causal language model ---------------------------------------------------------------------------------

class CausalLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, V), of the positions asked for; (B, labels) and (B, T, labels) from classifiers
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def next_token(logits, temperature, top_k, top_p, generator) -> Tensor:
    """(B,) ids drawn from (B, V) float32 logits, in Transformers' order: a seed draws the same there."""
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
    """`generate`, for a model with logits and `max_positions` (None: no limit)."""

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Maybe = None, *, max_new_tokens: int,
                 do_sample: bool = False, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, eos_token_id: int | Sequence[int] | str | None = "checkpoint",
                 pad_token_id: int | None = None, generator: torch.Generator | None = None,
                 streamer: Any = None, past_key_values: KVCache | None = None, **inputs) -> Tensor:
        """(B, T + new) ids: the prompts (B, T), shorter ones padded on the left, and what follows them.

        `eos_token_id`: an id or several; left out it is the checkpoint's own, None never stops. Finished rows
        are filled with `pad_token_id`. `streamer` gets `put(prompts)`, `put(new ids)` a step, `end()`.
        `past_key_values` holds the beginning of the prompts already, and in the end all but the last ids.
        `inputs` are other arguments of `forward`. ValueError for what cannot be, TypeError for the unknown.
        """
        self.check_generation(input_ids.shape[1], max_new_tokens, temperature, top_k, top_p)
        ids, cache, (eos, pad) = input_ids, past_key_values, self.special_ids(eos_token_id, pad_token_id)
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.long()
        running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if streamer is not None:
            streamer.put(ids.cpu())
        for _ in range(max_new_tokens):
            output = self(**self.prepare_inputs(ids, mask, cache, **inputs), logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            new = next_token(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
            new = torch.where(running, new, pad)
            ids = torch.cat([ids, new[:, None]], 1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
            if streamer is not None:
                streamer.put(new.cpu())
            running &= ~torch.isin(new, eos.to(new.device))
            if not running.any():
                break
        if streamer is not None:
            streamer.end()
        return ids

    def check_generation(self, T: int, max_new_tokens: int, temperature, top_k, top_p) -> None:
        if T < 1 or max_new_tokens < 0:
            raise ValueError(f"the prompt has {T} tokens, max_new_tokens is {max_new_tokens}")
        room = self.max_positions
        if room is not None and T + max_new_tokens - 1 > room:  # the last new token is not fed
            raise ValueError(f"{T} prompt + {max_new_tokens} new tokens do not fit into {room} positions")
        if not (temperature > 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)):
            raise ValueError("temperature must be above 0, top_k must be at least 1, top_p must be above 0 "
                             f"to 1, not {temperature}, {top_k}, {top_p}")

    def prepare_inputs(self, ids: Tensor, mask: Maybe, cache: KVCache | None, **inputs) -> dict:
        """Arguments of `forward` for those of `ids` (B, T) that `cache` does not hold yet."""
        cached, known = len(cache or ()), inspect.signature(self.forward).parameters
        if cached >= ids.shape[1]:
            told = f"past_key_values holds {cached} tokens of a prompt of {ids.shape[1]}"
            raise ValueError(f"{told}: one must be new")
        own = {"input_ids": ids[:, cached:], "attention_mask": mask, "past_key_values": cache,
               "position_ids": None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, cached:]}
        if unknown := inputs.keys() - (known.keys() - own.keys()):
            raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
        return {**own, **inputs}

    def special_ids(self, eos: Any, pad: int | None) -> tuple[Tensor, int]:
        """The ids to stop at (n,), and the filler: `pad`, else the checkpoint's, else the first stop id."""
        if eos == "checkpoint":
            eos = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        fillers = (pad, self.generation_config.get("pad_token_id"), self.config.pad_token_id, *eos, 0)
        return torch.tensor(eos, dtype=torch.long), next(i for i in fillers if i is not None)


class GPTNeoForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.max_positions = config.max_position_embeddings
        self.init_weights(self.lm_head).tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, input_ids: Maybe = None, past_key_values: Any = None, attention_mask: Maybe = None,
                token_type_ids: Maybe = None, position_ids: Maybe = None, head_mask: Maybe = None,
                inputs_embeds: Maybe = None, labels: Maybe = None, use_cache: bool | None = None,
                output_attentions: bool = False, output_hidden_states: bool = False,
                logits_to_keep: int | Tensor = 0) -> CausalLMOutput:
        """Logits (B, T, V) after `GPTNeoModel.forward`; with `labels` (B, T) the loss of the next tokens too.

        Labels are not shifted, -100 is left out. `logits_to_keep`: how many last ones (0: all), or which.
        """
        x, *rest = self.transformer(input_ids, past_key_values, attention_mask, token_type_ids, position_ids,
                                    head_mask, inputs_embeds, use_cache, output_attentions,
                                    output_hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(x[:, kept]), None
        if labels is not None:  # in float32, as Transformers 5; 4.x rounds it to the logits' dtype
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss, logits, *rest)

    def prepare_inputs(self, ids: Tensor, mask: Maybe, cache: KVCache | None, **inputs) -> dict:
        """New tokens have the type of the last one before them."""
        if (types := inputs.pop("token_type_ids", None)) is not None:
            new = types[:, -1:].expand(-1, ids.shape[1] - types.shape[1])
            inputs["token_type_ids"] = torch.cat([types, new], dim=1)[:, len(cache or ()) :]
        return super().prepare_inputs(ids, mask, cache, **inputs)

# ---- Heads -------------------------------------------------------------------------------------------------

def last_token(input_ids: Maybe, x: Tensor, pad_token_id: int | None) -> Tensor | int:
    """(B,) index of each row's last token that is not padding, as Transformers 4.50 and 5. 4.37 looks for the
    first pad id instead, and so cuts a text that contains it. The mask has no say in any version."""
    if pad_token_id is None and len(x) > 1:
        raise ValueError(f"a batch of {len(x)} needs config.pad_token_id to find the end of each row")
    if pad_token_id is None or input_ids is None:
        return x.shape[1] - 1
    return (torch.arange(x.shape[1], device=x.device) * (input_ids != pad_token_id)).argmax(-1)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Regression, one label or several: as `problem_type` says, else as the labels suggest."""
    if problem_type is None:
        kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else kind
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
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_weights(self.score)

    def forward(self, input_ids: Maybe = None, past_key_values: Any = None, attention_mask: Maybe = None,
                token_type_ids: Maybe = None, position_ids: Maybe = None, head_mask: Maybe = None,
                inputs_embeds: Maybe = None, labels: Maybe = None, use_cache: bool | None = None,
                output_attentions: bool = False, output_hidden_states: bool = False) -> CausalLMOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""
        x, *rest = self.transformer(input_ids, past_key_values, attention_mask, token_type_ids, position_ids,
                                    head_mask, inputs_embeds, use_cache, output_attentions,
                                    output_hidden_states)
        logits = self.score(x[range(len(x)), last_token(input_ids, x, self.config.pad_token_id)])
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return CausalLMOutput(loss, logits, *rest)


class GPTNeoForTokenClassification(PreTrainedModel):
    config_class = GPTNeoConfig

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.transformer = GPTNeoModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(self.classifier)

    def forward(self, input_ids: Maybe = None, past_key_values: Any = None, attention_mask: Maybe = None,
                token_type_ids: Maybe = None, position_ids: Maybe = None, head_mask: Maybe = None,
                inputs_embeds: Maybe = None, labels: Maybe = None, use_cache: bool | None = None,
                output_attentions: bool = False, output_hidden_states: bool = False) -> CausalLMOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""
        x, *rest = self.transformer(input_ids, past_key_values, attention_mask, token_type_ids, position_ids,
                                    head_mask, inputs_embeds, use_cache, output_attentions,
                                    output_hidden_states)
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

    def forward(self, input_ids: Maybe = None, attention_mask: Maybe = None, token_type_ids: Maybe = None,
                position_ids: Maybe = None, head_mask: Maybe = None, inputs_embeds: Maybe = None,
                start_positions: Maybe = None, end_positions: Maybe = None, output_attentions: bool = False,
                output_hidden_states: bool = False) -> QuestionAnsweringOutput:
        """Logits (B, T) of where the answer starts and ends. Positions (B,) are clamped to the text; those
        past its end do not count in the loss."""
        x, _, *rest = self.transformer(input_ids, None, attention_mask, token_type_ids, position_ids,
                                       head_mask, inputs_embeds, False, output_attentions,
                                       output_hidden_states)
        start, end = self.qa_outputs(x).unbind(-1)  # (B, T) each
        loss = None
        if start_positions is not None and end_positions is not None:
            T = start.shape[1]
            first, last = (positions.view(-1).clamp(0, T) for positions in (start_positions, end_positions))
            cross_entropy = partial(F.cross_entropy, ignore_index=T)
            loss = (cross_entropy(start, first) + cross_entropy(end, last)) / 2
        return QuestionAnsweringOutput(loss, start, end, *rest)

"""The six models as named steps: which module does what, by the hub's names. `plan.py` makes a plan of it."""

from dataclasses import dataclass
from typing import Any

import torch.nn as nn


@dataclass(frozen=True)
class Family:
    """Names of the modules of a base model and of its layers."""

    embedding: str
    layers: str
    attention: str
    qkv: tuple[str, ...]  # three layers, or one fused: [q | k | v], or q, k and v of each head in turn
    out: str  # of the attention
    mlp_up: str  # with `gated`: [gate | up] in one matrix (SwiGLU)
    mlp_down: str
    norms: tuple[str, ...]  # before (or after) attention, and MLP; one for both in a parallel block
    order: str  # "pre-norm", "post-norm" or "parallel": attention and MLP read the same
    final_norm: str | None
    positions: str | None = None  # an embedding of positions, where there is no rotary embedding
    interleaved: bool = False
    gated: bool = False
    scaled: bool = True  # scores by 1 / sqrt(head_dim)
    has_windows: bool = False  # in layers that are "local"


PHI = Family(
    embedding="embed_tokens",
    layers="layers",
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="dense",
    mlp_up="mlp.fc1",
    mlp_down="mlp.fc2",
    norms=("input_layernorm",),
    order="parallel",
    final_norm="final_layernorm",
)
PHI3 = Family(
    embedding="embed_tokens",
    layers="layers",
    attention="self_attn",
    qkv=("qkv_proj",),
    out="o_proj",
    mlp_up="mlp.gate_up_proj",
    mlp_down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    order="pre-norm",
    final_norm="norm",
    gated=True,
    has_windows=True,
)
PERSIMMON = Family(
    embedding="embed_tokens",
    layers="layers",
    attention="self_attn",
    qkv=("query_key_value",),
    out="dense",
    mlp_up="mlp.dense_h_to_4h",
    mlp_down="mlp.dense_4h_to_h",
    norms=("input_layernorm", "post_attention_layernorm"),
    order="pre-norm",
    final_norm="final_layernorm",
    interleaved=True,
)
GPT_NEO = Family(
    embedding="wte",
    layers="h",
    attention="attn.attention",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="out_proj",
    mlp_up="mlp.c_fc",
    mlp_down="mlp.c_proj",
    norms=("ln_1", "ln_2"),
    order="pre-norm",
    final_norm="ln_f",
    positions="wpe",
    scaled=False,
    has_windows=True,
)
OPENAI_GPT = Family(
    embedding="tokens_embed",
    layers="h",
    attention="attn",
    qkv=("c_attn",),
    out="c_proj",
    mlp_up="mlp.c_fc",
    mlp_down="mlp.c_proj",
    norms=("ln_1", "ln_2"),
    order="post-norm",
    final_norm=None,
    positions="positions_embed",
)
FAMILIES = {  # by the name of the base model; Fuyu's text is Persimmon
    "PhiModel": PHI,
    "Phi3Model": PHI3,
    "PersimmonModel": PERSIMMON,
    "GPTNeoModel": GPT_NEO,
    "OpenAIGPTModel": OPENAI_GPT,
}
BASE_NAMES = {  # by the name of a causal language model: its base model. Its output layer is `lm_head`
    "PhiForCausalLM": "model",
    "Phi3ForCausalLM": "model",
    "PersimmonForCausalLM": "model",
    "GPTNeoForCausalLM": "transformer",
    "OpenAIGPTLMHeadModel": "transformer",
}


def class_of(module: Any) -> Any:
    """The class of the model file: that of a wrapper is its `plain_class` (`decoders.hf` has such)."""
    return getattr(type(module), "plain_class", type(module))


def is_base_model(module: nn.Module) -> bool:
    """A model without a head: it has layers, and a config."""
    has_layers = any(isinstance(child, nn.ModuleList) for child in module.children())
    return has_layers and hasattr(type(module), "config_class")


def is_causal_model(module: nn.Module) -> bool:
    """One of the causal language models, by its name and its parts."""
    base = BASE_NAMES.get(class_of(module).__name__)
    return base is not None and hasattr(module, base) and hasattr(module, "lm_head")

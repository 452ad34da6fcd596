"""What the tests know about each family: tiny sizes that fit nowhere by accident, and what must not go unnoticed."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from decoders import fuyu, gpt_neo, openai_gpt, persimmon, phi, phi3
from decoders.formats.config import modern
from decoders.formats.names import LAYOUTS, as_it_is

BATCH, LENGTH, PADDED = 2, 23, 4  # the length exceeds every window; PADDED tokens of row 0 are padding


def read(config_class: type, d: dict):
    """The config object of a config.json of any era."""
    return config_class.from_dict(modern(d, config_class.model_type))


@dataclass
class Family:
    name: str  # model_type
    module: ModuleType
    prefix: str  # class names begin with it
    tiny: dict  # a config.json: sizes pairwise different, an odd vocabulary
    base: str  # attribute of the causal model that holds the bare one
    dead: dict  # buffers that old checkpoints hold
    mutations: dict[str, Callable] = field(default_factory=dict)  # each takes (model, monkeypatch) and breaks it
    heads: tuple[str, ...] = ()
    causal: str = "ForCausalLM"  # how the class with a language model head is called
    table: str = "transformer.wte"  # the token table
    scores: tuple[str, ...] = ("q_proj", "k_proj")  # what makes scores large
    output: str = "lm_head"
    own: tuple[str, ...] | None = None  # fields that are not the decoder's, where the decoder has a config of its own

    def __repr__(self) -> str:
        return self.name

    def cls(self, head: str = "ForCausalLM") -> type:
        if not hasattr(self.module, self.class_name(head)):
            pytest.skip(f"{self.name} has no {self.class_name(head)}")
        return getattr(self.module, self.class_name(head))

    def their_config(self, **changes) -> dict:
        """What Transformers of any version reads as our flat tiny config."""
        config = copy.deepcopy({**self.tiny, **changes})  # Transformers writes into rope_scaling
        if self.own is not None:
            inner = {key: value for key, value in config.items() if key not in self.own}
            config["text_config"] = {**inner, "model_type": "persimmon"}
        return config

    def class_name(self, head: str = "ForCausalLM") -> str:
        return self.prefix + (self.causal if head == "ForCausalLM" else head)

    def config(self, **changes):
        return read(self.cls("Config"), {**self.tiny, **changes})

    def model(self, head: str = "ForCausalLM", seed: int = 0, dtype=torch.float32, **changes) -> nn.Module:
        """Our model alone, with redrawn weights."""
        return redraw(self.cls(head)(self.config(**changes)), seed).to(dtype).eval()

    def pair(self, head: str = "ForCausalLM", seed: int = 0, dtype=torch.float32, **changes):
        """Ours and Transformers' with the same redrawn weights, in eval mode."""
        transformers = pytest.importorskip("transformers")
        self.cls(head)
        config = self.their_config(**changes)
        config_class = type(transformers.AutoConfig.for_model(config.pop("model_type")))
        theirs_class = getattr(transformers, self.class_name(head))
        theirs = theirs_class._from_config(config_class(**config), attn_implementation="eager")
        redraw(theirs, seed)
        ours = self.cls(head)(self.config(**changes))
        named = LAYOUTS[self.name].modern if self.own is not None else as_it_is
        ours.load_state_dict({new: t for old, t in theirs.state_dict().items() for new, t in named(old, t, {})})
        return ours.to(dtype).eval(), theirs.to(dtype).eval()


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices N(0, 1/fan_in), norm weights 1 + 0.3 N, biases 0.3 N.

    With the default initialisation biases are 0, norms 1 and attention is flat: a wrong GELU, swapped q and k or
    a doubled rotary fraction then pass any tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    stored_in_out = {name for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.copy_(noise / math.sqrt(p.shape[0 if name.rpartition(".")[0] in stored_in_out else 1]))
        else:
            p.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model


def inputs(vocab_size: int, padded: bool = False, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(BATCH, LENGTH) ids and mask; `padded`: row 0 begins with PADDED tokens of padding."""
    ids = torch.randint(0, vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :PADDED] = 0
    return ids, mask


# ---- GPT-Neo ----------------------------------------------------------------------------------------------


def set_all(model, kind: type, **values) -> None:
    for module in model.modules():
        if isinstance(module, kind):
            for name, value in values.items():
                setattr(module, name, value)


def change_config(**values) -> Callable:
    def mutate(model, monkeypatch):
        for name, value in values.items():
            monkeypatch.setattr(model.config, name, value)

    return mutate


def change_modules(kind: type, **values) -> Callable:
    return lambda model, monkeypatch: set_all(model, kind, **values)


def attend(attention_class: type, monkeypatch, change: Callable) -> None:
    """Attention with other arguments, on the fast path."""
    plain = attention_class.attend
    monkeypatch.setattr(attention_class, "attend", staticmethod(lambda *given: plain(*change(*given))))


def change_scale(model, monkeypatch):
    attend(gpt_neo.GPTNeoSelfAttention, monkeypatch, lambda q, k, v, bias, scale, *rest: (q, k, v, bias, q.shape[-1] ** -0.5, *rest))


def swap(first: str, second: str) -> Callable:
    @torch.no_grad()
    def mutate(model, monkeypatch):
        for module in model.modules():
            if hasattr(module, first) and hasattr(module, second):
                a, b = getattr(module, first).weight, getattr(module, second).weight
                a.data, b.data = b.data.clone(), a.data.clone()

    return mutate


def shift_positions(model, monkeypatch):
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data.roll(1, 0)


def skip_final_norm(model, monkeypatch):
    model.transformer.ln_f = nn.Identity()


def drop_bias(name: str) -> Callable:
    def mutate(model, monkeypatch):
        for key, p in model.named_parameters():
            if key.endswith(name):
                p.data.zero_()

    return mutate


GPT_NEO = Family(
    name="gpt_neo",
    module=gpt_neo,
    prefix="GPTNeo",
    tiny={
        "model_type": "gpt_neo", "vocab_size": 101, "max_position_embeddings": 67, "hidden_size": 48,
        "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 5, "intermediate_size": 80, "bos_token_id": 100, "eos_token_id": 100,
    },
    base="transformer",
    dead={
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 67, 67, dtype=torch.uint8).tril(),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
        "transformer.h.2.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    heads=("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    mutations={
        "window one too long": change_config(window_size=6),
        "window one too short": change_config(window_size=4),
        "global and local swapped": change_config(attention_layers=["local", "global", "local"]),
        "last layer global": change_config(attention_layers=["global", "local", "global"]),
        "scores divided by sqrt(D)": change_scale,
        "exact GELU": change_modules(gpt_neo.GPTNeoMLP, act=F.gelu),
        "norm epsilon 1e-6": change_modules(nn.LayerNorm, eps=1e-6),
        "q and k swapped": swap("q_proj", "k_proj"),
        "k and v swapped": swap("k_proj", "v_proj"),
        "norms swapped": swap("ln_1", "ln_2"),
        "positions off by one": shift_positions,
        "no final norm": skip_final_norm,
        "output bias dropped": drop_bias("out_proj.bias"),
        "MLP bias dropped": drop_bias("c_proj.bias"),
        "norm bias dropped": drop_bias("ln_2.bias"),
    },
)

# ---- OpenAI GPT -------------------------------------------------------------------------------------------


def roll_positions(model, monkeypatch):
    table = model.transformer.positions_embed.weight
    table.data = table.data.roll(1, 0)


def norm_first(model, monkeypatch):
    """Pre-LayerNorm, as in GPT-2."""

    def forward(self, x, *attention_inputs):
        y, weights = self.attn(self.ln_1(x), *attention_inputs)
        x = x + y
        return x + self.mlp(self.ln_2(x)), weights

    monkeypatch.setattr(openai_gpt.OpenAIGPTBlock, "forward", forward)


def permute_heads(model, monkeypatch):
    """q, k and v interleaved by head instead of one after the other."""
    for block in model.transformer.h:
        p = block.attn.c_attn.weight
        p.data = p.data.view(48, 3, 4, 12).transpose(1, 2).reshape(48, 144)


def other_scale(model, monkeypatch):
    attend(openai_gpt.OpenAIGPTAttention, monkeypatch, lambda q, k, v, bias, scale, *rest: (q, k, v, bias, 1.0, *rest))


OPENAI_GPT = Family(
    name="openai-gpt",
    module=openai_gpt,
    prefix="OpenAIGPT",
    causal="LMHeadModel",
    tiny={"model_type": "openai-gpt", "vocab_size": 101, "n_positions": 67, "n_embd": 48, "n_layer": 3, "n_head": 4},
    base="transformer",
    table="transformer.tokens_embed",
    scores=("c_attn",),
    dead={f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 67, 67).tril() for i in range(3)},
    heads=("ForSequenceClassification",),
    mutations={
        "exact GELU": change_modules(openai_gpt.OpenAIGPTMLP, act=F.gelu),
        "norms first": norm_first,
        "norms swapped": swap("ln_1", "ln_2"),
        "norm epsilon 1e-4": change_modules(nn.LayerNorm, eps=1e-4),
        "scores not divided": other_scale,
        "heads interleaved": permute_heads,
        "positions off by one": roll_positions,
        "q, k and v bias dropped": drop_bias("c_attn.bias"),
        "output bias dropped": drop_bias("attn.c_proj.bias"),
        "MLP bias dropped": drop_bias("mlp.c_fc.bias"),
        "norm bias dropped": drop_bias("ln_2.bias"),
    },
)

# ---- Phi --------------------------------------------------------------------------------------------------


def one_after_the_other(model, monkeypatch):
    """Attention first, the MLP on its result."""

    def forward(self, x, *attention_inputs):
        y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + y
        return x + self.mlp(self.input_layernorm(x)), weights

    monkeypatch.setattr(phi.PhiBlock, "forward", forward)


def rotate_pairs_of(module, monkeypatch):
    """Dimension 2i with 2i + 1, as in GPT-J."""
    plain = module.rotate

    def rotate(x, cos, sin):
        R = cos.shape[-1]
        order = torch.cat([torch.arange(0, R, 2), torch.arange(1, R, 2), torch.arange(R, x.shape[-1])])
        return plain(x[..., order], cos, sin)[..., order.argsort()]

    monkeypatch.setattr(module, "rotate", rotate)


def other_key_heads(model, monkeypatch):
    """Key/value heads spread over the heads in turns instead of in groups."""
    for layer in model.model.layers:
        for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            proj.weight.data = proj.weight.data.view(2, 12, 48).flip(0).reshape(24, 48)


PHI = Family(
    name="phi",
    module=phi,
    prefix="Phi",
    tiny={
        "model_type": "phi", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 67,
        "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "bos_token_id": 100, "eos_token_id": 100,
    },
    base="model",
    table="model.embed_tokens",
    dead={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)},
    heads=("ForSequenceClassification", "ForTokenClassification"),
    mutations={
        "all dimensions rotated": change_config(partial_rotary_factor=1.0),
        "too few dimensions rotated": change_config(partial_rotary_factor=0.34),
        "rotary base 100 times larger": change_config(rope_theta=1e6),
        "rotary in pairs": lambda model, monkeypatch: rotate_pairs_of(phi, monkeypatch),
        "exact GELU": change_modules(phi.PhiMLP, act=F.gelu),
        "norm epsilon 1e-6": change_modules(nn.LayerNorm, eps=1e-6),
        "q and k of a head swapped": lambda model, monkeypatch: attend(
            phi.PhiAttention, monkeypatch, lambda q, k, v, *rest: (k.repeat_interleave(2, 1), q, v.repeat_interleave(2, 1), *rest)),
        "one after the other": one_after_the_other,
        "key/value heads in turns": other_key_heads,
        "output bias dropped": drop_bias("lm_head.bias"),
        "attention bias dropped": drop_bias("dense.bias"),
        "query bias dropped": drop_bias("q_proj.bias"),
        "value bias dropped": drop_bias("v_proj.bias"),
        "MLP bias dropped": drop_bias("fc1.bias"),
        "norm bias dropped": drop_bias("input_layernorm.bias"),
    },
)

# ---- Phi-3 ------------------------------------------------------------------------------------------------

SHORT, LONG = [1.0 + 0.1 * i for i in range(6)], [1.5 + 0.7 * i for i in range(6)]
LONGROPE = {"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
            "max_position_embeddings": 67, "original_max_position_embeddings": 12}  # fmt: skip


def swap_halves(name: str) -> Callable:
    """Of a joint matrix: the MLP's gate and up, or k and v."""

    def mutate(model, monkeypatch):
        for key, p in model.named_parameters():
            if key.endswith(name):
                start = 0 if "gate" in name else 48
                half = (len(p) - start) // 2
                p.data[start:] = torch.cat([p.data[start + half :], p.data[start : start + half]])

    return mutate


def norm_of_the_sum(model, monkeypatch):
    """x / sqrt(sum), without the mean."""
    monkeypatch.setattr(phi3.RMSNorm, "forward", lambda self, x: self.weight * x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt())


def plus_one(model, monkeypatch):
    """Norm weights counted from one, as in Gemma."""
    for key, p in model.named_parameters():
        if "norm" in key:
            p.data += 1


PHI3 = Family(
    name="phi3",
    module=phi3,
    prefix="Phi3",
    tiny={
        "model_type": "phi3", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 67,
        "original_max_position_embeddings": 67, "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
        "sliding_window": 7, "bos_token_id": 1, "eos_token_id": 100, "pad_token_id": 100,
    },
    base="model",
    table="model.embed_tokens",
    scores=("qkv_proj",),
    dead={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)},
    heads=("ForSequenceClassification", "ForTokenClassification"),
    mutations={
        "window one too long": change_config(sliding_window=8),
        "window one too short": change_config(sliding_window=6),
        "no window": change_config(sliding_window=None),
        "three quarters rotated": change_config(partial_rotary_factor=0.75),
        "rotary base 100 times larger": change_config(rope_theta=1e6),
        "rotary in pairs": lambda model, monkeypatch: rotate_pairs_of(phi3, monkeypatch),
        "gate and up swapped": swap_halves("gate_up_proj.weight"),
        "k and v swapped": swap_halves("qkv_proj.weight"),
        "tanh GELU": change_modules(phi3.Phi3MLP, act=phi3.gelu_tanh),
        "norm epsilon 1e-4": change_modules(phi3.RMSNorm, eps=1e-4),
        "norms swapped": swap("input_layernorm", "post_attention_layernorm"),
        "norm weights count from one": plus_one,
        "norm without the mean": norm_of_the_sum,
        "side by side": lambda model, monkeypatch: monkeypatch.setattr(phi3.Phi3Block, "forward", side_by_side),
    },
)


def side_by_side(self, x, *attention_inputs):
    y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)
    return x + y + self.mlp(self.post_attention_layernorm(x)), weights


# ---- Persimmon --------------------------------------------------------------------------------------------


def joint_as_thirds(model, monkeypatch):
    """All of q, then all of k, then all of v, as in GPT-2."""
    for layer in model.model.layers:
        for p in layer.self_attn.query_key_value.parameters():
            p.data = p.data.view(3, 4, 12, *p.shape[1:]).transpose(0, 1).reshape(p.shape)


def no_head_norm(model, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.q_layernorm = nn.Identity()


def norm_after_rotation(model, monkeypatch):
    plain, norms = persimmon.rotate, []

    def rotate(x, cos, sin):
        norms.append(x)
        return plain(F.layer_norm(x, x.shape[-1:]), cos, sin)

    monkeypatch.setattr(persimmon, "rotate", rotate)


def persimmon_side_by_side(self, x, *attention_inputs):
    y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)
    return x + y + self.mlp(self.post_attention_layernorm(x)), weights


PERSIMMON = Family(
    name="persimmon",
    module=persimmon,
    prefix="Persimmon",
    tiny={
        "model_type": "persimmon", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 67, "partial_rotary_factor": 0.5, "rope_theta": 25000.0,
        "bos_token_id": 100, "eos_token_id": 100,
    },
    base="model",
    table="model.embed_tokens",
    scores=("q_layernorm", "k_layernorm"),
    dead={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)},
    heads=("ForSequenceClassification", "ForTokenClassification"),
    mutations={
        "rotary base of Transformers 5.23": change_config(rope_theta=10000.0),
        "all dimensions rotated": change_config(partial_rotary_factor=1.0),
        "too few dimensions rotated": change_config(partial_rotary_factor=0.34),
        "rotary in pairs": lambda model, monkeypatch: rotate_pairs_of(persimmon, monkeypatch),
        "plain ReLU": change_modules(persimmon.PersimmonMLP, act=F.relu),
        "GELU": change_modules(persimmon.PersimmonMLP, act=F.gelu),
        "norm epsilon 1e-4": change_modules(nn.LayerNorm, eps=1e-4),
        "joint matrix in thirds": joint_as_thirds,
        "q without its norm": no_head_norm,
        "q and k norms swapped": swap("q_layernorm", "k_layernorm"),
        "head norms once more": norm_after_rotation,
        "norms swapped": swap("input_layernorm", "post_attention_layernorm"),
        "side by side": lambda model, monkeypatch: monkeypatch.setattr(persimmon.PersimmonBlock, "forward", persimmon_side_by_side),
        "joint bias dropped": drop_bias("query_key_value.bias"),
        "attention bias dropped": drop_bias("self_attn.dense.bias"),
        "MLP bias dropped": drop_bias("dense_4h_to_h.bias"),
        "head norm bias dropped": drop_bias("k_layernorm.bias"),
    },
)

# ---- Fuyu -------------------------------------------------------------------------------------------------


def change_decoder(**values) -> Callable:
    def mutate(model, monkeypatch):
        for name, value in values.items():
            monkeypatch.setattr(model.config.text_config, name, value)

    return mutate


FUYU = Family(
    name="fuyu",
    module=fuyu,
    prefix="Fuyu",
    tiny={**PERSIMMON.tiny, "model_type": "fuyu", "patch_size": 4, "image_token_id": 97},
    own=("patch_size", "num_channels", "image_token_id", "model_type"),
    base="language_model",
    table="language_model.model.embed_tokens",
    output="language_model.lm_head",
    scores=("q_layernorm", "k_layernorm"),
    dead={f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)},
    mutations={
        "rotary base of Transformers 5.23": change_decoder(rope_theta=10000.0),
        "all dimensions rotated": change_decoder(partial_rotary_factor=1.0),
        "plain ReLU": change_modules(fuyu.PersimmonMLP, act=F.relu),
        "norm epsilon 1e-4": change_modules(nn.LayerNorm, eps=1e-4),
        "norms swapped": swap("input_layernorm", "post_attention_layernorm"),
        "joint bias dropped": drop_bias("query_key_value.bias"),
    },  # of pictures: test_fuyu.py
)

FAMILIES = [GPT_NEO, OPENAI_GPT, PHI, PHI3, PERSIMMON, FUYU]

"""What the tests know about each family: tiny sizes that fit nowhere by accident."""

import copy
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import torch.nn as nn

from decoders import fuyu, gpt_neo, heads, openai_gpt, persimmon, phi, phi3
from decoders.compare.draw import redraw
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
    heads: tuple[str, ...] = ()
    causal: str = "ForCausalLM"  # how the class with a language model head is called
    table: str = "transformer.wte"  # the token table
    scores: tuple[str, ...] = ("q_proj", "k_proj")  # what makes scores large
    output: str = "lm_head"
    own: tuple[str, ...] | None = (
        None  # fields that are not the decoder's, where the decoder has a config of its own
    )

    def __repr__(self) -> str:
        return self.name

    def cls(self, head: str = "ForCausalLM") -> type:
        name = self.class_name(head)
        for module in (self.module, heads):
            if hasattr(module, name):
                return getattr(module, name)
        pytest.skip(f"{self.name} has no {name}")

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
        ours.load_state_dict(
            {new: t for old, t in theirs.state_dict().items() for new, t in named(old, t, {})}
        )
        return ours.to(dtype).eval(), theirs.to(dtype).eval()


def inputs(vocab_size: int, padded: bool = False, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(BATCH, LENGTH) ids and mask; `padded`: row 0 begins with PADDED tokens of padding."""
    ids = torch.randint(0, vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :PADDED] = 0
    return ids, mask


# ---- GPT-Neo ----------------------------------------------------------------------------------------------

GPT_NEO = Family(
    name="gpt_neo",
    module=gpt_neo,
    prefix="GPTNeo",
    tiny={
        "model_type": "gpt_neo",
        "vocab_size": 101,
        "max_position_embeddings": 67,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 5,
        "intermediate_size": 80,
        "bos_token_id": 100,
        "eos_token_id": 100,
    },
    base="transformer",
    dead={
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 67, 67, dtype=torch.uint8).tril(),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
        "transformer.h.2.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    heads=("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
)

# ---- OpenAI GPT -------------------------------------------------------------------------------------------

OPENAI_GPT = Family(
    name="openai-gpt",
    module=openai_gpt,
    prefix="OpenAIGPT",
    causal="LMHeadModel",
    tiny={
        "model_type": "openai-gpt",
        "vocab_size": 101,
        "n_positions": 67,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
    },
    base="transformer",
    table="transformer.tokens_embed",
    scores=("c_attn",),
    dead={f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 67, 67).tril() for i in range(3)},
    heads=("ForSequenceClassification",),
)

# ---- Phi --------------------------------------------------------------------------------------------------

PHI = Family(
    name="phi",
    module=phi,
    prefix="Phi",
    tiny={
        "model_type": "phi",
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 67,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "bos_token_id": 100,
        "eos_token_id": 100,
    },
    base="model",
    table="model.embed_tokens",
    dead={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)},
    heads=("ForSequenceClassification", "ForTokenClassification"),
)

# ---- Phi-3 ------------------------------------------------------------------------------------------------

SHORT, LONG = [1.0 + 0.1 * i for i in range(6)], [1.5 + 0.7 * i for i in range(6)]
LONGROPE = {"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
            "max_position_embeddings": 67, "original_max_position_embeddings": 12}  # fmt: skip


PHI3 = Family(
    name="phi3",
    module=phi3,
    prefix="Phi3",
    tiny={
        "model_type": "phi3",
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 67,
        "original_max_position_embeddings": 67,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "sliding_window": 7,
        "bos_token_id": 1,
        "eos_token_id": 100,
        "pad_token_id": 100,
    },
    base="model",
    table="model.embed_tokens",
    scores=("qkv_proj",),
    dead={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)},
    heads=("ForSequenceClassification", "ForTokenClassification"),
)


# ---- Persimmon --------------------------------------------------------------------------------------------

PERSIMMON = Family(
    name="persimmon",
    module=persimmon,
    prefix="Persimmon",
    tiny={
        "model_type": "persimmon",
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 67,
        "partial_rotary_factor": 0.5,
        "rope_theta": 25000.0,
        "bos_token_id": 100,
        "eos_token_id": 100,
    },
    base="model",
    table="model.embed_tokens",
    scores=("q_layernorm", "k_layernorm"),
    dead={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)},
    heads=("ForSequenceClassification", "ForTokenClassification"),
)

# ---- Fuyu -------------------------------------------------------------------------------------------------

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
)

FAMILIES = [GPT_NEO, OPENAI_GPT, PHI, PHI3, PERSIMMON, FUYU]

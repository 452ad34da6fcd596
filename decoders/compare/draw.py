"""What a kit computes with: small configs of awkward sizes, redrawn weights, and the cases."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders.formats import FAMILIES, family, find, modern, read_config

LIMIT = 13  # tokens of a case; of longrope the last length with short factors


ROTARY = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 97,
}
SMALL = {
    "gpt_neo": {"vocab_size": 67, "max_position_embeddings": 97, "hidden_size": 48, "num_layers": 2,
                "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5,
                "intermediate_size": 56, "bos_token_id": 1, "eos_token_id": 2},
    "openai-gpt": {"vocab_size": 67, "n_positions": 97, "n_embd": 36, "n_layer": 2, "n_head": 3},
    "phi": {**ROTARY, "num_key_value_heads": 2, "partial_rotary_factor": 0.7},
    "phi3": {**ROTARY, "num_key_value_heads": 2, "sliding_window": 5, "pad_token_id": 0,
             "partial_rotary_factor": 0.7, "original_max_position_embeddings": LIMIT,
             "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6],
                              "long_factor": [1.0, 1.5, 2.7, 5.1]}},
    "persimmon": {**ROTARY, "hidden_size": 36, "num_attention_heads": 3, "partial_rotary_factor": 0.7,
                  "rope_theta": 25000.0},
}  # fmt: skip
SMALL["fuyu"] = {**SMALL["persimmon"], "patch_size": 3, "image_token_id": 60}
COMPACT = {  # smaller still, for kits that are kept in a repository
    "gpt_neo": {"vocab_size": 29, "hidden_size": 20, "intermediate_size": 22, "max_position_embeddings": 53},
    "openai-gpt": {"vocab_size": 29, "n_embd": 15, "n_positions": 53},
    "phi": {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 28},
    "phi3": {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 20,
             "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.3], "long_factor": [1.0, 2.7]}},
    "persimmon": {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 20, "partial_rotary_factor": 0.5},
    "fuyu": {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 20, "partial_rotary_factor": 0.5,
             "image_token_id": 23},
}  # fmt: skip
SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "num_layers",
    "num_heads",
    "attention_types",
    "attention_layers",
    "window_size",
    "sliding_window",
    "patch_size",
    "image_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "text_config",
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
}


SPELLINGS = {"gpt1": "openai-gpt", "gpt": "openai-gpt", "openaigpt1": "openai-gpt"}


def family_of(name: str) -> str | None:
    """The family that is meant: `openai_gpt`, `GPT-Neo`, `phi-3`; None where it is none, or where a folder of
    this very name stands, which is a checkpoint."""
    if name in FAMILIES:
        return name
    plain = re.sub("[-_ .]", "", name.lower())
    spelled = {re.sub("[-_]", "", family): family for family in FAMILIES} | SPELLINGS
    return None if Path(name).is_dir() else spelled.get(plain)


def small_config(
    source: str, layers: int | None = None, fields: Mapping[str, Any] = MappingProxyType({})
) -> dict:
    """A `config.json` of awkward little sizes: a family's, or of all that a checkpoint folder says but its
    sizes. ValueError for a name that is neither."""
    own: dict = {}
    source = family_of(source) or source
    if source not in FAMILIES:
        if not Path(source).exists() and "/" not in source:
            raise ValueError(f"{source} is neither a checkpoint nor one of {', '.join(FAMILIES)}")
        stored = modern(read_config(find(source, weights=False)))
        own = {**stored, **(stored.get("text_config") or {}), "model_type": stored["model_type"]}
        source = family(own)
    small = dict(SMALL[source])
    if own:
        heads = small.get("num_attention_heads")
        grouped = own.get("num_key_value_heads") not in (None, own.get("num_attention_heads"))
        if "num_key_value_heads" in small and not grouped:
            small["num_key_value_heads"] = heads
        if source == "phi3":
            small["sliding_window"] = small["sliding_window"] if own.get("sliding_window") else None
        small |= {key: value for key, value in own.items() if key not in SIZES and key != "rope_scaling"}
        if "rope_scaling" in own:
            small["rope_scaling"] = shortened(own["rope_scaling"], small)
    if layers is not None:
        key = next(key for key in ("num_hidden_layers", "num_layers", "n_layer") if key in small)
        if not 1 <= layers <= 1000:
            raise ValueError(f"--layers must be from 1 to 1000, not {layers}")
        small[key] = layers
        if "attention_types" in small:
            small["attention_types"] = [[["global", "local"][i % 2 : i % 2 + 1], 1] for i in range(layers)]
    small = {
        key: value for key, value in {**small, **fields}.items() if value is not None or key not in fields
    }
    if source == "fuyu":  # as the hub nests it, and as 4.37 reads it
        outside = ("patch_size", "image_token_id", "model_type")
        small["text_config"] = {key: value for key, value in small.items() if key not in outside}
        small["text_config"]["model_type"] = "persimmon"
    return {**small, "model_type": source, "architectures": [FAMILIES[source][1]]}


def shortened(scaling: dict | None, small: dict) -> dict | None:
    """A rope_scaling for a smaller head: the factors evenly out of the list."""
    if not scaling or "long_factor" not in scaling:
        return scaling
    D = small["hidden_size"] // small["num_attention_heads"]
    n = int(D * small.get("partial_rotary_factor", 1.0)) // 2
    return {
        key: [value[i * len(value) // n] for i in range(n)]
        if key.endswith("_factor") and isinstance(value, list)
        else value
        for key, value in scaling.items()
    }


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices N(0, 1/fan_in), norm weights 1 + 0.3 N, biases 0.3 N.

    With the default initialisation biases are 0, norms 1 and attention is flat: a wrong GELU, swapped q and k
    or a doubled rotary fraction then pass any tolerance.
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


@torch.no_grad()
def awkward(model: nn.Module) -> nn.Module:
    """Rounded to what all floating dtypes hold. The last token (the last position, where there is a table of
    them) has a huge number, as first tokens of trained models do, whose square overflows float16; the token
    before the last is so small that a norm's epsilon counts."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    tables[-1][-1, 7] = 320.0
    tables[0][-2] *= 0.03
    for p in model.parameters():
        rounded = p.bfloat16().half().float()
        p.copy_(torch.where(rounded == p.bfloat16().float(), rounded, 0.0))
    return model


def inputs_of(config: Any, seed: int) -> dict[str, dict[str, Tensor]]:
    """Case -> arguments. Labels of padding, and of the token behind it, are left out of the loss."""
    kind, V = config.model_type, config.vocab_size
    draw = torch.Generator().manual_seed(seed)

    def ids(B: int, T: int) -> Tensor:
        return torch.randint(3, V - 8, (B, T), generator=draw)

    def case(found: Tensor, mask: Tensor | None = None, **others: Tensor) -> dict[str, Tensor]:
        labels = found.clone()
        if mask is not None:
            others["attention_mask"] = mask
            labels[(mask == 0) | (mask.roll(1, 1) == 0)] = -100
        return {"input_ids": found, "labels": labels, **others}

    plain = ids(2, LIMIT)
    plain[0, 3], plain[1, 0] = V - 2, V - 2
    left, right = torch.ones(2, LIMIT, dtype=torch.long), torch.ones(2, LIMIT, dtype=torch.long)
    left[0, :4], right[1, -3:] = 0, 0
    positions = torch.arange(LIMIT) + torch.arange(LIMIT).clamp(min=4) // 2
    positions += 19 if kind in ("gpt_neo", "openai-gpt") else 1903
    whole = ids(1, LIMIT)
    learned = kind in ("gpt_neo", "openai-gpt")
    huge = case(torch.cat([torch.tensor([[V - 1]]), ids(1, LIMIT - 4)], dim=1))
    if learned:
        most = getattr(config, "n_positions", None) or config.max_position_embeddings
        huge = case(
            huge["input_ids"],
            torch.ones_like(huge["input_ids"]),
            position_ids=torch.cat([torch.tensor([most - 1]), torch.arange(LIMIT - 4)])[None],
        )
    cases = {
        "plain": case(plain),
        "left": case(ids(2, LIMIT), left, position_ids=(left.cumsum(1) - 1).clamp(min=0)),
        "right": case(ids(2, LIMIT), right),
        "cached": {"past_ids": whole[:, :8], "input_ids": whole[:, 8:]},
        "positions": case(ids(1, LIMIT), torch.ones_like(whole), position_ids=positions[None]),
        "massive": huge,
    }
    if learned:
        cases["types"] = case(ids(1, LIMIT), token_type_ids=ids(1, LIMIT))
    if getattr(config, "rope_scaling", None) and kind == "phi3":
        cases["long"] = case(ids(1, LIMIT + 1))
    elif getattr(config, "rope_varies", False) and config.max_position_embeddings < LIMIT:
        del cases["cached"]  # frequencies that grow with the text leave no cached key right
    if kind == "fuyu":
        words, n = ids(1, LIMIT), 5
        where = torch.full((1, LIMIT), -1)
        where[0, [1, 2, 4, 5, 6]] = torch.arange(n)
        words[where >= 0] = config.image_token_id
        P = config.patch_size**2 * config.num_channels
        patches = torch.randn(1, n, P, generator=draw).bfloat16().float()
        cases["pictures"] = case(words, image_patches=patches, image_patches_indices=where)
        cases["pictures"]["labels"][where >= 0] = -100
    return cases


ABOUT = {
    "plain": "two rows, longer than any window, labels",
    "left": "padding on the left, position_ids that do not count it",
    "right": "padding on the right",
    "cached": "read past_ids first and keep their keys and values; the stages are those of input_ids then",
    "positions": "position_ids with gaps, far from 0",
    "massive": "the first token has one huge number, as in trained models; half precision must bear it",
    "types": "token_type_ids",
    "long": "one token beyond original_max_position_embeddings: the long factors",
    "pictures": "image_patches, and where they stand",
}

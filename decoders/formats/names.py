"""What each era calls its tensors -> the hub's names."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .folder import in_one_line

Named = Iterator[tuple[str, Tensor]]


def as_it_is(name: str, tensor: Tensor, config: dict) -> Named:
    yield name, tensor


def modern_phi(name: str, tensor: Tensor, config: dict) -> Named:
    """A tensor of 2023's three layouts under today's names; a fused QKV matrix is split."""
    name = re.sub(r"^transformer\.embd\.wte\.|^layers\.0\.wte\.", "model.embed_tokens.", name)
    name = re.sub(r"^transformer\.h\.", "model.layers.", name)
    if "n_layer" in config and (position := re.match(r"layers\.(\d+)\.", name)):  # one nn.Sequential
        i, rest = int(position[1]), name[position.end() :]
        name = f"lm_head.{rest}" if i > config["n_layer"] else f"model.layers.{i - 1}.{rest}"
    name = name.replace("lm_head.linear.", "lm_head.").replace("lm_head.ln.", "model.final_layernorm.")
    name = name.replace(".ln.", ".input_layernorm.").replace(".mixer.out_proj.", ".self_attn.dense.")
    if ".mlp.fc_in." in name or ".mlp.fc_out." in name:
        return  # stored a second time beside fc1 and fc2
    if name.startswith("classifier."):
        name = name.replace("classifier.", "score.")
    heads: int = config.get("n_head", config.get("num_attention_heads", 0))
    if ".mixer.Wqkv." in name:  # all of q, then k, then v
        D = config["n_embd"] // heads
        K = (config.get("n_head_kv") or heads) * D
        parts = tensor.split([len(tensor) - 2 * K, K, K])
        name = name.replace(".mixer.Wqkv.", ".self_attn.{}_proj.")
    elif ".self_attn.query_key_value." in name:  # q, k and v of the first head, of the second ...
        parts = tensor.view(heads, 3, -1, *tensor.shape[1:]).unbind(1)
        parts = [part.reshape(-1, *tensor.shape[1:]) for part in parts]
        name = name.replace("query_key_value", "{}_proj")
    else:
        yield name, tensor
        return
    for letter, part in zip("qkv", parts, strict=True):
        yield name.format(letter), part


def modern_persimmon(name: str, tensor: Tensor, config: dict) -> Named:
    """A tensor of Adept's own release under the hub's name. Rows and columns are the same."""
    name = name.replace("language_model.embedding.word_embeddings.", "model.embed_tokens.")
    name = name.replace("language_model.encoder.", "model.").replace(".self_attention.", ".self_attn.")
    yield name.replace("word_embeddings_for_head.", "lm_head."), tensor


def modern_fuyu(name: str, tensor: Tensor, config: dict) -> Named:
    """A tensor of the first upload, of Transformers 5 or of Adept's release under the hub's name."""
    if name.startswith("image_patch_projection."):
        return  # in the release, of no use
    if not name.startswith("language_model.model."):
        [(name, tensor)] = modern_persimmon(name, tensor, config)
    name = name.replace("vit_encoder.linear_encoder.", "vision_embed_tokens.")
    name = re.sub(r"^model\.(?=vision_embed_tokens\.)", "", name)
    name = re.sub(r"^model\.(language_model\.)?", "language_model.model.", name)
    yield re.sub(r"^lm_head\.", "language_model.lm_head.", name), tensor


HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.", "multiple_choice_head.")
NEW_HEADS = HEADS[1:]  # may be absent: they are what a user adds to a base checkpoint
ALIASES = {  # class -> names under which an old Transformers, here 4.37, looks for the same tensor
    "PhiForTokenClassification": {"score.weight": "classifier.weight", "score.bias": "classifier.bias"},
}


class Layout(NamedTuple):
    prefix: str  # of every tensor but the top_level ones; files of the bare model lack it
    buffers_to_drop: str  # pattern of buffers that old versions stored: masks and rotary angles, not weights
    modern: Callable[[str, Tensor, dict], Named] = as_it_is
    top_level: tuple[str, ...] = HEADS


LAYOUTS = {
    "gpt_neo": Layout("transformer", r"\.attn\.attention\.(bias|masked_bias)"),
    "openai-gpt": Layout("transformer", r"\.h\.\d+\.attn\.bias"),
    "phi": Layout("model", r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)", modern_phi),
    "phi3": Layout("model", r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"),
    "persimmon": Layout("model", r"\.rotary_emb\.inv_freq", modern_persimmon),
    "fuyu": Layout("language_model", r"\.rotary_emb\.inv_freq", modern_fuyu, ("vision_embed_tokens.",)),
}


def flattened(tree: dict[str, Any], path: str = "") -> Named:
    """Tensors of nested dictionaries, names joined with dots. ValueError for what is no plain tensor."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{path}{key}.")
        elif isinstance(value, Tensor) and value.layout == torch.strided:
            yield path + key, value
        else:
            raise ValueError(f"{path}{key} is a {type(value).__name__}")


def grouped(names: Iterable[str]) -> str:
    """Names that differ in the layer only, as one. Example: h.0.x, h.1.x, h.5.x -> h.0-1,5.x"""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        groups.setdefault(no_number(name), []).extend([] if number is None else [int(number[0])])
    return in_one_line(key.replace("*", spans(n), 1) if n else key for key, n in groups.items())


def spans(numbers: list[int]) -> str:
    """Example: [0, 1, 5] -> 0-1,5"""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def no_number(name: str) -> str:
    """Example: h.3.ln_1.bias -> h.*.ln_1.bias"""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)

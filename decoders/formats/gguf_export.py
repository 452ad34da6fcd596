"""A plain checkpoint of Phi or Phi-3 -> what a GGUF file says of it: metadata, vocabulary, tensors.

It is what llama.cpp's own converter writes, with three differences, all for the better: phi2's
head_count_kv and feed_forward_length are the model's; rope.freq_base is there where it is not 10,000; and the
name of a Phi-3 contains "phi-3" exactly where its control tokens swallow the blanks behind them, because that
is what llama.cpp goes by.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .gguf import Kind
from .gguf_config import FACTORS, attention_factor
from .gguf_tensors import HUB_NAMES
from .gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from .gguf_writer import Entry, kind_named
from .vocab import BYTE_PIECE, CL100K, GPT2, O200K, PATTERN_BY_ROWS, AddedToken, Files

ARCHITECTURES = {"phi": "phi2", "phi3": "phi3"}
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
PRE = {GPT2: "phi-2", CL100K: "dbrx", O200K: "gpt-4o"}
TANH_GELU, SILU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), ("silu", "swish")


def gguf_metadata(
    config: dict[str, Any],
    files: Files,
    added: Iterable[AddedToken],
    ids: dict[str, int | None],
    *,
    name: str,
    kind: str,
    add_bos_token: bool,
    template: str,
) -> dict[str, Any]:
    """All metadata of a file. `config` is complete and of today; `files` and `added` are the vocabulary,
    `ids` the special tokens bos, eos and padding; `name` is a title, `kind` the type of the matrices.

    ValueError for what GGUF, or llama.cpp, has no place for.
    """
    added = list(added)
    found = model_metadata(config, title(files, added, name), kind)
    rows = config["vocab_size"]
    return found | vocabulary_metadata(files, added, ids, rows, add_bos_token, template)


def model_metadata(config: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
    """Of a complete config of today. ValueError for what GGUF, or llama.cpp, has no place for."""
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"GGUF has no {config['model_type']}: of the six families only phi and phi3")
    arch = ARCHITECTURES[config["model_type"]]
    C, H = config["hidden_size"], config["num_attention_heads"]
    refuse(config, "hidden_act", TANH_GELU if arch == "phi2" else SILU)
    refuse(config, "head_dim", (None, C // H))
    found = {
        "general.architecture": arch,
        "general.name": name,
        "general.file_type": TYPES[kind],
        "general.quantization_version": 2,
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": C,
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.attention.head_count": H,
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"] or H,
        f"{arch}.rope.dimension_count": int(config["partial_rotary_factor"] * (C // H)),
    }
    theta = float(config["rope_theta"])
    if arch == "phi2":
        refuse(config, "rope_scaling", (None,))
        found["phi2.attention.layer_norm_epsilon"] = float(config["layer_norm_eps"])
        return found if theta == 10000 else {**found, "phi2.rope.freq_base": theta}
    return found | {
        "phi3.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "phi3.rope.freq_base": theta,
        "phi3.attention.sliding_window": config["sliding_window"] or 0,
        **longrope_metadata(config),
    }


def refuse(config: dict[str, Any], key: str, known: tuple) -> None:
    if config.get(key) not in known:
        raise ValueError(f"GGUF has no place for {key} {config[key]!r:.60}")


def longrope_metadata(config: dict[str, Any]) -> dict[str, Any]:
    longest, original = config["max_position_embeddings"], config["original_max_position_embeddings"]
    found: dict[str, Any] = {"phi3.rope.scaling.original_context_length": original}
    if scaling := config["rope_scaling"]:
        factor = scaling.get("attention_factor") or attention_factor(longest, original)
        found["phi3.rope.scaling.attn_factor"] = float(factor)
    return found


# ---- Tensors -----------------------------------------------------------------------------------------------


def gguf_entries(
    config: dict[str, Any], shapes: Mapping[str, torch.Size], kind: str, numbers: Callable[[str], Tensor]
) -> list[Entry]:
    """All tensors of the file. `shapes` are those of the hub's names, `numbers(name)` gives a tensor."""
    arch = ARCHITECTURES[config["model_type"]]
    found = [
        Entry(name, (len(factors),), kind_named("F32"), partial(torch.tensor, factors))
        for name, factors in longrope_factors(config)
    ]
    for hub, size in shapes.items():
        name = gguf_name(arch, hub)
        found.append(Entry(name, tuple(size), kind_of(name, size, kind), partial(numbers, hub)))
    table = "model.embed_tokens.weight"
    if arch == "phi2" and "lm_head.weight" not in shapes:  # tied, and llama.cpp wants it twice
        shape = tuple(shapes[table])
        found.append(
            Entry("output.weight", shape, kind_of("output.weight", shape, kind), lambda: numbers(table))
        )
    return found


def longrope_factors(config: dict[str, Any]) -> Iterable[tuple[str, list[float]]]:
    scaling = config.get("rope_scaling")
    if scaling and scaling.get("type") == "longrope":
        yield from zip(FACTORS, (scaling["short_factor"], scaling["long_factor"]), strict=True)


def gguf_name(arch: str, hub: str) -> str:
    """Example: model.layers.3.input_layernorm.weight -> blk.3.attn_norm.weight"""
    module, _, leaf = hub.rpartition(".")
    own = {
        theirs: ours
        for ours, theirs in HUB_NAMES[arch].items()
        if theirs != "self_attn.qkv_proj" or arch == "phi3"
    }
    if module in own:
        return f"{own[module]}.{leaf}"
    parts = module.removeprefix("model.layers.").split(".", 1)
    if module.startswith("model.layers.") and len(parts) == 2 and parts[1] in own:
        return f"blk.{parts[0]}.{own[parts[1]]}.{leaf}"
    raise ValueError(f"GGUF has no place for {hub}: only for a model that generates text")


def kind_of(name: str, shape: Iterable[int], wanted: str) -> Kind:
    """Vectors are F32; the output layer of a Q4_0 file has 8 bits; rows that blocks do not divide F16."""
    shape = tuple(shape)
    if len(shape) == 1:
        return kind_named("F32")
    kind = kind_named("Q8_0" if wanted == "Q4_0" and name == "output.weight" else wanted)
    return kind if shape[-1] % kind.block == 0 else kind_named("F16")


# ---- Vocabulary --------------------------------------------------------------------------------------------


def vocabulary_metadata(
    files: Files,
    added: Iterable[AddedToken],
    ids: dict[str, int | None],
    rows: int,
    add_bos_token: bool,
    template: str,
) -> dict[str, Any]:
    """`added` with their flags; `ids` of the roles bos, eos and padding; `rows` of the token table."""
    added = list(added)
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    largest = max([*files.vocab.values(), *(token.id for token in added)])
    if largest >= rows:
        raise ValueError(f"the tokenizer has the id {largest}, and the token table has {rows} rows")
    for piece, id in files.vocab.items():
        tokens[id], types[id] = piece, type_of(piece, files)
    for token in added:
        control = token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
        tokens[token.id], types[token.id] = token.content, CONTROL if control else USER_DEFINED
    own = piece_metadata(files, added, rows) if files.pieces else byte_metadata(files, rows)
    found = {"tokenizer.ggml.model": "llama" if files.pieces else "gpt2", **own}
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    found |= {f"tokenizer.ggml.{role}_token_id": id for role, id in ids.items() if id is not None}
    found["tokenizer.ggml.add_bos_token"] = add_bos_token
    return found | ({"tokenizer.chat_template": template} if template else {})


def type_of(token: str, files: Files) -> int:
    if files.pieces is None:
        return NORMAL
    if BYTE_PIECE.fullmatch(token):
        return BYTE
    if token == files.pieces.unknown:
        return UNKNOWN
    return CONTROL if token in files.pieces.control else NORMAL


def byte_metadata(files: Files, rows: int) -> dict[str, Any]:
    pattern = files.pattern or PATTERN_BY_ROWS.get(rows, GPT2)
    merges = [" ".join(pair) for pair in files.merges or []]
    return {"tokenizer.ggml.pre": PRE[pattern], "tokenizer.ggml.merges": merges}


def piece_metadata(files: Files, added: list[AddedToken], rows: int) -> dict[str, Any]:
    """Scores: minus the rank of a piece; where only tokenizer.json is there, of its first merge."""
    if files.merges is None or files.pieces is None:
        raise ValueError("a unigram vocabulary has no place in GGUF's llama model")
    own: dict[str, float] = dict(files.pieces.scores)
    if not any(own.values()):
        for rank, (a, b) in enumerate(files.merges):
            own[a + b] = own[a + b] or -1.0 - rank
    scores = [-10000.0] * rows
    for piece, id in files.vocab.items():
        scores[id] = own[piece]
    for token in added:
        scores[token.id] = -1000.0
    return {
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": files.vocab[files.pieces.unknown],
    }


def title(files: Files, added: Iterable[AddedToken], name: str) -> str:
    """`general.name`, by which llama.cpp decides whether Phi-3's control tokens swallow blanks."""
    if files.pieces is None:
        return name
    swallow = any(token.rstrip for token in added)
    named = any(part in name.lower() for part in ("phi-3", "phi3"))
    if swallow and not named:
        return f"phi-3 {name}"
    return name if swallow or not named else "Phi 3, its tokenizer of April 2024"

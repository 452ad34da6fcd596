"""A GGUF file's metadata -> the hub's `config.json` and `generation_config.json`.

Sizes come from the tensors, which cannot lie: phi2's feed_forward_length, for one, always says four times the
width. What the file does not know (dropouts) has the hub's default. Nothing heavy is imported.
"""

import re
import struct
from math import log, sqrt
from pathlib import Path
from typing import Any

from .gguf import Header, Placed, read_headers

FAMILY = {"phi2": "phi", "phi3": "phi3"}  # general.architecture -> model_type
KNOWN = {  # keys after the architecture's name: those that decide numbers, and those that tensors tell better
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
}
FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
STOPS = ("<|end|>", "<|im_end|>", "<|endoftext|>")  # control tokens that end an answer
PHI3_STOPS = (*STOPS, "<|assistant|>")  # of Phi-3's vocabulary, which is Llama's


class Metadata:
    """What is asked of the metadata, checked: every error names the file and the key."""

    def __init__(self, header: Header):
        self.header, self.values = header, header.metadata
        self.kind = architecture(header)

    def wrong(self, key: str, wanted: str) -> ValueError:
        value = ascii(self.values.get(key, "missing"))[:80]
        return ValueError(f"{self.header.file}: {key} must be {wanted}, and is {value}")

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number. Where it is told for each layer, the one that all of them have."""
        key = f"{self.kind}.{key}"
        value = self.values.get(key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or not least <= value < 2**31:
            raise self.wrong(key, f"a whole number from {least} on")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        key = f"{self.kind}.{key}"
        value: Any = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.wrong(key, "a positive number")
        return shortest(value)

    def token(self, key: str, rows: int) -> int | None:
        """A token's id; None where there is none."""
        key = f"tokenizer.ggml.{key}_token_id"
        value = self.values.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < rows):
            raise self.wrong(key, f"a token id below {rows}")
        return value

    def refuse_unknown(self) -> None:
        """A key that is not known here could change the numbers."""
        own = [key for key in self.values if key.startswith(f"{self.kind}.")]
        if unknown := [key for key in own if key.removeprefix(f"{self.kind}.") not in KNOWN]:
            raise ValueError(f"{self.header.file}: {ascii(unknown[0])[1:-1]:.80} is not supported")


def shortest(value: float) -> float:
    """The shortest decimal number that is this float32. Example: 9.999999747378752e-06 -> 1e-05, which is
    what the hub's config has."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def architecture(header: Header) -> str:
    """phi2 or phi3. ValueError for any other model."""
    kind = header.metadata.get("general.architecture")
    if kind not in FAMILY:
        message = (
            f"general.architecture is {ascii(kind)[:60]}, and of GGUF only {' and '.join(FAMILY)} are read"
        )
        raise ValueError(f"{header.file}: {message}")
    return kind


def gguf_config(path: Path) -> dict[str, Any]:
    """`config.json` of the GGUF file, or of the folder with one."""
    headers = read_headers(path)
    data = Metadata(headers[0])
    data.refuse_unknown()
    tensors = {name: placed for header in headers for name, placed in header.tensors.items()}
    config = {**sizes(data, tensors), **token_ids(data, tensors)}
    return config | (phi_fields(data) if data.kind == "phi2" else phi3_fields(data, tensors, config))


def sizes(data: Metadata, tensors: dict[str, Placed]) -> dict[str, Any]:
    V, C = shape_of(data, tensors, "token_embd.weight")
    layers = {int(block[1]) for name in tensors if (block := re.match(r"blk\.(\d{1,9})\.", name))}
    if len(layers) != data.whole("block_count") or layers != set(range(len(layers))):
        raise data.wrong(f"{data.kind}.block_count", f"the number of layers, {len(layers)}")
    H, K, D = heads(data, tensors)
    R = data.whole("rope.dimension_count")
    if R > D:
        raise data.wrong(f"{data.kind}.rope.dimension_count", f"at most {D}, the size of a head")
    fields = {
        "model_type": FAMILY[data.kind],
        "vocab_size": V,
        "hidden_size": C,
        "intermediate_size": shape_of(data, tensors, "blk.0.ffn_down.weight")[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "max_position_embeddings": data.whole("context_length"),
        "partial_rotary_factor": share(R, D),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return fields if H * D == C else {**fields, "head_dim": D}


def share(R: int, D: int) -> float:
    """The partial_rotary_factor with which int(factor * D) is R."""
    return R / D if int(R / D * D) == R else (R + 0.5) / D


def shape_of(data: Metadata, tensors: dict[str, Placed], name: str) -> tuple[int, int]:
    if name not in tensors or len(tensors[name].shape) != 2:
        raise ValueError(f"{data.header.file} holds no matrix {name}")
    rows, columns = tensors[name].shape
    return rows, columns


def heads(data: Metadata, tensors: dict[str, Placed]) -> tuple[int, int, int]:
    """H, K and D. phi2's head_count_kv always says H: the rows of the matrices tell."""
    H, width = data.whole("attention.head_count"), shape_of(data, tensors, "blk.0.attn_output.weight")[1]
    if width % H:
        raise data.wrong(f"{data.kind}.attention.head_count", f"a divisor of {width}")
    if "blk.0.attn_k.weight" in tensors:
        rows = shape_of(data, tensors, "blk.0.attn_k.weight")[0]
    else:
        rows = (shape_of(data, tensors, "blk.0.attn_qkv.weight")[0] - width) // 2
    return H, rows // (width // H), width // H


def token_ids(data: Metadata, tensors: dict[str, Placed]) -> dict[str, int | None]:
    V, _ = shape_of(data, tensors, "token_embd.weight")
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": data.token(theirs, V) for ours, theirs in names.items()}


def phi_fields(data: Metadata) -> dict[str, Any]:
    return {
        "architectures": ["PhiForCausalLM"],
        "hidden_act": "gelu_new",
        "layer_norm_eps": data.real("attention.layer_norm_epsilon"),
        "rope_theta": data.real("rope.freq_base", 10000.0),  # phi2's files leave it out
    }


def phi3_fields(data: Metadata, tensors: dict[str, Placed], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": data.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": data.real("rope.freq_base"),
        "sliding_window": window(data, config),
        **longrope(data, tensors, config["max_position_embeddings"]),
    }


def window(data: Metadata, config: dict[str, Any]) -> int | None:
    """0 is the hub's null. Files of before August 2024 have no key; of models whose window is shorter than
    their context these are mini-4k and medium-4k."""
    if f"{data.kind}.attention.sliding_window" in data.values:
        return data.whole("attention.sliding_window", least=0) or None
    is_4k = config["max_position_embeddings"] == 4096 and config["num_hidden_layers"] in (32, 40)
    return 2047 if is_4k else None


def longrope(data: Metadata, tensors: dict[str, Placed], longest: int) -> dict[str, Any]:
    """`rope_scaling`, which a file has where it has the factors: there is no other sign."""
    original = data.whole("rope.scaling.original_context_length", longest)
    found: dict[str, Any] = {"original_max_position_embeddings": original}
    present = [name for name in FACTORS if name in tensors]
    if not present:
        return found
    if len(present) < 2:
        raise ValueError(
            f"{data.header.file} holds {present[0]} and no {(set(FACTORS) - set(present)).pop()}"
        )
    short, long = (factors(data.header.file, tensors[name], name) for name in FACTORS)
    scaling: dict[str, Any] = {"type": "longrope", "short_factor": short, "long_factor": long}
    if "phi3.rope.scaling.attn_factor" in data.values:
        factor = data.real("rope.scaling.attn_factor")
        if factor != shortest(attention_factor(longest, original)):  # else it is computed, in full precision
            scaling["attention_factor"] = factor
    return {**found, "rope_scaling": scaling}


def attention_factor(longest: int, original: int) -> float:
    """What longrope multiplies cos and sin with where the config does not say."""
    if longest <= original or original == 1:
        return 1.0
    return sqrt(1 + log(longest / original) / log(original))


def factors(file: Path, placed: Placed, name: str) -> list[float]:
    """The float32 numbers of a small tensor."""
    if placed.kind.name != "F32" or placed.nbytes > 2**16:
        raise ValueError(
            f"{file}: {name} must be a few numbers in F32, not {placed.kind.name} {placed.shape}"
        )
    with file.open("rb") as raw:
        raw.seek(placed.offset)
        content = raw.read(placed.nbytes)
    return [shortest(value) for value in struct.unpack(f"<{placed.nbytes // 4}f", content)]


# ---- Beside the config -------------------------------------------------------------------------------------


def gguf_generation_config(path: Path) -> dict[str, Any]:
    """`generation_config.json`: at which tokens an answer ends. The file's own end is one of them; the hub's
    list has the ends of turns too, and of these the file knows the names."""
    header = read_headers(path)[0]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    ends = {header.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")}
    names = PHI3_STOPS if header.metadata.get("tokenizer.ggml.model") == "llama" else STOPS
    if isinstance(tokens, list):
        ends |= {id for id, token in enumerate(tokens) if token in names}
    stops = sorted(id for id in ends if type(id) is int)
    return {"eos_token_id": stops} if stops else {}

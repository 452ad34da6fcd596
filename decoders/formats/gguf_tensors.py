"""Tensors of a GGUF file of Phi (`phi2`) or Phi-3 (`phi3`), under the hub's names, as a packaging.

Nothing is permuted: rows and columns are the hub's. phi3's `ffn_up` is the fused gate and up projection.
phi2 has q, k and v apart or fused in `attn_qkv`; both give the hub's three.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .files import forget
from .folder import gguf_files
from .gguf import Placed, read_headers
from .gguf_blocks import dequantize, whole_numbers
from .gguf_config import FACTORS, architecture
from .packed import Bits, Packed, named_parts

NAME = "GGUF"
HUB_NAMES = {
    "phi2": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.final_layernorm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_qkv": "self_attn.qkv_proj",  # of no model here: it is cut into the three
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    },
    "phi3": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
}


def recognise(folder: Path, config: dict) -> bool:
    return bool(gguf_files(folder))


def tensors(folder: Path, config: dict) -> Iterator[tuple[Path, str, Tensor | Packed]]:
    headers = read_headers(folder)
    kind = architecture(headers[0])
    for header in headers:
        size = header.file.stat().st_size
        # mapped privately: who changes a tensor changes memory, never the file
        content = torch.from_file(str(header.file), shared=False, size=size, dtype=torch.uint8)
        for name, placed in header.tensors.items():
            if name not in FACTORS:
                hub = hub_name(kind, name, header.file)
                for part, tensor in named_parts(
                    from_bytes(content, placed), partial(apart, kind, hub, config)
                ):
                    yield header.file, part, tensor


def from_bytes(content: Tensor, placed: Placed) -> Tensor | Packed:
    """float32 as it lies in the file, mapped into memory; all else is made when it is used."""
    raw = content[placed.offset : placed.offset + placed.nbytes]
    if placed.kind.name == "F32":
        return raw.view(torch.float32).view(placed.shape)

    def read(dtype: torch.dtype) -> Tensor:
        numbers = dequantize(raw, placed.kind, placed.shape, dtype)
        if numbers.data_ptr() != raw.data_ptr():
            forget(raw)
        return numbers

    def stored_bits() -> Bits:
        bits = whole_numbers(raw, placed.kind, placed.shape)
        forget(raw)
        return bits

    shape, bits = torch.Size(placed.shape), None
    if placed.kind.name in ("Q8_0", "Q4_0", "Q4_1") and len(shape) == 2:
        bits = stored_bits
    return Packed(shape, torch.float32, placed.kind.name, placed.nbytes, read, bits)


def hub_name(kind: str, name: str, file: Path) -> str:
    """Example: blk.3.attn_norm.weight -> model.layers.3.input_layernorm.weight"""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    hub = HUB_NAMES[kind].get(found[2]) if found else None
    of_model = hub is not None and hub.startswith(("model.", "lm_head"))
    if found is None or hub is None or of_model != (found[1] is None):
        raise ValueError(f"{file} holds the tensor {name}, which no {kind} has")
    layer = "" if of_model else f"model.layers.{int(found[1])}."
    return f"{layer}{hub}.{found[3]}"


def apart(kind: str, hub: str, config: dict, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The tensor under its hub name; of phi2's fused q, k and v the three."""
    if kind == "phi3" or ".qkv_proj." not in hub:
        return [(hub, tensor)]
    D = config["hidden_size"] // config["num_attention_heads"]
    K = config["num_key_value_heads"] * D
    rows = tensor.split([len(tensor) - 2 * K, K, K])
    return [
        (hub.replace("qkv_proj", f"{letter}_proj"), part) for letter, part in zip("qkv", rows, strict=True)
    ]

"""Checkpoint folders for the tests, in every layout that weights.py reads."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.families import Family


def weights_of(family: Family, head: str = "ForCausalLM", dtype=torch.float32) -> dict[str, torch.Tensor]:
    """What a hub file of this family holds: no tied output layer, but dead buffers."""
    return {**weights_of_model(family.model(head, dtype=dtype)), **family.dead}


def weights_of_model(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Under the hub's names, a tied output layer once."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def write_config(folder: Path, family: Family, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [family.class_name()], **family.tiny, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def halves(state: dict) -> list[dict]:
    names = sorted(state)
    return [{n: state[n] for n in names[: len(names) // 2]}, {n: state[n] for n in names[len(names) // 2 :]}]


def write_index(folder: Path, whole: str, parts: dict[str, dict]) -> None:
    weight_map = {name: file for file, part in parts.items() for name in part}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / f"{whole}.index.json").write_text(text)


def safetensors_whole(folder: Path, state: dict) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def safetensors_shards(folder: Path, state: dict) -> None:
    parts = {f"model-0000{i}-of-00002.safetensors": part for i, part in enumerate(halves(state), 1)}
    for file, part in parts.items():
        save_file(part, folder / file)
    write_index(folder, "model.safetensors", parts)


def pickle_whole(folder: Path, state: dict) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def pickle_old(folder: Path, state: dict) -> None:
    """As PyTorch wrote it before 1.6: no archive, cannot be mapped."""
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pickle_shards(folder: Path, state: dict) -> None:
    parts = {f"pytorch_model-0000{i}-of-00002.bin": part for i, part in enumerate(halves(state), 1)}
    for file, part in parts.items():
        torch.save(part, folder / file)
    write_index(folder, "pytorch_model.bin", parts)


def flax_tree(state: dict) -> dict:
    """Nested names and matrices [in, out], as Flax has them; no buffers."""
    tree: dict = {}
    for name, tensor in state.items():
        if name.endswith(("attention.bias", "masked_bias")):
            continue
        *path, leaf = name.split(".")
        if leaf == "weight":
            leaf = "scale" if "ln_" in path[-1] else "embedding" if path[-1] in ("wte", "wpe") else "kernel"
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = tensor.t().contiguous() if leaf == "kernel" else tensor
    return tree


def flax(folder: Path, state: dict) -> None:
    """As flax.serialization.to_bytes writes it: arrays are extension 1."""
    import msgpack

    def pack(tensor: torch.Tensor) -> msgpack.ExtType:
        content = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        return msgpack.ExtType(1, msgpack.packb((tuple(tensor.shape), str(tensor.dtype)[6:], content)))

    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(flax_tree(state), default=pack))


WRITERS = [safetensors_whole, safetensors_shards, pickle_whole, pickle_old, pickle_shards, flax]


def tensorflow(folder: Path, state: dict, head: str = "LMHeadModel") -> None:
    """GPT-1 as TensorFlow's classes saved it."""
    import h5py

    group = f"tf_open_aigpt_{head.lower()}"
    with h5py.File(folder / "tf_model.h5", "w") as file:
        for name, tensor in state.items():
            if name == "lm_head.weight":
                continue
            *parts, leaf = name.removeprefix("transformer.").split(".")
            if parts[0] == "h":
                parts = [f"h_._{parts[1]}", *parts[2:]]
            if "ln_" in name:
                leaf = {"weight": "gamma", "bias": "beta"}[leaf]
            elif "positions_embed" in name:
                leaf = "embeddings"
            elif name.startswith(("multiple_choice_head", "score")) and leaf == "weight":
                leaf, tensor = "kernel", tensor.t()
            elif leaf == "bias" and "multiple" not in name:
                tensor = tensor[None]
            inside = [] if name.startswith(("multiple_choice_head", "score")) else ["transformer"]
            top = "transformer" if inside else parts[0]
            file["/".join([top, group, *inside, *parts, f"{leaf}:0"])] = tensor.numpy()
        file.create_group("top_level_model_weights")


def raw_safetensors(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file by hand, as broken as it may be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data

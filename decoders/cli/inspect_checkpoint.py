"""`inspect MODEL`: what is in a checkpoint. Only headers are read, and of packed weights one matrix of each
kind and shape."""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from decoders import family, find, kernels, model_class, read_config, weights
from decoders.formats import Packed, cache_shape, grouped, no_number, packaging_name

from .loading import context_length
from .output import EXIT_DIFFERENT, escaped, human_bytes, print_result

Sort = tuple[str, torch.Size]  # kind and shape of a packed matrix


def run(args: argparse.Namespace) -> int:
    folder = find(args.model)
    config = read_config(folder)
    model, tensors = weights.fitting(model_class(config), folder)
    matched = weights.match(model, tensors)
    facts = {"folder": str(folder), "family": family(config), **facts_of(model, matched, folder)}
    facts["context"] = context_length(model)
    kept_bytes = run_packed(tensors)
    if kept_bytes:
        facts |= packing_facts(folder, config, tensors, kept_bytes)
        dtype = getattr(torch, facts["dtype"])
        facts["memory packed"] = facts["memory"] - saved_by_packing(matched, kept_bytes, dtype)
    facts |= {"new": matched.new, "unused": matched.unused, "problems": matched.problems}
    if args.json:
        facts["tensors"] = [
            {
                "name": name,
                "shape": list(tensor.shape),
                "file": tensors.origin[name][0].name,
                "stored": tensors.origin[name][1],
            }
            for name, tensor in tensors.stored.items()
        ]
        print_result(json.dumps(facts, ensure_ascii=False) + "\n")
    else:
        print_result(escaped(as_table(facts, tensors, kept_bytes)))
    return EXIT_DIFFERENT if matched.problems else 0


def facts_of(model: Any, matched: Any, folder: Any) -> dict[str, Any]:
    """Class, sizes, dtype, memory; the quantization where there is one."""
    quantized = [module for module in model.modules() if isinstance(module, kernels.Quantized)]
    others = sum(p.numel() for p in model.parameters())
    buffers = dict(model.named_buffers())  # only quantised layers have some
    dtype = weights.stored_dtype(folder, (t for name, t in matched.tensors.items() if name not in buffers))
    facts = {
        "model": type(model).__name__,
        "parameters": others + sum(layer.in_features * layer.out_features for layer in quantized),
        "dtype": str(dtype).removeprefix("torch."),
        "memory": others * dtype.itemsize + sum(t.nbytes for t in buffers.values()),
        "cache per token": 2 * math.prod(cache_shape(model.config)) * dtype.itemsize,
        "CPU kernels": kernels.status(),
    }
    if quantized:
        facts["quantized"] = quantized[0].kind
    return facts


def packing_facts(
    folder: Path, config: dict[str, Any], tensors: weights.Tensors, kept_bytes: dict[Sort, int]
) -> dict[str, Any]:
    """Of packed weights: by what, types by their share of the weights, bits per weight with scales."""
    stored = tensors.stored.values()
    total, sizes = sum(tensor.shape.numel() for tensor in stored), Counter[str]()
    for tensor in stored:
        kind = tensor.kind if isinstance(tensor, Packed) else str(tensor.dtype).removeprefix("torch.")
        sizes[kind] += tensor.shape.numel()
    types = {kind: round(size / total, 4) for kind, size in sizes.most_common()}
    bits = 8 * sum(tensor.nbytes for tensor in stored) / total
    packed = [tensor for tensor in stored if isinstance(tensor, Packed)]
    kept = sum(tensor.shape.numel() for tensor in packed if kept_bytes[sort_of(tensor)])
    return {
        "packaging": packaging_name(folder, config),
        "types": types,
        "bits per weight": round(bits, 2),
        "runs packed": round(kept / total, 4),
    }


def sort_of(tensor: Packed) -> Sort:
    return tensor.kind, tensor.shape


def run_packed(tensors: weights.Tensors) -> dict[Sort, int]:
    """Kind and shape -> bytes of the layer that holds what is stored; 0 where none can, and
    `load(packed=True)` dequantises it. One matrix of each is read and asked for all."""
    packed = {sort_of(t): t for t in tensors.stored.values() if isinstance(t, Packed)}
    return {sort: sum(t.nbytes for t in bits_of(tensor)) for sort, tensor in packed.items()}


def bits_of(tensor: Packed) -> list[torch.Tensor]:
    return list((weights.layer_bits(tensor) or {}).values())


def saved_by_packing(matched: weights.Match, kept_bytes: dict[Sort, int], dtype: torch.dtype) -> int:
    """Bytes by which `load(packed=True)` is smaller than a model whose weights are all in `dtype`."""
    packed = [tensor for tensor in matched.tensors.values() if isinstance(tensor, Packed)]
    sizes = [(tensor.shape.numel() * dtype.itemsize, kept_bytes[sort_of(tensor)]) for tensor in packed]
    return sum(plain - kept for plain, kept in sizes if kept)


def as_table(facts: dict[str, Any], tensors: weights.Tensors, kept_bytes: dict[Sort, int]) -> str:
    shown = {key: value for key, value in facts.items() if not isinstance(value, list)}
    shown["parameters"] = f"{facts['parameters']:,}"
    shown["memory"] = f"{human_bytes(facts['memory'])} for the weights"
    if "memory packed" in facts:
        packed = human_bytes(shown.pop("memory packed"))
        shown["memory"] = f"{packed} for the weights, {human_bytes(facts['memory'])} with --no-packed"
    shown["cache per token"] = human_bytes(facts["cache per token"])
    shown["context"] = f"{facts['context']} tokens" if facts["context"] else "-"
    if "types" in facts:
        shown["types"] = ", ".join(f"{kind} {share:.1%}" for kind, share in facts["types"].items())
        shown["runs packed"] = f"{facts['runs packed']:.1%} of the weights, the others dequantised"
    lines = [f"{key:<16} {value}" for key, value in shown.items()]
    lines += ["", "tensors (as stored -> parameter; layers grouped)", *tensor_lines(tensors, kept_bytes)]
    lines += [f"  not in the checkpoint, would be drawn anew: {name}" for name in facts["new"]]
    lines += [f"  not used by {facts['model']}: {name}" for name in facts["unused"]]
    if facts["problems"]:
        lines += ["", *(f"PROBLEM {problem}" for problem in facts["problems"])]
    return "\n".join(lines) + "\n"


def tensor_lines(tensors: weights.Tensors, kept_bytes: dict[Sort, int]) -> list[str]:
    """A line for all tensors that differ in the layer's number only."""
    groups: dict[tuple, list[tuple[str, str]]] = {}
    for name, tensor in tensors.stored.items():
        stored = tensors.origin[name][1]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if isinstance(tensor, Packed):
            dtype = f"{tensor.kind}, {'runs packed' if kept_bytes[sort_of(tensor)] else 'dequantised'}"
        key = (no_number(stored), no_number(name), tuple(tensor.shape), dtype)
        groups.setdefault(key, []).append((stored, name))
    lines = []
    for (_, _, shape, dtype), pairs in groups.items():
        stored, name = (grouped(column) for column in zip(*pairs, strict=True))
        arrow = "" if stored == name else f" -> {name}"
        lines.append(f"  {stored}{arrow}  {shape} {dtype}")
    return lines

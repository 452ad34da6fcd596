"""Checkpoint folder or hub id -> plain tensors -> a model, and back.

    model = load(GPTNeoForCausalLM, "path/to/gpt-neo-125m")     # memory-mapped: no second copy of the weights
    for name, tensor in tensors("path/to/gpt-neo-125m").items(): ...
    save(model, "elsewhere", tokenizer)

Folders may hold any of the formats in `formats/files.py` or the packagings of `formats/packagings.py`,
whole or in shards. Whatever they call a tensor, here it has the name that the hub uses today. Broken
folders raise ValueError, missing or unreadable files OSError, with one line that says which file and what
to do.
"""

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from decoders import kernels
from decoders.formats import (
    ALIASES,
    HEADS,
    LAYOUTS,
    NEW_HEADS,
    Adapters,
    Packed,
    check_ids,
    checkpoint_files,
    config_file,
    family,
    family_type,
    find,
    find_adapters,
    first_line,
    forget,
    grouped,
    merge_adapters,
    modern,
    named_parts,
    read_config,
    read_generation_config,
    read_settled,
    stored_tensors,
    switched,
    unpacked,
    use_compiled,
)

use_compiled(kernels)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

M = TypeVar("M", bound=nn.Module)

# ---- Tensors -----------------------------------------------------------------------------------------------


class Tensors(Mapping[str, Tensor]):
    """Name -> plain tensor under the hub's current names; `origin[name]` is (file, name in that file).

    What a packaging holds in fewer bits is dequantised each time when it is asked for, and not kept:
    `stored[name]` is the tensor, or a `Packed` whose shape and dtype are known without that.
    """

    def __init__(self):
        self.stored: dict[str, Tensor | Packed] = {}
        self.origin: dict[str, tuple[Path, str]] = {}
        self.untied = False  # an adapter has given the output layer a matrix of its own

    def __getitem__(self, name: str) -> Tensor:
        return unpacked(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored


def tensors(path: str | Path, adapter: Adapters | None = None) -> Tensors:
    """All tensors of a checkpoint folder or `.gguf` file, memory-mapped where the format allows: read,
    dequantised and, with an `adapter` (see `load`), merged when they are used. Never packed bits: what is not
    understood is a ValueError."""
    folder, adapters = find_adapters(find(path), adapter)
    config = read_config(folder)
    layout, result = LAYOUTS[family(config)], Tensors()
    for file, stored, tensor in stored_tensors(folder, config):
        if re.search(layout.buffers_to_drop + "$", f".{stored}"):
            continue
        try:
            parts = named_parts(tensor, lambda part: layout.modern(stored, part, config))  # noqa: B023
        except (RuntimeError, TypeError, KeyError, ZeroDivisionError) as error:
            message = f"{stored} {tuple(tensor.shape)} cannot be cut into q, k and v ({first_line(error)})"
            raise ValueError(f"{file}: {message}") from None
        check_plain(file, stored, tensor, config)
        for name, part in parts:
            if not name.startswith((layout.prefix + ".", *layout.top_level)):
                name = f"{layout.prefix}.{name}"
            if name not in result:
                result.stored[name], result.origin[name] = part, (file, stored)
                continue
            file_before, stored_before = result.origin[name]
            if stored_before == stored or not torch.equal(result[name], unpacked(part)):
                raise ValueError(f"{file} holds {stored}, which {file_before.name} holds as well")
    if adapters:
        result.stored, files, result.untied = merge_adapters(result.stored, adapters, config)
        result.origin |= {name: (file, name) for name, file in files.items()}
    return result


def check_plain(file: Path, stored: str, tensor: Tensor | Packed, config: dict) -> None:
    """ValueError for bits that no packaging has claimed; int8 and int4 of `save` are tensors of their own."""
    own = (config.get("quantization_config") or {}).get("quant_method") == "decoders"
    if tensor.dtype not in FLOATS and not (own and stored.endswith((".qweight", ".zero", ".order"))):
        dtype = str(tensor.dtype).removeprefix("torch.")
        message = (
            f"{stored} is {dtype} of {tuple(tensor.shape)}, packed in a way that config.json does not name"
        )
        raise ValueError(f"{file}: {message}: get the folder's own config.json, or the plain weights")


# ---- Into a model ------------------------------------------------------------------------------------------


WRAPPED = {  # in a name -> whose it is
    "_orig_mod.": "those of torch.compile: save model._orig_mod, not what compile returned",
    "module.": "those of DataParallel: save model.module",
    "base_model.model.": "those of a peft adapter left inside: call merge_and_unload() before saving",
    ".lora_A.": "those of a peft adapter left inside: call merge_and_unload() before saving",
    ".base_layer.": "those of a peft adapter left inside: call merge_and_unload() before saving",
}


class Match(NamedTuple):
    """How a checkpoint fits a model: which tensor each parameter gets, and what does not fit."""

    tensors: dict[str, Tensor | Packed]  # parameter name -> tensor
    new: list[str]  # parameters of a head that the checkpoint does not have
    problems: list[str]  # sentences; empty if the model can be loaded
    unused: list[str]  # heads of the checkpoint that this model does not have


def match(model: nn.Module, checkpoint: Tensors) -> Match:
    """Pair the model's parameters with the tensors of the same name. Of tied ones (weight tying) any name
    will do."""
    prefix = prefix_of(model)
    names: dict[int, list[str]] = {}
    bits = dict(model.named_buffers())  # of layers of 8 and 4 bits, which alone have buffers
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **bits}
    for name, parameter in wanted.items():
        names.setdefault(id(parameter), []).append(name)
    chosen: dict[str, Tensor | Packed] = {}
    absent: list[tuple[str, str, tuple[int, ...]]] = []
    problems: list[str] = []
    known: set[str] = set()
    for aliases in names.values():
        stored = [prefix + name for name in aliases if prefix + name in checkpoint]
        known.update(prefix + name for name in aliases)
        shape = tuple(wanted[aliases[0]].shape)
        if not stored:
            absent.append((prefix + aliases[0], aliases[0], shape))
            continue
        chosen[aliases[0]] = checkpoint.stored[stored[0]]
        kind = bits[aliases[0]].dtype if aliases[0] in bits else None
        for name in stored:
            tensor, file = checkpoint.stored[name], checkpoint.origin[name][0].name
            if tuple(tensor.shape) != shape:
                problems.append(f"{name} is {tuple(tensor.shape)} in {file}, not {shape}")
            if kind and tensor.dtype != kind:
                problems.append(f"{name} is {tensor.dtype} in {file}, not {kind}")
        if len(stored) > 1 and not problems and not torch.equal(checkpoint[stored[0]], checkpoint[stored[1]]):
            problems.append(
                f"{stored[1]} differs from the embedding it is tied to; "
                "load with tie_word_embeddings=False to keep both"
            )
    extra = [name for name in checkpoint if name not in known]
    missing = [f"{stored} {shape}" for stored, _, shape in absent if not stored.startswith(NEW_HEADS)]
    strange = [name for name in extra if not name.startswith(HEADS)]
    unexpected = [f"{name} {tuple(checkpoint.stored[name].shape)}" for name in strange]
    first = [f"the names are {why}" for mark, why in WRAPPED.items() if any(mark in name for name in extra)][
        :1
    ]
    first += [f"missing: {grouped(missing)}"] if missing else []
    first += [f"unexpected: {grouped(unexpected)}"] if unexpected else []
    new = [name for stored, name, _ in absent if stored.startswith(NEW_HEADS)]
    return Match(chosen, new, first + problems, [name for name in extra if name.startswith(HEADS)])


def prefix_of(model: Any) -> str:
    """What the hub's names have before this model's own: a bare model is a part of the others."""
    prefix = LAYOUTS[family_type(model.config.model_type)].prefix
    return "" if hasattr(model, prefix) else f"{prefix}."


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Example: "bfloat16" is torch.bfloat16. ValueError for what is no dtype of weights."""
    known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if known in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return known
    if dtype is None:
        return None
    raise ValueError(
        f"dtype must be float32, float64, bfloat16 or float16 of torch, or its name, not {dtype!r}"
    )


def load(
    model_class: type[M],
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    skip: Iterable[str] = (),
    packed: bool = False,
    prefill: str | None = None,
    progress: bool = False,
    adapter: Adapters | None = None,
    matching: Callable[[nn.Module, Tensors], Match] = match,
    **overrides: Any,
) -> M:
    """A model in `eval()` with the checkpoint's weights, as stored unless `dtype` says otherwise, and with
    `kernels.prepare` under it.

    The weights stay in the files, mapped into memory; changes to them never reach the files. `quantize`
    ("int8", "int8-weights", "int4", see `kernels.quantize`, and `skip` there) makes 8 or 4 bits of a layer at
    a time, while reading: there is never more in memory than these and one layer. `packed` keeps the 4 and 8
    bits that a packaging has, where a layer of `kernels` can hold them: no dequantised copy of these exists,
    and no weight is rounded to the packaging's dtype. `prefill` ("int8" or "exact"): what long inputs do with
    weights of 4 bits, see `kernels.set_prefill`. `overrides` replace fields of `config.json`. `progress`
    shows a bar and reads every page now rather than at first use. `adapter` is the folder or hub id of a LoRA
    as peft saves it, or several, each alone or with its weight: `[("a", 0.5), "b"]`. They are merged as peft
    merges them, also over a packed base; one that lies in the checkpoint's own folder is applied first,
    unless `adapter` is `[]`.
    `matching` decides what of a checkpoint that does not fit is drawn anew, or left; by default nothing.
    ValueError lists all that is missing, unexpected or misshapen at once. A head that the checkpoint does not
    have (classification on a base model) is drawn anew, with a warning.
    """
    dtype = named_dtype(dtype)
    folder, (model, checkpoint) = read_settled(
        path_or_id, partial(fitting, model_class, adapter=adapter, **overrides)
    )
    matched = matching(model, checkpoint)
    if matched.problems:
        raise ValueError(f"{folder} does not fit {model_class.__name__}: {'; '.join(matched.problems)}")
    bits = {name for name, _ in model.named_buffers()}  # whose dtypes are those of the format
    dtype = dtype or stored_dtype(folder, (t for name, t in matched.tensors.items() if name not in bits))
    if quantize is not None:
        try:
            quantize_while_reading(model, quantize, skip, matched, device)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    elif packed:
        keep_bits(model, matched, device)
    dtypes = {name: None if name in bits else dtype for name in matched.tensors}
    state = read(matched.tensors, dtypes, device, progress)
    for name in matched.new:
        state[name] = torch.empty(model.get_parameter(name).shape, dtype=dtype, device=device)
    model.load_state_dict(state, strict=False, assign=True)
    kernels.set_dtype(model, dtype)
    tie(model)
    draw(model, matched.new)
    if names := ", ".join(matched.new):
        warnings.warn(f"{folder} has no {names}: drawn anew, train it before use", stacklevel=2)
    if type(model).train is nn.Module.train:  # hf's classes have manners of their own
        prepare_training(model)
    return kernels.prepare(model.eval(), prefill=prefill)


def read(
    tensors: dict[str, Any], dtypes: dict[str, torch.dtype | None], device: str | torch.device, progress: bool
) -> dict[str, Tensor]:
    """Each tensor plain, in its dtype (None: as it is) and on the device. With `progress` every page is read
    now, under a bar that shows after a second."""
    state = {}
    for name, tensor in tqdm(
        tensors.items(), "loading", unit=" tensors", leave=False, disable=not progress, delay=1
    ):
        state[name] = unpacked(tensor, dtypes[name]).to(device)
        if isinstance(tensor, Tensor) and tensor.nbytes >= 2**20 and state[name] is not tensor:
            forget(tensor)  # what a converted copy was made of
        if progress and state[name].is_cpu:
            state[name].view(-1).view(torch.uint8)[::4096].sum()  # one byte of every page
    return state


def prepare_training(model: nn.Module) -> None:
    """What a loaded model has besides: `train` warns of half-precision weights, and a tied matrix has one
    name in a state dict, the embedding's, as in the hub's files (safetensors refuses two)."""
    model.train = MethodType(train, model)  # type: ignore[method-assign]
    for part in model.modules():
        if hasattr(part, "lm_head"):
            part.register_state_dict_post_hook(drop_tied_name)
            part.register_load_state_dict_pre_hook(restore_tied_name)


def tied_to(part: nn.Module) -> str | None:
    """The name of the embedding's weight, where the output layer has the same."""
    output = getattr(part.get_submodule("lm_head"), "weight", None)  # a quantised layer has none
    for name, module in part.named_modules():
        if isinstance(module, nn.Embedding) and module.weight is output:
            return f"{name}.weight"
    return None


def drop_tied_name(part: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
    if tied_to(part):
        state.pop(f"{prefix}lm_head.weight", None)


def restore_tied_name(part: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    name = f"{prefix}{tied_to(part)}"
    if name in state:
        state.setdefault(f"{prefix}lm_head.weight", state[name])


def train(model: nn.Module, mode: bool = True) -> nn.Module:
    """`model.train(mode)`, with a warning where half-precision weights would not learn."""
    dtype = next(model.parameters()).dtype
    if mode and not model.training and dtype.itemsize == 2:
        warnings.warn(
            f"weights in {dtype}: AdamW makes float16 NaN and loses small steps in bfloat16. "
            "Train float32 weights, under torch.autocast for speed",
            stacklevel=2,
        )
    return nn.Module.train(model, mode)


def draw(model: nn.Module, names: Iterable[str]) -> None:
    """These parameters anew, and whatever else their modules have."""
    init_weights: Any = getattr(model, "init_weights", None)
    for part in {name.rpartition(".")[0] for name in names} - {""}:
        init_weights(model.get_submodule(part))
    own = {name: model.get_parameter(name) for name in names if "." not in name}
    if own:
        init_weights(nn.ParameterDict(own))


def quantize_while_reading(
    model: nn.Module, kind: str, skip: Iterable[str], matched: Match, device: str | torch.device
) -> None:
    """Linear layers of 8 or 4 bits in place of those on the meta device; a new head is left as it is."""
    layers = kernels.linear_layers(model, kind, skip)
    # a tied one has the embedding's name
    stored = {id(model.get_parameter(name)): name for name in matched.tensors}
    for name, layer in layers.items():
        if stored_name := stored.get(id(layer.weight)):
            tensor = unpacked(matched.tensors[stored_name])
            own = kernels.Quantized.from_weight(layer, kind, tensor, device, name)
            kernels.replace_module(model, name, own)
            if stored_name == f"{name}.weight":
                del matched.tensors[stored_name]
            forget(tensor)
    kernels.mark_quantized(model, kind)


def keep_bits(model: nn.Module, matched: Match, device: str | torch.device) -> None:
    """Layers and embeddings of the very bits that are stored, in place of those on the meta device, each of
    its own kind. What none can hold stays in `matched`, to be dequantised."""
    if kernels.is_quantized(model):
        return
    stored = {id(model.get_parameter(name)): name for name in matched.tensors}
    kept: dict[str, dict[str, Tensor] | None] = {}
    layers: dict[str, Any] = {**kernels.embeddings(model), **kernels.linear_layers(model, "int4")}
    for name, layer in layers.items():
        source = stored.get(id(layer.weight), "")  # of a tied layer the embedding's
        tensor = matched.tensors.get(source)
        if not isinstance(tensor, Packed) or tensor.bits is None:
            continue
        if source not in kept:
            kept[source] = layer_bits(tensor)
        if tensors := kept[source]:
            kernels.put_bits(model, name, tensors, device)
    for source, tensors in kept.items():
        if tensors:
            del matched.tensors[source]
    kernels.mark_packed(model)


def layer_bits(tensor: Packed) -> dict[str, Tensor] | None:
    """The tensors of a layer that holds just what is stored; None where no layer can (it is dequantised)."""
    bits = tensor.bits() if tensor.bits else None
    return None if bits is None else kernels.stored_bits(*bits)


class Undrawn(TorchFunctionMode):
    """Modules made inside draw no weights: the meta device has nothing to draw, and PyTorch would import its
    compiler for it, which takes as long as importing PyTorch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def fitting(
    model_class: type[M], folder: Path, adapter: Adapters | None = None, **overrides: Any
) -> tuple[M, Tensors]:
    """A model without memory for its weights, its layers in 8 or 4 bits where the folder's are, and these."""
    model, checkpoint = on_meta(model_class, folder, **overrides), tensors(folder, adapter)
    if checkpoint.untied:
        model = on_meta(model_class, folder, **{**overrides, "tie_word_embeddings": False})
    prefix = prefix_of(model)
    try:
        kernels.expect_quantized(model, lambda name: checkpoint.get(prefix + name))
    except ValueError as error:
        raise ValueError(f"{config_file(folder)}: {error}") from None
    return model, checkpoint


def on_meta(model_class: type[M], folder: Path, **overrides: Any) -> M:
    """The model that `config.json` describes, without memory for its weights."""
    config_class: Any = getattr(model_class, "config_class")  # noqa: B009
    known = {
        field
        for kind in (config_class, type(getattr(config_class(), "text_config", None)))
        for field in getattr(kind, "__dataclass_fields__", ())
    }
    kind = family_type(config_class.model_type)
    if unknown := overrides.keys() - known:
        raise TypeError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}")
    try:
        stored = {**modern(read_config(folder), kind), **overrides}
        if isinstance(stored.get("text_config"), dict):  # of Fuyu, where most fields are
            stored["text_config"] = {**stored["text_config"], **overrides}
        current = modern(stored, kind)
        config = config_class.from_dict(current)
    except (ValueError, TypeError) as error:
        message = first_line(error)
        raise ValueError(message if str(folder) in message else f"{config_file(folder)}: {message}") from None
    with torch.device("meta"), Undrawn():
        model: Any = model_class(config)
    model.config_json = {key: value for key, value in current.items() if key not in overrides}
    model.generation_config = settings = read_generation_config(folder)
    try:
        check_ids(settings)
    except ValueError as error:
        raise ValueError(f"{folder / 'generation_config.json'}: {error}") from None
    return model


def tie(model: nn.Module) -> None:
    """Make tied tensors one again, wherever they are tied."""
    part: Any
    for part in model.modules():
        if hasattr(part, "tie_weights"):
            part.tie_weights()


def stored_dtype(folder: Path, stored: Iterable[Tensor | Packed]) -> torch.dtype:
    """The dtype of the tensors; where they differ, the narrowest that holds them all without loss."""
    dtypes = {tensor.dtype for tensor in stored} or {torch.float32}  # of none that fits
    if any(not dtype.is_floating_point or dtype.itemsize < 2 for dtype in dtypes):
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{folder} holds weights in {names}, which no layer of this model takes")
    return reduce(torch.promote_types, dtypes)


def resize_embeddings(model: Any, n: int) -> None:
    """Make the embedding and the output layer n rows long, in place. New rows are the mean of the old: a
    new token is neither likely nor unlikely until it is trained. ValueError for an n that is not positive, or
    leaves no row for the pad token."""
    if n < 1:
        raise ValueError(f"an embedding of {n} rows is not possible")
    if kernels.is_quantized(model):
        raise ValueError("a quantised model has the tokens that it has: resize it before it is quantised")
    old = model.config.vocab_size
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == old][:1]
    if any(m.padding_idx is not None and m.padding_idx >= n for m in embeddings):
        raise ValueError(f"an embedding of {n} rows has none for pad_token_id {embeddings[0].padding_idx}")
    outputs = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "lm_head"]
    for module in embeddings + outputs:
        for name, p in list(module.named_parameters()):
            new = p.data.mean(0, keepdim=True).expand(max(0, n - old), *p.shape[1:])
            grown = torch.cat([p.data[:n], new])
            setattr(module, name, nn.Parameter(grown, requires_grad=p.requires_grad))
    for embedding in embeddings:
        embedding.num_embeddings = n
    for output in outputs:
        output.out_features = n
    for part in model.modules():
        if hasattr(part, "config"):
            part.config.vocab_size = n
    tie(model)


# ---- And back ----------------------------------------------------------------------------------------------


def save(
    model: nn.Module, folder: str | Path, tokenizer: Any = None, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `config.json`, `generation_config.json` if there is one, and safetensors, for Transformers too;
    with a tokenizer its files, and what was added to it.

    Atomic: a failure, or a kill at any moment, leaves all old files or all new ones; of two writers' files
    those of one. Weights of an older save that the new one does not replace are removed, and its generation
    config; other files stay.
    """
    folder = Path(folder)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}  # a tied one once
    if any(type(tensor).__name__ == "DTensor" for tensor in state.values()):
        raise ValueError("the model is cut over processes: save parallel.gather(model)")
    dtype = stored_dtype(folder, state.values())
    state |= dict(model.named_buffers(remove_duplicate=False))  # 8 or 4 bits
    aliases = ALIASES.get(type(model).__name__, {})  # what an older Transformers looks for
    state |= {aliases[name]: tensor.clone() for name, tensor in state.items() if name in aliases}
    write_checkpoint(model, dtype, state, folder, tokenizer, max_shard_bytes)


def write_checkpoint(
    model: nn.Module,
    dtype: torch.dtype,
    state: Mapping[str, Tensor | Packed],
    folder: Path,
    tokenizer: Any,
    max_shard_bytes: int,
    is_another: bool = False,
) -> None:
    """All files of a checkpoint, in one switch. Of `model` the configs are written, of `state` the tensors,
    which are dequantised a shard at a time. `is_another`: of a checkpoint that was there nothing stays, its
    tokenizer and its adapter neither."""
    config = {"architectures": [type(model).__name__], **config_of(model)}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")

    def stale() -> set[str]:
        if is_another:
            return checkpoint_files(folder)
        patterns = ("model*.safetensors", "model.safetensors.index.json")
        own = set() if model.generation_config else {"generation_config.json"}
        return own | {file.name for pattern in patterns for file in folder.glob(pattern)}

    with switched(folder, stale) as new:
        (new / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        if model.generation_config:
            text = json.dumps(model.generation_config, indent=2, allow_nan=False) + "\n"
            (new / "generation_config.json").write_text(text)
        if tokenizer is not None:
            tokenizer.write(new)
        write_shards(state, new, max_shard_bytes)


def config_of(model: Any) -> dict[str, Any]:
    """What was read beside what the model's config says now; label names while their number fits."""
    own = model.config.to_dict()
    others = {
        key: value
        for key, value in model.config_json.items()
        if key not in own and key not in ("architectures", "dtype", "torch_dtype")
    }
    if len(others.get("id2label") or ()) != own.get("num_labels"):
        others = {key: value for key, value in others.items() if key not in ("id2label", "label2id")}
    return {**others, **own}


def write_shards(state: Mapping[str, Tensor | Packed], folder: Path, max_shard_bytes: int) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` (a larger tensor has one to itself)."""
    parts: list[dict[str, Tensor | Packed]] = [{}]
    sizes = {name: tensor.shape.numel() * tensor.dtype.itemsize for name, tensor in state.items()}
    bytes_left = max_shard_bytes
    for name, tensor in state.items():
        if sizes[name] > bytes_left and parts[-1]:
            parts.append({})
            bytes_left = max_shard_bytes
        parts[-1][name] = tensor
        bytes_left -= sizes[name]
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else ["model.safetensors"]
    for file, part in zip(names, parts, strict=True):
        content = {name: unpacked(tensor).cpu().contiguous() for name, tensor in part.items()}
        pointers = Counter(t.data_ptr() for t in content.values())  # of a tied output layer: the same
        content = {name: t.clone() if pointers[t.data_ptr()] > 1 else t for name, t in content.items()}
        safetensors.torch.save_file(content, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # the library lets the owner only read it
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

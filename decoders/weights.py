"""Checkpoint folder or hub id -> plain tensors -> a model, and back.

    model = load(GPTNeoForCausalLM, "path/to/gpt-neo-125m")     # memory-mapped: no second copy of the weights
    for name, tensor in tensors("path/to/gpt-neo-125m").items(): ...
    save(model, "elsewhere")

Folders may hold safetensors, PyTorch's or Flax's files, whole or in shards. Whatever they call a tensor, here
it has the name that the hub uses today. Nothing in a checkpoint is ever executed. Broken folders raise
ValueError, missing or unreadable files OSError, with one line that says which file and what to do.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from decoders import RELEASE, check_file, family, find, read_config, read_json

# ---- What each family calls its tensors --------------------------------------------------------------------


Named = Iterator[tuple[str, Tensor]]


def as_it_is(name: str, tensor: Tensor, config: dict) -> Named:
    yield name, tensor


def modern_phi(name: str, tensor: Tensor, config: dict) -> Named:
    """A tensor of 2023's three layouts under today's names; q, k and v of a joint matrix apart."""
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
    heads = config.get("n_head", config.get("num_attention_heads"))
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


class Layout(NamedTuple):
    prefix: str  # of every tensor but those beside it; files of the bare model lack it
    dead: str  # pattern of buffers that old versions stored: masks and tables, not weights
    modern: Callable[[str, Tensor, dict], Named] = as_it_is
    beside: tuple[str, ...] = HEADS


LAYOUTS = {
    "gpt_neo": Layout("transformer", r"\.attn\.attention\.(bias|masked_bias)"),
    "openai-gpt": Layout("transformer", r"\.h\.\d+\.attn\.bias"),
    "phi": Layout("model", r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)", modern_phi),
    "phi3": Layout("model", r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"),
    "persimmon": Layout("model", r"\.rotary_emb\.inv_freq", modern_persimmon),
    "fuyu": Layout("language_model", r"\.rotary_emb\.inv_freq", modern_fuyu, ("vision_embed_tokens.",)),
}


class Tensors(dict):
    """Name -> tensor under the hub's current names; `origin[name]` is (file, name in that file)."""

    def __init__(self):
        self.origin: dict[str, tuple[Path, str]] = {}


def tensors(path: str | Path) -> Tensors:
    """All tensors of a checkpoint folder, memory-mapped where the format allows: read when they are used."""
    folder = find(path)
    config = read_config(folder)
    layout, found = LAYOUTS[family(config)], Tensors()
    for file, stored, whole in stored_tensors(folder):
        if re.search(layout.dead + "$", f".{stored}"):
            continue
        try:
            named = list(layout.modern(stored, whole, config))
        except (RuntimeError, TypeError, KeyError, ZeroDivisionError) as error:
            told = f"{stored} {tuple(whole.shape)} cannot be cut into q, k and v ({first_line(error)})"
            raise ValueError(f"{file}: {told}") from None
        for name, tensor in named:
            if not name.startswith((layout.prefix + ".", *layout.beside)):
                name = f"{layout.prefix}.{name}"
            if name in found:
                raise ValueError(f"{file} holds {stored}, which {found.origin[name][0].name} holds as well")
            found[name], found.origin[name] = tensor, (file, stored)
    return found


# ---- Formats -----------------------------------------------------------------------------------------------


def stored_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of everything that the folder's weight files hold."""
    for whole, read in FORMATS.items():
        index = folder / f"{whole}.index.json"
        if index.exists():
            files = shards(index)
        elif (folder / whole).exists():
            files = {folder / whole: None}
        else:
            continue
        for file, listed in files.items():
            content = read(check_file(file))
            if listed and (absent := sorted(listed - content.keys())):
                raise ValueError(f"{file} lacks {', '.join(absent)}, which {index.name} places there")
            for name, tensor in content.items():
                yield file, name, tensor
        return
    raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(FORMATS)}, whole or in shards")


def shards(index: Path) -> dict[Path, set[str]]:
    """Shard -> the names that the index places there. All absent shards are told at once."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{index} places {name} at {file!r}: shards must lie in the same folder")
        files.setdefault(index.parent / file, set()).add(name)
    if absent := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(absent)}, named in {index.name}")
    return files


def read_safetensors(file: Path) -> dict[str, Tensor]:
    def unique(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a tensor is listed twice")
        return dict(pairs)

    try:
        with safetensors.safe_open(file, "pt") as content:
            names = content.keys()
            found = {name: content.get_tensor(name) for name in names}
        with file.open("rb") as raw:  # the library lets the last of two equal names win
            json.loads(raw.read(int.from_bytes(raw.read(8), "little")), object_pairs_hook=unique)
    except OSError:
        raise
    except Exception as error:  # the library's own kind, and whatever torch makes of an odd dtype
        raise ValueError(f"{file} is not a sound safetensors file: {first_line(error)}") from None
    return found


def read_pickle(file: Path) -> dict[str, Tensor]:
    """PyTorch's own format. `weights_only` refuses everything but tensors before it runs anything."""
    try:
        mapped = zipfile.is_zipfile(file)  # before PyTorch 1.6 files were no archives, and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)|Unsupported operand \d+", str(error))
        asked = f" ({asked[1] or asked[0]})" if asked else ""
        reason = f"it asks for more than tensors{asked}; nothing was run"
        raise ValueError(f"{file} is refused: {reason}") from None
    except OSError:
        raise
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError ... for damaged files
        raise ValueError(f"{file} is not a sound PyTorch file: {first_line(error)}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} holds a {type(content).__name__}, not names and tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{file} holds {name!r}, which is not a plain tensor")
    return content


def read_flax(file: Path) -> dict[str, Tensor]:
    """Flax's msgpack: nested names, matrices the other way round. All is read at once: there is no index."""
    try:
        import msgpack
    except ImportError:
        raise ImportError(f"{file} needs one more package: pip install 'decoders[flax]'") from None

    def array(code: int, data: bytes) -> Tensor:
        shape, dtype, content = msgpack.unpackb(data)
        if code != 1 or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"extension {code}, dtype {dtype!r}")
        return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(tuple(shape))

    found = {}
    try:
        for name, tensor in leaves(msgpack.unpackb(file.read_bytes(), ext_hook=array, strict_map_key=True)):
            if name.endswith(".kernel"):
                tensor = tensor.t().contiguous()
            name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name.removeprefix("params."))
            found[name] = tensor
    except Exception as error:  # msgpack has a dozen kinds for damaged files
        raise ValueError(f"{file} is not a sound Flax file: {first_line(error)}") from None
    return found


def read_tensorflow(file: Path) -> dict[str, Tensor]:
    """Keras' HDF5 of GPT-1. Projections are [in, out] as ours; only the heads' matrices are turned."""
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{file} needs one more package: pip install 'decoders[tensorflow]'") from None
    leaves = {"gamma": "weight", "beta": "bias", "embeddings": "weight", "kernel": "weight"}
    found = {}

    def visit(path: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        name = path.removesuffix(":0").replace("h_._", "h.")
        head = re.search(r".*\b((multiple_choice_head|score)/.*)", name)  # the last of several
        *parts, leaf = (head[1] if head else name.rsplit("transformer/", 1)[-1]).split("/")
        tensor = torch.from_numpy(item[()])
        if leaf == "kernel":
            tensor = tensor.t().contiguous()
        elif leaf == "bias":
            tensor = tensor.flatten()
        found[".".join([*parts, leaves.get(leaf, leaf)])] = tensor

    try:
        with h5py.File(file) as content:
            content.visititems(visit)
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError ... for damaged files
        raise ValueError(f"{file} is not a sound HDF5 file: {first_line(error)}") from None
    return found


def read_openai(shapes: Path) -> dict[str, Tensor]:
    """OpenAI's release of GPT-1: one vector in ten files, cut into 146 arrays whose shapes a list gives."""
    try:
        import numpy
    except ImportError:
        raise ImportError(f"{shapes} needs one more package: pip install 'decoders[openai]'") from None
    layers = read_config(shapes.parent)["n_layer"]
    modules = ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    names = ["positions_embed.weight", "tokens_embed.weight"]
    names += [f"h.{i}.{m}.{leaf}" for i in range(layers) for m in modules for leaf in ("weight", "bias")]
    listed = json.loads(shapes.read_text())
    cuts = [(math.prod(shape), shape[1:] if len(shape) == 3 else shape) for shape in listed]  # [1, in, out]
    vectors = []
    for i in range(10):
        file = check_file(shapes.parent / f"params_{i}.npy")
        try:
            vectors.append(torch.from_numpy(numpy.load(file, allow_pickle=False)).flatten())
        except Exception as error:  # numpy: ValueError, EOFError, UnicodeDecodeError ...
            raise ValueError(f"{file} is not a sound numpy file: {first_line(error)}") from None
    whole, total = torch.cat(vectors), sum(size for size, _ in cuts)
    if len(cuts) != len(names) or len(whole) != total:
        told = f"{len(cuts)} arrays of {total} numbers in all, for {len(names)} tensors"
        raise ValueError(f"{shapes} lists {told}; params_0.npy to params_9.npy hold {len(whole)} numbers")
    pieces = whole.split([size for size, _ in cuts])
    return {name: piece.view(shape) for name, piece, (_, shape) in zip(names, pieces, cuts, strict=True)}


class StandIn:
    """For the classes of others in Adept's pickle: it takes whatever it is given, and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


STAND_INS = ("tool_use.megatron.megatron_utils.ModelBackend", "megatron.model.enums.ModelType",
             *(f"numpy.{name}" for name in ("core.multiarray._reconstruct", "_core.multiarray._reconstruct",
                                            "ndarray", "dtype")))  # the last four for the random state
RELEASE_FIELDS = {  # its training arguments -> config.json
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads", "padded_vocab_size": "vocab_size",
    "layernorm_epsilon": "layer_norm_eps",
    "rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta",
}
RELEASE_WANTS = {"sq_relu": True, "untie_embeddings": True, "qk_layernorm": "weights_per_layer"}


def open_release(folder: Path) -> tuple[Path, dict[str, Tensor], dict]:
    """(file, name -> tensor, training arguments) of Adept's release: one pickle of a nested dictionary.

    Only `argparse.Namespace` and stand-ins for a few classes known by name are allowed in it. Anything else
    is refused before any of it is run.
    """
    marker = check_file(folder / RELEASE)
    step = marker.read_text("utf-8", errors="replace").strip()
    if not re.fullmatch(r"\d{1,7}|release", step):
        raise ValueError(f"{marker} must hold the number of an iteration, not {step[:40]!r}")
    rank = folder / (f"iter_{int(step):07}" if step.isdigit() else step) / "mp_rank_00"
    file = check_file(rank / "model_optim_rng.pt")
    if (rank.parent / "mp_rank_01").exists():
        raise ValueError(f"{rank.parent} is split over several ranks, which is not supported")
    try:
        asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        if foreign := sorted(asked - {"argparse.Namespace", *STAND_INS}):
            raise ValueError(f"it asks for {', '.join(foreign)}; nothing was run")
        allowed = [argparse.Namespace, *((StandIn, name) for name in STAND_INS)]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found = dict(leaves(content["model"]))
        return file, found, vars(content["args"])
    except Exception as error:  # torch raises RuntimeError, OSError, UnpicklingError ... for damaged files
        raise ValueError(f"{file} is not a sound release of Adept's: {first_line(error)}") from None


def leaves(tree: dict, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Nested names joined with dots."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        elif isinstance(value, Tensor) and value.layout == torch.strided:
            yield path + key, value
        else:
            raise ValueError(f"{path}{key} is a {type(value).__name__}")


def release_config(folder: Path) -> dict:
    """`config.json` as the training arguments of Adept's release tell it. ValueError for another model."""
    return stated_config(*open_release(folder))


def stated_config(file: Path, found: dict[str, Tensor], args: dict) -> dict:
    if missing := [key for key in RELEASE_FIELDS if key not in args]:
        raise ValueError(f"{file}: its arguments lack {', '.join(missing)}")
    wrong = [f"{key} is {args[key]!r}" for key, want in RELEASE_WANTS.items() if args.get(key, want) != want]
    if wrong:
        raise ValueError(f"{file} is of another model: {', '.join(wrong)}")
    sees = any(name.startswith("vit_encoder.") for name in found)
    fields = {ours: args[key] for key, ours in RELEASE_FIELDS.items()}
    no_ids = {"eos_token_id": None, "bos_token_id": None}  # the tokenizer knows them
    return {"model_type": "fuyu" if sees else "persimmon", **no_ids, **fields}


def read_release(marker: Path) -> dict[str, Tensor]:
    """The tensors of Adept's release. A `config.json` beside it must say what its training arguments say."""
    file, found, args = open_release(marker.parent)
    stated, beside = stated_config(file, found, args), marker.parent / "config.json"
    if beside.exists():
        config = read_json(beside)
        config = {**config, **(config.get("text_config") or {})}
        differs = [f"{key} {config[key]!r}, not {stated[key]!r}" for key in RELEASE_FIELDS.values()
                   if key in config and config[key] != stated[key]]
        if differs:
            raise ValueError(f"{beside} has {', '.join(differs)} as {file.name} says")
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


FORMATS = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_pickle,
    "flax_model.msgpack": read_flax,
    "tf_model.h5": read_tensorflow,
    "params_shapes.json": read_openai,
    RELEASE: read_release,
}

# ---- Into a model ------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """How a checkpoint fits a model: which tensor each parameter gets, and what does not fit."""

    tensors: dict[str, Tensor]  # parameter name -> tensor
    new: list[str]  # parameters of a head that the checkpoint does not have
    problems: list[str]  # sentences; empty if the model can be loaded
    unused: list[str]  # heads of the checkpoint that this model does not have, or a copy of a tied table


def match(model: nn.Module, found: Tensors) -> Match:
    """Pair the model's parameters with the tensors of the same name."""
    prefix = LAYOUTS[family(model.config.to_dict())].prefix
    prefix = "" if hasattr(model, prefix) else f"{prefix}."  # of a bare model
    wanted = {prefix + name: (name, parameter.shape) for name, parameter in model.state_dict().items()}
    tied = {name for name in wanted if name.endswith("lm_head.weight") and model.config.tie_word_embeddings}
    absent = [stored for stored in wanted if stored not in found and stored not in tied]
    extra = [stored for stored in found if stored not in wanted]
    missing = [f"{s} {tuple(wanted[s][1])}" for s in absent if not s.startswith(NEW_HEADS)]
    unexpected = [f"{s} {tuple(found[s].shape)}" for s in extra if not s.startswith(HEADS)]
    misshapen = [
        f"{stored} is {tuple(found[stored].shape)} in {found.origin[stored][0].name}, not {tuple(shape)}"
        for stored, (_, shape) in wanted.items()
        if stored in found and found[stored].shape != shape
    ]
    problems = [f"missing: {grouped(missing)}"] if missing else []
    problems += [f"unexpected: {grouped(unexpected)}"] if unexpected else []
    problems += misshapen
    return Match(
        tensors={name: found[s] for s, (name, _) in wanted.items() if s in found and s not in tied},
        new=[wanted[s][0] for s in absent if s.startswith(NEW_HEADS)],
        problems=problems,
        unused=[s for s in extra if s.startswith(HEADS)],
    )


def grouped(names: Iterable[str]) -> str:
    """Names that differ in the layer only told as one. Example: h.0.x, h.1.x, h.5.x -> h.0-1,5.x"""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        groups.setdefault(no_number(name), []).extend([] if number is None else [int(number[0])])
    told = []
    for key, numbers in groups.items():
        runs: list[list[int]] = []
        for n in sorted(numbers):
            if runs and n == runs[-1][-1] + 1:
                runs[-1].append(n)
            else:
                runs.append([n])
        spans = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        told.append(key.replace("*", spans, 1) if numbers else key)
    return ", ".join(told)


def no_number(name: str) -> str:
    """Example: h.3.ln_1.bias -> h.*.ln_1.bias"""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)


def load(model_class: type, path_or_id: str | Path, *, dtype: torch.dtype | None = None,
         device: str | torch.device = "cpu", progress: bool = False, **overrides) -> nn.Module:
    """A model in `eval()` with the checkpoint's weights, as stored unless `dtype` says otherwise.

    The weights stay in the files, mapped into memory; changes to them never reach the files. `overrides`
    replace fields of `config.json`. `progress` shows a bar and reads every page now rather than at first use.
    ValueError lists all that is missing, unexpected or misshapen at once. A head that the checkpoint does not
    have (classification on a base model) is drawn anew, with a warning.
    """
    folder = find(path_or_id)
    model, found = on_meta(model_class, folder, **overrides), tensors(folder)
    matched = match(model, found)
    if matched.problems:
        raise ValueError(f"{folder} does not fit {model_class.__name__}: {'; '.join(matched.problems)}")
    if dtype is None:
        dtype = stored_dtype(folder, matched.tensors.values())
    state = {}
    bar = tqdm(matched.tensors.items(), "loading", unit=" tensors", leave=False, disable=not progress)
    for name, tensor in bar:
        state[name] = tensor.to(device, dtype)
        if progress and state[name].is_cpu:
            state[name].view(-1).view(torch.uint8)[::4096].sum()  # one byte of every page
    for name in matched.new:
        state[name] = torch.empty(model.state_dict()[name].shape, dtype=dtype, device=device)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if model.config.tie_word_embeddings and hasattr(model, "lm_head") and "lm_head.weight" in found:
        own = found["lm_head.weight"].to(device, dtype)
        if not torch.equal(model.lm_head.weight, own):
            raise ValueError(f"{folder}: lm_head.weight differs from the token table it is tied to; "
                             "load with tie_word_embeddings=False to keep both")
    if matched.new:
        for name in {name.rpartition(".")[0] for name in matched.new}:
            model.init_weights(model.get_submodule(name))
        names = ", ".join(matched.new)
        warnings.warn(f"{folder} has no {names}: drawn anew, train it before use", stacklevel=2)
    return model.eval()


class Undrawn(TorchFunctionMode):
    """Modules made inside draw no weights: the meta device has nothing to draw, and PyTorch would import its
    compiler for it, which takes as long as importing PyTorch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def on_meta(model_class: type, folder: Path, **overrides) -> nn.Module:
    """The model that `config.json` describes, without memory for its weights."""
    config_class = model_class.config_class
    known = {*config_class().to_dict(), *config_class.__dataclass_fields__}
    if unknown := overrides.keys() - known:
        raise TypeError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}")
    stored = {**read_config(folder), **overrides}
    if inner := stored.get("text_config"):  # of Fuyu, where most fields are
        outer = config_class.__dataclass_fields__
        stored["text_config"] = {**inner, **{key: v for key, v in overrides.items() if key not in outer}}
    try:
        config = config_class.from_dict(stored)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {first_line(error)}") from None
    with torch.device("meta"), Undrawn():
        model = model_class(config)
    generation = folder / "generation_config.json"
    model.generation_config = read_json(generation) if generation.exists() else {}
    return model


def stored_dtype(folder: Path, stored: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the tensors; where they differ, the narrowest that holds them all without loss."""
    dtypes = {tensor.dtype for tensor in stored}
    if any(not dtype.is_floating_point or dtype.itemsize < 2 for dtype in dtypes):
        told = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{folder} holds weights in {told}: quantised weights are not supported")
    first, *others = dtypes
    for other in others:
        first = torch.promote_types(first, other)
    return first


def resize_embeddings(model: nn.Module, n: int) -> None:
    """Make the token table and the output layer n rows long, in place. New rows are the mean of the old: a
    new token is neither likely nor unlikely until it is trained. ValueError if n is not positive."""
    if n < 1:
        raise ValueError(f"a token table of {n} rows is not possible")
    old = model.config.vocab_size
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == old][:1]
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == old]
    for module in tables + outputs:
        for name, p in list(module.named_parameters()):
            new = p.data.mean(0, keepdim=True).expand(max(0, n - old), *p.shape[1:])
            grown = torch.cat([p.data[:n], new])
            setattr(module, name, nn.Parameter(grown, requires_grad=p.requires_grad))
    for table in tables:
        table.num_embeddings = n
    for output in outputs:
        output.out_features = n
    model.config.vocab_size = n
    for part in model.modules():
        if hasattr(part, "tie_weights"):
            part.tie_weights()


# ---- And back ----------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write `config.json`, `generation_config.json` if there is one, and safetensors, for Transformers too.

    All is written aside and then moved into place, so that a failure leaves the folder as it was. Weights of
    an older save that the new one does not replace are removed; other files stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    dtype = str(stored_dtype(folder, state.values())).removeprefix("torch.")
    config = {"architectures": [type(model).__name__], **model.config.to_dict(), "torch_dtype": dtype}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        new = Path(temporary)
        (new / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        if model.generation_config:
            text = json.dumps(model.generation_config, indent=2, allow_nan=False) + "\n"
            (new / "generation_config.json").write_text(text)
        write_shards(state, new, max_shard_bytes)
        written = {file.name for file in new.iterdir()}
        for file in sorted(new.iterdir()):
            os.replace(file, folder / file.name)
    for pattern in ("model*.safetensors", "model.safetensors.index.json"):
        for stale in folder.glob(pattern):
            if stale.name not in written:
                stale.unlink()


def write_shards(state: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` (a larger tensor has one to itself)."""
    parts: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in state.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = max_shard_bytes
        parts[-1][name] = tensor
        room -= tensor.nbytes
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else ["model.safetensors"]
    for file, part in zip(names, parts, strict=True):
        content = {name: tensor.cpu().contiguous() for name, tensor in part.items()}
        safetensors.torch.save_file(content, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # the library lets the owner only read it
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
            "weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

"""Files of weights, of every kind -> names as the file has them, and tensors: safetensors, PyTorch, Flax,
TensorFlow, OpenAI's release of GPT-1, Adept's of Persimmon and Fuyu.

Nothing in a file is ever executed. Broken ones raise ValueError, missing or unreadable ones OSError, with one
line that says which file and what to do.
"""

import argparse
import ctypes
import json
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from .config import read_config
from .folder import RELEASE, check_file, first_line, read_json
from .pickles import foreign


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


def forget(tensor: Tensor) -> None:
    """Give the memory of a mapped tensor back to the system, which reads the file again if need be."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, _, _, _, inode, *_ = line.split()
            first, last = (int(address, 16) for address in addresses.split("-"))
            if first <= start < end <= last and inode != "0":  # what is no file would be lost
                dontneed = ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
                ctypes.CDLL(None).madvise(*dontneed)


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
    except OSError as error:
        raise OSError(error.errno, f"{file} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # the library's own kind, and whatever torch makes of an odd dtype
        raise ValueError(f"{file} is not a sound safetensors file: {first_line(error)}") from None
    return found


def read_pickle(file: Path) -> dict[str, Tensor]:
    """PyTorch's own format. Everything but tensors is refused before anything is run."""
    try:
        if asked := foreign(file):
            raise pickle.UnpicklingError(f"it asks for more than tensors ({', '.join(sorted(asked))})")
        mapped = zipfile.is_zipfile(file)  # before PyTorch 1.6 files were no archives, and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is refused: {first_line(error)}; nothing was run") from None
    except OSError as error:
        raise OSError(error.errno, f"{file} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # RuntimeError, EOFError, KeyError, BadZipFile ... for damaged files
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


STAND_INS = (
    "tool_use.megatron.megatron_utils.ModelBackend",
    "megatron.model.enums.ModelType",
    *(
        f"numpy.{name}"
        for name in ("core.multiarray._reconstruct", "_core.multiarray._reconstruct", "ndarray", "dtype")
    ),
)  # the last four for the random state
RELEASE_ASKS = {"_codecs.encode", "collections.defaultdict", "collections.Counter"}  # harmless
RELEASE_FIELDS = {  # its training arguments -> config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "padded_vocab_size": "vocab_size",
    "layernorm_epsilon": "layer_norm_eps",
    "rotary_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
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
        asked |= foreign(file) - RELEASE_ASKS
        if others := sorted(asked - {"argparse.Namespace", *STAND_INS}):
            raise ValueError(f"it asks for {', '.join(others)}; nothing was run")
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
        differs = [
            f"{key} {config[key]!r}, not {stated[key]!r}"
            for key in RELEASE_FIELDS.values()
            if key in config and config[key] != stated[key]
        ]
        if differs:
            raise ValueError(f"{beside} has {', '.join(differs)} as {file.name} says")
    return found


FORMATS = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_pickle,
    "flax_model.msgpack": read_flax,
    "tf_model.h5": read_tensorflow,
    "params_shapes.json": read_openai,
    RELEASE: read_release,
}

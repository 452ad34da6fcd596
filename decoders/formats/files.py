"""Files of weights, of every kind -> names as the file has them, and tensors: safetensors, PyTorch, Flax,
TensorFlow, OpenAI's release of GPT-1, Adept's of Persimmon and Fuyu.

Nothing in a file is ever executed. Broken ones raise ValueError, missing or unreadable ones OSError, with one
line that says which file and what to do.
"""

import ctypes
import json
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .adept import read_release
from .config import read_config
from .folder import RELEASE, check_file, first_line, in_one_line, read_json
from .names import flattened
from .pickles import foreign


def stored_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of everything that the folder's weight files hold."""
    for file_name, read in FORMATS.items():
        index = folder / f"{file_name}.index.json"
        files: dict[Path, set[str]] = {}  # file -> names that the index places there
        if index.exists():
            files = shards(index)
        elif (folder / file_name).exists():
            files = {folder / file_name: set()}
        for file, listed in files.items():
            content = read(check_file(file))
            if absent := sorted(listed - content.keys()):
                raise ValueError(f"{file} lacks {in_one_line(absent)}, which {index.name} places there")
            for name, tensor in content.items():
                yield file, name, tensor
        if files:
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
    """Shard -> the names that the index places there. One error names all absent shards."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{index} places {name!r} at {file!r}: shards must lie in the same folder")
        files.setdefault(index.parent / file, set()).add(name)
    if absent := [file.name for file in files if not exists(file)]:
        raise FileNotFoundError(f"{index.parent} lacks {in_one_line(absent)}, named in {index.name}")
    return files


def exists(file: Path) -> bool:
    """False also for a name that no file can have: too long, or with a zero byte."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def read_safetensors(file: Path) -> dict[str, Tensor]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a tensor is listed twice")
        return dict(pairs)

    try:
        with safetensors.safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        with file.open("rb") as raw:  # the library lets the last of two equal names win
            json.loads(raw.read(int.from_bytes(raw.read(8), "little")), object_pairs_hook=unique)
    except OSError as error:
        raise OSError(error.errno, f"{file} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # the library's own kind, and whatever torch makes of an odd dtype
        raise ValueError(f"{file} is not a sound safetensors file: {first_line(error)}") from None
    return tensors


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
    """Flax's msgpack: nested names, matrices transposed. All is read at once: there is no index."""
    try:
        import msgpack
    except ImportError:
        raise ImportError(f"{file} needs one more package: pip install '.[flax]'") from None

    def array(code: int, data: bytes) -> Tensor:
        shape, dtype, content = msgpack.unpackb(data)
        if code != 1 or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"extension {code}, dtype {dtype!r}")
        return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(tuple(shape))

    tensors = {}
    try:
        content = msgpack.unpackb(file.read_bytes(), ext_hook=array, strict_map_key=True)
        for name, tensor in flattened(content):
            if name.endswith(".kernel"):
                tensor = tensor.t().contiguous()
            name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name.removeprefix("params."))
            tensors[name] = tensor
    except Exception as error:  # msgpack has a dozen kinds for damaged files
        raise ValueError(f"{file} is not a sound Flax file: {first_line(error)}") from None
    return tensors


def read_tensorflow(file: Path) -> dict[str, Tensor]:
    """Keras' HDF5 of GPT-1. Projections are [in, out] as ours; only the heads' matrices are transposed."""
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{file} needs one more package: pip install '.[tensorflow]'") from None
    tensors = {}

    def visit(path: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            name, tensor = keras_tensor(path, torch.from_numpy(item[()]))
            tensors[name] = tensor

    try:
        with h5py.File(file) as content:
            content.visititems(visit)
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError ... for damaged files
        raise ValueError(f"{file} is not a sound HDF5 file: {first_line(error)}") from None
    return tensors


KERAS_NAMES = {"gamma": "weight", "beta": "bias", "embeddings": "weight", "kernel": "weight"}


def keras_tensor(path: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Name and tensor as PyTorch has them, of a path such as "transformer/h_._0/ln_1/gamma:0"."""
    name = path.removesuffix(":0").replace("h_._", "h.")
    head = re.search(r".*\b((multiple_choice_head|score)/.*)", name)  # the last of several
    name = head[1] if head else name.rsplit("transformer/", 1)[-1]
    *parts, leaf = name.split("/")
    if leaf == "kernel":
        tensor = tensor.t().contiguous()
    elif leaf == "bias":
        tensor = tensor.flatten()
    return ".".join([*parts, KERAS_NAMES.get(leaf, leaf)]), tensor


def read_openai(shapes: Path) -> dict[str, Tensor]:
    """OpenAI's release of GPT-1: one vector in ten files, cut into 146 arrays whose shapes a list gives."""
    try:
        import numpy
    except ImportError:
        raise ImportError(f"{shapes} needs one more package: pip install '.[openai]'") from None
    names = ["positions_embed.weight", "tokens_embed.weight"]
    modules = ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    for i in range(read_config(shapes.parent)["n_layer"]):
        names += [f"h.{i}.{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    vectors = []
    for i in range(10):
        file = check_file(shapes.parent / f"params_{i}.npy")
        try:
            vectors.append(torch.from_numpy(numpy.load(file, allow_pickle=False)).flatten())
        except Exception as error:  # numpy: ValueError, EOFError, UnicodeDecodeError ...
            raise ValueError(f"{file} is not a sound numpy file: {first_line(error)}") from None
    listed = json.loads(shapes.read_text())
    sizes = [math.prod(shape) for shape in listed]
    vector = torch.cat(vectors)
    if len(sizes) != len(names) or len(vector) != sum(sizes):
        raise ValueError(
            f"{shapes} lists {len(sizes)} arrays of {sum(sizes)} numbers in all, for {len(names)} tensors; "
            f"params_0.npy to params_9.npy hold {len(vector)} numbers"
        )
    arrays = zip(names, vector.split(sizes), listed, strict=True)
    return {name: array.view(shape[1:] if len(shape) == 3 else shape) for name, array, shape in arrays}


FORMATS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_pickle,
    "flax_model.msgpack": read_flax,
    "tf_model.h5": read_tensorflow,
    "params_shapes.json": read_openai,
    RELEASE: read_release,
}

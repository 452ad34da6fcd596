"""A GGUF file's header: metadata, and where each tensor lies. Nothing heavy is imported.

    "GGUF" | version | number of tensors | number of metadata pairs      4 bytes, uint32, uint64, uint64
    pairs      key, type, value            a string is its length in a uint64 and its UTF-8
    tensors    name, dimensions, type, offset         the first dimension is that of a row
    zeros up to a multiple of the alignment, then the tensors' bytes, each at such a multiple

All little-endian. A stranger's file is believed nothing: whatever it counts must fit in what is left of it
before anything is allocated, and every error is one sentence that names the file and the key.
"""

import mmap
import struct
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .folder import check_file, gguf_files

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had lengths of 32 bits, and was gone within weeks
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
MOST_DIMENSIONS, LONGEST_NAME = 4, 64  # of a tensor; llama.cpp holds no more
LONGEST_ARRAY = 2**24  # entries; the largest vocabularies have 2**18
LARGEST_SIZE = 2**31 - 1


class Kind(NamedTuple):
    """A tensor type: `block` numbers of a row share `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    20: Kind("IQ4_NL", 32, 18),
    23: Kind("IQ4_XS", 256, 136),
    30: Kind("BF16", 1, 2),
    39: Kind("MXFP4", 32, 17),
}
UNREAD = {  # types that exist and are not read here
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}


class Placed(NamedTuple):
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]  # of the numbers, rows first: (out, in)
    kind: Kind
    offset: int  # from the beginning of the file
    nbytes: int


class Header(NamedTuple):
    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Placed]


# ---- The header --------------------------------------------------------------------------------------------


class Reader:
    """Values one after the other, none beyond the end of the file."""

    def __init__(self, content: mmap.mmap):
        self.content, self.place = content, 0
        self.reading = "the header"  # for errors

    def take(self, format: str, count: int = 1) -> tuple:
        """`count` numbers of a struct format."""
        size = struct.calcsize(f"<{format}")
        self.expect(size * count)
        values = struct.unpack_from(f"<{count}{format}", self.content, self.place)
        self.place += size * count
        return values

    def expect(self, nbytes: int) -> None:
        left = len(self.content) - self.place
        if nbytes > left:
            raise ValueError(f"{self.reading} needs {nbytes} bytes, and the file ends after {left}")

    def text(self) -> str:
        (length,) = self.take("Q")
        self.expect(length)
        raw = self.content[self.place : self.place + length]
        self.place += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.reading} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.take("I")[0], self.take("Q")[0]
            if count > LONGEST_ARRAY:
                raise ValueError(f"{self.reading} has {count} entries")
            if inner == STRING:
                self.expect(8 * count)
                return [self.text() for _ in range(count)]
            return self.numbers(inner, count)
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: int, count: int) -> list:
        if kind not in SCALARS:
            raise ValueError(f"{self.reading} has the unknown value type {kind}")
        if kind == BOOL and any(byte > 1 for byte in self.peek(count)):
            raise ValueError(f"{self.reading} is neither true nor false")
        return list(self.take(SCALARS[kind], count))

    def peek(self, nbytes: int) -> bytes:
        self.expect(nbytes)
        return self.content[self.place : self.place + nbytes]


def read_header(file: Path) -> Header:
    """Metadata and tensors of one file. ValueError, in one sentence, for anything that is not sound."""
    state = check_file(file).stat()
    return cached_header(file, state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(8)
def cached_header(file: Path, *version: int) -> Header:
    """A vocabulary takes half a second, and is asked for by config, tensors and tokenizer."""
    try:
        with file.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return Header(file, *sections(Reader(content)))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{file} is not a sound GGUF file: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"{file} cannot be read: {error.strerror}") from None


def sections(reader: Reader) -> tuple[dict[str, Any], dict[str, Placed]]:
    if reader.peek(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    _, version, n_tensors, n_pairs = (*reader.take("I"), *reader.take("I"), *reader.take("Q", 2))
    if version not in VERSIONS:
        hint = "it is big-endian" if version % 2**16 == 0 else f"version {version} is none of {VERSIONS}"
        raise ValueError(hint)
    if n_pairs * 13 + n_tensors * 24 > len(reader.content):  # the least that each takes
        raise ValueError(f"{n_pairs} metadata pairs and {n_tensors} tensors do not fit in the file")
    metadata = unique(pairs(reader, n_pairs), "metadata key")
    listed = unique(infos(reader, n_tensors), "tensor")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two from 8 on, not {alignment!r:.40}")
    start = -(-reader.place // alignment) * alignment
    return metadata, placed(listed, start, alignment, len(reader.content))


def unique(items: Iterator[tuple[str, Any]], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise ValueError(f"{what} {ascii(key)} is there twice")
        found[key] = value
    return found


def pairs(reader: Reader, count: int) -> Iterator[tuple[str, Any]]:
    for i in range(count):
        reader.reading = f"metadata key {i}"
        key = reader.text()
        reader.reading = f"metadata {ascii(key)[1:-1]:.80}"
        yield key, reader.value(reader.take("I")[0])


def infos(reader: Reader, count: int) -> Iterator[tuple[str, tuple[list[int], int, int]]]:
    """(name, (dimensions as stored, type, offset))"""
    for i in range(count):
        reader.reading = f"the name of tensor {i}"
        name = reader.text()
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(f"tensor {i} is called {ascii(name)[:80]}, which is no tensor's name")
        reader.reading = f"tensor {name}"
        (n,) = reader.take("I")
        if not 1 <= n <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {n} dimensions")
        yield name, (list(reader.take("Q", n)), reader.take("I")[0], reader.take("Q")[0])


def placed(listed: dict, start: int, alignment: int, length: int) -> dict[str, Placed]:
    """Each tensor checked against the file: its type, its sizes, where it begins and ends."""
    found: dict[str, Placed] = {}
    for name, (dimensions, number, offset) in listed.items():
        kind = kind_of(name, number)
        if any(not 0 < size <= LARGEST_SIZE for size in dimensions):
            raise ValueError(f"tensor {name} has the dimensions {dimensions}")
        if dimensions[0] % kind.block:
            message = f"rows of {dimensions[0]} numbers, which blocks of {kind.block} do not divide"
            raise ValueError(f"tensor {name} is {kind.name} and has {message}")
        if offset % alignment:
            raise ValueError(f"tensor {name} begins at {offset}, no multiple of {alignment}")
        nbytes = prod(dimensions) // kind.block * kind.nbytes
        if start + offset + nbytes > length:
            message = f"needs {nbytes} bytes from {start + offset} on, and the file has {length}"
            raise ValueError(f"tensor {name} {message}: is it cut off?")
        found[name] = Placed(tuple(reversed(dimensions)), kind, start + offset, nbytes)
    refuse_overlaps(found)
    return found


def kind_of(name: str, number: int) -> Kind:
    if number in KINDS:
        return KINDS[number]
    known = ", ".join(kind.name for kind in KINDS.values())
    raise ValueError(f"tensor {name} has type {UNREAD.get(number, number)}, which is none of {known}")


def refuse_overlaps(found: dict[str, Placed]) -> None:
    in_order = sorted(found.items(), key=lambda item: item[1].offset)
    for (name, one), (other, two) in zip(in_order, in_order[1:], strict=False):
        if one.offset + one.nbytes > two.offset:
            raise ValueError(f"tensors {name} and {other} overlap")


# ---- Shards ------------------------------------------------------------------------------------------------


def read_headers(path: Path) -> list[Header]:
    """Of all shards; the first has the model's metadata. ValueError where they are not of one model."""
    headers = [read_header(file) for file in gguf_files(path)]
    if len(headers) == 1:
        alone = headers[0].metadata.get("split.count", 1)
        if alone not in (0, 1):
            message = f"split.count is {alone!r:.40}: give it its name, such as model-00001-of-00002.gguf"
            raise ValueError(f"{headers[0].file} is one of several shards, {message}")
        return headers
    for i, header in enumerate(headers):
        stated = [header.metadata.get(f"split.{key}") for key in ("no", "count")]
        if stated != [i, len(headers)]:
            message = f"split.no and split.count are {stated}, not {[i, len(headers)]}"
            raise ValueError(f"{header.file}: {message}")
    names = [name for header in headers for name in header.tensors]
    total = headers[0].metadata.get("split.tensors.count", len(names))
    if len(set(names)) < len(names) or len(names) != total:
        message = f"hold {len(names)} tensors, {len(set(names))} of them different, not {total!r:.40}"
        raise ValueError(f"{headers[0].file} and the other shards {message}")
    return headers

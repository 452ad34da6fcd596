"""The kernels for 64-bit Arm give the right numbers, by an emulated processor: their speed is not measured.

The library is cross-compiled as `native.py` would compile it there, and `arm.c` runs its functions under
qemu-user, on copies of the memory that each call reaches.
"""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoders.formats import gguf_blocks
from decoders.formats.gguf import KINDS
from decoders.kernels import build, calls, native
from decoders.kernels.selftest import gives_the_right_numbers, int4, int8_groups

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
FOLDER = "/usr/aarch64-linux-gnu"  # where Debian and Ubuntu have the libraries of Arm
BASE = 1 << 40  # where `arm.c` has the memory of a call
PROCESSORS = {"NEON": "neoverse-n1", "NEON-BF16": "max"}
TARGETS = [target for target in build.TARGETS if target.machine == "aarch64"]

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no {COMPILER} to compile for Arm"),
    pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"there is no {EMULATOR} (qemu-user) to run it"),
]


class Memory:
    """Copies of what a call reaches, one after the other, and where each tensor lies in them."""

    def __init__(self, tensors: dict[int, Tensor]):
        self.tensors = tensors  # by their addresses
        self.content = bytearray()
        self.places: dict[int, int] = {}

    def word(self, value: int | ctypes.Array | None) -> int:
        """An argument or a field as `arm.c` gets it: what is an address becomes one of its own."""
        if isinstance(value, ctypes.Array):
            return self.append(struct.pack(f"{len(value)}q", *map(self.word, value)))
        if value in self.tensors and value not in self.places:
            self.places[value] = self.append(ctypes.string_at(value, self.size(value)))
        return self.places.get(value, value or 0)

    def append(self, content: bytes) -> int:
        self.content += bytes(-len(self.content) % 64)
        self.content += content
        return BASE + len(self.content) - len(content)

    def size(self, address: int) -> int:
        """Bytes from here to the end of the tensor's storage."""
        storage = self.tensors[address].untyped_storage()
        return storage.data_ptr() + storage.nbytes() - address

    def write_back(self, content: bytes) -> None:
        for address, place in self.places.items():
            ctypes.memmove(address, content[place - BASE :], self.size(address))


class Emulated:
    """A library as `calls` sees it, whose functions run in an emulated process."""

    def __init__(self, command: list[str]):
        self.tensors: dict[int, Tensor] = {}  # whose addresses were taken for the next call
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self.run, name)

    def pointer(self, t: Tensor | None) -> int | None:
        if t is not None:
            self.tensors[t.data_ptr()] = t
        return None if t is None else t.data_ptr()

    def run(self, name: str, *arguments) -> None:
        memory, words, number = Memory(self.tensors), [], 0.0
        for argument, kind in zip(arguments, calls.ARGUMENTS[name], strict=True):
            if kind is calls.f:
                number = argument
            else:
                words.append(memory.word(argument))
        words += [0] * (21 - len(words))
        self.process.stdin.write(struct.pack("32s21qdq", name.encode(), *words, number, len(memory.content)))
        self.process.stdin.write(memory.content)
        self.process.stdin.flush()
        memory.write_back(self.process.stdout.read(len(memory.content)))
        self.tensors.clear()


def compiled(folder: Path, target: build.Target) -> list[str]:
    """The command that runs the functions of the library for these instructions."""
    driver, library = folder / "arm", folder / "kernels.so"
    source = Path(__file__).parent / "arm.c"
    libraries = ["-Wl,--no-as-needed", "-fopenmp", "-lm", "-ldl"]
    subprocess.run([COMPILER, "-O1", source, "-o", driver, *libraries], check=True)
    library.write_bytes(build.compiled(shutil.which(COMPILER), build.SOURCE, list(target.flags)))
    return [EMULATOR, "-L", FOLDER, "-cpu", PROCESSORS[target.name], str(driver), str(library)]


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def command(request, tmp_path_factory) -> list[str]:
    return compiled(tmp_path_factory.mktemp("arm"), request.param)


@pytest.fixture
def arm(command, monkeypatch) -> Iterator[Emulated]:
    library = Emulated(command)
    monkeypatch.setattr(calls, "pointer", library.pointer)
    yield library
    library.process.stdin.close()
    assert library.process.wait() == 0


def test_the_numbers_are_believed(arm):
    assert gives_the_right_numbers(arm)


def computed(lib: calls.Library, dtype: torch.dtype, rows: int) -> Iterator[Tensor]:
    """What every function but `run_plan` gives for random numbers, whose sums are rounded."""
    torch.manual_seed(rows)
    N, K = 70, 150
    w, bias = torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)
    x, padded = torch.randn(rows, K, dtype=dtype), torch.randn(rows, 160, dtype=dtype)
    yield from calls.to_int8(lib, w)
    yield from calls.to_int4(lib, w)
    yield from calls.product(lib, x, (w, None, None, bias))
    yield calls.transposed_product(lib, x, w.t().contiguous().t(), bias)
    whole = (torch.arange(N * K).view(N, K) * 7 % 11 - 5).float()
    q, scale = whole.to(torch.int8), torch.rand(N)
    yield from calls.int8_product(lib, x, (q, scale, None, bias))
    yield from calls.int8_weights_product(lib, x, (q, scale, None, bias))
    groups = int8_groups(torch.randint(-99, 99, (N, 160)).float())
    yield from calls.int8_groups_product(lib, padded, (groups[0], torch.rand(N, 5).half(), groups[2], bias))
    bits, _, zero = int4(whole)
    layer = bits, torch.rand(N, 8).half(), zero, bias
    yield from calls.int4_product(lib, x, layer)
    yield from calls.w4a8_product(lib, x, layer)
    yield calls.dequantize(lib, layer, K, dtype)
    yield calls.rms_norm(lib, x, bias.new_ones(K), 1e-5)
    heads, table = torch.randn(1, 3, rows, 50, dtype=dtype), torch.randn(2, 1, 1, rows, 34, dtype=dtype)
    yield calls.rotate(lib, heads, table[0], table[1])
    k, v = torch.randn(2, 2, 2, 75, 50, dtype=dtype)
    yield calls.one_query(lib, torch.randn(2, 4, 1, 50, dtype=dtype), k, v, None, 0.2)
    if dtype is torch.bfloat16:
        yield calls.bfloat16_product(lib, x, (q, scale, None, bias))  # 4 bits are rounded where PAIRS is 1
    for kind, size, room in (("Q8_0", 34, 32), ("Q4_0", 18, 16), ("Q4_1", 20, 16)):
        blocks = torch.randint(0, 256, (64, size)).byte()
        numbers = torch.empty(64, room, dtype=torch.uint8)
        calls.whole_numbers(lib, blocks, kind, numbers)
        yield numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_numbers_are_those_of_x86(arm, dtype, rows, monkeypatch):
    found = list(computed(arm, dtype, rows))
    monkeypatch.undo()
    library = native.library() or pytest.skip("no kernels of this machine to compare with")
    noise = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for ours, right in zip(found, computed(library, dtype, rows), strict=True):
        torch.testing.assert_close(ours, right, atol=8 * noise, rtol=noise)


def test_pairs_are_added_in_the_order_of_x86(arm, command, monkeypatch):
    """To a sum of 2^24 first -2^24, of the second of the pair, then 1: in the other order 1 would be lost."""
    if PROCESSORS["NEON-BF16"] not in command:
        pytest.skip("it multiplies float32")
    x, w = torch.zeros(1, 64).bfloat16(), torch.ones(1, 64).bfloat16()
    x[0, 0], x[0, 32], x[0, 33] = 2.0**24, 1.0, -(2.0**24)
    assert calls.product(arm, x, (w, None, None, None))[0].item() == 1.0
    monkeypatch.undo()
    if native.operators() == "AVX-512 kernels":
        assert calls.product(native.library(), x, (w, None, None, None))[0].item() == 1.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.block > 1], ids=lambda k: k.name)
def test_blocks_of_gguf_are_those_of_the_formula(arm, kind):
    blocks = torch.randint(0, 256, (64, kind.nbytes)).byte()
    right = gguf_blocks.FORMULAS[kind.name](blocks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.empty(64, kind.block, dtype=dtype)
        calls.dequantize_blocks(arm, blocks, kind.name, numbers)
        assert torch.equal(numbers.nan_to_num(), right.to(dtype).nan_to_num())

"""`kernels.c`, compiled where the processor and a C compiler are there, and called with tensors.

    library = native.library()      # None where it is not to be had: PyTorch's own operators do it then

It is compiled at the first need, in four seconds, into the user's cache folder (`~/.cache/decoders`, or below
`XDG_CACHE_HOME`), once for each processor and version. Every function must give the right numbers before it
is believed. `DECODERS_NATIVE=0` does without. Its threads are PyTorch's, `torch.get_num_threads()` of them.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Library = ctypes.CDLL
Maybe = Tensor | None
Layer = tuple[Tensor, Maybe, Maybe, Maybe]  # weights (N, ...), scale, zero, bias
SOURCE = Path(__file__).parent / "kernels.c"
NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
INT4 = 4
p, i, n, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
ARGUMENTS = {
    "rows": (p, p, i, i, n, n, i),
    "columns": (p, p, p, p, i, n, n, n, n, i),
    "int8_product": (p, p, i, i, n, n, i),
    "int8_product_of_digits": (p, p, i, i, n, n, i),
    "int4_product": (p, p, i, i, n, n, i),
    "bfloat16_product": (p, p, i, p, p, p, p, n, n, n, n, i),
    "int8_rows": (p, p, p, i, n, n, i),
    "int4_rows": (p, p, p, p, i, n, n, i),
    "rms_norm": (p, p, p, i, f, n, n, i),
    "rotate": (p, p, p, p, i, n, n, n, n, n, n, n, n, n, i),
    "to_int8": (p, i, n, p, p, n, n, i),
    "to_int4": (p, i, n, p, p, p, n, n, i),
    "one_query": (p, p, p, p, n, n, p, i, f, n, n, n, n, n, n, n, n, n, n, n, i),
}  # fmt: skip

# ---- Compiled ----------------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where a compiler or an instruction is missing, or a number is wrong."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc"))), None)
    flags = processor()
    if os.environ.get("DECODERS_NATIVE") == "0" or not compiler or not flags >= NEEDED:
        return None
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    try:
        ctypes.CDLL(str(runtime[0]), mode=ctypes.RTLD_GLOBAL)  # PyTorch's threads, not a second pool of them
        found = compiled(compiler, flags)
        for name, arguments in ARGUMENTS.items():
            getattr(found, name).argtypes, getattr(found, name).restype = arguments, None
    except (OSError, IndexError, AttributeError, subprocess.SubprocessError):
        return None
    return found if gives_the_right_numbers(found) else None


def processor() -> set[str]:
    """The instructions that this processor has, as Linux calls them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def compiled(compiler: str, flags: set[str]) -> ctypes.CDLL:
    """The library, out of the cache or made now. Another process may make the same: the last one to rename
    its file wins, and all are alike. Where no cache can be written it is made for this process alone."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    told = SOURCE.read_bytes() + version + " ".join(sorted(flags)).encode()
    name = f"kernels-{hashlib.sha256(told).hexdigest()[:16]}.so"
    folder = cache_folder()
    if folder and (folder / name).exists():
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        steps = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-c", str(SOURCE), "-o", "k.o"], \
                ["-shared", "k.o", "-o", "k.so"]  # not linked to another runtime of OpenMP  # fmt: skip
        for step in steps:
            subprocess.run([compiler, *step], cwd=place, capture_output=True, check=True, timeout=300)
        made = ctypes.CDLL(str(Path(place) / "k.so"))  # which needs its file no longer
        if folder:
            os.replace(Path(place) / "k.so", folder / name)
        return made


def cache_folder() -> Path | None:
    """Where libraries are kept; None where there is no such folder of this user alone."""
    with suppress(OSError, RuntimeError):  # a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decoders"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    return None


# ---- Called ------------------------------------------------------------------------------------------------


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def results(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], ctypes.Array]:
    """Room for the (..., N) of each layer, and what `kernels.c` calls a Layer, one after the other."""
    ys = [x.new_empty(*x.shape[:-1], w.shape[0]) for w, *_ in layers]
    told = []
    for (w, scale, zero, bias), y in zip(layers, ys, strict=True):
        told += [*map(pointer, (w, scale, zero, bias, y)), w.shape[0], w.stride(0)]
    return ys, (p * len(told))(*told)


def product_of_rows(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: x (..., K) with w (N, K) alike, whose rows may be apart."""
    return product(lib.rows, x, layers)


def product(function: Callable, x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    x, (ys, told) = x.contiguous(), results(x, layers)
    function(
        pointer(x),
        told,
        len(ys),
        KINDS[x.dtype],
        x.numel() // x.shape[-1],
        x.shape[-1],
        torch.get_num_threads(),
    )
    return ys


def product_of_columns(lib: Library, x: Tensor, w: Tensor, bias: Maybe) -> Tensor:
    """(..., N): x (..., K) with w (N, K) alike, which is stored turned: each column whole."""
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], w.shape[0])
    lib.columns(
        pointer(x),
        pointer(w),
        pointer(bias),
        pointer(y),
        KINDS[x.dtype],
        x.numel() // x.shape[-1],
        *w.shape,
        w.stride(1),
        torch.get_num_threads(),
    )
    return y


def int8_product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: each row of x rounded to 8 bits, with w int8 (N, K)."""
    return product(lib.int8_product, x, layers)


def int8_product_of_digits(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: each row of x rounded to 24 bits, with w int8 (N, K)."""
    return product(lib.int8_product_of_digits, x, layers)


def int4_product(lib: Library, x: Tensor, *layers: Layer) -> list[Tensor]:
    """(..., N) each: x (..., K) with w uint8 (N, K / 2), scale and zero (N, K / 32), these rows filled up."""
    return product(lib.int4_product, x, layers)


def bfloat16_product(
    lib: Library, x: Tensor, bias: Maybe, q: Tensor, scale: Tensor, zero: Maybe = None
) -> Tensor:
    """(..., N): many rows of x (..., K) with q int8 (N, K), or uint8 with a zero as in `int4_product`."""
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], q.shape[0])
    lib.bfloat16_product(
        pointer(x),
        pointer(q),
        KINDS.get(q.dtype, INT4),
        pointer(scale),
        pointer(zero),
        pointer(bias),
        pointer(y),
        x.numel() // x.shape[-1],
        len(q),
        x.shape[-1],
        q.stride(0),
        torch.get_num_threads(),
    )
    return y


def int8_rows(lib: Library, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K): what 8 bits stand for."""
    w = torch.empty(q.shape, dtype=dtype)
    lib.int8_rows(pointer(q), pointer(scale), pointer(w), KINDS[dtype], *w.shape, torch.get_num_threads())
    return w


def int4_rows(
    lib: Library, q: Tensor, scale: Tensor, zero: Tensor, inputs: int, dtype: torch.dtype
) -> Tensor:
    """(N, inputs): what 4 bits stand for."""
    w = torch.empty(q.shape[0], inputs, dtype=dtype)
    lib.int4_rows(
        pointer(q), pointer(scale), pointer(zero), pointer(w), KINDS[dtype], *w.shape, torch.get_num_threads()
    )
    return w


def to_int8(lib: Library, w: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(w.shape, dtype=torch.int8), torch.empty(w.shape[0])
    lib.to_int8(
        pointer(w), KINDS[w.dtype], w.stride(0), pointer(q), pointer(scale), *w.shape, torch.get_num_threads()
    )
    return q, scale


def to_int4(lib: Library, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, blocks = w.shape[0], -(-w.shape[1] // 128)
    q, zero = (torch.empty(rows, blocks * size, dtype=torch.uint8) for size in (64, 4))
    scale = torch.empty(rows, blocks * 4, dtype=torch.float16)
    lib.to_int4(
        pointer(w),
        KINDS[w.dtype],
        w.stride(0),
        pointer(q),
        pointer(scale),
        pointer(zero),
        *w.shape,
        torch.get_num_threads(),
    )
    return q, scale, zero


def rms_norm(lib: Library, x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x (..., C) / sqrt(mean(x^2) + eps), rounded, times w (C,) of the same dtype."""
    x, w = x.contiguous(), w.contiguous()
    y = torch.empty_like(x)
    lib.rms_norm(
        pointer(x),
        pointer(w),
        pointer(y),
        KINDS[x.dtype],
        eps,
        x.numel() // len(w),
        len(w),
        torch.get_num_threads(),
    )
    return y


def rotate(lib: Library, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), each row whole, by tables (B or 1, 1, T, R) alike."""
    T, R, y = x.shape[2], cos.shape[3], x.new_empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    lib.rotate(
        pointer(x),
        pointer(cos),
        pointer(sin),
        pointer(y),
        KINDS[x.dtype],
        *x.shape,
        R,
        *x.stride()[:3],
        0 if cos.shape[0] == 1 else T * R,
        torch.get_num_threads(),
    )
    return y


def one_query(lib: Library, q: Tensor, k: Tensor, v: Tensor, bias: Maybe, scale: float) -> Tensor:
    """(B, H, 1, D) of q alike; k, v (B, K, S, D), their rows whole; bias (B or 1, H or 1, 1, S)."""
    (B, H, _, D), (K, S) = q.shape, k.shape[1:3]
    q, y, steps = q.contiguous(), q.new_empty(B, H, 1, D), (0, 0)
    if bias is not None:
        bias = bias.float().contiguous()
        sizes = zip(bias.shape[:2], bias.stride()[:2], strict=True)
        steps = [0 if size == 1 else step for size, step in sizes]
    lib.one_query(
        pointer(q),
        pointer(k),
        pointer(v),
        pointer(bias),
        *steps,
        pointer(y),
        KINDS[q.dtype],
        scale,
        B,
        K,
        H // K,
        S,
        D,
        *k.stride()[:3],
        *v.stride()[:3],
        torch.get_num_threads(),
    )
    return y


# ---- Believed ----------------------------------------------------------------------------------------------


@torch.no_grad()
def gives_the_right_numbers(lib: Library) -> bool:
    """Small products of whole numbers, which are exact in any order, and attention that looks at one key."""
    a = (torch.arange(70 * 150).view(70, 150) * 7 % 11 - 5).float()
    for rows, dtype in ((1, torch.bfloat16), (7, torch.float16), (40, torch.bfloat16), (50, torch.float32)):
        x = (torch.arange(rows * 150).view(rows, 150) * 5 % 7 - 3).float()
        x[:, 0], ones = 127, torch.ones(70)
        wanted = x @ a.t()
        found = product_of_rows(lib, x.to(dtype), *[(a.to(dtype), None, None, None)] * 2)
        found.append(product_of_columns(lib, x.to(dtype), a.t().contiguous().t().to(dtype), None))
        for product_of_bytes in (int8_product, int8_product_of_digits):
            found += product_of_bytes(lib, x.to(dtype), *[(a.to(torch.int8), ones, None, None)] * 2)
        q = torch.zeros(70, 256, dtype=torch.uint8)
        q[:, :150] = (a + 5).to(torch.uint8)
        zero = torch.full((70, 8), 5, dtype=torch.uint8)
        four = q[:, ::2] | q[:, 1::2] << 4, torch.ones(70, 8).half(), zero
        found += int4_product(lib, x.to(dtype), *[(*four, None)] * 2)
        if dtype is torch.bfloat16:
            found.append(bfloat16_product(lib, x.to(dtype), None, a.to(torch.int8), ones))
            found.append(bfloat16_product(lib, x.to(dtype), None, *four))
        if not all(torch.equal(y, wanted.to(dtype)) for y in found):
            return False
        found = [int4_rows(lib, *four, 150, dtype), int8_rows(lib, a.to(torch.int8), ones, dtype)]
        if not all(torch.equal(w, a.to(dtype)) for w in found):
            return False
        w, twos = a[0].to(dtype), (2 - 4 * (x % 2)).to(dtype)
        if not torch.equal(rms_norm(lib, twos, w, 0.0), twos / 2 * w):
            return False
        heads, (cos, sin) = x.to(dtype).view(1, rows, 3, 50).transpose(1, 2), a[:2, None, None, :34].to(dtype)
        (one, two), passed = heads[..., :34].chunk(2, -1), heads[..., 34:]
        wanted = torch.cat([one, two], -1) * cos + torch.cat([-two, one], -1) * sin
        found = rotate(lib, heads, cos[None].expand(1, 1, rows, 34), sin[None].expand(1, 1, rows, 34))
        if not torch.equal(found, torch.cat([wanted, passed], -1)):
            return False
        k = torch.zeros(2, 2, rows + 3, 150, dtype=dtype)
        bias = torch.full((2, 1, 1, rows + 3), -torch.inf)
        v, bias[..., rows] = torch.arange(k.numel()).view(k.shape).to(dtype) / 16384, 0.0
        if not torch.equal(
            one_query(lib, x[:1].to(dtype).expand(2, 4, 1, 150), k, v, bias, 1.0),
            v[:, :, rows, None].repeat_interleave(2, 1),
        ):
            return False
    return True

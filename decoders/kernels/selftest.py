"""Whether a compiled library computes what it should, before it is used.

Products of small whole numbers are exact in any order and dtype; attention looks at one key only.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import calls

Pairs = Iterator[tuple[Tensor, Tensor]]  # computed, right
N, K = 70, 150
CASES = ((1, torch.bfloat16), (7, torch.float16), (40, torch.bfloat16), (50, torch.float32))


@torch.no_grad()
def gives_the_right_numbers(lib: calls.Library) -> bool:
    """On a few small tensors of each dtype: all but plans and GGUF's rarer blocks."""
    w = (torch.arange(N * K).view(N, K) * 7 % 11 - 5).float()
    for rows, dtype in CASES:
        x = (torch.arange(rows * K).view(rows, K) * 5 % 7 - 3).float()
        x[:, 0] = 127  # so that a scale of 8 bits is 1
        for check in CHECKS:
            if not all(torch.equal(computed, right) for computed, right in check(lib, x, w, dtype)):
                return False
    return True


def int4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w, whole numbers from -5 to 5, in 4 bits."""
    q = torch.zeros(N, 256, dtype=torch.uint8)
    q[:, :K] = (w + 5).to(torch.uint8)
    zero = torch.full((N, 8), 5, dtype=torch.uint8)
    return pairs(q), torch.ones(N, 8).half(), zero


def pairs(q: Tensor) -> Tensor:
    """Numbers of 4 bits (n, m) in bytes (n, m / 2): number 2 i in the lower half of byte i."""
    return q[:, ::2] | q[:, 1::2] << 4


def with_a_minimum(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by groups of 128 inputs: w + 5 - 5."""
    return int4(w)[0], torch.ones(N, 2).bfloat16(), torch.full((N, 2), -5.0).half()


def int8_groups(w: Tensor) -> calls.Layer:
    """w, whole numbers, in 8 bits by groups of 32, with a zero of -3."""
    groups = (N, w.shape[1] // 32)
    return (w - 3).to(torch.int8), torch.ones(groups).half(), torch.full(groups, -3, dtype=torch.int8), None


def products(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    right, x, ones = (x @ w.t()).to(dtype), x.to(dtype), torch.ones(N)
    w8, w4 = w.to(torch.int8), int4(w)
    ys = calls.product(lib, x, *[(w.to(dtype), None, None, None)] * 2)
    ys.append(calls.transposed_product(lib, x, w.t().contiguous().t().to(dtype), None))
    ys += calls.int8_product(lib, x, *[(w8, ones, None, None)] * 2)
    ys += calls.int8_weights_product(lib, x, *[(w8, ones, None, None)] * 2)
    ys += calls.int4_product(lib, x, *[(*w4, None)] * 2)
    ys += calls.int4_product(lib, x, (*with_a_minimum(w), None))
    whole, padded = int8_groups(F.pad(w, (0, -K % 32))), F.pad(x, (0, -K % 32))
    ys += calls.int8_groups_product(lib, padded, *[whole] * 2)
    if dtype is torch.bfloat16:
        ys.append(calls.bfloat16_product(lib, x, (w8, ones, None, None)))
        ys.append(calls.bfloat16_product(lib, x, (*w4, None)))
        ys.append(calls.bfloat16_product(lib, x, (*with_a_minimum(w), None)))
        ys.append(calls.bfloat16_product(lib, padded, whole))
    for y in ys:
        yield y, right


def rounded(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    """Inputs whose largest is 127, with 4 bits that stand for 7 to 127: neither is rounded."""
    q, scale, _ = int4(w)
    ones = torch.ones_like(scale)
    layer = q, 8 * ones, 7 * ones, None
    right = (x @ (8 * (w + 5) + 7).t()).to(dtype)
    for y in calls.w4a8_product(lib, x.to(dtype), layer, layer):
        yield y, right


def dequantized(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    yield calls.dequantize(lib, (*int4(w), None), K, dtype), w.to(dtype)
    yield calls.dequantize(lib, (*with_a_minimum(w), None), K, dtype), w.to(dtype)
    yield calls.dequantize(lib, (w.to(torch.int8), torch.ones(N), None, None), K, dtype), w.to(dtype)
    whole = F.pad(w, (0, -K % 32))
    yield calls.dequantize(lib, int8_groups(whole), whole.shape[1], dtype), whole.to(dtype)


def quantized(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    """Rows whose largest is 127, groups of 32 from -5 to 10: their scales are 1, and nothing is rounded."""
    q, scale = calls.to_int8(lib, x.to(dtype))
    yield q, x.to(torch.int8)
    yield scale, torch.ones(len(x))
    groups, numbers = -(-K // 32), w.clone()
    numbers[:, ::32], numbers[:, 1::32] = -5, 10
    whole, used = F.pad(numbers, (0, 256 - K)), torch.zeros(N, 8)
    used[:, :groups] = 1  # a group of padding has scale and zero 0
    right = (whole + 5) * used.repeat_interleave(32, 1)
    q, scale, zero = calls.to_int4(lib, numbers.to(dtype))
    yield q, pairs(right.to(torch.uint8))
    yield scale, used.half()
    yield zero, (5 * used).to(torch.uint8)


def of_blocks(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    """w in blocks of 32 numbers: 8 bits, and 4 bits with a scale of 1 and a minimum."""
    whole = w.flatten()[: N * K // 32 * 32].view(-1, 32)
    one, minimum = (torch.full((len(whole), 1), n).half().view(torch.uint8) for n in (1.0, -5.0))
    q = (whole + 5).to(torch.uint8)
    eight = torch.cat([one, whole.to(torch.int8).view(torch.uint8)], 1)
    four = torch.cat([one, minimum, q[:, :16] | q[:, 16:] << 4], 1)
    for kind, blocks in (("Q8_0", eight), ("Q4_1", four)):
        numbers = torch.empty(whole.shape, dtype=dtype)
        calls.dequantize_blocks(lib, blocks, kind, numbers)
        yield numbers, whole.to(dtype)
    for kind, blocks, right in (("Q8_0", eight, eight[:, 2:]), ("Q4_1", four, pairs(q))):
        taken = torch.empty(right.shape, dtype=torch.uint8)
        calls.whole_numbers(lib, blocks, kind, taken)
        yield taken, right


def norms(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    weight, twos = w[0].to(dtype), (2 - 4 * (x % 2)).to(dtype)  # 2 or -2: their mean square is 4
    yield calls.rms_norm(lib, twos, weight, 0.0), twos / 2 * weight


def rotations(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    T, R = len(x), 34
    heads = x.to(dtype).view(1, T, 3, 50).transpose(1, 2)
    cos, sin = w[:2, None, None, None, :R].to(dtype).expand(2, 1, 1, T, R)
    first, second = heads[..., :R].chunk(2, -1)
    rotated = torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin
    yield calls.rotate(lib, heads, cos, sin), torch.cat([rotated, heads[..., R:]], -1)


def attentions(lib: calls.Library, x: Tensor, w: Tensor, dtype: torch.dtype) -> Pairs:
    S, visible = len(x) + 3, len(x)
    k = torch.zeros(2, 2, S, K, dtype=dtype)
    v = torch.arange(k.numel()).view(k.shape).to(dtype) / 16384
    mask = torch.full((2, 1, 1, S), -torch.inf)
    mask[..., visible] = 0.0
    q = x[:1].to(dtype).expand(2, 4, 1, K)
    yield calls.one_query(lib, q, k, v, mask, 1.0), v[:, :, visible, None].repeat_interleave(2, 1)
    yield int8_attention(lib, q, S, visible)


def int8_attention(lib: calls.Library, q: Tensor, S: int, visible: int) -> tuple[Tensor, Tensor]:
    """Keys that are alike but for their scale: 1 at the one that is looked at, else 0. Values times 2."""
    scales = torch.zeros(2, 2, S, 2)
    scales[:, :, visible, 0], scales[..., 1] = 1, 2
    k = torch.zeros(2, 2, S, K + 4, dtype=torch.int8)
    k[..., 0], k[..., K:] = 1, scales[..., :1].contiguous().view(torch.int8)
    v = (torch.arange(k.numel()).view(k.shape) % 251 - 125).to(torch.int8)
    right = 2 * v[:, :, visible, None, :K].to(q.dtype).repeat_interleave(2, 1)
    v[..., K:] = scales[..., 1:].contiguous().view(torch.int8)
    return calls.one_query(lib, q, k, v, None, 1.0), right


CHECKS = (products, rounded, dequantized, quantized, of_blocks, norms, rotations, attentions)

"""Linear layers and RMSNorm for inference on a CPU.

- Up to 16 rows: `kernels.c`, which reads the weights about as fast as memory can give them.
- float32, more rows: oneDNN's product, called directly. `F.linear` calls MKL's, which takes longer (measured
  on an AMD EPYC).
- Everything else, and wherever `kernels.c` cannot be compiled: `F.linear`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import calls, native
from .conditions import NATIVE_DTYPES, is_dense_cpu, must_run_plain_ops

MAX_ROWS = 16  # up to which `kernels.c` is faster than oneDNN


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by the kernel that reads the weights fastest. x (..., in), weight (out, in), bias (out,)."""
    if must_run_plain_ops() or not fits(x, weight, bias):
        return F.linear(x, weight, bias)
    if is_few_rows(x, weight) and (lib := native.library()):
        if weight.stride(1) != 1:
            return calls.transposed_product(lib, x, weight, bias)
        return calls.product(lib, x, (weight, None, None, bias))[0]
    if x.dtype is torch.float32 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the shapes are those of a product, of dense tensors of one dtype."""
    dense = is_dense_cpu(x, weight) if bias is None else is_dense_cpu(x, weight, bias)
    return dense and x.dim() > 0 and x.shape[-1] == weight.shape[1]


def is_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `kernels.c` takes this product, and is the fastest way."""
    return 0 < x.numel() <= MAX_ROWS * weight.shape[1] and 1 in weight.stride() and x.dtype in NATIVE_DTYPES


# Methods that `hooks.prepare` puts on a module. All are called `forward`: a pickled module then finds its
# class's own under that name, and is plain.


def linear_forward(self: Any, x: Tensor) -> Tensor:
    """Of nn.Linear."""
    return linear(x, self.weight, self.bias)


def conv1d_forward(self: Any, x: Tensor) -> Tensor:
    """Of GPT-1's Conv1D, whose matrix is stored transposed, [in, out]."""
    return linear(x, self.weight.t(), self.bias)


def rms_norm_forward(self: Any, x: Tensor) -> Tensor:
    """Of RMSNorm: one pass over each row, where PyTorch's operators make six."""
    weight = self.weight
    fit = is_dense_cpu(x, weight) and x.shape[-1:] == weight.shape and x.dtype in NATIVE_DTYPES
    lib = native.library() if fit and not must_run_plain_ops() else None
    return calls.rms_norm(lib, x, weight, self.eps) if lib else type(self).forward(self, x)


linear_forward.__name__ = conv1d_forward.__name__ = rms_norm_forward.__name__ = "forward"

"""When everything is left to PyTorch's own operators, and which tensors a kernel takes."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations, in kernels.c


def must_run_plain_ops() -> bool:
    """Whether somebody must see the operations: autograd, autocast, a compiler, a tracer, a transform."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_traced()


def is_traced() -> bool:
    """A compiler, a tracer, forward AD, torch.func or a dispatch mode follows the operations."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
    )


def is_dense_cpu(*tensors: Tensor) -> bool:
    """Dense tensors on the CPU, of one dtype: no subclass such as DTensor or torchao's, no fake ones."""
    dtype, strided = tensors[0].dtype, torch.strided
    return all(
        type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout is strided and t.dtype is dtype
        for t in tensors
    )

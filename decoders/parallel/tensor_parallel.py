"""One model over several processes, each with a part of every matrix: tensor parallelism.

    torchrun --nproc-per-node 2 -m decoders generate MODEL PROMPT --tensor-parallel

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = parallel.load(PhiForCausalLM, folder, mesh)     # reads its own part of the files
    model = parallel.parallelize(model, mesh)               # a model that every process has
    model = parallel.gather(model)                           # a plain one again

Attention is cut by heads, an MLP by its inner width, the token embedding and the output layer by the
vocabulary; norms are on every device. Inputs and outputs are those of the whole model, the same in every
process, and so must be what they draw: start them with the same seed. Parameters become DTensors, so that
optimisers, clipping and `fully_shard` work as usual. What a process has of a fused QKV matrix are its parts
of q, k and v; `gather` puts them together again. Where there are fewer heads of keys than processes,
several have the same ones, and the norm of all gradients counts those as often.
"""

from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from decoders import kernels, weights

from .plans import PLANS, Cut, Part, sizes

# ---- Styles ------------------------------------------------------------------------------------------------


class Split(ParallelStyle):
    """A module whose parameters are cut; `given` and `made` are what its input and output are before and
    after: plain tensors outside."""

    def __init__(self, cuts: dict[str, Cut], given: Placement, made: Placement, plain: bool = True):
        self.cuts, self.given, self.made, self.plain = cuts, given, made, plain
        self.dtype, self.done = None, {}  # and what is tied: parameter -> its DTensor

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in self.done:
                self.done[p] = distributed(p, self.cuts.get(name), mesh, self.dtype)
            module.register_parameter(name, self.done[p])
        module.cuts = self.cuts
        module.register_forward_pre_hook(partial(self.enter, mesh=mesh))
        module.register_forward_hook(partial(self.leave, mesh=mesh))
        return module

    def enter(self, module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> tuple:
        x = inputs[0]
        looked_up = isinstance(module, nn.Embedding) and not torch.compiler.is_compiling()
        if looked_up and ((x < 0) | (x >= module.num_embeddings)).any():  # no process would have it: zeros
            raise IndexError("index out of range")
        x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [self.given], run_check=False)
        return x, *inputs[1:]

    def leave(self, module: nn.Module, inputs: tuple, y: DTensor, mesh: DeviceMesh) -> Tensor:
        y = y.redistribute(mesh, [self.made])
        return y.to_local() if self.plain else y


def distributed(
    p: nn.Parameter, cut: Cut | None, mesh: DeviceMesh, dtype: torch.dtype | None
) -> nn.Parameter:
    """This process's own of p, in memory of its own: of a mapped file no more than that is read."""
    rank, n, shape = mesh.get_local_rank(), mesh.size(), list(p.shape)
    own = p.detach() if cut is None else cut.own(p.detach(), rank, n)
    own = own.to(mesh.device_type, dtype, memory_format=torch.contiguous_format, copy=True)
    if cut is not None and cut.parts:
        shape[cut.dim] = own.shape[cut.dim] * n  # more than p's where processes share a head of keys
    place = Replicate() if cut is None else Shard(cut.dim)
    strides = torch.empty(shape, device="meta").stride()
    t = DTensor.from_local(own, mesh, [place], run_check=False, shape=torch.Size(shape), stride=strides)
    return nn.Parameter(t, requires_grad=p.requires_grad)


def style(how: str, module: nn.Module, known: dict[str, tuple[int, int]], gather: bool) -> Split:
    """`how` is a word of `PLANS`; "" is whole on every device."""
    kind, *names = how.split() or [""]
    transposed = type(module).__name__ == "Conv1D"  # (in, out)
    parts = tuple(Part(name, *known[name]) for name in names)
    if kind == "columns":
        cuts = {"weight": Cut(int(transposed), parts), "bias": Cut(0, parts)}
        return Split(cuts, Replicate(), Shard(-1))
    if kind == "rows":
        return Split({"weight": Cut(int(not transposed), parts)}, Shard(-1), Replicate())
    if kind == "vocabulary" and isinstance(module, nn.Embedding):
        return Split({"weight": Cut(0)}, Replicate(), Replicate())
    if kind == "vocabulary":
        cuts = {"weight": Cut(0), "bias": Cut(0)}
        return Split(cuts, Replicate(), Replicate() if gather else Shard(-1), gather)
    if kind == "heads":  # norms of its own heads: of the weights' gradient each process has a part
        return Split({}, Shard(1), Shard(1))
    return Split({}, Replicate(), Replicate())


# ---- A model -----------------------------------------------------------------------------------------------


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    gather_logits: bool = True,
) -> nn.Module:
    """Leave this process its part of `model`, in place; all processes of the one-dimensional `mesh` (left
    out: all there are) call it. `dtype` converts on the way.

    With `gather_logits=False` the logits stay cut by the vocabulary, as a DTensor, for the loss of a large
    one: within `torch.distributed.tensor.parallel.loss_parallel()` no process has them whole.
    ValueError where the heads or the MLP cannot be shared by so many, or the weights are quantised.
    """
    if kernels.is_quantized(model):
        raise ValueError("a quantised model cannot be cut: load it without quantize")
    if mesh is None:
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    known, done, plan = sizes(model.config), {}, {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            plan[name] = style(plan_of(model, name), module, known, gather_logits)
            plan[name].dtype, plan[name].done = dtype, done
    for part in (part for one in plan.values() for cut in one.cuts.values() for part in cut.parts):
        part.of(0, mesh.size())  # before anything is changed
    kernels.plain(model)
    parallelize_module(model, mesh, plan)
    for module in model.modules():
        if hasattr(type(module), "attend"):
            split_heads(module, mesh, known)
    return model


def plan_of(model: nn.Module, name: str) -> str:
    """What `PLANS` says of a module of this name."""
    plan = PLANS[model.config.model_type]
    return next((how for end, how in plan.items() if f".{name}".endswith(f".{end}")), "")


def split_heads(attention: nn.Module, mesh: DeviceMesh, known: dict[str, tuple[int, int]]) -> None:
    """An attention module that has some of the heads."""
    rank, n = mesh.get_local_rank(), mesh.size()
    attention.attend = partial(own_heads, type(attention).attend, mesh)
    if hasattr(attention, "parts"):  # of Phi-3's fused QKV matrix
        attention.parts = tuple(Part(name, *known[name]).of(rank, n)[1] for name in "qkk")
    if known["k"][0] % n:  # heads of keys that several processes have
        for module in attention.children():
            if any(part.name == "k" for cut in getattr(module, "cuts", {}).values() for part in cut.parts):
                module.forward = MethodType(forward_with_shared_keys, module)


def own_heads(
    attend: Any,
    mesh: DeviceMesh,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    need_weights: bool = False,
    *head_mask: Tensor | None,
) -> tuple:
    """`attend` with what masks say of this process's heads; weights (B, H, T, S) of all of them."""
    own = slice(mesh.get_local_rank() * q.shape[1], (mesh.get_local_rank() + 1) * q.shape[1])
    if attn_mask is not None and attn_mask.shape[1] > 1:  # the mask of each head
        attn_mask = attn_mask[:, own]
    rest = [mask if mask is None else mask[own] for mask in head_mask]
    y, w = attend(q, k, v, attn_mask, scale, dropout, need_weights, *rest)
    return y, w if w is None else DTensor.from_local(w, mesh, [Shard(1)], run_check=False).full_tensor()


def forward_with_shared_keys(self: nn.Module, x: DTensor) -> DTensor:
    return F.linear(
        x,
        *(
            p if p is None else SumSharedRows.apply(p, self.cuts[name])
            for name, p in (("weight", self.weight), ("bias", self.bias))
        ),
    )


class SumSharedRows(torch.autograd.Function):
    """A parameter some of whose rows several processes have: its gradient there is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, p: DTensor, cut: Cut) -> DTensor:
        ctx.cut = cut
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple:
        mesh, place = grad.device_mesh, grad.placements
        own, rank, n, start = grad.to_local().clone(), mesh.get_local_rank(), mesh.size(), 0
        for part in ctx.cut.parts:
            first, length = part.of(rank, n)
            if part.count % n:
                rows = own[start : start + length]
                total = own.new_zeros(part.count * part.size, *own.shape[1:])
                total[first : first + length] = rows
                dist.all_reduce(total, group=mesh.get_group())
                rows.copy_(total[first : first + length])
            start += length
        return DTensor.from_local(own, mesh, place, run_check=False), None


def load(
    model_class: type,
    path_or_id: str | Path,
    mesh: DeviceMesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    **options,
) -> nn.Module:
    """As `weights.load`, of which each process reads its own part only; on the mesh's devices."""
    return parallelize(weights.load(model_class, path_or_id, **options), mesh, dtype=dtype)


def gather(model: nn.Module) -> nn.Module:
    """A plain model with all the weights, in every process of the mesh; all of them call it."""
    with torch.device("meta"), weights.Undrawn():
        plain = type(model)(model.config)
    plain.load_state_dict(gather_tensors(model), strict=False, assign=True)
    weights.tie(plain)
    plain.config_json, plain.generation_config = model.config_json, model.generation_config
    return plain.train(model.training)


def gather_tensors(model: nn.Module, grads: bool = False) -> dict[str, Tensor]:
    """Name -> parameter, or its gradient, as in a plain model."""
    found = {}
    for name, p in model.named_parameters():
        t = p.grad if grads else p.detach()
        module, _, own = name.rpartition(".")
        cut = model.get_submodule(module).cuts.get(own)
        if t is not None:
            found[name] = t.full_tensor()
            if cut is not None and cut.parts:
                found[name] = cut.joined(list(found[name].chunk(t.device_mesh.size(), cut.dim)))
    return found

"""A plan: the operations of a decoding step as a flat list with their pointers, made once from the modules of
a loaded model, and run by `plan.c` in one call. It is valid for a model as it is: `Guards` notice changes.

NotPlanned says why a model has none.
"""

import ctypes
from collections.abc import Iterator
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import calls
from .attention import attention, qkv, rotate, window_of
from .families import BASE_NAMES, FAMILIES, PHI3, Family, class_of
from .linear import conv1d_forward, linear_forward, rms_norm_forward
from .quantized import MAX_INPUTS, Quantized, QuantizedEmbedding
from .sources import functions_of, why_edited

MAX_ROWS = 16
SINGLE_THREAD_BYTES = 4 * 2**20  # of weights, up to which one thread is enough
long, pointer = ctypes.c_long, ctypes.c_void_p
EMBED, LAYER_NORM, RMS_NORM, PRODUCT, ROTATE, ATTEND, ACTIVATE, GATE, ADD, REORDER, KEEP, HEAD = range(12)
TOKENS, POSITIONS, TYPES = range(3)  # which ids an embedding takes
WEIGHTS = {"int8": 3, "int4": 4, "transposed": 8, "int8-weights": 9, "same": 10, "int8-groups": 11}
FUNCTIONS = ("gelu_tanh", "gelu", "silu", "relu", "relu2")


class NotPlanned(Exception):
    """This model takes its steps module by module; the message says why."""


class CLayer(ctypes.Structure):
    _fields_ = [(name, pointer) for name in ("w", "scale", "zero", "bias", "y")]
    _fields_ += [(name, long) for name in ("N", "stride", "scale_kind", "zero_kind", "shift")]


class CHeads(ctypes.Structure):
    _fields_ = [(name, long) for name in ("heads", "width", "row", "head")]


class COp(ctypes.Structure):
    _fields_ = [
        ("what", long),
        ("which", long),
        *((name, pointer) for name in ("input", "other", "third", "out", "weight", "bias")),
        ("layers", CLayer * 3),
        ("count", long),
        ("heads", CHeads),
        ("others", CHeads),
        ("layer", long),
        ("window", long),
        ("rows", long),
        ("number", ctypes.c_double),
    ]


class CPlan(ctypes.Structure):
    _fields_ = [("kind", long), ("count", long), ("ops", pointer), ("scratch", pointer)]
    _fields_ += [("single", long), ("backoff", long)]


# ---- Modules -----------------------------------------------------------------------------------------------


def features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if stored_as(layer) == "transposed" and not isinstance(layer, nn.Linear):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def stored_as(layer: Any) -> str:
    """A key of WEIGHTS. NotPlanned for a layer of another kind, or with somebody else's forward."""
    own = vars(layer).get("forward")
    function = getattr(own, "__func__", own)
    if type(layer) is Quantized and own is None and layer.kind in WEIGHTS:
        if layer.kind in ("int8", "int8-weights") and layer.in_features > MAX_INPUTS:
            raise NotPlanned(f"{layer.in_features} inputs are too many for int8")
        return layer.kind
    if type(layer) is nn.Linear and function is linear_forward:
        return "same" if layer.weight.stride(1) == 1 else "transposed"
    if type(layer).__name__ == "Conv1D" and function is conv1d_forward:
        return "transposed"
    raise NotPlanned(f"a layer is {getattr(layer, 'kind', type(layer).__name__)}")


def function_of(act: Any) -> str:
    """The name of an activation function, out of FUNCTIONS."""
    if isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}:
        return "gelu_tanh"
    for name in ("gelu", "silu", "relu"):
        if act is getattr(F, name):
            return name
    if getattr(act, "__name__", "") == "relu2":
        return "relu2"
    raise NotPlanned("its activation function is not among those of plan.c")


class Guards:
    """What a plan depends on: the tensors, where their numbers lie, the modules, their methods, the config.
    They are checked before every step, so it is fast, and does not say what has changed."""

    OWN = ("forward", "attend", "rotate", "qkv")
    HOLDERS = ("_modules", "_parameters", "_buffers")

    def __init__(self, model: nn.Module):
        self.modules = [vars(m) for m in model.modules()]
        self.hooks = [d[name] for d in self.modules for name in ("_forward_hooks", "_forward_pre_hooks")]
        self.sizes = list(map(len, self.modules))  # who puts a method on a module makes it larger
        self.own = [(d, name, d[name]) for d in self.modules for name in self.OWN if name in d]
        holders = [d[name] for d in self.modules for name in self.HOLDERS]
        self.empty, self.holders = [h for h in holders if not h], [h for h in holders if h]
        self.held = list(self.all_held())
        self.tensors = [t for t in self.held if isinstance(t, Tensor)]
        self.places = [t.data_ptr() for t in self.tensors]
        classes = {c for m in model.modules() for c in (type(m), class_of(m))}
        self.classes = [(c, c.forward) for c in classes]
        self.functions = functions_of(model)
        self.config: Any = model.config
        self.settings = dict(vars(self.config))

    def all_held(self) -> Iterator[Any]:
        """Submodules, parameters and buffers of all modules, and an end."""
        return chain(chain.from_iterable(holder.values() for holder in self.holders), [Guards])

    def is_observed(self) -> bool:
        """Whether somebody looks into a module, or trains it."""
        is_training = any(map(itemgetter("training"), self.modules))
        return is_training or any(self.hooks) or nn.modules.module._has_any_global_hook()

    def are_valid(self) -> bool:
        """Whether tensors, modules, methods and config are those that the plan was made of."""
        return (
            not any(self.empty)
            and all(map(is_, self.all_held(), self.held))
            and [t.data_ptr() for t in self.tensors] == self.places
            and list(map(len, self.modules)) == self.sizes
            and all(d.get(name) is value for d, name, value in self.own)
            and all(c.forward is function for c, function in self.classes)
            and all(place.get(name) is value for place, name, value, _ in self.functions)
            and vars(self.config) == self.settings
        )


def positions_limit(model: Any, family: Family) -> int:
    """How long a text of this plan may be: positions that are embedded, or where dynamic NTK begins."""
    if family.positions:
        return len(model.get_submodule(family.positions).weight)
    is_dynamic = model.config.rope_varies and family is not PHI3
    return model.config.max_position_embeddings if is_dynamic else 2**62


# ---- A plan ------------------------------------------------------------------------------------------------


class Plan:
    """The list of operations of a base model, or of a causal one: from ids to the last hidden state, or to
    logits."""

    def __init__(self, model: Any, guards: Guards):
        whole = model
        base_name = BASE_NAMES.get(class_of(model).__name__)
        head = model.lm_head if base_name else None
        model = model.get_submodule(base_name) if base_name else model
        family = FAMILIES.get(type(model).__name__)
        if family is None:
            raise NotPlanned(f"{type(model).__name__} has no description")
        if reason := why_edited(whole):
            raise NotPlanned(reason)
        self.family: Family = family
        table = model.get_submodule(family.embedding)
        self.lookup = table if isinstance(table, QuantizedEmbedding) else None
        self.embedding = (
            torch.empty(1, table.embedding_dim, dtype=table.dtype) if self.lookup else table.weight
        )
        self.dtype, self.hidden_size = self.embedding.dtype, self.embedding.shape[1]
        if self.dtype not in calls.KINDS or not self.embedding.is_cpu:
            raise NotPlanned(f"its numbers are {self.dtype} on {self.embedding.device}")
        self.guards = guards
        self.window_size = window_of(model)
        self.layers = list(model.get_submodule(family.layers))
        self.ops: list[COp] = []
        self.keep: list[Tensor] = []  # what the pointers point to
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.max_rows, self.max_inputs, self.weight_bytes = MAX_ROWS, 0, 0
        self.is_exact = True  # no product rounds its input to 8 bits
        self.max_positions = positions_limit(model, family)
        self.has_head = head is not None
        self.outputs = self.hidden_size if head is None else features(head)[1]
        self.add_model(model, head)
        self.finish()

    def finish(self) -> None:
        """The list as C reads it."""
        self.array = (COp * len(self.ops))(*self.ops)
        scratch = torch.empty(MAX_ROWS * 6 * (self.max_inputs + 256) + 65536, dtype=torch.uint8)
        self.keep.append(scratch)
        address = ctypes.cast(self.array, pointer)
        self.c_plan = CPlan(calls.KINDS[self.dtype], len(self.ops), address, scratch.data_ptr(), 0, 4)

    def threads(self) -> int:
        """As many as the work is worth."""
        return 1 if self.weight_bytes <= SINGLE_THREAD_BYTES else torch.get_num_threads()

    # ---- Operations ----

    def buffer(self, name: str, width: int) -> int:
        """The address of (MAX_ROWS, width) numbers, the same for all layers."""
        if (name, width) not in self.buffers:
            self.buffers[name, width] = torch.zeros(MAX_ROWS * width + 64, dtype=self.dtype)
        return self.buffers[name, width].data_ptr()

    def address(self, t: Tensor | None) -> int | None:
        """Of a weight in the model's dtype, which must be contiguous."""
        if t is None:
            return None
        if type(t) not in (Tensor, nn.Parameter) or t.dtype != self.dtype or not t.is_cpu:
            raise NotPlanned("its weights differ in dtype or device")
        if not t.is_contiguous():
            raise NotPlanned("a weight is not contiguous")
        self.keep.append(t)
        return calls.pointer(t)

    def add(self, what: int, **fields: Any) -> None:
        self.ops.append(COp(what=what, **fields))

    def norm(self, module: Any, source: int, out: int | None, heads: CHeads | None = None) -> None:
        """LayerNorm or RMSNorm of rows of `hidden_size`, or of heads."""
        heads = heads or CHeads(1, self.hidden_size, self.hidden_size, 0)
        fields = {"input": source, "out": out, "heads": heads, "number": module.eps}
        if type(module) is nn.LayerNorm and "forward" not in vars(module):
            what, bias = LAYER_NORM, module.bias
        elif getattr(vars(module).get("forward"), "__func__", None) is rms_norm_forward:
            what, bias = RMS_NORM, None
        else:
            raise NotPlanned(f"a norm is {type(module).__name__}")
        self.add(what, weight=self.address(module.weight), bias=self.address(bias), **fields)

    def product(self, source: int, **layers: Any) -> list[int]:
        """The addresses of what linear layers make of the same input, by the names of their buffers."""
        kinds = {stored_as(layer) for layer in layers.values()}
        orders = [layer._buffers.get("order") for layer in layers.values()]
        if len(orders) == 1 and orders[0] is not None:
            source = self.reordered(source, orders[0])
        elif len(kinds) > 1 or any(order is not None for order in orders):
            return [self.product(source, **{name: layer})[0] for name, layer in layers.items()]
        outs = [self.buffer(name, features(layer)[1]) for name, layer in layers.items()]
        self.add_product(PRODUCT, source, list(layers.values()), outs)
        return outs

    def add_product(self, what: int, source: int, layers: list[Any], outs: list[int] | list[None]) -> None:
        """PRODUCT or HEAD of layers that are stored alike."""
        kind, inputs = stored_as(layers[0]), features(layers[0])[0]
        c_layers = (CLayer * 3)()
        for i, (layer, out) in enumerate(zip(layers, outs, strict=True)):
            addresses, outputs, *rest = self.tensors_of(layer, kind)
            c_layers[i] = CLayer(*addresses, out, outputs, *rest)
        heads = CHeads(1, inputs, inputs, 0)
        self.add(what, which=WEIGHTS[kind], input=source, layers=c_layers, count=len(layers), heads=heads)
        self.max_inputs = max(self.max_inputs, inputs)
        self.is_exact &= kind != "int8"

    def reordered(self, source: int, order: Tensor) -> int:
        """The address of the same inputs in the order of a layer's groups."""
        if not order.is_cpu or not torch.equal(order.long().sort().values, torch.arange(len(order))):
            raise NotPlanned("the order of its inputs is none")
        self.keep.append(order)
        out, heads = self.buffer("reordered", len(order)), CHeads(1, len(order), len(order), 0)
        self.add(REORDER, input=source, out=out, weight=order.data_ptr(), heads=heads)
        return out

    def tensors_of(self, layer: Any, kind: str) -> tuple[Any, ...]:
        """Addresses of weight, scale, zero and bias; outputs; numbers from one row to the next; groups."""
        outputs = features(layer)[1]
        if isinstance(layer, Quantized):
            stored = list(layer.stored(self.dtype)[:3])
            if not layer.qweight.is_cpu:
                raise NotPlanned("its weights are not on the CPU")
            self.keep += [t for t in stored if t is not None]
            self.weight_bytes += layer.qweight.nbytes
            where = [calls.pointer(t) for t in stored]
            groups = calls.groups(*stored)
            return (*where, self.address(layer.bias)), outputs, layer.qweight.stride(0), *groups
        weight = layer.weight if type(layer).__name__ == "Conv1D" or kind == "same" else layer.weight.t()
        self.weight_bytes += weight.nbytes
        return (self.address(weight), None, None, self.address(layer.bias)), outputs, weight.stride(0)

    # ---- The model ----

    def add_model(self, model: Any, head: Any) -> None:
        """From the ids to the final norm, whose result is the step's unless there is a head."""
        family, x = self.family, self.buffer("x", self.hidden_size)
        self.add_embedding(TOKENS, self.embedding, None, x)
        if family.positions:
            self.add_embedding(POSITIONS, model.get_submodule(family.positions).weight, x, x)
            self.add_embedding(TYPES, self.embedding, x, x)  # skipped where a step has no token types
        for i, layer in enumerate(self.layers):
            self.add_layer(i, layer, x)
        normed = self.buffer("final", self.hidden_size) if head is not None else None
        if family.final_norm:
            self.norm(model.get_submodule(family.final_norm), x, normed)
        else:
            self.add_sum(x, None, normed)
        if head is not None:
            self.add_head(normed, head)

    def add_embedding(self, which: int, weight: Tensor, source: int | None, out: int) -> None:
        """out = source + rows of `weight`."""
        if weight.shape[1] != self.hidden_size:
            raise NotPlanned("an embedding has another width")
        heads = CHeads(1, self.hidden_size, self.hidden_size, 0)
        fields = {"weight": self.address(weight), "rows": len(weight), "heads": heads}
        self.add(EMBED, which=which, input=source, out=out, **fields)

    def add_sum(self, a: int, b: int | None, out: int | None) -> None:
        """out = a + b, or a copy of a."""
        heads = CHeads(1, self.hidden_size, self.hidden_size, 0)
        zeros = b if b is not None else self.buffer("zeros", self.hidden_size)
        self.add(ADD, input=a, other=zeros, out=out, heads=heads)

    def add_head(self, x: Any, head: Any) -> None:
        """Logits of the positions that are asked for."""
        kept = self.buffer("kept", self.hidden_size)
        heads = CHeads(1, self.hidden_size, self.hidden_size, 0)
        self.add(KEEP, input=x, out=kept, heads=heads)
        if (order := head._buffers.get("order")) is not None:
            kept = self.reordered(kept, order)
        self.add_product(HEAD, kept, [head], [None])

    def add_layer(self, i: int, layer: Any, x: int) -> None:
        family, C = self.family, self.hidden_size
        norms = [layer.get_submodule(name) for name in family.norms]
        attn, normed = layer.get_submodule(family.attention), self.buffer("normed", C)
        if family.order == "parallel":
            self.norm(norms[0], x, normed)
            y, z = self.add_attention(i, attn, normed), self.add_mlp(layer, normed)
            self.add_sum(y, z, y)
            self.add_sum(y, x, x)
        elif family.order == "pre-norm":
            self.norm(norms[0], x, normed)
            self.add_sum(x, self.add_attention(i, attn, normed), x)
            self.norm(norms[1], x, normed)
            self.add_sum(x, self.add_mlp(layer, normed), x)
        else:
            self.add_sum(x, self.add_attention(i, attn, x), normed)
            self.norm(norms[0], normed, x)
            self.add_sum(x, self.add_mlp(layer, x), normed)
            self.norm(norms[1], normed, x)

    def add_attention(self, i: int, attn: Any, x: int) -> int:
        """The address of what a layer's attention adds."""
        family, D = self.family, attn.head_dim
        own = vars(attn).get("attend")
        if not isinstance(own, partial) or own.func is not attention:
            raise NotPlanned("somebody else's attention is there")
        out = attn.get_submodule(family.out)
        H = features(out)[0] // D
        projections = [attn.get_submodule(name) for name in family.qkv]
        K = H if family.interleaved else (sum(features(p)[1] for p in projections) // D - H) // 2
        self.H, self.K, self.D = H, K, D
        (q, k, v), q_heads, kv_heads = self.add_qkv(x, projections)
        for name, at, heads in (("q_layernorm", q, q_heads), ("k_layernorm", k, kv_heads)):
            if type(getattr(attn, name, nn.Identity())) is not nn.Identity:
                self.norm(getattr(attn, name), at, at, heads)
        if not family.positions:
            if not isinstance(vars(attn).get("rotate"), partial) or vars(attn)["rotate"].func is not rotate:
                raise NotPlanned("somebody else's rotary embedding is there")
            self.add(ROTATE, input=q, other=k, heads=q_heads, others=kv_heads)
        if hasattr(type(attn), "qkv") and getattr(vars(attn).get("qkv"), "__func__", None) is not qkv:
            raise NotPlanned("somebody else's q, k and v are there")
        y, scale = self.buffer("heads", H * D), D**-0.5 if family.scaled else 1.0
        fields = {"input": q, "other": k, "third": v, "out": y, "heads": q_heads, "others": kv_heads}
        self.add(ATTEND, layer=i, window=self.window(i) or 0, number=scale, **fields)
        return self.product(y, attended=out)[0]

    def add_qkv(self, x: int, layers: list[Any]) -> tuple[list[int], CHeads, CHeads]:
        """The addresses of q, k and v, and how their heads lie there."""
        H, K, D = self.H, self.K, self.D
        if len(layers) == 3:
            addresses = self.product(x, q=layers[0], k=layers[1], v=layers[2])
            return addresses, CHeads(H, D, H * D, D), CHeads(K, D, K * D, D)
        (q,) = self.product(x, qkv=layers[0])
        row, size = (H + 2 * K) * D, self.dtype.itemsize
        if self.family.interleaved:  # q, k and v of a head, then of the next
            heads = CHeads(H, D, row, 3 * D)
            return [q, q + D * size, q + 2 * D * size], heads, heads
        k = q + H * D * size
        return [q, k, k + K * D * size], CHeads(H, D, row, D), CHeads(K, D, row, D)

    def window(self, i: int) -> int | None:
        """Positions that layer i sees; None for all."""
        kinds = getattr(self.guards.config, "attention_layers", ["local"] * len(self.layers))
        return self.window_size if self.family.has_windows and kinds[i] == "local" else None

    def add_mlp(self, layer: Any, x: int) -> int:
        """The address of what a layer's MLP adds."""
        up, down = (layer.get_submodule(name) for name in (self.family.mlp_up, self.family.mlp_down))
        which = FUNCTIONS.index(function_of(layer.mlp.act))
        inner = features(down)[0]
        (y,) = self.product(x, up=up)
        z = self.buffer("activated", inner)
        heads = CHeads(1, inner, inner, 0)
        self.add(GATE if self.family.gated else ACTIVATE, which=which, input=y, out=z, heads=heads)
        return self.product(z, down=down)[0]

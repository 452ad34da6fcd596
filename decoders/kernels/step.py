"""A decoding step by the plan of its model, where there is one and the call is such a step.

A plan is verified first: its first step must give what the modules give. Then it serves calls with up to 16
new tokens and a cache, under `no_grad`, while no hook looks into the model. Any other call, and any other
cache, is left to the modules, with their errors.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
import torch.nn as nn
from torch import Tensor

from . import calls
from .families import PHI3
from .int8_cache import SCALE, Int8Cache
from .plan import POSITIONS, TOKENS, TYPES, Guards, NotPlanned, Plan

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a plan's first step
INT8_TOLERANCE = 0.1  # a difference in the last bit may round an input to another whole number
INT8_CACHE_TOLERANCE = 1e-2  # as with weights of 8 bits, but what turns is one number of many
CACHES = ("KVCache", "LongropeCache", "Int8KVCache", "Int8LongropeCache")
NO_STEP = ("labels", "head_mask", "output_attentions", "output_hidden_states")
PLAN_STATE = "plan_state"  # attribute of a prepared model: its PlanState, or None before the first step
THREAD = threading.local()  # .by_modules: a plan is being verified


class CCache(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p)]
    _fields_ += [(f"{what}_{step}", ctypes.c_long) for what in ("key", "value") for step in ("b", "h", "s")]


class CStep(ctypes.Structure):
    _fields_ = [
        ("ids", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in ("embeds", "cos", "sin")),
        *((name, ctypes.c_long) for name in ("tables", "R", "M", "T", "past")),
        *((name, ctypes.c_void_p) for name in ("mask", "cache", "y")),
        ("kept", ctypes.c_long),
        ("int8", ctypes.c_long),
    ]


class PlanState:
    """The plan of a model, or why it has none. The model holds it; a copy of the model makes its own."""

    def __init__(self, model: nn.Module, plain: Callable):
        vars(model).setdefault(PLAN_STATE, None)  # before the guards count the attributes
        self.guards, self.reason = Guards(model), ""
        self.plan: Plan | None = None
        self.is_verified, self.lock = False, threading.Lock()
        self.tables: tuple[Tensor, Tensor] | None = None
        self.buffers: Buffers | None = None  # of the last step's cache
        self.names = plain.__globals__  # type: ignore[attr-defined]
        try:
            self.plan = Plan(model, self.guards)
        except (NotPlanned, AttributeError, RuntimeError) as error:  # a module, or memory, that is not there
            self.reason = str(error)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


def planned(model: nn.Module) -> str:
    """Whether the steps of a model are planned, in a sentence."""
    state = vars(model).get(PLAN_STATE)
    if state is None:
        return "not yet needed"
    if state.plan and state.is_verified:
        return "planned"
    return f"module by module: {state.reason or 'not verified'}"


def step(lib: calls.Library, plain: Callable, model: Any, given: dict[str, Any]) -> Any:
    """What `plain(model, **given)` returns; None where the modules have to do it."""
    cache = given.get("past_key_values")
    if not is_step(model, cache, given) or getattr(THREAD, "by_modules", False):
        return None
    state = state_of(model, plain)
    if state is None or not state.lock.acquire(blocking=False):  # of another thread's step
        return None
    try:
        y = run(lib, state, model, cache, given)
        if y is None:
            return None
        if not state.is_verified:
            return verify(state, plain, model, given, y)
        T = (given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]).shape[1]
        return finish(state, cache, y, T)
    finally:
        state.lock.release()


def is_step(model: Any, cache: Any, given: dict[str, Any]) -> bool:
    """Whether a call is one that plans are for, as far as its arguments tell."""
    if type(cache).__name__ not in CACHES or not cache.lengths or not cache.lengths[0]:
        return False
    if any(given.get(name) is not None and given[name] is not False for name in NO_STEP):
        return False
    use_cache = given.get("use_cache")
    return bool(model.config.use_cache if use_cache is None else use_cache)


def state_of(model: nn.Module, plain: Callable) -> PlanState | None:
    """The model's plan as it is now; None where there is none, or somebody looks into the model."""
    owner = getattr(vars(model).get("plain_forward"), "__self__", model)  # of a view: the model that it shows
    state = vars(owner).get(PLAN_STATE)
    if state is None or not (state.guards.are_valid() or state.guards.is_observed()):
        state = vars(owner)[PLAN_STATE] = PlanState(owner, plain)
    return state if state.plan and not state.guards.is_observed() else None


def verify(state: PlanState, plain: Callable, model: Any, given: dict[str, Any], y: Tensor) -> Any:
    """The modules' own output of a plan's first step, which decides whether the plan is used."""
    THREAD.by_modules = True
    try:
        output = plain(model, **given)
    finally:
        THREAD.by_modules = False
    plan: Any = state.plan
    right = (output.logits if hasattr(output, "logits") else output.last_hidden_state).double()
    bound = TOLERANCE[plan.dtype] if plan.is_exact else INT8_TOLERANCE
    if isinstance(given["past_key_values"], Int8Cache):
        bound = max(bound, INT8_CACHE_TOLERANCE)
    if y.shape == right.shape and (y.double() - right).norm() <= bound * right.norm():
        state.is_verified = True
    else:
        state.plan, state.reason = None, "its modules compute something else"
    return output


def finish(state: PlanState, cache: Any, y: Tensor, T: int) -> Any:
    """The step's output, its T keys and values counted."""
    cache.lengths = [n + T for n in cache.lengths]
    plan: Any = state.plan
    if plan.has_head:
        return state.names["CausalLMOutput"](None, y, cache, None, None)
    return state.names["ModelOutput"](y, cache, None, None)


# ---- A call ------------------------------------------------------------------------------------------------


def run(lib: calls.Library, state: PlanState, model: Any, cache: Any, given: dict[str, Any]) -> Tensor | None:
    """The last hidden state (B, T, C), or logits (B, kept, V), the keys and values behind those of the cache;
    None where these arguments are not for a plan."""
    plan: Any = state.plan
    source = tokens(plan, given)
    if source is None:
        return None
    (B, T), past = source.shape[:2], cache.lengths[0]
    mask, positions = visible(given.get("attention_mask"), B, T, past), positions_of(given, B, T, past)
    types, kept = given.get("token_type_ids"), kept_of(plan, given, T)
    if B * T > plan.max_rows or mask is False or positions is None or past + T > plan.max_positions:
        return None
    if kept is None or not are_types(plan, types, B, T):
        return None
    buffers = buffers_of(state, cache, B, T)
    if buffers is None:
        return None
    y = torch.empty(B, kept, plan.outputs, dtype=plan.dtype)
    c_step = CStep(M=B * T, T=T, past=past, y=y.data_ptr(), mask=calls.pointer(mask), cache=buffers.address)
    c_step.kept, c_step.int8 = kept, isinstance(cache, Int8Cache)
    if not source.is_floating_point():
        c_step.ids[TOKENS] = source.data_ptr()
    else:
        c_step.embeds = source.data_ptr()
    c_step.ids[POSITIONS], c_step.ids[TYPES] = positions.data_ptr(), calls.pointer(types)
    if tables := rotary(state, model, cache, positions, past + T):
        cos, sin = tables
        c_step.cos, c_step.sin, c_step.R = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        c_step.tables = len(cos) if cos.dim() == 2 else 0
    is_done = lib.run_plan(ctypes.byref(plan.c_plan), ctypes.byref(c_step), plan.threads())
    return y if is_done else None


def kept_of(plan: Plan, given: dict[str, Any], T: int) -> int | None:
    """Of how many last positions the result is; None where these are chosen otherwise."""
    keep = given.get("logits_to_keep", 0)
    if type(keep) is not int or keep < 0:
        return None
    return T if keep == 0 or not plan.has_head else min(keep, T)


def are_types(plan: Plan, types: Any, B: int, T: int) -> bool:
    """Whether token types are for a plan: none, or (B, T) as C reads them."""
    if types is None:
        return True
    if plan.lookup is not None:
        return False
    is_plain = type(types) is Tensor and types.is_cpu and types.dtype is torch.int64
    return is_plain and tuple(types.shape) == (B, T) and types.is_contiguous()


def tokens(plan: Plan, given: dict[str, Any]) -> Tensor | None:
    """(B, T) ids or (B, T, C) embeddings, as C reads them."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return None
    t = embeds if ids is None else ids
    if type(t) is not Tensor or not t.is_cpu or t.layout is not torch.strided or not t.numel():
        return None
    if ids is None:
        fits = t.dim() == 3 and t.shape[2] == plan.hidden_size and t.dtype is plan.dtype
        return t.contiguous() if fits else None
    if t.dim() != 2 or t.dtype not in (torch.int64, torch.int32):
        return None
    if plan.lookup is not None:
        is_step = t.numel() <= plan.max_rows and bool(((t >= 0) & (t < plan.lookup.num_embeddings)).all())
        return plan.lookup(t) if is_step else None
    return t if t.dtype is torch.int64 and t.is_contiguous() else t.long().contiguous()


def visible(mask: Any, B: int, T: int, past: int) -> Any:
    """What to add to the scores (B, past + T); None for nothing; False for a mask that is not for a plan."""
    if mask is None:
        return None
    if type(mask) is not Tensor or tuple(mask.shape) != (B, past + T) or not mask.is_cpu:
        return False
    hidden = mask == 0
    if not hidden.any():
        return None
    if hidden[:, past:].any():
        return False
    return torch.zeros(B, past + T).masked_fill_(hidden, -torch.inf)


def positions_of(given: dict[str, Any], B: int, T: int, past: int) -> Tensor | None:
    """(B, T) positions."""
    positions = given.get("position_ids")
    if positions is None:
        return counted(past + T)[past : past + T].expand(B, T).contiguous()
    if type(positions) is not Tensor or positions.dtype is not torch.int64 or not positions.is_cpu:
        return None
    if positions.shape[-1:] != (T,) or positions.dim() > 2 or positions.numel() not in (T, B * T):
        return None
    return positions.expand(B, T).contiguous()


COUNTED = [torch.arange(4096)]


def counted(n: int) -> Tensor:
    """0, 1, 2 and so on, n at least."""
    if len(COUNTED[0]) < n:
        COUNTED[0] = torch.arange(2 * n)
    return COUNTED[0]


def rotary(state: PlanState, model: Any, cache: Any, positions: Tensor, length: int) -> Any:
    """cos and sin: (positions, R) of all positions, or (B, 1, T, R) where they depend on the text's length;
    None of a model with embedded positions. By the model file's own functions."""
    plan: Any = state.plan
    if plan.family.positions:
        return None
    config, like = model.config, plan.embedding
    if plan.family is PHI3 and config.rope_varies:
        long = config.rope_of(positions.amax(1) + 1)
        state.names["note_rope"](cache, config.rope_of(positions[:, 0]), long)
        pair = state.names["longrope_cos_sin"](positions, long, config, like)
        return [t.contiguous() for t in pair]
    if state.tables is None or len(state.tables[0]) < length:
        every = torch.arange(min(max(2 * length, 256), plan.max_positions))[None]
        if plan.family is PHI3:
            pair = state.names["longrope_cos_sin"](every, torch.zeros(1, dtype=torch.bool), config, like)
        else:
            pair = state.names["rope_cos_sin"](every, config, like)
        state.tables = pair[0][0, 0].contiguous(), pair[1][0, 0].contiguous()
    return state.tables


# ---- The cache ---------------------------------------------------------------------------------------------


class Buffers:
    """Where the keys and values of a cache lie. It keeps none of them alive."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]):
        self.refs = [ref(t) for pair in pairs for t in pair]
        self.batch = len(pairs[0][0])
        self.room = min(t.shape[2] for pair in pairs for t in pair)
        self.array = (CCache * len(pairs))()
        for i, (k, v) in enumerate(pairs):
            self.array[i] = CCache(k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3])
        self.address = ctypes.addressof(self.array)

    def are_of(self, pairs: list[tuple[Tensor, Tensor]], B: int, length: int) -> bool:
        """Whether these are the same, with room for `length` positions."""
        if self.batch != B or length > self.room or len(self.refs) != 2 * len(pairs):
            return False
        tensors = (t for pair in pairs for t in pair)
        return all(own() is t for own, t in zip(self.refs, tensors, strict=True))


def buffers_of(state: PlanState, cache: Any, B: int, T: int) -> Buffers | None:
    """Those of `cache`, with room for T more; None where they are not this model's."""
    n, pairs = cache.lengths[0], cache.buffers
    if cache.lengths.count(n) != len(pairs) or len(cache.lengths) != len(pairs):
        return None
    if state.buffers is not None and state.buffers.are_of(pairs, B, n + T):
        return state.buffers
    if not cache_fits(state.plan, cache, B, n):
        return None
    for i, (k, v) in enumerate(pairs):
        if n + T > min(k.shape[2], v.shape[2]):
            new = k.new_empty(B, k.shape[1], T, k.shape[3])
            pairs[i] = cache.append(k, new, n), cache.append(v, new, n)
    state.buffers = Buffers(pairs)
    return state.buffers


def cache_fits(plan: Any, cache: Any, B: int, n: int) -> bool:
    """Whether every layer has keys and values of this model's shape and dtype."""
    pairs, dtype, D = cache.buffers, plan.dtype, plan.D
    if isinstance(cache, Int8Cache):
        dtype, D = torch.int8, D + SCALE
    if len(pairs) != len(plan.layers):
        return False
    return all(
        type(t) is Tensor
        and t.dtype is dtype
        and t.is_cpu
        and t.dim() == 4
        and (t.shape[0], t.shape[1], t.shape[3]) == (B, plan.K, D)
        and t.shape[2] >= n
        and t.stride(3) == 1
        and all(step > 0 or size == 1 for step, size in zip(t.stride(), t.shape, strict=True))
        for pair in pairs
        for t in pair
    )

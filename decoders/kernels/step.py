"""A decoding step by the plan of its model, where there is one and the call is such a step.

A plan is believed only after its first step has given what the modules give. Then it serves calls with up to
16 new tokens and a cache, under `no_grad`, while nobody looks into the model. Any other call, and any other
cache, is left to the modules, with their errors.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor

from . import calls
from .families import PHI3
from .plan import NotPlanned, Plan, Watch

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a plan's first step
INT8_TOLERANCE = 0.1  # a difference in the last bit may round an input to another whole number
NO_STEP = ("token_type_ids", "head_mask", "output_attentions", "output_hidden_states")


class CCache(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p)]
    _fields_ += [(f"{what}_{step}", ctypes.c_long) for what in ("key", "value") for step in ("b", "h", "s")]


class CStep(ctypes.Structure):
    _fields_ = [
        ("ids", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in ("embeds", "cos", "sin")),
        *((name, ctypes.c_long) for name in ("tables", "R", "M", "T", "past")),
        *((name, ctypes.c_void_p) for name in ("mask", "cache", "y")),
    ]


class State:
    """The plan of a base model, or why it has none. The model holds it; a copy of the model makes its own."""

    def __init__(self, model: nn.Module, plain: Callable):
        self.watch, self.plan, self.reason = Watch(model), None, ""
        self.is_proved, self.lock = False, threading.Lock()
        self.tables: tuple[Tensor, Tensor] | None = None
        self.caches: WeakKeyDictionary = WeakKeyDictionary()  # -> (its buffers, where they are)
        self.names = plain.__globals__  # type: ignore[attr-defined]
        try:
            self.plan = Plan(model, self.watch)
        except (NotPlanned, AttributeError) as error:  # a module that is not there
            self.reason = str(error)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


def planned(model: nn.Module) -> str:
    """Whether the steps of a base model are planned, in a sentence."""
    state = vars(model).get("step_state")
    if state is None:
        return "not yet needed"
    return (
        "planned" if state.plan and state.is_proved else f"module by module: {state.reason or 'not proved'}"
    )


def step(lib: calls.Library, plain: Callable, model: Any, given: dict[str, Any]) -> Any:
    """What `plain(model, **given)` returns; None where the modules have to do it."""
    cache = given.get("past_key_values")
    if not is_step(model, cache, given):
        return None
    state = state_of(model, plain)
    if state is None or not state.lock.acquire(blocking=False):  # of another thread's step
        return None
    try:
        x = run(lib, state, model, cache, given)
        if x is None:
            return None
        if state.is_proved:
            return finish(state, cache, x)
        return prove(state, plain, model, given, x)
    finally:
        state.lock.release()


def is_step(model: Any, cache: Any, given: dict[str, Any]) -> bool:
    """Whether a call is one that plans are for, as far as its arguments tell."""
    if type(cache).__name__ not in ("KVCache", "LongropeCache") or not cache.lengths or not cache.lengths[0]:
        return False
    if any(given.get(name) is not None and given[name] is not False for name in NO_STEP):
        return False
    use_cache = given.get("use_cache")
    return bool(model.config.use_cache if use_cache is None else use_cache)


def state_of(model: nn.Module, plain: Callable) -> State | None:
    """The model's plan as it is now; None where there is none, or somebody looks into the model."""
    state = vars(model).get("step_state")
    if state is None or not (state.watch.is_as_it_was() or state.watch.is_observed()):
        state = vars(model)["step_state"] = State(model, plain)
    return state if state.plan and not state.watch.is_observed() else None


def prove(state: State, plain: Callable, model: Any, given: dict[str, Any], x: Tensor) -> Any:
    """The modules' own output of a plan's first step, which decides whether the plan is believed."""
    output = plain(model, **given)
    plan: Any = state.plan
    right = output.last_hidden_state.double()
    bound = TOLERANCE[plan.dtype] if plan.is_exact else INT8_TOLERANCE
    if (x.double() - right).norm() <= bound * right.norm():
        state.is_proved = True
    else:
        state.plan, state.reason = None, "its modules compute something else"
    return output


def finish(state: State, cache: Any, x: Tensor) -> Any:
    """The step's output, its keys and values counted."""
    cache.lengths = [n + x.shape[1] for n in cache.lengths]
    return state.names["ModelOutput"](x, cache, None, None)


# ---- A call ------------------------------------------------------------------------------------------------


def run(lib: calls.Library, state: State, model: Any, cache: Any, given: dict[str, Any]) -> Tensor | None:
    """The last hidden state (B, T, C), its keys and values behind those of the cache; None where these
    arguments are not for a plan."""
    plan: Any = state.plan
    source = tokens(plan, given)
    if source is None or not cache_fits(plan, cache, source.shape[0]):
        return None
    (B, T), past = source.shape[:2], cache.lengths[0]
    mask, positions = visible(given.get("attention_mask"), B, T, past), positions_of(given, B, T, past)
    if B * T > plan.max_rows or mask is False or positions is None or past + T > plan.max_positions:
        return None
    tables = rotary(state, model, cache, positions, past + T)
    y = torch.empty(B, T, plan.hidden_size, dtype=plan.dtype)
    c_step = CStep(M=B * T, T=T, past=past, y=y.data_ptr(), mask=calls.pointer(mask))
    if source.dim() == 2:
        c_step.ids[0] = source.data_ptr()
    else:
        c_step.embeds = source.data_ptr()
    c_step.ids[1] = positions.data_ptr()
    if tables:
        cos, sin = tables
        c_step.cos, c_step.sin, c_step.R = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        c_step.tables = len(cos) if cos.dim() == 2 else 0
    buffers = addresses(state, cache, T)
    c_step.cache = ctypes.addressof(buffers)
    is_done = lib.run_plan(ctypes.byref(plan.c_plan), ctypes.byref(c_step), plan.threads())
    return y if is_done else None


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
    return t.long().contiguous() if t.dim() == 2 and t.dtype in (torch.int64, torch.int32) else None


def cache_fits(plan: Any, cache: Any, B: int) -> bool:
    """Whether every layer has keys and values of this model's shape and dtype, all of one length."""
    n, shape = cache.lengths[0], (B, plan.K, plan.D)
    if len(cache.buffers) != len(plan.layers) or any(length != n for length in cache.lengths):
        return False
    return all(
        type(t) is Tensor
        and t.dtype is plan.dtype
        and t.is_cpu
        and t.dim() == 4
        and (t.shape[0], t.shape[1], t.shape[3]) == shape
        and t.shape[2] >= n
        and t.stride(3) == 1
        and all(step > 0 or size == 1 for step, size in zip(t.stride(), t.shape, strict=True))
        for pair in cache.buffers
        for t in pair
    )


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
        return torch.arange(past, past + T).expand(B, T).contiguous()
    if type(positions) is not Tensor or positions.dtype is not torch.int64 or not positions.is_cpu:
        return None
    if positions.shape[-1:] != (T,) or positions.dim() > 2 or positions.numel() not in (T, B * T):
        return None
    return positions.expand(B, T).contiguous()


def rotary(state: State, model: Any, cache: Any, positions: Tensor, length: int) -> Any:
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


def addresses(state: State, cache: Any, T: int) -> ctypes.Array:
    """Where the cache's buffers are, with room for T more."""
    n, (buffers, array) = cache.lengths[0], state.caches.get(cache, ((), None))
    for i, (k, v) in enumerate(cache.buffers):
        if n + T > min(k.shape[2], v.shape[2]):
            new = k.new_empty(k.shape[0], k.shape[1], T, k.shape[3])
            cache.buffers[i] = cache.append(k, new, n), cache.append(v, new, n)
    if len(buffers) == len(cache.buffers) and all(
        a is b for a, b in zip(buffers, cache.buffers, strict=True)
    ):
        return array
    array = (CCache * len(cache.buffers))()
    for i, (k, v) in enumerate(cache.buffers):
        array[i] = CCache(k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3])
    state.caches[cache] = list(cache.buffers), array
    return array

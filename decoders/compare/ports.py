"""What a port computes: read from a file, or by running it and looking inside."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders.formats import check_file

from .formula import stage_order
from .inner_values import CACHE_NAMES, Matching, PortValues, Recorded, Recorder, as_numbers, is_dense, leaves
from .kit import Kit, read, read_npz
from .noise import BEYOND, spread


class PortError(Exception):
    """What a port raised, with its own traceback as text."""


def values_of(kit: Kit, theirs: Any, dtype: str | None, cases: list[str]) -> PortValues:
    """Whatever `compare.run` takes -> values."""
    if isinstance(theirs, str | Path) and Path(theirs).suffix in (".safetensors", ".npz"):
        return from_file(kit, Path(theirs), dtype, cases)
    if isinstance(theirs, Mapping):
        return from_values(kit, "the port", theirs, dtype, cases)
    name = theirs if isinstance(theirs, str) else getattr(theirs, "__name__", type(theirs).__name__)
    got = PortValues(str(name), dtype or "float32")
    with quiet():
        port = opened(kit, theirs, got)
        run_all(kit, port, got, cases)
    return got


# ---- Files -------------------------------------------------------------------------------------------------


def from_file(kit: Kit, file: Path, dtype: str | None, cases: list[str]) -> PortValues:
    check_file(file)
    if file.suffix == ".npz":
        sizes = {f"{case}/{name}": t.numel() for case in cases for name, t in kit.expected[case].items()}
        found = read_npz(file, lambda name: 4 * sizes[name] if name in sizes else None)
    else:
        found = read(file)
    return from_values(kit, file.name, found, dtype, cases)


def from_values(
    kit: Kit, name: str, found: Mapping[str, Any], dtype: str | None, cases: list[str]
) -> PortValues:
    """`CASE/STAGE` -> tensor. What it lacks is not compared; what the kit does not know is told."""
    got, unknown = PortValues(name, dtype or "float32"), []
    for key, value in found.items():
        case, _, stage = key.partition("/")
        if case in kit.expected and stage in kit.expected[case]:
            if case in cases:
                got.values.setdefault(case, {})[stage] = as_numbers(value, key)
        else:
            unknown.append(key)
    if unknown:
        message = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        got.remarks.append(f"not known to the kit, and left out: {message}")
    if dtype is None and got.values:
        got.dtype = looks_like(got.values)
    return got


def looks_like(values: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The precision of the numbers, whatever they are stored in."""
    found = [stages["logits"] for stages in values.values() if "logits" in stages]
    found = found or [value for stages in values.values() for value in stages.values()]
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        if all(
            t.dtype == dtype or torch.equal(torch.nan_to_num(t.to(dtype).to(t.dtype)), torch.nan_to_num(t))
            for t in found
        ):
            return name
    return "float32"


# ---- Functions, modules, Transformers ----------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a port prints goes to standard error: the answer has standard output for itself."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def theirs_to_blame(what: str) -> Iterator[None]:
    try:
        yield
    except (PortError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a port may call sys.exit
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        message = "".join(traceback.format_list(frames)) + "".join(traceback.format_exception_only(error))
        raise PortError(f"{what}:\n{message}") from error


def opened(kit: Kit, theirs: Any, got: PortValues) -> Callable:
    """Something to call with input_ids."""
    if isinstance(theirs, nn.Module):
        return theirs
    if theirs == "transformers":
        return transformers_port(kit, got)
    build = theirs
    if isinstance(theirs, str):
        build = imported(theirs)
    if not callable(build):
        raise ValueError(f"{got.name} is no function (config, weights) that gives a port")
    dtype = getattr(torch, got.dtype)
    weights = {name: w.to(dtype) for name, w in kit.weights.items()}
    with theirs_to_blame(f"{got.name} failed"):
        port = build(dict(kit.config_json), weights)
    if not callable(port):
        raise ValueError(f"{got.name} gave {type(port).__name__}, not something to call with input_ids")
    return port


def imported(name: str) -> Callable:
    """ "package.module:function" or "file.py:function"."""
    where, _, function = name.rpartition(":")
    if not where or not function.isidentifier():
        raise ValueError(
            f"{name} is no file of values (.safetensors, .npz), no folder, not transformers, "
            "and no module:function"
        )
    if where.endswith(".py"):
        check_file(Path(where))
    try:
        with theirs_to_blame(f"{where} cannot be imported"):
            module = executed(Path(where)) if where.endswith(".py") else module_named(where)
    except PortError as error:
        absent = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError) and f"{where}.".startswith(f"{absent}."):
            raise ValueError(f"{where} cannot be imported: there is no module {absent}") from None
        raise
    if not hasattr(module, function):
        raise ValueError(f"{where} has no {function}")
    return getattr(module, function)


def executed(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    is_new = sys.modules.setdefault(file.stem, module) is module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # or the next import of the name would find half of it
        if is_new:
            del sys.modules[file.stem]
        raise
    return module


def module_named(name: str) -> ModuleType:
    sys.path.insert(0, "")
    return importlib.import_module(name)


def transformers_port(kit: Kit, got: PortValues) -> nn.Module:
    """The installed class of this family with the kit's weights."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install transformers") from None
    if not hasattr(transformers, kit.class_name):
        raise ValueError(f"transformers {transformers.__version__} has no {kit.class_name}")
    got.name = f"transformers {transformers.__version__}"
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with theirs_to_blame(f"{got.name} cannot read {kit.folder}"):
        return load_theirs(transformers, kit.class_name, kit.folder, getattr(torch, got.dtype))


def load_theirs(transformers: Any, class_name: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """With eager attention, which tells its weights."""
    major = int(transformers.__version__.split(".")[0])
    options = {"dtype": dtype} if major >= 5 else {"torch_dtype": dtype}
    options["attn_implementation"] = "eager"
    return getattr(transformers, class_name).from_pretrained(str(folder), **options).eval()


def run_all(kit: Kit, port: Callable, got: PortValues, cases: list[str]) -> None:
    """Every case once, the first that runs twice."""
    recorder = Recorder(port) if isinstance(port, nn.Module) and not hasattr(port, "_orig_mod") else None
    if hasattr(port, "_orig_mod"):
        got.remarks.append("compiled: its results are compared, there are no inner values")
    caught: dict[str, list[Recorded]] = {}
    outputs: dict[str, Any] = {}
    for case in cases:
        inputs = {
            name: t.to(getattr(torch, got.dtype)) if t.is_floating_point() else t
            for name, t in kit.inputs[case].items()
        }
        message, output, caught[case] = once(port, inputs, recorder, f"{got.name} failed in case {case}")
        if message:
            got.remarks.append(f"{case} was not run: {message}")
            continue
        if not outputs and is_unsteady(kit, case, output, once(port, inputs, None, got.name)[1], got.dtype):
            got.unsteady = True
            got.remarks.append(
                "Two runs of the same case differ by more than noise: is dropout active "
                "(call .eval()), or memory read before it is written?"
            )
        outputs[case] = output
    if recorder is not None:
        recorder.remove()
    if not outputs:
        raise ValueError(f"{got.name} could run no case: {'; '.join(got.remarks)}")
    for case, output in outputs.items():
        got.values[case] = by_name(kit, case, output)
    if recorder is not None:
        Matching(kit, port, got, {case: caught[case] for case in outputs}).fill()


def once(
    port: Callable, inputs: dict[str, Tensor], recorder: Recorder | None, what: str
) -> tuple[str, Any, list[Recorded]]:
    """(why it was not run, result, inner values)"""
    takes = accepted(port)
    given, reason = arguments(inputs, takes)
    if reason:
        return reason, None, []
    trains = "labels" in given and isinstance(port, nn.Module)
    with theirs_to_blame(what), torch.set_grad_enabled(trains):
        if "past_ids" in inputs:
            cache = {"use_cache": True} if takes("use_cache", by_name=True) else {}
            given[cache_name(takes)] = past = past_of(port(inputs["past_ids"], **cache))
            if past is None:
                return "the port gives no past_key_values, or cache", None, []
        if recorder is not None:
            recorder.caught.clear()
        output = port(inputs["input_ids"], **given)
        loss = getattr(output, "loss", None)
        if trains and isinstance(loss, Tensor) and loss.requires_grad:
            port.zero_grad(set_to_none=True)
            loss.backward()
    if recorder is None:
        return "", output, []
    caught = list(recorder.caught)
    caught += [Recorded(f"result{name}", t.detach().double()) for name, t in leaves(output) if is_dense(t)]
    caught += [
        Recorded(f"grad {name}", p.grad.detach().double())
        for name, p in port.named_parameters()
        if trains and p.grad is not None and is_dense(p.grad)
    ]
    return "", output, caught


def arguments(inputs: dict[str, Tensor], takes: Callable[..., bool]) -> tuple[dict[str, Any], str]:
    """What a port gets besides input_ids, and why it cannot be run, if it lacks an argument."""
    given = {name: t for name, t in inputs.items() if name not in ("input_ids", "past_ids", "labels")}
    mask = given.get("attention_mask")
    if mask is not None and bool((mask != 0).all()) and not takes("attention_mask"):
        del given["attention_mask"]
    if "image_patches" in given and not takes("image_patches_indices"):
        del given["image_patches_indices"]  # ids say the same: they have image_token_id there
    needed = [*given, *([cache_name(takes)] if "past_ids" in inputs else [])]
    if lacking := [name for name in needed if not takes(name)]:
        return given, f"the port takes no {lacking[0]}"
    if "labels" in inputs and takes("labels", by_name=True):
        given["labels"] = inputs["labels"]
    for name in ("output_attentions", "output_hidden_states"):
        if takes(name, by_name=True):
            given[name] = True
    return given, ""


def cache_name(takes: Callable[..., bool]) -> str:
    """What a port calls its cache."""
    return next((name for name in CACHE_NAMES if takes(name, by_name=True)), CACHE_NAMES[0])


def past_of(output: Any) -> Any:
    """The cache in a port's result: by name, or the second of a tuple; None if there is none."""
    for name in CACHE_NAMES:
        past = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if past is not None:
            return past
    return output[1] if isinstance(output, tuple) and len(output) > 1 else None


def accepted(port: Callable) -> Callable[..., bool]:
    function = getattr(port, "_orig_mod", port).forward if isinstance(port, nn.Module) else port
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not isinstance(port, nn.Module)
    return lambda name, by_name=False: name in parameters or (anything and not by_name)


def by_name(kit: Kit, case: str, output: Any) -> dict[str, Tensor]:
    """Stages under our names in a dict, else the logits, and the loss. ValueError if these are no numbers."""
    exact = kit.expected[case]
    if isinstance(output, Mapping):
        own = {name: as_numbers(output[name], f"{case}/{name}") for name in output if name in exact}
        if own:
            return own
    stages = {}
    for name in ("logits", "loss"):
        value = getattr(output, name, None)
        if value is not None and name in exact:
            stages[name] = as_numbers(value, f"{case}/{name}")
    if "logits" not in stages:
        V = exact["logits"].shape[-1]
        output = torch.as_tensor(output) if hasattr(output, "__array__") else output
        wide = [t for _, t in leaves(output) if t.dim() and t.shape[-1] == V]
        if not wide and not stages:
            raise ValueError(f"the port's result in case {case} holds no logits with {V} columns")
        if wide:
            stages["logits"] = as_numbers(wide[0], f"{case}/logits")
    return stages


def is_unsteady(kit: Kit, case: str, one: Any, two: Any, dtype: str) -> bool:
    """Whether two runs differ by more than noise, in the last stage that both give."""
    first, second = (by_name(kit, case, output) for output in (one, two))
    name = max(first.keys() & second.keys(), key=stage_order, default=None)
    if name is None:
        return True
    a, b = (torch.nan_to_num(values[name].double()) for values in (first, second))
    return a.shape != b.shape or spread(a, b)[0] > BEYOND * kit.unit(case, name, dtype)[0]

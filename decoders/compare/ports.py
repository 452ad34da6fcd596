"""What a port computes: read from a file, or by running it and looking inside.

Inner values of a module are caught by hooks and matched to our stages by value, and where none is equal by
the weights that a module holds: the input and output of whatever multiplies by our q matrix are our `attn_in`
and `q`, even if they are wrong. Nobody has to write down which name is which.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from decoders.formats.folder import check_file

from .formula import Formula, place
from .kit import BEYOND, Kit, read, read_npz, spread


class PortError(Exception):
    """What a port raised, with its own traceback as text."""


@dataclass
class Got:
    name: str
    dtype: str
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # case -> stage -> value
    seen: dict[tuple[str, str], str] = field(default_factory=dict)  # where in the port
    remarks: list[str] = field(default_factory=list)
    unsteady: bool = False


def values_of(kit: Kit, theirs: Any, dtype: str | None, cases: list[str]) -> Got:
    """Whatever `compare.run` takes -> values."""
    if isinstance(theirs, str | Path) and Path(theirs).suffix in (".safetensors", ".npz"):
        return from_file(kit, Path(theirs), dtype, cases)
    if isinstance(theirs, Mapping):
        return from_values(kit, "the port", theirs, dtype, cases)
    name = theirs if isinstance(theirs, str) else getattr(theirs, "__name__", type(theirs).__name__)
    got = Got(str(name), dtype or "float32")
    with quiet():
        port = opened(kit, theirs, got)
        run_all(kit, port, got, cases)
    return got


# ---- Files -------------------------------------------------------------------------------------------------


def from_file(kit: Kit, file: Path, dtype: str | None, cases: list[str]) -> Got:
    check_file(file)
    if file.suffix == ".npz":
        sizes = {f"{case}/{name}": t.numel() for case in cases for name, t in kit.expected[case].items()}
        found = read_npz(file, lambda name: 4 * sizes[name] if name in sizes else None)
    else:
        found = read(file)
    return from_values(kit, file.name, found, dtype, cases)


def from_values(kit: Kit, name: str, found: Mapping[str, Any], dtype: str | None, cases: list[str]) -> Got:
    """`CASE/STAGE` -> tensor. What it lacks is not compared; what the kit does not know is told."""
    got, unknown = Got(name, dtype or "float32"), []
    for key, value in found.items():
        case, _, stage = key.partition("/")
        if case in kit.expected and stage in kit.expected[case]:
            if case in cases:
                got.values.setdefault(case, {})[stage] = torch.as_tensor(value)
        else:
            unknown.append(key)
    if unknown:
        told = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        got.remarks.append(f"not known to the kit, and left out: {told}")
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
        told = "".join(traceback.format_list(frames)) + "".join(traceback.format_exception_only(error))
        raise PortError(f"{what}:\n{told}") from error


def opened(kit: Kit, theirs: Any, got: Got) -> Callable:
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
    with theirs_to_blame(f"{where} cannot be imported"):
        if where.endswith(".py"):
            file = check_file(Path(where))
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(file.parent))
            sys.modules.setdefault(file.stem, module)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(where)
    if not hasattr(module, function):
        raise ValueError(f"{where} has no {function}")
    return getattr(module, function)


def transformers_port(kit: Kit, got: Got) -> nn.Module:
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


def run_all(kit: Kit, port: Callable, got: Got, cases: list[str]) -> None:
    """Every case once, the first that runs twice."""
    watch = Watch(port) if isinstance(port, nn.Module) and not hasattr(port, "_orig_mod") else None
    if hasattr(port, "_orig_mod"):
        got.remarks.append("compiled: its results are compared, there are no inner values")
    caught: dict[str, list[Seen]] = {}
    outputs: dict[str, Any] = {}
    for case in cases:
        inputs = {
            name: t.to(getattr(torch, got.dtype)) if t.is_floating_point() else t
            for name, t in kit.inputs[case].items()
        }
        told, output, caught[case] = once(port, inputs, watch, f"{got.name} failed in case {case}")
        if told:
            got.remarks.append(f"{case} was not run: {told}")
            continue
        if not outputs and steadiness(kit, case, output, once(port, inputs, None, got.name)[1], got.dtype):
            got.unsteady = True
            got.remarks.append(
                "Two runs of the same case differ by more than noise: is dropout active "
                "(call .eval()), or memory read before it is written?"
            )
        outputs[case] = output
    if watch is not None:
        watch.remove()
    if not outputs:
        raise ValueError(f"{got.name} could run no case: {'; '.join(got.remarks)}")
    for case, output in outputs.items():
        got.values[case] = by_name(kit, case, output)
    if watch is not None:
        Matching(kit, port, got, {case: caught[case] for case in outputs}).fill()


def once(
    port: Callable, inputs: dict[str, Tensor], watch: "Watch | None", what: str
) -> tuple[str, Any, list]:
    """(why it was not run, result, inner values)"""
    takes = accepted(port)
    given = {name: t for name, t in inputs.items() if name not in ("input_ids", "past_ids", "labels")}
    if all(bool((t != 0).all()) for name, t in given.items() if name == "attention_mask") and not takes(
        "attention_mask"
    ):
        given.pop("attention_mask", None)
    if "image_patches" in given and not takes("image_patches_indices"):
        given.pop("image_patches_indices")  # ids say the same: they have image_token_id there
    lacking = [name for name in given if not takes(name)]
    if "past_ids" in inputs and not takes("past_key_values"):
        lacking.append("past_key_values")
    if lacking:
        return f"the port takes no {lacking[0]}", None, []
    trains = "labels" in inputs and takes("labels", by_name=True) and isinstance(port, nn.Module)
    if "labels" in inputs and takes("labels", by_name=True):
        given["labels"] = inputs["labels"]
    wanted = ("output_attentions", "output_hidden_states")
    asked = {name: True for name in wanted if takes(name, by_name=True)}
    with theirs_to_blame(what), torch.set_grad_enabled(trains):
        if "past_ids" in inputs:
            cache = {"use_cache": True} if takes("use_cache", by_name=True) else {}
            first = port(inputs["past_ids"], **cache)
            past = first.get("past_key_values") if isinstance(first, Mapping) else None
            past = getattr(first, "past_key_values", past)
            if past is None and isinstance(first, tuple) and len(first) > 1:
                past = first[1]
            if past is None:
                return "the port gives no past_key_values", None, []
            given["past_key_values"] = past
        if watch is not None:
            watch.caught.clear()
        output = port(inputs["input_ids"], **given, **asked)
        loss = getattr(output, "loss", None)
        if trains and isinstance(loss, Tensor) and loss.requires_grad:
            port.zero_grad(set_to_none=True)
            loss.backward()
    caught = [] if watch is None else list(watch.caught)
    if watch is not None:
        caught += [Seen(f"result{name}", t.detach().double()) for name, t in leaves(output)]
        caught += [
            Seen(f"grad {name}", p.grad.detach().double())
            for name, p in port.named_parameters()
            if trains and p.grad is not None
        ]
    return "", output, caught


def accepted(port: Callable) -> Callable[..., bool]:
    function = getattr(port, "_orig_mod", port).forward if isinstance(port, nn.Module) else port
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not isinstance(port, nn.Module)
    return lambda name, by_name=False: name in parameters or (anything and not by_name)


def leaves(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in whatever a port returns; caches are looked at by nobody."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield path, output
    elif hasattr(output, "_asdict"):
        yield from leaves(output._asdict(), path)
    elif isinstance(output, Mapping):
        for name, value in output.items():
            if name != "past_key_values":
                yield from leaves(value, f"{path}.{name}")
    elif isinstance(output, tuple | list):
        for i, value in enumerate(output):
            yield from leaves(value, f"{path}[{i}]")


def by_name(kit: Kit, case: str, output: Any) -> dict[str, Tensor]:
    """Stages under our names in a dict, else the logits, and the loss."""
    exact, found = kit.expected[case], {}
    if isinstance(output, Mapping):
        found = {name: as_tensor(value) for name, value in output.items() if name in exact}
        if found:
            return found
    for name in ("logits", "loss"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor) and name in exact:
            found[name] = value.detach()
    if "logits" not in found:
        output = as_tensor(output)
        every = [t for _, t in leaves(output) if t.dim() and t.shape[-1] == exact["logits"].shape[-1]]
        if not every and not found:
            V = exact["logits"].shape[-1]
            raise ValueError(f"the port's result in case {case} holds no logits with {V} columns")
        found |= {"logits": every[0].detach()} if every else {}
    return found


def as_tensor(value: Any) -> Any:
    """NumPy's and JAX's arrays, and numbers, as tensors; other things as they are."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.as_tensor(value) if hasattr(value, "__array__") or isinstance(value, float) else value


def steadiness(kit: Kit, case: str, one: Any, two: Any, dtype: str) -> bool:
    """Whether two runs differ by more than noise."""
    a, b = (by_name(kit, case, output)["logits"].double() for output in (one, two))
    if a.shape != b.shape:
        return True
    return spread(torch.nan_to_num(a), torch.nan_to_num(b))[0] > BEYOND * kit.unit(case, "logits", dtype)[0]


# ---- Inner values ------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    name: str
    value: Tensor


class Watch:
    """Catches what goes into each submodule and what comes out."""

    def __init__(self, module: nn.Module):
        self.caught: list[Seen] = []
        self.handles = [
            part.register_forward_hook(self.hook(name), with_kwargs=True)
            for name, part in module.named_modules()
            if name
        ]

    def hook(self, name: str) -> Callable:
        def hear(part: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            for i, (path, t) in enumerate(leaves((args, dict(kwargs)))):
                if t.numel() <= 10_000_000:
                    self.caught.append(Seen(f"{name} input{path if i else ''}", t.detach().double()))
            for i, (path, t) in enumerate(leaves(output)):
                if t.numel() <= 10_000_000:
                    self.caught.append(Seen(f"{name}{path if i else ''}", t.detach().double()))

        return hear

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def as_matrix(value: Tensor) -> Tensor:
    """A stage, (B, T, C) or (B, H, T, D), as (B T, features)."""
    if value.dim() == 4:
        value = value.transpose(1, 2)
    return value.reshape(value.shape[0] * value.shape[1], -1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 3:
        return matrix.reshape(shape)
    B, H, T, D = shape
    return matrix.reshape(B, T, H, D).transpose(1, 2)


def matrices(value: Tensor, B: int, T: int) -> Iterator[tuple[tuple, Tensor]]:
    """All ways to read a tensor as (B T, features)."""
    sizes = value.shape
    for b in range(value.dim()):
        for t in range(value.dim()):
            if b != t and sizes[b] == B and sizes[t] == T:
                yield ("axes", b, t), value.movedim((b, t), (0, 1)).reshape(B * T, -1)
    for a in range(value.dim()):
        if sizes[a] == B * T:
            yield ("rows", a), value.movedim(a, 0).reshape(B * T, -1)
    if value.dim() > 2 and sizes[0] % B == 0 and sizes[0] > B:
        for t in range(1, value.dim()):
            if sizes[t] == T:
                yield ("folded", t), value.unflatten(0, (B, -1)).movedim(t + 1, 1).reshape(B * T, -1)


def arranged(value: Tensor, wanted: Tensor) -> Tensor | None:
    """A value that was given under our name, in our shape: also transposed, or with heads cut or joined. Of
    several ways one that agrees. None if its numbers are not as many."""
    if value.numel() != wanted.numel():
        return None
    if value.shape == wanted.shape and value.dim() != 2:
        return value
    if wanted.dim() < 3:
        ways = [value.reshape(wanted.shape)] if value.squeeze().shape == wanted.squeeze().shape else []
        if wanted.dim() == 2 and value.squeeze().shape == wanted.t().shape:
            ways.append(value.squeeze().t())
    else:
        B, T = wanted.shape[0], wanted.shape[-2]
        if wanted.dim() == 3:
            squeezed = value.squeeze().shape == wanted.squeeze().shape
            flat = value.shape == (B * T, wanted.shape[2])
            ways = [value.reshape(wanted.shape)] if squeezed or flat else []
        else:
            ways = [from_matrix(m, wanted.shape) for _, m in matrices(value, B, T)]
            if B == 1:
                ways += [from_matrix(m, wanted.shape) for _, m in matrices(value.squeeze(0)[None], B, T)]
    if not ways:
        return None
    far = [spread(wanted, torch.nan_to_num(way))[1] for way in ways]
    best = far.index(min(far))
    return ways[best if far[best] < 0.01 * far[0] else 0]  # wrong values are no reason for another way


# Of a layer: part -> (stage that goes in, stage that comes out)
ENDS = {"q": ("attn_in", "q"), "k": ("attn_in", "k"), "v": ("attn_in", "v"), "o": ("heads", "attn_out"),
        "up": ("mlp_in", "mlp_up"), "down": ("mlp_act", "mlp_out"), "q_norm": ("q", "q_normed"),
        "k_norm": ("k", "k_normed")}  # fmt: skip


class Matching:
    """Which inner value of a port is which stage."""

    def __init__(self, kit: Kit, port: nn.Module, got: Got, caught: dict[str, list[Seen]]):
        self.kit, self.port, self.got, self.caught = kit, port, got, caught

    def fill(self) -> None:
        """Found in one case, looked up under the same name in the others."""
        known: dict[str, tuple] = {}  # stage -> (name, way to read it, columns or None)
        layers = len(Formula(self.kit.config, {}).layers)
        for case in self.caught:
            exact = {
                name: value
                for name, value in self.kit.expected[case].items()
                if value.dim() > 2 and name not in self.got.values[case]
            }
            for name in sorted(exact, key=place):
                if name not in known and (found := self.by_value(case, name)):
                    known[name] = found
        for name, found in self.by_weights().items():
            known.setdefault(name, found)
        for name, found in list(known.items()):  # what one layer calls so, the others do too
            for other, where in elsewhere(name, found[0], layers):
                known.setdefault(other, (where, *found[1:]))
        for case in self.caught:
            for name, (where, way, columns) in known.items():
                value = self.looked_up(case, name, where, way, columns)
                if value is not None and name not in self.got.values[case]:
                    self.got.values[case][name] = value
                    self.got.seen[case, name] = where if columns is None else f"{where}, {told(columns)}"
            self.gradients(case)

    def by_value(self, case: str, name: str) -> tuple | None:
        exact = self.kit.expected[case][name]
        unit = self.kit.unit(case, name, self.got.dtype)
        B, T = exact.shape[0], exact.shape[-2]
        wanted = as_matrix(exact)
        if wanted.isnan().all():
            return None
        rows = ~wanted.isnan().any(1)
        for where, value in self.caught[case]:
            for way, matrix in matrices(value, B, T):
                if matrix.shape[1] < wanted.shape[1] or where.startswith("grad "):
                    continue
                if matrix.shape == wanted.shape and within(spread(wanted, matrix), unit):
                    return where, way, None
                if not rows.any():
                    continue
                columns = matrix[rows].nan_to_num().T
                distance, nearest = torch.cdist(wanted[rows].T, columns, p=float("inf")).min(1)
                if distance.max() <= BEYOND * unit[0] and within(spread(wanted, matrix[:, nearest]), unit):
                    return where, way, nearest
        return None

    def looked_up(
        self, case: str, name: str, where: str, way: tuple, columns: Tensor | None
    ) -> Tensor | None:
        exact = self.kit.expected[case].get(name)
        if exact is None:
            return None
        B, T = exact.shape[0], exact.shape[-2]
        for seen, value in self.caught[case]:
            if seen == where:
                for other, matrix in matrices(value, B, T):
                    if other == way or (way == () and matrix.shape[1] >= as_matrix(exact).shape[1]):
                        if columns is not None and int(columns.max()) >= matrix.shape[1]:
                            continue
                        matrix = matrix if columns is None else matrix[:, columns]
                        if matrix.numel() == exact.numel():
                            return from_matrix(matrix, exact.shape)
        return None

    def by_weights(self) -> dict[str, tuple]:
        """Stages at the ends of the modules that hold our matrices and norms."""
        f, found = Formula(self.kit.config, self.kit.wide), {}
        ours: list[tuple[str, int | None, Tensor]] = []
        for layer in f.layers:
            for part in f.parts:
                if part in ("table", "places", "layers", "norm", "head", "patches"):
                    continue
                if part == "joint":
                    weight = f.matrix("joint", layer)[0]
                    rows = f.cut(torch.arange(len(weight))[None, None].double())
                    ours += [
                        (letter, layer, weight[index.long().flatten()])
                        for letter, index in zip("qkv", rows, strict=True)
                    ]
                elif (weight := f.matrix(part, layer)[0]) is not None:
                    ours.append((part, layer, weight))
        ours += [("norm", None, f.matrix("norm")[0])] if "norm" in f.parts else []
        ours.append(("head", None, f.output_matrix()[0]))
        for name, module in self.port.named_modules():
            held = list(module.parameters(recurse=False))
            if sum(own.dim() > 1 for own in held) > 1 or next(module.children(), None) is not None:
                continue  # it does more than to multiply by one matrix
            for own in held:
                for part, layer, weight in ours:
                    columns = rows_of(weight, own.detach().double())
                    if columns is not None:
                        into, out = self.ends(f, part, layer)
                        whole = len(weight) in own.shape and columns.tolist() == list(range(len(weight)))
                        if out:
                            found.setdefault(out, (name, (), None if whole else columns))
                        if into:
                            found.setdefault(into, (f"{name} input", (), None))
        return found

    def ends(self, f: Formula, part: str, layer: int | None) -> tuple[str, str]:
        if part == "norm":
            return f"layers.{f.layers[-1]}.out", "norm"
        if part == "head":
            return "norm", ""
        before = f"layers.{layer - 1}.out" if layer else "embeddings"
        at = f"layers.{layer}."
        if part == "norm_1":
            return (at + "attn_sum", at + "mlp_in") if f.family == "openai-gpt" else (before, at + "attn_in")
        if part == "norm_2":
            return ("", at + "out") if f.family == "openai-gpt" else (at + "attn_sum", at + "mlp_in")
        into, out = ENDS[part]
        return at + into, at + out

    def gradients(self, case: str) -> None:
        """Of parameters that hold our weights, as they are, transposed, or among others."""
        grads = {seen.name[5:]: seen.value for seen in self.caught[case] if seen.name.startswith("grad ")}
        parameters = dict(self.port.named_parameters())
        for name, weight in self.kit.wide.items():
            if f"grad.{name}" not in self.kit.expected[case]:
                continue
            for theirs, grad in grads.items():
                own = parameters[theirs].detach().double()
                if own.shape == weight.shape and torch.equal(own, weight):
                    value = grad
                elif own.dim() == 2 and own.t().shape == weight.shape and torch.equal(own.t(), weight):
                    value = grad.t()
                elif (
                    own.dim() == 2
                    and weight.dim() == 2
                    and (rows := rows_of(weight, own)) is not None
                    and (own.shape[1] == weight.shape[1])
                ):
                    value = grad[rows]
                else:
                    continue
                self.got.values[case].setdefault(f"grad.{name}", value)
                self.got.seen[case, f"grad.{name}"] = theirs
                break


def elsewhere(stage: str, where: str, layers: int) -> Iterator[tuple[str, str]]:
    """The same stage of the other layers, and what it would be called there."""
    if stage.startswith("layers."):
        _, i, rest = stage.split(".", 2)
        for n in range(layers):
            if n != int(i) and f".{i}." in where:
                yield f"layers.{n}.{rest}", where.replace(f".{i}.", f".{n}.", 1)


def rows_of(weight: Tensor, theirs: Tensor) -> Tensor | None:
    """Where each row of `weight` stands in a matrix of theirs, stored either way; None if one is missing."""
    if weight.dim() != theirs.dim():
        return None
    if weight.dim() == 1:
        return torch.arange(len(weight)) if torch.equal(weight, theirs) else None
    for matrix in (theirs, theirs.t()):
        if matrix.shape[1] == weight.shape[1] and len(matrix) >= len(weight):
            distance, nearest = torch.cdist(weight, matrix, p=float("inf")).min(1)
            if distance.max() == 0:
                return nearest
    return None


def within(difference: tuple[float, float], unit: tuple[float, float]) -> bool:
    return difference[0] <= BEYOND * unit[0] and difference[1] <= BEYOND * unit[1]


def told(columns: Tensor) -> str:
    """Example: columns 48-95, or: columns in another order"""
    first = int(columns[0])
    if columns.tolist() == list(range(first, first + len(columns))):
        return f"columns {first}-{first + len(columns) - 1}"
    return "columns in another order"

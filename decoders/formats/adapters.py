"""LoRA adapters as peft saves them: what is added to the weights of a base model.

    LoRA      W + scale * B A              scale = alpha / r, or alpha / sqrt(r) with use_rslora
    DoRA      m / |W + scale * B A| * (W + scale * B A)      a magnitude m for each row, whose norm that is

An adapter's folder holds `adapter_config.json` and `adapter_model.safetensors`, and names its base. Its keys
are paths of modules: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` (r, in), `lora_B` (out,
r). What else may stand in it: a bias of B, biases of the base (`base_layer.bias`), whole tensors
(modules_to_save) and rows of the token embedding (trainable tokens), which replace those of the base.

Nothing is merged before a tensor is used: each is read and changed in the dtype asked for.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import abridged, check_positive, check_sizes
from .config import family
from .files import read_pickle, read_safetensors
from .folder import ADAPTER, adapter_base, check_file, find, is_adapter, read_json
from .names import LAYOUTS, Layout
from .packed import Packed, unpacked

FILES = {"adapter_model.safetensors": read_safetensors, "adapter_model.bin": read_pickle}
Adapters = str | Path | Sequence[Any]  # a folder, or several, each alone or as (folder, weight)

EMBEDDINGS = {
    "gpt_neo": "transformer.wte.weight",
    "openai-gpt": "transformer.tokens_embed.weight",
    "phi": "model.embed_tokens.weight",
    "phi3": "model.embed_tokens.weight",
    "persimmon": "model.embed_tokens.weight",
    "fuyu": "language_model.model.embed_tokens.weight",
}
TIED = ("gpt_neo", "openai-gpt")  # where the config does not say
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of init_lora_weights
NOT_BUILT = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "target_parameters", "layer_replication",
)  # fmt: skip


# ---- What an adapter does to one tensor --------------------------------------------------------------------


class Whole(NamedTuple):
    """Another tensor in its place."""

    tensor: Tensor

    def shape_of_base(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def apply(self, w: Tensor, start: Tensor, weight: float) -> Tensor:
        return share(w, self.tensor.to(w.dtype), weight)


class Rows(NamedTuple):
    """Other rows of the token embedding."""

    ids: list[int]
    rows: Tensor

    def shape_of_base(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return max(shape[0], *(i + 1 for i in self.ids)), *self.rows.shape[1:]

    def apply(self, w: Tensor, start: Tensor, weight: float) -> Tensor:
        new = w.clone()
        new[self.ids] = self.rows.to(w.dtype)
        return share(w, new, weight)


class Added(NamedTuple):
    """What is added to a bias."""

    tensor: Tensor

    def shape_of_base(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def apply(self, w: Tensor, start: Tensor, weight: float) -> Tensor:
        return (w + self.tensor * weight).to(w.dtype)


class LowRank(NamedTuple):
    """scale * B A, and of DoRA how long each row is then."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float
    magnitude: Tensor | None = None  # (out,)
    turned: bool = False  # the base's matrix is [in, out]
    embedding: bool = False  # what is added is rounded first

    def shape_of_base(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        outputs, inputs = self.B.shape[0], self.A.shape[1]
        return (inputs, outputs) if self.turned else (outputs, inputs)

    def apply(self, w: Tensor, start: Tensor, weight: float) -> Tensor:
        """DoRA's norm is that of the base, `start`, whatever else was merged before."""
        delta = self.B.float() @ self.A.float()  # never added up in half precision
        delta = (delta.t() if self.turned else delta) * self.scale
        if self.magnitude is None:
            delta = delta if weight == 1 else delta * weight
            return (w + (delta.to(w.dtype) if self.embedding else delta)).to(w.dtype)
        inner = start.t() + delta.t() if self.turned else start + delta  # (out, in)
        norm = torch.linalg.norm(inner, dim=1).to(inner.dtype)
        factor = (self.magnitude.flatten() / norm)[:, None]
        new = (factor.t() if self.turned else factor) * (w + delta)
        return share(w, new.to(w.dtype), weight)


Update = Whole | Rows | Added | LowRank


def share(w: Tensor, new: Tensor, weight: float) -> Tensor:
    """`new`, or of a weight other than 1 that share of the way to it."""
    return new if weight == 1 else torch.lerp(w.float(), new.float(), weight).to(w.dtype)


@dataclass
class Adapter:
    file: Path
    weight: float
    updates: list[tuple[str, Update]] = field(default_factory=list)  # name on the hub, what is done to it


# ---- Which -------------------------------------------------------------------------------------------------


def find_adapters(folder: Path, given: Adapters | None) -> tuple[Path, list[tuple[Path, float]]]:
    """(base, adapters with their weights): those that are `given`, and before them the one in the folder, be
    it alone there or beside its base, which is said. An empty list leaves the latter out."""
    several = [given] if isinstance(given, (str, Path)) else list(given or ())
    found = []
    for one in several:
        name, weight = (one, 1.0) if isinstance(one, (str, Path)) else one
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name} must be a number, not {abridged(weight)}")
        found.append((find(name), float(weight)))
    if not folder.is_dir() or not is_adapter(folder):
        return folder, found
    if not (folder / "config.json").exists():
        return adapter_base(folder), [(folder, 1.0), *found]
    if given is not None and not several:
        return folder, []
    warnings.warn(f"{folder / ADAPTER} is applied to the weights beside it", stacklevel=2)
    return folder, [(folder, 1.0), *found]


# ---- Reading -----------------------------------------------------------------------------------------------


def read_adapter(folder: Path, weight: float, layout: Layout, config: dict) -> Adapter:
    """The adapter in `folder`, under the names that `layout` and `config` of the base give to its modules.

    ValueError for what is no LoRA, by its name, and for what is broken; OSError for missing files.
    """
    stated, where = read_json(folder / ADAPTER), folder / ADAPTER
    check_supported(stated, where)
    file = next((folder / name for name in FILES if (folder / name).exists()), folder / next(iter(FILES)))
    adapter = Adapter(check_file(file), weight)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in FILES[file.name](file).items():
        module, part = split_key(key)
        modules.setdefault(module, {})[part] = tensor
    for module, parts in modules.items():
        try:
            adapter.updates += updates_of(module, parts, stated, layout, config)
        except (ValueError, KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{file}: {module}: {str(error).splitlines()[0]}") from None
    if not adapter.updates:
        raise ValueError(f"{file} holds nothing")
    return adapter


def check_supported(stated: dict, where: Path) -> None:
    kind = stated.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: an adapter of peft_type {abridged(kind)} is not supported, only LORA")
    if found := [key for key in NOT_BUILT if stated.get(key)]:
        raise ValueError(f"{where}: {', '.join(found)} is not supported, only plain LoRA and DoRA")
    start = stated.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        message = f"init_lora_weights {abridged(start)} has changed the base's weights"
        raise ValueError(f"{where}: {message}: let peft save it converted to a plain LoRA")
    try:
        check_sizes(stated, ["r"])
        check_positive(stated, "lora_alpha")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(stated.get(key) or {}, dict):
                raise ValueError(f"{key} must be an object of names and numbers, not {abridged(stated[key])}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


PART = re.compile(
    r"^(?P<module>.*?)\.(?P<part>"
    r"lora_[AB](\.\w+)?\.(weight|bias)"
    r"|lora_embedding_[AB](\.\w+)?"
    r"|lora_magnitude_vector(\.\w+)?(\.weight)?"
    r"|(token_adapter\.)?trainable_tokens_delta(\.\w+)?"
    r"|(base_layer\.|modules_to_save\.(\w+\.)?)?(weight|bias))$"
)


def split_key(key: str) -> tuple[str, str]:
    """(module, part): without peft's own prefix, and without an adapter's name if there is one."""
    found = PART.match(key.removeprefix("base_model.model."))
    if not found:
        return key, "unknown"
    part = re.sub(r"^(lora_[AB])\.\w+\.(?=weight|bias)", r"\1.", found["part"])
    part = re.sub(r"^(lora_embedding_[AB]|lora_magnitude_vector)\..*", r"\1", part)
    part = re.sub(r"^(token_adapter\.)?trainable_tokens_delta.*", "trainable_tokens_delta", part)
    return found["module"], re.sub(r"^(base_layer|modules_to_save(\.\w+)?)\.", "", part)


def updates_of(
    module: str, parts: dict[str, Tensor], stated: dict, layout: Layout, config: dict
) -> Iterator[tuple[str, Update]]:
    """(name on the hub, what is done to that tensor): more than one where the hub cuts a fused matrix."""
    if "unknown" in parts:
        raise ValueError("this is no part of a LoRA")
    names = partial(hub_names, layout=layout, config=config)
    for leaf in ("weight", "bias"):
        if leaf in parts:
            for name, tensor in names(f"{module}.{leaf}", parts[leaf]):
                yield name, Whole(tensor)
    if "trainable_tokens_delta" in parts:
        delta = parts["trainable_tokens_delta"]
        [(name, _)] = names(f"{module}.weight", delta)
        yield name, Rows(token_rows(module, stated, len(delta)), delta)
    low_rank = {part for part in parts if part.startswith("lora_")}
    if low_rank & {"lora_embedding_A", "lora_embedding_B"}:
        A, B = (matrix_of(parts, f"lora_embedding_{x}") for x in "AB")
        [(name, _)] = names(f"{module}.weight", B)
        scale, magnitude = scale_of(module, A, stated), parts.get("lora_magnitude_vector")
        yield name, LowRank(A, B, scale, magnitude, turned=True, embedding=True)
    elif low_rank:
        yield from linear_updates(module, parts, stated, names, family(config) == "openai-gpt")


def matrix_of(parts: dict[str, Tensor], part: str) -> Tensor:
    if part not in parts or parts[part].dim() != 2:
        raise ValueError(f"{part} is missing" if part not in parts else f"{part} is no matrix")
    return parts[part]


def linear_updates(
    module: str, parts: dict[str, Tensor], stated: dict, names: Callable, conv1d: bool
) -> Iterator[tuple[str, Update]]:
    A, B = (matrix_of(parts, f"lora_{x}.weight") for x in "AB")
    scale, magnitude = scale_of(module, A, stated), parts.get("lora_magnitude_vector")
    magnitudes = {} if magnitude is None else dict(names(f"{module}.weight", magnitude.flatten()))
    for name, rows in names(f"{module}.weight", B):  # a fused matrix is cut by rows
        turned = conv1d and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        yield name, LowRank(A, rows, scale, magnitudes.get(name), turned)
    if "lora_B.bias" in parts:
        for name, bias in names(f"{module}.bias", parts["lora_B.bias"]):
            yield name, Added(bias.float() * scale)


def hub_names(name: str, tensor: Tensor, layout: Layout, config: dict) -> list[tuple[str, Tensor]]:
    """As `weights.tensors` names it. Phi's remote code of 2023 is known by its names alone."""
    named, fields = [], {"n_embd": config.get("hidden_size"), "n_head": config.get("num_attention_heads")}
    for own, part in layout.modern(name, tensor, {**fields, **config}):
        outside = own.startswith((layout.prefix + ".", *layout.top_level))
        named.append((own if outside else f"{layout.prefix}.{own}", part))
    return named


def token_rows(module: str, stated: dict, count: int) -> list[int]:
    """The ids of the rows: a list, or one for each embedding by its name."""
    ids: Any = stated.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((own for key, own in ids.items() if module.endswith(key)), None)
    whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    if not whole or not ids or len(ids) != count:
        raise ValueError(f"trainable_token_indices does not name {count} tokens")
    return ids


def scale_of(module: str, A: Tensor, stated: dict) -> float:
    """alpha / r, or alpha / sqrt(r). The first pattern that matches the end of the module's name wins."""
    r = matching(module, stated.get("rank_pattern"), stated.get("r"))
    alpha = matching(module, stated.get("alpha_pattern"), stated.get("lora_alpha"))
    if type(r) is not int or r != A.shape[0]:
        raise ValueError(f"{ADAPTER} says rank {abridged(r)}, and its lora_A has {A.shape[0]}")
    if type(alpha) not in (int, float):
        raise ValueError(f"{ADAPTER}: lora_alpha must be a number, not {abridged(alpha)}")
    return alpha / math.sqrt(r) if stated.get("use_rslora") else alpha / r


def matching(module: str, patterns: dict | None, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise ValueError(f"{ADAPTER}: {abridged(pattern)} is no pattern of a name") from None
    return default


# ---- Merging -----------------------------------------------------------------------------------------------


class Merged(NamedTuple):
    tensors: dict[str, Tensor | Packed]
    origin: dict[str, Path]  # of what an adapter changes or adds: its file
    untied: bool  # the output layer is another matrix than the token embedding now


def merge_adapters(
    stored: dict[str, Tensor | Packed], given: Iterable[tuple[Path, float]], config: dict
) -> Merged:
    """The base's tensors, by their names on the hub, with all adapters merged; `config` is the base's.

    ValueError for an adapter that does not fit the base.
    """
    kind = family(config)
    layout, embedding = LAYOUTS[kind], EMBEDDINGS[kind]
    head = "language_model.lm_head.weight" if kind == "fuyu" else "lm_head.weight"
    adapters = [read_adapter(folder, weight, layout, config) for folder, weight in given]
    changes = [(name, (adapter, update)) for adapter in adapters for name, update in adapter.updates]
    replaced = [name for name, (_, update) in changes if isinstance(update, Whole)]
    if twice := [name for name in replaced if replaced.count(name) > 1]:
        raise ValueError(f"{twice[0]} is replaced as a whole by two adapters")
    found, untied = dict(stored), bool({head, embedding} & set(replaced))
    tied = not untied and (head not in stored or config.get("tie_word_embeddings", kind in TIED))
    if tied and {head, embedding} & {name for name, _ in changes}:  # one matrix: what changes it changes both
        found.pop(head, None)
        changes = [(embedding if name == head else name, step) for name, step in changes]
    if untied and embedding in stored:
        found.setdefault(head, stored[embedding])  # as it was stored
    steps: dict[str, list[tuple[Adapter, Update]]] = {}
    for name, step in changes:
        steps.setdefault(name, []).append(step)
    for name, own in steps.items():
        found[name] = changed(name, found.get(name), own)
    origin = {name: own[0][0].file for name, own in steps.items()}
    if head in found and head not in {*stored, *origin}:
        origin[head] = origin[embedding]
    return Merged(found, origin, untied)


def changed(name: str, base: Tensor | Packed | None, steps: list[tuple[Adapter, Update]]) -> Packed:
    """A lazy tensor: the base's with all changes made. ValueError if one does not fit."""
    adapter, update = steps[0]
    if base is None and not isinstance(update, Whole):
        raise ValueError(f"{adapter.file} changes {name}, which the base does not have")
    like = base if base is not None or not isinstance(update, Whole) else update.tensor
    assert like is not None
    for adapter, update in steps:
        check_fits(name, tuple(like.shape), adapter, update)
    kind = f"{base.kind} + LoRA" if isinstance(base, Packed) else "LoRA"
    return Packed(like.shape, like.dtype, kind, like.nbytes, partial(changed_by, like, steps))


def check_fits(name: str, shape: tuple[int, ...], adapter: Adapter, update: Update) -> None:
    """ValueError that names both shapes."""
    own = update.shape_of_base(shape)
    if own != shape:
        raise ValueError(f"{adapter.file} is for another base: {name} is {own} there, and here {shape}")
    if isinstance(update, LowRank):
        if update.A.shape[0] != update.B.shape[1]:
            message = f"lora_A of {tuple(update.A.shape)} does not fit lora_B of {tuple(update.B.shape)}"
            raise ValueError(f"{adapter.file}: {name}: {message}")
        m = update.magnitude
        if m is not None and m.numel() != len(update.B):
            raise ValueError(f"{adapter.file}: {name} has a lora_magnitude_vector of {tuple(m.shape)}")


def changed_by(base: Tensor | Packed, steps: list[tuple[Adapter, Update]], dtype: torch.dtype) -> Tensor:
    """The tensor with all adapters merged, one after the other, in `dtype`."""
    w = start = unpacked(base, dtype)
    for adapter, update in steps:
        w = update.apply(w, start, adapter.weight)
    return w

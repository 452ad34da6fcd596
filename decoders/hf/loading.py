"""Documented models from a folder or the hub, and back."""

import copy
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from decoders import weights
from decoders.formats import find

from .arguments import hub_options, no_effect
from .attention import set_attention

LOADING_WITHOUT_EFFECT = {
    "trust_remote_code": "no code of a checkpoint is ever run",
    **dict.fromkeys(
        (
            "low_cpu_mem_usage",
            "_fast_init",
            "use_safetensors",
            "weights_only",
            "offload_folder",
            "offload_state_dict",
            "offload_buffers",
            "max_memory",
            "variant",
        ),
        "files are mapped into memory, of whatever format they are",
    ),
    **dict.fromkeys(("from_tf", "from_flax"), "the files tell what they are"),
}


def dtype_of(torch_dtype: Any, dtype: Any) -> torch.dtype | None:
    """None for "auto". ValueError if the two names of the argument contradict each other."""
    if torch_dtype is not None and dtype is not None and dtype_of(torch_dtype, None) != dtype_of(None, dtype):
        raise ValueError(f"torch_dtype {torch_dtype} and dtype {dtype} are the same argument: give one")
    asked = dtype if torch_dtype is None else torch_dtype
    if isinstance(asked, str) and asked != "auto":
        asked = getattr(torch, asked.removeprefix("torch."), asked)
    if asked not in (None, "auto") and not isinstance(asked, torch.dtype):
        message = f"not {torch_dtype or dtype!r}"
        raise ValueError(f"torch_dtype must be a torch.dtype, its name or 'auto', {message}")
    return None if asked == "auto" else torch.float32 if asked is None else asked


HEADS = ("score", "classifier", "qa_outputs")  # whose rows are labels


def stored_labels(folder: Path) -> int | None:
    """How many labels the checkpoint's own head has."""
    names = {f"{head}.weight" for head in HEADS}
    stored = weights.tensors(folder).stored
    return next((tensor.shape[0] for name, tensor in stored.items() if name in names), None)


def new_labels(model: nn.Module, n: int) -> list[str]:
    """A head of n labels in place of the checkpoint's, drawn anew. Returns the names of its parameters."""
    name = next(name for name in HEADS if hasattr(model, name))
    old = getattr(model, name)
    more = {"device": old.weight.device, "dtype": old.weight.dtype}
    setattr(model, name, nn.Linear(old.in_features, n, old.bias is not None, **more))
    model.init_weights(getattr(model, name))
    model.config.num_labels = n
    names = [f"{name}.{part}" for part, _ in getattr(model, name).named_parameters()]
    message = f"{', '.join(names)} have {n} labels, the checkpoint's {old.out_features}"
    warnings.warn(f"{message}: drawn anew, train them before use", stacklevel=3)
    return names


def one_device(device_map: Any) -> Any:
    device = next(iter(device_map.values())) if isinstance(device_map, dict) else device_map
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device is None else device


def dispatched(model: nn.Module, device_map: dict) -> nn.Module:
    try:
        from accelerate import dispatch_model
    except ImportError:
        message = "a device_map of several devices needs accelerate: pip install accelerate"
        raise ImportError(message) from None
    return dispatch_model(model, device_map)


def bytes_of(size: int | str) -> int:
    """Example: "200MB" -> 200,000,000."""
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}
    text = str(size).upper().strip()
    unit = next((unit for unit in units if text.endswith(unit)), "")
    try:
        return int(float(text.removesuffix(unit)) * units.get(unit, 1))
    except ValueError:
        raise ValueError(f"max_shard_size must be bytes, or as '5GB', not {size!r}") from None


class DoesNotFit(ValueError, RuntimeError):
    """Of another size: a RuntimeError in Transformers, as everything that does not fit a ValueError here."""


class Matching:
    """What Transformers makes of a checkpoint that does not fit: missing tensors are drawn anew and others
    left, both with a warning; those of another size are an error, or with `redraw` drawn anew too."""

    def __init__(self, redraw: bool):
        self.redraw = redraw
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.mismatched: list[str] = []

    def __call__(self, model: nn.Module, found: Any) -> weights.Match:
        matched = with_own_layers(model, found, weights.match(model, found))
        self.missing, self.unexpected = matched.new, matched.unused
        if not matched.problems:
            return matched
        wanted = dict(model.named_parameters())
        names = {*wanted} | {name for name, _ in model.named_parameters(remove_duplicate=False)}
        prefix = weights.prefix_of(model)
        self.mismatched = [
            name
            for name, tensor in matched.tensors.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ]
        self.missing = [name for name in wanted if name not in matched.tensors]
        own = {f"{model.base_model_prefix}.{name}" for name in wanted}
        self.unexpected = [
            name for name in found if name.removeprefix(prefix) not in names and name not in own
        ]
        if self.mismatched and not self.redraw:
            raise DoesNotFit("; ".join([*matched.problems, "ignore_mismatched_sizes=True draws it anew"]))
        fitting = matched.tensors.keys() - self.mismatched
        if not fitting or not (self.missing or self.unexpected or self.mismatched):
            return matched  # nothing fits, or something else is wrong
        return self.settled(model, matched)

    def settled(self, model: nn.Module, matched: weights.Match) -> weights.Match:
        lost = {*self.missing, *self.mismatched}
        parts = {name.rpartition(".")[0] for name in lost} - {""}
        names = [name for name, _ in model.named_parameters()]
        anew = [name for name in names if name in lost or name.rpartition(".")[0] in parts]
        if self.mismatched:
            warnings.warn(f"{', '.join(self.mismatched)} are of another size: drawn anew", stacklevel=5)
        if left := [name for name in self.unexpected if name not in matched.unused]:
            warnings.warn(f"{', '.join(left[:9])} are in the checkpoint and not in the model", stacklevel=5)
        tensors = {name: tensor for name, tensor in matched.tensors.items() if name not in anew}
        return weights.Match(tensors, anew, [], self.unexpected)


def with_own_layers(model: nn.Module, found: Any, matched: weights.Match) -> weights.Match:
    """What a subclass has besides is stored under its own name, which reads as a bare model's."""
    prefix = model.base_model_prefix
    names = {
        name: f"{prefix}.{name}"
        for name, p in model.named_parameters()
        if name not in matched.tensors and f"{prefix}.{name}" in found
    }
    if not names:
        return matched
    own = {name: found.stored[stored] for name, stored in names.items()}
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    left = {name.removeprefix(weights.prefix_of(model)) for name in found} - wanted - {*names.values()}
    tensors = {**matched.tensors, **own}
    missing = dict(model.named_parameters()).keys() - tensors.keys()
    problems = matched.problems if missing or left else []
    return matched._replace(tensors=tensors, problems=problems)


def is_tied(model: nn.Module, name: str) -> bool:
    return name not in dict(model.named_parameters())


class Loading:
    """`from_pretrained` and `save_pretrained` of a documented model."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        torch_dtype: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model of a folder or hub id, in `eval()`, in float32 unless `torch_dtype` (or `dtype`) says
        otherwise: "auto" is as stored. Other arguments are fields of the config, or the hub's."""
        if torch.empty(0).is_meta:
            raise RuntimeError("from_pretrained reads weights: leave torch.device('meta') for it")
        hub, kwargs = hub_options(kwargs)
        for name in sorted(LOADING_WITHOUT_EFFECT.keys() & kwargs):
            if kwargs.pop(name):
                no_effect(name, LOADING_WITHOUT_EFFECT[name])
        if kwargs.pop("use_flash_attention_2", False):
            attn_implementation = "flash_attention_2"
        redraw, asked = kwargs.pop("ignore_mismatched_sizes", False), dtype_of(torch_dtype, dtype)
        state_dict = kwargs.pop("state_dict", None)
        if pretrained_model_name_or_path is None and config is not None and state_dict is not None:
            return cls.from_state_dict(config, state_dict, asked)
        if state_dict is not None:
            raise TypeError("from_pretrained takes 'state_dict' in place of a folder: give None and config=")
        folder = find(pretrained_model_name_or_path, **hub)
        config = cls.config_for(folder, config, kwargs)
        config._name_or_path = str(pretrained_model_name_or_path)
        config.attn_implementation = attn_implementation or config.attn_implementation
        return cls.loaded(folder, config, asked, device_map, redraw, output_loading_info)

    @classmethod
    def loaded(
        cls, folder: Path, config: Any, dtype: torch.dtype | None, device_map: Any, redraw: bool, info: bool
    ) -> Any:
        """The model; with `info` also what was missing, not used, or with `redraw` of another size."""
        own = {field.name: getattr(config, field.name) for field in fields(config)}
        if hasattr(config, "text_config"):
            own["text_config"] = asdict(config.text_config)
        labels = stored_labels(folder) if redraw else None
        relabeled = labels is not None and labels != own["num_labels"]
        own |= {"num_labels": labels} if relabeled else {}
        parts = device_map if isinstance(device_map, dict) and len({*device_map.values()}) > 1 else None
        device = "cpu" if parts else one_device(device_map)
        matching = Matching(redraw)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            model = weights.load(cls, folder, dtype=dtype, device=device, matching=matching, **own)
        as_loaded = ("text_config", "tie_word_embeddings")  # an adapter may have untied them
        changes = {key: value for key, value in vars(config).items() if key not in as_loaded}
        vars(model.config).update(changes)
        model.name_or_path, model.config.torch_dtype = config._name_or_path, model.dtype
        changed = new_labels(model, config.num_labels) if relabeled else matching.mismatched
        set_attention(model, config.attn_implementation)
        if device_map is not None:
            model.hf_device_map = {"": device}
        model = dispatched(model, parts) if parts else model
        if not info:
            return model
        return model, {
            "missing_keys": {*matching.missing},
            "unexpected_keys": {*matching.unexpected},
            "mismatched_keys": {*changed},
            "error_msgs": [],
        }

    @classmethod
    def from_state_dict(cls, config: Any, state_dict: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
        """A model of these tensors; others are drawn anew, with a warning."""
        model = cls(copy.deepcopy(config))
        result = model.load_state_dict(state_dict, strict=False)
        missing = [name for name in result.missing_keys if not is_tied(model, name)]
        if missing or result.unexpected_keys:
            names = ", ".join([*missing, *result.unexpected_keys])
            warnings.warn(f"state_dict does not fit {cls.__name__} in {names}", stacklevel=3)
        return model.to(dtype or torch.float32).eval()

    @classmethod
    def config_for(cls, folder: Path, given: Any, changes: dict) -> Any:
        """The folder's config, or a copy of the one that was given, with what else was asked for."""
        if given is None or isinstance(given, str | Path):
            return cls.config_class.from_pretrained(folder if given is None else given, **changes)
        config = copy.deepcopy(given)
        config.update(changes)
        return config

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """See `weights.save`. `max_shard_size` in bytes, or as "200MB"."""
        if push_to_hub:
            raise ValueError("push_to_hub is not offered: save, then `hf upload NAME FOLDER`")
        if not safe_serialization:
            no_effect("safe_serialization=False", "what is written is safetensors")
        model = self
        if state_dict is not None:  # of somebody who has gathered the weights
            with torch.device("meta"):
                model = type(self)(self.config)
            model.load_state_dict(state_dict, strict=False, assign=True)
            weights.tie(model)
            model.config_json, model.generation_config = self.config_json, self.generation_config
        if is_main_process:
            weights.save(model, save_directory, max_shard_bytes=bytes_of(max_shard_size))

    @classmethod
    def _from_config(
        cls,
        config: Any,
        torch_dtype: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A new model, in the dtype that is asked for, else the config's, else float32."""
        if torch_dtype is None and dtype is None:
            dtype = config.torch_dtype
        model = cls(config).to(dtype_of(torch_dtype, dtype) or torch.float32)
        return set_attention(model, attn_implementation or config.attn_implementation)

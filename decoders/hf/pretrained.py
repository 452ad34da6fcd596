"""The manners that the documentation gives every model, over a class of a readable file."""

import inspect
import re
import threading
from collections.abc import Callable
from functools import cache, wraps
from types import MethodType
from typing import Any, ParamSpec, TypeVar

import torch.nn as nn
from torch import Tensor

from decoders import openai_gpt, weights
from decoders.formats import family_type

from .arguments import no_effect, unexpected
from .attention import prune, set_attention
from .caches import cache_class, documented_cache, plain_cache
from .configs import PretrainedConfig
from .inputs import wrong_argument
from .loading import Loading
from .outputs import ModelOutput
from .private import PrivateNames
from .seen_as import SeenAs

__all__ = ["Conv1D", "PreTrainedModel"]


class Conv1D(SeenAs, openai_gpt.Conv1D):
    theirs = ("transformers.pytorch_utils", "Conv1D")


# ---- A documented forward ----------------------------------------------------------------------------------

inside = threading.local()  # a_model: the pass of a documented model, whose parts give plain tuples
P, R = ParamSpec("P"), TypeVar("R")


def documented(forward: Callable[P, R]) -> Callable[P, R]:
    """A documented signature, over `forward` of `plain_class`: the function that is decorated has no body."""
    names = tuple(inspect.signature(forward).parameters)[1:-1]  # without self and kwargs

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.documented_forward(names, args, kwargs)

    run.is_documented = True
    return run


@cache
def argument_names(kind: type) -> tuple[str, ...]:
    """The documented arguments of `forward`, in their order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:-1]


LOSS = re.compile(
    "For(CausalLM|(Sequence|Token)Classification|QuestionAnswering)$"
)  # the end of a class's name
DOCUMENTED: dict[type, type] = {}  # a class of a readable file -> the one with the documented manners

# ---- The model ---------------------------------------------------------------------------------------------


class PreTrainedModel(SeenAs, PrivateNames, Loading, nn.Module):
    """A class of ours with the documented manners. `plain` is the model without them, the same weights."""

    theirs = ("transformers.modeling_utils", "PreTrainedModel")
    plain_class: type
    config_class: type
    output_class: type = ModelOutput
    hidden_fields: tuple[str, ...] = ()  # of the readable file's output, that the documentation does not have
    never_cached = False  # unless somebody asks
    main_input_name, framework, is_parallelizable, warnings_issued = "input_ids", "pt", False, {}
    supports_gradient_checkpointing = True

    def __init__(self, config: Any):
        if not isinstance(config, PretrainedConfig):
            wanted, given = self.config_class.__name__, type(config).__name__
            raise TypeError(f"{type(self).__name__} takes a {wanted}, not {given}")
        super().__init__(config)
        self.name_or_path = config._name_or_path
        for part in [*self.modules()][1:]:
            if type(part) is openai_gpt.Conv1D:
                part.__class__ = Conv1D
            elif type(part) in DOCUMENTED:
                part.__class__ = DOCUMENTED[type(part)]
        for layer, heads in (getattr(config, "pruned_heads", None) or {}).items():
            prune(self, int(layer), heads)
        set_attention(self, config.attn_implementation)
        if getattr(config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "plain_class" in vars(cls):
            DOCUMENTED[cls.plain_class] = cls

    @property
    def takes(self) -> tuple[str, ...]:
        """The documented arguments of `forward`, in their order."""
        return argument_names(self.own_class())

    @classmethod
    def own_class(cls) -> type:
        """The documented class, of a subclass too."""
        return next(kind for kind in cls.__mro__ if "plain_class" in vars(kind))

    @property
    def generation_config(self) -> Any:
        """A `GenerationConfig` of models that generate, None of the others."""
        return vars(self)["generation_config"] if self.can_generate() else None

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        vars(self)["generation_config"] = (
            self.documented_settings(settings) if self.can_generate() else settings
        )

    @property
    def plain(self) -> nn.Module:
        """The model of the readable file: the same parameters, and its own `forward` and `generate`."""
        view = self.plain_class.__new__(self.plain_class)
        vars(view).update(vars(self))
        for name in ("forward", "prepare_inputs_for_generation"):  # somebody's, for the documented output
            vars(view).pop(name, None)
        vars(view)["_modules"] = {
            name: part.plain if isinstance(part, PreTrainedModel) else part
            for name, part in self._modules.items()
        }
        prepared = getattr(self.plain_forward, "__func__", None)
        if prepared is not PreTrainedModel.plain_forward:
            view.forward = MethodType(prepared, view)
        return view

    # On a loaded model `kernels.prepare` replaces this by a faster one of the same result.
    def plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` of the readable file."""
        return self.plain_class.forward(self, *args, **kwargs)

    # ---- A pass ----

    def documented_forward(self, names: tuple[str, ...], args: tuple, kwargs: dict) -> ModelOutput | tuple:
        """What `plain_class.forward` gives, by documented names. TypeError for unknown arguments."""
        if getattr(inside, "a_model", False):  # of which this one is a part
            return self.plain_forward(*args, **kwargs)
        given = self.named(names, args, kwargs)
        return_dict, past = given.pop("return_dict", None), given.pop("past_key_values", None)
        items = given.pop("num_items_in_batch", None)
        inputs = self.with_defaults(given)
        if past is not None:
            inputs["past_key_values"] = plain_cache(past, cache_class(self))
        inside.a_model = True
        try:
            output = self.plain_forward(**inputs)._asdict()
        except (AttributeError, IndexError, RuntimeError, ValueError) as error:
            if wrong := wrong_argument(error, inputs, self):
                raise wrong from error
            raise
        finally:
            inside.a_model = False
        if "past_key_values" in output:
            output["past_key_values"] = documented_cache(past, output["past_key_values"])
        if items is not None and output.get("loss") is not None:
            output["loss"] = self.loss_of_items(output["loss"], inputs["labels"], items)
        shown = {name: value for name, value in output.items() if name not in self.hidden_fields}
        output = self.output_class(**shown)
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def named(self, names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments by name. `cache` is what Transformers 5.24 calls `past_key_values`, and wins."""
        if len(args) > len(names):
            raise TypeError(f"forward takes {len(names)} arguments, not {len(args)}")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if "past_key_values" in names and (newer := given.pop("cache", None)) is not None:
            given["past_key_values"] = newer
        if unknown := given.keys() - {*names, "num_items_in_batch"}:
            unexpected(f"{type(self).__name__}.forward", unknown, names)
        return given

    @property
    def loss_type(self) -> str | None:
        """The loss by Transformers' name. Its Trainer reads here that labels are shifted, and then leaves the
        first of each sequence out of `num_items_in_batch`."""
        found = LOSS.search(self.own_class().__name__)
        return found and found.group()

    def loss_of_items(self, loss: Tensor, labels: Tensor, items: int | Tensor) -> Tensor:
        """Of a mean over the labels that count: their sum, divided by `items`, those of several batches."""
        shifted = labels[..., 1:] if self.can_generate() else labels
        return loss * (shifted != -100).sum() / items

    def with_defaults(self, given: dict) -> dict:
        """Where nothing was said the config's settings count."""
        if given.pop("cache_position", None) is not None:
            no_effect("cache_position", "positions follow from the cache and from position_ids")
        for name in ("output_attentions", "output_hidden_states"):
            if given.get(name) is None:
                given[name] = getattr(self.config, name)
        if given.get("use_cache") is None and self.never_cached:
            given["use_cache"] = False
        return given

    # ---- Parts and numbers ----

    device = property(lambda self: next(self.parameters()).device)
    dtype = property(lambda self: next(p.dtype for p in self.parameters() if p.is_floating_point()))
    base_model_prefix = property(lambda self: weights.LAYOUTS[family_type(self.config.model_type)].prefix)
    vocab_size = property(lambda self: self.config.get_text_config().vocab_size)
    base_model = property(lambda self: getattr(self, self.base_model_prefix, self))
    is_gradient_checkpointing = is_activation_checkpointing = property(
        lambda self: any(getattr(part, "gradient_checkpointing", False) for part in self.modules())
    )

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.embedding_name())

    def embedding_name(self) -> str:
        return next(name for name, part in self.named_modules() if isinstance(part, nn.Embedding))

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.set_submodule(self.embedding_name(), value)
        weights.tie(self)

    def get_output_embeddings(self) -> nn.Module | None:
        return next((part.lm_head for part in self.modules() if hasattr(part, "lm_head")), None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        next(part for part in self.modules() if hasattr(part, "lm_head")).lm_head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Returns the token embedding. New rows are the mean of the old ones."""
        n = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int):
                raise ValueError(f"pad_to_multiple_of must be a whole number, not {pad_to_multiple_of!r}")
            n = -(-n // pad_to_multiple_of) * pad_to_multiple_of
        weights.resize_embeddings(self, n)
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Take heads out of layers; a mask that is 0 for them gives the same numbers, more slowly."""
        for layer, heads in heads_to_prune.items():
            prune(self, layer, heads)
        pruned_before = getattr(self.config, "pruned_heads", None) or {}
        pruned = {int(layer): {*heads} for layer, heads in pruned_before.items()}
        for layer, heads in heads_to_prune.items():
            pruned[layer] = pruned.get(layer, set()) | {*heads}
        self.config.pruned_heads = {layer: sorted(heads) for layer, heads in pruned.items()}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        embeddings = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        left_out = embeddings if exclude_embeddings else ()
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if id(p) not in left_out)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """In bytes."""
        buffers = self.buffers() if return_buffers else ()
        return sum(part.nbytes for part in (*self.parameters(), *buffers))

    def train(self, mode: bool = True) -> "PreTrainedModel":
        return weights.train(self, mode)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """In training keep only what enters a layer, and compute the rest again in the backward pass."""
        self.set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self.set_checkpointing(False)

    def set_checkpointing(self, value: bool) -> None:
        """On the parts that look at it, as others, of activations, may be parts of several models."""
        for part in self.modules():
            if hasattr(type(part), "gradient_checkpointing"):
                part.gradient_checkpointing = value

    def enable_input_require_grads(self) -> None:
        """So that adapters learn where all else is frozen."""
        hook = self.get_input_embeddings().register_forward_hook(require_gradient)
        self._input_gradients = hook

    def disable_input_require_grads(self) -> None:
        self._input_gradients.remove()

    def set_attn_implementation(self, attn_implementation: str) -> None:
        set_attention(self, attn_implementation)

    @classmethod
    def can_generate(cls) -> bool:
        return hasattr(getattr(cls, "plain_class", None), "generate")

    @classmethod
    def is_custom_code(cls) -> bool:
        """True: peft then takes the names of modules as they are, and none of a newer Transformers'."""
        return True

    def post_init(self) -> None:
        """Draw the weights of a model of one's own: one of ours has them when it is made."""
        if "plain_class" not in vars(type(self)):
            self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what belongs to `module` itself, and not to its parts."""
        own = nn.Module()
        own._parameters = {**module._parameters}
        self.init_weights(own)
        if getattr(module, "padding_idx", None) is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def get_decoder(self) -> nn.Module:
        """The model without its head, the language model's of Fuyu."""
        inner = getattr(self, "language_model", self)
        return getattr(inner, inner.base_model_prefix, inner)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tags of a model card, which is not written here."""


def require_gradient(part: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_(True)

"""Names that Transformers keeps to itself and other libraries read all the same, where one costs a line."""

from typing import Any

import torch.nn as nn


class PrivateNames:
    """What a model can do, as accelerate, peft, optimum and test suites ask for it."""

    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = True
    _supports_cache_class = _supports_static_cache = _supports_quantized_cache = True
    _supports_flex_attn = _supports_attention_backend = False
    _can_compile_fullgraph, _is_stateful = True, False
    _keep_in_fp32_modules: tuple[str, ...] = ()  # all are kept in the model's dtype
    _keep_in_fp32_modules_strict: tuple[str, ...] = ()
    _keys_to_ignore_on_load_missing = _keys_to_ignore_on_load_unexpected = None
    _keys_to_ignore_on_save = None
    _skip_keys_device_placement = ("past_key_values", "cache")
    _tp_plan = _pp_plan = None  # `decoders.parallel` has plans of its own
    _hf_peft_config_loaded = False
    input_modalities = "text"

    named_parameters: Any
    get_output_embeddings: Any

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """Of each parameter that is another one too: its name, and the other's."""
        names: dict[int, str] = {}
        tied = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if first != name:
                tied[name] = first
        return tied

    all_tied_weights_keys = _tied_weights_keys

    @property
    def _no_split_modules(self) -> list[str]:
        stacks = (part for part in self.modules() if isinstance(part, nn.ModuleList))  # type: ignore[attr-defined]
        return sorted({type(stack[0]).__name__ for stack in stacks})

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """None of the six has experts."""
        return False

"""The documented models: one class each, with the documented signature over the class of the readable file.

What they compute is in `decoders/phi.py` and its five neighbours; heads are in `heads.py` beside this file.
"""

from typing import Any

from torch import Tensor

from decoders import fuyu, gpt_neo, openai_gpt, persimmon, phi, phi3

from .configs import (
    FuyuConfig,
    FuyuTextConfig,
    GPTNeoConfig,
    OpenAIGPTConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
)
from .generation import GenerationMixin
from .outputs import ModelOutput
from .pretrained import PreTrainedModel, documented

__all__ = [
    "PhiPreTrainedModel",
    "PhiModel",
    "PhiForCausalLM",
    "Phi3PreTrainedModel",
    "Phi3Model",
    "Phi3ForCausalLM",
    "PersimmonPreTrainedModel",
    "PersimmonModel",
    "PersimmonForCausalLM",
    "FuyuPreTrainedModel",
    "FuyuForCausalLM",
    "GPTNeoPreTrainedModel",
    "GPTNeoModel",
    "GPTNeoForCausalLM",
    "OpenAIGPTPreTrainedModel",
    "OpenAIGPTModel",
    "OpenAIGPTLMHeadModel",
]

# ---- Phi ---------------------------------------------------------------------------------------------------


class PhiPreTrainedModel(PreTrainedModel, phi.PreTrainedModel):
    """What the classes of this family share; a head of one's own derives from it."""

    config_class = PhiConfig


class PhiModel(PhiPreTrainedModel, phi.PhiModel):
    plain_class = phi.PhiModel

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C)."""


class PhiForCausalLM(PhiPreTrainedModel, GenerationMixin, phi.PhiForCausalLM):
    plain_class = phi.PhiForCausalLM

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, V) after `PhiModel.forward`; with `labels` (B, T) the loss of the next tokens."""


# ---- Phi3 --------------------------------------------------------------------------------------------------


class Phi3PreTrainedModel(PreTrainedModel, phi3.PreTrainedModel):
    """What the classes of this family share; a head of one's own derives from it."""

    config_class = Phi3Config


class Phi3Model(Phi3PreTrainedModel, phi3.Phi3Model):
    plain_class = phi3.Phi3Model

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C)."""


class Phi3ForCausalLM(Phi3PreTrainedModel, GenerationMixin, phi3.Phi3ForCausalLM):
    plain_class = phi3.Phi3ForCausalLM

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, V) after `Phi3Model.forward`; with `labels` (B, T) the loss of the next tokens."""


# ---- Persimmon ---------------------------------------------------------------------------------------------


class PersimmonPreTrainedModel(PreTrainedModel, persimmon.PreTrainedModel):
    """What the classes of this family share; a head of one's own derives from it."""

    config_class = PersimmonConfig


class PersimmonModel(PersimmonPreTrainedModel, persimmon.PersimmonModel):
    plain_class = persimmon.PersimmonModel

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C)."""


class PersimmonForCausalLM(PersimmonPreTrainedModel, GenerationMixin, persimmon.PersimmonForCausalLM):
    plain_class = persimmon.PersimmonForCausalLM

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, V) after `PersimmonModel.forward`; with `labels` (B, T) the loss of the next
        tokens."""


# ---- Fuyu --------------------------------------------------------------------------------------------------


class FuyuPreTrainedModel(PreTrainedModel, fuyu.PreTrainedModel):
    """What the classes of this family share; a head of one's own derives from it."""

    config_class = FuyuConfig


class FuyuTextPreTrainedModel(PreTrainedModel, fuyu.PreTrainedModel):
    config_class = FuyuTextConfig


class FuyuTextModel(FuyuTextPreTrainedModel, fuyu.PersimmonModel):
    """Fuyu's decoder: a Persimmon."""

    plain_class = fuyu.PersimmonModel

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C)."""


class FuyuTextForCausalLM(FuyuTextPreTrainedModel, GenerationMixin, fuyu.PersimmonForCausalLM):
    """The same with the output layer."""

    plain_class = fuyu.PersimmonForCausalLM

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, V); with `labels` (B, T) the loss of the next tokens."""


class FuyuForCausalLM(FuyuPreTrainedModel, GenerationMixin, fuyu.FuyuForCausalLM):
    plain_class = fuyu.FuyuForCausalLM

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        image_patches: Any = None,
        image_patches_indices: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """`PersimmonForCausalLM.forward`, with patches among the tokens."""


# ---- GPTNeo ------------------------------------------------------------------------------------------------


class GPTNeoPreTrainedModel(PreTrainedModel, gpt_neo.PreTrainedModel):
    """What the classes of this family share; a head of one's own derives from it."""

    config_class = GPTNeoConfig


class GPTNeoModel(GPTNeoPreTrainedModel, gpt_neo.GPTNeoModel):
    plain_class = gpt_neo.GPTNeoModel

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C)."""


class GPTNeoForCausalLM(GPTNeoPreTrainedModel, GenerationMixin, gpt_neo.GPTNeoForCausalLM):
    plain_class = gpt_neo.GPTNeoForCausalLM

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, V) after `GPTNeoModel.forward`; with `labels` (B, T) the loss of the next tokens
        too."""


# ---- OpenAIGPT ---------------------------------------------------------------------------------------------


class OpenAIGPTPreTrainedModel(PreTrainedModel, openai_gpt.PreTrainedModel):
    """What the classes of this family share; a head of one's own derives from it."""

    config_class = OpenAIGPTConfig
    never_cached = True  # the documentation knows no cache


class OpenAIGPTModel(OpenAIGPTPreTrainedModel, openai_gpt.OpenAIGPTModel):
    plain_class = openai_gpt.OpenAIGPTModel

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C)."""


class OpenAIGPTLMHeadModel(OpenAIGPTPreTrainedModel, GenerationMixin, openai_gpt.OpenAIGPTLMHeadModel):
    plain_class = openai_gpt.OpenAIGPTLMHeadModel

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, V) after `OpenAIGPTModel.forward`; with `labels` (B, T) the loss of the next
        tokens."""

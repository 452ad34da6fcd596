"""Documented heads: classification of texts and of tokens, question answering."""

from typing import Any

from torch import Tensor

from decoders import heads

from .models import (
    GPTNeoPreTrainedModel,
    OpenAIGPTPreTrainedModel,
    PersimmonPreTrainedModel,
    Phi3PreTrainedModel,
    PhiPreTrainedModel,
)
from .outputs import ModelOutput, OpenAIGPTDoubleHeadsModelOutput
from .pretrained import documented

__all__ = [
    "PhiForSequenceClassification",
    "PhiForTokenClassification",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "PersimmonForSequenceClassification",
    "PersimmonForTokenClassification",
    "GPTNeoForQuestionAnswering",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTDoubleHeadsModel",
]

# ---- Phi ---------------------------------------------------------------------------------------------------


class PhiForSequenceClassification(PhiPreTrainedModel, heads.PhiForSequenceClassification):
    plain_class = heads.PhiForSequenceClassification

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""


class PhiForTokenClassification(PhiPreTrainedModel, heads.PhiForTokenClassification):
    plain_class = heads.PhiForTokenClassification
    hidden_fields = ("past_key_values",)

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""


# ---- Phi3 --------------------------------------------------------------------------------------------------


class Phi3ForSequenceClassification(Phi3PreTrainedModel, heads.Phi3ForSequenceClassification):
    plain_class = heads.Phi3ForSequenceClassification

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""


class Phi3ForTokenClassification(Phi3PreTrainedModel, heads.Phi3ForTokenClassification):
    plain_class = heads.Phi3ForTokenClassification
    hidden_fields = ("past_key_values",)

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""


# ---- Persimmon ---------------------------------------------------------------------------------------------


class PersimmonForSequenceClassification(PersimmonPreTrainedModel, heads.PersimmonForSequenceClassification):
    plain_class = heads.PersimmonForSequenceClassification

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""


class PersimmonForTokenClassification(PersimmonPreTrainedModel, heads.PersimmonForTokenClassification):
    plain_class = heads.PersimmonForTokenClassification
    hidden_fields = ("past_key_values",)

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""


# ---- GPTNeo ------------------------------------------------------------------------------------------------


class GPTNeoForQuestionAnswering(GPTNeoPreTrainedModel, heads.GPTNeoForQuestionAnswering):
    plain_class = heads.GPTNeoForQuestionAnswering

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T) of where the answer starts and ends. Positions (B,) are clamped to the text; those
        past its end do not count in the loss."""


class GPTNeoForSequenceClassification(GPTNeoPreTrainedModel, heads.GPTNeoForSequenceClassification):
    plain_class = heads.GPTNeoForSequenceClassification

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""


class GPTNeoForTokenClassification(GPTNeoPreTrainedModel, heads.GPTNeoForTokenClassification):
    plain_class = heads.GPTNeoForTokenClassification
    hidden_fields = ("past_key_values",)

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""


# ---- OpenAIGPT ---------------------------------------------------------------------------------------------


class OpenAIGPTForSequenceClassification(OpenAIGPTPreTrainedModel, heads.OpenAIGPTForSequenceClassification):
    plain_class = heads.OpenAIGPTForSequenceClassification

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
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, num_labels) at each row's last token; `labels` (B,), or (B, num_labels) of floats."""


class OpenAIGPTDoubleHeadsModel(OpenAIGPTPreTrainedModel, heads.OpenAIGPTDoubleHeadsModel):
    plain_class = heads.OpenAIGPTDoubleHeadsModel
    output_class = OpenAIGPTDoubleHeadsModelOutput

    @documented
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits of M choices per item; ids, mask, types, positions and `labels` are (B, M, T)."""

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

    def documented_forward(self, names: tuple[str, ...], args: tuple, kwargs: dict) -> ModelOutput | tuple:
        """Of (batch, tokens) each text is its own only choice, which the outputs do not show."""
        given = self.named(names, args, kwargs)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None or ids.dim() != 2) and (embeds is None or embeds.dim() != 3):
            return super().documented_forward(names, (), given)
        of_choices = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        for name in (*of_choices, "labels", "mc_token_ids"):
            if isinstance(given.get(name), Tensor):
                given[name] = given[name].unsqueeze(1)
        return_dict = given.pop("return_dict", None)
        output = super().documented_forward(names, (), {**given, "return_dict": True})
        for name in ("logits", "mc_logits"):
            output[name] = output[name].squeeze(1)
        if output.hidden_states is not None:
            output["hidden_states"] = tuple(state.squeeze(1) for state in output.hidden_states)
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

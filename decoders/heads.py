"""Heads over the base models: sequence and token classification over five of them (Fuyu has none), question
answering over GPT-Neo, double heads over GPT-1.

    model = PhiForSequenceClassification(PhiConfig(num_labels=3))
    model = weights.load(GPTNeoForQuestionAnswering, "path/to/gpt-neo-125m")    # a new head is drawn

There is one pass for each kind of head, over any base model. Below stand the documented classes, which say
over which; their `forward` has the documented arguments in the documented order, by whose names a trainer
picks the columns of a data set. Names in state dicts are the hub's.

Letters: B batch, T tokens, C hidden_size, V vocabulary, M choices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from decoders import gpt_neo, openai_gpt, persimmon, phi, phi3
from decoders.gpt_neo import GPTNeoConfig, GPTNeoModel
from decoders.openai_gpt import AFN, OpenAIGPTConfig, OpenAIGPTModel
from decoders.persimmon import PersimmonConfig, PersimmonModel
from decoders.phi import KVCache, PhiConfig, PhiModel, upcast
from decoders.phi3 import Phi3Config, Phi3Model

# ---- What they share ----


class ClassifierOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, num_labels), or (B, T, num_labels) of a token classifier
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Head(nn.Module):
    """A base model under the name that it has in the hub's files, with a layer on top. The documented classes
    derive from their family's `PreTrainedModel` too."""

    base_class: ClassVar[type]
    base_name: ClassVar[str] = "model"
    config: Any
    init_weights: Callable[..., Any]

    def __init__(self, config: Any):
        super().__init__(config)
        self.add_module(self.base_name, self.base_class(config))

    def base(self, **inputs: Any) -> Any:
        """The base model's `ModelOutput`."""
        return getattr(self, self.base_name)(**inputs)


def width(config: Any) -> int:
    """C, under either of its names."""
    return config.n_embd if hasattr(config, "n_embd") else config.hidden_size


# ---- Sequence classification ----


def pool_last_token(logits: Tensor, input_ids: Tensor | None, pad: int | None) -> Tensor:
    """(B, labels) of logits (B, T, labels): those of each sequence's last token that is not padding.

    As Transformers 4.50 and 5: 4.37 cuts a text that contains the pad id, and no version asks the mask.
    """
    B, T, _ = logits.shape
    if pad is None and B > 1:
        raise ValueError(f"a batch of {B} needs config.pad_token_id to find the end of each sequence")
    if pad is None or input_ids is None:
        return logits[:, -1]
    last = (torch.arange(T, device=logits.device) * (input_ids != pad)).argmax(-1)
    return logits[range(B), last]


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Of a regression, of one label or of several: as `problem_type` says, else as the labels suggest."""
    if problem_type is None:
        kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else kind
    if problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


class SequenceClassification(Head):
    """A label, or several, for a text: a layer without bias on its last token."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.score = nn.Linear(width(config), config.num_labels, bias=False)
        self.init_weights(self.score)

    def classified(self, labels: Tensor | None, input_ids: Tensor | None, **inputs: Any) -> ClassifierOutput:
        """Logits (B, num_labels) at each sequence's last token; `labels` (B,), or (B, num_labels) floats."""
        x, *rest = self.base(input_ids=input_ids, **inputs)
        logits = pool_last_token(self.score(x), input_ids, self.config.pad_token_id)
        loss = None if labels is None else sequence_loss(logits, labels, self.config.problem_type)
        return ClassifierOutput(loss, logits, *rest)


# ---- Token classification ----


class TokenClassification(Head):
    """A label for each token: dropout, and a layer with bias."""

    layer_name: ClassVar[str] = "score"

    def __init__(self, config: Any):
        super().__init__(config)
        rates = (config.classifier_dropout, getattr(config, "hidden_dropout", None), 0.1)
        self.dropout = nn.Dropout(next(rate for rate in rates if rate is not None))
        layer = nn.Linear(width(config), config.num_labels)
        self.add_module(self.layer_name, layer)
        self.init_weights(layer)

    def classified(self, labels: Tensor | None, **inputs: Any) -> ClassifierOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""
        x, *rest = self.base(**inputs)
        logits = getattr(self, self.layer_name)(self.dropout(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(upcast(logits).flatten(0, 1), labels.flatten())
        return ClassifierOutput(loss, logits, *rest)


# ---- Question answering ----


class QuestionAnsweringOutput(NamedTuple):
    loss: Tensor | None
    start_logits: Tensor  # (B, T)
    end_logits: Tensor  # (B, T)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class QuestionAnswering(Head):
    """Where in a text its answer starts and ends."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.qa_outputs = nn.Linear(width(config), 2)
        self.init_weights(self.qa_outputs)

    def answered(self, starts: Tensor | None, ends: Tensor | None, **inputs: Any) -> QuestionAnsweringOutput:
        """Logits (B, T) of where the answer starts and ends. Positions (B,) are clamped to the text; those
        past its end do not count in the loss."""
        x, _, *rest = self.base(use_cache=False, **inputs)
        start, end = self.qa_outputs(x).unbind(-1)  # (B, T) each
        loss = None
        if starts is not None and ends is not None:
            T = start.shape[1]
            first, last = starts.view(-1).clamp(0, T), ends.view(-1).clamp(0, T)
            cross_entropy = partial(F.cross_entropy, ignore_index=T)
            loss = (cross_entropy(start, first) + cross_entropy(end, last)) / 2
        return QuestionAnsweringOutput(loss, start, end, *rest)


# ---- Phi, Phi-3, Persimmon ----


class RotarySequenceClassification(SequenceClassification):
    """With the arguments of the models that have rotary positions."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ClassifierOutput:
        """Logits (B, num_labels) at each sequence's last token; `labels` (B,), or (B, num_labels) floats."""
        return self.classified(
            labels,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )


class RotaryTokenClassification(TokenClassification):
    """With the arguments of the models that have rotary positions."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ClassifierOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""
        return self.classified(
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )


class PhiForSequenceClassification(RotarySequenceClassification, phi.PreTrainedModel):
    config_class, base_class = PhiConfig, PhiModel


class PhiForTokenClassification(RotaryTokenClassification, phi.PreTrainedModel):
    config_class, base_class = PhiConfig, PhiModel  # `score` is `classifier` in 4.37's files


class Phi3ForSequenceClassification(RotarySequenceClassification, phi3.PreTrainedModel):
    config_class, base_class = Phi3Config, Phi3Model


class Phi3ForTokenClassification(RotaryTokenClassification, phi3.PreTrainedModel):
    config_class, base_class = Phi3Config, Phi3Model


class PersimmonForSequenceClassification(RotarySequenceClassification, persimmon.PreTrainedModel):
    config_class, base_class = PersimmonConfig, PersimmonModel


class PersimmonForTokenClassification(RotaryTokenClassification, persimmon.PreTrainedModel):
    config_class, base_class = PersimmonConfig, PersimmonModel


# ---- GPT-Neo ----


class GPTNeoForSequenceClassification(SequenceClassification, gpt_neo.PreTrainedModel):
    config_class, base_class, base_name = GPTNeoConfig, GPTNeoModel, "transformer"

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
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ClassifierOutput:
        """Logits (B, num_labels) at each sequence's last token; `labels` (B,), or (B, num_labels) floats."""
        return self.classified(
            labels,
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )


class GPTNeoForTokenClassification(TokenClassification, gpt_neo.PreTrainedModel):
    config_class, base_class, base_name = GPTNeoConfig, GPTNeoModel, "transformer"
    layer_name = "classifier"

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
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ClassifierOutput:
        """Logits (B, T, num_labels); `labels` (B, T) with -100 where there is none."""
        return self.classified(
            labels,
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )


class GPTNeoForQuestionAnswering(QuestionAnswering, gpt_neo.PreTrainedModel):
    config_class, base_class, base_name = GPTNeoConfig, GPTNeoModel, "transformer"

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
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> QuestionAnsweringOutput:
        """Logits (B, T) of where the answer starts and ends. Positions (B,) are clamped to the text; those
        past its end do not count in the loss."""
        return self.answered(
            start_positions,
            end_positions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )


# ---- OpenAI GPT ----


class OpenAIGPTForSequenceClassification(SequenceClassification, openai_gpt.PreTrainedModel):
    config_class, base_class, base_name = OpenAIGPTConfig, OpenAIGPTModel, "transformer"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> ClassifierOutput:
        """Logits (B, num_labels) at each sequence's last token; `labels` (B,), or (B, num_labels) floats."""
        return self.classified(
            labels,
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )


class DoubleHeadsOutput(NamedTuple):
    loss: Tensor | None
    mc_loss: Tensor | None
    logits: Tensor  # (B, M, T, V)
    mc_logits: Tensor  # (B, M)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # (B, M, T, C) each
    attentions: tuple[Tensor, ...] | None = None  # (B * M, H, T, S) per layer


SUMMARY_ACTIVATIONS: dict[Any, Any] = {**AFN, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
SUMMARY_ACTIVATIONS[None] = nn.Identity()


class OpenAIGPTSummary(nn.Module):
    """One number per choice: pick or pool tokens, dropout, project, activate, dropout."""

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__()
        self.summary_type = config.summary_type
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.summary = nn.Linear(config.n_embd, 1)
        self.activation = SUMMARY_ACTIVATIONS[config.summary_activation]
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, x: Tensor, mc_token_ids: Tensor | None) -> Tensor:
        """(B, M) from (B, M, T, C). `mc_token_ids` (B, M): which token to take; left out, the last."""
        # last, first and mean go over the tokens of each choice. Transformers takes axis 1, the choices: its
        # mc_logits come out (B, T), and the loss compares tokens instead of choices.
        if self.summary_type == "mean":
            x = x.mean(2)
        elif self.summary_type == "first":
            x = x[:, :, 0]
        elif self.summary_type == "last" or mc_token_ids is None:
            x = x[:, :, -1]
        else:
            x = x.gather(2, mc_token_ids[..., None, None].expand(-1, -1, 1, x.shape[-1])).squeeze(2)
        return self.last_dropout(self.activation(self.summary(self.first_dropout(x)))).squeeze(-1)


class OpenAIGPTDoubleHeadsModel(Head, openai_gpt.PreTrainedModel):
    """A language model and a multiple choice head over the same text."""

    config_class, base_class, base_name = OpenAIGPTConfig, OpenAIGPTModel, "transformer"

    def __init__(self, config: OpenAIGPTConfig):
        super().__init__(config)
        if not (config.summary_use_proj and config.summary_proj_to_labels):
            raise ValueError("summary_use_proj and summary_proj_to_labels must be true: one number a choice")
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = OpenAIGPTSummary(config)
        self.init_weights(self.lm_head).init_weights(self.multiple_choice_head).tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_submodule("transformer.tokens_embed").weight  # type: ignore

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
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> DoubleHeadsOutput:
        """Logits of M choices per item; ids, mask, types, positions and `labels` are (B, M, T).

        `mc_token_ids` (B, M) says which token of each choice is read, `mc_labels` (B,) which choice is right.
        The two losses are not added up.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.dim() != (3 if inputs_embeds is None else 4):
            found = "nothing" if given is None else tuple(given.shape)
            raise ValueError(f"input_ids must be (batch, choices, tokens), not {found}")
        B, M, T = given.shape[:3]
        x, cache, states, attentions = self.base(
            input_ids=flat(input_ids),
            attention_mask=flat(attention_mask),
            token_type_ids=flat(token_type_ids),
            position_ids=flat(position_ids),
            head_mask=head_mask,
            inputs_embeds=flat(inputs_embeds),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        x, states = x.view(B, M, T, -1), states and tuple(h.view(B, M, T, -1) for h in states)
        logits, mc_logits = self.lm_head(x), self.multiple_choice_head(x, mc_token_ids)
        loss = mc_loss = None  # Transformers rounds these two to the logits' dtype
        if labels is not None:
            loss = F.cross_entropy(upcast(logits[..., :-1, :]).flatten(0, 2), labels[..., 1:].flatten())
        if mc_labels is not None:
            mc_loss = F.cross_entropy(upcast(mc_logits), mc_labels.view(-1))
        return DoubleHeadsOutput(loss, mc_loss, logits, mc_logits, cache, states, attentions)


def flat(part: Tensor | None) -> Tensor | None:
    """(B * M, ...) of (B, M, ...): choices are sequences of a batch."""
    return None if part is None else part.flatten(0, 1)

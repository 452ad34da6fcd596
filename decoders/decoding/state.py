"""One call of `generate`: what was asked for, the sequences so far, and what is recorded of each step."""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import stopping
from .checks import check_mask, check_prompt, check_together, described, is_batch, new_tokens_limit
from .constraints import Constraint, read_constraints
from .guidance import GuidedSequences
from .logits_processors import Diversity, processors_of
from .sequences import Sequences, rope_varies, text_config_of
from .settings import Arguments, read_settings, stored_settings
from .token_ids import check_ids, check_settings_of_ids, stop_and_pad_ids


class GenerateOutput(NamedTuple):
    sequences: Tensor  # (B * num_return_sequences, T + new)
    scores: tuple[Tensor, ...] | None = None  # a step each: (rows, V) after all processors
    logits: tuple[Tensor, ...] | None = None  # (rows, V) before
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # a step each, a layer each
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
    sequences_scores: Tensor | None = None  # of beams: sums over length ** length_penalty
    beam_indices: Tensor | None = None  # of beams: the row each token comes from, -1 after the end
    stats: dict | None = None  # of assisted decoding; rounds are (drafted ids, how many were accepted)


def warn_of_right_padding(mask: Tensor | None) -> None:
    if mask is not None and mask.shape[1] and not mask[:, -1].all():
        warnings.warn(
            "a prompt is padded on the right, so that what follows continues its padding: "
            "pad on the left (padding_side='left')",
            stacklevel=4,
        )


class Generation:
    """What all strategies share: settings, sequences, processors, criteria, and the record of steps."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        generation_config: Any,
        settings: dict,
        arguments: Arguments,
    ):
        self.model, self.arguments, self.generator = model, arguments, arguments.generator
        self.s, inputs = read_settings(model, generation_config, settings)
        self.vocab_size: int = text_config_of(model).vocab_size
        if input_ids is None and arguments.inputs_embeds is None:
            input_ids = self.bos()
        check_prompt(input_ids, attention_mask, arguments.inputs_embeds)
        prompt = input_ids if arguments.inputs_embeds is None else arguments.inputs_embeds
        assert prompt is not None
        B, T = prompt.shape[:2]
        check_together(self.s, B, arguments)
        self.max_new_tokens = new_tokens_limit(model, self.s, T)
        self.read_token_ids(generation_config, settings)
        if not self.s.use_cache:
            inputs["use_cache"] = False
        if input_ids is None:
            input_ids = prompt.new_zeros(B, 0, dtype=torch.long)
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.long()
        warn_of_right_padding(mask)
        self.sequences = self.new_sequences(input_ids, mask, inputs)
        n = self.sequences.ids.shape[1]
        self.s.min_length = max(0, (self.s.min_length or 0) - (T - n))  # which counts inputs_embeds too
        self.add_processors(n, None if mask is None else mask[:, T - n :])
        self.criteria = self.all_criteria()
        self.wanted = {
            name: True for name in ("output_attentions", "output_hidden_states") if getattr(self.s, name)
        }
        kinds = ("scores", "logits", "attentions", "hidden_states")
        self.record: dict[str, list] = {kind: [] for kind in kinds}
        self.results: dict[str, Any] = {}  # what else the strategy leaves for the output

    # ---- What was asked for ----

    def read_token_ids(self, generation_config: Any, settings: dict) -> None:
        """Constraints, stop ids and padding, and a check of all other ids."""
        self.constraints = self.checked_constraints()
        check_settings_of_ids(self.s, self.constraints, self.vocab_size)
        given = set(settings)
        if generation_config is not None:
            given |= stored_settings(self.model, generation_config).keys()
        self.eos, self.pad = stop_and_pad_ids(self.model, self.s, given, self.vocab_size)

    def bos(self) -> Tensor:
        """(1, 1), for a call without a prompt."""
        bos = self.s.bos_token_id
        bos = self.model.config.bos_token_id if bos is None else bos
        if bos is None:
            raise ValueError("give input_ids: the model has no bos_token_id to start from")
        check_ids("bos_token_id", [bos], self.vocab_size)
        return torch.tensor([[bos]], device=next(self.model.parameters()).device)

    def new_sequences(self, ids: Tensor, mask: Tensor | None, inputs: dict) -> Sequences:
        given, s = self.arguments, self.s
        options = {
            "cache": given.past_key_values,
            "inputs_embeds": given.inputs_embeds,
            "chunk": s.prefill_chunk_size,
            "compiled": bool(s.compiled),
        }
        if not s.guided:
            if given.negative_prompt_ids is not None:
                raise ValueError("negative_prompt_ids needs guidance_scale above 1")
            return Sequences(self.model, ids, mask, inputs, self.max_new_tokens, **options)
        return GuidedSequences(
            self.model,
            ids,
            mask,
            inputs,
            self.max_new_tokens,
            **self.negative_prompt(ids),
            scale=s.guidance_scale or 1.0,
            separate=bool(s.output_attentions or s.output_hidden_states),
            **options,
        )

    def negative_prompt(self, ids: Tensor) -> dict[str, Any]:
        """The one given, else the last token of each prompt, which may have embeddings only."""
        negative, embeds = self.arguments.negative_prompt_ids, self.arguments.inputs_embeds
        if negative is None and not ids.shape[1]:
            assert embeds is not None
            return {"negative": (ids, torch.ones_like(ids)), "negative_embeds": embeds[:, -1:]}
        negative = ids[:, -1:] if negative is None else negative
        if not is_batch(negative, 2):
            message = "negative_prompt_ids must be a tensor (batch, tokens)"
            raise ValueError(f"{message}, not {described(negative)}")
        if len(negative) != len(ids):
            raise ValueError(f"negative_prompt_ids has {len(negative)} rows, input_ids {len(ids)}")
        check_ids("negative_prompt_ids", {int(negative.min()), int(negative.max())}, self.vocab_size)
        mask = self.arguments.negative_prompt_attention_mask
        check_mask("negative_prompt_attention_mask", mask, negative.shape)
        return {"negative": (negative, torch.ones_like(negative) if mask is None else mask.long())}

    def add_processors(self, n: int, mask: Tensor | None) -> None:
        """`n`: ids of the prompt."""
        s, given = self.s, self.arguments
        own = list(given.logits_processor or ())
        self.diversity = Diversity(s.diversity_penalty or 0.0) if s.num_beam_groups > 1 else None
        self.processors = processors_of(
            s,
            self.eos,
            n,
            n + self.max_new_tokens,
            mask,
            own,
            given.prefix_allowed_tokens_fn,
            s.num_return_sequences if s.num_beams == 1 else s.num_beams,
            self.diversity,
        )
        self.has_own_processors = bool(own) or given.prefix_allowed_tokens_fn is not None

    def checked_constraints(self) -> list[Constraint]:
        s, constraints = self.s, read_constraints(self.s)
        if constraints and (s.num_beams == 1 or s.num_beam_groups > 1 or s.do_sample):
            raise ValueError("constraints and force_words_ids need num_beams above 1, no groups, no sampling")
        needed = sum(min(map(len, constraint.phrases)) for constraint in constraints)
        if needed > self.max_new_tokens:
            raise ValueError(f"the constraints need {needed} new tokens, and {self.max_new_tokens} may come")
        return constraints

    def all_criteria(self) -> list[stopping.Criterion]:
        s, criteria = self.s, list(self.arguments.stopping_criteria or ())
        if s.stop_strings:
            criteria.append(stopping.stop_strings_criterion(s.stop_strings, self.arguments.tokenizer))
        if s.max_time is not None:
            criteria.append(stopping.max_time_criterion(s.max_time))
        return criteria

    @property
    def may_drop_finished(self) -> bool:
        """Whether nobody sees what the model says of rows that are finished, nor the cache."""
        s, given = self.s, self.sequences.inputs.keys() - {"use_cache"}
        watched = (
            s.return_dict_in_generate or s.dola_layers or self.has_own_processors or self.criteria or given
        )
        if rope_varies(self.model):  # the longest sequence decides for all, also when it is finished
            return False
        return bool(s.use_cache) and self.sequences.cache is None and not (watched or s.compiled)

    # ---- What every strategy does ----

    def process(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Scores (rows, V) after all processors. ValueError for NaN, and for nothing left to choose from."""
        own = self.has_own_processors
        if not self.s.remove_invalid_values and logits.amax(-1).isnan().any():
            raise ValueError("the model's logits hold NaN: its weights do, or their dtype is too narrow")
        scores = logits.clone() if own else logits  # somebody's processor may write into it
        for process in self.processors:
            scores = process(ids, scores)
            if own and getattr(scores, "shape", None) != logits.shape:
                found = tuple(getattr(scores, "shape", ())) or type(scores).__name__
                raise ValueError(f"a logits processor must give {tuple(logits.shape)} logits, not {found}")
        if own and not (scores.amax(-1) > -math.inf).all():  # NaN too
            raise ValueError("a logits processor left no token to choose: all of a row is -inf, or NaN")
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """(rows,) ids: the best, or sampled."""
        if not self.s.do_sample:
            return scores.argmax(-1)
        return sample(scores.softmax(-1), self.generator)

    def stopped(self, ids: Tensor, scores: Any) -> Tensor:
        """(rows,) booleans of the criteria."""
        return stopping.stopped(self.criteria, ids, scores)

    def note(self, output: Any, logits: Tensor, scores: Tensor) -> None:
        """Keep what is to come back."""
        s = self.s
        if not s.return_dict_in_generate:
            return
        for name, value in (("scores", scores), ("logits", logits)):
            if getattr(s, f"output_{name}"):
                self.record[name].append(value)
        for name in ("attentions", "hidden_states"):
            if getattr(s, f"output_{name}"):
                self.record[name].append(getattr(output, name))

    def output(self) -> Tensor | GenerateOutput:
        sequences = self.results.pop("sequences", None)
        sequences = self.sequences.ids.clone() if sequences is None else sequences
        if not self.s.return_dict_in_generate:
            return sequences
        recorded: dict[str, Any] = {
            name: tuple(steps) if steps else None for name, steps in self.record.items()
        }
        return GenerateOutput(sequences, past_key_values=self.sequences.cache, **recorded, **self.results)


def sample(probs: Tensor, generator: torch.Generator | None, count: int = 1) -> Tensor:
    """(rows,) ids drawn from (rows, V), or (rows, count) without replacement."""
    try:
        drawn = torch.multinomial(probs, count, generator=generator)
    except RuntimeError as error:
        raise ValueError("no token can be drawn: the logits hold NaN, or -inf for every token") from error
    return drawn[:, 0] if count == 1 else drawn


def rows_of(output: Any, rows: Tensor) -> Any:
    """What was recorded of these rows of a pass."""
    chosen = {
        name: tuple(part[rows] for part in getattr(output, name))
        for name in ("attentions", "hidden_states")
        if getattr(output, name) is not None
    }
    return output._replace(**chosen)


def repeated(output: Any, times: int) -> Any:
    """What was recorded of each row, so many times."""
    if times == 1:
        return output
    return rows_of(output, torch.arange(len(output.logits)).repeat_interleave(times))

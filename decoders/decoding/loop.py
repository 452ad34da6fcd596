"""Every documented way to decode, for all models.

    from decoders import decoding
    decoding.generate(model, ids, max_new_tokens=20, num_beams=4)
    for text in decoding.stream(model, ids, tokenizer=tokenizer, do_sample=True): ...

A model has to offer `forward` with a cache, `prepare_inputs` and `special_ids`. Settings have the names and
defaults of Transformers' documentation; those of the folder's generation_config.json count, arguments win.

Where versions of Transformers differ
- Beams are those of 5.x: a beam that stops is kept if it is among the `num_beams` best continuations. Rows
  of a padded batch get what each gets alone.
- DoLa chooses its layer for each row by itself; 4.x averages over the batch, so that rows change each other.
- Guidance with beams moves the negative prompt's cache with the beams; 5.x leaves it behind.
- Constraints restart after a wrong token, which may begin one anew, and only new tokens count; groups that
  have ended stand in nobody's way: 4.50 does neither.
- Padding earns no repetition penalty, as in 5.x.
- `num_assistant_tokens_schedule` is "heuristic": how many tokens are proposed follows from how many held. In
  5.x it is "constant". Neither changes the text.
"""

import difflib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import beams
from . import logits_processors as processors
from .constraints import DisjunctiveConstraint, PhrasalConstraint, constraints_of  # noqa: F401
from .logits_processors import Processor
from .texts import Text, head_of

# ---- Settings ----------------------------------------------------------------------------------------------


@dataclass
class GenerationConfig:
    """Documented names and defaults. None means off."""

    # How long
    max_length: int | None = 20  # ids in all, the prompt counted; as the default 20 new ones
    max_new_tokens: int | None = None  # wins over max_length
    min_length: int | None = 0  # no stop id before so many ids in all
    min_new_tokens: int | None = None  # wins over min_length
    max_time: float | None = None  # seconds after which the text ends
    stop_strings: str | list[str] | None = None  # text after which it ends; needs `tokenizer`
    # Which strategy
    do_sample: bool | None = False  # draw by chance instead of taking the best
    num_beams: int | None = 1  # texts that are followed beside each other
    num_beam_groups: int | None = 1  # groups of beams that keep apart
    diversity_penalty: float | None = 0.0  # taken from what earlier groups choose in the same step
    early_stopping: bool | str | None = False  # True: at num_beams ended texts; "never": none can be better
    length_penalty: float | None = 1.0  # sums of beams are divided by length ** this
    penalty_alpha: float | None = None  # contrastive search with top_k: weight of being unlike the past
    dola_layers: str | list[int] | None = None  # "low", "high" or layers whose prediction is taken away
    force_words_ids: Any = None  # rows of ids that must come, or lists of rows of which one must
    constraints: Any = None  # the same as PhrasalConstraint and DisjunctiveConstraint
    guidance_scale: float | None = None  # above 1: away from the negative prompt
    use_cache: bool | None = True
    prefill_chunk_size: int | None = None  # a prompt is read so many tokens at a time: less memory at once
    compiled: bool | None = False  # steps as one graph of torch.compile: see kernels.compile
    # Filters, which are for sampling
    temperature: float | None = 1.0  # below 1 safer, above bolder
    top_k: int | None = 50  # the k likeliest
    top_p: float | None = 1.0  # the likeliest of total chance p
    min_p: float | None = None  # at least this share of the likeliest one's chance
    typical_p: float | None = 1.0  # those of about the expected surprise, of total chance p
    epsilon_cutoff: float | None = 0.0  # at least this chance
    eta_cutoff: float | None = 0.0  # the same, less where many are as likely
    # Penalties and bans
    repetition_penalty: float | None = 1.0  # above 1: away from tokens seen before
    no_repeat_ngram_size: int | None = 0  # no row of n tokens twice
    bad_words_ids: list[list[int]] | None = None  # never these
    sequence_bias: Any = None  # {(ids): number to add} or [[ids, number]]
    suppress_tokens: list[int] | None = None  # never these
    begin_suppress_tokens: list[int] | None = None  # not as the first new token
    forced_bos_token_id: int | None = None  # the second token of all
    forced_eos_token_id: int | list[int] | None = None  # the last one when max_length is reached
    exponential_decay_length_penalty: Sequence[float] | None = None  # (start, factor): stop ids grow likelier
    remove_invalid_values: bool | None = False  # NaN and infinities become numbers
    renormalize_logits: bool | None = False  # logarithms of chances, after all else
    # Assisted
    prompt_lookup_num_tokens: int | None = None  # propose at most so many from where the text was before
    max_matching_ngram_size: int | None = None  # found by as many last tokens at most; None: 2
    num_assistant_tokens: int | None = 20  # proposed by assistant_model at most
    num_assistant_tokens_schedule: str | None = "heuristic"  # more after success, fewer after failure
    assistant_confidence_threshold: float | None = 0.4  # the assistant ends where it is less sure
    # What comes back
    num_return_sequences: int | None = 1  # texts for each prompt
    return_dict_in_generate: bool | None = False
    output_scores: bool | None = False  # after all processors
    output_logits: bool | None = False  # before
    output_attentions: bool | None = False
    output_hidden_states: bool | None = False
    # Tokens
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | str | None = "checkpoint"  # None never stops


NUMBERS = {  # name -> (type, least, most)
    "max_length": (int, 1, math.inf), "max_new_tokens": (int, 0, math.inf), "min_length": (int, 0, math.inf),
    "min_new_tokens": (int, 0, math.inf), "max_time": (float, 0, math.inf), "num_beams": (int, 1, 1e6),
    "num_beam_groups": (int, 1, 1e6), "diversity_penalty": (float, 0, 1e30), "top_k": (int, 0, math.inf),
    "length_penalty": (float, -1e30, 1e30), "penalty_alpha": (float, 0, 1),
    "temperature": (float, 1e-30, 1e30), "guidance_scale": (float, 1e-30, 1e30),
    "top_p": (float, 1e-30, 1), "min_p": (float, 0, 1),
    "typical_p": (float, 1e-30, 1), "epsilon_cutoff": (float, 0, 1), "eta_cutoff": (float, 0, 1),
    "repetition_penalty": (float, 1e-30, 1e30), "no_repeat_ngram_size": (int, 0, math.inf),
    "prompt_lookup_num_tokens": (int, 1, math.inf), "max_matching_ngram_size": (int, 1, math.inf),
    "num_assistant_tokens": (int, 1, math.inf), "assistant_confidence_threshold": (float, 0, 1),
    "num_return_sequences": (int, 1, 1e6), "prefill_chunk_size": (int, 1, math.inf),
}  # fmt: skip
KNOWN = {field.name for field in fields(GenerationConfig)}


def settings_of(model: nn.Module, config: Any, given: dict) -> tuple[GenerationConfig, dict]:
    """The settings that count, and what of `given` is for `forward`. TypeError for unknown names, ValueError
    for values that cannot be."""
    own = model.generation_config if config is None else config
    own = own if isinstance(own, dict) else getattr(own, "to_dict", lambda: vars(config))()
    stored = {key: value for key, value in own.items() if key in KNOWN and value is not None}
    taken = inspect.signature(model.forward).parameters.keys() - {"input_ids", "labels", "logits_to_keep"}
    for name in sorted(given.keys() - KNOWN - taken):
        near = difflib.get_close_matches(name, KNOWN | taken, 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"generate() got an unexpected keyword argument {name!r}{hint}")
    s = GenerationConfig(**{**stored, **{key: value for key, value in given.items() if key in KNOWN}})
    if s.max_new_tokens is None and "max_length" not in stored.keys() | given.keys():
        s.max_length = None  # 20 new ones
    for name, (kind, least, most) in NUMBERS.items():
        if (value := getattr(s, name)) is None:
            continue
        if not isinstance(value, int | kind) or not least <= value <= most:
            bounds = f"from {least:g} " + (f"to {most:g}" if most < math.inf else "on")
            whole = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} must be {whole} {bounds}, not {value!r}")
    for name in ("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty"):
        if getattr(s, name) is None:
            setattr(s, name, 1)
    return s, {key: value for key, value in given.items() if key not in KNOWN}


def check_together(s: GenerationConfig, B: int, streamer: Any, assistant: Any, tokenizer: Any) -> None:
    """ValueError for settings that contradict each other."""
    assisted = assistant is not None or s.prompt_lookup_num_tokens is not None
    contrastive, N, R = s.penalty_alpha is not None, s.num_beams, s.num_return_sequences
    for wrong, told in (
        (N > 1 and streamer is not None, "beams change their text to the end: a streamer needs num_beams=1"),
        (N % s.num_beam_groups, f"num_beam_groups {s.num_beam_groups} does not divide num_beams {N}"),
        (N > 1 and R > N, f"num_return_sequences {R} is more than num_beams {N}"),
        (N == 1 and R > 1 and not s.do_sample, f"num_return_sequences {R} needs do_sample=True or num_beams"),
        (s.num_beam_groups > 1 and s.do_sample, "num_beam_groups has no do_sample: a penalty parts them"),
        (s.num_beam_groups == 1 and s.diversity_penalty, "diversity_penalty needs num_beam_groups above 1"),
        (
            s.early_stopping not in (True, False, None, "never"),
            "early_stopping must be True, False or 'never'",
        ),
        (
            assisted and (N > 1 or contrastive or s.dola_layers or s.guidance_scale not in (None, 1)),
            "assisted decoding is greedy or plain sampling: no beams, contrastive search, DoLa, guidance",
        ),
        (
            s.num_assistant_tokens_schedule not in (None, "constant", "heuristic", "heuristic_transient"),
            "num_assistant_tokens_schedule must be 'constant' or 'heuristic'",
        ),
        (assisted and B * R > 1, f"assisted decoding follows one text, not {B * R}"),
        (
            assistant is not None and s.prompt_lookup_num_tokens is not None,
            "give assistant_model or prompt_lookup_num_tokens, not both",
        ),
        (
            contrastive and (N > 1 or s.do_sample),
            "penalty_alpha (contrastive search) has no beams and no do_sample",
        ),
        (contrastive and (s.top_k or 0) < 2, "penalty_alpha (contrastive search) needs top_k of 2 or more"),
        (
            contrastive and s.guidance_scale not in (None, 1),
            "penalty_alpha and guidance_scale do not go together",
        ),
        (contrastive and not s.use_cache, "penalty_alpha (contrastive search) needs use_cache"),
        (s.prefill_chunk_size and not s.use_cache, "prefill_chunk_size needs use_cache"),
        (
            s.prefill_chunk_size and (s.output_attentions or s.output_hidden_states or s.dola_layers),
            "prefill_chunk_size keeps nothing of a prompt's layers: no attentions, hidden states, DoLa",
        ),
        (s.stop_strings and tokenizer is None, "stop_strings needs tokenizer=, for the text of the tokens"),
    ):
        if wrong:
            raise ValueError(told)


# ---- generate ----------------------------------------------------------------------------------------------


class GenerateOutput(NamedTuple):
    sequences: Tensor  # (B * num_return_sequences, T + new)
    scores: tuple[Tensor, ...] | None = None  # a step each: (rows, V) after all processors
    logits: tuple[Tensor, ...] | None = None  # (rows, V) before
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # a step each, a layer each
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
    sequences_scores: Tensor | None = None  # of beams: sums over length ** length_penalty
    beam_indices: Tensor | None = None  # of beams: the row each token comes from, -1 after the end
    stats: dict | None = None  # of assisted decoding; rounds are (ids proposed, how many of them held)


def generate(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    generation_config: Any = None,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Callable] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    assistant_model: nn.Module | None = None,
    streamer: Any = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    **settings,
) -> Tensor | GenerateOutput:
    """(B * num_return_sequences, T + new) ids, or with `return_dict_in_generate` a GenerateOutput.

    `input_ids` (B, T), shorter ones padded on the left; None starts from BOS, or from `inputs_embeds`
    (B, T, C). `settings` are fields of GenerationConfig, and other arguments of the model's `forward`. Each
    processor maps (ids, float32 logits) to logits, each criterion (ids, scores) to True or (rows,) booleans.
    `streamer` gets `put(prompts)`, `put(new ids)` a step, `end()`. `past_key_values` holds the beginning of
    the prompts already, and in the end all but the last ids. `tokenizer` is for stop_strings.

    ValueError for what cannot be, TypeError for the unknown. A KeyboardInterrupt carries what there is so far
    as `ids`.
    """
    run = Run(
        model,
        input_ids,
        attention_mask,
        generation_config,
        logits_processor,
        stopping_criteria,
        prefix_allowed_tokens_fn,
        assistant_model,
        streamer,
        negative_prompt_ids,
        negative_prompt_attention_mask,
        tokenizer,
        generator,
        past_key_values,
        inputs_embeds,
        settings,
    )
    put = (lambda ids: None) if streamer is None else (lambda ids: streamer.put(ids.cpu()))
    put(run.text.ids)
    steps = run.steps()
    try:
        for new in steps:
            put(new)
    except KeyboardInterrupt as interrupt:
        interrupt.ids = run.found.get("sequences", run.text.ids).clone()
        raise
    finally:
        steps.close()  # so that the cache is left as it should be
    if streamer is not None:
        streamer.end()
    return run.output()


def stream(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Any = None,
    **options,
) -> Iterator[Any]:
    """What `generate` gives, piece by piece: (rows,) new ids a step, or with `tokenizer` the text of the one
    row as it is complete."""
    own = {"model", "input_ids", "attention_mask", "tokenizer", "settings"}
    given = {name: options.pop(name, None) for name in inspect.signature(Run).parameters.keys() - own}
    run = Run(model, input_ids, attention_mask, tokenizer=tokenizer, settings=options, **given)
    if run.s.num_beams > 1:
        raise ValueError("beams change their text until the end: there is nothing to stream")
    if tokenizer is None:
        yield from run.steps()
        return
    pieces = tokenizer.stream(skip_special_tokens=True)
    pieces.put(run.text.ids)  # of the prompt nothing is shown
    for new in run.steps():
        if piece := pieces.put(new):
            yield piece
    if piece := pieces.end():
        yield piece


class Run:
    """One call of `generate`: what was asked for, the text so far, and what is recorded of each step."""

    def __init__(
        self,
        model,
        input_ids,
        attention_mask,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        assistant_model=None,
        streamer=None,
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
        tokenizer=None,
        generator=None,
        past_key_values=None,
        inputs_embeds=None,
        settings=None,
    ):
        self.model, self.generator, self.assistant = model, generator, assistant_model
        self.s, inputs = s, _ = settings_of(model, generation_config, settings or {})
        if input_ids is None and inputs_embeds is None:
            begin = s.bos_token_id if s.bos_token_id is not None else model.config.bos_token_id
            if begin is None:
                raise ValueError("give input_ids: the model has no bos_token_id to start from")
            input_ids = torch.tensor([[begin]], device=next(model.parameters()).device)
        check_prompt(input_ids, attention_mask, inputs_embeds)
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        B, T = prompt.shape[:2]
        check_together(s, B, streamer, assistant_model, tokenizer)
        self.room = room_for(model, s, T)
        eos, self.pad = model.special_ids(s.eos_token_id, s.pad_token_id)
        self.eos = eos.tolist()
        if not s.use_cache:
            inputs["use_cache"] = False
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.long()
        against = None
        if s.guidance_scale not in (None, 1):
            other = input_ids[:, -1:] if negative_prompt_ids is None else negative_prompt_ids
            other_mask = negative_prompt_attention_mask
            against = other, torch.ones_like(other) if other_mask is None else other_mask.long()
            if len(other) != B:
                raise ValueError(f"negative_prompt_ids has {len(other)} rows, input_ids {B}")
        elif negative_prompt_ids is not None:
            raise ValueError("negative_prompt_ids needs guidance_scale above 1")
        ids = prompt.new_zeros(B, 0, dtype=torch.long) if input_ids is None else input_ids
        self.text = Text(
            model,
            ids,
            mask,
            past_key_values,
            inputs,
            self.room,
            inputs_embeds,
            against,
            s.guidance_scale or 1.0,
            s.prefill_chunk_size,
            bool(s.compiled),
        )
        n = self.text.ids.shape[1]
        s.min_length = max(0, (s.min_length or 0) - (T - n))  # which counts inputs_embeds too
        own = list(logits_processor or ())
        diversity = beams.Diversity(s.diversity_penalty) if s.num_beam_groups > 1 else None
        self.diversity = diversity
        times = s.num_return_sequences if s.num_beams == 1 else s.num_beams
        self.processors = processors.listed(
            s, self.eos, n, n + self.room, mask, own, prefix_allowed_tokens_fn, times, diversity
        )
        self.careful = bool(own) or prefix_allowed_tokens_fn is not None
        self.constraints = constraints_of(s)
        needed = sum(min(map(len, one.ways)) for one in self.constraints)
        if self.constraints and (s.num_beams == 1 or s.num_beam_groups > 1 or s.do_sample):
            raise ValueError("constraints and force_words_ids need num_beams above 1, no groups, no sampling")
        if needed > self.room:
            raise ValueError(f"the constraints need {needed} new tokens, and {self.room} may come")
        self.criteria = list(stopping_criteria or ())
        if s.stop_strings:
            self.criteria.append(stops_at(s.stop_strings, tokenizer))
        if s.max_time is not None:
            end = time.monotonic() + s.max_time
            self.criteria.append(lambda ids, scores: time.monotonic() > end)
        self.wanted = {key: True for key in ("output_attentions", "output_hidden_states") if getattr(s, key)}
        kinds = ("scores", "logits", "attentions", "hidden_states")
        self.record: dict[str, list] = {key: [] for key in kinds}
        self.found: dict[str, Any] = {}  # what else the strategy leaves for the output

    @property
    def may_leave(self) -> bool:
        """Whether nobody sees what the model says of rows that have ended, nor the cache."""
        s, given = self.s, self.text.inputs.keys() - {"use_cache"}
        watched = s.return_dict_in_generate or s.dola_layers or self.careful or self.criteria or given
        return s.use_cache and self.text.cache is None and not (watched or s.compiled)

    # ---- What every strategy does ----

    def process(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Scores (rows, V) after all processors. ValueError for one that leaves nothing to choose from."""
        scores = logits.clone() if self.careful else logits  # somebody's processor may write into it
        for process in self.processors:
            scores = process(ids, scores)
            if self.careful and getattr(scores, "shape", None) != logits.shape:
                found = tuple(getattr(scores, "shape", ())) or type(scores).__name__
                raise ValueError(f"a logits processor must give {tuple(logits.shape)} logits, not {found}")
        if self.careful and not (scores.amax(-1) > -math.inf).all():  # NaN too
            raise ValueError("a logits processor left no token to choose: all of a row is -inf, or NaN")
        return scores

    def note(self, output: Any, logits: Tensor, scores: Tensor) -> None:
        """Keep what is to come back."""
        s = self.s
        if s.return_dict_in_generate:
            for key, value in (("scores", scores), ("logits", logits)):
                if getattr(s, f"output_{key}"):
                    self.record[key].append(value)
            for key in ("attentions", "hidden_states"):
                if getattr(s, f"output_{key}"):
                    self.record[key].append(getattr(output, key))

    def choose(self, scores: Tensor) -> Tensor:
        """(rows,) ids."""
        if not self.s.do_sample:
            return scores.argmax(-1)
        try:
            return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]
        except RuntimeError as error:
            raise ValueError("no token can be drawn: the logits hold NaN, or -inf for every token") from error

    def stopped(self, ids: Tensor, scores: Any) -> Tensor:
        """(rows,) booleans of the criteria."""
        found = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for criterion in self.criteria:
            told = torch.as_tensor(criterion(ids, scores), device=ids.device)
            if told.shape not in ((), (1,), found.shape):
                raise ValueError(
                    f"a stopping criterion must give True, False or ({len(ids)},) booleans, "
                    f"not {tuple(told.shape)}"
                )
            found = found | told.bool()
        return found

    @torch.no_grad()  # as a decorator: between two steps whoever asked computes gradients as before
    def steps(self) -> Iterator[Tensor]:
        """(rows,) new ids a step, of whichever strategy was asked for."""
        if self.room == 0 or self.text.rows == 0:
            self.text.expand(self.s.num_return_sequences)
        elif self.s.num_beams > 1:
            self.beams()
        elif self.s.penalty_alpha is not None:
            yield from self.contrastive()
        elif self.assistant is not None or self.s.prompt_lookup_num_tokens is not None:
            yield from self.assisted()
        else:
            yield from self.plain()

    def output(self) -> Tensor | GenerateOutput:
        sequences = self.found.pop("sequences", None)
        sequences = self.text.ids.clone() if sequences is None else sequences
        if not self.s.return_dict_in_generate:
            return sequences
        recorded = {key: tuple(steps) if steps else None for key, steps in self.record.items()}
        return GenerateOutput(sequences, **recorded, past_key_values=self.text.cache, **self.found)

    # ---- Greedy and sampling, with DoLa ----

    def plain(self) -> Iterator[Tensor]:
        text, running, may_leave = self.text, None, self.may_leave
        contrast = DoLa(self.model, self.s.dola_layers) if self.s.dola_layers else None
        wanted = {**self.wanted, **({"output_hidden_states": True} if contrast else {})}
        while text.n < text.start + self.room:
            output = text.forward(**wanted)
            logits = text.logits(output)
            scores = text.led(output, logits) if contrast is None else contrast(output, logits)
            if running is None:  # the prompt was read once for all that follow it
                times = self.s.num_return_sequences
                text.expand(times)
                logits, scores = logits.repeat_interleave(times, 0), scores.repeat_interleave(times, 0)
                output = repeated(output, times)
                running = torch.ones(text.rows, dtype=torch.bool, device=logits.device)
                stop = torch.tensor(self.eos, device=logits.device, dtype=torch.long)
            scores = self.process(scores, text.ids)
            self.note(output, logits, scores)
            new = torch.where(running, self.choose(scores), self.pad)
            text.append(new)
            running &= ~torch.isin(new, stop)
            if self.criteria:
                running &= ~self.stopped(text.ids, scores)
            yield new
            if not running.any():
                return
            if may_leave:
                text.leave(running)

    # ---- Beams ----

    def beams(self) -> None:
        text, s, kept = self.text, self.s, {}
        N, groups = s.num_beams, s.num_beam_groups

        def scores_of(step: int, chosen: Tensor) -> Tensor:
            if not chosen.numel():
                output = text.forward(**self.wanted)
                logits = text.logits(output)
                scores = text.led(output, logits.log_softmax(-1))
                if step == 1:
                    text.expand(N)
                    logits, scores = logits.repeat_interleave(N, 0), scores.repeat_interleave(N, 0)
                    output = repeated(output, N)
                kept.update(output=output, logits=logits, scores=scores, parts=[])
            if self.diversity:
                self.diversity.chosen = chosen
            scores = self.process(kept["scores"], text.ids)
            by_group = scores.view(-1, groups, N // groups, scores.shape[-1])
            kept["parts"].append(by_group[:, len(kept["parts"])])
            if len(kept["parts"]) == groups:
                self.note(kept["output"], kept["logits"], torch.stack(kept["parts"], 1).flatten(0, 2))
            return scores

        stops = (lambda ids: self.stopped(ids, None)) if self.criteria else None
        prompts = text.ids
        new, scores, paths = beams.search(
            text, s, stops, self.eos, self.room, scores_of, self.generator, self.constraints
        )
        longest = max(map(len, new))
        rows = [F.pad(ids, (0, longest - len(ids)), value=self.pad) for ids in new]
        prompts = prompts.repeat_interleave(s.num_return_sequences, 0)
        self.found["sequences"] = torch.cat([prompts, torch.stack(rows)], 1)
        if s.return_dict_in_generate:
            self.found["sequences_scores"] = scores
            self.found["beam_indices"] = torch.tensor([path + [-1] * (longest - len(path)) for path in paths])

    # ---- Contrastive search ----

    def contrastive(self) -> Iterator[Tensor]:
        """Of the top_k likeliest tokens that which makes (1 - alpha) * chance - alpha * likeness largest;
        likeness is the cosine to the nearest hidden state before. Su et al. (2022), arXiv:2202.06417."""
        text, k, B = self.text, self.s.top_k, self.text.rows
        running = torch.ones(B, dtype=torch.bool, device=text.buffer.device)
        output = text.forward(**{**self.wanted, "output_hidden_states": True})
        logits = text.logits(output)
        past = F.normalize(output.hidden_states[-1].float(), dim=-1)  # (B, n, C)
        seen = torch.ones(past.shape[:2], device=past.device) if text.mask is None else text.mask
        blocked = seen == 0
        text.expand(k)
        own = torch.arange(B, device=running.device)
        try:
            yield from self.looking_ahead(output, logits, past, blocked, running, own)
        finally:  # a row for each text again, and all but its last token
            text.cache.truncate(text.n - 1)
            text.cache.reorder(own * k)

    def looking_ahead(
        self, output: Any, logits: Tensor, past: Tensor, blocked: Tensor, running: Tensor, own: Tensor
    ) -> Iterator[Tensor]:
        """The steps, where each text has k rows. `past` (B, n, C) are the states so far, normed, `blocked`
        (B, n) those of padding."""
        text, k, alpha, B = self.text, self.s.top_k, self.s.penalty_alpha, len(own)
        stop = torch.tensor(self.eos, device=running.device, dtype=torch.long)
        while text.n < text.start + self.room and running.any():
            ids = text.ids[::k]
            scores = self.process(logits, ids)
            self.note(output, logits, scores)
            chances, tokens = scores.softmax(-1).topk(k)  # (B, k)
            text.append(tokens.flatten())
            output = text.forward(**{**self.wanted, "output_hidden_states": True})
            state = F.normalize(output.hidden_states[-1].float(), dim=-1).view(B, k, -1)
            likeness = (state @ past.transpose(1, 2)).masked_fill(blocked[:, None], -math.inf).amax(-1)
            best = ((1 - alpha) * chances - alpha * likeness).argmax(-1)  # (B,)
            row = own * k + best
            logits = text.logits(output)[row]
            output = taken(output, row)
            new = torch.where(running, tokens[own, best], self.pad)
            past = torch.cat([past, state[own, best][:, None]], 1)
            blocked = F.pad(blocked, (0, 1))
            text.reorder(row.repeat_interleave(k))
            text.buffer[:, text.n - 1] = new.repeat_interleave(k)
            running &= ~torch.isin(new, stop)
            if self.criteria:
                running &= ~self.stopped(text.ids[::k], scores)
            self.found["sequences"] = text.ids[::k]
            yield new

    # ---- Assisted: somebody proposes, the model checks several tokens in one pass ----

    def assisted(self) -> Iterator[Tensor]:
        """Greedy gives the text of plain greedy, up to rounding: a pass over several tokens sums in another
        order. Sampling keeps the distribution. Leviathan et al. (2022), arXiv:2211.17192."""
        text, s, greedy = self.text, self.s, not self.s.do_sample
        lookup = s.prompt_lookup_num_tokens is not None
        proposer = Lookup(s.max_matching_ngram_size or 2) if lookup else Draft(self)
        most = s.prompt_lookup_num_tokens if lookup else s.num_assistant_tokens
        size = min(most, 4) if lookup else most
        stats = self.found["stats"] = {"passes": 0, "proposed": 0, "accepted": 0, "rounds": []}
        end = text.start + self.room
        while text.n < end:
            n = text.ids.shape[1]
            fits = min(size, end - text.n - 1, rotation_room(self.model, text.n, text.mask))
            tokens, chances = proposer(text.ids, fits)
            k = len(tokens)
            if k:
                text.append(tokens[None])
            output = text.forward(keep=k + 1, **self.wanted)
            logits = output.logits[0].float()
            held, done, found = 0, False, []
            for i in range(k + 1):
                scores = self.process(logits[i : i + 1], text.ids[:, : n + i])
                if i == k:
                    new = self.choose(scores)
                elif greedy:
                    new = scores.argmax(-1)
                else:
                    new = self.accepted_or_drawn(scores.softmax(-1)[0], tokens[i], chances and chances[i])
                fits = i < k and int(new) == int(tokens[i])
                held += fits
                text.n = text.skipped + n + i  # after the ids before it
                text.append(new)
                self.note(of_one(output, i, k), logits[i : i + 1], scores)
                found.append(new)
                done = int(new) in self.eos or bool(self.criteria and self.stopped(text.ids, scores)[0])
                if done or not fits:
                    break
            text.truncate(text.ids.shape[1])
            stats["passes"] += 1
            stats["proposed"] += k
            stats["accepted"] += held
            stats["rounds"].append((tokens.tolist(), held))
            yield from found  # only now: whoever stops here finds no rejected token in the cache
            if done:
                return
            if s.num_assistant_tokens_schedule not in (None, "constant") and k:
                grown = 2 * size if lookup else size + 2
                size = min(most, grown) if held == k else max(1, held + 1 if lookup else size - 1)

    def accepted_or_drawn(self, chances: Tensor, token: Tensor, proposed: Tensor | None) -> Tensor:
        """(1,) the proposed token with chance min(1, p / q), else one drawn from what p has more than q."""
        share = 1.0 if proposed is None else float(proposed[token])
        draw = torch.rand((), generator=self.generator, device=chances.device)
        if float(draw) * share < float(chances[token]):
            return token[None]
        if proposed is None:
            rest = chances.index_fill(0, token, 0.0)
        else:
            rest = (chances - proposed).clamp(min=0)
        return torch.multinomial(rest, 1, generator=self.generator)


class Lookup:
    """Proposes what followed the last time that the text had the same last tokens."""

    def __init__(self, longest: int):
        self.longest = longest

    def __call__(self, ids: Tensor, most: int) -> tuple[Tensor, None]:
        n = ids.shape[1]
        for size in range(min(self.longest, n - 1), 0, -1):
            windows = ids[0, :-1].unfold(0, size, 1)
            places = (windows == ids[0, n - size :]).all(1).nonzero()[:, 0]
            if most > 0 and len(places):
                start = int(places[-1]) + size
                return ids[0, start : min(start + most, n)], None
        return ids[0, :0], None


class Draft:
    """Proposes what a smaller model of the same vocabulary says."""

    def __init__(self, run: Run):
        self.run, self.model = run, run.assistant
        sizes = [head_of(model).out_features for model in (run.model, self.model)]
        if sizes[0] != sizes[1]:
            told = f"assistant_model has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}"
            raise ValueError(f"{told}: they must be the same")
        text = run.text
        if text.embeds is not None:
            raise ValueError("assistant_model cannot read inputs_embeds: give input_ids")
        taken = inspect.signature(self.model.forward).parameters
        inputs = {key: value for key, value in text.inputs.items() if key in taken}
        mask = None if text.mask is None else text.mask.clone()
        self.text = Text(self.model, text.ids.clone(), mask, None, inputs, run.room)

    def __call__(self, ids: Tensor, most: int) -> tuple[Tensor, list[Tensor] | None]:
        run, text = self.run, self.text
        n, known = ids.shape[1], text.ids[:, : ids.shape[1]]
        same = int((known == ids[:, : known.shape[1]]).all(0).long().cumprod(0).sum())
        text.truncate(min(same, n - 1))
        text.append(ids[:, text.ids.shape[1] :])
        most = min(most, rotation_room(self.model, text.n, text.mask))
        limit = self.model.max_positions
        most = most if limit is None else min(most, limit - n)
        tokens, chances = [], []
        while len(tokens) < most:
            scores = run.process(text.logits(text.forward()), text.ids)
            likely = scores.softmax(-1)
            new = run.choose(scores)
            tokens.append(new)
            chances.append(likely[0])
            text.append(new)
            threshold = run.s.assistant_confidence_threshold
            if int(new) in run.eos or (threshold and float(likely[0, new]) < threshold):
                break
        return torch.cat(tokens) if tokens else ids[0, :0], chances if run.s.do_sample else None


def rotation_room(model: nn.Module, n: int, mask: Tensor | None) -> int | float:
    """How many tokens may follow n in one pass as they would one by one, where a model turns longer texts by
    other angles."""
    config = getattr(model.config, "text_config", model.config)
    if not getattr(config, "rope_varies", False):
        return math.inf
    n = n if mask is None else int(mask.sum())
    limit = getattr(config, "original_max_position_embeddings", None)
    if limit is None:  # dynamic: past the limit every length has its own
        return max(0, config.max_position_embeddings - n)
    return math.inf if n > limit else limit - n


# ---- DoLa --------------------------------------------------------------------------------------------------


class DoLa:
    """What the last layer says more than an early one, of `layers` that which differs most from it. Chuang et
    al. (2023), arXiv:2309.03883. Early states go into the output layer without the final norm, as in 4.50."""

    def __init__(self, model: nn.Module, layers: str | Sequence[int]):
        config = getattr(model.config, "text_config", model.config)
        names = ("num_hidden_layers", "num_layers", "n_layer")
        n = next(getattr(config, name) for name in names if hasattr(config, name))
        first = {1: 0, 2: 1}.get(n, 2) if config.tie_word_embeddings else 0  # 0 would say the token itself
        if layers == "low":
            found = list(range(first, n // 2 if n <= 40 else 20, 2)) or [first]
        elif layers == "high":
            found = list(range(n // 2 if n <= 40 else n - 20, n, 2))
        else:
            found = [layer for layer in layers if isinstance(layer, int) and 0 <= layer < n]
        if isinstance(layers, str) and layers not in ("low", "high") or not found:
            raise ValueError(f"dola_layers must be 'low', 'high' or layers from 0 to {n - 1}, not {layers!r}")
        self.layers, self.head = found, head_of(model)

    def __call__(self, output: Any, logits: Tensor) -> Tensor:
        early = torch.stack([self.head(output.hidden_states[i][:, -1]).float() for i in self.layers])
        late, early = logits.log_softmax(-1), early.log_softmax(-1)  # (B, V), (layers, B, V)
        mean = 0.5 * (late.exp() + early.exp())
        differs = F.kl_div(late.expand_as(mean), mean, reduction="none").mean(-1)
        differs = differs + F.kl_div(early, mean, reduction="none").mean(-1)
        base = early[differs.argmax(0), torch.arange(len(logits), device=logits.device)]
        unlikely = late < late.amax(-1, keepdim=True) + math.log(0.1)
        return (late - base).masked_fill(unlikely, -math.inf)


# ---- Checks and pieces -------------------------------------------------------------------------------------


def check_prompt(ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None) -> None:
    if ids is not None and embeds is not None:
        raise ValueError("give either input_ids or inputs_embeds")
    if embeds is not None and (not isinstance(embeds, Tensor) or embeds.dim() != 3 or not embeds.shape[1]):
        found = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"inputs_embeds must be a tensor (batch, tokens, width), not {found}")
    if embeds is None and (not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1]):
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a tensor (batch, tokens), one token at least, not {found}")
    shape = (ids if embeds is None else embeds).shape[:2]
    if mask is not None and (getattr(mask, "shape", 0) != shape or ((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"attention_mask must be a tensor {tuple(shape)}, 0 at padding and 1 elsewhere")


def room_for(model: nn.Module, s: GenerationConfig, T: int) -> int:
    """How many new ids there may be after T. ValueError for none, or more than the model can read."""
    limit = model.max_positions or math.inf
    fed = 0 if s.penalty_alpha is not None else 1  # the last new token is not fed, but by contrastive search
    if s.max_new_tokens is not None:
        room = s.max_new_tokens
    elif s.max_length is None:
        room = int(min(20, limit - T + fed))
    else:
        room = s.max_length - T
        if room <= 0:
            raise ValueError(f"max_length {s.max_length} leaves no room after a prompt of {T} tokens")
    if T + room - fed > limit:
        raise ValueError(f"{T} prompt + {room} new tokens do not fit into {limit} positions")
    if (s.min_new_tokens or 0) > room or (s.min_length or 0) > T + room:
        raise ValueError(f"min_length, min_new_tokens ask for more than the {room} new tokens that may come")
    return room


def stops_at(strings: str | Sequence[str], tokenizer: Any) -> Callable:
    """A criterion: whether the newest token ends one of `strings`, or has its end inside."""
    strings = [strings] if isinstance(strings, str) else list(strings)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings must be texts that are not empty, not {strings!r}")
    tail = 4 * max(map(len, strings)) + 8  # a token has a byte at least

    def ends(row: list[int]) -> bool:
        before, text = tokenizer.decode(row[:-1]).rstrip("\ufffd"), tokenizer.decode(row)
        return any(text.find(string, max(0, len(before) - len(string) + 1)) >= 0 for string in strings)

    return lambda ids, scores: torch.tensor([ends(row) for row in ids[:, -tail:].tolist()])


def taken(output: Any, rows: Tensor) -> Any:
    """What was recorded of these rows."""
    chosen = {
        key: tuple(part[rows] for part in getattr(output, key))
        for key in ("attentions", "hidden_states")
        if getattr(output, key) is not None
    }
    return output._replace(**chosen)


def of_one(output: Any, i: int, k: int) -> Any:
    """What was recorded of a pass over what was new and k proposed tokens, for the i-th token after it: as if
    each had come by a pass of its own."""

    def cut(key: str) -> Any:
        parts = getattr(output, key)
        if parts is None or not k:
            return parts
        T, S = parts[0].shape[-2], parts[0].shape[-1]
        rows = slice(0 if i == 0 else T - k - 1 + i, T - k + i)
        if key == "hidden_states":
            return tuple(part[:, rows] for part in parts)
        return tuple(part[:, :, rows, : S - k + i] for part in parts)

    return output._replace(attentions=cut("attentions"), hidden_states=cut("hidden_states"))


def repeated(output: Any, times: int) -> Any:
    return taken(output, torch.arange(len(output.logits)).repeat_interleave(times)) if times > 1 else output


# ---- Scores ------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, rows: int = 256, **inputs
) -> Tensor:
    """(B, T - 1) logarithms of the chances that the model gives to each token after the first, 0 where
    `attention_mask` (B, T) has padding before or at it. One pass; never more than `rows` rows of logits."""
    check_prompt(input_ids, attention_mask, None)
    states, head = [], head_of(model)

    def keep(part: nn.Module, given: tuple, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            states.append(output.last_hidden_state)

    hooks = [part.register_forward_hook(keep) for part in model.modules()]
    mask = None if attention_mask is None or attention_mask.all() else attention_mask.long()
    try:
        given = model.prepare_inputs(input_ids, mask, None, **{"use_cache": False, **inputs})
        model(**given, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    x, targets = states[-1][:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    parts = zip(x.split(rows), targets.split(rows), strict=True)
    found = [-F.cross_entropy(head(part).float(), target, reduction="none") for part, target in parts]
    scores = torch.cat(found).view(len(input_ids), -1) if found else x.new_zeros(len(input_ids), 0).float()
    return scores if mask is None else scores * (mask[:, 1:] * mask[:, :-1])


def compute_transition_scores(
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """(rows, new) score of each new token of `sequences`, from what `generate` gave with `output_scores`.
    With `beam_indices` the row it came from is followed, and 0 stands after the end of a beam."""
    steps = torch.stack(list(scores))  # (new, rows, V)
    steps = steps.log_softmax(-1) if normalize_logits else steps
    if beam_indices is None:
        n = len(steps)
        rows = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, n)
    else:
        n = int((beam_indices >= 0).sum(1).max())
        rows = beam_indices[:, :n]
    new = sequences[:, sequences.shape[1] - n :]
    found = steps[torch.arange(n, device=new.device), rows.clamp(min=0), new]
    return found.masked_fill(rows < 0, 0.0)

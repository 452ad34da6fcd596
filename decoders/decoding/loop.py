"""`generate` and `stream`: the loop of greedy decoding and sampling, and the way to every other strategy.

    from decoders import decoding
    decoding.generate(model, ids, max_new_tokens=20, num_beams=4)
    for text in decoding.stream(model, ids, tokenizer=tokenizer, do_sample=True): ...

A model has to offer `forward` with a KV cache, `prepare_inputs` and `special_ids`. Settings have the names
and defaults of Transformers' documentation; those of the folder's generation_config.json count, arguments
win.

Where versions of Transformers differ
- Beams are those of 5.x: a beam that stops is kept if it is among the `num_beams` best continuations. The
  sequences of a padded batch get what each gets alone.
- DoLa chooses its layer for each sequence by itself; 4.x averages over the batch, so that sequences change
  each other.
- Classifier-free guidance (CFG) with beams moves the negative prompt's cache with the beams; 5.x leaves it
  behind.
- Constraints restart after a wrong token, which may begin one anew, and only new tokens count; groups that
  have ended stand in nobody's way: 4.50 does neither.
- Padding is never a token seen: it earns no repetition penalty, as in 5.x, also with `inputs_embeds`; and
  it is in no n-gram and no sequence with a bias, where all versions count it.
- Beams that are sampled are sorted by score, as from 5.24 on.
- Embeddings count for the length that a change of rotary frequencies follows from; 5.x counts ids alone.
- `num_assistant_tokens_schedule` is "heuristic": how many tokens are drafted follows from how many were
  accepted. In 5.x it is "constant". Neither changes the text.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .assisted import AssistedDecoding
from .beams import BeamSearch
from .contrastive import ContrastiveSearch
from .dola import DoLa
from .logits_processors import Processor
from .settings import Arguments
from .state import Generation, repeated


def generate(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    generation_config: Any = None,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Callable] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    assistant_model: Any = None,
    streamer: Any = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    **settings: Any,
) -> Any:
    """(B * num_return_sequences, T + new) ids, or with `return_dict_in_generate` a GenerateOutput.

    `input_ids` (B, T), shorter ones padded on the left; None starts from BOS, or from `inputs_embeds`
    (B, T, C). `settings` are fields of GenerationConfig, and other arguments of the model's `forward`. Each
    processor maps (ids, float32 logits) to logits, each criterion (ids, scores) to True or (rows,) booleans.
    `streamer` gets `put(prompts)`, `put(new ids)` a step, `end()`. `past_key_values` holds the beginning of
    the prompts already, and in the end all but the last ids. `tokenizer` is for stop_strings.

    ValueError for what cannot be, TypeError for the unknown. A KeyboardInterrupt carries what there is so far
    as `ids`.
    """
    arguments = Arguments(
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
    )
    run = Generation(model, input_ids, attention_mask, generation_config, settings, arguments)
    if streamer is not None:
        streamer.put(run.sequences.ids.cpu())
    follow(run, streamer)
    if streamer is not None:
        streamer.end()
    return run.output()


def follow(run: Generation, streamer: Any) -> None:
    """All steps; an interrupt is told what there is so far."""
    steps = all_steps(run)
    try:
        for new in steps:
            if streamer is not None:
                streamer.put(new.cpu())
    except KeyboardInterrupt as interrupt:
        interrupt.ids = run.results.get("sequences", run.sequences.ids).clone()  # type: ignore[attr-defined]
        raise
    finally:
        steps.close()  # so that the cache is left as it should be


def stream(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    generation_config: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Iterator[Any]:
    """What `generate` gives, piece by piece: (rows,) new ids a step, or with `tokenizer` the text of the one
    sequence as it is complete."""
    names = {field.name for field in fields(Arguments)} - {"streamer"}  # the caller hears it here
    given = {name: options.pop(name) for name in names & options.keys()}
    arguments = Arguments(tokenizer=tokenizer, **given)
    run = Generation(model, input_ids, attention_mask, generation_config, options, arguments)
    if run.s.num_beams > 1:
        raise ValueError("beams change their text until the end: there is nothing to stream")
    if tokenizer is None:
        yield from all_steps(run)
        return
    pieces = tokenizer.stream(skip_special_tokens=True)
    pieces.put(run.sequences.ids)  # of the prompt nothing is shown
    for new in all_steps(run):
        if piece := pieces.put(new):
            yield piece
    if piece := pieces.end():
        yield piece


@torch.no_grad()  # as a decorator: between two steps whoever asked computes gradients as before
def all_steps(run: Generation) -> Generator[Tensor, None, None]:
    """(rows,) new ids a step, of whichever strategy was asked for."""
    s = run.s
    if run.max_new_tokens == 0 or run.sequences.rows == 0:
        run.sequences.expand(s.num_return_sequences)
    elif s.num_beams > 1:
        BeamSearch(run).run_all()
    elif s.contrastive:
        yield from ContrastiveSearch(run).steps()
    elif run.arguments.assistant_model is not None or s.prompt_lookup_num_tokens is not None:
        yield from AssistedDecoding(run).steps()
    else:
        yield from greedy_or_sampled(run)


def greedy_or_sampled(run: Generation) -> Iterator[Tensor]:
    """Greedy decoding or sampling, with DoLa and classifier-free guidance (CFG): (rows,) new ids a step."""
    sequences, unfinished = run.sequences, None
    may_drop_finished = run.may_drop_finished
    dola = DoLa(run.model, run.s.dola_layers) if run.s.dola_layers else None
    wanted = {**run.wanted, "output_hidden_states": True} if dola else run.wanted
    eos = torch.tensor(run.eos, device=sequences.buffer.device, dtype=torch.long)
    while sequences.length < sequences.prompt_length + run.max_new_tokens:
        output = sequences.forward(**wanted)
        logits = sequences.logits(output)
        scores = dola(output, logits) if dola else sequences.guide(output, logits)
        if unfinished is None:  # the prompt was read once for all sequences that follow it
            times = run.s.num_return_sequences
            sequences.expand(times)
            logits, scores = logits.repeat_interleave(times, 0), scores.repeat_interleave(times, 0)
            output = repeated(output, times)
            unfinished = torch.ones(sequences.rows, dtype=torch.bool, device=logits.device)
        scores = run.process(scores, sequences.ids)
        run.note(output, logits, scores)
        new = torch.where(unfinished, run.choose(scores), run.pad)
        sequences.append(new)
        unfinished = unfinished & ~torch.isin(new, eos)
        if run.criteria:
            unfinished = unfinished & ~run.stopped(sequences.ids, scores)
        yield new
        going = int(unfinished.sum())
        if going == 0:
            return
        if may_drop_finished and going < len(unfinished):
            sequences.drop_finished(unfinished)

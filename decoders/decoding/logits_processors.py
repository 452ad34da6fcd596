"""What changes the scores of the next token before it is chosen: penalties, bans, forced tokens, filters.

Each is a function (ids (rows, n), scores (rows, V) in float32) -> scores, in the order in which Transformers
applies them; `listed` makes those that the settings of a `GenerationConfig` ask for. -inf means: never.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Processor = Callable[[Tensor, Tensor], Tensor]

# ---- Penalties, bans and forced tokens ---------------------------------------------------------------------


def repetition_penalty(penalty: float, mask: Tensor | None = None) -> Processor:
    """Divide scores of tokens seen before by `penalty`, multiply negative ones. What `mask` (rows, T) says is
    padding was not seen: as Transformers 5, where 4.x counts it. Keskar et al. (2019), arXiv:1909.05858."""

    def process(ids, scores):
        if mask is not None and (padding := mask.shape[1] - mask.sum(1)).any():
            places = torch.arange(ids.shape[1], device=ids.device)
            times = len(ids) // len(padding)
            ids = torch.where(places < padding.repeat_interleave(times)[:, None], ids[:, -1:], ids)
        old = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(old < 0, old * penalty, old / penalty))

    return process


def no_repeat_ngrams(n: int) -> Processor:
    """Ban tokens that would end a row of n tokens that is there already."""

    def process(ids, scores):
        if ids.shape[1] < n:
            return scores
        rows = ids.unfold(1, n, 1)  # (rows, places, n)
        repeats = (rows[..., :-1] == ids[:, None, ids.shape[1] - n + 1 :]).all(-1)
        banned = torch.zeros_like(scores, dtype=torch.bool)
        row, place = repeats.nonzero(as_tuple=True)
        banned[row, rows[row, place, -1]] = True
        return scores.masked_fill(banned, -math.inf)

    return process


def sequence_bias(biases: dict[tuple[int, ...], float]) -> Processor:
    """Add to the score of a sequence's last token wherever the tokens before it stand at the end already."""

    def process(ids, scores):
        bias = torch.zeros_like(scores)
        for sequence, value in biases.items():
            begun = sequence[:-1]
            if len(begun) <= ids.shape[1]:
                tail = ids[:, ids.shape[1] - len(begun) :]
                fits = (tail == ids.new_tensor(begun)).all(1)
                bias[:, sequence[-1]] += torch.where(fits, value, 0.0)
        return scores + bias

    return process


def banned(tokens: Sequence[int], when: Callable[[int], bool] = lambda n: True) -> Processor:
    """No `tokens` while `when` holds for the number of ids."""

    def process(ids, scores):
        return scores.index_fill(1, ids.new_tensor(tokens), -math.inf) if when(ids.shape[1]) else scores

    return process


def forced(tokens: Sequence[int], n: int) -> Processor:
    """Nothing but `tokens` after n ids."""

    def process(ids, scores):
        only = torch.full_like(scores, -math.inf).index_fill(1, ids.new_tensor(tokens), 0.0)
        return only if ids.shape[1] == n else scores

    return process


def allowed(function: Callable[[int, Tensor], Sequence[int]], beams: int) -> Processor:
    """Nothing but what `function(text, ids (n,))` names, where `beams` rows belong to a text."""

    def process(ids, scores):
        blocked = torch.full_like(scores, -math.inf)
        for row in range(len(ids)):
            tokens = list(function(row // beams, ids[row]))
            if not tokens:
                raise ValueError(f"prefix_allowed_tokens_fn allows no token after {ids[row].tolist()[-8:]}")
            blocked[row, tokens] = 0.0
        return scores + blocked

    return process


def decay(start: int, factor: float, eos: Sequence[int]) -> Processor:
    """Raise the scores of the stop ids after `start` ids, by |score| * (factor ** steps - 1)."""

    def process(ids, scores):
        if ids.shape[1] <= start:
            return scores
        old = scores[:, eos]
        added = torch.where(old.isfinite(), old.abs() * (factor ** (ids.shape[1] - start) - 1), 0.0)
        return scores.index_copy(1, ids.new_tensor(eos), old + added)

    return process


def remove_invalid(ids: Tensor, scores: Tensor) -> Tensor:
    """NaN as 0, infinities as the largest numbers."""
    return scores.nan_to_num(0.0)


def normalized(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.log_softmax(-1)


# ---- Filters, for sampling ---------------------------------------------------------------------------------


def temperature(value: float) -> Processor:
    return lambda ids, scores: scores / value


def keep_best(scores: Tensor, removed: Tensor, least: int) -> Tensor:
    """-inf for what is `removed`, but never for the `least` best."""
    best = scores.topk(min(least, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(removed & (scores < best), -math.inf)


def top_k(k: int, least: int = 1) -> Processor:
    """The k best. Fan et al. (2018), arXiv:1805.04833."""
    return lambda ids, scores: keep_best(scores, torch.ones_like(scores, dtype=torch.bool), max(k, least))


def top_p(p: float, least: int = 1) -> Processor:
    """The best of total chance p. Holtzman et al. (2019), arXiv:1904.09751."""

    def process(ids, scores):
        ascending, order = scores.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - p
        unlikely[:, -least:] = False
        return scores.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)

    return process


def min_p(share: float, least: int = 1) -> Processor:
    """Those whose chance is at least `share` of the best one's. Nguyen et al. (2024), arXiv:2407.01082."""

    def process(ids, scores):
        chances = scores.softmax(-1)
        removed = chances < share * chances.amax(-1, keepdim=True)
        removed.scatter_(1, chances.topk(min(least, scores.shape[-1])).indices, False)
        return scores.masked_fill(removed, -math.inf)

    return process


def typical_p(mass: float, least: int = 1) -> Processor:
    """Those whose surprise is nearest to the expected one, of total chance `mass`. Meister et al. (2022),
    arXiv:2202.00666."""

    def process(ids, scores):
        logs = scores.log_softmax(-1)
        entropy = -(logs.exp() * logs).nansum(-1, keepdim=True)
        distance, order = (-logs - entropy).abs().sort()
        total = scores.gather(1, order).softmax(-1).cumsum(-1)
        last = (total < mass).sum(1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        removed = distance > distance.gather(1, last)
        removed[:, :least] = False
        return scores.masked_fill(removed.scatter(1, order, removed), -math.inf)

    return process


def epsilon_cutoff(least_chance: float, least: int = 1) -> Processor:
    """Those of at least that chance. Hewitt et al. (2022), arXiv:2210.15191, as eta_cutoff."""
    return lambda ids, scores: keep_best(scores, scores.softmax(-1) < least_chance, least)


def eta_cutoff(epsilon: float, least: int = 1) -> Processor:
    """The same, with a bound that falls where many tokens are about as likely."""

    def process(ids, scores):
        logs = scores.log_softmax(-1)
        chances = logs.exp()
        entropy = -(chances * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1, keepdim=True)
        bound = (math.sqrt(epsilon) * (-entropy).exp()).clamp(max=epsilon)
        return keep_best(scores, chances < bound, least)

    return process


# ---- All that the settings ask for -------------------------------------------------------------------------


def listed(
    s: Any,
    eos: Sequence[int],
    T: int,
    end: int,
    mask: Tensor | None = None,
    own: Iterable[Processor] = (),
    allowed_tokens: Callable | None = None,
    times: int = 1,
    diversity: Processor | None = None,
) -> list[Processor]:
    """For the settings `s`, a prompt of T ids, at most `end` ids in all, `times` rows for each prompt; `own`
    come before the filters."""
    found: list[Processor] = []
    if s.sequence_bias:
        pairs = s.sequence_bias.items() if isinstance(s.sequence_bias, dict) else s.sequence_bias
        found.append(sequence_bias({tuple(ids): float(bias) for ids, bias in pairs}))
    if diversity is not None:
        found.append(diversity)
    if s.repetition_penalty not in (None, 1):
        found.append(repetition_penalty(s.repetition_penalty, mask))
    if s.no_repeat_ngram_size:
        found.append(no_repeat_ngrams(s.no_repeat_ngram_size))
    if s.bad_words_ids:
        words = [word for word in s.bad_words_ids if list(word) not in [[id] for id in eos]]
        found.append(sequence_bias({tuple(word): -math.inf for word in words}))
    least = max(s.min_length or 0, T + s.min_new_tokens if s.min_new_tokens else 0)
    if least and eos:
        found.append(banned(eos, lambda n: n < least))
    if allowed_tokens is not None:
        found.append(allowed(allowed_tokens, times))
    if s.forced_bos_token_id is not None:
        found.append(forced([s.forced_bos_token_id], 1))
    if s.forced_eos_token_id is not None:
        forced_eos = s.forced_eos_token_id
        found.append(forced([forced_eos] if isinstance(forced_eos, int) else forced_eos, end - 1))
    if s.remove_invalid_values:
        found.append(remove_invalid)
    if s.exponential_decay_length_penalty is not None and eos:
        start, factor = s.exponential_decay_length_penalty
        found.append(decay(start + T, factor, eos))
    if s.suppress_tokens:
        found.append(banned(s.suppress_tokens))
    if s.begin_suppress_tokens:
        begin = T if T > 1 or s.forced_bos_token_id is None else T + 1
        found.append(banned(s.begin_suppress_tokens, lambda n: n == begin))
    found += own
    if s.do_sample:
        found += filters(s, len(eos) + 1 if s.num_beams > 1 else 1)
    if s.renormalize_logits:
        found.append(normalized)
    return found


def filters(s: Any, least: int) -> list[Processor]:
    """What sampling asks for; at least so many tokens are left, so that beams can go on where one stops."""
    found: list[Processor] = []
    if s.temperature not in (None, 1):
        found.append(temperature(s.temperature))
    if s.top_k:
        found.append(top_k(s.top_k, least))
    if s.top_p is not None and s.top_p < 1:
        found.append(top_p(s.top_p, least))
    if s.min_p is not None:
        found.append(min_p(s.min_p, least))
    if s.typical_p is not None and s.typical_p < 1:
        found.append(typical_p(s.typical_p, least))
    if s.epsilon_cutoff:
        found.append(epsilon_cutoff(s.epsilon_cutoff, least))
    if s.eta_cutoff:
        found.append(eta_cutoff(s.eta_cutoff, least))
    return found

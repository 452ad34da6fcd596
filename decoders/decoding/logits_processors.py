"""What changes the scores of the next token before it is chosen: penalties, bans, forced tokens, filters.

Each is a function (ids (B, n), scores (B, V) in float32) -> scores, in the order in which Transformers
applies them; `processors_of` makes those that the settings of a `GenerationConfig` ask for. -inf means:
never.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import GenerationConfig
from .token_ids import bias_pairs, check_ids, listed

Processor = Callable[[Tensor, Tensor], Tensor]
NO_TOKEN = -1  # in place of padding, and of a token of a group of beams that has ended

# ---- Penalties, bans and forced tokens ---------------------------------------------------------------------


def without_padding(ids: Tensor, mask: Tensor | None) -> Tensor:
    """`ids` (rows, n) with NO_TOKEN where `mask` (B, T) of the prompts has 0, for several rows a prompt."""
    if mask is None or not mask.shape[1]:
        return ids
    padding = (mask == 0).repeat_interleave(len(ids) // len(mask), 0)
    padding = F.pad(padding, (0, ids.shape[1] - mask.shape[1]), value=False)
    return ids.masked_fill(padding, NO_TOKEN)


def repetition_penalty(penalty: float, mask: Tensor | None = None) -> Processor:
    """Divide scores of tokens seen before by `penalty`, multiply negative ones. What `mask` (B, T) says is
    padding was not seen: as Transformers 5, where 4.x counts it. Keskar et al. (2019), arXiv:1909.05858."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if not ids.shape[1]:
            return scores
        ids = without_padding(ids, mask)
        ids = torch.where(ids == NO_TOKEN, ids.amax(1, keepdim=True), ids)  # seen once more: no change
        old = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(old < 0, old * penalty, old / penalty))

    return process


def no_repeat_ngrams(n: int, mask: Tensor | None = None) -> Processor:
    """Ban tokens that would end an n-gram that is there already. Padding, where `mask` (B, T) has 0, is in
    none; Transformers counts it."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] < n:
            return scores
        ids = without_padding(ids, mask)
        ngrams = ids.unfold(1, n, 1)  # (B, n-grams, n)
        repeats = (ngrams[..., :-1] == ids[:, None, ids.shape[1] - n + 1 :]).all(-1)
        repeats &= (ngrams != NO_TOKEN).all(-1)
        banned = torch.zeros_like(scores, dtype=torch.bool)
        row, start = repeats.nonzero(as_tuple=True)
        banned[row, ngrams[row, start, -1]] = True
        return scores.masked_fill(banned, -math.inf)

    return process


def sequence_bias(biases: dict[tuple[int, ...], float], mask: Tensor | None = None) -> Processor:
    """Add to the score of a sequence's last token wherever the tokens before it stand at the end already.
    Padding, where `mask` (B, T) has 0, is none of them."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        ids = without_padding(ids, mask)
        total = torch.zeros_like(scores)
        for sequence, bias in biases.items():
            prefix = sequence[:-1]
            if len(prefix) <= ids.shape[1]:
                tail = ids[:, ids.shape[1] - len(prefix) :]
                matches = (tail == ids.new_tensor(prefix)).all(1)
                total[:, sequence[-1]] += torch.where(matches, bias, 0.0)
        return scores + total

    return process


class Diversity:
    """Diverse beam search: take `penalty` from a token's score for each time that an earlier group `chosen`
    it in this step. Vijayakumar et al. (2016), arXiv:1610.02424."""

    def __init__(self, penalty: float):
        self.penalty, self.chosen = penalty, torch.empty(0)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        B, V = len(self.chosen), scores.shape[-1]
        counts = [tokens[tokens != NO_TOKEN].bincount(minlength=V) for tokens in self.chosen]
        return scores - self.penalty * torch.stack(counts).repeat_interleave(len(scores) // B, 0)


def suppress_tokens(tokens: Sequence[int], when: Callable[[int], bool] = lambda n: True) -> Processor:
    """No `tokens` while `when` holds for the number of ids."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        banned = torch.as_tensor(tokens, dtype=torch.int64, device=scores.device)  # ids may be int32
        return scores.index_fill(1, banned, -math.inf) if when(ids.shape[1]) else scores

    return process


def force_tokens(tokens: Sequence[int], n: int) -> Processor:
    """Nothing but `tokens` after n ids."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != n:
            return scores
        return torch.full_like(scores, -math.inf).index_fill(1, ids.new_tensor(tokens), 0.0)

    return process


def prefix_allowed_tokens(function: Callable[[int, Tensor], Sequence[int]], rows: int) -> Processor:
    """Nothing but what `function(prompt, ids (n,))` names, where `rows` sequences belong to a prompt."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        blocked = torch.full_like(scores, -math.inf)
        for row in range(len(ids)):
            tokens = list(function(row // rows, ids[row]))
            if not tokens:
                raise ValueError(f"prefix_allowed_tokens_fn allows no token after {ids[row].tolist()[-8:]}")
            check_ids("prefix_allowed_tokens_fn", map(int, tokens), scores.shape[-1])
            blocked[row, tokens] = 0.0
        return scores + blocked

    return process


def exponential_decay(start: int, factor: float, eos: Sequence[int]) -> Processor:
    """Raise the scores of the stop ids after `start` ids, by |score| * (factor ** steps - 1)."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        steps = ids.shape[1] - start
        if steps <= 0:
            return scores
        old = scores[:, list(eos)]
        raised = torch.where(old.isfinite(), old.abs() * (factor**steps - 1), 0.0)
        return scores.index_copy(1, ids.new_tensor(eos), old + raised)

    return process


def remove_invalid_values(ids: Tensor, scores: Tensor) -> Tensor:
    """NaN as 0, infinities as the largest numbers."""
    return scores.nan_to_num(0.0)


def log_normalize(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.log_softmax(-1)


# ---- Filters, for sampling ---------------------------------------------------------------------------------


def temperature(value: float) -> Processor:
    return lambda ids, scores: scores / value


def keep_best(scores: Tensor, removed: Tensor, keep: int) -> Tensor:
    """-inf for what is `removed`, but never for the `keep` best."""
    best = scores.topk(min(keep, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(removed & (scores < best), -math.inf)


def top_k(k: int, keep: int = 1) -> Processor:
    """Top-k sampling: the k most probable. Fan et al. (2018), arXiv:1805.04833."""
    return lambda ids, scores: keep_best(scores, torch.ones_like(scores, dtype=torch.bool), max(k, keep))


def top_p(p: float, keep: int = 1) -> Processor:
    """Nucleus (top-p) sampling: the most probable tokens whose probabilities sum to p. Holtzman et al.
    (2019), arXiv:1904.09751."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - p
        unlikely[:, -keep:] = False
        return scores.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)

    return process


def min_p(share: float, keep: int = 1) -> Processor:
    """Those with at least `share` of the largest probability. Nguyen et al. (2024), arXiv:2407.01082."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        probs = scores.softmax(-1)
        removed = probs < share * probs.amax(-1, keepdim=True)
        removed.scatter_(1, probs.topk(min(keep, scores.shape[-1])).indices, False)
        return scores.masked_fill(removed, -math.inf)

    return process


def typical_p(mass: float, keep: int = 1) -> Processor:
    """Typical sampling: those whose surprise is nearest to the expected one, whose probabilities sum to
    `mass`. Meister et al. (2022), arXiv:2202.00666."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        logs = scores.log_softmax(-1)
        entropy = -(logs.exp() * logs).nansum(-1, keepdim=True)
        distance, order = (-logs - entropy).abs().sort()
        total = scores.gather(1, order).softmax(-1).cumsum(-1)
        last = (total < mass).sum(1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        removed = distance > distance.gather(1, last)
        removed[:, :keep] = False
        return scores.masked_fill(removed.scatter(1, order, removed), -math.inf)

    return process


def epsilon_cutoff(cutoff: float, keep: int = 1) -> Processor:
    """Those of at least that probability. Hewitt et al. (2022), arXiv:2210.15191, as eta_cutoff."""
    return lambda ids, scores: keep_best(scores, scores.softmax(-1) < cutoff, keep)


def eta_cutoff(epsilon: float, keep: int = 1) -> Processor:
    """The same, with a bound that falls where many tokens are about as probable."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        logs = scores.log_softmax(-1)
        probs = logs.exp()
        entropy = -(probs * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1, keepdim=True)
        bound = (math.sqrt(epsilon) * (-entropy).exp()).clamp(max=epsilon)
        return keep_best(scores, probs < bound, keep)

    return process


# ---- All that the settings ask for -------------------------------------------------------------------------


def processors_of(
    s: GenerationConfig,
    eos: Sequence[int],
    T: int,
    max_length: int,
    mask: Tensor | None = None,
    own: Iterable[Processor] = (),
    allowed_tokens: Callable | None = None,
    rows: int = 1,
    diversity: Processor | None = None,
) -> list[Processor]:
    """For the settings `s`, a prompt of T ids with `mask` (B, T), at most `max_length` ids in all, `rows`
    sequences for each prompt; `own` come before the filters."""
    found = biases_and_penalties(s, eos, mask, diversity)
    min_length = max(s.min_length or 0, T + s.min_new_tokens if s.min_new_tokens else 0)
    if min_length and eos:
        found.append(suppress_tokens(eos, lambda n: n < min_length))
    if allowed_tokens is not None:
        found.append(prefix_allowed_tokens(allowed_tokens, rows))
    found += forced_and_suppressed(s, eos, T, max_length)
    found += own
    if s.do_sample:
        found += filters_of(s, max(2, len(eos) + 1) if s.num_beams > 1 else 1)
    if s.renormalize_logits:
        found.append(log_normalize)
    return found


def biases_and_penalties(
    s: GenerationConfig, eos: Sequence[int], mask: Tensor | None, diversity: Processor | None
) -> list[Processor]:
    found: list[Processor] = []
    if s.sequence_bias:
        pairs = bias_pairs(s.sequence_bias)
        found.append(sequence_bias({tuple(ids): bias for ids, bias in pairs}, mask))
    if diversity is not None:
        found.append(diversity)
    if s.repetition_penalty not in (None, 1):
        found.append(repetition_penalty(s.repetition_penalty, mask))
    if s.no_repeat_ngram_size:
        found.append(no_repeat_ngrams(s.no_repeat_ngram_size, mask))
    if s.bad_words_ids:
        words = [word for word in s.bad_words_ids if list(word) not in [[id] for id in eos]]
        found.append(sequence_bias({tuple(word): -math.inf for word in words}, mask))
    return found


def forced_and_suppressed(
    s: GenerationConfig, eos: Sequence[int], T: int, max_length: int
) -> list[Processor]:
    found: list[Processor] = []
    if s.forced_bos_token_id is not None:
        found.append(force_tokens([s.forced_bos_token_id], 1))
    if forced := listed(s.forced_eos_token_id):
        found.append(force_tokens(forced, max_length - 1))
    if s.remove_invalid_values:
        found.append(remove_invalid_values)
    if s.exponential_decay_length_penalty is not None and eos:
        start, factor = s.exponential_decay_length_penalty
        found.append(exponential_decay(int(start) + T, factor, eos))
    if s.suppress_tokens:
        found.append(suppress_tokens(s.suppress_tokens))
    if s.begin_suppress_tokens:
        begin = T if T > 1 or s.forced_bos_token_id is None else T + 1
        found.append(suppress_tokens(s.begin_suppress_tokens, lambda n: n == begin))
    return found


def filters_of(s: GenerationConfig, keep: int) -> list[Processor]:
    """What sampling asks for; at least `keep` tokens are left, so that beams can go on where one stops."""
    found: list[Processor] = []
    if s.temperature not in (None, 1):
        found.append(temperature(s.temperature))
    if s.top_k:
        found.append(top_k(s.top_k, keep))
    if s.top_p is not None and s.top_p < 1:
        found.append(top_p(s.top_p, keep))
    if s.min_p is not None:
        found.append(min_p(s.min_p, keep))
    if s.typical_p is not None and s.typical_p < 1:
        found.append(typical_p(s.typical_p, keep))
    if s.epsilon_cutoff:
        found.append(epsilon_cutoff(s.epsilon_cutoff, keep))
    if s.eta_cutoff:
        found.append(eta_cutoff(s.eta_cutoff, keep))
    return found

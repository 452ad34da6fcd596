"""Beam search: several continuations of a text are followed beside each other, the best ended ones win."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .constraints import Beam, State, spread

LOW = -1e9  # as good as never, and still a number
NOBODY = -1  # in place of a token of a group that has ended


class Ended(NamedTuple):
    score: float  # sum of logarithms over length ** length_penalty
    ids: Tensor  # (new,)
    path: list[int]  # the row it went along in each step
    whole: bool = True  # whether it meets all constraints: those that do not come last

    @property
    def rank(self) -> tuple[bool, float]:
        return self.whole, self.score


class Diversity:
    """Takes `penalty` from a token's score for each time that an earlier group `chosen` it in this step.
    Vijayakumar et al. (2016), arXiv:1610.02424."""

    def __init__(self, penalty: float):
        self.penalty, self.chosen = penalty, torch.empty(0)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        B, V = len(self.chosen), scores.shape[-1]
        times = torch.stack([row[row != NOBODY].bincount(minlength=V) for row in self.chosen])
        return scores - self.penalty * times.repeat_interleave(len(scores) // B, 0)


class Item:
    """One prompt's beams, in one group: its running ones are rows of the batch, its ended ones are here."""

    def __init__(self, size: int, s: Any, room: int):
        self.size, self.s, self.room = size, s, room
        self.ended: list[Ended] = []
        self.open = self.hopeful = True  # whether a running beam may still be better than what has ended

    @property
    def full(self) -> bool:
        return len(self.ended) == self.size

    def begin(self) -> None:
        """Before a step: whether what ends in it counts."""
        self.open = self.hopeful and not (self.full and self.s.early_stopping is True)

    def add(self, ended: Ended) -> None:
        if self.open:
            self.ended = sorted([*self.ended, ended], key=lambda e: e.rank, reverse=True)[: self.size]

    def look(self, best: float, steps: int) -> None:
        """After a step: `best` is the sum of the best beam. In 5.x that is one that runs on; 4.50, which
        alone has groups and constraints, counts those that have just ended too: it goes on a step longer."""
        penalty = self.s.length_penalty
        length = self.room if self.s.early_stopping == "never" and penalty > 0 else steps
        if self.full and self.ended[-1].whole and best / length**penalty <= self.ended[-1].score:
            self.hopeful = False


def search(
    text: Any,
    s: Any,
    stops: Callable[[Tensor], Tensor] | None,
    eos: Sequence[int],
    room: int,
    scores_of: Callable[..., Tensor],
    generator: torch.Generator | None = None,
    constraints: Sequence[Any] = (),
) -> tuple[list[Tensor], Tensor, list[list[int]]]:
    """(new ids, their scores, the rows they went along), the best first, of at most `room` steps.

    `text` has a row for each prompt. `scores_of(step, chosen)` gives the logarithms of chances (rows, V)
    after all processors, where `chosen` are the tokens that earlier groups took in this step. `stops`
    (candidates (n, T + 1)) says which of them end, beside those that end with one of `eos`.
    """
    B, N, groups = text.rows, s.num_beams, s.num_beam_groups
    size = N // groups
    items = [[Item(size, s, room) for _ in range(groups)] for _ in range(B)]
    sums = torch.full((B, groups, size), LOW, device=text.ids.device)
    sums[:, :, 0] = 0.0  # all beams begin alike
    paths: list[list[int]] = [[] for _ in range(B * N)]
    states = [State(tuple(range(len(constraints))))] * (B * N)
    T, steps, going = text.ids.shape[1], 0, room > 0
    while going:
        steps += 1
        chosen = torch.empty(B, 0, dtype=torch.long, device=text.ids.device)
        rows, ends_all = [], True
        for group in range(groups):
            for b in range(B):
                items[b][group].begin()
            scores = scores_of(steps, chosen).view(B, groups, size, -1)[:, group]
            scores = scores + sums[:, group, :, None]
            V = scores.shape[-1]
            kept = min(max(2, 1 + len(eos)) * size, size * V)
            best, index = candidates(scores.flatten(1), kept, s.do_sample, generator)
            row = torch.arange(B, device=index.device)[:, None] * N + group * size + index // V
            token = index % V
            stopped = torch.isin(token, torch.tensor(eos, device=token.device, dtype=torch.long))
            if stops is not None:
                texts = torch.cat([text.ids[row.flatten()], token.view(-1, 1)], 1)
                stopped |= stops(texts).view_as(stopped)
            ended = stopped if steps < room or constraints else torch.ones_like(stopped)
            for b in range(B):
                for j in ended[b, :size].nonzero()[:, 0].tolist():
                    at, id = int(row[b, j]), int(token[b, j])
                    if not states[at].after(id, constraints).left:
                        items[b][group].add(ended_with(text.ids[at, T:], id, best[b, j], paths[at], at, s))
            best_ended = best[:, 0].tolist() if groups > 1 or constraints else None
            running = best.masked_fill(stopped, LOW).topk(size)
            sums[:, group] = running.values
            row, token = row.gather(1, running.indices), token.gather(1, running.indices)
            if constraints:
                beams = []
                for b in range(B):
                    own = slice(b * N, (b + 1) * N)
                    beams += led(row[b], token[b], sums[b, 0], scores[b], states[own], b * N, constraints)
                row, token = (
                    text.ids.new_tensor([getattr(beam, key) for beam in beams]).view(B, N)
                    for key in ("row", "token")
                )
                sums = sums.new_tensor([beam.sum for beam in beams]).view(B, 1, N)
                states = [beam.state for beam in beams]
                for i, beam in enumerate(beams if steps == room else ()):
                    at, ids = beam.row, text.ids[beam.row, T:]
                    last = ended_with(ids, beam.token, beam.sum, paths[at], at, s)
                    if beam.sum > LOW / 2:
                        items[i // N][0].add(last._replace(whole=not beam.state.left))
            rows.append((row, token))
            for b in range(B):
                items[b][group].look(float(sums[b, group, 0]) if best_ended is None else best_ended[b], steps)
            rests = torch.tensor([not items[b][group].open for b in range(B)], device=token.device)
            token = token.masked_fill(rests[:, None], NOBODY)
            chosen = torch.cat([chosen, token], 1)
            ends_all = ends_all and (steps == room or bool(stopped.all()))
        index, new = (torch.stack(part, 1).flatten() for part in zip(*rows, strict=True))
        paths = [[*paths[i], i] for i in index.tolist()]
        everyone = [item for row in items for item in row]
        full = s.early_stopping is True and all(item.full for item in everyone)
        going = any(item.hopeful for item in everyone) and not full and not ends_all
        if going:
            text.reorder(index)
            text.append(new)
    return gathered([[e for item in row for e in item.ended] for row in items], s.num_return_sequences)


def ended_with(ids: Tensor, token: int, total: Any, path: list[int], row: int, s: Any) -> Ended:
    """The beam at `row`, whose new ids were `ids`, with one more."""
    new = torch.cat([ids, ids.new_tensor([token])])
    return Ended(float(total) / len(new) ** s.length_penalty, new, [*path, row])


def led(
    row: Tensor,
    token: Tensor,
    sums: Tensor,
    scores: Tensor,
    states: list[State],
    first: int,
    constraints: Sequence[Any],
) -> list[Beam]:
    """One prompt's beams of the next step, from the best ones that do not end and from what leads each of the
    last step's on. Its rows begin at `first`."""
    triples = zip(row.tolist(), token.tolist(), sums.tolist(), strict=True)
    pool = {
        (at, id): Beam(at, id, total, states[at - first].after(id, constraints))
        for at, id, total in triples
        if total > LOW / 2
    }
    for i, state in enumerate(states):
        for id in state.steps(constraints):
            total = float(scores[i, id])
            if total > LOW / 2:  # else it is a copy of the first beam, as all others are in the beginning
                beam = Beam(first + i, id, total, state.after(id, constraints))
                pool.setdefault((first + i, id), beam)
    nothing = Beam(first, int(token[0]), LOW, states[0])  # where all that may follow is a stop id
    beams = spread(list(pool.values()), constraints, len(states)) or [nothing]
    return beams + [beams[-1]._replace(sum=LOW)] * (len(states) - len(beams))


def candidates(scores: Tensor, kept: int, do_sample: bool, generator: Any) -> tuple[Tensor, Tensor]:
    """(B, kept) best of (B, beams * V), or drawn without putting back."""
    if not do_sample:
        return scores.topk(kept)
    index = torch.multinomial(scores.softmax(-1), kept, generator=generator)
    return scores.gather(1, index), index


def gathered(items: list[list[Ended]], count: int) -> tuple[list[Tensor], Tensor, list[list[int]]]:
    """Of each prompt the `count` best. ValueError where fewer could be told apart."""
    if (fewest := min(map(len, items))) < count:
        raise ValueError(f"only {fewest} texts came to an end, and num_return_sequences is {count}")
    best = [e for ended in items for e in sorted(ended, key=lambda e: e.rank, reverse=True)[:count]]
    return [e.ids for e in best], torch.tensor([e.score for e in best]), [e.path for e in best]

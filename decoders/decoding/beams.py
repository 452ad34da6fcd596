"""Beam search: several continuations of a prompt are followed together, the best finished ones win.

Letters: B prompts, N beams each, in G groups of M = N / G beams, V vocabulary. The rows of the batch are the
beams of the first prompt, then those of the second ...
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .constraints import Beam, Constraint, Progress, allocate
from .logits_processors import NO_TOKEN
from .settings import GenerationConfig
from .state import Generation, repeated, sample

NEVER = -1e9  # a log-probability as good as -inf, and still a number


class Hypothesis(NamedTuple):
    """A beam that is finished."""

    score: float  # sum of log-probabilities over length ** length_penalty
    ids: Tensor  # (new,)
    path: list[int]  # the row it went along in each step
    complete: bool = True  # whether it meets all constraints: those that do not come last

    @property
    def rank(self) -> tuple[bool, float]:
        return self.complete, self.score


class BeamHypotheses:
    """The finished beams of one prompt, in one group of beams, and whether unfinished ones may still be
    better."""

    def __init__(self, size: int, s: GenerationConfig, max_new_tokens: int):
        self.size, self.s, self.max_new_tokens = size, s, max_new_tokens
        self.finished: list[Hypothesis] = []
        self.accepting = self.can_improve = True

    @property
    def full(self) -> bool:
        return len(self.finished) == self.size

    def begin_step(self) -> None:
        """Whether what finishes in this step counts."""
        self.accepting = self.can_improve and not (self.full and self.s.early_stopping is True)

    def add(self, hypothesis: Hypothesis) -> None:
        if self.accepting:
            ranked = sorted([*self.finished, hypothesis], key=lambda h: h.rank, reverse=True)
            self.finished = ranked[: self.size]

    def end_step(self, best: float, steps: int) -> None:
        """`best` is the sum of the best beam. In Transformers 5 that is one that runs on; 4.50, which alone
        has groups and constraints, counts those that have just finished too: it goes on a step longer."""
        penalty = self.s.length_penalty
        length = self.max_new_tokens if self.s.early_stopping == "never" and penalty > 0 else steps
        if self.full and self.finished[-1].complete and best / length**penalty <= self.finished[-1].score:
            self.can_improve = False


class Candidates(NamedTuple):
    """What may follow in one group: the best or sampled continuations, of each prompt a few more than
    beams."""

    sums: Tensor  # (B, candidates) log-probabilities, summed
    rows: Tensor  # (B, candidates) the beam that each continues
    tokens: Tensor  # (B, candidates)
    stopped: Tensor  # (B, candidates) whether it ends there


class BeamSearch:
    def __init__(self, run: Generation):
        self.run, self.sequences, self.s = run, run.sequences, run.s
        self.B, self.N, self.G = run.sequences.rows, run.s.num_beams, run.s.num_beam_groups
        self.M = self.N // self.G
        self.constraints = run.constraints
        self.device = run.sequences.buffer.device
        self.hypotheses = [
            [BeamHypotheses(self.M, run.s, run.max_new_tokens) for _ in range(self.G)] for _ in range(self.B)
        ]
        self.sums = first_sums(self.B, self.G, self.M, self.device)
        self.paths: list[list[int]] = [[] for _ in range(self.B * self.N)]
        self.progress = [Progress(tuple(range(len(self.constraints))))] * (self.B * self.N)
        self.T, self.steps = run.sequences.ids.shape[1], 0

    def run_all(self) -> None:
        """Search to the end, and leave the best in the results of the run."""
        prompts = self.sequences.ids
        while self.step():
            pass
        best = self.best()
        longest = max(len(h.ids) for h in best)
        new = [F.pad(h.ids, (0, longest - len(h.ids)), value=self.run.pad) for h in best]
        prompts = prompts.repeat_interleave(self.s.num_return_sequences, 0)
        results = self.run.results
        results["sequences"] = torch.cat([prompts, torch.stack(new)], 1)
        if self.s.return_dict_in_generate:
            results["sequences_scores"] = torch.tensor([h.score for h in best])
            paths = [h.path + [-1] * (longest - len(h.path)) for h in best]
            results["beam_indices"] = torch.tensor(paths)

    def best(self) -> list[Hypothesis]:
        """Of each prompt the `num_return_sequences` best. ValueError where fewer could be told apart."""
        count, found = self.s.num_return_sequences, []
        for groups in self.hypotheses:
            finished = [hypothesis for group in groups for hypothesis in group.finished]
            if len(finished) < count:
                raise ValueError(
                    f"only {len(finished)} texts came to an end, and num_return_sequences is {count}"
                )
            found += sorted(finished, key=lambda h: h.rank, reverse=True)[:count]
        return found

    # ---- A step ----

    def step(self) -> bool:
        """One token more for every beam; False: the search is over."""
        self.steps += 1
        self.forward()
        rows, tokens = [], []
        self.chosen = torch.empty(self.B, 0, dtype=torch.long, device=self.device)
        self.all_stopped = True
        for group in range(self.G):
            row, token = self.step_of_group(group)
            rows.append(row)
            tokens.append(token)
        self.run.note(self.output, self.logits, torch.stack(self.processed, 1).flatten(0, 2))
        index = torch.stack(rows, 1).flatten()
        self.paths = [[*self.paths[row], row] for row in index.tolist()]
        if self.is_over():
            return False
        self.sequences.reorder(index)
        self.sequences.append(torch.stack(tokens, 1).flatten())
        return True

    def forward(self) -> None:
        """Log-probabilities (B * N, V) of what may follow, before processors."""
        sequences = self.sequences
        self.output = sequences.forward(**self.run.wanted)
        self.logits = sequences.logits(self.output)
        self.log_probs = sequences.guide(self.output, self.logits.log_softmax(-1))
        self.processed: list[Tensor] = []  # (B, M, V) of each group
        if self.steps == 1:  # the prompt was read once for all beams
            sequences.expand(self.N)
            self.logits = self.logits.repeat_interleave(self.N, 0)
            self.log_probs = self.log_probs.repeat_interleave(self.N, 0)
            self.output = repeated(self.output, self.N)

    def step_of_group(self, group: int) -> tuple[Tensor, Tensor]:
        """(B, M) rows and (B, M) tokens with which the group runs on."""
        own = [groups[group] for groups in self.hypotheses]
        for hypotheses in own:
            hypotheses.begin_step()
        scores = self.scores(group)
        candidates = self.candidates(group, scores)
        self.finish(own, candidates)
        row, token = self.select_unfinished(group, candidates)
        if self.constraints:
            row, token = self.select_constrained(row, token, scores)
        for b, hypotheses in enumerate(own):
            hypotheses.end_step(float(self.best_sum(group, candidates)[b]), self.steps)
        ended = torch.tensor([not hypotheses.accepting for hypotheses in own], device=self.device)
        chosen = token.masked_fill(ended[:, None], NO_TOKEN)
        self.chosen = torch.cat([self.chosen, chosen], 1)
        last = self.steps == self.run.max_new_tokens
        self.all_stopped = self.all_stopped and (last or bool(candidates.stopped.all()))
        return row, token

    def scores(self, group: int) -> Tensor:
        """(B, M, V) sums of log-probabilities with one token more."""
        if self.run.diversity:
            self.run.diversity.chosen = self.chosen
        processed = self.run.process(self.log_probs, self.sequences.ids)
        own = processed.view(self.B, self.G, self.M, -1)[:, group]
        self.processed.append(own)
        return own + self.sums[:, group, :, None]

    def candidates(self, group: int, scores: Tensor) -> Candidates:
        V = scores.shape[-1]
        count = min(
            max(2, 1 + len(self.run.eos)) * self.M, self.M * V
        )  # enough where all stop ids are among them
        sums, index = best_or_sampled(scores.flatten(1), count, bool(self.s.do_sample), self.run.generator)
        first = torch.arange(self.B, device=self.device)[:, None] * self.N + group * self.M
        rows, tokens = first + index // V, index % V
        return Candidates(sums, rows, tokens, self.stopped(rows, tokens))

    def stopped(self, rows: Tensor, tokens: Tensor) -> Tensor:
        eos = torch.tensor(self.run.eos, device=self.device, dtype=torch.long)
        stopped = torch.isin(tokens, eos)
        if self.run.criteria:
            ids = torch.cat([self.sequences.ids[rows.flatten()], tokens.view(-1, 1)], 1)
            stopped |= self.run.stopped(ids, None).view_as(stopped)
        return stopped

    def finish(self, own: Sequence[BeamHypotheses], candidates: Candidates) -> None:
        """Candidates that end become hypotheses, if they are among the best M."""
        ends = candidates.stopped
        if self.steps == self.run.max_new_tokens and not self.constraints:
            ends = torch.ones_like(ends)
        for b, j in ends[:, : self.M].nonzero().tolist():
            row, token = int(candidates.rows[b, j]), int(candidates.tokens[b, j])
            if not self.progress[row].after(token, self.constraints).unmet:
                own[b].add(self.hypothesis(row, token, float(candidates.sums[b, j])))

    def hypothesis(self, row: int, token: int, total: float) -> Hypothesis:
        """The beam of that row, with one token more."""
        ids = self.sequences.ids[row, self.T :]
        ids = torch.cat([ids, ids.new_tensor([token])])
        return Hypothesis(normalized(total, len(ids), self.s), ids, [*self.paths[row], row])

    def select_unfinished(self, group: int, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """(B, M) rows and tokens of the best candidates that do not end."""
        unfinished = candidates.sums.masked_fill(candidates.stopped, NEVER).topk(self.M)
        self.sums[:, group] = unfinished.values
        return candidates.rows.gather(1, unfinished.indices), candidates.tokens.gather(1, unfinished.indices)

    def best_sum(self, group: int, candidates: Candidates) -> Tensor:
        """(B,) sums of the best beams, as `end_step` compares them."""
        if self.G > 1 or self.constraints:
            return candidates.sums[:, 0]
        return self.sums[:, group, 0]

    def is_over(self) -> bool:
        everyone = [hypotheses for groups in self.hypotheses for hypotheses in groups]
        all_full = self.s.early_stopping is True and all(h.full for h in everyone)
        return all_full or self.all_stopped or not any(h.can_improve for h in everyone)

    # ---- Constraints ----

    def select_constrained(self, row: Tensor, token: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) rows and tokens of the beams of the next step, from the best that run on and from what
        brings each beam nearer to a constraint."""
        beams: list[Beam] = []
        for b in range(self.B):
            first = b * self.N
            progress = self.progress[first : first + self.N]
            best = zip(row[b].tolist(), token[b].tolist(), self.sums[b, 0].tolist(), strict=True)
            pool = constrained_pool(list(best), scores[b], progress, first, self.constraints)
            nothing = Beam(first, int(token[b, 0]), NEVER, progress[0])  # all that may follow is a stop id
            kept = allocate(pool, self.constraints, self.N) or [nothing]
            beams += kept + [kept[-1]._replace(sum=NEVER)] * (self.N - len(kept))
        self.progress = [beam.progress for beam in beams]
        self.sums = self.sums.new_tensor([beam.sum for beam in beams]).view(self.B, 1, self.N)
        if self.steps == self.run.max_new_tokens:
            self.finish_constrained(beams)
        rows = row.new_tensor([beam.row for beam in beams]).view(self.B, self.N)
        return rows, token.new_tensor([beam.token for beam in beams]).view(self.B, self.N)

    def finish_constrained(self, beams: Sequence[Beam]) -> None:
        """In the last step: those that meet all constraints come first."""
        for i, beam in enumerate(beams):
            if beam.sum > NEVER / 2:
                hypothesis = self.hypothesis(beam.row, beam.token, beam.sum)
                self.hypotheses[i // self.N][0].add(hypothesis._replace(complete=not beam.progress.unmet))


def first_sums(B: int, G: int, M: int, device: Any) -> Tensor:
    """(B, G, M): in the first step all beams are alike, so that one of each group counts."""
    sums = torch.full((B, G, M), NEVER, device=device)
    sums[:, :, 0] = 0.0
    return sums


def normalized(total: float, length: int, s: GenerationConfig) -> float:
    return total / length**s.length_penalty


def best_or_sampled(
    scores: Tensor, count: int, do_sample: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The best `count` of (B, beams * V), or sampled without replacement, the best first: values and indices
    (B, count)."""
    if not do_sample:
        return scores.topk(count)
    index = sample(scores.softmax(-1), generator, count)
    return best_first(scores.gather(1, index), index)


def best_first(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """As Transformers from 5.24 on, where only the first of what was sampled may end a beam: older versions
    leave the order of sampling."""
    values, order = values.sort(dim=1, descending=True)
    return values, index.gather(1, order)


def constrained_pool(
    best: Sequence[tuple[int, int, float]],
    scores: Tensor,
    progress: Sequence[Progress],
    first: int,
    constraints: Sequence[Constraint],
) -> list[Beam]:
    """One prompt's candidates: the `best` (row, token, sum), and what brings each beam nearer to a
    constraint. `scores` (N, V); its rows begin at `first`."""
    pool = {
        (row, token): Beam(row, token, total, progress[row - first].after(token, constraints))
        for row, token, total in best
        if total > NEVER / 2
    }
    for i, own in enumerate(progress):
        for token in own.next_tokens(constraints):
            total = float(scores[i, token])
            if total > NEVER / 2:  # else it is a copy of the first beam, as all others are in the beginning
                beam = Beam(first + i, token, total, own.after(token, constraints))
                pool.setdefault((first + i, token), beam)
    return list(pool.values())

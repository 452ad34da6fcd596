"""Contrastive search: of the likeliest tokens that whose hidden state is least like those before.

Su et al. (2022), arXiv:2202.06417: the candidate that makes (1 - alpha) * probability - alpha * similarity
largest, where similarity is the cosine to the nearest earlier hidden state.

Letters: B prompts, k candidates each, n tokens so far, C hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import Generation, rows_of


class ContrastiveSearch:
    """Each prompt has k rows, one for each candidate, which one pass reads a token ahead."""

    def __init__(self, run: Generation):
        self.run, self.sequences = run, run.sequences
        self.k, self.alpha = run.s.top_k or 0, run.s.penalty_alpha or 0.0
        self.wanted = {**run.wanted, "output_hidden_states": True}
        device = run.sequences.buffer.device
        self.prompts = torch.arange(run.sequences.rows, device=device)
        self.unfinished = torch.ones_like(self.prompts, dtype=torch.bool)
        self.eos = torch.tensor(run.eos, device=device, dtype=torch.long)

    def steps(self) -> Iterator[Tensor]:
        sequences = self.sequences
        if sequences.cache is not None:  # the hidden states of what it holds are needed too
            sequences.cache.truncate(0)
        self.output = sequences.forward(**self.wanted)
        self.logits = sequences.logits(self.output)  # (B, V)
        self.past = unit_states(self.output)  # (B, n, C)
        mask = sequences.mask
        self.padding = torch.zeros_like(self.past[..., 0]).bool() if mask is None else mask == 0
        sequences.expand(self.k)
        try:
            while sequences.length < sequences.prompt_length + self.run.max_new_tokens:
                yield self.step()
                if not self.unfinished.any():
                    return
        finally:  # a row for each prompt again, and all but its last token
            if sequences.cache is not None:  # where each length has its own frequencies there is none
                sequences.cache.truncate(sequences.length - 1)
                sequences.cache.reorder(self.prompts * self.k)

    def step(self) -> Tensor:
        """(B,) new ids."""
        run, sequences, k = self.run, self.sequences, self.k
        scores = run.process(self.logits, sequences.ids[::k])
        run.note(self.output, self.logits, scores)
        probs, tokens = scores.softmax(-1).topk(k)  # (B, k)
        sequences.append(tokens.flatten())
        output = sequences.forward(**self.wanted)
        states = unit_states(output).unflatten(0, (-1, k))  # (B, k, 1, C)
        if states.shape[2] > 1:  # the frequencies have changed with the length: all was read anew
            self.past = states[:, 0, :-1]
        states = states[:, :, -1]  # (B, k, C)
        best = self.best(probs, states)  # (B,)
        self.past = torch.cat([self.past, states[self.prompts, best][:, None]], 1)
        self.padding = F.pad(self.padding, (0, 1))
        row = self.prompts * k + best
        self.logits, self.output = sequences.logits(output)[row], rows_of(output, row)
        new = torch.where(self.unfinished, tokens[self.prompts, best], run.pad)
        sequences.reorder(row.repeat_interleave(k))
        sequences.buffer[:, sequences.length - 1] = new.repeat_interleave(k)
        self.unfinished &= ~torch.isin(new, self.eos)
        if run.criteria:
            self.unfinished &= ~run.stopped(sequences.ids[::k], scores)
        run.results["sequences"] = sequences.ids[::k]
        return new

    def best(self, probs: Tensor, states: Tensor) -> Tensor:
        """(B,) which candidate wins, of probabilities (B, k) and unit hidden states (B, k, C)."""
        similarity = states @ self.past.transpose(1, 2)  # (B, k, n)
        similarity = similarity.masked_fill(self.padding[:, None], -torch.inf).amax(-1)
        return ((1 - self.alpha) * probs - self.alpha * similarity).argmax(-1)


def unit_states(output: Any) -> Tensor:
    """The last layer's hidden states of a pass, of length 1 each: their products are cosines."""
    return F.normalize(output.hidden_states[-1].float(), dim=-1)

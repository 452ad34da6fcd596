"""Speculative (assisted) decoding: tokens are drafted cheaply, and the model checks several in one pass.

Leviathan et al. (2022), arXiv:2211.17192. Greedy gives the text of plain greedy, up to rounding: a pass over
several tokens sums in another order. Sampling keeps the distribution. Drafts come from an earlier place of
the text (prompt lookup) or from a smaller model of the same vocabulary (the assistant).
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .sequences import Sequences, lm_head_of, rope_varies, text_config_of
from .state import Generation, sample


class AssistedDecoding:
    def __init__(self, run: Generation):
        self.run, self.sequences = run, run.sequences
        s = run.s
        self.lookup = s.prompt_lookup_num_tokens is not None
        most = s.prompt_lookup_num_tokens if self.lookup else s.num_assistant_tokens
        self.most = most or 20
        self.size = min(self.most, 4) if self.lookup else self.most  # tokens to draft in the next round
        self.drafter = PromptLookup(s.max_matching_ngram_size or 2) if self.lookup else AssistantModel(run)
        self.stats: dict[str, Any] = {"passes": 0, "drafted": 0, "accepted": 0, "rounds": []}
        run.results["stats"] = self.stats
        self.done = False

    def steps(self) -> Iterator[Tensor]:
        end = self.sequences.prompt_length + self.run.max_new_tokens
        while self.sequences.length < end and not self.done:
            yield from self.round(end)  # whoever stops here finds no rejected token in the cache

    def round(self, end: int) -> list[Tensor]:
        """Draft, check in one pass, keep what is accepted and one token more: (1,) ids each."""
        sequences, n = self.sequences, self.sequences.ids.shape[1]
        limit = tokens_before_rope_switch(self.run.model, sequences.length, sequences.mask)
        most = min(self.size, end - sequences.length - 1, limit)
        drafted, probs = self.drafter.draft(sequences.ids, int(most))
        if len(drafted):
            sequences.append(drafted[None])
        output = sequences.forward(keep=len(drafted) + 1, **self.run.wanted)
        new, accepted = self.verify(output, n, drafted, probs)
        sequences.truncate(sequences.ids.shape[1])
        self.count(drafted, accepted)
        return new

    def verify(
        self, output: Any, n: int, drafted: Tensor, probs: list[Tensor] | None
    ) -> tuple[list[Tensor], int]:
        """The new ids after the first `n`, drafted ones while they are accepted, then one of the model's own;
        and how many were accepted."""
        run, sequences, k = self.run, self.sequences, len(drafted)
        logits, new, accepted = output.logits[0].float(), [], 0
        for i in range(k + 1):
            scores = run.process(logits[i : i + 1], sequences.ids[:, : n + i])
            if i < k and run.s.do_sample:
                token = self.accept_or_sample(scores, drafted[i], probs[i] if probs else None)
            else:
                token = run.choose(scores)
            as_drafted = i < k and int(token) == int(drafted[i])
            accepted += as_drafted
            sequences.length = sequences.offset + n + i  # after the ids before it
            sequences.append(token)
            run.note(step_of(output, i, k), logits[i : i + 1], scores)
            new.append(token)
            stopped = bool(run.criteria) and bool(run.stopped(sequences.ids, scores)[0])
            self.done = int(token) in run.eos or stopped
            if self.done or not as_drafted:
                break
        return new, accepted

    def accept_or_sample(self, scores: Tensor, token: Tensor, drafted: Tensor | None) -> Tensor:
        """(1,) the drafted `token` with probability min(1, p / q), else one from what p has more than q.

        p are the model's probabilities of `scores` (1, V), q those that it was `drafted` with (V,), None
        where it was certain.
        """
        p = scores.softmax(-1)[0]
        q = 1.0 if drafted is None else float(drafted[token])
        draw = torch.rand((), generator=self.run.generator, device=p.device)
        if float(draw) * q < float(p[token]):
            return token[None]
        return sample(leftover(p, token, drafted)[None], self.run.generator)

    def count(self, drafted: Tensor, accepted: int) -> None:
        """Statistics of a round, and how many tokens the next one drafts."""
        k = len(drafted)
        self.stats["passes"] += 1
        self.stats["drafted"] += k
        self.stats["accepted"] += accepted
        self.stats["rounds"].append((drafted.tolist(), accepted))
        if self.run.s.num_assistant_tokens_schedule in (None, "constant") or not k:
            return
        if accepted == k:
            self.size = min(self.most, 2 * self.size if self.lookup else self.size + 2)
        else:
            self.size = max(1, accepted + 1 if self.lookup else self.size - 1)


def leftover(p: Tensor, token: Tensor, drafted: Tensor | None) -> Tensor:
    """(V,) what is sampled from after a rejection, not yet normalised."""
    if drafted is None:
        return p.index_fill(0, token, 0.0)
    return (p - drafted).clamp(min=0)


class PromptLookup:
    """Drafts what followed the last time that the text had the same last tokens."""

    def __init__(self, longest: int):
        self.longest = longest

    def draft(self, ids: Tensor, most: int) -> tuple[Tensor, None]:
        """(k,) ids, k at most `most`, after `ids` (1, n)."""
        n = ids.shape[1]
        for size in range(min(self.longest, n - 1), 0, -1):
            ngrams = ids[0, :-1].unfold(0, size, 1)
            matches = (ngrams == ids[0, n - size :]).all(1).nonzero()[:, 0]
            if most > 0 and len(matches):
                start = int(matches[-1]) + size
                return ids[0, start : min(start + most, n)], None
        return ids[0, :0], None


class AssistantModel:
    """Drafts what a smaller model of the same vocabulary says."""

    def __init__(self, run: Generation):
        self.run, self.model = run, run.arguments.assistant_model
        self.check()
        text = run.sequences
        names = inspect.signature(self.model.forward).parameters
        inputs = {name: value for name, value in text.inputs.items() if name in names}
        mask = None if text.mask is None else text.mask.clone()
        self.sequences = Sequences(self.model, text.ids.clone(), mask, inputs, run.max_new_tokens)

    def check(self) -> None:
        """ValueError for what is no model of this package, or one of another vocabulary."""
        if not hasattr(self.model, "prepare_inputs"):
            kind = type(self.model).__name__
            message = "assistant_model must be a model of this package, as weights.load gives"
            raise ValueError(f"{message}, not {kind}")
        own, other = (lm_head_of(model).out_features for model in (self.run.model, self.model))
        if own != other:
            raise ValueError(
                f"assistant_model has a vocabulary of {other} tokens, the model one of {own}: "
                "they must be the same"
            )
        if self.run.sequences.embeds is not None:
            raise ValueError("assistant_model cannot read inputs_embeds: give input_ids")

    def draft(self, ids: Tensor, most: int) -> tuple[Tensor, list[Tensor] | None]:
        """(k,) ids, k at most `most`, after `ids` (1, n), and when sampling the probabilities of each."""
        run, sequences = self.run, self.sequences
        self.follow(ids)
        most = self.limit(most)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        while len(tokens) < most:
            scores = run.process(sequences.logits(sequences.forward()), sequences.ids)
            token = run.choose(scores)
            tokens.append(token)
            probs.append(scores.softmax(-1)[0])
            sequences.append(token)
            threshold = run.s.assistant_confidence_threshold or 0.0
            if int(token) in run.eos or float(probs[-1][token]) < threshold:
                break
        return torch.cat(tokens) if tokens else ids[0, :0], probs if run.s.do_sample else None

    def follow(self, ids: Tensor) -> None:
        """Take over `ids` (1, n), of which at most the newest is then not cached."""
        own = self.sequences.ids[:, : ids.shape[1]]
        same = int((own == ids[:, : own.shape[1]]).all(0).long().cumprod(0).sum())
        self.sequences.truncate(min(same, ids.shape[1] - 1))
        self.sequences.append(ids[:, self.sequences.ids.shape[1] :])

    def limit(self, most: int) -> int:
        """As many of `most` as the assistant's positions and frequencies allow."""
        n, positions = self.sequences.ids.shape[1], getattr(self.model, "max_positions", None)
        allowed = tokens_before_rope_switch(self.model, self.sequences.length, self.sequences.mask)
        most = int(min(most, allowed))
        return most if positions is None else min(most, positions - n)


def tokens_before_rope_switch(model: Any, n: int, mask: Tensor | None) -> int | float:
    """How many tokens may follow n in one pass as they would one by one, where a model gives longer texts
    other rotary frequencies (longrope, dynamic NTK scaling)."""
    if not rope_varies(model):
        return math.inf
    config = text_config_of(model)
    n = n if mask is None else int(mask.sum())
    limit = getattr(config, "original_max_position_embeddings", None)
    if limit is None:  # dynamic: past the limit every length has its own
        return max(0, config.max_position_embeddings - n)
    return math.inf if n > limit else limit - n


def step_of(output: Any, i: int, k: int) -> Any:
    """What was recorded of a pass over what was new and k drafted tokens, for the i-th token after it: as if
    each had come by a pass of its own."""

    def cut(name: str) -> Any:
        parts = getattr(output, name)
        if parts is None or not k:
            return parts
        T, S = parts[0].shape[-2], parts[0].shape[-1]
        queries = slice(0 if i == 0 else T - k - 1 + i, T - k + i)
        if name == "hidden_states":
            return tuple(part[:, queries] for part in parts)
        return tuple(part[:, :, queries, : S - k + i] for part in parts)

    return output._replace(attentions=cut("attentions"), hidden_states=cut("hidden_states"))

"""A test of the tests: each of these mistakes in a strategy must make a comparison fail."""

import inspect
import sys
import textwrap

import pytest

from decoders.decoding import assisted, beams, constraints, contrastive, dola, guidance, sequences
from decoders.decoding import logits_processors as processors
from tests import test_generation as tests
from tests.families import GPT_NEO, PHI, PHI3

pytest.importorskip("transformers")


def against_5(what: str, table: dict, padded: bool = False, family=PHI, **extra):
    compare = ("scores", "logits", *(("sequences_scores", "beam_indices") if table is tests.BEAMS else ()))
    return lambda: tests.both(
        family,
        padded,
        {**({"do_sample": True} if table is tests.SAMPLING else {}), **table[what], **extra},
        compare,
    )


def against_4(what: str, family=PHI):
    return lambda: tests.test_lost_strategies_equal_transformers_4_50(family, what)


def beam(what: str, padded: bool = False, family=PHI):
    return against_5(what, tests.BEAMS, padded, family)


def greedy(what: str, padded: bool = False):
    return against_5(what, tests.GREEDY, padded)


def sampled(what: str):
    return against_5(what, tests.SAMPLING)


SEARCH, SEQUENCES, HYPOTHESES = beams.BeamSearch, sequences.Sequences, beams.BeamHypotheses
CONTRASTIVE, ASSISTED = contrastive.ContrastiveSearch, assisted.AssistedDecoding
LOOKUP_OF_3000 = lambda: tests.test_assisted_sampling_keeps_the_distribution("lookup", 3000)  # noqa: E731
ASSISTANT_OF_3000 = lambda: tests.test_assisted_sampling_keeps_the_distribution("assistant", 3000)  # noqa: E731

# What is wrong: (where, what stands there, what is put there, the test that must fail)
MISTAKES = {
    "the length of the prompt's last token counts in the penalty": (beams.normalized, "length**", "(length + 1) **", beam("all")),
    "no length penalty": (beams.normalized, "/ length**s.length_penalty", "", beam("all")),
    "probabilities instead of their logarithms": (SEARCH.forward, "logits.log_softmax(-1)", "logits.softmax(-1)", beam("four")),
    "logits instead of logarithms": (SEARCH.forward, "self.logits.log_softmax(-1)", "self.logits", beam("four")),
    "a beam that is not among the best may end": (SEARCH.finish, "ends[:, : self.M]", "ends", beam("no penalty", family=GPT_NEO)),
    "all beams begin": (beams.first_sums, "sums[:, :, 0] = 0.0", "sums[:] = 0.0", beam("four")),
    "too few candidates": (SEARCH.candidates, "max(2, 1 + len(self.run.eos)) * self.M", "self.M", beam("seven", family=GPT_NEO)),
    "finished beams run on": (SEARCH.select_unfinished, "candidates.sums.masked_fill(candidates.stopped, NEVER)", "candidates.sums", beam("seven", family=GPT_NEO)),
    "the cache stays where it was": (SEQUENCES.reorder, "in self.cache or ()", "in ()", beam("four")),
    "the cache moves from the second new token on": (SEQUENCES.reorder, "slice(self.prompt_length, None)", "slice(self.prompt_length + 1, None)", beam("four")),
    "the ids stay where they were": (SEQUENCES.reorder, "self.buffer[moved, new] = self.buffer[source, new]", "pass", beam("four")),
    "hope without length penalty": (HYPOTHESES.end_step, "best / length**penalty", "best", beam("many stops, False, 2.0")),
    "never is as False": (HYPOTHESES.end_step, '== "never"', '== "no"', tests.test_never_looks_to_the_last_length),
    "an early stop in the middle of a step": (HYPOTHESES.add, "if self.accepting:", "if self.can_improve and not self.full:", beam("many stops, True, 2.0", family=GPT_NEO)),
    "sampled beams are the best ones": (beams.best_or_sampled, "if not do_sample:", "if True:", beam("sampled")),
    "repeated tokens get likelier": (processors.repetition_penalty, "old < 0", "old > 0", greedy("repetition_penalty")),
    "padding earns a penalty": (processors.repetition_penalty, "without_padding(ids, mask)", "ids",
                                greedy("repetition_penalty", padded=True)),
    "the first of an n-gram is banned": (processors.no_repeat_ngrams, "start, -1]", "start, 0]", greedy("no_repeat_ngram_size 2")),
    "n-grams are one shorter": (processors.no_repeat_ngrams, "def process(", "n = n - 1\n\n    def process(", greedy("no_repeat_ngram_size 3")),
    "a sequence's beginning is not looked at": (processors.sequence_bias, "torch.where(matches, bias, 0.0)", "bias", greedy("sequence_bias")),
    "one token too many before a stop id": (processors.processors_of, "n < min_length", "n <= min_length", greedy("min_new_tokens")),
    "the length grows by sums": (processors.exponential_decay, "factor**steps", "factor * steps", greedy("exponential_decay")),
    "the last token is forced a step early": (processors.forced_and_suppressed, "max_length - 1", "max_length - 2", greedy("forced_eos_token_id")),
    "suppressed in the beginning only": (processors.forced_and_suppressed, "suppress_tokens(s.suppress_tokens)", "suppress_tokens(s.suppress_tokens, lambda n: n == T)", greedy("suppress_tokens")),
    "guidance from the wrong end": (guidance.GuidedSequences.guide, "away + self.scale", "logits.log_softmax(-1) + self.scale", greedy("guidance")),
    "temperature multiplies": (processors.temperature, "scores / value", "scores * value", sampled("temperature")),
    "top_p keeps the unlikely": (processors.top_p, "<= 1 - p", "<= p", sampled("top_p")),
    "top_p before top_k": (processors.filters_of, "if s.top_k:", "if s.top_k and not s.top_p:", sampled("all")),
    "min_p of all": (processors.min_p, "probs.amax(-1, keepdim=True)", "1.0", sampled("min_p")),
    "typical is probable": (processors.typical_p, "(-logs - entropy)", "(-logs)", sampled("typical_p")),
    "epsilon of the best": (processors.epsilon_cutoff, "scores.softmax(-1) < cutoff", "scores.softmax(-1) < cutoff * scores.softmax(-1).amax(-1, keepdim=True)", sampled("epsilon_cutoff")),
    "eta without the root": (processors.eta_cutoff, "math.sqrt(epsilon)", "epsilon", sampled("eta_cutoff")),
    "each prompt's sequences far apart": (SEQUENCES.expand, ".repeat_interleave(times)", ".repeat(times)", sampled("three of each")),
    "similarity and probability change places": (CONTRASTIVE.best, "(1 - self.alpha) * probs - self.alpha * similarity", "self.alpha * probs - (1 - self.alpha) * similarity", against_4("contrastive, two, whole")),
    "similarity to padding": (CONTRASTIVE.best, ".masked_fill(self.padding[:, None], -torch.inf)", "", against_4("contrastive, no repeats, padded", PHI3)),
    "similarity by length": (contrastive.unit_states, "F.normalize(output.hidden_states[-1].float(), dim=-1)", "output.hidden_states[-1].float()", against_4("contrastive, whole")),
    "DoLa adds": (dola.DoLa.__call__, "last - base", "last + base", against_4("dola high, row 0")),
    "DoLa keeps all": (dola.DoLa.__call__, "math.log(0.1)", "math.log(1e-9)", against_4("dola high, row 0", GPT_NEO)),
    "DoLa takes the nearest layer": (dola.DoLa.__call__, "argmax(0)", "argmin(0)", against_4("dola list, row 0", PHI3)),
    "groups come together": (processors.Diversity.__call__, "scores - self.penalty", "scores + self.penalty", against_4("two groups, whole")),
    "groups do not see each other": (SEARCH.step_of_group, "self.chosen = torch.cat([self.chosen, chosen], 1)", "pass", against_4("two groups, whole")),
    "only the best bank": (constraints.allocate, "key=lambda r: r[:2]", "key=lambda r: (r[1], r[0])", tests.test_every_bank_of_constraints_keeps_its_best),
    "constraints count as met": (constraints.Progress.bank, "len(constraints) - len(self.unmet)", "0", against_4("two phrases, whole")),
    "nothing leads on": (beams.constrained_pool, "own.next_tokens(constraints)", "()", against_4("word, whole")),
    "a rejected token may come again": (assisted.leftover, "p.index_fill(0, token, 0.0)", "p", LOOKUP_OF_3000),
    "what the assistant would say comes again": (assisted.leftover, "(p - drafted).clamp(min=0)", "p", ASSISTANT_OF_3000),
    "all that is drafted is accepted": (ASSISTED.accept_or_sample, "< float(p[token])", "< 1.0", ASSISTANT_OF_3000),
    "the cache keeps what was rejected": (ASSISTED.round, "sequences.truncate(sequences.ids.shape[1])", "pass", lambda: tests.test_assisted_greedy_gives_the_text_of_greedy(GPT_NEO, "lookup", {})),
    "processors see too long a text": (ASSISTED.verify, "sequences.ids[:, : n + i]", "sequences.ids",
                                       lambda: tests.test_assisted_greedy_gives_the_text_of_greedy(GPT_NEO, "the same model", {"no_repeat_ngram_size": 1})),
    "passes lead over the switch": (assisted.tokens_before_rope_switch, "if not rope_varies(model):", "if True:", tests.test_assisted_decoding_goes_over_the_switch_of_frequencies),
}  # fmt: skip


def put(monkeypatch, function, old: str, new: str) -> None:
    """The function anew, with other words in it, where it stood."""
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, f"{old!r} does not stand in {function.__qualname__}"
    module = owner = sys.modules[function.__module__]
    for part in function.__qualname__.split(".")[:-1]:
        owner = getattr(owner, part)
    made: dict = {}
    exec(compile(source.replace(old, new), "<mistake>", "exec"), {**vars(module)}, made)
    name = function.__name__
    rooms = [room for key, room in sys.modules.items() if key.startswith("decoders.decoding")]
    for place in (owner, *rooms, tests):  # also where it was imported by name
        if getattr(place, name, None) is function:
            monkeypatch.setattr(place, name, made[name])


LONG = (  # thousands of texts each
    "a rejected token may come again",
    "what the assistant would say comes again",
    "all that is drafted is accepted",
)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.proof if what in LONG else ()) for what in MISTAKES]
)
def test_a_wrong_strategy_is_noticed(what, monkeypatch):
    function, old, new, check = MISTAKES[what]
    check()
    put(monkeypatch, function, old, new)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        check()

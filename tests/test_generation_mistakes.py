"""A test of the tests: each of these mistakes in a strategy must make a comparison fail."""

import inspect
import sys
import textwrap

import pytest

from decoders.decoding import beams, constraints, texts
from decoders.decoding import logits_processors as processors
from decoders.decoding import loop as generation
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


RUN, TEXT, ITEM = generation.Run, texts.Text, beams.Item
MISTAKES = {  # what is wrong: (where, what stands there, what is put there, the test that must fail)
    "the length of the prompt's last token counts in the penalty": (beams.ended_with, "len(new)", "(len(new) + 1)", beam("all")),
    "no length penalty": (beams.ended_with, "/ len(new) ** s.length_penalty", "", beam("all")),
    "chances instead of their logarithms": (RUN.beams, "logits.log_softmax(-1)", "logits.softmax(-1)", beam("four")),
    "logits instead of logarithms": (RUN.beams, "logits.log_softmax(-1)", "logits", beam("four")),
    "a beam that is not among the best may end": (beams.search, "ended[b, :size]", "ended[b]", beam("no penalty", family=GPT_NEO)),
    "all beams begin": (beams.search, "sums[:, :, 0] = 0.0", "sums[:] = 0.0", beam("four")),
    "too few candidates": (beams.search, "max(2, 1 + len(eos)) * size", "size", beam("seven", family=GPT_NEO)),
    "ended beams run on": (beams.search, "best.masked_fill(stopped, LOW)", "best", beam("seven", family=GPT_NEO)),
    "the cache stays where it was": (TEXT.reorder, "in self.cache or ()", "in ()", beam("four")),
    "the cache moves from the second new token on": (TEXT.reorder, "slice(self.start, None)", "slice(self.start + 1, None)", beam("four")),
    "the ids stay where they were": (TEXT.reorder, "self.buffer[moved, new] = self.buffer[source, new]", "pass", beam("four")),
    "hope without length penalty": (ITEM.look, "best / length**penalty", "best", beam("sampled", family=GPT_NEO)),
    "never is as False": (ITEM.look, '== "never"', '== "no"', tests.test_never_looks_to_the_last_length),
    "an early stop in the middle of a step": (ITEM.add, "if self.open:", "if self.hopeful and not self.full:", beam("many stops, True, 2.0", family=GPT_NEO)),
    "sampled beams are the best ones": (beams.candidates, "if not do_sample:", "if True:", beam("sampled")),
    "repeated tokens get likelier": (processors.repetition_penalty, "old < 0", "old > 0", greedy("repetition_penalty")),
    "padding earns a penalty": (processors.repetition_penalty, "(padding := mask.shape[1] - mask.sum(1)).any()", "not (padding := mask.sum(1) * 0).any()",
                                greedy("repetition_penalty", padded=True)),
    "the first of an n-gram is banned": (processors.no_repeat_ngrams, "place, -1]", "place, 0]", greedy("no_repeat_ngram_size 2")),
    "n-grams are one shorter": (processors.no_repeat_ngrams, "def process(ids, scores):", "n = n - 1\n\n    def process(ids, scores):", greedy("no_repeat_ngram_size 3")),
    "a sequence's beginning is not looked at": (processors.sequence_bias, "torch.where(fits, value, 0.0)", "value", greedy("sequence_bias")),
    "one token too many before a stop id": (processors.listed, "n < least", "n <= least", greedy("min_new_tokens")),
    "the length grows by sums": (processors.decay, "factor ** (ids.shape[1] - start)", "factor * (ids.shape[1] - start)", greedy("exponential_decay")),
    "the last token is forced a step early": (processors.listed, "end - 1", "end - 2", greedy("forced_eos_token_id")),
    "suppressed in the beginning only": (processors.listed, "found.append(banned(s.suppress_tokens))", "found.append(banned(s.suppress_tokens, lambda n: n == T))", greedy("suppress_tokens")),
    "guidance from the wrong end": (TEXT.led, "other + self.scale", "logits.log_softmax(-1) + self.scale", greedy("guidance")),
    "temperature multiplies": (processors.temperature, "scores / value", "scores * value", sampled("temperature")),
    "top_p keeps the unlikely": (processors.top_p, "<= 1 - p", "<= p", sampled("top_p")),
    "top_p before top_k": (processors.filters, "if s.top_k:", "if s.top_k and not s.top_p:", sampled("all")),
    "min_p of all": (processors.min_p, "chances.amax(-1, keepdim=True)", "1.0", sampled("min_p")),
    "typical is likely": (processors.typical_p, "(-logs - entropy)", "(-logs)", sampled("typical_p")),
    "epsilon of the best": (processors.epsilon_cutoff, "scores.softmax(-1) < least_chance", "scores.softmax(-1) < least_chance * scores.softmax(-1).amax(-1, keepdim=True)", sampled("epsilon_cutoff")),
    "eta without the root": (processors.eta_cutoff, "math.sqrt(epsilon)", "epsilon", sampled("eta_cutoff")),
    "each prompt's texts far apart": (TEXT.expand, ".repeat_interleave(times)", ".repeat(times)", sampled("three of each")),
    "likeness and chance change places": (RUN.looking_ahead, "(1 - alpha) * chances - alpha * likeness", "alpha * chances - (1 - alpha) * likeness", against_4("contrastive, two, whole")),
    "likeness to padding": (RUN.looking_ahead, ".masked_fill(blocked[:, None], -math.inf)", "", against_4("contrastive, no repeats, padded", PHI3)),
    "likeness by length": (RUN.looking_ahead, "F.normalize(output.hidden_states[-1].float(), dim=-1)", "output.hidden_states[-1].float()", against_4("contrastive, whole")),
    "DoLa adds": (generation.DoLa.__call__, "late - base", "late + base", against_4("dola high, row 0")),
    "DoLa keeps all": (generation.DoLa.__call__, "math.log(0.1)", "math.log(1e-9)", against_4("dola high, row 0", GPT_NEO)),
    "DoLa takes the nearest layer": (generation.DoLa.__call__, "differs.argmax(0)", "differs.argmin(0)", against_4("dola list, row 0", PHI3)),
    "groups come together": (beams.Diversity.__call__, "scores - self.penalty", "scores + self.penalty", against_4("two groups, whole")),
    "groups do not see each other": (beams.search, "chosen = torch.cat([chosen, token], 1)", "pass", against_4("two groups, whole")),
    "only the best bank": (constraints.spread, "key=lambda r: r[:2]", "key=lambda r: (r[1], r[0])", tests.test_every_bank_of_constraints_keeps_its_best),
    "constraints count as met": (constraints.State.bank, "len(constraints) - len(self.left)", "0", against_4("two phrases, whole")),
    "nothing leads on": (beams.led, "for i, state in enumerate(states):", "for i, state in ():", against_4("word, whole")),
    "a rejected token may come again": (RUN.accepted_or_drawn, "chances.index_fill(0, token, 0.0)", "chances",
                                        lambda: tests.test_assisted_sampling_keeps_the_distribution("lookup", 3000)),
    "what the assistant would say comes again": (RUN.accepted_or_drawn, "(chances - proposed).clamp(min=0)", "chances",
                                                 lambda: tests.test_assisted_sampling_keeps_the_distribution("assistant", 3000)),
    "all that is proposed is taken": (RUN.accepted_or_drawn, "< float(chances[token])", "< 1.0", lambda: tests.test_assisted_sampling_keeps_the_distribution("assistant", 3000)),
    "the cache keeps what was rejected": (RUN.assisted, "text.truncate(text.ids.shape[1])", "pass", lambda: tests.test_assisted_greedy_gives_the_text_of_greedy(GPT_NEO, "lookup", {})),
    "processors see too long a text": (RUN.assisted, "text.ids[:, : n + i]", "text.ids",
                                       lambda: tests.test_assisted_greedy_gives_the_text_of_greedy(GPT_NEO, "the same model", {"no_repeat_ngram_size": 1})),
    "passes lead over the switch": (generation.rotation_room, 'if not getattr(config, "rope_varies", False):', "if True:", tests.test_assisted_decoding_goes_over_the_switch_of_frequencies),
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
    for place in (owner, beams, generation, tests):  # also where it was imported by name
        if getattr(place, name, None) is function:
            monkeypatch.setattr(place, name, made[name])


LONG = (  # thousands of texts each
    "a rejected token may come again",
    "what the assistant would say comes again",
    "all that is proposed is taken",
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

"""A test of the tests: faults that the fuzzer of settings met once, put back, are met again.

That finished sequences decide on frequencies too is met too seldom: `test_decoding_combinations.py` holds it."""

import pytest

from decoders.decoding import assisted, contrastive, guidance, sequences, state, token_ids
from decoders.decoding import logits_processors as processors
from tests.fuzz import settings
from tests.test_generation_mistakes import put

pytest.importorskip("transformers")

FAULTS = {  # (function, what stands there, what is put there), or (module, name, what it becomes)
    "only the last chunk is the past": (sequences.joined, "if not parts or", "if True or"),
    "padding counts as seen": (processors.without_padding, "if mask is None or", "if True or"),
    "embeddings count as ids of padding": (state.Generation.__init__, "mask[:, T - n :]", "mask"),
    "ids outside the vocabulary are taken": (token_ids.check_ids, "for id in ids:", "for id in ():"),
    "prompts of guidance share their frequencies": (guidance, "rope_varies", lambda model: False),
    "sampled beams keep one token": (processors.processors_of, "max(2, len(eos) + 1)", "len(eos) + 1"),
    "contrastive search trusts a cache": (contrastive.ContrastiveSearch.steps, "sequences.cache.truncate(0)", "pass"),
    "contrastive search reads one token after a switch": (contrastive.ContrastiveSearch.step, "states = states[:, :, -1]", "states = states.flatten(1, 2)"),
    "guidance of embeddings has no last token": (state.Generation.negative_prompt, "not ids.shape[1]", "False"),
    "NaN is chosen": (state.Generation.process, "if not self.s.remove_invalid_values and", "if False and"),
    "drafts lead over a switch": (assisted.tokens_before_rope_switch, "if not rope_varies(model):", "if True:"),
    "embeddings are read once": (sequences.Sequences.embedded, "self.prompt_length : end]", "self.prompt_length : self.prompt_length]"),
}  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_met_again(what, monkeypatch):
    where, old, new = FAULTS[what]
    if callable(new):
        monkeypatch.setattr(where, old, new)
    else:
        put(monkeypatch, where, old, new)
    assert any(settings.run_cases(200, 5, first, most=1)[1] for first in range(0, 2000, 200))

"""Every documented way to decode, over any of the six models.

    from decoders import decoding
    ids = decoding.generate(model, input_ids, num_beams=4, max_new_tokens=40)

`generate` and `stream` write, `score` gives log-probabilities, `beam_tree` shows what beam search followed.
The settings have the documented names (`GenerationConfig`); docs/decoding.md has a paragraph and a command
for each.
"""

from . import logits_processors
from .constraints import DisjunctiveConstraint, PhrasalConstraint
from .loop import generate, stream
from .scores import compute_transition_scores, score
from .settings import GenerationConfig
from .state import GenerateOutput
from .stopping import stop_strings_criterion
from .tree import BeamTree, beam_tree

__all__ = [
    "BeamTree",
    "DisjunctiveConstraint",
    "GenerateOutput",
    "GenerationConfig",
    "PhrasalConstraint",
    "beam_tree",
    "compute_transition_scores",
    "generate",
    "logits_processors",
    "score",
    "stop_strings_criterion",
    "stream",
]

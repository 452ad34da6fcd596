"""Every documented way to decode, over any of the six models.

    from decoders import decoding
    ids = decoding.generate(model, input_ids, num_beams=4, max_new_tokens=40)

`generate` and `stream` write, `score` gives log-probabilities. The settings have the documented names
(`GenerationConfig`); docs/decoding.md has a paragraph and a command for each.
"""

from .constraints import DisjunctiveConstraint, PhrasalConstraint
from .loop import (
    GenerateOutput,
    GenerationConfig,
    compute_transition_scores,
    generate,
    score,
    stream,
)

__all__ = [
    "DisjunctiveConstraint",
    "GenerateOutput",
    "GenerationConfig",
    "PhrasalConstraint",
    "compute_transition_scores",
    "generate",
    "score",
    "stream",
]

"""The proof tool: where a port differs from the formula, and which known mistake it is.

from decoders import compare
compare.make("kit", "phi")               # cases and every inner value of a small redrawn Phi
print(compare.run("kit", "port.py:build"))
"""

from .checkpoints import Twins, apart
from .heat import page
from .kit import Kit, make
from .measure import run
from .on_prompt import on_prompt
from .packings import perplexity
from .ports import PortError
from .report import Finding, Report, Row

__all__ = [
    "Finding",
    "Kit",
    "PortError",
    "Report",
    "Row",
    "Twins",
    "apart",
    "make",
    "on_prompt",
    "page",
    "perplexity",
    "run",
]

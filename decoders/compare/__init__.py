"""The proof tool: where a port differs from the formula, and which known mistake it is.

from decoders import compare
compare.make("kit", "phi")               # cases and every inner value of a small redrawn Phi
print(compare.run("kit", "port.py:build"))
"""

from .measure import Finding, Kit, Report, Row, make, run

__all__ = ["Finding", "Kit", "Report", "Row", "make", "run"]

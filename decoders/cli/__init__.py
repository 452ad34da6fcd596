"""python -m decoders, and the `decoders` script: one file a command."""

from .commands import main, parser
from .output import peak_memory

__all__ = ["main", "parser", "peak_memory"]

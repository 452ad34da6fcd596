"""python -m decoders, and the `decoders` script: one file a command."""

from .main import main

__all__ = ["main"]

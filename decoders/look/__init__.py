"""A model, seen thinking: every value of a pass by its name, and a page that shows them.

from decoders import look
trace = look.trace(model, ids)           # values, and passes with values replaced
look.write("page.html", look.page([look.Run(model, ids, tokenizer)]))
look.cache(past_key_values)              # shows itself in a notebook; by `%load_ext decoders.look` all do
"""

from .cache_view import CacheView, cache, load_ipython_extension
from .content import Run
from .page import page, seen_picture, write
from .runs import check_length, data
from .traces import Trace, induction, trace
from .words import word

__all__ = [
    "CacheView",
    "Run",
    "Trace",
    "cache",
    "check_length",
    "data",
    "induction",
    "load_ipython_extension",
    "page",
    "seen_picture",
    "trace",
    "word",
    "write",
]

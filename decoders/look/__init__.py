"""A model, seen thinking: every value of a pass by its name, and a page that shows them.

from decoders import look
trace = look.trace(model, ids)           # values, and passes with values replaced
look.write("page.html", look.page([look.Run(model, ids, tokenizer)]))
"""

from .page import Run, Trace, data, induction, page, trace, write

__all__ = ["Run", "Trace", "data", "induction", "page", "trace", "write"]

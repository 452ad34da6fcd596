"""How a token is written on a page or in a figure."""

import re
from typing import Any


def word(tokenizer: Any, id: int) -> str:
    """How a token is written; without a tokenizer its id. What is no whole character is spelled in bytes."""
    if tokenizer is None:
        return f" {id}"
    content = tokenizer.bytes_of.get(id)
    if content is None:
        return f"[{id}]"
    text = content.decode(errors="backslashreplace").replace("▁", " ")
    if byte := re.fullmatch("<0x([2-7][0-9A-F])>", text):  # a letter without a piece of its own
        return chr(int(byte[1], 16))
    return text.removesuffix("</w>") + " " * text.endswith("</w>")

"""A folder's own chat template, rendered in a sandbox: a conversation -> parts of text.

Control tokens that somebody types must stay text, also when a template puts them next to its own. So each one
in a message is broken by a mark before rendering, and found again by the mark afterwards: whatever a template
does with a message's text in between (trim it, split it, repeat it), what was typed is known.
"""

import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from .folder import first_line

Part = tuple[str, bool]  # a piece of text, and whether somebody typed it: then control tokens in it stay text

MARK = "\ufdd0"  # a noncharacter, which Unicode keeps out of all text
ROLES = ("system", "user", "assistant", "tool", "developer", "function", "tool_call", "tool_response")
# What the built-in formats write exactly: the published folders' templates, by the start of their SHA-256.
BUILT_IN = {
    "268b6082ceb7176d",  # Phi-3-mini-128k-instruct, April 2024
    "dcaee66df77bfbb7",  # Phi-3-mini-4k-instruct
    "78d976a442bcde2f",  # Phi-3.5-mini-instruct
    "febf589225c9728a",  # Phi-4-mini-instruct
    "fe4120415a3858b8",  # phi-4
}


def is_built_in(template: str) -> bool:
    return hashlib.sha256(template.encode()).hexdigest()[:16] in BUILT_IN


def can_render() -> bool:
    """Jinja2 comes with PyTorch, but nothing here demands it."""
    return importlib.util.find_spec("jinja2") is not None


def template_format(
    control_tokens: Callable[[str], set[str]], template: str, names: dict[str, str]
) -> Callable[[list], list[Part]]:
    """A chat format by a template. `control_tokens` finds those of a text; `names` has `bos_token` and the
    like. The format raises ValueError where the template refuses a conversation, or a role is none.
    """

    def parts(messages: list[dict[str, Any]]) -> list[Part]:
        tokens: set[str] = set()

        def marked(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: marked(inner) for key, inner in value.items()}
            if isinstance(value, list):
                return [marked(inner) for inner in value]
            if not isinstance(value, str):
                return value
            value = value.replace(MARK, "\ufffd")
            typed = control_tokens(value)
            tokens.update(typed)
            finder = one_of(typed)
            return finder.sub(lambda token: broken(token[0]), value) if finder else value

        for message in messages:
            check_role(message["role"], control_tokens)
        return split_at_marks(render(template, [marked(message) for message in messages], names), tokens)

    return parts


def broken(token: str) -> str:
    return token[0] + MARK + token[1:]


def one_of(texts: Iterable[str]) -> re.Pattern | None:
    """What finds these texts, of several the longest."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def split_at_marks(text: str, tokens: set[str]) -> list[Part]:
    """The template's text, and the control tokens that were typed."""
    finder, parts, done = one_of(map(broken, tokens)), [], 0
    for token in finder.finditer(text) if finder else ():
        parts += [(text[done : token.start()], False), (token[0].replace(MARK, ""), True)]
        done = token.end()
    parts.append((text[done:], False))
    # a mark that is left over stands where a template cut a token in two: no token is found across parts
    return [(piece, is_typed) for part, is_typed in parts for piece in part.split(MARK)]


def check_role(role: str, control_tokens: Callable[[str], set[str]]) -> None:
    """ValueError for a role that a template might turn into a control token, such as `end` into `<|end|>`."""
    if role in ROLES:
        return
    tags = (role, f"<|{role}|>", f"<{role}>", f"[{role}]", f"|{role}|", f"<|im_{role}|>")
    if not re.fullmatch(r"[\w -]{1,40}", role) or any(control_tokens(tag) for tag in tags):
        raise ValueError(f"{role!r:.60} is no role of a message: there are {', '.join(ROLES)}")


@lru_cache(16)
def compiled(template: str) -> Any:
    """The template, in a sandbox in which it can change nothing and call nothing of Python's."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=False)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = time.strftime
    # {% generation %} marks answers for training: here it is a block that is always taken
    template = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", template)
    template = re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", template)
    return sandbox.from_string(template)


def render(template: str, messages: list[dict[str, Any]], names: dict[str, str]) -> str:
    """The text of a conversation, up to where the answer begins."""
    try:
        return compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **names
        )
    except Exception as error:  # Jinja2's own kinds, and whatever a wrong template makes of Python's
        raise ValueError(f"the chat template refused the conversation: {first_line(error)}") from None

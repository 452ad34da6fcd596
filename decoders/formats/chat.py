"""Each checkpoint's chat format: a conversation -> parts of text, and whether somebody typed them.

A folder's own template is rendered (templates.py); the formats here serve where a folder has none, as phi-2's
and Adept's, and where Jinja2 is missing.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .folder import read_text
from .templates import ROLES, Part, can_render, is_built_in, template_format

Format = Callable[[list], list[Part]]


def turns(begin: str, around: dict[str, tuple[str, str]], answer: str, messages: list) -> list[Part]:
    """What stands before and after a message of each role, and what asks for the answer."""
    parts = [(begin, False)]
    for message in messages:
        if message["role"] in around:
            before, after = around[message["role"]]
            parts += [(before, False), (message["content"], True), (after, False)]
    return [*parts, (answer, False)]


def phi2_chat(tokenizer: Any, template: str) -> Callable[[list], list[Part]]:
    """phi-2's question and answer: "Instruct: ...\\nOutput:", where the answer begins with a space."""

    def parts(messages: list) -> list[Part]:
        around = {"user": ("Instruct: ", "\n"), "assistant": ("Output: ", "\n")}
        if unknown := [message["role"] for message in messages if message["role"] not in around]:
            raise ValueError(f"phi-2's format has no role {unknown[0]!r}, only user and assistant")
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the last message must be the user's")
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        return turns("", around, "Output:", stripped)

    return parts


def phi3_chat(tokenizer: Any, template: str) -> Callable[[list], list[Part]]:
    """Phi-3's forms, by their control tokens and by what the folder's template mentions."""
    if "<|im_sep|>" in tokenizer.added:  # phi-4
        start = "<|im_start|>{}<|im_sep|>".format
        around = {role: (start(role), "<|im_end|>") for role in ("system", "user", "assistant")}
        return partial(turns, "", around, start("assistant"))
    if "<|tool_call|>" in tokenizer.added:
        return partial(phi4_mini_parts, "Your name is Phi" in template)
    if template and "system" not in template:  # medium, and mini-128k of April 2024
        begin = "<s>" if "bos_token" in template else ""
        around = {"user": ("<|user|>\n", "<|end|>\n<|assistant|>\n"), "assistant": ("", "<|end|>\n")}
        return partial(turns, begin, around, "")
    around = {role: (f"<|{role}|>\n", "<|end|>\n") for role in ("system", "user", "assistant")}
    whole = partial(turns, "", around, "<|assistant|>\n")
    if "and message['content']" not in template:
        return whole
    return lambda messages: whole([m for m in messages if m["role"] != "system" or m["content"]])  # 3.5


def phi4_mini_parts(reasoning: bool, messages: list) -> list[Part]:
    """Any role has its tags. A system message may bring `tools`, as JSON. -reasoning gives itself a name."""
    parts: list[Part] = []
    if reasoning:
        system = [(" " + m["content"], True) for m in messages if m["role"] == "system"]
        name = "<|system|>Your name is Phi, an AI math expert developed by Microsoft."
        parts = [(name, False), *system, ("<|end|>", False)]
        messages = [m for m in messages if m["role"] != "system"]
    for message in messages:
        role = message["role"]
        parts += [(f"<|{role}|>", role not in ROLES), (message["content"], True)]
        if message["role"] == "system" and message.get("tools") is not None:
            parts += [("<|tool|>", False), (message["tools"], True), ("<|/tool|>", False)]
        parts.append(("<|end|>", False))
    return [*parts, ("<|assistant|>", False)]


def persimmon_chat(tokenizer: Any, template: str) -> Callable[[list], list[Part]]:
    """Adept's: "human: ...\\n\\nadept:" turn by turn, and an answer that writes "human:" itself is over."""
    tokenizer.chat_stops, tokenizer.chat_prefix_ids = ("\n\nhuman:",), tokenizer.prefix_ids

    def parts(messages: list) -> list[Part]:
        names = {"user": "human: ", "assistant": "adept: "}
        if unknown := [message["role"] for message in messages if message["role"] not in names]:
            raise ValueError(f"Persimmon's format has no role {unknown[0]!r}, only user and assistant")
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        return turns("", {role: (name, "\n\n") for role, name in names.items()}, "adept:", stripped)

    return parts


CHAT_FORMATS = {
    "phi": phi2_chat,
    "phi-msft": phi2_chat,
    "mixformer-sequential": phi2_chat,
    "phi3": phi3_chat,
    "persimmon": persimmon_chat,
}


def chat_format(tokenizer: Any, kind: Any, template: str, names: dict[str, str]) -> Format | None:
    """The folder's own template, else the format of this model_type; None where there is neither."""
    is_known = isinstance(kind, str) and kind in CHAT_FORMATS
    if template and can_render():
        return template_format(tokenizer.control_tokens, template, names)
    if template and not (is_known and is_built_in(template)):
        return needs_jinja
    return CHAT_FORMATS[kind](tokenizer, template) if is_known else None


def needs_jinja(messages: list) -> list[Part]:
    raise ImportError("this folder's chat template needs one more package: pip install jinja2")


def chat_template(folder: Path, config: dict) -> str:
    """The folder's own, "" if it has none."""
    file = folder / "chat_template.jinja"
    template = read_text(file) if file.exists() else config.get("chat_template") or ""
    try:
        if isinstance(template, list):  # several by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default", next(iter(named.values()), ""))
    except (TypeError, KeyError):
        template = None
    if not isinstance(template, str):
        file = folder / "tokenizer_config.json"
        raise ValueError(f"{file}: chat_template must be a text, or a list of objects with name and template")
    return template

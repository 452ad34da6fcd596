"""Conversations by a checkpoint's chat template, or by its chat format."""

import json
import re
import time
from functools import lru_cache
from typing import Any

from .encodings import tensor_of


class ChatTemplates:
    """The part of a tokenizer that writes conversations."""

    def apply_chat_template(
        self,
        conversation: list,
        tools: list | None = None,
        documents: list | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a list of them, as the checkpoint's template writes it, or as its chat format
        where it has none: text, or ids. Control tokens written in a message count, as in Transformers;
        `tokenizer.plain.chat` takes them for text."""
        if continue_final_message and add_generation_prompt:
            reason = "continue_final_message goes on with an answer, add_generation_prompt begins one"
            raise ValueError(f"{reason}: give one of them")
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        texts = [
            self.conversation_text(
                list(one),
                chat_template,
                tools,
                documents,
                add_generation_prompt,
                continue_final_message,
                kwargs,
            )
            for one in (conversation if batched else [conversation])
        ]
        if not tokenize:
            plain_texts = [without_marks(text)[0] for text in texts]
            return plain_texts if batched else plain_texts[0]
        if return_assistant_tokens_mask and not return_dict:
            raise ValueError("return_assistant_tokens_mask needs return_dict=True")
        options = {"truncation": truncation, "max_length": max_length, "return_tensors": return_tensors}
        marked = [without_marks(text) for text in texts]
        plain_texts = [text for text, _ in marked]
        encoding = self(
            plain_texts if batched else plain_texts[0],
            add_special_tokens=False,
            padding=padding,
            **{**options, **(tokenizer_kwargs or {})},
        )
        if return_assistant_tokens_mask:
            spans = [spans for _, spans in marked]
            rows = [answer_mask(*row) for row in zip(encoding.encodings, spans, strict=True)]
            kind = return_tensors
            tensor = tensor_of("assistant_masks", rows, kind) if batched or kind else rows[0]
            encoding["assistant_masks"] = tensor
        return encoding if return_dict else encoding["input_ids"]

    def conversation_text(
        self,
        messages: list[dict],
        template: str | None,
        tools: Any,
        documents: Any,
        prompt: bool,
        go_on: bool,
        more: dict,
    ) -> str:
        template = self.template_by_name(template, tools)
        if template is None:
            return self.format_text(messages, prompt, go_on)
        from jinja2 import TemplateError

        try:
            text = compiled(template).render(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=prompt,
                **self.special_tokens_map,
                **more,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refused the conversation: {error}") from None
        if not go_on:
            return text
        last = messages[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def get_chat_template(self, chat_template: str | None = None, tools: list | None = None) -> str:
        """The template that `apply_chat_template` would take. A ValueError where the folder has none, also
        if it has a chat format."""
        if template := self.template_by_name(chat_template, tools):
            return template
        raise ValueError(f"{self.name_or_path} has no chat_template: give one")

    def template_by_name(self, template: str | None, tools: Any) -> str | None:
        """A template itself, or one of the folder's by its name: "tool_use" where there are tools and it has
        one of this name, else "default"."""
        stored = self.chat_template
        if not isinstance(stored, dict):
            return template or stored
        if template is not None:
            return stored.get(template, template)
        name = "tool_use" if tools is not None and "tool_use" in stored else "default"
        if name not in stored:
            raise ValueError(f"give chat_template, as none is the default: one of {', '.join(stored)}")
        return stored[name]

    def format_text(self, messages: list[dict], prompt: bool, go_on: bool) -> str:
        if self.plain.chat_format is None:
            raise ValueError(f"{self.name_or_path} has no chat_template: give one")
        if prompt:
            return "".join(part for part, _ in self.plain.chat_format(messages))
        asked = [part for part, _ in self.plain.chat_format([*messages, {"role": "user", "content": ""}])]
        begin = asked[: len(asked) - 4]  # before the empty question, and what asks for its answer
        return "".join(begin).rstrip() if go_on else "".join(begin)


# ---- Templates ---------------------------------------------------------------------------------------------

BEGIN, END = "\ufdd1", "\ufdd2"  # around an answer; noncharacters, which Unicode keeps out of all text


@lru_cache(16)
def compiled(template: str) -> Any:
    """The template, in a sandbox in which it can change nothing and call nothing of Python's. Its
    `{% generation %}` blocks are marked in the text."""
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
    begin = rf"{{%\1 if true %}}{{{{ '{BEGIN}' }}}}{{% if true \2%}}"
    end = rf"{{%\1 endif %}}{{{{ '{END}' }}}}{{% endif \2%}}"
    template = re.sub(r"{%(-?)\s*generation\s*(-?)%}", begin, template)
    template = re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", end, template)
    return sandbox.from_string(template)


def without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it each answer stands."""
    pieces, spans, length, start = re.split(f"([{BEGIN}{END}])", text), [], 0, 0
    for piece in pieces:
        if piece == BEGIN:
            start = length
        elif piece == END:
            spans.append((start, length))
        else:
            length += len(piece)
    return "".join(piece for piece in pieces if piece not in (BEGIN, END)), spans


def answer_mask(encoding: Any, spans: list[tuple[int, int]]) -> list[int]:
    """1 for the tokens that have a part in an answer."""

    def is_answer(begin: int, end: int) -> bool:
        return any(begin < stop and start < end for start, stop in spans)

    both = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    return [int(sequence is not None and is_answer(*span)) for span, sequence in both]

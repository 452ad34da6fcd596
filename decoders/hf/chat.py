"""Conversations by a checkpoint's chat template, or by its chat format."""

import json
from typing import Any


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
            told = "continue_final_message goes on with an answer, add_generation_prompt begins one"
            raise ValueError(f"{told}: give one of them")
        if return_assistant_tokens_mask:
            told = "needs a template that marks answers: none of these does"
            raise ValueError(f"return_assistant_tokens_mask {told}")
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
            return texts if batched else texts[0]
        options = {"truncation": truncation, "max_length": max_length, "return_tensors": return_tensors}
        found = self(
            texts if batched else texts[0],
            add_special_tokens=False,
            padding=padding,
            **{**options, **(tokenizer_kwargs or {})},
        )
        return found if return_dict else found["input_ids"]

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
        template = template or self.chat_template
        if template is None:
            return self.format_text(messages, prompt, go_on)
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def stop(message):
            raise TemplateError(message)

        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        world.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, indent=indent, ensure_ascii=False
        )
        world.globals["raise_exception"] = stop
        try:
            text = world.from_string(template).render(
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

    def format_text(self, messages: list[dict], prompt: bool, go_on: bool) -> str:
        if self.plain.chat_format is None:
            raise ValueError(f"{self.name_or_path} has no chat_template: give one")
        if prompt:
            return "".join(part for part, _ in self.plain.chat_format(messages))
        asked = [part for part, _ in self.plain.chat_format([*messages, {"role": "user", "content": ""}])]
        begin = asked[: len(asked) - 4]  # before the empty question, and what asks for its answer
        return "".join(begin).rstrip() if go_on else "".join(begin)

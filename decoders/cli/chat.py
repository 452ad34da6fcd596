"""`chat MODEL`: a conversation in the terminal, a line a turn."""

import argparse
import re
import signal
import sys
from typing import Any

import torch

from decoders import decoding, kernels

from .loading import load_model, note_context, open_checkpoint, settings
from .output import Progress, escaped, print_note, print_result

COMMANDS = (
    "/reset forgets the conversation, /system TEXT says what to tell the model first, /quit ends, "
    "Ctrl-C stops an answer"
)


def run(args: argparse.Namespace) -> int:
    folder, tokenizer = open_checkpoint(args.model)
    tokenizer.chat([{"role": "user", "content": "?"}])  # without a chat format it ends here
    conversation = Conversation(load_model(folder, args), tokenizer, args)
    conversation.set_system(args.system)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        import readline  # noqa: F401  (arrow keys and history for input)

        print_note(COMMANDS)
    while True:
        try:
            line = input_line("> " if at_terminal else "")
        except EOFError:
            if at_terminal:
                print_result("\n")
            return 0
        except KeyboardInterrupt:  # at the prompt it only clears the line
            print_result("\n")
            continue
        if line in ("/quit", "/exit"):
            return 0
        obey(line, conversation)


def input_line(prompt: str) -> str:
    """The next line; EOFError at the end, ValueError where it is no text, OSError from a closed stream."""
    try:
        if prompt:
            return input(prompt).strip()  # by readline
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {sys.stdin.encoding}: {error}") from None
    if not line:
        raise EOFError
    return line.strip()


def obey(line: str, conversation: "Conversation") -> None:
    """A command, or a question."""
    command, _, rest = line.partition(" ")
    if line == "/help":
        print_note(COMMANDS)
    elif line == "/reset":
        conversation.turns.clear()
    elif command == "/system":
        conversation.set_system(rest.strip())
    elif re.fullmatch("/[a-z]+", line):
        print_note(f"{escaped(line)} is no command: there are /reset, /system TEXT, /quit and /help")
    elif line:
        conversation.answer(line)


class Conversation:
    """Turns, and a cache that keeps what the next prompt has in common with the text before it."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.system: list[dict[str, str]] = []
        self.turns: list[dict[str, str]] = []
        self.cache = kernels.new_cache(model, args.cache)
        self.cached_ids: list[int] = []  # of which the cache holds the first

    def set_system(self, text: str) -> None:
        """Set the system message; none where the chat format has no place for it."""
        self.system = [{"role": "system", "content": text}] if text else []
        turn = [{"role": "user", "content": "?"}]
        try:
            has_place = not text or self.tokenizer.chat(self.system + turn) != self.tokenizer.chat(turn)
        except ValueError:
            has_place = False
        if not has_place:
            print_note("note: this checkpoint's chat format has no system message, it is left out")
            self.system = []

    def answer(self, question: str) -> None:
        """Stream the answer to `question`; Ctrl-C ends it early, and what was said stays said."""
        turns = [*self.turns, {"role": "user", "content": question}]
        ids = self.tokenizer.chat(self.system + turns)
        reused = self.rewind(ids)
        pieces: list[str] = []

        def show(text: str) -> None:
            text = text if pieces else text.lstrip()
            if text:
                pieces.append(text)
                print_result(text)

        stops = self.tokenizer.chat_ends()[1]
        stream = self.tokenizer.stream(show, skip_special_tokens=True, stops=stops)
        progress = Progress("", show, stream)
        with Interrupt() as interrupt:
            result = decoding.generate(
                self.model,
                torch.tensor([ids], device=self.args.device),
                streamer=progress,
                past_key_values=self.cache,
                stopping_criteria=[lambda ids, logits: stream.stopped or interrupt.pressed],
                **settings(self.args, self.model, self.tokenizer, len(ids), is_chat=True),
            )
        print_result("\n")
        self.cached_ids = result[0].tolist()
        note_context(self.model, len(self.cached_ids), len(ids))
        self.turns = [*turns, {"role": "assistant", "content": "".join(pieces).rstrip()}]
        print_note(f"({progress.report(len(ids))}; {reused} of the prompt were in the cache)")

    def rewind(self, ids: list[int]) -> int:
        """Cut the cache to what it has in common with `ids`. At least the last id is computed anew."""
        common = 0
        for new, old in zip(ids, self.cached_ids, strict=False):
            if new != old:
                break
            common += 1
        self.cache.truncate(min(common, len(self.cache), len(ids) - 1))
        return len(self.cache)


class Interrupt:
    """Ctrl-C stops an answer after the token that is being computed; pressed again: now, and for good."""

    pressed = False

    def __enter__(self) -> "Interrupt":
        self.previous = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, *_: Any) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.previous)

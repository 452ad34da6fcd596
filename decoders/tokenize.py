"""The folder's tokenizer files -> encode, decode, stream: ids and text of the Hugging Face fast tokenizer.

    tokenizer = load("path/to/gpt-neo-125m")
    tokenizer.encode("Hello world")                  # [15496, 995]

Three things differ, on purpose: nothing is "cleaned up" when decoding (that would change code and quotes), a
lone surrogate becomes U+FFFD rather than an error, and added tokens with letters as é decode to themselves.
"""

if __name__ == "tokenize":  # Python was started in this folder, and torch wants the standard library's
    raise SystemExit(
        "decoders/tokenize.py hides Python's own tokenize here: start Python in another folder, "
        "for example one level up with `python -m decoders`"
    )

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import tiktoken

from decoders.formats import (
    BYTE_PIECE,
    END_OF_WORD,
    GPT2,
    PATTERN_BY_ROWS,
    TOKENIZER_FILES,
    AddedToken,
    Cutter,
    Files,
    Part,
    Pieces,
    adapter_base,
    add_tokens,
    added_tokens,
    category,
    chat_format,
    chat_template,
    decomposed,
    gguf_tokenizer_config,
    gguf_vocabulary,
    is_adapter,
    merge,
    read_files,
    read_json_if_any,
    read_settled,
    switched,
    token_content,
    write_files,
    write_gguf_tokenizer,
)

# Unicode's White_Space, which lstrip and rstrip of added tokens swallow; Python's \s has four more.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
LONG_RUN = re.compile(r"\s{100000}")
SURROGATE = re.compile("[\ud800-\udfff]")


# ---- What all tokenizers share -----------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back. `vocab_size` counts the vocabulary, `len()` the added tokens too."""

    decoder: type  # of (bytes_of, hidden ids); feed(ids) gives text as it is complete, flush() the rest
    prefix_ids: tuple[int, ...] = ()  # which encode puts before a text
    normalizes = False  # whether `_encode_ordinary` looks for added tokens that are `normalized`

    def __init__(self, bytes_of: dict[int, bytes], vocab_size: int, added: Iterable[AddedToken]):
        self.bytes_of, self.vocab_size = bytes_of, vocab_size
        self.ids_of: dict[bytes, int] = {}
        self.added: dict[str, AddedToken] = {}
        self._add(added)
        self.folder: Path | None = None  # where it was loaded from
        self.changed: dict[int, AddedToken] = {}  # id -> token that was added, or made special, since
        self.bos_token_id: int | None = None
        self.eos_token_id: int | None = None
        self.pad_token_id: int | None = None
        self.chat_format: Callable[[list[dict[str, str]]], list[Part]] | None = None
        self.chat_prefix_ids: tuple[int, ...] = ()  # before a conversation
        self.chat_stops: tuple[str, ...] = ()  # text that no answer contains: it ends there

    def __len__(self) -> int:
        return len(self.bytes_of)

    def _add(self, tokens: Iterable[AddedToken]) -> None:
        for token in tokens:
            self.added[token.content] = token
            self.bytes_of[token.id] = token.content.encode()
        literal = [token for token in self.added.values() if not (token.normalized and self.normalizes)]
        self.splitter = splitter(literal)
        self.ordinary_splitter = splitter(token for token in literal if not token.special)
        self.plain_splitter = splitter(token for token in self.added.values() if token.content.isspace())

    def add_special_tokens(self, contents: Iterable[str]) -> int:
        """Give new tokens the next free ids, and make known ones special. Returns how many are new.

        The model's table must grow to `len(tokenizer)` rows before it can be fed the new ids. TypeError for
        anything but a list of texts, ValueError for an empty one.
        """
        if isinstance(contents, str | dict):
            raise TypeError(f"give add_special_tokens a list of texts, such as ['[CLS]'], not {contents!r}")
        known = {*self.added}
        for content in contents:
            self.add_token(content, special=True)
        return len({*self.added} - known)

    def add_token(self, content: str, special: bool = False, **flags: bool) -> bool:
        """One token, which may swallow blanks on its sides (lstrip, rstrip), stand for whole words only
        (single_word), or be looked for in what normalization leaves of the text (normalized). Whether it was
        no added token before, or one of other flags: a piece of the vocabulary keeps its id."""
        if not isinstance(content, str) or not content:
            raise ValueError(f"an added token is a text that is not empty, not {content!r}")
        known = self.added.get(content)
        if known is not None and not flags:
            flags = {name: getattr(known, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        token_id = self._vocabulary_id(content) if known is None else known.id
        token_id = max(self.bytes_of) + 1 if token_id is None else token_id
        token = AddedToken(token_id, content, special=special, **flags)
        kept = token._replace(special=special or (known is not None and known.special))
        if kept != known:
            self._add([kept])
            self.changed[token_id] = kept
        return token != known

    def save(self, folder: str | Path) -> None:
        """Write the files that this was loaded from into `folder`, with what was added, for Transformers
        too. All at once; OSError where they are no longer there."""
        with switched(Path(folder)) as new:
            self.write(new)

    def write(self, folder: Path) -> None:
        """As `save`, file by file: for a folder in which nobody reads yet."""
        if self.folder is None:
            raise ValueError("this tokenizer was not loaded from a folder: there are no files to save")
        if self.folder.suffix == ".gguf":
            write_gguf_tokenizer(self.folder, folder)
            add_tokens(folder, self.changed.values())
        else:
            write_files(self.folder, folder, self.changed.values())

    def _vocabulary_id(self, content: str) -> int | None:
        """Id of what the vocabulary's file writes so."""
        return self.token_id(content)

    def token_id(self, content: str) -> int | None:
        """Id of the token that is written exactly so, added or not. None if there is none."""
        return self.ids_of_bytes().get(content.encode())

    def ids_of_bytes(self) -> dict[bytes, int]:
        if len(self.ids_of) != len(self.bytes_of):
            self.ids_of = {text: id for id, text in reversed(self.bytes_of.items())}  # of several the first
        return self.ids_of

    def encode(
        self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        """Ids of `text`, added tokens in it included. `add_special_tokens` lets the checkpoint's own stand
        before it, where it has one: `<s>`, `|ENDOFTEXT|`.

        `split_special_tokens` takes control tokens in the text for text, as it should with what users type.
        """
        if not isinstance(text, str) or not isinstance(add_special_tokens, bool):
            raise TypeError(
                "encode takes one text: join two with a token between, or encode each by itself, "
                f"not {type(text).__name__}, {type(add_special_tokens).__name__}"
            )
        prefix = self.prefix_ids if add_special_tokens else ()
        return [*prefix, *self.encode_parts([(text, split_special_tokens)])]

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        """Ids of a text in parts. What is typed joins its neighbours as if all were one text."""
        pieces: list[str | AddedToken] = [""]
        for text, typed in parts:
            if SURROGATE.search(text):  # pairs become the character they mean, lone ones U+FFFD
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            text = self._defused(text) if typed else text
            for piece in self._split(text, self.plain_splitter if typed else self.splitter):
                if isinstance(piece, str) and isinstance(pieces[-1], str):
                    pieces[-1] += piece
                else:
                    pieces.append(piece)
        ids: list[int] = []
        for before, piece, after in zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False):
            if isinstance(piece, AddedToken):
                ids.append(piece.id)
                continue
            if isinstance(before, AddedToken) and before.rstrip:
                piece = piece.lstrip(WHITE_SPACE)
            if isinstance(after, AddedToken) and after.lstrip:
                piece = piece.rstrip(WHITE_SPACE)
            if piece:
                ids += self._encode_ordinary(piece)
        return ids

    def control_tokens(self, text: str) -> set[str]:
        """The control tokens that `text` contains: added ones, but those of blanks alone."""
        finder = splitter(content for content in self.added if not content.isspace())
        return {token[0] for token in finder.finditer(text)} if finder else set()

    def segments(
        self, text: str, split_special_tokens: bool = False
    ) -> Iterator[tuple[int, str, list[int], bool]]:
        """Where each added token and each text between two begins, what it is, its ids, and whether it is an
        added token: then blanks that it swallows belong to it. `split_special_tokens` takes special ones for
        text, as Transformers' argument of this name does."""
        pieces = self._split(text, self.ordinary_splitter if split_special_tokens else self.splitter)
        row: list[str | AddedToken] = [piece for piece in pieces if piece]
        begin, taken = 0, 0  # where the piece stands, and what earlier tokens have swallowed
        for before, piece, after in zip(["", *row], row, [*row[1:], ""], strict=False):
            if isinstance(piece, AddedToken):
                start = max(taken, begin - len(swallowed_before(piece, before)))
                begin += len(piece.content)
                taken = begin + len(swallowed_after(piece, after))
                yield start, text[start:taken], [piece.id], True
                continue
            left = len(swallowed_after(before, piece))
            right = len(piece) - len(swallowed_before(after, piece[left:]))
            if inner := piece[left:right]:
                yield begin + left, inner, self._encode_ordinary(inner), False
            begin += len(piece)

    def _split(self, text: str, splitter: re.Pattern | None) -> Iterator[str | AddedToken]:
        """Added tokens and the text between them: the leftmost first, of several the longest."""
        done = 0
        for token in splitter.finditer(text) if splitter else ():
            yield text[done : token.start()]
            yield self.added[token[0]]
            done = token.end()
        yield text[done:]

    def _defused(self, text: str) -> str:
        """Typed text in which `_encode_ordinary` will find no control token."""
        return text

    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of text without added tokens."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`, a list or (T,) tensor. Ids without a token give nothing, broken UTF-8 U+FFFD."""
        stream = self.stream(None, skip_special_tokens)
        return stream.put([int(id) for id in ids]) + stream.end()

    def stream(
        self,
        write: Callable[[str], Any] | None = None,
        skip_special_tokens: bool = False,
        stops: Iterable[str] = (),
    ) -> "Stream":
        """A decoder that is fed ids as they come, and a `streamer` for `generate`. `write` gets all text.

        Text ends before the first of `stops`; then `stream.stopped` is True, for a stopping criterion.
        """
        hidden = {token.id for token in self.added.values() if token.special and skip_special_tokens}
        return Stream(self.decoder(self.bytes_of, hidden), write, tuple(stops))

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the answer begins: `[{"role": "user", "content": "Hello"}, ...]`.

        They are those of the checkpoint's own template, rendered in a sandbox; only control tokens written in
        a message stay text. ValueError where there is no chat format, or it refuses the conversation.
        """
        if self.chat_format is None:
            raise ValueError("this checkpoint has no chat format: it continues plain text")
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError(f"a message has a role and a content, both text, and this is {message!r}")
        return [*self.chat_prefix_ids, *self.encode_parts(self.chat_format(messages))]

    def chat_ends(self) -> tuple[list[int], tuple[str, ...]]:
        """What ends an answer in a conversation: the ids of control tokens, and texts.

        They are what the chat format writes after an answer (`<|end|>`, `<|im_end|>`), and the tokenizer's
        eos.
        """
        ids = [] if self.eos_token_id is None else [self.eos_token_id]
        after = self._after_an_answer()
        token = self.splitter.match(after) if self.splitter else None
        if token:
            return [self.added[token[0]].id, *ids], self.chat_stops
        tag = re.match(r"<\|?/?\w+\|?>", after)  # of which a fine-tune made no token
        return ids, (*self.chat_stops, tag[0]) if tag else self.chat_stops

    def _after_an_answer(self) -> str:
        """What the chat format writes behind an answer, without blanks before it; "" where it has none."""
        turns = [("user", "?"), ("assistant", "Answer."), ("user", "?")]
        try:
            parts = (self.chat_format or (lambda messages: []))(
                [{"role": role, "content": content} for role, content in turns]
            )
        except (ValueError, ImportError):
            return ""
        text = "".join(part for part, _ in parts)
        return text.partition("Answer.")[2].lstrip(WHITE_SPACE)


class Stream:
    """Ids in, text out, never half a character: the pieces joined equal `decode` of all ids."""

    def __init__(self, decoder: Any, write: Callable[[str], Any] | None, stops: tuple[str, ...] = ()):
        self.decoder, self.write, self.stops = decoder, write, stops
        self.pending, self.stopped = "", False  # text that may be the beginning of a stop

    def put(self, ids: Any) -> str:
        """Text that is complete after `ids`, an int, list or tensor. Of a prompt, a (1, T) tensor, none."""
        shape = getattr(ids, "shape", ())
        if shape and shape[0] != 1:
            raise ValueError(f"a stream follows one text, not a batch of {shape[0]}")
        if len(shape) == 2:  # but remembered: what follows may begin with the space that ends its last word
            self.decoder.feed(ids[0].tolist())
            return ""
        return self._give(self.decoder.feed([ids] if isinstance(ids, int) else [int(id) for id in ids]))

    def end(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        text = self._give(self.decoder.flush())
        pending, self.stops, self.pending = self.pending, (), ""
        return text + ("" if self.stopped else self._give(pending))

    def _give(self, text: str) -> str:
        if self.stopped:
            return ""
        if self.stops:
            text = self._until_stop(self.pending + text)
        if text and self.write is not None:
            self.write(text)
        return text

    def _until_stop(self, text: str) -> str:
        """What of `text` can be given out: not the first stop, and not what may become one."""
        self.pending = ""
        if places := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(places)]
        longest = max(map(len, self.stops)) - 1
        ends = [text[i:] for i in range(max(0, len(text) - longest), len(text))]
        self.pending = next((end for end in ends if any(stop.startswith(end) for stop in self.stops)), "")
        return text.removesuffix(self.pending)


def splitter(tokens: Iterable[AddedToken | str]) -> re.Pattern | None:
    """What finds these added tokens, of several the longest."""
    longest_first = sorted(tokens, key=lambda token: len(token_text(token)), reverse=True)
    return re.compile("|".join(map(finder_of, longest_first))) if longest_first else None


def token_text(token: AddedToken | str) -> str:
    return token if isinstance(token, str) else token.content


def finder_of(token: AddedToken | str) -> str:
    pattern = re.escape(token_text(token))
    alone = isinstance(token, AddedToken) and token.single_word
    return rf"(?<!\w){pattern}(?!\w)" if alone else pattern


def swallowed_before(token: AddedToken | str, text: str | AddedToken) -> str:
    """The blanks at the end of `text` that belong to the token after it."""
    if not isinstance(token, AddedToken) or not token.lstrip or not isinstance(text, str):
        return ""
    return text[len(text.rstrip(WHITE_SPACE)) :]


def swallowed_after(token: AddedToken | str, text: str | AddedToken) -> str:
    """The blanks at the beginning of `text` that belong to the token before it."""
    if not isinstance(token, AddedToken) or not token.rstrip or not isinstance(text, str):
        return ""
    return text[: len(text) - len(text.lstrip(WHITE_SPACE))]


# ---- Byte-level BPE: GPT-Neo, Phi, Phi-4 -------------------------------------------------------------------


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in vocabulary files. Example: a space is 'Ġ', 'a' is 'a'."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class ByteDecoder:
    """A token may end inside a character: text comes when the character is whole."""

    def __init__(self, bytes_of: dict[int, bytes], hidden: set[int]):
        self.bytes_of, self.hidden = bytes_of, hidden
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: list[int]) -> str:
        return self.utf8.decode(b"".join(self.bytes_of.get(id, b"") for id in ids if id not in self.hidden))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


class ByteLevelTokenizer(Tokenizer):
    decoder = ByteDecoder

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], added: Iterable[AddedToken], pattern: str
    ):
        added = list(added)
        letters, contents = byte_letters(), {token.content for token in added}
        results = [a + b for a, b in merges]
        if absent := [result for result in results if result not in vocab]:
            raise ValueError(f"the vocabulary lacks {absent[0]!r}, the result of a merge")
        ids = [vocab[result] for result in results]
        if any(a >= b for a, b in pairwise(ids)):
            raise ValueError("ids do not ascend in the order of the merges, as in a GPT-2 style vocabulary")
        if missing := [letter for letter in letters if letter not in vocab]:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes: it is not byte-level")
        # tiktoken merges by the rank of the result, so only what merges can make may have one
        self.ranks = {bytes(letters[c] for c in word): vocab[word] for word in [*letters, *results]}
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})
        self.pattern = pattern
        bytes_of = {
            id: bytes(letters[c] for c in word) if letters.keys() >= set(word) else word.encode()
            for word, id in vocab.items()
            if word not in contents
        }
        super().__init__(bytes_of, len(vocab), added)

    def _vocabulary_id(self, content: str) -> int | None:
        letters = byte_letters()  # as vocab.json writes: a space is 'Ġ', and no token has ' '
        if not letters.keys() >= set(content):
            return None
        return self.ids_of_bytes().get(bytes(letters[letter] for letter in content))

    def _encode_ordinary(self, text: str) -> list[int]:
        if not LONG_RUN.search(text):
            return self.bpe.encode_ordinary(text)
        # the regex engine under tiktoken has no room for very long runs of blanks: the `regex` package has
        import regex

        pieces = regex.findall(self.pattern.replace(r"\s", r"\p{White_Space}"), text)
        return [id for piece in pieces for id in self.one_piece.encode_ordinary(piece)]

    @cached_property
    def one_piece(self) -> tiktoken.Encoding:
        """The same merges without splitting."""
        return tiktoken.Encoding("piece", pat_str="(?s:.+)", mergeable_ranks=self.ranks, special_tokens={})


# ---- Sentencepiece: Phi-3, Persimmon, Fuyu -----------------------------------------------------------------

ROLES = ("bos", "eos", "unk", "pad")
END_OF_TEXT = "|ENDOFTEXT|"  # Adept's, which begins texts too
BREAK = "\ud800"  # between pieces; no text has it, lone surrogates are replaced before


class PieceDecoder:
    """Pieces with their spaces; a run of byte pieces is one text in UTF-8, or as many U+FFFD as it has bytes,
    which shows only at its end. The very first space of all is not text: encoding put it there."""

    def __init__(self, bytes_of: dict[int, bytes], hidden: set[int]):
        self.bytes_of, self.hidden, self.run, self.begun = bytes_of, hidden, bytearray(), False

    def feed(self, ids: list[int]) -> str:
        text = ""
        for id in ids:
            if id not in self.bytes_of or id in self.hidden:
                continue
            piece = self.bytes_of[id].decode()
            if byte := BYTE_PIECE.fullmatch(piece):
                self.run += bytes.fromhex(byte[1])
            else:
                text += self.end_run() + piece.replace("▁", " ")
        return self.unspaced(text)

    def flush(self) -> str:
        return self.unspaced(self.end_run())

    def end_run(self) -> str:
        run, self.run = self.run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def unspaced(self, text: str) -> str:
        if text and not self.begun:
            self.begun, text = True, text.removeprefix(" ")
        return text


def marked(text: str) -> str:
    return "▁" + text.replace(" ", "▁")


class PieceTokenizer(Tokenizer):
    """Sentencepiece: a `▁` for every space and one before each text between added tokens, nothing normalised.

    Pieces with merges (BPE) are found by them, pieces with chances (unigram) as the likeliest row of pieces,
    in both as Hugging Face's fast tokenizer does: sentencepiece itself breaks ties in another order and adds
    chances in float32. In unigram control and byte pieces in a text are found too, "<s>" is 1.
    """

    decoder = PieceDecoder
    normalizes = True  # a word is found with its `▁`

    def __init__(
        self,
        vocab: dict[str, int],
        pieces: Pieces,
        merges: list[tuple[str, str]] | None,
        added: Iterable[AddedToken],
    ):
        added = list(added)
        self.vocab, self.pieces = vocab, pieces
        self.unigram = unigram = merges is None
        super().__init__({id: name.encode() for name, id in vocab.items()}, len(vocab), added)
        # what the vocabulary's makers defined, such as |SPEAKER|; numbers and words among it are harmless
        defined = [name for name, score in pieces.scores.items() if unigram and score == 0]
        self.defined = {name for name in defined if not name.strip("▁").isalnum()}
        self.cut = Cutter(vocab, pieces.scores, merges).cut

    def _add(self, tokens: Iterable[AddedToken]) -> None:
        super()._add(tokens)
        normalized = [token for token in self.added.values() if token.normalized]
        self.normalized = {token.content for token in normalized}
        self.normalized_ids = {marked(token.content): token.id for token in normalized}
        self.finder = splitter(token._replace(content=marked(token.content)) for token in normalized)
        control = self.pieces.control if self.unigram else ()
        self.control = splitter([*control, *(token.content for token in normalized)])

    def control_tokens(self, text: str) -> set[str]:
        """Also those that are pieces of the vocabulary."""
        return super().control_tokens(text) | self._control_pieces(text)

    def _control_pieces(self, text: str) -> set[str]:
        tokens = {piece for piece in self.cut(marked(text)) if piece in self.defined}
        if self.control:
            tokens |= {token[0] for token in self.control.finditer(text)}
        return tokens

    def _defused(self, text: str) -> str:
        finder = splitter(self._control_pieces(text))
        return finder.sub(lambda token: token[0][0] + BREAK + token[0][1:], text) if finder else text

    def _encode_ordinary(self, text: str) -> list[int]:
        text, ids, done = marked(text), [], 0
        for token in self.finder.finditer(text) if self.finder else ():
            ids += self._spelled(text[done : token.start()])
            ids.append(self.normalized_ids[token[0]])
            done = token.end()
        return ids + self._spelled(text[done:])

    def pieces_with_sizes(self, text: str) -> Iterator[tuple[int, int]]:
        """(how many characters of the marked text, how many tokens they become), of each piece in its order.
        Unigram spells a run of unknown characters as one, merges each by itself."""
        text, done = marked(text), 0
        for token in self.finder.finditer(text) if self.finder else ():
            yield from self._sizes(text[done : token.start()])
            yield len(token[0]), 1
            done = token.end()
        yield from self._sizes(text[done:])

    def _sizes(self, text: str) -> Iterator[tuple[int, int]]:
        for known, row in groupby(self.cut(text), self.is_known):
            pieces = list(row)
            if not known:
                together = self.unigram or len(self.unknown_ids("".join(pieces))) == 1
                pieces = ["".join(pieces)] if together else [*"".join(pieces)]
            yield from ((len(piece), 1 if known else len(self.unknown_ids(piece))) for piece in pieces)

    def _spelled(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in text.split(BREAK):
            for known, row in groupby(self.cut(part), self.is_known):
                pieces = list(row)
                ids += [self.vocab[piece] for piece in pieces] if known else self.unknown_ids("".join(pieces))
        return ids

    def is_known(self, piece: str) -> bool:
        return piece in self.vocab and piece != self.pieces.unknown

    def unknown_ids(self, text: str) -> list[int]:
        """Its bytes, where the vocabulary has them."""
        names = [f"<0x{byte:02X}>" for byte in text.encode()]
        if text == self.pieces.unknown or any(name not in self.vocab for name in names):
            names = [self.pieces.unknown]
        return [self.vocab[name] for name in names]


# ---- GPT-1's own BPE ---------------------------------------------------------------------------------------

WORD_BREAKS = re.compile("[\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
CJK = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f])"
)  # a gap that the fast tokenizer has too


def is_punctuation(char: str) -> bool:
    """ASCII's marks all count, also those that Unicode calls symbols: $ + < = > ^ ` | ~"""
    return category(char)[0] == "P" or char in "$+<=>^`|~"


def plain_text(text: str) -> str:
    """What `AutoTokenizer` makes of a text before it splits words: no control characters or accents, lower
    case, a blank for each of any kind."""
    text = WORD_BREAKS.sub(lambda blanks: " " * len(blanks[0]), text)
    text = "".join(c for c in text if category(c) not in ("Cc", "Cf", "Co", "Cs") and c != "\ufffd")
    text = decomposed(CJK.sub(r" \1 ", text))
    return "".join(c.lower() for c in text if category(c) != "Mn")


def plain_words(text: str) -> list[str]:
    """What `AutoTokenizer` makes of a text without blanks: no control characters or accents, lower case,
    every punctuation mark and ideograph a word of its own. Example: "Café-Bar!" -> cafe - bar !"""
    text = "".join(c for c in text if category(c) not in ("Cc", "Cf", "Co", "Cs") and c != "\ufffd")
    text = decomposed(CJK.sub(r" \1 ", text))
    text = "".join(f" {c} " if is_punctuation(c) else c.lower() for c in text if category(c) != "Mn")
    return [word for word in WORD_BREAKS.split(text) if word]


class WordDecoder:
    """The end of a word becomes a space when another token follows."""

    def __init__(self, bytes_of: dict[int, bytes], hidden: set[int]):
        self.bytes_of, self.hidden, self.space = bytes_of, hidden, ""

    def feed(self, ids: list[int]) -> str:
        text = ""
        for id in ids:
            if id in self.bytes_of and id not in self.hidden:
                token = self.bytes_of[id].decode()
                text += self.space + token.removesuffix(END_OF_WORD)
                self.space = " " if token.endswith(END_OF_WORD) else ""
        return text

    def flush(self) -> str:
        return ""


class WordTokenizer(Tokenizer):
    """GPT-1: lower-case words whose last symbol carries `</w>`; symbols not in the vocabulary become `<unk>`.

    `original` prepares the text as the paper did (ftfy, OpenAI's standardisation, spaCy): that is what the
    model was trained on; it keeps accents, quotes, line breaks. Without it the ids are `AutoTokenizer`'s.
    """

    decoder = WordDecoder

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        added: Iterable[AddedToken],
        original: bool = False,
    ):
        if "<unk>" not in vocab:
            raise ValueError("the vocabulary lacks <unk>")
        if original:  # where <unk> is text like any other
            added = [token for token in added if token.content != "<unk>"]
        self.normalizes = not original
        super().__init__({id: word.encode() for word, id in vocab.items()}, len(vocab), added)
        self.vocab, self.ranks = vocab, {pair: rank for rank, pair in enumerate(merges)}
        self.word_ids = lru_cache(2**16)(self._word_ids)
        self.plain_ids = lru_cache(2**16)(self._plain_ids)
        self.standardise = original_words() if original else None

    def _encode_ordinary(self, text: str) -> list[int]:
        if self.standardise is not None:
            return [id for word in self.standardise(text) for id in self.word_ids(word)]
        ids, done = [], 0
        if self.finder:
            text = plain_text(text)
        for token in self.finder.finditer(text) if self.finder else ():
            ids += self.ids_of_words(text[done : token.start()])
            ids.append(self.normalized_ids[token[0]])
            done = token.end()
        return ids + self.ids_of_words(text[done:])

    def _add(self, tokens: Iterable[AddedToken]) -> None:
        super()._add(tokens)
        normalized = [t for t in self.added.values() if t.normalized and self.normalizes]
        self.normalized_ids = {plain_text(token.content): token.id for token in normalized}
        self.finder = splitter(token._replace(content=plain_text(token.content)) for token in normalized)

    def ids_of_words(self, text: str) -> list[int]:
        return [id for chunk in WORD_BREAKS.split(text) for id in self.plain_ids(chunk)]

    def _plain_ids(self, chunk: str) -> list[int]:
        return [id for word in plain_words(chunk) for id in self.word_ids(word)]

    def _word_ids(self, word: str) -> list[int]:
        symbols = merge([*word[:-1], word[-1] + END_OF_WORD], self.ranks)
        return [self.vocab.get(symbol, self.vocab["<unk>"]) for symbol in symbols]


def original_words() -> Callable[[str], list[str]]:
    """OpenAI's preparation of a text: repaired, standardised, split by spaCy, and lower-cased only then."""
    try:
        import ftfy
        import spacy
    except ImportError as error:
        hint = f"{error.name} is missing: pip install '.[original]'"
        raise ImportError(f"original=True needs ftfy and spaCy, and {hint}") from None
    split = spacy.blank("en").tokenizer
    renamed = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})

    def words(text: str) -> list[str]:
        text = ftfy.fix_text(text).translate(renamed)
        text = re.sub(r"(([-~!\";?+,()\\/*\[\]}{|_])\2*)", r" \1 ", text)  # runs of one mark stand alone
        text = re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", " \n ", text)).strip()
        return [word for token in split(text) if (word := token.text.lower().strip(" "))]

    return words


# ---- Reading a folder --------------------------------------------------------------------------------------


def load(path_or_id: str | Path, original: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint folder or hub id, from `tokenizer.model`, or `tokenizer.json`, or
    `vocab.json` and `merges.txt`.

    `original` is for GPT-1: see WordTokenizer. OSError where files are missing, ImportError where a package
    is; ValueError, naming the file, where they are broken or of another kind.
    """
    return read_settled(path_or_id, lambda folder: read(folder, original), weights=False)[1]


def read(folder: Path, original: bool) -> Tokenizer:
    """As `load`, while nobody writes there."""
    if is_adapter(folder) and not any((folder / name).exists() for name in TOKENIZER_FILES):
        folder = adapter_base(folder)
    source, is_gguf = folder, folder.suffix == ".gguf"
    if is_gguf:
        (config, model), names = gguf_tokenizer_config(folder), {}
    else:
        config = read_json_if_any(folder / "tokenizer_config.json")
        names = read_json_if_any(folder / "special_tokens_map.json")
        model = read_json_if_any(folder / "config.json")
    try:
        files = gguf_vocabulary(folder) if is_gguf else read_files(folder)
        source = files.source
        if files.pieces and END_OF_TEXT in files.vocab:  # Adept's release does not say
            config = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": "<unk>", **config}
        tokenizer = build(files, {**config, **names}, folder, model.get("vocab_size"), original)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{source} is not a tokenizer ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{source}: {error}") from None
    set_roles(tokenizer, folder, config, names)
    if isinstance(tokenizer, PieceTokenizer) and config.get("add_bos_token", True):
        tokenizer.prefix_ids = (tokenizer.bos_token_id,) if tokenizer.bos_token_id is not None else ()
    kind = model.get("model_type", "persimmon" if source.name == "adept_vocab.model" else None)
    contents = {}
    for role in (f"{role}_token" for role in ROLES):
        content = token_content(config.get(role) or names.get(role))
        if isinstance(content, str):
            contents[role] = content
    tokenizer.chat_format = chat_format(tokenizer, kind, chat_template(folder, config), contents)
    tokenizer.folder = folder
    return tokenizer


def set_roles(tokenizer: Tokenizer, folder: Path, config: dict, names: dict) -> None:
    """`bos_token_id` and its like, by the contents that the folder's files name."""
    for role in ("bos", "eos", "pad"):
        content = token_content(config.get(f"{role}_token") or names.get(f"{role}_token"))
        if not isinstance(content, str | None):
            file = folder / "tokenizer_config.json"
            raise ValueError(f"{file}: {role}_token must be a text, not {content!r:.80}")
        if content is not None:
            token = tokenizer.added.get(content)
            setattr(tokenizer, f"{role}_token_id", token.id if token else None)


def build(files: Files, config: dict, folder: Path, rows: int | None, original: bool) -> Tokenizer:
    """The class that the vocabulary wants. `rows` is the size of the model's token table."""
    if config.get("add_prefix_space") and not files.pieces:
        raise ValueError("add_prefix_space is not supported")
    ids = files.vocab.values()
    if not all(type(id) is int and 0 <= id < 2**31 for id in ids) or len(set(ids)) < len(ids):
        raise ValueError("ids of the vocabulary must be whole numbers from 0 on, each of one token")
    is_word_level = any(word.endswith(END_OF_WORD) for word in files.vocab)
    if original and not is_word_level:
        raise ValueError("original=True is for GPT-1, and this is another vocabulary")
    if is_word_level:
        config.setdefault("unk_token", "<unk>")
    added = added_tokens(folder, files.vocab, files.added, config)
    if files.pieces:
        return PieceTokenizer(files.vocab, files.pieces, files.merges, added)
    merges = files.merges or []
    if is_word_level:
        return WordTokenizer(files.vocab, merges, added, original)
    pattern = files.pattern or PATTERN_BY_ROWS.get(rows or 0, GPT2)
    return ByteLevelTokenizer(files.vocab, merges, added, pattern)

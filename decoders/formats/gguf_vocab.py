"""A GGUF file's vocabulary: byte-level BPE of phi-2, phi-4 and phi-4-mini, Llama's pieces of Phi-3.

A file has tokens, their types, merges or scores, and the ids of the special ones. What it has not are the
flags of its control tokens: whether one swallows the blanks around it. Those of the hub's folders are known,
and are restored here by the tokens' names; what `general.name` says, by which llama.cpp decides, is nothing
to go by.
"""

from pathlib import Path
from typing import Any

from .gguf import Header, read_headers
from .gguf_config import FAMILY, architecture
from .vocab import CL100K, GPT2, O200K, AddedToken, Files, Pieces, ranked_merges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
PATTERNS = {"phi-2": GPT2, "gpt-2": GPT2, "dbrx": CL100K, "gpt-4o": O200K}  # tokenizer.ggml.pre
WITHOUT_PRE = {"phi2": GPT2}  # files of before May 2024

PHI3_TURNS = {f"<|{name}|>" for name in ("system", "user", "assistant", "end")}
PHI3_RSTRIP = PHI3_TURNS | {"</s>"} | {f"<|placeholder{i}|>" for i in range(1, 7)}
PHI4_MINI_TOOLS = {"<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"}
PHI4_MINI_RSTRIP = PHI3_TURNS | PHI4_MINI_TOOLS | {"<|tag|>"}


class Vocabulary:
    """The tokenizer's part of the metadata, checked: every error names the file and the key."""

    def __init__(self, header: Header):
        self.header, self.kind = header, architecture(header)
        self.tokens: list[str] = self.strings("tokens")
        self.types: list[int] = self.numbers("token_type", int)

    def wrong(self, key: str, wanted: str) -> ValueError:
        return ValueError(f"{self.header.file}: tokenizer.ggml.{key} must be {wanted}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> list[str]:
        values = self.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of texts")
        return values

    def numbers(self, key: str, kind: type) -> list:
        values = self.get(key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self.wrong(key, "a list of numbers")
        if len(values) != len(self.tokens):
            raise self.wrong(key, f"{len(self.tokens)} numbers, one for each token, not {len(values)}")
        return values

    def token(self, role: str) -> str | None:
        """The text of a special token, such as bos."""
        id = self.get(f"{role}_token_id")
        if id is None:
            return None
        if type(id) is not int or not 0 <= id < len(self.tokens):
            raise self.wrong(f"{role}_token_id", f"a token id below {len(self.tokens)}")
        return self.tokens[id]

    def ids(self, *types: int) -> list[int]:
        return [id for id, kind in enumerate(self.types) if kind in types]

    def named(self, ids: list[int]) -> dict[str, int]:
        """token -> id, of distinct tokens."""
        named: dict[str, int] = {}
        for id in ids:
            if self.tokens[id] in named:
                token = ascii(self.tokens[id])[:60]
                raise self.wrong("tokens", f"distinct, and {token} is there twice")
            named[self.tokens[id]] = id
        return named


def gguf_vocabulary(path: Path) -> Files:
    """Vocabulary, merges and added tokens of a GGUF file, as `vocab.read_files` gives a folder's."""
    data = Vocabulary(read_headers(path)[0])
    model = data.get("model")
    if model == "gpt2":
        return byte_level(data)
    if model == "llama":
        return pieces(data)
    message = f"gpt2 or llama, which Phi has, not {ascii(model)[:40]}"
    raise data.wrong("model", message)


def byte_level(data: Vocabulary) -> Files:
    pre = data.get("pre", "default")
    pattern = PATTERNS.get(pre) if isinstance(pre, str) else None
    if pre == "default":
        pattern = WITHOUT_PRE.get(data.kind)
    if pattern is None:
        raise data.wrong("pre", f"one of {', '.join(PATTERNS)}, not {ascii(pre)[:40]}")
    merges: list[tuple[str, str]] = []
    for merge in data.strings("merges"):
        first, blank, second = merge.partition(" ")
        if not blank or " " in second:
            raise data.wrong("merges", f"pairs, not {ascii(merge)[:40]}")
        merges.append((first, second))
    vocab = data.named(data.ids(NORMAL, BYTE))
    return Files(
        data.header.file, vocab, added(data, data.ids(UNKNOWN, CONTROL, USER_DEFINED)), merges, pattern
    )


def pieces(data: Vocabulary) -> Files:
    """Llama's: the merges follow from the scores, which are minus a merge's rank. All after the last piece of
    text are added tokens, and so are the control tokens before it."""
    if data.get("add_space_prefix", True) is not True:
        raise data.wrong("add_space_prefix", "true, as in Phi-3")
    last = max(data.ids(NORMAL, BYTE), default=-1)
    own = [id for id in range(last + 1) if data.types[id] != UNUSED]
    vocab, scores = data.named(own), data.numbers("scores", float)
    if any(score != score for score in scores):
        raise data.wrong("scores", "numbers, and one is NaN")
    special = data.ids(UNKNOWN, CONTROL, USER_DEFINED)
    control = {data.tokens[id] for id in (*data.ids(BYTE), *special)}
    of_pieces = {token: scores[id] for token, id in vocab.items()}
    merges = ranked_merges(vocab, of_pieces, control)
    unknown = data.token("unknown") or "<unk>"
    if unknown not in vocab:
        raise data.wrong("unknown_token_id", "one of the vocabulary's")
    return Files(
        data.header.file,
        vocab,
        added(data, special),
        merges,
        pieces=Pieces(of_pieces, control, unknown),
    )


def added(data: Vocabulary, ids: list[int]) -> dict[int, AddedToken]:
    """Added tokens with the flags that the hub's folder gives them."""
    names = {data.tokens[id] for id in ids}
    both, after, text = set(), set(), set()  # swallow blanks on both sides, after them; are no control tokens
    if data.kind == "phi3" and data.get("model") == "llama" and not is_of_april(data):
        after, text = PHI3_RSTRIP, {"</s>"}
    elif data.kind == "phi3" and "<|im_sep|>" in names:  # phi-4
        both = {data.tokens[id] for id in data.ids(CONTROL)}
    elif data.kind == "phi3" and "<|tool_call|>" in names:
        after, text = PHI4_MINI_RSTRIP, PHI4_MINI_TOOLS
    found = {}
    for id in ids:
        token = data.tokens[id]
        special = data.types[id] != USER_DEFINED and token not in text
        found[id] = AddedToken(id, token, token in both, token in both | after, special)
    data.named(list(found))
    return found


def is_of_april(data: Vocabulary) -> bool:
    """Phi-3's first tokenizer, of April 2024: every text begins with <s>, </s> is a control token, and no
    control token swallows a blank."""
    end = data.tokens.index("</s>") if "</s>" in data.tokens else None
    return data.get("add_bos_token") is True and end is not None and data.types[end] == CONTROL


def gguf_tokenizer_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `tokenizer_config.json` and `config.json` would say of the tokenizer."""
    data = Vocabulary(read_headers(path)[0])
    template = data.header.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{data.header.file}: tokenizer.chat_template must be a text")
    config: dict[str, Any] = {f"{ours}_token": data.token(theirs) for ours, theirs in ROLES.items()}
    config = {key: token for key, token in config.items() if token is not None}
    if template is not None:
        config["chat_template"] = template
    config["add_bos_token"] = data.get("add_bos_token", True)
    return config, {"model_type": FAMILY[data.kind]}


ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}

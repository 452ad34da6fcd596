"""A folder's tokenizer files, of any kind -> vocabulary, merges, added tokens and how text is split."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from .folder import read_json, read_json_if_any, read_small, read_text

# ---- Splitting patterns ------------------------------------------------------------------------------------

# What a piece of text may be before the merges start, in tiktoken's notation: possessive, with `\s++$` first,
# so that long runs take no backtracking. Equal to the published patterns of GPT-2, cl100k and o200k.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {  # as tokenizer.json writes them -> ours
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": CL100K,
    O200K: O200K,
}
PATTERN_BY_ROWS = {100352: CL100K, 200064: O200K}  # phi-4 and phi-4-mini; all others split as GPT-2

END_OF_WORD = "</w>"  # GPT-1's
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


class AddedToken(NamedTuple):
    """A piece of text that becomes one id before anything else is looked at."""

    id: int
    content: str
    lstrip: bool = False  # swallow blanks before it
    rstrip: bool = False  # and after it
    special: bool = False  # left out by decode(skip_special_tokens=True)
    normalized: bool = False  # looked for where sentencepiece has put its `▁` already
    single_word: bool = False  # not inside of a word


class Files(NamedTuple):
    """What the folder's files say: those of one kind."""

    source: Path  # the file to blame
    vocab: dict[str, int]
    added: dict[int, AddedToken]
    merges: list[tuple[str, str]] | None = None
    pattern: str | None = None  # how to split text, in tiktoken's notation, if a file tells
    pieces: "Pieces | None" = None


class Pieces(NamedTuple):
    """A sentencepiece vocabulary, beside its ids and the merges that BPE has and unigram has not."""

    scores: dict[str, float]  # in unigram logarithms of chances
    control: set[str]  # begin, end, unknown and bytes
    unknown: str


def read_files(folder: Path) -> Files:
    """From whichever files the folder has."""
    whole = folder / "tokenizer.json"
    for file in (folder / "tokenizer.model", folder / "adept_vocab.model"):
        if file.exists():
            return read_pieces(file, whole)
    if whole.exists():
        try:
            return read_whole(whole)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{whole} is not a tokenizer ({type(error).__name__}: {error})") from None
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder_bpe_40000.json", "vocab_40000.bpe")):
        if (folder / vocab).exists():
            return Files(folder / vocab, read_json(folder / vocab), {}, read_merges(folder / merges))
    kinds = "tokenizer.model, tokenizer.json, vocab.json with merges.txt"
    raise FileNotFoundError(f"{folder} holds no tokenizer: none of {kinds}")


def read_pieces(file: Path, whole: Path) -> Files:
    """A sentencepiece model in protobuf, and what tokenizer.json beside it adds: tokens, the order of merges
    that make the same piece, chances in float64."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=read_small(file))
    except RuntimeError as error:
        message = " ".join(str(error).split())  # it shows what the file holds, line breaks too
        raise ValueError(f"{file} is not a sentencepiece model: {message}") from None
    ids = range(len(model))
    names = [model.id_to_piece(id) for id in ids]
    vocab = dict(zip(names, ids, strict=True))
    scores = dict(zip(names, map(model.get_score, ids), strict=True))
    kinds = (model.is_control, model.is_byte, model.is_unknown)
    control = {names[id] for id in ids if any(kind(id) for kind in kinds)}
    content, merges = read_json(whole, rounded) if whole.exists() else {}, None
    stored = content.get("model", {})
    if all(score.is_integer() for score in scores.values()):  # minus the rank: BPE
        merges = pairs_of(stored["merges"]) if "merges" in stored else ranked_merges(vocab, scores, control)
    elif stored.get("type") == "Unigram":
        scores |= {piece: score for piece, score in stored["vocab"] if piece in vocab}
    added = {token["id"]: flagged(token["id"], token) for token in content.get("added_tokens", [])}
    return Files(file, vocab, added, merges, pieces=Pieces(scores, control, names[model.unk_id()]))


def rounded(number: str) -> float:
    """A score as the fast tokenizer reads it: its JSON parser rounds digits and power of ten each by itself,
    which is the last bit of one number in twelve and decides ties."""
    digits, _, power = number.lower().partition("e")
    whole, _, fraction = digits.partition(".")
    if len(whole + fraction) > 19:  # no double is written so
        return float(number)
    exponent = int(power or 0) - len(fraction)
    value = float(int(whole + fraction))
    if exponent < 0:
        value /= float(f"1e{-exponent}")
    else:
        value *= float(f"1e{exponent}")
    return -abs(value) if number[0] == "-" else value


def pairs_of(merges: list) -> list[tuple[str, str]]:
    """Merges of tokenizer.json: "a b" or pairs. ValueError for what is not two."""
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    return [pair_of_two(pair) for pair in pairs]


def pair_of_two(pair: tuple) -> tuple[str, str]:
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ValueError(f"{' '.join(map(str, pair))[:40]!r} is not a merge of two")
    return pair


def ranked_merges(
    vocab: dict[str, int], scores: dict[str, float], control: set[str]
) -> list[tuple[str, str]]:
    """All pairs that make a piece, in the order that Transformers 4.40 and later give them: the best piece
    first; of one piece the longest left part. Where tokenizer.json was made by older ones it differs."""
    pairs = []
    for piece, score in scores.items():
        cuts = [] if piece in control else [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs += [(score, len(a), (a, b)) for a, b in cuts if a in vocab and b in vocab]
    return [pair for *_, pair in sorted(pairs, key=lambda p: p[:2], reverse=True)]


def read_whole(file: Path) -> Files:
    """`tokenizer.json`, of any kind. Merges are "a b" or pairs."""
    content = read_json(file, rounded)
    model, before = content["model"], content["pre_tokenizer"]
    word_level = model.get("end_of_word_suffix") == END_OF_WORD
    listed = content.get("added_tokens", [])
    if model.get("byte_fallback"):
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        marks = [{"type": "Prepend", "prepend": "▁"}, replace]
        if before is not None or content["normalizer"] != {"type": "Sequence", "normalizers": marks}:
            raise ValueError(f"{file} does not put a ▁ before each text and for each space: not supported")
        return Files(file, *whole_pieces(model, listed))
    if model.get("type", "BPE") != "BPE" or (content.get("normalizer") and not word_level):
        raise ValueError(f"{file}: neither sentencepiece nor BPE of bytes or words, which are supported")
    merges = pairs_of(model["merges"])
    added = {token["id"]: flagged(token["id"], token) for token in listed}
    if word_level:
        return Files(file, model["vocab"], added, merges)
    steps = before.get("pretokenizers", [before])
    published = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    if {step["type"] for step in steps} - {"Split", "ByteLevel"} or not PUBLISHED.keys() >= set(published):
        raise ValueError(
            f"{file}: the pre_tokenizer is none of GPT-2's, cl100k's and o200k's: {published or before}"
        )
    return Files(file, model["vocab"], added, merges, PUBLISHED[published[0]] if published else GPT2)


def whole_pieces(model: dict, listed: list[dict]) -> tuple:
    """The same from tokenizer.json alone, in the order of `Files`: Transformers 5 saves nothing else."""
    if model["type"] == "Unigram":
        scores, merges = dict(map(tuple, model["vocab"])), None
        vocab = {piece: id for id, piece in enumerate(scores)}
        unknown = model["vocab"][model["unk_id"]][0]
    else:
        vocab, merges, unknown = model["vocab"], pairs_of(model["merges"]), model["unk_token"]
        scores = dict.fromkeys(vocab, 0.0)
    named = (unknown, "<s>", "</s>")
    control = {piece for piece in vocab if piece in named or BYTE_PIECE.fullmatch(piece)}
    added = {token["id"]: flagged(token["id"], token) for token in listed}
    return vocab, added, merges, None, Pieces(scores, control, unknown)


def read_merges(file: Path) -> list[tuple[str, str]]:
    """Only the first line is a comment, '#' begins real merges too. splitlines splits at more than \\n."""
    lines = read_text(file).split("\n")
    listed = lines[1:] if lines[0].startswith("#version") else lines
    try:
        return pairs_of([line for line in listed if line])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def added_tokens(
    folder: Path, vocab: dict[str, int], listed: dict[int, AddedToken], config: dict
) -> list[AddedToken]:
    """Added tokens with their flags, which folders scatter over five places; the later ones here win."""
    added = dict(listed)
    extra = folder / "added_tokens.json"
    for content, id in (read_json(extra) if extra.exists() else {}).items():
        added.setdefault(id, AddedToken(id, content))
    for id, token in config.get("added_tokens_decoder", {}).items():
        added[int(id)] = flagged(int(id), token)
    ids = {token.content: token.id for token in added.values()}
    named = [config.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    for token in [*named, *config.get("additional_special_tokens", [])]:
        content = token_content(token)
        if content is None:
            continue
        id = ids.get(content, vocab.get(content))
        if id is None:
            id = max([*vocab.values(), *added]) + 1
        old = added.get(id) or flagged(id, token if isinstance(token, dict) else {"content": content})
        added[id] = old._replace(special=True)
        ids[content] = id
    return list(added.values())


def flagged(id: int, token: dict) -> AddedToken:
    names = ("lstrip", "rstrip", "special", "normalized", "single_word")
    flags = (bool(token.get(name)) for name in names)
    return AddedToken(id, token["content"], *flags)


def token_content(token: dict | str | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


# ---- And back ----------------------------------------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "adept_vocab.model",
    "vocab.json",
    "merges.txt",
    "encoder_bpe_40000.json",
    "vocab_40000.bpe",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def write_files(source: Path, target: Path, changed: Iterable[AddedToken]) -> None:
    """Copy a folder's tokenizer files; tokens that are `changed` go where each version looks for them."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    add_tokens(target, changed)


def token_entry(token: AddedToken) -> dict[str, Any]:
    """An added token as tokenizer.json and tokenizer_config.json have it, without its id."""
    names = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": token.content, **{name: getattr(token, name) for name in names}}


def add_tokens(target: Path, changed: Iterable[AddedToken]) -> None:
    """Put tokens into a folder's files, wherever a version looks for them."""
    entries = {token.id: token_entry(token) for token in changed}
    if not entries:
        return
    config = read_json_if_any(target / "tokenizer_config.json")
    listed = config.get("added_tokens_decoder", {})
    config["added_tokens_decoder"] = {**listed, **{str(id): entry for id, entry in entries.items()}}
    write_json(target / "tokenizer_config.json", config)
    if (target / "tokenizer.json").exists():
        content = read_json(target / "tokenizer.json")
        kept = [token for token in content.get("added_tokens", []) if token["id"] not in entries]
        added = sorted(kept + [{"id": id, **entry} for id, entry in entries.items()], key=lambda t: t["id"])
        write_json(target / "tokenizer.json", {**content, "added_tokens": added})


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

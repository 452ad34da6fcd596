"""A GGUF file's vocabulary -> the hub's `tokenizer.json` and `tokenizer_config.json`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .gguf_vocab import gguf_tokenizer_config, gguf_vocabulary
from .vocab import GPT2, PUBLISHED, AddedToken, Files, token_entry, write_json


def write_gguf_tokenizer(file: Path, target: Path) -> None:
    """Both files, as the fast tokenizer reads them."""
    files = gguf_vocabulary(file)
    config, _ = gguf_tokenizer_config(file)
    added = sorted(files.added.values())
    listed = [{"id": token.id, **token_entry(token)} for token in added]
    body = pieces(files, config, added) if files.pieces else byte_level(files)
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": listed, **body}
    write_json(target / "tokenizer.json", content)
    decoder = {str(token.id): token_entry(token) for token in added}
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(target / "tokenizer_config.json", {**own, **config, "added_tokens_decoder": decoder})


def bpe(files: Files, **changes: Any) -> dict[str, Any]:
    """The part of tokenizer.json that merges."""
    merges = [" ".join(pair) for pair in files.merges or []]
    added = {token.content: id for id, token in files.added.items()}  # else they would get the next free ids
    vocab = dict(sorted({**files.vocab, **added}.items(), key=lambda item: item[1]))
    plain: dict[str, Any] = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    plain |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **changes, "vocab": vocab, "merges": merges}


def byte_level(files: Files) -> dict[str, Any]:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    before: dict[str, Any] = {**step, "use_regex": True}
    if files.pattern != GPT2:
        published = next(theirs for theirs, ours in PUBLISHED.items() if ours == files.pattern)
        split = {"type": "Split", "pattern": {"Regex": published}, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [split, {**step, "use_regex": False}]}
    after = {**step, "use_regex": True}
    return {
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": after,
        "decoder": after,
        "model": bpe(files),
    }


def pieces(files: Files, config: dict[str, Any], added: Iterable[AddedToken]) -> dict[str, Any]:
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, space]
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = files.pieces.unknown if files.pieces else None
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": first_token(config, added),
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": bpe(files, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def first_token(config: dict[str, Any], added: Iterable[AddedToken]) -> dict[str, Any] | None:
    """What puts <s> before a text, where the model wants it."""
    name = config.get("bos_token")
    id = next((token.id for token in added if token.content == name), None)
    if id is None or not config["add_bos_token"]:
        return None
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
    later = {"SpecialToken": {"id": name, "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, later, second],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }

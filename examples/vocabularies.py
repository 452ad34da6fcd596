"""The tokenizers of the tiny checkpoints: trained on texts, and written as the family's hub folder has it.

Needs `pip install '.[train]'`.
"""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

END, ADEPT_END = "<|endoftext|>", "|ENDOFTEXT|"


def byte_level_bpe(texts: list[str], folder: Path, vocab_size: int = 1000) -> None:
    """GPT-2's layout: the 256 bytes, then the merges, then the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([END])
    whole = json.loads(bpe.to_str())
    vocab = whole["model"]
    vocab["merges"] = [" ".join(pair) for pair in vocab["merges"]]  # as older tokenizers want them too
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *vocab["merges"]]) + "\n", "utf-8")
    with_end = {**vocab["vocab"], END: bpe.token_to_id(END)}
    (folder / "vocab.json").write_text(json.dumps(with_end, ensure_ascii=False), "utf-8")
    names = {f"{role}_token": END for role in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def lower_case_bpe(texts: list[str], folder: Path, vocab_size: int = 1000) -> None:
    """GPT-1's layout: <unk>, then symbols, the same at the end of a word, and the merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.BertNormalizer(lowercase=True)
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=["<unk>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    vocab = {**model["vocab"], END: len(model["vocab"])}  # GPT-1 itself has no end: it was trained on books
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    names = {"unk_token": "<unk>", "eos_token": END}
    settings = {"tokenizer_class": "OpenAIGPTTokenizer", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def byte_level_bpe_with_blanks(texts: list[str], folder: Path) -> None:
    """Phi's layout: GPT-2's, and runs of 31 to 2 spaces and of 9 to 2 tabs as tokens of their own."""
    byte_level_bpe(texts, folder)
    first = len(json.loads((folder / "vocab.json").read_text("utf-8")))
    blanks = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    added = {content: first + i for i, content in enumerate(blanks)}
    (folder / "added_tokens.json").write_text(json.dumps(added) + "\n")
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    whole["added_tokens"] += [{"id": id, "content": content, **flags} for content, id in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    known = {str(token.pop("id")): token for token in whole["added_tokens"]}
    config |= {"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": known}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def sentencepiece_model(
    texts: list[str], folder: Path, kind: str, vocab_size: int, symbols: list[str]
) -> dict[str, tuple[int, float]]:
    """Writes tokenizer.model with byte fallback; returns piece -> (id, score)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        pad_id=-1,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )  # unigrams may be fewer
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return {pieces.id_to_piece(id): (id, pieces.get_score(id)) for id in range(len(pieces))}


def rescore(file: Path, chances: dict[str, float]) -> None:
    """Give pieces of a tokenizer.model chances of their own, which the trainer took for symbols."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf

    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for piece in model.pieces:
        if piece.piece in chances:
            piece.score, piece.type = chances[piece.piece], piece.NORMAL
    file.write_bytes(model.SerializeToString())


def whole_sentencepiece(model: dict, added: list[dict], begin: str | None) -> dict:
    """tokenizer.json for it, as the hub has it: a `▁` before each text, then the merges or the unigrams."""
    tokens: list[dict] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    if begin:
        id = next(token["id"] for token in added if token["content"] == begin)
        tokens = [{"SpecialToken": {"id": begin, "type_id": 0}}, *tokens]
        special = {begin: {"id": begin, "ids": [id], "tokens": [begin]}}
    ids = {"Sequence": "B", "SpecialToken": begin}
    second = [{name: {"id": ids[name], "type_id": 1} for name in token} for token in tokens]
    space = {"String": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": space, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": tokens,
            "pair": tokens + second,
            "special_tokens": special,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }


PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)


def sentencepiece_bpe(texts: list[str], folder: Path) -> None:
    """Phi-3's layout: sentencepiece BPE, then control tokens that swallow the blanks after them."""
    plain = [part for text in texts for part in re.split(r"<\|\w+\|>\n?", text) if part]
    pieces = sentencepiece_model(plain, folder, "bpe", 1000, [])
    ids = {piece: id for piece, (id, _) in pieces.items()}
    merges = []
    for piece in list(ids)[3 + 256 :]:  # without <unk>, <s>, </s> and the bytes; in the order of the merges
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in cuts if a in ids and b in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    control = [END, "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    contents = {
        **{piece: ids[piece] for piece in ("<unk>", "<s>", "</s>")},
        **{content: len(ids) + i for i, content in enumerate(control)},
    }
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    added = [
        {
            "id": id,
            "content": content,
            **flags,
            "special": content != "</s>",
            "rstrip": content not in ("<unk>", "<s>", END),
        }
        for content, id in contents.items()
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": ids,
        "merges": [" ".join(pair) for pair in merges],
    }
    whole = whole_sentencepiece(model, added, None)
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({c: contents[c] for c in control}) + "\n")
    names = {"bos_token": "<s>", "eos_token": END, "pad_token": END, "unk_token": "<unk>"}
    decoder = {str(token["id"]): {key: v for key, v in token.items() if key != "id"} for token in added}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 4096,
        "added_tokens_decoder": decoder,
        "chat_template": PHI3_TEMPLATE,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def sentencepiece_unigram(
    texts: list[str], folder: Path, word: str = "[A-Za-z]{2,}", numbers: Sequence[str] = ()
) -> None:
    """Persimmon's layout: sentencepiece unigrams, of which a few are control tokens.

    Every `word` of the grammar is a piece, which the trainer would spell where it is rare, and so is each of
    `numbers`. They get chances of their own, so that 2018 is 20 and 18 as in Adept's vocabulary.
    """
    words = sorted({"▁" + found for text in texts for found in re.findall(word, text)})
    symbols = ["|SPEAKER|", ADEPT_END, "|NEWLINE|", *numbers, *words]
    pieces = sentencepiece_model(texts, folder, "unigram", 1000 + len(numbers) + len(words), symbols)
    chances = {**dict.fromkeys(words, -6.0), **{number: -10 - int(number) / 1000 for number in numbers}}
    model = {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": True,
        "vocab": [[piece, chances.get(piece, score)] for piece, (_, score) in pieces.items()],
    }
    rescore(folder / "tokenizer.model", chances)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": pieces[piece][0], "content": piece, **flags} for piece in ("<unk>", ADEPT_END)]
    whole = whole_sentencepiece(model, added, ADEPT_END)
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    names = {"bos_token": ADEPT_END, "eos_token": ADEPT_END, "unk_token": "<unk>"}
    decoder = {str(token["id"]): {key: v for key, v in token.items() if key != "id"} for token in added}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")

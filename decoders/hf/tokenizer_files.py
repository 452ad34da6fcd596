"""The files of a documented tokenizer: written, and read one by one."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from decoders import tokenize
from decoders.formats import END_OF_WORD, TOKENIZER_FILES, read_json_if_any, switched

from .encodings import content_of

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TokenizerFiles:
    """The part of a tokenizer that reads and writes files."""

    @classmethod
    def from_files(cls, files: dict[str, Any], folder: Path, kwargs: dict) -> tokenize.Tokenizer:
        """A tokenizer of single files, under the names that folders have for them."""
        if not files:
            names = ", ".join(cls.vocab_files_names)
            raise ValueError(f"{cls.__name__} takes {names}, or use from_pretrained")
        for name, file in files.items():
            target = cls.vocab_files_names.get(name, "tokenizer.json")
            shutil.copyfile(file, folder / target)
        named = {f"{role}_token": kwargs.get(f"{role}_token", cls.defaults.get(role)) for role in ROLES}
        roles = {name: content_of(token) for name, token in named.items() if token is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(roles))
        return tokenize.load(folder)

    def save_pretrained(
        self,
        save_directory: str | Path,
        save_raw_chat_template: bool = False,
        save_jinja_files: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Paths of what was written. A chat template goes where the folder has it, or as
        `chat_template.jinja` with either argument, as two versions call it; several stay in
        `tokenizer_config.json`."""
        folder = Path(save_directory)
        with switched(folder, lambda: {"chat_template.jinja"}) as new:
            self.plain.write(new)
            if isinstance(self.plain, tokenize.WordTokenizer):
                write_json(new / "tokenizer.json", words_file(self.plain))
            config = {
                **read_json_if_any(new / "tokenizer_config.json"),
                **self.special_tokens_map,
                "padding_side": self.padding_side,
                "model_max_length": self.model_max_length,
                "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            }
            config.setdefault("tokenizer_class", type(self).__name__.removesuffix("Fast"))
            self.write_template(new, config, save_raw_chat_template or save_jinja_files)
            write_json(new / "tokenizer_config.json", config)
            write_json(new / "special_tokens_map.json", self.special_tokens_map)
        return tuple(str(folder / name) for name in TOKENIZER_FILES if (folder / name).exists())

    def write_template(self, folder: Path, config: dict, raw: bool) -> None:
        """As a file of its own, or into `config`."""
        file, template = folder / "chat_template.jinja", self.chat_template
        raw = (raw or file.exists()) and isinstance(template, str)
        file.unlink(missing_ok=True)
        config.pop("chat_template", None)
        if raw:
            file.write_text(template, "utf-8")
        elif template:
            config["chat_template"] = listed_templates(template)

    def train_new_from_iterator(
        self,
        text_iterator: Any,
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list[Any] | None = None,
        special_tokens_map: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """A tokenizer of the same kind, with a vocabulary learnt from batches of texts. ValueError where the
        folder has no `tokenizer.json`, or another kind than BPE."""
        own: Any = self
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            own.save_pretrained(folder)
            file = folder / "tokenizer.json"
            if not file.exists():
                raise ValueError(f"{own.plain.folder} has no tokenizer.json, from which a new one is trained")
            special = [content_of(token) for token in new_special_tokens or ()]
            content = trained_on(json.loads(file.read_text("utf-8")), text_iterator, vocab_size, special)
            for other in folder.iterdir():
                if other.name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
                    other.unlink()
            config = read_json_if_any(folder / "tokenizer_config.json")
            config.pop("added_tokens_decoder", None)
            (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
            file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
            return copy.deepcopy(type(own).from_pretrained(folder))  # with files of its own

    def save_vocabulary(
        self, save_directory: str | Path, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Only the vocabulary: paths of its files."""
        names = [name for name in self.vocab_files_names.values() if (self.plain.folder / name).exists()]
        if not names:
            raise ValueError(
                f"{self.plain.folder} has none of {', '.join(self.vocab_files_names.values())}: "
                "save_pretrained writes what it has"
            )
        if not Path(save_directory).is_dir():
            raise NotADirectoryError(f"{save_directory} is no folder: make it first")
        targets = [
            Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
            for name in names
        ]
        for name, target in zip(names, targets, strict=True):
            if (self.plain.folder / name).resolve() != target.resolve():
                shutil.copyfile(self.plain.folder / name, target)
        return tuple(map(str, targets))


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def words_file(plain: tokenize.WordTokenizer) -> dict[str, Any]:
    """GPT-1's vocabulary as the tokenizers library reads it, which knows how to split and to lower words."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token._asdict() for token in sorted(plain.added.values())],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "BPEDecoder", "suffix": END_OF_WORD},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": plain.vocab,
            "merges": [" ".join(pair) for pair in plain.ranks],
        },
    }


def trained_on(content: dict, texts: Any, vocab_size: int, special: list[str]) -> dict:
    """`tokenizer.json` of the same kind with another vocabulary, by the tokenizers library."""
    import tokenizers
    from tokenizers import trainers

    model = content["model"]
    tokens = [token["content"] for token in content.get("added_tokens", []) if token.get("special")]
    options = {"vocab_size": vocab_size, "special_tokens": [*dict.fromkeys([*tokens, *special])]}
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"train_new_from_iterator knows BPE, and this is {model['type']}")
    text = json.dumps(content)
    if "ByteLevel" in text:
        options["initial_alphabet"] = sorted(tokenize.byte_letters())
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            options[name] = model[name]
    empty = {**content, "added_tokens": [], "model": {**model, "vocab": {}, "merges": []}}
    new = tokenizers.Tokenizer.from_str(json.dumps(empty))
    new.train_from_iterator(texts, trainer=trainers.BpeTrainer(show_progress=False, **options))
    return json.loads(new.to_str())


def listed_templates(template: str | dict[str, str]) -> Any:
    """As `tokenizer_config.json` has several."""
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]

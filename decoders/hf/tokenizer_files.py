"""The files of a documented tokenizer: written, and read one by one."""

import json
import shutil
from pathlib import Path
from typing import Any

from decoders import tokenize
from decoders.formats import TOKENIZER_FILES, read_json_if_any, switched

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

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        folder = Path(save_directory)
        with switched(folder) as new:
            self.plain.write(new)
            config = {
                **read_json_if_any(new / "tokenizer_config.json"),
                **self.special_tokens_map,
                "padding_side": self.padding_side,
                "model_max_length": self.model_max_length,
                "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            }
            config.setdefault("tokenizer_class", type(self).__name__.removesuffix("Fast"))
            if self.chat_template and not (new / "chat_template.jinja").exists():
                config["chat_template"] = listed_templates(self.chat_template)
            files = {"tokenizer_config.json": config, "special_tokens_map.json": self.special_tokens_map}
            for name, content in files.items():
                (new / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return tuple(str(folder / name) for name in TOKENIZER_FILES if (folder / name).exists())

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


def listed_templates(template: str | dict[str, str]) -> Any:
    """As `tokenizer_config.json` has several."""
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]

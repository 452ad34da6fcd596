"""What the loader and the tokenizer know of the world, one thing a file: configs of every era, names of
tensors, files of weights and vocabularies, chat formats, folders that change all at once.

    from decoders.formats import find, modern, read_config
    config = modern(read_config(find("microsoft/phi-2")))
"""

from .adapters import Adapters, find_adapters, merge_adapters
from .characters import category, decomposed
from .chat import Part, chat_format, chat_template
from .checks import check_ids
from .config import (
    FAMILIES,
    OLD_NAMES,
    OWN_NAMES,
    REFUSED,
    architectures,
    cache_shape,
    config_file,
    family,
    family_type,
    modern,
    read_config,
    read_generation_config,
)
from .files import forget, read_safetensors
from .folder import (
    RELEASE,
    SMALL_FILES,
    WEIGHT_FILES,
    adapter_base,
    check_file,
    checkpoint_files,
    find,
    first_line,
    is_adapter,
    read_json,
    read_json_if_any,
    read_settled,
    read_text,
)
from .gguf_blocks import use_compiled
from .gguf_export import gguf_entries, gguf_metadata
from .gguf_hub import write_gguf_tokenizer
from .gguf_vocab import gguf_tokenizer_config, gguf_vocabulary
from .gguf_writer import write_gguf
from .names import ALIASES, HEADS, LAYOUTS, NEW_HEADS, as_it_is, grouped, modern_fuyu, no_number
from .packagings import packaging, packaging_name, stored_tensors
from .packed import Packed, as_dtype, named_parts, unpacked
from .pictures import preprocessor
from .pieces import Cutter, merge
from .switch import switched, without_remains
from .vocab import (
    BYTE_PIECE,
    END_OF_WORD,
    GPT2,
    PATTERN_BY_ROWS,
    TOKENIZER_FILES,
    AddedToken,
    Files,
    Pieces,
    add_tokens,
    added_tokens,
    read_files,
    read_merges,
    token_content,
    write_files,
)
from .writing import check_writable, write_file

__all__ = [
    "Adapters",
    "adapter_base",
    "is_adapter",
    "find_adapters",
    "merge_adapters",
    "BYTE_PIECE",
    "END_OF_WORD",
    "FAMILIES",
    "GPT2",
    "HEADS",
    "LAYOUTS",
    "NEW_HEADS",
    "OLD_NAMES",
    "PATTERN_BY_ROWS",
    "REFUSED",
    "RELEASE",
    "SMALL_FILES",
    "TOKENIZER_FILES",
    "ALIASES",
    "WEIGHT_FILES",
    "OWN_NAMES",
    "family_type",
    "AddedToken",
    "Cutter",
    "Files",
    "Packed",
    "Part",
    "Pieces",
    "add_tokens",
    "added_tokens",
    "architectures",
    "as_dtype",
    "as_it_is",
    "cache_shape",
    "category",
    "chat_format",
    "chat_template",
    "check_file",
    "check_ids",
    "checkpoint_files",
    "check_writable",
    "config_file",
    "decomposed",
    "family",
    "find",
    "first_line",
    "forget",
    "gguf_entries",
    "gguf_metadata",
    "gguf_tokenizer_config",
    "gguf_vocabulary",
    "grouped",
    "merge",
    "modern",
    "modern_fuyu",
    "named_parts",
    "no_number",
    "packaging",
    "packaging_name",
    "preprocessor",
    "read_config",
    "read_files",
    "read_generation_config",
    "read_json",
    "read_json_if_any",
    "read_merges",
    "read_safetensors",
    "read_settled",
    "read_text",
    "stored_tensors",
    "switched",
    "without_remains",
    "token_content",
    "unpacked",
    "use_compiled",
    "write_file",
    "write_files",
    "write_gguf",
    "write_gguf_tokenizer",
]

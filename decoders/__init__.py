"""Decoder language models, one readable file each.

This file knows where a checkpoint folder is and which family it belongs to; it imports nothing heavy.

    from decoders import gpt_neo, tokenize, weights
    model = weights.load(gpt_neo.GPTNeoForCausalLM, "checkpoints/tiny-gpt-neo")
"""

import importlib
import json
import re
from pathlib import Path

__version__ = "0.1.0"

# model_type in config.json -> (module, the class that generates text)
FAMILIES = {
    "gpt_neo": ("gpt_neo", "GPTNeoForCausalLM"),
    "openai-gpt": ("openai_gpt", "OpenAIGPTLMHeadModel"),
    "phi": ("phi", "PhiForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "persimmon": ("persimmon", "PersimmonForCausalLM"),
    "fuyu": ("fuyu", "FuyuForCausalLM"),
}
OLD_NAMES = {"phi-msft": "phi", "mixformer-sequential": "phi"}  # model_type of the time before Transformers

REFUSED = {  # model_type -> what it is; their names suggest Phi-3
    "phi3small": "Phi-3-small has another architecture: block-sparse attention, muP scaling, LayerNorm",
    "phi3_v": "Phi-3-vision and Phi-3.5-vision add a picture encoder (CLIP)",
    "phimoe": "Phi-3.5-MoE chooses two of sixteen experts for every token",
    "phi4mm": "Phi-4-multimodal adds encoders for pictures and speech",
    "phi4_multimodal": "Phi-4-multimodal adds encoders for pictures and speech",
}

SMALL_FILES = ("*.json", "merges.txt", "*.model", "*.bpe", "*.jinja")  # configs, indexes, tokenizers
WEIGHT_FILES = (  # of a hub repository the first kind that it has is fetched
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    ("flax_model.msgpack",),
    ("tf_model.h5",),
)


def find(path_or_id: str | Path, weights: bool = True) -> Path:
    """The folder itself, or that of a hub id such as `EleutherAI/gpt-neo-125m`, fetched into the hub's cache.

    An existing folder makes no request. FileNotFoundError where there is neither; ImportError if the hub is
    needed and `huggingface_hub` is not installed.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file: give the checkpoint's folder")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path_or_id)) or ".." in str(path_or_id):
        raise FileNotFoundError(f"there is no folder {folder}, and it cannot be a hub id")
    try:
        import huggingface_hub
    except ImportError:
        hint = "to fetch it from the hub: pip install 'decoders[hub]'"
        raise ImportError(f"there is no folder {folder}; {hint}") from None

    def fetch(patterns):
        return Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=list(patterns)))

    try:
        folder = fetch(SMALL_FILES)
        for patterns in WEIGHT_FILES if weights else ():
            folder = fetch(patterns)
            if any(any(folder.glob(pattern)) for pattern in patterns):
                break
    except Exception as error:  # httpx's and the hub's own kinds; all mean that it cannot be had
        reason = str(error).strip().split("\n")[0]
        told = f"the hub did not give it ({type(error).__name__}: {reason})"
        raise FileNotFoundError(f"there is no folder {path_or_id}, and {told}") from error
    return folder


def check_file(path: Path) -> Path:
    """`path` itself, if it is a file with content. OSError or ValueError, in a sentence, if not."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():
        raise IsADirectoryError(f"{path} is not a file")
    with path.open("rb") as file:
        start = file.read(42)
    if not start:
        raise ValueError(f"{path} is empty")
    if start == b"version https://git-lfs.github.com/spec/v1":
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there")
    return path


def read_json(path: Path) -> dict:
    """The object in a JSON file. ValueError naming the file if it holds none; NaN is not JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(check_file(path).read_text("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of names and values")
    return content


RELEASE = "latest_checkpointed_iteration.txt"  # in a folder as Adept released it


def read_config(folder: Path) -> dict:
    """`config.json`; where there is none, what OpenAI's list of shapes tells of GPT-1, or the arguments
    stored in Adept's release of Persimmon and Fuyu."""
    shapes = folder / "params_shapes.json"
    if not (folder / "config.json").exists() and (folder / RELEASE).exists():
        from decoders.weights import release_config

        return release_config(folder)
    if (folder / "config.json").exists() or not shapes.exists():
        return read_json(folder / "config.json")
    try:
        (positions, width), (rows, _), *layers = json.loads(check_file(shapes).read_text("utf-8"))
        if not layers or len(layers) % 12:
            raise ValueError(f"{len(layers)} arrays of layers, not 12 for each")
        sizes = {"vocab_size": rows, "n_positions": positions, "n_embd": width, "n_layer": len(layers) // 12}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shapes} is not the list of shapes of OpenAI's release: {error}") from None
    return {"model_type": "openai-gpt", **sizes, "n_head": max(1, width // 64)}  # heads of size 64


def family(config: dict) -> str:
    """The key of FAMILIES for a config.json: its `model_type`, else by its `architectures`."""
    model_type = OLD_NAMES.get(config.get("model_type"), config.get("model_type"))
    if model_type is None:
        named = [key for key, (_, name) in FAMILIES.items() if name in (config.get("architectures") or ())]
        model_type = named[0] if named else None
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} is not served here: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not one of those served here: {', '.join(FAMILIES)}")
    return model_type


def model_class(config: dict) -> type:
    """The class named in `architectures` if this package has it, else the one that generates text."""
    module, default = FAMILIES[family(config)]
    module = importlib.import_module(f"decoders.{module}")
    names = [name for name in config.get("architectures") or () if hasattr(module, name)]
    return getattr(module, names[0] if names else default)

"""Fuyu (8B), all of it in this file: pictures, prompts, model, boxes. Torch and the standard library are
enough to copy it; Pillow's pictures, and scaling, take Pillow besides.

What is unusual about Fuyu
- It has no picture encoder: a picture is cut into patches of 30 x 30 pixels, one linear layer makes a token
  of each, and the decoder (Persimmon's, copied here) reads them row by row, a newline token after each.
- Any size and shape of picture up to 1080 x 1920; larger ones are scaled down, none is stretched.
- Places are tokens too: `<box>top, left, bottom, right</box>` in a prompt becomes six ids, with coordinates
  halved and scaled, and the model answers in the same way.
- Padding of a picture is nearly black, (1 / 255 - 0.5) / 0.5, in every version of Transformers, which pads
  before it rescales. Adept's own was white.

Source: Bavishi et al., Fuyu-8B (2023), adept.ai/blog/fuyu-8b. Checkpoint: adept/fuyu-8b, of both eras, and
Adept's own release. The model agrees with Transformers 4.37.2, 4.50.3 and 5.23.0 (eager attention, rotary
base written out), the pictures bit for bit and the prompts id for id with 4.37.2. 5.23 leaves boxes in a
prompt as text, and its processor fails without torchvision.

Letters: B batch, T new tokens, S keys (cached + new), H heads, D head size, R rotary dimensions, C width,
V vocabulary, N patches, P numbers of a patch (30 * 30 * 3).
"""

import ctypes
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---- Config ------------------------------------------------------------------------------------------------

gelu_tanh = partial(F.gelu, approximate="tanh")  # one kernel; in half precision more exact than step by step
ACTIVATIONS = {
    "gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "silu": F.silu, "swish": F.silu, "mish": F.mish,
    "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "relu6": F.relu6, "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "linear": nn.Identity(),
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def check_fields(fields: dict, sizes: Sequence[str], rates: Sequence[str], choices: dict) -> None:
    """ValueError with key and value unless sizes are positive integers, rates in [0, 1], choices known."""
    for key in sizes:
        if type(fields[key]) is not int or fields[key] < 1:
            raise ValueError(f"{key} must be a positive integer, not {fields[key]!r}")
    for key in rates:
        if type(fields[key]) not in (int, float) or not 0 <= fields[key] <= 1:
            raise ValueError(f"{key} must be a number from 0 to 1, not {fields[key]!r}")
    for key, known in choices.items():
        if fields[key] not in list(known):
            raise ValueError(f"{key} {fields[key]!r} is not one of {', '.join(map(str, known))}")


def rope_type(scaling: dict) -> str | None:
    return scaling.get("type", scaling.get("rope_type"))


def check_rope(scaling: dict | None, known: Sequence[str]) -> None:
    """ValueError unless `rope_scaling` is None or one of the known types, with a factor above 1."""
    if scaling is None:
        return
    if not isinstance(scaling, dict) or rope_type(scaling) not in list(known):
        raise ValueError(f"rope_scaling {scaling!r} has none of the types {', '.join(known)}")
    factor = scaling.get("factor")
    if type(factor) not in (int, float) or not 1 < factor < math.inf:
        raise ValueError(f"rope_scaling factor must be a number above 1, not {factor!r}")


def flat_rope(d: dict) -> dict:
    """A config with Transformers 5's nested `rope_parameters` as the flat fields of all earlier versions."""
    nested = dict(d.get("rope_parameters") or {})
    kind = nested.pop("rope_type", nested.pop("type", "default"))
    flat = {key: nested.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in nested}
    if kind != "default":
        flat["rope_scaling"] = {"type": kind, **nested}
    return {**d, **flat}


@dataclass
class PersimmonConfig:
    """The fields of `config.json` that decide the numbers, with the documented defaults (8B)."""

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384  # of use to dynamic rope_scaling only: longer texts work
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 25000.0
    rope_scaling: dict | None = None  # {"type": "linear" or "dynamic", "factor": above 1}
    qk_layernorm: bool = True
    hidden_dropout: float = 0.0  # after the MLP, the only one beside attention's; the hub's configs say 0.6
    attention_dropout: float = 0.0
    partial_rotary_factor: float = 0.5
    classifier_dropout: float | None = None  # of the token classifier; None: hidden_dropout
    num_labels: int = 2
    problem_type: str | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2  # the hub's configs say 71013
    pad_token_id: int | None = None

    def __post_init__(self):
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "max_position_embeddings", "num_labels"]
        rates = ["hidden_dropout", "attention_dropout", "layer_norm_eps", "initializer_range",
                 "partial_rotary_factor"]
        rates += ["classifier_dropout"] if self.classifier_dropout is not None else []
        check_fields(vars(self), sizes, rates, {"hidden_act": ACTIVATIONS, "problem_type": PROBLEM_TYPES})
        check_rope(self.rope_scaling, ("linear", "dynamic"))
        C, H = self.hidden_size, self.num_attention_heads
        if C % H:
            raise ValueError(f"num_attention_heads {H} does not divide hidden_size {C}")
        if type(self.rope_theta) not in (int, float) or not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be a positive number, not {self.rope_theta!r}")
        if self.rotary_size < 2 or self.rotary_size % 2:
            told = f"partial_rotary_factor {self.partial_rotary_factor!r} turns {self.rotary_size} dimensions"
            raise ValueError(f"{told} of a head: it must be an even number of them")
        if self.rope_varies and self.rotary_size == 2:
            raise ValueError("dynamic rope_scaling needs more than 2 rotary dimensions of a head")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside vocab_size {self.vocab_size}")

    @property
    def rotary_size(self) -> int:
        """R, cut off as the reference does: int(0.29 * 100) is 28."""
        return int(self.partial_rotary_factor * (self.hidden_size // self.num_attention_heads))

    @property
    def rope_varies(self) -> bool:
        """Whether the rotary frequencies depend on the length of the text."""
        return self.rope_scaling is not None and rope_type(self.rope_scaling) == "dynamic"

    def rope_of(self, lengths: Tensor) -> Tensor:
        """(B,) which frequencies texts of `lengths` (B,) tokens have. One base for all: that of the longest,
        and up to max_position_embeddings that of the config."""
        if not self.rope_varies:
            return torch.zeros_like(lengths)
        return lengths.max().clamp(min=self.max_position_embeddings).expand_as(lengths)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head size) of the keys, and of the values."""
        H = self.num_attention_heads
        return self.num_hidden_layers, H, self.hidden_size // H

    @classmethod
    def from_dict(cls, d: dict) -> "PersimmonConfig":
        """From a `config.json` of any era. ValueError for what is missing or cannot be honoured."""
        if d.get("model_type", "persimmon") != "persimmon":
            raise ValueError(f"model_type {d['model_type']!r} is not persimmon")
        if d.get("quantization_config"):
            raise ValueError("quantization_config: quantised weights are not supported")
        d = flat_rope(d)
        needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads"]
        if missing := [key for key in needed if key not in d]:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        if "num_labels" not in d and d.get("id2label"):
            d["num_labels"] = len(d["id2label"])
        return cls(**{key: d[key] for key in cls.__dataclass_fields__ if key in d})

    def to_dict(self) -> dict:
        return {"model_type": "persimmon", **asdict(self)}


@dataclass
class FuyuConfig:
    """The decoder's config, and what its pictures are cut into."""

    text_config: PersimmonConfig = field(default_factory=PersimmonConfig)
    patch_size: int = 30
    num_channels: int = 3
    image_token_id: int = 71011  # |SPEAKER|: where patches go if a call does not say
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 71013  # never text_config's, which is 2 by default
    pad_token_id: int | None = None

    def __post_init__(self):
        check_fields(vars(self), ["patch_size", "num_channels"], [], {})

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head size) of the keys, and of the values."""
        return self.text_config.cache_shape

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, n: int) -> None:
        self.text_config.vocab_size = n

    @property
    def use_cache(self) -> bool:
        return self.text_config.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.text_config.use_cache = value

    @property
    def tie_word_embeddings(self) -> bool:
        return self.text_config.tie_word_embeddings

    @property
    def initializer_range(self) -> float:
        return self.text_config.initializer_range

    @classmethod
    def from_dict(cls, d: dict) -> "FuyuConfig":
        """From a `config.json` of any era. What describes the decoder stands in `text_config`, or beside it,
        or has its default: the hub's file has nothing but a model_type in `text_config`, from which
        Transformers 5.23 gets another rotary base. ValueError for what cannot be honoured."""
        if d.get("model_type", "fuyu") != "fuyu":
            raise ValueError(f"model_type {d['model_type']!r} is not fuyu")
        if d.get("quantization_config"):
            raise ValueError("quantization_config: quantised weights are not supported")
        beside = {key: value for key, value in flat_rope(d).items() if not key.endswith("_token_id")}
        inner = flat_rope(d.get("text_config") or {})
        kind = {"model_type": inner.get("model_type", "persimmon")}
        text = {**asdict(PersimmonConfig()), **beside, **inner, **kind}
        own = {key: d[key] for key in cls.__dataclass_fields__ if key in d and key != "text_config"}
        return cls(text_config=PersimmonConfig.from_dict(text), **own)

    def to_dict(self) -> dict:
        """With the decoder's fields in `text_config` and beside it: 4.x reads some of them there."""
        own = {key: value for key, value in vars(self).items() if key != "text_config"}
        text = self.text_config.to_dict()
        return {**text, "model_type": "fuyu", **own, "text_config": text}


# ---- Pictures ----------------------------------------------------------------------------------------------


class FuyuImages(NamedTuple):
    """Pictures ready to be cut into patches; one list per text, of one picture or none."""

    images: list[list[Tensor]]  # (3, height, width), padded at the bottom and on the right to whole patches
    image_unpadded_heights: list[list[int]]
    image_unpadded_widths: list[list[int]]
    image_scale_factors: list[list[float]]  # how much smaller than it was


class FuyuImageProcessor:
    """Pictures -> patches, bit for bit as Transformers 4.37.2 with Pillow; but any kind of picture works.

    `height` and `width` are the largest that is not scaled down. A picture is a Pillow image, an array or a
    tensor: (H, W), (H, W, colours) or (colours, H, W), of bytes, 16-bit numbers, or floats from 0 to 1.
    """

    def __init__(self, height: int = 1080, width: int = 1920, patch_size: int = 30):
        self.size, self.patch_size = {"height": height, "width": width}, patch_size

    def preprocess(self, images: Any) -> FuyuImages:
        """One picture, a list, or a list of lists of at most one. ValueError for what is no picture."""
        done = [[self.prepared(image) for image in row] for row in rows_of(images)]
        columns = [[[one[i] for one in row] for row in done] for i in range(4)]
        return FuyuImages(*columns)

    def prepared(self, image: Any) -> tuple[Tensor, int, int, float]:
        """(picture (3, H, W) in whole patches, height and width without padding, scale)."""
        pixels = rgb(image)
        height, width, _ = pixels.shape
        scale = 1.0
        if height > self.size["height"] or width > self.size["width"]:
            fit = min(self.size["height"] / height, self.size["width"] / width)
            new = max(1, int(height * fit)), max(1, int(width * fit))  # cut off, as the reference: 1079 too
            pixels, scale = resized(pixels, *new), new[0] / height
            height, width = new
        bottom, right = -height % self.patch_size, -width % self.patch_size
        pixels = F.pad(pixels, (0, 0, 0, right, 0, bottom), value=1)  # 1 of 255: before rescaling
        values = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
        values = (values - 0.5) / 0.5
        return values[pixels.long()].permute(2, 0, 1), height, width, scale

    def patchify_image(self, image: Tensor) -> Tensor:
        """(..., N, P) of (..., 3, H, W): patches row by row, in each pixels row by row, of each 3 colours."""
        size = self.patch_size
        *batch, channels, height, width = image.shape
        cut = image.reshape(*batch, channels, height // size, size, width // size, size)
        b = len(batch)
        order = [*range(b), b + 1, b + 3, b + 2, b + 4, b]  # rows, columns, then inside a patch
        return cut.permute(order).reshape(*batch, -1, size * size * channels)

    def preprocess_with_tokenizer_info(self, image_input: Any, image_present: Any, image_unpadded_h: Any,
                                       image_unpadded_w: Any, image_placeholder_id: int,
                                       image_newline_id: int,
                                       variable_sized: bool = True) -> dict[str, list[list[Tensor]]]:
        """Patches, and the ids that stand for them: a placeholder for each, a newline after each row.

        `image_input` is a list of lists of pictures (3, H, W), or a tensor (B, pictures, 3, H, W);
        `image_present` says which of them are there. Without `variable_sized` padding counts as picture, and
        rows have no newline. The result has lists of lists; its indices count patches, -1 is elsewhere.
        """
        names = ("images", "image_input_ids", "image_patches", "image_patch_indices_per_batch",
                 "image_patch_indices_per_subsequence")
        found: dict[str, list] = {name: [] for name in names}
        for b, row in enumerate(image_input):
            ids, patches, of_row, of_picture, before = [], [], [], [], 0
            for i, image in enumerate(row):
                present = bool(torch.as_tensor(image_present[b][i]).any())
                if present and variable_sized:
                    image = self.cropped(image, int(image_unpadded_h[b][i]), int(image_unpadded_w[b][i]))
                if present:
                    patches.append(self.patchify_image(image))
                    found["images"].append([image])
                rows, columns = (n // self.patch_size * present for n in image.shape[1:])
                lines = torch.full((rows, columns), image_placeholder_id)
                lines = F.pad(lines, (0, 1), value=image_newline_id) if variable_sized else lines
                ids.append(lines.flatten())
                of_picture.append(counted(ids[-1] == image_placeholder_id))
                of_row.append(torch.where(of_picture[-1] >= 0, of_picture[-1] + before, -1))
                before += int((of_picture[-1] >= 0).sum())
            for name, value in zip(names[1:], (ids, patches, of_row, of_picture), strict=True):
                found[name].append(value)
        return found

    def cropped(self, image: Tensor, height: int, width: int) -> Tensor:
        """To the whole patches that hold anything of the picture."""
        bottom, right = (math.ceil(n / self.patch_size) * self.patch_size for n in (height, width))
        return image[:, :bottom, :right]


def counted(mask: Tensor) -> Tensor:
    """0, 1, 2 ... where `mask` (T,) holds, -1 elsewhere."""
    return torch.where(mask, mask.long().cumsum(0) - 1, -1)


def rows_of(images: Any) -> list[list]:
    """One picture, several, or lists of at most one, as the last."""
    if not isinstance(images, list | tuple):
        images = [images]
    rows = [list(row) if isinstance(row, list | tuple) else [] if row is None else [row] for row in images]
    if many := [len(row) for row in rows if len(row) > 1]:
        raise ValueError(f"a text has {many[0]} pictures: Fuyu sees one at a time")
    return rows


def rgb(image: Any) -> Tensor:
    """(H, W, 3) bytes of any picture: turned as its EXIF says, 16 bits cut to 8, transparency dropped."""
    if hasattr(image, "convert"):
        return pillow_rgb(image)
    writable = getattr(getattr(image, "flags", None), "writeable", True)  # PyTorch warns of others
    pixels = torch.as_tensor(image if writable else image.copy())
    if pixels.dim() == 2:
        pixels = pixels[..., None]
    if pixels.dim() == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.permute(1, 2, 0)
    if pixels.dim() != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.numel():
        raise ValueError(f"a picture is (height, width, 1, 3 or 4 colours), not {tuple(pixels.shape)}")
    if pixels.is_floating_point():
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("a picture of floats has values from 0 to 1; give bytes for 0 to 255")
        pixels = (pixels * 255).round()
    elif pixels.dtype == torch.uint16:
        pixels = pixels.int() >> 8
    elif pixels.dtype != torch.uint8:
        raise ValueError(f"a picture is of bytes, 16-bit numbers or floats, not of {pixels.dtype}")
    return pixels[..., :3].to(torch.uint8).expand(-1, -1, 3)


def pillow_rgb(image: Any) -> Tensor:
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow itself warns, and stops at the double
        raise ValueError(f"a picture of {width} x {height} pixels is larger than any that is honest")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    image = image.convert("RGB")
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bilinear filter, which looks at all pixels that become one."""
    from PIL import Image

    pixels = pixels.contiguous()
    content = ctypes.string_at(pixels.data_ptr(), pixels.numel())
    image = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), content)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)


# ---- Prompts and places ------------------------------------------------------------------------------------


class Box(NamedTuple):
    """In pixels of the picture as it was."""

    top: int
    left: int
    bottom: int
    right: int


class Point(NamedTuple):
    x: int
    y: int


class Located(NamedTuple):
    """A generated text with its places."""

    ids: Tensor  # with the ids of `<box>12, 34, 56, 78</box>` for those of a box
    text: str
    places: list[Box | Point]  # in the order of the text


TAGS = {"<box>": "<0x00>", "</box>": "<0x01>", "<point>": "<0x02>", "</point>": "<0x03>"}
ANSWER = "<0x04>"  # the piece after which the model answers


class FuyuProcessor:
    """Texts and pictures -> the model's inputs, and its answers -> texts and places.

    `tokenizer` offers encode, decode and token_id (`decoders.tokenize`). Control tokens in a text stay text.
    """

    pad_token_id = 0

    def __init__(self, tokenizer: Any, image_processor: FuyuImageProcessor | None = None):
        self.tokenizer, self.image_processor = tokenizer, image_processor or FuyuImageProcessor()
        self.placeholder, self.newline = self.id_of("|SPEAKER|"), self.id_of("|NEWLINE|")

    def id_of(self, piece: str) -> int:
        id = self.tokenizer.token_id(piece)
        if id is None:
            raise ValueError(f"the vocabulary has no {piece}: it is not Fuyu's")
        return id

    def __call__(self, text: str | Sequence[str] | None = None, images: Any = None, *,
                 truncation: bool = False, max_length: int | None = None) -> dict[str, Any]:
        """`input_ids` and `attention_mask` (B, T), padded on the left; with pictures also `image_patches`,
        one (1, N, P) per row, and `image_patches_indices` (B, T): which patch stands where, -1 elsewhere.

        A row is the picture, `<s>`, the text, `<0x04>`; without a picture, in a batch that has some, the same
        without it. Texts alone have `|ENDOFTEXT|` before them, and no `<0x04>`. ValueError for numbers of
        texts and pictures that differ, and for truncation, which would cut a picture.
        """
        if truncation or max_length is not None:
            raise ValueError("truncation would cut a picture or its question: shorten the text instead")
        if text is None and images is None:
            raise ValueError("give text, images, or both")
        if images is None:
            texts = [text] if isinstance(text, str) else list(text)
            return padded([self.tokenizer.encode(text, split_special_tokens=True) for text in texts])
        pictures = self.image_processor.preprocess(images)
        n = len(pictures.images)
        texts = [""] * n if text is None else [text] if isinstance(text, str) else list(text)
        if len(texts) != n:
            raise ValueError(f"{len(texts)} texts and {n} pictures: give [] for a text without a picture")
        present = [[1] * len(row) for row in pictures.images]
        info = self.image_processor.preprocess_with_tokenizer_info(
            pictures.images, present, pictures.image_unpadded_heights, pictures.image_unpadded_widths,
            self.placeholder, self.newline)
        rows, places, patches = [], [], []
        for i, prompt in enumerate(texts):
            scale = pictures.image_scale_factors[i][0] if present[i] else 1.0
            words = [self.id_of("<s>"), *self.prompt_ids(prompt, scale), self.id_of(ANSWER)]
            rows.append([*(id for line in info["image_input_ids"][i] for id in line.tolist()), *words])
            known = [index for line in info["image_patch_indices_per_batch"][i] for index in line.tolist()]
            places.append(known + [-1] * len(words))
            size = self.image_processor.patch_size
            patches.append(torch.cat([torch.empty(0, 3 * size * size), *info["image_patches"][i]])[None])
        indices = padded(places, -1)["input_ids"]
        return {**padded(rows, self.pad_token_id), "image_patches": patches, "image_patches_indices": indices}

    def prompt_ids(self, prompt: str, scale: float) -> list[int]:
        """Ids of a text with `<box>` and `<point>`, each piece of text encoded by itself. How many numbers
        there are decides between box and point, and an open tag needs no end."""
        ids, after = [], ""
        for part in re.split("(" + "|".join(TAGS) + ")", prompt):
            if part and part not in TAGS:
                is_place = after in ("<box>", "<point>")
                ids += self.place_ids(part, scale) if is_place else self.tokenizer.encode(
                    part, add_special_tokens=False, split_special_tokens=True)
            after = part
        return ids

    def place_ids(self, numbers: str, scale: float) -> list[int]:
        """Six ids of "top, left, bottom, right", four of "x, y": halved, scaled, a token for each number."""
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise ValueError(f"{numbers!r} is no place: give <box>top, left, bottom, right</box> or "
                             "<point>x, y</point>") from None
        if len(values) not in (2, 4) or not all(map(math.isfinite, values)):
            raise ValueError(f"{numbers!r} has {len(values)} numbers: a box has four, a point two")
        scale = torch.tensor(scale).item()  # in float32, as the reference: it decides between two roundings
        pieces = [str(round(value / 2 * scale)) for value in values]  # half to even
        if missing := [piece for piece in pieces if self.tokenizer.token_id(piece) is None]:
            raise ValueError(f"{numbers!r} lies outside: there is no token for {missing[0]}")
        tags = ("<0x02>", "<0x03>") if len(values) == 2 else ("<0x00>", "<0x01>")
        return [self.id_of(tags[0]), *map(self.tokenizer.token_id, pieces), self.id_of(tags[1])]

    def post_process_box_coordinates(self, outputs: Sequence[Tensor],
                                     target_sizes: Any = None) -> list[Located]:
        """Each row of ids with its boxes and points as text and in pixels.

        `target_sizes`: (height, width) of each picture as it was; left out, none was larger than 1080 x 1920.
        What is not an open tag, four numbers (two for a point) and the close tag stays as it is.
        """
        sizes = [None] * len(outputs) if target_sizes is None else list(target_sizes)
        if len(sizes) != len(outputs):
            raise ValueError(f"{len(outputs)} texts and {len(sizes)} target_sizes: give one for each")
        return [self.located(torch.as_tensor(row), size) for row, size in zip(outputs, sizes, strict=True)]

    def located(self, row: Tensor, size: Any) -> Located:
        limit, scale = self.image_processor.size, 1.0
        if size is not None and (size[0] > limit["height"] or size[1] > limit["width"]):
            scale = min(limit["height"] / float(size[0]), limit["width"] / float(size[1]))
        ids, places, i, row = [], [], 0, row.tolist()
        while i < len(row):
            place, n = self.place_at(row, i, scale)
            if place is None:
                ids.append(row[i])
                i += 1
                continue
            tag = "box" if isinstance(place, Box) else "point"
            text = f" <{tag}>{', '.join(map(str, place))}</{tag}>"
            ids += self.tokenizer.encode(text, add_special_tokens=False)[1:]
            places.append(place)
            i += n
        return Located(torch.tensor(ids, dtype=torch.long), self.tokenizer.decode(ids), places)

    def place_at(self, row: list[int], i: int, scale: float) -> tuple[Box | Point | None, int]:
        """The place that begins at position i, if one does, and how many ids it has."""
        for kind, start, end, n in ((Box, "<0x00>", "<0x01>", 4), (Point, "<0x02>", "<0x03>", 2)):
            if row[i] == self.id_of(start) and row[i + n + 1 : i + n + 2] == [self.id_of(end)]:
                inside = row[i + 1 : i + n + 1]
                numbers = [self.tokenizer.decode([id]) for id in inside]
                digits = all(number.isascii() and number.isdigit() for number in numbers)
                if digits and [self.tokenizer.token_id(number) for number in numbers] == inside:
                    return kind(*(2 * int(float(number) / scale) for number in numbers)), n + 2
        return None, 1


def padded(rows: list[list[int]], filler: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, T), shorter rows padded on the left."""
    T = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[filler] * (T - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows]),
    }


# ---- Linear ------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, which on a CPU and without autograd takes the kernel that reads the weights fastest.

    For float32 PyTorch calls MKL; oneDNN takes half its time for few rows, and less for many (measured on an
    AMD EPYC). For bfloat16 it calls oneDNN; its own product takes half the time of that for a single row.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if not (x.is_cpu and onednn) or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    torch.backends.mkldnn.enabled = x.numel() > x.shape[-1]  # off for one row
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = True


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


# ---- Rotary position embedding -----------------------------------------------------------------------------


def rope_tables(position_ids: Tensor, R: int, theta: float, scaling: dict | None, max_positions: int,
                x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, R) for `position_ids` (B, T), in x's dtype.

    Computed anew for every call, in float32 at least: there is no buffer that `.half()` could spoil. "linear"
    stretches positions. "dynamic" raises the base with the current length, however long earlier calls were.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = scaling["factor"] if scaling else 1.0
    kind = rope_type(scaling) if scaling else None
    if kind == "dynamic":
        length = max(int(position_ids.max()) + 1, max_positions)
        theta = theta * (factor * length / max_positions - (factor - 1)) ** (R / (R - 2))
    inverse = 1.0 / theta ** (torch.arange(0, R, 2, device=x.device).to(wide) / R)
    if kind == "linear":
        inverse = inverse / factor
    angles = position_ids[:, None, :, None].to(wide) * inverse  # (B, 1, T, R / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of x (B, H, T, D): dimension i pairs with i + R / 2. The others pass."""
    R = cos.shape[-1]
    turned, passed = x[..., :R], x[..., R:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, passed], dim=-1)


# ---- Key/value cache ---------------------------------------------------------------------------------------


def append(buffer: Tensor, new: Tensor, start: int) -> Tensor:
    """`buffer` with `new` written at position `start`: the same one, or if full one of twice the length."""
    B, K, T, D = new.shape
    if new.requires_grad:  # autograd needs the past as it was
        return torch.cat([buffer[:, :, :start], new], dim=2)
    if start + T > buffer.shape[2]:
        grown = new.new_empty(B, K, max(2 * start, start + T), D)
        grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    buffer[:, :, start : start + T] = new
    return buffer


class KVCache:
    """Keys and values of every layer. `cache[i]` is layer i's `(k, v)`, (B, K, S, D) each; `len(cache)` is S.

    It grows by doubling, so that no step copies the past. `past`, a tuple of `(k, v)`, stays as it is.
    """

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = ()):
        self.buffers = [(k, v) for k, v in past]  # may be longer than what has been written
        self.lengths = [k.shape[2] for k, v in past]
        self.rope: Tensor | None = None  # (B,) which frequencies turned each row's keys, where these vary
        self.memory = torch.empty(0)

    def __len__(self) -> int:
        return self.lengths[0] if self.lengths else 0

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.buffers[layer]
        return k[:, :, : self.lengths[layer]], v[:, :, : self.lengths[layer]]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, `(B, K, T, D)`; returns views of all S."""
        if layer == len(self.buffers):
            self.buffers.append((k, v))
            self.lengths.append(k.shape[2])
            return k, v
        start, (past_k, past_v) = self.lengths[layer], self.buffers[layer]
        self.buffers[layer] = append(past_k, k, start), append(past_v, v, start)
        self.lengths[layer] = start + k.shape[2]
        return self[layer]

    def scratch(self, wanted: int, needed: int) -> Tensor:
        """At least `needed` float32 numbers of memory on the CPU, kept for the next call."""
        if len(self.memory) < needed:
            self.memory = torch.empty(max(wanted, needed))
        return self.memory

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        self.buffers = [(k[:, :, :n], v[:, :, :n]) for k, v in self]
        self.lengths = [min(n, length) for length in self.lengths]

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was, as beam search needs it."""
        self.buffers = [(k[index], v[index]) for k, v in self]
        self.rope = None if self.rope is None else self.rope[index]


def rope_holds(cache: KVCache, before: Tensor, now: Tensor) -> bool:
    """Whether what is cached has the frequencies `now` (B,); `before` (B,) are what its length tells, for a
    cache that does not know. Transformers mixes frequencies."""
    return len(cache) == 0 or torch.equal(before if cache.rope is None else cache.rope, now)


def note_rope(cache: KVCache, before: Tensor, now: Tensor) -> None:
    """ValueError unless `rope_holds`, since hidden states of the past would have to change as well."""
    if not rope_holds(cache, before, now):
        told = "rope_scaling gives a text of this length other frequencies than past_key_values has"
        raise ValueError(f"{told}: pass the whole text without it, as generate does")
    cache.rope = now


# ---- Attention ---------------------------------------------------------------------------------------------


def causal_mask(T: int, S: int, padding: Tensor | None, like: Tensor, whole: bool) -> Tensor | None:
    """(1 or B, 1, T, S) to add to scores of the last T of S positions. None: plain causal, or one query.

    A row that sees only padding spreads over it. The reference lets such a row look at the future, since its
    numbers for the future and for padding are both finite; no row of a real token differs.
    """
    if padding is None and not whole and (T == 1 or T == S):
        return None
    rows = torch.arange(S - T, S, device=like.device)
    future = torch.arange(S, device=like.device) > rows[:, None]
    mask = like.new_zeros(1, 1, T, S).masked_fill(future, -math.inf)
    return mask if padding is None else mask + padding


def padding_bias(attention_mask: Tensor | None, S: int, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, S) to add to the scores: the lowest finite number at padding. None if there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != S:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be (batch, {S}), with the cached tokens, not {shape}")
    padding = attention_mask == 0
    if not padding.any():
        return None
    return torch.zeros_like(padding, dtype=dtype).masked_fill(padding, torch.finfo(dtype).min)[:, None, None]


def spelled_out_attention(q, k, v, mask, scale, dropout=0.0, head_mask=None) -> tuple[Tensor, Tensor]:
    """The formula: (B, H, T, D), and the weights (B, H, T, S) as they multiply v. Head h of q reads head
    h // (H / K) of k and v."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)  # scores of half-precision q and k overflow float16
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) * scale  # (B, H, T, S)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout)
    if head_mask is not None:
        weights = weights * head_mask.view(-1, 1, 1)
    return (weights @ v.to(wide)).to(q.dtype), weights.to(q.dtype)


def fast_attention(q, k, v, mask, scale, dropout=0.0, cache=None) -> Tensor:
    """What `spelled_out_attention` computes, by PyTorch's fused kernel."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if T == 1:  # heads that share keys are rows of one product
        q = q.reshape(B, K, H // K, D)
        if q.is_cpu and q.dtype.itemsize == 2 and cache is not None and not torch.is_grad_enabled():
            y = one_query_attention(q, k, v, mask, scale, cache.scratch(2**19, k[0, 0].numel()))
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return y.view(B, H, 1, D)
    if K < H:
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    causal = mask is None  # aligned to the top left: right, as there is no past then
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)


def one_query_attention(q, k, v, mask, scale, scratch: Tensor) -> Tensor:
    """The same for one half-precision token on a CPU, where the fused kernel takes three times as long.
    q is (B, K, H / K, D).

    The keys of a few heads, then their values, become float32 in `scratch`, which is the same memory for all
    layers and steps: asking the system for new memory would cost more than the copying.
    """
    S, D = k.shape[2:]
    step, y = scratch.numel() // (S * D), torch.empty_like(q)
    for b in range(len(q)):
        for start in range(0, q.shape[1], step):
            heads = slice(start, start + step)
            wide = scratch[: k[b, heads].numel()].view(-1, S, D)
            scores = q[b, heads].float() @ wide.copy_(k[b, heads]).transpose(1, 2) * scale
            weights = (scores if mask is None else scores + mask[b % len(mask)]).softmax(-1)
            y[b, heads] = (weights @ wide.copy_(v[b, heads])).to(q.dtype)
    return y


class PersimmonAttention(nn.Module):
    def __init__(self, config: PersimmonConfig, layer: int):
        super().__init__()
        C, H = config.hidden_size, config.num_attention_heads
        self.layer, self.num_heads, self.D = layer, H, C // H
        self.query_key_value = Linear(C, 3 * C)
        self.dense = Linear(C, C)
        self.attention_dropout = config.attention_dropout
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(self.D, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(self.D, eps=config.layer_norm_eps)
        else:
            self.q_layernorm = self.k_layernorm = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None, tables: tuple, cache: KVCache | None, whole: bool):
        B, T, C = x.shape
        q, k, v = self.query_key_value(x).view(B, T, self.num_heads, 3, self.D).unbind(3)  # (B, T, H, D)
        q, k, v = (part.transpose(1, 2) for part in (self.q_layernorm(q), self.k_layernorm(k), v))
        q, k = rotate(q, *tables), rotate(k, *tables)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        scale, dropout, weights = self.D**-0.5, self.attention_dropout if self.training else 0.0, None
        if whole:
            y, weights = spelled_out_attention(q, k, v, mask, scale, dropout)
        else:
            y = fast_attention(q, k, v, mask, scale, dropout, cache)
        return self.dense(y.transpose(1, 2).reshape(B, T, C)), weights


# ---- MLP and layer -----------------------------------------------------------------------------------------


class PersimmonMLP(nn.Module):
    def __init__(self, config: PersimmonConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class PersimmonBlock(nn.Module):
    def __init__(self, config: PersimmonConfig, layer: int):
        super().__init__()
        self.self_attn = PersimmonAttention(config, layer)
        self.mlp = PersimmonMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, *attention_inputs) -> tuple[Tensor, Tensor | None]:
        y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + y
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x))), weights


# ---- Decoder -----------------------------------------------------------------------------------------------


class ModelOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, T, C), after the final norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, each layer's output; the last is normed
    attentions: tuple[Tensor, ...] | None = None  # (B, H, T, S) per layer, after dropout and head_mask


class PreTrainedModel(nn.Module):
    """What all models share: how weights start, what is tied, what the checkpoint says about generation."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.generation_config: dict[str, Any] = {}  # the content of generation_config.json

    def tie_weights(self) -> None:
        """Make tied tensors one again; needed after `load_state_dict(..., assign=True)`."""

    @torch.no_grad()
    def init_weights(self, part: nn.Module | None = None) -> "PreTrainedModel":
        """Draw all weights or those of `part`: matrices N(0, initializer_range), biases 0, norms 1."""
        for name, p in (part or self).named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, self.config.initializer_range)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


class PersimmonModel(PreTrainedModel):
    config_class = PersimmonConfig

    def __init__(self, config: PersimmonConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(PersimmonBlock(config, layer) for layer in layers)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False  # True: training computes layers twice instead of keeping them

    def forward(self, input_ids: Tensor | None = None, *, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
                use_cache: bool | None = None, output_attentions: bool = False,
                output_hidden_states: bool = False) -> ModelOutput:
        """Hidden states of `input_ids` (B, T), or of `inputs_embeds` (B, T, C).

        `attention_mask` (B, S) is 1 for tokens and 0 for padding. `position_ids` (B, T), left out, go on from
        the cache's length whatever the mask says. ValueError where shapes disagree.
        """
        x = embed(self.embed_tokens, input_ids, inputs_embeds)
        saving = self.gradient_checkpointing and self.training
        cache = past_key_values if isinstance(past_key_values, KVCache) else KVCache(past_key_values or ())
        T, S = x.shape[1], len(cache) + x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(S - T, S, device=x.device).expand(len(x), T)
        config = self.config
        if config.rope_varies:
            note_rope(cache, config.rope_of(position_ids[:, 0]), config.rope_of(position_ids.amax(1) + 1))
        tables = rope_tables(position_ids, config.rotary_size, config.rope_theta, config.rope_scaling,
                             config.max_position_embeddings, x)
        padding = padding_bias(attention_mask, S, x.dtype)
        # Spelled out where weights are asked for; and in training on left padding, since the fused kernel's
        # gradients are wrong for rows that see only padding: log(n) drowns in the mask's lowest number.
        whole = output_attentions
        whole = whole or (torch.is_grad_enabled() and padding is not None and bool(padding[..., 0].any()))
        mask = causal_mask(T, S, padding, x, whole)
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            run = partial(checkpoint, layer, use_reentrant=False) if saving else layer
            x, weights = run(x, mask, tables, None if saving else cache, whole)
            attentions.append(weights)
        x = self.final_layernorm(x)
        cached = (self.config.use_cache if use_cache is None else use_cache) and not saving
        return ModelOutput(
            last_hidden_state=x,
            past_key_values=cache if cached else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def embed(table: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """(B, T, C) of whichever was given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is None:
        return inputs_embeds
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, tokens), not {tuple(input_ids.shape)}")
    return table(input_ids)


# ---- Causal language model ---------------------------------------------------------------------------------


class CausalLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, V), of the positions that logits_to_keep asks for; (B, labels) from a classifier
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def check_generation(T, cached, positions, max_new_tokens, temperature, top_k, top_p,
                     repetition_penalty) -> None:
    if T < 1 or max_new_tokens < 0:
        raise ValueError(f"the prompt has {T} tokens, max_new_tokens is {max_new_tokens}: 1 and 0 at least")
    if cached >= T:
        raise ValueError(f"past_key_values holds {cached} tokens of a prompt of {T}: one must be new")
    if positions is not None and T + max_new_tokens - 1 > positions:  # the last new token is not fed
        raise ValueError(f"{T} prompt + {max_new_tokens} new tokens do not fit into {positions} positions")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}; for greedy text do_sample=False")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if repetition_penalty is not None and not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be above 0, not {repetition_penalty}")


def next_token(seen, logits, do_sample, temperature, top_k, top_p, repetition_penalty, generator) -> Tensor:
    """(B,) ids from (B, V) float32 logits, in Transformers' order: a seed draws the same tokens there."""
    if repetition_penalty is not None:
        old = logits.gather(1, seen)
        old = torch.where(old < 0, old * repetition_penalty, old / repetition_penalty)
        logits = logits.scatter(1, seen, old)
    if not do_sample:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[:, -1] = False  # the likeliest token always stays
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class GenerationMixin:
    """`generate`, for a model with logits, a cache and `max_positions` (None: no limit)."""

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int,
                 do_sample: bool = False, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, repetition_penalty: float | None = None,
                 eos_token_id: int | Sequence[int] | str | None = "checkpoint",
                 pad_token_id: int | None = None, generator: torch.Generator | None = None,
                 streamer: Any = None, logits_processor: Sequence[Callable] = (),
                 stopping_criteria: Sequence[Callable] = (), use_cache: bool = True,
                 past_key_values: KVCache | None = None, **inputs) -> Tensor:
        """(B, T + new) ids: the prompts (B, T), shorter ones padded on the left, and what follows them.

        `eos_token_id`: an id or several; left out it is the checkpoint's own, None never stops. Finished rows
        are filled with `pad_token_id`. Each processor maps (ids, float32 logits) to logits, each criterion to
        True or (B,) booleans where to stop. `streamer` gets `put(prompts)`, `put(new ids)` a step, `end()`.
        `past_key_values` holds the beginning of the prompts already, and in the end all but the last ids.
        `inputs`, such as pictures, go to the forward passes that begin a text.
        """
        cache = past_key_values if past_key_values is not None else KVCache() if use_cache else None
        check_generation(input_ids.shape[1], len(cache or ()), self.max_positions, max_new_tokens,
                         temperature, top_k, top_p, repetition_penalty)
        eos, pad = self.special_ids(eos_token_id, pad_token_id, input_ids.device)
        ids, mask = input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if streamer is not None:
            streamer.put(ids.cpu())
        for _ in range(max_new_tokens):
            if cache is not None and not self.cache_serves(cache, mask):
                cache.truncate(0)
            new = ids[:, len(cache or ()) :]  # the whole prompt first, then one token a step
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            logits = self(new, attention_mask=mask, position_ids=places, past_key_values=cache,
                          use_cache=cache is not None, logits_to_keep=1,
                          **({} if cache else inputs)).logits[:, -1].float()
            for processor in logits_processor:
                logits = processor(ids, logits)
            seen = ids.where(mask.bool(), ids[:, -1:])  # padding earns no penalty, as in Transformers 5
            token = next_token(seen, logits, do_sample, temperature, top_k, top_p, repetition_penalty,
                               generator)
            token = torch.where(running, token, pad)
            ids, mask = torch.cat([ids, token[:, None]], 1), F.pad(mask, (0, 1), value=1)
            if streamer is not None:
                streamer.put(token.cpu())
            running &= ~torch.isin(token, eos)
            for criterion in stopping_criteria:
                running &= ~torch.as_tensor(criterion(ids, logits), device=ids.device)
            if not running.any():
                break
        if streamer is not None:
            streamer.end()
        return ids

    def cache_serves(self, cache: KVCache, mask: Tensor) -> bool:
        """Whether what is cached holds for texts of `mask`'s length; if not it is computed anew."""
        return True

    def special_ids(self, eos, pad: int | None, device) -> tuple[Tensor, int]:
        """The ids to stop at (n,), and the filler: `pad`, else the checkpoint's, else the first stop id."""
        if eos == "checkpoint":
            eos = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        fillers = (pad, self.generation_config.get("pad_token_id"), self.config.pad_token_id, *eos, 0)
        return torch.tensor(eos, dtype=torch.long, device=device), next(i for i in fillers if i is not None)


def next_token_loss(x: Tensor, labels: Tensor, head: nn.Module, rows: int = 256) -> Tensor:
    """Mean cross-entropy, in float32, of the tokens after the hidden states x (B, T, C).

    The logits of `rows` positions at a time, and only where there is a label; the backward pass computes them
    again. All at once, the logits of 4,096 positions would fill 4 GB, and their gradient as much.
    """
    x, labels = x[:, :-1], labels[:, 1:]
    kept = labels != -100
    x, labels = x[kept], labels[kept]

    def part(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), labels, reduction="sum")

    parts = zip(x.split(rows), labels.split(rows), strict=True)
    return sum(checkpoint(part, *both, use_reentrant=False) for both in parts) / len(labels)


class PersimmonForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PersimmonConfig

    def __init__(self, config: PersimmonConfig):
        super().__init__(config)
        self.model = PersimmonModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.max_positions = None  # rotary positions have no end
        self.tie_weights()

    def cache_serves(self, cache: KVCache, mask: Tensor) -> bool:
        """Not past the limit of dynamic scaling: there every token takes a pass over the whole text."""
        return rope_holds(cache, *(self.config.rope_of(m.sum(-1)) for m in (mask[:, : len(cache)], mask)))

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
                logits_to_keep: int | Tensor = 0, **inputs) -> CausalLMOutput:
        """Logits (B, T, V) after `PersimmonModel.forward`; with `labels` (B, T) the loss of the next tokens.

        Labels are not shifted, -100 is left out. `logits_to_keep`: how many last ones (0: all), or which. The
        loss is that of all positions in any case, and needs no logits but those: with long texts keep 1.
        """
        output = self.model(input_ids, **inputs)
        x = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None if labels is None else next_token_loss(x, labels, self.lm_head)
        return CausalLMOutput(loss, self.lm_head(x[:, kept]), *output[1:])


# ---- Fuyu --------------------------------------------------------------------------------------------------


def flat_patches(image_patches: Tensor | Sequence[Tensor], counts: list[int]) -> Tensor:
    """(all N, P) of one tensor or of one per row; ValueError unless each row has as many as it has places."""
    if isinstance(image_patches, Tensor):
        flat = image_patches.flatten(0, -2)
        if len(flat) != sum(counts):
            raise ValueError(f"{len(flat)} patches for {sum(counts)} places in input_ids")
        return flat
    rows = [row.flatten(0, -2) for row in image_patches]
    if len(rows) != len(counts):
        raise ValueError(f"image_patches has {len(rows)} rows, input_ids {len(counts)}")
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if len(row) != count:
            raise ValueError(f"row {i} has {len(row)} patches for {count} places in input_ids")
    return torch.cat(rows)


class FuyuForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FuyuConfig

    def __init__(self, config: FuyuConfig):
        super().__init__(config)
        P = config.patch_size**2 * config.num_channels
        self.vision_embed_tokens = Linear(P, config.text_config.hidden_size)
        self.language_model = PersimmonForCausalLM(config.text_config)
        self.max_positions = None  # rotary positions have no end

    def cache_serves(self, cache: KVCache, mask: Tensor) -> bool:
        return self.language_model.cache_serves(cache, mask)

    def forward(self, input_ids: Tensor | None = None, *,
                image_patches: Tensor | Sequence[Tensor] | None = None,
                image_patches_indices: Tensor | None = None, inputs_embeds: Tensor | None = None,
                **inputs) -> CausalLMOutput:
        """`PersimmonForCausalLM.forward`, which takes the other arguments, with patches among the tokens.

        `image_patches`: one (N, P) or (1, N, P) per row, which may have none, or a tensor with all of them.
        `image_patches_indices` (B, T) says which patch of its row stands where, -1 where there is a word;
        left out, patches go in order wherever `input_ids` has `config.image_token_id`. Pictures belong to the
        first call; with a cache there is only text. ValueError if patches and places differ in number.
        """
        if image_patches is not None:
            if len(inputs.get("past_key_values") or ()):
                raise ValueError("pictures belong to the first call, not to one with cached tokens")
            if inputs_embeds is not None:
                raise ValueError("give image_patches with input_ids, not with inputs_embeds")
            inputs_embeds = self.with_patches(input_ids, image_patches, image_patches_indices)
            input_ids = None
        return self.language_model(input_ids, inputs_embeds=inputs_embeds, **inputs)

    def with_patches(self, input_ids: Tensor, image_patches: Any, indices: Tensor | None) -> Tensor:
        """(B, T, C): words, and patches where they belong."""
        x = embed(self.language_model.model.embed_tokens, input_ids, None)
        T = x.shape[1]
        if indices is None:
            mask = input_ids == self.config.image_token_id
            indices = torch.where(mask, mask.long().cumsum(1) - 1, -1)
        if (indices[:, T:] >= 0).any():
            raise ValueError(f"image_patches_indices has patches beyond the {T} tokens of input_ids")
        indices = F.pad(indices[:, :T], (0, T - min(T, indices.shape[1])), value=-1).to(x.device)
        mask = indices >= 0  # (B, T)
        counts = mask.sum(1)
        patches = flat_patches(image_patches, counts.tolist())
        if (indices >= counts[:, None]).any():
            raise ValueError("image_patches_indices must count the patches of its row from 0")
        embedded = self.vision_embed_tokens(patches.to(x.device, self.vision_embed_tokens.weight.dtype))
        order = (indices + (counts.cumsum(0) - counts)[:, None])[mask]
        return x.masked_scatter(mask[..., None], embedded[order])

    def tie_weights(self) -> None:
        self.language_model.tie_weights()

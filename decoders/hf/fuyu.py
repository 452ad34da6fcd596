"""Fuyu's documented processors, over `decoders.fuyu`.

processor = FuyuProcessor.from_pretrained("adept/fuyu-8b")
inputs = processor(text="Generate a coco-style caption.\\n", images=image)
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decoders import fuyu
from decoders.formats import family, find, read_config, read_json_if_any, switched

from .arguments import hub_options, unexpected
from .encodings import BatchEncoding
from .tokenizer_base import PreTrainedTokenizerBase
from .tokenizers import AutoTokenizer

__all__ = ["AutoImageProcessor", "AutoProcessor", "FuyuImageProcessor", "FuyuProcessor"]


class FuyuImageProcessor(fuyu.FuyuImageProcessor):
    """Pictures -> what `FuyuProcessor` cuts into patches. Ours does all steps; here each can be left out."""

    model_input_names = [
        "images",
        "image_input_ids",
        "image_patches",
        "image_patch_indices_per_batch",
        "image_patch_indices_per_subsequence",
    ]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict | None = None,
        resample: int = 2,
        do_pad: bool = True,
        padding_value: float = 1.0,
        padding_mode: str = "constant",
        do_normalize: bool = True,
        image_mean: float | list = 0.5,
        image_std: float | list = 0.5,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        patch_size: dict | None = None,
        **kwargs: Any,
    ):
        for name, edges in (("size", size), ("patch_size", patch_size)):
            given = [(edges or {}).get(edge) for edge in ("height", "width")]
            if edges is not None and any(type(edge) is not int or edge < 1 for edge in given):
                raise ValueError(f"{name} must be height and width in pixels, not {edges!r}")
        super().__init__(size, (patch_size or {}).get("height", 30), padding_value)
        self.steps = {
            "do_resize": do_resize,
            "resample": int(resample),
            "do_pad": do_pad,
            "padding_mode": padding_mode,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
        }

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("steps", ()):
            return self.steps[name]
        raise AttributeError(f"FuyuImageProcessor has no {name!r}")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "FuyuImageProcessor":
        hub, kwargs = hub_options(kwargs)
        folder = find(pretrained_model_name_or_path, weights=False, **hub)
        stored = read_json_if_any(folder / "preprocessor_config.json")
        size = stored.get("patch_size") or read_json_if_any(folder / "config.json").get("patch_size", 30)
        stored["patch_size"] = {"height": size, "width": size} if isinstance(size, int) else size
        return cls(**{**stored, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        size = {"height": self.patch_size, "width": self.patch_size}
        return {
            **self.steps,
            "size": self.size,
            "patch_size": size,
            "padding_value": self.padding_value,
            "image_processor_type": "FuyuImageProcessor",
        }

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        with switched(Path(save_directory)) as new:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
            (new / "preprocessor_config.json").write_text(text, "utf-8")

    def __call__(self, images: Any, **kwargs: Any) -> BatchEncoding:
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = None, **steps: Any) -> BatchEncoding:
        """`images`, `image_unpadded_heights`, `image_unpadded_widths`, `image_scale_factors`: a list for each
        text. `steps` are arguments of the constructor, for this call."""
        if steps:
            unexpected("FuyuImageProcessor.preprocess", steps.keys() - self.to_dict().keys(), self.to_dict())
            return type(self)(**{**self.to_dict(), **steps}).preprocess(images, return_tensors)
        return BatchEncoding(super().preprocess(images)._asdict())

    def prepared(self, image: Any) -> tuple[Tensor, int, int, float]:
        """As ours, in float32 as 4.37, and padded to the whole `size`: patches of padding are left out when
        it is cut."""
        s, pixels, scale = self.steps, fuyu.rgb(image), 1.0
        height, width, _ = pixels.shape
        if s["do_resize"] and (height > self.size["height"] or width > self.size["width"]):
            fit = min(self.size["height"] / height, self.size["width"] / width)
            new = max(1, int(height * fit)), max(1, int(width * fit))
            pixels, scale = self.resize(pixels, {"height": new[0], "width": new[1]}), new[0] / height
            height, width = new
        values = pixels.permute(2, 0, 1).float()
        if s["do_pad"]:
            values = self.pad_image(values, self.size, s["padding_mode"], round(self.padding_value))
        values = (values.double() * s["rescale_factor"]).float() if s["do_rescale"] else values
        if s["do_normalize"]:
            names = ("image_mean", "image_std")
            mean, std = (torch.as_tensor(s[name]).float().view(-1, 1, 1) for name in names)
            values = (values - mean) / std
        return values, height, width, scale

    def resize(self, image: Tensor, size: dict[str, int]) -> Tensor:
        """(H, W, 3) bytes, with Pillow's filter `resample`."""
        if self.steps["resample"] == 2:
            return fuyu.resized(image, size["height"], size["width"])
        from PIL import Image

        done = Image.fromarray(image.numpy()).resize((size["width"], size["height"]), self.steps["resample"])
        return fuyu.rgb(done)

    def pad_image(
        self, image: Tensor, size: dict[str, int], mode: str = "constant", constant_values: float = 1.0
    ) -> Tensor:
        """(3, H, W), made as large as `size` below and on the right. `mode` has NumPy's names."""
        height, width = image.shape[1:]
        bottom, right = max(size["height"], height) - height, max(size["width"], width) - width
        more = {"value": constant_values} if mode == "constant" else {}
        modes = {"constant": "constant", "edge": "replicate", "reflect": "reflect"}
        if mode not in modes:
            raise ValueError(f"padding_mode must be one of {', '.join(modes)}, not {mode!r}")
        return F.pad(image, (0, right, 0, bottom), mode=modes[mode], **more)


class FuyuProcessor:
    """Texts and pictures -> `input_ids`, `attention_mask`, `image_patches`, `image_patches_indices`."""

    model_input_names = ["input_ids", "attention_mask", "image_patches", "image_patches_indices"]

    def __init__(self, image_processor: FuyuImageProcessor, tokenizer: PreTrainedTokenizerBase):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.plain = fuyu.FuyuProcessor(image_processor, tokenizer.plain)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "FuyuProcessor":
        return cls(
            FuyuImageProcessor.from_pretrained(pretrained_model_name_or_path, **hub_options(dict(kwargs))[0]),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_token_type_ids: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Texts alone go to the tokenizer, with all arguments. With pictures the result is tensors, padded on
        the left, and there is no truncation: it would cut a picture."""
        if not return_attention_mask:
            raise ValueError("return_attention_mask=False is not possible: padding would count as text")
        if images is None and text is not None:
            kwargs |= {
                "stride": stride,
                "pad_to_multiple_of": pad_to_multiple_of,
                "return_length": return_length,
                "return_overflowing_tokens": return_overflowing_tokens,
                "return_special_tokens_mask": return_special_tokens_mask,
                "return_offsets_mapping": return_offsets_mapping,
                "return_token_type_ids": return_token_type_ids,
            }
            return self.tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                **kwargs,
            )
        cut = bool(truncation) and truncation != "do_not_truncate"
        return BatchEncoding(self.plain(text, images, truncation=cut, max_length=max_length if cut else None))

    def post_process_box_coordinates(self, outputs: Any, target_sizes: Any = None) -> list[Tensor]:
        """Rows of ids, each (T,), in which places are text in pixels."""
        rows = outputs.sequences if hasattr(outputs, "sequences") else outputs
        return [found.ids for found in self.plain.post_process_box_coordinates(rows, target_sizes)]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)


class AutoProcessor:
    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Fuyu's, and of all others the tokenizer, which is all they need."""
        folder = find(pretrained_model_name_or_path, weights=False, **hub_options(dict(kwargs))[0])
        kind = FuyuProcessor if family(read_config(folder)) == "fuyu" else AutoTokenizer
        return kind.from_pretrained(pretrained_model_name_or_path, **kwargs)


class AutoImageProcessor:
    from_pretrained = staticmethod(FuyuImageProcessor.from_pretrained)

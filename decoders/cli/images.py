"""Pictures: what Fuyu is shown, and where the places of its answer are drawn."""

import argparse
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decoders import family, fuyu, read_config
from decoders.formats import preprocessor, write_file

from .output import escaped, print_note

PLACE = "<box>top, left, bottom, right</box> or <point>x, y</point>"


class ImageInput:
    """A picture with the prompt about it, and a streamer of the answer, which shows places in pixels."""

    def __init__(self, folder: Path, tokenizer: Any, prompt: str, args: argparse.Namespace):
        self.draw_to = getattr(args, "draw", None)
        config = read_config(folder)
        if family(config) != "fuyu":
            raise ValueError(f"--image: {args.model} takes no pictures")
        if args.image is None:
            raise ValueError("--draw needs a picture: --image FILE")
        if args.chat:
            raise ValueError("--image has no --chat: Fuyu was not trained on conversations")
        check_places(prompt)
        check_picture_name(self.draw_to)
        if self.draw_to is not None and Path(self.draw_to).resolve() == Path(args.image).resolve():
            raise ValueError("--draw would replace the picture that it draws on: give another file")
        self.picture = open_picture(args.image)
        image_processor = fuyu.FuyuImageProcessor(**preprocessor(folder, config))
        self.tokenizer, self.processor = tokenizer, fuyu.FuyuProcessor(image_processor, tokenizer)
        prompt = prompt.replace("\\n", "\n")  # which a shell leaves as it is
        prompt = prompt.removesuffix("\n") + "\n"  # Fuyu was trained on prompts that end so
        inputs = self.processor(prompt, self.picture)
        self.input_ids: list[int] = inputs["input_ids"][0].tolist()
        self.patches = {key: inputs[key] for key in ("image_patches", "image_patches_indices")}
        self.special = {token.id for token in tokenizer.added.values() if token.special}
        self.show: Callable[[str], Any]  # of what is complete; set before the first put
        self.ids: list[int] = []
        self.shown = ""

    def patches_of(self, n: int) -> dict[str, Any]:
        """The patches for `n` sequences about the picture."""
        repeated = {}
        for key, value in self.patches.items():
            repeated[key] = value * n if isinstance(value, list) else value.expand(n, -1)
        return repeated

    def put(self, ids: Any) -> None:
        if ids.dim() == 1:  # not the prompt
            self.ids += ids.tolist()
            self.show_more()

    def end(self) -> None:
        self.show_more(final=True)

    def located(self, ids: list[int]) -> Any:
        """Text and places of an answer."""
        width, height = self.picture.size
        ordinary = torch.tensor([id for id in ids if id not in self.special], dtype=torch.long)
        return self.processor.post_process_box_coordinates([ordinary], [(height, width)])[0]

    def show_more(self, final: bool = False) -> None:
        """What is new, up to where a place or a character is not complete yet."""
        text = self.located(self.ids).text
        opening = [self.processor.id_of(tag) for tag in ("<0x00>", "<0x02>")]
        incomplete = text.endswith("\ufffd") or any(id in self.ids[-5:] for id in opening)
        if final or not incomplete:
            self.show(text[len(self.shown) :])
            self.shown = text

    def answer(self) -> dict[str, Any]:
        """Text and places; draws them if that was asked for."""
        answer = self.located(self.ids)
        if self.draw_to is not None:
            draw_places(self.picture, answer.places, self.draw_to)
            plural = "" if len(answer.places) == 1 else "s"
            print_note(f"{len(answer.places)} place{plural} drawn into {escaped(self.draw_to)}")
        places = [{type(place).__name__.lower(): place._asdict()} for place in answer.places]
        return {"text": answer.text, "places": places}


def check_places(prompt: str) -> None:
    """ValueError for a tag that was left open, which Fuyu would take for a place all the same."""
    rest = re.sub(r"<(box|point)>[^<]*</\1>", "", prompt)
    if tag := re.search(r"</?(box|point)>[^<]{,30}", rest):
        raise ValueError(f"{tag[0]!r} is no place: give {PLACE}")


def check_picture_name(file: str | None) -> None:
    """ValueError for a name under which no picture can be written, before anything is computed."""
    if file is None:
        return
    from PIL import Image

    Image.init()
    folder = Path(file).absolute().parent
    if Image.EXTENSION.get(Path(file).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {file!r}: give a name that ends in .png or .jpg")
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(file).is_dir():
        raise ValueError(f"--draw {file!r}: no file can be written there")


def open_picture(file: str) -> Any:
    """A PIL image, upright. ValueError for what is none, is damaged, or would fill the memory."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("pictures need Pillow: pip install '.[images]'") from None
    if not Path(file).is_file():
        reason = "is no regular file" if Path(file).exists() else "is missing"
        raise ValueError(f"the picture {file!r} {reason}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{file} is no picture that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{file} has more pixels than any honest picture") from None
    except (OSError, SyntaxError, EOFError, ValueError) as error:  # Pillow's words for damaged files
        if getattr(error, "filename", None):
            raise
        raise ValueError(f"{file} is damaged: {error}") from None


def draw_places(picture: Any, places: list, file: str) -> None:
    """A frame for a box, a ring for a point, in red with a white rim."""
    from PIL import Image, ImageDraw

    image = picture.convert("RGB")
    draw, thick = ImageDraw.Draw(image), max(1, max(image.size) // 200)
    for place in places:
        if len(place) == 4:
            top, left, bottom, right = place
            corners = [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]
            shape = draw.rectangle
        else:
            ring = 3 * thick
            corners = [place.x - ring, place.y - ring, place.x + ring, place.y + ring]
            shape = draw.ellipse
        rim = [corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1]
        shape(rim, outline="white", width=thick + 2)
        shape(corners, outline="red", width=thick)
    kind = Image.EXTENSION[Path(file).suffix.lower()]
    write_file(file, lambda stream: image.save(stream, kind))

"""A page that shows a model think: one HTML file that needs nothing else, no network, no server.

    python -m decoders look checkpoints/tiny-phi "Once upon a time" -o page.html

    found = look.trace(model, ids)                       # traces.py: every value of a pass, by name
    look.write("page.html", look.page([look.Run(model, ids, tokenizer, prompt=4)]))

`content.py` turns a trace into what the page shows; the scripts of `js/` and `look.css` show it.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from decoders.formats import write_file

from .content import Run
from .difference import compared
from .html import filled
from .runs import data


def page(runs: Sequence[Run], title: str = "") -> str:
    """HTML of one run, or of two side by side with their difference."""
    if not 1 <= len(runs) <= 2:
        raise ValueError(f"a page shows one run or two, not {len(runs)}")
    shown = [data(run) for run in runs]
    content: dict[str, Any] = {"runs": [each for each, _ in shown]}
    if len(shown) == 2:
        written = [getattr(run.tokenizer, "bytes_of", None) for run in runs]
        content["compared"] = compared(
            shown[0][1], shown[1][1], shown[0][0], shown[1][0], written[0] == written[1]
        )
    title = title or " and ".join(dict.fromkeys(each["name"] for each in content["runs"]))
    return filled(title, content)


def write(file: str | Path, text: str) -> Path:
    """All of it or nothing, as `formats.write_file`. OSError where no file can be written."""
    return write_file(file, text)


# ---- Pictures ----------------------------------------------------------------------------------------------


def seen_picture(
    processor: Any, picture: Any, ids: Sequence[int], image_token: int, places: Iterable[Any] = ()
) -> dict[str, Any]:
    """A picture as Fuyu saw it, in whole patches, and which token is which patch. `places` are boxes and
    points of the answer, in pixels of `picture`."""
    from PIL import Image

    pixels, height, width, scale = processor.prepared(picture)
    pixels = processor.cropped(pixels, height, width)
    size = processor.patch_size
    image = Image.fromarray(((pixels.permute(1, 2, 0) * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    rows, columns = image.height // size, image.width // size
    tokens = [i for i, id in enumerate(ids) if id == image_token][: rows * columns]
    return {
        "source": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "patch": size,
        "width": image.width,
        "height": image.height,
        "columns": columns,
        "tokens": tokens,
        "places": [[round(float(n) * scale, 1) for n in place] for place in places],
    }

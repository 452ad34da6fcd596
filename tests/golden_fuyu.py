"""What the processor of Transformers 4.37.2 makes of pictures and prompts, into golden_fuyu.json. Newer ones break it.

    old/bin/python tests/golden_fuyu.py           # a Python with transformers==4.37.2, Pillow and "numpy<2"

It imports nothing from this project. The tokenizer is that of checkpoints/tiny-fuyu: run it again after training.
"""

import hashlib
import json
from pathlib import Path

HERE = Path(__file__).parent
SIZES = [(417, 640), (300, 64), (100, 100), (300, 100), (500, 30), (213, 167), (29, 31), (1080, 1920), (1081, 1920), (1080, 1921),
         (1500, 2500), (3000, 10), (557, 800), (1280, 1080), (31, 2001)]  # fmt: skip
PROMPTS = [  # (height, width), text
    ((100, 130), "Generate a coco-style caption.\n"), ((100, 130), ""), ((100, 130), "a  b \n"),
    ((100, 130), "what is at <box>38, 42, 40, 48</box>?\n"), ((100, 130), "<box>5, 7, 9, 11</box>"),
    ((100, 130), "<point>10, 21</point> and <point>3,4</point>."), ((100, 130), "<box>10, 20</box> x"),
    ((100, 130), "see <box>1, 2, 3, 5"), ((100, 130), "x <point> 1.5 , 2.5 </point>"), ((1500, 2500), "at <box>388, 428, 404, 488</box>"),
    ((1081, 1920), "<box>3, 5, 7, 9</box> <box>101, 103, 105, 107</box>"), ((100, 130), "</box>a</point>"),
]  # fmt: skip


def pixels(height: int, width: int):
    """A picture that any program can draw: bytes in (height, width, colour) order."""
    import numpy

    y, x, c = numpy.mgrid[0:height, 0:width, 0:3]
    return ((x * 7 + y * 13 + c * 50 + (x * y) // 5) % 256).astype(numpy.uint8)


def digest(floats) -> str:
    return hashlib.sha256(floats.contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    import transformers
    from PIL import Image
    from transformers.models.fuyu import FuyuImageProcessor, FuyuProcessor

    assert transformers.__version__ == "4.37.2", transformers.__version__
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        HERE.parent / "checkpoints" / "tiny-fuyu"
    )
    processor = FuyuProcessor(FuyuImageProcessor(), tokenizer)
    pictures = {}
    for height, width in SIZES:
        image = Image.fromarray(pixels(height, width))
        found = processor(text="", images=image)
        scale = processor.image_processor.preprocess(image)["image_scale_factors"][0][0]
        patches = found["image_patches"][0][0]
        indices = found["image_patches_indices"][0].tolist()
        newlines = [i for i, index in enumerate(indices[: len(found["input_ids"][0])]) if index == -1]
        pictures[f"{height}x{width}"] = {
            "patches": list(patches.shape), "sha256": digest(patches), "first": patches[0, :6].tolist(), "last": patches[-1, -6:].tolist(),
            "scale": scale, "no_patch_at": newlines,
        }  # fmt: skip
    prompts = []
    for (height, width), text in PROMPTS:
        ids = processor(text=text, images=Image.fromarray(pixels(height, width)))["input_ids"][0].tolist()
        start = ids.index(tokenizer.convert_tokens_to_ids("<s>"))
        prompts.append({"size": [height, width], "text": text, "ids": ids[start:], "picture_ids": start})
    batch = processor(
        text=["a red circle", "x"], images=[Image.fromarray(pixels(90, 120)), Image.fromarray(pixels(40, 40))]
    )
    result = {"transformers": transformers.__version__, "pictures": pictures, "prompts": prompts, "batch": {
        "input_ids": batch["input_ids"].tolist(), "attention_mask": batch["attention_mask"].tolist(),
        "image_patches_indices": batch["image_patches_indices"].tolist()}}  # fmt: skip
    (HERE / "golden_fuyu.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

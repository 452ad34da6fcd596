"""Numbers that others published about the real checkpoints. They need the real files:

    DECODERS_CHECKPOINTS=/models python -m pytest tests/test_published.py

where /models holds phi-1, phi-2, Phi-3-mini-4k-instruct, gpt-neo-1.3B, openai-gpt ... under the hub's names. Source of the numbers:
the tests and the documentation of Transformers (float32, the first 30 logits of two positions).
"""

import os
from pathlib import Path

import pytest
import torch

from decoders import fuyu, model_class, read_config, tokenize, weights

PROMPT = [1212, 318, 281, 1672, 2643, 290, 428, 318, 257, 1332]
LOGITS = {  # checkpoint -> (tolerance, logits[0, :2, :30])
    "phi-1": (1e-4, """
        2.2671 6.7684 -2.0107 -1.2440 -1.5335 -2.3828 6.9186 6.4245 3.1548 0.9998 0.0760 4.4653 4.9857 4.2956 1.2308
        -1.4178 0.1361 0.5191 -0.5699 -2.2201 -3.0750 -3.9600 -4.5936 -3.7394 -2.7777 6.1874 -0.4148 -1.5684 -0.5967 0.2395
        1.7004 4.0383 0.0546 0.4530 -0.3619 -0.9021 1.8355 1.3587 1.2406 2.5775 -0.8834 5.1910 4.2565 4.1406 3.0752
        -0.9099 1.1595 0.0264 0.3243 -1.1803 -1.3945 -2.1406 -3.9939 -1.4438 -2.9546 3.9204 1.0851 -1.0598 -1.7819 -0.4827"""),
    "phi-1_5": (1e-4, """
        12.2922 13.3507 8.6963 9.1355 9.3502 9.2667 14.2027 13.1363 13.5446 11.1337 9.9279 16.7195 13.0768 14.9141 11.9965
        8.0233 10.3129 10.6118 10.0204 9.3827 8.8344 8.2806 8.0153 8.0540 7.0964 16.5743 11.1256 9.6987 11.4770 10.5440
        12.3323 14.6050 8.9986 8.1580 9.5654 6.6728 12.5966 12.6662 12.2784 11.7522 8.2039 16.3102 11.2203 13.6088 12.0125
        9.1021 9.8216 10.0987 9.0926 8.4260 8.8009 7.6547 6.8075 7.7881 7.4501 15.7451 10.5053 8.3129 10.0027 9.2612"""),
    "phi-2": (1e-3, """
        6.4830 6.1644 3.4055 2.2848 5.4654 2.8360 5.5975 5.5391 7.3101 4.2498 2.5913 10.3885 6.4359 8.7982 5.6534
        0.5150 2.7498 3.1930 2.4334 1.7781 1.5613 1.3067 0.8291 0.5633 0.6522 9.8191 5.5771 2.7987 4.2845 3.7030
        6.0642 7.8242 3.4634 1.9259 4.3169 2.0913 6.0446 3.6804 6.6736 4.0727 2.1791 11.4139 5.6795 7.5652 6.2039
        2.7174 4.3266 3.6930 2.8058 2.6721 2.3047 2.0848 2.0972 2.0441 1.3160 9.2085 4.5557 3.0296 2.6045 2.4059"""),
    "Phi-3-mini-4k-instruct": (1e-4, """
        8.9005 8.5380 12.0361 9.1562 7.4068 10.2581 7.8991 7.2447 7.0626 7.5760 7.8315 9.4076 16.1104 20.1290 7.7500
        7.1947 6.1550 7.0563 8.5344 8.7248 7.1359 7.8237 7.6817 7.6395 7.7924 6.9702 6.9097 8.7074 9.5768 8.1145
        18.7090 18.5701 19.3660 21.5171 17.5042 17.8716 16.3554 17.4617 18.1623 16.5641 17.7547 18.0193 23.8355 29.4481 16.3864
        16.0560 16.1543 18.5507 18.1343 17.3883 17.7422 17.3012 16.7657 17.6874 17.9067 16.8301 16.2719 18.3709 19.0318 16.7315"""),
    "Phi-3-mini-128k-instruct": (1e-4, """
        10.6076 10.6499 14.0601 19.8499 15.1787 19.3717 19.9782 17.0394 15.7875 18.1403 19.2748 12.6627 20.2804 24.5362 18.8105
        15.3394 12.1219 15.9941 19.0679 16.4936 17.0505 16.8738 17.3090 16.6572 16.8754 16.6912 15.1627 18.8721 19.6017 18.5513
        16.2141 18.7298 17.4216 21.9312 17.7606 17.6177 16.7766 17.9859 18.4132 17.4505 18.6385 18.5396 23.6260 28.7443 16.1817
        15.5148 16.0035 18.6652 18.3087 17.2960 17.8223 17.7776 16.8686 17.4093 17.8037 17.2544 16.7231 18.6195 19.6784 16.6647"""),
}  # fmt: skip
# The first release of Phi-3-mini-128k had other weights: the beginnings of the same two rows.
FIRST_128K = (
    [
        1.8478,
        -0.5709,
        -1.6792,
        -1.2133,
        -0.7809,
        -0.8817,
        -2.0969,
        -1.1191,
        -0.7731,
        -1.0483,
        -0.5961,
        -1.3067,
    ],
    [3.5839, 2.4722, 3.7130, 1.2032, 0.7356, 2.7777],
)
TEXTS = {  # checkpoint -> (prompt or ids, what greedy text follows)
    "phi-1": ("This is an example script .",
              "\n\n\n\nfrom typing import List\n\ndef find_most_common_letter(words: List[str"),
    "phi-1_5": ("If I were an AI that had just achieved", " a breakthrough in machine learning, I would be thrilled"),
    "phi-2": ("Can you help me write a formal email to a potential business partner proposing a fused venture?",
              "\nInput: Company A: ABC Inc.\nCompany B: XYZ Ltd.\nJoint Venture: A new online platform for e-commerce"),
    "gpt-neo-1.3B": ([464, 3290],
                     [12, 3380, 4866, 286, 262, 1492, 11, 543, 318, 257, 4947, 286, 27126, 416, 262, 2739, 1772, 11]),
    "openai-gpt": ([481, 4735, 544],
                   [246, 963, 870, 762, 239, 244, 40477, 244, 249, 719, 881, 487, 544, 240, 244, 603, 481]),
}  # fmt: skip


EYES = [  # of adept/fuyu-8b: a picture beside the checkpoint, a prompt, what greedy text follows
    ("bus.png", "Generate a coco-style caption.\n", "A blue bus parked on the side of a road."),
    ("bus.png", "What color is the bus?\n", "The bus is blue.\n"),
    (
        "chart.png",
        "What is the highest life expectancy at birth of male?\n",
        "The life expectancy at birth of males in 2018 is 80.7.\n",
    ),
]
FRUIT = {"role": "user", "content": "Can you provide ways to eat combinations of bananas and dragonfruits?"}
SYSTEM = {
    "role": "system",
    "content": "You are a helpful digital assistant. Please provide safe, ethical and accurate information to the user.",
}
BEGINS = "Certainly! Bananas and dragonfruits can be combined in various delicious "
CHATS = [  # checkpoint, messages, what greedy text follows
    (
        "Phi-3-mini-4k-instruct",
        [FRUIT],
        BEGINS + "ways. Here are some creative ideas for incorporating both fruits",
    ),
    (
        "Phi-3-mini-4k-instruct",
        [SYSTEM, FRUIT],
        BEGINS + "ways. Here are some ideas for incorporating these fruits into your",
    ),
    (
        "Phi-3-mini-128k-instruct",
        [SYSTEM, FRUIT],
        BEGINS + "and nutritious ways. Here are some creative and healthy",
    ),
    (
        "persimmon-8b-chat",
        [{"role": "user", "content": "Simply put, the theory of relativity states that?"}],
        "The theory of relativity states that the laws of physics are the same for all observers, regardless of their",
    ),
]


def folder_of(name: str) -> Path:
    root = os.environ.get("DECODERS_CHECKPOINTS")
    if not root:
        pytest.skip("DECODERS_CHECKPOINTS is not set: no real checkpoints to check")
    if not (Path(root) / name).is_dir():
        pytest.skip(f"DECODERS_CHECKPOINTS has no {name}")
    return Path(root) / name


def model_of(folder: Path) -> torch.nn.Module:
    return weights.load(model_class(read_config(folder)), folder, dtype=torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("name", LOGITS)
def test_published_logits(name):
    tolerance, numbers = LOGITS[name]
    expected = torch.tensor([float(x) for x in numbers.split()]).view(2, 30)
    found = model_of(folder_of(name))(torch.tensor([PROMPT])).logits[0, :2, :30]
    if name == "Phi-3-mini-128k-instruct" and abs(found[0, 0] - FIRST_128K[0][0]) < 0.1:
        for row, first in zip(found, FIRST_128K, strict=True):
            torch.testing.assert_close(row[: len(first)], torch.tensor(first), atol=1e-3, rtol=1e-3)
        return
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", TEXTS)
def test_published_texts(name):
    folder = folder_of(name)
    prompt, expected = TEXTS[name]
    tokenizer = tokenize.load(folder)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    new = expected if isinstance(expected, list) else tokenizer.encode(expected)
    found = model_of(folder).generate(torch.tensor([ids]), max_new_tokens=len(new), eos_token_id=None)[
        0, len(ids) :
    ]
    assert tokenizer.decode(found) == (expected if isinstance(expected, str) else tokenizer.decode(expected))


@pytest.mark.parametrize(("name", "messages", "expected"), CHATS)
def test_published_chats(name, messages, expected):
    folder = folder_of(name)
    tokenizer = tokenize.load(folder)
    ids = tokenizer.chat(messages)
    found = model_of(folder).generate(torch.tensor([ids]), max_new_tokens=32, eos_token_id=None)[
        0, len(ids) :
    ]
    assert tokenizer.decode(found).strip().startswith(expected)


@pytest.mark.parametrize(("file", "prompt", "expected"), EYES)
def test_published_answers_about_pictures(file, prompt, expected):
    folder = folder_of("fuyu-8b")
    if not (folder / file).exists():
        pytest.skip(f"fuyu-8b lacks {file}")
    image, tokenizer = pytest.importorskip("PIL.Image").open(folder / file), tokenize.load(folder)
    inputs = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)(prompt, image)
    found = model_of(folder).generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(found, skip_special_tokens=True).startswith(expected.strip())


def test_published_ids_of_a_picture_and_its_prompt():
    """Of the real vocabulary, with a backslash and an n, as the test of Transformers has it."""
    tokenizer = tokenize.load(folder_of("fuyu-8b"))
    ids = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)(
        "Generate a coco-style caption.\\n", torch.zeros(417, 640, 3, dtype=torch.uint8)
    )["input_ids"][0]
    tail = [1, 128340, 71374, 71389, 120412, 71377, 71835, 71374, 73615, 71375, 71399, 71435, 71122]
    assert ids.tolist() == [*[71011] * 22, 71019] * 14 + tail

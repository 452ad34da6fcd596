"""Numbers that others published about the real checkpoints. They need the real files:

    DECODERS_CHECKPOINTS=/models python -m pytest tests/test_published.py

where /models holds phi-1, phi-1_5, phi-2, gpt-neo-1.3B, openai-gpt ... under the hub's names. Source of the numbers:
the tests and the documentation of Transformers (float32, the first 30 logits of two positions).
"""

import os
from pathlib import Path

import pytest
import torch

from decoders import model_class, read_config, tokenize, weights

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
}  # fmt: skip
TEXTS = {  # checkpoint -> (prompt or ids, what greedy text follows)
    "phi-1": ("This is an example script .",
              "\n\n\n\nfrom typing import List\n\ndef find_most_common_letter(words: List[str"),
    "phi-1_5": ("If I were an AI that had just achieved", " a breakthrough in machine learning, I would be thrilled"),
    "phi-2": ("Can you help me write a formal email to a potential business partner proposing a joint venture?",
              "\nInput: Company A: ABC Inc.\nCompany B: XYZ Ltd.\nJoint Venture: A new online platform for e-commerce"),
    "gpt-neo-1.3B": ([464, 3290],
                     [12, 3380, 4866, 286, 262, 1492, 11, 543, 318, 257, 4947, 286, 27126, 416, 262, 2739, 1772, 11]),
    "openai-gpt": ([481, 4735, 544],
                   [246, 963, 870, 762, 239, 244, 40477, 244, 249, 719, 881, 487, 544, 240, 244, 603, 481]),
}  # fmt: skip


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
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", TEXTS)
def test_published_texts(name):
    folder = folder_of(name)
    prompt, expected = TEXTS[name]
    tokenizer = tokenize.load(folder)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    new = expected if isinstance(expected, list) else tokenizer.encode(expected)
    found = model_of(folder).generate(torch.tensor([ids]), max_new_tokens=len(new), eos_token_id=None)[0, len(ids) :]
    assert tokenizer.decode(found) == (expected if isinstance(expected, str) else tokenizer.decode(expected))

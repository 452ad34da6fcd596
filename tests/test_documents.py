"""The documentation's examples run with the import changed, and its names are all there. DECODERS_DOCS is its folder."""

import re
import subprocess
import sys

import pytest

from tests import documents
from tests.hub_cache import build

WHERE = documents.folder()
pytestmark = pytest.mark.ecosystem  # two minutes
needed = pytest.mark.skipif(
    WHERE is None or not WHERE.is_dir(), reason="DECODERS_DOCS is not set: no documentation to read"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def ours(home, tmp_path_factory):
    return documents.run(sys.executable, "decoders.hf", home, tmp_path_factory.mktemp("ours"), WHERE)


@pytest.fixture(scope="module")
def theirs(home, tmp_path_factory):
    pytest.importorskip("transformers")
    return documents.run(sys.executable, "transformers", home, tmp_path_factory.mktemp("theirs"), WHERE)


@needed
def test_every_pytorch_example_runs(ours):
    """Four need a GPU for FlashAttention, and say so in a sentence."""
    found = documents.examples(WHERE)
    for one, result in zip(found, ours["results"], strict=True):
        if one.kind == "PyTorch" and "flash_attention_2" not in one.code:
            assert "error" not in result, (one, result)
        elif one.kind == "PyTorch":
            assert "needs an NVIDIA GPU" in result["error"], one
    assert sum(one.kind == "PyTorch" for one in found) >= 36


@needed
def test_the_others_are_told_the_lines_to_write_instead(ours):
    for one, result in zip(documents.examples(WHERE), ours["results"], strict=True):
        if one.kind != "PyTorch" and "tensorflow" not in result["error"]:
            assert result["error"].startswith("ImportError: ") and "two lines" in result["error"], one


@needed
def test_examples_leave_what_they_leave_in_transformers(ours, theirs):
    """Whatever differs has a reason that was looked at; `reason` raises for what has none."""
    assert documents.example_table(WHERE, ours, [theirs]).count("same") >= 20


@needed
def test_every_documented_argument_and_field_is_here(ours):
    documents.name_table(WHERE, ours, [])  # raises for what is missing


@needed
def test_examples_without_their_gpu(home):
    """FlashAttention's examples, on a CPU."""
    for one in documents.examples(WHERE):
        if "flash_attention_2" in one.code:
            code = (
                re.sub(r',? ?attn_implementation="flash_attention_2"', "", one.code)
                .replace("cuda", "cpu")
                .replace("100", "8")
            )
            code = code.replace("from transformers", "from decoders.hf")
            env = {
                "HF_HOME": str(home),
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(documents.ROOT),
                "PATH": "/usr/bin:/bin",
            }
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            assert not done.returncode, (one, done.stderr[-500:])

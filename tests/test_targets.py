"""The kernels are written once, and compiled for several kinds of processors."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from decoders.kernels import build, native
from tests.conftest import ROOT

FOLDER = build.SOURCE.parent
OTHERS = [target.name for target in build.targets_here()[1:] if target.needed <= native.processor_flags()]
OF_THE_KERNELS = ("kernels", "plan", "prefill", "quantize", "int8_cache", "gguf", "packed_running")
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="there is no C compiler")


def instructions() -> set[str]:
    """Those of AVX-512 that the kernels use: of 512 bits, or with a mask."""
    text = "".join(source.read_text() for source in FOLDER.glob("*.c"))
    return set(re.findall(r"\b_mm512_\w+|\b_mm\d*_mask\w+", text))


def test_avx2_has_every_instruction_of_the_kernels_and_no_other():
    defined = re.findall(r"^#define (_mm\w+)", (FOLDER / "avx2.h").read_text(), re.MULTILINE)
    assert sorted(set(defined) - {"_mm_cvtneps_pbh"}) == sorted(instructions())


@needs_gcc
@pytest.mark.parametrize("target", build.targets_here(), ids=lambda target: target.name)
def test_the_kernels_are_c_for_every_target(target):
    command = ["gcc", "-O3", "-fsyntax-only", "-Werror", "-fopenmp", *target.flags, str(build.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.ecosystem
@needs_gcc
@pytest.mark.parametrize("name", OTHERS)
def test_the_kernels_for_lesser_processors_pass_the_tests_of_the_best(name):
    """On this processor, which has their instructions as well."""
    environment = {**os.environ, "DECODERS_NATIVE": name}
    code = "from decoders.kernels import native; native.wait(); print(native.operators())"
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert said.stdout == f"{name} kernels\n", said.stderr
    files = [f"tests/test_{part}.py" for part in OF_THE_KERNELS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not ecosystem and not proof",
    ]
    done = subprocess.run([*command, *files], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


INT8 = """
import torch
from decoders.kernels import quantized
layer = torch.nn.Linear(3000, 40, bias=False)
layer.weight.data.sign_()  # all of them 127 then
int8 = quantized.Quantized.from_weight(layer, "int8", layer.weight)
x = torch.randn(3, 3000).sign()
off = int8(x) - (x.double() @ layer.weight.double().t())  # of whole numbers: 1 at least where it is wrong
print(bool(off.abs().max() < 0.5), quantized.int_mm_is_exact())
"""


@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_whole_numbers_without_the_kernels_are_right_on_every_processor(isa):
    """oneDNN adds two products of bytes in 16 bits, where it does without VNNI instructions."""
    environment = {**os.environ, "DECODERS_NATIVE": "0", "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-c", INT8]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("True "), done.stdout + done.stderr

import os
import warnings
from pathlib import Path

import pytest
import torch

from decoders.kernels import native
from tests import sampled_beams
from tests.families import FAMILIES

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched; test_hub.py has a server of its own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message=".*NumPy.*")

ROOT = Path(__file__).parent.parent


def pytest_generate_tests(metafunc):
    """A test with an argument `family` runs for all of them."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES, ids=str)


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """The CPU kernels: else the first tests would run without them."""
    native.wait()


@pytest.fixture(autouse=True)
def repeatable():
    torch.set_num_threads(1)  # several workers share the cores
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def sampled_beams_of_the_installed_transformers(monkeypatch):
    """Ours are in the order of 5.24, where what was sampled is sorted; older ones leave it as it was drawn."""
    if not sampled_beams.are_sorted():
        monkeypatch.setattr("decoders.decoding.beams.best_first", sampled_beams.as_drawn)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real tokenizers and configs."""
    folder = os.environ.get("DECODERS_TEST_DATA")
    if not folder:
        pytest.skip("DECODERS_TEST_DATA is not set: no real tokenizers and configs to test on")
    return Path(folder)

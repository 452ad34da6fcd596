"""A short run of what `make fuzz` does for hours."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz import calls, damage, folders, settings, strings, uses


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.proof)])
def test_any_json_in_any_field_is_honoured_or_refused_in_a_sentence(seed):
    """TypeError, OverflowError, IndexError, a panic of a library, or a load that failed in `generate`, were met."""
    counts, failures = folders.run(seed, cases=600)
    assert not failures, "\n".join(failures)
    assert counts["answered"] > 100 and counts["refused"] > 100


@pytest.mark.parametrize(("name", "file", "path", "value", "message"), [
    ("tiny-phi", "config.json", ("model_type",), [], "config.json: model_type \\[\\] is not one of"),
    ("tiny-phi", "config.json", ("hidden_size",), 10**30, "config.json: hidden_size must be at most 2147483647"),
    ("tiny-phi", "config.json", ("hidden_size",), 10**400, "config.json: hidden_size must be at most"),
    ("tiny-phi", "config.json", ("rope_theta",), 10**400, "config.json: rope_theta must be a positive number, not a number of more"),
    ("tiny-phi3", "config.json", ("num_hidden_layers",), 2**31 - 1, "config.json: 2147483647 layers .* no memory holds"),
    ("tiny-phi", "config.json", ("vocab_size",), 2**31 - 1, "config.json|does not fit"),
    ("tiny-gpt-neo", "config.json", ("pad_token_id",), "x", "config.json: pad_token_id must be a token id or null, not 'x'"),
    ("tiny-gpt-neo", "config.json", ("eos_token_id",), {"content": [1]}, "config.json: eos_token_id must be"),
    ("tiny-phi3", "generation_config.json", ("eos_token_id",), [0.5], "generation_config.json: eos_token_id must be"),
    ("tiny-gpt-neo", "config.json", ("architectures",), 1, "config.json: architectures must be a list of class names"),
    ("tiny-phi3", "tokenizer_config.json", ("bos_token",), [1], "bos_token must be a text"),
    ("tiny-phi3", "tokenizer_config.json", ("chat_template",), {"a": 1}, "tokenizer_config.json: chat_template must be a text"),
    ("tiny-fuyu", "config.json", ("text_config",), 2, "config.json: text_config must be an object"),
    ("tiny-gpt-neo", "tokenizer.json", ("model", "vocab", "a"), -1, "ids of the vocabulary must be whole numbers"),
    ("tiny-gpt-neo", "tokenizer.json", ("model", "vocab", "a"), 5, "each of one token"),
])  # fmt: skip
def test_what_was_found_is_refused(tmp_path, name, file, path, value, message):
    folder = folders.damaged(tmp_path, name, file, path, value)
    with pytest.raises((ValueError, OSError), match=message):
        folders.use(folder)


def test_architectures_name_documented_classes_only(tmp_path):
    """["torch"] found the module's own import."""
    for name in ("torch", "nn", "PreTrainedModel", "GPTNeoConfig", "attention"):
        assert (
            folders.outcome(
                folders.damaged(tmp_path, "tiny-gpt-neo", "config.json", ("architectures",), [name])
            )
            == "answered"
        )


def test_any_text_has_the_ids_of_the_fast_tokenizer():
    """Runs were cut otherwise where scores tie; that of a unigram tokenizer.json are parsed inexactly there."""
    counts, failures = strings.run(1, cases=40_000)
    assert not failures, "\n".join(failures)
    assert min(counts.values()) > 1000


@pytest.mark.parametrize(("name", "text"), [
    ("phi-3-mini-4k", "=" * 35), ("persimmon-synthetic", "4" * 16), ("tiny-fuyu", "774556446161"), ("tiny-fuyu", "\u026d729...21212121212"),
    ("tiny-fuyu", "\t5696666666666666666666666666"), ("tiny-persimmon", "\u0378<unk>\u0378"),
])  # fmt: skip
def test_strings_that_differed_once(name, text):
    if name not in strings.vocabularies():
        pytest.skip("DECODERS_TEST_DATA is not set: no real vocabularies to test on")
    ours, fast = strings.vocabularies()[name]
    assert ours.encode(text, False) == fast(text)


@pytest.mark.parametrize(
    ("kind", "cases", "answered"),
    [("chat", 1000, 200), ("masks", 150, 40), ("pages", 6, 6), ("kits", 60, 5), ("environments", 2, 2)],
)
def test_what_people_do_is_answered_or_refused_in_a_sentence(kind, cases, answered):
    counts, failures = uses.run(kind, 2, cases)
    assert not failures, "\n".join(failures)
    assert counts["answered"] >= answered and sum(counts.values()) == cases


@pytest.mark.parametrize(
    ("kind", "cases", "answered"),
    [("hf forward", 400, 200), ("hf generate", 300, 120), ("hf tokenizers", 600, 300)],
)
def test_documented_calls_agree_or_are_refused_in_a_sentence(kind, cases, answered):
    """Tensors where one value is wanted, positions and labels that are none, rows half of pairs, and int32 ids with
    banned tokens, ended in PyTorch's own errors."""
    counts, failures = uses.run(kind, 2, cases, kinds=calls.KINDS)
    assert not failures, "\n".join(failures)
    assert counts["answered"] >= answered and counts["refused"] > 50


@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no C compiler")
def test_a_damaged_cache_folder_never_ends_a_process_nor_changes_a_number():
    """A pipe left under the name of the new file was waited for."""
    counts, failures = uses.run("cache folder", 2, 400, kinds=calls.KINDS)
    assert not failures, "\n".join(failures)
    assert counts["answered"] > 80 and counts["refused"] > 80


def test_fuzzers_leave_no_folders_behind(tmp_path):
    """Sound checkpoints stayed in the folder of temporary files."""
    code = "from tests.fuzz import damage, uses; damage.run(3, cases=3); uses.run('kits', 3, cases=1); uses.run('chat', 3, cases=1)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert not [file for file in tmp_path.iterdir() if "cache" not in file.name]


def test_a_found_string_is_shrunk():
    assert strings.shrunk("abcxdefyghi", lambda text: "x" in text and "y" in text) == "xy"


@pytest.mark.proof
@pytest.mark.parametrize("seed", [1])
def test_damaged_bytes_are_answered_or_refused_in_a_sentence(seed):
    """Weights in five layouts, quantised ones and GGUF, what stands inside an archive, vocabularies, configs; cut, swapped, flipped."""
    counts, failures = damage.run(seed, cases=1500)
    assert not failures, "\n".join(failures)
    assert counts["answered"] > 100 and counts["refused"] > 500


@pytest.mark.parametrize(("name", "layout", "edits"), [
    ("tiny-phi3", "safetensors", [("config.json", 773, 1, b"r")]),  # pad_token_id misspelt: the default has no row
    ("tiny-fuyu", "pickle in shards", [("pytorch_model-00001-of-00002.bin", 1287, 1, b"")]),  # "[Errno 22] Invalid argument"
    ("tiny-persimmon", "pickle", [("tokenizer.model", 6954, 1, b"\n")]),  # in two lines
    ("tiny-openai-gpt", "safetensors", [("merges.txt", 0, 4917, b'{"<unk>": 0, ' + b'"a": 1, ' * 1000 + b"}")]),  # all of it was shown
])  # fmt: skip
def test_damage_that_was_not_said_well(tmp_path, name, layout, edits):
    assert damage.outcome(damage.damaged(tmp_path, name, layout, edits)) == "refused"


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.proof) for n in (250, 500, 750))])
def test_any_documented_settings_agree_with_themselves_and_transformers(first):
    """Contrastive search in chunks, penalties with padded embeddings, guidance over a switch of frequencies, negative
    ids, sampled beams without stop ids, and NaN, were met."""
    pytest.importorskip("transformers")
    counts, failures = settings.run_cases(250, 5, first)
    assert not failures, "\n".join(failures)
    assert counts["answered"] > 200 and counts["rounded"] < 5

"""A save is one switch: killed, watched, doubled or failing writers leave a whole checkpoint."""

import json
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from decoders import tokenize, weights
from decoders.formats import switch
from tests.conftest import ROOT
from tests.fuzz import saves

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@needs_fork
def test_killed_writers_and_readers_beside_writers(tmp_path):
    """After a kill it was 23 of 100 folders that could not be loaded, and half of the reads beside a writer mixed two
    models. In a process of its own, since it forks; `python -m tests.fuzz.saves` does this a thousand times."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.saves",
        str(tmp_path / "folder"),
        "--kills",
        "40",
        "--reads",
        "40",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    old, new = map(int, re.search(r"held {1: (\d+), 2: (\d+)}", found.stdout).groups())
    assert old + new == 40 and old and new, "both the old and the new were met"
    assert all(int(whole) for whole in re.findall(r"refused\) \((\d+)", found.stdout)), found.stdout


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 30))
def test_whoever_comes_next_ends_what_was_decided(tmp_path, monkeypatch, moment):
    """A writer that dies at each of its renames in turn, its cleaning up included."""
    folder = tmp_path / "folder"
    weights.save(saves.model_of(1), folder, max_shard_bytes=2_000)
    count = 0

    def counted(plain):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count >= moment:
                raise Killed
            return plain(*args, **options)

        return call

    for module, name in (
        (switch.os, "replace"),
        (switch.os, "unlink"),
        (switch.Path, "rename"),
        (switch.shutil, "rmtree"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    with suppress(Killed):
        weights.save(saves.model_of(2), folder)
    monkeypatch.undo()
    assert saves.kind_of(folder) == (1 if moment == 1 else 2)
    assert not list(folder.glob(".saved-*"))
    weights.save(saves.model_of(1), folder)
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")], ids=str
)
@pytest.mark.parametrize("place", ["write_text", "mkdtemp", "fsync", "rename"])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, error, place):
    folder = tmp_path / "folder"
    weights.save(saves.model_of(1), folder)
    before = sorted(file.name for file in folder.iterdir())

    def fail(*args, **options):
        raise error

    module = {
        "write_text": switch.Path,
        "mkdtemp": switch.tempfile,
        "fsync": switch.os,
        "rename": switch.Path,
    }[place]
    monkeypatch.setattr(module, place, fail)
    with pytest.raises(OSError, match=f"{folder}.*{error.strerror}"):
        weights.save(saves.model_of(2), folder)
    monkeypatch.undo()
    assert saves.kind_of(folder) == 1 and sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize("place", ["write_text", "mkdtemp", "fsync", "rename"])
def test_a_save_that_fails_leaves_no_folder_that_was_not_there(tmp_path, monkeypatch, place):
    """It left empty ones. What somebody else puts there meanwhile stays."""

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    module = {"mkdtemp": switch.tempfile, "fsync": switch.os}.get(place, switch.Path)
    monkeypatch.setattr(module, place, fail)
    for folder in (tmp_path / "a" / "b" / "c", tmp_path / "d"):
        with pytest.raises(OSError, match="No space left on device"):
            weights.save(saves.model_of(1), folder)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(Killed), switch.switched(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").write_bytes(b"mine")
        raise Killed
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["mine"]


def test_what_belongs_to_the_old_model_goes_with_it(tmp_path):
    weights.save(saves.model_of(1), tmp_path, max_shard_bytes=2_000)
    (tmp_path / "README.md").write_text("stays")
    model = saves.model_of(2)
    model.generation_config = {}
    weights.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_tokenizer_may_be_saved_over_itself(tmp_path):
    source = ROOT / "checkpoints" / "tiny-gpt-neo"
    tokenizer = tokenize.load(source)
    tokenizer.save(tmp_path)
    tokenizer = tokenize.load(tmp_path)
    tokenizer.add_special_tokens(["<|extra|>"])
    tokenizer.save(tmp_path)
    again = tokenize.load(tmp_path)
    assert again.encode("a<|extra|>") == tokenizer.encode("a<|extra|>") and len(again) == len(tokenizer)
    assert "<|extra|>" in json.dumps(json.loads((tmp_path / "tokenizer.json").read_text()))
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_folder_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """Config of one save, weights of the next: read once more, and then said."""
    weights.save(saves.model_of(1), tmp_path)
    plain, times = weights.tensors, []

    def disturbed(folder, adapter=None, always=False):
        times.append(1)
        if always or len(times) == 1:
            weights.save(saves.model_of(2 if len(times) % 2 else 1), tmp_path)
        return plain(folder, adapter)

    monkeypatch.setattr(weights, "tensors", disturbed)
    assert saves.kind_of(tmp_path) == 2 and len(times) == 2
    monkeypatch.setattr(weights, "tensors", lambda folder, adapter: disturbed(folder, adapter, always=True))
    with pytest.raises(ValueError, match="is being written: load it again"):
        saves.kind_of(tmp_path)


def test_a_tokenizer_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    tokenizer = tokenize.load(ROOT / "checkpoints" / "tiny-gpt-neo")
    tokenizer.save(tmp_path)
    plain, times = tokenize.read_files, []

    def disturbed(folder):
        times.append(1)
        files = plain(folder)
        if len(times) == 1:  # between this file and the next somebody saves
            other = tokenize.load(ROOT / "checkpoints" / "tiny-gpt-neo")
            other.add_special_tokens(["<|extra|>"])
            other.save(tmp_path)
        return files

    monkeypatch.setattr(tokenize, "read_files", disturbed)
    assert tokenize.load(tmp_path).token_id("<|extra|>") == len(tokenizer) and len(times) >= 3


def test_a_log_beside_the_weights_is_not_a_save(tmp_path, monkeypatch):
    weights.save(saves.model_of(1), tmp_path)
    plain = weights.tensors

    def logged(folder, adapter):
        (tmp_path / "train.log").open("a").write("step\n")
        return plain(folder, adapter)

    monkeypatch.setattr(weights, "tensors", logged)
    assert saves.kind_of(tmp_path) == 1


@pytest.mark.parametrize(
    "names",
    [
        '["../precious"]',
        '["sub/precious"]',
        '[".."]',
        '[""]',
        "[1]",
        '{"a": 1}',
        "[",
        "[" * 10**5,
        '["a\\u0000"]',
    ],
)
def test_a_strangers_folder_cannot_name_files_elsewhere(tmp_path, names):
    """`.saved-...` may come with a download: what its list names outside of the folder stays."""
    folder = tmp_path / "folder"
    weights.save(saves.model_of(1), folder)
    (folder / "sub").mkdir()
    precious = (tmp_path / "precious", folder / "sub" / "precious")
    for file in precious:
        file.write_text("mine")
    (folder / ".saved-x").mkdir()
    (folder / ".saved-x" / switch.STALE).write_text(names)
    with pytest.raises(
        ValueError, match=r"\.saved-x/\.stale\.json is not a list of file names: no save wrote it, remove"
    ):
        saves.kind_of(folder)
    assert all(file.read_text() == "mine" for file in precious)


def test_a_strangers_folder_cannot_take_files_from_elsewhere(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    weights.save(saves.model_of(1), folder)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (folder / ".saved-x").symlink_to(elsewhere)
    assert saves.kind_of(folder) == 1 and (elsewhere / "precious").read_text() == "mine"
    (folder / ".saved-y").mkdir()
    (folder / ".saved-y" / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"\.saved-y/config\.json is not a file: no save wrote it"):
        saves.kind_of(folder)

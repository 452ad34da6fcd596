"""What is written is written whole or not at all, with the permissions and through the links that a user expects."""

import os
import signal
import stat
import threading

import pytest

from decoders import compare, weights
from decoders.formats import check_writable, write_file
from tests.families import GPT_NEO
from tests.fuzz import saves

resource = pytest.importorskip("resource")


@pytest.fixture
def umask():
    """Nobody but the owner."""
    old = os.umask(0o077)
    yield
    os.umask(old)


@pytest.fixture
def small_disk():
    """No file may have more than 2,000 bytes: what a full disk answers to a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)


def mode(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask):
    """A page was readable for all, and a kit for the owner alone, whatever the umask."""
    assert mode(write_file(tmp_path / "page.html", "x")) == 0o600
    os.umask(0o022)
    assert mode(write_file(tmp_path / "other.html", "x")) == 0o644
    weights.save(GPT_NEO.model(), tmp_path / "model")
    compare.make(tmp_path / "kit", "gpt_neo", cases=["plain"])
    files = [file for folder in ("model", "kit") for file in (tmp_path / folder).rglob("*") if file.is_file()]
    assert len(files) > 4 and {mode(file) for file in files} == {0o644}


def test_an_old_file_keeps_its_permissions_and_links_are_followed(tmp_path):
    file, link = tmp_path / "page.html", tmp_path / "link.html"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    before = file.stat().st_ino
    assert write_file(link, "new") == link
    assert link.is_symlink() and file.read_text() == "new" and mode(file) == 0o640
    assert file.stat().st_ino != before, "replaced at once, not written into"
    (tmp_path / "dangling").symlink_to(tmp_path / "there")
    write_file(tmp_path / "dangling", b"bytes")
    assert (tmp_path / "there").read_bytes() == b"bytes"


def test_pipes_and_devices_are_written_into(tmp_path):
    """`look -o` replaced whatever stood there: as root a device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_file(pipe, "through a pipe")
    reader.join(60)
    assert read == ["through a pipe"] and stat.S_ISFIFO(pipe.stat().st_mode)
    write_file("/dev/null", "nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_device_is_a_sentence():
    with pytest.raises(OSError, match="^.*/dev/full cannot be written: No space left on device$"):
        write_file("/dev/full", "x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize(
    "check", [check_writable, lambda file: write_file(file, "x")], ids=["before", "then"]
)
def test_folders_are_refused(tmp_path, check):
    with pytest.raises(OSError, match="cannot be written: it is a folder"):
        check(tmp_path)
    with pytest.raises(OSError, match="cannot be written: "):
        check(tmp_path / "none" / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, small_disk):
    file = tmp_path / "page.html"
    file.write_text("old")
    for content in ("x" * 5000, lambda stream: stream.write(b"x" * 5000)):
        with pytest.raises(OSError, match="page.html cannot be written: File too large"):
            write_file(file, content)
    assert file.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_a_full_disk_leaves_the_old_model(tmp_path, request):
    """It was the library's own error with a traceback, and status 1 of `compare --make`."""
    folder = tmp_path / "folder"
    weights.save(saves.model_of(1), folder)
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match="folder cannot be written: File too large"):
        weights.save(saves.model_of(2), folder)
    assert saves.kind_of(folder) == 1 and not [file for file in folder.iterdir() if file.name[0] == "."]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "page.html", interrupted)
    assert not list(tmp_path.iterdir())


def test_a_save_does_not_replace_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="config.json is no regular file: it is not replaced"):
        weights.save(saves.model_of(1), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]

"""The compiled library: made once, kept whole, loaded only if it is this user's own, waited for by nobody."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from decoders import kernels
from decoders.kernels import build, native
from tests.families import FAMILIES, inputs

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="there is no C compiler")
cannot_run_here = pytest.mark.skipif(
    native.target_for(native.processor_flags())[0] is None, reason="kernels.c cannot run here"
)
SMALL = "int seven(void) { return 7; }\n"


@pytest.fixture
def source(monkeypatch, tmp_path):
    """A source that compiles in no time."""
    monkeypatch.setattr(build, "SOURCE", tmp_path / "small.c")
    build.SOURCE.write_text(SMALL)
    return build.SOURCE


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DECODERS_NATIVE", raising=False)
    monkeypatch.setattr(native, "STATE", native.State())
    yield tmp_path / "home" / "decoders"
    if native.STATE.builder:
        native.STATE.builder.kill()


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def seven(library: Path) -> int:
    return build.load(library).seven()


# ---- Made --------------------------------------------------------------------------------------------------


def test_of_eight_processes_one_compiles(source, folder, tmp_path):
    log = tmp_path / "log"
    compiler = script(tmp_path / "cc", f'echo "$@" >> {log}\nexec gcc "$@"')
    library = folder / "k.so"
    builders = [build.start(compiler, library, []) for _ in range(8)]
    assert [builder.wait() for builder in builders] == [0] * 8
    assert len(log.read_text().splitlines()) == 2  # compiled and linked
    assert seven(library) == 7 and set(os.listdir(folder)) == {"k.so", "k.so.sha256"}


def test_a_killed_compiler_leaves_nothing_and_the_next_one_goes_on(source, folder, tmp_path):
    started = tmp_path / "started"
    hanging = script(
        tmp_path / "cc", f"echo $$ > {started}.new && mv {started}.new {started}\nexec sleep 1000"
    )
    builder = build.start(hanging, folder / "k.so", [])
    until(started.exists)
    waiting = build.start("gcc", folder / "k.so", [])
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert waiting.wait() == 0 and seven(folder / "k.so") == 7
    assert set(os.listdir(folder)) == {"k.so", "k.so.sha256"}


def test_a_source_that_is_refused_leaves_nothing(source, folder):
    source.write_text("int wrong")
    assert build.start("gcc", folder / "k.so", []).wait() != 0 and not os.listdir(folder)


# ---- Read --------------------------------------------------------------------------------------------------


def damaged(content: bytes) -> list[bytes]:
    """Cut short at every size of a page and near the end, one byte changed, zeros at the end."""
    cuts = [content[:n] for n in (0, 1, *range(4096, len(content), 4096), len(content) - 1)]
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    return [*cuts, bytes(changed), content[:-2048] + bytes(2048)]


def test_a_library_that_is_not_whole_is_made_anew(source, folder):
    """A power loss leaves a file of the right name that is cut short: loading it ends the process."""
    library = folder / "k.so"
    build.build("gcc", source, library, [])
    content = library.read_bytes()
    for wrong in damaged(content):
        library.unlink()
        library.write_bytes(wrong)
        library.chmod(0o600)
        assert build.load(library) is None
    for lost in (library, build.checksum_path(library)):
        lost.unlink()
        assert build.load(library) is None
        build.build("gcc", source, library, [])
        assert seven(library) == 7


def test_nothing_is_loaded_that_somebody_else_could_have_written(source, folder, monkeypatch):
    library = folder / "k.so"
    build.build("gcc", source, library, [])
    for path in (library, build.checksum_path(library)):
        for mode in (0o620, 0o602):
            path.chmod(mode)
            assert build.load(library) is None
        path.chmod(0o600)
        moved = path.rename(folder / "elsewhere")
        path.symlink_to(moved)
        assert build.load(library) is None
        moved.rename(path)
    assert seven(library) == 7
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert build.load(library) is None


def test_a_cache_folder_that_others_can_write_to_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = build.cache_folder()
    assert folder == tmp_path / "decoders" and folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o702, 0o777):
        folder.chmod(mode)
        assert build.cache_folder() is None
    folder.chmod(0o755)
    assert build.cache_folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert build.cache_folder() is None


def test_another_compiler_source_or_processor_has_another_name(source, tmp_path):
    cc = [script(tmp_path / f"cc{n}", "exit 0") for n in range(2)]
    given = [
        (cc[0], ["-O3"], {"a"}),
        (cc[1], ["-O3"], {"a"}),
        (cc[0], ["-O2"], {"a"}),
        (cc[0], ["-O3"], {"b"}),
    ]
    names = {build.library_path(tmp_path, *one) for one in given}
    source.write_text(SMALL + "\n")
    assert len(names | {build.library_path(tmp_path, *given[0])}) == 5


# ---- Taken into use ----------------------------------------------------------------------------------------


@cannot_run_here
def test_a_compiler_that_hangs_is_waited_for_by_nobody(fresh, monkeypatch, tmp_path):
    """A text is written with PyTorch's operators meanwhile, and the terminal is told once."""
    started = tmp_path / "started"
    hanging = script(
        tmp_path / "cc", f"echo $$ > {started}.new && mv {started}.new {started}\nexec sleep 1000"
    )
    monkeypatch.setattr(shutil, "which", lambda name: hanging)
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", shown)
    model, (ids, _) = kernels.prepare(FAMILIES[0].model()), inputs(101)
    expected = FAMILIES[0].model().generate(ids, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(model.generate(ids, max_new_tokens=5, eos_token_id=None), expected)
    until(started.exists)
    compiler = int(started.read_text())
    os.kill(compiler, 0)  # it is still there
    assert native.library() is None and native.is_pending() and kernels.status() == "being compiled"
    assert native.wait(0.01) is False
    assert len(shown.getvalue().splitlines()) == 1 and "in the background" in shown.getvalue()
    os.kill(compiler, signal.SIGKILL)
    assert native.wait() is False and "does not compile" in kernels.status()


def test_why_the_kernels_are_not_in_use_is_said(fresh, monkeypatch, tmp_path):
    reasons, least = [], build.targets_here()[-1]
    for name, value in (
        ("processor_flags", lambda: set()),
        ("processor_flags", lambda: set(build.targets_here()[0].needed)),
    ):
        monkeypatch.setattr(native, "STATE", native.State())
        monkeypatch.setattr(native, name, value)
        monkeypatch.setattr(shutil, "which", lambda name: None)
        reasons.append(kernels.status())
    monkeypatch.setattr(native, "STATE", native.State())
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    reasons.append(kernels.status())
    monkeypatch.setattr(native, "STATE", native.State())
    monkeypatch.setenv("DECODERS_NATIVE", "0")
    reasons.append(kernels.status())
    assert reasons == [
        f"not in use: the processor has no {min(least.needed)}",
        "not in use: there is no C compiler",
        f"not in use: this PyTorch has no libgomp in {tmp_path / 'torch' / 'lib'}",
        "not in use: DECODERS_NATIVE=0",
    ]


@cannot_run_here
def test_a_library_that_is_wrong_or_cannot_be_made_is_not_used(fresh, monkeypatch, tmp_path):
    """Whole and with its checksum, but of another source: a number or a function is wrong."""
    folder = build.SOURCE.parent
    source, products = (
        build.SOURCE.read_text(),
        (folder / "kernels.c").read_text(),
    )  # which the source includes
    texts = {
        "does not compile": ("int wrong", products),
        "lacks a function": ("void product(void) {}", products),
        "wrong numbers": (source, products.replace("setzero_ps()", "set1_ps(1.f)")),
    }
    monkeypatch.setattr(build, "SOURCE", tmp_path / build.SOURCE.name)
    for reason, (text, other) in texts.items():
        for included in folder.glob("*.[ch]"):
            shutil.copy(included, tmp_path)
        (tmp_path / "kernels.c").write_text(other)
        build.SOURCE.write_text(text)
        monkeypatch.setattr(native, "STATE", native.State())
        assert native.wait() is False and native.library() is None
        assert reason in kernels.status()


def test_a_text_ends_with_the_operators_that_it_began_with(family, monkeypatch):
    """The library comes into use in the middle of a text: the next text has it, this one has not."""
    if not native.wait():
        pytest.skip(f"the kernels are {native.status()}")
    model, (ids, _) = kernels.prepare(family.model()), inputs(101)
    whole, state, library = family.model()(ids).logits, native.STATE, native.library()
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    used = []
    layers[0].register_forward_pre_hook(lambda layer, args: used.append(native.library()))
    pending = native.State()
    pending.status, pending.builder = "being compiled", subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    monkeypatch.setattr(native, "STATE", pending)
    with torch.no_grad():
        output = model(ids[:, :9], use_cache=True)
        monkeypatch.setattr(native, "STATE", state)
        for n in range(9, 12):
            output = model(ids[:, n : n + 1], past_key_values=output.past_key_values, use_cache=True)
            torch.testing.assert_close(output.logits[:, -1], whole[:, n], atol=2e-5, rtol=2e-5)
        model(ids[:, :9], use_cache=True)
    assert used == [None] * 4 + [library]
    pending.builder.communicate()


def test_the_checksum_is_that_of_the_library(source, folder):
    build.build("gcc", source, folder / "k.so", [])
    stored = (folder / "k.so.sha256").read_text()
    assert stored == hashlib.sha256((folder / "k.so").read_bytes()).hexdigest()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert subprocess.run(["sha256sum", folder / "k.so"], capture_output=True, text=True).stdout.startswith(
        stored
    )

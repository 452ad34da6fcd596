"""A wheel that was built where a C compiler is holds the compiled kernels; any other holds Python alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from decoders.kernels import build, native
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(not shutil.which("gcc"), reason="there is no C compiler"),
]


def wheel(tmp_path: Path, **environment: str) -> Path:
    """Built from a copy of the package, so that nothing is written beside the sources."""
    source, made = tmp_path / "source", tmp_path / "made"
    shutil.copytree(
        ROOT / "decoders", source / "decoders", ignore=shutil.ignore_patterns("__pycache__", "built")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", made, source]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = made.glob("*.whl")
    return path


def libraries(path: Path) -> list[str]:
    return sorted(
        name.rpartition("/")[2] for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")
    )


def test_without_a_compiler_the_wheel_is_for_every_machine(tmp_path):
    for environment in ({"DECODERS_NATIVE": "0"}, {"PATH": str(tmp_path)}):
        path = wheel(tmp_path / next(iter(environment)), **environment)
        assert path.name.endswith("-py3-none-any.whl") and not libraries(path)


def test_the_source_is_compiled_once_for_a_wheel_and_never_for_an_editable_install(tmp_path):
    calls, compiler = tmp_path / "calls", tmp_path / "bin" / "gcc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {shutil.which("gcc")} "$@"\n')
    compiler.chmod(0o755)
    path = f"{compiler.parent}{os.pathsep}{os.environ['PATH']}"
    wheel(tmp_path / "wheel", PATH=path)
    compiled = [line for line in calls.read_text().splitlines() if " -c " in f" {line} "]
    assert len(compiled) == len(build.targets_here())
    calls.unlink()
    code = (
        "from setuptools.build_meta import *; prepare_metadata_for_build_editable('.'); build_editable('.')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": path}, cwd=tmp_path / "wheel" / "source", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not calls.exists(), done.stderr


def test_a_fresh_process_of_an_installed_wheel_compiles_nothing(tmp_path):
    """The library is loaded only with its checksum, and into the source that it was made of."""
    if native.target_for(native.processor_flags())[0] is None:
        pytest.skip("kernels.c cannot run here")
    path, target = wheel(tmp_path), tmp_path / "installed"
    assert path.name.rpartition("-")[2] != "any.whl"
    assert libraries(path) == sorted(build.packaged_path(t).name for t in build.targets_here())
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, path]
    subprocess.run(install, check=True, capture_output=True)
    cache, compiler = tmp_path / "cache", tmp_path / "gcc"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    compiler.chmod(0o755)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "DECODERS_NATIVE"},
        "PYTHONPATH": str(target),
        "XDG_CACHE_HOME": str(cache),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }

    def generated() -> str:
        command = [sys.executable, "-m", "decoders", "generate", str(ROOT / "checkpoints" / "tiny-phi3")]
        done = subprocess.run(
            [*command, "Once upon", "--max-new-tokens", "4"],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    best = native.target_for(native.processor_flags())[0].name
    assert f"{best} kernels" in generated() and not (tmp_path / "called").exists() and not cache.exists()
    installed = next(iter(target.glob(f"decoders/kernels/built/{best}-*.so")))
    content = installed.read_bytes()
    installed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # not what was built
    assert "PyTorch's operators" in generated() and (tmp_path / "called").exists()
    installed.write_bytes(content)
    (target / "decoders" / "kernels" / "plan.c").open("a").write("\n")  # of another source
    assert "PyTorch's operators" in generated()

"""Puts the compiled kernels into a wheel, where Linux and a C compiler are; else it holds Python alone.

python -m build --wheel                       # or pip wheel
DECODERS_NATIVE=0 python -m build --wheel     # Python alone, for every machine

Everything else about the distribution stands in pyproject.toml.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
from functools import cache
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


@cache
def libraries() -> dict[str, bytes]:
    """Name -> image of the library, for each kind of instructions that the compiler knows."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux" or os.environ.get("DECODERS_NATIVE") == "0":
        return {}
    images = {}
    path = Path(__file__).parent / "decoders" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("build_kernels", path)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)  # the standard library alone: nothing of ours is imported
    for target in build.targets_here():
        try:
            images[build.packaged_path(target).name] = build.compiled(compiler, build.SOURCE, target.flags)
        except Exception as error:  # whatever it is: Python alone works too
            print(f"without kernels for {target.name}: {error}", file=sys.stderr)
    return images


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # there they are compiled at the first need
            return
        folder = Path(self.build_lib) / "decoders" / "kernels" / "built"
        for name, image in libraries().items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(image)
            (folder / f"{name}.sha256").write_text(hashlib.sha256(image).hexdigest())


class BuildWheel(bdist_wheel):
    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not libraries()  # what build_py has put in
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Of any Python 3: the library is called by ctypes."""
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildPython, "bdist_wheel": BuildWheel})

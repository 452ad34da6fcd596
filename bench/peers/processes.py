"""An engine's process: in its environment, with the package of this tree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.peers.engines import ENGINES
from bench.peers.folders import MAKERS

ROOT = Path(__file__).parents[2]


def python_of(engine: str) -> Path | None:
    """The interpreter of an engine's environment, ours for none; None where it is not installed."""
    peers, environment = Path(os.environ.get("DECODERS_PEERS", ROOT / ".peers")), ENGINES[engine].environment
    own = peers / environment / "bin" / "python" if environment else Path(sys.executable)
    return own if own.exists() else None


def command(engine: str, folder: Path, threads: int, *options: str) -> list[Any]:
    _, kind, bits = ENGINES[engine]
    words = [python_of(engine), "-m", "bench.peers.child", kind, folder, bits]
    return [*words, "--threads", str(threads), *options]


def variables(threads: int, **own: str) -> dict[str, str]:
    """The environment variables of an engine's process."""
    common = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **common, **own}


def run(engine: str, folder: Path, threads: int, *options: str, limit: float) -> str | None:
    """What the engine's process prints; None where it fails or takes longer than `limit`, which is said."""
    try:
        done = subprocess.run(
            command(engine, folder, threads, *options),
            capture_output=True,
            text=True,
            env=variables(threads),
            cwd=ROOT,
            timeout=limit,
        )
        problem = (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"not done after {limit:.0f} s"
    if problem:
        print(f"{engine} failed: {problem}", file=sys.stderr, flush=True)
        return None
    return done.stdout


def convert(engine: str, folder: Path, threads: int, limit: float) -> bool:
    """Make the engine's files, if it has not been done; whether they are there."""
    _, kind, bits = ENGINES[engine]
    stamp = folder / f"{kind}-{bits}.made"
    if kind in MAKERS and not stamp.exists():
        if run(engine, folder, threads, "--convert", limit=limit) is None:
            return False
        stamp.touch()
    return True


class Served:
    """A process that holds an engine, and writes a text when it is asked to."""

    def __init__(self, engine: str, folder: Path, threads: int, **own: str):
        self.process = subprocess.Popen(
            command(engine, folder, threads, "--serve"),
            env=variables(threads, **own),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        self.is_ready = self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def write_a_text(self) -> dict[str, float]:
        """Tokens a second of reading a prompt and of writing."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        return json.loads(self.line())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

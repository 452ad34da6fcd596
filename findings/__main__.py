"""Runs every script of this folder and prints a table: what still holds.

    python -m findings                # all, one after the other; some minutes each, most of it installing
    python -m findings NAME ...       # some of them
    python -m findings --write        # docs/findings.md from the headers, without running anything

Exit status 1 if anything has changed.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "findings.md"
FIELDS = ("Versions", "Expected", "Happens", "Hurt", "Seen")
INTRODUCTION = """# Findings: what nobody would guess

Surprises of real libraries where these six models meet them. Each is a script in `findings/` that installs
pinned public packages into a temporary folder and shows the behaviour without this project. `make findings`
runs them all and says which no longer hold. `python -m findings --write` makes this page from their headers.
"""


def header(script: Path) -> dict[str, str]:
    """The title and the fields of a script's comment, each as one line. ValueError where one is missing."""
    lines = [line[1:].strip() for line in script.read_text().split("set -euo")[0].splitlines()[1:]]
    text = " ".join(lines[1:])
    parts = re.split(rf"({'|'.join(FIELDS)}): ", text)
    found = {"Title": lines[0], **dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))}
    if missing := [name for name in FIELDS if name not in found]:
        raise ValueError(f"{script}: the header lacks {', '.join(missing)}")
    return found


def scripts(names: list[str]) -> list[Path]:
    """Those that are asked for, or all. ValueError for an unknown name."""
    known = {script.stem: script for script in sorted(FOLDER.glob("*.sh"))}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no finding is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def page() -> str:
    """docs/findings.md."""
    rows = [(script, header(script)) for script in scripts([])]
    lines = [INTRODUCTION, "| what happens | versions | who is hurt |", "|---|---|---|"]
    lines += [f"| [{h['Title']}](#{s.stem}) | {h['Versions']} | {h['Hurt']} |" for s, h in rows]
    for script, h in rows:
        lines += ["", f'<a id="{script.stem}"></a>', f"## {h['Title']}", ""]
        lines += [f"[`findings/{script.name}`](../findings/{script.name}) · {h['Versions']}", ""]
        lines += [f"**{name}.** {h[name]}" + ("" if name == "Seen" else "\n") for name in FIELDS[1:]]
    return "\n".join(lines) + "\n"


def run(script: Path) -> tuple[bool, str]:
    """Whether it still holds, and the last line that the script printed."""
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    printed = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, printed[-1] if printed else f"status {done.returncode}"


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        PAGE.write_text(page())
        return 0
    try:
        chosen = scripts(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| finding | holds | it says |\n|---|---|---|")
    results = []
    for script in chosen:
        holds, line = run(script)
        results.append(holds)
        print(f"| {script.stem} | {'yes' if holds else 'no'} | {line} |", flush=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Who agrees with whom: every version of Transformers at hand against kits, in every setting that has trapped one.

    DECODERS_REFERENCES=python-of-4.37.2:python-of-4.50.3 python -m tests.versions --write

writes docs/versions.md. Each version runs `compare KIT transformers` itself, in its own Python.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from decoders.tools import kit

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
CHILD = """
import itertools, json, sys, warnings
warnings.filterwarnings("ignore")
import transformers
from decoders.tools import compare, ports
found = {"version": transformers.__version__}
for dtype, case in itertools.product(sys.argv[2].split(","), sys.argv[3].split(",")):
    own = found.setdefault(dtype, {})
    try:
        report = compare.run(sys.argv[1], "transformers", cases=[case], dtype=dtype)
        worst = max((row.units for row in report.rows if row.mark == "="), default=0.0)
        names = [m.name for finding in report.findings for m in finding.mistakes]
        own[case] = {"equal": report.equal, "worst": worst, "first": report.first and report.first.stage,
                     "units": min(report.first.units, 1e30) if report.first else 0, "names": names}
    except (ValueError, ports.PortError) as error:
        own[case] = {"error": str(error).strip().splitlines()[-1]}
print(json.dumps(found))
"""
DTYPES = ("float32", "bfloat16", "float16")
SETTINGS = {  # family -> what is set -> fields of config.json
    "gpt_neo": {"": {}},
    "openai-gpt": {"": {}},
    "phi": {"": {}, "qk_layernorm": {"qk_layernorm": True},
            "linear scaling": {"rope_scaling": {"type": "linear", "factor": 3.0}},
            "dynamic scaling": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 11}},
    "phi3": {"": {}, "no window, tied": {"sliding_window": None, "tie_word_embeddings": True}},
    "persimmon": {"": {}, "no rope_theta": {"rope_theta": None},
                  "dynamic scaling": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 11}},
    "fuyu": {"": {}, "no rope_theta": {"rope_theta": None}},
}  # fmt: skip
DECIDED = {  # what a cell begins with -> why ours is as it is
    "rotary: base 10000": "25000: what the checkpoints were trained with; 5.23's default is another, and the hub's "
                          "config of Fuyu does not say",
    "IndexError: index 1905": "4.37.2 makes its tables as long as the text, and cannot look up a position behind it",
    "RuntimeError: Given normalized_shape": "norm over each head, as 4.50 and 5; 4.37.2 applies it to all heads at "
                                            "once and fails",
    "no past_key_values": "no version of GPT-1 there has a cache; ours equals the whole pass",
    "has no Phi3ForCausalLM": "Phi-3 came with 4.41",
}


def ask(python: str, folder: Path, cases: list[str]) -> dict:
    """What one version says of one kit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    result = subprocess.run([python, "-c", CHILD, str(folder), ",".join(DTYPES), ",".join(cases)], capture_output=True, text=True,
                            env=environment, cwd=tempfile.gettempdir())  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{python}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def cell(answer: dict) -> str:
    if "error" in answer:
        return answer["error"].rpartition(": the port takes ")[2] if "could run no case" in answer["error"] else answer["error"]
    if answer["equal"]:
        return f"= {answer['worst']:.1f}x"
    named = " and ".join(answer["names"]) or "no known mistake"
    return f"{answer['first']} {answer['units']:.1e}x: {named}"


def rows(pythons: list[str]) -> tuple[list[str], list[tuple]]:
    """(versions, (family, setting, dtype, case, a cell for each version))"""
    versions, found = [], []
    for family, settings in SETTINGS.items():
        for setting, fields in settings.items():
            with tempfile.TemporaryDirectory() as folder:
                own = kit.Kit(kit.make(Path(folder) / "kit", family, fields=fields))
                with ThreadPoolExecutor(2) as pool:
                    answers = list(pool.map(lambda python: ask(python, own.folder, list(own.expected)), pythons))  # noqa: B023
                versions = [answer["version"] for answer in answers]
                found += [(family, setting, dtype, case, [cell(answer[dtype][case]) for answer in answers])
                          for dtype in DTYPES for case in own.expected]
                print(family, setting, file=sys.stderr)
    return versions, found


def page(versions: list[str], found: list[tuple]) -> str:
    """Cases with the same kind of answer from every version stand in one row."""
    lines = [f"| family | setting | precision | cases | {' | '.join(versions)} |", "|" + "---|" * (4 + len(versions))]
    groups: dict[tuple, list] = {}
    for family, setting, dtype, case, cells in found:
        kinds = tuple("=" if c.startswith("=") else re.sub(r".*x: |[\d\[\], ]+$|size.*", "", c) for c in cells)
        groups.setdefault((family, setting, dtype, kinds), []).append((case, cells))
    for (family, setting, dtype, _), members in groups.items():
        cells = [max(column, key=lambda told: (len(told), told)) for column in zip(*(c for _, c in members), strict=True)]
        cases = ", ".join(name for name, _ in members)
        lines.append(f"| {family} | {setting or 'as the kit'} | {dtype} | {cases} | {' | '.join(cells)} |")
    told = sorted({cell for *_, cells in found for cell in cells if not cell.startswith("=")})
    reasons = {reason for cell in told for key, reason in DECIDED.items() if key in cell}
    missing = [cell for cell in told if not any(key in cell for key in DECIDED)]
    lines += ["", "What we decided where they differ:", "", *(f"- {reason}." for reason in sorted(reasons))]
    lines += [f"- not decided: {cell}" for cell in missing]
    return "\n".join(lines) + "\n"


ABOUT = """# Who agrees with whom

Every version of Transformers at hand has run `python -m decoders compare KIT transformers`, for each family, each
setting that has trapped one of them, each precision and each case of the kit. `= 1.3x` is equal, the worst stage 1.3
times as far off as correct arithmetic of that precision is; else the first stage that differs, by how many times the
noise, and the name of the mistake. Made by `python -m tests.versions --write`.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/versions.md")
    args = parser.parse_args()
    others = [python for python in os.environ.get("DECODERS_REFERENCES", "").split(":") if python]
    text = ABOUT + page(*rows([*others, sys.executable]))
    if args.write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()

"""The table of measured differences at the top of README.md.

    python -m tests.proof --write
    DECODERS_REFERENCES=old/bin/python:older/bin/python python -m tests.proof --write     # older versions as well

For every family: the largest difference of any logit from Transformers' (eager attention), over 20 redrawn tiny
models and two texts each, one of them padded on the left. Logits are of size 4.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers

from tests.conftest import ROOT
from tests.families import FAMILIES, Family, inputs
from tests.test_versions import REFERENCES, ask, built, case

BEGIN, END = "<!-- proof: python -m tests.proof --write -->", "<!-- end of proof -->"
RESULTS = Path(__file__).with_name("proof.json")
README = ROOT / "README.md"
UNUSUAL = {
    "gpt_neo": (
        "every second layer has a sliding window of 256 tokens; scores without 1/sqrt(D)",
        "gpt-neo-125m, -1.3B, -2.7B",
    ),
    "phi3": (
        "fused QKV and SwiGLU, grouped-query attention (GQA), sliding window, longrope",
        "Phi-3 mini and medium, 3.5-mini, phi-4, phi-4-mini",
    ),
    "persimmon": ("squared ReLU, norms on q and k, 262,144 tokens", "persimmon-8b-base, -chat"),
    "fuyu": ("Persimmon that sees: picture patches are tokens, and so are coordinates", "fuyu-8b"),
    "phi": (
        "parallel attention and MLP, partial rotary embedding, biases everywhere",
        "phi-1, phi-1.5, phi-2",
    ),
    "openai-gpt": (
        "post-norm, no final norm; a KV cache, which nobody else gives it",
        "openai-gpt",
    ),
}


@torch.no_grad()
def difference(family: Family, dtype: torch.dtype, draws: int = 20) -> float:
    """From the newest Transformers."""
    largest = 0.0
    for seed in range(draws):
        ours, theirs = family.pair(seed=seed, dtype=dtype)
        for padded in (False, True):
            ids, mask = inputs(101, padded, seed)
            a, b = (model(ids, attention_mask=mask).logits.double() for model in (ours, theirs))
            if dtype == torch.float64 and padded and b.isnan().any():  # said below the table
                assert a.isfinite().all()
                continue
            largest = max(largest, (a - b)[mask.bool()].abs().max().item())
    return largest


@torch.no_grad()
def older(family: Family, python: str, draws: int = 20) -> tuple[str, float | None]:
    """(version, difference in float32) from another Transformers; None if it does not have the family."""
    models, cases, largest = [], [], 0.0
    for seed in range(draws):
        models.append(built(family, seed=seed))
        calls = []
        for padded in (False, True):
            ids, mask = inputs(101, padded, seed)
            calls.append({"input_ids": ids, "attention_mask": mask})
        cases.append(case(family, models[-1], calls))
    with tempfile.TemporaryDirectory() as folder:
        version, results = ask(python, Path(folder), cases)
    if None in results:
        return version, None
    for model, one, outputs in zip(models, cases, results, strict=True):
        for call, theirs in zip(one["calls"], outputs, strict=True):
            real = call["attention_mask"].bool()
            largest = max(largest, (model(**call).logits - theirs["logits"])[real].abs().max().item())
    return version, largest


def measure() -> dict:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for family in FAMILIES:
        row = known.setdefault(family.name, {})
        row["float32"] = {
            **row.get("float32", {}),
            transformers.__version__: difference(family, torch.float32),
        }
        row["float64"] = difference(family, torch.float64)
        for python in REFERENCES:
            version, value = older(family, python)
            if value is not None:
                row["float32"][version] = value
    return known


def table(results: dict) -> str:
    versions = sorted(
        {v for row in results.values() for v in row["float32"]}, key=lambda v: tuple(map(int, v.split(".")))
    )
    lines = [
        f"| file | lines | what is unusual | checkpoints | float32 against {', '.join(versions)} | float64 |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        file = f"decoders/{family.module.__name__.split('.')[-1]}.py"
        lines_of_code = len((ROOT / file).read_text().splitlines())
        unusual, checkpoints = UNUSUAL[family.name]
        row = results[family.name]
        numbers = ", ".join(f"{row['float32'][v]:.1e}" if v in row["float32"] else "-" for v in versions)
        lines.append(
            f"| [{file}]({file}) | {lines_of_code} | {unusual} | {checkpoints} | {numbers} | {row['float64']:.1e} |"
        )
    lines += ["", "Largest difference of any logit from Transformers' over 20 redrawn models and two texts each; logits are of",
              "size 4. The reference computes softmax and norms in float32 even in float64, and gives NaN for padded texts",
              "of Phi and all below it there, which are left out of that column. 4.37.2 has no Phi-3."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure and print the proof.")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure()
    print(table(results))
    if args.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write(table(results))


def write(text: str) -> None:
    before, rest = README.read_text("utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()

"""Who agrees with whom: every version of Transformers at hand against kits, in every setting that has trapped one,
and the classes that no kit has (base models and heads) against the same class here.

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

import torch
from torch import Tensor

from decoders import kernels, model_class, weights
from decoders.compare import draw, kit
from decoders.compare.noise import BEYOND, spread
from decoders.compare.rows import in_units

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
CHILD = """
import itertools, json, sys, warnings
warnings.filterwarnings("ignore")
import transformers
from decoders import compare
from decoders.compare import ports
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
DECIDED = {  # what is in "case: cell" -> why ours is as it is
    "rotary: base 10000": "25000: what the checkpoints were trained with; 5.23's default is another, and the hub's "
    "config of Fuyu does not say",
    "IndexError: index 1905": "4.37.2 makes its tables as long as the text, and cannot look up a position behind it",
    "RuntimeError: Given normalized_shape": "norm over each head, as 4.50 and 5; 4.37.2 applies it to all heads at "
    "once and fails",
    "no past_key_values": "no version of GPT-1 there has a cache; ours equals the whole pass",
    "has no Phi3": "Phi-3 came with 4.41",
    "has no PersimmonForTokenClassification": "Persimmon's token head came after 4.37.2",
    "a pad id within the text": "a row ends at its last token that is not padding, as 4.50 and 5; 4.37.2 cuts it "
    "before the first pad id, though that may stand within a text",
    "labels, padded right": "a padding token of GPT-Neo whose window holds nothing but padding sees nothing, so that "
    "what it computes is anybody's choice; the loss of question answering counts it, here too",
    "must match the size of tensor": "a mask of choices is as long as their ids, (batch, choices, tokens), as "
    "documented; Transformers does not reshape it and fails",
}


def child(python: str, program: str, *arguments: str) -> str:
    """What it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    result = subprocess.run([python, "-c", program, *arguments], capture_output=True, text=True, env=environment,
                            cwd=tempfile.gettempdir())  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{python}: {result.stderr[-2000:]}")
    return result.stdout.strip()


def ask(python: str, folder: Path, cases: list[str]) -> dict:
    """What one version says of one kit."""
    return json.loads(child(python, CHILD, str(folder), ",".join(DTYPES), ",".join(cases)).splitlines()[-1])


# ---- Base models and heads ---------------------------------------------------------------------------------

HEADS_CHILD = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers
from pathlib import Path
from decoders.compare import ports
transformers.logging.set_verbosity_error()
print(transformers.__version__)
for folder in map(Path, sys.argv[1:]):
    found = {}
    if not hasattr(transformers, folder.name):
        found["error"] = f"transformers {transformers.__version__} has no {folder.name}"
    else:
        model = ports.load_theirs(transformers, folder.name, folder, torch.float32)
        for case, given in torch.load(folder / "inputs.pt").items():
            model.config.problem_type = None  # the first labels would decide it for all later calls
            try:
                with torch.no_grad():
                    output = model(**given)
                found[case] = {name: t for name in output for t in [output[name]] if torch.is_tensor(t)}
            except Exception as error:
                found[case] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    torch.save(found, folder / f"{transformers.__version__}.pt")
"""
HEADS = {"gpt_neo": ["GPTNeoModel", "GPTNeoForSequenceClassification", "GPTNeoForTokenClassification",
                     "GPTNeoForQuestionAnswering"],
         "openai-gpt": ["OpenAIGPTModel", "OpenAIGPTForSequenceClassification", "OpenAIGPTDoubleHeadsModel"],
         "phi": ["PhiModel", "PhiForSequenceClassification", "PhiForTokenClassification"],
         "phi3": ["Phi3Model", "Phi3ForSequenceClassification", "Phi3ForTokenClassification"],
         "persimmon": ["PersimmonModel", "PersimmonForSequenceClassification", "PersimmonForTokenClassification"]}  # fmt: skip


def head_cases(class_name: str) -> dict[str, dict[str, Tensor]]:
    """Inputs of every kind that the class documents: padding on each side, labels, a pad id within the text."""
    B, T, labels, generator = 3, 9, 3, torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (B, T), generator=generator)
    right = (torch.arange(T) < torch.tensor([[9], [7], [4]])).long()
    cases = {"plain": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    for side, mask in (("padded right", right), ("padded left", right.flip(1))):
        cases[side] = {"input_ids": ids * mask, "attention_mask": mask}
    padded = cases["padded right"]
    if "Sequence" in class_name:
        within = ids.index_fill(1, torch.tensor([4]), 0)
        cases |= {
            "a pad id within the text": {"input_ids": within, "attention_mask": torch.ones_like(ids)},
            "labels": {**padded, "labels": torch.arange(B) % labels},
            "several labels": {
                **padded,
                "labels": torch.randint(2, (B, labels), generator=generator).float(),
            },
        }
    elif "Token" in class_name:
        cases["labels"] = {**padded, "labels": (ids % labels).masked_fill(right == 0, -100)}
    elif "Question" in class_name:
        places = {"start_positions": torch.tensor([0, 3, 2]), "end_positions": torch.tensor([2, 30, 3])}
        cases |= {"labels": {**cases["plain"], **places}, "labels, padded right": {**padded, **places}}
    elif "Double" in class_name:
        cases = {case: {name: t[None] for name, t in given.items()} for case, given in cases.items()}
        whole, places = {"input_ids": ids[None]}, {"mc_token_ids": torch.tensor([[8, 8, 3]])}
        cases |= {
            "plain": whole,
            "tokens to read": {**whole, **places},
            "labels": {
                **whole,
                **places,
                "labels": ids[None].masked_fill(right[None] == 0, -100),
                "mc_labels": torch.tensor([1]),
            },
        }
    return cases


@torch.no_grad()
def outputs(model: torch.nn.Module, cases: dict, **options: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors that each case gives, with NaN where padding computes them."""
    found = {}
    for case, given in cases.items():
        shown = {name: t for name, t in model(**given, **options)._asdict().items() if isinstance(t, Tensor)}
        found[case] = {name: masked(t, given.get("attention_mask")) for name, t in shown.items()}
    return found


def masked(t: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or t.shape[: mask.dim()] != mask.shape:
        return t
    return t.masked_fill((mask == 0).view(*mask.shape, *[1] * (t.dim() - mask.dim())), torch.nan)


def head_cell(
    theirs: dict | str, exact: dict[str, Tensor], ours: list[dict[str, Tensor]], mask: Tensor | None
) -> str:
    """By how many times the worst of our own ways to compute it in float32 they are off."""
    if isinstance(theirs, str):
        return theirs
    worst, typical = (0.0, ""), max(spread(exact[name], one[name])[1] for one in ours for name in exact)
    for name, truth in exact.items():
        if name not in theirs or theirs[name].shape != truth.shape:
            return f"{name} {tuple(theirs[name].shape) if name in theirs else 'missing'}, not {tuple(truth.shape)}"
        ulp = (
            truth.nan_to_num().abs().max().item() * 2**-24 if truth.dim() else typical
        )  # three losses are few
        unit = max([(ulp, ulp / 3)] + [spread(truth, one[name]) for one in ours])
        units = in_units(spread(truth, masked(theirs[name], mask)), unit)
        worst = max(worst, (units, name))
    return f"= {worst[0]:.1f}x" if worst[0] <= BEYOND else f"{worst[1]} {worst[0]:.1e}x"


def head_rows(pythons: list[str]) -> tuple[list[str], list[tuple]]:
    """(versions, (class, case, a cell for each version))"""
    with tempfile.TemporaryDirectory() as place:
        here = {}
        for family, names in HEADS.items():
            for name in names:
                config = {
                    **draw.small_config(family),
                    "num_labels": 3,
                    "pad_token_id": 0,
                    "architectures": [name],
                }
                known = model_class(config)
                model = draw.redraw(known(known.config_class.from_dict(config))).eval()
                weights.save(model, folder := Path(place) / name)
                torch.save(cases := head_cases(name), folder / "inputs.pt")
                ours = [
                    outputs(model, cases),
                    outputs(model, cases, output_attentions=True),
                    outputs(kernels.prepare(model), cases),
                ]
                here[folder] = cases, outputs(kernels.plain(model).double(), cases), ours
        versions = [child(python, HEADS_CHILD, *map(str, here)) for python in pythons]
        found = []
        for folder, (cases, exact, ours) in here.items():
            answers = [torch.load(folder / f"{version}.pt") for version in versions]
            for case, given in cases.items():
                own = exact[case], [one[case] for one in ours], given.get("attention_mask")
                cells = [answer.get("error") or head_cell(answer[case], *own) for answer in answers]
                found.append((folder.name, case, cells))
    return versions, found


def cell(answer: dict) -> str:
    if "error" in answer:
        return (
            answer["error"].rpartition(": the port takes ")[2]
            if "could run no case" in answer["error"]
            else answer["error"]
        )
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
                    answers = list(
                        pool.map(lambda python, own=own: ask(python, own.folder, list(own.expected)), pythons)
                    )
                versions = [answer["version"] for answer in answers]
                found += [
                    (family, setting, dtype, case, [cell(answer[dtype][case]) for answer in answers])
                    for dtype in DTYPES
                    for case in own.expected
                ]
                print(family, setting, file=sys.stderr)
    return versions, found


def page(versions: list[str], found: list[tuple], heads: list[tuple]) -> str:
    """Cases with the same kind of answer from every version stand in one row."""
    top = ("family", "setting", "precision", "cases", *versions)
    lines = [
        ABOUT,
        *table(
            top,
            [
                ((family, setting or "as the kit", dtype), case, cells)
                for family, setting, dtype, case, cells in found
            ],
        ),
    ]
    lines += [
        ABOUT_HEADS,
        *table(("class", "cases", *versions), [((name,), case, cells) for name, case, cells in heads]),
    ]
    shown = sorted(
        {f"{case}: {cell}" for *_, case, cells in found + heads for cell in cells if not cell.startswith("=")}
    )
    reasons = {reason for cell in shown for key, reason in DECIDED.items() if key in cell}
    missing = [cell for cell in shown if not any(key in cell for key in DECIDED)]
    lines += ["", "## What we decided where they differ", "", *(f"- {reason}." for reason in sorted(reasons))]
    lines += [f"- not decided: {cell}" for cell in missing]
    return "\n".join(lines) + "\n"


def table(top: tuple[str, ...], rows: list[tuple[tuple, str, list[str]]]) -> list[str]:
    """rows: (what a row is of, case, a cell for each version)"""
    groups: dict[tuple, list] = {}
    for of, case, cells in rows:
        kinds = tuple(
            "=" if c.startswith("=") else re.sub(r".*x: |[\d\[\], ]+$|size.*", "", c) for c in cells
        )
        groups.setdefault((of, kinds), []).append((case, cells))
    lines = [f"| {' | '.join(top)} |", "|" + "---|" * len(top)]
    for (of, _), members in groups.items():
        cells = [
            max(column, key=lambda shown: (len(shown), shown))
            for column in zip(*(c for _, c in members), strict=True)
        ]
        lines.append(f"| {' | '.join((*of, ', '.join(name for name, _ in members), *cells))} |")
    return lines


ABOUT = """# Who agrees with whom

Every version of Transformers at hand has run `python -m decoders compare KIT transformers`, for each family, each
setting that has trapped one of them, each precision and each case of the kit. `= 1.3x` is equal, the worst stage 1.3
times as far off as correct arithmetic of that precision is; else the first stage that differs, by how many times the
noise, and the name of the mistake. Made by `python -m tests.versions --write`.
"""
ABOUT_HEADS = """
## Base models and heads

Kits are of language models. The other documented classes, with redrawn weights of the kits' sizes, in float32: all
outputs against ours in float64, in units of the worst of our own three ways to compute them in float32. What padding
itself computes is not compared.
"""
BELOW = "## What we decided where they differ"


def below() -> str:
    """What stands on the page under the tables, and is not made here."""
    old = PAGE.read_text()
    return old[old.index(BELOW) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/versions.md")
    args = parser.parse_args()
    below()  # is there, before the long work
    others = [python for python in os.environ.get("DECODERS_REFERENCES", "").split(":") if python]
    pythons = [*others, sys.executable]
    text = page(*rows(pythons), head_rows(pythons)[1])
    if args.write:
        PAGE.write_text(f"{text.rstrip()}\n\n{below()}")
    else:
        print(text)


if __name__ == "__main__":
    main()

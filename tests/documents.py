"""The documentation of the six models: its examples, and the names that it gives, cut out of the text files.

`DECODERS_DOCS` is the folder of these files; nothing of them is kept here.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

GLUED = re.compile(r"(model\.config)(Phi3Model)$")  # a heading without a line break before it
PLACEHOLDER = "/output/path"  # what the reader is to replace


def folder() -> Path | None:
    given = os.environ.get("DECODERS_DOCS")
    return Path(given) if given else None


@dataclass
class Example:
    file: str
    line: int
    code: str

    @property
    def kind(self) -> str:
        found = re.search(r"import.*\b(TF|Flax)\w+", self.code)
        return {"TF": "TensorFlow", "Flax": "Flax"}[found[1]] if found else "PyTorch"

    @property
    def title(self) -> str:
        """The classes that it imports."""
        names = re.findall(r"^from transformers[\w.]* import (.*)$", self.code, re.M)
        return ", ".join(name.strip() for line in names for name in line.split(","))

    def __str__(self) -> str:
        return f"{self.file[:3]}:{self.line}"


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def examples(where: Path) -> list[Example]:
    """In the order of the files; code with prompts, in a fence or not, and code without that imports."""
    found = []
    for file in sorted(where.glob("*.txt")):
        lines = file.read_text("utf-8").split("\n")
        i = 0
        while i < len(lines):
            if lines[i].startswith(">>>"):
                start, code, fenced = i, [], i > 0 and lines[i - 1].startswith("```")
                while i < len(lines) and (is_code(lines[i]) or (fenced and not lines[i].startswith("```"))):
                    if is_code(lines[i]):
                        code.append(GLUED.sub(r"\1", lines[i][4:].removesuffix("  # doctest: +SKIP")))
                    i += 1
                found.append(Example(file.name, start + 1, "\n".join(code)))
            elif lines[i].startswith("from ") and lines[i].isascii():
                start, end = i, i
                for j in range(i, min(i + 30, len(lines))):
                    block = "\n".join(lines[i : j + 1])
                    if not block.isascii() or lines[j].startswith(("```", "#")):
                        break
                    if parses(block):
                        end = j
                found.append(Example(file.name, start + 1, "\n".join(lines[start : end + 1]).strip()))
                i = end + 1
            else:
                i += 1
    return [one for one in found if "import" in one.code]


def is_code(line: str) -> bool:
    return line.startswith((">>>", "... ")) or line == "..."


# ---- Names -------------------------------------------------------------------------------------------------

TRANSLATED = {"图像处理器": "image_processor", "标记器": "tokenizer", "配置": "config"}
METHODS = {
    "forward": "forward",
    "generate": "generate",
    "生成": "generate",
    "call": "call",
    "__call__": "__call__",
    "save_vocabulary": "save_vocabulary",
}
FIELDS = {
    "loss",
    "mc_loss",
    "logits",
    "mc_logits",
    "last_hidden_state",
    "past_key_values",
    "hidden_states",
    "attentions",
    "start_logits",
    "end_logits",
}


@dataclass
class Name:
    """A class, and one of its methods, with what the documentation says of it."""

    cls: str
    method: str
    arguments: list[str]
    fields: list[str]  # of what it returns


def names(where: Path) -> list[Name]:
    found: dict[tuple[str, str], Name] = {}
    for file in sorted(where.glob("*.txt")):
        cls, method, returned = None, "", False
        for line in file.read_text("utf-8").split("\n"):
            text = line.strip().lstrip("#").strip()
            if match := re.search(r"class transformers\.(?:[\w.]*\.)?(\w+)", line):
                cls, method, returned = match[1], "__init__", False
            elif cls and text.strip("`") in METHODS:
                method, returned = METHODS[text.strip("`")], False
            elif re.fullmatch(r"(Phi3?|Persimmon|Fuyu|GPTNeo|OpenAIGPT)\w+", text):
                cls, method, returned = text, "__init__", False
            elif text in ("返回", "Returns"):
                returned = True
            signature = line.strip().removeprefix("< source >")
            if cls and signature.startswith("(") and len(signature) > 3 and "http" not in signature[:40]:
                found.setdefault((cls, method), Name(cls, method, arguments(signature), []))
            field = re.match(r"[-+•*\s]*`?(\w+)`?\s*[(（].*(?:torch|tuple)", line)
            if returned and field and field[1] in FIELDS and (cls, method) in found:
                one = found[cls, method]
                one.fields += [field[1]] if field[1] not in one.fields else []
    return list(found.values())


def words(text: str) -> list[str]:
    """Of a signature; brackets and quotes hold together."""
    found, word, depth, quote = [], "", 0, ""
    for c in text:
        if quote:
            word, quote = word + c, "" if c == quote else quote
        elif c == "'":
            word, quote = word + c, c
        elif depth == 0 and c in " =:":
            found += [word] if word else []
            word = ""
            found += [c] if c != " " else []
        else:
            depth += (c in "[(<") - (c in "])>")
            word += c
    return found + ([word] if word else [])


def arguments(signature: str) -> list[str]:
    """Names, without types and defaults."""
    text = re.split(r"\)\s*(?:→|-> )|→", signature)[0].strip().removeprefix("(").strip().removesuffix(")")
    parts, found, i = words(text), [], 0
    while i < len(parts):
        found.append(TRANSLATED.get(parts[i], parts[i]))
        i += 1
        if i < len(parts) and parts[i] == ":":
            i += 1
            while (
                i < len(parts)
                and parts[i] != "="
                and not parts[i].startswith("*")
                and parts[i + 1 : i + 2] != [":"]
            ):
                i += 1
        if i < len(parts) and parts[i] == "=":
            i += 2
    return found


# ---- Run, compare, write -----------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
IDS = {
    "Phi": "microsoft/phi-2",
    "Phi3": "microsoft/Phi-3-mini-4k-instruct",
    "Persimmon": "adept/persimmon-8b-base",
    "Fuyu": "adept/fuyu-8b",
    "GPTNeo": "EleutherAI/gpt-neo-125m",
    "OpenAIGPT": "openai-gpt",
}


def run(python: str, library: str, home: Path, work: Path, where: Path) -> dict:
    """What tests/run_documents.py finds with this Python and library; `home` is made by tests/hub_cache.py."""
    job = {
        "examples": [one.code for one in examples(where)],
        "ids": IDS,
        "picture": str(ROOT / "checkpoints/tiny-fuyu/shapes.png"),
        "folder": f"{home}/folders/tiny-%s",
        "names": [[n.cls, n.method, n.arguments, n.fields] for n in documented(where)],
    }
    source, target = work / "job.json", work / "results.pt"
    source.write_text(json.dumps(job))
    env = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "USE_TF": "0",
        "USE_FLAX": "0",
        "PYTHONPATH": str(ROOT) if library != "transformers" else "",
    }
    done = subprocess.run(
        [python, str(ROOT / "tests/run_documents.py"), str(source), str(target), library],
        env=env,
        capture_output=True,
        text=True,
        cwd=work,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return torch.load(target, weights_only=False)


def documented(where: Path) -> list[Name]:
    """Of PyTorch, where there is something to ask."""
    return [one for one in names(where) if not one.cls.startswith(("TF", "Flax"))]


def differs(a, b, path: str = "") -> str:
    """Where two held values differ first, "" if nowhere. Half precision is compared as such: 5.x loads float16 folders so."""
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = (
            {"past_key_values" if key == "cache" else key: one for key, one in d.items()} for d in (a, b)
        )  # since 5.24
        if a.keys() != b.keys():
            return f"{path} is of another kind" if path else "other names"
        return next(
            (
                shown
                for key in a
                if (shown := differs(a[key], b[key], path if key in HELD else f"{path}.{key}".lstrip(".")))
            ),
            "",
        )
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{path} has another length"
        return next(
            (
                shown
                for i, (x, y) in enumerate(zip(a, b, strict=True))
                if (shown := differs(x, y, f"{path}[{i}]"))
            ),
            "",
        )
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape:
            return f"{path} is {tuple(b.shape)}, here {tuple(a.shape)}"
        close = 2e-2 if torch.float16 in (a.dtype, b.dtype) else 2e-4
        same = (
            torch.allclose(a.float(), b.float(), rtol=close, atol=close, equal_nan=True)
            if a.is_floating_point()
            else torch.equal(a, b)
        )
        return "" if same else f"{path} differs"
    return "" if a == b else f"{path} differs"


HELD = ("tensor", "plain", "names", "several", "shown", "object")


FAMILY_OF = {"000": "Phi", "001": "Phi-3", "002": "Persimmon", "003": "Fuyu, GPT-1, GPT-Neo", "004": "Phi"}
REASONS = {  # what an error or a difference says -> what it means; whatever is not among these must be looked at
    "flash_attention_2' needs an NVIDIA GPU": "needs a GPU, and says so",
    "FlashAttention2 has been toggled on": "needs a GPU and flash-attn",
    "cannot import name 'Phi3": "no Phi-3 yet",
    "model type `phi3`": "no Phi-3 yet",
    "KeyError: 'Phi3": "no Phi-3 yet",
    "cannot import name 'PersimmonTokenizer'": "has no PersimmonTokenizer",
    "Input length of input_ids is": "refuses `max_length` below the prompt's; 4.37 and ours warn and write one token",
    "No module named 'torchvision'": "needs torchvision",
    "inputs_to_model.image_patches_indices is (1, 58), here (1, 48)": "ten more indices than ids, -1 all of them",
    "past_key_values is of another kind": "the cache is an object; the rest is the same",
    "AttributeError: ": "breaks: `apply_chat_template` gives a dict by now",
}
HALF = "float16, as stored, unless asked: other digits"
NEW_ROW = "the row of the added token is drawn by chance; ours is the mean, as 4.50's is on average"


def reason(shown: str, example: Example, version: str) -> str:
    for part, meaning in REASONS.items():
        if part in shown:
            return meaning
    if shown and "differs" in shown and "DoubleHeads" in example.title:
        return NEW_ROW
    if shown and "differs" in shown and version.startswith("5."):
        return HALF
    if shown:
        raise RuntimeError(f"{example} in {version}: {shown}: look at it, and give it a reason in REASONS")
    return "same"


def example_table(where: Path, ours: dict, others: list[dict]) -> str:
    rows = [
        "| | example | here | " + " | ".join(other["version"] for other in others) + " |",
        "|---|---|---|" + "---|" * len(others),
    ]
    for i, one in enumerate(examples(where)):
        mine = ours["results"][i]
        if one.kind != "PyTorch":
            rows.append(
                f"| {one} | {one.title} | two lines read the file | "
                + " | ".join(
                    f"needs {one.kind}" if other["version"] < "5" else f"no {one.kind} any more"
                    for other in others
                )
                + " |"
            )
            continue
        cells = [reason(mine.get("error", ""), one, "ours").replace("same", "runs")]
        for other in others:
            theirs = other["results"][i]
            shown = theirs.get("error") or ("" if "error" in mine else differs(mine, theirs))
            cells.append(reason(shown, one, other["version"]))
        rows.append(f"| {one} | {one.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def name_table(where: Path, ours: dict, others: list[dict]) -> str:
    rows = [
        "| documented | arguments | returns | here | "
        + " | ".join(other["version"] for other in others)
        + " |",
        "|---|---|---|---|" + "---|" * len(others),
    ]
    for i, one in enumerate(documented(where)):
        cells = []
        for known in (ours, *others):
            found = known["names"][i]
            if "error" in found:
                cells.append(
                    next(
                        (meaning for part, meaning in REASONS.items() if part in found["error"]),
                        found["error"],
                    )
                )
                continue
            lacks = found["missing"] + found.get("absent", [])
            swallows = " (taken, and without effect)" if found["swallowed"] and "head_mask" in lacks else ""
            failed = f"; {found['failed']}" if found.get("failed") else ""
            cells.append(
                (
                    "all"
                    if not lacks
                    else "not by name: " + ", ".join(f"`{name}`" for name in lacks) + swallows
                )
                + failed
            )
        if cells[0] != "all":
            raise RuntimeError(f"{one.cls}.{one.method}: {cells[0]}")
        method = "" if one.method == "__init__" else f".{one.method}"
        rows.append(
            f"| {one.cls}{method} | {len(one.arguments)} | {', '.join(one.fields)} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(rows)


def write(tables: dict[str, str]) -> None:
    """Into docs/api.md, between the marks."""
    file = ROOT / "docs/api.md"
    text = file.read_text("utf-8")
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->{rest.split(f'<!-- end of {name} -->')[1]}"
    file.write_text(text, "utf-8")


def main() -> None:
    """DECODERS_DOCS=docs DECODERS_TEST_DATA=data DECODERS_REFERENCES=pythons python -m tests.documents --write"""
    from tests.hub_cache import build

    where = folder()
    if where is None:
        raise SystemExit("set DECODERS_DOCS to the folder of the documentation")
    with tempfile.TemporaryDirectory() as work:
        home = build(Path(work) / "home")
        ours = run(sys.executable, "decoders.hf", home, Path(work), where)
        pythons = [*filter(None, os.environ.get("DECODERS_REFERENCES", "").split(":")), sys.executable]
        others = [run(python, "transformers", home, Path(work), where) for python in pythons]
    tables = {"examples": example_table(where, ours, others), "names": name_table(where, ours, others)}
    if "--write" in sys.argv:
        write(tables)
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()

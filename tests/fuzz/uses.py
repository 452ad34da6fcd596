"""What people do with a sound checkpoint, at random: python -m tests.fuzz.uses --cases 200 --seed 3

- chat: any roles and texts; no control token that was typed is one, and the ids are those of the template's text
- masks: any attention mask; finite logits for what is seen, or a refusal
- pages: any text, name and piece in the page of `look`; its data come back as they were, and none is markup
- kits: bytes of a kit changed; a report, or a refusal
- environments: any locale, folders that are not there, terminals of any kind; the same answer from the command

What fails is told by its kind, seed and number, which are all that makes a case.
"""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import torch

from decoders import compare, look, tokenize, weights
from decoders.phi3 import Phi3ForCausalLM
from tests.fuzz.budget import arguments, numbers
from tests.fuzz.folders import CHECKPOINTS

ROOT = CHECKPOINTS.parent
PARTS = ("Hello", " ", "\n", "<|end|>", "<|user|>", "<|im_end|>", "<|", "|>", "end", "</s>", "<s>", "human:", "adept:", "Output:", "{{ 1 }}",
         "{% raw %}", "<script>", "</script>", "<!--", "-->", "&amp;", "'", '"', "\\", "`", "${x}", "\u2028", "\x00", "\x1b[31m", "\u202e", "\ufdd0",
         "\ud800", "日本", "🤗", "é", "İ", "\u0301", "<0x04>", "|SPEAKER|")  # fmt: skip
ROLES = ("user", "assistant", "system", "tool", "end", "user|>", "<|end|>", "", "critic", "\n", "im_end")
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}<|im_start|>assistant\n"


class Failed(Exception):
    """What should not have come out."""


def text_of(rng: random.Random, most: int = 8) -> str:
    return "".join(rng.choice(PARTS) for _ in range(rng.randint(0, most)))


def refusal(error: Exception) -> str:
    """'refused' for one sentence; Failed for anything longer."""
    if "\n" in str(error).strip() or "\x1b" in str(error) or len(str(error)) > 4000:
        raise Failed(f"a refusal that is no sentence: {str(error)!r:.200}")
    return "refused"


# ---- Chat ----------------------------------------------------------------------------------------------------


@functools.cache
def chatting() -> list[tokenize.Tokenizer]:
    """Formats built in, and templates."""
    names = ("tiny-phi", "tiny-phi3", "tiny-persimmon")
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "chatml"
        shutil.copytree(CHECKPOINTS / "tiny-phi", folder)
        own = tokenize.load(folder)
        own.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        own.save(folder)
        (folder / "chat_template.jinja").write_text(CHATML)
        return [*(tokenize.load(CHECKPOINTS / name) for name in names), tokenize.load(folder)]


def chat(rng: random.Random) -> str:
    """Any roles and texts: as many control tokens as the same conversation has with harmless texts."""
    tokenizer = rng.choice(chatting())
    roles = [rng.choice(ROLES if rng.random() < 0.3 else ("user",)) for _ in range(rng.randint(1, 3))]
    said = [{"role": role, "content": text_of(rng)} for role in roles]
    try:
        ids = tokenizer.chat(said)
    except ValueError as error:
        return refusal(error)
    plain = tokenizer.chat([{"role": role, "content": "x" if one["content"].strip() else one["content"]}
                            for role, one in zip(roles, said, strict=True)])  # fmt: skip
    control = {token.id for token in tokenizer.added.values() if not token.content.isspace()}
    if [id for id in ids if id in control] != [id for id in plain if id in control]:
        raise Failed(f"typed control tokens count: {said}")
    return "answered"


# ---- Masks ---------------------------------------------------------------------------------------------------


@functools.cache
def model() -> Phi3ForCausalLM:
    return weights.load(Phi3ForCausalLM, CHECKPOINTS / "tiny-phi3", dtype=torch.float32)


def masks(rng: random.Random) -> str:
    """Attention masks of any kind, with holes, rows that see nothing, other dtypes and shapes: logits are finite."""
    B, T = rng.randint(1, 4), rng.randint(1, 9)
    ids = torch.tensor([[rng.randrange(300) for _ in range(T)] for _ in range(B)])
    mask = torch.tensor([[rng.random() < rng.choice((0.2, 0.5, 1)) for _ in range(T)] for _ in range(B)])
    mask = mask.to(rng.choice((torch.long, torch.bool, torch.float32, torch.int32, torch.uint8)))
    mask = rng.choice((mask, mask, mask, mask[:, : T - 1], mask[0], mask[None], mask.float() * 2))
    try:
        with torch.no_grad():
            logits = model()(ids, attention_mask=mask).logits
        model().generate(ids, mask, max_new_tokens=2)
    except ValueError as error:
        return refusal(error)
    if not logits.isfinite().all():
        raise Failed(f"logits that are not finite, for the mask {mask.tolist()}")
    return "answered"


# ---- Pages ---------------------------------------------------------------------------------------------------


class Markup(HTMLParser):
    """All elements of a page, and the JSON of its data."""

    def __init__(self):
        super().__init__()
        self.elements: list[str] = []
        self.data = ""
        self.is_data = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append(tag)
        self.is_data = ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        self.data += data if self.is_data else ""


def elements_and_data(page: str) -> tuple[list[str], dict]:
    markup = Markup()
    markup.feed(page)
    return markup.elements, json.loads(markup.data)


def run_of(text: str, name: str) -> look.Run:
    tokenizer = chatting()[1]
    ids = torch.tensor([tokenizer.encode(text or "x")[:12]])
    return look.Run(model(), ids, tokenizer, ids.shape[1], name, text)


def pages(rng: random.Random) -> str:
    """Any text, name and title in the page of `look`: it stays text, and the name comes back."""
    text, name = text_of(rng), text_of(rng, 3) or "x"  # without a name the page says the class
    elements, data = elements_and_data(look.page([run_of(text, name)], title=text_of(rng, 3)))
    if elements != elements_and_data(look.page([run_of("x", "x")]))[0]:
        raise Failed(f"text became markup: {text!r}, {name!r}")
    shown = data["runs"][0]["name"]
    if shown.encode(errors="replace") != name.encode(errors="replace"):
        raise Failed(f"the name {name!r} became {shown!r}")
    return "answered"


# ---- Kits ----------------------------------------------------------------------------------------------------


@functools.cache
def kit() -> tempfile.TemporaryDirectory:
    """With a port's values beside it; gone with this process."""
    base = tempfile.TemporaryDirectory(prefix="decoders-fuzz-")
    compare.make(Path(base.name) / "kit", "phi", cases=["plain"])
    return base


def kits(rng: random.Random) -> str:
    """A kit, or a port's values, with bytes changed: a report or a refusal."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "kit"
        shutil.copytree(Path(kit().name) / "kit", folder)
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors"))
        port = Path(base) / "port.safetensors"
        shutil.copy(folder / "expected.safetensors", port)
        file = rng.choice([*files, port])
        content = bytearray(file.read_bytes())
        for _ in range(rng.choice((1, 3, 9))):
            content[rng.randrange(min(len(content), rng.choice((20, 400, len(content)))))] = rng.randrange(
                256
            )
        cut = rng.randrange(len(content)) if rng.random() < 0.2 else len(content)
        file.write_bytes(content[:cut])
        try:
            str(compare.run(folder, port))
        except (ValueError, OSError, compare.PortError) as error:
            return refusal(error) if not isinstance(error, compare.PortError) else "refused"
    return "answered"


# ---- Environments --------------------------------------------------------------------------------------------

VARIABLES = {
    "LANG": ("C", "C.UTF-8", "tr_TR.UTF-8", "nowhere"), "LC_ALL": ("C", "POSIX", "xx"), "PYTHONIOENCODING": ("utf-8", "utf-8:replace"),
    "HOME": ("/nonexistent", "/dev/null"), "TMPDIR": ("/tmp", "/nonexistent"), "XDG_CACHE_HOME": ("/nonexistent", "/dev/null"),
    "HF_HOME": ("/nonexistent", "relative"), "HF_HUB_OFFLINE": ("1", "0"), "COLUMNS": ("1", "0", "x"), "TERM": ("dumb", "", "xterm"),
    "NO_COLOR": ("1", ""), "OMP_NUM_THREADS": ("1", "2"), "PYTHONWARNINGS": ("default", "ignore"), "CC": ("/nonexistent", "cc"), "PYTHONOPTIMIZE": ("1", ""),
}  # fmt: skip


@functools.cache
def expected() -> str:
    return answer_in({})


def answer_in(changes: dict[str, str]) -> str:
    command = [
        sys.executable,
        "-m",
        "decoders",
        "generate",
        "checkpoints/tiny-phi3",
        "Once upon",
        "--max-new-tokens",
        "6",
    ]
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **changes}, errors="replace"
    )
    if found.returncode or "Traceback" in found.stderr:
        raise Failed(f"status {found.returncode} with {changes}: {found.stderr[-300:]!r}")
    return found.stdout


def environments(rng: random.Random) -> str:
    """The command with other locales, terminals, folders that are not there: the same answer."""
    changes = {name: rng.choice(VARIABLES[name]) for name in rng.sample(sorted(VARIABLES), rng.randint(1, 6))}
    if answer_in(changes) != expected():
        raise Failed(f"another answer with {changes}")
    return "answered"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "chat": chat, "masks": masks, "pages": pages, "kits": kits, "environments": environments,
}  # fmt: skip


def run(
    kind: str,
    seed: int,
    cases: int | None = None,
    seconds: float | None = None,
    kinds: dict[str, Callable[[random.Random], str]] = KINDS,
) -> tuple[dict[str, int], list[str]]:
    """How often what came out, and what failed."""
    counts, failures = {"answered": 0, "refused": 0, "failed": 0}, []
    for number in numbers(cases, seconds):
        try:
            outcome = kinds[kind](random.Random(f"{kind} {seed} {number}"))
        except Exception as error:
            outcome = "failed"
            failures.append(
                f"{kind}, seed {seed}, number {number}: {type(error).__name__}: {str(error)[:300]}"
            )
        counts[outcome] += 1
    return counts, failures


if __name__ == "__main__":
    given = arguments(__doc__)
    torch.set_num_threads(1)
    every: list[str] = []
    for name in KINDS:
        totals, failed = run(name, given.seed, given.cases, given.seconds and given.seconds / len(KINDS))
        print(name, totals)
        every += failed
    print("\n".join(every))
    sys.exit(bool(every))

"""Older versions of Transformers, where these differ or where the newest has forgotten something.

Set DECODERS_REFERENCES to the Python executables of environments with other versions, separated by colons:
    python -m venv old && old/bin/pip install torch==2.13.0 transformers==4.37.2 'numpy<2'
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from decoders import model_class, read_config, tokenize, weights
from tests import matrix
from tests.families import GPT_NEO, PHI, inputs

ROOT = Path(__file__).parents[1]
REFERENCES = [path for path in os.environ.get("DECODERS_REFERENCES", "").split(":") if path]
FILE = Path(__file__).with_name("reference.py")


def ask(python: str, tmp_path, cases: list[dict]) -> tuple[str, list]:
    """(version, results) of another Transformers."""
    torch.save(cases, tmp_path / "in.pt")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    found = subprocess.run([python, str(FILE), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")],
                           capture_output=True, text=True, env=environment)  # fmt: skip
    assert found.returncode == 0, found.stderr
    answer = torch.load(tmp_path / "out.pt", weights_only=False)
    return answer["version"], answer["results"]


@pytest.fixture(params=REFERENCES or [None])
def other(request, tmp_path):
    if request.param is None:
        pytest.skip("DECODERS_REFERENCES is not set: no older Transformers to compare with")
    return lambda cases: ask(request.param, tmp_path, cases)


def case(family, model, calls, head="ForCausalLM", dtype=torch.float32):
    return {"class": family.class_name(head), "config": family.their_config(**model.changes), "weights": model.state_dict(),
            "calls": calls, "dtype": dtype}  # fmt: skip


def built(family, head="ForCausalLM", dtype=torch.float32, **changes):
    model = family.model(head, dtype=dtype, **changes)
    model.changes = changes
    return model


@torch.no_grad()
def test_every_layer_agrees_with_older_versions(family, other):
    ids, mask = inputs(101, padded=True)
    calls = [{"input_ids": ids, "attention_mask": m, "output_hidden_states": True, "output_attentions": True}
             for m in (torch.ones_like(mask), mask)]  # fmt: skip
    model = built(family)
    version, [results] = other([case(family, model, calls)])
    if results is None:
        pytest.skip(f"Transformers {version} has no {family}")
    for call, theirs in zip(calls, results, strict=True):
        real = call["attention_mask"].bool()
        ours = model(**call)
        for layer, (x, y) in enumerate(zip(ours.hidden_states, theirs["hidden_states"], strict=True)):
            assert (x - y)[real].abs().max() < 2e-5, f"Transformers {version}, hidden state {layer}"
        assert (ours.logits - theirs["logits"])[real].abs().max() < 2e-5, version
        for x, y in zip(ours.attentions, theirs["attentions"], strict=True):
            assert (x - y).transpose(1, 2)[real].abs().max() < 2e-5, version


@torch.no_grad()
@pytest.mark.parametrize(
    "head_mask", [torch.tensor([1.0, 0, 0.5, 1]), torch.rand(3, 4)], ids=["heads", "layers and heads"]
)
def test_head_mask_agrees_with_versions_that_have_it(other, head_mask):
    """Transformers 5 accepts head_mask and ignores it; 4.x multiplies the weights after dropout."""
    ids, _ = inputs(101)
    calls = [{"input_ids": ids, "head_mask": head_mask}, {"input_ids": ids}]
    model = built(GPT_NEO)
    version, [[masked, plain]] = other([case(GPT_NEO, model, calls)])
    if version.startswith("5"):
        assert torch.equal(masked["logits"], plain["logits"])
        return
    assert (model(**calls[0]).logits - masked["logits"]).abs().max() < 2e-5
    assert (masked["logits"] - plain["logits"]).abs().max() > 0.1


@torch.no_grad()
def test_heads_agree_with_older_versions(other):
    ids, _ = inputs(101)
    labels = torch.tensor([2, 0])
    sequence = built(GPT_NEO, "ForSequenceClassification", num_labels=3, pad_token_id=7)
    token = built(GPT_NEO, "ForTokenClassification", num_labels=3)
    answers = built(GPT_NEO, "ForQuestionAnswering")
    calls = [[{"input_ids": ids.masked_fill(ids == 7, 8), "labels": labels}], [{"input_ids": ids, "labels": ids % 3}],
             [{"input_ids": ids, "start_positions": labels, "end_positions": labels + 22}]]  # fmt: skip
    models = [
        (sequence, "ForSequenceClassification"),
        (token, "ForTokenClassification"),
        (answers, "ForQuestionAnswering"),
    ]
    _, results = other([case(GPT_NEO, m, c, head) for (m, head), c in zip(models, calls, strict=True)])
    for (model, _), call, theirs in zip(models, calls, results, strict=True):
        ours = model(**call[0])._asdict()
        for key, value in theirs[0].items():
            assert (ours[key] - value).abs().max() < 2e-5, key


@torch.no_grad()
def test_a_pad_id_inside_the_text_does_not_cut_it(other):
    """4.37 pools before the first pad id, wherever it is; 4.50 and 5 take the last token that is not padding."""
    ids, _ = inputs(101)
    ids = ids.masked_fill(ids == 7, 8)
    ids[0, 10] = 7
    model = built(GPT_NEO, "ForSequenceClassification", num_labels=3, pad_token_id=7)
    version, [[theirs]] = other([case(GPT_NEO, model, [{"input_ids": ids}], "ForSequenceClassification")])
    difference = (model(ids).logits - theirs["logits"]).abs().max()
    assert difference > 0.1 if version.startswith("4.37") else difference < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_float32_in_half_precision(other, dtype):
    """4.x rounds it to the dtype of the logits; 5 does not, nor do we."""
    ids, _ = inputs(101)
    model = built(GPT_NEO, dtype=dtype)
    version, [[theirs]] = other([case(GPT_NEO, model, [{"input_ids": ids, "labels": ids}], dtype=dtype)])
    ours = model(ids, labels=ids).loss
    assert ours.dtype == torch.float32
    assert theirs["loss"].dtype == (torch.float32 if version.startswith("5") else dtype)
    assert abs(ours - theirs["loss"]) < 0.05


@torch.no_grad()
def test_a_saved_head_is_found_by_every_version(other, tmp_path):
    """4.37 calls the token classifier of Phi `classifier`, later versions `score`: both names are in the file."""
    model, (ids, _) = PHI.model("ForTokenClassification", num_labels=3), inputs(101)
    weights.save(model, tmp_path / "saved")
    _, [[theirs]] = other(
        [
            {
                "class": "PhiForTokenClassification",
                "folder": str(tmp_path / "saved"),
                "calls": [{"input_ids": ids}],
            }
        ]
    )
    assert (model(ids).logits - theirs["logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["gpt-neo", "openai-gpt", "phi", "phi3", "persimmon"])
def test_a_saved_tokenizer_is_read_by_every_version(other, tmp_path, name):
    """With a token that was added here."""
    source = Path("checkpoints") / f"tiny-{name}"
    tokenizer = tokenize.load(source)
    tokenizer.add_special_tokens(["<|extra|>"])
    weights.save(weights.load(model_class(read_config(source)), source), tmp_path / "saved", tokenizer)
    texts = ["Once upon a time", "Once<|extra|> upon, a fox.", "<|extra|><|extra|>"]
    _, [found] = other([{"folder": str(tmp_path / "saved"), "texts": texts}])
    assert found == [tokenizer.encode(text) for text in texts]


# ---- The versions that are promised ------------------------------------------------------------------------


def test_the_lowest_torch_has_what_is_asked_of_it():
    """`_has_any_global_hook` came with 2.8: every forward of a loaded Phi or GPT-Neo failed before, and the bound
    said 2.6."""
    bound = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert bound is not None
    used = any(
        "_has_any_global_hook" in file.read_text() for file in (ROOT / "decoders" / "kernels").glob("*.py")
    )
    assert used and tuple(map(int, bound.groups())) >= (2, 8)
    assert callable(torch.nn.modules.module._has_any_global_hook)


def test_the_matrix_covers_every_bound():
    """`make versions` tries the newest and the lowest of each; the page has their table."""
    text = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text[text.index("\ndependencies") :]))
    tried = {row.partition("==")[0] for row in matrix.lowest()}
    assert tried == bounds.keys() - {*matrix.ELSEWHERE} and "safetensors" in tried
    newer = [tuple(map(int, version.split("."))) for version in matrix.NEWER]
    assert min(newer)[:2] == tuple(map(int, bounds["torch"].split(".")))
    files = {name for names in matrix.FILES.values() for name in names}
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in files)
    rows = matrix.shown(matrix.PAGE.read_text())
    assert {"transformers==5.23.0", "transformers==5.24.0", "lowest"} <= rows.keys()
    wrong = {
        row: re.findall(r"[\d,]+ failed|[\d,]+ errors?|does not run", line) for row, line in rows.items()
    }
    assert {row: faults for row, faults in wrong.items() if faults} == {"lowest": ["1 failed"]}
    assert "The one that fails in `lowest`" in matrix.PAGE.read_text()
    assert all(re.search(r"\| [\d,]+ passed", line) for line in rows.values())


def test_a_row_of_the_matrix_takes_the_place_of_the_older_one(tmp_path, monkeypatch):
    begin, end = matrix.MARKS
    table = "| installed | tests | |\n|---|---|---|\n| a==1 | x | 1 passed |\n| lowest | y | 2 passed |"
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "page.md")
    matrix.PAGE.write_text(f"Before\n{begin}\n{table}\n{end}\nbehind\n")
    matrix.write({"lowest": "| lowest | y | 3 passed |", "torch==2.8.0": "| torch==2.8.0 | z | 4 passed |"})
    page = matrix.PAGE.read_text()
    assert page.startswith("Before\n") and page.endswith("behind\n") and "2 passed" not in page
    assert [*matrix.shown(page)] == ["torch==2.8.0", "lowest", "a==1"]
    assert (
        matrix.counts("..F\n1 failed, 1202 passed, 3 skipped in 2.1s") == "1,202 passed, 1 failed, 3 skipped"
    )

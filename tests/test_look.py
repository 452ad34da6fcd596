"""The page of `decoders look`: its numbers are the model's, others' text stays text, and nothing half is left."""

import base64
import json
import math
import os
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import torch

from decoders import look, model_class, read_config, tokenize, weights
from decoders.cli import main
from decoders.compare.formula import STAGES
from decoders.look import attribution, diagram, drawing, plots
from decoders.look import content as shown_content
from decoders.look.source import source as source_of
from examples import diary
from tests.families import FAMILIES, GPT_NEO, PHI, inputs

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
NAMES = [f"tiny-{name}" for name in ("gpt-neo", "openai-gpt", "phi", "phi3", "persimmon", "fuyu")]


@pytest.fixture(scope="module", params=NAMES)
def tiny(request):
    """A trained checkpoint: model and tokenizer."""
    folder = CHECKPOINTS / request.param
    return weights.load(model_class(read_config(folder)), folder), tokenize.load(folder)


class Parts(HTMLParser):
    """The tags of a page, and the text of its data."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = ("id", "data") in attributes

    def handle_data(self, text):
        self.data += text if self.inside else ""


def content(page: str) -> dict:
    return json.loads(Parts(page).data)


def unpacked(output: str) -> numpy.ndarray:
    return (numpy.frombuffer(base64.b64decode(output), dtype=numpy.uint8) / 255) ** 2


# ---- What it says ----


def test_numbers_of_the_page_are_the_models(tiny):
    model, tokenizer = tiny
    model = model.float()
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a fox. The fox")])
    shown, found = look.data(look.Run(model, ids, tokenizer, prompt=5, name="tiny"))
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    chances, (T, f) = logits.softmax(-1), (ids.shape[1], found.f)
    assert [row[0] for row in shown["next"]["ids"]] == chances.argmax(-1).tolist()
    for t, (row, likely) in enumerate(zip(shown["next"]["ids"], shown["next"]["p"], strict=True)):
        assert likely == pytest.approx(chances[t, row].tolist(), rel=1e-3)
    assert shown["given"]["p"][0] is None
    assert shown["given"]["p"][1:] == pytest.approx(chances[range(T - 1), ids[0, 1:]].tolist(), rel=1e-3)
    assert shown["given"]["rank"][3] == 1 + sum(chances[2] > chances[2, ids[0, 3]])
    assert shown["given"]["bits"][3] == pytest.approx(-math.log2(chances[2, ids[0, 3]]), rel=1e-3)
    output = unpacked(shown["attention"]["bytes"]).reshape(len(f.layers), f.H, T, T)
    exact = torch.stack([found[f"layers.{i}.weights"][0] for i in f.layers])
    assert numpy.abs(output**0.5 - exact.sqrt().numpy()).max() <= 0.51 / 255
    assert numpy.allclose(shown["lens"][-1]["p"], shown["next"]["p"], rtol=2e-3, atol=1e-9)
    assert [row[0] for row in shown["lens"][-1]["ids"]] == chances.argmax(-1).tolist()
    values = numpy.array(shown["writers"]["values"])
    assert values.sum(0) == pytest.approx(shown["writers"]["logits"], abs=0.05)
    assert shown["writers"]["targets"] == [*ids[0, 1:].tolist(), logits[-1].argmax()]
    entry = shown["values"]["mlp_out"]
    assert entry["rms"][2][4] == pytest.approx(
        found["layers.2.mlp_out"][0, 4].square().mean().sqrt().item(), rel=1e-3
    )
    assert entry["largest"][1][3] == pytest.approx(
        found["layers.1.mlp_out"][0, 3].abs().max().item(), rel=1e-3
    )
    strip = numpy.frombuffer(base64.b64decode(entry["strips"][1]), dtype=numpy.int8).reshape(T, -1)
    part = found["layers.1.mlp_out"][0, 3].view(32, -1)  # 96 or 128 numbers
    part = part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0] / part.abs().max()
    assert strip[3] / 127 == pytest.approx(part.tolist(), abs=0.004)
    text = "".join(shown["words"][id] for id in shown["ids"])
    assert (
        text.replace("|ENDOFTEXT|", "").strip().lower() == "once upon a time there was a fox. the fox"
        or "openai" in f.family
    )


def test_words_of_the_page_spell_the_text(tiny):
    _, tokenizer = tiny
    ids = tokenizer.encode("Once upon a time, there was")
    spelled = "".join(look.word(tokenizer, id) for id in ids)
    assert tokenizer.decode(ids, True).strip().replace(" ,", ",") in spelled.replace(" ,", ",")
    assert look.word(tokenizer, 10**6) == "[1000000]" and look.word(None, 12) == " 12"


def test_64_tokens_take_less_than_2_megabytes(tiny):
    model, tokenizer = tiny
    ids = torch.randint(10, 500, (64,), generator=torch.Generator().manual_seed(1))
    assert len(look.page([look.Run(model, ids, tokenizer)]).encode()) < 2e6


def test_of_a_large_model_the_largest_are_kept(monkeypatch, tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a fox. The fox")])
    whole, found = look.data(look.Run(model, ids, tokenizer))
    for name, value in (("WHOLE", 200), ("PARTS", 40), ("MANY", 20)):
        monkeypatch.setattr(shown_content, name, value)
    shown, _ = look.data(look.Run(model, ids, tokenizer))
    output, T = shown["attention"], ids.shape[1]
    assert output["kind"] == "largest" and 2 <= output["kept"] <= 8 and 0 < output["lost"] < 1
    keys = numpy.frombuffer(base64.b64decode(output["keys"]), dtype="<i2").reshape(
        len(found.f.layers), found.f.H, T, -1
    )
    weight = unpacked(output["bytes"]).reshape(keys.shape)
    exact = found["layers.1.weights"][0, 2, T - 1].float()
    assert exact[torch.tensor(keys[1, 2, -1].copy()).long()].numpy() == pytest.approx(
        weight[1, 2, -1], abs=0.01
    )
    assert exact.topk(output["kept"]).indices.tolist() == keys[1, 2, -1].tolist()
    assert not shown["writers"]["by_head"] and "layers.0.heads" in shown["writers"]["names"]
    assert numpy.array(shown["writers"]["values"]).sum(0) == pytest.approx(
        shown["writers"]["logits"], abs=0.05
    )
    assert shown["values"]["out"]["first"] == T - 20 // len(found.f.layers)
    assert (
        shown["values"]["out"]["rms"][0]
        == whole["values"]["out"]["rms"][0][shown["values"]["out"]["first"] :]
    )
    assert len(shown["lens"][0]["ids"][0]) == 3


def test_the_last_tokens_of_a_long_text(family):
    """As the whole text shows them; what is read of the others is told as one number."""
    model, (ids, _) = family.model(dtype=torch.float64), inputs(101)
    whole, _ = look.data(look.Run(model, ids[0]))
    shown, _ = look.data(look.Run(model, ids[0], last=8, prompt=20))
    assert shown["start"] == 15 and shown["ids"] == whole["ids"][15:] and shown["prompt"] == 5
    assert shown["next"]["ids"] == whole["next"]["ids"][15:]
    L, H = whole["layers"], whole["heads"]
    big = unpacked(whole["attention"]["bytes"]).reshape(L, H, 23, 23)
    small = unpacked(shown["attention"]["bytes"]).reshape(L, H, 8, 8)
    earlier = unpacked(shown["attention"]["earlier"]).reshape(L, H, 8)
    assert small == pytest.approx(big[:, :, 15:, 15:], abs=1e-6)
    assert earlier == pytest.approx(big[:, :, 15:, :15].sum(-1), abs=0.03)
    assert [len(row) for row in shown["writers"]["values"]] == [8] * len(shown["writers"]["names"])


def test_a_mask_cannot_be_cut():
    """It was silently left away."""
    ids, mask = inputs(101, padded=True)
    with pytest.raises(ValueError, match="--last cannot cut a text with attention_mask"):
        look.data(look.Run(PHI.model(), ids[0], last=8, inputs={"attention_mask": mask[:1]}))


def test_windows_and_padding_are_told():
    _, mask = inputs(101, padded=True)
    model, (ids, _) = GPT_NEO.model(), inputs(101)
    shown, _ = look.data(look.Run(model, ids[0], inputs={"attention_mask": mask[:1]}))
    assert shown["windows"] == [None, 5, 5] and shown["padding"] == [True] * 4 + [False] * 19
    assert len(shown["diagrams"]) == 2 and [d["window"] for d in shown["diagrams"]] == [None, 5]


def test_nan_is_told_where_it_begins():
    model, (ids, _) = PHI.model(), inputs(101)
    model.model.layers[1].mlp.fc2.weight.data[3] = math.nan
    shown = content(look.page([look.Run(model, ids[0])]))["runs"][0]
    assert shown["bad"] == "layers.1.mlp_out is not finite at token 0: it begins there"
    assert shown["next"]["p"][0][0] in (0, None) and None in shown["writers"]["logits"]


# ---- Two runs ----


def test_the_same_run_twice_does_not_differ(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("Once upon a time")
    output = content(look.page([look.Run(model, ids, tokenizer), look.Run(model, ids, tokenizer)]))[
        "compared"
    ]
    assert output["pairs"] == [[i, i] for i in range(len(ids))] and output["remarks"] == []
    assert (
        max(output["bits"]) == 0
        and max(map(max, output["residual"])) == 0
        and max(map(max, output["heads"])) == 0
    )


def test_texts_of_one_length_are_compared_place_by_place(family):
    model, (ids, _) = family.model(dtype=torch.float64), inputs(101)
    other = ids[0].clone()
    other[9] = (other[9] + 1) % 101
    output = content(look.page([look.Run(model, ids[0]), look.Run(model, other)]))["compared"]
    assert max(output["bits"][:9]) < 1e-12 and min(output["bits"][9:12]) > 0
    assert output["residual"][0][8] == 0 and output["residual"][0][9] > 0 and output["residual"][-1][15] > 0
    with torch.no_grad():
        p, q = (model(x[None]).logits[0, 12].log_softmax(-1) for x in (ids[0], other))
    assert output["bits"][12] == pytest.approx((p.exp() * (p - q)).sum().item() / math.log(2), rel=1e-3)


def test_other_lengths_are_compared_where_they_agree():
    folder = CHECKPOINTS / "tiny-phi"
    model, tokenizer = weights.load(model_class(read_config(folder)), folder), tokenize.load(folder)
    texts = [
        tokenizer.encode(text)
        for text in ("Once upon a time there was a fox.", "Once upon a time there was an old fox.")
    ]
    output = content(look.page([look.Run(model, ids, tokenizer) for ids in texts]))["compared"]
    assert (
        all(texts[0][i] == texts[1][j] for i, j in output["pairs"])
        and len(output["pairs"]) >= len(texts[0]) - 2
    )
    assert "heads" not in output and "other lengths" in output["remarks"][0]
    neo = CHECKPOINTS / "tiny-gpt-neo"
    second = look.Run(
        weights.load(model_class(read_config(neo)), neo),
        tokenize.load(neo).encode("Once upon a time"),
        tokenize.load(neo),
    )
    output = content(look.page([look.Run(model, tokenizer.encode("Once upon a time"), tokenizer), second]))[
        "compared"
    ]
    assert "bits" not in output and "residual" not in output and not output["writers"]
    assert "The models have other vocabularies, so their chances are not compared" in output["remarks"]


# ---- In a notebook ----


def framed(markup: str) -> str:
    """The page in the frame that a notebook is given."""

    class Frame(HTMLParser):
        def handle_starttag(self, tag, attributes):
            self.found = tag, dict(attributes)

    frame = Frame()
    frame.feed(markup)
    tag, attributes = frame.found
    assert tag == "iframe" and "allow-same-origin" not in attributes["sandbox"]
    return attributes["srcdoc"]


def test_a_trace_shows_itself_in_a_frame(tiny):
    """As `display(HTML(page))` did not: it restyled the whole notebook."""
    model, tokenizer = tiny
    ids = tokenizer.encode("Once upon a time")
    found = look.trace(model, ids, tokenizer=tokenizer)
    page = framed(found._repr_html_())
    assert found._repr_html_().count("<") == 2  # the frame alone
    shown, _ = look.data(look.Run(model, ids, tokenizer))
    assert content(page)["runs"][0] == json.loads(json.dumps(shown))
    written = content(page)["runs"][0]["words"]
    assert "".join(written[str(id)] for id in ids).strip().lower().endswith("once upon a time")
    assert "tokens; embeddings, " in repr(found)


def test_a_trace_of_few_stages_or_many_tokens_has_no_page(family):
    model, (ids, _) = family.model(), inputs(101)
    assert look.trace(model, ids[0], only=["out"])._repr_html_() is None
    assert look.trace(model, ids[0]).patch({"layers.0.out": 0.0})._repr_html_().startswith("<iframe")


def test_figures_show_the_numbers_of_the_trace(tiny):
    pytest.importorskip("matplotlib")
    model, tokenizer = tiny
    ids = tokenizer.encode("Once upon a time there was a fox")
    found = look.trace(model, ids, tokenizer=tokenizer)
    plot = found.plot.attention(1, 2).axes[0]
    shown = plot.images[0].get_array()
    assert numpy.array_equal(shown, found["layers.1.weights"][0, 2].float().numpy())
    words = [label.get_text() for label in plot.get_yticklabels()]
    assert len(words) == len(ids) and words == [look.word(tokenizer, id).replace(" ", "␣") for id in ids]
    lens = found.plot.lens().axes[0]
    layers = len(found.f.layers)
    assert lens.images[0].get_array().shape == (layers + 1, len(ids))
    p = found["logits"][0].float().softmax(-1).max(-1).values
    assert numpy.allclose(lens.images[0].get_array()[-1], p.numpy(), rtol=1e-5)
    assert len(lens.texts) == (layers + 1) * len(ids)
    norms = found.plot.norms().axes[0].lines[0].get_ydata()
    first = [found["embeddings"], *(found[f"layers.{i}.out"] for i in found.f.layers)]
    assert numpy.allclose(norms, [float(x[0, 0].float().norm()) for x in first], rtol=1e-5)
    with pytest.raises(ValueError, match="there is no layer 99, head 0: layers are 0 to"):
        found.plot.attention(99, 0)


def test_figures_bear_any_token_and_one_alone(family):
    """Dollar signs are formulas to matplotlib; ids stand for tokens without a tokenizer."""
    pytest.importorskip("matplotlib")
    found = look.trace(family.model(), [5])
    for figure in (found.plot.attention(0, 0), found.plot.lens(), found.plot.norms()):
        figure.canvas.draw()
    assert plots.visible("$x^$ \n") == r"\$x^\$␣↵"


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install '\.\[plot\]'"):
        look.trace(PHI.model(), [5, 6]).plot.norms()


# ---- Text stays text ----

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)> "quotes" \' & \u2028 <!--'


def test_others_text_is_never_markup():
    folder = CHECKPOINTS / "tiny-phi"
    model, tokenizer = weights.load(model_class(read_config(folder)), folder), tokenize.load(folder)
    run = look.Run(model, tokenizer.encode(HOSTILE), tokenizer, name=HOSTILE)
    plain = look.Run(model, tokenizer.encode("Once"), tokenizer, name="plain")
    page, expected = look.page([run], title=HOSTILE), look.page([plain])
    assert Parts(page).tags == Parts(expected).tags  # not one tag more
    assert content(page)["runs"][0]["name"] == HOSTILE
    output = "".join(content(page)["runs"][0]["words"][str(id)] for id in run.ids)
    assert output == HOSTILE.replace("\u2028", r"\xe2\x80\xa8")  # three tokens, none of them a character
    assert page.count("<script") == 2 and "://" not in page.replace("http://www.w3.org/2000/svg", "")


# ---- The block ----


def test_every_box_has_its_lines_and_its_stage(family):
    model = family.model()
    known = {stage.name for stage in STAGES}
    for layer in range(2):
        plan, source = diagram.plan(model, layer), source_of(model, layer)
        lines = dict(source.lines)
        assert source.file == f"decoders/{family.module.__name__.rpartition('.')[2]}.py"
        file = Path(family.module.__file__).read_text().splitlines()
        assert all(file[n - 1] == line for n, line in source.lines)
        assert {box.key for box in plan.boxes} == set(source.boxes) and {
            box.stage for box in plan.boxes
        } <= known
        for key, spans in source.boxes.items():
            assert spans and all(a <= b and a in lines and b in lines for a, b in spans), key
        for key, module in diagram.modules_of(model, layer).items():
            if key not in source.boxes:  # Phi has one norm
                continue
            name = diagram.Formula(model.config, {}).parts[key].rpartition(".")[2]
            assert any(name in lines[n] for a, b in source.boxes[key] for n in range(a, b + 1)), key
            n, m = attribution.matrix_of(module).shape if module.weight.dim() == 2 else (0, 0)
            size = next(box.size for box in plan.boxes if box.key == key)
            assert size == f"{m:,} → {n:,}" if n else "48" in size or "12" in size
        keys = {box.key for box in plan.boxes}
        assert all(a in keys | {"in"} and b in keys for a, b in plan.edges)


def test_a_block_is_drawn_as_it_is_built():
    plans = {family.name: diagram.plan(family.model()) for family in FAMILIES}
    after = {name: {(a, b) for a, b in plan.edges} for name, plan in plans.items()}
    assert ("norm_1", "up") in after["phi"] and ("o", "add_2") in after["phi"]  # side by side
    assert ("in", "qkv") in after["openai-gpt"] and ("add_1", "norm_1") in after["openai-gpt"]  # norms behind
    for name in ("gpt_neo", "phi3", "persimmon"):
        assert {("in", "norm_1"), ("add_1", "norm_2"), ("norm_2", "up"), ("add_1", "add_2")} <= after[name]
    rotated = {
        name: [box.rotated for box in plan.boxes if box.key == "q_rotary"] for name, plan in plans.items()
    }
    assert rotated["gpt_neo"] == rotated["openai-gpt"] == [] and rotated["phi"] == [0.5]
    assert any("√" not in box.label for box in plans["gpt_neo"].boxes if box.key == "scores")
    assert drawing.drawing(PHI.model(), title="<script>").count("<script>") == 0


# ---- The command ----


def run(*arguments: str, capsys) -> tuple[int, str]:
    status = main(["look", *arguments])
    output = capsys.readouterr()
    assert output.out == ""
    return status, output.err


@pytest.mark.parametrize("name", NAMES)
def test_the_command_writes_a_page(name, tmp_path, capsys):
    page = tmp_path / "page.html"
    status, output = run(
        str(CHECKPOINTS / name), "Once upon a time", "-o", str(page), "--max-new-tokens", "5", capsys=capsys
    )
    shown = content(page.read_text())["runs"][0]
    assert status == 0 and shown["name"] == name and 1 <= len(shown["ids"]) - shown["prompt"] <= 5
    assert output.startswith(f"{page}: {len(shown['ids'])} tokens") and [
        file.name for file in tmp_path.iterdir()
    ] == ["page.html"]


def test_a_picture_and_its_places(tmp_path, capsys):
    page, folder = tmp_path / "page.html", CHECKPOINTS / "tiny-fuyu"
    run(
        str(folder),
        "where is the red circle?",
        "--image",
        str(folder / "shapes.png"),
        "-o",
        str(page),
        capsys=capsys,
    )
    shown = content(page.read_text())["runs"][0]
    picture = shown["picture"]
    assert (picture["width"], picture["height"], picture["patch"], picture["columns"]) == (150, 120, 30, 5)
    assert len(picture["tokens"]) == 20 and all(
        shown["ids"][i] == read_config(folder)["image_token_id"] for i in picture["tokens"]
    )
    assert len(picture["places"]) == 1 and len(picture["places"][0]) == 4
    assert shown["title"] == "where is the red circle?" and "<box>" in shown["words"].values()
    png = base64.b64decode(picture["source"].removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG")


def test_two_prompts_and_two_models(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.html"
    model = str(CHECKPOINTS / "tiny-phi3")
    run(model, "Once upon a time", "--with", "One day", "-o", str(page), capsys=capsys)
    assert [one["title"] for one in content(page.read_text())["runs"]] == ["Once upon a time", "One day"]
    run(
        model,
        "Tell me a story",
        "--chat",
        "--with-model",
        str(CHECKPOINTS / "tiny-phi"),
        "-o",
        str(page),
        capsys=capsys,
    )
    assert [one["name"] for one in content(page.read_text())["runs"]] == ["tiny-phi3", "tiny-phi"]
    status, output = run(model, "a", "--with", "b", "--with-model", model, "-o", str(page), capsys=capsys)
    assert status == 2 and "a page shows two runs at most" in output


def test_bad_input_is_told_in_a_line(tmp_path, capsys):
    model, page = str(CHECKPOINTS / "tiny-persimmon"), str(tmp_path / "page.html")
    cases = {
        (
            model,
            "Once",
            "-o",
            str(tmp_path / "none" / "page.html"),
        ): "cannot be written: give a file in a folder that exists",
        (model, "time " * 5000, "-o", page): "are more than the 512 of a page: with --last 256 all are read",
        (model, "Once", "-o", page, "--last", "0"): "--last must be from 1 to 512, not 0",
        (
            model,
            "Once",
            "-o",
            page,
            "--image",
            str(CHECKPOINTS / "tiny-fuyu" / "shapes.png"),
        ): "takes no pictures",
        (str(tmp_path), "Once", "-o", page): "config.json",
        (
            str(CHECKPOINTS / "tiny-gpt-neo"),
            "",
            "-o",
            page,
        ): "the prompt is empty: there is no token to look at",
    }
    for arguments, expected in cases.items():
        status, output = run(*arguments, capsys=capsys)
        assert status == 2 and expected in output and output.count("\n") == 1, (arguments, output)
    assert list(tmp_path.iterdir()) == []


def test_a_long_text_by_its_last_tokens(tmp_path, capsys):
    page = tmp_path / "page.html"
    status, output = run(
        str(CHECKPOINTS / "tiny-persimmon"),
        "time " * 700,
        "--last",
        "30",
        "--max-new-tokens",
        "3",
        "-o",
        str(page),
        capsys=capsys,
    )
    shown = content(page.read_text())["runs"][0]
    assert status == 0 and len(shown["ids"]) == 30 and shown["start"] > 650 and shown["prompt"] == 27


def test_a_folder_without_a_tokenizer_shows_ids(tmp_path, capsys):
    folder, page = tmp_path / "model", tmp_path / "page.html"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(CHECKPOINTS / "tiny-phi" / name, folder / name)
    status, output = run(str(folder), "12 5 7", "-o", str(page), "--max-new-tokens", "2", capsys=capsys)
    shown = content(page.read_text())["runs"][0]
    assert (
        status == 0
        and "tokens are shown as ids" in output
        and shown["ids"][:3] == [12, 5, 7]
        and shown["words"]["12"] == " 12"
    )
    status, _ = run(str(folder), "12 5 7", "--with", "12 5 8", "-o", str(page), capsys=capsys)
    assert status == 0 and [one["ids"][2] for one in content(page.read_text())["runs"]] == [7, 8]
    status, output = run(str(folder), "hello", "-o", str(page), capsys=capsys)
    assert status == 2 and 'give ids, as in "12 5 7"' in output
    status, output = run(str(folder), "12 5000", "-o", str(page), capsys=capsys)
    assert status == 2 and "token ids are 0 to 969 here, not 5000" in output


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_the_old_page(tmp_path, monkeypatch, stop):
    page = tmp_path / "page.html"
    look.write(page, "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(stop))
    with pytest.raises(stop):
        look.write(page, "new")
    assert page.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["page.html"]


# ---- Training ----


def test_a_diary_of_training(tmp_path):
    """Pages as the model is at each time, an index of all that there are, and the model goes on training."""
    folder = CHECKPOINTS / "tiny-phi"
    model, tokenizer = weights.load(model_class(read_config(folder)), folder).float(), tokenize.load(folder)
    kept = diary.Diary(tmp_path / "diary", model.train(), tokenizer, HOSTILE, every=2, name=HOSTILE)
    assert [step for step in range(6) if kept.is_due(step, 5)] == [0, 2, 4, 5]
    kept.write(0, [])
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    kept.write(2, [3.0, 2.5])
    assert model.training
    names = sorted(file.name for file in (tmp_path / "diary").iterdir())
    assert names == ["index.html", "step-000000.html", "step-000002.html"]
    first, second = (content((tmp_path / "diary" / name).read_text())["runs"][0] for name in names[1:])
    assert first["ids"] == second["ids"] and first["next"]["p"] != second["next"]["p"]
    page = Parts((tmp_path / "diary" / "index.html").read_text())
    assert json.loads(page.data) == {
        "pages": [[0, "step-000000.html"], [2, "step-000002.html"]],
        "losses": [3.0, 2.5],
    }
    assert page.tags.count("script") == 2 and page.tags.count("img") == 0
    with pytest.raises(ValueError, match="holds a diary already: name another folder"):
        diary.Diary(tmp_path / "diary", model, tokenizer, "Once", every=2, name="other")

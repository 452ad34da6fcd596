"""Any checkpoint as a plain one, and Phi and Phi-3 as a GGUF file that others read."""

import argparse
import json
import shutil

import pytest
import torch

from decoders import formats, model_class, read_config, tokenize, weights
from decoders.cli import convert
from decoders.cli.commands import GGUF_TYPES, main
from decoders.compare.kit import redraw
from decoders.formats import gguf_writer
from tests import folders
from tests.conftest import ROOT
from tests.families import FAMILIES

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
gguf_files = pytest.importorskip("tests.gguf_files")

TINY = ROOT / "checkpoints"
PHI = {f.name: f for f in FAMILIES if f.name in ("phi", "phi3")}
HUB = ["phi-2", "phi-4", "phi-4-mini", "phi-3-mini-4k", "phi-3.5-mini", "phi-3-mini-128k-april-2024"]
VECTORS = {"phi-3-mini-4k": "phi-3-mini", "phi-3-mini-128k-april-2024": "phi-3"}
TEXTS = [
    "Once upon a time",
    " a <|end|> \n b",
    "<|user|>\nHi<|end|>\n<|assistant|>\n",
    "x</s> y\t\tz   ",
    "é日🤗",
]


def converted(model, output, **options):
    """`decoders convert MODEL OUTPUT` with these options; what is refused is raised."""
    given = {"dtype": None, "packaging": None, "type": None, "force": False, **options}
    assert convert.run(argparse.Namespace(model=str(model), output=str(output), **given)) == 0
    return output


# ---- To GGUF -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
def test_blocks_are_those_of_llama_cpp(kind, scale):
    x = torch.randn(500, 64) * scale
    x[0], x[1], x[2] = 0, -x[1].abs(), torch.arange(64) / 2  # nothing, all negative, halves to be rounded
    x[3, :32] = torch.tensor([1.0, -1.0] * 16)  # two that are furthest from zero
    own = gguf_writer.kind_named(kind)
    ours = gguf_writer.quantize(x.view(-1, own.block), own).contiguous().view(torch.uint8).flatten()
    theirs = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType[kind]).view(np.uint8).flatten()
    assert torch.equal(ours, torch.from_numpy(theirs))


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("name", ["tiny-phi", "tiny-phi3"])
def test_the_gguf_package_reads_every_tensor_back(tmp_path, name, kind):
    """Bit for bit, whatever type each has."""
    file = converted(TINY / name, tmp_path / "model.gguf", packaging="gguf", type=kind)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found, plain = weights.tensors(file), weights.tensors(TINY / name)
    assert found.keys() == plain.keys() and len(theirs) == len(plain)
    for hub, tensor in found.items():
        stored = theirs[gguf_files.gguf_name(hub)]
        wanted = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
        assert torch.equal(tensor, torch.from_numpy(wanted).view(tensor.shape)), hub
        if kind in ("F32", "F16"):  # which hold float16
            assert torch.equal(tensor, plain[hub].float()), hub
    ours, hubs = tokenize.load(file), tokenize.load(TINY / name)
    assert all(ours.encode(text) == hubs.encode(text) for text in TEXTS)
    stored, wanted = (formats.modern(read_config(path)) for path in (file, TINY / name))
    assert {key: wanted.get(key) for key in stored if key != "architectures"} == {
        key: value for key, value in stored.items() if key != "architectures"
    }


def test_metadata_is_what_llama_cpps_converter_writes(tmp_path):
    """Keys and types of a Phi-3 with longrope, window and partial rotary, against the package's own writer."""
    scaling = {"type": "longrope", "short_factor": [1.0, 1.05], "long_factor": [1.3, 2.5]}
    changes = {"rope_scaling": scaling, "original_max_position_embeddings": 8, "max_position_embeddings": 40, "sliding_window": 5}  # fmt: skip
    family = PHI["phi3"]
    D = family.tiny.get("head_dim") or family.tiny["hidden_size"] // family.tiny["num_attention_heads"]
    model = family.model(**changes, partial_rotary_factor=4 / D)
    model.config_json = {}
    config = {"model_type": "phi3", **model.config.to_dict()}
    metadata = formats.gguf_export.model_metadata(config, "Model", "F32")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    entries = formats.gguf_entries(config, shapes, "F32", lambda name: model.get_parameter(name).detach())
    gguf_files.write(tmp_path / "ours.gguf", metadata, entries)
    writer = gguf_files.new_writer(tmp_path / "theirs.gguf", config)
    for name, p in model.named_parameters():
        gguf_files.add_tensor(writer, gguf_files.gguf_name(name), p.detach(), "F32")
    gguf_files.finish(writer, tmp_path / "theirs.gguf")
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    for key, field in theirs.fields.items():
        if key.startswith(("phi3.", "general.architecture")):
            assert (
                ours.fields[key].types == field.types and ours.fields[key].contents() == field.contents()
            ), key
    named = {tensor.name: tensor for tensor in ours.tensors}
    assert named.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert named[tensor.name].tensor_type == tensor.tensor_type
        assert (named[tensor.name].data == tensor.data).all(), tensor.name


def test_rows_that_blocks_do_not_divide_stay_16_bits(tmp_path):
    entries = formats.gguf_entries({"model_type": "phi3"}, {"model.layers.0.mlp.down_proj.weight": (8, 48)}, "Q8_0", lambda name: torch.randn(8, 48))  # fmt: skip
    assert entries[0].kind.name == "F16" and entries[0].name == "blk.0.ffn_down.weight"


@pytest.mark.parametrize("name", HUB)
def test_real_vocabularies_come_back(tmp_path, data, name):
    """Hub folder -> GGUF -> hub folder: ids of the recorded vectors, here and in Transformers."""
    transformers = pytest.importorskip("transformers")
    folder = data / "hub" / name
    config = read_config(folder)
    kind = {"phi": "phi2", "phi3": "phi3"}[config["model_type"]]
    known = {**convert.vocabulary(folder), "rows": config["vocab_size"]}
    metadata = {"general.architecture": kind, **formats.gguf_export.vocabulary_metadata(**known)}
    gguf_files.write(tmp_path / "model.gguf", metadata, [])
    rows = json.loads((data / "vectors" / f"{VECTORS.get(name, name)}.json").read_text())["rows"]
    ours = tokenize.load(tmp_path / "model.gguf")
    ours.save(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    again, theirs = (
        tokenize.load(tmp_path / "hub"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hub"),
    )
    for row in rows:
        for tokenizer in (ours, again):
            assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"], row["text"]
            assert tokenizer.encode(row["text"]) == row.get("ids_hf_default", row["ids"]), row["text"]
            assert tokenizer.decode(row["ids"]) == row["decoded"]
        assert theirs.encode(row["text"], add_special_tokens=False) == row["ids"], row["text"]
    messages = [{"role": "user", "content": "Hi"}]
    assert again.chat(messages) == ours.chat(messages) == tokenize.load(folder).chat(messages)


LONGROPE = {"type": "longrope", "short_factor": [1.0 + i / 20 for i in range(9)], "long_factor": [1.0 + 1.5 * i for i in range(9)]}  # fmt: skip
LLAMA = {  # what differs from the tiny checkpoint -> how far apart logits may be
    "longrope and partial rotary": ("tiny-phi3", 2e-6, {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32, "max_position_embeddings": 256, "sliding_window": None}),
    "tied": ("tiny-phi3", 2e-6, {"tie_word_embeddings": True, "sliding_window": None}),
    "grouped-query attention, another base": ("tiny-phi", 5e-4, {"num_key_value_heads": 2, "rope_theta": 5000.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", LLAMA)
def test_llama_cpp_loads_it_and_gives_the_same_logits(tmp_path, case):
    """With keys and values in float32; its tanh GELU is a table in float16. Where it is installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    name, near, changes = LLAMA[case]
    cls = model_class(read_config(TINY / name))
    config = {**json.loads((TINY / name / "config.json").read_text()), **changes}
    model = redraw(cls(cls.config_class.from_dict(formats.modern(config, config["model_type"]))), 0).eval()
    model.config_json, model.generation_config = {}, {}
    weights.save(model, tmp_path / "plain", tokenize.load(TINY / name))
    file = converted(tmp_path / "plain", tmp_path / "model.gguf", packaging="gguf", type="F32")
    ids = torch.randint(3, 900, (50,))
    theirs = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)
    theirs.eval(ids.tolist())
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    difference = torch.tensor(theirs.scores[:50]) - ours
    assert difference.norm() < near * ours.norm()


def test_what_gguf_has_no_place_for_is_refused(tmp_path):
    cases = {
        "GGUF has no gpt_neo": TINY / "tiny-gpt-neo",
        "GGUF has no persimmon": TINY / "tiny-persimmon",
    }
    for message, folder in cases.items():
        with pytest.raises(ValueError, match=message):
            converted(folder, tmp_path / "model.gguf", packaging="gguf")
    for key, value in (("hidden_act", "relu"), ("head_dim", 7)):
        config = {"model_type": "phi3", **PHI["phi3"].config().to_dict(), key: value}
        with pytest.raises(ValueError, match=f"GGUF has no place for {key}"):
            formats.gguf_export.model_metadata(config, "Model", "F32")
    too_large = torch.full((1, 32), 70000.0)
    entry = gguf_writer.Entry("x", (1, 32), gguf_writer.kind_named("F16"), lambda: too_large)
    with pytest.raises(ValueError, match="x holds numbers that F16 cannot hold"):
        gguf_files.write(tmp_path / "model.gguf", {}, [entry])
    assert not list(tmp_path.iterdir())


# ---- To a plain checkpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-phi", "tiny-phi3"])
def test_there_and_back_is_the_same_checkpoint(tmp_path, name):
    """Tensors, config and ids; Transformers loads it, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    file = converted(TINY / name, tmp_path / "model.gguf", packaging="gguf", type="F16")
    folder = converted(file, tmp_path / "plain", dtype="float16")
    found, wanted = weights.tensors(folder), weights.tensors(TINY / name)
    assert found.keys() == wanted.keys()
    assert all(found[k].dtype == wanted[k].dtype and torch.equal(found[k], wanted[k]) for k in wanted)
    assert read_config(folder) == read_config(TINY / name)
    ours, hubs = tokenize.load(folder), tokenize.load(TINY / name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == hubs.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == hubs.encode(text, add_special_tokens=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([hubs.encode("Once upon a time")])
    plain = weights.load(model_class(read_config(folder)), TINY / name, dtype=torch.float32)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=2e-5, rtol=0)


def test_the_command_line(tmp_path, capsys):
    file, folder = str(tmp_path / "m.gguf"), str(tmp_path / "plain")
    assert main(["convert", str(TINY / "tiny-phi3"), file, "--packaging", "gguf", "--type", "Q8_0"]) == 0
    assert main(["convert", file, folder, "--dtype", "bfloat16"]) == 0
    assert main(["generate", folder, "Once upon", "--max-new-tokens", "5"]) == 0
    plain = capsys.readouterr().out
    assert main(["generate", file, "Once upon", "--max-new-tokens", "5", "--dtype", "bfloat16"]) == 0
    assert plain and capsys.readouterr().out == plain
    assert main(["convert", file, f"{folder}2", "--type", "Q8_0"]) == 2
    assert main(["convert", str(TINY / "tiny-gpt-neo"), f"{file}2", "--packaging", "gguf"]) == 2
    assert "GGUF has no gpt_neo" in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.gguf", "plain"]


def test_what_is_there_is_not_written_over_but_by_force(tmp_path, capsys):
    file, folder, model = tmp_path / "m.gguf", tmp_path / "mine", str(TINY / "tiny-phi")
    file.write_text("mine")
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    for output, why in ((file, "exists"), (folder, "is not empty")):
        assert main(["convert", model, str(output)]) == 2
        said = f"error: {output} {why}: give another OUT, remove it, or write over it with --force\n"
        assert capsys.readouterr().err == said
    assert file.read_text() == (folder / "config.json").read_text() == "mine"
    for output in (file, folder):
        assert main(["convert", model, str(output), "--force"]) == 0
        assert weights.tensors(output).keys() == weights.tensors(model).keys()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.json").write_text("mine")
    no_folder = tmp_path / "notes" / "a.json"
    for output, why in ((tmp_path / "notes", "holds no checkpoint that"), (no_folder, "is no folder")):
        assert main(["convert", model, str(output), "--force"]) == 2
        assert f"error: {output} {why}" in capsys.readouterr().err
    (tmp_path / "empty" / ".saving-killed").mkdir(parents=True)
    assert main(["convert", model, str(tmp_path / "empty")]) == 0


def test_of_a_checkpoint_that_is_replaced_nothing_stays_but_what_was_never_its_own(tmp_path):
    """Its tokenizer was read as the new one's."""
    folder = shutil.copytree(TINY / "tiny-phi3", tmp_path / "mine")
    others = ("tokenizer.model", "adapter_config.json", "m.gguf", "pytorch_model-00001-of-00002.bin")
    for name in (*others, "README.md", "notes.json"):
        (folder / name).write_text("an earlier one's")
    converted(TINY / "tiny-gpt-neo", folder, force=True)
    new = converted(TINY / "tiny-gpt-neo", tmp_path / "new")
    names, expected = ({file.name for file in each.iterdir()} for each in (folder, new))
    assert names == expected | {"README.md", "notes.json", "loss.png", "training.json"}
    for name in expected:
        assert (folder / name).read_bytes() == (new / name).read_bytes()


@pytest.mark.parametrize("output", ["a/b/plain", "a/b/m.gguf"])
def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch, output):
    """It left empty folders."""

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_shards", broken)
    monkeypatch.setattr(formats, "write_gguf", broken)
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        converted(TINY / "tiny-phi", tmp_path / output)
    assert not list(tmp_path.iterdir())


def test_a_name_with_gguf_is_a_file_and_never_a_folder(tmp_path, capsys):
    model, file = str(TINY / "tiny-phi"), tmp_path / "m.gguf"
    assert main(["convert", model, str(file), "--packaging", "safetensors"]) == 2 and not file.exists()
    assert "whose name does not end in .gguf" in capsys.readouterr().err
    assert main(["convert", model, str(file)]) == 0 and file.is_file()
    folder = shutil.copytree(model, tmp_path / "folder.gguf")
    for command in ("generate", "inspect", "chat"):
        capsys.readouterr()
        assert main([command, str(folder), *(["Once"] if command == "generate" else [])]) == 2
        assert "is a folder with the name of a GGUF file: rename it" in capsys.readouterr().err


def test_a_name_with_a_dot_is_the_files_name(tmp_path):
    """phi-1.5 became phi-1.gguf, and was called phi-1 in it."""
    folder = shutil.copytree(TINY / "tiny-phi", tmp_path / "phi-1.5")
    converted(folder, tmp_path / "out", packaging="gguf")
    file = tmp_path / "out" / "phi-1.5.gguf"
    assert file.is_file() and b"phi-1.5" in file.read_bytes()
    converted(file, tmp_path / "again", packaging="gguf")
    assert (tmp_path / "again" / "phi-1.5.gguf").is_file()


def test_an_old_layout_becomes_a_plain_one(tmp_path):
    folder = tmp_path / "old"
    family = FAMILIES[0]
    model = family.model()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.tiny))
    folders.pickle_whole(folder, model.state_dict())
    plain = converted(folder, tmp_path / "plain", dtype="bfloat16")
    found = weights.tensors(plain)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    loaded = weights.load(family.cls(), plain)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p.to(torch.bfloat16), q), name


def test_the_checkpoint_itself_is_never_written_over(tmp_path):
    file = converted(TINY / "tiny-phi", tmp_path / "model.gguf", packaging="gguf", type="Q8_0")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="holds the checkpoint itself: give another OUT"):
        converted(file, tmp_path, force=True)
    with pytest.raises(ValueError, match="holds the checkpoint itself: give another OUT"):
        converted(file, file, force=True)
    folder = shutil.copytree(TINY / "tiny-phi", tmp_path / "mine")
    for output in (folder, folder / "m.gguf"):  # a folder of two packagings does not load
        with pytest.raises(ValueError, match="mine holds the checkpoint itself: give another OUT"):
            converted(folder, output, packaging="gguf")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="--type is for --packaging gguf"):
        converted(file, tmp_path / "plain", type="Q8_0")
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["model.gguf"]

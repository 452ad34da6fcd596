"""Broken and hostile folders: one clear line, no code run, nothing left behind."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile

import pytest
import torch

from decoders import cli as command
from decoders import phi, tokenize, weights
from tests import folders
from tests.conftest import ROOT
from tests.families import GPT_NEO

GOOD = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
SAFETENSORS, PICKLE, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"


class Code:
    """Unpickling it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def raw(*args, **kwargs):
    return lambda folder: (folder / SAFETENSORS).write_bytes(folders.raw_safetensors(*args, **kwargs))


def content(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def config(**changes):
    return lambda folder: folders.write_config(folder, GPT_NEO, **changes)


def state(change):
    """A well-formed file with the wrong tensors in it."""

    def write(folder):
        tensors = folders.weights_of(GPT_NEO)
        change(tensors)
        folders.safetensors_whole(folder, tensors)

    return write


def truncate(name: str, part: float, writer):
    def write(folder):
        writer(folder, folders.weights_of(GPT_NEO))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return write


def flip(name: str, at: float, writer):
    def write(folder):
        writer(folder, folders.weights_of(GPT_NEO))
        data = bytearray((folder / name).read_bytes())
        start = int(len(data) * at)
        data[start : start + 40] = b"\xff" * 40
        (folder / name).write_bytes(data)

    return write


def index(weight_map):
    text = json.dumps({"weight_map": weight_map})
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def missing_shard(folder):
    folders.safetensors_shards(folder, folders.weights_of(GPT_NEO))
    (folder / "model-00002-of-00002.safetensors").unlink()


def wrong_index(folder):
    folders.safetensors_shards(folder, folders.weights_of(GPT_NEO))
    file = folder / "model.safetensors.index.json"
    listed = json.loads(file.read_text())
    listed["weight_map"]["transformer.h.9.made.up"] = "model-00002-of-00002.safetensors"
    file.write_text(json.dumps(listed))


def pickled(value):
    return lambda folder: torch.save(value, folder / PICKLE)


def hostile_plain(folder):
    (folder / PICKLE).write_bytes(pickle.dumps({"transformer.wte.weight": Code(folder / "ran")}))


def hostile_archive(folder):
    torch.save({"transformer.wte.weight": Code(folder / "ran")}, folder / PICKLE)


def raw_pickle(instructions):
    """An archive whose names and shapes are these instructions."""

    def write(folder):
        with zipfile.ZipFile(folder / PICKLE, "w") as archive:
            archive.writestr("archive/data.pkl", instructions)
            archive.writestr("archive/version", "3\n")

    return write


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


WTE, LN, FC = "transformer.wte.weight", "transformer.h.1.ln_1.bias", "transformer.h.0.mlp.c_fc.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 525979192\n"

CASES = {
    # the folder
    "no weights at all": (lambda folder: None, "holds no weights"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "config.json is missing"),
    "weights are a directory": (lambda folder: (folder / SAFETENSORS).mkdir(), "is not a file"),
    "config is a directory": (
        lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()), "is not a file"),
    "empty file": (content(SAFETENSORS, b""), "model.safetensors is empty"),
    "LFS pointer": (content(SAFETENSORS, LFS), "Git LFS pointer.*git lfs pull"),
    "LFS pointer for the config": (content(CONFIG, LFS), "Git LFS pointer"),
    # config.json
    "config is not JSON": (content(CONFIG, b"{'vocab_size': 3}"), "config.json is not JSON"),
    "config is not UTF-8": (content(CONFIG, b"\xff\xfe{}"), "config.json is not JSON"),
    "config is a list": (content(CONFIG, b"[1, 2]"), "holds a list"),
    "config nests too deep": (content(CONFIG, b'{"a":' * 100_000), "config.json is not JSON"),
    "config holds NaN": (content(CONFIG, b'{"model_type": "gpt_neo", "hidden_size": NaN}'), "NaN is not a JSON number"),
    "config of another family": (config(model_type="llama"), "model_type 'llama' is not"),
    "negative size": (config(hidden_size=-48), "hidden_size must be a positive integer, not -48"),
    "size is text": (config(num_layers="3"), "num_layers must be a positive integer, not '3'"),
    "size is null": (config(vocab_size=None), "vocab_size must be a positive integer, not None"),
    "heads do not divide": (config(num_heads=5), "num_heads 5 does not divide"),
    "unknown activation": (config(activation_function="relu7"), "activation_function 'relu7'"),
    "attention types are nonsense": (config(attention_types={"a": 1}), "attention_types is no list"),
    "quantised": (config(quantization_config={"quant_method": "eetq"}), "quant_method 'eetq' is not supported .*: save it dequantized"),
    # safetensors
    "not safetensors": (content(SAFETENSORS, b"<html>404</html>" * 9), "not a sound safetensors file"),
    "truncated data": (truncate(SAFETENSORS, 0.8, folders.safetensors_whole), "not a sound safetensors file"),
    "truncated header": (truncate(SAFETENSORS, 0.01, folders.safetensors_whole), "not a sound safetensors file"),
    "header longer than the file": (raw(GOOD, bytes(16), length=10**6), "not a sound safetensors file"),
    "header of many terabytes": (raw(GOOD, bytes(16), length=1 << 60), "not a sound safetensors file"),
    "header cut short": (raw(GOOD, bytes(16), length=20), "not a sound safetensors file"),
    "overlapping offsets": (
        raw({**GOOD, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)), "invalid offset"),
    "offsets leave a hole": (
        raw({**GOOD, "b": {"dtype": "F32", "shape": [1], "data_offsets": [24, 28]}}, bytes(28)), "invalid offset"),
    "offsets beyond the end": (raw(GOOD, bytes(8)), "not a sound safetensors file"),
    "bytes that nobody claims": (raw(GOOD, bytes(32)), "not a sound safetensors file"),
    "shape and bytes disagree": (
        raw({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, bytes(16)), "invalid shape"),
    "negative shape": (raw({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16)), "-4"),
    "shape overflows": (
        raw({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 16]}}, bytes(16)), "overflow"),
    "unknown dtype": (raw({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)), "F99"),
    "NaN in the header": (
        raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', bytes(16)), "not a sound safetensors"),
    "a tensor twice": (
        raw(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(16)), "listed twice"),
    # indexes
    "missing shard": (missing_shard, "lacks model-00002-of-00002.safetensors, named in model.safetensors.index.json"),
    "index names what the shard lacks": (wrong_index, "lacks transformer.h.9.made.up, which model.safetensors.index"),
    "index names a file with a line break": (index({"a": "x\ny.safetensors"}), r"lacks 'x\\ny.safetensors', named in"),
    "index names a file that none can be": (index({"a": "x" * 300 + ".safetensors"}), "lacks x"),
    "index names a tensor with a line break": (index({"a\nb": "../x"}), r"places 'a\\nb' at '../x'"),
    "index points outside": (index({"a": "../x.safetensors"}), "'../x.safetensors': shards must lie in the same folder"),
    "index points to an absolute path": (index({"a": "/etc/passwd"}), "shards must lie in the same folder"),
    "index points to the folder": (index({"a": "."}), "shards must lie in the same folder"),
    "index points to a number": (index({"a": 3}), "shards must lie in the same folder"),
    "index without a map": (content("model.safetensors.index.json", b"{}"), "has no weight_map"),
    # tensors
    "a tensor is missing": (state(lambda t: t.pop(LN)), r"missing: transformer.h.1.ln_1.bias \(48,\)"),
    "a tensor is unexpected": (state(lambda t: t.update(extra=torch.zeros(2))), r"unexpected: transformer.extra \(2,\)"),
    "a name with a line break": (state(rename(LN, "a\nb\x1b[31m")), r"unexpected: 'transformer.a\\nb\\x1b\[31m"),
    "a misspelt name": (state(rename(LN, LN + "z")), "missing: .*ln_1.bias .*; unexpected: .*ln_1.biasz"),
    "wrong shape": (
        state(lambda t: t.update({FC: t[FC].t().contiguous()})),
        r"c_fc.weight is \(48, 80\) in model.safetensors, not \(80, 48\)"),
    "broadcastable shape": (state(lambda t: t.update({LN: torch.zeros(1)})), r"is \(1,\) in model.safetensors, not"),
    "another vocabulary": (state(lambda t: t.update({WTE: torch.zeros(7, 48)})), r"wte.weight is \(7, 48\)"),
    "integer weights": (state(lambda t: t.update({LN: torch.zeros(48, dtype=torch.int8)})), "ln_1.bias is int8 .* packed in a way that config.json does not name"),
    "tensors of another family": (
        state(lambda t: (t.clear(), t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}))), "missing"),
    # pickles
    "pickle with code in it": (hostile_plain, "refused: it asks for more than tensors .*nothing was run"),
    "archive with code in it": (hostile_archive, "refused: it asks for more than tensors .*nothing was run"),
    "pickle of a list": (pickled([torch.zeros(2)]), "holds a list"),
    # PyTorch 2.13 makes what these two ask for, of any size; here they ask for eight bytes and eight numbers
    "pickle of a bytearray": (
        raw_pickle(b"\x80\x02c__builtin__\nbytearray\nK\x08\x85R."),
        "refused: it asks for more than tensors .__builtin__.bytearray.; nothing was run"),
    "tensor without a file": (
        raw_pickle(b"\x80\x02ctorch\nTensor\nK\x08\x85R."),
        "refused: it asks for more than tensors .torch.Tensor.; nothing was run"),
    "pickle longer than it is": (raw_pickle(b"\x80\x04\x8e" + (99).to_bytes(8, "little") + b"abc."), "not a sound PyTorch file"),
    "old pickle longer than it is": (
        content(PICKLE, b"\x80\x04\x8e" + (99).to_bytes(8, "little") + b"abc."), "not a sound PyTorch file"),
    "pickle of nested tensors": (
        pickled({WTE: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}), "more than tensors .torch._utils._rebuild_nested_tensor"),
    "pickle of sparse tensors": (pickled({WTE: torch.ones(2, 2).to_sparse()}), "more than tensors .torch._utils._rebuild_sparse_tensor"),
    "pickle without numbers": (pickled({WTE: torch.ones(2, 2, device="meta")}), "more than tensors .*_rebuild_meta_tensor_no_storage"),
    "pickle of text": (pickled({"transformer.wte.weight": "weights"}), "is not a plain tensor"),
    "pickle of nested states": (pickled({"state_dict": {"a": torch.zeros(2)}}), "'state_dict', which is not a plain"),
    "truncated archive": (truncate(PICKLE, 0.7, folders.pickle_whole), "pytorch_model.bin is"),
    "damaged archive": (flip(PICKLE, 0.02, folders.pickle_whole), "pytorch_model.bin is"),
    "not a pickle": (content(PICKLE, b"hello world, this is no pickle"), "pytorch_model.bin is"),
    # Flax
    "not msgpack": (content("flax_model.msgpack", b"\xc1" * 50), "not a sound Flax file"),
    "truncated msgpack": (truncate("flax_model.msgpack", 0.5, folders.flax), "not a sound Flax file"),
    "msgpack of a number": (content("flax_model.msgpack", b"\x07"), "not a sound Flax file"),
    "msgpack of an unknown extension": (content("flax_model.msgpack", b"\x81\xa1a\xd4\x05\x00"), "not a sound Flax"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_broken_folder_is_one_clear_line(case, tmp_path, capsys):
    folder = tmp_path / "folder"
    folders.write_config(folder, GPT_NEO)
    spoil, message = CASES[case]
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        weights.load(GPT_NEO.cls(), folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text and len(text) < 1000
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind, or code was run"
    code = command.main(["inspect", str(folder)])
    output = capsys.readouterr()
    assert code in (1, 2) and "Traceback" not in output.err + output.out
    assert code == 1 or (output.out == "" and output.err.count("\n") == 1)


def test_all_problems_are_told_at_once(tmp_path):
    folder = folders.write_config(tmp_path, GPT_NEO)
    tensors = folders.weights_of(GPT_NEO)
    for layer in range(3):
        del tensors[f"transformer.h.{layer}.ln_2.weight"]
    tensors["transformer.surplus"] = torch.zeros(1)
    tensors[FC] = torch.zeros(2, 3)
    folders.safetensors_whole(folder, tensors)
    with pytest.raises(ValueError) as caught:
        weights.load(GPT_NEO.cls(), folder)
    text = str(caught.value)
    for part in ("transformer.h.0-2.ln_2.weight", "transformer.surplus (1,)", "c_fc.weight is (2, 3)"):
        assert part in text


def test_not_a_folder_and_not_an_id(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    for path, message in (
        (file, "is a file"),
        (tmp_path / "none", "there is no folder"),
        ("../../x", "no folder"),
    ):
        assert command.main(["generate", str(path), "Hello"]) == 2
        assert message in capsys.readouterr().err


def test_random_damage_never_crashes(tmp_path):
    """300 files with a few bytes changed: they load or raise ValueError or OSError, nothing else."""
    folder = folders.write_config(tmp_path, GPT_NEO)
    folders.safetensors_whole(folder, folders.weights_of(GPT_NEO))
    file = folder / SAFETENSORS
    good = file.read_bytes()
    header = struct.unpack("<Q", good[:8])[0]
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(good)
        for place in torch.randint(0, header + 8, (3,), generator=generator).tolist():
            data[place] = int(torch.randint(0, 256, (), generator=generator))
        file.write_bytes(data)
        try:
            weights.load(GPT_NEO.cls(), folder)
            outcomes.add("loaded")
        except (ValueError, OSError) as error:
            outcomes.add(type(error).__name__)
    assert "ValueError" in outcomes


# ---- Files that are no files


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                                  "model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device", "endless", "sparse", "folder"])
def test_only_regular_files_of_sensible_size_are_read(tmp_path, file, kind):
    """A pipe hung, a link to a device or 3 sparse GB filled the memory."""
    shutil.copytree(ROOT / "checkpoints" / "tiny-phi", tmp_path / "folder")
    path = tmp_path / "folder" / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with path.open("wb") as large:
            large.write(b'{"a": 1')
            large.truncate(3 * 2**30)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "endless": "/proc/self/mem"}[kind])
    with pytest.raises((ValueError, OSError), match=re.escape(str(path))):
        tokenize.load(tmp_path / "folder").chat([{"role": "user", "content": "x"}])
        weights.load(phi.PhiForCausalLM, tmp_path / "folder")

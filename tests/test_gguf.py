"""GGUF: tensors bit for bit those of the `gguf` package, configs and tokenizers those of the hub's folder."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

from decoders import hf, kernels, model_class, read_config, tokenize, weights
from decoders.formats import gguf as headers
from decoders.formats import (
    gguf_blocks,
    gguf_export,
    gguf_writer,
    modern,
    packagings,
    read_generation_config,
)
from decoders.phi3 import Phi3ForCausalLM
from tests.conftest import ROOT
from tests.families import FAMILIES

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
gguf_files = pytest.importorskip("tests.gguf_files")

TINY = ROOT / "checkpoints"
HUB = {  # folder -> (architecture, recorded vectors)
    "phi-2": ("phi2", "phi-2"),
    "phi-4": ("phi3", "phi-4"),
    "phi-4-mini": ("phi3", "phi-4-mini"),
    "phi-3-mini-4k": ("phi3", "phi-3-mini"),
    "phi-3.5-mini": ("phi3", "phi-3.5-mini"),
    "phi-3-mini-128k-april-2024": ("phi3", "phi-3"),
}
PHI = {f.name: f for f in FAMILIES if f.name in ("phi", "phi3")}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.05, 1.1],
    "long_factor": [1.3, 2.5, 4.75],
}


def config_of(family, **changes) -> dict:
    """Every field of a tiny config, as the hub has it."""
    return {"model_type": family.name, **family.config(**changes).to_dict()}


def written(tmp_path, family, kind="F32", **changes):
    """(a GGUF file of a tiny model with redrawn weights, the model)"""
    model = family.model(**changes)
    state = {name: p.detach() for name, p in model.named_parameters()}
    return gguf_files.write_model(tmp_path / "model.gguf", config_of(family, **changes), state, kind), model


# ---- Blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", headers.KINDS, ids=lambda n: headers.KINDS[n].name)
@pytest.mark.parametrize("way", ["compiled", "PyTorch"])
def test_every_type_is_dequantised_bit_for_bit(number, way, monkeypatch):
    """Random bytes: every bit of every field takes part."""
    if way == "PyTorch":
        monkeypatch.setattr(gguf_blocks, "COMPILED", [])
    kind = headers.KINDS[number]
    theirs = gguf.GGMLQuantizationType(number)
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.nbytes)
    rows, columns = 50, 512
    raw = np.random.default_rng(number).integers(
        0, 256, (rows, columns // kind.block * kind.nbytes), np.uint8
    )
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(gguf.dequantize(raw.view(plain), theirs).astype(np.float32))
    ours = gguf_blocks.dequantize(torch.from_numpy(raw).flatten(), kind, (rows, columns), torch.float32)
    numbers = ~wanted.isnan()
    assert torch.equal(ours.isnan(), wanted.isnan()) and numbers.float().mean() > 0.9
    assert torch.equal(ours.view(torch.int32)[numbers], wanted.view(torch.int32)[numbers])


@pytest.mark.parametrize("number", [n for n, kind in headers.KINDS.items() if kind.block > 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_compiled_formulas_give_the_bits_of_those_in_pytorch(number, dtype, monkeypatch):
    if not kernels.native.wait():
        pytest.skip(f"the kernels are {kernels.status()}")
    kind, rows, columns = headers.KINDS[number], 70, 512
    draw = torch.Generator().manual_seed(number)
    raw = torch.randint(0, 256, (rows * columns // kind.block * kind.nbytes,), generator=draw).byte()
    with monkeypatch.context() as patch:
        patch.setattr(gguf_blocks, "COMPILED", [])
        wanted = gguf_blocks.dequantize(raw, kind, (rows, columns), dtype)
    filled = torch.empty(rows, columns, dtype=dtype)
    assert kernels.dequantize_blocks(raw.view(-1, kind.nbytes), kind.name, filled)
    numbers = ~wanted.isnan()
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(filled.isnan(), ~numbers) and numbers.float().mean() > 0.9
    assert torch.equal(filled.view(whole)[numbers], wanted.view(whole)[numbers])


def test_every_sample_is_what_the_package_says(data):
    folders = sorted((data / "packed").glob("gguf-*"))
    assert len(folders) >= 9
    for folder in folders:
        found = weights.tensors(folder / "model.gguf")
        for name, wanted in load_file(folder / "expected.safetensors").items():
            assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), (folder, name)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_a_dtype_asked_for_is_the_packages_number_rounded_once(tmp_path, kind):
    family = PHI["phi3"]
    file, _ = written(tmp_path, family, kind, hidden_size=64, intermediate_size=96)
    plain = weights.load(Phi3ForCausalLM, file)
    half = weights.load(Phi3ForCausalLM, file, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    for (name, p), q in zip(plain.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(p.to(torch.bfloat16), q), name


# ---- In the bits that are there ----------------------------------------------------------------------------


def distance(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_packed_layers_hold_the_bits_of_the_file(tmp_path, name, kind):
    """No weight is rounded again: the layers give the package's numbers, and logits differ by the order of
    float32 sums."""
    family = PHI[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96} | ({"head_dim": None} if name == "phi3" else {})
    file, _ = written(tmp_path, family, kind, **sizes)
    plain = weights.load(family.cls(), file)
    packed = weights.load(family.cls(), file, packed=True)
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, kernels.Quantized)}
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert layers.keys() == linear | {"model.embed_tokens.table"}
    for n, layer in layers.items():
        assert torch.equal(layer.dequantize(), plain.get_submodule(n.removesuffix(".table")).weight), n
    ids = torch.randint(0, family.tiny["vocab_size"], (2, 23))
    with torch.no_grad():
        assert distance(packed(ids).logits, plain(ids).logits) < 2e-6
        step = packed(ids[:1, :1]).logits
        assert distance(step, plain(ids[:1, :1]).logits) < 2e-6


@pytest.mark.parametrize(
    ("head", "kind"),
    [("Q8_0", "int8-groups"), ("Q4_1", "int4"), ("Q5_0", None), ("F16", None), ("tied", "int4")],
)
@pytest.mark.parametrize("name", PHI)
def test_each_layer_of_a_file_keeps_its_own_kind(tmp_path, name, head, kind):
    """Most Q4_0 files have an output layer of more bits."""
    family = PHI[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96} | ({"head_dim": None} if name == "phi3" else {})
    model = family.model(**sizes, tie_word_embeddings=head == "tied")
    file = tmp_path / "mixed.gguf"
    writer = gguf_files.new_writer(file, config_of(family, **sizes, tie_word_embeddings=head == "tied"))
    for n, p in model.named_parameters():
        own = head if n.startswith("lm_head") else "Q4_1" if "embed" in n else "Q4_0"
        gguf_files.add_tensor(writer, gguf_files.gguf_name(n), p.detach(), own)
    gguf_files.finish(writer, file)
    plain = weights.load(family.cls(), file)
    packed = weights.load(family.cls(), file, packed=True)
    assert getattr(packed.lm_head, "kind", None) == kind
    assert isinstance(packed.model.embed_tokens, kernels.QuantizedEmbedding)
    if head == "tied":
        assert packed.lm_head.qweight.data_ptr() == packed.model.embed_tokens.table.qweight.data_ptr()
    ids = torch.randint(0, family.tiny["vocab_size"], (2, 9))
    weights.save(packed, tmp_path / "saved")
    again = weights.load(family.cls(), tmp_path / "saved")
    with torch.no_grad():
        for few in (ids, ids[:1, :1]):
            assert distance(packed(few).logits, plain(few).logits) < 2e-6
            assert torch.equal(again(few).logits, packed(few).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_by_groups_multiplies_as_it_dequantizes(dtype):
    """More groups than the kernel takes at a time, rows of x that fill its registers and that do not."""
    layer = torch.nn.Linear(1056, 41)
    q = torch.randint(-128, 128, (41, 1056), dtype=torch.int8)
    scale = torch.randn(41, 33).half() / 100
    packed = kernels.Quantized.from_bits(layer, q, scale, None)
    wanted = q.unflatten(1, (33, 32)).double() * scale[..., None].double()
    assert torch.equal(packed.dequantize().double(), wanted.flatten(1))
    for rows in (1, 2, 5, 6, 7, 12, 13, 40):
        x = torch.randn(3, rows, 1056)[0].to(dtype)
        with torch.no_grad():
            right = x.double() @ wanted.flatten(1).t() + layer.bias.double()
            own = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
            assert distance(packed(x), right) < own, rows
    packed.to(torch.bfloat16)
    assert packed.scale.dtype == torch.float16 and packed.qweight.dtype == torch.int8


def test_a_packed_model_is_saved_and_loaded_in_its_bits(tmp_path):
    file, _ = written(tmp_path, PHI["phi3"], "Q8_0", hidden_size=64, intermediate_size=96, head_dim=None)
    packed = weights.load(Phi3ForCausalLM, file, packed=True)
    weights.save(packed, tmp_path / "saved")
    again = weights.load(Phi3ForCausalLM, tmp_path / "saved")
    ids = torch.randint(0, PHI["phi3"].tiny["vocab_size"], (1, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, packed(ids).logits)
    assert sum(isinstance(m, kernels.Quantized) for m in again.modules()) == 14  # the embedding too


# ---- Config ------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": ("phi3", {}),
    "window": ("phi3", {"sliding_window": 5}),
    "no window": ("phi3", {"sliding_window": None}),
    "longrope": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8, "max_position_embeddings": 40}),
    "attention factor": (
        "phi3",
        {
            "rope_scaling": {**LONGROPE, "attention_factor": 1.5},
            "original_max_position_embeddings": 8,
            "max_position_embeddings": 40,
        },
    ),
    "partial rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "tied": ("phi3", {"tie_word_embeddings": True}),
    "phi": ("phi", {}),
    "phi, other rotary share": ("phi", {"partial_rotary_factor": 0.4}),
    "phi, an MLP of another size": ("phi", {"intermediate_size": 77}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_plain_model(tmp_path, variant):
    """Beyond the window and past the original context: where Transformers 5.23, which drops both, is off."""
    name, changes = VARIANTS[variant]
    family = PHI[name]
    if "rope_scaling" in changes:
        D = family.tiny.get("head_dim") or family.tiny["hidden_size"] // family.tiny["num_attention_heads"]
        changes = {**changes, "partial_rotary_factor": 6 / D}
    file, model = written(tmp_path, family, **changes)
    loaded = weights.load(family.cls(), file)
    ids = torch.randint(0, family.tiny["vocab_size"], (2, 23))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    ours, hubs = loaded.config.to_dict(), model.config.to_dict()
    kept = ("vocab_size", "rope_theta", "sliding_window", "num_key_value_heads", "intermediate_size", "rms_norm_eps", "layer_norm_eps",
            "tie_word_embeddings", "max_position_embeddings", "original_max_position_embeddings", "hidden_act")  # fmt: skip
    assert {k: ours[k] for k in kept if k in ours} == {k: hubs[k] for k in kept if k in hubs}


def test_a_window_that_old_files_lack_is_mini_4ks(tmp_path):
    """Before August 2024 the key was not written; llama.cpp's own rule for such files."""
    for layers, longest, wanted in ((32, 4096, 2047), (32, 131072, None), (2, 4096, None)):
        config = config_of(PHI["phi3"], num_hidden_layers=layers, max_position_embeddings=longest)
        writer = gguf_files.new_writer(tmp_path / "old.gguf", config)
        del writer.kv_data[0]["phi3.attention.sliding_window"]
        model = PHI["phi3"].model(num_hidden_layers=layers, max_position_embeddings=longest)
        for name, p in model.named_parameters():
            gguf_files.add_tensor(writer, gguf_files.gguf_name(name), p.detach(), "F32")
        file = gguf_files.finish(writer, tmp_path / "old.gguf")
        assert modern(read_config(file))["sliding_window"] == wanted


def test_fused_qkv_of_phi2_and_a_wrong_number_of_kv_heads(tmp_path):
    """The converter writes head_count_kv = head_count for Phi whatever the model has: the rows tell."""
    family = PHI["phi"]
    config = config_of(family)
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    model = family.model()
    writer = gguf_files.new_writer(tmp_path / "model.gguf", config)
    state = dict(model.named_parameters())
    for name, p in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name, p = name.replace("q_proj", "qkv_proj"), torch.cat(parts)
        if ".k_proj." not in name and ".v_proj." not in name:
            gguf_files.add_tensor(writer, gguf_files.gguf_name(name), p.detach(), "F16")
    file = gguf_files.finish(writer, tmp_path / "model.gguf")
    found = weights.tensors(file)
    wanted = {name: p.detach() if p.dim() == 1 else p.detach().half().float() for name, p in state.items()}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert read_config(file)["num_key_value_heads"] == config["num_key_value_heads"]


def test_shards_are_one_model(tmp_path):
    family = PHI["phi3"]
    model, config = family.model(), config_of(family)
    writer = gguf_files.new_writer(tmp_path / "big.gguf", config, split_max_tensors=4)
    for name, p in model.named_parameters():
        gguf_files.add_tensor(writer, gguf_files.gguf_name(name), p.detach(), "F32")
    gguf_files.finish(writer, tmp_path / "big.gguf")
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    ids = torch.randint(0, family.tiny["vocab_size"], (1, 9))
    for path in (tmp_path, files[0], files[-1]):
        assert torch.equal(weights.load(Phi3ForCausalLM, path)(ids).logits, model(ids).logits)
    files[1].rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"lacks {files[1].name} of the model's {len(files)} shards"):
        weights.load(Phi3ForCausalLM, tmp_path)


# ---- Tokenizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("title", ["Model", "Phi 3 Mini 4k Instruct", "phi-3"])
def test_ids_are_those_of_the_hubs_folder(tmp_path, data, name, title):
    """Whatever general.name says, by which llama.cpp decides whether control tokens swallow blanks."""
    if title != "Model" and not name.startswith("phi-3"):
        pytest.skip("one name is enough where the name was never looked at")
    kind, vectors = HUB[name]
    file = gguf_files.write_vocabulary(tmp_path / "model.gguf", data / "hub" / name, kind, title)
    ours, hubs = tokenize.load(file), tokenize.load(data / "hub" / name)
    rows = json.loads((data / "vectors" / f"{vectors}.json").read_text())["rows"]
    for row in rows:
        assert ours.encode(row["text"], add_special_tokens=False) == row["ids"], row["text"]
        assert ours.encode(row["text"]) == row.get("ids_hf_default", row["ids"])
        assert ours.decode(row["ids"]) == row["decoded"]
        if row["decoded_skip_special"] is not None:
            assert ours.decode(row["ids"], skip_special_tokens=True) == row["decoded_skip_special"]
    for content, token in hubs.added.items():
        around = f" a \n{content} \n b"
        assert ours.encode(around) == hubs.encode(around), content
        assert ours.added[content]._replace(normalized=token.normalized) == token
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, role) == getattr(hubs, role)
    messages = [{"role": "user", "content": "Hi <|end|>"}]
    assert ours.chat(messages) == hubs.chat(messages)


@pytest.mark.parametrize("name", ["tiny-phi", "tiny-phi3"])
def test_a_tiny_checkpoint_generates_the_same_text(tmp_path, name):
    folder = TINY / name
    cls = model_class(read_config(folder))
    model = weights.load(cls, folder, dtype=torch.float32)
    state = {name: p.detach() for name, p in model.named_parameters()}
    config = {"model_type": model.config.model_type, **model.config.to_dict()}
    file = gguf_files.write_model(tmp_path / "model.gguf", config, state, folder=folder)
    ours, theirs = tokenize.load(file), tokenize.load(folder)
    text = "Once upon a time there was a little dog.\n  He\t\tran  <|end|> away"
    assert ours.encode(text) == theirs.encode(text)
    again, ids = weights.load(cls, file), torch.tensor([theirs.encode("Once upon a time")])
    assert torch.equal(again.generate(ids, max_new_tokens=30), model.generate(ids, max_new_tokens=30))


def test_an_answer_ends_where_the_hubs_does(tmp_path, data):
    """The hub's generation_config lists the ends of turns; a GGUF file has one end, and the tokens' names."""
    lists = {
        "phi-3-mini-4k": [32000, 32001, 32007],
        "phi-4": [100257, 100265],
        "phi-4-mini": [199999, 200020],
    }
    for name, stops in lists.items():
        file = gguf_files.write_vocabulary(tmp_path / f"{name}.gguf", data / "hub" / name, HUB[name][0])
        assert read_generation_config(file) == {"eos_token_id": stops}


# ---- Broken files ------------------------------------------------------------------------------------------


class Parts:
    """A small file, part by part, each of which a test may replace."""

    def __init__(self):
        model = PHI["phi3"].model()
        self.config = config_of(PHI["phi3"])
        self.tensors = {gguf_files.gguf_name(n): p.detach().numpy() for n, p in model.named_parameters()}
        self.metadata = gguf_export.model_metadata(self.config, "Model", "F32")
        self.counts: tuple | None = None  # tensors, pairs
        self.start = b"GGUF" + struct.pack("<I", 3)
        self.raw: dict[str, bytes] = {}  # a pair's type and value, or a tensor's dimensions, type and offset
        self.end = b""

    def write(self, file):
        n_tensors, n_pairs = self.counts or (len(self.tensors), len(self.metadata))
        out = self.start + struct.pack("<QQ", n_tensors, n_pairs)
        for key, value in self.metadata.items():
            out += gguf_writer.text(key) + self.raw.get(key, None or gguf_writer.typed(value))
        offset = 0
        for name, array in self.tensors.items():
            plain = struct.pack(f"<I{array.ndim}QIQ", array.ndim, *reversed(array.shape), 0, offset)
            out += gguf_writer.text(name) + self.raw.get(name, plain)
            offset += -(-array.nbytes // 32) * 32
        out += bytes(-len(out) % 32)
        for array in self.tensors.values():
            out += array.tobytes() + bytes(-array.nbytes % 32)
        file.write_bytes(out[: len(out) - len(self.end)] if self.end else out)
        return file


def info(*dimensions, kind=0, offset=0) -> bytes:
    return struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


HUGE = 2**62
BROKEN = {  # what is done to the parts -> the sentence
    "it does not begin with GGUF": lambda p: setattr(p, "start", b"GGML" + struct.pack("<I", 3)),
    "version 1 is none of": lambda p: setattr(p, "start", b"GGUF" + struct.pack("<I", 1)),
    "it is big-endian": lambda p: setattr(p, "start", b"GGUF" + struct.pack(">I", 3)),
    f"{HUGE} tensors do not fit": lambda p: setattr(p, "counts", (HUGE, 1)),
    f"{HUGE} metadata pairs and": lambda p: setattr(p, "counts", (1, HUGE)),
    "general.name needs 4611686018427387904 bytes": lambda p: p.raw.update({"general.name": struct.pack("<IQ", 8, HUGE)}),
    "general.name is not UTF-8": lambda p: p.raw.update({"general.name": struct.pack("<IQ", 8, 2) + b"\xff\xfe"}),
    "general.name has the unknown value type 99": lambda p: p.raw.update({"general.name": struct.pack("<I", 99)}),
    "general.name has 4611686018427387904 entries": lambda p: p.raw.update({"general.name": struct.pack("<IIQ", 9, 8, HUGE)}),
    "general.name needs 134217728 bytes": lambda p: p.raw.update({"general.name": struct.pack("<IIQ", 9, 8, 2**24)}),
    "general.name needs 67108864 bytes": lambda p: p.raw.update({"general.name": struct.pack("<IIQ", 9, 6, 2**24)}),
    "general.name has the unknown value type 9": lambda p: p.raw.update({"general.name": struct.pack("<IIQ", 9, 9, 1)}),
    "general.name is neither true nor false": lambda p: p.raw.update({"general.name": struct.pack("<IB", 7, 2)}),
    "general.alignment must be a power of two": lambda p: p.metadata.update({"general.alignment": 24}),
    "general.architecture is 'llama', and of GGUF only phi2 and phi3": lambda p: p.metadata.update({"general.architecture": "llama"}),
    "tensor [0-9]+ is called": lambda p: rename(p, "\x1b[2J"),
    "output_norm.weight has 0 dimensions": lambda p: p.raw.update({"output_norm.weight": info()}),
    "output_norm.weight has 9 dimensions": lambda p: p.raw.update({"output_norm.weight": info(*[1] * 9)}),
    "output_norm.weight has the dimensions": lambda p: p.raw.update({"output_norm.weight": info(HUGE, HUGE)}),
    "output_norm.weight has type 77, which is none of": lambda p: p.raw.update({"output_norm.weight": info(48, kind=77)}),
    "output_norm.weight has type IQ2_XXS": lambda p: p.raw.update({"output_norm.weight": info(256, kind=16)}),
    "rows of 48 numbers, which blocks of 256 do not divide": lambda p: p.raw.update({"output_norm.weight": info(48, kind=12)}),
    "output_norm.weight begins at 7, no multiple of 32": lambda p: p.raw.update({"output_norm.weight": info(48, offset=7)}),
    "is it cut off": lambda p: p.raw.update({"output_norm.weight": info(48, offset=HUGE)}),
    "bytes from .* is it cut off": lambda p: setattr(p, "end", b"x" * 60),
    "overlap": lambda p: p.raw.update({"output_norm.weight": info(48)}),
    "holds the tensor attn_norm.weight, which no phi3 has": lambda p: rename(p, "attn_norm.weight"),
    "holds the tensor blk.0.ffn_gate.weight, which no phi3": lambda p: rename(p, "blk.0.ffn_gate.weight"),
    "block_count must be the number of layers": lambda p: p.metadata.update({"phi3.block_count": 2**31 - 1}),
    "head_count must be a whole number from 1": lambda p: p.metadata.update({"phi3.attention.head_count": 0}),
    "head_count must be a divisor": lambda p: p.metadata.update({"phi3.attention.head_count": 7}),
    "rope.dimension_count must be at most": lambda p: p.metadata.update({"phi3.rope.dimension_count": 1000}),
    "phi3.rope.freq_base must be a positive number, and is 'missing'": lambda p: p.metadata.pop("phi3.rope.freq_base"),
    "freq_base must be a positive number, and is nan": lambda p: p.metadata.update({"phi3.rope.freq_base": float("nan")}),
    "phi3.expert_count is not supported": lambda p: p.metadata.update({"phi3.expert_count": 4}),
    "holds rope_factors_long.weight": lambda p: p.tensors.update({"rope_factors_long.weight": np.ones(4, np.float32)}),
    "rope_factors_long.weight must be a few numbers in F32": lambda p: p.tensors.update({"rope_factors_long.weight": np.ones((300, 300), np.float32), "rope_factors_short.weight": np.ones(4, np.float32)}),
    "short_factor must be a list of": lambda p: p.tensors.update({f"rope_factors_{k}.weight": np.ones(40, np.float32) for k in ("long", "short")}),
    "does not fit Phi3ForCausalLM: missing": lambda p: p.tensors.pop("output_norm.weight"),
    "is one of several shards": lambda p: p.metadata.update({"split.count": 3}),
}  # fmt: skip


def rename(parts, name):
    parts.tensors = {name if n == "output_norm.weight" else n: array for n, array in parts.tensors.items()}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_one_sentence(tmp_path, message):
    """That names the file; nothing is allocated before it is known to fit."""
    parts = Parts()
    BROKEN[message](parts)
    file = parts.write(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=message) as raised:
        weights.load(Phi3ForCausalLM, file)
    assert (
        str(file) in str(raised.value) and "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    )


def test_the_parts_of_a_sound_file_are_sound(tmp_path):
    assert weights.load(Phi3ForCausalLM, Parts().write(tmp_path / "model.gguf"))


def test_every_cut_is_noticed(tmp_path):
    file = Parts().write(tmp_path / "model.gguf")
    content = file.read_bytes()
    for length in [*range(0, 1500, 7), *range(1500, len(content) - 32, 997)]:
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=str(file)):
            weights.load(Phi3ForCausalLM, file)


def test_one_packaging_in_a_folder(tmp_path):
    file, _ = written(tmp_path, PHI["phi3"])
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="holds several GGUF models: give one of model.gguf, other.gguf"):
        weights.tensors(tmp_path)
    assert weights.tensors(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").unlink()
    assert weights.tensors(tmp_path)
    shutil.copy(TINY / "tiny-phi3" / "model.safetensors", tmp_path)
    with pytest.raises(
        ValueError, match=r"holds two packagings, model.safetensors and model.gguf: give the .gguf"
    ):
        weights.tensors(tmp_path)
    with pytest.raises(NotADirectoryError, match="a .gguf file"):
        weights.tensors(tmp_path / "model.safetensors")


VOCABULARY = {
    "ggml.tokens must be a list of texts": {"tokens": [1, 2]},
    "ggml.token_type must be 3 numbers, one for each token, not 1": {"token_type": [1]},
    "ggml.model must be gpt2 or llama": {"model": "bert"},
    "ggml.pre must be one of .*, not 'qwen2'": {"pre": "qwen2"},
    "ggml.merges must be pairs": {"merges": ["a b c"]},
    "ggml.tokens must be distinct": {"tokens": ["a", "a", "b"]},
    "the vocabulary lacks 254 of the 256 bytes": {},
    "ggml.eos_token_id must be a token id below 3": {"eos_token_id": 9},
}


@pytest.mark.parametrize("message", VOCABULARY)
def test_a_broken_vocabulary_is_one_sentence(tmp_path, message):
    plain = {
        "model": "gpt2",
        "pre": "gpt-4o",
        "tokens": ["a", "b", "c"],
        "token_type": [1, 1, 3],
        "merges": [],
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in {**plain, **VOCABULARY[message]}.items()}
    file = tmp_path / "model.gguf"
    gguf_files.write(file, {"general.architecture": "phi3", **found}, [])
    with pytest.raises(ValueError, match=message) as raised:
        tokenize.load(file)
    assert str(file) in str(raised.value)


def test_the_page_has_every_type_and_packaging():
    page = (ROOT / "docs" / "packagings.md").read_text()
    rows = {
        cells[1].strip(): cells for cells in (line.split("|") for line in page.splitlines()) if len(cells) > 5
    }
    for kind in headers.KINDS.values():
        if kind.block > 1:
            assert (rows[kind.name][2].strip(), rows[kind.name][3].strip()) == (
                str(kind.block),
                str(kind.nbytes),
            )
        assert kind.name in page
    for module in packagings.PACKAGINGS:
        assert all(name in page for name in module.NAME.split(" or ")), module.NAME


def test_from_pretrained_takes_it_as_transformers_does(tmp_path):
    """A file, its folder, or of several in a folder the one called `gguf_file`."""
    folder = TINY / "tiny-phi3"
    model = weights.load(Phi3ForCausalLM, folder, dtype=torch.float32)
    state = {name: p.detach() for name, p in model.named_parameters()}
    config = {"model_type": "phi3", **model.config.to_dict()}
    file = gguf_files.write_model(tmp_path / "model.gguf", config, state, folder=folder)
    ids = torch.tensor([tokenize.load(folder).encode("Once upon a time")])
    wanted = model(ids).logits
    for where, named in ((file, {}), (tmp_path, {}), (tmp_path, {"gguf_file": "model.gguf"})):
        assert torch.equal(hf.AutoModelForCausalLM.from_pretrained(where, **named)(ids).logits, wanted)
        assert hf.Phi3Config.from_pretrained(where, **named).sliding_window == 2047
        tokenizer = hf.AutoTokenizer.from_pretrained(where, **named)
        assert tokenizer("Once upon a time")["input_ids"] == ids[0].tolist()
    shutil.copy(file, tmp_path / "other.gguf")
    assert hf.Phi3ForCausalLM.from_pretrained(tmp_path, gguf_file="other.gguf")
    with pytest.raises(OSError, match="third.gguf is missing"):
        hf.Phi3ForCausalLM.from_pretrained(tmp_path, gguf_file="third.gguf")

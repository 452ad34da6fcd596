"""Checkpoint folders of every layout load to the same model; saving and loading loses nothing."""

import json
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoders import weights
from decoders.formats.names import grouped
from tests import folders
from tests.families import inputs, redraw


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (a, b))  # a tied one once
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


def written(tmp_path, family, writer=folders.safetensors_whole, dtype=torch.float32):
    folder = folders.write_config(tmp_path / writer.__name__, family)
    writer(folder, folders.weights_of(family, dtype=dtype))
    return folder


@pytest.fixture(params=folders.WRITERS, ids=lambda w: w.__name__)
def writer(request, family):
    if request.param is folders.flax and family.name != "gpt_neo":
        pytest.skip("no Flax checkpoints of this family")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_layout_gives_the_same_model(family, tmp_path, writer, dtype):
    model = weights.load(family.cls(), written(tmp_path, family, writer, dtype))
    assert equal(model, family.model(dtype=dtype)) and not model.training
    tied = model.get_submodule(family.output).weight is model.get_submodule(family.table).weight
    assert tied == model.config.tie_word_embeddings
    assert all(p.requires_grad for p in model.parameters())


def test_names_without_prefix_are_a_bare_model_dump(family, tmp_path, writer):
    state = {name.removeprefix(family.base + "."): t for name, t in folders.weights_of(family).items()}
    folder = folders.write_config(tmp_path, family)
    writer(folder, state)
    assert equal(weights.load(family.cls(), folder), family.model())
    assert equal(weights.load(family.cls("Model"), folder), getattr(family.model(), family.base))


def test_a_bare_model_loads_from_a_full_checkpoint(family, tmp_path):
    model = weights.load(family.cls("Model"), written(tmp_path, family))
    assert equal(model, getattr(family.model(), family.base))


def test_tensors_have_the_hub_names_and_no_buffers(family, tmp_path):
    found = weights.tensors(written(tmp_path, family, folders.safetensors_shards))
    expected = family.model().state_dict()
    tied = {"lm_head.weight"} if family.config().tie_word_embeddings else set()
    assert found.keys() == expected.keys() - tied
    assert all(torch.equal(found[name], expected[name]) for name in found)
    file, stored = found.origin[next(iter(found))]
    assert file.name.endswith(".safetensors") and stored in load_file(file)


def test_a_copy_of_the_tied_table_is_dropped_and_another_one_said(family, tmp_path):
    if not family.config().tie_word_embeddings:
        pytest.skip("not tied in this family")
    folder = folders.write_config(tmp_path, family)
    state = folders.weights_of(family)
    table = f"{family.table}.weight"
    torch.save({**state, "lm_head.weight": state[table]}, folder / "pytorch_model.bin")
    assert equal(weights.load(family.cls(), folder), family.model())
    torch.save({**state, "lm_head.weight": state[table] + 1}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lm_head.weight differs .* tie_word_embeddings=False"):
        weights.load(family.cls(), folder)
    model = weights.load(family.cls(), folder, tie_word_embeddings=False)
    assert torch.equal(model.lm_head.weight, state[table] + 1)


def test_dtype_and_overrides(family, tmp_path):
    folder = written(tmp_path, family)
    model = weights.load(family.cls(), folder, dtype=torch.bfloat16, initializer_range=0.25)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.initializer_range == 0.25
    with pytest.raises(TypeError, match="no field initialiser_range"):
        weights.load(family.cls(), folder, initialiser_range=0.25)


def test_mixed_dtypes_become_the_one_that_holds_them_all(family, tmp_path):
    state = folders.weights_of(family, dtype=torch.float16)
    state = {name: t.float() if "ln_" in name or "layernorm" in name else t for name, t in state.items()}
    folder = folders.write_config(tmp_path, family)
    folders.safetensors_whole(folder, state)
    assert {p.dtype for p in weights.load(family.cls(), folder).parameters()} == {torch.float32}


def test_generation_config_is_what_generate_stops_at(family, tmp_path):
    folder = written(tmp_path, family)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model = weights.load(family.cls(), folder)
    assert model.special_ids("checkpoint", None)[0].tolist() == [7, 9]


def test_a_new_head_is_drawn_and_announced(family, tmp_path):
    folder = written(tmp_path, family)
    for head in family.heads:
        with pytest.warns(UserWarning, match="drawn anew"):
            model = weights.load(family.cls(head), folder)
        assert all(p.isfinite().all() for p in model.parameters())
        weights.save(model, tmp_path / head)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert equal(weights.load(family.cls(head), tmp_path / head), model)


# ---- Saving


@pytest.mark.parametrize("shard", [10**9, 20_000, 1], ids=["whole", "shards", "a shard each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_load_undoes_save_bit_for_bit(family, tmp_path, shard, dtype):
    model = family.model(dtype=dtype)
    model.generation_config = {"eos_token_id": 3}
    weights.save(model, tmp_path, max_shard_bytes=shard)
    again = weights.load(family.cls(), tmp_path)
    assert (
        equal(model, again)
        and again.config == model.config
        and again.generation_config == {"eos_token_id": 3}
    )
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard < 10**9)


@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification",
                                  "ForQuestionAnswering"])  # fmt: skip
def test_transformers_reads_what_we_save(family, tmp_path, head):
    transformers = pytest.importorskip("transformers")
    if not hasattr(family.module, family.class_name(head)):
        pytest.skip("no such head in this family")
    model = family.model(head)
    weights.save(model, tmp_path, max_shard_bytes=20_000)
    theirs, report = getattr(transformers, family.class_name(head)).from_pretrained(
        tmp_path, output_loading_info=True
    )
    twins = (
        {f"classifier.{leaf}" for leaf in ("weight", "bias")}
        if (family.name, head) == ("phi", "ForTokenClassification")
        else set()
    )
    assert set(report.pop("unexpected_keys")) == twins, "the names of 4.37, which 5 only mentions"
    assert not any(report.values()), report
    ids, _ = inputs(101)
    assert torch.allclose(
        model(ids[:1])[0] if head == "Model" else model(ids[:1])[1], theirs.eval()(ids[:1])[0], atol=2e-5
    )


def test_we_read_what_transformers_saves(family, tmp_path):
    ours, theirs = family.pair()
    theirs.save_pretrained(tmp_path)
    assert equal(weights.load(family.cls(), tmp_path), ours)


@torch.no_grad()
@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification",
                                  "ForQuestionAnswering", "DoubleHeadsModel"])  # fmt: skip
def test_every_head_that_transformers_saves_is_read(family, tmp_path, head):
    """Tied tensors under whatever name it chooses: 5.23 saves `lm_head.weight` of two heads instead of the table."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(family.module, family.class_name(head)):
        pytest.skip("no such head in this family")
    config = family.their_config(num_labels=3)
    config = type(transformers.AutoConfig.for_model(config.pop("model_type")))(**config)
    theirs = redraw(
        getattr(transformers, family.class_name(head))._from_config(config, attn_implementation="eager")
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours, (ids, _) = weights.load(family.cls(head), tmp_path), inputs(101)
    ids = ids[None] if head == "DoubleHeadsModel" else ids[:1]
    found, expected = ours(ids), theirs(ids, return_dict=True)
    names = [n for n in expected if n in found._fields and isinstance(expected[n], torch.Tensor)]
    assert names
    for name in names:
        assert (getattr(found, name) - expected[name]).abs().max() < 2e-5, name


def test_saving_over_a_loaded_folder_keeps_the_loaded_weights(family, tmp_path):
    """The mapped file must not be written into, and shards of an older save must not stay."""
    weights.save(family.model(seed=1), tmp_path, max_shard_bytes=20_000)
    model = weights.load(family.cls(), tmp_path)
    other = family.model(seed=2)
    weights.save(other, tmp_path)
    assert equal(model, family.model(seed=1)) and equal(weights.load(family.cls(), tmp_path), other)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_folder_as_it_was(family, tmp_path, monkeypatch):
    weights.save(family.model(seed=1), tmp_path)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(weights.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.save(family.model(seed=2), tmp_path)
    monkeypatch.undo()
    assert equal(weights.load(family.cls(), tmp_path), family.model(seed=1))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_changing_a_loaded_model_never_reaches_the_file(family, tmp_path):
    folder = written(tmp_path, family)
    before = (folder / "model.safetensors").read_bytes()
    model = weights.load(family.cls(), folder)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


# ---- Cost

LOAD = """
import sys, torch
from decoders import gpt_neo, weights
from decoders.cli import peak_memory
model = weights.load(gpt_neo.GPTNeoForCausalLM, {small!r})
base = peak_memory()
model = weights.load(gpt_neo.GPTNeoForCausalLM, {big!r})
opened = peak_memory()
total = sum(p.sum().item() for p in model.parameters())
print(opened - base, peak_memory() - base, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize(
    "writer", [folders.safetensors_whole, folders.pickle_whole], ids=lambda w: w.__name__
)
def test_loading_holds_no_second_copy(tmp_path, writer):
    """A checkpoint of 200 MB: next to nothing when opened, its size and no more once all of it has been read."""
    from tests.families import GPT_NEO

    small = written(tmp_path, GPT_NEO)
    sizes = {"vocab_size": 50000, "hidden_size": 512, "intermediate_size": 8192}
    big = folders.write_config(tmp_path / "big", GPT_NEO, **sizes)
    state = {n: torch.zeros(p.shape) for n, p in GPT_NEO.cls()(GPT_NEO.config(**sizes)).named_parameters()}
    size = sum(t.nbytes for t in state.values())
    writer(big, state)
    code = LOAD.format(small=str(small), big=str(big))
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    opened, read = float(output[0]), float(output[1])
    assert size > 190e6 and opened < 0.15 * size and read < 1.1 * size, (opened, read, size)
    assert output[2] == "False", "loading must not make PyTorch import its compiler"


def test_a_local_folder_makes_no_request(family, tmp_path, monkeypatch):
    folder = written(tmp_path, family)

    def forbidden(*args, **kwargs):
        raise AssertionError("a request was made")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    weights.load(family.cls(), folder)


def test_real_flax_files_load(family, tmp_path):
    """Written by flax itself, where it is installed."""
    serialization = pytest.importorskip("flax.serialization")
    if family.name != "gpt_neo":
        pytest.skip("no Flax checkpoints of this family")
    folder = folders.write_config(tmp_path, family)

    def arrays(tree: dict) -> dict:
        return {
            key: arrays(value) if isinstance(value, dict) else value.numpy() for key, value in tree.items()
        }

    tree = arrays(folders.flax_tree(folders.weights_of(family)))
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert equal(weights.load(family.cls(), folder), family.model())


def test_header_names_are_grouped_by_layer():
    names = ["h.0.a.b", "h.1.a.b", "h.2.a.b", "h.5.a.b", "x.weight"]
    assert grouped(names) == "h.0-2,5.a.b, x.weight"


def test_saved_config_is_plain_json(family, tmp_path):
    weights.save(family.model(dtype=torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["model_type"] == family.name
    assert config["architectures"] == [family.class_name()]


def test_duplicate_names_over_shards_are_said(family, tmp_path):
    folder = folders.write_config(tmp_path, family)
    folders.safetensors_shards(folder, state := folders.weights_of(family))
    name = sorted(state)[0]
    second = folder / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), name: state[name]}, second)
    if name not in family.dead:
        with pytest.raises(
            ValueError, match=f"holds {name}, which model-00001-of-00002.safetensors holds as well"
        ):
            weights.load(family.cls(), folder)


def test_an_override_counts_in_a_folder_with_nested_rope_parameters(family, tmp_path):
    """Transformers 5 writes them so; the nested value won."""
    if family.name not in ("phi", "phi3", "persimmon"):
        pytest.skip("no rotation in this family's own config")
    folder = written(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta", 10000.0)}
    (folder / "config.json").write_text(json.dumps(config))
    assert weights.load(family.cls(), folder, rope_theta=77.0).config.rope_theta == 77.0
    assert weights.load(family.cls(), folder).config.rope_theta == config["rope_parameters"]["rope_theta"]

"""LoRA adapters: merged as peft merges them, in the dtype that is asked for, over plain and packed bases."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoders import model_class, read_config, weights
from tests import folders, packers
from tests.families import FAMILIES, FUYU, GPT_NEO, OPENAI_GPT, PHI, PHI3, Family

SAMPLES = Path(os.environ.get("DECODERS_TEST_DATA", "")) / "packed"
TARGETS = {
    "gpt_neo": ["q_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
    "openai-gpt": ["c_attn", "c_proj", "c_fc"],
    "phi": ["q_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "persimmon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "fuyu": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def base_folder(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> Path:
    folders.write_config(folder, family, **packers.SIZES[family.name])
    model = family.model(dtype=dtype, **packers.SIZES[family.name])
    folders.safetensors_whole(folder, folders.weights_of_model(model))
    return folder


def adapter_by_peft(
    folder: Path, family: Family, dtype: torch.dtype = torch.float32, seed: int = 1, **options
):
    """(adapter folder, the merged model's state): an adapter with redrawn numbers, saved and merged by peft."""
    peft = pytest.importorskip("peft")
    _, theirs = family.pair(dtype=dtype, **packers.SIZES[family.name])
    if family.name == "openai-gpt":
        options.setdefault("fan_in_fan_out", True)
    options.setdefault("target_modules", TARGETS[family.name])
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
    model = peft.get_peft_model(theirs, config)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw) * 0.2
            scaled = parameter.data.abs() * (1 + noise) if "magnitude" in name else parameter.data + noise
            parameter.data = scaled.to(parameter.dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, model.merge_and_unload().state_dict()


def under_our_names(state: dict, family: Family) -> dict:
    from decoders.formats.names import LAYOUTS

    layout = LAYOUTS[family.name]
    return {new: tensor for old, tensor in state.items() for new, tensor in layout.modern(old, tensor, {})}


def with_tied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, a tied one under both of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"c_proj|dense|down_proj": 3},
        "alpha_pattern": {r"layers\.1\..*|h\.1\..*": 9},
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_merged_weights_are_those_of_peft(tmp_path, family, options, dtype):
    """Half precision too: what is added is worked out in float32, and rounded once."""
    base = base_folder(tmp_path / "base", family, dtype)
    folder, expected = adapter_by_peft(tmp_path / "adapter", family, dtype, **OPTIONS[options])
    state = with_tied(weights.load(family.cls(), base, adapter=folder))
    plain = with_tied(weights.load(family.cls(), base))
    changed = 0
    for name, tensor in under_our_names(expected, family).items():
        assert torch.equal(state[name], tensor), name
        changed += not torch.equal(state[name], plain[name])
    assert changed >= 3 * len(TARGETS[family.name])


def test_biases_whole_tensors_and_rows_are_those_of_peft(tmp_path):
    base = base_folder(tmp_path / "base", PHI)
    for name, options in {
        "bias": {"bias": "lora_only"},
        "bias-all": {"bias": "all"},
        "lora-bias": {"lora_bias": True},
        "both-biases": {"bias": "lora_only", "lora_bias": True},
        "saved": {"modules_to_save": ["lm_head"]},
        "saved-embedding": {"modules_to_save": ["embed_tokens"]},
        "rows": {"trainable_token_indices": [1, 5, 7]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "embedding-dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        "head": {"target_modules": ["lm_head", "q_proj"]},
    }.items():
        folder, expected = adapter_by_peft(tmp_path / name, PHI, **options)
        state = weights.load(PHI.cls(), base, adapter=folder).state_dict()
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), (name, key)


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"target_modules": ["wte"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["wte"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["wte", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, True),
    ],
)
def test_a_tied_output_layer_follows_as_it_does_in_peft(tmp_path, options, tied):
    """A LoRA of the tied embedding changes both; a whole one unties them, and the other stays as it was."""
    base = base_folder(tmp_path / "base", GPT_NEO)
    folder, expected = adapter_by_peft(tmp_path / "adapter", GPT_NEO, **options)
    model = weights.load(GPT_NEO.cls(), base, adapter=folder)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert model.config.tie_word_embeddings == tied
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert torch.equal(with_tied(model)[name], expected[name]), name


def test_two_adapters_are_added_each_with_its_weight(tmp_path):
    base = base_folder(tmp_path / "base", PHI3)
    first, one = adapter_by_peft(tmp_path / "first", PHI3, seed=1)
    second, two = adapter_by_peft(tmp_path / "second", PHI3, seed=2)
    plain = weights.load(PHI3.cls(), base).state_dict()
    state = weights.load(PHI3.cls(), base, adapter=[(first, 0.5), (second, -2)]).state_dict()
    for name, tensor in state.items():
        sum_of_both = plain[name] + 0.5 * (one[name] - plain[name]) - 2 * (two[name] - plain[name])
        assert torch.allclose(tensor, sum_of_both, atol=2e-6), name


@pytest.mark.parametrize("kind", ["bnb-nf4", "gptq-4bits", "mlx-4bits", "hqq-4bits-axis1"])
def test_an_adapter_over_a_packed_base_is_merged_into_its_numbers(tmp_path, kind):
    plain = packers.write(tmp_path / "base", kind, PHI)
    folder, _ = adapter_by_peft(tmp_path / "adapter", PHI)
    model = weights.load(PHI.cls(), tmp_path / "base", adapter=folder, dtype=torch.float32)
    state, parts = model.state_dict(), load_file(folder / "adapter_model.safetensors")
    for target in ("q_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{target}"
        a, b = (parts[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        merged = plain[f"{name}.weight"].float() + b @ a * 1.5
        assert torch.equal(state[f"{name}.weight"], merged)


def test_an_adapter_beside_its_base_is_applied_and_said(tmp_path):
    """Transformers does so where peft is installed, and ignores it silently where it is not."""
    base = base_folder(tmp_path / "base", PHI)
    plain = weights.load(PHI.cls(), base).state_dict()
    adapter_by_peft(base, PHI)
    with pytest.warns(UserWarning, match="adapter_config.json.* is applied"):
        state = weights.load(PHI.cls(), base).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(state[name], plain[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_out = weights.load(PHI.cls(), base, adapter=[]).state_dict()
    assert torch.equal(left_out[name], plain[name])


def test_remote_code_names_of_2023_find_their_matrices(tmp_path):
    """Adapters for microsoft/phi-2's own code have one fused matrix of q, k and v."""
    base = base_folder(tmp_path / "base", PHI)
    draw = torch.Generator().manual_seed(3)
    changes = {"num_key_value_heads": 4}
    folders.write_config(base, PHI, **packers.SIZES["phi"], **changes)
    model = PHI.model(**packers.SIZES["phi"], **changes)
    folders.safetensors_whole(base, folders.weights_of_model(model))
    a, b = torch.randn(2, 64, generator=draw), torch.randn(192, 2, generator=draw)
    prefix = "base_model.model.transformer.h.1.mixer.Wqkv"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors"
    )
    write_adapter_config(adapter, r=2, lora_alpha=2)
    state = weights.load(PHI.cls(), base, adapter=adapter).state_dict()
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        name = f"model.layers.1.self_attn.{name}.weight"
        delta = b[64 * i : 64 * (i + 1)] @ a
        assert torch.equal(state[name], model.state_dict()[name] + delta)


# ---- What is refused ---------------------------------------------------------------------------------------


def write_adapter_config(folder: Path, **changes) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "nowhere", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def small_adapter(folder: Path, shapes: dict[str, tuple[int, ...]] | None = None, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = shapes or {f"{name}.lora_A.weight": (4, 64), f"{name}.lora_B.weight": (64, 4)}
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    write_adapter_config(folder, **changes)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        (
            {"peft_type": "IA3"},
            None,
            "adapter_config.json: an adapter of peft_type 'IA3' is not supported, only LORA",
        ),
        ({"peft_type": "PROMPT_TUNING"}, None, "peft_type 'PROMPT_TUNING'"),
        ({"peft_type": None}, None, "peft_type None"),
        ({"use_qalora": True}, None, "use_qalora is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "has changed the base's weights"),
        ({"r": 0}, None, "adapter_config.json: r must be a positive integer"),
        ({"r": 8}, None, "adapter_model.safetensors: model.layers.0.self_attn.q_proj: .*rank 8.* has 4"),
        ({"lora_alpha": "x"}, None, "lora_alpha must be a positive number"),
        ({"rank_pattern": [1]}, None, "rank_pattern must be an object"),
        ({"rank_pattern": {"(": 1}}, None, "is no pattern of a name"),
        (
            {},
            {f"{Q}.lora_A.weight": (4, 80), f"{Q}.lora_B.weight": (64, 4)},
            "is for another base: .* \\(64, 80\\)",
        ),
        ({}, {f"{Q}.lora_A.weight": (4, 64)}, "lora_B.weight"),
        ({}, {f"{Q}.lora_A.weight": (4, 64), f"{Q}.lora_B.weight": (64, 3)}, "does not fit lora_B"),
        ({}, {f"{Q}.ia3_l": (64,)}, "no part of a LoRA"),
        (
            {},
            {
                f"{Q.replace('0', '9')}.lora_A.weight": (4, 64),
                f"{Q.replace('0', '9')}.lora_B.weight": (64, 4),
            },
            "changes model.layers.9.self_attn.q_proj.weight, which the base does not have",
        ),
    ],
)
def test_what_is_no_lora_of_this_base_is_refused_in_a_sentence(tmp_path, changes, shapes, message):
    base = base_folder(tmp_path / "base", PHI)
    adapter = small_adapter(tmp_path / "adapter", shapes, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        weights.load(PHI.cls(), base, adapter=adapter)
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_an_adapter_without_its_base_says_which_it_wants(tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        weights.load(PHI.cls(), small_adapter(tmp_path / "adapter"))


def test_an_adapter_folder_stands_for_its_base_with_it(tmp_path):
    base = base_folder(tmp_path / "adapter" / "base", PHI)
    adapter = small_adapter(tmp_path / "adapter", base_model_name_or_path="base")
    alone = weights.load(PHI.cls(), adapter).state_dict()
    both = weights.load(PHI.cls(), base, adapter=adapter).state_dict()
    assert all(torch.equal(alone[name], both[name]) for name in both)


def test_a_missing_file_is_named(tmp_path):
    base, adapter = base_folder(tmp_path / "base", PHI), small_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter_model.safetensors is missing"):
        weights.load(PHI.cls(), base, adapter=adapter)
    with pytest.raises(ValueError, match="the weight of adapter .* must be a number"):
        weights.load(PHI.cls(), base, adapter=[(adapter, "x")])


@pytest.mark.parametrize("name", [p.name for p in sorted(SAMPLES.glob("peft-*"))])
def test_samples_of_peft_itself(name):
    folder = SAMPLES / name
    expected = load_file(folder / "expected.safetensors")
    cls = model_class(read_config(folder / "base"))
    state = with_tied(weights.load(cls, folder / "base", adapter=folder, dtype=torch.float32))
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


def test_every_family_has_its_targets():
    assert {family.name for family in FAMILIES} == set(TARGETS)
    assert all(family in FAMILIES for family in (FUYU, OPENAI_GPT))

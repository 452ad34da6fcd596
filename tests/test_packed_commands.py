"""The command line and the documented API on packed folders and adapters."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from decoders import weights
from decoders.hf import AutoModelForCausalLM
from tests import packers
from tests.conftest import ROOT
from tests.families import PHI, PHI3
from tests.test_command import run

TINY = ROOT / "checkpoints" / "tiny-phi3"
TEXT = "Once upon a time there was a dog"


def adapter_folder(folder, scale=0.1, base=None):
    """A LoRA of tiny-phi3, without peft."""
    folder.mkdir(parents=True)
    draw, width = torch.Generator().manual_seed(2), 96
    tensors = {}
    for layer in range(4):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=draw) * scale
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 4, generator=draw) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base or TINY)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def packed_tiny(folder):
    """tiny-phi3 in 8 bits, with its tokenizer."""
    packers.pack_folder(TINY, folder, packers.rounded_bnb8, packers.quantized(quant_method="bitsandbytes"))
    for file in TINY.iterdir():
        if not (folder / file.name).exists() and file.suffix in (".json", ".model", ".jinja"):
            shutil.copyfile(file, folder / file.name)
    return folder


def test_generate_takes_a_packed_folder(tmp_path):
    plain = run("generate", str(TINY), TEXT, "--max-new-tokens", "6")
    packed = run("generate", str(packed_tiny(tmp_path / "packed")), TEXT, "--max-new-tokens", "6")
    assert plain.returncode == packed.returncode == 0
    assert packed.stdout == plain.stdout  # 8 bits are enough for the first words


def test_an_adapter_is_an_option_or_a_folder_of_its_own(tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    plain = run("generate", str(TINY), TEXT, "--max-new-tokens", "8").stdout
    given = run("generate", str(TINY), TEXT, "--max-new-tokens", "8", "--adapter", str(adapter))
    alone = run("generate", str(adapter), TEXT, "--max-new-tokens", "8")
    none = run("generate", str(TINY), TEXT, "--max-new-tokens", "8", "--adapter", f"{adapter}=0")
    assert given.returncode == alone.returncode == 0
    assert given.stdout == alone.stdout != plain
    assert none.stdout == plain


def test_inspect_says_the_packaging_its_types_and_bits(tmp_path):
    packers.write(tmp_path / "gptq", "gptq-4bits", PHI)
    found = json.loads(run("inspect", str(tmp_path / "gptq"), "--json").stdout)
    assert found["packaging"] == "GPTQ"
    assert set(found["types"]) == {"GPTQ int4 by groups of 32", "float16"}
    assert sum(found["types"].values()) == pytest.approx(1, abs=1e-3)
    assert 4.6 < found["bits per weight"] < 16
    text = run("inspect", str(tmp_path / "gptq")).stdout
    assert "packaging        GPTQ" in text and "GPTQ int4 by groups of 32, runs packed" in text
    assert "packaging" not in run("inspect", str(TINY)).stdout


def test_compare_two_packagings_and_a_text(tmp_path):
    packed = packed_tiny(tmp_path / "packed")
    found = run("compare", str(TINY), str(packed), "--prompt", TEXT)
    assert found.returncode == 0
    assert "stored otherwise: 16 tensors are rounded to bitsandbytes int8" in found.stdout
    assert "perplexity" in found.stdout
    assert run("compare", str(TINY), str(packed), "--tolerance", "0.0001").returncode == 1
    asked = run("compare", str(TINY), str(packed), "--json", "--tolerance", "0.1")
    answer = json.loads(asked.stdout)
    assert answer["equal"] and answer["tensors"][0].keys() >= {"rounding", "relation"}
    assert run("compare", str(TINY), str(packed), "--tolerance", "-1").returncode == 2


def test_from_pretrained_takes_packed_folders_and_adapters(tmp_path):
    plain = packers.write(tmp_path / "mlx", "mlx-4bits", PHI3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mlx")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert torch.equal(model.state_dict()[name], plain[name].float())
    adapter = adapter_folder(tmp_path / "adapter")
    ours = weights.load(PHI3.cls(), TINY, adapter=adapter, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(adapter)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(merged(ids).logits, ours(ids).logits)

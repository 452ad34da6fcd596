"""How much memory packed files take: while they are read, and after. Counted in bytes of a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests import packers
from tests.families import PHI3

CONFIG = {
    **PHI3.tiny,
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": None,
    "pad_token_id": 0,
}
LARGEST = 8000 * 1024  # weights of a matrix
MB = 2**20

CHILD = """
import json, sys
from pathlib import Path
import torch
from decoders import kernels, model_class, read_config, weights

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

folder, packed = Path(sys.argv[1]), sys.argv[2] == "packed"
cls = model_class(read_config(folder))
torch.set_num_threads(1)
kernels.native.wait()
torch.rand(100, 100) @ torch.rand(100, 100)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
peak, own = status("VmHWM"), status("RssAnon")
model = weights.load(cls, folder, packed=packed, dtype=None if packed else torch.bfloat16)
held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
kept = sum(isinstance(m, kernels.Quantized) for m in model.modules())
print(json.dumps([status("VmHWM") - peak, status("RssAnon") - own, sum(held.values()), kept]))
"""


def gguf_file(folder, kind):
    """Of random bytes: nothing is computed."""
    gguf, files = pytest.importorskip("gguf"), pytest.importorskip("tests.gguf_files")
    model = PHI3.model(**{key: CONFIG[key] for key in CONFIG if key in vars(PHI3.model().config)})
    config = {"model_type": "phi3", **model.config.to_dict()}
    writer = files.new_writer(folder / "model.gguf", config)
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    for name, p in model.named_parameters():
        if p.dim() == 1:
            files.add_tensor(writer, files.gguf_name(name), p.detach(), "F32")
            continue
        raw = torch.randint(0, 60, (len(p), p.shape[1] // block * nbytes)).byte().numpy()
        writer.add_tensor(files.gguf_name(name), raw, raw_dtype=number)
    return files.finish(writer, folder / "model.gguf")


def words(*shape, dtype=torch.int32):
    return torch.randint(-(2**31), 2**31 - 1, shape).to(torch.int32).view(dtype)


def gptq(outputs, inputs, bits=4, scattered=False):
    index = torch.arange(inputs) // 128
    parts = {
        "qweight": words(inputs * bits // 32, outputs),
        "qzeros": words(inputs // 128, outputs * bits // 32),
    }
    index = index[torch.randperm(inputs)] if scattered else index
    return {**parts, "scales": torch.rand(inputs // 128, outputs).half(), "g_idx": index.int()}


def awq(outputs, inputs):
    parts = {"qweight": words(inputs, outputs // 8), "qzeros": words(inputs // 128, outputs // 8)}
    return {**parts, "scales": torch.rand(inputs // 128, outputs).half()}


def mlx(outputs, inputs):
    scales, biases = torch.rand(2, outputs, inputs // 64).bfloat16()
    weight = words(outputs, inputs // 8, dtype=torch.uint32)
    return {"weight": weight, "scales": scales.clone(), "biases": biases.clone()}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq"}
FOLDERS = {  # name -> (what makes a matrix, config, whether the embedding is packed)
    "gptq": (gptq, packers.quantized(**GPTQ), False),
    "gptq-8bits": (lambda *s: gptq(*s, bits=8), packers.quantized(**{**GPTQ, "bits": 8}), False),
    "gptq-actorder": (lambda *s: gptq(*s, scattered=True), packers.quantized(**GPTQ), False),
    "awq": (awq, packers.quantized(quant_method="awq", version="gemm", bits=4), False),
    "mlx": (mlx, packers.mlx_config(bits=4, group_size=64), True),
}
TYPES = ("Q4_0", "Q4_1", "Q8_0")


def written(folder, kind):
    """(what is loaded, its bytes)"""
    folder.mkdir()
    if kind not in FOLDERS:
        file = gguf_file(folder, kind)
        return file, file.stat().st_size
    pack, config, embedding = FOLDERS[kind]
    stored = {}
    for name, p in PHI3.model(**{k: CONFIG[k] for k in CONFIG if k != "model_type"}).named_parameters():
        is_packed = p.dim() == 2 and ("layers" in name or embedding)
        parts = (
            pack(*p.shape)
            if is_packed
            else {"weight": p.detach().to(torch.bfloat16 if embedding else torch.half)}
        )
        stored |= {f"{name.removesuffix('weight')}{part}": t for part, t in parts.items()}
    (folder / "config.json").write_text(
        json.dumps({"architectures": [PHI3.class_name()], **CONFIG, **config})
    )
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, (folder / "model.safetensors").stat().st_size


def measured(path, way):
    command = [sys.executable, "-c", CHILD, str(path), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("kind", [*FOLDERS, *TYPES])
def test_a_packed_model_takes_the_memory_of_its_file(tmp_path, kind):
    """A tenth more at most, and while it is read one matrix in 16 bits more: no dequantised copy exists."""
    path, size = written(tmp_path / "folder", kind)
    peak, own, held, kept = measured(path, "packed")
    assert kept >= 16
    assert held <= 1.1 * size
    assert own <= 1.1 * size + 4 * MB
    assert peak <= 1.1 * size + 2 * LARGEST + 8 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["gptq", "awq", "mlx", "Q4_0", "Q6_K"])
def test_dequantising_takes_the_result_and_one_matrix(tmp_path, kind):
    path, size = written(tmp_path / "folder", kind)
    peak, own, held, kept = measured(path, "plain")
    assert not kept
    assert peak <= held + 2 * LARGEST + 12 * MB

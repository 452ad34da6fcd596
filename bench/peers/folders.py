"""The same weights as each engine's own files, made once by its own tools, in the model's folder."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def stored(folder: Path) -> dict[str, Any]:
    """Every tensor of the folder in the hub's layout."""
    import safetensors.torch

    tensors = {}
    for part in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(part)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# ---- llama.cpp ---------------------------------------------------------------------------------------------

GGUF = {  # name in the hub's files -> in llama.cpp's
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.dense": "attn_output",
    "self_attn.o_proj": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_path(folder: Path, bits: str) -> Path:
    """Not beside `config.json`: of a folder with GGUF files ours reads these."""
    return folder / "gguf" / f"{bits}.gguf"


def gguf(folder: Path, bits: str) -> Path:
    """A GGUF file in a folder of its own; without a vocabulary, which nobody needs here."""
    import ctypes

    import llama_cpp

    file = gguf_path(folder, bits)
    if file.exists():
        return file
    file.parent.mkdir(exist_ok=True)
    if bits == "BF16":
        write_gguf(folder, file)
        return file
    params = llama_cpp.llama_model_quantize_default_params()
    types = {"Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q4_K_M": "MOSTLY_Q4_K_M"}
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{types[bits]}")
    params.pure = True  # the output matrix too
    files = str(gguf(folder, "BF16")).encode(), str(file).encode()
    if llama_cpp.llama_model_quantize(*files, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot make {bits}")
    return file


def write_gguf(folder: Path, file: Path) -> None:
    import gguf
    import torch

    config = read_config(folder)
    kind = {"phi": "phi2", "phi3": "phi3"}[config["model_type"]]
    writer = gguf.GGUFWriter(str(file), kind)
    add_metadata(writer, kind, config)
    for name, tensor in fused(folder, config).items():
        stem, _, end = name.rpartition(".")
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
        new = f"blk.{layer[1]}.{GGUF[layer[2]]}.{end}" if layer else f"{GGUF[stem]}.{end}"
        if tensor.dim() == 1:
            writer.add_tensor(new, tensor.float().numpy())
        else:
            raw = tensor.view(torch.uint8).numpy()
            writer.add_tensor(new, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: Any, kind: str, config: dict[str, Any]) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(int(config.get("partial_rotary_factor", 1.0) * head_dim))
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if kind == "phi2":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        writer.add_sliding_window(0)


def fused(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The tensors, with q, k and v in one matrix as llama.cpp has them."""
    import torch

    tensors = stored(folder)
    layers = config["num_hidden_layers"] if config["model_type"] == "phi" else 0
    for attention in (f"model.layers.{i}.self_attn" for i in range(layers)):
        for end in ("weight", "bias"):
            qkv = [tensors.pop(f"{attention}.{one}_proj.{end}") for one in "qkv"]
            tensors[f"{attention}.qkv_proj.{end}"] = torch.cat(qkv)
    return tensors


# ---- Packed weights that ours reads as they are ------------------------------------------------------------


def packed(folder: Path, bits: str) -> Path:
    """A file of llama.cpp's, which its own environment has made, or a GPTQ folder."""
    return gptq(folder) if bits == "gptq" else gguf_path(folder, bits)


def gptq(folder: Path) -> Path:
    """A folder as GPTQModel writes it: 4 bits, groups of 32, symmetric; rounded to the nearest."""
    made = folder / "gptq"
    if made.exists():
        return made
    import safetensors.torch

    new = folder / "gptq.part"
    new.mkdir(exist_ok=True)
    tensors = {}
    for name, tensor in stored(folder).items():
        if ".layers." in name and tensor.dim() == 2:
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{part}": t.contiguous() for part, t in gptq_parts(tensor.float()).items()}
        else:
            tensors[name] = tensor.half()
    safetensors.torch.save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    own = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    config = {**read_config(folder), "quantization_config": own}
    (new / "config.json").write_text(json.dumps(config))
    return new.rename(made)


def gptq_parts(w: Any, group: int = 32) -> dict[str, Any]:
    """Of a matrix (N, K): eight numbers in a word along K, zeros of 8 stored as 7, scales (K / group, N)."""
    import torch

    groups = w.unflatten(1, (-1, group))
    scale = (groups.abs().amax(-1) / 7).half()
    q = ((groups / scale[..., None].float()).round().clamp(-8, 7) + 8).long().flatten(1)
    shift = torch.arange(0, 32, 4)
    words = (q.unflatten(1, (-1, 8)) << shift).sum(-1).to(torch.uint32).view(torch.int32)
    zeros = torch.full((scale.shape[1], len(w) // 8), 0x77777777, dtype=torch.int32)
    index = torch.arange(w.shape[1], dtype=torch.int32) // group
    return {"qweight": words.t(), "qzeros": zeros, "scales": scale.t(), "g_idx": index}


# ---- CTranslate2 -------------------------------------------------------------------------------------------


def ctranslate2(folder: Path, bits: str) -> Path:
    """Its specification filled in: its own loaders know the layouts of 2023 only."""
    made = folder / f"ctranslate2-{bits}"
    if made.exists():
        return made
    config = read_config(folder)
    spec = ctranslate2_spec(config)
    put = putter({name: tensor.float().numpy() for name, tensor in stored(folder).items()})
    is_phi, inner = config["model_type"] == "phi", config["intermediate_size"]
    spec.decoder.scale_embeddings = False
    put(spec.decoder.embeddings, "model.embed_tokens")
    put(spec.decoder.layer_norm, "model.final_layernorm" if is_phi else "model.norm")
    put(spec.decoder.projection, "lm_head")
    for i, layer in enumerate(spec.decoder.layer):
        put_layer(put, layer, f"model.layers.{i}", inner, is_phi)
    spec.register_vocabulary([str(id) for id in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization=bits)
    new = folder / f"ctranslate2-{bits}.part"
    new.mkdir(exist_ok=True)
    spec.save(str(new))
    return new.rename(made)


def ctranslate2_spec(config: dict[str, Any]) -> Any:
    from ctranslate2.specs import common_spec, transformer_spec

    head_dim = config["hidden_size"] // config["num_attention_heads"]
    functions = common_spec.Activation
    own: dict[str, Any] = {"ffn_glu": True, "rms_norm": True, "rotary_dim": 0}
    activation = functions.SWISH
    if config["model_type"] == "phi":
        rotary_dim = int(config["partial_rotary_factor"] * head_dim)
        own = {"parallel_residual": True, "shared_layer_norm": True, "rotary_dim": rotary_dim}
        activation = functions.GELUTanh
    return transformer_spec.TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        config["num_attention_heads"],
        pre_norm=True,
        activation=activation,
        rotary_interleave=False,
        num_heads_kv=config["num_key_value_heads"],
        **own,
    )


def putter(state: dict[str, Any]) -> Callable[..., None]:
    """A function that puts tensors of `state` into a part of a specification."""
    import numpy

    def put(to: Any, name: str, *parts: str, rows: slice = slice(None)) -> None:
        names = [f"{name}.{part}" for part in parts] or [name]
        weight = numpy.concatenate([state[f"{one}.weight"] for one in names])[rows]
        is_norm = weight.ndim == 1
        setattr(to, "gamma" if is_norm else "weight", weight)
        if f"{names[0]}.bias" in state:
            bias = numpy.concatenate([state[f"{one}.bias"] for one in names])
            setattr(to, "beta" if is_norm else "bias", bias)

    return put


def put_layer(put: Callable[..., None], layer: Any, name: str, inner: int, is_phi: bool) -> None:
    attention = layer.self_attention.linear
    if is_phi:
        put(layer.shared_layer_norm, f"{name}.input_layernorm")
        put(attention[0], f"{name}.self_attn", "q_proj", "k_proj", "v_proj")
        put(attention[1], f"{name}.self_attn.dense")
        put(layer.ffn.linear_0, f"{name}.mlp.fc1")
        put(layer.ffn.linear_1, f"{name}.mlp.fc2")
        return
    put(layer.self_attention.layer_norm, f"{name}.input_layernorm")
    put(layer.ffn.layer_norm, f"{name}.post_attention_layernorm")
    put(attention[0], f"{name}.self_attn.qkv_proj")
    put(attention[1], f"{name}.self_attn.o_proj")
    put(layer.ffn.linear_0, f"{name}.mlp.gate_up_proj", rows=slice(inner))
    put(layer.ffn.linear_0_noact, f"{name}.mlp.gate_up_proj", rows=slice(inner, None))
    put(layer.ffn.linear_1, f"{name}.mlp.down_proj")


# ---- ONNX and OpenVINO -------------------------------------------------------------------------------------


def onnx(folder: Path, bits: str) -> Path:
    """By the builder of ONNX Runtime's generator."""
    made = folder / f"onnx-{bits}"
    if not made.exists():
        tiny = ROOT / "checkpoints" / "tiny-gpt-neo"  # any tokenizer: the builder copies one
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            (folder / name).write_bytes((tiny / name).read_bytes())
        options = ["-i", folder, "-o", made, "-p", bits, "-e", "cpu", "-c", folder / "onnx-cache"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def optimum(folder: Path, bits: str) -> Path:
    """By Optimum's export to ONNX, then ONNX Runtime's own quantization."""
    made = folder / f"optimum-{bits}"
    if made.exists():
        return made
    import shutil

    from optimum.onnxruntime import ORTModelForCausalLM

    whole = folder / "optimum"
    if not whole.exists():
        ORTModelForCausalLM.from_pretrained(folder, export=True).save_pretrained(whole)
    new = folder / f"optimum-{bits}.part"
    shutil.copytree(whole, new, dirs_exist_ok=True)
    (new / "model.onnx").unlink()
    quantize_onnx(whole / "model.onnx", new / "model.onnx", bits)
    return new.rename(made)


def quantize_onnx(source: Path, target: Path, bits: str) -> None:
    from onnxruntime import quantization

    if bits == "int8":
        quantization.quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True
        )
        return
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


def openvino(folder: Path, bits: str) -> Path:
    """By Optimum's export to OpenVINO."""
    made = folder / f"openvino-{bits}"
    if not made.exists():
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        settings = {"int8": {"bits": 8}, "int4": {"bits": 4, "group_size": 32, "ratio": 1.0}}[bits]
        config = OVWeightQuantizationConfig(**settings)
        model = OVModelForCausalLM.from_pretrained(
            folder, export=True, compile=False, quantization_config=config
        )
        model.save_pretrained(made)
    return made


MAKERS: dict[str, Callable[[Path, str], Path]] = {
    "llama": gguf,
    "packed": packed,
    "ctranslate2": ctranslate2,
    "onnxruntime": onnx,
    "optimum": optimum,
    "openvino": openvino,
}

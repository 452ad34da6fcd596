"""Ours against the engines that are made for speed, on the same random weights.

    for name in llama.cpp onnxruntime openvino ctranslate2 torchao; do
        python -m venv .peers/$name && .peers/$name/bin/pip install -r bench/requirements-$name.txt; done
    python -m bench.peers --write            # the table and the picture of docs/speed.md

Each engine runs in a process and an environment of its own; one that is not installed is left out and named.
Per round every engine runs once, in turns; the table has medians. Figures are tokens a second (decode: one
token after 512 and after 1,900; prefill: 512 tokens), seconds from nothing to the first token, the largest
memory, and the size of the logits' error against float32 in units of the logits.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speed.md"
STEPS, SHORT, LONG, VOCAB = 24, 512, 1900, 5000  # tokens; ids are drawn below VOCAB
ENGINES = {  # name -> (environment, what this module's child does, with what)
    "ours bfloat16": ("", "ours", None),
    "ours int8": ("", "ours", "int8"),
    "ours int8-weights": ("", "ours", "int8-weights"),
    "ours int4": ("", "ours", "int4"),
    "Transformers bfloat16": ("", "transformers", None),
    "llama.cpp BF16": ("llama.cpp", "llama", "BF16"),
    "llama.cpp Q8_0": ("llama.cpp", "llama", "Q8_0"),
    "llama.cpp Q4_0": ("llama.cpp", "llama", "Q4_0"),
    "llama.cpp Q4_K_M": ("llama.cpp", "llama", "Q4_K_M"),
    "CTranslate2 int8": ("ctranslate2", "ctranslate2", "int8"),
    "torchao int8": ("torchao", "torchao", "int8"),
    "ONNX Runtime int8": ("onnxruntime", "onnxruntime", "int8"),
    "ONNX Runtime int4": ("onnxruntime", "onnxruntime", "int4"),
    "OpenVINO int8": ("openvino", "openvino", "int8"),
    "OpenVINO int4": ("openvino", "openvino", "int4"),
}

SPEEDS = "decode 512", "decode 1900", "prefill"
BITS = {  # what is compared -> ours, and the peers
    "16 bits": ("ours bfloat16", "BF16$|bfloat16$"),
    "8 bits": ("ours int8", "int8$|Q8_0$"),
    "4 bits": ("ours int4", "int4$|Q4_0$|Q4_K_M$"),
}

# ---- The same weights for all ------------------------------------------------------------------------------


def models() -> dict:
    """Name -> (class, config): real widths, few layers."""
    from decoders import phi, phi3

    return {
        "phi-2": (phi.PhiForCausalLM, phi.PhiConfig(
            vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=8,
            num_attention_heads=32, partial_rotary_factor=0.4, max_position_embeddings=2048)),
        "Phi-3-mini": (phi3.Phi3ForCausalLM, phi3.Phi3Config(
            num_hidden_layers=8, sliding_window=None, pad_token_id=0)),
    }  # fmt: skip


def prepare(name: str, folder: Path) -> None:
    """A folder in the hub's layout, and what the float32 model says of a text."""
    import torch

    from decoders import weights

    model_class, config = models()[name]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = model_class(config)
    model.to(torch.bfloat16).to_empty(device="cpu").init_weights().eval()
    weights.save(model, folder)
    ids = torch.randint(5, VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model.float()(ids, logits_to_keep=1).logits[0, -1]
    torch.save({"ids": ids, "logits": exact}, folder / "expected.pt")


# ---- In a process of its own -------------------------------------------------------------------------------


class Ours:
    def __init__(self, folder: Path, bits: str | None, threads: int):
        import torch

        from decoders import kernels, model_class, read_config, weights

        torch.set_num_threads(threads)
        self.model = weights.load(model_class(read_config(folder)), folder, quantize=bits)
        self.extra = {"native": kernels.native.wait()}

    def read(self, ids: list[int]) -> list[float]:
        return self.run(ids, None)

    def run(self, ids: list[int], cache: object) -> list[float]:
        import torch

        with torch.inference_mode():
            output = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[0, -1]

    def step(self, token: int) -> None:
        self.run([token], self.cache)


class Transformers(Ours):
    def __init__(self, folder: Path, bits: str | None, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.extra = {"version": transformers.__version__}


class TorchAO(Ours):
    """Our model file, under which torchao puts its weights of 8 bits."""

    def __init__(self, folder: Path, kind: str, threads: int):
        import torchao
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        super().__init__(folder, None, threads)
        quantize_(self.model, Int8WeightOnlyConfig())
        self.extra = {"version": torchao.__version__}


class CTranslate2:
    """It gives logits of whole texts, and ids one by one: a step is the next id that it writes itself."""

    def __init__(self, folder: Path, kind: str, threads: int):
        import ctranslate2

        self.model = ctranslate2.Generator(str(ctranslate2_folder(folder, kind)), intra_threads=threads)
        self.extra = {"version": ctranslate2.__version__}

    def logits(self, ids: list[int]) -> list[float]:
        import numpy

        return numpy.array(self.model.forward_batch([[str(id) for id in ids]]))[0, -1]

    def read(self, ids: list[int]) -> None:
        texts = [str(id) for id in ids]
        self.steps = self.model.generate_tokens(texts, max_length=STEPS + 2, end_token=[], sampling_topk=1)
        next(self.steps)

    def step(self, token: int) -> None:
        next(self.steps)


def ctranslate2_folder(folder: Path, kind: str) -> Path:
    """The folder in CTranslate2's format, made once: its own loaders know the layouts of 2023 only."""
    made = folder / f"ctranslate2-{kind}"
    if made.exists():
        return made
    import safetensors.torch
    from ctranslate2.specs import common_spec, transformer_spec

    config = json.loads((folder / "config.json").read_text())
    state = {}
    for part in sorted(folder.glob("*.safetensors")):
        state |= {name: t.float().numpy() for name, t in safetensors.torch.load_file(part).items()}
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    phi = config["model_type"] == "phi"
    head = config["hidden_size"] // heads
    kinds, own = common_spec.Activation, {"ffn_glu": True, "rms_norm": True, "rotary_dim": 0}
    if phi:
        turned = int(config["partial_rotary_factor"] * head)
        own = {"parallel_residual": True, "shared_layer_norm": True, "rotary_dim": turned}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers,
        heads,
        pre_norm=True,
        activation=kinds.GELUTanh if phi else kinds.SWISH,
        rotary_interleave=False,
        num_heads_kv=config["num_key_value_heads"],
        **own,
    )

    def put(to: object, name: str, *parts: str, rows: slice = slice(None)) -> None:
        import numpy

        names = [f"{name}.{part}" for part in parts] or [name]
        weight = numpy.concatenate([state[f"{one}.weight"] for one in names])[rows]
        if weight.ndim == 1:
            to.gamma = weight
        else:
            to.weight = weight
        if f"{names[0]}.bias" in state:
            bias = numpy.concatenate([state[f"{one}.bias"] for one in names])
            setattr(to, "beta" if weight.ndim == 1 else "bias", bias)

    spec.decoder.scale_embeddings = False
    put(spec.decoder.embeddings, "model.embed_tokens")
    put(spec.decoder.layer_norm, "model.final_layernorm" if phi else "model.norm")
    put(spec.decoder.projection, "lm_head")
    for i, layer in enumerate(spec.decoder.layer):
        name, attention, inner = f"model.layers.{i}", layer.self_attention.linear, config["intermediate_size"]
        if phi:
            put(layer.shared_layer_norm, f"{name}.input_layernorm")
            put(attention[0], f"{name}.self_attn", "q_proj", "k_proj", "v_proj")
            put(attention[1], f"{name}.self_attn.dense")
            put(layer.ffn.linear_0, f"{name}.mlp.fc1")
            put(layer.ffn.linear_1, f"{name}.mlp.fc2")
        else:
            put(layer.self_attention.layer_norm, f"{name}.input_layernorm")
            put(layer.ffn.layer_norm, f"{name}.post_attention_layernorm")
            put(attention[0], f"{name}.self_attn.qkv_proj")
            put(attention[1], f"{name}.self_attn.o_proj")
            put(layer.ffn.linear_0, f"{name}.mlp.gate_up_proj", rows=slice(inner))
            put(layer.ffn.linear_0_noact, f"{name}.mlp.gate_up_proj", rows=slice(inner, None))
            put(layer.ffn.linear_1, f"{name}.mlp.down_proj")
    spec.register_vocabulary([str(id) for id in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization=kind)
    made.mkdir()
    spec.save(str(made))
    return made


class Llama:
    def __init__(self, folder: Path, kind: str, threads: int):
        import llama_cpp

        file = gguf(folder, kind)
        self.model = llama_cpp.Llama(
            str(file), n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.extra = {"version": llama_cpp.__version__}

    def read(self, ids: list[int]) -> list[float]:
        self.model.reset()
        self.model.eval(ids)
        return [self.model._ctx.get_logits()[i] for i in range(self.model.n_vocab())]

    def step(self, token: int) -> None:
        self.model.eval([token])


def gguf(folder: Path, kind: str) -> Path:
    """The folder in llama.cpp's format, made once; without a vocabulary, which nobody needs here."""
    import ctypes

    import llama_cpp

    file = folder / f"{kind}.gguf"
    if file.exists():
        return file
    if kind == "BF16":
        write_gguf(folder, file)
        return file
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
                    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}[kind]  # fmt: skip
    params.pure = True  # the output matrix too
    files = str(gguf(folder, "BF16")).encode(), str(file).encode()
    if llama_cpp.llama_model_quantize(*files, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot make {kind}")
    return file


GGUF = {  # name in the hub's files -> in llama.cpp's
    "model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "model.norm": "output_norm",
    "lm_head": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.dense": "attn_output", "self_attn.o_proj": "attn_output",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(folder: Path, file: Path) -> None:
    import gguf
    import safetensors.torch
    import torch

    config = json.loads((folder / "config.json").read_text())
    kind = {"phi": "phi2", "phi3": "phi3"}[config["model_type"]]
    to = gguf.GGUFWriter(str(file), kind)
    head = config["hidden_size"] // config["num_attention_heads"]
    to.add_context_length(config["max_position_embeddings"])
    to.add_embedding_length(config["hidden_size"])
    to.add_feed_forward_length(config["intermediate_size"])
    to.add_block_count(config["num_hidden_layers"])
    to.add_head_count(config["num_attention_heads"])
    to.add_head_count_kv(config["num_key_value_heads"])
    to.add_rope_dimension_count(int(config.get("partial_rotary_factor", 1.0) * head))
    to.add_rope_freq_base(10000.0)
    to.add_vocab_size(config["vocab_size"])
    to.add_tokenizer_model("no_vocab")
    if kind == "phi2":
        to.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        to.add_layer_norm_rms_eps(config["rms_norm_eps"])
        to.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        to.add_sliding_window(0)
    state = {}
    for part in sorted(folder.glob("*.safetensors")):
        state |= safetensors.torch.load_file(part)
    for i in range(config["num_hidden_layers"] if kind == "phi2" else 0):  # llama.cpp keeps q, k and v fused
        for end in ("weight", "bias"):
            own = [state.pop(f"model.layers.{i}.self_attn.{one}_proj.{end}") for one in "qkv"]
            state[f"model.layers.{i}.self_attn.qkv_proj.{end}"] = torch.cat(own)
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".")
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
        new = f"blk.{layer[1]}.{GGUF[layer[2]]}.{end}" if layer else f"{GGUF[stem]}.{end}"
        if tensor.dim() == 1:
            to.add_tensor(new, tensor.float().numpy())
        else:
            to.add_tensor(new, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    to.write_header_to_file()
    to.write_kv_data_to_file()
    to.write_tensors_to_file()
    to.close()


class OnnxRuntime:
    def __init__(self, folder: Path, kind: str, threads: int):
        import onnxruntime_genai as runtime

        config = runtime.Config(str(onnx_folder(folder, kind)))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model, self.runtime = runtime.Model(config), runtime
        self.extra = {"version": runtime.__version__}

    def read(self, ids: list[int]) -> list[float]:
        params = self.runtime.GeneratorParams(self.model)
        params.set_search_options(max_length=LONG + STEPS + 2, do_sample=False)
        self.generator = self.runtime.Generator(self.model, params)
        self.generator.append_tokens([ids])
        return self.generator.get_logits()[0, -1]

    def step(self, token: int) -> None:
        self.generator.append_tokens([[token]])
        self.generator.get_logits()


def onnx_folder(folder: Path, kind: str) -> Path:
    """The folder in ONNX, made once by its own builder."""
    made = folder / f"onnx-{kind}"
    if not made.exists():
        tiny = ROOT / "checkpoints" / "tiny-gpt-neo"  # any tokenizer: the builder copies one
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            (folder / name).write_bytes((tiny / name).read_bytes())
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", made,
                   "-p", kind, "-e", "cpu", "-c", folder / "onnx-cache"]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


class OpenVINO:
    """Its runtime, with logits of the last position alone, as its own pipeline asks for."""

    def __init__(self, folder: Path, kind: str, threads: int):
        import openvino

        core = openvino.Core()
        model = core.read_model(openvino_folder(folder, kind) / "openvino_model.xml")
        node = next(out for out in model.outputs if "logits" in out.names).node
        while node.get_type_name() != "MatMul":
            node = node.input_value(0).get_node()
        last = openvino.opset13.slice(node.input_value(0), [-1], [2**31 - 1], [1], [1])
        node.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()
        message = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.model = core.compile_model(model, "CPU", message).create_infer_request()
        self.extra = {"version": openvino.__version__.partition("-")[0]}

    def read(self, ids: list[int]) -> list[float]:
        self.model.reset_state()
        self.past = 0
        return self.run(ids)

    def run(self, ids: list[int]) -> list[float]:
        import numpy

        before, self.past = self.past, self.past + len(ids)
        given = {"input_ids": numpy.array([ids]), "attention_mask": numpy.ones((1, self.past), numpy.int64),
                 "position_ids": numpy.arange(before, self.past)[None],
                 "beam_idx": numpy.zeros(1, numpy.int32)}  # fmt: skip
        known = {name for one in self.model.model_inputs for name in one.names}
        found = self.model.infer({name: value for name, value in given.items() if name in known})
        return next(value for out, value in found.items() if "logits" in out.names)[0, -1]

    def step(self, token: int) -> None:
        self.run([token])


def openvino_folder(folder: Path, kind: str) -> Path:
    made = folder / f"openvino-{kind}"
    if not made.exists():
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        bits = {"int8": {"bits": 8}, "int4": {"bits": 4, "group_size": 32, "ratio": 1.0}}[kind]
        config = OVWeightQuantizationConfig(**bits)
        OVModelForCausalLM.from_pretrained(
            folder, export=True, compile=False, quantization_config=config
        ).save_pretrained(made)
    return made


CHILDREN = {"ours": Ours, "transformers": Transformers, "llama": Llama, "ctranslate2": CTranslate2,
            "torchao": TorchAO, "onnxruntime": OnnxRuntime, "openvino": OpenVINO}  # fmt: skip
CONVERTED = {"llama": gguf, "ctranslate2": ctranslate2_folder, "onnxruntime": onnx_folder,
             "openvino": openvino_folder}  # fmt: skip


def child(kind: str, folder: Path, bits: str | None, threads: int) -> dict:
    """What one engine does, once."""
    import torch

    expected = torch.load(folder / "expected.pt")
    if kind in CONVERTED:
        CONVERTED[kind](folder, bits)  # before the clock runs
    ids = torch.randint(5, VOCAB, (LONG,), generator=torch.Generator().manual_seed(2)).tolist()
    Path("/proc/self/clear_refs").write_text("5")  # the largest memory from here on
    start = time.perf_counter()
    engine = CHILDREN[kind](folder, bits, threads)
    engine.read(ids[:16])
    found = {"first": time.perf_counter() - start, **engine.extra}
    logits = getattr(engine, "logits", engine.read)(expected["ids"][0].tolist())
    logits = torch.as_tensor(logits).double()
    exact = expected["logits"].double()
    found["error"] = ((logits - exact).norm() / exact.norm()).item()
    for name, length in (("decode 512", SHORT), ("decode 1900", LONG)):
        start = time.perf_counter()
        engine.read(ids[:length])
        if length == SHORT:
            engine.read(ids[:length])  # the first one makes memory
            start = time.perf_counter()
            engine.read(ids[:length])
            found["prefill"] = length / (time.perf_counter() - start)
        times = []
        for token in ids[:STEPS]:
            start = time.perf_counter()
            engine.step(token)
            times.append(time.perf_counter() - start)
        found[name] = 1 / statistics.median(times)
    status = Path("/proc/self/status").read_text()
    found["memory"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return found


# ---- In turns ----------------------------------------------------------------------------------------------


def python_of(environment: str) -> Path | None:
    """The interpreter of an engine, ours for none; None where it is not installed."""
    peers = Path(os.environ.get("DECODERS_PEERS", ROOT / ".peers"))
    own = peers / environment / "bin" / "python" if environment else Path(sys.executable)
    return own if own.exists() else None


def measured(
    name: str, engines: list[str], rounds: int, threads: int, folder: Path, found: dict[str, list[dict]]
) -> Iterator[None]:
    """Every engine once per round, what it did added to `found`; pauses after each."""
    if rounds:
        prepare(name, folder)
    for number in range(rounds):
        for engine in engines:
            environment, kind, bits = ENGINES[engine]
            if (python := python_of(environment)) is None:
                continue
            command = [python, __file__, "--child", kind, str(folder), bits or "", "--threads", str(threads)]
            own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own})
            if result.returncode:
                print(f"{engine} failed: {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            found.setdefault(engine, []).append(json.loads(result.stdout.splitlines()[-1]))
            message = found[engine][-1]
            figures = ", ".join(f"{key} {v:.4g}" for key, v in message.items() if isinstance(v, float))
            print(f"{name} {number + 1}: {engine}: {figures}", file=sys.stderr)
            yield


def medians(found: dict[str, list[dict]]) -> dict[str, dict]:
    """Of each engine, in the order of ENGINES, with the number of its runs."""
    return {
        engine: {
            key: value if isinstance(value, str) else statistics.median(one[key] for one in runs)
            for key, value in runs[0].items()
        }
        | {"runs": len(runs)}
        for engine, runs in sorted(found.items(), key=lambda item: list(ENGINES).index(item[0]))
    }


def table(name: str, found: dict[str, dict]) -> list[str]:
    ours = found["ours bfloat16"]
    lines = [
        f"| {name} | decode at 512 | at 1,900 | prefill of 512 | to the first token | memory | error "
        "| runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, one in found.items():
        cells = [f"{one[key]:.3g} tok/s ({one[key] / ours[key]:.2f})" for key in SPEEDS]
        cells += [
            f"{one['first']:.1f} s",
            f"{one['memory'] / 1e9:.2f} GB",
            f"{one['error']:.3f}",
            f"{one['runs']}",
        ]
        version = f" {one['version']}" if "version" in one else ""
        lines.append(f"| {engine}{version} | {' | '.join(cells)} |")
    return lines


def against_the_best(found: dict[str, dict]) -> list[str]:
    """Ours over the fastest engine of as many bits, each figure by itself."""
    lines = ["| ours, of the best peer's | decode at 512 | at 1,900 | prefill of 512 |", "|---|---|---|---|"]
    for message, (own, pattern) in BITS.items():
        peers = [one for engine, one in found.items() if re.search(pattern, engine) and "ours" not in engine]
        if own in found and peers:
            ratios = [found[own][key] / max(one[key] for one in peers) for key in SPEEDS]
            lines.append(f"| {message} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return lines


KIN = {"ours": "#0072b2", "llama.cpp": "#d55e00", "Transformers": "#555555", "ONNX Runtime": "#009e73",
       "OpenVINO": "#cc79a7", "CTranslate2": "#e69f00", "torchao": "#56b4e9"}  # fmt: skip


def picture(results: dict[str, dict[str, dict]]) -> str:
    """SVG: of each model tokens a second over the error of the logits, every engine a dot."""
    width, height, left, top = 430, 300, 60, 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(results)} {height + 90}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for n, (name, found) in enumerate(results.items()):
        errors = [math.log10(one["error"]) for one in found.values()]
        first, last = math.floor(min(errors) * 2) / 2, math.ceil(max(errors) * 2 + 0.4) / 2
        most = max(one["decode 512"] for one in found.values()) * 1.1

        def x(error: float, n: int = n, first: float = first, last: float = last) -> float:
            return width * n + left + (math.log10(error) - first) / (last - first) * (width - left - 20)

        def y(speed: float, most: float = most) -> float:
            return top + height * (1 - speed / most)

        lines.append(f'<text x="{width * n + left}" y="20" font-size="15">{name}</text>')
        for speed in range(0, int(most), 10):
            a, b, at = x(10**first), x(10**last), y(speed)
            lines.append(
                f'<line x1="{a:.0f}" x2="{b:.0f}" y1="{at:.0f}" y2="{at:.0f}" stroke="#ddd"/>'
                f'<text x="{a - 8:.0f}" y="{at + 4:.0f}" text-anchor="end">{speed}</text>'
            )
        for error in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
            if first <= math.log10(error) <= last:
                at = f'x="{x(error):.0f}" y="{top + height + 18}"'
                lines.append(f'<text {at} text-anchor="middle">{error:g}</text>')
        lines.append(
            f'<text x="{width * n + left}" y="{top + height + 38}">error of the logits; '
            "upwards: tokens a second after 512</text>"
        )
        dots = {engine: (x(one["error"]), y(one["decode 512"])) for engine, one in found.items()}
        taken = [(cx - 6, cx + 6, cy + 4) for cx, cy in dots.values()]  # from, to, height; then labels too
        for engine, (cx, cy) in sorted(dots.items(), key=lambda item: item[1][1]):
            color = next(color for kin, color in KIN.items() if engine.startswith(kin))
            long = 7 * len(engine)
            places = [
                (abs(down) + (0 if (shift > 0) == (cx < width * (n + 1) - 130) else 9), shift, down)
                for down in range(-60, 61, 2)
                for shift in (9, -9)
            ]
            for _, shift, down in sorted(places):  # the nearest where nothing stands
                begin, text = cx + (shift if shift > 0 else shift - long), cy + 4 + down
                inside = width * n + left - 30 <= begin and begin + long <= width * (n + 1) + 10
                if inside and not any(
                    abs(text - at) < 13 and begin < b and a < begin + long for a, b, at in taken
                ):
                    break
            anchor = "start" if shift > 0 else "end"
            taken.append((begin, begin + long, text))
            lines.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{color}"/>'
                f'<text x="{cx + shift:.0f}" y="{text:.0f}" fill="{color}" '
                f'text-anchor="{anchor}">{engine}</text>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="engines that match this pattern, beside our bfloat16")
    parser.add_argument("--models", nargs="*", default=list(models()), help="phi-2 and Phi-3-mini")
    parser.add_argument("--keep", type=Path, help="a file for all runs: a later call goes on with it")
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    args = parser.parse_args()
    if args.child:
        kind, folder, bits = args.child
        print(json.dumps(child(kind, Path(folder), bits or None, args.threads)))
        return
    engines = [name for name in ENGINES if re.search(args.only, name) or name == "ours bfloat16"]
    for name in [name for name in engines if python_of(ENGINES[name][0]) is None]:
        print(f"{name}: not installed in .peers/{ENGINES[name][0]}", file=sys.stderr)
    kept = args.keep is not None and args.keep.exists()
    runs: dict[str, dict[str, list[dict]]] = json.loads(args.keep.read_text()) if kept else {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            found = runs.setdefault(name, {})
            for _ in measured(name, engines, args.rounds, args.threads, Path(folder), found):
                if args.keep is not None:
                    args.keep.write_text(json.dumps(runs))
    results = {name: medians(found) for name, found in runs.items()}
    lines = [
        line
        for name, found in results.items()
        for line in (*table(name, found), "", *against_the_best(found), "")
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        page = PAGE.read_text()
        start, end = "<!-- peers -->\n", "<!-- end of peers -->"
        PAGE.write_text(page[: page.index(start) + len(start)] + text + page[page.index(end) :])
        PAGE.with_suffix(".svg").write_text(picture(results))


if __name__ == "__main__":
    main()

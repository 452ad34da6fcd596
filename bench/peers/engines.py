"""An engine a class, each for a process and an environment of its own; only the standard library at the top.

engine = CLASSES["llama"](folder, "Q8_0", 2)
engine.read(ids)        # begin a text: the logits of its last token
engine.grow(ids, 512)   # the same text is longer now: read what comes after its first 512 tokens
engine.step(id)         # one token more
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers import folders
from bench.peers.models import GPT_NEO

STEPS = 256  # that a text may be longer than what is read


class Engine(NamedTuple):
    """The environment, the class below, and with what it is made."""

    environment: str
    kind: str
    bits: str = ""

    def serves(self, model: str) -> bool:
        """llama.cpp, CTranslate2 and ONNX Runtime's generator have no GPT-Neo; Optimum is for that alone."""
        if self.kind == "packed" or self.kind in ("llama", "ctranslate2", "onnxruntime"):
            return model != GPT_NEO
        return self.kind != "optimum" or model == GPT_NEO


ENGINES = {
    "ours bfloat16": Engine("", "ours"),
    "ours int8": Engine("", "ours", "int8"),
    "ours int8-weights": Engine("", "ours", "int8-weights"),
    "ours int4": Engine("", "ours", "int4"),
    "ours, llama.cpp's Q8_0 file": Engine("", "packed", "Q8_0"),
    "ours, llama.cpp's Q4_0 file": Engine("", "packed", "Q4_0"),
    "ours, GPTQ folder of 4 bits": Engine("", "packed", "gptq"),
    "Transformers bfloat16": Engine("", "transformers"),
    "llama.cpp BF16": Engine("llama.cpp", "llama", "BF16"),
    "llama.cpp Q8_0": Engine("llama.cpp", "llama", "Q8_0"),
    "llama.cpp Q4_0": Engine("llama.cpp", "llama", "Q4_0"),
    "llama.cpp Q4_K_M": Engine("llama.cpp", "llama", "Q4_K_M"),
    "CTranslate2 int8": Engine("ctranslate2", "ctranslate2", "int8"),
    "torchao int8": Engine("torchao", "torchao", "int8"),
    "ONNX Runtime int8": Engine("onnxruntime", "onnxruntime", "int8"),
    "ONNX Runtime int4": Engine("onnxruntime", "onnxruntime", "int4"),
    "ONNX Runtime (Optimum) int8": Engine("optimum-onnx", "optimum", "int8"),
    "ONNX Runtime (Optimum) int4": Engine("optimum-onnx", "optimum", "int4"),
    "OpenVINO int8": Engine("openvino", "openvino", "int8"),
    "OpenVINO int4": Engine("openvino", "openvino", "int4"),
}


class Ours:
    def __init__(self, folder: Path, bits: str, threads: int):
        from decoders import weights

        self.set_up(threads)
        self.model = weights.load(self.model_class(folder), folder, quantize=bits or None)

    def set_up(self, threads: int) -> None:
        import torch

        from decoders.kernels import native

        torch.set_num_threads(threads)
        self.extra: dict[str, Any] = {"native": native.wait()}

    @staticmethod
    def model_class(path: Path) -> Any:
        from decoders import model_class, read_config

        return model_class(read_config(path))

    def read(self, ids: list[int]) -> Any:
        return self.run(ids, None)

    def grow(self, ids: list[int], start: int) -> None:
        self.run(ids[start:], self.cache)

    def step(self, token: int) -> None:
        self.run([token], self.cache)

    def run(self, ids: list[int], cache: Any) -> Any:
        import torch

        with torch.inference_mode():
            output = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[0, -1]


class Packed(Ours):
    """Ours, on the packed weights of another tool as they are."""

    def __init__(self, folder: Path, bits: str, threads: int):
        import torch

        from decoders import weights

        self.set_up(threads)
        path = folders.packed(folder, bits)
        model_class = self.model_class(path)
        self.model = weights.load(model_class, path, dtype=torch.bfloat16, packed=True)


class Transformers(Ours):
    def __init__(self, folder: Path, bits: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.extra = {"version": transformers.__version__}


class TorchAO(Ours):
    """Our model file, under which torchao puts its weights of 8 bits."""

    def __init__(self, folder: Path, bits: str, threads: int):
        import torchao
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        super().__init__(folder, "", threads)
        quantize_(self.model, Int8WeightOnlyConfig())
        self.extra = {"version": torchao.__version__}


class CTranslate2:
    """It gives logits of whole texts, and ids one by one: a step is the next id that it writes itself."""

    def __init__(self, folder: Path, bits: str, threads: int):
        import ctranslate2

        self.model = ctranslate2.Generator(str(folders.ctranslate2(folder, bits)), intra_threads=threads)
        self.extra = {"version": ctranslate2.__version__}

    def logits(self, ids: list[int]) -> Any:
        import numpy

        return numpy.array(self.model.forward_batch([[str(id) for id in ids]]))[0, -1]

    def read(self, ids: list[int]) -> None:
        texts = [str(id) for id in ids]
        self.steps = self.model.generate_tokens(texts, max_length=STEPS, end_token=[], sampling_topk=1)
        next(self.steps)

    def grow(self, ids: list[int], start: int) -> None:
        self.read(ids)

    def step(self, token: int) -> None:
        next(self.steps)


class Llama:
    def __init__(self, folder: Path, bits: str, threads: int):
        import llama_cpp

        file = folders.gguf(folder, bits)
        self.model = llama_cpp.Llama(
            str(file), n_ctx=2304, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.extra = {"version": llama_cpp.__version__}

    def read(self, ids: list[int]) -> list[float]:
        self.model.reset()
        self.model.eval(ids)
        logits = self.model._ctx.get_logits()
        return [logits[i] for i in range(self.model.n_vocab())]

    def grow(self, ids: list[int], start: int) -> None:
        self.model.eval(ids[start:])

    def step(self, token: int) -> None:
        self.model.eval([token])


class OnnxRuntime:
    def __init__(self, folder: Path, bits: str, threads: int):
        import onnxruntime_genai as runtime

        config = runtime.Config(str(folders.onnx(folder, bits)))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model, self.runtime = runtime.Model(config), runtime
        self.extra = {"version": runtime.__version__}

    def read(self, ids: list[int]) -> Any:
        params = self.runtime.GeneratorParams(self.model)
        params.set_search_options(max_length=2048, do_sample=False)
        self.generator = self.runtime.Generator(self.model, params)
        self.generator.append_tokens([ids])
        return self.generator.get_logits()[0, -1]

    def grow(self, ids: list[int], start: int) -> None:
        self.generator.append_tokens([ids[start:]])
        self.generator.get_logits()

    def step(self, token: int) -> None:
        self.generator.append_tokens([[token]])
        self.generator.get_logits()


class Optimum:
    """GPT-Neo in ONNX Runtime, by Optimum."""

    def __init__(self, folder: Path, bits: str, threads: int):
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(
            folders.optimum(folder, bits), session_options=options
        )
        self.extra = {"version": onnxruntime.__version__}

    def read(self, ids: list[int]) -> Any:
        self.past, self.cache = 0, None
        return self.run(ids)

    def grow(self, ids: list[int], start: int) -> None:
        self.run(ids[start:])

    def step(self, token: int) -> None:
        self.run([token])

    def run(self, ids: list[int]) -> Any:
        import torch

        self.past += len(ids)
        output = self.model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, self.past, dtype=torch.long),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return output.logits[0, -1]


class OpenVINO:
    """Its runtime, with logits of the last position alone, as its own pipeline asks for."""

    def __init__(self, folder: Path, bits: str, threads: int):
        import openvino

        core = openvino.Core()
        model = core.read_model(folders.openvino(folder, bits) / "openvino_model.xml")
        node = next(out for out in model.outputs if "logits" in out.names).node
        while node.get_type_name() != "MatMul":
            node = node.input_value(0).get_node()
        last = openvino.opset13.slice(node.input_value(0), [-1], [2**31 - 1], [1], [1])
        node.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.model = core.compile_model(model, "CPU", settings).create_infer_request()
        self.extra = {"version": openvino.__version__.partition("-")[0]}

    def read(self, ids: list[int]) -> Any:
        self.model.reset_state()
        self.past = 0
        return self.run(ids)

    def grow(self, ids: list[int], start: int) -> None:
        self.run(ids[start:])

    def step(self, token: int) -> None:
        self.run([token])

    def run(self, ids: list[int]) -> Any:
        import numpy

        before, self.past = self.past, self.past + len(ids)
        inputs = {
            "input_ids": numpy.array([ids]),
            "attention_mask": numpy.ones((1, self.past), numpy.int64),
            "position_ids": numpy.arange(before, self.past)[None],
            "beam_idx": numpy.zeros(1, numpy.int32),
        }
        known = {name for one in self.model.model_inputs for name in one.names}
        outputs = self.model.infer({name: value for name, value in inputs.items() if name in known})
        return next(value for out, value in outputs.items() if "logits" in out.names)[0, -1]


CLASSES: dict[str, Any] = {
    "ours": Ours,
    "packed": Packed,
    "transformers": Transformers,
    "torchao": TorchAO,
    "ctranslate2": CTranslate2,
    "llama": Llama,
    "onnxruntime": OnnxRuntime,
    "optimum": Optimum,
    "openvino": OpenVINO,
}

"""Ours against the engines that are made for speed, on the same random weights.

    python -m venv .peers/llama.cpp && .peers/llama.cpp/bin/pip install -r bench/requirements-llama.cpp.txt
    python -m bench.peers --write            # the table of docs/speed.md

Each engine runs in a process and an environment of its own; one that is not installed is left out and named.
Per round every engine runs once, in turns; the table has medians. Figures are tokens a second (decode: one
token after 512 and after 1,900; prefill: 512 tokens), seconds from nothing to the first token, the largest
memory, and the size of the logits' error against float32 in units of the logits.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
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
        self.extra = {"native": kernels.native.library() is not None}

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


class Llama:
    def __init__(self, folder: Path, kind: str, threads: int):
        import llama_cpp

        file = gguf(folder, kind)
        self.model = llama_cpp.Llama(str(file), n_ctx=2048, n_batch=512, n_threads=threads,
                                     n_threads_batch=threads, verbose=False)
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
    for i in range(config["num_hidden_layers"] if kind == "phi2" else 0):  # llama.cpp keeps q, k and v joint
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


CHILDREN = {"ours": Ours, "transformers": Transformers, "llama": Llama}
CONVERTED = {"llama": gguf}


def child(kind: str, folder: Path, bits: str | None, threads: int) -> dict:
    """What one engine does, once."""
    import torch

    expected = torch.load(folder / "expected.pt")
    if kind in CONVERTED:
        CONVERTED[kind](folder, bits)  # before the clock runs
    ids = torch.randint(5, VOCAB, (LONG,), generator=torch.Generator().manual_seed(2)).tolist()
    start = time.perf_counter()
    engine = CHILDREN[kind](folder, bits, threads)
    engine.read(ids[:16])
    found = {"first": time.perf_counter() - start, **engine.extra}
    logits = torch.as_tensor(engine.read(expected["ids"][0].tolist())).double()
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


def measured(name: str, engines: list[str], rounds: int, threads: int, folder: Path) -> dict[str, dict]:
    prepare(name, folder)
    found: dict[str, list[dict]] = {}
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
            told = found[engine][-1]
            figures = ", ".join(f"{key} {v:.4g}" for key, v in told.items() if isinstance(v, float))
            print(f"{name} {number + 1}: {engine}: {figures}", file=sys.stderr)
    return {engine: {key: value if isinstance(value, str) else statistics.median(one[key] for one in runs)
                     for key, value in runs[0].items()} for engine, runs in found.items()}


def table(name: str, found: dict[str, dict]) -> list[str]:
    ours = found["ours bfloat16"]
    lines = [f"| {name} | decode at 512 | at 1,900 | prefill of 512 | to the first token | memory | error |",
             "|---|---|---|---|---|---|---|"]
    for engine, one in found.items():
        cells = [f"{one[key]:.3g} tok/s ({one[key] / ours[key]:.2f})"
                 for key in ("decode 512", "decode 1900", "prefill")]
        cells += [f"{one['first']:.1f} s", f"{one['memory'] / 1e9:.2f} GB", f"{one['error']:.3f}"]
        version = f" {one['version']}" if "version" in one else ""
        lines.append(f"| {engine}{version} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="engines that match this pattern, beside our bfloat16")
    parser.add_argument("--models", nargs="*", default=list(models()), help="phi-2 and Phi-3-mini")
    parser.add_argument("--write", action="store_true", help="the table into docs/speed.md")
    args = parser.parse_args()
    if args.child:
        kind, folder, bits = args.child
        print(json.dumps(child(kind, Path(folder), bits or None, args.threads)))
        return
    engines = [name for name in ENGINES if re.search(args.only, name) or name == "ours bfloat16"]
    for name in [name for name in engines if python_of(ENGINES[name][0]) is None]:
        print(f"{name}: not installed in .peers/{ENGINES[name][0]}", file=sys.stderr)
    lines = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            lines += [*table(name, measured(name, engines, args.rounds, args.threads, Path(folder))), ""]
    text = "\n".join(lines)
    print(text)
    if args.write:
        page = PAGE.read_text()
        start, end = "<!-- peers -->\n", "<!-- end of peers -->"
        PAGE.write_text(page[: page.index(start) + len(start)] + text + page[page.index(end) :])


if __name__ == "__main__":
    main()

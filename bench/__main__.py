"""Ours and Transformers side by side, on the same random weights, in one run.

    python -m bench                 # all rows, a quarter of an hour on two cores; a table on standard output
    python -m bench --quick         # two layers only, two minutes: does it run?
    python -m bench --write         # the table into README.md too, and the numbers into bench/results.json
    python -m bench --family openai-gpt --write     # this family's rows only, the others as they were
    python -m bench --device cuda   # another table: decoding there, compiled too, and 8 and 4 bits

Every row alternates the two (ours, theirs, ours, ...) and gives medians and their ratio, because the speed of
a shared machine drifts. Weights and the caches that decoding starts from are random: time does not depend on
them. Beforehand the two must give the same logits.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench import busy, machine
from bench.decoding import decoding_rows
from bench.training import training_rows
from decoders import gpt_neo, kernels, openai_gpt, persimmon, phi, phi3, weights
from decoders.formats.config import cache_shape
from decoders.kernels import native
from decoders.kernels.linear import linear

README = Path(__file__).parent.parent / "README.md"
RESULTS = machine.RESULTS
BEGIN, END = "<!-- benchmark: python -m bench --write -->", "<!-- end of benchmark -->"
TOKENIZER = Path(__file__).parent.parent / "checkpoints" / "tiny-gpt-neo"  # any: its ids fit every vocabulary

# EleutherAI/gpt-neo-1.3B
CONFIG = {
    "vocab_size": 50257,
    "hidden_size": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "window_size": 256,
    "max_position_embeddings": 2048,
    "attention_types": [[["global", "local"], 12]],
}

FIRST_TOKEN = {
    "ours": """
from decoders import gpt_neo, tokenize, weights
import torch
tokenizer, folder = tokenize.load({tokenizer!r}), {folder!r}
model = weights.load(gpt_neo.GPTNeoForCausalLM, folder)
print(model.generate(torch.tensor([tokenizer.encode("Once upon a time")]), max_new_tokens=1)[0, -1].item())
""",
    "theirs": """
from transformers import AutoTokenizer, GPTNeoForCausalLM
import torch
tokenizer, folder = AutoTokenizer.from_pretrained({tokenizer!r}), {folder!r}
model = GPTNeoForCausalLM.from_pretrained(folder, dtype="auto")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1].item())
""",
}
LOAD = {
    "ours": (
        "from decoders import gpt_neo, weights; import torch",
        "model = weights.load(gpt_neo.GPTNeoForCausalLM, {folder!r})",
    ),
    "theirs": (
        "from transformers import GPTNeoForCausalLM; import torch",
        "model = GPTNeoForCausalLM.from_pretrained({folder!r}, dtype='auto')",
    ),
}
MEASURED_LOAD = """
import time, torch
from decoders.cli import peak_memory
torch_alone = peak_memory()
{imports}
start = time.perf_counter()
{load}
loaded = time.perf_counter() - start
model.eval()
with torch.no_grad():
    model(torch.zeros(1, 1, dtype=torch.long))
print(loaded, time.perf_counter() - start, peak_memory() - torch_alone)
"""


def every(model: torch.nn.Module) -> dict:
    """Its tensors under every name: a state dict of ours has one name for a tied matrix."""
    return dict(model.named_parameters(remove_duplicate=False))


Pair = tuple[float, float, float]  # ours, theirs, ratio


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Pair:
    """Medians of both, and the median of the ratios theirs / ours, pair by pair. One round more warms up."""
    pairs = [(ours(), theirs()) for _ in tqdm(range(rounds + 1), leave=False, disable=None)][1:]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return a, b, statistics.median(y / x for x, y in pairs)


def seconds(run: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def python(code: str) -> str:
    """What a fresh Python prints."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if found.returncode:
        raise SystemExit(f"a benchmark process failed:\n{found.stderr}")
    return found.stdout


def make_folder(folder: Path, layers: int) -> None:
    """A checkpoint of the real width in bfloat16."""
    kinds = [[["global", "local"], layers // 2]]
    config = gpt_neo.GPTNeoConfig(**{**CONFIG, "num_layers": layers, "attention_types": kinds})
    torch.manual_seed(0)
    weights.save(gpt_neo.GPTNeoForCausalLM(config).to(torch.bfloat16).init_weights(), folder)


def both(folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours, and Transformers' on the very same tensors."""
    from transformers import GPTNeoForCausalLM

    ours = weights.load(gpt_neo.GPTNeoForCausalLM, folder, dtype=dtype)
    theirs = GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs.load_state_dict(every(ours), assign=True)
    theirs.tie_weights()
    ids = torch.randint(0, 50257, (1, 40))
    with torch.no_grad():
        a, b = ours(ids).logits.float(), theirs.eval()(ids).logits.float()
    difference = ((a - b).abs().mean() / b.std()).item()
    if not difference < (0.1 if dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"not the same model: logits differ by {difference:.1e} of their spread")
    return ours, theirs


def decoding(model: torch.nn.Module, cache: object, batch: int, steps: int) -> None:
    token = torch.zeros(batch, 1, dtype=torch.long)
    for _ in range(steps):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def decode_row(pair: tuple, batch: int, context: int, rounds: int, steps: int = 4) -> Pair:
    """Tokens per second of both, and the ratio."""
    from transformers import DynamicCache

    ours, theirs = pair
    dtype, (layers, heads, D) = ours.lm_head.weight.dtype, cache_shape(ours.config)
    size = (batch, heads, context, D)
    past = [(torch.randn(size).to(dtype), torch.randn(size).to(dtype)) for _ in range(layers)]
    mine, other = sys.modules[type(ours).__module__].KVCache(past), DynamicCache(past)
    window = getattr(theirs.config, "sliding_window", None) or math.inf
    if context > window:  # theirs forgets what is outside
        other = DynamicCache(config=theirs.config)
        for layer, (k, v) in enumerate(past):
            other.update(k, v, layer)
    decoding(ours, mine, batch, 1)  # the buffers grow once, as after a prompt

    def rewound_ours() -> float:
        mine.lengths = [context] * layers
        return seconds(lambda: decoding(ours, mine, batch, steps))()

    def rewound_theirs() -> float:
        taken = seconds(lambda: decoding(theirs, other, batch, steps))()
        if context <= window:  # a window's cache cannot be rewound, and stays as long as it is
            other.crop(-steps)
        return taken

    a, b, ratio = alternate(rewound_ours, rewound_theirs, rounds)
    return batch * steps / a, batch * steps / b, ratio


def gpt_neo_rows(rounds: int, layers: int) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        folder, small = Path(temporary) / "large", Path(temporary) / "small"
        make_folder(folder, layers)
        make_folder(small, min(layers, 8))
        yield from folder_rows(folder, rounds)
        yield from forward_rows(folder, small, rounds, layers)


def folder_rows(folder: Path, rounds: int) -> Iterator[dict]:
    """A fresh process, loading, memory."""
    places = {"folder": str(folder), "tokenizer": str(TOKENIZER)}
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    a, b, ratio = alternate(
        *(seconds(lambda code=code: python(code.format(**places))) for code in FIRST_TOKEN.values()), rounds
    )
    yield {"row": "fresh process to its first token", "unit": "s", "ours": a, "theirs": b, "ratio": ratio}

    measured: dict[str, list] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, (imports, load) in LOAD.items():
            code = MEASURED_LOAD.format(imports=imports, load=load.format(**places))
            measured[name].append([float(x) for x in python(code).split()])
    columns = {
        name: [statistics.median(column) for column in zip(*runs, strict=True)]
        for name, runs in measured.items()
    }
    for i, (row, unit, scale) in enumerate(
        [
            ("loading a folder", "s", 1),
            ("loading and one token", "s", 1),
            ("peak memory of that, above PyTorch", "x checkpoint", size),
        ]
    ):
        a, b = columns["ours"][i] / scale, columns["theirs"][i] / scale
        yield {"row": row, "unit": unit, "ours": a, "theirs": b, "ratio": b / a}


def forward_rows(folder: Path, small: Path, rounds: int, layers: int) -> Iterator[dict]:
    """Decoding and prefill."""
    for batch, where, count in ((1, folder, layers), (8, small, min(layers, 8))):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"batch {batch}, {str(dtype)[6:]}, {count} layers"
            with torch.no_grad():
                pair = both(where, dtype)
                read = sum(p.nbytes for n, p in pair[0].named_parameters() if "wpe" not in n)
                for context in (128, 512, 1900):
                    a, b, ratio = decode_row(pair, batch, context, rounds)
                    yield {
                        "row": f"decode at {context}, {name}",
                        "unit": "tok/s",
                        "ours": a,
                        "theirs": b,
                        "ratio": ratio,
                        "GB/s": a / batch * read / 1e9,
                    }
                for length in (512, 1900) if batch == 1 else ():
                    ids = torch.randint(0, 50257, (1, length))
                    runs = (seconds(lambda m=m, i=ids: m(i, logits_to_keep=1, use_cache=True)) for m in pair)
                    a, b, ratio = alternate(*runs, max(2, rounds // 2))
                    yield {
                        "row": f"prefill of {length}, {name}",
                        "unit": "tok/s",
                        "ours": length / a,
                        "theirs": length / b,
                        "ratio": ratio,
                    }
                del pair


def openai_gpt_rows(rounds: int, layers: int) -> Iterator[dict]:
    """200 tokens after 256 at GPT-1's size. Transformers has no cache for it: it recomputes everything."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    ours = kernels.prepare(openai_gpt.OpenAIGPTLMHeadModel(openai_gpt.OpenAIGPTConfig()).eval())
    theirs = OpenAIGPTLMHeadModel(OpenAIGPTConfig()).eval()
    theirs.load_state_dict(every(ours))
    ids = torch.randint(0, 40478, (1, 256))
    texts = []
    a, b, ratio = alternate(
        seconds(lambda: texts.append(ours.generate(ids, max_new_tokens=200, eos_token_id=None))),
        seconds(
            lambda: texts.append(
                theirs.generate(
                    ids,
                    max_new_tokens=200,
                    do_sample=False,
                    pad_token_id=0,
                    attention_mask=torch.ones_like(ids),
                )
            )
        ),
        1,
    )
    if texts[0].tolist() != texts[1].tolist():
        raise SystemExit("GPT-1: the two generate different texts")
    row = "GPT-1, float32: 200 tokens after 256"
    yield {"row": row, "unit": "tok/s", "ours": 200 / a, "theirs": 200 / b, "ratio": ratio}


def bare_products(model: torch.nn.Module) -> float:
    """Tokens per second if a token were nothing but one product with every weight matrix."""
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rows = {m.in_features: torch.randn(1, 1, m.in_features).to(m.weight.dtype) for m in matrices}
    run = seconds(lambda: [linear(rows[m.in_features], m.weight, m.bias) for m in matrices])
    return 1 / statistics.median(run() for _ in range(9))


def attentions(ours: torch.nn.Module, theirs_class: type, config: object) -> dict[str, torch.nn.Module]:
    """Transformers' model with either attention, on the tensors of ours."""
    theirs = {}
    for attention in ("eager", "sdpa"):
        with torch.device("meta"):
            own = copy.deepcopy(config)  # the attention is written into it
            model = theirs_class._from_config(own, attn_implementation=attention).eval()
        model.load_state_dict(every(ours), assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(own)  # not a weight
        theirs[attention] = model
    ids = torch.randint(0, config.vocab_size, (1, 40))
    a, b = ours(ids).logits.float(), theirs["eager"](ids).logits.float()
    if not (a - b).abs().mean() / b.std() < 0.1:
        raise SystemExit(f"{type(ours).__name__}: not the same model")
    return theirs


def best(found: dict[str, Pair], row: str, unit: str = "tok/s", **extra) -> dict:
    """The row against the faster of Transformers' two attentions."""
    name = min(found, key=lambda name: found[name][2])
    a, b, ratio = found[name]
    return {
        "row": f"{row}, bfloat16, against {name}",
        "unit": unit,
        "ours": a,
        "theirs": b,
        "ratio": ratio,
        **{key: value(a) for key, value in extra.items()},
    }


def half_rows(
    name: str, ours: torch.nn.Module, theirs: dict, contexts: tuple, lengths: tuple, rounds: int
) -> Iterator[dict]:
    """Decoding and prefill in bfloat16, against the faster of Transformers' two attentions."""
    read = sum(p.nbytes for n, p in ours.named_parameters() if "embed_tokens" not in n)
    for context in contexts:
        found = {key: decode_row((ours, model), 1, context, rounds) for key, model in theirs.items()}
        yield best(
            found,
            f"{name}: decode at {context}",
            **{"GB/s": lambda a: a * read / 1e9, "bare": lambda a: a / bare_products(ours)},
        )
    for length in lengths:
        ids = torch.randint(0, ours.config.vocab_size, (1, length))
        found = {}
        for key, model in theirs.items():
            a, b, ratio = alternate(
                *(
                    seconds(lambda m=m, ids=ids: m(ids, logits_to_keep=1, use_cache=True))
                    for m in (ours, model)
                ),
                max(2, rounds // 2),
            )
            found[key] = length / a, length / b, ratio
        yield best(found, f"{name}: prefill of {length}")


def phi_rows(rounds: int, layers: int) -> Iterator[dict]:
    """phi-1.5's real size."""
    from transformers import PhiConfig, PhiForCausalLM

    ours = phi.PhiForCausalLM(phi.PhiConfig(num_hidden_layers=layers)).to(torch.bfloat16)
    kernels.prepare(ours.init_weights().eval())
    with torch.no_grad():
        theirs = attentions(ours, PhiForCausalLM, PhiConfig(num_hidden_layers=layers))
        yield from half_rows("Phi-1.5", ours, theirs, (512, 1900), (512, 1900), rounds)


def phi3_rows(rounds: int, layers: int) -> Iterator[dict]:
    """Phi-3-mini-4k's real size; its window is shorter than 4,000 tokens of context."""
    from transformers import Phi3Config, Phi3ForCausalLM

    layers = min(32, layers + 8)
    with torch.device("meta"):
        ours = phi3.Phi3ForCausalLM(phi3.Phi3Config(num_hidden_layers=layers, sliding_window=2047))
    ours = ours.to(torch.bfloat16).to_empty(device="cpu").init_weights().eval()
    kernels.prepare(ours)
    config = Phi3Config(num_hidden_layers=layers, sliding_window=2047)
    with torch.no_grad():
        theirs = attentions(ours, Phi3ForCausalLM, config)
        yield from half_rows(f"Phi-3-mini, {layers} layers", ours, theirs, (512, 4000), (512, 1900), rounds)


LOSS = """
import torch
from decoders.cli import peak_memory
{imports}
torch.manual_seed(0)
with torch.device("meta"):
    model = {model}
model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
for p in model.parameters():
    p.data.normal_(0, 0.02)
{rope}
ids = torch.randint(0, 262144, (1, 2048))
with torch.no_grad():
    model(ids[:, :2])
    before = peak_memory()
    loss = model(ids, labels=ids{keep}).loss
print(peak_memory() - before, loss.item())
"""
LOSS_OF = {
    "ours": {
        "imports": "from decoders import persimmon",
        "keep": ", logits_to_keep=1",
        "rope": "",
        "model": "persimmon.PersimmonForCausalLM(persimmon.PersimmonConfig(num_hidden_layers=LAYERS))",
    },
    "theirs": {
        "imports": "from transformers import PersimmonConfig, PersimmonForCausalLM",
        "keep": "",
        "model": "PersimmonForCausalLM(PersimmonConfig(num_hidden_layers=LAYERS, rope_theta=25000))",
        "rope": "model.model.rotary_emb = type(model.model.rotary_emb)(model.config)",
    },
}


def persimmon_rows(rounds: int, layers: int) -> Iterator[dict]:
    """Four layers of the real width, and the real vocabulary, which is most of the work."""
    from transformers import PersimmonConfig, PersimmonForCausalLM

    layers = min(layers, 4)
    found = {}
    for name, parts in LOSS_OF.items():
        code = LOSS.format(**parts).replace("LAYERS", str(layers))
        found[name] = [float(x) for x in python(code).split()]
    (a, loss), (b, other) = found.values()
    if not abs(loss - other) < 0.05 * other:  # the same spread of random weights, drawn in another order
        raise SystemExit(f"Persimmon: losses of {loss} and {other}")
    yield {
        "row": "Persimmon, 4 layers: memory for the loss of 2,048 tokens",
        "unit": "GB",
        "ours": a / 1e9,
        "theirs": b / 1e9,
        "ratio": b / a,
    }
    with torch.device("meta"):
        ours = persimmon.PersimmonForCausalLM(persimmon.PersimmonConfig(num_hidden_layers=layers))
    ours = ours.to(torch.bfloat16).to_empty(device="cpu").init_weights().eval()
    kernels.prepare(ours)
    with torch.no_grad():
        theirs = attentions(
            ours, PersimmonForCausalLM, PersimmonConfig(num_hidden_layers=layers, rope_theta=25000.0)
        )
        yield from half_rows("Persimmon, 4 layers", ours, theirs, (512, 1900), (512, 1900), rounds)


FAMILIES = {
    "gpt_neo": gpt_neo_rows,
    "openai-gpt": openai_gpt_rows,
    "phi": phi_rows,
    "phi3": phi3_rows,
    "persimmon": persimmon_rows,
    "decoding": partial(decoding_rows, alternate, every),
    "busy": busy.readme_rows,
    "training": training_rows,
}


def table(result: dict) -> str:
    """Markdown. A ratio above 1 means that ours is faster, or smaller."""
    lines = [
        f"{result['machine']}; reads {result['read_speed']:.0f} GB/s at best; PyTorch {result['torch']}, "
        f"Transformers {result['transformers']}; {result['model']}.",
        "",
        "| | ours | Transformers | ratio | of the memory bandwidth |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        read = row.get("read_speed", result["read_speed"])  # before and after it
        share = f"{row['GB/s'] / read:.0%}" if "GB/s" in row else ""
        share += f"; {row['bare']:.0%} of the bare matrix products' speed" if "bare" in row else ""
        numbers = f"{row['ours']:.3g} {row['unit']} | {row['theirs']:.3g} {row['unit']} | {row['ratio']:.2f}"
        lines.append(f"| {row['row']} | {numbers} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two layers and two rounds")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--family", choices=FAMILIES, help="measure these rows only")
    parser.add_argument("--device", help="decode there instead, beside the bandwidth: bench/device.py")
    parser.add_argument("--against", metavar="COMMIT", help="decode by that commit too, in turns")
    args = parser.parse_args()
    if args.against:
        from bench import against

        against.main(args.against, args.rounds, args.write)
        return
    native.wait()
    if args.device:
        from bench import device

        device.main(args.device, args.quick, args.rounds)
        return
    layers, rounds = (2, 2) if args.quick else (CONFIG["num_layers"], args.rounds)
    import transformers

    transformers.logging.set_verbosity_error()
    result = {
        "machine": machine.name(),
        "read_speed": machine.read_speed(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": f"gpt-neo-1.3B's width, {layers} layers",
        "rows": [],
    }
    earlier = json.loads(RESULTS.read_text()) if args.family and RESULTS.exists() else {"rows": []}
    before = result["read_speed"]
    if earlier.get("machine") == result["machine"]:
        result["read_speed"] = max(before, earlier["read_speed"])
    for family, measure in FAMILIES.items():
        if args.family in (None, family):
            for row in measure(rounds, layers):
                after = (
                    machine.read_speed()
                )  # of a shared machine: what neighbours leave changes within minutes
                row = {"family": family, "read_speed": (before + after) / 2, **row}
                print(table({**result, "rows": [row]}).splitlines()[-1], file=sys.stderr, flush=True)
                result["rows"].append(row)
                before = after
        else:
            result["rows"] += [row for row in earlier["rows"] if row["family"] == family]
    print(table(result))
    if args.write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        before, rest = README.read_text("utf-8").split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()

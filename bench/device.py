"""Decoding on a GPU, or another device, beside Transformers and the speed of its memory; and whether the six
families give the right numbers there.

    python -m bench --device cuda            # the real sizes of phi-2 and Phi-3-mini, random weights
    python -m bench --device cpu --quick     # does it run?

A step reads every weight and the cache once: the share of the bandwidth is what of the time a copy of memory
of that size takes. Every figure is the median of rounds in turns, of 64 tokens after a prompt of 512.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from decoders import FAMILIES, decoding, kernels, model_class
from decoders.compare.draw import SMALL, redraw
from decoders.formats.config import cache_shape, modern

PROMPT, NEW, WARM = 512, 64, 8  # tokens


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(run: Callable, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def bandwidth(device: str, size: int = 2**30) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    times = [seconds(lambda: b.copy_(a), device) for _ in range(12)]
    return 2 * size / statistics.median(times[2:])


# ---- Numbers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def parity(device: str) -> Iterator[str]:
    """The size of the logits' error on the device, in units of theirs in float64 on a CPU; with left padding,
    and token by token with a cache."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield "| logits' error | float32 | bfloat16 | float16 |"
    yield "|---|---|---|---|"
    for kind in FAMILIES:
        cls, config = model_class({"model_type": kind}), {**SMALL[kind], "rope_scaling": None}
        model = redraw(cls(cls.config_class.from_dict(modern(config, kind))), 0).double().eval()
        ids = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        exact, cells = model(**model.prepare_inputs(ids, mask, None)).logits[mask.bool()], []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            other = kernels.prepare(copy.deepcopy(model).to(device, dtype))
            own, own_mask, cache, parts = ids.to(device), mask.to(device), None, []
            whole = other(**other.prepare_inputs(own, own_mask, None)).logits[mask.bool()]
            for end in (7, *range(8, 24)):
                output = other(**other.prepare_inputs(own[:, :end], own_mask[:, :end], cache), use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            cached = torch.cat(parts, 1)[mask.bool()]
            off = [((y.cpu().double() - exact).norm() / exact.norm()).item() for y in (whole, cached)]
            cells.append(f"{max(off):.1e}")
        yield f"| {cls.__name__} | {' | '.join(cells)} |"


# ---- Speed -------------------------------------------------------------------------------------------------


def models(quick: bool) -> dict[str, tuple[str, dict]]:
    less = {"num_hidden_layers": 2, "hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 4,
            "num_key_value_heads": 4} if quick else {}  # fmt: skip
    return {
        "phi-2": ("phi", {
            "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4,
            "max_position_embeddings": 2048, **less}),
        "Phi-3-mini": ("phi3", {
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": None, "pad_token_id": 0,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **less}),
    }  # fmt: skip


def engines(kind: str, config: dict, device: str) -> Iterator[tuple[str, torch.nn.Module, Callable]]:
    """What it is called, the model, and what makes it write n tokens after ids."""
    import transformers

    transformers.logging.set_verbosity_error()
    cls = model_class({"model_type": kind})

    def fresh() -> torch.nn.Module:
        with torch.device("meta"):
            model = cls(cls.config_class.from_dict(config))
        return model.to(torch.bfloat16).to_empty(device=device).init_weights().eval()

    def ours(model: torch.nn.Module, compiled: bool, ids: torch.Tensor, n: int) -> None:
        decoding.generate(model, ids, max_new_tokens=n, eos_token_id=None, compiled=compiled)

    for bits in (None, "int8", "int4"):
        model = kernels.prepare(fresh() if bits is None else kernels.quantize(fresh(), bits))
        for compiled in (False, True):
            message = f"ours {bits or 'bfloat16'}{', compiled' if compiled else ''}"
            yield message, model, lambda ids, n, model=model, c=compiled: ours(model, c, ids, n)
    their_config = transformers.AutoConfig.for_model(kind, **config)
    with torch.device(device):
        theirs = transformers.AutoModelForCausalLM.from_config(their_config, dtype=torch.bfloat16).eval()
    for compiled in (False, True):
        more = {"cache_implementation": "static"} if compiled else {}
        message = f"Transformers {transformers.__version__} bfloat16{', compiled' if compiled else ''}"
        yield (
            message,
            theirs,
            lambda ids, n, more=more: theirs.generate(
                ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **more
            ),
        )


def size_of(model: torch.nn.Module) -> int:
    """Bytes of weights that a step reads: all but the token table."""
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head = {id(p) for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in tensors if id(t) not in tables - head)


def speed(device: str, quick: bool, rounds: int) -> Iterator[str]:
    most = bandwidth(device, 2**26 if quick else 2**30)
    yield f"Memory of {device}: {most / 1e9:.0f} GB/s."
    for title, (kind, config) in models(quick).items():
        yield ""
        yield f"| {title} | batch 1 | of the bandwidth | batch 32 | of the bandwidth |"
        yield "|---|---|---|---|---|"
        for message, model, run in engines(kind, config, device):
            cells = []
            for batch in (1, 4 if quick else 32):
                ids = torch.randint(5, 5000, (batch, PROMPT), device=device)
                run(ids, WARM), run(ids, WARM + NEW)  # compiled, and memory is there
                times = [seconds(partial(run, ids, n), device) for n in (WARM, WARM + NEW) * rounds]
                step = (statistics.median(times[1::2]) - statistics.median(times[::2])) / NEW
                layers, heads, head = cache_shape(getattr(model, "config", None))
                cache = batch * (PROMPT + NEW // 2) * 2 * 2 * layers * heads * head
                share = (size_of(model) + cache) / most / step
                cells += [f"{batch / step:.4g} tok/s", f"{share:.0%}"]
            yield f"| {message} | {' | '.join(cells)} |"


def main(device: str, quick: bool, rounds: int) -> None:
    for lines in (parity(device), [""], speed(device, quick, rounds)):
        for line in lines:
            print(line, flush=True)

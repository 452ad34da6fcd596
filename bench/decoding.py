"""Rows for the ways to decode: calls of `generate`, ours against Transformers' or against our own greedy."""

import time
from collections.abc import Callable, Iterator

import torch

from decoders import decoding, gpt_neo, kernels, phi3

NEW = 33  # new tokens; those after the first are counted


def per_token(call: Callable[[int], object]) -> Callable[[], float]:
    """Seconds of a step: a call with NEW tokens less one with a single token, which reads the prompt."""

    def timed() -> float:
        taken = []
        for new in (1, NEW):
            start = time.perf_counter()
            call(new)
            taken.append(time.perf_counter() - start)
        return (taken[1] - taken[0]) / (NEW - 1)

    return timed


def whole(call: Callable[[int], object]) -> Callable[[], float]:
    """Seconds of a call with NEW tokens, the prompt read too."""

    def timed() -> float:
        start = time.perf_counter()
        call(NEW)
        return time.perf_counter() - start

    return timed


def quoting(prompt: torch.Tensor, vocab: int) -> list[int]:
    """What an edit of the prompt's second half would be: it is quoted, every twelfth token is another."""
    source = prompt[0, prompt.shape[1] // 2 :].tolist()
    return [(id * 7 + 1) % vocab if i % 12 == 11 else id for i, id in enumerate(source)][:NEW]


def scripted(script: list[int], start: int) -> Callable:
    """A logits processor under which any model says `script`: random weights do not quote."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, script[min(ids.shape[1] - start, len(script) - 1)]] += 1e4
        return scores

    return process


def rows(name: str, ours, theirs, alternate: Callable, rounds: int) -> Iterator[dict]:
    vocab = ours.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocab, (1, 512), generator=generator)
    eight = torch.randint(3, vocab, (8, 64), generator=generator)
    common = {"eos_token_id": None, "pad_token_id": 0, "min_new_tokens": None}

    def call(model, ids, options) -> Callable[[int], object]:
        if model is ours:
            return lambda new: decoding.generate(ours, ids, max_new_tokens=new, **common, **options)
        mask = torch.ones_like(ids)
        return lambda new: theirs.generate(ids, attention_mask=mask, max_new_tokens=new, **common, **options)

    for what, ids, options in (
        ("beams of 4 after 512 tokens", prompt, {"num_beams": 4}),
        ("batch of 8, sampled", eight, {"do_sample": True}),
        ("guidance after 512 tokens", prompt, {"guidance_scale": 1.5}),
    ):
        a, b, ratio = alternate(*(per_token(call(model, ids, options)) for model in (ours, theirs)), rounds)
        yield {"row": f"{name}: {what}", "unit": "steps/s", "ours": 1 / a, "theirs": 1 / b, "ratio": ratio}
    a, b, ratio = alternate(
        *(whole(call(model, prompt, {"num_beams": 4})) for model in (ours, theirs)), rounds
    )
    yield {
        "row": f"{name}: beams of 4, 512 tokens read and {NEW} written",
        "unit": "s",
        "ours": a,
        "theirs": b,
        "ratio": ratio,
    }
    quote = {"logits_processor": [scripted(quoting(prompt, vocab), prompt.shape[1])]}
    ways = {"prompt_lookup_num_tokens": 8}, {}
    a, b, ratio = alternate(*(per_token(call(ours, prompt, {**quote, **way})) for way in ways), rounds)
    yield {
        "row": f"{name}: prompt lookup, 11 of 12 tokens quoted, against our own greedy",
        "unit": "tok/s",
        "ours": 1 / a,
        "theirs": 1 / b,
        "ratio": ratio,
    }


def decoding_rows(alternate: Callable, every: Callable, rounds: int, layers: int) -> Iterator[dict]:
    """gpt-neo-1.3B's and Phi-3-mini's width in bfloat16, with fewer layers."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, Phi3Config, Phi3ForCausalLM

    layers = min(layers, 8)
    small = {"num_hidden_layers": layers}
    types = {"num_layers": layers, "attention_types": [[["global", "local"], layers // 2]]}
    for name, mine, other, their_config in (
        ("GPT-Neo-1.3B", gpt_neo.GPTNeoForCausalLM, GPTNeoForCausalLM, GPTNeoConfig(**types)),
        ("Phi-3-mini", phi3.Phi3ForCausalLM, Phi3ForCausalLM, Phi3Config(**small)),
    ):
        ours = mine(mine.config_class(**(types if other is GPTNeoForCausalLM else small)))
        ours = kernels.prepare(ours.to(torch.bfloat16).eval())
        theirs = other._from_config(their_config, dtype=torch.bfloat16).eval()
        theirs.load_state_dict(every(ours), assign=True)
        theirs.tie_weights()
        yield from rows(f"{name}, {layers} layers", ours, theirs, alternate, rounds)

"""Steps of decoding as one graph: the tokens of plain steps, compiled once."""

import copy
import io
import shutil

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from decoders import decoding, fuyu, kernels, tokenize, weights
from decoders.cli import main
from tests.families import FAMILIES, LONGROPE, PHI3, inputs

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def both(model, ids, mask=None, **options):
    """Plain and compiled ids."""
    options = {"max_new_tokens": 20, "eos_token_id": None, **options}
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        found.append(decoding.generate(model, ids, mask, compiled=compiled, **options))
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_the_same_tokens_and_one_graph(family, padded):
    model = kernels.prepare(
        family.model(max_position_embeddings=400)
        if family.name != "openai-gpt"
        else family.model(n_positions=400)
    )
    ids, mask = inputs(101, padded=padded)
    before = graphs()
    for options in ({}, {"do_sample": True, "top_k": 0}, {"max_new_tokens": 60}):
        plain, found = both(model, ids, mask, **options)
        assert torch.equal(plain, found), options
    assert graphs() == before + 1
    again = decoding.generate(model, ids, mask, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(again, both(model, ids, mask)[0])  # plain steps are as before


@torch.no_grad()
def test_logits_step_by_step(family):
    """Also where a cache grows past its length, and where plain steps come between."""
    model = family.model()
    ids, mask = inputs(101, padded=True)
    whole = model(**model.prepare_inputs(ids, mask, None)).logits
    cache = model(**model.prepare_inputs(ids[:, :9], mask[:, :9], None), use_cache=True).past_key_values
    decoder = kernels.compile(model).decoder
    for n in range(9, ids.shape[1]):
        given = model.prepare_inputs(ids[:, : n + 1], mask[:, : n + 1], cache)
        output = model(**given) if n == 13 else decoder(given, 23)
        cache = output.past_key_values
        torch.testing.assert_close(output.logits[:, -1], whole[:, n], atol=2e-5, rtol=2e-5)
        assert len(cache) == n + 1 == cache[0][0].shape[2]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"guidance_scale": 1.5}, {"prompt_lookup_num_tokens": 3, "rows": 1}, {"num_return_sequences": 2, "do_sample": True},
                                     {"prefill_chunk_size": 5}, {"penalty_alpha": 0.4, "top_k": 4}], ids=str)  # fmt: skip
def test_other_ways_to_decode(options):
    family = FAMILIES[0]
    model, (ids, mask) = family.model(), inputs(101, padded=True)
    rows = slice(0, options.pop("rows", 2))
    assert torch.equal(*both(model, ids[rows], mask[rows], **options))


def test_a_text_that_grows_past_longropes_limit():
    model, (ids, _) = PHI3.model(**LONGROPE, sliding_window=None), inputs(101)
    assert torch.equal(*both(model, ids[:, :7]))


def test_a_given_cache_goes_on():
    model, (ids, _) = FAMILIES[2].model(), inputs(101)
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    found = decoding.generate(
        model, ids, past_key_values=cache, max_new_tokens=5, eos_token_id=None, compiled=True
    )
    assert torch.equal(found, both(model, ids, max_new_tokens=5)[0]) and len(cache) == found.shape[1] - 1


def test_pictures():
    tiny = "checkpoints/tiny-fuyu"
    model, tokenizer = weights.load(fuyu.FuyuForCausalLM, tiny), tokenize.load(tiny)
    given = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)(
        ["Generate a coco-style caption.\n"], [Image.open(f"{tiny}/shapes.png")]
    )
    ids, before = given.pop("input_ids"), graphs()
    new = decoding.generate(model, ids, **given, max_new_tokens=24, compiled=True)[0, ids.shape[1] :]
    assert (
        tokenizer.decode(new, skip_special_tokens=True) == "a red circle left of a blue square"
        and graphs() > before
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_of_few_bits(kind):
    model, (ids, _) = kernels.quantize(FAMILIES[3].model(), kind), inputs(101)
    assert torch.equal(*both(model, ids))


def test_copies_and_files_hold_no_graph():
    model, (ids, _) = FAMILIES[2].model(), inputs(101)
    plain, _ = both(model, ids, max_new_tokens=3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other.generate(ids, max_new_tokens=3, eos_token_id=None), plain)
        assert other.decoder.model is other and torch.equal(both(other, ids, max_new_tokens=3)[1], plain)


def test_the_command_line(capsys):
    given = ["generate", "checkpoints/tiny-phi", "--chat", "Tell me a story about Nora and an owl."]
    assert main(given) == 0
    plain = capsys.readouterr().out
    assert main([*given, "--compile"]) == 0 and capsys.readouterr().out == plain

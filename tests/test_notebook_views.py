"""What shows itself in a notebook: the tree of a beam search, and a KV cache."""

import html
import pickle
import re
import types

import pytest
import torch

from decoders import decoding, kernels, look, tokenize
from tests.conftest import ROOT
from tests.families import PHI3, inputs

IDS = inputs(101)[0][:1]
GPT_NEO_FOLDER = ROOT / "checkpoints" / "tiny-gpt-neo"


def test_a_beam_tree_has_the_texts_and_sums_of_the_search(family):
    model = family.model()
    options = {"num_beams": 3, "max_new_tokens": 5, "eos_token_id": None, "num_return_sequences": 3}
    tree = decoding.beam_tree(model, IDS, **options)
    found = decoding.generate(model, IDS, **options, return_dict_in_generate=True)
    assert tree.best == [tuple(row) for row in found.sequences[:, IDS.shape[1] :].tolist()]
    sums = torch.tensor([tree.totals[branch] for branch in tree.best]) / 5
    torch.testing.assert_close(sums, found.sequences_scores, atol=1e-5, rtol=1e-5)
    for branch, total in tree.totals.items():  # every one, also what was dropped
        whole = torch.cat([IDS, torch.tensor([branch])], 1)
        scored = decoding.score(model, whole)[0, IDS.shape[1] - 1 :].sum().item()
        assert total == pytest.approx(scored, abs=1e-4)


def test_a_beam_tree_holds_beams_that_end_early(family):
    model, options = family.model(), {"num_beams": 4, "max_new_tokens": 8}
    endless = decoding.beam_tree(model, IDS, eos_token_id=None, **options)
    eos = sorted({branch[1] for branch in endless.totals if len(branch) == 2})
    tree = decoding.beam_tree(model, IDS, eos_token_id=eos, **options)
    ended = [branch for branch in tree.best if branch[-1] in eos]
    assert ended and all(not set(branch[:-1]) & set(eos) for branch in tree.best)
    assert all(branch[:n] in tree.totals for branch in tree.best for n in range(1, len(branch) + 1))


def test_a_beam_tree_is_drawn_with_every_token(family):
    tokenizer = tokenize.load(GPT_NEO_FOLDER)
    tree = decoding.beam_tree(family.model(), IDS, tokenizer=tokenizer, num_beams=3, max_new_tokens=4)
    markup = tree._repr_html_()
    drawn = [html.unescape(word) for word in re.findall(r"<text [^>]*>([^<]*)</text>", markup)]
    assert len(drawn) == 1 + 2 * len(tree.totals)  # the prompt; a token and a number for each branch
    assert "<style" not in markup and "<script" not in markup  # nothing leaks into the notebook
    heights = tree.heights()
    assert heights.keys() == {(), *tree.totals}
    leaves = [heights[branch] for branch, longer in tree.children().items() if not longer]
    assert sorted(leaves) == list(range(len(leaves)))
    assert len(repr(tree).splitlines()) >= 1 + len(tree.totals)


def test_a_beam_tree_is_escaped():
    evil = "<script>alert(1)</script>"
    tokenizer = types.SimpleNamespace(decode=lambda ids: evil * len(ids))
    tree = decoding.BeamTree([1], {(2,): -1.0, (3,): -2.0}, [(2,), (3,)], tokenizer)
    assert "<script" not in tree._repr_html_() and "&lt;script" in tree._repr_html_()


@pytest.mark.parametrize(
    "wrong", [{"num_beams": 1}, {"num_beams": None}, {}, {"num_beams": 4, "num_beam_groups": 2}]
)
def test_what_is_no_tree_is_refused(wrong):
    with pytest.raises(ValueError, match="one prompt, num_beams of two at least, and no num_beam_groups"):
        decoding.beam_tree(PHI3.model(), IDS, max_new_tokens=2, **wrong)


def test_defaults_of_a_beam_tree_may_be_written_out():
    model, options = PHI3.model(), {"num_beams": 2, "max_new_tokens": 3}
    written = decoding.beam_tree(model, IDS, **options, logits_processor=None, num_beam_groups=None)
    assert written.totals == decoding.beam_tree(model, IDS, **options).totals


def test_a_cache_of_8_bits_says_so():
    model = PHI3.model()
    cache = kernels.new_cache(model, "int8")
    assert repr(look.cache(cache)) == "KVCache: empty"
    with torch.no_grad():
        exact = model(IDS, use_cache=True).past_key_values
        model(IDS, past_key_values=cache)
    assert ", float32 in 8 bits, " in repr(look.cache(cache))
    assert "8 bits" not in repr(look.cache(exact))


def test_a_cache_shows_what_it_holds_and_its_room(family):
    model, T = family.model(), IDS.shape[1]
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    view = look.cache(cache)
    layers, room = len(cache.buffers), cache.buffers[0][0].shape[2]
    assert len(cache) == T + 1 and room == 2 * T
    assert repr(view).startswith(f"KVCache: {T + 1} positions of {room} in {layers} layers")
    markup = view._repr_html_()
    assert markup.count('title="room"') == layers * (room - T - 1)
    assert markup.count('title="position ') == layers * (T + 1)
    assert "<style" not in markup and "<script" not in markup
    memory = sum(part.nbytes for pair in cache.buffers for part in pair)
    assert f"{memory / 1e3:,.1f} kB" in repr(view)


def test_a_long_cache_is_a_bar_and_an_empty_one_a_word(family):
    module = family.module
    k = torch.zeros(1, 2, 500, 4)
    assert '<progress max="500" value="500">' in look.cache(module.KVCache([(k, k)]))._repr_html_()
    assert repr(look.cache(module.KVCache())) == "KVCache: empty"
    assert "KVCache: empty" in look.cache(module.KVCache())._repr_html_()


def test_tokens_stand_above_the_positions_escaped():
    k = torch.ones(1, 2, 3, 4)
    tokenizer = types.SimpleNamespace(bytes_of={1: b"<b>", 2: b" a", 3: b"\n"})
    markup = look.cache(PHI3.module.KVCache([(k, k)]), [1, 2, 3], tokenizer)._repr_html_()
    assert "&lt;b&gt;" in markup and "␣a" in markup and "<b>" not in markup


def test_the_extension_makes_every_cache_show_itself(family):
    formatter = pytest.importorskip("IPython.core.formatters").HTMLFormatter()
    display = types.SimpleNamespace(formatters={"text/html": formatter})
    look.load_ipython_extension(types.SimpleNamespace(display_formatter=display))
    with torch.no_grad():
        cache = family.model()(IDS, use_cache=True).past_key_values
    assert formatter(cache) == look.cache(cache)._repr_html_()


def test_a_figure_of_a_trace_shows_itself():
    """Without pyplot, which alone tells a notebook what a figure is."""
    pytest.importorskip("matplotlib")
    figure = look.trace(PHI3.model(), IDS).plot.norms()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")

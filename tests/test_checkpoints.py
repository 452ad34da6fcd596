"""The embedded checkpoints are what they say they are."""

import json
from itertools import islice

import pytest
import torch

from decoders import tokenize, weights
from examples import train_tiny
from examples.stories import THINGS, stories
from tests.conftest import ROOT

CHECKPOINTS = {family: ROOT / "checkpoints" / f"tiny-{family.replace('_', '-')}" for family in train_tiny.RECIPES}


PROMPTS = {"tiny-phi": ("Instruct: Tell me a story about Nora and an owl.\nOutput:", "Instruct: Tell me")}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request):
    folder = CHECKPOINTS[request.param]
    recipe = train_tiny.RECIPES[request.param]
    model = weights.load(recipe.model_class, folder, dtype=torch.float32)
    return folder, recipe, model, tokenize.load(folder)


def test_held_out_loss_is_the_one_recorded(checkpoint):
    folder, recipe, model, tokenizer = checkpoint
    recorded = json.loads((folder / "training.json").read_text())["held_out_loss"]
    found = train_tiny.held_out_loss(model, tokenizer, recipe.texts(train_tiny.HELD_OUT_SEED))
    assert abs(found - recorded) < 1e-4 and found < 0.3, found


def test_no_held_out_story_was_trained_on():
    held_out = set(islice(stories(train_tiny.HELD_OUT_SEED), train_tiny.HELD_OUT))
    seen = set(islice(stories(train_tiny.TRAIN_SEED), 32 * 1800))
    assert not held_out & seen


def test_transformers_loads_it_and_generates_the_same_ids(checkpoint):
    transformers = pytest.importorskip("transformers")
    folder, _, model, tokenizer = checkpoint
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS.get(folder.name, ("Once upon a time", "There once was a girl", "One day Tom")):
        ids = torch.tensor([tokenizer.encode(prompt)])
        assert their_tokenizer(prompt)["input_ids"] == ids[0].tolist()
        ours = model.generate(ids, max_new_tokens=180)
        expected = theirs.generate(ids, max_new_tokens=180, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        assert ours.tolist() == expected.tolist()
        assert tokenizer.decode(ours[0]) == their_tokenizer.decode(expected[0], clean_up_tokenization_spaces=False)


def test_greedy_text_is_a_story(checkpoint):
    """It ends by itself, keeps its hero and its thing to the end, and uses only words of the grammar."""
    folder, recipe, model, tokenizer = checkpoint
    prompt = PROMPTS.get(folder.name, ("Once upon a time",))[0]
    ids = model.generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=200)[0].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True)
    texts = islice(recipe.texts(1), 3000)
    known = {word for story in texts for word in tokenizer.decode(tokenizer.encode(story)).split()}
    assert set(text.split()) <= known
    hero = text.split("named ")[1].split()[0].strip(".")
    assert 60 < len(text.split()) < 220 and text.count(hero) >= 4
    things = [thing for thing in THINGS if f" {thing}" in text.split("Output:")[-1]]
    assert len(things) == 1, f"one story, one thing: {things}"


def test_a_request_is_answered_with_its_hero_and_its_animal():
    folder = CHECKPOINTS["phi"]
    model, tokenizer = weights.load(train_tiny.RECIPES["phi"].model_class, folder), tokenize.load(folder)
    for hero, animal in (("Nora", "an owl"), ("Tom", "a fox"), ("Zoe", "a puppy")):
        ids = tokenizer.chat([{"role": "user", "content": f"Tell me a story about {hero} and {animal}."}])
        text = tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=200)[0, len(ids) :])
        assert text.count(hero) >= 3 and text.count(animal.split()[1]) >= 2, text


@pytest.mark.parametrize("name", train_tiny.RECIPES)
def test_the_trainer_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_tiny", "--family", name, "--steps", "3", "--out", str(tmp_path / "x")])
    monkeypatch.setattr(train_tiny, "HELD_OUT", 3)
    train_tiny.main()
    assert "held-out loss" in capsys.readouterr().out
    files = {f.name for f in (tmp_path / "x").iterdir()}
    assert files >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "training.json"}
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_stories_repeat_with_their_seed_and_read_well():
    first = list(islice(stories(3), 50))
    assert first == list(islice(stories(3), 50)) != list(islice(stories(4), 50))
    assert len(set(islice(stories(5), 2000))) == 2000
    for story in first:
        assert "{" not in story and "  " not in story and story[0].isupper() and story.endswith(".")
        assert " a a" not in story and " a o" not in story and ". the" not in story

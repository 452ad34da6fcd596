"""The embedded checkpoints are what they say they are."""

import json
from itertools import islice

import pytest
import torch

from decoders import tokenize, weights
from examples import train_tiny
from examples.stories import THINGS, stories
from tests.conftest import ROOT

CHECKPOINTS = {
    family: ROOT / "checkpoints" / f"tiny-{family.replace('_', '-')}" for family in train_tiny.RECIPES
}


STORY = "Tell me a story about Nora and an owl."
PROMPTS = {
    "tiny-phi": (f"Instruct: {STORY}\nOutput:", "Instruct: Tell me"),
    "tiny-phi3": (f"<|user|>\n{STORY}<|end|>\n<|assistant|>\n", "<|user|>\nTell me"),
    "tiny-persimmon": (f"human: {STORY}\n\nadept:", "human: Tell me"),
}
TELL_STORIES = [name for name in CHECKPOINTS if name != "fuyu"]  # that one sees pictures: test_fuyu.py


@pytest.fixture(params=TELL_STORIES)
def checkpoint(request):
    folder = CHECKPOINTS[request.param]
    recipe = train_tiny.RECIPES[request.param]
    model = weights.load(recipe.model_class, folder, dtype=torch.float32)
    return folder, recipe, model, tokenize.load(folder)


@pytest.mark.proof
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
        expected = theirs.generate(
            ids, max_new_tokens=180, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        assert ours.tolist() == expected.tolist()
        assert tokenizer.decode(ours[0]) == their_tokenizer.decode(
            expected[0], clean_up_tokenization_spaces=False
        )


def test_greedy_text_is_a_story(checkpoint):
    """It ends by itself, keeps its hero and its thing to the end, and uses only words of the grammar."""
    folder, recipe, model, tokenizer = checkpoint
    prompt = PROMPTS.get(folder.name, ("Once upon a time",))[0]
    asked = tokenizer.encode(prompt)
    ids = model.generate(torch.tensor([asked]), max_new_tokens=200)[0].tolist()
    assert ids[-1] in model.special_ids("checkpoint", None)[0].tolist()
    text = tokenizer.decode(ids[0 if folder.name not in PROMPTS else len(asked) :], skip_special_tokens=True)
    texts = islice(recipe.texts(1), 3000)
    known = {word for story in texts for word in tokenizer.decode(tokenizer.encode(story), True).split()}
    assert set(text.split()) <= known
    hero = text.split("named ")[1].split()[0].strip(".")
    assert 60 < len(text.split()) < 220 and text.count(hero) >= 4
    things = [thing for thing in THINGS if f" {thing}" in text]
    assert len(things) == 1, f"one story, one thing: {things}"


@pytest.mark.parametrize("name", ["phi", "phi3", "persimmon"])
def test_a_request_is_answered_with_its_hero_and_its_animal(name):
    folder = CHECKPOINTS[name]
    model, tokenizer = weights.load(train_tiny.RECIPES[name].model_class, folder), tokenize.load(folder)
    for hero, animal in (("Nora", "an owl"), ("Tom", "a fox"), ("Zoe", "a puppy")):
        ids = tokenizer.chat([{"role": "user", "content": f"Tell me a story about {hero} and {animal}."}])
        text = tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=200)[0, len(ids) :])
        assert text.count(hero) >= 3 and text.count(animal.split()[1]) >= 2, text


@pytest.mark.proof
@pytest.mark.parametrize("name", train_tiny.RECIPES)
def test_the_trainer_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["train_tiny", "--family", name, "--steps", "3", "--out", str(tmp_path / "x")]
    )
    monkeypatch.setattr(train_tiny, "HELD_OUT", 3)
    monkeypatch.setattr(train_tiny, "PICTURES", 2)
    train_tiny.main()
    assert "held-out loss" in capsys.readouterr().out
    files = {f.name for f in (tmp_path / "x").iterdir()}
    pieces = {"tokenizer.model"} if name in ("phi3", "persimmon", "fuyu") else {"vocab.json", "merges.txt"}
    assert files >= {"config.json", "model.safetensors", "training.json", *pieces}
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
    if train_tiny.RECIPES[name].resumed:
        monkeypatch.setattr(
            "sys.argv",
            ["train_tiny", "--family", name, "--steps", "2", "--resume", "--out", str(tmp_path / "x")],
        )
        train_tiny.main()
        assert json.loads((tmp_path / "x" / "training.json").read_text())["steps"] == 5


@pytest.mark.parametrize("name", ["phi3", "persimmon"])
def test_questions_about_the_story_are_answered(name):
    """Several turns: what is asked about is in the model's own story."""
    folder = CHECKPOINTS[name]
    model, tokenizer = weights.load(train_tiny.RECIPES[name].model_class, folder), tokenize.load(folder)
    turns = []
    for question in (STORY, "What did Nora take everywhere?", "Who was the friend of Nora?"):
        turns.append({"role": "user", "content": question})
        ids = tokenizer.chat(turns)
        new = model.generate(torch.tensor([ids]), max_new_tokens=200)[0, len(ids) :]
        turns.append(
            {"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True).strip()}
        )
    story, thing, friend = (turn["content"] for turn in turns[1::2])
    assert thing.startswith("It was a ") and thing.split()[-1].strip(".") in story
    assert friend == "The owl."


def test_pictures_repeat_with_their_seed_and_say_what_they_show():
    from examples.shapes import overlap, scenes

    first = list(islice(scenes(3), 300))
    assert first == list(islice(scenes(3), 300)) != list(islice(scenes(4), 300))
    assert overlap((0, 0, 10, 10), (0, 5, 10, 15)) == 1 / 3 and overlap((0, 0, 1, 1), (5, 5, 6, 6)) == 0
    for scene in first:
        image = scene.picture()
        assert image.size == (scene.width, scene.height) and len({s.name for s in scene.shapes}) == len(
            scene.shapes
        )
        for one in scene.shapes:
            top, left, bottom, right = one.box
            assert 0 <= top < bottom <= scene.height and 0 <= left < right <= scene.width
            assert image.getpixel((left + one.size // 2, top + one.size // 2)) != scene.ground
        if len(scene.shapes) == 2:
            a, b = scene.shapes
            assert overlap(a.box, b.box) == 0 and (" left of " in scene.caption or " above " in scene.caption)


def test_stories_repeat_with_their_seed_and_read_well():
    first = list(islice(stories(3), 50))
    assert first == list(islice(stories(3), 50)) != list(islice(stories(4), 50))
    assert len(set(islice(stories(5), 2000))) == 2000
    for story in first:
        assert "{" not in story and "  " not in story and story[0].isupper() and story.endswith(".")
        assert " a a" not in story and " a o" not in story and ". the" not in story

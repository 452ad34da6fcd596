# %% [markdown]
# # Solutions: Fuyu
#
# Of the exercises at the end of [`fuyu.ipynb`](../fuyu.ipynb).

# %%
# On a hosted notebook (Colab, Kaggle ...): upload or clone the repository first, then run this cell. It finds
# the repository around this notebook or beside it, and installs what is missing there.
import importlib.util
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
roots = [p for p in (here, *here.parents, *here.glob("*/")) if (p / "checkpoints/tiny-phi").is_dir()]
if not roots:
    raise FileNotFoundError("no copy of the repository here: upload or clone it into this folder, run again")
ROOT = roots[0]
sys.path.insert(0, str(ROOT))
needed = ("torch", "tiktoken", "sentencepiece", "matplotlib", "tokenizers", "ipywidgets")
if any(importlib.util.find_spec(name) is None for name in needed):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[train]", "ipywidgets"]
    subprocess.run(command, check=True)

# %%
# %matplotlib inline
import torch

from decoders import fuyu, kernels, tokenize, weights
from examples.shapes import Scene, Shape
from notebooks import tools

folder = ROOT / "checkpoints/tiny-fuyu"
tokenizer = tokenize.load(folder)
model = kernels.plain(weights.load(fuyu.FuyuForCausalLM, folder, dtype=torch.float32))
processor = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)

# %% [markdown]
# ## 1. Where it looks
#
# Pixels are from -1 to 1, so white is 1. The whole answer is scored, not its first token alone.

# %%
shapes = (Shape("red", "circle", 20, 10, 40), Shape("blue", "square", 50, 90, 50))
picture = Scene(120, 150, (255, 255, 255), shapes).picture()
inputs = processor("where is the red circle?\n", picture)
ids, patches = inputs["input_ids"], inputs["image_patches"][0]
answer = model.generate(**inputs, max_new_tokens=6)[:, ids.shape[1] :]
places = inputs["image_patches_indices"]


@torch.no_grad()
def log_probability(patches):
    whole = torch.cat([ids, answer], 1)
    logits = model(whole, image_patches=[patches], image_patches_indices=places).logits
    log_probs = logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, answer[..., None]).sum().item()


own = log_probability(patches)
falls = []
for i in range(20):
    blank = patches.clone()
    blank.flatten(0, -2)[i] = 1.0
    falls.append(own - log_probability(blank))
figure = tools.Figure((6, 2.4), layout="constrained")
left, right = figure.subplots(1, 2)
left.imshow(picture)
shown = right.imshow(torch.tensor(falls).view(4, 5), cmap="Reds")
figure.colorbar(shown, ax=right, label="log-probability lost")
for axes in (left, right):
    axes.set(xticks=[], yticks=[])
circle = {0, 1, 5, 6}  # rows 0 and 1, columns 0 and 1 hold the circle
print("the four most important patches:", sorted(range(20), key=lambda i: -falls[i])[:4])
assert max(falls[i] for i in circle) > max(f for i, f in enumerate(falls) if i not in circle)
figure

# %% [markdown]
# The patches with the circle in them, and little else. Blanking is the plainest of all attributions, and
# the hardest to argue with: it asks what would have been said without.
#
# ## 2. It moves

# %%
lefts, answers = list(range(5, 101, 15)), []
for left_edge in lefts:
    moved = Scene(120, 150, (255, 255, 255), (Shape("red", "circle", 40, left_edge, 40),)).picture()
    inputs = processor("where is the red circle?\n", moved)
    output = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    found = processor.post_process_box_coordinates(output)[0].places
    answers.append(round(found[0].left) if found else None)
    print(f"left edge {left_edge:3}: answered {answers[-1]}")
assert sum(a is not None and abs(a - b) <= 12 for a, b in zip(answers, lefts, strict=True)) >= len(lefts) - 1
tools.curves({"answered": answers, "true": lefts}, "step", "left edge in pixels")

# %% [markdown]
# The answer follows in steps of 10 pixels, the grid on which all shapes of the training stood: the model
# learnt twenty numbers, not a ruler. The coordinates are tokens, so that nothing tells it that 21 lies
# between 20 and 22.
#
# ## 3. One pass, two questions
#
# Whatever stands before the question is the same for both: the picture, and the tokens that begin a text.

# %%
shapes = (Shape("purple", "triangle", 40, 10, 40), Shape("red", "circle", 90, 0, 30))
picture = Scene(120, 90, (225, 225, 220), shapes).picture()
questions = ("where is the purple triangle?\n", "where is the red circle?\n")
prompts = [processor(question, picture) for question in questions]
first, second = (prompt["input_ids"][0] for prompt in prompts)
n = min(len(first), len(second))
shared = int((first[:n] == second[:n]).long().cumprod(0).sum())
cache = fuyu.KVCache()
with torch.no_grad():
    given = {"image_patches": prompts[0]["image_patches"]}
    model(first[None, :shared], past_key_values=cache, **given)
for question, prompt in zip(questions, prompts, strict=True):
    expected = model.generate(**prompt, max_new_tokens=8)
    found = model.generate(prompt["input_ids"], max_new_tokens=8, past_key_values=fuyu.KVCache(tuple(cache)))
    assert torch.equal(found, expected)
    place = processor.post_process_box_coordinates(found[:, prompt["input_ids"].shape[1] :])[0].places[0]
    assert tuple(round(n) for n in place) in [shape.box for shape in shapes]
    read = prompt["input_ids"].shape[1] - shared
    print(f"{question.strip():26} {read} tokens read instead of {prompt['input_ids'].shape[1]}: {place}")

# %% [markdown]
# `KVCache(tuple(cache))` begins with the same keys and values and grows by itself. For a real picture of
# 1,080 x 1,920 pixels that is 2,304 patches read once. (Both answers are right here; of two shapes the tiny
# model often takes one for the other.)

# %% [markdown]
# # Fuyu: a picture is a text of patches
#
# Fuyu (Bavishi et al., Adept, 2023) answers questions about pictures, without an image encoder: the picture
# is cut into patches, each patch goes through **one linear layer** and becomes a token, and
# [Persimmon's](persimmon.ipynb) decoder reads these tokens like words. Places in the picture are tokens
# too, so it can answer "where is it?".
#
# We read [`decoders/fuyu.py`](../decoders/fuyu.py) with a tiny checkpoint, trained on pictures of coloured
# shapes. Before most cells stands a question in bold: write your answer down before you run the cell.
# Solutions of the three exercises: [`solutions/fuyu.ipynb`](solutions/fuyu.ipynb).

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
# %load_ext decoders.look
import math

import torch

from decoders import fuyu, kernels, tokenize, weights
from examples.shapes import Scene, Shape
from notebooks import tools
from notebooks.tools import show

torch.manual_seed(0)
folder = ROOT / "checkpoints/tiny-fuyu"
tokenizer = tokenize.load(folder)
model = weights.load(fuyu.FuyuForCausalLM, folder, dtype=torch.float32)
model = kernels.plain(model)  # the file as it stands, without the faster CPU kernels under a loaded model
processor = fuyu.FuyuProcessor(fuyu.FuyuImageProcessor(), tokenizer)
shapes = (Shape("red", "circle", 20, 10, 40), Shape("blue", "square", 50, 90, 50))
picture = Scene(120, 150, (255, 255, 255), shapes).picture()
picture

# %% [markdown]
# ## A picture becomes tokens
#
# The picture is 150 pixels wide and 120 high; a patch is 30 x 30. **How many patches is that, and how many
# numbers is a patch? How will the model know how wide the picture is, if patches just follow each other?**

# %%
inputs = processor("where is the red circle?\n", picture)
for name, value in inputs.items():
    print(f"{name:22}", [tuple(v.shape) for v in value] if isinstance(value, list) else tuple(value.shape))
ids = inputs["input_ids"]
print(" ".join(tools.words(tokenizer, ids[0])))

# %% [markdown]
# Four rows of five patches, each 30 * 30 * 3 = 2,700 numbers. The vocabulary calls the place of a patch
# `|SPEAKER|`. After each row stands a *newline token*: so the width is said by where it stands.
# `image_patches_indices` says which patch stands where, -1 is a word.

# %%
indices = inputs["image_patches_indices"][0]
print(indices.tolist())
show(fuyu.FuyuImageProcessor.patchify_image)

# %% [markdown]
# **Where in patch number 7 is the pixel (row 2, column 3), colour green?** Patches go row by row, in each
# pixels row by row, in each pixel three colours.

# %%
pixels, height, width, scale = processor.image_processor.prepared(picture)  # (3, 120, 150), from -1 to 1
patches = inputs["image_patches"][0].flatten(0, -2)  # (20, 2700)
row, column = divmod(7, 5)
assert patches[7, (2 * 30 + 3) * 3 + 1] == pixels[1, row * 30 + 2, column * 30 + 3]
figure = tools.Figure((4, 3.2), layout="constrained")
for i, axes in enumerate(figure.subplots(4, 5).flat):
    axes.imshow(patches[i].view(30, 30, 3) * 0.5 + 0.5)
    axes.set(xticks=[], yticks=[])
    axes.set_title(str(i), fontsize=7, pad=2)
figure

# %% [markdown]
# ## Into the model
#
# **A patch is 2,700 numbers and C = 128. What is the least that could turn one into the other?**

# %%
show(fuyu.FuyuForCausalLM.with_patches)

# %% [markdown]
# One `nn.Linear`, then `torch.where`: patches where there are patches, words where there are words. By
# hand:

# %%
words = model.language_model.model.embed_tokens.weight[ids[0]]
linear = model.vision_embed_tokens
x = words.clone()
is_patch = indices >= 0
x[is_patch] = patches @ linear.weight.T + linear.bias
with torch.no_grad():
    expected = model.with_patches(ids, inputs["image_patches"], inputs["image_patches_indices"])[0]
torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
print(f"{tuple(x.shape)}, largest difference {(x - expected).abs().max():.1e}")

# %% [markdown]
# ## One layer by hand
#
# From here on it is Persimmon. **Does a patch see the patches after it?** An image encoder would let all
# see each other.

# %%
state = {name.removeprefix("language_model.model.layers.0."): p for name, p in model.state_dict().items()}
T, C = x.shape
H, D, R = 4, 32, 16


def linear_by_name(x, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


angles = torch.arange(T)[:, None] * 25000.0 ** (-torch.arange(0, R, 2) / R)
turn = torch.polar(torch.ones_like(angles), angles)


def rotated(x):
    pairs = torch.complex(x[..., : R // 2], x[..., R // 2 : R]) * turn
    return torch.cat([pairs.real, pairs.imag, x[..., R:]], dim=-1)


fused = linear_by_name(norm(x, "input_layernorm"), "self_attn.query_key_value").view(T, H, 3, D)
q, k, v = fused.permute(2, 1, 0, 3)  # (H, T, D) each
q = rotated(norm(q, "self_attn.q_layernorm"))
k = rotated(norm(k, "self_attn.k_layernorm"))
later = torch.ones(T, T, dtype=torch.bool).triu(1)  # also among patches
scores = (q @ k.transpose(1, 2) / math.sqrt(D)).masked_fill(later, -math.inf)
y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, C)
x = x + linear_by_name(y, "self_attn.dense")
inner = linear_by_name(norm(x, "post_attention_layernorm"), "mlp.dense_h_to_4h").clamp(min=0) ** 2
by_hand = x + linear_by_name(inner, "mlp.dense_4h_to_h")

with torch.no_grad():
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
torch.testing.assert_close(by_hand, output.hidden_states[1][0], atol=1e-4, rtol=1e-4)
print(f"largest difference {(by_hand - output.hidden_states[1][0]).abs().max():.1e}")

# %% [markdown]
# No: the causal mask holds for patches too. The upper left corner never knows what is below. The question
# comes after the picture, and sees all of it.
#
# ## What heads read
#
# **The last token of the prompt begins the answer about the red circle. Which patches will the heads of the
# last layers read?** Weights on the twenty patches, laid out as the picture:

# %%
figure = tools.Figure((7, 2.6), layout="constrained")
panels = figure.subplots(2, 4)
for i, layer_index in enumerate((1, 3)):
    for h in range(4):
        weights_on = output.attentions[layer_index][0, h, -1][is_patch].view(4, 5)
        panels[i, h].imshow(weights_on, cmap="Blues", vmin=0)
        panels[i, h].set_title(f"layer {layer_index}, head {h}: {weights_on.sum():.2f}", fontsize=8)
        panels[i, h].set(xticks=[], yticks=[])
figure

# %% [markdown]
# Beside each is how much of its weight goes to the picture at all. Some heads find the shapes; others look
# at the newlines, or at the words.
#
# ## Generation, step by step
#
# **A place is `<box>top, left, bottom, right</box>`. How many tokens is it, and which numbers do you expect
# for a circle of 40 pixels at (20, 10)?** Coordinates are halved: the real model reads screens.

# %%
sequence, cache = ids, fuyu.KVCache()
with torch.no_grad():
    for _ in range(7):
        step = model.prepare_inputs(
            sequence, None, cache, **{k: v for k, v in inputs.items() if "image" in k}
        )
        logits = model(**step).logits[:, -1]
        new = logits.argmax(-1, keepdim=True)
        p = logits.softmax(-1).max()
        given = "picture and words" if "image_patches" in step else "one token"
        print(f"{given:18} {len(cache):2} held: {tools.words(tokenizer, new[0])[0]:8} {p:.0%}")
        sequence = torch.cat([sequence, new], 1)
generated = model.generate(**inputs, max_new_tokens=7)
assert torch.equal(sequence, generated)
answer = processor.post_process_box_coordinates(generated[:, ids.shape[1] :])[0]
print("in pixels:", answer.places[0], "and the truth:", shapes[0].box)

# %%
cache

# %% [markdown]
# Patches are in the cache like words; the picture is read once. Six tokens: begin, four numbers, end.

# %%
from PIL import ImageDraw

drawn = picture.copy()
top, left, bottom, right = answer.places[0]
ImageDraw.Draw(drawn).rectangle((left, top, right, bottom), outline="red", width=2)
assert all(abs(a - b) <= 12 for a, b in zip(answer.places[0], shapes[0].box, strict=True))
drawn

# %% [markdown]
# ## Switch it off: the picture
#
# **How much of an answer comes from the picture? What is worse: no picture, a grey one, or the right
# patches in any order?** The loss is that of the answers alone.

# %%
from itertools import islice

from examples.train_tiny import HELD_OUT_SEED, fuyu_rows, pictured

rows = fuyu_rows(tokenizer, list(islice(pictured(HELD_OUT_SEED), 24)))
own, places = rows.inputs["image_patches"], rows.inputs["image_patches_indices"]
draw = torch.Generator().manual_seed(0)
shuffled = [one[..., torch.randperm(one.shape[-2], generator=draw), :] for one in own]
variants = {
    "as it is": {"image_patches": own, "image_patches_indices": places},
    "any order": {"image_patches": shuffled, "image_patches_indices": places},
    "grey": {"image_patches": [torch.zeros_like(one) for one in own], "image_patches_indices": places},
    "no picture": {},
}
losses = {}
for name, pictures in variants.items():
    with torch.no_grad():
        losses[name] = model(rows.ids, labels=rows.labels, **pictures).loss.item()
    print(f"{name:10} {losses[name]:.3f}")
assert losses["as it is"] < 0.3 and losses["as it is"] < losses["any order"] < losses["grey"]

# %% [markdown]
# In any order they are still colours and shapes, but no places. Grey says something that is wrong with
# certainty, which is worse than nothing.
#
# **Switch off the newlines: put the line break of ordinary text in their place. Are places still found?**
# Without them patch 7 might be the third of a second row of five, or the first of a fourth row of two.

# %%
newline = processor.id_of("|NEWLINE|")
blind = rows.ids.clone()
blind[blind == newline] = tokenizer.encode("\n", add_special_tokens=False)[-1]
with torch.no_grad():
    without = model(blind, labels=rows.labels, **variants["as it is"]).loss.item()
print(f"as it is {losses['as it is']:.3f}, without newlines {without:.3f}")
assert without > 2 * losses["as it is"]

# %% [markdown]
# ## A small training run
#
# The checkpoint took half an hour. **Can a model from nothing learn in a minute which colour a single patch
# has? It sees one picture of 30 x 30 pixels, and must say one of four words.**

# %%
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (240, 200, 20)}
names = list(COLOURS)
first = [tokenizer.encode(f" {name}", add_special_tokens=False)[-1] for name in names]


def batch(n, generator):
    """n one-patch pictures with some noise: ids (n, 3) are patch, newline, colour."""
    which = torch.randint(4, (n,), generator=generator)
    colours = torch.tensor([COLOURS[names[i]] for i in which.tolist()]) / 127.5 - 1
    noise = 0.3 * torch.randn(n, 900, 3, generator=generator)
    patch = (colours[:, None] + noise).flatten(1)[:, None]  # (n, 1, 2700)
    answer = torch.tensor(first)[which]
    ids = torch.stack([torch.full((n,), model.config.image_token_id), torch.full((n,), newline), answer], 1)
    labels = torch.stack([torch.full((n,), -100), torch.full((n,), -100), answer], 1)
    return ids, labels, patch


torch.manual_seed(0)
text_config = fuyu.PersimmonConfig(
    vocab_size=model.config.vocab_size,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
small = fuyu.FuyuForCausalLM(
    fuyu.FuyuConfig(
        vocab_size=model.config.vocab_size, hidden_size=64, image_token_id=3, text_config=text_config
    )
)
seeing = [p for name, p in small.named_parameters() if "vision_" in name]
others = [p for name, p in small.named_parameters() if "vision_" not in name]
optimizer = torch.optim.AdamW([{"params": others, "lr": 3e-3}, {"params": seeing, "lr": 1e-4}])
generator = torch.Generator().manual_seed(0)
curve = []
for _ in range(50):
    b_ids, labels, patch = batch(16, generator)
    loss = small(b_ids, image_patches=list(patch), labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    curve.append(loss.item())
b_ids, _, patch = batch(200, generator)
with torch.no_grad():
    said = small.eval()(b_ids[:, :2], image_patches=list(patch)).logits[:, -1].argmax(-1)
right = (said == b_ids[:, 2]).float().mean().item()
print(f"{right:.0%} of 200 new pictures named")
assert right > 0.9
tools.curves({"loss of the colour": curve}, "step", "loss", (math.log(4), "a guess among four"))

# %% [markdown]
# First it learns that there are four words (ln 4), then to look. The vision layer has a rate of its own, a
# thirtieth: a sum of 2,700 pixels moves far when each of its weights moves a little.
#
# ## Exercises
#
# 1. **Where it looks.** Blank each patch in turn (white) and see how much the probability of the right
#    answer falls. Draw the result as a map over the picture.
# 2. **It moves.** Move the circle from left to right in steps of 15 pixels and plot the answered left edge
#    against the true one. Between which steps does the answer jump, and why?
# 3. **One pass, two questions.** Read the picture once, keep the cache, and ask two questions about it:
#    show that the answers are those of two separate calls.
#
# Further: [docs/reading/fuyu.md](../docs/reading/fuyu.md), and `examples/shapes.py`, which draws the
# pictures.

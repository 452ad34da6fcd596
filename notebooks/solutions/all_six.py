# %% [markdown]
# # Solutions: all six together
#
# Of the exercises at the end of [`all_six.ipynb`](../all_six.ipynb).

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
import argparse
import copy

import torch

from decoders import kernels, look, model_class, read_config, tokenize, weights
from examples.train import new_model
from notebooks import tools

NAMES = ("openai-gpt", "gpt-neo", "phi", "persimmon", "fuyu", "phi3")
models, tokenizers = {}, {}
for name in NAMES:
    folder = ROOT / f"checkpoints/tiny-{name}"
    cls = model_class(read_config(folder))
    models[name] = kernels.plain(weights.load(cls, folder, dtype=torch.float32))
    tokenizers[name] = tokenize.load(folder)

# %% [markdown]
# ## 1. A seventh model
#
# What has to stand side by side is moved there: the new rows 2i and 2i + 1 of a head are the old rows i and
# i + R / 2. q and k are exchanged alike, so that their product, a sum over dimensions, stays.


# %%
def rotate_neighbours(x, cos, sin):
    """GPT-J's: dimension 2i with 2i + 1. cos and sin have the angles twice, as Phi has them."""
    R = cos.shape[-1]
    cos, sin = cos[..., : R // 2], sin[..., : R // 2]
    even, odd = x[..., :R:2], x[..., 1:R:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., R:]], dim=-1)


model = models["phi"]
H, D, R = 4, 24, 12
order = torch.arange(D)
order[:R] = torch.arange(R).view(2, R // 2).T.flatten()  # 0, 6, 1, 7, 2, 8 ...
gptj = copy.deepcopy(model)
for block in gptj.model.layers:
    block.self_attn.rotate = rotate_neighbours
    for part in (block.self_attn.q_proj, block.self_attn.k_proj):
        part.weight.data = part.weight.data.view(H, D, -1)[:, order].flatten(0, 1)
        part.bias.data = part.bias.data.view(H, D)[:, order].flatten()
ids = torch.tensor([tokenizers["phi"].encode("Once upon a time there was a fox. The fox")])
with torch.no_grad():
    expected, found = model(ids).logits, gptj(ids).logits
torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
print("order of a head's rows:", order.tolist())

# %% [markdown]
# The two styles are one model with its rows in another order, which is why checkpoints carry no sign of it,
# and why it is the best known mistake of all ports.
#
# ## 2. Detective
#
# Every model has one property that the numbers of a single layer betray.


# %%
def detective(v):
    """The family, from stages of layer 0 and the embeddings."""

    def same(a, b):
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-4)

    if same(v["attn_in"], v["embeddings"]):
        return "openai-gpt"  # post-norm: attention reads the residual stream itself
    if same(v["attn_in"], v["mlp_in"]):
        return "phi"  # parallel: one norm for both
    if (v["mlp_act"] >= 0).all():
        return "persimmon or fuyu"  # a squared ReLU
    if v["k"].shape[1] != v["q"].shape[1]:
        return "phi3"  # GQA; and where K = H:
    scores = v["q"] @ v["k"].transpose(2, 3)
    is_visible = ~v["scores"].isnan()
    return "gpt-neo" if same(scores[is_visible], v["scores"][is_visible]) else "phi3"  # no rotation, no scale


for name, model in models.items():
    trace = look.trace(model, tokenizers[name].encode("Once upon a time there was a fox."))
    values = {key.removeprefix("layers.0."): value for key, value in trace.items()}
    answer = detective(values)
    print(f"{name:11} {answer}")
    assert name in answer

# %% [markdown]
# Persimmon and Fuyu cannot be told apart by a layer: they are the same decoder.
#
# ## 3. Which difference matters?

# %%
tokenizer = tokenizers["gpt-neo"]
sizes = argparse.Namespace(width=64, layers=2, heads=4, context=256)


def as_it_is(small):
    pass


def untied(small):
    small.lm_head.weight = torch.nn.Parameter(0.02 * torch.randn_like(small.lm_head.weight))


def tied(small):
    small.lm_head.weight = small.model.embed_tokens.weight


def without_rotation(small):
    for block in small.model.layers:
        block.self_attn.rotate = lambda x, cos, sin: x


runs = [(family, change) for family in ("openai-gpt", "gpt_neo") for change in (as_it_is, untied)]
runs += [("phi", change) for change in (as_it_is, tied, without_rotation)]
ends = {}
for family, change in runs:
    torch.manual_seed(0)
    small = new_model(family, tokenizer, sizes)
    change(small)
    losses = tools.train(small, "gpt_neo", tokenizer, 40)
    ends[family, change.__name__] = sum(losses[-10:]) / 10
    print(f"{family:11} {change.__name__:17} {ends[family, change.__name__]:.2f}")
assert ends["gpt_neo", "untied"] < ends["gpt_neo", "as_it_is"] - 0.3
assert ends["openai-gpt", "untied"] < ends["openai-gpt", "as_it_is"] - 0.3
assert ends["phi", "tied"] > ends["phi", "as_it_is"] + 0.2
assert abs(ends["phi", "without_rotation"] - ends["phi", "as_it_is"]) < 0.2

# %% [markdown]
# The tied output layer. One matrix has to say what a token means and which token comes next, and in the
# beginning a tied model says the token that it has just read. In long trainings of small models tying pays,
# for it saves parameters; in 40 steps it is a brake. What the positions are hardly matters yet: so early a
# model learns which words there are.

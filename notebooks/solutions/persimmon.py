# %% [markdown]
# # Solutions: Persimmon
#
# Of the exercises at the end of [`persimmon.ipynb`](../persimmon.ipynb).

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
import torch
import torch.nn as nn

from decoders import kernels, look, persimmon, tokenize, weights
from notebooks import tools

folder = ROOT / "checkpoints/tiny-persimmon"
tokenizer = tokenize.load(folder)
model = kernels.plain(weights.load(persimmon.PersimmonForCausalLM, folder, dtype=torch.float32))
rows = tools.held_out("persimmon", tokenizer, count=4)

# %% [markdown]
# ## 1. Three matrices
#
# The rows of the fused matrix are (head, q or k or v, dimension of the head).


# %%
class ThreeMatrices(nn.Module):
    def __init__(self, fused, heads):
        super().__init__()
        out_features, C = fused.weight.shape
        D = out_features // (3 * heads)
        weight = fused.weight.view(heads, 3, D, C)
        bias = fused.bias.view(heads, 3, D)
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            part = nn.Linear(C, heads * D)
            part.weight.data = weight[:, i].reshape(heads * D, C)
            part.bias.data = bias[:, i].reshape(heads * D)
            setattr(self, name, part)


attention = model.model.layers[0].self_attn
three = ThreeMatrices(attention.query_key_value, heads=4)
trace = look.trace(model, rows.ids)
x = trace["layers.0.attn_in"]
for name in "qkv":
    found = getattr(three, f"{name}_proj")(x).unflatten(-1, (4, 24)).transpose(1, 2)
    torch.testing.assert_close(found, trace[f"layers.0.{name}"], atol=1e-5, rtol=1e-5)
print("the same q, k and v")

# %% [markdown]
# Nothing is lost in either direction: fused or not is a way to store the same numbers, and a faster
# product.
#
# ## 2. Skip the zeros

# %%
mlp = model.model.layers[2].mlp
inner, expected = trace["layers.2.mlp_act"][0, 30], trace["layers.2.mlp_out"][0, 30]
needed = inner.nonzero()[:, 0]
columns = mlp.dense_4h_to_h.weight[:, needed]  # nn.Linear stores (out, in): an inner number is a column
found = columns @ inner[needed] + mlp.dense_4h_to_h.bias
torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
saved = 1 - len(needed) / len(inner)
print(f"{len(needed)} of {len(inner)} are needed: {saved:.0%} of the multiplications saved")
assert len(needed) < 0.4 * len(inner)

# %% [markdown]
# Only of the second matrix: to know which numbers are 0 the first one has to be multiplied. Kernels for
# sparse activations guess that from a small predictor.
#
# ## 3. The same silence
#
# How alike two sets of inner numbers that are *not* 0 are: what they share, over what either has (Jaccard).


# %%
def overlap(a, b):
    a, b = a > 0, b > 0
    return ((a & b).sum() / (a | b).sum()).item()


ids = rows.ids[0]
T = int((rows.labels[0] != -100).sum())
pairs = [(i, j) for i in range(T) for j in range(i)]
for layer in range(4):
    act = trace[f"layers.{layer}.mlp_act"][0]
    same = [overlap(act[i], act[j]) for i, j in pairs if ids[i] == ids[j]]
    other = [overlap(act[i], act[j]) for i, j in pairs if ids[i] != ids[j]]
    print(
        f"layer {layer}: the same token {sum(same) / len(same):.2f}, two others {sum(other) / len(other):.2f}"
    )
    assert sum(same) / len(same) > sum(other) / len(other)

# %% [markdown]
# Far more than for two others, in every layer, and yet never the same: what the MLP reads holds what
# attention has added, so the same word lights other numbers in another sentence.

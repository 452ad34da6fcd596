# %% [markdown]
# # Solutions: GPT-1
#
# Of the exercises at the end of [`openai_gpt.ipynb`](../openai_gpt.ipynb).

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
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from decoders import kernels, look, openai_gpt, tokenize, weights
from notebooks import tools

folder = ROOT / "checkpoints/tiny-openai-gpt"
tokenizer = tokenize.load(folder)
model = kernels.plain(weights.load(openai_gpt.OpenAIGPTLMHeadModel, folder, dtype=torch.float32))
rows = tools.held_out("openai_gpt", tokenizer)
as_it_is = tools.loss_of(model, rows)
print(f"{as_it_is:.3f}")

# %% [markdown]
# ## 1. Dropout
#
# Modules of the class `nn.Dropout` have a probability `p`; attention reads its own from `attn_pdrop`.

# %%
changed = copy.deepcopy(model)
for module in changed.modules():
    if isinstance(module, nn.Dropout):
        module.p = 0.1
    if isinstance(module, openai_gpt.OpenAIGPTAttention):
        module.attn_pdrop = 0.1
changed.train()
torch.manual_seed(0)
losses = [tools.loss_of(changed, rows) for _ in range(5)]
print(" ".join(f"{loss:.3f}" for loss in losses))
assert min(losses) > as_it_is and max(losses) > min(losses)
assert abs(tools.loss_of(changed.eval(), rows) - as_it_is) < 1e-6

# %% [markdown]
# The loss grows, because this checkpoint was trained without; and it differs from run to run. In `eval()`
# nothing is dropped: a model that gives another text every time it is asked greedily was left in `train()`.
#
# ## 2. Longer than trained


# %%
def with_positions(embedding):
    longer = copy.deepcopy(model)
    longer.config.n_positions = len(embedding)
    longer.transformer.positions_embed = nn.Embedding.from_pretrained(embedding)
    return longer


own = model.transformer.positions_embed.weight.detach()
stretched = F.interpolate(own.T[None], size=300, mode="linear", align_corners=True)[0].T
torch.manual_seed(0)
appended = torch.cat([own, 0.02 * torch.randn(44, own.shape[1])])
for name, embedding in (("stretched", stretched), ("appended", appended)):
    loss = tools.loss_of(with_positions(embedding), rows)
    print(f"{name:10} {loss:.3f} on texts of {rows.ids.shape[1]} tokens")
assert abs(tools.loss_of(with_positions(appended), rows) - as_it_is) < 1e-4
assert tools.loss_of(with_positions(stretched), rows) > as_it_is + 0.05

# %% [markdown]
# Appended rows change nothing for texts that do not reach them, and say nothing to those that do. Stretched
# ones put every token somewhere else: position 100 reads the row of position 85. That is the idea of linear
# position interpolation, which needs some training afterwards; Phi-3's longrope does better, since a
# rotation has a factor for each frequency.
#
# ## 3. Tied weights
#
# Without layers the logits are the embedding of the token (and of its position) times the embedding of every
# token.

# %%
ids = torch.tensor([tokenizer.encode("Once upon a time there was a fox. The fox")])
trace = look.trace(model, ids, tokenizer=tokenizer)
said = trace.lens(0).argmax(-1)[0]  # the logit lens before the first layer
print("read:", tools.words(tokenizer, ids[0]))
print("said:", tools.words(tokenizer, said))
assert (said == ids[0]).float().mean() > 0.5
trace.plot.lens()

# %% [markdown]
# Mostly the token itself: no other vector has a larger product with it than its own. The first task of the
# layers is to move away from there, and the picture shows how late this model does it. A model whose output
# layer is its own (Phi, Persimmon) has no such start.

# %% [markdown]
# # Solutions: GPT-Neo
#
# Of the exercises at the end of [`gpt_neo.ipynb`](../gpt_neo.ipynb).

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

from decoders import gpt_neo, kernels, tokenize, weights

folder = ROOT / "checkpoints/tiny-gpt-neo"
tokenizer = tokenize.load(folder)
model = kernels.plain(weights.load(gpt_neo.GPTNeoForCausalLM, folder, dtype=torch.float32))

# %% [markdown]
# ## 1. How far can it see?
#
# Each layer reaches window - 1 tokens back, and what a token has gathered there is read by the next layer
# from as far again: layers * (window - 1).

# %%
for layers, window in ((1, 8), (2, 8), (3, 8), (2, 5)):
    torch.manual_seed(0)
    config = gpt_neo.GPTNeoConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=layers,
        num_heads=4,
        attention_types=[[["local"], layers]],
        window_size=window,
        initializer_range=0.3,
    )
    local_model = gpt_neo.GPTNeoForCausalLM(config).double().eval()
    ids = torch.randint(50, (1, 60))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 50
    with torch.no_grad():
        changed = (local_model(ids).logits - local_model(other).logits).abs().amax(-1)[0] > 0
    last = int(changed.nonzero().max())
    print(f"{layers} layers, window {window}: the first token changes logits up to position {last}")
    assert last == layers * (window - 1)

# %% [markdown]
# GPT-Neo's six local layers of 256 alone would reach 1,530 tokens back, through six hands. The global
# layers between them read everything at once.
#
# ## 2. A cache that forgets
#
# A step of a local layer reads its own key and the 31 before. `buffers` and `lengths` are all that the
# cache is.


# %%
def forget(cache):
    for i, kind in enumerate(model.config.attention_layers):
        if kind == "local" and cache.lengths[i] > 31:
            k, v = cache[i]
            cache.buffers[i] = k[:, :, -31:].clone(), v[:, :, -31:].clone()
            cache.lengths[i] = 31


prompt = torch.tensor([tokenizer.encode("Once upon a time there was a little girl named Ella. She lived")])
sequence, cache = prompt, gpt_neo.KVCache()
with torch.no_grad():
    for _ in range(60):
        logits = model(sequence[:, len(cache) :], past_key_values=cache).logits
        forget(cache)
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], 1)
print("positions held:", cache.lengths, "of", sequence.shape[1])
assert torch.equal(sequence, model.generate(prompt, max_new_tokens=60, eos_token_id=None))
print(tokenizer.decode(sequence[0].tolist()))

# %% [markdown]
# `len(cache)` is the length of layer 0, a global one, and so the positions stay right. Engines for long
# texts store windows like this, as a ring.
#
# ## 3. The missing bias
#
# q · (k + b) = q · k + q · b: the second summand is the same for all keys of a query, and a softmax does
# not see what is added to all of its inputs.

# %%
ids = prompt
with torch.no_grad():
    expected = model(ids, output_attentions=True)
for part in ("k_proj", "q_proj"):
    changed = copy.deepcopy(model)
    torch.manual_seed(0)
    for block in changed.transformer.h:
        getattr(block.attn.attention, part).bias = nn.Parameter(torch.randn(96))
    with torch.no_grad():
        found = changed(ids, output_attentions=True)
    difference = max((a - b).abs().max() for a, b in zip(found.attentions, expected.attentions, strict=True))
    print(f"a bias of {part}: weights differ by {difference:.1e}")
    if part == "k_proj":
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
assert difference > 0.01

# %% [markdown]
# Leaving it away costs nothing. A bias of q is not for nothing: it says which keys a head likes whatever
# the query is. With rotary embedding, as in Phi, a bias of k does count: it is rotated with its position.

# %% [markdown]
# # Solutions: Phi-3
#
# Of the exercises at the end of [`phi3.ipynb`](../phi3.ipynb).

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
import dataclasses

import torch

from decoders import kernels, phi3, tokenize, weights
from notebooks import tools

folder = ROOT / "checkpoints/tiny-phi3"
tokenizer = tokenize.load(folder)
model = kernels.plain(weights.load(phi3.Phi3ForCausalLM, folder, dtype=torch.float32))
rows = tools.held_out("phi3", tokenizer)

# %% [markdown]
# ## 1. One head less to remember
#
# The rows of `qkv_proj` are 4 heads of q, 2 of k, 2 of v, of D = 24 each.

# %%
config = dataclasses.replace(model.config, num_key_value_heads=1)
state = model.state_dict()
for name, weight in state.items():
    if "qkv_proj" in name:
        q, k, v = weight.split([4 * 24, 2 * 24, 2 * 24])
        k, v = (part.view(2, 24, -1).mean(0) for part in (k, v))
        state[name] = torch.cat([q, k, v])
multi_query = phi3.Phi3ForCausalLM(config).eval()
multi_query.load_state_dict(state)
before = tools.loss_of(multi_query, rows)
tools.train(multi_query, "phi3", tokenizer, 30, rate=1e-3)
after = tools.loss_of(multi_query, rows)
print(f"two heads {tools.loss_of(model, rows):.3f}, their mean {before:.3f}, after 30 steps {after:.3f}")
assert before > 1 and after < before / 2

# %% [markdown]
# The mean of two trained heads is none of them. A little training brings most of it back: Ainslie et al.
# (2023) made GQA models out of finished ones in this way, with a twentieth of the training.
#
# ## 2. The window by hand
#
# A cache that is cut no longer knows how many tokens there were: the position has to be given.

# %%
windowed = copy.deepcopy(model)
windowed.config.sliding_window = 20
prompt = rows.ids[:1, :40]
with torch.no_grad():
    output = windowed(prompt)
    whole, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
    last = phi3.LongropeCache([(k[:, :, -19:].clone(), v[:, :, -19:].clone()) for k, v in whole])
    for position in range(40, 60):
        expected = windowed(new, past_key_values=whole).logits
        found = windowed(new, past_key_values=last, position_ids=torch.tensor([[position]])).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        last = phi3.LongropeCache([(k[:, :, -19:].clone(), v[:, :, -19:].clone()) for k, v in last])
        new = expected.argmax(-1)
print("whole cache:", len(whole), "positions; the other:", len(last))

# %% [markdown]
# Without `position_ids` the token would be told that it stands at position 19. For rotated keys that is a
# wrong distance to each of them.
#
# ## 3. A mistake with a number

# %%
wrong = copy.deepcopy(model)
wrong.config.rope_theta = 5000.0
print(f"loss with base 10,000 {tools.loss_of(model, rows):.4f}, with 5,000 {tools.loss_of(wrong, rows):.4f}")
ids = torch.tensor([tokenizer.chat([{"role": "user", "content": "Tell me a story about Tom and a fox."}])])
right, other = (m.generate(ids, max_new_tokens=120)[0] for m in (model, wrong))
n = min(len(right), len(other))
differ = (right[:n] != other[:n]).nonzero()[:, 0].tolist()
first = differ[0] if differ else None
print("first other token:", first, "of", n, "the prompt has", ids.shape[1])
if first is not None:
    print("right:", tokenizer.decode(right[first - 8 : first + 8]))
    print("wrong:", tokenizer.decode(other[first - 8 : first + 8]))
assert tools.loss_of(wrong, rows) > tools.loss_of(model, rows)

# %% [markdown]
# Both are fine stories. Nobody who reads them would see that a number is wrong; the logits say it in the
# first layer. `python -m decoders compare` names such a mistake, number and all
# ([porting](../../docs/porting.md)).

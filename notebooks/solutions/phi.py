# %% [markdown]
# # Solutions: Phi
#
# Of the exercises at the end of [`phi.ipynb`](../phi.ipynb).

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
import torch.nn.functional as F

from decoders import kernels, look, phi, tokenize, weights
from notebooks import tools

folder = ROOT / "checkpoints/tiny-phi"
tokenizer = tokenize.load(folder)
model = kernels.plain(weights.load(phi.PhiForCausalLM, folder, dtype=torch.float32))
rows = tools.held_out("phi", tokenizer)

# %% [markdown]
# ## 1. One product for two
#
# What is read by the same input can be stacked along the rows (outputs); what is added can be stacked along
# the columns (inputs): [a | b] · [A ; B] = aA + bB. The two biases of the outputs are added once.


# %%
class TwoProducts(phi.PhiBlock):
    def forward(self, x, attn_mask, cos_sin, cache, need_weights):
        a, m = self.self_attn, self.mlp
        inputs = (a.q_proj, a.k_proj, a.v_proj, m.fc1)
        W_in = torch.cat([part.weight for part in inputs])  # (3 C + 4 C, C)
        b_in = torch.cat([part.bias for part in inputs])
        W_out = torch.cat([a.dense.weight, m.fc2.weight], dim=1)  # (C, C + 4 C)
        b_out = a.dense.bias + m.fc2.bias

        C = x.shape[-1]
        q, k, v, inner = F.linear(self.input_layernorm(x), W_in, b_in).split([C, C, C, 4 * C], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for part in (q, k, v))
        q, k = a.rotate(q, *cos_sin), a.rotate(k, *cos_sin)
        y, weights = a.attend(q, k, v, attn_mask, a.head_dim**-0.5, 0.0, need_weights)
        both = torch.cat([y.transpose(1, 2).flatten(2), m.act(inner)], dim=-1)
        return x + F.linear(both, W_out, b_out), weights


changed = copy.deepcopy(model)
for block in changed.model.layers:
    block.__class__ = TwoProducts
with torch.no_grad():
    expected = model(rows.ids, use_cache=False).logits
    logits = changed(rows.ids, use_cache=False).logits
torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
print(f"largest difference of {expected.numel():,} logits: {(logits - expected).abs().max():.1e}")

# %% [markdown]
# In a real one the matrices are stacked once, not at every call. Other models go half of this way:
# Persimmon, GPT-1 and Phi-3 stack q, k and v (*fused QKV*), Phi-3 also gate and up.
#
# ## 2. A fair race


# %%
class OneAfterTheOther(phi.PhiBlock):
    def forward(self, x, *attention_inputs):
        y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + y
        return x + self.mlp(self.input_layernorm(x)), weights


losses = {}
for name, block_class in (("parallel", phi.PhiBlock), ("one after the other", OneAfterTheOther)):
    torch.manual_seed(0)
    config = phi.PhiConfig(len(tokenizer), 64, 256, num_hidden_layers=2, num_attention_heads=4)
    small = phi.PhiForCausalLM(config)
    for block in small.model.layers:
        block.__class__ = block_class
    losses[name] = tools.train(small, "phi", tokenizer, 60)
    print(f"{name:20} {tools.loss_of(small, rows):.3f} on stories not seen")
ends = [sum(line[-10:]) / 10 for line in losses.values()]
assert abs(ends[0] - ends[1]) < 0.5

# %% [markdown]
# The difference is small beside what a seed changes. (PaLM's authors, whose model is parallel too, found a
# small loss at 8 billion parameters and none at 62 billion.)
#
# ## 3. What the bias says

# %%
bias = model.lm_head.bias.detach()
order = bias.argsort()
print("favoured:", tools.words(tokenizer, order[-8:].flip(0)))
print("silenced:", tools.words(tokenizer, order[:8]))
changed = copy.deepcopy(model)
changed.lm_head.bias.data.zero_()
print(f"loss {tools.loss_of(model, rows):.3f}, without the bias {tools.loss_of(changed, rows):.3f}")
assert tools.loss_of(changed, rows) > tools.loss_of(model, rows)

# %% [markdown]
# The bias is close to how frequent a token is in the training texts, as far as the matrix does not say it
# already. On the page of `look`, "who wrote this token" shows its part in each logit:

# %%
trace = look.trace(model, rows.ids[:1, :20])
attribution = trace.attribution(trace["logits"].argmax(-1))
for name, value in sorted(
    zip(attribution.names, attribution.values[:, 0, -1].tolist(), strict=True), key=lambda x: -abs(x[1])
)[:6]:
    print(f"{value:7.2f}  {name}")

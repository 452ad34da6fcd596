# %% [markdown]
# # Persimmon: squares, and norms of queries and keys
#
# Persimmon (Elsen et al., Adept, 2023) has 8 billion parameters and 262,144 tokens. What is unusual:
#
# - **q and k of each head are normed** before they meet (*QK norm*), which keeps training steady,
# - the MLP **squares its ReLU**, so that most of it is exactly 0,
# - q, k and v come out of one matrix, **head by head** (*fused QKV*),
# - half of each head is rotated by the position, and the vocabulary is so large that logits need care.
#
# We read [`decoders/persimmon.py`](../decoders/persimmon.py) with a tiny checkpoint. Before most cells
# stands a question in bold: write your answer down before you run the cell. Solutions of the three
# exercises: [`solutions/persimmon.ipynb`](solutions/persimmon.ipynb).

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
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from decoders import kernels, look, persimmon, tokenize, weights
from notebooks import tools
from notebooks.tools import show

torch.manual_seed(0)
folder = ROOT / "checkpoints/tiny-persimmon"
tokenizer = tokenize.load(folder)
model = weights.load(persimmon.PersimmonForCausalLM, folder, dtype=torch.float32)
model = kernels.plain(model)  # the file as it stands, without the faster CPU kernels under a loaded model
for name in (
    "hidden_size",
    "num_attention_heads",
    "hidden_act",
    "qk_layernorm",
    "partial_rotary_factor",
    "rope_theta",
):
    print(f"{name:22} {getattr(model.config, name)}")

# %% [markdown]
# ## One matrix gives q, k and v
#
# `query_key_value` is C -> 3 C. Its 288 outputs could be ordered in two ways: all of q, then all of k, then
# all of v (GPT-1, Phi-3); or q, k, v of the first head, then of the second. **In the file one line decides.
# Which order of `unflatten` and `unbind` is which?**

# %%
show(persimmon.PersimmonAttention)

# %% [markdown]
# `unflatten(-1, (-1, 3, D))` makes (heads, 3, D) of the last dimension: head by head. `(3, heads, D)` would
# be the other. Shapes are the same, so nothing complains. **What happens to the loss with the wrong one?
# Blind guessing among 621 tokens has ln 621 = 6.4.**


# %%
class AllOfQFirst(persimmon.PersimmonAttention):
    def forward(self, x, attn_mask, cos_sin, cache, need_weights):
        q, k, v = self.query_key_value(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)  # wrong
        q, k, v = (part.transpose(1, 2) for part in (self.q_layernorm(q), self.k_layernorm(k), v))
        q, k = self.rotate(q, *cos_sin), self.rotate(k, *cos_sin)
        y, weights = self.attend(q, k, v, attn_mask, self.head_dim**-0.5, 0.0, need_weights)
        return self.dense(y.transpose(1, 2).flatten(2)), weights


rows = tools.held_out("persimmon", tokenizer)  # 16 texts that it was not trained on
changed = copy.deepcopy(model)
for block in changed.model.layers:
    block.self_attn.__class__ = AllOfQFirst
as_it_is, wrong_order = tools.loss_of(model, rows), tools.loss_of(changed, rows)
print(f"as it is {as_it_is:.3f}, all of q first {wrong_order:.3f}")
assert as_it_is < 0.25 and wrong_order > 2

# %% [markdown]
# ## Shapes

# %%
text = next(tools.RECIPES["persimmon"].texts(tools.HELD_OUT_SEED))
ids = torch.tensor([tokenizer.encode(text)[:24]])
print(" ".join(tools.words(tokenizer, ids[0])))
trace = look.trace(model, ids, tokenizer=tokenizer)
for name in ("q", "q_normed", "q_rotated", "scores", "weights", "heads", "mlp_up", "mlp_act", "out"):
    print(f"layers.0.{name:10} {tuple(trace[f'layers.0.{name}'].shape)}")

# %% [markdown]
# ## One layer by hand
#
# **In which order come: the norm of q, its rotation, the cut into heads?** And over how many numbers is q
# normed: C = 96, or D = 24?

# %%
layer = {
    name.removeprefix("model.layers.0."): p for name, p in model.state_dict().items() if ".layers.0." in name
}
x = model.model.embed_tokens.weight[ids]
B, T, C = x.shape
H, D, R = 4, 24, 12


def linear(x, name):
    return x @ layer[f"{name}.weight"].T + layer[f"{name}.bias"]


def norm(x, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x * layer[f"{name}.weight"] + layer[f"{name}.bias"]


angles = torch.arange(T)[:, None] * 25000.0 ** (-torch.arange(0, R, 2) / R)
turn = torch.polar(torch.ones_like(angles), angles)


def rotated(x):
    pairs = torch.complex(x[..., : R // 2], x[..., R // 2 : R]) * turn
    return torch.cat([pairs.real, pairs.imag, x[..., R:]], dim=-1)


fused = linear(norm(x, "input_layernorm"), "self_attn.query_key_value").view(B, T, H, 3 * D)
q, k, v = (part.transpose(1, 2) for part in fused.split(D, dim=-1))  # cut into heads first
q, k = (
    norm(q, "self_attn.q_layernorm"),
    norm(k, "self_attn.k_layernorm"),
)  # over D, the same weights for all heads
q, k = rotated(q), rotated(k)
later = torch.ones(T, T, dtype=torch.bool).triu(1)
attention_weights = (q @ k.transpose(2, 3) / math.sqrt(D)).masked_fill(later, -math.inf).softmax(-1)
y = (attention_weights @ v).transpose(1, 2).reshape(B, T, C)
x = x + linear(y, "self_attn.dense")
inner = linear(norm(x, "post_attention_layernorm"), "mlp.dense_h_to_4h").clamp(min=0) ** 2
by_hand = x + linear(inner, "mlp.dense_4h_to_h")

with torch.no_grad():
    output = model(ids, output_hidden_states=True, output_attentions=True)
torch.testing.assert_close(by_hand, output.hidden_states[1], atol=1e-5, rtol=1e-5)
torch.testing.assert_close(attention_weights, output.attentions[0], atol=1e-5, rtol=1e-5)
print(f"largest difference {(by_hand - output.hidden_states[1]).abs().max():.1e}")

# %% [markdown]
# ## What heads read
#
# **A normed q has a fixed length: how large can a score become, whatever the matrix does?** Look at the
# scores and at the maps.

# %%
labels = tools.words(tokenizer, ids[0])
scores = trace["layers.1.scores"][0].nan_to_num(0)
print("largest score of layer 1, head by head:", [round(s, 1) for s in scores.abs().amax((1, 2)).tolist()])
tools.maps(output.attentions[1][0], labels, [f"layer 1, head {h}" for h in range(4)])

# %% [markdown]
# The norm makes |q| about sqrt(D) times its weight, and |k| too; a score is at most |q| |k| / sqrt(D). Only
# the norm's weights can raise it, and those are D numbers that learn slowly, not a matrix.
#
# ## Switch it off: the norms of q and k
#
# **Without the norms, are the scores larger or smaller in this checkpoint? Does attention become sharper or
# flatter?**

# %%
changed = copy.deepcopy(model)
for block in changed.model.layers:
    block.self_attn.q_layernorm = block.self_attn.k_layernorm = nn.Identity()
with torch.no_grad():
    without = changed(ids, output_attentions=True)
for name, attentions in (("as it is", output.attentions), ("without", without.attentions)):
    bits = [torch.special.entr(w[0]).sum(-1).mean().item() / math.log(2) for w in attentions]
    print(f"{name:9} entropy of layers in bits: {' '.join(f'{b:.2f}' for b in bits)}")
print(f"loss as it is {as_it_is:.3f}, without {tools.loss_of(changed, rows):.3f}")
assert tools.loss_of(changed, rows) > 1.5

# %% [markdown]
# Smaller: a q out of the matrix is shorter than a normed one, so tokens are read more alike.
#
# ## Switch it off: the square
#
# **Which share of the MLP's inner numbers is exactly 0?** A ReLU of numbers around 0 would give a half.

# %%
show(persimmon.relu2, persimmon.PersimmonMLP)

# %%
with torch.no_grad():
    of_rows = look.trace(model, rows.ids[:4], only=["mlp_act"])
for name, value in of_rows.items():
    print(f"{name}: {(value == 0).float().mean():.1%} are 0; the largest is {value.max():.1f}")

# %%
losses = {}
acts = {
    "relu2": persimmon.relu2,
    "relu": F.relu,
    "gelu": F.gelu,
    "a half of relu2": lambda x: persimmon.relu2(x) / 2,
}
for name, act in acts.items():
    changed = copy.deepcopy(model)
    for block in changed.model.layers:
        block.mlp.act = act
    losses[name] = tools.loss_of(changed, rows)
    print(f"{name:16} {losses[name]:.3f}")
assert losses["relu2"] < losses["relu"] < losses["gelu"]

# %% [markdown]
# Four in five, and more: training has pushed what is not needed below 0. Where an input is 0, a column of
# the second matrix need not be read: that is what sparse kernels use. GELU is the worst exchange, since it
# is nowhere exactly 0. In float16 a number above 256 has no square: 65,504 is the end.
#
# ## Generation, step by step
#
# This checkpoint was trained on conversations in Adept's format. **What does the tokenizer put in front,
# and what ends an answer?**

# %%
chat = tokenizer.chat([{"role": "user", "content": "Tell me a story about Zoe and a bear."}])
ids = torch.tensor([chat])
print(repr(tokenizer.decode(chat)))
sequence, cache = ids, persimmon.KVCache()
with torch.no_grad():
    for _ in range(8):
        unread = sequence[:, len(cache) :]
        logits = model(unread, past_key_values=cache, logits_to_keep=1).logits
        new = logits[:, -1:].argmax(-1)
        p = logits[0, -1].softmax(-1).max()
        print(f"{unread.shape[1]:2} read, {len(cache):2} held: {tools.words(tokenizer, new[0])[0]:8} {p:.0%}")
        sequence = torch.cat([sequence, new], 1)
assert torch.equal(sequence, model.generate(ids, max_new_tokens=8))

# %%
cache

# %% [markdown]
# **`logits_to_keep=1` asks for the logits of the last position only. How many megabytes does that save for
# a prompt of 1,000 tokens of the real model, 262,144 tokens in float32?**

# %%
print(f"{999 * 262_144 * 4 / 1e6:,.0f} MB")
print(tokenizer.decode(model.generate(ids, max_new_tokens=60)[0, len(chat) :].tolist()))

# %% [markdown]
# ## The loss of a large vocabulary
#
# In training all positions need logits, and their gradients. **How can a loss be computed without ever
# holding all logits?**

# %%
show(persimmon.next_token_loss)

# %% [markdown]
# Some positions at a time, forgotten at once and computed again for the gradient. Time for memory.
#
# ## A small training run
#
# The norms are for steady training: in a long one the matrices of q and k grow, until each head reads one
# token with all its weight, and no gradient comes through. **Suppose that they have grown to 100 times what
# they were. Which model still learns: with norms of q and k, or without?**

# %%
show(tools.train)
curves = {}
for grown in (1, 100):
    for qk_layernorm in (True, False):
        torch.manual_seed(0)
        config = persimmon.PersimmonConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            qk_layernorm=qk_layernorm,
        )
        small = persimmon.PersimmonForCausalLM(config)
        with torch.no_grad():
            for block in small.model.layers:  # (H, 3, D, C): q and k of each head
                block.self_attn.query_key_value.weight.view(4, 3, 16, 64)[:, :2] *= grown
        name = f"{'with' if qk_layernorm else 'without'} norms, q and k times {grown}"
        curves[name] = tools.train(small, "persimmon", tokenizer, 40, batch_size=4)
        print(f"{name:33} {sum(curves[name][-10:]) / 10:.2f}")
ends = [sum(line[-10:]) / 10 for line in curves.values()]
assert abs(ends[0] - ends[2]) < 0.1 and ends[3] > ends[2] + 1
tools.curves(curves, "step", "loss", (math.log(len(tokenizer)), "blind guess: ln V"))

# %% [markdown]
# With norms nothing changes at all: a norm gives back the same q whatever its matrix is multiplied with.
# Without them the grown model hardly gets beyond how frequent each token is. For matrices of ordinary size
# there is no difference, which is why small experiments never show what the norms are for.
#
# ## Exercises
#
# 1. **Three matrices.** Turn `query_key_value` into q_proj, k_proj and v_proj as Phi has them, out of the
#    same weights, and show that the layer is the same.
# 2. **Skip the zeros.** Compute the MLP of one token from those columns of `dense_4h_to_h` that are needed
#    only. Which share of the multiplications is saved?
# 3. **The same silence.** For a token that occurs several times in a text: are the same inner numbers of
#    the MLP 0 each time? Compare with two different tokens.
#
# Further: [docs/reading/persimmon.md](../docs/reading/persimmon.md), and [Fuyu](fuyu.ipynb), which is this
# decoder with pictures in front.

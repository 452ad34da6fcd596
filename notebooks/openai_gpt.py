# %% [markdown]
# # GPT-1: post-norm, learned positions
#
# Radford et al., *Improving Language Understanding by Generative Pre-Training* (2018): train one decoder to
# say the next word of seven thousand books, then fine-tune it, with hardly anything new on top, for each
# task. All the other models here follow this recipe. What GPT-1 does otherwise is mostly what was given up
# later:
#
# - the norms stand **behind** the residual sums (*post-norm*), and there is none at the end,
# - positions are an **embedding that is learned**, a row for each of 512 positions,
# - matrices are stored **transposed**, [in, out],
# - it was published **without a KV cache**. This file gives it one.
#
# We read [`decoders/openai_gpt.py`](../decoders/openai_gpt.py) with a tiny checkpoint. Before most cells
# stands a question in bold: write your answer down before you run the cell. Solutions of the three
# exercises: [`solutions/openai_gpt.ipynb`](solutions/openai_gpt.ipynb).

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
import torch.nn.functional as F

from decoders import kernels, look, openai_gpt, tokenize, weights
from notebooks import tools
from notebooks.tools import show

torch.manual_seed(0)
folder = ROOT / "checkpoints/tiny-openai-gpt"
tokenizer = tokenize.load(folder)
model = weights.load(openai_gpt.OpenAIGPTLMHeadModel, folder, dtype=torch.float32)
model = kernels.plain(model)  # the file as it stands, without the faster CPU kernels under a loaded model
for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "afn"):
    print(f"{name:12} {getattr(model.config, name)}")

# %% [markdown]
# ## Words become tokens
#
# GPT-1's tokenizer makes everything lower case, splits it into words, and joins letters to pieces (BPE). A
# piece that ends a word carries the mark `</w>`. **What becomes of the capitals and of the two spaces in
# "Once  Upon"? Does `decode` bring them back?**

# %%
for text in ("Once upon a time there was a fox.", "Once  Upon", "hedgehogs"):
    pieces = tokenizer.encode(text)
    print(repr(text), "->", pieces, "->", tools.words(tokenizer, pieces))
assert tokenizer.encode("Once  Upon") == tokenizer.encode("once upon")

# %% [markdown]
# They are gone for good: this vocabulary has one "once". All later models keep every byte.
#
# ## Positions are learned
#
# Attention by itself knows no order. GPT-1 adds a vector for the position to the vector of the token. **How
# many rows does that embedding have, and what must happen to a text that is longer?**

# %%
show(openai_gpt.OpenAIGPTModel.forward)

# %%
embedding = model.transformer.positions_embed.weight.detach()
print("positions:", tuple(embedding.shape))
try:
    model(torch.zeros(1, 300, dtype=torch.long))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# There is nothing to look up for position 256 of this tiny model (512 in the real one). The rotary embeddings
# of later models are a formula and go on.
#
# **Nobody told the model that position 7 is next to position 8. Are their rows alike?** Here is how alike
# every fourth is to every fourth (the cosine of their angle).

# %%
unit = F.normalize(embedding, dim=-1)
alike = unit @ unit.T
figure = tools.Figure((3.6, 3), layout="constrained")
axes = figure.subplots()
figure.colorbar(axes.imshow(alike[::4, ::4], cmap="RdBu", vmin=-1, vmax=1, extent=(0, 256, 256, 0)))
axes.set(xlabel="position", ylabel="position", title="how alike two rows are")
neighbours = alike.diagonal(1)[:100].mean()
others = alike[:100, :100].mean()
print(f"neighbours {neighbours:.2f}, any two {others:.2f}, of the first hundred")
assert neighbours > others + 0.1
figure

# %% [markdown]
# Neighbours are alike, because being alike helped to predict. The last rows are nearly random: few stories
# of the training were that long.
#
# **Switch it off: what if every token is told that it stands at position 0? And if positions are shuffled?**

# %%
rows = tools.held_out("openai_gpt", tokenizer)  # 16 stories that it was not trained on
T = rows.ids.shape[1]
generator = torch.Generator().manual_seed(0)
positions = {
    "as it is": torch.arange(T),
    "all at position 0": torch.zeros(T, dtype=torch.long),
    "shuffled": torch.randperm(T, generator=generator),
    "one to the right": torch.arange(1, T + 1),
}
found = {}
for name, position_ids in positions.items():
    with torch.no_grad():
        found[name] = model(rows.ids, labels=rows.labels, position_ids=position_ids).loss.item()
    print(f"{name:16} {found[name]:.3f}")
assert found["as it is"] < 0.3 and 0.8 < found["all at position 0"] < found["shuffled"]
assert found["one to the right"] < found["all at position 0"]

# %% [markdown]
# No position is better than a wrong one: the causal mask still tells an order, since the first token sees one
# key, the second two. A shift by one is the mildest, because rows of neighbours are alike, and yet it more
# than doubles the loss. It is the classic bug of a port that counts from 1.
#
# ## The block: post-norm
#
# **Pre-norm is `x = x + f(norm(x))`. Where does the norm stand in post-norm, and what does that do to the
# residual stream x?**

# %%
show(openai_gpt.OpenAIGPTBlock)

# %% [markdown]
# The norm is *on* the residual stream: after each sum everything is brought back to mean 0 and length 1 a
# dimension (times the norm's weight). Nothing passes from the first layer to the last untouched.
#
# **GPT-Neo is pre-norm. In which of the two does x grow from layer to layer?**

# %%
from decoders import gpt_neo

neo_folder = ROOT / "checkpoints/tiny-gpt-neo"
neo = kernels.plain(weights.load(gpt_neo.GPTNeoForCausalLM, neo_folder, dtype=torch.float32))
text = "Once upon a time there was a fox. The fox"
ids = torch.tensor([tokenizer.encode(text)])
trace = look.trace(model, ids, tokenizer=tokenizer)
neo_trace = look.trace(neo, tokenize.load(neo_folder).encode(text))
sizes = {
    name: [
        one[stage].square().mean().sqrt().item()
        for stage in ("embeddings", *(f"layers.{i}.out" for i in range(4)))
    ]
    for name, one in (("GPT-1, post-norm", trace), ("GPT-Neo, pre-norm", neo_trace))
}
tools.curves(sizes, "after layer", "size of the residual stream")

# %% [markdown]
# GPT-Neo's grows with each layer; GPT-1's stays near 1 until the last norm, whose weight is free to choose.
# (Both end in logits of the same size: GPT-Neo has a norm at the end for that.)
#
# ## Shapes, and a matrix the other way round
#
# **`nn.Linear(96, 288)` keeps a matrix of which shape? And GPT-1's `c_attn`, which gives q, k and v at once
# (*fused QKV*)?**

# %%
show(openai_gpt.Conv1D)
print("nn.Linear ", tuple(torch.nn.Linear(96, 288).weight.shape))
print("c_attn    ", tuple(model.transformer.h[0].attn.c_attn.weight.shape))
for name in ("q", "k", "v", "scores", "weights", "heads", "mlp_up", "mlp_act", "out"):
    print(f"layers.0.{name:8} {tuple(trace[f'layers.0.{name}'].shape)}")

# %% [markdown]
# ## One layer by hand
#
# **"gelu" in this config means which GELU: the exact one, with the error function, or the approximation
# with tanh?** Below is layer 0 with both; only one agrees with the file.

# %%
show(openai_gpt.OpenAIGPTAttention)

# %%
layer = {
    name.removeprefix("transformer.h.0."): p for name, p in model.state_dict().items() if ".h.0." in name
}
B, T = ids.shape
C, H, D = 96, 6, 16
x = model.transformer.tokens_embed.weight[ids] + embedding[:T]  # (B, T, C)


def conv1d(x, name):
    return x @ layer[f"{name}.weight"] + layer[f"{name}.bias"]  # no transpose: [in, out]


def norm(x, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x * layer[f"{name}.weight"] + layer[f"{name}.bias"]


q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in conv1d(x, "attn.c_attn").split(C, dim=-1))
scores = q @ k.transpose(2, 3) / math.sqrt(D)
later = torch.ones(T, T, dtype=torch.bool).triu(1)
attention_weights = scores.masked_fill(later, -math.inf).softmax(-1)
y = (attention_weights @ v).transpose(1, 2).reshape(B, T, C)
a = norm(x + conv1d(y, "attn.c_proj"), "ln_1")  # sum first, norm behind


def after(gelu):
    return norm(a + conv1d(gelu(conv1d(a, "mlp.c_fc")), "mlp.c_proj"), "ln_2")


with torch.no_grad():
    output = model(ids, output_hidden_states=True, output_attentions=True)
    exact = after(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
    by_tanh = after(lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
for name, by_hand in (("exact", exact), ("by tanh", by_tanh)):
    print(f"{name:8} differs by {(by_hand - output.hidden_states[1]).abs().max():.1e}")
torch.testing.assert_close(by_tanh, output.hidden_states[1], atol=1e-5, rtol=1e-5)
torch.testing.assert_close(attention_weights, output.attentions[0], atol=1e-5, rtol=1e-5)
assert (exact - output.hidden_states[1]).abs().max() > 1e-4

# %% [markdown]
# The approximation. The other is off by less than a thousandth in each number: no error, no warning, and
# after some hundred tokens another text.
#
# ## What heads read
#
# **In layer 0 a head sees tokens and positions, nothing else. Which simple pattern can it make of positions
# alone?**

# %%
labels = tools.words(tokenizer, ids[0])
tools.maps(output.attentions[0][0, :4], labels, [f"layer 0, head {h}" for h in range(4)])

# %%
previous, itself = trace.heads()["previous"], trace.heads()["itself"]
print("weight on the previous token, heads to the right, layers downwards")
print("\n".join("  ".join(f"{p:.2f}" for p in row) for row in previous.tolist()))
h = int(previous.flatten().argmax())
trace.plot.attention(h // 6, h % 6)

# %% [markdown]
# In layer 0 the heads of this tiny model read all that came before alike, a mean. "The one before" would be
# another pattern of positions alone: position t asks for position t - 1, and rows of the position embedding
# can answer. No head does only that; the one that comes nearest is drawn large.
#
# ## Switch it off: post-norm
#
# **The same weights as a pre-norm model: which loss do you expect? Blind guessing among 639 tokens has ln
# 639 = 6.5.**


# %%
class PreNorm(openai_gpt.OpenAIGPTBlock):
    def forward(self, x, *attention_inputs):
        y, weights = self.attn(self.ln_1(x), *attention_inputs)
        x = x + y
        return x + self.mlp(self.ln_2(x)), weights


changed = copy.deepcopy(model)
for block in changed.transformer.h:
    block.__class__ = PreNorm
pre_norm = tools.loss_of(changed, rows)
print(f"as it is {found['as it is']:.3f}, pre-norm {pre_norm:.3f}")
assert pre_norm > math.log(639)

# %% [markdown]
# Worse than knowing nothing: it is sure, and wrong. It is another model, not a variant of this one.
#
# ## Generation, step by step
#
# GPT-1 was published without a KV cache: for each new token its original code, and every other one, reads
# the whole text anew. **For a prompt of 11 tokens and 20 new ones, how many tokens go through the layers
# without a cache, and how many with one?**

# %%
N = 20
without, sequence = 0, ids
with torch.no_grad():
    for _ in range(N):
        logits = model(sequence, use_cache=False).logits
        without += sequence.shape[1]
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], 1)

with_cache, cached, cache = 0, ids, openai_gpt.KVCache()
with torch.no_grad():
    for _ in range(N):
        unread = cached[:, len(cache) :]
        logits = model(unread, past_key_values=cache).logits
        with_cache += unread.shape[1]
        cached = torch.cat([cached, logits[:, -1:].argmax(-1)], 1)
print(
    f"{without} tokens without, {with_cache} with the cache; the same text: {torch.equal(sequence, cached)}"
)
print(tokenizer.decode(cached[0].tolist()))
assert torch.equal(sequence, cached) and with_cache == ids.shape[1] + N - 1

# %%
cache

# %% [markdown]
# Nothing in the model stands against a cache: what is kept of a token depends on the tokens before it
# alone. The loop is `generate`:

# %%
assert torch.equal(model.generate(ids, max_new_tokens=N, eos_token_id=None), cached)
show(openai_gpt.sample)

# %% [markdown]
# Sampling draws instead of taking the likeliest. **After "the fox", how many of 639 tokens hold 90 % of the
# probability?** `top_p` = 0.9 (nucleus sampling) draws from these alone.

# %%
with torch.no_grad():
    chances = model(ids).logits[0, -1].softmax(-1).sort(descending=True)
kept = int((chances.values.cumsum(0) < 0.9).sum()) + 1
print(kept, "tokens:", tools.words(tokenizer, chances.indices[:kept]))
for seed in range(3):
    draw = torch.Generator().manual_seed(seed)
    new = model.generate(ids, max_new_tokens=14, do_sample=True, top_p=0.9, generator=draw)
    print(tokenizer.decode(new[0].tolist()))

# %% [markdown]
# ## A small training run
#
# Post-norm is said to be harder to train: gradients pass through a norm at every sum, and a learning rate
# that is too large at the start breaks it. **Train both blocks from nothing, at two learning rates. Which
# of the four do you expect to stop learning?** For a fair race the pre-norm model gets a norm at its end,
# as all of them have.


# %%
class LastPreNorm(PreNorm):
    def forward(self, x, *attention_inputs):
        x, weights = super().forward(x, *attention_inputs)
        return F.layer_norm(x, x.shape[-1:]), weights


def new_model(is_post_norm):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 256}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    small = openai_gpt.OpenAIGPTLMHeadModel(openai_gpt.OpenAIGPTConfig(**sizes, **no_dropout))
    if not is_post_norm:
        for block in small.transformer.h:
            block.__class__ = PreNorm
        block.__class__ = LastPreNorm
    return small


show(tools.train)

# %%
losses = {}
for rate in (0.006, 0.015):
    for name in ("post-norm", "pre-norm"):
        small = new_model(name == "post-norm")
        losses[name, rate] = tools.train(small, "openai_gpt", tokenizer, 50, rate=rate)
ends = {key: sum(line[-10:]) / 10 for key, line in losses.items()}
assert ends["post-norm", 0.006] < ends["pre-norm", 0.006]
assert ends["post-norm", 0.015] > ends["pre-norm", 0.015]
lines = {f"{name}, rate {rate}": line for (name, rate), line in losses.items()}
tools.curves(lines, "step", "loss", (math.log(len(tokenizer)), "blind guess: ln V"))

# %% [markdown]
# At the smaller rate post-norm is far ahead: weights are drawn with a deviation of 0.02, so that a pre-norm
# layer adds little to so narrow a stream at first, while post-norm brings every sum to length 1. At the
# larger rate it stops near 4.9, the loss of knowing nothing but how frequent each token is, and pre-norm
# goes on. That is the bargain: post-norm wants a small rate and a warm-up, pre-norm forgives. Deep models
# made the choice.
#
# ## Exercises
#
# 1. **Dropout.** GPT-1 was trained with dropouts of 0.1. Load the checkpoint, set all of them to 0.1 and
#    call `train()`: how much does the loss on held-out stories grow, and how much does it vary from run to
#    run?
# 2. **Longer than trained.** Extend the position embedding from 256 to 300 rows by stretching it (linear
#    interpolation). What does that do to the loss of ordinary texts, and what if you append 44 random rows
#    instead?
# 3. **Tied weights.** The output layer is the token embedding. Which token does the model say after a text
#    if you skip all four layers? Explain what you see.
#
# Further: [docs/reading/openai_gpt.md](../docs/reading/openai_gpt.md), and [GPT-Neo](gpt_neo.ipynb), three
# years later.

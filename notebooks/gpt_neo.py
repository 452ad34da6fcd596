# %% [markdown]
# # GPT-Neo: layers that see only what is near
#
# GPT-Neo (Black et al., 2021) is GPT-3's design in the open, trained on the Pile. It reads like GPT-2 but
# for two choices:
#
# - every second layer is **local**: a token sees the last 256 tokens only (*a sliding window*),
# - scores are **not divided by sqrt(D)**.
#
# We read [`decoders/gpt_neo.py`](../decoders/gpt_neo.py) with a tiny checkpoint, whose window is 32 tokens.
# Before most cells stands a question in bold: write your answer down before you run the cell. Solutions of
# the three exercises: [`solutions/gpt_neo.ipynb`](solutions/gpt_neo.ipynb).

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

from decoders import decoding, gpt_neo, kernels, look, tokenize, weights
from notebooks import tools
from notebooks.tools import show

torch.manual_seed(0)
folder = ROOT / "checkpoints/tiny-gpt-neo"
tokenizer = tokenize.load(folder)
model = weights.load(gpt_neo.GPTNeoForCausalLM, folder, dtype=torch.float32)
model = kernels.plain(model)  # the file as it stands, without the faster CPU kernels under a loaded model
for name in ("hidden_size", "num_heads", "attention_types", "attention_layers", "window_size"):
    print(f"{name:17} {getattr(model.config, name)}")

# %% [markdown]
# ## What a local layer sees
#
# A mask is added to the scores: 0 where a query sees a key, minus infinity where it does not. **Draw the
# mask of five tokens with a window of two: which keys does the last token see? Is the token itself
# counted?**

# %%
show(gpt_neo.local_mask)

# %%
x = torch.zeros(1)
for window in (None, 2):
    mask = gpt_neo.local_mask(5, 5, window, None, x, need_weights=True)[0, 0]
    print("window", window)
    for row in mask.tolist():
        print("  ", " ".join("1" if value == 0 else "." for value in row))
assert (mask[-1] == 0).tolist() == [False, False, False, True, True]

# %% [markdown]
# Itself and the one before. `tril` cuts off what comes later, `triu` what is too far back; both are aligned
# at the lower right, since S keys may be more than T queries when a cache holds the past.
#
# **In generation one token is read at a time (T = 1). How many columns does its mask need, with S = 100
# keys and a window of 32?**

# %%
print("64 queries of 64:", tuple(gpt_neo.local_mask(64, 64, 32, None, x, False).shape))
print(" 1 query  of 100:", tuple(gpt_neo.local_mask(1, 100, 32, None, x, False).shape))

# %% [markdown]
# 32: a decoding step reads the end of the cache only. Look for the line that cuts k and v to it:

# %%
show(gpt_neo.GPTNeoSelfAttention)

# %% [markdown]
# The `1.0` in `attend` is the scale that all others set to `D**-0.5`. And q, k and v have no bias.
#
# ## Shapes
#
# **Two stories, padded to the same length T, go through the model. What are the shapes of q, and of the
# logits?**

# %%
texts = ["Once upon a time there was a fox. The fox", "Once upon a time there was a girl named Mia who"]
rows = [tokenizer.encode(text) for text in texts]
T = max(map(len, rows))
ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])  # padded on the left
attention_mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
trace = look.trace(model, ids, attention_mask=attention_mask)
for name in ("embeddings", "layers.0.q", "layers.0.scores", "layers.0.heads", "layers.0.mlp_up", "logits"):
    print(f"{name:16} {tuple(trace[name].shape)}")

# %% [markdown]
# ## One layer by hand
#
# Layer 1, a local one, on a text that is longer than its window. **Which two lines would you have to change
# to make layer 0 of it?**

# %%
story = next(tools.RECIPES["gpt_neo"].texts(tools.HELD_OUT_SEED))
ids = torch.tensor([tokenizer.encode(story)])
with torch.no_grad():
    output = model(ids, output_hidden_states=True, output_attentions=True)
layer = {
    name.removeprefix("transformer.h.1."): p for name, p in model.state_dict().items() if ".h.1." in name
}
x = output.hidden_states[1]  # what leaves layer 0
B, T, C = x.shape
H, D, window = 6, 16, 32


def norm(x, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x * layer[f"{name}.weight"] + layer[f"{name}.bias"]


n = norm(x, "ln_1")
q, k, v = (
    (n @ layer[f"attn.attention.{name}_proj.weight"].T).view(B, T, H, D).transpose(1, 2) for name in "qkv"
)
scores = q @ k.transpose(2, 3)  # no sqrt(D)
distance = torch.arange(T)[:, None] - torch.arange(T)
hidden = (distance < 0) | (distance >= window)
attention_weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
y = (attention_weights @ v).transpose(1, 2).reshape(B, T, C)
x = x + y @ layer["attn.attention.out_proj.weight"].T + layer["attn.attention.out_proj.bias"]

inner = norm(x, "ln_2") @ layer["mlp.c_fc.weight"].T + layer["mlp.c_fc.bias"]
inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
by_hand = x + inner @ layer["mlp.c_proj.weight"].T + layer["mlp.c_proj.bias"]

torch.testing.assert_close(by_hand, output.hidden_states[2], atol=1e-4, rtol=1e-4)
torch.testing.assert_close(attention_weights, output.attentions[1], atol=1e-4, rtol=1e-4)
print(f"{T} tokens, largest difference {(by_hand - output.hidden_states[2]).abs().max():.1e}")

# %% [markdown]
# The number of the layer, and `hidden` without the window. The block around it is the common pre-norm one:

# %%
show(gpt_neo.GPTNeoBlock)

# %% [markdown]
# ## What heads read
#
# **Here are a global head and a local one over a whole story. Where do you expect the white?**

# %%
figure = tools.Figure((7, 3.4), layout="constrained")
for axes, layer_index in zip(figure.subplots(1, 2), (0, 1), strict=True):
    axes.imshow(output.attentions[layer_index][0].amax(0).sqrt(), vmin=0, vmax=1, cmap="Blues")
    axes.set(
        title=f"layer {layer_index}, {model.config.attention_layers[layer_index]}",
        xlabel="key",
        ylabel="query",
    )
figure

# %% [markdown]
# The largest weight of all heads (its root, so that small ones are seen). The local layer is a band 32
# wide.
#
# **An induction head reads what came after the same token earlier. Can a local layer have one, if the
# earlier token is 40 tokens away?** `look.induction` reads a text without sense twice, and says how much
# weight each head gives to what followed the first time.

# %%
for length in (12, 40):
    found = look.induction(model, length)
    print(f"repeated after {length} tokens")
    for i, row in enumerate(found.tolist()):
        print(
            f"  layer {i}, {model.config.attention_layers[i]:6}", " ".join(f"{value:5.2f}" for value in row)
        )
assert (found[1::2] == 0).all()

# %% [markdown]
# Beyond the window its weight is exactly 0. (And these tiny heads are weak at it: their stories hardly ever
# need it.)
#
# ## Switch it off: the window
#
# Its local layers see 32 tokens. **How much worse does the loss become with a window of 8? And with one as
# long as the text: better, or worse?**

# %%
held_out = tools.held_out("gpt_neo", tokenizer)  # 16 stories that it was not trained on
losses = {}
for window in (1, 2, 4, 8, 16, 32, 256):
    changed = copy.deepcopy(model)
    changed.config.window_size = window
    losses[window] = tools.loss_of(changed, held_out)
    print(f"window {window:3}: {losses[window]:.3f}")
assert min(losses, key=losses.get) == 32

# %% [markdown]
# The window of the training is the best, and *more* is worse too: a key that the layer never saw in
# training takes weight from those that it knows. (256, because no text here is longer.)
#
# ## Switch it off: no division by sqrt(D)
#
# A sum of D products grows with sqrt(D): dividing keeps the softmax from choosing one key with all its
# weight. GPT-Neo leaves that to the weights. **What happens to the loss, and to how widely heads read, if
# you divide after all?** Entropy says how widely: 0 bits is one token, 3 bits is like eight alike.

# %%
own = gpt_neo.head_masked_attention


def measured(factor):
    changed = copy.deepcopy(model)
    for block in changed.transformer.h:
        block.attn.attention.attend = lambda q, *rest: own(q * factor, *rest)
    with torch.no_grad():
        weights = changed(held_out.ids, output_attentions=True).attentions
    real = held_out.labels != -100
    bits = [torch.special.entr(w).sum(-1).transpose(1, 2)[real].mean().item() / math.log(2) for w in weights]
    return tools.loss_of(changed, held_out), sum(bits) / len(bits)


for name, factor in (("as it is", 1.0), ("divided by sqrt(D)", D**-0.5), ("times sqrt(D)", D**0.5)):
    loss, bits = measured(factor)
    print(f"{name:19} loss {loss:.3f}, entropy {bits:.2f} bits")
assert measured(D**-0.5)[0] > 0.8

# %% [markdown]
# Divided, every head reads a bit of everything. The weights were trained for the scale that they have: a
# port that "mends" it writes worse texts and gives no error.
#
# ## Generation, step by step
#
# **The cache keeps all keys, also for layers that read 32 of them. How many bytes a token is that here: 4
# layers, k and v, C = 96, four bytes each? How many could be dropped?**

# %%
prompt = torch.tensor([tokenizer.encode("Once upon a time there was a")])
sequence, cache = prompt, gpt_neo.KVCache()
with torch.no_grad():
    for _ in range(6):
        unread = sequence[:, len(cache) :]
        logits = model(unread, past_key_values=cache).logits[:, -1]
        best = logits.softmax(-1).topk(3)
        shown = ", ".join(
            f"{w} {p:.0%}"
            for w, p in zip(tools.words(tokenizer, best.indices[0]), best.values[0].tolist(), strict=True)
        )
        print(f"{unread.shape[1]} read, {len(cache):2} held: {shown}")
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], 1)
assert torch.equal(sequence, model.generate(prompt, max_new_tokens=6))
print(4 * 2 * 96 * 4, "bytes a token")

# %%
cache

# %% [markdown]
# 3,072 bytes; in a text much longer than the window half of it is read by nobody again. This file keeps it,
# so that a cache can be rewound, and any text be continued.
#
# Greedy takes the likeliest token each time. **Beam search follows three texts at once and gives the one
# whose probability is the largest as a whole. Can its first token be another than greedy's?**

# %%
start = torch.tensor([tokenizer.encode("Once upon a time")])
tree = decoding.beam_tree(model, start, tokenizer=tokenizer, num_beams=3, max_new_tokens=8)
greedy = tokenizer.decode(model.generate(start, max_new_tokens=8)[0])
print("greedy:", greedy)
tree

# %%
of_greedy = (
    decoding.score(model, model.generate(start, max_new_tokens=8))[0, start.shape[1] - 1 :].sum().item()
)
print(f"greedy {of_greedy:.2f}, the best beam {tree.totals[tree.best[0]]:.2f}")
assert tree.totals[tree.best[0]] >= of_greedy - 1e-4

# %% [markdown]
# It can: what is likely now may lead to where nothing is likely. The numbers are logarithms of
# probabilities, summed.
#
# ## A small training run
#
# **Four layers from nothing: all global, or two of them with a window of 8. Which learns better in 60
# steps?**

# %%
show(tools.train)
curves = {}
for name, kinds in (("all global", ["global"]), ("every second local", ["global", "local"])):
    torch.manual_seed(0)
    types = [[kinds, 4 // len(kinds)]]
    config = gpt_neo.GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        attention_types=types,
        window_size=8,
        max_position_embeddings=256,
    )
    small = gpt_neo.GPTNeoForCausalLM(config)
    curves[name] = tools.train(small, "gpt_neo", tokenizer, 60)
    print(f"{name:19} {sum(curves[name][-10:]) / 10:.2f}")
ends = [sum(line[-10:]) / 10 for line in curves.values()]
assert max(ends) < 4.5
tools.curves(curves, "step", "loss", (math.log(len(tokenizer)), "blind guess: ln V"))

# %% [markdown]
# Hardly a difference: most of what a story needs is near, and what is far can come through the global
# layers. What is gained is time: with 2,048 tokens a local layer of 256 has an eighth of the scores to
# compute.
#
# ## Exercises
#
# 1. **How far can it see?** Two local layers with windows of 8 can carry something over more than 8 tokens.
#    Over how many? Find it by experiment: change the first token of a text in a model whose layers are all
#    local, and see up to which position logits change.
# 2. **A cache that forgets.** Generate with a cache from which, for local layers, all but the last 31
#    positions are dropped before each step. Show that the text stays the same.
# 3. **The missing bias.** q, k and v have no bias here. A bias of q would add the same vector to all
#    queries. Show that a bias of *k* changes no attention weight at all.
#
# Further: [docs/reading/gpt_neo.md](../docs/reading/gpt_neo.md), [every way to
# decode](../docs/decoding.md), and [Phi-3](phi3.ipynb), which has a window in all layers.

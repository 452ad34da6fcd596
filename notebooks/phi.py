# %% [markdown]
# # Phi: parallel attention and MLP
#
# phi-1, phi-1.5 and phi-2 (Gunasekar et al., *Textbooks Are All You Need*, 2023) asked a question about
# data: how small may a model be, if what it reads is as clear as a textbook? The model itself is plain, but
# for three choices:
#
# - attention and MLP stand **side by side** in a layer instead of one after the other (a *parallel block*),
# - only **part of each head** is rotated by the position (*partial rotary embedding*),
# - there are **biases everywhere**, in the output layer too.
#
# This notebook goes through [`decoders/phi.py`](../decoders/phi.py), all of Phi in one file, on a tiny
# checkpoint that was trained on invented stories. The same file runs phi-2. You need to know PyTorch, and
# what attention is.
#
# Before most cells stands a question in bold. Write your answer down before you run the cell: that is where
# the learning is. At the end are three exercises; their solutions are in
# [`solutions/phi.ipynb`](solutions/phi.ipynb).

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

from decoders import kernels, look, phi, tokenize, weights
from notebooks import tools
from notebooks.tools import show

torch.manual_seed(0)
folder = ROOT / "checkpoints/tiny-phi"
tokenizer = tokenize.load(folder)
model = weights.load(phi.PhiForCausalLM, folder, dtype=torch.float32)
model = kernels.plain(model)  # the file as it stands, without the faster CPU kernels under a loaded model
model.config

# %% [markdown]
# ## What there is to train
#
# The tiny Phi has C = `hidden_size` = 96, V = `vocab_size` = 970, four layers of four heads; phi-2 has C =
# 2,560 and 32 layers.
#
# **Where are most of its parameters: in the embedding, in the output layer, in attention, or in the MLPs?**
# An MLP has two matrices, C x 4C and 4C x C; attention has four, C x C each.

# %%
kinds = {"embed": "embedding", "attn": "attention", "mlp": "MLP", "norm": "norms", "lm_head": "output layer"}
counts = dict.fromkeys(kinds.values(), 0)
for name, p in model.named_parameters():
    kind = next(kind for part, kind in kinds.items() if part in name)
    counts[kind] += p.numel()
for key, n in counts.items():
    print(f"{key:12} {n:8,} {n / sum(counts.values()):5.0%}")
assert counts["MLP"] > 1.9 * counts["attention"]

# %% [markdown]
# The MLPs: eight C² a layer against attention's four, in every transformer whose MLP is four times as wide.
# Embedding and output layer are large here only because the model is tiny; they grow with C, and the rest
# with C².
#
# ## The block
#
# Most decoders have this layer, called pre-norm:
#
# ```
# x = x + attention(norm_1(x))
# x = x + mlp(norm_2(x))
# ```
#
# x is the *residual stream*: what is added to it stays. **Phi computes attention and MLP in parallel. How
# many norms does a layer need then, and what does the MLP no longer see?** Write the two lines down as you
# expect them, then look.

# %%
show(phi.PhiBlock, phi.PhiMLP)

# %% [markdown]
# One norm `n`, read by both; and three summands. The MLP of a layer does not see what the attention of the
# *same* layer found: that reaches the MLP of the next layer only. What is gained is time. The products of
# attention and MLP do not wait for each other, so that they can share one large matrix product (exercise
# 1).
#
# ## Shapes
#
# Letters: B sequences, T new tokens, S keys (cached and new), H heads, D size of a head, R rotated
# dimensions of it.
#
# **For the text below, what are the shapes of q, of the scores, and of what the MLP computes inside?**

# %%
text = "Instruct: Tell me a story about Nora and an owl.\nOutput: Once upon a time"
ids = torch.tensor([tokenizer.encode(text)])
print(len(ids[0]), "tokens:", " ".join(tools.words(tokenizer, ids[0])))

# %%
trace = look.trace(model, ids, tokenizer=tokenizer)  # every value of the pass, by its name
for name, value in trace.items():
    if name.startswith("layers.0.") or "." not in name:
        print(f"{name:20} {tuple(value.shape)}")

# %% [markdown]
# Scores are (B, H, T, S): each head asks each pair of tokens. With T = 1,000 they are a million numbers a
# head, which is why `F.scaled_dot_product_attention` never writes them down. `look.trace` computes them
# beside the pass.
#
# ## Attention

# %%
show(phi.PhiAttention, phi.grouped_query_attention)

# %% [markdown]
# Two paths, one result: PyTorch's fused kernel, and the formula spelled out for whoever asks for the
# weights. phi-2's scores grow beyond 65,504, where float16 ends; that is why `upcast` stands in front of
# the product.
#
# **How large do you think the largest number in this tiny model is, and where is it?**

# %%
print(trace.safe())

# %% [markdown]
# ## Positions: part of a head is rotated
#
# A sum of q · k knows no order: shuffle the keys, and the scores are shuffled along. Phi rotates q and k by
# an angle that grows with the position. A head here has D = 24 dimensions and `partial_rotary_factor` is
# 0.5. **How many dimensions are rotated, in how many pairs, and which dimension is paired with dimension
# 0?**

# %%
show(phi.rope_cos_sin, phi.rotate)

# %% [markdown]
# R = 12 dimensions, so six pairs: 0 with 6, 1 with 7, and so on (`rotate_half`, GPT-NeoX's style).
# Dimensions 12 to 23 pass as they are: by them a head reads *what* a token is, wherever it stands.
#
# **q at position 9 and k at position 4 give some score. What changes if both move 100 positions to the
# right?**

# %%
q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64)


def score_at(query_position: int, key_position: int) -> float:
    rotated = [
        phi.rotate(x, *phi.rope_cos_sin(torch.tensor([[position]]), model.config, x))
        for x, position in ((q, query_position), (k, key_position))
    ]
    return (rotated[0] * rotated[1]).sum().item()


for pair in ((9, 4), (109, 104), (4, 9), (9, 5)):
    print(pair, f"{score_at(*pair):.6f}")
assert math.isclose(score_at(9, 4), score_at(109, 104), abs_tol=1e-4)
assert not math.isclose(score_at(9, 4), score_at(9, 5), abs_tol=1e-2)

# %% [markdown]
# Nothing, but for the last digits (the angles are float32 at least). Only the distance counts. How fast
# each pair rotates: the first is round after six tokens and tells neighbours apart, the last one hardly
# moves in a whole text.

# %%
for pair in trace.rotary():
    print(f"dimensions {pair['first']:2} and {pair['second']:2}: round after {pair['period']:9,.1f} tokens")

# %% [markdown]
# ## One layer by hand
#
# Now you have read everything that layer 0 does. Here it is without the file's help: plain matrices, and
# the rotation as what it is, a product of complex numbers. **How many matrix products does a layer have?
# Count before you read.**

# %%
state = model.state_dict()
layer = {name.removeprefix("model.layers.0."): p for name, p in state.items() if ".layers.0." in name}
x = state["model.embed_tokens.weight"][ids]  # (B, T, C)
B, T, C = x.shape
H, D, R = 4, 24, 12


def linear(x, name):
    return x @ layer[f"{name}.weight"].T + layer[f"{name}.bias"]


# LayerNorm: mean 0, variance 1, then a weight and a bias for each dimension
n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
n = n * layer["input_layernorm.weight"] + layer["input_layernorm.bias"]

# q, k, v: (B, H, T, D)
q, k, v = (
    linear(n, f"self_attn.{name}").view(B, T, H, D).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
)

# rotation: pair (i, i + 6) is one complex number, and position t turns it by t * 10000 ** (-2 i / R)
angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, R, 2) / R)  # (T, R / 2)
turn = torch.polar(torch.ones_like(angles), angles)


def rotated(x):
    pairs = torch.complex(x[..., : R // 2], x[..., R // 2 : R]) * turn
    return torch.cat([pairs.real, pairs.imag, x[..., R:]], dim=-1)


q, k = rotated(q), rotated(k)

# %% [markdown]
# The rest is a softmax, a weighted mean, and the MLP. **Which tokens must get the weight 0?**

# %%
scores = q @ k.transpose(2, 3) / math.sqrt(D)  # (B, H, T, S)
later = torch.ones(T, T, dtype=torch.bool).triu(1)  # keys that come after the query
attention_weights = scores.masked_fill(later, -math.inf).softmax(-1)
y = (attention_weights @ v).transpose(1, 2).reshape(B, T, C)
attention_out = linear(y, "self_attn.dense")

inner = linear(n, "mlp.fc1")
inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))  # GELU by tanh
mlp_out = linear(inner, "mlp.fc2")

by_hand = x + attention_out + mlp_out

# %%
with torch.no_grad():
    output = model(ids, output_hidden_states=True, output_attentions=True)
torch.testing.assert_close(by_hand, output.hidden_states[1], atol=1e-5, rtol=1e-5)
torch.testing.assert_close(attention_weights, output.attentions[0], atol=1e-5, rtol=1e-5)
print("largest difference:", f"{(by_hand - output.hidden_states[1]).abs().max():.1e}")

# %% [markdown]
# Six products with weights (q, k, v, dense, fc1, fc2), and two without (scores, and weights times v). Your
# own version of Phi agrees with the file; a port to another language is checked in the same way, by
# [`compare`](../docs/porting.md).
#
# ## What heads read
#
# **What do you expect of the map of a head that reads the token before? And of one that does not know where
# to look?**

# %%
labels = tools.words(tokenizer, ids[0])
tools.maps(output.attentions[0][0], labels, [f"layer 0, head {h}" for h in range(4)])

# %% [markdown]
# A diagonal one below the main one; and a row of which all cells are equally pale. Heads of this tiny model
# are mixtures: head 0 comes nearest to reading the token before, most others look for certain words. The
# same as numbers: `trace.heads()` says how much weight goes to the token itself, the previous one, the
# first one.

# %%
heads = trace.heads()
print("weight on       itself  previous  first")
for i in range(4):
    for h in range(4):
        shares = "  ".join(f"{heads[name][i, h]:7.2f}" for name in ("itself", "previous", "first"))
        print(f"layer {i}, head {h} {shares}")
assert heads["previous"].argmax() == 0  # layer 0, head 0

# %% [markdown]
# ## Switch it off: the parallel block
#
# Phi was trained with the MLP beside the attention. **What happens to the loss if the same weights are run
# one after the other, as the five other models do it: nothing much, a bit worse, or much worse?** The loss
# of guessing blindly among 970 tokens is ln 970 = 6.9.


# %%
class OneAfterTheOther(phi.PhiBlock):
    def forward(self, x, *attention_inputs):
        y, weights = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + y
        return x + self.mlp(self.input_layernorm(x)), weights  # it reads the sum now


rows = tools.held_out("phi", tokenizer)  # 16 stories that it was not trained on
changed = copy.deepcopy(model)
for block in changed.model.layers:
    block.__class__ = OneAfterTheOther

as_it_is, one_after_the_other = tools.loss_of(model, rows), tools.loss_of(changed, rows)
print(f"as it is {as_it_is:.3f}, one after the other {one_after_the_other:.3f}")
assert as_it_is < 0.3 and one_after_the_other > 3

# %% [markdown]
# Much worse: an MLP that learnt to read norm(x) cannot read norm(x + y). Neither design is wrong, but a
# checkpoint belongs to one of them. Trained from the start, both reach about the same loss: exercise 2.
#
# ## Switch it off: the rotation
#
# **Rotate all of a head, none of it, or the other half. Which is the least harmful?** Remember that the
# unrotated half is where a head reads *what* a token is.

# %%
own = phi.rotate
variants = {
    "as it is": own,
    "none of it": lambda x, cos, sin: x,
    "the other half": lambda x, cos, sin: own(x.flip(-1), cos, sin).flip(-1),
}
found = {}
for name, rotate in variants.items():
    changed = copy.deepcopy(model)
    for block in changed.model.layers:
        block.self_attn.rotate = rotate
    found[name] = tools.loss_of(changed, rows)

changed = copy.deepcopy(model)
changed.config.partial_rotary_factor = 1.0
found["all of it"] = tools.loss_of(changed, rows)
for name, loss in found.items():
    print(f"{name:15} {loss:.3f}")
assert min(loss for name, loss in found.items() if name != "as it is") > 1.5

# %% [markdown]
# All of them run, give no error, and write fluent nonsense. `partial_rotary_factor` is one number in
# `config.json`; a port that forgets it looks right until its numbers are compared.
#
# ## Generation, step by step
#
# One pass gives logits for what follows *every* token; to write, only the last position counts.

# %%
with torch.no_grad():
    output = model(ids)  # use_cache is on by default: keys and values come back too
logits, cache = output.logits, output.past_key_values
print("logits", tuple(logits.shape))
chances, candidates = logits[0, -1].softmax(-1).topk(5)
for p, id in zip(chances.tolist(), candidates.tolist(), strict=True):
    print(f"{p:6.1%} {tools.words(tokenizer, [id])[0]}")

# %% [markdown]
# The keys and values of these tokens depend on nothing that comes later: they are kept. Darker means a
# longer key.

# %%
look.cache(cache, ids[0].tolist(), tokenizer)

# %% [markdown]
# **Give the model the next token alone, together with this cache. Which position does it get, and does it
# give the same logits as a pass over the whole text?**

# %%
new = logits[:, -1:].argmax(-1)  # (B, 1)
with torch.no_grad():
    step = model(new, past_key_values=cache)
    whole = model(torch.cat([ids, new], 1), use_cache=False)
torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)
print("one token read, the same logits; the cache holds", len(step.past_key_values))

# %% [markdown]
# Position `len(cache)`, and the same logits. Now the loop: read what is new, take the likeliest, go on.
# Watch the room of the cache: **when does it grow, and by how much?**

# %%
show(phi.KVCache.update, phi.KVCache.append)

# %%
sequence, cache = ids, phi.KVCache()
with torch.no_grad():
    for _ in range(8):
        unread = sequence[:, len(cache) :]
        logits = model(unread, past_key_values=cache).logits
        new = logits[:, -1:].argmax(-1)
        room = cache.buffers[0][0].shape[2]
        word = tools.words(tokenizer, new[0])[0]
        print(f"{unread.shape[1]:2} read, {len(cache):2} held, room for {room:2}: {word}")
        sequence = torch.cat([sequence, new], 1)
expected = model.generate(ids, max_new_tokens=8)
assert torch.equal(sequence, expected)

# %% [markdown]
# When it is full, to twice what it holds: so a token costs no copy of the past, on average. It ends one
# token before the text, since the last one was chosen and never read. The loop above is `generate` without
# stop ids and sampling.

# %%
cache

# %% [markdown]
# ## A small training run
#
# **At which loss does an untrained model begin? And which does it reach in 60 steps of 8 stories?** Labels
# are the ids themselves: the file shifts them.

# %%
show(phi.causal_lm_loss, tools.train)

# %%
torch.manual_seed(0)
small = phi.PhiForCausalLM(
    phi.PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
losses = tools.train(small, "phi", tokenizer, 60)
assert abs(losses[0] - math.log(len(tokenizer))) < 0.3 and losses[-1] < 3.5
tools.curves({"two layers, 64 wide": losses}, "step", "loss", (math.log(len(tokenizer)), "blind guess: ln V"))

# %% [markdown]
# It begins at ln V, a guess among all tokens alike: the weights are small, so the logits are nearly 0.
# First it learns how frequent each token is, then which pairs follow each other. What it says by then:

# %%
print(tokenizer.decode(small.generate(ids, max_new_tokens=30)[0]))

# %% [markdown]
# The checkpoint in `checkpoints/tiny-phi` is twice as deep and was trained for 1,000 steps;
# `examples/train.py` trains one on your own text.
#
# ## Exercises
#
# 1. **One product for two.** In a parallel block, q, k, v and the MLP's first matrix read the same n, and
#    the outputs of attention and MLP are added. Write a `forward` of a block with two matrix products with
#    weights instead of six, and hold it against `PhiBlock.forward`.
# 2. **A fair race.** Train the parallel block and `OneAfterTheOther` from nothing, with the same seed, for
#    60 steps. How far are their losses apart?
# 3. **What the bias says.** The output layer has a bias, one number a token. Which tokens does it favour,
#    which does it silence, and how much does the loss grow without it?
#
# Further: [docs/reading/phi.md](../docs/reading/phi.md), and the notebook of [Phi-3](phi3.ipynb), whose
# block has little in common with this one.

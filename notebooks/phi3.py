# %% [markdown]
# # Phi-3: SwiGLU, grouped-query attention, a sliding window, longrope
#
# Phi-3 (Abdin et al., 2024, up to Phi-4) has hardly anything of [Phi](phi.ipynb) but the name and the idea
# about data. Its block is the one that most models of these years have, Llama's, with matrices joined:
#
# - **RMSNorm** instead of LayerNorm, and **no biases** at all,
# - **SwiGLU**: an MLP with a gate; gate and up come out of one matrix, and so do q, k and v,
# - **grouped-query attention** (GQA): several heads of q share a head of k and v,
# - a **sliding window** in all layers (mini-4k), and **longrope**, which stretches the rotary embedding to
#   128k tokens.
#
# We read [`decoders/phi3.py`](../decoders/phi3.py) with a tiny checkpoint. Before most cells stands a
# question in bold: write your answer down before you run the cell. Solutions of the three exercises:
# [`solutions/phi3.ipynb`](solutions/phi3.ipynb).

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

from decoders import kernels, look, phi3, tokenize, weights
from notebooks import tools
from notebooks.tools import show

torch.manual_seed(0)
folder = ROOT / "checkpoints/tiny-phi3"
tokenizer = tokenize.load(folder)
model = weights.load(phi3.Phi3ForCausalLM, folder, dtype=torch.float32)
model = kernels.plain(model)  # the file as it stands, without the faster CPU kernels under a loaded model
for name in (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
):
    print(f"{name:20} {getattr(model.config, name)}")

# %% [markdown]
# ## The block

# %%
show(phi3.RMSNorm, phi3.Phi3MLP, phi3.Phi3Block)

# %% [markdown]
# **RMSNorm does not take the mean away. What does it do to a vector whose numbers are all 5?** LayerNorm
# makes zeros of it.

# %%
x = torch.full((1, 8), 5.0)
print("RMSNorm  ", phi3.RMSNorm(8, 1e-5)(x).tolist()[0][:4])
print("LayerNorm", F.layer_norm(x, (8,)).tolist()[0][:4])

# %% [markdown]
# ## Shapes
#
# Four heads of D = 24 read; `num_key_value_heads` is 2. **How many rows has the matrix that gives q, k and
# v? And the one that gives gate and up, if the inner width is 256?**

# %%
text = "<|user|>\nTell me a story about Tom and a fox.<|end|>\n<|assistant|>\nOnce upon a time"
ids = torch.tensor([tokenizer.encode(text)])
trace = look.trace(model, ids, tokenizer=tokenizer)
attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
print("qkv_proj    ", tuple(attention.qkv_proj.weight.shape), "= (4 + 2 + 2) * 24")
print("gate_up_proj", tuple(mlp.gate_up_proj.weight.shape), "= 2 * 256")
for name in ("q", "k", "v", "scores", "heads", "mlp_up", "mlp_act", "out"):
    print(f"layers.0.{name:8} {tuple(trace[f'layers.0.{name}'].shape)}")

# %% [markdown]
# ## One layer by hand
#
# **Head h of q reads head h // 2 of k and v: which heads share?** And which half of `gate_up_proj` goes
# through SiLU?

# %%
show(phi3.Phi3Attention)

# %%
layer = {
    name.removeprefix("model.layers.0."): p for name, p in model.state_dict().items() if ".layers.0." in name
}
x = model.model.embed_tokens.weight[ids]
B, T, C = x.shape
H, K, D = 4, 2, 24


def rms_norm(x, name):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer[f"{name}.weight"]


angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)  # all of a head is rotated
turn = torch.polar(torch.ones_like(angles), angles)


def rotated(x):
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1)


q, k, v = (rms_norm(x, "input_layernorm") @ layer["self_attn.qkv_proj.weight"].T).split(
    [H * D, K * D, K * D], -1
)
q, k, v = (part.view(B, T, -1, D).transpose(1, 2) for part in (q, k, v))
q, k = rotated(q), rotated(k)
later = torch.ones(T, T, dtype=torch.bool).triu(1)
heads = []
for h in range(H):
    scores = q[:, h] @ k[:, h // 2].transpose(1, 2) / math.sqrt(D)
    heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[:, h // 2])
x = x + torch.cat(heads, -1) @ layer["self_attn.o_proj.weight"].T
gate, up = (rms_norm(x, "post_attention_layernorm") @ layer["mlp.gate_up_proj.weight"].T).chunk(2, dim=-1)
by_hand = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T  # SiLU(gate) * up

with torch.no_grad():
    output = model(ids, output_hidden_states=True, output_attentions=True)
torch.testing.assert_close(by_hand, output.hidden_states[1], atol=1e-5, rtol=1e-5)
print(f"largest difference {(by_hand - output.hidden_states[1]).abs().max():.1e}")

# %% [markdown]
# ## What heads read
#
# **Heads 0 and 1 have the same keys. Must their maps be alike?**

# %%
labels = tools.words(tokenizer, ids[0])
tools.maps(output.attentions[0][0], labels, [f"layer 0, head {h}" for h in range(4)])

# %%
w = torch.stack(output.attentions)[:, 0].flatten(2)  # (L, H, T T)
alike = F.normalize(w, dim=-1) @ F.normalize(w, dim=-1).transpose(1, 2)  # (L, H, H)
shared = torch.stack([alike[:, 0, 1], alike[:, 2, 3]]).mean().item()
others = torch.stack([alike[:, i, j] for i, j in ((0, 2), (0, 3), (1, 2), (1, 3))]).mean().item()
print(f"how alike maps are (cosine): sharing keys {shared:.2f}, not sharing {others:.2f}")

# %% [markdown]
# No: their queries are their own, and the same keys can be asked for different things. What is shared is
# memory.
#
# **How much smaller does GQA make the cache of Phi-3-medium: 40 heads, of which k and v have 10?**

# %%
cache = model(ids).past_key_values
look.cache(cache, ids[0].tolist(), tokenizer)

# %% [markdown]
# A quarter. Here it is (B, K, S, D) with K = 2, half of what four heads would take.
#
# ## Switch it off: the groups
#
# **What if every second head shared, or all read the first one's keys?**

# %%
rows = tools.held_out("phi3", tokenizer)  # 16 conversations that it was not trained on
own = phi3.grouped_query_attention
repeats = {
    "as it is": lambda x: x,
    "every second": lambda x: x.repeat(1, 2, 1, 1),
    "all the first": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}
losses = {}
for name, repeat in repeats.items():
    changed = copy.deepcopy(model)
    for block in changed.model.layers:
        block.self_attn.attend = lambda q, k, v, *rest, repeat=repeat: own(q, repeat(k), repeat(v), *rest)
    losses[name] = tools.loss_of(changed, rows)
    print(f"{name:14} {losses[name]:.3f}")
assert losses["as it is"] < 0.3 and min(losses["every second"], losses["all the first"]) > 1

# %% [markdown]
# ## Switch it off: the gate
#
# SwiGLU multiplies: `SiLU(gate) * up`. **Take gate and up for each other: is that nearly the same? And
# without the gate, `up` alone?**


# %%
class Changed(phi3.Phi3MLP):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.formula(gate, up))


formulas = {
    "SiLU(gate) up": lambda gate, up: F.silu(gate) * up,
    "SiLU(up) gate": lambda gate, up: F.silu(up) * gate,
    "GELU(gate) up": lambda gate, up: F.gelu(gate) * up,
    "up": lambda gate, up: up,
    "SiLU(gate)": lambda gate, up: F.silu(gate),
}
losses = {}
for name, formula in formulas.items():
    changed = copy.deepcopy(model)
    for block in changed.model.layers:
        block.mlp.__class__, block.mlp.formula = Changed, formula
    losses[name] = tools.loss_of(changed, rows)
    print(f"{name:14} {losses[name]:.3f}")
assert losses["SiLU(gate) up"] < losses["GELU(gate) up"] < losses["SiLU(up) gate"]

# %% [markdown]
# Exchanged, the text is nearly right, and the loss several times as large: such a mistake is found by
# comparing numbers, not by reading what the model writes. Another activation of the same shape costs
# little.
#
# ## Switch it off: the sliding window
#
# **The window of this checkpoint is 2,047 tokens, longer than any of its texts. What does a window of 16
# cost a model that was trained without one?**

# %%
for window in (2047, 64, 32, 16, 8):
    changed = copy.deepcopy(model)
    changed.config.sliding_window = window
    print(f"window {window:4}: {tools.loss_of(changed, rows):.3f}")
mask = phi3.sliding_window_mask(6, 6, 3, None, torch.zeros(1), need_weights=True)[0, 0]
print("\n".join(" ".join("1" if value == 0 else "." for value in row) for row in mask.tolist()))

# %% [markdown]
# Much: an answer needs the question, which is further away. Below it the mask of six tokens with a window
# of three. (GPT-Neo has windows in every second layer; there the others carry what is far.)
#
# ## Longrope
#
# A model that was trained on 4,096 positions has never seen the angles of position 10,000. Longrope divides
# each frequency by a factor of its own, out of one list for texts up to the limit and another for longer
# ones. **Which frequencies need the large factors: the fast ones or the slow ones?** A fast pair has been
# round many times within 4,096 tokens; a slow one has never been half round.

# %%
show(phi3.longrope_cos_sin)

# %%
D = 24
scaling = {
    "type": "longrope",
    "short_factor": [1.0] * (D // 2),
    "long_factor": [float(f) for f in torch.logspace(0, math.log10(32), D // 2)],
}
sizes = {"max_position_embeddings": 131072, "original_max_position_embeddings": 64, "rope_scaling": scaling}
long_model = copy.deepcopy(model)
for name, value in sizes.items():
    setattr(long_model.config, name, value)
periods = 2 * math.pi * 10000.0 ** (torch.arange(0, D, 2) / D)
for i in (0, 4, 8, 11):
    factor = scaling["long_factor"][i]
    slower = periods[i] * factor
    print(
        f"pair {i:2}: round after {periods[i]:9,.0f} tokens, after {slower:10,.0f} with factor {factor:.1f}"
    )
print(f"attention_factor {long_model.config.attention_factor:.3f}: scores grow by its square")

# %% [markdown]
# The slow ones. (These factors are made up, and the limit is 64, so that we can cross it; those of the real
# checkpoints were searched for.)
#
# **The keys in the cache were rotated with the short list. What must happen when a text grows past the
# limit?**

# %%
show(phi3.Phi3ForCausalLM.prepare_inputs)

# %%
long_model.config.max_position_embeddings = 64  # attention_factor 1, so that only angles differ
prompt = rows.ids[:1, :60]
sequence, cache = prompt, phi3.LongropeCache()
with torch.no_grad():
    for _ in range(8):
        inputs = long_model.prepare_inputs(sequence, None, cache)
        logits = long_model(**inputs).logits
        read, is_long = inputs["input_ids"].shape[1], cache.rope.tolist()
        print(f"text of {sequence.shape[1]}: {read:2} read, long list: {is_long}")
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], 1)
assert torch.equal(sequence, long_model.generate(prompt, max_new_tokens=8, eos_token_id=None))

# %% [markdown]
# Once, at the crossing, everything is read anew: keys of both lists in one text would be compared at angles
# that mean nothing. [What a dozen engines do there](../docs/longrope.md) is another matter.
#
# ## Generation, step by step
#
# A conversation keeps its cache. **Of the second question, how many tokens are read?**

# %%
messages = [{"role": "user", "content": "Tell me a story about Tom and a fox."}]
cache = phi3.LongropeCache()
for question in ("What did Tom take everywhere?", None):
    ids = torch.tensor([tokenizer.chat(messages)])
    held = len(cache)
    answer = model.generate(ids, max_new_tokens=150, past_key_values=cache)[0, ids.shape[1] :].tolist()
    assert answer == model.generate(ids, max_new_tokens=150)[0, ids.shape[1] :].tolist()  # without the cache
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    print(f"{ids.shape[1]} tokens, {held} in the cache, {ids.shape[1] - held} read: {text}\n")
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]

# %%
cache

# %% [markdown]
# ## A small training run
#
# **Two models from nothing: SwiGLU with an inner width of 171, or a plain MLP with 256? Both have the same
# number of parameters.** Which learns faster?


# %%
class PlainMLP(torch.nn.Module):
    def __init__(self, C, inner):
        super().__init__()
        self.up, self.down = torch.nn.Linear(C, inner, bias=False), torch.nn.Linear(inner, C, bias=False)
        for matrix in (self.up, self.down):
            torch.nn.init.normal_(matrix.weight, 0.0, 0.02)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


show(tools.train)
curves = {}
for name in ("SwiGLU", "plain"):
    torch.manual_seed(0)
    config = phi3.Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=171,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
    )
    small = phi3.Phi3ForCausalLM(config)
    if name == "plain":
        for block in small.model.layers:
            block.mlp = PlainMLP(64, 256)
    count = sum(p.numel() for p in small.parameters())
    curves[name] = tools.train(small, "phi3", tokenizer, 50, batch_size=4)
    print(f"{name:8} {count:,} parameters, loss {sum(curves[name][-10:]) / 10:.2f}")
ends = [sum(line[-10:]) / 10 for line in curves.values()]
assert ends[0] < ends[1]
tools.curves(curves, "step", "loss", (math.log(len(tokenizer)), "blind guess: ln V"))

# %% [markdown]
# The gate pays: a product of two numbers can switch something on and off, which a sum cannot. Nearly all
# models since 2022 have it, with the inner width cut to two thirds so that three matrices cost what two
# did.
#
# ## Exercises
#
# 1. **One head less to remember.** Turn the checkpoint into multi-query attention (K = 1) by averaging its
#    two key/value heads. How large is the loss? And after 30 steps of training?
# 2. **The window by hand.** Generate with `sliding_window = 20`, and show that a step gives the same logits
#    if the cache holds the last 19 positions only. What must you take care of?
# 3. **A mistake with a number.** Somebody's port has rotary base 5,000 instead of 10,000. Find out at which
#    position of a text the first wrong greedy token appears.
#
# Further: [docs/reading/phi3.md](../docs/reading/phi3.md), and [all six together](all_six.ipynb).

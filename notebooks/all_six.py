# %% [markdown]
# # All six together
#
# [GPT-1](openai_gpt.ipynb) (2018), [GPT-Neo](gpt_neo.ipynb) (2021), [Phi](phi.ipynb),
# [Persimmon](persimmon.ipynb) and [Fuyu](fuyu.ipynb) (2023), [Phi-3](phi3.ipynb) (2024): six decoders, each
# in one file, which repeat each other on purpose. What has the same name in two files is the same code. So
# the differences are all that is left to learn, and this notebook puts them side by side.
#
# Before most cells stands a question in bold: write your answer down before you run the cell. Solutions of
# the three exercises: [`solutions/all_six.ipynb`](solutions/all_six.ipynb).

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
import ast
import difflib
import inspect
import math

import torch
import torch.nn.functional as F

from decoders import (
    compare,
    fuyu,
    gpt_neo,
    kernels,
    look,
    model_class,
    openai_gpt,
    persimmon,
    phi,
    phi3,
    read_config,
    tokenize,
    weights,
)
from notebooks import tools
from notebooks.tools import show

FILES = {
    "openai-gpt": openai_gpt,
    "gpt-neo": gpt_neo,
    "phi": phi,
    "persimmon": persimmon,
    "fuyu": fuyu,
    "phi3": phi3,
}
models, tokenizers = {}, {}
for name in FILES:
    folder = ROOT / f"checkpoints/tiny-{name}"
    cls = model_class(read_config(folder))
    models[name] = kernels.plain(weights.load(cls, folder, dtype=torch.float32))
    tokenizers[name] = tokenize.load(folder)
    print(f"{name:11} {cls.__name__:24} {sum(p.numel() for p in models[name].parameters()):9,} parameters")

# %% [markdown]
# ## What they share
#
# **Which parts of a decoder do you expect to be the same, line by line, in all six files?** Here is every
# function and class that at least two files have, and how many have it.

# %%
definitions = {}
for name, module in FILES.items():
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions.setdefault(node.name, {})[name] = ast.dump(node)
for each, codes in sorted(definitions.items(), key=lambda item: -len(item[1])):
    if len(codes) > 1:
        assert len(set(codes.values())) == 1  # the same code
        print(f"{len(codes)} {each}")

# %% [markdown]
# The cache, sampling, the loss, checks. Attention, masks and rotary embedding have variants, each with a
# name of its own. What occurs once is what makes a model:

# %%
print(*(f"{each} ({next(iter(codes))})" for each, codes in definitions.items() if len(codes) == 1), sep=", ")

# %% [markdown]
# ## Six blocks
#
# **Below are the blocks' `forward` methods. Which is post-norm, which is parallel, and which two are the
# same but for names?**

# %%
BLOCKS = {
    "openai-gpt": openai_gpt.OpenAIGPTBlock,
    "gpt-neo": gpt_neo.GPTNeoBlock,
    "phi": phi.PhiBlock,
    "persimmon": persimmon.PersimmonBlock,
    "fuyu": fuyu.PersimmonBlock,
    "phi3": phi3.Phi3Block,
}
show(*(block.forward for block in BLOCKS.values()))

# %% [markdown]
# The whole history from Phi to Phi-3, as a diff of their MLPs:

# %%
old, new = (inspect.getsource(cls).splitlines() for cls in (phi.PhiMLP, phi3.Phi3MLP))
print("\n".join(list(difflib.unified_diff(old, new, "phi.py", "phi3.py", lineterm="", n=1))))

# %% [markdown]
# ## One layer by hand, six times
#
# If you understand them, **one function of some thirty lines computes a layer of each. Which switches does
# it need?** Write them down: where the norms stand, which norm, how q, k and v come out of their matrices,
# what is rotated ...

# %%
NAMES = {  # the hub's names: before attention, q k v, output, before the MLP, up, down
    "openai-gpt": ("ln_1", ["attn.c_attn"], "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    "gpt-neo": (
        "ln_1",
        [f"attn.attention.{part}_proj" for part in "qkv"],
        "attn.attention.out_proj",
        "ln_2",
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    "phi": (
        "input_layernorm",
        [f"self_attn.{part}_proj" for part in "qkv"],
        "self_attn.dense",
        "input_layernorm",
        "mlp.fc1",
        "mlp.fc2",
    ),
    "persimmon": (
        "input_layernorm",
        ["self_attn.query_key_value"],
        "self_attn.dense",
        "post_attention_layernorm",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    "phi3": (
        "input_layernorm",
        ["self_attn.qkv_proj"],
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ),
}
NAMES["fuyu"] = NAMES["persimmon"]
LAYERS = {
    "openai-gpt": "transformer.h",
    "gpt-neo": "transformer.h",
    "phi": "model.layers",
    "persimmon": "model.layers",
    "fuyu": "language_model.model.layers",
    "phi3": "model.layers",
}
HEADS = {"openai-gpt": (6, 6), "gpt-neo": (6, 6), "phi3": (4, 2)}  # of q, of k and v; the others (4, 4)
BASES = {"phi": 10_000.0, "persimmon": 25_000.0, "fuyu": 25_000.0, "phi3": 10_000.0}


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotated(x, base, R):
    angles = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(0, R, 2) / R)
    turned = torch.complex(x[..., : R // 2], x[..., R // 2 : R]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([turned.real, turned.imag, x[..., R:]], dim=-1)


def layer_by_hand(family, x, p):
    """(B, T, C) after layer 0; p are its parameters."""
    norm_1, qkv, out, norm_2, up, down = NAMES[family]
    (B, T, C), (H, K) = x.shape, HEADS.get(family, (4, 4))
    D = C // H

    def linear(x, name):
        weight = p[f"{name}.weight"]
        y = x @ (weight if family == "openai-gpt" else weight.T)  # Conv1D
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def norm(x, name):
        if f"{name}.bias" not in p:  # RMSNorm
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attention(n):
        joined = torch.cat([linear(n, name) for name in qkv], -1)
        if family in ("persimmon", "fuyu"):  # head by head
            q, k, v = joined.view(B, T, H, 3, D).permute(3, 0, 2, 1, 4)
            q, k = norm(q, "self_attn.q_layernorm"), norm(k, "self_attn.k_layernorm")
        else:
            parts = joined.split([H * D, K * D, K * D], -1)
            q, k, v = (part.view(B, T, -1, D).transpose(1, 2) for part in parts)
        if family in BASES:
            R = D if family == "phi3" else D // 2
            q, k = rotated(q, BASES[family], R), rotated(k, BASES[family], R)
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)  # GQA
        scores = q @ k.transpose(2, 3) / (1 if family == "gpt-neo" else math.sqrt(D))
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        return linear(y.transpose(1, 2).reshape(B, T, C), out)

    def mlp(n):
        inner = linear(n, up)
        if family == "phi3":  # SwiGLU
            gate, inner = inner.chunk(2, -1)
            return linear(F.silu(gate) * inner, down)
        squared = family in ("persimmon", "fuyu")
        return linear(inner.clamp(min=0) ** 2 if squared else gelu(inner), down)

    if family == "openai-gpt":  # post-norm
        x = norm(x + attention(x), norm_1)
        return norm(x + mlp(x), norm_2)
    n = norm(x, norm_1)
    if family == "phi":  # parallel
        return x + attention(n) + mlp(n)
    x = x + attention(n)
    return x + mlp(norm(x, norm_2))


# %%
TEXT = "Once upon a time there was a fox. The fox"
traces = {}
for name, model in models.items():
    traces[name] = look.trace(model, tokenizers[name].encode(TEXT), tokenizer=tokenizers[name])
    start = f"{LAYERS[name]}.0."
    p = {key.removeprefix(start): value for key, value in model.state_dict().items() if key.startswith(start)}
    found = layer_by_hand(name, traces[name]["embeddings"], p)
    torch.testing.assert_close(found, traces[name]["layers.0.out"], atol=1e-4, rtol=1e-4)
    print(f"{name:11} largest difference {(found - traces[name]['layers.0.out']).abs().max():.1e}")

# %% [markdown]
# Eight conditions tell six models apart. (`decoders/compare/formula.py` is this function for all layers,
# with every step replaceable; a port is checked with it.)
#
# ## One text, six readers
#
# **Which vocabulary cuts the sentence into the fewest tokens? Each has about a thousand, all were trained
# on the same stories but Fuyu's.**

# %%
for name, tokenizer in tokenizers.items():
    ids = tokenizer.encode(TEXT)
    print(f"{name:11} {len(ids):2}: {' '.join(tools.words(tokenizer, ids))}")

# %% [markdown]
# **Where does head 0 of layer 0 look in each?**

# %%
figure = tools.Figure((11, 2.4), layout="constrained")
for axes, (name, trace) in zip(figure.subplots(1, 6), traces.items(), strict=True):
    axes.imshow(trace["layers.0.weights"][0, 0], cmap="Blues", vmin=0, vmax=1)
    axes.set_title(name, fontsize=9)
    axes.set(xticks=[], yticks=[])
figure

# %% [markdown]
# **After how many layers does each know what it will say?** The logit lens: the final norm and the output
# layer, put on the residual stream after each layer.

# %%
print("after        ", "  ".join(f"{name:>10}" for name in traces))
for i in range(5):
    row = []
    for name, trace in traces.items():
        p, id = trace.lens(i)[0, -1].softmax(-1).max(-1)
        row.append(f"{tools.words(tokenizers[name], [id])[0][:6]} {p:.0%}")
    print(f"{'embeddings' if i == 0 else f'layer {i - 1}':13}", "  ".join(f"{cell:>10}" for cell in row))

# %% [markdown]
# All values of one pass, to explore: choose a token with the mouse or the arrow keys. (The page is in a
# frame: GitHub does not show it, Jupyter does.)

# %%
look.trace(models["phi3"], tokenizers["phi3"].encode(TEXT), tokenizer=tokenizers["phi3"])

# %% [markdown]
# ## Switch it off: a mistake, and its name
#
# A port of Phi is written by somebody who took the rotary base from another model: 39,811 instead of
# 10,000. It runs, it writes stories. **From the logits alone, can one find out what is wrong, and even the
# number?**


# %%
def port(config, tensors):
    """What somebody has written: here our file, with the mistake."""
    wrong = phi.PhiForCausalLM(phi.PhiConfig.from_dict({**config, "rope_theta": 39811.0}))
    wrong.load_state_dict(tensors, strict=False)
    wrong.eval()
    return lambda input_ids, **inputs: wrong(input_ids, **inputs).logits  # nothing else is shown


report = compare.run(ROOT / "kits/phi", port, cases=["plain"])
assert not report.equal
print(report.findings[0])
report

# %% [markdown]
# Base 39,811, to a few parts in a million, out of 962 logits. A name is given only if our formula, with
# this mistake in it, gives all that the port gave, within the noise of rounding. A port that shows its
# inner values as well is told at which of them it parts. [How to check your own port](../docs/porting.md).
#
# ## Generation, step by step
#
# The loop is the same in all six. **How many bytes does a token cost in the cache of each real model, in 16
# bits?** 2 (k and v) x layers x key/value heads x head size x 2 bytes.

# %%
REAL = {  # layers, key/value heads, head size
    "openai-gpt": (12, 12, 64),
    "gpt-neo-1.3B": (24, 16, 128),
    "phi-2": (32, 32, 80),
    "persimmon-8b": (36, 64, 64),
    "Phi-3-mini": (32, 32, 96),
    "Phi-3-medium (GQA)": (40, 10, 128),
}
for name, (layers, K, D) in REAL.items():
    size = 2 * layers * K * D * 2
    print(f"{name:19} {size / 1e3:6.1f} kB a token, {size * 4096 / 1e9:.2f} GB for 4,096")

# %% [markdown]
# Persimmon pays nearly three times what Phi-3-medium pays, which is a larger model: that is what GQA is
# for.
#
# **The same beginning, greedy, 12 tokens: with the cache, how many tokens does each read?**

# %%
for name, model in models.items():
    tokenizer, cache = tokenizers[name], FILES[name].KVCache()
    sequence = torch.tensor([tokenizer.encode("Once upon a time")])
    prompt_length, read = sequence.shape[1], 0
    with torch.no_grad():
        for _ in range(12):
            unread = sequence[:, len(cache) :]
            read += unread.shape[1]
            logits = model(unread, past_key_values=cache, logits_to_keep=1).logits
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], 1)
    assert read == prompt_length + 11
    without = sum(range(prompt_length, prompt_length + 12))
    print(f"{name:11} read {read:2} instead of {without:3}: {tokenizer.decode(sequence[0].tolist())!r}")

# %%
cache  # Phi-3's: two key/value heads

# %% [markdown]
# ## A small training run: a race
#
# Five of them from nothing: the same width, layers, tokenizer, texts, seed. **Who is ahead after 40 steps?
# Does any of the choices that you have read about matter at this size?**

# %%
import argparse

from examples.train import new_model

tokenizer = tokenizers["gpt-neo"]
sizes = argparse.Namespace(width=64, layers=2, heads=4, context=256)
curves = {}
for family in ("openai-gpt", "gpt_neo", "phi", "persimmon", "phi3"):
    torch.manual_seed(0)
    small = new_model(family, tokenizer, sizes)
    curves[family] = tools.train(small, "gpt_neo", tokenizer, 40)
    count, end = sum(p.numel() for p in small.parameters()), sum(curves[family][-10:]) / 10
    print(f"{family:11} {count:7,} parameters, {end:.2f}")
assert all(line[-1] < line[0] - 2 for line in curves.values())
tools.curves(curves, "step", "loss", (math.log(len(tokenizer)), "blind guess: ln V"))

# %% [markdown]
# GPT-1 and GPT-Neo are behind. They are the two whose positions are learned, and the two whose output layer
# is tied to the embedding: which of the two it is, exercise 3 asks. Among the other three the choices that
# fill this notebook hardly show: at this size and in 40 steps a decoder is a decoder.
#
# ## Exercises
#
# 1. **A seventh model.** GPT-J (2021) has a parallel block like Phi's, but rotates neighbours: dimension 0
#    with 1, 2 with 3. Make tiny-phi compute like that without changing what it says: which rows of q and k
#    must be exchanged?
# 2. **Detective.** Write a function that gets the trace of one layer, but not the model, and says which of
#    the six it is. Use the names of stages as little as you can, and the numbers as much as you can.
# 3. **Which difference matters?** Untie the output layers of GPT-1 and GPT-Neo in the race; tie Phi's; take
#    Phi's rotation away. Which of these explains the gap?
#
# Further: [the reading guide](../docs/reading/README.md), and `diff decoders/phi.py decoders/phi3.py`.

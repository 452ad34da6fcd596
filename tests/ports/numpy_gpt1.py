"""GPT-1 in NumPy, in einsums. A dict of stages comes out: those that `compare` is to look at."""

import numpy as np


def build(config: dict, weights: dict):
    w = {name.removeprefix("transformer."): t.float().numpy() for name, t in weights.items()}
    heads, layers = config["n_head"], config["n_layer"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def dense(x, name):
        return np.einsum("bti,io->bto", x, w[name + ".weight"]) + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi, dtype=np.float32) * (x + 0.044715 * x**3)))

    def attention(x, look, name):
        b, t, c = x.shape
        q, k, v = (
            part.reshape(b, t, heads, c // heads) for part in np.split(dense(x, name + ".c_attn"), 3, axis=-1)
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(c // heads, dtype=np.float32)
        scores = np.where(look, scores, -1e9)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        weights = powers / powers.sum(-1, keepdims=True)
        return dense(np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, c), name + ".c_proj")

    def model(input_ids, attention_mask=None, position_ids=None, token_type_ids=None):
        ids = input_ids.numpy()
        t = ids.shape[1]
        positions = np.arange(t)[None] if position_ids is None else position_ids.numpy()
        x = w["tokens_embed.weight"][ids] + w["positions_embed.weight"][positions]
        if token_type_ids is not None:
            x = x + w["tokens_embed.weight"][token_type_ids.numpy()]
        look = np.tril(np.ones((t, t), bool))[None, None]
        if attention_mask is not None:
            look = look & (attention_mask.numpy() > 0)[:, None, None]
        stages = {"embeddings": x}
        for i in range(layers):
            name = f"h.{i}"
            n = norm(x + attention(x, look, name + ".attn"), name + ".ln_1")
            m = dense(gelu(dense(n, name + ".mlp.c_fc")), name + ".mlp.c_proj")
            x = stages[f"layers.{i}.out"] = norm(n + m, name + ".ln_2")
        return {**stages, "logits": np.einsum("btc,vc->btv", x, w["tokens_embed.weight"])}

    return model

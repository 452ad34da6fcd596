"""Phi as one flat function on a dict of tensors, with a cache: a list of (k, v), one for each layer."""

import torch


def build(config: dict, weights: dict):
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    D = config["hidden_size"] // H
    R = int(config["partial_rotary_factor"] * D)

    def model(input_ids, attention_mask=None, position_ids=None, past_key_values=None):
        B, T = input_ids.shape
        past = past_key_values[0][0].shape[1] if past_key_values else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + T)[None]
        inverse = 1 / 10000 ** (torch.arange(0, R, 2) / R)
        angle = position_ids[:, :, None, None] * inverse  # B, T, 1, R / 2
        dtype = weights["lm_head.weight"].dtype
        cos, sin = torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)
        hidden = torch.ones(T, past + T, dtype=torch.bool).triu(past + 1)[None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask[:, None, :] == 0)
        cache = []
        x = weights["model.embed_tokens.weight"][input_ids]
        for i in range(config["num_hidden_layers"]):

            def w(name, i=i):
                return weights[f"model.layers.{i}.{name}.weight"], weights[f"model.layers.{i}.{name}.bias"]

            n = torch.layer_norm(x, x.shape[-1:], *w("input_layernorm"), 1e-5)
            q = torch.nn.functional.linear(n, *w("self_attn.q_proj")).view(B, T, H, D)
            k = torch.nn.functional.linear(n, *w("self_attn.k_proj")).view(B, T, K, D)
            v = torch.nn.functional.linear(n, *w("self_attn.v_proj")).view(B, T, K, D)
            turned = []
            for t in (q, k):
                a, b = t[..., : R // 2], t[..., R // 2 : R]
                turned.append(torch.cat([a * cos - b * sin, a * sin + b * cos, t[..., R:]], dim=-1))
            q, k = turned
            if past_key_values:
                k, v = torch.cat([past_key_values[i][0], k], 1), torch.cat([past_key_values[i][1], v], 1)
            cache.append((k, v))
            q = q.view(B, T, K, H // K, D)
            s = torch.einsum("btkgd,bskd->bkgts", q, k) / D**0.5
            s = s.masked_fill(hidden[:, None, None], torch.finfo(dtype).min)
            y = torch.einsum("bkgts,bskd->btkgd", s.softmax(-1), v).reshape(B, T, H * D)
            y = torch.nn.functional.linear(y, *w("self_attn.dense"))
            m = torch.nn.functional.linear(n, *w("mlp.fc1"))
            m = torch.nn.functional.gelu(m, approximate="tanh")
            x = x + y + torch.nn.functional.linear(m, *w("mlp.fc2"))
        x = torch.layer_norm(
            x,
            x.shape[-1:],
            weights["model.final_layernorm.weight"],
            weights["model.final_layernorm.bias"],
            1e-5,
        )
        return x @ weights["lm_head.weight"].T + weights["lm_head.bias"], cache

    return model

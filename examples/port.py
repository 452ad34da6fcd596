"""A port with four mistakes in it, to be found with docs/porting.md: Phi as one flat function.

    python -m decoders compare --make kit phi
    python -m decoders compare kit examples/port.py:build            # it gives logits, and nothing else
    python -m decoders compare kit examples/port.py:with_stages      # and some inner values

Mend it where `compare` says, until it is equal. The cache is a list of (k, v), one for each layer, and each
(B, S, K, D).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def build(config: dict, weights: dict) -> Callable:
    """The port as a function that gives logits and cache."""
    model = with_stages(config, weights)

    def logits_only(
        input_ids: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None
    ) -> tuple:
        values = model(input_ids, attention_mask, position_ids, past_key_values)
        return values["logits"], values["past_key_values"]

    return logits_only


def with_stages(config: dict, weights: dict) -> Callable:
    """The same, with inner values under the names of KIT.md."""
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    D = config["hidden_size"] // H
    R = int(config["partial_rotary_factor"] * D)

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x[..., :R:2], x[..., 1:R:2]
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([rotated, x[..., R:]], dim=-1)

    def model(
        input_ids: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None
    ) -> dict:
        B, T = input_ids.shape
        past = past_key_values[0][0].shape[1] if past_key_values else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + T)[None]
        inv_freq = 1 / 10000 ** (torch.arange(0, R, 2) / R)
        angles = position_ids[:, :, None, None] * inv_freq  # (B, T, 1, R / 2)
        dtype = weights["lm_head.weight"].dtype
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        hidden = torch.ones(T, past + T, dtype=torch.bool).triu(1)[None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask[:, None, :] == 0)
        cache, stages = [], {}
        x = weights["model.embed_tokens.weight"][input_ids]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            n = norm(x, f"{layer}.input_layernorm")
            q = linear(n, f"{layer}.self_attn.q_proj").view(B, T, H, D)
            k = linear(n, f"{layer}.self_attn.k_proj").view(B, T, K, D)
            v = linear(n, f"{layer}.self_attn.v_proj").view(B, T, K, D)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if past_key_values:
                k, v = torch.cat([past_key_values[i][0], k], 1), torch.cat([past_key_values[i][1], v], 1)
            cache.append((k, v))
            stages[f"layers.{i}.q_rotated"] = q.transpose(1, 2)
            grouped = q.view(B, T, K, H // K, D)
            scores = torch.einsum("btkgd,bskd->bkgts", grouped, k) / D**0.5
            scores = scores.masked_fill(hidden[:, None, None], torch.finfo(dtype).min)
            y = torch.einsum("bkgts,bskd->btkgd", scores.softmax(-1), v).reshape(B, T, H * D)
            m = F.gelu(linear(n, f"{layer}.mlp.fc1"))
            stages[f"layers.{i}.mlp_act"] = m
            x = x + linear(y, f"{layer}.self_attn.dense") + linear(m, f"{layer}.mlp.fc2")
        logits = norm(x, "model.final_layernorm") @ weights["lm_head.weight"].T
        return {**stages, "logits": logits, "past_key_values": cache}

    return model

"""Phi-3 in the style of Meta's Llama: one matrix for q, k and v, rotation as a product of complex numbers. That
turns neighbours, so the rows of q and k are permuted once, when the weights are read."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


def apply_rotary(x, freqs_cis, R):
    """x (B, T, n, D): dimensions 2 i and 2 i + 1 are a complex number."""
    turned = torch.view_as_complex(x[..., :R].float().reshape(*x.shape[:-1], -1, 2)) * freqs_cis
    return torch.cat([torch.view_as_real(turned).flatten(3).type_as(x), x[..., R:]], dim=-1)


class Attention(nn.Module):
    def __init__(self, config, weights, name):
        super().__init__()
        self.n_heads, self.n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.D = config["hidden_size"] // self.n_heads
        self.R = int(config["partial_rotary_factor"] * self.D)
        pairs = torch.arange(self.R).view(2, -1).t().flatten()
        order = torch.cat([pairs, torch.arange(self.R, self.D)])
        wqkv = weights[f"{name}.qkv_proj.weight"].unflatten(0, (-1, self.D))
        turned = self.n_heads + self.n_kv_heads
        wqkv = torch.cat([wqkv[:turned][:, order], wqkv[turned:]])
        self.wqkv = nn.Parameter(wqkv.flatten(0, 1))
        self.wo = nn.Parameter(weights[f"{name}.o_proj.weight"])

    def forward(self, x, freqs_cis, bias):
        B, T, _ = x.shape
        qkv = F.linear(x, self.wqkv).view(B, T, -1, self.D)
        q, k, v = qkv.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        q, k = apply_rotary(q, freqs_cis, self.R), apply_rotary(k, freqs_cis, self.R)
        groups = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, bias)
        return F.linear(y.transpose(1, 2).flatten(2), self.wo)


class FeedForward(nn.Module):
    def __init__(self, weights, name):
        super().__init__()
        w1, w3 = weights[f"{name}.gate_up_proj.weight"].chunk(2)
        self.w1, self.w3 = nn.Parameter(w1), nn.Parameter(w3)
        self.w2 = nn.Parameter(weights[f"{name}.down_proj.weight"])

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.w1)) * F.linear(x, self.w3), self.w2)


class Layer(nn.Module):
    def __init__(self, config, weights, name):
        super().__init__()
        self.attention_norm = RMSNorm(weights[f"{name}.input_layernorm.weight"], 1e-5)
        self.attention = Attention(config, weights, f"{name}.self_attn")
        self.ffn_norm = RMSNorm(weights[f"{name}.post_attention_layernorm.weight"], 1e-5)
        self.feed_forward = FeedForward(weights, f"{name}.mlp")

    def forward(self, x, freqs_cis, bias):
        h = x + self.attention(self.attention_norm(x), freqs_cis, bias)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, config, weights):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding.from_pretrained(weights["model.embed_tokens.weight"], freeze=False)
        layers = range(config["num_hidden_layers"])
        self.layers = nn.ModuleList(Layer(config, weights, f"model.layers.{i}") for i in layers)
        self.norm = RMSNorm(weights["model.norm.weight"], 1e-5)
        self.output = nn.Linear(*weights["lm_head.weight"].shape[::-1], bias=False)
        self.output.weight = nn.Parameter(weights["lm_head.weight"])

    def freqs_cis(self, positions):
        config = self.config
        D = config["hidden_size"] // config["num_attention_heads"]
        R = int(config["partial_rotary_factor"] * D)
        original = config["original_max_position_embeddings"]
        kind = "long_factor" if positions.max() >= original else "short_factor"
        factors = torch.tensor(config["rope_scaling"][kind])
        freqs = 1 / (factors * 10000 ** (torch.arange(0, R, 2) / R))
        scale = math.sqrt(1 + math.log(config["max_position_embeddings"] / original) / math.log(original))
        angles = positions[:, :, None, None] * freqs
        return torch.polar(torch.full_like(angles, scale), angles)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        T = input_ids.shape[1]
        positions = torch.arange(T)[None] if position_ids is None else position_ids
        look = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - self.config["sliding_window"])[None, None]
        if attention_mask is not None:
            look = look & (attention_mask[:, None, None] > 0)
        h = self.tok_embeddings(input_ids)
        bias = torch.zeros(look.shape, dtype=h.dtype).masked_fill(~look, torch.finfo(h.dtype).min)
        freqs_cis = self.freqs_cis(positions)
        for layer in self.layers:
            h = layer(h, freqs_cis, bias)
        return self.output(self.norm(h))


def build(config: dict, weights: dict):
    return Transformer(config, weights)

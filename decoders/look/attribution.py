"""Direct logit attribution: what each part of a model added to one logit.

Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from decoders import kernels
from decoders.compare.formula import Formula


class Attribution(NamedTuple):
    """What each part of the model added to one logit at each position: `values[n]` is (B, T), of `names[n]`,
    and they sum to `logits` (B, T). "rounding" is what the pass's dtype left over."""

    names: list[str]
    values: Tensor
    logits: Tensor


class Direction:
    """A direction in the residual stream, (B, T, C), followed back from a logit through the norms; and the
    constant (B, T) that biases add on the way. In float64."""

    def __init__(self, model: nn.Module, f: Formula, tokens: Tensor):
        self.model, self.f = model, f
        head = model.get_submodule(f.module("head"))
        self.u = matrix_of(head).double()[tokens]  # how a vector of the residual stream becomes the logit
        bias = self.bias(f.module("head"))
        self.constant = torch.zeros_like(self.u[..., 0]) if bias is None else bias[tokens]

    def bias(self, module: str) -> Tensor | None:
        bias = getattr(self.model.get_submodule(module), "bias", None)
        return None if bias is None else bias.double()

    def add_bias(self, module: str) -> None:
        if (bias := self.bias(module)) is not None:
            self.constant = self.constant + self.u @ bias

    def through_norm(self, module: str, x: Tensor) -> None:
        """Back through a norm that read x (B, T, C), as if what it divides by were a constant."""
        norm = self.model.get_submodule(module)
        self.add_bias(module)
        self.u = self.u * norm.weight.double() * scale_of(norm, x.double(), self.f.eps)[..., None]
        if isinstance(norm, nn.LayerNorm):
            self.u = self.u - self.u.mean(-1, keepdim=True)

    def heads(self, layer: int, heads: Tensor) -> Tensor:
        """(B, T, H) share of each head of a layer, of the stage `heads` (B, T, H D)."""
        f = self.f
        module = f.module("o", layer)
        through = self.u @ matrix_of(self.model.get_submodule(module)).double()  # (B, T, H D)
        self.add_bias(module)
        return (through * heads).unflatten(-1, (f.H, f.D)).sum(-1)


@torch.no_grad()
def attribution(model: nn.Module, stages: Mapping[str, Tensor], tokens: Tensor) -> Attribution:
    """Who wrote the logit of `tokens` (B, T): embeddings, each head, each MLP, the biases.

    A norm divides by a number that depends on all of its input; here it is the one that this pass had, so
    that the rest is linear, and a direction can be followed back from the logit to every part of the
    residual stream.
    """
    f = Formula(model.config, {})
    back = Direction(model, f, tokens)
    if "norm" in f.parts:
        back.through_norm(f.module("norm"), stages[f"layers.{len(f.layers) - 1}.out"])
    shares: dict[str, Tensor] = {}
    for i in reversed(f.layers):
        value = {stage: stages[f"layers.{i}.{stage}"].double() for stage in ("heads", "mlp_out", "mlp_in")}
        if f.family == "openai-gpt":  # post-norm: both norms stand on the residual stream itself
            back.through_norm(f.module("norm_2", i), value["mlp_in"] + value["mlp_out"])
        shares[f"layers.{i}.mlp_out"] = (back.u * value["mlp_out"]).sum(-1)
        if f.family == "openai-gpt":
            back.through_norm(f.module("norm_1", i), stages[f"layers.{i}.attn_sum"])
        for h, share in enumerate(back.heads(i, value["heads"]).unbind(-1)):
            shares[f"layers.{i}.head {h}"] = share
    shares["embeddings"] = (back.u * stages["embeddings"].double()).sum(-1)
    shares["biases"] = back.constant
    return summed_up(f, shares, stages["logits"].gather(-1, tokens[..., None])[..., 0].double())


def summed_up(f: Formula, shares: Mapping[str, Tensor], logits: Tensor) -> Attribution:
    """In the order of computation, with what is missing to the logits."""
    names = ["embeddings"]
    for i in f.layers:
        names += [*(f"layers.{i}.head {h}" for h in range(f.H)), f"layers.{i}.mlp_out"]
    names.append("biases")
    values = torch.stack([shares[name] for name in names])
    rounding = logits - values.sum(0)
    return Attribution([*names, "rounding"], torch.cat([values, rounding[None]]), logits)


def matrix_of(layer: nn.Module) -> Tensor:
    """(out, in), also of Conv1D and of 8 or 4 bits."""
    if isinstance(layer, kernels.Quantized):
        return layer.dequantize()
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


def scale_of(norm: nn.Module, x: Tensor, eps: float) -> Tensor:
    """(B, T) what the norm of x (B, T, C) multiplies with, before its weight."""
    square = x.var(-1, unbiased=False) if isinstance(norm, nn.LayerNorm) else x.square().mean(-1)
    return (square + eps).rsqrt()

"""h · rsqrt(mean(h²) + eps), the heart of RMSNorm, with one backward formula for its five ops.

Before: `mul(h, rsqrt(add(mean(pow(h, 2), -1), eps)))`, with nothing else reading what lies between.
After: `inverse_rms(h)`, which no gradient goes through, and `normalize(h, r)`, whose gradient is the whole one:

    n = h r,   dh = r (g − n mean(g n))        (Zhang and Sennrich, arXiv 1910.07467, differentiated)

A chain that is made again in the backward pass starts behind `inverse_rms`, whose one number per row is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.autograd.function import _SingleLevelFunction

from .groups import readers

_aten = torch.ops.aten


@dataclass(frozen=True)
class NormalizationNodes:
    """One normalization: what it reads, the node with the result, those in between; eps is added to mean(h²)."""

    h: fx.Node
    result: fx.Node
    inside: tuple[fx.Node, ...]
    eps: float


def find(graph: fx.Graph, written: set[fx.Node]) -> list[NormalizationNodes]:
    """Every place of the before-condition."""
    found = [each for node in graph.nodes if (each := _normalization(node)) is not None]
    return [each for each in found if not written.intersection((each.h, each.result, *each.inside))]


def _normalization(node: fx.Node) -> NormalizationNodes | None:
    if node.op != "call_function" or node.target is not _aten.mul.Tensor or node.kwargs or len(node.args) != 2:
        return None
    for h, inverse in (node.args, node.args[::-1]):
        inside = []
        step: Any = inverse
        for target in (_aten.rsqrt.default, _aten.add.Tensor, _aten.mean.dim, _aten.pow.Tensor_Scalar):
            if not isinstance(step, fx.Node) or step.target is not target or step.kwargs or len(readers(step)) != 1:
                break
            inside.append(step)
            step = step.args[0]
        else:
            eps, dims, power = inside[1].args[1], list(inside[2].args[1:]), inside[3].args[1]
            if step is h and isinstance(eps, float) and power == 2 and dims == [[-1], True] and isinstance(h, fx.Node):
                return NormalizationNodes(h, node, tuple(inside), eps)
    return None


def inverse_rms(h: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / √(mean(h²) + eps), (…, 1)."""
    return _inverse(h.detach(), eps)


def _inverse(h: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def normalize(h: torch.Tensor, inverse: torch.Tensor, eps: float, is_plain: bool = False) -> torch.Tensor:
    """h · inverse, with the gradient of h · rsqrt(mean(h²) + eps)."""
    if is_plain:
        return h * _inverse(h, eps)
    if torch.is_grad_enabled() and h.requires_grad:
        result: torch.Tensor = _Normalize.apply(h, inverse, eps)  # type: ignore[attr-defined]
        return result
    return h * inverse


class _Normalize(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, inverse: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(h, inverse)
        ctx.eps = eps
        return h * inverse

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        h, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated itself
            return *torch.autograd.grad(h * _inverse(h, ctx.eps), h, gradient, create_graph=True), None, None
        return gradient_of_normalized(gradient, h * inverse, inverse), None, None


def gradient_of_normalized(gradient: torch.Tensor, n: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """dh, by the formula above."""
    share = (gradient * n).mean(-1, keepdim=True)
    return torch.addcmul(gradient, n, share, value=-1).mul_(inverse)

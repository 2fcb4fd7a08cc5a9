"""x · cos + rotate_half(x) · sin, the rotary position embedding, with one backward formula for its seven ops.

Before: `add(mul(x, cos), mul(cat([neg(x₂), x₁], −1), sin))` with x₁ and x₂ the halves of x, taken by slices, and
nothing else reading what lies between.
After: `rotate(x, cos, sin)`. On halves (Su et al., arXiv 2104.09864, eq. 34, as Llama pairs its channels):

    y₁ = x₁ cos₁ − x₂ sin₁,   y₂ = x₂ cos₂ + x₁ sin₂
    dx₁ = g₁ cos₁ + g₂ sin₂,   dx₂ = g₂ cos₂ − g₁ sin₁

Three kernels either way; autograd's own backward of the slices pads each half with zeros, and adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.autograd.function import _SingleLevelFunction

from .groups import readers

_aten = torch.ops.aten


@dataclass(frozen=True)
class RotationNodes:
    """One rotation: what it reads, the node with the result, and those in between, last ones first."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    result: fx.Node
    inside: tuple[fx.Node, ...]


def find(graph: fx.Graph, written: set[fx.Node]) -> list[RotationNodes]:
    """Every place of the before-condition."""
    found = [each for node in graph.nodes if (each := _rotation(node)) is not None]
    return [each for each in found if not written.intersection((each.x, each.cos, each.sin, each.result, *each.inside))]


def _rotation(node: fx.Node) -> RotationNodes | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    for straight, turned in _operands(node, _aten.add.Tensor):
        for half_turn, sin in _operands(turned, _aten.mul.Tensor):
            parts = _turned_by_half(half_turn, value.shape[-1] if value.dim() else 0)
            if parts is None or len(readers(turned)) != 1 or len(readers(straight)) != 1:
                continue
            x, *inside = parts
            for own, cos in _operands(straight, _aten.mul.Tensor):
                if own is x:
                    return RotationNodes(x, cos, sin, node, (straight, turned, half_turn, *inside))
    return None


def _operands(node: fx.Node, target: Any) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the two operands of a sum or product; none if it is another op."""
    operands: Any = node.args
    if node.target is not target or node.kwargs or not all(isinstance(operand, fx.Node) for operand in operands):
        return []
    return [operands, operands[::-1]]


def _turned_by_half(node: fx.Node, size: Any) -> tuple[fx.Node, ...] | None:
    """(x, neg, the slices) of cat([−x₂, x₁], −1), whose last dimension is `size`."""
    arguments: Any = node.args
    if node.target is not _aten.cat.default or len(arguments) != 2 or len(arguments[0]) != 2 or len(readers(node)) != 1:
        return None
    (negated, first), dim = arguments
    if negated.target is not _aten.neg.default or len(readers(negated)) != 1 or not isinstance(size, int) or size % 2:
        return None
    second: Any = negated.args[0]
    dims = [_span(half, size) for half in (first, second)]
    if first.args[:1] != second.args[:1] or None in dims or dim not in (-1, first.meta["val"].dim() - 1):
        return None
    return (first.args[0], negated, first, second) if dims == [(0, size // 2), (size // 2, size)] else None


def _span(half: fx.Node, size: int) -> tuple[int, int] | None:
    """(from, to) of a slice of the last dimension, which nothing else reads."""
    value = half.meta.get("val")
    if half.target is not _aten.slice.Tensor or half.kwargs or len(readers(half)) != 1 or value is None:
        return None
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    _, dim, start, stop, step = tuple(half.args) + defaults[len(half.args) :]
    if (
        dim not in (-1, value.dim() - 1)
        or step != 1
        or not all(type(each) in (int, type(None)) for each in (start, stop))
    ):
        return None
    return start or 0, size if stop is None else min(stop, size)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_plain: bool = False) -> torch.Tensor:
    """x · cos + rotate_half(x) · sin."""
    is_mixed = x.dtype != cos.dtype or x.dtype != sin.dtype or cos.requires_grad or sin.requires_grad
    if is_plain or is_mixed or not _fits(x.shape, cos.shape, sin.shape):
        return x * cos + _half_turn(x) * sin
    if x.requires_grad and torch.is_grad_enabled():
        result: torch.Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[attr-defined]
        return result
    return _turned(x, cos, sin)


@lru_cache(maxsize=64)
def _fits(x: torch.Size, *tables: torch.Size) -> bool:
    """Whether each channel of x has its cos and sin, and the result is of the shape of x."""
    return all(
        0 < len(table) <= len(x)
        and table[-1] == x[-1]
        and all(a in (1, b) for a, b in zip(table[::-1], x[::-1], strict=False))
        for table in tables
    )


def _half_turn(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    result = x * cos
    result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return result


class _Rotate(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated itself
            return gradient * cos - _half_turn(gradient * sin), None, None
        half = gradient.shape[-1] // 2
        result = gradient * cos
        result[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        result[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return result, None, None

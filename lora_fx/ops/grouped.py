"""Stacks of matrices, one for each expert: grouped_mm (tokens sorted by expert), bmm and matmul with a 3-D parameter.

The low-rank path is two products of the same op with A and B of each expert, so no expert's delta is ever built.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from ..layouts import Experts, Layout, Shape
from .use import Between, Family, Use, argument

_aten = torch.ops.aten
_BATCHED = {torch.bmm, _aten.bmm.default, "bmm", torch.matmul, _aten.matmul.default, operator.matmul, "matmul"}


class Grouped(Family):
    """See `Family`."""

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        if node.op == "call_function" and _is_grouped_mm(node.target):
            yield Use(self, "grouped_mm", node, argument(node, 1, "mat2"), argument(node, 0, "input"), True)
        elif node.op in ("call_function", "call_method") and node.target in _BATCHED and len(node.args) == 2:
            x, weight = node.args
            if isinstance(x, fx.Node) and isinstance(weight, fx.Node):
                yield Use(self, "bmm", node, weight, x, True)

    def layout(self, use: Use, shape: Shape, stored_in_out: bool) -> Layout | str:
        if len(shape) != 3:
            return f"its weight has {len(shape)} dimensions, where {use.kind} has three"
        return Experts(tuple(shape), stored_in_out)

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        graph, node = use.node.graph, use.node
        count = layout.count
        stacked = graph.call_function(_aten.unflatten.int, (a, 0, [count, -1]))  # (E, r, in)
        down = graph.call_function(_aten.transpose.int, (stacked, 1, 2))  # (E, in, r)
        spread = graph.call_function(_aten.unflatten.int, (b, 1, [-1, count]))  # (out, r, E)
        up = graph.call_function(_aten.permute.default, (spread, [2, 1, 0]))  # (E, r, out)
        create = graph.call_function if node.op == "call_function" else graph.call_method
        ranks = create(node.target, (x, down, *node.args[2:]), dict(node.kwargs))  # type: ignore[arg-type]
        return create(node.target, (ranks, up, *node.args[2:]), dict(node.kwargs))  # type: ignore[arg-type]


def _is_grouped_mm(target: object) -> bool:
    """torch's own op, and transformers' for devices that lack it; the scaled one has weights that scales belong to."""
    names = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in names


FAMILY = Grouped()

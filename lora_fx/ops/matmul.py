"""Products with a parameter: addmm, mm, matmul, mv and `@`, with the weight on either side.

On the right the weight is (in, out): GPT-2's Conv1D is addmm(bias, x, W). On the left it is (out, in).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from ..layouts import Layout
from .use import Between, Family, Use, argument, dialect_of

_aten = torch.ops.aten
_PRODUCTS = {
    torch.matmul: "matmul",
    operator.matmul: "matmul",
    _aten.matmul.default: "matmul",
    "matmul": "matmul",
    "__matmul__": "matmul",
    torch.mm: "mm",
    _aten.mm.default: "mm",
    "mm": "mm",
    torch.mv: "mv",
    _aten.mv.default: "mv",
    "mv": "mv",
}
_SUMS = {torch.addmm, _aten.addmm.default, "addmm"}


class Matmul(Family):
    """See `Family`."""

    is_linear = True
    bias_is_per_output = False

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        if node.op not in ("call_function", "call_method"):
            return
        if node.target in _SUMS:
            left, right = argument(node, 1, "mat1"), argument(node, 2, "mat2")
            kind, factor = "addmm", node.kwargs.get("alpha", 1)
        elif node.target in _PRODUCTS:
            left = argument(node, 0, "input")
            right = next((node.kwargs[k] for k in ("other", "mat2", "vec") if k in node.kwargs), None) or node.args[1]
            kind, factor = _PRODUCTS[node.target], 1
        else:
            return
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and isinstance(factor, (int, float)):
            yield Use(self, kind, node, right, left, takes_in_out=True, factor=factor)
            yield Use(self, kind, node, left, right, takes_in_out=False, factor=factor)

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        graph, dialect = use.node.graph, dialect_of(use.node)
        if use.takes_in_out:
            down = graph.call_function(dialect.linear, (x, a))  # (..., in) @ (r, in)ᵀ -> (..., r)
            down = down if between is None else between(down, -1)
            return graph.call_function(dialect.linear, (down, b))  # (..., r) @ (out, r)ᵀ -> (..., out)
        down = graph.call_function(dialect.matmul, (a, x))  # (r, in) @ (..., in, n) -> (..., r, n)
        down = down if between is None else between(down, self.out_axis(use) or -2)
        return graph.call_function(dialect.matmul, (b, down))  # (out, r) @ (..., r, n) -> (..., out, n)

    def out_axis(self, use: Use) -> int | None:
        if use.takes_in_out or use.kind == "mv":
            return -1
        value = use.x.meta.get("val")
        if use.kind != "matmul":
            return -2
        return None if value is None else -2 if value.ndim > 1 else -1

    def bias(self, use: Use) -> fx.Node | str | None:
        return argument(use.node, 0, "input") if use.kind == "addmm" else None

    def bias_factor(self, use: Use) -> float:
        return use.node.kwargs.get("beta", 1) if use.kind == "addmm" else 1  # type: ignore[return-value]


FAMILY = Matmul()

"""y = x @ Wᵀ + b: nn.Linear as a module, F.linear, aten.linear. W is (out, in)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..layouts import Layout
from .use import Between, Family, Use, argument, dialect_of

_FUNCTIONS = {F.linear, torch.ops.aten.linear.default, torch.ops.aten.linear}


class Linear(Family):
    """See `Family`."""

    is_linear = True

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        if node.op == "call_module" and isinstance(module := gm.get_submodule(str(node.target)), nn.Linear):
            if type(module).forward is nn.Linear.forward:
                x = argument(node, 0, "input")
                yield Use(self, "linear", node, f"{node.target}.weight".lstrip("."), x, False, is_certain=True)
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
            yield Use(self, "linear", node, weight, x, False, is_certain=True)

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        graph, linear = use.node.graph, dialect_of(use.node).linear
        down = graph.call_function(linear, (x, a))  # (..., in) @ (r, in)ᵀ -> (..., r)
        down = down if between is None else between(down, -1)
        return graph.call_function(linear, (down, b))  # (..., r) @ (out, r)ᵀ -> (..., out)

    def bias(self, use: Use) -> fx.Node | str | None:
        return super().bias(use) if use.node.op == "call_module" else argument(use.node, 2, "bias")


FAMILY = Linear()

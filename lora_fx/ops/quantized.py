"""y = x @ Wᵀ + b, by a module that has W in a few bits: see `lora_fx.quantized`. A and B are floats beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ..layouts import Layout, Matrix, Shape
from ..quantized import is_quantized
from .use import Between, Family, Use, argument

_linear = torch.ops.aten.linear.default


class Quantized(Family):
    """See `Family`."""

    is_linear = True
    is_quantized = True

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        if node.op == "call_module" and is_quantized(module := gm.get_submodule(str(node.target))):
            name = "linear" if type(module) is torch.nn.Linear else type(module).__name__
            yield Use(self, name, node, f"{node.target}.weight", argument(node, 0, "input"), False, is_certain=True)

    def layout(self, use: Use, shape: Shape, stored_in_out: bool) -> Layout | str:
        owner = use.node.graph.owning_module
        assert owner is not None
        module = owner.get_submodule(str(use.node.target))
        return Matrix(module.out_features, module.in_features, False)  # type: ignore[arg-type]

    def dtype(self, use: Use, weight: torch.Tensor) -> torch.dtype:
        value = use.x.meta.get("val")
        return value.dtype if isinstance(value, torch.Tensor) else torch.float32

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        graph = use.node.graph
        down = graph.call_function(_linear, (x, a))  # (..., in) @ (r, in)ᵀ -> (..., r)
        down = down if between is None else between(down, -1)
        return graph.call_function(_linear, (down, b))  # (..., r) @ (out, r)ᵀ -> (..., out)


FAMILY = Quantized()

"""Convolutions of one to three dimensions, and transposed ones, as modules, functions and aten ops.

A is a convolution with the base's own stride, padding, dilation and groups; B is pointwise. Padding modes other
than zeros are an op of their own in exported graphs; a module is asked for its.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..layouts import Kernel, Layout, Shape
from .use import Between, Family, Use, argument

_aten = torch.ops.aten
_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: dict[Any, str] = {
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    _aten.conv1d.default: "conv1d",
    _aten.conv1d.padding: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv2d.padding: "conv2d",
    _aten.conv3d.default: "conv3d",
    _aten.conv3d.padding: "conv3d",
    _aten.conv_transpose1d.default: "conv_transpose1d",
    _aten.conv_transpose2d.input: "conv_transpose2d",
    _aten.conv_transpose3d.input: "conv_transpose3d",
}
_POINTWISE = {
    1: (F.conv1d, _aten.conv1d.default),
    2: (F.conv2d, _aten.conv2d.default),
    3: (F.conv3d, _aten.conv3d.default),
}
# Stride, padding and dilation of a pointwise convolution.
_STILL: dict[int, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    dims: ((1, 0, 1), ([1] * dims, [0] * dims, [1] * dims)) for dims in (1, 2, 3)
}
# The arguments behind the bias, in the order of the op's signature.
_PLAIN = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
_TRANSPOSED = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))


class Convolution(Family):
    """See `Family`."""

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        if node.op == "call_module" and isinstance(module := gm.get_submodule(str(node.target)), _MODULES):
            kind = type(module).__name__.lower().replace("convtranspose", "conv_transpose")
            is_own = any(type(module).forward is each.forward for each in _MODULES)
            if is_own and len(node.args) + len(node.kwargs) == 1:  # output_size decides the padding per call
                yield Use(
                    self,
                    kind,
                    node,
                    f"{node.target}.weight".lstrip("."),
                    argument(node, 0, "input"),
                    False,
                    is_certain=True,
                )
        elif node.op == "call_function" and node.target in _KINDS:
            yield Use(
                self,
                _KINDS[node.target],
                node,
                argument(node, 1, "weight"),
                argument(node, 0, "input"),
                False,
                is_certain=True,
            )

    def layout(self, use: Use, shape: Shape, stored_in_out: bool) -> Layout | str:
        if stored_in_out or len(shape) < 3:
            return "its kernel is transposed or reshaped on the way"
        options = _options(use.node)
        return Kernel(tuple(shape), options["groups"], _is_transposed(use))

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        graph, options = use.node.graph, _options(use.node)
        dims = int(use.kind[-2])
        is_aten = isinstance(use.node.target, torch._ops.OpOverload)
        names = _TRANSPOSED if _is_transposed(use) else _PLAIN
        if mode := options.get("padding_mode"):
            x = graph.call_function(F.pad, (x, options["padding"], mode))
            options |= {"padding": 0}
        mixes = isinstance(layout, Kernel) and layout.mixes_groups
        own = options | {"groups": 1} if mixes else options
        values = tuple([v] * dims if is_aten and v is d and n != "groups" else v for n, d in names for v in (own[n],))
        if _is_transposed(use):  # the op wants (in, r / groups, *k)
            a = _grouped_transpose(graph, a, options["groups"])
        op: Any = use.node.target if use.node.op == "call_function" else getattr(F, use.kind)
        down = graph.call_function(op, (x, a, None, *values))
        down = down if between is None else between(down, -1 - dims)
        # (batch, r, ...) -> (batch, out, ...)
        return graph.call_function(
            _POINTWISE[dims][is_aten], (down, b, None, *_STILL[dims][is_aten], options["groups"])
        )

    def out_axis(self, use: Use) -> int:
        return -1 - int(use.kind[-2])

    def bias(self, use: Use) -> fx.Node | str | None:
        return super().bias(use) if use.node.op == "call_module" else argument(use.node, 2, "bias")


def _is_transposed(use: Use) -> bool:
    return use.kind.startswith("conv_transpose")


def _grouped_transpose(graph: fx.Graph, a: fx.Node, groups: int) -> fx.Node:
    """(r, in / groups, *k) to (in, r / groups, *k)."""
    if groups == 1:
        return graph.call_function(_aten.transpose.int, (a, 0, 1))
    split = graph.call_function(_aten.unflatten.int, (a, 0, [groups, -1]))
    swapped = graph.call_function(_aten.transpose.int, (split, 1, 2))
    return graph.call_function(_aten.flatten.using_ints, (swapped, 0, 1))


def _options(node: fx.Node) -> dict[str, Any]:
    """Stride, padding, dilation, groups and the like of one call."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        module: Any = owner.get_submodule(str(node.target))
        found = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups", "output_padding")}
        if module.padding_mode != "zeros":
            found |= {"padding_mode": module.padding_mode, "padding": list(module._reversed_padding_repeated_twice)}
        return found
    names = _TRANSPOSED if "transpose" in _KINDS[node.target] else _PLAIN
    return {name: argument(node, 3 + i, name, default) for i, (name, default) in enumerate(names)}


FAMILY = Convolution()

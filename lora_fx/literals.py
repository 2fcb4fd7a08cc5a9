"""Devices and dtypes that tracing wrote into nodes as literals, and what moving a module means for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


def move_literals(graphs: Iterable[fx.Graph], old: torch.device, new: torch.device) -> None:
    """Let every node that was traced with `old` as a device argument use `new`."""

    def moved(value: Any) -> Any:
        is_old = isinstance(value, torch.device) and value.type == old.type and value.index in (None, old.index)
        return new if is_old else value

    for graph in graphs:
        for node in graph.nodes:
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)


def find_dtype_literal(graphs: Iterable[fx.Graph]) -> fx.Node | None:
    """The first node whose code says a floating point dtype, or None.

    A traced `x.to(y.dtype)` and a traced `x.to(torch.float32)` look alike, so the graph alone does not tell
    which of them should follow the parameters into another dtype.
    """
    for graph in graphs:
        for node in graph.nodes:
            values: tuple[Any, ...] = (*node.args, *node.kwargs.values())
            says_dtype = any(isinstance(value, torch.dtype) and value.is_floating_point for value in values)
            if says_dtype and not isinstance(node.target, torch._ops.HigherOrderOperator):
                found: fx.Node = node
                return found
    return None

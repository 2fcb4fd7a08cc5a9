"""Devices and dtypes that tracing wrote into nodes as literals, and what moving a module means for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .errors import GraphError


def move_literals(graphs: Iterator[fx.Graph], old: torch.device, new: torch.device) -> None:
    """Let every node that was traced with `old` as a device argument use `new`."""

    def moved(value: Any) -> Any:
        is_old = isinstance(value, torch.device) and value.type == old.type and value.index in (None, old.index)
        return new if is_old else value

    for graph in graphs:
        for node in graph.nodes:
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)


def check_dtype_literals(graphs: Iterator[fx.Graph], old: torch.dtype, new: torch.dtype) -> None:
    """Refuse a change of dtype that the graph's code would not follow.

    A traced `x.to(y.dtype)` and a traced `x.to(torch.float32)` look alike, so nobody can tell which casts
    should follow the parameters.

    Raises:
        GraphError: naming the first such node.
    """
    for graph in graphs:
        for node in graph.nodes:
            if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
                continue
            if any(isinstance(v, torch.dtype) and v.is_floating_point for v in (*node.args, *node.kwargs.values())):
                raise GraphError(
                    f"the graph holds dtypes as literals ({node.format_node()}), so its parameters cannot go from "
                    f"{old} to {new}. Convert the model and trace it again: lora_fx.trace(model.to({new}), args); "
                    "adapters take their own dtype with inject(..., adapter_dtype=...)"
                )

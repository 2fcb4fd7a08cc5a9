"""Graphs as values, to be known again: what their code is generated from, and what was traced of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .ops.use import operands_of


@dataclass(frozen=True)
class Written:
    """A graph as values: its calling convention, and (name, op, target, type, args, kwargs) of each node."""

    convention: tuple[Any, ...]
    nodes: list[tuple[Any, ...]]


def as_written(graph: fx.Graph) -> Written:
    """All that the code of a graph is generated from, to be compared by value."""
    nodes = [
        (node.name, node.op, node.target, node.type, _as_value(node.args), _as_value(node.kwargs))
        for node in graph.nodes
    ]
    codegen = graph._codegen
    return Written((type(codegen), getattr(codegen, "pytree_info", None), codegen._body_transformer), nodes)


def as_traced(graph: fx.Graph, inserted: str) -> Written:
    """The graph without the nodes that passes inserted, which have that key in their meta: as it was traced."""
    own = {node for node in graph.nodes if inserted in node.meta}

    def base(node: fx.Node) -> fx.Node:
        while node in own and node.meta[inserted].is_sum:
            node = node.args[0]  # type: ignore[assignment]
        return node

    nodes = []
    for node in graph.nodes:
        if node not in own:
            operands = [base(operand) for operand in operands_of(node)]
            names = tuple(operand.name for operand in operands if operand not in own)
            literals = _as_value(fx.node.map_aggregate((node.args, node.kwargs), _without_nodes_and_devices))
            is_call = isinstance(node.target, torch._ops.HigherOrderOperator)  # adapters add operands
            nodes.append((node.name, node.op, node.target, names, None if is_call else literals))
    return Written((), nodes)


def _without_nodes_and_devices(leaf: Any) -> Any:
    return None if isinstance(leaf, (fx.Node, torch.device)) else leaf


_PLAIN = {int, bool, str, type(None)}


def _as_value(argument: Any) -> Any:
    """An argument so that 1, 1.0 and True differ, 0.0 and −0.0, a tuple and a named one, and orders of keys."""
    kind = type(argument)
    if kind is fx.Node:
        return kind, argument.name
    if kind in _PLAIN:  # most of them
        return kind, argument
    if isinstance(argument, (tuple, list)):
        return type(argument), tuple(_as_value(item) for item in argument)
    if isinstance(argument, Mapping):
        return type(argument), tuple((key, _as_value(value)) for key, value in argument.items())
    if isinstance(argument, slice):
        return slice, _as_value((argument.start, argument.stop, argument.step))
    return type(argument), repr(argument) if isinstance(argument, (float, complex)) else argument

"""Which values of a graph share memory that something writes into: no rewrite moves, keeps or drops a read of those.

A value, its views, what it is a view of, and views of that are one memory. What an op of aten gives is told by its
schema; anything else may give a view of whatever it takes, unless it is ours.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..attributes import get_attribute
from ..ops.use import alias_infos, operands_of, writes


def written_values(graph: fx.Graph, module: nn.Module) -> set[fx.Node]:
    """All nodes whose memory is written into by some node, before or after them."""
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader.setdefault(node, node) is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    written = []
    for node in graph.nodes:
        for operand in operands_of(node):
            if _may_alias(node, operand):
                leader[find(node)] = find(operand)
            if writes(node, operand) or _writes_inside(node, module):
                written.append(operand)
    leaders = {find(node) for node in written}
    return {node for node in graph.nodes if find(node) in leaders}


def _may_alias(node: fx.Node, operand: fx.Node) -> bool:
    if node.op == "output":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(alias_infos(node, operand))
    return not str(getattr(node.target, "__module__", "")).startswith("lora_fx.")


def _writes_inside(node: fx.Node, module: nn.Module) -> bool:
    """A module with inplace=True, or the body of a higher-order op that has an op which writes."""
    if node.op == "call_module":
        called = get_attribute(module, str(node.target))
        return any(getattr(part, "inplace", False) for part in called.modules())
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    bodies = [get_attribute(module, str(n.target)) for n in operands_of(node) if n.op == "get_attr"]
    return any(_has_writes(body) for body in bodies if isinstance(body, fx.GraphModule))


def _has_writes(body: fx.GraphModule) -> bool:
    return any(
        any(writes(node, operand) for operand in operands_of(node)) or _writes_inside(node, body)
        for node in body.graph.nodes
    )

"""Devices and dtypes that tracing wrote into nodes as literals, and what moving a module means for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from .attributes import get_attribute, set_attribute
from .errors import GraphError

# What stands in a node's arguments for another node, when only the literals count.
_NODE = object()


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


def plan_literals(
    gm: fx.GraphModule,
    graph: fx.Graph,
    other_gm: fx.GraphModule,
    other: fx.Graph,
    is_own: Callable[[fx.Node], bool],
    suffix: str,
) -> list[Callable[[], object]]:
    """The edits that give `graph` the literals and constants of `other`, the same model traced in another dtype.

    Args:
        gm, graph: what is to change; nothing does until the edits are called.
        other_gm, other: where the literals come from.
        is_own: tells nodes that tracing did not write, such as an adapter's.
        suffix: makes names for constants that come along.

    Raises:
        GraphError: if the graphs differ in more than literals, so that which belongs to which is not known.
    """
    left = [node for node in graph.nodes if not is_own(node) and not _reads_model(node, gm)]
    right = [node for node in other.nodes if not _reads_model(node, other_gm)]
    edits: list[Callable[[], object]] = []
    for node, twin in itertools.zip_longest(left, right):
        if node is None or twin is None or not _corresponds(node, twin):
            here, there = (each.format_node() if each is not None else "nothing" for each in (node, twin))
            raise GraphError(
                f"the graph was edited since it was traced ({here} stands where the trace has {there}), so its dtypes "
                "cannot follow. Convert the model, and trace it again"
            )
        edits.append(_with_literals_of(node, twin))
        if node.op == "get_attr":
            edits += _plan_constant(gm, node, other_gm, twin, is_own, suffix)
    return edits


def _corresponds(node: fx.Node, twin: fx.Node) -> bool:
    """Whether the nodes are the same op on as many values; names of attributes may differ."""
    if node.op != twin.op or (node.op not in ("get_attr", "call_module") and node.target != twin.target):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # adapters add operands to it
        return True
    return [leaf is _NODE for leaf in _literals(node)] == [leaf is _NODE for leaf in _literals(twin)]


def _reads_model(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the node reads a parameter or buffer: these move with the module, and folding adds and renames reads."""
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    module = gm.get_submodule(owner)
    is_constant = name in module._non_persistent_buffers_set and name.startswith(("lifted_tensor", "_tensor_constant"))
    return name in module._parameters or (name in module._buffers and not is_constant)


def _literals(node: fx.Node) -> list[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(_NODE if isinstance(leaf, fx.Node) else leaf)
        return leaf

    fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


def _with_literals_of(node: fx.Node, twin: fx.Node) -> Callable[[], object]:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return lambda: None
    literals = iter(_literals(twin))

    def taken(leaf: Any) -> Any:
        new = next(literals)
        return leaf if isinstance(leaf, (fx.Node, torch.device)) else new

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), taken)

    def edit() -> None:
        node.args, node.kwargs = args, kwargs

    return edit


def _plan_constant(
    gm: fx.GraphModule,
    node: fx.Node,
    other_gm: fx.GraphModule,
    twin: fx.Node,
    is_own: Callable[[fx.Node], bool],
    suffix: str,
) -> list[Callable[[], object]]:
    old, new = get_attribute(gm, str(node.target)), get_attribute(other_gm, str(twin.target))
    if isinstance(old, fx.GraphModule) and isinstance(new, fx.GraphModule):
        return [*plan_literals(old, old.graph, new, new.graph, is_own, suffix), old.recompile]
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return []
    name = f"{node.target}_{suffix}"

    def edit() -> None:
        set_attribute(gm, name, new.to(old.device), persistent=False)
        node.target = name

    return [edit] if old.dtype != new.dtype or not torch.equal(old.cpu(), new.cpu()) else []

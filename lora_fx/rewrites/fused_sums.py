"""scaling, second product and sum in one addmm.

Before: `op(x) + scaling · linear(linear(drop(x), A), B)` as `graph.insert_low_rank_path` writes it, for one or more
adapters; nothing else reads what lies between; nobody writes into what
the op takes or gives.
After: one call for the op and all its adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..attributes import get_attribute
from ..graph_module import ROLE
from ..ops.use import Dialect, dialect_of, operands_of
from .groups import GroupNodes, LinearNodes, TermNodes, calls, is_sum

_aten = torch.ops.aten


def find(graph: fx.Graph, module: nn.Module, written: set[fx.Node]) -> list[GroupNodes]:
    """A group for each adapted linear whose LoRA nodes are those of the before-condition."""
    found = []
    for node in graph.nodes:
        if is_sum(node) and not any(is_sum(user) and user.args[0] is node for user in node.users):
            group = _group(node, module, written)
            if group is not None:
                found.append(group)
    return found


def _group(total: fx.Node, module: nn.Module, written: set[fx.Node]) -> GroupNodes | None:
    terms: list[TermNodes] = []
    inside: list[fx.Node] = []
    node, x = total, None
    while is_sum(node):
        base, delta = node.args[:2]
        if not isinstance(base, fx.Node) or not isinstance(delta, fx.Node):
            return None
        found = _term(delta, base, dialect_of(base), module)
        if found is None or (x is not None and found[0] is not x):
            return None
        x, term, between = found
        terms.insert(0, term)
        inside += [*between, *([node] if node is not total else [])]
        if any(user is not node and user not in between for user in base.users):
            return None
        node = base
    if x is None or any(dict(n.kwargs) for n in inside):
        return None
    linear = _linear(node, total, x, tuple(terms), tuple(inside))
    touched = {x, node, total, *inside, *operands_of(node), *(n for term in terms for n in (term.a, term.b))}
    return None if touched & written else GroupNodes(x, (linear,))


def _term(
    delta: Any, base: fx.Node, dialect: Dialect, module: nn.Module
) -> tuple[fx.Node, TermNodes, list[fx.Node]] | None:
    """(x, the term, the nodes that make `delta` out of x), or None."""
    inside = [delta]
    if calls(delta, dialect.cast_like, 2) and delta.args[1] is base:
        delta = delta.args[0]
        inside.append(delta)
    if not calls(delta, dialect.mul, 2) or not isinstance(delta.args[1], (int, float)):
        return None
    scaling, up = float(delta.args[1]), delta.args[0]
    down: Any
    own: Any
    if not calls(up, dialect.linear, 2) or not _is_read(up.args[1]):
        return None
    down, b = up.args
    if not calls(down, dialect.linear, 2) or not _is_read(down.args[1]):
        return None
    own, a = down.args
    inside += [up, down]
    dropout = None
    if isinstance(own, fx.Node) and own.op == "call_module" and own.meta.get(ROLE) == delta.meta.get(ROLE):
        dropout = str(own.target)
        held = get_attribute(module, dropout)
        if type(held) is not nn.Dropout or held._forward_hooks or held._forward_pre_hooks or held.inplace:
            return None
        inside.append(own)
        own = own.args[0]
    if calls(own, dialect.cast_like, 2) and own.args[1] is a and own.meta.get(ROLE) == delta.meta.get(ROLE):
        inside.append(own)
        own = own.args[0]
    if not isinstance(own, fx.Node) or any(len(node.users) != 1 for node in inside):
        return None
    return own, TermNodes(a, b, scaling, dropout), inside


def _is_read(node: object) -> bool:
    """Nothing was done to A or B on the way: no turning, no slicing, no start taken off."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _linear(
    node: fx.Node, total: fx.Node, x: fx.Node, terms: tuple[TermNodes, ...], inside: tuple[fx.Node, ...]
) -> LinearNodes:
    base, weight, bias = _own(node, x)
    return LinearNodes(node, total, base, weight, bias, terms, inside)


def _own(node: fx.Node, x: fx.Node) -> tuple[str, fx.Node | None, fx.Node | None]:
    """How the op's own result is computed; what is not known to be a plain product is left as it is, and added to."""
    args = list(node.args)
    given = ("given", None, None)
    if node.op != "call_function" or node.kwargs or not all(isinstance(arg, fx.Node) or arg is None for arg in args):
        return given
    if node.target in (_aten.linear.default, F.linear) and len(args) in (2, 3) and args[0] is x:
        return ("linear", args[1], args[2] if len(args) == 3 else None)  # type: ignore[return-value]
    if node.target is _aten.addmm.default and len(args) == 3 and args[1] is x and _dimensions(args[0]) == 1:
        return ("product", args[2], args[0])  # type: ignore[return-value]
    if node.target in (_aten.mm.default, _aten.matmul.default) and args[0] is x and _dimensions(args[1]) == 2:
        return ("product", args[1], None)  # type: ignore[return-value]
    return given


def _dimensions(node: object) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else None

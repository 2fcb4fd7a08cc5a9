"""Cheap producers are made again in the backward pass, rather than kept: norms, activations, and their products.

Before: ops without a product in them, nor anything random, that nothing but one x is made from; nobody writes into
what they read. After: one call that keeps what the chain reads, and neither x nor anything on the way to it.

How far back a chain reaches is chosen by the bytes that are kept: those of what it reads, and those that autograd keeps
for the ops that stay outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..attributes import get_attribute
from ..ops.use import operands_of
from .groups import GroupNodes, readers
from .normalization import normalize

_aten = torch.ops.aten

# What autograd keeps for them, where a gradient flows: their operands, their result, or nothing.
_KEEP_OPERANDS = {
    _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar, _aten.silu.default, _aten.gelu.default,
    _aten.layer_norm.default, _aten.rms_norm.default, _aten.cos.default, _aten.sin.default,
    _aten.leaky_relu.default, _aten.hardtanh.default, _aten.mish.default, _aten.softplus.default,
    _aten.hardswish.default, _aten.elu.default, normalize,
}  # fmt: skip
_KEEP_RESULT = {
    _aten.rsqrt.default, _aten.sqrt.default, _aten.exp.default, _aten.tanh.default, _aten.sigmoid.default,
    _aten.relu.default, _aten.reciprocal.default,
}  # fmt: skip
_KEEP_NOTHING = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.neg.default, _aten.mul.Scalar, _aten.add.Scalar, _aten.mean.dim,
    _aten.to.dtype, _aten.to.dtype_layout, _aten.type_as.default, _aten.view.default, _aten.reshape.default,
    _aten.unsqueeze.default, _aten.alias.default, _aten.rsub.Scalar,
}  # fmt: skip
_CHEAP = _KEEP_OPERANDS | _KEEP_RESULT | _KEEP_NOTHING
_ARITHMETIC = _KEEP_OPERANDS | _KEEP_RESULT


def extend(groups: list[GroupNodes], graph: fx.Graph, module: nn.Module, written: set[fx.Node]) -> list[GroupNodes]:
    """The groups with the chains that make their x, and a group for each other chain that keeps much."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    carries = _carries_gradient(graph, module)
    taken: set[fx.Node] = {node for group in groups for node in group.nodes}
    result = []
    for group in groups:
        chain, inputs = _best_chain(group.x, order, taken, carries, written) if _can_take(group) else ((), ())
        taken |= set(chain)
        result.append(GroupNodes(group.x, group.linears, chain, inputs))
    for node in reversed(graph.nodes):
        if node in taken or node.target not in _CHEAP or _is_inside(node):
            continue
        chain, inputs = _best_chain(node, order, taken, carries, written)
        if sum(each.target in _ARITHMETIC for each in chain) > 1:
            taken |= set(chain)
            result.append(GroupNodes(node, (), chain, inputs))
    return result


def _can_take(group: GroupNodes) -> bool:
    """The call stands where x does, so that whoever else reads x finds it."""
    return all(linear.is_movable for linear in group.linears)


def _is_inside(node: fx.Node) -> bool:
    """All its readers are cheap themselves: a longer chain will have it."""
    return bool(node.users) and all(user.target in _CHEAP for user in readers(node))


def _best_chain(
    x: fx.Node, order: dict[fx.Node, int], taken: set[fx.Node], carries: set[fx.Node], written: set[fx.Node]
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """(nodes to make again, in order; what they read): nothing where nothing is gained."""
    region = _region(x, order, taken)
    if not any(node.target in _ARITHMETIC for node in region):
        return (), ()
    kept_by = {node: _kept_by(node, carries) for node in region}
    best, least = 0, math.inf
    latest_first = sorted(region, key=order.__getitem__, reverse=True)
    for count in range(len(latest_first) + 1):
        chain = latest_first[:count]
        kept = {x} if not chain else set(_inputs(chain))
        for node in latest_first[count:]:
            kept |= kept_by[node]
        size = _bytes(kept)
        if size is None:
            return (), ()
        if size <= least:
            best, least = count, size
    chain = sorted(latest_first[:best], key=order.__getitem__)
    inputs = tuple(_inputs(chain))
    if not chain or written.intersection((*inputs, *chain)):
        return (), ()
    return tuple(chain), inputs


def _region(x: fx.Node, order: dict[fx.Node, int], taken: set[fx.Node]) -> set[fx.Node]:
    """All cheap ops that only x is made from."""
    region: set[fx.Node] = set()
    if not _is_cheap(x) or x in taken:
        return region
    region.add(x)
    waiting = sorted(operands_of(x), key=order.__getitem__)
    while waiting:
        node = waiting.pop()  # the latest first, so that its readers are decided
        if node in region or node in taken or not _is_cheap(node) or not all(user in region for user in readers(node)):
            continue
        region.add(node)
        waiting = sorted({*waiting, *operands_of(node)}, key=order.__getitem__)
    return region


def _is_cheap(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _CHEAP and isinstance(node.meta.get("val"), torch.Tensor)


def _inputs(chain: Iterable[fx.Node]) -> list[fx.Node]:
    inside = set(chain)
    found = dict.fromkeys(operand for node in inside for operand in operands_of(node) if operand not in inside)
    return sorted(found, key=lambda node: node.name)


def _carries_gradient(graph: fx.Graph, module: nn.Module) -> set[fx.Node]:
    """The nodes through which a gradient flows: those that a trainable parameter goes into."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            value = get_attribute(module, str(node.target))
            is_trained = isinstance(value, nn.Parameter) and value.requires_grad
        else:
            is_trained = any(operand in found for operand in operands_of(node))
        if is_trained:
            found.add(node)
    return found


def _kept_by(node: fx.Node, carries: set[fx.Node]) -> set[fx.Node]:
    """What autograd keeps for the op, parameters aside."""
    if node not in carries:
        return set()
    if node.target in _KEEP_RESULT:
        return {node}
    if node.target not in _KEEP_OPERANDS:
        return set()
    tensors = [n for n in operands_of(node) if isinstance(n.meta.get("val"), torch.Tensor)]
    if node.target is not _aten.mul.Tensor:
        return set(tensors)
    return {n for n in tensors if any(other in carries for other in tensors if other is not n)}


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr"


def _bytes(nodes: Iterable[fx.Node]) -> float | None:
    """What the nodes take together, parameters aside; None where a size is unknown."""
    total = 0.0
    for node in nodes:
        value = node.meta.get("val")
        if _is_constant(node) or not isinstance(value, torch.Tensor):
            continue
        numbers = [_number(size) for size in value.shape]
        if any(size is None for size in numbers):
            return None
        total += math.prod(numbers) * value.element_size()  # type: ignore[arg-type]
    return total


def _number(size: Any) -> int | None:
    """A dimension's size; a free one's at the example inputs."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else None


__all__: Sequence[str] = ["extend"]

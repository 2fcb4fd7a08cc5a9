"""DoRA's and lora_bias' sums as plain sums, which the other rewrites know, with what is more about them behind.

Before: `op + (gain · (own + scaling · Δ) − own)`, where `own` is the op without its bias; or
`op + scaling · (Δ + bias)`. Nothing else reads what lies between, nor the op. What is summed in a wider dtype than
the op's must not lose by being summed in that: `own + scaling · Δ` may leave the range of float16, where its product
with the gain does not (bfloat16 has the range); and Δ may cancel with the bias of B.
After: `gain · (own + scaling · Δ) + bias`, of an op that has no bias; or `(op + scaling · Δ) + scaling · bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..ops.use import Dialect, dialect_of, operands_of
from .groups import calls, is_sum, readers

_aten = torch.ops.aten

# Ops that add a bias: at which place, and the op that adds none, of the other operands.
_WITHOUT_BIAS: dict[Any, tuple[int, Callable[..., Any]]] = {
    _aten.linear.default: (2, _aten.linear.default),
    _aten.addmm.default: (0, _aten.mm.default),
    F.linear: (2, F.linear),
}


@dataclass(frozen=True)
class MagnitudeNodes:
    """The sum of a DoRA adapter.

    Attributes:
        total: the last node, which the rest of the graph reads.
        op: the op that is adapted.
        scaled: scaling · Δ.
        gains: what each output is multiplied with.
        bias: the op's, which the gain leaves alone.
        bare: (target, operands) of the op without it; None if it has none.
        inside: what makes `total` of all these, last ones first.
    """

    total: fx.Node
    op: fx.Node
    scaled: fx.Node
    gains: fx.Node
    bias: fx.Node | None
    bare: tuple[Callable[..., Any], tuple[fx.Node, ...]] | None
    inside: tuple[fx.Node, ...]


@dataclass(frozen=True)
class BiasNodes:
    """The sum of an adapter with lora_bias.

    Attributes:
        total: the last node, which the rest of the graph reads.
        base: what the adapter adds to.
        up: Δ.
        bias: what is added to it.
        scaling: the factor of both.
        inside: what makes `total` of all these, last ones first.
    """

    total: fx.Node
    base: fx.Node
    up: fx.Node
    bias: fx.Node
    scaling: float
    inside: tuple[fx.Node, ...]


def find_magnitudes(graph: fx.Graph, written: set[fx.Node]) -> list[MagnitudeNodes]:
    """Every place of the first before-condition."""
    found = [each for node in graph.nodes if is_sum(node) and (each := _magnitude(node)) is not None]
    return [
        n for n in found if not written.intersection((n.total, *operands_of(n.op), n.scaled, n.gains, *n.inside, n.op))
    ]


def find_biases(graph: fx.Graph, written: set[fx.Node]) -> list[BiasNodes]:
    """Every place of the second."""
    found = [each for node in graph.nodes if is_sum(node) and (each := _bias(node)) is not None]
    return [n for n in found if not written.intersection((n.total, n.base, n.up, n.bias, *n.inside))]


def _magnitude(total: fx.Node) -> MagnitudeNodes | None:
    op, delta = _operands(total)
    dialect = dialect_of(op)
    if not calls(delta, dialect.cast_like, 2) or delta.args[1] is not op:
        return None
    difference: Any = delta.args[0]
    if not calls(difference, dialect.sub, 2):
        return None
    changed, own = _operands(difference)
    if not calls(changed, dialect.mul, 2):
        return None
    adapted, gains = _operands(changed)
    if not calls(adapted, dialect.add, 2) or adapted.args[0] is not own or not isinstance(gains, fx.Node):
        return None
    scaled: Any = adapted.args[1]
    inside = [delta, difference, changed, adapted]
    if any(len(node.users) != 1 for node in inside) or not isinstance(scaled, fx.Node) or len(scaled.users) != 1:
        return None
    bias, bare = None, None
    made = [own] if own is not op else []
    if calls(own, dialect.sub, 2):
        own, bias = _operands(own)
        bare = _bare(op, bias)
        if bare is None:
            return None
        made += [own] if own is not op else []
    # Of several adapters, the later ones add to a sum, and `own` is the op still.
    if own is not op and not (calls(own, dialect.cast_like, 2) and own.args[0] is op and _has_range(op)):
        return None
    expected = {*inside, *made, total}
    if any(user not in expected for node in (op, *made) for user in readers(node)):
        return None
    return MagnitudeNodes(total, op, scaled, gains, bias, bare, (*inside, *made))


def _bare(op: fx.Node, bias: object) -> tuple[Callable[..., Any], tuple[fx.Node, ...]] | None:
    """The op without that bias, if it is known how to leave it out."""
    place, target = _WITHOUT_BIAS.get(op.target, (0, None))
    operands = [operand for operand in op.args if isinstance(operand, fx.Node)]
    if target is None or op.kwargs or len(op.args) != 3 or len(operands) != 3 or not isinstance(bias, fx.Node):
        return None
    given = operands.pop(place)
    is_it = given.op == bias.op == "get_attr" and given.target == bias.target
    return (target, tuple(operands)) if is_it else None


def _bias(total: fx.Node) -> BiasNodes | None:
    base, delta = _operands(total)
    dialect: Dialect = dialect_of(base)
    if not calls(delta, dialect.cast_like, 2) or delta.args[1] is not base:
        return None
    scaled: Any = delta.args[0]
    if not calls(scaled, dialect.mul, 2) or not isinstance(scaled.args[1], (int, float)):
        return None
    together: Any = scaled.args[0]
    if not calls(together, dialect.add, 2) or any(len(node.users) != 1 for node in (delta, scaled, together)):
        return None
    up, bias = _operands(together)
    if not calls(up, dialect.linear, 2) or not isinstance(bias, fx.Node) or _is_wider(up, dialect):
        return None
    return BiasNodes(total, base, up, bias, float(scaled.args[1]), (delta, scaled, together))


def _has_range(op: fx.Node) -> bool:
    """Whether what is finite in float32 is so in the op's dtype, but for the last few numbers before infinity."""
    value = op.meta.get("val")
    return isinstance(value, torch.Tensor) and torch.finfo(value.dtype).max >= torch.finfo(torch.bfloat16).max


def _is_wider(up: fx.Node, dialect: Dialect) -> bool:
    """Whether x is cast before A, so that Δ has another dtype than the op's result."""
    down: Any = up.args[0]
    if not calls(down, dialect.linear, 2):
        return True  # not to be told
    own, a = _operands(down)
    if isinstance(own, fx.Node) and own.op == "call_module":  # dropout
        own = own.args[0]
    return calls(own, dialect.cast_like, 2) and own.args[1] is a


def _operands(node: fx.Node) -> tuple[Any, Any]:
    one, other = node.args[:2]
    return one, other

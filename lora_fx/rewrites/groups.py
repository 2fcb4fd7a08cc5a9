"""What the rewrites hand to each other, and at the end to `graph.write_groups`: values about nodes of one graph."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from ..graph_module import ROLE
from ..paths import Role


@dataclass(frozen=True)
class TermNodes:
    """One adapter at one linear: B(A(drop(x))) · scaling.

    Attributes:
        a, b: the nodes that read A and B.
        scaling: the factor.
        dropout: name of the dropout module; None without.
    """

    a: fx.Node
    b: fx.Node
    scaling: float
    dropout: str | None


@dataclass(frozen=True)
class LinearNodes:
    """One adapted linear.

    Attributes:
        node: the op itself, whose result the terms add to.
        total: the last sum, which the rest of the graph reads.
        base: how the op's result comes: see `group_operands.Linear`.
        weight, bias: what it takes; None where the result is given.
        terms: its adapters.
        inside: nodes that only make `total` out of `node`.
        stays: it has to be computed where it is.
    """

    node: fx.Node
    total: fx.Node
    base: str
    weight: fx.Node | None
    bias: fx.Node | None
    terms: tuple[TermNodes, ...]
    inside: tuple[fx.Node, ...]
    stays: bool = False

    @property
    def is_movable(self) -> bool:
        """Whether all that it takes is x and what can be read anywhere, so that it can be computed as soon as x is."""
        operands = [self.weight, self.bias, *(node for term in self.terms for node in (term.a, term.b))]
        return (
            not self.stays and self.base != "given" and all(node is None or node.op == "get_attr" for node in operands)
        )


@dataclass(frozen=True)
class GroupNodes:
    """Linears of one x, and the cheap ops that make x.

    Attributes:
        x: what the linears read, or what the cheap ops give.
        linears: see above.
        chain: the cheap ops that are made again in the backward pass, in order; the last is x. Empty: x is kept.
        inputs: what the chain reads.
    """

    x: fx.Node
    linears: tuple[LinearNodes, ...]
    chain: tuple[fx.Node, ...] = ()
    inputs: tuple[fx.Node, ...] = field(default=())

    @property
    def nodes(self) -> set[fx.Node]:
        """All that one call stands for."""
        own = {node for linear in self.linears for node in (*linear.inside, linear.total)}
        own |= {linear.node for linear in self.linears if linear.base != "given"}
        own |= set(self.chain)
        return own | {user for node in own for user in node.users if is_assertion(user)}


def is_assertion(node: fx.Node) -> bool:
    """What torch.export writes to say of which dtype a value was: no reader of it."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def is_sum(node: fx.Node) -> bool:
    """Whether it adds an adapter to the result of an op."""
    role = node.meta.get(ROLE)
    return isinstance(role, Role) and role.is_sum and not role.is_on_weight


def calls(node: object, function: object, count: int) -> bool:
    """Whether it is a call of the function with so many arguments."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target is function
        and (len(node.args) == count)
    )


def readers(node: fx.Node) -> list[fx.Node]:
    """Whoever computes with the node's value."""
    return [user for user in node.users if not is_assertion(user)]

"""Where dropout has to stay for its masks to be the plain graph's: behind and before whatever else draws.

Before: a group whose adapters drop out, and something between x and its last adapter that draws random numbers too.
After: its linears one by one, each where it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ..ops.use import argument
from .groups import GroupNodes

_DRAWS = ("dropout", "bernoulli", "rand", "multinomial", "normal", "uniform", "poisson", "exponential", "rrelu")


def keep(groups: list[GroupNodes], graph: fx.Graph) -> list[GroupNodes]:
    """The groups, taken apart where moving them would change the order of draws."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    draws = [node for node in order if _draws(node)]
    result = []
    for group in groups:
        if not any(term.dropout for linear in group.linears for term in linear.terms):
            result.append(group)
            continue
        own = group.nodes
        last = max(order[linear.total] for linear in group.linears)
        if any(order[group.x] < order[node] < last and node not in own for node in draws):
            result += [GroupNodes(group.x, (replace(linear, stays=True),)) for linear in group.linears]
        else:
            result.append(group)
    return result


def _draws(node: fx.Node) -> bool:
    if node.op == "call_module":
        return node.target != "_guards_fn"
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if "scaled_dot_product" in name:
        return bool(argument(node, 4, "dropout_p", 0.0) != 0.0)
    return any(word in name for word in _DRAWS)

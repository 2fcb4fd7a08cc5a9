"""einsum of an activation with a two-dimensional parameter: one index contracted, one new."""

from __future__ import annotations

import string
from collections.abc import Iterator

import torch
from torch import fx

from ..layouts import Layout
from .use import Between, Family, Use, argument, dialect_of

_FUNCTIONS = {torch.einsum, torch.ops.aten.einsum.default}


class Einsum(Family):
    """See `Family`."""

    is_linear = True

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        if node.op != "call_function" or node.target not in _FUNCTIONS:
            return
        parsed = _parse(node)
        if parsed is None:
            return
        equation, operands = parsed
        for position in (1, 0):
            indices = _weight_indices(equation, position)
            if indices is None:
                continue
            contracted, _ = indices
            in_out = _terms(equation)[position][0] == contracted
            yield Use(self, "einsum", node, operands[position], operands[1 - position], takes_in_out=in_out)

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        equation, position, (contracted, new) = _read(use)
        rank = next(letter for letter in string.ascii_letters if letter not in equation)
        terms, result = _terms(equation)[:2], _terms(equation)[2]
        middle = terms[1 - position].replace(contracted, rank)
        dialect, graph = dialect_of(use.node), use.node.graph
        # x[..contracted..] A[rank, contracted] -> [..rank..];  then B[new, rank] -> the op's own result
        op, args = dialect.einsum(f"{terms[1 - position]},{rank}{contracted}->{middle}", x, a)
        down = graph.call_function(op, args)
        from_end = middle[::-1].index(rank) + 1  # an ellipsis in front may be of any length
        down = down if between is None else between(down, -from_end)
        op, args = dialect.einsum(f"{middle},{new}{rank}->{result}", down, b)
        return graph.call_function(op, args)

    def out_axis(self, use: Use) -> int | None:
        equation, _, (_, new) = _read(use)
        behind = _terms(equation)[2].partition(new)[2]
        return None if "." in behind else -1 - len(behind)


def _read(use: Use) -> tuple[str, int, tuple[str, str]]:
    """(equation, position of the weight in it, (contracted index, new index))."""
    parsed = _parse(use.node)
    assert parsed is not None
    equation, operands = parsed
    position = next(i for i, operand in enumerate(operands) if operand is use.weight)
    indices = _weight_indices(equation, position)
    assert indices is not None
    return equation, position, indices


def _parse(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    equation = argument(node, 0, "equation")
    rest = node.args[1:] if node.target is torch.einsum else [argument(node, 1, "tensors")]
    operands = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else list(rest)
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    equation = equation.replace(" ", "")
    if "->" not in equation:
        letters = [c for c in equation if c.isalpha()]
        free = sorted(c for c in set(letters) if letters.count(c) == 1)
        equation += "->" + ("..." if "..." in equation else "") + "".join(free)
    return equation, operands


def _terms(equation: str) -> tuple[str, str, str]:
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    return left, right, result


def _weight_indices(equation: str, position: int) -> tuple[str, str] | None:
    """(contracted index, new index) of the weight at `position`, if it acts as a plain linear map there."""
    terms = _terms(equation)
    weight, x, result = terms[position], terms[1 - position], terms[2]
    if len(weight) != 2 or weight[0] == weight[1] or not weight.isalpha() or len(set(x)) != len(x.replace("...", ".")):
        return None
    for contracted, new in ((weight[0], weight[1]), (weight[1], weight[0])):
        if x.count(contracted) == 1 and contracted not in result and new in result and new not in x:
            kept = set(x) - {contracted, "."}
            return (contracted, new) if kept <= set(result) else None
    return None


FAMILY = Einsum()

"""Forward and backward of the usual group in straight lines: one adapter on each linear, one dtype, no dropout.

The formulas are those of `group_call`; `group_formulas` has them for every group. What that has to ask, loop over and
look up takes longer than a small kernel does, and nearly all groups of nearly all models have none of it: so what can
be known when the group is compiled is known here, and the rest is looked at once in each call, which is left to
`group_formulas` if it is not as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from ..arena import Joined
from .group_operands import Group, Lane, Needed, Operands


@dataclass(frozen=True)
class Adapted:
    """One linear of a straight group: the places of what it takes among the call's tensors; no bias is None.

    With `is_turned`, W is (in, out).
    """

    weight: int
    bias: int | None
    a: int
    b: int
    is_turned: bool


@dataclass(frozen=True)
class StraightGroup:
    """A group for which these lines do; see `of`."""

    linears: tuple[Adapted, ...]
    scaling: float
    operands: int
    _joined: Joined = field(default_factory=Joined, compare=False)

    @classmethod
    def of(cls, group: Group, lanes: Sequence[Lane]) -> StraightGroup | None:
        """The group, if it is as usual in all that is known before it is called."""
        is_usual = len(lanes) == 1 and not lanes[0].p and not group.may_merge
        if not is_usual or any(len(linear.terms) != 1 or linear.base == "given" for linear in group.linears):
            return None
        scaling = lanes[0].scaling
        if scaling is None:
            return None
        places: Any = Operands(group, range(group.operands))
        linears = [
            Adapted(weight, bias, a, b, linear.base == "product")
            for linear, weight, bias, ((a, b),) in zip(
                group.linears, places.bases, places.biases, places.factors, strict=True
            )
        ]
        return cls(tuple(linears), scaling, group.operands)

    def forward(self, x: torch.Tensor, tensors: Sequence[Any]) -> tuple[list[torch.Tensor], torch.Tensor] | None:
        """(results, h); None, and nothing done, for a call that is not as usual."""
        stacked = self._stacked(tensors, x.dtype) if x.ndim > 1 else None
        if stacked is None:
            return None
        is_flat = x.ndim == 2
        flat = x if is_flat else x.flatten(0, -2)
        h = flat @ stacked.t()
        shape = [] if is_flat else [*x.shape]
        results: list[torch.Tensor] = []
        several, start = len(self.linears) > 1, 0
        for each in self.linears:
            weight = tensors[each.weight]
            weight = weight.t() if each.is_turned else weight
            y = F.linear(flat, weight, None if each.bias is None else tensors[each.bias])
            own, b = h, tensors[each.b]
            if several:
                stop = start + b.shape[1]
                own, start = h[:, start:stop], stop
            y.addmm_(own, b.t(), alpha=self.scaling)
            if not is_flat:  # no view, which autograd would forbid to write into
                shape[-1] = y.shape[1]
                y = y.view(shape).data
            results += [y]
        return results, h

    def backward(
        self, x: torch.Tensor, tensors: Sequence[Any], h: torch.Tensor, grads: Sequence[Any], needed: Needed
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None] | None:
        """(gradients of all tensors but the inputs, that of x in rows); None for a call that is not as usual."""
        if not needed.all_factors or needed.some_base or x.ndim < 2:
            return None
        dtype = h.dtype
        for place in range(len(self.linears)):
            if grads[place] is None or grads[place].dtype is not dtype:
                return None
        stacked = self._stacked(tensors, x.dtype)
        if stacked is None:
            return None
        flat = x if x.ndim == 2 else x.flatten(0, -2)
        found: list[torch.Tensor | None] = [None] * self.operands
        several, start = len(self.linears) > 1, 0
        dh, dx = torch.empty_like(h) if several else h, None
        for place, each in enumerate(self.linears):
            g, b = grads[place], tensors[each.b]
            g = g if g.ndim == 2 else g.flatten(0, -2)
            if needed.of_x:
                weight = tensors[each.weight]
                weight = weight.t() if each.is_turned else weight
                dx = g @ weight if dx is None else dx.addmm_(g, weight)
            if several:
                stop = start + b.shape[1]
                torch.mm(g, b, out=dh[:, start:stop])
                own, start = h[:, start:stop], stop
            else:
                dh, own = g @ b, h
            found[each.b] = torch.addmm(b, g.t(), own, beta=0, alpha=self.scaling)
        da, start = torch.addmm(stacked, dh.t(), flat, beta=0, alpha=self.scaling), 0
        for each in self.linears:
            stop = start + tensors[each.b].shape[1]
            found[each.a], start = da[start:stop] if several else da, stop
        if dx is not None:
            dx.addmm_(dh, stacked, alpha=self.scaling)
        return found, dx

    def _stacked(self, tensors: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
        """A of all linears, one below the other; None if A or B are of another dtype."""
        for each in self.linears:
            if tensors[each.a].dtype is not dtype or tensors[each.b].dtype is not dtype:
                return None
        if len(self.linears) == 1:
            only: torch.Tensor = tensors[self.linears[0].a]
            return only
        return self._joined.stacked([tensors[each.a] for each in self.linears])

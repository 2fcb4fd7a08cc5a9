"""Forward and backward of a group, as `group_call` has the formulas, on rows: x is (rows, in)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from ..arena import Joined
from .factor_gradients import FactorGradients, packing_order, unpacked
from .group_dropout import cut, drawn_as_dropout_does, dropped, scale_of
from .group_operands import Group, Lane, Linear, Needed, Operands
from .straight_group import StraightGroup


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(…, n) as (rows, n)."""
    return x.flatten(0, -2) if x.ndim > 1 else x.reshape(1, x.shape[0])


def _as_own(result: torch.Tensor, inputs: Sequence[Any]) -> torch.Tensor:
    """A result that is no view, which autograd would forbid to write into, unless it is a view of an input."""
    if not result._is_view():
        return result
    bases = [t._base if t._is_view() else t for t in inputs if isinstance(t, torch.Tensor)]
    return result if any(result._base is base for base in bases) else result.data


@dataclass(frozen=True)
class GroupCall:
    """One call: what to compute, at which rates of dropout, and what autocast computes in (None: no autocast)."""

    group: Group
    rates: tuple[float, ...]
    narrow: torch.dtype | None
    device: str
    _needed: dict[tuple[bool, ...], Needed] = field(default_factory=dict, compare=False)
    _joined: Joined = field(default_factory=Joined, compare=False)
    _joined_all: Joined = field(default_factory=Joined, compare=False)

    def produce(self, inputs: Sequence[Any]) -> torch.Tensor:
        """x, as the model makes it: under autocast, if it is on."""
        if self.group.chain is None:
            x: torch.Tensor = inputs[0]
            return x
        if self.narrow is None:
            return self.group.chain.forward(*inputs)
        with self._autocast(enabled=True):
            return self.group.chain.forward(*inputs)

    def _autocast(self, enabled: bool) -> Any:
        if self.narrow is None:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.narrow, enabled=enabled)

    @cached_property
    def given(self) -> dict[int, int]:
        """{place among the call's tensors: number of the linear} of those results that are given."""
        found, at = {}, self.group.inputs
        for number, linear in enumerate(self.group.linears):
            if linear.base == "given":
                found[at] = number
            at += linear.operands
        return found

    @cached_property
    def lanes(self) -> list[Lane]:
        """Which terms share a product with A."""
        rates, linears = iter(self.rates), self.group.linears
        plain: list[tuple[int, int]] = []
        dropped: list[Lane] = []
        for number, linear in enumerate(linears):
            for place, term in enumerate(linear.terms):
                p = next(rates) if term.takes_dropout else 0.0
                if p:
                    dropped.append(Lane(((number, place),), p))
                else:
                    plain.append((number, place))
        if self.group.dropout == "shared":
            by_rate: dict[float, Lane] = {}
            for lane in dropped:
                known = by_rate.get(lane.p, replace(lane, terms=()))
                by_rate[lane.p] = replace(known, terms=known.terms + lane.terms)
            dropped = list(by_rate.values())
        lanes = [*([Lane(tuple(plain))] if plain else []), *dropped]
        return [
            replace(lane, scalings={(n, t): linears[n].terms[t].scaling * scale_of(lane.p) for n, t in lane.terms})
            for lane in lanes
        ]

    @cached_property
    def _straight(self) -> StraightGroup | None:
        return None if self.narrow is not None else StraightGroup.of(self.group, self.lanes)

    def forward(
        self, tensors: Sequence[Any]
    ) -> tuple[tuple[torch.Tensor, ...], Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """(results, h of each lane, the masks of those that have one)."""
        group = self.group
        if self.narrow is not None:
            x = self.produce(tensors[: group.inputs])
            with self._autocast(enabled=False):
                return self._forward(x, Operands(group, tensors))
        x = tensors[0] if group.chain is None else group.chain.forward(*tensors[: group.inputs])
        made = None if self._straight is None else self._straight.forward(x, tensors)
        if made is None:
            return self._forward(x, Operands(group, tensors))
        results, h = made
        if group.gives_x:
            results += [_as_own(x, tensors[: group.inputs])]
        return tuple(results), (h,), ()

    def _forward(
        self, x: torch.Tensor, operands: Operands
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor], list[torch.Tensor]]:
        flat = self._flat(x)
        operands = self._narrowed(operands, flat)
        merged = self._merged(flat, operands) if self.group.may_merge else None
        masks = self._draw(x, flat) if self.rates else []
        drawn = iter(masks) if masks else None
        hidden: list[torch.Tensor] = []
        parts: dict[tuple[int, int], tuple[torch.Tensor, float]] = {}
        for lane in self.lanes:
            own = flat if drawn is None or not lane.p else dropped(flat, next(drawn))
            terms = lane.terms if merged is None else tuple([(n, t) for n, t in lane.terms if merged[n] is None])
            if not terms:
                continue
            stacked = self._stack(operands, terms)
            h = (own if own.dtype == stacked.dtype else own.to(stacked.dtype)) @ stacked.t()
            hidden += [h]
            start = 0
            for number, place in terms:
                stop = start + operands.factors[number][place][1].shape[1]
                parts[number, place] = h[:, start:stop], lane.scalings[number, place]
                start = stop
        results: list[torch.Tensor] = []
        for number in self._numbers:
            result = self._result(number, flat, operands, None if merged is None else merged[number], parts)
            # What the group made is no view for autograd, which would forbid to write into it.
            results += [result if x.ndim == 2 else result.reshape(*x.shape[:-1], result.shape[-1]).data]
        if self.group.gives_x:
            return (*results, _as_own(x, operands.inputs)), hidden, masks
        return tuple(results), hidden, masks

    @cached_property
    def _numbers(self) -> range:
        return range(len(self.group.linears))

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        if not self.group.linears or (x.ndim == 2 and self.narrow is None):
            return x
        flat = rows_of(x)
        return flat if self.narrow is None or x.dtype == torch.float64 else flat.to(self.narrow)

    def _result(
        self,
        number: int,
        flat: torch.Tensor,
        operands: Operands,
        merged: torch.Tensor | None,
        parts: dict[tuple[int, int], tuple[torch.Tensor, float]],
    ) -> torch.Tensor:
        """x Wᵀ + b + Σ scaling · h Bᵀ of a linear, in rows; `merged` is W with the deltas, `parts` are (h, scaling)."""
        linear, base, bias = self.group.linears[number], operands.bases[number], operands.biases[number]
        is_given = linear.base == "given"
        if is_given:
            result = rows_of(base)
        else:
            weight = merged if merged is not None else base if linear.base == "linear" else base.t()
            if self.narrow is not None:
                weight, bias = weight.to(flat.dtype), None if bias is None else bias.to(flat.dtype)
            result = F.linear(flat, weight, bias)
        if merged is not None:
            return result
        for place, (_, b) in enumerate(operands.factors[number]):
            h, scaling = parts[number, place]
            if h.dtype != result.dtype:
                result = result.add((h @ b.t()).mul_(scaling).to(result.dtype))
            elif is_given and place == 0:
                result = torch.addmm(result, h, b.t(), alpha=scaling)
            else:  # what the group made itself is written over
                result = result.addmm_(h, b.t(), alpha=scaling)
        return result

    def _draw(self, x: torch.Tensor, flat: torch.Tensor) -> list[torch.Tensor]:
        """A mask for each lane that drops out."""
        lanes = [lane for lane in self.lanes if lane.p]
        if self.group.dropout == "exact":
            # Over x as it lies in memory, which is the order that nn.Dropout draws in.
            return [drawn_as_dropout_does(x, lane.p).reshape(flat.shape) for lane in lanes]
        count = flat.numel()
        draw = torch.empty(-(-len(lanes) * count // 4), dtype=torch.int64, device=flat.device).random_(-(2**63), None)
        pieces = draw.view(torch.int16)[: len(lanes) * count].view(len(lanes), *flat.shape)
        return [cut(piece, lane.p) for piece, lane in zip(pieces, lanes, strict=True)]

    def _narrowed(self, operands: Operands, x: torch.Tensor) -> Operands:
        """The operands with A and B in the dtype to compute in; packed ones (see `optimize`) are cast in one go."""
        wanted = x.dtype if self.group.computes_narrow or self.narrow is not None else None
        if wanted is None:
            return operands
        for pairs in operands.factors:
            for a, b in pairs:
                if a.dtype != wanted or b.dtype != wanted:
                    break
            else:
                continue
            break
        else:
            return operands
        piece = self._joined_all(packing_order(operands.factors))
        if piece is None:
            factors = [[(a.to(wanted), b.to(wanted)) for a, b in pairs] for pairs in operands.factors]
        else:
            factors = unpacked(piece.to(wanted), operands.factors)
        return operands.with_factors(factors)

    def _stack(self, operands: Operands, terms: Sequence[tuple[int, int]]) -> torch.Tensor:
        """A of all terms, one below the other."""
        if len(terms) == 1:
            number, place = terms[0]
            return operands.factors[number][place][0]
        return self._joined.stacked([operands.factors[number][place][0] for number, place in terms])

    def _merged(self, flat: torch.Tensor, operands: Operands) -> list[torch.Tensor | None]:
        """W + s · B A of each linear for which that takes fewer operations; None for the others.

        6 T r (in + out) is what a term takes beside the weight, forward and backward; 4 T r (in + out) + 4 r in out on
        it, since W + s · B A is built twice rather than kept.
        """
        found: list[torch.Tensor | None] = []
        for linear, base, factors in zip(self.group.linears, operands.bases, operands.factors, strict=True):
            if linear.base == "given" or not self._can_merge(flat, linear):
                found.append(None)
                continue
            weight = base if linear.base == "linear" else base.t()
            outs, ins = weight.shape
            if len(flat) * (ins + outs) <= 2 * ins * outs:
                found.append(None)
                continue
            for term, (a, b) in zip(linear.terms, factors, strict=True):
                weight = torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=term.scaling)
            found.append(weight)
        return found

    def _can_merge(self, flat: torch.Tensor, linear: Linear) -> bool:
        """Not where W + s · B A would be rounded to 16 bits, nor where x is dropped out on one of the ways."""
        is_wide = flat.dtype in (torch.float32, torch.float64) and self.narrow is None
        return is_wide and not any(term.takes_dropout for term in linear.terms if any(self.rates))

    def backward(
        self,
        tensors: Sequence[Any],
        hidden: list[torch.Tensor],
        masks: list[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        needs: tuple[bool, ...],
    ) -> list[torch.Tensor | None]:
        """Gradients of all tensors that need one, in the order of the call's."""
        group = self.group
        needed = self._needed.get(needs)
        if needed is None:
            needed = self._needed[needs] = Needed(group, needs)
        inputs = tensors[: group.inputs]
        x, through = (inputs[0], None) if group.chain is None else self._made_again(inputs, needed)
        result: list[torch.Tensor | None] = []
        dx = None
        if x is not None and group.linears:
            result, dx = self._of_call(x, tensors, hidden, masks, grads, needed)
            dx = None if dx is None else shaped_as(x, dx)
        if group.chain is None:
            return [dx, *result]
        outer = grads[-1] if group.gives_x else None
        if outer is not None:
            dx = outer if dx is None else outer + dx
        of_inputs: list[torch.Tensor | None] = [None] * group.inputs
        if through is not None and dx is not None:
            for place, gradient in zip(needed.wanted, through(dx), strict=True):
                of_inputs[place] = gradient
        return [*of_inputs, *result]

    def _of_call(
        self,
        x: torch.Tensor,
        tensors: Sequence[Any],
        hidden: list[torch.Tensor],
        masks: list[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        needed: Needed,
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """(gradients of the linears' tensors, gradient of x in rows, if it needs one)."""
        if self._straight is not None:
            made = self._straight.backward(x, tensors, hidden[0], grads, needed)
            if made is not None:
                found, dx = made
                return found[self.group.inputs :], dx
        return self._of_linears(self._flat(x), Operands(self.group, tensors), hidden, masks, grads, needed)

    def _made_again(
        self, inputs: Sequence[Any], needed: Needed
    ) -> tuple[torch.Tensor | None, Callable[[torch.Tensor], Sequence[torch.Tensor | None]] | None]:
        """(x without a tape, what gives the gradients of the wanted inputs for its own): None for what nobody needs."""
        if not needed.of_x:
            return self.produce(inputs), None
        derivative = needed.derivative
        if derivative is not None and self.narrow is None and derivative.fits(inputs):
            x, values = derivative.again(*inputs)
            return x, lambda dx: derivative.back(dx, *values)
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(need) if isinstance(t, torch.Tensor) else t
                for t, need in zip(inputs, needed.inputs, strict=True)
            ]
            made = self.produce(leaves)
        wanted = [leaves[place] for place in needed.wanted]
        return made.detach(), lambda dx: torch.autograd.grad(made, wanted, dx, allow_unused=True)

    def _of_linears(
        self,
        flat: torch.Tensor,
        operands: Operands,
        hidden: list[torch.Tensor],
        masks: list[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        needed: Needed,
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """(gradients of the linears' tensors, gradient of x in rows, if it needs one)."""
        rows: list[torch.Tensor | None] = []
        for number in self._numbers:
            g = grads[number]
            rows += [g if g is None or g.ndim == 2 else rows_of(g)]
        given, operands = operands, self._narrowed(operands, flat)
        room = FactorGradients.of(given, operands, needed)
        merged = self._merged(flat, operands) if self.group.may_merge else None
        dx = self._through_bases(rows, operands, merged) if needed.of_x else None
        of_a: dict[tuple[int, int], torch.Tensor] = {}
        of_b: dict[tuple[int, int], torch.Tensor] = {}
        kept, drawn = iter(hidden), iter(masks)
        for lane in self.lanes:
            mask = next(drawn) if lane.p else None
            own = flat if mask is None else dropped(flat, mask)
            for terms, is_merged in self._ways(lane, merged):
                stacked = self._stack(operands, terms)
                own = own if own.dtype == stacked.dtype else own.to(stacked.dtype)
                h = own @ stacked.t() if is_merged else next(kept)
                dh = self._of_terms(rows, operands, terms, h, lane, needed, room, of_b)
                scaling = lane.scaling
                if scaling is None:
                    sizes = [operands.factors[n][t][0].shape[0] for n, t in terms]
                    scalings = dh.new_tensor([lane.scalings[term] for term in terms])
                    dh = dh * torch.repeat_interleave(scalings, torch.tensor(sizes, device=dh.device))
                    scaling = 1.0
                if needed.all_factors or any(needed.factors[n][t][0] for n, t in terms):
                    da = torch.addmm(stacked, dh.t(), own, beta=0, alpha=scaling, out=room.of_a(terms))
                    start = 0
                    for n, t in terms:
                        stop = start + operands.factors[n][t][0].shape[0]
                        if needed.factors[n][t][0] and rows[n] is not None:
                            of_a[n, t] = da[start:stop]
                        start = stop
                if needed.of_x and not is_merged:
                    dx = self._with_lane(dx, dh, stacked, scaling, mask, flat.dtype)
        if operands is not given:
            of_a, of_b = room.widened(of_a, of_b, given)
        result: list[torch.Tensor | None] = []
        for number, linear in enumerate(self.group.linears):
            if needed.some_base:
                result += self._of_base(number, rows[number], grads[number], flat, operands, needed)
            else:
                result += [None, None] if linear.has_bias else [None]
            for place in range(len(linear.terms)):
                result += [of_a.get((number, place)), of_b.get((number, place))]
        return result, dx

    def _through_bases(
        self, rows: Sequence[torch.Tensor | None], operands: Operands, merged: list[torch.Tensor | None] | None
    ) -> torch.Tensor | None:
        """Σ g W, of those linears whose result somebody used."""
        dx: torch.Tensor | None = None
        for number, g in enumerate(rows):
            base = self.group.linears[number].base
            if g is None or base == "given":
                continue
            weight = None if merged is None else merged[number]
            if weight is None:
                weight = operands.bases[number] if base == "linear" else operands.bases[number].t()
            weight = weight if weight.dtype == g.dtype else weight.to(g.dtype)
            dx = g @ weight if dx is None else dx.addmm_(g, weight)
        return dx

    def _ways(
        self, lane: Lane, merged: list[torch.Tensor | None] | None
    ) -> list[tuple[tuple[tuple[int, int], ...], bool]]:
        """(terms, whether they are in the weight) of a lane, each of which goes its own way."""
        if merged is None:
            return [(lane.terms, False)]
        beside = tuple([(n, t) for n, t in lane.terms if merged[n] is None])
        within = tuple([(n, t) for n, t in lane.terms if merged[n] is not None])
        return [way for way in ((beside, False), (within, True)) if way[0]]

    def _of_terms(
        self,
        rows: Sequence[torch.Tensor | None],
        operands: Operands,
        terms: Sequence[tuple[int, int]],
        h: torch.Tensor,
        lane: Lane,
        needed: Needed,
        room: FactorGradients,
        of_b: dict[tuple[int, int], torch.Tensor],
    ) -> torch.Tensor:
        """dh without scaling, of all terms side by side; each dB goes into `of_b`."""
        several = len(terms) > 1
        dh = h.new_empty(h.shape) if several else h
        start = 0
        for number, place in terms:
            b = operands.factors[number][place][1]
            stop = start + b.shape[1]
            g = rows[number]
            if g is None:
                dh = dh if several else torch.zeros_like(h)
                dh[:, start:stop] = 0
            else:
                g = g if g.dtype == h.dtype else g.to(h.dtype)
                if several:
                    torch.mm(g, b, out=dh[:, start:stop])
                else:
                    dh = g @ b
                if needed.factors[number][place][1]:
                    out = room.of_b((number, place))
                    of_b[number, place] = torch.addmm(
                        b, g.t(), h[:, start:stop], beta=0, alpha=lane.scalings[number, place], out=out
                    )
            start = stop
        return dh

    def _with_lane(
        self,
        dx: torch.Tensor | None,
        dh: torch.Tensor,
        stacked: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if mask is None and dx is not None and dx.dtype == dh.dtype:
            return dx.addmm_(dh, stacked, alpha=scaling)
        through = torch.addmm(stacked[:1], dh, stacked, beta=0, alpha=scaling)
        through = through if mask is None else dropped(through, mask)
        through = through if through.dtype == dtype else through.to(dtype)
        return through if dx is None else dx.add_(through)

    def _of_base(
        self,
        number: int,
        rows: torch.Tensor | None,
        grad: torch.Tensor | None,
        flat: torch.Tensor,
        operands: Operands,
        needed: Needed,
    ) -> Iterator[torch.Tensor | None]:
        """Gradients of W and bias, which are frozen as a rule, or of the result that was given."""
        linear, base, bias = self.group.linears[number], operands.bases[number], operands.biases[number]
        if linear.base == "given":
            yield grad if needed.bases[number] else None
        elif rows is None or not needed.bases[number]:
            yield None
        else:
            yield (rows.t() @ flat if linear.base == "linear" else flat.t() @ rows).to(base.dtype)
        if linear.has_bias:
            assert bias is not None
            yield rows.sum(0).to(bias.dtype) if rows is not None and needed.biases[number] else None


def shaped_as(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A gradient of x that was computed in rows, in its shape and dtype."""
    rows = rows if rows.dtype == x.dtype else rows.to(x.dtype)
    return rows if x.ndim == 2 else rows.reshape(x.shape)

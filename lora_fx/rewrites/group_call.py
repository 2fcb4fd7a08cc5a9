"""What the optimised code of a graph calls: several adapted linears on one input, with a backward of its own.

For y_i = x W_iᵀ + b_i + s_i · drop_i(x) A_iᵀ B_iᵀ, i = 1 … n, where x may itself be made from `inputs` by cheap ops:

    forward    h = x [A_1; …; A_n]ᵀ,   y_i = addmm(x W_iᵀ + b_i, h_i, B_iᵀ, alpha=s_i)
    backward   dh_i = g_i B_i,   dB_i = s_i g_iᵀ h_i,   dA = s dhᵀ x,   dx = Σ g_i W_i + s dh [A_1; …; A_n]

One product for all A, no kernel for scalings and sums, and nothing kept but `inputs`, h and boolean masks: x is made
again. (The formulas are those of LoRA, arXiv 2106.09685 section 4.1, differentiated; the order of the products is the
one that RunLoRA, arXiv 2312.03415, finds cheapest for few ranks, but h is kept.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F

from ..arena import Joined, joined

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Term:
    """One adapter at one linear: scaling · drop(x) Aᵀ Bᵀ; `takes_dropout`: the module for that comes with the call."""

    scaling: float
    takes_dropout: bool = False


@dataclass(frozen=True)
class Linear:
    """One linear of a group.

    Attributes:
        base: how its own result comes: "linear" takes W (out, in), "product" takes W (in, out), "given" is a tensor.
        has_bias: whether a bias (out,) comes with W.
        terms: the adapters on it.
    """

    base: str
    has_bias: bool
    terms: tuple[Term, ...]

    @property
    def operands(self) -> int:
        """How many tensors it takes."""
        return 1 + self.has_bias + 2 * len(self.terms)


@dataclass(frozen=True)
class Group:
    """Linears that read one x.

    Attributes:
        linears: see above; none for a chain of cheap ops alone.
        inputs: how many tensors x is made from.
        produce: makes x from them; None: x is the only input.
        gives_x: whether x is a result too, behind those of the linears.
        computes_narrow: A and B are cast to x's dtype, rather than x to theirs.
        dropout: "exact" draws the masks that nn.Dropout would; "cut" cuts them from one draw; "shared" is one for all.
        may_merge: whether W + s · B A may be built where tokens are so many that it takes fewer operations.
    """

    linears: tuple[Linear, ...]
    inputs: int = 1
    produce: Callable[..., torch.Tensor] | None = field(default=None, compare=False)
    gives_x: bool = False
    computes_narrow: bool = True
    dropout: str = "exact"
    may_merge: bool = False
    tensor_input: int = 0  # the number of an input that is a tensor
    calls: dict[Any, _Call] = field(default_factory=dict, compare=False, repr=False)  # those that were made so far

    @cached_property
    def operands(self) -> int:
        """How many tensors it takes."""
        return self.inputs + sum(linear.operands for linear in self.linears)


@dataclass(frozen=True)
class _Lane:
    """Terms that multiply the same x, dropped out at one rate.

    Attributes:
        terms: (number of the linear, number of the term) of each.
        p: the rate.
        scalings: of each term, with that of what dropout leaves in them.
    """

    terms: tuple[tuple[int, int], ...]
    p: float = 0.0
    scalings: dict[tuple[int, int], float] = field(default_factory=dict, compare=False)


class _Operands:
    """The tensors of a call, told apart: those that x is made from; W, bias, and (A, B) of each term, by linear."""

    __slots__ = ("bases", "biases", "factors", "inputs")

    def __init__(self, group: Group, tensors: Sequence[Any]) -> None:
        # Loops and += rather than comprehensions and append, here and below: a call takes as long as a small kernel.
        self.inputs: list[Any] = [*tensors[: group.inputs]]
        self.bases: list[torch.Tensor] = []
        self.biases: list[torch.Tensor | None] = []
        self.factors: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        at = group.inputs
        for linear in group.linears:
            self.bases += [tensors[at]]
            at += 1
            self.biases += [tensors[at] if linear.has_bias else None]
            at += linear.has_bias
            pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
            for _ in linear.terms:
                pairs += [(tensors[at], tensors[at + 1])]
                at += 2
            self.factors += [pairs]

    def with_factors(self, factors: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> _Operands:
        """The same with other A and B."""
        result = object.__new__(_Operands)
        result.inputs, result.bases, result.biases, result.factors = self.inputs, self.bases, self.biases, factors
        return result


class _Needed(_Operands):
    """Which of a call's tensors need a gradient.

    Attributes:
        of_x: whether x does.
        wanted: the places of those inputs that do.
        all_factors, some_base: whether each A and B does; whether a W, a bias or a given result does.
    """

    __slots__ = ("all_factors", "of_x", "some_base", "wanted")

    def __init__(self, group: Group, needs: Sequence[bool]) -> None:
        super().__init__(group, needs)
        self.wanted = [place for place, need in enumerate(self.inputs) if need]
        self.of_x = bool(self.wanted)
        self.all_factors = all(need for pairs in self.factors for pair in pairs for need in pair)
        self.some_base = any(self.bases) or any(self.biases)


def function_of(group: Group) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function for a graph to call: it gives the results of the linears, and x if the group gives it.

    It takes whether to run plain operations (see `plain_ops`); the inputs; then, for each linear, its W and bias, or
    its result, and A and B of each term; then an nn.Dropout for each term that takes one, in order.
    """
    count = group.operands
    tensor_place = group.inputs if group.linears else group.tensor_input

    def lora_group(is_plain: bool, *operands: Any) -> tuple[torch.Tensor, ...]:
        tensors, dropouts = operands[:count], operands[count:]
        rates = tuple([module.p if module.training else 0.0 for module in dropouts]) if dropouts else ()
        if is_plain:
            return _plain(group, _Operands(group, tensors), [_Dropping(p) for p in rates])
        device = tensors[tensor_place].device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if narrow is not None and any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors):
            # which autocast leaves alone
            return _plain(group, _Operands(group, tensors), [_Dropping(p) for p in rates])
        key = rates, narrow, device
        if key not in group.calls:
            group.calls[key] = _Call(group, *key)
        call = group.calls[key]
        if torch.is_grad_enabled():
            results: tuple[torch.Tensor, ...] = _Group.apply(call, *tensors)  # type: ignore[attr-defined]
            return results
        return call.forward(_Operands(group, tensors))[0]

    lora_group.__qualname__ = lora_group.__name__
    return lora_group


@dataclass(frozen=True)
class _Dropping:
    """Dropout at a rate; with a mask that was drawn before, with that."""

    p: float
    mask: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return F.dropout(x, self.p, training=True) if self.p else x
        return x * (self.mask.reshape(x.shape).to(x.dtype) * _scale(self.p))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(…, n) as (rows, n)."""
    return x.flatten(0, -2) if x.ndim > 1 else x.reshape(1, x.shape[0])


def _drawn_as_dropout_does(x: torch.Tensor, p: float) -> torch.Tensor:
    """The mask that nn.Dropout would draw: with p = 1 it draws none, on a CPU it is `bernoulli_`'s, else a kernel's."""
    if p == 1:
        return torch.zeros_like(x, dtype=torch.bool)
    if x.device.type == "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    mask: torch.Tensor = torch.ops.aten.native_dropout(x, p, True)[1]
    return mask


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _plain(group: Group, operands: _Operands, dropouts: Sequence[_Dropping]) -> tuple[torch.Tensor, ...]:
    """The same in the ops that `inject` writes; autograd differentiates it any number of times."""
    x = group.produce(*operands.inputs) if group.produce else operands.inputs[0]
    results, dropping = [], iter(dropouts)
    for linear, base, bias, factors in zip(
        group.linears, operands.bases, operands.biases, operands.factors, strict=True
    ):
        y: Any = base if linear.base == "given" else F.linear(x, base if linear.base == "linear" else base.t(), bias)
        for term, (a, b) in zip(linear.terms, factors, strict=True):
            own = x.to(a.dtype)
            own = next(dropping)(own) if term.takes_dropout else own
            delta = F.linear(F.linear(own, a), b) * term.scaling
            y = y + (delta.to(y.dtype) if isinstance(y, torch.Tensor) else delta)
        results.append(y)
    return (*results, x) if group.gives_x else tuple(results)


@dataclass(frozen=True)
class _Call:
    """One call: what to compute, at which rates of dropout, and what autocast computes in (None: no autocast)."""

    group: Group
    rates: tuple[float, ...]
    narrow: torch.dtype | None
    device: str
    _needed: dict[tuple[bool, ...], _Needed] = field(default_factory=dict, compare=False)
    _joined: Joined = field(default_factory=Joined, compare=False)
    _joined_all: Joined = field(default_factory=Joined, compare=False)

    def produce(self, inputs: Sequence[Any]) -> torch.Tensor:
        """x, as the model makes it: under autocast, if it is on."""
        if self.group.produce is None:
            x: torch.Tensor = inputs[0]
            return x
        if self.narrow is None:
            return self.group.produce(*inputs)
        with self._autocast(enabled=True):
            return self.group.produce(*inputs)

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
    def lanes(self) -> list[_Lane]:
        """Which terms share a product with A."""
        rates, linears = iter(self.rates), self.group.linears
        plain: list[tuple[int, int]] = []
        dropped: list[_Lane] = []
        for number, linear in enumerate(linears):
            for place, term in enumerate(linear.terms):
                p = next(rates) if term.takes_dropout else 0.0
                if p:
                    dropped.append(_Lane(((number, place),), p))
                else:
                    plain.append((number, place))
        if self.group.dropout == "shared":
            by_rate: dict[float, _Lane] = {}
            for lane in dropped:
                known = by_rate.get(lane.p, replace(lane, terms=()))
                by_rate[lane.p] = replace(known, terms=known.terms + lane.terms)
            dropped = list(by_rate.values())
        lanes = [*([_Lane(tuple(plain))] if plain else []), *dropped]
        return [
            replace(lane, scalings={(n, t): linears[n].terms[t].scaling * _scale(lane.p) for n, t in lane.terms})
            for lane in lanes
        ]

    def forward(self, operands: _Operands) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor], list[torch.Tensor]]:
        """(results, h of each lane, the masks of those that have one)."""
        x = operands.inputs[0] if self.group.produce is None else self.produce(operands.inputs)
        if self.narrow is None:
            return self._forward(x, operands)
        with self._autocast(enabled=False):
            return self._forward(x, operands)

    def _forward(
        self, x: torch.Tensor, operands: _Operands
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor], list[torch.Tensor]]:
        flat = self._flat(x)
        operands = self._narrowed(operands, flat)
        merged = self._merged(flat, operands) if self.group.may_merge else None
        masks = self._draw(x, flat) if self.rates else []
        drawn = iter(masks) if masks else None
        hidden: list[torch.Tensor] = []
        parts: dict[tuple[int, int], tuple[torch.Tensor, float]] = {}
        for lane in self.lanes:
            own = flat if drawn is None or not lane.p else _dropped(flat, next(drawn))
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
            results += [result if x.ndim == 2 else result.reshape(*x.shape[:-1], result.shape[-1])]
        return (*results, x) if self.group.gives_x else tuple(results), hidden, masks

    @cached_property
    def _numbers(self) -> range:
        return range(len(self.group.linears))

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        if not self.group.linears or (x.ndim == 2 and self.narrow is None):
            return x
        flat = _rows(x)
        return flat if self.narrow is None or x.dtype == torch.float64 else flat.to(self.narrow)

    def _result(
        self,
        number: int,
        flat: torch.Tensor,
        operands: _Operands,
        merged: torch.Tensor | None,
        parts: dict[tuple[int, int], tuple[torch.Tensor, float]],
    ) -> torch.Tensor:
        """x Wᵀ + b + Σ scaling · h Bᵀ of a linear, in rows; `merged` is W with the deltas, `parts` are (h, scaling)."""
        linear, base, bias = self.group.linears[number], operands.bases[number], operands.biases[number]
        is_given = linear.base == "given"
        if is_given:
            result = _rows(base)
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
        """A mask for each lane that drops out: True where x stays."""
        lanes = [lane for lane in self.lanes if lane.p]
        if self.group.dropout == "exact":
            # Over x as it lies in memory, which is the order that nn.Dropout draws in.
            return [_drawn_as_dropout_does(x, lane.p).reshape(flat.shape) for lane in lanes]
        count = flat.numel()
        draw = torch.empty(-(-len(lanes) * count // 4), dtype=torch.int64, device=flat.device).random_(-(2**63), None)
        pieces = draw.view(torch.int16)[: len(lanes) * count].view(len(lanes), *flat.shape)
        return [piece >= round(lane.p * 2**16) - 2**15 for piece, lane in zip(pieces, lanes, strict=True)]

    def _narrowed(self, operands: _Operands, x: torch.Tensor) -> _Operands:
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
        piece = self._joined_all(_packing_order(operands.factors))
        if piece is None:
            factors = [[(a.to(wanted), b.to(wanted)) for a, b in pairs] for pairs in operands.factors]
        else:
            factors = _unpacked(piece.to(wanted), operands.factors)
        return operands.with_factors(factors)

    def _stack(self, operands: _Operands, terms: Sequence[tuple[int, int]]) -> torch.Tensor:
        """A of all terms, one below the other."""
        if len(terms) == 1:
            number, place = terms[0]
            return operands.factors[number][place][0]
        factors = [operands.factors[number][place][0] for number, place in terms]
        piece = self._joined(factors)
        return torch.cat(factors) if piece is None else piece.view(-1, factors[0].shape[1])

    def _merged(self, flat: torch.Tensor, operands: _Operands) -> list[torch.Tensor | None]:
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
        operands: _Operands,
        hidden: list[torch.Tensor],
        masks: list[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        needs: tuple[bool, ...],
    ) -> list[torch.Tensor | None]:
        """Gradients of all operands that need one, in the order of the call's tensors."""
        group = self.group
        needed = self._needed.get(needs)
        if needed is None:
            needed = self._needed[needs] = _Needed(group, needs)
        inputs = operands.inputs
        if group.produce is None:
            result, dx = self._of_linears(self._flat(inputs[0]), operands, hidden, masks, grads, needed)
            return [None if dx is None else _shaped_as(inputs[0], dx), *result]
        if needed.of_x:
            with torch.enable_grad():
                inputs = [
                    t.detach().requires_grad_(need) if isinstance(t, torch.Tensor) else t
                    for t, need in zip(inputs, needed.inputs, strict=True)
                ]
                x = self.produce(inputs)
        else:
            x = self.produce(inputs)
        outer = grads[-1] if group.gives_x else None
        result, dx = self._of_linears(self._flat(x.detach()), operands, hidden, masks, grads, needed)
        dx = None if dx is None else _shaped_as(x, dx)
        if outer is not None:
            dx = outer if dx is None else outer + dx
        of_inputs: list[torch.Tensor | None] = [None] * group.inputs
        if needed.of_x and dx is not None:
            found = torch.autograd.grad(x, [inputs[i] for i in needed.wanted], dx, allow_unused=True)
            for place, gradient in zip(needed.wanted, found, strict=True):
                of_inputs[place] = gradient
        return [*of_inputs, *result]

    def _of_linears(
        self,
        flat: torch.Tensor,
        operands: _Operands,
        hidden: list[torch.Tensor],
        masks: list[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        needed: _Needed,
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """(gradients of the linears' tensors, gradient of x in rows, if it needs one)."""
        rows: list[torch.Tensor | None] = []
        for number in self._numbers:
            g = grads[number]
            rows += [g if g is None or g.ndim == 2 else _rows(g)]
        given, operands = operands, self._narrowed(operands, flat)
        sink = _Sink(None, []) if operands is given else _Sink.of(given, operands, needed)
        merged = self._merged(flat, operands) if self.group.may_merge else None
        dx = self._through_bases(rows, operands, merged) if needed.of_x else None
        of_a: dict[tuple[int, int], torch.Tensor] = {}
        of_b: dict[tuple[int, int], torch.Tensor] = {}
        kept, drawn = iter(hidden), iter(masks)
        for lane in self.lanes:
            mask = next(drawn) if lane.p else None
            own = flat if mask is None else _dropped(flat, mask)
            for terms, is_merged in self._ways(lane, merged):
                stacked = self._stack(operands, terms)
                own = own if own.dtype == stacked.dtype else own.to(stacked.dtype)
                h = own @ stacked.t() if is_merged else next(kept)
                scalings = [lane.scalings[term] for term in terms]
                dh = self._of_terms(rows, operands, terms, h, scalings, needed, sink, of_b)
                scaling = scalings[0]
                if len({*scalings}) > 1:
                    sizes = [operands.factors[n][t][0].shape[0] for n, t in terms]
                    dh = dh * torch.repeat_interleave(dh.new_tensor(scalings), torch.tensor(sizes, device=dh.device))
                    scaling = 1.0
                if needed.all_factors or any(needed.factors[n][t][0] for n, t in terms):
                    da = torch.addmm(stacked, dh.t(), own, beta=0, alpha=scaling, out=sink.of_a(terms))
                    start = 0
                    for n, t in terms:
                        stop = start + operands.factors[n][t][0].shape[0]
                        if needed.factors[n][t][0]:
                            of_a[n, t] = da[start:stop]
                        start = stop
                if needed.of_x and not is_merged:
                    dx = self._with_lane(dx, dh, stacked, scaling, mask, flat.dtype)
        if operands is not given:
            of_a, of_b = sink.widened(of_a, of_b, given)
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
        self, rows: Sequence[torch.Tensor | None], operands: _Operands, merged: list[torch.Tensor | None] | None
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
        self, lane: _Lane, merged: list[torch.Tensor | None] | None
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
        operands: _Operands,
        terms: Sequence[tuple[int, int]],
        h: torch.Tensor,
        scalings: Sequence[float],
        needed: _Needed,
        sink: _Sink,
        of_b: dict[tuple[int, int], torch.Tensor],
    ) -> torch.Tensor:
        """dh without scaling, of all terms side by side; each dB goes into `of_b`."""
        several = len(terms) > 1
        dh = h.new_empty(h.shape) if several else h
        start = 0
        for (number, place), scaling in zip(terms, scalings, strict=True):
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
                    out = sink.of_b((number, place))
                    of_b[number, place] = torch.addmm(b, g.t(), h[:, start:stop], beta=0, alpha=scaling, out=out)
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
        through = (through if mask is None else _dropped(through, mask)).to(dtype)
        return through if dx is None else dx.add_(through)

    def _of_base(
        self,
        number: int,
        rows: torch.Tensor | None,
        grad: torch.Tensor | None,
        flat: torch.Tensor,
        operands: _Operands,
        needed: _Needed,
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


def _packing_order(factors: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> list[torch.Tensor]:
    """In which order `inject` puts a group's A and B into memory: all A, so that they are one matrix; then all B."""
    return [a for pairs in factors for a, _ in pairs] + [b for pairs in factors for _, b in pairs]


def _unpacked(
    flat: torch.Tensor, like: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Parts of a vector in the packing order, in the shapes of `like`."""
    parts, at = [], 0
    for t in _packing_order(like):
        parts.append(flat.as_strided(t.shape, (t.shape[1], 1), at))
        at += t.numel()
    count = sum(len(pairs) for pairs in like)
    pairs = iter(zip(parts[:count], parts[count:], strict=True))
    return [[next(pairs) for _ in each] for each in like]


@dataclass
class _Sink:
    """Where gradients of A and B go: if they have to be cast, into one vector that is cast in one go.

    Attributes:
        flat: that vector, in the packing order; None where each gradient has its own memory.
        parts: views of it.
    """

    flat: torch.Tensor | None
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]]

    @classmethod
    def of(cls, given: _Operands, narrowed: _Operands, needed: _Needed) -> _Sink:
        is_cast = narrowed is not given and any(pairs for pairs in given.factors)
        if not is_cast or not all(n for pairs in needed.factors for pair in pairs for n in pair):
            return cls(None, [])
        first = narrowed.factors[next(i for i, pairs in enumerate(given.factors) if pairs)][0][0]
        size = sum(t.numel() for pairs in given.factors for pair in pairs for t in pair)
        flat = first.new_zeros(size)  # a linear whose result nobody used leaves zeros
        return cls(flat, _unpacked(flat, given.factors))

    def of_a(self, terms: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        """Room for dA of some terms, one below the other."""
        if self.flat is None:
            return None
        parts = [self.parts[number][place][0] for number, place in terms]
        piece = joined(parts)
        return None if piece is None else piece.view(-1, parts[0].shape[1])

    def of_b(self, term: tuple[int, int]) -> torch.Tensor | None:
        """Room for dB of a term."""
        return None if self.flat is None else self.parts[term[0]][term[1]][1]

    def widened(
        self,
        of_a: dict[tuple[int, int], torch.Tensor],
        of_b: dict[tuple[int, int], torch.Tensor],
        given: _Operands,
    ) -> tuple[dict[tuple[int, int], torch.Tensor], dict[tuple[int, int], torch.Tensor]]:
        """The gradients in the dtypes of A and B."""
        if self.flat is None:
            return (
                {(n, t): da.to(given.factors[n][t][0].dtype) for (n, t), da in of_a.items()},
                {(n, t): db.to(given.factors[n][t][1].dtype) for (n, t), db in of_b.items()},
            )
        for which, gradients in enumerate((of_a, of_b)):
            for (number, place), gradient in gradients.items():
                part = self.parts[number][place][which]
                if gradient.data_ptr() != part.data_ptr():
                    part.copy_(gradient)
        dtype = next(t.dtype for pairs in given.factors for pair in pairs for t in pair)
        wide = _unpacked(self.flat.to(dtype), given.factors)
        return {(n, t): wide[n][t][0] for n, t in of_a}, {(n, t): wide[n][t][1] for n, t in of_b}


def _shaped_as(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A gradient of x that was computed in rows, in its shape and dtype."""
    rows = rows if rows.dtype == x.dtype else rows.to(x.dtype)
    return rows if x.ndim == 2 else rows.reshape(x.shape)


def _dropped(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x where the mask is True, and 0 elsewhere; what is left is scaled up along with the rest (`_Call._stack`)."""
    return x * mask.view(torch.uint8)  # a product with numbers is faster than one with truth values on a CPU


class _Group(_SingleLevelFunction):
    """`_Call` for autograd: a Function without the part that looks for torch.func, which `plain_ops` has done."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[torch.Tensor, ...]:
        results, hidden, masks = call.forward(_Operands(call.group, tensors))
        ctx.set_materialize_grads(False)
        ctx.call, ctx.masks, ctx.numbers = call, len(masks) if masks else 0, {}
        kept = [*tensors]
        for place in call.given:  # they are only added to, so backward needs none of their values
            kept[place] = None
        if call.group.produce is not None:
            for place in range(call.group.inputs):
                if not isinstance(kept[place], torch.Tensor):
                    ctx.numbers[place], kept[place] = kept[place], None
        ctx.save_for_backward(*kept, *hidden, *masks)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        saved, count = ctx.saved_tensors, call.group.operands
        tensors = [*saved[:count]]
        for place, number in ctx.numbers.items():
            tensors[place] = number
        end = len(saved) - ctx.masks
        hidden, masks = [*saved[count:end]], [*saved[end:]]
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # the gradient will be differentiated itself
            return None, *_differentiable(call, tensors, masks, grads, needs)
        return None, *call.backward(_Operands(call.group, tensors), hidden, masks, grads, needs)


def _differentiable(
    call: _Call, tensors: list[Any], masks: list[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> list[torch.Tensor | None]:
    drawn: dict[tuple[int, int], _Dropping] = {}
    at = iter(masks)
    for lane in call.lanes:
        mask = next(at) if lane.p else None
        drawn |= dict.fromkeys(lane.terms, _Dropping(lane.p, mask))
    places = [
        (number, place)
        for number, linear in enumerate(call.group.linears)
        for place, term in enumerate(linear.terms)
        if term.takes_dropout
    ]
    given = {place: grads[number] for place, number in call.given.items()}
    # An alias for each place: one tensor may stand at two, and one may be made from another in the graph around.
    tensors = [0.0 if i in given else t.view_as(t) if isinstance(t, torch.Tensor) else t for i, t in enumerate(tensors)]
    with call._autocast(enabled=True):
        results = _plain(call.group, _Operands(call.group, tensors), [drawn[place] for place in places])
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [i for i, need in enumerate(needs) if need and i not in given]
    found = torch.autograd.grad(
        [y for y, _ in pairs], [tensors[i] for i in wanted], [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    result: list[torch.Tensor | None] = [given.get(i) for i in range(len(tensors))]
    for place, gradient in zip(wanted, found, strict=True):
        result[place] = gradient
    return result

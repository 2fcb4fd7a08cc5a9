"""What the optimised code of a graph calls: several adapted linears on one input, with a backward of its own.

For y_i = x W_iᵀ + b_i + s_i · drop_i(x) A_iᵀ B_iᵀ, i = 1 … n, where x may itself be made from `inputs` by cheap ops:

    forward    h = x [A_1; …; A_n]ᵀ,   y_i = addmm(x W_iᵀ + b_i, h_i, B_iᵀ, alpha=s_i)
    backward   dh_i = g_i B_i,   dB_i = s_i g_iᵀ h_i,   dA = s dhᵀ x,   dx = Σ g_i W_i + s dh [A_1; …; A_n]

One product for all A, no kernel for scalings and sums, and nothing kept but `inputs`, h and masks of one byte: x is
made again. (The formulas are those of LoRA, arXiv 2106.09685 section 4.1, differentiated; the order of the products is
the one that RunLoRA, arXiv 2312.03415, finds cheapest for few ranks, but h is kept.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F

from .group_dropout import Dropping
from .group_formulas import GroupCall
from .group_operands import Group, Operands

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_MOST_CALLS = 8  # that a function remembers; a rate of dropout that changes in each step makes one in each


def function_of(group: Group) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function for a graph to call: it gives the results of the linears, and x if the group gives it.

    It takes whether to run plain operations (see `plain_ops`); the inputs; then, for each linear, its W and bias, or
    its result, and A and B of each term; then an nn.Dropout for each term that takes one, in order.
    """
    count = group.operands
    calls: dict[Any, GroupCall] = {}  # those that were made so far
    tensor_place = group.inputs if group.linears else group.tensor_input

    def lora_group(is_plain: bool, *operands: Any) -> tuple[torch.Tensor, ...]:
        tensors, dropouts = operands[:count], operands[count:]
        rates = tuple([module.p if module.training else 0.0 for module in dropouts]) if dropouts else ()
        if is_plain or (not group.computes_narrow and _are_mixed(group, tensors)):
            return _plain(group, Operands(group, tensors), [Dropping(p) for p in rates])
        device = tensors[tensor_place].device.type
        is_autocast = device != "meta" and torch.is_autocast_enabled(device)
        narrow = torch.get_autocast_dtype(device) if is_autocast else None
        if narrow is not None and any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors):
            # which autocast leaves alone
            return _plain(group, Operands(group, tensors), [Dropping(p) for p in rates])
        key = rates, narrow, device
        try:
            call = calls[key]
        except KeyError:  # asked in one step: another thread may clear them
            if len(calls) >= _MOST_CALLS:
                calls.clear()
            call = calls[key] = GroupCall(group, *key)
        if torch.is_grad_enabled():
            results: tuple[torch.Tensor, ...] = _Group.apply(call, *tensors)  # type: ignore[attr-defined]
            return results
        return call.forward(tensors)[0]

    lora_group.__qualname__ = lora_group.__name__
    return lora_group


def _are_mixed(group: Group, tensors: Sequence[Any]) -> bool:
    """Whether adapters compute in several dtypes, and so share no product."""
    factors = Operands(group, tensors).factors
    return len({t.dtype for pairs in factors for pair in pairs for t in pair}) > 1


def _plain(group: Group, operands: Operands, dropouts: Sequence[Dropping]) -> tuple[torch.Tensor, ...]:
    """The same in the ops that `inject` writes; autograd differentiates it any number of times."""
    x = group.chain.forward(*operands.inputs) if group.chain else operands.inputs[0]
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


class _Group(_SingleLevelFunction):
    """`GroupCall` for autograd: a Function without the part that looks for torch.func, which `plain_ops` has done."""

    @staticmethod
    def forward(ctx: Any, call: GroupCall, *tensors: Any) -> tuple[torch.Tensor, ...]:
        results, hidden, masks = call.forward(tensors)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.masks, ctx.numbers = call, len(masks) if masks else 0, {}
        kept = [*tensors]
        for place in call.given:  # they are only added to, so backward needs none of their values
            kept[place] = None
        if call.group.chain is not None:
            for place in range(call.group.inputs):
                if not isinstance(kept[place], torch.Tensor):
                    ctx.numbers[place], kept[place] = kept[place], None
        ctx.save_for_backward(*kept, *hidden, *masks)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        call: GroupCall = ctx.call
        saved, count = ctx.saved_tensors, call.group.operands
        tensors = [*saved[:count]]
        for place, number in ctx.numbers.items():
            tensors[place] = number
        end = len(saved) - ctx.masks
        hidden, masks = [*saved[count:end]], [*saved[end:]]
        needs = ctx.needs_input_grad[1:]
        is_plain = torch.is_grad_enabled()  # the gradient will be differentiated itself,
        for g in grads:  # or is several side by side, as is_grads_batched has them
            is_plain = is_plain or (g is not None and _is_batched(g))
        if is_plain:
            return None, *_differentiable(call, tensors, masks, grads, needs)
        if call.device != "meta" and torch.is_autocast_enabled(call.device):  # dtypes are those of the forward pass
            with torch.autocast(call.device, enabled=False):
                return None, *call.backward(tensors, hidden, masks, grads, needs)
        return None, *call.backward(tensors, hidden, masks, grads, needs)


def _differentiable(
    call: GroupCall, tensors: list[Any], masks: list[torch.Tensor], grads: Sequence[torch.Tensor | None], needs: Any
) -> list[torch.Tensor | None]:
    drawn: dict[tuple[int, int], Dropping] = {}
    at = iter(masks)
    for lane in call.lanes:
        mask = next(at) if lane.p else None
        drawn |= dict.fromkeys(lane.terms, Dropping(lane.p, mask))
    places = [
        (number, place)
        for number, linear in enumerate(call.group.linears)
        for place, term in enumerate(linear.terms)
        if term.takes_dropout
    ]
    given = {place: grads[number] for place, number in call.given.items()}
    with torch.enable_grad(), call._autocast(enabled=True):
        # An alias for each place: one tensor may stand at two, and one may be made from another in the graph around.
        tensors = [
            0.0 if i in given else t.view_as(t) if isinstance(t, torch.Tensor) else t for i, t in enumerate(tensors)
        ]
        results = _plain(call.group, Operands(call.group, tensors), [drawn[place] for place in places])
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [i for i, need in enumerate(needs) if need and i not in given]
    result: list[torch.Tensor | None] = [given.get(i) for i in range(len(tensors))]
    if not wanted:
        return result
    found = torch.autograd.grad(
        [y for y, _ in pairs],
        [tensors[i] for i in wanted],
        [g for _, g in pairs],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    for place, gradient in zip(wanted, found, strict=True):
        result[place] = gradient
    return result

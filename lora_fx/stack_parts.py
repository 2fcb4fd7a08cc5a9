"""What one adapter of a batched graph has of the parameters that hold all of them, as parameters for an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .arena import NO_HOOKS, not_compiled, watch_optimizers
from .attributes import get_attribute, get_parameter
from .errors import GraphError

_CLEARED = "_lora_fx_cleared"


@dataclass
class _Cleared:
    """Places of a gradient that were taken away one by one, which is done in memory when the next one is added."""

    is_watched: bool = False
    gradient: torch.Tensor | None = None
    places: set[tuple[int, int, int]] = field(default_factory=set)


def _cleared(whole: nn.Parameter) -> set[tuple[int, int, int]]:
    """Of the gradient that the parameter has now."""
    known: _Cleared = whole.__dict__[_CLEARED]
    if known.gradient is not whole.grad:
        known.gradient, known.places = whole.grad, set()
    return known.places


def _zeroed(reference: weakref.ref[nn.Parameter]) -> Callable[[torch.Tensor], None]:
    """What runs before a gradient is added to that of the parameter."""

    def zero(gradient: torch.Tensor) -> None:
        whole = reference()
        if whole is None or whole.grad is None or not _cleared(whole):
            return
        places, fresh = set(_cleared(whole)), whole.grad.detach().clone()  # somebody may still have the old one
        for dim, start, stop in places:
            fresh.narrow(dim, start, stop - start).zero_()
        whole.grad = fresh
        _cleared(whole).clear()

    return zero


class StackPart(nn.Parameter):
    """A part of a parameter: it shares its memory, and its gradient is that part of the whole's.

    So optimizers and parameter groups can treat the adapters of a batched graph one by one. An adapter that no row of a
    batch chose has a gradient of zero.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    members: tuple[nn.Parameter]  # the whole
    _gm: weakref.ref[fx.GraphModule]
    _name: str  # of the whole
    _place: tuple[int, int, int]

    @staticmethod
    def of(gm: fx.GraphModule, name: str, dim: int, start: int, stop: int) -> StackPart:
        """The part from `start` to `stop` along `dim` of the parameter of that name."""
        whole = get_parameter(gm, name)
        view = whole.detach().narrow(dim, start, stop - start)
        part: StackPart = torch.Tensor._make_subclass(StackPart, view, whole.requires_grad)
        part.members, part._gm, part._name, part._place = (whole,), weakref.ref(gm), name, (dim, start, stop)
        cleared = whole.__dict__.setdefault(_CLEARED, _Cleared())
        if whole.requires_grad and not cleared.is_watched:
            whole.register_hook(_zeroed(weakref.ref(whole)))  # type: ignore[no-untyped-call]
            cleared.is_watched = True
        watch_optimizers()
        return part

    def _of(self, gradient: torch.Tensor) -> torch.Tensor:
        dim, start, stop = self._place
        return gradient.narrow(dim, start, stop - start)

    @property
    def grad(self) -> torch.Tensor | None:
        """That part of the whole's gradient.

        Raises:
            GraphError: if the whole was moved or exchanged since, so that an optimizer would train what nobody reads.
        """
        not_compiled()
        (whole,), gm = self.members, self._gm()
        is_read = gm is None or get_attribute(gm, self._name) is whole
        if not is_read or self._of(whole.detach()).data_ptr() != self.data_ptr():
            raise GraphError(
                f"{self._name!r} of the batched graph was moved or exchanged (by .to(), load_state_dict(assign=True) "
                "or the like) since lora_parameters(gm, adapter_name) was called; call it again, and make the "
                "optimizer anew"
            )
        if whole.grad is None or not self.requires_grad or self._place in _cleared(whole):
            return None
        return self._of(whole.grad)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        (whole,) = self.members
        cleared = _cleared(whole)
        if value is None and whole.grad is not None:
            cleared.add(self._place)
            if sum(stop - start for _, start, stop in cleared) == whole.shape[self._place[0]]:
                whole.grad = None
                cleared.clear()
        if value is not None:
            if whole.grad is None:
                whole.grad = torch.zeros_like(whole)
                cleared = _cleared(whole)
            self._of(whole.grad).copy_(value)
            cleared.discard(self._place)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def register_hook(self, hook: Any) -> Any:
        """Refused, as no gradient flows through here.

        Raises:
            GraphError: always.
        """
        raise GraphError(NO_HOOKS.format("lora_fx.lora_parameters(batched)"))

    register_post_accumulate_grad_hook = register_hook

    def __deepcopy__(self, memo: dict[int, Any]) -> StackPart:
        raise GraphError("a part of a parameter is not copied; call lora_fx.lora_parameters on the copy of the graph")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise GraphError("a part of a parameter is not pickled; save the adapter, and optimizer.state_dict()")

"""What one adapter of a batched graph has of the parameters that hold all of them, as parameters for an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .arena import watch_optimizers
from .errors import GraphError


class StackPart(nn.Parameter):
    """A part of a parameter: it shares its memory, and its gradient is that part of the whole's.

    So optimizers and parameter groups can treat the adapters of a batched graph one by one. An adapter that no row of a
    batch chose has a gradient of zero.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    members: tuple[nn.Parameter]  # the whole
    _place: tuple[int, int, int]

    @staticmethod
    def of(whole: nn.Parameter, dim: int, start: int, stop: int) -> StackPart:
        """The part from `start` to `stop` along `dim`."""
        view = whole.detach().narrow(dim, start, stop - start)
        part: StackPart = torch.Tensor._make_subclass(StackPart, view, whole.requires_grad)
        part.members, part._place = (whole,), (dim, start, stop)
        watch_optimizers()
        return part

    def _of(self, gradient: torch.Tensor) -> torch.Tensor:
        dim, start, stop = self._place
        return gradient.narrow(dim, start, stop - start)

    @property
    def grad(self) -> torch.Tensor | None:
        """That part of the whole's gradient.

        Raises:
            GraphError: if the whole was moved since, so that an optimizer would train what nobody reads.
        """
        (whole,) = self.members
        if self._of(whole.detach()).data_ptr() != self.data_ptr():
            raise GraphError(
                "a parameter of the batched graph was moved (by .to() or the like) since "
                "lora_parameters(gm, adapter_name) was called; call it again, and make the optimizer anew"
            )
        return None if whole.grad is None else self._of(whole.grad)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        """None takes this part's gradient away, and leaves the others theirs: it is zero then."""
        (whole,) = self.members
        if value is None:
            if whole.grad is not None:
                self._of(whole.grad).zero_()
            return
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
        self._of(whole.grad).copy_(value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StackPart:
        raise GraphError("a part of a parameter is not copied; call lora_fx.lora_parameters on the copy of the graph")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise GraphError("a part of a parameter is not pickled; save the adapter, and optimizer.state_dict()")

"""Masks of dropout in a group, one byte for each element: drawn as nn.Dropout does, applied, and their scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Dropping:
    """Dropout at a rate; with a mask that was drawn before, with that."""

    p: float
    mask: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x with zeros, and the rest scaled up."""
        if self.mask is None:
            return F.dropout(x, self.p, training=True) if self.p else x
        return x * (self.mask.reshape(x.shape).to(x.dtype) * scale_of(self.p))


def drawn_as_dropout_does(x: torch.Tensor, p: float) -> torch.Tensor:
    """The mask that nn.Dropout would draw: with p = 1 it draws none, on a CPU it is `bernoulli_`'s, else a kernel's."""
    if p == 1:
        return torch.zeros_like(x, dtype=torch.bool)
    if x.device.type == "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    mask: torch.Tensor = torch.ops.aten.native_dropout(x, p, True)[1]
    return mask


def cut(numbers: torch.Tensor, p: float) -> torch.Tensor:
    """The mask that int16 numbers, all equally likely, make at a rate; a rate next to 1 leaves the greatest number."""
    return numbers >= min(round(p * 2**16), 2**16 - 1) - 2**15


def scale_of(p: float) -> float:
    """By how much what is left is scaled up, so that the mean stays."""
    return 1 / (1 - p) if p < 1 else 0.0


def dropped(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x where the mask is True, and 0 elsewhere; what is left is scaled up along with the rest (`GroupCall.lanes`)."""
    return x * mask.view(torch.uint8)  # a product with numbers is faster than one with truth values on a CPU

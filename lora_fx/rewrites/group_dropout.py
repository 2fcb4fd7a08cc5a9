"""Masks of dropout in a group: drawn as nn.Dropout does, applied, and their scale.

A mask has one byte for each element, all of its bits set where x stays, for `&` with the bits of x. A product with 0
and 1 takes as long, but for some places in memory, where converting bytes to floats took 15 times that (torch 2.13, AMD
EPYC).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Dropping:
    """Dropout at a rate; with a mask that was drawn before, with that."""

    p: float
    mask: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x with zeros, and the rest scaled up."""
        if self.mask is None:
            return F.dropout(x, self.p, training=True) if self.p else x
        return x * (self.mask.reshape(x.shape).neg().to(x.dtype) * scale_of(self.p))


def mask_of(stays: torch.Tensor) -> torch.Tensor:
    """The mask of truth values, whose memory it takes."""
    return stays.view(torch.int8).neg_()


def drawn_as_dropout_does(x: torch.Tensor, p: float) -> torch.Tensor:
    """The mask that nn.Dropout would draw: with p = 1 it draws none, on a CPU it is `bernoulli_`'s, else a kernel's."""
    if p == 1:
        return torch.zeros_like(x, dtype=torch.int8)
    if x.device.type == "cpu":
        return mask_of(torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p))
    return mask_of(torch.ops.aten.native_dropout(x, p, True)[1])


def cut(numbers: torch.Tensor, p: float) -> torch.Tensor:
    """The mask that int16 numbers, all equally likely, make at a rate; a rate next to 1 leaves the greatest number."""
    return mask_of(numbers >= min(round(p * 2**16), 2**16 - 1) - 2**15)


def scale_of(p: float) -> float:
    """By how much what is left is scaled up, so that the mean stays."""
    return 1 / (1 - p) if p < 1 else 0.0


def dropped(x: torch.Tensor, mask: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x where the mask is set, and 0 elsewhere; what is left is scaled up along with the rest (`GroupCall.lanes`).

    Args:
        x, mask: of one shape.
        out: where to write it, of the shape and dtype of x: new memory takes as long as the operation on a CPU.
    """
    bits = _BITS[x.dtype.itemsize]
    found = torch.bitwise_and(x.view(bits), mask, out=None if out is None else out.view(bits))
    return found.view(x.dtype) if out is None else out

"""What becomes of one tensor of a checkpoint, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .adapter_arrays import Array, LowRankArrays
from .layouts import Layout
from .stored_tensors import StoredTensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """scaling · B @ A, with DoRA's magnitude where the adapter has one."""

    low: LowRankArrays
    layout: Layout
    scaling: float


@dataclass(frozen=True, eq=False)
class BiasOfB:
    """scaling · the bias of B."""

    values: Array
    scaling: float


@dataclass(frozen=True, eq=False)
class Rows:
    """Trained rows in place of the base's."""

    index: tuple[int, ...]
    values: Array


@dataclass(frozen=True, eq=False)
class Whole:
    """A tensor that was trained as a whole, in place of the base's."""

    values: Array


Term = LowRank | BiasOfB | Rows | Whole


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of one tensor.

    Attributes:
        source: the base's tensor.
        name: the result's: the source's, or that of a weight that was tied to it, and no longer is.
        path: the module, or the tensor, that the adapter names.
        terms: what is added; one `Whole` stands alone.
    """

    source: StoredTensor
    name: str
    path: str
    terms: tuple[Term, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the base's values play no part."""
        return isinstance(self.terms[0], Whole)

    @property
    def is_untied(self) -> bool:
        """Whether the result is a tensor more."""
        return self.name != self.source.name


def tensor_of(array: Array) -> torch.Tensor:
    """An array of the mapped adapter as a tensor of the same memory, if that is aligned; uint16 is bfloat16."""
    found = torch.from_numpy(np.require(array, requirements="A"))
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found

"""What an adapter does to a weight, a block of its rows at a time: no more of one than that is ever in memory.

A weight is seen as a matrix. Blocks of it come in float32 at least, and are changed where they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_fx.adapter_arrays import wide

from .onnx_weights import Array


class Edit(ABC):
    """One change of a weight."""

    @property
    def needs_norms(self) -> bool:
        """Whether it takes all rows to know what becomes of one."""
        return False

    @abstractmethod
    def change(self, block: Array, first: int, squares: Array | None) -> None:
        """Change the rows from `first` on; `squares` are the sums that `add_squares` made, if it takes them."""

    def add_squares(self, block: Array, first: int, squares: Array) -> None:  # noqa: B027, for most there is nothing to add
        """Add the squares of what the rows from `first` on become, of each column."""


@dataclass(frozen=True, eq=False)
class Product(Edit):
    """scaling · left @ right, added at the rows from `row` on, and at some columns.

    Attributes:
        left, right: (rows, r) and (r, columns).
        scaling, strength: what multiplies the product, and what multiplies all that is added.
        row, columns: where it goes.
        magnitude: of each output, with DoRA: these are the columns of a weight that is stored (in, out), else the rows.
        stored_in_out: how the weight is stored.
    """

    left: Array
    right: Array
    scaling: float
    strength: float
    row: int = 0
    columns: slice = field(default_factory=lambda: slice(None))
    magnitude: Array | None = None
    stored_in_out: bool = False

    @property
    def needs_norms(self) -> bool:
        """With DoRA, of a weight whose outputs are columns."""
        return self.magnitude is not None and self.stored_in_out

    def change(self, block: Array, first: int, squares: Array | None) -> None:
        """Add what falls into these rows."""
        part, delta = self._part(block, first)
        if part is None or delta is None:
            return
        if self.magnitude is not None:
            adapted = part + delta
            own = (
                np.square(adapted, dtype=np.float64).sum(1, keepdims=True) if squares is None else squares[self.columns]
            )
            norms = np.maximum(np.sqrt(own), math.sqrt(1e-30)).astype(np.float32)
            magnitude = self.magnitude.reshape((1, -1) if self.stored_in_out else (-1, 1))
            if not self.stored_in_out:
                start = max(first - self.row, 0)
                magnitude = magnitude[start : start + len(part)]
            delta = magnitude / norms * adapted - part
        part += delta * self.strength

    def add_squares(self, block: Array, first: int, squares: Array) -> None:
        """Of what is adapted."""
        part, delta = self._part(block, first)
        if part is not None and delta is not None:
            squares[self.columns] += np.square(part + delta, dtype=np.float64).sum(0)

    def _part(self, block: Array, first: int) -> tuple[Array, Array] | tuple[None, None]:
        """What of a block is changed, and scaling · left @ right there."""
        start, stop = max(first, self.row), min(first + len(block), self.row + len(self.left))
        if start >= stop:
            return None, None
        delta = self.left[start - self.row : stop - self.row] @ self.right
        delta *= self.scaling
        return block[start - first : stop - first, self.columns], delta


@dataclass(frozen=True, eq=False)
class Whole(Edit):
    """All of the weight, by another.

    Attributes:
        values: lying as the weight is stored.
        strength: how far to go.
    """

    values: Array
    strength: float

    def change(self, block: Array, first: int, squares: Array | None) -> None:
        """Put the other's values there."""
        new = _flat(self.values, first * block.shape[1], block.size).reshape(block.shape)
        block[...] = new if self.strength == 1 else block + (new - block) * self.strength


@dataclass(frozen=True, eq=False)
class Added(Edit):
    """A vector that is added to the numbers of a weight from `start` on."""

    values: Array
    start: int = 0

    def change(self, block: Array, first: int, squares: Array | None) -> None:
        """Add what falls into these rows."""
        numbers, before = block.reshape(-1), first * block.shape[1]
        start, stop = max(before, self.start), min(before + numbers.size, self.start + self.values.size)
        if start < stop:
            numbers[start - before : stop - before] += _flat(self.values, start - self.start, stop - start)


@dataclass(frozen=True, eq=False)
class Rows(Edit):
    """Some rows of a table, by others.

    Attributes:
        index, values: which, and (rows, dim).
        strength: how far to go.
        is_turned: the table is stored (dim, rows).
    """

    index: Sequence[int]
    values: Array
    strength: float
    is_turned: bool

    def change(self, block: Array, first: int, squares: Array | None) -> None:
        """Put what falls into these rows there."""
        index, stop = np.asarray(self.index), first + len(block)
        if self.is_turned:
            new = wide(self.values[:, first:stop]).T
            block[:, index] += (new - block[:, index]) * self.strength
            return
        inside = (index >= first) & (index < stop)
        here = index[inside] - first
        block[here] += (wide(self.values[inside]) - block[here]) * self.strength


def _flat(values: Array, start: int, count: int) -> Array:
    """Some numbers of an array in the order of its last axis, of which no more is copied, however it lies."""
    return wide(values.flat[start : start + count])

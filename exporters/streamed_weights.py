"""Folded weights that are computed while they are written: no more of one is in memory than a block of its rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import onnx_ir as ir

from lora_fx import ExportError

from .onnx_weights import Array

# Elements of a block. Smaller weights are computed as a whole, which costs nothing.
BLOCK = 1 << 20

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Product:
    """scaling · left @ right, added to the rows and columns of a weight from `row` and `column` on.

    Attributes:
        left, right: (rows, r) and (r, columns).
        scaling, strength: what multiplies the product, and what multiplies all that is added.
        row, column: where it begins.
        magnitude: of each output, with DoRA: these are the columns of a weight that is stored (in, out), else the rows.
        stored_in_out: how the weight is stored.
    """

    left: Array
    right: Array
    scaling: float
    strength: float
    row: int = 0
    column: int = 0
    magnitude: Array | None = None
    stored_in_out: bool = False

    @property
    def needs_norms(self) -> bool:
        """Whether it takes all rows to know what is added to one."""
        return self.magnitude is not None and self.stored_in_out

    def add_to(self, block: Array, first: int, squares: Array | None) -> None:
        """Add what falls into the rows from `first` on; `squares` are the sums that `sum_squares` made."""
        part, delta = self._part(block, first)
        if part is None or delta is None:
            return
        if self.magnitude is not None:
            adapted = part + delta
            own = np.square(adapted, dtype=np.float64).sum(1, keepdims=True) if squares is None else squares
            norms = np.maximum(np.sqrt(own), math.sqrt(1e-30)).astype(np.float32)
            shape = (1, -1) if self.stored_in_out else (-1, 1)
            magnitude = self.magnitude.reshape(shape)
            if not self.stored_in_out:
                start = max(first - self.row, 0)
                magnitude = magnitude[start : start + len(part)]
            delta = magnitude / norms * adapted - part
        part += delta * self.strength

    def sum_squares(self, block: Array, first: int, squares: Array) -> None:
        """Add the squares of what is adapted, of each column."""
        part, delta = self._part(block, first)
        if part is not None and delta is not None:
            squares += np.square(part + delta, dtype=np.float64).sum(0)

    def _part(self, block: Array, first: int) -> tuple[Array, Array] | tuple[None, None]:
        """What of a block is changed, and scaling · left @ right there."""
        start, stop = max(first, self.row), min(first + len(block), self.row + len(self.left))
        if start >= stop:
            return None, None
        delta = self.left[start - self.row : stop - self.row] @ self.right
        delta *= self.scaling
        return block[start - first : stop - first, self.column : self.column + self.right.shape[1]], delta


@dataclass
class Written:
    """What writing a weight has come to: squared norms.

    Attributes:
        before, after: of the old and the new value.
        added, lost: of their difference, and of what rounding took.
    """

    before: float = 0.0
    after: float = 0.0
    added: float = 0.0
    lost: float = 0.0


class StreamedTensor(ir.LazyTensor):
    """The new value of an initializer whose old one lies in a file of weights.

    Args:
        old: the old value.
        products: what is added to it.
        paths: the adapter's names, for messages.
    """

    def __init__(self, old: ir.ExternalTensor, products: Sequence[Product], paths: tuple[str, ...]) -> None:
        super().__init__(self._whole, old.dtype, old.shape, name=str(old.name))
        self._old, self._products, self._paths = old, products, paths
        self.written = Written()

    def _whole(self) -> ir.TensorProtocol:
        array = np.concatenate(list(self._blocks()))
        return ir.Tensor(array, dtype=self._old.dtype, name=str(self._old.name))

    def tofile(self, file: IO[bytes]) -> None:
        """Compute and write it, block by block."""
        for block in self._blocks():
            file.write(block.tobytes())

    def _blocks(self) -> Iterator[Array]:
        self.written = told = Written()
        stored = self._old.dtype.numpy()
        norms = [self._squares_of(product) if product.needs_norms else None for product in self._products]
        for first, old in self._stored():
            exact = old.copy()
            for product, squares in zip(self._products, norms, strict=True):
                product.add_to(exact, first, squares)
            with np.errstate(over="ignore", invalid="ignore"):
                new = exact.astype(stored, copy=False)
                back = new.astype(exact.dtype, copy=False)
            if not np.isfinite(back).all():
                raise ExportError(
                    f"folding {', '.join(self._paths)} makes values of {self._old.name!r} that "
                    f"{self._old.dtype.name} cannot hold; fold into a float32 file"
                )
            told.before, told.after = told.before + _squares(old), told.after + _squares(exact)
            if back is not exact:
                told.lost += _squares(back - exact)
            told.added += _squares(np.subtract(exact, old, out=old))
            yield new

    def _stored(self) -> Iterator[tuple[int, Array]]:
        """(first row, rows) of the old value, in a type to sum in."""
        stored = self._old.dtype.numpy()
        rows, columns = self._old.shape.numpy()
        step = max(1, BLOCK // max(1, columns))
        with open(self._old.path, "rb") as data:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                data.seek((self._old.offset or 0) + first * columns * stored.itemsize)
                old = np.fromfile(data, stored, count * columns).reshape(count, columns)
                yield first, old.astype(np.float64 if stored == np.float64 else np.float32, copy=False)

    def _squares_of(self, product: Product) -> Array:
        squares = np.zeros(product.right.shape[1])
        for first, old in self._stored():
            product.sum_squares(old, first, squares)
        return squares


def can_stream(value: ir.Value) -> bool:
    """Whether an initializer is a large matrix of floats in a file beside the graph."""
    old = value.const_value
    if not isinstance(old, ir.ExternalTensor) or old.dtype not in _FLOATS or len(old.shape) != 2:
        return False
    is_packed = any(node.op_type == "MatMulNBits" for node, _ in value.uses())
    return not is_packed and math.prod(old.shape.numpy()) > BLOCK and os.path.isfile(old.path)


def _squares(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))

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
        factors: the scalings, one after the other.
        row, column: where it begins.
    """

    left: Array
    right: Array
    factors: tuple[float, ...]
    row: int = 0
    column: int = 0

    def add_to(self, block: Array, first: int) -> None:
        """Add what falls into the rows from `first` on."""
        start, stop = max(first, self.row), min(first + len(block), self.row + len(self.left))
        if start >= stop:
            return
        added = self.left[start - self.row : stop - self.row] @ self.right
        for factor in self.factors:
            added *= factor
        block[start - first : stop - first, self.column : self.column + self.right.shape[1]] += added


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
        rows, columns = self._old.shape.numpy()
        step = max(1, BLOCK // max(1, columns))
        with open(self._old.path, "rb") as data:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                data.seek((self._old.offset or 0) + first * columns * stored.itemsize)
                old = np.fromfile(data, stored, count * columns).reshape(count, columns)
                old = old.astype(np.float64 if stored == np.float64 else np.float32, copy=False)
                exact = old.copy()
                for product in self._products:
                    product.add_to(exact, first)
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

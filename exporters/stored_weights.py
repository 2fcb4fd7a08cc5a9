"""The values of a weight as an ONNX file stores it, whatever its type: float32 out, and rounded once in.

A weight is seen as a matrix of which some rows are read, or made, at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from lora_fx import ExportError

from .nbits import dequantize, quantize, unpacked
from .onnx_weights import Array

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows of a weight in the form that the file has.

    Attributes:
        parts: {initializer: (where its numbers begin, its numbers)}; several for a quantized weight.
        stored: the values that these hold.
    """

    parts: Mapping[ir.Value, tuple[int, Array]]
    stored: Array


class Stored(Protocol):
    """A weight of a file, as a matrix; it stays what it is when its initializers get other values."""

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The initializers that hold it."""

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """What these hold."""

    @property
    def matrix(self) -> tuple[int, int]:
        """How many rows and columns it has."""

    @property
    def dtype(self) -> str:
        """What its form is called in a report."""

    def read(self, first: int, stop: int) -> Array:
        """Some rows, in float32 or float64, in memory of their own."""

    def encode(self, first: int, old: Array, exact: Array, what: str) -> Encoded:
        """Rows from `first` on in the form of the file; `old` are those that it has.

        Args:
            what: is folded, for messages.

        Raises:
            ExportError: if they leave its range.
        """


@dataclass(frozen=True, eq=False)
class Floats:
    """A weight of floats, whose first `leading` axes are rows."""

    value: ir.Value
    tensor: ir.TensorProtocol
    leading: int

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The initializer."""
        return (self.value,)

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """What it holds."""
        return (self.tensor,)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns)."""
        shape = self.tensor.shape.numpy()
        return math.prod(shape[: self.leading]), math.prod(shape[self.leading :])

    @property
    def dtype(self) -> str:
        """ONNX's name of the type."""
        return self.tensor.dtype.name

    def read(self, first: int, stop: int) -> Array:
        """Some rows."""
        columns = self.matrix[1]
        numbers = numbers_of(self.tensor, first * columns, stop * columns)
        return numbers.astype(np.float64 if numbers.dtype == np.float64 else np.float32).reshape(-1, columns)

    def encode(self, first: int, old: Array, exact: Array, what: str) -> Encoded:
        """Rounded once."""
        with np.errstate(over="ignore", invalid="ignore"):  # whether the result is finite is looked at below
            array = np.ascontiguousarray(exact, self.tensor.dtype.numpy())
            stored = array.astype(exact.dtype, copy=False)
        if not np.isfinite(stored).all():
            raise ExportError(
                f"folding {what} makes values of {self.value.name!r} that {self.dtype} cannot hold; fold into a "
                "float32 file"
            )
        return Encoded({self.value: (first * self.matrix[1], array.reshape(-1))}, stored)


@dataclass(frozen=True, eq=False)
class NBits:
    """A weight of MatMulNBits.

    Attributes:
        values, tensors: what holds it: the packed values, their scales, and zero points unless blocks are symmetric.
        in_features, bits, block_size: as in `nbits`.
    """

    values: tuple[ir.Value, ...]
    tensors: tuple[ir.TensorProtocol, ...]
    in_features: int
    bits: int
    block_size: int

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.tensors[0].shape.numpy()[0]), self.in_features

    @property
    def dtype(self) -> str:
        """By the bits."""
        return f"int{self.bits}"

    def read(self, first: int, stop: int) -> Array:
        """Some outputs' weights."""
        return self.decoded(*self._rows(first, stop))

    def decoded(self, blob: Array, scales: Array, zero_points: Array | None = None) -> Array:
        """The weights, float32, that such arrays hold."""
        sizes = {"in_features": self.in_features, "bits": self.bits, "block_size": self.block_size}
        return dequantize(blob, scales, zero_points, **sizes)

    def encode(self, first: int, old: Array, exact: Array, what: str) -> Encoded:
        """Quantized again in the same blocks.

        Outputs whose weights are the old ones keep their bytes: another tool may have found better scales for them.
        """
        was = self._rows(first, first + len(exact))
        blob, scales, zero_points = quantize(
            exact,
            bits=self.bits,
            block_size=self.block_size,
            symmetric=len(self.values) == 2,
            dtype_of_scales=was[1].dtype,
        )
        if not np.isfinite(scales).all():
            raise ExportError(
                f"folding {what} makes values of {self.values[0].name!r} that its scales cannot hold; fold the base "
                "file"
            )
        new = [blob, scales]
        if zero_points is not None:  # as floats, they are not packed
            is_packed = was[2].dtype == np.uint8
            new.append(zero_points if is_packed else unpacked(zero_points, self.bits)[:, : scales.shape[1]])
        kept = (exact == old).all(axis=1)
        arrays = [_rows(before, after, kept) for before, after in zip(was, new, strict=True)]
        parts = {
            value: (array.size // max(1, len(exact)) * first, array.reshape(-1))
            for value, array in zip(self.values, arrays, strict=True)
        }
        return Encoded(parts, self.decoded(*arrays))

    def _rows(self, first: int, stop: int) -> list[Array]:
        """What the initializers hold of some outputs, (outputs, ...); the packed values in blocks."""
        arrays = []
        for tensor in self.tensors:
            per_row, rest = divmod(tensor.size, max(1, self.matrix[0]))
            if rest:
                raise ValueError(f"{tensor.name!r} does not have the same for each of {self.matrix[0]} outputs")
            arrays.append(numbers_of(tensor, first * per_row, stop * per_row).reshape(stop - first, per_row))
        blocks = int(self.tensors[0].shape.numpy()[1])
        return [arrays[0].reshape(stop - first, blocks, -1), *arrays[1:]]


def _rows(old: Array, new: Array, kept: Array) -> Array:
    """The old rows where they are kept, and the new ones elsewhere, in the old one's type and shape."""
    out = len(kept)
    rows = np.where(kept[:, None], old.reshape(out, -1), new.reshape(out, -1).astype(old.dtype))
    return rows.reshape(old.shape)


def stored_weight(value: ir.Value, leading: int = 1) -> Stored:
    """The weight that an initializer holds, or the packed values of.

    Args:
        leading: how many of its axes are rows, if it is not quantized.

    Raises:
        ExportError: if it is of a type that no weight has.
    """
    nbits = nbits_of(value)
    if nbits is not None:
        return nbits
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype not in _FLOATS:
        raise ExportError(f"{value.name!r} is {tensor.dtype.name}; weights to fold into are floats or MatMulNBits'")
    return Floats(value, tensor, leading)


def nbits_of(value: ir.Value) -> NBits | None:
    """The quantized weight whose packed values an initializer holds; None if it is not quantized.

    Raises:
        ExportError: if it is quantized in a form whose values cannot be told.
    """
    node = next((node for node, i in value.uses() if node.op_type == "MatMulNBits" and i == 1), None)
    if node is None:
        return None
    scales, zero_points, order = (node.inputs[i] if len(node.inputs) > i else None for i in (2, 3, 4))
    parts = [part for part in (value, scales, zero_points) if part is not None]
    tensors = [part.const_value for part in parts if part.const_value is not None]
    if order is not None or scales is None or len(tensors) < len(parts):
        what = "orders its inputs by g_idx" if order is not None else "has scales that are computed"
        raise ExportError(f"{value.name!r} of {node.name!r} {what}; fold into the file before it was quantized")
    return NBits(
        tuple(parts),
        tuple(tensors),
        in_features=node.attributes["K"].as_int(),
        bits=node.attributes["bits"].as_int() if "bits" in node.attributes else 4,
        block_size=node.attributes["block_size"].as_int(),
    )


def numbers_of(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Some numbers of a tensor in its own type, in a row; no more is read of a file than these."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy().reshape(-1)[start:stop]
    dtype = tensor.dtype.numpy()
    with open(tensor.path, "rb") as data:
        data.seek((tensor.offset or 0) + start * dtype.itemsize)
        return np.frombuffer(data.read((stop - start) * dtype.itemsize), dtype)


def read_weight(value: ir.Value) -> Array:
    """The value of a weight, float32 (float64 if it is stored so), in the initializer's shape; (out, in) if quantized.

    Raises:
        ExportError: if it is of a type that no weight has.
    """
    stored = stored_weight(value)
    return stored.read(0, stored.matrix[0]).reshape(shape_of(value))


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of what `read_weight` reads."""
    nbits = nbits_of(value)
    if nbits is not None:
        return nbits.matrix
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def stored_bytes(value: ir.Value) -> bytes:
    """The bytes of all that holds the weight."""
    nbits = nbits_of(value)
    tensors = (value.const_value,) if nbits is None else nbits.tensors
    return b"".join(tensor.tobytes() for tensor in tensors if tensor is not None)

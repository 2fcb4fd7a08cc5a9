"""The values of a weight as an ONNX file stores it, whatever its type: float32 out, and rounded once in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx import ExportError

from .nbits import dequantize, quantize, unpacked
from .onnx_weights import Array

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Rounded:
    """A new value in the form that the file has.

    Attributes:
        tensors: {initializer: its new tensor}; several for a quantized weight.
        stored: the value that these hold, as float32.
        dtype: what the file's form is called in a report.
    """

    tensors: Mapping[ir.Value, ir.TensorProtocol]
    stored: Array
    dtype: str

    @property
    def array(self) -> Array:
        """The new value in the file's type, of a weight that is not quantized."""
        (tensor,) = self.tensors.values()
        return tensor.numpy()


@dataclass(frozen=True, eq=False)
class NBits:
    """A weight of MatMulNBits.

    Attributes:
        blob, scales, zero_points: the initializers that hold it; no zero points if blocks are symmetric.
        in_features, bits, block_size: as in `nbits`.
    """

    blob: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    in_features: int
    bits: int
    block_size: int

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The initializers."""
        return (self.blob, self.scales) if self.zero_points is None else (self.blob, self.scales, self.zero_points)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(_array(self.blob)), self.in_features

    def arrays(self) -> list[Array]:
        """What the initializers hold."""
        return [_array(value) for value in self.values]

    def decoded(self, blob: Array, scales: Array, zero_points: Array | None = None) -> Array:
        """The weight (out, in), float32, that such arrays hold."""
        sizes = {"in_features": self.in_features, "bits": self.bits, "block_size": self.block_size}
        return dequantize(blob, scales, zero_points, **sizes)


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
    if order is not None or scales is None or any(part.const_value is None for part in parts):
        what = "orders its inputs by g_idx" if order is not None else "has scales that are computed"
        raise ExportError(f"{value.name!r} of {node.name!r} {what}; fold into the file before it was quantized")
    return NBits(
        value,
        scales,
        zero_points,
        in_features=node.attributes["K"].as_int(),
        bits=node.attributes["bits"].as_int() if "bits" in node.attributes else 4,
        block_size=node.attributes["block_size"].as_int(),
    )


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def read_weight(value: ir.Value) -> Array:
    """The value of a weight, float32 (float64 if it is stored so), in the initializer's shape; (out, in) if quantized.

    Raises:
        ExportError: if it is of a type that no weight has.
    """
    nbits = nbits_of(value)
    if nbits is not None:
        return nbits.decoded(*nbits.arrays())
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype not in _FLOATS:
        raise ExportError(f"{value.name!r} is {tensor.dtype.name}; weights to fold into are floats or MatMulNBits'")
    return tensor.numpy().astype(np.float64 if tensor.dtype == ir.DataType.DOUBLE else np.float32)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of what `read_weight` reads."""
    nbits = nbits_of(value)
    if nbits is not None:
        return nbits.shape
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def stored_bytes(value: ir.Value) -> bytes:
    """The bytes of all that holds the weight."""
    nbits = nbits_of(value)
    parts = [part.const_value for part in (nbits.values if nbits is not None else (value,))]
    return b"".join(part.tobytes() for part in parts if part is not None)


def rounded(value: ir.Value, exact: Array) -> Rounded:
    """`exact` in the type of the initializer; quantized again in the same blocks, if it is quantized.

    Raises:
        ExportError: if it leaves the type's range.
    """
    nbits = nbits_of(value)
    if nbits is not None:
        return _quantized(nbits, exact)
    tensor = value.const_value
    assert tensor is not None
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(exact, tensor.dtype.numpy())
    stored = array.astype(exact.dtype, copy=False)
    if not np.isfinite(stored).all():
        raise ExportError(
            f"folding makes values of {value.name!r} that {tensor.dtype.name} cannot hold; fold into a float32 file"
        )
    new = ir.Tensor(array, dtype=tensor.dtype, name=str(value.name))
    return Rounded({value: new}, stored, tensor.dtype.name)


def _quantized(nbits: NBits, exact: Array) -> Rounded:
    """Outputs whose weights are the old ones keep their bytes: another tool may have found better scales for them."""
    old = nbits.arrays()
    blob, scales, zero_points = quantize(
        exact,
        bits=nbits.bits,
        block_size=nbits.block_size,
        symmetric=nbits.zero_points is None,
        dtype_of_scales=old[1].dtype,
    )
    if not np.isfinite(scales).all():
        raise ExportError(
            f"folding makes values of {nbits.blob.name!r} that its scales cannot hold; fold the base file"
        )
    new = [blob, scales]
    if zero_points is not None:  # as floats, they are not packed
        is_packed = old[2].dtype == np.uint8
        new.append(zero_points if is_packed else unpacked(zero_points, nbits.bits)[:, : scales.shape[1]])
    kept = (exact == nbits.decoded(*old)).all(axis=1)
    arrays = [_rows(before, after, kept) for before, after in zip(old, new, strict=True)]
    tensors: dict[ir.Value, ir.TensorProtocol] = {
        value: ir.tensor(array, name=str(value.name)) for value, array in zip(nbits.values, arrays, strict=True)
    }
    return Rounded(tensors, nbits.decoded(*arrays), f"int{nbits.bits}")


def _rows(old: Array, new: Array, kept: Array) -> Array:
    """The old rows where they are kept, and the new ones elsewhere, in the old one's type and shape."""
    out = len(kept)
    rows = np.where(kept[:, None], old.reshape(out, -1), new.reshape(out, -1).astype(old.dtype))
    return rows.reshape(old.shape)

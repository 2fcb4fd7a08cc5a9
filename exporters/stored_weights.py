"""The values of a weight as an ONNX file stores it, whatever its type: float32 out, and rounded once in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx import ExportError

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


def read_weight(value: ir.Value) -> Array:
    """The value of a weight, float32 (float64 if it is stored so), in the initializer's shape; (out, in) if quantized.

    Raises:
        ExportError: if it is of a type that no weight has.
    """
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype not in _FLOATS:
        raise ExportError(f"{value.name!r} is {tensor.dtype.name}; weights to fold into are floats or MatMulNBits'")
    return tensor.numpy().astype(np.float64 if tensor.dtype == ir.DataType.DOUBLE else np.float32)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of what `read_weight` reads."""
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def stored_bytes(value: ir.Value) -> bytes:
    """The bytes of all that holds the weight."""
    assert value.const_value is not None
    return value.const_value.tobytes()


def rounded(value: ir.Value, exact: Array) -> Rounded:
    """`exact` in the type of the initializer.

    Raises:
        ExportError: if it leaves the type's range.
    """
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

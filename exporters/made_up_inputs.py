"""Inputs for a file of which nobody gave any: by the names, types and sizes that it has for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from lora_fx import ExportError

from .onnx_weights import Array


def made_up(session: ort.InferenceSession, batch: int, length: int) -> dict[str, Array]:
    """Inputs of a file's own types: small numbers, a mask, no past; a free dimension in front is the batch.

    Raises:
        ExportError: if an input has a type that Python cannot feed.
    """
    random = np.random.default_rng(batch)
    sizes: dict[str, int] = {}
    feed: dict[str, Array] = {}
    for port in session.get_inputs():
        for axis, size in enumerate(port.shape):
            if isinstance(size, str):
                sizes.setdefault(size, batch if axis == 0 else 0 if "past" in size and "+" not in size else length)
    for port in session.get_inputs():
        unnamed = [batch, *[length] * len(port.shape)]
        shape = [
            sizes[size] if isinstance(size, str) else unnamed[axis] if size is None else size
            for axis, size in enumerate(port.shape)
        ]
        dtype = DTYPES.get(port.type)
        if dtype is None:
            raise ExportError(
                f"no input can be made up for {port.name!r}, of {port.type}; pass inputs=[{{name: array}}]"
            )
        if np.dtype(dtype).kind == "f":
            feed[port.name] = random.standard_normal(shape).astype(dtype)
        elif "mask" in port.name or dtype is np.bool_:
            feed[port.name] = np.ones(shape, dtype)
            if len(shape) > 1:
                feed[port.name][-1:, -2:] = 0  # one row ends in padding: whoever drops the mask is found out
        else:
            feed[port.name] = random.integers(0, 2 if "type" in port.name else 7, shape).astype(dtype)
    return feed


# {ONNX Runtime's name of a type: numpy's}, of those that Python can feed.
DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}

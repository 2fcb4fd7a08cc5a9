"""Weights quantized in blocks, as com.microsoft.MatMulNBits takes them.

Each output's weights are cut into blocks along the inputs, the last one filled up. A block has a scale and, unless it
is symmetric, a zero point: weight = (q − zero_point) · scale, with q in 0 ... 2**bits − 1. What is smaller than a byte
is packed, the first one lowest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .onnx_weights import Array


def dequantize(
    blob: Array, scales: Array, zero_points: Array | None, *, in_features: int, bits: int, block_size: int
) -> Array:
    """The weight (out, in), float32.

    Args:
        blob: uint8 (out, blocks, block_size · bits / 8).
        scales: (out, blocks), or the same in one dimension.
        zero_points: uint8 (out, ⌈blocks · bits / 8⌉), packed; floats (out, blocks), which are not; or None for the
            middle of the range.
        in_features: how many inputs there are; blocks may have more.
    """
    out, blocks = blob.shape[:2]
    q = unpacked(blob, bits)[..., :block_size].astype(np.float32)  # (out, blocks, block_size)
    zero: Array = np.full((out, 1, 1), 2 ** (bits - 1), np.float32)
    if zero_points is not None:
        rows = zero_points.reshape(out, -1)
        zero = (unpacked(rows, bits) if rows.dtype == np.uint8 else rows)[:, :blocks, None].astype(np.float32)
    weight: Array = (q - zero) * scales.reshape(out, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(weight.reshape(out, -1)[:, :in_features])


def quantize(
    weight: Array, *, bits: int, block_size: int, symmetric: bool, dtype_of_scales: Any = np.float32
) -> tuple[Array, Array, Array | None]:
    """(blob, scales, zero points) of a weight (out, in), in the shapes that `dequantize` takes.

    Symmetric blocks have no zero points: their largest value, whatever its sign, is the lowest q. The scale is rounded
    to its type first, and q is of the rounded one.
    """
    blocks = _blocks(weight.astype(np.float32), block_size)
    low, high, middle = blocks.min(axis=2, keepdims=True), blocks.max(axis=2, keepdims=True), 2 ** (bits - 1)
    if symmetric:
        exact = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        exact = (high - low) / np.float32(2**bits - 1)
    with np.errstate(over="ignore"):
        scales = exact.astype(dtype_of_scales)
    step = np.where(scales == 0, 1, scales.astype(np.float32))
    zero = np.full_like(step, middle) if symmetric else np.rint(np.clip(-low / step, 0, 2**bits - 1))
    q = np.rint(np.clip(blocks / step + zero, 0, 2**bits - 1))
    zero_points = None if symmetric else _packed(zero[..., 0], bits)
    return _packed(q, bits), scales[..., 0], zero_points


def _blocks(weight: Array, block_size: int) -> Array:
    """(out, blocks, block_size), filled up with zeros."""
    filled = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block_size)))
    return filled.reshape(len(weight), -1, block_size)


def _packed(q: Array, bits: int) -> Array:
    per_byte = 8 // bits
    filled = np.pad(q.astype(np.uint8), [*[(0, 0)] * (q.ndim - 1), (0, -q.shape[-1] % per_byte)])
    parts = filled.reshape(*q.shape[:-1], -1, per_byte) << _shifts(bits)
    packed: Array = np.bitwise_or.reduce(parts, axis=-1)
    return packed


def unpacked(packed: Array, bits: int) -> Array:
    """The numbers in the bytes of the last axis, and what fills up the last byte."""
    parts = (packed[..., None] >> _shifts(bits)) & np.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def _shifts(bits: int) -> Array:
    return np.arange(0, 8, bits, dtype=np.uint8)

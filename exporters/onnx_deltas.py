"""What A and B do to a stored weight, in numpy: the formulas of `lora_fx.layouts` and `lora_fx.dora`.

The sums are taken in float32 at least; whoever stores the result rounds it once.
"""

from __future__ import annotations

import math

import numpy as np

from lora_fx import AdapterError, LowRankArrays

from .onnx_sites import Form
from .onnx_weights import Array


def low_rank_delta(low: LowRankArrays, form: Form, shape: tuple[int, ...]) -> Array:
    """B @ A without its scaling, in the shape that a weight of that form is stored in.

    Raises:
        AdapterError: if A and B are not of such a weight.
    """
    if form.kind == "kernel":
        delta = _kernel_delta(low, form, shape)
    else:
        a, b = low.a.reshape(len(low.a), -1), low.b.reshape(len(low.b), -1)  # (r, in), (out, r)
        delta = a.T @ b.T if form.stored_in_out else b @ a
    if delta.shape != tuple(shape):
        raise AdapterError(
            f"A {list(low.a.shape)} and B {list(low.b.shape)} of {low.path!r} make a delta of the shape "
            f"{list(delta.shape)}, and the file's weight has {list(shape)}; is this adapter of this model?"
        )
    return delta


def _kernel_delta(low: LowRankArrays, form: Form, shape: tuple[int, ...]) -> Array:
    """Of a convolution: (out, in / groups, *k), or (in, out / groups, *k) if it is a transposed one."""
    groups, extent = form.groups, tuple(shape[2:])
    out, r = low.b.shape[:2]
    inputs = shape[0] // groups if form.is_transposed else shape[1]
    fits = low.a.shape[2:] == extent and out % groups == 0 and low.b.ndim == len(shape)
    a = _own_groups(low, groups, inputs) if fits and not form.is_transposed else low.a
    if not fits or a.shape[1] != inputs or len(a) % groups:
        raise AdapterError(
            f"A {list(low.a.shape)} and B {list(low.b.shape)} of {low.path!r} are not of a convolution whose kernel "
            f"is {list(shape)} with {groups} groups; is this adapter of this model?"
        )
    points = math.prod(extent)
    if form.is_transposed:
        by_point = a.reshape(groups, -1, inputs, points)
        delta: Array = np.einsum("goq,gqip->giop", low.b.reshape(groups, out // groups, r), by_point)
        return delta.reshape(groups * inputs, out // groups, *extent)
    product: Array = low.b.reshape(groups, out // groups, -1) @ a.reshape(groups, -1, inputs * points)
    return product.reshape(out, inputs, *extent)


def kernel_factors(low: LowRankArrays, form: Form, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A and B as two convolutions with the same groups take them, the second pointwise.

    Returns:
        (r, in / groups, *k), or (in, r / groups, *k) for a transposed one; and (out, r / groups, 1, ...).
    """
    groups, extent = form.groups, tuple(shape[2:])
    if not form.is_transposed:
        return _own_groups(low, groups, shape[1]), low.b
    by_group = low.a.reshape(groups, -1, shape[0] // groups, *extent)  # (groups, r / groups, in / groups, *k)
    return by_group.swapaxes(1, 2).reshape(shape[0], -1, *extent), low.b


def _own_groups(low: LowRankArrays, groups: int, inputs: int) -> Array:
    """A of the inputs that each group sees, (r, in / groups, *k), of PEFT's (r, in, *k)."""
    if groups == 1 or low.a.shape[1] != groups * inputs or len(low.a) % groups:
        return low.a
    rows = low.a.reshape(groups, -1, groups, inputs, *low.a.shape[2:])
    own: Array = np.stack([rows[group, :, group] for group in range(groups)])
    if np.count_nonzero(rows) != np.count_nonzero(own):
        raise AdapterError(
            f"A of {low.path!r} mixes the {groups} groups of inputs, which the convolution's grouped kernel keeps "
            "apart; it can be computed beside the convolution, and not folded into it"
        )
    return own.reshape(len(low.a), inputs, *low.a.shape[2:])


def experts_delta(low: LowRankArrays, r: int, shape: tuple[int, ...], *, stored_in_out: bool) -> Array:
    """Of a parameter (experts, out, in): A (experts · r, in), B (out, r · experts), the expert fastest in B.

    Args:
        stored_in_out: it is (experts, in, out).
    """
    if len(low.a) % r or low.b.shape[1] != len(low.a):
        raise AdapterError(f"A {list(low.a.shape)} of {low.path!r} is not of experts with r={r} each")
    experts = len(low.a) // r
    down = low.a.reshape(experts, r, -1)
    up = low.b.reshape(len(low.b), r, experts)
    delta: Array = np.einsum("ore,eri->eio" if stored_in_out else "ore,eri->eoi", up, down)
    if delta.shape != tuple(shape):
        raise AdapterError(
            f"A {list(low.a.shape)} and B {list(low.b.shape)} of {low.path!r} with r={r} make a delta of the shape "
            f"{list(delta.shape)}, and the file's weight has {list(shape)}; is this adapter of this model?"
        )
    return delta


def output_norms(weight: Array, form: Form) -> Array:
    """The norm of each output's weights, in the shape that multiplies the weight (DoRA, arXiv 2402.09353)."""
    axes = tuple(range(1, weight.ndim)) if form.kind == "kernel" or not form.stored_in_out else (0,)
    norms: Array = np.sqrt(np.sum(np.square(weight, dtype=np.float64), axis=axes, keepdims=True))
    return np.maximum(norms, math.sqrt(1e-30)).astype(np.float32)


def gain(low: LowRankArrays, adapted: Array, form: Form) -> Array:
    """m / ‖W + ΔW‖ of each output, in the shape that multiplies the weight; `adapted` is W + ΔW."""
    assert low.magnitude is not None
    if form.is_transposed:
        raise AdapterError(f"{low.path!r}: DoRA is not defined for transposed convolutions")
    norms = output_norms(adapted, form)
    if low.magnitude.size != norms.size:
        raise AdapterError(
            f"lora_magnitude_vector of {low.path!r} has {low.magnitude.size} values, and its weight {norms.size} "
            "outputs; is this adapter of this model?"
        )
    scale: Array = low.magnitude.reshape(norms.shape) / norms
    return scale

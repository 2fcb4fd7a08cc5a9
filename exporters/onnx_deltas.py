"""What A and B do to a stored weight, in numpy: the formulas of `lora_fx.layouts` and `lora_fx.dora`.

The sums are taken in float32 at least; whoever stores the result rounds it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_fx import AdapterError, LowRankArrays

from .onnx_sites import Form
from .onnx_weights import Array


@dataclass(frozen=True, eq=False)
class Factors:
    """left @ right, which is added at the rows from `row` on, and at some columns, of a weight seen as a matrix."""

    left: Array
    right: Array
    row: int = 0
    columns: slice = field(default_factory=lambda: slice(None))


def low_rank_factors(low: LowRankArrays, form: Form, shape: tuple[int, ...]) -> list[Factors]:
    """B @ A without its scaling, of a weight that is stored in a shape, as a sum of products.

    The weight is a matrix as it is, or one whose rows are the first axis of a kernel.

    Raises:
        AdapterError: if A and B are not of such a weight.
    """
    if form.kind == "kernel":
        return _kernel_products(low, form, shape)
    a, b = low.a.reshape(len(low.a), -1), low.b.reshape(len(low.b), -1)  # (r, in), (out, r)
    left, right = (a.T, b.T) if form.stored_in_out else (b, a)
    _check_shape(low, (len(left), right.shape[1]), shape)
    return [Factors(left, right)]


def dense(factors: Sequence[Factors], shape: tuple[int, ...], leading: int = 1) -> Array:
    """The sum of products in the shape of the weight, whose first `leading` axes are rows."""
    dtype = np.result_type(*(array for each in factors for array in (each.left, each.right)))
    delta = np.zeros((math.prod(shape[:leading]), math.prod(shape[leading:])), dtype)
    for each in factors:
        delta[each.row : each.row + len(each.left), each.columns] += each.left @ each.right
    return delta.reshape(shape)


def low_rank_delta(low: LowRankArrays, form: Form, shape: tuple[int, ...]) -> Array:
    """What `low_rank_factors` come to, in the shape that a weight of that form is stored in.

    Raises:
        AdapterError: as that.
    """
    return dense(low_rank_factors(low, form, shape), shape)


def _check_shape(low: LowRankArrays, found: tuple[int, ...], shape: tuple[int, ...], more: str = "") -> None:
    if found != tuple(shape):
        raise AdapterError(
            f"A {list(low.a.shape)} and B {list(low.b.shape)} of {low.path!r}{more} make a delta of the shape "
            f"{list(found)}, and the file's weight has {list(shape)}; is this adapter of this model?"
        )


def _kernel_products(low: LowRankArrays, form: Form, shape: tuple[int, ...]) -> list[Factors]:
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
    points, outputs = math.prod(extent), out // groups
    if not form.is_transposed:
        _check_shape(low, (out, inputs, *extent), shape)
        up, down = low.b.reshape(groups, outputs, -1), a.reshape(groups, -1, inputs * points)
        return [Factors(up[g], down[g], g * outputs) for g in range(groups)]
    _check_shape(low, (groups * inputs, outputs, *extent), shape)
    by_point, up = a.reshape(groups, -1, inputs, points), low.b.reshape(groups, outputs, r)
    return [
        Factors(by_point[g, :, :, point].T, up[g].T, g * inputs, slice(point, None, points))
        for g in range(groups)
        for point in range(points)
    ]


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


def experts_factors(low: LowRankArrays, r: int, shape: tuple[int, ...], *, stored_in_out: bool) -> list[Factors]:
    """Of a parameter (experts, out, in): A (experts · r, in), B (out, r · experts), the expert fastest in B.

    The weight is seen as a matrix whose rows are its first two axes.

    Args:
        stored_in_out: it is (experts, in, out).

    Raises:
        AdapterError: if A and B are not of such a weight.
    """
    if len(low.a) % r or low.b.shape[1] != len(low.a):
        raise AdapterError(f"A {list(low.a.shape)} of {low.path!r} is not of experts with r={r} each")
    experts = len(low.a) // r
    down = low.a.reshape(experts, r, -1)
    up = low.b.reshape(len(low.b), r, experts)
    pairs = [(down[e].T, up[:, :, e].T) if stored_in_out else (up[:, :, e], down[e]) for e in range(experts)]
    rows, columns = len(pairs[0][0]), pairs[0][1].shape[1]
    _check_shape(low, (experts, rows, columns), shape, f" with r={r}")
    return [Factors(left, right, e * rows) for e, (left, right) in enumerate(pairs)]


def output_norms(weight: Array, form: Form) -> Array:
    """The norm of each output's weights, in the shape that multiplies the weight (DoRA, arXiv 2402.09353)."""
    axes = tuple(range(1, weight.ndim)) if form.kind == "kernel" or not form.stored_in_out else (0,)
    norms: Array = np.sqrt(np.sum(np.square(weight, dtype=np.float64), axis=axes, keepdims=True))
    return np.maximum(norms, math.sqrt(1e-30)).astype(np.float32)


def gain(low: LowRankArrays, adapted: Array, form: Form) -> Array:
    """m / ‖W + ΔW‖ of each output, in the shape that multiplies the weight; `adapted` is W + ΔW."""
    assert low.magnitude is not None
    norms = output_norms(adapted, form)
    check_magnitude(low, form, norms.size)
    scale: Array = low.magnitude.reshape(norms.shape) / norms
    return scale


def check_magnitude(low: LowRankArrays, form: Form, outputs: int) -> None:
    """Whether an adapter with DoRA has a magnitude for each output of its weight.

    Raises:
        AdapterError: if not.
    """
    assert low.magnitude is not None
    if form.is_transposed:
        raise AdapterError(f"{low.path!r}: DoRA is not defined for transposed convolutions")
    if low.magnitude.size != outputs:
        raise AdapterError(
            f"lora_magnitude_vector of {low.path!r} has {low.magnitude.size} values, and its weight {outputs} outputs; "
            "is this adapter of this model?"
        )

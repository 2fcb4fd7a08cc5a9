"""DoRA (arXiv 2402.09353): W' = m ⊙ (W + s · ΔW) / ‖W + s · ΔW‖, a norm for each output, and m is trained.

‖W + s · L @ R‖² = ‖W‖² + 2 s Σ L ∘ (W Rᵀ) + s² Σ L ∘ (L (R Rᵀ)), so that W + s · ΔW is never built; no gradient goes
through the norm (section 4.3 of the paper). Written in aten ops, for tensors and for `fx.Proxy`, as layouts.py is.
Folding reads the weight anyway, and takes the norms block by block from W + s · ΔW itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .layouts import Kernel, Layout, Matrix, Part, Shape
from .merging import Delta, Summand, full_precision

_aten = torch.ops.aten


def why_no_magnitude(layout: Layout) -> str | None:
    """Why the outputs of such a weight have no norms of their own, or None."""
    if isinstance(layout, (Matrix, Part)) or (isinstance(layout, Kernel) and not layout.is_transposed):
        return None
    kind = "a transposed convolution" if isinstance(layout, Kernel) else "a parameter of three dimensions"
    return f"DoRA is defined for matrices and convolutions, and this is {kind}"


def magnitude_shape(layout: Layout) -> Shape:
    """Shape of m, as PEFT's files have it: (out,), or (1, out, 1, …) for a convolution."""
    if isinstance(layout, Kernel):
        return 1, layout.out_features, *(1 for _ in layout.extent)
    return (layout.out_features,)


# Below any square of a norm that means something; an output without weights has this one, and its m the same.
_LEAST = 1e-30


def weight_norm(layout: Layout, weight: Any, a: Any, b: Any, scaling: float) -> Any:
    """‖W + scaling · ΔW‖ of each output of the layout, (out,), in the dtype that all of them have."""
    matrices = layout.matrices(weight)
    left, right = layout.factors(_aten.detach.default(a), _aten.detach.default(b))
    if layout.stored_in_out:
        near, along = right, 1  # (n, q, columns)
        far = _aten.transpose.int(left, 1, 2)  # (n, q, rows)
        across, gram = _aten.bmm.default(far, matrices), _aten.bmm.default(far, left)
        added = _aten.baddbmm.default(across, gram, near, beta=2 * scaling, alpha=scaling * scaling)
    else:
        near, along = left, 2  # (n, rows, q)
        far = _aten.transpose.int(right, 1, 2)  # (n, columns, q)
        across, gram = _aten.bmm.default(matrices, far), _aten.bmm.default(right, far)
        added = _aten.baddbmm.default(across, near, gram, beta=2 * scaling, alpha=scaling * scaling)
    own = _aten.linalg_vector_norm.default(matrices, 2, [along])
    squares = _aten.addcmul.default(_aten.sum.dim_IntList(_aten.mul.Tensor(near, added), [along]), own, own)
    norms = _aten.reshape.default(_aten.sqrt.default(_aten.clamp_min.default(squares, _LEAST)), [-1])
    return layout.own_outputs(norms)


def gain(layout: Layout, weight: Any, a: Any, b: Any, magnitude: Any, scaling: float) -> Any:
    """m / ‖W + scaling · ΔW‖ of each output of the whole weight, (out,): 1 for those that are not adapted."""
    norm = weight_norm(layout, weight, a, b, scaling)
    return layout.among_outputs(_aten.div.Tensor(_aten.reshape.default(magnitude, [-1]), norm), 1.0)


def gain_of(layout: Layout, magnitude: torch.Tensor, norm: torch.Tensor, delta: Delta) -> torch.Tensor:
    """The same, of exact norms, (out,) in their dtype.

    Where ΔW is zero, m may never have been trained: then it is the norm as `weight_norm` or PEFT rounded it, summing
    all weights of an output in float32 one after the other, and the gain is 1.

    Args:
        layout: of the weight.
        magnitude: as it is stored.
        norm: of each output.
        delta: scaling · ΔW.
    """
    ratio = magnitude.reshape(-1).to(norm.dtype) / norm
    if delta.is_zero():
        terms = delta.left.shape[1] if layout.stored_in_out else delta.right.shape[2]
        # A magnitude of 16 bits is off by more from the start, and the adapted graph takes it as it is.
        eps = min(torch.finfo(magnitude.dtype).eps, torch.finfo(torch.float32).eps)
        ratio = torch.where((ratio - 1).abs() <= eps * (2 + terms**0.5 / 4), 1.0, ratio)
    return layout.among_outputs(ratio, 1.0)  # type: ignore[no-any-return]


def scaled_outputs(layout: Layout, b: Any, gains: Any) -> Any:
    """B with each output times its gain, which is what the low-rank part of DoRA's delta is."""
    return b * layout.own_outputs(gains).reshape(-1, *(1 for _ in b.shape[1:]))


def gain_on_weight(layout: Layout, gains: Any, groups: int) -> Any:
    """What the weight itself is multiplied with besides 1, as a `Delta` has it: (n, rows, 1) or (n, 1, columns)."""
    return (gains - 1).reshape(1, 1, -1) if layout.stored_in_out else (gains - 1).reshape(groups, -1, 1)


def norms_by_block(
    layout: Layout, blocks: Iterable[tuple[int, slice, torch.Tensor]], delta: Summand, shape: tuple[int, ...]
) -> torch.Tensor:
    """‖W + ΔW‖ of each output of the layout, (out,), in float64.

    Args:
        layout: of the weight.
        blocks: (matrix, rows, these rows of W in the delta's dtype), of all of W.
        delta: scaling · ΔW.
        shape: (n, rows, columns) of W.
    """
    count, height, columns = shape
    squares = torch.zeros(columns if layout.stored_in_out else count * height, dtype=torch.float64)
    buffer: torch.Tensor | None = None
    for n, rows, block in blocks:
        squares = squares.to(block.device)
        buffer = torch.empty_like(block) if buffer is None or len(buffer) < len(block) else buffer
        with full_precision():
            wide = delta.add_to(block, n, rows, buffer[: len(block)]).double()
        if layout.stored_in_out:
            squares += wide.square_().sum(0)
        else:
            squares[n * height + rows.start : n * height + rows.start + len(block)] = wide.square_().sum(1)
    return layout.own_outputs(squares.clamp_min_(_LEAST).sqrt_())  # type: ignore[no-any-return]

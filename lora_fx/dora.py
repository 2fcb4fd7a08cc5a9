"""DoRA (arXiv 2402.09353): W' = m ⊙ (W + s · ΔW) / ‖W + s · ΔW‖, a norm for each output, and m is trained.

‖W + s · L @ R‖² = ‖W‖² + 2 s Σ L ∘ (W Rᵀ) + s² Σ L ∘ (L (R Rᵀ)), so that W + s · ΔW is never built; no gradient goes
through the norm (section 4.3 of the paper). Written in aten ops, for tensors and for `fx.Proxy`, as layouts.py is.
"""

from __future__ import annotations

from typing import Any

import torch

from .layouts import Kernel, Layout, Matrix, Shape

_aten = torch.ops.aten


def why_no_magnitude(layout: Layout) -> str | None:
    """Why the outputs of such a weight have no norms of their own, or None."""
    if isinstance(layout, Matrix) or (isinstance(layout, Kernel) and not layout.is_transposed):
        return None
    kind = "a transposed convolution" if isinstance(layout, Kernel) else "a parameter of three dimensions"
    return f"DoRA is defined for matrices and convolutions, and this is {kind}"


def magnitude_shape(layout: Layout) -> Shape:
    """Shape of m, as PEFT's files have it: (out,), or (1, out, 1, …) for a convolution."""
    if isinstance(layout, Kernel):
        return 1, layout.out_features, *(1 for _ in layout.extent)
    return (layout.out_features,)


def weight_norm(layout: Layout, weight: Any, a: Any, b: Any, scaling: float) -> Any:
    """‖W + scaling · ΔW‖ of each output, (out,), in the dtype that all of them have."""
    rows_are_outputs = not layout.stored_in_out
    matrices = layout.matrices(weight)
    left, right = layout.factors(_aten.detach.default(a), _aten.detach.default(b))
    if rows_are_outputs:
        near, far, along = left, _aten.transpose.int(right, 1, 2), 2  # (n, rows, q), (n, columns, q)
        across = _aten.matmul.default(matrices, far)
        inner = _aten.matmul.default(near, _aten.matmul.default(right, far))
    else:
        near, far, along = right, _aten.transpose.int(left, 1, 2), 1  # (n, q, columns), (n, q, rows)
        across = _aten.matmul.default(far, matrices)
        inner = _aten.matmul.default(_aten.matmul.default(far, left), near)
    own = _aten.linalg_vector_norm.default(matrices, 2, [along])
    added = _aten.add.Tensor(_aten.mul.Tensor(across, 2 * scaling), _aten.mul.Tensor(inner, scaling * scaling))
    squares = _aten.add.Tensor(
        _aten.mul.Tensor(own, own), _aten.sum.dim_IntList(_aten.mul.Tensor(near, added), [along])
    )
    return _aten.reshape.default(_aten.sqrt.default(_aten.clamp_min.default(squares, 0.0)), [-1])


def gain(layout: Layout, weight: Any, a: Any, b: Any, magnitude: Any, scaling: float) -> Any:
    """m / ‖W + scaling · ΔW‖ of each output, (out,); 0 for an output without weights, whose m is 0 too."""
    norm = weight_norm(layout, weight, a, b, scaling)
    divisor = _aten.add.Tensor(norm, _aten.eq.Scalar(norm, 0))
    return _aten.div.Tensor(_aten.reshape.default(magnitude, [-1]), divisor)

"""W + Σ scaling · B @ A for one weight, in one pass over its rows, rounded once; and what that did to it.

The rows go through the cache in blocks of 1 MiB: each is read, added to, rounded and measured while it is there.
(PEFT's `merge` writes the whole delta to memory, scales it there, and adds it: three passes more.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Elements of one block. A GPU has no use for small ones, and each would cost it a launch.
_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 28

# Losses below this share of the delta are told by their upper bound instead of being measured.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Delta:
    """scaling · left @ right, in the order in which the weight is stored: left (n, rows, r), right (n, r, columns)."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        weight_norm, delta_norm: Frobenius norms of the weight before, and of the sum of the deltas.
        kept: 1 − ‖rounding error‖ / ‖delta‖: the share of the delta that the weight's dtype keeps; 1 for no delta.
        is_finite: whether every element of the result is.
    """

    weight_norm: float
    delta_norm: float
    kept: float
    is_finite: bool


def merge(
    weight: torch.Tensor, deltas: Sequence[Delta], into: torch.Tensor, *, weight_norm: float | None = None
) -> Merged:
    """Write weight + Σ deltas to `into`.

    Args:
        weight: (n, rows, columns): one matrix, or one for each group or expert.
        deltas: in the dtype to accumulate in, which is at least the weight's.
        into: the weight's shape and dtype; the weight itself, or other memory.
        weight_norm: what `norm_if_finite` told; then finiteness is not looked at once more.
    """
    before = after = lost = 0.0
    accumulate = deltas[0].left.dtype
    if all(_is_zero(delta) for delta in deltas):
        deltas = ()  # the same bits, −0.0 among them, which adding 0.0 would change
    with _full_precision():
        for n, rows, block in _blocks(weight, accumulate):
            rounded = into[n, rows]
            before += _squares(block) if weight_norm is None else 0.0
            total = _sum(block, deltas, n, rows, rounded if rounded.dtype == accumulate else block)
            after += _squares(total) if weight_norm is None else 0.0
            if total is not rounded:
                rounded.copy_(total)
                lost += _squares(total.sub_(rounded))  # infinite where the narrower dtype is too narrow
    delta_norm = _norm_of_sum(deltas)
    if weight_norm is None:
        weight_norm, norm = _root(before, weight), _root(after, into)
    else:
        norm = weight_norm + delta_norm
    if weight.dtype == accumulate:
        lost = _lost_to_rounding(weight, deltas, into, norm, delta_norm) ** 2
    return Merged(weight_norm, delta_norm, _share_kept(lost, delta_norm), math.isfinite(norm) and math.isfinite(lost))


def norm_if_finite(weight: torch.Tensor, deltas: Sequence[Delta]) -> float | None:
    """‖weight‖, if norms alone tell that weight + Σ deltas has no NaN and no infinite element; None: no verdict."""
    squares = sum(_squares(block) for _, _, block in _blocks(weight, deltas[0].left.dtype))
    norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
    largest = norm
    for delta in deltas:  # no element of L @ R is above ‖L‖ ‖R‖
        largest += abs(delta.scaling) * float(delta.left.norm()) * float(delta.right.norm())
    return norm if largest < torch.finfo(weight.dtype).max / 2 else None  # NaN is below nothing


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(matrix, rows, those rows in `dtype`): views of the weight if it is of that dtype, else one buffer throughout."""
    count, rows, columns = weight.shape
    most = max(1, (_BLOCK if weight.device.type == "cpu" else _GPU_BLOCK) // max(1, columns))
    # Blocks of about one size: kernels for a few rows left over sum in an order of their own, and lose digits.
    step = max(1, -(-rows // -(-rows // most))) if rows else 1
    buffer = None if weight.dtype == dtype or not count else torch.empty_like(weight[0, :step], dtype=dtype)
    for n in range(count):
        for start in range(0, rows, step):
            block = weight[n, start : start + step]
            yield n, slice(start, start + step), block if buffer is None else buffer[: len(block)].copy_(block)


def _sum(block: torch.Tensor, deltas: Sequence[Delta], n: int, rows: slice, out: torch.Tensor) -> torch.Tensor:
    total = block if deltas else out.copy_(block)
    for delta in deltas:  # (rows, r) @ (r, columns) -> (rows, columns)
        total = torch.addmm(total, delta.left[n, rows], delta.right[n], alpha=delta.scaling, out=out)
    return total


def _lost_to_rounding(
    weight: torch.Tensor, deltas: Sequence[Delta], into: torch.Tensor, norm: float, delta_norm: float
) -> float:
    """‖into − (W + Δ)‖ where sums were made in the weight's own dtype: measured in float64 only if it could matter."""
    bound = torch.finfo(weight.dtype).eps / 2 * norm  # rounding moves each element by eps / 2 of itself at most
    is_overwritten = weight.data_ptr() == into.data_ptr()
    if bound < _NEGLIGIBLE * delta_norm or weight.dtype == torch.float64 or is_overwritten:
        return bound
    wide = [Delta(d.left.double(), d.right.double(), d.scaling) for d in deltas]
    lost = 0.0
    for n, rows, block in _blocks(weight, torch.float64):
        lost += _squares(_sum(block, wide, n, rows, block) - into[n, rows])
    return math.sqrt(lost)


def _share_kept(lost_squared: float, delta_norm: float) -> float:
    return max(0.0, 1 - math.sqrt(lost_squared) / delta_norm) if delta_norm else 1.0


def _norm_of_sum(deltas: Sequence[Delta]) -> float:
    """‖Σ s L R‖ without forming it: ⟨s L R, t M N⟩ = s t · tr((Lᵀ M)(N Rᵀ)), products of r × r."""
    squared = 0.0
    for one in deltas:
        for other in deltas:
            inner = (one.left.mT @ other.left).double() * (one.right @ other.right.mT).double()
            squared += one.scaling * other.scaling * float(inner.sum())
    return math.sqrt(max(squared, 0.0))


def _is_zero(delta: Delta) -> bool:
    """Whether a factor is zero throughout, and the other has no NaN or Inf to multiply it with."""
    factors = (delta.left, delta.right)
    return not all(bool(f.any()) for f in factors) and all(bool(torch.isfinite(f).all()) for f in factors)


def _squares(values: torch.Tensor) -> float:
    flat = values.reshape(-1)
    squares = float(torch.dot(flat, flat))
    if math.isfinite(squares) or flat.dtype == torch.float64:
        return squares
    return _squares(flat.double())  # squares overflow where their root does not


def _root(squares: float, values: torch.Tensor) -> float:
    """The norm of `values` from the sum of their squares, which may overflow where the norm does not."""
    if math.isfinite(squares):
        return math.sqrt(squares)
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the user allows in training (TF32, bfloat16)."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision

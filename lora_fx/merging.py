"""W + Σ scaling · B @ A for one weight, in one pass over its rows, rounded once; and what that did to it.

The rows go through the cache in blocks of 1 or 2 MiB: each is read, added to, rounded and measured while it is there.
(PEFT's `merge` writes the whole delta to memory, scales it there, and adds it: three passes more.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

# float32 numbers of one block, and four times those of float64, which takes buffers in float32 beside it. A GPU has no
# use for small ones, and each would cost it a launch.
_BLOCK, _GPU_BLOCK = 1 << 19, 1 << 28

# Losses below this share of the delta are told by their upper bound instead of being measured.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Delta:
    """scaling · left @ right, in the order in which the weight is stored: left (n, rows, r), right (n, r, columns).

    And `gain` times the weight itself, where there is one: (n, rows, 1) or (n, 1, columns).
    With `is_block`, the product is added from `row` and `column` on, and the rest of the weight keeps its bits.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    gain: torch.Tensor | None = None
    row: int = 0
    column: int = 0
    is_block: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to accumulate in."""
        return self.left.dtype

    def to(self, dtype: torch.dtype) -> Delta:
        """In another dtype."""
        gain = None if self.gain is None else self.gain.to(dtype)
        return replace(self, left=self.left.to(dtype), right=self.right.to(dtype), gain=gain)

    def is_zero(self) -> bool:
        """Whether a factor is zero throughout, and the other has no NaN or Inf to multiply it with."""
        factors = (self.left, self.right)
        no_product = not all(map(_has_any, factors)) and all(bool(torch.isfinite(f).all()) for f in factors)
        return no_product and (self.gain is None or not _has_any(self.gain))

    def bound(self, norm: float) -> float:
        """What no element of it is above; `norm` is the weight's."""
        product = abs(self.scaling) * float(self.left.norm()) * float(self.right.norm())
        return product + (0.0 if self.gain is None else norm * float(self.gain.abs().max()))

    def add_to(self, total: torch.Tensor, n: int, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """Write total + scaling · left @ right, of some rows of one matrix, to `out`; the gain is not in it."""
        if not self.is_block:
            return torch.addmm(total, self.left[n, rows], self.right[n], alpha=self.scaling, out=out)
        if total is not out:
            out.copy_(total)
        start, stop = max(rows.start, self.row), min(rows.stop, self.row + self.left.shape[1])
        if start < stop:
            block = out[start - rows.start : stop - rows.start, self.column : self.column + self.right.shape[2]]
            own = self.left[n, start - self.row : stop - self.row]
            block.copy_(torch.addmm(block, own, self.right[n], alpha=self.scaling))
        return out


@dataclass(frozen=True)
class RowsDelta:
    """scaling · values (k, columns), added to the rows `index` (k,) of the only matrix."""

    index: torch.Tensor
    values: torch.Tensor
    scaling: float
    gain: None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to accumulate in."""
        return self.values.dtype

    def to(self, dtype: torch.dtype) -> RowsDelta:
        """In another dtype."""
        return RowsDelta(self.index, self.values.to(dtype), self.scaling)

    def is_zero(self) -> bool:
        """Whether it adds nothing."""
        return not _has_any(self.values)

    def bound(self, norm: float) -> float:
        """What no element of it is above."""
        return abs(self.scaling) * float(self.values.norm())

    def add_to(self, total: torch.Tensor, n: int, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """Write total + scaling · values, for those that lie in `rows`, to `out`."""
        here = (self.index >= rows.start) & (self.index < rows.stop)
        added = total.index_add(0, self.index[here] - rows.start, self.values[here], alpha=self.scaling)
        return out.copy_(added)


@dataclass
class StoredDelta:
    """A `Delta` whose factors stay in the dtype and the memory that a file has them in, and are widened by the block.

    Attributes:
        left, right, scaling, gain: as in `Delta`; the gain in the dtype to accumulate in.
        through: the dtype that values take on their way, which is that of `fold`'s factors.
        dtype: to accumulate in.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    through: torch.dtype
    dtype: torch.dtype
    gain: torch.Tensor | None = None
    is_block: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._last: tuple[int, torch.Tensor] | None = None

    def squared_norm(self) -> float:
        """‖scaling · left @ right‖², without forming it; inf or NaN if a factor is not finite."""
        squared = 0.0
        for n in range(len(self.left)):
            gram: torch.Tensor | None = None
            step = max(1, _BLOCK // max(1, self.left.shape[2]))
            for start in range(0, self.left.shape[1], step):
                rows = self._wide(self.left[n, start : start + step])
                gram = rows.mT @ rows if gram is None else gram.addmm_(rows.mT, rows)
            right = self._right(n)
            squared += 0.0 if gram is None else float((gram.double() * (right @ right.mT).double()).sum())
        return self.scaling**2 * max(squared, 0.0)

    def bound(self) -> float:
        """What no element of the product is above."""
        norms = (float(torch.linalg.vector_norm(factor.float())) for factor in (self.left, self.right))
        return abs(self.scaling) * math.prod(norms)

    def is_zero(self) -> bool:
        """Whether it adds nothing."""
        no_product = not _has_any(self.left) or not _has_any(self.right)
        return no_product and (self.gain is None or not _has_any(self.gain))

    def add_to(self, total: torch.Tensor, n: int, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """As of `Delta`."""
        return torch.addmm(total, self._wide(self.left[n, rows]), self._right(n), alpha=self.scaling, out=out)

    def _wide(self, factor: torch.Tensor) -> torch.Tensor:
        if factor.stride(-1) != 1:  # as it lies, which is how `Delta` has it
            return self._wide(factor.mT).mT if factor.stride(-2) == 1 else self._wide(factor.contiguous())
        return factor.to(self.through).to(self.dtype)

    def _right(self, n: int) -> torch.Tensor:
        if self._last is None or self._last[0] != n:
            self._last = n, self._wide(self.right[n])
        return self._last[1]


AnyDelta = Delta | RowsDelta
Summand = Delta | RowsDelta | StoredDelta


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
    weight: torch.Tensor,
    deltas: Sequence[AnyDelta],
    into: torch.Tensor,
    *,
    is_exact: bool = True,
    weight_norm: float | None = None,
) -> Merged:
    """Write weight + Σ deltas to `into`.

    Args:
        weight: (n, rows, columns): one matrix, or one for each group or expert.
        deltas: in the dtype to accumulate in, which is at least the weight's.
        into: the weight's shape and dtype; the weight itself, or other memory.
        is_exact: round float64 to 16 bits once. False goes by way of float32, which is at most 2⁻¹⁶ of a unit more than
            half of one, in a fraction of the time.
        weight_norm: what `norm_if_finite` told; then finiteness is not looked at once more.
    """
    accumulate = deltas[0].dtype
    if all(delta.is_zero() for delta in deltas):
        deltas = ()  # the same bits, −0.0 among them, which adding 0.0 would change
    merging = Merging(has_products_only(deltas), is_exact=is_exact, knows_norm=weight_norm is not None)
    with full_precision():
        for n, rows, block in blocks(weight, accumulate):
            merging.add(block, deltas, n, rows, into[n, rows])
    delta_norm = norm_of_sum(deltas) if merging.has_products_only else math.sqrt(merging.changed)
    if weight_norm is not None:
        norm = weight_norm + delta_norm
    else:
        weight_norm = norm = _root(merging.before, weight)
        if weight.dtype == accumulate:
            norm = _root(merging.after, into)
    lost = merging.lost
    if weight.dtype == accumulate:
        lost = _lost_to_rounding(weight, deltas, into, norm, delta_norm) ** 2
    kept = _share_kept(lost, delta_norm, _finest(weight.dtype) * weight_norm)
    return Merged(weight_norm, delta_norm, kept, math.isfinite(norm) and math.isfinite(lost))


def sum_dtype(weight: torch.dtype, accumulate: torch.dtype | None, *, has_float64: bool = True) -> torch.dtype:
    """What to sum in, by `accumulate` of `lora_fx.fold`."""
    is_half = weight in (torch.float16, torch.bfloat16)
    return torch.promote_types(weight, accumulate or (torch.float64 if is_half and has_float64 else torch.float32))


def factor_dtype(weight: torch.dtype, accumulate: torch.dtype | None) -> torch.dtype:
    """What A and B are taken as on their way there."""
    return torch.promote_types(weight, accumulate or torch.float32)


def has_products_only(deltas: Sequence[Summand]) -> bool:
    """Whether the norm of their sum is told by their factors."""
    return all(not isinstance(delta, RowsDelta) and delta.gain is None and not delta.is_block for delta in deltas)


class Merging:
    """A merge under way, of a weight that comes block by block, and what it has come to so far.

    Args:
        has_products_only: see the function; the norm of the sum is not measured then.
        is_exact, knows_norm: as `is_exact` and `weight_norm` of `merge`.

    Attributes:
        before, after: squared norms of the weight, and of the result where it is not rounded to a narrower dtype.
        changed: squared norm of what was added, if it is measured.
        lost: squared norm of what rounding to a narrower dtype took: NaN or infinite where that is too narrow.
    """

    def __init__(self, has_products_only: bool, *, is_exact: bool, knows_norm: bool = False) -> None:
        self.has_products_only = has_products_only
        self.before = self.after = self.changed = self.lost = 0.0
        self._is_exact = is_exact
        self._knows_norm = knows_norm
        self._buffer: torch.Tensor | None = None

    def like(self) -> Merging:
        """One of the same kind, for other blocks."""
        return Merging(self.has_products_only, is_exact=self._is_exact, knows_norm=self._knows_norm)

    def taken(self) -> tuple[float, float, float, float]:
        """(before, after, changed, lost) so far, which begin anew."""
        sums = self.before, self.after, self.changed, self.lost
        self.before = self.after = self.changed = self.lost = 0.0
        return sums

    def sum_up(self, sums: Iterable[tuple[float, float, float, float]]) -> None:
        """Take what others came to, in their order."""
        for before, after, changed, lost in sums:
            self.before, self.after = self.before + before, self.after + after
            self.changed, self.lost = self.changed + changed, self.lost + lost

    def add(self, block: torch.Tensor, deltas: Sequence[Summand], n: int, rows: slice, rounded: torch.Tensor) -> None:
        """Write some rows of one matrix, with what is added to them, to `rounded`.

        Args:
            block: the rows in the dtype to accumulate in; overwritten, unless that is also `rounded`'s.
            deltas: in that dtype; none for nothing to add.
            n, rows: where the block stands in them.
            rounded: the block's shape, and the weight's dtype.
        """
        self.before += 0.0 if self._knows_norm else _squares(block)
        original = None if self.has_products_only else block.clone()
        total = _sum(block, deltas, n, rows, rounded if rounded.dtype == block.dtype else block)
        self.changed += 0.0 if original is None else _squares(total - original)
        if total is rounded:
            self.after += 0.0 if self._knows_norm else _squares(total)
            return
        near = total
        if total.dtype.itemsize == 4 * rounded.dtype.itemsize:  # float64 goes to 16 bits by way of float32
            if self._buffer is None or len(self._buffer) < len(total):
                self._buffer = torch.empty_like(total, dtype=torch.float32)
            near = self._buffer[: len(total)].copy_(total)
            total = _to_odd(total, near) if self._is_exact else near
        rounded.copy_(total)
        if near is not block and block.is_contiguous():  # widened where the sum was, rather than in new memory
            rounded = _front_of(block, torch.float32).copy_(rounded)
        self.lost += _squares(near.sub_(rounded))

    def merged(self, dtype: torch.dtype, accumulate: torch.dtype, delta_norm: float | None) -> Merged:
        """What the merge did, once all blocks are there; what is lost within one dtype is told by its upper bound.

        Args:
            dtype: the weight's.
            accumulate: that of the sums.
            delta_norm: of the sum of all deltas; None if it was measured.
        """
        weight_norm, norm = math.sqrt(self.before), math.sqrt(self.after)  # 0 where it is of no use
        delta_norm = math.sqrt(self.changed) if delta_norm is None else delta_norm
        lost = (torch.finfo(dtype).eps / 2 * norm) ** 2 if dtype == accumulate else self.lost
        is_finite = math.isfinite(weight_norm) and math.isfinite(norm) and math.isfinite(lost)
        kept = _share_kept(lost, delta_norm, _finest(dtype) * weight_norm)
        return Merged(weight_norm, delta_norm, kept, is_finite)


def _front_of(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The first part of a block's memory as one of its shape in a narrower dtype."""
    flat = block.view(-1).view(dtype)
    return flat[: block.numel()].view(block.shape)


def _to_odd(total: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """float64 as float32, such that rounding that to 16 bits is rounding the float64 once; `near` is the nearest.

    The nearest would be rounded twice, which gives the wrong neighbour where the first rounding makes a tie. Of the two
    float32 beside an inexact value, the one whose last bit is set makes none (round to odd: Boldo and Melquiond, 2008).
    """
    error = total - near
    is_even = (near.view(torch.int32) & 1) == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float32)
    return torch.where((error != 0) & is_even & near.isfinite(), torch.nextafter(near, toward), near)


def norm_if_finite(weight: torch.Tensor, deltas: Sequence[AnyDelta]) -> float | None:
    """‖weight‖, if norms alone tell that weight + Σ deltas has no NaN and no infinite element; None: no verdict."""
    squares = sum(_squares(block) for _, _, block in blocks(weight, deltas[0].dtype))
    norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
    largest = norm + sum(delta.bound(norm) for delta in deltas)  # no element of L @ R is above ‖L‖ ‖R‖
    return norm if largest < torch.finfo(weight.dtype).max / 2 else None  # NaN is below nothing


def blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(matrix, rows, those rows in `dtype`): views of the weight if it is of that dtype, else one buffer throughout."""
    buffer = None
    for n, at in block_ranges(tuple(weight.shape), dtype, is_gpu=weight.device.type != "cpu"):
        block = weight[n, at]
        if weight.dtype != dtype:
            buffer = torch.empty_like(block, dtype=dtype) if buffer is None else buffer
            block = buffer[: len(block)].copy_(block)
        yield n, at, block


def block_ranges(shape: tuple[int, ...], dtype: torch.dtype, *, is_gpu: bool = False) -> Iterator[tuple[int, slice]]:
    """(matrix, its rows) of the blocks in which weights (n, rows, columns) are merged in `dtype`, wherever they lie."""
    count, rows, columns = shape
    elements = (_GPU_BLOCK if is_gpu else _BLOCK) // (dtype.itemsize // 4) ** 2
    most = max(1, elements // max(1, columns))
    # Blocks of about one size: kernels for a few rows left over sum in an order of their own, and lose digits.
    step = max(1, -(-rows // -(-rows // most))) if rows else 1
    for n in range(count):
        for start in range(0, rows, step):
            yield n, slice(start, min(start + step, rows))


def _sum(block: torch.Tensor, deltas: Sequence[Summand], n: int, rows: slice, out: torch.Tensor) -> torch.Tensor:
    gains = [delta.gain for delta in deltas if delta.gain is not None]
    if gains:
        total = torch.mul(block, 1 + sum(gain[n, rows] if len(gain[n]) > 1 else gain[n] for gain in gains), out=out)
    else:
        total = block if deltas else out.copy_(block)
    for delta in deltas:  # (rows, r) @ (r, columns) -> (rows, columns)
        total = delta.add_to(total, n, rows, out)
    return total


def _lost_to_rounding(
    weight: torch.Tensor, deltas: Sequence[AnyDelta], into: torch.Tensor, norm: float, delta_norm: float
) -> float:
    """‖into − (W + Δ)‖ where sums were made in the weight's own dtype: measured in float64 only if it could matter."""
    bound = torch.finfo(weight.dtype).eps / 2 * norm  # rounding moves each element by eps / 2 of itself at most
    is_overwritten = weight.data_ptr() == into.data_ptr()
    if bound < _NEGLIGIBLE * delta_norm or weight.dtype == torch.float64 or is_overwritten:
        return bound
    wide = [delta.to(torch.float64) for delta in deltas]
    lost = 0.0
    for n, rows, block in blocks(weight, torch.float64):
        lost += _squares(_sum(block, wide, n, rows, block) - into[n, rows])
    return math.sqrt(lost)


def _finest(dtype: torch.dtype) -> float:
    """The share of a weight's norm below which a delta is lost in the sums that would measure what it loses."""
    return torch.finfo(torch.float32 if dtype.itemsize < 4 else torch.float64).eps / 2


def _share_kept(lost_squared: float, delta_norm: float, finest: float) -> float:
    if not delta_norm:
        return 1.0
    return 0.0 if delta_norm < finest else max(0.0, 1 - math.sqrt(lost_squared) / delta_norm)


def norm_of_sum(deltas: Sequence[AnyDelta]) -> float:
    """‖Σ s L R‖ without forming it: ⟨s L R, t M N⟩ = s t · tr((Lᵀ M)(N Rᵀ)), products of r × r."""
    products = [delta for delta in deltas if isinstance(delta, Delta)]
    squared = 0.0
    for one in products:
        for other in products:
            inner = (one.left.mT @ other.left).double() * (one.right @ other.right.mT).double()
            squared += one.scaling * other.scaling * float(inner.sum())
    return math.sqrt(max(squared, 0.0))


def _has_any(values: torch.Tensor) -> bool:
    """Whether any element is not 0. (`Tensor.any` makes a copy as booleans first.)"""
    return bool(torch.count_nonzero(values))


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
def full_precision() -> Iterator[None]:
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

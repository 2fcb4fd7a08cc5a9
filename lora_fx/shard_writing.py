"""One shard of a checkpoint, folded from file to file: the kernel copies what is not adapted, the rest goes by blocks.

Whatever the sizes of shard and tensors, no more is in memory than a block (see `merging`), in a few types, and A and B
of one weight; these are mapped, and so need none of their own but for what is widened.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from .checkpoint_changes import BiasOfB, Change, LowRank, Rows, Whole, tensor_of
from .checkpoint_plan import CheckpointPlan
from .dora import gain_of, gain_on_weight, norms_by_block, scaled_outputs
from .errors import FoldError
from .fold_results import FoldedSite
from .fold_terms import groups_of
from .hf_checkpoint import Checkpoint
from .layouts import Kernel
from .merging import (
    Delta,
    Merging,
    RowsDelta,
    StoredDelta,
    Summand,
    block_ranges,
    factor_dtype,
    full_precision,
    has_products_only,
    norm_of_sum,
    sum_dtype,
)
from .stored_tensors import SHORTER, StoredFile, StoredTensor, bytes_of, read_into, read_rows, with_tensor

_COPIED = 1 << 26  # bytes that are copied, or a piece of them, between two reports of progress
_BUFFER = 1 << 20  # bytes that are copied in one go where the system does not
_PIECE = 1 << 18  # elements of a tensor that takes the place of another

Shape = tuple[int, int, int]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class ShardJob:
    """One shard to write.

    Attributes:
        source: the base's.
        changes: of its tensors, and of those that are untied from them.
        accumulate: as of `lora_fx.fold`.
        let_go: lets go of what was read of the mapped adapter.
        told: is told how many bytes more are written.
        threads: that fold blocks of a weight side by side.
    """

    source: StoredFile
    changes: Sequence[Change]
    accumulate: torch.dtype | None
    let_go: Callable[[], object]
    told: Callable[[int], object] = lambda count: None
    threads: int = 1

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return len(self.header) + 8 + (self.source.size - self.source.data_start) + self._added

    @property
    def header(self) -> bytes:
        """The result's header: the source's, unless there is a tensor more."""
        file = self.source
        for change in (change for change in self.changes if change.is_untied):
            file = _with(file, change)
        return file.header

    @property
    def _added(self) -> int:
        return sum(change.source.nbytes for change in self.changes if change.is_untied)


def _with(file: StoredFile, change: Change) -> StoredFile:
    header = with_tensor(file, change.name, change.source)
    grown = 8 + len(header) + file.size - file.data_start + change.source.nbytes
    return StoredFile(file.path, grown, header, file.tensors)


def job_of(
    checkpoint: Checkpoint,
    plan: CheckpointPlan,
    name: str,
    accumulate: torch.dtype | None,
    let_go: Callable[[], object],
) -> ShardJob:
    """What is to be done for the shard of that name."""
    shard = next(shard for shard in checkpoint.shards if shard.path.name == name)
    changes = [change for change in plan.changes if change.source.path == shard.path]
    return ShardJob(shard, changes, accumulate, let_go)


def write_shard(job: ShardJob, target: Path) -> list[FoldedSite]:
    """Write the folded shard to a new file; whoever needs it on the disk sees to that.

    Returns:
        What folding did to each weight that something was added to.

    Raises:
        FoldError: if a result is not finite.
        OSError: if the file system refuses.
    """
    sites: list[FoldedSite] = []
    by_name = {change.name: change for change in job.changes}
    header = job.header
    moved = 8 + len(header) - job.source.data_start
    with open(job.source.path, "rb") as source, open(target, "xb") as into:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        out = _Writer(into.fileno(), job.told)
        out.write(memoryview(len(header).to_bytes(8, "little") + header), 0)
        at = job.source.data_start
        for tensor in job.source.tensors:
            change = by_name.get(tensor.name)
            if change is None:
                continue
            out.copy(source.fileno(), at, tensor.start - at, at + moved)
            sites += _fold(job, change, source.fileno(), out, tensor.start + moved)
            at = tensor.start + tensor.nbytes
        out.copy(source.fileno(), at, job.source.size - at, at + moved)
        end = job.source.size + moved
        for change in (change for change in job.changes if change.is_untied):
            sites += _fold(job, change, source.fileno(), out, end)
            end += change.source.nbytes
    return sites


def check_finite(job: ShardJob) -> None:
    """Whether all results are finite, as far as it takes to be sure; nothing is written.

    Raises:
        FoldError: if one is not.
    """
    with open(job.source.path, "rb") as source:
        for change in job.changes:
            whole = change.terms[0]
            if isinstance(whole, Whole):
                _write_whole(change, whole)
            elif not _is_surely_finite(change, source.fileno()):
                _merge(job, change, source.fileno())
            job.let_go()


def _is_surely_finite(change: Change, source: int) -> bool:
    """Whether norms alone tell; as `merging.norm_if_finite`."""
    if len(change.terms) > 1 or not isinstance(change.terms[0], LowRank) or change.terms[0].low.magnitude is not None:
        return False
    blocks = _Blocks(source, change.source, _matrices(change), torch.float32)
    delta = _low_rank_delta(change.terms[0], blocks, torch.float32, torch.float64)
    squares = sum(float(block.view(-1).dot(block.view(-1))) for _, _, block in blocks.read(torch.float32))
    largest = math.sqrt(squares) + delta.bound()
    return largest < torch.finfo(change.source.dtype).max / 2  # NaN is below nothing


class _Writer:
    """A file that is written at places, and what is told of it."""

    def __init__(self, descriptor: int, told: Callable[[int], object]) -> None:
        self._descriptor = descriptor
        self._told = told
        self._in_kernel = hasattr(os, "copy_file_range")

    def write(self, data: memoryview, at: int) -> None:
        """Bytes at a place."""
        self._told(len(data))
        while len(data):
            count = os.pwrite(self._descriptor, data, at)
            data, at = data[count:], at + count

    def copy(self, source: int, start: int, count: int, at: int) -> None:
        """Bytes of another file, which need not come by here if the system can do without."""
        while count > 0:
            done = self._copied(source, start, min(count, _COPIED), at)
            start, at, count = start + done, at + done, count - done

    def _copied(self, source: int, start: int, count: int, at: int) -> int:
        if self._in_kernel:
            try:
                done = os.copy_file_range(source, self._descriptor, count, start, at)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                self._in_kernel = False
            else:
                if done == 0:
                    raise FoldError(SHORTER)
                self._told(done)
                return done
        buffer = memoryview(bytearray(min(count, _BUFFER)))
        read_into(source, start, buffer)
        self.write(buffer, at)
        return len(buffer)


def _fold(job: ShardJob, change: Change, source: int, out: _Writer, at: int) -> Iterator[FoldedSite]:
    whole = change.terms[0]
    if isinstance(whole, Whole):
        _write_whole(change, whole, out, at)
    else:
        yield _merge(job, change, source, out, at)
    job.let_go()


def _write_whole(change: Change, whole: Whole, out: _Writer | None = None, at: int = 0) -> None:
    dtype, values = change.source.dtype, tensor_of(whole.values).reshape(-1)
    for first in range(0, values.numel(), _PIECE):
        piece = values[first : first + _PIECE].to(dtype).contiguous()
        if not bool(torch.isfinite(piece).all()):
            raise FoldError(
                f"the adapter's {change.path!r} has values beyond {dtype}'s largest number "
                f"{torch.finfo(dtype).max:.4g}; fold into a float32 checkpoint"
            )
        if out is not None:
            out.write(bytes_of(piece), at + first * dtype.itemsize)


def _merge(job: ShardJob, change: Change, source: int, out: _Writer | None = None, at: int = 0) -> FoldedSite:
    """W + Δ, block by block, in the blocks of `lora_fx.fold`, so that it gives the same bits."""
    dtype = change.source.dtype
    sums = sum_dtype(dtype, job.accumulate)
    shape = _matrices(change)
    blocks = _Blocks(source, change.source, shape, sums)
    deltas = _deltas(job, change, blocks)
    if all(delta.is_zero() for delta in deltas):
        deltas = []
    merging = Merging(has_products_only(deltas), is_exact=job.accumulate is torch.float64)

    def lane() -> Callable[[tuple[int, slice]], tuple[float, float, float, float]]:
        own, read = merging.like(), blocks.reader(sums)
        rounded = torch.empty((blocks.most, shape[2]), dtype=dtype)

        def fold(block: tuple[int, slice]) -> tuple[float, float, float, float]:
            n, rows = block
            new = rounded[: rows.stop - rows.start]
            own.add(read(n, rows), deltas, n, rows, new)
            if out is not None:
                out.write(bytes_of(new), at + blocks.offset(n, rows))
            return own.taken()

        return fold

    with full_precision():
        merging.sum_up(_in_lanes(block_ranges(shape, sums), lane, job.threads))
    merged = merging.merged(dtype, sums, _norm(deltas) if merging.has_products_only else None)
    if not merged.is_finite:
        raise FoldError(_why_not_finite(change, source, blocks))
    untied = (change.source.name,) if change.is_untied else ()
    return FoldedSite(change.path, change.name, dtype, merged.weight_norm, merged.delta_norm, merged.kept, untied)


def _norm(deltas: Sequence[Summand]) -> float:
    """Of the sum of products; one adapter makes one at most."""
    squares = [delta.squared_norm() for delta in deltas if isinstance(delta, StoredDelta)]
    return math.sqrt(sum(squares)) if squares else norm_of_sum([each for each in deltas if isinstance(each, Delta)])


def _in_lanes(items: Iterable[T], lane: Callable[[], Callable[[T], R]], count: int) -> list[R]:
    """What becomes of each item, in order; as many threads as lanes, each with what `lane` makes for it."""
    if count == 1:
        return list(map(lane(), items))
    found: dict[int, R] = {}
    numbered, lock, failed = enumerate(items), threading.Lock(), threading.Event()

    def run() -> None:
        work = lane()
        while not failed.is_set():
            with lock:
                numbered_item = next(numbered, None)
            if numbered_item is None:
                return
            number, item = numbered_item
            try:
                found[number] = work(item)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(run) for _ in range(count)]:
            future.result()
    return [found[number] for number in range(len(found))]


class _Blocks:
    """A tensor of a file as (n, rows, columns), in the blocks in which it is merged in a dtype."""

    def __init__(self, source: int, tensor: StoredTensor, shape: Shape, sums: torch.dtype) -> None:
        self._source, self._tensor, self.shape, self._sums = source, tensor, shape, sums
        self.most = next(rows.stop for _, rows in block_ranges(shape, sums))

    def offset(self, n: int, rows: slice) -> int:
        """Bytes before a block."""
        return int((n * self.shape[1] + rows.start) * self.shape[2] * self._tensor.dtype.itemsize)

    def reader(self, dtype: torch.dtype) -> Callable[[int, slice], torch.Tensor]:
        """What gives rows of a matrix in `dtype`, in memory that the next rows overwrite."""
        stored = torch.empty((self.most, self.shape[2]), dtype=self._tensor.dtype)
        wide = stored if stored.dtype == dtype else torch.empty_like(stored, dtype=dtype)

        def read(n: int, rows: slice) -> torch.Tensor:
            count = rows.stop - rows.start
            read_into(self._source, self._tensor.start + self.offset(n, rows), bytes_of(stored[:count]))
            return stored[:count] if wide is stored else wide[:count].copy_(stored[:count])

        return read

    def read(self, dtype: torch.dtype) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """(matrix, rows, these rows in `dtype`), one after the other."""
        read = self.reader(dtype)
        for n, rows in block_ranges(self.shape, self._sums):
            yield n, rows, read(n, rows)

    def rows(self, index: Sequence[int]) -> torch.Tensor:
        """Some rows of the only matrix, as they are stored."""
        columns = self.shape[2]
        return torch.stack([read_rows(self._source, self._tensor, row * columns, columns) for row in index])


def _matrices(change: Change) -> Shape:
    """The weight's shape as (n, rows, columns)."""
    low = next((term for term in change.terms if isinstance(term, LowRank)), None)
    if low is not None:
        n, rows, columns = low.layout.matrices(torch.empty(change.source.shape, device="meta")).shape
        return int(n), int(rows), int(columns)
    if isinstance(change.terms[0], BiasOfB):
        return 1, 1, change.source.shape[0]
    return 1, change.source.shape[0], change.source.shape[1]


def _deltas(job: ShardJob, change: Change, blocks: _Blocks) -> list[Summand]:
    dtype = change.source.dtype
    sums, through = sum_dtype(dtype, job.accumulate), factor_dtype(dtype, job.accumulate)
    return [_delta(term, blocks, through, sums) for term in change.terms]


def _delta(term: object, blocks: _Blocks, through: torch.dtype, sums: torch.dtype) -> Summand:
    if isinstance(term, LowRank):
        return _low_rank_delta(term, blocks, through, sums)
    if isinstance(term, BiasOfB):
        added = tensor_of(term.values).to(through).reshape(1, 1, -1)
        return Delta(torch.ones_like(added[..., :1]), added, term.scaling).to(sums)
    assert isinstance(term, Rows)
    base = blocks.rows(term.index).to(through)
    return RowsDelta(torch.tensor(term.index), tensor_of(term.values).to(through) - base, 1.0).to(sums)


def _low_rank_delta(term: LowRank, blocks: _Blocks, through: torch.dtype, sums: torch.dtype) -> StoredDelta:
    layout, a, b = term.layout, tensor_of(term.low.a), tensor_of(term.low.b)
    if isinstance(layout, Kernel) and layout.groups > 1 and not layout.is_transposed:
        grouped = layout.grouped(a)
        assert grouped is not None  # the plan says so
        a = grouped
    if term.low.magnitude is None:
        left, right = layout.factors(a, b)
        return StoredDelta(left, right, term.scaling, through, sums)
    a, b = a.to(through), b.to(through)
    product = Delta(*layout.factors(a, b), term.scaling)
    norms = norms_by_block(layout, blocks.read(through), product, blocks.shape)
    gains = gain_of(layout, tensor_of(term.low.magnitude), norms.to(through), product)
    left, right = layout.factors(a, scaled_outputs(layout, b, gains))
    return StoredDelta(
        left, right, term.scaling, through, sums, gain_on_weight(layout, gains, groups_of(layout)).to(sums)
    )


def _why_not_finite(change: Change, source: int, blocks: _Blocks) -> str:
    where = f"{change.path!r} ({change.name})"
    for _, _, block in blocks.read(change.source.dtype):
        if not bool(torch.isfinite(block).all()):
            return f"the base weight of {where} holds NaN or Inf before folding; mend the model, not the adapter"
    dtype = change.source.dtype
    return (
        f"folding {where}: |W + ΔW| goes beyond {dtype}'s largest number {torch.finfo(dtype).max:.4g}; convert the "
        "checkpoint to float32, and fold that"
    )

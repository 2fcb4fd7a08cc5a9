"""Folded weights that are computed while they are written: no more of one is in memory than a block of its rows."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir

from .onnx_weights import Array
from .stored_weights import Encoded, stored_weight
from .weight_edits import Edit

# Elements of a block.
BLOCK = 1 << 20

# A file, and where in it.
Place = tuple[Path, int]


@dataclass
class Written:
    """What writing a weight has come to: squared norms.

    Attributes:
        before, after: of the old and the new value.
        added, lost: of their difference, and of what rounding took.
    """

    before: float = 0.0
    after: float = 0.0
    added: float = 0.0
    lost: float = 0.0


class NewValues:
    """The new value of a weight, computed block by block of its rows as often as it is asked for.

    Args:
        weight: its initializer; the packed one, if it is quantized.
        edits: give what makes the new value, one after the other; they are asked when it is computed.
        paths: the adapter's names, for messages.
        leading: how many of its axes are rows.
    """

    def __init__(
        self, weight: ir.Value, edits: Sequence[Callable[[], list[Edit]]], paths: tuple[str, ...], leading: int = 1
    ) -> None:
        self._stored = stored_weight(weight, leading)
        self._edits, self._paths = edits, paths
        self.written = Written()

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The initializers that hold the weight."""
        return self._stored.values

    @property
    def dtype(self) -> str:
        """What the weight's form is called in a report."""
        return self._stored.dtype

    def write(self, places: Mapping[ir.Value, Place]) -> dict[ir.Value, ir.TensorProtocol]:
        """Compute it, and write each block to its place.

        Args:
            places: {initializer: where it goes}.

        Returns:
            The new tensors of those initializers that have no place.

        Raises:
            ExportError: if a value leaves the range of the weight's type; some is written then.
        """
        kept: dict[ir.Value, Array] = {}
        with contextlib.ExitStack() as stack:
            files = {
                value: stack.enter_context(open(places[value][0], "r+b")) for value in self.values if value in places
            }
            for encoded in self._encoded():
                for value, (start, numbers) in encoded.parts.items():
                    if value in files:
                        files[value].seek(places[value][1] + start * numbers.itemsize)
                        files[value].write(numbers.tobytes())
                        continue
                    if value not in kept:
                        kept[value] = np.empty(self._tensor(value).size, numbers.dtype)
                    kept[value][start : start + numbers.size] = numbers
        return {value: self._as_tensor(value, numbers) for value, numbers in kept.items()}

    def pending(self, let_go: Callable[[], object]) -> dict[ir.Value, ir.TensorProtocol]:
        """Tensors that leave room when they are written to a file; `write_pending` fills it.

        Args:
            let_go: is called when the weight is done with.
        """
        return {value: _Pending(self, value, self._tensor(value), let_go) for value in self.values}

    def is_like(self, other: NewValues) -> bool:
        """Whether it comes to the same as another of the same weight."""
        pairs = zip(self._exact(), other._exact(), strict=True)
        return all(np.array_equal(one, two) for (_, _, one), (_, _, two) in pairs)

    def _tensor(self, value: ir.Value) -> ir.TensorProtocol:
        return self._stored.tensors[self.values.index(value)]

    def _as_tensor(self, value: ir.Value, numbers: Array) -> ir.TensorProtocol:
        old = self._tensor(value)
        return ir.Tensor(numbers.reshape(old.shape.numpy()), dtype=old.dtype, name=str(value.name))

    def _encoded(self) -> Iterator[Encoded]:
        self.written = told = Written()
        for first, old, exact in self._exact():
            encoded = self._stored.encode(first, old, exact, ", ".join(self._paths))
            told.before, told.after = told.before + _squares(old), told.after + _squares(exact)
            if encoded.stored is not exact:
                told.lost += _squares(encoded.stored - exact)
            told.added += _squares(np.subtract(exact, old, out=old))
            yield encoded

    def _exact(self) -> Iterator[tuple[int, Array, Array]]:
        """(first row, rows of the old value, rows of the new one)."""
        edits = [edit for each in self._edits for edit in each()]
        norms: list[Array | None] = []
        for edit in edits:
            norms.append(self._squares_at(edit, edits[: len(norms)], norms) if edit.needs_norms else None)
        for first, old in self._blocks():
            yield first, old, _changed(old.copy(), first, edits, norms)

    def _squares_at(self, edit: Edit, before: Sequence[Edit], norms: Sequence[Array | None]) -> Array:
        """The squares that an edit needs of all rows, after those before it."""
        squares = np.zeros(self._stored.matrix[1])
        for first, block in self._blocks():
            edit.add_squares(_changed(block, first, before, norms), first, squares)
        return squares

    def _blocks(self) -> Iterator[tuple[int, Array]]:
        rows, columns = self._stored.matrix
        step = max(1, BLOCK // max(1, columns))
        for first in range(0, rows, step):
            yield first, self._stored.read(first, min(rows, first + step))


def _changed(block: Array, first: int, edits: Sequence[Edit], norms: Sequence[Array | None]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # whether the result is finite is looked at when it is encoded
        for edit, squares in zip(edits, norms, strict=False):
            edit.change(block, first, squares)
    return block


def _squares(values: Array) -> float:
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        squares = float(np.dot(flat, flat))
    return squares if math.isfinite(squares) else float(np.square(flat, dtype=np.float64).sum())


class _Pending(ir.LazyTensor):
    """A new tensor that is not computed yet."""

    def __init__(self, new: NewValues, value: ir.Value, old: ir.TensorProtocol, let_go: Callable[[], object]) -> None:
        super().__init__(lambda: new.write({})[value], old.dtype, ir.Shape(old.shape.numpy()), name=str(value.name))
        self.new, self.value, self.let_go, self.offset = new, value, let_go, -1

    def tofile(self, file: IO[bytes]) -> None:
        """Note where it goes."""
        self.offset = file.tell()


def write_pending(tensors: Iterable[ir.TensorProtocol | None], path: Path) -> None:
    """Write what is still to be computed to the file of weights in which there is room for it.

    Raises:
        ExportError: if a value leaves the range of its weight's type.
    """
    placed = [tensor for tensor in tensors if isinstance(tensor, _Pending) and tensor.offset >= 0]
    if placed:
        end = max(tensor.offset + tensor.nbytes for tensor in placed)
        os.truncate(path, max(end, path.stat().st_size))
    by_weight: dict[NewValues, list[_Pending]] = {}
    for tensor in placed:
        by_weight.setdefault(tensor.new, []).append(tensor)
    for new, parts in by_weight.items():
        new.write({part.value: (path, part.offset) for part in parts})
        parts[0].let_go()

"""Slices along one dimension, in every spelling of either dialect: what they take, and of which dimension."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .ops.use import argument

_aten = torch.ops.aten

# Give a list of pieces, of which a getitem takes one: by the size of each, by all sizes, or by their number.
_BY_SIZE = {_aten.split.Tensor, _aten.split_with_sizes.default, _aten.split.sizes, torch.split, "split"}
_BY_NUMBER = {_aten.chunk.default, torch.chunk, "chunk"}
_SLICES = {_aten.slice.Tensor}
_NARROWS = {_aten.narrow.default, torch.narrow, "narrow"}


def is_pieces(node: fx.Node) -> bool:
    """Whether the node gives its argument in pieces."""
    return node.op in ("call_function", "call_method") and (node.target in _BY_SIZE or node.target in _BY_NUMBER)


def is_slice(node: fx.Node) -> bool:
    """Whether the node is one piece of its argument along one dimension."""
    if node.target in _SLICES or node.target in _NARROWS:
        return True
    if node.target is not operator.getitem:
        return False
    source, index = node.args
    if isinstance(source, fx.Node) and is_pieces(source):
        return isinstance(index, int)
    return _plain_index(index) is not None


def slice_dimension(node: fx.Node) -> int:
    """The dimension that a slice is along."""
    if node.target in _SLICES or node.target in _NARROWS:
        dim: int = argument(node, 1, "dim", 0)
        return dim
    source, index = node.args
    if isinstance(source, fx.Node) and is_pieces(source):
        dim = argument(source, 2, "dim", 0)
        return dim
    found = _plain_index(index)
    assert found is not None
    return found[0]


def slice_of(node: fx.Node, size: int) -> tuple[int, int] | None:
    """(start, stop) of a slice of a dimension of `size`; None if that is not told by plain numbers, or has gaps."""
    if node.target in _SLICES:
        bounds = [argument(node, position, name) for position, name in ((2, "start"), (3, "end"), (4, "step"))]
        return _bounds(slice(*bounds), size)
    if node.target in _NARROWS:
        start, length = argument(node, 2, "start"), argument(node, 3, "length")
        if not _are_numbers(start, length):
            return None
        start = start + size if start < 0 else start
        return _bounds(slice(start, start + length), size)
    source, index = node.args
    if isinstance(source, fx.Node) and is_pieces(source):
        pieces = _pieces(source, size)
        return None if pieces is None or not isinstance(index, int) else pieces[index]
    found = _plain_index(index)
    return None if found is None else _bounds(found[1], size)


def _pieces(node: fx.Node, size: int) -> list[tuple[int, int]] | None:
    sizes = next(
        (node.kwargs[n] for n in ("split_size_or_sections", "split_size", "split_sizes", "chunks") if n in node.kwargs),
        None,
    )
    sizes = node.args[1] if sizes is None and len(node.args) > 1 else sizes
    if isinstance(sizes, int) and node.target in _BY_NUMBER:
        sizes = -(-size // sizes)
    if isinstance(sizes, int):
        return [(start, min(start + sizes, size)) for start in range(0, size, sizes)]
    if not isinstance(sizes, (list, tuple)) or not _are_numbers(*sizes) or sum(sizes) != size:
        return None
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - part, end) for part, end in zip(sizes, ends, strict=True)]


def _plain_index(index: Any) -> tuple[int, slice] | None:
    """(dimension, slice) of an index that takes a part of one dimension and all of the others before it."""
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or not all(isinstance(part, slice) or part is Ellipsis for part in parts):
        return None
    if parts[0] is Ellipsis and len(parts) == 2 and isinstance(parts[1], slice):
        return -1, parts[1]
    if any(part is Ellipsis for part in parts):
        return None
    taken = [dim for dim, part in enumerate(parts) if part != slice(None)]
    if len(taken) > 1:
        return None
    dim = taken[0] if taken else 0
    return dim, parts[dim]


def _bounds(part: slice, size: int) -> tuple[int, int] | None:
    if not all(bound is None or _are_numbers(bound) for bound in (part.start, part.stop, part.step)):
        return None
    start, stop, step = part.indices(size)
    return (start, stop) if step == 1 and start < stop else None


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)

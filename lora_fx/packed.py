"""Projections that are packed in one weight: where the graph takes the op's result apart, and how a part is named."""

from __future__ import annotations

import math
import operator
import re

import torch
from torch import fx

from .graph_module import ROLE
from .ops.use import Use, argument
from .slices import is_pieces, is_slice, slice_dimension, slice_of

_aten = torch.ops.aten

_NAMES = {2: ("gate", "up"), 3: ("q", "k", "v")}
_PART = re.compile(r"(?P<base>.*)(?P<part>\[(?P<spec>[^\]]*)\])")

# These leave the last dimension as it is, if the size says so too.
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.contiguous.default}
_CASTS = {_aten.to.dtype, _aten.type_as.default, _aten.alias.default, _aten.clone.default}
_UNFLATTENS = {_aten.view.default, _aten.reshape.default, _aten.unflatten.int}
_REORDERS = (
    {_aten.permute.default, _aten.transpose.int, _aten.unsqueeze.default, _aten.squeeze.dim}
    | _CASTS
    | {_aten.contiguous.default}
)
_TAKES = {_aten.select.int, _aten.unbind.int}


def split_name(entry: str) -> tuple[str, str]:
    """("c_attn", "[q]") of "c_attn[q]"; no part where there is none."""
    match = _PART.fullmatch(entry)
    return (match["base"], match["part"]) if match else (entry, "")


def part_names(count: int) -> tuple[str, ...]:
    """What the parts of a weight are called, if they have names."""
    return _NAMES.get(count, ())


def resolve_part(part: str, parts: tuple[tuple[int, int], ...], outputs: int) -> tuple[int, int] | str:
    """(start, stop) that "[q]", "[1]" or "[0:768]" means of a weight with these parts; or why it means nothing."""
    spec = part[1:-1].strip()
    if match := re.fullmatch(r"(\d*):(\d*)", spec):
        start, stop = int(match[1] or 0), int(match[2] or outputs)
        return (start, stop) if start < stop <= outputs else f"it has {outputs} outputs, and {start}:{stop} is no part"
    if not parts:
        return (
            f"how its {outputs} outputs are taken apart is not to be seen in the graph; say which of them you mean, "
            f"for instance [0:{outputs // 3}]"
        )
    named = dict(zip(part_names(len(parts)), parts, strict=True)) if part_names(len(parts)) else {}
    if spec in named:
        return named[spec]
    if spec.isdigit() and int(spec) < len(parts):
        return parts[int(spec)]
    known = [*named, *(str(i) for i in range(len(parts)))]
    return f"it packs {len(parts)} parts: {', '.join(f'[{name}]' for name in known)}"


def packed_parts(use: Use, outputs: int, rows: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each part in order; empty where the graph does not take the result apart.

    Args:
        use: one application of the weight.
        outputs: of the weight.
        rows: those of the applications of its slices, where it is sliced before it is applied.
    """
    if rows:
        return _tiled(rows, outputs)
    if use.family.out_axis(use) != -1:
        return ()
    queue, seen = [use.node], {use.node}
    while queue:
        node = queue.pop()
        if found := _taken_apart(node, outputs):
            return found
        following = [user for user in node.users if user not in seen and _keeps_outputs(user, node, outputs)]
        seen.update(following)
        queue += following
    return ()


def _keeps_outputs(user: fx.Node, node: fx.Node, outputs: int) -> bool:
    if ROLE in user.meta:
        return bool(user.meta[ROLE].is_sum)
    if user.target in _CASTS:
        return user.args[0] is node
    return user.target in _VIEWS and user.args[0] is node and _last_size(user) == outputs


def _value_of(node: fx.Node) -> object:
    """What tracing saw there; a sum of an op and an adapter's path is like the op."""
    while ROLE in node.meta and node.meta[ROLE].is_sum and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.meta.get("val")


def _last_size(node: fx.Node) -> object:
    value = _value_of(node)
    return value.shape[-1] if isinstance(value, torch.Tensor) and value.ndim else None


def _taken_apart(node: fx.Node, outputs: int) -> tuple[tuple[int, int], ...]:
    """The parts that the users of a result make of its last dimension."""
    slices: list[tuple[int, int]] = []
    for user in node.users:
        if user.args[:1] != (node,):
            continue
        if is_pieces(user) and _is_last(argument(user, 2, "dim", 0), node):
            pieces = [slice_of(piece, outputs) for piece in user.users if piece.target is operator.getitem]
            found = _tiled([piece for piece in pieces if piece is not None], outputs)
            if found:
                return found
        elif is_slice(user) and _is_last(slice_dimension(user), node):
            part = slice_of(user, outputs)
            slices += [] if part is None else [part]
        elif found := _unflattened(user, node, outputs):
            return found
    return _tiled(slices, outputs)


def _is_last(dim: object, node: fx.Node) -> bool:
    value = _value_of(node)
    return dim == -1 or (isinstance(value, torch.Tensor) and dim == value.ndim - 1)


def _tiled(parts: list[tuple[int, int]], outputs: int) -> tuple[tuple[int, int], ...]:
    """The parts in order, if there are several and they make up all outputs."""
    ordered = sorted(set(parts))
    ends = [0, *(stop for _, stop in ordered)]
    whole = len(ordered) > 1 and [start for start, _ in ordered] == ends[:-1] and ends[-1] == outputs
    return tuple(ordered) if whole else ()


def _unflattened(user: fx.Node, node: fx.Node, outputs: int) -> tuple[tuple[int, int], ...]:
    """Equal parts, where the last dimension is seen as (2 or 3, …) and one of them taken at a time."""
    before, after = _value_of(node), user.meta.get("val")
    if user.target not in _UNFLATTENS or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return ()
    inner = after.shape[before.ndim - 1 :]
    plain = len(inner) > 1 and all(isinstance(size, int) for size in inner)
    if not plain or inner[0] not in _NAMES or math.prod(inner) != outputs or not _is_taken_one_by_one(user):
        return ()
    size = outputs // inner[0]
    return tuple((index * size, (index + 1) * size) for index in range(inner[0]))


def _is_taken_one_by_one(node: fx.Node) -> bool:
    return any(
        user.target in _TAKES or is_pieces(user) or (user.target in _REORDERS and _is_taken_one_by_one(user))
        for user in node.users
    )

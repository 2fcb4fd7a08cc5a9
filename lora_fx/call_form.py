"""The form of a call: a traced graph has one place for each tensor it was traced with, and none for anything else.

A mask where None was traced, another flag, one more key in a dictionary: the graph would run and leave it out.
torch.export's own check of this goes when a graph is edited, so the graph module carries this one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import GraphError


class CallForm:
    """A forward pre-hook that refuses inputs of another form than the traced ones.

    Args:
        names: of the parameters of the graph's forward, in their order.
        positions: names that the model's own forward gives to positional inputs.
        args, kwargs: the inputs the graph was traced with.
        free_numbers: whether integers among the inputs were said to be free.
    """

    def __init__(
        self,
        names: Sequence[str],
        positions: Sequence[str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        free_numbers: bool = False,
    ) -> None:
        self._names = list(names)
        self._positions = list(positions)
        values = dict(zip(names, args, strict=False)) | dict(kwargs)
        self._traced = {name: dict(_leaves(values[name])) for name in names}
        self._plain = {name: leaves[()] for name, leaves in self._traced.items() if () in leaves}
        self._free_numbers = free_numbers
        self._ids: str | None = None

    def with_ids(self, name: str, example: torch.Tensor) -> CallForm:
        """The form of a graph that takes one more tensor, by name: a number for each row of the batch."""
        longer = copy.copy(self)
        longer._ids = name
        longer._names = [*self._names, name]
        longer._traced = self._traced | {name: {(): example}}
        longer._plain = self._plain | {name: example}
        return longer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise GraphError if the inputs have no place in the graph."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        self._check_names(given, len(args))
        if torch.compiler.is_compiling():  # looks into no containers
            for name in self._plain:
                self._check_leaf(name, self._plain[name], given[name])
        else:
            for name, value in given.items():
                self._check(name, dict(_leaves(value)))
        if self._ids is not None:
            self._check_ids(self._ids, given[self._ids], self._batch(given))

    def _check_names(self, given: Mapping[str, Any], positional: int) -> None:
        if positional > len(self._names):
            raise GraphError(f"the graph was called with {positional} positional inputs; {self._takes}")
        for index in range(positional):
            if self._positions[index : index + 1] != [self._names[index]]:
                raise GraphError(
                    f"the model takes its inputs in another order than the graph was traced with; {self._takes}. Give "
                    f"input {index + 1} by name"
                )
        for name in given:
            if name not in self._traced:
                raise GraphError(
                    f"the graph was traced without input {name!r}; {self._takes}. Trace the model again with such an "
                    "input"
                )
        for name in self._names:
            if name not in given:
                raise GraphError(
                    f"the graph was called without input {name!r}, which it was traced with; {self._takes}"
                )

    @property
    def _takes(self) -> str:
        return f"it takes {', '.join(self._names)}"

    def _check(self, name: str, leaves: dict[tuple[Any, ...], Any]) -> None:
        traced = self._traced[name]
        if leaves.keys() != traced.keys():
            other = next(iter(leaves.keys() ^ traced.keys()))
            where = f" at {'.'.join(map(str, other))!r}" if other else ""
            raise GraphError(
                f"input {name!r} has another structure than the graph was traced with{where}. Trace the model again "
                "with such an input"
            )
        for place, example in traced.items():
            self._check_leaf(name, example, leaves[place])

    def _check_leaf(self, name: str, example: Any, leaf: Any) -> None:
        if isinstance(example, torch.Tensor):
            fits = leaf is not None and (example.ndim == 0 or not isinstance(leaf, (bool, int, float, str)))
        else:
            fits = type(leaf) is type(example) and (leaf == example or (self._free_numbers and type(leaf) is int))
        if not fits:
            raise GraphError(
                f"the graph was traced with {_spelled(example)} for input {name!r} and has no place for "
                f"{_spelled(leaf)}. Trace the model again with such an input"
            )

    def _batch(self, given: Mapping[str, Any]) -> int | None:
        """How many rows are given: the size of the first input that has one, unless that is inside of another."""
        for name, leaves in self._traced.items():
            place = next((at for at, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and leaf.ndim), None)
            if place is not None:
                return None if place else len(given[name])
        return None

    def _check_ids(self, name: str, ids: Any, batch: int | None) -> None:
        """Of another size, they would spread over rows that they were not meant for."""
        is_tensor = isinstance(ids, torch.Tensor)
        if not is_tensor or ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 1:
            found = f"{ids.dtype} {list(ids.shape)}" if is_tensor else f"a {type(ids).__name__}"
            raise GraphError(f"{name} is {found}; it must be a tensor of int64 or int32, one number for each row")
        if batch is not None and len(ids) != batch:
            raise GraphError(
                f"{name} has {len(ids)} numbers, and the batch {batch} rows; give one for each row, 0 for the base"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> CallForm:
        return self  # nobody writes into it


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(place, leaf) of a nested input. Mappings of any kind and order are alike: the graph reads them by key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*place, key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _leaves(item, (*place, index))
    else:
        children = pytree.tree_leaves(value)
        is_leaf = len(children) == 1 and children[0] is value
        for index, child in enumerate(() if is_leaf else children):
            yield (*place, index), child
        if is_leaf:
            yield place, value


def _spelled(leaf: Any) -> str:
    return "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)

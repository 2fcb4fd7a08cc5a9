"""The form of a call: a traced graph has one place for each tensor it was traced with, and none for anything else.

A mask where None was traced, another flag, one more key in a dictionary: the graph would run and leave it out.
torch.export's own check of this goes when a graph is edited, so the graph module carries this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import GraphError


class CallForm:
    """A forward pre-hook that refuses inputs of another form than the traced ones.

    Args:
        names: of the parameters of the graph's forward, in their order.
        args, kwargs: the inputs the graph was traced with.
    """

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._names = names
        values = dict(zip(names, args, strict=False)) | dict(kwargs)
        self._traced = {name: pytree.tree_flatten(values[name]) for name in names}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise GraphError if the inputs have no place in the graph; torch.compile checks them with its own guards."""
        if torch.compiler.is_compiling():
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        self._check_names(given, len(args))
        for name, value in given.items():
            self._check(name, value, *self._traced[name])

    def _check_names(self, given: Mapping[str, Any], positional: int) -> None:
        takes = f"it takes {', '.join(self._names)}"
        if positional > len(self._names):
            raise GraphError(f"the graph was called with {positional} positional inputs; {takes}")
        for name in given:
            if name not in self._traced:
                raise GraphError(
                    f"the graph was traced without input {name!r}; {takes}. Trace the model again with such an input"
                )
        missing = [name for name in self._names if name not in given]
        if missing:
            raise GraphError(f"the graph was called without input {missing[0]!r}, which it was traced with; {takes}")

    def _check(self, name: str, value: Any, examples: list[Any], traced: pytree.TreeSpec) -> None:
        leaves, structure = pytree.tree_flatten(value)
        if structure != traced:
            raise GraphError(
                f"input {name!r} has another structure than the graph was traced with: {structure} instead of "
                f"{traced}. Trace the model again with such an input"
            )
        for example, leaf in zip(examples, leaves, strict=True):
            if not _has_place(example, leaf):
                raise GraphError(
                    f"the graph was traced with {_spelled(example)} for input {name!r} and has no place for "
                    f"{_spelled(leaf)}, which it would ignore. Trace the model again with such an input"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> CallForm:
        return self  # nobody writes into it


def _has_place(example: Any, leaf: Any) -> bool:
    if isinstance(example, torch.Tensor):
        return leaf is not None and not isinstance(leaf, (bool, int, float, str))
    return type(leaf) is type(example) and bool(leaf == example)


def _spelled(leaf: Any) -> str:
    return "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)

"""A table and a head that are one tensor in the model: what is folded into one reaches the other."""

from __future__ import annotations

import numpy as np
import torch

from .checkpoint_changes import Change, LowRank, Rows, Whole, tensor_of
from .checkpoint_places import DECODERS, HEADS, TABLES, CheckpointPlaces, last_of, module_of
from .errors import FoldError


class Ties:
    """A table and a head that are one tensor in the model: what is folded into one reaches the other."""

    def __init__(self, places: CheckpointPlaces) -> None:
        self._places = places

    def settle(self, found: dict[str, Change]) -> list[Change]:
        """The changes without those that make a second tensor equal to the first.

        Raises:
            FoldError: if untying needs more than the files tell.
        """
        changes = dict(found)
        for change in found.values():
            twin = found.get(change.source.name)
            if change.is_untied and twin is not None and _is_same(change, twin):
                del changes[change.name]
        for change in changes.values():
            self._check(change, found)
        return list(changes.values())

    def end(self, changes: list[Change]) -> bool:
        """Whether nothing may be tied any more: the checkpoint comes to have both, or has both and they part.

        Raises:
            FoldError: if only the model tells what untying them does.
        """
        config = self._places.checkpoint.config
        untied = next((change for change in changes if change.is_untied), None)
        if untied is None:
            names = [name for name in self._places.checkpoint.tensors if last_of(name) == "weight"]
            if config.get("tie_word_embeddings") is not True or not any(last_of(module_of(n)) in HEADS for n in names):
                return False
            ends = (*TABLES, *HEADS)
            untied = next(
                (each for each in changes if last_of(module_of(each.name)) in ends and not _is_rows(each)), None
            )
        if untied is None:
            return False
        named = config.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
        if not name.endswith(DECODERS):
            raise FoldError(
                f"folding unties {untied.name!r}, and what that does to {name or 'a model'} only the model tells; fold "
                "with it: lora-fx fold MODEL ADAPTER OUT"
            )
        return True

    def _check(self, change: Change, found: dict[str, Change]) -> None:
        """Whether a table's head, of which the checkpoint has nothing, would change with it."""
        if change.is_untied or last_of(module_of(change.name)) not in TABLES or _is_rows(change):
            return
        places = self._places
        names = (*places.checkpoint.tensors, *found)
        has_own_head = any(last_of(module_of(name)) in HEADS and last_of(name) == "weight" for name in names)
        if places.is_tied and places.has_head and not has_own_head:
            raise FoldError(
                f"{change.name!r} is tied to the head (tie_word_embeddings), which the adapter does not name and which "
                "has to keep the base's values; only the model tells its name. Fold with that: lora-fx fold MODEL "
                "ADAPTER OUT"
            )


def _is_rows(change: Change) -> bool:
    """Whether trained rows are all that changes: a head that is tied follows them."""
    return all(isinstance(term, Rows) for term in change.terms)


def _is_same(a: Change, b: Change) -> bool:
    """Whether two changes of one tensor give the same values."""
    if len(a.terms) != 1 or len(b.terms) != 1:
        return False
    one, other = a.terms[0], b.terms[0]
    if isinstance(one, Whole) and isinstance(other, Whole):
        return np.array_equal(one.values, other.values)
    if not isinstance(one, LowRank) or not isinstance(other, LowRank) or one.scaling != other.scaling:
        return False
    if one.low.magnitude is not None:  # an adapter has it everywhere, or nowhere
        return False
    factors = [term.layout.factors(tensor_of(term.low.a), tensor_of(term.low.b)) for term in (one, other)]
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(*factors, strict=True))

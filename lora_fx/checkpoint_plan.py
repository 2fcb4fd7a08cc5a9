"""Which tensors of a checkpoint an adapter changes, and how: all is decided from names and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from .adapter_arrays import AdapterArrays, Array, LowRankArrays
from .adapter_places import joined
from .base_note import KEY, NOTED, is_noted, noted_values, places_of
from .checkpoint_changes import BiasOfB, Change, LowRank, Rows, Whole, tensor_of
from .checkpoint_layouts import layout_of
from .checkpoint_places import CheckpointPlaces, last_of, module_of
from .checkpoint_ties import Ties
from .errors import AdapterError, FoldError
from .hf_checkpoint import Checkpoint
from .stored_tensors import FLOATS, StoredTensor, read_rows


@dataclass(frozen=True, eq=False)
class CheckpointPlan:
    """What folding changes.

    Attributes:
        changes: by tensor, in the order of the adapter.
        unties: config.json has to say that nothing is tied.
        notes: what the caller should know.
    """

    changes: tuple[Change, ...]
    unties: bool
    notes: tuple[str, ...]


def plan_fold(checkpoint: Checkpoint, adapter: AdapterArrays, let_go: Callable[[], object]) -> CheckpointPlan:
    """What folding an adapter into a checkpoint changes.

    Args:
        checkpoint: the base's.
        adapter: as `map_adapter` gives it.
        let_go: as that gives it.

    Raises:
        AdapterError: if the checkpoint has no place for something in the adapter, shapes do not fit, or how a weight
            lies cannot be told.
        FoldError: if a weight is of a type that nothing can be added to, or is tied in a way that only the model tells.
    """
    places = CheckpointPlaces(checkpoint, adapter)
    found: dict[str, Change] = {}
    for change in (*_low_rank_changes(places), *_row_changes(places), *_whole_changes(places, let_go)):
        if change.source.kind not in FLOATS:
            raise FoldError(
                f"{change.source.name!r} is {change.source.kind} in {change.source.path.name}, and only "
                f"{', '.join(FLOATS)} can take what an adapter adds; fold into the checkpoint before it was quantized, "
                "or convert it"
            )
        old = found.get(change.name)
        if old is not None and (old.is_whole or change.is_whole):
            raise AdapterError(
                f"the adapter has {change.name!r} as a whole, and something to add to it; save it again with one of "
                "the two"
            )
        found[change.name] = change if old is None else replace(old, terms=old.terms + change.terms)
    if not found:
        raise AdapterError(
            f"{str(adapter.directory)!r} changes nothing in this checkpoint; is it the adapter that is meant? Give "
            "another"
        )
    ties = Ties(places)
    changes, note = ties.settle(found), places.rename.note
    return CheckpointPlan(tuple(changes), ties.end(changes), () if note is None else (note,))


# A and B --------------------------------------------------------------------------------------------


def _low_rank_changes(places: CheckpointPlaces) -> Iterator[Change]:
    for low in places.adapter.low_rank:
        parameter = places.parameter_of(low)
        name = parameter or joined(low.path, "weight")
        tensor = places.tensor(name)
        if tensor is None and parameter is None and not low.is_lookup:
            tensor = places.table_of_head(low.path, (len(low.b), *low.a.shape[1:]))
        if tensor is None:
            raise AdapterError(places.no_place(name))
        is_parameter = bool(parameter and places.adapter.config.target_parameters)
        layout = layout_of(places, low, name, tensor, is_parameter=is_parameter)
        yield Change(tensor, places.rename(name), low.path, (LowRank(low, layout, places.scaling_at_slot(low)),))
        if low.bias is not None:
            yield _bias_change(places, low, "in_proj_bias" if name.endswith("in_proj_weight") else "bias")


def _bias_change(places: CheckpointPlaces, low: LowRankArrays, own: str) -> Change:
    assert low.bias is not None
    name = joined(low.path, own)
    tensor = places.tensor(name)
    if tensor is None or tensor.shape != low.bias.shape:
        there = "none" if tensor is None else f"one of the shape {list(tensor.shape)}"
        raise AdapterError(
            f"the adapter has a lora_bias for {low.path!r}, to be added to {places.rename(name)!r} of the shape "
            f"{list(low.bias.shape)}, and the checkpoint has {there}; train without lora_bias, or give the base a bias"
        )
    return Change(tensor, places.rename(name), low.path, (BiasOfB(low.bias, places.scaling_of_bias(low)),))


# What was trained as it is ----------------------------------------------------------------------------


def _row_changes(places: CheckpointPlaces) -> Iterator[Change]:
    wanted = places.adapter.config.trainable_token_indices
    for path, values in places.adapter.rows.items():
        named = wanted.items() if isinstance(wanted, Mapping) else [(path, wanted)]
        rows = next((tuple(rows) for name, rows in named if rows and f".{path}".endswith(f".{name}")), None)
        name = joined(path, "weight")
        tensor = places.tensor(name)
        if tensor is None:
            raise AdapterError(places.no_place(name))
        if rows is None or len(rows) != len(values) or values.shape[1:] != tensor.shape[1:]:
            raise AdapterError(
                f"the adapter has {list(values.shape)} trained rows of {path!r}, trainable_token_indices={wanted!r}, "
                f"and the checkpoint's table has the shape {list(tensor.shape)}; take files that belong together"
            )
        if max(rows) >= tensor.shape[0]:
            raise AdapterError(
                f"trainable_token_indices names row {max(rows)} of {path!r}, which has {tensor.shape[0]}; resize the "
                "base as it was for training"
            )
        yield Change(tensor, places.rename(name), path, (Rows(rows, values),))


def _whole_changes(places: CheckpointPlaces, let_go: Callable[[], object]) -> Iterator[Change]:
    """modules_to_save and biases; the base's own table, which PEFT saves beside an adapted one, says nothing."""
    config = places.adapter.config
    for name, values in places.adapter.full.items():
        tensor = places.tensor(name)
        if tensor is None and last_of(name) == "weight":
            tensor = places.table_of_head(module_of(name), values.shape)
        if tensor is None:
            raise AdapterError(places.no_place(name))
        is_saved = any(path.endswith(tuple(config.modules_to_save or ())) for path in _paths_to(name))
        is_trained = is_saved or (config.bias != "none" and last_of(name).endswith("bias"))
        if not is_trained:
            if values.shape == tensor.shape and is_stored(values, tensor):
                let_go()
                continue
            raise AdapterError(
                f"the adapter's file holds {name!r}, which is other than the base's, and by adapter_config.json "
                "neither in modules_to_save nor a trained bias: if the vocabulary was resized, resize the base first; "
                "else the two files do not belong together, so take both from where they were saved"
            )
        if values.shape != tensor.shape:
            raise AdapterError(
                f"the adapter's {name!r} has the shape {list(values.shape)}, the checkpoint's {list(tensor.shape)}; is "
                "this adapter of this model? Take the one that it was trained over"
            )
        yield Change(tensor, places.rename(name), name, (Whole(values),))


_PIECE = 1 << 18


def is_stored(values: Array, tensor: StoredTensor) -> bool:
    """Whether a tensor of the checkpoint is, in the adapter's type or its own, what the adapter has."""
    if tensor.kind not in FLOATS:
        return False
    own = tensor_of(values).reshape(-1)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        for at in range(0, own.numel(), _PIECE):
            mine = own[at : at + _PIECE]
            data = bytearray(file.read(mine.numel() * tensor.dtype.itemsize))
            theirs = torch.frombuffer(data, dtype=tensor.dtype)
            if not (torch.equal(mine, theirs.to(mine.dtype)) or torch.equal(mine.to(theirs.dtype), theirs)):
                return False
    return True


def _paths_to(name: str) -> Iterator[str]:
    """The modules that a tensor lies in: PEFT takes any whose path ends like an entry of modules_to_save."""
    path = module_of(name)
    while path:
        yield path
        path = module_of(path)


# The base ---------------------------------------------------------------------------------------------


def check_base_note(plan: CheckpointPlan, adapter: AdapterArrays) -> None:
    """Look for some values of each adapted weight among those that `lora_fx.save_adapter` noted.

    Raises:
        AdapterError: if a weight is another, or the note cannot be read.
    """
    where = str(adapter.directory)
    noted = noted_values(adapter.metadata.get(KEY), where)
    if noted is None:
        return
    for change in plan.changes:
        tensor, size = change.source, math.prod(change.source.shape)
        if not isinstance(change.terms[0], LowRank) or size < NOTED:
            continue
        with open(tensor.path, "rb") as file:
            rows = [read_rows(file.fileno(), tensor, int(at), 1) for at in places_of(size, NOTED)]
        values = torch.cat(rows).float().numpy().reshape(1, NOTED)
        if not is_noted(noted, values, str(tensor.dtype).removeprefix("torch.")):
            raise AdapterError(
                f"{where} was saved over a base model with other weights ({tensor.name!r} is another, for one); take "
                "that base. If this one is meant, integrity='ignored' folds the adapter all the same"
            )

"""Which tensors of a checkpoint an adapter changes, and how: all is decided from names and shapes, and nothing read.

There is no model to ask how a weight lies. A and B of another shape than each other tell; where they do not, what the
checkpoint says of its siblings and its config.json do; what still means two things is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapter_arrays import AdapterArrays, Array, LowRankArrays
from .adapter_files import TURNED
from .adapter_integrity import OURS, WRITER
from .adapter_places import AdapterPlaces, find_renaming, joined
from .base_note import KEY, NOTED, is_noted, noted_values, places_of
from .dora import why_no_magnitude
from .errors import AdapterError, FoldError, closest
from .hf_checkpoint import Checkpoint
from .layouts import Experts, Kernel, Layout, Matrix
from .stored_tensors import FLOATS, StoredTensor, read_rows
from .tables import some_of

# transformers' classes whose linears are stored (in, out), and what these are called there.
_TURNED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_TURNED_NAMES = ("c_attn", "q_attn", "c_fc", "c_proj")
# Those whose experts are stored (experts, in, out) whatever their sizes.
_TURNED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")
# What tied weights are called, and the classes of models that do nothing else for being tied.
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "word_embedding")
_HEADS = ("lm_head", "embed_out")
_DECODERS = ("ForCausalLM", "LMHeadModel")
_WITH_HEADS = (*_DECODERS, "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "LMHead")


@dataclass(frozen=True, eq=False)
class LowRank:
    """scaling · B @ A, with DoRA's magnitude where the adapter has one."""

    low: LowRankArrays
    layout: Layout
    scaling: float


@dataclass(frozen=True, eq=False)
class BiasOfB:
    """scaling · the bias of B."""

    values: Array
    scaling: float


@dataclass(frozen=True, eq=False)
class Rows:
    """Trained rows in place of the base's."""

    index: tuple[int, ...]
    values: Array


@dataclass(frozen=True, eq=False)
class Whole:
    """A tensor that was trained as a whole, in place of the base's."""

    values: Array


Term = LowRank | BiasOfB | Rows | Whole


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of one tensor.

    Attributes:
        source: the base's tensor.
        name: the result's: the source's, or that of a weight that was tied to it, and no longer is.
        path: the module, or the tensor, that the adapter names.
        terms: what is added; one `Whole` stands alone.
    """

    source: StoredTensor
    name: str
    path: str
    terms: tuple[Term, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the base's values play no part."""
        return isinstance(self.terms[0], Whole)

    @property
    def is_untied(self) -> bool:
        """Whether the result is a tensor more."""
        return self.name != self.source.name


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
    ties = _Ties(places)
    changes, note = ties.settle(found), places.rename.note
    return CheckpointPlan(tuple(changes), ties.end(changes), () if note is None else (note,))


class CheckpointPlaces(AdapterPlaces):
    """The tensors of a checkpoint, by the names that an adapter has for them."""

    def __init__(self, checkpoint: Checkpoint, adapter: AdapterArrays) -> None:
        super().__init__(adapter)
        self.checkpoint = checkpoint
        known = {name.rpartition(".")[0] for name in checkpoint.tensors}
        known |= {name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 3}
        paths = [low.path for low in adapter.low_rank] or list(adapter.rows)
        paths = paths or [name.rpartition(".")[0] for name in adapter.full]
        heads = [path for path in paths if _last(path) in _HEADS and path not in known]  # tied, if they are anywhere
        self.rename = find_renaming([path for path in paths if path not in heads], known)

    def tensor(self, name: str) -> StoredTensor | None:
        """A tensor by its full name in the adapter."""
        return self.checkpoint.tensors.get(self.rename(name))

    def shape_of_parameter(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a tensor by its full name in the adapter; None if there is none."""
        found = self.tensor(parameter)
        return None if found is None else found.shape

    def has_module(self, low: LowRankArrays) -> bool:
        """Whether there is the weight of the module that A and B are named after."""
        return self.tensor(joined(low.path, "weight")) is not None

    def _no_parameter(self, meant: list[str]) -> str:
        return self.no_place(meant[0])

    def no_place(self, name: str) -> str:
        """What to say where there is no tensor of that name."""
        names, own = list(self.checkpoint.tensors), self.rename(name)
        twins = [f"{own}_v", f"{own}_g", own.replace(".weight", ".parametrizations.weight.original0")]
        computed = next((each for each in twins if each in self.checkpoint.tensors), None)
        if computed is not None:
            return (
                f"the checkpoint has {computed!r}, of which {own!r} is computed, so there is no weight to fold into; "
                "fold with the model: lora-fx fold MODEL ADAPTER OUT"
            )
        return (
            f"the checkpoint has no tensor for the adapter's {own!r}.{closest(own, names)} Is this adapter of this "
            "model? If names differ between the files and the model, fold with it: lora-fx fold MODEL ADAPTER OUT"
        )

    @property
    def model_type(self) -> str | None:
        """What config.json says."""
        found = self.checkpoint.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def is_tied(self) -> bool:
        """Whether transformers would tie what the checkpoint has once; where nothing is said, the class decides."""
        config = self.checkpoint.config
        said = [each.get("tie_word_embeddings") for each in (config, *_nested(config))]
        return bool(config) and False not in said

    @property
    def has_head(self) -> bool:
        """Whether the model gives back words, so that its table may be tied to what makes them."""
        named = self.checkpoint.config.get("architectures")
        names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        return not names or any(name.endswith(_WITH_HEADS) for name in names)

    def table_of_head(self, path: str, shape: tuple[int, ...] | None) -> StoredTensor | None:
        """The table that a head is tied to, of which the checkpoint has nothing; None if it is no such head."""
        if _last(path) not in _HEADS or not self.is_tied:
            return None
        tables = [t for name, t in self.checkpoint.tensors.items() if _last(_module(name)) in _TABLES]
        fitting = [table for table in tables if shape is None or table.shape == shape]
        return fitting[0] if len(fitting) == 1 else None


def _nested(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in config.values() if isinstance(value, Mapping)]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _paths_to(name: str) -> Iterator[str]:
    """The modules that a tensor lies in: PEFT takes any whose path ends like an entry of modules_to_save."""
    path = _module(name)
    while path:
        yield path
        path = _module(path)


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
        if (places.adapter.config.target_parameters and parameter) or len(tensor.shape) == 3 == low.a.ndim + 1:
            layout = _parameter_layout(places, low, name, tensor)
        else:
            places.check_rank(low)
            layout = _layout(places, low, name, tensor)
        _check_magnitude(low, layout)
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


def _misfit(low: LowRankArrays, tensor: StoredTensor) -> AdapterError:
    return AdapterError(
        f"A {list(low.a.shape)} and B {list(low.b.shape)} of {low.path!r} do not make a delta for {tensor.name!r}, "
        f"which has the shape {list(tensor.shape)}; is this adapter of this model? Take the base of it"
    )


def _layout(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> Layout:
    """How A and B of a module lie beside its weight, of that full name in the adapter."""
    if low.a.ndim != len(tensor.shape):
        raise _misfit(low, tensor)
    if low.a.ndim > 2:
        return _kernel(places, low, name, tensor)
    out, into = len(low.b), low.a.shape[1]
    if low.is_lookup:
        if tensor.shape != (into, out):
            raise _misfit(low, tensor)
        return Matrix(into, out, stored_in_out=True)
    if tensor.shape not in ((out, into), (into, out)):
        raise _misfit(low, tensor)
    turned = _is_turned(places, low, name, tensor) if out == into else tensor.shape == (into, out)
    return Matrix(*tensor.shape, stored_in_out=turned)


def _is_turned(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> bool:
    """Whether a square weight is stored (in, out).

    Raises:
        AdapterError: if the files say both.
    """
    adapter = places.adapter
    if adapter.metadata.get(WRITER) == OURS:
        return name in turned_of(adapter)
    said = adapter.config.fan_in_fan_out
    siblings = set(_turned_siblings(places, tensor))
    if len(siblings) == 1:
        found = siblings.pop()
    elif siblings:
        raise AdapterError(_unclear(low, tensor, "other weights of that name lie either way"))
    elif places.model_type is None:
        return said
    else:
        found = places.model_type in _TURNED_MODELS and _last(low.path) in _TURNED_NAMES
    if said and not found and not any(_lies_turned(places, other) for other in adapter.low_rank):
        raise AdapterError(
            _unclear(low, tensor, "adapter_config.json says fan_in_fan_out, and the base has its weights (out, in)")
        )
    return found


def _unclear(low: LowRankArrays, tensor: StoredTensor, why: str) -> str:
    return (
        f"{tensor.name!r} is square, {list(tensor.shape)}, and whether it lies (out, in) or (in, out) cannot be told: "
        f"{why}; correct adapter_config.json, or fold with the model: lora-fx fold MODEL ADAPTER OUT"
    )


def _turned_siblings(places: CheckpointPlaces, tensor: StoredTensor) -> Iterator[bool]:
    """How weights of the same last name lie in the checkpoint, where their shape and their bias's tell."""
    last = _last(_module(tensor.name))
    for name, other in places.checkpoint.tensors.items():
        if _last(_module(name)) != last or _last(name) != "weight" or len(other.shape) != 2:
            continue
        bias = places.checkpoint.tensors.get(joined(_module(name), "bias"))
        rows, columns = other.shape
        if rows != columns and bias is not None and len(bias.shape) == 1 and bias.shape[0] in other.shape:
            yield bias.shape[0] == columns


def _lies_turned(places: CheckpointPlaces, low: LowRankArrays) -> bool:
    """Whether the shapes of A and B alone say that a weight is stored (in, out)."""
    shape = places.shape_of_parameter(joined(low.path, "weight"))
    return (
        not low.is_lookup and low.a.ndim == 2 and shape == (low.a.shape[1], len(low.b)) != (len(low.b), low.a.shape[1])
    )


def turned_of(adapter: AdapterArrays) -> frozenset[str]:
    """The weights of which `save_adapter` noted that they lie the other way round.

    Raises:
        AdapterError: if the note cannot be read.
    """
    text = adapter.metadata.get(TURNED)
    try:
        found = json.loads(text) if text is not None else []
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError("it is no list of names")
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{str(adapter.directory)!r}: the note on weights ({TURNED}) cannot be read: {error}; save it again"
        ) from error
    return frozenset(found)


def _kernel(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> Kernel:
    """Of a convolution, or of a transposed one, which lora_fx alone adapts."""
    out, extent = len(low.b), low.a.shape[2:]
    if tensor.shape[2:] != extent or any(size != 1 for size in low.b.shape[2:]) or len(low.a) % low.b.shape[1]:
        raise _misfit(low, tensor)
    is_transposed = name in turned_of(places.adapter)
    if is_transposed:
        inputs, per_group = tensor.shape[:2]
        groups = out // per_group if per_group and out % per_group == 0 else 0
        fits = groups > 0 and inputs == low.a.shape[1] * groups
    else:
        per_group = tensor.shape[1]
        groups = low.a.shape[1] // per_group if per_group and low.a.shape[1] % per_group == 0 else 0
        fits = groups > 0 and tensor.shape[0] == out and out % groups == 0
    if not fits or low.b.shape[1] * groups != len(low.a):
        raise _misfit(low, tensor)
    layout = Kernel(tensor.shape, groups, is_transposed)
    if groups > 1 and not is_transposed and layout.grouped(tensor_of(low.a)) is None:
        raise AdapterError(
            f"A of {low.path!r} mixes the {groups} groups of inputs, which the convolution's grouped kernel keeps "
            "apart; it can be computed beside the convolution, and not folded into it: load_adapter does that"
        )
    return layout


def _parameter_layout(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> Layout:
    """Of target_parameters, and of stacks of matrices."""
    r = places.adapter.rank_at(*places.names_at_slot(low))
    is_extended = low.magnitude is not None or low.bias is not None
    if is_extended and (len(tensor.shape) != 2 or places.adapter.config.target_parameters):
        raise AdapterError(
            f"{name!r} is a parameter of its own, for which use_dora and lora_bias are not defined; train without"
        )
    out, into = len(low.b), low.a.shape[1]
    if len(tensor.shape) == 2:
        if tensor.shape != (out, into) or len(low.a) != r:
            raise _misfit(low, tensor)
        return Matrix(out, into)
    count, rows, columns = tensor.shape if len(tensor.shape) == 3 else (0, 0, 0)
    if len(low.a) != r * count or low.b.shape[1] != len(low.a) or (rows, columns) not in ((out, into), (into, out)):
        raise _misfit(low, tensor)
    if rows != columns:
        return Experts(tensor.shape, stored_in_out=(rows, columns) == (into, out))
    if places.adapter.metadata.get(WRITER) == OURS:
        return Experts(tensor.shape, stored_in_out=name in turned_of(places.adapter))
    if places.model_type is None:
        raise AdapterError(
            f"{tensor.name!r} holds square matrices, {list(tensor.shape)}, and whether they lie (out, in) or (in, out) "
            "cannot be told without the base's config.json; lay it beside the weights"
        )
    return Experts(tensor.shape, stored_in_out=places.model_type in _TURNED_EXPERTS)


def _check_magnitude(low: LowRankArrays, layout: Layout) -> None:
    if low.magnitude is None:
        return
    if reason := why_no_magnitude(layout):
        raise AdapterError(f"{low.path!r}: {reason}; train it without use_dora")
    if low.magnitude.size != layout.out_features:
        raise AdapterError(
            f"lora_magnitude_vector of {low.path!r} has {low.magnitude.size} values, and its weight "
            f"{layout.out_features} outputs; is this adapter of this model? Take the one that it was trained over"
        )


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
        if tensor is None and _last(name) == "weight":
            tensor = places.table_of_head(_module(name), values.shape)
        if tensor is None:
            raise AdapterError(places.no_place(name))
        is_saved = any(path.endswith(tuple(config.modules_to_save or ())) for path in _paths_to(name))
        is_trained = is_saved or (config.bias != "none" and _last(name).endswith("bias"))
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


def tensor_of(array: Array) -> torch.Tensor:
    """An array of the mapped adapter as a tensor of the same memory, if that is aligned; uint16 is bfloat16."""
    found = torch.from_numpy(np.require(array, requirements="A"))
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


# Ties -------------------------------------------------------------------------------------------------


class _Ties:
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
            names = [name for name in self._places.checkpoint.tensors if _last(name) == "weight"]
            if config.get("tie_word_embeddings") is not True or not any(_last(_module(n)) in _HEADS for n in names):
                return False
            ends = (*_TABLES, *_HEADS)
            untied = next((each for each in changes if _last(_module(each.name)) in ends and not _is_rows(each)), None)
        if untied is None:
            return False
        named = config.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
        if not name.endswith(_DECODERS):
            raise FoldError(
                f"folding unties {untied.name!r}, and what that does to {name or 'a model'} only the model tells; fold "
                "with it: lora-fx fold MODEL ADAPTER OUT"
            )
        return True

    def _check(self, change: Change, found: dict[str, Change]) -> None:
        """Whether a table's head, of which the checkpoint has nothing, would change with it."""
        if change.is_untied or _last(_module(change.name)) not in _TABLES or _is_rows(change):
            return
        places = self._places
        names = (*places.checkpoint.tensors, *found)
        has_own_head = any(_last(_module(name)) in _HEADS and _last(name) == "weight" for name in names)
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
    if one.low.magnitude is not None or other.low.magnitude is not None:
        return False
    factors = [term.layout.factors(tensor_of(term.low.a), tensor_of(term.low.b)) for term in (one, other)]
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(*factors, strict=True))


def left_out_note(paths: tuple[Path, ...]) -> str:
    """What to say of files that were not taken along."""
    return f"not copied, as they hold the base's weights, or an adapter: {some_of(map(str, paths), 4)}"


def check_base_note(plan: CheckpointPlan, adapter: AdapterArrays) -> None:
    """Look for some values of each adapted weight among those that `lora_fx.save_adapter` noted.

    Raises:
        AdapterError: if a weight is another, or the note cannot be read.
    """
    where = str(adapter.directory)
    noted = noted_values(adapter.metadata.get(KEY), where)
    for change in () if noted is None else plan.changes:
        tensor, size = change.source, math.prod(change.source.shape)
        if not isinstance(change.terms[0], LowRank) or size < NOTED:
            continue
        with open(tensor.path, "rb") as file:
            rows = [read_rows(file.fileno(), tensor, int(at), 1) for at in places_of(size, NOTED)]
        values = torch.cat(rows).float().numpy().reshape(1, NOTED)
        if noted is not None and not is_noted(noted, values, str(tensor.dtype).removeprefix("torch.")):
            raise AdapterError(
                f"{where} was saved over a base model with other weights ({tensor.name!r} is another, for one); take "
                "that base. If this one is meant, integrity='ignored' folds the adapter all the same"
            )

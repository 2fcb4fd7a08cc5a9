"""Where an adapter's A and B go in an ONNX graph, and what its arrays are there: decided before any insertion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_fx import AdapterArrays, AdapterError, ExportError, LowRankArrays
from lora_fx.errors import closest

from .lora_slots import Slot, Slots, fingerprint_of
from .named_weights import OnnxWeights
from .onnx_fold_plan import (
    WeightChange,
    check_one_reader,
    is_in_out,
    match_adapter,
    other_readers,
    piece_of,
    plan_changes,
)
from .onnx_sites import Form, Mapped, OnnxSite
from .onnx_weights import Array
from .stored_weights import nbits_of, read_weight, shape_of, stored_bytes
from .text import some

# Ops beside which A and B can stand; of any other op that takes a weight, they are added to the weight.
_BESIDE = {("MatMul", 1), ("Gemm", 1), ("MatMulNBits", 1), ("Gather", 0), ("Conv", 1), ("ConvTranspose", 1)}


@dataclass(frozen=True, eq=False)
class PlannedSlots:
    """What to insert.

    Attributes:
        slots: as they are to be recorded.
        sites: {path: the places of the slot}.
        weights: one view of the file for each adapter.
    """

    slots: Slots
    sites: Mapping[str, Sequence[OnnxSite]]
    weights: Sequence[OnnxWeights]


def plan_slots(
    model: ir.Model,
    adapters: Sequence[AdapterArrays],
    mapping: Mapped | None = None,
    rank: int | None = None,
    *,
    partial: bool = False,
) -> PlannedSlots:
    """Places in the file for all that the adapters have.

    Args:
        rank: that every slot gets; None leaves it to each adapter.
        partial: the file is one part of the model.

    Raises:
        AdapterError: if the file has no place for something.
        ExportError: if A and B can stand neither beside the op nor on its weight.
    """
    if not adapters:
        raise ExportError("no adapter was given, so there is nothing to make places for; pass at least one")
    slots: dict[str, Slot] = {}
    sites: dict[str, list[OnnxSite]] = {}
    tensors: dict[str, str] = {}
    views = [OnnxWeights(model, adapter, mapping, partial=partial) for adapter in adapters]
    for weights in views:
        for place in [*_module_places(weights), *_parameter_places(weights)]:
            path, slot = place.path, _slot(place, rank)
            slots[path] = slot if path not in slots else _joined(slots[path], slot)
            known = sites.setdefault(path, [])
            known += [each for each in place.sites if all(each.node is not other.node for other in known)]
        for change in _whole_tensors(weights):
            tensors |= {weights.rename(path): str(change.weight.name) for path in change.paths}
    named = {slot.weight for slot in slots.values()} | set(tensors.values())
    data = [(name, stored_bytes(model.graph.initializers[name])) for name in named]
    _check_alone(slots, sites)
    return PlannedSlots(Slots(tuple(slots.values()), tensors, fingerprint_of(data)), sites, views)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where A and B are to go.

    Attributes:
        path: what the file calls that which they are for.
        low: A and B.
        form: how the weight lies.
        sites: the places; the direct readers of the weight, if it is to be changed itself.
        rows: the outputs that are meant; None for all.
        is_on_weight: whether they change the weight itself.
    """

    path: str
    low: LowRankArrays
    form: Form
    sites: tuple[OnnxSite, ...]
    rows: slice | None
    is_on_weight: bool


def _module_places(weights: OnnxWeights) -> Iterator[_Place]:
    matched = match_adapter(weights)
    for each in matched:
        rows = None if each.piece is None else piece_of(each, matched)
        form = Form("matrix") if each.site.node.op_type == "MatMulNBits" else each.site.form
        beside = _stands_beside(each.site)
        yield _Place(weights.slot_name(each.low), each.low, form, (each.site,), rows, not beside)


def _parameter_places(weights: OnnxWeights) -> Iterator[_Place]:
    for low in weights.adapter.low_rank:
        name = weights.parameter_of(low)
        if name is None:
            continue
        held = weights.held(name)
        if len(held) != 1 or (held[0].perm is not None and sorted(held[0].perm[-2:]) == list(held[0].perm[-2:])):
            raise ExportError(f"{name!r} lies in the file several times, or turned; fold this adapter: fold_into_onnx")
        value, turned = held[0].value, held[0].perm is not None
        check_one_reader(weights, value, weights.rename(name).rpartition(".")[0], f"A and B of {name!r}")
        form = Form("matrix", stored_in_out=turned)
        if len(shape_of(value)) == 3:
            form = Form("matrix", stored_in_out=is_in_out(weights, held[0], low) != turned)
        sites = [site for site in weights.sites if site.weight is value]
        if sites and all(_stands_beside(site) and site.form == form for site in sites):
            yield _Place(weights.rename(name), low, form, tuple(sites), None, is_on_weight=False)
            continue
        readers = tuple(OnnxSite(value, node, i, node, form, (name,), (name,)) for node, i in value.uses())
        yield _Place(weights.rename(name), low, form, readers, None, is_on_weight=True)


def _slot(place: _Place, rank: int | None) -> Slot:
    site, low, form, path = place.sites[0], place.low, place.form, place.path
    shape = shape_of(site.weight)
    slot = Slot(path, form, shape, str(site.weight.name), "", rank, place.is_on_weight, 0, 0, {}, site.modules)
    if rank is not None and (isinstance(rank, bool) or rank < 1 or rank % form.groups):
        raise ExportError(f"rank={rank!r} must be a positive multiple of the {form.groups} groups of {path!r}")
    rows = place.rows or slice(0, slot.out_features)
    what = ["a", "b", *(["bias"] if low.bias is not None else []), *(["gain"] if low.magnitude is not None else [])]
    is_plain = len(what) == 2 and place.rows is None and form.kind == "matrix" and nbits_of(site.weight) is None
    if slot.is_on_weight and not is_plain:
        raise ExportError(
            f"{path!r} is applied by {site.node.op_type}, where A and B stand on the weight, and that goes for whole "
            "float matrices without use_dora and lora_bias; fold this adapter: fold_into_onnx"
        )
    names = {"a": "lora_A.weight", "b": "lora_B.weight", "bias": "lora_B.bias", "gain": "lora_gain"}
    parts = {part: f"{path}.{names[part]}".lstrip(".") for part in what}
    return replace(slot, dtype=_dtype(site), start=rows.start, stop=rows.stop, parts=parts)


def _stands_beside(site: OnnxSite) -> bool:
    node = site.node
    if (node.op_type, site.position) not in _BESIDE or (site.form.kind == "matrix" and len(shape_of(site.weight)) != 2):
        return False
    if node.op_type == "Gemm":
        alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
        turned = "transA" in node.attributes and bool(node.attributes["transA"].as_int())
        return alpha == 1.0 and not turned
    return True


def _dtype(site: OnnxSite) -> str:
    """The type of what the op gives, in which A and B compute."""
    tensor = site.weight.const_value
    if site.node.op_type == "MatMulNBits":
        scales = site.node.inputs[2]
        tensor = None if scales is None else scales.const_value
    assert tensor is not None
    if site.carrier.op_type == "Cast":
        return ir.DataType(site.carrier.attributes["to"].as_int()).name
    return tensor.dtype.name


def _joined(a: Slot, b: Slot) -> Slot:
    """One slot for two adapters."""
    if replace(a, parts={}, names=()) != replace(b, parts={}, names=()):
        raise AdapterError(
            f"the adapters mean different parts of the file by {a.path!r}; put them into files of their own"
        )
    return replace(a, parts={**a.parts, **b.parts}, names=tuple(dict.fromkeys(a.names + b.names)))


def _whole_tensors(weights: OnnxWeights) -> list[WeightChange]:
    """Weights that an adapter brings as a whole: modules_to_save, biases, embeddings with trained rows."""
    adapter = weights.adapter
    if not adapter.full and not adapter.rows:
        return []
    changes = plan_changes(weights.only_whole())
    tied = [
        str(change.weight.name) for change in changes if change.sites and other_readers(change.weight, change.sites)
    ]
    if tied:
        raise ExportError(f"{some(tied)} is tied to something that the adapter does not train; fold this adapter")
    quantized = [str(change.weight.name) for change in changes if nbits_of(change.weight) is not None]
    if quantized:
        raise ExportError(
            f"{some(quantized)} is quantized, and the adapter brings all of it; fold this adapter: fold_into_onnx"
        )
    return changes


def _check_alone(slots: Mapping[str, Slot], sites: Mapping[str, Sequence[OnnxSite]]) -> None:
    for path, slot in slots.items():
        if slot.is_on_weight and other_readers(sites[path][0].weight, sites[path]):
            raise ExportError(f"the weight of {path!r} is read elsewhere too; fold this adapter: fold_into_onnx")


def adapter_arrays(weights: OnnxWeights, slots: Slots) -> dict[str, Array]:
    """{the graph's input: array} of an adapter, in the file's types.

    Raises:
        AdapterError: if the file has no slot for something, or it does not fit.
    """
    found: dict[str, Array] = {}
    for low in weights.adapter.low_rank:
        path = weights.slot_name(low)
        slot = slots.find(path)
        if slot is None and weights.partial:
            weights.left_out.append(low.path)
            continue
        if slot is None:
            raise AdapterError(
                f"the file has no place for {low.path!r} of {str(weights.adapter.directory)!r}."
                f"{closest(path, [slot.path for slot in slots.slots])} It was made for adapters of other modules; make "
                "it again with this one among them"
            )
        weight = weights.model.graph.initializers[slot.weight]
        base = read_weight(weight) if low.magnitude is not None else None
        arrays = slot.arrays(low, weights.scaling_at_slot(low), base)
        found |= {slot.parts[part]: _in_type(array, slot, part) for part, array in arrays.items()}
    found |= _whole_arrays(weights, slots)
    return found


def _in_type(array: Array, slot: Slot, part: str) -> Array:
    with np.errstate(over="ignore"):
        stored = array.astype(ir.DataType[slot.dtype].numpy())
    if not np.isfinite(stored.astype(np.float64)).all():
        raise AdapterError(
            f"{slot.parts[part]!r}, with its scaling, has values that {slot.dtype} cannot hold; export the model in "
            "float32"
        )
    return stored


def _whole_arrays(weights: OnnxWeights, slots: Slots) -> dict[str, Array]:
    """The new values of weights that the adapter brings as a whole."""
    found: dict[str, Array] = {}
    for change in _whole_tensors(weights):
        name = str(change.weight.name)
        if name not in slots.tensors.values():
            raise AdapterError(
                f"the adapter has all of {some(change.paths)}, which the file does not take as an input; make it again "
                "with this adapter among those it is made for"
            )
        found[name] = change.new_values().write({})[change.weight].numpy()
    return found

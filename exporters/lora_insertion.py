"""LoRA beside the ops of an ONNX graph, fed by inputs that may be left out, or by stacks from which each row chooses.

Whatever is added is added to what the op gave: with empty or zero A and B the base's result stays, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir

from lora_fx import AdapterArrays, AdapterError, ExportError, LowRankArrays
from lora_fx.errors import closest

from .lora_slots import Slot, Slots, fingerprint_of
from .named_weights import OnnxWeights
from .onnx_fold_plan import WeightChange, is_in_out, match_adapter, other_readers, piece_of, plan_changes
from .onnx_sites import Form, Mapped, OnnxSite
from .onnx_weights import Array
from .stored_weights import nbits_of, read_weight, rounded, shape_of, stored_bytes
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


def insert_slots(model: ir.Model, planned: PlannedSlots, source: Source) -> None:
    """Insert the nodes of all slots, and record the slots in the file's metadata."""
    taken = {str(value.name) for value in _values(model)} | {str(node.name) for node in model.graph.all_nodes()}
    for slot in planned.slots.slots:
        for site in planned.sites[slot.path]:
            writer = Writer(model, ir.DataType[slot.dtype], taken)
            if slot.is_on_weight:
                _on_weight(slot, site, source, writer)
            else:
                _beside(slot, site, source, writer)
    for name in planned.slots.tensors.values():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.shape, value.type = ir.Shape(value.const_value.shape.numpy()), ir.TensorType(value.const_value.dtype)
        model.graph.inputs.append(value)
    planned.slots.write_to(model)


def _values(model: ir.Model) -> list[ir.Value]:
    ports = [*model.graph.inputs, *model.graph.initializers.values()]
    return ports + [output for node in model.graph.all_nodes() for output in node.outputs]


class Writer:
    """Makes new nodes, in order; whoever has them all puts them into the graph."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, taken: set[str]) -> None:
        self._model, self._taken, self._dtype = model, taken, dtype
        self.nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str,
        dtype: ir.DataType | None = None,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        """The output of a new node; it has the slot's type, or the one given."""
        name = self.free(name)
        output = ir.Value(name=name, type=ir.TensorType(dtype or self._dtype))
        self.nodes.append(ir.Node("", op_type, list(inputs), attributes=attributes, outputs=[output], name=name))
        return output

    def constant(self, array: Array, name: str) -> ir.Value:
        """A new initializer."""
        tensor = ir.tensor(array, name=self.free(name))
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._model.graph.register_initializer(value)
        return value

    def shape(self, *sizes: ir.Value | int, name: str) -> ir.Value:
        """A one-dimensional int64 value of sizes; those that are not known lie in one-dimensional values."""
        parts = [
            size if isinstance(size, ir.Value) else self.constant(np.array([size], np.int64), f"{name}.size")
            for size in sizes
        ]
        return self.op("Concat", *parts, name=name, dtype=ir.DataType.INT64, attributes=[ir.AttrInt64("axis", 0)])

    def shape_of(self, value: ir.Value, name: str, start: int = 0) -> ir.Value:
        """The sizes of a value's axes from `start` on."""
        attributes = [ir.AttrInt64("start", start)] if start else []
        return self.op("Shape", value, name=name, dtype=ir.DataType.INT64, attributes=attributes)

    def free(self, wanted: str) -> str:
        """A name that nothing in the graph has."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}.{count}"
        self._taken.add(name)
        return name


class Source(Protocol):
    """Where the A and B of a slot come from."""

    def delta(self, slot: Slot, node: ir.Node, writer: Writer) -> ir.Value:
        """What is added to what the op gives, of that shape."""

    def on_weight(self, slot: Slot, writer: Writer) -> ir.Value:
        """What is added to the weight."""


class Inputs:
    """Inputs of the graph that may be left out: each is an initializer, too, with values that change nothing."""

    def __init__(self, model: ir.Model, slots: Slots) -> None:
        self._values: dict[str, ir.Value] = {}
        for number, slot in enumerate(slots.slots):
            for part, name in slot.parts.items():
                self._values[name] = _optional_input(
                    model, slot, part, f"lora_{part if part in _ENDS else 'r'}_{number}"
                )

    def delta(self, slot: Slot, node: ir.Node, writer: Writer) -> ir.Value:
        """B(A(x)); with a gain g, + g · (B(A(x)) + y without its bias); with a bias, + that."""
        delta = self._product(slot, node, writer)
        if "gain" in slot.parts:  # DoRA: (1 + g) · (W + ΔW) x
            adapted = writer.op("Add", delta, without_bias(slot, node, writer), name=f"{slot.path}.lora_adapted")
            more = writer.op("Mul", adapted, self._values[slot.parts["gain"]], name=f"{slot.path}.lora_more")
            delta = writer.op("Add", delta, more, name=f"{slot.path}.lora_gained")
        if "bias" in slot.parts:
            delta = writer.op("Add", delta, self._values[slot.parts["bias"]], name=f"{slot.path}.lora_biased")
        return delta

    def _product(self, slot: Slot, node: ir.Node, writer: Writer) -> ir.Value:
        a, b = self._values[slot.parts["a"]], self._values[slot.parts["b"]]
        down, up = f"{slot.path}.lora_A", f"{slot.path}.lora_B"
        x = input_of(slot, node)
        if slot.form.kind == "lookup":
            return writer.op("MatMul", writer.op("Gather", a, x, name=down), b, name=up)
        if slot.form.kind == "matrix":
            return writer.op("MatMul", writer.op("MatMul", x, a, name=down), b, name=up)
        ranks = writer.op(node.op_type, x, a, name=down, attributes=moves_of(node))
        return writer.op("Conv", ranks, b, name=up, attributes=[ir.AttrInt64("group", slot.form.groups)])

    def on_weight(self, slot: Slot, writer: Writer) -> ir.Value:
        """B @ A as the weight lies."""
        a, b = self._values[slot.parts["a"]], self._values[slot.parts["b"]]
        return writer.op("MatMul", a, b, name=f"{slot.path}.lora_delta")


_ENDS = ("gain", "bias")


def _optional_input(model: ir.Model, slot: Slot, part: str, free: str) -> ir.Value:
    dtype, name = ir.DataType[slot.dtype], slot.parts[part]
    if name in model.graph.initializers or any(value.name == name for value in model.graph.inputs):
        raise ExportError(
            f"the file has a value called {name!r} already: it has places for adapters, or LoRA in its graph"
        )
    default = ir.Tensor(slot.default(part).astype(dtype.numpy()), dtype=dtype, name=name)
    sizes = list(default.shape.numpy())
    shape = [_size(slot, part, axis, size, free) for axis, size in enumerate(sizes)] if slot.r is None else sizes
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=default)
    model.graph.register_initializer(value)
    model.graph.inputs.append(value)
    return value


def _size(slot: Slot, part: str, axis: int, size: int, free: str) -> int | str:
    """The size of an axis of an optional input, or the name of one that every adapter decides."""
    other = slot.shape_of(part, slot.empty_rank + slot.form.groups)[axis]
    if other == size:
        return size
    is_shared = slot.form.groups > 1 and part not in _ENDS and other - size == 1
    return f"{free}_per_group" if is_shared else free


def input_of(slot: Slot, node: ir.Node) -> ir.Value:
    """What the op takes beside the weight."""
    value = node.inputs[1 if slot.form.kind == "lookup" else 0]
    assert value is not None
    return value


def moves_of(node: ir.Node) -> list[ir.Attr]:
    """How a convolution moves."""
    names = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "output_padding", "output_shape", "group")
    return [node.attributes[name] for name in names if name in node.attributes]


def without_bias(slot: Slot, node: ir.Node, writer: Writer) -> ir.Value:
    """What the op gives, without the bias that is in the same op."""
    y = node.outputs[0]
    bias = node.inputs[2] if node.op_type in ("Gemm", "Conv", "ConvTranspose") and len(node.inputs) > 2 else None
    if bias is None:
        return y
    if slot.form.kind == "kernel":
        sizes = writer.constant(np.array(slot.shape_of("bias", 1), np.int64), f"{slot.path}.lora_bias_shape")
        bias = writer.op("Reshape", bias, sizes, name=f"{slot.path}.lora_bias")
    return writer.op("Sub", y, bias, name=f"{slot.path}.lora_without_bias")


def _beside(slot: Slot, site: OnnxSite, source: Source, writer: Writer) -> None:
    """Let all that read what the op gives read that plus the delta."""
    node, graph = site.node, site.node.graph
    y, readers = node.outputs[0], list(node.outputs[0].uses())
    total = writer.op("Add", y, source.delta(slot, node, writer), name=f"{slot.path}.lora")
    for reader, i in readers:
        reader.replace_input_with(i, total)
    assert graph is not None
    for i, value in enumerate(graph.outputs):
        if value is y:
            total.shape, total.type = y.shape, y.type
            graph.outputs[i] = total
            total.name, y.name = y.name, writer.free(f"{y.name}_base")
    graph.insert_after(node, writer.nodes)


def _on_weight(slot: Slot, site: OnnxSite, source: Source, writer: Writer) -> None:
    """Let the op take W + B @ A."""
    delta = source.on_weight(slot, writer)
    total = writer.op("Add", site.weight, delta, name=f"{slot.path}.lora")
    graph = site.carrier.graph
    assert graph is not None
    for i, value in enumerate(site.carrier.inputs):
        if value is site.weight:
            site.carrier.replace_input_with(i, total)
    graph.insert_before(site.carrier, writer.nodes)


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
        dtype = ir.DataType[slot.dtype].numpy()
        found |= {slot.parts[part]: array.astype(dtype) for part, array in arrays.items()}
    found |= _whole_arrays(weights, slots)
    return found


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
        value = read_weight(change.weight)
        for edit in change.edits:
            value = edit(value)
        found[name] = rounded(change.weight, value).array
    return found

"""LoRA beside the ops of an ONNX graph, fed by inputs that may be left out, or by stacks from which each row chooses.

Whatever is added is added to what the op gave: with empty or zero A and B the base's result stays, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from lora_fx import ExportError

from .lora_places import PlannedSlots
from .lora_slots import Slot, Slots
from .onnx_sites import OnnxSite
from .onnx_weights import Array


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
        if value not in model.graph.inputs:
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

    def shape_of(self, value: ir.Value, name: str) -> ir.Value:
        """The sizes of a value's axes."""
        return self.op("Shape", value, name=name, dtype=ir.DataType.INT64)

    def size_of(self, value: ir.Value, axis: int, name: str) -> ir.Value:
        """The size of one axis, one-dimensional."""
        position = self.constant(np.array([axis], np.int64), f"{name}.axis")
        return self.op("Gather", self.shape_of(value, f"{name}.shape"), position, name=name, dtype=ir.DataType.INT64)

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
    position = {"Gemm": 2, "Conv": 2, "ConvTranspose": 2, "MatMulNBits": 5}.get(node.op_type)
    bias = node.inputs[position] if position is not None and len(node.inputs) > position else None
    if bias is None:
        return y
    beta = node.attributes["beta"].as_float() if node.op_type == "Gemm" and "beta" in node.attributes else 1.0
    if beta != 1.0:
        factor = writer.constant(np.array(beta, ir.DataType[slot.dtype].numpy()), f"{slot.path}.lora_beta")
        bias = writer.op("Mul", bias, factor, name=f"{slot.path}.lora_beta_bias")
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

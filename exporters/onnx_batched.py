"""One file that holds many adapters, and lets each row of a batch choose one: 0 the base, 1 the first, and so on.

    add_adapter_stacks(base, out, {"french": directory, ...})    of an existing file, with neither model nor torch
    append_adapter(file, "german", directory)                    one more, with no export

A of all adapters lie in one initializer, (adapters + 1, in, r), and so do their Bs; entry 0 is zero. What a row takes
is gathered by its number, so that a batch costs one product however many adapters it mixes (S-LoRA, arXiv 2311.03285).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lora_fx import AdapterArrays, AdapterError, ExportError, read_adapter

from .lora_insertion import Writer, input_of, insert_slots, moves_of, without_bias
from .lora_places import PlannedSlots, adapter_arrays, plan_slots
from .lora_slots import SLOTS_KEY, Slot, Slots, read_slots
from .named_weights import OnnxWeights
from .onnx_adapters import Adapter, SlotsReport
from .onnx_files import check_apart, check_derived, checked_target, has_external_data, open_model, says_damaged, written
from .onnx_sites import Mapped
from .onnx_weights import Array
from .sessions import checked_file
from .slots_check import Feed, check_rows_of_file
from .text import some

IDS = "adapter_ids"
_INT = ir.DataType.INT64


@says_damaged
def add_adapter_stacks(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    mapping: Mapped | None = None,
    inputs: Sequence[Feed] | None = None,
    check: bool = True,
) -> SlotsReport:
    """Give an existing ONNX file all of these adapters, and an input `adapter_ids`, int64 (batch,).

    Rows of the batch whose number is 0 have the base's result, bit for bit. That, and that every row has the adapter
    which it chose, is found out by running the file: a model may lay its batch elsewhere than in front.

    Args:
        base: the base model's file, whose inputs have the batch in front, as for `fold_into_onnx`.
        out: the file to write; not `base` itself.
        adapters: {name: directory, or what `read_adapter` read}; the first has the number 1.
        mapping: as for `fold_into_onnx`.
        inputs: a list of {input: array} to check with; None makes some up.
        check: False writes the file unchecked.

    Raises:
        AdapterError: if `adapters` is no mapping, or an adapter has something for which there is no place.
        ExportError: if a file cannot be read or written, an adapter cannot be chosen by rows (experts, parameters,
            convolutions with groups, and what is trained in full), or rows would get others' adapters; nothing is
            written then.
    """
    if not isinstance(adapters, Mapping):
        raise AdapterError(f"adapters are given as {{name: directory}}, and not as {type(adapters).__name__}")
    started = time.perf_counter()
    file, target = checked_file(base), checked_target(out)
    model = open_model(file)
    check_apart(file, model, target)
    before = len(list(model.graph.all_nodes()))
    slots = insert_stacks(model, {name: _read(each) for name, each in adapters.items()}, mapping)
    with written(model, target, external=has_external_data(model)) as files:
        check_derived(files.model, file)
        if check:
            check_rows_of_file(files.model, slots, file, inputs)
    places = {slot.path: (slot.in_features, slot.stop - slot.start, slot.r or "free") for slot in slots.slots}
    nodes = (before, len(list(model.graph.all_nodes())))
    return SlotsReport(os.fspath(out), places, nodes, slots.fingerprint, time.perf_counter() - started)


def _read(adapter: Adapter) -> AdapterArrays:
    return adapter if isinstance(adapter, AdapterArrays) else read_adapter(adapter)


def insert_stacks(model: ir.Model, adapters: Mapping[str, AdapterArrays], mapping: Mapped | None = None) -> Slots:
    """`add_adapter_stacks` on a model in memory."""
    _check_names(adapters)
    planned = plan_slots(model, list(adapters.values()), mapping, None)
    _check_by_rows(planned.slots)
    if any(value.name == IDS for value in model.graph.inputs):
        raise ExportError(f"the file has an input {IDS!r} already; take the base's file, or append_adapter to this one")
    if SLOTS_KEY in model.metadata_props:
        raise ExportError("the file has places for adapters already; take the base's file")
    slots = replace(planned.slots, ids=IDS, adapters=tuple(adapters))
    slots = replace(slots, slots=tuple(replace(slot, r=_highest(slot, planned)) for slot in slots.slots))
    planned = replace(planned, slots=slots)
    arrays = [adapter_arrays(weights, slots) for weights in planned.weights]
    insert_slots(model, planned, Stacks(model, slots, arrays))
    return slots


@says_damaged
def append_adapter(
    path: str | os.PathLike[str],
    name: str,
    adapter: Adapter,
    out: str | os.PathLike[str] | None = None,
    *,
    mapping: Mapped | None = None,
    inputs: Sequence[Feed] | None = None,
    check: bool = True,
) -> int:
    """Add one more adapter to a file that `add_adapter_stacks` or `export_onnx_batched` wrote.

    Args:
        out: the file to write; None replaces `path`.
        mapping, inputs, check: as for `add_adapter_stacks`.

    Returns:
        The adapter's number.

    Raises:
        AdapterError: if it has something for which the file has no place, or the name is taken.
        ExportError: if a file cannot be read or written.
    """
    file, target = checked_file(path), checked_target(path if out is None else out)
    model = open_model(file)
    check_apart(file, model, target, may_replace=True)
    slots = read_slots(model.metadata_props, file.name)
    if slots.ids is None:
        raise ExportError(f"{file} holds no stacks of adapters; write_onnx_adapter makes a file that goes with it")
    if name in slots.adapters:
        raise AdapterError(
            f"{file.name} has an adapter {name!r} already; it has {some(slots.adapters)}. Choose another name"
        )
    arrays = _read(adapter)
    weights = OnnxWeights(model, arrays, mapping)
    grown = tuple(replace(slot, r=_rank_with(slot, weights)) for slot in slots.slots)
    new = replace(slots, slots=grown, adapters=(*slots.adapters, name))
    _check_names(dict.fromkeys(new.adapters))
    values = adapter_arrays(weights, new)
    for slot in new.slots:
        for part, initializer in slot.parts.items():
            value = model.graph.initializers[initializer]
            assert value.const_value is not None
            stack = value.const_value.numpy()
            entry = values.get(initializer, slot.default(part).astype(stack.dtype))
            value.const_value = ir.tensor(_stacked([*stack, entry], slot, part), name=initializer)
            value.shape = None
    new.write_to(model)
    with written(model, target, external=has_external_data(model)) as files:
        check_derived(files.model, file)
        if check:
            check_rows_of_file(files.model, new, file, inputs)
    return len(new.adapters)


def _check_names(adapters: Mapping[str, object]) -> None:
    wrong = [name for name in adapters if not isinstance(name, str) or not name]
    if wrong:
        raise AdapterError(f"an adapter's name is {wrong[0]!r}; it must be a string that is not empty")


def _check_by_rows(slots: Slots) -> None:
    for slot in slots.slots:
        if slot.is_on_weight or slot.form.is_transposed or slot.form.groups > 1:
            raise ExportError(
                f"rows of a batch cannot choose adapters of {slot.path!r}: they are added to its weight, which all "
                "rows share, or its convolution has groups; use export_onnx_adapters, or fold"
            )
        if slot.form.kind == "kernel" and "gain" in slot.parts:
            raise ExportError(f"rows of a batch cannot choose use_dora of the convolution {slot.path!r}")
    if slots.tensors:
        raise ExportError(
            f"rows of a batch cannot choose {some(slots.tensors)}, which is trained in full; use export_onnx_adapters"
        )


def _highest(slot: Slot, planned: PlannedSlots) -> int:
    return max(_rank_with(replace(slot, r=1), weights) for weights in planned.weights)


def _rank_with(slot: Slot, weights: OnnxWeights) -> int:
    """The rank of the stack, if this adapter is in it."""
    names = {slot.path, *slot.names}
    ranks = [len(low.a) for low in weights.adapter.low_rank if weights.slot_name(low) in names]
    return max([slot.r or 1, *ranks])


def _stacked(entries: Sequence[Array], slot: Slot, part: str) -> Array:
    """(adapters + 1, ...), each filled up to the slot's rank."""
    wanted = slot.shape_of(part, slot.r)
    filled = [np.pad(each, [(0, w - n) for w, n in zip(wanted, each.shape, strict=True)]) for each in entries]
    return np.stack(filled)


class Stacks:
    """A and B of all adapters, from which each row of the batch gathers its own."""

    def __init__(self, model: ir.Model, slots: Slots, arrays: Sequence[Mapping[str, Array]]) -> None:
        batch = next(
            (value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape)), None
        )
        self._ids = ir.Value(name=IDS, shape=ir.Shape([batch]), type=ir.TensorType(_INT))
        model.graph.inputs.append(self._ids)
        self._stacks: dict[str, ir.Value] = {}
        self._sizes: dict[str, ir.Value] = {}
        for slot in slots.slots:
            dtype = ir.DataType[slot.dtype].numpy()
            for part, name in slot.parts.items():
                base = slot.default(part).astype(dtype)
                stack = _stacked([base, *(each.get(name, base) for each in arrays)], slot, part)
                value = ir.Value(
                    name=name, const_value=ir.tensor(stack, name=name), type=ir.TensorType(ir.DataType[slot.dtype])
                )
                model.graph.register_initializer(value)
                self._stacks[name] = value

    def on_weight(self, slot: Slot, writer: Writer) -> ir.Value:
        """Never asked for: see `_check_by_rows`."""
        raise AssertionError(slot.path)

    def delta(self, slot: Slot, node: ir.Node, writer: Writer) -> ir.Value:
        """B(A(x)) of each row's adapter, and its gain and bias; computed as (rows, rest, features)."""
        if slot.form.kind == "kernel":
            return self._convolved(slot, node, writer)
        name, x, y = slot.path, input_of(slot, node), node.outputs[0]
        if slot.form.kind == "lookup":
            ranks = self._looked_up(slot, x, writer)
        else:
            rows = writer.op("Reshape", x, self._rows(slot.in_features, writer), name=f"{name}.lora_rows")
            ranks = writer.op("MatMul", rows, self._own(slot, "a", writer), name=f"{name}.lora_A")
        delta = writer.op("MatMul", ranks, self._own(slot, "b", writer), name=f"{name}.lora_B")
        if "gain" in slot.parts:
            plain = without_bias(slot, node, writer)
            plain = writer.op("Reshape", plain, self._rows(slot.out_features, writer), name=f"{name}.lora_y")
            adapted = writer.op("Add", delta, plain, name=f"{name}.lora_adapted")
            more = writer.op("Mul", adapted, self._own_output(slot, "gain", writer), name=f"{name}.lora_more")
            delta = writer.op("Add", delta, more, name=f"{name}.lora_gained")
        if "bias" in slot.parts:
            delta = writer.op("Add", delta, self._own_output(slot, "bias", writer), name=f"{name}.lora_biased")
        return writer.op("Reshape", delta, writer.shape_of(y, f"{name}.lora_y_shape"), name=f"{name}.lora_delta")

    def _own(self, slot: Slot, part: str, writer: Writer) -> ir.Value:
        """What each row's adapter has there, (rows, ...)."""
        return writer.op("Gather", self._stacks[slot.parts[part]], self._ids, name=f"{slot.parts[part]}.own")

    def _own_output(self, slot: Slot, part: str, writer: Writer) -> ir.Value:
        """One value for each output, (rows, 1, out)."""
        shape = writer.constant(np.array([0, 1, -1], np.int64), f"{slot.parts[part]}.own_shape")
        return writer.op("Reshape", self._own(slot, part, writer), shape, name=f"{slot.parts[part]}.own_row")

    def _rows(self, features: int, writer: Writer) -> ir.Value:
        """The shape (rows, -1, features)."""
        count = writer.shape_of(self._ids, "lora_rows")
        return writer.shape(count, -1, features, name="lora_rows_shape")

    def _looked_up(self, slot: Slot, x: ir.Value, writer: Writer) -> ir.Value:
        """A's rows for each row's adapter: all As are one table, and an adapter's begins at its number times in."""
        name = slot.path
        stack = self._stacks[slot.parts["a"]]  # whose rank grows with what `append_adapter` adds
        table_shape = writer.shape(-1, writer.size_of(stack, 2, f"{name}.lora_rank"), name=f"{name}.lora_table_shape")
        table = writer.op("Reshape", stack, table_shape, name=f"{name}.lora_table")
        size = writer.constant(np.array(slot.in_features, np.int64), f"{name}.lora_vocabulary")
        column = writer.constant(np.array([-1, 1], np.int64), f"{name}.lora_column")
        starts = writer.op("Mul", self._ids, size, name=f"{name}.lora_starts", dtype=_INT)
        starts = writer.op("Reshape", starts, column, name=f"{name}.lora_start", dtype=_INT)
        count = writer.shape(writer.shape_of(self._ids, "lora_rows"), -1, name="lora_rows_shape")
        tokens = writer.op(
            "Cast", x, name=f"{name}.lora_tokens", dtype=_INT, attributes=[ir.AttrInt64("to", int(_INT))]
        )
        tokens = writer.op("Reshape", tokens, count, name=f"{name}.lora_ids", dtype=_INT)
        places = writer.op("Add", tokens, starts, name=f"{name}.lora_places", dtype=_INT)
        return writer.op("Gather", table, places, name=f"{name}.lora_A")

    def _convolved(self, slot: Slot, node: ir.Node, writer: Writer) -> ir.Value:
        """All adapters' ranks side by side, those of other adapters than the row's made zero, and one pointwise B."""
        name, extent = slot.path, slot.shape[2:]
        ones = [1] * len(extent)
        count = writer.shape_of(self._stacks[slot.parts["a"]], f"{name}.lora_count")
        first = writer.constant(np.array([-1, slot.shape[1], *extent], np.int64), f"{name}.lora_a_shape")
        a = writer.op("Reshape", self._stacks[slot.parts["a"]], first, name=f"{name}.lora_a")
        ranks = writer.op("Conv", input_of(slot, node), a, name=f"{name}.lora_A", attributes=moves_of(node))
        mask = self._mask(slot, count, writer)
        ranks = writer.op("Mul", ranks, mask, name=f"{name}.lora_masked")
        perm = [1, 0, *range(2, 3 + len(extent))]  # (adapters, out, r, ...) to (out, adapters, r, ...)
        turned = [ir.AttrInt64s("perm", perm)]
        b = writer.op("Transpose", self._stacks[slot.parts["b"]], name=f"{name}.lora_b_turned", attributes=turned)
        last = writer.constant(np.array([slot.out_features, -1, *ones], np.int64), f"{name}.lora_b_shape")
        b = writer.op("Reshape", b, last, name=f"{name}.lora_b")
        delta = writer.op("Conv", ranks, b, name=f"{name}.lora_B")
        if "bias" in slot.parts:
            own = self._own(slot, "bias", writer)
            shape = writer.constant(np.array([-1, slot.out_features, *ones], np.int64), f"{name}.lora_bias_shape")
            delta = writer.op(
                "Add", delta, writer.op("Reshape", own, shape, name=f"{name}.lora_bias"), name=f"{name}.lora_biased"
            )
        return delta

    def _mask(self, slot: Slot, count: ir.Value, writer: Writer) -> ir.Value:
        """(rows, adapters · r, 1, ...): 1 at the ranks of the row's adapter."""
        name = slot.path
        zero = writer.constant(np.array(0, np.int64), f"{name}.lora_zero")
        number = writer.op("Gather", count, zero, name=f"{name}.lora_number", dtype=_INT)
        dtype = ir.DataType[slot.dtype].numpy()
        values = writer.constant(np.array([0, 1], dtype), f"{name}.lora_off_on")
        chosen = writer.op("OneHot", self._ids, number, values, name=f"{name}.lora_chosen")
        column = writer.constant(np.array([0, -1, 1], np.int64), f"{name}.lora_mask_column")
        chosen = writer.op("Reshape", chosen, column, name=f"{name}.lora_chosen_column")
        rank = writer.size_of(self._stacks[slot.parts["a"]], 1, f"{name}.lora_rank")
        wide = writer.shape(1, 1, rank, name=f"{name}.lora_wide")
        spread = writer.op("Expand", chosen, wide, name=f"{name}.lora_spread")
        shape = writer.shape(
            writer.shape_of(self._ids, "lora_rows"), -1, *(1 for _ in slot.shape[2:]), name=f"{name}.lora_mask_shape"
        )
        return writer.op("Reshape", spread, shape, name=f"{name}.lora_mask")

"""Two ONNX files, op for op and byte for byte."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from lora_fx import ExportError

from .external_data import check_external_data, data_locations
from .sessions import checked_file
from .text import Shown, Table, reason, some, table


@dataclass(frozen=True)
class OnnxDiff(Shown):
    """How a second ONNX file differs from a first. Node metadata and doc strings do not count.

    Attributes:
        nodes: number of nodes of the two files.
        ops_added, ops_removed: {op type: how many more nodes the second file has, or fewer}.
        nodes_changed: nodes at the same place that differ in type, name, inputs, outputs or attributes.
        interface_changed: what differs in graph inputs, outputs, operator sets and functions.
        initializers_added, initializers_removed: names only in the second, or only in the first file.
        initializers_reshaped: names whose shape or type differs.
        values_changed: names of equal shape and type whose bytes differ.
        values_equal: number of initializers whose bytes are equal.
    """

    nodes: tuple[int, int]
    ops_added: dict[str, int]
    ops_removed: dict[str, int]
    nodes_changed: tuple[str, ...]
    interface_changed: tuple[str, ...]
    initializers_added: tuple[str, ...]
    initializers_removed: tuple[str, ...]
    initializers_reshaped: tuple[str, ...]
    values_changed: tuple[str, ...]
    values_equal: int

    @property
    def same_ops(self) -> bool:
        """Whether the files have the same nodes in the same order, wired alike."""
        return self.nodes[0] == self.nodes[1] and not self.nodes_changed

    @property
    def same_graph(self) -> bool:
        """Whether the files differ in the values of initializers at most."""
        other = (self.interface_changed, self.initializers_added, self.initializers_removed, self.initializers_reshaped)
        return self.same_ops and not any(other)

    @property
    def identical(self) -> bool:
        """Whether the files compute the same."""
        return self.same_graph and not self.values_changed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"same_ops": self.same_ops, "same_graph": self.same_graph}

    def blocks(self) -> list[str | Table]:
        """What differs."""
        rows: list[tuple[str, object]] = [
            ("nodes", f"{self.nodes[0]} and {self.nodes[1]}" + (", op for op the same" if self.same_ops else "")),
            ("ops added", self.ops_added),
            ("ops removed", self.ops_removed),
            ("nodes changed", some(self.nodes_changed)),
            ("interface", some(self.interface_changed)),
            ("initializers added", some(self.initializers_added)),
            ("initializers removed", some(self.initializers_removed)),
            ("initializers reshaped", some(self.initializers_reshaped)),
            (
                "initializers of other values",
                f"{len(self.values_changed)} of {len(self.values_changed) + self.values_equal}"
                + (f": {some(self.values_changed)}" if self.values_changed else ""),
            ),
        ]
        return [table(("compared", ""), [row for row in rows if row[1]])]


def compare_onnx(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> OnnxDiff:
    """Compare two ONNX files: nodes, attributes, graph inputs and outputs, and every initializer.

    Raises:
        ExportError: if one of them cannot be read, or its external data is not what it was written with.
    """
    first, second = _load(checked_file(a)), _load(checked_file(b))
    ops_a, ops_b = _ops(first.graph), _ops(second.graph)
    values_a = {tensor.name: tensor for tensor in first.graph.initializer}
    values_b = {tensor.name: tensor for tensor in second.graph.initializer}
    both = [name for name in values_a if name in values_b]
    reshaped = {name for name in both if _kind(values_a[name]) != _kind(values_b[name])}
    changed = [n for n in both if n not in reshaped and _bytes(values_a[n]) != _bytes(values_b[n])]
    return OnnxDiff(
        nodes=(len(first.graph.node), len(second.graph.node)),
        ops_added=dict(ops_b - ops_a),
        ops_removed=dict(ops_a - ops_b),
        nodes_changed=_changed_nodes(first.graph, second.graph),
        interface_changed=_changed_interface(first, second),
        initializers_added=tuple(name for name in values_b if name not in values_a),
        initializers_removed=tuple(name for name in values_a if name not in values_b),
        initializers_reshaped=tuple(name for name in both if name in reshaped),
        values_changed=tuple(changed),
        values_equal=len(both) - len(reshaped) - len(changed),
    )


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path} cannot be read as ONNX: {reason(error)}; export it again") from error
    if not model.HasField("graph") or not model.ir_version:
        raise ExportError(f"{path} holds no ONNX graph (it is empty or something else); export it again")
    check_external_data(path, model)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise ExportError(
            f"the weights of {path} cannot be read: {reason(error)}; put {some(data_locations(model))} beside it, or "
            "export it again"
        ) from error
    return model


def _ops(graph: onnx.GraphProto) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                counts += _ops(inner)
    return counts


def _changed_nodes(a: onnx.GraphProto, b: onnx.GraphProto) -> tuple[str, ...]:
    pairs = zip(a.node, b.node, strict=False)
    changed = [f"{x.op_type} {x.name}" for x, y in pairs if _plain(x) != _plain(y)]
    longer, common = (a, len(b.node)) if len(a.node) > len(b.node) else (b, len(a.node))
    return tuple(changed + [f"{node.op_type} {node.name}" for node in longer.node[common:]])


def _changed_interface(a: onnx.ModelProto, b: onnx.ModelProto) -> tuple[str, ...]:
    changed = []
    for kind, left, right in (("input", a.graph.input, b.graph.input), ("output", a.graph.output, b.graph.output)):
        ports_a, ports_b = {v.name: _plain(v) for v in left}, {v.name: _plain(v) for v in right}
        changed += [
            f"{kind} {name}"
            for name in [*ports_a, *(n for n in ports_b if n not in ports_a)]
            if ports_a.get(name) != ports_b.get(name)
        ]
        if list(ports_a) != list(ports_b) and set(ports_a) == set(ports_b):
            changed.append(f"order of {kind}s")
    if _opsets(a) != _opsets(b):
        changed.append(f"opsets {_opsets(a)} and {_opsets(b)}")
    if [_plain(f) for f in a.functions] != [_plain(f) for f in b.functions]:
        changed.append("functions")
    return tuple(changed)


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in model.opset_import}


def _plain(message: Any) -> bytes:
    """A message's bytes without doc strings and metadata, at any depth."""
    copy = type(message)()
    copy.CopyFrom(message)
    _strip(copy)
    return bytes(copy.SerializeToString(deterministic=True))


def _strip(message: Any) -> None:
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in value if field.is_repeated else [value]:
            _strip(item)


def _kind(tensor: onnx.TensorProto) -> tuple[Any, ...]:
    return tensor.data_type, tuple(tensor.dims)


def _bytes(tensor: onnx.TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    if tensor.data_type == onnx.TensorProto.STRING:
        return repr(list(tensor.string_data)).encode()
    return bytes(numpy_helper.to_array(tensor).tobytes())

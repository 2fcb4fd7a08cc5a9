"""An exported float32 graph in a shorter float: weights are rounded once, inputs and outputs stay as they are."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from lora_fx import ExportError
from lora_fx.errors import closest

from .onnx_sites import SCOPES_KEY, module_of_weight
from .onnx_weights import Array, StoredWeight, hide_weights, write_manifest
from .quiet import quiet
from .text import reason, some

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def as_data_type(dtype: Any) -> ir.DataType | None:
    """What the caller of an export means by `dtype=`: a name, or torch's dtype.

    Raises:
        ExportError: if it is none of what an export takes.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in _DTYPES:
        raise ExportError(f"dtype={dtype!r} must be one of {', '.join(map(repr, _DTYPES))}, or None")
    return None if dtype is None else _DTYPES[name]


def convert_precision(
    model: ir.Model, weights: Sequence[StoredWeight], dtype: ir.DataType, keep_fp32: Sequence[str] = ()
) -> tuple[ir.Model, tuple[StoredWeight, ...]]:
    """The model with its inner values and weights in another float, and the entries of its weights.

    The new graph depends on the old graph alone, not on the values of its weights: these are out of sight while it is
    made, and rounded by themselves.

    Args:
        keep_fp32: types of ops, and names of modules, that go on computing in float32; ops that the operator set does
            not have in bfloat16 do so in any case.

    Raises:
        ExportError: if the graph is not in float32, a weight leaves the dtype's range, or `keep_fp32` names nothing.
    """
    others = [weight for weight in weights if weight.dtype in ("FLOAT16", "BFLOAT16", "DOUBLE")]
    if others:
        raise ExportError(
            f"dtype= converts graphs in float32, and this one has {some(weight.name for weight in others)} in "
            f"{others[0].dtype}; give it one in float32, gm.to(torch.float32), or export it as it is"
        )
    kept = _kept_nodes(model, weights, keep_fp32)
    if dtype == ir.DataType.FLOAT:
        return model, tuple(weights)
    if dtype == ir.DataType.BFLOAT16:
        kept |= {id(node): str(node.name) for node in model.graph.all_nodes() if not _takes_bfloat16(node, model)}
    named = {name: model.graph.initializers[name] for name in (w.name for w in weights if w.dtype == "FLOAT")}
    rounded = {
        name: _rounded(value, dtype)
        for name, value in named.items()
        if any(id(node) not in kept for node, _ in value.uses())
    }
    ports = [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)]
    hide_weights(model, rounded)
    proto = ir.to_proto(model)
    _drop_types_of_initializers(proto.graph)
    result = _in_float16(proto, ports, list(kept.values()))
    if dtype == ir.DataType.BFLOAT16:
        _turn_into_bfloat16(result.graph, _float_tensors(proto.graph))
    converted = ir.from_proto(result)
    for value in [value for value in converted.graph.inputs if value.name in rounded]:
        converted.graph.inputs.remove(value)
        value.const_value = rounded[str(value.name)]
        converted.graph.register_initializer(value)
    converted.graph.sort()
    entries = tuple(dataclasses.replace(w, dtype=dtype.name) if w.name in rounded else w for w in weights)
    write_manifest(converted, entries)
    return converted, entries


def _rounded(value: ir.Value, dtype: ir.DataType) -> ir.TensorProtocol:
    assert value.const_value is not None
    exact = value.const_value.numpy()
    with np.errstate(over="ignore"):
        array = exact.astype(dtype.numpy())
    lost = np.isfinite(exact) & ~np.isfinite(array)
    if lost.any():
        raise ExportError(
            f"{value.name!r} holds values up to {np.abs(exact[lost]).max():.3g}, which {dtype.name} cannot; pass "
            'keep_fp32=[its module], or dtype="bfloat16"'
        )
    return ir.Tensor(array, dtype=dtype, name=str(value.name))


def _kept_nodes(model: ir.Model, weights: Sequence[StoredWeight], keep: Sequence[str]) -> dict[int, str]:
    """{id: name} of the nodes that stay in float32."""
    modules = {weight.name: module_of_weight(weight.fqn) for weight in weights if weight.layout != "computed"}
    names = {node: [node.op_type, *_modules(node, modules)] for node in model.graph.all_nodes()}
    kept: dict[int, str] = {}
    for entry in keep:
        hits = [node for node, own in names.items() if any(_is_named(name, entry) for name in own)]
        if not hits:
            known = dict.fromkeys(name for own in names.values() for name in own)
            near = closest(entry, list(known))
            raise ExportError(f"keep_fp32=[{entry!r}, ...] is neither an op type nor a module of the graph.{near}")
        kept |= {id(node): str(node.name) for node in hits}
    return kept


def _takes_bfloat16(node: ir.Node, model: ir.Model) -> bool:
    """Whether the operator set has the op for it: Cos and Conv, for two, got it late."""
    if node.domain not in ("", "ai.onnx"):
        return True
    schema = onnx.defs.get_schema(node.op_type, model.opset_imports[""])
    kinds = [set(formal.types) for formal in (*schema.inputs, *schema.outputs)]
    return all("tensor(bfloat16)" in kind for kind in kinds if "tensor(float)" in kind)


def _modules(node: ir.Node, by_weight: Mapping[str, str]) -> list[str]:
    """The modules around a node, as torch noted them, and those whose weights it takes."""
    found = [by_weight[str(value.name)] for value in node.inputs if value is not None and value.name in by_weight]
    with contextlib.suppress(ValueError, SyntaxError):
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
        found += [str(scope) for scope in scopes[:-1]]  # the last is the op's own
    return [name for name in found if name]


def _is_named(name: str, entry: str) -> bool:
    return f".{name}".endswith(f".{entry}") or name.startswith(f"{entry}.")


def _drop_types_of_initializers(graph: onnx.GraphProto) -> None:
    """The converter believes these rather than the initializers, some of which stay float32."""
    named = {tensor.name for tensor in graph.initializer}
    others = [value for value in graph.value_info if value.name not in named]
    del graph.value_info[:]
    graph.value_info.extend(others)


def _in_float16(proto: onnx.ModelProto, ports: list[str], kept: list[str]) -> onnx.ModelProto:
    """ONNX Runtime's converter; casts are put around what stays, and at the ports named."""
    path = list(sys.path)
    try:
        with quiet():
            from onnxruntime.transformers.float16 import convert_float_to_float16

            converted: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=ports, node_block_list=kept)
            _drop_repeated(converted.graph)
            return converted
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime's tools cannot convert this graph: {reason(error)}; export it in float32, or trace the "
            "model in the dtype that is wanted: lora_fx.trace(model.half(), args)"
        ) from error
    finally:
        sys.path[:] = path  # to which that import adds its own directory


def _drop_repeated(graph: onnx.GraphProto) -> None:
    """Two nodes that stay in float32 and take one value get the same cast twice."""
    nodes = {node.output[0] or node.name: node for node in graph.node}
    values = {value.name: value for value in graph.value_info}
    if len(nodes) < len(graph.node):
        kept, types = list(nodes.values()), list(values.values())
        del graph.node[:], graph.value_info[:]
        graph.node.extend(kept)
        graph.value_info.extend(types)


def _float_tensors(graph: onnx.GraphProto) -> dict[tuple[str, str], onnx.TensorProto]:
    """{("", initializer) or (a node's first output, attribute): tensor} of all that is FLOAT, in sub-graphs too."""
    found = {("", tensor.name): tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.t.data_type == TensorProto.FLOAT:
                found[node.output[0], attribute.name] = attribute.t
            for inner in _inner_graphs(attribute):
                found |= _float_tensors(inner)
    return found


def _inner_graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)


def _turn_into_bfloat16(graph: onnx.GraphProto, exact: Mapping[tuple[str, str], onnx.TensorProto]) -> None:
    """BFLOAT16 wherever there is FLOAT16; constants are rounded from the float32 that they were."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for tensor in graph.initializer:
        _round_to_bfloat16(tensor, exact.get(("", tensor.name)))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            if attribute.type == onnx.AttributeProto.TENSOR:
                _round_to_bfloat16(attribute.t, exact.get((node.output[0], attribute.name)))
            for inner in _inner_graphs(attribute):
                _turn_into_bfloat16(inner, exact)


def _round_to_bfloat16(tensor: onnx.TensorProto, exact: onnx.TensorProto | None) -> None:
    if tensor.data_type != TensorProto.FLOAT16:
        return
    array: Array = numpy_helper.to_array(exact if exact is not None else tensor).astype(np.float32)
    bfloat16 = ir.DataType.BFLOAT16.numpy()
    with np.errstate(over="ignore"):
        rounded = array.astype(bfloat16)
    # float32's lowest value, with which positions are masked, is none of bfloat16's.
    largest = np.sign(array) * ir.DataType.BFLOAT16.max
    rounded = np.where(np.isfinite(array) & ~np.isfinite(rounded), largest, rounded)
    tensor.CopyFrom(ir.to_proto(ir.Tensor(rounded.astype(bfloat16), name=tensor.name)))

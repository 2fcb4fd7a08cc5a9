"""Which initializer of an ONNX file is which parameter of the model.

The exporter's optimizer looks at weights: it merges those that happen to be equal, drops biases that
happen to be zero, and renames what it transposes to `val_92`. A graph whose shape depends on the values
of its weights cannot be the same for a base model and its fine-tuned twin. So weights are hidden while
it works: they enter it as opaque graph inputs, and become initializers again afterwards. What is computed
from weights alone (the transpose of a linear weight, for one) is folded then, with a record of what it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from lora_fx import ExportError

from .text import reason

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Array = NDArray[Any]

MANIFEST_KEY = "lora_fx.weights"
FOLDED_KEY = "lora_fx.folded"
_VERSION = 1


@dataclass(frozen=True)
class StoredWeight:
    """One initializer that holds a weight of the model.

    Attributes:
        name: the initializer's name: the weight's fqn, `<fqn>.T` for a second, transposed copy.
        fqn: the weight's dotted name in the model; for "computed", all of them, joined by a comma.
        layout: "as_stored", "transposed", "quantized" (the packed values of MatMulNBits), or "computed" (made of
            one or more weights at export; such an initializer keeps the exporter's name).
        perm: the axes' order if transposed: initializer = weight.permute(perm); of a quantized weight, that of the
            (out, in) which is packed.
        shape: the initializer's shape.
        dtype: the initializer's ONNX type, such as "FLOAT".
        aliases: other names of the same (tied) weight in the model.
        scales, zero_points: the initializers that go with the packed values of a quantized weight.
    """

    name: str
    fqn: str
    layout: str
    perm: tuple[int, ...] | None
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    scales: str | None = None
    zero_points: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Origin:
    """What a value that depends on weights alone is made of."""

    fqns: tuple[str, ...]
    layout: str
    perm: tuple[int, ...] | None = None


def hide_weights(model: ir.Model, names: Collection[str]) -> dict[str, tuple[ir.Value, ir.TensorProtocol]]:
    """Turn the initializers `names` into graph inputs without a value. Undone by `restore_weights`."""
    held: dict[str, tuple[ir.Value, ir.TensorProtocol]] = {}
    graph = model.graph
    for name in [n for n in graph.initializers if n in names]:
        value = graph.initializers[name]
        if value.const_value is None:
            continue
        held[name] = (value, value.const_value)
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    return held


def restore_weights(
    model: ir.Model,
    held: Mapping[str, tuple[ir.Value, ir.TensorProtocol]],
    aliases: Mapping[str, tuple[str, ...]],
) -> tuple[StoredWeight, ...]:
    """Make the hidden weights initializers again, fold what depends on them alone, and name all of it."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    graph = model.graph
    taken = {name for name in _value_names(model) if name not in held}
    fqn_of: dict[str, str] = {}
    for fqn, (value, tensor) in held.items():
        graph.inputs.remove(value)
        if not value.uses():
            continue
        value.const_value = tensor
        value.name = _free_name(fqn, taken)  # a forward's argument may have a parameter's name
        fqn_of[value.name] = fqn
        graph.register_initializer(value)
    origins = _origins(graph, fqn_of)
    optimizer.fold_constants_ir(model)
    passes.RemoveUnusedNodesPass()(model)
    return tuple(_named(graph, origins, aliases))


def _origins(graph: ir.Graph, fqn_of: Mapping[str, str]) -> dict[str, _Origin]:
    """{value name: origin} of the weights and of every value that is computed from weights alone."""
    origins = {name: _Origin((fqn,), "as_stored") for name, fqn in fqn_of.items()}
    constants = {name for name in graph.initializers if name not in origins}
    for node in graph:
        inputs = [value.name for value in node.inputs if value is not None]
        if node.op_type == "Constant":
            constants.update(str(output.name) for output in node.outputs)
        if not inputs or not all(name in origins or name in constants for name in inputs):
            continue
        used = [origins[str(name)] for name in inputs if name in origins]
        for output in node.outputs if used else ():
            origins[str(output.name)] = _derived(node, used)
    return origins


def _derived(node: ir.Node, used: list[_Origin]) -> _Origin:
    source = used[0]
    if node.op_type == "Identity":
        return source
    if node.op_type == "Transpose" and source.layout == "as_stored":
        attribute = node.attributes.get("perm")
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        rank = len(shape) if shape is not None else 2
        perm = tuple(attribute.as_ints()) if attribute is not None else tuple(reversed(range(rank)))
        return _Origin(source.fqns, "transposed", perm)
    return _Origin(tuple(dict.fromkeys(fqn for origin in used for fqn in origin.fqns)), "computed")


def _named(
    graph: ir.Graph, origins: Mapping[str, _Origin], aliases: Mapping[str, tuple[str, ...]]
) -> Iterator[StoredWeight]:
    """Give every transposed weight its fqn, or `<fqn>.T` where the fqn is taken, and tell what is where."""
    taken = {str(value.name) for value in _graph_values(graph)}
    for name in list(graph.initializers):
        origin = origins.get(name)
        if origin is None:
            continue
        value = graph.initializers[name]
        if origin.layout == "transposed":
            fqn = origin.fqns[0]
            value.name = _free_name(fqn if fqn not in taken else f"{fqn}.T", taken)
        tensor = value.const_value
        assert tensor is not None
        yield StoredWeight(
            name=str(value.name),
            fqn=", ".join(origin.fqns),
            layout=origin.layout,
            perm=origin.perm,
            shape=tuple(tensor.shape.numpy()),
            dtype=tensor.dtype.name,
            aliases=aliases.get(origin.fqns[0], ()),
        )


def _free_name(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}.{count}"
    taken.add(name)
    return name


def _graph_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _value_names(model: ir.Model) -> set[str]:
    """Names of all values, in sub-graphs too."""
    return {str(value.name) for graph in model.graphs() for value in _graph_values(graph)}


def write_manifest(
    model: ir.Model, weights: tuple[StoredWeight, ...], shared_modules: Mapping[str, str] | None = None
) -> None:
    """Record in the file's metadata which initializer is which weight.

    Args:
        shared_modules: {another name of a module: its own}; None keeps what the file records.
    """
    if shared_modules is None:
        shared_modules = read_shared_modules(model.metadata_props)
    entries = {}
    for weight in weights:
        assert weight.name in model.graph.initializers, weight.name
        entry = weight.to_dict()
        del entry["name"]
        entries[weight.name] = {key: value for key, value in entry.items() if value not in (None, ())}
    record: dict[str, Any] = {"version": _VERSION, "weights": entries}
    if shared_modules:
        record["shared_modules"] = dict(shared_modules)
    model.metadata_props[MANIFEST_KEY] = json.dumps(record, sort_keys=True)


def write_stamps(model: ir.Model, stamps: Sequence[Mapping[str, Any]]) -> None:
    """Record what was folded into the file, after what is recorded there already.

    Raises:
        ExportError: if that is damaged.
    """
    if stamps:
        model.metadata_props[FOLDED_KEY] = json.dumps([*read_stamps(model.metadata_props), *stamps])


def read_stamps(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was folded into a file, adapter by adapter: by `fold_into_onnx`, or before `export_onnx` wrote it.

    Each has the sha256 of the adapter's tensors, its strength and scaling, and of which base: `base` is the sample that
    `lora_fx.save_adapter` notes, `base_sample` one of the file that was folded into.

    Raises:
        ExportError: if the record is damaged.
    """
    try:
        return [dict(entry) for entry in json.loads(metadata.get(FOLDED_KEY, "[]"))]
    except (ValueError, TypeError) as error:
        raise ExportError(f"the record {FOLDED_KEY!r} in the ONNX file is damaged; take the base's file") from error


def read_shared_modules(metadata: Mapping[str, str]) -> dict[str, str]:
    """{another name of a module that stands in the model twice: its own}, as far as the file records it."""
    try:
        found = json.loads(metadata.get(MANIFEST_KEY, "{}")).get("shared_modules", {})
        return {str(alias): str(name) for alias, name in found.items()}
    except (ValueError, AttributeError) as error:
        raise ExportError(f"the record {MANIFEST_KEY!r} in the ONNX file is damaged; export the model again") from error


def read_manifest(model: str | os.PathLike[str] | onnx.ModelProto | Mapping[str, str]) -> dict[str, StoredWeight]:
    """{initializer name: which weight it holds} of a file that `export_onnx` wrote.

    Args:
        model: the file, the ONNX model, or its metadata (`session.get_modelmeta().custom_metadata_map`).

    Raises:
        ExportError: if the file cannot be read, or has no such record, or a damaged one.
    """
    if isinstance(model, str | os.PathLike):
        import onnx

        try:
            model = onnx.load(model, load_external_data=False)
        except Exception as error:
            raise ExportError(f"{model} cannot be read as an ONNX file: {reason(error)}; export it again") from error
    metadata = model if isinstance(model, Mapping) else {prop.key: prop.value for prop in model.metadata_props}
    if MANIFEST_KEY not in metadata:
        raise ExportError(
            f"the ONNX file has no record {MANIFEST_KEY!r} of its weights: export_onnx did not write it, or a "
            "tool that came after dropped it; take the file that exporters.export_onnx wrote"
        )
    try:
        entries = json.loads(metadata[MANIFEST_KEY])["weights"]
        return {name: _stored_weight(name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the record {MANIFEST_KEY!r} in the ONNX file is damaged ({reason(error)}); export the model again"
        ) from error


def _stored_weight(name: str, entry: Mapping[str, Any]) -> StoredWeight:
    perm = entry.get("perm")
    return StoredWeight(
        name=name,
        fqn=entry["fqn"],
        layout=entry["layout"],
        perm=None if perm is None else tuple(perm),
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        aliases=tuple(entry.get("aliases", ())),
        scales=entry.get("scales"),
        zero_points=entry.get("zero_points"),
    )

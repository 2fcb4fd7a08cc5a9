"""Names of an ONNX file's inputs, outputs and dimensions; and what its metadata must not tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from lora_fx import ExportError

from .example_inputs import Example

# Of what torch writes beside each node, only this is worth its bytes: which module the node comes from.
# `stack_trace` holds source paths of the machine that exported.
_KEPT = ("pkg.torch.onnx.name_scopes",)


def output_names(program: ExportedProgram) -> list[str]:
    """One name per tensor the program returns: the keys of its output, `output` or `output_0`, ...

    Raises:
        ExportError: if it returns numbers or strings, for which ONNX has no place, or no tensor at all.
    """
    spec = program.call_spec.out_spec
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    marks = list(range(len(specs)))
    paths = pytree.tree_flatten_with_path(marks if spec is None else pytree.tree_unflatten(marks, spec))[0]
    names: list[str] = []
    for (path, _), output in zip(paths, specs, strict=True):
        name = "_".join(_key(key) for key in path)
        if isinstance(output.arg, TensorArgument):
            names.append(name if name and not name[0].isdigit() else f"output_{name}".rstrip("_"))
        elif not isinstance(output.arg, ConstantArgument) or output.arg.value is not None:
            raise ExportError(
                f"the model returns {_described(output.arg)} as {name or 'its output'!r}, and an ONNX file returns "
                "only tensors; return a tensor, or nothing"
            )
    if not names:
        raise ExportError("the model returns no tensor, and an ONNX file returns only tensors; return what it computes")
    return names


def input_names(model: ir.Model, example: Example) -> list[str]:
    """One name per tensor: the graph's own, or the key of a dictionary, where that is a dotted name by itself.

    `past_key_values={"past_key_values.0.key": tensor}` is the input past_key_values.0.key.
    """
    paths = [
        path for path, leaf in pytree.tree_flatten_with_path((example.args, example.kwargs))[0] if _is_tensor(leaf)
    ]
    keys = [_key(path[-1]) for path in paths]
    both = zip(keys, model.graph.inputs, strict=True)
    return [key if "." in key and keys.count(key) == 1 else str(value.name) for key, value in both]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _described(argument: Any) -> str:
    if isinstance(argument, ConstantArgument):
        return f"{argument.value!r} ({type(argument.value).__name__})"
    kind = type(argument).__name__.removeprefix("Sym").removesuffix("Argument").lower()
    return f"a number that its inputs' sizes decide ({kind})"


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def name_ports(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Name the graph's inputs and outputs; a value inside that has one of these names gets another.

    An output that has an input's name is called `<name>_out`.

    Returns:
        {old name: new name} of all initializers.
    """
    graph = model.graph
    initializers = {str(value.name): value for value in graph.initializers.values()}
    wanted = list(inputs)
    for name in outputs:
        while name in wanted:
            name = f"{name}_out"
        wanted.append(name)
    ports = [*graph.inputs, *graph.outputs]
    taken = {str(value.name) for value in _values(model)} | set(wanted)
    for value in list(_values(model)):
        if value.name in wanted and not any(value is port for port in ports):
            value.name = _unlike(value.name, taken)
    for port in ports:  # two steps, since names may change places
        port.name = _unlike(str(port.name), taken)
    for name, port in zip(wanted, ports, strict=True):
        port.name = name
    return {old: str(value.name) for old, value in initializers.items()}


def _unlike(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"{name}_inner"
    taken.add(name)
    return name


def name_dimensions(model: ir.Model, example: Example, rename: Any) -> list[str]:
    """Call the free dimensions what the example calls them; returns what turned out not to be free.

    Args:
        rename: `ONNXProgram.rename_axes`, which also renames inside expressions such as `2*s1`.
    """
    symbols: dict[str, str] = {}
    fixed: list[str] = []
    for value, (tensor, names) in zip(model.graph.inputs, example.tensors(), strict=True):
        shape = value.shape if value.shape is not None else ir.Shape([])
        for i, name in names.items():
            dimension = shape[i]
            text = str(dimension.value) if isinstance(dimension, ir.SymbolicDim) else str(dimension)
            if text.isdigit():  # torch writes a dimension that its guards fixed as a symbol called "3"
                shape[i] = int(text)
                fixed.append(f"dimension {i} ({name!r}) of input {value.name!r} is fixed at {tensor.shape[i]}")
            elif text not in symbols:
                # Two that torch leaves independent are two, unless somebody says that they are one.
                is_taken = name in symbols.values() and name not in example.meant
                symbols[text] = f"{value.name}_dim_{i}" if is_taken else name
    if symbols:
        rename(symbols)
    return fixed


def strip_metadata(model: ir.Model) -> None:
    """Drop what tells about the exporting machine or about torch's internals."""
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            kept = {key: node.metadata_props[key] for key in _KEPT if key in node.metadata_props}
            node.metadata_props.clear()
            node.metadata_props.update(kept)
            node.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None


def copy_module_paths(gm: torch.fx.GraphModule, program: ExportedProgram) -> None:
    """Give the re-exported nodes the module paths that the traced nodes have, if the two run in step."""
    traced = [node for node in gm.graph.nodes if node.op == "call_function"]
    exported = [node for node in program.graph.nodes if node.op == "call_function"]
    if [node.target for node in traced] != [node.target for node in exported]:
        return
    for source, node in zip(traced, exported, strict=True):
        if source.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = source.meta["nn_module_stack"]


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from list(graph.initializers.values())
        for node in graph:
            yield from node.outputs

"""The folded graph as an ONNX file that is op for op the base model's."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import fx
from torch.export import Dim, ExportedProgram

import lora_fx
from lora_fx import ExportError, LoraFxWarning
from lora_fx.attributes import holds_values
from lora_fx.quantized import has_quantized

from .eval_mode import evaluating
from .example_inputs import Example, make_example, second_example, torch_export_shapes, without_ones
from .grouped_products import grouped_products
from .onnx_files import Written, check_file, checked_target, is_external, save_files, written
from .onnx_names import copy_module_paths, input_names, name_dimensions, name_ports, output_names, strip_metadata
from .onnx_report import Dims, OnnxReport
from .onnx_weights import (
    StoredWeight,
    hide_weights,
    read_manifest,
    restore_weights,
    write_manifest,
    write_stamps,
)
from .precision import as_data_type, convert_precision
from .quantization import Metric, Quantization, QuantizationReport, as_quantization, compare_outputs, quantize_weights
from .quiet import quiet
from .text import reason, some
from .verification import NOTHING_COMPARABLE, ShapeCheck, check_shape, feed_of, open_for_check
from .weight_check import check_weights


def export_onnx(
    gm: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    keep_fp32: Sequence[str] = (),
    quantize: str | Quantization | None = None,
    metric: Metric | None = None,
    opset: int | None = None,
    external_data: bool | None = None,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    check: bool = True,
) -> OnnxReport:
    """Write a folded (or untouched) graph as an ONNX file, and check that it computes what torch computes.

    The file depends on the graph alone, not on the values of its weights, so a folded graph gives the
    base's file node for node, with other bytes in the adapted weights. Weights have their own dotted
    names (`<fqn>.T` for a second, transposed copy), and `read_manifest` tells which of them lie
    transposed. The evaluation graph is exported; `gm` is as before afterwards. Weights are written as they
    are at the time of the call. Files at `path` are replaced at the end, when all is checked, or not at all.

    Args:
        gm: a graph module from `lora_fx.trace`, `lora_fx.fold`, `torch.fx.symbolic_trace`, or
            `torch.export.export(...).module()`.
        path: the file to write. Its directory must exist.
        opset: version of the operator set; None is the exporter's choice.
        external_data: weights in `<path>.data` (True), in the file (False), or beside it if they take
            more than 1.5 GiB (None).
        args, kwargs: example inputs; None for those that `lora_fx.trace` remembered.
        dynamic_shapes: None for the remembered free dimensions, "auto" for all that the graph leaves
            free, or torch.export's form, in which a string names a free dimension.
        check: run ONNX Runtime (CPU) and torch on the example inputs, and on a second shape if
            dimensions are free, compare the weights, and refuse a file that disagrees.
        dtype: "float16" or "bfloat16": what the inside of a float32 graph computes in, and its weights are stored
            as; inputs and outputs stay float32. ONNX Runtime's CPU cannot run bfloat16: of such a file only the
            weights are checked.
        keep_fp32: types of ops, and names of modules, that go on in float32; for dtype.
        quantize: "int4", "int8" or a `Quantization`: weights that the graph multiplies with are quantized, after the
            float file was checked; the report tells how far the outputs move at the example inputs.
        metric: measures the float file and the quantized one, such as lambda session: accuracy(session); for the
            report.

    Raises:
        ExportError: if the graph holds unfolded adapters, trains, cannot be written in ONNX, has weights that
            are not finite, or the file does not agree with torch; nothing is written then.
    """
    started = time.perf_counter()
    _check_options(opset, external_data)
    data_type, options = as_data_type(dtype), as_quantization(quantize)
    if keep_fp32 and data_type is None:
        raise ExportError('keep_fp32= says what dtype= leaves in float32; pass dtype="float16", say, as well')
    if isinstance(keep_fp32, str):
        raise ExportError(f"keep_fp32={keep_fp32!r} must be a list of op types and module names: [{keep_fp32!r}]")
    if options is not None and data_type == ir.DataType.BFLOAT16:
        raise ExportError(
            'a bfloat16 file does not run on the CPU to measure what quantizing costs; pass dtype="float16"'
        )
    if metric is not None and options is None:
        raise ExportError("metric= compares a quantized file with the float one; pass quantize= as well")
    _check_graph(gm)
    target = checked_target(path)
    _check_weights(gm)
    example = make_example(gm, args, kwargs, dynamic_shapes)
    notes = [] if any(example.dimensions) else ["all dimensions are fixed; pass dynamic_shapes to leave some free"]
    with evaluating(gm):
        model, weights, found = _convert(gm, without_ones(example), opset)
        notes += found
        if data_type is not None:
            model, weights = convert_precision(model, weights, data_type, keep_fp32)
        external = is_external(model, external_data)
        with written(model, target, external=external) as files:
            check_file(files.model)
            checks, lines = _check_against_torch(gm, files.model, example, data_type) if check else ((), [])
            notes += lines
            quantized = None
            if options is not None:
                quantized = _quantize(model, files, example, options, metric)
                weights = tuple(read_manifest(model.metadata_props).values())
                notes += [quantized.poor] if quantized.poor is not None else []
            size = files.size
            has_data = files.data is not None and files.data.exists()
    for note in found:
        warnings.warn(note, LoraFxWarning, stacklevel=2)
    graph = model.graph
    return OnnxReport(
        path=os.fspath(path),
        data_path=f"{os.fspath(path)}.data" if has_data else None,
        size=size,
        opset=model.opset_imports[""],
        nodes=_count(model).total(),
        ops=dict(_count(model).most_common()),
        weights=weights,
        inputs={str(value.name): _dims(value) for value in graph.inputs},
        outputs={str(value.name): _dims(value) for value in graph.outputs},
        shapes_checked=tuple(each.shapes for each in checks),
        max_error=max((each.relative_error for each in checks), default=None),
        seconds=time.perf_counter() - started,
        warnings=tuple(notes),
        quantization=quantized,
    )


def _check_options(opset: Any, external_data: Any) -> None:
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int) or not 1 <= opset <= newest):
        raise ExportError(f"opset={opset!r} is not an operator set that onnx {onnx.__version__} knows (1 to {newest})")
    if external_data not in (None, True, False):
        raise ExportError(f"external_data={external_data!r} must be True, False or None")


def _check_graph(gm: Any) -> None:
    try:
        adapters = list(lora_fx.active_adapters(gm)) if lora_fx.adapter_names(gm) else []
    except lora_fx.LoraFxError as error:
        raise ExportError(f"export_onnx takes a graph module: {error}") from error
    if adapters:
        raise ExportError(
            f"the graph holds {some(adapters)} unfolded, which would slow the file down and break its fusions. "
            "Fold first: export_onnx(lora_fx.fold(gm), path). A file whose adapters stay switchable at run "
            "time is what export_onnx_adapters(gm, path) writes"
        )
    if has_quantized(gm):
        raise ExportError(
            "the graph calls linears that store their weights in a few bits, which a file cannot. Fold with "
            "lora_fx.fold(gm, quantized='dequantize'), and store the file's weights in few bits: export_onnx(..., "
            "quantize='int4')"
        )


def _check_weights(gm: fx.GraphModule) -> None:
    tensors = [*gm.named_parameters(), *gm.named_buffers()]
    meta = [name for name, tensor in tensors if not holds_values(tensor)]
    if meta:
        raise ExportError(
            f"{some(meta)} have no values (device 'meta', or fake tensors); load the weights before tracing, or bind "
            "them: lora_fx.bind_weights"
        )
    bad = [name for name, parameter in gm.named_parameters() if not _is_finite(parameter)]
    bad += [name for name, buffer in gm.named_buffers() if buffer.is_floating_point() and bool(buffer.isnan().any())]
    if bad:
        raise ExportError(
            f"{some(bad)} hold NaN or infinite values; a file with such weights computes nothing. "
            "Look for a training run that diverged, or a weight outside its dtype's range"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(tensor.detach().isfinite().all())


def _convert(
    gm: fx.GraphModule, example: Example, opset: int | None
) -> tuple[ir.Model, tuple[StoredWeight, ...], list[str]]:
    program = _export_program(gm, example)
    outputs = output_names(program)
    notes = _mutations(program)
    copy_module_paths(gm, program)
    _copy_what_is_turned(program)
    try:
        # Without its optimizer, which would look at the values of the weights: see onnx_weights.
        with quiet():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=opset,
                custom_translation_table=grouped_products(program),
            )
    except Exception as error:
        raise ExportError(
            f"torch cannot write this graph in ONNX: {reason(error)}. Replace the operation it names in the model"
        ) from error
    assert onnx_program is not None
    model = onnx_program.model
    _check_opset(model, opset)
    if len(model.graph.inputs) != len(example.tensors()):
        raise ExportError(
            f"the graph takes {len(example.tensors())} tensors, but its ONNX form takes {len(model.graph.inputs)}; "
            "pass only tensors (and None, numbers and flags, which are written into the file as they are)"
        )
    notes += name_dimensions(model, example, onnx_program.rename_axes)
    inputs = input_names(model, example)
    weights = _optimize(model, program, _aliases(gm))
    names = name_ports(model, inputs, outputs)
    weights = tuple(dataclasses.replace(weight, name=names[weight.name]) for weight in weights)
    strip_metadata(model)
    shared = {alias: site.path for site in lora_fx.find_sites(gm) for alias in site.aliases}
    write_manifest(model, weights, shared)
    write_stamps(model, _stamps(gm))
    return model, weights, notes


def _stamps(gm: fx.GraphModule) -> tuple[Mapping[str, Any], ...]:
    """What was folded into the graph."""
    try:
        return lora_fx.fold_report(gm).stamps
    except lora_fx.FoldError:
        return ()


def _export_program(gm: fx.GraphModule, example: Example) -> ExportedProgram:
    shapes = torch_export_shapes(gm, example)
    if shapes is not None:
        # A plain name asks for a free dimension: an error if the model fixes it.
        shapes = torch.utils._pytree.tree_map(lambda spec: Dim.DYNAMIC if isinstance(spec, str) else spec, shapes)
    try:
        # Kernels, and with them decompositions, may depend on requires_grad: base and folded must not differ.
        with quiet(), torch.no_grad():
            return torch.export.export(gm, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export refuses this graph with these inputs: {reason(error)}. "
            f"Asked for the free dimensions {[names for _, names in example.tensors()]}; "
            "pass other args=, kwargs= or dynamic_shapes="
        ) from error


def _mutations(program: ExportedProgram) -> list[str]:
    """What the graph writes into, apart from its own intermediate values."""
    signature = program.graph_signature
    names = signature.inputs_to_buffers | signature.inputs_to_parameters
    written_into = dict.fromkeys(_first_source(node) for node in program.graph.nodes if _is_in_place(node))
    targets = [names.get(node.name, node.name) for node in written_into if node.op == "placeholder"]
    if not targets:
        return []
    return [f"the model writes into {some(targets)} when it runs; an ONNX file forgets that between two runs"]


def _copy_what_is_turned(program: ExportedProgram) -> None:
    """Make each `transpose(...).contiguous()` a copy, for the views of it.

    Attention may be laid out so that there is nothing to copy, but not any more when torch takes it apart.
    """
    turns = (torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.contiguous.default and node.args[0].target in turns:
            node.target = torch.ops.aten.clone.default
            node.kwargs = {"memory_format": torch.contiguous_format}


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _first_source(node: fx.Node) -> fx.Node:
    """Through views, the tensor that a node writes into."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node) and _may_view(node.target):
        node = node.args[0]
    return node


def _may_view(op: Any) -> bool:
    """Whether the op's result may be a part of its first input, and not a tensor of its own."""
    schema = getattr(op, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _optimize(
    model: ir.Model, program: ExportedProgram, aliases: Mapping[str, tuple[str, ...]]
) -> tuple[StoredWeight, ...]:
    weights = {name for name, tensor in program.state_dict.items() if tensor.is_floating_point() or tensor.is_complex()}
    with quiet():
        held = hide_weights(model, weights)
        optimizer.optimize_ir(model)
        return restore_weights(model, held, aliases)


def _aliases(gm: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """{fqn: the other names of the same tensor}, for tied weights."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            groups.setdefault(key, []).append(name)
    return {name: tuple(n for n in names if n != name) for names in groups.values() if len(names) > 1 for name in names}


def _check_opset(model: ir.Model, opset: int | None) -> None:
    got = model.opset_imports.get("")
    if opset is not None and got != opset:
        raise ExportError(
            f"asked for opset {opset}, but torch {torch.__version__} does not convert this graph to it and gave opset "
            f"{got}; pass opset={got}, or leave opset=None, which takes the exporter's choice"
        )


def _check_against_torch(
    gm: fx.GraphModule, path: Path, example: Example, dtype: ir.DataType | None
) -> tuple[tuple[ShapeCheck, ...], list[str]]:
    try:
        session = open_for_check(path)
    except ExportError as error:
        if dtype != ir.DataType.BFLOAT16:
            raise
        _check_stored(path, gm)
        return (), [
            f"not run: ONNX Runtime's CPU has no bfloat16 kernels for it, so only weights were checked ({error})"
        ]
    notes: list[str] = []
    examples = [example]
    if any(example.dimensions):
        second, line = second_example(gm, example)
        examples += [second] if second is not None else []
        notes += [line] if second is None else []
    inside = getattr(torch, dtype.name.lower()) if dtype not in (None, ir.DataType.FLOAT) else None
    checks = tuple(check_shape(session, gm, each, inside=inside) for each in examples)
    for each in checks:
        if not each.ok:
            again = check_shape(session, gm, examples[checks.index(each)], inside=inside)
            why = "" if again == each else "; it differs on every run: the model draws random numbers"
            if again == each and each is not checks[0] and checks[0].ok:
                why = "; at the sizes that it was traced with it does, so keep those: lora_fx.trace(dynamic_shapes=...)"
            raise ExportError(
                f"the exported file does not compute what torch computes, so nothing was written: {each}{why}. "
                "export_onnx(..., check=False) writes it all the same, to look into it"
            )
    if all(each.is_vacuous for each in checks):
        raise ExportError(
            f"the exported file was not checked, so nothing was written: {NOTHING_COMPARABLE}. "
            "export_onnx(..., check=False) writes it all the same"
        )
    _check_stored(path, gm)
    return checks, notes


def _check_stored(path: Path, gm: fx.GraphModule) -> None:
    weights = check_weights(path, gm)
    if not weights.ok:
        raise ExportError(
            f"the exported file holds other weights than the graph, so nothing was written. {weights}. "
            "export_onnx(..., check=False) writes it all the same, to look into it"
        )


def _quantize(
    model: ir.Model, files: Written, example: Example, options: Quantization, metric: Metric | None
) -> QuantizationReport:
    """Quantize the model, write it over its float files, and measure both."""
    before, size = _measured(files.model, example, metric), files.size
    count = quantize_weights(model, options)
    save_files(model, files)
    check_file(files.model)
    after = _measured(files.model, example, metric)
    return QuantizationReport(
        bits=options.bits,
        block_size=options.block_size,
        symmetric=options.symmetric,
        weights=count,
        bytes_before=size,
        bytes_after=files.size,
        outputs=compare_outputs([str(value.name) for value in model.graph.outputs], before[0], after[0]),
        metric=None if before[1] is None or after[1] is None else (before[1], after[1]),
    )


def _measured(path: Path, example: Example, metric: Metric | None) -> tuple[list[Any], float | None]:
    """(outputs at the example inputs, the caller's measure) of a file; nothing holds it open afterwards."""
    session = open_for_check(path)
    outputs = list(session.run(None, feed_of(session, example)))
    return outputs, None if metric is None else float(metric(session))


def _count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for graph in model.graphs() for node in graph)


def _dims(value: ir.Value) -> Dims:
    shape = value.shape if value.shape is not None else ()
    return tuple(size if isinstance(size, int) else str(size.value) for size in shape)

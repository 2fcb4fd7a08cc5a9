"""Products of rows that are sorted by expert (grouped_mm), as a loop over the experts that have rows.

torch.onnx has no form for them, and transformers computes experts so unless told otherwise. Only the matrices of
experts that were chosen are read, so that a token costs what it costs in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import FLOAT, INT64, opset18, script
from onnxscript.function_libs.torch_lib.ops.core import aten_grouped_mm
from torch.export import ExportedProgram

op: Any = opset18  # its types fit eager values, not what a script is written in


def grouped_products(program: ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The forms of a program's grouped products, for the `custom_translation_table` of torch.onnx.export."""
    forms: dict[str, Callable[..., Any]] = {
        "transformers::grouped_mm_fallback": _fallback,
        "aten::_grouped_mm": _grouped_mm,
    }
    targets = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return {target: forms[target._schema.name] for target in targets if target._schema.name in forms}


@script(default_opset=op)
def _by_expert(rows: FLOAT, matrices: FLOAT, ends: INT64) -> FLOAT:  # (S, K), (E, K, N), (E,): (S, N), of any type
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    starts = op.Concat(zero, op.Slice(ends, zero, op.Constant(value_ints=[-1]), zero), axis=0)
    chosen = op.Squeeze(op.NonZero(op.Greater(ends, starts)), zero)
    nothing, width = op.CastLike(op.Constant(value_float=0.0), rows), op.Shape(matrices, start=2, end=3)
    products = op.Expand(nothing, op.Concat(zero, width, axis=0))
    for i in range(op.Size(chosen)):
        expert = op.Gather(chosen, i)
        at = op.Reshape(expert, one)
        part = op.Slice(rows, op.Gather(starts, at), op.Gather(ends, at), zero)
        products = op.Concat(products, op.MatMul(part, op.Gather(matrices, expert)), axis=0)
    # Rows behind the last group belong to no expert.
    rest = op.Sub(op.Shape(rows, start=0, end=1), op.Shape(products, start=0, end=1))
    padded: FLOAT = op.Concat(products, op.Expand(nothing, op.Concat(rest, width, axis=0)), axis=0)
    return padded


def _fallback(input: Any, weight: Any, offs: Any) -> Any:
    """transformers::grouped_mm_fallback: input (S, K), weight (E, K, N), offs (E,): where each expert's rows end."""
    return _by_expert(input, weight, op.Cast(offs, to=onnx.TensorProto.INT64))


def _grouped_mm(self: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: int | None = None) -> Any:
    """aten::_grouped_mm of rows and a stack; other shapes are torch.onnx's business."""
    if offs is None or len(self.shape) != 2 or len(mat2.shape) != 3 or bias is not None or out_dtype is not None:
        return aten_grouped_mm(self, mat2, offs, bias, out_dtype)
    return _fallback(self, mat2, offs)

"""Torch and ONNX Runtime on the same inputs, at two shapes at least where the file allows it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx import ExportError

from .eval_mode import evaluating, run_torch
from .example_inputs import Example, make_example, second_example, with_dimensions
from .onnx_compare import OnnxDiff, compare_onnx
from .sessions import check_provider, checked_file, open_session
from .text import reason, table

# Errors of a deep model's float arithmetic, in units of the dtype's eps, relative to max |y|. Two correct
# runtimes differ by up to about 100; a wrong weight differs by 1e5 or more (float32).
TOLERANCE_IN_EPS = {torch.float64: 4096.0, torch.float32: 1024.0, torch.float16: 32.0, torch.bfloat16: 32.0}


@dataclass(frozen=True)
class OutputError:
    """How far one output of ONNX Runtime is from torch's.

    Attributes:
        name: the output's name in the file.
        max_abs: largest |difference| where both are finite.
        max_rel: max_abs / max |torch's output|.
        tolerance: what max_rel may be.
        problem: why the outputs cannot be equal whatever the numbers (shape, dtype, NaN), or "".
    """

    name: str
    max_abs: float
    max_rel: float
    tolerance: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the outputs agree within the tolerance."""
        return not self.problem and self.max_rel <= self.tolerance

    @property
    def verdict(self) -> str:
        """One word, or the problem."""
        return self.problem or ("ok" if self.ok else "FAILED")


@dataclass(frozen=True)
class ShapeCheck:
    """The comparison at one set of inputs.

    Attributes:
        shapes: the inputs' names and shapes.
        outputs: one entry per output.
    """

    shapes: str
    outputs: tuple[OutputError, ...]

    @property
    def ok(self) -> bool:
        """Whether all outputs agree."""
        return all(output.ok for output in self.outputs)

    @property
    def relative_error(self) -> float:
        """The largest error relative to max |y| over all outputs."""
        return max((output.max_rel for output in self.outputs), default=0.0)

    def __str__(self) -> str:
        worst = [output for output in self.outputs if not output.ok] or list(self.outputs)
        said = "; ".join(
            f"{o.name!r}: {o.problem or f'error {o.max_rel:.2e} of max |y|, allowed {o.tolerance:.2e}'}" for o in worst
        )
        return f"at {self.shapes}: {said}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_onnx` found. Prints as a table.

    Attributes:
        path: the file.
        asked: the provider that was asked for.
        providers: the providers that the session really has, first choice first.
        checks: one per set of inputs.
        base: the comparison with the base's file, if one was given.
        tolerance: how the tolerances were derived.
        notes: what else to know, such as why there is only one shape.
    """

    path: str
    asked: str
    providers: tuple[str, ...]
    checks: tuple[ShapeCheck, ...]
    base: OnnxDiff | None
    tolerance: str
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all outputs agree at all shapes, and the graph is the base's if one was given."""
        return all(check.ok for check in self.checks) and (self.base is None or self.base.same_graph)

    def raise_if_failed(self) -> None:
        """Raises ExportError with what disagrees, if anything does."""
        for check in self.checks:
            if not check.ok:
                raise ExportError(
                    f"{self.path} does not compute what torch computes on {self.providers[0]}, {check}. "
                    "Export the graph again, and check that this is its file"
                )
        if self.base is not None and not self.base.same_graph:
            raise ExportError(
                f"{self.path} is not op for op the base's file:\n{self.base}\nExport both with the same torch, "
                "opset and example inputs"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        rows = [
            (
                check.shapes,
                o.name,
                f"{o.max_abs:.2e}",
                f"{o.max_rel:.2e}",
                f"{o.tolerance:.2e}",
                o.verdict,
            )
            for check in self.checks
            for o in check.outputs
        ]
        lines = [
            f"{self.path}: {'ok' if self.ok else 'FAILED'}, asked for {self.asked}, ran on {', '.join(self.providers)}",
            table(("inputs", "output", "max |error|", "/ max |y|", "allowed", ""), rows),
            self.tolerance,
            *([str(self.base)] if self.base is not None else []),
            *self.notes,
        ]
        return "\n".join(lines)


def verify_onnx(
    path: str | os.PathLike[str],
    gm: fx.GraphModule,
    inputs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    provider: str = "auto",
) -> VerifyReport:
    """Run `gm` in torch and the file in ONNX Runtime on the same inputs, and compare.

    Args:
        path: the .onnx file.
        gm: the graph it should compute; its evaluation form is run, and its mode restored.
        inputs: a list of (args, kwargs); None for the inputs that `lora_fx.trace` remembered. If they all have
            one shape and the file has free dimensions, the first is also tried at another size.
        base: the base model's .onnx, to compare op for op.
        provider: as for `make_session`.

    Raises:
        ExportError: if the file cannot be opened or run there, or the inputs do not fit. A file that runs and
            disagrees is reported: see `VerifyReport.ok` and `raise_if_failed`.
    """
    check_provider(provider)
    file = checked_file(path)
    diff = None if base is None else compare_onnx(base, file)
    # TF32 products are a precision of their own; here the question is whether the file is right.
    session = open_session(file, provider, {"use_tf32": "0"} if provider in ("auto", "cuda") else None)
    with evaluating(gm):
        examples, notes = _examples(session, gm, inputs)
        checks = tuple(check_shape(session, gm, example) for example in examples)
    return VerifyReport(
        path=os.fspath(path),
        asked=provider,
        providers=tuple(session.get_providers()),
        checks=checks,
        base=diff,
        tolerance=f"allowed is {TOLERANCE_IN_EPS[_coarsest(gm)]:.0f} eps of {_coarsest(gm)} (integers: equal)",
        notes=tuple(notes),
    )


def _examples(session: ort.InferenceSession, gm: fx.GraphModule, inputs: Any) -> tuple[list[Example], list[str]]:
    if inputs is None:
        example = make_example(gm)
        pairs: list[Any] = [(example.args, example.kwargs)]
    else:
        pairs = list(inputs)
    if not pairs or not all(isinstance(p, tuple | list) and len(p) == 2 and isinstance(p[1], dict) for p in pairs):
        raise ExportError("inputs must be a list of (args, kwargs), such as [((x,), {}), ((y,), {})], or None")
    names = [{i: d for i, d in enumerate(port.shape) if isinstance(d, str)} for port in session.get_inputs()]
    examples = [with_dimensions(gm, args, kwargs, names) for args, kwargs in pairs]
    if len({_shapes(session, example) for example in examples}) > 1:
        return examples, []
    second, line = second_example(gm, examples[0])
    if second is None:
        return examples, [line]
    return [*examples, second], []


def open_for_check(path: Path) -> ort.InferenceSession:
    """A CPU session for the check of a fresh export."""
    try:
        return open_session(path, "cpu")
    except ExportError as error:
        raise ExportError(
            f"the exported file does not open in ONNX Runtime on the CPU, so nothing was written: {reason(error)}. "
            "If it is meant for another provider alone (bfloat16 is), export with check=False and verify it there"
        ) from error


def check_shape(session: ort.InferenceSession, gm: fx.GraphModule, example: Example) -> ShapeCheck:
    """Compare at one set of inputs; `gm` must be in evaluation mode.

    Raises:
        ExportError: if torch or ONNX Runtime cannot run with these inputs.
    """
    feed = _feed(session, example)
    device = next((tensor.device for tensor in [*gm.parameters(), *gm.buffers()]), torch.device("cpu"))
    there = example.on(device)
    shapes = _shapes(session, example)
    try:
        result = run_torch(gm, there.args, there.kwargs)
    except Exception as error:
        raise ExportError(
            f"torch cannot run the graph at {shapes}: {reason(error)}; pass inputs that it takes"
        ) from error
    try:
        got = session.run(None, feed)
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run the file at {shapes}: {reason(error)}. The file does not take what torch takes"
        ) from error
    wanted = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    names = [port.name for port in session.get_outputs()]
    if len(wanted) != len(got):
        raise ExportError(
            f"torch returns {len(wanted)} tensors, the file {len(got)} ({', '.join(names)}): "
            "the file is not this graph's; export the graph again"
        )
    dtype = _coarsest(gm)
    return ShapeCheck(shapes, tuple(_compare(*each, dtype) for each in zip(names, wanted, got, strict=True)))


def _feed(session: ort.InferenceSession, example: Example) -> dict[str, Any]:
    ports = session.get_inputs()
    tensors = [tensor for tensor, _ in example.tensors()]
    if len(ports) != len(tensors):
        raise ExportError(
            f"the inputs hold {len(tensors)} tensors, the file takes {len(ports)} ({', '.join(p.name for p in ports)})"
        )
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise ExportError(
            "ONNX Runtime's Python interface takes no bfloat16 inputs; cast them inside the model, or use float16"
        )
    return {port.name: tensor.detach().cpu().numpy() for port, tensor in zip(ports, tensors, strict=True)}


def _shapes(session: ort.InferenceSession, example: Example) -> str:
    ports = zip(session.get_inputs(), example.tensors(), strict=True)
    return ", ".join(f"{port.name} {list(tensor.shape)}" for port, (tensor, _) in ports)


def _coarsest(gm: fx.GraphModule) -> torch.dtype:
    """The floating dtype of the graph's weights with the largest eps."""
    dtypes = {tensor.dtype for tensor in [*gm.parameters(), *gm.buffers()]} & set(TOLERANCE_IN_EPS)
    return max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def _compare(name: str, wanted: torch.Tensor, got: Any, weights: torch.dtype) -> OutputError:
    """Compare one output: wanted from torch, got from ONNX Runtime."""
    got = torch.from_numpy(np.ascontiguousarray(got))
    wanted = wanted.detach().cpu()
    if got.shape != wanted.shape:
        return OutputError(name, 0.0, 0.0, 0.0, f"shape {list(got.shape)} instead of {list(wanted.shape)}")
    if got.dtype != wanted.dtype:
        return OutputError(name, 0.0, 0.0, 0.0, f"dtype {got.dtype} instead of {wanted.dtype}")
    if not wanted.is_floating_point():
        unequal = int((got != wanted).sum())
        return OutputError(
            name, float(unequal > 0), float(unequal > 0), 0.0, f"{unequal} values differ" if unequal else ""
        )
    dtype = max((weights, wanted.dtype), key=lambda d: torch.finfo(d).eps)
    tolerance = TOLERANCE_IN_EPS.get(dtype, 32.0) * torch.finfo(dtype).eps
    # Values near the end of the range are masks: equal, or not, but no measure for the others.
    huge = torch.finfo(wanted.dtype).max / 4
    a, b = wanted.double(), got.double()
    usual = a.isfinite() & (a.abs() < huge)
    if not torch.equal(usual, b.isfinite() & (b.abs() < huge)) or not torch.equal(a.isnan(), b.isnan()):
        return OutputError(
            name, float("inf"), float("inf"), tolerance, "NaN, infinite or masked values at other places"
        )
    if not torch.equal(a[~usual].nan_to_num().sign(), b[~usual].nan_to_num().sign()):
        return OutputError(name, float("inf"), float("inf"), tolerance, "infinite or masked values of another sign")
    if not bool(usual.any()):
        return OutputError(name, 0.0, 0.0, tolerance)
    error, scale = float((a - b)[usual].abs().max()), float(a[usual].abs().max())
    return OutputError(name, error, error / scale if scale else error, tolerance)

"""A graph with adapters as one base file from which adapters are chosen at run time: as a whole, or row by row.

Both are the base's file, exported as ever, into which LoRA is inserted: so the base in it is op for op the base's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import fx

import lora_fx
from lora_fx import AdapterArrays, ExportError

from .eval_mode import evaluating
from .example_inputs import Example, make_example, second_example, without_ones
from .lora_places import adapter_arrays
from .lora_slots import Slots
from .named_weights import OnnxWeights
from .onnx_adapters import insert_inputs, save_arrays
from .onnx_batched import IDS, insert_stacks
from .onnx_export import export_onnx
from .onnx_files import check_file, checked_target, has_external_data, open_model, written
from .onnx_report import OnnxReport
from .onnx_weights import Array
from .precision import as_data_type
from .slots_check import check_base, check_rows, rows_of
from .text import Shown, Table, table
from .verification import ShapeCheck, check_shape, feed_of, open_for_check


@dataclass(frozen=True)
class AdaptersReport(Shown):
    """What `export_onnx_adapters` or `export_onnx_batched` wrote. Prints as tables.

    Attributes:
        path: the .onnx file.
        base: the report on the base in it, without places for adapters.
        nodes: number of nodes with them.
        adapters: {name: its .onnx_adapter file}, or its number if the file holds the adapters itself.
        max_errors: {name: largest error against torch, relative to max |output|}; empty if it was not checked.
        fingerprint: of the base's weights.
        seconds: what it took.
    """

    path: str
    base: OnnxReport
    nodes: int
    adapters: dict[str, str | int]
    max_errors: dict[str, float]
    fingerprint: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def blocks(self) -> list[str | Table]:
        """A row for each adapter."""
        errors = {name: f"{error:.1e}" for name, error in self.max_errors.items()}
        rows = [(name, where, errors.get(name, "not checked")) for name, where in self.adapters.items()]
        head = f"{self.path}: {self.base.nodes} → {self.nodes} nodes, {self.seconds:.1f} s; base exact without adapters"
        return [head, table(("adapter", "in", "error of max |y|"), rows)]


def export_onnx_adapters(
    gm: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    check: bool = True,
    **options: Any,
) -> AdaptersReport:
    """Write the base as an ONNX file whose LoRA weights may be left out, and an .onnx_adapter file for each adapter.

    Without an adapter the file computes the base, bit for bit (in float16, within its rounding). `AdapterSession` runs
    it; so does onnxruntime's own `RunOptions.add_active_adapter`, within its limits. The adapter files,
    `<adapter>.onnx_adapter`, lie beside `path`; `write_onnx_adapter` makes more of them, of directories that PEFT
    wrote, too.

    Args:
        gm: an injected graph, with one adapter or several; it is as before afterwards.
        rank: None leaves the rank free at run time, and a number fixes it, see `add_adapter_inputs`.
        args, kwargs, dynamic_shapes, check: as for `export_onnx`; `check` compares every adapter with torch.
        options: of `export_onnx`: opset, external_data, dtype, quantize, ...

    Raises:
        ExportError: as for `export_onnx`; nothing is written then.
    """
    started = time.perf_counter()
    target = checked_target(path)
    bound = _bound(options)
    inputs = {"args": args, "kwargs": kwargs, "dynamic_shapes": dynamic_shapes}
    with _base_and_adapters(gm, inputs, check=check, options=options) as (base, adapters):
        model = open_model(Path(base.path))
        slots = insert_inputs(model, list(adapters.values()), rank=rank)
        arrays = {name: adapter_arrays(OnnxWeights(model, each), slots) for name, each in adapters.items()}
        files_of = {name: checked_target(target.with_name(f"{name}.onnx_adapter")) for name in adapters}
        with written(model, target, external=has_external_data(model)) as files:
            check_file(files.model)
            temporary = {name: files.model.with_name(file.name) for name, file in files_of.items()}
            for name, file in temporary.items():
                save_arrays(arrays[name], slots, file)
            errors = _check_switchable(gm, files.model, base, slots, arrays, inputs, bound) if check else {}
            for name, file in temporary.items():
                os.replace(file, files_of[name])
    return AdaptersReport(
        path=os.fspath(path),
        base=dataclasses.replace(base, path=os.fspath(path), data_path=None),
        nodes=len(list(model.graph.all_nodes())),
        adapters={name: str(file) for name, file in files_of.items()},
        max_errors=errors,
        fingerprint=slots.fingerprint,
        seconds=time.perf_counter() - started,
    )


def export_onnx_batched(
    gm: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    check: bool = True,
    **options: Any,
) -> AdaptersReport:
    """Write an ONNX file that holds all adapters of the graph, and takes `adapter_ids`, int64 (batch,).

    Each row of the batch chooses: 0 for the base, bit for bit, 1 for the first adapter, and so on. `append_adapter`
    adds more, with no export.

    Args:
        gm: an injected graph, with one adapter or several, whose inputs have the batch in front.
        args, kwargs, dynamic_shapes, check, options: as for `export_onnx_adapters`; `check` also runs a batch that
            mixes all adapters, and compares each row with a batch of its adapter alone.

    Raises:
        ExportError: as for `export_onnx`, and for adapters that rows cannot choose; nothing is written then.
    """
    started = time.perf_counter()
    target = checked_target(path)
    bound = _bound(options)
    inputs = {"args": args, "kwargs": kwargs, "dynamic_shapes": dynamic_shapes}
    with _base_and_adapters(gm, inputs, check=check, options=options) as (base, adapters):
        model = open_model(Path(base.path))
        slots = insert_stacks(model, adapters)
        with written(model, target, external=has_external_data(model)) as files:
            check_file(files.model)
            errors = _check_batched(gm, files.model, base, slots, inputs, bound) if check else {}
    return AdaptersReport(
        path=os.fspath(path),
        base=dataclasses.replace(base, path=os.fspath(path), data_path=None),
        nodes=len(list(model.graph.all_nodes())),
        adapters={name: number for number, name in enumerate(slots.adapters, 1)},
        max_errors=errors,
        fingerprint=slots.fingerprint,
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _base_and_adapters(
    gm: fx.GraphModule, inputs: Mapping[str, Any], *, check: bool, options: Mapping[str, Any]
) -> Iterator[tuple[OnnxReport, dict[str, AdapterArrays]]]:
    """The base in a file of its own, and all adapters as arrays, for as long as the block lasts."""
    try:
        names = lora_fx.adapter_names(gm)
    except lora_fx.LoraFxError as error:
        raise ExportError(f"export_onnx_adapters takes a graph module: {error}") from error
    if not names:
        raise ExportError(
            "the graph has no adapter; inject one (lora_fx.inject), load one (lora_fx.load_adapter), or give an "
            "exported file places for one: exporters.add_adapter_inputs(base, out, adapter_directory)"
        )
    with tempfile.TemporaryDirectory(prefix="lora_fx.") as name:
        directory = Path(name)
        adapters = {}
        for number, adapter in enumerate(names):
            lora_fx.save_adapter(gm, directory / str(number), adapter_name=adapter)
            adapters[adapter] = lora_fx.read_adapter(directory / str(number))
        with lora_fx.disable_adapters(gm):
            base = export_onnx(gm, directory / "base.onnx", check=check, **inputs, **options)
        yield base, adapters


def _examples(gm: fx.GraphModule, inputs: Mapping[str, Any]) -> list[Example]:
    example = without_ones(make_example(gm, **inputs))
    second, _ = second_example(gm, example) if any(example.dimensions) else (None, "")
    return [example] if second is None else [example, second]


def _check_switchable(
    gm: fx.GraphModule,
    file: Path,
    base: OnnxReport,
    slots: Slots,
    arrays: Mapping[str, Mapping[str, Array]],
    inputs: Mapping[str, Any],
    bound: _Bound,
) -> dict[str, float]:
    """Without an adapter, the base's bits; with each, what torch computes."""
    session, plain = open_for_check(file), open_for_check(Path(base.path))
    with evaluating(gm):
        examples = _examples(gm, inputs)
    for example in examples:
        feed = feed_of(plain, example)
        check_base(plain.run(None, feed), session.run(None, feed), "without an adapter", slots)
    return {name: _against_torch(gm, session, name, given, examples, bound) for name, given in arrays.items()}


@dataclass(frozen=True)
class _Bound:
    """What a right file may differ from torch by.

    Attributes:
        inside: what it computes in, if that is coarser than the graph's type.
        is_quantized: its weights are others than the graph's, so that errors are told, and judged by the reader.
    """

    inside: torch.dtype | None
    is_quantized: bool


def _bound(options: Mapping[str, Any]) -> _Bound:
    dtype = as_data_type(options.get("dtype"))
    if dtype == ir.DataType.BFLOAT16:
        raise ExportError(
            "ONNX Runtime's Python interface feeds no bfloat16, so adapters could not be switched; export in float16 "
            "or float32, or fold"
        )
    return _Bound(torch.float16 if dtype == ir.DataType.FLOAT16 else None, options.get("quantize") is not None)


def _against_torch(
    gm: fx.GraphModule,
    session: ort.InferenceSession,
    name: str,
    extra: Mapping[str, Any],
    examples: Sequence[Example],
    bound: _Bound,
) -> float:
    with only_adapter(gm, name), evaluating(gm):
        checks = [check_shape(session, gm, example, extra, inside=bound.inside) for example in examples]
    if not bound.is_quantized:
        _raise_if_wrong(name, checks)
    return max(check.relative_error for check in checks)


def _raise_if_wrong(name: str, checks: Sequence[ShapeCheck]) -> None:
    for check in checks:
        if not check.ok:
            raise ExportError(
                f"with adapter {name!r} the file does not compute what torch computes, so nothing was written: "
                f"{check}. check=False writes it all the same, to look into it"
            )


@contextlib.contextmanager
def only_adapter(gm: fx.GraphModule, name: str) -> Iterator[None]:
    """Let one adapter count, as long as the block lasts."""
    before = lora_fx.active_adapters(gm)
    lora_fx.set_adapters(gm, {name: 1.0})
    try:
        yield
    finally:
        lora_fx.set_adapters(gm, before)


def _check_batched(
    gm: fx.GraphModule, file: Path, base: OnnxReport, slots: Slots, inputs: Mapping[str, Any], bound: _Bound
) -> dict[str, float]:
    """Each adapter alone as torch has it, and in a batch of all of them each row as in a batch of its own."""
    session, plain = open_for_check(file), open_for_check(Path(base.path))
    with evaluating(gm):
        examples = _examples(gm, inputs)
    errors: dict[str, float] = {}
    for example in examples:
        feed = feed_of(plain, example)
        check_rows(session, plain.run(None, feed), feed, slots)
        for number, name in enumerate(slots.adapters, 1):
            ids = {IDS: np.full(rows_of(feed), number, np.int64)}
            error = _against_torch(gm, session, name, ids, [example], bound)
            errors[name] = max(error, errors.get(name, 0.0))
    return errors

"""Torch and ONNX Runtime on the same inputs, at two shapes at least where the file allows it."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import fx
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import ExportError

from .eval_mode import evaluating, run_torch
from .example_inputs import Example, make_example, second_example, with_dimensions
from .lora_slots import SLOTS_KEY, Slots, read_slots
from .onnx_compare import OnnxDiff, compare_onnx
from .onnx_weights import MANIFEST_KEY, read_manifest
from .output_check import TOLERANCE_IN_EPS, OutputError, coarsest_dtype, compare_output
from .paths import path_of
from .sessions import check_provider, checked_file, open_session
from .text import Shown, Table, reason, some, table
from .verification_page import verification_page
from .weight_check import WeightCheck, check_weights, used_names

NOTHING_COMPARABLE = (
    "nothing was compared: at all shapes, every output is empty, or all NaN, infinite or masked; pass inputs for "
    "which the model returns numbers"
)


@dataclass(frozen=True)
class ShapeCheck(Shown):
    """The comparison at one set of inputs.

    Attributes:
        shapes: the inputs' names and shapes.
        outputs: one entry per output.
        adapter: the adapter that was switched on, of a file with places for adapters; empty for none.
    """

    shapes: str
    outputs: tuple[OutputError, ...]
    adapter: str = ""

    @property
    def ok(self) -> bool:
        """Whether all outputs agree."""
        return all(output.ok for output in self.outputs)

    @property
    def is_vacuous(self) -> bool:
        """Whether the outputs hold no value that could differ: they are empty, or all NaN, infinite or masked."""
        return not any(output.compared or output.problem for output in self.outputs)

    @property
    def relative_error(self) -> float:
        """The largest error relative to max |y| over all outputs."""
        return max((output.max_rel for output in self.outputs), default=0.0)

    def blocks(self) -> list[str]:
        """One line: the outputs that disagree, or all."""
        worst = [output for output in self.outputs if not output.ok] or list(self.outputs)
        said = "; ".join(
            f"{o.name!r}: {o.problem or f'error {o.max_rel:.2e} of max |y|, allowed {o.tolerance:.2e}'}" for o in worst
        )
        on = f" with adapter {self.adapter!r}" if self.adapter else ""
        return [f"at {self.shapes}{on}: {said}"]


@dataclass(frozen=True)
class VerifyReport(Shown):
    """What `verify_onnx` found. Prints as a table.

    Attributes:
        path: the file.
        asked: the provider that was asked for.
        providers: the providers that the session really has, first choice first.
        checks: one per set of inputs.
        weights: the comparison of the file's weights with the graph's.
        base: the comparison with the base's file, if one was given.
        unexpected: weights whose values differ from the base's though nothing was folded into them.
        has_places: whether the file has places for adapters, and so more nodes than the base's.
        tolerance: how the tolerances were derived.
        notes: what else to know, such as why there is only one shape.
    """

    path: str
    asked: str
    providers: tuple[str, ...]
    checks: tuple[ShapeCheck, ...]
    weights: WeightCheck
    base: OnnxDiff | None
    tolerance: str
    notes: tuple[str, ...]
    unexpected: tuple[str, ...] = ()
    has_places: bool = False

    @property
    def ok(self) -> bool:
        """Whether all outputs agree, and so do the weights, and the graph is the base's if one was given."""
        return self._outputs_ok and self.weights.ok and self._is_the_bases and not self.unexpected

    @property
    def _is_the_bases(self) -> bool:
        """Whether the graph is the base's, or, with places for adapters, holds all of the base's as it was."""
        if self.base is None or self.base.same_graph:
            return True
        base = self.base
        less = (base.ops_removed, base.initializers_removed, base.initializers_reshaped, base.values_changed)
        return self.has_places and not any(less)

    @property
    def _outputs_ok(self) -> bool:
        return all(check.ok for check in self.checks) and not all(check.is_vacuous for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raises ExportError with what disagrees, if anything does."""
        for check in self.checks:
            if not check.ok:
                raise ExportError(
                    f"{self.path} does not compute what torch computes on {self.providers[0]}, {check}. "
                    "Export the graph again, and check that this is its file"
                )
        if not self._outputs_ok:
            raise ExportError(f"{self.path}: {NOTHING_COMPARABLE}")
        if not self.weights.ok:
            raise ExportError(
                f"{self.path} holds other weights than the graph. {self.weights}\nExport the graph again, and check "
                "that this is its file"
            )
        if self.unexpected:
            raise ExportError(
                f"{self.path}: {some(self.unexpected)} differ from the base's, and nothing was folded into them; "
                "export both anew"
            )
        if not self._is_the_bases:
            raise ExportError(
                f"{self.path} is not op for op the base's file:\n{self.base}\nExport both with the same torch, "
                "opset and example inputs"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"ok": self.ok}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report: as JSON, or, if the path ends in .html, as a page.

        Raises:
            ExportError: if it cannot be written.
        """
        file = path_of(path)
        is_page = file.suffix.lower() == ".html"
        text = verification_page(self) if is_page else json.dumps(self.to_dict(), indent=2, default=str)
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ExportError(f"cannot write {file} ({error.strerror}); choose another place") from error

    def blocks(self) -> list[str | Table]:
        """The outputs, the weights, and the graph beside the base's."""
        rows = [
            (
                check.shapes,
                check.adapter,
                o.name,
                f"{o.max_abs:.2e}",
                f"{o.max_rel:.2e}",
                f"{o.tolerance:.2e}",
                o.verdict,
            )
            for check in self.checks
            for o in check.outputs
        ]
        return [
            f"{self.path}: {'ok' if self.ok else 'FAILED'}, asked for {self.asked}, ran on {', '.join(self.providers)}",
            table(("inputs", "adapter", "output", "max |error|", "/ max |y|", "allowed", ""), rows),
            self.tolerance,
            *([NOTHING_COMPARABLE] if all(check.is_vacuous for check in self.checks) else []),
            str(self.weights),
            *([] if self.base is None else self.base.blocks()),
            *([f"differ and should not: {some(self.unexpected)}"] if self.unexpected else []),
            *self.notes,
        ]


def verify_onnx(
    path: str | os.PathLike[str],
    gm: fx.GraphModule,
    inputs: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    provider: str = "auto",
) -> VerifyReport:
    """Run `gm` in torch and the file in ONNX Runtime on the same inputs, and compare; and compare the weights.

    Weights are compared bit for bit, if `export_onnx` wrote the file. A graph with adapters that are not folded
    can be compared with the folded file: the weights under the adapters are then judged by the outputs alone. A file
    with places for adapters is run without one, against the base, and with each adapter of the graph.

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
    _check_arguments(gm, inputs)
    diff = None if base is None else compare_onnx(base, file)
    # TF32 products are a precision of their own; here the question is whether the file is right.
    session = open_session(file, provider, {"use_tf32": "0"} if provider in ("auto", "cuda") else None)
    with evaluating(gm):
        examples, notes = _examples(session, gm, inputs)
        checks = tuple(_checks(file, session, gm, examples))
        weights = check_weights(file, gm)
        dtype = _dtype_of(gm)
    return VerifyReport(
        path=os.fspath(path),
        asked=provider,
        providers=tuple(session.get_providers()),
        checks=checks,
        weights=weights,
        base=diff,
        tolerance=f"allowed is {TOLERANCE_IN_EPS[dtype]:.0f} eps of {dtype} (integers: equal)",
        notes=tuple(notes),
        unexpected=_unexpected(file, gm, diff),
        has_places=_places_of(session) is not None,
    )


def _checks(
    file: Path, session: ort.InferenceSession, gm: fx.GraphModule, examples: Sequence[Example]
) -> Iterator[ShapeCheck]:
    """At all examples; of a file with places for adapters, without one and with each."""
    slots = _places_of(session)
    names = list(lora_fx.adapter_names(gm)) if slots is not None else []
    if slots is None or not names:
        for example in examples:
            yield check_shape(session, gm, example, ids_for(example, 0) if slots and slots.ids else {})
        return
    before = lora_fx.active_adapters(gm)
    try:
        for name in ("", *names):
            lora_fx.set_adapters(gm, {name: 1.0} if name else {})
            arrays = _arrays_of(file, gm, slots, name) if name and slots.ids is None else {}
            number = slots.adapters.index(name) + 1 if name in slots.adapters else 0
            for example in examples:
                extra = arrays if slots.ids is None else ids_for(example, number)
                yield dataclasses.replace(check_shape(session, gm, example, extra), adapter=name)
    finally:
        lora_fx.set_adapters(gm, before)


def ids_for(example: Example, number: int) -> dict[str, Any]:
    """`adapter_ids` for a batch whose rows all take one adapter."""
    count = next((len(tensor) for tensor, _ in example.tensors() if tensor.ndim), 1)
    return {"adapter_ids": np.full(count, number, np.int64)}


def _places_of(session: ort.InferenceSession) -> Slots | None:
    metadata = session.get_modelmeta().custom_metadata_map
    return read_slots(metadata, "the file") if SLOTS_KEY in metadata else None


def _arrays_of(file: Path, gm: fx.GraphModule, slots: Slots, name: str) -> dict[str, Any]:
    """An adapter of the graph as the file takes it."""
    from .lora_places import adapter_arrays
    from .named_weights import OnnxWeights
    from .onnx_files import open_model

    with tempfile.TemporaryDirectory(prefix="lora_fx.") as directory:
        lora_fx.save_adapter(gm, directory, adapter_name=name)
        return dict(adapter_arrays(OnnxWeights(open_model(file), lora_fx.read_adapter(directory)), slots))


def _unexpected(file: Path, gm: fx.GraphModule, diff: OnnxDiff | None) -> tuple[str, ...]:
    """Initializers that differ from the base's, and hold no weight that was folded into."""
    if diff is None or (lora_fx.adapter_names(gm) and lora_fx.active_adapters(gm)):
        return ()
    try:
        report = lora_fx.fold_report(gm)
    except lora_fx.LoraFxError:  # a graph that was never folded: whose weights differ, nobody knows
        return ()
    model = onnx.load(file, load_external_data=False)
    if not any(prop.key == MANIFEST_KEY for prop in model.metadata_props):
        return ()
    recorded = read_manifest(model)
    folded = {*report.trained, *(site.weight for site in report.sites), *(f"{s.path}.weight" for s in report.sites)}
    names = {name: {*recorded[name].fqn.split(", "), *recorded[name].aliases} for name in recorded}
    return tuple(name for name in diff.values_changed if name in names and not names[name] & folded)


def _check_arguments(gm: Any, inputs: Any) -> None:
    try:
        lora_fx.adapter_names(gm)
    except lora_fx.LoraFxError as error:
        raise ExportError(f"verify_onnx takes a graph module: {error}") from error
    if inputs is None:
        return
    if not isinstance(inputs, tuple | list) or not inputs or not all(_is_call(pair) for pair in inputs):
        raise ExportError("inputs must be a list of (args, kwargs), such as [((x,), {}), ((y,), {})], or None")


def _is_call(pair: Any) -> bool:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return False
    return isinstance(pair[0], tuple | list | torch.Tensor) and isinstance(pair[1], dict)


def _examples(session: ort.InferenceSession, gm: fx.GraphModule, inputs: Any) -> tuple[list[Example], list[str]]:
    pairs = inputs
    if inputs is None:
        example = make_example(gm)
        pairs = [(example.args, example.kwargs)]
    ports = [port for port in session.get_inputs() if port.name != "adapter_ids"]
    names = [{i: d for i, d in enumerate(port.shape) if isinstance(d, str)} for port in ports]
    examples = [with_dimensions(gm, args, kwargs, names) for args, kwargs in pairs]
    if len({_shapes(session, example, ("adapter_ids",)) for example in examples}) > 1:
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
            "Of a graph in bfloat16, which the CPU lacks ops for, export gm.to(torch.float32); or with check=False, if "
            "it is meant for another provider alone, and verify it there"
        ) from error


def check_shape(
    session: ort.InferenceSession,
    gm: fx.GraphModule,
    example: Example,
    extra: Mapping[str, Any] | None = None,
    *,
    inside: torch.dtype | None = None,
) -> ShapeCheck:
    """Compare at one set of inputs; `gm` must be in evaluation mode.

    Args:
        extra: arrays for inputs that the graph has not: those of adapters.
        inside: what the file computes in, if it is coarser than the graph's dtype.

    Raises:
        ExportError: if torch or ONNX Runtime cannot run with these inputs.
    """
    extra = extra or {}
    feed = feed_of(session, example, extra)
    device = next((tensor.device for tensor in [*gm.parameters(), *gm.buffers()]), torch.device("cpu"))
    there = example.on(device)
    shapes = _shapes(session, example, extra)
    try:
        result = run_torch(gm, there.args, there.kwargs)
    except Exception as error:
        raise ExportError(
            f"torch cannot run the graph at {shapes}: {reason(error)}; pass inputs that it takes"
        ) from error
    try:
        got = session.run(None, feed | dict(extra), _silent())
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
    dtype = inside or _dtype_of(gm)
    return ShapeCheck(shapes, tuple(compare_output(*each, dtype) for each in zip(names, wanted, got, strict=True)))


def _silent() -> ort.RunOptions:
    """ONNX Runtime writes an error to the terminal before it raises it."""
    options = ort.RunOptions()
    options.log_severity_level = 4  # fatal
    return options


def _dtype_of(gm: fx.GraphModule) -> torch.dtype:
    """What the graph computes in at worst: its parameters' dtype, or that of the buffers it uses if it has none."""
    if any(True for _ in gm.parameters()):
        return coarsest_dtype(gm.parameters())
    used = used_names(gm)
    return coarsest_dtype(buffer for name, buffer in gm.named_buffers() if name in used)


def feed_of(session: ort.InferenceSession, example: Example, extra: Collection[str] = ()) -> dict[str, Any]:
    """The example as the session takes it, without the inputs that are named in `extra`.

    Raises:
        ExportError: if they do not fit each other.
    """
    ports = [port for port in session.get_inputs() if port.name not in extra]
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


def _shapes(session: ort.InferenceSession, example: Example, extra: Collection[str] = ()) -> str:
    own = [port for port in session.get_inputs() if port.name not in extra]
    ports = zip(own, example.tensors(), strict=True)
    return ", ".join(f"{port.name} {list(tensor.shape)}" for port, (tensor, _) in ports)

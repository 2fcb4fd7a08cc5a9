"""A base file whose LoRA weights are inputs that may be left out, and the adapter files that go with it.

    add_adapter_inputs(base, out, adapters)     of an existing file, with neither model nor torch
    write_onnx_adapter(file, adapter, out)      one .onnx_adapter, made for that file and checked against it
    AdapterSession(file)                        runs it (adapter_session.py)

(`export_onnx_adapters` makes both from a graph: adapter_export.py.)
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from lora_fx import AdapterArrays, AdapterError, read_adapter
from lora_fx.atomic import sync_directory, temporary_beside, write_through

from .lora_insertion import Inputs, insert_slots
from .lora_places import adapter_arrays, plan_slots
from .lora_slots import Slots, read_slots
from .named_weights import OnnxWeights
from .onnx_files import check_apart, check_derived, checked_target, has_external_data, open_model, says_damaged, written
from .onnx_sites import Mapped
from .onnx_weights import Array
from .sessions import checked_file
from .text import Shown, Table, reason, some, table

Adapter = str | os.PathLike[str] | AdapterArrays


@dataclass(frozen=True)
class SlotsReport(Shown):
    """What `add_adapter_inputs` did. Prints as a table.

    Attributes:
        path: the file.
        slots: {module: (in, out, rank or "free")}.
        nodes: number of nodes before and after.
        fingerprint: of the base's weights, which adapter files carry.
        seconds: what it took.
    """

    path: str
    slots: dict[str, tuple[int, int, int | str]]
    nodes: tuple[int, int]
    fingerprint: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def blocks(self) -> list[str | Table]:
        """A row for each place."""
        rows = [(name, f"{n_in} → {n_out}", rank) for name, (n_in, n_out, rank) in self.slots.items()]
        before, after = self.nodes
        head = f"{self.path}: {len(rows)} places for A and B, {before} → {after} nodes, {self.seconds:.2f} s"
        return [head, table(("module", "in → out", "rank"), rows)]


@says_damaged
def add_adapter_inputs(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapters: Sequence[Adapter] | Adapter,
    *,
    rank: int | None = None,
    mapping: Mapped | None = None,
    partial: bool = False,
) -> SlotsReport:
    """Give an existing ONNX file an input for A and B of each module that the adapters have.

    Inputs that are left out change nothing: the result is the base's, bit for bit. A quantized weight stays quantized,
    and A and B beside it are floats.

    Args:
        base: the base model's file, as for `fold_into_onnx`.
        out: the file to write; not `base` itself.
        adapters: directories, or what `read_adapter` read: those that the file is made for. Others that have no more
            than these can be used with it, too.
        rank: None lets every adapter bring its own rank. A number fixes it, and lower ranks are filled up with zeros:
            for providers that take no empty tensors (DirectML), or no free dimensions (CUDA graphs, TensorRT).
        mapping, partial: as for `fold_into_onnx`.

    Raises:
        AdapterError: if an adapter has something for which there is no place.
        ExportError: if a file cannot be read or written, or A and B of an op can only be folded.
    """
    started = time.perf_counter()
    file, target = checked_file(base), checked_target(out)
    model = open_model(file)
    check_apart(file, model, target)
    before = len(list(model.graph.all_nodes()))
    slots = insert_inputs(model, _arrays(adapters), rank=rank, mapping=mapping, partial=partial)
    with written(model, target, external=has_external_data(model)) as files:
        check_derived(files.model, file)
    ranks = {slot.path: (slot.in_features, slot.stop - slot.start, slot.r or "free") for slot in slots.slots}
    nodes = (before, len(list(model.graph.all_nodes())))
    return SlotsReport(os.fspath(out), ranks, nodes, slots.fingerprint, time.perf_counter() - started)


def _arrays(adapters: Sequence[Adapter] | Adapter) -> list[AdapterArrays]:
    several = [adapters] if isinstance(adapters, str | os.PathLike | AdapterArrays) else list(adapters)
    return [each if isinstance(each, AdapterArrays) else read_adapter(each) for each in several]


def insert_inputs(
    model: ir.Model,
    adapters: Sequence[AdapterArrays],
    *,
    rank: int | None = None,
    mapping: Mapped | None = None,
    partial: bool = False,
) -> Slots:
    """`add_adapter_inputs` on a model in memory."""
    planned = plan_slots(model, adapters, mapping, rank, partial=partial)
    insert_slots(model, planned, Inputs(model, planned.slots))
    return planned.slots


@says_damaged
def write_onnx_adapter(
    model: str | os.PathLike[str],
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    mapping: Mapped | None = None,
    partial: bool = False,
) -> Path:
    """Write an adapter as the .onnx_adapter file that ONNX Runtime's `LoraAdapter` loads.

    Names, shapes and types are those of the file's inputs, and the base's fingerprint is the `model_version`.

    Args:
        model: a file that `export_onnx_adapters` or `add_adapter_inputs` wrote.
        adapter: a directory that PEFT or `lora_fx.save_adapter` wrote.
        partial: leave out what the file has no input for: it is one part of the model.

    Raises:
        AdapterError: if the adapter has something for which the file has no input, or does not fit it.
        ExportError: if a file cannot be read or written.
    """
    file, target = checked_file(model), checked_target(out)
    arrays = adapter if isinstance(adapter, AdapterArrays) else read_adapter(adapter, adapter_name=adapter_name)
    opened = open_model(file)
    check_apart(file, opened, target)
    slots = read_slots(opened.metadata_props, file.name)
    save_arrays(adapter_arrays(OnnxWeights(opened, arrays, mapping, partial=partial), slots), slots, target)
    return target


def save_arrays(arrays: Mapping[str, Array], slots: Slots, target: Path) -> None:
    """Write an .onnx_adapter file, and read it again to see that it holds what it should.

    Raises:
        AdapterError: if the file system refuses.
    """
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # until it is written: see sessions
    values = {name: ort_value(array) for name, array in kept.items()}
    form = ort.AdapterFormat()
    form.set_adapter_version(_checksum(kept))
    form.set_model_version(slots.model_version)
    form.set_parameters(values)
    try:
        with temporary_beside(target) as directory:
            temporary = directory / target.name
            form.export_adapter(os.fspath(temporary))
            again = ort.AdapterFormat.read_adapter(os.fspath(temporary))
            for name, value in again.get_parameters().items():
                if (value.tensor_size_in_bytes(), _bytes_of(value)) != (kept[name].nbytes, kept[name].tobytes()):
                    raise AdapterError(
                        f"onnxruntime {ort.__version__} wrote other values of {name!r} than it was given"
                    )
            write_through(temporary)
            os.replace(temporary, target)
            sync_directory(target.parent)
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"cannot write {target}: {reason(error)}") from error


def _bytes_of(value: ort.OrtValue) -> bytes:
    return ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()) if value.tensor_size_in_bytes() else b""


def ort_value(array: Array) -> ort.OrtValue:
    """A value that refers to the array, which has to live as long; numpy's makeshift bfloat16 included."""
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(ir.DataType.BFLOAT16))
    return ort.OrtValue.ortvalue_from_numpy(array)


def read_onnx_adapter(path: Path) -> tuple[dict[str, Array], int]:
    """({input: array}, the fingerprint in it) of an .onnx_adapter file.

    The values that onnxruntime hands out lie in the file's memory, which goes when the object that read it goes; these
    are copies.

    Raises:
        AdapterError: if it is none, or holds bfloat16, which Python cannot feed to ONNX Runtime.
    """
    if not path.is_file():
        raise AdapterError(f"there is no adapter file {str(path)!r}; write_onnx_adapter writes one")
    try:
        form = ort.AdapterFormat.read_adapter(os.fspath(path))
        values = form.get_parameters()
        if any(value.element_type() == int(ir.DataType.BFLOAT16) for value in values.values()):
            raise AdapterError("it holds bfloat16, which ONNX Runtime's Python interface does not feed")
        arrays = {name: np.array(value.numpy()) for name, value in values.items()}
        noted, version = int(form.get_adapter_version()), int(form.get_model_version())
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{str(path)!r} is no .onnx_adapter file: {reason(error)}; write it again") from error
    if noted not in (0, 1) and noted != _checksum(arrays):
        raise AdapterError(
            f"{str(path)!r} does not hold what was written into it (checksum differs): it was damaged or changed; "
            "write it again"
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise AdapterError(f"{str(path)!r}: {name!r} holds NaN or Inf; write it again, of an adapter without")
    return arrays, version


def _checksum(arrays: Mapping[str, Array]) -> int:
    """31 bits, which is what a file has room for: its `adapter_version`, which onnxruntime makes nothing of.

    Others write 0 or 1 there, so those are none.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest()[:4], "big") & 0x7FFFFFFF | 2


def check_arrays(values: Mapping[str, tuple[tuple[int, ...], str]], version: int, slots: Slots, what: str) -> None:
    """Whether an adapter's tensors are this file's.

    Args:
        values: {name: (shape, ONNX type)}.
        version: the fingerprint that the adapter carries.
        what: the adapter, for messages.

    Raises:
        AdapterError: if it was made for other weights, or a tensor is unknown, missing, or of another shape or type.
    """
    known = slots.inputs
    unknown = [name for name in values if name not in known and name not in slots.tensors.values()]
    if unknown:
        raise AdapterError(f"{what} has {some(unknown)}, which this model does not take; it was made for another model")
    if version != slots.model_version:
        raise AdapterError(
            f"{what} was made for other base weights (model_version {version}, and this file's is "
            f"{slots.model_version}); write it again for this file: write_onnx_adapter(model, adapter, out)"
        )
    for slot in slots.slots:
        _check_slot_arrays({p: values[n] for p, n in slot.parts.items() if n in values}, slot, what)


def _check_slot_arrays(given: Mapping[str, tuple[tuple[int, ...], str]], slot: Any, what: str) -> None:
    if not given:
        return
    missing = [slot.parts[part] for part in ("a", "b") if part not in given]
    if missing:
        raise AdapterError(
            f"{what} lacks {some(missing)}, without which the rest of {slot.path!r} has no effect; write it again"
        )
    r = _rank_of(slot, given["a"][0])
    for part, (shape, dtype) in given.items():
        one = (1,) * len(shape)
        if dtype != slot.dtype:
            raise AdapterError(f"{what}: {slot.parts[part]!r} is {dtype}, and this model takes {slot.dtype}")
        if shape != tuple(slot.shape_of(part, r)) and not (
            part in ("gain", "bias") and slot.r is None and shape == one
        ):
            raise AdapterError(
                f"{what}: {slot.parts[part]!r} has the shape {list(shape)}, and this model takes "
                f"{list(slot.shape_of(part, slot.r or 'rank'))}"
            )


def _rank_of(slot: Any, shape: tuple[int, ...]) -> int:
    """The rank that A has, by its shape."""
    if slot.r is not None:
        return int(slot.r)
    one, two = (slot.shape_of("a", n * slot.form.groups) for n in (1, 2))
    axis = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
    per = two[axis] - one[axis]
    return int(shape[axis] // per * slot.form.groups) if len(shape) == len(one) else 0

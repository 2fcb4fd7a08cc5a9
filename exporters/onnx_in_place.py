"""Other weights in the very files of a model, and the way back: what was there is kept beside them first."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_fx import ExportError

from .external_data import DATA_HASH_KEY, sha256
from .onnx_files import has_external_data, save_graph, written
from .onnx_weights import Array
from .text import reason

_MODEL, _WEIGHTS = "model.onnx", "weights.safetensors"


def undo_of(file: Path) -> Path:
    """The directory that holds what was there before a fold in place."""
    return file.with_name(f"{file.name}.undo")


def write_in_place(model: ir.Model, file: Path, new: Mapping[ir.Value, ir.TensorProtocol]) -> None:
    """Write new values where the old ones lie, after keeping those.

    Raises:
        ExportError: if there is something to undo already, or the file system refuses; all is then as it was.
    """
    undo = undo_of(file)
    if undo.exists():
        raise ExportError(
            f"{undo} holds what an earlier fold in place replaced; take that back first, with "
            f"unfold_onnx({str(file)!r}), or fold into another file"
        )
    places = {value: value.const_value for value in new if isinstance(value.const_value, ir.ExternalTensor)}
    external = has_external_data(model)
    try:
        _keep(file, undo, {_place(tensor): _bytes_at(tensor) for tensor in places.values()})
        try:
            for value, place in places.items():
                _write_at(place, np.frombuffer(new[value].tobytes(), np.uint8))
            for value, tensor in new.items():
                if value not in places:
                    value.const_value = tensor
            if not external:
                with written(model, file, external=False):
                    return
            _rehash(model, file)
            save_graph(model, file)
        except BaseException:
            _restore(file, undo)
            raise
    except OSError as error:
        raise ExportError(f"cannot fold into {file} ({error.strerror or reason(error)}); it is as it was") from error


def unfold_in_place(file: Path) -> None:
    """Put back what `write_in_place` kept.

    Raises:
        ExportError: if nothing was kept, or it cannot be read or written.
    """
    undo = undo_of(file)
    if not undo.is_dir():
        raise ExportError(
            f"{file} was not folded in place: there is no {undo.name} beside it. A fold into another file left its "
            "base as it was; take that"
        )
    try:
        _restore(file, undo)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot take back the fold of {file}: {reason(error)}") from error


def _keep(file: Path, undo: Path, data: Mapping[str, Array]) -> None:
    directory = Path(tempfile.mkdtemp(prefix=".lora_fx.", suffix=".tmp", dir=file.parent))
    try:
        shutil.copyfile(file, directory / _MODEL)
        save_file(dict(data), directory / _WEIGHTS)
        for name in (_MODEL, _WEIGHTS):
            with open(directory / name, "rb") as kept:
                os.fsync(kept.fileno())
        os.replace(directory, undo)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _restore(file: Path, undo: Path) -> None:
    for place, data in load_file(undo / _WEIGHTS).items():
        name, _, offset = place.rpartition(":")
        with _patching(file.parent / name) as target:
            target.seek(int(offset))
            target.write(data.tobytes())
    model = undo / _MODEL
    if model.read_bytes() != file.read_bytes():
        os.replace(model, file)
    shutil.rmtree(undo)


def _place(tensor: ir.ExternalTensor) -> str:
    return f"{tensor.location}:{tensor.offset or 0}"


def _bytes_at(tensor: ir.ExternalTensor) -> Array:
    with open(tensor.path, "rb") as data:
        data.seek(tensor.offset or 0)
        return np.frombuffer(data.read(tensor.nbytes), np.uint8)


def _write_at(tensor: ir.ExternalTensor, new: Array) -> None:
    with _patching(Path(tensor.path)) as data:
        data.seek(tensor.offset or 0)
        data.write(new.tobytes())


@contextlib.contextmanager
def _patching(path: Path) -> Iterator[BinaryIO]:
    with open(path, "r+b") as data:
        yield data
        data.flush()
        os.fsync(data.fileno())


def _rehash(model: ir.Model, file: Path) -> None:
    """The graph names its data's hash, if `export_onnx` wrote it."""
    places = {
        value.const_value.path
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    if DATA_HASH_KEY in model.metadata_props and len(places) == 1:
        model.metadata_props[DATA_HASH_KEY] = sha256(Path(places.pop()))

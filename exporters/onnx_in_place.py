"""Other weights in the very files of a model, and the way back: what was there is kept beside them first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_fx import ExportError

from .external_data import DATA_HASH_KEY, sha256
from .onnx_files import graph_bytes, has_external_data, save_graph, written
from .onnx_weights import Array
from .text import reason

_MODEL, _WEIGHTS, _RECORD = "model.onnx", "weights.safetensors", "folded.json"


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
        _keep(file, undo, {_place(tensor): np.frombuffer(_read(tensor), np.uint8) for tensor in places.values()})
        try:
            for value, place in places.items():
                _write_at(place, np.frombuffer(new[value].tobytes(), np.uint8))
            for value, tensor in new.items():
                if value not in places:
                    value.const_value = tensor
            if not external:
                with written(model, file, external=False) as files:
                    _record(undo, files.model.read_bytes(), [])
                return
            _rehash(model, file)
            _record(undo, graph_bytes(model), list(places.values()))
            save_graph(model, file)
        except BaseException:
            _restore(file, undo)
            raise
    except OSError as error:
        raise ExportError(f"cannot fold into {file} ({error.strerror or reason(error)}); it is as it was") from error


def unfold_in_place(file: Path) -> None:
    """Put back what `write_in_place` kept.

    Raises:
        ExportError: if nothing was kept, the files are no longer those that it wrote, or something cannot be read or
            written.
    """
    undo = undo_of(file)
    if not undo.is_dir():
        raise ExportError(
            f"{file} was not folded in place: there is no {undo.name} beside it. A fold into another file left its "
            "base as it was; take that"
        )
    try:
        _check_still_folded(file, undo)
        _restore(file, undo)
    except (OSError, SafetensorError, ValueError) as error:
        raise ExportError(f"cannot take back the fold of {file}: {reason(error)}") from error


def _record(undo: Path, graph: bytes, places: Sequence[ir.ExternalTensor]) -> None:
    """Note what the files hold once they are folded. Without it, the fold was interrupted while it wrote weights."""
    hashes = {_place(tensor): [tensor.nbytes, _hash(_read(tensor))] for tensor in places}
    with open(undo / _RECORD, "w", encoding="utf-8") as record:
        json.dump({"graph": _hash(graph), "places": hashes}, record)
        record.flush()
        os.fsync(record.fileno())


def _check_still_folded(file: Path, undo: Path) -> None:
    """Whether the files are still those that were folded: what was kept is not for a model that was written later."""
    graph, record = file.read_bytes(), undo / _RECORD
    is_known = graph == (undo / _MODEL).read_bytes()
    if record.is_file():
        noted = json.loads(record.read_text(encoding="utf-8"))
        is_known = is_known or _hash(graph) == noted["graph"]
        for place, (size, wanted) in noted["places"].items():
            name, offset = _parts(place)
            is_known = is_known and _hash(_read_at(file.parent / name, offset, size)) == wanted
    if not is_known:
        raise ExportError(
            f"{file} was written anew since it was folded in place, and {undo.name} belongs to the file that it was; "
            "remove that directory"
        )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
        name, offset = _parts(place)
        with _patching(file.parent / name) as target:
            target.seek(offset)
            target.write(data.tobytes())
    model = undo / _MODEL
    if model.read_bytes() != file.read_bytes():
        os.replace(model, file)
    shutil.rmtree(undo)


def _place(tensor: ir.ExternalTensor) -> str:
    return f"{tensor.location}:{tensor.offset or 0}"


def _parts(place: str) -> tuple[str, int]:
    name, _, offset = place.rpartition(":")
    return name, int(offset)


def _read(tensor: ir.ExternalTensor) -> bytes:
    return _read_at(Path(tensor.path), tensor.offset or 0, tensor.nbytes)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as data:
        data.seek(offset)
        return data.read(size)


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

"""Other weights in the very files of a model, and the way back: what was there is kept beside them first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_fx import ExportError
from lora_fx.atomic import sync_directory, temporary_beside, write_durably, write_through

from .external_data import DATA_HASH_KEY, data_locations, sha256
from .onnx_files import graph_bytes, has_external_data, save_graph, written
from .text import reason

_LARGE_GRAPH = 2**26  # bytes: a graph with weights beside it is smaller
_MODEL, _WEIGHTS, _RECORD = "model.onnx", "weights.safetensors", "folded.json"


def undo_of(file: Path) -> Path:
    """The directory that holds what was there before a fold in place."""
    return file.with_name(f"{file.name}.undo")


def write_in_place(model: ir.Model, file: Path, new: Mapping[ir.Value, ir.TensorProtocol]) -> None:
    """Write new values where the old ones lie, after keeping those.

    While weights beside the graph are half old and half new, there is no graph: whoever kills this leaves nothing that
    could be loaded, and `unfold_in_place` puts all back.

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
    _check_alone(model, file, list(places))
    try:
        for path in {place.path for place in places.values()}:
            with open(path, "r+b"):  # before anything is kept: it may be read-only
                pass
        _keep(file, undo, list(places.values()))
        try:
            for value, tensor in new.items():
                if value not in places:
                    value.const_value = tensor
            if not external:
                with written(model, file, external=False) as files:
                    _record(undo, files.model.read_bytes(), [])
                return
            file.unlink()
            for value, place in places.items():
                _write_at(Path(place.path), place.offset or 0, new[value].tobytes())
            _rehash(model, file)
            _record(undo, graph_bytes(model), list(places.values()))
            save_graph(graph_bytes(model), file, undo / _MODEL)
        except BaseException:
            _restore(file, undo)
            raise
    except OSError as error:
        raise ExportError(f"cannot fold into {file} ({error.strerror or reason(error)}); it is as it was") from error


def _check_alone(model: ir.Model, file: Path, changed: Sequence[ir.Value]) -> None:
    """Whether nobody else reads the bytes that will change: another initializer, or another graph beside this one.

    Raises:
        ExportError: if somebody does.
    """
    others = [value for value in model.graph.initializers.values() if all(value is not each for each in changed)]
    for value in changed:
        own = value.const_value
        assert isinstance(own, ir.ExternalTensor)
        start, stop = own.offset or 0, (own.offset or 0) + own.nbytes
        for other in (*others, *(each for each in changed if each is not value)):
            tensor = other.const_value
            if not isinstance(tensor, ir.ExternalTensor) or Path(tensor.path) != Path(own.path):
                continue
            if (tensor.offset or 0) < stop and start < (tensor.offset or 0) + tensor.nbytes:
                raise ExportError(
                    f"{value.name!r} and {other.name!r} share their place in {own.location!r}, so they cannot be "
                    "folded in place; fold into another file"
                )
    tensors = (value.const_value for value in changed)
    used = {Path(tensor.path).resolve() for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    for path in file.parent.glob("*.onnx") if used else ():
        if path.resolve() == file.resolve() or path.stat().st_size > _LARGE_GRAPH:
            continue
        if not used.isdisjoint(_data_of(path)):
            raise ExportError(
                f"{path.name} has its weights in the same file as {file.name}, and would change with it; fold into "
                "another file"
            )


def _data_of(path: Path) -> set[Path]:
    with contextlib.suppress(Exception):  # no ONNX file, whatever it is called
        return {(path.parent / each).resolve() for each in data_locations(onnx.load(path, load_external_data=False))}
    return set()


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
        if not _is_known(file, undo):
            raise ExportError(
                f"{file} was written anew since it was folded in place, and {undo.name} belongs to the file that it "
                "was; remove that directory"
            )
        _restore(file, undo)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ExportError(f"cannot take back the fold of {file}: {reason(error)}") from error


def _is_known(file: Path, undo: Path) -> bool:
    """Whether the files are those that were folded, or were before: what was kept is for no model of a later day."""
    if not file.exists():
        return True  # interrupted while weights were written
    graph, record = file.read_bytes(), undo / _RECORD
    if graph == (undo / _MODEL).read_bytes():
        return all(_read_at(path, offset, len(old)) == old for path, offset, old in _kept(file, undo))
    if not record.is_file():
        return False
    noted = json.loads(record.read_text(encoding="utf-8"))
    return bool(_hash(graph) == noted["graph"]) and all(
        _hash(_read_at(path, offset, len(old))) == noted["places"][f"{path.relative_to(file.parent)}:{offset}"]
        for path, offset, old in _kept(file, undo)
    )


def _record(undo: Path, graph: bytes, places: Sequence[ir.ExternalTensor]) -> None:
    """Note what the files hold once they are folded."""
    hashes = {_place(tensor): _hash(_read(tensor)) for tensor in places}
    write_durably(undo / _RECORD, json.dumps({"graph": _hash(graph), "places": hashes}).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _keep(file: Path, undo: Path, places: Sequence[ir.ExternalTensor]) -> None:
    with temporary_beside(undo) as directory:
        shutil.copy(file, directory / _MODEL)
        save_file({_place(each): np.frombuffer(_read(each), np.uint8) for each in places}, directory / _WEIGHTS)
        for name in (_MODEL, _WEIGHTS):
            write_through(directory / name)
        os.replace(directory, undo)
        sync_directory(file.parent)


def _kept(file: Path, undo: Path) -> list[tuple[Path, int, bytes]]:
    """(file, offset, bytes) of the weights that were kept; the names are those of a record that lies on the disk."""
    found = []
    for place, data in load_file(undo / _WEIGHTS).items():
        name, _, offset = place.rpartition(":")
        path = file.parent / name
        if not path.resolve().is_relative_to(file.parent.resolve()):
            raise ExportError(f"{undo} names a place outside of {file.parent}; it was not written by lora_fx")
        found.append((path, int(offset), data.tobytes()))
    return found


def _restore(file: Path, undo: Path) -> None:
    graph = (undo / _MODEL).read_bytes()
    weights = _kept(file, undo)
    with temporary_beside(undo) as temporary:
        folded = temporary / "folded.onnx"
        if file.exists():
            os.link(file, folded)
        os.link(undo / _MODEL, temporary / _MODEL)  # other names and no copies: the disk may be full
        there = [(path, offset, _read_at(path, offset, len(data))) for path, offset, data in weights]
        try:
            if weights:
                file.unlink(missing_ok=True)
            for path, offset, data in weights:
                _write_at(path, offset, data)
            if not file.exists() or file.read_bytes() != graph:
                os.replace(temporary / _MODEL, file)
                sync_directory(file.parent)
        except BaseException:
            for path, offset, data in there:
                _write_at(path, offset, data)
            if folded.exists():
                os.replace(folded, file)
            raise
        try:
            os.replace(undo, temporary / "gone")  # in one step, so that there is never half of it
        except OSError:
            shutil.rmtree(undo)


def _place(tensor: ir.ExternalTensor) -> str:
    return f"{tensor.location}:{tensor.offset or 0}"


def _read(tensor: ir.ExternalTensor) -> bytes:
    return _read_at(Path(tensor.path), tensor.offset or 0, tensor.nbytes)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as data:
        data.seek(offset)
        return data.read(size)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as target:
        target.seek(offset)
        target.write(data)
        target.flush()
        os.fsync(target.fileno())


def _rehash(model: ir.Model, file: Path) -> None:
    """The graph names its data's hash, if `export_onnx` wrote it."""
    places = {
        value.const_value.path
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    if DATA_HASH_KEY in model.metadata_props and len(places) == 1:
        model.metadata_props[DATA_HASH_KEY] = sha256(Path(places.pop()))

"""Other weights in the very files of a model, and the way back: what was there is kept beside them first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from safetensors import SafetensorError, safe_open

from lora_fx import ExportError
from lora_fx.atomic import sync_directory, temporary_beside, write_durably, write_through

from .external_data import DATA_HASH_KEY, data_locations, sha256
from .onnx_files import external_tensors, graph_bytes, has_external_data, save_graph, written
from .streamed_weights import NewValues
from .text import reason

_PIECE = 2**20  # bytes that are read, or written, in one go
_LARGE_GRAPH = 2**26  # bytes: a graph with weights beside it is smaller
_MODEL, _WEIGHTS, _RECORD = "model.onnx", "weights.safetensors", "folded.json"


@dataclass(frozen=True)
class _Place:
    """Bytes in a file of weights.

    Attributes:
        path, location: of the file, and what the graph calls it.
        offset, size: where in it.
    """

    path: Path
    location: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """What it is called in a record."""
        return f"{self.location}:{self.offset}"

    def pieces(self) -> Iterator[bytes]:
        """What is there."""
        with open(self.path, "rb") as data:
            data.seek(self.offset)
            for start in range(0, self.size, _PIECE):
                yield data.read(min(_PIECE, self.size - start))

    def hash(self) -> str:
        """Of what is there."""
        return _hash(self.pieces())


def _place_of(tensor: ir.ExternalTensor) -> _Place:
    return _Place(Path(tensor.path), str(tensor.location), tensor.offset or 0, tensor.nbytes)


def undo_of(file: Path) -> Path:
    """The directory that holds what was there before a fold in place."""
    return file.with_name(f"{file.name}.undo")


def write_in_place(model: ir.Model, file: Path, new: Sequence[NewValues], let_go: Callable[[], object]) -> None:
    """Write new values where the old ones lie, after keeping those.

    While weights beside the graph are half old and half new, there is no graph: whoever kills this leaves nothing that
    could be loaded, and `unfold_in_place` puts all back.

    Args:
        let_go: is called after each weight.

    Raises:
        ExportError: if there is something to undo already, a value leaves the range of its weight's type, or the file
            system refuses; all is then as it was.
    """
    undo = undo_of(file)
    if undo.exists():
        raise ExportError(
            f"{undo} holds what an earlier fold in place replaced; take that back first, with "
            f"unfold_onnx({str(file)!r}), or fold into another file"
        )
    held = {value: value.const_value for values in new for value in values.values}
    places = {value: _place_of(tensor) for value, tensor in held.items() if isinstance(tensor, ir.ExternalTensor)}
    external = has_external_data(model)
    _check_alone(model, file, list(places))
    try:
        for path in {place.path for place in places.values()}:
            with open(path, "r+b"):  # before anything is kept: it may be read-only
                pass
        _keep(file, undo, list(places.values()))
        try:
            if external:
                file.unlink()
            for values in new:
                written_to = values.write({value: (place.path, place.offset) for value, place in places.items()})
                for value, tensor in written_to.items():
                    value.const_value = tensor
                let_go()
            if not external:
                with written(model, file, external=False) as files:
                    _record(undo, files.model.read_bytes(), [])
                return
            for path in {place.path for place in places.values()}:
                write_through(path)
            _rehash(model, file)
            _record(undo, graph_bytes(model), list(places.values()))
            save_graph(graph_bytes(model), file, undo / _MODEL)
        except BaseException:
            _put_back(file, undo)
            raise
    except OSError as error:
        raise ExportError(f"cannot fold into {file} ({error.strerror or reason(error)}); it is as it was") from error


def _check_alone(model: ir.Model, file: Path, changed: Sequence[ir.Value]) -> None:
    """Whether nobody else reads the bytes that will change: another initializer, or another graph beside this one.

    Raises:
        ExportError: if somebody does.
    """
    places = [(value, _place_of(tensor)) for value, tensor in external_tensors(model)]
    files = {path: path.resolve() for path in {place.path for _, place in places}}  # one file may have several names
    own = [(value, place) for value, place in places if any(value is each for each in changed)]
    for value, place in own:
        for other, there in places:
            if other is value or files[there.path] != files[place.path]:
                continue
            if there.offset < place.offset + place.size and place.offset < there.offset + there.size:
                raise ExportError(
                    f"{value.name!r} and {other.name!r} share their place in {place.location!r}, so they cannot be "
                    "folded in place; fold into another file"
                )
    used = {files[place.path] for _, place in own}
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
        again = "" if file.exists() else "; nothing is lost, so call it again when that is mended"
        raise ExportError(f"cannot take back the fold of {file}: {reason(error)}{again}") from error


def _is_known(file: Path, undo: Path) -> bool:
    """Whether the files are those that were folded, or were before: what was kept is for no model of a later day."""
    if not file.exists():
        return True  # interrupted while weights were written
    graph, record = file.read_bytes(), undo / _RECORD
    if graph == (undo / _MODEL).read_bytes():
        return all(place.hash() == _hash(pieces) for place, pieces in _kept(file, undo).items())
    if not record.is_file():
        return False
    noted = json.loads(record.read_text(encoding="utf-8"))
    if not isinstance(noted, dict) or not isinstance(noted.get("places"), dict):
        raise ValueError(f"{_RECORD} of {undo.name} is not what was written there")
    return bool(_hash([graph]) == noted["graph"]) and all(
        place.hash() == noted["places"][f"{place.path.relative_to(file.parent)}:{place.offset}"]
        for place in _kept(file, undo)
    )


def _record(undo: Path, graph: bytes, places: Sequence[_Place]) -> None:
    """Note what the files hold once they are folded."""
    hashes = {place.name: place.hash() for place in places}
    write_durably(undo / _RECORD, json.dumps({"graph": _hash([graph]), "places": hashes}).encode())


def _hash(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _keep(file: Path, undo: Path, places: Sequence[_Place]) -> None:
    with temporary_beside(undo) as directory:
        shutil.copy(file, directory / _MODEL)
        _write_tensors(directory / _WEIGHTS, places)
        for name in (_MODEL, _WEIGHTS):
            write_through(directory / name)
        os.replace(directory, undo)
        sync_directory(file.parent)


def _write_tensors(path: Path, places: Sequence[_Place]) -> None:
    """A safetensors file of bytes at places, by their names: safetensors' own writer takes all of them at once."""
    header, end = {}, 0
    for place in places:
        header[place.name] = {"dtype": "U8", "shape": [place.size], "data_offsets": [end, end + place.size]}
        end += place.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for place in places:
            out.writelines(place.pieces())


def _kept(file: Path, undo: Path) -> dict[_Place, Iterator[bytes]]:
    """{place: its bytes} of the weights that were kept; the names are those of a record that lies on the disk."""
    found = {}
    with safe_open(undo / _WEIGHTS, "np") as kept:
        for name in kept.keys():  # noqa: SIM118
            location, _, offset = name.rpartition(":")
            path = file.parent / location
            if not path.resolve().is_relative_to(file.parent.resolve()):
                raise ExportError(f"{undo} names a place outside of {file.parent}; it was not written by lora_fx")
            (size,) = kept.get_slice(name).get_shape()
            found[_Place(path, location, int(offset), size)] = _pieces_of(undo / _WEIGHTS, name, size)
    return found


def _pieces_of(path: Path, name: str, size: int) -> Iterator[bytes]:
    with safe_open(path, "np") as kept:
        values = kept.get_slice(name)
        for start in range(0, size, _PIECE):
            yield values[start : min(size, start + _PIECE)].tobytes()


def _restore(file: Path, undo: Path) -> None:
    """Put back what was kept; if that fails, all is as it was, unless the disk has no room for what is there now."""
    with temporary_beside(undo) as temporary:
        folded, there = temporary / "folded.onnx", temporary / _WEIGHTS
        if file.exists():
            os.link(file, folded)
        places = list(_kept(file, undo))
        try:
            _write_tensors(there, places)
        except OSError:
            there.unlink(missing_ok=True)
        try:
            _put_back(file, undo, keep=True)
        except BaseException:
            if there.exists():
                _write_back(places, [_pieces_of(there, place.name, place.size) for place in places])
                if folded.exists():
                    os.replace(folded, file)
            raise
        _drop(undo, temporary)


def _put_back(file: Path, undo: Path, *, keep: bool = False) -> None:
    """Put back what was kept. There is no graph as long as some of it is missing.

    Args:
        keep: it stays kept, too.
    """
    kept = _kept(file, undo)
    with temporary_beside(undo) as temporary:
        os.link(undo / _MODEL, temporary / _MODEL)  # another name and no copy: the disk may be full
        if kept:
            file.unlink(missing_ok=True)
        _write_back(list(kept), list(kept.values()))
        if not file.exists() or file.read_bytes() != (undo / _MODEL).read_bytes():
            os.replace(temporary / _MODEL, file)
            sync_directory(file.parent)
        if not keep:
            _drop(undo, temporary)


def _drop(undo: Path, temporary: Path) -> None:
    try:
        os.replace(undo, temporary / "gone")  # in one step, so that there is never half of it
    except OSError:
        shutil.rmtree(undo)


def _write_back(places: Sequence[_Place], contents: Sequence[Iterator[bytes]]) -> None:
    for place, pieces in zip(places, contents, strict=True):
        with open(place.path, "r+b") as target:
            target.seek(place.offset)
            target.writelines(pieces)
    for path in {place.path for place in places}:
        write_through(path)


def _rehash(model: ir.Model, file: Path) -> None:
    """The graph names its data's hash, if `export_onnx` wrote it."""
    places = {tensor.path for _, tensor in external_tensors(model)}
    if DATA_HASH_KEY in model.metadata_props and len(places) == 1:
        model.metadata_props[DATA_HASH_KEY] = sha256(Path(places.pop()))

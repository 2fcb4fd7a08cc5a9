"""Where the command line may write. Checked before anything is loaded: no source and no stranger is replaced."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from .errors import AdapterError, ExportError, LoraFxError


def check_model_destination(out: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an OUT directory that is not free to be written.

    Raises:
        AdapterError: if OUT is a file, shares a place with a source, holds what `overwrite` does not cover, or
            cannot be written.
    """
    target = resolved(out)
    _check_apart(out, sources)
    with _telling(out):
        if target.is_dir() and any(target.iterdir()):
            _check_replaceable(out, target, overwrite)
    check_writable(out)


def check_onnx_destination(out: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an OUT file that is not free to be written.

    Raises:
        typer.BadParameter: if OUT does not end in .onnx.
        AdapterError, ExportError: if it lies in a source, is something other than an ONNX file, or cannot be written.
    """
    if out.suffix.lower() != ".onnx":
        raise typer.BadParameter(f"the file to write must end in .onnx, and {str(out)!r} does not")
    target = _file_to_write(out, sources, "model.onnx", ExportError)
    with _telling(out):
        if target.exists() and not overwrite and not _is_onnx(target):
            raise ExportError(f"{str(out)!r} exists and is no readable ONNX file; --overwrite replaces it")


def check_page_destination(out: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an OUT page that is not free to be written.

    Raises:
        typer.BadParameter: if OUT does not end in .html.
        AdapterError: if it lies in a source, is a directory, is there already, or cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"the page to write must end in .html, and {str(out)!r} does not")
    target = _file_to_write(out, sources, "report.html", AdapterError)
    with _telling(out):
        if target.exists() and not overwrite:
            raise AdapterError(f"{str(out)!r} exists; --overwrite replaces it")


def check_report_destination(out: Path, sources: Sequence[Path]) -> None:
    """Refuse a file for a report that is not free to be written; an older report is replaced.

    Raises:
        typer.BadParameter: if it ends in neither .html nor .json.
        AdapterError: if it lies in a source, is a directory, or cannot be written.
    """
    if out.suffix.lower() not in (".html", ".json"):
        raise typer.BadParameter(f"the report to write must end in .html or .json, and {str(out)!r} does not")
    _file_to_write(out, sources, "report.html", AdapterError)


def _file_to_write(out: Path, sources: Sequence[Path], example: str, error: type[LoraFxError]) -> Path:
    """Where OUT leads, if a file can be written there and it lies in none of the sources."""
    target = resolved(out)
    _check_apart(out, sources)
    check_writable(out.parent)
    with _telling(out):
        if target.is_dir():
            raise error(f"{str(out)!r} is a directory; name a file in it, such as {str(out / example)!r}")
        if not target.parent.is_dir():
            raise error(
                f"cannot write {str(out)!r}: there is no directory {str(target.parent)!r}; make it first "
                f"(mkdir -p {target.parent})"
            )
    return target


def check_writable(directory: Path) -> None:
    """Refuse a directory that is not there and cannot be made, or that cannot be written into.

    Raises:
        AdapterError: with the reason.
    """
    with _telling(directory):
        place = existing_part(resolved(directory))
        if not place.is_dir():
            raise AdapterError(f"{str(place)!r} is a file, so {str(directory)!r} cannot be a directory; give another")
        with tempfile.TemporaryDirectory(dir=place, prefix=".lora-fx."):
            pass


def resolved(path: Path) -> Path:
    """The absolute path without links; unlike `Path.resolve`, this takes links in a circle as they are."""
    return Path(os.path.realpath(path))


def existing_part(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


@contextmanager
def _telling(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(f"cannot write {str(out)!r} ({error.strerror}); choose another place") from error


def _check_apart(out: Path, sources: Sequence[Path]) -> None:
    target = resolved(out)
    for source in sources:
        place = resolved(source)
        if place.is_relative_to(target):
            raise AdapterError(f"OUT {str(out)!r} is, or holds, {str(source)!r}, which is read; give another place")
        if target.is_relative_to(place):
            raise AdapterError(
                f"OUT {str(out)!r} lies in {str(source)!r}, which is read and stays as it is; give a place outside"
            )


def _check_replaceable(out: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise AdapterError(f"{str(out)!r} is not empty; --overwrite replaces a model directory")
    if not (target / "config.json").is_file():
        raise AdapterError(
            f"{str(out)!r} holds files but no config.json, so it is no model directory, and --overwrite does not "
            "delete it; give another directory, or empty this one"
        )


def _is_onnx(file: Path) -> bool:
    import onnx

    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # whatever the parser says: it is not a file of ours
        return False
    return model.ir_version > 0 and model.HasField("graph")

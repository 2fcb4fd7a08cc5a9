"""The path that a caller gave."""

from __future__ import annotations

import os
from pathlib import Path

from lora_fx import ExportError


def path_of(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path. Raises ExportError if it can be no file's."""
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise ExportError(f"path must be a string or a path, not {type(path).__name__}")
    if not text or "\0" in text:
        what = "holds a NUL character" if text else "is empty"
        raise ExportError(f"path={text!r} {what}; name a file, such as 'model.onnx'")
    return Path(text)

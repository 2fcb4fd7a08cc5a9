"""Silence for other libraries' chatter, and a catch for what they print past Python."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "onnx")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints of the exporter inside; its exceptions come through."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    try:
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class Caught:
    """What was written to file descriptor 2 while it was caught."""

    text: str = ""


@contextlib.contextmanager
def stderr_caught() -> Iterator[Caught]:
    """Catch what C++ code writes to stderr. Its text is in `.text` after the block.

    ONNX Runtime tells only its log, not its caller, why a provider cannot be made; and its log goes
    straight to file descriptor 2, past sys.stderr.
    """
    caught = Caught()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        try:
            saved = os.dup(2)
        except OSError:  # a process without stderr
            yield caught
            return
        os.dup2(file.fileno(), 2)
        try:
            yield caught
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            caught.text = file.read().decode(errors="replace")

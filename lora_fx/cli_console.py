"""What the command line prints: progress and messages on stderr, JSON on stdout."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from .errors import LoraFxWarning

_stderr = Console(stderr=True)


def complain(message: str, *, verbose: bool) -> None:
    """One line that says what is wrong; the traceback before it if asked for."""
    if verbose:
        traceback.print_exc()
    _stderr.print(f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True)


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings as one line; what other libraries note to themselves helps nobody here."""
    if issubclass(category, LoraFxWarning):
        _stderr.print(f"[bold yellow]warning:[/] {_escaped(str(message))}", soft_wrap=True)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what is going on, with a spinner on a terminal."""
    if not _stderr.is_terminal:
        yield
        return
    with _stderr.status(what):
        yield


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on stderr, on a terminal; gives what is to be told (bytes that are done, bytes in all)."""
    if not _stderr.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=_stderr, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """One JSON object on stdout. JSON has no NaN and no Infinity: they are null."""
    print(json.dumps(_without_non_finite(value), default=str, allow_nan=False))


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return value


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")

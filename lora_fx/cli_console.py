"""What the command line prints: results and JSON on stdout; progress, messages and the log on stderr."""

from __future__ import annotations

import json
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console

from .cli_wording import as_options
from .errors import LoraFxWarning

NOTHING_WRITTEN = "dry run: nothing was written"

_stderr = Console(stderr=True)
_logger = logging.getLogger("lora_fx")
_LOGGERS = ("lora_fx", "exporters")


@dataclass
class Loudness:
    """What the user wants to read: see `-v` and `-q`."""

    verbose: int = 0
    quiet: bool = False


LOUDNESS = Loudness()


def set_loudness(verbose: int, quiet: bool) -> None:
    """Add what was asked for, before the command's name or behind it.

    Raises:
        typer.BadParameter: if both were.
    """
    LOUDNESS.verbose += verbose
    LOUDNESS.quiet |= quiet
    if LOUDNESS.quiet and LOUDNESS.verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other; give one of them")
    level = (
        logging.ERROR if LOUDNESS.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(LOUDNESS.verbose, 2)]
    )
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(level)


@contextmanager
def terminal() -> Iterator[None]:
    """Messages of the library's loggers go to stderr inside, and the loudness is that of one command."""
    handler = _Handler()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    LOUDNESS.verbose, LOUDNESS.quiet = 0, False
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _stderr.print(f"[dim]{record.name}:[/] {_escaped(as_options(record.getMessage()))}", soft_wrap=True)


def show(result: object = "") -> None:
    """A result in words, on stdout, if it is to be read."""
    if not LOUDNESS.quiet:
        print(result)


def show_report(report: Any, *, as_json: bool, dry_run: bool = False) -> None:
    """A report in words or as JSON, and that it is of a dry run."""
    if as_json:
        print_json(report.to_dict() | ({"dry_run": True} if dry_run else {}))
        return
    show(report)
    if dry_run:
        show(f"\n{NOTHING_WRITTEN}")


def complain(message: str) -> None:
    """One line that says what is wrong; the traceback before it if asked for."""
    if LOUDNESS.verbose:
        traceback.print_exc()
    _stderr.print(f"[bold red]error:[/] {_escaped(as_options(message))}", soft_wrap=True)


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings as one line; what other libraries note to themselves helps nobody here."""
    if issubclass(category, LoraFxWarning) and not LOUDNESS.quiet:
        _stderr.print(f"[bold yellow]warning:[/] {_escaped(as_options(str(message)))}", soft_wrap=True)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what is going on, with a spinner on a terminal; with -v, how long it took."""
    started = time.perf_counter()
    if _is_watched():
        with _stderr.status(what):
            yield
    else:
        yield
    _logger.info("%s: %.1f s", what, time.perf_counter() - started)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on stderr, on a terminal; gives what is to be told (bytes that are done, bytes in all)."""
    if not _is_watched():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=_stderr, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _is_watched() -> bool:
    return _stderr.is_terminal and not LOUDNESS.quiet


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

"""The curves in `trainer_state.json`, as transformers' Trainer writes it beside each checkpoint.

The file may come from anywhere: its size is limited, and what in it is no finite number is left out and counted.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AdapterError
from .tables import Shown, Table, counted

LOG_FILE = "trainer_state.json"

_LARGEST = 64 * 2**20  # bytes
_MOST_SERIES = 100

# Of training and of evaluation.
LOSSES = ("loss", "eval_loss")

# What is said at every step, and is no measure of it.
_NOT_DRAWN = {"step", "epoch", "total_flos"}


@dataclass(frozen=True)
class Series:
    """One measure over the steps of a training run.

    Attributes:
        name: as it stands in the log, such as "loss", "eval_loss", "learning_rate".
        points: (step, value), by step.
        left_out: how many values were NaN or infinite.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    left_out: int = 0


@dataclass(frozen=True)
class TrainingLog(Shown):
    """The measures of a training run; prints as a table."""

    series: tuple[Series, ...]

    def blocks(self) -> list[str | Table]:
        """A row for each measure."""
        rows = [
            (
                each.name,
                str(len(each.points)),
                *(f"{point:.4g}" for point in _summary(each)),
                f"{each.left_out} NaN or infinite" if each.left_out else "",
            )
            for each in self.series
        ]
        return [
            counted(len(rows), "measure"),
            Table(("measure", "points", "first", "last", "least", "most", "remarks"), rows),
        ]


def read_training_log(path: str | os.PathLike[str]) -> TrainingLog:
    """The measures in a `trainer_state.json`.

    Raises:
        AdapterError: if the file is too large, no such JSON, or holds no measures.
    """
    file = Path(path)
    try:
        with open(file, "rb") as stream:
            text = stream.read(_LARGEST + 1)
    except OSError as error:
        raise AdapterError(f"{str(file)!r} cannot be read: {error.strerror}; name a {LOG_FILE} of Trainer's") from error
    if len(text) > _LARGEST:
        raise AdapterError(
            f"{str(file)!r} is larger than {_LARGEST >> 20} MiB, so it is no {LOG_FILE} to draw; leave it out"
        )
    try:
        state = json.loads(text.decode("utf-8"))  # Trainer writes NaN as such
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{str(file)!r} is not JSON: {error}; copy it whole, or leave it out") from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise AdapterError(
            f"{str(file)!r} has no list 'log_history' of objects; use the {LOG_FILE} that Trainer writes"
        )
    series = _series(history)
    if not series:
        raise AdapterError(f"{str(file)!r} holds no measures over steps, so there is nothing to draw; leave it out")
    if len(series) > _MOST_SERIES:
        raise AdapterError(
            f"{str(file)!r} holds {len(series)} measures, and {_MOST_SERIES} are drawn at most; leave it out"
        )
    return TrainingLog(tuple(series))


def _series(history: list[dict[str, Any]]) -> list[Series]:
    points: dict[str, dict[float, float]] = {}
    left_out: dict[str, int] = {}
    for entry in history:
        step = _number(entry.get("step"))
        if step is None or not math.isfinite(step):
            continue
        for name, given in entry.items():
            value = _number(given)
            if name in _NOT_DRAWN or value is None:
                continue
            found = points.setdefault(name, {})
            if math.isfinite(value):
                found[step] = value
            else:
                left_out[name] = left_out.get(name, 0) + 1
    order = sorted(points, key=lambda name: name not in LOSSES)  # the file has them by the alphabet
    return [Series(name, tuple(sorted(points[name].items())), left_out.get(name, 0)) for name in order]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond float's range
        return math.inf


def _summary(series: Series) -> tuple[float, ...]:
    values = [value for _, value in series.points] or [math.nan]
    return values[0], values[-1], min(values), max(values)

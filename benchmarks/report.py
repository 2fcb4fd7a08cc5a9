"""What a subject gives back, and how it prints: tables with machine, versions and date above them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PACKAGES = ("torch", "peft", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "lora-fx")

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """One result.

    Attributes:
        title: what was measured, on what.
        header: one name per column, with its unit.
        rows: numbers stay numbers, so that --json keeps them.
        notes: what was asserted before timing, how to read the table, what was lost.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"### {self.title}", "", *_markdown(self.header, self.rows)]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    cells = [list(header), *([_spelled(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]
    cells.insert(1, [dash[:-1] + ":" if right else dash for dash, right in zip(rule, numeric, strict=True)])
    return ["| " + " | ".join(_padded(row, widths, numeric)) + " |" for row in cells]


def _padded(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    zipped = zip(row, widths, numeric, strict=True)
    return [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zipped]


def _spelled(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 0.1 else f"{cell:.2f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


@dataclass(frozen=True)
class Machine:
    """Where and with what it was measured."""

    date: str
    processor: str
    cores: int
    load: str
    system: str
    python: str
    packages: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return (
            f"{self.date}; {self.processor}, {self.cores} cores (shared; load {self.load}), {self.system}\n"
            f"Python {self.python}, {versions}\n"
            "one thread; seconds are CPU time of the process, medians of interleaved rounds"
        )


def machine() -> Machine:
    """This machine, now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Machine(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        load=f"{load:.1f}",
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=_versions(),
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown processor"


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def as_json(where: Machine, results: Mapping[str, Sequence[Table]]) -> str:
    """Everything as one JSON object: {machine, subjects: {name: [tables]}}."""
    subjects: dict[str, Any] = {name: [asdict(table) for table in tables] for name, tables in results.items()}
    return json.dumps({"machine": asdict(where), "subjects": subjects}, indent=2, ensure_ascii=False) + "\n"

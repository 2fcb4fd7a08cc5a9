"""Small pieces of text that reports and errors are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lora_fx import tables


def reason(error: BaseException, limit: int = 400) -> str:
    """The gist of the error that another library's error comes from, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = plain_lines(str(error)) or [""]
    details = [line.lstrip("- ") for line in lines[1:] if line.startswith("- ")]  # torch.export lists causes so
    return f"{type(error).__name__}: {' '.join([lines[0].rstrip('.'), *details])[:limit]}"


def plain_lines(text: str) -> list[str]:
    """The lines of `text` that are not blank, without terminal colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [line.strip() for line in plain.splitlines() if line.strip()]


class Table(tables.Table):
    """Columns as wide as their widest cell, two spaces between them; nothing below the header."""

    def __str__(self) -> str:
        head, _, *rows = super().__str__().split("\n")
        return "\n".join([head, *rows])


class Shown(tables.Shown):
    """What prints as lines and tables, and is shown as such by notebooks."""

    between = "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of anything that can be printed."""
    return Table(tuple(header), tuple(tuple(str(cell) for cell in row) for row in rows))


def some(names: Iterable[str], limit: int = 5) -> str:
    """`'a', 'b' and 3 more`."""
    all_names = list(names)
    shown = ", ".join(repr(name) for name in all_names[:limit])
    return shown if len(all_names) <= limit else f"{shown} and {len(all_names) - limit} more"

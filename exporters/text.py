"""Small pieces of text that reports and errors are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


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


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two spaces between them."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def some(names: Iterable[str], limit: int = 5) -> str:
    """`'a', 'b' and 3 more`."""
    all_names = list(names)
    shown = ", ".join(repr(name) for name in all_names[:limit])
    return shown if len(all_names) <= limit else f"{shown} and {len(all_names) - limit} more"

"""Plain text tables, columns as wide as their widest cell, and the same as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; prints as `format_table`, and as an HTML table in a page."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return format_table(self.header, self.rows)

    @property
    def html(self) -> str:
        """As an HTML table, everything in it escaped."""
        head = "".join(f'<th scope="col" style="text-align:left">{escape(cell)}</th>' for cell in self.header)
        body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_cell(cell: str) -> str:
    return f'<td style="text-align:left">{escape(cell)}</td>'


class Shown:
    """What prints as paragraphs and tables, and is shown as such by notebooks."""

    between = "\n\n"

    def blocks(self) -> Sequence[str | Table]:
        """Paragraphs and tables, in order."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.between.join(map(str, self.blocks()))

    def _repr_html_(self) -> str:
        return "".join(
            block.html if isinstance(block, Table) else f'<p style="white-space:pre-line">{escape(block)}</p>'
            for block in self.blocks()
        )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`header` and `rows` as aligned columns, with a rule below the header."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def counted(count: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def some_of(words: Iterable[str], limit: int = 8) -> str:
    """The first of some words, and how many more there are."""
    listed = list(words)
    more = f", … ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more

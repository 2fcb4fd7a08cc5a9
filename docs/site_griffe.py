"""What the reference makes of docstrings: names that share a line, as in "first, second: their names", get one each."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(?:Args|Attributes|Raises):\n(?: {4}.*\n?|\n)+", re.MULTILINE)
_SHARED = re.compile(r"^ {4}(\w+(?:, \w+)+)(:.*\n?(?:(?: {5}.*)\n?|\n(?= {5}))*)", re.MULTILINE)


class OneNameALine(griffe.Extension):
    """Gives each name its own entry, with its own type and default."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(lambda found: _SHARED.sub(_apart, found[0]), obj.docstring.value)


def _apart(found: re.Match[str]) -> str:
    text = found[2] if found[2].endswith("\n") else f"{found[2]}\n"
    return "".join(f"    {name}{text}" for name in found[1].split(", "))

"""The blocks of docs/: a page is one program, and what its blocks print stands below them.

`python tests/docs_blocks.py docs/PAGE.md ...` runs pages and writes what they print now into them.

Fences of `python` and `bash` run, in order, in one directory; one of `text` right below is what they print, where `...`
stands for anything. Processors differ in the last digits: numbers with a point are right within a hundredth or a unit
of their last digit, rounding errors if they are small. `<!-- not run: why -->` above a fence is the only way out.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
_FENCE = re.compile(r"^( *)```([a-z]*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_ROUNDING = 1e-5
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n+\Z")
_NUMBER = r"-?\d+\.\d+(?:e[-+]\d+)?"


@dataclass(frozen=True)
class Block:
    """A fence that runs. `shown` is the fence below it that has what it prints, by its place in the page."""

    language: str
    code: str
    line: int
    is_run: bool
    shown: tuple[int, int] | None

    def shows(self, page_text: str) -> str | None:
        """What the page says that the block prints."""
        return None if self.shown is None else page_text[slice(*self.shown)]


def blocks_of(page: Path) -> list[Block]:
    """All fences of python and bash of a page."""
    text = page.read_text("utf-8")
    fences = list(_FENCE.finditer(text))
    found = []
    for fence, below in itertools.zip_longest(fences, fences[1:]):
        if fence[2] in ("python", "bash"):
            is_shown = below is not None and below[2] == "text" and not text[fence.end() : below.start()].strip()
            found.append(
                Block(
                    language=fence[2],
                    code=fence[3],
                    line=text.count("\n", 0, fence.start()) + 2,
                    is_run=not _NOT_RUN.search(text[: fence.start()]),
                    shown=below.span(3) if below is not None and is_shown else None,
                )
            )
    return found


def run(page: Path, directory: Path) -> Iterator[tuple[Block, str]]:
    """Each block that runs, and what it printed; the working directory has to be `directory`."""
    names: dict[str, Any] = {"__name__": page.stem.replace("-", "_")}
    for block in blocks_of(page):
        if block.is_run:
            yield block, _run_python(block, page, names) if block.language == "python" else _run_bash(block, directory)


def is_right(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed; spaces at ends of lines do not count."""
    parts = re.split(rf"(\.\.\.|{_NUMBER})", _trim(shown))
    numbers = [part for part in parts[1::2] if part != "..."]
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [".*?" if part == "..." else f"({_NUMBER})" for part in parts[1::2]]
    found = re.fullmatch("".join(parts), _trim(printed), re.DOTALL)
    return found is not None and all(map(_is_near, numbers, found.groups()))


def _is_near(shown: str, printed: str) -> bool:
    last_digit = 10.0 ** int(Decimal(shown).as_tuple().exponent)
    return math.isclose(float(printed), float(shown), rel_tol=0.01, abs_tol=max(_ROUNDING, last_digit))


def _run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    code = "\n" * (block.line - 1) + block.code  # so that tracebacks name the page's lines
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, str(page), "exec"), names)
    return printed.getvalue()


def _run_bash(block: Block, directory: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "COLUMNS": "110", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _trim(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def _write(page: Path) -> None:
    import tempfile

    text = page.read_text("utf-8")
    with tempfile.TemporaryDirectory(prefix="lora_fx.") as directory, contextlib.chdir(directory):
        done = list(run(page, Path(directory)))
    for block, printed in reversed(done):
        if block.shown is not None and not is_right(text[slice(*block.shown)], printed):
            start, end = block.shown
            text = text[:start] + _trim(printed) + text[end:]
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        _write(Path(name).resolve())

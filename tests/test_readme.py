"""The Python blocks of the README and of docs/ run as they stand, and the README's commands name what is there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
PAGES = [README, *sorted(README.with_name("docs").glob("*.md"))]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


BLOCKS = blocks_of(README)


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(page, block, id=f"{page.stem}-{i}") for page in PAGES for i, block in enumerate(blocks_of(page))],
)
def test_blocks_run(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, str(page), "exec"), names)
    assert "gm" in names


def test_the_first_block_is_ten_lines_of_use_and_early() -> None:
    text = README.read_text("utf-8")
    assert text[: text.index("```python")].count("\n") < 28
    used = [line for line in BLOCKS[0].splitlines() if line and not line.startswith("import")]
    assert len(used) <= 10


def test_the_commands_of_ci_are_in_the_readme() -> None:
    text = README.read_text("utf-8")
    assert "<!-- test-command -->" in text
    assert "<!-- demo-command -->" in text

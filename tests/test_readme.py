"""The Python blocks of the README run as they stand, each for itself. (Those of docs/ are in test_docs.py.)"""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", [pytest.param(block, id=str(i)) for i, block in enumerate(BLOCKS)])
def test_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
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

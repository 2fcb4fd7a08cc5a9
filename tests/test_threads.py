"""One graph and one session in eight threads; benchmarks/reliability.py does it a hundred thousand times."""

from __future__ import annotations

from pathlib import Path

import hammer


def test_a_graph_answers_with_the_old_adapters_or_the_new() -> None:
    found = hammer.graph(3000)
    assert found["right"] >= 3000, found
    assert set(found) == {"right", "changes"}, found


def test_a_session_answers_with_the_adapter_that_was_asked_for(tmp_path: Path) -> None:
    found = hammer.session(3000, tmp_path)
    assert found["right"] >= 3000, found
    assert set(found) == {"right", "changes"}, found

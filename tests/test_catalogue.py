"""Every bad input that we could think of is refused with words, or right; nothing is damaged, nothing hangs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from catalogue.all_cases import CASES
from catalogue.harness import Case, World, make_world, run_case

# What tells the reader what to do.
_FIX = re.compile(
    r"\b(add|ask|call|change|choose|combine|convert|did you mean|do that|drop|export|fold|freeze|give|inject|install|"
    r"keep|lay|leave|let|list|load|look|make|mend|move|must|name|need|pass|put|raise|read|remove|rename|replace|resize|report|run|"
    r"save|say|see|set|show|support|swap|take|trace|train|unflatten|unfold|use|write|written)(s|ed)?\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_or_right(case: Case, world: World, tmp_path: Path) -> None:
    outcome = run_case(case, world, tmp_path / "case")
    assert outcome.kind == ("refused" if case.words else "right"), f"{outcome.kind}: {outcome.message}"
    for word in case.words:
        assert word in outcome.message
    if case.words:
        assert _FIX.search(outcome.message), outcome.message


def test_the_catalogue_is_large_and_has_no_doubles() -> None:
    assert len(CASES) >= 300
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []
    assert sum(bool(case.words) for case in CASES) >= 0.95 * len(CASES) - sum(not case.words for case in CASES)

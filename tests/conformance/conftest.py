"""Rows that lora_fx does not pass yet, named in not_yet.txt; one that passes has to leave the list."""

from __future__ import annotations

from pathlib import Path

import pytest

NOT_YET = frozenset(Path(__file__).with_name("not_yet.txt").read_text("utf-8").splitlines())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in NOT_YET:
            item.add_marker(pytest.mark.xfail(strict=True, reason="not supported yet, see not_yet.txt"))

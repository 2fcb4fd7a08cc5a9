"""How long things take beside one another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

_WARM_UP = 3


def medians(runs: Sequence[Callable[[], Any]], rounds: int = 40) -> list[float]:
    """Median seconds of each, taken in turns, so that what slows the machine slows all.

    The order is always the same circle: a run that followed itself would find its weights in the cache.
    """
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + _WARM_UP):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run()
            if turn >= _WARM_UP:
                times[index].append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]

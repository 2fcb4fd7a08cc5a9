"""Interleaved timing: every variant once per round, in a new order each round, ratios of medians.

CPU time of the process (`time.process_time`), not wall time: the machine is shared. One thread.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One thing to time.

    Attributes:
        run: what is timed; it gets what `prepare` returned.
        prepare: makes the input, untimed, before each run.
        restore: undoes the run, untimed; it gets what `run` returned.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    restore: Callable[[Any], Any] = lambda result: None


@dataclass
class Times:
    """Seconds of each round, by variant."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of one variant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Median of `name` over median of `to`."""
        return self.median(name) / self.median(to)

    def spread(self, name: str) -> float:
        """Interquartile range over median: how noisy the machine was."""
        values = self.seconds[name]
        if len(values) < 4:
            return (max(values) - min(values)) / self.median(name)
        low, _, high = statistics.quantiles(values, n=4)
        return (high - low) / self.median(name)


def interleave(variants: Mapping[str, Variant], rounds: int, warmup: int = 1, *, collect: bool = True) -> Times:
    """Time all variants `rounds` times, side by side.

    The garbage collector stays on, since users have it on; a full collection before each run gives all
    variants the same start. What is alive when this function is called is frozen (`gc.freeze`): a traced
    graph that lora_fx alone needs must not slow the collections inside PEFT's runs. collect=False is for short
    runs that make no objects: one collection per call of this function.
    """
    times = Times({name: [] for name in variants})
    shuffle = random.Random(0)
    names = list(variants)
    gc.collect()
    gc.freeze()
    try:
        for index in range(-warmup, rounds):
            shuffle.shuffle(names)
            for name in names:
                seconds = _timed(variants[name], collect)
                if index >= 0:
                    times.seconds[name].append(seconds)
    finally:
        gc.unfreeze()
    return times


def _timed(variant: Variant, collect: bool) -> float:
    given = variant.prepare()
    if collect:
        gc.collect()
    started = time.process_time()
    result = variant.run(given)
    seconds = time.process_time() - started
    variant.restore(result)
    return seconds


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The k of value ≈ c · sizeᵏ, fitted by least squares on logarithms: 1 is linear."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope

"""A training step over the rank, the tokens and the layers: what it keeps and how long it takes, against PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lora_fx

from . import workloads
from .report import Table
from .timing import Variant, interleave
from .training import check, count_step, floor_step, lora_step
from .workloads import Workload

# What is varied, and the point from which it is.
AXES = {"r": (2, 8, 32, 128), "tokens": (32, 128, 512), "layers": (1, 2, 4, 8)}
START = {"r": 8, "tokens": 128, "layers": 2}
QUICK_AXES = {"r": (2, 8), "tokens": (16, 32), "layers": (1, 2)}
QUICK_START = {"r": 8, "tokens": 16, "layers": 1}


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """One table for each axis."""
    axes, start, hidden = (QUICK_AXES, QUICK_START, 64) if quick else (AXES, START, 512)
    return tuple(_along(axis, values, start, hidden, rounds or (3 if quick else 9)) for axis, values in axes.items())


def _along(axis: str, values: tuple[int, ...], start: dict[str, int], hidden: int, rounds: int) -> Table:
    rows = [
        (value, name, *numbers)
        for value in values
        for name, numbers in _point(_workload(start | {axis: value}, hidden), rounds).items()
    ]
    others = ", ".join(f"{name} {value}" for name, value in start.items() if name != axis)
    return Table(
        f"one training step over {axis}: Llama, width {hidden}, {others}, float32 ({rounds} rounds)",
        (axis, "model", "kept / PEFT", "kernels / PEFT", "moved / PEFT", "time / PEFT"),
        tuple(rows),
        ("checked first: loss and gradients equal PEFT's; all but the time is counted",),
    )


def _workload(at: dict[str, int], hidden: int) -> Workload:
    return replace(workloads.llama(at["layers"], hidden, at["tokens"]), r=at["r"])


def _point(workload: Workload, rounds: int) -> dict[str, tuple[float, ...]]:
    peft_model, _, injected = workloads.adapted_alike(workload)
    check(peft_model, injected, workload)
    base: Any = workload.make()
    models = {"PEFT": peft_model, "inject": injected, "optimize": lora_fx.optimize(injected), "floor": base}
    steps = {
        name: (floor_step if name == "floor" else lora_step)(model.train(), workload) for name, model in models.items()
    }
    counts = {name: count_step(models[name], step) for name, step in steps.items()}
    times = interleave(
        {name: Variant(lambda _, step=step: step().backward()) for name, step in steps.items()},  # type: ignore[misc]
        rounds,
    )
    first = counts["PEFT"]
    return {
        name: (
            c.saved / first.saved,
            c.kernels / first.kernels,
            c.moved / first.moved,
            times.ratio(name, "PEFT"),
        )
        for name, c in counts.items()
    }

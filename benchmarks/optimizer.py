"""An optimizer's step over the parameters of an adapter: one by one, fused, and as one vector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import lora_fx

from . import workloads
from .checks import adapters_of, assert_effect, assert_same
from .counters import OpCounter
from .report import Table
from .timing import Variant, interleave
from .training import lora_step
from .workloads import Workload

# Each optimizer has a model of its own, with the same values.
_WAYS: dict[str, tuple[Callable[[Any], Iterable[nn.Parameter]], bool | None]] = {
    "PEFT, AdamW": (lambda model: (p for p in model.parameters() if p.requires_grad), None),
    "PEFT, AdamW(fused=True)": (lambda model: (p for p in model.parameters() if p.requires_grad), True),
    "lora_parameters, AdamW(fused=True)": (lora_fx.lora_parameters, True),
    "flat_parameters, AdamW(fused=True)": (lora_fx.flat_parameters, True),
}


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The table of this subject."""
    return (step_table(workloads.llama(12, 128 if quick else 768, 16), rounds or (9 if quick else 25)),)


def step_table(workload: Workload, rounds: int) -> Table:
    """AdamW over the same adapter in four ways."""
    peft_model, _, injected = workloads.adapted_alike(workload)
    before = {name: p.detach().clone() for name, p in adapters_of(injected).items()}
    models = {name: copy.deepcopy(peft_model if "PEFT" in name else injected).train() for name in _WAYS}
    optimizers = {
        name: torch.optim.AdamW(parameters(models[name]), lr=1e-3, fused=fused)
        for name, (parameters, fused) in _WAYS.items()
    }

    def with_gradients(name: str) -> torch.optim.Optimizer:
        optimizers[name].zero_grad()
        lora_step(models[name], workload)().backward()  # type: ignore[no-untyped-call]
        return optimizers[name]

    for name in _WAYS:
        with_gradients(name).step()
    trained = [adapters_of(model) for model in models.values()]
    errors = []
    for name, value in before.items():
        separate, flat = trained[-2][name], trained[-1][name]
        assert_effect(f"the step of {name}", separate, value, eps=64.0)
        errors.append(assert_same(f"{name} after a step", flat, separate))
    kernels = {}
    for name in _WAYS:  # the second step, since the first makes the states
        optimizer = with_gradients(name)
        with OpCounter() as counter:
            optimizer.step()
        kernels[name] = sum(count for op, count in counter.ops.items() if op.startswith("aten."))
    times = interleave(
        {
            name: Variant(lambda optimizer: optimizer.step(), lambda name=name: with_gradients(name))  # type: ignore[misc]
            for name in _WAYS
        },
        rounds,
    )
    first = next(iter(_WAYS))
    rows = [
        (name, kernels[name], 1e3 * times.median(name), times.ratio(name, first), f"{times.spread(name):.0%}")
        for name in _WAYS
    ]
    size = sum(value.numel() for value in before.values())
    return Table(
        f"one step of AdamW: {workload.name}, {len(before)} tensors, {size / 1e6:.1f}M numbers ({rounds} rounds)",
        ("way", "kernels", "ms", "/ PEFT, AdamW", "spread"),
        tuple(rows),
        (f"checked first: one step leaves the values of separate parameters within {max(errors):.1e}",),
    )

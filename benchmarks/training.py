"""One training step: FLOPs, kernels, kept and moved bytes, time, against PEFT and against the floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import workloads
from .checks import assert_same, first_tensor
from .counters import OpCounter, saved_bytes
from .report import Table
from .timing import Variant, interleave
from .workloads import Workload


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    workload = workloads.llama(2, 128, 64) if quick else workloads.llama(4, 512, 256)
    rounds = rounds or (3 if quick else 7)
    rows = [row for dropout in (0.0, 0.05) for row in _rows(workload, dropout, rounds)]
    return (
        Table(
            f"one training step, forward and backward ({rounds} rounds; {workload.name}, r = 16)",
            ("variant", "lora_dropout", "FLOPs / PEFT", "kernels / PEFT", "kept bytes / PEFT", "moved bytes / PEFT",
             "time / PEFT"),
            tuple(rows),
            (
                "checked first: without dropout, loss and every gradient of A and B equal PEFT's",
                "floor: the base frozen, gradients carried through from the embeddings; no LoRA at all",
                "this is the literal LoRA subgraph; no rewrite for speed is in this version",
            ),
        ),
    )  # fmt: skip


def _rows(workload: Workload, dropout: float, rounds: int) -> list[tuple[Any, ...]]:
    peft_model, _, injected = workloads.adapted_alike(workload, lora_dropout=dropout)
    floor = workload.make().requires_grad_(False)
    floor.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]  # so that gradients go all the way
    variants: dict[str, nn.Module] = {"PEFT": peft_model.train(), "lora_fx": injected.train(), "floor": floor.train()}
    if not dropout:
        _check(workload, peft_model, injected)
    counts = {name: _counts(workload, model) for name, model in variants.items()}
    steps = {name: Variant(lambda _, model=model: _step(workload, model)) for name, model in variants.items()}
    times = interleave(steps, rounds)
    base = counts["PEFT"]
    return [
        (name, dropout, *(a / b for a, b in zip(counts[name], base, strict=True)), times.ratio(name, "PEFT"))
        for name in variants
    ]


def _step(workload: Workload, model: nn.Module) -> None:
    model.zero_grad()
    _loss(workload, model).backward()


def _loss(workload: Workload, model: nn.Module) -> torch.Tensor:
    args, kwargs = workload.inputs
    return first_tensor(model(*args, **kwargs)).float().square().mean()


def _counts(workload: Workload, model: nn.Module) -> tuple[int, int, int, int]:
    with saved_bytes(model) as kept:
        loss = _loss(workload, model)
    del loss
    with OpCounter() as counter:
        _step(workload, model)
    return counter.flops, counter.kernels, kept.total, counter.moved_bytes


def _check(workload: Workload, peft_model: nn.Module, injected: nn.Module) -> None:
    for model in (peft_model, injected):
        _step(workload, model)
    theirs = {_plain(n): p.grad for n, p in peft_model.named_parameters() if p.grad is not None}
    for name, parameter in injected.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            other = theirs[_plain(name)]
            assert other is not None
            assert_same(f"the gradient of {name}", parameter.grad, other)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")

"""Fold: time, peak memory and exactness against PEFT's merge_and_unload, with and without safe_merge."""

from __future__ import annotations

from typing import Any

import torch

import lora_fx

from . import workloads
from .checks import require
from .counters import memory_of
from .report import Table
from .timing import Variant, interleave
from .workloads import Workload


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    layers, hidden = (2, 256) if quick else (12, 768)
    rounds = rounds or (3 if quick else 7)
    cases = [workloads.llama(layers, hidden, 8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    return (Table(
        f"fold against merge_and_unload ({rounds} rounds; {cases[0].name}, {cases[0].sites} sites, r = 16)",
        ("dtype", "fold / merge", "in place / merge", "safe_merge / merge", "fold MiB", "in place MiB", "merge MiB",
         "adapted weights MiB", "fold ulp", "merge ulp"),
        tuple(_row(case, rounds) for case in cases),
        (
            "checked first: every folded weight against float64 W + scaling · B @ A; ulp is the largest error in units "
            "of the last place of the stored dtype",
            "MiB: peak of torch's CPU allocator beyond the start, exact. fold makes new weights and leaves the old "
            "ones alone; in place keeps the old values, so that unfold is exact; merge keeps nothing",
        ),
    ),)  # fmt: skip


def _row(workload: Workload, rounds: int) -> tuple[Any, ...]:
    peft_model, _, injected = workloads.adapted_alike(workload)
    folded = lora_fx.fold(injected)
    ulp = _ulp(injected, dict(folded.named_parameters()))
    merged = workloads.unmerged_copy(peft_model).merge_and_unload()  # type: ignore[operator]
    their_ulp = _ulp(injected, dict(merged.named_parameters()))
    require(ulp <= 8, f"a folded weight is {ulp:.1f} units of the last place from float64 W + ΔW")

    def copied() -> Any:
        return workloads.unmerged_copy(peft_model)

    times = interleave(
        {
            "fold": Variant(lambda _: lora_fx.fold(injected)),
            "in place": Variant(lambda _: lora_fx.fold(injected, inplace=True), restore=lora_fx.unfold),
            "merge": Variant(lambda model: model.merge_and_unload(), prepare=copied),
            "safe": Variant(lambda model: model.merge_and_unload(safe_merge=True), prepare=copied),
        },
        rounds,
    )
    weights = sum(injected.get_parameter(t.site.weight).nbytes for t in _targets(injected))
    ours = memory_of(lambda: lora_fx.fold(injected)).peak
    inplace = memory_of(lambda: lora_fx.fold(injected, inplace=True)).peak
    lora_fx.unfold(injected)
    model = copied()
    theirs = memory_of(lambda: model.merge_and_unload()).peak
    ratios = (times.ratio("fold", "merge"), times.ratio("in place", "merge"), times.ratio("safe", "merge"))
    sizes = [size / 2**20 for size in (ours, inplace, theirs, weights)]
    dtype = str(next(iter(folded.parameters())).dtype).removeprefix("torch.")
    return (dtype, *ratios, *sizes, ulp, their_ulp)


def _targets(injected: Any) -> Any:
    return injected.meta["lora_fx"].adapters["default"].plan.targets


def _ulp(injected: Any, weights: dict[str, torch.Tensor]) -> float:
    """The largest distance of any folded weight from float64 W + ΔW, in units of the last place."""
    worst = 0.0
    for target in _targets(injected):
        path = target.site.path
        a, b = (injected.get_parameter(f"{path}.lora_{half}.default.weight").double() for half in "AB")
        exact = injected.get_parameter(target.site.weight).double() + target.scaling * (b @ a)
        got = weights[target.site.weight]
        ulp = torch.finfo(got.dtype).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
        # Below a thousandth of the largest weight, cancellation and not rounding decides.
        counted = exact.abs() > 1e-3 * exact.abs().max()
        worst = max(worst, float(((got.double() - exact).abs() / ulp)[counted].max()))
    return worst

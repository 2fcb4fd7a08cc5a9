"""Fold: time, exact peak memory and rounding error, against PEFT's merge_and_unload and one addmm per weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lora_fx

from . import workloads
from .checks import assert_effect, assert_same, first_tensor, require
from .counters import memory_of
from .report import Table
from .timing import Times, Variant, interleave
from .workloads import Workload

MIB = 1 << 20


@dataclass(frozen=True)
class Subject:
    """One model, adapted alike by both, and the exact result.

    Attributes:
        peft_model, gm, injected: the same base weights, A and B ≠ 0.
        exact: {weight: W + scaling · B @ A in float64}.
        terms: {weight: |W| + scaling · |B| @ |A|}: what the rounding errors of any sum of these are relative to.
    """

    workload: Workload
    peft_model: Any
    gm: Any
    injected: Any
    exact: dict[str, torch.Tensor]
    terms: dict[str, torch.Tensor]


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    layers, hidden = (2, 256) if quick else (12, 768)
    rounds = rounds or (5 if quick else 7)
    cases = [
        workloads.llama(layers, hidden, 16),
        workloads.llama(layers, hidden, 16, dtype=torch.bfloat16),
        workloads.linear_stack(50 if quick else 500),
    ]
    return tuple(_table(workload, rounds) for workload in cases)


def make_subject(workload: Workload) -> Subject:
    """Both models with the same adapter, and the exact folded weights."""
    peft_model, gm, injected = workloads.adapted_alike(workload)
    weights = list(_float64_weights(injected, workload))
    exact = {name: w + b @ a for name, w, b, a in weights}
    terms = {name: w.abs() + b.abs() @ a.abs() for name, w, b, a in weights}
    return Subject(workload, peft_model, gm, injected, exact, terms)


def _float64_weights(
    injected: Any, workload: Workload
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(name, W, scaling · B, A) of each adapted weight."""
    parameters = dict(injected.named_parameters())
    for name, a in parameters.items():
        if not name.endswith(".lora_A.default.weight"):
            continue
        path = name.removesuffix(".lora_A.default.weight")
        b, weight = parameters[f"{path}.lora_B.default.weight"], parameters[f"{path}.weight"]
        scaled = workload.alpha / workload.r * b.detach().double()
        yield f"{path}.weight", weight.detach().double(), scaled, a.detach().double()


def check(subject: Subject) -> str:
    """The graph is the traced one, and all four ways of merging compute the same; raises CheckFailed otherwise."""
    args, kwargs = subject.workload.inputs
    folded = lora_fx.fold(subject.injected)
    require(folded.code == subject.gm.code, "the folded graph's code is not the traced graph's")
    with torch.no_grad():
        base = first_tensor(subject.gm(*args, **kwargs))
        merged = first_tensor(_merged(subject)(*args, **kwargs))
        ours = first_tensor(folded(*args, **kwargs))
        lora_fx.fold(subject.injected, inplace=True)
        inplace = first_tensor(subject.injected(*args, **kwargs))
        lora_fx.unfold(subject.injected)
        unfolded = first_tensor(subject.injected(*args, **kwargs))
    assert_effect("the adapter", unfolded, base, eps=2560)
    # A 16-bit model rounds each activation, so outputs may be some eps apart; the weights are compared below.
    assert_same("folded against PEFT's merged model", ours, merged)
    require(torch.equal(ours, inplace), "folded in place differs from folded out of place")
    assert_same("folded against unfolded", ours, unfolded)
    _check_weights(folded, subject)
    return (
        "the code is the traced graph's; outputs equal PEFT merged, unfolded, and folded in place; "
        "each weight is within the error bound of a float32 sum, rounded once"
    )


def _check_weights(folded: Any, subject: Subject) -> None:
    """Each weight lies within the error bound of a float32 sum of r + 1 terms and one rounding to its dtype."""
    parameters = dict(folded.named_parameters())
    for name, exact in subject.exact.items():
        weight = parameters[name].detach()
        unit = torch.finfo(torch.float32).eps / 2
        bound = (subject.workload.r + 2) * unit * subject.terms[name] + torch.finfo(weight.dtype).eps / 2 * exact.abs()
        share = float(((weight.double() - exact).abs() / bound).max())
        require(share <= 1.001, f"{name} is {share:.3g} error bounds of a float32 sum from W + ΔW in float64")


@dataclass(frozen=True)
class Rounding:
    """Distance of folded weights from W + ΔW in float64.

    Attributes:
        max_abs: the largest.
        worst_ulp: the largest, in units of the last place of the exact value, or of the weights' root mean
            square where the value is smaller; rounding once gives 0.5.
        rms: root mean square, over that of the exact value rounded once: 1 is the best a dtype allows.
    """

    max_abs: float
    worst_ulp: float
    rms: float


def rounding(model: nn.Module, exact: dict[str, torch.Tensor]) -> Rounding:
    """How exactly the weights of `model` hold the folded values."""
    parameters = dict(model.named_parameters())
    max_abs = worst = squares = best_squares = 0.0
    for name, value in exact.items():
        weight = parameters[name].detach()
        error = (weight.double() - value).abs()
        best = (value.to(weight.dtype).double() - value).abs()
        size = value.abs().clamp_min(float(value.square().mean().sqrt()))
        ulp = torch.finfo(weight.dtype).eps * torch.exp2(torch.floor(torch.log2(size)))
        max_abs, worst = max(max_abs, float(error.max())), max(worst, float((error / ulp).max()))
        squares += float(error.square().sum())
        best_squares += float(best.square().sum())
    return Rounding(max_abs, worst, math.sqrt(squares / best_squares) if best_squares else 1.0)


def _merged(subject: Subject, **options: Any) -> Any:
    return _merge(workloads.unmerged_copy(subject.peft_model), **options)


def _merge(model: Any, **options: Any) -> Any:
    return model.merge_and_unload(**options)


def _ways(subject: Subject) -> dict[str, Variant]:
    """All ways to merge. Copies that PEFT may consume, and unfolding, are not measured."""

    def fresh() -> Any:
        return workloads.unmerged_copy(subject.peft_model)

    narrow = {
        "lora_fx.fold inplace, irreversible, accumulate=float32": Variant(
            lambda gm: lora_fx.fold(gm, inplace=True, reversible=False, accumulate=torch.float32),
            prepare=lambda: copy.deepcopy(subject.injected),
        )
    }
    return {
        "PEFT merge_and_unload": Variant(_merge, prepare=fresh),
        "PEFT safe_merge": Variant(lambda model: _merge(model, safe_merge=True), prepare=fresh),
        "PEFT deepcopy, merge_and_unload": Variant(lambda model: _merge(copy.deepcopy(model)), prepare=fresh),
        "lora_fx.fold": Variant(lambda _: lora_fx.fold(subject.injected)),
        "lora_fx.fold inplace": Variant(lambda _: lora_fx.fold(subject.injected, inplace=True), restore=lora_fx.unfold),
        "lora_fx.fold inplace, irreversible": Variant(
            lambda gm: lora_fx.fold(gm, inplace=True, reversible=False),
            prepare=lambda: copy.deepcopy(subject.injected),
        ),
        **(narrow if next(subject.injected.parameters()).dtype.itemsize == 2 else {}),
    }


def fold_times(subject: Subject, rounds: int, names: Sequence[str] = ()) -> Times:
    """All ways, or those that are named, and the floor, interleaved."""
    floor = Variant(_addmm_only, prepare=lambda: _weights(subject))
    ways = {name: way for name, way in _ways(subject).items() if not names or name in names}
    return interleave({**ways, "floor: addmm only": floor}, rounds)


def _weights(subject: Subject) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    parameters = dict(subject.injected.named_parameters())
    scaling = subject.workload.alpha / subject.workload.r
    found = []
    for name in subject.exact:
        path = name.removesuffix(".weight")
        a, b = parameters[f"{path}.lora_A.default.weight"], parameters[f"{path}.lora_B.default.weight"]
        found.append((parameters[name].detach().clone(), a.detach(), b.detach(), scaling))
    return found


def _addmm_only(weights: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]) -> None:
    """W += s · B @ A, accumulated in float32, nothing checked, no graph: one pass over the weights."""
    for weight, a, b, scaling in weights:
        if weight.dtype == torch.float32:
            weight.addmm_(b, a, alpha=scaling)
        else:
            weight.copy_(weight.float().addmm_(b.float(), a.float(), alpha=scaling))


def _table(workload: Workload, rounds: int) -> Table:
    subject = make_subject(workload)
    said = check(subject)
    measured = {name: _memory_and_rounding(variant, subject) for name, variant in _ways(subject).items()}
    times = fold_times(subject, rounds)
    rows = []
    for name in times.seconds:
        row: tuple[Any, ...] = (name, 1e3 * times.median(name), times.ratio(name, "PEFT merge_and_unload"))
        rows.append((*row, *measured.get(name, (None,) * 5)))
    size = sum(value.numel() for value in subject.exact.values())
    dtype = str(next(iter(subject.injected.parameters())).dtype).removeprefix("torch.")
    largest = max(value.numel() for value in subject.exact.values()) * _bytes(dtype) / MIB
    adapted = size * _bytes(dtype) / MIB
    return Table(
        f"fold: {workload.name}, {dtype}, {workload.sites} sites, {size / 1e6:.1f}M adapted weights ({rounds} rounds)",
        (
            "way",
            "ms",
            "/ merge_and_unload",
            "peak extra MiB",
            "kept after MiB",
            "max error",
            "worst ulp",
            "rms / best",
        ),
        tuple(rows),
        (
            f"checked first: {said}",
            f"adapted weights take {adapted:.1f} MiB, the largest {largest:.2f} MiB; peak and kept are the "
            "allocator's own events, beyond what was allocated before the call",
            "errors against W + scaling · B @ A in float64; rms / best: 1 is rounding once",
            _summed(dtype),
            f"noise: interquartile range {times.spread('PEFT merge_and_unload'):.0%} of PEFT's median, "
            f"{times.spread('lora_fx.fold'):.0%} of fold's",
        ),
    )


def _summed(dtype: str) -> str:
    if _bytes(dtype) == 2:
        return (
            "fold sums 16 bits in float64, within 0.51 ulp also where W and B @ A cancel; accumulate=float32 does not"
        )
    return "fold(accumulate=torch.float64) gives 0.5 ulp; where B @ A cancels, any float32 sum is some ulp off"


def _bytes(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[dtype]


def _memory_and_rounding(variant: Variant, subject: Subject) -> tuple[float, float, float, float, float]:
    results: list[Any] = []
    memory = memory_of(lambda given: results.append(variant.run(given)), variant.prepare)
    found = rounding(results[0], subject.exact)
    variant.restore(results.pop())
    return memory.peak / MIB, memory.kept / MIB, found.max_abs, found.worst_ulp, found.rms

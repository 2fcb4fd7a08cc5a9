"""W + ΔW of one task: what is added, the sum itself, what it did to the weight, and why it cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .aliasing import storage_of
from .applications import read_applications
from .attributes import get_attribute, get_parameter, holds_values, why_no_values
from .errors import FoldError
from .fold_bases import base_weight
from .fold_results import FoldedSite
from .fold_tasks import FoldTask, fold_tasks
from .fold_terms import BiasTerm
from .graph_module import LoraGraphModule
from .injection import Adapter
from .merging import AnyDelta, Merged, factor_dtype, merge, norm_if_finite, sum_dtype


def measure_fold(gm: LoraGraphModule, adapter: Adapter) -> dict[str, FoldedSite | str]:
    """{site path: what folding one adapter alone, at weight 1, would do to its weight, or why that cannot be done}.

    Nothing is written but one temporary at a time. A base in a few bits is measured as the floats that it stands for.

    Raises:
        FoldError: if the base has no values.
    """
    applied = dict.fromkeys(site.applied for site in adapter.sites.values())
    try:
        tasks = fold_tasks(gm, read_applications(gm), [adapter], {adapter.name: 1.0})
    except FoldError as error:
        return dict.fromkeys(applied, str(error))
    check_has_values(gm, tasks)
    found: dict[str, FoldedSite | str] = {}
    for task in (task for task in tasks if not isinstance(task.terms[0], BiasTerm)):
        weight = base_weight(gm, task.attribute)
        try:
            result: FoldedSite | str = write_sum(gm, task, weight, torch.empty_like(weight), None)
        except FoldError as error:
            result = str(error)
        found |= dict.fromkeys(task.paths, result)
    return found


def check_has_values(gm: LoraGraphModule, tasks: list[FoldTask]) -> None:
    """Raise FoldError if there is a weight without memory."""
    for task in tasks:
        weight = get_parameter(gm, task.attribute)
        if not holds_values(weight):
            raise FoldError(f"{task.tensor!r} {why_no_values(weight)} to fold; load the weights first: bind_weights")


def write_sum(
    gm: LoraGraphModule, task: FoldTask, weight: torch.Tensor, into: torch.Tensor, accumulate: torch.dtype | None
) -> FoldedSite:
    """Write the folded weight of one task to `into`, of the weight's shape and dtype, and say what that did.

    Raises:
        FoldError: if it would not be finite.
    """
    merged = _merged(task, weight, _deltas(gm, task, weight, accumulate), into, accumulate)
    if not merged.is_finite:
        raise FoldError(_why_not_finite(gm, task, weight))
    return _folded_site(task, weight, merged)


@dataclass(frozen=True)
class CheckedSum:
    """A finite sum that is not written yet, and needs no adapter any more.

    Attributes:
        task, weight, deltas, accumulate: what is summed, and how.
        weight_norm: ‖W‖, if it took no sum to know that it is finite.
    """

    task: FoldTask
    weight: torch.Tensor
    deltas: list[AnyDelta]
    accumulate: torch.dtype | None
    weight_norm: float | None

    @classmethod
    def of(cls, gm: LoraGraphModule, task: FoldTask, accumulate: torch.dtype | None) -> CheckedSum:
        """Look at one task, with one temporary of the weight's size at most.

        Raises:
            FoldError: if the sum would not be finite.
        """
        weight = get_parameter(gm, task.attribute).detach()
        deltas = _deltas(gm, task, weight, accumulate)
        norm = norm_if_finite(_matrices(task, weight), deltas)
        if norm is None and not _merged(task, weight, deltas, torch.empty_like(weight), accumulate).is_finite:
            raise FoldError(_why_not_finite(gm, task, weight))
        return cls(task, weight, deltas, accumulate, norm)

    def write(self, into: torch.Tensor) -> FoldedSite:
        """Write it to a tensor of the weight's shape and dtype, maybe the weight itself, and say what that did."""
        merged = _merged(self.task, self.weight, self.deltas, into, self.accumulate, weight_norm=self.weight_norm)
        return _folded_site(self.task, self.weight, merged)


def _deltas(
    gm: LoraGraphModule, task: FoldTask, weight: torch.Tensor, accumulate: torch.dtype | None
) -> list[AnyDelta]:
    """What is added, in no more memory than the adapter has: the sum widens it, one weight at a time."""
    dtype = factor_dtype(weight.dtype, accumulate)
    return [term.delta(gm, weight, dtype) for term in task.terms]


def _matrices(task: FoldTask, weight: torch.Tensor) -> torch.Tensor:
    return task.terms[0].matrices(weight)


def _merged(
    task: FoldTask,
    weight: torch.Tensor,
    deltas: list[AnyDelta],
    into: torch.Tensor,
    accumulate: torch.dtype | None,
    *,
    weight_norm: float | None = None,
) -> Merged:
    """`merge` on the weight's matrices; memory in another order (channels_last) takes a temporary."""
    target = _matrices(task, into)
    is_view = storage_of(target) == storage_of(into)
    # Apple's GPUs have no float64.
    dtype = sum_dtype(weight.dtype, accumulate, has_float64=weight.device.type != "mps")
    wide = [delta.to(dtype) for delta in deltas]
    is_exact = accumulate is torch.float64
    merged = merge(_matrices(task, weight), wide, target, is_exact=is_exact, weight_norm=weight_norm)
    if not is_view:
        into.copy_(target.reshape(into.shape))
    return merged


def _folded_site(task: FoldTask, weight: torch.Tensor, merged: Merged) -> FoldedSite:
    return FoldedSite(
        path=task.paths[0],
        weight=task.tensor,
        dtype=weight.dtype,
        weight_norm=merged.weight_norm,
        delta_norm=merged.delta_norm,
        kept=merged.kept,
        untied_from=task.twins,
    )


def _why_not_finite(gm: LoraGraphModule, task: FoldTask, weight: torch.Tensor) -> str:
    where = f"{task.paths[0]!r} ({task.tensor})"
    if not bool(torch.isfinite(weight).all()):
        return f"the base weight of {where} holds NaN or Inf before folding; mend the model, not the adapter"
    for name in (name for term in task.terms for name in term.parts):
        if not bool(torch.isfinite(get_attribute(gm, name)).all()):
            return f"folding {where}: {name} holds NaN or Inf, so the adapter is broken; train it again or reload it"
    wide = _matrices(task, weight).double()
    total = torch.empty_like(wide)
    merge(wide, _deltas(gm, task, weight, torch.float64), total)
    return (
        f"folding {where}: |W + ΔW| reaches {float(total.abs().max()):.4g}, beyond {weight.dtype}'s largest number "
        f"{torch.finfo(weight.dtype).max:.4g}; fold a float32 copy of the model, gm.float()"
    )

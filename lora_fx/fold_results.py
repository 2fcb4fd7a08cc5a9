"""What a fold did, weight by weight, as plain values that print as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import warn
from .fold_stamps import Stamp
from .tables import Shown, Table, counted

# Below this share of the delta, folding says that much of what was trained is lost to rounding.
_KEPT_ENOUGH = 0.9


@dataclass(frozen=True)
class FoldedSite:
    """What folding did to one weight.

    Attributes:
        path, weight, dtype: which.
        weight_norm, delta_norm: Frobenius norms of the base weight and of scaling · B @ A.
        kept: 1 − ‖rounding error‖ / ‖delta‖: the share of the delta that the weight's dtype keeps. 1 for
            a delta of zero.
        untied_from: other names of the weight that keep the base's value; empty for weights not tied.
        stored_as: the class that stores the result in a few bits; empty for weights that are floats.
    """

    path: str
    weight: str
    dtype: torch.dtype
    weight_norm: float
    delta_norm: float
    kept: float
    untied_from: tuple[str, ...] = ()
    stored_as: str = ""


@dataclass(frozen=True)
class FoldReport(Shown):
    """What a fold did, site by site; prints as a table.

    Attributes:
        adapters: what was folded.
        sites: the weights that something was added to.
        trained: names of tensors that an adapter has as a whole, and that took the base's place.
        stamps: of all that was ever folded into this graph: see `fold_stamps.stamp_of`.
    """

    adapters: tuple[str, ...]
    sites: tuple[FoldedSite, ...]
    trained: tuple[str, ...] = ()
    stamps: tuple[Stamp, ...] = ()

    def blocks(self) -> tuple[str | Table, ...]:
        """What was folded, and a row for each weight."""
        return f"folded {', '.join(self.adapters)} into {counted(len(self.sites), 'weight')}", table_of(self.sites)


def table_of(sites: Sequence[FoldedSite]) -> Table:
    """What folding did, weight by weight."""
    rows = [
        (
            site.path or "(root)",
            site.stored_as or str(site.dtype).removeprefix("torch."),
            f"{site.weight_norm:.4g}",
            f"{site.delta_norm:.4g}",
            f"{site.delta_norm / site.weight_norm:.2%}" if site.weight_norm else "",
            f"{site.kept:.2%}",
            f"untied from {', '.join(site.untied_from)}" if site.untied_from else "",
        )
        for site in sites
    ]
    return Table(("site", "dtype", "‖W‖", "‖ΔW‖", "‖ΔW‖/‖W‖", "kept", "remarks"), rows)


def warn_of_losses(report: FoldReport) -> None:
    """Warn where rounding lost more than a tenth of a delta, and where a tied weight had to be untied."""
    lossy = [site for site in report.sites if site.kept < _KEPT_ENOUGH]
    if lossy:
        worst = min(lossy, key=lambda site: site.kept)
        if worst.stored_as:
            warn(
                f"{worst.stored_as} keeps only {worst.kept:.0%} of the delta of {worst.path!r} ({len(lossy)} of "
                f"{len(report.sites)} sites lose more than a tenth); fold(gm, quantized='dequantize') keeps all of it"
            )
        else:
            keeps = "torch.float32" if worst.dtype in (torch.bfloat16, torch.float16) else "torch.float64"
            warn(
                f"{worst.dtype} keeps only {worst.kept:.0%} of the delta of {worst.path!r} "
                f"({len(lossy)} of {len(report.sites)} sites lose more than a tenth to rounding); "
                f"{keeps} weights would keep it: convert the model before folding"
            )
    for site in report.sites:
        if site.untied_from:
            warn(
                f"{site.weight!r} was tied with {', '.join(site.untied_from)}, which does not get the same delta: "
                f"folding untied it, which costs one more parameter of that size ({site.path!r})"
            )

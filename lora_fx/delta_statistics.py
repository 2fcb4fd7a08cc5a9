"""What an adapter learned, in numbers: how large each delta is, and how many of its ranks carry it.

All of it comes from A and B: with B = Q R and Aᵀ = P S, the singular values of B @ A are those of the core R Sᵀ,
which is r × r. No delta is ever built, but where folding is measured, one weight at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .attributes import get_attribute
from .errors import AdapterError
from .fold_bases import base_weight
from .fold_results import FoldedSite
from .fold_sums import measure_fold
from .graph_module import LoraGraphModule, check_editable, checked_graph_module, gathered, record_of
from .injection import Adapter, AdapterSite
from .layouts import Kernel, Layout, without_start
from .parameters import find_adapter, trained_tensor
from .plan import PlannedSite
from .sharding import is_sharded
from .tables import Shown, Table, counted

# How much of ‖ΔW‖² `SiteDelta.ranks_for_most` keeps.
MOST = 0.99

# Hints: below this share of the ranks carries most, above this share of them is the effective rank.
_FEW, _ALL = 0.5, 0.9

_DORA = "DoRA"  # a remark, which `AdapterStatistics` explains

_BARS, _WIDEST = "▁▂▃▄▅▆▇█", 16


@dataclass(frozen=True, eq=False)
class Factors:
    """A delta as scaling · up @ down: up (n, out, q) and down (n, q, in), in float64, on the CPU."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float

    def decomposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(U (n, out, k), singular values (n, k), the largest first, V (n, in, k)): their product is the delta."""
        q, r = torch.linalg.qr(self.up)
        p, s = torch.linalg.qr(self.down.mT)
        u, sigma, vh = torch.linalg.svd(self.scaling * (r @ s.mT), full_matrices=False)  # (n, q, q)
        return q @ u, sigma, p @ vh.mT

    def singular_values(self) -> torch.Tensor:
        """(k,), the largest first. Of several matrices, the k-th is √Σ of the squares of all their k-th."""
        r, s = torch.linalg.qr(self.up, mode="r").R, torch.linalg.qr(self.down.mT, mode="r").R
        sigma: torch.Tensor = torch.linalg.svdvals(self.scaling * (r @ s.mT))
        return sigma.square().sum(dim=0).sqrt()


@dataclass(frozen=True)
class SiteDelta:
    """What an adapter adds to the weight of one site.

    Attributes:
        path: the site's.
        layer_index: the first number in the path, or None.
        r, scaling: of the adapter there.
        weight_norm: Frobenius norm of the base weight; of the whole weight, where the site is a part of it.
        delta_norm: of all that the adapter changes there: with DoRA more than scaling · B @ A, elsewhere just that.
        kept: the share of the delta that folding keeps in the weight's dtype; None if it cannot be folded.
        singular_values: of scaling · B @ A, the largest first. Of several matrices (experts, groups of a convolution),
            the k-th is √Σ of the squares of all their k-th, so that the sum of squares is that of the whole.
        remarks: what else to know.
    """

    path: str
    layer_index: int | None
    r: int
    scaling: float
    weight_norm: float
    delta_norm: float
    kept: float | None
    singular_values: tuple[float, ...]
    remarks: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None for a weight of zeros."""
        return self.delta_norm / self.weight_norm if self.weight_norm else None

    @property
    def ranks_for_most(self) -> int:
        """The smallest k such that the k largest singular values carry 99 % of Σ σ² = ‖scaling · B @ A‖²."""
        largest = max(self.singular_values, default=0.0) or 1.0  # divided by, so that no square is out of range
        squares = [(value / largest) ** 2 for value in self.singular_values]
        total, carried = math.fsum(squares), 0.0
        for count, square in enumerate(squares, 1):
            carried += square
            if carried >= MOST * total > 0:
                return count
        return 0

    @property
    def effective_rank(self) -> float:
        """exp(−Σ p log p), p = σ / Σ σ (Roy and Vetterli, 2007): r for r equal values, 1 for one; 0 for no delta."""
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values if value / total > 0] if total else []
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    @property
    def hint(self) -> str:
        """What the singular values suggest about the rank. Training again is what tells."""
        count = len(self.singular_values)
        if not any(self.singular_values):
            return "no effect: B @ A is zero"
        if self.ranks_for_most <= _FEW * count:
            return f"{self.ranks_for_most} of {count} carry {MOST:.0%}: a lower rank may do"
        if count > 1 and self.effective_rank >= _ALL * count:
            return "all ranks are in use: a higher one may help"
        return ""


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor that an adapter trains as it is, or rows of one.

    Attributes:
        name: the tensor's, and how many of its rows, if not all.
        base_norm, change_norm: Frobenius norms of the base's value, and of the change.
    """

    name: str
    base_norm: float
    change_norm: float


@dataclass(frozen=True)
class AdapterStatistics(Shown):
    """What one adapter adds at weight 1, site by site; prints as tables.

    Attributes:
        adapter: its name.
        sites: in the order of the plan; sites that share A and B have them each.
        trained: what it trains in full.
    """

    adapter: str
    sites: tuple[SiteDelta, ...]
    trained: tuple[TrainedTensor, ...] = ()

    def blocks(self) -> list[str | Table]:
        """A row for each site, and one for each tensor that is trained in full."""
        header = ("site", "r", "‖ΔW‖", "‖ΔW‖/‖W‖", "kept", "ranks for 99 %", "effective", "σ", "remarks")
        rows = [
            (
                site.path or "(root)",
                str(site.r),
                f"{site.delta_norm:.4g}",
                "" if site.ratio is None else f"{site.ratio:.2%}",
                "" if site.kept is None else f"{site.kept:.2%}",
                str(site.ranks_for_most),
                f"{site.effective_rank:.1f}",
                spark(site.singular_values),
                "; ".join(filter(None, (site.hint, *site.remarks))),
            )
            for site in self.sites
        ]
        blocks: list[str | Table] = [f"adapter {self.adapter}: {counted(len(rows), 'site')}", Table(header, rows)]
        if any(_DORA in site.remarks for site in self.sites):
            blocks.append(f"{_DORA}: σ are of scaling · B @ A, ‖ΔW‖ is of all that changes")
        if self.trained:
            blocks.append(
                Table(
                    ("trained in full", "‖W‖", "‖ΔW‖"),
                    [(t.name, f"{t.base_norm:.4g}", f"{t.change_norm:.4g}") for t in self.trained],
                )
            )
        return blocks


def spark(values: tuple[float, ...]) -> str:
    """Values in relation to the largest as a row of bars, at most 16: some are left out then."""
    step = -(-len(values) // _WIDEST)
    largest = max(values, default=0.0)
    return "".join(
        _BARS[round(value / largest * (len(_BARS) - 1))] if largest else "▁" for value in values[:: step or 1]
    )


def adapter_statistics(gm: fx.GraphModule, *, adapter_name: str = "default") -> AdapterStatistics:
    """How large each delta of an adapter is, what folding would keep of it, and how many of its ranks carry it.

    Args:
        gm: an injected graph; it is left as it is. Where its parameters are spread over processes, all of them call
            this, and each gathers them.
        adapter_name: the adapter, taken at weight 1 whatever `set_adapters` says.

    Raises:
        AdapterError: if there is no such adapter, or it holds NaN or Inf.
        FoldError: if the base has no values (meta device).
        GraphError: if the graph is one that cannot be read so (`batch_adapters`).
    """
    gm = checked_graph_module(gm)
    check_editable(gm)
    adapter = find_adapter(gm, adapter_name)
    assert isinstance(gm, LoraGraphModule)
    gm = gathered(gm) if is_sharded(gm) else gm
    check_finite(gm, adapter)
    with torch.no_grad():
        measured = measure_fold(gm, adapter)
        sites = [_site_delta(gm, adapter.sites[target.site.path], target, measured) for target in adapter.plan.targets]
        return AdapterStatistics(adapter_name, tuple(sites), tuple(_trained(gm, adapter)))


def factors_of(gm: fx.GraphModule, site: AdapterSite) -> Factors:
    """The factors of an adapter at one site; without what is taken off again where it started elsewhere than at 0."""
    a, b = _wide(gm, site.lora_a), _wide(gm, site.lora_b)
    if site.start_a is not None and site.start_b is not None:
        a, b = without_start(a, b, _wide(gm, site.start_a), _wide(gm, site.start_b))
    up, down = _split(site.layout, a, b)
    return Factors(up, down, site.scaling)


def check_finite(gm: fx.GraphModule, adapter: Adapter) -> None:
    """Raise AdapterError if a tensor of the adapter holds NaN or Inf."""
    for name in dict.fromkeys(name for member in adapter.members for name in member.tensors.values()):
        value = get_attribute(gm, name)
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise AdapterError(
                f"{name} of adapter {adapter.name!r} holds NaN or Inf, so the adapter is broken; train it again or "
                "reload it"
            )


def _split(layout: Layout, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(layout, Kernel):
        up, down = layout.split(a, b)
        return up, down
    # Each group of outputs has ranks of its own; where A mixes the groups of inputs, they see all of these.
    return b.reshape(layout.groups, len(b) // layout.groups, -1), a.reshape(layout.groups, len(a) // layout.groups, -1)


def _wide(gm: fx.GraphModule, name: str) -> torch.Tensor:
    value = get_attribute(gm, name)
    assert isinstance(value, torch.Tensor)
    return value.detach().to("cpu", torch.float64)


def _site_delta(
    gm: fx.GraphModule, site: AdapterSite, target: PlannedSite, measured: Mapping[str, FoldedSite | str]
) -> SiteDelta:
    values = tuple(factors_of(gm, site).singular_values().tolist())
    fold = measured[site.applied]
    remarks = [f"same adapter as {target.shares_with}"] if target.shares_with is not None else []
    norm = math.sqrt(math.fsum(value * value for value in values))
    if isinstance(fold, str):
        weight_norm, kept = float(torch.linalg.vector_norm(base_weight(gm, site.weight), dtype=torch.float64)), None
        remarks.append(f"cannot be folded: {fold}")
    else:
        weight_norm, kept = fold.weight_norm, fold.kept
    if site.magnitude is not None and not isinstance(fold, str):
        remarks.append(_DORA)
        norm = fold.delta_norm
    if target.site.part:
        remarks.append("‖W‖ and kept are of the whole weight")
    return SiteDelta(
        site.path,
        target.site.layer_index,
        target.r,
        site.scaling,
        weight_norm,
        norm,
        kept,
        values,
        tuple(remarks),
    )


def _trained(gm: fx.GraphModule, adapter: Adapter) -> list[TrainedTensor]:
    originals = record_of(gm).originals
    found = []
    for name in adapter.saved:
        base, value = originals[name].to("cpu", torch.float64), trained_tensor(gm, name).detach()
        found.append(TrainedTensor(name, float(base.norm()), float((value.to("cpu", torch.float64) - base).norm())))
    for path, site in adapter.tokens.items():
        index = get_attribute(gm, site.index)
        rows = _wide(gm, site.rows)
        base = get_attribute(gm, site.weight).detach()[index].to("cpu", torch.float64)
        name = f"{counted(len(rows), 'row')} of {path}"
        found.append(TrainedTensor(name, float(base.norm()), float((rows - base).norm())))
    return found

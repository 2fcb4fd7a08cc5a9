"""What differs between two adapters of one base: their configurations, their sites, and their deltas at each site.

Deltas are compared by products of their factors; what is as large as a weight is never built.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .delta_statistics import Factors, check_finite, factors_of
from .graph_module import check_editable, checked_graph_module
from .injection import Adapter
from .parameters import find_adapter
from .tables import Shown, Table, counted

# Of what a float64 decomposition gives, what is below this share of the largest is rounding, and no direction.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class DeltaPair:
    """The deltas of two adapters at one site.

    Attributes:
        path: the site's.
        layer_index: the first number in the path, or None.
        first_norm, second_norm, difference_norm: ‖Δ₁‖, ‖Δ₂‖ and ‖Δ₁ − Δ₂‖ (Frobenius).
        cosine: ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖); None if one of them is zero.
        output_angles, input_angles: principal angles, in degrees, between what the two write to (column spaces) and
            between what they read (row spaces), the smallest first, of all matrices of the weight together.
        output_overlap, input_overlap: Σ cos² of these angles / their number: 0 for spaces at right angles, 1 where one
            lies in the other (the similarity of Hu et al., arXiv 2106.09685, section 7.2); None if a delta is zero.
    """

    path: str
    layer_index: int | None
    first_norm: float
    second_norm: float
    difference_norm: float
    cosine: float | None
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]

    @property
    def output_overlap(self) -> float | None:
        """How much of the smaller column space lies in the other."""
        return _overlap(self.output_angles)

    @property
    def input_overlap(self) -> float | None:
        """How much of the smaller row space lies in the other."""
        return _overlap(self.input_angles)


@dataclass(frozen=True)
class AdapterComparison(Shown):
    """What differs between two adapters; prints as tables.

    Attributes:
        first, second: their names.
        options: (field, first's value, second's) of their configurations, where they differ.
        only_first, only_second: paths of sites that only one of them adapts.
        sites: those that both adapt.
        remarks: what the numbers leave out.
    """

    first: str
    second: str
    options: tuple[tuple[str, str, str], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    sites: tuple[DeltaPair, ...]
    remarks: tuple[str, ...] = ()

    def blocks(self) -> list[str | Table]:
        """The options and sites that differ, and a row for each site that both adapt."""
        blocks: list[str | Table] = [f"{self.first} and {self.second}: {counted(len(self.sites), 'site')} of both"]
        if self.options:
            blocks.append(Table(("option", self.first, self.second), self.options))
        for name, paths in ((self.first, self.only_first), (self.second, self.only_second)):
            if paths:
                blocks.append(f"only {name} adapts {', '.join(path or '(root)' for path in paths)}")
        header = ("site", "‖Δ₁‖", "‖Δ₂‖", "‖Δ₁ − Δ₂‖", "cosine", "overlap of outputs", "of inputs")
        rows = [
            (
                pair.path or "(root)",
                f"{pair.first_norm:.4g}",
                f"{pair.second_norm:.4g}",
                f"{pair.difference_norm:.4g}",
                "" if pair.cosine is None else f"{pair.cosine:.3f}",
                "" if pair.output_overlap is None else f"{pair.output_overlap:.1%}",
                "" if pair.input_overlap is None else f"{pair.input_overlap:.1%}",
            )
            for pair in self.sites
        ]
        if rows:
            blocks.append(Table(header, rows))
        return [*blocks, *self.remarks]


def compare_adapters(
    gm: fx.GraphModule, other: fx.GraphModule, *, adapter_name: str = "default", other_name: str = "default"
) -> AdapterComparison:
    """Cosines and principal angles between the deltas scaling · B @ A of two adapters, each at weight 1.

    Args:
        gm: an injected graph.
        other: the graph that has the other adapter, of the same base; or `gm` itself.
        adapter_name, other_name: the adapters.

    Raises:
        AdapterError: if there is no such adapter, or one holds NaN or Inf.
        GraphError: if a graph is one that cannot be read so (`batch_adapters`).
    """
    graphs = checked_graph_module(gm), checked_graph_module(other)
    first, second = (find_adapter(graph, name) for graph, name in zip(graphs, (adapter_name, other_name), strict=True))
    for graph, adapter in zip(graphs, (first, second), strict=True):
        check_editable(graph)
        check_finite(graph, adapter)
    indices = {target.site.path: target.site.layer_index for target in first.plan.targets}
    pairs, remarks = [], list(_remarks(first, second))
    with torch.no_grad():
        for path, index in indices.items():
            if path not in second.sites:
                continue
            one, two = factors_of(graphs[0], first.sites[path]), factors_of(graphs[1], second.sites[path])
            if _shape(one) != _shape(two):
                remarks.append(f"{path} is adapted as {_shape(one)} by one and as {_shape(two)} by the other")
                continue
            pairs.append(_compared(path, index, one, two))
    same_name = first.name == second.name
    return AdapterComparison(
        f"{first.name} (first)" if same_name else first.name,
        f"{second.name} (second)" if same_name else second.name,
        tuple(_options(first, second)),
        tuple(path for path in first.sites if path not in second.sites),
        tuple(path for path in second.sites if path not in first.sites),
        tuple(pairs),
        tuple(remarks),
    )


def _compared(path: str, index: int | None, one: Factors, two: Factors) -> DeltaPair:
    (u1, s1, v1), (u2, s2, v2) = one.decomposed(), two.decomposed()
    norms = float(s1.norm()), float(s2.norm())
    # ⟨s L₁ R₁, t L₂ R₂⟩ = s t · tr((L₁ᵀ L₂)(R₂ R₁ᵀ)): products of r × r.
    inner = float(((one.up.mT @ two.up) * (one.down @ two.down.mT)).sum()) * one.scaling * two.scaling
    both = Factors(torch.cat([one.scaling * one.up, -two.scaling * two.up], 2), torch.cat([one.down, two.down], 1), 1.0)
    return DeltaPair(
        path,
        index,
        *norms,
        float(both.singular_values().norm()),
        max(-1.0, min(1.0, inner / norms[0] / norms[1])) if all(norms) else None,
        principal_angles(u1, s1, u2, s2),
        principal_angles(v1, s1, v2, s2),
    )


def principal_angles(u1: torch.Tensor, s1: torch.Tensor, u2: torch.Tensor, s2: torch.Tensor) -> tuple[float, ...]:
    """Degrees between the spans of orthonormal u1 (n, d, p) and u2 (n, d, q), the smallest first.

    Cosines are the singular values of u1ᵀ u2 (Björck and Golub, 1973). Directions count whose singular values s1 (n, p)
    and s2 (n, q) are no rounding.
    """
    angles: list[float] = []
    for n in range(len(u1)):
        one, two = (u[n][:, s[n] > _NEGLIGIBLE * float(s.max())] for u, s in ((u1, s1), (u2, s2)))
        cosines = torch.linalg.svdvals(one.T @ two).clamp(max=1.0)
        angles += torch.rad2deg(torch.arccos(cosines)).tolist()
    return tuple(sorted(angles))


def _overlap(angles: tuple[float, ...]) -> float | None:
    return math.fsum(math.cos(math.radians(angle)) ** 2 for angle in angles) / len(angles) if angles else None


def _shape(factors: Factors) -> tuple[int, int, int]:
    return len(factors.up), factors.up.shape[1], factors.down.shape[2]


def _options(first: Adapter, second: Adapter) -> list[tuple[str, str, str]]:
    found = []
    for field in dataclasses.fields(first.config):
        one, two = (_spelled(getattr(adapter.config, field.name)) for adapter in (first, second))
        if one != two:
            found.append((field.name, one, two))
    return found


def _spelled(value: Any) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, (set, frozenset, list, tuple)) else str(value)


def _remarks(first: Adapter, second: Adapter) -> list[str]:
    remarks = []
    for adapter in (first, second):
        if adapter.config.use_dora:
            remarks.append(f"{adapter.name} is DoRA: what its magnitudes change is not compared")
        if adapter.saved or adapter.tokens:
            names = ", ".join((*adapter.saved, *adapter.tokens))
            remarks.append(f"{adapter.name} trains {names} as they are, which is not compared")
    return remarks

"""An adapter as a page to look at: one file, nothing to fetch, whole without scripts, in the light and in the dark.

The page may hold names out of files that anyone wrote: the template escapes everything, and a policy in the page
forbids whatever is not in it.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .delta_comparison import AdapterComparison
from .delta_statistics import MOST, AdapterStatistics, SiteDelta
from .plan import Plan
from .report_charts import (
    HEIGHT,
    WIDTH,
    Chart,
    Grid,
    bars,
    line_colours,
    make_chart,
    make_grid,
    palette,
    place_of,
    short,
)
from .site_graphs import SiteGraphs
from .training_log import LOSSES, TrainingLog

# What keeps the page of a model with thousands of sites below 2 MB.
_MOST_ROWS, _MOST_CELLS, _MOST_CHARTS, _MOST_VALUES = 400, 700, 24, 16
_MOST_ANGLES = 8


@dataclass(frozen=True)
class Latency:
    """How long one way of running the model took: the median, in seconds, and what it is divided by the base's."""

    name: str
    seconds: float
    ratio: float


@dataclass(frozen=True)
class Report:
    """What is on the page.

    Attributes:
        model, adapter: where they were read from.
        parameters: of the model.
        sites: paths of all sites of the model, in its order.
        plan: of the adapter.
        statistics: its numbers.
        graphs: the graph around some of its sites.
        notes: what the reader should know.
        log: of its training.
        comparison: with another adapter.
        verification: what `exporters.verification_tables` gives: HTML that is escaped already.
        latency: how fast it runs.
    """

    model: str
    adapter: str
    parameters: int
    sites: tuple[str, ...]
    plan: Plan
    statistics: AdapterStatistics
    graphs: tuple[SiteGraphs, ...] = ()
    notes: tuple[str, ...] = ()
    log: TrainingLog | None = None
    comparison: AdapterComparison | None = None
    verification: str = ""
    latency: tuple[Latency, ...] = ()


def report_page(report: Report) -> str:
    """The page's HTML.

    Raises:
        ImportError: if jinja2 is missing.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_fx"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": _short, "percent": _percent}
    script = (Path(__file__).parent / "templates" / "report.js").read_text("utf-8")
    sites, spectra = report.statistics.sites, _spectra(report.statistics.sites)
    sizes = {target.site.path: (target.site.op, target.site.size) for target in report.plan.targets}
    return environment.get_template("report.html.j2").render(
        report=report,
        sites=[(site, sizes[site.path], bars(site.singular_values, 80, 20)) for site in sites[:_MOST_ROWS]],
        sites_left_out=max(0, len(sites) - _MOST_ROWS),
        skipped=report.plan.skipped[:_MOST_ROWS],
        facts=_facts(report),
        outside=[site for site in sites if place_of(site.path) is None],
        grids=_grids(report),
        spectra=spectra[:_MOST_CHARTS],
        spectra_left_out=max(0, len(spectra) - _MOST_CHARTS),
        curves=_curves(report.log),
        comparison_grids=_comparison_grids(report),
        pairs=report.comparison.sites[:_MOST_ROWS] if report.comparison else (),
        most_values=_MOST_VALUES,
        most=MOST,
        angles=_angles,
        palette=palette(),
        light_lines=line_colours(on_dark=False),
        dark_lines=line_colours(on_dark=True),
        width=WIDTH,
        height=HEIGHT,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    sites, plan = report.statistics.sites, report.plan
    ratios = [site.ratio for site in sites if site.ratio is not None]
    kept = [site.kept for site in sites if site.kept is not None]
    share = f" ({plan.parameters / report.parameters:.2%} of the model's)" if report.parameters else ""
    hints = [site.hint for site in sites]
    few, full, none = (sum(word in hint for hint in hints) for word in ("lower", "higher", "no effect"))
    return [
        ("sites adapted", f"{len(sites):,}"),
        ("parameters added", f"{plan.parameters:,}{share}"),
        ("ranks", _range([float(site.r) for site in sites], "{:.0f}")),
        ("‖ΔW‖ / ‖W‖", _range(ratios, "{:.2%}")),
        ("kept by folding", _range(kept, "{:.2%}")),
        (
            "hints",
            f"{few} of {len(sites)} sites may do with a lower rank, {full} may use a higher, {none} have no effect",
        ),
    ]


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return low if low == high else f"{low} to {high}, median {middle}"


def _grids(report: Report) -> list[Grid]:
    others = {skip.path: f"not adapted: {skip.reason}" for skip in report.plan.skipped}
    sites = report.statistics.sites
    measures: list[tuple[str, str, dict[str, float | None], float | None, Any]] = [
        ("Rank", "r of each adapter", {s.path: float(s.r) for s in sites}, None, lambda v: f"{v:.0f}"),
        ("Size of the change", "‖ΔW‖ / ‖W‖ in percent", {s.path: s.ratio for s in sites}, None, _percent),
        (
            "Ranks in use",
            "effective rank / number of singular values, in percent",
            {s.path: s.effective_rank / len(s.singular_values) if s.singular_values else None for s in sites},
            1.0,
            _percent,
        ),
        (
            "Kept by folding",
            "share of the delta that the weight's dtype keeps, in percent",
            {s.path: s.kept for s in sites},
            1.0,
            _percent,
        ),
    ]
    return _made(report, "not adapted", [(t, n, v, others, 0.0, high, text) for t, n, v, high, text in measures])


def _comparison_grids(report: Report) -> list[Grid]:
    comparison = report.comparison
    if comparison is None:
        return []
    sites = comparison.sites
    only = dict.fromkeys(comparison.only_first, f"only {comparison.first} adapts it")
    only |= dict.fromkeys(comparison.only_second, f"only {comparison.second} adapts it")
    return _made(
        report,
        "of one alone",
        [
            ("Cosine", "⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖)", {s.path: s.cosine for s in sites}, only, -1.0, 1.0, "{:.2f}".format),
            (
                "Overlap of what they write to",
                "column spaces, in percent",
                {s.path: s.output_overlap for s in sites},
                only,
                0.0,
                1.0,
                _percent,
            ),
            (
                "Overlap of what they read",
                "row spaces, in percent",
                {s.path: s.input_overlap for s in sites},
                only,
                0.0,
                1.0,
                _percent,
            ),
        ],
    )


def _made(report: Report, empty: str, measures: Any) -> list[Grid]:
    found = [
        make_grid(
            title,
            note,
            values,
            others,
            order=report.sites,
            low=low,
            high=high,
            text=text,
            empty=empty,
            most_cells=_MOST_CELLS,
        )
        for title, note, values, others, low, high, text in measures
    ]
    return [grid for grid in found if grid is not None]


def _spectra(sites: Sequence[SiteDelta]) -> list[Chart]:
    """One chart for each module of a layer, with a curve for each layer; and one for each site outside of layers."""
    groups: dict[str, list[SiteDelta]] = {}
    for site in sites:
        place = place_of(site.path)
        groups.setdefault(site.path if place is None else f"{place.stack}.*.{place.module}".strip("."), []).append(site)
    charts = [
        make_chart(
            name or "(root)",
            ((s.path, [(float(k), value) for k, value in enumerate(s.singular_values, 1)]) for s in found),
            from_zero=True,
        )
        for name, found in groups.items()
    ]
    return [chart for chart in charts if chart is not None]


def _curves(log: TrainingLog | None) -> list[Chart]:
    """The losses in one chart, every other measure in one of its own."""
    if log is None:
        return []
    together: dict[str, list[Any]] = {}
    for series in log.series:
        is_loss = series.name in LOSSES
        together.setdefault("loss" if is_loss else series.name, []).append((series.name, series.points))
    charts = [make_chart(name, curves) for name, curves in together.items()]
    return [chart for chart in charts if chart is not None]


def _short(value: float | None) -> str:
    return "" if value is None else short(value)


def _percent(value: float | None) -> str:
    """In percent, with as many digits as tell it from none and all."""
    if value is None:
        return ""
    percent = 100 * value
    if percent == 0:
        return "0"
    if 0 < percent < 0.1:
        return f"{percent:.1g}"
    if 99.95 <= percent < 100:
        return "≈100"
    if abs(percent) >= 1000:
        return f"{percent / 1000:.1f}k"
    return f"{percent:.1f}" if percent < 10 or 95 <= percent < 100 else f"{percent:.0f}"


def _angles(angles: Sequence[float]) -> str:
    """Degrees, the smallest and the largest where there are many."""
    if len(angles) > _MOST_ANGLES:
        return f"{angles[0]:.0f}° to {angles[-1]:.0f}°, median {statistics.median(angles):.0f}°"
    return ", ".join(f"{angle:.0f}°" for angle in angles)

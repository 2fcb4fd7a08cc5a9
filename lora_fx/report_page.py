"""An adapter as a page to look at: one file, nothing to fetch, whole without scripts, in the light and in the dark.

The page may hold names out of files that anyone wrote: the template escapes everything, and a policy in the page
forbids whatever is not in it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .delta_comparison import AdapterComparison
from .delta_statistics import MOST, AdapterStatistics, SiteDelta
from .plan import Plan
from .report_charts import (
    HEIGHT,
    WIDTH,
    Cell,
    Chart,
    Grid,
    bars,
    largest_of,
    line_colours,
    make_cell,
    make_chart,
    make_grid,
    palette,
    place_of,
    short,
)
from .site_graphs import GraphRow, SiteGraphs
from .training_log import LOSSES, TrainingLog

if TYPE_CHECKING:
    from markupsafe import Markup

# What keeps the page of a model with thousands of sites below 2 MB.
_MOST_ROWS, _MOST_CELLS, _MOST_CHARTS, _MOST_VALUES, _MOST_OUTSIDE = 400, 700, 24, 16, 60
_MOST_ANGLES = 8
_FOLDED = 2


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
    environment.filters |= {"short": _short, "percent": _percent, "breakable": _breakable}
    script = (Path(__file__).parent / "templates" / "report.js").read_text("utf-8")
    sites, spectra = report.statistics.sites, _spectra(report.statistics.sites)
    measures, outside = _measures(report), [site.path for site in sites if place_of(site.path) is None]
    sizes = {target.site.path: (target.site.op, target.site.size) for target in report.plan.targets}
    return environment.get_template("report.html.j2").render(
        report=report,
        sites=[(site, sizes[site.path], bars(site.singular_values, 80, 20)) for site in sites[:_MOST_ROWS]],
        sites_left_out=max(0, len(sites) - _MOST_ROWS),
        skipped=report.plan.skipped[:_MOST_ROWS],
        facts=_facts(report),
        measures=measures,
        outside=[(path, [measure.cell(path) for measure in measures]) for path in outside[:_MOST_OUTSIDE]],
        outside_left_out=max(0, len(outside) - _MOST_OUTSIDE),
        grids=_grids(report, measures),
        spectra=spectra[:_MOST_CHARTS],
        spectra_left_out=max(0, len(spectra) - _MOST_CHARTS),
        curves=_curves(report.log),
        comparison_grids=_comparison_grids(report),
        pairs=report.comparison.sites[:_MOST_ROWS] if report.comparison else (),
        most_values=_MOST_VALUES,
        most=MOST,
        angles=_angles,
        is_marked=_is_marked,
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
    share = f" ({_percent(plan.parameters / report.parameters)}% of the model's)" if report.parameters else ""
    return [
        ("sites adapted", f"{len(sites):,}"),
        ("parameters added", f"{plan.parameters:,}{share}"),
        ("ranks", _range([float(site.r) for site in sites], "{:.0f}".format)),
        ("‖ΔW‖ / ‖W‖", _range(ratios, lambda value: f"{_percent(value)}%")),
        ("kept by folding", _range(kept, lambda value: f"{_percent(value)}%")),
        ("hints", _hints([site.hint for site in sites])),
    ]


def _hints(hints: Sequence[str]) -> str:
    """How many sites there is something to say of."""
    meanings = {"lower": "may do with a lower rank", "higher": "may use a higher rank", "no effect": "without effect"}
    counts = {meaning: sum(word in hint for hint in hints) for word, meaning in meanings.items()}
    said = [f"{count:,} {meaning}" for meaning, count in counts.items() if count]
    return f"of {len(hints):,} sites, {', '.join(said)}" if said else "none"


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    if not values:
        return "–"
    low, middle, high = (text(value) for value in (min(values), statistics.median(values), max(values)))
    return low if low == high else f"{low} to {high}, median {middle}"


class _Measure(NamedTuple):
    """What squares are coloured by; see `make_grid`."""

    title: str
    note: str
    values: Mapping[str, float | None]
    others: Mapping[str, str]
    low: float
    high: float
    text: Callable[[float], str]

    def cell(self, path: str) -> Cell:
        return make_cell(path, self.values.get(path), self.others.get(path), self.low, self.high, self.text)


def _measures(report: Report) -> list[_Measure]:
    others = {skip.path: f"not adapted: {skip.reason}" for skip in report.plan.skipped}
    sites = report.statistics.sites
    ranks, ratios = {s.path: float(s.r) for s in sites}, {s.path: s.ratio for s in sites}
    used = {s.path: s.effective_rank / len(s.singular_values) if s.singular_values else None for s in sites}
    kept = {s.path: s.kept for s in sites}
    in_use = "effective rank / number of singular values, in percent"
    share = "share of the delta that the weight's dtype keeps, in percent"
    return [
        _Measure("Rank", "r of each adapter", ranks, others, 0.0, largest_of(ranks), "{:.0f}".format),
        _Measure("Size of the change", "‖ΔW‖ / ‖W‖ in percent", ratios, others, 0.0, largest_of(ratios), _percent),
        _Measure("Ranks in use", in_use, used, others, 0.0, 1.0, _percent),
        _Measure("Kept by folding", share, kept, others, 0.0, 1.0, _percent),
    ]


def _comparison_grids(report: Report) -> list[Grid]:
    comparison = report.comparison
    if comparison is None:
        return []
    sites = comparison.sites
    only = dict.fromkeys(comparison.only_first, f"only {comparison.first} adapts it")
    only |= dict.fromkeys(comparison.only_second, f"only {comparison.second} adapts it")
    cosines = {s.path: s.cosine for s in sites}
    written, read = {s.path: s.output_overlap for s in sites}, {s.path: s.input_overlap for s in sites}
    return _grids(
        report,
        [
            _Measure("Cosine", "⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖)", cosines, only, -1.0, 1.0, "{:.2f}".format),
            _Measure("Overlap of what they write to", "column spaces, in percent", written, only, 0.0, 1.0, _percent),
            _Measure("Overlap of what they read", "row spaces, in percent", read, only, 0.0, 1.0, _percent),
        ],
        empty="of one alone",
    )


def _grids(report: Report, measures: Sequence[_Measure], *, empty: str = "not adapted") -> list[Grid]:
    found = [
        make_grid(**measure._asdict(), order=report.sites, empty=empty, most_cells=_MOST_CELLS) for measure in measures
    ]
    return [grid for grid in found if grid is not None]


def _spectra(sites: Sequence[SiteDelta]) -> list[Chart]:
    """One chart for each module of a layer, with a curve for each layer; and one for each site outside of layers."""
    groups: dict[str, list[tuple[str, SiteDelta]]] = {}
    for site in sites:
        place = place_of(site.path)
        group = site.path if place is None else f"{place.stack}.*.{place.module}".strip(".")
        groups.setdefault(group, []).append((group if place is None else f"layer {place.layer}", site))
    charts = [
        make_chart(
            group or "(root)",
            ((name, [(float(k), v) for k, v in enumerate(s.singular_values, 1)]) for name, s in found),
            from_zero=True,
        )
        for group, found in groups.items()
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


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken behind dots and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=[._])(?=\w)", "<wbr>", str(escape(name))))


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


def _is_marked(row: GraphRow, column: int) -> bool:
    """Whether it is this graph (before, injected, folded) that makes the row's change."""
    texts = (row.before, row.injected, row.folded)
    if row.change == "new values":
        return column == _FOLDED
    return bool(row.change and texts[column]) and texts[column] != row.before


def _angles(angles: Sequence[float]) -> str:
    """Degrees, the smallest and the largest where there are many."""
    if len(angles) > _MOST_ANGLES:
        return f"{angles[0]:.0f}° to {angles[-1]:.0f}°, median {statistics.median(angles):.0f}°"
    return ", ".join(f"{angle:.0f}°" for angle in angles)

"""What `lora-fx report` does: gathers what there is to say about an adapter, and writes it as a page."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_integrity import Integrity
from .cli_console import progress
from .errors import FoldError, warn
from .report_charts import place_of
from .tables import Table

if TYPE_CHECKING:
    from exporters import VerifyReport

    from .graph_module import LoraGraphModule
    from .hf_models import HfModel
    from .plan import Plan
    from .report_page import Latency, Report

_ROUNDS = 15


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        adapter, other: directories of the adapter, and of one to compare it with.
        log: a trainer_state.json; None takes that of the adapter's directory, if there is one.
        sites: paths whose graph is shown; none: one of each kind.
        graphs: how many graphs are shown where no sites are named.
        verify: whether to export the folded model, compare it with torch, and time both.
        integrity: see `load_adapter`.
    """

    adapter: Path
    other: Path | None
    log: Path | None
    sites: tuple[str, ...]
    graphs: int
    verify: bool
    integrity: Integrity


def check_wanted(wanted: Wanted) -> None:
    """See that the files that are named can be read, before a model is loaded for minutes.

    Raises:
        LoraFxError: if not.
    """
    from .adapter_files import open_adapter
    from .training_log import read_training_log

    if wanted.log is not None:
        read_training_log(wanted.log)
    for directory in (wanted.adapter, wanted.other):
        if directory is not None:
            open_adapter(directory, "default", wanted.integrity, mapped=True)


def make_report(
    loaded: HfModel, trace: Callable[[HfModel], LoraGraphModule], wanted: Wanted
) -> tuple[Report, VerifyReport | None]:
    """All that is on the page, and the verification if one was asked for.

    Raises:
        LoraFxError: if the adapter, the log or a site is not to be had.
    """
    import lora_fx

    from .graph_module import record_of
    from .report_page import Report
    from .site_graphs import site_graphs
    from .training_log import LOG_FILE, read_training_log

    log = None
    if wanted.log is not None:
        log = read_training_log(wanted.log)
    elif (wanted.adapter / LOG_FILE).is_file():
        try:
            log = read_training_log(wanted.adapter / LOG_FILE)
        except lora_fx.LoraFxError as error:
            warn(f"the training log beside the adapter is left out: {error}")
    gm = trace(loaded)
    with progress("measuring the adapter"):
        injected = lora_fx.load_adapter(gm, wanted.adapter, integrity=wanted.integrity)
        plan = record_of(injected).adapters["default"].plan
        statistics = lora_fx.adapter_statistics(injected)
        notes: list[str] = []
        folded = None
        try:
            folded = lora_fx.fold(injected)
        except FoldError as error:
            notes.append(f"The adapter cannot be folded into this model: {error}")
        paths = wanted.sites or _one_of_each(plan, wanted.graphs)
        graphs = site_graphs(gm, injected, folded, paths)
    comparison = None
    if wanted.other is not None:
        with progress("comparing the adapters"):
            second = lora_fx.load_adapter(gm, wanted.other, integrity=wanted.integrity)
            comparison = lora_fx.compare_adapters(injected, second)
            names = wanted.adapter.resolve().name, wanted.other.resolve().name
            if names[0] == names[1]:
                names = str(wanted.adapter), str(wanted.other)
            comparison = dataclasses.replace(comparison, first=names[0], second=names[1])
    report = Report(
        model=str(loaded.directory),
        adapter=str(wanted.adapter),
        parameters=lora_fx.trainable_parameters(gm)[1],
        sites=tuple(site.path for site in lora_fx.find_sites(gm)),
        plan=plan,
        statistics=statistics,
        graphs=tuple(graphs),
        notes=tuple(notes),
        log=log,
        comparison=comparison,
    )
    if not wanted.verify:
        return report, None
    if folded is None:
        raise FoldError(f"there is nothing to verify. {notes[0]} Leave --verify out to see the rest")
    return _verified(report, loaded, trace, wanted, (gm, injected, folded))


def _one_of_each(plan: Plan, most: int) -> tuple[str, ...]:
    """Paths of adapted sites: the first of each module's name in its layer, then others."""
    paths = [target.site.path for target in plan.targets]
    kinds: dict[Any, str] = {}
    for path in paths:
        place = place_of(path)
        kinds.setdefault(path if place is None else (place.stack, place.module), path)
    return tuple(dict.fromkeys([*kinds.values(), *paths]))[:most]


def _verified(
    report: Report,
    loaded: HfModel,
    trace: Callable[[HfModel], LoraGraphModule],
    wanted: Wanted,
    graphs: Sequence[LoraGraphModule],
) -> tuple[Report, VerifyReport]:
    """With the base and the folded graph exported to a temporary directory, and run there."""
    import lora_fx
    from exporters import export_onnx, make_session, verify_onnx
    from exporters.verification_page import verification_tables

    if loaded.is_bfloat16:
        warn(
            f"{str(loaded.directory)!r} is bfloat16, which ONNX Runtime does not run on the CPU; it is verified as "
            "float32, and all else on the page is of bfloat16. --dtype takes another type throughout"
        )
        loaded.model.float()
        gm = trace(loaded)
        injected = lora_fx.load_adapter(gm, wanted.adapter, integrity=wanted.integrity)
        graphs = gm, injected, lora_fx.fold(injected)
    with tempfile.TemporaryDirectory(prefix="lora_fx.") as temporary:
        base, file = Path(temporary) / "base.onnx", Path(temporary) / "folded.onnx"
        with progress("exporting"):
            export_onnx(graphs[0], base, check=False)
            export_onnx(graphs[2], file, check=False)
        with progress("verifying"):
            verification = verify_onnx(file, graphs[2], base=base)
        with progress("timing"):
            provider = "cuda" if verification.providers[0].startswith("CUDA") else "cpu"
            sessions = [make_session(path, provider=provider) for path in (base, file)]
            latency = _latency(graphs, sessions, loaded.inputs)
    verification = dataclasses.replace(verification, path=file.name)
    page = dataclasses.replace(report, verification=verification_tables(verification, "h3"), latency=tuple(latency))
    return page, verification


def _latency(graphs: Sequence[LoraGraphModule], sessions: Sequence[Any], inputs: dict[str, Any]) -> list[Latency]:
    """The base runs twice: how far the two are apart is noise, and so is what lies between them."""
    import torch

    from .timing import medians

    for gm in graphs:
        gm.eval()
    with torch.no_grad():
        seconds = medians([lambda gm=gm: gm(**inputs) for gm in (*graphs, graphs[0])], _ROUNDS)  # type: ignore[misc]
    found = _ways(("base, torch", "injected, torch", "folded, torch", "base again, torch"), seconds)
    feed = {name: value.numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if any(port.name not in feed for session in sessions for port in session.get_inputs()):
        return found
    feeds = [{port.name: feed[port.name] for port in session.get_inputs()} for session in sessions]
    runs = [lambda s=s, f=f: s.run(None, f) for s, f in zip(sessions, feeds, strict=True)]
    runs.append(runs[0])
    where = sessions[0].get_providers()[0].removesuffix("ExecutionProvider")
    ways = [f"{name}, ONNX Runtime ({where})" for name in ("base", "folded", "base again")]
    return found + _ways(ways, medians(runs, _ROUNDS))


def _ways(names: Iterable[str], seconds: Sequence[float]) -> list[Latency]:
    from .report_page import Latency

    return [Latency(name, taken, taken / seconds[0]) for name, taken in zip(names, seconds, strict=True)]


def paragraphs(report: Report, verification: VerifyReport | None) -> list[object]:
    """What the terminal shows of it; the page has the rest."""
    latency = [(way.name, f"{1e3 * way.seconds:.3f} ms", f"{way.ratio:.3f}") for way in report.latency]
    table = Table(("way", "median", "of the base's in torch"), latency) if latency else None
    found = (report.statistics, *report.notes, report.comparison, verification, table)
    return [each for each in found if each is not None]


def report_values(report: Report, verification: VerifyReport | None) -> dict[str, Any]:
    """What --json prints of it."""
    return {
        "statistics": statistics_rows(report.statistics),
        "notes": list(report.notes),
        "log": None if report.log is None else [dataclasses.asdict(series) for series in report.log.series],
        "comparison": None if report.comparison is None else dataclasses.asdict(report.comparison),
        "verification": None if verification is None else verification.to_dict(),
        "latency": [dataclasses.asdict(way) for way in report.latency],
    }


def statistics_rows(statistics: Any) -> dict[str, Any]:
    """An adapter's numbers, with those that are worked out from them."""
    sites = [
        dataclasses.asdict(site)
        | {
            "ratio": site.ratio,
            "ranks_for_most": site.ranks_for_most,
            "effective_rank": site.effective_rank,
            "hint": site.hint,
        }
        for site in statistics.sites
    ]
    return {"sites": sites, "trained": [dataclasses.asdict(tensor) for tensor in statistics.trained]}

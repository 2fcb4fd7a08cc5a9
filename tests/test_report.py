"""`lora-fx report`: the log it reads, the graphs it lines up, the page it writes, and what Chromium makes of that."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import random
import sys
import types
import warnings
from pathlib import Path

import browser
import peft
import pytest
import torch
import transformers
from torch import fx, nn
from zoo import BY_NAME, folded, injected, randomise, traced

import lora_fx
from lora_fx import AdapterError, TargetError, cli, cli_report
from lora_fx import report_page as report_page_module
from lora_fx.delta_comparison import AdapterComparison, DeltaPair
from lora_fx.delta_statistics import AdapterStatistics, SiteDelta, TrainedTensor
from lora_fx.graph_module import record_of
from lora_fx.report_charts import (
    HEIGHT,
    LEVELS,
    WIDTH,
    bars,
    level_of,
    line_colours,
    luminance,
    make_chart,
    make_grid,
    palette,
    place_of,
)
from lora_fx.report_page import Latency, Report, report_page
from lora_fx.site_graphs import GraphRow, SiteGraphs, site_graphs
from lora_fx.training_log import Series, TrainingLog, read_training_log

STACK, EXPERTS = BY_NAME["stack"], BY_NAME["experts"]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


# The log ------------------------------------------------------------------------------------------


def log_of(tmp_path: Path, text: str | bytes | object) -> TrainingLog:
    file = tmp_path / "trainer_state.json"
    file.write_bytes(
        text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    )
    return read_training_log(file)


def test_the_log_that_trainer_writes(tmp_path) -> None:
    state = transformers.TrainerState()
    state.log_history = [
        {"loss": 9.5},
        {"loss": 9.5, "step": math.inf},
        {"loss": 2.5, "learning_rate": 1e-4, "epoch": 0.1, "step": 10},
        {"loss": 1.5, "learning_rate": 5e-5, "epoch": 0.2, "step": 20},
        {"eval_loss": 1.75, "eval_runtime": 3, "epoch": 0.2, "step": 20},
        {"loss": math.nan, "epoch": 0.3, "step": 30},
        {"loss": math.inf, "learning_rate": True, "epoch": 0.3, "step": 31},
        {"train_loss": 2.0, "total_flos": 1e9, "step": 31},
    ]
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    log = read_training_log(tmp_path / "trainer_state.json")
    assert {s.name: s.points for s in log.series} == {
        "loss": ((10.0, 2.5), (20.0, 1.5)),
        "learning_rate": ((10.0, 1e-4), (20.0, 5e-5)),
        "eval_loss": ((20.0, 1.75),),
        "eval_runtime": ((20.0, 3.0),),
        "train_loss": ((31.0, 2.0),),
    }
    assert [s.left_out for s in log.series if s.name == "loss"] == [2]
    assert {s.name for s in log.series[:2]} == {"loss", "eval_loss"}
    assert str(log).count("NaN or infinite") == str(log).count("2 NaN or infinite") == 1


@pytest.mark.parametrize(("text", "fragment"), [
    ("", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "no list 'log_history'"),
    ('{"log_history": {"step": 1}}', "no list 'log_history'"),
    ('{"log_history": [1]}', "no list 'log_history'"),
    ('{"log_history": []}', "holds no measures"),
    ('{"log_history": [{"step": "1", "loss": 2}, {"step": true, "loss": 1}, {"loss": 1}]}', "holds no measures"),
    ('{"log_history": [{"step": 1, "loss": "2", "epoch": 3}]}', "holds no measures"),
    ({"log_history": [{"step": 1, **{f"m{i}": 1.0 for i in range(101)}}]}, "101 measures"),
], ids=map(str, range(10)))  # fmt: skip
def test_what_is_no_log_is_refused(text, fragment, tmp_path) -> None:
    with pytest.raises(AdapterError, match=fragment) as caught:
        log_of(tmp_path, text)
    assert "trainer_state.json" in str(caught.value)


def test_a_log_that_is_not_there_or_too_large_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        read_training_log(tmp_path / "none.json")
    monkeypatch.setattr("lora_fx.training_log._LARGEST", 1 << 10)
    with pytest.raises(AdapterError, match="is larger than"):
        log_of(tmp_path, " " * 1025)
    with pytest.raises(AdapterError, match="is not JSON"):
        log_of(tmp_path, " " * 1024)
    most = {"log_history": [{"step": 1, **{f"m{i}": 1 for i in range(100)}}]}
    monkeypatch.undo()
    assert len(log_of(tmp_path, most).series) == 100


def test_numbers_beyond_floats_are_left_out(tmp_path) -> None:
    log = log_of(tmp_path, f'{{"log_history": [{{"step": 1, "loss": 1{"0" * 400}, "x": 1e999, "y": 2}}]}}')
    assert [(s.name, len(s.points), s.left_out) for s in log.series] == [("loss", 0, 1), ("x", 0, 1), ("y", 1, 0)]
    assert str(log)


# Graphs -------------------------------------------------------------------------------------------


def graphs(case=STACK, tracer: str = "symbolic", **options) -> list[fx.GraphModule]:
    base = traced(case, tracer, torch.float64)
    adapted = randomise(injected(case, base, **options))
    return [base, adapted, lora_fx.fold(adapted)]


def test_the_graph_around_a_site() -> None:
    (found,) = site_graphs(*graphs(EXPERTS), ["gate_up"])
    rows = {row.injected.partition(" = ")[0]: row for row in found.rows}
    added = [row for row in found.rows if row.change == "added"]
    assert len(added) >= 5
    assert all(row.before == row.folded == "" and row.injected for row in added)
    assert sum("lora_" in row.injected and "self." in row.injected for row in added) == 2
    assert [row.change for row in found.rows].count("new values") == 1
    assert rows["gate_up"].change == "new values"
    changed = [row for row in found.rows if row.change == "changed"]
    assert len(changed) == 1
    assert changed[0].before == changed[0].folded != changed[0].injected
    assert all(row.before == row.folded == row.injected for row in found.rows if row.change in ("", "new values"))
    assert "before" in str(found)


@pytest.mark.parametrize(("name", "tracer", "site"), [
    ("tied_head", "export", "lm_head"), ("no_grad", "export", "frozen"), ("mlp", "symbolic", "fc1"),
])  # fmt: skip
def test_new_values_are_marked_wherever_they_are_read(name, tracer, site) -> None:
    """Under a new name, as an operand of a sub-graph, and in a module that is called."""
    case = BY_NAME[name]
    base = traced(case, tracer)
    adapted = randomise(injected(case, base))
    (found,) = site_graphs(base, adapted, folded(case, adapted), [site])
    (row,) = [row for row in found.rows if row.change == "new values"]
    assert row.folded
    assert (row.before == "") == (name == "tied_head")
    assert all(row.before != row.injected for row in found.rows if row.change == "added" and row.injected)
    unchanged = site_graphs(base, base, base, [site])[0]
    assert {row.change for row in unchanged.rows} == {""}


def test_each_site_has_its_own_nodes_and_calls() -> None:
    base, adapted, merged = graphs()
    paths = [site.path for site in lora_fx.find_sites(base)]
    found = site_graphs(base, adapted, merged, paths)
    names = [[row.injected.partition(" = ")[0] for row in each.rows if row.change == "added"] for each in found]
    assert all(names)
    assert len({name for each in names for name in each}) == sum(map(len, names))  # nobody's twice
    without = site_graphs(base, adapted, None, ["head"])[0]
    assert {row.folded for row in without.rows} == {""}
    down = site_graphs(*graphs(EXPERTS), ["down"])[0]
    assert down.calls > 1
    assert "the first of" in str(down)
    assert str(without).startswith("head\n\n")
    with pytest.raises(TargetError, match=r"no site 'haed'. Did you mean 'head'"):
        site_graphs(base, adapted, merged, ["haed"])


def test_evaluation_is_shown_and_the_whole_of_a_part() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn, self.drop = nn.Linear(6, 18), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.c_attn(self.drop(x)).split(6, dim=-1)
            return q * k + v

    base = lora_fx.trace(Packed(), torch.randn(2, 6))
    config = lora_fx.LoraConfig(r=2, target_modules=["c_attn[q]"], init_lora_weights=False)
    adapted = lora_fx.inject(base, config)
    (found,) = site_graphs(base, adapted, lora_fx.fold(adapted), ["c_attn[q]"])
    assert (found.path, found.calls) == ("c_attn[q]", 1)
    nodes = [row.before for row in found.rows]
    assert any("c_attn.weight" in node for node in nodes)
    assert ["True" in node for node in nodes if "aten.dropout" in node] in ([], [False])
    assert sum(row.change == "new values" for row in found.rows) == 1


# What is drawn ------------------------------------------------------------------------------------


def test_places() -> None:
    place = place_of("model.layers.11.self_attn.q_proj")
    assert (place.stack, place.layer, place.module) == ("model.layers", 11, "self_attn.q_proj")
    assert place_of("0").layer == 0
    assert place_of("lm_head") is None
    assert place_of("a.²") is None
    assert place_of(f"a.{'9' * 5000}") is None


def test_colours_have_contrast() -> None:
    def contrast(a: str, b: str) -> float:
        light, dark = sorted((luminance(a), luminance(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert luminance("#0a0b80") == pytest.approx(0.2126 * 10 / 255 / 12.92 + 0.7152 * 0.003347 + 0.0722 * 0.21586, 1e-3)
    assert (palette()[0][0], palette()[-1][0]) == ("#440154", "#fde725")  # viridis, from end to end
    assert len({back for back, _ in palette()}) == LEVELS
    assert all(contrast(back, f"#{text[1] * 6}") >= 4.5 for back, text in palette())
    lights = [luminance(back) for back, _ in palette()]
    assert lights == sorted(lights)  # so that it reads in grey
    assert min(contrast(colour, "#f5f5f7") for colour in line_colours(on_dark=False)) >= 3
    assert min(contrast(colour, "#212127") for colour in line_colours(on_dark=True)) >= 3


def test_a_grid_is_in_the_models_order() -> None:
    values = {"l.1.b": 4.0, "l.0.b": 1.0, "head": 9.0}
    grid = make_grid(
        "t", "n", values, {"l.0.a": "why"}, order=["l.0.a", "l.0.b", "l.1.b", "x"], high=4.0, text=str, empty="e",
        most_cells=9,
    )  # fmt: skip
    assert grid.columns == (0, 1)
    assert [row.name for row in grid.stacks[0].rows] == ["a", "b"]
    (empty, nothing), (low, high) = (row.cells for row in grid.stacks[0].rows)
    assert (empty.level, empty.label, nothing) == (None, "l.0.a: why", None)
    assert (low.level, high.level) == (round((LEVELS - 1) / 4), LEVELS - 1)
    assert (high.text, high.label) == ("4.0", "l.1.b: 4.0")
    assert make_grid("t", "n", {"head": 1.0}, {}, text=str, empty="e", most_cells=9) is None
    assert level_of(3, 3, 3) == LEVELS - 1
    assert make_grid("t", "n", values | {"l.0.c": 1.0}, {}, text=str, empty="e", most_cells=0).left_out == 1


def test_curves_keep_their_peaks_and_their_place() -> None:
    source = random.Random(0)
    points = [(float(x), source.random()) for x in range(50_000)]
    points[31_234] = (31_234.0, 7.0)
    chart = make_chart("loss", [("loss", points), ("none", [])])
    (line,) = chart.lines
    numbers = [tuple(map(float, pair.split())) for pair in line.path.removeprefix("M").split("L")]
    assert len(numbers) < 300
    assert min(y for _, y in numbers) == 0.0  # the peak, at the top
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in numbers)
    assert [x for x, _ in numbers] == sorted(x for x, _ in numbers)
    assert (chart.right, chart.high) == ("5e+04", "7")
    assert make_chart("x", []) is None
    assert "nan" not in make_chart("x", [("x", [(1.0, -1e308), (2.0, 1e308)])]).lines[0].path
    assert make_chart("x", [("x", [(1.0, 2.0)])]).lines[0].path == f"M{WIDTH / 2:.1f} {HEIGHT / 2:.1f}L150.0 60.0"
    assert bars((2.0, 1.0), 10, 8) == "M0.0 8h4.0v-8.0h-4.0zM5.0 8h4.0v-4.0h-4.0z"
    assert bars((0.0,), 10, 8) == ""


# The page -----------------------------------------------------------------------------------------


def make_report(**changes) -> Report:
    base, adapted, merged = graphs(targets=["q_proj", "down", "head"])
    second = randomise(injected(STACK, base, targets=["q_proj", "up"]), size=0.3)
    report = Report(
        model="model",
        adapter="adapter",
        parameters=1000,
        sites=tuple(site.path for site in lora_fx.find_sites(base)),
        plan=record_of(adapted).adapters["default"].plan,
        statistics=lora_fx.adapter_statistics(adapted),
        graphs=tuple(site_graphs(base, adapted, merged, ["head", "body.layers.0.down"])),
        notes=("a note",),
        log=TrainingLog((Series("loss", ((1.0, 3.0), (2.0, 2.0))), Series("eval_loss", ((2.0, 2.5),), 1))),
        comparison=lora_fx.compare_adapters(adapted, second),
        latency=(Latency("base, torch", 0.002, 1.0),),
    )
    return dataclasses.replace(report, **changes)


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and text; what is not closed is found."""

    VOID = frozenset({"meta", "path", "br", "img", "link", "input", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID or tag == "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(page: str) -> Reader:
    """No element fetches, runs or styles anything from outside; ids are unique, and each reference has its id."""
    read = Reader(page)
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(set(ids)) == len(ids) > 3
    allowed = {"href", "d", "class", "id", "title", "role", "lang", "charset", "content", "name", "scope", "colspan"}
    allowed |= {"tabindex", "viewbox", "width", "height", "http-equiv", "open", "data-v", "data-plain", "style"}
    for tag, attributes in read.elements:
        assert tag not in {"img", "link", "iframe", "object", "embed", "video", "audio", "base", "form", "use", "image"}
        assert all(name in allowed or name.startswith("aria-") for name in attributes), (tag, attributes)
        if "href" in attributes:
            assert str(attributes["href"]).startswith("#")
            assert str(attributes["href"])[1:] in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if attributes.get("role") in ("img", "region") or tag == "nav":
            assert attributes.get("aria-label")
    assert len(read.all("script")) == 1
    assert "url(" not in page
    assert "@import" not in page
    policy = next(a["content"] for a in read.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    return read


def test_the_page_is_one_file_with_a_table_for_every_picture() -> None:
    report = make_report()
    page = report_page(report)
    read = assert_self_contained(page)
    text = "".join(read.text)
    titles = [a["title"] for a in read.all("td") if a.get("title")]
    for site in report.statistics.sites:
        assert f"{site.delta_norm:.4g}" in text
        assert f"{site.ranks_for_most} of {len(site.singular_values)}" in text
        assert all(f"{value:.4g}" in text for value in site.singular_values)
        if "layers" in site.path:
            assert f"{site.path}: {site.r}" in titles
    assert any(title.startswith("body.layers.0.up: not adapted: ") for title in titles)
    for each in report.comparison.sites:
        assert f"{each.cosine:.3f}" in text
    for words in ("a note", "eval_loss", "Only default (first) adapts", "base, torch", "left out: 1"):
        assert words in text
    assert f"{len(report.graphs)} of {len(report.statistics.sites)} sites are shown" in text
    assert "sites are shown" not in report_page(dataclasses.replace(report, graphs=report.graphs * 9))
    assert len(read.all("details")) >= 4
    assert [tag for tag, _ in read.elements].count("h1") == 1


def test_nothing_in_a_page_is_taken_for_markup() -> None:
    report = make_report()
    site = dataclasses.replace(report.statistics.sites[0], path=f"l.0.{EVIL}", remarks=(EVIL,))
    outside = dataclasses.replace(site, path=EVIL)
    target = report.plan.targets[0]
    targets = [dataclasses.replace(target, site=dataclasses.replace(target.site, path=s.path)) for s in (site, outside)]
    skipped = (dataclasses.replace(report.plan.skipped[0], path=f"l.1.{EVIL}", reason=EVIL),)
    pair = dataclasses.replace(report.comparison.sites[0], path=f"l.0.{EVIL}")
    evil = Report(
        EVIL,
        EVIL,
        10,
        (),
        dataclasses.replace(report.plan, targets=tuple(targets), skipped=skipped),
        AdapterStatistics(EVIL, (site, outside), (TrainedTensor(EVIL, 1.0, 2.0),)),
        (SiteGraphs(EVIL, (GraphRow(EVIL, EVIL, EVIL, "added"),)),),
        (EVIL,),
        TrainingLog((Series(EVIL, ((1.0, 2.0),)),)),
        AdapterComparison(EVIL, EVIL, ((EVIL, EVIL, EVIL),), (EVIL,), (EVIL,), (pair,), (EVIL,)),
        "",
        (Latency(EVIL, 1.0, 1.0),),
    )
    page = report_page(evil)
    read = assert_self_contained(page)
    assert EVIL not in page
    assert "".join(read.text).count(EVIL) > 20
    assert any(EVIL in str(a.get("title")) for a in read.all("td"))


def test_sites_outside_of_layers_are_coloured_and_counted() -> None:
    report = make_report()
    site = dataclasses.replace(report.statistics.sites[0], remarks=())
    sites = tuple(dataclasses.replace(site, path=f"head_{i}", r=1 + i % 2) for i in range(61))
    targets = tuple(
        dataclasses.replace(report.plan.targets[0], site=dataclasses.replace(report.plan.targets[0].site, path=s.path))
        for s in sites
    )
    plan = dataclasses.replace(report.plan, targets=targets, skipped=())
    page = report_page(
        make_report(plan=plan, statistics=AdapterStatistics("default", sites), comparison=None, graphs=())
    )
    read = assert_self_contained(page)
    assert "No site lies in a numbered layer" in page
    assert "Outside of layers" not in page  # there is nothing else
    assert "1 more sites are not shown here" in page
    cells = {a["title"]: a["class"] for a in read.all("td") if str(a.get("title")).endswith((": 1", ": 2"))}
    assert len(cells) == 60
    assert (cells["head_0: 1"], cells["head_1: 2"]) == (f"c{level_of(1, 0, 2)}", f"c{LEVELS - 1}")


def test_legends_say_what_is_there() -> None:
    assert '<span class="key">· not adapted</span>' in report_page(make_report())
    everything = report_page(make_report(plan=dataclasses.replace(make_report().plan, skipped=()), comparison=None))
    assert 'class="key"' not in everything
    report = make_report()
    layers = sites_of(5, 1, 4)
    target = report.plan.targets[0]
    targets = tuple(dataclasses.replace(target, site=dataclasses.replace(target.site, path=s.path)) for s in layers)
    plan = dataclasses.replace(report.plan, targets=targets, skipped=())
    page = report_page(dataclasses.replace(report, plan=plan, statistics=AdapterStatistics("default", layers)))
    assert '<p class="legend">layer 0 <span class="ramp"><i class="line s0"></i>' in page
    assert "</span> layer 4</p>" in page


@pytest.mark.parametrize(("hints", "said"), [
    (("", ""), "none"),
    (("a lower rank may do", "all ranks are in use: a higher one may help", ""),
     "of 3 sites, 1 may do with a lower rank, 1 may use a higher rank"),
    (("it has no effect",) * 1200, "of 1,200 sites, 1,200 without effect"),
])  # fmt: skip
def test_hints_are_counted_where_there_are_any(hints, said) -> None:
    assert report_page_module._hints(hints) == said


def test_the_graph_that_makes_a_change_is_marked() -> None:
    rows = [
        ("added", GraphRow("", "a", "", "added"), [False, True, False]),
        ("changed", GraphRow("f(x)", "f(y)", "f(x)", "changed"), [False, True, False]),
        ("new values", GraphRow("w", "w", "w", "new values"), [False, False, True]),
        ("untied by folding", GraphRow("", "", "w2", "added"), [False, False, True]),
        ("the same", GraphRow("w", "w", "w", ""), [False, False, False]),
    ]
    for name, row, marked in rows:
        assert [report_page_module._is_marked(row, column) for column in range(3)] == marked, name


def sites_of(layers: int, modules: int, r: int) -> tuple[SiteDelta, ...]:
    values = tuple(math.exp(-k / 10) for k in range(r))
    paths = [f"model.layers.{i}.mlp.experts.{m}.down_proj" for i in range(layers) for m in range(modules)]
    return tuple(SiteDelta(path, 0, r, 2.0, 10.0, 1.0, 0.999, values) for path in paths)


@pytest.mark.parametrize(("layers", "modules", "r"), [(32, 7, 64), (64, 30, 128)])
def test_the_page_of_a_large_model_stays_small(layers, modules, r) -> None:
    report = make_report()
    sites = sites_of(layers, modules, r)
    target = report.plan.targets[0]
    targets = [dataclasses.replace(target, site=dataclasses.replace(target.site, path=s.path)) for s in sites]
    pairs = tuple(DeltaPair(s.path, 0, 1.0, 2.0, 3.0, 0.5, (1.0,) * r, (1.0,) * r) for s in sites)
    comparison = dataclasses.replace(report.comparison, sites=pairs)
    plan, statistics = dataclasses.replace(report.plan, targets=tuple(targets)), AdapterStatistics("default", sites)
    page = report_page(dataclasses.replace(report, plan=plan, statistics=statistics, comparison=comparison))
    assert len(page) < 2_000_000
    assert f"<dd>{len(sites):,}</dd>" in page
    assert ("are not shown here" in page) == (modules > 10)


def test_a_page_without_the_rest() -> None:
    page = report_page(make_report(graphs=(), notes=(), log=None, comparison=None, latency=()))
    assert_self_contained(page)
    for name in ("training", "comparison", "graphs", "verification"):
        assert f'id="{name}"' not in page


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A Llama of one layer, and two adapters that PEFT wrote for it."""
    root = tmp_path_factory.mktemp("report")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "model")
    for name, targets in (("first", ["q_proj", "down_proj"]), ("second", ["q_proj", "v_proj"])):
        model = transformers.LlamaForCausalLM.from_pretrained(root / "model")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets))
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.data.normal_(std=0.2)
        adapted.save_pretrained(root / name)
    history = {"log_history": [{"step": s, "loss": 3.0 / s} for s in range(1, 9)]}
    (root / "first" / "trainer_state.json").write_text(json.dumps(history))
    return root / "model", root / "first", root / "second"


@pytest.fixture(scope="module")
def graph(directories) -> tuple[object, fx.GraphModule]:
    loaded = cli._loaded(directories[0], directories[1])
    return loaded, cli._traced(loaded)


@pytest.fixture
def quick(graph, monkeypatch) -> None:
    """The model is loaded and traced once."""
    monkeypatch.setattr(cli, "_loaded", lambda *_: graph[0])
    monkeypatch.setattr(cli, "_traced", lambda *_: graph[1])


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-fx", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_report_writes_a_page_about_what_peft_trained(directories, quick, tmp_path, monkeypatch, capsys) -> None:
    model, first, second = directories
    out = tmp_path / "report.html"
    assert run(monkeypatch, "report", model, first, "--other", second, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    base = transformers.LlamaForCausalLM.from_pretrained(model)
    merged = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(model), first)
    merged = merged.merge_and_unload()
    base.requires_grad_(False), merged.requires_grad_(False)
    for site in printed["statistics"]["sites"]:
        weight = base.get_parameter(f"{site['path']}.weight")
        delta = merged.get_parameter(f"{site['path']}.weight") - weight
        assert site["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert site["ratio"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
        assert site["singular_values"] == pytest.approx(torch.linalg.svdvals(delta)[:3].tolist(), rel=1e-4)
    assert [each["path"] for each in printed["comparison"]["sites"]] == ["model.layers.0.self_attn.q_proj"]
    assert printed["comparison"]["first"] == "first"
    assert printed["log"][0]["points"][-1] == [8, 0.375]
    read = assert_self_contained(out.read_text())
    assert "v_proj" in "".join(read.text)
    assert run(monkeypatch, "report", model, first, "--out", out) == 3
    assert "--overwrite" in capsys.readouterr().err
    (first / "bad.json").write_text("{}")
    log = ("--log", first / "bad.json")
    assert run(monkeypatch, "report", model, first, *log, "--out", out, "--overwrite") == 3
    assert "log_history" in capsys.readouterr().err
    assert out.read_text().count("first") > 1
    assert run(monkeypatch, "report", model, first, "--out", out, "--overwrite", "--site", "nope") == 3
    assert "no site 'nope'" in capsys.readouterr().err
    assert run(monkeypatch, "report", model, second, "--out", out, "--overwrite", "--graphs", "1") == 0
    assert "v_proj" in capsys.readouterr().out
    assert 'id="training"' not in out.read_text()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("out", "status", "fragment"), [
    ("report.txt", 2, "must end in .html"),
    ("no/such/report.html", 3, "make it first"),
    ("directory.html", 3, "is a directory"),
    ("MODEL/report.html", 3, "lies in"),
    ("/proc/report.html", 3, "cannot write"),
])  # fmt: skip
def test_places_that_no_page_goes_to(out, status, fragment, directories, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "_loaded", lambda *_: pytest.fail("too far"))
    (tmp_path / "directory.html").mkdir()
    monkeypatch.chdir(tmp_path)
    place = out.replace("MODEL", str(directories[0]))
    assert run(monkeypatch, "report", *directories[:2], "--out", place) == status
    assert fragment in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["directory.html"]


@pytest.mark.filterwarnings("always::lora_fx.LoraFxWarning")
def test_a_broken_log_beside_the_adapter_is_a_warning(directories, quick, tmp_path, monkeypatch, capsys) -> None:
    model, _, second = directories
    (second / "trainer_state.json").write_text("{}")
    assert run(monkeypatch, "report", model, second, "--out", tmp_path / "report.html") == 0
    assert "log beside the adapter is left out" in capsys.readouterr().err
    (second / "trainer_state.json").unlink()


def test_inspect_prints_the_statistics(directories, quick, monkeypatch, capsys) -> None:
    model, first, _ = directories
    assert run(monkeypatch, "inspect", model, first) == 0
    assert "ranks for 99 %" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", model, first, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [site["r"] for site in printed["statistics"]["sites"]] == [3, 3]
    assert printed["statistics"]["sites"][0]["effective_rank"] > 1
    assert run(monkeypatch, "inspect", model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["statistics"] is None


def test_verify_puts_both_tables_on_the_page_and_tells_a_file_that_disagrees(
    directories, quick, tmp_path, monkeypatch, capsys
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    model.forward = types.MethodType(lambda self, x: self[2](self[1](self[0](x))), model)
    inputs = {"x": torch.randn(4, 7)}
    loaded = types.SimpleNamespace(directory=Path("model"), inputs=inputs, is_bfloat16=False)
    gm = lora_fx.trace(model, (), inputs)
    adapted = lora_fx.inject(gm, lora_fx.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    three = [gm, adapted, lora_fx.fold(adapted)]
    wanted = cli_report.Wanted(Path("a"), None, None, (), 1, True, "checked")
    with warnings.catch_warnings(action="ignore"):
        report, verification = cli_report._verified(make_report(), loaded, lambda _: gm, wanted, three)
    assert verification.ok
    page = report_page(report)
    assert "op for op" in page
    assert "ONNX Runtime (" in page
    assert [way.name.partition(",")[0] for way in report.latency] == [
        "base", "injected", "folded", "base again", "base", "folded", "base again",
    ]  # fmt: skip
    assert report.latency[0].ratio == report.latency[4].ratio == 1
    assert all(way.ratio == pytest.approx(way.seconds / report.latency[0].seconds) for way in report.latency[:4])
    assert "folded.onnx" in page
    assert "/folded.onnx" not in page  # a directory that is gone
    for value, count in ((verification, 2), (verification.base, 1)):
        assert value._repr_html_().count("<table>") == count
        assert "<td" in value._repr_html_()
    wrong = dataclasses.replace(verification, unexpected=("w",))
    monkeypatch.setattr(cli_report, "make_report", lambda *_: (report, wrong))
    out = tmp_path / "report.html"
    assert run(monkeypatch, "report", *directories[:2], "--verify", "--out", out) == 4
    assert "'w' differ from the base's" in capsys.readouterr().err
    assert out.read_text() == page


# Chromium -----------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="there is no Chromium to look at the page with: apt-get install chromium"
)


@needs_chromium
def test_chromium_shows_the_page_in_both_schemes_and_takes_keys(tmp_path) -> None:
    file = tmp_path / "report.html"
    file.write_text(report_page(make_report()))
    with browser.open_browser() as page:
        seen = {}
        for dark in (False, True):
            page.open(file, dark=dark)
            assert page.requests() == [file.as_uri()]
            assert page.complaints() == []
            seen[dark] = page.value("getComputedStyle(document.body).backgroundColor")
            assert len(page.picture()) > 10_000
        assert seen == {False: "rgb(255, 255, 255)", True: "rgb(22, 22, 26)"}
        for width in (1280, 400):
            page.open(file, width=width)
            assert page.value("document.documentElement.scrollWidth") <= width

        active = "document.activeElement"
        page.press("Tab")
        assert page.value(f"{active}.className") == "skip"
        page.press("Enter")
        assert page.value("location.hash") == "#main"
        reached = set()
        for _ in range(60):
            page.press("Tab")
            reached.add(page.value(f"{active}.tagName + ' ' + ({active}.closest('details') ? 'details' : '')"))
        assert {"SUMMARY details", "BUTTON ", "TD ", "DIV "} <= reached

        page.value("document.querySelector('table.grid td').focus()")
        first = page.value(f"{active}.title")
        page.press("ArrowRight")
        second = page.value(f"{active}.title")
        assert first.startswith("body.layers.0.")
        assert second == first.replace(".0.", ".1.", 1)
        assert page.value(f"{active}.closest('figure').querySelector('.said').textContent") == second
        page.press("ArrowDown")
        assert page.value(f"{active}.title") not in (first, second)
        page.press("Home")
        assert page.value(f"{active}.cellIndex") == 1

        closed = "document.querySelector('#sites').parentElement.querySelector('details')"
        assert page.value(f"{closed}.open") is False
        page.value(f"{closed}.querySelector('summary').focus()")
        page.press("Enter")
        assert page.value(f"{closed}.open") is True

        table = "document.querySelector('#sites').parentElement.querySelector('table.sorted')"
        page.value(f"{table}.tHead.rows[0].cells[5].querySelector('button').focus()")
        norms = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[5].textContent))"
        unsorted = page.value(norms)
        page.press("Enter")
        assert page.value(norms) == sorted(page.value(norms), reverse=True)
        page.press("Enter")
        assert page.value(norms) == sorted(page.value(norms))
        page.press("Enter")
        assert page.value(norms) == unsorted
        assert page.value("document.querySelectorAll('[aria-sort]').length") == 0
        assert page.complaints() == []


@needs_chromium
def test_chromium_filters_sorts_names_and_prints_what_is_folded_away(tmp_path) -> None:
    file = tmp_path / "report.html"
    report = make_report()
    sites = sites_of(12, 1, 4)
    target = report.plan.targets[0]
    targets = tuple(dataclasses.replace(target, site=dataclasses.replace(target.site, path=s.path)) for s in sites)
    plan = dataclasses.replace(report.plan, targets=targets)
    file.write_text(report_page(dataclasses.replace(report, plan=plan, statistics=AdapterStatistics("x", sites))))
    section = "document.querySelector('#sites').parentElement"
    rows = f"[...{section}.querySelectorAll('table.sorted tbody tr')].filter(row => !row.hidden)"
    shown = f"{rows}.map(row => row.cells[0].textContent)"
    with browser.open_browser() as page:
        page.open(file)
        in_order = page.value(shown)
        assert in_order == [site.path for site in sites]  # 2 before 10, though "10" < "2" as text
        page.value(f"{section}.querySelector('table.sorted button').click()")
        assert page.value(shown) == in_order
        page.value(f"{section}.querySelector('table.sorted button').click()")
        assert page.value(shown) == in_order[::-1]
        page.value(f"{section}.querySelector('input').focus()")
        page.call("Input.insertText", text="Layers.1  mlp")
        assert sorted(page.value(shown)) == sorted(path for path in in_order if "layers.1" in path)
        assert page.value(f"{section}.querySelector('output').textContent") == "3 of 12"
        box = f"{section}.querySelector('table.sorted').parentElement"
        page.value(f"{box}.style.height = '6em'; {box}.scrollTop = 99")
        assert page.value(f"{box}.scrollTop") > 0
        top = "getBoundingClientRect().top"
        assert page.value(f"{box}.querySelector('thead th').{top} - {box}.{top}") == 0  # its head stays in sight

        closed = "document.querySelectorAll('details:not([open])').length"
        before = page.value(closed)
        assert before > 0
        page.value("dispatchEvent(new Event('beforeprint'))")
        assert page.value(closed) == 0
        page.value("dispatchEvent(new Event('afterprint'))")
        assert page.value(closed) == before
        assert page.complaints() == []


@needs_chromium
def test_chromium_fits_long_names_on_a_small_screen(tmp_path) -> None:
    report = make_report()
    long = ".".join(["a_module_whose_name_has_many_words_in_it"] * 4)
    target = report.plan.targets[0]
    sites = tuple(dataclasses.replace(s, path=f"{long}.{i}.{long}") for i, s in enumerate(report.statistics.sites[:3]))
    targets = tuple(dataclasses.replace(target, site=dataclasses.replace(target.site, path=s.path)) for s in sites)
    plan = dataclasses.replace(report.plan, targets=targets)
    series = TrainingLog((Series("loss", ((1.0, 3.0),)), Series(long, ((1.0, 3.0), (2.0, 2.0)))))
    file = tmp_path / "report.html"
    file.write_text(
        report_page(dataclasses.replace(report, plan=plan, statistics=AdapterStatistics(long, sites), log=series))
    )
    with browser.open_browser() as page:
        for width in (1280, 390):
            page.open(file, width=width)
            assert page.value("document.documentElement.scrollWidth") <= width
            for table in (
                "table.grid",
                "table.sorted",
            ):  # numbers are seen beside the names, which stay when it scrolls
                first = f"document.querySelector('{table} tbody tr:not(:has(.stack)) td').getBoundingClientRect()"
                assert page.value(f"{first}.left") < width - 40, table
                box = f"document.querySelector('{table}').closest('.scroll')"
                page.value(f"{box}.scrollLeft = 500")
                head = f"document.querySelector('{table} tbody tr:not(:has(.stack)) th').getBoundingClientRect()"
                assert page.value(f"{head}.left") >= 0, table


@needs_chromium
def test_chromium_runs_nothing_that_a_name_says(tmp_path) -> None:
    """And without scripts, the tables are there."""
    report = make_report(model=EVIL, adapter=EVIL, notes=(EVIL, "javascript:alert(1)"))
    file = tmp_path / "report.html"
    file.write_text(report_page(report))
    injected_markup = file.with_name("forced.html")
    injected_markup.write_text(report_page(report).replace("<main", "<img src=http://127.0.0.1:9/x><main", 1))
    with browser.open_browser() as page:
        page.open(file)
        assert page.complaints() == []
        assert page.value("document.querySelectorAll('img').length") == 0
        assert page.value("document.scripts.length") == 1
        page.open(injected_markup)  # if anything got through, the policy would hold it
        assert any("Content Security Policy" in str(complaint) for complaint in page.complaints())
        page.open(file, scripts=False)
        assert page.value("document.querySelectorAll('table button').length") == 0
        assert page.value("document.querySelector('#sites').parentElement.querySelectorAll('tbody tr').length") > 3

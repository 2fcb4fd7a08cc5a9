"""make_plan: which site gets what, why each other gets none, and that every pattern must hit."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch
import zoo
from torch import fx, nn
from zoo import BY_NAME, STACK, fingerprint, injected, traced

import lora_fx
from lora_fx import LoraConfig, LoraFxWarning, Site, TargetError
from lora_fx.layouts import Experts, Layout, Matrix
from lora_fx.plan import PlannedRows, PlannedSite, Skipped, plan_adapters, scaling_at
from lora_fx.plan_sizes import BaseSize
from lora_fx.tables import Table

L0, L1 = "body.layers.0", "body.layers.1"


def plan_of(name: str = "stack", tracer: str = "trace", **options) -> lora_fx.Plan:
    return lora_fx.make_plan(traced(BY_NAME[name], tracer), LoraConfig(**{"r": 3, "lora_alpha": 5, **options}))


def paths(plan: lora_fx.Plan) -> list[str]:
    return [target.site.path for target in plan.targets]


@pytest.mark.parametrize("tracer", zoo.TRACERS)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["up"]}, [f"{L0}.up", f"{L1}.up"]),
        ({"target_modules": ["layers.1.up", "head"]}, [f"{L1}.up", "head"]),
        ({"target_modules": r".*\.1\..*"}, [f"{L1}.{n}" for n in ("q_proj", "up", "down")]),
        ({"target_modules": "all-linear"}, list(STACK.sites[:-1])),
        ({"target_modules": "ALL-Linear"}, list(STACK.sites[:-1])),
        (
            {"target_modules": "all-linear", "exclude_modules": ["down"]},
            [f"{i}.{n}" for i in (L0, L1) for n in ("q_proj", "up")],
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*0.*"},
            [f"{L1}.{n}" for n in ("q_proj", "up", "down")],
        ),
        ({"target_modules": ["up", "head"], "modules_to_save": ["head"]}, [f"{L0}.up", f"{L1}.up"]),
        ({"target_modules": ["up"], "layers_to_transform": 1}, [f"{L1}.up"]),
        ({"target_modules": ["up"], "layers_to_transform": [0, 1]}, [f"{L0}.up", f"{L1}.up"]),
        ({"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "layers"}, [f"{L0}.up"]),
        ({"target_modules": [f"{L0}.up", "down"], "layers_to_transform": [1]}, [f"{L0}.up", f"{L1}.down"]),
    ],
)
def test_what_is_adapted(options, expected: list[str], tracer: str) -> None:
    plan = plan_of(tracer=tracer, **options)
    assert paths(plan) == expected
    assert {s.path for s in plan.skipped} == set(STACK.sites) - set(expected)


def test_layers_at_the_root() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
            self.inner = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(7, 7)}) for _ in range(12))

        def forward(self, x):
            for block in self.blocks:
                x = block(x).tanh()
            for block in self.inner:
                x = block["q"](x).tanh()
            return x

    gm = lora_fx.trace(Root().eval(), torch.randn(3, 7), tracer="symbolic")
    options = {"target_modules": ["q"], "layers_to_transform": [1]}
    plan = lora_fx.make_plan(gm, LoraConfig(**options, layers_pattern="inner"))
    assert paths(plan) == ["inner.1.q"]  # and not inner.10, inner.11
    with pytest.raises(TargetError, match=r"layers_to_transform 1 .*no layer number was found.*give layers_pattern"):
        lora_fx.make_plan(gm, LoraConfig(**options))


def test_ranks_alphas_and_scalings() -> None:
    plan = plan_of(
        target_modules=["up", "down"],
        rank_pattern={"layers.1.up": 7, "down": 2},
        alpha_pattern={r"layers\.[1]\.(up|down)": 11, f"^{L0}.down": 2.5},
        use_rslora=True,
    )
    got = {t.site.path: (t.r, t.lora_alpha, t.scaling, t.parameters) for t in plan.targets}
    assert got == {
        f"{L0}.up": (3, 5, 5 / 3**0.5, 3 * 20),
        f"{L0}.down": (2, 2.5, 2.5 / 2**0.5, 2 * 20),
        f"{L1}.up": (7, 11, 11 / 7**0.5, 7 * 20),
        f"{L1}.down": (2, 11, 11 / 2**0.5, 2 * 20),
    }
    assert plan.parameters == sum(t.parameters for t in plan.targets)


def test_a_shared_weight_has_one_adapter() -> None:
    plan = plan_of("shared_parameter", target_modules=["a", "b"])
    assert [(t.site.path, t.shares_with, t.parameters) for t in plan.targets] == [("a", None, 42), ("b", "a", 0)]
    assert "same adapter as a" in str(plan)
    different = plan_of("shared_parameter", target_modules=["a", "b"], rank_pattern={"b": 2})
    assert [t.shares_with for t in different.targets] == [None, None]


def test_a_shared_module_is_meant_by_each_of_its_names() -> None:
    for target in (["a"], ["b"], ["a", "b"], "a", "b"):
        assert paths(plan_of("shared_module", target_modules=target)) == ["a"]
    with pytest.raises(TargetError, match="leaves no site"):
        plan_of("shared_module", target_modules=["a"], exclude_modules=["b"])


def test_why_each_other_site_gets_none() -> None:
    plan = plan_of(
        target_modules=["up", "down"],
        exclude_modules=["layers.1.down"],
        modules_to_save=["head"],
        layers_to_transform=[1],
    )
    assert {s.path: s.reason for s in plan.skipped} == {
        f"{L0}.q_proj": "not in target_modules",
        f"{L0}.up": "layer 0 is not in layers_to_transform",
        f"{L0}.down": "layer 0 is not in layers_to_transform",
        f"{L1}.q_proj": "not in target_modules",
        f"{L1}.down": "excluded by exclude_modules",
        "head": "trained in full by modules_to_save",
    }
    everything = plan_of(target_modules="all-linear")
    assert {s.path: s.reason for s in everything.skipped} == {"head": "output head, which all-linear leaves out"}


def test_the_plan_prints() -> None:
    text = str(plan_of(target_modules=["up"], modules_to_save=["head"], rank_pattern={"layers.1.up": 7}))
    for fragment in (
        "2 sites to adapt, 200 parameters",
        "body.layers.1.up",
        "7 → 13",
        "not adapted",
        "why",
        "2 tensors of the base",
    ):
        assert fragment in text, text
    assert "(root)" in str(plan_of("root", target_modules=[""]))


def test_a_plan_is_a_frozen_value_and_changes_nothing() -> None:
    gm = traced(STACK)
    before = fingerprint(gm)
    first, second = plan_of(target_modules=["up"]), plan_of(target_modules=["up"])
    assert fingerprint(gm) == before
    assert first == second
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.targets = ()


def test_injecting_a_plan_is_injecting_its_config() -> None:
    gm = traced(STACK)
    plan = plan_of(target_modules=["up"], modules_to_save=["head"], use_rslora=True)
    torch.manual_seed(0)
    by_plan = lora_fx.inject(gm, plan)
    torch.manual_seed(0)
    by_config = lora_fx.inject(gm, plan.config)
    assert not lora_fx.compare_graphs(by_plan, by_config)


def test_an_edited_plan_is_followed() -> None:
    plan = plan_of(target_modules=["up"])
    fewer = dataclasses.replace(plan, targets=plan.targets[1:])
    adapted = lora_fx.inject(traced(STACK), fewer)
    assert set(zoo.lora_tensors(adapted)) == {f"{L1}.up.lora_{half}.default.weight" for half in "AB"}


# Every pattern must hit -----------------------------------------------------------------------------

MISSES = [
    (
        {"target_modules": ["1.q_porj"]},
        ["target_modules '1.q_porj' matched none", "Did you mean '1.q_proj' or '0.q_proj'?"],
    ),
    (
        {"target_modules": ["up", "q_porj"]},
        ["target_modules 'q_porj' matched none of 7 sites", "Did you mean 'q_proj'?", "find_sites(gm)"],
    ),
    ({"target_modules": ["p"]}, ["target_modules 'p'"]),
    ({"target_modules": "up"}, ["target_modules 'up'", "regular expression on whole names", "give a list: ['up']"]),
    ({"target_modules": [".*up"]}, ["target_modules '.*up'", "as a string, not in a list"]),
    ({"target_modules": ["all-linear"]}, ["target_modules='all-linear'"]),
    ({"target_modules": "all_linear"}, ["target_modules 'all_linear'"]),
    ({"target_modules": ["norm"]}, ["target_modules 'norm'"]),
    ({"target_modules": None}, ["target_modules is not given", "target_modules='all-linear'", "7 sites"]),
    ({"target_modules": []}, ["no site to adapt"]),
    ({"target_modules": ["up"], "exclude_modules": ["layers.7.up"]}, ["exclude_modules 'layers.7.up'", "Did you mean"]),
    ({"target_modules": ["up"], "exclude_modules": "up"}, ["exclude_modules 'up'", "regular expression"]),
    (
        {"target_modules": ["up"], "exclude_modules": ["up"]},
        ["leaves no site to adapt out of 7 (body.layers.0.q_proj, ", ": excluded by exclude_modules"],
    ),
    ({"target_modules": ["up"], "modules_to_save": ["haed"]}, ["modules_to_save 'haed'", "Did you mean 'head'"]),
    ({"target_modules": ["up"], "modules_to_save": ["ead"]}, ["modules_to_save 'ead'"]),  # PEFT has no dot there
    (
        {"target_modules": ["up"], "rank_pattern": {"down": 2}},
        ["rank_pattern 'down' matched none of the 2 sites to adapt"],
    ),
    ({"target_modules": ["up"], "alpha_pattern": {"upp": 2}}, ["alpha_pattern 'upp'", "Did you mean"]),
    (
        {"target_modules": ["up"], "rank_pattern": {"up": 2, "layers.0.up": 7}},
        ["rank_pattern 'layers.0.up'", "the first match counts"],
    ),
    ({"target_modules": ["up"], "layers_to_transform": [0, 7]}, ["layers_to_transform 7", "numbers found: [0, 1]"]),
    ({"target_modules": ["head"], "layers_to_transform": [0]}, ["layers_to_transform 0", "no layer number was found"]),
    ({"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "h"}, ["layers_to_transform 0"]),
    ({"target_modules": ["head"], "modules_to_save": ["head"]}, ["no site to adapt", "modules_to_save"]),
]


@pytest.mark.parametrize(("options", "fragments"), MISSES)
def test_every_pattern_must_hit(options, fragments: list[str]) -> None:
    gm = traced(STACK)
    before = fingerprint(gm)
    for verb in (lora_fx.make_plan, lora_fx.inject):
        with pytest.raises(TargetError) as caught:
            verb(gm, LoraConfig(**options))
        for fragment in fragments:
            assert fragment in str(caught.value)
    assert fingerprint(gm) == before


def test_a_graph_without_sites() -> None:
    gm = lora_fx.trace(nn.Conv1d(3, 5, 1).eval(), torch.randn(2, 3, 7))
    with pytest.raises(TargetError, match="no linear, and all-linear means no other"):
        lora_fx.make_plan(gm, LoraConfig(target_modules="all-linear"))


def test_a_model_that_is_only_a_head() -> None:
    with pytest.raises(TargetError, match=r"leaves no site to adapt out of 1 \(\(root\): output head"):
        plan_of("root", target_modules="all-linear")


# Warnings -------------------------------------------------------------------------------------------


def test_under_no_grad() -> None:
    with pytest.warns(LoraFxWarning, match="'frozen' runs under torch.no_grad"):
        plan_of("no_grad", target_modules=["frozen"])
    plan = lora_fx.make_plan(
        lora_fx.trace(_Headed().eval(), torch.randn(3, 7)), LoraConfig(target_modules="all-linear")
    )
    assert paths(plan) == ["middle"]
    assert {s.path: s.reason for s in plan.skipped}["first"].startswith("runs under torch.no_grad")


class _Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 5)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x).tanh()
        return self.head(self.middle(x).tanh())


def test_modules_to_save_means_dotted_suffixes() -> None:
    """PEFT's rule has no dot: `head` would wrap `overhead` too."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.overhead, self.head, self.fc = nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(7, 7)

        def forward(self, x):
            return self.head(self.fc(self.overhead(x).tanh()).tanh())

    gm = lora_fx.trace(Model().eval(), torch.randn(3, 7))
    plan = lora_fx.make_plan(gm, LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    assert sorted(plan.trained) == ["head.bias", "head.weight"]
    adapted = lora_fx.inject(gm, plan)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad and "lora" not in n} == set(plan.trained)
    assert injected(STACK, traced(STACK), targets=["up"], modules_to_save=["body.layers.0.norm"])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("name", ["mlp", "tied_head", "products", "mixed", "llama", "gpt2"])
def test_it_counts_what_is_trained(name: str, options: dict[str, Any]) -> None:
    """A and B, each shared pair once, and with them the magnitudes or the biases of B."""
    case = BY_NAME[name]
    gm = traced(case)
    plan = lora_fx.make_plan(gm, {"r": 3, "target_modules": case.targeted, **options})
    assert plan.parameters == lora_fx.trainable_parameters(lora_fx.inject(gm, plan))[0]
    variant = {"use_dora": " with DoRA", "lora_bias": " with lora_bias"}.get(next(iter(options), ""), "")
    assert f"to adapt{variant}, {plan.parameters:,} parameters" in str(plan)


# What a plan says -------------------------------------------------------------------------------------


def planned(path: str, layout: Layout | None = None, **fields: Any) -> PlannedSite:
    """A planned linear of 7 → 5; fields of the site beside those of the plan."""
    own = {name: fields.pop(name) for name in ("shares_with", "by_parameter") if name in fields}
    plain = {"op": "linear", "weight": f"{path}.weight", "bias": None, "dtype": torch.float32}
    site = Site(path, layout=layout or Matrix(5, 7), **(plain | {"layer_index": None, "calls": 1} | fields))
    return PlannedSite(site, 3, 5, 5 / 3, **own)


@pytest.mark.parametrize(
    ("fields", "cells"),
    [
        ({}, ["7 → 5", "36"]),
        ({"layout": Matrix(7, 5, True)}, ["7 → 5", "36", "stored (in, out)"]),
        ({"layout": Matrix(7, 5, True), "is_linear": False}, ["7 → 5", "36"]),
        ({"shares_with": "b"}, ["7 → 5", "0", "same adapter as b"]),
        ({"is_on_weight": True}, ["7 → 5", "36", "adapted on the weight"]),
        ({"calls": 2}, ["7 → 5", "36", "called 2 times"]),
        ({"tied_with": ("b", "c")}, ["7 → 5", "36", "tied with b, c"]),
        ({"layout": Experts((2, 1000, 7))}, ["2 × 7 → 1000", "6,042"]),
    ],
    ids=str,
)
def test_what_is_printed_of_a_planned_site(fields: dict[str, Any], cells: list[str]) -> None:
    row = str(lora_fx.Plan(LoraConfig(target_modules=["a"]), (planned("a", **fields),), ())).splitlines()[4]
    size, parameters, *remarks = cells
    assert re.split(r" {2,}", row) == ["a", "linear", size, "3", "1.66667", parameters, *remarks]


def test_a_plan_counts_each_number_once() -> None:
    targets = (planned("a"), planned("b", shares_with="a"), planned("c", Experts((2, 5, 7))))
    assert [target.parameters for target in targets] == [36, 0, 72]
    assert lora_fx.Plan(LoraConfig(target_modules=["a"]), targets, ()).parameters == 108


def test_the_scaling_at_a_site_is_that_of_its_patterns() -> None:
    config = LoraConfig(target_modules=["b"], r=3, lora_alpha=5, rank_pattern={"b": 2}, alpha_pattern={"c": 7})
    assert [scaling_at(planned(path).site, config) for path in "abc"] == [5 / 3, 5 / 2, 7 / 3]


def test_a_plan_prints_what_there_is_and_no_more() -> None:
    config, target = LoraConfig(target_modules=["a"]), planned("a")
    counts, _ = lora_fx.Plan(config, (target,), ()).blocks()
    assert counts == "1 site to adapt, 36 parameters"
    rows = PlannedRows(target.site, (4, 2), ("a",))
    skipped = (Skipped("", "too small"), Skipped("b", "excluded"))
    _, _, trained, tokens, table = lora_fx.Plan(config, (target,), skipped, ("c.bias", "d.bias"), (rows,)).blocks()
    assert trained == "2 tensors of the base trained in full: c.bias, d.bias"
    assert tokens == "2 rows of a trained in full"
    assert isinstance(table, Table)
    assert (table.header, table.rows) == (("not adapted", "why"), [("(root)", "too small"), ("b", "excluded")])


def test_what_a_plan_costs() -> None:
    targets = (planned("a", calls=2), planned("b", shares_with="a"), planned("c", is_on_weight=True))
    base = BaseSize(parameters=100, bytes=400, products=35)
    plan = lora_fx.Plan(LoraConfig(target_modules=["a"]), targets, (), base=base, trained_parameters=4)
    cost = plan.cost(devices=3, adapter_bytes=2, optimizer_bytes=5)
    low_rank = (2 + 1) * 3 * (7 + 5)  # W + ΔW of c has no A and B of each token, nor an input to keep
    assert (cost.parameters, cost.forward, cost.kept) == (36 + 36 + 4, 2 * 35 + 2 * low_rank, 2 * (2 * 3 + 3))
    assert (cost.devices, cost.weights, cost.adapter, cost.optimizer) == (3, 134, 51, 127)


# On graphs that need no tracing -----------------------------------------------------------------------


class Tied(nn.Module):
    """One table under three names, looked up and twice a head, and a site of each other kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.experts = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(2, 4, 4))
        self.head, self.second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.conv, self.up = nn.Conv1d(4, 4, 1, groups=2), nn.ConvTranspose1d(4, 4, 1)
        self.head.weight = self.second.weight = self.words.weight
        self.scale = nn.Parameter(torch.randn(4, 4))

    def forward(self, input_ids):
        x = torch.bmm(self.fc(self.words(input_ids)), self.experts)
        x = self.up(self.conv(x)) + torch.cumsum(self.scale, 0)
        return self.head(x), self.second(x.tanh())


@functools.cache
def tied() -> fx.GraphModule:
    return fx.symbolic_trace(Tied().eval())


def owners(**options: Any) -> dict[str, str | None]:
    """{path: whose A and B it has} of a plan for the model above."""
    plan = lora_fx.make_plan(tied(), LoraConfig(**{"r": 2, "lora_alpha": 5, **options}))
    skipped = {skipped.path for skipped in plan.skipped}
    assert not skipped & set(paths(plan))
    assert skipped | set(paths(plan)) >= {site.path for site in lora_fx.find_sites(tied())}
    return {target.site.path: target.shares_with for target in plan.targets}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["words"]}, {"words": None}),
        ({"target_modules": ["words", "head", "second"]}, {"words": None, "head": None, "second": "head"}),
        (
            {"target_modules": ["second", "fc"], "ensure_weight_tying": True},
            {"words": None, "fc": None, "head": "words", "second": "head"},
        ),
        ({"target_modules": ["fc"], "ensure_weight_tying": True}, {"fc": None}),
        (
            {"target_modules": ["head", "second"], "rank_pattern": {"second": 3}},
            {"head": None, "second": None},
        ),
        (
            {"target_modules": ["head", "second"], "alpha_pattern": {"second": 3}},
            {"head": None, "second": None},
        ),
        ({"target_modules": ["head[0:3]"], "ensure_weight_tying": True}, {"head[0:3]": None}),
        (
            {"target_modules": ["words", "head[0:3]"], "exclude_modules": ["head[0:3]"], "ensure_weight_tying": True},
            {"words": None, "head": "words", "second": "head"},
        ),
    ],
    ids=str,
)
def test_who_shares_an_adapter_with_whom(options: dict[str, Any], expected: dict[str, str | None]) -> None:
    assert owners(**options) == expected


def test_sites_that_share_an_adapter_read_the_same_tensors() -> None:
    config = LoraConfig(target_modules=["words"], r=2, ensure_weight_tying=True)
    adapted = lora_fx.inject(tied(), config)
    assert len(lora_fx.lora_parameters(adapted)) == 2
    sites = adapted.meta["lora_fx"].adapters["default"].sites
    assert {path: (site.lora_a, site.lora_b) for path, site in sites.items()} == dict.fromkeys(
        ("words", "head", "second"), ("words.lora_A.default.weight", "words.lora_B.default.weight")
    )


def test_files_plan_each_name_of_a_tied_weight_by_itself() -> None:
    """They name sites that need not be there, and may hold two adapters for one weight."""
    names = ["words", "head", "second", "nowhere"]
    config = LoraConfig(target_modules=names, ensure_weight_tying=True)
    plan = plan_adapters(tied(), config, every_pattern_hits=False, share_tied=False)
    assert [(target.site.path, target.shares_with) for target in plan.targets] == [(name, None) for name in names[:3]]
    with pytest.raises(TargetError, match="target_modules 'nowhere'"):
        plan_adapters(tied(), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["fc[0:3]", "fc[2:4]"]}, "'fc.0:3.' and 'fc.2:4.', which share the outputs 2 to 2"),
        ({"target_modules": ["fc[0:3]", "fc"]}, "which share the outputs 0 to 2"),
        ({"target_modules": ["conv"], "r": 3}, "'conv' cannot be adapted with this rank: r=3 is no multiple of its 2"),
        ({"target_modules": ["experts"], "use_dora": True}, "'experts' cannot be adapted: DoRA .* three dimensions"),
        ({"target_modules": ["up"], "use_dora": True}, "'up' cannot be adapted: DoRA .* a transposed convolution"),
        ({"target_modules": ["words"], "lora_bias": True}, "'words' cannot be adapted: lora_bias .* this is embedding"),
        ({"target_modules": ["experts"], "lora_bias": True}, "'experts' cannot be adapted: .* this is bmm"),
        ({"target_modules": ["scale"], "lora_bias": True}, "'scale' cannot be adapted: .* this is cumsum"),
        (
            {"target_modules": ["words", "second"], "ensure_weight_tying": True, "alpha_pattern": {"second": 3}},
            "one adapter, and rank_pattern or alpha_pattern gives them two",
        ),
        (
            {"target_modules": ["words"], "ensure_weight_tying": True, "modules_to_save": ["head"]},
            "ensure_weight_tying adapts 'head' with what it is tied to, and modules_to_save trains it",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        owners(**options)


def test_what_the_graph_applies_and_cannot_be_adapted_is_no_target() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.pair = nn.Linear(4, 4), nn.Bilinear(4, 4, 4)
            self.coarse = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
            self.head = nn.Linear(4, 4)
            self.head.weight = self.fc.weight

        def forward(self, x):
            return self.head(self.pair(self.fc(x), x)) + torch.nn.functional.linear(x, self.coarse)

    gm = fx.symbolic_trace(Model())
    for options, message in (
        (
            {"target_modules": ["coarse"]},
            "target_modules means 'coarse', which cannot be adapted: coarse is torch.int8",
        ),
        (
            {"target_modules": "fc|pair"},
            "target_modules means 'pair', whose weight is applied by pair, which this",
        ),
        ({"target_modules": ["fc"], "modules_to_save": ["head"]}, "head.weight is to be trained in full, but is tied"),
    ):
        with pytest.raises(TargetError, match=message):
            lora_fx.make_plan(gm, LoraConfig(**options))
        plan = plan_adapters(gm, LoraConfig(target_modules=["fc"]), every_pattern_hits=False)
        assert [each.reason for each in plan.skipped if each.path == "coarse"] == [
            "cannot be adapted: coarse is torch.int8, which LoRA cannot be added to"
        ]


def test_what_lora_bias_and_dora_are_for() -> None:
    assert list(owners(target_modules=["fc", "conv", "up", "head"], lora_bias=True)) == ["fc", "conv", "up", "head"]
    assert list(owners(target_modules=["fc", "conv", "words"], use_dora=True)) == ["words", "fc", "conv"]


def test_target_parameters_mean_a_weight_as_it_is_stored() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.w = nn.Linear(7, 7), nn.Parameter(torch.randn(7, 5))

        def forward(self, x):
            return self.fc(x) @ self.w

    gm = fx.symbolic_trace(Model())
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["fc"], "rank_pattern": {"w": 2}}
    fc, w = lora_fx.make_plan(gm, LoraConfig(**options, target_parameters=["w"])).targets
    assert (fc.by_parameter, fc.site.op, fc.r) == (False, "linear", 3)
    assert (w.by_parameter, w.site.op, w.site.layout, w.r, w.scaling) == (True, "parameter", Matrix(7, 5), 2, 2.5)
    options["target_modules"] = ["fc", "w"]
    _, by_module = lora_fx.make_plan(gm, LoraConfig(**options)).targets
    assert (by_module.by_parameter, by_module.site.op, by_module.site.layout) == (False, "matmul", Matrix(7, 5, True))


# Rows of embeddings -----------------------------------------------------------------------------------


class Lookups(nn.Module):
    """Tables that are looked up by inputs of those names; a linear takes them too."""

    def __init__(self, **tables: str) -> None:
        super().__init__()
        self.tables, self.fc = tables, nn.Linear(3, 3)
        for name in tables:
            self.add_module(name, nn.Embedding(5, 3))

    def forward(self, input_ids, positions, decoder_input_ids):
        inputs = {"input_ids": input_ids, "positions": positions, "decoder_input_ids": decoder_input_ids}
        found = [getattr(self, name)(inputs[source]) for name, source in self.tables.items()]
        return self.fc(input_ids) + self.fc(decoder_input_ids) + sum(found)


def rows_of(gm: fx.GraphModule, rows: Any, **options: Any) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    config = LoraConfig(**{"target_modules": ["fc"], "trainable_token_indices": rows} | options)
    return [(found.site.path, found.rows, found.readers) for found in lora_fx.make_plan(gm, config).tokens]


@pytest.mark.parametrize(
    ("tables", "means"),
    [
        ({"a": "positions"}, "a"),  # the only one
        ({"a": "positions", "b": "input_ids"}, "b"),
        ({"a": "positions", "b": "decoder_input_ids"}, "b"),
        ({"a": "input_ids", "embed_tokens": "positions", "c": "positions"}, "embed_tokens"),
        ({"a": "positions", "b": "positions"}, None),
        ({"a": "input_ids", "b": "decoder_input_ids"}, None),
    ],
    ids=str,
)
def test_which_table_a_list_of_rows_means(tables: dict[str, str], means: str | None) -> None:
    gm = fx.symbolic_trace(Lookups(**tables))
    if means is not None:
        assert rows_of(gm, [1, 4]) == [(means, (1, 4), (means,))]
        return
    with pytest.raises(TargetError, match=r"which embedding it means is not clear; name it: .* There are a, b"):
        rows_of(gm, [1, 4])


def test_rows_of_tables_by_name() -> None:
    gm = fx.symbolic_trace(Lookups(a="positions", b="input_ids"))
    assert rows_of(gm, {"b": [4, 0], "a": [1]}) == [("b", (4, 0), ("b",)), ("a", (1,), ("a",))]
    assert rows_of(tied(), {"words": [5]}) == [("words", (5,), ("words", "head", "second"))]
    assert rows_of(gm, None) == []
    for rows, options, message in (
        ({"fc": [1]}, {}, "names 'fc', which is no embedding"),
        ({"a": [5]}, {}, "holds 5, and 'a' has 5 rows"),
        ({"a": [1]}, {"modules_to_save": ["a"]}, "modules_to_save trains 'a' in full"),
    ):
        with pytest.raises(TargetError, match=message):
            rows_of(gm, rows, **options)
    assert rows_of(gm, {"a": [1]}, modules_to_save=["b"]) == [("a", (1,), ("a",))]


def test_what_is_trained_in_full_is_counted() -> None:
    gm = fx.symbolic_trace(Lookups(a="positions", b="input_ids"))  # tables of 5 rows of 3
    options = {"target_modules": ["fc"], "trainable_token_indices": {"a": [4, 0]}, "modules_to_save": ["b"]}
    assert lora_fx.make_plan(gm, options).trained_parameters == 2 * 3 + 5 * 3
    assert lora_fx.make_plan(gm, {"target_modules": ["fc"]}).trained_parameters == 0

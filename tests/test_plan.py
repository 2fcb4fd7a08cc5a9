"""make_plan: which site gets what, why each other gets none, and that every pattern must hit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import zoo
from torch import nn
from zoo import BY_NAME, STACK, fingerprint, injected, traced

import lora_fx
from lora_fx import LoraConfig, LoraFxWarning, TargetError

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
        {"target_modules": ["up", "q_porj"]},
        ["target_modules 'q_porj' matched none of 7 sites", "Did you mean", "q_proj", "find_sites(gm)"],
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
        ["leaves no site to adapt out of 7", "excluded by exclude_modules"],
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

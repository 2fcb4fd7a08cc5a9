"""One tensor under several names, read in several ways: told by memory, adapted once, folded rightly or refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx import FoldError, LoraConfig, LoraFxWarning
from lora_fx.aliasing import is_same_view, overlapping_names

X = torch.randn(3, 7)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _no_warning_of_untying() -> None:
    warnings.filterwarnings("ignore", message=".*was tied with.*", category=LoraFxWarning)


def randomise(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_(std=0.3)
    return gm


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return zoo.distance([a.detach()], [b.detach()])


def assert_folds(gm: torch.fx.GraphModule, x: torch.Tensor, base: torch.nn.Module) -> torch.fx.GraphModule:
    """Folded equals adapted, and adapted is something else than the base."""
    with torch.no_grad():
        expected = gm(x)
        folded = lora_fx.fold(gm)
        assert distance(expected, folded(x)) < 64 * EPS
        assert distance(expected, base(x)) > 1e-3
    return folded


# Memory ---------------------------------------------------------------------------------------------


def test_overlap_is_told_by_elements_and_not_by_storage() -> None:
    flat = torch.randn(30)
    tensors = {
        "a": flat[:12].view(3, 4),
        "b": flat[12:24].view(3, 4),
        "a again": flat[:12].view(3, 4),
        "over both": flat[8:16],
        "other": torch.randn(4),
        "nothing": flat[5:5],
        "a transposed": flat[:12].view(3, 4).t(),
    }
    assert overlapping_names(tensors) == {
        "a": ["a", "a again", "over both", "a transposed"],
        "b": ["b", "over both"],
        "a again": ["a", "a again", "over both", "a transposed"],
        "over both": ["a", "b", "a again", "over both", "a transposed"],
        "other": ["other"],
        "nothing": ["nothing"],
        "a transposed": ["a", "a again", "over both", "a transposed"],
    }
    assert is_same_view(tensors["a"], tensors["a again"])
    assert not is_same_view(tensors["a"], tensors["a transposed"])


@pytest.mark.parametrize("tracer", zoo.TRACERS)
def test_parameters_side_by_side_in_one_storage_are_not_tied(tracer: str) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    gm = zoo.trace_with(tracer, model, (X,), {})
    assert [site.tied_with for site in lora_fx.find_sites(gm)] == [(), ()]
    adapted = randomise(lora_fx.inject(gm, LoraConfig(target_modules=["0"], modules_to_save=["2"])))
    assert_folds(adapted, X, model)
    lora_fx.fold(adapted, inplace=True)


# Ties -----------------------------------------------------------------------------------------------


class FunctionalTie(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dec = nn.Linear(7, 7), nn.Linear(7, 7)
        self.dec.weight = self.fc.weight

    def forward(self, x):
        return F.linear(torch.tanh(self.fc(x)), self.dec.weight.t())


class EmbeddingAndRaw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.w = self.emb.weight

    def forward(self, ids):
        return F.linear(torch.tanh(self.emb(ids)), self.w)


class ThreeNames(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        parts = {"a": nn.Linear(7, 7, bias=False), "b": nn.Linear(7, 7, bias=False), "c": nn.Embedding(7, 7)}
        for name in order:
            setattr(self, name, parts[name])
        self.b.weight = self.c.weight = self.a.weight

    def forward(self, ids):
        return self.b(torch.tanh(self.a(torch.tanh(self.c(ids)))))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 7)

    def forward(self, x):
        from torch._higher_order_ops import while_loop

        def body(k, z):
            return k + 1, torch.tanh(F.linear(z, self.fc.weight))

        return while_loop(lambda k, z: k < 2, body, (torch.tensor(0), torch.tanh(self.fc(x))))[1]


IDS = torch.tensor([0, 3, 6, 2])


@pytest.mark.parametrize("tracer", zoo.TRACERS)
@pytest.mark.parametrize(
    ("make", "x"), [(FunctionalTie, X), (EmbeddingAndRaw, IDS), (lambda: ThreeNames("acb"), IDS)], ids="fec"
)
def test_each_site_of_a_tied_weight_folds_alone(tracer: str, make, x: torch.Tensor) -> None:
    model = make().eval()
    gm = zoo.trace_with(tracer, model, (x,), {})
    for site in lora_fx.find_sites(gm):
        config = LoraConfig(target_modules=[site.path], r=2, lora_alpha=5)
        assert_folds(randomise(lora_fx.inject(gm, config)), x, model)


@pytest.mark.parametrize("tracer", zoo.TRACERS)
@pytest.mark.parametrize("order", ["abc", "acb", "bca", "cab"])
def test_two_adapters_on_two_names_of_a_weight_that_a_third_reads(tracer: str, order: str) -> None:
    model = ThreeNames(order).eval()
    gm = zoo.trace_with(tracer, model, (IDS,), {})
    two = lora_fx.inject(gm, LoraConfig(target_modules=["a"], r=2), adapter_name="one")
    two = randomise(lora_fx.inject(two, LoraConfig(target_modules=["b"], r=3), adapter_name="two"))
    assert_folds(two, IDS, model)
    ranks = LoraConfig(target_modules=["a", "b"], r=2, rank_pattern={"b": 3})
    assert_folds(randomise(lora_fx.inject(gm, ranks)), IDS, model)


def test_a_reader_inside_a_loop_keeps_the_base() -> None:
    model = Loop().eval()
    gm = lora_fx.inject(lora_fx.trace(model, (X,)), LoraConfig(target_modules=["fc"], r=2))
    assert_folds(randomise(gm), X, model)
    with pytest.raises(FoldError, match="also read"):
        lora_fx.fold(gm, inplace=True)


def test_a_partial_fold_that_would_rename_another_adapters_site_is_refused() -> None:
    gm = zoo.trace_with("strict", EmbeddingAndRaw().eval(), (IDS,), {})
    two = lora_fx.inject(gm, LoraConfig(target_modules=["w"]), adapter_name="one")
    two = randomise(lora_fx.inject(two, LoraConfig(target_modules=["w"]), adapter_name="two"))
    code = two.code
    with pytest.raises(FoldError, match="fold all adapters at once"):
        lora_fx.fold(two, adapters="one")
    assert two.code == code
    assert_folds(two, IDS, EmbeddingAndRaw().eval())


def test_a_folded_tied_head_is_not_tied_again_by_another_dtype() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.emb(ids).to(self.head.weight.dtype)))

    model = Tied().eval()
    gm = lora_fx.inject(lora_fx.trace(model, (IDS,)), LoraConfig(target_modules=["head"], r=2))
    folded = lora_fx.fold(randomise(gm))
    expected = folded(IDS)
    with pytest.raises(lora_fx.GraphError, match="a fold that untied a weight"):
        folded.double()
    assert torch.equal(folded(IDS), expected)


def test_edits_by_hand_are_not_dropped_by_another_dtype() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return torch.tanh(self.fc(x).to(self.fc.weight.dtype))

    model = Casts().eval()
    gm = copy.deepcopy(lora_fx.trace(model, (X,)))
    node = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.tanh.default)
    node.target = torch.ops.aten.sin.default
    gm.recompile()
    with pytest.raises(lora_fx.GraphError, match="edited since it was traced"):
        gm.double()
    assert gm.get_parameter("fc.weight").dtype == torch.float32


# What else views a weight, and where a name may lie ---------------------------------------------------


def test_folding_in_place_does_not_write_through_a_buffer() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)
            self.register_buffer("v", self.fc.weight.detach())

        def forward(self, x):
            return self.fc(x) + torch.tanh(x @ self.v)

    model = Viewed().eval()
    gm = randomise(lora_fx.inject(lora_fx.trace(model, (X,)), LoraConfig(target_modules=["fc"])))
    assert_folds(gm, X, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FoldError, match="'v' views its memory"):
        lora_fx.fold(gm, inplace=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_site_at_the_root_has_an_adapter_of_its_own() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.randn(7, 7)), nn.Linear(7, 5)

        def forward(self, x):
            return self.fc(F.linear(x, self.weight))

    model = Root().eval()
    config = LoraConfig(target_modules=["", "fc"], r=2, rank_pattern={"fc": 3})
    gm = randomise(lora_fx.inject(lora_fx.trace(model, (X,)), config))
    assert gm.get_parameter("fc.lora_A.default.weight").shape == (3, 7)
    assert gm.get_parameter("lora_A.default.weight").shape == (2, 7)
    assert_folds(gm, X, model)


def test_a_parameter_that_a_hook_applies_is_not_the_hooked_modules_own() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(7, 7), nn.Parameter(torch.randn(5, 7))
            self.fc.register_forward_hook(lambda module, args, out: F.linear(torch.tanh(out), self.other))

        def forward(self, x):
            return self.fc(x)

    model = Hooked().eval()
    gm = lora_fx.trace(model, (X,))
    assert [(site.path, site.calls) for site in lora_fx.find_sites(gm)] == [("fc", 1), ("other", 1)]
    assert_folds(randomise(lora_fx.inject(gm, LoraConfig(target_modules=["fc"]))), X, model)


def test_a_forward_replaced_on_the_instance_is_refused_where_it_is_hidden() -> None:
    model = nn.Sequential(nn.Linear(7, 7)).eval()
    forward = model[0].forward
    model[0].forward = lambda x: torch.tanh(forward(x)) * 3
    with pytest.raises(lora_fx.TargetError, match="replaced on the instance"):
        lora_fx.inject(torch.fx.symbolic_trace(model), LoraConfig(target_modules=["0"]))
    assert_folds(randomise(lora_fx.inject(lora_fx.trace(model, (X,)), LoraConfig(target_modules=["0"]))), X, model)


def test_a_weight_that_is_fed_to_another_op_with_a_delta_is_read_there() -> None:
    """Folding one adapter unties the weight from the op that another adapter feeds W + its delta to."""

    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7, bias=False)
            self.w = self.fc.weight

        def forward(self, x):
            return torch.tanh(self.fc(x)) + torch.cumsum(self.w, 0)[-1]

    x, model = torch.randn(3, 7), Fed().eval()
    gm = lora_fx.inject(lora_fx.trace(model, x), LoraConfig(target_modules=["w"]), adapter_name="one")
    gm = lora_fx.inject(gm, LoraConfig(target_modules=["fc"]), adapter_name="two")
    zoo.randomise(zoo.randomise(gm, "one"), "two")
    with pytest.warns(LoraFxWarning, match="untied"):
        folded = lora_fx.fold(gm, adapters="two")
    assert lora_fx.adapter_names(folded) == ("one",)
    torch.testing.assert_close(folded(x), gm(x), rtol=1e-5, atol=1e-5)

"""compare_graphs and assert_equivalent: what they see, and that they can fail."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn
from zoo import BY_NAME, injected, randomise, traced

import lora_fx
from lora_fx import GraphError, assert_equivalent, compare_graphs

MLP = BY_NAME["mlp"]


def test_a_graph_is_the_same_as_itself_and_as_its_copy() -> None:
    for case in (MLP, BY_NAME["cond"], BY_NAME["tied_head"], BY_NAME["modes_both"]):
        gm = traced(case)
        for other in (gm, copy.deepcopy(gm)):
            diff = compare_graphs(gm, other)
            assert not diff
            assert diff.same_structure
            assert str(diff) == "the graphs are the same"


def test_values_are_compared_by_their_bits() -> None:
    gm = copy.deepcopy(traced(MLP))
    with torch.no_grad():
        gm.get_parameter("fc1.bias")[0] = 0.0
    twin = copy.deepcopy(gm)
    with torch.no_grad():
        twin.get_parameter("fc1.bias")[0] = -0.0
    diff = compare_graphs(gm, twin)
    assert (diff.values, diff.same_structure, bool(diff)) == (("fc1.bias",), True, True)
    assert str(diff) == "other values: fc1.bias"
    with torch.no_grad():
        for module in (gm, twin):
            module.get_parameter("fc1.bias")[0] = float("nan")
    assert not compare_graphs(gm, twin)


def test_nodes_and_keys_are_named() -> None:
    gm = traced(MLP)
    adapted = injected(MLP, gm)
    diff = compare_graphs(gm, adapted)
    assert not diff.same_structure
    assert diff.missing_keys == ()
    assert len(diff.unexpected_keys) == 4
    assert "fc1.lora_A.default.weight" in str(diff)
    assert compare_graphs(adapted, gm).missing_keys == diff.unexpected_keys
    assert any("linear" in line for line in diff.nodes)


def test_sub_graphs_are_compared() -> None:
    gm = traced(BY_NAME["cond"])
    twin = copy.deepcopy(gm)
    body = next(m for _, m in twin.named_modules() if isinstance(m, torch.fx.GraphModule) and m is not twin)
    node = next(n for n in body.graph.nodes if n.target is torch.ops.aten.linear.default)
    node.args = (node.args[0], node.args[1])
    body.recompile()
    diff = compare_graphs(gm, twin)
    assert any("linear" in line and "graph_0" in line for line in diff.nodes)


def test_the_other_mode_is_compared_too() -> None:
    """Two graphs that agree in the shown mode only are not the same graph."""
    case = BY_NAME["modes_both"]
    gm = traced(case)
    twin = copy.deepcopy(gm).train()
    node = next(n for n in twin.graph.nodes if n.target is torch.ops.aten.dropout.default)
    node.args = (node.args[0], 0.9, True)
    twin.recompile()
    twin.eval()
    assert compare_graphs(gm, twin)


def test_constants_that_are_no_parameters_are_compared() -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.fc, self.value = nn.Linear(7, 5), torch.full((5,), value)

        def forward(self, x):
            return self.fc(x) * self.value

    graphs = []
    for value in (1.0, 2.0):
        torch.manual_seed(0)
        graphs.append(lora_fx.trace(Constant(value).eval(), torch.randn(3, 7)))
    assert compare_graphs(graphs[0], graphs[1])


def test_only_graphs_are_compared() -> None:
    with pytest.raises(GraphError, match="plain nn.Module"):
        compare_graphs(traced(MLP), nn.Linear(3, 5))


# assert_equivalent ----------------------------------------------------------------------------------


def test_equal_modules_are_equivalent_on_every_form_of_input() -> None:
    x = torch.randn(3, 7)
    gm, model = traced(MLP), MLP.model()
    assert_equivalent(gm, model, x)
    assert_equivalent(gm, model, (x,))
    assert_equivalent(gm, model, {"x": x})
    assert_equivalent(gm, model, x, rtol=0)
    assert_equivalent(torch.sin, torch.sin, x)


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float32, 32), (torch.float64, 32), (torch.bfloat16, 4), (torch.float16, 4)]
)
def test_the_tolerance_is_that_of_the_dtype(dtype: torch.dtype, eps: int) -> None:
    y = torch.ones(3, dtype=torch.float64)
    step = torch.finfo(dtype).eps
    assert_equivalent(lambda x: y.to(dtype), lambda x: (y * (1 + (eps - 1) * step)).to(dtype), y)
    with pytest.raises(AssertionError, match="output 0 differs by"):
        assert_equivalent(lambda x: y.to(dtype), lambda x: (y * (1 + (eps + 2) * step)).to(dtype), y)
    with pytest.raises(AssertionError, match="allowed is 0"):
        assert_equivalent(lambda x: y.to(dtype), lambda x: (y * (1 + step)).to(dtype), y, rtol=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x, lambda x: x + 1),
        (lambda x: x, lambda x: x[:1]),
        (lambda x: x, lambda x: x.double()),
        (lambda x: x, lambda x: (x,)),
        (lambda x: {"a": x}, lambda x: {"b": x}),
        (lambda x: (x, 3), lambda x: (x, 4)),
        (lambda x: (x, None), lambda x: (x, x)),
        (lambda x: x, lambda x: x * float("nan")),
        (lambda x: x * float("nan"), lambda x: x),
        (lambda x: x, lambda x: x * float("inf")),
        (lambda x: x.long(), lambda x: x.long() + 1),
        (lambda x: x > 0, lambda x: x <= 0),
        (lambda x: x * 0, lambda x: x * 0 + 1e-3),
    ],
)
def test_differences_are_found(first, second) -> None:
    with pytest.raises(AssertionError):
        assert_equivalent(first, second, torch.randn(3, 7))


def test_equal_nan_and_inf_are_equal_bits() -> None:
    x = torch.tensor([1.0, float("inf"), -1.0])
    assert_equivalent(lambda x: x, lambda x: x.clone(), x)


def test_it_leaves_the_modules_as_they_were() -> None:
    gm = randomise(injected(MLP, traced(MLP)))
    before = zoo.fingerprint(gm)
    assert_equivalent(gm, lora_fx.fold(gm), MLP.arguments()[0])
    assert zoo.fingerprint(gm) == before

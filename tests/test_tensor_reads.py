"""The code that runs reads all tensors in one go, and sees whatever attribute access would have seen."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize, prune

import lora_fx


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 3)])
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("shift", torch.tensor([0.25]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x * self.scale + self.shift


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gm(x: torch.Tensor) -> lora_fx.LoraGraphModule:
    torch.manual_seed(1)
    gm = lora_fx.inject(lora_fx.trace(Model().eval(), (x,)), lora_fx.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_()
    gm(x)  # the places are known from here on
    return gm


def _by_attributes(gm: fx.GraphModule, x: torch.Tensor) -> torch.Tensor:
    """What the code says that people read."""
    return fx.Interpreter(gm).run(x)


def test_no_attribute_of_a_module_is_asked_for(gm: lora_fx.LoraGraphModule, x: torch.Tensor) -> None:
    asked = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_qualname == "Module.__getattr__":
            asked.append(frame.f_locals["name"])

    sys.setprofile(note)
    try:
        gm(x)
    finally:
        sys.setprofile(None)
    assert set(asked) <= {"_guards_fn"}
    assert "self.layers" in gm.code
    assert "_tensors_of" not in gm.code


def _assigned(gm: nn.Module) -> None:
    gm.load_state_dict({name: 2 * value for name, value in gm.state_dict().items()}, assign=True)


def _module_exchanged(gm: nn.Module) -> None:
    other = copy.deepcopy(gm.get_submodule("layers.0"))
    nn.init.ones_(other.weight)
    gm.layers.register_module("0", other)


def _container_exchanged(gm: nn.Module) -> None:
    other = copy.deepcopy(gm.layers)
    nn.init.ones_(other.get_parameter("1.weight"))
    gm.layers = other


def _parametrized(gm: nn.Module) -> None:
    parametrize.register_parametrization(gm.get_submodule("layers.1"), "weight", Halved())


def _parametrized_and_back(gm: nn.Module) -> None:
    _parametrized(gm)
    parametrize.remove_parametrizations(gm.get_submodule("layers.1"), "weight")


def _pruned(gm: nn.Module) -> None:
    prune.l1_unstructured(gm.get_submodule("layers.0"), "weight", amount=0.5)


def _hidden_by_an_attribute(gm: nn.Module) -> None:
    layer = gm.get_submodule("layers.0")
    layer.__dict__["weight"] = torch.ones(5, 7)


def _buffer_exchanged(gm: nn.Module) -> None:
    gm.shift = torch.tensor([8.0])


def _cast(gm: nn.Module) -> None:
    gm.double().float()


@pytest.mark.parametrize(
    "change",
    [_assigned, _module_exchanged, _container_exchanged, _parametrized, _parametrized_and_back, _pruned,
     _hidden_by_an_attribute, _buffer_exchanged, _cast],
)  # fmt: skip
def test_what_was_exchanged_is_seen(
    gm: lora_fx.LoraGraphModule, x: torch.Tensor, change: Callable[[nn.Module], None]
) -> None:
    before = gm(x)
    change(gm)
    assert torch.equal(gm(x), _by_attributes(gm, x))
    assert torch.allclose(gm(x), before) == (change in (_cast,))


@pytest.mark.parametrize("change", [_parametrized, _pruned])
def test_what_is_no_parameter_any_more_is_not_folded(
    gm: lora_fx.LoraGraphModule, change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    base, low = copy.deepcopy(gm), copy.deepcopy(gm)
    change(base)
    with pytest.raises(lora_fx.FoldError, match=r"the weight of 'layers.\d' is no parameter any more"):
        lora_fx.fold(base)
    parametrize.register_parametrization(low.get_submodule("layers.0.lora_A.default"), "weight", nn.Tanh())
    for call in (lora_fx.fold, lambda gm: lora_fx.save_adapter(gm, tmp_path)):
        with pytest.raises(lora_fx.GraphError, match=r"'layers.0.lora_A.default.weight' was a parameter, and is comp"):
            call(low)


def test_what_is_gone_is_missed(gm: lora_fx.LoraGraphModule, x: torch.Tensor) -> None:
    del gm.get_submodule("layers.0").weight
    with pytest.raises(AttributeError, match="weight"):
        gm(x)


def test_a_functional_call_is_seen(gm: lora_fx.LoraGraphModule, x: torch.Tensor) -> None:
    before = gm(x)
    others = {name: 3 * value for name, value in gm.named_parameters()}
    assert not torch.allclose(torch.func.functional_call(gm, others, (x,)), before)
    assert torch.equal(gm(x), before)


def test_copies_and_replicas_read_their_own(gm: lora_fx.LoraGraphModule, x: torch.Tensor) -> None:
    before, twin, replica = gm(x), copy.deepcopy(gm), copy.copy(gm)
    shallow: Any = gm._replicate_for_data_parallel()  # as nn.DataParallel makes them: __dict__ comes along
    for module in (twin, replica, shallow):
        assert torch.equal(module(x), before)
    shallow._parameters["scale"] = nn.Parameter(torch.tensor([9.0]))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(gm(x), before)
    assert not torch.allclose(shallow(x), before)
    assert torch.equal(twin(x), twin.shift.expand(2, 3))


def test_tracers_see_attributes(gm: lora_fx.LoraGraphModule, x: torch.Tensor) -> None:
    plain = lora_fx.inject(fx.symbolic_trace(Model().eval()), lora_fx.LoraConfig(r=2, target_modules="all-linear"))
    found = fx.symbolic_trace(plain).graph.nodes
    assert {str(n.target) for n in plain.graph.nodes if n.op == "get_attr"} <= {str(n.target) for n in found}
    traced = torch.jit.trace(plain, (x,), check_trace=False)
    with torch.no_grad():
        plain.get_parameter("layers.0.lora_B.default.weight").add_(1)
    assert torch.allclose(traced(x), plain(x))


def test_compilers_see_attributes(gm: lora_fx.LoraGraphModule, x: torch.Tensor) -> None:
    names = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    exported = torch.export.export(gm, (x,))
    assert names <= set(exported.graph_signature.inputs_to_parameters.values()) | set(exported.state_dict)
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    before = gm(x)
    for form in (exported.module(), compiled):
        assert torch.allclose(form(x), before)
    with torch.no_grad():
        gm.get_parameter("layers.0.lora_B.default.weight").add_(1)
    assert torch.allclose(compiled(x), gm(x))
    assert not torch.allclose(gm(x), before)


class Drifting(nn.Module):
    """A module of the user's, which may exchange what others read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean + 1
        return x


class Leaf(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Drifting) or super().is_leaf_module(module, name)


class Drift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drifting = nn.Linear(7, 3), Drifting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) * self.linear.bias
        return self.drifting(x) + self.drifting.mean


def test_a_module_of_the_users_may_exchange_tensors_meanwhile(x: torch.Tensor) -> None:
    model = Drift()
    gm = lora_fx.inject(fx.GraphModule(model, Leaf().trace(model)), lora_fx.LoraConfig(target_modules=["linear"]))
    for count in (1.0, 2.0, 3.0):
        base = model.linear(x) * model.linear.bias
        torch.testing.assert_close(gm(x), base + count)


class Sevens(nn.Linear):
    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return torch.full((5, 7), 7.0)


def _other_parameters(gm: nn.Module) -> None:
    layer = gm.get_submodule("layers.0")
    layer.__dict__["_parameters"] = {name: nn.Parameter(2 * p.detach()) for name, p in layer._parameters.items()}


def _other_modules(gm: nn.Module) -> None:
    layers = gm.get_submodule("layers")
    children = dict(layers._modules) | {"1": copy.deepcopy(layers._modules["1"])}
    nn.init.zeros_(children["1"].weight)
    layers.__dict__["_modules"] = children


def _other_root(gm: nn.Module) -> None:
    children = dict(gm._modules) | {"layers": copy.deepcopy(gm._modules["layers"])}
    nn.init.zeros_(children["layers"].get_parameter("1.weight"))
    gm.__dict__["_modules"] = children


def _other_class(gm: nn.Module) -> None:
    gm.get_submodule("layers.0").__class__ = Sevens


@pytest.mark.parametrize("change", [_other_parameters, _other_modules, _other_root, _other_class])
def test_dictionaries_and_classes_that_were_exchanged_are_seen(
    gm: lora_fx.LoraGraphModule, x: torch.Tensor, change: Callable[[nn.Module], None]
) -> None:
    before = gm(x)
    change(gm)
    assert torch.equal(gm(x), _by_attributes(gm, x))
    assert not torch.allclose(gm(x), before)


def test_what_took_over_the_attributes_reads_its_own(gm: lora_fx.LoraGraphModule, x: torch.Tensor) -> None:
    """As replicas do: what gm remembers comes along with its attributes."""
    before = gm(x)
    other: Any = object.__new__(type(gm))
    scale = nn.Parameter(torch.tensor([9.0]))
    other.__dict__ = gm.__dict__ | {"_modules": dict(gm._modules), "_parameters": gm._parameters | {"scale": scale}}
    torch.testing.assert_close(other(x), (before - 0.25) * 6 + 0.25)
    assert torch.equal(gm(x), before)

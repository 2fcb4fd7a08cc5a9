"""Plans without memory: graphs of models on the meta device, or of fakes, and the weights that they get later."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_base
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses import FakeTensorMode

import lora_fx
from lora_fx import AdapterError, ConfigError, FoldError, GraphError
from lora_fx.fold_work import IN_PLACE

WITHOUT_VALUES = {"meta": lambda: torch.device("meta"), "fake": FakeTensorMode}
IDS = torch.tensor([[3, 5, 2], [1, 0, 7]])


class Words(nn.Module):
    """A head that is tied to the table, a buffer that no file holds, and one that files do hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.norm = nn.Embedding(13, 7), nn.Linear(7, 11), nn.BatchNorm1d(11)
        self.out, self.head = nn.Linear(11, 7), nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(7).cumsum(0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale + torch.arange(7, device=ids.device)
        x = self.norm(self.fc(x).mean(1))
        return self.head(self.out(x))


def without_values(kind: str, model: type[nn.Module] = Words) -> torch.fx.GraphModule:
    with WITHOUT_VALUES[kind]():
        return lora_fx.trace(model().eval(), (torch.zeros(2, 3, dtype=torch.long),))


@pytest.fixture
def real(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model, and its checkpoint."""
    torch.manual_seed(4)
    model = Words().eval()
    model.norm.running_mean.normal_()
    return model, write_base(model.state_dict(), tmp_path / "base")


@pytest.mark.parametrize("kind", WITHOUT_VALUES)
def test_a_plan_without_memory_is_the_plan(kind: str, real: tuple[nn.Module, Path]) -> None:
    model, directory = real
    gm, config = without_values(kind), {"r": 3, "target_modules": ["fc", "head"], "modules_to_save": ["out"]}
    known = lora_fx.trace(model, (IDS,))
    assert [str(site) for site in lora_fx.find_sites(gm)] == [str(site) for site in lora_fx.find_sites(known)]
    plan, wanted = lora_fx.make_plan(gm, config), lora_fx.make_plan(known, config)
    assert str(plan) == str(wanted)
    assert plan.cost() == wanted.cost()
    assert gm.get_parameter("head.weight") is gm.get_parameter("embed.weight")
    planned = lora_fx.inject(gm, plan)
    assert lora_fx.trainable_parameters(planned) == lora_fx.trainable_parameters(lora_fx.inject(known, wanted))
    for error, call in (
        (FoldError, lambda: lora_fx.fold(planned)),
        (AdapterError, lambda: lora_fx.save_adapter(planned, directory / "adapter")),
        (GraphError, lambda: lora_fx.bind_weights(planned, directory)),
    ):
        with pytest.raises(error, match="bind"):
            call()
    assert lora_fx.delete_adapter(planned, "default").code == gm.code

    bound = lora_fx.bind_weights(gm, directory, buffers={"scale": model.scale})
    adapted = lora_fx.inject(bound, plan)
    assert torch.equal(adapted(IDS), lora_fx.inject(known, wanted)(IDS))
    assert torch.equal(bound(IDS), known(IDS))
    assert bound.get_parameter("head.weight") is bound.get_parameter("embed.weight")
    assert list(bound.state_dict()) == list(known.state_dict())
    assert [p.requires_grad for p in bound.parameters()] == [p.requires_grad for p in known.parameters()]
    (example,) = lora_fx.trace_record(bound).args
    assert torch.equal(example, torch.ones(2, 3, dtype=torch.long))
    assert torch.equal(bound.train()(IDS), known.train()(IDS))
    assert not any(isinstance(leaf, torch.device) and leaf.type == "meta" for leaf in _literals(bound))
    assert gm.get_parameter("fc.weight").is_meta == (kind == "meta"), "the graph without values stays as it is"


def _literals(gm: torch.fx.GraphModule) -> list[Any]:
    return [value for node in gm.graph.nodes for value in (*node.args, *node.kwargs.values())]


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.wait"] = tensors.pop("fc.weight")


CASES = {
    "renamed": (_renamed, {}, r"No tensor for 'fc.weight' \(1\).*'fc.wait'.*No place for 'fc.wait' \(1\).*'fc.weight'"),
    "buffer": (dict, {"buffers": {}}, r"No tensor for 'scale' \(1\).*buffers= takes"),
    "shape": (
        lambda t: t.update({"fc.bias": torch.zeros(12)}), {},
        r"'fc.bias' is torch.float32 \[11\] here, and F32 \[12\] there",
    ),
    "dtype": (lambda t: t.update({"fc.bias": torch.zeros(11).half()}), {}, r"and F16 \[11\] there"),
    "untied": (
        lambda t: t.update({"head.weight": torch.zeros(13, 7)}), {},
        "'embed.weight' and 'head.weight' are tied in the graph, and differ",
    ),
    "unknown buffer": (dict, {"buffers": {"scale": torch.ones(7), "scales": torch.ones(7)}}, "No place for 'scales'"),
    "buffer's shape": (dict, {"buffers": {"scale": torch.ones(8)}}, r"'scale' is torch.float32 \[7\] here"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_named_and_nothing_changes(name: str, real: tuple[nn.Module, Path]) -> None:
    change, options, message = CASES[name]
    model, directory = real
    gm = without_values("meta")
    tensors = {k: t for file in directory.glob("*.safetensors") for k, t in load_file(file).items()}
    change(tensors)
    shutil.rmtree(directory)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(GraphError, match=message):
        lora_fx.bind_weights(gm, directory, **{"buffers": {"scale": model.scale}} | options)
    assert all(parameter.is_meta for parameter in gm.parameters())


def test_a_half_folded_checkpoint_is_not_read(real: tuple[nn.Module, Path]) -> None:
    _, directory = real
    (directory / IN_PLACE / "new").mkdir(parents=True)
    job = {"key": "x", "place": (directory / IN_PLACE / "new").stat().st_ino}
    (directory / IN_PLACE / "job.json").write_text(json.dumps(job))
    with pytest.raises(GraphError, match="is half folded; make the call again"):
        lora_fx.bind_weights(without_values("meta"), directory)


def test_costs_are_the_closed_forms() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(97, 7), nn.Linear(7, 7), nn.Linear(7, 11, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(self.a(self.embed(ids))))

    gm = without_values("meta", lambda: Twice().bfloat16())  # type: ignore[arg-type]
    plan = lora_fx.make_plan(gm, {"r": 3, "target_modules": ["a", "b"], "bias": "all"})
    cost = plan.cost(devices=3, adapter_bytes=2, optimizer_bytes=8)
    base, trained = 97 * 7 + 7 * 7 + 7 + 7 * 11, 3 * (7 + 7) + 3 * (7 + 11) + 7
    assert (plan.base.parameters, plan.base.bytes) == (base, 2 * base)
    assert (cost.parameters, cost.weights) == (trained, math.ceil(2 * base / 3))
    assert (cost.adapter, cost.gradients, cost.optimizer) == (
        *[math.ceil(2 * trained / 3)] * 2,
        math.ceil(8 * trained / 3),
    )
    products, low_rank = 2 * 7 * 7 + 7 * 11, 2 * 3 * (7 + 7) + 3 * (7 + 11)
    assert (cost.forward, cost.step) == (2 * products + 2 * low_rank, 4 * products + 6 * low_rank)
    assert cost.kept == 2 * 3 * 3
    assert cost.total == cost.weights + cost.adapter + cost.gradients + cost.optimizer
    assert "for each of 3" in str(cost)
    assert "FLOPs of a token, step" in str(plan.cost())
    for name, value in (("devices", 0), ("adapter_bytes", 0.5), ("optimizer_bytes", -1), ("devices", True)):
        with pytest.raises(ConfigError, match=f"{name}={value} must be an integer from"):
            plan.cost(**{name: value})

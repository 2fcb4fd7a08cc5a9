"""The effect of an adapter, and the fold of it, checked by running: right graphs pass, and broken ones do not."""

from __future__ import annotations

import warnings

import pytest
import torch
import zoo
from torch import nn

import lora_fx
from lora_fx import AdapterError, FoldError, GraphError, LoraFxWarning, TargetError


@pytest.mark.parametrize("case", zoo.SMALL, ids=lambda case: case.name)
def test_every_kind_of_model_passes(case: zoo.Case) -> None:
    gm = zoo.injected(case, zoo.traced(case))
    before, mode = zoo.fingerprint(gm), gm.training
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoraFxWarning)
        lora_fx.check_effect(gm)
    without = [str(warning.message) for warning in caught if "have no effect" in str(warning.message)]
    # With these inputs, `cond` takes one of its branches.
    assert bool(without) == (bool(case.untrained) or case.name == "cond"), without
    assert gm.training == mode
    assert zoo.fingerprint(gm) == before
    zoo.randomise(gm)
    assert lora_fx.check_fold(gm, zoo.folded(case, gm)) <= 1024 * torch.finfo(torch.float32).eps or case.computes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2, self.unused = (
            nn.Linear(5, 7),
            nn.BatchNorm1d(7),
            nn.Linear(7, 3),
            nn.Linear(5, 7),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return self.fc2(torch.dropout(self.norm(self.fc1(x)).relu(), 0.3, self.training))


def traced() -> torch.fx.GraphModule:
    torch.manual_seed(5)
    return lora_fx.trace(Model().eval(), (torch.randn(4, 5),))


def adapted(*targets: str, **options: object) -> torch.fx.GraphModule:
    gm = lora_fx.inject(traced(), {"r": 2, "target_modules": list(targets)}, **options)
    return zoo.randomise(gm)


def test_an_adapter_without_effect_is_refused() -> None:
    with pytest.raises(TargetError, match=r"no effect in eval\(\): moving B of 'unused.lora_B.default.weight'"):
        lora_fx.inject(traced(), {"r": 2, "target_modules": ["unused"]}, check=True)
    with pytest.warns(
        LoraFxWarning, match=r"'unused.lora_A.default.weight', 'unused.lora_B.default.weight' of adapter"
    ):
        lora_fx.inject(traced(), {"r": 2, "target_modules": ["unused", "fc1"]}, check=True)


def test_an_adapter_that_train_alone_has_is_refused() -> None:
    """transformer layers' fast path is such a case: here, a branch on the mode."""

    class OnlyInTrain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc(x) if self.training else x

    gm = lora_fx.trace(OnlyInTrain().train(), (torch.randn(4, 5),))
    with pytest.raises(lora_fx.LoraFxError, match="eval"):
        lora_fx.inject(gm, {"r": 2, "target_modules": ["fc"]}, check=True)


def test_nothing_is_written_into() -> None:
    """Neither parameters, nor statistics of batch norms, nor the generator of random numbers."""
    gm = adapted("fc1", "fc2").train()
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    state = torch.get_rng_state()
    lora_fx.check_effect(gm)
    lora_fx.check_fold(gm, lora_fx.fold(gm))
    assert gm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def test_inputs_may_be_given_in_three_ways() -> None:
    x = torch.randn(4, 5)
    gm = lora_fx.inject(torch.fx.symbolic_trace(Model().eval()), {"r": 2, "target_modules": ["fc1"]}, check=(x,))
    for inputs in ((x,), {"x": x}, x):
        lora_fx.check_effect(gm, inputs)
    with pytest.raises(GraphError, match="remembers no inputs"):
        lora_fx.check_effect(gm)
    with pytest.raises(GraphError, match=r"inputs=5 must be a tuple"):
        lora_fx.check_effect(gm, 5)
    with pytest.raises(GraphError, match="does not run with the inputs"):
        lora_fx.check_effect(gm, torch.randn(4, 6))


def test_what_cannot_be_checked_is_said() -> None:
    gm = adapted("fc1")
    with pytest.raises(AdapterError, match="no adapter 'defualt' to check. Did you mean 'default'"):
        lora_fx.check_effect(gm, adapter_name="defualt")
    lora_fx.set_adapters(gm, {})
    with pytest.raises(GraphError, match="does not count at the moment"):
        lora_fx.check_effect(gm)


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"inplace": True, "reversible": False}], ids=str)
def test_a_fold_that_is_wrong_is_not_made(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    gm = adapted("fc1", "fc2")
    code, before = gm.code, zoo.fingerprint(gm)
    merge = lora_fx.fold_sums.merge  # type: ignore[attr-defined]

    def wrong(weight: torch.Tensor, deltas: list[object], into: torch.Tensor, **more: object) -> object:
        found = merge(weight, deltas, into, **more)
        into.view(-1)[0] += 0.1
        return found

    with monkeypatch.context() as patch:
        patch.setattr("lora_fx.fold_sums.merge", wrong)
        with pytest.raises(FoldError, match=r"differs from the adapted one by .*allowed .*nothing was changed"):
            lora_fx.fold(gm, check=True, **options)
    assert gm.code == code
    assert zoo.fingerprint(gm) == before
    lora_fx.fold(gm, check=(torch.randn(3, 5),), **options)

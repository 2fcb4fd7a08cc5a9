"""Programs of calls, and an oracle: W + Σ weight · scaling · B @ A in float64, kept in numpy.

What a graph is asked to do, in whatever order, it has to compute what the oracle computes, and the base's weights have
to stay as they are, but while they are folded into.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import exporters
import lora_fx
from lora_fx import LoraFxError

NAMES = ("one", "two", "three", "four")
PATHS = ("0", "2")
SIZES = {"0": (11, 7), "2": (5, 11)}
X = np.linspace(-1.5, 2, 21).reshape(3, 7)
BOUND = 1e-9

names = st.sampled_from(NAMES)
weights = st.sampled_from([1.0, 0.5, -1.25, 2.0, 0.0])


@functools.cache
def _model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).double().eval()


class Programs(RuleBasedStateMachine):
    """The calls, and what they mean."""

    @initialize()
    def begin(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).double().eval()
        self.model.load_state_dict(_model().state_dict())
        self.base = {k: v.numpy().copy() for k, v in self.model.state_dict().items()}
        self.gm: Any = lora_fx.trace(self.model, (torch.from_numpy(X),))
        self.adapters: dict[str, dict[str, np.ndarray]] = {}  # {name: {path: scaling · B @ A}}
        self.scalings: dict[str, float] = {}
        self.active: dict[str, float] = {}
        self.is_folded = False
        self.directory = Path(tempfile.mkdtemp())

    # The oracle ---------------------------------------------------------------------------------

    def expected(self, active: dict[str, float]) -> np.ndarray:
        """What the model computes with these adapters."""
        w = {}
        for path in PATHS:
            deltas = [weight * self.adapters[name].get(path, 0.0) for name, weight in active.items()]
            w[path] = self.base[f"{path}.weight"] + sum(deltas, np.zeros(SIZES[path]))
        hidden = np.tanh(X @ w["0"].T + self.base["0.bias"])
        return hidden @ w["2"].T + self.base["2.bias"]

    def check(self, gm: Any, active: dict[str, float]) -> None:
        with torch.no_grad():
            y = gm(torch.from_numpy(X)).numpy()
        wanted = self.expected(active)
        assert np.abs(y - wanted).max() <= BOUND * np.abs(wanted).max()

    @invariant()
    def computes_what_the_oracle_does(self) -> None:
        if hasattr(self, "gm"):
            self.check(self.gm, self.active)

    @invariant()
    def the_base_stays(self) -> None:
        if hasattr(self, "gm") and not self.is_folded:
            for name, value in self.model.state_dict().items():
                assert np.array_equal(value.numpy(), self.base[name]), name

    def _read(self, name: str) -> None:
        """What the graph's parameters say now."""
        deltas = {}
        for path in PATHS:
            a, b = (self._half(name, path, half) for half in "AB")
            if a is not None and b is not None:
                deltas[path] = self.scalings[name] * b.detach().numpy() @ a.detach().numpy()
        self.adapters[name] = deltas

    def _half(self, name: str, path: str, half: str) -> Any:
        with contextlib.suppress(AttributeError):
            return self.gm.get_parameter(f"{path}.lora_{half}.{name}.weight")
        return None

    # Calls --------------------------------------------------------------------------------------

    @precondition(lambda self: not self.is_folded)
    @rule(name=names, r=st.integers(1, 4), alpha=st.sampled_from([1, 3, 8]), some=st.sampled_from(["0", "2", "02"]))
    def inject(self, name: str, r: int, alpha: int, some: str) -> None:
        if name in self.adapters:
            with pytest.raises(LoraFxError):
                lora_fx.inject(self.gm, {"r": r, "target_modules": list(some)}, adapter_name=name)
            return
        self.gm = lora_fx.inject(
            self.gm, {"r": r, "lora_alpha": alpha, "target_modules": list(some)}, adapter_name=name
        )
        self.gm.eval()
        self.scalings[name] = alpha / r
        self.active[name] = 1.0
        self._read(name)

    @precondition(lambda self: not self.is_folded and self.adapters)
    @rule(name=names, seed=st.integers(0, 99))
    def train(self, name: str, seed: int) -> None:
        if name in self.adapters and name in self.scalings:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in lora_fx.lora_parameters(self.gm, name):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            self._read(name)

    @precondition(lambda self: not self.is_folded and self.adapters)
    @rule(chosen=st.dictionaries(names, weights, max_size=3))
    def choose(self, chosen: dict[str, float]) -> None:
        if set(chosen) <= set(self.adapters):
            lora_fx.set_adapters(self.gm, chosen)
            self.active = {name: weight for name, weight in chosen.items() if weight}
        else:
            with pytest.raises(LoraFxError):
                lora_fx.set_adapters(self.gm, chosen)

    @precondition(lambda self: not self.is_folded)
    @rule()
    def unflatten(self) -> None:
        with contextlib.suppress(LoraFxError):  # of a tree there is no tree; of what a tree is folded to, there is
            self.gm = lora_fx.unflatten(self.gm)
        assert {path for path in PATHS if isinstance(self.gm.get_submodule(path), lora_fx.Block)} == set(PATHS)

    @precondition(lambda self: not self.is_folded and self.adapters)
    @rule()
    def disable(self) -> None:
        with lora_fx.disable_adapters(self.gm):
            self.check(self.gm, {})

    @precondition(lambda self: not self.is_folded and len(self.adapters) > 1)
    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.adapters:
            lora_fx.delete_adapter(self.gm, name)
            for known in (self.adapters, self.active, self.scalings):
                known.pop(name, None)
        else:
            with pytest.raises(LoraFxError):
                lora_fx.delete_adapter(self.gm, name)

    @precondition(lambda self: not self.is_folded and self.adapters)
    @rule(name=names, chosen=st.dictionaries(names, st.sampled_from([1.0, -0.5, 2.0]), min_size=1, max_size=3))
    def combine(self, name: str, chosen: dict[str, float]) -> None:
        if name in self.adapters or not set(chosen) <= set(self.adapters):
            with pytest.raises(LoraFxError):
                lora_fx.combine_adapters(self.gm, chosen, adapter_name=name)
            return
        self.gm = lora_fx.combine_adapters(self.gm, chosen, adapter_name=name).eval()
        self.adapters[name] = {
            path: sum((w * self.adapters[n][path] for n, w in chosen.items() if path in self.adapters[n]), np.zeros(1))
            for path in PATHS
            if any(path in self.adapters[n] for n in chosen)
        }
        self.scalings.pop(name, None)  # its A and B are its own affair
        self.active = dict(lora_fx.active_adapters(self.gm))

    @precondition(lambda self: not self.is_folded and self.adapters)
    @rule()
    def fold(self) -> None:
        if not self.active:
            with pytest.raises(LoraFxError):
                lora_fx.fold(self.gm)
            return
        self.check(lora_fx.fold(self.gm, accumulate=torch.float64), self.active)

    @precondition(lambda self: not self.is_folded and self.active)
    @rule()
    def fold_in_place(self) -> None:
        assert lora_fx.fold(self.gm, inplace=True) is self.gm
        self.is_folded = True
        self.check(self.model, self.active)

    @precondition(lambda self: self.is_folded)
    @rule()
    def unfold(self) -> None:
        lora_fx.unfold(self.gm)
        self.is_folded = False

    @precondition(lambda self: self.is_folded)
    @rule()
    def what_a_folded_graph_refuses(self) -> None:
        for call in (lora_fx.fold, lora_fx.lora_parameters, lambda g: lora_fx.set_adapters(g, self.active)):
            with pytest.raises(LoraFxError):
                call(self.gm)

    @precondition(lambda self: not self.is_folded and self.adapters)
    @rule(name=names, other=names)
    def save_and_load(self, name: str, other: str) -> None:
        if name not in self.adapters:
            return
        lora_fx.save_adapter(self.gm, self.directory / name, adapter_name=name)
        fresh = lora_fx.load_adapter(lora_fx.trace(_model(), (torch.from_numpy(X),)), self.directory / name).eval()
        self.check(fresh, {name: 1.0})
        if other in self.adapters:
            with pytest.raises(LoraFxError):
                lora_fx.load_adapter(self.gm, self.directory / name, adapter_name=other)
            return
        self.gm = lora_fx.load_adapter(self.gm, self.directory / name, adapter_name=other).eval()
        self.adapters[other] = dict(self.adapters[name])
        self.active[other] = 1.0

    @precondition(lambda self: not self.is_folded and self.adapters)
    @rule(name=names)
    def failing_calls(self, name: str) -> None:
        for call in (
            lambda: lora_fx.inject(self.gm, {"r": 2, "target_modules": ["nope"]}, adapter_name="x"),
            lambda: lora_fx.set_adapters(self.gm, {"nope": 1.0}),
            lambda: lora_fx.fold(self.gm, adapters=["nope"]),
            lambda: lora_fx.load_adapter(self.gm, self.directory / "nope", adapter_name="x"),
            lambda: lora_fx.unfold(self.gm),
            lambda: lora_fx.swap_adapter(self.gm, "nope", {}),
        ):
            with pytest.raises(LoraFxError):
                call()
        with contextlib.suppress(Exception), torch.no_grad():
            self.gm(torch.zeros(2, 3, dtype=torch.float64))

    @precondition(lambda self: not self.is_folded and self.active)
    @rule(often=st.integers(0, 30))
    def export(self, often: int) -> None:
        if often:
            return
        exporters.export_onnx(lora_fx.fold(self.gm), self.directory / "model.onnx", check=False)
        session = exporters.make_session(self.directory / "model.onnx", provider="cpu")
        y = session.run(None, {session.get_inputs()[0].name: X})[0]
        wanted = self.expected(self.active)
        assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()

"""When code is written: at a graph's first call, once for each view; and torch.compile meets the same code again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import lora_fx

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)).eval()


def adapted(adapter_name: str = "default") -> Any:
    config = lora_fx.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return lora_fx.inject(lora_fx.trace(model(), X), config, adapter_name=adapter_name)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs whose code is written."""
    graphs: list[Any] = []
    real = torch.fx.Graph.python_code
    monkeypatch.setattr(torch.fx.Graph, "python_code", lambda self, *a, **k: graphs.append(self) or real(self, *a, **k))
    return graphs


def test_passes_in_a_row_write_the_code_once(written: list[Any]) -> None:
    config = lora_fx.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    gm = lora_fx.trace(model(), X)
    traced = written.copy()
    gm = lora_fx.inject(lora_fx.inject(gm, config), config, adapter_name="second")
    gm = copy.deepcopy(gm).train().eval()
    assert written == traced
    wanted = gm(X)
    assert written == [*traced, gm.graph]
    assert torch.equal(gm(X), wanted)
    assert len(written) == len(traced) + 1


@pytest.mark.parametrize(
    "ask", [lambda gm: gm.code, str, lambda gm: type(gm).forward.__code__.co_consts, lambda gm: gm.forward(X)]
)
def test_whoever_asks_for_the_code_gets_it(ask: Callable[[Any], object], written: list[Any]) -> None:
    gm = adapted()
    before = len(written)
    assert ask(gm) is not None
    assert len(written) == before + 1
    assert "lora_A" in gm.code


def test_threads_that_call_first_get_the_same() -> None:
    gm = adapted()
    results: list[torch.Tensor] = []
    barrier = threading.Barrier(8)

    def call() -> None:
        barrier.wait()
        results.append(gm(X))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


def test_code_that_cannot_be_written_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = adapted()
    real = torch.fx.Graph.python_code

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(torch.fx.Graph, "python_code", fails)
    with pytest.raises(MemoryError):
        gm(X)
    monkeypatch.setattr(torch.fx.Graph, "python_code", real)
    assert gm(X).shape == (3, 4)


class Wrapper(nn.Module):
    def __init__(self, gm: nn.Module) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gm(x)


def compiled_in_place(gm: Any, **options: Any) -> Any:
    gm.compile(**options)
    return gm


@pytest.mark.parametrize(
    "compiled",
    [
        torch.compile,
        compiled_in_place,
        lambda gm, **options: torch.compile(gm.forward, **options),
        lambda gm, **options: torch.compile(Wrapper(gm), **options),
        lambda gm, **options: compiled_in_place(Wrapper(gm), **options),
        lambda gm, **options: torch.compile(lambda x: gm(x), **options),
    ],
    ids=["compile", "in place", "forward", "part", "part in place", "function"],
)
def test_torch_compile_may_be_the_first_to_call(compiled: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    gm = adapted()
    wanted = adapted()(X)
    found = compiled(gm, fullgraph=True, backend=counter)(X)
    torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("optimized", [False, True])
def test_training_and_evaluating_in_turn_compiles_each_view_once(optimized: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    gm = lora_fx.optimize(adapted()) if optimized else adapted()
    compiled = torch.compile(gm, fullgraph=True, backend=counter)
    for _ in range(4):
        compiled.train()
        assert not torch.equal(compiled(X), compiled(X))
        compiled.eval()
        assert torch.equal(compiled(X), compiled(X))
    assert counter.frame_count == 2


def test_passes_in_place_go_on_with_a_compiled_graph() -> None:
    torch._dynamo.reset()
    gm = adapted()
    base, adapter = lora_fx.trace(model(), X)(X), gm(X)
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), adapter)
    with lora_fx.disable_adapters(gm):
        torch.testing.assert_close(compiled(X), base)
    torch.testing.assert_close(compiled(X), adapter)
    lora_fx.set_adapters(gm, {"default": 2.0})
    torch.testing.assert_close(compiled(X), gm(X))
    lora_fx.fold(gm, inplace=True)
    torch.testing.assert_close(compiled(X), gm(X))
    lora_fx.unfold(gm)
    lora_fx.set_adapters(gm, "default")
    torch.testing.assert_close(compiled(X), adapter)
    assert not torch.allclose(base, adapter)

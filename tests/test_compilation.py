"""When code is written: at a graph's first call, once for each view; and torch.compile meets the same code again."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from torch import fx, nn
from torch.fx.experimental import _config as fx_config

import lora_fx
from lora_fx import GraphError
from lora_fx.copying import CODE

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


class Deep(nn.Module):
    """It takes a while to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(60))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def deep() -> Any:
    torch.manual_seed(2)
    return lora_fx.inject(lora_fx.trace(Deep(), X), lora_fx.LoraConfig(r=2, target_modules="all-linear"))


def in_threads(*work: Callable[[], object]) -> list[object]:
    """What each gave or raised."""
    barrier, results = threading.Barrier(len(work)), [None] * len(work)

    def run(place: int) -> None:
        barrier.wait()
        try:
            results[place] = work[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_call_first_get_the_same() -> None:
    for _ in range(3):
        gm = deep()
        wanted = fx.Interpreter(gm).run(X)
        assert all(torch.equal(result, wanted) for result in in_threads(*[lambda gm=gm: gm(X)] * 6))


def test_a_copy_that_is_made_while_the_code_is_written_is_whole() -> None:
    for _ in range(4):
        gm = deep()
        wanted = fx.Interpreter(gm).run(X)
        copies = in_threads(lambda gm=gm: gm(X), *[lambda gm=gm: copy.deepcopy(gm)] * 3)[1:]
        for twin in copies:
            assert torch.equal(twin(X), wanted)
            assert twin.code == twin.graph.python_code("self").src == gm.code


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and later warn of threads
def test_a_child_process_does_not_wait_for_a_thread_that_it_has_not() -> None:
    gm, other = deep(), adapted()
    with CODE.lock:  # as a thread that writes code has it
        child = multiprocessing.get_context("fork").Process(target=lambda: in_threads(lambda: other.code))
        child.start()
    child.join(20)
    child.kill()  # or else Python would wait for it at its end
    child.join()
    assert child.exitcode == 0
    assert gm(X) is not None


class Sub:
    """To be mixed into a class that is there."""


def test_a_class_may_be_exchanged_before_the_first_call() -> None:
    gm, wanted = adapted(), adapted()(X)
    gm.__class__ = type("Other", (Sub, type(gm)), {})
    assert torch.equal(gm(X), wanted)
    assert gm.eval().code == adapted().code


def test_a_class_may_outlive_its_graph() -> None:
    kind = type(adapted())
    gc.collect()
    assert kind.forward is nn.Module.forward


def test_a_forward_of_somebody_elses_is_called() -> None:
    gm = adapted()
    with mock.patch.object(type(gm), "forward", lambda self, x: x + 1):
        assert torch.equal(gm(X), X + 1)
        assert gm.code == adapted().code


def test_a_graph_that_reads_what_is_gone_says_so() -> None:
    gm = adapted()
    name = next(str(node.target) for node in gm.graph.nodes if node.op == "get_attr")
    owner, _, last = name.rpartition(".")
    delattr(gm.get_submodule(owner), last)
    with pytest.raises((GraphError, AttributeError), match=last):
        gm(X)


def test_default_arguments_are_a_copys_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
            return self.fc(x) * scale

    gm = lora_fx.inject(fx.symbolic_trace(Scaled()), lora_fx.LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(copy.deepcopy(gm)(X), gm(X))
    assert not torch.equal(copy.deepcopy(gm)(X, 1.0), gm(X))


def test_code_with_marks_for_a_profiler_is_shown_with_them() -> None:
    with fx_config.patch(enrich_profiler_metadata=True):
        gm = adapted()
        assert "_RecordFunctionFast" in gm.code
        assert gm(X).shape == (3, 4)


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


@pytest.mark.parametrize("wrap", [Wrapper, lambda gm: lambda x: gm(x)], ids=["module", "function"])
def test_what_a_graph_is_a_part_of_follows_its_views(wrap: Callable[[Any], Any]) -> None:
    """It is no part of the module's class for torch.compile, which guards attributes alone."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    gm = adapted()
    compiled = torch.compile(wrap(gm), fullgraph=True, backend=counter)
    for _ in range(3):
        gm.train()
        assert not torch.equal(compiled(X), compiled(X))
        gm.eval()
        assert torch.equal(compiled(X), compiled(X))
    assert counter.frame_count == 2
    with lora_fx.disable_adapters(gm):
        torch.testing.assert_close(compiled(X), gm(X))
    torch.testing.assert_close(compiled(X), gm(X))


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

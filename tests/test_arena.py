"""A and B lie in one memory, and an optimizer that is given them as one parameter does what it would do with many."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx import GraphError
from lora_fx.arena import FlatParameter, Joined, joined, lay_out


class Model(nn.Module):
    """Linears that share an input, a convolution, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 7)
        self.query, self.key, self.out = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(5, 3)
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        y = self.out(torch.tanh(self.query(x) * self.key(x)))
        return self.conv(y.transpose(1, 2)).mean((1, 2))


TOKENS = torch.arange(12).view(3, 4) % 11
TARGETS = ["table", "query", "key", "out", "conv"]


def _adapted(**fields: Any) -> lora_fx.LoraGraphModule:
    torch.manual_seed(3)
    gm = lora_fx.trace(Model(), (TOKENS,))
    config = lora_fx.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS} | fields)
    gm = lora_fx.inject(gm, config)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_(std=0.3)
    return gm.train()


def _train(gm: lora_fx.LoraGraphModule, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in (1, 2):  # gradients add up
            (gm(TOKENS + 0 * part) * part).square().sum().backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.7)
        optimizer.step()


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "target_modules": ["query", "out"]}, {"bias": "all"}])
@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, torch.optim.RMSprop, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)]
)
def test_training_is_the_same(make: Callable[..., Any], fields: dict[str, Any], optimize: bool) -> None:
    each, flat = _adapted(**fields), _adapted(**fields)
    if optimize:
        each, flat = lora_fx.optimize(each), lora_fx.optimize(flat)
    before = {name: value.clone() for name, value in each.named_parameters()}
    _train(each, make(lora_fx.lora_parameters(each)))
    vectors = lora_fx.flat_parameters(flat)
    assert sum(isinstance(vector, FlatParameter) for vector in vectors) == 1
    _train(flat, make(vectors))
    found = dict(flat.named_parameters())
    for name, value in each.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(value, before[name]) != value.requires_grad


def test_all_lie_in_one_memory() -> None:
    gm = _adapted()
    parameters = lora_fx.lora_parameters(gm)
    (vector,) = lora_fx.flat_parameters(gm)
    assert len(parameters) == 10
    assert vector.numel() == sum(p.numel() for p in parameters)
    ends = {p.data_ptr() + p.nbytes for p in parameters}
    assert {p.data_ptr() for p in parameters} - ends == {vector.data_ptr()}
    assert ends - {p.data_ptr() for p in parameters} == {vector.data_ptr() + vector.nbytes}
    a = gm.get_parameter("query.lora_A.default.weight")
    assert gm.get_parameter("key.lora_A.default.weight").data_ptr() == a.data_ptr() + a.nbytes


@pytest.mark.parametrize("flat", [False, True])
def test_files_hold_each_of_them(flat: bool, tmp_path: Path) -> None:
    """Those who write files tell tensors by their storages: what lies in one is refused, dropped, or written whole."""
    gm = _adapted()
    if flat:
        lora_fx.flat_parameters(gm)
    expected = {name: value.clone() for name, value in gm.state_dict().items()}
    safetensors.torch.save_model(gm, str(tmp_path / "model.safetensors"))
    accelerate.Accelerator(cpu=True).save_model(gm, str(tmp_path / "accelerate"))
    for file in ("model.safetensors", "accelerate/model.safetensors"):
        found = safetensors.torch.load_file(tmp_path / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    name, parameter = next((n, p) for n, p in gm.named_parameters() if "lora_" in n)
    torch.save({name: parameter}, tmp_path / "one.pt")
    assert len(torch.load(tmp_path / "one.pt")[name].untyped_storage()) == parameter.nbytes


def test_the_memory_lives_as_long_as_its_parts() -> None:
    gm = _adapted()
    (vector,) = lora_fx.flat_parameters(gm)
    whole = weakref.ref(vector.untyped_storage())
    kept = copy.copy(gm.get_parameter("key.lora_A.default.weight").detach())
    values = kept.clone()
    del gm, vector
    gc.collect()
    assert torch.equal(kept, values)
    del kept
    gc.collect()
    assert whole() is None


def test_a_step_takes_four_operations() -> None:
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counter.count += func.namespace == "aten" and not func.is_view
            return func(*args, **kwargs or {})

    gm = _adapted()
    optimizer = torch.optim.AdamW(lora_fx.flat_parameters(gm), fused=True)
    _train(gm, optimizer)
    optimizer.zero_grad()
    gm(TOKENS).sum().backward()
    with Counter():
        optimizer.step()
    assert 0 < Counter.count <= 4


def test_whoever_shares_the_tensors_sees_the_step(tmp_path: Path) -> None:
    gm = _adapted()
    optimized = lora_fx.optimize(gm)
    before = gm(TOKENS)
    _train(optimized, torch.optim.SGD(lora_fx.flat_parameters(optimized), lr=0.1))
    assert not torch.allclose(gm(TOKENS), before)
    lora_fx.save_adapter(gm, tmp_path / "adapter")
    again = lora_fx.load_adapter(lora_fx.fold(gm), tmp_path / "adapter", integrity="ignored")
    assert torch.equal(
        again.get_parameter("out.lora_B.default.weight"), optimized.get_parameter("out.lora_B.default.weight")
    )


def test_moving_makes_a_new_memory() -> None:
    gm = _adapted()
    stale = torch.optim.SGD(lora_fx.flat_parameters(gm), lr=0.1)
    gm.double()
    gm(TOKENS).sum().backward()
    with pytest.raises(GraphError, match=r"'query.lora_A.default.weight' was moved.*make the optimizer anew"):
        stale.step()
    (vector,) = lora_fx.flat_parameters(gm)
    assert vector.dtype == torch.float64
    before = gm(TOKENS)
    torch.optim.SGD([vector], lr=0.1).step()
    assert not torch.allclose(gm(TOKENS), before)


def _assign(gm: lora_fx.LoraGraphModule) -> None:
    gm.load_state_dict({name: value.clone() for name, value in gm.state_dict().items()}, assign=True)


def _exchange(gm: lora_fx.LoraGraphModule) -> None:
    layer = gm.get_submodule("query.lora_B.default")
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _delete(gm: lora_fx.LoraGraphModule) -> None:
    del gm.get_submodule("out.lora_A.default").weight


@pytest.mark.parametrize("change", [_assign, _exchange, _delete])
def test_what_was_exchanged_is_not_trained_in_silence(change: Callable[[lora_fx.LoraGraphModule], None]) -> None:
    gm = _adapted()
    optimizer = torch.optim.SGD(lora_fx.flat_parameters(gm), lr=0.1)
    gm(TOKENS).sum().backward()
    change(gm)
    with pytest.raises(GraphError, match="moved, exchanged or deleted"):
        optimizer.step()


def test_a_part_without_a_gradient_is_refused() -> None:
    gm = _adapted()
    (vector,) = lora_fx.flat_parameters(gm)
    assert vector.grad is None
    gm(TOKENS).sum().backward()
    gm.get_parameter("out.lora_B.default.weight").grad = None
    with pytest.raises(GraphError, match=r"'out.lora_B.default.weight' has no gradient, while 9 of 10 have"):
        torch.optim.SGD([vector], lr=0.1).step()


def test_two_adapters_are_two_vectors() -> None:
    gm = lora_fx.inject(_adapted(), lora_fx.LoraConfig(r=3, target_modules=["out"]), adapter_name="other").train()
    first, second = lora_fx.flat_parameters(gm)
    assert len(lora_fx.flat_parameters(gm, "other")) == 1
    gm = lora_fx.set_adapters(gm, {"other": 1.0})
    optimizer = torch.optim.AdamW(lora_fx.flat_parameters(gm), lr=0.1, weight_decay=0.5)
    before = [p.clone() for p in lora_fx.lora_parameters(gm, "default")]
    _train(gm, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(lora_fx.lora_parameters(gm, "default"), before, strict=True))
    assert first.numel() > second.numel()


def test_autograd_knows_that_a_step_wrote() -> None:
    gm = _adapted()
    optimizer = torch.optim.SGD(lora_fx.flat_parameters(gm), lr=0.1)
    loss = gm(TOKENS).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_can_be_set() -> None:
    gm = _adapted()
    (vector,) = lora_fx.flat_parameters(gm)
    vector.grad = torch.arange(float(vector.numel()))
    a = gm.get_parameter("query.lora_A.default.weight")
    assert a.grad is not None
    assert torch.equal(a.grad.flatten(), torch.arange(float(a.numel())))
    del vector.grad
    assert a.grad is None


def test_it_stays_where_it_belongs() -> None:
    (vector,) = lora_fx.flat_parameters(_adapted())
    with pytest.raises(GraphError, match="is not copied; call"):
        copy.deepcopy(vector)
    with pytest.raises(GraphError, match="is not pickled; save"):
        pickle.dumps(vector)


def test_shared_memory_is_memory_of_its_own() -> None:
    gm = _adapted()
    before = gm(TOKENS)
    gm.share_memory()
    assert all(parameter.is_shared() for parameter in gm.parameters())
    assert torch.equal(gm(TOKENS), before)
    optimized = lora_fx.optimize(gm)
    torch.testing.assert_close(optimized(TOKENS), before)
    _train(gm, torch.optim.SGD(lora_fx.flat_parameters(gm), lr=0.1))
    assert not torch.allclose(gm(TOKENS), before)
    torch.testing.assert_close(optimized(TOKENS), gm(TOKENS))


def test_a_copy_trains_by_itself() -> None:
    gm = _adapted()
    twin = copy.deepcopy(gm)
    before = gm(TOKENS)
    (vector,) = lora_fx.flat_parameters(twin)
    _train(twin, torch.optim.SGD([vector], lr=0.1))
    assert torch.equal(gm(TOKENS), before)
    assert not torch.allclose(twin(TOKENS), before)


def test_a_gradient_that_somebody_has_stays_what_it_is() -> None:
    gm = _adapted()
    (vector,) = lora_fx.flat_parameters(gm)
    found = []
    for factor in (1.0, -2.0):
        vector.grad = None
        (gm(TOKENS) * factor).square().sum().backward()
        assert vector.grad is not None
        found.append((vector.grad, vector.grad.clone()))
    for kept, copied in found:
        assert torch.equal(kept, copied)
    assert not torch.equal(found[0][0], found[1][0])


def test_a_gradient_whose_data_was_exchanged_is_seen() -> None:
    gm = _adapted()
    (vector,) = lora_fx.flat_parameters(gm)
    gm(TOKENS).square().sum().backward()
    assert vector.grad is not None
    whole = vector.grad.clone()
    for parameter in lora_fx.lora_parameters(gm):
        assert parameter.grad is not None
        parameter.grad.data = parameter.grad.data / 2
    assert torch.equal(vector.grad, whole / 2)


@pytest.mark.parametrize("change", [_assign, _exchange, _delete, lambda gm: gm.get_submodule("query").double().float()])
def test_what_was_exchanged_is_missed_where_gradients_are_kept(
    change: Callable[[lora_fx.LoraGraphModule], None],
) -> None:
    gm = _adapted()
    optimizer = torch.optim.SGD(lora_fx.flat_parameters(gm), lr=0.1)
    _train(gm, optimizer)
    change(gm)
    with pytest.raises(GraphError, match="moved, exchanged or deleted"):
        optimizer.step()  # with the gradients that are there


@pytest.mark.parametrize("of", ["vector", "stacks"])
def test_a_compiled_step_is_the_step(of: str) -> None:
    """torch.compile must not take the gradient that it met first for one that lies there."""
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    gm = lora_fx.inject(lora_fx.trace(nn.Sequential(nn.Linear(7, 5)).eval(), x), {"r": 2, "target_modules": ["0"]})
    found = []
    for compiled in (False, True):
        own = (lora_fx.batch_adapters(gm) if of == "stacks" else copy.deepcopy(gm)).train()
        ids = {"adapter_ids": torch.tensor([1, 0, 1, 1])} if of == "stacks" else {}
        parameters = lora_fx.lora_parameters(own, "default") if of == "stacks" else lora_fx.flat_parameters(own)
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for turn in range(4):
            own(x, **ids).square().sum().backward()
            step()
            optimizer.zero_grad(set_to_none=turn % 2 == 0)
        found.append([parameter.detach().clone() for parameter in lora_fx.lora_parameters(own)])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-4)


def test_a_frozen_vector_is_not_trained_and_takes_no_hooks() -> None:
    gm = _adapted()
    (vector,) = lora_fx.flat_parameters(gm)
    before = vector.detach().clone()
    vector.requires_grad_(False)
    gm(TOKENS).sum().backward()
    torch.optim.SGD([vector], lr=0.1).step()
    assert torch.equal(vector, before)
    for register in (vector.register_hook, vector.register_post_accumulate_grad_hook):
        with pytest.raises(GraphError, match="would never run.*register them on lora_fx.lora_parameters"):
            register(lambda gradient: gradient)


def test_what_was_joined_is_looked_at_again_when_something_has_moved() -> None:
    """Also where it is moved to the same place in another shape, order or type."""
    parts = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 3))]
    lay_out(parts)
    asked = Joined()
    first = asked(parts)
    assert first is not None
    assert torch.equal(first, torch.cat([part.detach().reshape(-1) for part in parts]))
    assert asked(parts) is first
    assert asked(parts[:1]) is not first  # other tensors
    assert asked(parts[::-1]) is None

    def moved(part: nn.Parameter, data: torch.Tensor) -> torch.Tensor | None:
        asked(parts)
        own, part.data = part.data, data
        found, truth = asked(parts), joined(parts)
        assert (found is None) == (truth is None)
        assert found is None or torch.equal(found, truth)
        part.data = own
        return found

    memory = parts[0].data
    assert moved(parts[0], memory.clone()) is None
    assert moved(parts[0], memory.view(3, 2).t()) is None  # there, but not in order
    assert moved(parts[0], memory.view(torch.int32).view(torch.float32).view(3, 2)) is not None
    assert moved(parts[1], torch.randn(4, 3)) is None
    again = asked(parts)
    assert again is not None
    assert torch.equal(again, first)
    with torch.no_grad():
        parts[1].fill_(7)
    assert asked(parts) is again
    assert float(again[-1]) == 7  # it is the memory, not a copy


def test_memory_of_others_is_looked_at_anew_each_time() -> None:
    """FSDP frees the storage of what it gathered, and another block's may come to lie there."""
    flat = torch.arange(18.0)
    asked = Joined()

    def parts_of(vector: torch.Tensor) -> list[torch.Tensor]:
        return [vector[:6].view(2, 3), vector[6:].view(4, 3)]

    first = asked(parts_of(flat))
    assert first is not None
    assert torch.equal(first, flat)
    other = torch.frombuffer(bytearray(flat.numpy().tobytes()), dtype=torch.float32)
    place = flat.data_ptr()
    same_place = torch.from_numpy(np.ndarray((18,), np.float32, (ctypes.c_float * 18).from_address(place)))
    assert same_place.data_ptr() == place  # another storage over the same bytes
    again = asked(parts_of(same_place))
    assert again is not None
    assert again.untyped_storage()._cdata == same_place.untyped_storage()._cdata
    assert torch.equal(asked(parts_of(other)), flat)

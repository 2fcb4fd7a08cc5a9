"""DoRA and lora_bias under optimize: the plain graph's values and gradients, by way of sums that it knows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import zoo
from test_optimization import TRACED, adapted, assert_alike, bound, gradients
from zoo import BY_NAME, injected, randomise, traced

import lora_fx
from benchmarks.counters import OpCounter
from lora_fx.graph_module import record_of

OPTIONS = {"magnitudes": {"use_dora": True}, "biases": {"lora_bias": True}}
# Kinds of sites that have no outputs to scale or to shift.
WITHOUT = {"magnitudes": {"kernels", "experts", "unread"}, "biases": {"lookups", "experts", "unread"}}
LLAMA, GPT2, STACK = BY_NAME["llama"], BY_NAME["gpt2"], BY_NAME["stack"]


def trained(case: zoo.Case, option: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """With values in all that is trained, the bias of B and magnitudes among them."""
    return with_values(adapted(case, dtype, **OPTIONS[option], **options))


def with_values(gm: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            factor = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            if ".lora_magnitude_vector" in name:
                parameter.mul_(0.5 + factor)
            elif ".lora_B" in name and name.endswith(".bias"):
                parameter.copy_(factor)
    return gm


def kernels(gm: Any, arguments: Any) -> int:
    gm.zero_grad(set_to_none=True)
    with OpCounter() as counter:
        gradients(gm, arguments)
    return counter.kernels


@pytest.mark.filterwarnings("ignore:lora_dropout=0.3 drops elements:lora_fx.LoraFxWarning")
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", TRACED, ids=str)
def test_values_and_gradients_are_those_of_the_plain_graph(case: zoo.Case, option: str, lora_dropout: float) -> None:
    dtype = torch.float64 if case.computes is None else torch.float32
    if case.name in WITHOUT[option]:
        with pytest.raises(lora_fx.TargetError):
            adapted(case, dtype, **OPTIONS[option])
        return
    plain = trained(case, option, dtype, lora_dropout=lora_dropout)
    assert_alike(plain, lora_fx.optimize(plain), case.arguments(dtype), bound(case, dtype))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["mlp", "mlp_no_bias", "functional", "stack"])
def test_graphs_of_symbolic_trace(name: str, option: str) -> None:
    case = BY_NAME[name]
    assert "symbolic" in case.tracers
    plain = injected(case, traced(case, "symbolic", torch.float64), **OPTIONS[option])
    plain = with_values(randomise(plain)).train()
    assert_alike(plain, lora_fx.optimize(plain), case.arguments(torch.float64), bound(case))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", [LLAMA, GPT2, STACK], ids=str)
def test_it_takes_fewer_kernels(case: zoo.Case, option: str) -> None:
    """Than the plain sums, of linears with and without a bias of their own, and as (in, out)."""
    plain = trained(case, option)
    arguments = case.arguments(torch.float64)
    left, made = (kernels(lora_fx.optimize(plain, isolate=isolate), arguments) for isolate in (False, True))
    assert made < left


def test_the_projections_of_attention_share_one_product() -> None:
    plain = trained(LLAMA, "magnitudes")
    products = []
    for isolate in (False, True):
        with OpCounter() as counter:
            gradients(lora_fx.optimize(plain, isolate=isolate), LLAMA.arguments(torch.float64))
        products.append(Counter(counter.ops)["aten.mm.default"])
    assert products[1] < products[0]


def two(first: dict[str, Any], second: dict[str, Any]) -> Any:
    gm = injected(STACK, traced(STACK, "trace", torch.float64), **first)
    gm = injected(STACK, gm, "second", **second)
    return with_values(randomise(randomise(gm), "second")).train()


@pytest.mark.parametrize("first", [{}, *OPTIONS.values()], ids=str)
@pytest.mark.parametrize("second", [{}, *OPTIONS.values()], ids=str)
def test_two_adapters_at_one_linear(first: dict[str, Any], second: dict[str, Any]) -> None:
    plain = two(first, second)
    assert_alike(plain, lora_fx.optimize(plain), STACK.arguments(torch.float64), bound(STACK))


@pytest.mark.parametrize("option", OPTIONS)
def test_adapters_of_another_weight(option: str) -> None:
    plain = trained(STACK, option)
    lora_fx.set_adapters(plain, {"default": 0.6})
    assert_alike(plain, lora_fx.optimize(plain), STACK.arguments(torch.float64), bound(STACK))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_base_of_16_bits_loses_no_more_than_the_plain_graph(option: str, adapter_dtype: Any) -> None:
    """Against float64, of the very same values: all gradients together, as single ones have few numbers."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": LLAMA.targeted, **OPTIONS[option]}
    plain = lora_fx.inject(traced(LLAMA, "trace", torch.bfloat16), config, adapter_dtype=adapter_dtype)
    plain = with_values(randomise(plain)).train()
    exact = trained(LLAMA, option)
    with torch.no_grad():
        values = dict(plain.named_parameters())
        for name, parameter in exact.named_parameters():
            parameter.copy_(values[name])
    isolated = lora_fx.optimize(plain, narrow=False)  # which rounds more, by itself
    errors = {id(gm): 0.0 for gm in (plain, isolated)}
    for seed in range(4):
        _, wanted = gradients(exact, LLAMA.arguments(torch.float64, seed))
        for gm in (plain, isolated):
            _, found = gradients(gm, LLAMA.arguments(torch.bfloat16, seed))
            assert found.keys() == wanted.keys()
            errors[id(gm)] += sum(float((found[name].double() - wanted[name]).square().sum()) for name in wanted)
    assert errors[id(isolated)] <= 1.5**2 * errors[id(plain)]


@pytest.mark.parametrize(
    ("option", "dtype", "numbers"),
    [
        (
            "magnitudes",
            torch.float16,
            {"x": 5000.0, "lora_A": 1.0, "lora_B": 1.0},
        ),  # own + Δ is 80,000, times a gain of ½
        ("biases", torch.float16, {"x": 5000.0, "lora_A": 1.0, "lora_B": 1.0, "bias": -39000.0}),
        ("biases", torch.bfloat16, {"x": 1.0, "lora_A": 1.0, "lora_B": 128.0, "bias": -1024.0}),  # Δ is 1024
    ],
)
def test_what_needs_the_wider_dtype_of_the_adapters_keeps_it(
    option: str, dtype: torch.dtype, numbers: dict[str, float]
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4)).to(dtype)
    torch.nn.init.ones_(model[0].weight)
    x = torch.full((2, 8), numbers["x"], dtype=dtype)
    plain = lora_fx.inject(
        lora_fx.trace(model, (x,)), {"r": 1, "lora_alpha": 1, "target_modules": ["0"], **OPTIONS[option]}
    )
    for name, parameter in plain.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            key = "bias" if name.endswith("bias") else name.split(".")[1]
            torch.nn.init.constant_(parameter, numbers[key])
    results = []
    for gm in (plain.train(), lora_fx.optimize(plain).train()):
        gm.zero_grad(set_to_none=True)
        y = gm(x)
        (y.float() * 1e-4).sum().backward()
        results.append([y, *(p.grad for p in gm.parameters() if p.grad is not None)])
    for wanted, found in zip(*results, strict=True):
        assert torch.isfinite(wanted).all()
        assert torch.allclose(wanted.float(), found.float(), rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("option", OPTIONS)
def test_under_autocast(option: str) -> None:
    plain = trained(STACK, option, torch.float32)
    arguments = STACK.arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(plain, lora_fx.optimize(plain), arguments, 60 * torch.finfo(torch.bfloat16).eps)


class Written(torch.nn.Module):
    """Somebody writes into what a linear gives, or into what it takes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(5, 7)
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        y = self.fc(x)
        if self.what == "input":
            return y * x.add_(1).sum()
        return y.relu_() + y if self.what == "result" else y.relu() + y


def compiled(gm: Any) -> str:
    """What is compiled in place of the graph."""
    source: str = record_of(gm).lowering(gm, gm.graph).python_code("self").src
    return source


@pytest.mark.parametrize("what", ["result", "input", "nothing"])
@pytest.mark.parametrize("option", OPTIONS)
def test_what_somebody_writes_into_is_left_alone(option: str, what: str) -> None:
    torch.manual_seed(0)
    arguments = (torch.randn(3, 5, dtype=torch.float64),), {}
    gm = lora_fx.trace(Written(what).double(), *arguments)
    config = {"r": 2, "target_modules": ["fc"], **OPTIONS[option]}
    plain = with_values(randomise(lora_fx.inject(gm, config))).train()
    isolated, left = (lora_fx.optimize(plain, isolate=isolate) for isolate in (True, False))
    is_left = what == "result" or (what == "input" and option == "magnitudes")  # where the op is written anew
    assert (compiled(isolated) == compiled(left)) == is_left
    if what == "input":  # for which autograd keeps another value, in the plain graph as well
        assert torch.allclose(plain(*arguments[0]), isolated(*arguments[0]), rtol=1e-10)
    else:
        assert_alike(plain, isolated, arguments, 1e-10)


@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_in_one_graph(option: str) -> None:
    plain = trained(STACK, option)
    compiled = torch.compile(lora_fx.optimize(plain), backend="aot_eager", fullgraph=True)
    arguments = STACK.arguments(torch.float64)
    loss, wanted = gradients(plain, arguments)
    again, found = gradients(compiled, arguments)
    assert abs(float(loss - again)) <= bound(STACK) * float(loss)
    for name, gradient in wanted.items():
        assert torch.allclose(gradient, found[f"_orig_mod.{name}"], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("option", OPTIONS)
def test_layers_that_run_again(option: str) -> None:
    plain = trained(LLAMA, option)
    arguments = LLAMA.arguments(torch.float64)
    assert_alike(plain, lora_fx.optimize(plain, checkpoint=True), arguments, bound(LLAMA))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_tree_of_blocks(option: str) -> None:
    plain = trained(LLAMA, option)
    tree = lora_fx.unflatten(lora_fx.optimize(plain)).train()
    arguments = LLAMA.arguments(torch.float64)
    assert kernels(tree, arguments) == kernels(lora_fx.optimize(plain), arguments)
    assert_alike(plain, tree, arguments, bound(LLAMA))

"""fold: one rounding, refusals, in place and back, the report; numbers that must not be lost in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from zoo import (
    BY_NAME,
    STACK,
    assert_same_bits,
    bits,
    codes,
    fingerprint,
    folded,
    injected,
    lora_tensors,
    randomise,
    run,
    traced,
)

import lora_fx
from lora_fx import FoldError, LoraConfig, LoraFxWarning
from lora_fx.attributes import set_attribute
from lora_fx.graph_module import record_of
from lora_fx.merging import sum_dtype

MLP = BY_NAME["mlp"]


def private(case: zoo.Case = MLP, tracer: str = "trace", dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """A graph of its own, for tests that write into weights."""
    return lora_fx.trace(case.model(dtype), *case.arguments(dtype), dynamic_shapes=None)


def linear(weight: torch.Tensor, *, r: int = 3, alpha: float = 5) -> fx.GraphModule:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).eval()
    model.weight = nn.Parameter(weight)
    gm = lora_fx.trace(model, torch.randn(3, weight.shape[1]).to(weight.dtype), dynamic_shapes=None)
    return lora_fx.inject(gm, LoraConfig(target_modules=[""], r=r, lora_alpha=alpha))


# One rounding ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    out_features=st.integers(1, 67),
    in_features=st.integers(1, 67),
    r=st.integers(1, 19),
    size=st.floats(1e-4, 10),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    accumulate=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_weight_is_rounded_once(out_features, in_features, r, size, dtype, accumulate) -> None:
    """Within half an ulp, and what float32 accumulation adds, of the exact sum."""
    gm = linear(torch.randn(out_features, in_features).to(dtype), r=r)
    randomise(gm, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        result = lora_fx.fold(gm, accumulate=accumulate)
    low, up = (p.detach().double() for p in lora_fx.lora_parameters(gm))
    scaling = 5 / r
    exact = gm.get_parameter("weight").detach().double() + scaling * up @ low
    error = (result.get_parameter("weight").detach().double() - exact).abs()
    magnitude = gm.get_parameter("weight").detach().double().abs() + scaling * up.abs() @ low.abs()
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs().clamp_min(torch.finfo(dtype).smallest_normal)
    accumulated = (r + 4) * torch.finfo(accumulate).eps * magnitude
    assert bool((error <= half_ulp * 1.001 + accumulated).all())
    if accumulate is torch.float64:
        assert_same_bits([result.get_parameter("weight")], [exact.to(dtype)])


def test_several_adapters_are_rounded_once_together() -> None:
    """PEFT adds them one after the other, and rounds each time."""
    gm = linear(torch.randn(31, 37).to(torch.bfloat16))
    for name in ("b", "c", "d"):
        gm = lora_fx.inject(gm, LoraConfig(target_modules=[""], r=2, lora_alpha=3), adapter_name=name)
    for name in lora_fx.adapter_names(gm):
        randomise(gm, name, size=0.3)
    exact = gm.get_parameter("weight").detach().double()
    for name, scaling in (("default", 5 / 3), ("b", 3 / 2), ("c", 3 / 2), ("d", 3 / 2)):
        low, up = (p.detach().double() for p in lora_fx.lora_parameters(gm, name))
        exact = exact + scaling * up @ low
    result = lora_fx.fold(gm, accumulate=torch.float64)
    assert_same_bits([result.get_parameter("weight")], [exact.to(torch.bfloat16)])


# Refusals -------------------------------------------------------------------------------------------


def spoil(gm: fx.GraphModule, name: str, value: float) -> fx.GraphModule:
    with torch.no_grad():
        gm.get_parameter(name).view(-1)[0] = value
    return gm


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"inplace": True, "reversible": False}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        (
            "fc2.lora_B.default.weight",
            ["'fc2' (fc2.weight)", "fc2.lora_B.default.weight holds NaN or Inf", "train it again"],
        ),
        ("fc2.lora_A.default.weight", ["'fc2'", "fc2.lora_A.default.weight holds NaN or Inf"]),
        ("fc2.weight", ["base weight of 'fc2'", "before folding", "mend the model"]),
    ],
)
def test_nan_and_inf_are_refused_with_the_site_and_the_culprit(name, fragments, value, options) -> None:
    gm = spoil(randomise(injected(MLP, fx.symbolic_trace(MLP.model(torch.float32)))), name, value)
    before = fingerprint(gm)
    with pytest.raises(FoldError) as caught:
        lora_fx.fold(gm, **options)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    assert fingerprint(gm) == before


def test_overflow_is_refused_with_the_limit() -> None:
    gm = linear(torch.randn(5, 7).to(torch.float16))
    with torch.no_grad():
        lora_tensors(gm, "B")["lora_B.default.weight"].fill_(1e6)
    with pytest.raises(FoldError, match=r"torch.float16's largest number 6.55e\+04.*gm\.float\(\)"):
        lora_fx.fold(gm)
    gm = linear(torch.randn(5, 7))
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.fill_(1e30)
    with pytest.raises(FoldError, match=r"beyond torch.float32's largest number|Inf"):
        lora_fx.fold(gm)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 7), (torch.float16, 10)])
@pytest.mark.parametrize("size", [0.01, 0.1, 0.5], ids=str)
def test_by_default_16_bits_are_off_by_half_a_unit(dtype: torch.dtype, digits: int, size: float) -> None:
    """Also where weight and delta cancel, which leaves float32 sums few digits."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(509, 701, bias=False)).to(dtype).eval()
    gm = lora_fx.inject(lora_fx.trace(model, (torch.randn(2, 509).to(dtype),)), {"r": 13, "target_modules": ["0"]})
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_(0, size)
    a, b = (gm.get_parameter(f"0.lora_{half}.default.weight").detach().double() for half in "AB")
    exact = model[0].weight.detach().double() + 8 / 13 * b @ a
    unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - digits)  # none is so small as to be subnormal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_fx.LoraFxWarning)  # of what bfloat16 does not keep
        folded = lora_fx.fold(gm).get_parameter("0.weight").detach()
    error = (folded.double() - exact).abs() / unit
    assert 0.49 < float(error[exact.abs() > 2**-14].max()) < 0.5001


def test_there_must_be_something_to_fold() -> None:
    gm = private()
    with pytest.raises(FoldError, match=r"no adapter.*inject\(gm, config\)"):
        lora_fx.fold(gm)
    adapted = injected(MLP, gm)
    with pytest.raises(FoldError, match=r"adapters=\[\].*leave it out"):
        lora_fx.fold(adapted, adapters=[])
    with pytest.raises(lora_fx.AdapterError, match="no adapter 'defalt'.*Did you mean 'default'"):
        lora_fx.fold(adapted, adapters=["default", "defalt"])
    for dtype in (torch.float16, torch.int32, "float32"):
        with pytest.raises(FoldError, match="must be torch.float32 or torch.float64"):
            lora_fx.fold(adapted, accumulate=dtype)
    with pytest.raises(FoldError, match="does not come from fold"):
        lora_fx.fold_report(adapted)


def test_folding_leaves_the_injected_graph_as_it_was() -> None:
    for case in (MLP, STACK, BY_NAME["modes_both"]):
        gm = randomise(injected(case, traced(case), lora_dropout=0.1))
        before = fingerprint(gm)
        first, second = folded(case, gm), folded(case, gm)
        assert fingerprint(gm) == before
        assert not lora_fx.compare_graphs(first, second)


# In place, and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", zoo.DTYPES)
@pytest.mark.parametrize("name", ["mlp", "stack", "addmm", "called_twice", "shared_parameter", "strided", "modes_both"])
def test_in_place_makes_the_users_model_the_merged_model_and_back(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    model, x = case.model(dtype), case.arguments(dtype)
    gm = lora_fx.trace(model, *x, dynamic_shapes=None)
    original = {n: bits(t) for n, t in model.state_dict().items()}
    adapted = randomise(injected(case, gm))
    before, expected = fingerprint(adapted), run(adapted, x)
    functional = folded(case, adapted)
    for _ in range(3):
        assert lora_fx.fold(adapted, inplace=True) is adapted
        assert codes(adapted) == codes(gm)
        assert lora_fx.adapter_names(adapted) == ()
        assert_same_bits(run(adapted, x), run(functional, x))
        assert zoo.distance(expected, run(model, x)) <= zoo.tolerance(case, dtype)
        assert_same_bits(run(model, x), run(gm, x))
        assert lora_fx.unfold(adapted) is adapted
        assert fingerprint(adapted) == before
        assert {n: bits(t) for n, t in model.state_dict().items()} == original
        assert_same_bits(run(adapted, x), expected)


def test_in_place_with_modules_to_save_and_biases() -> None:
    model, x = STACK.model(), STACK.arguments()
    gm = lora_fx.trace(model, *x)
    adapted = randomise(injected(STACK, gm, targets=["up", "down"], modules_to_save=["head"], bias="lora_only"))
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(adapted):
            parameter.add_(0.01)
    expected, original = run(adapted, x), {n: bits(t) for n, t in model.state_dict().items()}
    lora_fx.fold(adapted, inplace=True)
    assert zoo.distance(expected, run(model, x)) <= zoo.tolerance(STACK, torch.float32)
    lora_fx.unfold(adapted)
    assert {n: bits(t) for n, t in model.state_dict().items()} == original
    assert_same_bits(run(adapted, x), expected)


def test_what_is_no_truth_value_is_refused() -> None:
    gm = randomise(injected(MLP, private()))
    before = {name: bits(t) for name, t in gm.state_dict().items()}
    for options in ({"inplace": "yes"}, {"inplace": True, "reversible": None}, {"inplace": 1}):
        with pytest.raises(FoldError, match="must be True or False"):
            lora_fx.fold(gm, **options)
    assert {name: bits(t) for name, t in gm.state_dict().items()} == before


def test_a_folded_graph_takes_no_second_fold_nor_injection() -> None:
    gm = randomise(injected(MLP, private()))
    lora_fx.fold(gm, inplace=True)
    with pytest.raises(FoldError, match=r"folded already; lora_fx\.unfold\(gm\)"):
        lora_fx.fold(gm)
    with pytest.raises(lora_fx.GraphError, match=r"folded in place; call lora_fx\.unfold\(gm\)"):
        injected(MLP, gm, "second")
    lora_fx.unfold(gm)
    with pytest.raises(FoldError, match="no fold to take back"):
        lora_fx.unfold(gm)
    with pytest.raises(FoldError, match="no fold to take back"):
        lora_fx.unfold(lora_fx.fold(gm))


def test_training_goes_on_after_unfold() -> None:
    gm = randomise(injected(MLP, private()))
    optimizer = torch.optim.SGD(lora_fx.lora_parameters(gm), lr=0.1)
    twin = copy.deepcopy(gm)
    twin_optimizer = torch.optim.SGD(lora_fx.lora_parameters(twin), lr=0.1)
    lora_fx.unfold(lora_fx.fold(gm, inplace=True))
    for module, step in ((gm, optimizer), (twin, twin_optimizer)):
        zoo.loss_of(module.train(), MLP.arguments()).backward()
        step.step()
    assert not lora_fx.compare_graphs(gm, twin)


def test_one_adapter_of_two_in_place() -> None:
    gm = private()
    both = randomise(randomise(injected(MLP, injected(MLP, gm), "second")), "second")
    expected, base = run(both, MLP.arguments()), {n: bits(t) for n, t in gm.state_dict().items()}
    lora_fx.fold(both, adapters="second", inplace=True)
    assert zoo.distance(expected, run(both, MLP.arguments())) <= zoo.tolerance(MLP, torch.float32)
    lora_fx.unfold(both)
    assert lora_fx.adapter_names(both) == ("default", "second")
    assert_same_bits(run(both, MLP.arguments()), expected)
    assert {n: bits(t) for n, t in gm.state_dict().items()} == base


@pytest.mark.parametrize("tracer", ["trace", "export", "strict", "symbolic"])
def test_in_place_refuses_a_tied_weight(tracer: str) -> None:
    case = BY_NAME["tied_head"]
    gm = randomise(injected(case, copy.deepcopy(traced(case, tracer)), targets=["lm_head"]))
    before = fingerprint(gm)
    with pytest.raises(FoldError, match=r"'lm_head.weight'.*also read as embed.weight.*fold\(gm\) unties it"):
        lora_fx.fold(gm, inplace=True)
    assert fingerprint(gm) == before


# The report -----------------------------------------------------------------------------------------


def test_the_report() -> None:
    gm = randomise(injected(MLP, traced(MLP)), size=0.5)
    report = lora_fx.fold_report(lora_fx.fold(gm))
    assert report.adapters == ("default",)
    assert [(site.path, site.weight, site.dtype) for site in report.sites] == [
        ("fc1", "fc1.weight", torch.float32),
        ("fc2", "fc2.weight", torch.float32),
    ]
    for site in report.sites:
        low, up = (gm.get_parameter(f"{site.path}.lora_{half}.default.weight").detach().double() for half in "AB")
        weight = gm.get_parameter(site.weight).detach().double()
        assert site.delta_norm == pytest.approx(float((5 / 3 * up @ low).norm()), rel=1e-5)
        assert site.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)
        assert site.kept > 0.9999
    text = str(report)
    assert text.startswith("folded default into 2 weights")
    assert "fc1" in text
    assert "kept" in text


def test_a_delta_of_zero_is_kept() -> None:
    report = lora_fx.fold_report(lora_fx.fold(injected(MLP, traced(MLP, "trace", torch.bfloat16))))
    assert [(site.delta_norm, site.kept) for site in report.sites] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 1e-3), (torch.bfloat16, 0.05), (torch.bfloat16, 1), (torch.float16, 1e-3), (torch.float32, 1e-6)],
)
def test_what_survives_is_measured(dtype: torch.dtype, size: float, count: int) -> None:
    gm = linear(torch.randn(131, 127).to(dtype) / 11)
    if count == 2:
        gm = lora_fx.inject(gm, LoraConfig(target_modules=[""], r=2, lora_alpha=3), adapter_name="second")
    exact = torch.zeros(131, 127, dtype=torch.float64)
    for name, scaling in zip(lora_fx.adapter_names(gm), (5 / 3, 3 / 2), strict=False):
        randomise(gm, name, size=size)
        low, up = (p.detach().double() for p in lora_fx.lora_parameters(gm, name))
        exact += scaling * up @ low
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = lora_fx.fold(gm)
    written = result.get_parameter("weight").detach().double() - gm.get_parameter("weight").detach().double()
    kept = max(0.0, 1 - float((written - exact).norm() / exact.norm()))
    site = lora_fx.fold_report(result).sites[0]
    assert site.kept == pytest.approx(kept, abs=0.02)
    assert site.delta_norm == pytest.approx(float(exact.norm()), rel=1e-4)
    messages = [str(w.message) for w in caught if issubclass(w.category, LoraFxWarning)]
    if kept < 0.9:
        wider = "torch.float64" if dtype is torch.float32 else "torch.float32"
        assert len(messages) == 1
        assert str(dtype) in messages[0]
        assert f"{wider} weights would keep it" in messages[0]
    else:
        assert messages == []


def test_the_warning_names_the_worst_site_and_how_many() -> None:
    gm = randomise(injected(STACK, traced(STACK, "trace", torch.bfloat16)), size=1e-3)
    with pytest.warns(
        LoraFxWarning, match=r"keeps only .* of the delta of '.*' \(\d of 7 sites lose more than a tenth"
    ):
        lora_fx.fold(gm)


# Another dtype, device or place ---------------------------------------------------------------------


def test_stride_and_device_of_the_weight_are_kept() -> None:
    for name in ("strided", "transposed"):
        case = BY_NAME[name]
        gm = traced(case)
        result = lora_fx.fold(randomise(injected(case, gm)))
        for parameter_name, parameter in gm.named_parameters():
            twin = result.get_parameter(parameter_name)
            assert (twin.stride(), twin.dtype, twin.device) == (parameter.stride(), parameter.dtype, parameter.device)
            assert type(twin) is type(parameter)


def test_meta_tensors_are_refused_by_name() -> None:
    gm = injected(MLP, private()).to("meta")
    with pytest.raises(FoldError, match=r"fc1.*meta"):
        lora_fx.fold(gm)


def test_hooks_and_meta_of_the_graph_survive() -> None:
    gm = private()
    gm.meta["mine"] = 3
    adapted = injected(MLP, gm)
    calls: list[int] = []
    adapted.register_forward_hook(lambda *_: calls.append(1))
    result = lora_fx.fold(adapted)
    assert (adapted.meta["mine"], result.meta["mine"]) == (3, 3)
    run(result, MLP.arguments())
    assert calls == [1]


# Weights that the model reads in other ways too -----------------------------------------------------


def model_of(forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], *shape: int) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(*shape) / 3)
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return forward(self, x)

    return Model().eval()


def zeroed(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    copied = self.w.clone()
    copied[0] = 0
    return x @ copied


READ_TWICE = {
    "norm beside": (lambda self, x: self.fc(x) + self.fc.weight.norm(), (7, 5), "fc"),
    "factor beside": (lambda self, x: self.fc(x) * self.fc.weight.detach().abs().mean(), (7, 5), "fc"),
    "applied twice": (lambda self, x: x @ self.w @ self.w, (7, 7), "w"),
    "applied both ways": (lambda self, x: (x @ self.w).tanh() @ self.w.T, (7, 5), "w"),
    "times itself": (lambda self, x: x @ (self.w @ self.w), (7, 7), "w"),
    "its own bias": (lambda self, x: torch.addmm(self.w, self.w, x.T @ x), (7, 7), "w"),
    "changed copy": (zeroed, (7, 5), "w"),
    "cast": (lambda self, x: (x.double() @ self.w.double()).float(), (7, 5), "w"),
    "part of it": (lambda self, x: x @ self.w[:, :3], (7, 5), "w"),
}


@pytest.mark.parametrize("tracer", ["trace", "export", "strict"])
@pytest.mark.parametrize("name", READ_TWICE)
def test_a_weight_that_is_read_twice_is_folded_rightly_or_refused(name: str, tracer: str) -> None:
    forward, shape, target = READ_TWICE[name]
    x = torch.randn(3, 7)
    gm = zoo.trace_with(tracer, model_of(forward, *shape), (x,), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        try:
            adapted = randomise(lora_fx.inject(gm, LoraConfig(target_modules=[target], r=3, lora_alpha=5)))
        except lora_fx.TargetError:
            return
        result = lora_fx.fold(adapted)
    base, expected = run(gm, ((x,), {})), run(adapted, ((x,), {}))
    assert zoo.distance(expected, run(result, ((x,), {}))) < 64 * torch.finfo(torch.float32).eps
    assert zoo.distance(expected, base) > 1e-3


@pytest.mark.parametrize("tracer", ["trace", "export", "strict"])
def test_a_cast_weight_is_not_untied(tracer: str) -> None:
    forward, shape, _ = READ_TWICE["cast"]
    gm = zoo.trace_with(tracer, model_of(forward, *shape), (torch.randn(3, 7),), {})
    adapted = lora_fx.inject(gm, LoraConfig(target_modules=["w"]))
    assert not lora_fx.compare_graphs(gm, lora_fx.fold(adapted))  # and without a warning


# For good -------------------------------------------------------------------------------------------


def own_model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, lora_fx.LoraGraphModule]:
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5)).to(dtype).eval()
    config = LoraConfig(target_modules=["0"], modules_to_save=["2"], r=3, lora_alpha=5, bias="lora_only")
    return model, randomise(lora_fx.inject(fx.symbolic_trace(model), config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_folding_for_good_gives_what_folding_gives(dtype: torch.dtype) -> None:
    model, gm = own_model(dtype)
    with torch.no_grad():
        gm.get_parameter("2.weight").add_(0.25)
    x = torch.randn(3, 7, dtype=dtype)
    expected = lora_fx.fold(gm)
    result = lora_fx.fold(gm, inplace=True, reversible=False)
    assert result is gm
    assert not lora_fx.compare_graphs(expected, result)
    assert torch.equal(model(x), expected(x))  # the model itself is the merged model
    report, wanted = lora_fx.fold_report(result).sites[0], lora_fx.fold_report(expected).sites[0]
    assert report.weight_norm == pytest.approx(wanted.weight_norm, rel=1e-5)
    assert report.kept == pytest.approx(wanted.kept, abs=1e-3)
    with pytest.raises(FoldError, match="no fold to take back"):
        lora_fx.unfold(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_folding_for_good_refuses_before_it_writes(value: float) -> None:
    model, gm = own_model(torch.float16)
    with torch.no_grad():
        gm.get_parameter("0.lora_B.default.weight").fill_(value)
        gm.get_parameter("0.lora_A.default.weight").fill_(3)
    before, code = copy.deepcopy(model.state_dict()), gm.code
    with pytest.raises(FoldError, match="'0'"):
        lora_fx.fold(gm, inplace=True, reversible=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert gm.code == code


def test_folding_for_good_takes_what_only_looking_can_tell() -> None:
    """|W + ΔW| stays below the dtype's end, though no bound from norms says so."""
    model, gm = own_model(torch.float16)
    with torch.no_grad():
        gm.get_parameter("0.weight").fill_(3e4)
    with pytest.warns(LoraFxWarning, match="float16 keeps only"):
        lora_fx.fold(gm, inplace=True, reversible=False)
    assert bool(torch.isfinite(model[0].weight).all())


def test_irreversible_goes_with_inplace() -> None:
    with pytest.raises(FoldError, match="goes with inplace=True"):
        lora_fx.fold(own_model()[1], reversible=False)


def test_folding_is_exact_whatever_products_training_may_use() -> None:
    """torch.set_float32_matmul_precision("medium") lets bfloat16 into float32 products; folding does not follow."""
    gm = own_model()[1]
    expected = lora_fx.fold(gm).state_dict()
    torch.set_float32_matmul_precision("medium")
    try:
        result = lora_fx.fold(gm).state_dict()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(value, result[name]) for name, value in expected.items())


def test_a_copy_of_a_graph_folded_in_place_is_a_folded_graph() -> None:
    gm = lora_fx.fold(own_model()[1], inplace=True)
    twin = copy.deepcopy(gm)
    assert not lora_fx.compare_graphs(gm, twin)
    with pytest.raises(FoldError, match="no fold to take back"):
        lora_fx.unfold(twin)
    lora_fx.unfold(gm)
    assert lora_fx.compare_graphs(gm, twin)


def test_what_was_trained_in_full_reaches_the_model_with_two_adapters() -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).eval()
    x = torch.randn(3, 7)
    one = LoraConfig(target_modules=["0"], modules_to_save=["4"])
    gm = lora_fx.inject(lora_fx.trace(model, (x,)), one, adapter_name="one")
    gm = lora_fx.inject(gm, LoraConfig(target_modules=["2"]), adapter_name="two")
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_(std=0.3)
    expected = lora_fx.fold(gm)(x)
    lora_fx.fold(gm, inplace=True)
    assert torch.equal(model(x), expected)


def test_folding_in_place_after_a_move_to_another_dtype_leaves_the_model_alone() -> None:
    model, gm = own_model()
    before = copy.deepcopy(model.state_dict())
    gm = gm.to(torch.bfloat16)
    folded = lora_fx.fold(gm, inplace=True)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    folded(torch.randn(3, 7, dtype=torch.bfloat16))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_folded_graph_owns_what_was_trained_in_full() -> None:
    _, gm = own_model()
    gm = lora_fx.inject(gm, LoraConfig(target_modules=["2"], exclude_modules=["0"]), adapter_name="two")
    part = lora_fx.fold(gm, adapters="default")
    assert not any(parameter.requires_grad for name, parameter in part.named_parameters() if "lora_" not in name)
    before = part.get_parameter("2.weight").clone()
    with torch.no_grad():
        gm.get_parameter("2.weight").add_(1)
    assert torch.equal(part.get_parameter("2.weight"), before)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_adapter_of_zeros_changes_no_bit_of_a_negative_zero(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(7, 5)).eval()
    with torch.no_grad():
        model[0].weight.copy_(-torch.zeros(5, 7))
    gm = lora_fx.inject(lora_fx.trace(model, torch.randn(3, 7)), LoraConfig(target_modules=["0"]))
    folded = lora_fx.fold(gm, inplace=inplace)
    assert bool(torch.signbit(folded.get_parameter("0.weight")).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_in_float64_are_rounded_once(dtype: torch.dtype) -> None:
    """Each weight is the number of its type that is nearest to W + ΔW, in float64."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(96, 96, bias=False)).to(dtype).eval()
    gm = lora_fx.trace(model, (torch.randn(2, 96).to(dtype),))
    gm = lora_fx.inject(gm, {"r": 8, "lora_alpha": 12, "target_modules": ["0"]})
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_(0, 0.05)
    a, b = (gm.get_parameter(f"0.lora_{half}.default.weight").detach().double() for half in "AB")
    exact = model[0].weight.detach().double() + 1.5 * (b @ a)
    folded = lora_fx.fold(gm, accumulate=torch.float64).get_parameter("0.weight").detach()
    error = (folded.double() - exact).abs()
    for beside in (torch.inf, -torch.inf):
        other = torch.nextafter(folded, torch.full_like(folded, beside))
        assert bool((error <= (other.double() - exact).abs() + 1e-16).all())


# On graphs that need no tracing -----------------------------------------------------------------------


class Small(nn.Module):
    """Two linears, and a norm with buffers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).tanh())


def small(**options: Any) -> tuple[nn.Module, lora_fx.LoraGraphModule]:
    """The model, and its graph with an adapter whose every tensor has been trained."""
    model = Small().eval()
    return model, trained(lora_fx.inject(fx.symbolic_trace(model), _config(**options)))


def _config(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": ["a", "b"]} | options))


def trained(gm: lora_fx.LoraGraphModule, name: str = "default") -> lora_fx.LoraGraphModule:
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm, name):
            parameter.add_(torch.randn(parameter.shape) / 2)
        for name, buffer in gm.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.5)
    return gm


IN_PLACE = pytest.mark.parametrize("options", [{}, {"inplace": True}, {"inplace": True, "reversible": False}], ids=str)
BATCH = torch.linspace(-1, 1, 12).view(3, 4)


@IN_PLACE
@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_was_trained_in_full_is_of_the_kind_it_was(options: dict[str, bool], is_frozen: bool) -> None:
    """Parameters stay parameters with the base's flags, buffers stay buffers; nothing of the adapter is left."""
    model = Small().eval().requires_grad_(not is_frozen)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    adapted = trained(lora_fx.inject(fx.symbolic_trace(model), _config(modules_to_save=["norm"])))
    wanted, code = adapted(BATCH), adapted.code
    folded = lora_fx.fold(adapted, **options)
    assert (folded is adapted) == bool(options)
    assert folded.code == fx.symbolic_trace(model).code
    torch.testing.assert_close(folded(BATCH), wanted)
    for find in (nn.Module.named_parameters, nn.Module.named_buffers):
        assert {name: each.requires_grad for name, each in find(folded)} == {
            name: each.requires_grad for name, each in find(model)
        }
    record = record_of(folded)
    assert (record.adapters, record.active, record.originals, record.selections) == ({}, {}, {}, {})
    assert lora_fx.fold_report(folded).trained == tuple(n for n in model.state_dict() if n.startswith("norm."))
    for name, tensor in model.state_dict().items():
        lies_in_the_model = folded.state_dict()[name].data_ptr() == tensor.data_ptr()
        assert lies_in_the_model == (bool(options) or (name.endswith("bias") and "norm" not in name))
    if options:
        torch.testing.assert_close(model(BATCH), wanted)
    if options.get("reversible", True) and options:
        assert torch.equal(lora_fx.unfold(folded)(BATCH), wanted)
        assert folded.code == code
    elif options:
        with pytest.raises(FoldError, match="there is no fold to take back"):
            lora_fx.unfold(folded)
    if options.get("reversible", True):
        assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before


def test_what_two_names_share_is_shared_after_a_fold() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[2].weight = model[1].weight
    adapted = lora_fx.inject(fx.symbolic_trace(model), _config(target_modules=["0"], modules_to_save=["1", "2"]))
    folded = lora_fx.fold(trained(adapted))
    assert folded.get_parameter("1.weight") is folded.get_parameter("2.weight")
    assert folded.get_parameter("1.weight").data_ptr() != adapted.get_parameter("1.weight").data_ptr()


@IN_PLACE
def test_a_fold_of_one_adapter_leaves_the_other_one(options: dict[str, bool]) -> None:
    _, gm = small(modules_to_save=["norm"])
    both = trained(lora_fx.inject(gm, _config(target_modules=["b"]), adapter_name="two"), "two")
    lora_fx.set_adapters(both, "two")
    lora_fx.set_adapters(both, {"default": 1.0, "two": -2.0})
    wanted = both(BATCH)
    folded = lora_fx.fold(both, adapters="default", **options)
    torch.testing.assert_close(folded(BATCH), wanted)
    record = record_of(folded)
    assert (list(record.adapters), record.active, record.originals) == (["two"], {"two": -2.0}, {})
    assert record.selections == {}  # no view of an adapter that is gone
    assert {n for n, p in folded.named_parameters() if p.requires_grad} == {
        f"b.lora_{half}.two.weight" for half in "AB"
    }


def test_adapters_that_do_not_count_are_dropped_unless_some_are_named() -> None:
    _, gm = small()
    both = trained(lora_fx.inject(gm, _config(target_modules=["b"]), adapter_name="two"), "two")
    lora_fx.set_adapters(both, "default")
    folded = lora_fx.fold(both)
    torch.testing.assert_close(folded(BATCH), both(BATCH))
    assert (lora_fx.adapter_names(folded), lora_fx.fold_report(folded).adapters) == ((), ("default",))
    assert not any("lora_" in name for name in folded.state_dict())
    assert lora_fx.adapter_names(lora_fx.fold(both, adapters=["default"])) == ("two",)
    lora_fx.set_adapters(both, {})
    with pytest.raises(FoldError, match="no adapter counts at the moment"):
        lora_fx.fold(both)
    with pytest.raises(FoldError, match="adapter 'two' does not count at the moment"):
        lora_fx.fold(both, adapters="two")


def test_what_names_and_states_are_refused() -> None:
    _, gm = small()
    traced = lora_fx.trace(nn.Sequential(nn.Linear(4, 4)).eval(), BATCH)
    batched = lora_fx.batch_adapters(lora_fx.inject(traced, _config(target_modules=["0"])))
    for graph, options, message in (
        (gm, {"adapters": 3}, "adapters=3 must be a list of adapter names"),
        (gm, {"adapters": {"default": 1}}, "must be a list of adapter names"),
        (gm, {"adapters": ()}, "names nothing to fold"),
        (batched, {}, "comes from batch_adapters"),
        (lora_fx.fold(copy.deepcopy(gm), inplace=True), {}, "folded already"),
        (fx.symbolic_trace(Small()), {}, "has no adapter"),
    ):
        with pytest.raises(FoldError, match=message):
            lora_fx.fold(graph, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulate": torch.float16}, FoldError, "accumulate=torch.float16 must be torch.float32 or torch.float64"),
        ({"quantized": "round"}, FoldError, "quantized='round' must be 'dequantize', 'requantize' or None"),
        ({"reversible": False}, FoldError, "reversible=False goes with inplace=True"),
        ({"check": True}, lora_fx.GraphError, "remembers no inputs"),
    ],
    ids=str,
)
def test_what_is_asked_for_has_to_be_possible(options: Any, error: type[Exception], message: str) -> None:
    _, gm = small()
    with pytest.raises(error, match=message):
        lora_fx.fold(gm, **options)


@IN_PLACE
def test_a_weight_without_values_is_not_folded(options: dict[str, bool]) -> None:
    _, gm = small()
    set_attribute(gm, "b.weight", nn.Parameter(torch.empty(2, 4, device="meta"), requires_grad=False))
    with pytest.raises(FoldError, match=r"'b\.weight' .* load the weights first"):
        lora_fx.fold(gm, **options)


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"inplace": True, "reversible": False}], ids=str)
def test_a_wrong_sum_is_found_before_it_is_written(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    _, gm = small()
    merge, before = lora_fx.fold_sums.merge, fingerprint(gm)  # type: ignore[attr-defined]

    def wrong(weight: torch.Tensor, deltas: Any, into: torch.Tensor, **more: Any) -> Any:
        found = merge(weight, deltas, into, **more)
        into.add_(0.1)
        return found

    monkeypatch.setattr("lora_fx.fold_sums.merge", wrong)
    with pytest.raises(FoldError, match="nothing was changed"):
        lora_fx.fold(gm, check=(BATCH,), **options)
    assert fingerprint(gm) == before


@IN_PLACE
def test_a_kernel_keeps_the_order_of_its_memory(options: dict[str, bool]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last).eval()
    gm = trained(lora_fx.inject(fx.symbolic_trace(model), _config(target_modules=["0"])))
    x = torch.randn(1, 3, 6, 6)
    wanted = gm(x)
    folded = lora_fx.fold(gm, **options)
    torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-4)
    assert folded.get_parameter("0.weight").stride() == model[0].weight.stride()


@pytest.mark.parametrize("names", ["two", ["two"], ("two",), {"two"}, frozenset({"two"})], ids=str)
def test_names_come_one_or_as_any_collection(names: Any) -> None:
    _, gm = small()
    both = trained(lora_fx.inject(gm, _config(target_modules=["b"]), adapter_name="two"), "two")
    assert lora_fx.adapter_names(lora_fx.fold(both, adapters=names)) == ("default",)


def test_a_report_names_all_that_was_ever_folded_in() -> None:
    _, gm = small()
    first = lora_fx.fold(gm)
    second = lora_fx.fold(trained(lora_fx.inject(first, _config(lora_alpha=7), adapter_name="two"), "two"))
    report = lora_fx.fold_report(second)
    assert (report.adapters, [stamp["lora_alpha"] for stamp in report.stamps]) == (("two",), [3, 7])
    assert report.stamps[0] == lora_fx.fold_report(first).stamps[0]


def test_unfolding_keeps_the_mode() -> None:
    _, gm = small()
    for folded_in, taken_back_in in ((True, True), (True, False), (False, True)):
        lora_fx.fold(gm.train(folded_in), inplace=True).train(taken_back_in)
        assert lora_fx.unfold(gm).training == taken_back_in
        assert gm.norm.training == taken_back_in


def test_an_interrupted_fold_in_place_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gm = small(modules_to_save=["norm"])
    before, code = {name: bits(tensor) for name, tensor in model.state_dict().items()}, gm.code
    merge, count = lora_fx.fold_sums.merge, []  # type: ignore[attr-defined]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return merge(*arguments, **options)

    monkeypatch.setattr("lora_fx.fold_sums.merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora_fx.fold(gm, inplace=True)
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
    assert gm.code == code


@pytest.mark.parametrize(
    ("options", "merges"),
    [({}, 2), ({"check": (BATCH,)}, 2), ({"inplace": True}, 2), ({"inplace": True, "check": (BATCH,)}, 4)],
    ids=str,
)
def test_a_weight_is_summed_once_and_once_more_to_check_what_is_written_in_place(
    options: dict[str, Any], merges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gm = small()
    wanted = gm(BATCH)
    merge, calls = lora_fx.fold_sums.merge, []  # type: ignore[attr-defined]
    monkeypatch.setattr("lora_fx.fold_sums.merge", lambda *args, **more: calls.append(1) or merge(*args, **more))
    torch.testing.assert_close(lora_fx.fold(gm, **options)(BATCH), wanted)
    assert len(calls) == merges


def test_nothing_is_computed_that_was_not_asked_for_or_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding once in software is for float64 on request; a fold for good has the norms from its check."""
    told: list[tuple[bool, bool]] = []
    merge = lora_fx.fold_sums.merge  # type: ignore[attr-defined]

    def listening(*arguments: Any, is_exact: bool, weight_norm: float | None) -> Any:
        told.append((is_exact, weight_norm is not None))
        return merge(*arguments, is_exact=is_exact, weight_norm=weight_norm)

    monkeypatch.setattr("lora_fx.fold_sums.merge", listening)
    _, gm = small(target_modules=["b"])
    for accumulate in (None, torch.float32, torch.float64):
        lora_fx.fold(gm, accumulate=accumulate)
    lora_fx.fold(gm, inplace=True, reversible=False)
    assert told == [(False, False), (False, False), (True, False), (False, True)]


def test_what_sums_are_made_in() -> None:
    wanted = {
        (torch.float32, None): torch.float32,
        (torch.float32, torch.float64): torch.float64,
        (torch.float64, torch.float32): torch.float64,
        (torch.bfloat16, None): torch.float64,
        (torch.float16, None): torch.float64,
        (torch.float16, torch.float32): torch.float32,
    }
    for (dtype, accumulate), width in wanted.items():
        assert sum_dtype(dtype, accumulate) == width
    for dtype in (torch.float16, torch.float32):
        assert sum_dtype(dtype, None, has_float64=False) == torch.float32


def test_sums_are_told_whether_the_device_has_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def listening(*arguments: Any, has_float64: bool) -> torch.dtype:
        told.append(has_float64)
        return sum_dtype(*arguments, has_float64=has_float64)

    monkeypatch.setattr("lora_fx.fold_sums.sum_dtype", listening)
    lora_fx.fold(small()[1])
    assert told == [True, True]  # of Apple's GPUs alone it is not so


def test_with_float64_the_sum_is_rounded_once_where_two_roundings_differ() -> None:
    """1 + 2⁻⁸ + 2⁻⁴⁰ is above the middle of two bfloat16; its float32 lies on it, and would go down."""
    adapted = lora_fx.inject(
        fx.symbolic_trace(nn.Linear(1, 1, bias=False).bfloat16()), {"r": 2, "target_modules": [""]}
    )
    with torch.no_grad():
        for name, values in (("weight", [[1.0]]), ("lora_A.default.weight", [[2.0**-8], [2.0**-40]])):
            adapted.get_parameter(name).copy_(torch.tensor(values))
        adapted.get_parameter("lora_B.default.weight").fill_(1 / 4)  # lora_alpha / r is 4
    with pytest.warns(LoraFxWarning, match="keeps only"):
        folded = lora_fx.fold(adapted, accumulate=torch.float64)
    assert folded.get_parameter("weight").item() == 1 + 2**-7


def test_how_far_a_sum_would_reach_is_said() -> None:
    _, gm = small(target_modules=["b"], lora_alpha=2)
    gm = gm.half()
    with torch.no_grad():
        for name, value in (("b.weight", 1e4), ("b.lora_A.default.weight", 200.0), ("b.lora_B.default.weight", 200.0)):
            gm.get_parameter(name).fill_(value)
    with pytest.raises(
        FoldError, match=r"folding 'b' \(b.weight\): \|W \+ ΔW\| reaches 9e\+04, beyond torch.float16's"
    ):
        lora_fx.fold(gm)


def test_a_site_is_told_from_the_others_in_a_report() -> None:
    model, gm = small(rank_pattern={"b": 1})
    for site, (name, alpha_by_r) in zip(
        lora_fx.fold_report(lora_fx.fold(gm)).sites, [("a", 1.5), ("b", 3)], strict=True
    ):
        low, up = (gm.get_parameter(f"{name}.lora_{half}.default.weight").detach() for half in "AB")
        weight = model.get_submodule(name).weight.detach()
        assert (site.path, site.weight, site.dtype, site.untied_from) == (name, f"{name}.weight", torch.float32, ())
        assert site.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)
        assert site.delta_norm == pytest.approx(alpha_by_r * float((up @ low).norm()), rel=1e-5)
        assert site.kept == pytest.approx(1, abs=1e-4)

"""DoRA, B with a bias, and starts that are taken off again: the laws for each, on every way of applying a parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from zoo import (
    BY_NAME,
    SMALL,
    Case,
    assert_same_bits,
    bits,
    codes,
    distance,
    fingerprint,
    folded,
    frozen,
    in_mode,
    injected,
    loss_of,
    randomise,
    run,
    tolerance,
    traced,
)

import lora_fx
from lora_fx import ConfigError, FoldError, GraphError, LoraConfig, LoraFxError, TargetError


def has_added_bias(site: lora_fx.Site) -> bool:
    return site.op == "addmm" or site.path.endswith("in_proj_weight")


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa", "r": 2},
    "dora_pissa": {"use_dora": True, "init_lora_weights": "pissa", "r": 2},
}
# Where the variant has no meaning, and the site that says so.
REFUSED = {
    ("dora", "kernels"): "up",  # a transposed convolution
    ("dora", "experts"): "gate_up",
    ("lora_bias", "lookups"): "places|words",
    ("lora_bias", "experts"): "gate_up",
    ("lora_bias", "unread"): "lstm|place",
    ("dora", "unread"): "place",  # of three dimensions
    ("pissa", "unread"): "place",
    ("pissa", "kernels"): "ring|up",  # with groups
    ("pissa", "experts"): "gate_up",
}
MODELS = [case for case in (*SMALL, BY_NAME["gpt2"], BY_NAME["llama"]) if not case.untrained and case.name != "cond"]


# Only the shapes that an exported graph carries tell whether `W @ x` has a vector or a matrix for x.
UNKNOWN_AXIS = ("products", "vector")


def refusal(variant: str, case: Case, tracer: str = "trace") -> str | None:
    if tracer == "symbolic" and case.name in UNKNOWN_AXIS and variant != "pissa":
        return "on which axis"
    return next((REFUSED[each, case.name] for each in variant.split("_") if (each, case.name) in REFUSED), None) or (
        REFUSED.get((variant, case.name))
    )


# All ways of applying a parameter in float32, by two tracers; the 16-bit type where it is trained, by the first.
ALLOWED = [
    pytest.param(variant, case, tracer, dtype, id=f"{variant}-{case}-{tracer}-{str(dtype).removeprefix('torch.')}")
    for variant in VARIANTS
    for case in MODELS
    for tracer in case.tracers[:2]
    for dtype in (torch.float32, torch.bfloat16)
    if refusal(variant, case, tracer) is None and dtype in case.dtypes
    if dtype is torch.float32 or tracer == case.tracers[0]
    if variant != "dora_pissa" or case.name in ("stack", "addmm", "gpt2", "tied_head")
]
FLOAT32 = [p for p in ALLOWED if p.values[2] == "trace" and p.values[3] is torch.float32]


def adapted_by(variant: str, case: Case, gm: fx.GraphModule, **options: Any) -> Any:
    return injected(case, gm, **VARIANTS[variant], **options)


def moved(gm: Any, adapter: str = "default") -> Any:
    """Away from the start in all that is trained."""
    randomise(gm, adapter, size=0.5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif f"lora_B.{adapter}.bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gm


@pytest.mark.parametrize(("variant", "case", "tracer", "dtype"), ALLOWED)
def test_injecting_is_the_identity(variant: str, case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm, arguments = traced(case, tracer, dtype), case.arguments(dtype)
    before = fingerprint(gm)
    base, adapted = frozen(gm), adapted_by(variant, case, gm)
    assert fingerprint(gm) == before
    for mode in (False, True) if tracer == "trace" else (gm.training,):
        if tracer == "trace":
            base.train(mode)
        expected, actual = run(base, arguments), run(in_mode(adapted, mode), arguments)
        if "pissa" in variant:  # A and B are not zero: B @ A − B0 @ A0 is, to the last digits
            assert distance(expected, actual) <= tolerance(case, dtype)
        else:
            assert_same_bits(expected, actual)


@pytest.mark.parametrize(("variant", "case", "tracer", "dtype"), ALLOWED)
def test_folded_equals_unfolded(variant: str, case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm, arguments = traced(case, tracer, dtype), case.arguments(dtype)
    adapted = moved(adapted_by(variant, case, gm))
    sites = [site for site in lora_fx.find_sites(gm) if site.path in case.targeted]
    if variant == "lora_bias" and any(site.bias is None and not has_added_bias(site) for site in sites):
        with pytest.raises(FoldError, match="has a lora_bias, and no bias of its own"):
            lora_fx.fold(adapted)
        return
    result = folded(case, adapted)
    for mode in (False, True) if tracer == "trace" else (gm.training,):
        expected, actual = run(in_mode(adapted, mode), arguments), run(in_mode(result, mode), arguments)
        assert distance(expected, actual) <= 2 * tolerance(case, dtype)
    if dtype is torch.float32 and not case.computes:
        assert distance(run(adapted.eval(), arguments), run(frozen(gm), arguments)) > 100 * tolerance(case, dtype)
    if not case.unties:
        assert codes(result) == codes(gm)
        assert set(result.state_dict()) == set(gm.state_dict())


@pytest.mark.parametrize(("variant", "case", "tracer", "dtype"), FLOAT32)
def test_a_step_moves_the_adapter_and_nothing_else(variant: str, case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm = in_mode(moved(adapted_by(variant, case, traced(case, tracer, dtype))), True)
    before = {name: tensor.detach().clone() for name, tensor in gm.state_dict().items()}
    optimizer = torch.optim.SGD(lora_fx.lora_parameters(gm), lr=1.0)
    ((1 if dtype.itemsize > 2 else 64) * loss_of(gm, case.arguments(dtype))).backward()
    optimizer.step()
    changed = {name for name, tensor in gm.state_dict().items() if bits(tensor) != bits(before[name])}
    statistics = {n for n, _ in gm.named_buffers() if "running_" in n or "num_batches" in n}
    trained = {id(p) for p in lora_fx.lora_parameters(gm)}
    assert changed - statistics == {name for name, p in gm.named_parameters(remove_duplicate=False) if id(p) in trained}


@pytest.mark.parametrize(("variant", "case", "tracer", "dtype"), FLOAT32)
def test_save_and_load_is_the_identity(
    variant: str, case: Case, tracer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    gm, arguments = traced(case, tracer, dtype), case.arguments(dtype)
    adapted = moved(adapted_by(variant, case, gm))
    lora_fx.save_adapter(adapted, tmp_path)
    loaded = lora_fx.load_adapter(gm, tmp_path)
    expected, actual = run(adapted, arguments), run(loaded, arguments)
    if "pissa" in variant:  # the same products, in other sums
        assert distance(expected, actual) <= tolerance(case, dtype)
    else:
        assert_same_bits(expected, actual)


@pytest.mark.parametrize(("variant", "name"), REFUSED)
def test_where_it_has_no_meaning_it_is_refused(variant: str, name: str) -> None:
    case = BY_NAME[name]
    gm = traced(case)
    before = fingerprint(gm)
    with pytest.raises((TargetError, ConfigError), match=REFUSED[variant, name]):
        adapted_by(variant, case, gm)
    assert fingerprint(gm) == before


@pytest.mark.parametrize("name", UNKNOWN_AXIS)
def test_an_axis_that_the_graph_does_not_tell(name: str) -> None:
    gm = traced(BY_NAME[name], "symbolic")
    before = fingerprint(gm)
    with pytest.raises(GraphError, match=r"on which axis of the result of \w+ its outputs lie"):
        adapted_by("dora", BY_NAME[name], gm)
    assert fingerprint(gm) == before


def test_an_output_without_weights_stays_one() -> None:
    """Its norm is 0, and what DoRA divides by is not."""
    model = nn.Sequential(nn.Linear(7, 5)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0.0
    arguments = ((torch.randn(3, 7),), {})
    gm = lora_fx.trace(model, *arguments)
    adapted = lora_fx.inject(gm, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert_same_bits(run(frozen(gm), arguments), run(adapted, arguments))
    randomise(adapted)
    folded = lora_fx.fold(adapted)
    assert distance(run(adapted, arguments), run(folded, arguments)) < 1e-5
    assert all(bool(torch.isfinite(p).all()) for p in folded.parameters())


def test_norms_that_a_narrow_type_has_no_room_for_are_refused() -> None:
    model = nn.Sequential(nn.Linear(7, 5)).eval()
    with torch.no_grad():
        model[0].weight[2] = 1e3  # its square is beyond float16
    gm = lora_fx.trace(model, torch.randn(3, 7))
    with pytest.raises(LoraFxError, match=r"use_dora divides by are 0 or not finite in torch.float16; inject\("):
        lora_fx.inject(gm, LoraConfig(r=2, target_modules=["0"], use_dora=True), adapter_dtype=torch.float16)


def test_the_norms_build_no_weight() -> None:
    """No node of the graph has as many elements as W, but those that were there, and W itself read once more."""
    gm = traced(BY_NAME["llama"])
    adapted = lora_fx.inject(gm, LoraConfig(r=2, target_modules=["up_proj"], use_dora=True))
    shapes: list[tuple[int, ...]] = []

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if "lora_fx" in n.meta and isinstance(value, torch.Tensor):
                shapes.append(tuple(value.shape))
            return value

    args, kwargs = BY_NAME["llama"].arguments()
    with torch.no_grad():
        Shapes(adapted).run(*torch.utils._pytree.tree_leaves((args, kwargs)))
    weight = adapted.get_parameter("model.layers.0.mlp.up_proj.weight")
    full = [shape for shape in shapes if weight.shape[0] in shape and weight.shape[1] in shape]
    assert shapes
    assert len(full) == 2 * 2  # two layers: the read, and the view of it as one of a stack of matrices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_magnitude_that_was_trained_alone_is_folded(dtype: torch.dtype) -> None:
    x = torch.randn(5, 1024)
    gm = lora_fx.trace(nn.Sequential(nn.Linear(1024, 13)), (x,))
    adapted = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["0"], use_dora=True), adapter_dtype=dtype)
    with torch.no_grad():
        adapted.get_parameter("0.lora_magnitude_vector.default.weight").mul_(1.03)
        assert (adapted(x) - gm(x)).abs().max() > 0.01
        eps = torch.finfo(dtype).eps  # the graph takes norms in the adapter's dtype
        torch.testing.assert_close(lora_fx.fold(adapted)(x), adapted(x), rtol=0, atol=max(2 * eps, 1e-5))

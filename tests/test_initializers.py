"""The first values of A and B: each against the property that defines it, against PEFT, and on what it cannot start."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import config as peft_config
from torch import nn

from lora_fx import ConfigError
from lora_fx.init_options import (
    INITS,
    CordaConfig,
    EvaConfig,
    InitOptions,
    LoftQConfig,
    LoraGAConfig,
    init_of,
)
from lora_fx.initializers import INITIALIZERS, Context, Start, initializer_of, normal_float, quantise
from lora_fx.site_statistics import SiteStatistics

# (out, in): wide, tall and square.
SHAPES = [(11, 17), (17, 11), (13, 13)]
CHANGING = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]
R, SCALING = 3, 1.7


def weight(shape: tuple[int, int] = (11, 17), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype) / math.sqrt(shape[1])


def statistics(matrix: torch.Tensor) -> SiteStatistics:
    """What data might have told."""
    rows = torch.randn(64, matrix.shape[1], dtype=matrix.dtype) @ torch.diag(
        torch.linspace(0.2, 2, matrix.shape[1], dtype=matrix.dtype)
    )
    _, sigma, vh = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    return SiteStatistics(
        components=vh[:5],
        singular_values=sigma[:5],
        covariance=rows.mT @ rows / 64,
        gradient=torch.randn_like(matrix) / 100,
    )


def start(
    name: str,
    matrix: torch.Tensor,
    r: int = R,
    scaling: float = SCALING,
    options: InitOptions | None = None,
    dtype: torch.dtype | None = None,
    calibration: SiteStatistics | None = None,
) -> Start:
    found = calibration or statistics(matrix)
    return initializer_of(name)(matrix, r, scaling, Context("block.fc", options, found, dtype))


def bound(matrix: torch.Tensor, dtype: torch.dtype | None = None) -> float:
    return 32 * torch.finfo(dtype or matrix.dtype).eps * float(matrix.abs().max())


def best(matrix: torch.Tensor, r: int) -> torch.Tensor:
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] * sigma[:r] @ vh[:r]


# Laws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [SCALING, 0.25, -2.0])
@pytest.mark.parametrize("name", CHANGING)
def test_base_and_adapter_together_are_the_weight(name, scaling, shape) -> None:
    matrix = weight(shape)
    kept = matrix.clone()
    found = start(name, matrix, scaling=scaling)
    assert (found.a.shape, found.b.shape) == ((R, shape[1]), (shape[0], R))
    assert (found.base + scaling * found.b @ found.a - matrix).abs().max() <= bound(matrix) * 8
    assert torch.equal(matrix, kept)
    assert (found.base - matrix).abs().max() > 1e-4  # not vacuous


@pytest.mark.parametrize("name", CHANGING)
def test_the_base_is_made_up_for_a_and_b_as_they_are_rounded(name) -> None:
    matrix = weight()
    found = start(name, matrix, dtype=torch.bfloat16)
    assert found.a.dtype == found.b.dtype == torch.bfloat16
    assert found.base.dtype == torch.float32
    assert (found.base + SCALING * found.b.float() @ found.a.float() - matrix).abs().max() <= bound(matrix) * 8


@pytest.mark.parametrize("name", CHANGING)
def test_what_is_allowed_in_training_does_not_reach_it(name) -> None:
    matrix, before = weight(), torch.get_float32_matmul_precision()
    known = statistics(matrix)
    torch.manual_seed(1)
    plain = start(name, matrix, calibration=known)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = start(name, matrix, calibration=known)
    assert torch.equal(found.a, plain.a)
    assert torch.equal(found.base, plain.base)
    torch.set_float32_matmul_precision("medium")
    try:
        found = start(name, matrix, calibration=known)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found.base + SCALING * found.b @ found.a - matrix).abs().max() <= bound(matrix) * 8


@pytest.mark.parametrize("name", sorted(INITS))
def test_what_stands_in_the_table(name) -> None:
    init = INITS[name]
    matrix = weight()
    found = start(name, matrix, r=2)
    assert set(INITIALIZERS) == set(INITS)
    assert (found.base is not None) == init.changes_base
    assert found.frozen == ({"b"} if name == "mica" else set())
    assert found.a.is_contiguous()
    assert found.b.is_contiguous()
    assert not found.a.requires_grad
    needed = {field.name for field in dataclasses.fields(SiteStatistics)} & {init.calibration}
    with pytest.raises(ConfigError, match=r"needs data.*lora_fx\.calibrate") if needed else _nothing():
        initializer_of(name)(matrix, 2, 1.0, Context("block.fc"))
    if init.options is not None:  # a configuration's options are taken as PEFT's objects and as mappings, too
        assert init.options.from_peft({}) == init.options()


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(INITS))
def test_dtypes(name, dtype) -> None:
    """Work is done in float32 at least, and in float64 for a float64 weight."""
    matrix = weight(dtype=torch.float64).to(dtype)
    found = start(name, matrix, r=2, calibration=statistics(matrix.double()))
    wide = torch.promote_types(dtype, torch.float32)
    assert found.a.dtype == found.b.dtype == wide
    if found.base is not None and name != "loftq":
        assert found.base.dtype == wide
        exact = matrix.to(wide)
        assert (found.base + SCALING * found.b @ found.a - exact).abs().max() <= bound(exact) * 8


@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_is_the_best_approximation(shape) -> None:
    matrix = weight(shape) * 0.7 ** torch.arange(shape[1])
    found = start("pissa", matrix)
    assert (SCALING * found.b @ found.a - best(matrix, R)).abs().max() <= bound(matrix) * 8
    assert (found.b.norm(dim=0) - found.a.norm(dim=1)).abs().max() <= 1e-5  # shared evenly
    quick = start("pissa_niter_64", matrix)
    assert (SCALING * quick.b @ quick.a - best(matrix, R)).abs().max() <= 1e-4
    rough = start("pissa_niter_0", matrix)
    assert (SCALING * rough.b @ rough.a - best(matrix, R)).abs().max() > 1e-3
    torch.manual_seed(3)
    first = start("pissa_niter_2", matrix, calibration=SiteStatistics())
    torch.manual_seed(3)
    assert torch.equal(first.a, start("pissa_niter_2", matrix, calibration=SiteStatistics()).a)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_takes_the_first_columns_of_q(shape) -> None:
    matrix = weight(shape)
    found = start("olora", matrix)
    assert (found.b.mT @ found.b - torch.eye(R)).abs().max() <= 1e-5
    assert (found.a.tril(-1)).abs().max() <= 1e-6  # rows of a triangular matrix
    assert (found.b @ found.a - matrix)[:, :R].abs().max() <= 1e-5  # which the first columns need no more of


@pytest.mark.parametrize("shape", SHAPES)
def test_mica_keeps_the_directions_that_the_weight_uses_least(shape) -> None:
    matrix = weight(shape)
    found = start("mica", matrix)
    assert not found.a.any()
    assert (found.b.mT @ found.b - torch.eye(R)).abs().max() <= 1e-5
    sigma = torch.linalg.svdvals(matrix)
    assert torch.allclose((found.b.mT @ matrix).norm(dim=1), sigma[-R:], atol=1e-5)


@pytest.mark.parametrize("r", [2, 4, 12, 24])
def test_orthogonal_has_no_effect_and_no_zeros(r) -> None:
    found = start("orthogonal", weight(), r=r)
    assert (found.b @ found.a).abs().max() <= 1e-6
    assert found.a.norm() > 0.1
    assert found.b.norm() > 0.1


def test_eva_takes_the_directions_in_order() -> None:
    matrix = weight()
    known = statistics(matrix)
    found = start("eva", matrix, calibration=known)
    assert torch.equal(found.a, known.components[:R])
    assert not found.b.any()
    whitened = start("eva", matrix, calibration=known, options=EvaConfig(whiten=True))
    assert torch.allclose(whitened.a.norm(dim=1), known.singular_values[:R].rsqrt())


@pytest.mark.parametrize("shape", SHAPES)
def test_corda_loses_least_of_what_the_inputs_see(shape) -> None:
    """W C − (s B A) C has the singular values that are left over; "kpm" takes the smallest, "ipm" the largest."""
    matrix = weight(shape, torch.float64)
    known = statistics(matrix)
    c = known.covariance
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    sigma = torch.linalg.svdvals(matrix @ c)
    for method, left in (("ipm", sigma[R:]), ("kpm", sigma[:-R])):
        found = start("corda", matrix, calibration=known, options=CordaConfig(corda_method=method))
        assert torch.allclose(torch.linalg.svdvals(found.base @ c)[: len(left)], left, rtol=1e-9)


def test_corda_takes_a_covariance_without_an_inverse() -> None:
    matrix = weight()
    row = torch.randn(1, 17)
    found = start("corda", matrix, calibration=SiteStatistics(covariance=row.mT @ row))
    assert (found.base + SCALING * found.b @ found.a - matrix).abs().max() <= 1e-4


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_spans_the_gradient(direction, scale) -> None:
    matrix = weight()
    known = statistics(matrix)
    options = LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    found = start("lora_ga", matrix, calibration=known, options=options)
    u, sigma, vh = torch.linalg.svd(known.gradient, full_matrices=False)
    spread = (found.b.mT @ u).abs()  # B against the left directions
    rows = [int(i) for i in (found.a @ vh.mT).abs().argmax(dim=1)]
    columns = [int(i) for i in spread.argmax(dim=1)]
    expected = {
        "ArBr": ([1, 3, 5], [0, 2, 4]),
        "A2rBr": ([3, 4, 5], [0, 1, 2]),
        "ArB2r": ([0, 1, 2], [3, 4, 5]),
    }
    if direction == "random":
        assert rows == columns
        assert max(rows) < 2 * R
    else:
        assert (rows, columns) == expected[direction]
    factor = {
        "stable": 11**0.25 / 3,
        "weight_svd": float(torch.linalg.svdvals(matrix)[0] / sigma[columns[0]]),
        "gd_scale": 1 / SCALING,
        "unit": 1.0,
    }[scale]
    assert torch.allclose(found.b.norm(dim=0), sigma[columns] * factor, rtol=2e-2)
    assert torch.allclose(found.a.norm(dim=1), torch.full((R,), 1 / SCALING if scale == "gd_scale" else 1.0))


# LoftQ --------------------------------------------------------------------------------------------

# bitsandbytes' table, which is that of the QLoRA paper.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_normal_float_is_the_papers() -> None:
    assert max(abs(a - b) for a, b in zip(normal_float(4), NF4, strict=True)) < 1e-6
    assert len(normal_float(2)) == 4
    assert normal_float(2)[:2] == (-1.0, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_values_are_the_nearest_levels(bits) -> None:
    matrix = weight((5, 41))  # 205 elements: blocks across rows, and one that is not full
    matrix[2] = 0
    found = quantise(matrix, bits)
    assert found.shape == matrix.shape
    assert not found[2].any()
    assert torch.equal(quantise(torch.zeros(3, 7), bits), torch.zeros(3, 7))
    assert torch.isfinite(quantise(torch.full((3, 7), 1e-45), bits)).all()
    if bits == 8:
        step = matrix.abs().amax(dim=1, keepdim=True) / 127
        assert ((found - matrix).abs() <= step * 0.501).all()
        return
    flat, back = matrix.reshape(-1), found.reshape(-1)
    for first in range(0, 205, 64):
        block, largest = flat[first : first + 64], flat[first : first + 64].abs().max()
        levels = torch.tensor(normal_float(bits)) * largest
        nearest = (block[:, None] - levels).abs().min(dim=1).values
        assert torch.allclose((back[first : first + 64] - block).abs(), nearest, atol=1e-6)


def lost(matrix: torch.Tensor, scaling: float = SCALING, r: int = 4, **options: int) -> float:
    found = start("loftq", matrix, r=r, scaling=scaling, options=LoftQConfig(**options), calibration=SiteStatistics())
    return float((matrix - found.base - scaling * found.b @ found.a).norm())


def test_loftq_loses_less_with_iterations_with_bits_and_than_quantising_alone() -> None:
    matrix = weight((47, 64))
    assert lost(matrix, loftq_iter=5) < lost(matrix, loftq_iter=1) < float((quantise(matrix, 4) - matrix).norm())
    assert lost(matrix, loftq_bits=8) < lost(matrix, loftq_bits=4) < lost(matrix, loftq_bits=2)
    assert lost(matrix, r=8) < lost(matrix, r=4)
    assert torch.equal(start("loftq", matrix).base, quantise(matrix, 4))


@pytest.mark.parametrize("scaling", [1.0, 0.25, 16.0, -2.0])
def test_loftq_approximates_whatever_the_scaling(scaling) -> None:
    matrix = weight((47, 64))
    assert lost(matrix, scaling) == pytest.approx(lost(matrix, 1.0), rel=1e-4)


# PEFT ---------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(17, 13)
        self.fc2 = nn.Linear(13, 19)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def adapted(model: nn.Module, init: str, before: Callable[[nn.Module, Any], None] | None = None, **options: Any) -> Any:
    config = peft.LoraConfig(r=R, lora_alpha=5, target_modules=["fc1", "fc2"], init_lora_weights=init, **options)
    if before is not None:
        before(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def assert_like_peft(layer: Any, found: Start, *, is_paired: bool = True) -> None:
    """Equal up to the signs of singular vectors, one to each rank; if those of A and B are pairs, so is the base."""
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    signs = (a * found.a).sum(dim=1).sign() if a.any() else (b * found.b).sum(dim=0).sign()
    assert torch.allclose(signs[:, None] * found.a, a, atol=2e-5, rtol=1e-3)
    b_signs = (b * found.b).sum(dim=0).sign() if b.any() else signs
    assert torch.allclose(found.b * b_signs, b, atol=2e-5, rtol=1e-3)
    if found.base is not None and is_paired:
        assert torch.allclose(found.base, layer.base_layer.weight.detach(), atol=2e-5)


@pytest.mark.parametrize("name", ["pissa", "olora", "mica"])
def test_the_values_are_pefts(name) -> None:
    model = Mlp()
    weights = {"fc1": model.fc1.weight.detach().clone(), "fc2": model.fc2.weight.detach().clone()}
    theirs = adapted(model, name).base_model.model
    for path, matrix in weights.items():
        assert_like_peft(getattr(theirs, path), start(name, matrix, scaling=5 / R))


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_values_are_pefts(scale) -> None:
    model = Mlp()
    weights = {"fc1": model.fc1.weight.detach().clone(), "fc2": model.fc2.weight.detach().clone()}
    gradients = {path: torch.randn_like(matrix) / 10 for path, matrix in weights.items()}
    for path, gradient in gradients.items():
        getattr(model, path)._peft_loraga_grad = gradient.clone()
    options = peft_config.LoraGAConfig(scale=scale)
    theirs = adapted(model, "lora_ga", lora_ga_config=options).base_model.model
    ours = LoraGAConfig.from_peft(options)
    for path, matrix in weights.items():
        known = SiteStatistics(gradient=gradients[path])
        found = start("lora_ga", matrix, scaling=5 / R, calibration=known, options=ours)
        if scale == "weight_svd":  # PEFT's largest singular value of the weight is a rough one
            ratio = getattr(theirs, path).lora_B["default"].weight.detach().norm() / found.b.norm()
            assert abs(ratio - 1) < 0.1
            found = dataclasses.replace(found, b=found.b * ratio)
        assert_like_peft(getattr(theirs, path), found, is_paired=False)


def test_orthogonal_draws_what_peft_draws() -> None:
    model, matrix = nn.Sequential(nn.Linear(17, 13)), weight((13, 17))
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    layer = peft.get_peft_model(model, config).base_model.model[0]
    torch.manual_seed(5)
    layer.orthogonal_init("default")
    torch.manual_seed(5)
    found = start("orthogonal", matrix, r=4, calibration=SiteStatistics())
    assert torch.allclose(layer.lora_A["default"].weight.detach(), found.a, atol=1e-6)
    assert torch.allclose(layer.lora_B["default"].weight.detach(), found.b, atol=1e-6)


# What cannot be started ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "olora", "mica", "corda", "loftq"])
def test_no_rank_above_the_smaller_side(name) -> None:
    start(name, weight((7, 11)), r=7)
    with pytest.raises(ConfigError, match=r"'block\.fc': r=8 is above the 7 singular directions of its 7 × 11"):
        start(name, weight((7, 11)), r=8)


def test_other_ranks_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"'block\.fc': r=3 is odd.*such as r=4"):
        start("orthogonal", weight(), r=3)
    start("lora_ga", weight((7, 11)), r=3)
    with pytest.raises(ConfigError, match=r"r=4 needs 2 r = 8 singular directions.*choose r=3 at most"):
        start("lora_ga", weight((7, 11)), r=4)
    with pytest.raises(ConfigError, match=r"has 5 directions, too few for r=6.*calibration\.config"):
        start("eva", weight(), r=6)


@pytest.mark.parametrize("name", sorted([*INITS, "pissa_niter_2"]))
def test_a_weight_of_zeros_gives_a_clear_result_or_a_clear_error(name) -> None:
    zeros = torch.zeros(11, 17)
    known = statistics(weight())
    if name in ("pissa", "pissa_niter_2", "corda", "loftq"):
        with pytest.raises(ConfigError, match=r"'block\.fc': A and B would both be zero.*init_lora_weights=True"):
            start(name, zeros, r=2, calibration=known)
        return
    found = start(name, zeros, r=2, calibration=known)
    assert torch.isfinite(found.a).all()
    assert torch.isfinite(found.b).all()
    if found.base is not None:
        assert (found.base + SCALING * found.b @ found.a).abs().max() <= 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", sorted(INITS))
def test_a_weight_that_is_not_finite_is_refused(name, value) -> None:
    matrix = weight()
    known = statistics(matrix)
    matrix[3, 5] = value
    with pytest.raises(ConfigError, match=r"'block\.fc': its weight has NaN or infinite elements"):
        start(name, matrix, r=2, calibration=known)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_data_that_say_nothing_are_refused(value) -> None:
    matrix = weight()
    empty = SiteStatistics(covariance=torch.full((17, 17), value), gradient=torch.full((11, 17), value))
    with pytest.raises(ConfigError, match="covariance of its inputs is zero or not finite"):
        start("corda", matrix, calibration=empty)
    with pytest.raises(ConfigError, match="gradient there is zero or not finite"):
        start("lora_ga", matrix, calibration=empty)
    flat = SiteStatistics(components=torch.eye(17)[:3], singular_values=torch.tensor([3.0, 1.0, 0.0]))
    start("eva", matrix, calibration=flat)
    with pytest.raises(ConfigError, match="whiten divides by singular values"):
        start("eva", matrix, calibration=flat, options=EvaConfig(whiten=True))


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_another_graphs_calibration_is_refused(name) -> None:
    with pytest.raises(ConfigError, match=r"calibration has a .* tensor, which does not fit its \(11, 17\) weight"):
        start(name, weight(), calibration=statistics(weight((11, 19))))


def test_values_that_the_adapters_dtype_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"A would have NaN or infinite elements in torch\.float16"):
        start("olora", weight() * 1e6, dtype=torch.float16)


# Names and options --------------------------------------------------------------------------------


def test_names() -> None:
    assert init_of("PiSSA_niter_16").iterations == 16
    assert init_of("OLoRA").name == "olora"
    for bad in ("pisa", "pissa_niter_", "pissa_niter_x", "gaussian", True, None, "corda2"):
        with pytest.raises(ConfigError, match="init_lora_weights="):
            init_of(bad)
    with pytest.raises(ConfigError, match=r"Did you mean .*'pissa'"):
        initializer_of("pisa")


PEFTS = {
    "corda_config": (peft_config.CordaConfig, CordaConfig),
    "eva_config": (peft_config.EvaConfig, EvaConfig),
    "loftq_config": (peft_config.LoftQConfig, LoftQConfig),
    "lora_ga_config": (peft_config.LoraGAConfig, LoraGAConfig),
}


@pytest.mark.parametrize("field", sorted(PEFTS))
def test_fields_and_defaults_are_pefts(field) -> None:
    theirs, ours = PEFTS[field]
    assert [init.options for init in INITS.values() if init.field == field] == [ours]
    assert dataclasses.asdict(ours()) == dataclasses.asdict(theirs())
    assert ours.from_peft(theirs()) == ours.from_peft(ours().to_peft()) == ours.from_peft(None) == ours()
    assert ours.from_peft(ours()) == ours()


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (EvaConfig, {"rho": 0.5}, r"EvaConfig\.rho=0\.5 must be a number from 1 to"),
        (EvaConfig, {"rho": math.nan}, r"EvaConfig\.rho=nan"),
        (EvaConfig, {"tau": 1.5}, r"EvaConfig\.tau=1\.5"),
        (EvaConfig, {"whiten": 1}, r"EvaConfig\.whiten=1 must be True or False"),
        (EvaConfig, {"label_mask_value": "x"}, r"EvaConfig\.label_mask_value='x' must be an integer"),
        (EvaConfig, {"roh": 2.0}, r"EvaConfig has no field 'roh' \(given 2\.0\).*Did you mean 'rho'\?"),
        (CordaConfig, {"corda_method": "ipn"}, r"corda_method='ipn' must be one of 'ipm', 'kpm'.*Did you mean"),
        (
            CordaConfig,
            {"cache_file": "c.pt"},
            r"CordaConfig\.cache_file='c\.pt' is not supported.*neutral value is None",
        ),
        (CordaConfig, {"covariance_file": "c.pt"}, r"CordaConfig\.covariance_file"),
        (CordaConfig, {"verbose": True}, r"CordaConfig\.verbose=True is not supported"),
        (CordaConfig, {"verbose": 0}, r"CordaConfig\.verbose=0 is not supported"),
        (CordaConfig, {"use_float16_for_covariance": True}, "overflow in float16"),
        (CordaConfig, {"prune_temporary_fields": False}, "there are no temporary fields"),
        (LoraGAConfig, {"direction": "A"}, r"LoraGAConfig\.direction='A' must be one of 'ArBr'"),
        (LoraGAConfig, {"scale": "stabel"}, r"Did you mean 'stable'\?"),
        (LoraGAConfig, {"stable_gamma": 0}, r"stable_gamma=0 must be a number from"),
        (LoftQConfig, {"loftq_bits": 3}, r"loftq_bits=3 must be 2, 4 or 8"),
        (LoftQConfig, {"loftq_iter": 0}, r"loftq_iter=0 must be an integer from 1"),
        (LoftQConfig, {"loftq_iter": 1.5}, r"loftq_iter=1\.5 must be an integer from 1"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(options, fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**fields)
    with pytest.raises(ConfigError, match=message):
        options.from_peft(fields)


def test_what_is_no_option_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="LoftQConfig is no EvaConfig"):
        EvaConfig.from_peft(LoftQConfig())
    with pytest.raises(ConfigError, match="str is no EvaConfig"):
        EvaConfig.from_peft("rho=2")
    with pytest.raises(ConfigError, match="EvaConfig takes keyword arguments only"):
        EvaConfig(2.0)

"""`merge` against float64, in blocks of a few rows: what mutation testing found that the laws do not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import FoldError, merging
from lora_fx.merging import Delta, Merged, RowsDelta, merge, norm_if_finite

SHAPES = [(1, 10, 6), (2, 7, 6)]


@pytest.fixture(params=[1, 3, 4, 100], ids="{} rows at a time".format)
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(merging, "_BLOCK", 6 * request.param)
    return int(request.param)


def product(count: int, rows: int, columns: int, seed: int) -> Delta:
    torch.manual_seed(seed)
    return Delta(torch.randn(count, rows, 2), torch.randn(count, 2, columns), 0.75)


def dense(delta: Delta | RowsDelta, weight: torch.Tensor) -> torch.Tensor:
    """What a delta adds, in float64."""
    added = torch.zeros(weight.shape, dtype=torch.float64)
    if isinstance(delta, RowsDelta):
        added[0, delta.index] += delta.scaling * delta.values.double()
        return added
    left, right = delta.left.double(), delta.right.double()
    block = delta.scaling * left @ right
    added[:, delta.row : delta.row + block.shape[1], delta.column : delta.column + block.shape[2]] += block
    return added if delta.gain is None else added + delta.gain.double() * weight.double()


def deltas_of(kind: str, shape: tuple[int, int, int]) -> list[Delta | RowsDelta]:
    count, rows, columns = shape
    first = product(*shape, seed=1)
    match kind:
        case "one":
            return [first]
        case "two":
            return [first, product(*shape, seed=2)]
        case "gain of rows":
            return [Delta(first.left, first.right, 0.75, gain=torch.randn(count, rows, 1) / 3)]
        case "gain of columns":
            return [Delta(first.left, first.right, 0.75, gain=torch.randn(count, 1, columns) / 3)]
        case "block":
            part = product(count, 3, columns - 2, seed=3)
            return [Delta(part.left, part.right, 0.75, row=2, column=1, is_block=True)]
        case "two blocks":
            blocks = [(product(count, 3, 2, seed=seed), seed) for seed in (0, 3)]
            return [Delta(b.left, b.right, 0.75, row=at, column=at, is_block=True) for b, at in blocks]
        case _:
            index = torch.tensor([0, 3, 4, rows - 1])
            return [RowsDelta(index, torch.randn(4, columns), 0.5)]


KINDS = ["one", "two", "gain of rows", "gain of columns", "block", "two blocks", "rows"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_and_what_is_told_of_it(kind: str, shape: tuple[int, int, int], rows_at_a_time: int) -> None:
    if kind == "rows" and shape[0] > 1:
        shape = (1, *shape[1:])
    torch.manual_seed(0)
    weight = torch.randn(shape)
    deltas = deltas_of(kind, shape)
    added = sum((dense(delta, weight) for delta in deltas), torch.zeros(shape, dtype=torch.float64))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = weight.to(dtype)
        added = sum((dense(delta, stored) for delta in deltas), torch.zeros(shape, dtype=torch.float64))
        exact = stored.double() + added
        into = torch.empty_like(stored)
        found = merge(stored, deltas, into)
        assert torch.allclose(into.double(), exact, rtol=torch.finfo(dtype).eps, atol=4e-7)
        assert math.isclose(found.weight_norm, float(stored.double().norm()), rel_tol=1e-5)
        assert math.isclose(found.delta_norm, float(added.norm()), rel_tol=1e-4)
        kept = 1 - float((into.double() - exact).norm()) / float(added.norm())
        assert math.isclose(found.kept, kept, abs_tol=2e-5 if dtype == torch.float32 else 2e-4)
        assert found.is_finite
        assert merge(stored, deltas, stored).delta_norm == pytest.approx(found.delta_norm, rel=1e-4)  # where it lies
        assert torch.equal(stored, into)


@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e-8])
def test_what_float32_keeps_of_a_small_delta_is_measured(size: float) -> None:
    torch.manual_seed(2)
    weight = torch.rand(1, 40, 30) + 1
    deltas = [Delta(torch.randn(1, 40, 2) * size, torch.randn(1, 2, 30), 1.0)]
    into = torch.empty_like(weight)
    found = merge(weight, deltas, into)
    added = dense(deltas[0], weight)
    lost = float((into.double() - weight.double() - added).norm())
    assert found.kept == pytest.approx(max(0.0, 1 - lost / float(added.norm())), abs=1e-3)
    rounding = torch.finfo(torch.float32).eps / 2 * float(weight.norm()) / found.delta_norm
    assert merge(weight, deltas, weight).kept == pytest.approx(max(0.0, 1 - rounding), abs=1e-3)  # nothing to measure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-10, 1e-14, 1e-18])
def test_of_a_delta_that_the_sums_cannot_hold_nothing_is_kept(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(2)
    weight = torch.rand(1, 40, 30).to(dtype) + 1
    for accumulate in (torch.float32, torch.float64):
        deltas = [Delta((torch.randn(1, 40, 2) * size).to(accumulate), torch.randn(1, 2, 30).to(accumulate), 1.0)]
        into = torch.empty_like(weight)
        found = merge(weight, deltas, into)
        assert torch.equal(into, weight)
        assert found.delta_norm > 0
        assert found.kept < 1e-3


def test_norms_whose_squares_are_too_large() -> None:
    weight = torch.full((1, 4, 4), 1e30)
    delta = Delta(torch.full((1, 4, 1), 1e15), torch.full((1, 1, 4), 1e15), 2.0)
    found = merge(weight, [delta], torch.empty_like(weight))
    assert found.is_finite
    assert found.weight_norm == pytest.approx(4e30)
    assert found.delta_norm == pytest.approx(8e30)
    precisions = torch.backends.cuda.matmul.fp32_precision
    with merging.full_precision():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == precisions


def test_a_gain_of_two_rows_goes_along_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BLOCK", 6)
    weight, into = torch.ones(1, 2, 6), torch.empty(1, 2, 6)
    delta = Delta(torch.ones(1, 2, 1), torch.ones(1, 1, 6), 1.0, gain=torch.tensor([[[2.0], [3.0]]]))
    merge(weight, [delta], into)
    assert torch.equal(into[0, :, 0], torch.tensor([4.0, 5.0]))


def test_nothing_added_leaves_every_bit() -> None:
    weight = torch.tensor([[[-0.0, 1.0], [2.0, -0.0]]])
    zero, one = torch.zeros(1, 2, 1), torch.ones(1, 1, 2)
    nothing = [Delta(zero, one, 1.0), Delta(one.mT, zero.mT, 1.0, gain=torch.zeros(1, 2, 1))]
    rows = RowsDelta(torch.tensor([1]), torch.zeros(1, 2), 1.0)
    for deltas in (nothing, nothing[1:], [rows]):
        assert all(delta.is_zero() for delta in deltas)
        into = torch.ones_like(weight)
        found = merge(weight, deltas, into)
        assert (found.delta_norm, found.kept) == (0, 1)
        assert torch.equal(torch.signbit(into), torch.signbit(weight))
        assert torch.equal(into, weight)
    assert not Delta(zero, one, 1.0, gain=torch.ones(1, 2, 1)).is_zero()
    assert not Delta(zero, one * math.nan, 1.0).is_zero()
    assert not RowsDelta(torch.tensor([1]), torch.ones(1, 2), 1.0).is_zero()
    assert list(merging.blocks(torch.empty(1, 0, 5), torch.float32)) == []


def test_a_bound_is_above_all_elements_and_no_looser_than_it_says() -> None:
    delta = Delta(torch.full((1, 2, 1), 3.0), torch.full((1, 1, 2), 5.0), -2.0)
    assert delta.bound(7.0) == pytest.approx(2 * 3 * 5 * 2)
    with_gain = Delta(delta.left, delta.right, -2.0, gain=torch.tensor([[[0.5], [-4.0]]]))
    assert with_gain.bound(7.0) == pytest.approx(2 * 3 * 5 * 2 + 4 * 7)
    rows = RowsDelta(torch.tensor([1]), torch.tensor([[3.0, 4.0]]), -2.0)
    assert rows.bound(7.0) == pytest.approx(10)
    for each in (delta, with_gain, rows):
        wide = each.to(torch.float64)
        assert wide.dtype == torch.float64
        assert wide.gain is None or wide.gain.dtype == torch.float64
        assert wide.bound(7.0) == pytest.approx(each.bound(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_result_that_the_type_cannot_hold_is_told(dtype: torch.dtype) -> None:
    weight = torch.full((1, 2, 2), torch.finfo(dtype).max, dtype=dtype)
    delta = Delta(torch.ones(1, 2, 1), torch.full((1, 1, 2), torch.finfo(dtype).max / 4), 1.0)
    assert not merge(weight, [delta], torch.empty_like(weight)).is_finite


@pytest.mark.parametrize(
    ("exact", "wanted"),
    [
        (1 + 2**-8 + 2**-40, 1 + 2**-7),  # above the middle of two bfloat16; its float32 lies on it, and would go down
        (1 + 2**-8 - 2**-40, 1.0),
        (1 + 2**-8, 1.0),  # on the middle: to the even one
        (1 + 3 * 2**-8, 1 + 2**-6),
        (1 + 2**-8 + 2**-23 - 2**-30, 1 + 2**-7),  # its float32 is odd, and stays
        (1 + 2**-8 - 2**-24 + 2**-30, 1.0),
    ],
)
def test_float64_is_rounded_to_16_bits_once(exact: float, wanted: float) -> None:
    weight, one = torch.ones(1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.float64)
    into = torch.empty_like(weight)
    merge(weight, [Delta(one, one * (exact - 1), 1.0)], into)
    assert float(into) == wanted


def test_norms_tell_that_a_sum_is_finite_only_if_they_can() -> None:
    delta = Delta(torch.ones(1, 2, 1), torch.ones(1, 1, 2), 2.0)
    weight = torch.ones(1, 2, 2)
    assert norm_if_finite(weight, [delta]) == 2.0
    most = torch.finfo(torch.float32).max
    for hopeless in (weight * math.inf, weight * math.nan, weight * most):
        assert norm_if_finite(hopeless, [delta]) is None
    large = Delta(torch.full((1, 2, 1), most / 8), torch.ones(1, 1, 2), 2.0)
    assert norm_if_finite(weight, [large]) is None  # 2 · √2 · √2 · most / 8 is the half
    with_gain = Delta(torch.ones(1, 2, 1), torch.ones(1, 1, 2), 2.0, gain=torch.full((1, 2, 1), most / 4))
    assert norm_if_finite(weight, [with_gain]) is None
    told = merge(weight, [delta], torch.empty(1, 2, 2), weight_norm=2.0)
    assert told == Merged(2.0, 4.0, pytest.approx(1.0, abs=1e-6), True)


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 11, 100])
@pytest.mark.parametrize("most", [1, 3, 10])
def test_blocks_cover_each_row_once_and_are_of_one_size(rows: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BLOCK", 4 * most * 5)  # in float32 numbers: one of float64 counts as four
    weight = torch.arange(rows * 5.0).reshape(1, rows, 5)
    found = [(slice(at.start, at.stop), block.clone()) for _, at, block in merging.blocks(weight, torch.float64)]
    assert torch.equal(torch.cat([block for _, block in found]), weight[0].double())
    sizes = [len(block) for _, block in found]
    assert len(sizes) == -(-rows // most)
    assert max(sizes) <= most
    assert len(set(sizes[:-1])) <= 1


# Folding ---------------------------------------------------------------------------------------------


def test_a_kernel_in_channels_last_is_folded_in_its_own_order() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last).eval()
    x = torch.randn(1, 3, 6, 6)
    for inplace in (False, True):
        gm = lora_fx.inject(lora_fx.trace(model, (x,)), {"r": 2, "target_modules": ["0"]})
        with torch.no_grad():
            for parameter in lora_fx.lora_parameters(gm):
                parameter.normal_()
            wanted = gm(x)
            folded = lora_fx.fold(gm, inplace=inplace)
            assert torch.allclose(folded(x), wanted, atol=1e-4)
        weight = folded.get_parameter("0.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reversible", [True, False])
def test_in_place_what_was_trained_in_full_is_the_models_own_tensor(reversible: bool) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3)
    gm = lora_fx.inject(lora_fx.trace(model, (x,)), {"r": 1, "target_modules": ["0"], "modules_to_save": ["1"]})
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.add_(torch.randn_like(parameter))
        wanted = gm(x)
        folded = lora_fx.fold(gm, inplace=True, reversible=reversible)
        assert folded.get_parameter("1.weight").data_ptr() == model[1].weight.data_ptr()
        assert torch.allclose(model(x), wanted, atol=1e-6)
        assert torch.equal(model(x), folded(x))


def test_what_cannot_be_folded_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    gm = lora_fx.trace(model, (torch.randn(2, 3),))
    injected = lora_fx.inject(gm, {"r": 1, "target_modules": ["0"]})
    with pytest.raises(FoldError, match="adapters=3 must be a list"):
        lora_fx.fold(injected, adapters=3)  # type: ignore[arg-type]
    injected = lora_fx.inject(injected, {"r": 1, "target_modules": ["1"]}, adapter_name="other")
    lora_fx.set_adapters(injected, {"other": 1.0})
    with pytest.raises(FoldError, match="'default' does not count"):
        lora_fx.fold(injected, adapters=["default"])


def test_a_bias_that_others_read_takes_no_lora_bias() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
            self.two.bias = self.one.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.two(x)

    x = torch.randn(2, 3)
    gm = lora_fx.inject(lora_fx.trace(Shares().eval(), (x,)), {"r": 1, "target_modules": ["one"], "lora_bias": True})
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.fill_(0.5)
    with pytest.raises(FoldError, match="is also read by something"):
        lora_fx.fold(gm)

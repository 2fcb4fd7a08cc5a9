"""What counts as equal outputs, and what does not; masks are no measure for the values beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exporters.output_check import TOLERANCE_IN_EPS, coarsest_dtype, compare_output

INF, NAN, LOW = float("inf"), float("nan"), torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("wanted", "got", "ok"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.0001], True),
        ([1.0, 2.0], [1.0, 2.001], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 0.001], False),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, -INF], [1.0, NAN], False),
        ([1.0, LOW], [1.0, LOW], True),
        ([1.0, LOW], [1.1, LOW], False),  # a mask is no measure for the other values
        ([1.0, LOW], [1.0, 0.0], False),
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 3], False),
        ([True, False], [True, True], False),
        ([1.0, 2.0], [1, 2], False),
        ([1.0, 2.0], [1.0], False),
    ],
)
def test_comparison_of_one_output(wanted: list[Any], got: list[Any], ok: bool) -> None:
    result = compare_output("y", torch.tensor(wanted), torch.tensor(got).numpy(), torch.float32)
    assert result.ok is ok, result


def test_tolerance_follows_the_coarsest_dtype() -> None:
    y = torch.ones(2)
    for dtype, k in TOLERANCE_IN_EPS.items():
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        expected = k * eps if dtype != torch.float64 else 1024 * eps
        assert compare_output("y", y, y.numpy(), dtype).tolerance == expected


LARGEST = torch.finfo(torch.float32).max


def noisy(values: torch.Tensor, eps: float) -> torch.Tensor:
    """`values`, each off by up to `eps` of the largest."""
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return values + noise * eps * values.abs().max()


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    ("fill", "masked"),
    [(fill, n) for fill in (-1e9, 1e9, -1e30, -LARGEST, LARGEST / 2) for n in (1, 2, 30, 54)]
    + [(fill, n) for fill in (-1e4, -65504.0) for n in (2, 30, 54)],
)
def test_mask_is_no_measure(fill: float, masked: int) -> None:
    y = logits(5, 11).flatten()
    is_masked = torch.randperm(55, generator=torch.Generator().manual_seed(2)) < masked
    wanted = y.masked_fill(is_masked, fill)
    right = noisy(y, 1e-6).masked_fill(is_masked, fill)
    wrong = (y * 1.01).masked_fill(is_masked, fill)
    assert compare_output("y", wanted, right.numpy(), torch.float32).ok
    result = compare_output("y", wanted, wrong.numpy(), torch.float32)
    assert not result.ok
    assert result.compared == 55 - masked
    assert result.max_rel == pytest.approx(0.01, rel=0.01)
    moved = wanted.flip(0)
    assert not compare_output("y", wanted, moved.numpy(), torch.float32).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_of_several_levels_and_added_ones(dtype: torch.dtype) -> None:
    y = logits(5, 11).to(dtype)
    for mask in (torch.tensor([0.0, -1e4]), torch.tensor([0.0, -1e4, -torch.finfo(dtype).max])):
        added = mask[torch.arange(55).reshape(5, 11) % len(mask)].to(dtype)
        assert compare_output("y", y + added, (y + added).numpy(), dtype).ok
        off = y * 1.5
        assert not compare_output("y", y + added, (off + added).numpy(), dtype).ok


def test_masks_on_both_sides() -> None:
    y = logits(5, 11)
    for levels in ((-1e9, 1e9), (-1e9, -1e4)):
        wanted, off = y.clone(), y * 1.01
        for each in (wanted, off):
            each[0], each[1] = levels[0], levels[1]
        assert compare_output("y", wanted, wanted.numpy(), torch.float32).ok
        assert not compare_output("y", wanted, off.numpy(), torch.float32).ok


def test_masks_must_agree_themselves() -> None:
    wanted = logits(5, 11)
    wanted[0] = -1e9
    got = wanted.clone()
    got[0, 3] = 0.0
    assert not compare_output("y", wanted, got.numpy(), torch.float32).ok
    got[0, 3] = -1.1e9
    assert not compare_output("y", wanted, got.numpy(), torch.float32).ok


@pytest.mark.parametrize("seed", range(5))
def test_honest_large_outputs_are_judged_as_they_were(seed: int) -> None:
    """What large values there are, errors relative to the largest of them are allowed."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(5, 11, generator=generator)
    rows = plain * torch.tensor([1.0, 10.0, 1e3, 1e5, 1e7])[:, None]
    relu = (plain * 1e6).relu()
    single = plain.clone()
    single[2, 3] = 4321.0  # a massive activation
    close_to_zero = plain * 1e5
    close_to_zero[0, 0] = 1e-3
    pair = torch.tensor([1500.0, 2.0])
    zeros = torch.tensor([0.0, 0.0, 1500.0, 1501.0])
    for wanted in (plain * 1e6, rows, relu, single, close_to_zero, pair, zeros):
        got = noisy(wanted, 50 * torch.finfo(torch.float32).eps)
        result = compare_output("y", wanted, got.numpy(), torch.float32)
        assert result.ok, (wanted, result)
        assert result.compared == wanted.numel()
        assert not compare_output("y", wanted, (wanted * 1.001).numpy(), torch.float32).ok


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        pytest.param([4000.0, 1.0, -2.0], [4000.0, 1.0, -2.0 + 4000 * 1e-6], id="one-value"),
        pytest.param([0.0, 0.0, 1500.0, 1501.0], [0.0, 1e-3, 1500.0, 1501.0], id="zeros-below"),
        pytest.param([1.0, 1.0, 1e-5], [1.0, 1.0, 1.1e-5], id="probabilities"),
    ],
)
def test_large_results_that_happen_to_be_equal(wanted: list[float], got: list[float]) -> None:
    """The values beside them may then still be off by some of their rounding."""
    assert compare_output("y", torch.tensor(wanted), torch.tensor(got).numpy(), torch.float32).ok


@pytest.mark.parametrize(
    ("wanted", "compared"),
    [([], 0), ([NAN, NAN], 0), ([INF, LOW], 0), ([1.0, NAN, LOW], 1), ([0.0], 1), ([1, 2], 2), ([True], 1)],
)
def test_number_of_values_compared(wanted: list[Any], compared: int) -> None:
    y = torch.tensor(wanted)
    result = compare_output("y", y, y.numpy(), torch.float32)
    assert result.ok
    assert result.compared == compared
    assert result.verdict == ("ok" if compared else "nothing comparable")


def test_coarsest_dtype() -> None:
    f64, f16, i64 = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float16), torch.zeros(1).long()
    assert coarsest_dtype([f64, f16, i64]) == torch.float16
    assert coarsest_dtype([f64]) == torch.float64
    assert coarsest_dtype([i64]) == torch.float32

"""What one adapter adds to one tensor, against its formula in float64; nothing is traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import FoldError
from lora_fx.fold_terms import BiasTerm, LowRankTerm, RowsTerm
from lora_fx.injection import AdapterSite, RowsSite
from lora_fx.layouts import Experts, Kernel, Layout, Matrix, Part
from lora_fx.merging import RowsDelta

SCALING, STRENGTH = 1.75, 0.5
LAYOUTS: dict[str, Layout] = {
    "matrix": Matrix(5, 7),
    "matrix stored (in, out)": Matrix(7, 5, True),
    "part": Part(Matrix(6, 7), 2, 5),
    "part stored (in, out)": Part(Matrix(7, 6, True), 2, 5),
    "kernel": Kernel((5, 3, 2)),
    "kernel of two axes": Kernel((5, 3, 2, 1)),
    "grouped kernel": Kernel((6, 2, 3), groups=3),
    "experts": Experts((2, 5, 7)),
}
WITH_NORMS = [name for name in LAYOUTS if name != "experts"]


class Tensors(nn.Module):
    """A weight, and an adapter's tensors for it."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        torch.manual_seed(3)
        outputs = layout.whole.out_features
        shapes = {"w": layout.shape, "a": layout.a_shape(3), "b": layout.b_shape(3), "m": (layout.out_features,)}
        shapes |= {"a0": shapes["a"], "b0": shapes["b"], "bias": (layout.out_features,), "own_bias": (outputs,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))


def site(layout: Layout, **names: str) -> AdapterSite:
    plain = {"path": "fc", "applied": "fc", "is_lookup": False, "weight": "w", "lora_a": "a", "lora_b": "b"}
    return AdapterSite(**(plain | {"dropout": None, "scaling": SCALING, "layout": layout} | names))  # type: ignore[arg-type]


def added(term: Any, gm: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """What a term adds, in the tensor's own shape: the product where it says, and the gain times the tensor."""
    delta, stored = term.delta(gm, tensor, torch.float64), term.matrices(tensor)
    total = torch.zeros_like(stored)
    if isinstance(delta, RowsDelta):
        total[0, delta.index] += delta.scaling * delta.values
        return total.reshape(tensor.shape)
    block = delta.scaling * delta.left @ delta.right
    total[:, delta.row : delta.row + block.shape[1], delta.column : delta.column + block.shape[2]] += block
    return (total + (0 if delta.gain is None else delta.gain * stored)).reshape(tensor.shape)


def outputs_first(layout: Layout, weight: torch.Tensor) -> torch.Tensor:
    """The weight as (out, …)."""
    return weight.T if layout.stored_in_out else weight


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_product_is_scaled_and_weighted(name: str) -> None:
    layout = LAYOUTS[name]
    gm, term = Tensors(layout), LowRankTerm(site(layout), STRENGTH)
    wanted = STRENGTH * SCALING * layout.delta(gm.a, gm.b)
    torch.testing.assert_close(added(term, gm, gm.w), wanted)
    assert (term.tensor, term.parts, term.scalings) == ("w", ("a", "b"), (SCALING, STRENGTH))
    assert not term.delta(gm, gm.w, torch.float64).left.requires_grad
    assert term.delta(gm, gm.w, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["matrix", "matrix stored (in, out)", "part", "part stored (in, out)", "kernel"])
def test_a_start_is_taken_off(name: str) -> None:
    layout = LAYOUTS[name]
    gm, term = Tensors(layout), LowRankTerm(site(layout, start_a="a0", start_b="b0"), STRENGTH)
    wanted = STRENGTH * SCALING * (layout.delta(gm.a, gm.b) - layout.delta(gm.a0, gm.b0))
    torch.testing.assert_close(added(term, gm, gm.w), wanted)
    assert term.parts == ("a", "b", "a0", "b0")


@pytest.mark.parametrize("name", WITH_NORMS)
def test_with_dora_each_output_has_the_norm_that_it_learned(name: str) -> None:
    """W' = m / ‖W + ΔW‖ ⊙ (W + ΔW) for the layout's own outputs; the others are not changed."""
    layout = LAYOUTS[name]
    gm, term = Tensors(layout), LowRankTerm(site(layout, magnitude="m"), STRENGTH)
    weight = outputs_first(layout, gm.w.detach())
    moved = weight + SCALING * outputs_first(layout, layout.delta(gm.a, gm.b).detach())
    first, last = (layout.start, layout.stop) if isinstance(layout, Part) else (0, layout.out_features)
    norms = moved[first:last].flatten(1).norm(dim=1)
    wanted = torch.zeros_like(weight)
    factors = (gm.m.detach() / norms).reshape(-1, *(1 for _ in weight.shape[1:]))
    wanted[first:last] = STRENGTH * (factors * moved[first:last] - weight[first:last])
    torch.testing.assert_close(outputs_first(layout, added(term, gm, gm.w)), wanted)
    assert term.parts == ("a", "b", "m")


def test_only_a_part_is_a_block_that_leaves_the_rest_alone() -> None:
    for name, layout in LAYOUTS.items():
        delta = LowRankTerm(site(layout), STRENGTH).delta(Tensors(layout), Tensors(layout).w, torch.float64)
        assert delta.is_block == isinstance(layout, Part)
        at = {"part": (2, 0, (1, 3, 7)), "part stored (in, out)": (0, 2, (1, 7, 3))}.get(name)
        if at is not None:
            assert (delta.row, delta.column, (delta.left @ delta.right).shape) == at


def test_a_kernel_that_no_weight_can_hold_is_refused_by_the_name_of_its_site() -> None:
    mixing = replace(Kernel((6, 2, 3), groups=3), mixes_groups=True)
    with pytest.raises(FoldError, match="'fc' cannot be folded: its A mixes the 3 groups"):
        LowRankTerm(site(mixing), STRENGTH).delta(Tensors(mixing), Tensors(mixing).w, torch.float64)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_bias_goes_to_the_outputs_of_its_site(name: str) -> None:
    layout = LAYOUTS[name]
    gm, term = Tensors(layout), BiasTerm(site(layout, lora_bias="bias"), STRENGTH, "own_bias")
    wanted = torch.zeros_like(gm.own_bias)
    first, last = (layout.start, layout.stop) if isinstance(layout, Part) else (0, layout.out_features)
    wanted[first:last] = STRENGTH * SCALING * gm.bias
    torch.testing.assert_close(added(term, gm, gm.own_bias), wanted)
    assert (term.tensor, term.parts, term.scalings) == ("own_bias", ("bias",), (SCALING, STRENGTH))
    assert term.matrices(gm.own_bias).shape == (1, 1, len(gm.own_bias))


def test_rows_go_some_of_the_way_to_what_they_were_trained_to() -> None:
    gm = nn.Module()
    torch.manual_seed(3)
    gm.table = nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
    gm.rows = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    gm.register_buffer("index", torch.tensor([4, 1]))
    term = RowsTerm(RowsSite("words", "table", ("words", "head"), "rows", "index", "slots"), STRENGTH)
    wanted = torch.zeros_like(gm.table)
    wanted[[4, 1]] = STRENGTH * (gm.rows - gm.table[[4, 1]])
    torch.testing.assert_close(added(term, gm, gm.table.detach()), wanted)
    assert (term.tensor, term.parts, term.scalings) == ("table", ("rows",), (1.0, STRENGTH))
    assert term.matrices(gm.table).shape == (1, 7, 3)

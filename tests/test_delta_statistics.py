"""What an adapter learned, in numbers: against numpy on deltas that are built, which the code never does."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import fx, nn
from zoo import BY_NAME, fingerprint, injected, randomise, traced

import lora_fx
from lora_fx import AdapterComparison, AdapterError, AdapterStatistics, FoldError, GraphError, LoraConfig
from lora_fx.attributes import set_attribute
from lora_fx.delta_comparison import DeltaPair
from lora_fx.delta_statistics import SiteDelta, TrainedTensor, _split, spark
from lora_fx.graph_module import record_of
from lora_fx.layouts import Kernel

STACK, KERNELS, EXPERTS = BY_NAME["stack"], BY_NAME["kernels"], BY_NAME["experts"]


def adapted(case=STACK, dtype: torch.dtype = torch.float64, **options) -> fx.GraphModule:
    return randomise(injected(case, traced(case, "symbolic", dtype), **options))


def dense(gm: fx.GraphModule, path: str) -> np.ndarray:
    """The delta as (n, rows, columns), from what folding did to the weight."""
    site = record_of(gm).adapters["default"].sites[path]
    delta = lora_fx.fold(gm).get_parameter(site.weight) - gm.get_parameter(site.weight)
    layout = site.layout
    if isinstance(layout, Kernel) and layout.is_transposed:  # (in, out / groups, *k): outputs of a group are rows
        parts = delta.reshape(layout.groups, -1, *delta.shape[1:]).transpose(1, 2)
        return parts.reshape(layout.groups, layout.out_features // layout.groups, -1).detach().double().numpy()
    return layout.matrices(delta).detach().double().numpy()


def svd(matrices: np.ndarray) -> np.ndarray:
    """Singular values of all matrices, in squares that add up."""
    return np.sqrt((np.linalg.svd(matrices, compute_uv=False) ** 2).sum(axis=0))


@pytest.mark.parametrize("case", [STACK, KERNELS, EXPERTS], ids=lambda case: case.name)
def test_singular_values_and_norms_are_those_of_the_delta(case) -> None:
    gm = adapted(case)
    before = fingerprint(gm)
    sites = lora_fx.adapter_statistics(gm).sites
    assert fingerprint(gm) == before
    assert len(sites) == len(record_of(gm).adapters["default"].sites) > 1
    for site in sites:
        weight = record_of(gm).adapters["default"].sites[site.path].weight
        delta, values = dense(gm, site.path), np.array(site.singular_values)
        expected = svd(delta)
        np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-9, atol=1e-12 * expected[0])
        np.testing.assert_allclose(expected[len(values) :], 0, atol=1e-12 * expected[0])
        assert values[0] > 0
        assert site.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-9)
        assert site.weight_norm == pytest.approx(float(gm.get_parameter(weight).norm()), rel=1e-9)
        assert site.ratio == pytest.approx(site.delta_norm / site.weight_norm)
        assert site.remarks == ()


@pytest.mark.parametrize(("values", "most", "effective", "hint"), [
    ((2.0, 2.0, 2.0, 2.0), 4, 4.0, "a higher one may help"),
    ((3.0, 0.0, 0.0), 1, 1.0, "1 of 3 carry 99%: a lower rank may do"),
    ((0.0, 0.0), 0, 0.0, "no effect"),
    ((1.0,), 1, 1.0, ""),
    ((10.0, 1.0, 0.1), 1, math.exp(sum(-p * math.log(p) for p in (100 / 111, 10 / 111, 1 / 111))), "a lower rank may"),
    ((10.0, 5.0, 1.1, 1.0), 3, 2.76, ""),
    ((1e-300, 5e-301), 2, 1.89, "a higher one may help"),  # their squares are nothing in float64
    ((1.0, 1.0, 1e-3, 1e-3), 2, 2.017, "2 of 4 carry 99%: a lower rank may do"),
], ids=str)  # fmt: skip
def test_ranks_in_use(values, most, effective, hint) -> None:
    site = SiteDelta("fc", None, len(values), 1.0, 1.0, 1.0, 1.0, values)
    assert site.ranks_for_most == most
    assert site.effective_rank == pytest.approx(effective, abs=0.005)
    assert hint in site.hint
    assert bool(hint) == bool(site.hint)


def test_what_folding_keeps_is_what_fold_reports() -> None:
    gm = randomise(injected(STACK, traced(STACK, "symbolic", torch.bfloat16)), size=0.01)
    with pytest.warns(lora_fx.LoraFxWarning, match="keeps only"):
        report = {site.path: site for site in lora_fx.fold_report(lora_fx.fold(gm)).sites}
    sites = lora_fx.adapter_statistics(gm).sites
    assert {site.path: site.kept for site in sites} == {path: site.kept for path, site in report.items()}
    assert all(site.kept < 0.9 for site in sites)
    for site in sites:
        assert site.delta_norm == pytest.approx(report[site.path].delta_norm, rel=1e-5)


def test_of_an_adapter_that_counts_otherwise_the_numbers_are_the_same() -> None:
    gm = adapted()
    expected = lora_fx.adapter_statistics(gm)
    lora_fx.set_adapters(gm, {"default": -0.5})
    assert lora_fx.adapter_statistics(gm) == expected
    lora_fx.set_adapters(gm, {})
    assert lora_fx.adapter_statistics(gm) == expected
    assert "effective" in str(expected)
    assert "<table>" in expected._repr_html_()


def test_dora_counts_what_its_magnitudes_change() -> None:
    gm = adapted(use_dora=True)
    with torch.no_grad():
        for site in record_of(gm).adapters["default"].sites.values():
            gm.get_parameter(site.magnitude).mul_(3)
    for site in lora_fx.adapter_statistics(gm).sites:
        own = math.hypot(*site.singular_values)
        assert site.delta_norm == pytest.approx(np.linalg.norm(dense(gm, site.path)), rel=1e-9)
        assert abs(site.delta_norm - own) > 0.01 * own
        assert "DoRA" in site.remarks[0]


def test_what_started_elsewhere_than_at_zero_has_no_effect_yet() -> None:
    gm = injected(STACK, traced(STACK, "symbolic", torch.float64), init_lora_weights="pissa")
    for site in lora_fx.adapter_statistics(gm).sites:
        assert site.delta_norm < 1e-12 * site.weight_norm


def test_tensors_that_are_trained_in_full() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(11, 5), nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(self.embed(ids)))

    gm = fx.symbolic_trace(Words())
    options = {"target_modules": ["fc"], "modules_to_save": ["head"], "trainable_token_indices": {"embed": [3, 7]}}
    gm = lora_fx.inject(gm, LoraConfig(r=2, **options))
    with torch.no_grad():
        gm.get_parameter("head.bias").add_(2.0)
        next(p for n, p in gm.named_parameters() if "trainable_tokens" in n).mul_(3)
    trained = {t.name: t for t in lora_fx.adapter_statistics(gm).trained}
    assert trained["head.bias"].change_norm == pytest.approx(2 * math.sqrt(3), rel=1e-6)
    assert trained["head.weight"].change_norm == 0
    assert trained["2 rows of embed"].change_norm == pytest.approx(2 * trained["2 rows of embed"].base_norm, rel=1e-6)
    assert "head.bias" in str(lora_fx.adapter_statistics(gm))


def test_a_lora_bias_that_cannot_be_folded_is_said() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(7, 5, bias=False)))
    gm = lora_fx.inject(gm, LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    (site,) = lora_fx.adapter_statistics(gm).sites
    assert site.kept is None
    assert "lora_bias" in site.remarks[0]
    assert site.weight_norm > 0


def test_what_is_measured_beside_a_lora_bias_is_the_weight() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    gm = lora_fx.inject(fx.symbolic_trace(model), LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True))
    for site, layer in zip(lora_fx.adapter_statistics(randomise(gm)).sites, model, strict=True):
        assert site.weight_norm == pytest.approx(float(layer.weight.detach().norm()), rel=1e-5)
        assert site.kept == pytest.approx(1, abs=1e-4)


def test_a_base_without_values_is_not_measured() -> None:
    gm = lora_fx.inject(fx.symbolic_trace(nn.Sequential(nn.Linear(7, 5))), LoraConfig(r=2, target_modules=["0"]))
    set_attribute(gm, "0.weight", nn.Parameter(torch.empty(5, 7, device="meta"), requires_grad=False))
    with pytest.raises(FoldError, match=r"'0\.weight' .* load the weights first"):
        lora_fx.adapter_statistics(gm)


def test_a_broken_adapter_is_refused_by_name() -> None:
    gm = adapted()
    with torch.no_grad():
        gm.get_parameter("head.lora_B.default.weight")[0, 0] = math.nan
    for call in (lora_fx.adapter_statistics, lambda gm: lora_fx.compare_adapters(gm, gm)):
        with pytest.raises(
            AdapterError, match=r"head\.lora_B\.default\.weight of adapter 'default' holds NaN .* reload"
        ):
            call(gm)
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        lora_fx.adapter_statistics(gm, adapter_name="other")


def test_bars() -> None:
    assert spark((2.0, 1.0, 0.0)) == "█▅▁"
    assert spark((0.0,)) == "▁"
    assert spark(()) == ""
    assert len(spark(tuple(range(1, 65)))) == 16
    assert len(spark(tuple(range(1, 66)))) == 13
    assert len(spark((1.0,) * 16)) == 16


def test_the_table() -> None:
    sites = (SiteDelta("", None, 2, 0.5, 0.0, 1.0, None, (3.0, 2.0), ("so",)), SiteDelta("a", 0, 1, 1, 2, 1, 0.5, (1,)))
    first, second = AdapterStatistics("x", sites).blocks()[1].rows
    assert first == ("(root)", "2", "1", "", "", "2", f"{sites[0].effective_rank:.1f}", "█▆", "all ranks are in use: a "
                     "higher one may help; so")  # fmt: skip
    assert second == ("a", "1", "1", "50.00%", "50.00%", "1", "1.0", "█", "")
    assert len(AdapterStatistics("x", sites).blocks()) == 2
    assert AdapterStatistics("x", sites, (TrainedTensor("t", 1, 2),)).blocks()[2].rows == [("t", "1", "2")]


def test_an_a_that_mixes_the_groups_of_a_convolution() -> None:
    layout = Kernel((6, 2, 3), groups=2, mixes_groups=True)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (layout.a_shape(4), layout.b_shape(4)))
    up, down = _split(layout, a, b)
    whole = torch.block_diag(*b.reshape(2, 3, 2)) @ a.reshape(4, 12)  # (out, r) @ (r, in · extent)
    torch.testing.assert_close((up @ down).reshape(6, 12), whole)


def test_a_weight_of_two_sites_and_a_part_of_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c_attn = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 18)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.c_attn(self.b(self.a(x))).split(6, dim=-1)
            return q * k + v

    config = LoraConfig(r=2, target_modules=["a", "b", "c_attn[q]"], init_lora_weights=False)
    gm = lora_fx.inject(fx.symbolic_trace(Tied()), config)
    a, b, part = lora_fx.adapter_statistics(gm).sites
    assert dataclasses.replace(b, path="a", remarks=()) == a
    assert b.remarks == ("same adapter as a",)
    assert part.remarks == ("‖W‖ and kept are of the whole weight",)
    assert part.weight_norm == pytest.approx(float(gm.get_parameter("c_attn.weight").norm()), rel=1e-6)
    up, down = (gm.get_parameter(f"c_attn.lora_{half}_q.default.weight").detach() for half in "BA")
    expected = torch.linalg.svdvals(part.scaling * (up @ down).double())[:2].tolist()
    assert part.singular_values == pytest.approx(expected, rel=1e-5)
    assert part.delta_norm == pytest.approx(math.hypot(*expected), rel=1e-5)


def test_a_graph_whose_rows_choose_adapters_is_refused() -> None:
    gm = adapted()
    record_of(gm).batched = "as batch_adapters leaves it"
    for call in (lora_fx.adapter_statistics, lambda gm: lora_fx.compare_adapters(gm, gm)):
        with pytest.raises(GraphError, match="unbatch_adapters"):
            call(gm)


# Two adapters -------------------------------------------------------------------------------------


def pair(targets=None, **options) -> fx.GraphModule:
    gm = randomise(injected(STACK, traced(STACK, "symbolic", torch.float64)))
    gm = injected(STACK, gm, "other", targets, **{"r": 2, **options})
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm, "other"):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return gm


def angles(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Between column spaces, by numpy."""
    spaces = []
    for matrix in (one, two):
        u, s, _ = np.linalg.svd(matrix, full_matrices=False)
        spaces.append(u[:, s > 1e-10 * s[0]])
    return np.sort(np.degrees(np.arccos(np.clip(np.linalg.svd(spaces[0].T @ spaces[1], compute_uv=False), 0, 1))))


def test_two_adapters_are_compared_as_their_deltas_are() -> None:
    gm = pair()
    deltas = []
    for name in ("default", "other"):
        lora_fx.set_adapters(gm, {name: 1.0})
        deltas.append({path: dense_of(gm, name, path) for path in record_of(gm).adapters[name].sites})
    found = lora_fx.compare_adapters(gm, gm, other_name="other")
    assert [p.path for p in found.sites] == list(deltas[0])
    for each in found.sites:
        one, two = deltas[0][each.path], deltas[1][each.path]
        norms = np.linalg.norm(one), np.linalg.norm(two)
        assert each.first_norm == pytest.approx(norms[0])
        assert each.second_norm == pytest.approx(norms[1])
        assert each.difference_norm == pytest.approx(np.linalg.norm(one - two))
        assert each.cosine == pytest.approx((one * two).sum() / norms[0] / norms[1], abs=1e-12)
        np.testing.assert_allclose(each.output_angles, angles(one, two), atol=1e-6)
        np.testing.assert_allclose(each.input_angles, angles(one.T, two.T), atol=1e-6)
        assert each.output_overlap == pytest.approx(np.mean(np.cos(np.radians(each.output_angles)) ** 2))
        assert len(each.output_angles) == 2
    assert ("r", "3", "2") in found.options
    assert "cosine" in str(found)


def dense_of(gm: fx.GraphModule, name: str, path: str) -> np.ndarray:
    site = record_of(gm).adapters[name].sites[path]
    a, b = (gm.get_parameter(n).detach().numpy() for n in (site.lora_a, site.lora_b))
    return site.scaling * b @ a


def test_an_adapter_and_itself_and_a_space_at_right_angles() -> None:
    gm = pair()
    for each in lora_fx.compare_adapters(gm, gm).sites:
        assert each.cosine == pytest.approx(1)
        assert each.difference_norm < 1e-12 * each.first_norm
        assert max(*each.output_angles, *each.input_angles) < 1e-4
    with torch.no_grad():
        for adapter, row in (("default", 0), ("other", 1)):
            for half in "AB":
                parameter = gm.get_parameter(f"head.lora_{half}.{adapter}.weight")
                parameter.zero_()
                parameter[(0, row) if half == "A" else (row, 0)] = 1.0
    head = lora_fx.compare_adapters(gm, gm, other_name="other").sites[-1]
    assert head.path == "head"
    assert (head.cosine, head.output_overlap, head.input_overlap) == pytest.approx((0, 0, 0))
    assert head.output_angles == pytest.approx((90,))


def test_sites_of_one_alone_and_deltas_of_zero() -> None:
    gm = pair(targets=["head", "q_proj"], use_rslora=True)
    with torch.no_grad():
        gm.get_parameter("head.lora_B.other.weight").zero_()
    found = lora_fx.compare_adapters(gm, gm, other_name="other")
    assert "body.layers.0.up" in found.only_first
    assert found.only_second == ()
    head = next(each for each in found.sites if each.path == "head")
    assert (head.cosine, head.output_overlap, head.output_angles) == (None, None, ())
    assert {name for name, _, _ in found.options} >= {"r", "use_rslora", "target_modules"}
    assert "only default adapts" in str(found)


def test_what_is_not_compared_is_said() -> None:
    gm = pair(use_dora=True)
    assert [r for r in lora_fx.compare_adapters(gm, gm, other_name="other").remarks if "DoRA" in r] == [
        "other is DoRA: what its magnitudes change is not compared"
    ]
    gm = pair(modules_to_save=["head"], targets=["q_proj"])
    assert lora_fx.compare_adapters(gm, gm, other_name="other").remarks == (
        "other trains head.weight, head.bias as they are, which is not compared",
    )


def small(*sizes: int, **options) -> fx.GraphModule:
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    gm = fx.symbolic_trace(nn.Sequential(*layers))
    names = [str(i) for i in range(len(layers))]
    return randomise(lora_fx.inject(gm, LoraConfig(**{"r": 2, "target_modules": names, **options})))


def test_what_cannot_be_compared_is_said_and_the_rest_is_compared() -> None:
    found = lora_fx.compare_adapters(small(7, 5, 3, 4), small(7, 6, 3, 4))
    assert [each.path for each in found.sites] == ["2"]
    assert found.sites[0].layer_index == 2
    assert found.remarks[0] == "0 is adapted as (1, 5, 7) by one and as (1, 6, 7) by the other"
    assert len(found.remarks) == 2
    assert (found.first, found.second, found.options) == ("default (first)", "default (second)", ())


def test_the_table_of_two_adapters() -> None:
    one, two = small(7, 5, 3, target_modules=["0"]), small(7, 5, 3, target_modules=["1"], r=1)
    found = lora_fx.compare_adapters(one, two)
    assert (found.only_first, found.only_second, found.sites) == (("0",), ("1",), ())
    assert found.options == (("r", "2", "1"), ("target_modules", "0", "1"))
    title, options, *only = found.blocks()
    assert title == "default (first) and default (second): 0 sites of both"
    assert options.rows == found.options
    assert only == ["only default (first) adapts 0", "only default (second) adapts 1"]
    pairs = (DeltaPair("", None, 1, 0, 1, None, (), ()), DeltaPair("a", 0, 1, 2, 3, 0.5, (0.0,), (60.0,)))
    plain, table, remark = AdapterComparison("x", "y", (), (), (), pairs, ("so",)).blocks()
    assert (plain, remark) == ("x and y: 2 sites of both", "so")
    assert table.rows == [
        ("(root)", "1", "0", "1", "", "", ""),
        ("a", "1", "2", "3", "0.500", "100.0%", "25.0%"),
    ]


def test_reports_are_tables_in_a_notebook() -> None:
    gm = adapted(targets=["head"])
    plan = record_of(gm).adapters["default"].plan
    hostile = dataclasses.replace(plan, targets=(), trained=("<script>",))
    shown = [plan, hostile, lora_fx.fold_report(lora_fx.fold(gm)), lora_fx.find_sites(traced(STACK, "symbolic"))]
    for value in shown:
        html = value._repr_html_()
        assert html.count("<table>") == html.count("</table>") > 0
        assert "<script>" not in html
    assert "&lt;script&gt;" in hostile._repr_html_()
    assert "<td" in plan._repr_html_()
    assert str(plan).splitlines()[0] in plan._repr_html_()

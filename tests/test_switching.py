"""Many adapters on one graph: which count, by what weight, and what they combine to."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn
from zoo import BY_NAME, distance, randomise, run, tolerance, traced

import lora_fx
from lora_fx import AdapterError, LoraConfig
from lora_fx.graph_module import record_of

KINDS = ("stack", "addmm", "lookups", "kernels", "experts", "unread")


def two(name: str):
    """Two adapters of different ranks and scalings on a model of the zoo."""
    case = BY_NAME[name]
    gm = lora_fx.inject(traced(case), LoraConfig(r=3, lora_alpha=5, target_modules=case.targeted), adapter_name="a")
    gm = lora_fx.inject(gm, LoraConfig(r=2, lora_alpha=7, target_modules=case.targeted[:1]), adapter_name="b")
    return case, randomise(randomise(gm, "a"), "b", size=0.5)


def explicit(case: zoo.Case, gm, weights: dict[str, float]) -> list[torch.Tensor]:
    """What the model gives with each weight replaced by W + Σ weight · scaling · delta, in float64 until the end."""
    model = case.model()
    with torch.no_grad():
        for name, weight in weights.items():
            sites = record_of(gm).adapters[name].sites.values()
            for site in {id(model.get_parameter(site.weight)): site for site in sites}.values():  # tied ones once
                a, b = gm.get_parameter(site.lora_a).detach(), gm.get_parameter(site.lora_b).detach()
                model.get_parameter(site.weight).add_(weight * site.scaling * site.layout.delta(a, b))
    return run(model, case.arguments())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"b": -0.5}, {"a": 0.25, "b": 2.0}], ids=str)
def test_what_counts_is_computed_and_folded(name: str, weights: dict[str, float]) -> None:
    case, gm = two(name)
    base = traced(case)
    assert lora_fx.set_adapters(gm, weights) is gm
    assert lora_fx.active_adapters(gm) == weights
    expected, bound = explicit(case, gm, weights), tolerance(case, torch.float32)
    assert distance(expected, run(base, case.arguments())) > 100 * bound
    assert distance(expected, run(gm, case.arguments())) <= bound
    folded = lora_fx.fold(gm)
    assert distance(expected, run(folded, case.arguments())) <= bound
    assert zoo.codes(folded) == zoo.codes(base)
    assert folded.state_dict().keys() == base.state_dict().keys()
    assert lora_fx.adapter_names(gm) == ("a", "b")


@pytest.mark.parametrize("name", KINDS)
def test_disabled_is_the_base_bit_for_bit(name: str) -> None:
    case, gm = two(name)
    expected, code = run(gm, case.arguments()), gm.code
    with lora_fx.disable_adapters(gm) as disabled:
        zoo.assert_same_bits(run(disabled, case.arguments()), run(zoo.frozen(traced(case)), case.arguments()))
        assert lora_fx.active_adapters(gm) == {}
    zoo.assert_same_bits(run(gm, case.arguments()), expected)
    assert gm.code == code


def test_what_is_trained_in_full_goes_and_comes_with_its_adapter() -> None:
    model, x = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).eval(), torch.randn(3, 7)
    gm = lora_fx.inject(lora_fx.trace(model, x), LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.add_(0.3)
    trained, parameters = gm(x), lora_fx.lora_parameters(gm)
    with lora_fx.disable_adapters(gm):
        assert torch.equal(gm(x), model(x))
        assert [id(p) for p in lora_fx.lora_parameters(gm)] == [id(p) for p in parameters]
    assert torch.equal(gm(x), trained)
    with pytest.raises(AdapterError, match="counts whole or not at all"):
        lora_fx.set_adapters(gm, {"default": 0.5})
    lora_fx.delete_adapter(gm, "default")
    assert torch.equal(gm(x), model(x))
    assert gm.state_dict().keys() == model.state_dict().keys()


def test_switching_compiles_each_choice_once() -> None:
    case, gm = two("stack")
    compiled_graphs = 0

    def backend(graph_module, inputs):
        nonlocal compiled_graphs
        compiled_graphs += 1
        return graph_module

    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    (x,), _ = case.arguments()
    for _ in range(3):
        for choice in ("a", "b", ["a", "b"]):
            lora_fx.set_adapters(gm, choice)
            compiled(x)
    assert compiled_graphs == 3


@pytest.mark.parametrize("name", ["stack", "addmm", "lookups", "kernels", "experts"])
@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd"])
def test_combinations_are_exact(name: str, combination_type: str, tmp_path: Path) -> None:
    case, gm = two(name)
    weights = {"a": 0.5, "b": -1.5}
    options = {"svd_rank": 5} if combination_type == "svd" else {}
    both = lora_fx.combine_adapters(gm, weights, adapter_name="both", combination_type=combination_type, **options)
    assert lora_fx.adapter_names(gm) == ("a", "b")
    assert lora_fx.active_adapters(both) == {"a": 1.0, "b": 1.0}
    expected, bound = explicit(case, gm, weights), tolerance(case, torch.float32)
    lora_fx.set_adapters(both, "both")
    assert distance(expected, run(both, case.arguments())) <= 2 * bound
    lora_fx.save_adapter(both, tmp_path, adapter_name="both")
    loaded = lora_fx.load_adapter(traced(case), tmp_path)
    assert distance(expected, run(loaded, case.arguments())) <= 2 * bound


def test_a_choice_is_come_back_to_in_another_mode() -> None:
    """The graph of a mode that was not shown while the choice counted is not compiled yet."""
    case, gm = two("mlp")
    fresh = {name: lora_fx.set_adapters(copy.deepcopy(gm).train(), name) for name in ("a", "b")}
    expected = {name: run(copied, case.arguments()) for name, copied in fresh.items()}
    for name in ("a", "b"):
        lora_fx.set_adapters(gm, name)
    gm.train()
    for name in ("a", "b", "a"):
        zoo.assert_same_bits(run(lora_fx.set_adapters(gm, name), case.arguments()), expected[name])


def test_what_does_not_count_is_not_folded_by_name() -> None:
    _, gm = two("stack")
    lora_fx.set_adapters(gm, "a")
    for inplace in (False, True):
        with pytest.raises(lora_fx.FoldError, match="'b' does not count"):
            lora_fx.fold(gm, adapters=["b"], inplace=inplace)
    assert lora_fx.active_adapters(gm) == {"a": 1.0}


def test_a_combination_for_a_tied_weight_stays_one_adapter() -> None:
    case = BY_NAME["shared_parameter"]
    gm = lora_fx.inject(traced(case), LoraConfig(r=2, target_modules=["a", "b"]), adapter_name="one")
    gm = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["a", "b"]), adapter_name="two")
    randomise(randomise(gm, "one"), "two")
    both = lora_fx.combine_adapters(gm, {"one": 1.0, "two": 2.0}, adapter_name="both")
    sites = record_of(both).adapters["both"].sites
    assert both.get_parameter(sites["a"].lora_a) is both.get_parameter(sites["b"].lora_a)
    folded = lora_fx.fold(lora_fx.set_adapters(both, "both"))  # a warning would tell of untying, and fail
    assert distance(explicit(case, gm, {"one": 1.0, "two": 2.0}), run(folded, case.arguments())) < 1e-5


@pytest.mark.parametrize(
    ("choice", "message"),
    [("c", "no adapter 'c'"), ({"a": float("nan")}, "finite"), (3, "must be a mapping"), ({"a": True}, "finite")],
)
def test_choices_that_mean_nothing(choice, message: str) -> None:
    _, gm = two("stack")
    before = gm.code
    with pytest.raises(AdapterError, match=message):
        lora_fx.set_adapters(gm, choice)
    assert gm.code == before


def test_an_embeddings_factors_are_pruned_as_pefts() -> None:
    """A stands at the rows that are looked up, however the table is stored: the types on factors tell A from B."""
    import peft

    model = nn.Sequential(nn.Embedding(13, 7)).eval()
    ids = torch.arange(13)
    theirs = peft.get_peft_model(nn.Sequential(nn.Embedding(13, 7)), peft.LoraConfig(r=3, target_modules=["0"]), "one")
    theirs.add_adapter("two", peft.LoraConfig(r=3, target_modules=["0"]))
    gm = lora_fx.trace(model, ids)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(model[0].weight)
        for name in ("one", "two"):
            gm = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["0"]), adapter_name=name)
            site = record_of(gm).adapters[name].sites["0"]
            a, b = gm.get_parameter(site.lora_a), gm.get_parameter(site.lora_b)
            layer.lora_embedding_A[name].copy_(a.normal_())
            layer.lora_embedding_B[name].copy_(b.normal_())
    options = {"combination_type": "magnitude_prune", "density": 0.5}
    theirs.base_model.add_weighted_adapter(["one", "two"], [0.7, -1.3], "both", **options)
    theirs.base_model.set_adapter("both")
    ours = lora_fx.combine_adapters(gm, {"one": 0.7, "two": -1.3}, adapter_name="both", **options)
    lora_fx.set_adapters(ours, "both")
    expected = theirs.eval()(ids)
    assert float((expected - model(ids)).detach().abs().max()) > 0.1
    torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-5, check_stride=False)

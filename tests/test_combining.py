"""Combined deltas against deltas that are formed and added up, against full SVDs, and against PEFT's numbers."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from itertools import product

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fx.combining import COMBINATION_TYPES, Term, combine
from lora_fx.errors import AdapterError, ConfigError

ROWS, COLUMNS = 11, 7
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
ELECTING = ("ties", "dare_ties", "ties_svd", "dare_ties_svd")
SVD = tuple(name for name in COMBINATION_TYPES if name.endswith("svd"))
WEIGHTS = (0.7, -1.3, 0.4)
# float64: a few hundred roundings of values near 1
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def term(rank: int, weight: float = 1.0, *, n: int = 1, rows: int = ROWS, columns: int = COLUMNS, **options) -> Term:
    dtype = options.pop("dtype", torch.float64)
    left, right = torch.randn(n, rows, rank, dtype=dtype), torch.randn(n, rank, columns, dtype=dtype)
    return Term(left, right, weight, **options)


def terms_of(*ranks: int, **options) -> list[Term]:
    return [term(rank, weight, **options) for rank, weight in zip(ranks, WEIGHTS, strict=False)]


def summed(terms: list[Term]) -> torch.Tensor:
    """Σ wᵢ Δᵢ, formed."""
    return sum((t.weight * (t.left.double() @ t.right.double()) for t in terms), torch.zeros(()))


def options_of(name: str) -> dict[str, float]:
    return {} if name in ("linear", "cat", "svd") else {"density": 0.4}


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[..., :rank] @ torch.diag_embed(s[..., :rank]) @ vh[..., :rank, :]


def combined(terms: list[Term], name: str, **options) -> torch.Tensor:
    left, right = combine(terms, name, **options)
    return left @ right


# The exact types


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("ranks", [(2,), (2, 3), (2, 3, 5), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("name", ["linear", "cat"])
def test_the_weighted_sum_is_exact(name: str, ranks: tuple[int, ...], n: int) -> None:
    terms = terms_of(*ranks, n=n)
    left, right = combine(terms, name)
    torch.testing.assert_close(left @ right, summed(terms), **CLOSE)
    assert left.dtype == right.dtype == torch.float64
    q = sum(ranks) if name == "cat" else min(sum(ranks), ROWS, COLUMNS)
    assert (left.shape, right.shape) == ((n, ROWS, q), (n, q, COLUMNS))


@pytest.mark.parametrize("name", ["linear", "cat"])
def test_a_wrong_weight_is_seen(name: str) -> None:
    terms = terms_of(2, 3)
    others = [terms[0], replace(terms[1], weight=terms[1].weight * (1 + 1e-9))]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(combined(others, name), summed(terms), **CLOSE)


@pytest.mark.parametrize(("rows", "columns"), [(3, 13), (13, 3), (5, 5), (1, 7), (7, 1)])
def test_linear_brings_the_rank_down_to_rows_or_columns_without_loss(rows: int, columns: int) -> None:
    terms = terms_of(4, 5, rows=rows, columns=columns, n=2)
    left, right = combine(terms, "linear")
    assert left.shape[2] == right.shape[1] == min(rows, columns)
    torch.testing.assert_close(left @ right, summed(terms), **CLOSE)


def test_linear_with_a_rank_that_loses_nothing_is_exact_and_else_is_svd() -> None:
    terms = terms_of(2, 3)
    for rank in (5, 6, 100):
        torch.testing.assert_close(combined(terms, "linear", rank=rank), summed(terms), **CLOSE)
        assert combine(terms, "linear", rank=rank)[0].shape[2] == 5
    torch.testing.assert_close(combined(terms, "linear", rank=2), truncated(summed(terms), 2), **CLOSE)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("rank", [1, 2, 4, 5, 7, 100, None])
def test_svd_is_the_best_approximation(rank: int | None, n: int) -> None:
    terms = terms_of(2, 3, n=n)
    left, right = combine(terms, "svd", rank=rank)
    kept = min(rank or 3, 5)  # default: the highest rank; never above the ranks together
    assert (left.shape, right.shape) == ((n, ROWS, kept), (n, kept, COLUMNS))
    torch.testing.assert_close(left @ right, truncated(summed(terms), kept), **CLOSE)


def test_no_other_pair_of_that_rank_comes_nearer() -> None:
    """Eckart-Young by attempt: what alternating least squares finds from elsewhere is no better."""
    terms = terms_of(3, 3, 3)
    target = summed(terms)[0]
    best = (combined(terms, "svd", rank=2)[0] - target).norm()
    right = torch.randn(2, COLUMNS, dtype=torch.float64)
    for _ in range(500):
        left = target @ torch.linalg.pinv(right)
        right = torch.linalg.pinv(left) @ target
    assert best <= (left @ right - target).norm() * (1 + 1e-12)
    assert best > 0.1


@pytest.mark.parametrize("name", SVD)
def test_svd_halves_have_one_magnitude(name: str) -> None:
    left, right = combine(terms_of(3, 3), name, **options_of(name))
    gram_left, gram_right = left.mT @ left, right @ right.mT
    torch.testing.assert_close(gram_left, gram_right, **CLOSE)
    torch.testing.assert_close(gram_left, torch.diag_embed(gram_left.diagonal(dim1=1, dim2=2)), **CLOSE)


def test_the_exact_types_form_no_rows_by_columns() -> None:
    """A delta of a million by a million would take terabytes."""
    size = 1_000_000
    one, other = (term(1, w, rows=size, columns=size, dtype=torch.float32) for w in (0.5, -2.0))
    for name in ("linear", "cat", "svd"):
        left, right = combine([one, other], name, rank=None if name == "cat" else 2)
        column = left[0] @ right[0, :, :3]
        expected = summed([replace(t, right=t.right[:, :, :3]) for t in (one, other)])[0]
        torch.testing.assert_close(column.double(), expected, rtol=1e-5, atol=1e-5)


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5, 13]), st.sampled_from([1, 3, 7, 11])),
    rank=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_svd_is_optimal_and_linear_exact_whatever_the_shapes(ranks, weights, shape, rank, seed) -> None:
    torch.manual_seed(seed)
    n, rows, columns = shape
    terms = [term(r, w, n=n, rows=rows, columns=columns) for r, w in zip(ranks, weights, strict=False)]
    target = summed(terms)
    torch.testing.assert_close(combined(terms, "linear"), target, rtol=1e-10, atol=1e-10)
    lost = torch.linalg.matrix_norm(combined(terms, "svd", rank=rank) - target)
    least = torch.linalg.matrix_norm(truncated(target, rank) - target)
    torch.testing.assert_close(lost, least, rtol=1e-10, atol=1e-10)


# Special values


def test_adapters_that_share_their_directions_need_no_more_rank() -> None:
    """Rank-deficient concatenations: an adapter with itself, and with its negative."""
    one = term(3, 1.5)
    twice, nothing = [one, replace(one, weight=0.25)], [one, replace(one, weight=-1.5)]
    torch.testing.assert_close(combined(twice, "svd"), 1.75 * one.left @ one.right, **CLOSE)
    for name in ("linear", "svd", "cat"):
        torch.testing.assert_close(combined(nothing, name), torch.zeros(1, ROWS, COLUMNS).double(), **CLOSE)


@pytest.mark.parametrize("name", COMBINATION_TYPES)
def test_zeros_give_zero(name: str) -> None:
    zero = Term(torch.zeros(2, ROWS, 3), torch.randn(2, 3, COLUMNS), 2.0)
    assert not combined([zero, zero], name, **options_of(name)).any()
    one = term(3, 0.0, n=2)
    assert not combined([one, one], name, **options_of(name)).any()


@pytest.mark.parametrize("name", COMBINATION_TYPES)
@pytest.mark.parametrize("weight", [1.5, -1.5])
def test_one_adapter_with_nothing_pruned_is_itself(name: str, weight: float) -> None:
    one = term(3, weight, scaling=0.5)
    options = {"density": 1} if options_of(name) else {}
    torch.testing.assert_close(combined([one], name, **options), weight * one.left @ one.right, **CLOSE)


@pytest.mark.parametrize("name", COMBINATION_TYPES)
def test_all_weights_negated_negate_the_delta(name: str) -> None:
    """The sign must not fall out of √|w|, nor come in twice."""
    terms = terms_of(3, 3)
    negated = [replace(t, weight=-t.weight) for t in terms]
    plus = combined(terms, name, generator=torch.Generator().manual_seed(5), **options_of(name))
    minus = combined(negated, name, generator=torch.Generator().manual_seed(5), **options_of(name))
    torch.testing.assert_close(plus, -minus, **CLOSE)
    assert plus.abs().max() > 0.1


@pytest.mark.parametrize("name", COMBINATION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    terms = terms_of(3, 3, dtype=dtype)
    wide = [replace(t, left=t.left.float(), right=t.right.float()) for t in terms]
    got, expected = (
        combine(ts, name, generator=torch.Generator().manual_seed(1), **options_of(name)) for ts in (terms, wide)
    )
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_terms_of_different_dtypes_meet_in_the_widest() -> None:
    terms = [term(3, 0.5, dtype=torch.bfloat16), term(2, -0.5)]
    assert combine(terms, "linear")[0].dtype == torch.float64
    torch.testing.assert_close(combined(terms, "linear"), summed(terms), **CLOSE)


@pytest.mark.parametrize("name", COMBINATION_TYPES)
def test_what_goes_in_is_neither_changed_nor_shared(name: str) -> None:
    one = Term(nn.Parameter(torch.randn(1, ROWS, 3)), nn.Parameter(torch.randn(1, 3, COLUMNS)), 1.0)
    before = one.left.detach().clone(), one.right.detach().clone()
    for out in combine([one], name, **({"density": 1.0} if options_of(name) else {})):
        assert not out.requires_grad
        assert out.is_contiguous()
        out.fill_(9.0)
    assert torch.equal(one.left, before[0])
    assert torch.equal(one.right, before[1])


# Pruning: written out from the papers, per element


def pruned_by_hand(delta: torch.Tensor, density: float) -> torch.Tensor:
    kept = int(density * delta.numel())
    smallest = delta.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(delta.abs() >= smallest, delta, torch.zeros_like(delta))


def ties_by_hand(deltas: list[torch.Tensor], weights: list[float], method: str) -> torch.Tensor:
    merged = torch.zeros_like(deltas[0])
    for at in product(*map(range, merged.shape)):
        values = [float(d[at]) for d in deltas]
        votes = sum(values) if method == "total" else sum((v > 0) - (v < 0) for v in values)
        sign = 1 if votes >= 0 else -1
        agreeing = [v * w for v, w in zip(values, weights, strict=True) if v * sign > 0]
        merged[at] = sum(agreeing) / max(1, len(agreeing))
    return merged


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.77, 1.0])
def test_ties_svd_is_ties_on_the_deltas(density: float, method: str, n: int) -> None:
    terms = [term(3, 1.2, n=n, scaling=2.0), term(2, -0.6, n=n, scaling=0.5), term(4, 0.3, n=n, scaling=1.0)]
    deltas = [pruned_by_hand(t.scaling * t.left @ t.right, density) for t in terms]
    expected = ties_by_hand(deltas, [t.weight / t.scaling for t in terms], method)
    got = combined(terms, "ties_svd", rank=COLUMNS, density=density, majority_sign_method=method)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (got - summed(terms)).abs().max() > 0.1
    torch.testing.assert_close(
        combined(terms, "ties_svd", rank=2, density=density, majority_sign_method=method),
        truncated(expected, 2),
        **CLOSE,
    )


def test_the_methods_of_election_and_the_scalings_matter() -> None:
    terms = terms_of(3, 2, 4)
    total = combined(terms, "ties_svd", density=0.5)
    frequency = combined(terms, "ties_svd", density=0.5, majority_sign_method="frequency")
    scaled = combined([replace(terms[0], scaling=9.0), *terms[1:]], "ties_svd", density=0.5)
    assert (total - frequency).abs().max() > 0.01
    assert (total - scaled).abs().max() > 0.01


@pytest.mark.parametrize("n", [1, 2])
def test_magnitude_prune_svd_prunes_each_delta(n: int) -> None:
    terms = terms_of(3, 2, n=n)
    expected = sum(t.weight * pruned_by_hand(t.left @ t.right, 0.4) for t in terms)
    torch.testing.assert_close(combined(terms, "magnitude_prune_svd", rank=7, density=0.4), expected, **CLOSE)


def test_dare_keeps_its_share_and_its_expectation() -> None:
    one = term(3, 1.0, rows=101, columns=103)
    delta = one.left @ one.right
    pruned = combined([one], "dare_linear_svd", rank=101, density=0.3)
    kept = pruned.abs() > 1e-9
    share = kept.double().mean()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / kept.numel())
    torch.testing.assert_close(pruned[kept], delta[kept] / 0.3, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in COMBINATION_TYPES if name.startswith("dare")])
def test_a_generator_decides_and_without_one_the_global_seed(name: str) -> None:
    terms = terms_of(3, 3)
    once, again, other = (
        combined(terms, name, density=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    state = torch.get_rng_state()
    combine(terms, name, density=0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(combined(terms, name, density=0.5), once)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties_svd"])
def test_a_density_of_1_draws_nothing(name: str) -> None:
    terms = terms_of(3, 3)
    state = torch.get_rng_state()
    combine(terms, name, density=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_density_that_keeps_nothing_leaves_nothing() -> None:
    """77 · 0.01 rounds down to none, in PEFT as here."""
    assert not combined(terms_of(3, 3), "ties_svd", density=0.01).any()


# PEFT's numbers


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(COLUMNS, ROWS), False),
    "embedding": (lambda: nn.Embedding(ROWS, COLUMNS), True),
    "conv1d of transformers": (lambda: Conv1D(COLUMNS, ROWS), True),
}


class Peft:
    """One layer with adapters "0", "1", … of given ranks, B ≠ 0 and lora_alpha ≠ r; what PEFT makes of them."""

    def __init__(self, layer: str, ranks: tuple[int, ...], alphas: tuple[float, ...]) -> None:
        make, self.stored_in_out = LAYERS[layer]
        configs = [
            peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"], fan_in_fan_out=isinstance(make(), Conv1D))
            for r, alpha in zip(ranks, alphas, strict=True)
        ]
        self.model = peft.get_peft_model(One(make()), configs[0], adapter_name="0")
        for i, config in enumerate(configs[1:], start=1):
            self.model.add_adapter(str(i), config)
        self.layer = self.model.base_model.model.layer
        for i in range(len(ranks)):
            for factor in self.factors(str(i)):
                nn.init.normal_(factor)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name in self.layer.lora_A:
            return self.layer.lora_A[name].weight.data, self.layer.lora_B[name].weight.data
        return self.layer.lora_embedding_A[name].data, self.layer.lora_embedding_B[name].data

    def terms(self, weights: tuple[float, ...]) -> list[Term]:
        terms = []
        for i, weight in enumerate(weights):
            a, b = self.factors(str(i))
            left, right = (a.T, b.T) if self.stored_in_out else (b, a)
            scaling = self.layer.scaling[str(i)]
            terms.append(Term(left[None], right[None], weight * scaling, scaling))
        return terms

    def combined(self, weights: tuple[float, ...], name: str, seed: int = 0, **options) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a density of 1 is worth a warning to PEFT
            self._seed_after_injection(seed)
            self.model.add_weighted_adapter(
                [str(i) for i in range(len(weights))], list(weights), "combined", combination_type=name, **options
            )
        return self.layer.get_delta_weight("combined").detach()

    def _seed_after_injection(self, seed: int) -> None:
        """PEFT initialises the combined adapter, which draws, before it prunes."""
        model = self.model.base_model

        def inject_adapter(*args, **kwargs) -> None:
            type(model).inject_adapter(model, *args, **kwargs)
            torch.manual_seed(seed)

        model.inject_adapter = inject_adapter


FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
SIGNS = [(0.7, 1.3, 0.4), (0.7, -1.3, 0.4), (-0.7, -1.3, -0.4), (0.7, 0.0, -0.4)]


@pytest.mark.parametrize("density", [0.35, 0.8, 1.0])
@pytest.mark.parametrize("weights", SIGNS, ids=str)
@pytest.mark.parametrize("name", [name for name in COMBINATION_TYPES if name != "linear"])
@pytest.mark.parametrize("layer", LAYERS)
def test_numbers_are_pefts(layer: str, name: str, weights: tuple[float, ...], density: float) -> None:
    ranks = (3, 3, 3) if name in PRUNING else (3, 2, 5)
    theirs = Peft(layer, ranks, alphas=(5.0, 1.0, 7.0))
    terms = theirs.terms(weights)
    options = {"density": density} if options_of(name) else {}
    for method in ("total", "frequency") if name in ELECTING else ("total",):
        expected = theirs.combined(weights, name, seed=11, majority_sign_method=method, **options)
        torch.manual_seed(11)
        got = combined(terms, name, majority_sign_method=method, stored_in_out=theirs.stored_in_out, **options)
        torch.testing.assert_close(got[0], expected, **FLOAT32)
        theirs.model.delete_adapter("combined")
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("name", SVD)
@pytest.mark.parametrize("rank", [1, 4])
def test_numbers_are_pefts_at_a_rank(name: str, rank: int) -> None:
    theirs = Peft("linear", (3, 5), (5.0, 1.0))
    terms = theirs.terms((0.7, -1.3))
    expected = theirs.combined((0.7, -1.3), name, seed=11, svd_rank=rank, **options_of(name))
    torch.manual_seed(11)
    left, right = combine(terms, name, rank=rank, **options_of(name))
    assert left.shape[2] == rank
    torch.testing.assert_close((left @ right)[0], expected, **FLOAT32)


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("weights", SIGNS, ids=str)
def test_factors_are_those_of_pefts_formulas(name: str, weights: tuple[float, ...]) -> None:
    """Not only the product: A and B themselves, with the sign on A."""
    terms = [term(3, w, dtype=torch.float32) for w in weights]
    formula = getattr(merge_utils, name)
    roots = torch.tensor(weights).abs().sqrt()
    torch.manual_seed(7)
    a = formula([t.right for t in terms], roots * torch.tensor([math.copysign(1, w) for w in weights]), 0.6)
    b = formula([t.left for t in terms], roots, 0.6)
    torch.manual_seed(7)
    left, right = combine(terms, name, density=0.6)
    torch.testing.assert_close(right, a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(left, b, rtol=1e-6, atol=1e-6)


def test_where_a_is_matters_to_negative_weights() -> None:
    """So that the comparison with PEFT's embeddings above says something."""
    terms = [replace(t, left=t.right.mT, right=t.left.mT) for t in terms_of(3, 3)]
    one, other = (combined(terms, "magnitude_prune", density=0.5, stored_in_out=flag) for flag in (True, False))
    assert (one - other).abs().max() > 0.1


def test_linear_is_the_sum_and_pefts_is_not() -> None:
    theirs = Peft("linear", (3, 3), (5.0, 1.0))
    terms = theirs.terms((0.7, -1.3))
    expected = summed(terms)
    torch.testing.assert_close(combined(terms, "linear").double(), expected, **FLOAT32)
    off = (theirs.combined((0.7, -1.3), "linear").double() - expected[0]).norm() / expected.norm()
    assert off > 0.3


def test_pefts_names_are_all_here() -> None:
    documented = re.findall(
        r"`(\w+)`", peft.LoraModel.add_weighted_adapter.__doc__.partition("merging type can be one")[2]
    )
    names = documented[: documented.index("magnitude_prune_svd") + 1]
    assert set(COMBINATION_TYPES) == set(names) - {"combination_type"}


# Errors


TWO = terms_of(3, 3)
ERRORS = {
    "unknown type": (TWO, "tie", {}, "combination_type='tie'", "'ties'", "Did you mean 'ties'"),
    "no name": (TWO, ["svd"], {}, "combination_type=['svd']", "must be one of", "'linear'"),
    "density missing": (TWO, "ties", {}, "'ties' needs a density", "half", "density=0.5"),
    "density 0": (TWO, "ties", {"density": 0.0}, "density=0.0", "above 0", "up to 1"),
    "density 2": (TWO, "dare_linear_svd", {"density": 2}, "density=2", "above 0", "up to 1"),
    "density nan": (TWO, "ties", {"density": math.nan}, "density=nan", "above 0", "up to 1"),
    "density True": (TWO, "ties", {"density": True}, "density=True", "a number", "up to 1"),
    "density unused": (TWO, "cat", {"density": 0.5}, "density=0.5", "'cat'", "leave it out, or use a type that has it"),
    "rank 0": (TWO, "svd", {"rank": 0}, "svd_rank=0", "an integer above 0", "None"),
    "rank 1.5": (TWO, "svd", {"rank": 1.5}, "svd_rank=1.5", "an integer above 0", "None"),
    "rank True": (TWO, "svd", {"rank": True}, "svd_rank=True", "an integer above 0", "None"),
    "rank unused": (TWO, "ties", {"rank": 2, "density": 0.5}, "svd_rank=2", "'ties'", "'ties_svd'"),
    "method": (
        TWO,
        "ties",
        {"density": 0.5, "majority_sign_method": "totl"},
        "majority_sign_method='totl'",
        "'frequency'",
        "Did you mean 'total'",
    ),
    "method unused": (TWO, "svd", {"majority_sign_method": "frequency"}, "'frequency'", "'svd'", "leave it out"),
    "ranks": (terms_of(3, 2), "ties", {"density": 0.5}, "[3, 2]", "'ties' adds A to A", "'ties_svd'"),
    "no terms": ([], "linear", {}, "nothing to combine", "no adapter", "Name one"),
    "weight nan": ([TWO[0], replace(TWO[1], weight=math.nan)], "cat", {}, "nan", "adapter 1 of 2", "a finite number"),
    "weight inf": ([replace(TWO[0], weight=-math.inf)], "svd", {}, "-inf", "adapter 0 of 1", "a finite number"),
    "weight text": ([replace(TWO[0], weight="1")], "svd", {}, "'1'", "adapter 0 of 1", "a finite number"),
    "weight huge": ([replace(TWO[0], weight=10**400)], "svd", {}, "1000", "adapter 0 of 1", "a finite number"),
    "scaling 0": ([replace(TWO[0], scaling=0.0)], "svd", {}, "scaling", "adapter 0 of 1", "not 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_options_that_cannot_be_meant(case: str) -> None:
    terms, name, options, *fragments = ERRORS[case]
    with pytest.raises(ConfigError) as caught:
        combine(terms, name, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [term(3, n=2), term(3, rows=5), term(3, columns=5), Term(torch.randn(ROWS, 3), torch.randn(3, COLUMNS), 1.0)]
    + [Term(torch.randn(1, ROWS, 3), torch.randn(1, 2, COLUMNS), 1.0)],
)
@pytest.mark.parametrize("name", COMBINATION_TYPES)
def test_terms_of_different_weights_are_refused_rather_than_broadcast(name: str, other: Term) -> None:
    with pytest.raises(AdapterError, match="combine adapters of one weight"):
        combine([term(3), other], name, **options_of(name))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", COMBINATION_TYPES)
def test_values_that_are_not_finite(name: str, bad: float) -> None:
    one = term(3)
    one.right[0, 1, 2] = bad
    with pytest.raises(AdapterError, match="adapter 1 of 2 has NaN or infinite values"):
        combine([term(3), one], name, **options_of(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in COMBINATION_TYPES if name not in PRUNING])
def test_a_delta_beyond_the_dtype_is_said(name: str, dtype: torch.dtype) -> None:
    huge = math.sqrt(torch.finfo(dtype).max)
    one = Term(torch.full((1, 5, 2), huge, dtype=dtype), torch.full((1, 2, 3), huge, dtype=dtype), huge * 1e3)
    with pytest.raises(AdapterError, match="the combined delta has NaN or infinite values"):
        combine([one, replace(one, weight=1e4 * huge)], name, **({"density": 1} if options_of(name) else {}))

"""Several low-rank deltas of one weight become one: Σ wᵢ Δᵢ, exactly or cut to a rank, TIES, DARE, magnitude pruning.

Names, and numbers where PEFT has any, are those of `add_weighted_adapter` in PEFT 0.21, except "linear", which is the
exact sum here (PEFT adds A to A and B to B, and so adds products of one adapter's A with another's B). Plain tensors
in, plain tensors out.

    cat, linear, svd                  work on the factors, exactly: the deltas are never formed
    ties, dare_*, magnitude_prune     prune and add A with A and B with B, as PEFT does: cheap, of unchanged rank, and
                                      neither the papers' method nor near Σ wᵢ Δᵢ, even with nothing pruned
    the same with _svd                the papers' methods, on the deltas; then the best approximation of a given rank

TIES: Yadav et al., arXiv 2306.01708. DARE: Yu et al., arXiv 2311.03099.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from .errors import AdapterError, ConfigError, closest

Pair = tuple[torch.Tensor, torch.Tensor]

MAJORITY_SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Term:
    """weight · left @ right: a batch of n matrices (groups of a convolution, experts), nearly always one.

    Attributes:
        left: (n, rows, q).
        right: (n, q, columns); q may differ from term to term.
        weight: the whole factor: what the adapter counts for, times its scaling.
        scaling: the part of `weight` that is the adapter's own. It tells only where deltas of several scalings are
            weighed against each other before they are weighted: the elections of signs in ties_svd and dare_ties_svd.
    """

    left: torch.Tensor
    right: torch.Tensor
    weight: float
    scaling: float = 1.0


def combine(
    terms: Sequence[Term],
    combination_type: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
    stored_in_out: bool = False,
) -> Pair:
    """(left (n, rows, q), right (n, q, columns)) of the combined delta, which is left @ right with factor 1.

    Args:
        terms: deltas of one weight.
        combination_type: one of `COMBINATION_TYPES`.
        rank: the most that q may be, for "linear" and the svd types; q stays below it where rows, columns or the ranks
            together do. None: no loss for "linear", the highest rank of a term for the others. (Users' svd_rank.)
        density: share of the values that pruning keeps, in (0, 1], counted over all n matrices of a term at once.
        majority_sign_method: how ties elects a sign: "total" by the sum of values, "frequency" by their number.
        generator: for dare; None is torch's own, which PEFT takes.
        stored_in_out: left is Aᵀ and right is Bᵀ, as for embeddings, rather than B and A. It matters to the types that
            work on factors: they give a negative weight's sign to A, and draw for A first.

    Returns:
        New factors, in the dtype of the terms, float32 at least. Their shapes follow from shapes and rank alone.
    """
    kind = _kind(combination_type)
    _check_options(combination_type, kind, rank, density, majority_sign_method)
    _check_terms(terms)
    options = _Options(combination_type, rank, density or 1.0, majority_sign_method, generator, stored_in_out)
    with torch.no_grad():
        left, right = kind.combine(_widened(terms), options)
    _require_finite("the combined delta", left, right)
    return left.contiguous(), right.contiguous()


@dataclass(frozen=True)
class _Options:
    combination_type: str
    rank: int | None
    density: float
    majority_sign_method: str
    generator: torch.Generator | None
    stored_in_out: bool


# The exact types: on factors, and never rows × columns.


def _concatenated(terms: Sequence[Term], options: _Options) -> Pair:
    """Σ wᵢ Lᵢ Rᵢ = [L₁ L₂ …] @ [w₁ R₁; w₂ R₂; …]."""
    return torch.cat([t.left for t in terms], dim=2), torch.cat([t.right * t.weight for t in terms], dim=1)


def _exact_sum(terms: Sequence[Term], options: _Options) -> Pair:
    """The concatenation, its rank brought down to rows or columns where it is above, or to what the user allows."""
    left, right = _concatenated(terms, options)
    rows, ranks, columns = left.shape[1], left.shape[2], right.shape[2]
    if options.rank is not None and options.rank < min(rows, ranks, columns):
        return _best_of_rank(left, right, options.rank)
    if ranks <= min(rows, columns):
        return left, right
    if rows <= columns:
        return _recompressed(left, right)
    right, left = _recompressed(right.mT, left.mT)
    return left.mT, right.mT


def _recompressed(left: torch.Tensor, right: torch.Tensor) -> Pair:
    """The same product with rank `rows`: left = Q R, and so left @ right = Q @ (R @ right)."""
    q, r = torch.linalg.qr(_wide(left))  # (n, rows, rows), (n, rows, ranks)
    return q.to(left.dtype), (r @ _wide(right)).to(right.dtype)


def _best_sum(terms: Sequence[Term], options: _Options) -> Pair:
    return _best_of_rank(*_concatenated(terms, options), options.rank or _highest_rank(terms))


def _best_of_rank(left: torch.Tensor, right: torch.Tensor, rank: int) -> Pair:
    """The best approximation of left @ right (Eckart-Young): left = Q R, rightᵀ = P S, and an SVD of the core R Sᵀ.

    The core is no larger than the ranks together, so that float64 costs little.
    """
    q, r = torch.linalg.qr(_wide(left))
    p, s = torch.linalg.qr(_wide(right.mT))
    _require_finite("the combined delta", r, s)  # an SVD of anything else fails in words of its own
    u, v = _halves(r @ s.mT, rank)
    return (q @ u).to(left.dtype), (v @ p.mT).to(right.dtype)


def _halves(matrix: torch.Tensor, rank: int) -> Pair:
    """U √S and √S Vᵀ, cut to `rank`: halves of one magnitude, which narrow dtypes and further training take best."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    roots = s[:, :rank].sqrt()
    return u[:, :, :rank] * roots.unsqueeze(1), roots.unsqueeze(2) * vh[:, :rank]


# The types that prune. A task is one term's tensor: A, B or the delta.


def _of_factors(prune: _Prune, merge: _Merge, terms: Sequence[Term], options: _Options) -> Pair:
    """A with A and B with B, each of them with √|w| (PEFT's `_generalized_task_arithmetic_weighted_adapter`)."""
    ranks = [t.left.shape[2] for t in terms]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"combination_type={options.combination_type!r} adds A to A and B to B, which takes equal ranks, not "
            f"{ranks}. {options.combination_type + '_svd'!r} works on the deltas, whatever their ranks"
        )
    if options.stored_in_out:
        swapped = [replace(t, left=t.right.mT, right=t.left.mT) for t in terms]
        right, left = _of_factors(prune, merge, swapped, replace(options, stored_in_out=False))
        return left.mT, right.mT
    roots = [math.sqrt(abs(t.weight)) for t in terms]
    signed = [math.copysign(root, t.weight) for root, t in zip(roots, terms, strict=True)]  # on one side, or it is lost
    # A before B, all terms of one before those of the other: PEFT's order of draws.
    right = merge([_pruned(t.right, prune, options) for t in terms], signed, options)
    left = merge([_pruned(t.left, prune, options) for t in terms], roots, options)
    return left, right


def _of_deltas(prune: _Prune, merge: _Merge, terms: Sequence[Term], options: _Options) -> Pair:
    """The deltas with their own scaling, as PEFT's `get_delta_weight` gives them; then an SVD in their own dtype."""
    tasks = [_pruned(_delta(t), prune, options) for t in terms]
    merged = merge(tasks, [t.weight / t.scaling for t in terms], options)
    _require_finite("the combined delta", merged)
    return _halves(merged, options.rank or _highest_rank(terms))


def _delta(term: Term) -> torch.Tensor:
    """scaling · left @ right: (n, rows, q) @ (n, q, columns) -> (n, rows, columns)."""
    return (_wide(term.left) @ _wide(term.right)).mul_(term.scaling).to(term.left.dtype)


def _pruned(task: torch.Tensor, prune: _Prune, options: _Options) -> torch.Tensor:
    # Contiguous: values are drawn, and chosen among equal ones, in the order of memory.
    return task if options.density == 1 else prune(task.contiguous(), options)


def _keep_largest(task: torch.Tensor, options: _Options) -> torch.Tensor:
    """The share `density` of largest magnitude ("trim" in TIES), the number rounded down."""
    flat = task.view(-1)
    places = flat.abs().topk(int(options.density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, places, flat[places]).view_as(task)


def _keep_random(task: torch.Tensor, options: _Options) -> torch.Tensor:
    """Each value with probability `density`, and then divided by it: the expectation is what it was (DARE, eq. 2)."""
    return task * torch.bernoulli(torch.full_like(task, options.density), generator=options.generator) / options.density


def _sum(tasks: Sequence[torch.Tensor], weights: Sequence[float], options: _Options) -> torch.Tensor:
    total = torch.zeros_like(tasks[0])
    for task, weight in zip(tasks, weights, strict=True):
        total.add_(task, alpha=weight)
    return total


def _disjoint_mean(tasks: Sequence[torch.Tensor], weights: Sequence[float], options: _Options) -> torch.Tensor:
    """TIES: per element, the mean over the tasks that have the elected sign there; 0 where none has.

    Signs are elected, and agree, before tasks are weighted, as in PEFT: a negative weight does not turn a vote.
    """
    elected = _elected(tasks, options)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for task, weight in zip(tasks, weights, strict=True):
        agrees = task.sign() == elected
        total.add_(task * agrees, alpha=weight)
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))


def _elected(tasks: Sequence[torch.Tensor], options: _Options) -> torch.Tensor:
    """The majority's sign, 1 or -1, per element; a draw goes to 1."""
    votes = torch.zeros_like(tasks[0])
    for task in tasks:
        votes.add_(task.sign() if options.majority_sign_method == "frequency" else task)
    return (votes >= 0).to(votes.dtype).mul_(2).sub_(1)


# The table.

_Prune = Callable[[torch.Tensor, _Options], torch.Tensor]
_Merge = Callable[[Sequence[torch.Tensor], Sequence[float], _Options], torch.Tensor]


@dataclass(frozen=True)
class _Kind:
    combine: Callable[[Sequence[Term], _Options], Pair]
    has_rank: bool = False
    has_density: bool = False
    has_election: bool = False


def _pruning(name: str, prune: _Prune, merge: _Merge) -> dict[str, _Kind]:
    """The type that works on the factors, and the one that works on the deltas."""
    elects = merge is _disjoint_mean
    return {
        name: _Kind(lambda terms, options: _of_factors(prune, merge, terms, options), False, True, elects),
        f"{name}_svd": _Kind(lambda terms, options: _of_deltas(prune, merge, terms, options), True, True, elects),
    }


_KINDS = {
    "linear": _Kind(_exact_sum, has_rank=True),
    "cat": _Kind(_concatenated),
    "svd": _Kind(_best_sum, has_rank=True),
    **_pruning("ties", _keep_largest, _disjoint_mean),
    **_pruning("dare_linear", _keep_random, _sum),
    **_pruning("dare_ties", _keep_random, _disjoint_mean),
    **_pruning("magnitude_prune", _keep_largest, _sum),
}
COMBINATION_TYPES = tuple(_KINDS)


# What goes in.


def _kind(combination_type: Any) -> _Kind:
    if isinstance(combination_type, str) and combination_type in _KINDS:
        return _KINDS[combination_type]
    raise ConfigError(
        f"combination_type={combination_type!r} must be one of {', '.join(map(repr, COMBINATION_TYPES))}."
        f"{closest(str(combination_type), COMBINATION_TYPES)}"
    )


def _check_options(combination_type: str, kind: _Kind, rank: Any, density: Any, majority_sign_method: Any) -> None:
    """Ranges, and that nothing is given which the type would not look at."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"svd_rank={rank!r} must be an integer above 0, or None")
    if rank is not None and not kind.has_rank:
        raise ConfigError(_unused(combination_type, "svd_rank", rank, "has_rank"))
    if density is None and kind.has_density:
        raise ConfigError(f"combination_type={combination_type!r} needs a density: give density=0.5 to keep half")
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        raise ConfigError(f"density={density!r} must be a number above 0, up to 1 (which keeps everything)")
    if density is not None and not kind.has_density:
        raise ConfigError(_unused(combination_type, "density", density, "has_density"))
    if majority_sign_method not in MAJORITY_SIGN_METHODS:
        raise ConfigError(
            f"majority_sign_method={majority_sign_method!r} must be one of "
            f"{', '.join(map(repr, MAJORITY_SIGN_METHODS))}.{closest(str(majority_sign_method), MAJORITY_SIGN_METHODS)}"
        )
    if majority_sign_method != "total" and not kind.has_election:
        raise ConfigError(_unused(combination_type, "majority_sign_method", majority_sign_method, "has_election"))


def _unused(combination_type: str, option: str, value: object, flag: str) -> str:
    users = ", ".join(repr(name) for name, kind in _KINDS.items() if getattr(kind, flag))
    return (
        f"{option}={value!r} has no meaning for combination_type={combination_type!r}: "
        f"leave it out, or use a type that has it ({users})"
    )


def _check_terms(terms: Sequence[Term]) -> None:
    if not terms:
        raise ConfigError("there is nothing to combine: no adapter is named that adapts this weight. Name one or more")
    for i, term in enumerate(terms):
        if not _is_finite(term.weight):
            raise ConfigError(f"the weight of adapter {i} of {len(terms)} is {term.weight!r}; give a finite number")
        if not _is_finite(term.scaling) or term.scaling == 0:
            raise ConfigError(
                f"the scaling of adapter {i} of {len(terms)} is {term.scaling!r}; give a finite one, not 0"
            )
        if _weight_shape(term) != _weight_shape(terms[0]) or _weight_shape(term) is None:
            raise AdapterError(
                f"adapter {i} of {len(terms)} has factors of {tuple(term.left.shape)} and {tuple(term.right.shape)}, "
                f"not (n, rows, q) and (n, q, columns) for the weight of adapter 0, {_weight_shape(terms[0])}: "
                "combine adapters of one weight"
            )
        _require_finite(f"adapter {i} of {len(terms)}", term.left, term.right)


def _weight_shape(term: Term) -> tuple[int, ...] | None:
    left, right = term.left.shape, term.right.shape
    if len(left) != 3 or len(right) != 3 or left[0] != right[0] or left[2] != right[1]:
        return None
    return (*left[:2], right[2])


def _require_finite(what: str, *tensors: torch.Tensor) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise AdapterError(f"{what} has NaN or infinite values: look at the adapters' lora_A, lora_B and weights")


def _widened(terms: Sequence[Term]) -> list[Term]:
    """The terms in one dtype, float32 at least."""
    dtype = torch.float32
    for term in terms:
        dtype = torch.promote_types(dtype, torch.promote_types(term.left.dtype, term.right.dtype))
    return [replace(t, left=t.left.to(dtype), right=t.right.to(dtype)) for t in terms]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def _highest_rank(terms: Sequence[Term]) -> int:
    return max(t.left.shape[2] for t in terms)


def _is_finite(value: object) -> bool:
    return _is_number(value) and abs(value) <= sys.float_info.max  # NaN is not, nor an int beyond any float


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)

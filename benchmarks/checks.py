"""What a subject asserts before it times anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class CheckFailed(AssertionError):
    """The things to be compared do not compute the same, so their times mean nothing."""


def require(condition: bool, message: str) -> None:
    """Raise CheckFailed with `message` unless `condition` holds. Unlike assert, also under `python -O`."""
    if not condition:
        raise CheckFailed(message)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual − expected| / max |expected|, in float64; NaN if either holds one."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def assert_same(what: str, actual: torch.Tensor, expected: torch.Tensor, *, eps: float = 256.0) -> float:
    """Raise CheckFailed if the relative error is beyond `eps` machine epsilons of the coarser dtype; the error."""
    tolerance = eps * max(torch.finfo(t.dtype).eps for t in (actual, expected))
    error = relative_error(actual, expected)
    require(error <= tolerance, f"{what}: relative error {error:.3g} is beyond {tolerance:.3g}")
    return error


def assert_effect(what: str, adapted: torch.Tensor, base: torch.Tensor, *, eps: float = 25600.0) -> float:
    """Raise CheckFailed unless the adapter moves the output, so that `assert_same` is not vacuous."""
    error = relative_error(adapted, base)
    least = min(eps * torch.finfo(base.dtype).eps, 1e-2)
    require(error >= least, f"{what}: the adapter moves the output by {error:.3g} only, so nothing is compared")
    return error


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor in a model's output."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name without PEFT's prefix: parameter} of every A and B."""
    named = model.named_parameters()
    return {name.removeprefix("base_model.model."): p for name, p in named if ".lora_A." in name or ".lora_B." in name}


def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the A and B of `source`; both name them alike, and a name that only one has is an error."""
    values, places = adapters_of(source), adapters_of(target)
    _require_same_names(values, places)
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(values[name])


def _require_same_names(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    only: Iterable[str] = sorted(set(a) ^ set(b))[:4]
    require(set(a) == set(b) and bool(a), f"PEFT and lora_fx adapted different sites, for instance {list(only)}")

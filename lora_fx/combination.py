"""One adapter out of several (PEFT calls this `add_weighted_adapter`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from .attributes import get_attribute, get_parameter
from .combining import Term, combine
from .config import LoraConfig
from .errors import AdapterError
from .graph_module import LoraGraphModule, checked_graph_module, record_of
from .injection import Adapter, check_adapter_name, inject
from .layouts import without_start
from .parameters import find_adapter
from .plan import Plan, PlannedSite
from .switching import active_adapters, check_weight, set_adapters


def combine_adapters(
    gm: fx.GraphModule,
    weights: Mapping[str, float],
    *,
    adapter_name: str,
    combination_type: str = "linear",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> LoraGraphModule:
    """A new graph with one more adapter, the combination of others; `gm` is untouched.

    "linear" is exactly Σ weight · scaling · B @ A (PEFT's is a rough stand-in for that). The new adapter counts when
    `set_adapters` chooses it.

    Args:
        gm: an injected graph.
        weights: {adapter: weight}.
        adapter_name: of the new one.
        combination_type: "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
            "dare_ties_svd", "magnitude_prune" or "magnitude_prune_svd", as in PEFT.
        svd_rank: the most that the new adapter's rank may be, for "linear" and the svd types. None: no loss for
            "linear", the highest rank of the others for the rest.
        density: the share of values that ties, dare and magnitude_prune keep, in (0, 1].
        majority_sign_method: how ties elects a sign: "total" by the sum of values, "frequency" by their number.

    Raises:
        AdapterError: if an adapter is not there, or trains tensors in full (modules_to_save, bias).
        ConfigError: if the type or its options cannot be followed.
    """
    gm = checked_graph_module(gm)
    check_adapter_name(adapter_name)
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(f"weights={weights!r} must map adapter names to weights")
    chosen = {name: find_adapter(gm, name) for name in weights}
    for name, adapter in chosen.items():
        check_weight(name, weights[name])
        if adapter.tokens:
            raise AdapterError(
                f"adapter {name!r} trains rows of {next(iter(adapter.tokens))!r} as they are, "
                "which are no A and B to combine; set_adapters(gm, {...}) lets several adapters count"
            )
        if adapter.trained:
            raise AdapterError(
                f"adapter {name!r} trains {adapter.trained[0]!r} in full, which cannot be combined with other values"
            )
    planned = {target.site.path: target for adapter in chosen.values() for target in adapter.plan.targets}
    values: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    targets: list[PlannedSite] = []
    for path, target in planned.items():
        up, down = combine(
            [term for name, adapter in chosen.items() for term in _terms(gm, adapter, path, weights[name])],
            combination_type,
            rank=svd_rank,
            density=density,
            majority_sign_method=majority_sign_method,
        )
        r = target.site.layout.rank(up.shape[-1])
        values[path] = target.site.layout.join(up, down)
        owners = {t.shares_with for adapter in chosen.values() for t in adapter.plan.targets if t.site.path == path}
        owner = owners.pop() if len(owners) == 1 else None  # one weight, one adapter: if all of them have it so
        targets.append(replace(target, r=r, lora_alpha=r, scaling=1.0, shares_with=owner))
    before = active_adapters(gm)
    plan = Plan(_config(targets), tuple(targets), ())
    result = inject(gm, plan, adapter_name=adapter_name)
    with torch.no_grad():
        for path, site in record_of(result).adapters[adapter_name].sites.items():
            for attribute, value in zip((site.lora_a, site.lora_b), values[path], strict=True):
                get_parameter(result, attribute).copy_(value)
    return set_adapters(result, before)


def _terms(gm: fx.GraphModule, adapter: Adapter, path: str, weight: float) -> list[Term]:
    site = adapter.sites.get(path)
    if site is None:
        return []
    if site.magnitude is not None or site.lora_bias is not None:
        option = "lora_bias" if site.magnitude is None else "use_dora"
        raise AdapterError(
            f"adapter {adapter.name!r} was made with {option}, so its effect is more than B @ A, which is all that "
            "combine_adapters combines; set_adapters(gm, {...}) lets several count, each with its weight"
        )
    if reason := site.layout.why_no_weight():
        raise AdapterError(f"{path!r} of adapter {adapter.name!r} cannot be combined: {reason}")
    a, b = get_parameter(gm, site.lora_a).detach(), get_parameter(gm, site.lora_b).detach()
    if site.start_a is not None and site.start_b is not None:
        a, b = without_start(a, b, get_attribute(gm, site.start_a), get_attribute(gm, site.start_b))
    up, down = site.layout.split(a, b)
    return [Term(up, down, weight * site.scaling, site.scaling)]


def _config(targets: list[PlannedSite]) -> LoraConfig:
    """A configuration that means these sites with these ranks, each with scaling 1."""
    names = {t.site.weight if t.by_parameter else t.site.path: t.r for t in targets}
    r = max(names.values())
    own = {f"^{re.escape(name)}": rank for name, rank in names.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=[t.site.path for t in targets if not t.by_parameter],
        target_parameters=[t.site.weight for t in targets if t.by_parameter],
        rank_pattern=own,
        alpha_pattern=own,
    )

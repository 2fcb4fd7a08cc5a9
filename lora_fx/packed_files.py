"""Parts of packed projections in PEFT's files, which know whole weights only.

The adapters of q, k and v of one weight are written as the one of the whole that computes the same: A of all of them
stacked, B a block for each. What is what stands in the file's metadata, so that the parts are there again when lora_fx
reads it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .adapter_files import KEY_OF_BIAS, KEY_OF_MAGNITUDE, KEYS
from .config import LoraConfig, scaling_of
from .errors import AdapterError
from .layouts import Matrix, Part
from .matching import matching_key
from .packed_notes import METADATA, parsed_parts
from .plan import Plan, PlannedSite

_A, _B = KEYS


@dataclass(frozen=True)
class Stacked:
    """An adapter's tensors with whole weights only.

    Attributes:
        tensors: by key, without PEFT's prefix.
        metadata: what says where the parts are.
        rank_pattern, alpha_pattern: of the whole weights.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def stack(plan: Plan, tensors: Mapping[str, torch.Tensor], norms: Mapping[str, torch.Tensor]) -> Stacked:
    """The tensors of a plan with parts, as PEFT can read them.

    Args:
        plan: what they were made from.
        tensors: {key without prefix: tensor}; those of parts under the parts' paths.
        norms: {path of a whole weight: norm of each output}, for the outputs that no part of a DoRA adapter has.
    """
    result = dict(tensors)
    groups: dict[str, list[PlannedSite]] = {}
    for target in plan.targets:
        if target.site.part:
            groups.setdefault(target.site.whole_path, []).append(target)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    described: dict[str, list[dict[str, Any]]] = {}
    for whole, targets in groups.items():
        own = [_tensors_of(result, target) for target in targets]
        r = sum(len(each[_A]) for each in own)
        scaling = targets[0].scaling
        blocks, biases, magnitude = [], [], norms.get(whole)
        for target, each in zip(targets, own, strict=True):
            layout = target.site.layout
            assert isinstance(layout, Part)
            ratio = target.scaling / scaling
            _, b = layout.widened(each[_A], each[_B])
            blocks.append(b if ratio == 1 else b * ratio)
            if math.frexp(ratio)[0] != 0.5:  # no power of two: B would not be had back bit for bit
                result[f"{target.site.path}.{_B}"] = each[_B]
            if KEY_OF_BIAS in each:
                biases.append(layout.among_outputs(each[KEY_OF_BIAS], 0.0) * ratio)
                result[f"{target.site.path}.{KEY_OF_BIAS}"] = each[KEY_OF_BIAS]
            if KEY_OF_MAGNITUDE in each:
                assert magnitude is not None
                magnitude = magnitude.to(each[KEY_OF_MAGNITUDE].dtype).clone()
                magnitude[layout.start : layout.stop] = each[KEY_OF_MAGNITUDE]
        result[f"{whole}.{_A}"] = torch.cat([each[_A] for each in own])
        result[f"{whole}.{_B}"] = torch.cat(blocks, dim=1)
        if biases:
            result[f"{whole}.{KEY_OF_BIAS}"] = sum(biases, start=torch.zeros_like(biases[0]))
        if magnitude is not None and KEY_OF_MAGNITUDE in own[0]:
            result[f"{whole}.{KEY_OF_MAGNITUDE}"] = magnitude
        name = f"^{re.escape(whole)}"
        ranks[name], alphas[name] = r, scaling * (math.sqrt(r) if plan.config.use_rslora else r)
        described[whole] = [
            _description(target, len(each[_A]), plan) for target, each in zip(targets, own, strict=True)
        ]
    return Stacked(result, {METADATA: json.dumps(described)} if described else {}, ranks, alphas)


def _tensors_of(tensors: dict[str, torch.Tensor], target: PlannedSite) -> dict[str, torch.Tensor]:
    """Take the tensors of one part out, by the ends of their keys."""
    ends = (_A, _B, KEY_OF_BIAS, KEY_OF_MAGNITUDE)
    keys = {end: f"{target.site.path}.{end}" for end in ends}
    return {end: tensors.pop(key) for end, key in keys.items() if key in tensors}


def _description(target: PlannedSite, r: int, plan: Plan) -> dict[str, Any]:
    layout = target.site.layout
    assert isinstance(layout, Part)
    alpha = target.lora_alpha
    if r != target.r:  # a start was put into A and B
        alpha *= math.sqrt(r / target.r) if plan.config.use_rslora else r / target.r
    return {"part": target.site.part, "start": layout.start, "stop": layout.stop, "r": r, "lora_alpha": alpha}


def without_parts(config: LoraConfig, plan: Plan) -> dict[str, dict[str, Any]]:
    """rank_pattern and alpha_pattern without the keys that mean parts only, which mean nothing to PEFT."""
    wholes = [target.site.path for target in plan.targets if not target.site.part]
    return {
        field: {key: value for key, value in pattern.items() if "[" not in key or matching_key(wholes, {key: value})}
        for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
    }


def unstack(
    plan: Plan, tensors: dict[str, torch.Tensor], described: str | None, own: Mapping[str, torch.Tensor]
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """The plan and tensors with the parts that a file's metadata describes.

    Args:
        plan: of whole weights.
        tensors: {key: tensor} of these.
        described: the metadata; None for a file without parts.
        own: what the file holds under the parts' own keys.

    Raises:
        AdapterError: if the description does not fit.
    """
    if described is None:
        return plan, tensors
    parts = parsed_parts(described)
    known = {target.site.path for target in plan.targets}
    if missing := sorted(set(parts) - known):
        raise AdapterError(
            f"the file's metadata describes parts of {missing[0]!r}, which its configuration does not adapt"
        )
    targets: list[PlannedSite] = []
    result = dict(tensors)
    for target in plan.targets:
        if target.site.path not in parts:
            targets.append(target)
            continue
        whole, entries = target.site.layout, parts[target.site.path]
        if (
            not isinstance(whole, Matrix)
            or sum(entry["r"] for entry in entries) != target.r
            or not all(0 <= e["start"] < e["stop"] <= target.site.out_features for e in entries)
        ):
            raise AdapterError(f"the parts of {target.site.path!r} in the file's metadata do not fit its tensors")
        planned = [_planned_part(target, whole, entry, plan.config) for entry in entries]
        _take_apart(target.site.path, planned, result, own)
        targets.extend(planned)
    return replace(plan, targets=tuple(targets)), result


def take_apart(plan: Plan, tensors: dict[str, torch.Tensor], ranks: Mapping[str, int]) -> None:
    """Replace the tensors of whole weights, in place, by those of the parts that the plan has.

    Args:
        plan: with parts.
        tensors: {key: tensor} of a file; a whole weight that is not in it is passed over.
        ranks: {path of a part: rows of A that are its}.

    Raises:
        AdapterError: if a whole has another rank than its parts together.
    """
    groups: dict[str, list[PlannedSite]] = {}
    for target in plan.targets:
        if target.site.part:
            groups.setdefault(target.site.whole_path, []).append(target)
    for whole, targets in groups.items():
        if f"{whole}.{_A}" not in tensors:
            continue
        own = {
            key: tensors.pop(key)
            for t in targets
            for end in (_B, KEY_OF_BIAS)
            if (key := f"{t.site.path}.{end}") in tensors
        }
        planned = [replace(target, r=ranks[target.site.path]) for target in targets]
        if len(tensors[f"{whole}.{_A}"]) != sum(target.r for target in planned):
            raise AdapterError(
                f"the adapter of {whole!r} has rank {len(tensors[f'{whole}.{_A}'])}, and its parts here have "
                f"{sum(target.r for target in planned)} together"
            )
        _take_apart(whole, planned, tensors, own)


def _take_apart(
    whole: str, parts: list[PlannedSite], tensors: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> None:
    """Replace the tensors of one whole weight by those of its parts; `own` are those that the file has as they are."""
    a, b = (tensors.pop(f"{whole}.{end}") for end in KEYS)
    others = {end: tensors.pop(f"{whole}.{end}", None) for end in (KEY_OF_BIAS, KEY_OF_MAGNITUDE)}
    first = 0
    for part in parts:
        layout, path = part.site.layout, part.site.path
        assert isinstance(layout, Part)
        rows, columns = slice(layout.start, layout.stop), slice(first, first + part.r)
        first += part.r
        ratio = part.scaling / parts[0].scaling
        tensors[f"{path}.{_A}"] = a[columns].clone()
        tensors[f"{path}.{_B}"] = own.get(f"{path}.{_B}", b[rows, columns] / ratio).clone()
        for end, tensor in others.items():
            if tensor is not None:
                value = tensor[rows] / ratio if end == KEY_OF_BIAS else tensor[rows]
                tensors[f"{path}.{end}"] = own.get(f"{path}.{end}", value).clone()


def _planned_part(target: PlannedSite, whole: Matrix, entry: dict[str, Any], config: LoraConfig) -> PlannedSite:
    site = replace(
        target.site,
        path=target.site.path + entry["part"],
        part=entry["part"],
        parts=(),
        attention=None,
        layout=Part(whole, entry["start"], entry["stop"]),
    )
    scaling = scaling_of(entry["lora_alpha"], entry["r"], use_rslora=config.use_rslora)
    return PlannedSite(site, entry["r"], entry["lora_alpha"], scaling, shares_with=None)

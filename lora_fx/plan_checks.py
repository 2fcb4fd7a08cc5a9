"""What a configuration asks for must have happened: the checks of a plan, and its warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from .applications import Reading, Refusal
from .attributes import get_attribute
from .config import ALL_LINEAR, LoraConfig
from .errors import TargetError, closest, closest_ending, warn
from .matching import layer_index, matches_names, matches_target, matching_key
from .sites import Site, Sites
from .tables import counted, some_of
from .targeting import pattern_names

if TYPE_CHECKING:
    from .plan import Skipped


def check_refused(config: LoraConfig, targets: tuple[str, ...] | str, refusals: list[Refusal]) -> None:
    """Raise TargetError for targets that cannot be adapted; all-linear passes them over with a warning."""
    if targets == ALL_LINEAR:
        for refusal in (refusal for refusal in refusals if refusal.is_linear):
            if not (config.exclude_modules and matches_names(refusal.path, config.exclude_modules)):
                warn(f"all-linear leaves out {refusal.path!r}: {refusal.reason}")
        return
    for refusal in refusals:
        excluded = config.exclude_modules and matches_names(refusal.path, config.exclude_modules)
        if matches_target(refusal.path, targets) and not excluded:
            raise TargetError(
                f"target_modules means {refusal.path!r}, which cannot be adapted: {refusal.reason}. "
                f"Leave it out with exclude_modules=[{refusal.path!r}]"
            )


def check_not_linear(
    gm: fx.GraphModule,
    config: LoraConfig,
    targets: tuple[str, ...] | str,
    reading: Reading,
    known: Sequence[Site | Refusal],
    saved: list[str],
    modules: list[str],
) -> None:
    """Targets that are modules with a weight and no linear are refused by name, as long as none is adapted."""
    if targets == ALL_LINEAR:
        return
    names = {name for each in known for name in (each.names if isinstance(each, Site) else (each.path,))}
    for path in modules:
        weight = get_attribute(gm, f"{path}.weight")
        is_matrix = isinstance(weight, torch.Tensor) and weight.ndim >= 2
        if not is_matrix or path in names or path in saved or not matches_target(path, targets):
            continue
        if config.exclude_modules and matches_names(path, config.exclude_modules):
            continue
        users = sorted({str(node.target) for node in reading.users.get(f"{path}.weight", ())})
        if users:  # a module that the traced call does not reach is passed over
            raise TargetError(
                f"target_modules means {path!r}, whose weight is applied by {', '.join(users)}, which this graph "
                f"keeps shut; lora_fx.trace(model, args) sees into it. Or leave it out with exclude_modules=[{path!r}]"
            )


def check_patterns(
    config: LoraConfig,
    targets: tuple[str, ...] | str,
    sites: Sites,
    chosen: list[Site],
    refusals: list[Refusal],
    modules: list[str],
) -> None:
    """Raise TargetError for a name or pattern that means nothing."""
    names = [name for site in sites for name in site.names]
    if targets != ALL_LINEAR:
        _check_entries("target_modules", targets, names, len(sites))
    _check_entries(
        "target_parameters", tuple(config.target_parameters or ()), [site.weight for site in sites], len(sites)
    )
    if config.exclude_modules:
        known = list(dict.fromkeys([*names, *(refusal.path for refusal in refusals), *modules]))
        entries = config.exclude_modules if isinstance(config.exclude_modules, str) else tuple(config.exclude_modules)
        _check_entries("exclude_modules", entries, known, len(sites))
    for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {matching_key(pattern_names(site, config), pattern) for site in chosen}
        for key in pattern:
            if key not in used:
                raise TargetError(
                    f"{field} {key!r} matched none of the {len(chosen)} sites to adapt (keys are tried in order, "
                    f"and the first match counts).{closest_ending(key, [s.path for s in chosen])} "
                    "Leave it out, or mend it"
                )
    _check_layers(config, targets, names)


def _check_entries(field: str, entries: tuple[str, ...] | str, names: list[str], count: int) -> None:
    for entry in (entries,) if isinstance(entries, str) else entries:
        pattern = entry if isinstance(entries, str) else [entry]
        if any(matches_names(name, pattern) for name in names):
            continue
        near = closest if isinstance(pattern, str) else closest_ending
        how = "as a regular expression on whole names " if isinstance(pattern, str) else ""
        raise TargetError(
            f"{field} {entry!r} matched none of {counted(count, 'site')} {how}".rstrip()
            + f".{near(entry, names)}{_hint(entry, pattern)} find_sites(gm) lists all: {some_of(names)}"
        )


def _hint(entry: str, pattern: str | list[str]) -> str:
    if isinstance(pattern, list) and entry.lower() == ALL_LINEAR:
        return " 'all-linear' is a string of its own: target_modules='all-linear'."
    if isinstance(pattern, list) and any(c in entry for c in "*+?[](){}|^$\\"):
        return " List entries are plain names; give a regular expression as a string, not in a list."
    if isinstance(pattern, str):
        return f" To match by suffix, give a list: [{entry!r}]."
    return ""


def _check_layers(config: LoraConfig, targets: tuple[str, ...] | str, names: list[str]) -> None:
    layers = config.layers_to_transform
    if layers is None:
        return
    wanted = [layers] if isinstance(layers, int) else list(layers)
    matched = [name for name in names if matches_target(name, targets)]
    found = {layer_index(name, config.layers_pattern) for name in matched}
    for index in wanted:
        if index not in found:
            have = sorted(i for i in found if i is not None)
            where = (
                f"numbers found: {have}" if have else "no layer number was found in their names; give layers_pattern"
            )
            raise TargetError(
                f"layers_to_transform {index} is the layer of none of the {len(matched)} sites that "
                f"target_modules means ({where})"
            )


def nothing_chosen(config: LoraConfig, sites: Sites, skipped: list[Skipped], refusals: list[Refusal]) -> TargetError:
    """The error for a configuration that leaves nothing to adapt."""
    if not sites:
        also = f"; {refusals[0].path!r} cannot be adapted: {refusals[0].reason}" if refusals else ""
        return TargetError(f"the graph has no parameter that can be adapted{also}")
    by_reason: dict[str, list[str]] = {}
    for skip in skipped:
        by_reason.setdefault(skip.reason, []).append(skip.path or "(root)")
    reasons = "; ".join(f"{some_of(paths, 4)}: {reason}" for reason, paths in by_reason.items())
    return TargetError(
        f"target_modules={config.target_modules!r} leaves no site to adapt out of {len(sites)} ({reasons}). "
        "find_sites(gm) lists all; name the ones to adapt"
    )


def warn_of(config: LoraConfig, chosen: list[Site]) -> None:
    """Warn of what has no effect."""
    for site in chosen:
        if not site.gets_gradient:
            warn(f"{site.path!r} runs under torch.no_grad: its adapter counts, but no gradient will reach it")
    undropped = [site.path for site in chosen if not site.takes_dropout]
    if config.lora_dropout and undropped:
        warn(
            f"lora_dropout={config.lora_dropout} drops elements of what a site takes, and does nothing at "
            f"{some_of(map(repr, undropped))}: indices and weights are not dropped"
        )
    if config.fan_in_fan_out and not any(site.fan_in_fan_out for site in chosen):
        warn(
            "fan_in_fan_out=True, but the graph shows that the targeted weights are stored (out, in); the graph counts"
        )

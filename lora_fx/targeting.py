"""Which sites a configuration means, and why it does not mean the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .config import ALL_LINEAR, LoraConfig
from .errors import TargetError
from .layouts import Matrix, Part
from .matching import layer_index, matches_names, matches_suffix, matches_target
from .packed import resolve_part, split_name
from .sites import Site, Sites
from .tables import counted, some_of


def target_names(config: LoraConfig, sites: Sites) -> tuple[str, ...] | str:
    """What target_modules says: names, or one expression."""
    if config.target_modules is None and config.target_parameters:
        return ()
    if config.target_modules is not None:
        return config.target_modules if isinstance(config.target_modules, str) else tuple(config.target_modules)
    raise TargetError(
        "target_modules is not given; name the modules to adapt, for instance target_modules='all-linear'. "
        f"The graph has {counted(len(sites), 'site')}: {some_of(site.path for site in sites)}"
    )


def with_parts(sites: Sites, config: LoraConfig) -> Sites:
    """The sites, and behind each its parts that target_modules names, such as `c_attn[q]`."""
    entries = () if config.target_modules is None or isinstance(config.target_modules, str) else config.target_modules
    names = {name for site in sites for name in site.names}
    wanted = [split_name(entry) for entry in entries if not any(matches_suffix(name, entry) for name in names)]
    found: list[Site] = []
    for site in sites:
        found.append(site)
        own = [name for name in site.names if name != site.attention or site.weight.endswith("in_proj_weight")]
        parts = [part for base, part in wanted if part and any(matches_suffix(name, base) for name in own)]
        found.extend(_part_of(site, part) for part in dict.fromkeys(parts))
    return Sites(found)


def _part_of(site: Site, part: str) -> Site:
    if not isinstance(site.layout, Matrix) or site.is_on_weight or site.is_lookup:
        raise TargetError(
            f"target_modules names {site.path + part!r}, a part of outputs, and {site.path!r} is {site.op}, whose "
            f"outputs are not told apart; name it as a whole: {site.path!r}"
        )
    rows = resolve_part(part, site.parts, site.out_features)
    if isinstance(rows, str):
        raise TargetError(f"target_modules names {site.path + part!r}, which is no part of it: {rows}")
    return replace(
        site,
        path=site.path + part,
        aliases=tuple(alias + part for alias in site.aliases),
        attention=None if site.attention is None else site.attention + part,
        layout=Part(site.layout, *rows),
        part=part,
        parts=(),
    )


def check_disjoint(chosen: list[Site]) -> None:
    """No output of a weight is adapted twice by one adapter."""
    taken: dict[str, list[Site]] = {}
    for site in chosen:
        for other in taken.setdefault(site.whole_path, []):
            (start, stop), (from_, to) = _outputs(site), _outputs(other)
            if start < to and from_ < stop:
                raise TargetError(
                    f"target_modules means {other.path!r} and {site.path!r}, which share the outputs "
                    f"{max(start, from_)} to {min(stop, to) - 1} of one weight; leave one of them out"
                )
        taken[site.whole_path].append(site)


def _outputs(site: Site) -> tuple[int, int]:
    return (site.layout.start, site.layout.stop) if isinstance(site.layout, Part) else (0, site.out_features)


def reason_to_skip(site: Site, config: LoraConfig, targets: tuple[str, ...] | str, saved: list[str]) -> str | None:
    """Why a site gets no adapter, or None."""
    names = dict.fromkeys((*site.names, *(name.removesuffix(site.part) for name in site.names)))
    if config.exclude_modules and any(matches_names(name, config.exclude_modules) for name in names):
        return "excluded by exclude_modules"
    if any(name == m or name.startswith(f"{m}.") for name in names for m in saved):
        return "trained in full by modules_to_save"
    if targets == ALL_LINEAR and not is_parameter_target(site, config):
        if not site.is_linear:
            return "no linear, and all-linear means no other"
        if site.is_output_head:
            return "output head, which all-linear leaves out"
        return None if site.gets_gradient else "runs under torch.no_grad, so no gradient would reach it"
    if is_parameter_target(site, config):
        return None
    if not _any(site, lambda name: matches_target(name, targets)):
        return "not in target_modules"
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if not _any(site, lambda name: matches_target(name, targets, layers, pattern)):
        index = layer_index(site.path, pattern)
        return "no layer number in its name" if index is None else f"layer {index} is not in layers_to_transform"
    return None


def is_parameter_target(site: Site, config: LoraConfig) -> bool:
    """Whether target_parameters means the site's weight."""
    return any(matches_suffix(site.weight, entry) for entry in config.target_parameters or ())


def _any(site: Site, predicate: Callable[[str], bool]) -> bool:
    return any(predicate(name) for name in site.names)


def pattern_names(site: Site, config: LoraConfig) -> tuple[str, ...]:
    """The names that the keys of rank_pattern and alpha_pattern are matched with."""
    if is_parameter_target(site, config):
        return (site.weight,)
    return (site.path,) if site.attention is None else (site.path, site.attention)

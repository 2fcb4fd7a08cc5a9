"""The plan: which site gets which adapter, and why each other site gets none. Printing it is the dry run."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from .aliasing import overlapping_names, view_of
from .applications import Reading, Refusal, read_applications
from .attributes import get_attribute, get_parameter
from .config import ALL_LINEAR, LoraConfig, scaling_of
from .dora import why_no_magnitude
from .errors import TargetError, closest, warn
from .graph_module import checked_graph_module, record_of
from .layouts import Matrix, Part, as_stored
from .matching import layer_index, matches_names, matches_suffix, matches_target, matching_key
from .packed import resolve_part, split_name
from .sites import Site, Sites, sites_of
from .tables import counted, format_table


@dataclass(frozen=True)
class PlannedSite:
    """One site that gets an adapter.

    Attributes:
        site: where.
        r, lora_alpha, scaling: after rank_pattern and alpha_pattern; scaling multiplies B @ A.
        shares_with: path of the planned site whose A and B serve this one too, because both apply the
            same tied weight; None for a site with its own.
        by_parameter: target_parameters means it, rather than target_modules.
    """

    site: Site
    r: int
    lora_alpha: float
    scaling: float
    shares_with: str | None = None
    by_parameter: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers A and B add."""
        layout = self.site.layout
        return 0 if self.shares_with else math.prod(layout.a_shape(self.r)) + math.prod(layout.b_shape(self.r))


@dataclass(frozen=True)
class PlannedRows:
    """Rows of an embedding that are trained as they are (trainable_token_indices).

    Attributes:
        site: the embedding's.
        rows: which, in the order of the file.
        readers: paths of all sites that apply its weight, which all get the trained rows.
    """

    site: Site
    rows: tuple[int, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """One site that gets none, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What `inject` will do.

    Attributes:
        config: the configuration it was made from.
        targets: the sites that get an adapter, in the order of the graph.
        skipped: every other site, and the linears that cannot be adapted, with the reason.
        trained: full names of the base parameters and buffers that are trained and saved as they are:
            those of modules_to_save, and biases with bias="all" or "lora_only".
        tokens: the embeddings of which some rows are trained as they are.
    """

    config: LoraConfig
    targets: tuple[PlannedSite, ...]
    skipped: tuple[Skipped, ...]
    trained: tuple[str, ...] = ()
    tokens: tuple[PlannedRows, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers the adapters add."""
        return sum(target.parameters for target in self.targets)

    def __str__(self) -> str:
        rows = [_target_row(target) for target in self.targets]
        header = ("site", "op", "in → out", "r", "scaling", "parameters", "remarks")
        text = f"{counted(len(rows), 'site')} to adapt, {counted(self.parameters, 'parameter')}"
        text += f"\n\n{format_table(header, rows)}"
        if self.trained:
            text += f"\n\n{counted(len(self.trained), 'tensor')} of the base trained in full: {', '.join(self.trained)}"
        for planned in self.tokens:
            text += f"\n\n{counted(len(planned.rows), 'row')} of {planned.site.path} trained in full"
        if self.skipped:
            table = format_table(("not adapted", "why"), [(s.path or "(root)", s.reason) for s in self.skipped])
            text += f"\n\n{table}"
        return text


def make_plan(gm: fx.GraphModule, config: object) -> Plan:
    """The dry run of `inject(gm, config)`.

    Args:
        gm: a graph module, see `find_sites`.
        config: a `LoraConfig`, a `peft.LoraConfig`, or a mapping of its fields.

    Raises:
        ConfigError: if the configuration is not one.
        TargetError: if any pattern of it means nothing in `gm`, or something that cannot be adapted.
        GraphError: if `gm` is no graph that can be read.
    """
    return plan_adapters(checked_graph_module(gm), LoraConfig.from_peft(config))


def plan_adapters(
    gm: fx.GraphModule, config: LoraConfig, *, every_pattern_hits: bool = True, share_tied: bool = True
) -> Plan:
    """`make_plan`, with two choices that loading files needs.

    Args:
        every_pattern_hits: whether a pattern without a site is an error; a file names its sites itself.
        share_tied: one adapter for sites that apply the same tied weight, or one for each.
    """
    reading = read_applications(gm)
    sites = _with_parts(sites_of(gm, reading), config)
    chosen: list[Site] = []
    skipped: list[Skipped] = []
    saved = _saved_modules(gm, config, every_pattern_hits)
    targets = _target_names(config, sites)
    for site in sites:
        reason = _reason_to_skip(site, config, targets, saved)
        if reason is None:
            chosen.append(site)
        else:
            skipped.append(Skipped(site.path, reason))
    refusals = list(dict.fromkeys(reading.refusals))
    if every_pattern_hits:
        _check_refused(config, targets, refusals)
        _check_patterns(config, targets, sites, chosen, refusals, module_paths(gm))
        _check_not_linear(gm, config, targets, reading, [*sites, *refusals], saved)
    tokens = _tokens(gm, config, reading, sites, saved)
    if config.ensure_weight_tying:
        chosen = _with_tied(gm, reading, sites, chosen, saved)
        skipped = [each for each in skipped if each.path not in {site.path for site in chosen}]
    _check_disjoint(chosen)
    if not chosen and not tokens:
        raise _nothing_chosen(config, sites, skipped, refusals)
    skipped.extend(Skipped(refusal.path, f"cannot be adapted: {refusal.reason}") for refusal in refusals)
    planned = [_planned(site, config) for site in chosen]
    if share_tied:
        planned = _shared(gm, reading, planned)
        if config.ensure_weight_tying:
            planned = _tie_turned(planned, _views(gm, reading))
    trained = tuple(dict.fromkeys([*_saved_tensors(gm, saved), *_biases(gm, config, chosen)]))
    _check_trained(gm, trained)
    _warn(config, chosen)
    return Plan(config, tuple(planned), tuple(skipped), trained, tokens)


def _target_names(config: LoraConfig, sites: Sites) -> tuple[str, ...] | str:
    if config.target_modules is None and config.target_parameters:
        return ()
    if config.target_modules is not None:
        return config.target_modules if isinstance(config.target_modules, str) else tuple(config.target_modules)
    raise TargetError(
        "target_modules is not given; name the modules to adapt, for instance target_modules='all-linear'. "
        f"The graph has {counted(len(sites), 'site')}: {_some(site.path for site in sites)}"
    )


def _with_parts(sites: Sites, config: LoraConfig) -> Sites:
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


def _check_disjoint(chosen: list[Site]) -> None:
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


def _reason_to_skip(site: Site, config: LoraConfig, targets: tuple[str, ...] | str, saved: list[str]) -> str | None:
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


def _planned(site: Site, config: LoraConfig) -> PlannedSite:
    by_parameter = is_parameter_target(site, config)
    names = _pattern_names(site, config)
    if by_parameter:
        site = replace(site, op="parameter", layout=as_stored(site.layout))
    rank_key = matching_key(names, config.rank_pattern)
    alpha_key = matching_key(names, config.alpha_pattern)
    r = config.r if rank_key is None else config.rank_pattern[rank_key]
    alpha = config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]
    if reason := site.layout.why_not_rank(r):
        raise TargetError(
            f"{site.path!r} cannot be adapted with this rank: {reason}. rank_pattern can give it a rank of its own"
        )
    if reason := _why_no_variant(site, config):
        raise TargetError(f"{site.path!r} cannot be adapted: {reason}. Leave it out with exclude_modules")
    return PlannedSite(site, r, alpha, scaling_of(alpha, r, use_rslora=config.use_rslora), by_parameter=by_parameter)


def scaling_at(site: Site, config: LoraConfig) -> float:
    """What multiplies B @ A at a site by that configuration."""
    return _planned(site, config).scaling


def _pattern_names(site: Site, config: LoraConfig) -> tuple[str, ...]:
    """The names that the keys of rank_pattern and alpha_pattern are matched with."""
    if is_parameter_target(site, config):
        return (site.weight,)
    return (site.path,) if site.attention is None else (site.path, site.attention)


def _why_no_variant(site: Site, config: LoraConfig) -> str | None:
    """Why use_dora or lora_bias cannot be had at the site, or None."""
    if config.use_dora:
        return why_no_magnitude(site.layout)
    if config.lora_bias and (site.is_lookup or site.is_on_weight or site.layout.count > 1):
        return f"lora_bias is added to what a linear or a convolution gives, and this is {site.op}"
    return None


def _shared(gm: fx.GraphModule, reading: Reading, planned: list[PlannedSite]) -> list[PlannedSite]:
    """One weight has one adapter: of several sites on it, the first owns A and B."""
    views = _views(gm, reading)
    owners: dict[Hashable, list[PlannedSite]] = {}
    result: list[PlannedSite] = []
    for target in planned:
        on_weight = owners.setdefault(views[target.site.whole_path], [])
        owner = next((owner for owner in on_weight if _adapts_alike(owner, target)), None)
        if owner is None:
            on_weight.append(target)
        result.append(target if owner is None else replace(target, shares_with=owner.site.path))
    return result


def _views(gm: fx.GraphModule, reading: Reading) -> dict[str, Hashable]:
    """{site: the tensor that it applies, as a value}."""
    attributes = {application.path: application.attribute for application in reading.applications}
    return {path: view_of(get_parameter(gm, attribute)) for path, attribute in attributes.items()}


def _adapts_alike(a: PlannedSite, b: PlannedSite) -> bool:
    return (a.r, a.lora_alpha, a.site.layout) == (b.r, b.lora_alpha, b.site.layout)


def _with_tied(gm: fx.GraphModule, reading: Reading, sites: Sites, chosen: list[Site], saved: list[str]) -> list[Site]:
    """With ensure_weight_tying: the chosen sites, and all others that apply one of their weights."""
    views = _views(gm, reading)
    wanted = {views[site.whole_path] for site in chosen if not site.part}
    paths = {site.path for site in chosen}
    found = [site for site in sites if site.path in paths or (not site.part and views[site.path] in wanted)]
    for site in found:
        if any(site.path == module or site.path.startswith(f"{module}.") for module in saved):
            raise TargetError(
                f"ensure_weight_tying adapts {site.path!r} with what it is tied to, and modules_to_save trains it in "
                "full; leave it out of one of the two"
            )
    return found


def _tie_turned(planned: list[PlannedSite], views: dict[str, Hashable]) -> list[PlannedSite]:
    """With ensure_weight_tying, an embedding and the head that applies its table the other way round share A and B."""
    owners: dict[Hashable, PlannedSite] = {}
    result = []
    for target in planned:
        owner = owners.setdefault(views[target.site.whole_path], target)
        turned = owner.site.layout.turned()
        if target.shares_with is None and owner is not target and target.site.layout == turned:
            if (owner.r, owner.lora_alpha) != (target.r, target.lora_alpha):
                raise TargetError(
                    f"ensure_weight_tying gives {owner.site.path!r} and {target.site.path!r} one adapter, and "
                    "rank_pattern or alpha_pattern gives them two ranks or alphas; make them equal"
                )
            target = replace(target, shares_with=owner.site.path)
        result.append(target)
    return result


def _tokens(
    gm: fx.GraphModule, config: LoraConfig, reading: Reading, sites: Sites, saved: list[str]
) -> tuple[PlannedRows, ...]:
    """The embeddings that trainable_token_indices means, and who else applies their weights."""
    if config.trainable_token_indices is None:
        return ()
    lookups = [site for site in sites if site.is_lookup]
    paths = [path for site in lookups for path in (site.path, *site.aliases)]
    wanted = config.trainable_token_indices
    named = wanted if isinstance(wanted, Mapping) else {_input_embedding(reading, lookups): wanted}
    views, planned = _views(gm, reading), []
    for name, rows in named.items():
        found = [site for site in lookups if any(matches_suffix(path, name) for path in site.names)]
        if not found:
            raise TargetError(f"trainable_token_indices names {name!r}, which is no embedding.{closest(name, paths)}")
        for site in found:
            if site.path in saved:
                raise TargetError(
                    f"modules_to_save trains {site.path!r} in full, rows of trainable_token_indices among "
                    "them; leave it out of one of the two"
                )
            if max(rows) >= site.in_features:
                raise TargetError(
                    f"trainable_token_indices holds {max(rows)}, and {site.path!r} has {site.in_features} rows; resize "
                    "the embedding before tracing"
                )
            readers = tuple(path for path, view in views.items() if view == views[site.path])
            planned.append(PlannedRows(site, tuple(rows), readers))
    return tuple(planned)


def _input_embedding(reading: Reading, lookups: list[Site]) -> str:
    """The embedding that a list of rows means: PEFT's `embed_tokens`, the only one, or what looks up input_ids."""
    by_name = [site.path for site in lookups if site.path.rpartition(".")[2] == "embed_tokens"]
    inputs = ("input_ids", "decoder_input_ids")
    of_input = dict.fromkeys(
        a.path
        for a in reading.applications
        if a.use.family.takes_indices and a.use.x.op == "placeholder" and a.use.x.name in inputs
    )
    for found in (by_name, [site.path for site in lookups], list(of_input)):
        if len(found) == 1:
            return found[0]
    raise TargetError(
        "trainable_token_indices is a list of rows, and which embedding it means is not clear; name it: "
        f"{{name: rows}}. There are {_some(site.path for site in lookups)}"
    )


# Everything that is trained as it is --------------------------------------------------------------


def _saved_modules(gm: fx.GraphModule, config: LoraConfig, every_pattern_hits: bool) -> list[str]:
    """Paths of the modules that modules_to_save means: exact or dotted suffix."""
    paths = module_paths(gm)
    saved: list[str] = []
    # In a file of PEFT's, an entry means every module whose name ends with it, dotted or not.
    means = matches_suffix if every_pattern_hits else str.endswith
    heads = [head for head in _TASK_HEADS.get(config.task_type or "", ()) if head in paths]
    for entry in (*(config.modules_to_save or ()), *heads):
        found = [path for path in paths if means(path, entry)]
        if not found and every_pattern_hits:
            raise TargetError(f"modules_to_save {entry!r} names no module with parameters.{closest(entry, paths)}")
        saved.extend(found)
    return saved


# What PEFT's wrappers for these tasks train in full, whether or not modules_to_save says so.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def module_paths(gm: fx.GraphModule) -> list[str]:
    """Names of the base's modules that hold parameters or buffers, themselves or in their parts."""
    paths: dict[str, None] = {}
    named = (*dict(gm.named_parameters(remove_duplicate=False)), *dict(gm.named_buffers()))
    adapters = _names_of_adapters(gm)
    for name in (name for name in named if name not in adapters):
        parts = name.split(".")
        paths |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts)))
    return list(paths)


def _saved_tensors(gm: fx.GraphModule, saved: list[str]) -> Iterator[str]:
    adapters = _names_of_adapters(gm)
    for name in gm.state_dict():  # parameters and buffers, under each of their names
        if name not in adapters and any(name.startswith(f"{module}.") for module in saved):
            yield name


def _names_of_adapters(gm: fx.GraphModule) -> set[str]:
    """A and B of adapters that are there already, which belong to no module of the base."""
    members = (member for adapter in record_of(gm).adapters.values() for member in adapter.members)
    return {name for member in members for name in member.attributes}


def _biases(gm: fx.GraphModule, config: LoraConfig, chosen: list[Site]) -> Iterator[str]:
    if config.bias == "all":
        names = dict(gm.named_parameters(remove_duplicate=False))
        yield from (name for name in names if name == "bias" or name.endswith(".bias"))
    elif config.bias == "lora_only":
        yield from (site.bias for site in chosen if site.bias is not None)


def _check_trained(gm: fx.GraphModule, trained: tuple[str, ...]) -> None:
    """Tied tensors are trained together or not at all."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    names = overlapping_names(parameters)
    for name in trained:
        if name not in parameters:
            continue
        twins = [n for n in names[name] if n not in trained]
        if twins:
            raise TargetError(
                f"{name} is to be trained in full, but is tied with {', '.join(twins)}, which is not. Train both, "
                "or give the module its own tensor before tracing: "
                f"model.{name} = torch.nn.Parameter(model.{name}.detach().clone())"
            )


# What was asked for must have happened ------------------------------------------------------------


def _check_refused(config: LoraConfig, targets: tuple[str, ...] | str, refusals: list[Refusal]) -> None:
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


def _check_not_linear(
    gm: fx.GraphModule,
    config: LoraConfig,
    targets: tuple[str, ...] | str,
    reading: Reading,
    known: Sequence[Site | Refusal],
    saved: list[str],
) -> None:
    """Targets that are modules with a weight and no linear are refused by name, as long as none is adapted."""
    if targets == ALL_LINEAR:
        return
    names = {name for each in known for name in (each.names if isinstance(each, Site) else (each.path,))}
    for path in module_paths(gm):
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


def _check_patterns(
    config: LoraConfig,
    targets: tuple[str, ...] | str,
    sites: Sites,
    chosen: list[Site],
    refusals: list[Refusal],
    modules: list[str],
) -> None:
    names = [name for site in sites for name in site.names]
    if targets != ALL_LINEAR:
        _check_entries("target_modules", targets, names, len(sites))
    _check_entries(
        "target_parameters", tuple(config.target_parameters or ()), [site.weight for site in sites], len(sites)
    )
    if config.exclude_modules:
        known = [*names, *(refusal.path for refusal in refusals), *modules]
        entries = config.exclude_modules if isinstance(config.exclude_modules, str) else tuple(config.exclude_modules)
        _check_entries("exclude_modules", entries, known, len(sites))
    for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {matching_key(_pattern_names(site, config), pattern) for site in chosen}
        for key in pattern:
            if key not in used:
                raise TargetError(
                    f"{field} {key!r} matched none of the {len(chosen)} sites to adapt (keys are tried in order, "
                    f"and the first match counts).{closest(key, [s.path for s in chosen])}"
                )
    _check_layers(config, targets, names)


def _check_entries(field: str, entries: tuple[str, ...] | str, names: list[str], count: int) -> None:
    for entry in (entries,) if isinstance(entries, str) else entries:
        pattern = entry if isinstance(entries, str) else [entry]
        if any(matches_names(name, pattern) for name in names):
            continue
        how = "as a regular expression on whole names " if isinstance(pattern, str) else ""
        raise TargetError(
            f"{field} {entry!r} matched none of {counted(count, 'site')} {how}".rstrip()
            + f".{closest(entry, names)}{_hint(entry, pattern)} find_sites(gm) lists all: {_some(names)}"
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


def _nothing_chosen(config: LoraConfig, sites: Sites, skipped: list[Skipped], refusals: list[Refusal]) -> TargetError:
    if not sites:
        also = f"; {refusals[0].path!r} cannot be adapted: {refusals[0].reason}" if refusals else ""
        return TargetError(f"the graph has no parameter that can be adapted{also}")
    reasons = _some(f"{s.path or '(root)'}: {s.reason}" for s in skipped)
    return TargetError(
        f"target_modules={config.target_modules!r} leaves no site to adapt out of {len(sites)} ({reasons}). "
        "find_sites(gm) lists all; name the ones to adapt"
    )


def _warn(config: LoraConfig, chosen: list[Site]) -> None:
    for site in chosen:
        if not site.gets_gradient:
            warn(f"{site.path!r} runs under torch.no_grad: its adapter counts, but no gradient will reach it")
    undropped = [site.path for site in chosen if not site.takes_dropout]
    if config.lora_dropout and undropped:
        warn(
            f"lora_dropout={config.lora_dropout} drops elements of what a site takes, and does nothing at "
            f"{_some(map(repr, undropped))}: indices and weights are not dropped"
        )
    if config.fan_in_fan_out and not any(site.fan_in_fan_out for site in chosen):
        warn(
            "fan_in_fan_out=True, but the graph shows that the targeted weights are stored (out, in); the graph counts"
        )


def _target_row(target: PlannedSite) -> tuple[str, ...]:
    site = target.site
    remarks = []
    if target.shares_with is not None:
        remarks.append(f"same adapter as {target.shares_with}")
    if site.fan_in_fan_out and site.is_linear:
        remarks.append("stored (in, out)")
    if site.is_on_weight:
        remarks.append("adapted on the weight")
    if site.calls > 1:
        remarks.append(f"called {site.calls} times")
    if site.tied_with:
        remarks.append(f"tied with {', '.join(site.tied_with)}")
    return (
        site.path or "(root)", site.op, site.size, str(target.r), f"{target.scaling:g}", f"{target.parameters:,}",
        "; ".join(remarks),
    )  # fmt: skip


def _some(words: Iterable[str], limit: int = 8) -> str:
    listed = list(words)
    more = f", … ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more

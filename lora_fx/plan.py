"""The plan: which site gets which adapter, and why each other site gets none. Printing it is the dry run."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from .aliasing import view_of
from .applications import Reading, read_applications
from .attributes import get_attribute, get_parameter
from .config import LoraConfig, scaling_of
from .dora import why_no_magnitude
from .errors import TargetError, closest
from .full_training import biases_of, check_trained, module_paths, saved_modules, saved_tensors
from .graph_module import checked_graph_module
from .layouts import as_stored
from .matching import matches_suffix, matching_key
from .plan_checks import check_not_linear, check_patterns, check_refused, nothing_chosen, warn_of
from .plan_sizes import BaseSize, PlanCost, cost_of, low_rank_products_of, size_of_base
from .sites import Site, Sites, sites_of
from .tables import Shown, Table, counted, some_of
from .targeting import check_disjoint, is_parameter_target, pattern_names, reason_to_skip, target_names, with_parts


@dataclass(frozen=True)
class PlannedSite:
    """One site that gets an adapter.

    Attributes:
        site: where.
        r, lora_alpha, scaling: after rank_pattern and alpha_pattern; scaling multiplies B @ A.
        shares_with: path of the planned site whose A and B serve this one too, because both apply the
            same tied weight; None for a site with its own.
        by_parameter: target_parameters means it, rather than target_modules.
        beside: how many numbers use_dora or lora_bias has beside A and B: one for each output.
    """

    site: Site
    r: int
    lora_alpha: float
    scaling: float
    shares_with: str | None = None
    by_parameter: bool = False
    beside: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers the adapter adds here."""
        if self.shares_with:
            return 0
        layout = self.site.layout
        return math.prod(layout.a_shape(self.r)) + math.prod(layout.b_shape(self.r)) + self.beside


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
class Plan(Shown):
    """What `inject` will do.

    Attributes:
        config: the configuration it was made from.
        targets: the sites that get an adapter, in the order of the graph.
        skipped: every other site, and the linears that cannot be adapted, with the reason.
        trained: full names of the base parameters and buffers that are trained and saved as they are:
            those of modules_to_save, and biases with bias="all" or "lora_only".
        tokens: the embeddings of which some rows are trained as they are.
        base: how large the model is.
        trained_parameters: how many numbers `trained` and `tokens` have.
    """

    config: LoraConfig
    targets: tuple[PlannedSite, ...]
    skipped: tuple[Skipped, ...]
    trained: tuple[str, ...] = ()
    tokens: tuple[PlannedRows, ...] = ()
    base: BaseSize = field(default_factory=BaseSize)
    trained_parameters: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers the adapters add."""
        return sum(target.parameters for target in self.targets)

    @property
    def _variant(self) -> str:
        return " with DoRA" if self.config.use_dora else " with lora_bias" if self.config.lora_bias else ""

    def cost(self, *, devices: int = 1, adapter_bytes: int = 4, optimizer_bytes: int = 8) -> PlanCost:
        """What training costs, from shapes alone; the weights may be on the meta device.

        Args:
            devices: among which weights, adapters, gradients and the optimizer's state are shared out.
            adapter_bytes: of each number of the adapters, and of its gradient.
            optimizer_bytes: of the optimizer's state for each number: 8 for AdamW in float32.

        Raises:
            ConfigError: if one of them is not above 0.
        """
        return cost_of(
            self.base,
            self.parameters + self.trained_parameters,
            sum(low_rank_products_of(target.site, target.r) for target in self.targets),
            sum(target.site.calls * target.r for target in self.targets if target.site.takes_dropout),
            devices=devices,
            adapter_bytes=adapter_bytes,
            optimizer_bytes=optimizer_bytes,
        )

    def blocks(self) -> list[str | Table]:
        """What is adapted, what is trained in full, and what is not adapted and why."""
        rows = [_target_row(target) for target in self.targets]
        header = ("site", "op", "in → out", "r", "scaling", "parameters", "remarks")
        blocks: list[str | Table] = [
            f"{counted(len(rows), 'site')} to adapt{self._variant}, {counted(self.parameters, 'parameter')}",
            Table(header, rows),
        ]
        if self.trained:
            blocks.append(
                f"{counted(len(self.trained), 'tensor')} of the base trained in full: {', '.join(self.trained)}"
            )
        for planned in self.tokens:
            blocks.append(f"{counted(len(planned.rows), 'row')} of {planned.site.path} trained in full")
        if self.skipped:
            blocks.append(Table(("not adapted", "why"), [(s.path or "(root)", s.reason) for s in self.skipped]))
        return blocks


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
    gm: fx.GraphModule,
    config: LoraConfig,
    *,
    reading: Reading | None = None,
    every_pattern_hits: bool = True,
    share_tied: bool = True,
) -> Plan:
    """`make_plan`, with what injection has at hand, and two choices that loading files needs.

    Args:
        reading: of `gm`, if it was read already.
        every_pattern_hits: whether a pattern without a site is an error; a file names its sites itself.
        share_tied: one adapter for sites that apply the same tied weight, or one for each.
    """
    reading = reading or read_applications(gm)
    whole_sites = sites_of(gm, reading)
    sites = with_parts(whole_sites, config)
    chosen: list[Site] = []
    skipped: list[Skipped] = []
    saved = saved_modules(gm, config, every_pattern_hits)
    targets = target_names(config, sites)
    for site in sites:
        reason = reason_to_skip(site, config, targets, saved)
        if reason is None:
            chosen.append(site)
        else:
            skipped.append(Skipped(site.path, reason))
    refusals = list(dict.fromkeys(reading.refusals))
    if every_pattern_hits:
        check_refused(config, targets, refusals)
        modules = module_paths(gm)
        check_patterns(config, targets, sites, chosen, refusals, modules)
        check_not_linear(gm, config, targets, reading, [*sites, *refusals], saved, modules)
    tokens = _tokens(gm, config, reading, sites, saved)
    if config.ensure_weight_tying:
        chosen = _with_tied(gm, reading, sites, chosen, saved)
        skipped = [each for each in skipped if each.path not in {site.path for site in chosen}]
    check_disjoint(chosen)
    if not chosen and not tokens:
        raise nothing_chosen(config, sites, skipped, refusals)
    skipped.extend(Skipped(refusal.path, f"cannot be adapted: {refusal.reason}") for refusal in refusals)
    planned = [_planned(site, config) for site in chosen]
    if share_tied:
        planned = _shared(gm, reading, planned)
        if config.ensure_weight_tying:
            planned = _tie_turned(planned, _views(gm, reading))
    trained = tuple(dict.fromkeys([*saved_tensors(gm, saved), *biases_of(gm, config, chosen)]))
    check_trained(gm, trained)
    warn_of(config, chosen)
    base = size_of_base(gm.parameters(), gm.buffers(), whole_sites)
    rows = sum(len(each.rows) * each.site.out_features for each in tokens)
    in_full = rows + sum(tensor.numel() for name in trained if (tensor := get_attribute(gm, name)) is not None)
    return Plan(config, tuple(planned), tuple(skipped), trained, tokens, base, in_full)


def _planned(site: Site, config: LoraConfig) -> PlannedSite:
    by_parameter = is_parameter_target(site, config)
    names = pattern_names(site, config)
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
    scaling = scaling_of(alpha, r, use_rslora=config.use_rslora)
    beside = site.layout.out_features if config.use_dora or config.lora_bias else 0
    return PlannedSite(site, r, alpha, scaling, by_parameter=by_parameter, beside=beside)


def scaling_at(site: Site, config: LoraConfig) -> float:
    """What multiplies B @ A at a site by that configuration."""
    return _planned(site, config).scaling


def _why_no_variant(site: Site, config: LoraConfig) -> str | None:
    """Why use_dora or lora_bias cannot be had at the site, or None."""
    if config.use_dora:
        return why_no_magnitude(site.layout)
    if config.lora_bias and (site.is_lookup or site.is_on_weight or site.layout.count > 1):
        return f"lora_bias is added to what a linear or a convolution gives, and this is {site.op}"
    return None


def _shared(gm: fx.GraphModule, reading: Reading, planned: list[PlannedSite]) -> list[PlannedSite]:
    """One weight has one adapter: of several sites that adapt it alike, the first owns A and B."""
    views = _views(gm, reading)
    owners: dict[Hashable, PlannedSite] = {}
    result: list[PlannedSite] = []
    for target in planned:
        alike = views[target.site.whole_path], target.r, target.lora_alpha, target.site.layout
        owner = owners.setdefault(alike, target)
        result.append(target if owner is target else replace(target, shares_with=owner.site.path))
    return result


def _views(gm: fx.GraphModule, reading: Reading) -> dict[str, Hashable]:
    """{site: the tensor that it applies, as a value}."""
    attributes = {application.path: application.attribute for application in reading.applications}
    return {path: view_of(get_parameter(gm, attribute)) for path, attribute in attributes.items()}


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
            raise TargetError(
                f"trainable_token_indices names {name!r}, which is no embedding.{closest(name, paths)} find_sites(gm) "
                "lists them"
            )
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
        f"{{name: rows}}. There are {some_of(site.path for site in lookups)}"
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

"""The pass that puts LoRA into a graph (PEFT calls this `get_peft_model`)."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from . import optimization
from .adapter_files import KEY_OF_BIAS, KEY_OF_MAGNITUDE, KEY_OF_ROWS, KEYS, KEYS_OF_LOOKUPS
from .applications import Application, Reading, read_applications
from .arena import lay_out
from .attributes import get_attribute, get_parameter, holds_values, set_attribute
from .checks import check_effect
from .config import LoraConfig
from .dora import magnitude_shape, weight_norm
from .errors import AdapterError, ConfigError, GraphError, TargetError
from .graph import finish, insert_low_rank_path, insert_rows
from .graph_module import (
    LoraGraphModule,
    check_editable,
    checked_graph_module,
    copy_sharing_tensors,
    paused_gc,
    record_of,
)
from .initialization import First, computed, initialize, start_of
from .initializers import Context
from .layouts import Layout, as_stored, without_start
from .paths import LowRankPath, RowsPath
from .plan import Plan, PlannedRows, PlannedSite, plan_adapters
from .sites import Site, sites_of

if TYPE_CHECKING:
    from .calibration import Calibration

_HALVES = (torch.float16, torch.bfloat16)
ADAPTER_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class AdapterSite:
    """The attributes of one adapter at one site.

    Attributes:
        path: the site's.
        applied: the path of the site whose ops it stands beside: its own, or that of the whole which it is a part of.
        is_lookup: it is an embedding's, whose A and B have other names in files.
        weight: the base weight's own name; tied weights may be read under another.
        lora_a, lora_b: names of A (r, in) and B (out, r).
        dropout: name of the dropout module, or None.
        scaling: the factor on B @ A.
        layout: how A and B make the weight's delta.
        lora_bias: name of what B adds (out,), scaled as B @ A is; None without.
        magnitude: name of DoRA's m; None without.
        start_a, start_b: names of A and B as they were first, whose product is taken off again; None where it is 0.
        is_turned: A and B are those of a tied site that takes the weight the other way round, and so is the layout.
    """

    path: str
    applied: str
    is_lookup: bool
    weight: str
    lora_a: str
    lora_b: str
    dropout: str | None
    scaling: float
    layout: Layout
    lora_bias: str | None = None
    magnitude: str | None = None
    start_a: str | None = None
    start_b: str | None = None
    is_turned: bool = False

    @property
    def attributes(self) -> tuple[str, ...]:
        """All that the adapter adds to the module here."""
        others = (self.dropout,) if self.is_turned else (self.dropout, self.start_a, self.start_b)
        return (*self.tensors.values(), *(name for name in others if name is not None))

    @property
    def tensors(self) -> dict[str, str]:
        """{end of its key in PEFT's file: its attribute}; none for those that another site has."""
        if self.is_turned:
            return {}
        a, b = KEYS_OF_LOOKUPS if self.is_lookup else KEYS
        names = {a: self.lora_a, b: self.lora_b, KEY_OF_BIAS: self.lora_bias, KEY_OF_MAGNITUDE: self.magnitude}
        return {key: name for key, name in names.items() if name is not None}


@dataclass(frozen=True)
class RowsSite:
    """Rows of one embedding that an adapter trains as they are.

    Attributes:
        path, weight: as of AdapterSite.
        readers: paths of all sites that apply the weight.
        rows: name of the trained rows (k, dim).
        index: name of the buffer (k,) that says which rows they are.
        slots: name of the buffer (vocabulary,) with 1 + the place of each row among them, 0 for all others.
    """

    path: str
    weight: str
    readers: tuple[str, ...]
    rows: str
    index: str
    slots: str

    @property
    def attributes(self) -> tuple[str, ...]:
        """All that the adapter adds to the module here."""
        return self.rows, self.index, self.slots

    @property
    def tensors(self) -> dict[str, str]:
        """{end of its key in PEFT's file: its attribute}."""
        return {KEY_OF_ROWS: self.rows}


@dataclass(frozen=True, eq=False)
class Adapter:
    """One injected adapter.

    Attributes:
        name, plan: what it was made from.
        sites: its attributes, by site path.
        trained: names of the base tensors of which the graph has the adapter's own in place of the base's: those that
            it trains in full, and `rebased`.
        tokens: its rows of embeddings, by site path.
        rebased: those that it holds, frozen, in place of the base's (init_lora_weights="loftq").
        memory: names of its A, B and the like, in the order in which they lie in memory (see arena.py).
        batches: how many batches the batch norms of the base had seen, by the name of their count.
    """

    name: str
    plan: Plan
    sites: dict[str, AdapterSite]
    trained: tuple[str, ...]
    tokens: dict[str, RowsSite] = field(default_factory=dict)
    rebased: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    batches: Mapping[str, int] = field(default_factory=dict)

    @property
    def members(self) -> tuple[AdapterSite | RowsSite, ...]:
        """All places at which it has tensors of its own."""
        return (*self.sites.values(), *self.tokens.values())

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of the base tensors that it trains in full."""
        return tuple(name for name in self.trained if name not in self.rebased)

    @property
    def config(self) -> LoraConfig:
        """The configuration it was made from."""
        return self.plan.config


def inject(
    gm: fx.GraphModule,
    config_or_plan: object,
    *,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
    calibration: Calibration | None = None,
    check: object = False,
    optimize: bool = False,
) -> LoraGraphModule:
    """A new graph module with LoRA beside every target; `gm` and the model it came from are untouched.

    The base is shared and frozen, the adapters are trainable. With B = 0 the result computes what `gm`
    computes, bit for bit. Injecting into the result adds one more adapter; their effects add up.

    Args:
        gm: from `lora_fx.trace`, `torch.fx.symbolic_trace`, or `torch.export.export(...).module()`.
        config_or_plan: a `LoraConfig`, a `peft.LoraConfig`, a mapping of its fields, or a `Plan` of `gm`.
        adapter_name: letters, digits, `_` and `-`; part of the parameters' names.
        adapter_dtype: of A and B. None is PEFT's default: float32 for a 16-bit base, else the base's.
        calibration: from `lora_fx.calibrate`, for init_lora_weights="eva", "corda" and "lora_ga".
        check: see that the adapter has an effect, on the inputs that `trace` remembers (True), or on others; see
            `check_effect`.
        optimize: `lora_fx.optimize` the result, with all that it does by itself.

    Raises:
        ConfigError, TargetError, GraphError: as `make_plan`, and as `check_effect`.
        AdapterError: if the name is taken or cannot be used.
    """
    gm = checked_graph_module(gm)
    _check_new(gm, adapter_name, adapter_dtype)
    given = config_or_plan if isinstance(config_or_plan, Plan) else LoraConfig.from_peft(config_or_plan)
    with _building():
        result = copy_sharing_tensors(gm)
        reading = read_applications(result)  # once: it is planned on the copy, too
        plan = given if isinstance(given, Plan) else plan_adapters(result, given, reading=reading)
        if plan is given:
            _check_plan(result, plan, reading)
        _check_calibration(plan.config, calibration)
        if optimize:
            optimization.set_rewrites(result)
        _add_adapter(result, NewAdapter(adapter_name, plan, adapter_dtype, calibration), reading)
    if check is not False:
        check_effect(result, None if check is True else check, adapter_name=adapter_name)
    return result


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """An adapter to be made.

    Attributes:
        name, plan, dtype, calibration: see `inject`.
        draws: its first values matter; False if others are to be copied over them.
    """

    name: str
    plan: Plan
    dtype: torch.dtype | None = None
    calibration: Calibration | None = None
    draws: bool = True

    def context(self, path: str, dtype: torch.dtype) -> Context:
        """What an initializer is told about one site."""
        statistics = None if self.calibration is None else self.calibration.statistics.get(path)
        return Context(path, calibration=statistics, dtype=dtype)


def inject_new(gm: fx.GraphModule, new: NewAdapter) -> LoraGraphModule:
    """`inject` with a plan of `gm`'s own."""
    _check_new(gm, new.name, new.dtype)
    with _building():
        result = copy_sharing_tensors(gm)
        _add_adapter(result, new, read_applications(result))
    return result


@contextmanager
def _building() -> Iterator[None]:
    """While an adapter is made: what is made under inference mode could never be trained."""
    with paused_gc(), torch.inference_mode(False):
        yield


def _check_new(gm: fx.GraphModule, adapter_name: str, adapter_dtype: torch.dtype | None) -> None:
    check_adapter_name(adapter_name)
    _check_dtype(adapter_dtype)
    check_editable(gm)
    record = record_of(gm)
    if adapter_name in record.adapters:
        raise AdapterError(
            f"the graph already has an adapter {adapter_name!r}; give another adapter_name "
            f"(taken: {', '.join(record.adapters)})"
        )


def _check_calibration(config: LoraConfig, calibration: Calibration | None) -> None:
    start = start_of(config)
    needs = start is not None and start.calibration is not None
    if needs and calibration is None:
        extra = ", loss=..." if start is not None and start.calibration == "gradient" else ""
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} starts from data; give it: "
            f"found = lora_fx.calibrate(gm, config, batches{extra}), then "
            "lora_fx.inject(gm, found.config, calibration=found)"
        )
    if calibration is not None and not needs:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} takes no data; leave calibration out. 'eva', 'corda' and "
            "'lora_ga' take some"
        )


def check_adapter_name(name: object) -> None:
    """Raise AdapterError unless `name` can be a module's and a directory's name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise AdapterError(
            f"adapter_name={name!r} must be 1 to 64 letters, digits, '_' or '-': it names modules and directories"
        )
    if hasattr(nn.Module(), name) or keyword.iskeyword(name):
        raise AdapterError(
            f"adapter_name={name!r} is a word of Python or an attribute of every torch module; choose another name"
        )


def _check_dtype(dtype: object) -> None:
    if dtype not in (None, *ADAPTER_DTYPES):
        raise GraphError(
            f"adapter_dtype={dtype!r} must be a floating point torch.dtype of 16 bits or more, such as torch.bfloat16"
        )


def _check_plan(gm: fx.GraphModule, plan: Plan, reading: Reading) -> None:
    """A plan may come from elsewhere: it must mean this graph."""
    sites = {site.path: site for site in sites_of(gm, reading)}
    for target in plan.targets:
        here = sites.get(target.site.whole_path)
        if here is None:
            raise TargetError(
                f"the plan is of another graph: it has a site {target.site.path!r}, this one has not. "
                "make_plan(gm, config) makes one for it"
            )
        theirs = target.site
        if theirs.layout.whole not in (here.layout, as_stored(here.layout)):
            raise TargetError(
                f"the plan is of another graph: {here.path!r} maps {theirs.in_features} → {theirs.out_features} "
                f"there and {here.in_features} → {here.out_features} here; make_plan(gm, config) makes one for it"
            )
    for rows in plan.tokens:
        if any(path not in sites for path in (rows.site.path, *rows.readers)):
            raise TargetError(
                f"the plan is of another graph: it trains rows of {rows.site.path!r}, which are no table here"
            )
    for name in plan.trained:
        if get_attribute(gm, name) is None:
            raise TargetError(f"the plan is of another graph: it trains {name!r} in full, which this one has not")


def _check_trained_once(gm: fx.GraphModule, plan: Plan) -> None:
    for other in record_of(gm).adapters.values():
        both = sorted(set(other.trained) & set(plan.trained))
        if both:
            raise AdapterError(
                f"adapter {other.name!r} already trains {both[0]!r} in full (modules_to_save or bias), and a "
                "tensor can have one such adapter only; leave it out of the second adapter's configuration, or give "
                "each a graph of its own (exporters.add_adapter_inputs puts saved ones beside one base file)"
            )


def _freeze(gm: LoraGraphModule) -> None:
    record = record_of(gm)
    if record.adapters:
        return
    named = gm.named_parameters(remove_duplicate=False)
    record.requires_grad = {name: parameter.requires_grad for name, parameter in named}
    gm.meta["lora_fx"] = record
    for parameter in gm.parameters():
        parameter.requires_grad_(False)


def _add_adapter(gm: LoraGraphModule, new: NewAdapter, reading: Reading) -> None:
    _check_trained_once(gm, new.plan)
    _freeze(gm)
    by_path = reading.by_path()
    sites: dict[str, AdapterSite] = {}
    known = set(record_of(gm).originals)
    for target in new.plan.targets:
        owner = None if target.shares_with is None else sites[target.shares_with]
        sites[target.site.path] = _add_parameters(gm, by_path[target.site.whole_path][0], target, new, owner)
    memory = _memory_order(gm, by_path, sites.values())
    lay_out(get_parameter(gm, name) for name in memory)
    tokens = {rows.site.path: _add_rows(gm, by_path[rows.site.path][0], rows, new) for rows in new.plan.tokens}
    record = record_of(gm)
    rebased = tuple(name for name in record.originals if name not in known)
    trained = (*_train_in_full(gm, new.plan.trained), *rebased)
    adapter = Adapter(new.name, new.plan, sites, trained, tokens, rebased, memory, batches_seen(gm))
    record.adapters[new.name] = adapter
    record.active[new.name] = 1.0
    record.reinsert = _insert_all
    _insert(gm, adapter, by_path)
    finish(gm)


def batches_seen(gm: fx.GraphModule) -> dict[str, int]:
    """What each batch norm has counted, by the name of its count: it grows as training moves the statistics."""
    counts = ((name, b) for name, b in gm.named_buffers() if name.rpartition(".")[2] == "num_batches_tracked")
    return {name: int(count) for name, count in counts if holds_values(count)}


def _memory_order(
    gm: LoraGraphModule, by_path: dict[str, list[Application]], sites: Iterable[AdapterSite]
) -> tuple[str, ...]:
    """The adapter's own tensors as they are to lie: of linears that read one value, all A, then all B; then others."""
    together: dict[tuple[fx.Node, torch.dtype, torch.device], list[AdapterSite]] = {}
    names: dict[str, None] = {}
    sites = list(sites)
    for site in sites:
        application = by_path[site.applied][-1]
        if application.use.family.is_linear and not site.is_turned:
            a = get_parameter(gm, site.lora_a)
            together.setdefault((application.use.x, a.dtype, a.device), []).append(site)
    for members in together.values():
        names |= dict.fromkeys([site.lora_a for site in members] + [site.lora_b for site in members])
    return tuple(names | dict.fromkeys(name for site in sites for name in site.tensors.values()))


def _insert(gm: LoraGraphModule, adapter: Adapter, by_path: dict[str, list[Application]]) -> None:
    for site in adapter.sites.values():
        for application in by_path[site.applied]:
            insert_low_rank_path(application, low_rank_path(gm, application, site, adapter.name))
    for rows in adapter.tokens.values():
        for application in (application for path in rows.readers for application in by_path[path]):
            insert_rows(application, _rows_path(gm, application, rows, adapter.name))


def _insert_all(gm: LoraGraphModule) -> None:
    """Write the nodes of all adapters that count into views that have none yet."""
    for adapter in (record_of(gm).adapters[name] for name in record_of(gm).active):
        _insert(gm, adapter, applications_by_path(gm))


def applications_by_path(gm: LoraGraphModule) -> dict[str, list[Application]]:
    """The ops of each site, in all views."""
    return read_applications(gm).by_path()


def _add_parameters(
    gm: LoraGraphModule, application: Application, target: PlannedSite, new: NewAdapter, owner: AdapterSite | None
) -> AdapterSite:
    prefix, name, config = container(application.path, application.weight), new.name, new.plan.config
    turned = owner is not None and owner.layout != target.site.layout
    if owner is not None and turned:
        values = {}
    elif owner is None:
        values = _first_values(gm, application, target, new)
    else:  # tied sites: one weight, one adapter, under the name of each
        values = {part: get_attribute(gm, own) for part in _ENDS if (own := getattr(owner, part)) is not None}
    # "[q]" as the end of a word: lora_A_q
    suffix = f"_{re.sub(r'[^A-Za-z0-9]+', '_', target.site.part[1:-1])}" if target.site.part else ""
    names: dict[str, Any] = {part: prefix + _ENDS[part].format(suffix, name) for part in values}
    for part, attribute in names.items():
        _check_free(gm, attribute, name)
        set_attribute(gm, attribute, values[part])
    dropout = f"{prefix}lora_dropout{suffix}.{name}" if config.lora_dropout and target.site.takes_dropout else None
    if dropout is not None:
        set_attribute(gm, dropout, nn.Dropout(config.lora_dropout).train(gm.training))
    if owner is not None and turned:
        return replace(
            owner,
            path=target.site.path,
            applied=application.path,
            is_lookup=target.site.is_lookup,
            weight=application.weight,
            dropout=dropout,
            is_turned=True,
        )
    return AdapterSite(
        path=target.site.path,
        applied=application.path,
        is_lookup=target.site.is_lookup,
        weight=application.weight,
        dropout=dropout,
        scaling=target.scaling,
        layout=target.site.layout,
        **names,
    )


def _add_rows(gm: LoraGraphModule, application: Application, planned: PlannedRows, new: NewAdapter) -> RowsSite:
    weight = get_parameter(gm, application.attribute).detach()
    dtype = new.dtype or (torch.float32 if weight.dtype in _HALVES else weight.dtype)
    index = torch.tensor(planned.rows, device=weight.device)
    slots = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    slots[index] = torch.arange(1, len(index) + 1, device=weight.device)
    stem = f"{container(application.path, application.weight)}token_adapter.{{}}.{new.name}"
    site = RowsSite(
        path=application.path,
        weight=application.weight,
        readers=planned.readers,
        rows=stem.format("trainable_tokens_delta"),
        index=stem.format("index"),
        slots=stem.format("slots"),
    )
    rows = nn.Parameter(weight[index].to(dtype))
    for name, value in zip(site.attributes, (rows, index, slots), strict=True):
        _check_free(gm, f"{name}.", new.name)
        set_attribute(gm, name, value, persistent=False)
    return site


# Where the tensors of an AdapterSite stand, behind the module's name.
_ENDS = {
    "lora_a": "lora_A{}.{}.weight",
    "lora_b": "lora_B{}.{}.weight",
    "lora_bias": "lora_B{}.{}.bias",
    "magnitude": "lora_magnitude_vector{}.{}.weight",
    "start_a": "lora_A{}.{}.start",
    "start_b": "lora_B{}.{}.start",
}


def _first_values(
    gm: LoraGraphModule, application: Application, target: PlannedSite, new: NewAdapter
) -> dict[str, torch.Tensor]:
    """{field of AdapterSite: its parameter or buffer, as it starts}."""
    weight = get_parameter(gm, application.attribute).detach()
    taken = application.use.family.dtype(application.use, weight)
    dtype = new.dtype or (torch.float32 if taken in _HALVES else taken)
    layout, config, r = target.site.layout, new.plan.config, target.r
    start = start_of(config)
    if application.use.family.is_quantized and (config.use_dora or (start is not None and new.draws)):
        what = "use_dora" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
        raise TargetError(
            f"{what} takes numbers from the weight of {target.site.path!r}, which is stored in a few bits; leave it "
            "out, or trace the model before it is quantized"
        )
    if start is not None and start.name == "loftq":
        _check_replaceable(gm, application, target.site)
    if start is not None and (new.draws or start.changes_base):
        first = computed(weight, layout, r, target.scaling, config, new.context(target.site.path, dtype))
    else:
        first = First(
            torch.zeros(layout.a_shape(r), dtype=dtype, device=weight.device),
            torch.zeros(layout.b_shape(r), dtype=dtype, device=weight.device),
        )
        if new.draws:
            initialize(first.a, first.b, config.init_lora_weights, is_lookup=target.site.is_lookup, r=r)
    if first.base is not None:
        _replace_base(gm, application.attribute, first.base)
    values = {"lora_a": first.a, "lora_b": first.b}
    a, b = first.a, first.b
    buffers: dict[str, torch.Tensor] = {}
    if first.start is not None:
        buffers = dict(zip(("start_a", "start_b"), first.start, strict=True))
        a, b = without_start(a, b, *first.start)
    if config.lora_bias:
        values["lora_bias"] = torch.zeros(layout.out_features, dtype=dtype, device=weight.device)
        if config.init_lora_weights is False:  # as nn.Linear starts
            nn.init.uniform_(values["lora_bias"], -1 / math.sqrt(r), 1 / math.sqrt(r))
    if config.use_dora:
        norm = weight_norm(layout, weight.to(dtype), a, b, target.scaling)
        if holds_values(weight) and not bool(((norm > 0) & (norm < math.inf)).all()):
            raise AdapterError(
                f"{target.site.path!r}: the norms that use_dora divides by are 0 or not finite in {dtype}; "
                "inject(..., adapter_dtype=torch.float32) has room for them, if the weight itself is finite"
            )
        values["magnitude"] = norm.reshape(magnitude_shape(layout))
    frozen = () if start is None else start.frozen
    return {part: nn.Parameter(value, part not in frozen) for part, value in values.items()} | buffers


def _check_replaceable(gm: LoraGraphModule, application: Application, site: Site) -> None:
    """Raise unless the graph can have a base weight of its own for one adapter."""
    if site.tied_with:
        raise TargetError(
            f"init_lora_weights='loftq' replaces the weight of {site.path!r}, which is tied with "
            f"{', '.join(site.tied_with)}; leave it out with exclude_modules"
        )
    if application.attribute in record_of(gm).originals:
        raise AdapterError(
            f"init_lora_weights='loftq' replaces the weight of {site.path!r}, and another adapter holds one of its own "
            "there already; only one can"
        )


def _replace_base(gm: LoraGraphModule, attribute: str, base: torch.Tensor) -> None:
    """Give the graph a base weight of its own, as `_train_in_full` does, but frozen."""
    record_of(gm).originals[attribute] = get_parameter(gm, attribute).detach()
    set_attribute(gm, attribute, nn.Parameter(base, requires_grad=False))


def container(path: str, weight: str) -> str:
    """The prefix of an adapter's attributes: inside the module, or beside a parameter that is a site itself."""
    if path == weight:  # the site is named after the parameter, which can hold no children
        return f"{path}_"
    return f"{path}." if path else ""


def _check_free(gm: LoraGraphModule, attribute: str, adapter: str) -> None:
    holder = attribute.rpartition(".")[0].removesuffix(f".{adapter}")
    existing = get_attribute(gm, holder)
    if get_attribute(gm, attribute) is not None or not (existing is None or type(existing) is nn.Module):
        raise GraphError(f"the model already has an attribute {holder!r}, where the adapter's parameters go; rename it")


def low_rank_path(gm: LoraGraphModule, application: Application, site: AdapterSite, name: str) -> LowRankPath:
    """What to write beside one application of a site, for one adapter."""
    if not application.use.family.is_on_weight and application.layout not in (site.layout.whole, site.layout.turned()):
        raise GraphError(
            f"{application.path!r} is applied in ways that no one A and B can serve (by {application.use.node.name}: "
            f"{application.layout}; elsewhere: {site.layout}); leave it out with exclude_modules"
        )
    if (
        application.layout != site.layout.whole
        and (site.magnitude or site.lora_bias)
        and not application.use.family.is_on_weight
    ):
        raise GraphError(
            f"{application.path!r} is also applied the other way round (by {application.use.node.name}), where "
            "use_dora and lora_bias have no meaning; leave it out with exclude_modules"
        )
    weight = application.use.weight
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    own = application.use.family.dtype(application.use, get_parameter(gm, application.attribute))
    taken = value.dtype if isinstance(value, torch.Tensor) else own
    return LowRankPath(
        adapter=name,
        lora_a=site.lora_a,
        lora_b=site.lora_b,
        lora_bias=site.lora_bias,
        magnitude=site.magnitude,
        start_a=site.start_a,
        start_b=site.start_b,
        dropout=site.dropout,
        scaling=site.scaling,
        strength=record_of(gm).active.get(name, 1.0),
        layout=site.layout,
        needs_cast=get_parameter(gm, site.lora_a).dtype != taken,
        ranks=len(get_parameter(gm, site.lora_a)) * (1 if site.start_a is None else 2),
    )


def _rows_path(gm: LoraGraphModule, application: Application, site: RowsSite, name: str) -> RowsPath:
    return RowsPath(
        adapter=name,
        rows=site.rows,
        index=site.index,
        slots=site.slots,
        strength=record_of(gm).active[name],
        needs_cast=get_parameter(gm, site.rows).dtype != get_parameter(gm, application.attribute).dtype,
    )


def _train_in_full(gm: LoraGraphModule, names: tuple[str, ...]) -> tuple[str, ...]:
    """Give the graph its own copies of the tensors that are trained as they are; the base keeps the old ones."""
    record = record_of(gm)
    copies: dict[int, torch.Tensor] = {}
    for name in names:
        original = get_attribute(gm, name)
        record.originals[name] = original.detach()
        if id(original) not in copies:
            copied = original.detach().clone()
            trains = isinstance(original, nn.Parameter)
            copies[id(original)] = nn.Parameter(copied, original.is_floating_point()) if trains else copied
        set_attribute(gm, name, copies[id(original)])
    return names

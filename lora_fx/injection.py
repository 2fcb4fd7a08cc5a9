"""The pass that puts LoRA into a graph (PEFT calls this `get_peft_model`)."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

import torch
from torch import fx, nn

from .adapter_files import KEYS, KEYS_OF_LOOKUPS
from .applications import Application, read_applications
from .attributes import get_attribute, get_parameter, set_attribute
from .config import LoraConfig
from .errors import AdapterError, GraphError, TargetError
from .graph import LowRankPath, finish, insert_low_rank_path
from .graph_module import LoraGraphModule, checked_graph_module, copy_sharing_tensors, paused_gc, record_of
from .initialization import initialize
from .layouts import Layout, as_stored
from .plan import Plan, PlannedSite, make_plan
from .sites import sites_of

_HALVES = (torch.float16, torch.bfloat16)
ADAPTER_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class AdapterSite:
    """The attributes of one adapter at one site.

    Attributes:
        path: the site's.
        is_lookup: it is an embedding's, whose A and B have other names in files.
        weight: the base weight's own name; tied weights may be read under another.
        lora_a, lora_b: names of A (r, in) and B (out, r).
        dropout: name of the dropout module, or None.
        scaling: the factor on B @ A.
        layout: how A and B make the weight's delta.
    """

    path: str
    is_lookup: bool
    weight: str
    lora_a: str
    lora_b: str
    dropout: str | None
    scaling: float
    layout: Layout

    @property
    def attributes(self) -> tuple[str, ...]:
        """All that the adapter adds to the module here."""
        return (*self.tensors.values(), *(() if self.dropout is None else (self.dropout,)))

    @property
    def tensors(self) -> dict[str, str]:
        """{end of its key in PEFT's file: its attribute}."""
        return dict(zip(KEYS_OF_LOOKUPS if self.is_lookup else KEYS, (self.lora_a, self.lora_b), strict=True))


@dataclass(frozen=True)
class Adapter:
    """One injected adapter: its plan, its attributes by site path, and the base tensors it trains in full."""

    name: str
    plan: Plan
    sites: dict[str, AdapterSite]
    trained: tuple[str, ...]

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
) -> LoraGraphModule:
    """A new graph module with LoRA beside every target; `gm` and the model it came from are untouched.

    The base is shared and frozen, the adapters are trainable. With B = 0 the result computes what `gm`
    computes, bit for bit. Injecting into the result adds one more adapter; their effects add up.

    Args:
        gm: from `lora_fx.trace`, `torch.fx.symbolic_trace`, or `torch.export.export(...).module()`.
        config_or_plan: a `LoraConfig`, a `peft.LoraConfig`, a mapping of its fields, or a `Plan` of `gm`.
        adapter_name: letters, digits, `_` and `-`; part of the parameters' names.
        adapter_dtype: of A and B. None is PEFT's default: float32 for a 16-bit base, else the base's.

    Raises:
        ConfigError, TargetError, GraphError: as `make_plan`.
        AdapterError: if the name is taken or cannot be used.
    """
    gm = checked_graph_module(gm)
    check_adapter_name(adapter_name)
    _check_dtype(adapter_dtype)
    record = record_of(gm)
    if record.folded is not None:
        raise GraphError("this graph is folded in place; call lora_fx.unfold(gm) before injecting again")
    if adapter_name in record.adapters:
        raise AdapterError(
            f"the graph already has an adapter {adapter_name!r}; give another adapter_name "
            f"(taken: {', '.join(record.adapters)})"
        )
    if isinstance(config_or_plan, Plan):
        plan = config_or_plan
        _check_plan(gm, plan)
    else:
        plan = make_plan(gm, config_or_plan)
    _check_trained_once(gm, plan)
    with paused_gc():
        result = copy_sharing_tensors(gm)
        _freeze(result)
        _add_adapter(result, plan, adapter_name, adapter_dtype)
    return result


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


def _check_plan(gm: fx.GraphModule, plan: Plan) -> None:
    """A plan may come from elsewhere: it must mean this graph."""
    sites = {site.path: site for site in sites_of(gm, read_applications(gm))}
    for target in plan.targets:
        here = sites.get(target.site.path)
        if here is None:
            raise TargetError(f"the plan is of another graph: it has a site {target.site.path!r}, this one has not")
        theirs = target.site
        if theirs.layout not in (here.layout, as_stored(here.layout)):
            raise TargetError(
                f"the plan is of another graph: {here.path!r} maps {theirs.in_features} → {theirs.out_features} "
                f"there and {here.in_features} → {here.out_features} here; make_plan(gm, config) makes one for it"
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
                "tensor can have one such adapter only; leave it out of the second adapter's configuration"
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


def _add_adapter(gm: LoraGraphModule, plan: Plan, name: str, dtype: torch.dtype | None) -> None:
    by_path = _applications_by_path(gm)
    sites: dict[str, AdapterSite] = {}
    for target in plan.targets:
        owner = None if target.shares_with is None else sites[target.shares_with]
        first = by_path[target.site.path][0]
        sites[target.site.path] = _add_parameters(gm, first, target, plan.config, name, dtype, owner)
    adapter = Adapter(name, plan, sites, _train_in_full(gm, plan.trained))
    record = record_of(gm)
    record.adapters[name] = adapter
    record.active[name] = 1.0
    record.reinsert = _insert_all
    _insert(gm, adapter, by_path)
    finish(gm)


def _insert(gm: LoraGraphModule, adapter: Adapter, by_path: dict[str, list[Application]]) -> None:
    for path, site in adapter.sites.items():
        for application in by_path[path]:
            insert_low_rank_path(application, _low_rank_path(gm, application, site, adapter.name))


def _insert_all(gm: LoraGraphModule) -> None:
    """Write the nodes of all adapters that count into views that have none yet."""
    for adapter in (record_of(gm).adapters[name] for name in record_of(gm).active):
        _insert(gm, adapter, _applications_by_path(gm))


def _applications_by_path(gm: LoraGraphModule) -> dict[str, list[Application]]:
    by_path: dict[str, list[Application]] = {}
    for application in read_applications(gm).applications:
        by_path.setdefault(application.path, []).append(application)
    return by_path


def _add_parameters(
    gm: LoraGraphModule,
    application: Application,
    target: PlannedSite,
    config: LoraConfig,
    name: str,
    dtype: torch.dtype | None,
    owner: AdapterSite | None,
) -> AdapterSite:
    weight = get_parameter(gm, application.attribute)
    prefix = container(application.path, application.weight)
    lora_a, lora_b = f"{prefix}lora_A.{name}.weight", f"{prefix}lora_B.{name}.weight"
    drops = config.lora_dropout and target.site.takes_dropout
    dropout = f"{prefix}lora_dropout.{name}" if drops else None
    for attribute in (lora_a, lora_b):
        _check_free(gm, attribute, name)
    if owner is None:
        dtype = dtype or (torch.float32 if weight.dtype in _HALVES else weight.dtype)
        layout = target.site.layout
        a = nn.Parameter(torch.empty(layout.a_shape(target.r), dtype=dtype, device=weight.device))
        b = nn.Parameter(torch.empty(layout.b_shape(target.r), dtype=dtype, device=weight.device))
        initialize(a, b, config.init_lora_weights, is_lookup=target.site.is_lookup, r=target.r)
    else:  # tied sites: one weight, one adapter, under the name of each
        a, b = get_parameter(gm, owner.lora_a), get_parameter(gm, owner.lora_b)
    set_attribute(gm, lora_a, a)
    set_attribute(gm, lora_b, b)
    if dropout is not None:
        set_attribute(gm, dropout, nn.Dropout(config.lora_dropout).train(gm.training))
    return AdapterSite(
        path=application.path,
        is_lookup=target.site.is_lookup,
        weight=application.weight,
        lora_a=lora_a,
        lora_b=lora_b,
        dropout=dropout,
        scaling=target.scaling,
        layout=target.site.layout,
    )


def container(path: str, weight: str) -> str:
    """The prefix of an adapter's attributes: inside the module, or beside a parameter that is a site itself."""
    if path == weight:  # the site is named after the parameter, which can hold no children
        return f"{path}_"
    return f"{path}." if path else ""


def _check_free(gm: LoraGraphModule, attribute: str, adapter: str) -> None:
    holder = attribute.removesuffix(f".{adapter}.weight")
    existing = get_attribute(gm, holder)
    if get_attribute(gm, attribute) is not None or not (existing is None or type(existing) is nn.Module):
        raise GraphError(f"the model already has an attribute {holder!r}, where the adapter's parameters go; rename it")


def _low_rank_path(gm: LoraGraphModule, application: Application, site: AdapterSite, name: str) -> LowRankPath:
    if not application.use.family.is_on_weight and application.layout not in (site.layout, site.layout.turned()):
        raise GraphError(
            f"{application.path!r} is applied in ways that no one A and B can serve (by {application.use.node.name}: "
            f"{application.layout}; elsewhere: {site.layout}); leave it out with exclude_modules"
        )
    weight = application.use.weight
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    taken = value.dtype if isinstance(value, torch.Tensor) else get_parameter(gm, application.attribute).dtype
    return LowRankPath(
        adapter=name,
        lora_a=site.lora_a,
        lora_b=site.lora_b,
        dropout=site.dropout,
        scaling=site.scaling * record_of(gm).active[name],
        layout=site.layout,
        needs_cast=get_parameter(gm, site.lora_a).dtype != taken,
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

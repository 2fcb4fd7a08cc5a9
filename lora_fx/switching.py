"""Many adapters on one graph: which of them count, and with what weight.

An adapter that does not count has no node in the graph. The graphs of each choice are kept, so that going back to one
costs nothing, and torch.compile meets what it has compiled already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import fx, nn

from .applications import bodies_of
from .attributes import delete_attribute, get_attribute, set_attribute
from .copying import copy_graph
from .errors import AdapterError
from .graph import erase_low_rank_paths, finish
from .graph_module import (
    LoraGraphModule,
    Selection,
    check_editable,
    checked_graph_module,
    paused_gc,
    record_of,
)
from .parameters import find_adapter
from .sharding import check_not_sharded


def set_adapters(gm: fx.GraphModule, adapters: Mapping[str, float] | Sequence[str] | str) -> LoraGraphModule:
    """Let these adapters count, each with its weight, and no others; `gm` itself is changed and given back.

    The weight multiplies the adapter's scaling, and 0 is the same as leaving it out. `fold` folds what counts, with
    these weights. requires_grad flags stay as they are: adapters that do not count get no gradient.

    Args:
        gm: an injected graph.
        adapters: {name: weight}, or names, each with weight 1.

    Raises:
        AdapterError: if there is no such adapter, a weight is not finite, or an adapter that trains tensors in full
            (modules_to_save, bias) is to count by another weight than 1.
    """
    gm = _checked(gm)
    wanted = {adapters: 1.0} if isinstance(adapters, str) else adapters
    if not isinstance(wanted, (Mapping, list, tuple, set, frozenset)):
        raise AdapterError(f"adapters={adapters!r} must be a mapping of names to weights, a list of names, or one name")
    weights = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted, 1.0)
    for name, weight in weights.items():
        adapter = find_adapter(gm, name)
        check_weight(name, weight)
        if adapter.trained and weight not in (0, 1):
            raise AdapterError(
                f"adapter {name!r} trains {adapter.trained[0]!r} in full, which counts whole or not at all; its weight "
                f"cannot be {weight}"
            )
    order = record_of(gm).adapters
    _select(gm, {name: float(weights[name]) for name in order if weights.get(name, 0)})
    return gm


def check_weight(name: str, weight: object) -> None:
    """Raise AdapterError unless `weight` is a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise AdapterError(f"the weight of adapter {name!r} is {weight!r}; it must be a finite number")


def active_adapters(gm: fx.GraphModule) -> dict[str, float]:
    """{name: weight} of the adapters that count, in the order of injection."""
    return dict(record_of(checked_graph_module(gm)).active)


@contextmanager
def disable_adapters(gm: fx.GraphModule) -> Iterator[LoraGraphModule]:
    """Within the context, `gm` computes what the base computes, bit for bit.

    Raises:
        GraphError: if `gm` is no graph that was injected.
    """
    gm = _checked(gm)
    before = dict(record_of(gm).active)
    _select(gm, {})
    try:
        yield gm
    finally:
        _select(gm, before)


def delete_adapter(gm: fx.GraphModule, adapter_name: str) -> LoraGraphModule:
    """Take one adapter out of `gm` for good, with what it trained in full; `gm` itself is changed and given back.

    Raises:
        AdapterError: if there is no such adapter.
    """
    gm = _checked(gm)
    find_adapter(gm, adapter_name)
    check_not_sharded(gm, "parameters cannot be taken out of the module")
    record = record_of(gm)
    _select(gm, {name: weight for name, weight in record.active.items() if name != adapter_name})
    record.selections.clear()  # they read the adapter's parameters
    forget_adapter(gm, adapter_name)
    return gm


def forget_adapter(gm: LoraGraphModule, name: str) -> None:
    """Drop an adapter that no node reads; without any left, the base has its requires_grad flags back."""
    record = record_of(gm)
    adapter = record.adapters.pop(name)
    record.active.pop(name, None)
    for member in adapter.members:
        for attribute in member.attributes:
            if get_attribute(gm, attribute) is not None:
                delete_attribute(gm, attribute)
    for tensor in adapter.trained:
        record.originals.pop(tensor, None)
        record.stashed.pop(tensor, None)
    if not record.adapters:
        for parameter_name, parameter in gm.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(record.requires_grad.get(parameter_name, parameter.requires_grad))


def _checked(gm: fx.GraphModule) -> LoraGraphModule:
    gm = checked_graph_module(gm)
    record = record_of(gm)
    check_editable(gm)
    if not isinstance(gm, LoraGraphModule) or not record.adapters:
        raise AdapterError("the graph has no adapter; inject one: gm = lora_fx.inject(gm, config)")
    return gm


def _select(gm: LoraGraphModule, active: dict[str, float]) -> None:
    """Show the graphs of a choice: kept ones, or new ones."""
    record = record_of(gm)
    if active == record.active:
        return
    changed = active.keys() ^ record.active.keys()
    if any(record.adapters[name].trained for name in changed):
        check_not_sharded(gm, "what an adapter trains in full cannot be exchanged")
    with paused_gc():
        _exchange_trained(gm, active)
        record.selections[tuple(record.active.items())] = gm.kept_views()
        record.active = active
        known = record.selections.get(tuple(active.items()))
        if known is not None:
            gm.show_views(known)
            return
        if any(bodies_of(node)[0] for graph in record.views.values() for node in graph.nodes):
            record.selections.clear()  # bodies are modules of their own, which all graphs share and edits change
        else:
            gm.show_views(Selection({mode: copy_graph(graph, {}) for mode, graph in record.views.items()}))
        erase_low_rank_paths(gm, set(record.adapters))
        assert record.reinsert is not None
        record.reinsert(gm)
        finish(gm)


def _exchange_trained(gm: LoraGraphModule, active: dict[str, float]) -> None:
    """What an adapter trains in full stands in the graph while it counts, else the base's own tensor."""
    record = record_of(gm)
    for adapter in record.adapters.values():
        for name in adapter.trained:
            if adapter.name not in active and name not in record.stashed:
                record.stashed[name] = get_attribute(gm, name)
                base = record.originals[name]
                trains = isinstance(record.stashed[name], nn.Parameter)
                set_attribute(gm, name, nn.Parameter(base, requires_grad=False) if trains else base)
            elif adapter.name in active and name in record.stashed:
                set_attribute(gm, name, record.stashed.pop(name))

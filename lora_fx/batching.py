"""One graph for a batch whose rows belong to different adapters."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .applications import Application
from .attributes import delete_attribute, get_attribute, get_parameter, holds_values, set_attribute
from .call_form import CallForm
from .equivalence import default_tolerance
from .errors import AdapterError, GraphError, TargetError
from .graph import add_input, erase_low_rank_paths, finish, insert_batched_path
from .graph_module import (
    LoraGraphModule,
    TraceRecord,
    check_editable,
    checked_graph_module,
    copy_sharing_tensors,
    paused_gc,
    record_of,
)
from .injection import Adapter, AdapterSite, applications_by_path, container, low_rank_path
from .layouts import Experts, Kernel, Part
from .parameters import find_adapter
from .paths import BatchedPath
from .switching import set_adapters

INPUT = "adapter_ids"
_ROLE = "(batch)"
_STACK = "stacked"


@dataclass(frozen=True, eq=False)
class Batched:
    """What became of the adapters of a batched graph.

    Attributes:
        names: of the adapters, in the order of their ids from 1.
        source: the graph with the adapters one by one.
        stacks: {stacked parameter: [(parameter of `source`, its dimension, start, stop)]}.
        single: names of the parameters that both graphs have.
    """

    names: tuple[str, ...]
    source: LoraGraphModule
    stacks: dict[str, list[tuple[str, int, int, int]]]
    single: tuple[str, ...]


def batch_adapters(gm: fx.GraphModule, adapters: Sequence[str] | None = None) -> LoraGraphModule:
    """A new graph module with one more input `adapter_ids`, which says of each row of the batch whose it is.

    `adapter_ids` is an integer tensor (batch,): 0 for the base, 1 for the first of the adapters, and so on. One graph
    serves every mix, so nothing is compiled again when the mix changes. It has a copy of the adapters, stacked, with
    their own scaling, whatever `set_adapters` says: `lora_parameters` are those to train, and `unbatch_adapters` gives
    the adapters back one by one. `gm` is untouched.

    On the inputs that were given to `trace`, it is checked that each row gets what its adapter alone would give it.

    Args:
        gm: an injected graph of `lora_fx.trace`.
        adapters: names, in the order of their ids; None for all, in the order of injection.

    Raises:
        AdapterError: if an adapter is not there, or is more than A and B (use_dora, lora_bias, modules_to_save, bias,
            trainable_token_indices).
        GraphError, TargetError: if a site does not see the batch, or the model mixes its rows.
    """
    gm = checked_graph_module(gm)
    check_editable(gm)
    record = record_of(gm)
    if record.trace is None or not isinstance(gm, LoraGraphModule):
        raise GraphError(
            "batch_adapters reads shapes and inputs that a graph from lora_fx.trace(model, args) remembers"
        )
    if not record.adapters:
        raise AdapterError("the graph has no adapter; inject one: gm = lora_fx.inject(gm, config)")
    names = list(record.adapters) if adapters is None else list(adapters)
    if isinstance(adapters, str) or not names or len(set(names)) != len(names):
        raise AdapterError(f"adapters={adapters!r} must be a list of adapter names, each once")
    chosen = [find_adapter(gm, name) for name in names]
    for adapter in chosen:
        _check_adapter(adapter)
    with paused_gc(), torch.inference_mode(False):  # what is made under it could never be trained
        source = copy_sharing_tensors(gm)
        finish(source)
        result = copy_sharing_tensors(gm)
        erase_low_rank_paths(result, set(record.adapters))
        record_of(result).selections.clear()
        stacks, single = _insert(result, chosen)
        record_of(result).batched = Batched(tuple(names), source, stacks, single)
        record_of(result).trace = _with_ids(record.trace)
        _replace_form(result)
        finish(result)
    _check_rows(gm, result, names)
    return result


def unbatch_adapters(gm: fx.GraphModule) -> LoraGraphModule:
    """The graph that `batch_adapters` was given, with the values that the adapters have in the batched graph `gm` now.

    Raises:
        GraphError: if `gm` does not come from `batch_adapters`.
    """
    batched = record_of(checked_graph_module(gm)).batched
    if not isinstance(batched, Batched):
        raise GraphError("this graph does not come from batch_adapters, so there is nothing to take back")
    result = copy_sharing_tensors(batched.source)
    finish(result)
    values: dict[str, torch.Tensor] = {name: get_parameter(gm, name) for name in batched.single}
    for stack, pieces in batched.stacks.items():
        whole = get_parameter(gm, stack)
        values |= {name: whole.narrow(dim, start, stop - start) for name, dim, start, stop in pieces}
    own: dict[int, nn.Parameter] = {}  # tied sites hold the same parameters
    for name, value in values.items():
        old = get_parameter(result, name)
        if id(old) not in own:
            own[id(old)] = nn.Parameter(value.detach().clone().contiguous(), old.requires_grad)
        set_attribute(result, name, own[id(old)])
    return result


def _check_adapter(adapter: Adapter) -> None:
    config = adapter.config
    more = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "trainable_token_indices": bool(adapter.tokens)}
    more |= {f"{name} trained in full or replaced": True for name in adapter.trained[:1]}
    for what, is_there in more.items():
        if is_there:
            raise AdapterError(
                f"adapter {adapter.name!r} is more than A and B ({what}), which rows of a batch cannot choose; "
                "leave it out: batch_adapters(gm, adapters=[...])"
            )


def _insert(
    gm: LoraGraphModule, chosen: list[Adapter]
) -> tuple[dict[str, list[tuple[str, int, int, int]]], tuple[str, ...]]:
    """Write the paths; (what was stacked, as in `Batched`, and what was not)."""
    by_path = applications_by_path(gm)
    inputs: dict[bool | None, tuple[fx.Node, Any]] = {}
    for mode, graph in record_of(gm).views.items():
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        if any(node.name == INPUT for node in placeholders):
            raise GraphError(f"the model has an input {INPUT!r} of its own, which is what the adapters' ids are called")
        inputs[mode] = add_input(graph, INPUT), _batch_of(placeholders)
    here: dict[str, list[tuple[int, Adapter, AdapterSite]]] = {}
    for index, adapter in enumerate(chosen, start=1):
        for site in adapter.sites.values():
            here.setdefault(site.applied, []).append((index, adapter, site))
    stacks, tables = _Stacks(gm), _Tables(gm, len(chosen))
    gates_of: dict[tuple[fx.Graph, str, tuple[int, ...]], fx.Node] = {}
    for path, members in here.items():
        dropouts = {adapter.config.lora_dropout for _, adapter, _ in members}
        if len(dropouts) > 1:
            raise AdapterError(
                f"the adapters of {path!r} have different lora_dropout ({', '.join(map(str, sorted(dropouts)))}), "
                "and one batch drops alike; make them equal"
            )
        dtypes = {get_parameter(gm, name).dtype for *_, site in members for name in (site.lora_a, site.lora_b)}
        if len(dtypes) > 1:
            raise AdapterError(
                f"the adapters of {path!r} have different dtypes ({', '.join(sorted(map(str, dtypes)))}), and one "
                "batch computes in one; make them equal: load_adapter(gm, directory, adapter_dtype=...)"
            )
        for application in by_path[path]:
            _check_kind(application)
            paths = tuple(low_rank_path(gm, application, site, adapter.name) for _, adapter, site in members)
            a = get_parameter(gm, members[0][2].lora_a)
            own = [(index, each.ranks, each.scaling) for (index, *_), each in zip(members, paths, strict=True)]
            ids, batch = inputs[application.mode]
            found = BatchedPath(
                role=_ROLE,
                paths=paths,
                stacks=stacks.names_of(path, [site for *_, site in members]),
                gates=tables.name_of(own, a),
                ids=ids,
                gates_of=gates_of,
                is_narrow=a.dtype.itemsize < 4,
                find_batch=functools.partial(_batch_axis, path, batch),
            )
            insert_batched_path(application, found)
    stacks.delete_singles()
    left = [name for adapter in chosen for site in adapter.sites.values() for name in site.tensors.values()]
    single = tuple(name for name in dict.fromkeys(left) if get_attribute(gm, name) is not None)
    copies: dict[int, nn.Parameter] = {}
    for name in single:
        old = get_parameter(gm, name)
        copies.setdefault(id(old), nn.Parameter(old.detach().clone(), old.requires_grad))
        set_attribute(gm, name, copies[id(old)])
    return stacks.pieces, single


class _Stacks:
    """A and B of all adapters of a site as one parameter each, where they are all of one kind."""

    def __init__(self, gm: LoraGraphModule) -> None:
        self.gm = gm
        self.pieces: dict[str, list[tuple[str, int, int, int]]] = {}
        self._known: dict[tuple[int, ...], tuple[str, str]] = {}

    def names_of(self, path: str, sites: list[AdapterSite]) -> tuple[str, str] | None:
        """Names of the two; None where they have to be stacked at each call."""
        halves = [[get_parameter(self.gm, getattr(site, half)) for site in sites] for half in ("lora_a", "lora_b")]
        flags = {tuple(parameter.requires_grad for parameter in half) for half in halves}
        alike = {site.layout for site in sites} == {sites[0].layout} and all(len(set(flag)) == 1 for flag in flags)
        if not alike or isinstance(sites[0].layout, Part) or any(site.start_a is not None for site in sites):
            return None
        key = tuple(id(parameter) for half in halves for parameter in half)
        if key not in self._known:
            prefix = container(path, sites[0].weight)
            names = f"{prefix}lora_A.{_STACK}.weight", f"{prefix}lora_B.{_STACK}.weight"
            for dim, (name, half, values) in enumerate(zip(names, ("lora_a", "lora_b"), halves, strict=True)):
                self._stack(name, dim, [getattr(site, half) for site in sites], values)
            self._known[key] = names
        return self._known[key]

    def _stack(self, name: str, dim: int, own: list[str], values: list[nn.Parameter]) -> None:
        whole = torch.cat([value.detach() for value in values], dim)
        set_attribute(self.gm, name, nn.Parameter(whole, values[0].requires_grad))
        ends = list(itertools.accumulate(value.shape[dim] for value in values))
        starts = [0, *ends[:-1]]
        self.pieces[name] = [(one, dim, start, end) for one, start, end in zip(own, starts, ends, strict=True)]

    def delete_singles(self) -> None:
        """Take out what is stacked, under each of its names."""
        stacked = {id(get_parameter(self.gm, name)) for pieces in self.pieces.values() for name, *_ in pieces}
        for name, parameter in list(self.gm.named_parameters(remove_duplicate=False)):
            if id(parameter) in stacked:
                delete_attribute(self.gm, name)


class _Tables:
    """The gates of each combination of ranks and scalings, once."""

    def __init__(self, gm: LoraGraphModule, adapters: int) -> None:
        self.gm, self.adapters = gm, adapters
        self._known: dict[tuple[Any, ...], str] = {}

    def name_of(self, own: list[tuple[int, int, float]], a: torch.Tensor) -> str:
        """Name of the buffer for ranks and scalings of adapters whose A is on that device and of that type."""
        dtype = torch.promote_types(a.dtype, torch.float32)
        key = (a.device, dtype, *own)
        if key not in self._known:
            self._known[key] = f"adapter_gates_{len(self._known)}"
            set_attribute(self.gm, self._known[key], _gates(self.adapters, own).to(a.device, dtype), persistent=False)
        return self._known[key]


def _gates(adapters: int, own: list[tuple[int, int, float]]) -> torch.Tensor:
    """(adapters + 1, ranks of all): in the row of an adapter its scaling at its own ranks, else 0."""
    gates = torch.zeros(adapters + 1, sum(ranks for _, ranks, _ in own), dtype=torch.float64)
    start = 0
    for index, ranks, scaling in own:
        gates[index, start : start + ranks] = scaling
        start += ranks
    return gates


def _batch_of(placeholders: list[fx.Node]) -> Any:
    """The size of the batch: the first dimension of the first input that has one."""
    values = (node.meta.get("val") for node in placeholders)
    found = next((value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.ndim), None)
    if found is None:
        raise GraphError("the graph takes no tensor with a batch in it, so there are no rows to tell apart")
    return found


def _check_kind(application: Application) -> None:
    """Raise TargetError for ops whose delta is not a product that rows go through one by one."""
    use, path, layout = application.use, application.path, application.layout
    if use.family.is_on_weight or isinstance(layout, Experts) or (isinstance(layout, Kernel) and layout.groups > 1):
        raise TargetError(
            f"{path!r} ({use.kind}) cannot be batched: its delta is not a product that rows go through one by one. "
            "Leave it out of the adapters"
        )
    if "between" not in inspect.signature(use.family.emit).parameters:
        raise TargetError(
            f"{path!r} ({use.kind}) cannot be batched: emit of {type(use.family).__name__} takes no `between`, which "
            "lora_fx.ops.Family describes"
        )


def _batch_axis(path: str, batch: Any, sizes: list[Any]) -> tuple[int, bool]:
    """On which axis the rows lie, and whether they lie there together with something else."""
    for axis, size in enumerate(sizes):
        if size is not None and _same(size, batch):
            return axis, False
    if sizes and sizes[0] is not None and _is_multiple(sizes[0], batch):
        return 0, True
    raise GraphError(
        f"{path!r} gives {tuple('ranks' if size is None else str(size) for size in sizes)}, in which the batch "
        f"({batch}) is not to be seen, so its rows cannot choose their adapters; leave it out of the adapters"
    )


def _same(size: Any, batch: Any) -> bool:
    if isinstance(size, torch.SymInt) and isinstance(batch, torch.SymInt):
        return bool(size.node.expr == batch.node.expr)
    return type(size) is type(batch) and bool(size == batch)


def _is_multiple(size: Any, batch: Any) -> bool:
    """Whether `size` is the batch times something that does not depend on it."""
    if isinstance(batch, torch.SymInt):
        if not isinstance(size, torch.SymInt):
            return False
        quotient = size.node.expr / batch.node.expr
        return not quotient.free_symbols & batch.node.expr.free_symbols
    return isinstance(size, int) and size % batch == 0


def _with_ids(trace: TraceRecord) -> TraceRecord:
    """What is remembered of tracing, with ids among the example inputs. Another dtype is not to be had any more."""
    leaf = next(x for x in pytree.tree_leaves((trace.args, trace.kwargs)) if isinstance(x, torch.Tensor) and x.ndim)
    name = next((names[0] for names in trace.dimension_names if 0 in names), None)
    return replace(
        trace,
        kwargs={**trace.kwargs, INPUT: torch.zeros(len(leaf), dtype=torch.int64, device=leaf.device)},
        dimension_names=(*trace.dimension_names, {} if name is None else {0: name}),
        retrace=lambda dtype, *, casts_buffers=True: None,
    )


def _replace_form(gm: LoraGraphModule) -> None:
    trace = record_of(gm).trace
    assert trace is not None
    for key, hook in gm._forward_pre_hooks.items():
        if isinstance(hook, CallForm):
            gm._forward_pre_hooks[key] = hook.with_ids(INPUT, trace.kwargs[INPUT])


# The check -------------------------------------------------------------------------------------------


def _check_rows(gm: LoraGraphModule, batched: LoraGraphModule, names: list[str]) -> None:
    """Each row of a mixed batch gets what its adapter alone gives it, on the remembered inputs."""
    trace = record_of(batched).trace
    assert trace is not None
    leaves = pytree.tree_leaves((trace.args, trace.kwargs))
    if any(isinstance(leaf, torch.Tensor) and not holds_values(leaf) for leaf in (*leaves, *batched.parameters())):
        return  # no values to look at
    kwargs = {name: value for name, value in trace.kwargs.items() if name != INPUT}
    args, kwargs, batch = _enlarged(trace, kwargs, len(names) + 1)
    copied = copy_sharing_tensors(gm)
    finish(copied)
    with torch.no_grad():
        for start in range(0, len(names) + 1, batch):
            ids = torch.tensor([(start + row) % (len(names) + 1) for row in range(batch)])
            ids = ids.to(trace.kwargs[INPUT].device)
            try:
                mixed = _rows(_in_eval(batched, args, {**kwargs, INPUT: ids}), batch)
            except RuntimeError as error:
                raise GraphError(
                    f"the batched graph does not run on the inputs that were given to trace ({error}); the model mixes "
                    "the rows of a batch, and cannot be batched"
                ) from error
            for row, index in enumerate(ids.tolist()):
                set_adapters(copied, {names[index - 1]: 1.0} if index else {})
                alone = _rows(_in_eval(copied, args, kwargs), batch)
                _compare_row(row, names[index - 1] if index else "the base", mixed, alone)


def _enlarged(trace: TraceRecord, kwargs: dict[str, Any], wanted: int) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """The example inputs with up to `wanted` rows, where the batch is free."""
    leaves, spec = pytree.tree_flatten((trace.args, kwargs))
    name = trace.dimension_names[-1].get(0)
    size = len(trace.kwargs[INPUT])
    if name is None or size >= wanted:
        return trace.args, kwargs, size
    times = -(-wanted // size)
    larger = [
        leaf.repeat(times, *(1 for _ in leaf.shape[1:])) if names.get(0) == name else leaf
        for leaf, names in zip(leaves, trace.dimension_names, strict=False)
    ]
    args, kwargs = pytree.tree_unflatten(larger, spec)
    return args, kwargs, size * times


def _in_eval(gm: LoraGraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    training = gm.training
    try:
        return (gm.eval() if training else gm)(*args, **kwargs)
    finally:
        if training:
            gm.train()


def _rows(output: Any, batch: int) -> list[torch.Tensor]:
    """The tensors of an output that have a row for each of the batch."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    found = [leaf for leaf in leaves if len(leaf) == batch and leaf.is_floating_point()]
    if not found:
        raise GraphError(
            "no output of the graph has a row for each row of the batch, so whether rows stay apart cannot be checked; "
            "trace the model without its loss"
        )
    return found


def _compare_row(row: int, name: str, mixed: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    for one, other in zip(mixed, alone, strict=True):
        bound = 64 * default_tolerance(one.dtype) * float(other.abs().max())
        error = float((one[row].double() - other[row].double()).abs().max())
        if not error <= bound and bool(torch.isfinite(other[row]).all()):
            raise GraphError(
                f"row {row} of a mixed batch differs by {error:.3g} from what {name!r} alone gives it, so the model "
                "mixes the rows of a batch (batch statistics, or a batch that is not the first dimension); it cannot "
                "be batched"
            )

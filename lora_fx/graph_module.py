"""The graph module that every pass takes and gives: one set of tensors, a graph for each mode.

torch.export writes `self.training` into the graph as literals (dropout flags, probabilities, the
branch that was taken), so one exported graph can only train or only evaluate. `LoraGraphModule`
carries a graph of each mode over the same tensors, and `.train()` / `.eval()` switch between them.
Graphs that hold their modes themselves (symbolic_trace keeps nn.Dropout modules) have one view.
"""

from __future__ import annotations

import copy
import gc
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .adoption import adopt, over_own_tensors, restore_what_fx_drops
from .arena import lay_out
from .attributes import get_parameter, holds_values
from .copying import CODE, WRAPPER, copy_graph, copy_graph_module, copy_hooks, quiet_deepcopy, share_tensors
from .errors import GraphError
from .generated_code import code_to_run
from .literals import find_dtype_literal, move_literals
from .mode_literals import check_literal_mode, warn_of_mixed_modes
from .sharding import check_not_sharded, settle, unsharded_class, whole
from .tensor_reads import read
from .written_graphs import Written, as_traced, as_written

if TYPE_CHECKING:
    from .injection import Adapter

_META_KEY = "lora_fx"

# The key in a node's meta under which graph.py says what an inserted node is for.
ROLE = "lora_fx"

# What GraphModule.recompile leaves on the instance; together with the class's `forward` it is one view.
_COMPILED = ("_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec", "_shown_code")
_numbers = itertools.count()

# How many compiled graphs a graph module and its copies remember.
_KNOWN_GRAPHS = 16

# Set while a pass copies a module that it will edit and compile anyway: compiling is most of a copy's cost.
_UNCOMPILED: ContextVar[bool] = ContextVar("_UNCOMPILED", default=False)


class Retrace(Protocol):
    """Traces a model again, in another dtype."""

    def __call__(self, dtype: torch.dtype, *, casts_buffers: bool = True) -> dict[bool | None, fx.GraphModule] | None:
        """The views, or None."""
        ...


@dataclass(frozen=True)
class TraceRecord:
    """What `trace` remembers of its call, so that nothing has to be said twice at export.

    Attributes:
        args, kwargs: the example inputs, detached copies.
        dimension_names: one mapping per flattened leaf of (args, kwargs): {free dimension: name}.
        model_class: class name of the traced model.
        retrace: the views that the model has in another dtype, of its buffers too or of its parameters alone; None if
            the model is gone.
        module_aliases: {path: first path} of modules that stand in the model under several names.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dimension_names: tuple[dict[int, str], ...]
    model_class: str
    retrace: Retrace = lambda dtype, *, casts_buffers=True: None
    module_aliases: dict[str, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceRecord:
        return self  # frozen, and nobody writes into the examples


class Lowering(Protocol):
    """Makes the graph that is compiled out of the one that everything else reads; comparable by what it does.

    Attributes:
        trains_only: it is for training, and graphs of eval mode, and without adapters, are compiled as they are.
    """

    trains_only: ClassVar[bool]

    def __call__(self, gm: LoraGraphModule, graph: fx.Graph) -> fx.Graph:
        """A new graph that computes the same; `graph` stays as it is."""
        ...

    def behind(self, first: Lowering) -> Lowering:
        """Both, one after the other.

        Raises:
            GraphError: if they do not go together.
        """
        ...

    def on_whole_tensors(self) -> Lowering | None:
        """What is left of it for a copy of the graph whose parameters are no longer spread over processes."""
        ...


@dataclass(frozen=True)
class Selection:
    """The views of one choice of adapters, and what those that were shown are compiled to."""

    views: dict[bool | None, fx.Graph]
    compiled: dict[fx.Graph, dict[str, Any]] = field(default_factory=dict)


@dataclass
class GraphRecord:
    """What the passes know about one graph module beyond its graph. It lives in `gm.meta`.

    Attributes:
        trace: how the graph was made; None for graphs that the user traced.
        views: the graph of each mode, or one graph under None that serves both.
        untraceable: {mode: why the model has no graph in that mode}.
        mixed: {mode: modules that were in the other mode when it was traced, which shows in its graph}.
        adapters: what was injected, by adapter name, in the order of injection.
        active: {name: weight} of the adapters that count, in the order of injection.
        selections: the views of other choices of adapters, to go back to; a copy starts without.
        stashed: what an adapter that does not count trains in full: {fqn: tensor}.
        requires_grad: the flags the base parameters had before the first injection froze them.
        originals: base tensors that an adapter trains in full, as they were: {fqn: tensor}.
        wide: with views that compute in another dtype than the parameters have (see `unflatten`), those of this one.
        traced: the views as tracing wrote them, by value, to know them again.
        reinsert: writes the adapters' nodes into views that have none; set by `inject`.
        lowering: makes what is compiled in place of the graph, which stays as it is; set by `optimize` and `unflatten`.
        batched: for a graph from `batch_adapters`, how its adapters are stacked (see batching.py).
        folded: what an in-place fold needs to take itself back (see folding.py).
        report: what the last fold did.
        compiled: graphs as they were written, with what they were compiled to. Copies share it, so that a copy, and
            a fold, which gives the traced graph again, need not write and compile the code once more.
    """

    trace: TraceRecord | None = None
    views: dict[bool | None, fx.Graph] = field(default_factory=dict)
    untraceable: dict[bool, str] = field(default_factory=dict)
    mixed: dict[bool, tuple[str, ...]] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    selections: dict[tuple[tuple[str, float], ...], Selection] = field(default_factory=dict)
    stashed: dict[str, torch.Tensor] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    wide: dict[bool | None, fx.Graph] = field(default_factory=dict)
    traced: dict[bool | None, Written] = field(default_factory=dict)
    reinsert: Callable[[LoraGraphModule], None] | None = None
    lowering: Lowering | None = None
    batched: Any = None
    folded: Any = None
    report: Any = None
    compiled: list[tuple[Written, Lowering | None, dict[str, Any]]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphRecord:
        """Graphs are copied, values shared. What an in-place fold needs to take itself back stays with the original."""
        return replace(
            self,
            views={mode: copy_graph(graph, memo) for mode, graph in self.views.items()},
            wide={mode: copy_graph(graph, memo) for mode, graph in self.wide.items()},
            adapters=dict(self.adapters),
            active=dict(self.active),
            selections={},
            stashed=copy.deepcopy(self.stashed, memo),
            requires_grad=dict(self.requires_grad),
            originals=copy.deepcopy(self.originals, memo),
            folded=None,
        )


class LoraGraphModule(fx.GraphModule):
    """A `torch.fx.GraphModule` whose `.train()` and `.eval()` show the graph of that mode."""

    meta: dict[str, Any]
    _shown_code: str = ""

    def train(self, mode: bool = True) -> LoraGraphModule:
        """Set the mode of all submodules and show the graph that was traced in it.

        Raises:
            GraphError: if the model could not be traced in that mode, or the user exported it in train
                mode, with its dropout on for good.
        """
        record = record_of(self)
        if mode in record.untraceable:
            word = "train" if mode else "eval"
            raise GraphError(
                f"this graph has no {word}() form: the model could not be traced in it "
                f"({record.untraceable[mode]}). Trace it in the mode you need, or mend the model"
            )
        if record.trace is None:
            check_literal_mode(self.graph, mode)
        if mode in record.mixed and mode != self.training:
            warn_of_mixed_modes(record.mixed[mode], mode)
        super().train(mode)
        if mode in record.views and self._graph is not record.views[mode]:
            self._show(mode)
        return self

    def eval(self) -> LoraGraphModule:
        """`train(False)`."""
        return self.train(False)

    def _show(self, mode: bool) -> None:
        """Exchange the shown view; a view keeps its compiled forward, so torch.compile meets it again."""
        self._let_wrappers_follow()
        cache: dict[fx.Graph, dict[str, Any]] = self.__dict__.setdefault("_compiled_views", {})
        if not self._is_pending:
            cache[self._graph] = self._compiled()
        self._graph = record_of(self).views[mode]
        self._graph.owning_module = self
        if self._graph in cache:
            self._install(cache[self._graph])
        else:
            self._compile_later()

    def kept_views(self) -> Selection:
        """The views with what they are compiled to, for `show_views` to come back to."""
        cache: dict[fx.Graph, dict[str, Any]] = self.__dict__.get("_compiled_views", {})
        shown = {} if self._is_pending else {self._graph: self._compiled()}
        return Selection(dict(record_of(self).views), cache | shown)

    def show_views(self, selection: Selection) -> None:
        """Exchange all views; those that were compiled keep what torch.compile knows them by."""
        self._let_wrappers_follow()
        record_of(self).views.update(selection.views)
        graph = selection.views[self.training if self.training in selection.views else None]
        self.__dict__["_compiled_views"] = dict(selection.compiled)
        self._graph = graph
        graph.owning_module = self
        if graph in selection.compiled:
            self._install(selection.compiled[graph])
        else:
            self._compile_later()

    def _compiled(self) -> dict[str, Any]:
        """What the shown graph was compiled to."""
        return {name: self.__dict__[name] for name in _COMPILED if name in self.__dict__} | {
            "forward": type(self).forward
        }

    def _install(self, compiled: dict[str, Any]) -> None:
        unsharded_class(self).forward = compiled["forward"]
        self.__dict__.update({name: value for name, value in compiled.items() if name != "forward"})

    def _let_wrappers_follow(self) -> None:
        """Let what replaced `forward` on the instance, as Accelerate does for autocast, call the view that is shown.

        It holds the function of the view that was shown when it came; that function becomes a call of the shown one's.
        """
        if self._is_pending:  # nobody has met its forward yet
            return
        held, wrapper = type(self).forward, self.__dict__.get("forward")
        if wrapper is self.__dict__.get(WRAPPER) or not isinstance(held, types.FunctionType):
            return
        self.__dict__[WRAPPER] = wrapper
        own = types.FunctionType(held.__code__, held.__globals__, held.__name__, held.__defaults__)
        record = record_of(self)
        known = [made for _, _, made in record.compiled] + list(self.__dict__.get("_compiled_views", {}).values())
        known += [made for selection in record.selections.values() for made in selection.compiled.values()]
        for made in known:
            if made.get("forward") is held:
                made["forward"] = own
        type(self).forward = own
        held.__code__ = _call_shown_forward.__code__

    def _apply(self, fn: Any, recurse: bool = True) -> LoraGraphModule:
        """What `.to()`, `.half()`, `.cuda()` and the like go through: the graph's literals must follow."""
        first = next((p for p in self.parameters() if p.is_floating_point()), None)
        if first is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
        device = first.device
        new = fn(torch.empty(0, dtype=first.dtype, device=device))
        dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()}
        if any(fn(torch.empty(0, dtype=dtype, device=device)).dtype != dtype for dtype in dtypes):
            self.follow_dtype(new.dtype)
        record = record_of(self)
        places = _places(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _lay_out_moved(self, places)
        record.originals = {name: fn(tensor) for name, tensor in record.originals.items()}
        for tensor in record.stashed.values():
            tensor.data = fn(tensor.data)
        record.selections.clear()
        if new.device != device:
            move_literals(self._all_graphs(), device, new.device)
            self.recompile()
        return self

    def follow_dtype(self, new: torch.dtype, *, casts_buffers: bool = True) -> None:
        """Let the graph's own dtypes be those of the model in the new dtype, which only the model can tell."""
        node = find_dtype_literal(self._all_graphs())
        if node is None:
            return
        record = record_of(self)
        if record.wide:
            raise GraphError(
                f"this tree is made to compute in another dtype than its parameters have, which cannot become {new}; "
                "convert the graph first: lora_fx.unflatten(gm.to(dtype), ...)"
            )
        views = record.trace.retrace(new, casts_buffers=casts_buffers) if record.trace is not None else None
        if views is None or set(views) != set(record.views):
            raise GraphError(
                f"the graph holds dtypes as literals ({node.format_node()}), and the model that could tell which of "
                f"them follow the parameters to {new} is gone. Convert the model and trace it again: "
                f"lora_fx.trace(model.to({new}), args); adapters take their own with inject(..., adapter_dtype=...)"
            )
        if {mode: as_traced(graph, ROLE) for mode, graph in record.views.items()} != record.traced:
            raise GraphError(
                "the graph was edited since it was traced, by hand or by a fold that untied a weight, and its dtypes "
                f"({node.format_node()}) can only follow as a new trace has them. Convert the model first: "
                f"lora_fx.trace(model.to({new}), args)"
            )
        for mode, view in views.items():
            record.views[mode] = over_own_tensors(self, view, suffix=f"{new}_{mode}")
        record.traced = {mode: as_traced(graph, ROLE) for mode, graph in record.views.items()}
        self._graph = record.views[self.training if self.training in views else None]
        if record.reinsert is not None:
            record.reinsert(self)
        self.recompile()

    def show_wide(self) -> None:
        """Go back to the views that compute in the parameters' own dtype, as they were; `recompile` is the caller's."""
        record = record_of(self)
        record.views, record.wide = dict(record.wide), {}
        record.traced = {mode: as_traced(graph, ROLE) for mode, graph in record.views.items()}
        self._graph = record.views[self.training if self.training in record.views else None]

    def _all_graphs(self) -> Iterator[fx.Graph]:
        yield from record_of(self).views.values()
        yield from record_of(self).wide.values()
        yield from (m.graph for m in self.modules() if isinstance(m, fx.GraphModule) and m is not self)

    def recompile_later(self) -> None:
        """`recompile`, when the graph is called, or its code asked for: a pass may be the first of several."""
        self._let_wrappers_follow()
        self.__dict__.pop("_compiled_views", None)
        self._compile_later()

    def _compile_later(self) -> None:
        record = record_of(self)
        # A lowering may refuse the graph; and torch.compile may hold a module whose forward was asked for.
        is_known = not self._is_pending and _forward_of(type(self)) is not nn.Module.forward
        if record.lowering is not None or is_known or _UNCOMPILED.get():
            self._compile()
            return
        record.views[self.training if self.training in record.views else None] = self._graph
        for name in _COMPILED:
            self.__dict__.pop(name, None)
        convention = getattr(self._graph._codegen, "pytree_info", None)
        if convention is not None:
            self._in_spec, self._out_spec = convention.in_spec, convention.out_spec
        unsharded_class(self).forward = PendingForward(self)  # type: ignore[assignment]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.compile`, which traces how `forward` is asked for."""
        _ = type(self).forward
        super().compile(*args, **kwargs)

    @property
    def _is_pending(self) -> bool:
        """Whether the shown graph is still to be compiled."""
        return isinstance(_forward_of(type(self)), PendingForward)

    @property
    def _code(self) -> str:
        """Where fx keeps the shown graph's code."""
        if "_code" not in self.__dict__ and self._is_pending:
            _ = type(self).forward  # which compiles it
        if "_code" in self.__dict__:
            code: str = self.__dict__["_code"]
            return code
        return self._graph.python_code("self").src  # somebody put a forward of theirs in its place

    @_code.setter
    def _code(self, code: str) -> None:
        self.__dict__["_code"] = code

    def recompile(self) -> Any:
        """Compile the shown graph anew; needed after editing it by hand, as for any GraphModule."""
        self._let_wrappers_follow()
        self.__dict__.pop("_compiled_views", None)
        return self._compile()

    def _compile(self) -> Any:
        if _UNCOMPILED.get():
            return None
        self._shown_code = shown = f"code {next(_numbers)}"
        record = self.__dict__.get("meta", {}).get(_META_KEY)
        if record is None:
            with code_to_run(self, self._graph):
                return super().recompile()
        mode = self.training if self.training in record.views else None
        record.views[mode] = self._graph
        written, lowering = as_written(self._graph), record.lowering
        is_training = mode is not False and any(ROLE in node.meta for node in self._graph.nodes)
        if lowering is not None and lowering.trains_only and not is_training:
            lowering = None
        known = next((made for graph, way, made in record.compiled if way == lowering and graph == written), None)
        if known is not None:
            # A code object of its own: torch.compile counts what it compiled by these.
            of = known["forward"]
            own_forward = types.FunctionType(of.__code__.replace(), of.__globals__, of.__name__, of.__defaults__)
            return self._install(known | {"forward": own_forward, "_shown_code": shown})
        graph, kind, own = self._graph, type(self), cast("type[LoraGraphModule]", unsharded_class(self))
        self._graph = graph if lowering is None else lowering(self, graph)
        self.__class__ = own  # fx writes its ways of calling into a class that it made, not into fully_shard's
        try:
            with code_to_run(self, self._graph):
                code = super().recompile()
        finally:
            self._graph, self.__class__ = graph, kind
        record.compiled.append((written, lowering, self._compiled()))
        del record.compiled[:-_KNOWN_GRAPHS]
        return code

    def _tensors_of(self, names: tuple[str, ...]) -> list[Any]:
        """What the compiled code reads its tensors with.

        torch.compile looks at which code is shown, too: where the graph is a part of what it compiles, it would go on
        with that of another mode, or of other adapters.
        """
        if torch.compiler.is_compiling():
            len(self._shown_code)
        return read(self, names)

    def __reduce__(self) -> Any:
        """Not to be pickled: fx would write one view's code, and read it again by running it.

        Raises:
            GraphError: always.
        """
        raise GraphError(
            "a graph module of lora_fx is not pickled: a pickle runs code when it is read, and holds one mode only. "
            "lora_fx.save_adapter(gm, directory) keeps what was trained, torch.save(gm.state_dict(), file) all else; "
            "trace and inject make the graph again"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraGraphModule:
        result: LoraGraphModule = copy_graph_module(self, memo)
        for graph in (*record_of(result).views.values(), *record_of(result).wide.values()):
            graph.owning_module = result
        _lay_out_moved(result, _places(self))
        result.recompile_later()
        return result


class PendingForward:
    """The `forward` of a class whose graph module is to be compiled when somebody asks for it."""

    def __init__(self, gm: LoraGraphModule) -> None:
        self._gm = weakref.ref(gm)

    def __get__(self, instance: LoraGraphModule | None, owner: type) -> Any:
        gm = self._gm() if instance is None else instance
        if gm is None:
            return nn.Module.forward
        with CODE.lock:  # a second thread waits here, and finds it compiled
            if _forward_of(type(gm)) is self:
                try:
                    gm._compile()
                except AttributeError as error:  # which Python would take for a missing `forward`
                    raise GraphError(
                        f"the graph reads what is no longer there ({error}); put that back, or take the nodes that "
                        "read it out of gm.graph"
                    ) from error
        forward = _forward_of(type(gm))
        return nn.Module.forward if forward is self else forward.__get__(instance, owner)


def _forward_of(kind: type) -> Any:
    """What stands in a class, or the first of its bases that has one, as `forward`, without asking for it."""
    return next(base.__dict__["forward"] for base in kind.__mro__ if "forward" in base.__dict__)


def _call_shown_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _places(gm: fx.GraphModule) -> dict[str, int]:
    """Where A and B of all adapters lie. A batched graph has them in stacks, a sharded one in parts."""
    adapters = record_of(gm).adapters.values() if record_of(gm).batched is None else ()
    named = {name: get_parameter(gm, name) for adapter in adapters for name in adapter.memory}
    return {name: p.data_ptr() for name, p in named.items() if type(p) is nn.Parameter and holds_values(p)}


def _lay_out_moved(gm: fx.GraphModule, before: dict[str, int]) -> None:
    """Bring A and B of an adapter together again where all of them have new memory, which no other graph shares yet."""
    for adapter in record_of(gm).adapters.values() if before else ():
        parameters = {name: get_parameter(gm, name) for name in adapter.memory}
        if all(name in before and parameter.data_ptr() != before[name] for name, parameter in parameters.items()):
            lay_out(parameters.values())


def record_of(gm: fx.GraphModule) -> GraphRecord:
    """The record of a graph module; an empty one for graphs that no pass has seen."""
    record = gm.meta.get(_META_KEY)
    return record if isinstance(record, GraphRecord) else GraphRecord(views={None: gm.graph})


def check_editable(gm: fx.GraphModule) -> None:
    """Raise GraphError for graphs whose adapters cannot be told apart any more: folded in place, or batched."""
    record = record_of(gm)
    if record.folded is not None:
        raise GraphError("this graph is folded in place; call lora_fx.unfold(gm), which brings its adapters back")
    if record.batched is not None:
        raise GraphError(
            "this graph comes from batch_adapters, which wrote its adapters as one; lora_fx.unbatch_adapters(gm) gives "
            "them back one by one"
        )


def trace_record(gm: fx.GraphModule) -> TraceRecord | None:
    """What `trace` remembered of making `gm`: example inputs and dimension names. None if it did not."""
    return record_of(checked_graph_module(gm)).trace


def adapter_names(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of the adapters that are injected in `gm` and not folded, in the order of injection."""
    record = record_of(checked_graph_module(gm))
    return () if record.folded is not None else tuple(record.adapters)


def checked_graph_module(gm: object) -> fx.GraphModule:
    """`gm` itself if it is a graph module.

    Raises:
        GraphError: with the call to make instead, for an ExportedProgram, a plain module, or anything else.
    """
    if isinstance(gm, fx.GraphModule):
        return gm
    if isinstance(gm, ExportedProgram):
        raise GraphError(
            "this is an ExportedProgram, which torch keeps read-only; "
            "pass its graph module, ep.module(), or trace the model with lora_fx.trace(model, args)"
        )
    if isinstance(gm, nn.Module) and isinstance(getattr(gm, "module", None), fx.GraphModule):
        raise GraphError(
            f"{type(gm).__name__} wraps a graph module, as DistributedDataParallel does; pass what it wraps: gm.module"
        )
    if isinstance(gm, nn.Module):
        raise GraphError(
            f"{type(gm).__name__} is a plain nn.Module, not a graph; "
            "trace it first: gm = lora_fx.trace(model, args, kwargs)"
        )
    raise GraphError(f"expected a torch.fx.GraphModule from lora_fx.trace(model, args), not {type(gm).__name__}")


def make_graph_module(
    views: dict[bool | None, fx.GraphModule], *, training: bool, trace: TraceRecord | None
) -> LoraGraphModule:
    """One module from graph modules of the same model, one per mode, or one under None for both."""
    shown = training if training in views else next(iter(views))
    source = views[shown]
    gm = LoraGraphModule(source, source.graph, class_name="LoraGraphModule")
    record = GraphRecord(trace=trace, views={shown: gm.graph})
    if not _UNCOMPILED.get():
        record.compiled.append((as_written(gm.graph), None, gm._compiled()))
    gm.meta.update(copy.copy(source.meta))
    gm.meta[_META_KEY] = record
    restore_what_fx_drops(source, gm)
    for mode, other in views.items():
        if mode != shown:
            record.views[mode] = adopt(gm, other, suffix="train" if mode else "eval")
    record.traced = {mode: as_traced(graph, ROLE) for mode, graph in record.views.items()}
    nn.Module.train(gm, training)
    return gm


def copy_sharing_tensors(gm: fx.GraphModule) -> LoraGraphModule:
    """A copy of the structure over the same storages, not compiled yet: `graph.finish` does that after the edits.

    Parameters are new `nn.Parameter` objects on the old storage, so that freezing the copy leaves the
    original's `requires_grad` alone; ties stay ties. Buffers and constants are the same tensors.
    """
    check_not_sharded(gm, "its graph cannot be copied to be changed")
    return _copy_over(gm, lambda parameter: parameter.detach())


def gathered(gm: LoraGraphModule) -> LoraGraphModule:
    """A copy over whole tensors of a graph module whose parameters are spread over processes; all of them call this."""
    settle(gm)
    result = _copy_over(gm, lambda parameter: whole(parameter.detach()))
    record = record_of(result)
    record.lowering = None if record.lowering is None else record.lowering.on_whole_tensors()
    return result


def _copy_over(gm: fx.GraphModule, tensor_of: Callable[[nn.Parameter], torch.Tensor]) -> LoraGraphModule:
    """A copy whose parameters are new ones over the tensor that `tensor_of` gives for each."""
    memo = share_tensors(gm)
    for parameter in gm.parameters():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(tensor_of(parameter), requires_grad=parameter.requires_grad)
    memo |= {id(tensor): tensor for tensor in record_of(gm).originals.values()}
    token = _UNCOMPILED.set(True)
    try:
        if isinstance(gm, LoraGraphModule):
            return LoraGraphModule.__deepcopy__(gm, memo)
        with quiet_deepcopy():
            clone = _from_foreign(gm, copy.deepcopy(gm, memo))
    finally:
        _UNCOMPILED.reset(token)
    copy_hooks(gm, clone)
    return clone


def _from_foreign(original: fx.GraphModule, clone: fx.GraphModule) -> LoraGraphModule:
    """A LoraGraphModule of one view, in the modes that the user's graph module and its parts are in."""
    restore_what_fx_drops(original, clone)
    flags = {name: module.training for name, module in original.named_modules()}
    gm = make_graph_module({None: clone}, training=original.training, trace=None)
    for name, module in gm.named_modules():
        module.training = flags.get(name, original.training)
    return gm


def copy_modules(views: dict[bool | None, fx.GraphModule]) -> dict[bool | None, fx.GraphModule]:
    """The graph modules over copies of their submodules, one copy for all views; the tensors stay the same objects."""
    memo: dict[int, Any] = {}
    for gm in views.values():
        memo |= share_tensors(gm) | {id(parameter): parameter for parameter in gm.parameters()}
    with quiet_deepcopy():
        return {mode: copy.deepcopy(gm, memo) for mode, gm in views.items()}


@contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection meanwhile.

    A pass makes thousands of small objects on top of the hundreds of thousands that tracing left; each full
    collection looks at all of them, which makes a linear pass quadratic in the size of the graph.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

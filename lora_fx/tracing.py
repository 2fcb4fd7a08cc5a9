"""From a model to a graph module: torch.export in both modes, or symbolic_trace where asked for."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .attributes import get_attribute, holds_values
from .call_form import CallForm
from .copying import quiet_deepcopy
from .errors import GraphError, warn
from .graph_module import LoraGraphModule, Retrace, TraceRecord, copy_modules, make_graph_module, record_of
from .inputs import (
    bound_inputs,
    checked_inputs,
    copied_inputs,
    dimension_names,
    doubled_batch,
    free_shapes,
    positional_names,
    spelled_out,
    without_names,
)
from .quantized import call_modules, keep_trainable, quantized_calls, shared_state, standing_in

logger = logging.getLogger("lora_fx")

# Of the largest value.
_ROUGHLY = 1e-2

_FUNCTIONS = threading.RLock()

Shapes = Mapping[str, Any] | tuple[Any, ...] | list[Any] | None


def trace(
    model: nn.Module,
    args: tuple[Any, ...] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Literal["auto"] | Shapes = "auto",
    tracer: Literal["export", "symbolic"] = "export",
) -> LoraGraphModule:
    """A trainable graph of `model`, with its inputs, its output types, and its own tensors.

    The model is traced in train and in eval mode; `.train()` and `.eval()` on the result do what they
    do on the model, bit for bit under the same seed (eager's fused fast paths apart). The result starts
    in the model's mode. Inputs of another form than the example's (a mask where None was, another flag) are
    refused when the graph is called.

    Args:
        model: any module that torch.export takes. It is left as it was.
        args, kwargs: example inputs. Copies are remembered for export and for checks.
        dynamic_shapes: "auto" leaves free every dimension that the model leaves free; None fixes all;
            anything else is torch.export's own form, and its `Dim` names are kept. A string stands for a free
            dimension of that name.
        tracer: "export", or "symbolic" for `torch.fx.symbolic_trace` (plain feed-forward modules).

    Raises:
        GraphError: if the model cannot be traced, with the reason and what to do about it.
    """
    _check_model(model)
    args, kwargs = checked_inputs(args, kwargs)
    if tracer == "symbolic":
        return _trace_symbolically(model, args, kwargs)
    if tracer != "export":
        raise GraphError(f"tracer={tracer!r} is unknown; use 'export' or 'symbolic'")
    with _noting_functions() as functions:
        traced = _traced(model, args, kwargs, without_names(dynamic_shapes))
    _warn_of_functions(functions)
    record = TraceRecord(
        args=copied_inputs(args),
        kwargs=copied_inputs(kwargs),
        dimension_names=dimension_names(traced.program, model, args, kwargs, dynamic_shapes),
        model_class=type(model).__name__,
        retrace=_retracer(model, traced.examples, traced.shapes),
        module_aliases=_module_aliases(model),
    )
    views = traced.views
    if any(quantized_calls(view, view.graph) for view in views.values()):
        views = copy_modules(views)  # the graph's own, as adapters go into them; the bits are the model's
        for module in {gm.get_submodule(str(n.target)) for gm in views.values() for n in quantized_calls(gm, gm.graph)}:
            keep_trainable(module)
    gm = make_graph_module(views, training=model.training, trace=record)
    record_of(gm).untraceable, record_of(gm).mixed = traced.untraceable, traced.mixed
    names = list(gm.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]
    form = CallForm(
        names,
        positional_names(model, len(names)),
        record.args,
        record.kwargs,
        free_numbers=dynamic_shapes is not None and dynamic_shapes != "auto",
    )
    gm.register_forward_pre_hook(form, with_kwargs=True)
    return gm


@dataclass(frozen=True)
class _Traced:
    """What tracing gave: the program of the shown mode, the graph of each, and how that was asked for."""

    program: ExportedProgram
    views: dict[bool | None, fx.GraphModule]
    untraceable: dict[bool, str]
    mixed: dict[bool, tuple[str, ...]]
    examples: tuple[tuple[Any, ...], dict[str, Any]]
    shapes: Any


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> _Traced:
    """The graphs of the model. A batch of one would be taken for a constant, so the tracer sees it doubled.

    Where doubled inputs do not fit the model, or the graph of a batch of two is not that of a batch of one, the
    batch stays one.
    """
    given = copied_inputs((args, kwargs))  # one tensor given twice would be one input of the graph
    doubled = doubled_batch(*given) if dynamic_shapes == "auto" else None
    if doubled is not None:
        with contextlib.suppress(GraphError):
            traced = _traced_with(model, doubled, dynamic_shapes)
            if _agrees(model, traced.views, given):
                return traced
    traced = _traced_with(model, given, dynamic_shapes)
    if doubled is not None:
        warn(
            f"{type(model).__name__} takes no larger batch than the example's one, or does something else with it: the "
            "graph takes batches of one only. Trace it with a larger example for the others"
        )
    return traced


def _traced_with(model: nn.Module, examples: tuple[tuple[Any, ...], dict[str, Any]], dynamic_shapes: Any) -> _Traced:
    program, shapes = _export_shown_mode(model, *examples, dynamic_shapes)
    views, untraceable = _both_modes(model, program, *examples, shapes)
    return _Traced(program, views, untraceable, _mixed(model, program, examples, shapes), examples, shapes)


def _agrees(
    model: nn.Module, views: dict[bool | None, fx.GraphModule], inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> bool:
    """Whether the graph of eval mode gives what the model gives there; both run as copies over copied buffers."""
    graph = views.get(False, views.get(None))
    if graph is None or not all(map(holds_values, model.parameters())):
        return True
    try:
        outputs = [_run_copy(module, inputs) for module in (model, graph)]
    except Exception as error:
        logger.info("the graph of a doubled batch was not compared: %s", _reason(error))
        return True
    pairs = zip(*outputs, strict=True)
    return all(_is_roughly(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def _run_copy(module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    with quiet_deepcopy():
        memo = {id(part): part for each in module.modules() for part in shared_state(each)}
        twin = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()} | memo)
    args, kwargs = copied_inputs(inputs)
    if not isinstance(twin, fx.GraphModule):
        twin.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return pytree.tree_leaves(twin(*args, **kwargs))


def _is_roughly(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for what kernels of another batch size may differ by; a graph of another branch differs by more."""
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape
    usual = a.isfinite() & b.isfinite()
    scale = float(a[usual].abs().max()) if bool(usual.any()) else 0.0
    return torch.allclose(a, b, rtol=0, atol=_ROUGHLY * scale, equal_nan=True)


def _both_modes(
    model: nn.Module, program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> tuple[dict[bool | None, fx.GraphModule], dict[bool, str]]:
    """The graph of each mode, or one under None where they are the same; and why a mode has none."""
    views: dict[bool | None, fx.GraphModule] = {model.training: _module_of(program, model)}
    try:
        views[not model.training] = _module_of(_export_other_mode(model, args, kwargs, shapes), model)
    except Exception as error:
        logger.info("no graph for training=%s: %s", not model.training, _reason(error))
        drawn = (
            ". Is it a layer that is left out at random? Set layerdrop to 0" if "data-dependent" in str(error) else ""
        )
        return views, {not model.training: _reason(error) + drawn}
    if _is_same_graph(views[True], views[False]):
        views = {None: views[model.training]}
    return views, {}


def _retracer(model: nn.Module, examples: tuple[tuple[Any, ...], dict[str, Any]], shapes: Any) -> Retrace:
    """What traces the model again in another dtype, as long as the caller keeps the model."""
    reference = weakref.ref(model)

    def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    def retrace(dtype: torch.dtype, *, casts_buffers: bool = True) -> dict[bool | None, fx.GraphModule] | None:
        original = reference()
        if original is None:
            return None
        memo: dict[int, Any] = {id(b): converted(b, dtype if casts_buffers else b.dtype) for b in original.buffers()}
        memo |= {id(part): part for module in original.modules() for part in shared_state(module)}
        memo |= {
            id(p): nn.Parameter(converted(p, dtype), requires_grad=False)
            for p in original.parameters()
            if id(p) not in memo
        }
        args, kwargs = pytree.tree_map(lambda x: converted(x, dtype) if isinstance(x, torch.Tensor) else x, examples)
        try:
            twin = copy.deepcopy(original, memo)
            program = _export(twin, args, kwargs, shapes)
        except Exception as error:
            raise GraphError(
                f"the model cannot be traced again in {dtype}, which the graph's own dtypes need: {_reason(error)}. "
                f"Convert the model yourself and trace that: lora_fx.trace(model.to({dtype}), args)"
            ) from error
        return _both_modes(twin, program, args, kwargs, shapes)[0]

    return retrace


def _check_model(model: object) -> None:
    if isinstance(model, ExportedProgram):
        raise GraphError(
            "this is an ExportedProgram and is traced already; pass its graph module, ep.module(), "
            "straight to find_sites, make_plan or inject"
        )
    if isinstance(model, fx.GraphModule):
        raise GraphError(
            "this is a torch.fx.GraphModule and is traced already; pass it straight to find_sites, make_plan or inject"
        )
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}; make a model of it" if isinstance(model, type) else type(model).__name__
        raise GraphError(f"trace takes a torch.nn.Module, not {what}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise GraphError(
                f"parameter {name!r} is not initialised (a lazy module); run the model once before tracing"
            )


def _export_shown_mode(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[ExportedProgram, Any]:
    """The program in the mode the model is in, and the dynamic shapes that worked."""
    candidates: list[Any] = [dynamic_shapes]
    if dynamic_shapes == "auto":
        bound = bound_inputs(model, args, kwargs)
        candidates = [
            free_shapes(bound, lambda i: True),
            free_shapes(bound, lambda i: i < 2),
            free_shapes(bound, lambda i: i == 0),
            None,
        ]
    first: Exception | None = None
    for shapes in candidates:
        try:
            program = _export(model, args, kwargs, shapes)
        except Exception as error:
            first = first or error
            continue
        if first is not None:
            warn(
                f"{type(model).__name__} could not be traced with every dimension free "
                f"({_reason(first)}); traced with {_spelled(shapes)}. Pass dynamic_shapes to decide"
            )
        return program, shapes
    assert first is not None
    raise GraphError(_untraceable_message(model, first)) from first


def _export_other_mode(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    with _in_mode(model, not model.training):
        return _export(model, args, kwargs, shapes)


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """As after `model.train(training)`; every module's own flag is as before afterwards."""
    flags = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _mixed(
    model: nn.Module, program: ExportedProgram, examples: tuple[tuple[Any, ...], dict[str, Any]], shapes: Any
) -> dict[bool, tuple[str, ...]]:
    """{the model's mode: modules that are in the other one}, if that shows in the graph (a frozen batch norm does)."""
    flags = {name: module.training for name, module in model.named_modules()}
    with _in_mode(model, model.training):
        names = tuple(name for name, module in model.named_modules() if module.training != flags[name])
        if not names or _is_same_graph(
            _module_of(program, model), _module_of(_export(model, *examples, shapes), model)
        ):
            return {}
    return {model.training: names}


@contextmanager
def _noting_functions() -> Iterator[list[type]]:
    """The autograd Functions that are called meanwhile: tracing writes their forward into the graph, and only that."""
    called: dict[type, None] = {}
    found: list[type] = []
    _FUNCTIONS.acquire()  # the class is everybody's: one thread at a time
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        called[cls] = None
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
        _FUNCTIONS.release()
        found.extend(called)


def _warn_of_functions(functions: list[type]) -> None:
    for function in functions:
        if function is torch.utils.checkpoint.CheckpointFunction:
            warn(
                "torch.utils.checkpoint(use_reentrant=True) runs under no_grad, and so does everything in its graph: "
                "no gradient will pass. Use use_reentrant=False"
            )
        elif function.__module__.partition(".")[0] != "torch":
            warn(
                f"{function.__qualname__} has a backward of its own, which a graph cannot hold: outputs are right, but "
                "gradients are those of its forward"
            )


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    with _quiet(), standing_in(model), spelled_out(model, kwargs):
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _module_of(program: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    with _quiet():
        gm: fx.GraphModule = program.module()
    _drop_dtype_checks(gm)
    call_modules(gm, model)
    return gm


def _drop_dtype_checks(gm: fx.GraphModule) -> None:
    """Let the graph run under autocast: torch.export checks that what is cast has the type that it had when traced.

    The casts themselves stay, so they give the type that they gave, whatever they are given.
    """
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        checks = [node for node in module.graph.nodes if node.target is torch.ops.aten._assert_tensor_metadata.default]
        floating = [node for node in checks if getattr(node.kwargs.get("dtype"), "is_floating_point", False)]
        for node in floating:
            module.graph.erase_node(node)
        if floating:
            module.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export's notes about its own internals; its errors still come through."""
    specialised = logging.getLogger("torch._export.non_strict_utils")
    level = specialised.level
    specialised.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        specialised.setLevel(level)


def _is_same_graph(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """Whether two exports of one model compute the same: equal code, bodies and constants."""
    if a.code != b.code:
        return False
    targets = [str(n.target) for n in a.graph.nodes if n.op == "get_attr"]
    for target in targets:
        left, right = get_attribute(a, target), get_attribute(b, target)
        if isinstance(left, fx.GraphModule):
            if not (isinstance(right, fx.GraphModule) and _is_same_graph(left, right)):
                return False
        elif left is not right and not _is_equal_constant(left, right):
            return False
    return True


def _is_equal_constant(a: Any, b: Any) -> bool:
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return both and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def _module_aliases(model: nn.Module) -> dict[str, str]:
    first: dict[nn.Module, str] = {}
    aliases: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (found := first.setdefault(module, name)) != name:
            aliases[name] = found
    return aliases


def _trace_symbolically(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LoraGraphModule:
    views: dict[bool | None, fx.GraphModule] = {}
    try:
        with _noting_functions() as functions:
            for mode in (True, False):
                with _in_mode(model, mode):
                    views[mode] = fx.symbolic_trace(model)
    except Exception as error:
        raise GraphError(
            f"torch.fx.symbolic_trace cannot trace {type(model).__name__}: {_reason(error)}. "
            "Use torch.export instead: lora_fx.trace(model, args, kwargs)"
        ) from error
    _warn_of_functions(functions)
    if views[True].code == views[False].code:
        views = {None: views[model.training]}
    leaves = pytree.tree_leaves((args, kwargs))
    names = tuple({0: "batch"} if isinstance(leaf, torch.Tensor) and leaf.ndim else {} for leaf in leaves)
    record = TraceRecord(
        copied_inputs(args), copied_inputs(kwargs), names, type(model).__name__, module_aliases=_module_aliases(model)
    )
    # The graph calls the model's own modules: copies keep `.train()` on the graph away from the model.
    gm = make_graph_module(copy_modules(views), training=model.training, trace=record)
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in gm.named_modules():
        module.training = flags.get(name, model.training)
    return gm


def _reason(error: BaseException) -> str:
    """The first telling line of another library's error, without its colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}"


def _spelled(shapes: Any) -> str:
    free = {spec for spec in map(str, pytree.tree_leaves(shapes)) if "AUTO" in spec} if shapes else set()
    return "the first dimensions free" if free else "all shapes fixed"


def _untraceable_message(model: nn.Module, error: Exception) -> str:
    hints = {
        "Cache'": "it returns a key/value cache; pass use_cache=False in the call, as in lora_fx.trace(model, args, "
        "{'use_cache': False}), or trace exporters.flat_cache_model(model) to keep the cache",
        "register a pytree": "the output or input is of a class unknown to torch: register it with "
        "torch.utils._pytree.register_dataclass",
        "data-dependent": "a branch depends on the values of a tensor: use torch.cond or torch.where there",
        "Could not guard": "a branch depends on the values of a tensor: use torch.cond or torch.where there",
        "Constraints violated": "a dimension that was said to be free is not: leave it out of "
        'dynamic_shapes, or use dynamic_shapes="auto"',
        "DataParallel": "trace the module inside: model.module",
    }
    text = f"{type(error).__name__}: {error}"
    hint = next((h for word, h in hints.items() if word in text), "try torch.export.export on it alone")
    return f"{type(model).__name__} cannot be traced by torch.export: {hint}. It says {_reason(error)}"

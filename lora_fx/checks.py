"""Two checks that find most silent faults, whatever causes them: of an injected graph, and of a folded one.

effect   moving B moves the output, in train and in eval, and A and B get gradients   inject(..., check=True)
fold     the folded graph computes what the adapted one does                          fold(..., check=True)
export   the written file computes what the graph does                                exporters.export_onnx, by default

They run on inputs: those that `trace` remembers, or others. Nothing is written into: perturbed parameters and buffers
stand in for the graph's own while it runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .adapter_files import KEY_OF_ROWS, KEYS, KEYS_OF_LOOKUPS
from .attributes import check_holds_values
from .errors import AdapterError, FoldError, GraphError, LoraFxWarning, TargetError, closest, warn
from .graph import finish
from .graph_module import check_editable, checked_graph_module, copy_sharing_tensors, record_of
from .tables import some_of

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
# What moves: B; of embeddings, whose B is random and whose A is zero, that; rows as they are.
_MOVED = (KEYS[1], KEYS_OF_LOOKUPS[0], KEY_OF_ROWS)
_STEPS = (0.1, 3.0)  # how far: at first little, so that nothing overflows


def check_effect(gm: fx.GraphModule, inputs: object = None, *, adapter_name: str = "default") -> None:
    """Whether an adapter is connected to the output, in both modes that the graph has.

    Each of its parameters gets a gradient, and moving B moves the output. One module that has no effect on these
    inputs, an expert that no token went to, say, makes a warning; an adapter that has none at all, an error.

    Args:
        gm: an injected graph, in which the adapter counts; it is left as it was.
        inputs: positional inputs as a tuple, inputs by name as a mapping, or a tensor; None for those that
            `lora_fx.trace` remembers.

    Raises:
        TargetError: if it has no effect.
        GraphError: if there are no inputs, or the graph does not run with them.
        AdapterError: if there is no such adapter.
    """
    gm = checked_graph_module(gm)
    check_editable(gm)
    record = record_of(gm)
    if adapter_name not in record.adapters:
        raise AdapterError(f"there is no adapter {adapter_name!r} to check.{closest(adapter_name, record.adapters)}")
    if adapter_name not in record.active:
        raise GraphError(
            f"adapter {adapter_name!r} does not count at the moment, so it has no effect; let it count first: "
            f"set_adapters(gm, {{{adapter_name!r}: 1.0}})"
        )
    check_holds_values(gm, "whether the adapter has an effect cannot be seen")
    arguments = _inputs_of(gm, inputs)
    members = record.adapters[adapter_name].members
    own = {attribute for member in members for attribute in member.attributes}
    names = [name for name, _ in gm.named_parameters() if name in own]
    last = {attribute for member in members for key, attribute in member.tensors.items() if key in _MOVED}
    moved = [name for name in names if name in last]
    dead: set[str] = set(names)
    for training in (False, True):
        mode = "train()" if training else "eval()"
        if training in record.untraceable:
            continue
        for step in _STEPS:
            outputs_move, without_gradient = _perturbed(gm, arguments, names, moved, step, training=training)
            if outputs_move:
                break
        if not outputs_move or len(without_gradient) == len(names):
            raise TargetError(
                f"adapter {adapter_name!r} has no effect in {mode}: moving B of {some_of(map(repr, moved), 2)} leaves "
                "every output of the model as it is. What it adapts is not used, or not with these inputs; "
                "find_sites(gm) lists what can be adapted, and check_effect(gm, inputs) takes other inputs"
            )
        dead &= without_gradient
    if dead:
        warn(
            f"{some_of(map(repr, sorted(dead)), 3)} of adapter {adapter_name!r} have no effect on these inputs: "
            "experts that nothing was sent to, say, or modules that no output depends on, which would not be trained"
        )


def _perturbed(
    gm: fx.GraphModule, inputs: Inputs, names: list[str], moved: list[str], step: float, *, training: bool
) -> tuple[bool, set[str]]:
    """(whether the output moves, the parameters without a gradient) if all of `moved` change by `step`."""
    shown = _shown(gm, training=training)
    parameters = dict(shown.named_parameters())
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, torch.Tensor] = {}
    for name in names:
        value = parameters[name].detach()
        if name in moved:
            noise = torch.randn(value.shape, generator=generator) * step
            value = value + noise.to(value.device, value.dtype)
        changed[name] = value.clone().requires_grad_()
    plain = _run(shown, {}, inputs, with_gradient=False)
    outputs = _run(shown, changed, inputs, with_gradient=True)
    pairs = [(a, b) for a, b in zip(plain, outputs, strict=True) if a.is_floating_point()]
    moves = any(not torch.equal(a, b.detach()) for a, b in pairs)
    used = [output for _, output in pairs if output.requires_grad]
    if not used:
        return moves, set(names)
    weights = [torch.randn(output.shape, generator=generator).to(output.device) for output in used]
    total = torch.stack([(output.float() * weight).sum() for output, weight in zip(used, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, list(changed.values()), allow_unused=True)
    return moves, {n for n, g in zip(changed, gradients, strict=True) if g is None or not bool(g.any())}


def _shown(gm: fx.GraphModule, *, training: bool) -> fx.GraphModule:
    """A copy in one mode; the caller's graph stays in its own."""
    copy = copy_sharing_tensors(gm)
    finish(copy)
    with warnings.catch_warnings():  # a graph that was traced in one mode says so, to whoever trains it
        warnings.simplefilter("ignore", LoraFxWarning)
        return copy.train(training)


def _run(
    gm: fx.GraphModule, parameters: Mapping[str, torch.Tensor], inputs: Inputs, *, with_gradient: bool
) -> list[torch.Tensor]:
    """The tensors that the graph returns, with these parameters, and copies of the inputs and of the buffers."""
    own = lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
    args, kwargs = pytree.tree_map(own, inputs)
    tensors = dict(parameters) | {name: buffer.clone() for name, buffer in gm.named_buffers()}
    devices = {p.device for p in gm.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)), torch.set_grad_enabled(with_gradient):
            torch.manual_seed(0)
            outputs = torch.func.functional_call(gm, tensors, args, kwargs)
    except Exception as error:
        raise GraphError(
            f"the graph does not run with the inputs to check it with: {type(error).__name__}: {error}; pass others"
        ) from error
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _inputs_of(gm: fx.GraphModule, inputs: object) -> Inputs:
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    trace = record_of(gm).trace
    if inputs is not None or trace is None:
        raise GraphError(
            "a check runs the graph, and this one remembers no inputs, since lora_fx.trace did not make it; pass some: "
            "check_effect(gm, (x,)), check_fold(adapted, folded, (x,))"
            if inputs is None
            else f"inputs={inputs!r} must be a tuple, a mapping by name, or a tensor"
        )
    return trace.args, trace.kwargs


def check_fold(adapted: fx.GraphModule, folded: fx.GraphModule, inputs: object = None) -> float:
    """Whether a folded graph computes what the adapted one does, in eval().

    Args:
        inputs: as for `check_effect`.

    Returns:
        The largest error of any output, relative to its largest value.

    Raises:
        FoldError: if it is more than rounding makes, `fold_bound`.
        GraphError: as `check_effect`.
    """
    arguments = _inputs_of(adapted, inputs)
    expected, actual = (
        _run(_shown(each, training=False), {}, arguments, with_gradient=False) for each in (adapted, folded)
    )
    error, bound = output_error(expected, actual), max(fold_bound(folded), _inner_bound(folded))
    if not error <= bound:
        raise FoldError(f"{_why(error, bound)}; nothing was changed. Fold with accumulate=torch.float64, or report it")
    return error


def _inner_bound(gm: fx.GraphModule) -> float:
    """`fold_bound` of the coarsest type that something inside is computed in: under autocast, say."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    values = (node.meta.get("val") for graph in graphs for node in graph.nodes)
    halves = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype in (torch.float16, torch.bfloat16)}
    return max((32 * torch.finfo(dtype).eps for dtype in halves), default=0.0)


def _why(error: float, bound: float) -> str:
    if math.isnan(error):
        return "the adapted graph's outputs hold nothing but NaN and Inf, so the fold cannot be checked"
    if math.isinf(error):
        return "the folded graph's outputs hold NaN, Inf or masked values elsewhere than the adapted one's"
    return f"the folded graph differs from the adapted one by {error:.3g} of the largest value, allowed {bound:.3g}"


def output_error(expected: Any, actual: Any) -> float:
    """The largest error of any output, relative to its largest value.

    Returns:
        Infinity if NaN, Inf or masked values (the dtype's largest) stand at other places; NaN if there is nothing
        else to compare.
    """
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    errors = [_tensor_error(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return max((error for error in errors if not math.isnan(error)), default=math.nan)


def fold_bound(model: torch.nn.Module) -> float:
    """What a right fold may differ by: rounding of each weight, carried through a deep model."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return (32 if dtype in (torch.float16, torch.bfloat16) else 1024) * torch.finfo(dtype).eps


def _tensor_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    largest = torch.finfo(expected.dtype).max
    usual = expected.abs() < largest  # NaN is below nothing
    if not torch.equal(usual, actual.abs() < largest):
        return math.inf
    if not torch.equal(expected[~usual].nan_to_num(0.0), actual[~usual].nan_to_num(0.0)):
        return math.inf
    if not bool(usual.any()):
        return math.nan
    a, b = expected[usual].double(), actual[usual].double()
    return float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)

"""Example inputs: what forward calls them, which of their dimensions are free, and what those are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from .errors import GraphError


def checked_inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as a tuple and a dictionary, whatever the caller gave them as.

    Raises:
        GraphError: if they are neither.
    """
    args = (args,) if isinstance(args, torch.Tensor) else args
    if not isinstance(args, (tuple, list)):
        raise GraphError(f"args={args!r} must be a tuple of example inputs, or one tensor")
    if not isinstance(kwargs, Mapping | None) or any(not isinstance(name, str) for name in kwargs or {}):
        raise GraphError(f"kwargs={kwargs!r} must map names of inputs to example inputs")
    return tuple(args), dict(kwargs or {})


def copied_inputs(value: Any) -> Any:
    """The same structure with copies of its tensors, each of its own."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(copied, value)


def bound_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """{parameter of forward: what it is given}.

    Raises:
        GraphError: if forward takes no such inputs.
    """
    try:
        with spelled_out(model, kwargs):
            return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise GraphError(
            f"the example inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: "
            f"{error}. Call lora_fx.trace(model, args, kwargs) with inputs that model(*args, **kwargs) takes"
        ) from error


def positional_names(model: nn.Module, count: int) -> list[str]:
    """What the model's forward calls its first `count` positional inputs; those that `*args` collects are numbered."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
    return names[:count]


@contextmanager
def spelled_out(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let forward's signature name what `**kwargs` would collect, for which torch.export takes no dynamic shapes."""
    signature = inspect.signature(model.forward)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [name for name in kwargs if name not in signature.parameters]
    if len(parameters) == len(signature.parameters) or not extra:
        yield
        return
    own, original = model.__dict__.get("forward"), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward.__signature__ = signature.replace(parameters=[*parameters, *keywords])  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def free_shapes(bound: dict[str, Any], is_free: Callable[[int], bool]) -> dict[str, Any]:
    """torch.export's dynamic_shapes that leave the dimensions free that `is_free` names, where the model does."""

    def shapes(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {i: Dim.AUTO for i in range(leaf.ndim) if is_free(i)}

    return {name: pytree.tree_map(shapes, value) for name, value in bound.items()}


def without_names(dynamic_shapes: Any) -> Any:
    """The caller's dynamic_shapes as torch.export takes them: a name in place of a `Dim` asks for a free dimension."""
    if dynamic_shapes == "auto":
        return dynamic_shapes
    if isinstance(dynamic_shapes, str):
        raise GraphError(f'dynamic_shapes={dynamic_shapes!r} must be "auto", None, or what torch.export takes')
    return pytree.tree_map(lambda spec: Dim.DYNAMIC if isinstance(spec, str) else spec, dynamic_shapes)


def doubled_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The inputs with their first dimension doubled, if it is one everywhere."""
    leaves = pytree.tree_leaves((args, kwargs))
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}
    if sizes != {1}:
        return None

    def doubled(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf

    twice: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(doubled, (args, kwargs))
    return twice


def dimension_names(
    program: ExportedProgram,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
) -> tuple[dict[int, str], ...]:
    """A name for each free dimension: the caller's `Dim` name, or batch, sequence, height, width, ..."""
    specs = program.graph_signature.input_specs
    inputs = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    given = _given_names(model, args, kwargs, dynamic_shapes)
    leaves = pytree.tree_leaves((args, kwargs))
    by_symbol: dict[str, str] = {}
    sizes: dict[str, int] = {}
    named: list[dict[int, str]] = []
    for position, (node, leaf) in enumerate(zip(placeholders, leaves, strict=True)):
        value = node.meta.get("val")
        names: dict[int, str] = {}
        for i, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if is_concrete_int(size):
                continue
            name = given.get((position, i)) or _usual_name(value, i, node.name)
            # Two symbols may be one dimension to the user (ids and mask); sizes that differ are two.
            name = name if sizes.get(name, leaf.shape[i]) == leaf.shape[i] else f"{node.name}_dim_{i}"
            names[i] = by_symbol.setdefault(str(size), name)
            sizes[names[i]] = leaf.shape[i]
        named.append(names)
    return tuple(named)


def _usual_name(value: torch.Tensor, dimension: int, input_name: str) -> str:
    if dimension == 0:
        return "batch"
    if dimension == 1 and (not value.is_floating_point() or value.ndim == 3):
        return "sequence"
    if value.ndim == 4 and dimension >= 2:
        return ("height", "width")[dimension - 2]
    return f"{input_name}_dim_{dimension}"


def _given_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> dict[tuple[int, int], str]:
    """{(flattened input, dimension): name} of the `Dim`s and strings in the caller's dynamic_shapes."""
    if dynamic_shapes is None or dynamic_shapes == "auto":
        return {}
    bound = bound_inputs(model, args, kwargs)
    if not isinstance(dynamic_shapes, Mapping):
        dynamic_shapes = dict(zip(bound, dynamic_shapes, strict=True))
    leaves: list[Any] = []
    for name, value in bound.items():
        leaves.extend(_specs(value, dynamic_shapes.get(name)))
    names: dict[tuple[int, int], str] = {}
    for position, spec in enumerate(leaves):
        is_shape = isinstance(spec, (Mapping, list, tuple))  # an int input has a single hint
        entries = () if not is_shape else spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        names |= {(position, i): dim.__name__ for i, dim in entries if isinstance(dim, Dim)}
        names |= {(position, i): dim for i, dim in entries if isinstance(dim, str)}
    return names


def _specs(value: Any, spec: Any) -> list[Any]:
    """The part of a dynamic_shapes tree that belongs to each leaf of `value`."""
    children, _ = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if len(children) == 1 and children[0] is value:
        return [spec]
    if spec is None:
        return [None] * len(pytree.tree_leaves(value))
    parts = spec.values() if isinstance(spec, Mapping) else spec
    return [leaf for child, part in zip(children, parts, strict=True) for leaf in _specs(child, part)]

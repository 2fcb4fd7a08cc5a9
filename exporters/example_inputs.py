"""Example inputs of a graph, the names of their free dimensions, and the same inputs at other sizes.

A leaf is one entry of the flattened (args, kwargs), in torch's pytree order; keyword arguments are
brought into the order of the forward's signature first, so that leaves, placeholders of the exported
program and inputs of the ONNX file all count alike.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.export import Dim
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import ExportError

from .eval_mode import run_torch
from .text import reason


@dataclass(frozen=True)
class Example:
    """Inputs of a graph.

    Attributes:
        args, kwargs: what the graph is called with.
        dimensions: per leaf, {free dimension: its name}.
        specs: per leaf, {free dimension: what torch.export shall be told about it}.
        meant: names given on purpose: dimensions that share one are one, also where torch finds two.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dimensions: tuple[dict[int, str], ...]
    specs: tuple[dict[int, Any], ...]
    meant: frozenset[str] = frozenset()

    @property
    def leaves(self) -> list[Any]:
        """The flattened (args, kwargs)."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def tensors(self) -> list[tuple[torch.Tensor, dict[int, str]]]:
        """The tensor leaves with their free dimensions."""
        both = zip(self.leaves, self.dimensions, strict=True)
        return [(leaf, names) for leaf, names in both if isinstance(leaf, torch.Tensor)]

    def sizes(self) -> dict[str, int]:
        """The size of each named dimension; of `rows`, where only `2*rows` is there."""
        named = [(linear(name), leaf.shape[i]) for leaf, names in self.tensors() for i, name in names.items()]
        return {form.base: (size - form.offset) // form.factor for form, size in named}

    def resized(self, sizes: Mapping[str, int]) -> Example:
        """The same inputs with other sizes of named dimensions; tensors are repeated or cut along them."""
        leaves = self.leaves
        for position, names in enumerate(self.dimensions):
            for dimension, form in [(i, linear(name)) for i, name in names.items()]:
                if form.base in sizes:
                    size = form.factor * sizes[form.base] + form.offset
                    leaves[position] = _resized(leaves[position], dimension, size)
        _, spec = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return replace(self, args=args, kwargs=kwargs)

    def on(self, device: torch.device) -> Example:
        """The same inputs on another device."""
        move = lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf
        args, kwargs = pytree.tree_map(move, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Linear:
    """The size of a dimension that depends on another: factor * base + offset."""

    base: str
    factor: int = 1
    offset: int = 0


def linear(name: str) -> Linear:
    """What torch's spelling of a derived dimension means (`2*rows`, `rows + 3`); any other name is its own base."""
    found = re.fullmatch(r"(?:([1-9]\d*)\*)?([^\W\d]\w*)(?: ([+-]) (\d+))?", name)
    if found is None:
        return Linear(name)
    return Linear(found[2], int(found[1] or 1), int(f"{found[3] or ''}{found[4] or 0}"))


def _resized(tensor: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Cut, or repeat. Repeats of measured values shrink a little, since equal ones would make ties; masks do not."""
    old = tensor.shape[dimension]
    if size <= old:
        return tensor.narrow(dimension, 0, size).clone()
    if old == 0:
        shape = [size if i == dimension else n for i, n in enumerate(tensor.shape)]
        return tensor.new_ones(shape)
    varies = tensor.is_floating_point() and len(set(tensor.flatten()[:64].tolist())) > 8
    copies = [tensor * (1 - k / 64) if varies else tensor for k in range(-(-size // old))]
    return torch.cat(copies, dimension).narrow(dimension, 0, size)


def make_example(
    gm: fx.GraphModule,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Example:
    """The inputs to trace `gm` with: the caller's, or those that `lora_fx.trace` remembered.

    Args:
        dynamic_shapes: None for the remembered dimensions, "auto" for every dimension that the graph
            leaves free, or torch.export's form, where a string stands for a free dimension of that name.

    Raises:
        ExportError: if there is nothing to go by, or it does not fit the graph's signature.
    """
    record = lora_fx.trace_record(gm)
    if args is None and kwargs is None:
        if record is None:
            raise ExportError(
                "this graph remembers no example inputs, since lora_fx.trace did not make it; pass them: "
                'export_onnx(gm, path, args=(x,), dynamic_shapes={"x": {0: "batch"}})'
            )
        args, kwargs = record.args, record.kwargs
    _check_call(args, kwargs)
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    kwargs = _in_signature_order(gm, args, dict(kwargs or {}))
    leaves = pytree.tree_leaves((args, kwargs))
    meant: set[str] = set()
    if dynamic_shapes is not None:
        specs = _caller_specs(gm, args, kwargs, dynamic_shapes)
        meant = _spoken_names(gm, args, kwargs, specs)
        dimensions = _dimension_names(gm, args, kwargs, specs)
    elif record is not None and len(record.dimension_names) == len(leaves):
        dimensions = _record_names(gm, record, args, kwargs)
        specs = tuple(dict.fromkeys(names, Dim.AUTO) for names in dimensions)
        meant = {name for names in dimensions for name in names.values()}
    else:
        dimensions = specs = tuple({} for _ in leaves)
    return Example(args, kwargs, dimensions, specs, frozenset(meant))


def _check_call(args: Any, kwargs: Any) -> None:
    if not isinstance(args, tuple | list | torch.Tensor | None):
        raise ExportError(f"args={args!r} must be a tuple of the graph's positional inputs, such as (x,)")
    if not isinstance(kwargs, Mapping | None) or not all(isinstance(name, str) for name in kwargs or ()):
        raise ExportError(f'kwargs={kwargs!r} must be a dict of the graph\'s named inputs, such as {{"x": x}}')


def with_dimensions(gm: fx.GraphModule, args: Any, kwargs: Any, names: Iterable[dict[int, str]]) -> Example:
    """Inputs whose tensor leaves have the free dimensions `names`, in order.

    Raises:
        ExportError: if there are more or fewer tensors than entries in `names`.
    """
    _check_call(args, kwargs)
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    kwargs = _in_signature_order(gm, args, dict(kwargs))
    leaves = pytree.tree_leaves((args, kwargs))
    wanted = list(names)
    count = sum(isinstance(leaf, torch.Tensor) for leaf in leaves)
    if count != len(wanted):
        raise ExportError(
            f"the inputs hold {count} tensors, but the file takes {len(wanted)}; pass what the graph was "
            "exported with, as (args, kwargs)"
        )
    rest = iter(wanted)
    dimensions = tuple(next(rest) if isinstance(leaf, torch.Tensor) else {} for leaf in leaves)
    return Example(args, kwargs, dimensions, dimensions)


def without_ones(example: Example) -> Example:
    """The same inputs, with free dimensions of size 0 or 1 made 2: tracers take such sizes for constants."""
    return example.resized({name: 2 for name, size in example.sizes().items() if size < 2})


def second_example(gm: fx.GraphModule, example: Example) -> tuple[Example | None, str]:
    """Inputs at other sizes that `gm` still takes, or None; and a line that says which or why not."""
    sizes = example.sizes()
    if not sizes:
        return None, "all dimensions are static: there is no second shape to try"
    first: Exception | None = None
    for wanted in _other_sizes(example, sizes):
        other = example.resized(wanted)
        try:
            run_torch(gm, other.args, other.kwargs)
        except Exception as error:  # a size that this model does not take; the next one may do
            first = first or error
            continue
        return other, ", ".join(f"{name} {sizes[name]} -> {size}" for name, size in wanted.items())
    assert first is not None
    return None, f"no other size of {', '.join(sizes)} runs in torch ({reason(first, 120)})"


def _other_sizes(example: Example, sizes: dict[str, int]) -> list[dict[str, int]]:
    """What to try, best first: everything moved by a little, doubled, halved; then the batch alone."""
    leading = {linear(names[0]).base for _, names in example.tensors() if 0 in names}
    batch = {name: size + 1 for name, size in sizes.items() if name in leading}
    rest = {name: size for name, size in sizes.items() if name not in leading}
    moved = [
        {name: size + 2 for name, size in rest.items()},
        {name: 2 * size for name, size in rest.items()},
        {name: max(size // 2, 1) for name, size in rest.items()},
        {},
    ]
    tries = [batch | other for other in moved] + [other for other in moved if other]
    return [wanted for i, wanted in enumerate(tries) if wanted and wanted not in tries[:i]]


def torch_export_shapes(gm: fx.GraphModule, example: Example) -> dict[str, Any] | None:
    """`example.specs` in the form that torch.export wants: {argument name: tree of specs}."""
    if not any(example.specs):
        return None
    _, spec = pytree.tree_flatten((example.args, example.kwargs))
    per_leaf = [
        specs if isinstance(leaf, torch.Tensor) else None
        for leaf, specs in zip(example.leaves, example.specs, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(per_leaf, spec)
    return dict(inspect.signature(gm.forward).bind(*args, **kwargs).arguments)


def _bound(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(gm.forward)
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ExportError(
            f"the example inputs do not fit the graph's forward{signature}: {error}. "
            "Pass args=(...) and kwargs={...} as the graph is called"
        ) from error


def _in_signature_order(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    order = list(_bound(gm, args, kwargs))
    rank = {name: i for i, name in enumerate(order)}
    return dict(sorted(kwargs.items(), key=lambda item: rank.get(item[0], len(rank))))


def _record_names(
    gm: fx.GraphModule, record: lora_fx.TraceRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[int, str], ...]:
    """The record's names, which follow its own order of keyword arguments, in ours."""
    _, spec = pytree.tree_flatten((record.args, record.kwargs))
    marks = pytree.tree_unflatten(list(range(len(record.dimension_names))), spec)
    ours = (marks[0], {name: marks[1][name] for name in kwargs if name in marks[1]})
    order = pytree.tree_leaves(ours)
    if len(order) != len(record.dimension_names):
        raise ExportError(
            f"the inputs given ({', '.join(kwargs) or 'positional'}) are not those the graph was traced with "
            f"({', '.join(record.kwargs) or 'positional'}); pass dynamic_shapes= as well"
        )
    return _told_apart(gm, args, kwargs, [record.dimension_names[i] for i in order])


def _caller_specs(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[dict[int, Any], ...]:
    bound = _bound(gm, args, kwargs)
    if dynamic_shapes == "auto":
        leaves = pytree.tree_leaves(tuple(bound.values()))
        return tuple(
            dict.fromkeys(range(leaf.ndim), Dim.AUTO) if isinstance(leaf, torch.Tensor) else {} for leaf in leaves
        )
    if not isinstance(dynamic_shapes, Mapping):
        if not isinstance(dynamic_shapes, tuple | list) or len(dynamic_shapes) != len(bound):
            raise ExportError(
                f"dynamic_shapes={dynamic_shapes!r} does not fit the arguments {', '.join(bound)}; "
                'give one entry per argument, as in {"' + next(iter(bound), "x") + '": {0: "batch"}}'
            )
        dynamic_shapes = dict(zip(bound, dynamic_shapes, strict=True))
    unknown = [name for name in dynamic_shapes if name not in bound]
    if unknown:
        raise ExportError(
            f"dynamic_shapes names {unknown[0]!r}, but the graph is called with {', '.join(map(repr, bound))}"
        )
    return tuple(spec for name, value in bound.items() for spec in _leaf_specs(value, dynamic_shapes.get(name), name))


def _leaf_specs(value: Any, spec: Any, where: str) -> list[dict[int, Any]]:
    """The part of a dynamic_shapes tree that belongs to each leaf of `value`."""
    if isinstance(value, torch.Tensor):
        if not isinstance(spec, Mapping | tuple | list | None):
            raise ExportError(
                f'dynamic_shapes of {where!r} is {spec!r}; write {{0: "batch"}}, or None for a fixed shape'
            )
        entries = dict(spec) if isinstance(spec, Mapping) else dict(enumerate(spec or ()))
        wrong = [i for i in entries if not isinstance(i, int) or not -value.ndim <= i < value.ndim]
        if wrong:
            raise ExportError(f"dynamic_shapes of {where!r} names dimension {wrong[0]!r}; it has {value.ndim}")
        free = {i % value.ndim: entry for i, entry in entries.items() if _is_free(entry)}
        return [free]
    children, _ = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if len(children) == 1 and children[0] is value:
        return [{}]
    if spec is None:
        return [{} for _ in pytree.tree_leaves(value)]
    parts = list(spec.values()) if isinstance(spec, Mapping) else list(spec) if isinstance(spec, tuple | list) else []
    if len(parts) != len(children):
        raise ExportError(
            f"dynamic_shapes of {where!r} needs one entry for each of its {len(children)} inputs, not {spec!r}"
        )
    return [leaf for child, part in zip(children, parts, strict=True) for leaf in _leaf_specs(child, part, where)]


def _is_free(entry: Any) -> bool:
    return not (entry is None or isinstance(entry, int) or entry is Dim.STATIC)


def _spoken_names(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], specs: tuple[dict[int, Any], ...]
) -> set[str]:
    """The names in the caller's dynamic_shapes.

    Raises:
        ExportError: if one of them stands for different sizes.
    """
    known: dict[str, tuple[int, str]] = {}
    for (label, leaf), spec in zip(_labelled(gm, args, kwargs), specs, strict=True):
        for i, name in [(i, _spoken_name(entry)) for i, entry in spec.items() if _spoken_name(entry)]:
            size, where = known.setdefault(name, (leaf.shape[i], label))
            if size != leaf.shape[i]:
                raise ExportError(
                    f"dimension {name!r} is {size} in {where!r} and {leaf.shape[i]} in {label!r}; "
                    "give them two names, or inputs of one size"
                )
    return set(known)


def _dimension_names(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], specs: tuple[dict[int, Any], ...]
) -> tuple[dict[int, str], ...]:
    """The caller's own names, else batch for a leading dimension and `<input>_dim_<i>` for the others."""
    spoken = [{i: _spoken_name(entry) for i, entry in spec.items()} for spec in specs]
    batch = "" if any("batch" in names.values() for names in spoken) else "batch"
    return _told_apart(
        gm, args, kwargs, [{i: name or (batch if i == 0 else "") for i, name in names.items()} for names in spoken]
    )


def _spoken_name(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    return entry.__name__ if isinstance(entry, Dim) else ""


def _told_apart(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], names: Iterable[Mapping[int, str]]
) -> tuple[dict[int, str], ...]:
    """`names`, with `<input>_dim_<i>` where there is none, or where it is another size's name already."""
    sizes: dict[str, int] = {}
    told: list[dict[int, str]] = []
    for (label, leaf), usual in zip(_labelled(gm, args, kwargs), names, strict=True):
        shape = leaf.shape if isinstance(leaf, torch.Tensor) else ()
        own = {i: f"{label}_dim_{i}" for i in usual if i < len(shape)}
        told.append({i: usual[i] if _is_size(sizes, usual[i], shape[i]) else name for i, name in own.items()})
    return tuple(told)


def _is_size(sizes: dict[str, int], name: str, size: int) -> bool:
    """Whether `name` is free for a dimension of that size, which it then stands for."""
    return bool(name) and sizes.setdefault(name, size) == size


def _labelled(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The leaves with the names of the arguments that they come from."""
    return [(_spelled(path), leaf) for path, leaf in pytree.tree_flatten_with_path(_bound(gm, args, kwargs))[0]]


def _spelled(path: tuple[Any, ...]) -> str:
    return "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)

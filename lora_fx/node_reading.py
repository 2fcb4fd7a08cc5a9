"""Running a graph node by node, to hear what its sites take in, without changing anything of it.

The graph runs as a copy in eval mode, over the same parameters and copies of the buffers. Graphs within it (bodies of
higher-order ops) run in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.fx._pytree as fx_pytree
from torch import fx
from torch.utils import _pytree as pytree

from .applications import Application, read_applications
from .call_form import CallForm
from .errors import ConfigError, GraphError, TargetError, closest
from .graph_module import LoraGraphModule, checked_graph_module, copy_sharing_tensors
from .ops.use import argument, operands_of, writer_of

# Ops whose inputs are vectors of `in` elements along one axis.
_VECTOR_OPS = ("linear", "matmul", "addmm", "mm", "mv", "einsum")

Mask = Callable[[Any], torch.Tensor | None]


class Sink(Protocol):
    """What takes a site's inputs, row by row."""

    def add(self, rows: torch.Tensor) -> None:
        """Take (n, in) more rows, in float32 or wider."""


@dataclass(frozen=True)
class Listener:
    """What hands the value of `x`, at the time a site takes it in, to the site's sink."""

    path: str
    x: fx.Node
    axis: int
    sink: Sink

    def hear(self, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Pass on the vectors of `value`; with a mask (batch, tokens), those of the tokens that count."""
        vectors = value.movedim(self.axis, -1) if value.ndim > 1 else value  # (..., in)
        rows = vectors.reshape(-1, vectors.shape[-1])
        if mask is not None and vectors.shape[:-1] in (mask.shape, (mask.numel(),)):
            rows = rows[mask.reshape(-1).to(rows.device)]
        if not len(rows):
            return
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not bool(torch.isfinite(rows).all()):
            raise ConfigError(
                f"{self.path!r} takes in NaN or infinite elements on these data; mend the batches, or the model's dtype"
            )
        with torch.autocast(rows.device.type, enabled=False):  # the model's own may be on around the site
            self.sink.add(rows)


S = TypeVar("S", bound=Sink)


class Reading(Generic[S]):
    """Feeds what sites take in to their sinks. Sites that take in the same values share one sink.

    Args:
        gm: the graph module.
        groups: {site path: the paths whose inputs it takes together}.
        make: a sink for the sites of these paths.
    """

    def __init__(
        self, gm: fx.GraphModule, groups: Mapping[str, Sequence[str]], make: Callable[[Sequence[str]], S]
    ) -> None:
        self._subject = Subject(gm)
        found = self._subject.applications_of([path for group in groups.values() for path in group])
        alike: dict[tuple[Any, ...], list[str]] = {}
        for path, group in groups.items():
            taken = tuple(_source(a) for each in group for a in found[each])
            alike.setdefault(taken, []).append(path)
        self.sinks: dict[str, S] = {}
        self._listeners: dict[fx.Node, list[Listener]] = {}
        for paths in alike.values():
            self.sinks |= dict.fromkeys(paths, make(paths))
            for application in (a for each in groups[paths[0]] for a in found[each]):
                listener = Listener(application.path, application.use.x, _input_axis(application), self.sinks[paths[0]])
                self._listeners.setdefault(application.use.node, []).append(listener)

    def over(self, batches: Iterable[Any], mask: Mask | None) -> Iterator[None]:
        """Run the batches, pausing after each."""
        for batch in checked_batches(batches):
            with torch.no_grad():
                moved = self._subject.on_device(batch)
                self._subject.run(moved, self._listeners, mask(moved) if mask is not None else None)
            yield


class Subject:
    """A copy of a graph module to read from: in eval mode, over the same parameters and copies of its buffers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm: LoraGraphModule = copy_sharing_tensors(checked_graph_module(gm)).eval()
        _copy_buffers(self.gm)
        self._form = next((h for h in gm._forward_pre_hooks.values() if isinstance(h, CallForm)), None)
        devices = {parameter.device for parameter in self.gm.parameters()}
        self._device = devices.pop() if len(devices) == 1 else None

    def applications_of(self, paths: Iterable[str]) -> dict[str, list[Application]]:
        """The applications of each site in the eval view; a part of a fused weight is applied where the whole is."""
        by_path: dict[str, list[Application]] = {}
        for application in read_applications(self.gm).applications:
            if application.mode in (None, False):
                by_path.setdefault(application.path, []).append(application)
        result = {}
        for path in paths:
            result[path] = by_path.get(path) or by_path.get(path.partition("[")[0]) or []
            if not result[path]:
                raise TargetError(
                    f"the graph has no site {path!r} in eval mode.{closest(path, by_path)} find_sites(gm) lists all"
                )
        return result

    def on_device(self, batch: Any) -> Any:
        """The batch with its tensors where the parameters are, if they are all in one place; mappings as dicts."""
        if isinstance(batch, Mapping):
            batch = dict(batch)
        if self._device is None:
            return batch
        return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), batch)

    def run(
        self,
        batch: Any,
        listeners: Mapping[fx.Node, Sequence[Listener]] | None = None,
        mask: torch.Tensor | None = None,
    ) -> Any:
        """The model's output."""
        args, kwargs = self._inputs(batch)
        if self._form is not None:
            self._form(self.gm, args, kwargs)
        output = _Reader(self.gm, listeners or {}, mask).run(*self._flat(args, kwargs), enable_io_processing=False)
        return self.gm.graph.process_outputs(output)

    def _inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional inputs and inputs by name; what the graph has no input for stays behind."""
        if isinstance(batch, torch.Tensor):
            return (batch,), {}
        if isinstance(batch, Mapping):
            return (), {name: batch[name] for name in self._names if name in batch}
        if isinstance(batch, (tuple, list)):
            return tuple(batch[: len(self._names)]), {}
        raise ConfigError(
            f"a batch is {type(batch).__name__}; it must be a tensor, a tuple of positional inputs, or a mapping of "
            f"inputs by name ({', '.join(self._names)})"
        )

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Values for the graph's placeholders."""
        values = dict(zip(self._names, args, strict=False)) | kwargs
        optional = {str(node.target): node.args[0] for node in self._placeholders if node.args}
        for name in self._names:
            if name not in values and name not in optional:
                raise GraphError(f"a batch has no {name!r}, which the graph takes ({', '.join(self._names)})")
        ordered = [values[name] if name in values else optional[name] for name in self._names]
        spec = self._tree.in_spec if self._tree is not None else None
        if spec is None:
            return ordered
        children = spec.children()
        if spec.type is tuple and len(children) == 2 and (children[0].type, children[1].type) == (tuple, dict):
            count = children[0].num_children
            named = dict(zip(children[1].context, ordered[count:], strict=True))
            return fx_pytree.tree_flatten_spec((tuple(ordered[:count]), named), spec)
        return fx_pytree.tree_flatten_spec(tuple(ordered), spec)

    @property
    def _tree(self) -> Any:
        return getattr(self.gm.graph._codegen, "pytree_info", None)

    @property
    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.gm.graph.nodes if node.op == "placeholder"]

    @property
    def _names(self) -> list[str]:
        """Of what the graph's forward takes."""
        names = self._tree.orig_args if self._tree is not None else [str(node.target) for node in self._placeholders]
        return [name for name in names if name != "self"]


class _Reader(fx.Interpreter):
    """Runs a graph, and the graphs within it, and lets listeners hear what nodes take in."""

    def __init__(
        self, gm: fx.GraphModule, listeners: Mapping[fx.Node, Sequence[Listener]], mask: torch.Tensor | None
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self._listeners, self._mask = listeners, mask

    def run_node(self, n: fx.Node) -> Any:
        for listener in self._listeners.get(n, ()):
            listener.hear(self.env[listener.x], self._mask)
        return super().run_node(n)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        if not isinstance(value, fx.GraphModule) or not self._listeners:
            return value
        return lambda *args: _Reader(value, self._listeners, self._mask).run(*args)


def _copy_buffers(gm: fx.GraphModule) -> None:
    """Let the graph write into copies of its buffers and plain tensors; what is one tensor stays one."""
    holders = [holder for module in gm.modules() for holder in (module._buffers, module.__dict__)]
    tensors = {id(value): value for holder in holders for value in holder.values() if isinstance(value, torch.Tensor)}
    copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    for holder in holders:
        holder.update({name: copies[id(value)] for name, value in holder.items() if id(value) in copies})


def _source(application: Application) -> tuple[Any, ...]:
    """Equal for applications that take in the same value."""
    x = application.use.x
    return x, _input_axis(application), None if writer_of(x) is None else application.use.node


def _input_axis(application: Application) -> int:
    """The axis of an op's input along which a vector for its weight lies."""
    use = application.use
    if use.kind not in _VECTOR_OPS:
        raise TargetError(
            f"{application.path!r} is {use.kind}, and only what linears take in can be read "
            f"({', '.join(_VECTOR_OPS)}). Leave it out with exclude_modules=[{application.path!r}]"
        )
    if use.kind == "einsum":
        terms = argument(use.node, 0, "equation").replace(" ", "").partition("->")[0].split(",")
        at = operands_of(use.node).index(use.x)
        (letter,) = set(terms[at]) & set(terms[1 - at]) - {"."}  # what both have is what the product sums over
        before, _, behind = terms[at].rpartition(letter)
        return -1 - len(behind) if "..." in before else len(before)
    return -1 if use.kind in ("linear", "mv") or use.takes_in_out else -2


def checked_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; ConfigError if they are one batch, or none."""
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"batches is one {type(batches).__name__}; give an iterable of batches, for one batch a list of it: [batch]"
        )
    is_empty = True
    for batch in batches:
        is_empty = False
        yield batch
    if is_empty:
        raise ConfigError("there is no batch to read; give at least one (an iterator can be read only once)")

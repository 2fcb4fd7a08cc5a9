"""Whether two graphs are the same graph, and whether two modules compute the same: for tests, ours and others'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .attributes import get_attribute, holds_values, why_no_values
from .errors import GraphError
from .graph_module import checked_graph_module, record_of
from .sharding import check_not_sharded
from .tables import Shown


@dataclass(frozen=True)
class GraphDiff(Shown):
    """How graph `b` differs from graph `a`.

    Attributes:
        nodes: one line for each node that differs, is missing or is added.
        missing_keys, unexpected_keys: state_dict keys of a that b lacks, and the reverse.
        values: keys of both whose tensors differ in shape, dtype or bits.
    """

    nodes: tuple[str, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def same_structure(self) -> bool:
        """Node for node the same, with the same state_dict keys; values may differ."""
        return not (self.nodes or self.missing_keys or self.unexpected_keys)

    def __bool__(self) -> bool:
        return not (self.same_structure and not self.values)

    between = "\n"

    def blocks(self) -> list[str]:
        """A line for each difference."""
        if not self:
            return ["the graphs are the same"]
        lines = [*self.nodes]
        for name, keys in (
            ("missing keys", self.missing_keys),
            ("unexpected keys", self.unexpected_keys),
            ("other values", self.values),
        ):
            if keys:
                lines.append(f"{name}: {', '.join(keys)}")
        return lines


def compare_graphs(a: fx.GraphModule, b: fx.GraphModule) -> GraphDiff:
    """Node-by-node and key-by-key comparison of two graph modules, sub-graphs included.

    Raises:
        GraphError: if either is no graph module.
    """
    a, b = checked_graph_module(a), checked_graph_module(b)
    for each in (a, b):
        check_not_sharded(each, "its values cannot be compared one by one")
    left, right = a.state_dict(), b.state_dict()
    both = [key for key in left if key in right]
    return GraphDiff(
        nodes=tuple(_compare_views(a, b)),
        missing_keys=tuple(key for key in left if key not in right),
        unexpected_keys=tuple(key for key in right if key not in left),
        values=tuple(key for key in both if not _has_same_bits(left[key], right[key])),
    )


def assert_equivalent(
    a: nn.Module | Callable[..., Any],
    b: nn.Module | Callable[..., Any],
    inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor,
    *,
    rtol: float | None = None,
) -> None:
    """Raise AssertionError unless both give the same outputs on `inputs`.

    Args:
        a, b: modules or functions.
        inputs: positional arguments, or keyword arguments as a mapping.
        rtol: allowed error relative to the largest absolute output. None: 32 eps of the output's dtype for
            float32 and float64, 4 eps for 16-bit. 0 demands equal bits.
    """
    with torch.no_grad():
        first, second = _call(a, inputs), _call(b, inputs)
    left, left_spec = pytree.tree_flatten(first)
    right, right_spec = pytree.tree_flatten(second)
    if left_spec != right_spec:
        raise AssertionError(f"the outputs have other structures: {left_spec} and {right_spec}")
    for index, (x, y) in enumerate(zip(left, right, strict=True)):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            _assert_close(x, y, rtol, index)
        elif x != y:
            raise AssertionError(f"output {index} is {x!r} and {y!r}")


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """max |x − y| / max |x|, in float64; 0 for empty tensors and for equal ones."""
    if x.numel() == 0 or torch.equal(x, y):
        return 0.0
    scale = float(x.double().abs().max())
    return float((x.double() - y.double()).abs().max()) / (scale or 1.0)


def default_tolerance(dtype: torch.dtype) -> float:
    """32 eps for float32 and float64, 4 eps for 16-bit floats, 0 for anything else."""
    if not dtype.is_floating_point:
        return 0.0
    return (4 if dtype in (torch.float16, torch.bfloat16) else 32) * torch.finfo(dtype).eps


def _assert_close(x: torch.Tensor, y: torch.Tensor, rtol: float | None, index: int) -> None:
    if x.shape != y.shape or x.dtype != y.dtype:
        raise AssertionError(f"output {index} is {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}")
    for each in (x, y):
        if not holds_values(each):
            raise GraphError(
                f"output {index} {why_no_values(each)} to compare; load the weights first: lora_fx.bind_weights(gm, "
                "directory)"
            )
    bound = default_tolerance(x.dtype) if rtol is None else rtol
    error = relative_error(x, y)
    if not error <= bound:  # NaN is not below anything
        raise AssertionError(f"output {index} differs by {error:.3g} of its largest value; allowed is {bound:.3g}")


def _call(function: Any, inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return function(inputs)
    return function(**inputs) if isinstance(inputs, Mapping) else function(*inputs)


def _has_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not (holds_values(a) and holds_values(b)):
        return holds_values(a) == holds_values(b)
    return a is b or torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _compare_views(a: fx.GraphModule, b: fx.GraphModule) -> list[str]:
    """The nodes of every mode that either graph has; one that serves both modes is compared with both."""
    left, right = record_of(a).views, record_of(b).views
    modes: list[bool | None] = [None] if None in left and None in right else [True, False]
    lines = []
    for mode in modes:
        graphs = [views.get(mode, views.get(None)) for views in (left, right)]
        name = {True: "train: ", False: "eval: ", None: ""}[mode]
        if graphs[0] is None or graphs[1] is None:
            lines += [f"{name}only one of the graphs has this mode"] if graphs[0] is not graphs[1] else []
        else:
            lines += _compare_nodes(a, graphs[0], b, graphs[1], name)
    return lines


def _compare_nodes(a: fx.GraphModule, graph: fx.Graph, b: fx.GraphModule, other: fx.Graph, where: str) -> list[str]:
    left, right = list(graph.nodes), list(other.nodes)
    lines = []
    for x, y in zip(left, right, strict=False):
        if _spelled(x) != _spelled(y):
            lines.append(f"{where}{_spelled(x)}  →  {_spelled(y)}")
        elif x.op == "get_attr":
            inner = get_attribute(a, str(x.target)), get_attribute(b, str(y.target))
            if isinstance(inner[0], fx.GraphModule) and isinstance(inner[1], fx.GraphModule):
                lines += _compare_nodes(inner[0], inner[0].graph, inner[1], inner[1].graph, f"{where}{x.target}: ")
            elif _is_constant(a, str(x.target)) and not _is_same_constant(*inner):
                lines.append(f"{where}{x.target}: another constant")
    longer, sign = (left, "−") if len(left) > len(right) else (right, "+")
    lines += [f"{where}{sign} {_spelled(node)}" for node in longer[min(len(left), len(right)) :]]
    return lines


def _is_constant(gm: fx.GraphModule, target: str) -> bool:
    """Whether state_dict does not hold it, so that only the graph shows it."""
    return target not in gm.state_dict(keep_vars=True)


def _is_same_constant(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _has_same_bits(a, b)
    return type(a) is type(b)


def _spelled(node: fx.Node) -> str:
    return node.format_node() or f"{node.op} {node.target} {node.args}"


__all__ = [
    "GraphDiff",
    "GraphError",
    "assert_equivalent",
    "compare_graphs",
    "default_tolerance",
    "relative_error",
]

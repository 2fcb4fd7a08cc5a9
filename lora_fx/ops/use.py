"""What the op families share: the `Use` value, the `Family` protocol, and the dialects of fx graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..layouts import Layout, Matrix, Shape

# What goes between A and B: from what A gives, and the axis of its ranks counted from the end, to what B takes.
Between = Callable[[fx.Node, int], fx.Node]


@dataclass(frozen=True)
class Use:
    """One node read as "apply `weight` to `x`".

    Attributes:
        family: the family that reads it so and can write beside it.
        kind: the op's name in tables: "linear", "matmul", "addmm", "einsum", "embedding", "conv2d", ...
        node: the node itself.
        weight: the node that the op takes as its weight, or the dotted name of a module's parameter.
        x: what the weight is applied to.
        takes_in_out: whether the op wants the weight as (in, out) rather than (out, in).
        factor: what the op itself multiplies the product with (addmm's alpha).
        is_certain: whether a node like this always applies a weight. A matmul of two activations
            does not; a linear does, and one whose weight is no parameter is worth a word to the user.
    """

    family: Family
    kind: str
    node: fx.Node
    weight: fx.Node | str
    x: fx.Node
    takes_in_out: bool
    factor: float = 1.0
    is_certain: bool = False


class Family:
    """One kind of op. A module of this package holds one instance, named FAMILY.

    Attributes:
        is_linear: whether "all-linear" means it.
        is_on_weight: whether the delta is added to the weight that the op takes, rather than to what it gives.
        takes_indices: whether it takes whole numbers, which are neither cast nor dropped out.
        bias_is_per_output: whether its bias is (out,), rather than something that broadcasts with its result.
        is_quantized: whether the weight is stored in another form than it is applied in: see `lora_fx.quantized`.
    """

    is_linear = False
    is_on_weight = False
    takes_indices = False
    bias_is_per_output = True
    is_quantized = False

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        """The readings of `node` as a use of a weight; none if the op is not of this family."""
        raise NotImplementedError

    def layout(self, use: Use, shape: Shape, stored_in_out: bool) -> Layout | str:
        """How A and B lie for a weight of that shape; or why it is none that the op can have adapted."""
        if len(shape) != 2:
            return f"its weight has {len(shape)} dimensions, where {use.kind} has two"
        return Matrix(shape[0], shape[1], stored_in_out)

    def dtype(self, use: Use, weight: torch.Tensor) -> torch.dtype:
        """What the op computes in, as far as its weight tells."""
        return weight.dtype

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        """Write the low-rank path applied to `x` at the graph's insertion point; a and b as the layout has them.

        `between` is for batches that mix adapters; a family that has no use for it may leave it out.
        """
        raise NotImplementedError

    def out_axis(self, use: Use) -> int | None:
        """The axis of the op's result, counted from its end, along which the weight's outputs lie; None if unknown."""
        return -1

    def bias_factor(self, use: Use) -> float:
        """What the op multiplies its bias with."""
        return 1

    def bias(self, use: Use) -> fx.Node | str | None:
        """What the op adds to its product: a node, or the dotted name of a module's parameter; None for nothing."""
        if use.node.op != "call_module":
            return None
        owner = use.node.graph.owning_module
        assert owner is not None
        has_bias = getattr(owner.get_submodule(str(use.node.target)), "bias", None) is not None
        return f"{use.node.target}.bias" if has_bias else None


@dataclass(frozen=True)
class Dialect:
    """The spelling of a few ops in one kind of fx graph."""

    linear: Callable[..., Any]
    matmul: Callable[..., Any]
    einsum: Callable[[str, fx.Node, fx.Node], tuple[Callable[..., Any], tuple[Any, ...]]]
    mul: Callable[..., Any]
    add: Callable[..., Any]
    sub: Callable[..., Any]
    cast_like: Callable[..., Any]
    transpose: Callable[..., Any]


_aten = torch.ops.aten
ATEN = Dialect(
    linear=_aten.linear.default,
    matmul=_aten.matmul.default,
    einsum=lambda equation, x, w: (_aten.einsum.default, (equation, [x, w])),
    mul=_aten.mul.Tensor,
    add=_aten.add.Tensor,
    sub=_aten.sub.Tensor,
    cast_like=_aten.type_as.default,
    transpose=_aten.t.default,
)
PYTHON = Dialect(
    linear=F.linear,
    matmul=torch.matmul,
    einsum=lambda equation, x, w: (torch.einsum, (equation, x, w)),
    mul=operator.mul,
    add=operator.add,
    sub=operator.sub,
    cast_like=torch.Tensor.type_as,
    transpose=torch.t,
)


def dialect_of(node: fx.Node) -> Dialect:
    """torch.export's graphs speak aten overloads, symbolic_trace's speak Python."""
    return ATEN if isinstance(node.target, torch._ops.OpOverload) else PYTHON


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operands_of(node: fx.Node) -> list[fx.Node]:
    """All nodes that a node takes, each as often as it takes it."""
    found: list[fx.Node] = []

    def note(arg: fx.Node) -> fx.Node:
        found.append(arg)
        return arg

    fx.map_arg((node.args, node.kwargs), note)
    return found


# In symbolic_trace's graphs: what gives a view of its first argument. aten's schemas say so themselves.
_VIEWS = {
    operator.getitem, getattr, torch.transpose, torch.permute, torch.reshape, torch.squeeze, torch.unsqueeze,
    torch.t, torch.narrow, torch.select, torch.flatten, torch.chunk, torch.split, torch.unbind, torch.diagonal,
    "view", "reshape", "t", "transpose", "permute", "squeeze", "unsqueeze", "narrow", "select", "flatten", "chunk",
    "split", "unbind", "diagonal", "detach", "contiguous", "expand", "view_as", "swapaxes", "__getitem__",
}  # fmt: skip


def writer_of(node: fx.Node) -> fx.Node | None:
    """The first node that writes into the node's value, or into a view of it; None if it stays as it is."""
    for user in node.users:
        if writes(user, node):
            return user
        if _views(user, node) and (writer := writer_of(user)) is not None:
            return writer
    return None


def writes(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` writes into what it takes as `node`."""
    if isinstance(user.target, torch._ops.OpOverload):
        return any(info.is_write for info in alias_infos(user, node))
    if node is user.kwargs.get("out"):
        return True
    if not user.args or user.args[0] is not node:
        return False
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and user.op != "call_module"
    return in_place or user.target is operator.setitem or bool(user.kwargs.get("inplace"))


def _views(user: fx.Node, node: fx.Node) -> bool:
    if isinstance(user.target, torch._ops.OpOverload):
        return bool(alias_infos(user, node))
    return user.target in _VIEWS and bool(user.args) and user.args[0] is node


def alias_infos(user: fx.Node, node: fx.Node) -> list[Any]:
    """What the schema of an aten op says about the arguments that are, or hold, `node`."""
    assert isinstance(user.target, torch._ops.OpOverload)
    infos = []
    for position, argument_schema in enumerate(user.target._schema.arguments):
        value = argument(user, position, argument_schema.name)
        held = value if isinstance(value, (list, tuple)) else (value,)
        if argument_schema.alias_info is not None and any(each is node for each in held):
            infos.append(argument_schema.alias_info)
    return infos

"""torch's own functions, called in place of the overloads of operators that torch.export writes.

`torch.ops.aten.add.Tensor(x, y)` is `torch.add(x, y)`, which finds that overload by itself, and runs the same kernel.
What takes the arguments apart is compiled in the one case, and reads a schema in the other, which takes a microsecond
more: a quarter to a third of the time of a small op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .tensor_reads import COUNTER

_aten = torch.ops.aten

_METHOD = "torch.Tensor."

# Calls without keywords; what is a method of tensors alone is one in code that is written, too.
FUNCTIONS: dict[Any, str] = {
    _aten.add.Tensor: "torch.add",
    _aten.addmm.default: "torch.addmm",
    _aten.bmm.default: "torch.bmm",
    _aten.cat.default: "torch.cat",
    _aten.contiguous.default: "torch.Tensor.contiguous",
    _aten.conv2d.default: "torch.conv2d",
    _aten.cos.default: "torch.cos",
    _aten.div.Tensor: "torch.div",
    _aten.dropout.default: "torch.dropout",
    _aten.embedding.default: "torch.embedding",
    _aten.exp.default: "torch.exp",
    _aten.expand.default: "torch.Tensor.expand",
    _aten.flatten.using_ints: "torch.flatten",
    _aten.gelu.default: "torch._C._nn.gelu",
    _aten.layer_norm.default: "torch.layer_norm",
    _aten.linear.default: "torch._C._nn.linear",
    _aten.masked_fill.Scalar: "torch.masked_fill",
    _aten.matmul.default: "torch.matmul",
    _aten.mean.dim: "torch.mean",
    _aten.mm.default: "torch.mm",
    _aten.mul.Tensor: "torch.mul",
    _aten.neg.default: "torch.neg",
    _aten.permute.default: "torch.permute",
    _aten.pow.Tensor_Scalar: "torch.pow",
    _aten.relu.default: "torch.relu",
    _aten.reshape.default: "torch.reshape",
    _aten.rsqrt.default: "torch.rsqrt",
    _aten.scaled_dot_product_attention.default: "torch._C._nn.scaled_dot_product_attention",
    _aten.select.int: "torch.select",
    _aten.sigmoid.default: "torch.sigmoid",
    _aten.silu.default: "torch._C._nn.silu",
    _aten.sin.default: "torch.sin",
    _aten.softmax.int: "torch.softmax",
    _aten.sqrt.default: "torch.sqrt",
    _aten.squeeze.dim: "torch.squeeze",
    _aten.sub.Tensor: "torch.sub",
    _aten.sum.dim_IntList: "torch.sum",
    _aten.t.default: "torch.t",
    _aten.tanh.default: "torch.tanh",
    _aten.to.dtype: "torch.Tensor.to",
    _aten.transpose.int: "torch.transpose",
    _aten.type_as.default: "torch.Tensor.type_as",
    _aten.unsqueeze.default: "torch.unsqueeze",
    _aten.view.default: "torch.Tensor.view",
    _aten.where.self: "torch.where",
}


def function_for(overload: Any) -> Callable[..., Any]:
    """The function to call in place of an overload that has one."""
    found: Any = torch
    for name in FUNCTIONS[overload].split(".")[1:]:
        found = getattr(found, name)
    function: Callable[..., Any] = found
    return function


def call_directly(graph: fx.Graph) -> fx.Graph:
    """Let a graph that is only compiled, never read again, call functions; it is given back."""
    for node in graph.nodes:
        if _has_function(node):
            node.target = function_for(node.target)
    return graph


def with_direct_calls(body: list[str], graph: fx.Graph) -> list[str]:
    """Lines that fx wrote for the graph, with calls of functions; a line that fx wrote otherwise stays."""
    lines, calls = list(body), {number: node.target for number, node in enumerate(graph.nodes) if _has_function(node)}
    number = -1
    for at, line in enumerate(body):
        if counted := COUNTER.fullmatch(line):
            number = int(counted[1])
        elif number in calls:
            lines[at] = _written_directly(line, calls.pop(number))
    return lines


def _has_function(node: fx.Node) -> bool:
    """Whether it calls an overload as torch.export does: what a schema takes beside that, a function may refuse."""
    if node.op != "call_function" or node.kwargs or node.target not in FUNCTIONS:
        return False
    if node.target is _aten.to.dtype:
        return len(node.args) == 2 and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], torch.dtype)
    if node.target is _aten.dropout.default and not isinstance(node.args[2], bool):
        return False
    if node.target is _aten.select.int and any(isinstance(argument, bool) for argument in node.args):
        return False
    return isinstance(node.args[0], (fx.Node, list, tuple))


def _written_directly(line: str, overload: Any) -> str:
    name, _, source = line.partition(" = ")
    called, function = f"torch.ops.{overload}(", FUNCTIONS[overload]
    if not source.startswith(called):
        return line
    arguments = source.removeprefix(called)
    if not function.startswith(_METHOD):
        return f"{name} = {function}({arguments}"
    owner, _, others = arguments.removesuffix(")").partition(", ")
    return f"{name} = {owner}.{function.removeprefix(_METHOD)}({others})" if owner.isidentifier() else line

"""torch's own functions, called in place of the overloads of operators that torch.export writes.

Before: a call of an overload, `torch.ops.aten.add.Tensor(x, y)`, without keywords. After: one of the function behind
which torch finds that overload by itself, `torch.add(x, y)`. The same kernel runs; what takes the arguments apart is
compiled in the one case, and reads a schema in the other, which takes a microsecond more for each op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

_aten = torch.ops.aten

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.contiguous.default: torch.Tensor.contiguous,
    _aten.conv2d.default: torch.conv2d,
    _aten.cos.default: torch.cos,
    _aten.div.Tensor: torch.div,
    _aten.dropout.default: torch.dropout,
    _aten.embedding.default: torch.embedding,
    _aten.exp.default: torch.exp,
    _aten.expand.default: torch.Tensor.expand,
    _aten.flatten.using_ints: torch.flatten,
    _aten.gelu.default: F.gelu,
    _aten.layer_norm.default: torch.layer_norm,
    _aten.linear.default: F.linear,
    _aten.masked_fill.Scalar: torch.masked_fill,
    _aten.matmul.default: torch.matmul,
    _aten.mean.dim: torch.mean,
    _aten.mm.default: torch.mm,
    _aten.mul.Tensor: torch.mul,
    _aten.neg.default: torch.neg,
    _aten.permute.default: torch.permute,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.relu.default: torch.relu,
    _aten.reshape.default: torch.reshape,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    _aten.select.int: torch.select,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.silu.default: torch._C._nn.silu,
    _aten.sin.default: torch.sin,
    _aten.softmax.int: torch.softmax,
    _aten.sqrt.default: torch.sqrt,
    _aten.squeeze.dim: torch.squeeze,
    _aten.sub.Tensor: torch.sub,
    _aten.sum.dim_IntList: torch.sum,
    _aten.t.default: torch.t,
    _aten.tanh.default: torch.tanh,
    _aten.to.dtype: torch.Tensor.to,
    _aten.transpose.int: torch.transpose,
    _aten.type_as.default: torch.Tensor.type_as,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: torch.Tensor.view,
    _aten.where.self: torch.where,
}


def find(graph: fx.Graph) -> dict[fx.Node, Callable[..., Any]]:
    """{a call of an overload: the function to call}."""
    calls = (node for node in graph.nodes if node.op == "call_function" and not node.kwargs)
    return {node: FUNCTIONS[node.target] for node in calls if node.target in FUNCTIONS}

"""The output head, found from the graph: the linear whose result is what the model gives."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .graph_module import ROLE

_aten = torch.ops.aten

# What may stand between the output head and the output: reshaping, casting, scaling, normalising to
# probabilities, and losses. An activation such as the pooler's tanh is not among them.
_TRANSPARENT_OPS = {
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.squeeze.default, _aten.squeeze.dim,
    _aten.unsqueeze.default, _aten.slice.Tensor, _aten.select.int, _aten.index.Tensor, _aten.transpose.int,
    _aten.permute.default, _aten.contiguous.default, _aten.clone.default, _aten.to.dtype, _aten.to.dtype_layout,
    _aten.alias.default, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int,
    _aten.softmax.int, _aten.log_softmax.int, _aten.sigmoid.default, _aten.dropout.default,
    _aten.cross_entropy_loss.default, _aten.nll_loss_nd.default, _aten.mse_loss.default,
    _aten.binary_cross_entropy_with_logits.default, _aten.type_as.default, _aten.constant_pad_nd.default,
    operator.getitem, getattr, torch.flatten, torch.squeeze, torch.reshape, torch.softmax, torch.log_softmax,
    torch.sigmoid, torch.nn.functional.softmax, torch.nn.functional.log_softmax, torch.nn.functional.cross_entropy,
    torch.nn.functional.mse_loss, torch.nn.functional.dropout,
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "float", "to",
    "softmax", "log_softmax", "sigmoid", "split", "chunk", "size",
}  # fmt: skip
_SCALINGS = {
    _aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar, operator.mul, operator.truediv,
    _aten.add.Tensor, operator.add,
}  # fmt: skip
_SOFT_CAPS = {_aten.tanh.default, torch.tanh, "tanh"}
_SIZES = {_aten.sym_size.int, _aten.size.default}
_TRANSPARENT_MODULES = (
    torch.nn.Softmax, torch.nn.LogSoftmax, torch.nn.Sigmoid, torch.nn.Flatten, torch.nn.Identity, torch.nn.Dropout,
    torch.nn.CrossEntropyLoss, torch.nn.MSELoss,
)  # fmt: skip


def is_output_head(node: fx.Node) -> bool:
    """Whether all that becomes of the node's value is output, at most through transparent ops."""
    seen: set[fx.Node] = set()
    queue, reaches_output = [node], False
    while queue:
        value = queue.pop()
        for user in value.users:
            if user.op == "output":
                reaches_output = True
            elif user not in seen and not _is_beside(user):
                seen.add(user)
                if not _is_transparent(user, value):
                    return False
                queue.append(user)
    return reaches_output


def _is_beside(node: fx.Node) -> bool:
    """Sizes, and an adapter's own path beside its op, say nothing about where the value goes."""
    return node.target in _SIZES or (ROLE in node.meta and not node.meta[ROLE].is_sum)


def _is_transparent(node: fx.Node, value: fx.Node) -> bool:
    if ROLE in node.meta:
        return True  # the sum of the op and an adapter's path
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and isinstance(owner.get_submodule(str(node.target)), _TRANSPARENT_MODULES)
    if node.target in _SCALINGS:
        nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return nodes.count(value) == 1 and all(arg is value or _is_stored(arg) for arg in nodes)
    if node.target in _SOFT_CAPS:  # tanh(x / cap) * cap
        source = node.args[0]
        scaled = isinstance(source, fx.Node) and source.target in _SCALINGS and ROLE not in source.meta
        return scaled and bool(node.users) and all(user.target in _SCALINGS for user in node.users)
    return node.target in _TRANSPARENT_OPS


def _is_stored(node: fx.Node) -> bool:
    """Whether the value is a parameter or buffer, at most cast or reshaped, as in `logits + bias.to(logits.device)`."""
    while node.target in _TRANSPARENT_OPS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"

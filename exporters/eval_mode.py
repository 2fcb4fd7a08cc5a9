"""A graph in evaluation mode for as long as a block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx import ExportError, LoraFxError

# op name -> position of its `training` flag
_FLAGGED = {
    "dropout": 2,
    "dropout_": 2,
    "native_dropout": 2,
    "feature_dropout": 2,
    "alpha_dropout": 2,
    "feature_alpha_dropout": 2,
    "rrelu": 3,
    "batch_norm": 5,
    "instance_norm": 5,
    "native_batch_norm": 5,
    "dropout1d": 2,
    "dropout2d": 2,
    "dropout3d": 2,
}
_FLAG_NAMES = ("training", "train", "use_input_stats")


@contextlib.contextmanager
def evaluating(gm: fx.GraphModule) -> Iterator[None]:
    """Show `gm`'s evaluation graph; every module's mode is as before afterwards, also after an error.

    Raises:
        ExportError: if the graph has no evaluation form, or trains whatever its mode says.
    """
    flags = {module: module.training for module in gm.modules()}
    switched = _switch(gm, flags)
    try:
        _refuse_training_ops(gm)
        yield
    finally:
        if switched:
            gm.train(flags[gm])
        for module, flag in flags.items():
            module.training = flag


def run_torch(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `gm` returns, without gradients. Inputs and buffers are as before, even if `gm` writes into them."""
    own = lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
    args, kwargs = pytree.tree_map(own, (args, kwargs))
    before = [(buffer, buffer._version, buffer.clone()) for buffer in gm.buffers()]
    try:
        with torch.no_grad():
            # An output may be the very buffer that is put back below.
            return pytree.tree_map(own, gm(*args, **kwargs))
    finally:
        for buffer, version, value in before:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


def _switch(gm: fx.GraphModule, flags: dict[nn.Module, bool]) -> bool:
    try:
        gm.eval()
        return True
    except NotImplementedError:  # torch.export's own modules: the mode is written into the graph
        for module in flags:
            module.training = False
        return False
    except LoraFxError as error:
        raise ExportError(f"this graph cannot be exported: {error}") from error


def _refuse_training_ops(gm: fx.GraphModule) -> None:
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and _is_training(node):
                raise ExportError(
                    f"node {node.name!r} ({node.target}) works in training mode, whatever the mode of the "
                    "module says: the graph was traced in train(). Trace the model in eval(): "
                    "lora_fx.trace(model, args) keeps both modes, or torch.export.export(model.eval(), args)"
                )


def _is_training(node: fx.Node) -> bool:
    if any(node.kwargs.get(name) is True for name in _FLAG_NAMES):
        return True
    name = _op_name(node.target)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):  # ..., num_layers, dropout, train, bidirectional, ...
        dropout, train = _recurrent_flags(node)
        return bool(train) and bool(dropout)
    if name == "scaled_dot_product_attention":
        probability = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        return isinstance(probability, float) and probability > 0.0
    position = _FLAGGED.get(name)
    return position is not None and len(node.args) > position and node.args[position] is True


def _recurrent_flags(node: fx.Node) -> tuple[Any, Any]:
    """(dropout, train) of `aten.lstm.input` and its kin: the floats and flags behind num_layers."""
    values = list(node.args)
    for i, value in enumerate(values):
        if isinstance(value, float):
            return value, values[i + 1] if i + 1 < len(values) else False
    return 0.0, False


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.rpartition("::")[2])
    return str(getattr(target, "__name__", ""))

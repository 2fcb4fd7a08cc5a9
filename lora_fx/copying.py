"""Copies of graph modules by the rules of `copy.deepcopy`, for modules that hold plain containers by the thousand.

fx copies a graph module by deep-copying its `__dict__`, building a module from that, and compiling it: it loses
which buffers are persistent and every hook, and takes a third of a pass's time. Here each part is copied once.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from .blocks import Block
from .errors import GraphError
from .quantized import shared_state
from .sharding import MARK, unsharded_class
from .tensor_reads import PLACES

Memo = dict[int, Any]


class _Code:
    """While code is written, the graph has a way of writing that is not its own, and that a copy must not take over."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)  # the thread that holds it is not in the child

    def renew(self) -> None:
        self.lock = threading.RLock()


CODE = _Code()

# Under which a graph module keeps what replaced its `forward` on the instance, when views follow it.
WRAPPER = "_wrapper_of_forward"

# Of a graph module: made anew, or copied by hand below. What replaced `forward`, as Accelerate does, is the instance's.
_OWN = {"_modules", "_parameters", "_buffers", "_graph", "_compiled_views", PLACES}
_OWN |= {"forward", "_original_forward", WRAPPER}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def copy_graph_module(gm: fx.GraphModule, memo: Memo) -> Any:
    """A copy of `gm` that is not compiled yet; what `memo` holds stands for itself or for its entry there."""
    kind = unsharded_class(gm)
    result: Any = kind.__new__(kind)
    nn.Module.__init__(result)
    type(result).__name__ = kind.__name__
    memo[id(gm)] = result
    with quiet_deepcopy():
        _copy_children(gm, result, memo)
        result.__dict__["_graph"] = copy_graph(gm.graph, memo)
        for name, value in gm.__dict__.items():
            if name not in _OWN and name not in _HOOKS and not _is_of_sharding(name, value):
                result.__dict__[name] = copy.deepcopy(value, memo)
    copy_hooks(gm, result)
    result.graph.owning_module = result
    return result


def copy_graph(graph: fx.Graph, memo: Memo) -> fx.Graph:
    """A copy of the graph; `fx.Graph.__deepcopy__` would deep-copy its pytree specs too, which are immutable.

    Arguments come behind their node: `create_node` would look through them, which takes half of its time.
    """
    if id(graph) in memo:
        known: fx.Graph = memo[id(graph)]
        return known
    result = fx.Graph(tracer_cls=graph._tracer_cls)
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = twin = result.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        twin.args = fx.map_arg(node.args, nodes.__getitem__)
        if node.kwargs:
            twin.kwargs = fx.map_arg(node.kwargs, nodes.__getitem__)
        twin.meta.update(node.meta)
    with CODE.lock:
        result._codegen = copy.copy(graph._codegen)
    memo[id(graph)] = result
    return result


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """The user's hooks go along; torch.export's own check of inputs stays, as the graph has its guards."""
    for name in _HOOKS:
        for key, hook in source.__dict__[name].items():
            if not str(getattr(hook, "__module__", "")).startswith(("torch.export", "torch.distributed")):
                target.__dict__[name][key] = hook


def share_tensors(module: nn.Module) -> Memo:
    """A memo in which buffers and plain tensor attributes stand for themselves; parameters are for the caller.

    Weights that are stored in a few bits stand for themselves, too.
    """
    memo: Memo = {}
    for part in module.modules():
        values = [*part._buffers.values(), *part.__dict__.values()]
        shared: list[Any] = [value for value in values if isinstance(value, torch.Tensor)]
        shared += [] if type(part) is nn.Module else shared_state(part)
        memo |= {id(value): value for value in shared}
    return memo


@contextmanager
def quiet_deepcopy() -> Iterator[None]:
    """Without the warnings that torch gives when its own pytree specs are copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _copy_children(source: nn.Module, target: nn.Module, memo: Memo) -> None:
    for name, child in source._modules.items():
        target._modules[name] = None if child is None else _copy_module(child, memo)
    for name, parameter in source._parameters.items():
        target._parameters[name] = memo[id(parameter)] if id(parameter) in memo else copy.deepcopy(parameter, memo)
    for name, buffer in source._buffers.items():
        target._buffers[name] = memo[id(buffer)] if id(buffer) in memo else copy.deepcopy(buffer, memo)


def _copy_module(module: nn.Module, memo: Memo) -> nn.Module:
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    kind = unsharded_class(module)
    if kind not in (nn.Module, Block):
        if any(unsharded_class(part) is not type(part) for part in module.modules()):
            raise GraphError(
                f"a {kind.__name__} around what fully_shard took cannot be copied; lora_fx.save_adapter(gm, directory) "
                "reads it as it is, and lora_fx.load_adapter gives a graph with that adapter, to be folded, say"
            )
        return copy.deepcopy(module, memo)
    twin = kind()
    memo[id(module)] = twin
    # not by setattr, which looks for parameters first: there are modules by the thousand
    twin.__dict__["training"] = module.training
    twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    _copy_children(module, twin, memo)
    for name in module.__dict__.keys() - twin.__dict__.keys():  # plain attributes, tensors among them
        if not _is_of_sharding(name, module.__dict__[name]):
            twin.__dict__[name] = copy.deepcopy(module.__dict__[name], memo)
    return twin


def _is_of_sharding(name: str, value: object) -> bool:
    """Whether an attribute is what `fully_shard` left on a module."""
    hooks = value.values() if isinstance(value, dict) and "hooks" in name else ()
    is_hook = any(str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)
    return is_hook or name.startswith(("__composable_api_state_key", MARK, "_fsdp_use_orig_params"))

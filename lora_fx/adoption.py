"""The graph of one graph module brought over to another that holds the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .attributes import get_attribute, set_attribute
from .copying import copy_graph
from .errors import GraphError


def restore_what_fx_drops(source: nn.Module, target: nn.Module) -> None:
    """fx registers every tensor it copies as a persistent buffer; keep state_dict's keys the source's."""
    for name, module in source.named_modules():
        twin = target.get_submodule(name) if _has_submodule(target, name) else None
        if twin is not None:
            twin._non_persistent_buffers_set = module._non_persistent_buffers_set & set(twin._buffers)
            hidden = {n for n in twin._buffers if isinstance(module.__dict__.get(n), torch.Tensor)}
            twin._non_persistent_buffers_set |= hidden  # a plain tensor attribute was in no state_dict


def _has_submodule(root: nn.Module, name: str) -> bool:
    return name == "" or isinstance(get_attribute(root, name), nn.Module)


def adopt(gm: fx.GraphModule, other: fx.GraphModule, *, suffix: str) -> fx.Graph:
    """Bring the graph of `other` over to `gm`; what has the same name but another value is renamed."""
    graph = copy_graph(other.graph, {})
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        target = str(node.target)
        if target not in renamed:
            renamed[target] = _adopt_attribute(gm, other, target, suffix)
        node.target = renamed[target]
    graph.owning_module = gm
    return graph


def over_own_tensors(gm: fx.GraphModule, other: fx.GraphModule, *, suffix: str) -> fx.Graph:
    """The graph of `other`, a trace of the same model in another dtype, over the tensors of `gm`.

    What is no tensor of the model (constants, sub-graphs, guards) comes along under a name of its own.
    """
    graph = copy_graph(other.graph, {})
    tensors = {*dict(gm.named_parameters(remove_duplicate=False)), *dict(gm.named_buffers(remove_duplicate=False))}
    for node in graph.nodes:
        target = str(node.target)
        if node.op not in ("get_attr", "call_module") or target in tensors:
            continue
        node.target = f"{target}_{suffix.removeprefix('torch.')}"
        set_attribute(gm, node.target, get_attribute(other, target), persistent=False)
    graph.owning_module = gm
    return graph


def _adopt_attribute(gm: fx.GraphModule, other: fx.GraphModule, target: str, suffix: str) -> str:
    value, existing = get_attribute(other, target), get_attribute(gm, target)
    if existing is not None and _is_same(existing, value):
        return target
    name = target if existing is None else f"{target}_{suffix}"
    if get_attribute(gm, name) is not None:
        raise GraphError(f"the traced graphs clash on the attribute {name!r}; rename it in the model")
    owner = other.get_submodule(target.rpartition(".")[0])
    persistent = target.rpartition(".")[2] not in owner._non_persistent_buffers_set
    set_attribute(gm, name, value, persistent=persistent and target in other.state_dict())
    return name


def _is_same(a: Any, b: Any) -> bool:
    """The same object, or constants of the same value. A sub-graph is never shared: views edit their own."""
    if a is b:
        return True
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if isinstance(a, nn.Parameter) or isinstance(b, nn.Parameter):
        return False
    return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)

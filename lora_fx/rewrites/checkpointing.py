"""Activation checkpointing: nothing inside a block is kept; the backward pass runs the block again.

Before: the nodes of one layer (all modules below one number, `layers.3`) stand together, and none of them writes into
what it is given, runs a module, or remembers anything. After: one call, which keeps what the layer reads. A layer
below the first adapted one, through which no gradient flows, is run as it is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from ..ops.use import operands_of
from .plain_ops import needs_plain_ops

_LAYER = re.compile(r"((?:[^.]+\.)*?\d+)(?:\.|$)")
_PREFIX = re.compile(r"^L\['self'\]\.?")
_FEWEST = 4  # nodes that make a layer worth a call


@dataclass(frozen=True)
class BlockNodes:
    """One layer: its nodes in order, what they read, and those that are read behind it."""

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def find(graph: fx.Graph, written: set[fx.Node]) -> list[BlockNodes]:
    """Every layer of the before-condition."""
    ends = ("placeholder", "get_attr", "output")
    nodes = [node for node in graph.nodes if node.op not in ends and node.target != "_guards_fn"]
    spans: dict[str, tuple[int, int]] = {}
    for place, node in enumerate(nodes):
        name = _layer_of(node)
        if name is not None:
            spans[name] = (spans.get(name, (place, place))[0], place)
    found = []
    for name, (first, last) in spans.items():
        apart = all(last < a or b < first for other, (a, b) in spans.items() if other != name)
        block = _block(name, nodes[first : last + 1], written) if apart and last - first + 1 >= _FEWEST else None
        if block is not None:
            found.append(block)
    return found


def _layer_of(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    if not paths:
        return None
    match = _LAYER.match(_PREFIX.sub("", max(paths, key=len)))
    return match[1] if match else None


def _block(name: str, nodes: list[fx.Node], written: set[fx.Node]) -> BlockNodes | None:
    if not all(_can_run_again(node) for node in nodes):
        return None
    inside = set(nodes)
    inputs = dict.fromkeys(operand for node in nodes for operand in operands_of(node) if operand not in inside)
    if written.intersection((*inside, *inputs)):
        return None
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return BlockNodes(name, tuple(nodes), tuple(inputs), tuple(outputs)) if outputs else None


def _can_run_again(node: fx.Node) -> bool:
    """Dropout may: the state of the generators is put back."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable and "batch_norm" not in str(node.target)
    module = getattr(node.target, "__module__", "")
    return node.target is operator.getitem or module.startswith("lora_fx.")


def checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, keeping its inputs alone where a gradient flows."""

    def layer(*inputs: Any) -> Any:
        if needs_plain_ops() or not torch.is_grad_enabled():
            return function(*inputs)
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    layer.__qualname__ = layer.__name__
    return layer

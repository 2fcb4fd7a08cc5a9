"""Exact counters: FLOPs, kernels, bytes kept for backward, allocator peaks, node visits, Python calls.

None of them depends on how busy the machine is.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import graph as fx_graph
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

# Ops beside the views that compute nothing and move nothing: no kernel is launched for them. Exported graphs hold the
# assertion, eager models do not.
_FREE = {
    _aten._unsafe_view, _aten.lift_fresh, _aten._local_scalar_dense, _aten._assert_tensor_metadata,
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided,
}  # fmt: skip


def _matmul(m: int, k: int, n: int) -> int:
    return 2 * m * k * n


def _mm(args: tuple[Any, ...]) -> int:
    (m, k), n = args[0].shape, args[1].shape[1]
    return int(_matmul(m, k, n))


def _bmm(args: tuple[Any, ...]) -> int:
    (b, m, k), n = args[0].shape, args[1].shape[2]
    return int(b * _matmul(m, k, n))


def _linear(args: tuple[Any, ...]) -> int:
    rows = math.prod(args[0].shape[:-1])
    return _matmul(rows, args[0].shape[-1], args[1].shape[0])


def _attention(args: tuple[Any, ...]) -> int:
    """Q·Kᵀ and P·V. A causal mask saves nothing here: every op is counted in full, alike for all variants."""
    (b, h, s, d), t, v = args[0].shape, args[1].shape[2], args[2].shape[3]
    return int(b * h * (_matmul(s, d, t) + _matmul(s, t, v)))


def _attention_backward(args: tuple[Any, ...]) -> int:
    """The scores again, then dV, dP, dQ, dK."""
    (b, h, s, d), t, v = args[1].shape, args[2].shape[2], args[3].shape[3]
    return int(b * h * (3 * _matmul(s, d, t) + 2 * _matmul(s, t, v)))


_FLOPS: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    _aten.mm: _mm,
    _aten.addmm: lambda args: _mm(args[1:]),
    _aten.addmm_: lambda args: _mm(args[1:]),  # FlopCounterMode leaves it out
    _aten.bmm: _bmm,
    _aten.baddbmm: lambda args: _bmm(args[1:]),
    _aten.baddbmm_: lambda args: _bmm(args[1:]),
    _aten.linear: _linear,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
}
_UNCOUNTED = ("matmul", "conv", "attention", "einsum", "addbmm", "addmv", "grouped_mm", "_int_mm", "lstm", "gru")


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs below autograd: FLOPs of the products, and kernels (ATen calls that are no views).

    An op that looks like a product and has no formula raises, so that no FLOP is missed silently.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.kernels = 0
        self.moved_bytes = 0
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the op and count it."""
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if func.is_view or packet in _FREE:
            return result
        self.ops[str(func)] += 1
        self.kernels += 1
        self.moved_bytes += sum(_nbytes(leaf) for leaf in pytree.tree_leaves((args, kwargs, result)))
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](args)
        elif any(word in str(packet) for word in _UNCOUNTED):
            raise NotImplementedError(f"{func} has no FLOP formula in benchmarks/counters.py; add one")
        return result


def _nbytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, torch.Tensor) else 0


@dataclass
class SavedBytes:
    """Storages that autograd keeps for backward: each once, parameters and buffers left out."""

    total: int = 0
    _seen: set[int] = field(default_factory=set)
    _kept: list[torch.Tensor] = field(default_factory=list)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count one saved tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor.detach())  # so that no address is used twice while we count
            self.total += storage.nbytes()
        return tensor


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[SavedBytes]:
    """Count the bytes that the forward passes inside keep for backward."""
    counted = SavedBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        counted._seen.add(tensor.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda tensor: tensor):
        yield counted
    counted._kept.clear()


@dataclass(frozen=True)
class Memory:
    """Bytes beyond what was allocated at the start.

    Attributes:
        peak: at the worst moment.
        kept: what the call leaves behind, with its result alive.
    """

    peak: int
    kept: int


_START = "benchmarks.start"


def memory_of(run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> Memory:
    """What torch's CPU allocator hands out while `run(prepare())` runs, from the profiler's events: exact.

    The allocator reports a free only if it reported the allocation, so what `run` may free has to be made
    by `prepare`; that is recorded too, and what it allocates is the zero of the count.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    gc.collect()  # a collection inside would free somebody else's memory
    with _no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        given = prepare()
        with record_function(_START):
            pass
        result = run(given)
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    events = results.events()
    start = next(event.start_ns() for event in events if event.name() == _START)
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    now = peak = 0
    for _, _, change in (each for each in changes if each[0] >= start):
        now += change
        peak = max(peak, now)
    del result, given
    return Memory(peak, now)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Without what the profiler's C++ code writes to file descriptor 2."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@dataclass
class NodeCount:
    """How often loops over graphs reached a node, and how many nodes were made."""

    visits: int = 0
    made: int = 0


@contextmanager
def node_visits() -> Iterator[NodeCount]:
    """Count every node that any `for node in graph.nodes` (forwards or reversed) reaches inside, and every new node."""
    counted = NodeCount()
    iterate, backwards, make = fx_graph._node_list.__iter__, fx_graph._node_list.__reversed__, fx.Graph.create_node

    def counting(nodes: Iterator[fx.Node]) -> Iterator[fx.Node]:
        for node in nodes:
            counted.visits += 1
            yield node

    def create_node(self: fx.Graph, *args: Any, **kwargs: Any) -> fx.Node:
        counted.made += 1
        return make(self, *args, **kwargs)

    fx_graph._node_list.__iter__ = lambda self: counting(iterate(self))  # type: ignore[method-assign]
    fx_graph._node_list.__reversed__ = lambda self: counting(backwards(self))  # type: ignore[method-assign]
    fx.Graph.create_node = create_node  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        fx_graph._node_list.__iter__ = iterate  # type: ignore[method-assign]
        fx_graph._node_list.__reversed__ = backwards  # type: ignore[method-assign]
        fx.Graph.create_node = make  # type: ignore[method-assign]


def python_calls(run: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, are called while `run` runs: seconds without the noise."""
    count = 0

    def profiler(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count

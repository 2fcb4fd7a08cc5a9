"""What graph.py is told to write beside one application of a weight, and the mark of what it wrote: plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from .layouts import Layout


@dataclass(frozen=True)
class Role:
    """Why an inserted node is there.

    Attributes:
        adapter: the adapter it belongs to.
        is_sum: whether it is the node that adds the low-rank path to the base's result, or to its weight.
        is_on_weight: whether it is the sum for a weight.
    """

    adapter: str
    is_sum: bool = False
    is_on_weight: bool = False


@dataclass(frozen=True)
class LowRankPath:
    """What to write beside one application: the attributes to read, and the factors.

    Attributes:
        adapter, lora_a, lora_b, dropout, scaling, layout: see `injection.AdapterSite`.
        lora_bias: what B adds, or None.
        magnitude: DoRA's m, or None.
        start_a, start_b: A and B as they were first, whose product is taken off again; or None.
        strength: what the choice of adapters multiplies all of it with.
        needs_cast: A and B are of another dtype than what the op takes.
        ranks: how many A gives, those that are taken off again among them.
    """

    adapter: str
    lora_a: str
    lora_b: str
    lora_bias: str | None
    magnitude: str | None
    start_a: str | None
    start_b: str | None
    dropout: str | None
    scaling: float
    strength: float
    layout: Layout
    needs_cast: bool
    ranks: int


@dataclass(frozen=True)
class RowsPath:
    """What to write where an embedding's table is applied: see `injection.RowsSite` and `LowRankPath`."""

    adapter: str
    rows: str
    index: str
    slots: str
    strength: float
    needs_cast: bool


@dataclass(frozen=True)
class BatchedPath:
    """Several adapters of one site as one, for a batch whose rows choose among them.

    Attributes:
        role: of the inserted nodes.
        paths: those of the single adapters.
        stacks: names of A and B of all of them in one tensor each; None if they are stacked at each call.
        gates: name of the buffer (adapters + 1, ranks of all paths) with the scaling of an adapter at its own ranks.
        ids: the input that holds the adapter of each row; 0 for none.
        gates_of: {(graph, its buffer, shape): the node that holds them}, for all sites of one graph to share.
        is_narrow: A and B are of 16 bits, and the gates, whose products are made in 32, are not.
        find_batch: from the sizes of what A gives, with None for its ranks, to the axis of the batch, and whether that
            axis holds batch × something, batch first.
    """

    role: str
    paths: tuple[LowRankPath, ...]
    stacks: tuple[str, str] | None
    gates: str
    ids: fx.Node
    gates_of: dict[tuple[fx.Graph, str, tuple[int, ...]], fx.Node]
    is_narrow: bool
    find_batch: Callable[[list[Any]], tuple[int, bool]]

"""The op families that apply a weight: one file each, listed here and nowhere else. The first that reads a node counts.

A family has two sides. `recognise` reads a node as a `Use` of a weight, or says that it is none of its
own. `emit` writes the low-rank path beside it, in the dialect of the node. Both are leaves: they know
nodes, and nothing of sites, plans or adapters.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from . import convolution, einsum, embedding, grouped, linear, matmul, on_weight
from .use import Family, Use

FAMILIES: tuple[Family, ...] = (
    linear.FAMILY,
    embedding.FAMILY,
    convolution.FAMILY,
    matmul.FAMILY,
    einsum.FAMILY,
    grouped.FAMILY,
)

# Whatever no family reads takes its weights through this one.
ON_WEIGHT = on_weight.FAMILY


def uses_of(node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
    """The ways in which `node` may apply a weight: candidates, for the caller to check the weight."""
    for family in FAMILIES:
        yield from family.recognise(node, gm)


__all__ = ["FAMILIES", "ON_WEIGHT", "Family", "Use", "uses_of"]

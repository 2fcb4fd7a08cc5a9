"""The op families that apply a weight: one file each, listed here and nowhere else. The first that reads a node counts.

A family has two sides. `recognise` reads a node as a `Use` of a weight, or says that it is none of its
own. `emit` writes the low-rank path beside it, in the dialect of the node. Both are leaves: they know
nodes, and nothing of sites, plans or adapters. `register` adds the family of an op that is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ..errors import ConfigError
from . import convolution, einsum, embedding, grouped, linear, matmul, on_weight, quantized
from .use import Family, Use, argument, dialect_of

FAMILIES: list[Family] = [
    quantized.FAMILY,
    linear.FAMILY,
    embedding.FAMILY,
    convolution.FAMILY,
    matmul.FAMILY,
    einsum.FAMILY,
    grouped.FAMILY,
]

# Whatever no family reads takes its weights through this one.
ON_WEIGHT = on_weight.FAMILY


def register(family: Family) -> None:
    """Let a family of another package read graphs, before those that are here; once is enough for a process.

    docs/own-ops.md has an example. An op of no family is adapted all the same, by the weight that it takes; a family
    saves building the delta at each call.

    Raises:
        ConfigError: if it is no `Family` with the two methods that each needs.
    """
    kind = type(family)
    if not isinstance(family, Family) or Family.recognise is kind.recognise or Family.emit is kind.emit:
        raise ConfigError(
            f"{family!r} is no op family: register an instance of a subclass of lora_fx.ops.Family that has methods "
            "recognise and emit"
        )
    if family not in FAMILIES:
        FAMILIES.insert(0, family)


def uses_of(node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
    """The ways in which `node` may apply a weight: candidates, for the caller to check the weight."""
    for family in FAMILIES:
        yield from family.recognise(node, gm)


__all__ = ["FAMILIES", "ON_WEIGHT", "Family", "Use", "argument", "dialect_of", "register", "uses_of"]

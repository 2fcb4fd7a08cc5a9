"""Rows of a table: nn.Embedding as a module, F.embedding, aten.embedding. The table is (vocabulary, dim).

A lookup is a product with one-hot vectors, so the table is a matrix stored (in, out), A is (r, vocabulary) and B is
(dim, r). `padding_idx` keeps gradients away from a row of A as it does from the base's; a scale that the module
multiplies with stands behind the op, and so behind the sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..layouts import Layout
from .use import Between, Family, Use, argument, dialect_of

_aten = torch.ops.aten


class Embedding(Family):
    """See `Family`."""

    takes_indices = True

    def recognise(self, node: fx.Node, gm: fx.GraphModule) -> Iterator[Use]:
        if node.op == "call_module" and isinstance(module := gm.get_submodule(str(node.target)), nn.Embedding):
            if type(module).forward is nn.Embedding.forward and module.max_norm is None:
                x = argument(node, 0, "input")
                yield Use(self, "embedding", node, f"{node.target}.weight".lstrip("."), x, True, is_certain=True)
        elif node.target is _aten.embedding.default:
            yield Use(
                self,
                "embedding",
                node,
                argument(node, 0, "weight"),
                argument(node, 1, "indices"),
                True,
                is_certain=True,
            )
        elif node.target is F.embedding and argument(node, 3, "max_norm") is None:
            yield Use(
                self, "embedding", node, argument(node, 1, "weight"), argument(node, 0, "input"), True, is_certain=True
            )

    def emit(
        self, use: Use, layout: Layout, x: fx.Node, a: fx.Node, b: fx.Node, between: Between | None = None
    ) -> fx.Node:
        graph, dialect = use.node.graph, dialect_of(use.node)
        table = graph.call_function(dialect.transpose, (a,))  # (vocabulary, r)
        down = graph.call_function(_aten.embedding.default, (table, x, *_options(use.node)))  # (...) -> (..., r)
        down = down if between is None else between(down, -1)
        return graph.call_function(dialect.linear, (down, b))  # (..., r) @ (dim, r)ᵀ -> (..., dim)


def _options(node: fx.Node) -> tuple[int, bool, bool]:
    """(padding_idx, scale_grad_by_freq, sparse) of the op; −1 is no padding."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        module = owner.get_submodule(str(node.target))
        assert isinstance(module, nn.Embedding)
        padding, by_frequency, sparse = module.padding_idx, module.scale_grad_by_freq, module.sparse
    elif node.target is F.embedding:
        padding = argument(node, 2, "padding_idx")
        by_frequency, sparse = argument(node, 5, "scale_grad_by_freq", False), argument(node, 6, "sparse", False)
    else:
        padding = argument(node, 2, "padding_idx", -1)
        by_frequency, sparse = argument(node, 3, "scale_grad_by_freq", False), argument(node, 4, "sparse", False)
    return -1 if padding is None else padding, by_frequency, sparse


FAMILY = Embedding()

"""A boolean attention mask as numbers, made once for all layers rather than in each.

Before: attention ops that take the same boolean mask, and queries of one dtype; each turns True into 0 and False into
−∞ for itself. After: they take the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..ops.use import argument

_attention = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class MaskNodes:
    """One mask: its node, the attention ops that take it, and the dtype of their queries."""

    mask: fx.Node
    users: tuple[fx.Node, ...]
    dtype: torch.dtype


def find(graph: fx.Graph) -> list[MaskNodes]:
    """Every mask of the before-condition."""
    users: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is not _attention:
            continue
        mask, query = argument(node, 3, "attn_mask"), argument(node, 0, "query")
        dtypes = [_dtype(each) for each in (mask, query)]
        if dtypes[0] == torch.bool and dtypes[1] is not None:
            users.setdefault((mask, dtypes[1]), []).append(node)
    return [MaskNodes(mask, tuple(found), dtype) for (mask, dtype), found in users.items() if len(found) > 1]


def _dtype(node: object) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where the mask is True, −∞ elsewhere: what scaled_dot_product_attention makes of it."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), -torch.inf)

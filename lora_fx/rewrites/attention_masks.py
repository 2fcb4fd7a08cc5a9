"""Boolean attention masks, looked at once for all layers: left out where they hide nothing, or only what is ahead.

Before: attention ops that take the same boolean mask, which nobody writes into. A traced graph has it as a tensor,
where the model itself may have left it out for the fused kernels' sake, or because no row is padded. After: a call that
looks at the mask, and attention ops that take its verdict: no mask, `is_causal`, or the numbers that each would make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ..attributes import holds_values
from ..ops.use import argument

_attention = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class MaskNodes:
    """One mask: its node, and the attention ops that take it."""

    mask: fx.Node
    users: tuple[fx.Node, ...]


def find(graph: fx.Graph, written: set[fx.Node]) -> list[MaskNodes]:
    """Every mask of the before-condition."""
    users: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        mask: Any = argument(node, 3, "attn_mask") if node.target is _attention else None
        value = mask.meta.get("val") if isinstance(mask, fx.Node) and mask not in written else None
        if value is not None and value.dtype == torch.bool and not argument(node, 5, "is_causal", False):
            users.setdefault(mask, []).append(node)
    return [MaskNodes(mask, tuple(found)) for mask, found in users.items()]


@dataclass
class Verdict:
    """What a mask (…, queries, keys) hides: nothing, all keys behind the query, or what it says."""

    mask: torch.Tensor
    hides_nothing: bool = False
    is_causal: bool = False
    numbers: torch.Tensor | None = None

    def for_queries(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where the mask is True, −∞ elsewhere: what scaled_dot_product_attention makes of it; once for a dtype."""
        if self.numbers is None or self.numbers.dtype != dtype:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self.numbers = zeros.masked_fill_(self.mask.logical_not(), -torch.inf)
        return self.numbers


def look_at(mask: torch.Tensor, is_plain: bool = False) -> Verdict:
    """One look for all layers; on a GPU the host waits for it."""
    if is_plain or not holds_values(mask) or mask.dim() < 2:
        return Verdict(mask)
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return Verdict(mask)  # a replay would keep this call's verdict, and capturing forbids to wait for it
    queries, keys = mask.shape[-2:]
    verdicts = [mask.all()]
    if queries == keys:
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril_()
        verdicts.append((mask == ahead).all())
    hides_nothing, *rest = torch.stack(verdicts).tolist()
    return Verdict(mask, hides_nothing, any(rest))


def attend(
    verdict: Verdict,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_plain: bool = False,
    **options: Any,
) -> Any:
    """scaled_dot_product_attention with the mask of the verdict."""
    attention: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention
    if is_plain or not holds_values(query):
        return attention(query, key, value, verdict.mask, **options)
    if not _expands(verdict.mask.shape, (*query.shape[:-1], key.shape[-2])):
        return attention(query, key, value, verdict.mask, **options)  # an error, which a mask left out would hide
    if verdict.hides_nothing:
        return attention(query, key, value, **options)
    if verdict.is_causal and query.shape[-2] == key.shape[-2] > 1:
        return attention(query, key, value, is_causal=True, **options)
    return attention(query, key, value, verdict.for_queries(query.dtype), **options)


@lru_cache(maxsize=64)
def _expands(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a tensor of a shape can be expanded to another."""
    return len(shape) <= len(wanted) and all(
        size in (1, other) for size, other in zip(shape[::-1], wanted[::-1], strict=False)
    )

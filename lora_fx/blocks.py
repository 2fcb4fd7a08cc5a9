"""The module that a part of a graph is called through, so that what wraps modules (FSDP2, hooks) finds one there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Block(nn.Module):
    """A module of the traced model that is called again; it holds its parameters, and is told what to compute.

    The graph that calls it says which of its functions it means: that of one view, and of one of several calls in it.
    """

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What `function` computes of this module's own attributes and of the inputs."""
        return function(self, *inputs)

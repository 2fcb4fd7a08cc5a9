"""Whether the calls that rewrites make are to run the plain operations: asked once for each call of a graph.

A rewritten graph asks at its start, and gives the answer to its calls; a tree of blocks asks in each block, since a
block may be compiled by itself.
"""

from __future__ import annotations

import torch
from torch import fx

_RECORDING = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)


def needs_plain_ops() -> bool:
    """Compilers fuse and save better from plain ops; torch.func and forward-mode AD know their formulas.

    What records ops (make_fx, AOTAutograd) is to see each parameter read, which a look at memory would hide from it.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in _RECORDING)
    )


def asks(node: object) -> bool:
    """Whether a node asks that."""
    return isinstance(node, fx.Node) and node.target is needs_plain_ops

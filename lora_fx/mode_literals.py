"""Modes that torch.export wrote into a graph as literals: dropout that is on for good, statistics that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .errors import GraphError, warn

_aten = torch.ops.aten

# Ops that torch.export writes the mode into: the positions of the probability, if any, and of the flag.
_MODE_FLAGS: dict[Any, tuple[int | None, int]] = {
    _aten.dropout.default: (1, 2),
    _aten.feature_dropout.default: (1, 2),
    _aten.alpha_dropout.default: (1, 2),
    _aten.batch_norm.default: (None, 5),
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), (1, 2)
    ),
    F.batch_norm: (None, 5),
    torch.dropout: (1, 2),
    torch.dropout_: (1, 2),
}


def warn_of_mixed_modes(names: tuple[str, ...], mode: bool) -> None:
    """Warn that modules of these names were in the other mode when the model was traced in `mode`."""
    own, other = ("train", "eval") if mode else ("eval", "train")
    warn(
        f"the model was traced in {own} mode with {', '.join(map(repr, names[:3]))}{', …' if names[3:] else ''} "
        f"in {other} mode, and the graph keeps that. If you want what model.{own}() sets, call it before tracing"
    )


def check_literal_mode(graph: fx.Graph, mode: bool) -> None:
    """A graph that the user exported has one mode for good; LoRA's own dropout still follows `train`."""
    for node in graph.nodes:
        probability, flag = _MODE_FLAGS.get(node.target, (None, 0))
        given = _argument(node, flag, ("training", "train"))
        if not flag or given is None or (probability is not None and not _argument(node, probability, ("p",))):
            continue
        if given == mode:
            continue
        if not mode:
            raise GraphError(
                f"this graph was exported in train mode, and {node.name} stays in it for good; export the model "
                "in eval mode, or use lora_fx.trace(model, args), which keeps both"
            )
        warn(
            f"this graph was exported in eval mode: {node.name} and whatever else depends on the mode stay as "
            "they are in training. lora_fx.trace(model, args) keeps both modes"
        )
        return


def _argument(node: fx.Node, position: int, names: tuple[str, ...]) -> Any:
    """What a call is given there, by position or by name, as symbolic_trace writes it."""
    return (
        node.args[position]
        if len(node.args) > position
        else next((v for k, v in node.kwargs.items() if k in names), None)
    )

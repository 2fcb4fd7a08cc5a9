"""What the classifying examples share: a loop, and how often the likeliest class is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def fit(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[nn.Parameter],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    *,
    lr: float = 5e-3,
) -> list[float]:
    """Train on 64 rows a step, drawn anew; the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(inputs), (64,))
        loss = F.cross_entropy(logits_of(inputs[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of the likeliest class: (rows, classes) and (rows,)."""
    return float((logits.argmax(-1) == labels).float().mean())

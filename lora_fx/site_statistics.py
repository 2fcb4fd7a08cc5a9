"""What data tells about single sites: principal directions and covariance of what they take in, gradients.

All sums are kept in float32 or wider, and in one pass over the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .errors import ConfigError
from .node_reading import Mask, Reading, Subject, checked_batches

# As in PEFT's incremental PCA: rounds of subspace iteration, and a seed of its own.
_ITERATIONS, _SEED = 4, 42

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """What data told about one site; None for what was not asked.

    Attributes:
        components: (k, in), the principal directions of its inputs, the largest first.
        singular_values: (k,), of the inputs less their mean.
        explained: (k,), the share of the inputs' variance along each direction.
        covariance: (in, in), see `input_covariances`.
        gradient: of the loss with respect to the weight, in the weight's own shape and order.
    """

    components: torch.Tensor | None = None
    singular_values: torch.Tensor | None = None
    explained: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


def input_components(
    gm: fx.GraphModule,
    counts: Mapping[str, int],
    batches: Iterable[Any],
    *,
    sharers: Mapping[str, Sequence[str]] | None = None,
    mask: Mask | None = None,
    is_enough: Callable[[Mapping[str, torch.Tensor], Mapping[str, SiteStatistics]], bool] | None = None,
) -> dict[str, SiteStatistics]:
    """Principal directions of what sites take in, by incremental PCA over the batches.

    Args:
        gm: a graph module.
        counts: {site path: how many directions}.
        batches: see `calibrate`.
        sharers: {site path: other paths whose inputs count as its own}.
        mask: from a batch to the tokens that count, or to None for all; sites of another shape take all.
        is_enough: from ({path: each direction's cosine similarity with that of the batch before}, what is known) to
            whether the rest of the batches can be left unread.

    Raises:
        ConfigError: if there is no batch, one is not of the graph's form, or inputs are NaN or infinite.
        TargetError: if there is no such site, or its inputs are no vectors.
    """
    reading = Reading(gm, _groups(counts, sharers), lambda paths: PrincipalDirections(max(counts[p] for p in paths)))
    before: dict[str, torch.Tensor] = {}
    for _ in reading.over(batches, mask):
        found = {path: sink.statistics for path, sink in reading.sinks.items()}
        now = {path: site.components for path, site in found.items() if site.components is not None}
        if is_enough is not None and before and is_enough(_similarities(before, now), found):
            break
        before = now
    return {path: sink.statistics for path, sink in reading.sinks.items()}


def input_covariances(
    gm: fx.GraphModule,
    paths: Iterable[str],
    batches: Iterable[Any],
    *,
    sharers: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, torch.Tensor]:
    """{site path: Xᵀ X / (calls · max |X|²)} over all rows X that the site takes in: the scale that PEFT gives it.

    (PEFT divides each call by its own largest element, so that calls count differently, and by the largest rather
    than the largest in size. C's scale has no effect on B @ A.)

    Args:
        gm: a graph module.
        paths: of the sites.
        batches: see `calibrate`.
        sharers: see `input_components`.

    Raises:
        ConfigError, TargetError: as `input_components`; ConfigError, if no data reach a site.
    """
    reading = Reading(gm, _groups(paths, sharers), lambda paths: Covariance())
    for _ in reading.over(batches, None):
        pass
    matrices = {path: sink.matrix for path, sink in reading.sinks.items()}
    for path, matrix in matrices.items():
        if matrix is None:
            raise ConfigError(
                f"no data reached {path!r}: the batches take other branches of the model. Give batches that use it, or "
                "leave it out with exclude_modules"
            )
    return {path: matrix for path, matrix in matrices.items() if matrix is not None}


def weight_gradients(
    gm: fx.GraphModule, paths: Sequence[str], batches: Iterable[Any], loss: Loss
) -> dict[str, torch.Tensor]:
    """{site path: gradient of the loss with respect to its weight}, the mean over the batches, in eval mode.

    Args:
        gm: a graph module; its parameters, their flags and their gradients stay as they are.
        paths: of the sites.
        batches: see `calibrate`.
        loss: from (output, batch) to one number.

    Raises:
        ConfigError: if the loss is no finite number with a gradient, or does not depend on one of the sites.
        TargetError: if there is no such site.
    """
    subject = Subject(gm)
    found = {path: applications[0] for path, applications in subject.applications_of(paths).items()}
    weights = {path: subject.gm.get_parameter(application.attribute) for path, application in found.items()}
    leaves = list({id(weight): weight for weight in weights.values()}.values())
    for parameter in subject.gm.parameters():
        parameter.requires_grad_(False)
    for leaf in leaves:
        leaf.requires_grad_(True)
    sums: dict[int, torch.Tensor] = {}
    count = 0
    for count, batch in enumerate(checked_batches(batches), 1):
        with torch.enable_grad():
            batch = subject.on_device(batch)
            value = _checked_loss(loss(subject.run(batch), batch), count)
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                sums[id(leaf)] = sums[id(leaf)] + wide if id(leaf) in sums else wide
    for path, weight in weights.items():
        if id(weight) not in sums or not bool(sums[id(weight)].any()):
            raise ConfigError(
                f"the loss has no gradient with respect to the weight of {path!r} on these data: it does not depend on "
                "it, or is at an optimum. Give another loss or other data, or leave the site out with exclude_modules"
            )
    return {path: sums[id(weight)] / count for path, weight in weights.items()}


def _groups(paths: Iterable[str], sharers: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    return {path: [path, *(sharers or {}).get(path, ())] for path in paths}


def _similarities(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cosines between each direction and that of the same place before; 0 for one that was not there."""
    result = {}
    for path, components in now.items():
        result[path] = torch.zeros(len(components), device=components.device)
        if path in before:
            count = min(len(before[path]), len(components))
            result[path][:count] = (before[path][:count] * components[:count]).sum(dim=1).abs()
    return result


def _checked_loss(value: Any, count: int) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ConfigError(f"loss gave {shown}; it must give one number, as a tensor, from (output, batch)")
    if not value.requires_grad:
        raise ConfigError(
            "loss gave a number without a gradient: it was detached from the output, or depends on none of the sites. "
            "Compute it from the output with torch"
        )
    if not bool(torch.isfinite(value.detach()).all()):
        raise ConfigError(f"the loss of batch {count} is {float(value.detach())}; mend the batch or the loss")
    return value.reshape(())


# Sums over rows -----------------------------------------------------------------------------------


class PrincipalDirections:
    """Incremental PCA (Ross et al. 2008, as in scikit-learn): the directions of all rows so far, in memory for k.

    PEFT's gives the same; this one takes batches of less than k rows as well.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._rows = 0
        self._squares = 0.0  # of all rows less their mean
        self._mean = self._components = self._singular_values = torch.empty(0)

    def add(self, rows: torch.Tensor) -> None:
        """Take (n, in) more rows."""
        n, mean = len(rows), rows.mean(dim=0)
        parts = [rows - mean]
        total = self._rows + n
        if self._rows:
            between = (self._mean - mean) * math.sqrt(self._rows / total * n)
            parts = [self._singular_values[:, None] * self._components, *parts, between[None]]
            self._mean = self._mean + (mean - self._mean) * (n / total)
        else:
            self._mean = mean
        self._squares += sum(float(part.square().sum()) for part in parts[-2:] if part.numel())
        self._rows = total
        self._singular_values, self._components = _leading_directions(torch.cat(parts), self.count)

    @property
    def statistics(self) -> SiteStatistics:
        """What is known by now."""
        if not self._rows:
            return SiteStatistics()
        squares = self._singular_values.square()
        explained = squares / self._squares if self._squares else torch.zeros_like(squares)
        return SiteStatistics(self._components, self._singular_values, explained)


def _leading_directions(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(singular values, right singular vectors with their largest element positive), exact for small matrices.

    Larger ones go through subspace iteration, as in `torch.svd_lowrank`, with a generator of its own.
    """
    size = min(2 * count, *rows.shape)
    if size < min(rows.shape):
        generator = torch.Generator(rows.device).manual_seed(_SEED)
        guess = torch.randn(rows.shape[1], size, generator=generator, dtype=rows.dtype, device=rows.device)
        basis = torch.linalg.qr(rows @ guess).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(rows @ torch.linalg.qr(rows.mT @ basis).Q).Q
        rows = basis.mT @ rows  # (size, n) @ (n, in)
    _, sigma, vh = torch.linalg.svd(rows, full_matrices=False)
    sigma, vh = sigma[:count], vh[:count]
    largest = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))
    return sigma, vh * torch.where(largest < 0, -1.0, 1.0)


class Covariance:
    """Xᵀ X over all rows."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._largest = 0.0
        self._calls = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take (n, in) more rows."""
        self._sum = self._sum + rows.mT @ rows  # (in, n) @ (n, in)
        self._largest = max(self._largest, float(rows.abs().max()))
        self._calls += 1

    @property
    def matrix(self) -> torch.Tensor | None:
        """Their sum, scaled to the largest element of X being 1 and divided by the number of calls."""
        if not isinstance(self._sum, torch.Tensor):
            return None
        return self._sum / (self._calls * (self._largest**2 or 1.0))

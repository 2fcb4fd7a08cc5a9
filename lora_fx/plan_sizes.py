"""What a plan costs, from shapes alone: numbers, bytes and operations, before there is any memory for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .aliasing import view_of
from .errors import ConfigError
from .layouts import Matrix, Part
from .sites import Site
from .tables import Shown, Table


@dataclass(frozen=True)
class BaseSize:
    """A model without adapters.

    Attributes:
        parameters, bytes: of its parameters, each memory once, and of its buffers.
        products: multiplications for each token in the linears that every token goes through, the head among them.
    """

    parameters: int = 0
    bytes: int = 0
    products: int = 0


@dataclass(frozen=True)
class PlanCost(Shown):
    """What training an adapter costs. Prints as a table.

    Bytes are for each device, with everything shared out evenly among them (`fully_shard`); activations, which depend
    on the batch and on what is recomputed, are not in them. FLOPs are of linears, two for a product, for each token;
    attention's own products, which grow with the length of the text, and experts, of which a token sees some, are not
    in them.

    Attributes:
        parameters: that are trained: A, B and what else the adapter has.
        weights: bytes of the base.
        adapter, gradients, optimizer: bytes of what is trained, of its gradients, and of the optimizer's state.
        kept: bytes that A's outputs take for each token, until the backward pass.
        forward: 2 · Σ in · out of the base's linears, and 2 · Σ r · (in + out) of the adapted ones.
        step: forward and backward with a frozen base: 4 · Σ in · out and 6 · Σ r · (in + out).
        devices: how many there are.
    """

    parameters: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    kept: int
    forward: int
    step: int
    devices: int

    @property
    def total(self) -> int:
        """Bytes of each device before the first activation."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    def blocks(self) -> tuple[Table]:
        """A row for each size."""
        parts = ("weights", "adapter", "gradients", "optimizer", "total")
        rows = [(name, f"{getattr(self, name) / 2**30:,.2f} GiB") for name in parts]
        rows += [("kept for each token", f"{self.kept / 2**10:,.1f} KiB")]
        rows += [(f"FLOPs of a token, {name}", f"{getattr(self, name):.3g}") for name in ("forward", "step")]
        return (Table((f"for each of {self.devices}" if self.devices > 1 else "", "size"), rows),)


def size_of_base(tensors: Iterable[torch.Tensor], buffers: Iterable[torch.Tensor], sites: Iterable[Site]) -> BaseSize:
    """Of a model's tensors and sites."""
    parameters = list({view_of(tensor): tensor for tensor in tensors}.values())
    others = list({view_of(tensor): tensor for tensor in buffers}.values())
    return BaseSize(
        parameters=sum(tensor.numel() for tensor in parameters),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *others)),
        products=sum(site.calls * products_of(site) for site in sites if not site.part),
    )


def products_of(site: Site) -> int:
    """Multiplications of one application for each token; 0 for what is no matrix product of every token."""
    is_product = isinstance(site.layout, Matrix) and site.is_linear and not site.is_lookup and not site.is_on_weight
    return math.prod(site.layout.shape) if is_product else 0


def low_rank_products_of(site: Site, r: int) -> int:
    """Of A and B."""
    if site.is_lookup or site.is_on_weight or not isinstance(site.layout, (Matrix, Part)):
        return 0
    return site.calls * r * (site.in_features + site.out_features)


def cost_of(
    base: BaseSize,
    parameters: int,
    low_rank: int,
    ranks: int,
    *,
    devices: int,
    adapter_bytes: int,
    optimizer_bytes: int,
) -> PlanCost:
    """What `Plan.cost` says, of sums over the plan.

    Args:
        base: the model.
        parameters: that are trained.
        low_rank: multiplications for each token in A and B.
        ranks: Σ r of the sites whose A's output is kept.
        devices, adapter_bytes, optimizer_bytes: as of `Plan.cost`.

    Raises:
        ConfigError: if one of them is no number of that kind.
    """
    given: Mapping[str, int] = {"devices": devices, "adapter_bytes": adapter_bytes, "optimizer_bytes": optimizer_bytes}
    for name, value in given.items():
        least = 0 if name == "optimizer_bytes" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be an integer from {least}")

    def share(size: int) -> int:
        return -(-size // devices)

    return PlanCost(
        parameters=parameters,
        weights=share(base.bytes),
        adapter=share(parameters * adapter_bytes),
        gradients=share(parameters * adapter_bytes),
        optimizer=share(parameters * optimizer_bytes),
        kept=ranks * adapter_bytes,
        forward=2 * base.products + 2 * low_rank,
        step=4 * base.products + 6 * low_rank,
        devices=devices,
    )

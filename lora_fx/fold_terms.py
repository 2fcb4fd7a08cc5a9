"""What one adapter adds to one tensor of the base, ready to be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from .attributes import get_attribute
from .dora import gain_of, gain_on_weight, norms_by_block, scaled_outputs
from .errors import FoldError
from .injection import AdapterSite, RowsSite
from .layouts import Kernel, Layout, Part, without_start
from .merging import AnyDelta, Delta, RowsDelta, blocks


class Term(Protocol):
    """One summand of a folded tensor."""

    @property
    def tensor(self) -> str:
        """Own name of the base tensor at the site."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the adapter's tensors that it is made of."""

    @property
    def scalings(self) -> tuple[float, float]:
        """The factor on B @ A, and what `set_adapters` multiplies the whole with."""

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        """The base tensor as (n, rows, columns)."""

    def delta(self, gm: fx.GraphModule, tensor: torch.Tensor, dtype: torch.dtype) -> AnyDelta:
        """What is added to it, in `dtype`."""


@dataclass(frozen=True)
class LowRankTerm:
    """scaling · B @ A of one site; with DoRA, m / ‖W + ΔW‖ ⊙ (W + ΔW) − W."""

    site: AdapterSite
    strength: float

    @property
    def tensor(self) -> str:
        return self.site.weight

    @property
    def parts(self) -> tuple[str, ...]:
        site = self.site
        names = (site.lora_a, site.lora_b, site.magnitude, site.start_a, site.start_b)
        return tuple(name for name in names if name is not None)

    @property
    def scalings(self) -> tuple[float, float]:
        return self.site.scaling, self.strength

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.site.layout.matrices(tensor)  # type: ignore[no-any-return]

    def delta(self, gm: fx.GraphModule, tensor: torch.Tensor, dtype: torch.dtype) -> Delta:
        site, layout = self.site, self.site.layout
        if reason := layout.why_no_weight():
            raise FoldError(f"{site.path!r} cannot be folded: {reason}. The injected graph computes it as it is")
        a, b = _value(gm, site.lora_a, dtype), _value(gm, site.lora_b, dtype)
        if site.start_a is not None and site.start_b is not None:
            a, b = without_start(a, b, _value(gm, site.start_a, dtype), _value(gm, site.start_b, dtype))
        gains = None
        if site.magnitude is not None:
            matrices, product = layout.matrices(tensor.detach()), Delta(*layout.factors(a, b), site.scaling)
            norms = norms_by_block(layout, blocks(matrices, dtype), product, tuple(matrices.shape))
            magnitude = get_attribute(gm, site.magnitude).detach()
            gains = gain_of(layout, magnitude, norms.to(dtype), product)
            b = scaled_outputs(layout, b, gains)  # m / ‖W + ΔW‖ on ΔW, and on W:
            gains = gain_on_weight(layout, gains, groups_of(layout)) * self.strength
        scaling = site.scaling * self.strength
        if isinstance(layout, Part):  # the rest of the weight keeps its bits
            (left, right), at = layout.block(a, b), (layout.start, 0)
            row, column = at[::-1] if layout.stored_in_out else at
            return Delta(left, right, scaling, gains, row, column, is_block=True)
        left, right = layout.factors(a, b)
        return Delta(left, right, scaling, gains)


def groups_of(layout: Layout) -> int:
    """Groups of a convolution; 1 for all else."""
    return layout.groups if isinstance(layout, Kernel) else 1


@dataclass(frozen=True)
class BiasTerm:
    """scaling · the bias of B, which the base's bias takes."""

    site: AdapterSite
    strength: float
    bias: str

    @property
    def tensor(self) -> str:
        return self.bias

    @property
    def parts(self) -> tuple[str, ...]:
        assert self.site.lora_bias is not None
        return (self.site.lora_bias,)

    @property
    def scalings(self) -> tuple[float, float]:
        return self.site.scaling, self.strength

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(1, 1, -1)

    def delta(self, gm: fx.GraphModule, tensor: torch.Tensor, dtype: torch.dtype) -> Delta:
        added = self.site.layout.among_outputs(_value(gm, self.parts[0], dtype), 0.0).reshape(1, 1, -1)
        return Delta(torch.ones_like(added[..., :1]), added, self.site.scaling * self.strength)


@dataclass(frozen=True)
class RowsTerm:
    """Trained rows of an embedding in place of the base's."""

    site: RowsSite
    strength: float

    @property
    def tensor(self) -> str:
        return self.site.weight

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.site.rows,)

    @property
    def scalings(self) -> tuple[float, float]:
        return 1.0, self.strength

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def delta(self, gm: fx.GraphModule, tensor: torch.Tensor, dtype: torch.dtype) -> RowsDelta:
        index = get_attribute(gm, self.site.index)
        return RowsDelta(index, _value(gm, self.site.rows, dtype) - tensor[index].to(dtype), self.strength)


def _value(gm: fx.GraphModule, name: str, dtype: torch.dtype) -> torch.Tensor:
    value = get_attribute(gm, name)
    assert isinstance(value, torch.Tensor)
    return value.detach().to(dtype)

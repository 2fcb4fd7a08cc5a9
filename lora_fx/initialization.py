"""The first values of A and B (`reset_lora_parameters` in PEFT's `tuners/lora/layer.py`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from .config import LoraConfig
from .errors import TargetError
from .init_options import Init, InitOptions, init_of
from .initializers import Context, initializer_of
from .layouts import Kernel, Layout, Matrix, Part
from .site_statistics import SiteStatistics


@dataclass(frozen=True, eq=False)
class First:
    """First values of one site.

    Attributes:
        a, b: as the layout has them.
        start: A and B again, whose product is taken off from then on, so that the two together do nothing yet; None
            where their product is 0 or wanted.
        base: what the base's weight is from then on; None if it stays as it is.
    """

    a: torch.Tensor
    b: torch.Tensor
    start: tuple[torch.Tensor, torch.Tensor] | None = None
    base: torch.Tensor | None = None


def start_of(config: LoraConfig) -> Init | None:
    """The start that is computed rather than drawn; None for True, False and "gaussian"."""
    drawn = isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian"
    return None if drawn else init_of(config.init_lora_weights)


def computed(
    weight: torch.Tensor,
    layout: Layout,
    r: int,
    scaling: float,
    config: LoraConfig,
    context: Context,
) -> First:
    """The first values that `config.init_lora_weights` computes from the weight and from what data told.

    PEFT takes s · B @ A out of a copy of the base for some of these; here the base stays, and their product is taken
    off beside it. That is the same function and the same gradients, with no rounding of the base.

    Raises:
        ConfigError: from the initializer.
        TargetError: if the weight is no single matrix.
    """
    init = init_of(config.init_lora_weights)
    options = None if init.field is None else getattr(config, init.field)
    context = dataclasses.replace(context, options=options if isinstance(options, InitOptions) else None)
    matrix = _as_matrix(weight, layout, context.site, init)
    if context.calibration is not None and context.calibration.gradient is not None:
        gradient = _as_matrix(context.calibration.gradient, layout, context.site, init)
        context = dataclasses.replace(context, calibration=SiteStatistics(gradient=gradient))
    start = initializer_of(str(config.init_lora_weights))(matrix, r, scaling, context)
    a, b = (value.contiguous() for value in layout.join(start.b.unsqueeze(0), start.a.unsqueeze(0)))
    if not init.changes_base:
        return First(a, b)
    if init.name != "loftq":
        return First(a, b, start=(a.clone(), b.clone()))
    assert start.base is not None
    base = start.base.mT if layout.stored_in_out else start.base
    return First(a, b, base=base.reshape(weight.shape).to(weight.dtype).contiguous())


def _as_matrix(weight: torch.Tensor, layout: Layout, site: str, init: Init) -> torch.Tensor:
    """The weight, or the part of it that is adapted, as (out, in)."""
    if isinstance(layout, Part):
        if init.name == "loftq":
            raise TargetError(
                f"init_lora_weights='loftq' replaces whole weights, and {site!r} is a part of one; adapt the whole, or "
                "leave it out with exclude_modules"
            )
        whole = _as_matrix(weight, layout.whole, site, init)
        return whole[layout.start : layout.stop]
    is_kernel = isinstance(layout, Kernel) and layout.groups == 1 and not layout.is_transposed
    if not (isinstance(layout, Matrix) or is_kernel):
        raise TargetError(
            f"init_lora_weights={init.name!r} starts from the directions of one matrix, and the weight of {site!r} is "
            f"several ({type(layout).__name__}); leave it out with exclude_modules, or give it an adapter of its own"
        )
    matrix: torch.Tensor = layout.matrices(weight)[0]
    return matrix.mT if layout.stored_in_out else matrix


def initialize(
    lora_a: torch.Tensor, lora_b: torch.Tensor, init_lora_weights: bool | str, *, is_lookup: bool, r: int
) -> None:
    """Fill A (r, in, …) and B (out, r, …) in place.

    True: A Kaiming-uniform with a = √5, that is U(±1/√in); B zero. "gaussian": A normal with standard
    deviation 1/r; B zero. False: both as nn.Linear starts, so that the adapter has an effect at once.

    For a lookup, A stands at the rows that are looked up: as in PEFT, A is zero there and B normal with deviation 1,
    and with False both are normal.
    """
    with torch.no_grad():
        if is_lookup:
            nn.init.normal_(lora_b)
            (nn.init.normal_ if init_lora_weights is False else nn.init.zeros_)(lora_a)
            return
        if init_lora_weights == "gaussian":
            nn.init.normal_(lora_a, std=1 / r)
        else:
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
        else:
            nn.init.zeros_(lora_b)

"""The first values of A and B (`reset_lora_parameters` in PEFT's `tuners/lora/layer.py`)."""

from __future__ import annotations

import math

import torch
from torch import nn


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

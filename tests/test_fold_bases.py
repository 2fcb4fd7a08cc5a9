"""Bases that a fold cannot just add to: weights in parts, of one process here; tests/distributed_checks.py has several.

Those in a few bits are in test_quantized.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from zoo import assert_same_bits, randomise

import lora_fx
from lora_fx import FoldError
from lora_fx.attributes import set_attribute


def test_weights_that_lie_in_parts_are_folded_whole() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False)))
    gm = randomise(lora_fx.inject(gm, {"r": 2, "target_modules": ["0", "1"]}))
    expected = lora_fx.fold(gm)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for name, parameter in dict(gm.named_parameters()).items():
            spread = distribute_tensor(parameter.detach().clone(), mesh, [Shard(0)])
            set_attribute(gm, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
        with pytest.raises(FoldError, match="cannot write weights that are spread over processes"):
            lora_fx.fold(gm, inplace=True)
        folded = lora_fx.fold(gm)
        assert all(type(parameter.data) is DTensor for parameter in gm.parameters())
        assert all(type(parameter.data) is torch.Tensor for parameter in folded.parameters())
        assert_same_bits(folded.state_dict().values(), expected.state_dict().values())
    finally:
        dist.destroy_process_group()

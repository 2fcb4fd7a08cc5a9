"""Every test runs on one thread and from one seed, so that bits can be compared."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configurations; nothing is fetched
torch.set_num_threads(1)

settings.register_profile("lora_fx", deadline=None, derandomize=True)
settings.load_profile("lora_fx")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

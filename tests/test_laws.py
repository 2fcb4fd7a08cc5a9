"""The laws of lora_fx, each over tracers × models × dtypes, and over the configuration's options.

Numbers are awkward throughout: prime dimensions, lora_alpha ≠ r, B ≠ 0. Beside each law that compares
numbers stands a test that it can fail.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from zoo import BY_NAME, SMALL, Case, traced
from zoo_models import MODELS

import lora_fx
from lora_fx import LoraConfig, LoraFxError
from lora_fx.equivalence import default_tolerance

from verbs import (
    assert_same_bits,
    codes,
    effect,
    fingerprint,
    frozen,
    injected,
    randomise,
    run,
    seeded,
)

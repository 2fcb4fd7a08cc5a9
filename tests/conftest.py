"""Every test runs on one thread and from one seed, so that bits can be compared."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configurations; nothing is fetched
torch.set_num_threads(1)

settings.register_profile("lora_fx", deadline=None, derandomize=True)
settings.load_profile("lora_fx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: the tests of a model of the zoo run in one process, which traces it once."""
    models = getattr(sys.modules.get("zoo"), "BY_NAME", ())
    for item in items:
        values = map(str, item.callspec.params.values()) if hasattr(item, "callspec") else ()
        model = next((value for value in values if value in models), None)
        item.add_marker(pytest.mark.xdist_group(model or item.path.stem))


def pytest_collection_finish() -> None:
    """What is imported stays: a full garbage collection, of which tracing causes many, need not look at it again."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_registry() -> Iterator[None]:
    """torch compiles its 500 translations to ONNX anew for each export, which is half of the time of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        if "onnx" in sys.modules:  # not where nothing is exported: it takes seconds to import
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""Every test runs on one thread and from one seed, so that bits can be compared."""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configurations; nothing is fetched
torch.set_num_threads(1)

settings.register_profile("lora_fx", deadline=None, derandomize=True)
settings.load_profile("lora_fx")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n, the tests of a model of the zoo run in one process, which traces it once; others by file.

    (xdist's own groups, `--dist loadgroup`, do nothing under pytest 9.2, which computes the names they are written to.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope_of(nodeid)

    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return ByModel(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With -n, what takes long runs first, so that no process waits for the other at the end."""
    if hasattr(config, "workerinput"):
        scopes = {item: _scope_of(item.nodeid) for item in items}
        sizes = Counter(scopes.values())
        items.sort(key=lambda item: (scopes[item] not in _LONG, -sizes[scopes[item]], scopes[item]))


def _scope_of(nodeid: str) -> str:
    file, _, rest = nodeid.partition("::")
    parameters = re.search(r"\[(.*)\]$", rest)
    words = parameters[1].split("-") if parameters else ()
    return next((word for word in words if word in _MODELS), file)


# Those of zoo.py that take time to trace.
_MODELS = ("bert", "gpt2", "llama", "qwen3", "mixtral", "vit", "minilm", "whisper")
# Few tests that take more than half a minute together.
_LONG = frozenset(
    f"tests/test_{name}.py"
    for name in ("fuzzing", "programs", "distributed", "filesystem_faults", "examples", "docs", "benchmarks", "serving")
)


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

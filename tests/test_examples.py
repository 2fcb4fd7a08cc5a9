"""The scripts in examples/ run, and what they show is so: losses fall, resumed is uninterrupted, tokens are equal."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [name for name, module in sys.modules.items() if _is_example(module)]:
        del sys.modules[name]


def _is_example(module: Any) -> bool:
    return Path(getattr(module, "__file__", None) or "/").parent == EXAMPLES


def _run(name: str, **arguments: Any) -> Any:
    return importlib.import_module(name).main(**arguments)


def test_trainer() -> None:
    found = _run("train_with_trainer", steps=8, bf16=True)
    assert found["after"] < found["before"] - 0.1
    assert found["predicted"] == pytest.approx(found["after"], rel=1e-6)
    assert found["resumed"] == 0
    assert found["folded"] < 64 * torch.finfo(torch.float32).eps


def test_accelerate() -> None:
    found = _run("train_with_accelerate", steps=8)
    assert found["after"] < found["before"] - 0.1
    assert found["loaded"] == 0


def test_lightning() -> None:
    """Where it is installed: it is no part of `test`, since importing it alone takes ten seconds."""
    pytest.importorskip("pytorch_lightning")
    found = _run("train_with_lightning", steps=8)
    assert found["after"] < found["before"] - 0.1
    assert found["resumed"] == 0


def test_a_loop() -> None:
    found = _run("train_in_a_loop", steps=8)
    assert found["after"] < found["before"] - 0.1
    assert found["after"] == pytest.approx(found["plain"], abs=0.02)  # both in bfloat16
    assert found["kept"] < 0.3


def test_generating_while_training() -> None:
    found = _run("generate_while_training", steps=20)
    first, *later = found["texts"]
    assert found["agree"]
    assert all(text != first for text in later)
    assert found["is_base"]
    assert found["last"] == later[-1]


@pytest.mark.filterwarnings("ignore::UserWarning:(bitsandbytes|torchao).*")
@pytest.mark.parametrize("kind", ["nf4", "torchao-int4"])
def test_quantized(kind: str) -> None:
    found = _run("train_quantized", kind=kind, steps=6)
    assert found["after"] < found["before"] - 0.05
    assert found["sites"] == 7
    assert found["dequantize"] < 1e-5 < found["original"] < 0.1
    assert kind != "nf4" or (0.5 < found["kept"] < 1 and found["requantize"] < 0.1)


def test_many_adapters() -> None:
    found = _run("train_many_adapters", adapters=3, steps=6)
    assert found["after"] < found["before"] - 0.05
    assert found["difference"] < 1e-4  # of steps of 3e-3 to 9e-3

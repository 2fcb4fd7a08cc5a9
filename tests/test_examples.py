"""The scripts in examples/ run, and what they show is so: losses fall, resumed is uninterrupted, tokens are equal.

tests/test_serving.py has the service.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx  # noqa: F401, conftest.py has exports share what torch compiles for each, where this is imported
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


def _assert_deployed(found: dict[str, Any]) -> None:
    """The loss fell, the saved files are what was trained, and ONNX Runtime computes it."""
    assert found["last loss"] < found["first loss"] - 0.05
    assert found.get("loaded", 0) == 0
    assert found["error"] < 1024 * torch.finfo(torch.float32).eps


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


def test_retrieval() -> None:
    found = _run("embed_for_retrieval", steps=8, layers=1)
    _assert_deployed(found)
    assert found["ok"]
    assert found["before"] < found["after"] == pytest.approx(found["in ONNX Runtime"], abs=0.02)  # one query, at ties


def test_text_classifier() -> None:
    found = _run("classify_text", steps=12, layers=1)
    _assert_deployed(found)
    assert found["before"] < found["after"] == pytest.approx(found["in ONNX Runtime"], abs=0.01)


def test_generation_in_onnx_runtime() -> None:
    found = _run("generate_in_onnx", steps=60)
    _assert_deployed(found)
    assert found["agree"]
    assert found["differ from base"]


def test_vision_transformer() -> None:
    found = _run("classify_digits_vit", steps=40)
    _assert_deployed(found)
    assert found["before"] + 0.4 < found["after"] == pytest.approx(found["in ONNX Runtime"], abs=0.005)
    assert found["base on its own"] > 0.8


def test_convolutions() -> None:
    found = _run("classify_digits_conv", steps=60)
    _assert_deployed(found)
    assert found["before"] + 0.4 < found["after"] == pytest.approx(found["in ONNX Runtime"], abs=0.005)
    assert found["base changed"] == 0  # the batch norms' statistics, too
    assert found["nodes"] == found["base nodes"]


def test_audio_encoder() -> None:
    found = _run("classify_audio", steps=60)
    _assert_deployed(found)
    assert found["before"] + 0.3 < found["after"] == pytest.approx(found["in ONNX Runtime"], abs=0.005)


def test_experts() -> None:
    found = _run("train_experts", steps=30)
    _assert_deployed(found)
    assert found["experts"] == 4
    assert found["logits"] < 1e-4


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_is_in_the_table(path: Path) -> None:
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text("utf-8")

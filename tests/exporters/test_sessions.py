"""A session runs where it says, or it is an error that says why."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import Mlp

import lora_fx
from exporters import compare_onnx, export_onnx, make_session
from exporters.sessions import _fix, _why
from lora_fx import ExportError

NO_CUDA = not torch.cuda.is_available()
without_gpu = pytest.mark.skipif(not NO_CUDA, reason="needs a machine without a CUDA device")
with_gpu = pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported MLP with its weights in a file of their own."""
    path = tmp_path_factory.mktemp("sessions") / "mlp.onnx"
    export_onnx(lora_fx.trace(Mlp().eval(), (torch.randn(3, 7),)), path, external_data=True)
    return path


def test_cpu_runs_on_the_cpu(file: Path) -> None:
    session = make_session(file, provider="cpu")
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.run(None, {"x": np.ones((4, 7), np.float32)})[0].shape == (4, 5)


@without_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_gpu_asked_for_and_not_there_is_an_error_with_the_reason(
    file: Path, provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError) as caught:
        make_session(file, provider=provider)
    message = str(caught.value)
    if f"{provider}" in str(ort.get_available_providers()).lower():
        assert "does not work here" in message
        assert "cannot open shared object file" in message or "CUDA" in message
    else:
        assert "is not in this build" in message
    assert 'provider="cpu"' in message or "pip install onnxruntime-gpu" in message
    assert capfd.readouterr() == ("", ""), "ONNX Runtime's own log reached the user's terminal"


@without_gpu
def test_auto_takes_the_cpu_and_says_so(
    file: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="exporters"):
        session = make_session(file)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert len(caplog.records) == 1
    assert "auto took the CPU" in caplog.text
    assert "CUDA" in caplog.text
    assert 'or "auto"' not in caplog.text, "auto is what was asked for"
    assert capfd.readouterr().out == ""
    with caplog.at_level(logging.WARNING, logger="exporters"):
        caplog.clear()
        make_session(file)
    assert not caplog.records, "a machine is told of once"


@pytest.mark.gpu
@with_gpu
@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_cuda_runs_on_cuda(file: Path, provider: str) -> None:
    session = make_session(file, provider=provider)
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    x = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    expected = make_session(file, provider="cpu").run(None, {"x": x})[0]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@with_gpu
def test_transformer_with_free_dimensions_runs_on_cuda(tmp_path: Path) -> None:
    from models import bert

    model, kwargs = bert()
    export_onnx(lora_fx.trace(model.eval(), (), kwargs), tmp_path / "bert.onnx")
    assert make_session(tmp_path / "bert.onnx", provider="cuda").get_providers()[0] == "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("CudaExecutionProvider", "Did you mean 'cuda'?"),
        ("CUDAExecutionProvider", "Did you mean 'cuda'?"),
        ("cudo", "Did you mean 'cuda'?"),
        ("CPU", "Did you mean 'cpu'?"),
        ("gpu", "Did you mean 'cuda'?"),
        ("GPU", "Did you mean 'cuda'?"),
        ("trt", "Did you mean 'tensorrt'?"),
        ("quantum", "choose one of 'auto', 'cpu', 'cuda', 'tensorrt'"),
        (None, "choose one of"),
    ],
)
def test_unknown_provider(file: Path, asked: str, hint: str) -> None:
    with pytest.raises(ExportError, match="is unknown") as caught:
        make_session(file, provider=asked)
    assert hint in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nothing\.onnx does not exist; export_onnx"):
        make_session(tmp_path / "nothing.onnx")
    with pytest.raises(ExportError, match="is a directory"):
        make_session(tmp_path)
    with pytest.raises(ExportError, match="must be a string or a path, not NoneType"):
        make_session(None)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"path='' is empty; name a file"):
        make_session("")
    with pytest.raises(ExportError, match="holds a NUL character; name a file"):
        make_session("a\0b.onnx")
    with pytest.raises(ExportError, match="does not exist"):
        make_session(tmp_path / ("x" * 300))


@pytest.mark.parametrize("provider", ["cpu", "auto", "cuda"])
@pytest.mark.parametrize("content", [b"", b"not a model", "cut"])
def test_damaged_file(file: Path, tmp_path: Path, provider: str, content: bytes | str) -> None:
    data = file.read_bytes()
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(data[: len(data) // 2] if isinstance(content, str) else content)
    with pytest.raises(ExportError, match=r"cannot open .*damaged\.onnx.*export it again|is not in this build"):
        make_session(damaged, provider=provider)


def test_weights_of_another_export_are_refused(file: Path, tmp_path: Path) -> None:
    data = file.with_name("mlp.onnx.data").read_bytes()
    (tmp_path / "mlp.onnx").write_bytes(file.read_bytes())
    (tmp_path / "mlp.onnx.data").write_bytes(data)
    make_session(tmp_path / "mlp.onnx", provider="cpu")
    (tmp_path / "mlp.onnx.data").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ExportError, match=r"does not hold the weights that mlp\.onnx was written with"):
        make_session(tmp_path / "mlp.onnx", provider="cpu")
    (tmp_path / "mlp.onnx.data").unlink()
    with pytest.raises(ExportError, match="cannot open"):
        make_session(tmp_path / "mlp.onnx", provider="cpu")


@pytest.mark.parametrize("place", ["renamed.onnx", "below/mlp.onnx"])
def test_weights_are_found_where_the_graph_says(file: Path, tmp_path: Path, place: str) -> None:
    """The .onnx may be renamed: the graph names the file of its weights, whatever its own name is."""
    data = file.with_name("mlp.onnx.data").read_bytes()
    moved = tmp_path / place
    moved.parent.mkdir(exist_ok=True)
    moved.write_bytes(file.read_bytes())
    moved.with_name("mlp.onnx.data").write_bytes(data)
    make_session(moved, provider="cpu")
    assert compare_onnx(file, moved).identical
    moved.with_name("mlp.onnx.data").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    said = rf"mlp\.onnx\.data does not hold the weights that {moved.name} was written with.*lora_fx\.data_sha256"
    with pytest.raises(ExportError, match=said):
        make_session(moved, provider="cpu")
    with pytest.raises(ExportError, match=said):
        compare_onnx(file, moved)
    moved.with_name("mlp.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"the weights of .* cannot be read: .*put 'mlp\.onnx\.data' beside it"):
        compare_onnx(file, moved)


def test_weights_that_another_tool_moved_are_not_ours_to_check(file: Path, tmp_path: Path) -> None:
    proto = onnx.load(file)
    onnx.save(proto, tmp_path / "inline.onnx")
    make_session(tmp_path / "inline.onnx", provider="cpu")
    onnx.save(
        proto, tmp_path / "split.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    make_session(tmp_path / "split.onnx", provider="cpu")


def test_reasons_are_read_from_the_log() -> None:
    log = [
        "2026 [E:onnxruntime:Default, bridge.cc:1 operator()] Failed to load library /a/b/libonnxruntime_providers_"
        "cuda.so with error: libcublasLt.so.13: cannot open shared object file: No such file or directory",
        "2026 [W:onnxruntime:Default, x.cc:2 Create] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and "
        "CUDA 13.*. Please install all dependencies",
    ]
    assert _why(log) == (
        "libonnxruntime_providers_cuda.so needs libcublasLt.so.13: cannot open shared object file: "
        "No such file or directory"
    )
    assert _fix(log, "CUDAExecutionProvider").startswith("Require cuDNN 9.* and CUDA 13.*. Install a driver")
    assert _why(["[E] CUDA failure 35: driver too old"]) == "CUDA failure 35: driver too old"
    assert _why([]) == ""

"""verify_onnx sees what differs, says where it ran, and at which shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import Mlp
from onnx import numpy_helper
from torch import fx, nn
from torch.export import Dim

import lora_fx
from exporters import export_onnx, verification, verify_onnx
from lora_fx import ExportError

INF, NAN = float("inf"), float("nan")
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    """An MLP, traced; seeded, since a unit of it may be dead otherwise, and a wrong weight behind it without effect."""
    torch.manual_seed(0)
    return lora_fx.trace(Mlp(), (X,)).train()


@pytest.fixture(scope="module")
def file(gm: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLP's file."""
    path = tmp_path_factory.mktemp("verification") / "m.onnx"
    export_onnx(gm, path)
    return path


def test_remembered_inputs_and_a_second_shape(file: Path, gm: fx.GraphModule) -> None:
    report = verify_onnx(file, gm, provider="cpu")
    assert report.ok
    assert [check.shapes for check in report.checks] == ["x [3, 7]", "x [4, 7]"]
    assert report.providers == ("CPUExecutionProvider",)
    assert report.checks[0].outputs[0].tolerance == pytest.approx(1024 * torch.finfo(torch.float32).eps)
    assert "1024 eps of torch.float32" in str(report)
    assert "ran on CPUExecutionProvider" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    report.raise_if_failed()
    assert gm.training, "the mode was not restored"


def test_own_inputs(file: Path, gm: fx.GraphModule) -> None:
    pairs: list[Any] = [((torch.randn(n, 7),), {}) for n in (2, 5, 9)]
    report = verify_onnx(file, gm, pairs, provider="cpu")
    assert [check.shapes for check in report.checks] == ["x [2, 7]", "x [5, 7]", "x [9, 7]"]
    report = verify_onnx(file, gm, pairs[:1], provider="cpu")
    assert [check.shapes for check in report.checks] == ["x [2, 7]", "x [3, 7]"]


def test_plain_graphs(file: Path, gm: fx.GraphModule) -> None:
    model = Mlp().eval()
    model.load_state_dict({name: value.detach() for name, value in gm.named_parameters()})
    for plain in (
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (X,), dynamic_shapes={"x": {0: Dim.AUTO}}).module(),
    ):
        assert verify_onnx(file, plain, [((X,), {})], provider="cpu").ok
        with pytest.raises(ExportError, match="remembers no example inputs"):
            verify_onnx(file, plain, provider="cpu")


def test_static_file_says_that_there_is_one_shape(gm: fx.GraphModule, tmp_path: Path) -> None:
    export_onnx(gm, tmp_path / "m.onnx", dynamic_shapes={})
    report = verify_onnx(tmp_path / "m.onnx", gm, provider="cpu")
    assert len(report.checks) == 1
    assert report.notes == ("all dimensions are static: there is no second shape to try",)


def test_one_wrong_weight_is_found(file: Path, gm: fx.GraphModule, tmp_path: Path) -> None:
    proto = onnx.load(file)
    tensor = next(t for t in proto.graph.initializer if t.name == "down.weight")
    value = numpy_helper.to_array(tensor).copy()
    value[4, 10] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(proto, tmp_path / "m.onnx")
    report = verify_onnx(tmp_path / "m.onnx", gm, base=file, provider="cpu")
    assert not report.ok
    assert "FAILED" in str(report)
    assert report.base is not None
    assert report.base.values_changed == ("down.weight",)
    assert "initializers of other values  1 of 4: 'down.weight'" in str(report)
    assert report.base.same_graph
    with pytest.raises(
        ExportError, match=r"does not compute what torch computes on CPUExecutionProvider, at x \[3, 7\]"
    ):
        report.raise_if_failed()


def test_other_graph_than_the_base(file: Path, gm: fx.GraphModule, tmp_path: Path) -> None:
    export_onnx(gm, tmp_path / "m.onnx", opset=21)
    report = verify_onnx(tmp_path / "m.onnx", gm, base=file, provider="cpu")
    assert all(check.ok for check in report.checks)
    assert not report.ok
    with pytest.raises(ExportError, match=r"is not op for op the base's file:(.|\n)*opsets"):
        report.raise_if_failed()


def test_file_of_another_graph(file: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x + 1

    with pytest.raises(ExportError, match=r"torch returns 2 tensors, the file 1 \(output\)"):
        verify_onnx(file, lora_fx.trace(Two(), (X,)), provider="cpu")
    report = verify_onnx(file, lora_fx.trace(nn.Linear(7, 3).eval(), (X,)), provider="cpu")
    assert report.checks[0].outputs[0].problem == "shape [3, 5] instead of [3, 3]"
    assert not report.ok


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], r"must be a list of \(args, kwargs\)"),
        ([X], r"must be a list of \(args, kwargs\)"),
        (5, r"must be a list of \(args, kwargs\)"),
        (X, r"must be a list of \(args, kwargs\)"),
        ([(5, {})], r"must be a list of \(args, kwargs\)"),
        ([((X,), {5: X})], r"must be a dict of the graph's named inputs"),
        ([((X, X), {})], "do not fit the graph's forward"),
        ([((X[:, :3],), {})], r"torch cannot run the graph at x \[3, 3\]"),
        ([((X.double(),), {})], "cannot run"),
    ],
)
def test_bad_inputs(file: Path, gm: fx.GraphModule, inputs: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        verify_onnx(file, gm, inputs, provider="cpu")


def test_arguments_are_looked_at_before_the_file_is_opened(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "open_session", lambda *a: pytest.fail("a session was opened"))
    with pytest.raises(ExportError, match="verify_onnx takes a graph module: .*not NoneType"):
        verify_onnx(file, None)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="verify_onnx takes a graph module: .*plain nn.Module"):
        verify_onnx(file, Mlp())  # type: ignore[arg-type]


def test_failure_at_run_time_is_the_error_alone(
    file: Path, gm: fx.GraphModule, capfd: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load(file)
    del proto.graph.input[0].type.tensor_type.shape.dim[:]
    reshape = onnx.helper.make_node("Reshape", ["x", "bad"], ["reshaped"])
    proto.graph.node.insert(0, reshape)
    proto.graph.node[1].input[0] = "reshaped"
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 7], np.int64), "bad"))
    onnx.save(proto, file.with_name("broken.onnx"))
    capfd.readouterr()
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the file at"):
        verify_onnx(file.with_name("broken.onnx"), gm, [((X,), {})], provider="cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fill", [NAN, -INF])
def test_outputs_without_numbers_say_nothing(fill: float, tmp_path: Path) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * 0 + fill

    gm = lora_fx.trace(Empty().eval(), (X,))
    with pytest.raises(ExportError, match="was not checked, so nothing was written: nothing was compared"):
        export_onnx(gm, tmp_path / "m.onnx")
    export_onnx(gm, tmp_path / "m.onnx", check=False)
    report = verify_onnx(tmp_path / "m.onnx", gm, provider="cpu")
    assert not report.ok
    assert report.weights.ok
    assert "nothing comparable" in str(report)
    with pytest.raises(ExportError, match="nothing was compared: at all shapes"):
        report.raise_if_failed()


def test_some_outputs_may_be_without_numbers(tmp_path: Path) -> None:
    class Partly(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x[:, :0]

    gm = lora_fx.trace(Partly(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    report = verify_onnx(tmp_path / "m.onnx", gm, provider="cpu")
    assert report.ok
    assert [output.verdict for output in report.checks[0].outputs] == ["ok", "nothing comparable"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_buffer_that_is_not_used_does_not_widen_the_tolerance(dtype: torch.dtype, tmp_path: Path) -> None:
    class Spare(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("spare", torch.zeros(1, dtype=dtype))

    gm = lora_fx.trace(Spare().eval(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    assert "1024 eps of torch.float32" in str(verify_onnx(tmp_path / "m.onnx", gm, provider="cpu"))


def test_weights_in_buffers_decide_where_there_are_no_parameters(tmp_path: Path) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(7, 5, dtype=torch.float16))
            self.register_buffer("spare", torch.zeros(1, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.half() @ self.weight).float()

    gm = lora_fx.trace(Frozen().eval(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    assert "32 eps of torch.float16" in str(verify_onnx(tmp_path / "m.onnx", gm, provider="cpu"))


def test_unknown_provider_and_missing_files(file: Path, gm: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"provider='gpu' is unknown.*Did you mean 'cuda'"):
        verify_onnx(file, gm, provider="gpu")
    with pytest.raises(ExportError, match="does not exist"):
        verify_onnx(tmp_path / "m.onnx", gm)
    with pytest.raises(ExportError, match="does not exist"):
        verify_onnx(file, gm, base=tmp_path / "m.onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_asked_for_and_not_there(file: Path, gm: fx.GraphModule) -> None:
    with pytest.raises(ExportError, match="does not work here|is not in this build"):
        verify_onnx(file, gm, provider="cuda")
    assert gm.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_cuda(file: Path, gm: fx.GraphModule) -> None:
    report = verify_onnx(file, gm, provider="cuda")
    report.raise_if_failed()
    assert report.providers[0] == "CUDAExecutionProvider"

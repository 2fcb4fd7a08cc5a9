"""export_onnx(..., dtype=): a float32 graph in float16 and bfloat16; inputs, outputs and what is kept stay float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from deployed import BOUND, distance
from models import randomise
from onnx import TensorProto
from torch import fx, nn

import lora_fx
from exporters import Quantization, compare_onnx, export_onnx, make_session, read_manifest
from exporters.weight_check import check_weights
from lora_fx import ExportError, LoraConfig

X = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 7, 37)).astype(np.float32))
HALF_EPS = float(torch.finfo(torch.float16).eps)


class Masked(nn.Module):
    """A norm, linears, a mask that no short float holds, and a weight smaller than float16's smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(37)
        self.up = nn.Linear(37, 23)
        self.inner = nn.Sequential(nn.Linear(23, 23), nn.Tanh())
        self.down = nn.Linear(23, 11, bias=False)
        self.register_buffer("mask", torch.ones(7, 7).tril().bool())
        with torch.no_grad():
            self.up.bias[3] = 1e-9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.up(self.norm(x)))
        scores = (hidden @ hidden.transpose(1, 2)).masked_fill(~self.mask, torch.finfo(torch.float32).min)
        return self.down(scores.softmax(-1) @ hidden)


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    torch.manual_seed(3)
    return lora_fx.trace(Masked().eval(), (X,))


@pytest.fixture(scope="module")
def folded(gm: fx.GraphModule) -> fx.GraphModule:
    injected = lora_fx.inject(gm, LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"])).eval()
    randomise(injected)
    return lora_fx.fold(injected)


@pytest.fixture(scope="module")
def files(gm: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{dtype: file} of the base; "kept" is a float16 file with what stays."""
    directory = tmp_path_factory.mktemp("precision")
    export_onnx(gm, directory / "float32.onnx")
    export_onnx(gm, directory / "kept.onnx", dtype="float16", keep_fp32=["Softmax", "inner"])
    for dtype in ("float16", "bfloat16"):
        report = export_onnx(gm, directory / f"{dtype}.onnx", dtype=getattr(torch, dtype))
        assert {weight.name: weight for weight in report.weights} == read_manifest(onnx.load(report.path))
        if dtype == "float16":
            assert report.max_error is not None
            assert BOUND < report.max_error < 32 * HALF_EPS
            assert report.warnings == ()
        else:
            assert report.max_error is None
            assert len(report.warnings) == 1
            assert "not run: ONNX Runtime's CPU has no bfloat16 kernels" in report.warnings[0]
    return {path.stem: path for path in directory.iterdir()}


def run(path: Path) -> list[np.ndarray]:
    return make_session(path, provider="cpu").run(None, {"x": X.numpy()})


def types(path: Path) -> dict[str, int]:
    """{initializer: type}, of floats."""
    tensors = onnx.load(path).graph.initializer
    return {t.name: t.data_type for t in tensors if t.data_type not in (TensorProto.INT64, TensorProto.BOOL)}


def test_the_inside_is_float16_and_the_ports_are_not(files: dict[str, Path], gm: fx.GraphModule) -> None:
    graph = onnx.load(files["float16"]).graph
    assert {port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
    assert set(types(files["float16"]).values()) == {TensorProto.FLOAT16}
    check = check_weights(files["float16"], gm)
    assert check.ok, str(check)
    assert check.compared == len(list(gm.parameters()))
    before = {w.name: w for w in read_manifest(onnx.load(files["float32"])).values()}
    for weight in read_manifest(onnx.load(files["float16"])).values():
        assert weight.dtype == "FLOAT16"
        assert (weight.fqn, weight.perm, weight.shape) == (
            before[weight.name].fqn, before[weight.name].perm, before[weight.name].shape,
        )  # fmt: skip
    assert distance(run(files["float16"]), run(files["float32"])) < 32 * HALF_EPS
    assert not np.isnan(run(files["float16"])[0]).any()


def test_what_is_kept_stays_float32(files: dict[str, Path]) -> None:
    model = ir.load(files["kept"])
    stored = types(files["kept"])
    assert {name for name, kind in stored.items() if kind == TensorProto.FLOAT} >= {"inner.0.weight", "inner.0.bias"}
    assert stored["up.weight"] == stored["down.weight"] == TensorProto.FLOAT16
    manifest = read_manifest(model.metadata_props)
    assert (manifest["inner.0.weight"].dtype, manifest["up.weight"].dtype) == ("FLOAT", "FLOAT16")
    inferred = onnx.shape_inference.infer_shapes(onnx.load(files["kept"]), strict_mode=True, data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    by_op = {node.op_type: kinds[node.output[0]] for node in inferred.graph.node if node.output[0] in kinds}
    assert by_op["Softmax"] == by_op["Tanh"] == TensorProto.FLOAT
    assert by_op["LayerNormalization"] == TensorProto.FLOAT16
    assert distance(run(files["kept"]), run(files["float32"])) < 32 * HALF_EPS


def test_nothing_of_float16_is_in_bfloat16(files: dict[str, Path], gm: fx.GraphModule) -> None:
    file = files["bfloat16"]
    graph = onnx.load(file).graph
    assert {port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
    assert set(types(file).values()) == {TensorProto.BFLOAT16}
    assert "FLOAT16" not in str(ir.load(file).graph).replace("BFLOAT16", "")
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            assert np.isfinite(onnx.numpy_helper.to_array(tensor).astype(np.float32)).all(), tensor.name
    constants = [onnx.numpy_helper.to_array(t).astype(np.float32) for t in graph.initializer if t.data_type == 16]
    assert min(float(constant.min()) for constant in constants) < -3e38, "the mask is bfloat16's lowest, not float16's"
    check = check_weights(file, gm)
    assert check.ok, str(check)
    assert check.compared == len(list(gm.parameters()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_folded_is_op_for_op_the_base(
    files: dict[str, Path], folded: fx.GraphModule, tmp_path: Path, dtype: str
) -> None:
    export_onnx(folded, tmp_path / "folded.onnx", dtype=dtype)
    diff = compare_onnx(files[dtype], tmp_path / "folded.onnx")
    assert diff.same_graph, str(diff)
    assert set(diff.values_changed) == {"up.weight", "down.weight"}


class Waves(nn.Module):
    """Ops that old operator sets do not have in bfloat16, two of them with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(7, 5, 3)
        self.up = nn.Linear(35, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = self.up(self.conv(x))
        return angle.cos() * angle.sin()


def test_ops_that_have_no_bfloat16_go_on_in_float32(tmp_path: Path) -> None:
    export_onnx(lora_fx.trace(Waves().eval(), (X,)), tmp_path / "m.onnx", dtype="bfloat16", opset=18)
    stored = types(tmp_path / "m.onnx")
    assert stored["conv.weight"] == TensorProto.FLOAT
    assert stored["up.weight"] == TensorProto.BFLOAT16
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    outputs = [name for node in nodes for name in node.output]
    assert len(outputs) == len(set(outputs))


def test_float32_is_the_file_that_it_is_without(files: dict[str, Path], gm: fx.GraphModule, tmp_path: Path) -> None:
    export_onnx(gm, tmp_path / "m.onnx", dtype="float32")
    assert (tmp_path / "m.onnx").read_bytes() == files["float32"].read_bytes()


def test_a_quantized_float16_file_runs(gm: fx.GraphModule, tmp_path: Path) -> None:
    options = Quantization(bits=8, block_size=16)
    report = export_onnx(gm, tmp_path / "m.onnx", dtype="float16", quantize=options)
    assert report.quantization is not None
    assert report.quantization.weights == 3
    assert min(each.cosine for each in report.quantization.outputs) > 0.999
    assert types(tmp_path / "m.onnx")["up.weight_scales"] == TensorProto.FLOAT16


def test_a_weight_out_of_range_is_refused(tmp_path: Path) -> None:
    model = Masked().eval()
    with torch.no_grad():
        model.down.weight[2, 3] = -7e4
    gm = lora_fx.trace(model, (X,))
    with pytest.raises(ExportError, match=r"'down.weight' holds values up to 7e\+04, which FLOAT16 cannot"):
        export_onnx(gm, tmp_path / "m.onnx", dtype="float16")
    assert not list(tmp_path.iterdir())
    export_onnx(gm, tmp_path / "m.onnx", dtype="float16", keep_fp32=["down"], check=False)
    assert types(tmp_path / "m.onnx")["down.weight"] == TensorProto.FLOAT


def test_a_graph_in_another_dtype_is_refused(tmp_path: Path) -> None:
    gm = lora_fx.trace(nn.Linear(5, 3).half(), (torch.ones(2, 5).half(),))
    with pytest.raises(ExportError, match="converts graphs in float32, and this one has 'weight', 'bias' in FLOAT16"):
        export_onnx(gm, tmp_path / "m.onnx", dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be one of 'float32', 'float16', 'bfloat16'"),
        ({"keep_fp32": ["Softmax"]}, "keep_fp32= says what dtype= leaves in float32"),
        (
            {"dtype": "float16", "keep_fp32": ["iner"]},
            "is neither an op type nor a module of the graph. Did you mean 'inner",
        ),
        ({"dtype": "float16", "keep_fp32": "inner"}, "must be a list of op types and module names: ['inner']"),
        ({"dtype": "bfloat16", "quantize": "int4"}, "a bfloat16 file does not run on the CPU to measure"),
    ],
)
def test_bad_options(gm: fx.GraphModule, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(gm, tmp_path / "m.onnx", **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())

"""export_onnx(..., quantize=): weights of MatMulNBits, told from the float file's by numbers, names and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from deployed import distance
from models import randomise
from torch import fx, nn

import lora_fx
from exporters import (
    OnnxReport,
    Quantization,
    compare_onnx,
    export_onnx,
    export_onnx_adapters,
    fold_into_onnx,
    make_session,
    read_manifest,
    verify_onnx,
)
from exporters.quantization import QuantizationReport, compare_outputs, quantize_weights
from exporters.stored_weights import read_weight
from lora_fx import ExportError, LoraConfig

X = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 37)).astype(np.float32))


class Three(nn.Module):
    """A Gemm with a bias, a product with a weight that lies the other way round, a product that is no weight's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(37, 23)
        self.mixing = nn.Parameter(torch.randn(23, 41) / 5)
        self.down = nn.Linear(41, 43, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.up(x)) @ self.mixing
        return self.down(torch.tanh(hidden)[None])[0], hidden @ hidden.T


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    torch.manual_seed(3)
    return lora_fx.trace(Three().eval(), (X,))


@pytest.fixture(scope="module")
def injected(gm: fx.GraphModule) -> fx.GraphModule:
    result = lora_fx.inject(gm, LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"])).eval()
    randomise(result)
    return result


@pytest.fixture(scope="module")
def float_file(gm: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    export_onnx(gm, path)
    return path


@pytest.fixture(scope="module")
def int4(gm: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OnnxReport]:
    path = tmp_path_factory.mktemp("int4") / "int4.onnx"
    options = Quantization(bits=4, block_size=16, symmetric=False)
    calls: list[ort.InferenceSession] = []

    def metric(session: ort.InferenceSession) -> float:
        calls.append(session)
        return float(len(session.get_inputs()) + len(calls) / 10)

    report = export_onnx(gm, path, quantize=options, metric=metric, external_data=True)
    assert len(calls) == 2
    return path, report


def outputs(path: Path) -> list[np.ndarray]:
    return make_session(path, provider="cpu").run(None, {"x": X.numpy()})


def test_the_report_tells_what_a_reader_measures(int4: tuple[Path, OnnxReport], float_file: Path) -> None:
    path, report = int4
    done = report.quantization
    assert done is not None
    assert (done.bits, done.block_size, done.symmetric, done.weights) == (4, 16, False, 3)
    assert report.ops["MatMulNBits"] == 3
    assert report.ops["MatMul"] == 1, "a product of two results stays"
    assert "Gemm" not in report.ops
    assert done.metric == (1.1, 1.2)
    assert done.bytes_after == report.size < done.bytes_before
    assert report.size == sum(file.stat().st_size for file in path.parent.iterdir())
    exact, got = outputs(float_file), outputs(path)
    for quality, a, b in zip(done.outputs, exact, got, strict=True):
        assert quality.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-3)
        cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
        assert quality.cosine == pytest.approx(cosine, abs=1e-5)
        assert 0.9 < quality.cosine < 1 - 1e-4, "the law would be vacuous"
    assert done.poor is None
    assert "int4, blocks of 16, with zero points: 3 weights" in str(report)
    assert "metric: 1.1 in float, 1.2 quantized" in str(report)
    assert report.to_dict()["quantization"]["weights"] == 3


def test_the_manifest_stays_true(int4: tuple[Path, OnnxReport], gm: fx.GraphModule) -> None:
    path, report = int4
    model = ir.load(path)
    manifest = read_manifest(model.metadata_props)
    assert tuple(manifest.values()) == report.weights
    quantized = {weight.fqn: weight for weight in manifest.values() if weight.layout == "quantized"}
    assert set(quantized) == {"up.weight", "mixing", "down.weight"}
    for fqn, weight in quantized.items():
        assert (weight.scales, weight.zero_points) == (f"{fqn}_scales", f"{fqn}_zero_points")
        assert {weight.name, weight.scales, weight.zero_points} < set(model.graph.initializers)
        assert model.graph.initializers[weight.name].const_value.shape == weight.shape
        own = gm.get_parameter(fqn).detach()
        own = own if weight.perm is None else own.permute(weight.perm)
        error = np.abs(read_weight(model.graph.initializers[weight.name]) - own.numpy())
        assert 0 < error.max() < own.abs().max() / 7
    assert {weight.perm for weight in quantized.values()} == {None, (1, 0)}
    check = verify_onnx(path, gm, provider="cpu").weights
    assert check.ok
    assert any("quantized" in note for note in check.notes)
    assert check.compared == 1  # the bias


def test_base_and_folded_are_op_for_op_the_same(
    gm: fx.GraphModule, injected: fx.GraphModule, int4: tuple[Path, OnnxReport], tmp_path: Path
) -> None:
    options = Quantization(bits=4, block_size=16, symmetric=False)
    export_onnx(lora_fx.fold(injected), tmp_path / "folded.onnx", quantize=options, external_data=True)
    diff = compare_onnx(int4[0], tmp_path / "folded.onnx")
    assert diff.same_graph, str(diff)
    assert {name.rpartition("_")[0] for name in diff.values_changed} >= {"up.weight", "down.weight"}


def test_an_adapter_folds_into_it(injected: fx.GraphModule, int4: tuple[Path, OnnxReport], tmp_path: Path) -> None:
    lora_fx.save_adapter(injected, tmp_path / "adapter")
    report = fold_into_onnx(int4[0], tmp_path / "adapter", tmp_path / "folded.onnx")
    assert {weight.name for weight in report.weights} == {"up.weight_Q4", "down.weight_Q4"}
    wanted = [leaf.detach().numpy() for leaf in lora_fx.fold(injected)(X)]
    assert distance(outputs(tmp_path / "folded.onnx"), wanted) < distance(outputs(int4[0]), wanted) / 2


def test_int8_is_close_and_excluded_modules_stay(gm: fx.GraphModule, float_file: Path, tmp_path: Path) -> None:
    report = export_onnx(gm, tmp_path / "int8.onnx", quantize="int8")
    assert report.quantization is not None
    assert (report.quantization.bits, report.quantization.weights) == (8, 3)
    assert min(each.cosine for each in report.quantization.outputs) > 0.999
    few = export_onnx(gm, tmp_path / "few.onnx", quantize=Quantization(exclude=["up", "mixing"]))
    assert few.quantization is not None
    assert few.quantization.weights == 1
    before, after = (onnx.load(file).graph.initializer for file in (float_file, tmp_path / "few.onnx"))
    kept = {t.name: t for t in after}
    for tensor in before:
        assert (tensor.name in kept) == (tensor.name != "down.weight")
        assert tensor.name == "down.weight" or tensor.raw_data == kept[tensor.name].raw_data


def test_switchable_adapters_are_never_quantized(injected: fx.GraphModule, tmp_path: Path) -> None:
    export_onnx_adapters(injected, tmp_path / "switch.onnx")
    model = ir.load(tmp_path / "switch.onnx")
    before = {value.name: value.const_value.dtype for value in model.graph.initializers.values()}
    lora = {name for name in before if ".lora_" in name}
    assert lora
    assert quantize_weights(model, Quantization(block_size=16)) == 3
    assert {name: model.graph.initializers[name].const_value.dtype for name in lora} == {n: before[n] for n in lora}
    ir.save(model, tmp_path / "int4.onnx")
    onnx.checker.check_model(str(tmp_path / "int4.onnx"), full_check=True)
    assert len(make_session(tmp_path / "int4.onnx", provider="cpu").run(None, {"x": X.numpy()})) == 2


def test_adapters_in_a_file_of_another_tool_are_not_quantized_either() -> None:
    shapes = {
        "up.base_layer.weight": (37, 23),
        "up.lora_A.default.weight": (37, 3),
        "up.lora_B.default.weight": (3, 23),
    }
    weights = [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]
    node, ports = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    base, a, b = shapes
    nodes = [
        node("MatMul", ["x", base], ["plain"]),
        node("MatMul", ["x", a], ["down"]),
        node("MatMul", ["down", b], ["up"]),
        node("Add", ["plain", "up"], ["y"]),
    ]
    x, y = (ports(name, onnx.TensorProto.FLOAT, ["rows", size]) for name, size in (("x", 37), ("y", 23)))
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph(nodes, "peft", [x], [y], weights)))
    assert quantize_weights(model, Quantization()) == 1
    assert set(model.graph.initializers) == {f"{base}_Q4", f"{base}_scales", a, b}


def test_low_quality_is_a_warning() -> None:
    x = np.array([3.0, 4.0, np.inf])
    (same,) = compare_outputs(["y"], [x], [x])
    assert same.cosine == pytest.approx(1)
    assert same.relative_error == 0
    (far,) = compare_outputs(["y"], [x], [np.array([4.0, -3.0, 0.0])])
    assert far.cosine == pytest.approx(0)
    assert far.relative_error == pytest.approx(2**0.5)
    (zero,) = compare_outputs(["y"], [np.zeros(3)], [np.zeros(3)])
    assert (zero.cosine, zero.relative_error) == (1, 0)
    report = QuantizationReport(4, 32, True, 1, 2, 1, (same, far))
    assert report.poor is not None
    assert "below 0.9 for 'y' (0.000); try Quantization(bits=8)" in report.poor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, 'quantize=\'int3\' must be "int4", "int8", a Quantization'),
        ({"metric": len}, "metric= compares a quantized file with the float one; pass quantize="),
        (
            {"quantize": Quantization(exclude=["downs"])},
            "names none of the 3 weights that can be quantized. Did you mean 'down' or",
        ),
        ({"quantize": Quantization(exclude=["up", "mixing", "down"])}, "there is no weight to quantize"),
    ],
)
def test_bad_options(gm: fx.GraphModule, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(gm, tmp_path / "m.onnx", check=False, **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"bits": 3}, {"block_size": 24}, {"block_size": 8}, {"exclude": "up"}])
def test_bad_quantizations(options: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=f"Quantization\\({next(iter(options))}="):
        Quantization(**options)


def test_the_float_file_is_checked_first(gm: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.onnx_export._check_against_torch", lambda *a: pytest.fail("checked"))
    monkeypatch.setattr("exporters.onnx_export.quantize_weights", lambda *a: pytest.fail("quantized"))
    with pytest.raises(pytest.fail.Exception, match="checked"):
        export_onnx(gm, tmp_path / "m.onnx", quantize="int4")

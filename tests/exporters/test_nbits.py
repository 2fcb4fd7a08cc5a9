"""Weights of MatMulNBits: what ONNX Runtime reads in them, and adapters on files whose weights are quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from deployed import distance, same_bits
from models import randomise
from torch import nn

import lora_fx
from exporters import AdapterSession, add_adapter_inputs, export_onnx, fold_into_onnx, make_session, unfold_onnx
from exporters.nbits import dequantize, quantize
from exporters.onnx_sites import recorded_weights
from exporters.stored_weights import nbits_of, read_weight, shape_of, stored_weight
from lora_fx import ExportError, LoraConfig

EPS = float(np.finfo(np.float32).eps)
FORMS = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]
# (out, in, block size): whole blocks, a last one that is filled up, an odd number of blocks, fewer inputs than a block.
SHAPES = [(7, 64, 32), (11, 101, 32), (5, 37, 16), (3, 13, 16)]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) * 7 + shape[-1]).standard_normal(shape).astype(np.float32)


def nbits_file(weight: np.ndarray, bits: int, block_size: int, symmetric: bool) -> onnx.ModelProto:
    """One MatMulNBits, made of ONNX Runtime's own quantizer."""
    ports = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["rows", k])
        for n, k in (("x", weight.shape[1]), ("y", len(weight)))
    ]
    node = onnx.helper.make_node("MatMul", ["x", "linear.weight"], ["y"], name="matmul")
    initializer = onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "linear.weight")
    graph = onnx.helper.make_graph([node], "one", ports[:1], ports[1:], [initializer])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    return quantized(model, bits, block_size, symmetric)


def quantized(model: onnx.ModelProto, bits: int = 4, block_size: int = 16, symmetric: bool = True) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # which configures logging

    quantizer = MatMulNBitsQuantizer(model, block_size=block_size, is_symmetric=symmetric, bits=bits)
    quantizer.process()
    return quantizer.model.model


@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
@pytest.mark.parametrize(("out", "inputs", "block_size"), SHAPES)
def test_what_is_read_is_what_onnx_runtime_multiplies_with(
    out: int, inputs: int, block_size: int, bits: int, symmetric: bool
) -> None:
    weight = random(out, inputs)
    model = nbits_file(weight, bits, block_size, symmetric)
    value = ir.from_proto(model).graph.initializers[f"linear.weight_Q{bits}"]
    got = read_weight(value)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (applied,) = session.run(None, {"x": np.eye(inputs, dtype=np.float32)})
    assert got.shape == shape_of(value) == (out, inputs)
    np.testing.assert_allclose(got, applied.T, rtol=4 * EPS, atol=0)
    step = np.abs(weight).max() * 2 / (2**bits - 1)
    assert 0 < np.abs(got - weight).max() < step, "no weight is farther than a step from its own"
    # ... and this module's quantizer finds what ONNX Runtime's does.
    nbits = nbits_of(value)
    assert nbits is not None
    made = quantize(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    np.testing.assert_array_equal(nbits.decoded(*(part for part in made if part is not None)), got)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
@pytest.mark.parametrize(("out", "inputs", "block_size"), SHAPES)
def test_quantized_values_stay(out: int, inputs: int, block_size: int, bits: int, symmetric: bool, dtype: type) -> None:
    weight = random(out, inputs)
    weight[0] = 0  # a block of zeros has no scale
    weight[1] = np.abs(weight[1])
    sizes = {"bits": bits, "block_size": block_size}
    first = quantize(weight, symmetric=symmetric, dtype_of_scales=dtype, **sizes)
    stored = dequantize(*first, in_features=inputs, **sizes)
    again = quantize(stored, symmetric=symmetric, dtype_of_scales=dtype, **sizes)
    assert first[1].dtype == dtype
    assert not stored[0].any()
    assert np.isfinite(stored).all()
    if dtype is np.float16 and not symmetric:  # a rounded scale may leave the last step unused
        again_stored = dequantize(*again, in_features=inputs, **sizes)
        assert (np.abs(again_stored - stored).max(axis=1) <= first[1].max(axis=1)).all()
        return
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_allclose(first[1].astype(np.float64), again[1], rtol=0 if symmetric else np.finfo(dtype).eps)
    assert (first[2] is None) == symmetric
    assert symmetric or np.array_equal(first[2], again[2])


def test_zero_points_may_be_floats() -> None:
    weight = random(5, 37)
    blob, scales, packed = quantize(weight, bits=4, block_size=16, symmetric=False)
    assert packed is not None
    floats = np.stack([packed & 15, packed >> 4], axis=-1).reshape(5, -1)[:, :3].astype(np.float32)
    sizes = {"in_features": 37, "bits": 4, "block_size": 16}
    np.testing.assert_array_equal(dequantize(blob, scales, floats, **sizes), dequantize(blob, scales, packed, **sizes))


def test_outputs_that_do_not_change_keep_their_bytes() -> None:
    model = ir.from_proto(nbits_file(random(5, 37), 4, 16, symmetric=False))
    value = model.graph.initializers["linear.weight_Q4"]
    scales = model.graph.initializers["linear.weight_scales"]
    scales.const_value = ir.tensor(scales.const_value.numpy() * 1.25)  # of a tool that clips: ours would be others
    nbits = nbits_of(value)
    assert nbits is not None
    before, exact = [tensor.numpy() for tensor in nbits.tensors], read_weight(value)
    exact[3] += 0.1
    parts = nbits.encode(0, read_weight(value), exact, "linear").parts.values()
    after = [numbers.reshape(old.shape) for (_, numbers), old in zip(parts, before, strict=True)]
    assert [(new.shape, new.dtype) for new in after] == [(old.shape, old.dtype) for old in before]
    changed = [(old != new).reshape(5, -1).any(axis=1) for old, new in zip(before, after, strict=True)]
    assert np.any(changed, axis=0).tolist() == [False, False, False, True, False]


def test_a_scale_out_of_range_is_refused() -> None:
    model = ir.from_proto(nbits_file(random(5, 37), 4, 16, symmetric=True))
    value, scales = (model.graph.initializers[f"linear.weight_{name}"] for name in ("Q4", "scales"))
    scales.const_value = ir.tensor(scales.const_value.numpy().astype(np.float16))
    with pytest.raises(
        ExportError, match="folding linear makes values of 'linear.weight_Q4' that its scales cannot hold"
    ):
        stored_weight(value).encode(0, read_weight(value), read_weight(value) + np.float32(1e7), "linear")


# Adapters on quantized files ---------------------------------------------------------------------


class Two(nn.Module):
    """Two linears, one with a bias; the inputs are no multiple of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(37, 23)
        self.down = nn.Linear(23, 41, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base.onnx, the same quantized in four forms, and adapter/."""
    directory = tmp_path_factory.mktemp("two")
    torch.manual_seed(3)
    gm = lora_fx.trace(Two().eval(), (torch.randn(2, 5, 37),))
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["up", "down"])
    injected = lora_fx.inject(gm, config).eval()
    randomise(injected)
    lora_fx.save_adapter(injected, directory / "adapter")
    export_onnx(gm, directory / "base.onnx")
    for bits, symmetric in FORMS:
        onnx.save(quantized(onnx.load(directory / "base.onnx"), bits, 16, symmetric), named(directory, bits, symmetric))
    return directory


def named(directory: Path, bits: int = 4, symmetric: bool = True) -> Path:
    return directory / f"int{bits}_{'symmetric' if symmetric else 'zero_points'}.onnx"


X = {"x": random(2, 5, 37)}


def run(path: Path) -> list[np.ndarray]:
    return make_session(path, provider="cpu").run(None, X)


@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
def test_folding_quantized_weights(two: Path, tmp_path: Path, bits: int, symmetric: bool) -> None:
    base, out = named(two, bits, symmetric), tmp_path / "out.onnx"
    report = fold_into_onnx(base, two / "adapter", out)
    assert {weight.name for weight in report.weights} == {f"up.weight_Q{bits}", f"down.weight_Q{bits}"}
    fold_into_onnx(two / "base.onnx", two / "adapter", tmp_path / "float.onnx")
    onnx.save(quantized(onnx.load(tmp_path / "float.onnx"), bits, 16, symmetric), tmp_path / "later.onnx")
    exact, got, later = run(tmp_path / "float.onnx"), run(out), run(tmp_path / "later.onnx")
    # Quantized twice, a weight is at most two steps off, and not one.
    assert distance(got, exact) < 2.5 * distance(later, exact)
    assert distance(run(base), exact) > 3 * distance(got, exact), "the law would be vacuous"
    for weight in report.weights:
        assert weight.dtype == f"int{bits}"
        assert 0 < weight.error < 1 / 2 ** (bits - 1)
        value = ir.load(out).graph.initializers[weight.name]
        whole = ir.load(tmp_path / "float.onnx").graph.initializers[weight.name.removesuffix(f"_Q{bits}")]
        was = ir.load(base).graph.initializers[weight.name]
        plain = ir.load(two / "base.onnx").graph.initializers[weight.name.removesuffix(f"_Q{bits}")]
        wanted = read_weight(was) + (read_weight(whole) - read_weight(plain)).T  # (out, in)
        lost = float(np.linalg.norm(read_weight(value) - wanted) / np.linalg.norm(wanted))
        assert weight.error == pytest.approx(lost, rel=1e-3)


def test_in_place_at_load_and_back(two: Path, tmp_path: Path) -> None:
    base = named(two, 4, False)
    file = tmp_path / "model.onnx"
    file.write_bytes(base.read_bytes())
    loaded = make_session(file, adapter=two / "adapter", provider="cpu").run(None, X)
    fold_into_onnx(file, two / "adapter", file)
    assert same_bits(run(file), loaded)
    assert not same_bits(run(file), run(base))
    unfold_onnx(file)
    assert file.read_bytes() == base.read_bytes()


def test_no_strength_changes_no_byte(two: Path, tmp_path: Path) -> None:
    base = named(two, 4, False)
    fold_into_onnx(base, two / "adapter", tmp_path / "out.onnx", strength=0.0)
    was, now = (onnx.load(file).graph.initializer for file in (base, tmp_path / "out.onnx"))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in now}
    assert all(np.array_equal(onnx.numpy_helper.to_array(tensor), arrays[tensor.name]) for tensor in was)


@pytest.mark.parametrize("manifest", [True, False])
def test_float_adapters_beside_a_quantized_base(two: Path, tmp_path: Path, manifest: bool) -> None:
    base = onnx.load(named(two))
    if not manifest:  # names alone then tell which weight is which
        del base.metadata_props[:]
    onnx.save(base, tmp_path / "base.onnx")
    add_adapter_inputs(tmp_path / "base.onnx", tmp_path / "switch.onnx", two / "adapter")
    session = AdapterSession(tmp_path / "switch.onnx", provider="cpu")
    plain = run(tmp_path / "base.onnx")
    assert same_bits(session.run(X), plain)
    session.load("adapter", two / "adapter")
    got = session.run(X, adapter="adapter")
    fold_into_onnx(two / "base.onnx", two / "adapter", tmp_path / "float.onnx")
    exact = run(tmp_path / "float.onnx")
    # The adapter itself loses nothing: what is left is the base's own error.
    assert distance(got, exact) < 2 * distance(plain, run(two / "base.onnx"))
    assert distance(got, plain) > 3 * distance(got, exact), "the law would be vacuous"


def test_the_manifest_knows_what_was_quantized_since(two: Path) -> None:
    recorded = recorded_weights(ir.load(named(two)))
    weight = recorded["up.weight_Q4"]
    assert (weight.fqn, weight.layout, weight.perm) == ("up.weight", "quantized", None)
    assert recorded["up.bias"].layout == "as_stored"


def test_an_order_of_inputs_is_refused(two: Path, tmp_path: Path) -> None:
    model = ir.load(named(two))
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    order = ir.Value(name="g_idx", const_value=ir.tensor(np.zeros(37, np.int32), name="g_idx"))
    model.graph.register_initializer(order)
    node.resize_inputs(5)
    node.replace_input_with(4, order)
    ir.save(model, tmp_path / "ordered.onnx")
    with pytest.raises(ExportError, match=r"'up.weight_Q4' .* orders its inputs by g_idx; fold into the file before"):
        fold_into_onnx(tmp_path / "ordered.onnx", two / "adapter", tmp_path / "out.onnx")


def test_dora_beside_a_quantized_weight_leaves_its_bias_alone(tmp_path: Path) -> None:
    torch.manual_seed(4)
    linear = nn.Sequential(nn.Linear(64, 7))
    gm = lora_fx.trace(linear.eval(), (torch.randn(3, 64),))
    randomised = lora_fx.inject(gm, LoraConfig(r=2, target_modules=["0"], use_dora=True)).eval()
    randomise(randomised)
    lora_fx.save_adapter(randomised, tmp_path / "adapter")
    model = nbits_file(linear[0].weight.detach().numpy(), 8, 32, False)
    (node,) = model.graph.node
    node.input.extend([""] * (5 - len(node.input)) + ["0.bias"])
    node.name = "/0/MatMul"
    model.graph.initializer.append(onnx.numpy_helper.from_array(linear[0].bias.detach().numpy(), "0.bias"))
    onnx.save(model, tmp_path / "base.onnx")
    add_adapter_inputs(tmp_path / "base.onnx", tmp_path / "switch.onnx", tmp_path / "adapter")
    session = AdapterSession(tmp_path / "switch.onnx", provider="cpu")
    session.load("x", tmp_path / "adapter")
    x = random(3, 64)
    with torch.no_grad():
        wanted, plain = randomised(torch.from_numpy(x)).numpy(), linear(torch.from_numpy(x)).numpy()
    assert distance(session.run({"x": x}), [plain]) < 0.02
    assert distance(session.run({"x": x}, "x"), [wanted]) < 0.02  # what 8 bits leave; the bias scaled makes 0.06

"""Folding into files with weights beside them, a block of rows at a time: values, memory, and odd places of weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import onnx_scale
from benchmarks.apart import run_apart
from benchmarks.onnx_scale import SCALING, R, Shapes, write_adapter, write_model
from exporters import fold_into_onnx, streamed_weights, unfold_onnx
from exporters.onnx_deltas import output_norms
from exporters.onnx_sites import Form
from exporters.stored_weights import read_weight
from lora_fx import AdapterError, ExportError

SMALL = Shapes(wide=67, deep=160, vocabulary=83, channels=7, experts=3)
STRENGTH = 0.7
BOUND = 60 * onnx_scale.MEBI
EPS = {ir.DataType.FLOAT: 2.0**-23, ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
DORA = ("table", "up", "down", "conv", "few")


def values_in(file: Path) -> dict[str, np.ndarray]:
    """All float weights, and the quantized one, as float64."""
    initializers = ir.load(file).graph.initializers
    names = [*SMALL.floats, "few.weight_Q4"]
    return {name.removesuffix("_Q4"): read_weight(initializers[name]).astype(np.float64) for name in names}


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def deltas(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """scaling · B @ A by the definition, in the shapes of the weights as the file stores them."""
    low = {name.removeprefix("base_model.model."): each.astype(np.float64) for name, each in tensors.items()}
    a, b = ({n: low[f"{n}.lora_{half}.weight"] for n in ("up", "down", "conv", "back", "few")} for half in "AB")
    c, e = SMALL.channels, SMALL.experts
    up = b["back"][:, :, 0, 0].reshape(2, c, 1)
    parts = {
        "table": (low["table.lora_embedding_B"] @ low["table.lora_embedding_A"]).T,
        "up": b["up"] @ a["up"],
        "down": (b["down"] @ a["down"]).T,
        "few": b["few"] @ a["few"],
        "conv": np.concatenate([np.einsum("oq,qikl->oikl", b["conv"][g * c : g * c + c, :, 0, 0], a["conv"][g : g + 1])
                                for g in range(2)]),
        "back": np.concatenate([np.einsum("oq,qikl->iokl", up[g], a["back"][g : g + 1]) for g in range(2)]),
        "experts": np.einsum(
            "ore,eri->eio", low["experts.lora_B.weight"].reshape(-1, R, e),
            low["experts.lora_A.weight"].reshape(e, R, -1),
        ),
    }  # fmt: skip
    return {f"{name}.weight": SCALING * each for name, each in parts.items()}


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", EPS)
def test_every_kind_of_weight(dtype: ir.DataType, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into another file and in place: what the definition says, in float64, and rounded once."""
    monkeypatch.setattr(streamed_weights, "BLOCK", block)
    base = write_model(tmp_path, SMALL, dtype)
    stored = ml_dtypes.bfloat16 if dtype is ir.DataType.BFLOAT16 else np.float16  # 16 bits are widened when needed
    adapter = write_adapter(tmp_path / "adapter", SMALL, stored)
    tensors = load_file(adapter / "adapter_model.safetensors")
    before, old = files_in(tmp_path), values_in(base)
    (tmp_path / "out").mkdir()
    report = fold_into_onnx(base, adapter, tmp_path / "out" / "out.onnx", strength=STRENGTH)
    assert {weight.name for weight in report.weights} == {*SMALL.floats, "few.weight_Q4"} - {"rest.weight"}
    new = values_in(tmp_path / "out" / "out.onnx")
    head = tensors["base_model.model.head.weight"].astype(np.float64)
    exact = {name: old[name] + STRENGTH * delta for name, delta in deltas(tensors).items()}
    exact["head.weight"] = old["head.weight"] + STRENGTH * (head - old["head.weight"])
    exact["rest.weight"] = old["rest.weight"]
    step = (np.abs(exact["few.weight"]).max(axis=1, keepdims=True)) / 7  # four bits, of a block's range
    for name, wanted in exact.items():
        assert name == "rest.weight" or np.abs(new[name] - old[name]).max() > 20 * EPS[dtype] * 0.02
        bound = step if name == "few.weight" else EPS[dtype] * (np.abs(wanted) + 0.5)
        assert (np.abs(new[name] - wanted) <= bound).all(), name
    for weight in report.weights:
        name = weight.name.removesuffix("_Q4")
        assert weight.weight_norm == pytest.approx(np.linalg.norm(old[name]), rel=1e-4)
        assert weight.delta_norm == pytest.approx(np.linalg.norm(exact[name] - old[name]), rel=1e-3)
        lost = np.linalg.norm(new[name] - exact[name]) / np.linalg.norm(exact[name])
        assert weight.error == pytest.approx(lost, abs=1e-4)
    fold_into_onnx(base, adapter, base, strength=STRENGTH)
    assert all(np.array_equal(values, new[name]) for name, values in values_in(base).items())
    unfold_onnx(base)
    assert {file: data for file, data in files_in(tmp_path).items() if "/out/" not in file} == before


@pytest.mark.parametrize("block", [1, 1000])
def test_norms_of_outputs(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA: m / ‖W + ΔW‖ of each output, which a convolution and a quantized weight have along their rows."""
    monkeypatch.setattr(streamed_weights, "BLOCK", block)
    base, adapter = write_model(tmp_path, SMALL, ir.DataType.FLOAT), tmp_path / "adapter"
    tensors = load_file(write_adapter(adapter, SMALL) / "adapter_model.safetensors")
    old, rng = values_in(base), np.random.default_rng(3)
    kept = {k: v for k, v in tensors.items() if k.split(".")[2] in DORA}
    forms = {name: Form("kernel") if name == "conv" else Form("matrix", name in ("table", "down")) for name in DORA}
    magnitudes = {}
    for name in DORA:
        norms = output_norms(old[f"{name}.weight"], forms[name])
        magnitudes[name] = (rng.uniform(1, 2, norms.shape) * norms).astype(np.float32)
        kept[f"base_model.model.{name}.lora_magnitude_vector"] = magnitudes[name].reshape(-1)
    save_file(kept, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R * SCALING, "target_modules": list(DORA), "use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    fold_into_onnx(base, adapter, tmp_path / "out.onnx")
    new, added = values_in(tmp_path / "out.onnx"), deltas(tensors)
    for name in DORA:
        adapted = old[f"{name}.weight"] + added[f"{name}.weight"]
        wanted = magnitudes[name] / output_norms(adapted, forms[name]) * adapted
        bound = np.abs(wanted).max(axis=-1, keepdims=True) / 7 if name == "few" else 1e-5
        assert (np.abs(new[f"{name}.weight"] - wanted) <= bound).all(), name
        assert np.abs(wanted - old[f"{name}.weight"]).max() > 0.01, "the law would be vacuous"


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """In a process of its own: 200 MB of weights of all kinds, and less than a third of that above import."""
    large = Shapes(wide=2048, deep=4096, vocabulary=8000, channels=256, experts=5)
    base, adapter = write_model(tmp_path, large, foreign=True), write_adapter(tmp_path / "adapter", large)
    assert (tmp_path / "base.onnx.data").stat().st_size > 3 * BOUND
    data = sha256(tmp_path / "base.onnx.data")
    runs = [onnx_scale.fold_apart(base, adapter, out) for out in (tmp_path / "out.onnx", base)]
    assert sha256(tmp_path / "base.onnx.data") != data
    runs.append(run_apart("exporters.unfold_onnx", onnx_scale.MODULES, path=str(base)))
    assert sha256(tmp_path / "base.onnx.data") == data
    assert all(0 < run.anonymous <= BOUND for run in runs), runs


def sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# Odd places of weights ---------------------------------------------------------------------------


def write_odd(directory: Path, places: dict[str, tuple[ir.DataType, tuple[int, ...], int]], size: int = 4000) -> Path:
    """A MatMul with "fc.weight" (6, 5), and initializers that lie where they are told to, in random bytes."""
    from onnx import TensorProto, helper

    small = np.random.default_rng(5).integers(0, 60, size, dtype=np.uint8)  # of any type, a small number
    (directory / "odd.data").write_bytes(small.tobytes())
    tensors = []
    for name, (dtype, shape, offset) in places.items():
        tensor = TensorProto(name=name, data_type=int(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="odd.data")
        if offset:  # which may be left out, as the length
            tensor.external_data.add(key="offset", value=str(offset))
        tensors.append(tensor)
    kind = int(places["fc.weight"][0])
    ports = [helper.make_tensor_value_info(name, kind, [2, width]) for name, width in (("x", 6), ("y", 5))]
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"], "/fc/MatMul")
    graph = helper.make_graph([node], "odd", ports[:1], ports[1:], tensors)
    onnx.save(
        helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)]), directory / "odd.onnx"
    )
    return directory / "odd.onnx"


def adapter_of_fc(directory: Path) -> Path:
    directory.mkdir()
    rng = np.random.default_rng(6)
    shapes = {"A": (2, 6), "B": (5, 2)}
    tensors: dict[str, Any] = {
        f"base_model.model.fc.lora_{half}.weight": rng.standard_normal(shape, dtype=np.float32)
        for half, shape in shapes.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["fc"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


D = ir.DataType
OTHERS = {
    "bf16": (D.BFLOAT16, (7,), 1001), "fp8": (D.FLOAT8E4M3FN, (3, 5), 1100), "fp8b": (D.FLOAT8E5M2, (13,), 1203),
    "int4": (D.INT4, (3, 5), 1301), "uint4": (D.UINT4, (7,), 1401), "int8": (D.INT8, (300,), 1501),
    "none": (D.FLOAT, (0, 5), 1801), "last": (D.DOUBLE, (2, 50), 3200), "scalar": (D.FLOAT, (), 1901),
}  # fmt: skip


def stored(file: Path) -> dict[str, bytes]:
    tensors = {name: value.const_value for name, value in ir.load(file).graph.initializers.items()}
    return {name: each.numpy().tobytes() if each is not None and each.size else b"" for name, each in tensors.items()}


@pytest.mark.parametrize("dtype", [D.FLOAT, D.FLOAT16, D.BFLOAT16, D.DOUBLE])
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_unaligned_places_and_neighbours_of_any_type(offset: int, dtype: ir.DataType, tmp_path: Path) -> None:
    base = write_odd(tmp_path, {"fc.weight": (dtype, (6, 5), offset)} | OTHERS)
    before, files = stored(base), files_in(tmp_path)
    adapter = adapter_of_fc(tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.fc.lora_{half}.weight"].astype(np.float64) for half in "AB")
    old = ir.load(base).graph.initializers["fc.weight"].const_value
    assert old is not None
    exact = old.numpy().astype(np.float64) + 1.5 * (b @ a).T
    (tmp_path / "out").mkdir()
    fold_into_onnx(base, adapter, tmp_path / "out" / "out.onnx")
    fold_into_onnx(base, adapter, base)
    for file in (tmp_path / "out" / "out.onnx", base):
        after = stored(file)
        assert {name for name in before if before[name] != after[name]} == {"fc.weight"}
        new = ir.load(file).graph.initializers["fc.weight"].const_value
        assert new is not None
        eps = {D.DOUBLE: 2.0**-22}.get(dtype, EPS.get(dtype, 0))  # A and B are float32
        assert (np.abs(new.numpy().astype(np.float64) - exact) <= eps * (np.abs(exact) + 1)).all()
    unfold_onnx(base)
    assert all(Path(file).read_bytes() == data for file, data in files.items())


@pytest.mark.parametrize(("other", "offset"), [((6, 5), 8), ((3,), 8), ((2, 5), 124), ((2,), 4)])
def test_two_weights_over_the_same_bytes(other: tuple[int, ...], offset: int, tmp_path: Path) -> None:
    """The other one keeps its own in another file, and nothing is folded in place."""
    base = write_odd(tmp_path, {"fc.weight": (D.FLOAT, (6, 5), 8), "other": (D.FLOAT, other, offset)})
    adapter, before, files = adapter_of_fc(tmp_path / "adapter"), stored(base), files_in(tmp_path)
    if offset + 4 * np.prod(other) > 8:
        with pytest.raises(ExportError, match=r"'fc.weight' and 'other' share their place in 'odd.data'.*another file"):
            fold_into_onnx(base, adapter, base)
    else:
        fold_into_onnx(base, adapter, base)
        unfold_onnx(base)
    assert files_in(tmp_path) == files
    fold_into_onnx(base, adapter, tmp_path / "out.onnx")
    after = stored(tmp_path / "out.onnx")
    assert after["other"] == before["other"]
    assert after["fc.weight"] != before["fc.weight"]


def rename_place(tensor: Any, location: str) -> None:
    next(entry for entry in tensor.external_data if entry.key == "location").value = location


@pytest.mark.parametrize("location", ["link.data", "inner/../odd.data"])
def test_a_file_of_weights_under_two_names(location: str, tmp_path: Path) -> None:
    """Which of them a graph uses says nothing about whose bytes they are."""
    base = write_odd(tmp_path, {"fc.weight": (D.FLOAT, (6, 5), 8), "other": (D.FLOAT, (6, 5), 8)})
    (tmp_path / "link.data").symlink_to("odd.data")
    (tmp_path / "inner").mkdir()
    model = onnx.load(base, load_external_data=False)
    rename_place(model.graph.initializer[1], location)
    onnx.save(model, base)
    adapter, files = adapter_of_fc(tmp_path / "adapter"), files_in(tmp_path)
    with pytest.raises(ExportError, match="'fc.weight' and 'other' share their place"):
        fold_into_onnx(base, adapter, base)
    assert files_in(tmp_path) == files


def test_weights_inside_of_branches_are_somebody_elses_too(tmp_path: Path) -> None:
    base = write_odd(tmp_path, {"fc.weight": (D.FLOAT, (6, 5), 8)})
    model = onnx.load(base, load_external_data=False)
    inner = onnx.TensorProto()
    inner.CopyFrom(model.graph.initializer[0])
    inner.name = "inner"
    ports = [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("yes", "no")]
    branches = [
        onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "inner"], [port.name])], port.name, [], [port],
                               [inner])
        for port in ports
    ]  # fmt: skip
    model.graph.initializer.append(onnx.helper.make_tensor("is_so", onnx.TensorProto.BOOL, [], [True]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    model.graph.node.append(
        onnx.helper.make_node("If", ["is_so"], ["z"], then_branch=branches[0], else_branch=branches[1])
    )
    onnx.save(model, base)
    adapter, files = adapter_of_fc(tmp_path / "adapter"), files_in(tmp_path)
    with pytest.raises(ExportError, match="'fc.weight' and 'inner' share their place"):
        fold_into_onnx(base, adapter, base)
    # A graph beside it whose only weights are those:
    del model.graph.initializer[0], model.graph.node[0], model.graph.output[0]
    onnx.save(model, tmp_path / "branches.onnx")
    write_odd(tmp_path, {"fc.weight": (D.FLOAT, (6, 5), 8)})
    with pytest.raises(ExportError, match="branches.onnx has its weights in the same file"):
        fold_into_onnx(base, adapter, base)
    assert (tmp_path / "odd.data").read_bytes() == files[str(tmp_path / "odd.data")]


def test_a_record_that_somebody_wrote_over_undoes_nothing(tmp_path: Path) -> None:
    base = write_odd(tmp_path, {"fc.weight": (D.FLOAT, (6, 5), 8)})
    fold_into_onnx(base, adapter_of_fc(tmp_path / "adapter"), base)
    for text in ("[]", "{}", '{"places": []}', "3"):
        (tmp_path / "odd.onnx.undo" / "folded.json").write_text(text)
        files = files_in(tmp_path)
        with pytest.raises(ExportError, match="cannot take back the fold of .*folded.json of odd.onnx.undo is not"):
            unfold_onnx(base)
        assert files_in(tmp_path) == files


@pytest.mark.parametrize("dtype", [D.FLOAT8E4M3FN, D.INT8, D.INT4])
def test_weights_that_are_no_floats(dtype: ir.DataType, tmp_path: Path) -> None:
    base = write_odd(tmp_path, {"fc.weight": (dtype, (6, 5), 8)})
    adapter, files = adapter_of_fc(tmp_path / "adapter"), files_in(tmp_path)
    for out in (base, tmp_path / "out.onnx"):
        with pytest.raises(ExportError, match=f"'fc.weight' is {dtype.name}; weights to fold into are floats"):
            fold_into_onnx(base, adapter, out)
    assert files_in(tmp_path) == files


def test_an_empty_weight_has_no_place_for_an_adapter(tmp_path: Path) -> None:
    base = write_odd(tmp_path, {"fc.weight": (D.FLOAT, (0, 5), 8)})
    with pytest.raises(AdapterError, match=r"delta of the shape \[6, 5\], and the file's weight has \[0, 5\]"):
        fold_into_onnx(base, adapter_of_fc(tmp_path / "adapter"), base)


# In place: kills, and what cannot be written -----------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 1, 60])
def test_killed_after_some_blocks(blocks: int, tmp_path: Path) -> None:
    """There is no graph, so nothing half folded can be loaded; unfolding, killed too, puts all back."""
    import subprocess
    import sys

    base, adapter = write_model(tmp_path, SMALL), write_adapter(tmp_path / "adapter", SMALL)
    before = files_in(tmp_path)
    kill = """
import itertools, os, signal, sys
import exporters.onnx_in_place as in_place, exporters.streamed_weights as streamed
def killing(function, after):
    def some(*args):
        for i, item in enumerate(function(*args)):
            if next(count) >= after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item
    count = itertools.count()
    return some
"""
    fold = f"""
streamed.BLOCK = 1000
streamed.NewValues._encoded = killing(streamed.NewValues._encoded, {blocks})
import exporters
exporters.fold_into_onnx({str(base)!r}, {str(adapter)!r}, {str(base)!r})
"""
    unfold = f"""
in_place._PIECE = 1000
in_place._pieces_of = killing(in_place._pieces_of, {blocks})
import exporters
exporters.unfold_onnx({str(base)!r})
"""
    for call in (fold, unfold):
        done = subprocess.run([sys.executable, "-c", kill + call], capture_output=True, text=True, check=False)
        assert done.returncode == -9, done.stderr
        assert not base.exists()
        with pytest.raises(ExportError, match=r"is away, since a fold in place was interrupted; unfold_onnx"):
            fold_into_onnx(base, adapter, tmp_path / "out.onnx")
    unfold_onnx(base)
    assert files_in(tmp_path) == before


def test_values_out_of_range_are_found_while_they_are_written_in_place(tmp_path: Path) -> None:
    base = write_odd(tmp_path, {"fc.weight": (D.FLOAT16, (6, 5), 8)})
    adapter, files = adapter_of_fc(tmp_path / "adapter"), files_in(tmp_path)
    with pytest.raises(ExportError, match="folding fc makes values of 'fc.weight' that FLOAT16 cannot hold"):
        fold_into_onnx(base, adapter, base, strength=1e6)
    assert files_in(tmp_path) == files


def test_unfolding_goes_without_a_copy_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    base = write_odd(tmp_path, {"fc.weight": (D.FLOAT, (6, 5), 8)})
    adapter, files = adapter_of_fc(tmp_path / "adapter"), files_in(tmp_path)
    fold_into_onnx(base, adapter, base)
    monkeypatch.setattr("exporters.onnx_in_place._write_tensors", full)
    with monkeypatch.context() as patch:
        patch.setattr("exporters.onnx_in_place.write_through", full)
        with pytest.raises(ExportError, match=r"No space left.*call it again"):
            unfold_onnx(base)
    assert not base.exists()
    unfold_onnx(base)
    assert files_in(tmp_path) == files

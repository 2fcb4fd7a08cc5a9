"""Files of other exporters: an adapter is folded into them, or given inputs, as into our own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from deployed import BOUND, distance, same_bits

from exporters import (
    AdapterSession,
    add_adapter_inputs,
    add_adapter_stacks,
    compare_onnx,
    fold_into_onnx,
    make_session,
    unfold_onnx,
)
from lora_fx import AdapterError, ExportError

FOREIGN = Path(__file__).parent / "foreign"
MODELS = {
    "torch": "bert", "optimum_bert": "bert", "optimum_llama": "llama", "optimum_gpt2": "gpt2", "genai_fp32": "llama",
}  # fmt: skip


def values(model: str) -> dict[str, np.ndarray]:
    with np.load(FOREIGN / model / "values.npz") as file:
        return dict(file)


def feed_of(session: ort.InferenceSession, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the file wants beside ids and mask: positions, types, and an empty cache."""
    ids = given["input_ids"]
    feed = {}
    for port in session.get_inputs():
        if port.name in given:
            feed[port.name] = given[port.name]
        elif port.name == "position_ids":
            feed[port.name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        elif port.name == "token_type_ids":
            feed[port.name] = np.zeros_like(ids)
        else:
            feed[port.name] = np.zeros((len(ids), port.shape[1], 0, 16 if port.shape[1] == 2 else 8), np.float32)
    return feed


def first_output(path: Path, model: str, adapter: Path | None = None) -> list[np.ndarray]:
    session = make_session(path, provider="cpu", adapter=adapter)
    return [session.run(None, feed_of(session, values(model)))[0]]


@pytest.mark.parametrize("name", MODELS)
def test_folding_and_switching(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    base, adapter, wanted = FOREIGN / name / "model.onnx", FOREIGN / model / "adapter", values(model)
    assert distance(first_output(base, model), [wanted["base"]]) < BOUND, "the file is not the model's"
    assert distance([wanted["adapted"]], [wanted["base"]]) > 100 * BOUND

    report = fold_into_onnx(base, adapter, tmp_path / "folded.onnx")
    if name != "genai_fp32":  # which has ops that onnx does not know
        onnx.checker.check_model(str(tmp_path / "folded.onnx"), full_check=True)
    diff = compare_onnx(base, tmp_path / "folded.onnx")
    assert diff.same_graph, str(diff)
    assert set(diff.values_changed) == {weight.name for weight in report.weights}
    assert distance(first_output(tmp_path / "folded.onnx", model), [wanted["adapted"]]) < BOUND
    assert distance(first_output(base, model, adapter), [wanted["adapted"]]) < BOUND

    add_adapter_inputs(base, tmp_path / "switch.onnx", adapter)
    session = AdapterSession(tmp_path / "switch.onnx", provider="cpu")
    session.load("x", adapter)
    feed = feed_of(session.session, wanted)
    assert same_bits(session.run(feed)[:1], first_output(base, model))
    assert distance(session.run(feed, "x")[:1], [wanted["adapted"]]) < BOUND

    add_adapter_stacks(base, tmp_path / "rows.onnx", {"x": adapter}, inputs=[feed])
    session = AdapterSession(tmp_path / "rows.onnx", provider="cpu")
    mixed = session.run(feed | {"adapter_ids": np.array([0, 1])})[0]
    assert same_bits([mixed[0]], [first_output(base, model)[0][0]])
    assert distance([mixed[1]], [wanted["adapted"][1]]) < BOUND


def test_in_place_on_the_weights_of_another_exporter(tmp_path: Path) -> None:
    shutil.copytree(FOREIGN / "genai_fp32", tmp_path / "model")
    file, data = tmp_path / "model" / "model.onnx", tmp_path / "model" / "model.onnx.data"
    before = file.read_bytes(), data.read_bytes()
    fold_into_onnx(file, FOREIGN / "llama" / "adapter", file)
    assert distance(first_output(file, "llama"), [values("llama")["adapted"]]) < BOUND
    unfold_onnx(file)
    assert (file.read_bytes(), data.read_bytes()) == before


def nameless(path: Path, out: Path) -> dict[str, str]:
    """The same file with no names that mean anything; returns {initializer: what it was}."""
    model = onnx.load(path)
    was = {}
    for number, tensor in enumerate(model.graph.initializer):
        new = f"w{number}"
        for node in model.graph.node:
            node.input[:] = [new if name == tensor.name else name for name in node.input]
        tensor.name, was[new] = new, tensor.name
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
        del node.metadata_props[:]
    del model.graph.value_info[:]
    onnx.save(model, out)
    return was


def test_a_file_without_names_needs_a_mapping(tmp_path: Path) -> None:
    base, adapter = FOREIGN / "optimum_gpt2" / "model.onnx", FOREIGN / "gpt2" / "adapter"
    was = nameless(base, tmp_path / "nameless.onnx")
    with pytest.raises(AdapterError, match="mapping="):
        fold_into_onnx(tmp_path / "nameless.onnx", adapter, tmp_path / "out.onnx")
    mapping = {new: old.removesuffix(".weight") for new, old in was.items() if ".c_" in old and old.endswith("weight")}
    fold_into_onnx(tmp_path / "nameless.onnx", adapter, tmp_path / "out.onnx", mapping=mapping)
    assert distance(first_output(tmp_path / "out.onnx", "gpt2"), [values("gpt2")["adapted"]]) < BOUND
    with pytest.raises(ExportError, match="no initializer of the file"):
        fold_into_onnx(tmp_path / "nameless.onnx", adapter, tmp_path / "out.onnx", mapping={"nope": "x"})


def test_a_packed_weight_without_a_name_takes_a_list(tmp_path: Path) -> None:
    base, adapter = FOREIGN / "genai_fp32" / "model.onnx", FOREIGN / "llama" / "adapter"
    mapping: dict[str, str | list[str]] = {}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        ours = f"model.layers.{layer}"
        mapping[f"{ours}.attn.qkv_proj.MatMul.weight"] = [f"{attention}.{part}_proj" for part in "qkv"]
        mapping[f"{ours}.attn.o_proj.MatMul.weight"] = f"{attention}.o_proj"
        mapping[f"{ours}.mlp.up_proj.MatMul.weight"] = f"{mlp}.up_proj"
    fold_into_onnx(base, adapter, tmp_path / "out.onnx", mapping=mapping)
    assert distance(first_output(tmp_path / "out.onnx", "llama"), [values("llama")["adapted"]]) < BOUND


def test_names_that_begin_otherwise_are_found(tmp_path: Path) -> None:
    """The adapter of a model with a head, and the file of its body, or the other way round."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(FOREIGN / "bert" / "adapter", tmp_path / "adapter")
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k.replace("model.encoder.", "model.bert.encoder."): v for k, v in load_file(tensors).items()}, tensors)
    report = fold_into_onnx(FOREIGN / "torch" / "model.onnx", tmp_path / "adapter", tmp_path / "out.onnx")
    assert distance(first_output(tmp_path / "out.onnx", "bert"), [values("bert")["adapted"]]) < BOUND
    assert any("'bert.'" in note for note in report.notes)


def test_weights_that_genai_quantized(tmp_path: Path) -> None:
    """Dequantized, folded, and quantized again as they were; or left as they are, with floats beside them."""
    base, adapter, wanted = FOREIGN / "genai_int4" / "model.onnx", FOREIGN / "llama" / "adapter", values("llama")
    rounding = distance(first_output(base, "llama"), [wanted["base"]])
    assert rounding > 0.01, "int4 is not that exact"

    report = fold_into_onnx(base, adapter, tmp_path / "folded.onnx")
    assert len(report.weights) == 6  # qkv, o and up of two layers
    assert {weight.dtype for weight in report.weights} == {"int4"}
    assert all(0.01 < weight.error < 0.2 for weight in report.weights), str(report)
    assert compare_onnx(base, tmp_path / "folded.onnx").same_graph
    folded = first_output(tmp_path / "folded.onnx", "llama")
    moved = distance([wanted["adapted"]], [wanted["base"]])
    assert distance(folded, [wanted["adapted"]]) < 0.7 * moved
    assert same_bits(first_output(base, "llama", adapter), folded)

    add_adapter_inputs(base, tmp_path / "switch.onnx", adapter)
    session = AdapterSession(tmp_path / "switch.onnx", provider="cpu")
    session.load("x", adapter)
    feed = feed_of(session.session, wanted)
    assert same_bits(session.run(feed)[:1], first_output(base, "llama"))
    assert distance(session.run(feed, "x")[:1], [wanted["adapted"]]) < 0.7 * moved
    quantized = {t.name for t in onnx.load(tmp_path / "switch.onnx").graph.initializer if t.data_type == 2}
    assert quantized, "the base stays quantized"
    assert not [name for name in quantized if "lora" in name]

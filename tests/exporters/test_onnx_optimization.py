"""Every optimiser is tried and checked; what is wrong is not kept, whatever it promises."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import torch
from deployed import BOUND, ONE, Deployed, distance

import lora_fx
from exporters import export_optimized, fold_into_onnx, make_session, optimize_onnx, read_manifest
from exporters import onnx_optimization as optimization
from lora_fx import ExportError


def test_the_folded_file_is_fused_like_a_base(bert: Deployed, tmp_path: Path) -> None:
    fold_into_onnx(bert.base, bert.adapter(ONE), tmp_path / "folded.onnx")
    report = optimize_onnx(tmp_path / "folded.onnx", tmp_path / "out.onnx", inputs=bert.feeds)
    assert report.best.fusions["Attention"] == 2
    assert report.best.fusions["SkipLayerNormalization"] == 4
    before = len(onnx.load(bert.base).graph.node)
    assert report.best.nodes == len(onnx.load(tmp_path / "out.onnx").graph.node) < before / 2
    session = make_session(tmp_path / "out.onnx", provider="cpu")
    for feed, wanted in zip(bert.feeds, bert.wanted[ONE], strict=True):
        assert distance(session.run(None, feed), wanted) < BOUND
    model = onnx.load(tmp_path / "out.onnx")
    assert set(read_manifest(model)) <= {tensor.name for tensor in model.graph.initializer}
    assert "→" in str(report)


def test_every_model_gets_a_right_result(deployed: Deployed, tmp_path: Path) -> None:
    report = optimize_onnx(deployed.base, tmp_path / "out.onnx", inputs=deployed.feeds)
    plain = report.candidates[0]
    assert report.best.nodes is not None
    assert report.best.nodes < (plain.nodes or 0), str(report)
    session = make_session(tmp_path / "out.onnx", provider="cpu")
    for feed, wanted in zip(deployed.feeds, deployed.wanted["base"], strict=True):
        assert distance(session.run(None, feed), wanted) < 4 * BOUND


def test_a_wrong_or_broken_result_is_not_kept(bert: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(file: Path, out: Path) -> None:
        model = onnx.load(file)
        (weight,) = (t for t in model.graph.initializer if t.name == "pooler.dense.weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
        del model.graph.node[-1].metadata_props[:]
        onnx.save(model, out)

    def invalid(file: Path, out: Path) -> None:
        model = onnx.load(file)
        del model.graph.node[3]
        onnx.save(model, out)

    def crashing(file: Path, out: Path) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(optimization, "_OPTIMISERS", {"wrong": wrong, "invalid": invalid, "crashing": crashing})
    report = optimize_onnx(bert.base, tmp_path / "out.onnx", inputs=bert.feeds)
    assert report.kept == "as it was"
    problems = {each.name: each.problem for each in report.candidates}
    assert "computes something else" in problems["wrong"]
    assert problems["invalid"]
    assert "IndexError" in problems["crashing"]
    assert make_session(tmp_path / "out.onnx", provider="cpu").run(None, bert.feeds[0])


def test_whoever_drops_the_mask_is_found_out(bert: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def maskless(file: Path, out: Path) -> None:
        model = onnx.load(file)
        ones = onnx.helper.make_node("Sub", ["attention_mask", "attention_mask"], ["zeros"])
        used = [node for node in model.graph.node if "attention_mask" in node.input]
        plus = onnx.helper.make_node("Add", ["zeros", "one"], ["all_ones"])
        model.graph.initializer.append(onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [], [1]))
        for node in used:
            node.input[:] = ["all_ones" if name == "attention_mask" else name for name in node.input]
        model.graph.node.insert(0, plus)
        model.graph.node.insert(0, ones)
        onnx.save(model, out)

    monkeypatch.setattr(optimization, "_OPTIMISERS", {"maskless": maskless})
    report = optimize_onnx(bert.base, tmp_path / "out.onnx")  # inputs are made up
    assert "computes something else" in report.candidates[1].problem


def test_opsets_are_tried(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.GELU(), torch.nn.LayerNorm(11), torch.nn.Linear(11, 5))
    gm = lora_fx.trace(model.eval(), (torch.randn(3, 7),))
    report = export_optimized(gm, tmp_path / "out.onnx", opsets=(None, 23, 99))
    names = " ".join(each.name for each in report.candidates)
    assert "opset 20" in names
    assert "opset 23" in names
    assert any(each.name == "opset 99" and each.problem for each in report.candidates)
    x = torch.randn(4, 7)
    got = make_session(tmp_path / "out.onnx", provider="cpu").run(None, {"input": x.numpy()})
    assert distance(got, [model(x).detach().numpy()]) < BOUND
    with pytest.raises(ExportError, match="at none of the opsets"):
        export_optimized(gm, tmp_path / "none.onnx", opsets=(99,))


def test_bad_files_and_inputs_are_refused(bert: Deployed, tmp_path: Path) -> None:
    shutil.copy(bert.base, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="pass inputs="):
        optimize_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx", inputs=[{}])
    assert not (tmp_path / "out.onnx").exists()

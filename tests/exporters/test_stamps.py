"""What a file says of the adapter and the base that are in it, and what an adapter says of its base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import exporters
import lora_fx
from lora_fx import AdapterError, ExportError


def traced(seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.fx.GraphModule]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).eval().to(dtype)
    return model, lora_fx.trace(model, (torch.arange(6).reshape(2, 3),))


def adapted(gm: torch.fx.GraphModule, directory: Path, rank: int = 2) -> torch.fx.GraphModule:
    torch.manual_seed(rank)
    injected = lora_fx.inject(gm, {"r": rank, "target_modules": ["0", "1", "3"], "use_rslora": True})
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(injected):
            parameter.add_(torch.randn_like(parameter) / 4)
    lora_fx.save_adapter(injected, directory)
    return injected


def stamps(file: Path) -> list[dict[str, object]]:
    found = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    return list(json.loads(found.get("lora_fx.folded", "[]")))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's file, an adapter of it, and the same of another base."""
    root = tmp_path_factory.mktemp("stamps")
    for seed in (1, 2):
        _, gm = traced(seed)
        adapted(gm, root / f"adapter{seed}")
        exporters.export_onnx(gm, root / f"base{seed}.onnx", check=False)
    return root


def test_an_export_of_a_folded_graph_says_what_is_in_it(one: Path, tmp_path: Path) -> None:
    _, gm = traced(1)
    injected = adapted(gm, tmp_path / "adapter")
    lora_fx.set_adapters(injected, {"default": 0.5})
    file = tmp_path / "folded.onnx"
    exporters.export_onnx(lora_fx.fold(injected), file, check=False)
    read = lora_fx.read_adapter(tmp_path / "adapter")
    (stamp,) = stamps(file)
    assert stamp["adapter"] == read.data_sha256
    assert stamp["base"] == json.loads(read.metadata["lora_fx.base"])["sha256"]
    assert (stamp["strength"], stamp["r"], stamp["use_rslora"]) == (0.5, 2, True)
    with pytest.raises(ExportError, match="already"):
        exporters.fold_into_onnx(file, tmp_path / "adapter", tmp_path / "twice.onnx")
    assert not stamps(one / "base1.onnx")


def test_what_is_folded_one_after_the_other_is_all_recorded(tmp_path: Path) -> None:
    _, gm = traced(1)
    first = lora_fx.fold(adapted(gm, tmp_path / "a"), inplace=True)
    assert len(lora_fx.fold_report(first).stamps) == 1
    assert not hasattr(lora_fx.unfold(first), "stamps")
    first = lora_fx.fold(first)
    second = lora_fx.fold(adapted(first, tmp_path / "b", rank=3))
    exporters.export_onnx(second, tmp_path / "both.onnx", check=False)
    wanted = [lora_fx.read_adapter(tmp_path / name).data_sha256 for name in "ab"]
    assert [stamp["adapter"] for stamp in stamps(tmp_path / "both.onnx")] == wanted


@pytest.mark.parametrize("kind", ["ours", "torch's", "turned"])
def test_a_file_of_another_base_is_refused(kind: str, one: Path, tmp_path: Path) -> None:
    model, _ = traced(2)
    file = one / "base2.onnx"
    if kind != "ours":
        file = tmp_path / "foreign.onnx"
        program = torch.onnx.export(
            model, (torch.arange(6).reshape(2, 3),), dynamo=True, optimize=kind == "turned", verbose=False
        )
        assert program is not None
        program.save(file)
    before = file.read_bytes()
    for write in (exporters.fold_into_onnx, exporters.add_adapter_inputs):
        arguments = (one / "adapter1", tmp_path / "out.onnx")
        if write is exporters.add_adapter_inputs:
            arguments = arguments[::-1]
        with pytest.raises(AdapterError, match="other weights"):
            write(file, *arguments)
    assert file.read_bytes() == before
    assert not (tmp_path / "out.onnx").exists()
    exporters.fold_into_onnx(file, one / "adapter2", tmp_path / "own.onnx")
    ignored = lora_fx.read_adapter(one / "adapter1", integrity="ignored")
    exporters.fold_into_onnx(file, ignored, tmp_path / "meant.onnx")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_of_less_precision_is_the_same_base(dtype: str, one: Path, tmp_path: Path) -> None:
    for seed, is_its_own in ((1, True), (2, False)):
        _, gm = traced(seed)
        exporters.export_onnx(gm, tmp_path / f"{seed}.onnx", dtype=dtype, check=False)
        if is_its_own:
            exporters.fold_into_onnx(tmp_path / f"{seed}.onnx", one / "adapter1", tmp_path / "out.onnx")
        else:
            with pytest.raises(AdapterError, match="other weights"):
                exporters.fold_into_onnx(tmp_path / f"{seed}.onnx", one / "adapter1", tmp_path / "out.onnx")


def test_a_second_adapter_goes_into_what_the_first_was_folded_into(one: Path, tmp_path: Path) -> None:
    _, gm = traced(1)
    adapted(gm, tmp_path / "more", rank=3)
    exporters.fold_into_onnx(one / "base1.onnx", one / "adapter1", tmp_path / "first.onnx")
    exporters.fold_into_onnx(tmp_path / "first.onnx", tmp_path / "more", tmp_path / "both.onnx")
    assert len(stamps(tmp_path / "both.onnx")) == 2


@pytest.mark.parametrize(("moved", "is_ok"), [(2.0**-23, True), (2.0**-19, False)])
def test_what_was_folded_in_the_file_may_differ_by_the_rounding_of_a_sum(
    moved: float, is_ok: bool, one: Path, tmp_path: Path
) -> None:
    _, gm = traced(1)
    injected = adapted(gm, tmp_path / "adapter")
    file = tmp_path / "out.onnx"
    exporters.fold_into_onnx(one / "base1.onnx", tmp_path / "adapter", file)
    model = onnx.load(file)
    (tensor,) = (each for each in model.graph.initializer if each.name == "1.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[3] += np.float32(moved * np.abs(values).max())
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, file)
    report = exporters.verify_onnx(file, lora_fx.fold(injected), provider="cpu")
    assert report.weights.ok == is_ok, str(report)
    assert ("1.weight" in report.weights.rounded) == is_ok

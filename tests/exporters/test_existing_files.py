"""An adapter folded into an existing file, with neither model nor torch: what folding in the graph gives."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zoo
from deployed import BASE, BOUND, ONE, TWO, Deployed, distance, same_bits
from onnx import numpy_helper
from safetensors.numpy import save_file

import lora_fx
from exporters import (
    AdapterSession,
    add_adapter_inputs,
    compare_onnx,
    export_onnx,
    fold_into_onnx,
    make_session,
    streamed_weights,
    unfold_onnx,
    verify_onnx,
)
from lora_fx import AdapterError, ConfigError, ExportError


def files_in(directory: Path) -> dict[str, str]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def base(bert: Deployed, tmp_path: Path) -> Path:
    """A base file that a test may write into."""
    return Path(shutil.copy(bert.base, tmp_path / "model.onnx"))


def test_a_folded_file_computes_what_torch_computes(deployed: Deployed, tmp_path: Path) -> None:
    for who in (ONE, TWO):
        out = tmp_path / f"{who}.onnx"
        report = fold_into_onnx(deployed.base, deployed.adapter(who), out)
        onnx.checker.check_model(str(out), full_check=True)
        diff = compare_onnx(deployed.base, out)
        assert diff.same_graph, str(diff)
        assert set(diff.values_changed) == {weight.name for weight in report.weights}
        session, loaded = (
            make_session(out, provider="cpu"),
            make_session(deployed.base, adapter=deployed.adapter(who), provider="cpu"),
        )
        for feed, wanted, plain in zip(deployed.feeds, deployed.wanted[who], deployed.wanted[BASE], strict=True):
            got = session.run(None, feed)
            assert distance(got, wanted) < BOUND
            assert distance(got, plain) > 100 * BOUND, "the law would be vacuous"
            assert same_bits(loaded.run(None, feed), got)


def test_it_is_the_file_that_folding_in_the_graph_gives(bert: Deployed, tmp_path: Path) -> None:
    fold_into_onnx(bert.base, bert.adapter(ONE), tmp_path / "out.onnx")
    lora_fx.set_adapters(bert.injected, {ONE: 1.0})
    report = verify_onnx(tmp_path / "out.onnx", lora_fx.fold(bert.injected, adapters=[ONE]), provider="cpu")
    assert report.ok, str(report)
    assert report.weights.compared > 20


def test_no_torch_is_needed(bert: Deployed, tmp_path: Path) -> None:
    code = f"""
import sys, numpy, exporters, lora_fx
base, one = {str(bert.base)!r}, {str(bert.adapter(ONE))!r}
exporters.fold_into_onnx(base, one, {str(tmp_path / "folded.onnx")!r})
exporters.make_session(base, adapter=one, provider="cpu")
exporters.add_adapter_inputs(base, {str(tmp_path / "switch.onnx")!r}, one)
exporters.write_onnx_adapter({str(tmp_path / "switch.onnx")!r}, one, {str(tmp_path / "one.onnx_adapter")!r})
exporters.add_adapter_stacks(base, {str(tmp_path / "rows.onnx")!r}, {{"one": one}})
session = exporters.AdapterSession({str(tmp_path / "switch.onnx")!r}, provider="cpu")
session.load("one", one)
exporters.compare_onnx(base, {str(tmp_path / "folded.onnx")!r})
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("external", [True, False])
def test_in_place_and_back_leaves_every_byte(bert: Deployed, tmp_path: Path, external: bool) -> None:
    with lora_fx.disable_adapters(bert.injected):
        export_onnx(bert.injected, tmp_path / "model.onnx", external_data=external, check=False)
    before, file = files_in(tmp_path), tmp_path / "model.onnx"
    plain = make_session(file, provider="cpu").run(None, bert.feeds[1])
    fold_into_onnx(file, bert.adapter(ONE), file)
    got = make_session(file, provider="cpu").run(None, bert.feeds[1])
    assert distance(got, bert.wanted[ONE][1]) < BOUND
    with pytest.raises(ExportError, match="already"):
        fold_into_onnx(file, bert.adapter(ONE), file)
    with pytest.raises(ExportError, match="take that back first"):
        fold_into_onnx(file, bert.adapter(TWO), file)
    assert same_bits(make_session(file, provider="cpu").run(None, bert.feeds[1]), got)
    unfold_onnx(file)
    assert files_in(tmp_path) == before
    assert same_bits(make_session(file, provider="cpu").run(None, bert.feeds[1]), plain)
    with pytest.raises(ExportError, match="not folded in place"):
        unfold_onnx(file)


def test_what_was_kept_is_not_for_a_model_that_was_written_later(bert: Deployed, tmp_path: Path) -> None:
    """By us or by another tool; in one file, or with weights beside it and the very same graph."""
    with lora_fx.disable_adapters(bert.injected):
        export_onnx(bert.injected, tmp_path / "base.onnx", external_data=False, check=False)
    model = onnx.load(tmp_path / "base.onnx")
    for name, external in (("one", False), ("two", True)):
        directory, file = tmp_path / name, tmp_path / name / "model.onnx"
        directory.mkdir()
        onnx.save(model, file, save_as_external_data=external, location="model.onnx.data", size_threshold=0)
        fold_into_onnx(file, bert.adapter(ONE), file)
        later = onnx.load(tmp_path / "base.onnx")
        for tensor in later.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) / 2, tensor.name))
        (directory / "model.onnx.data").unlink(missing_ok=True)
        onnx.save(later, file, save_as_external_data=external, location="model.onnx.data", size_threshold=0)
        before = files_in(directory)
        with pytest.raises(ExportError, match=r"written anew since it was folded in place.*remove that directory"):
            unfold_onnx(file)
        assert files_in(directory) == before


def test_a_fold_that_was_interrupted_is_taken_back(
    bert: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lora_fx.disable_adapters(bert.injected):
        export_onnx(bert.injected, tmp_path / "model.onnx", external_data=True, check=False)
    before, file = files_in(tmp_path), tmp_path / "model.onnx"
    with monkeypatch.context() as patched:
        patched.setattr("exporters.onnx_in_place.save_graph", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        patched.setattr("exporters.onnx_in_place._put_back", lambda *_, **__: None)  # killed: nobody put anything back
        with pytest.raises(ExportError):
            fold_into_onnx(file, bert.adapter(ONE), file)
    assert files_in(tmp_path) != before
    unfold_onnx(file)
    assert files_in(tmp_path) == before


def test_weights_that_another_graph_names_are_not_replaced(bert: Deployed, tmp_path: Path) -> None:
    with lora_fx.disable_adapters(bert.injected):
        export_onnx(bert.injected, tmp_path / "model.onnx", external_data=True, check=False)
    (tmp_path / "model.onnx").rename(tmp_path / "renamed.onnx")
    before = files_in(tmp_path)
    with pytest.raises(ExportError, match=r"model.onnx.data holds the weights of renamed.onnx"):
        fold_into_onnx(tmp_path / "renamed.onnx", bert.adapter(ONE), tmp_path / "model.onnx")
    with lora_fx.disable_adapters(bert.injected), pytest.raises(ExportError, match="may be the weights of an .onnx"):
        export_onnx(bert.injected, tmp_path / "model.onnx", external_data=True, check=False)
    assert files_in(tmp_path) == before
    fold_into_onnx(tmp_path / "renamed.onnx", bert.adapter(ONE), tmp_path / "other.onnx")


def test_a_write_that_fails_half_way_leaves_every_byte(
    bert: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lora_fx.disable_adapters(bert.injected):
        export_onnx(bert.injected, tmp_path / "model.onnx", external_data=True, check=False)
    before = files_in(tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exporters.onnx_in_place.save_graph", full)
    with pytest.raises(ExportError, match="No space left"):
        fold_into_onnx(tmp_path / "model.onnx", bert.adapter(ONE), tmp_path / "model.onnx")
    assert files_in(tmp_path) == before


def test_strength_is_a_factor(bert: Deployed, base: Path, tmp_path: Path) -> None:
    half, back = tmp_path / "half.onnx", tmp_path / "back.onnx"
    fold_into_onnx(base, bert.adapter(ONE), half, strength=0.5)
    values = {n: v for n, v in initializers(half).items() if n.endswith("query.weight")}
    plain, whole = initializers(base), lora_fx.read_adapter(bert.adapter(ONE))
    low = next(low for low in whole.low_rank if low.path.endswith("0.attention.self.query"))
    delta = 7 / 3 * (low.b.astype(np.float64) @ low.a).T
    name = "encoder.layer.0.attention.self.query.weight"
    np.testing.assert_allclose(values[name], plain[name] + 0.5 * delta, rtol=0, atol=1e-6)
    fold_into_onnx(base, bert.adapter(ONE), back, strength=0.0)
    assert all(np.array_equal(value, plain[name]) for name, value in initializers(back).items())


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


# Every kind of op -------------------------------------------------------------------------------

KINDS = [
    case for case in zoo.SMALL
    if case.name in {
        "root", "functional", "addmm", "addmm_factors", "products", "vector", "einsum", "called_twice", "shared_module",
        "shared_parameter", "tied_head", "cond", "multi_head", "encoder_layer", "lookups", "kernels", "experts",
    }
]  # fmt: skip


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_every_kind_of_op(case: zoo.Case, tmp_path: Path) -> None:
    injected = zoo.randomise(zoo.injected(case, zoo.traced(case)))
    lora_fx.save_adapter(injected, tmp_path / "adapter")
    export_onnx(zoo.traced(case), tmp_path / "base.onnx", check=False)
    fold_into_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "out.onnx")
    report = verify_onnx(tmp_path / "out.onnx", zoo.folded(case, injected), [case.arguments()], provider="cpu")
    assert all(check.ok for check in report.checks), str(report)
    plain = verify_onnx(tmp_path / "base.onnx", zoo.folded(case, injected), [case.arguments()], provider="cpu")
    assert not all(check.ok for check in plain.checks), "the law would be vacuous"


class Variants(torch.nn.Module):
    """A convolution, an embedding and linears, with and without biases."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(13, 6)
        self.conv = torch.nn.Conv1d(6, 4, 3, groups=2, padding=1)
        if dtype is torch.float64:  # for which ONNX Runtime's CPU has no convolution
            self.conv = torch.nn.Identity()
        self.up = torch.nn.Linear(6 if dtype is torch.float64 else 4, 11)
        self.norm = torch.nn.LayerNorm(11)
        self.head = torch.nn.Linear(11, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.up(self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)))))


VARIANTS = {
    "plain": {"target_modules": ["words", "conv", "up", "head"]},
    "patterns": {
        "target_modules": ["words", "up", "head"], "rank_pattern": {"up": 5}, "alpha_pattern": {"head": 2},
        "use_rslora": True,
    },
    "dora": {"target_modules": ["words", "up", "head"], "use_dora": True},
    "lora_bias": {"target_modules": ["conv", "up", "head"], "lora_bias": True},
    "in_full": {"target_modules": ["up"], "modules_to_save": ["norm", "head"], "bias": "all"},
    "tokens": {"target_modules": ["up"], "trainable_token_indices": [2, 7]},
    "parameters": {"target_modules": ["head"], "target_parameters": ["up.weight"]},
    "float16": {"target_modules": ["up", "head"]},
    "float64": {"target_modules": ["up", "head"]},
}  # fmt: skip


def variant(name: str, directory: Path) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """(the base's graph, the folded one), with base.onnx and adapter/ in the directory."""
    torch.manual_seed(1)
    dtype = {"float16": torch.float16, "float64": torch.float64}.get(name, torch.float32)
    gm = lora_fx.trace(Variants(dtype).to(dtype).eval(), (torch.randint(0, 13, (2, 7)),))
    injected = lora_fx.inject(gm, lora_fx.LoraConfig(**({"r": 4, "lora_alpha": 7} | VARIANTS[name])))
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(injected):
            parameter.add_(torch.randn_like(parameter) / 3)
    lora_fx.save_adapter(injected, directory / "adapter")
    export_onnx(gm, directory / "base.onnx", check=False)
    return injected, lora_fx.fold(injected)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_folded_and_switched(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_fx.LoraFxWarning)  # float16 loses some of the delta, and says so
        _, folded = variant(name, tmp_path)
    base, adapter, out, switch = (tmp_path / each for each in ("base.onnx", "adapter", "out.onnx", "switch.onnx"))
    fold_into_onnx(base, adapter, out)
    report = verify_onnx(out, folded, base=base, provider="cpu")
    assert all(check.ok for check in report.checks), str(report)
    assert not report.unexpected
    assert not all(check.ok for check in verify_onnx(base, folded, provider="cpu").checks)
    add_adapter_inputs(base, switch, adapter)
    session = AdapterSession(switch, provider="cpu")
    session.load("x", adapter)
    feed = {session.inputs[0]: np.random.default_rng(0).integers(0, 13, (3, 5))}
    assert same_bits(session.run(feed), make_session(base, provider="cpu").run(None, feed))
    wanted = make_session(out, provider="cpu").run(None, feed)
    assert distance(session.run(feed, "x"), wanted) < 64 * float(np.finfo(wanted[0].dtype).eps)


# Bad input --------------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused(bert: Deployed, base: Path, tmp_path: Path) -> None:
    gm = lora_fx.trace(torch.nn.Sequential(torch.nn.Linear(7, 5)), (torch.randn(2, 7),))
    lora_fx.save_adapter(lora_fx.inject(gm, {"target_modules": ["0"]}), tmp_path / "other")
    before = files_in(tmp_path)
    with pytest.raises(AdapterError, match=r"no weight for the adapter's '0'.*mapping=.*Is this adapter of this model"):
        fold_into_onnx(base, tmp_path / "other", tmp_path / "out.onnx")
    assert files_in(tmp_path) == before


def test_shapes_that_do_not_fit_are_refused(bert: Deployed, base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(bert.adapter(ONE), tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("key.lora_B.weight"))
    save_file(tensors | {key: tensors[key][:-1].copy()}, tmp_path / "cut" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="make a delta of the shape"):
        fold_into_onnx(base, tmp_path / "cut", tmp_path / "out.onnx")
    del tensors[key]
    save_file(tensors, tmp_path / "cut" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"no lora_B.weight; it is incomplete"):
        fold_into_onnx(base, tmp_path / "cut", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_config_and_tensors_of_two_adapters_are_refused(bert: Deployed, base: Path, tmp_path: Path) -> None:
    shutil.copytree(bert.adapter(ONE), tmp_path / "mixed")
    config = tmp_path / "mixed" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"r": 4'))
    zoo.reseal(tmp_path / "mixed")
    with pytest.raises(AdapterError, match="do not belong together"):
        fold_into_onnx(base, tmp_path / "mixed", tmp_path / "out.onnx")
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    zoo.reseal(tmp_path / "mixed")
    with pytest.raises(ConfigError, match="save the adapter as plain LoRA"):
        fold_into_onnx(base, tmp_path / "mixed", tmp_path / "out.onnx")


def test_what_is_no_onnx_file_is_refused(bert: Deployed, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ExportError, match="cannot be read as an ONNX file"):
        fold_into_onnx(tmp_path / "text.onnx", bert.adapter(ONE), tmp_path / "out.onnx")
    with pytest.raises(ExportError, match="does not exist"):
        fold_into_onnx(tmp_path / "none.onnx", bert.adapter(ONE), tmp_path / "out.onnx")


def test_a_value_that_overflows_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_fx.LoraFxWarning)
        variant("float16", tmp_path)
    with pytest.raises(ExportError, match="FLOAT16 cannot hold"):
        fold_into_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "out.onnx", strength=1e6)
    assert not (tmp_path / "out.onnx").exists()


def test_a_part_of_a_model_takes_its_part_of_the_adapter(bert: Deployed, base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(bert.adapter(ONE), tmp_path / "more")
    tensors = load_file(tmp_path / "more" / "adapter_model.safetensors")
    twin = {k.replace("encoder.", "decoder."): v for k, v in tensors.items() if ".0.attention.self.query" in k}
    save_file(tensors | twin, tmp_path / "more" / "adapter_model.safetensors")
    config = tmp_path / "more" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"target_modules": ["query", "key", "value", "dense"]})
    )
    with pytest.raises(AdapterError, match="partial=True"):
        fold_into_onnx(base, tmp_path / "more", tmp_path / "out.onnx")
    report = fold_into_onnx(base, tmp_path / "more", tmp_path / "out.onnx", partial=True)
    assert any("decoder.layer.0.attention.self.query" in note for note in report.notes)
    got = make_session(tmp_path / "out.onnx", provider="cpu").run(None, bert.feeds[0])
    assert distance(got, bert.wanted[ONE][0]) < BOUND


# Large weights beside the graph ----------------------------------------------------------------------


def write_large(directory: Path, dtype: type, scale: float = 1.0, *, dora: bool = False) -> tuple[Path, Path]:
    """A graph with all of its weights in a file beside it, and an adapter of them that PEFT could have written."""
    shapes = {"words": (67, 7), "up": (7, 59), "down": (59, 5), "qkv": (5, 60)}  # above 256 bytes
    kept = {f"{name}.weight": np.random.randn(*shape).astype(dtype) for name, shape in shapes.items()}
    kept["up.weight"] = np.ascontiguousarray(kept["up.weight"].T)  # (out, in), of a Gemm
    nodes = [
        onnx.helper.make_node("Gather", ["words.weight", "ids"], ["x"], name="/words/Gather"),
        onnx.helper.make_node("Gemm", ["x", "up.weight"], ["y"], name="/up/Gemm", transB=1),
        onnx.helper.make_node("MatMul", ["y", "down.weight"], ["z"], name="/down/MatMul"),
        onnx.helper.make_node("MatMul", ["z", "qkv.weight"], ["out"], name="/qkv/MatMul"),
    ]
    elements = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [3])],
        [onnx.helper.make_tensor_value_info("out", elements, [3, 60])],
        [numpy_helper.from_array(array, name) for name, array in kept.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, directory / "base.onnx", save_as_external_data=True, size_threshold=0, location="base.onnx.data")
    tensors = {}
    for name, (into, out) in shapes.items():
        ends = ("lora_embedding_A", "lora_embedding_B") if name == "words" else ("lora_A.weight", "lora_B.weight")
        for end, shape in zip(ends, ((2, into), (out, 2)), strict=True):
            tensors[f"base_model.model.{name}.{end}"] = scale * np.random.randn(*shape).astype(np.float32)
        if dora:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = np.random.rand(out).astype(np.float32) + 1
    (directory / "adapter").mkdir()
    save_file(tensors, directory / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(shapes), "use_dora": dora}
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return directory / "base.onnx", directory / "adapter"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_weights_are_folded_by_the_block(
    dtype: type, dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By blocks of a few rows: the same file as of all at once, but for the order in which sums are taken."""
    base, adapter = write_large(tmp_path, dtype, dora=dora)
    whole = fold_into_onnx(base, adapter, tmp_path / "whole.onnx", strength=0.7)
    monkeypatch.setattr(streamed_weights, "BLOCK", 23)
    streamed = fold_into_onnx(base, adapter, tmp_path / "out.onnx", strength=0.7)
    values = [onnx.load(tmp_path / f"{each}.onnx").graph.initializer for each in ("base", "whole", "out")]
    for old, one, other in zip(*([numpy_helper.to_array(each) for each in part] for part in values), strict=True):
        np.testing.assert_allclose(other, one, rtol=4 * np.finfo(dtype).eps, atol=1e-6)
        assert not np.array_equal(other, old)
    assert len(streamed.weights) == len(whole.weights) == 4
    for one, other in zip(whole.weights, streamed.weights, strict=True):
        assert (one.name, one.paths, one.dtype) == (other.name, other.paths, other.dtype)
        assert (other.weight_norm, other.delta_norm) == pytest.approx((one.weight_norm, one.delta_norm), rel=1e-4)
        assert (other.kept, other.error) == pytest.approx((one.kept, one.error), abs=1e-3)


def test_a_large_weight_that_overflows_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_large(tmp_path, np.float16, scale=1e4)
    monkeypatch.setattr(streamed_weights, "BLOCK", 23)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ExportError, match=r"folding words makes values of .* that FLOAT16 cannot hold"):
        fold_into_onnx(base, adapter, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_wrong_call_is_no_damaged_file() -> None:
    with pytest.raises(TypeError, match=r"^add_adapter_inputs\(\): too many positional arguments"):
        add_adapter_inputs("base.onnx", "out.onnx", "a", "b")  # type: ignore[call-arg, arg-type]

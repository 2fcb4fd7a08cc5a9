"""Law 5: the folded file is op for op the base's file. And: the file computes what the graph computes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zoo
from models import TRANSFORMERS, Exported, export_pair
from onnx import numpy_helper

from exporters import WeightCheck, compare_onnx, export_onnx, read_manifest, verify_onnx
from exporters.weight_check import check_weights


@pytest.fixture(scope="module", params=TRANSFORMERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A transformer, and what its two exports gave; exported once, looked at by all tests."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model, kwargs = TRANSFORMERS[request.param]()
    return export_pair(model, (), kwargs, tmp_path_factory.mktemp(request.param))


def test_folded_file_is_op_for_op_the_base_file(pair: Exported) -> None:
    diff = compare_onnx(pair.base.path, pair.twin.path)
    assert diff.same_ops, str(diff)
    assert diff.same_graph, str(diff)
    assert pair.twin.nodes == pair.base.nodes == sum(pair.base.ops.values())


def test_exactly_the_adapted_weights_differ(pair: Exported) -> None:
    diff = compare_onnx(pair.base.path, pair.twin.path)
    weights = read_manifest(onnx.load(pair.twin.path))
    assert {weights[name].fqn for name in diff.values_changed} == pair.adapted
    assert len(pair.adapted) >= 8, "the law would be vacuous"


def test_no_node_more_than_torch_writes_itself(pair: Exported) -> None:
    kwargs = pair.gm.meta["lora_fx"].trace.kwargs
    free = {name: {0: "batch", 1: "sequence"} if value.ndim == 2 else {0: "batch"} for name, value in kwargs.items()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        program = torch.onnx.export(
            pair.model.eval(), (), kwargs=kwargs, dynamo=True, verbose=False, dynamic_shapes=free
        )
    assert program is not None
    assert pair.twin.nodes <= len(program.model.graph)


def test_file_computes_what_the_adapted_graph_computes(pair: Exported) -> None:
    """At two shapes, against the graph that still has its adapters: export and fold in one."""
    report = verify_onnx(pair.twin.path, pair.injected, base=pair.base.path, provider="cpu")
    report.raise_if_failed()
    assert report.ok
    assert len(report.checks) == 2
    assert report.checks[0].shapes != report.checks[1].shapes
    assert report.providers == ("CPUExecutionProvider",)
    assert report.weights.compared > 0
    (note,) = report.weights.notes
    assert note.startswith("weights not compared, under adapters that are not folded: ")


def test_every_weight_is_compared_with_the_folded_graph(pair: Exported) -> None:
    assert check_weights(Path(pair.twin.path), pair.folded) == WeightCheck(len(pair.twin.weights), {}, ())
    manifest = read_manifest(onnx.load(pair.base.path))
    assert manifest == read_manifest(pair.base.path)
    differing = check_weights(Path(pair.base.path), pair.folded).differing
    assert {manifest[name].fqn for name in differing} == pair.adapted


@pytest.mark.parametrize("name", ["lookups", "kernels", "experts", "unread"])
def test_other_kinds_of_sites_leave_no_trace_either(name: str, tmp_path: Path) -> None:
    case = zoo.BY_NAME[name]
    gm = zoo.traced(case)
    adapted = zoo.randomise(zoo.injected(case, gm))
    folded = zoo.folded(case, adapted)
    export_onnx(gm, tmp_path / "base.onnx")
    export_onnx(folded, tmp_path / "folded.onnx")
    diff = compare_onnx(tmp_path / "base.onnx", tmp_path / "folded.onnx")
    assert diff.same_graph, str(diff)
    # a weight that is read both ways round may stand in the file twice
    assert len(diff.values_changed) >= len(case.targeted)
    verify_onnx(tmp_path / "folded.onnx", adapted, provider="cpu").raise_if_failed()


def test_law_is_not_vacuous(pair: Exported) -> None:
    report = verify_onnx(pair.base.path, pair.injected, provider="cpu")
    assert not report.ok
    assert report.checks[0].relative_error > 100 * report.checks[0].outputs[0].tolerance


def test_dimensions_have_names_on_inputs_and_outputs(pair: Exported) -> None:
    for report in (pair.base, pair.twin):
        first = next(iter(report.inputs.values()))
        assert first[0] == "batch"
        assert {dims[0] for dims in [*report.inputs.values(), *report.outputs.values()]} == {"batch"}
        if "input_ids" in report.inputs:
            assert report.inputs == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
            assert next(iter(report.outputs.values()))[:2] == ("batch", "sequence")


def test_outputs_have_the_keys_of_the_models_output(pair: Exported) -> None:
    expected = list(pair.model.eval()(**pair.gm.meta["lora_fx"].trace.kwargs).keys())
    assert list(pair.twin.outputs) == [name for name in expected if name != "past_key_values"]


def test_every_weight_has_its_own_name_and_recorded_layout(pair: Exported) -> None:
    proto = onnx.load(pair.twin.path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    parameters = dict(pair.folded.named_parameters(remove_duplicate=False))
    manifest = read_manifest(proto)
    assert set(manifest) <= set(stored)
    for name, weight in manifest.items():
        assert weight.layout in ("as_stored", "transposed")
        assert name in (weight.fqn, f"{weight.fqn}.T")
        value = parameters[weight.fqn].detach()
        value = value if weight.perm is None else value.permute(weight.perm)
        assert (weight.perm is None) == (weight.layout == "as_stored")
        assert tuple(value.shape) == weight.shape
        np.testing.assert_array_equal(stored[name], value.numpy())
    found = {fqn for weight in manifest.values() for fqn in (weight.fqn, *weight.aliases)}
    assert pair.adapted <= found
    assert tuple(manifest.values()) == tuple(sorted(pair.twin.weights, key=lambda weight: weight.name))


def test_no_large_weight_is_anonymous(pair: Exported) -> None:
    proto = onnx.load(pair.twin.path)
    manifest = read_manifest(proto)
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 64]
    assert {t.name for t in floats} <= set(manifest)


def test_file_tells_nothing_about_this_machine(pair: Exported) -> None:
    data = Path(pair.twin.path).read_bytes()
    for secret in (b"site-packages", b"stack_trace", b".py", str(Path.home()).encode(), str(Path.cwd()).encode()):
        assert secret not in data, secret
    assert re.search(rb"File \"|line \d+, in", data) is None


def test_nodes_keep_the_module_they_come_from(pair: Exported) -> None:
    proto = onnx.load(pair.twin.path)
    keys = {prop.key for node in proto.graph.node for prop in node.metadata_props}
    assert keys == {"pkg.torch.onnx.name_scopes"}
    scopes = " ".join(prop.value for node in proto.graph.node for prop in node.metadata_props)
    layer = next(name for name in sorted(pair.adapted) if re.search(r"\.0\.", name)).rpartition(".")[0]
    assert layer in scopes


def test_export_leaves_graph_and_weights_as_they_were(pair: Exported, tmp_path: Path) -> None:
    from exporters import export_onnx

    gm = pair.folded
    before = _fingerprint(gm)
    export_onnx(gm, tmp_path / "again.onnx", check=False)
    assert _fingerprint(gm) == before
    assert compare_onnx(pair.twin.path, tmp_path / "again.onnx").identical


def _fingerprint(gm: torch.fx.GraphModule) -> str:
    state = [(n, p.requires_grad, p.detach().numpy().tobytes().hex()) for n, p in gm.named_parameters()]
    return json.dumps([state, [m.training for m in gm.modules()], gm.code, [n for n, _ in gm.named_buffers()]])

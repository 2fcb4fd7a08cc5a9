"""Every way in which two files can differ is seen, and called by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import compare_onnx
from lora_fx import ExportError


def make() -> onnx.ModelProto:
    """y = Relu(x @ W + b)."""
    rng = np.random.default_rng(0)
    weights = {"W": rng.standard_normal((7, 5)).astype("f4"), "b": rng.standard_normal(5).astype("f4")}
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"], name="product"),
        helper.make_node("Add", ["h", "b"], ["s"], name="sum"),
        helper.make_node("LeakyRelu", ["s"], ["y"], name="bend", alpha=0.25),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def change_value(m: onnx.ModelProto) -> None:
    value = numpy_helper.to_array(m.graph.initializer[0]).copy()
    value[3, 2] = np.nextafter(value[3, 2], np.float32(9))
    m.graph.initializer[0].CopyFrom(numpy_helper.from_array(value, "W"))


def set_alpha(m: onnx.ModelProto) -> None:
    m.graph.node[2].attribute[0].f = 0.5


def rewire(m: onnx.ModelProto) -> None:
    m.graph.node[1].input[:] = ["b", "h"]


def add_node(m: onnx.ModelProto) -> None:
    m.graph.node[2].output[0] = "z"
    m.graph.node.append(helper.make_node("Relu", ["z"], ["y"], name="more"))


def rename_dimension(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"


def rename_weight(m: onnx.ModelProto) -> None:
    m.graph.initializer[1].name = m.graph.node[1].input[1] = "bias"


def reshape_weight(m: onnx.ModelProto) -> None:
    m.graph.initializer[1].dims[:] = [1, 5]


def set_opset(m: onnx.ModelProto) -> None:
    m.opset_import[0].version = 21


CHANGES: dict[Callable[[onnx.ModelProto], None], tuple[str, object]] = {
    change_value: ("values_changed", ("W",)),
    set_alpha: ("nodes_changed", ("LeakyRelu bend",)),
    rewire: ("nodes_changed", ("Add sum",)),
    add_node: ("ops_added", {"Relu": 1}),
    rename_dimension: ("interface_changed", ("input x",)),
    rename_weight: ("initializers_added", ("bias",)),
    reshape_weight: ("initializers_reshaped", ("b",)),
    set_opset: ("interface_changed", ("opsets {'': 20} and {'': 21}",)),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen(tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    field, expected = CHANGES[change]
    other = make()
    change(other)
    onnx.save(make(), tmp_path / "a.onnx")
    onnx.save(other, tmp_path / "b.onnx")
    diff = compare_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert getattr(diff, field) == expected
    assert not diff.identical
    assert diff.same_graph == (change is change_value)
    assert str(diff)
    assert diff.to_dict()["same_ops"] == diff.same_ops


def test_metadata_and_doc_strings_do_not_count(tmp_path: Path) -> None:
    other = make()
    other.graph.node[0].doc_string = "a note"
    entry = other.graph.node[1].metadata_props.add()
    entry.key, entry.value = "where", "there"
    onnx.save(make(), tmp_path / "a.onnx")
    onnx.save(other, tmp_path / "b.onnx")
    diff = compare_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert diff.identical
    assert diff.values_equal == 2


def test_external_and_inline_weights_are_equal(tmp_path: Path) -> None:
    onnx.save(make(), tmp_path / "a.onnx")
    onnx.save(make(), tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
    assert (tmp_path / "b.data").exists()
    assert compare_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx").identical


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff\xff"])
def test_unreadable_file(tmp_path: Path, content: bytes) -> None:
    onnx.save(make(), tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"b\.onnx.*export it again"):
        compare_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    with pytest.raises(ExportError, match="does not exist"):
        compare_onnx(tmp_path / "c.onnx", tmp_path / "a.onnx")

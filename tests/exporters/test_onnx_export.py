"""What export_onnx takes, what it refuses and how, and what is left behind when it fails: nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from models import Mlp, Tied, Twins, export_pair, randomise
from onnx import numpy_helper
from torch import fx, nn
from torch.export import Dim

import lora_fx
from exporters import compare_onnx, export_onnx, make_session, onnx_export, onnx_files, read_manifest, verify_onnx
from exporters.example_inputs import linear
from lora_fx import ExportError, LoraConfig, LoraFxWarning

X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    """An MLP, traced; no test may change it."""
    return lora_fx.trace(Mlp().eval(), (X,))


def exported(model: nn.Module, **options: Any) -> fx.GraphModule:
    """The plain way: torch.export's own module, which has no train() or eval()."""
    return torch.export.export(model, (X,), **options).module()


# -- dialects ---------------------------------------------------------------------------------------


def test_symbolic_trace_graph(tmp_path: Path) -> None:
    gm = torch.fx.symbolic_trace(Mlp())
    assert gm.training
    report = export_onnx(gm, tmp_path / "m.onnx", args=(X,), dynamic_shapes={"x": {0: "rows"}})
    assert gm.training
    assert all(module.training for module in gm.modules())
    assert report.inputs == {"x": ("rows", 7)}
    assert report.outputs == {"output": ("rows", 5)}
    assert [weight.name for weight in report.weights] == ["up.weight", "up.bias", "down.weight", "down.bias"]


def test_all_dialects_write_one_file(tmp_path: Path, gm: fx.GraphModule) -> None:
    model = Mlp().eval()
    shapes = {"x": {0: "batch"}}
    export_onnx(lora_fx.trace(model, (X,)), tmp_path / "trace.onnx")
    export_onnx(lora_fx.trace(model, (X,), tracer="symbolic"), tmp_path / "symbolic.onnx")
    export_onnx(torch.fx.symbolic_trace(model), tmp_path / "fx.onnx", args=(X,), dynamic_shapes=shapes)
    plain = exported(model, dynamic_shapes={"x": {0: Dim.AUTO}})
    export_onnx(plain, tmp_path / "export.onnx", args=(X,), dynamic_shapes=shapes)
    for name in ("symbolic", "fx", "export"):
        diff = compare_onnx(tmp_path / "trace.onnx", tmp_path / f"{name}.onnx")
        assert diff.identical, f"{name}: {diff}"


def test_training_mode_is_restored_also_after_an_error(tmp_path: Path) -> None:
    gm = lora_fx.trace(Mlp(), (X,))
    gm.train()
    gm.get_submodule("up").eval()  # mixed on purpose
    flags, code = [module.training for module in gm.modules()], gm.code
    export_onnx(gm, tmp_path / "m.onnx")
    assert ([module.training for module in gm.modules()], gm.code) == (flags, code)
    with pytest.raises(ExportError):
        export_onnx(gm, tmp_path / "m.onnx", opset=5)
    assert ([module.training for module in gm.modules()], gm.code) == (flags, code)
    assert {p.requires_grad for p in gm.parameters()} == {True}


def test_inplace_folded_graph_exports(tmp_path: Path) -> None:
    injected = lora_fx.inject(lora_fx.trace(Mlp().eval(), (X,)), LoraConfig(r=3, target_modules=["up"]))
    randomise(injected)
    with torch.no_grad():
        expected = injected(X)
    folded = lora_fx.fold(injected, inplace=True)
    export_onnx(folded, tmp_path / "m.onnx")
    got = make_session(tmp_path / "m.onnx", provider="cpu").run(None, {"x": X.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), expected)


# -- law 5 where an optimizer that looks at values breaks it ------------------------------------------


def test_equal_weights_and_zero_biases_keep_their_names(tmp_path: Path) -> None:
    pair = export_pair(Twins(), (X,), {}, tmp_path, target_modules=["first"], bias="none")
    diff = compare_onnx(pair.base.path, pair.twin.path)
    assert diff.same_graph, str(diff)
    assert diff.values_changed == ("first.weight",)
    assert {w.fqn for w in pair.base.weights} == {name for name, _ in pair.gm.named_parameters()}


def test_torch_alone_merges_equal_weights(tmp_path: Path) -> None:
    """The law above is not vacuous: with torch's optimizer on visible weights, the twins' graph shrinks."""
    gm = lora_fx.trace(Twins().eval(), (X,))
    ours = export_onnx(gm, tmp_path / "ours.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "hide_weights", lambda model, names: {})
        theirs = export_onnx(gm, tmp_path / "theirs.onnx")
    assert theirs.nodes < ours.nodes


def test_tied_weight_is_untied_by_fold(tmp_path: Path) -> None:
    ids = torch.randint(0, 13, (2, 5))
    gm = lora_fx.trace(Tied().eval(), (ids,))
    injected = lora_fx.inject(gm, LoraConfig(r=3, lora_alpha=7, target_modules=["head"]))
    randomise(injected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        folded = lora_fx.fold(injected)
    base = export_onnx(gm, tmp_path / "base.onnx")
    twin = export_onnx(folded, tmp_path / "folded.onnx")
    assert compare_onnx(base.path, twin.path).ops_added == {}
    assert twin.nodes <= base.nodes
    verify_onnx(twin.path, injected, provider="cpu").raise_if_failed()


def test_tied_weight_is_stored_under_both_layouts_and_tells_its_aliases(tmp_path: Path) -> None:
    ids = torch.randint(0, 13, (2, 5))
    model = Tied().eval()
    export_onnx(lora_fx.trace(model, (ids,)), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    manifest = read_manifest(proto)
    tied = {name: w for name, w in manifest.items() if {w.fqn, *w.aliases} == {"embedding.weight", "head.weight"}}
    assert sorted(w.layout for w in tied.values()) == ["as_stored", "transposed"]
    stored, transposed = sorted(tied, key=len)
    assert transposed == f"{stored}.T"
    values = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.graph.initializer}
    assert torch.equal(values[stored], model.embedding.weight)
    assert torch.equal(values[transposed], model.embedding.weight.T)


def test_weights_made_of_weights_are_recorded_as_computed(tmp_path: Path) -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log = nn.Parameter(torch.randn(7))
            self.gain = nn.Parameter(torch.randn(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (torch.exp(self.log) * self.gain)

    report = export_onnx(lora_fx.trace(Decay().eval(), (X,)), tmp_path / "m.onnx")
    assert [(w.layout, set(w.fqn.split(", "))) for w in report.weights] == [("computed", {"log", "gain"})]


# -- names ------------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """A parameter and outputs with the names of inputs, inputs returned as they are, None among outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.scale = nn.Parameter(torch.rand(7) + 1)

    def forward(self, scale: torch.Tensor, x: torch.Tensor, linear: None = None) -> dict[str, Any]:
        y = self.linear(x) * self.scale * scale
        return {"x": y, "linear": (x, None, y + 1), "scale": self.scale, "same": y}


def test_clashing_names(tmp_path: Path) -> None:
    gm = lora_fx.trace(Awkward().eval(), (torch.ones(7),), {"x": X})
    report = export_onnx(gm, tmp_path / "m.onnx")
    assert list(report.inputs) == ["scale", "x"]
    assert list(report.outputs) == ["x_out", "linear_0", "linear_2", "scale_out", "same"]
    assert "scale" in {weight.fqn for weight in report.weights}
    assert_manifest_is_true(tmp_path / "m.onnx", gm)
    session = make_session(tmp_path / "m.onnx", provider="cpu")
    assert [port.name for port in session.get_inputs()] == ["scale", "x"]


def assert_manifest_is_true(path: Path, gm: fx.GraphModule) -> None:
    """Every name in the manifest is an initializer, with the value of the weight that it is said to be."""
    proto = onnx.load(path)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    manifest = read_manifest(proto)
    assert set(manifest) <= set(values)
    assert {weight.fqn for weight in manifest.values()} == {name for name, _ in gm.named_parameters()}
    for name, weight in manifest.items():
        own = gm.get_parameter(weight.fqn).detach()
        assert torch.equal(
            torch.from_numpy(values[name].copy()), own if weight.perm is None else own.permute(weight.perm)
        )


class PortNames(nn.Module):
    """An input, the usual output name and a key of the output are names of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7, bias=False)
        self.weight = nn.Parameter(torch.randn(7))
        self.output = nn.Parameter(torch.randn(7))

    def forward(self, weight: torch.Tensor) -> Any:
        return self.first(weight * self.weight) + self.output


class KeyNames(PortNames):
    def forward(self, weight: torch.Tensor) -> Any:
        return {"first.weight": super().forward(weight)}


@pytest.mark.parametrize(("model", "output"), [(PortNames, "output"), (KeyNames, "first.weight")])
def test_ports_with_the_names_of_weights(tmp_path: Path, model: type[nn.Module], output: str) -> None:
    gm = lora_fx.trace(model().eval(), (X,))
    report = export_onnx(gm, tmp_path / "m.onnx")
    assert list(report.inputs) == ["weight"]
    assert list(report.outputs) == [output]
    assert {weight.name for weight in report.weights} == set(read_manifest(onnx.load(tmp_path / "m.onnx")))
    assert_manifest_is_true(tmp_path / "m.onnx", gm)


def test_keyword_arguments_in_any_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return a * 2, b + 1

    inputs = {"a": X, "b": torch.randn(2, 3)}
    report = export_onnx(lora_fx.trace(Two(), (), inputs), tmp_path / "m.onnx")
    feed = {name: value.numpy() for name, value in inputs.items()}
    got = make_session(tmp_path / "m.onnx", provider="cpu").run(list(report.outputs), feed)
    assert list(report.outputs) == ["output_0", "output_1"]
    torch.testing.assert_close(torch.from_numpy(got[0]), X * 2)
    plain = torch.export.export(Two(), (), inputs).module()
    swapped = {"b": inputs["b"], "a": inputs["a"]}
    export_onnx(plain, tmp_path / "n.onnx", kwargs=swapped, dynamic_shapes=None)


def test_nested_inputs(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, d: dict[str, torch.Tensor], pair: list[torch.Tensor]) -> list[torch.Tensor]:
            return [d["q"] + d["p"] * pair[0], pair[1]]

    gm = lora_fx.trace(Nested(), ({"p": X, "q": X + 1}, [X + 2, X + 3]))
    report = export_onnx(gm, tmp_path / "m.onnx")
    assert list(report.inputs) == ["d_p", "d_q", "pair_0", "pair_1"]
    assert list(report.outputs) == ["output_0", "output_1"]
    verify_onnx(tmp_path / "m.onnx", gm, provider="cpu").raise_if_failed()


def test_integer_outputs_and_top_k(tmp_path: Path) -> None:
    class Best(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.argmax(-1), *x.topk(2)

    report = export_onnx(lora_fx.trace(Best(), (X,)), tmp_path / "m.onnx")
    assert report.max_error == 0.0


def test_batch_of_one_stays_free(tmp_path: Path) -> None:
    report = export_onnx(lora_fx.trace(Mlp().eval(), (X[:1],)), tmp_path / "m.onnx")
    assert report.inputs == {"x": ("batch", 7)}
    assert report.shapes_checked == ("x [1, 7]", "x [2, 7]")


# -- dynamic shapes -----------------------------------------------------------------------------------


def test_own_dim_names(tmp_path: Path, gm: fx.GraphModule) -> None:
    for shapes in ({"x": {0: "rows"}}, ({0: Dim("rows")},), {"x": ("rows", None)}, {"x": {-2: "rows"}}):
        assert export_onnx(gm, tmp_path / "m.onnx", dynamic_shapes=shapes).inputs == {"x": ("rows", 7)}
    assert export_onnx(gm, tmp_path / "m.onnx", dynamic_shapes={"x": {0: Dim.AUTO}}).inputs == {"x": ("batch", 7)}
    assert export_onnx(gm, tmp_path / "m.onnx", dynamic_shapes={}).inputs == {"x": (3, 7)}


class Outer(nn.Module):
    """Two inputs whose leading dimensions have nothing to do with one another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(x) @ y.T


AUTO = {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}}


@pytest.mark.filterwarnings("ignore:dimension 1 .* is fixed at 7")
@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ("auto", ("batch", "y_dim_0")),
        (AUTO, ("batch", "y_dim_0")),
        ({"x": {0: Dim.AUTO}, "y": {0: "batch"}}, ("x_dim_0", "batch")),
    ],
    ids=["auto", "AUTO", "mixed"],
)
def test_independent_dimensions_have_two_names(tmp_path: Path, shapes: Any, names: tuple[str, str], rows: int) -> None:
    inputs = (X, torch.randn(rows, 7))
    plain = torch.export.export(Outer(), inputs, dynamic_shapes=AUTO).module()
    for gm in (torch.fx.symbolic_trace(Outer()), plain):
        report = export_onnx(gm, tmp_path / "m.onnx", args=inputs, dynamic_shapes=shapes)
        assert tuple(dims[0] for dims in report.inputs.values()) == names
        assert report.outputs == {"output": names}
        session = make_session(tmp_path / "m.onnx", provider="cpu")
        feed = {"x": torch.randn(2, 7).numpy(), "y": torch.randn(13, 7).numpy()}
        assert session.run(None, feed)[0].shape == (2, 13)


def test_dependent_dimensions_have_one_name(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    gm = torch.export.export(Sum(), (X, X), dynamic_shapes=AUTO).module()
    report = export_onnx(gm, tmp_path / "m.onnx", args=(X, X), dynamic_shapes=AUTO)
    assert report.inputs == {"x": ("batch", 7), "y": ("batch", 7)}


def test_one_name_for_two_sizes(tmp_path: Path) -> None:
    gm, inputs = torch.fx.symbolic_trace(Outer()), (X, torch.randn(5, 7))
    shapes = {"x": {0: "b"}, "y": {0: "b"}}
    with pytest.raises(ExportError, match="dimension 'b' is 3 in 'x' and 5 in 'y'; give them two names"):
        export_onnx(gm, tmp_path / "m.onnx", args=inputs, dynamic_shapes=shapes)
    assert export_onnx(gm, tmp_path / "m.onnx", args=(X, X), dynamic_shapes=shapes).inputs["y"] == ("b", 7)


def test_other_inputs_than_the_remembered_ones(tmp_path: Path) -> None:
    """At trace both were a batch of 3; here they are two sizes, and so two names."""
    gm = lora_fx.trace(Outer(), (X, X), tracer="symbolic")
    assert export_onnx(gm, tmp_path / "m.onnx").inputs == {"x": ("batch", 7), "y": ("batch", 7)}
    report = export_onnx(gm, tmp_path / "m.onnx", args=(X, torch.randn(5, 7)))
    assert report.inputs == {"x": ("batch", 7), "y": ("y_dim_0", 7)}
    with pytest.raises(ExportError):
        export_onnx(gm, tmp_path / "m.onnx", args=(X, torch.tensor(1.0)))


class Pieces(nn.Module):
    """y has a size that follows from x's."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y[: x.shape[0]]


ROWS = Dim("rows", min=2, max=40)


@pytest.mark.parametrize(
    ("derived", "size", "expected"),
    [
        (2 * ROWS, 6, "y [8, 7]"),
        (ROWS + 3, 6, "y [7, 7]"),
        (2 * ROWS - 1, 5, "y [7, 7]"),
        (2 * ROWS + 1, 7, "y [9, 7]"),
    ],
    ids=str,
)
def test_derived_dimensions_move_together(tmp_path: Path, derived: Any, size: int, expected: str) -> None:
    inputs = (X, torch.randn(size, 7))
    shapes = {"x": {0: ROWS}, "y": {0: derived}}
    gm = lora_fx.trace(Pieces(), inputs, dynamic_shapes=shapes)
    report = export_onnx(gm, tmp_path / "m.onnx")
    assert report.inputs == {"x": ("rows", 7), "y": (derived.__name__, 7)}
    assert report.shapes_checked == (f"x [3, 7], y [{size}, 7]", f"x [4, 7], {expected}")
    assert [check.shapes for check in verify_onnx(tmp_path / "m.onnx", gm, provider="cpu").checks] == [
        *report.shapes_checked
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows", ("rows", 1, 0)),
        ("2*rows", ("rows", 2, 0)),
        ("rows + 3", ("rows", 1, 3)),
        ("12*s77 - 1", ("s77", 12, -1)),
        ("my batch-1", ("my batch-1", 1, 0)),
        ("s1*s2", ("s1*s2", 1, 0)),
        ("0*rows", ("0*rows", 1, 0)),
        ("7", ("7", 1, 0)),
    ],
)
def test_reading_of_dimension_names(name: str, expected: tuple[str, int, int]) -> None:
    form = linear(name)
    assert (form.base, form.factor, form.offset) == expected


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": {0: "batch"}}, "dynamic_shapes names 'y', but the graph is called with 'x'"),
        ({"x": {4: "batch"}}, "names dimension 4; it has 2"),
        ({"x": 7}, "dynamic_shapes of 'x' is 7; write {0: \"batch\"}"),
        (7, "does not fit the arguments x"),
        (({}, {}), "does not fit the arguments x"),
    ],
)
def test_bad_dynamic_shapes(tmp_path: Path, gm: fx.GraphModule, shapes: Any, message: str) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(gm, tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert message in str(caught.value)


# -- refusals -----------------------------------------------------------------------------------------


def test_unfolded_adapters_are_refused_with_the_call_that_works(tmp_path: Path, gm: fx.GraphModule) -> None:
    injected = lora_fx.inject(gm, LoraConfig(target_modules=["up"]), adapter_name="tenant")
    with pytest.raises(ExportError) as caught:
        export_onnx(injected, tmp_path / "m.onnx")
    message = str(caught.value)
    assert "'tenant' unfolded" in message
    assert "export_onnx(lora_fx.fold(gm), path)" in message
    assert "export_onnx_adapters(gm, path)" in message
    assert "export_onnx_adapters(gm, path) writes" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 5}, "asked for opset 5, but torch"),
        ({"opset": 99}, "opset=99 is not an operator set that onnx"),
        ({"opset": "20"}, "opset='20' is not an operator set"),
        ({"opset": True}, "opset=True is not an operator set"),
        ({"external_data": "yes"}, "external_data='yes' must be True, False or None"),
        ({"args": (X, X)}, r"do not fit the graph's forward(x)"),
        ({"args": (X.T,)}, "torch.export refuses this graph with these inputs"),
        ({"args": 5}, "args=5 must be a tuple of the graph's positional inputs, such as (x,)"),
        ({"args": "x"}, "args='x' must be a tuple"),
        ({"kwargs": [1]}, "kwargs=[1] must be a dict of the graph's named inputs"),
        ({"kwargs": {1: X}}, "must be a dict of the graph's named inputs"),
    ],
)
def test_bad_options(tmp_path: Path, gm: fx.GraphModule, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(gm, tmp_path / "m.onnx", **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_converter_does_not_reach_is_not_said_to_be_the_only_one(
    tmp_path: Path, gm: fx.GraphModule
) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(gm, tmp_path / "m.onnx", opset=5)
    assert "only" not in str(caught.value)
    assert "pass opset=18, or leave opset=None" in str(caught.value)


def test_a_loss_stays_a_scalar(tmp_path: Path) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.fc(x)
            return nn.functional.cross_entropy(logits, labels), logits

    gm = lora_fx.trace(Loss(), (torch.randn(3, 7), torch.tensor([0, 4, 1])))
    report = export_onnx(gm, tmp_path / "m.onnx")
    assert next(iter(report.outputs.values())) == ()


@pytest.mark.parametrize("opset", [18, 21])
def test_opset_is_what_was_asked_for(tmp_path: Path, gm: fx.GraphModule, opset: int) -> None:
    assert export_onnx(gm, tmp_path / "m.onnx", opset=opset).opset == opset
    proto = onnx.load(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset


def test_graph_without_remembered_inputs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"remembers no example inputs.*args=\(x,\), dynamic_shapes="):
        export_onnx(torch.fx.symbolic_trace(Mlp()), tmp_path / "m.onnx")


def test_not_a_graph(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Mlp is a plain nn.Module, not a graph; trace it first"):
        export_onnx(Mlp(), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="ExportedProgram"):
        export_onnx(torch.export.export(Mlp(), (X,)), tmp_path / "m.onnx")  # type: ignore[arg-type]


class AlwaysDrops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5, training=True)


def training_graphs() -> Iterator[Any]:
    yield pytest.param(lambda: exported(Mlp().train()), id="export")
    yield pytest.param(lambda: torch.fx.symbolic_trace(AlwaysDrops()), id="functional")
    yield pytest.param(lambda: lora_fx.trace(AlwaysDrops(), (X,)), id="trace")
    yield pytest.param(lambda: exported(nn.Sequential(nn.BatchNorm1d(7)).train()), id="batch_norm")
    yield pytest.param(lambda: exported(nn.LSTM(7, 5, 2, dropout=0.3).train()), id="lstm")


@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")  # torch, of its own LSTM
@pytest.mark.parametrize("make", list(training_graphs()))
def test_graphs_that_train_whatever_their_mode_are_refused(make: Callable[[], fx.GraphModule], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="works in training mode, whatever the mode of the module says"):
        export_onnx(make(), tmp_path / "m.onnx", args=(X,))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        model = Mlp().eval()
        gm = lora_fx.trace(model, (X,))
        with torch.no_grad():
            model.down.weight[2, 3] = value
        with pytest.raises(ExportError, match=r"'down\.weight' hold NaN or infinite values"):
            export_onnx(gm, tmp_path / "m.onnx")


def test_weights_without_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Mlp()
    gm = torch.fx.symbolic_trace(model.eval())
    with pytest.raises(ExportError, match=r"'up\.weight', .* have no values \(device 'meta', .*bind_weights"):
        export_onnx(gm, tmp_path / "m.onnx", args=(X,))


def test_outputs_that_are_no_tensors(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x + 1, 3

    with pytest.raises(ExportError, match=r"returns 3 \(int\) as '1', and an ONNX file returns only tensors"):
        export_onnx(lora_fx.trace(Counts(), (X,)), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("result", "kind"), [(lambda x: x.shape[0], "int"), (lambda x: x.shape[0] / 2, "float")], ids=["int", "float"]
)
def test_outputs_that_are_sizes(tmp_path: Path, result: Any, kind: str) -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x + 1, result(x)

    with pytest.raises(ExportError, match=rf"returns a number that its inputs' sizes decide \({kind}\) as '1'"):
        export_onnx(lora_fx.trace(Sizes(), (X,)), tmp_path / "m.onnx")


def test_no_outputs(tmp_path: Path) -> None:
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            x + 1

    with pytest.raises(ExportError, match="the model returns no tensor"):
        export_onnx(lora_fx.trace(Silent(), (X,)), tmp_path / "m.onnx")


def test_operation_that_onnx_does_not_have(tmp_path: Path) -> None:
    class Special(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match=r"torch cannot write this graph in ONNX: .*bessel"):
        export_onnx(lora_fx.trace(Special(), (X,)), tmp_path / "m.onnx")


def test_random_model_is_refused_and_called_random(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(ExportError, match="the model draws random numbers"):
        export_onnx(lora_fx.trace(Noisy(), (X,)), tmp_path / "m.onnx")


def test_bfloat16_cannot_be_checked_here_and_says_what_to_do(tmp_path: Path) -> None:
    gm = lora_fx.trace(Mlp().bfloat16().eval(), (X.bfloat16(),))
    with pytest.raises(ExportError, match=r"does not open in ONNX Runtime on the CPU.*check=False"):
        export_onnx(gm, tmp_path / "m.onnx")
    assert export_onnx(gm, tmp_path / "m.onnx", check=False).max_error is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    report = export_onnx(lora_fx.trace(Mlp().to(dtype).eval(), (X.to(dtype),)), tmp_path / "m.onnx")
    assert report.max_error is not None
    assert report.max_error < 8 * torch.finfo(dtype).eps


class Counter(nn.Module):
    """Writes into a buffer each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count[1:].add_(1)
        return x + self.count


def test_state_is_warned_about_and_left_alone(tmp_path: Path) -> None:
    gm = lora_fx.trace(Counter().eval(), (X,))
    with pytest.warns(LoraFxWarning, match="writes into 'count' when it runs; an ONNX file forgets that"):
        export_onnx(gm, tmp_path / "m.onnx")
    assert float(gm.get_buffer("count").sum()) == 0.0


# -- files --------------------------------------------------------------------------------------------


def test_external_data(tmp_path: Path, gm: fx.GraphModule) -> None:
    path = tmp_path / "m.onnx"
    report = export_onnx(gm, path, external_data=True)
    assert report.data_path == f"{path}.data"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    proto = onnx.load(path, load_external_data=False)
    places = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert places == {"m.onnx.data"}
    export_onnx(gm, tmp_path / "inline.onnx", external_data=False)
    assert compare_onnx(path, tmp_path / "inline.onnx").identical
    assert export_onnx(gm, path, external_data=False).data_path is None
    assert not path.with_name("m.onnx.data").exists(), "data that no file names was left"


def test_external_data_is_automatic_for_large_models(
    tmp_path: Path, gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export_onnx(gm, tmp_path / "m.onnx").data_path is None
    monkeypatch.setattr(onnx_files, "AUTOMATIC_EXTERNAL_BYTES", 500)
    assert export_onnx(gm, tmp_path / "m.onnx").data_path is not None
    monkeypatch.setattr(onnx_files, "PROTOBUF_BYTES", 500)
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=r"external_data=False, but the weights take .* leave external_data=None"):
        export_onnx(gm, tmp_path / "m.onnx", external_data=False)
    assert snapshot(tmp_path) == before


def test_foreign_data_file_is_not_deleted(tmp_path: Path, gm: fx.GraphModule) -> None:
    (tmp_path / "m.onnx").write_bytes(b"something of the user's")
    (tmp_path / "m.onnx.data").write_bytes(b"more of it")
    export_onnx(gm, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").read_bytes() == b"more of it"


def test_data_that_the_old_file_does_not_name_is_not_deleted(tmp_path: Path, gm: fx.GraphModule) -> None:
    export_onnx(gm, tmp_path / "m.onnx", external_data=True)
    (tmp_path / "m.onnx").rename(tmp_path / "n.onnx")
    (tmp_path / "n.onnx.data").write_bytes(b"something of the user's")
    export_onnx(gm, tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx.data").read_bytes() == b"something of the user's"


def test_files_have_the_permissions_of_other_files(tmp_path: Path, gm: fx.GraphModule) -> None:
    old = os.umask(0o027)
    try:
        export_onnx(gm, tmp_path / "m.onnx", external_data=True)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_places_that_cannot_be_written(tmp_path: Path, gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_convert", lambda *a: pytest.fail("the path is checked before the long work"))
    with pytest.raises(ExportError, match=r"the directory .*missing does not exist; make it first \(mkdir -p"):
        export_onnx(gm, tmp_path / "missing" / "m.onnx")
    with pytest.raises(ExportError, match="is a directory; name a file in it"):
        export_onnx(gm, tmp_path)
    with pytest.raises(ExportError, match="cannot write into /proc"):
        export_onnx(gm, "/proc/m.onnx")
    with pytest.raises(ExportError, match="must be a string or a path, not NoneType"):
        export_onnx(gm, None)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="must be a string or a path, not bytes"):
        export_onnx(gm, b"m.onnx")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"path='' is empty; name a file, such as 'model.onnx'"):
        export_onnx(gm, "")
    with pytest.raises(ExportError, match=r"path='m\\x00.onnx' holds a NUL character"):
        export_onnx(gm, "m\0.onnx")
    with pytest.raises(ExportError, match=r"cannot write .*x\.onnx \(File name too long\); choose another name"):
        export_onnx(gm, tmp_path / f"{'x' * 300}.onnx")
    assert not list(tmp_path.iterdir())


def test_longest_name_there_is(tmp_path: Path, gm: fx.GraphModule) -> None:
    path = tmp_path / f"{'x' * 250}.onnx"
    for _ in range(2):  # the second finds the first, and looks for its weights
        assert export_onnx(gm, path).path == str(path)
    with pytest.raises(ExportError, match="File name too long"):
        export_onnx(gm, path, external_data=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_directory_where_the_weights_would_go(tmp_path: Path, gm: fx.GraphModule) -> None:
    (tmp_path / "m.onnx.data").mkdir()
    with pytest.raises(ExportError, match=r"cannot write the weights to .*m\.onnx\.data: it is a directory"):
        export_onnx(gm, tmp_path / "m.onnx", external_data=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx.data"]


def test_link_is_followed(tmp_path: Path, gm: fx.GraphModule) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "m.onnx").symlink_to(tmp_path / "store" / "real.onnx")
    export_onnx(gm, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").is_symlink()
    assert (tmp_path / "store" / "real.onnx").is_file()


def snapshot(directory: Path) -> dict[str, bytes]:
    """Names and bytes of all files below a directory."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def spoil_weight(patch: pytest.MonkeyPatch) -> str:
    """The exporter writes another weight than the graph's."""
    real = onnx_export._optimize

    def spoilt(model: ir.Model, *rest: Any) -> Any:
        weights = real(model, *rest)
        value = model.graph.initializers["up.bias"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() + 0.01, name="up.bias")
        return weights

    patch.setattr(onnx_export, "_optimize", spoilt)
    return "does not compute what torch computes, so nothing was written: at x [3, 7]: 'output': error"


def spoil_weight_a_little(patch: pytest.MonkeyPatch) -> str:
    """The exporter writes another weight, by less than the outputs show."""
    real = onnx_export._optimize

    def spoilt(model: ir.Model, *rest: Any) -> Any:
        weights = real(model, *rest)
        value = model.graph.initializers["up.bias"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * (1 + 1e-6), name="up.bias")
        return weights

    patch.setattr(onnx_export, "_optimize", spoilt)
    return "holds other weights than the graph, so nothing was written. weights: 4 compared bit for bit, 1 differ"


def fail_to_save(patch: pytest.MonkeyPatch) -> str:
    """The disk is full in the middle of writing."""

    def full(model: ir.Model, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(onnx_files.ir, "save", full)
    return "No space left on device"


def fail_to_replace(patch: pytest.MonkeyPatch) -> str:
    """The old file cannot be replaced."""

    def refuse(*paths: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    patch.setattr(onnx_files.os, "replace", refuse)
    return "the old file is as it was"


def fail_the_checker(patch: pytest.MonkeyPatch) -> str:
    """onnx's checker finds something."""

    def find(*args: Any, **kwargs: Any) -> None:
        raise onnx.checker.ValidationError("graph is not sorted\n and more")

    patch.setattr(onnx_files.onnx.checker, "check_model", find)
    return "does not pass onnx's checker, nothing was kept: ValidationError: graph is not sorted"


def interrupt(patch: pytest.MonkeyPatch) -> str:
    """The user presses Ctrl-C while the file is checked."""

    def press(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(onnx_export, "check_file", press)
    return ""


FAILURES = [spoil_weight, spoil_weight_a_little, fail_to_save, fail_to_replace, fail_the_checker, interrupt]


@pytest.fixture(scope="module", params=[False, True], ids=["inside", "external"])
def old_files(request: pytest.FixtureRequest, gm: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the MLP's file, weights inside or beside it."""
    directory: Path = tmp_path_factory.mktemp("old")
    export_onnx(gm, directory / "m.onnx", external_data=request.param)
    return directory


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_leaves_the_old_files(
    tmp_path: Path, gm: fx.GraphModule, old_files: Path, failure: Callable[[pytest.MonkeyPatch], str]
) -> None:
    shutil.copytree(old_files, tmp_path, dirs_exist_ok=True)
    external = (tmp_path / "m.onnx.data").exists()
    before = snapshot(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        message = failure(patch)
        with pytest.raises(ExportError if message else KeyboardInterrupt) as caught:
            export_onnx(gm, tmp_path / "m.onnx", external_data=external)
    assert message in str(caught.value)
    assert snapshot(tmp_path) == before
    assert {file.name for file in tmp_path.iterdir()} == set(before), "something was left behind"


def test_unchecked_export_writes_what_the_check_would_refuse(tmp_path: Path, gm: fx.GraphModule) -> None:
    with pytest.MonkeyPatch.context() as patch:
        spoil_weight(patch)
        report = export_onnx(gm, tmp_path / "m.onnx", check=False)
    assert report.max_error is None
    assert report.shapes_checked == ()
    assert not verify_onnx(tmp_path / "m.onnx", gm, provider="cpu").ok


# -- the rest -----------------------------------------------------------------------------------------


def test_written_weights_are_those_of_the_call(tmp_path: Path) -> None:
    """Training on, or unfolding, after the export does not reach the file nor the report."""
    model = Mlp().eval()
    gm = lora_fx.trace(model, (X,))
    with torch.no_grad():
        expected = model(X)
    report = export_onnx(gm, tmp_path / "m.onnx", external_data=True)
    text = str(report)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    got = make_session(tmp_path / "m.onnx", provider="cpu").run(None, {"x": X.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), expected)
    assert str(report) == text


def test_export_is_silent(tmp_path: Path, gm: fx.GraphModule, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(gm, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


def test_report(tmp_path: Path, gm: fx.GraphModule) -> None:
    report = export_onnx(gm, tmp_path / "m.onnx")
    text = str(report)
    for part in ("3 nodes", "Gemm", "4 as_stored", "['batch', 7]", "x [3, 7]", "x [4, 7]", "opset 20"):
        assert part in text, part
    assert report.size == (tmp_path / "m.onnx").stat().st_size
    assert report.ops == {"Gemm": 2, "Relu": 1}
    assert json.loads(json.dumps(report.to_dict()))["weights"][0]["fqn"] == "up.weight"


def test_manifest_of_other_files(tmp_path: Path, gm: fx.GraphModule) -> None:
    export_onnx(gm, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    assert [w.fqn for w in read_manifest(proto).values()] == ["down.bias", "down.weight", "up.bias", "up.weight"]
    session = make_session(tmp_path / "m.onnx", provider="cpu")
    assert read_manifest(session.get_modelmeta().custom_metadata_map) == read_manifest(proto)
    proto.metadata_props[0].value = '{"version": 1, "weights": {"a": {}}}'
    with pytest.raises(ExportError, match=r"'lora_fx\.weights' in the ONNX file is damaged"):
        read_manifest(proto)
    del proto.metadata_props[:]
    with pytest.raises(ExportError, match="has no record 'lora_fx.weights' of its weights"):
        read_manifest(proto)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_export_from_cuda(tmp_path: Path) -> None:
    gm = lora_fx.trace(Mlp().eval().cuda(), (X.cuda(),))
    export_onnx(gm, tmp_path / "m.onnx")
    verify_onnx(tmp_path / "m.onnx", gm, provider="cuda").raise_if_failed()

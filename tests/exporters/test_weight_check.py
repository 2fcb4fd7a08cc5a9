"""A weight that is not the graph's is found and named, also where no output tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import Mlp, Tied, randomise
from onnx import numpy_helper
from torch import fx, nn

import lora_fx
from exporters import WeightCheck, export_onnx, read_manifest, verify_onnx, weight_check
from exporters.external_data import DATA_HASH_KEY
from exporters.weight_check import check_weights
from lora_fx import ExportError, LoraConfig

X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


class Best(nn.Module):
    """The outputs are integers: small changes of the weights do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).argmax(-1)


class Branches(nn.Module):
    """One of two weights is used, and it depends on the input which."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 7)
        self.down = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.up(x), lambda x: self.down(x).sin(), (x,))


class Named(nn.Module):
    """A weight that is a site itself, and one that the exporter computes from others."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 5))
        self.log = nn.Parameter(torch.randn(5))
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w * (torch.exp(self.log) * self.gain)


def edit(source: Path, target: Path, name: str, change: float = 1e-6, **saving: object) -> None:
    """Copy a file, with another first value in one initializer."""
    proto = onnx.load(source)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    value = numpy_helper.to_array(tensor).copy()
    value.flat[0] += np.asarray(change, value.dtype)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(proto, target, **saving)


def drop_metadata(path: Path, key: str) -> None:
    """Rewrite a file without one of its metadata entries; external data stay as they are."""
    proto = onnx.load(path, load_external_data=False)
    kept = [prop for prop in proto.metadata_props if prop.key != key]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("model", "weight"), [(Best, "linear.weight"), (Branches, "up.weight"), (Branches, "down.weight")]
)
def test_change_that_no_output_shows(model: Callable[[], nn.Module], weight: str, tmp_path: Path) -> None:
    gm = lora_fx.trace(model().eval(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    assert verify_onnx(tmp_path / "m.onnx", gm, provider="cpu").weights == WeightCheck(
        len(list(gm.parameters())), {}, ()
    )
    edit(tmp_path / "m.onnx", tmp_path / "edited.onnx", weight)
    report = verify_onnx(tmp_path / "edited.onnx", gm, provider="cpu")
    assert all(check.ok for check in report.checks), "the outputs tell: the test is vacuous"
    assert not report.ok
    count = gm.get_parameter(weight).numel()
    assert report.weights.differing == {weight: f"1 of {count} values"}
    assert f"1 differ from the graph's: {weight!r} (1 of {count} values)" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["weights"]["differing"] == report.weights.differing
    with pytest.raises(ExportError, match=rf"holds other weights than the graph(.|\n)*'{weight}'(.|\n)*Export the"):
        report.raise_if_failed()


def test_base_does_not_pass_as_the_folded_file_in_half_precision(tmp_path: Path) -> None:
    gm = lora_fx.trace(Mlp().half().eval(), (X.half(),))
    injected = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["up"]))
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(injected):
            parameter.fill_(1e-2)
    folded = lora_fx.fold(injected)
    export_onnx(gm, tmp_path / "base.onnx")
    export_onnx(folded, tmp_path / "folded.onnx")
    assert verify_onnx(tmp_path / "folded.onnx", folded, provider="cpu").ok
    report = verify_onnx(tmp_path / "base.onnx", folded, provider="cpu")
    assert all(check.ok for check in report.checks), "the outputs tell: the test is vacuous"
    assert list(report.weights.differing) == ["up.weight"]
    assert not report.ok


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", ["transposed", "as_stored"])
def test_every_layout_and_place(kind: str, external: bool, tmp_path: Path) -> None:
    gm = lora_fx.trace(Tied().eval(), (torch.randint(0, 13, (2, 5)),))
    path, edited = tmp_path / "m.onnx", tmp_path / "edited.onnx"
    weights = export_onnx(gm, path, external_data=external).weights
    assert check_weights(path, gm).compared == len(weights) == 4
    for name in [weight.name for weight in weights if weight.layout == kind]:
        # The place of external data is the file's own, the order of its tensors another tool's.
        saving = {"save_as_external_data": True, "location": "d.bin", "size_threshold": 0} if external else {}
        edit(path, edited, name, **saving)
        drop_metadata(edited, DATA_HASH_KEY)
        result = verify_onnx(edited, gm, provider="cpu").weights
        assert list(result.differing) == [name]
        (tmp_path / "d.bin").unlink(missing_ok=True)


@pytest.mark.parametrize("changed", ["embedding", "head"])
def test_weight_that_only_the_graph_has_untied(changed: str, tmp_path: Path) -> None:
    """The file holds one tensor where the graph has two, of which either may be the one that differs."""
    ids = torch.randint(0, 13, (2, 5))
    model = Tied().eval()
    export_onnx(lora_fx.trace(model, (ids,)), tmp_path / "m.onnx")
    module = model.get_submodule(changed)
    module.weight = nn.Parameter(model.head.weight.detach() + 1e-3)
    tied = [name for name, w in read_manifest(onnx.load(tmp_path / "m.onnx")).items() if w.aliases]
    differing = check_weights(tmp_path / "m.onnx", lora_fx.trace(model, (ids,))).differing
    assert sorted(differing) == sorted(tied)
    assert len(tied) == 2


def test_file_without_a_record(tmp_path: Path) -> None:
    gm = lora_fx.trace(Best().eval(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    drop_metadata(tmp_path / "m.onnx", "lora_fx.weights")
    report = verify_onnx(tmp_path / "m.onnx", gm, provider="cpu")
    assert report.ok
    assert "the file has no record of its weights, so only outputs were compared" in str(report)


def test_file_with_a_damaged_record(tmp_path: Path) -> None:
    gm = lora_fx.trace(Best().eval(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    proto.metadata_props[0].value = "{}"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="is damaged"):
        verify_onnx(tmp_path / "m.onnx", gm, provider="cpu")


def test_adapters_that_are_not_folded(tmp_path: Path) -> None:
    """The folded file's weights are not the adapted graph's base weights, and need not be."""
    gm = lora_fx.trace(Mlp().eval(), (X,))
    injected = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["up"], bias="all"))
    randomise(injected)
    export_onnx(lora_fx.fold(injected), tmp_path / "m.onnx")
    report = verify_onnx(tmp_path / "m.onnx", injected, provider="cpu")
    report.raise_if_failed()
    assert report.weights.compared == 3
    assert report.weights.notes == ("weights not compared, under adapters that are not folded: 'up.weight'",)
    edit(tmp_path / "m.onnx", tmp_path / "edited.onnx", "down.weight", 1e-7)
    assert list(verify_onnx(tmp_path / "edited.onnx", injected, provider="cpu").weights.differing) == ["down.weight"]


@pytest.mark.parametrize(
    ("model", "adapted"), [(Named, "w"), (lambda: nn.Linear(7, 5), "weight"), (lambda: Mlp().eval(), "down.weight")]
)
@pytest.mark.parametrize("trace", [lambda model: lora_fx.trace(model, (X,)), fx.symbolic_trace])
def test_adapted_weight_is_known_wherever_its_adapter_is(
    model: Callable[[], nn.Module], adapted: str, trace: Callable[[nn.Module], fx.GraphModule], tmp_path: Path
) -> None:
    gm = trace(model())
    export_onnx(gm, tmp_path / "m.onnx", args=(X,))
    target = "|" if adapted == "weight" else adapted.removesuffix(".weight")
    injected = lora_fx.inject(gm, LoraConfig(r=3, target_modules=target))
    notes = check_weights(tmp_path / "m.onnx", injected).notes
    assert f"weights not compared, under adapters that are not folded: {adapted!r}" in notes


def test_unknown_adapters_leave_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = lora_fx.trace(Mlp().eval(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    injected = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["up"]))
    monkeypatch.setattr(weight_check.lora_fx, "find_sites", lambda gm: ())
    assert check_weights(tmp_path / "m.onnx", injected) == WeightCheck(
        0, {}, ("it is not known which weights the adapters change: only outputs were compared",)
    )


def test_other_dtype_is_compared_after_casting(tmp_path: Path) -> None:
    model = Mlp().eval()
    gm = lora_fx.trace(model, (X,))
    half = Mlp().eval()
    half.load_state_dict(model.state_dict())
    export_onnx(lora_fx.trace(half.half(), (X.half(),)), tmp_path / "m.onnx")
    result = check_weights(tmp_path / "m.onnx", gm)
    assert result.ok
    assert result.compared == 4
    assert result.notes == (
        "weights are FLOAT16 in the file and torch.float32 in the graph: compared after casting the graph's",
    )
    with torch.no_grad():
        model.up.weight[0, 0] += 0.01
    assert check_weights(tmp_path / "m.onnx", gm).differing == {"up.weight": "1 of 77 values"}


def test_bfloat16(tmp_path: Path) -> None:
    model = Mlp().bfloat16().eval()
    gm = lora_fx.trace(model, (X.bfloat16(),))
    export_onnx(gm, tmp_path / "m.onnx", check=False)
    assert check_weights(tmp_path / "m.onnx", gm) == WeightCheck(4, {}, ())
    with torch.no_grad():
        model.up.weight[0, 0] += 1
    assert list(check_weights(tmp_path / "m.onnx", gm).differing) == ["up.weight"]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    gm = lora_fx.trace(Named().eval(), (X,))
    (computed,) = [w.name for w in export_onnx(gm, tmp_path / "m.onnx").weights if w.layout == "computed"]
    assert check_weights(tmp_path / "m.onnx", gm).notes == (
        f"weights not compared, computed from the graph's at export: {computed!r}",
    )
    export_onnx(lora_fx.trace(Mlp().eval(), (X,)), tmp_path / "n.onnx")
    notes = "\n".join(check_weights(tmp_path / "n.onnx", gm).notes)
    assert "with no float tensor of that name in the graph: 'down.bias', 'down.weight', 'up.bias'" in notes
    assert "in the graph, and not in the file's record of its weights: 'w', 'log', 'gain'" in notes
    assert "no weight was compared, only outputs were" in notes


def test_initializers_that_another_tool_renamed_or_quantized(tmp_path: Path) -> None:
    gm = lora_fx.trace(Mlp().eval(), (X,))
    export_onnx(gm, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name == "up.bias":
            tensor.name = "up.bias_renamed"
        if tensor.name == "down.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(5, np.int8), tensor.name))
        if tensor.name == "down.weight":
            tensor.dims[:] = [11, 5]
    onnx.save(proto, tmp_path / "m.onnx")
    result = check_weights(tmp_path / "m.onnx", gm)
    assert result.differing == {"down.weight": "shape [11, 5] instead of [5, 11]"}
    assert "weights not compared, no longer in the file under that name: 'up.bias'" in result.notes
    assert "weights not compared, stored as INT8: 'down.bias'" in result.notes


def test_unused_parameters_are_not_missed(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(7, 7)
            self.idle = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.idle(x)
            return self.used(x)

    for gm in (lora_fx.trace(Half().eval(), (X,)), fx.symbolic_trace(Half())):
        export_onnx(gm, tmp_path / "m.onnx", args=(X,))
        assert check_weights(tmp_path / "m.onnx", gm) == WeightCheck(2, {}, ())


def test_long_lists_are_cut() -> None:
    text = str(WeightCheck(9, {f"w{i}": "1 of 2 values" for i in range(7)}, ()))
    assert text.endswith("'w4' (1 of 2 values) and 2 more")

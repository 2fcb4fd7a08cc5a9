"""Training over weights that are stored in a few bits, and folding into them: bitsandbytes and torchao, on the CPU."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import exporters
import lora_fx
from lora_fx import AdapterError, ExportError, FoldError, GraphError, LoraConfig, LoraFxWarning, TargetError
from lora_fx.fold_bases import dequantized

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from peft.utils.integrations import dequantize_module_weight
    from torchao import quantization as ao

KINDS = ("nf4", "fp4", "int8", "ao-int8", "ao-int4")
STORABLE = ("nf4", "fp4", "int8")
CONFIG = LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"])
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(bitsandbytes|torchao|peft).*")


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Of the largest value."""
    return float((expected - found).detach().abs().max() / expected.detach().abs().max())


class Model(nn.Module):
    def __init__(self, make: Any = nn.Linear) -> None:
        super().__init__()
        self.up, self.down, self.head = make(64, 128), make(128, 64), nn.Linear(64, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


def model_of(kind: str) -> Model:
    """The same weights for each kind, in train mode: in eval, bitsandbytes computes otherwise on some CPUs."""
    torch.manual_seed(0)
    floats = Model()
    if kind.startswith("ao"):
        config = ao.Int8WeightOnlyConfig() if kind == "ao-int8" else ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
        ao.quantize_(floats, config, lambda module, name: name in ("up", "down"))
        return floats
    if kind == "int8":
        make = lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False, threshold=0.0)
    else:
        make = lambda i, o: bnb.nn.Linear4bit(i, o, quant_type=kind, compress_statistics=kind == "nf4")
    model = Model(make)
    model.load_state_dict(floats.state_dict())
    return model.to("cpu")  # bitsandbytes quantizes when it moves


@functools.cache
def traced(kind: str) -> tuple[Model, Any]:
    """A model and its graph, which no test changes."""
    model = model_of(kind)
    return model, lora_fx.trace(model, X)


def adapted(kind: str, config: LoraConfig = CONFIG) -> tuple[Model, Any, Any]:
    model, gm = traced(kind)
    torch.manual_seed(2)
    return model, gm, randomise(lora_fx.inject(gm, config))


def randomise(gm: Any) -> Any:
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_(std=0.2)
    return gm


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_they_are_sites_of_their_own_size(kind: str) -> None:
    model, gm, injected = adapted(kind)
    up, down, head = lora_fx.find_sites(gm)
    assert (up.path, up.size, up.dtype, down.size) == ("up", "64 → 128", torch.float32, "128 → 64")
    assert up.op == {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt"}.get(kind, "linear")
    assert head.is_output_head
    assert lora_fx.find_all_linear_names(gm) == ["down", "up"]
    assert torch.equal(gm(X), model(X))
    assert {n: id(p) for n, p in gm.named_parameters()} == {n: id(p) for n, p in model.named_parameters()}
    assert gm.state_dict().keys() == model.state_dict().keys()
    fresh = lora_fx.inject(gm, CONFIG, check=True)
    assert torch.equal(fresh(X), model(X))
    assert {p.dtype for p in lora_fx.lora_parameters(injected)} == {torch.float32}
    assert distance(model(X), injected(X)) > 1e-2


def test_training_moves_the_adapter_and_nothing_else(kind: str) -> None:
    model, _, gm = adapted(kind)
    gm = lora_fx.optimize(gm) if kind == "nf4" else gm
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    optimizer = torch.optim.AdamW(lora_fx.flat_parameters(gm), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (gm.train()(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    for name, value in gm.state_dict().items():
        values = [v.dequantize() if is_traceable_wrapper_subclass(v) else v for v in (value, before[name])]
        assert torch.equal(*values) != ("lora_" in name), name
    assert model(X).isfinite().all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_those_of_the_float_model(kind: str) -> None:
    """Of one with the weights that the bits stand for."""
    _, _, gm = adapted(kind)
    floats = dequantized(gm)
    gradients = []
    for graph in (gm, floats):
        x = X.clone().requires_grad_()
        graph(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in lora_fx.lora_parameters(graph))])
        graph.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert distance(other, one) < 1e-5


def test_the_bits_are_kept_for_the_backward_pass_and_not_what_they_stand_for() -> None:
    _, _, gm = adapted("nf4")
    kept: dict[str, int] = {}
    for name, graph in (("bits", gm), ("floats", dequantized(gm))):
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = graph(X).sum()
        kept[name] = sum(found.values())
        loss.backward()
    assert kept["bits"] < kept["floats"] - 64 * 128 * 3  # one of the two weights at least, but for its bits


def with_peft(kind: str, directory: Path) -> Any:
    """PEFT's model, told what transformers would tell it of the base: without, it takes the bits for the weight."""
    model = model_of(kind)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind in ("nf4", "fp4")
    return peft.PeftModel.from_pretrained(model, directory).train()


def test_files_go_to_peft_and_back(kind: str, tmp_path: Path) -> None:
    _, gm, injected = adapted(kind)
    lora_fx.save_adapter(injected, tmp_path)
    assert torch.equal(lora_fx.load_adapter(gm, tmp_path)(X), injected(X))
    theirs = with_peft(kind, tmp_path)
    assert distance(theirs(X), injected(X)) < 1e-5
    floats = lora_fx.load_adapter(lora_fx.trace(Model(), X), tmp_path)  # on the weights before they were quantized, say
    assert lora_fx.fold_report(lora_fx.fold(floats)).sites[0].kept > 0.999


def test_folding_has_to_be_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, gm = adapted(kind)
    before = gm(X)
    for options in ({}, {"inplace": True}, {"inplace": True, "quantized": "dequantize"}, {"quantized": "round"}):
        with pytest.raises(FoldError, match=r"quantized"):
            lora_fx.fold(gm, **options)
    if kind not in STORABLE:
        with monkeypatch.context() as patch:
            patch.delattr("lora_fx.fold_sums.merge")  # refused before there is a sum
            with pytest.raises(FoldError, match="does not remember"):
                lora_fx.fold(gm, quantized="requantize")
    assert torch.equal(gm(X), before)


def test_dequantized_and_folded_computes_the_same(kind: str) -> None:
    _, _, injected = adapted(kind)
    expected = injected(X)
    folded = lora_fx.fold(injected, quantized="dequantize")
    assert distance(expected, folded(X)) < 1e-5
    assert all(site.op == "linear" and site.dtype is torch.float32 for site in lora_fx.find_sites(folded))
    assert {type(p) for p in folded.parameters()} == {nn.Parameter}
    assert all(site.kept > 0.999 for site in lora_fx.fold_report(folded).sites)
    assert torch.equal(injected(X), expected)
    assert {node.op for node in folded.graph.nodes if node.name != "_guards_fn"} == {
        "placeholder", "get_attr", "call_function", "output"
    }  # fmt: skip


@pytest.mark.parametrize("kind", STORABLE)
def test_requantized_is_what_peft_merges_and_says_what_it_costs(kind: str, tmp_path: Path) -> None:
    model, gm, injected = adapted(kind)
    lora_fx.save_adapter(injected, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoraFxWarning)
        folded = lora_fx.fold(injected, quantized="requantize")
    report = lora_fx.fold_report(folded)
    assert any("keeps only" in str(w.message) for w in caught) == (min(site.kept for site in report.sites) < 0.9)
    assert all(0 < site.kept < 1 for site in report.sites)
    assert folded.code == gm.code
    assert folded.state_dict().keys() == gm.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = with_peft(kind, tmp_path).merge_and_unload().train()
    assert distance(merged(X), folded(X)) < 1e-5
    assert distance(injected(X), folded(X)) < 0.2
    assert torch.equal(gm(X), model(X))  # whose bits are as they were


def requantized(gm: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        return lora_fx.fold(gm, quantized="requantize")


@pytest.mark.parametrize("kind", STORABLE)
def test_what_is_kept_is_what_the_bits_hold_of_the_delta(kind: str) -> None:
    _, _, injected = adapted(kind)
    model, folded = model_of(kind), requantized(injected)  # PEFT puts another parameter into what it reads
    for site in lora_fx.fold_report(folded).sites:
        old, new = (dequantize_module_weight(graph.get_submodule(site.path)).float() for graph in (model, folded))
        low, up = (injected.get_parameter(f"{site.path}.lora_{half}.default.weight").detach() for half in "AB")
        delta = 5 / 3 * up @ low
        assert site.delta_norm == pytest.approx(float(delta.norm()), rel=1e-3)
        assert site.kept == pytest.approx(1 - float((new - old - delta).norm() / delta.norm()), abs=1e-3)
        assert site.stored_as == type(model.up).__name__


@pytest.mark.parametrize("kind", STORABLE)
def test_a_delta_of_zero_changes_no_bit(kind: str) -> None:
    _, gm = traced(kind)
    folded = lora_fx.fold(lora_fx.inject(gm, CONFIG), quantized="requantize")
    assert torch.equal(folded(X), gm(X))
    assert [(site.kept, site.stored_as != "") for site in lora_fx.fold_report(folded).sites] == [(1, True)] * 2
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in folded.state_dict().items())


def test_a_delta_that_is_lost_in_few_bits_is_kept_by_nothing() -> None:
    _, _, injected = adapted("nf4")
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(injected):
            parameter.mul_(1e-3)
    assert {site.kept for site in lora_fx.fold_report(requantized(injected)).sites} == {0}


@pytest.mark.parametrize("kind", STORABLE)
def test_biases_beside_few_bits_are_floats(kind: str) -> None:
    """That of B is added to the base's; both graphs have biases of their own, with the flags that they had."""
    _, gm, injected = adapted(kind, LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], lora_bias=True))
    folded = requantized(injected)
    for name in ("up", "down"):
        bias, added = gm.get_parameter(f"{name}.bias"), injected.get_parameter(f"{name}.lora_B.default.bias")
        torch.testing.assert_close(folded.get_parameter(f"{name}.bias"), bias + 5 / 3 * added, rtol=1e-5, atol=1e-6)
    _, gm, injected = adapted(kind, LoraConfig(r=3, target_modules=["up", "down"], bias="all"))
    folded = requantized(injected)
    assert {n: p.requires_grad for n, p in folded.named_parameters()} == {
        n: p.requires_grad for n, p in gm.named_parameters()
    }
    expected = folded(X)
    with torch.no_grad():
        injected.get_parameter("up.bias").add_(1)
    assert torch.equal(folded(X), expected)


def test_linears_that_share_their_bits_are_folded_alike() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = model_of("nf4").up, model_of("nf4").up
            self.two.weight, self.two.quant_state = self.one.weight, self.one.quant_state

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) - 2 * self.two(x.flip(-1))

    injected = lora_fx.inject(lora_fx.trace(Twice(), X), {"r": 3, "target_modules": ["one", "two"]})
    with torch.no_grad():
        injected.get_parameter("one.lora_B.default.weight").normal_(std=0.2)
    folded = requantized(injected)
    assert folded.get_parameter("one.weight") is folded.get_parameter("two.weight")
    assert distance(injected(X), folded(X)) < 0.2
    assert [site.path for site in lora_fx.fold_report(folded).sites] == ["one"]


def test_adapters_are_measured_against_what_the_bits_stand_for(kind: str) -> None:
    _, _, injected = adapted(kind)
    found = {site.path: site for site in lora_fx.adapter_statistics(injected).sites}
    report = lora_fx.fold_report(lora_fx.fold(injected, quantized="dequantize"))
    assert len(report.sites) == len(found) == 2
    for site in report.sites:
        measured = found[site.path]
        assert (measured.weight_norm, measured.kept) == pytest.approx((site.weight_norm, site.kept), rel=1e-5)


def test_floats_are_those_of_the_graph() -> None:
    """Of the dtype that it computes in, in its mode, and frozen; float32 in a graph that does not say."""
    _, _, injected = adapted("nf4")
    floats = dequantized(injected.eval())
    assert not any(module.training for module in floats.modules())
    assert {n for n, p in floats.named_parameters() if p.requires_grad} == {
        n for n, p in injected.named_parameters() if p.requires_grad
    }
    assert all(module.training for module in dequantized(injected.train()).modules())
    narrow = model_of("ao-int8").bfloat16()
    for gm, dtype in (
        (lora_fx.trace(narrow, X.bfloat16()), torch.bfloat16),
        (fx.symbolic_trace(narrow), torch.float32),
    ):
        folded = lora_fx.fold(lora_fx.inject(gm, CONFIG), quantized="dequantize")
        assert folded.get_parameter("up.weight").dtype == dtype


def test_a_fold_in_place_leaves_few_bits_beside_it_alone() -> None:
    gm = lora_fx.trace(model_of("nf4"), X)  # whose head is written
    injected = lora_fx.inject(gm, {"r": 2, "target_modules": ["head"]})
    with torch.no_grad():
        injected.get_parameter("head.lora_B.default.weight").normal_()
    expected = injected(X)
    with pytest.raises(FoldError, match=r"'up' stores its weight in a few bits .* leave inplace out"):
        lora_fx.fold(injected, inplace=True, quantized="dequantize")
    assert torch.equal(injected(X), expected)
    assert lora_fx.fold(injected, inplace=True) is injected
    assert distance(expected, injected(X)) < 1e-5
    assert type(injected.up) is bnb.nn.Linear4bit


def test_an_adapter_can_stay_when_another_is_folded() -> None:
    _, _, gm = adapted("nf4")
    gm = lora_fx.inject(gm, CONFIG, adapter_name="second")
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm, "second"):
            parameter.normal_(std=0.2)
    expected = gm(X)
    for how, bound in (("dequantize", 1e-5), ("requantize", 0.2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoraFxWarning)
            folded = lora_fx.fold(gm, adapters=["default"], quantized=how)
        assert lora_fx.adapter_names(folded) == ("second",)
        assert distance(expected, folded(X)) < bound
    assert torch.equal(gm(X), expected)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}])
def test_what_reads_the_weight_is_refused(fields: dict[str, Any]) -> None:
    gm = lora_fx.trace(model_of("nf4"), X)
    with pytest.raises(TargetError, match="stored in a few bits"):
        lora_fx.inject(gm, LoraConfig(r=2, target_modules=["up"], **fields))


def test_statistics_are_of_what_the_weight_stands_for(kind: str) -> None:
    _, _, injected = adapted(kind)
    found = lora_fx.adapter_statistics(injected)
    expected = lora_fx.adapter_statistics(dequantized(injected))
    for one, other in zip(found.sites, expected.sites, strict=True):
        assert one.weight_norm == pytest.approx(other.weight_norm, rel=1e-4)
        assert one.delta_norm == pytest.approx(other.delta_norm, rel=1e-6)


def test_few_bits_are_not_trained_in_full(kind: str) -> None:
    gm = lora_fx.trace(model_of(kind), X)
    with pytest.raises(TargetError, match="modules_to_save trains 'down' in full, and a weight of it is stored in a"):
        lora_fx.inject(gm, LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"]))


def test_a_bias_that_was_narrowed_for_the_product_is_as_wide_as_the_weight_again() -> None:
    torch.manual_seed(0)
    model = Model(lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.bfloat16)).to("cpu")
    gm = lora_fx.trace(model, X)
    injected = lora_fx.inject(gm, CONFIG)
    expected = injected(X)  # bitsandbytes narrows the bias meanwhile
    assert injected.get_parameter("up.bias").dtype == torch.bfloat16
    assert distance(expected, lora_fx.fold(injected, quantized="dequantize")(X)) < 2**-7


def test_a_model_of_one_linear_is_refused() -> None:
    with pytest.raises(GraphError, match="wrap it"):
        lora_fx.trace(model_of("nf4").up, X)


def test_under_no_grad_inside_the_model_is_refused() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of("nf4").up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = self.inner(x)
            return y * x.sum()

    model = Frozen()
    with pytest.raises(GraphError, match="can call no module"):
        lora_fx.trace(model, X)
    assert type(model.inner) is bnb.nn.Linear4bit


def test_a_batch_that_mixes_adapters() -> None:
    _, gm, injected = adapted("nf4")
    injected = lora_fx.inject(injected, CONFIG, adapter_name="second")
    batched = lora_fx.batch_adapters(injected)
    ids = torch.tensor([0, 1, 2, 1, 0])
    mixed = batched(X, adapter_ids=ids)
    lora_fx.set_adapters(injected, "default")
    assert distance(injected(X)[ids == 1], mixed[ids == 1]) < 1e-5
    assert distance(gm(X)[ids == 0], mixed[ids == 0]) < 1e-5


def test_the_inference_form_of_some_cpus_is_taken_back() -> None:
    """In which bitsandbytes has no backward pass; the user's model may be brought to it between two steps."""
    model = model_of("nf4")
    gm = randomise(lora_fx.inject(lora_fx.trace(model, X), CONFIG))
    model.eval()
    with torch.no_grad():
        model(X)
    gm.train()(X.clone().requires_grad_()).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in lora_fx.lora_parameters(gm))


def test_few_bits_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="quantized='dequantize'"):
        exporters.export_onnx(lora_fx.trace(model_of("nf4"), X).eval(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_there() -> None:
    with pytest.raises(AdapterError):
        lora_fx.fold(adapted("nf4")[2], adapters=["other"], quantized="dequantize")


def test_linears_that_become_floats_keep_their_biases_or_none() -> None:
    torch.manual_seed(0)
    few = [bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4"), bnb.nn.Linear4bit(32, 5, quant_type="nf4")]
    gm = lora_fx.inject(
        lora_fx.trace(nn.Sequential(*few).to("cpu"), torch.randn(3, 64)), {"target_modules": ["0", "1"]}
    )
    biases = [
        {name: parameter for name, parameter in graph.named_parameters() if name.endswith("bias")}
        for graph in (gm, lora_fx.fold(gm, quantized="dequantize"))
    ]
    assert biases[0].keys() == biases[1].keys() == {"1.bias"}
    assert biases[0]["1.bias"].data_ptr() == biases[1]["1.bias"].data_ptr()

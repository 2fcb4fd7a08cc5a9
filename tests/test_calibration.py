"""What data tell about sites: against sums made by hand, against PEFT, and that reading changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import re
import sys
import types
import warnings
from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import config as peft_config
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import fx, nn
from torch.nn import functional as F

import lora_fx
from lora_fx import ConfigError, GraphError, LoraConfig, LoraFxWarning, TargetError
from lora_fx.calibration import calibrate, redistribute
from lora_fx.init_options import CordaConfig, EvaConfig, LoraGAConfig
from lora_fx.initializers import Context, Start, initializer_of
from lora_fx.site_statistics import SiteStatistics, input_components, input_covariances, weight_gradients


def takes_data() -> bool:
    try:
        LoraConfig(init_lora_weights="eva")
    except ConfigError:
        return False
    return True


configurable = pytest.mark.skipif(not takes_data(), reason="LoraConfig does not take these initialisations yet")


class Mlp(nn.Module):
    """fc1 and gate take the same input; fc2's is flatter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(17, 13)
        self.gate = nn.Linear(17, 13)
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(13, 19)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(torch.tanh(self.fc1(x)) * torch.sigmoid(self.gate(x))))


SITES = ["fc1", "gate", "fc2"]


def data(rows: int = 43, width: int = 17, decay: float = 0.7) -> torch.Tensor:
    return torch.randn(rows, width) * decay ** torch.arange(width) + 0.3


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    return lora_fx.trace(model.eval(), args, kwargs)


def hidden(model: Mlp, x: torch.Tensor) -> dict[str, torch.Tensor]:
    inner = torch.tanh(model.fc1(x)) * torch.sigmoid(model.gate(x))
    return {"fc1": x, "gate": x, "fc2": inner.detach()}


def directions(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    centred = rows - rows.mean(dim=0)
    _, sigma, vh = torch.linalg.svd(centred, full_matrices=False)
    return sigma, vh, sigma.square() / centred.square().sum()


def assert_directions(found: SiteStatistics, rows: torch.Tensor, count: int, tolerance: float = 1e-3) -> None:
    sigma, vh, explained = directions(rows)
    assert found.components.shape == (count, rows.shape[1])
    assert (found.components @ found.components.mT - torch.eye(count)).abs().max() <= 1e-5
    assert torch.allclose(found.singular_values, sigma[:count], rtol=tolerance)
    assert torch.allclose(found.explained, explained[:count], rtol=tolerance)
    assert ((found.components * vh[:count]).sum(dim=1).abs() - 1).abs().max() <= tolerance
    largest = found.components.gather(1, found.components.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()  # signs are settled


# Principal directions -----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[43], [20, 23], [1, 2, 9, 31], [3] * 14 + [1]])
def test_directions_are_those_of_all_rows(sizes) -> None:
    """In one batch or in many, also in batches of fewer rows than directions."""
    model, x = Mlp().eval(), data()
    found = input_components(traced(model, x), {"fc1": 4, "fc2": 13}, x.split(sizes))
    loose = 1e-3 if len(sizes) == 1 else 3e-2  # directions beyond the fourth are dropped along the way
    assert_directions(found["fc1"], x, 4, loose)
    assert_directions(found["fc2"], hidden(model, x)["fc2"], 13)


def test_directions_of_wide_inputs_are_found_by_subspace_iteration() -> None:
    x = data(301, 97, decay=0.9)
    gm = traced(nn.Sequential(nn.Linear(97, 3)), x)
    state = torch.get_rng_state()
    found = input_components(gm, {"0": 5}, [x])["0"]
    assert torch.equal(state, torch.get_rng_state())
    assert_directions(found, x, 5)


def test_axes_before_the_last_are_rows() -> None:
    x = data(60).reshape(3, 4, 5, 17)
    found = input_components(traced(Mlp(), x), {"fc1": 3}, [x])["fc1"]
    assert_directions(found, x.reshape(-1, 17), 3)


class Products(nn.Module):
    """The same map in every spelling; each takes x, or x transposed."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("left", "ellipsis", "named", "first"):
            setattr(self, name, nn.Parameter(torch.randn(5, 7)))
        for name in ("right", "added"):
            setattr(self, name, nn.Parameter(torch.randn(7, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = (self.left @ x.mT).mT + x @ self.right
        total = total + torch.addmm(torch.ones(5), x.reshape(-1, 7), self.added).reshape(total.shape)
        total = total + torch.einsum("...i,oi->...o", x, self.ellipsis)
        total = total + torch.einsum("bti,oi->bto", x, self.named)
        return total + torch.einsum("oi,bit->bto", self.first, x.mT)


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_every_spelling_of_a_product(tracer) -> None:
    x = data(21, 7).reshape(3, 7, 7)
    model = Products().eval()
    gm = lora_fx.trace(model, (x,), tracer=tracer)
    paths = ["left", "right", "added", "ellipsis", "named", "first"]
    rows = x.reshape(-1, 7)
    expected = rows.mT @ rows / rows.abs().max() ** 2
    for path, found in input_covariances(gm, paths, [x]).items():
        assert torch.allclose(found, expected, atol=1e-5), path


class Regions(nn.Module):
    """Linears in sub-graphs; and a buffer that every call counts in."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("frozen", "narrow", "again", "either"):
            setattr(self, name, nn.Linear(7, 7))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.straight(x)
        return torch.cond(x.sum() > 1e9, lambda x: x + 1, lambda x: self.either(x), (x,))

    def straight(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        with torch.no_grad():
            side = self.frozen(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.narrow(x + side).float()
        return torch.utils.checkpoint.checkpoint(self.again, x, use_reentrant=False)


def test_sites_in_sub_graphs_are_read_too() -> None:
    model, x = Regions().eval(), data(11, 7)
    gm = traced(model, x)
    rows: dict[str, torch.Tensor] = {}
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda module, args, name=name: rows.update({name: args[0].detach()}))
    output = model.either(model.straight(x))
    found = input_covariances(gm, list(rows), [x])
    assert list(rows) == ["frozen", "narrow", "again", "either"]
    for name, matrix in found.items():
        assert torch.allclose(matrix, rows[name].mT @ rows[name] / rows[name].abs().max() ** 2, atol=1e-4), name
    gradients = weight_gradients(gm, ["narrow", "again", "either"], [x], lambda output, batch: output.square().mean())
    output.square().mean().backward()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, getattr(model, name).weight.grad, atol=1e-3), name
    with pytest.raises(ConfigError, match="no gradient with respect to the weight of 'frozen'"):
        weight_gradients(gm, ["frozen", "again"], [x], lambda output, batch: output.square().mean())
    with pytest.raises(ConfigError, match="depends on none of the sites"):
        weight_gradients(gm, ["frozen"], [x], lambda output, batch: output.square().mean())


def test_a_branch_that_no_batch_takes_is_an_error() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x + 1, (x,))

    x = data(11, 7).abs()
    gm = traced(Branch(), x)
    input_covariances(gm, ["fc"], [x])
    with pytest.raises(ConfigError, match="no data reached 'fc'"):
        input_covariances(gm, ["fc"], [-x])


def test_a_value_that_is_changed_in_place_is_read_as_each_site_takes_it() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(7, 5, bias=False), nn.Linear(7, 5, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 1
            first = self.a(h)
            h.mul_(torch.arange(7.0))
            return first + self.b(h)

    x = data(11, 7)
    gm = lora_fx.trace(InPlace().eval(), (x,), tracer="symbolic")
    found = input_covariances(gm, ["a", "b"], [x])
    second = x * torch.arange(7.0)
    assert torch.allclose(found["a"], x.mT @ x / x.abs().max() ** 2, atol=1e-5)
    assert torch.allclose(found["b"], second.mT @ second / second.abs().max() ** 2, atol=1e-5)


def test_a_module_that_is_called_twice_sees_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.tanh(self.fc(x)))

    model, x = Twice().eval(), data(11, 7)
    rows = torch.cat([x, torch.tanh(model.fc(x)).detach()])
    found = input_covariances(traced(model, x), ["fc"], [x])["fc"]
    assert torch.allclose(found, rows.mT @ rows / rows.abs().max() ** 2 / 2, atol=1e-5)
    both = input_components(traced(model, x), {"fc": 7}, [x])["fc"]
    assert torch.allclose(both.singular_values, directions(rows)[0][:7], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide(dtype) -> None:
    x = data().to(dtype)
    gm = traced(Mlp().to(dtype), x)
    wide = torch.promote_types(dtype, torch.float32)
    assert input_covariances(gm, ["fc2"], [x])["fc2"].dtype == wide
    assert input_components(gm, {"fc2": 3}, [x])["fc2"].components.dtype == wide
    gradients = weight_gradients(gm, ["fc2"], [x], lambda output, batch: output.float().square().mean())
    assert gradients["fc2"].dtype == wide


def test_masked_tokens_do_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.pool = nn.Linear(7, 5), nn.Linear(7, 5)
            self.fc = nn.Linear(7, 5)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            flat = self.flat(x.reshape(-1, 7)).reshape(*x.shape[:-1], 5)
            return (self.fc(x) + flat) * attention_mask[..., None] + self.pool(x.mean(dim=1))[:, None]

    x, mask = data(44, 7).reshape(4, 11, 7), torch.rand(4, 11) > 0.3
    gm = traced(Tokens(), x=x, attention_mask=mask.long())
    batch = {"x": x, "attention_mask": mask.long()}
    found = input_components(gm, dict.fromkeys(["fc", "flat", "pool"], 3), [batch], mask=lambda batch: mask)
    assert_directions(found["fc"], x[mask], 3)
    assert_directions(found["flat"], x[mask], 3)
    assert_directions(found["pool"], x.mean(dim=1), 3)  # of another shape: all of it


# Gradients ----------------------------------------------------------------------------------------


def squared_error(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.mse_loss(output, batch[1])


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_gradients_are_the_mean_over_the_batches(tracer) -> None:
    model = Mlp().eval()
    batches = [(data(rows), torch.randn(rows, 19)) for rows in (5, 11)]
    gm = lora_fx.trace(model, (batches[0][0],), tracer=tracer)
    found = weight_gradients(gm, SITES, batches, squared_error)
    for batch in batches:
        (squared_error(model(batch[0]), batch) / 2).backward()
    for path in SITES:
        assert torch.allclose(found[path], model.get_submodule(path).weight.grad, atol=1e-6), path


def test_gradients_have_the_weights_own_shape_and_count_ties_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored = nn.Parameter(torch.randn(7, 5))
            self.up, self.down = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.down.weight = self.up.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x @ self.stored)))

    model, x = Tied().eval(), data(11, 7)
    found = weight_gradients(traced(model, x), ["stored", "up"], [x], lambda output, batch: output.square().mean())
    model(x).square().mean().backward()
    assert torch.allclose(found["stored"], model.stored.grad, atol=1e-6)
    assert torch.allclose(found["up"], model.up.weight.grad, atol=1e-6)


def test_gradients_of_other_kinds_of_sites() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(11, 7), nn.Conv1d(7, 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.table(x).mT)

    model, x = Kinds().eval(), torch.randint(0, 11, (3, 6))
    gm = traced(model, x)
    if {site.path for site in lora_fx.find_sites(gm)} != {"table", "conv"}:
        pytest.skip("these kinds of sites are not read yet")
    found = weight_gradients(gm, ["table", "conv"], [x], lambda output, batch: output.square().mean())
    model(x).square().mean().backward()
    assert torch.allclose(found["conv"], model.conv.weight.grad, atol=1e-6)
    assert torch.allclose(found["table"], model.table.weight.grad, atol=1e-6)
    with pytest.raises(TargetError, match=r"'conv' is conv1d, and only what linears take in can be read"):
        input_covariances(gm, ["conv"], [x])


# Nothing changes ----------------------------------------------------------------------------------


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.drop = nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.seen.copy_(x.mean(dim=0))
        return self.drop(self.fc(self.norm(x))) + self.calls


def state(gm: fx.GraphModule) -> dict[str, Any]:
    tensors = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "memory": {name: (id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()},
        "flags": {name: (p.requires_grad, p.grad is None) for name, p in gm.named_parameters()},
        "modes": {name: module.training for name, module in gm.named_modules()},
        "code": gm.code,
        "generator": torch.get_rng_state(),
    }


@pytest.mark.parametrize("tracer", ["export", "symbolic", "exported"])
@pytest.mark.parametrize("training", [True, False])
def test_reading_changes_nothing(training, tracer) -> None:
    x = data(11, 7)
    model = Stateful().train(training)
    model.norm.weight.requires_grad_(False)
    if tracer == "exported":
        if training:
            pytest.skip("an exported train mode cannot be left")
        gm = torch.export.export(model, (x,)).module()
    else:
        gm = lora_fx.trace(model, (x,), tracer=tracer)
    before, batch = state(gm), x.clone()
    input_covariances(gm, ["fc"], [x, x])
    input_components(gm, {"fc": 3}, [x, x])
    expected = gm if tracer == "exported" else copy.deepcopy(gm).eval()
    gradient = weight_gradients(gm, ["fc"], [x, x], lambda output, batch: output.square().mean())["fc"]
    after = state(gm)
    for name, value in before.pop("values").items():
        assert torch.equal(value, after["values"][name]), name
    after.pop("values")
    assert torch.equal(before.pop("generator"), after.pop("generator"))
    assert before == after
    assert torch.equal(x, batch)
    assert expected is not gm or not expected.fc.weight.grad
    assert gradient.norm() > 0


def test_errors_of_the_loss_change_nothing_either() -> None:
    x = data()
    gm = traced(Mlp(), x)
    before = state(gm)

    def fails(output: torch.Tensor, batch: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        weight_gradients(gm, ["fc1"], [x], fails)
    after = state(gm)
    assert all(torch.equal(value, after["values"][name]) for name, value in before["values"].items())
    assert before["flags"] == after["flags"]


def test_it_reads_eval_mode() -> None:
    model, x = Mlp().train(), data()
    gm = lora_fx.trace(model, (x,))
    assert torch.equal(
        input_covariances(gm, ["fc2"], [x])["fc2"],
        input_covariances(copy.deepcopy(gm).eval(), ["fc2"], [x])["fc2"],
    )
    in_train = torch.export.export(model, (x,)).module()
    with pytest.raises(GraphError, match="exported in train mode"):
        input_covariances(in_train, ["fc2"], [x])


def test_adapters_that_are_there_count() -> None:
    x = data()
    gm = traced(Mlp(), x)
    adapted = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=False))
    plain, with_adapter = (input_covariances(each, ["fc2"], [x])["fc2"] for each in (gm, adapted))
    assert not torch.allclose(plain, with_adapter, atol=1e-3)


# Batches ------------------------------------------------------------------------------------------


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor, *, extra: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.fc(x + extra["b"] - extra["a"])


def test_forms_of_batches() -> None:
    x, a, b = data(11, 7), torch.rand(11, 7), torch.rand(11, 7)
    gm = traced(Inputs(), x, extra={"a": a, "b": b})
    rows = x + b - a
    expected = rows.mT @ rows / rows.abs().max() ** 2
    for batch in (
        {"x": x, "extra": {"b": b, "a": a}},  # in another order
        {"labels": 1, "extra": {"a": a, "b": b}, "x": x},  # and more than the graph takes
    ):
        assert torch.allclose(input_covariances(gm, ["fc"], [batch])["fc"], expected, atol=1e-5)
        assert torch.allclose(input_covariances(gm, ["fc"], iter([batch]))["fc"], expected, atol=1e-5)
    with pytest.raises(GraphError, match="extra"):
        input_covariances(gm, ["fc"], [{"x": x}])
    with pytest.raises(GraphError, match="extra"):
        input_covariances(gm, ["fc"], [x])
    simple = traced(Mlp(), data())
    whole = input_covariances(simple, ["fc1"], [data()])
    torch.manual_seed(0)
    for batch in ((x := data()), (x, torch.rand(43)), [x], [x, 3]):
        found = input_covariances(simple, ["fc1"], [batch])["fc1"]
        assert torch.allclose(found, x.mT @ x / x.abs().max() ** 2, atol=1e-5)
    assert whole["fc1"].shape == (17, 17)


def test_symbolic_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
            return self.fc(x * scale)

    gm, x = fx.symbolic_trace(Optional().eval()), data(11, 7)
    found = input_covariances(gm, ["fc"], [x])["fc"]
    assert torch.allclose(found, x.mT @ x / x.abs().max() ** 2, atol=1e-5)
    with pytest.raises(GraphError, match=r"a batch has no 'x', which the graph takes \(x, scale\)"):
        input_covariances(gm, ["fc"], [{"scale": 2.0}])


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (data(), ConfigError, r"batches is one Tensor; .* a list of it: \[batch\]"),
        ({"x": data()}, ConfigError, "batches is one dict"),
        (7, ConfigError, "batches is one int"),
        ([], ConfigError, "there is no batch to read"),
        (iter(()), ConfigError, "an iterator can be read only once"),
        ([3.0], ConfigError, r"a batch is float; .* inputs by name \(x\)"),
        ([data() * math.nan], ConfigError, "'fc1' takes in NaN or infinite elements"),
        ([{"y": data()}], GraphError, "without input 'x'"),
    ],
)
def test_batches_that_are_none(batches, error, message) -> None:
    with pytest.raises(error, match=message):
        input_covariances(traced(Mlp(), data()), ["fc1"], batches)


def test_sites_that_are_not_there() -> None:
    with pytest.raises(
        TargetError, match=r"no site 'fc' in eval mode\. Did you mean 'fc2' or 'fc1'\? find_sites\(gm\)"
    ):
        input_components(traced(Mlp(), data()), {"fc": 3}, [data()])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, batch: output, r"loss gave a tensor of shape \(43, 19\); it must give one number"),
        (lambda output, batch: 3.0, "loss gave float"),
        (lambda output, batch: output.detach().sum(), "without a gradient"),
        (lambda output, batch: output.sum() * math.nan, "the loss of batch 1 is nan"),
        (lambda output, batch: (output * 0).sum(), "no gradient with respect to the weight of 'fc1'.*does not depend"),
    ],
)
def test_losses_that_are_none(loss, message) -> None:
    x = data()
    with pytest.raises(ConfigError, match=message):
        weight_gradients(traced(Mlp(), x), ["fc1"], [x], loss)


# PEFT ---------------------------------------------------------------------------------------------

R, ALPHA = 3, 5


def their_config(init: str, **options: Any) -> peft.LoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=SITES, init_lora_weights=init, **options)


def our_start(name: str, matrix: torch.Tensor, known: SiteStatistics, options: Any = None) -> Start:
    return initializer_of(name)(matrix, R, ALPHA / R, Context("site", options, known))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(method, monkeypatch) -> None:
    # PEFT takes one name of attrs here without asking for the package.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    corda = importlib.import_module("peft.tuners.lora.corda")
    model, x = Mlp().eval(), data(200, decay=0.95)
    x[0, 0] = 9.0  # the largest element is the largest in size
    gm, reference = traced(model, x), copy.deepcopy(model)
    covariances = input_covariances(gm, SITES, [x])
    config = their_config("corda", corda_config=peft_config.CordaConfig(corda_method=method))
    inner = hidden(model, x)["fc2"]
    scale = float(inner.abs().max() / inner.max().abs())  # where PEFT divides by the largest, whatever its size
    corda.preprocess_corda(reference, config, run_model=lambda: reference(x))
    theirs = peft.get_peft_model(reference, config).base_model.model
    for path in SITES:
        layer = theirs.get_submodule(path)
        known = SiteStatistics(covariance=covariances[path] * (scale**2 if path == "fc2" else 1))
        options = CordaConfig(corda_method=method)
        found = our_start("corda", model.get_submodule(path).weight.detach(), known, options)
        a, b = (layer.get_submodule(f"lora_{x}.default").weight.detach() for x in "AB")
        signs = (a * found.a).sum(dim=1).sign()
        size = float(a.abs().max())
        assert torch.allclose(signs[:, None] * found.a, a, atol=2e-3 * size), path
        assert torch.allclose(signs * found.b, b, atol=2e-3 * float(b.abs().max())), path
        assert torch.allclose(found.base, layer.base_layer.weight.detach(), atol=1e-3), path


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_lora_ga_is_pefts() -> None:
    model, x = Mlp().eval(), data(200)
    model.drop.p = 0.0  # PEFT takes the gradient in train mode
    gm, reference = traced(model, x), copy.deepcopy(model)
    config = their_config("lora_ga", lora_ga_config=peft_config.LoraGAConfig())
    batches = [x[:120], x[120:]]

    def train_step() -> None:
        for batch in batches:
            reference(batch).square().mean().backward()

    preprocess_loraga(reference, config, train_step)
    gradients = weight_gradients(gm, SITES, batches, lambda output, batch: output.square().mean())
    for path in SITES:
        assert torch.allclose(gradients[path], reference.get_submodule(path)._peft_loraga_grad, atol=1e-7)
    theirs = peft.get_peft_model(reference, config).base_model.model
    for path in SITES:
        layer, known = theirs.get_submodule(path), SiteStatistics(gradient=gradients[path])
        found = our_start("lora_ga", model.get_submodule(path).weight.detach(), known, LoraGAConfig())
        a, b = (layer.get_submodule(f"lora_{x}.default").weight.detach() for x in "AB")
        assert torch.allclose(found.a.abs(), a.abs(), atol=1e-3), path
        assert torch.allclose(found.b.abs(), b.abs(), atol=1e-3 * float(b.abs().max())), path


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_pefts(rho, whiten) -> None:
    model, x = Mlp().eval(), data(200)
    gm = traced(model, x)
    options = EvaConfig(rho=rho, whiten=whiten)
    config = their_config("eva", eva_config=peft_config.EvaConfig(rho=rho, whiten=whiten))
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    initialize_lora_eva_weights(
        theirs,
        [x],
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    found = input_components(gm, dict.fromkeys(SITES, round(R * rho)), [x])
    explained = {path: site.explained for path, site in found.items()}
    ranks = redistribute(dict.fromkeys(SITES, R), explained, rho)
    pattern = theirs.peft_config["default"].rank_pattern
    # Sites with one input have equal shares, of which either may get the last rank.
    their_ranks = {path: pattern.get(path, R) for path in SITES}
    assert ranks["fc2"] == their_ranks["fc2"]
    assert ranks["fc1"] + ranks["gate"] == their_ranks["fc1"] + their_ranks["gate"]
    for path in ["fc2"] if whiten else SITES:  # PEFT whitens in place, once for each site that shares the directions
        layer = theirs.base_model.model.get_submodule(path)
        context = Context(path, options, found[path])
        start = initializer_of("eva")(model.get_submodule(path).weight.detach(), their_ranks[path], ALPHA / R, context)
        # PEFT reads the one batch twice to see that nothing moves, so its singular values are √2 too large.
        ours, a = start.a / (2**0.25 if whiten else 1), layer.lora_A["default"].weight.detach()
        assert torch.allclose(ours, a, atol=1e-2 * float(a.abs().max())), path
        assert layer.scaling["default"] == pytest.approx(ALPHA / R)


# Ranks --------------------------------------------------------------------------------------------


def test_ranks_go_where_variance_is_explained() -> None:
    explained = {"a": torch.tensor([0.5, 0.3, 0.1]), "b": torch.tensor([0.4, 0.2, 0.15]), "c": torch.tensor([0.01])}
    ranks = {"a": 2, "b": 2, "c": 1}
    assert redistribute(ranks, explained, 1.0) == {"a": 2, "b": 2, "c": 1}
    assert redistribute(ranks, explained, 1.5) == {"a": 2, "b": 3, "c": 0}
    assert redistribute({"a": 1, "b": 1, "c": 1}, explained, 3.0) == {"a": 2, "b": 1, "c": 0}
    assert sum(redistribute(ranks, explained, 3.0).values()) == 5
    assert redistribute({"a": 1, "d": 1}, explained, 3.0) == {"a": 2, "d": 0}  # d was not reached


# calibrate ----------------------------------------------------------------------------------------


def config(init: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": SITES, "init_lora_weights": init} | options)


@configurable
@pytest.mark.parametrize("method", ["corda", "lora_ga", "eva"])
def test_calibrate_gives_what_the_initializer_takes(method) -> None:
    model, x = Mlp().eval(), data(200)
    gm = traced(model, x)
    loss = (lambda output, batch: output.square().mean()) if method == "lora_ga" else None
    found = calibrate(gm, config(method), [x, x], loss)
    assert found.config.init_lora_weights == method
    assert set(found.ranks) == set(SITES)
    for target in lora_fx.make_plan(gm, found.config).targets:
        path = target.site.path
        assert target.r == found.ranks[path]
        matrix = model.get_submodule(path).weight.detach()
        start = initializer_of(method)(matrix, target.r, target.scaling, Context(path, None, found.statistics[path]))
        assert start.a.shape == (target.r, matrix.shape[1])
        base = matrix if start.base is None else start.base
        assert torch.allclose(base + target.scaling * start.b @ start.a, matrix, atol=1e-5)
    assert re.search(r"fc1\s+\d", str(found))


@configurable
@pytest.mark.parametrize("adjust", [True, False])
def test_eva_writes_ranks_into_the_configuration(adjust) -> None:
    x = torch.cat([data(200, 16, decay=0.95), torch.zeros(200, 1)], dim=1)
    gm = traced(Mlp(), x)
    options = {"rho": 3.0, "adjust_scaling_factors": adjust}
    given = config("eva", eva_config=options, rank_pattern={"gate": 2}, alpha_pattern={"fc2": 11})
    found = calibrate(gm, given, [x])
    plan = {target.site.path: target for target in lora_fx.make_plan(gm, found.config).targets}
    assert sum(found.ranks.values()) == R + 2 + R
    assert {path: target.r for path, target in plan.items()} == {p: r for p, r in found.ranks.items() if r}
    alphas, ranks = {"fc1": ALPHA, "gate": ALPHA, "fc2": 11}, {"fc1": R, "gate": 2, "fc2": R}
    for path, target in plan.items():
        before = alphas[path] / (ranks[path] if adjust else target.r)
        assert target.scaling == pytest.approx(before)
        assert found.statistics[path].components.shape == (target.r, target.site.in_features)
    assert max(abs(found.ranks[path] - ranks[path]) for path in SITES) > 0  # not vacuous


class Uneven(nn.Module):
    """`deep.fc` varies in one direction only, so other sites take its ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(17, 17)
        self.deep = nn.Module()
        self.deep.fc = nn.Linear(17, 17)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.roll(1, dims=-1)[..., :1] * torch.ones(17)) + self.deep.fc(x)


@configurable
@pytest.mark.parametrize("exclude", [None, ["head"], "he.d|nothing"])
def test_a_site_without_a_rank_is_left_out_and_no_other(exclude) -> None:
    """`fc` is a suffix of `deep.fc`, which stays."""
    x = torch.zeros(100, 17)
    x[:, :2] = torch.randn(100, 2)  # deep.fc sees two directions, each of half of the variance
    x[:, 16] = 0.0  # fc sees nothing
    model = Uneven()
    model.head = nn.Linear(1, 1)
    gm = traced(model, x)
    options: dict[str, Any] = {"target_modules": ["fc"], "r": 1, "eva_config": {"rho": 2}}
    found = calibrate(gm, config("eva", **options), [x])
    assert found.ranks == {"fc": 0, "deep.fc": 2}
    assert "left out" in str(found)
    assert [target.site.path for target in lora_fx.make_plan(gm, found.config).targets] == ["deep.fc"]
    assert set(found.statistics) == {"deep.fc"}
    assert exclude is None or re.fullmatch(found.config.exclude_modules, "deep.fc") is None


@configurable
def test_eva_stops_when_it_has_seen_enough_and_warns_when_not() -> None:
    x = data(100)
    gm, read = traced(Mlp(), x), []

    def batches() -> Iterable[torch.Tensor]:
        for index in range(20):
            read.append(index)
            yield x

    calibrate(gm, config("eva"), batches())
    assert 2 <= len(read) < 20
    torch.manual_seed(1)
    random = [torch.randn(9, 17) for _ in range(2)]
    with pytest.warns(LoraFxWarning, match=r"directions still moved with the last one: at '.*' by a similarity of 0\."):
        calibrate(gm, config("eva"), random)


@configurable
def test_eva_leaves_out_padding_and_masked_labels() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * attention_mask[..., None]

    x, mask = data(44, 7).reshape(4, 11, 7), (torch.rand(4, 11) > 0.3).long()
    labels = torch.where(torch.rand(4, 11) > 0.5, 1, -100)
    gm = traced(Language(), x=x, attention_mask=mask)
    batch = {"x": x, "attention_mask": mask, "labels": labels}
    for options, kept in (
        ({"rho": 1.0}, mask.bool() & (labels == 1)),
        ({"rho": 1.0, "use_label_mask": False}, mask.bool()),
        ({"rho": 1.0, "label_mask_value": 1}, mask.bool() & (labels != 1)),
    ):
        found = calibrate(gm, config("eva", target_modules=["fc"], eva_config=options), [batch])
        assert_directions(found.statistics["fc"], x[kept], R)


@configurable
def test_what_calibrate_refuses() -> None:
    x = data()
    gm = traced(Mlp(), x)
    for init in (True, "gaussian", "pissa", "loftq"):
        options = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
        with pytest.raises(ConfigError, match=rf"init_lora_weights={init!r} needs no data; inject\(gm, config\)"):
            calibrate(gm, config(init, **options), [x])
    with pytest.raises(ConfigError, match="'lora_ga' needs the gradient of a loss"):
        calibrate(gm, config("lora_ga"), [x])
    with pytest.raises(ConfigError, match="loss is for 'lora_ga'; init_lora_weights='eva' reads inputs"):
        calibrate(gm, config("eva"), [x], lambda output, batch: output.sum())
    with pytest.raises(ConfigError, match="r=14 is above the 13 features that 'fc2' takes"):
        calibrate(gm, config("eva", r=14), [x])
    with pytest.raises(ConfigError, match=r"took 2 rows of input in all, too few for the 6 directions"):
        calibrate(gm, config("eva"), [x[:2]])
    with pytest.raises(GraphError, match="plain nn.Module"):
        calibrate(Mlp(), config("eva"), [x])

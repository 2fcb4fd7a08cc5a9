"""Which tensors folding writes, and who keeps the base's: ties, views, biases. On graphs that need no tracing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import lora_fx
from lora_fx import FoldError, LoraConfig, LoraFxWarning
from lora_fx.fold_tasks import FoldTask
from lora_fx.fold_terms import BiasTerm

X = torch.linspace(-1, 1, 12).view(3, 4)


def symbolic(forward: Callable[..., Any], **parts: Any) -> tuple[nn.Module, fx.GraphModule]:
    """A model of those modules, parameters and buffers with that forward, and its graph."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                if isinstance(part, nn.Module | nn.Parameter):
                    setattr(self, name, part)
                else:
                    self.register_buffer(name, part)

    Model.forward = forward  # type: ignore[method-assign]
    model = Model().eval()
    return model, fx.symbolic_trace(model)


def beside(weight: torch.Tensor) -> torch.Tensor:
    """A read that nothing adapts."""
    return torch.ops.aten.detach.default(weight)[0]


def moved(gm: fx.GraphModule, **options: Any) -> lora_fx.LoraGraphModule:
    """Injected, and away from the start."""
    name = options.pop("adapter_name", "default")
    adapted = lora_fx.inject(gm, LoraConfig(**({"r": 2, "lora_alpha": 3} | options)), adapter_name=name)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(adapted, name):
            parameter.normal_(std=0.5)
    return adapted


def fold(gm: fx.GraphModule, **options: Any) -> lora_fx.LoraGraphModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was tied with", LoraFxWarning)
        return lora_fx.fold(gm, **options)


def assert_folds(gm: fx.GraphModule, base: nn.Module, **options: Any) -> lora_fx.LoraGraphModule:
    """Folded computes what adapted does, which is not what the base does."""
    wanted, plain = gm(X), base(X)
    folded = fold(gm, **options)
    torch.testing.assert_close(folded(X), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    return folded


# Names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aliases", "readers", "twins"),
    [
        ("own.weight", "", ""),
        ("own.weight twin", "", ""),  # both are adapted
        ("own.weight twin", "twin", "twin"),
        ("twin own.weight other", "own.weight", "twin other"),
        ("own.weight second third.weight twin", "twin", "twin"),  # three of four are adapted together
        ("own.weight", "own.weight", "own.weight"),  # read twice under one name
        ("own.weight", "over own.weight", "over"),  # a view of some of its elements
    ],
)
def test_what_a_weight_is_untied_from(aliases: str, readers: str, twins: str) -> None:
    terms = tuple(BiasTerm(None, 1.0, name) for name in ("own.weight", "another"))  # type: ignore[arg-type]
    paths = ("own", "second", "third")
    task = FoldTask(paths, terms, "attribute", tuple(aliases.split()), tuple(readers.split()))
    assert (task.tensor, task.twins) == ("own.weight", tuple(twins.split()))
    root = FoldTask(("",), (BiasTerm(None, 1.0, "w"),), "w", ("w", "weight", "t"), ("t",))  # type: ignore[arg-type]
    assert root.twins == ("t",)


def three_names(order: str) -> dict[str, nn.Module]:
    parts = {name: nn.Linear(4, 4, bias=False) for name in order}
    for part in parts.values():
        part.weight = parts["a"].weight
    return parts


def through(*names: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = getattr(self, name)(x).tanh()
        return x

    return forward


def read(name: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """`through` a, b and c, of which one is applied by a function."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for each in "abc":
            x = F.linear(x, getattr(self, each).weight) if each == name else getattr(self, each)(x)
            x = x.tanh()
        return x

    return forward


# symbolic_trace calls a tensor that a function reads by the first of its names
@pytest.mark.parametrize(("order", "by_function"), [("abc", ""), ("abc", "a"), ("cab", ""), ("cab", "c")])
@pytest.mark.parametrize("targets", ["a", "b", "c", "ab", "bc", "ca", "abc"])
def test_of_a_weight_with_three_names_each_reader_gets_its_own(targets: str, by_function: str, order: str) -> None:
    model, gm = symbolic(read(by_function), **three_names(order))
    before = model.a.weight.detach().clone()
    folded = assert_folds(moved(gm, target_modules=list(targets)), model)
    assert torch.equal(model.a.weight, before)
    (site,) = lora_fx.fold_report(folded).sites
    assert sorted(site.untied_from) == [f"{name}.weight" for name in "abc" if name not in targets]
    assert set(folded.state_dict()) == set(gm.state_dict())
    assert {n for n, p in folded.named_parameters(remove_duplicate=False) if torch.equal(p, before)} == {
        f"{name}.weight" for name in "abc" if name not in targets
    }
    assert len({id(parameter) for parameter in folded.parameters()}) == (1 if len(targets) == 3 else 2)
    if len(targets) == 3:
        assert folded.code == gm.code


@pytest.mark.parametrize("by_function", ["", "a"])
@pytest.mark.parametrize("targets", ["ab", "bc", "ca", "abc"])
def test_of_a_weight_with_three_names_each_site_gets_its_own_sum(targets: str, by_function: str) -> None:
    model, gm = symbolic(read(by_function), **three_names("abc"))
    patterns = {name: 1 + rank for rank, name in enumerate(targets)}
    folded = assert_folds(moved(gm, target_modules=list(targets), rank_pattern=patterns), model)
    assert set(folded.state_dict()) == set(gm.state_dict())
    assert len(list(folded.parameters())) == 3
    one, two = targets[0], targets[1]
    both = moved(moved(gm, target_modules=[one], adapter_name="one"), target_modules=[two], r=1, adapter_name="two")
    assert_folds(both, model)


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("targets", [["fc"], ["a"], ["a", "b", "c"]], ids=str)
def test_a_folded_weight_has_the_flag_of_the_base(is_frozen: bool, targets: list[str]) -> None:
    _, gm = symbolic(through("a", "b", "c", "fc"), fc=nn.Linear(4, 4), **three_names("abc"))
    folded = fold(moved(gm.requires_grad_(not is_frozen), target_modules=targets))
    assert {parameter.requires_grad for parameter in folded.parameters()} == {not is_frozen}


def test_a_weight_that_is_untied_while_another_adapter_trains_has_the_flag_of_the_base_afterwards() -> None:
    parts = {name: nn.Parameter(torch.randn(4, 4)) for name in "wv"}
    for is_frozen in (True, False):
        _, gm = symbolic(lambda self, x: F.linear(F.linear(x, self.w), self.v) + beside(self.w), **parts)
        gm.requires_grad_(not is_frozen)
        both = moved(moved(gm, target_modules=["w"], adapter_name="one"), target_modules=["v"])
        part = fold(both, adapters="one")
        assert {name for name, p in part.named_parameters() if p.requires_grad} == {
            f"v_lora_{half}.default.weight" for half in "AB"
        }
        flags = {name: parameter.requires_grad for name, parameter in fold(part).named_parameters()}
        assert flags == dict.fromkeys(("w", "v", "w_folded"), not is_frozen)


def test_weights_that_overlap_without_being_the_same_are_folded_apart() -> None:
    storage = torch.randn(7, 4)
    parts = {"q": nn.Parameter(storage[:4]), "k": nn.Parameter(storage[3:])}
    model, gm = symbolic(lambda self, x: F.linear(x, self.q) * F.linear(x, self.k), **parts)
    for target, other in ("qk", "kq"):
        folded = assert_folds(moved(gm, target_modules=[target]), model)
        assert torch.equal(folded.get_parameter(other), model.get_parameter(other))
        assert lora_fx.fold_report(folded).sites[0].untied_from == (other,)
        with pytest.raises(FoldError, match=f"cannot write '{target}': its tensor is also read as {other}, which does"):
            fold(moved(gm, target_modules=[target]), inplace=True)


def test_what_lies_over_a_weight_and_is_not_read_stays_what_it_is() -> None:
    storage = torch.randn(7, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.unread = nn.Parameter(storage[:4]), nn.Parameter(storage[3:])

        def forward(self, x):
            return F.linear(x, self.q)

    model = Model().eval()
    gm = lora_fx.trace(model, X)
    before = storage.clone()
    folded = assert_folds(moved(gm, target_modules=["q"]), model)
    assert torch.equal(folded.get_parameter("unread"), before[3:])
    assert lora_fx.fold_report(folded).sites[0].untied_from == ()
    fold(moved(gm, target_modules=["q"]), inplace=True)
    torch.testing.assert_close(model(X), folded(X))
    assert torch.equal(model.unread[1:], before[4:])


def test_a_weight_that_something_else_reads_under_its_name_gets_another() -> None:
    model, gm = symbolic(lambda self, x: F.linear(x, self.w) + beside(self.w), w=nn.Parameter(torch.randn(4, 4)))
    folded = assert_folds(moved(gm, target_modules=["w"]), model)
    assert set(folded.state_dict()) == {"w", "w_folded"}
    assert torch.equal(folded.get_parameter("w"), model.w)
    parts = {"w": model.w, "w_folded": nn.Parameter(torch.randn(4))}
    _, gm = symbolic(lambda self, x: F.linear(x, self.w) + beside(self.w) + self.w_folded, **parts)
    with pytest.raises(FoldError, match="untying 'w' needs the name 'w_folded', which is taken; rename it"):
        fold(moved(gm, target_modules=["w"]))


def test_a_read_of_a_weight_whose_module_is_adapted_reads_another_name_of_it() -> None:
    model, gm = symbolic(lambda self, x: self.b(self.a(x).tanh()) + beside(self.a.weight), **three_names("ab"))
    for target in "ab":
        assert set(assert_folds(moved(gm, target_modules=[target]), model).state_dict()) == set(gm.state_dict())
    for parts, targets in ((three_names("ab"), "ab"), (three_names("a") | {"b": nn.Linear(4, 4)}, "a")):
        _, gm = symbolic(lambda self, x: self.b(self.a(x).tanh()) + beside(self.a.weight), **parts)
        adapted = moved(gm, target_modules=list(targets), rank_pattern={"a": 1})
        with pytest.raises(FoldError, match="would untie 'a.weight' from what else reads it .* its module reads it by"):
            fold(adapted)


def test_a_module_that_is_not_adapted_reads_the_base_by_its_own_name() -> None:
    """Here, an LSTM, of whose weight a function makes a linear."""

    def forward(self, x):
        linear = F.linear(x, self.one.weight_ih_l0)
        return linear + self.one(x)[0] + self.two(x)[0] + beside(self.one.weight_ih_l0)

    one, two = nn.LSTM(4, 1), nn.LSTM(4, 1)
    for other in (one, two):
        other.weight_ih_l0 = one.weight_ih_l0
        model, gm = symbolic(forward, one=one, two=other)
        folded = assert_folds(moved(gm, target_modules=["one.weight_ih_l0"]), model)
        assert set(folded.state_dict()) - set(gm.state_dict()) == {"one.weight_ih_l0_folded"}
        read = [p for name, p in folded.named_parameters(remove_duplicate=False) if name.endswith("weight_ih_l0")]
        assert all(torch.equal(parameter, one.weight_ih_l0) for parameter in read)


def test_a_linear_and_a_function_of_the_same_weight_are_untied_from_a_third() -> None:
    parts = {"lstm": nn.LSTM(4, 1), "fc": nn.Linear(4, 4)}
    parts["fc"].weight = parts["lstm"].weight_ih_l0
    model, gm = symbolic(
        lambda self, x: self.lstm(self.fc(F.linear(x, self.lstm.weight_ih_l0)))[0] + beside(self.fc.weight), **parts
    )
    adapted = moved(gm, target_modules=["fc", "lstm.weight_ih_l0"], rank_pattern={"fc": 1})
    folded = assert_folds(adapted, model)
    assert set(folded.state_dict()) - set(gm.state_dict()) == {"lstm.weight_ih_l0_folded"}
    assert torch.equal(folded.lstm.weight_ih_l0, model.fc.weight)


def test_one_of_two_adapters_is_folded_if_the_other_finds_its_site_afterwards() -> None:
    for targets, is_found in ((["w", "w"], False), (["w", "v"], True), (["fc", "fc"], False), (["v", "fc"], True)):
        parts = {name: nn.Parameter(torch.randn(4, 4)) for name in "wv"} | {"fc": nn.Linear(4, 4)}
        model, gm = symbolic(
            lambda self, x: (
                F.linear(F.linear(x, self.w), self.v)
                + F.linear(x, self.fc.weight)
                + beside(self.w)
                + beside(self.fc.weight)
            ),
            **parts,
        )
        both = moved(moved(gm, target_modules=targets[:1], adapter_name="one"), target_modules=targets[1:], r=1)
        if is_found:
            folded = assert_folds(both, model, adapters="one")
            assert lora_fx.adapter_names(folded) == ("default",)
            assert_folds(folded, model)
            continue
        with pytest.raises(FoldError, match=r"would untie '(\S+)' under the name '\1_folded', where 'default' would"):
            fold(both, adapters="one")
        assert_folds(both, model)


# In place ---------------------------------------------------------------------------------------------


def test_in_place_refuses_what_would_change_with_the_weight() -> None:
    fc = nn.Linear(4, 4)
    parts = {"fc": fc, "view": fc.weight.detach(), "other": torch.randn(4, 4)}
    model, gm = symbolic(lambda self, x: self.fc(x) + x @ self.view, **parts)
    with pytest.raises(FoldError, match=r"cannot write 'fc.weight': 'view' views its memory and would change too"):
        fold(moved(gm, target_modules=["fc"]), inplace=True)
    assert_folds(moved(gm, target_modules=["fc"]), model)
    _, gm = symbolic(lambda self, x: self.fc(x) + x @ self.other, **parts)
    adapted = moved(gm, target_modules=["fc"])
    adapted.register_buffer("x", fc.weight.detach())  # which no node reads, though an input has its name
    wanted = adapted(X)
    torch.testing.assert_close(fold(adapted, inplace=True)(X), wanted)


def test_in_place_needs_elements_that_have_memory_each() -> None:
    for rows in (2, 3):
        spread = nn.Parameter(torch.randn(1, 4).expand(rows, 4))
        _, gm = symbolic(lambda self, x: F.linear(x, self.w), w=spread)
        with pytest.raises(FoldError, match="cannot write 'w': its elements overlap in memory"):
            fold(moved(gm, target_modules=["w"]), inplace=True)
    single = torch.as_strided(torch.randn(4), (1, 4), (0, 1))
    model, gm = symbolic(lambda self, x: F.linear(x, self.w), w=nn.Parameter(single))
    adapted = moved(gm, target_modules=["w"])
    wanted = adapted(X)
    fold(adapted, inplace=True)
    torch.testing.assert_close(model(X), wanted)


# Biases -----------------------------------------------------------------------------------------------


def test_what_one_read_serves_is_still_read_once() -> None:
    """torch.export reads a tied weight by one of its names; where all sites of it are adapted alike, that stays so."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    gm = lora_fx.trace(Model().eval(), X)
    folded = assert_folds(moved(gm, target_modules=["a", "b"]), gm)
    assert folded.code == gm.code
    assert folded.a.weight is folded.b.weight


def test_the_bias_of_b_goes_where_the_site_adds_one() -> None:
    parts = {"bare": nn.Linear(4, 4, bias=False), "fc": nn.Linear(4, 4), "last": nn.Linear(4, 4)}
    model, gm = symbolic(through("bare", "fc", "last"), **parts)
    plain = moved(gm, target_modules=["bare", "last"], adapter_name="plain")
    both = moved(plain, target_modules=["fc", "last"], lora_bias=True)
    lora_fx.set_adapters(both, {"plain": 1.0, "default": -0.5})
    folded = assert_folds(both, model)
    sites = [(site.path, site.weight) for site in lora_fx.fold_report(folded).sites]
    assert sites == [(n, f"{n}.weight") for n in ("bare", "last", "fc")] + [(n, f"{n}.bias") for n in ("last", "fc")]
    assert torch.equal(folded.get_parameter("bare.weight"), fold(plain).get_parameter("bare.weight"))


def test_rows_and_a_bias_of_b_are_folded_together() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return self.fc(self.words(ids))

    ids = torch.tensor([0, 3, 4])
    gm = fx.symbolic_trace(Words().eval())
    adapted = moved(gm, target_modules=["fc"], lora_bias=True, trainable_token_indices={"words": [3]})
    folded = fold(adapted)
    torch.testing.assert_close(folded(ids), adapted(ids), rtol=1e-5, atol=1e-5)
    assert not torch.equal(folded(ids), gm(ids))


@pytest.mark.parametrize(
    ("forward", "parts", "message"),
    [
        (through("fc"), {"fc": nn.Linear(4, 4, bias=False)}, "'fc' has a lora_bias, and no bias of its own"),
        (
            lambda self, x: F.linear(x, self.fc.weight, self.fc.bias) + F.linear(x, self.fc.weight, self.c),
            {"fc": nn.Linear(4, 4), "c": nn.Parameter(torch.randn(4))},
            "'fc' has a lora_bias, and no bias of its own",
        ),
        (
            lambda self, x: self.fc(x) + F.linear(x, self.fc.weight),
            {"fc": nn.Linear(4, 4)},
            "'fc' has a lora_bias, and no bias of its own",
        ),
        (
            lambda self, x: self.fc(x) + beside(self.fc.bias),
            {"fc": nn.Linear(4, 4)},
            "bias 'fc.bias', into which the lora_bias of 'fc' goes, is also read by something",
        ),
    ],
    ids=["none", "two", "one of two", "read elsewhere"],
)
def test_a_bias_of_b_without_a_place_is_refused(forward: Any, parts: dict[str, Any], message: str) -> None:
    _, gm = symbolic(forward, **parts)
    with pytest.raises(FoldError, match=message):
        fold(moved(gm, target_modules=["fc"], lora_bias=True))


def test_a_bias_of_two_names_is_known_by_each() -> None:
    parts = {"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)}
    parts["two"].bias = parts["one"].bias
    _, gm = symbolic(through("one", "two"), **parts)
    for name in parts:
        with pytest.raises(FoldError, match=f"the bias '{name}.bias', into which the lora_bias of '{name}' goes, is"):
            fold(moved(gm, target_modules=[name], lora_bias=True))


def test_a_weight_that_is_computed_since_it_was_adapted_is_refused() -> None:
    gm = lora_fx.inject(lora_fx.trace(nn.Sequential(nn.Linear(7, 5)), torch.randn(3, 7)), {"target_modules": ["0"]})
    prune.l1_unstructured(gm.get_submodule("0"), "weight", 0.5)
    with pytest.raises(FoldError, match="weight of '0' is no parameter any more"):
        lora_fx.fold(gm)

"""What plan_checks says and lets pass: what mutation testing found that the other tests do not see."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import lora_fx
from lora_fx import LoraFxWarning, TargetError


class Shut(nn.Module):
    """A bilinear module, whose weight no family reads, beside a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.deaf = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)
        self.emb = nn.Embedding(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.fc(self.emb(ids))
        with torch.no_grad():
            return x + self.deaf(x)


def graph() -> Any:
    torch.manual_seed(0)
    return lora_fx.trace(Shut().eval(), (torch.tensor([[0, 1, 4]]),))


def plan(**options: Any) -> Any:
    return lora_fx.make_plan(graph(), lora_fx.LoraConfig(**{"r": 1, **options}))


def refused(**options: Any) -> str:
    with pytest.raises(TargetError) as caught:
        plan(**options)
    return str(caught.value)


def warned(**options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan(**options)
    return [str(each.message) for each in caught if issubclass(each.category, LoraFxWarning)]


def test_an_entry_that_means_nothing_is_refused_with_its_field_and_a_hint() -> None:
    plain = refused(target_modules=["fx"])
    assert "target_modules 'fx' matched none of" in plain
    assert "regular expression" not in plain
    assert "plain names" not in plain
    assert "give a regular expression as a string" in refused(target_modules=["f.*c"])
    whole = refused(target_modules="fx")
    assert "as a regular expression on whole names" in whole
    assert "give a list: ['fx']" in whole
    assert "a string of its own" in refused(target_modules=["all-linear"])
    assert "exclude_modules 'fx'" in refused(target_modules=["fc"], exclude_modules=["fx"])
    assert "exclude_modules 'fx'" in refused(target_modules=["fc"], exclude_modules="fx")
    assert "exclude_modules 'f'" in refused(target_modules=["fc"], exclude_modules="f")
    assert "target_parameters 'fc.wait'" in refused(target_modules=["fc"], target_parameters=["fc.wait"])
    assert "rank_pattern 'fx' matched none of the 1 sites" in refused(target_modules=["fc"], rank_pattern={"fx": 2})
    assert "alpha_pattern 'fx'" in refused(target_modules=["fc"], alpha_pattern={"fx": 2})


def test_excluding_by_list_or_expression_leaves_the_others() -> None:
    for excluded in (["deaf"], "de.f"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = plan(target_modules=["fc", "deaf"], exclude_modules=excluded)
        assert [target.site.path for target in found.targets] == ["fc"]


def test_layers_that_are_not_there_are_refused_with_those_that_are() -> None:
    case = zoo.STACK
    gm = zoo.traced(case)
    for layers, said in (([7], "numbers found: [0, 1]"), (7, "numbers found: [0, 1]")):
        config = lora_fx.LoraConfig(r=1, target_modules=["up"], layers_to_transform=layers)
        with pytest.raises(TargetError, match="layers_to_transform 7") as caught:
            lora_fx.make_plan(gm, config)
        assert said in str(caught.value)
    assert "no layer number was found" in refused(target_modules=["fc"], layers_to_transform=[0])


def test_what_has_no_effect_is_warned_of_and_nothing_else() -> None:
    assert warned(target_modules=["fc"], lora_dropout=0.1) == []
    assert warned(target_modules=["emb"]) == []
    (said,) = warned(target_modules=["fc", "emb"], lora_dropout=0.1)
    assert "does nothing at 'emb'" in said
    assert "'fc'" not in said
    (said,) = warned(target_modules=["deaf"])
    assert "'deaf' runs under torch.no_grad" in said
    (said,) = warned(target_modules=["fc"], fan_in_fan_out=True)
    assert "fan_in_fan_out=True" in said


def test_a_graph_without_parameters_has_nothing_to_adapt() -> None:
    gm = lora_fx.trace(nn.Sequential(nn.ReLU()).eval(), (torch.randn(2, 3),))
    with pytest.raises(TargetError, match="no parameter that can be adapted$"):
        lora_fx.make_plan(gm, lora_fx.LoraConfig(r=1, target_modules="all-linear"))


def test_a_module_that_the_call_does_not_reach_is_no_target() -> None:
    assert "target_modules 'unused' matched none" in refused(target_modules=["unused"])
    assert [target.site.path for target in plan(target_modules=["fc"]).targets] == ["fc"]


def test_token_rows_are_refused_by_name() -> None:
    assert "names 'fc', which is no embedding" in refused(target_modules=["fc"], trainable_token_indices={"fc": [0]})
    assert "holds 5, and 'emb' has 5 rows" in refused(target_modules=["fc"], trainable_token_indices={"emb": [1, 5]})
    said = refused(target_modules=["fc"], modules_to_save=["emb"], trainable_token_indices={"emb": [1]})
    assert "modules_to_save trains 'emb' in full" in said
    for rows in ([4], {"emb": [4]}):
        (planned,) = plan(target_modules=["fc"], trainable_token_indices=rows).tokens
        assert planned.site.path == "emb"


def test_remarks_of_a_plan() -> None:
    text = str(plan(target_modules=["fc", "emb"]))
    assert "called" not in text
    assert "tied with" not in text
    assert "stored (in, out)" not in text
    tied = zoo.BY_NAME["tied_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        text = str(lora_fx.make_plan(zoo.traced(tied), lora_fx.LoraConfig(r=1, target_modules=list(tied.sites))))
        assert "tied with" in text
        twice = zoo.BY_NAME["called_twice"]
        text = str(lora_fx.make_plan(zoo.traced(twice), lora_fx.LoraConfig(r=1, target_modules=list(twice.sites))))
        assert "called 2 times" in text

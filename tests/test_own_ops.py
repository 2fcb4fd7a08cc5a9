"""Op families of other packages: the example of docs/own-ops.md, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_blocks import blocks_of
from zoo import codes, distance, run

import lora_fx
from lora_fx.ops import FAMILIES, Family, register

GUIDE = Path(__file__).parents[1] / "docs" / "own-ops.md"


@pytest.fixture
def families() -> Iterator[list[Family]]:
    before = list(FAMILIES)
    yield FAMILIES
    FAMILIES[:] = before


def test_the_example_of_the_guide(families: list[Family], tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "shop"}
    for block in blocks_of(GUIDE):
        exec(compile(block.code, str(GUIDE), "exec"), names)
    gm, adapted, x = names["gm"], names["adapted"], ((names["x"],), {})
    first, head = lora_fx.find_sites(gm)
    assert (first.path, first.op, first.is_on_weight, head.path) == ("0", "scaled_linear", False, "1")
    assert len([node for node in adapted.graph.nodes if node.target is torch.ops.aten.linear.default]) == 3
    base = run(gm, x)
    assert distance(base, run(adapted, x)) > 1e-2
    folded = lora_fx.fold(adapted)
    assert codes(folded) == codes(gm)
    lora_fx.save_adapter(adapted, tmp_path)
    assert distance(run(adapted, x), run(lora_fx.load_adapter(gm, tmp_path), x)) == 0
    dora = lora_fx.inject(gm, lora_fx.LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    assert distance(base, run(dora, x)) == 0

    families.remove(families[0])  # without the family, the weight that the op takes is adapted
    site, _ = lora_fx.find_sites(gm)
    assert (site.op, site.is_on_weight, site.is_linear) == ("scaled_linear", True, False)
    with pytest.raises(lora_fx.LoraFxError):
        lora_fx.inject(gm, lora_fx.LoraConfig(r=2, target_modules="all-linear"))


def test_what_is_no_family_is_refused(families: list[Family]) -> None:
    class HalfDone(Family):
        def recognise(self, node: torch.fx.Node, gm: torch.fx.GraphModule) -> Iterator[Any]:
            yield from ()

    for wrong in (HalfDone(), HalfDone, Family(), "linear", None):
        with pytest.raises(lora_fx.ConfigError, match=r"is no op family: register an instance"):
            register(wrong)
    assert families == list(FAMILIES)


def test_registering_twice_is_once(families: list[Family]) -> None:
    count = len(families)
    register(families[2])
    assert len(families) == count

"""Starts that are computed, in the graph: the base stays, or is the graph's own; files are plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import (
    BY_NAME,
    assert_same_bits,
    codes,
    distance,
    fingerprint,
    frozen,
    lora_tensors,
    loss_of,
    reseal,
    run,
    traced,
)

import lora_fx
from lora_fx import ConfigError, FoldError, LoraConfig, TargetError

GPT2, LLAMA = BY_NAME["gpt2"], BY_NAME["llama"]  # weights stored (in, out), and (out, in)
BASE_CHANGING = ("pissa", "olora", "pissa_niter_4", "loftq")


def adapted_by(init: str, gm: Any, targets: Any = ("c_attn", "c_proj", "q_proj", "down_proj"), **options: Any) -> Any:
    names = [name for name in targets if any(site.path.endswith(name) for site in lora_fx.find_sites(gm))]
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names, "init_lora_weights": init} | options)
    return lora_fx.inject(gm, config)


def moved(gm: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_tensors(gm).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return gm


@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=str)
@pytest.mark.parametrize("init", [*BASE_CHANGING, "orthogonal", "mica"])
def test_a_start_keeps_the_model_and_its_graph(init: str, case: Any, tmp_path: Path) -> None:
    gm, arguments = traced(case), case.arguments()
    before, base = fingerprint(gm), run(frozen(gm), arguments)
    adapted = adapted_by(init, gm)
    assert fingerprint(gm) == before
    bound = 0.2 if init == "loftq" else 1e-5  # which the quantisation to four bits moves
    assert distance(base, run(adapted, arguments)) < bound
    assert init == "mica" or lora_tensors(adapted, "B")[next(iter(lora_tensors(adapted, "B")))].any()
    moved(adapted)
    on = run(adapted, arguments)
    assert distance(base, on) > 1e-3
    folded = lora_fx.fold(adapted)
    assert distance(on, run(folded, arguments)) < 1e-4
    assert codes(folded) == codes(gm)
    assert set(folded.state_dict()) == set(gm.state_dict())
    with lora_fx.disable_adapters(adapted):
        assert_same_bits(base, run(adapted, arguments))
    assert_same_bits(on, run(adapted, arguments))
    lora_fx.save_adapter(adapted, tmp_path)
    assert distance(on, run(lora_fx.load_adapter(gm, tmp_path), arguments)) < 1e-5
    assert fingerprint(gm) == before


@pytest.mark.parametrize("init", BASE_CHANGING)
@pytest.mark.parametrize("reversible", [True, False])
def test_folding_in_place_writes_the_base(init: str, reversible: bool) -> None:
    gm, arguments = frozen(traced(LLAMA)), LLAMA.arguments()
    original = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    adapted = moved(adapted_by(init, gm))
    on, reference = run(adapted, arguments), lora_fx.fold(adapted)
    lora_fx.fold(adapted, inplace=True, reversible=reversible)
    assert not lora_fx.compare_graphs(gm, reference)
    assert distance(on, run(gm, arguments)) < 1e-4
    if reversible:
        lora_fx.unfold(adapted)
        assert all(torch.equal(tensor, original[name]) for name, tensor in gm.state_dict().items())
        assert_same_bits(on, run(adapted, arguments))


@pytest.mark.parametrize("init", BASE_CHANGING)
def test_the_gradients_are_those_of_a_base_that_was_changed(init: str) -> None:
    """PEFT's way: W − s · B0 @ A0 in the base, A and B beside it."""
    gm, arguments = traced(LLAMA), LLAMA.arguments()
    adapted = adapted_by(init, gm, targets=("q_proj",))
    plain = adapted_by(True, gm, targets=("q_proj",))
    for name, b in lora_tensors(adapted, "B").items():
        a, path = lora_tensors(adapted, "A")[name.replace("lora_B", "lora_A")], name.partition(".lora_B")[0]
        with torch.no_grad():
            plain.get_parameter(name).copy_(b)
            plain.get_parameter(name.replace("lora_B", "lora_A")).copy_(a)
            weight = plain.get_submodule(path).weight  # a copy: the zoo's graph is shared
            base = adapted.get_submodule(path).weight if init == "loftq" else weight - 6 / 4 * b @ a
            plain.get_submodule(path).weight = nn.Parameter(base.clone(), requires_grad=False)
    for graph in (adapted, plain):
        loss_of(moved(graph).train(), arguments).backward()
    for name, parameter in lora_tensors(adapted).items():
        expected = plain.get_parameter(name).grad
        assert distance([expected], [parameter.grad]) < 1e-4, name


def test_loftq_in_files_and_beside_another_adapter(tmp_path: Path) -> None:
    gm, arguments = traced(LLAMA), LLAMA.arguments()
    adapted = moved(adapted_by("loftq", gm, loftq_config={"loftq_bits": 2, "loftq_iter": 3}))
    lora_fx.save_adapter(adapted, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["init_lora_weights"] == "loftq"
    assert fields["loftq_config"] == {"loftq_bits": 2, "loftq_iter": 3}
    assert_same_bits(run(adapted, arguments), run(lora_fx.load_adapter(gm, tmp_path), arguments))
    assert {id(p) for p in lora_fx.lora_parameters(adapted)} == {id(p) for p in lora_tensors(adapted).values()}
    with pytest.raises(lora_fx.AdapterError, match="counts whole or not at all"):
        lora_fx.set_adapters(adapted, {"default": 0.5})


def test_loftq_of_a_tied_weight_is_refused() -> None:
    with pytest.raises(TargetError, match=r"replaces the weight of 'lm_head', which is tied with"):
        adapted_by("loftq", traced(GPT2), targets=("lm_head",))


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_a_start_from_data(init: str, tmp_path: Path) -> None:
    gm, arguments = traced(GPT2), GPT2.arguments()
    few = {"eva_config": {"tau": 0.5}} if init == "eva" else {}  # batches
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"], init_lora_weights=init, **few)
    with pytest.raises(ConfigError, match=r"starts from data; give it: found = lora_fx.calibrate"):
        lora_fx.inject(gm, config)
    loss = (lambda output, batch: output[0].square().mean()) if init == "lora_ga" else None
    batches = [GPT2.arguments(seed=seed)[1] for seed in range(6)]
    found = lora_fx.calibrate(gm, config, batches, loss=loss)
    adapted = lora_fx.inject(gm, found.config, calibration=found)
    assert distance(run(frozen(gm), arguments), run(adapted, arguments)) < 1e-4
    drawn = lora_fx.inject(gm, LoraConfig(r=3, target_modules=["c_attn"]))
    name = "transformer.h.0.attn.c_attn.lora_A.default.weight"
    assert adapted.get_parameter(name).shape[1:] == drawn.get_parameter(name).shape[1:]
    moved(adapted)
    on = run(adapted, arguments)
    assert distance(on, run(lora_fx.fold(adapted), arguments)) < 1e-4
    lora_fx.save_adapter(adapted, tmp_path)
    assert distance(on, run(lora_fx.load_adapter(gm, tmp_path), arguments)) < 1e-4
    with pytest.raises(ConfigError, match="takes no data; leave calibration out"):
        lora_fx.inject(gm, LoraConfig(r=3, target_modules=["c_attn"]), calibration=found)


def test_a_file_whose_start_came_from_data_is_refused(tmp_path: Path) -> None:
    """As PEFT writes one that it did not convert: the base that it means is lost."""
    gm = traced(LLAMA)
    lora_fx.save_adapter(adapted_by(True, gm), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "lora_ga"}))
    reseal(tmp_path)
    with pytest.raises(ConfigError, match=r"lora_ga.*path_initial_model_for_weight_conversion"):
        lora_fx.load_adapter(gm, tmp_path)


def test_a_fold_that_is_not_finite_leaves_all_as_it_was() -> None:
    gm = frozen(traced(LLAMA))
    adapted = adapted_by("loftq", gm)
    with torch.no_grad():
        next(iter(lora_tensors(adapted, "B").values()))[0, 0] = float("inf")
    before, graph = fingerprint(adapted), fingerprint(gm)
    for options in ({}, {"inplace": True}, {"inplace": True, "reversible": False}):
        with pytest.raises(FoldError, match="NaN or Inf"):
            lora_fx.fold(adapted, **options)
        assert fingerprint(adapted) == before
        assert fingerprint(gm) == graph


def test_one_weight_is_replaced_once() -> None:
    gm = traced(LLAMA)
    one = adapted_by("loftq", gm, targets=("q_proj",))
    before = fingerprint(one)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="loftq")
    with pytest.raises(lora_fx.AdapterError, match="another adapter holds one of its own there already"):
        lora_fx.inject(one, config, adapter_name="two")
    with pytest.raises(lora_fx.AdapterError, match="already trains"):
        lora_fx.inject(one, LoraConfig(target_modules=["up_proj"], modules_to_save=["q_proj"]), adapter_name="two")
    assert fingerprint(one) == before

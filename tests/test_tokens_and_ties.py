"""Rows of embeddings that are trained as they are, and one adapter for all that apply a tied weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import (
    BY_NAME,
    assert_same_bits,
    bits,
    codes,
    distance,
    fingerprint,
    frozen,
    loss_of,
    reseal,
    run,
    tolerance,
    traced,
)

import lora_fx
from lora_fx import LoraConfig, TargetError

TIED = BY_NAME["qwen3"]
ROWS = (5, 3, 40)


class Words(nn.Module):
    """Two tables, of which one is also a head and a term of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, 7), nn.Embedding(5, 7)
        self.fc = nn.Linear(7, 7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        return self.head(torch.tanh(self.fc(x))) + self.words.weight.sum(1)


def words(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return lora_fx.trace(Words().to(dtype).eval(), (torch.tensor([[1, 3, 2], [0, 3, 12]]),))


IDS = ((torch.tensor([[1, 3, 2], [0, 3, 12]]),), {})


def tokens(gm: Any, rows: Any, **options: Any) -> Any:
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["fc"], "trainable_token_indices": rows} | options
    )
    return lora_fx.inject(gm, config)


def moved(gm: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name or "token_adapter" in name
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)
    return gm


# Rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_start_as_the_base_and_fold_to_what_they_are(dtype: torch.dtype) -> None:
    gm = words(dtype)
    before = fingerprint(gm)
    adapted = tokens(gm, {"words": [3, 12]})
    assert_same_bits(run(frozen(gm), IDS), run(adapted, IDS))
    assert fingerprint(gm) == before
    expected = run(moved(adapted), IDS)
    folded = lora_fx.fold(adapted)
    assert distance(expected, run(folded, IDS)) <= 8 * tolerance(BY_NAME["mlp"], dtype)
    assert codes(folded) == codes(gm)
    rows = adapted.get_parameter("words.token_adapter.trainable_tokens_delta.default").detach().to(dtype)
    weight, base = folded.words.weight, gm.words.weight
    assert torch.allclose(weight[[3, 12]], rows, rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    others = [row for row in range(13) if row not in (3, 12)]
    assert bits(weight[others]) == bits(base[others])
    assert weight is folded.head.weight


def test_the_head_and_the_sum_follow_the_rows_before_folding() -> None:
    gm = words()
    adapted = moved(tokens(gm, {"words": [3, 12]}))
    model = Words().eval()
    model.load_state_dict({name: tensor for name, tensor in gm.state_dict().items() if "_guards" not in name})
    with torch.no_grad():
        for name in ("fc",):  # the explicit W + ΔW
            a, b = (adapted.get_parameter(f"{name}.lora_{half}.default.weight") for half in "AB")
            model.fc.weight += 5 / 3 * b @ a
        model.words.weight[[3, 12]] = adapted.get_parameter("words.token_adapter.trainable_tokens_delta.default")
    assert distance(run(model, IDS), run(adapted, IDS)) < 1e-6


def test_only_the_rows_that_occur_and_the_heads_get_gradients() -> None:
    adapted = moved(tokens(words(), {"places": [1, 4]}))
    loss_of(adapted.train(), IDS).backward()
    grad = adapted.get_parameter("places.token_adapter.trainable_tokens_delta.default").grad
    assert grad is not None
    assert grad[0].any()
    assert not grad[1].any()  # no input is five words long
    assert adapted.words.weight.grad is None


@pytest.mark.parametrize("weight", [-1.5, 0.5])
def test_rows_count_by_the_adapters_weight(weight: float) -> None:
    gm = words()
    adapted = moved(tokens(gm, {"words": [3, 12]}))
    lora_fx.set_adapters(adapted, {"default": weight})
    folded = lora_fx.fold(adapted)
    assert distance(run(adapted, IDS), run(folded, IDS)) < 1e-5
    rows = adapted.get_parameter("words.token_adapter.trainable_tokens_delta.default").detach()
    base = gm.words.weight.detach()[[3, 12]]
    assert torch.allclose(folded.words.weight[[3, 12]], base + weight * (rows - base), atol=1e-6)
    with lora_fx.disable_adapters(adapted):
        assert_same_bits(run(frozen(gm), IDS), run(adapted, IDS))


def test_rows_and_low_rank_on_one_table(tmp_path: Path) -> None:
    gm = words()
    adapted = moved(tokens(gm, {"places": [1, 0]}, target_modules=["places", "fc"]))
    folded = lora_fx.fold(adapted)
    assert distance(run(adapted, IDS), run(folded, IDS)) < 1e-5
    lora_fx.save_adapter(adapted, tmp_path)
    assert_same_bits(run(adapted, IDS), run(lora_fx.load_adapter(gm, tmp_path), IDS))
    reference = folded.places.weight.detach().clone()
    lora_fx.fold(adapted, inplace=True)
    assert torch.equal(gm.places.weight, reference)
    lora_fx.unfold(adapted)
    assert torch.equal(gm.places.weight, words().places.weight)


def test_a_list_of_rows_means_the_input_embedding() -> None:
    planned = lora_fx.make_plan(words(), LoraConfig(target_modules=["fc"], trainable_token_indices=[1, 2])).tokens
    assert [(rows.site.path, rows.rows) for rows in planned] == [("words", (1, 2))]
    assert set(planned[0].readers) >= {"words", "head"}
    plan = lora_fx.make_plan(traced(TIED), LoraConfig(target_modules=["q_proj"], trainable_token_indices=ROWS))
    assert [rows.site.path for rows in plan.tokens] == ["model.embed_tokens"]
    assert "3 rows of model.embed_tokens trained in full" in str(plan)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"word": [1]}, {}, "'word', which is no embedding.*'words'"),
        ({"fc": [1]}, {}, "'fc', which is no embedding"),
        ({"words": [13]}, {}, "holds 13, and 'words' has 13 rows; resize"),
        ({"words": [1]}, {"modules_to_save": ["words", "head"]}, "modules_to_save trains 'words' in full"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows: Any, options: dict[str, Any], message: str) -> None:
    gm = words()
    before = fingerprint(gm)
    with pytest.raises(TargetError, match=message):
        tokens(gm, rows, **options)
    assert fingerprint(gm) == before


def test_a_table_that_is_transposed_on_the_way_is_refused() -> None:
    class Odd(Words):
        def forward(self, input_ids):
            return torch.tanh(self.fc(self.words(input_ids))) @ self.words.weight.T @ self.words.weight

    gm = lora_fx.trace(Odd().eval(), *IDS)
    with pytest.raises(lora_fx.GraphError, match="applies the table of trainable_token_indices as"):
        tokens(gm, {"words": [1]})


# Ties ------------------------------------------------------------------------------------------------


def tied(gm: Any, targets: Any, **options: Any) -> Any:
    return lora_fx.inject(
        gm, LoraConfig(r=3, lora_alpha=5, target_modules=targets, ensure_weight_tying=True, **options)
    )


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens", "q_proj"]], ids=str)
def test_one_adapter_for_an_embedding_and_its_head(targets: list[str], tmp_path: Path) -> None:
    gm, arguments = traced(TIED), TIED.arguments()
    adapted = tied(gm, targets)
    assert_same_bits(run(frozen(gm), arguments), run(adapted, arguments))
    own = [name for name, _ in adapted.named_parameters() if "lora_" in name and "layers" not in name]
    assert len(own) == 2
    moved(adapted)
    folded = lora_fx.fold(adapted)  # without a warning: nothing is untied
    assert distance(run(adapted, arguments), run(folded, arguments)) <= 4 * tolerance(TIED, torch.float32)
    assert codes(folded) == codes(gm)
    assert folded.model.embed_tokens.weight is folded.lm_head.weight
    lora_fx.save_adapter(adapted, tmp_path)
    assert_same_bits(run(adapted, arguments), run(lora_fx.load_adapter(gm, tmp_path), arguments))
    with lora_fx.disable_adapters(adapted):
        assert_same_bits(run(frozen(gm), arguments), run(adapted, arguments))
    deleted = lora_fx.delete_adapter(adapted, "default")
    assert set(deleted.state_dict()) == set(gm.state_dict())


def test_a_file_with_two_adapters_for_one_tied_weight_keeps_both(tmp_path: Path) -> None:
    gm, arguments = traced(TIED), TIED.arguments()
    two = lora_fx.inject(gm, LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head"]))
    lora_fx.save_adapter(moved(two), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"ensure_weight_tying": false', '"ensure_weight_tying": true'))
    reseal(tmp_path)
    with pytest.warns(lora_fx.LoraFxWarning, match="different adapters for sites that share one tied weight"):
        loaded = lora_fx.load_adapter(gm, tmp_path)
    assert_same_bits(run(two, arguments), run(loaded, arguments))


def test_ties_that_cannot_be_are_refused() -> None:
    gm = traced(TIED)
    with pytest.raises(TargetError, match="one adapter, and rank_pattern or alpha_pattern gives them two"):
        tied(gm, ["embed_tokens", "lm_head"], rank_pattern={"lm_head": 2})
    with pytest.raises(TargetError, match="ensure_weight_tying adapts 'lm_head' with what it is tied to"):
        tied(gm, ["embed_tokens"], modules_to_save=["lm_head"])
    with pytest.raises(lora_fx.GraphError, match="also applied the other way round"):
        tied(gm, ["embed_tokens"], use_dora=True)


def test_a_plan_with_rows_of_another_graph_is_refused() -> None:
    plan = lora_fx.make_plan(words(), LoraConfig(target_modules=["fc"], trainable_token_indices={"words": [1]}))

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x):
            return self.fc(x)

    gm = lora_fx.trace(Other().eval(), torch.randn(2, 7))
    with pytest.raises(TargetError, match="of another graph: it trains rows of 'words'"):
        lora_fx.inject(gm, plan)

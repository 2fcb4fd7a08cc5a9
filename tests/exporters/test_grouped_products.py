"""Experts as transformers computes them: rows sorted by expert, each group times its own matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import transformers.integrations.moe  # registers its grouped product
from torch import nn
from torch.nn import functional as F

import exporters
import lora_fx

EXPERTS, INPUTS, OUTPUTS = 5, 7, 11


class Experts(nn.Module):
    """Each row times the matrix of its expert; rows that name none are at the end, and stay zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, INPUTS, OUTPUTS))

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)


def example(*counts: int, rest: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(sum(counts) + rest, INPUTS), torch.tensor(counts).cumsum(0).int()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[lora_fx.graph_module.LoraGraphModule, Path]:
    path = tmp_path_factory.mktemp("grouped") / "experts.onnx"
    torch.manual_seed(0)
    gm = lora_fx.trace(Experts(), example(2, 1, 3, 2, 4), dynamic_shapes=({0: "rows"}, None))
    exporters.export_onnx(gm, path)
    return gm, path


@pytest.mark.parametrize(
    ("counts", "rest"),
    [((2, 1, 3, 2, 4), 0), ((0, 3, 0, 0, 2), 0), ((0, 0, 0, 0, 9), 0), ((1, 0, 0, 0, 0), 4), ((0, 0, 0, 0, 0), 3),
     ((0, 0, 0, 0, 0), 0)],
)  # fmt: skip
def test_groups_of_any_size_and_rows_of_no_expert(file, counts: tuple[int, ...], rest: int) -> None:
    gm, path = file
    x, ends = example(*counts, rest=rest)
    session = exporters.make_session(path, provider="cpu")
    (y,) = session.run(None, {"x": x.numpy(), "ends": ends.numpy()})
    expected = torch.cat(
        [part @ gm.weight[e] for e, part in enumerate(x[: sum(counts)].split(list(counts)))]
        + [torch.zeros(rest, OUTPUTS)]
    )
    assert y.shape == (len(x), OUTPUTS)
    assert np.allclose(y, expected.detach().numpy(), atol=1e-5)


def test_torchs_own_grouped_product_has_the_same_form(tmp_path: Path) -> None:
    """torch traces it in bfloat16 only, which ONNX Runtime does not run on a CPU."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXPERTS, 16, 24, dtype=torch.bfloat16))

        def forward(self, x, ends):
            return F.grouped_mm(x, self.weight, offs=ends)

    x, ends = torch.randn(9, 16, dtype=torch.bfloat16), torch.tensor([2, 2, 5, 8, 9], dtype=torch.int32)
    gm = lora_fx.trace(Own(), (x, ends), dynamic_shapes=None)
    report = exporters.export_onnx(gm, tmp_path / "own.onnx", check=False)
    assert report.ops["Loop"] == 1


def test_a_mixture_of_experts_as_transformers_makes_it(tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, moe_intermediate_size=12,
        shared_expert_intermediate_size=12, num_experts=4, num_experts_per_tok=2, vocab_size=31, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    base = lora_fx.trace(model, (), {"input_ids": torch.randint(0, 31, (2, 7))})
    lora = lora_fx.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    gm = lora_fx.inject(base, lora)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.normal_(std=0.3)
    folded = lora_fx.fold(gm)
    reports = [
        exporters.export_onnx(graph, tmp_path / name) for graph, name in ((base, "base.onnx"), (folded, "f.onnx"))
    ]
    assert reports[0].ops == reports[1].ops
    exporters.verify_onnx(tmp_path / "f.onnx", folded, base=tmp_path / "base.onnx", provider="cpu")

    lora_fx.save_adapter(gm, tmp_path / "adapter")  # and without the model
    exporters.fold_into_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "again.onnx")
    exporters.verify_onnx(tmp_path / "again.onnx", folded, provider="cpu")
    exporters.export_onnx_adapters(gm, tmp_path / "switchable.onnx")
    session = exporters.AdapterSession(tmp_path / "switchable.onnx", provider="cpu")
    session.load("default", tmp_path / "adapter")
    ids = torch.randint(0, 31, (3, 5))
    (logits,) = session.run({"input_ids": ids.numpy()}, adapter="default")
    assert np.allclose(logits, gm(input_ids=ids).logits.detach().numpy(), atol=1e-4)

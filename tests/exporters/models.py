"""Small models for the tests of the exporters: prime sizes where the architecture allows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import lora_fx
from exporters import OnnxReport, export_onnx
from lora_fx import LoraConfig


class Mlp(nn.Module):
    """Two linears with dropout between them; x is (batch, 7), the result (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(11, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.relu(self.up(x))))


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.body = nn.Linear(7, 7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class Twins(nn.Module):
    """Layers with equal weights, zero biases and unit norms: an optimizer that looks at values merges them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.second = nn.Linear(7, 7)
        self.norms = nn.ModuleList(nn.LayerNorm(7) for _ in range(2))
        self.second.load_state_dict(self.first.state_dict())
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norms[0](self.first(x)) * self.norms[1](self.second(x))


def ids_and_mask() -> dict[str, torch.Tensor]:
    """Token ids (2, 5) and a mask that pads the second row."""
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": torch.randint(0, 101, (2, 5)), "attention_mask": mask}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    """MiniLM's architecture."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, vocab_size=101
    )
    return transformers.BertModel(config), ids_and_mask()


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """Conv1D weights, stored (in, out), and a head tied to the embedding."""
    import transformers

    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=101, n_positions=61, use_cache=False, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config), ids_and_mask()


def llama() -> tuple[nn.Module, dict[str, Any]]:
    """Grouped queries, rotary embedding, no biases."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=53,
        vocab_size=101,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), ids_and_mask()


def vit() -> tuple[nn.Module, dict[str, Any]]:
    """A convolution, patches, and a classifier."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=37,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
}


@dataclass(frozen=True)
class Exported:
    """A base model and its folded twin, as graphs and as files."""

    model: nn.Module
    gm: fx.GraphModule
    injected: fx.GraphModule
    folded: fx.GraphModule
    base: OnnxReport
    twin: OnnxReport

    @property
    def adapted(self) -> set[str]:
        """Names of the weights that fold changed."""
        before, after = dict(self.gm.named_parameters()), dict(self.folded.named_parameters())
        return {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}


def export_pair(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    directory: Path,
    *,
    seed: int = 0,
    **options: Any,
) -> Exported:
    """Trace, export; inject, randomise, fold, export. `options` go to LoraConfig."""
    gm = lora_fx.trace(model.eval(), args, kwargs)
    config = LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": "all-linear"} | options))
    injected = lora_fx.inject(gm, config)
    randomise(injected, seed)
    folded = lora_fx.fold(injected)
    base = export_onnx(gm, directory / "base.onnx")
    twin = export_onnx(folded, directory / "folded.onnx")
    return Exported(model, gm, injected, folded, base, twin)


def randomise(gm: fx.GraphModule, seed: int = 0) -> None:
    """Give every adapter parameter values, so that folding does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_fx.lora_parameters(gm):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

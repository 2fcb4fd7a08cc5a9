"""Weights that several modules read, tied or merged by an exporter: an adapter of one must not reach the others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from deployed import BOUND, distance
from torch import nn

import lora_fx
from exporters import AdapterSession, add_adapter_inputs, export_onnx, fold_into_onnx, make_session
from lora_fx import LoraFxError


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.words(ids)))


class Twins(nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 5)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Equal(nn.Module):
    """Biases of zero and norms of one, which torch's exporters write once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.ln1, self.fc2, self.ln2 = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)
        for layer in (self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln2(self.fc2(torch.tanh(self.ln1(self.fc1(x)))) * 3)


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "tied": (Tied, torch.tensor([[1, 5, 3, 9, 1], [0, 10, 2, 2, 7]])),
    "twins": (Twins, torch.linspace(-2, 2, 32).reshape(4, 8)),
    "equal": (Equal, torch.linspace(-2, 2, 32).reshape(4, 8).sin()),
}
# {model: {name: (its adapter, the exporters whose file it can be folded into)}}
ADAPTERS: dict[str, dict[str, tuple[dict[str, object], set[str]]]] = {
    "tied": {
        "embedding": ({"target_modules": ["words", "mid"]}, {"own", "script", "dynamo"}),
        "head": ({"target_modules": ["head", "mid"]}, {"own", "script", "dynamo"}),
        "both": ({"target_modules": ["head", "words"]}, {"own", "script", "dynamo"}),
        "embedding in full": ({"target_modules": ["mid"], "modules_to_save": ["words"]}, {"script"}),
        "head in full": ({"target_modules": ["mid"], "modules_to_save": ["head"]}, set()),
        "rows": ({"target_modules": ["mid"], "trainable_token_indices": {"words": [1, 3]}}, {"script"}),
    },
    "twins": {
        "a": ({"target_modules": ["a"]}, {"own"}),
        "b": ({"target_modules": ["b"]}, {"own"}),
        "a parameter": ({"target_modules": ["c"], "target_parameters": ["a.weight"]}, set()),
        "a and b": ({"target_modules": ["a", "b"]}, {"own", "script", "dynamo"}),
    },
    "equal": {
        "a bias": ({"target_modules": ["fc1"], "bias": "lora_only"}, {"own"}),
        "a norm": ({"target_modules": ["fc1"], "modules_to_save": ["ln1"]}, {"own"}),
        "lora_bias": ({"target_modules": ["fc1"], "lora_bias": True}, {"own"}),
    },
}
CASES = [(model, name) for model, adapters in ADAPTERS.items() for name in adapters]


def exported(model: nn.Module, x: torch.Tensor, how: str, file: Path) -> Path:
    """A file by one of three exporters: ours, and torch's two."""
    if how == "own":
        export_onnx(lora_fx.trace(model, (x,)), file)
        return file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=how == "dynamo", opset_version=18, verbose=False)
    return file


def trained(model: nn.Module, options: dict[str, object], directory: Path) -> peft.PeftModel:
    """PEFT's model, with an adapter that does something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, **options)).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.4)
        wrapped.save_pretrained(directory)
    return wrapped


@pytest.mark.parametrize("how", ["own", "script", "dynamo"])
@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_it_is_right_or_refused(name: str, adapter: str, how: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    build, x = MODELS[name]
    options, foldable = ADAPTERS[name][adapter]
    model = build().eval()
    base, directory, out = exported(model, x, how, tmp_path / "base.onnx"), tmp_path / "adapter", tmp_path / "out.onnx"
    wanted = [trained(model, options, directory)(x).detach().numpy()]
    session = make_session(base, provider="cpu")
    feed = {session.get_inputs()[0].name: x.numpy()}
    assert distance(session.run(None, feed), wanted) > 100 * BOUND, "the law would be vacuous"

    def folded() -> list[np.ndarray]:
        fold_into_onnx(base, directory, out)
        return list(make_session(out, provider="cpu").run(None, feed))

    def loaded() -> list[np.ndarray]:
        return list(make_session(base, provider="cpu", adapter=directory).run(None, feed))

    def switched() -> list[np.ndarray]:
        add_adapter_inputs(base, tmp_path / "switch.onnx", directory)
        switch = AdapterSession(tmp_path / "switch.onnx", provider="cpu")
        switch.load("x", directory)
        return switch.run(feed, "x")

    if how in foldable:
        assert distance(folded(), wanted) < BOUND
    else:
        with pytest.raises(LoraFxError, match=r"Fold in the graph|fold in the graph|exporters|bias there"):
            folded()
        assert not out.exists()
    for form in (loaded, switched):  # no second initializer there, or more than can be folded
        try:
            assert distance(form(), wanted) < BOUND
        except LoraFxError:
            assert how not in foldable or form is loaded

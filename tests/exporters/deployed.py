"""Models as the tests of deployment take them: a base file, adapters on disk, and what torch computes with each."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from models import TRANSFORMERS, randomise
from torch import fx, nn
from torch.utils import _pytree as pytree

import lora_fx
from exporters import export_onnx, make_session
from lora_fx import LoraConfig

Feed = dict[str, np.ndarray]
BASE, ONE, TWO = "base", "one", "two"


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    """Encoder and decoder, convolutions in front, a tied head."""
    import transformers

    config = transformers.WhisperConfig(
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        vocab_size=101,
        num_mel_bins=7,
        max_source_positions=11,
        max_target_positions=31,
        use_cache=False,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    ids = torch.randint(0, 101, (2, 5))
    features = torch.randn(2, 7, 22)
    return transformers.WhisperForConditionalGeneration(config), {"input_features": features, "decoder_input_ids": ids}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = TRANSFORMERS | {"whisper": whisper}


@dataclass(frozen=True)
class Deployed:
    """A base model and two adapters.

    Attributes:
        directory: holds base.onnx, and the adapters one/ and two/.
        feeds: inputs of three shapes.
        wanted: {who: torch's outputs for each feed}, for the base and for each adapter.
        graph: the graph with both adapters; None if another process made the files.
    """

    directory: Path
    feeds: list[Feed]
    wanted: dict[str, list[list[np.ndarray]]]
    graph: fx.GraphModule | None = None

    @property
    def injected(self) -> fx.GraphModule:
        assert self.graph is not None
        return self.graph

    @property
    def base(self) -> Path:
        return self.directory / "base.onnx"

    def adapter(self, name: str) -> Path:
        return self.directory / name


def deploy(name: str, directory: Path) -> Deployed:
    """Trace, inject two adapters of other ranks, scalings and targets, export the base, and run torch."""
    torch.manual_seed(0)
    model, kwargs = MODELS[name]()
    gm = lora_fx.trace(model.eval(), (), kwargs)
    linears = lora_fx.find_all_linear_names(gm)
    one = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear")
    two = LoraConfig(r=5, lora_alpha=2, target_modules=linears[1:], rank_pattern={linears[1]: 2}, use_rslora=True)
    injected = lora_fx.inject(gm, one, adapter_name=ONE)
    injected = lora_fx.inject(injected, two, adapter_name=TWO).eval()
    randomise(injected)
    for parameter in lora_fx.lora_parameters(injected):
        parameter.data.mul_(0.3)  # a delta that is of the weight's size: larger ones lose digits of their own accord
    for adapter in (ONE, TWO):
        lora_fx.save_adapter(injected, directory / adapter, adapter_name=adapter)
    export_onnx(gm, directory / "base.onnx")
    batches = [_resized(kwargs, size, length) for size, length in ((2, 5), (3, 7), (1, 4))]
    wanted = {who: [run_torch(injected, who, each) for each in batches] for who in (BASE, ONE, TWO)}
    names = [port.name for port in make_session(directory / "base.onnx", provider="cpu").get_inputs()]
    feeds = [dict(zip(names, (value.numpy() for value in each.values()), strict=True)) for each in batches]
    return Deployed(directory, feeds, wanted, injected)


def shared(name: str, directory: Path) -> Deployed:
    """The same, made by one of several processes and read by the others."""
    done = directory / "done.pickle"
    with filelock.FileLock(f"{directory}.lock"):
        if not done.exists():
            directory.mkdir()
            made = deploy(name, directory)
            done.write_bytes(pickle.dumps((made.feeds, made.wanted)))
    feeds, wanted = pickle.loads(done.read_bytes())
    return Deployed(directory, feeds, wanted)


def _resized(kwargs: dict[str, Any], batch: int, length: int) -> dict[str, Any]:
    """The same inputs at another size; texts have two dimensions."""
    result = {}
    for name, value in kwargs.items():
        rows = value.repeat(batch, *[1] * (value.ndim - 1))[:batch]
        if value.ndim == 2:
            rows = rows.repeat(1, 3)[:, :length].clone()
            rows = (rows + torch.arange(batch)[:, None]) % 101 if name.endswith("input_ids") else rows
        result[name] = rows
    return result


def run_torch(gm: fx.GraphModule, who: str, kwargs: dict[str, Any]) -> list[np.ndarray]:
    before = lora_fx.active_adapters(gm)
    lora_fx.set_adapters(gm, {} if who == BASE else {who: 1.0})
    try:
        with torch.no_grad():
            return [leaf.numpy() for leaf in pytree.tree_leaves(gm(**kwargs)) if isinstance(leaf, torch.Tensor)]
    finally:
        lora_fx.set_adapters(gm, before)


def distance(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest error of any output, relative to its largest value."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(got, wanted, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# What a right float32 file may differ by: the bound of output_check, 512 eps.
BOUND = 512 * float(np.finfo(np.float32).eps)

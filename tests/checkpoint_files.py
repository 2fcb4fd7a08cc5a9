"""Checkpoints and adapters as files, of tensors that a test makes: no model, and no tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_fx.base_note import KEY, encoded, places_of


def write_base(tensors: Mapping[str, torch.Tensor], directory: Path, shards: int = 2, **config: Any) -> Path:
    """A checkpoint of these tensors; each memory once, as transformers writes ties."""
    directory.mkdir(parents=True)
    found: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault((tensor.data_ptr(), tensor.numel()), (name, tensor.detach().clone().contiguous()))
    kept = list(found.values())
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = dict(kept[len(kept) * i // shards : len(kept) * (i + 1) // shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 7}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_adapter(
    directory: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, **config: Any
) -> Path:
    """An adapter of these tensors, named without PEFT's prefix."""
    directory.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"} | config
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata=dict(metadata or {}))
    return directory


def low_rank(path: str, out: int, into: int, r: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A and B of one linear: of other values for another path."""
    generator = torch.Generator().manual_seed(sum(path.encode()))
    a, b = torch.randn(r, into, generator=generator), torch.randn(out, r, generator=generator)
    return {f"{path}.lora_A.weight": a.to(dtype), f"{path}.lora_B.weight": b.to(dtype)}


def noted(weights: list[torch.Tensor], dtype: str = "float32") -> dict[str, str]:
    """The note on a base of these weights, as `save_adapter` puts it into a file's metadata."""
    picked = [w.reshape(-1).float()[torch.from_numpy(places_of(w.numel(), 4))] for w in weights]
    return {KEY: json.dumps({"values": encoded(torch.cat(picked).numpy()), "dtype": dtype})}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

"""The stamp of a fold: which adapter went into which base with what scaling, for files made of the folded graph."""

from __future__ import annotations

import json

import torch
from torch import fx

from .adapter_integrity import digest_of
from .adapter_tensors import stacked_tensors
from .base_fingerprint import note_of_base
from .errors import LoraFxError
from .graph_module import record_of
from .injection import Adapter

Stamp = dict[str, str | float | int | bool | None]


def stamp_of(gm: fx.GraphModule, adapter: Adapter) -> Stamp:
    """What `fold` is about to do with an adapter of this graph; plain values for JSON.

    Returns:
        adapter: sha256 of its tensors' bytes as a file has them, `AdapterArrays.data_sha256` of the saved adapter.
            None if no file can hold it.
        base: sha256 of a sample of the base's adapted weights, as `save_adapter` notes it.
        strength: the weight of `set_adapters`.
        r, lora_alpha, use_rslora: of its configuration.
    """
    try:
        tensors = stacked_tensors(gm, adapter, shares=True).tensors.values()
        digest = digest_of(tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors)
    except LoraFxError:  # of what PEFT's form has no room for
        digest = None
    note = note_of_base(gm, adapter.plan)
    config = adapter.config
    return {
        "adapter": digest,
        "base": None if note is None else str(json.loads(note)["sha256"]),
        "strength": float(record_of(gm).active[adapter.name]),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
    }

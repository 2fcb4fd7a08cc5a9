"""Bases that a fold cannot just add to: weights that are spread over processes, or stored in a few bits.

The first are gathered. The second become floats, or the sum is stored in as few bits again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .attributes import get_attribute, get_parameter
from .errors import FoldError
from .fold_results import FoldedSite
from .graph import finish, write_float_linears
from .graph_module import LoraGraphModule, copy_sharing_tensors, gathered, record_of
from .injection import Adapter
from .quantized import check_storable, dense_weight, is_quantized, quantized_calls, stored_again
from .sharding import is_sharded


def with_whole_tensors(gm: LoraGraphModule, *, inplace: bool) -> LoraGraphModule:
    """`gm` itself, or a copy with whole tensors where its own are spread over processes, which all have to call this.

    Raises:
        FoldError: if those are to be written `inplace`.
    """
    if not is_sharded(gm):
        return gm
    if inplace:
        raise FoldError(
            "fold(inplace=True) cannot write weights that are spread over processes; fold(gm), called by all of "
            "them, gives each the folded graph with whole weights"
        )
    return gathered(gm)


def check_few_bits(gm: fx.GraphModule, chosen: list[Adapter], quantized: str | None, *, inplace: bool) -> None:
    """Raise FoldError unless it is said what becomes of weights that are stored in a few bits, and can be done."""
    if quantized == "dequantize":
        stored = {path: module for path, module in gm.named_modules() if is_quantized(module)}
    else:
        paths = dict.fromkeys(site.applied for adapter in chosen for site in adapter.sites.values())
        owners = {path: quantized_owner(gm, f"{path}.weight") for path in paths}
        stored = {path: owner for path, owner in owners.items() if owner is not None}
    if not stored:
        return
    path, owner = next(iter(stored.items()))
    what = f"{path!r} stores its weight in a few bits ({type(owner).__name__})"
    if quantized is None:
        raise FoldError(
            f"{what}, and folding has to know what becomes of that: fold(gm, quantized='dequantize') gives float "
            "weights, fold(gm, quantized='requantize') rounds the sum to as few bits again. To fold into the weights "
            "that it was quantized from, save the adapter, and load it on a trace of the model in floats"
        )
    if inplace:
        raise FoldError(f"{what}, which has no room for the folded one; leave inplace out: fold(gm, quantized=...)")
    if quantized == "requantize":
        for module in stored.values():
            check_storable(module)


def quantized_owner(gm: fx.GraphModule, attribute: str) -> nn.Module | None:
    """The module that stores this weight in a few bits; None for what is floats."""
    path, _, name = attribute.rpartition(".")
    owner = get_attribute(gm, path)
    return owner if name == "weight" and isinstance(owner, nn.Module) and is_quantized(owner) else None


def base_weight(gm: fx.GraphModule, attribute: str) -> torch.Tensor:
    """What is added to: the parameter, or what its few bits stand for."""
    owner = quantized_owner(gm, attribute)
    return get_parameter(gm, attribute).detach() if owner is None else dense_weight(owner)


def requantized(module: nn.Module, weight: torch.Tensor, site: FoldedSite) -> tuple[nn.Module, FoldedSite]:
    """The module with another weight (out, in) in as few bits, and the site with what that keeps of its delta."""
    again = stored_again(module, weight)
    error = float(torch.linalg.vector_norm((dense_weight(again) - weight).double()))
    kept = max(0.0, 1 - error / site.delta_norm) if site.delta_norm else 1.0
    return again, replace(site, kept=kept, stored_as=type(module).__name__)


def put_few_bits(gm: LoraGraphModule, paths: Iterable[str], stored: nn.Module) -> None:
    """Let the linears at these paths, which share a weight, have that of another; their biases and adapters stay."""
    for path in paths:
        old, new = gm.get_submodule(path), copy.copy(stored)
        new._parameters = {**old._parameters, "weight": stored._parameters["weight"]}
        new._modules = old._modules
        gm.set_submodule(path, new)


def dequantized(gm: fx.GraphModule) -> LoraGraphModule:
    """A copy of the graph in which all linears have float weights; it shares the other tensors."""
    result = copy_sharing_tensors(gm)
    views = record_of(result).views.values()
    calls = {str(node.target): node.args[0] for graph in views for node in quantized_calls(result, graph)}
    floats = {}
    for path, x in calls.items():
        module, value = result.get_submodule(path), x.meta.get("val")  # type: ignore[union-attr]
        holder: Any = nn.Module()
        floats[path] = holder
        weight = dense_weight(module).to(value.dtype if isinstance(value, torch.Tensor) else torch.float32)
        holder.weight = nn.Parameter(weight, requires_grad=False)
        holder.bias = _bias_of(module, weight.dtype)
        holder._modules = module._modules
        holder.train(module.training)
    write_float_linears(result, floats)
    finish(result)
    return result


def _bias_of(module: nn.Module, dtype: torch.dtype) -> nn.Parameter | None:
    """Its bias in the dtype of the weight: bitsandbytes turns it into that of its products, which may be narrower."""
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    if bias is None or bias.dtype == dtype:
        return bias
    return nn.Parameter(bias.detach().to(dtype), bias.requires_grad)

"""The pass that folds scaling · B @ A into the weights (PEFT calls this "merge and unload"), and back.

Plan, compute and check everything, then commit: an error leaves graph and weights as they were. The
product is accumulated in at least float32 and rounded once to the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from .applications import read_applications
from .attributes import delete_attribute, get_attribute, get_parameter, set_attribute
from .checks import check_fold
from .errors import FoldError
from .fold_bases import (
    base_weight,
    check_few_bits,
    dequantized,
    put_few_bits,
    quantized_owner,
    requantized,
    with_whole_tensors,
)
from .fold_results import FoldedSite, FoldReport, warn_of_losses
from .fold_stamps import stamp_of
from .fold_sums import CheckedSum, check_has_values, write_sum
from .fold_tasks import FoldTask, check_not_tied, fold_tasks, replace_weights
from .graph import erase_low_rank_paths, finish
from .graph_module import ROLE, LoraGraphModule, checked_graph_module, copy_sharing_tensors, paused_gc, record_of
from .injection import Adapter
from .parameters import find_adapter
from .quantized import has_quantized
from .switching import forget_adapter


@dataclass
class InPlaceFold:
    """What `unfold` needs: the injected graph, and the base tensors as they were."""

    injected: LoraGraphModule
    originals: list[tuple[torch.Tensor, torch.Tensor]]


def fold(
    gm: fx.GraphModule,
    *,
    adapters: Sequence[str] | str | None = None,
    inplace: bool = False,
    reversible: bool = True,
    accumulate: torch.dtype | None = None,
    check: object = False,
    quantized: Literal["dequantize", "requantize"] | None = None,
) -> LoraGraphModule:
    """Merge the adapters into the weights and take every LoRA node out of the graph.

    The result's code, state_dict keys and requires_grad flags are those of the graph before `inject`,
    unless a tied weight has to be untied, which adds one parameter and warns. `fold_report(gm)` says,
    per site, how large the delta was and how much of it the weight's dtype keeps.

    Of a graph whose parameters are spread over processes (`fully_shard`), all of them call this, and each gets the
    folded graph with whole weights, which has to fit there. Where it does not, save_adapter, and fold what it wrote.

    Args:
        gm: an injected graph.
        adapters: names to fold, with the weights that `set_adapters` gave them; others stay injected. None folds those
            that count, and drops the others.
        inplace: write into the base weights, so that the model they came from is the merged model;
            `gm` itself becomes the folded graph, and `unfold` takes both back bit for bit.
        reversible: with inplace, keep copies of the overwritten weights, which `unfold` needs. False takes no
            memory but one temporary at most; that is what PEFT's merge does. All is checked before the first
            write, but an interrupt meanwhile leaves the model half merged.
        accumulate: torch.float32 or torch.float64; at least the weight's own dtype is used. With float64, 16-bit
            weights are the nearest to the exact sum, always. None is float32, and float64 for 16-bit weights where the
            device has it, rounded by way of float32: within 0.51 of a unit in the last place.
        check: compare the folded graph with the adapted one before anything is written, on the inputs that `trace`
            remembers (True), or on others; see `check_fold`. With inplace it takes the memory of the folded weights.
        quantized: what becomes of linears that store their weight in a few bits. "dequantize": all of them are linears
            with float weights then, and the delta is kept. "requantize": the sum is stored as the weight was, as PEFT's
            merge does; what that costs stands in the report, as `kept`, and is warned of.

    Raises:
        AdapterError: if an adapter is not there.
        FoldError: if there is nothing to fold, a weight would become NaN or Inf, `inplace` meets a tied weight, or
            an adapted weight is stored in a few bits, and `quantized` is not given.
    """
    _check_options(inplace=inplace, reversible=reversible, accumulate=accumulate, quantized=quantized)
    gm = checked_graph_module(gm)
    chosen = _chosen(gm, adapters)
    assert isinstance(gm, LoraGraphModule)
    gm = with_whole_tensors(gm, inplace=inplace)
    check_few_bits(gm, chosen, quantized, inplace=inplace)
    if quantized == "dequantize" and has_quantized(gm):
        gm = dequantized(gm)
    earlier = record_of(gm).report
    with paused_gc(), torch.inference_mode(False):  # weights that are made under it take no adapter any more
        tasks = fold_tasks(gm, read_applications(gm), chosen, record_of(gm).active)
        check_has_values(gm, tasks)
        stamps = tuple(stamp_of(gm, adapter) for adapter in chosen)
        if inplace:
            check_not_tied(gm, tasks)
        checked = _fold_anew(gm, tasks, chosen, accumulate) if check is not False else None
        if checked is not None:
            check_fold(gm, checked[0], None if check is True else check)
        way = _fold_anew if not inplace else _fold_in_place if reversible else _fold_for_good
        result, sites = checked if checked and not inplace else way(gm, tasks, chosen, accumulate)
        for name in [name for name in record_of(result).adapters if adapters is None]:
            forget_adapter(result, name)
    trained = tuple(dict.fromkeys(name for adapter in chosen for name in adapter.trained))
    stamps = (*(earlier.stamps if isinstance(earlier, FoldReport) else ()), *stamps)
    report = FoldReport(tuple(adapter.name for adapter in chosen), tuple(sites), trained, stamps)
    record_of(result).report = report
    warn_of_losses(report)
    return result


def _check_options(*, inplace: bool, reversible: bool, accumulate: torch.dtype | None, quantized: str | None) -> None:
    for name, value in (("inplace", inplace), ("reversible", reversible)):
        if not isinstance(value, bool):
            raise FoldError(f"{name}={value!r} must be True or False")
    if quantized not in (None, "dequantize", "requantize"):
        raise FoldError(f"quantized={quantized!r} must be 'dequantize', 'requantize' or None")
    if accumulate not in (None, torch.float32, torch.float64):
        raise FoldError(f"accumulate={accumulate!r} must be torch.float32 or torch.float64")
    if not (inplace or reversible):
        raise FoldError("reversible=False goes with inplace=True: without inplace, fold leaves `gm` as it was")


def _fold_anew(
    gm: LoraGraphModule, tasks: list[FoldTask], chosen: list[Adapter], accumulate: torch.dtype | None
) -> tuple[LoraGraphModule, list[FoldedSite]]:
    """A new graph module with new tensors for the folded weights; the others are shared."""
    plain, values, sites = [], [], []
    stored: dict[tuple[str, ...], nn.Module] = {}
    for task in tasks:
        module = quantized_owner(gm, task.attribute)
        weight = base_weight(gm, task.attribute)
        value = torch.empty_like(weight)
        site = write_sum(gm, task, weight, value, accumulate)
        if module is None:
            plain.append(task)
            values.append(value)
        else:
            again, site = requantized(module, value, site)
            if site.delta_norm:  # else the base keeps its bits
                stored[task.paths] = again
        sites.append(site)
    result = copy_sharing_tensors(gm)
    _detach_trained(result, chosen)
    _remove_adapters(result, chosen)
    for paths, again in stored.items():
        put_few_bits(result, paths, again)
    replace_weights(result, plain, values)
    finish(result)
    return result, sites


def _fold_in_place(
    gm: LoraGraphModule, tasks: list[FoldTask], chosen: list[Adapter], accumulate: torch.dtype | None
) -> tuple[LoraGraphModule, list[FoldedSite]]:
    """Write into the base's tensors, one at a time, and let `gm` become the folded graph."""
    folded = copy_sharing_tensors(gm)
    _remove_adapters(folded, chosen)
    _keep_base_tensors(folded, gm, chosen)
    finish(folded)
    sites: list[FoldedSite] = []
    originals: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for task in tasks:
            weight = get_parameter(gm, task.attribute).detach()
            original = _backed_up(weight, originals)
            sites.append(write_sum(gm, task, original, weight, accumulate))
        for adapter in chosen:
            for name in adapter.trained:
                weight = record_of(gm).originals[name]
                _backed_up(weight, originals)
                weight.copy_(get_attribute(gm, name).detach())
    except BaseException:
        _restore(originals)
        raise
    record_of(folded).folded = InPlaceFold(folded, originals)
    _exchange(gm, folded)
    return gm, sites


def _fold_for_good(
    gm: LoraGraphModule, tasks: list[FoldTask], chosen: list[Adapter], accumulate: torch.dtype | None
) -> tuple[LoraGraphModule, list[FoldedSite]]:
    """Write into the base's tensors and keep nothing: all is checked before the first write."""
    sums = [CheckedSum.of(gm, task, accumulate) for task in tasks]
    originals = dict(record_of(gm).originals)
    trained = [(originals[n], get_attribute(gm, n).detach()) for a in chosen for n in a.trained]
    _keep_base_tensors(gm, gm, chosen)
    _remove_adapters(gm, chosen)
    finish(gm)
    for base, value in trained:
        base.copy_(value)
    # Where the graph had a weight of its own, the result goes into the base's.
    return gm, [each.write(originals.get(each.task.attribute, each.weight)) for each in sums]


def _backed_up(tensor: torch.Tensor, originals: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    original = tensor.clone()
    originals.append((tensor, original))
    return original


def _restore(originals: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for tensor, original in originals:
            tensor.copy_(original)


def unfold(gm: fx.GraphModule) -> LoraGraphModule:
    """Take an in-place fold back: the base weights are what they were, bit for bit, and the adapters are there.

    Raises:
        FoldError: if `gm` was not folded with inplace=True.
    """
    gm = checked_graph_module(gm)
    state = record_of(gm).folded
    if state is None or not isinstance(gm, LoraGraphModule):
        raise FoldError(
            "there is no fold to take back here: fold(gm, inplace=True) keeps copies for it; with reversible=False it "
            "keeps none, so load the base again. Without inplace, fold leaves the injected graph as it was: keep that"
        )
    _restore(state.originals)
    injected, training = state.injected, gm.training
    _exchange(gm, injected)
    return gm if gm.training == training else gm.train(training)


def fold_report(gm: fx.GraphModule) -> FoldReport:
    """What the last `fold` did to make `gm`.

    Raises:
        FoldError: if `gm` does not come from `fold`.
    """
    report = record_of(checked_graph_module(gm)).report
    if not isinstance(report, FoldReport):
        raise FoldError("this graph does not come from fold(gm), so there is no report")
    return report


def _chosen(gm: fx.GraphModule, names: Sequence[str] | str | None) -> list[Adapter]:
    record = record_of(gm)
    if record.folded is not None:
        raise FoldError("this graph is folded already; lora_fx.unfold(gm) takes that back")
    if record.batched is not None:
        raise FoldError(
            "this graph comes from batch_adapters, and its rows have different weights; fold one adapter of the graph "
            "that lora_fx.unbatch_adapters(gm) gives"
        )
    if not record.adapters:
        raise FoldError("there is nothing to fold: the graph has no adapter. inject(gm, config) adds one")
    if names is None:
        if not record.active:
            raise FoldError("no adapter counts at the moment; set_adapters(gm, ...) chooses those to fold")
        return [record.adapters[name] for name in record.active]
    wanted = [names] if isinstance(names, str) else names
    if not isinstance(wanted, (list, tuple, set, frozenset)):
        raise FoldError(f"adapters={names!r} must be a list of adapter names, one name, or None")
    if not wanted:
        raise FoldError("adapters=[] names nothing to fold; leave it out to fold all")
    chosen = {adapter.name: adapter for adapter in (find_adapter(gm, name) for name in wanted)}
    for name in chosen:
        if name not in record.active:
            raise FoldError(
                f"adapter {name!r} does not count at the moment, so it has no weight to be folded with; let it count "
                f"first: set_adapters(gm, {{{name!r}: 1.0}})"
            )
    if record.wide and record.active.keys() - chosen.keys():
        raise FoldError(
            "this tree is made to compute in another dtype than its parameters have, and all its adapters are folded "
            "at once; leave `adapters` out, or fold the graph that it was made from"
        )
    return list(chosen.values())


def _keep_base_tensors(result: LoraGraphModule, gm: LoraGraphModule, chosen: list[Adapter]) -> None:
    """Folded in place, what was trained in full stands in the base's own tensors."""
    originals = record_of(gm).originals
    for adapter in chosen:
        for name in adapter.trained:
            old = get_attribute(result, name)
            base = originals[name]
            value = nn.Parameter(base, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else base
            set_attribute(result, name, value)


def _detach_trained(gm: LoraGraphModule, chosen: list[Adapter]) -> None:
    """Give the folded graph its own copies of what the adapters train in full, which may go on being trained."""
    copies: dict[int, torch.Tensor] = {}
    for name in (name for adapter in chosen for name in adapter.trained):
        value = get_attribute(gm, name)
        if id(value) not in copies:
            copy = value.detach().clone()
            copies[id(value)] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
        set_attribute(gm, name, copies[id(value)])


def _remove_adapters(gm: LoraGraphModule, chosen: list[Adapter]) -> None:
    record = record_of(gm)
    erase_low_rank_paths(gm, {adapter.name for adapter in chosen})
    for adapter in chosen:
        for attribute in (attribute for member in adapter.members for attribute in member.attributes):
            delete_attribute(gm, attribute)
        for name in adapter.trained:
            record.originals.pop(name, None)
            if isinstance(value := get_attribute(gm, name), nn.Parameter):
                value.requires_grad_(False)  # part of the frozen base now
        del record.adapters[adapter.name]
        record.active.pop(adapter.name, None)
    record.selections.clear()
    if not record.active:
        _show_traced(gm)
    if not record.adapters:
        flags = record.requires_grad
        for name, parameter in gm.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def _show_traced(gm: LoraGraphModule) -> None:
    """A tree of blocks becomes the graph that was traced, in the dtype that it was traced in."""
    record = record_of(gm)
    if record.lowering is not None and not record.lowering.trains_only:
        record.lowering = None
    if record.wide:
        gm.show_wide()
        roles = {
            node.meta[ROLE].adapter for graph in record.views.values() for node in graph.nodes if ROLE in node.meta
        }
        erase_low_rank_paths(gm, roles)


def _exchange(a: LoraGraphModule, b: LoraGraphModule) -> None:
    """Let two graph modules change places, so that the object the caller holds is the other graph."""
    a_forward, b_forward = type(a).forward, type(b).forward
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    type(a).forward, type(b).forward = b_forward, a_forward
    for gm in (a, b):
        for graph in record_of(gm).views.values():
            graph.owning_module = gm

"""Folding an adapter into a transformers model: the folded values move into the model, ties are undone where needed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import check_effect, fold_bound, output_error
from .errors import FoldError
from .fold_results import FoldReport
from .folding import fold, fold_report
from .graph_module import LoraGraphModule, record_of
from .hf_models import HfModel

Place = tuple[int, int]


@dataclass(frozen=True)
class HfFold:
    """What folding into a model did.

    Attributes:
        report: the fold's, site by site.
        trained: tensors that the adapter trained in full, and that are other than the base's.
        untied: names that shared a tensor and no longer do.
        expected: the adapted model's outputs on the example inputs.
        error: of the folded model against them, as `output_error` tells.
        bound: what `error` may be.
    """

    report: FoldReport
    trained: tuple[str, ...]
    untied: tuple[str, ...]
    expected: Any
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the folded model computes what the adapted one does; NaN, which means nothing to compare, is no."""
        return self.error <= self.bound

    @property
    def problem(self) -> str:
        """What is wrong where it is not ok."""
        if math.isnan(self.error):
            return "the adapted model's outputs hold nothing but NaN and Inf, so the fold cannot be checked"
        if math.isinf(self.error):
            return "the folded model's outputs hold NaN, Inf or masked values elsewhere than the adapted one's"
        return f"the folded model differs from the adapted one by {self.error:.3g}, allowed {self.bound:.3g}"


def fold_into(loaded: HfModel, injected: LoraGraphModule) -> HfFold:
    """Fold all adapters of `injected`, the graph of `loaded`, and give the model the folded tensors.

    The graph keeps the base's tensors. If a tied weight had to be untied, nothing in the model is tied any more,
    and its config says so: that is how transformers loads such a model.

    Raises:
        TargetError: if the adapter has no effect.
        FoldError: if folding fails, or the model has no place for an untied weight.
    """
    check_effect(injected)
    with torch.no_grad():
        expected = injected(**loaded.inputs)
        trained = _changed_in_full(injected)
        folded = fold(injected)
        _check_places(injected, folded)
        untied = _take_over(loaded.model, folded)
        if untied:
            _untie_all(loaded.model)
        error = output_error(expected, loaded.model(**loaded.inputs))
    return HfFold(fold_report(folded), trained, untied, expected, error, fold_bound(loaded.model))


def _changed_in_full(injected: LoraGraphModule) -> tuple[str, ...]:
    record = record_of(injected)
    names = dict.fromkeys(name for adapter in record.adapters.values() for name in adapter.trained)
    values = dict(_named_tensors(injected))
    return tuple(name for name in names if not torch.equal(record.originals[name], values[name]))


def _check_places(injected: LoraGraphModule, folded: LoraGraphModule) -> None:
    known = injected.state_dict()
    added = [name for name in folded.state_dict() if name not in known]
    if added:
        raise FoldError(
            f"folding unties a weight that the model reads twice under one name, and its class has no place for "
            f"{added[0]!r}; fold the graph in Python, lora_fx.fold(gm), or export it"
        )


def _take_over(model: nn.Module, folded: LoraGraphModule) -> tuple[str, ...]:
    """Put the folded graph's tensors into the model, tied where they still are. Returns the names untied."""
    groups: dict[Place, list[str]] = defaultdict(list)
    for name, tensor in _named_tensors(model):
        groups[_place(tensor)].append(name)
    values, untied = dict(_named_tensors(folded)), list[str]()
    for place, names in groups.items():
        found = {name: values[name] for name in names if name in values}
        places = {_place(value) for value in found.values()}
        if len(places) > 1:
            untied += names
        # A name that the graph does not know stays tied to the others, unless they part.
        only = next(iter(found.values())) if len(places) == 1 else None
        for name in names:
            value = found.get(name, only)
            if value is not None and _place(value) != place:
                _set(model, name, value)
    return tuple(untied)


def _untie_all(model: nn.Module) -> None:
    """A tensor of its own for each name, which is what transformers loads where the config ties nothing."""
    seen: set[Place] = set()
    for name, tensor in _named_tensors(model):
        if _place(tensor) in seen:
            copy = tensor.detach().clone()
            _set(model, name, nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy)
        seen.add(_place(tensor))
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _named_tensors(model: nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _place(tensor: torch.Tensor) -> Place:
    return tensor.data_ptr(), tensor.numel()


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, value)

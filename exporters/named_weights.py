"""The weights of an ONNX file by the names that an adapter has for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_fx import AdapterArrays, AdapterError, LowRankArrays
from lora_fx.adapter_places import AdapterPlaces, find_renaming, joined
from lora_fx.errors import closest

from .base_check import check_base_note
from .onnx_sites import Mapped, OnnxSite, find_onnx_sites, parameter_names, permutation, recorded_weights
from .onnx_weights import Array, StoredWeight
from .stored_weights import shape_of
from .text import some


class OnnxWeights(AdapterPlaces):
    """The weights of an ONNX file, by the names that an adapter has for them.

    Raises:
        AdapterError: if the adapter was saved over other weights.
    """

    _HELP = "mapping={initializer: module} tells what is what, or fold in the graph, and export that"

    def __init__(
        self, model: ir.Model, adapter: AdapterArrays, mapping: Mapped | None = None, *, partial: bool = False
    ) -> None:
        super().__init__(adapter)
        self.model = model
        self.partial = partial
        self.left_out: list[str] = []
        self.sites = find_onnx_sites(model, mapping)
        self.recorded: Mapping[str, StoredWeight] = recorded_weights(model)
        self._parameters: dict[str, list[Held]] = {}
        for name, value in model.graph.initializers.items():
            for parameter in parameter_names(value, self.recorded.get(name)):
                held = Held(value, permutation(value, self.recorded.get(name)))
                self._parameters.setdefault(parameter, []).append(held)
        known = {*self.module_names, *(name.rpartition(".")[0] for name in self.parameter_names)}
        self.rename = find_renaming([low.path for low in adapter.low_rank], known)
        check_base_note(self)

    def only_whole(self) -> OnnxWeights:
        """Without A and B: what the adapter brings as a whole."""
        other = copy.copy(self)
        other.adapter = replace(self.adapter, low_rank=())
        return other

    @property
    def module_names(self) -> list[str]:
        """All names that A and B could mean."""
        packed = (name for site in self.sites for names in site.packs for name in names)
        return list(dict.fromkeys([*(name for site in self.sites for name in site.modules), *packed]))

    @property
    def parameter_names(self) -> list[str]:
        """Full names of all weights, as the file has them."""
        return list(self._parameters)

    def places(self, low: LowRankArrays) -> list[tuple[OnnxSite, int | None]]:
        """(site, which of its packed modules) that the module's name means."""
        path = self.rename(low.path)
        fits = [site for site in self.sites if (site.form.kind == "lookup") == low.is_lookup]
        whole: list[tuple[OnnxSite, int | None]] = [(site, None) for site in fits if path in site.modules]
        return whole or [(site, i) for site in fits for i, names in enumerate(site.packs) if path in names]

    def held(self, parameter: str) -> list[Held]:
        """The initializers that hold a parameter, by its full name in the adapter."""
        return self._parameters.get(self.rename(parameter), [])

    def check_place(self, name: str, low: LowRankArrays | None = None) -> bool:
        """Whether to go on without a place for something in the adapter, of which the file may be one part of several.

        Raises:
            AdapterError: if it may not.
        """
        if not self.partial:
            raise AdapterError(no_place(self, name) if low is None else no_place(self, low.path, low))
        self.left_out.append(name)
        return False

    def shape_of_parameter(self, parameter: str) -> tuple[int, ...] | None:
        """The shape that a parameter has in the model, by its full name in the adapter; None if it is not there."""
        found = self.held(parameter)
        return found[0].own_shape if found else None

    def has_module(self, low: LowRankArrays) -> bool:
        """Whether the file applies the weight of the module that A and B are named after."""
        return bool(self.places(low))

    def slot_name(self, low: LowRankArrays) -> str:
        """What the file calls that which A and B are for."""
        return self.rename(self.parameter_of(low) or low.path)

    def weight_of(self, low: LowRankArrays) -> str | None:
        """Full name, in the adapter, of what A and B are for; None if the file does not tell which of several."""
        try:
            return self.parameter_of(low) or joined(low.path, "weight")
        except AdapterError:
            return None


@dataclass(frozen=True, eq=False)
class Held:
    """An initializer that holds a parameter of the model; `perm` as in `StoredWeight`."""

    value: ir.Value
    perm: tuple[int, ...] | None

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The parameter's shape in the model."""
        stored = shape_of(self.value)
        return stored if self.perm is None else tuple(stored[self.perm.index(axis)] for axis in range(len(stored)))

    def lying(self, own: Array) -> Array:
        """An array of the parameter's shape as the initializer has it."""
        return own if self.perm is None else own.transpose(self.perm)


def no_place(weights: OnnxWeights, path: str, low: LowRankArrays | None = None) -> str:
    """Why the file has no weight for what an adapter names."""
    name = joined(path, "weight") if low is not None else path
    in_parts = {fqn for each in weights.recorded.values() for fqn in each.fqn.split(", ")}
    name = path if path in in_parts else name
    computed = [
        each.name
        for each in weights.recorded.values()
        if each.layout == "computed" and {name, path} & set(each.fqn.split(", "))
    ]
    if computed:
        return (
            f"the file holds {name!r} only in what was computed from it when it was exported ({some(computed)}); fold "
            "in the graph, and export the result: lora_fx.fold"
        )
    names = weights.module_names if low is not None else weights.parameter_names
    why = "" if names else " The file's weights have lost their names;"
    why += lost_names(weights) if low is None and names else ""
    return (
        f"the file has no weight for the adapter's {path!r}.{closest(weights.rename(path), names)}{why} "
        "mapping={initializer: module} tells what is what, and partial=True takes a file that is one part of the model "
        "(an encoder, say). Is this adapter of this model?"
    )


def lost_names(weights: OnnxWeights) -> str:
    """Why a foreign file may not have a weight's name."""
    if weights.recorded:
        return ""
    return (
        " (torch's exporters write equal and tied weights, zero biases and unit norms among them, once and under one "
        "name; export_onnx keeps them apart.)"
    )

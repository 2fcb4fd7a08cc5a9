"""The weights of an ONNX file by the names that an adapter has for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_fx import AdapterArrays, AdapterError, LowRankArrays
from lora_fx.config import ALL_LINEAR
from lora_fx.errors import closest
from lora_fx.matching import matches_names

from .base_check import check_base_note
from .onnx_sites import Mapped, OnnxSite, find_onnx_sites, parameter_names, permutation, recorded_weights
from .onnx_weights import Array, StoredWeight
from .stored_weights import shape_of
from .text import some


@dataclass(frozen=True)
class Renaming:
    """What the file's names begin with and the adapter's do not, or the other way round."""

    added: str = ""
    cut: str = ""

    def __call__(self, name: str) -> str:
        """The file's name for the adapter's."""
        return self.added + name.removeprefix(self.cut)

    @property
    def note(self) -> str | None:
        """What to say about it."""
        if self.cut:
            return f"names of the adapter begin with {self.cut!r}, which the file's have not"
        return f"names in the file begin with {self.added!r}, which the adapter's have not" if self.added else None


class OnnxWeights:
    """The weights of an ONNX file, by the names that an adapter has for them.

    Raises:
        AdapterError: if the adapter was saved over other weights.
    """

    def __init__(
        self, model: ir.Model, adapter: AdapterArrays, mapping: Mapped | None = None, *, partial: bool = False
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.partial = partial
        self.left_out: list[str] = []
        self.sites = find_onnx_sites(model, mapping)
        self.recorded: Mapping[str, StoredWeight] = recorded_weights(model)
        self._parameters: dict[str, list[Held]] = {}
        for name, value in model.graph.initializers.items():
            for parameter in parameter_names(value, self.recorded.get(name)):
                held = Held(value, permutation(value, self.recorded.get(name)))
                self._parameters.setdefault(parameter, []).append(held)
        self.rename = _renaming(self, [low.path for low in adapter.low_rank])
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

    def attention_of(self, path: str) -> str | None:
        """The nn.MultiheadAttention whose output projection this is: PEFT's patterns name it by that."""
        attention = path.removesuffix("out_proj").removesuffix(".")
        if attention == path:
            return None
        is_adapted = any(low.path == attention for low in self.adapter.low_rank)  # a file may have lost the names
        return attention if is_adapted or self.held(joined(attention, "in_proj_weight")) else None

    def pattern_names(self, path: str) -> tuple[str, ...]:
        """What the keys of rank_pattern and alpha_pattern are matched with."""
        attention = self.attention_of(path)
        return (path,) if attention is None else (path, attention)

    def names_at_slot(self, low: LowRankArrays) -> tuple[str, ...]:
        """What the keys of the patterns are matched with, for modules and for parameters."""
        parameter = self.parameter_of(low)
        if parameter is None:
            return self.pattern_names(low.path)
        return (parameter,) if self.adapter.config.target_parameters else (low.path,)

    def scaling_at_slot(self, low: LowRankArrays) -> float:
        """What multiplies B @ A, for modules and for parameters."""
        return self.adapter.scaling_at(*self.names_at_slot(low)) * self._times_counted(low)

    def _times_counted(self, low: LowRankArrays) -> int:
        """2 for the output projection of an attention that PEFT adapts whole: it applies that twice (peft#3774)."""
        attention = self.attention_of(low.path)
        doubled = attention is not None and any(other.path == attention for other in self.adapter.low_rank)
        return 2 if doubled else 1

    def slot_name(self, low: LowRankArrays) -> str:
        """What the file calls that which A and B are for."""
        return self.rename(self.parameter_of(low) or low.path)

    def weight_of(self, low: LowRankArrays) -> str | None:
        """Full name, in the adapter, of what A and B are for; None if the file does not tell which of several."""
        try:
            return self.parameter_of(low) or joined(low.path, "weight")
        except AdapterError:
            return None

    def parameter_of(self, low: LowRankArrays) -> str | None:
        """The parameter that A and B are for, if it is not the module's weight that is meant.

        Raises:
            AdapterError: if it may be one of several.
        """
        named = self.adapter.config.target_parameters
        if not named:
            packed = joined(low.path, "in_proj_weight")
            if self.held(packed):
                return packed
            itself = self.held(low.path)  # the adapter names the parameter
            is_matrix = bool(itself) and len(itself[0].own_shape) == 2
            return low.path if itself and not (is_matrix and self.places(low)) else None
        endings = dict.fromkeys(entry.rpartition(".")[2] for entry in named)
        own = [joined(low.path, ending) for ending in endings]
        meant = [name for name in own if any(f".{name}".endswith(f".{entry}") for entry in named)]
        own = [name for name in meant if self.held(name)]
        if meant and not own and not self._is_targeted(low.path):
            raise AdapterError(
                f"target_parameters means {some(meant)}, whose name the file has lost; mapping={{initializer: module}} "
                "tells what is what, or fold in the graph, and export that"
            )
        fitting = [name for name in own if self._may_be(low, name)]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        raise AdapterError(
            f"A and B of {low.path!r} may be of {some(fitting)}, and the files do not tell which; fold with the model: "
            "lora_fx.load_adapter"
        )

    def _is_targeted(self, path: str) -> bool:
        """Whether the adapter may mean the module as well as its parameter."""
        targets = self.adapter.config.target_modules or ()
        return targets == ALL_LINEAR or matches_names(path, targets)

    def _may_be(self, low: LowRankArrays, name: str) -> bool:
        shape, r = self.held(name)[0].own_shape, self.adapter.rank_at(name)
        if len(shape) == 2:
            return (len(low.b), low.a.shape[1]) == shape and len(low.a) == r
        return len(shape) == 3 and len(low.a) == r * shape[0] and {len(low.b), low.a.shape[1]} == set(shape[1:])


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


def joined(path: str, name: str) -> str:
    """The full name of a module's own tensor."""
    return f"{path}.{name}" if path else name


def _renaming(weights: OnnxWeights, paths: list[str]) -> Renaming:
    """How names differ, if none is found as it is and exactly one difference in the beginning explains all of them."""
    known = {*weights.module_names, *(name.rpartition(".")[0] for name in weights.parameter_names)}
    if not paths or any(path in known for path in paths):
        return Renaming()
    first = paths[0]
    found = [Renaming(added=name[: -len(first)]) for name in known if name.endswith(f".{first}")]
    found += [Renaming(cut=first[: -len(name)]) for name in known if name and first.endswith(f".{name}")]
    fitting = [each for each in found if all(path.startswith(each.cut) and each(path) in known for path in paths)]
    return fitting[0] if len(fitting) == 1 else Renaming()


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

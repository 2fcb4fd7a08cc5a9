"""Which initializers of an ONNX file an adapter changes, and to what; all is decided before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_fx import AdapterArrays, AdapterError, ExportError, LowRankArrays
from lora_fx.errors import closest

from .onnx_deltas import experts_delta, gain, low_rank_delta
from .onnx_sites import Form, Mapped, OnnxSite, find_onnx_sites, parameter_names, permutation
from .onnx_weights import MANIFEST_KEY, Array, StoredWeight, read_manifest
from .text import some

# The new value of a weight, float32 and in the initializer's shape, from its old one.
Edit = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class WeightChange:
    """What becomes of one initializer.

    Attributes:
        weight: the initializer.
        paths: the names of what the adapter has for it.
        edits: what gives its new value, one after the other.
        sites: the places that get the new value; empty for all.
        others_read: whether something else in the graph reads the initializer, and keeps the old value.
    """

    weight: ir.Value
    paths: tuple[str, ...]
    edits: tuple[Edit, ...]
    sites: tuple[OnnxSite, ...] = ()
    others_read: bool = False


@dataclass(frozen=True, eq=False)
class Matched:
    """A and B, and one place in the file that they are for.

    Attributes:
        low: A and B.
        site: the place.
        piece: which of the site's packed modules; None if the weight is one module's.
        scaling: what multiplies B @ A.
    """

    low: LowRankArrays
    site: OnnxSite
    piece: int | None
    scaling: float


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
    """The weights of an ONNX file, by the names that an adapter has for them."""

    def __init__(self, model: ir.Model, adapter: AdapterArrays, mapping: Mapped | None = None) -> None:
        self.model = model
        self.adapter = adapter
        self.sites = find_onnx_sites(model, mapping)
        self.recorded: Mapping[str, StoredWeight] = (
            read_manifest(model.metadata_props) if MANIFEST_KEY in model.metadata_props else {}
        )
        self._parameters: dict[str, list[Held]] = {}
        for name, value in model.graph.initializers.items():
            for parameter in parameter_names(value, self.recorded.get(name)):
                held = Held(value, permutation(value, self.recorded.get(name)))
                self._parameters.setdefault(parameter, []).append(held)
        self.rename = _renaming(self, [low.path for low in adapter.low_rank])

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

    def attention_of(self, path: str) -> str | None:
        """The nn.MultiheadAttention whose output projection this is: PEFT's patterns name it by that."""
        attention = path.removesuffix("out_proj").removesuffix(".")
        return attention if attention != path and self.held(_joined(attention, "in_proj_weight")) else None

    def pattern_names(self, path: str) -> tuple[str, ...]:
        """What the keys of rank_pattern and alpha_pattern are matched with."""
        attention = self.attention_of(path)
        return (path,) if attention is None else (path, attention)

    def scaling_of(self, low: LowRankArrays) -> float:
        """What multiplies B @ A of a module."""
        return self.adapter.scaling_at(*self.pattern_names(low.path)) * self._times_counted(low)

    def _times_counted(self, low: LowRankArrays) -> int:
        """2 for the output projection of an attention that PEFT adapts whole: it applies that twice (peft#3774)."""
        attention = self.attention_of(low.path)
        doubled = attention is not None and any(other.path == attention for other in self.adapter.low_rank)
        return 2 if doubled else 1

    def parameter_of(self, low: LowRankArrays) -> str | None:
        """The parameter that A and B are for, if it is not the module's weight that is meant.

        Raises:
            AdapterError: if it may be one of several.
        """
        named = self.adapter.config.target_parameters
        if not named:
            packed = _joined(low.path, "in_proj_weight")
            return packed if self.held(packed) else None
        endings = dict.fromkeys(entry.rpartition(".")[2] for entry in named)
        own = [_joined(low.path, ending) for ending in endings]
        own = [name for name in own if self.held(name) and any(f".{name}".endswith(f".{entry}") for entry in named)]
        fitting = [name for name in own if self._may_be(low, name)]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        raise AdapterError(
            f"A and B of {low.path!r} may be of {some(fitting)}, and the files do not tell which; fold with the model: "
            "lora_fx.load_adapter"
        )

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
        assert self.value.const_value is not None
        stored = tuple(self.value.const_value.shape.numpy())
        return stored if self.perm is None else tuple(stored[self.perm.index(axis)] for axis in range(len(stored)))

    def lying(self, own: Array) -> Array:
        """An array of the parameter's shape as the initializer has it."""
        return own if self.perm is None else own.transpose(self.perm)


def _joined(path: str, name: str) -> str:
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


def match_adapter(weights: OnnxWeights) -> list[Matched]:
    """Every A and B of a module with the places that they are for.

    Raises:
        AdapterError: if there is none for one of them.
    """
    adapter, matched = weights.adapter, []
    for low in adapter.low_rank:
        if weights.parameter_of(low) is not None:
            continue
        places = weights.places(low)
        if not places:
            raise AdapterError(_no_place(weights, low))
        names = weights.pattern_names(low.path)
        if len(low.a) != adapter.rank_at(*names):
            raise AdapterError(
                f"A of {low.path!r} has {len(low.a)} ranks, and by adapter_config.json it is "
                f"{adapter.rank_at(*names)} (r and rank_pattern); the two files do not belong together"
            )
        matched += [Matched(low, site, piece, weights.scaling_of(low)) for site, piece in places]
    return matched


def plan_changes(weights: OnnxWeights, strength: float = 1.0) -> list[WeightChange]:
    """What folding `strength` times the adapter changes.

    Raises:
        AdapterError: if the file has no place for something in the adapter, or shapes do not fit.
        ExportError: if a weight cannot be changed, since the file has it only in a computed form.
    """
    adapter, matched = weights.adapter, match_adapter(weights)
    changes: dict[int, WeightChange] = {}
    for each in matched:
        rows = None if each.piece is None else piece_of(each, matched)
        _add(changes, WeightChange(each.site.weight, (each.low.path,), (_edit(each, rows, strength),), (each.site,)))
        if each.low.bias is not None:
            bias = each.low.bias * np.float32(each.scaling * strength)
            _add(changes, WeightChange(bias_of(each.site), (each.low.path,), (_added(bias, rows),)))
    for low in adapter.low_rank:
        parameter = weights.parameter_of(low)
        for change in () if parameter is None else _parameter_changes(weights, low, parameter, strength):
            _add(changes, change)
    for path, values in adapter.rows.items():
        for change in _row_changes(weights, path, values, strength):
            _add(changes, change)
    for name, full in adapter.full.items():
        for change in _full_changes(weights, name, full, strength):
            _add(changes, change)
    if not changes:
        raise AdapterError(f"{str(adapter.directory)!r} changes nothing in this file")
    return [_with_readers(change) for change in changes.values()]


def _add(changes: dict[int, WeightChange], new: WeightChange) -> None:
    old = changes.setdefault(id(new.weight), new)
    if old is new:
        return
    is_known = set(new.paths) <= set(old.paths)  # the same module, called once more
    changes[id(new.weight)] = replace(
        old,
        paths=old.paths if is_known else old.paths + new.paths,
        edits=old.edits if is_known else old.edits + new.edits,
        sites=old.sites + new.sites,
    )


def _with_readers(change: WeightChange) -> WeightChange:
    """Tell whether anything reads the initializer that is not adapted."""
    if not change.sites:
        return change
    adapted = {id(site.carrier) for site in change.sites}
    others = [node for node, _ in change.weight.uses() if id(node) not in adapted and not is_about_shape(node)]
    return replace(change, others_read=bool(others))


def is_about_shape(node: ir.Node) -> bool:
    """Whether a node takes of its input no values."""
    return node.op_type in ("Shape", "Size")


def _edit(matched: Matched, rows: slice | None, strength: float) -> Edit:
    """W + strength · (what the adapter adds to W), at the outputs `rows`."""

    def edit(weight: Array) -> Array:
        whole = _seen(weight, matched.site, rows)
        low, form, scaling = matched.low, matched.site.form, matched.scaling
        delta = low_rank_delta(low, form, whole.shape) * np.float32(scaling)
        if low.magnitude is not None:
            adapted = whole + delta
            delta = gain(low, adapted, form) * adapted - whole
        result: Array = whole + delta * np.float32(strength)
        if rows is None:
            return result
        weight = weight.copy()
        _seen(weight, matched.site, rows)[...] = result
        return weight

    return edit


def _seen(weight: Array, site: OnnxSite, rows: slice | None) -> Array:
    """The part of a weight that is one packed module's."""
    if rows is None:
        return weight
    return weight[..., rows] if site.form.stored_in_out else weight[rows]


def piece_of(matched: Matched, all_matched: Iterable[Matched]) -> slice:
    """The outputs of a packed weight that one of its modules has: q, then k and v, which are of one size.

    Raises:
        AdapterError: if the sizes of the adapter's B do not add up to the weight's.
    """
    site, count = matched.site, len(matched.site.packs)
    total = outputs_of(site)
    sizes: dict[int, int] = {
        each.piece: len(each.low.b) for each in all_matched if each.site is site and each.piece is not None
    }
    if count == 3:
        pair = sizes.get(1, sizes.get(2, (total - sizes.get(0, 0)) // 2))
        sizes = {0: total - 2 * pair, 1: pair, 2: pair} | sizes
    every = [sizes.get(i, 0) for i in range(count)]
    if sum(every) != total or min(every) < 1:
        raise AdapterError(
            f"{site.weight.name!r} packs {count} modules with {total} outputs together, which B of "
            f"{matched.low.path!r} with {len(matched.low.b)} and its neighbours do not add up to; is this adapter of "
            "this model?"
        )
    start = sum(every[: matched.piece])
    return slice(start, start + every[matched.piece or 0])


def outputs_of(site: OnnxSite) -> int:
    """How many outputs a matrix has."""
    assert site.weight.const_value is not None
    shape = site.weight.const_value.shape.numpy()
    return int(shape[-1] if site.form.stored_in_out else shape[0])


def _added(bias: Array, rows: slice | None) -> Edit:
    def edit(old: Array) -> Array:
        new = old.copy()
        part = new.reshape(-1)[rows or slice(None)]
        if part.size != bias.size:
            raise AdapterError(f"lora_B.bias has {bias.size} values, and the file's bias {part.size}")
        part += bias.reshape(-1)
        return new

    return edit


def bias_of(site: OnnxSite) -> ir.Value:
    """The initializer that is added to what the op gives.

    Raises:
        ExportError: if there is none.
    """
    node = site.node
    if node.op_type in ("Gemm", "Conv", "ConvTranspose", "Attention") and len(node.inputs) > 2:
        found = node.inputs[2]
        if found is not None and found.is_initializer():
            return found
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        for value in users[0].inputs:
            if value is not None and value.is_initializer() and len(value.shape or ()) == 1:
                return value
    raise ExportError(
        f"the adapter has a lora_bias for {site.name!r}, and the file has no bias there to fold it into; train without "
        "lora_bias, or give the base module a bias before it is exported"
    )


def _parameter_changes(weights: OnnxWeights, low: LowRankArrays, name: str, strength: float) -> Iterator[WeightChange]:
    """Of target_parameters, and of the packed projection of nn.MultiheadAttention."""
    adapter = weights.adapter
    names = (name,) if adapter.config.target_parameters else (low.path,)
    scaling, r = np.float32(adapter.scaling_at(*names) * strength), adapter.rank_at(*names)
    if low.magnitude is not None or low.bias is not None:
        raise AdapterError(f"{name!r} is a parameter of its own, for which use_dora and lora_bias are not defined")
    for held in weights.held(name):
        shape = held.own_shape
        if len(shape) == 3:
            delta = experts_delta(low, r, shape, stored_in_out=_is_in_out(weights, held, low))
        else:
            delta = low_rank_delta(low, Form("matrix"), shape)
        yield WeightChange(held.value, (name,), (_plus(held.lying(delta) * scaling),))


def _is_in_out(weights: OnnxWeights, held: Held, low: LowRankArrays) -> bool:
    """Whether experts are stored (experts, in, out); where both are of one size, the op that applies them tells."""
    shape = held.own_shape
    if shape[1] != shape[2]:
        return bool(shape[1] == low.a.shape[1])
    lies_so = any(site.form.stored_in_out for site in weights.sites if site.weight is held.value)
    return lies_so == (held.perm is None)


def _plus(delta: Array) -> Edit:
    return lambda old: old + delta


def _row_changes(weights: OnnxWeights, path: str, values: Array, strength: float) -> Iterator[WeightChange]:
    wanted = weights.adapter.config.trainable_token_indices
    named = wanted.items() if isinstance(wanted, Mapping) else [(path, wanted)]
    rows = next((list(rows) for name, rows in named if rows and f".{path}".endswith(f".{name}")), None)
    found = weights.held(_joined(path, "weight"))
    if rows is None or not found or len(rows) != len(values):
        raise AdapterError(
            f"the file has no embedding {path!r} for {len(values)} trained rows (trainable_token_indices)."
            f"{closest(_joined(path, 'weight'), weights.parameter_names)} Is this adapter of this model?"
        )
    for held in found:
        vocabulary, width = held.own_shape
        if max(rows) >= vocabulary or values.shape[1] != width:
            raise AdapterError(
                f"rows up to {max(rows)}, {values.shape[1]} wide, do not fit {path!r}, which is {vocabulary} × {width}"
            )
        yield WeightChange(held.value, (path,), (_with_rows(held, rows, values, strength),))


def _with_rows(held: Held, rows: list[int], values: Array, strength: float) -> Edit:
    def edit(old: Array) -> Array:
        new = old.copy()
        own = new if held.perm is None else new.transpose(np.argsort(held.perm))
        own[rows] += (values - own[rows]) * np.float32(strength)
        return new

    return edit


def _full_changes(weights: OnnxWeights, name: str, full: Array, strength: float) -> Iterator[WeightChange]:
    """Of modules_to_save, and of biases."""
    found = weights.held(name)
    if not found:
        if _is_the_bases_own(weights, name, full):
            return
        raise AdapterError(
            f"the adapter has all of {name!r}, which the file does not hold under that name, or only in a computed "
            f"form.{closest(name, weights.parameter_names)} Fold in the graph, and export the result: lora_fx.fold"
        )
    for held in found:
        if held.own_shape != full.shape:
            raise AdapterError(
                f"the adapter's {name!r} has the shape {list(full.shape)}, and the file's {list(held.own_shape)}; is "
                "this adapter of this model?"
            )
        yield WeightChange(held.value, (name,), (_towards(held.lying(full), strength),))


def _is_the_bases_own(weights: OnnxWeights, name: str, full: Array) -> bool:
    """Whether it is what PEFT saves beside adapted embeddings: the base's table, as it is."""
    for site in weights.sites:
        if weights.rename(name.removesuffix(".weight")) in site.modules and site.weight.const_value is not None:
            stored = site.weight.const_value.numpy()
            return any(np.array_equal(stored, each) for each in (full, full.T))
    return False


def _towards(full: Array, strength: float) -> Edit:
    return lambda old: full if strength == 1 else old + (full - old) * np.float32(strength)


def _no_place(weights: OnnxWeights, low: LowRankArrays) -> str:
    name = f"{low.path}.weight".lstrip(".")
    computed = [r.name for r in weights.recorded.values() if r.layout == "computed" and name in r.fqn.split(", ")]
    if computed:
        return (
            f"the file holds {name!r} only in what was computed from it when it was exported ({some(computed)}); fold "
            "in the graph, and export the result: lora_fx.fold"
        )
    names = weights.module_names
    why = "" if names else " The file's weights have lost their names;"
    return (
        f"the file has no weight for the adapter's {low.path!r}.{closest(weights.rename(low.path), names)}{why} "
        "mapping={initializer: module} tells what is what. Is this adapter of this model?"
    )

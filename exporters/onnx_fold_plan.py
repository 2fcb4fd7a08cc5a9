"""Which initializers of an ONNX file an adapter changes, and to what; all is decided before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_fx import AdapterError, ExportError, LowRankArrays
from lora_fx.adapter_places import joined
from lora_fx.errors import closest

from .named_weights import Held, OnnxWeights, lost_names
from .onnx_deltas import experts_delta, gain, low_rank_delta
from .onnx_sites import Form, OnnxSite, module_of
from .onnx_weights import Array, read_shared_modules
from .streamed_weights import Product
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
    """

    weight: ir.Value
    paths: tuple[str, ...]
    edits: tuple[Edit, ...]
    sites: tuple[OnnxSite, ...] = ()


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
        if not places and not weights.check_place(low.path, low):
            continue
        weights.check_rank(low)
        matched += [Matched(low, site, piece, weights.scaling_at_slot(low)) for site, piece in places]
    for each in matched:
        _refuse_second_calls(weights, each)
    return matched


def _refuse_second_calls(weights: OnnxWeights, matched: Matched) -> None:
    """torch's older exporter calls the second call of `fc` `fc_1`, which may be another module's name."""
    if weights.recorded:
        return
    own = module_of(matched.site.node)
    for site in weights.sites:
        other = module_of(site.node)
        if site.weight is not matched.site.weight or own is None or other is None or own == other:
            continue
        if _NUMBER.sub("", own) == _NUMBER.sub("", other) and matched.low.path not in site.modules:
            raise ExportError(
                f"{matched.site.weight.name!r} is applied in {own!r} and in {other!r}, which may be one module that is "
                f"called twice, or two that are tied; mapping={{{str(matched.site.weight.name)!r}: "
                f"{matched.low.path!r}}} says that it is one. If not, fold in the graph and export that"
            )


_NUMBER = re.compile(r"_[0-9]+(?=\.|$)")


def plan_changes(weights: OnnxWeights, strength: float = 1.0) -> list[WeightChange]:
    """What folding `strength` times the adapter changes; one initializer may become several.

    Raises:
        AdapterError: if the file has no place for something in the adapter, or shapes do not fit.
        ExportError: if a weight cannot be changed, since the file has it only in a computed form.
    """
    adapter, matched = weights.adapter, match_adapter(weights)
    changes = _Changes()
    for each in matched:
        rows = None if each.piece is None else piece_of(each, matched)
        changes.at_sites(each, LowRankEdit(each, rows, strength))
        if each.low.bias is not None:
            bias = each.low.bias * (weights.scaling_of_bias(each.low) * strength / beta_of(each.site.node))
            held = bias_of(each.site)
            check_one_reader(weights, held, weights.rename(each.low.path), f"the lora_bias of {each.low.path!r}")
            changes.of_all(WeightChange(held, (each.low.path,), (_added(bias, rows),)))
    for low in adapter.low_rank:
        parameter = weights.parameter_of(low)
        for change in () if parameter is None else _parameter_changes(weights, low, parameter, strength):
            changes.of_all(change)
    for path, values in adapter.rows.items():
        for change in _row_changes(weights, path, values, strength):
            changes.of_all(change)
    for name, full in adapter.full.items():
        for change in _full_changes(weights, name, full, strength):
            changes.of_all(change)
    found = changes.combined()
    for change in found:
        _refuse_unclear(weights, change)
    return found


class _Changes:
    """Changes as they are found: of whole initializers, and of what one module reads of them."""

    def __init__(self) -> None:
        self._all: dict[int, WeightChange] = {}
        self._own: dict[tuple[int, str], WeightChange] = {}

    def at_sites(self, matched: Matched, edit: Edit) -> None:
        """A change for the places of one module; modules that are packed in one weight change it together."""
        weight, path = matched.site.weight, matched.low.path
        key = id(weight), "" if matched.piece is not None else path
        old = self._own.get(key)
        if old is None:
            self._own[key] = WeightChange(weight, (path,), (edit,), (matched.site,))
            return
        is_known = path in old.paths  # the same module, called once more
        self._own[key] = replace(
            old,
            paths=old.paths if is_known else (*old.paths, path),
            edits=old.edits if is_known else (*old.edits, edit),
            sites=(*old.sites, matched.site),
        )

    def of_all(self, new: WeightChange) -> None:
        """A change for whoever reads the initializer."""
        old = self._all.setdefault(id(new.weight), new)
        if old is not new and not set(new.paths) <= set(old.paths):
            self._all[id(new.weight)] = replace(old, paths=old.paths + new.paths, edits=old.edits + new.edits)

    def combined(self) -> list[WeightChange]:
        """All of them; what goes for a whole initializer goes for each of its modules."""
        found = []
        for (weight, _), own in self._own.items():
            whole = self._all.get(weight)
            found.append(own if whole is None else replace(own, edits=whole.edits + own.edits))
        with_sites = {weight for weight, _ in self._own}
        return found + [change for weight, change in self._all.items() if weight not in with_sites]


def other_readers(weight: ir.Value, sites: Iterable[OnnxSite]) -> list[ir.Node]:
    """What reads an initializer's values for something else than these places."""
    own = {id(site.carrier) for site in sites}
    return [node for node, _ in weight.uses() if id(node) not in own and node.op_type not in ("Shape", "Size")]


def _refuse_unclear(weights: OnnxWeights, change: WeightChange) -> None:
    """Of a foreign file nobody knows whether two names of one weight are one module, or two that are tied."""
    if weights.recorded or not change.sites:
        return
    nodes = {id(site.node) for site in change.sites}
    kinds = {site.form.kind for site in change.sites}
    adapted = {weights.rename(low.path) for low in weights.adapter.low_rank}
    for site in weights.sites:
        is_other = site.weight is change.weight and id(site.node) not in nodes and site.form.kind in kinds
        if is_other and not adapted & set(site.modules):
            raise ExportError(
                f"{change.weight.name!r} is applied by {some(change.paths)}, which the adapter is for, and by "
                f"{site.name!r}, which it does not name; the file does not tell whether the two are one module. "
                f"mapping={{{str(change.weight.name)!r}: {change.paths[0]!r}}} says that they are; if not, fold in the "
                "graph and export that"
            )


@dataclass(frozen=True, eq=False)
class LowRankEdit:
    """W + strength · (what the adapter adds to W), at the outputs `rows`."""

    matched: Matched
    rows: slice | None
    strength: float

    def __call__(self, weight: Array) -> Array:
        """The new weight."""
        whole = _seen(weight, self.matched.site, self.rows)
        low, form, scaling = self.matched.low, self.matched.site.form, self.matched.scaling
        delta = low_rank_delta(low, form, whole.shape) * scaling
        if low.magnitude is not None:
            adapted = whole + delta
            delta = gain(low, adapted, form) * adapted - whole
        result: Array = whole + delta * self.strength
        if self.rows is None:
            return result
        weight = weight.copy()
        _seen(weight, self.matched.site, self.rows)[...] = result
        return weight

    def product(self) -> Product | None:
        """The same, for a weight that is changed block by block; None if it takes all of the weight to know.

        Raises:
            AdapterError: if A and B are not of such a weight.
        """
        low, form, weight = self.matched.low, self.matched.site.form, self.matched.site.weight.const_value
        if form.kind == "kernel" or weight is None:
            return None
        a, b = low.a.reshape(len(low.a), -1), low.b.reshape(len(low.b), -1)  # (r, in), (out, r)
        left, right = (a.T, b.T) if form.stored_in_out else (b, a)
        first = 0 if self.rows is None else int(self.rows.start)
        row, column = (0, first) if form.stored_in_out else (first, 0)
        if self.rows is None and (len(left), right.shape[1]) != tuple(weight.shape.numpy()):
            low_rank_delta(low, form, tuple(weight.shape.numpy()))  # which says so
        if low.magnitude is not None and low.magnitude.size != len(low.b):
            return None  # which is refused where all of the weight is looked at
        scaling, strength = self.matched.scaling, self.strength
        return Product(left, right, scaling, strength, row, column, low.magnitude, form.stored_in_out)


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
    position = 5 if node.op_type == "MatMulNBits" else 2
    if node.op_type in ("Gemm", "Conv", "ConvTranspose", "Attention", "MatMulNBits") and len(node.inputs) > position:
        found = node.inputs[position]
        if found is not None and found.is_initializer():
            return found
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        for value in users[0].inputs:
            if value is not None and value.is_initializer() and len(value.shape or ()) == 1:
                return value
    raise ExportError(
        f"the adapter has a lora_bias for {site.name!r}, and the file has no bias there to fold it into; train without "
        "lora_bias, or give the base module a bias before it is exported (torch's exporters drop one that is all zeros)"
    )


def beta_of(node: ir.Node) -> float:
    """What a Gemm multiplies its bias with.

    Raises:
        ExportError: if that is 0, so that the bias does nothing.
    """
    beta = node.attributes["beta"].as_float() if node.op_type == "Gemm" and "beta" in node.attributes else 1.0
    if beta == 0.0:
        raise ExportError(f"the Gemm {node.name!r} multiplies its bias with 0, so nothing can be folded into it")
    return beta


def check_one_reader(weights: OnnxWeights, value: ir.Value, module: str, what: str) -> None:
    """Whether an initializer is one module's alone, so that a new value of it reaches nobody else.

    Tied weights are several modules' by the file's record; in a foreign file, an initializer with several readers may
    be tied, or it may be several that happened to be equal, which torch's exporters merge (zero biases, unit norms).

    Raises:
        ExportError: if it is not, or nobody can tell.
    """
    recorded = weights.recorded.get(str(value.name))
    if recorded is not None:
        shared = read_shared_modules(weights.model.metadata_props)
        own = {recorded.fqn, *recorded.aliases}
        others = {shared.get(name.rpartition(".")[0], name.rpartition(".")[0]) for name in own}
        others -= {shared.get(module, module)}
    else:
        readers = [module_of(node) for node, _ in value.uses()]
        others = {reader for reader in readers if reader is not None} - {module}
        others |= {"an op of no name"} if None in readers and len(readers) > 1 else set()
    if others:
        raise ExportError(
            f"the adapter has {what}, and {value.name!r} in the file is also read by {some(sorted(others))}: tied, or "
            "equal and merged by the exporter. Fold in the graph (lora_fx.load_adapter, lora_fx.fold), and export that"
        )


def _parameter_changes(weights: OnnxWeights, low: LowRankArrays, name: str, strength: float) -> Iterator[WeightChange]:
    """Of target_parameters, and of the packed projection of nn.MultiheadAttention."""
    adapter = weights.adapter
    scaling, r = weights.scaling_at_slot(low) * strength, adapter.rank_at(*weights.names_at_slot(low))
    if low.magnitude is not None or low.bias is not None:
        raise AdapterError(f"{name!r} is a parameter of its own, for which use_dora and lora_bias are not defined")
    for held in weights.held(name):
        check_one_reader(weights, held.value, weights.rename(name).rpartition(".")[0], f"A and B of {name!r}")
        shape = held.own_shape
        if len(shape) == 3:
            delta = experts_delta(low, r, shape, stored_in_out=is_in_out(weights, held, low))
        else:
            delta = low_rank_delta(low, Form("matrix"), shape)
        yield WeightChange(held.value, (name,), (_plus(held.lying(delta) * scaling),))


def is_in_out(weights: OnnxWeights, held: Held, low: LowRankArrays) -> bool:
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
    found = weights.held(joined(path, "weight"))
    if not found and weights.partial:
        weights.left_out.append(path)
        return
    if rows is None or not found or len(rows) != len(values):
        raise AdapterError(
            f"the file has no embedding {path!r} for {len(values)} trained rows (trainable_token_indices)."
            f"{closest(joined(path, 'weight'), weights.parameter_names)}{lost_names(weights)} Is this adapter of this "
            "model?"
        )
    for held in found:
        vocabulary, width = held.own_shape
        if max(rows) >= vocabulary or values.shape[1] != width:
            raise AdapterError(
                f"rows up to {max(rows)}, {values.shape[1]} wide, do not fit {path!r}, which is {vocabulary} × {width}"
            )
        check_one_reader(weights, held.value, weights.rename(path), f"rows of {path!r}")
        yield WeightChange(held.value, (path,), (_with_rows(held, rows, values, strength),))


def _with_rows(held: Held, rows: list[int], values: Array, strength: float) -> Edit:
    def edit(old: Array) -> Array:
        new = old.copy()
        own = new if held.perm is None else new.transpose(np.argsort(held.perm))
        own[rows] += (values - own[rows]) * strength
        return new

    return edit


def _full_changes(weights: OnnxWeights, name: str, full: Array, strength: float) -> Iterator[WeightChange]:
    """Of modules_to_save, and of biases."""
    found = weights.held(name)
    if not found and (_is_the_bases_own(weights, name, full) or not weights.check_place(name)):
        return
    for held in found:
        if held.own_shape != full.shape:
            raise AdapterError(
                f"the adapter's {name!r} has the shape {list(full.shape)}, and the file's {list(held.own_shape)}; is "
                "this adapter of this model?"
            )
        check_one_reader(weights, held.value, weights.rename(name).rpartition(".")[0], f"all of {name!r}")
        yield WeightChange(held.value, (name,), (_towards(held.lying(full), strength),))


def _is_the_bases_own(weights: OnnxWeights, name: str, full: Array) -> bool:
    """Whether it is what PEFT saves beside adapted embeddings: the base's table, as it is."""
    for site in weights.sites:
        if weights.rename(name.removesuffix(".weight")) in site.modules and site.weight.const_value is not None:
            stored = site.weight.const_value.numpy()
            return any(np.array_equal(stored, each) for each in (full, full.T))
    return False


def _towards(full: Array, strength: float) -> Edit:
    return lambda old: full if strength == 1 else old + (full - old) * strength

"""Which initializers of an ONNX file an adapter changes, and to what; all is decided before anything is written."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_fx import AdapterError, ExportError, LowRankArrays
from lora_fx.adapter_arrays import wide, widened
from lora_fx.adapter_places import joined
from lora_fx.errors import closest

from .named_weights import Held, OnnxWeights, lost_names
from .onnx_deltas import Factors, check_magnitude, dense, experts_factors, low_rank_factors
from .onnx_sites import Form, OnnxSite, module_of
from .onnx_weights import Array, read_shared_modules
from .stored_weights import numbers_of, shape_of
from .streamed_weights import BLOCK, NewValues
from .text import some
from .weight_edits import Added, Edit, Product, Rows, Whole

# What makes a weight's new value of its old one; made when that is computed, since A and B may be widened for it.
Edits = Callable[[], list[Edit]]


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
    edits: tuple[Edits, ...]
    sites: tuple[OnnxSite, ...] = ()

    def new_values(self) -> NewValues:
        """The new value, to be computed.

        Raises:
            AdapterError: if what the adapter has does not fit the weight.
            ExportError: if the weight is of a type that no weight has.
        """
        for each in self.edits:
            each()
        assert self.weight.const_value is not None
        is_kernel = any(site.form.kind == "kernel" for site in self.sites)
        axes = len(self.weight.const_value.shape)
        leading = min(axes, 1) if is_kernel else max(axes - 1, min(axes, 1))
        return NewValues(self.weight, self.edits, self.paths, leading)


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
            bias = wide(each.low.bias) * (weights.scaling_of_bias(each.low) * strength / beta_of(each.site.node))
            held = bias_of(each.site)
            check_one_reader(weights, held, weights.rename(each.low.path), f"the lora_bias of {each.low.path!r}")
            changes.of_all(WeightChange(held, (each.low.path,), (_added(held, bias, rows),)))
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

    def at_sites(self, matched: Matched, edit: Edits) -> None:
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

    def __call__(self) -> list[Edit]:
        """The products that are added.

        Raises:
            AdapterError: if A and B are not of such a weight.
        """
        low, form = widened(self.matched.low), self.matched.site.form
        shape, axis = list(shape_of(self.matched.site.weight)), -1 if form.stored_in_out else 0
        start = 0
        if self.rows is not None:
            start, shape[axis] = self.rows.start, self.rows.stop - self.rows.start
        factors = low_rank_factors(low, form, tuple(shape))
        if low.magnitude is not None:
            check_magnitude(low, form, shape[axis])
        row, column = (0, start) if form.stored_in_out else (start, 0)
        return [self._product(each, low, row, column) for each in factors]

    def _product(self, factors: Factors, low: LowRankArrays, row: int, column: int) -> Edit:
        form, magnitude, columns = self.matched.site.form, low.magnitude, factors.columns
        if magnitude is not None and not form.stored_in_out:
            magnitude = magnitude.reshape(-1)[factors.row : factors.row + len(factors.left)]
        if form.stored_in_out:
            columns = slice(column, column + factors.right.shape[1])
        scaling, strength, row = self.matched.scaling, self.strength, row + factors.row
        return Product(factors.left, factors.right, scaling, strength, row, columns, magnitude, form.stored_in_out)


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


def _added(held: ir.Value, bias: Array, rows: slice | None) -> Edits:
    assert held.const_value is not None
    start, stop, _ = (rows or slice(None)).indices(held.const_value.size)
    if stop - start != bias.size:
        raise AdapterError(f"lora_B.bias has {bias.size} values, and the file's bias {stop - start}")
    return lambda: [Added(bias.reshape(-1), start)]


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
        in_out = len(held.own_shape) == 3 and is_in_out(weights, held, low)
        yield WeightChange(held.value, (name,), (functools.partial(_parameter_edits, held, low, r, scaling, in_out),))


def _parameter_edits(held: Held, low: LowRankArrays, r: int, scaling: float, in_out: bool) -> list[Edit]:
    low, shape = widened(low), held.own_shape
    if len(shape) == 3:
        factors = experts_factors(low, r, shape, stored_in_out=in_out)
    else:
        factors = low_rank_factors(low, Form("matrix"), shape)
    rows = shape[-2] if len(shape) > 1 else 1
    if held.perm is None or held.perm == tuple(range(len(shape))):
        return [Product(each.left, each.right, scaling, 1.0, each.row) for each in factors]
    if held.perm == (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2):  # each matrix is turned
        at = shape[-1]
        return [Product(each.right.T, each.left.T, scaling, 1.0, each.row // rows * at) for each in factors]
    delta = dense(factors, shape, len(shape) - 1) * scaling
    return [Added(held.lying(delta))]


def is_in_out(weights: OnnxWeights, held: Held, low: LowRankArrays) -> bool:
    """Whether experts are stored (experts, in, out); where both are of one size, the op that applies them tells."""
    shape = held.own_shape
    if shape[1] != shape[2]:
        return bool(shape[1] == low.a.shape[1])
    lies_so = any(site.form.stored_in_out for site in weights.sites if site.weight is held.value)
    return lies_so == (held.perm is None)


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
        if not 0 <= min(rows) <= max(rows) < vocabulary or values.shape[1] != width:
            raise AdapterError(
                f"rows {min(rows)} up to {max(rows)}, {values.shape[1]} wide, do not fit {path!r}, which is "
                f"{vocabulary} × {width}"
            )
        check_one_reader(weights, held.value, weights.rename(path), f"rows of {path!r}")
        yield WeightChange(held.value, (path,), (_one(Rows(rows, values, strength, held.perm == (1, 0))),))


def _one(edit: Edit) -> Edits:
    return lambda: [edit]


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
        yield WeightChange(held.value, (name,), (_one(Whole(held.lying(full), strength)),))


def _is_the_bases_own(weights: OnnxWeights, name: str, full: Array) -> bool:
    """Whether it is what PEFT saves beside adapted embeddings: the base's table, as it is."""
    for site in weights.sites:
        if weights.rename(name.removesuffix(".weight")) in site.modules and site.weight.const_value is not None:
            tables = (full, full.T) if full.ndim == 2 else (full,)
            return any(_is_equal(site.weight.const_value, each) for each in tables)
    return False


def _is_equal(stored: ir.TensorProtocol, values: Array) -> bool:
    """Whether a tensor holds these values; some at a time."""
    pieces = ((at, min(at + BLOCK, values.size)) for at in range(0, values.size, BLOCK))
    return tuple(stored.shape.numpy()) == values.shape and all(
        np.array_equal(numbers_of(stored, start, stop), wide(values.flat[start:stop])) for start, stop in pieces
    )

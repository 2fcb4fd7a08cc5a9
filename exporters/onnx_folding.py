"""An adapter folded into an existing ONNX file: no model code, no export, no torch.

fold_into_onnx(base, adapter, out)      the same graph with other weights
fold_into_onnx(file, adapter, file)     in place; unfold_onnx(file) takes it back bit for bit
make_session(base, adapter=adapter)     at load, with nothing written (see sessions)
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx import AdapterArrays, AdapterError, ExportError, read_adapter
from lora_fx.adapter_arrays import map_adapter
from lora_fx.tables import counted

from .external_data import sampled_sha256
from .lora_slots import SLOTS_KEY, read_slots
from .named_weights import OnnxWeights
from .onnx_files import check_apart, check_derived, checked_target, has_external_data, open_model, says_damaged, written
from .onnx_fold_plan import WeightChange, other_readers, plan_changes
from .onnx_in_place import undo_of, unfold_in_place, write_in_place
from .onnx_sites import Mapped
from .onnx_weights import MANIFEST_KEY, read_manifest, read_stamps, write_manifest, write_stamps
from .paths import path_of
from .sessions import checked_file
from .streamed_weights import NewValues
from .text import Shown, Table, some, table

_IN_MEMORY = "lora_fx_weights_given_at_load"  # a file that does not exist


@dataclass(frozen=True)
class FoldedWeight:
    """What folding did to one initializer.

    Attributes:
        name, dtype: which.
        paths: the adapter's modules, or tensors, that went into it.
        weight_norm, delta_norm: Frobenius norms of the old value, and of what was added.
        kept: 1 − ‖rounding error‖ / ‖delta‖: the share of the delta that the weight's type keeps.
        error: ‖rounding error‖ / ‖new value‖: of a quantized weight, that of quantizing it again.
        untied: the weight is read by something that is not adapted, so the new value got a name of its own.
    """

    name: str
    dtype: str
    paths: tuple[str, ...]
    weight_norm: float
    delta_norm: float
    kept: float
    error: float
    untied: bool = False


@dataclass(frozen=True)
class OnnxFoldReport(Shown):
    """What folding into a file did, weight by weight. Prints as a table.

    Attributes:
        path: the file with the new weights.
        adapter: the adapter's directory.
        weights: one entry for each initializer that changed.
        seconds: what it took.
        notes: what the caller should know.
    """

    path: str
    adapter: str
    weights: tuple[FoldedWeight, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def blocks(self) -> list[str | Table]:
        """A row for each weight."""
        rows = [
            (
                ", ".join(weight.paths),
                weight.name + (" (untied)" if weight.untied else ""),
                weight.dtype,
                f"{weight.delta_norm / weight.weight_norm:.2%}" if weight.weight_norm else "",
                f"{weight.kept:.2%}",
                f"{weight.error:.1e}",
            )
            for weight in self.weights
        ]
        header = ("adapter's", "initializer", "type", "‖ΔW‖/‖W‖", "kept", "rounding")
        head = f"{self.path}: {self.adapter} folded into {counted(len(rows), 'weight')}, {self.seconds:.2f} s"
        return [head, table(header, rows), *self.notes]


@dataclass(frozen=True, eq=False)
class NewWeight:
    """The new value of one initializer, in the type that the file has; several tensors if it is quantized.

    Attributes:
        change: what is done to it.
        values: computed when they are written.
        untied: as of `FoldedWeight`.
    """

    change: WeightChange
    values: NewValues
    untied: bool

    @property
    def name(self) -> str:
        """The initializer's."""
        return str(self.change.weight.name)

    @property
    def report(self) -> FoldedWeight:
        """What folding did, once it is done."""
        done = self.values.written
        before, after, added, lost = map(math.sqrt, (done.before, done.after, done.added, done.lost))
        return FoldedWeight(
            name=self.name,
            dtype=self.values.dtype,
            paths=self.change.paths,
            weight_norm=before,
            delta_norm=added,
            kept=1 - lost / added if added else 1.0,
            error=lost / after if lost else 0.0,
            untied=self.untied,
        )


@says_damaged
def fold_into_onnx(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | AdapterArrays,
    out: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    mapping: Mapped | None = None,
    strength: float = 1.0,
    partial: bool = False,
) -> OnnxFoldReport:
    """Fold an adapter into an existing ONNX file: W + scaling · B @ A in each weight that it is for, and no more.

    The graph stays, op for op; only a tied weight that is adapted in one of its places gets a second initializer.
    Weights are found by the names that the file has for them: those of `export_onnx`, of torch.onnx, of optimum, of
    onnxruntime-genai's builder (with q, k and v packed); weights of MatMulNBits are dequantized, folded and quantized
    again as they were. Sums are taken in float32 and rounded once.

    Args:
        base: the base model's file; weights may be in a file beside it.
        adapter: a directory that PEFT or `lora_fx.save_adapter` wrote, or what `lora_fx.read_adapter` read.
        out: the file to write, with its weights in `<out>.data` if the base's are beside it; `base` itself folds in
            place, and leaves `<out>.undo` for `unfold_onnx`.
        adapter_name: the sub-directory to take of a PEFT directory of several adapters.
        mapping: {initializer: module's name, or a list of the modules packed in it}, for files without names.
        strength: multiplies all that the adapter adds.
        partial: the file is one part of the model (an encoder, say), and the adapter may have more than it takes.

    Raises:
        AdapterError: if the adapter does not fit the file; nothing is written then.
        ExportError: if a file cannot be read or written, the adapter is folded in already, or a result is not finite.
    """
    started = time.perf_counter()
    file = Path(os.path.realpath(checked_file(base)))
    arrays, let_go = _mapped(adapter, adapter_name)
    model = open_model(file)
    _refuse_twice(model, arrays, file)
    target = checked_target(out)
    in_place = target == file
    if not in_place and target.exists() and target.samefile(file):
        raise ExportError(
            f"{target.name} and {file.name} are one file under two names (a hard link); fold into another"
        )
    check_apart(file, model, target, may_replace=True)
    weights = OnnxWeights(model, arrays, mapping, partial=partial)
    external = has_external_data(model)
    new = new_weights(weights, strength)
    names = list(model.graph.initializers)
    _record(model, arrays, strength, file)
    if in_place:
        _refuse_untied(new, "in place")
        write_in_place(model, file, [each.values for each in new], let_go)
    else:
        for each in new:
            _put(model, each, each.values.pending(let_go) if external else each.values.write({}))
        with written(model, target, external=external) as files:
            check_derived(files.model, file, full=False)
    notes = [weights.rename.note] if weights.rename.note else []
    if weights.left_out:
        notes.append(f"not in this file: {some(weights.left_out)}")
    order = {name: i for i, name in enumerate(names)}
    reports = tuple(sorted((each.report for each in new), key=lambda weight: order[weight.name]))
    return OnnxFoldReport(os.fspath(out), str(arrays.directory), reports, time.perf_counter() - started, tuple(notes))


def _mapped(
    adapter: str | os.PathLike[str] | AdapterArrays, adapter_name: str
) -> tuple[AdapterArrays, Callable[[], object]]:
    if isinstance(adapter, AdapterArrays):
        return adapter, lambda: None
    return map_adapter(adapter, adapter_name=adapter_name)


def unfold_onnx(path: str | os.PathLike[str]) -> None:
    """Take back what `fold_into_onnx(path, adapter, path)` did: the files are again what they were, byte for byte.

    Raises:
        ExportError: if there is nothing to take back; the base file of a fold into another file is that still.
    """
    file = Path(os.path.realpath(path_of(path)))
    unfold_in_place(file if undo_of(file).is_dir() else checked_file(path))


def new_weights(weights: OnnxWeights, strength: float = 1.0) -> list[NewWeight]:
    """Each weight that an adapter changes, whose new value is computed when it is asked for.

    Args:
        weights: of the file.
        strength: multiplies all that the adapter adds.

    Raises:
        AdapterError: if the adapter does not fit.
        ExportError: if something is changed that is no weight.
    """
    if not np.isfinite(strength):
        raise ExportError(f"strength={strength!r} must be a finite number")
    by_weight: dict[int, list[WeightChange]] = {}
    for change in plan_changes(weights, strength):
        by_weight.setdefault(id(change.weight), []).append(change)
    if not by_weight:
        raise AdapterError(f"{str(weights.adapter.directory)!r} changes nothing in this file")
    return [new for changes in by_weight.values() for new in _new_values(changes)]


def _new_values(changes: Sequence[WeightChange]) -> Iterator[NewWeight]:
    """The new value of one initializer; several, if modules that are tied in it have other adapters."""
    found: list[tuple[WeightChange, NewValues]] = []
    for change in changes:
        values = change.new_values()
        if found and values.is_like(found[0][1]):  # tied, and adapted alike
            first = found[0][0]
            joined = dataclasses.replace(first, paths=first.paths + change.paths, sites=first.sites + change.sites)
            found[0] = joined, joined.new_values()
        else:
            found.append((change, values))
    for change, values in found:
        yield NewWeight(change, values, bool(change.sites) and bool(other_readers(change.weight, change.sites)))


def _put(model: ir.Model, new: NewWeight, tensors: Mapping[ir.Value, ir.TensorProtocol]) -> None:
    """Give the model new tensors; a weight that something else reads gets a second initializer."""
    if not new.untied:
        for value, tensor in tensors.items():
            value.const_value = tensor
        return
    _check_carriers(new.change)
    _record_twin(model, {str(value.name): _untie(model, new.change, value, each) for value, each in tensors.items()})


def _untie(model: ir.Model, change: WeightChange, value: ir.Value, tensor: ir.TensorProtocol) -> str:
    """Give the change's places an initializer of their own; returns its name."""
    taken = {output.name for node in model.graph.all_nodes() for output in node.outputs} | set(model.graph.initializers)
    names = itertools.chain([f"{value.name}_folded"], (f"{value.name}_folded_{n}" for n in itertools.count(2)))
    name = next(name for name in names if name not in taken)
    twin = ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
    twin.metadata_props.update(value.metadata_props)
    model.graph.register_initializer(twin)
    for carrier in {id(site.carrier): site.carrier for site in change.sites}.values():
        for i, source in enumerate(carrier.inputs):
            if source is value:
                carrier.replace_input_with(i, twin)
    if not value.uses():
        del model.graph.initializers[str(value.name)]
    return name


def _record_twin(model: ir.Model, names: Mapping[str, str]) -> None:
    """The manifest's entry of a second initializer, {old name: new name}; a quantized weight has several."""
    recorded = read_manifest(model.metadata_props) if MANIFEST_KEY in model.metadata_props else {}
    for old in names:
        if old in recorded:
            scales, zero_points = names.get(str(recorded[old].scales)), names.get(str(recorded[old].zero_points))
            entry = dataclasses.replace(recorded[old], name=names[old], scales=scales, zero_points=zero_points)
            kept = [weight for weight in recorded.values() if weight.name in model.graph.initializers]
            write_manifest(model, (*kept, entry))


def _check_carriers(change: WeightChange) -> None:
    adapted = {id(site.node) for site in change.sites}
    for carrier in {id(site.carrier): site.carrier for site in change.sites}.values():
        if id(carrier) in adapted:
            continue
        users = [user for output in carrier.outputs for user, _ in output.uses()]
        if not all(id(user) in adapted for user in users):
            raise ExportError(
                f"{change.weight.name!r} is read through {carrier.name!r} by {some(change.paths)}, which the adapter "
                "is for, and by others; fold in the graph, and export the result: lora_fx.fold"
            )


def _refuse_untied(new: Sequence[NewWeight], how: str) -> None:
    tied = [each.name for each in new if each.untied]
    if tied:
        raise ExportError(
            f"{some(tied)} cannot be folded {how}: something that is not adapted reads it too, so that the graph needs "
            "one more initializer; fold_into_onnx(base, adapter, out) into a file of its own unties it"
        )


def _refuse_twice(model: ir.Model, adapter: AdapterArrays, file: Path) -> None:
    for entry in read_stamps(model.metadata_props):
        if entry.get("adapter") in (adapter.data_sha256, adapter.sha256):
            raise ExportError(
                f"{str(adapter.directory)!r} is folded into {file.name} already, and folding it again would count it "
                "twice; take the base's file, or unfold_onnx this one"
            )


def _record(model: ir.Model, adapter: AdapterArrays, strength: float, base: Path) -> None:
    """The stamp: which file was folded into, and which adapter, with what scaling."""
    config = adapter.config
    entry = {
        "adapter": adapter.data_sha256,
        "strength": strength,
        "base_sample": sampled_sha256(base),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
    }
    write_stamps(model, [entry])
    if SLOTS_KEY in model.metadata_props:  # adapters that were made for the base as it was are not for this one
        slots = read_slots(model.metadata_props, "the file")
        made_of = f"{slots.fingerprint} {adapter.sha256} {strength!r}"
        dataclasses.replace(slots, fingerprint=hashlib.sha256(made_of.encode()).hexdigest()).write_to(model)


@says_damaged
def session_values(
    file: Path,
    adapter: str | os.PathLike[str] | AdapterArrays,
    adapter_name: str = "default",
    mapping: Mapped | None = None,
) -> tuple[bytes, dict[str, ir.TensorProtocol]]:
    """A graph that looks for the folded weights beside it, and these weights.

    Raises:
        AdapterError, ExportError: as `fold_into_onnx`.
    """
    arrays = adapter if isinstance(adapter, AdapterArrays) else read_adapter(adapter, adapter_name=adapter_name)
    model = open_model(file)
    _refuse_twice(model, arrays, file)
    new = new_weights(OnnxWeights(model, arrays, mapping))
    _refuse_untied(new, "at load")
    given: dict[str, ir.TensorProtocol] = {}
    for value, tensor in (item for each in new for item in each.values.write({}).items()):
        name = str(value.name)
        given[name] = tensor
        value.const_value = ir.ExternalTensor(
            _IN_MEMORY, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return ir.to_proto(model).SerializeToString(), given

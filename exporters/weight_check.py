"""The weights in an ONNX file against the graph's, bit for bit.

Outputs alone do not tell: an argmax hides a changed weight, so does a branch that was not taken, and in
half precision a small delta is within what two runtimes differ by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import fx

import lora_fx

from .onnx_weights import MANIFEST_KEY, StoredWeight, read_manifest, read_stamps
from .text import Shown, some

_TORCH_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
}
# What sums of B @ A in another order may differ by, in eps of the largest number of the weight.
_SUMS = 4.0
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class WeightCheck(Shown):
    """How a file's weights differ from a graph's. Prints as a few lines.

    Attributes:
        compared: number of initializers that were compared bit for bit.
        differing: {initializer: how it differs from the graph's weight}.
        notes: what was not compared, and why.
        rounded: initializers of those compared that `fold_into_onnx` made, and that are the graph's within rounding.
    """

    compared: int
    differing: dict[str, str]
    notes: tuple[str, ...]
    rounded: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no weight that was compared differs."""
        return not self.differing

    def blocks(self) -> list[str]:
        """What was compared, and notes."""
        said = [f"{name!r} ({how})" for name, how in list(self.differing.items())[:5]]
        more = f" and {len(self.differing) - 5} more" if len(self.differing) > 5 else ""
        verdict = f"{len(self.differing)} differ from the graph's: {', '.join(said)}{more}" if said else "all equal"
        verdict += f", {len(self.rounded)} of them but for the last digits of a sum" if self.rounded else ""
        lines = [f"weights: {self.compared} compared bit for bit, {verdict}"] if self.compared else []
        return [*lines, *self.notes]


def check_weights(file: Path, gm: fx.GraphModule) -> WeightCheck:
    """Compare the initializers that the file records as weights with `gm`'s tensors; `gm` shows the graph to judge.

    One tensor at a time is read from external data. A file in another dtype is compared with the graph's
    weights cast to it. What `fold_into_onnx` wrote is compared within the rounding of a sum: numpy multiplies B by A
    there, and torch in the graph, each with a library of its own. Weights under an adapter that is not folded in `gm`
    are left out, and so are those that the exporter computed from others.

    Raises:
        ExportError: if the file's record of its weights is damaged.
    """
    model = onnx.load(file, load_external_data=False)
    if not any(prop.key == MANIFEST_KEY for prop in model.metadata_props):
        return WeightCheck(0, {}, ("the file has no record of its weights, so only outputs were compared",))
    manifest = read_manifest(model)
    adapted = _adapted_weights(gm)
    if adapted is None:
        return WeightCheck(0, {}, ("it is not known which weights the adapters change: only outputs were compared",))
    own = _floats(gm)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    differing: dict[str, str] = {}
    compared, casts, rounded = 0, set(), []
    stamps = read_stamps({prop.key: prop.value for prop in model.metadata_props})
    is_folded_file = any("base_sample" in stamp for stamp in stamps)
    left: dict[str, list[str]] = {}
    for name, weight in manifest.items():
        names = [fqn for fqn in (weight.fqn, *weight.aliases) if fqn in own]
        if why := _incomparable(weight, stored.get(name), names, adapted):
            left.setdefault(why, []).append(name)
            continue
        tensor = stored[name]
        if _TORCH_TYPES[tensor.data_type] != own[names[0]].dtype:
            casts.add(f"{weight.dtype} in the file and {own[names[0]].dtype} in the graph")
        compared += 1
        # What is tied in the file may be untied in the graph: then one of the graph's tensors differs.
        differences = [_difference(tensor, own[fqn], weight, file) for fqn in names]
        worst = max(differences, key=lambda difference: difference.error)
        if worst.how and is_folded_file and worst.error <= _SUMS:
            rounded.append(name)
        elif worst.how:
            differing[name] = worst.how
    if absent := _absent(gm, manifest):
        left["in the graph, and not in the file's record of its weights"] = absent
    notes = [f"weights not compared, {why}: {some(names)}" for why, names in left.items()]
    notes += [f"weights are {cast}: compared after casting the graph's" for cast in sorted(casts)]
    notes += [] if compared else ["no weight was compared, only outputs were"]
    return WeightCheck(compared, differing, tuple(notes), tuple(rounded))


def used_names(gm: fx.GraphModule) -> set[str]:
    """Names of the tensors that the graph's output depends on."""
    queue = [node for node in gm.graph.nodes if node.op == "output"]
    seen = set(queue)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                queue.append(node)
    names = {str(node.target) for node in seen if node.op == "get_attr"}
    modules = tuple(f"{node.target}." for node in seen if node.op == "call_module")
    return names | {name for name, _ in _named_tensors(gm) if name.startswith(modules)}


def _named_tensors(gm: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def _floats(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in _named_tensors(gm) if value.is_floating_point()}


def _adapted_weights(gm: fx.GraphModule) -> set[str] | None:
    """The weights that folding `gm`'s adapters would change; None if that cannot be told."""
    ours = _adapter_tensors(gm)
    if not ours:
        return set()
    names = [name for name, value in _named_tensors(gm) if id(value) in ours and "lora_A." in name]
    prefixes = {name.rpartition("lora_A.")[0] for name in names}
    # Inside a module, beside a parameter that is a site itself, or in the graph module.
    known = {f"{site.path}{joint}": site.weight for site in lora_fx.find_sites(gm) for joint in (".", "_")}
    known |= {"": known["."]} if "." in known else {}
    return {known[prefix] for prefix in prefixes} if prefixes <= set(known) else None


def _adapter_tensors(gm: fx.GraphModule) -> set[int]:
    return {id(value) for value in lora_fx.lora_parameters(gm)} if lora_fx.adapter_names(gm) else set()


def _absent(gm: fx.GraphModule, manifest: dict[str, StoredWeight]) -> list[str]:
    """The float parameters that the graph uses and the file does not know."""
    known = {fqn for weight in manifest.values() for fqn in (*weight.fqn.split(", "), *weight.aliases)}
    passed = _adapter_tensors(gm) | {id(value) for name, value in _named_tensors(gm) if name in known}
    names = used_names(gm)
    used = {id(value) for name, value in _named_tensors(gm) if name in names}
    return [name for name, value in gm.named_parameters() if id(value) in used - passed]


def _incomparable(weight: StoredWeight, tensor: onnx.TensorProto | None, names: list[str], adapted: set[str]) -> str:
    if weight.layout == "computed":
        return "computed from the graph's at export"
    if weight.layout == "quantized":
        return "quantized"
    if tensor is None:
        return "no longer in the file under that name"
    if tensor.data_type not in _TORCH_TYPES:
        return f"stored as {TensorProto.DataType.Name(tensor.data_type)}"
    if not names:
        return "with no float tensor of that name in the graph"
    return "under adapters that are not folded" if adapted & {weight.fqn, *weight.aliases} else ""


@dataclass(frozen=True)
class _Difference:
    """How an initializer differs, "" if not, and by how many eps of its largest number."""

    how: str
    error: float


def _difference(tensor: onnx.TensorProto, value: torch.Tensor, weight: StoredWeight, file: Path) -> _Difference:
    if weight.perm is not None and len(weight.perm) == value.ndim:
        value = value.permute(weight.perm)
    if tuple(tensor.dims) != tuple(value.shape):
        return _Difference(f"shape {list(tensor.dims)} instead of {list(value.shape)}", math.inf)
    value = value.to("cpu", _TORCH_TYPES[tensor.data_type]).contiguous().reshape(-1)
    wanted = value.view(_BITS[value.element_size()]).numpy()
    found = _bytes(tensor, file).view(wanted.dtype)
    unequal = np.flatnonzero(wanted != found) if value.numel() else np.empty(0, np.int64)
    if not len(unequal):
        return _Difference("", 0.0)
    apart = value[unequal].double() - torch.from_numpy(found[unequal]).view(value.dtype).double()
    unit = torch.finfo(value.dtype).eps * float(value.double().abs().max())
    error = float(apart.abs().max()) / unit if unit else math.inf
    return _Difference(f"{len(unequal)} of {value.numel()} values", math.inf if math.isnan(error) else error)


def _bytes(tensor: onnx.TensorProto, file: Path) -> NDArray[np.uint8]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, data = int(place.get("offset", 0)), file.parent / place["location"]
    length = int(place.get("length", data.stat().st_size - start))
    return np.memmap(data, np.uint8, "r", start, (length,))

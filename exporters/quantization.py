"""Weights quantized in blocks after an export: MatMulNBits where the graph multiplies with a stored matrix.

Only weights are quantized, and never A and B of adapters that are switched at run time. The manifest goes with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from lora_fx import ExportError
from lora_fx.errors import closest

from .nbits import quantize
from .onnx_sites import OnnxSite, find_onnx_sites
from .onnx_weights import MANIFEST_KEY, Array, StoredWeight, read_manifest, write_manifest
from .stored_weights import read_weight
from .text import Shown, Table, table

Metric = Callable[[ort.InferenceSession], float]

POOR_COSINE = 0.9
_DOMAIN = "com.microsoft"
_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        bits: 4 or 8.
        block_size: how many weights of an output share a scale: a power of 2, 16 at least.
        symmetric: without zero points.
        exclude: modules whose weights stay as they are, by their names or the last parts of them.

    Raises:
        ExportError: for values that MatMulNBits does not take.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        size = self.block_size
        if self.bits not in (4, 8):
            raise ExportError(f"Quantization(bits={self.bits!r}): weights take 4 or 8 bits")
        if isinstance(size, bool) or not isinstance(size, int) or size < 16 or size & (size - 1):
            raise ExportError(
                f"Quantization(block_size={size!r}): a block is a power of 2, such as 32, and 16 at least"
            )
        if isinstance(self.exclude, str):
            raise ExportError(
                f"Quantization(exclude={self.exclude!r}) must be a list of names, such as [{self.exclude!r}]"
            )


def as_quantization(given: Any) -> Quantization | None:
    """What the caller of an export means by `quantize=`.

    Raises:
        ExportError: if it is none of what an export takes.
    """
    if given is None or isinstance(given, Quantization):
        return given
    if isinstance(given, str) and given in _BITS:
        return Quantization(bits=_BITS[given])
    raise ExportError(f'quantize={given!r} must be "int4", "int8", a Quantization(bits=4, block_size=32, ...) or None')


@dataclass(frozen=True)
class OutputQuality:
    """One output of a quantized file against the float file's, at the example inputs.

    Attributes:
        name: which.
        cosine: of the two, all values in one vector.
        relative_error: ‖difference‖ / ‖float‖.
    """

    name: str
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class QuantizationReport(Shown):
    """What quantizing did to a file. Prints as a table.

    Attributes:
        bits, block_size, symmetric: how.
        weights: how many weights were quantized.
        bytes_before, bytes_after: sizes of the float file and of this one.
        outputs: how far each output is from the float file's.
        metric: (the float file's, this one's) by the caller's own measure; None without one.
    """

    bits: int
    block_size: int
    symmetric: bool
    weights: int
    bytes_before: int
    bytes_after: int
    outputs: tuple[OutputQuality, ...]
    metric: tuple[float, float] | None = None

    @property
    def poor(self) -> str | None:
        """What to warn of, if an output is far from the float file's."""
        low = [f"{each.name!r} ({each.cosine:.3f})" for each in self.outputs if not each.cosine >= POOR_COSINE]
        if not low:
            return None
        return (
            f"quantizing changes the outputs: cosine to the float file's is below {POOR_COSINE} for {', '.join(low)}; "
            "try Quantization(bits=8), a smaller block_size, or exclude= what is sensitive"
        )

    def blocks(self) -> list[str | Table]:
        """A row for each output."""
        kind = "symmetric" if self.symmetric else "with zero points"
        rows = [(each.name, f"{each.cosine:.4f}", f"{each.relative_error:.1e}") for each in self.outputs]
        blocks: list[str | Table] = [
            f"int{self.bits}, blocks of {self.block_size}, {kind}: {self.weights} weights, "
            f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB",
            table(("against float", "cosine", "relative error"), rows),
        ]
        if self.metric is not None:
            blocks.append("metric: {:.6g} in float, {:.6g} quantized".format(*self.metric))
        return blocks


def quantize_weights(model: ir.Model, options: Quantization) -> int:
    """Replace MatMul and Gemm with stored matrices by MatMulNBits; returns how many weights that were.

    Raises:
        ExportError: if there is nothing to quantize, or `exclude` names what is not there.
    """
    found = _quantizable(model)
    excluded = _excluded(found, options.exclude)
    chosen = [sites for name, sites in found.items() if name not in excluded]
    if not chosen:
        raise ExportError(
            "there is no weight to quantize: a MatMul or Gemm with a stored matrix, in none of the excluded modules"
        )
    entries = dict(read_manifest(model.metadata_props)) if MANIFEST_KEY in model.metadata_props else {}
    for sites in chosen:
        parts = _quantize(model, sites[0], options)
        for site in sites:
            _replace(site, parts, options)
        name = str(sites[0].weight.name)
        del model.graph.initializers[name]
        if name in entries:
            old = entries.pop(name)
            entries[str(parts[0].name)] = _entry(old, sites[0], parts)
    if entries:
        write_manifest(model, tuple(entries.values()))
    model.opset_imports.setdefault(_DOMAIN, 1)
    return len(chosen)


def _quantizable(model: ir.Model) -> dict[str, list[OnnxSite]]:
    """{initializer: all that reads it} of the matrices that only ops read which MatMulNBits can stand for."""
    by_weight: dict[str, list[OnnxSite]] = {}
    for site in find_onnx_sites(model):
        by_weight.setdefault(str(site.weight.name), []).append(site)
    return {
        name: sites
        for name, sites in by_weight.items()
        if ".lora_" not in name
        and all(_is_plain(site) for site in sites)
        and len(sites) == len(list(sites[0].weight.uses()))
        and not sites[0].weight.is_graph_input()
        and not sites[0].weight.is_graph_output()
    }


def _is_plain(site: OnnxSite) -> bool:
    """Whether the op is x @ W, with W read from the initializer itself, plus a bias if it is a Gemm."""
    node, tensor = site.node, site.weight.const_value
    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or len(tensor.shape) != 2:
        return False
    if site.carrier is not node or site.position != 1:
        return False
    if node.op_type == "MatMul":
        return True
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return node.op_type == "Gemm" and all(
        attribute.value == plain.get(name, attribute.value) for name, attribute in node.attributes.items()
    )


def _excluded(found: Mapping[str, Sequence[OnnxSite]], exclude: Iterable[str]) -> set[str]:
    excluded: set[str] = set()
    for entry in exclude:
        hits = [name for name, sites in found.items() if any(_is_named(each, entry) for each in _names(name, sites))]
        if not hits:
            known = dict.fromkeys(each for name, sites in found.items() for each in _names(name, sites))
            raise ExportError(
                f"Quantization(exclude=[{entry!r}, ...]) names none of the {len(found)} weights that can be quantized."
                f"{closest(entry, list(known))}"
            )
        excluded.update(hits)
    return excluded


def _names(name: str, sites: Iterable[OnnxSite]) -> list[str]:
    """What a weight may be called: its own name, and its modules'."""
    return [name, *(module for site in sites for module in site.modules)]


def _is_named(name: str, entry: str) -> bool:
    """Whether the entry is the name, a module around it, or the last whole parts of the name."""
    return f".{name}".endswith(f".{entry}") or name.startswith(f"{entry}.")


def _quantize(model: ir.Model, site: OnnxSite, options: Quantization) -> list[ir.Value]:
    """New initializers of the packed values, the scales, and the zero points if there are."""
    weight, tensor = read_weight(site.weight), site.weight.const_value
    assert tensor is not None
    blob, scales, zero_points = quantize(
        weight.T if site.form.stored_in_out else weight,
        bits=options.bits,
        block_size=options.block_size,
        symmetric=options.symmetric,
        dtype_of_scales=tensor.dtype.numpy(),
    )
    arrays: dict[str, Array] = {f"Q{options.bits}": blob, "scales": scales}
    if zero_points is not None:
        arrays["zero_points"] = zero_points
    return [_initializer(model, f"{site.weight.name}_{what}", array) for what, array in arrays.items()]


def _initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _replace(site: OnnxSite, parts: Sequence[ir.Value], options: Quantization) -> None:
    node, graph, output = site.node, site.node.graph, site.node.outputs[0]
    assert graph is not None
    out, inputs = _out_in(site)
    sizes = {"K": inputs, "N": out, "bits": options.bits, "block_size": options.block_size}
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    product = ir.Value(
        name=output.name if bias is None else f"{output.name}_product", type=output.type, shape=output.shape
    )
    new = [
        ir.Node(
            _DOMAIN,
            "MatMulNBits",
            [node.inputs[0], *parts],
            attributes=[ir.AttrInt64(name, size) for name, size in sizes.items()],
            outputs=[product],
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
    ]
    if bias is not None:
        total = ir.Value(name=output.name, type=output.type, shape=output.shape)
        name, props = f"{node.name}_bias", dict(node.metadata_props)
        new.append(ir.Node("", "Add", [product, bias], outputs=[total], name=name, metadata_props=props))
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [output], new[-1].outputs)


def _out_in(site: OnnxSite) -> tuple[int, int]:
    assert site.weight.const_value is not None
    rows, columns = site.weight.const_value.shape.numpy()
    return (columns, rows) if site.form.stored_in_out else (rows, columns)


def _entry(old: StoredWeight, site: OnnxSite, parts: Sequence[ir.Value]) -> StoredWeight:
    """What the manifest says of it now; `perm` is of what the packed values are, (out, in)."""
    perm = old.perm
    if site.form.stored_in_out:
        perm = (1, 0) if old.perm is None else None
    blob, names = parts[0], [str(part.name) for part in parts]
    assert blob.const_value is not None
    return dataclasses.replace(
        old,
        name=names[0],
        layout="quantized" if old.layout != "computed" else old.layout,
        perm=perm,
        shape=tuple(blob.const_value.shape.numpy()),
        dtype=blob.const_value.dtype.name,
        scales=names[1],
        zero_points=names[2] if len(names) > 2 else None,
    )


def compare_outputs(names: Iterable[str], exact: Iterable[Array], got: Iterable[Array]) -> tuple[OutputQuality, ...]:
    """The quality of each output; values that are not finite in the float file are left out."""
    return tuple(_quality(*each) for each in zip(names, exact, got, strict=True))


def _quality(name: str, exact: Array, got: Array) -> OutputQuality:
    finite = np.isfinite(exact)
    a, b = exact[finite].astype(np.float64), got[finite].astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    error, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
    if not norms:
        return OutputQuality(name, float(error == 0), 0.0 if error == 0 else float("inf"))
    return OutputQuality(name, float(a @ b) / norms, error / size)

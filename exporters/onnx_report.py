"""What an export did."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .onnx_weights import StoredWeight
from .quantization import QuantizationReport
from .text import Shown, Table, table

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxReport(Shown):
    """What `export_onnx` wrote, and how well it agrees with torch. Prints as tables.

    Attributes:
        path: the .onnx file.
        data_path: its external data file, or None.
        size: bytes of both files.
        opset: version of the ONNX operator set.
        nodes: number of nodes.
        ops: {op type: how many nodes}, most frequent first.
        weights: the model's parameters and float buffers in the file, under their own names.
        inputs, outputs: {name: dimensions}, an int for a fixed one and a name for a free one.
        shapes_checked: the input shapes at which ONNX Runtime was compared with torch.
        max_error: largest error of that check relative to max |output|; None if it was switched off.
        seconds: what it took.
        warnings: what the caller should know.
        quantization: what quantizing the weights did; None if they are not quantized.
    """

    path: str
    data_path: str | None
    size: int
    opset: int
    nodes: int
    ops: dict[str, int]
    weights: tuple[StoredWeight, ...]
    inputs: dict[str, Dims]
    outputs: dict[str, Dims]
    shapes_checked: tuple[str, ...]
    max_error: float | None
    seconds: float
    warnings: tuple[str, ...]
    quantization: QuantizationReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def blocks(self) -> list[str | Table]:
        """What was written, its ports and its ops."""
        checked = "not checked" if self.max_error is None else f"error {self.max_error:.1e} of max |y|"
        layouts = [weight.layout for weight in self.weights]
        counts = ", ".join(f"{layouts.count(layout)} {layout}" for layout in dict.fromkeys(layouts))
        ports = [("input", *port) for port in self.inputs.items()] + [
            ("output", *port) for port in self.outputs.items()
        ]
        blocks: list[str | Table] = [
            f"{self.path}: {self.size / 2**20:.1f} MiB, opset {self.opset}, {self.nodes} nodes, {self.seconds:.1f} s",
            f"weights: {counts or 'none'}" + (f"; in {self.data_path}" if self.data_path else ""),
            f"ONNX Runtime against torch: {checked}" + "".join(f"\n  {shape}" for shape in self.shapes_checked),
            table(("", "name", "dimensions"), [(kind, name, list(dims)) for kind, name, dims in ports]),
            table(("op", "nodes"), self.ops.items()),
        ]
        blocks += [] if self.quantization is None else self.quantization.blocks()
        return blocks + [f"warning: {text}" for text in self.warnings]

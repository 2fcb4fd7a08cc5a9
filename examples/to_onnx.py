"""The end of the road, which the examples share: an adapter's files, a folded graph, a checked .onnx, a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch.utils import _pytree as pytree

import exporters
import lora_fx


def to_session(
    traced: lora_fx.LoraGraphModule,
    gm: lora_fx.LoraGraphModule,
    directory: Path,
    example: dict[str, Any],
    *,
    compare: bool = False,
) -> tuple[ort.InferenceSession, dict[str, float]]:
    """Save, fold, export and check a trained graph.

    Args:
        traced: the graph that was traced, of which `gm` is the injected one.
        directory: where `adapter/` (PEFT's two files) and `folded.onnx` go.
        example: inputs by name.
        compare: export the base as well, and compare the files op for op; it takes as long again.

    Returns:
        The session of folded.onnx, and what was measured: "loaded", by how much the outputs of the saved adapter
        differ when it is loaded onto the traced graph; "nodes" and, if compared, "base nodes" of the files; "error",
        of ONNX Runtime against torch, relative to the largest output.
    """
    lora_fx.save_adapter(gm, directory / "adapter")
    loaded = lora_fx.load_adapter(traced, directory / "adapter")
    with torch.no_grad():
        loaded_differs = difference(loaded.eval()(**example), gm.eval()(**example))

    folded = lora_fx.fold(gm)  # the traced graph again, node for node, with new weights
    file = exporters.export_onnx(folded, directory / "folded.onnx")
    base = exporters.export_onnx(traced, directory / "base.onnx") if compare else None
    report = exporters.verify_onnx(file.path, folded, base=base and base.path, provider="cpu")
    print(report)
    report.raise_if_failed()
    error = max(check.relative_error for check in report.checks)
    found = {"loaded": loaded_differs, "nodes": float(file.nodes), "error": error}
    if base is not None:
        found["base nodes"] = float(base.nodes)
    return exporters.make_session(file.path, provider="cpu"), found


def difference(one: Any, other: Any) -> float:
    """The largest, over all tensors of two outputs."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if isinstance(a, torch.Tensor))

"""From a folded graph to a checked ONNX file, and from the file to a session that runs where it says.

    export_onnx     writes the graph as an ONNX file that is op for op the base model's
    export_onnx_adapters, export_onnx_batched   the same with adapters that are switched at run time, or row by row
    optimize_onnx   the best right form of a file that the optimisers of this field can find
    verify_onnx     runs torch and ONNX Runtime on the same inputs and compares
    compare_onnx    compares two ONNX files op for op, and their weights byte for byte
    fold_into_onnx  folds an adapter into an ONNX file, with neither model nor torch; unfold_onnx takes it back
    make_session    opens an ONNX file on the provider asked for, or raises
    AdapterSession  runs a file with switchable adapters, and never with the wrong one
    diagnose        says what is wrong with an installation of ONNX Runtime, and what mends it
    flat_cache_model   a causal language model whose cache is inputs and outputs; greedy generates from its file

Names load on first use: sessions and file comparison need neither torch nor a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_export import AdaptersReport, export_onnx_adapters, export_onnx_batched
    from .adapter_session import AdapterSession, BoundRun
    from .decoders import decoder_example, encoder_example, flat_cache_model, flat_decoder, flat_encoder
    from .doctor import Diagnosis, Finding, diagnose
    from .generation import greedy, greedy_seq2seq
    from .onnx_adapters import SlotsReport, add_adapter_inputs, write_onnx_adapter
    from .onnx_batched import add_adapter_stacks, append_adapter
    from .onnx_compare import OnnxDiff, compare_onnx
    from .onnx_export import export_onnx
    from .onnx_folding import FoldedWeight, OnnxFoldReport, fold_into_onnx, unfold_onnx
    from .onnx_optimization import OptimizeReport, export_optimized, optimize_onnx
    from .onnx_report import OnnxReport
    from .onnx_weights import StoredWeight, read_manifest
    from .output_check import OutputError
    from .quantization import OutputQuality, Quantization, QuantizationReport
    from .sessions import make_session
    from .verification import ShapeCheck, VerifyReport, verify_onnx
    from .weight_check import WeightCheck

_HOME = {
    "AdapterSession": "adapter_session",
    "AdaptersReport": "adapter_export",
    "BoundRun": "adapter_session",
    "Diagnosis": "doctor",
    "Finding": "doctor",
    "FoldedWeight": "onnx_folding",
    "OnnxDiff": "onnx_compare",
    "OnnxFoldReport": "onnx_folding",
    "OnnxReport": "onnx_report",
    "OptimizeReport": "onnx_optimization",
    "OutputError": "output_check",
    "OutputQuality": "quantization",
    "Quantization": "quantization",
    "QuantizationReport": "quantization",
    "ShapeCheck": "verification",
    "SlotsReport": "onnx_adapters",
    "StoredWeight": "onnx_weights",
    "VerifyReport": "verification",
    "WeightCheck": "weight_check",
    "add_adapter_inputs": "onnx_adapters",
    "add_adapter_stacks": "onnx_batched",
    "append_adapter": "onnx_batched",
    "compare_onnx": "onnx_compare",
    "decoder_example": "decoders",
    "diagnose": "doctor",
    "encoder_example": "decoders",
    "export_onnx": "onnx_export",
    "export_onnx_adapters": "adapter_export",
    "export_onnx_batched": "adapter_export",
    "export_optimized": "onnx_optimization",
    "flat_cache_model": "decoders",
    "flat_decoder": "decoders",
    "flat_encoder": "decoders",
    "fold_into_onnx": "onnx_folding",
    "greedy": "generation",
    "greedy_seq2seq": "generation",
    "make_session": "sessions",
    "optimize_onnx": "onnx_optimization",
    "read_manifest": "onnx_weights",
    "unfold_onnx": "onnx_folding",
    "verify_onnx": "verification",
    "write_onnx_adapter": "onnx_adapters",
}

__all__ = [
    "AdapterSession",
    "AdaptersReport",
    "BoundRun",
    "Diagnosis",
    "Finding",
    "FoldedWeight",
    "OnnxDiff",
    "OnnxFoldReport",
    "OnnxReport",
    "OptimizeReport",
    "OutputError",
    "OutputQuality",
    "Quantization",
    "QuantizationReport",
    "ShapeCheck",
    "SlotsReport",
    "StoredWeight",
    "VerifyReport",
    "WeightCheck",
    "add_adapter_inputs",
    "add_adapter_stacks",
    "append_adapter",
    "compare_onnx",
    "decoder_example",
    "diagnose",
    "encoder_example",
    "export_onnx",
    "export_onnx_adapters",
    "export_onnx_batched",
    "export_optimized",
    "flat_cache_model",
    "flat_decoder",
    "flat_encoder",
    "fold_into_onnx",
    "greedy",
    "greedy_seq2seq",
    "make_session",
    "optimize_onnx",
    "read_manifest",
    "unfold_onnx",
    "verify_onnx",
    "write_onnx_adapter",
]


if not TYPE_CHECKING:  # which knows the names from above, and should refuse all others

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'exporters' has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__

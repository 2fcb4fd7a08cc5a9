"""From a folded graph to a checked ONNX file, and from the file to a session that runs where it says.

    export_onnx     writes the graph as an ONNX file that is op for op the base model's
    verify_onnx     runs torch and ONNX Runtime on the same inputs and compares
    compare_onnx    compares two ONNX files op for op, and their weights byte for byte
    make_session    opens an ONNX file on the provider asked for, or raises
    diagnose        says what is wrong with an installation of ONNX Runtime, and what mends it

Names load on first use: sessions and file comparison need neither torch nor a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .doctor import Diagnosis, Finding, diagnose
    from .onnx_compare import OnnxDiff, compare_onnx
    from .onnx_export import export_onnx
    from .onnx_report import OnnxReport
    from .onnx_weights import StoredWeight, read_manifest
    from .output_check import OutputError
    from .sessions import make_session
    from .verification import ShapeCheck, VerifyReport, verify_onnx
    from .weight_check import WeightCheck

_HOME = {
    "Diagnosis": "doctor",
    "Finding": "doctor",
    "OnnxDiff": "onnx_compare",
    "OnnxReport": "onnx_report",
    "OutputError": "output_check",
    "ShapeCheck": "verification",
    "StoredWeight": "onnx_weights",
    "VerifyReport": "verification",
    "WeightCheck": "weight_check",
    "compare_onnx": "onnx_compare",
    "diagnose": "doctor",
    "export_onnx": "onnx_export",
    "make_session": "sessions",
    "read_manifest": "onnx_weights",
    "verify_onnx": "verification",
}

__all__ = [
    "Diagnosis",
    "Finding",
    "OnnxDiff",
    "OnnxReport",
    "OutputError",
    "ShapeCheck",
    "StoredWeight",
    "VerifyReport",
    "WeightCheck",
    "compare_onnx",
    "diagnose",
    "export_onnx",
    "make_session",
    "read_manifest",
    "verify_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__

"""LoRA as a compiler pass: trace, inject, train, fold, and export what is, op for op, the base model.

    gm = lora_fx.trace(model, args, kwargs)
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=8, target_modules="all-linear"))
    ...                                  # train it like any module
    exporters.export_onnx(lora_fx.fold(gm), "model.onnx")

Torch is imported when a name that needs it is first used, not before: configurations, matching rules and
adapter files can be read without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_arrays import AdapterArrays, LowRankArrays, read_adapter
    from .adapters import load_adapter, save_adapter
    from .batching import batch_adapters, unbatch_adapters
    from .blocks import Block
    from .calibration import Calibration, calibrate
    from .checkpoint import CheckpointReport, fold_checkpoint
    from .checks import check_effect, check_fold
    from .combination import combine_adapters
    from .config import LoraConfig
    from .delta_comparison import AdapterComparison, compare_adapters
    from .delta_statistics import AdapterStatistics, adapter_statistics
    from .equivalence import GraphDiff, assert_equivalent, compare_graphs
    from .errors import (
        AdapterError,
        ConfigError,
        ExportError,
        FoldError,
        GraphError,
        LoraFxError,
        LoraFxWarning,
        TargetError,
    )
    from .fold_results import FoldReport
    from .folding import fold, fold_report, unfold
    from .graph_module import LoraGraphModule, TraceRecord, adapter_names, trace_record
    from .init_options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
    from .injection import inject
    from .optimization import optimize
    from .parameters import flat_parameters, lora_parameters, print_trainable_parameters, trainable_parameters
    from .plan import Plan, make_plan
    from .sites import Site, find_all_linear_names, find_sites
    from .swapping import swap_adapter
    from .switching import active_adapters, delete_adapter, disable_adapters, set_adapters
    from .tensor_parallel import distribute, tensor_parallel_plan
    from .tracing import trace
    from .unflattening import unflatten
    from .weight_binding import bind_weights

__version__ = "0.1.0"

_HOMES = {
    "adapter_arrays": ("AdapterArrays", "LowRankArrays", "read_adapter"),
    "adapters": ("load_adapter", "save_adapter"),
    "batching": ("batch_adapters", "unbatch_adapters"),
    "blocks": ("Block",),
    "calibration": ("Calibration", "calibrate"),
    "checkpoint": ("CheckpointReport", "fold_checkpoint"),
    "checks": ("check_effect", "check_fold"),
    "combination": ("combine_adapters",),
    "config": ("LoraConfig",),
    "delta_comparison": ("AdapterComparison", "compare_adapters"),
    "delta_statistics": ("AdapterStatistics", "adapter_statistics"),
    "equivalence": ("GraphDiff", "assert_equivalent", "compare_graphs"),
    "errors": (
        "AdapterError",
        "ConfigError",
        "ExportError",
        "FoldError",
        "GraphError",
        "LoraFxError",
        "LoraFxWarning",
        "TargetError",
    ),
    "fold_results": ("FoldReport",),
    "folding": ("fold", "fold_report", "unfold"),
    "graph_module": ("LoraGraphModule", "TraceRecord", "adapter_names", "trace_record"),
    "init_options": ("CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig"),
    "injection": ("inject",),
    "optimization": ("optimize",),
    "parameters": ("flat_parameters", "lora_parameters", "print_trainable_parameters", "trainable_parameters"),
    "plan": ("Plan", "make_plan"),
    "sites": ("Site", "find_all_linear_names", "find_sites"),
    "switching": ("active_adapters", "delete_adapter", "disable_adapters", "set_adapters"),
    "swapping": ("swap_adapter",),
    "tensor_parallel": ("distribute", "tensor_parallel_plan"),
    "tracing": ("trace",),
    "unflattening": ("unflatten",),
    "weight_binding": ("bind_weights",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterArrays",
    "AdapterComparison",
    "AdapterError",
    "AdapterStatistics",
    "Block",
    "Calibration",
    "CheckpointReport",
    "ConfigError",
    "CordaConfig",
    "EvaConfig",
    "ExportError",
    "FoldError",
    "FoldReport",
    "GraphDiff",
    "GraphError",
    "LoftQConfig",
    "LoraConfig",
    "LoraFxError",
    "LoraFxWarning",
    "LoraGAConfig",
    "LoraGraphModule",
    "LowRankArrays",
    "Plan",
    "Site",
    "TargetError",
    "TraceRecord",
    "__version__",
    "active_adapters",
    "adapter_names",
    "adapter_statistics",
    "assert_equivalent",
    "batch_adapters",
    "bind_weights",
    "calibrate",
    "check_effect",
    "check_fold",
    "combine_adapters",
    "compare_adapters",
    "compare_graphs",
    "delete_adapter",
    "disable_adapters",
    "distribute",
    "find_all_linear_names",
    "find_sites",
    "flat_parameters",
    "fold",
    "fold_checkpoint",
    "fold_report",
    "inject",
    "load_adapter",
    "lora_parameters",
    "make_plan",
    "optimize",
    "print_trainable_parameters",
    "read_adapter",
    "save_adapter",
    "set_adapters",
    "swap_adapter",
    "tensor_parallel_plan",
    "trace",
    "trace_record",
    "trainable_parameters",
    "unbatch_adapters",
    "unflatten",
    "unfold",
]


if not TYPE_CHECKING:  # which knows the names from above, and should refuse all others

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__

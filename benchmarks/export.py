"""Export: time and nodes of the base's ONNX, the folded one, and PEFT's unmerged one."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import exporters
import lora_fx

from . import workloads
from .checks import require
from .report import Table
from .workloads import Workload


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    cases = [workloads.bert()] if quick else [workloads.minilm(), workloads.gpt2(4, 256), workloads.llama(4, 256, 32)]
    rows = tuple(_row(case, rounds or 1) for case in cases)
    return (
        Table(
            "export to ONNX",
            ("model", "base s", "folded / base", "unmerged PEFT / base", "base nodes", "folded nodes", "unmerged nodes",
             "initializers that differ", "adapted"),
            rows,
            (
                "checked first: folded and base files have the same nodes, inputs, outputs, initializers and shapes",
                "base and folded times include the check in ONNX Runtime at two shapes; the unmerged one is "
                "torch.onnx.export of PEFT's model alone",
            ),
        ),
    )  # fmt: skip


def _row(workload: Workload, rounds: int) -> tuple[Any, ...]:
    peft_model, gm, injected = workloads.adapted_alike(workload)
    folded = lora_fx.fold(injected)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        seconds = {"base": 0.0, "folded": 0.0}
        for _ in range(rounds):
            for name, graph in (("base", gm), ("folded", folded)):
                started = time.process_time()
                report = exporters.export_onnx(graph, out / f"{name}.onnx")
                seconds[name] += time.process_time() - started
        diff = exporters.compare_onnx(out / "base.onnx", out / "folded.onnx")
        require(diff.same_graph, f"the folded file is not the base's, op for op:\n{diff}")
        started = time.process_time()
        nodes = unmerged_onnx(workload, peft_model, out / "unmerged.onnx")
        unmerged = time.process_time() - started
    base = seconds["base"] / rounds
    ratios = (seconds["folded"] / seconds["base"], unmerged / base)
    changed, adapted = len(diff.values_changed), workload.sites
    return (workload.name, base, *ratios, diff.nodes[0], report.nodes, nodes, changed, adapted)


def unmerged_onnx(workload: Workload, peft_model: Any, path: Path) -> int:
    """torch.onnx.export of PEFT's model as it is; the number of nodes."""
    import onnx
    import torch

    args, kwargs = workload.inputs
    free = {name: {0: "batch", 1: "sequence"} if isinstance(v, torch.Tensor) else None for name, v in kwargs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            peft_model.get_base_model(), args, path, kwargs=kwargs, dynamic_shapes=free, dynamo=True, verbose=False
        )
    return len(onnx.load(path, load_external_data=False).graph.node)

"""Latency in ONNX Runtime: folded, base, base again as the control, and PEFT's unmerged export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import exporters
import lora_fx

from . import workloads
from .checks import require
from .export import unmerged_onnx
from .report import Table
from .timing import Variant, interleave
from .workloads import Workload


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    workload = workloads.bert() if quick else workloads.minilm()
    rounds = rounds or (15 if quick else 60)
    return (
        Table(
            f"one call in ONNX Runtime, CPU, one thread ({rounds} rounds; {workload.name})",
            ("file", "nodes", "median ms", "/ base", "spread"),
            tuple(_rows(workload, rounds)),
            (
                "checked first: the folded file gives what the adapted torch model gives",
                "base again is the same file in a second session: what it differs by is the noise",
            ),
        ),
    )


def _rows(workload: Workload, rounds: int) -> list[tuple[Any, ...]]:
    import onnxruntime as ort

    peft_model, gm, injected = workloads.adapted_alike(workload)
    folded = lora_fx.fold(injected)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        nodes = {
            "base": exporters.export_onnx(gm, out / "base.onnx").nodes,
            "folded": exporters.export_onnx(folded, out / "folded.onnx").nodes,
            "unmerged PEFT": unmerged_onnx(workload, peft_model, out / "unmerged PEFT.onnx"),
        }
        report = exporters.verify_onnx(out / "folded.onnx", injected, provider="cpu")
        require(report.ok, f"the folded file is wrong:\n{report}")
        sessions = {
            name: ort.InferenceSession(
                str(out / f"{name.removesuffix(' again')}.onnx"), options, ["CPUExecutionProvider"]
            )
            for name in ("base", "base again", "folded", "unmerged PEFT")
        }
    feeds = {name: _feed(workload, session) for name, session in sessions.items()}
    variants = {n: Variant(lambda _, s=s, f=feeds[n]: s.run(None, f)) for n, s in sessions.items()}
    times = interleave(variants, rounds, warmup=3)
    return [
        (
            name,
            nodes[name.removesuffix(" again")],
            1e3 * times.median(name),
            times.ratio(name, "base"),
            times.spread(name),
        )
        for name in sessions
    ]


def _feed(workload: Workload, session: Any) -> dict[str, np.ndarray[Any, Any]]:
    _, kwargs = workload.inputs
    return {node.name: kwargs[node.name].numpy() for node in session.get_inputs()}

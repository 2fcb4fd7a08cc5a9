"""Latency in ONNX Runtime: folded, base, base again as the control, and PEFT's unmerged export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import exporters
import lora_fx

from . import workloads
from .checks import assert_effect, assert_same, require
from .export import count_nodes, torch_onnx
from .report import Table
from .timing import Variant, interleave
from .workloads import Workload

BASE, CONTROL, FOLDED, UNMERGED = "base", "base again (control)", "folded", "PEFT unmerged"


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    workload = workloads.bert() if quick else workloads.minilm()
    return (_table(workload, rounds or (25 if quick else 100)),)


def _table(workload: Workload, rounds: int) -> Table:
    with tempfile.TemporaryDirectory() as temporary:
        files, said = _files(workload, Path(temporary))
        nodes = {name: count_nodes(file) for name, file in files.items()}
        optimized = {name: Path(temporary) / f"{file.stem} optimized.onnx" for name, file in files.items()}
        sessions = {name: _session(file, optimized[name]) for name, file in files.items()}
        left = {name: count_nodes(file) for name, file in optimized.items()}
    feeds = {name: _feed(workload, session) for name, session in sessions.items()}
    said = f"{said}; {_check(sessions, feeds)}"
    times = interleave({name: _call(sessions[name], feeds[name]) for name in sessions}, rounds, warmup=3, collect=False)
    rows = [
        (name, nodes[name], left[name], 1e3 * times.median(name), times.ratio(name, BASE), f"{times.spread(name):.0%}")
        for name in sessions
    ]
    tokens = workload.inputs[1]["input_ids"]
    return Table(
        f"one call in ONNX Runtime, CPU, one thread: {workload.name}, {len(tokens)} × {tokens.shape[1]} tokens "
        f"({rounds} rounds)",
        ("file", "nodes", "after ORT's fusion", "median ms", "/ base", "spread"),
        tuple(rows),
        (
            f"checked first: {said}",
            "the control is the base's file in a second session: what it differs from 1 by is the noise",
        ),
    )


def _files(workload: Workload, out: Path) -> tuple[dict[str, Path], str]:
    peft_model, gm, injected = workloads.adapted_alike(workload)
    files = {BASE: out / "base.onnx", CONTROL: out / "again.onnx", FOLDED: out / "folded.onnx"}
    exporters.export_onnx(gm, files[BASE], check=False)
    files[CONTROL].write_bytes(files[BASE].read_bytes())
    exporters.export_onnx(lora_fx.fold(injected), files[FOLDED], check=False)
    unmerged: Any = peft_model.get_base_model()  # type: ignore[operator]
    torch_onnx(workload, unmerged, out / "unmerged.onnx")
    report = exporters.verify_onnx(files[FOLDED], injected, provider="cpu")
    require(report.ok, f"the folded file is wrong:\n{report}")
    return files | {UNMERGED: out / "unmerged.onnx"}, "the folded file gives the adapted torch model's output"


def _session(path: Path, optimized: Path) -> Any:
    """A session on one thread, which also writes down what ORT's own fusions leave."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check(sessions: dict[str, Any], feeds: dict[str, Any]) -> str:
    outputs = {name: torch.from_numpy(session.run(None, feeds[name])[0]) for name, session in sessions.items()}
    require(torch.equal(outputs[BASE], outputs[CONTROL]), "the same file gives two outputs")
    assert_effect("the folded file", outputs[FOLDED], outputs[BASE], eps=2560)
    error = assert_same("folded against PEFT unmerged, both in ONNX Runtime", outputs[FOLDED], outputs[UNMERGED])
    return f"PEFT's unmerged file gives the same within {error:.1e}"


def _call(session: Any, feed: dict[str, Any]) -> Variant:
    return Variant(lambda _: session.run(None, feed))


def _feed(workload: Workload, session: Any) -> dict[str, np.ndarray[Any, Any]]:
    _, kwargs = workload.inputs
    return {node.name: kwargs[node.name].numpy() for node in session.get_inputs()}

"""Export: time and nodes of the base's ONNX file, the folded one, and PEFT's, unmerged and merged."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import exporters
import lora_fx

from . import workloads
from .checks import require
from .report import Table
from .timing import Times, Variant, interleave
from .workloads import Workload


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    cases = [workloads.bert()] if quick else [workloads.minilm(), workloads.gpt2(4, 256), workloads.llama(4, 256, 32)]
    rounds = rounds or 2
    return tuple(_table(case, rounds) for case in cases)


def _table(workload: Workload, rounds: int) -> Table:
    peft_model, gm, injected = workloads.adapted_alike(workload)
    folded = lora_fx.fold(injected)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        said = check(gm, folded, injected, out, workload)
        times = _times(workload, peft_model, gm, folded, out, rounds)
        nodes = {file.stem: count_nodes(file) for file in out.glob("*.onnx")}
    names = {
        "export_onnx: base": "base",
        "export_onnx: base again (control)": "base",
        "export_onnx: folded": "folded",
        "torch.onnx.export: base": "torch base",
        "torch.onnx.export: PEFT merged": "merged",
        "torch.onnx.export: PEFT unmerged": "unmerged",
    }
    rows = [
        (name, times.median(name), times.ratio(name, _baseline(name)), nodes[file], nodes[file] - nodes["base"])
        for name, file in names.items()
    ]
    return Table(
        f"export to ONNX: {workload.name} ({rounds} rounds)",
        ("what", "s", "/ base, same exporter", "nodes", "more than base"),
        tuple(rows),
        (
            f"checked first: {said}",
            "times are without export_onnx's own check in ONNX Runtime, which torch.onnx.export does not make. "
            "Each holds one torch.export: export_onnx of the traced graph, torch.onnx.export of the model itself",
        ),
    )


def _baseline(name: str) -> str:
    return f"{name.partition(':')[0]}: base"


def check(gm: Any, folded: Any, injected: Any, out: Path, workload: Workload) -> str:
    """The folded file is the base's but for the adapted weights, and computes the adapted model's output."""
    exporters.export_onnx(gm, out / "base.onnx")
    exporters.export_onnx(folded, out / "folded.onnx")
    diff = exporters.compare_onnx(out / "base.onnx", out / "folded.onnx")
    require(diff.same_graph, f"the folded file is not the base's, op for op:\n{diff}")
    changed = len(diff.values_changed)
    require(changed == workload.sites, f"{changed} initializers differ, {workload.sites} weights are adapted")
    report = exporters.verify_onnx(out / "folded.onnx", injected, provider="cpu")
    require(report.ok, f"the folded file does not compute what the adapted model computes:\n{report}")
    return (
        f"the folded file has the base's graph, exactly the {changed} adapted weights differ, and it gives the "
        "adapted torch model's output"
    )


def _times(workload: Workload, peft_model: Any, gm: Any, folded: Any, out: Path, rounds: int) -> Times:
    merged: Any = workloads.unmerged_copy(peft_model)
    plain = {
        "torch base": workload.make(),
        "merged": merged.merge_and_unload(),
        "unmerged": peft_model.get_base_model(),
    }
    return interleave(
        {
            "export_onnx: base": _ours(gm, out / "base.onnx"),
            "export_onnx: base again (control)": _ours(gm, out / "base.onnx"),
            "export_onnx: folded": _ours(folded, out / "folded.onnx"),
            "torch.onnx.export: base": _theirs(workload, plain["torch base"], out / "torch base.onnx"),
            "torch.onnx.export: PEFT merged": _theirs(workload, plain["merged"], out / "merged.onnx"),
            "torch.onnx.export: PEFT unmerged": _theirs(workload, plain["unmerged"], out / "unmerged.onnx"),
        },
        rounds,
        warmup=0,  # the check has exported already
    )


def _ours(gm: Any, path: Path) -> Variant:
    return Variant(lambda _: exporters.export_onnx(gm, path, check=False))


def _theirs(workload: Workload, model: nn.Module, path: Path) -> Variant:
    return Variant(lambda _: torch_onnx(workload, model, path))


def torch_onnx(workload: Workload, model: nn.Module, path: Path) -> None:
    """torch.onnx.export of a module as it is, batch and sequence free."""
    args, kwargs = workload.inputs
    free = {name: {0: "batch", 1: "sequence"} if isinstance(v, torch.Tensor) else None for name, v in kwargs.items()}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, args, path, kwargs=kwargs, dynamic_shapes=free, dynamo=True, verbose=False)


def count_nodes(path: Path) -> int:
    """The nodes of the file's main graph."""
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)

"""What a user of the installed package writes, for .ci/package.py: mypy --strict and pyright have to agree on it."""

from pathlib import Path
from typing import assert_type

import torch
from torch import nn

import exporters
import lora_fx


def adapt(model: nn.Module, x: torch.Tensor) -> lora_fx.LoraGraphModule:
    """Trace, plan, inject, train one step."""
    gm = lora_fx.trace(model, (x,), dynamic_shapes={"input": {0: "batch"}})
    assert_type(gm, lora_fx.LoraGraphModule)
    config = lora_fx.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], rank_pattern={"0": 2})
    plan = lora_fx.make_plan(gm, config)
    assert_type(plan.parameters, int)
    assert_type(plan.targets[0].site.path, str)
    gm = lora_fx.inject(gm, plan, adapter_name="french")
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(gm, "french"), lr=1e-3)
    optimizer.step()
    with lora_fx.disable_adapters(gm):
        gm(x)
    return gm


def ship(gm: lora_fx.LoraGraphModule, path: Path) -> None:
    """Fold, export, verify, run."""
    folded = lora_fx.fold(gm)
    assert_type(folded, lora_fx.LoraGraphModule)
    report = exporters.export_onnx(folded, path, quantize="int8")
    assert_type(report, exporters.OnnxReport)
    verification = exporters.verify_onnx(path, folded)
    assert_type(verification.ok, bool)
    assert_type(report._repr_html_(), str)
    try:
        exporters.fold_into_onnx(path, "adapter", "out.onnx")
    except lora_fx.ExportError as error:
        print(error)


def wrong(gm: lora_fx.LoraGraphModule) -> None:
    """Calls that both checkers have to refuse: an ignore that nothing needs is an error to them."""
    lora_fx.inject(gm)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lora_fx.LoraConfig(8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lora_fx.load_adapter(gm, "dir", integrity="maybe")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lora_fx.nonsense()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    exporters.nonsense()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]

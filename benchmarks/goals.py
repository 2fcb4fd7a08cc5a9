"""The goals that this project set itself for a training step, each with what is measured, and whether it is met."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch

import lora_fx

from . import adapters, folding, injection, optimizer, training, workloads
from .counters import memory_of, python_calls
from .report import Table
from .training import Counts, check, count_step, floor_step, lora_step
from .workloads import Workload


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """What is counted, which does not depend on how busy the machine is; and what is timed, which does."""
    return tuple(_with_caveat(table) if quick else table for table in (_counted(quick), _timed(quick, rounds)))


def _with_caveat(table: Table) -> Table:
    note = "the limits are those of the full sizes; these models are so small that some cannot be met"
    return replace(table, notes=(note, *table.notes))


def _counted(quick: bool) -> Table:
    layers, hidden, tokens = (2, 128, 64) if quick else (12, 768, 256)
    rows: list[tuple[Any, ...]] = []

    def goal(number: int, what: str, most: float, found: float) -> None:
        rows.append((number, what, most, found, "yes" if found <= most else "no"))

    plain = _counts(workloads.llama(layers, hidden, tokens))
    goal(1, "FLOPs / PEFT, float32", 1.01, _ratio(plain, "flops"))
    goal(3, "kept bytes / PEFT, float32", 0.66, _ratio(plain, "saved"))
    goal(6, "kernels / PEFT, float32", 0.76, _ratio(plain, "kernels"))
    dropped = _counts(workloads.llama(layers, hidden, tokens), lora_dropout=0.05)
    goal(4, "kept bytes / PEFT, lora_dropout 0.05", 0.45, _ratio(dropped, "saved"))
    half = _counts(workloads.llama(layers, hidden, tokens, dtype=torch.bfloat16))
    goal(5, "kept bytes / PEFT, bfloat16 base", 0.45, _ratio(half, "saved"))
    goal(6, "kernels / PEFT, bfloat16 base, float32 adapters", 0.66, _ratio(half, "kernels"))
    narrow = _counts(workloads.llama(layers, hidden, tokens, dtype=torch.bfloat16), adapter_dtype=torch.bfloat16)
    goal(6, "kernels / PEFT, bfloat16 base and adapters", 0.66, _ratio(narrow, "kernels"))
    long = 256 if quick else 2048
    goal(
        7,
        f"moved bytes / PEFT, float32, {long} tokens",
        0.77,
        _ratio(_counts(workloads.llama(2, hidden, long)), "moved"),
    )
    goal(
        7, f"moved bytes / PEFT, bfloat16, {long} tokens", 0.58,
        _ratio(_counts(workloads.llama(2, hidden, long, dtype=torch.bfloat16)), "moved"),
    )  # fmt: skip
    gpt2 = _counts(_all_of_gpt2(layers, hidden, tokens))
    goal(9, "kept bytes / PEFT, GPT-2 and its own gelu", 0.60, _ratio(gpt2, "saved"))
    goal(
        10,
        "FLOPs / PEFT, checkpointed, adapters in the last third of the layers",
        0.60,
        _last_layers(layers, hidden, tokens),
    )
    small = workloads.llama(2, 128, 4 * 128)  # 4 T*, with T* = 2 · in · out / (in + out) tokens
    merged = _counts(small, merge=True)
    added = {name: merged[name].flops - merged["floor"].flops for name in ("PEFT", "optimized")}
    goal(2, "LoRA's own FLOPs / PEFT's at 4 T* tokens, merge=True", 0.75, added["optimized"] / added["PEFT"])
    for name, calls in _calls(workloads.llama(layers, 128, 16)).items():
        goal(27, f"Python and C calls of a forward pass / PEFT, {name}", 0.5, calls)
    goal(8, "peak memory of forward and backward / PEFT", 0.72, _peaks(workloads.llama(layers, hidden, tokens)))
    goal(14, "nodes that folding leaves, of a graph and of an .onnx", 0, sum(_nodes_left(quick)))
    few, many = (workloads.linear_stack(sites) for sites in ((20, 80) if quick else (100, 400)))
    visits = [injection.inject_visits(each, workloads.traced(each))[0] / each.sites for each in (few, many)]
    goal(17, f"graph nodes visited per site, {many.sites} sites / {few.sites} sites", 1.05, visits[1] / visits[0])
    for dtype, most in ((torch.float32, 0.0), (torch.bfloat16, 4.0)):
        peaks = [_fold_peak(workloads.llama(2, size, 16, dtype=dtype)) / 2**20 for size in (hidden, 2 * hidden)]
        what = f"extra memory of a fold for good, MiB, {str(dtype).removeprefix('torch.')}"
        goal(20, what, most, peaks[0])
        if dtype is torch.float32:
            goal(20, f"{what}: what weights of twice the width add", most, peaks[1] - peaks[0])
        else:
            goal(20, f"{what}, twice the width", most, peaks[1])
    step = optimizer.step_table(workloads.llama(layers, 64, 8), 1)
    goal(26, "kernels of an optimizer's step, 168 tensors", 4, step.rows[-1][1])
    return Table(
        f"goals: Llama, {layers} layers × {hidden}, {tokens} tokens where nothing else is said",
        ("row", "what", "at most", "measured", "met"),
        tuple(sorted(rows, key=lambda row: row[0])),
        (
            "counted, not timed; lora_fx is `optimize(injected)`, whose gradients were checked against PEFT's first",
            "row 20, float32: r × r numbers that tell how much of the delta is kept, whatever the size of the weights",
        ),
    )


def _timed(quick: bool, rounds: int | None) -> Table:
    """Ratios of medians, in one process, interleaved; each subject checks its results before it times them."""
    rounds = rounds or (3 if quick else 25)
    layers, hidden, wide = (2, 128, 128) if quick else (12, 768, 2048)
    rows: list[tuple[Any, ...]] = []

    def goal(number: int, what: str, most: float, found: float) -> None:
        rows.append((number, what, most, found, "yes" if found <= most else "no"))

    trained = workloads.llama(2, hidden, 64 if quick else 512)
    for number, most, p in ((11, 0.95, 0.0), (12, 0.93, 0.05)):
        table = training.time_table(trained, rounds, lora_dropout=p)
        dropout = f", lora_dropout {p}, dropout='cut'" if p else ""
        name = "optimize(dropout='cut')" if p else "optimize()"
        goal(number, f"step / PEFT{dropout} (floor {_cell(table, 'floor', 2):.2f})", most, _cell(table, name, 2))
    llama = workloads.llama(layers, hidden, 16)
    times = injection.inject_times(llama, workloads.traced(llama), rounds)
    for name, what in (("lora_fx", "inject"), ("lora_fx, code", "inject, and the code that its first call writes")):
        goal(16, f"{what} / PEFT, Llama", 1.0, times.ratio(name, "PEFT"))
        goal(16, f"{what}, ms per linear", 1.2, 1e3 * times.median(name) / llama.sites)
    nth = injection.nth_adapter_table(20 if quick else 200, rounds)
    goal(17, "the third adapter / the first", 1.0, nth.rows[2][1] / nth.rows[0][1])
    shapes = [(layers, hidden, torch.float32, 0.40), (2, wide, torch.float32, 0.15), (2, wide, torch.bfloat16, 0.12)]
    for depth, size, dtype, most in shapes:
        subject = folding.make_subject(workloads.llama(depth, size, 16, dtype=dtype))
        name, theirs = "lora_fx.fold inplace, irreversible", "PEFT merge_and_unload"
        times = folding.fold_times(subject, rounds, (name, theirs))
        floor = times.ratio("floor: addmm only", theirs)
        shape = f"{depth} × {size}, {str(dtype).removeprefix('torch.')}"
        what = f"fold for good / merge_and_unload, {shape} (floor {floor:.2f})"
        goal(19, what, most, times.ratio(name, theirs))
    swap = adapters.swap_table(llama, rounds)
    goal(24, "swap / set_peft_model_state_dict", 0.08, _cell(swap, "lora_fx, finite=True", 2))
    goal(24, "swap, ms", 2.5, _cell(swap, "lora_fx, finite=True", 1))
    mixed = adapters.batch_table(workloads.llama(2 if quick else 4, 256 if quick else 512, 2), rounds)
    goal(25, "mixed batch of 8 adapters / PEFT", 0.45, _cell(mixed, "lora_fx, adapter_ids", 2))
    step = optimizer.step_table(llama, rounds)
    goal(26, "AdamW's step / PEFT's default", 0.20, step.rows[-1][3])
    return Table(
        f"goals that are timed ({rounds} rounds)",
        ("row", "what", "at most", "measured", "met"),
        tuple(rows),
        (f"step: PEFT against itself reads {_cell(table, 'PEFT again (control)', 2):.2f}",),
    )


def _cell(table: Table, name: str, column: int) -> Any:
    return next(row[column] for row in table.rows if row[0] == name)


def _peaks(workload: Workload) -> float:
    peft_model, _, injected = workloads.adapted_alike(workload)
    peaks = []
    for model in (peft_model.train(), lora_fx.optimize(injected).train()):
        step = lora_step(model, workload)
        step().backward()  # type: ignore[no-untyped-call]  # the gradients are there from here on
        peaks.append(memory_of(lambda _, step=step: step().backward()).peak)  # type: ignore[misc]
    return peaks[1] / peaks[0]


def _nodes_left(quick: bool) -> tuple[int, int]:
    """What a folded graph, and its .onnx, have more than the base's."""
    import exporters

    workload = workloads.bert(2, 64 if quick else 128)
    _, gm, injected = workloads.adapted_alike(workload)
    folded = lora_fx.fold(injected)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("base.onnx", "folded.onnx")]
        for graph, path in zip((gm, folded), paths, strict=True):
            exporters.export_onnx(graph.eval(), path)
        counts = [len(onnx.load(path, load_external_data=False).graph.node) for path in paths]
    return abs(len(folded.graph.nodes) - len(gm.graph.nodes)), abs(counts[1] - counts[0])


def _fold_peak(workload: Workload) -> int:
    _, _, injected = workloads.adapted_alike(workload)
    lora_fx.fold(injected)  # what is cached on first use is no weight's cost
    return memory_of(
        lambda gm: lora_fx.fold(gm, inplace=True, reversible=False), prepare=lambda: copy.deepcopy(injected)
    ).peak


def _ratio(counts: dict[str, Counts], what: str) -> float:
    ratio: float = getattr(counts["optimized"], what) / getattr(counts["PEFT"], what)
    return ratio


def _counts(
    workload: Workload, *, lora_dropout: float = 0.0, adapter_dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Counts]:
    peft_model, gm, injected = workloads.adapted_alike(workload, lora_dropout=lora_dropout)
    check(peft_model, injected, workload)
    if adapter_dtype is not None:
        injected = lora_fx.inject(gm, workload.fields(lora_dropout=lora_dropout), adapter_dtype=adapter_dtype)
    optimized = lora_fx.optimize(injected, **options)
    counts = {
        name: count_step(model.train(), lora_step(model, workload))
        for name, model in (("PEFT", peft_model), ("optimized", optimized))
    }
    base: Any = workload.make().train()
    if hasattr(base, "get_input_embeddings"):
        counts["floor"] = count_step(base, floor_step(base, workload))
    return counts


def _last_layers(layers: int, hidden: int, tokens: int) -> float:
    """Both checkpoint each layer; PEFT's users let a gradient into the embeddings, or else nothing would flow."""
    workload = workloads.llama(layers, hidden, tokens)
    last = list(range(layers - max(layers // 3, 1), layers))
    workload = replace(workload, options={**workload.options, "layers_to_transform": last})
    peft_model, _, injected = workloads.adapted_alike(workload)
    check(peft_model, injected, workload)
    optimized = lora_fx.optimize(injected, checkpoint=True)
    model: Any = peft_model
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    flops = [count_step(m.train(), lora_step(m, workload)).flops for m in (model, optimized)]
    return flops[1] / flops[0]


def _all_of_gpt2(layers: int, hidden: int, tokens: int) -> Workload:
    """GPT-2 with LoRA on every linear: its gelu, written out in eight ops, goes into one of them."""
    return replace(workloads.gpt2(layers, hidden, tokens), targets=("c_attn", "c_proj", "c_fc"), sites=4 * layers)


def _calls(workload: Workload) -> dict[str, float]:
    peft_model, _, injected = workloads.adapted_alike(workload)
    args, kwargs = workload.inputs
    calls = {}
    models = {"PEFT": peft_model, "injected": injected, "optimized": lora_fx.optimize(injected)}
    for name, model in models.items():
        model.train()(*args, **kwargs)
        calls[name] = python_calls(lambda model=model: model(*args, **kwargs))  # type: ignore[misc]
    return {name: count / calls["PEFT"] for name, count in calls.items() if name != "PEFT"}

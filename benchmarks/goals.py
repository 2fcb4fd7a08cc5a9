"""The goals that this project set itself for a training step, each with what is measured, and whether it is met."""

from __future__ import annotations

from typing import Any

import torch

import lora_fx

from . import workloads
from .counters import python_calls
from .report import Table
from .training import Counts, check, count_step, floor_step, lora_step
from .workloads import Workload


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """Counted goals; none of them depends on how busy the machine is."""
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
    return (
        Table(
            f"goals: Llama, {layers} layers × {hidden}, {tokens} tokens where nothing else is said",
            ("row", "what", "at most", "measured", "met"),
            tuple(sorted(rows, key=lambda row: row[0])),
            ("counted, not timed; lora_fx is `optimize(injected)`, whose gradients were checked against PEFT's first",),
        ),
    )


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
    from dataclasses import replace

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
    from dataclasses import replace

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

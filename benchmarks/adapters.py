"""Many adapters: other values for one that is there, and a batch whose rows belong to different ones; against PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

import lora_fx

from . import workloads
from .checks import adapters_of, assert_effect, assert_same, first_tensor, require
from .counters import OpCounter
from .report import Table
from .timing import Variant, interleave
from .workloads import Workload

ADAPTERS = 8


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    rounds = rounds or (9 if quick else 25)
    swapped = workloads.llama(12, 128 if quick else 768, 16)  # 84 sites, 168 tensors
    mixed = workloads.llama(2, 256, 2) if quick else workloads.llama(4, 512, 2)
    tables = [batch_table(replace(mixed, r=r), rounds) for r in (8, 16)]
    return swap_table(swapped, rounds), *tables


def swap_table(workload: Workload, rounds: int) -> Table:
    """Values from memory into an adapter that is there."""
    import peft

    peft_model, _, injected = workloads.adapted_alike(workload)
    state: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(peft_model)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(3)
    sets = [
        {name: torch.randn(t.shape, generator=generator).mul_(0.02).to(t.dtype) for name, t in state.items()}
        for _ in range(2)
    ]
    args, kwargs = workload.inputs
    before = first_tensor(injected(*args, **kwargs))
    for values in sets:  # each twice: with keys that are new, and with keys that are known
        peft.set_peft_model_state_dict(peft_model, values)  # type: ignore[no-untyped-call]
        lora_fx.swap_adapter(injected, "default", values)
        mine, theirs = first_tensor(injected(*args, **kwargs)), first_tensor(peft_model(*args, **kwargs))
        assert_effect("the swapped adapter", mine, before)
        error = assert_same("the output with swapped values", mine, theirs, eps=1024.0)
    targets = [p.detach() for p in adapters_of(injected).values()]
    turn = iter(range(10**9))

    def in_turn() -> dict[str, torch.Tensor]:
        return sets[next(turn) % 2]

    variants = {
        "PEFT, set_peft_model_state_dict": Variant(
            lambda values: peft.set_peft_model_state_dict(peft_model, values), in_turn
        ),
        "lora_fx, swap_adapter": Variant(lambda values: lora_fx.swap_adapter(injected, "default", values), in_turn),
        "lora_fx, finite=True": Variant(
            lambda values: lora_fx.swap_adapter(injected, "default", values, finite=True), in_turn
        ),
        "floor: copies, nothing checked": Variant(
            lambda values: torch._foreach_copy_(targets, list(values.values())), in_turn
        ),
    }
    with torch.no_grad():
        times = interleave(variants, rounds)
    first = next(iter(variants))
    rows = [
        (name, 1e3 * times.median(name), times.ratio(name, first), f"{times.spread(name):.0%}") for name in variants
    ]
    count, size = len(state), sum(t.numel() * t.element_size() for t in state.values()) / 2**20
    return Table(
        f"values of an adapter swapped from memory: {workload.name}, {count} tensors, {size:.1f} MiB ({rounds} rounds)",
        ("way", "ms", "/ PEFT", "spread"),
        tuple(rows),
        (
            f"checked first: outputs equal PEFT's within {error:.1e} after each swap",
            "swap_adapter looks for NaN, Inf, missing, unexpected and mis-shaped tensors before it changes anything; "
            "with finite=True for all but NaN and Inf",
        ),
    )


def batch_table(workload: Workload, rounds: int) -> Table:
    """One token for each of eight rows, each row with an adapter of its own."""
    ids = torch.randint(0, 512, (ADAPTERS, 1), generator=torch.Generator().manual_seed(1))
    workload = replace(workload, inputs=((), {"input_ids": ids, "use_cache": False}))
    names = [f"x{index}" for index in range(ADAPTERS)]
    peft_model, batched = _batched_alike(workload, names)
    base: Any = workload.make()
    kwargs = workload.inputs[1]
    rows_of = torch.arange(1, ADAPTERS + 1)
    calls = {
        "PEFT, adapter_names": lambda _: peft_model(**kwargs, adapter_names=names),
        "lora_fx, adapter_ids": lambda _: batched(**kwargs, adapter_ids=rows_of),
        "base, no adapter": lambda _: base(**kwargs),
    }
    with torch.no_grad():
        outputs = {name: first_tensor(call(None)) for name, call in calls.items()}
        theirs, mine, plain = outputs.values()
        assert_effect("the adapters", mine, plain)
        error = assert_same("the mixed batch", mine, theirs, eps=4096.0)
        turned = first_tensor(batched(**kwargs, adapter_ids=rows_of.flip(0)))
        require(not torch.equal(turned, mine), "another mix gives the same output")
        times = interleave({name: Variant(call) for name, call in calls.items()}, rounds)
        kernels = {name: _kernels(call) for name, call in calls.items()}
    first = next(iter(calls))
    rows = [
        (
            name,
            1e3 * times.median(name),
            times.ratio(name, first),
            f"{times.spread(name):.0%}",
            kernels[name],
            kernels[name] / kernels[first],
        )
        for name in calls
    ]
    return Table(
        f"{ADAPTERS} rows of one token, {ADAPTERS} adapters: {workload.name}, r = {workload.r} ({rounds} rounds)",
        ("way", "ms", "/ PEFT", "spread", "kernels", "/ PEFT "),
        tuple(rows),
        (f"checked first: the mixed batch equals PEFT's within {error:.1e}",),
    )


def _kernels(call: Any) -> int:
    with OpCounter() as counter:
        call(None)
    return counter.kernels


def _batched_alike(workload: Workload, names: list[str]) -> tuple[Any, Any]:
    """PEFT's model with all adapters and lora_fx's batched graph, with the same values."""
    import peft

    model: Any = peft.get_peft_model(workload.make(), peft.LoraConfig(**workload.fields()), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**workload.fields()))
    workloads.randomise(model, relative=0.5)
    graph = workloads.traced(workload)
    for name in names:
        graph = lora_fx.inject(graph, lora_fx.LoraConfig(**workload.fields()), adapter_name=name)
    values: dict[str, nn.Parameter] = adapters_of(model)
    with torch.no_grad():
        for name, parameter in adapters_of(graph).items():
            parameter.copy_(values[name])
    return model.eval(), lora_fx.batch_adapters(graph).eval()

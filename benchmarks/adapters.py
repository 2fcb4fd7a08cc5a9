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
    trained = workloads.llama(2, 64, 16) if quick else workloads.llama(2, 1024, 32)
    many = many_table(replace(trained, r=8), (1, 2, 4, 8) if quick else (1, 2, 4, 8, 16), rounds)
    return swap_table(swapped, rounds), *tables, many


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


def many_table(workload: Workload, counts: tuple[int, ...], rounds: int) -> Table:
    """A training step of N adapters in one graph, two rows each, against N steps of one in a graph of its own."""
    steps = {count: _training_step(workload, count) for count in counts}
    steps[0] = _training_step(workload, 1, batched=False)
    for count in counts:
        _check_training(workload, count)
    times = interleave({str(count): Variant(lambda _, step=step: step()) for count, step in steps.items()}, rounds)
    rows = []
    counted = {}
    for count, step in steps.items():
        with OpCounter() as counter:
            step()
        counted[count] = counter.kernels, counter.flops
    for count in (0, *counts):
        per = max(count, 1)
        kernels, flops = counted[count]
        rows.append(
            (
                f"{count} at once" if count else "one, in a graph of its own",
                kernels,
                kernels / per / counted[0][0],
                flops / per / counted[0][1],
                1e3 * times.median(str(count)),
                times.ratio(str(count), "0") / per,
                f"{times.spread(str(count)):.0%}",
            )
        )
    return Table(
        f"a training step of many adapters: {workload.name}, r = {workload.r}, two rows each, AdamW ({rounds} rounds)",
        ("adapters", "kernels", "/ N runs", "FLOPs / N runs", "ms", "/ N runs ", "spread"),
        tuple(rows),
        (
            "checked first: each adapter's gradients are those of a run of its own",
            "each has a learning rate of its own",
        ),
    )


def _many(workload: Workload, count: int) -> tuple[Any, torch.Tensor]:
    """A graph with so many adapters, B ≠ 0, and two rows for each."""
    tokens = workload.inputs[1]["input_ids"].shape[1]
    ids = torch.randint(0, 512, (2 * count, tokens), generator=torch.Generator().manual_seed(1))
    graph = workloads.traced(replace(workload, inputs=((), {"input_ids": ids[:2], "use_cache": False})))
    for index in range(count):
        graph = lora_fx.inject(graph, lora_fx.LoraConfig(**workload.fields()), adapter_name=f"x{index}")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(graph):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return graph, ids


def _loss(graph: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The sum of what each two rows give alone: their mean, here."""
    logits = first_tensor(graph(input_ids=ids, use_cache=False, **kwargs))
    total: torch.Tensor = logits.log_softmax(-1).square().mean() * (len(ids) // 2)
    return total


def _training_step(workload: Workload, count: int, *, batched: bool = True) -> Any:
    graph, ids = _many(workload, count)
    names, kwargs = [f"x{index}" for index in range(count)], {}
    if batched:
        graph = lora_fx.batch_adapters(graph)
        kwargs = {"adapter_ids": torch.arange(1, count + 1).repeat_interleave(2)}
    groups = [
        {"params": lora_fx.lora_parameters(graph, name), "lr": 1e-4 * (1 + index)} for index, name in enumerate(names)
    ]
    optimizer = torch.optim.AdamW(groups)
    graph.train()

    def step() -> None:
        _loss(graph, ids, **kwargs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _check_training(workload: Workload, count: int) -> None:
    graph, ids = _many(workload, count)
    batched = lora_fx.batch_adapters(graph).train()
    _loss(batched, ids, adapter_ids=torch.arange(1, count + 1).repeat_interleave(2)).backward()
    for index in range(count):
        lora_fx.set_adapters(graph.train(), f"x{index}")
        own = lora_fx.lora_parameters(graph, f"x{index}")
        gradients = torch.autograd.grad(_loss(graph, ids[2 * index : 2 * index + 2]), own)
        for part, gradient in zip(lora_fx.lora_parameters(batched, f"x{index}"), gradients, strict=True):
            assert_same(f"a gradient of adapter {index}", part.grad, gradient, eps=4096.0)


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

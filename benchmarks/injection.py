"""Inject: time and exact work over the number of sites, against PEFT and against making A and B alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx.graph_module import record_of

from . import workloads
from .checks import assert_effect, assert_same, copy_adapter, first_tensor, require
from .counters import node_visits, python_calls
from .report import Table
from .timing import Times, Variant, exponent, interleave
from .workloads import Workload

SITES = (50, 100, 200, 500, 1000, 2000)
QUICK_SITES = (50, 100, 200)


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    sizes = QUICK_SITES if quick else SITES
    rounds = rounds or (3 if quick else 5)
    return (_over_sites(sizes, rounds), nth_adapter_table(50 if quick else 500, rounds))


def check(workload: Workload, gm: Any) -> str:
    """Identity with B = 0, PEFT's output with its A and B; raises CheckFailed, or says what held."""
    args, kwargs = workload.inputs
    frozen = workload.make().requires_grad_(False)
    injected = workloads.with_lora_fx(workload, gm)
    plan = lora_fx.make_plan(gm, lora_fx.LoraConfig(**workload.fields()))
    require(len(plan.targets) == workload.sites, f"{len(plan.targets)} sites adapted, {workload.sites} expected")
    peft_model = workloads.with_peft(workload)
    with torch.no_grad():
        base = first_tensor(frozen(*args, **kwargs))
        fresh = first_tensor(injected(*args, **kwargs))
        require(torch.equal(base, fresh), "with B = 0 the injected graph differs from the base")
        workloads.randomise(peft_model, relative=0.1)
        copy_adapter(peft_model, injected)
        theirs, ours = first_tensor(peft_model(*args, **kwargs)), first_tensor(injected(*args, **kwargs))
    assert_effect("PEFT's adapter", theirs, base)
    error = assert_same("injected graph against PEFT", ours, theirs)
    return f"B = 0 gives the base bit for bit; with equal A and B the output is PEFT's within {error:.1e}"


def inject_times(workload: Workload, gm: Any, rounds: int) -> Times:
    """lora_fx.inject, without and with the code that its first call writes; PEFT's get_peft_model; the floor."""
    import peft

    config = lora_fx.LoraConfig(**workload.fields())
    peft_config = peft.LoraConfig(**workload.fields())
    return interleave(
        {
            "lora_fx": Variant(
                lambda graph: lora_fx.inject(graph, config), prepare=lambda: workloads.without_code_of_copies(gm)
            ),
            "lora_fx, code": Variant(
                lambda graph: lora_fx.inject(graph, config).code, prepare=lambda: workloads.without_code_of_copies(gm)
            ),
            "PEFT": Variant(lambda model: peft.get_peft_model(model, peft_config), prepare=workload.make),
            "floor": Variant(lambda model: _only_a_and_b(model, workload), prepare=workload.make),
        },
        rounds,
    )


def inject_visits(workload: Workload, gm: Any) -> tuple[int, int]:
    """(graph nodes visited, Python and C functions called) by one inject. Exact."""
    config = lora_fx.LoraConfig(**workload.fields())
    lora_fx.inject(gm, config)  # what is cached on first use is no site's cost
    workloads.without_code_of_copies(gm)
    with node_visits() as count:
        lora_fx.inject(gm, config)
    workloads.without_code_of_copies(gm)
    return count.visits, python_calls(lambda: lora_fx.inject(gm, config))


def _only_a_and_b(model: nn.Module, workload: Workload) -> list[nn.Parameter]:
    """Making and initialising A and B: what no LoRA scheme can avoid."""
    made: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            a = nn.Parameter(torch.empty(workload.r, module.in_features))
            nn.init.kaiming_uniform_(a, a=5**0.5)
            made += [a, nn.Parameter(torch.zeros(module.out_features, workload.r))]
    return made


def _peft_calls(workload: Workload) -> int:
    model = workload.make()
    return python_calls(lambda: workloads.with_peft(workload, model))


def _over_sites(sizes: tuple[int, ...], rounds: int) -> Table:
    rows = []
    measured: dict[str, list[float]] = {"lora_fx": [], "PEFT": [], "visits": [], "calls": []}
    said = ""
    for sites in sizes:
        workload = workloads.linear_stack(sites)
        started = time.process_time()
        gm = workloads.traced(workload)
        tracing = time.process_time() - started
        said = check(workload, gm)
        visits, calls = inject_visits(workload, gm)
        times = inject_times(workload, gm, rounds)
        ours, theirs = times.median("lora_fx"), times.median("PEFT")
        rows.append(
            (
                sites,
                tracing,
                1e3 * ours,
                1e3 * theirs,
                ours / theirs,
                times.ratio("lora_fx, code", "PEFT"),
                1e3 * ours / sites,
                1e3 * theirs / sites,
                1e3 * times.median("floor") / sites,
                visits / sites,
                calls / sites,
                _peft_calls(workload) / sites,
            )
        )
        for name, value in (("lora_fx", ours), ("PEFT", theirs), ("visits", visits), ("calls", calls)):
            measured[name].append(float(value))
    fits = ", ".join(f"{name} {exponent(sizes, values):.3f}" for name, values in measured.items())
    return Table(
        f"inject over the number of sites ({rounds} rounds; linears 16 × 16, r = 8)",
        (
            "sites",
            "trace s (apart)",
            "lora_fx ms",
            "PEFT ms",
            "lora_fx / PEFT",
            "with its code",
            "lora_fx ms/site",
            "PEFT ms/site",
            "floor ms/site",
            "node visits/site",
            "calls/site",
            "PEFT calls/site",
        ),
        tuple(rows),
        (
            f"checked first, at every size: {said}",
            f"fitted exponent over sites (1 is linear): {fits}",
            "with its code: and what the graph's first call does, which passes in a row do once",
            "floor: making and initialising A and B alone. Visits and calls are exact counts",
            "inject needs a traced graph; PEFT needs none. Tracing (train and eval graph) stands in its own column",
        ),
    )


def nth_adapter_table(sites: int, rounds: int) -> Table:
    workload = workloads.linear_stack(sites)
    gm = workloads.traced(workload)
    config = lora_fx.LoraConfig(**workload.fields())
    rows = []
    for n in range(3):
        graph = _with_adapters(gm, config, n)
        times = interleave({"lora_fx": _inject_next(graph, config), "PEFT": _peft_next(workload, n)}, rounds)
        rows.append((n + 1, 1e3 * times.median("lora_fx"), 1e3 * times.median("PEFT"), times.ratio("lora_fx", "PEFT")))
    header = ("adapter", "lora_fx ms", "PEFT ms", "lora_fx / PEFT")
    return Table(f"the n-th adapter on {sites} sites ({rounds} rounds)", header, tuple(rows))


def _with_adapters(gm: Any, config: lora_fx.LoraConfig, count: int) -> Any:
    for i in range(count):
        gm = lora_fx.inject(gm, config, adapter_name=f"a{i}")
    return gm


def _inject_next(graph: Any, config: lora_fx.LoraConfig) -> Variant:
    known = len(record_of(graph).compiled)
    return Variant(
        lambda given: lora_fx.inject(given, config, adapter_name="next"),
        prepare=lambda: workloads.without_code_of_copies(graph, known),
    )


def _peft_next(workload: Workload, before: int) -> Variant:
    """One more adapter on a fresh PEFT model that has `before` already."""
    import peft

    config = peft.LoraConfig(**workload.fields())

    def model_with_adapters() -> Any:
        model: Any = workload.make()
        for i in range(before):
            model = add(model, f"a{i}")
        return model

    def add(model: Any, name: str = "next") -> Any:
        if not isinstance(model, peft.PeftModel):
            return peft.get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
        return model

    return Variant(add, prepare=model_with_adapters)

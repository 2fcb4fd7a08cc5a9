"""One training step: FLOPs, kernels and kept bytes, exact, and step time; against PEFT and the frozen base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import lora_fx

from . import workloads
from .checks import adapters_of, assert_same, require
from .counters import OpCounter, saved_bytes
from .report import Table
from .timing import Variant, interleave
from .workloads import Workload

Step = Callable[[], torch.Tensor]
MIB = 1 << 20


@dataclass(frozen=True)
class Counts:
    """What one forward and backward costs, exactly."""

    flops: int
    kernels: int
    saved: int
    moved: int


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    layers, hidden, tokens = (2, 128, 64) if quick else (12, 768, 256)
    rounds = rounds or (5 if quick else 9)
    tables = [
        _count_table(workloads.llama(layers, hidden, tokens), lora_dropout=0.0),
        _count_table(workloads.llama(layers, hidden, tokens), lora_dropout=0.05),
        _count_table(workloads.llama(layers, hidden, tokens, dtype=torch.bfloat16), lora_dropout=0.0),
    ]
    tables.append(_dora_table(workloads.llama(layers, hidden, tokens)))
    timed = workloads.llama(2, 256 if quick else 768, 128 if quick else 512)
    shapes = ((64, 8), (256, 64)) if quick else ((64, 8), (64, 64), (128, 16), (256, 64), (512, 128), (768, 512))
    small = small_table(shapes, 3 * rounds)
    steps = [time_table(timed, rounds, lora_dropout=p, compiles=not quick) for p in (0.0, 0.05)]
    return (*tables, *steps, small)


def lora_step(model: nn.Module, workload: Workload) -> Step:
    """Forward, loss and backward of an adapted model or graph."""
    args, kwargs = workload.inputs

    def step() -> torch.Tensor:
        return _loss(model(*args, **kwargs), kwargs["input_ids"])

    return step


def floor_step(model: nn.Module, workload: Workload) -> Step:
    """The frozen base, its embeddings a leaf that takes a gradient: the gradient is only carried through."""
    frozen: Any = model.requires_grad_(False)
    kwargs = dict(workload.inputs[1])
    ids = kwargs.pop("input_ids")
    embedded = frozen.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> torch.Tensor:
        embedded.grad = None
        return _loss(frozen(inputs_embeds=embedded, **kwargs), ids)

    return step


def _loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = output.logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def count_step(model: nn.Module, step: Step) -> Counts:
    """Run one step under the counters."""
    with OpCounter() as counter:
        with saved_bytes(model) as saved:
            loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return Counts(counter.flops, counter.kernels, saved.total, counter.moved_bytes)


def lora_flops(workload: Workload, sites: dict[str, tuple[int, int]], tokens: int, first: tuple[str, ...]) -> int:
    """FLOPs that LoRA adds to the floor, in closed form.

    Per site of in → out: x Aᵀ and h Bᵀ forward; dB, dh, dA, dx backward: 6 · tokens · r · (in + out).
    The inputs of `first` need no gradient: neither A's dx nor the floor's dx of the base weight is computed.
    """
    r = workload.r
    total = sum(6 * tokens * r * (i + o) for i, o in sites.values())
    return total - sum(2 * tokens * (r * sites[name][0] + sites[name][0] * sites[name][1]) for name in first)


def _sites(gm: Any, workload: Workload) -> dict[str, tuple[int, int]]:
    plan = lora_fx.make_plan(gm, lora_fx.LoraConfig(**workload.fields()))
    return {t.site.path: (t.site.in_features, t.site.out_features) for t in plan.targets}


def check(peft_model: Any, injected: Any, workload: Workload) -> str:
    """Loss and every gradient of A and B are PEFT's; raises CheckFailed otherwise."""
    losses, gradients = [], []
    for model in (peft_model, injected):
        loss = lora_step(model, workload)()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in adapters_of(model).items()})
        model.zero_grad(set_to_none=True)
    is_float32 = next(injected.parameters()).dtype == torch.float32
    # The loss of a 16-bit model is float32, but its activations are not; gradients add up over all layers.
    assert_same("the loss", losses[1], losses[0], eps=256.0 if is_float32 else 1e5)
    require(gradients[0].keys() == gradients[1].keys(), "PEFT and lora_fx train different parameters")
    eps = 4096.0 if is_float32 else 1e6
    errors = []
    for name, theirs in gradients[0].items():
        ours = gradients[1][name]
        require(theirs is not None and ours is not None and bool(theirs.any()), f"{name} gets no gradient")
        assert theirs is not None
        assert ours is not None
        errors.append(assert_same(f"the gradient of {name}", ours, theirs, eps=eps))
    return f"loss and all {len(errors)} gradients equal PEFT's within {max(errors):.1e}"


def _count_table(workload: Workload, *, lora_dropout: float) -> Table:
    peft_model, gm, injected = workloads.adapted_alike(workload, lora_dropout=lora_dropout)
    said = check(peft_model, injected, workload)  # in eval mode, where dropout does nothing
    _check_optimized(injected, workload)
    base = workload.make()
    tokens = workload.inputs[1]["input_ids"].numel()
    for model in (base, peft_model, injected):
        model.train()
    counts = {
        "PEFT": count_step(peft_model, lora_step(peft_model, workload)),
        "lora_fx": count_step(injected, lora_step(injected, workload)),
        **{name: count_step(gm, lora_step(gm, workload)) for name, gm in _optimized(injected, lora_dropout).items()},
        "floor": count_step(base, floor_step(base, workload)),
    }
    sites = _sites(gm, workload)
    first = tuple(name for name in sites if ".layers.0.self_attn." in name and not name.endswith("o_proj"))
    expected = lora_flops(workload, sites, tokens, first)
    added = counts["lora_fx"].flops - counts["floor"].flops
    require(added == expected, f"LoRA adds {added:,} FLOPs to the floor, the closed form says {expected:,}")
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    peft_counts = counts["PEFT"]
    rows = [
        (
            name,
            c.flops / 1e9,
            c.flops / peft_counts.flops,
            c.kernels,
            c.kernels / peft_counts.kernels,
            c.saved / MIB,
            c.saved / peft_counts.saved,
            c.moved / peft_counts.moved,
        )
        for name, c in counts.items()
    ]
    dropout = f"lora_dropout {lora_dropout}" if lora_dropout else "no dropout"
    return Table(
        f"one training step, counted: {workload.name}, {dtype}, {tokens} tokens, r = {workload.r}, {dropout}",
        ("model", "GFLOPs", "/ PEFT", "kernels", "/ PEFT ", "kept MiB", "/ PEFT  ", "moved / PEFT"),
        tuple(rows),
        (
            f"checked first: {said}; LoRA's FLOPs over the floor are the closed form's {expected:,}",
            "exact. Kernels: ATen calls below autograd but views and metadata assertions. "
            "Kept: storages that autograd holds for backward, each once, parameters left out",
            "floor: base frozen, gradient carried through to the embeddings",
        ),
    )


def _optimized(injected: Any, lora_dropout: float) -> dict[str, Any]:
    """Optimised forms of a graph, in train mode, by the call that makes them."""
    ways: list[dict[str, Any]] = [{}, {"recompute": False}]
    ways += [{"dropout": "cut"}, {"dropout": "shared"}] if lora_dropout else []
    return {
        f"optimize({', '.join(f'{k}={v!r}' for k, v in way.items())})": lora_fx.optimize(injected, **way).train()
        for way in ways
    }


def _check_optimized(injected: Any, workload: Workload) -> None:
    """Loss and gradients of the optimised graph are the plain graph's, in train mode, under one seed."""
    results = []
    for model in (injected.train(), lora_fx.optimize(injected).train()):
        torch.manual_seed(0)
        loss = lora_step(model, workload)()
        loss.backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), {name: p.grad for name, p in adapters_of(model).items()}))
        model.zero_grad(set_to_none=True)
    eps = 4096.0 if next(injected.parameters()).dtype == torch.float32 else 1e6
    assert_same("the optimised loss", results[1][0], results[0][0], eps=eps)
    for name, gradient in results[0][1].items():
        found = results[1][1][name]
        assert gradient is not None
        assert found is not None
        assert_same(f"the optimised gradient of {name}", found, gradient, eps=eps)


def _dora_table(workload: Workload) -> Table:
    """DoRA: PEFT builds W + s · B @ A to take its norms; here they come from products of rank r."""
    peft_model, _, injected = workloads.adapted_alike(workload, use_dora=True)
    said = check(peft_model, injected, workload)
    _check_optimized(injected, workload)
    plain_peft, _, plain = workloads.adapted_alike(workload)
    models = {
        "PEFT, DoRA": peft_model,
        "lora_fx, DoRA": injected,
        "lora_fx, DoRA, optimize()": lora_fx.optimize(injected),
        "PEFT, plain": plain_peft,
        "lora_fx, plain": plain,
    }
    counts = {name: count_step(model.train(), lora_step(model, workload)) for name, model in models.items()}
    first = counts["PEFT, DoRA"]
    rows = [
        (name, c.flops / first.flops, c.kernels / first.kernels, c.saved / first.saved, c.moved / first.moved)
        for name, c in counts.items()
    ]
    return Table(
        f"one training step with use_dora, counted: {workload.name}, r = {workload.r}",
        ("model", "FLOPs / PEFT", "kernels / PEFT", "kept / PEFT", "moved / PEFT"),
        tuple(rows),
        (f"checked first: {said}", "ratios to PEFT's DoRA; what is counted is as above"),
    )


def time_table(workload: Workload, rounds: int, *, lora_dropout: float, compiles: bool = False) -> Table:
    """A step of each way, interleaved; `compiles`: of PEFT's model and the injected graph under torch.compile, too."""
    peft_model, _, injected = workloads.adapted_alike(workload, lora_dropout=lora_dropout)
    said = check(peft_model, injected, workload)
    base = workload.make()
    for model in (base, peft_model, injected):
        model.train()
    steps = {
        "PEFT": lora_step(peft_model, workload),
        "PEFT again (control)": lora_step(peft_model, workload),
        "lora_fx": lora_step(injected, workload),
        **{name: lora_step(gm, workload) for name, gm in _optimized(injected, lora_dropout).items()},
        "floor": floor_step(base, workload),
    }
    if compiles:
        steps |= _compiled_steps({"PEFT": peft_model, "lora_fx": injected}, workload)
    graphs = _compiled_graphs()
    times = interleave({name: _backward(step) for name, step in steps.items()}, rounds)
    require(_compiled_graphs() == graphs, "something was compiled again while it was timed")
    floor = times.ratio("floor", "PEFT")
    rows = [
        (
            name,
            1e3 * times.median(name),
            times.ratio(name, "PEFT"),
            (times.ratio(name, "PEFT") - floor) / (1 - floor),
            f"{times.spread(name):.0%}",
        )
        for name in times.seconds
    ]
    tokens = workload.inputs[1]["input_ids"].numel()
    return Table(
        f"one training step, timed: {workload.name}, float32, {tokens} tokens, lora_dropout {lora_dropout} "
        f"({rounds} rounds)",
        ("model", "ms", "/ PEFT", "cost above the floor / PEFT's", "spread"),
        tuple(rows),
        (
            f"checked first: {said}",
            "forward and backward; no optimizer step" + "; nothing was compiled while it was timed" * compiles,
        ),
    )


def _compiled_steps(models: dict[str, nn.Module], workload: Workload) -> dict[str, Step]:
    """Steps of models under torch.compile, whose loss without dropout is that of the model itself."""
    steps: dict[str, Step] = {}
    for name, model in models.items():
        compiled = lora_step(torch.compile(model), workload)  # type: ignore[arg-type]
        for mode in (False, True):
            model.train(mode)
            loss = compiled()
            loss.backward()  # type: ignore[no-untyped-call]
            if not mode:
                assert_same(f"{name}'s loss, compiled", loss.detach(), lora_step(model, workload)().detach())
        steps[f"{name}, torch.compile"] = compiled
    return steps


def _compiled_graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def small_table(shapes: tuple[tuple[int, int], ...], rounds: int) -> Table:
    """From which size on `optimize` pays: below, its backward pass in Python takes longer than fewer kernels save."""
    rows: list[tuple[Any, ...]] = []
    for hidden, tokens in shapes:
        workload = workloads.llama(2, hidden, tokens)
        peft_model, _, injected = workloads.adapted_alike(workload)
        _check_optimized(injected, workload)
        models = {"PEFT": peft_model, "lora_fx": injected, "optimize()": lora_fx.optimize(injected)}
        steps = {name: lora_step(model.train(), workload) for name, model in models.items()}
        times = interleave({name: _backward(step) for name, step in steps.items()}, rounds, collect=False)
        ratios = (
            times.ratio("lora_fx", "PEFT"),
            times.ratio("optimize()", "PEFT"),
            times.ratio("optimize()", "lora_fx"),
        )
        rows.append((hidden, tokens, 1e3 * times.median("PEFT"), *ratios))
    return Table(
        f"one training step of small models, timed: Llama, 2 layers, float32 ({rounds} rounds)",
        ("hidden", "tokens", "PEFT ms", "lora_fx / PEFT", "optimize() / PEFT", "optimize() / lora_fx"),
        tuple(rows),
        ("checked first: loss and gradients of both graphs are equal", "forward and backward; no optimizer step"),
    )


def _backward(step: Step) -> Variant:
    return Variant(lambda _: step().backward())  # type: ignore[no-untyped-call]

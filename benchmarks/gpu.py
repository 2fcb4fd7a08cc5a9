"""One training step on a GPU: decoders in the shape of 1B and 8B Llamas, bfloat16, against PEFT and the frozen base."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import lora_fx

from .report import Table

# (name, hidden, intermediate, layers, heads, key and value heads); random weights, a vocabulary of 32,000
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Step = Callable[[], Any]


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject; one that says why there is none, where there is no GPU."""
    if not torch.cuda.is_available():
        return (Table("one training step on a GPU", ("model", "ms"), (), ("this machine has no CUDA device",)),)
    rounds = rounds or (3 if quick else 15)
    if quick:
        return (_table("1B", 512, 0.0, rounds, layers=2, compiles=False),)
    return (
        _table("1B", 2048, 0.0, rounds, compiles=True),
        _table("1B", 2048, 0.05, rounds, compiles=False),
        _table("8B", 2048, 0.0, max(rounds // 2, 3), compiles=False),
    )


def _model(shape: str, layers: int | None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, depth, heads, groups = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or depth, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=32000, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _table(shape: str, tokens: int, dropout: float, rounds: int, *, compiles: bool, layers: int | None = None) -> Table:
    import peft

    model = _model(shape, layers)
    ids = torch.randint(32000, (1, tokens), device="cuda")
    gm = lora_fx.trace(model, (), {"input_ids": ids, "use_cache": False})
    fields = {"r": 16, "lora_alpha": 32, "lora_dropout": dropout, "target_modules": list(NAMES)}
    injected = lora_fx.inject(gm, fields)
    narrow = lora_fx.inject(gm, fields, adapter_dtype=torch.bfloat16)
    peft_model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    generator = torch.Generator("cuda").manual_seed(1)
    by_name = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, parameter in by_name.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.01, generator=generator)
        for adapted in (injected, narrow):
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(by_name[f"base_model.model.{name}"])
    candidates: dict[str, Any] = {
        "PEFT": peft_model,
        "lora_fx": injected,
        "lora_fx, optimize": lora_fx.optimize(injected),
        "lora_fx, optimize, bfloat16 adapters": lora_fx.optimize(narrow),
    }
    if dropout:
        candidates["lora_fx, optimize(dropout='shared')"] = lora_fx.optimize(injected, dropout="shared")
    if compiles:
        candidates["PEFT, torch.compile"] = torch.compile(peft_model)
        candidates["lora_fx, torch.compile"] = torch.compile(injected)
    steps: dict[str, Step] = {name: _step(each.train(), ids) for name, each in candidates.items()}
    steps["floor: base frozen, PEFT's adapters disabled"] = _floor(peft_model, ids)
    agreement = {name: _first_loss(step) for name, step in steps.items()} if not dropout else {}
    seconds, peaks = _timed(steps, rounds)
    first, floor = statistics.median(seconds["PEFT"]), statistics.median(seconds[list(steps)[-1]])
    rows = []
    for name in steps:
        median = statistics.median(seconds[name])
        rows.append(
            (
                name, 1e3 * median, median / first, (median - floor) / (first - floor), tokens / median,
                peaks[name] / 2**30, agreement.get(name),
            )
        )  # fmt: skip
    del candidates, steps, gm, injected, narrow, peft_model, model
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    return Table(
        f"one training step: {shape} shape, {layers or SHAPES[shape][2]} layers, bfloat16, {tokens} tokens, r = 16, "
        f"lora_dropout {dropout}; {torch.cuda.get_device_name()}",
        ("model", "ms", "/ PEFT", "cost above the floor / PEFT's", "tokens/s", "peak GiB above weights", "loss"),
        tuple(rows),
        (
            f"forward and backward; CUDA events, medians of {rounds} interleaved rounds",
            "peak: allocated at the worst moment, beyond what was before the step",
        ),
    )


def _loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1).float(), ids.flatten())


def _step(model: Any, ids: torch.Tensor) -> Step:
    def step() -> torch.Tensor:
        loss = _loss(model(input_ids=ids, use_cache=False), ids)
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _floor(peft_model: Any, ids: torch.Tensor) -> Step:
    embedded = peft_model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> torch.Tensor:
        embedded.grad = None
        with peft_model.disable_adapter():
            loss = _loss(peft_model(inputs_embeds=embedded, use_cache=False), ids)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def _first_loss(step: Step) -> float:
    return float(step())


def _timed(steps: dict[str, Step], rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """({name: seconds of each round}, {name: peak bytes of one step})."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    order, shuffle = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            steps[name]()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds, peaks

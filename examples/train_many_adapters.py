"""Train N adapters over one base in one graph, each with its own data and learning rate, as N runs would.

    python examples/train_many_adapters.py --adapters 4

A batch has rows of each adapter; `adapter_ids` says whose they are. The loss of an adapter is that of its rows, and the
sum of them is differentiated: nobody else's rows reach its A and B.
"""

from __future__ import annotations

import argparse
import time

import torch
from tiny import Text, example_batch, tiny_llama
from torch import nn

import lora_fx

ROWS = 2  # of each adapter, a step


def loss_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Next tokens; the graph is traced without its loss, which would mix the rows."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def rows_of(adapter: int, step: int) -> torch.Tensor:
    """Another part of the text for each."""
    return Text(ROWS, start=100 * adapter + ROWS * step).rows


def main(adapters: int = 4, steps: int = 10) -> dict[str, float]:
    """At once, and one by one; what was measured."""
    names = [f"adapter{index}" for index in range(adapters)]
    rates = [3e-3 * (1 + index) for index in range(adapters)]
    gm = lora_fx.trace(tiny_llama(), (), {"input_ids": example_batch()["input_ids"]})
    for index, name in enumerate(names):
        torch.manual_seed(index)
        config = lora_fx.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        gm = lora_fx.inject(gm, config, adapter_name=name)

    batched = lora_fx.batch_adapters(gm).train()
    parts = [lora_fx.lora_parameters(batched, name) for name in names]
    optimizer = torch.optim.AdamW([{"params": part, "lr": rate} for part, rate in zip(parts, rates, strict=True)])
    ids = torch.arange(1, adapters + 1).repeat_interleave(ROWS)
    first: list[float] = []
    started = time.process_time()
    for step in range(steps):
        rows = [rows_of(index, step) for index in range(adapters)]
        logits = batched(input_ids=torch.cat(rows), adapter_ids=ids).logits
        losses = [loss_of(part, own) for part, own in zip(logits.split(ROWS), rows, strict=True)]
        torch.stack(losses).sum().backward()
        for part in parts:
            nn.utils.clip_grad_norm_(part, 1.0)  # each by its own norm
        optimizer.step()
        optimizer.zero_grad()
        first = first or [float(loss.detach()) for loss in losses]
    at_once = time.process_time() - started
    trained = lora_fx.unbatch_adapters(batched)  # one by one again, for save_adapter and all else

    difference, one_by_one = 0.0, 0.0
    for index, (name, rate) in enumerate(zip(names, rates, strict=True)):
        lora_fx.set_adapters(gm.train(), name)
        parameters = lora_fx.lora_parameters(gm, name)
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        started = time.process_time()
        for step in range(steps):
            rows = rows_of(index, step)
            loss_of(gm(input_ids=rows).logits, rows).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        one_by_one += time.process_time() - started
        for one, other in zip(parameters, lora_fx.lora_parameters(trained, name), strict=True):
            difference = max(difference, float((one - other).detach().abs().max()))
    found = {
        "before": sum(first) / adapters,
        "after": float(torch.stack(losses).detach().mean()),
        "difference": difference,
        "seconds / one by one": at_once / one_by_one,
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    main(options.adapters, options.steps)

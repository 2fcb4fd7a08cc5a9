"""A plain loop with all that saves memory and time, and the same loop without any of it: the results agree.

    python examples/train_in_a_loop.py

Gradient accumulation, bfloat16 autocast, gradient checkpointing by blocks (`optimize(gm, checkpoint=True)`), and an
optimizer that sees all A and B as one vector (`flat_parameters`).
"""

from __future__ import annotations

import argparse
import contextlib

import torch
from tiny import Text, example_batch, tiny_llama
from torch.utils.data import DataLoader

import lora_fx


def trained(steps: int, *, saving: bool, autocast: bool) -> tuple[lora_fx.LoraGraphModule, list[float], int]:
    """Train on eight rows a step; with `saving`, two at a time. The graph, its losses, and bytes kept for backward."""
    gm = lora_fx.trace(tiny_llama(), (), example_batch())
    torch.manual_seed(1)
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=4, target_modules="all-linear"))
    gm = lora_fx.optimize(gm, checkpoint=True).train() if saving else gm.train()
    parameters = lora_fx.flat_parameters(gm) if saving else lora_fx.lora_parameters(gm)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    pieces = 4 if saving else 1
    losses, kept = [], 0
    for batch in DataLoader(Text(8 * steps), batch_size=8):
        total = 0.0
        for part in range(pieces):
            rows = {name: value[part::pieces] for name, value in batch.items()}
            precision = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
            with count_kept() as counted, precision:
                loss = gm(**rows).loss / pieces
            kept = max(kept, sum(counted.values()))
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return gm, losses, kept


@contextlib.contextmanager
def count_kept():
    """{memory: bytes} of what autograd keeps for the backward pass meanwhile."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def main(steps: int = 20, *, autocast: bool = True) -> dict[str, float]:
    """Both loops; what was measured."""
    plain, expected, much = trained(steps, saving=False, autocast=autocast)
    gm, losses, little = trained(steps, saving=True, autocast=autocast)
    with torch.no_grad():
        pairs = zip(lora_fx.lora_parameters(plain), lora_fx.lora_parameters(gm), strict=True)
        difference = max(float((one - other).abs().max()) for one, other in pairs)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} (plain {expected[-1]:.3f}); kept {little / much:.2f} of the bytes")
    return {
        "before": losses[0],
        "after": losses[-1],
        "plain": expected[-1],
        "difference": difference,
        "kept": little / much,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-autocast", action="store_true")
    options = parser.parse_args()
    main(options.steps, autocast=not options.no_autocast)

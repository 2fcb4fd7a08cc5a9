"""Accelerate on an injected graph: accumulation, bfloat16 autocast, clipping, states to come back to, files.

accelerate launch examples/train_with_accelerate.py     (or: python examples/train_with_accelerate.py)
"""

from __future__ import annotations

import argparse
import tempfile

import accelerate
import safetensors.torch
import torch
from tiny import Text, example_batch, tiny_llama
from torch.utils.data import DataLoader

import lora_fx


def main(steps: int = 20) -> dict[str, float]:
    """Train on every second batch's gradients, save, go back, and check the files; what was measured."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    gm = lora_fx.trace(tiny_llama(), (), example_batch())
    torch.manual_seed(1)
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(gm), lr=1e-2)
    loader = DataLoader(Text(4 * 2 * steps), batch_size=4)
    model, optimizer, loader = accelerator.prepare(gm.train(), optimizer, loader)

    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(lora_fx.lora_parameters(gm), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))

    trained = {name: value.clone() for name, value in gm.state_dict().items()}
    with tempfile.TemporaryDirectory() as directory:
        accelerator.save_state(directory)
        with torch.no_grad():
            for parameter in lora_fx.lora_parameters(gm):
                parameter.zero_()
        accelerator.load_state(directory)
        assert all(torch.equal(value, trained[name]) for name, value in gm.state_dict().items())

        accelerator.save_model(model, f"{directory}/all")  # base and adapters
        written = safetensors.torch.load_file(f"{directory}/all/model.safetensors")
        assert written.keys() == trained.keys()
        gm = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # no autocast from here on
        lora_fx.save_adapter(gm, f"{directory}/adapter")  # PEFT's two files
        fresh = lora_fx.load_adapter(lora_fx.trace(tiny_llama(), (), example_batch()), f"{directory}/adapter")
    with torch.no_grad():
        one, other = (graph.eval()(**example_batch(4)).loss for graph in (gm, fresh))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return {"before": losses[0], "after": losses[-1], "loaded": float((one - other).abs())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)

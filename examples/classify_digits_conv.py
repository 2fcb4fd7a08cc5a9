"""A plain torch convolution net, trained on digits that stand upright, learns those that lie on their side.

    python examples/classify_digits_conv.py

LoRA on convolutions, one with groups among them, and on the head. A batch norm has no matrix to adapt, and in training
its statistics move: named in `modules_to_save`, they are the adapter's own, are saved with it, and leave the base as it
was. Printed: held-out accuracy before, after, and in ONNX Runtime; and the check of the file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from classification import accuracy, fit
from tiny import digits
from to_onnx import to_session
from torch import nn

import lora_fx

HELD_OUT = 500


def net() -> nn.Module:
    """As one writes it: images (batch, 1, 8, 8) to logits (batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def main(steps: int = 100) -> dict[str, float]:
    """Train the base, adapt it, deploy it; what was measured."""
    torch.manual_seed(0)
    upright, labels = digits()
    lying = upright.transpose(2, 3).contiguous()
    model = net()
    fit(model, list(model.parameters()), upright[:-HELD_OUT], labels[:-HELD_OUT], 100)
    model.eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}

    example = {"input": lying[:4]}
    # The sides of the images are fixed, as the head wants them; the batch is free.
    traced = lora_fx.trace(model, (), example, dynamic_shapes={"input": {0: "batch"}})
    config = lora_fx.LoraConfig(r=8, lora_alpha=16, target_modules=["3", "6", "9"], modules_to_save=["1", "4"])
    gm = lora_fx.inject(traced, config)
    print(lora_fx.make_plan(traced, config))

    before = accuracy(gm.eval()(input=lying[-HELD_OUT:]), labels[-HELD_OUT:])
    losses = fit(gm.train(), lora_fx.lora_parameters(gm), lying[:-HELD_OUT], labels[:-HELD_OUT], steps)
    after = accuracy(gm.eval()(input=lying[-HELD_OUT:]), labels[-HELD_OUT:])
    with tempfile.TemporaryDirectory() as directory:
        session, checked = to_session(traced, gm, Path(directory), example, compare=True)
        logits = torch.from_numpy(session.run(None, {"input": lying[-HELD_OUT:].numpy()})[0])
    found = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "before": before,
        "after": after,
        "in ONNX Runtime": accuracy(logits, labels[-HELD_OUT:]),
        "base changed": max(float((value - base[name]).abs().max()) for name, value in model.state_dict().items()),
        **checked,
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)

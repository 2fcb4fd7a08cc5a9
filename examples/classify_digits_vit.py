"""A vision transformer that reads black digits on white learns white ones on black, with DoRA on its attention.

    python examples/classify_digits_vit.py

The model is transformers' ViTForImageClassification, made from a configuration. With `use_dora=True` length and
direction of the weights are trained apart; folded, nothing of that is left in the file. Training runs on the graph that
`optimize` rewrites. Printed: held-out accuracy before, after, and in ONNX Runtime; that of the base on its own digits,
behind the adapter that is switched off; and the check of the file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from classification import accuracy, fit
from tiny import digits
from to_onnx import to_session

import lora_fx

HELD_OUT = 500


def tiny_vit() -> transformers.ViTForImageClassification:
    """Two layers, four patches of 4 × 4. A model of yours: `from_pretrained`."""
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


def main(steps: int = 80) -> dict[str, float]:
    """Train the base, adapt it, deploy it; what was measured."""
    images, labels = digits()
    white, black = 2 * images - 1, 1 - 2 * images
    model = tiny_vit()
    fit(lambda x: model(x).logits, list(model.parameters()), black[:-HELD_OUT], labels[:-HELD_OUT], 150, lr=2e-3)

    example = {"pixel_values": white[:4]}
    traced = lora_fx.trace(model.eval(), (), example)
    config = lora_fx.LoraConfig(
        r=8, lora_alpha=16, use_dora=True, target_modules=r".*\.(q_proj|v_proj|fc1|fc2)", modules_to_save=["classifier"]
    )
    gm = lora_fx.optimize(lora_fx.inject(traced, config))

    def score(graph: lora_fx.LoraGraphModule, images: torch.Tensor) -> float:
        with torch.no_grad():
            return accuracy(graph.eval()(pixel_values=images[-HELD_OUT:]).logits, labels[-HELD_OUT:])

    before = score(gm, white)
    gm.train()
    losses = fit(
        lambda x: gm(pixel_values=x).logits,
        lora_fx.lora_parameters(gm),
        white[:-HELD_OUT],
        labels[:-HELD_OUT],
        steps,
        lr=5e-3,
    )
    with lora_fx.disable_adapters(gm):
        remembered = score(gm, black)  # the base is what it was
    with tempfile.TemporaryDirectory() as directory:
        session, checked = to_session(traced, gm, Path(directory), example)
        (logits,) = session.run(None, {"pixel_values": white[-HELD_OUT:].numpy()})
    found = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "before": before,
        "after": score(gm, white),
        "in ONNX Runtime": accuracy(torch.from_numpy(logits), labels[-HELD_OUT:]),
        "base on its own": remembered,
        **checked,
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    main(parser.parse_args().steps)

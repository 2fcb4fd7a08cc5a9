"""A causal language model, trained in torch, generates in ONNX Runtime with its key/value cache.

    python examples/generate_in_onnx.py

The base has read Python's documentation; the adapter learns to SHOUT it. What is trained takes labels and gives a loss;
what is deployed takes a cache and gives one. They are two traces of one model, and what travels between them is the
adapter's files, as it would between two machines. Printed: the loss, the text of base and tuned model, whether ONNX
Runtime gives the tokens of `model.generate()` for two prompts of different lengths in one batch; and the check of the
file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny import Text, example_batch, tiny_llama
from to_onnx import to_session
from torch.utils.data import DataLoader

import exporters
import lora_fx

PROMPTS = (b"THE STATEMENT ", b"AN ")
NEW_TOKENS = 24


def padded(prompts: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention mask, both int64 (prompts, longest), with the padding on the left."""
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], np.int64)
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
    return ids, mask


def learn(gm: torch.nn.Module, parameters: list[torch.nn.Parameter], steps: int, *, loud: bool) -> list[float]:
    """Next tokens of the documentation, in capitals if `loud`; the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for batch in DataLoader(Text(8 * steps), batch_size=8):
        rows = batch["input_ids"]
        rows = torch.where(loud & (rows >= ord("a")) & (rows <= ord("z")), rows - 32, rows)
        loss = gm.train()(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def generate(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Greedy, with the model's own cache."""
    tokens = model.eval().generate(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens.numpy()


def main(steps: int = 100) -> dict[str, object]:
    """Train, deploy, generate on both sides; what was measured."""
    ids, mask = padded(PROMPTS)
    model = tiny_llama(initializer_range=0.1)  # one that learns fast from scratch
    learn(model, list(model.parameters()), 2 * steps, loud=False)
    base = generate(model, ids, mask)

    gm = lora_fx.trace(model.train(), (), example_batch())
    torch.manual_seed(1)
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    losses = learn(gm, lora_fx.lora_parameters(gm), steps, loud=True)
    with tempfile.TemporaryDirectory() as directory:
        lora_fx.save_adapter(gm, Path(directory) / "trained")
        flat = exporters.flat_cache_model(model.eval())  # the same modules; the cache is inputs and outputs
        example, shapes = exporters.decoder_example(flat)
        traced = lora_fx.trace(flat, (), example, dynamic_shapes=shapes)
        deployed = lora_fx.load_adapter(traced, Path(directory) / "trained")
        session, checked = to_session(traced, deployed, Path(directory), example)
    tuned = exporters.greedy(session, ids, NEW_TOKENS, attention_mask=mask)
    lora_fx.fold(gm.eval(), inplace=True)  # into `model`, whose tensors the graph shares
    expected = generate(model, ids, mask)
    for name, tokens in (("base", base), ("tuned", tuned)):
        print(f"{name:>5}: {[bytes(row.tolist()).lstrip(bytes(1)) for row in tokens]}")
    found = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "agree": bool((tuned == expected).all()),
        "differ from base": bool((tuned != base).any(1).all()),
        **checked,
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)

"""transformers' Trainer on an injected graph: train, stop, resume, evaluate, predict.

    python examples/train_with_trainer.py

The graph takes what the model takes and gives what it gives, so the Trainer needs nothing else. It is traced with
labels in its example, and so gives a loss.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import torch
import transformers
from tiny import Text, example_batch, tiny_llama

import lora_fx


def adapted() -> lora_fx.LoraGraphModule:
    """A new graph, the same one each time."""
    gm = lora_fx.trace(tiny_llama(), (), example_batch())
    torch.manual_seed(1)  # A's first values are random
    return lora_fx.inject(gm, lora_fx.LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear"))


def trainer_of(gm: lora_fx.LoraGraphModule, directory: str, steps: int, *, bf16: bool) -> transformers.Trainer:
    """A Trainer as for any model."""
    arguments = transformers.TrainingArguments(
        directory,
        max_steps=steps,
        save_steps=steps // 2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=3,
    )
    return transformers.Trainer(gm, arguments, train_dataset=Text(64), eval_dataset=Text(16, start=64))


def main(steps: int = 20, *, bf16: bool = False) -> dict[str, float]:
    """Train, and train again from the checkpoint half way; what was measured."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as other:
        gm = adapted()
        trainer = trainer_of(gm, directory, steps, bf16=bf16)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        predicted = trainer.predict(Text(16, start=64))
        assert isinstance(predicted.predictions, np.ndarray)

        again = adapted()
        resumed = trainer_of(again, other, steps, bf16=bf16)
        resumed.train(resume_from_checkpoint=f"{directory}/checkpoint-{steps // 2}")
    pairs = zip(lora_fx.lora_parameters(gm), lora_fx.lora_parameters(again), strict=True)
    trainer.accelerator.unwrap_model(gm, keep_fp32_wrapper=False)  # no autocast from here on
    with torch.no_grad():
        difference = max(float((one - other).abs().max()) for one, other in pairs)
        logits = lora_fx.fold(gm.eval())(**example_batch(4)).logits
        folded = float((logits - gm(**example_batch(4)).logits).abs().max())
    print(f"loss {before:.3f} -> {after:.3f}; resumed differs by {difference}; folded logits by {folded:.1e}")
    return {
        "before": before,
        "after": after,
        "predicted": predicted.metrics["test_loss"],
        "resumed": difference,
        "folded": folded,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true", help="autocast, on the CPU too")
    options = parser.parse_args()
    main(options.steps, bf16=options.bf16)

"""Lightning on an injected graph: accumulation, bfloat16 autocast, a checkpoint of what trains, and resuming from it.

    pip install pytorch-lightning && python examples/train_with_lightning.py

The graph is an attribute of the LightningModule, as any network is.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny import Text, example_batch, tiny_llama
from torch.utils.data import DataLoader

import lora_fx


class Tuning(pl.LightningModule):
    """What Lightning has to be told: a loss, an optimizer, and that only the adapter goes into checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        gm = lora_fx.trace(tiny_llama(), (), example_batch())
        torch.manual_seed(1)
        self.gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=4, target_modules="all-linear"))
        self.losses: list[float] = []
        self.strict_loading = False  # checkpoints hold no base

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """The graph gives what the model gives."""
        loss: torch.Tensor = self.gm(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The base is frozen."""
        return torch.optim.AdamW(lora_fx.lora_parameters(self.gm), lr=1e-2)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What trains, and no more."""
        trained = {id(parameter) for parameter in lora_fx.lora_parameters(self.gm)}
        names = {f"gm.{name}" for name, parameter in self.gm.named_parameters() if id(parameter) in trained}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in names}


def trainer_of(directory: str, epochs: int) -> pl.Trainer:
    """A Trainer as for any module."""
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(directory, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)],
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(steps: int = 20) -> dict[str, float]:
    """Train, stop half way and go on; train in one go; what was measured."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        whole, first, second = Tuning(), Tuning(), Tuning()
        loader = DataLoader(Text(4 * steps), batch_size=4)  # two batches a step, half of the steps an epoch
        trainer_of(f"{directory}/whole", 2).fit(whole, loader)
        trainer_of(f"{directory}/half", 1).fit(first, loader)
        half = f"{directory}/half/epoch=0.ckpt"
        trainer_of(f"{directory}/rest", 2).fit(second, loader, ckpt_path=half, weights_only=True)
    pairs = zip(lora_fx.lora_parameters(whole.gm), lora_fx.lora_parameters(second.gm), strict=True)
    with torch.no_grad():
        difference = max(float((one - other).abs().max()) for one, other in pairs)
    print(f"loss {whole.losses[0]:.3f} -> {whole.losses[-1]:.3f}; resumed differs by {difference}")
    return {"before": whole.losses[0], "after": whole.losses[-1], "resumed": difference}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)

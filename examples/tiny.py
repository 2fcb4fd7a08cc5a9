"""What the examples share: a small Llama made from a configuration, text from Python's own documentation, and digits.

Nothing is downloaded. With a model of your own, `transformers.AutoModelForCausalLM.from_pretrained(...)` takes the
place of `tiny_llama()`, and everything else stays.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import transformers
from torch.utils.data import Dataset

LENGTH = 48  # tokens of a row; a token is a byte


def tiny_llama(seed: int = 0, *, initializer_range: float = 0.02) -> transformers.LlamaForCausalLM:
    """Two layers, 150 thousand parameters, the same ones for the same seed."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
        initializer_range=initializer_range,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


class Text(Dataset[dict[str, torch.Tensor]]):
    """Rows of bytes: {"input_ids": (length,), "labels": (length,)}."""

    def __init__(self, rows: int, *, start: int = 0) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode()[start * LENGTH : (start + rows) * LENGTH]
        self.rows = torch.tensor(list(text)).view(rows, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def example_batch(rows: int = 2) -> dict[str, torch.Tensor]:
    """What `lora_fx.trace` is shown: with labels in it, the graph gives the loss, as the model does."""
    ids = torch.stack([Text(rows)[i]["input_ids"] for i in range(rows)])
    return {"input_ids": ids, "labels": ids}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 handwritten digits: images (rows, 1, 8, 8) from 0 to 1, and labels (rows,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)

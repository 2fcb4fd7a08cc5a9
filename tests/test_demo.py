"""The demo's task does not leak, and the demo fails when tuning does not help."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

from lora_fx import cli, demo
from lora_fx.demo_data import make_task, shingles


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_text_is_not_in_the_training_text(seed: int) -> None:
    task = make_task(seed)
    assert len(task.train) > 300
    assert len(task.held_out) > 100
    assert not {p.topic for p in task.train} & {p.topic for p in task.held_out}
    trained = set().union(*(shingles(f"{p.query} {p.passage}") for p in task.train))
    assert not any(shingles(f"{p.query} {p.passage}") & trained for p in task.held_out)
    assert all(pair.passage in task.pool and pair.query not in pair.passage for pair in task.held_out)
    assert len(set(task.pool)) == len(task.pool)


def test_a_demo_that_does_not_improve_fails(tmp_path, monkeypatch, capsys) -> None:
    """Without any training the folded model is the base: everything else must hold, and the status is 4.

    A small model does for that; `lora-fx demo` itself, which CI runs too, takes the real one.
    """
    task = make_task(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}
    bert = transformers.BertModel(transformers.BertConfig(**sizes))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: bert)
    small = demo.RetrievalTask(task.train, task.held_out[:12], tuple(p.passage for p in task.held_out[:24]))
    monkeypatch.setattr(demo, "make_task", lambda seed: small)
    monkeypatch.setattr(demo, "_train", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["lora-fx", "demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 4
    printed = capsys.readouterr()
    assert "did not improve" in printed.err
    assert "op for op the same" in printed.out
    assert (tmp_path / "folded.onnx").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_embeddings_of_nan_find_nothing() -> None:
    pairs = tuple(make_task(0).held_out[:6])
    task = demo.RetrievalTask((), pairs, tuple(pair.passage for pair in pairs))
    found = demo._recall(lambda *_: None, lambda _, texts: torch.full((len(texts), 3), torch.nan), task)
    assert found["recall@5"] == 0
    assert found["mrr"] == pytest.approx(1 / 6)


def test_the_demo_says_at_once_that_its_directory_is_a_file(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "make_task", lambda seed: pytest.fail("must not come this far"))
    monkeypatch.setattr(sys, "argv", ["lora-fx", "demo", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 3
    assert "is a file" in capsys.readouterr().err

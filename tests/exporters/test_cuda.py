"""Deployment on CUDA: everything that the other files check on the CPU, where a GPU is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deployed import BASE, ONE, TWO, Deployed, distance, same_bits

from exporters import AdapterSession, add_adapter_inputs, add_adapter_stacks, fold_into_onnx, make_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]


def test_a_folded_file_runs_on_cuda(deployed: Deployed, tmp_path: Path) -> None:
    fold_into_onnx(deployed.base, deployed.adapter(ONE), tmp_path / "out.onnx")
    folded = make_session(tmp_path / "out.onnx", provider="cuda")
    loaded = make_session(deployed.base, provider="cuda", adapter=deployed.adapter(ONE))
    assert folded.get_providers()[0] == "CUDAExecutionProvider"
    for feed, wanted in zip(deployed.feeds, deployed.wanted[ONE], strict=True):
        assert distance(folded.run(None, feed), wanted) < 0.01
        assert distance(loaded.run(None, feed), wanted) < 0.01


@pytest.mark.parametrize("rank", [None, 7])
def test_adapters_are_switched_on_cuda(deployed: Deployed, tmp_path: Path, rank: int | None) -> None:
    add_adapter_inputs(deployed.base, tmp_path / "s.onnx", [deployed.adapter(ONE), deployed.adapter(TWO)], rank=rank)
    session = AdapterSession(tmp_path / "s.onnx", provider="cuda")
    for who in (ONE, TWO):
        session.load(who, deployed.adapter(who))
    for i, feed in enumerate(deployed.feeds):
        for who in (None, ONE, TWO):
            wanted = deployed.wanted[who or BASE][i]
            assert distance(session.run(feed, who), wanted) < 0.01
            assert distance(session.bind(feed, who).run(), wanted) < 0.01
            assert distance(session.run_async(feed, who).result(timeout=60), wanted) < 0.01


def test_rows_choose_on_cuda(deployed: Deployed, tmp_path: Path) -> None:
    adapters = {ONE: deployed.adapter(ONE), TWO: deployed.adapter(TWO)}
    add_adapter_stacks(deployed.base, tmp_path / "rows.onnx", adapters)
    session = AdapterSession(tmp_path / "rows.onnx", provider="cuda")
    feed = deployed.feeds[1]
    mixed = session.run(feed | {"adapter_ids": np.array([2, 0, 1])})
    for row, who in enumerate((TWO, BASE, ONE)):
        assert distance([y[row] for y in mixed], [y[row] for y in deployed.wanted[who][1]]) < 0.01


def test_a_cuda_graph_takes_new_inputs(bert: Deployed, tmp_path: Path) -> None:
    add_adapter_inputs(bert.base, tmp_path / "s.onnx", bert.adapter(ONE), rank=4)
    session = AdapterSession(tmp_path / "s.onnx", provider="cuda", cuda_graph=True)
    session.load(ONE, bert.adapter(ONE))
    bound = session.bind(bert.feeds[0], ONE)
    first = bound.run()
    assert distance(first, bert.wanted[ONE][0]) < 0.01
    changed = {name: array[::-1].copy() for name, array in bert.feeds[0].items()}
    bound.update(changed)
    again = bound.run()
    assert distance([y[::-1] for y in again], first) < 0.01
    assert not same_bits(again, first)

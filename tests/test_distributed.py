"""Training in several processes: what `distributed_checks.py` finds, one test for each check in each world."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from distributed_checks import checks_of

GPUS = torch.cuda.device_count()
ON_GPUS = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="fewer than two CUDA devices")]


@functools.cache
def results(device: str) -> dict[str, list[str]]:
    """{"world name": the error of each rank}, of one run."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "results.json"
        command = [sys.executable, str(Path(__file__).with_name("distributed_checks.py")), device, str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())


def assert_right(device: str, name: str) -> None:
    errors = results(device)[name]
    assert errors
    for rank, error in enumerate(errors):
        assert not error, f"rank {rank}: {error}"


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, 4) for name in checks_of(size)])
def test_in_several_processes(size: int, name: str) -> None:
    assert_right("cpu", f"{size} {name}")


def test_a_checkpoint_of_two_processes_goes_on_in_one() -> None:
    assert_right("cpu", "1 a_checkpoint_goes_on_in_another_world")


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_GPUS) for name in checks_of(GPUS, "cuda")])
def test_on_several_gpus(name: str) -> None:
    assert_right("cuda", f"{GPUS} {name}")

"""The two files of an adapter: nothing in them can change unnoticed, and no kill leaves half of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from torch import nn

import lora_fx
from lora_fx import AdapterError, LoraFxError
from lora_fx.atomic import exchange, replace_in_directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def tiny() -> torch.fx.GraphModule:
    torch.manual_seed(7)
    return lora_fx.trace(Tiny().eval(), (torch.randn(2, 3),))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The smallest adapter there is."""
    gm = zoo.randomise(lora_fx.inject(tiny(), {"r": 1, "target_modules": ["fc"]}))
    lora_fx.save_adapter(gm, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_every_bit_that_flips_is_noticed(saved: Path) -> None:
    """All bits of both files, one by one, in the reader that all others use; some of them in load_adapter as well."""
    flips, gm = 0, tiny()
    for name in (CONFIG, WEIGHTS):
        good = (saved / name).read_bytes()
        for bit in range(8 * len(good)):
            damaged = bytearray(good)
            damaged[bit // 8] ^= 1 << bit % 8
            (saved / name).write_bytes(damaged)
            with pytest.raises(LoraFxError):
                lora_fx.read_adapter(saved)
            if bit % 97 == 0:
                with pytest.raises(LoraFxError):
                    lora_fx.load_adapter(gm, saved)
            flips += 1
        (saved / name).write_bytes(good)
    assert flips > 10_000
    lora_fx.load_adapter(gm, saved, integrity="required")


def test_peft_reads_what_is_sealed(saved: Path) -> None:
    torch.manual_seed(7)
    model = peft.PeftModel.from_pretrained(Tiny().eval(), saved)
    x = torch.randn(2, 3)
    assert torch.equal(model(x), lora_fx.load_adapter(tiny(), saved).eval()(x))


def test_two_adapters_do_not_mix(saved: Path, tmp_path: Path) -> None:
    lora_fx.save_adapter(lora_fx.inject(tiny(), {"r": 1, "lora_alpha": 99, "target_modules": ["fc"]}), tmp_path / "two")
    os.replace(tmp_path / "two" / CONFIG, saved / CONFIG)
    with pytest.raises(AdapterError, match=r"adapter_config.json is not what was saved \(sha256 differs\)"):
        lora_fx.load_adapter(tiny(), saved)
    assert lora_fx.load_adapter(tiny(), saved, integrity="ignored") is not None


def test_a_seal_can_be_demanded(tmp_path: Path) -> None:
    peft.get_peft_model(Tiny(), peft.LoraConfig(r=1, target_modules=["fc"])).save_pretrained(tmp_path)
    lora_fx.load_adapter(tiny(), tmp_path)
    for read in (
        lambda **o: lora_fx.load_adapter(tiny(), tmp_path, **o),
        lambda **o: lora_fx.read_adapter(tmp_path, **o),
    ):
        with pytest.raises(AdapterError, match="has no seal"):
            read(integrity="required")
        with pytest.raises(AdapterError, match="integrity='maybe' must be"):
            read(integrity="maybe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_base_is_refused_and_the_same_in_another_type_is_not(dtype: torch.dtype, saved: Path) -> None:
    same, other = tiny().to(dtype), tiny()
    with torch.no_grad():
        other.get_parameter("fc.weight").mul_(1.01)
    lora_fx.load_adapter(same, saved)
    with pytest.raises(AdapterError, match=r"saved over a base model with other weights \('fc.weight' is another"):
        lora_fx.load_adapter(other, saved)
    injected = lora_fx.inject(other, {"r": 1, "target_modules": ["fc"]})
    with pytest.raises(AdapterError, match="other weights"):
        lora_fx.swap_adapter(injected, "default", saved)
    lora_fx.load_adapter(other, saved, integrity="ignored")


def test_the_note_of_a_base_is_of_the_base(tmp_path: Path) -> None:
    """Not of what stands there once another adapter trains it in full."""
    gm = lora_fx.trace(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).eval(), (torch.randn(2, 3),))
    both = lora_fx.inject(gm, {"r": 1, "target_modules": ["0"], "modules_to_save": ["1"]}, adapter_name="full")
    both = lora_fx.inject(both, {"r": 1, "target_modules": ["1"]}, adapter_name="low")
    with torch.no_grad():
        for parameter in both.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    lora_fx.save_adapter(both, tmp_path / "low", adapter_name="low")
    lora_fx.load_adapter(gm, tmp_path / "low")


# Writing ----------------------------------------------------------------------------------------


def test_what_else_is_in_the_directory_stays(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    (saved / "link").symlink_to("README.md")
    saved.chmod(0o750)
    before = (saved / WEIGHTS).read_bytes()
    gm = zoo.randomise(lora_fx.inject(tiny(), {"r": 2, "target_modules": ["fc"]}))
    lora_fx.save_adapter(gm, saved)
    assert (saved / WEIGHTS).read_bytes() != before
    assert sorted(os.listdir(saved)) == sorted(["README.md", "link", CONFIG, WEIGHTS])
    assert (saved / "link").read_text() == "mine"
    assert saved.stat().st_mode & 0o777 == 0o750
    assert not list(saved.parent.glob(".*"))


def test_where_somebody_stands_is_not_moved_away(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    lora_fx.save_adapter(lora_fx.inject(tiny(), {"r": 2, "target_modules": ["fc"]}), ".")
    assert json.loads(Path(CONFIG).read_text())["r"] == 2
    assert json.loads((saved / CONFIG).read_text())["r"] == 2


def test_what_a_killed_process_left_is_cleared_away(saved: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (saved.parent / f".adapter.lora_fx-{int(dead.stdout)}-x").mkdir()
    (saved.parent / f".adapter.lora_fx-{os.getppid()}-x").mkdir()
    lora_fx.save_adapter(lora_fx.inject(tiny(), {"r": 2, "target_modules": ["fc"]}), saved)
    assert [path.name for path in saved.parent.glob(".*")] == [f".adapter.lora_fx-{os.getppid()}-x"]


def test_a_kill_leaves_the_old_files_or_the_new(tmp_path: Path) -> None:
    """200 kills of a process that writes one pair after the other; benchmarks/reliability.py does more of it."""
    target = tmp_path / "adapter"
    if not (exchange(tmp_path_of(tmp_path, "a"), tmp_path_of(tmp_path, "b"))):
        pytest.skip("this file system exchanges no directories, and so the promise does not hold here")
    replace_in_directory(target, {"one": b"0", "two": b"0", "other": b"stays"})
    for kill in range(100):
        child = os.fork()
        if child == 0:
            try:
                number = 0
                while True:
                    number += 1
                    data = f"{kill} {number}".encode() * 999
                    replace_in_directory(target, {"one": data, "two": data})
            finally:
                os._exit(0)
        signal.sigtimedwait([], 0.001 + kill % 17 / 4000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (target / "one").read_bytes() == (target / "two").read_bytes()
        assert (target / "other").read_bytes() == b"stays"
    replace_in_directory(target, {"one": b"", "two": b""})
    assert sorted(os.listdir(tmp_path)) == ["a", "adapter", "b"]


def tmp_path_of(directory: Path, name: str) -> Path:
    (directory / name).mkdir()
    return directory / name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("integrity", ["checked", "ignored"])
def test_reading_takes_no_more_than_three_times_the_file(integrity: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of a good file and of one whose header promises more: time and memory come from the file's size alone."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).eval()
    gm = lora_fx.inject(
        lora_fx.trace(model, (torch.randn(2, 512),)), {"r": 512, "target_modules": ["0"]}, adapter_dtype=dtype
    )
    lora_fx.save_adapter(gm, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    good = file.read_bytes()
    assert len(good) > 1_000_000
    lora_fx.read_adapter(tmp_path, integrity=integrity)  # what is imported and cached meanwhile does not count
    for data in (good, good.replace(b"[512,512]", b"[5" + b"9" * 5 + b",5]", 1), good[: len(good) // 2]):
        file.write_bytes(data)
        tracemalloc.start()
        started = time.perf_counter()
        with contextlib.suppress(LoraFxError):
            lora_fx.read_adapter(tmp_path, integrity=integrity)
        seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * len(data) + 200_000
        assert seconds < 2  # a second is the bound, on a machine of one's own

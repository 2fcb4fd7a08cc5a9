"""Files that were changed at random: whoever reads them refuses them, or takes them, and nothing else happens.

Thousands of changes that are the same everywhere, what ten million runs of atheris left, and a minute more of it.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import fuzz_targets
import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERESTING = [b"\x00", b"\xff", b"\x7f", b"\x80", b"0", b"-1", b"1e999", b"NaN", b'"', b"{", b"[", b"\xff\xff\xff\xff"]


def changed(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """One to four changes each: bits, cut, doubled, moved, and inserted bytes."""
    source = random.Random(seed)
    for _ in range(count):
        data = bytearray(good)
        for _ in range(source.randint(1, 4)):
            at, length = source.randrange(len(data) + 1), source.randint(1, 16)
            match source.randrange(5):
                case 0 if at < len(data):
                    data[at] ^= 1 << source.randrange(8)
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = data[at : at + length]
                case 3:
                    data[at:at] = source.choice(INTERESTING)
                case _:
                    data[at : at + length] = source.randbytes(length)
        yield bytes(data)


@pytest.mark.parametrize("name", fuzz_targets.NAMES)
def test_what_fuzzing_found_is_refused_or_taken(name: str) -> None:
    targets = fuzz_targets.Targets()
    corpus = fuzz_targets.kept(name)
    assert len(corpus) > 10
    for data in corpus:
        fuzz_targets.one(getattr(targets, name))(data)
    targets.close()


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no wheel for this platform")
def test_a_minute_of_each_finds_nothing(tmp_path: Path) -> None:
    """All at once, guided by coverage, from a seed of the clock's."""
    running = {}
    for name in fuzz_targets.NAMES:
        command = [
            "nice",
            sys.executable,
            "tests/fuzz.py",
            name,
            "-max_total_time=60",
            f"-artifact_prefix={tmp_path}/{name}-",
        ]
        with (tmp_path / f"{name}.log").open("wb") as log:
            running[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    for name, process in running.items():
        status = process.wait(timeout=300)
        said = (tmp_path / f"{name}.log").read_text(errors="replace")
        found = [file.read_bytes() for file in tmp_path.glob(f"{name}-*")]
        assert status == 0, f"{name}: {found}\n{said[-3000:]}"
        done = re.search(r"Done (\d+) runs", said)
        assert done is not None
        assert int(done[1]) > 1000, "the law would be vacuous"


@pytest.mark.parametrize(
    ("name", "count"),
    [("adapter", 8000), ("configuration", 8000), ("onnx", 1200), ("onnx_adapter", 4000), ("training_log", 4000)],
)
def test_what_was_changed_is_refused_or_taken(name: str, count: int) -> None:
    targets = fuzz_targets.Targets()
    run = fuzz_targets.one(getattr(targets, name))
    goods = targets.good(name)
    getattr(targets, name)(goods[0])
    for good in goods:
        for number, data in enumerate(changed(good, count // len(goods), seed=len(name))):
            try:
                run(data)
            except BaseException as error:
                pytest.fail(f"{name}, change {number}: {type(error).__name__}: {error}\n{data!r}")
    targets.close()

"""Files that were changed at random: whoever reads them refuses them, or takes them, and nothing else happens.

A few thousand of each in the tests; `python tests/fuzz_targets.py` goes on with atheris, guided by coverage.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import fuzz_targets
import pytest

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


@pytest.mark.parametrize(
    ("name", "count"), [("adapter", 8000), ("configuration", 8000), ("onnx", 1200), ("onnx_adapter", 4000)]
)
def test_what_was_changed_is_refused_or_taken(name: str, count: int) -> None:
    targets = fuzz_targets.Targets()
    run = fuzz_targets.one(getattr(targets, name))
    goods = targets.good(name)
    for good in goods:
        getattr(targets, name)(good)
        for number, data in enumerate(changed(good, count // len(goods), seed=len(name))):
            try:
                run(data)
            except BaseException as error:
                pytest.fail(f"{name}, change {number}: {type(error).__name__}: {error}\n{data!r}")
    targets.close()

"""Fuzz what reads files, guided by coverage: `python tests/fuzz.py TARGET [libFuzzer's options] [CORPUS]`.

    python tests/fuzz.py adapter -runs=10000000
    python tests/fuzz.py onnx -max_total_time=60 /tmp/corpus

New inputs that reach new code go to the first corpus; what tests/fuzz_corpus/TARGET.zip keeps of earlier runs is read
besides. A finding is written to crash-*, and the exit status is not 0.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lora_fx", "exporters", "onnx_ir"]):
    import fuzz_targets

    import exporters.onnx_adapters  # noqa: F401


def mutate_adapter(data: bytes, max_size: int, seed: int) -> bytes:
    """Every second time the header alone, with its length made right: past the first eight bytes few others get."""
    if seed % 2 or len(data) < 8:
        return bytes(atheris.Mutate(data, max_size))
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    return fuzz_targets.framed(bytes(atheris.Mutate(header, max_size)), rest)[:max_size]


def main() -> None:
    """Fuzz one target."""
    name, options = sys.argv[1], sys.argv[2:]
    logging.disable()
    targets = fuzz_targets.Targets()
    with tempfile.TemporaryDirectory() as seeds, contextlib.closing(targets):
        for number, data in enumerate([*targets.good(name), *fuzz_targets.kept(name)]):
            (Path(seeds) / str(number)).write_bytes(data)
        corpora = [option for option in options if not option.startswith("-")]
        flags = [option for option in options if option.startswith("-")]
        # What the process that started this one has taken counts as this one's.
        limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 3072
        arguments = [sys.argv[0], "-max_len=4096", f"-rss_limit_mb={limit}", "-timeout=20", *flags, *corpora, seeds]
        mutator = {"custom_mutator": mutate_adapter} if name == "adapter" else {}
        atheris.Setup(arguments, fuzz_targets.one(getattr(targets, name)), **mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

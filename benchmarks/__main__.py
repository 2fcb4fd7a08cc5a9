"""`python -m benchmarks [subject ...] [--quick] [--json FILE] [--plots FOLDER] [--rounds N]`, or `lora-fx bench`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

SUBJECTS = (
    "injection",
    "folding",
    "training",
    "adapters",
    "export",
    "latency",
    "deployment",
    "reliability",
    "scale",
    "gpu",
    "goals",
    "optimizer",
    "curves",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subjects and print their tables. 0 ok, 2 usage, 4 a check failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in options.subjects:
        if name not in SUBJECTS:
            parser.error(f"unknown subject {name!r}; choose from {', '.join(SUBJECTS)}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {str(options.json.parent)!r}; make it first")
    _settle()
    from .checks import CheckFailed
    from .report import Table, as_json, machine

    where = machine()
    print(f"{where}\n", flush=True)
    results: dict[str, list[Table]] = {}
    status = 0
    for name in options.subjects or SUBJECTS:
        started = time.perf_counter()
        tables: list[Table] = []
        try:
            measure = importlib.import_module(f".{name}", __package__).measure
            for table in measure(quick=options.quick, rounds=options.rounds):  # shown as they come: some take hours
                print(f"{table}\n" if tables else f"## {name}\n\n{table}\n", flush=True)
                tables.append(table)
        except CheckFailed as error:
            print(f"{name}: check failed, nothing was timed: {error}", file=sys.stderr, flush=True)
            status = 4
        if tables:
            results[name] = tables
            print(f"({name} took {time.perf_counter() - started:.0f} s)\n", flush=True)
    if options.plots:
        from .plots import draw

        print("\n".join(f"written: {path}" for path in draw(results, options.plots)))
    if options.json:
        options.json.write_text(as_json(where, results), "utf-8")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="lora_fx against PEFT and the floor.")
    parser.add_argument(
        "subjects", nargs="*", metavar="subject", help=f"of {', '.join(SUBJECTS)}; all if none is named"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small models, few rounds: a check that it runs",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every table to FILE as well")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw what has a picture to FOLDER, as SVG")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="rounds of each timing; default by subject")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _settle() -> None:
    """One thread, one seed, no network, no other library's chatter."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    warnings.simplefilter("ignore")
    import torch

    for name in ("torch.onnx", "torch.export", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)


if __name__ == "__main__":
    sys.exit(main())

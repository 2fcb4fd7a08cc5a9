"""Several processes that fold a shard each; they write parts, and whoever called says what becomes of these."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapter_arrays import map_adapter
from .checkpoint_plan import plan_fold
from .errors import FoldError
from .fold_results import FoldedSite
from .hf_checkpoint import read_checkpoint
from .shard_writing import job_of, write_shard

if TYPE_CHECKING:
    from .checkpoint_folding import Hands, Options
    from .fold_work import Work

_PARENT_DIES = 1  # PR_SET_PDEATHSIG
_own: dict[str, Any] = {}


def fold_in_processes(
    options: Options, work: Work, names: list[str], sizes: dict[str, int], hands: Hands
) -> Iterator[tuple[str, Path, list[FoldedSite]]]:
    """(shard, the file that is to become it, what was done) as they come; the largest begin.

    Raises:
        FoldError: if a result is not finite, or a process dies.
    """
    from concurrent.futures.process import BrokenProcessPool

    count = min(hands.workers, len(names))
    aside = work.aside if work.aside.is_dir() else None
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(options, aside, work.parts, hands.threads, os.getpid()),
    )
    try:
        waiting = {pool.submit(_fold, name): name for name in sorted(names, key=lambda name: -sizes[name])}
        for future in as_completed(waiting):
            part, sites = future.result()
            yield waiting[future], part, sites
    except BrokenProcessPool as error:
        raise FoldError(
            "a worker process died (for want of memory?), or could not be started: a script that gives workers= keeps "
            "its calls under `if __name__ == '__main__':`; use fewer workers, or one"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare(options: Options, aside: Path | None, parts: Path, threads: int, parent: int) -> None:
    _die_with(parent)
    torch.set_num_threads(1)
    arrays, let_go = map_adapter(options.adapter, adapter_name=options.adapter_name, integrity="ignored")
    checkpoint = read_checkpoint(options.base, FoldError, aside)
    _own.update(
        checkpoint=checkpoint,
        plan=plan_fold(checkpoint, arrays, let_go),
        let_go=let_go,
        parts=parts,
        accumulate=options.accumulate,
        threads=threads,
    )


def _die_with(parent: int) -> None:
    """A parent that is killed tells nobody, and this process would write for nobody."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _fold(name: str) -> tuple[Path, list[FoldedSite]]:
    part: Path = _own["parts"] / f"{name}.{os.getpid()}"
    job = job_of(_own["checkpoint"], _own["plan"], name, _own["accumulate"], _own["let_go"])
    return part, write_shard(replace(job, threads=_own["threads"]), part)

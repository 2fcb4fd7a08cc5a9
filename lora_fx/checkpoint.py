"""An adapter folded into a checkpoint, from safetensors shards to safetensors shards, with no model and no model code.

fold_checkpoint(base, adapter, out)                    a directory of the same layout
fold_checkpoint(base, adapter, base, in_place=True)    the shards themselves, one after the other
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapter_arrays import map_adapter
from .adapter_integrity import Integrity
from .checkpoint_folding import Hands, Options, Order, Progress, fold_beside, fold_in_place
from .errors import FoldError
from .fold_results import FoldedSite, FoldReport, table_of, warn_of_losses
from .fold_work import IN_PLACE, Beside, clear, is_fixed, work_for
from .hf_checkpoint import CONFIG
from .tables import Shown, Table, counted, some_of

_MOST_THREADS = 4  # of one process, each with a few MiB of its own


@dataclass(frozen=True)
class CheckpointReport(Shown):
    """What folding into a checkpoint did, weight by weight. Prints as a table.

    Attributes:
        path: the directory with the new weights.
        adapter: the adapter's directory.
        sites: the weights that something was added to.
        trained: names of tensors that the adapter has as a whole, and that took the base's place.
        shards: files that were written.
        resumed: how many of them an interrupted fold had finished.
        bytes_written: of these files.
        seconds: what it took.
        notes: what the caller should know.
    """

    path: str
    adapter: str
    sites: tuple[FoldedSite, ...]
    trained: tuple[str, ...]
    shards: int
    resumed: int
    bytes_written: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        fields: dict[str, Any] = dict(vars(self))
        return fields | {"sites": [vars(site) | {"dtype": str(site.dtype)} for site in self.sites]}

    def blocks(self) -> list[str | Table]:
        """What was written, a row for each weight, and notes."""
        done = f", {self.resumed} of them before an interruption" if self.resumed else ""
        blocks: list[str | Table] = [
            f"{self.path}: {self.adapter} folded into {counted(len(self.sites), 'weight')}; "
            f"{counted(self.shards, 'shard')}{done}, {self.bytes_written / 1e6:,.1f} MB, {self.seconds:.2f} s",
            table_of(self.sites),
        ]
        if self.trained:
            blocks.append(f"replaced, because the adapter trained them in full: {', '.join(self.trained)}")
        return [*blocks, *self.notes]


def fold_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    in_place: bool = False,
    overwrite: bool = False,
    accumulate: torch.dtype | None = None,
    integrity: Integrity = "checked",
    workers: int = 1,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Fold an adapter into a checkpoint of safetensors shards: W + scaling · B @ A in each weight that it is for.

    The result has the base's layout: the same shards with the same headers, in which the bytes of adapted weights are
    others, and copies of its index, config, tokenizer and other files. The bits are those of `lora_fx.fold`. Weights
    are read, folded and written in blocks, so memory does not grow with the checkpoint. Everything is checked before
    the first byte is written. `out` is there when it is whole; a call that was killed is gone on with by the same call
    again, and the files are the same as if it had not been. torch has one thread of its own meanwhile: blocks are
    folded side by side in up to four of Python's, or in processes.

    What the files alone do not tell is refused, and not guessed: names that differ from the model's, a tied weight
    whose head has no name, a square weight that may lie either way.

    Args:
        base: a directory with model.safetensors, or with shards and their index; and config.json, if it has one.
        adapter: a directory that PEFT or `save_adapter` wrote.
        out: a directory to make; with in_place, the base.
        adapter_name: the sub-directory to take of a PEFT directory of several adapters.
        in_place: change the base's own shards, one after the other, on no more disk than one of them. While some have
            changed and others have not, config.json and the index are set aside; the same call again goes on.
        overwrite: replace a model directory at `out`.
        accumulate: as of `fold`.
        integrity: as of `load_adapter`.
        workers: processes, each of which folds a shard at a time. Each imports torch first, and shares this process's
            threads with the others: worth it for many shards on many cores, and slower than one elsewhere.
        progress: is told (bytes that are done, bytes in all) now and then.

    Raises:
        AdapterError: if the adapter does not fit the checkpoint.
        FoldError: if the checkpoint is broken or has weights that cannot be added to, the adapter is folded in already,
            a result is not finite, or `out` cannot be written.
    """
    started = time.perf_counter()
    _check_types(base, adapter, out, adapter_name, in_place, overwrite, workers, progress)
    if not any(accumulate is each for each in (None, torch.float32, torch.float64)):
        raise FoldError(f"accumulate={accumulate!r} must be torch.float32 or torch.float64")
    threads = torch.get_num_threads()
    hands = Hands(workers, max(1, min(_MOST_THREADS, threads // workers)), progress)
    try:
        target = _checked_target(base, out, in_place=in_place, overwrite=overwrite)
        arrays, let_go = map_adapter(adapter, adapter_name=adapter_name, integrity=integrity)
        options = Options(Path(os.path.realpath(base)), Path(os.path.realpath(adapter)), adapter_name, accumulate)
        clear(target / IN_PLACE if in_place else work_for(target))
        torch.set_num_threads(1)  # blocks are too small to be shared out
        folded = (fold_in_place if in_place else fold_beside)(Order(options, arrays, let_go, hands), target)
    except OSError as error:
        raise FoldError(_why_not_written(out, error)) from error
    finally:
        torch.set_num_threads(threads)
    warn_of_losses(FoldReport((adapter_name,), folded.sites))
    return CheckpointReport(
        path=os.fspath(out),
        adapter=str(options.adapter),
        sites=folded.sites,
        trained=tuple(change.name for change in folded.plan.changes if change.is_whole),
        shards=folded.shards,
        resumed=folded.resumed,
        bytes_written=folded.size,
        seconds=time.perf_counter() - started,
        notes=(*folded.plan.notes, *_left_out(folded.checkpoint.left_out)),
    )


def _left_out(paths: tuple[Path, ...]) -> tuple[str, ...]:
    if not paths:
        return ()
    return (f"not copied, as they hold the base's weights, or an adapter: {some_of(map(str, paths), 4)}",)


def _why_not_written(out: object, error: OSError) -> str:
    what = f"cannot fold into {str(out)!r}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}; make room on that disk, or give another directory"
    return f"{what}; look at the permissions, or give another directory"


def _check_types(
    base: object,
    adapter: object,
    out: object,
    adapter_name: object,
    in_place: object,
    overwrite: object,
    workers: object,
    progress: object,
) -> None:
    for name, value in (("base", base), ("adapter", adapter), ("out", out)):
        path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise FoldError(f"{name}={value!r} must be the path of a directory")
    for name, value in (("in_place", in_place), ("overwrite", overwrite)):
        if not isinstance(value, bool):
            raise FoldError(f"{name}={value!r} must be True or False")
    if not isinstance(adapter_name, str):
        raise FoldError(f"adapter_name={adapter_name!r} must be the name of an adapter; leave it out for the only one")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise FoldError(f"workers={workers!r} must be a number of processes, from 1")
    if progress is not None and not callable(progress):
        raise FoldError(f"progress={progress!r} must be a function of (bytes that are done, bytes in all)")


def _checked_target(
    base: str | os.PathLike[str], out: str | os.PathLike[str], *, in_place: bool, overwrite: bool
) -> Path:
    """The directory to write, free of links.

    Raises:
        FoldError: if it is not free to be written.
        OSError: if that cannot be looked at.
    """
    source, target = Path(os.path.realpath(base)), Path(os.path.realpath(out))
    if in_place:
        if source != target:
            raise FoldError(f"in_place=True changes the base, so out={str(out)!r} must be it, {str(base)!r}")
        if not source.is_dir():
            raise FoldError(f"there is no directory {str(base)!r} to fold into; give the one of the checkpoint")
        return target
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise FoldError(
            f"out={str(out)!r} is, holds or lies in the base {str(base)!r}; give a place outside, or in_place=True, "
            "which changes the base itself"
        )
    if target.exists() and not target.is_dir():
        raise FoldError(f"{str(out)!r} is a file; give a directory to make")
    is_begun = is_fixed(target) and Beside(work_for(target), "").known_key() is not None
    if target.is_dir() and any(target.iterdir()) and not is_begun:
        if not overwrite:
            raise FoldError(f"{str(out)!r} is not empty; overwrite=True (--overwrite) replaces a model directory")
        if not (target / CONFIG).is_file():
            raise FoldError(
                f"{str(out)!r} holds files but no {CONFIG}, so it is no model directory, and nothing replaces it; "
                "give another directory, or empty this one"
            )
        if is_fixed(target):
            raise FoldError(
                f"{str(out)!r} is a mount, or where you stand, so that nothing can take its place in one step; "
                "empty it, or give another directory"
            )
    return target

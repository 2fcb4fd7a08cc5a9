"""An adapter folded into a checkpoint, from safetensors shards to safetensors shards, with no model and no model code.

fold_checkpoint(base, adapter, out)                    a directory of the same layout
fold_checkpoint(base, adapter, base, in_place=True)    the shards themselves, one after the other
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .adapter_arrays import AdapterArrays, map_adapter
from .adapter_integrity import Integrity
from .checkpoint_plan import Change, CheckpointPlan, check_base_note, left_out_note, plan_fold
from .errors import FoldError
from .fold_results import FoldedSite, FoldReport, table_of, warn_of_losses
from .fold_work import IN_PLACE, Beside, InPlace, clear, is_fixed, locked, remove, work_for
from .hf_checkpoint import CONFIG, Checkpoint, read_checkpoint, read_json, untied_config
from .shard_writing import ShardJob, check_finite, write_shard
from .tables import Shown, Table, counted

RECORD = "lora_fx_fold.json"
_MOST_THREADS = 4  # of one process, each with a few MiB of its own

# (bytes that are done, bytes in all).
Progress = Callable[[int, int], object]


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


@dataclass(frozen=True)
class Options:
    """What was asked for; plain values that another process can be given."""

    base: Path
    adapter: Path
    adapter_name: str
    accumulate: torch.dtype | None


@dataclass(frozen=True)
class Hands:
    """Who folds: processes, threads of this one, and what is told."""

    workers: int
    threads: int
    progress: Progress | None


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
        workers: processes, each of which folds a shard at a time.
        progress: is told (bytes that are done, bytes in all) now and then.

    Raises:
        AdapterError: if the adapter does not fit the checkpoint.
        FoldError: if the checkpoint is broken or has weights that cannot be added to, the adapter is folded in already,
            a result is not finite, or `out` cannot be written.
    """
    started = time.perf_counter()
    if accumulate not in (None, torch.float32, torch.float64):
        raise FoldError(f"accumulate={accumulate!r} must be torch.float32 or torch.float64")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise FoldError(f"workers={workers!r} must be a number of processes, from 1")
    target = _checked_target(base, out, in_place=in_place, overwrite=overwrite)
    arrays, let_go = map_adapter(adapter, adapter_name=adapter_name, integrity=integrity)
    options = Options(Path(os.path.realpath(base)), Path(os.path.realpath(adapter)), adapter_name, accumulate)
    way = _fold_in_place if in_place else _fold_beside
    clear(target / IN_PLACE if in_place else work_for(target))
    threads = torch.get_num_threads()
    hands = Hands(workers, max(1, min(_MOST_THREADS, threads // workers)), progress)
    torch.set_num_threads(1)  # blocks are too small to be shared out
    try:
        report = way(options, arrays, let_go, target, hands)
    except OSError as error:
        raise FoldError(_why_not_written(out, error)) from error
    finally:
        torch.set_num_threads(threads)
    report = replace(report, path=os.fspath(out), seconds=time.perf_counter() - started)
    warn_of_losses(FoldReport((adapter_name,), report.sites))
    return report


def _why_not_written(out: object, error: OSError) -> str:
    what = f"cannot fold into {str(out)!r}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}; make room on that disk, or give another directory"
    return f"{what}; look at the permissions, or give another directory"


# Another directory ------------------------------------------------------------------------------------


def _fold_beside(
    options: Options, adapter: AdapterArrays, let_go: Callable[[], object], out: Path, hands: Hands
) -> CheckpointReport:
    _refuse_unfinished(options.base)
    checkpoint, plan = _planned(options, adapter, let_go)
    key, states = _key(checkpoint, adapter, options, is_in_place=False), _states(checkpoint)
    work = Beside(work_for(out), key)
    with locked(work.path, f"folding into {str(out)!r}"):
        try:
            work.begin()
            done = [name for name in work.done() if name in {shard.path.name for shard in checkpoint.shards}]
            fold = Fold(options, checkpoint, plan, let_go, hands)
            fold.run(work, [shard.path.name for shard in checkpoint.shards if shard.path.name not in done], done)
            _write_companions(checkpoint, plan, adapter, work.new)
            sites = [site for shard in checkpoint.shards for site in work.noted(shard.path.name)]
            if _states(checkpoint) != states:
                raise FoldError(
                    f"shards of {str(options.base)!r} changed while they were folded, so that the result would be a "
                    "mixture; let whatever writes there end, and call again"
                )
            work.publish(out)
        except Exception:  # not an interrupt, after which the same call goes on
            remove(work.path)
            raise
        remove(work.path)
    return _report(options, checkpoint, plan, sites, fold, len(checkpoint.shards), len(done))


def _write_companions(checkpoint: Checkpoint, plan: CheckpointPlan, adapter: AdapterArrays, folder: Path) -> None:
    """All files but the shards."""
    for file in checkpoint.others:
        if file.name == RECORD and len(file.parts) == 1:
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if plan.unties and file == Path(CONFIG):
            write_durably_text(target, untied_config(checkpoint.config))
        else:
            shutil.copyfile(checkpoint.directory / file, target)
            with open(target, "rb") as copied:
                os.fsync(copied.fileno())
    if checkpoint.index is not None:
        (folder / checkpoint.index).unlink(missing_ok=True)
        source = checkpoint.directory / checkpoint.index
        untied = [change for change in plan.changes if change.is_untied]
        if untied:
            write_durably_text(folder / checkpoint.index, _grown_index(source, untied))
        else:
            shutil.copyfile(source, folder / checkpoint.index)
    (folder / RECORD).unlink(missing_ok=True)
    write_durably_text(folder / RECORD, _record(checkpoint.directory, adapter))


def write_durably_text(path: Path, value: Mapping[str, Any]) -> None:
    """JSON in a new file, on the disk when this returns."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _grown_index(source: Path, untied: list[Change]) -> dict[str, Any]:
    index = read_json(source, FoldError)
    places = dict(index["weight_map"]) | {change.name: change.source.path.name for change in untied}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        size = metadata["total_size"] + sum(change.source.nbytes for change in untied)
        index = index | {"metadata": metadata | {"total_size": size}}
    return index | {"weight_map": places}


# In place ---------------------------------------------------------------------------------------------


def _fold_in_place(
    options: Options, adapter: AdapterArrays, let_go: Callable[[], object], out: Path, hands: Hands
) -> CheckpointReport:
    place = out / IN_PLACE
    begun = place.is_dir()
    with locked(place, f"folding into {str(out)!r}"):
        work = InPlace(place, "")
        try:
            aside = work.aside if begun and work.aside.is_dir() else None
            checkpoint, plan = _planned(options, adapter, let_go, aside, is_begun=work.known_key() is not None)
            names = _changed_shards(checkpoint, plan)
            work = InPlace(place, _key(checkpoint, adapter, options, is_in_place=True), keeps_old=len(names) == 1)
            _check_in_place(checkpoint, plan, work)
            fold = Fold(options, checkpoint, plan, let_go, hands)
            if work.known_key() is None:
                fold.check_finite()
            work.begin()
            done = work.done()
            is_mixed_meanwhile = len(names) > 1
            if is_mixed_meanwhile:
                work.set_aside([CONFIG, *([checkpoint.index] if checkpoint.index is not None else [])])
        except Exception:
            if not begun:
                work.put_back()
                remove(place)
            raise
        try:
            fold.run(work, [name for name in names if name not in done], done)
            sites = [site for name in names for site in work.noted(name)]
            (work.parts / RECORD).unlink(missing_ok=True)
            write_durably_text(work.parts / RECORD, _record(out, adapter))
            os.replace(work.parts / RECORD, out / RECORD)
            work.put_back()
        except Exception as error:
            if not work.take_back():
                text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                raise FoldError(
                    f"{str(out)!r} is half folded, and cannot be loaded as it is: {text}. Mend that, and make the "
                    "same call again, which goes on"
                ) from error
            if RECORD not in {file.name for file in checkpoint.others}:
                (out / RECORD).unlink(missing_ok=True)
            work.put_back()
            remove(place)
            raise
        remove(place)
    return _report(options, checkpoint, plan, sites, fold, len(names), len(done))


def _check_in_place(checkpoint: Checkpoint, plan: CheckpointPlan, work: InPlace) -> None:
    """Whether the checkpoint can change where it is, and no other fold has half changed it.

    Raises:
        FoldError: if not.
    """
    known = work.known_key()
    if known is not None and known != work.key:
        raise FoldError(_unfinished(work.directory))
    untied = next((change for change in plan.changes if change.is_untied), None)
    if untied is not None or plan.unties:
        name = untied.name if untied is not None else "the table and the head"
        raise FoldError(
            f"{name!r} cannot be folded in place: it is tied, and has to become a tensor of its own; fold into "
            "another directory, which unties it"
        )
    links = [shard.path.name for shard in checkpoint.shards if shard.path.is_symlink()]
    if links:
        raise FoldError(
            f"{links[0]!r} in {str(checkpoint.directory)!r} is a link, to a file that others may read too; fold into "
            "another directory"
        )


def _changed_shards(checkpoint: Checkpoint, plan: CheckpointPlan) -> list[str]:
    changed = {change.source.path for change in plan.changes}
    return [shard.path.name for shard in checkpoint.shards if shard.path in changed]


def _unfinished(directory: Path) -> str:
    return (
        f"{str(directory)!r} is half folded: a fold in place of another adapter, or with other options, was "
        "interrupted there. Make that call again, which finishes it, or take the checkpoint from where it was copied"
    )


def _refuse_unfinished(directory: Path) -> None:
    if InPlace(directory / IN_PLACE, "").known_key() is not None:
        raise FoldError(_unfinished(directory))


# Both -------------------------------------------------------------------------------------------------


@dataclass
class Fold:
    """A fold under way.

    Attributes:
        options, checkpoint, plan: what is folded into what.
        let_go: lets go of the mapped adapter's pages.
        hands: who does it.
        size: bytes of the shards that are written, those of an interrupted fold among them.
    """

    options: Options
    checkpoint: Checkpoint
    plan: CheckpointPlan
    let_go: Callable[[], object]
    hands: Hands

    def __post_init__(self) -> None:
        self.size = 0
        self._done = 0
        self._lock = threading.Lock()

    def job(self, name: str) -> ShardJob:
        """What is to be done for one shard."""
        job = job_of(self.checkpoint, self.plan, name, self.options.accumulate, self.let_go)
        return replace(job, told=self._tell, threads=self.hands.threads)

    def check_finite(self) -> None:
        """Before anything changes that cannot be taken back.

        Raises:
            FoldError: if a result is not finite.
        """
        for shard in self.checkpoint.shards:
            check_finite(self.job(shard.path.name))

    def run(self, work: Beside | InPlace, names: list[str], done: list[str]) -> None:
        """Fold the shards of these names; others are done.

        Raises:
            FoldError: if there is no room for them, or a result is not finite.
        """
        sizes = {name: self.job(name).size for name in [*names, *done]}
        self.size = sum(sizes.values())
        self._done = sum(sizes[name] for name in done)
        _check_room(work, [sizes[name] for name in names])
        if self.hands.workers > 1 and len(names) > 1:
            from .fold_workers import fold_in_processes

            for name, part, sites in fold_in_processes(self.options, work, names, sizes, self.hands):
                self._tell(sizes[name])
                work.finish(name, part, sites)
            return
        with ThreadPoolExecutor(1) as disk:  # which gets one shard while the next is folded
            last: Future[None] | None = None
            for name in names:
                part = work.parts / name
                sites = write_shard(self.job(name), part)
                if last is not None:
                    last.result()
                last = disk.submit(work.finish, name, part, sites)
            if last is not None:
                last.result()

    def _tell(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self.hands.progress is not None:
                self.hands.progress(self._done, self.size)


def job_of(
    checkpoint: Checkpoint,
    plan: CheckpointPlan,
    name: str,
    accumulate: torch.dtype | None,
    let_go: Callable[[], object],
) -> ShardJob:
    """What is to be done for the shard of that name."""
    shard = next(shard for shard in checkpoint.shards if shard.path.name == name)
    changes = [change for change in plan.changes if change.source.path == shard.path]
    return ShardJob(shard, changes, accumulate, let_go)


def _planned(
    options: Options,
    adapter: AdapterArrays,
    let_go: Callable[[], object],
    aside: Path | None = None,
    *,
    is_begun: bool = False,
) -> tuple[Checkpoint, CheckpointPlan]:
    checkpoint = read_checkpoint(options.base, FoldError, aside)
    if not is_begun:
        _refuse_twice(checkpoint, adapter)
    plan = plan_fold(checkpoint, adapter, let_go)
    if not is_begun:
        check_base_note(plan, adapter)
    return checkpoint, plan


def _check_room(work: Beside | InPlace, sizes: list[int]) -> None:
    needed = (max(sizes, default=0) if isinstance(work, InPlace) else sum(sizes)) + (1 << 20)
    free = shutil.disk_usage(work.path).free
    if free < needed:
        raise FoldError(
            f"folding needs {needed / 1e6:,.0f} MB in {str(work.path.parent)!r}, and {free / 1e6:,.0f} MB are free; "
            "make room on that disk, or give another directory"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checked_target(
    base: str | os.PathLike[str], out: str | os.PathLike[str], *, in_place: bool, overwrite: bool
) -> Path:
    """The directory to write, free of links.

    Raises:
        FoldError: if it is not free to be written.
    """
    for name, value in (("base", base), ("out", out)):
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in os.fspath(value):
            raise FoldError(f"{name}={value!r} must be the path of a directory")
    source, target = Path(os.path.realpath(base)), Path(os.path.realpath(out))
    if in_place:
        if source != target:
            raise FoldError(f"in_place=True changes the base, so out={str(out)!r} must be it, {str(base)!r}")
        return target
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise FoldError(
            f"out={str(out)!r} is, holds or lies in the base {str(base)!r}; give a place outside, or in_place=True, "
            "which changes the base itself"
        )
    try:
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
    except OSError as error:
        raise FoldError(_why_not_written(out, error)) from error
    return target


def _refuse_twice(checkpoint: Checkpoint, adapter: AdapterArrays) -> None:
    for entry in _folds(checkpoint.directory):
        if isinstance(entry, dict) and entry.get("adapter") == adapter.data_sha256:
            raise FoldError(
                f"{str(adapter.directory)!r} is folded into {str(checkpoint.directory)!r} already ({RECORD} says so), "
                "and folding it again would count it twice; take the checkpoint as it is, or its base"
            )


def _folds(directory: Path) -> list[Any]:
    path = directory / RECORD
    if not path.is_file():
        return []
    found = read_json(path, FoldError).get("folds")
    return found if isinstance(found, list) else []


def _record(directory: Path, adapter: AdapterArrays) -> dict[str, Any]:
    """Which adapters were folded in, one after the other."""
    config = adapter.config
    entry = {
        "adapter": adapter.data_sha256,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
    }
    earlier = [each for each in _folds(directory) if each != entry]  # a fold in place may have come this far before
    return {"folds": [*earlier, entry]}


def _key(checkpoint: Checkpoint, adapter: AdapterArrays, options: Options, *, is_in_place: bool) -> str:
    """Of what is folded into what. Of a base that changes under way, only what stays counts."""
    digest = hashlib.sha256(f"1 {torch.__version__} {options.accumulate} {adapter.sha256}".encode())
    digest.update(json.dumps(adapter.config.to_peft(), sort_keys=True, default=str).encode())
    for shard in checkpoint.shards:
        digest.update(f"{shard.path.name} {shard.size}".encode() + shard.header)
    if not is_in_place:
        names = [shard.path for shard in checkpoint.shards] + [
            checkpoint.directory / each for each in checkpoint.others
        ]
        for path in names:
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode())
    return digest.hexdigest()


def _states(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """What tells of each shard whether it is still the file that it was."""
    stats = [shard.path.stat() for shard in checkpoint.shards]
    return [(each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in stats]


def _report(
    options: Options,
    checkpoint: Checkpoint,
    plan: CheckpointPlan,
    sites: list[FoldedSite],
    fold: Fold,
    shards: int,
    resumed: int,
) -> CheckpointReport:
    notes = plan.notes
    if checkpoint.left_out:
        notes = (*notes, left_out_note(checkpoint.left_out))
    return CheckpointReport(
        path="",
        adapter=str(options.adapter),
        sites=tuple(sites),
        trained=tuple(change.name for change in plan.changes if change.is_whole),
        shards=shards,
        resumed=resumed,
        bytes_written=fold.size,
        seconds=0.0,
        notes=notes,
    )

"""A planned fold carried out: into another directory, or in place; whatever fails leaves the checkpoint as it was."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .adapter_arrays import AdapterArrays
from .atomic import write_durably, write_through
from .checkpoint_changes import Change
from .checkpoint_plan import CheckpointPlan, check_base_note, plan_fold
from .errors import FoldError
from .fold_history import RECORD, Entry, entry_of, history_with, refuse_twice
from .fold_results import FoldedSite
from .fold_work import IN_PLACE, Beside, InPlace, locked, remove, work_for
from .hf_checkpoint import CONFIG, Checkpoint, read_checkpoint, read_json, untied_config
from .shard_writing import ShardJob, check_finite, job_of, write_shard

# (bytes that are done, bytes in all).
Progress = Callable[[int, int], object]


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


@dataclass(frozen=True)
class Order:
    """What is to be folded, and by whom.

    Attributes:
        options: what was asked for.
        adapter, let_go: as `map_adapter` gives them.
        hands: who does it.
    """

    options: Options
    adapter: AdapterArrays
    let_go: Callable[[], object]
    hands: Hands

    @property
    def entry(self) -> Entry:
        """What is noted of the adapter in the checkpoint."""
        return entry_of(self.adapter.data_sha256, self.adapter.config)


@dataclass(frozen=True)
class Folded:
    """What was done.

    Attributes:
        checkpoint, plan: the base's, and what was changed.
        sites: the weights that something was added to.
        shards: files that were written.
        resumed: how many of them an interrupted fold had finished.
        size: bytes of these files.
    """

    checkpoint: Checkpoint
    plan: CheckpointPlan
    sites: tuple[FoldedSite, ...]
    shards: int
    resumed: int
    size: int


@dataclass
class _Fold:
    """A fold under way.

    Attributes:
        order, checkpoint, plan: what is folded into what, and by whom.
        size: bytes of the shards that are written, those of an interrupted fold among them.
    """

    order: Order
    checkpoint: Checkpoint
    plan: CheckpointPlan
    size: int = field(default=0, init=False)
    _done: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def job(self, name: str) -> ShardJob:
        """What is to be done for one shard."""
        job = job_of(self.checkpoint, self.plan, name, self.order.options.accumulate, self.order.let_go)
        return replace(job, told=self._tell, threads=self.order.hands.threads)

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
        if self.order.hands.workers > 1 and len(names) > 1:
            from .fold_workers import fold_in_processes

            for name, part, sites in fold_in_processes(self.order.options, work, names, sizes, self.order.hands):
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
            if self.order.hands.progress is not None:
                self.order.hands.progress(self._done, self.size)


def _planned(order: Order, aside: Path | None = None, *, is_begun: bool = False) -> tuple[Checkpoint, CheckpointPlan]:
    """Of a fold that was begun in place, the base is no longer what it was."""
    checkpoint = read_checkpoint(order.options.base, FoldError, aside)
    if not is_begun:
        refuse_twice(checkpoint.directory, order.entry, order.adapter.directory)
    plan = plan_fold(checkpoint, order.adapter, order.let_go)
    if not is_begun:
        check_base_note(plan, order.adapter)
    return checkpoint, plan


def _check_room(work: Beside | InPlace, sizes: list[int]) -> None:
    needed = (max(sizes, default=0) if isinstance(work, InPlace) else sum(sizes)) + (1 << 20)
    free = shutil.disk_usage(work.path).free
    if free < needed:
        raise FoldError(
            f"folding needs {needed / 1e6:,.0f} MB in {str(work.path.parent)!r}, and {free / 1e6:,.0f} MB are free; "
            "make room on that disk, or give another directory"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Another directory ------------------------------------------------------------------------------------


def fold_beside(order: Order, out: Path) -> Folded:
    """Fold into another directory, which is there when it is whole.

    Raises:
        AdapterError: if the adapter does not fit the checkpoint.
        FoldError: if it is folded in already, a result is not finite, or the base is broken or changes meanwhile.
        OSError: if the file system refuses.
    """
    _refuse_unfinished(order.options.base)
    checkpoint, plan = _planned(order)
    key, states = _key(checkpoint, order, is_in_place=False), _states(checkpoint)
    work = Beside(work_for(out), key)
    with locked(work.path, f"folding into {str(out)!r}"):
        try:
            work.begin()
            done = work.done()
            fold = _Fold(order, checkpoint, plan)
            fold.run(work, [shard.path.name for shard in checkpoint.shards if shard.path.name not in done], done)
            _write_companions(checkpoint, plan, order, work.new)
            sites = [site for shard in checkpoint.shards for site in work.noted(shard.path.name)]
            if _states(checkpoint) != states:
                raise FoldError(
                    f"shards of {str(order.options.base)!r} changed while they were folded, so that the result would "
                    "be a mixture; let whatever writes there end, and call again"
                )
            work.publish(out)
        except Exception:  # not an interrupt, after which the same call goes on
            remove(work.path)
            raise
        remove(work.path)
    return Folded(checkpoint, plan, tuple(sites), len(checkpoint.shards), len(done), fold.size)


def _write_companions(checkpoint: Checkpoint, plan: CheckpointPlan, order: Order, folder: Path) -> None:
    """All files but the shards."""
    for file in checkpoint.others:
        if file.name == RECORD and len(file.parts) == 1:
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if plan.unties and file == Path(CONFIG):
            _write_json(target, untied_config(checkpoint.config))
        else:
            shutil.copyfile(checkpoint.directory / file, target)
            write_through(target)
    if checkpoint.index is not None:
        source = checkpoint.directory / checkpoint.index
        untied = [change for change in plan.changes if change.is_untied]
        if untied:
            _write_json(folder / checkpoint.index, _grown_index(source, untied))
        else:
            shutil.copyfile(source, folder / checkpoint.index)
            write_through(folder / checkpoint.index)
    _write_json(folder / RECORD, history_with(checkpoint.directory, order.entry))


def _grown_index(source: Path, untied: list[Change]) -> dict[str, Any]:
    index = read_json(source, FoldError)
    places = dict(index["weight_map"]) | {change.name: change.source.path.name for change in untied}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        size = metadata["total_size"] + sum(change.source.nbytes for change in untied)
        index = index | {"metadata": metadata | {"total_size": size}}
    return index | {"weight_map": places}


# In place ---------------------------------------------------------------------------------------------


def fold_in_place(order: Order, out: Path) -> Folded:
    """Fold into the base's own shards, one after the other, or go on with that.

    Raises:
        AdapterError, OSError: as of `fold_beside`.
        FoldError: as of that; and if the base is left half folded, to be gone on with by the same call.
    """
    place = out / IN_PLACE
    begun = place.is_dir()
    with locked(place, f"folding into {str(out)!r}"):
        work = InPlace(place, "")
        try:
            aside = work.aside if work.aside.is_dir() else None
            checkpoint, plan = _planned(order, aside, is_begun=work.known_key() is not None)
            names = _changed_shards(checkpoint, plan)
            work = InPlace(place, _key(checkpoint, order, is_in_place=True), keeps_old=len(names) == 1)
            _check_in_place(checkpoint, plan, work)
            fold = _Fold(order, checkpoint, plan)
            if work.known_key() is None:
                fold.check_finite()
            work.begin()
            done = work.done()
            if checkpoint.index is not None and len(names) > 1:
                work.set_aside([CONFIG, checkpoint.index])
        except Exception:
            if not begun:
                work.put_back()
                remove(place)
            raise
        try:
            fold.run(work, [name for name in names if name not in done], done)
            sites = [site for name in names for site in work.noted(name)]
            _write_json(work.parts / RECORD, history_with(out, order.entry))
            work.put_back()
            os.replace(work.parts / RECORD, out / RECORD)
        except Exception as error:
            if not work.take_back():
                text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                raise FoldError(
                    f"{str(out)!r} is half folded, and cannot be loaded as it is: {text}. Mend that, and make the "
                    "same call again, which goes on"
                ) from error
            work.put_back()
            remove(place)
            raise
        remove(place)
    return Folded(checkpoint, plan, tuple(sites), len(names), len(done), fold.size)


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON in a file, in place of what an interrupted fold left there; on the disk when this returns."""
    path.unlink(missing_ok=True)
    write_durably(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _key(checkpoint: Checkpoint, order: Order, *, is_in_place: bool) -> str:
    """Of what is folded into what. Of a base that changes under way, only what stays counts."""
    digest = hashlib.sha256(f"1 {torch.__version__} {order.options.accumulate} {order.adapter.sha256}".encode())
    digest.update(json.dumps(order.adapter.config.to_peft(), sort_keys=True, default=str).encode())
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

"""Where a checkpoint is folded, so that a kill at any moment leaves it as it was, or to be gone on with.

A directory is folded beside its place, and moved there in one step. A checkpoint that is folded in place changes one
shard at a time; while some have changed and others have not, config.json and the index are set aside, so that nobody
loads the mixture, and names in the work directory say what is done: `swap-X` is made before `ready-X` takes X's place,
so that with the one and without the other X is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .atomic import rename_to, replace_directory, sync_directory, write_durably, write_through
from .errors import FoldError
from .fold_results import FoldedSite

_LOCK, _JOB, _PARTS, _NEW, _ASIDE = "lock", "job.json", "parts", "new", "aside"
_CONFIG = "config.json"  # without which nobody loads the rest
_READY, _SWAP, _OLD = "ready-", "swap-", "old-"
IN_PLACE = ".lora_fx-fold"  # in the checkpoint's directory, with which it travels


def work_for(out: Path) -> Path:
    """The directory in which `out` is made ready: beside it, or in it, if it cannot be exchanged for another."""
    if is_fixed(out):
        return out / IN_PLACE
    place = next(parent for parent in out.parents if parent.exists())
    return place / f".{out.name[:100]}.lora_fx-fold"


def is_fixed(out: Path) -> bool:
    """Whether a directory has to stay: it is a mount, or where somebody stands, or alone may be written to."""
    if not out.is_dir():
        return False
    return os.path.ismount(out) or os.path.samefile(out, os.getcwd()) or not os.access(out.parent, os.W_OK)


@contextlib.contextmanager
def locked(work: Path, doing: str) -> Iterator[None]:
    """Have a work directory, which is made if it is not there, to oneself.

    Raises:
        FoldError: if another process has it.
    """
    while True:
        work.mkdir(exist_ok=True)
        try:
            descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # removed by who had it
            continue
        except OSError:
            with contextlib.suppress(OSError):
                work.rmdir()
            raise
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FoldError(f"another process is {doing}; let it end, or end it, and call again") from error
            with contextlib.suppress(FileNotFoundError):
                if os.stat(work / _LOCK).st_ino == os.fstat(descriptor).st_ino:
                    yield
                    return
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Work:
    """A work directory that is this process's own.

    Attributes:
        path: of it.
        key: of what is folded into what; a fold of something else is not gone on with.
    """

    path: Path
    key: str

    @property
    def parts(self) -> Path:
        """Where files are written until they are whole."""
        return self.path / _PARTS

    @property
    def aside(self) -> Path:
        """Where config.json and the index are while they would lead to a mixture."""
        return self.path / _ASIDE

    @property
    def new(self) -> Path:
        """What is to become the directory."""
        return self.path / _NEW

    def known_key(self) -> str | None:
        """The key of an interrupted fold; None if there is none."""
        try:
            noted = json.loads((self.path / _JOB).read_bytes())
            # A directory that was exchanged for the one in its place is the old one.
            return str(noted["key"]) if noted["place"] == self._place() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self) -> None:
        """Begin anew, or go on with what has the same key."""
        if self.known_key() != self.key:
            for entry in [entry for entry in os.scandir(self.path) if entry.name != _LOCK]:
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
            for directory in (self.parts, self.new, self.aside):
                directory.mkdir()
            job = {"key": self.key, "place": self._place()}
            write_durably(self.path / f"{_JOB}.new", json.dumps(job).encode())
            os.rename(self.path / f"{_JOB}.new", self.path / _JOB)
        for part in os.scandir(self.parts):
            os.unlink(part.path)  # nobody knows how far it got
        sync_directory(self.path)

    def _place(self) -> int:
        return os.stat(self.new).st_ino

    def note(self, name: str, sites: list[FoldedSite], file: Path) -> None:
        """Keep what folding a shard did, for the report of whoever goes on, and how to know the file again."""
        noted = {"sites": [_plain(site) for site in sites], "file": _state(file)}
        write_durably(self.parts / f"{name}.json", json.dumps(noted).encode())
        os.rename(self.parts / f"{name}.json", self.path / f"{_SWAP}{name}")

    def noted(self, name: str) -> list[FoldedSite]:
        """What `note` kept."""
        return [_site(fields) for fields in json.loads((self.path / f"{_SWAP}{name}").read_bytes())["sites"]]

    def check_noted(self, name: str, file: Path) -> None:
        """Raise FoldError if a finished shard is not the file that it was when it was finished."""
        if json.loads((self.path / f"{_SWAP}{name}").read_bytes())["file"] != _state(file):
            raise FoldError(
                f"{str(file)!r} was changed or exchanged since an interrupted fold finished it. If all of the "
                f"checkpoint was brought back as it was before, remove {str(self.path)!r}, and call again"
            )


@dataclass(frozen=True)
class Beside(Work):
    """Work on a directory of its own."""

    def done(self) -> list[str]:
        """The shards that an interrupted fold has finished."""
        names = sorted(name for name in os.listdir(self.new) if (self.path / f"{_SWAP}{name}").exists())
        for name in names:
            self.check_noted(name, self.new / name)
        return names

    def finish(self, name: str, part: Path, sites: list[FoldedSite]) -> None:
        """A shard is whole."""
        write_through(part)
        self.note(name, sites, part)
        os.rename(part, self.new / name)
        sync_directory(self.new)

    def publish(self, out: Path) -> None:
        """Let the directory take its place, where there is none, or one to replace; or its files, one by one."""
        if self.path.parent == out:
            last = (_CONFIG, *(name for name in os.listdir(self.new) if name.endswith(".index.json")))
            names = sorted(os.listdir(self.new), key=lambda name: (name in last, name))
            try:
                for name in names:
                    os.replace(self.new / name, out / name)
            except OSError:
                for name in names:
                    (out / name).unlink(missing_ok=True)  # which was empty
                raise
            sync_directory(out)
        elif not out.is_dir() or not any(out.iterdir()):
            rename_to(self.new, out)
        elif not replace_directory(self.new, out):
            raise FoldError(
                f"{str(out)!r} cannot be replaced in one step here (it is a mount, or where somebody stands); give "
                "another directory"
            )


@dataclass(frozen=True)
class InPlace(Work):
    """Work in the directory that changes.

    Attributes:
        keeps_old: an only shard is kept until all is done, so that whatever fails then can be taken back.
    """

    keeps_old: bool = False

    @property
    def directory(self) -> Path:
        """Of the checkpoint."""
        return self.path.parent

    def set_aside(self, names: list[str]) -> None:
        """Take away what leads to the shards."""
        for name in names:
            if (self.directory / name).exists():
                os.rename(self.directory / name, self.aside / name)
        sync_directory(self.aside)
        sync_directory(self.directory)

    def put_back(self) -> None:
        """What was set aside is in its place again."""
        for name in os.listdir(self.aside) if self.aside.is_dir() else ():
            os.rename(self.aside / name, self.directory / name)
        sync_directory(self.directory)

    def done(self) -> list[str]:
        """The shards that have changed; one that was about to does so now."""
        names = [name.removeprefix(_SWAP) for name in os.listdir(self.path) if name.startswith(_SWAP)]
        for name in names:
            if (self.path / f"{_READY}{name}").exists():
                self._swap(name)
            self.check_noted(name, self.directory / name)
        return sorted(names)

    def finish(self, name: str, part: Path, sites: list[FoldedSite]) -> None:
        """A shard is whole, and takes the place of the old one."""
        write_through(part)
        shutil.copymode(self.directory / name, part)
        os.rename(part, self.path / f"{_READY}{name}")
        sync_directory(self.path)
        if self.keeps_old:
            with contextlib.suppress(OSError):  # there are file systems without links
                os.link(self.directory / name, self.path / f"{_OLD}{name}")
        self.note(name, sites, self.path / f"{_READY}{name}")
        sync_directory(self.path)
        self._swap(name)

    def take_back(self) -> bool:
        """Put an old shard back; whether all is as it was."""
        kept = [name.removeprefix(_OLD) for name in os.listdir(self.path) if name.startswith(_OLD)]
        for name in kept:
            os.replace(self.path / f"{_OLD}{name}", self.directory / name)
            (self.path / f"{_SWAP}{name}").unlink(missing_ok=True)
        return not any(name.startswith(_SWAP) for name in os.listdir(self.path))

    def _swap(self, name: str) -> None:
        os.rename(self.path / f"{_READY}{name}", self.directory / name)
        sync_directory(self.directory)
        sync_directory(self.path)


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def remove(work: Path) -> None:
    """A work directory that is of no more use; half of it is never gone on with, as it gets another name first."""
    clear(work)
    with contextlib.suppress(OSError):
        os.rename(work, _gone(work))
    clear(work)


def clear(work: Path) -> None:
    """What is left of a work directory whose process was killed while it removed it."""
    shutil.rmtree(_gone(work), ignore_errors=True)


def _gone(work: Path) -> Path:
    return work.with_name(f"{work.name}.gone")


def _plain(site: FoldedSite) -> dict[str, Any]:
    return asdict(site) | {"dtype": str(site.dtype).removeprefix("torch.")}


def _site(fields: dict[str, Any]) -> FoldedSite:
    dtype = getattr(torch, fields["dtype"])
    return FoldedSite(**(fields | {"dtype": dtype, "untied_from": tuple(fields["untied_from"])}))

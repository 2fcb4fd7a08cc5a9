"""Files and directories that change in one step, and stay changed: a kill at any moment leaves the old, or the new."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

_EXCHANGE, _AT_FDCWD = 2, -100


def replace_in_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files that belong together into a directory, which is made if it is not there: all of them, or none.

    A new directory is renamed to its name when it is whole. An existing one is exchanged for another that has the new
    files, and links to all others. Where that cannot be (it holds directories, is where somebody stands, or a mount,
    or the file system has no such call) its files are replaced one by one, and put back if one of them cannot be.

    Raises:
        OSError: if the file system refuses; the directory is then as it was.
    """
    target = Path(os.path.realpath(directory))
    with temporary_beside(target) as new:
        for name, data in files.items():
            write_durably(new / name, data)
        if not target.exists():
            rename_to(new, target)
        elif not _exchanged(new, target):
            _replace_one_by_one(new, target, list(files))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that may be there already: in one step.

    Raises:
        OSError: if the file system refuses; the file is then as it was.
    """
    target = Path(os.path.realpath(path))
    with temporary_beside(target) as new:
        write_durably(new / target.name, data)
        os.replace(new / target.name, target)
    sync_directory(target.parent)


def replace_directory(new: Path, target: Path) -> bool:
    """Let a directory take the place and the permissions of another; False if that cannot be done in one step."""
    if os.path.samefile(target, os.getcwd()):
        return False
    status = target.stat()
    os.chmod(new, status.st_mode & 0o7777)
    if (status.st_uid, status.st_gid) != (os.getuid(), os.getgid()):
        os.chown(new, status.st_uid, status.st_gid)
    sync_directory(new)
    if not exchange(new, target):
        return False
    sync_directory(target.parent)
    return True


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False if this system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES):
        return False
    raise OSError(number, os.strerror(number), os.fspath(a))


def write_durably(path: Path, data: bytes) -> None:
    """A new file with the permissions that any new file gets, on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_through(path: Path) -> None:
    """What was written to a file is on the disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Names that were changed in a directory are on the disk when this returns."""
    with contextlib.suppress(OSError):  # some file systems know no such thing
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A new directory beside the target, so on its file system; gone afterwards, whatever happens.

    So are those that killed processes left there for the same target. Where one may write into the target alone, a
    directory, the new one lies in it.
    """
    place = next(parent for parent in target.parents if parent.exists())
    prefix = f".{target.name[:100]}.lora_fx-"  # names have 255 bytes
    for old in place.glob(f"{glob.escape(prefix)}*"):
        if not _is_alive(old.name.removeprefix(prefix).partition("-")[0]):
            shutil.rmtree(old, ignore_errors=True)
    try:
        new = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place))
    except PermissionError:
        if not target.is_dir():
            raise
        new = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target))
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(new, 0o777 & ~umask)
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


def rename_to(new: Path, target: Path) -> None:
    """Give a directory its name, where there is none of that name, or an empty one; parents are made."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sync_directory(new)
        os.rename(new, target)
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    sync_directory(target.parent)


def _exchanged(new: Path, target: Path) -> bool:
    """Let the new directory, with links to what else the old one has, take its place; False if that cannot be."""
    if any(entry.is_dir() for entry in target.iterdir()):
        return False
    fresh = set(os.listdir(new))
    try:
        for name in set(os.listdir(target)) - fresh:
            os.link(target / name, new / name, follow_symlinks=False)
        if not replace_directory(new, target):
            raise OSError(errno.ENOSYS, "no exchange")
    except OSError:
        for name in set(os.listdir(new)) - fresh:
            os.unlink(new / name)
        return False
    for name in os.listdir(new):  # what came in meanwhile; `new` is the old directory now
        if not os.path.lexists(target / name):
            os.rename(new / name, target / name)
    return True


def _replace_one_by_one(new: Path, target: Path, names: list[str]) -> None:
    done: list[str] = []
    (new / "old").mkdir()
    try:
        for name in names:
            if os.path.lexists(target / name):
                os.link(target / name, new / "old" / name, follow_symlinks=False)
            os.replace(new / name, target / name)
            done.append(name)
    except BaseException:
        for name in done:
            if os.path.lexists(new / "old" / name):
                os.replace(new / "old" / name, target / name)
            else:
                os.unlink(target / name)
        raise
    sync_directory(target)

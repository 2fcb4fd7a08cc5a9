"""A process that is killed, or refused, at any one of its calls to the file system: all of them are tried, in turn.

Python tells an audit hook before it opens, renames, links or removes anything. In a forked child, the hook kills the
process before the n-th such call, or lets that call fail as it does on a full disk.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

_CALLS = {
    "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate",
    "shutil.copyfile", "tempfile.mkdtemp", "tempfile.mkstemp",
}  # fmt: skip
DONE, REFUSED, CRASHED = 0, 77, 78


def run_with_fault(work: Callable[[], object], n: int, fault: OSError | None, expected: type[Exception]) -> int:
    """`work` in a process of its own, whose n-th call is its last, or fails with `fault`.

    Returns:
        DONE, REFUSED if it raised `expected`, CRASHED if it raised something else; −9 if it was killed.
    """
    child = os.fork()
    if child == 0:
        status = CRASHED
        try:
            _arm(n, fault)
            work()
            status = DONE
        except expected:
            status = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _arm(n: int, fault: OSError | None) -> None:
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or not isinstance(path, (str, bytes)) or os.fsdecode(path).startswith(("/dev", "/proc")):
                return
        elif event not in _CALLS:
            return
        count += 1
        if count == n:
            if fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise fault

    sys.addaudithook(hook)


def visible(directory: Path) -> dict[str, bytes]:
    """All files but those whose names begin with a dot."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }


def hidden(directory: Path) -> list[str]:
    """What is left behind."""
    return [str(path) for path in directory.rglob("*") if path.name.startswith(".")]

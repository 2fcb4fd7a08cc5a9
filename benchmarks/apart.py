"""A call in a process of its own, with the time and the memory that it takes above what importing takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .checks import require


@dataclass(frozen=True)
class Run:
    """What a call took: seconds, and bytes above what the process had after importing."""

    seconds: float
    processor: float
    anonymous: int
    resident: int


_SCRIPT = """
import json, sys, threading, time
import {modules}
def main():
    arguments = json.loads(sys.argv[1])
    def used():
        fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return [1024 * int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS")]
    before, most, done = used(), [0, 0], threading.Event()
    def watch():
        while not done.wait(0.005):
            most[:] = map(max, most, used())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, processor = time.perf_counter(), time.process_time()
    {call}(**arguments)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    done.set(); watcher.join()
    print(json.dumps([wall, processor, *(max(0, now - then) for now, then in zip(most, before))]))
if __name__ == "__main__":
    main()
"""


def run_apart(call: str, modules: str, **arguments: object) -> Run:
    """Call a function, by its full name, with what JSON can hold.

    Args:
        modules: what to import before memory is looked at, separated by commas.
    """
    with process_of(call, modules, **arguments) as process:
        said, _ = process.communicate()
        require(process.returncode == 0, f"{call}({arguments}) failed")
    return Run(*json.loads(said))


@contextmanager
def process_of(call: str, modules: str, **arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The process of `run_apart`, which prints what a Run holds when it ends."""
    with tempfile.TemporaryDirectory() as temporary:
        script = Path(temporary) / "call.py"
        script.write_text(_SCRIPT.format(modules=modules, call=call))
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), json.dumps(arguments)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        ) as process:  # fmt: skip
            yield process

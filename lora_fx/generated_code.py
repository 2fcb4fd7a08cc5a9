"""The code of a graph as it runs: it does what `gm.code` does, which fx writes and people read, in less time.

It reads all tensors at once (tensor_reads.py), and calls functions in place of overloads (direct_calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import fx
from torch.fx.experimental import _config as fx_config

from .copying import CODE
from .direct_calls import with_direct_calls
from .tensor_reads import COUNTER, nodes_to_bind, with_one_read

_Transform = Callable[[list[str]], list[str]]


@contextmanager
def code_to_run(gm: fx.GraphModule, graph: fx.Graph) -> Iterator[None]:
    """What `gm.recompile()` compiles in here is the code to run; `gm.code` is fx's."""
    nodes = nodes_to_bind(gm, graph)
    written: list[str] = []

    def transform(before: _Transform | None) -> _Transform:
        def transformed(body: list[str]) -> list[str]:
            plain = before(body) if before else body
            lines = with_direct_calls(with_one_read(plain, nodes), graph)
            written[:] = _joined(plain), _joined(lines)
            return lines

        return transformed

    with CODE.lock, graph.on_generate_code(transform):
        yield
    if not written:
        return
    plain, run = written
    if gm._code.endswith(run):
        gm._code = gm._code.removesuffix(run) + plain
    else:  # fx has put something of its own in
        gm._code = graph.python_code("self", record_func=fx_config.enrich_profiler_metadata).src


def _joined(body: list[str]) -> str:
    """Lines as fx puts them at the end of a function."""
    lines = "".join(line for line in body if not COUNTER.fullmatch(line)).lstrip("\n").split("\n")
    return "\n".join(f"    {line}" for line in lines)

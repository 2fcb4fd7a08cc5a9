"""Eight threads on one graph, and on one session: every answer has to be one of the right ones."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zoo
from torch import nn

import exporters
import lora_fx
from lora_fx import LoraFxError

THREADS = 8


def adapters_of(gm: torch.fx.GraphModule, count: int) -> torch.fx.GraphModule:
    """The graph with adapters a0, a1, ... that do something."""
    for number in range(count):
        gm = zoo.randomise(
            lora_fx.inject(gm, {"r": 2, "target_modules": ["0", "2"]}, adapter_name=f"a{number}"), f"a{number}"
        )
    return gm.eval()


def traced() -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(8)
    x = torch.randn(3, 7)
    return lora_fx.trace(nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).eval(), (x,)), x


def graph(calls: int) -> Counter[str]:
    """Calls of one graph, while others choose other adapters, swap values, fold copies, and fail.

    Returns:
        How many answers were right, wrong, and errors.
    """
    base, x = traced()
    gm = adapters_of(base, 2)
    with torch.no_grad():
        right = [base(x)]
        for name in ("a0", "a1"):
            lora_fx.set_adapters(gm, {name: 1.0})
            right.append(gm(x))

    def call(i: int) -> str:
        with torch.no_grad():
            y = gm(x)
        return "right" if any(torch.equal(y, each) for each in right) else "wrong"

    def disturb(i: int) -> str:
        if i % 5 == 4:
            with contextlib.suppress(LoraFxError):
                lora_fx.set_adapters(gm, {"nope": 1.0})
        elif i % 5 == 3:
            lora_fx.fold(gm, adapters=None) if lora_fx.active_adapters(gm) else None
        else:
            lora_fx.set_adapters(gm, ({"a0": 1.0}, {"a1": 1.0}, {})[i % 5 % 3])
        return "changes"

    return _run([call] * (THREADS - 1) + [disturb], calls)


def session(calls: int, directory: Path) -> Counter[str]:
    """Runs of one session with adapters of their own, while others load, unload, and fail."""
    base, x = traced()
    gm = adapters_of(base, 2)
    exporters.export_onnx_adapters(gm, directory / "model.onnx", check=False)
    opened = exporters.AdapterSession(directory / "model.onnx", provider="cpu")
    feed = {opened.inputs[0]: x.numpy()}
    for name in ("a0", "a1"):
        opened.load(name, directory / f"{name}.onnx_adapter")
    right = {name: opened.run(feed, name)[0] for name in (None, "a0", "a1")}
    bound = {name: opened.bind(feed, name) for name in (None, "a0", "a1")}
    assert len({y.tobytes() for y in right.values()}) == 3

    def call(i: int) -> str:
        name = (None, "a0", "a1")[i % 3]
        y = opened.run_async(feed, name).result(60)[0] if i % 7 == 0 else opened.run(feed, name)[0]
        return "right" if np.array_equal(y, right[name]) else "wrong"

    def bind(i: int) -> str:
        name = (None, "a0", "a1")[i % 3]
        return "right" if np.array_equal(bound[name].run()[0], right[name]) else "wrong"

    def disturb(i: int) -> str:
        with contextlib.suppress(LoraFxError):
            (
                lambda: opened.run({"nope": x.numpy()}, "a0"),
                lambda: opened.load("a0", directory / "a0.onnx_adapter"),
                lambda: opened.load("spare", directory / "a1.onnx_adapter"),
                lambda: opened.unload("spare"),
                lambda: opened.run(feed, "nope"),
            )[i % 5]()
        return "changes"

    return _run([call] * (THREADS - 2) + [bind, disturb], calls)


def _run(works: Sequence[Callable[[int], str]], calls: int) -> Counter[str]:
    found: Counter[str] = Counter()
    lock, done = threading.Lock(), threading.Event()
    each = -(-calls // (len(works) - 1))

    def loop(work: Callable[[int], str], is_last: bool) -> None:
        own: Counter[str] = Counter()
        i = 0
        while not done.is_set() if is_last else i < each:
            try:
                own[work(i)] += 1
            except Exception as error:
                own[f"{type(error).__name__}: {error}"[:200]] += 1
            i += 1
        with lock:
            found.update(own)

    threads = [threading.Thread(target=loop, args=(work, work is works[-1])) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads[:-1]:
        thread.join()
    done.set()
    threads[-1].join()
    return found

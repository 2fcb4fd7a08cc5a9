"""One bad input or fault at a time, each in a process of its own, with a limit on time and memory.

A case says what it does to a `World`, what is called then, and what has to come of it: an error of our tree whose
message names the field, file or tensor, or the right result. Whatever comes, graphs, parameters and files have to be
what they were before the call.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from torch import fx, nn

import exporters
import lora_fx
from lora_fx import LoraFxError
from lora_fx.sharding import whole

SECONDS, BYTES = 30, 3 * 2**30


class Small(nn.Module):
    """Two linears and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc0, self.fc1 = nn.Embedding(13, 7), nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc1(torch.tanh(self.fc0(self.words(ids))))


IDS = torch.tensor([[1, 5, 3], [0, 12, 2]])
TARGETS = ["fc0", "fc1"]


@dataclass
class World:
    """What a case may use, and break.

    Attributes:
        here: a directory of the case's own: adapter/, other/ (of rank 2), base.onnx, external.onnx (weights beside it),
            switch.onnx, rows.onnx, good.onnx_adapter.
        model, gm, adapted: the model, its graph, and the graph with the adapter that adapter/ holds.
    """

    here: Path
    model: nn.Module
    gm: fx.GraphModule
    adapted: fx.GraphModule
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Path:
        return self.here / "adapter"

    @property
    def feed(self) -> dict[str, np.ndarray]:
        return {"ids": IDS.numpy()}

    def state(self) -> dict[str, str]:
        """All that has to stay as it is."""
        found = {str(p.relative_to(self.here)): _file(p) for p in sorted(self.here.rglob("*"))}
        modules = {"gm": self.gm, "adapted": self.adapted, "model": self.model}
        modules |= {k: v for k, v in self.extra.items() if isinstance(v, nn.Module)}
        for name, module in modules.items():
            digest = hashlib.sha256(getattr(module, "code", "").encode())
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
                data = (
                    b""
                    if tensor.is_meta
                    else whole(tensor).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                )
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
                digest.update(data)
            digest.update(str(module.training).encode())
            if isinstance(module, fx.GraphModule):
                digest.update(repr(lora_fx.adapter_names(module)).encode())
            found[name] = digest.hexdigest()
        return found


def _file(path: Path) -> str:
    if path.is_symlink():
        return f"link {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "not a file"


def make_world(directory: Path) -> World:
    """Everything that cases use, made once."""
    torch.manual_seed(4)
    model = Small().eval()
    gm = lora_fx.trace(model, (IDS,))
    adapted = zoo.randomise(lora_fx.inject(gm, {"r": 3, "lora_alpha": 7, "target_modules": TARGETS}))
    other = zoo.randomise(lora_fx.inject(gm, {"r": 2, "lora_alpha": 5, "target_modules": TARGETS}))
    lora_fx.save_adapter(adapted, directory / "adapter")
    lora_fx.save_adapter(other, directory / "other")
    exporters.export_onnx(gm, directory / "base.onnx")
    exporters.export_onnx(gm, directory / "external.onnx", external_data=True, check=False)
    exporters.add_adapter_inputs(directory / "base.onnx", directory / "switch.onnx", directory / "adapter")
    exporters.add_adapter_stacks(directory / "base.onnx", directory / "rows.onnx", {"one": directory / "adapter"})
    exporters.write_onnx_adapter(directory / "switch.onnx", directory / "adapter", directory / "good.onnx_adapter")
    return World(directory, model, gm, adapted)


def nothing(world: World) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One bad input or fault.

    Attributes:
        name: group/what.
        call: what is done; returns whether the result is right, if it is to be right.
        words: fragments of the message: the field, file or tensor; none if the result has to be right.
        damage: what is done before, to what will have to stay as it is.
        changes: the call changes graphs or files on purpose, if it is right.
    """

    name: str
    call: Callable[[World], object]
    words: tuple[str, ...] = ()
    damage: Callable[[World], object] = nothing
    changes: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        kind: "refused" with an error of our tree, "right", "silent" (wrong, or accepted), "foreign" error, "hang",
            "killed", or "damaged" state.
        message: of the error, or what is wrong.
        seconds: what it took.
    """

    kind: str
    message: str
    seconds: float


def run_case(case: Case, world: World, directory: Path) -> Outcome:
    """Run a case in a forked process."""
    shutil.copytree(world.here, directory, symlinks=True)
    reader, writer = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _limit()
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps(_outcome(case, World(directory, world.model, world.gm, world.adapted))))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        if not select.select([pipe], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("hang", f"no answer after {SECONDS} s", time.perf_counter() - started)
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    took = time.perf_counter() - started
    if status or not data:
        return Outcome("killed", f"exit status {status}", took)
    kind, message = pickle.loads(data)
    return Outcome(kind, message, took)


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    sys.stdout = sys.stderr = io.StringIO()


def _outcome(case: Case, world: World) -> tuple[str, str]:
    case.damage(world)
    before = world.state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = case.call(world)
    except LoraFxError as error:
        changed = _changed(before, world.state())
        return ("damaged", f"{changed} after: {error}") if changed else ("refused", str(error))
    except BaseException as error:
        return "foreign", f"{type(error).__name__}: {error}"
    changed = _changed(before, world.state())
    if changed and not case.changes:
        return "damaged", f"{changed} after success"
    return ("right", "") if right is True else ("silent", f"returned {str(right)[:200]}")


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


# Tools for cases ----------------------------------------------------------------------------------


def edit_config(**changes: Any) -> Callable[[World], None]:
    """Other fields in adapter/adapter_config.json, and a seal that is right again."""

    def damage(world: World) -> None:
        path = world.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        zoo.reseal(world.adapter)

    return damage


def write(name: str, data: bytes | str) -> Callable[[World], None]:
    """Other contents of a file."""
    return lambda world: (world.here / name).write_bytes(data if isinstance(data, bytes) else data.encode()) and None


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[World], None]:
    """Changed contents of a file."""
    return lambda world: (world.here / name).write_bytes(change((world.here / name).read_bytes())) and None


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[World], None]:
    """Other tensors in adapter/, in a file without a seal, as PEFT's are."""
    from safetensors.torch import load_file, save_file

    def damage(world: World) -> None:
        file = world.adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def both(*damages: Callable[[World], object]) -> Callable[[World], None]:
    """One after the other."""

    def damage(world: World) -> None:
        for each in damages:
            each(world)

    return damage


def load(world: World) -> object:
    """What most files are read by; false, since it must not get here."""
    lora_fx.load_adapter(world.gm, world.adapter)
    return False


def read(world: World) -> object:
    """The reader without torch."""
    lora_fx.read_adapter(world.adapter)
    return False


def into_onnx(world: World) -> object:
    """Folding into a file."""
    exporters.fold_into_onnx(world.here / "base.onnx", world.adapter, world.here / "out.onnx")
    return False


def same(a: object, b: object, tolerance: float = 1e-4) -> bool:
    """Whether two results agree."""
    x, y = (torch.as_tensor(np.asarray(each.detach() if isinstance(each, torch.Tensor) else each)) for each in (a, b))
    return x.shape == y.shape and bool(
        ((x.double() - y.double()).abs().max() <= tolerance * y.double().abs().max()).all()
    )

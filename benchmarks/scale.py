"""Large checkpoints: folded from shards to shards against copying the files, gone on with after a kill, and planned."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from . import onnx_scale
from .apart import Run, process_of, run_apart
from .checks import require
from .report import Table

ROW, CHECKED = 1 << 20, 5  # elements that are written in one go; rows of each weight that are compared
MEBI = 1 << 20


@dataclass(frozen=True)
class Size:
    """A checkpoint in the shape of a Llama: bfloat16."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int = 32
    key_heads: int = 8
    shard: int = 1_200_000_000

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all tensors."""
        keys = self.hidden // self.heads * self.key_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            attention = {"q_proj": self.hidden, "k_proj": keys, "v_proj": keys, "o_proj": self.hidden}
            linears = {f"self_attn.{name}": (out, self.hidden) for name, out in attention.items()}
            linears |= {"mlp.gate_proj": (self.inner, self.hidden), "mlp.up_proj": (self.inner, self.hidden)}
            linears |= {"mlp.down_proj": (self.hidden, self.inner)}
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()}
            found |= {f"model.layers.{i}.{name}.weight": (self.hidden,) for name in ("input_layernorm", "post_norm")}
        return found | {"lm_head.weight": (self.vocabulary, self.hidden)}


FULL = Size(layers=10, hidden=4096, inner=14336, vocabulary=32000)  # 4.9 GB
QUICK = Size(layers=2, hidden=256, inner=688, vocabulary=997, heads=4, key_heads=2, shard=1_500_000)
LLAMAS = {
    "8B": Size(32, 4096, 14336, 128256),
    "70B": Size(80, 8192, 28672, 128256, heads=64),
}


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject; it takes three times the checkpoint's size on the disk for a while."""
    with tempfile.TemporaryDirectory(prefix="lora_fx-scale-") as temporary:
        return measure_in(Path(temporary), QUICK if quick else FULL, rounds or (1 if quick else 3), quick=quick)


def measure_in(root: Path, size: Size, rounds: int, *, quick: bool) -> tuple[Table, ...]:
    """As `measure`, in a directory."""
    needed = 3 * 2 * sum(math.prod(shape) for shape in size.shapes.values())
    free = shutil.disk_usage(root).free
    require(free > needed, f"{needed / 1e9:.1f} GB are needed in {root}, and {free / 1e9:.1f} GB are free")
    base, adapter = root / "base", root / "adapter"
    write_checkpoint(base, size)
    write_adapter(adapter, size)
    folds = fold_table(root, base, adapter, rounds)
    names = {"a small one": QUICK} if quick else LLAMAS
    shapes = onnx_scale.QUICK if quick else onnx_scale.LARGE
    return folds, onnx_scale.fold_table(root / "onnx", shapes), plan_table(names)


# Folding ---------------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, size: Size) -> None:
    """Random numbers with a standard deviation of 0.02, written tensor by tensor."""
    directory.mkdir(parents=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in size.shapes.items():
        if groups[-1] and 2 * sum(map(math.prod, (*groups[-1].values(), shape))) > size.shard:
            groups.append({})
        groups[-1][name] = shape
    generator = np.random.default_rng(0)
    numbers = torch.from_numpy(generator.standard_normal(ROW, dtype=np.float32) * np.float32(0.02)).bfloat16()
    data = numbers.view(torch.uint8).numpy().tobytes()
    places = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        _write_shard(directory / file, group, data)
        places |= dict.fromkeys(group, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], data: bytes) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, shape in enumerate(shapes.values()):
            left, at = 2 * math.prod(shape), 2 * 7919 * i % len(data)
            while left:  # each tensor begins elsewhere in the same numbers
                count = min(left, len(data) - at)
                file.write(data[at : at + count])
                left, at = left - count, 0


def write_adapter(directory: Path, size: Size, r: int = 16) -> None:
    """Of all linears but the head."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in size.shapes.items():
        if "_proj" in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            for half, lying in (("A", (r, shape[1])), ("B", (shape[0], r))):
                tensors[f"{path}.lora_{half}.weight"] = 0.02 * torch.randn(lying, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in size.shapes if "_proj" in name})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def fold_table(root: Path, base: Path, adapter: Path, rounds: int) -> Table:
    """Wall time and memory, side by side with copying."""
    size = sum(file.stat().st_size for file in base.iterdir())
    out, copy, seconds = root / "out", root / "copy", dict[str, list[float]]()
    runs: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for name in ("cp", "fold", "fold, 2 workers"):
            with _removed(copy if name == "cp" else out) as target:
                os.sync()
                if name == "cp":
                    started = time.perf_counter()
                    subprocess.run(["cp", "-r", base, target], check=True)
                    seconds.setdefault("cp", []).append(time.perf_counter() - started)
                    os.sync()
                    seconds.setdefault("cp, and sync", []).append(time.perf_counter() - started)
                    continue
                run = fold_apart(base, adapter, target, workers=2 if "workers" in name else 1)
                runs.setdefault(name, []).append(run)
                seconds.setdefault(name, []).append(run.seconds)
                check_folded(base, adapter, target)
    told = [interrupted(base, adapter, out, root, in_place=in_place) for in_place in (False, True)]
    plain = statistics.median(seconds["cp"])
    rows = []
    for name, values in seconds.items():
        memory = [max(run.anonymous for run in runs[name]) / MEBI] if name in runs else [None]
        resident = [max(run.resident for run in runs[name]) / MEBI] if name in runs else [None]
        processor = [statistics.median(run.processor for run in runs[name])] if name in runs else [None]
        rows.append((name, statistics.median(values), min(values), statistics.median(values) / plain))
        rows[-1] += (*processor, *memory, *resident)
    return Table(
        f"a checkpoint of {size / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} shards, bfloat16, r = 16 on "
        f"all linears ({rounds} rounds)",
        ("what", "wall s, median", "best", "/ cp", "CPU s", "anonymous MiB above import", "resident MiB above import"),
        tuple(rows),
        (
            "checked: sampled rows of each adapted weight are the nearest bfloat16 to a float64 sum, all others are "
            "the base's",
            *told,
            "the base is in the page cache where it fits; `cp` leaves its copy there, a fold has it on the disk when "
            "it returns. The sum over two workers is not measured: the column is the calling process",
        ),
    )


@contextmanager
def _removed(directory: Path) -> Iterator[Path]:
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def fold_apart(base: Path, adapter: Path, out: Path, workers: int = 1, *, in_place: bool = False) -> Run:
    """A fold in a process of its own."""
    return run_apart(**_fold(base, adapter, out, workers, in_place=in_place))


def _fold(base: Path, adapter: Path, out: Path, workers: int = 1, *, in_place: bool) -> dict[str, Any]:
    modules = "lora_fx, lora_fx.checkpoint, lora_fx.fold_workers, torch"
    files = {"base": str(base), "adapter": str(adapter), "out": str(out)}
    return {"call": "lora_fx.fold_checkpoint", "modules": modules, **files, "workers": workers, "in_place": in_place}


def check_folded(base: Path, adapter: Path, out: Path) -> None:
    """Sampled rows against float64; what is not adapted has the base's bytes."""
    from safetensors import safe_open

    require(_names(out) == _names(base) | {"lora_fx_fold.json"}, "other files than the base's")
    with safe_open(adapter / "adapter_model.safetensors", "pt") as low:
        for file in sorted(base.glob("*.safetensors")):
            with safe_open(file, "pt") as old, safe_open(out / file.name, "pt") as new:
                require(list(old.keys()) == list(new.keys()), f"{file.name} holds other tensors")
                for name in old.keys():  # noqa: SIM118
                    parts = old.get_slice(name), new.get_slice(name)
                    rows = range(0, parts[0].get_shape()[0], max(1, parts[0].get_shape()[0] // CHECKED))
                    before, after = (torch.stack([part[row] for row in rows]) for part in parts)
                    if "_proj" in name:
                        path = f"base_model.model.{name.removesuffix('.weight')}"
                        a, b = (low.get_tensor(f"{path}.lora_{half}.weight").double() for half in "AB")
                        exact = before.double() + 2 * b[list(rows)] @ a
                        require(not torch.equal(before, after), f"{name} did not change")
                        before = exact.to(torch.bfloat16)
                        apart = (after.double() - exact).abs() - (before.double() - exact).abs()
                        require(float((apart / exact.abs().clamp_min(1e-30)).max()) < 2.0**-16, f"{name} is another")
                    else:
                        require(torch.equal(before, after), f"{name} is another")


def _names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def interrupted(base: Path, adapter: Path, out: Path, root: Path, *, in_place: bool) -> str:
    """Killed after half of the time and called again: the files are those of a call that was not killed."""
    with _removed(out), _removed(root / "whole"):
        if in_place:
            for directory in (out, root / "whole"):
                shutil.copytree(base, directory)
            whole = fold_apart(root / "whole", adapter, root / "whole", in_place=True)
        else:
            whole = fold_apart(base, adapter, root / "whole")
        source = out if in_place else base
        kills = 0
        for part in (0.3, 0.6):
            with process_of(**_fold(source, adapter, out, in_place=in_place)) as process:
                _wait_for_work(process, out, in_place=in_place)
                time.sleep(part * whole.seconds)
                kills += process.poll() is None
                process.send_signal(signal.SIGKILL)
        if not (out / "lora_fx_fold.json").exists():
            fold_apart(source, adapter, out, in_place=in_place)
        sums = [{file.name: _sha256(file) for file in directory.iterdir()} for directory in (out, root / "whole")]
        require(sums[0] == sums[1], "a fold that was killed and gone on with differs from one that was not")
    how = "in place" if in_place else "into another directory"
    return f"killed {kills} times with SIGKILL {how}, and called again: all {len(sums[0])} files have the same sha256"


def _wait_for_work(process: subprocess.Popen[str], out: Path, *, in_place: bool) -> None:
    work = out / ".lora_fx-fold" if in_place else out.with_name(f".{out.name}.lora_fx-fold")
    while process.poll() is None and not (work / "job.json").exists():
        time.sleep(0.01)


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# Planning --------------------------------------------------------------------------------------------

_PLAN = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch, transformers, lora_fx
size = json.loads(sys.argv[1])
config = transformers.LlamaConfig(tie_word_embeddings=False, use_cache=False, **size)
seconds, processor = {}, {}
def timed(name, call):
    started = time.perf_counter(), time.process_time()
    result = call()
    seconds[name], processor[name] = time.perf_counter() - started[0], time.process_time() - started[1]
    return result
def build():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.eval(), torch.ones(2, 16).long()
model, ids = timed("build", build)
gm = timed("trace", lambda: lora_fx.trace(model, (), {"input_ids": ids, "use_cache": False}))
sites = timed("find_sites", lambda: lora_fx.find_sites(gm))
plan = timed("make_plan", lambda: lora_fx.make_plan(gm, {"r": 16, "target_modules": "all-linear"}))
injected = timed("inject", lambda: lora_fx.inject(gm, plan))
assert all(parameter.is_meta for parameter in injected.parameters())
cost = plan.cost(devices=8)
most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, processor, most, len(sites), plan.base.parameters, plan.parameters, cost.step, cost.total]))
"""


def plan_table(sizes: Mapping[str, Size]) -> Table:
    """Sites, parameters, FLOPs and bytes of models that nobody has the memory for."""
    rows = []
    for name, size in sizes.items():
        options = {
            "hidden_size": size.hidden,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_heads,
            "vocab_size": size.vocabulary,
        }
        done = subprocess.run(
            [sys.executable, "-c", _PLAN, json.dumps(options)], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        require(done.returncode == 0, f"planning {name} failed: {done.stderr[-400:]}")
        seconds, processor, most, sites, base, adapters, step, total = json.loads(done.stdout.splitlines()[-1])
        wanted = sum(math.prod(shape) for path, shape in size.shapes.items()) + size.hidden  # and the last norm
        require(base == wanted, f"{base:,} parameters, and {wanted:,} by the shapes")
        rest = sum(seconds[each] for each in ("find_sites", "make_plan", "inject"))
        rows.append(
            (name, sites, base, adapters, step, total / 2**30, seconds["trace"], processor["trace"], rest, most / MEBI)
        )
    return Table(
        "planned on the meta device: a Llama, bfloat16, r = 16 on all linears",
        ("model", "sites", "parameters", "of adapters", "FLOPs / token of a step", "GiB for each of 8 devices",
         "trace s", "trace CPU s", "sites, plan, inject s", "peak resident MiB, torch and all"),
        tuple(rows),
        (
            "checked: the parameters are those of the shapes; nothing holds a value",
            "GiB: weights, adapters, gradients and AdamW's state in float32, shared out; no activations",
        ),
    )  # fmt: skip

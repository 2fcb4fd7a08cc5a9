"""Ways from an adapter to ONNX Runtime: what each costs to make, and what each costs to run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import exporters
import lora_fx

from . import workloads
from .checks import require
from .export import count_nodes
from .report import Table
from .timing import Variant, interleave
from .workloads import Workload

EXPORT = "export_onnx of the folded graph"
BASE, CONTROL, FOLDED = "base", "base again (control)", "folded"
Feed = dict[str, np.ndarray[Any, Any]]


def measure(*, quick: bool = False, rounds: int | None = None) -> tuple[Table, ...]:
    """The tables of this subject."""
    workload = workloads.bert() if quick else workloads.minilm()
    with tempfile.TemporaryDirectory() as temporary:
        made = _Made(workload, Path(temporary))
        tables = _making(made, rounds or (1 if quick else 3)), _running(made, rounds or (15 if quick else 60))
    with tempfile.TemporaryDirectory() as temporary:
        return (*tables, _generating(Path(temporary), rounds or (2 if quick else 5), (2, 64) if quick else (4, 256)))


def _generating(directory: Path, rounds: int, size: tuple[int, int]) -> Table:
    """Tokens per second of a decoder with a cache, in each form."""
    import transformers

    layers, width = size
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=2 * width, vocab_size=1009, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    flat = exporters.flat_cache_model(transformers.LlamaForCausalLM(config).eval())
    inputs, shapes = exporters.decoder_example(flat)
    gm = lora_fx.trace(flat, (), inputs, dynamic_shapes=shapes)
    injected = lora_fx.inject(gm, lora_fx.LoraConfig(r=8, target_modules="all-linear"))
    for parameter in lora_fx.lora_parameters(injected):
        parameter.data.normal_(std=0.05)
    lora_fx.save_adapter(injected, directory / "adapter")
    base, adapter = directory / "base.onnx", directory / "adapter"
    exporters.export_onnx(gm, base, check=False)
    exporters.fold_into_onnx(base, adapter, directory / "folded.onnx")
    exporters.add_adapter_inputs(base, directory / "switchable.onnx", adapter)
    exporters.add_adapter_stacks(base, directory / "rows.onnx", {"one": adapter})
    sessions: dict[str, Any] = {name: exporters.make_session(directory / f"{name}.onnx") for name in (BASE, FOLDED)}
    sessions |= {name: exporters.AdapterSession(directory / f"{name}.onnx") for name in ("switchable", "rows")}
    sessions["switchable"].load("one", adapter)
    prompts, new = np.arange(3, 3 + 4 * 8).reshape(4, 8), 64
    adapters = {BASE: None, FOLDED: None, "switchable": "one", "rows": "one"}
    run = lambda name: exporters.greedy(sessions[name], prompts, new, adapter=adapters[name])
    told = {name: run(name).tolist() for name in sessions}
    require(told[FOLDED] == told["switchable"] == told["rows"], "the forms generate different tokens")
    require(told[FOLDED] != told[BASE], "the adapter changes no token")
    times = interleave({name: Variant(lambda _, name=name: run(name)) for name in sessions}, rounds, warmup=1)
    rows = [(name, 4 * new / times.median(name), times.ratio(name, BASE)) for name in sessions]
    return Table(
        f"greedy generation with a cache: Llama-style, {layers} layers × {width}, 4 rows, {new} new tokens "
        f"({rounds} rounds)",
        ("form", "tokens / s", "time / base"),
        tuple(rows),
        ("checked first: folded, switchable and rows generate the same tokens, and others than the base",),
    )


class _Made:
    """All forms of one model and its adapter, checked against each other."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        self.workload, self.directory = workload, directory
        _, gm, injected = workloads.adapted_alike(workload)
        self.folded = lora_fx.fold(injected)
        self.adapter = directory / "adapter"
        lora_fx.save_adapter(injected, self.adapter)
        exporters.export_onnx(gm, self.file("base"), check=False)
        exporters.export_onnx(gm, self.file("again"), check=False)
        exporters.fold_into_onnx(self.file("base"), self.adapter, self.file("folded"))
        exporters.add_adapter_inputs(self.file("base"), self.file("switchable"), self.adapter)
        exporters.add_adapter_stacks(self.file("base"), self.file("rows"), {"one": self.adapter})
        exporters.optimize_onnx(self.file("folded"), self.file("optimized"))
        report = exporters.verify_onnx(self.file("folded"), self.folded, base=self.file("base"), provider="cpu")
        require(report.ok, f"the folded file is wrong:\n{report}")

    def file(self, name: str) -> Path:
        """One of the files."""
        return self.directory / f"{name}.onnx"


def _making(made: _Made, rounds: int) -> Table:
    base, out = made.file("base"), made.directory / "out.onnx"
    ways: dict[str, Callable[[], object]] = {
        EXPORT: lambda: exporters.export_onnx(made.folded, out, check=False),
        "fold_into_onnx": lambda: exporters.fold_into_onnx(base, made.adapter, out),
        "make_session, folded at load": lambda: exporters.make_session(base, provider="cpu", adapter=made.adapter),
        "make_session, plain": lambda: exporters.make_session(base, provider="cpu"),
        "add_adapter_inputs": lambda: exporters.add_adapter_inputs(base, out, made.adapter),
        "write_onnx_adapter": lambda: exporters.write_onnx_adapter(
            made.file("switchable"), made.adapter, made.directory / "x.onnx_adapter"
        ),
        "add_adapter_stacks": lambda: exporters.add_adapter_stacks(base, out, {"one": made.adapter}),
    }
    times = interleave({name: Variant(lambda _, way=way: way()) for name, way in ways.items()}, rounds, warmup=1)
    rows = [(name, times.median(name), times.ratio(name, EXPORT)) for name in ways]
    return Table(
        f"from an adapter's directory to ONNX Runtime: {made.workload.name} ({rounds} rounds)",
        ("way", "s", "/ export"),
        tuple(rows),
        (
            "checked first: the folded file is op for op the base's, and gives the adapted torch model's output",
            "exporting holds neither the start of Python, nor torch's import, nor the loading of the model, which the "
            "other ways do without",
        ),
    )


def _running(made: _Made, rounds: int) -> Table:
    feed = {name: value.numpy() for name, value in made.workload.inputs[1].items()}
    calls: dict[str, Callable[[], object]] = {
        BASE: _plain(made.file("base"), feed),
        CONTROL: _plain(made.file("again"), feed),
        FOLDED: _plain(made.file("folded"), feed),
        "folded, optimize_onnx": _plain(made.file("optimized"), feed),
    }
    switchable = exporters.AdapterSession(made.file("switchable"))
    switchable.load("one", made.adapter)
    rows = exporters.AdapterSession(made.file("rows"))
    calls["switchable, no adapter"] = switchable.bind(feed).run_in_place
    calls["switchable, adapter"] = switchable.bind(feed, "one").run_in_place
    calls["rows, all the base"] = rows.bind(feed).run_in_place
    calls["rows, all one adapter"] = rows.bind(feed, "one").run_in_place
    half = rows.ids_of(["one" if i % 2 else None for i in range(len(next(iter(feed.values()))))])
    calls["rows, mixed"] = rows.bind(feed | {"adapter_ids": half}).run_in_place
    times = interleave(
        {name: Variant(lambda _, call=call: call()) for name, call in calls.items()}, rounds, warmup=3, collect=False
    )
    files = {
        BASE: "base", CONTROL: "again", FOLDED: "folded", "folded, optimize_onnx": "optimized",
        "switchable, no adapter": "switchable", "switchable, adapter": "switchable",
    }  # fmt: skip
    table = [
        (
            name,
            count_nodes(made.file(files.get(name, "rows"))),
            1e3 * times.median(name),
            times.ratio(name, BASE),
            f"{times.spread(name):.0%}",
        )
        for name in calls
    ]
    tokens = feed["input_ids"]
    return Table(
        f"one call on {switchable.provider} with bound inputs: {made.workload.name}, {len(tokens)} × "
        f"{tokens.shape[1]} tokens ({rounds} rounds)",
        ("form", "nodes", "median ms", "/ base", "spread"),
        tuple(table),
        ("the control is the same file in another session: what it differs from 1 by is the noise",),
    )


def _plain(file: Path, feed: Feed) -> Callable[[], object]:
    """A call of a file without places for adapters, inputs and outputs bound on the device."""
    session = exporters.make_session(file)
    device = "cpu" if session.get_providers()[0] == "CPUExecutionProvider" else "cuda"
    import onnxruntime as ort

    kept = {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in feed.items()}
    binding = session.io_binding()
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for port in session.get_outputs():
        binding.bind_output(port.name, device)
    session.run_with_iobinding(binding)
    return lambda: (session.run_with_iobinding(binding), kept)

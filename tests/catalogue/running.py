"""Folding, saving, switching, exporting and running, asked for what they cannot do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from catalogue.harness import IDS, TARGETS, Case, World, edit, into_onnx, same, write
from torch import nn

import exporters
import lora_fx


def with_value(world: World, name: str, value: float) -> torch.fx.GraphModule:
    """The adapted graph with one value changed; it belongs to what has to stay as it is."""
    gm = lora_fx.load_adapter(world.gm, world.adapter)
    with torch.no_grad():
        gm.get_parameter(name).view(-1)[0] = value
    world.extra["broken"] = gm
    return gm


def broken(name: str, value: float) -> Callable[[World], object]:
    return lambda world: with_value(world, name, value)


def beyond(world: World) -> None:
    gm = with_value(world, "fc0.lora_B.default.weight", 1e25)
    with torch.no_grad():
        gm.get_parameter("fc0.lora_A.default.weight").mul_(1e25)


def folding(**options: Any) -> Callable[[World], object]:
    def call(world: World) -> object:
        lora_fx.fold(world.extra.get("broken", world.adapted), **options)
        return False

    return call


def folded_in_place(world: World) -> None:
    private(world)
    lora_fx.fold(world.extra["own"], inplace=True)


def private(world: World) -> None:
    """A model of the case's own, for what is done in place."""
    model = nn.Sequential(nn.Linear(7, 5)).eval()
    gm = lora_fx.trace(model, (torch.randn(3, 7),))
    world.extra["base"], world.extra["own"] = model, lora_fx.inject(gm, {"r": 2, "target_modules": ["0"]})


def fold_cycles(world: World) -> object:
    """Folded in place and back, a hundred times."""
    gm, before = world.extra["own"], world.extra["base"][0].weight.clone()
    for _ in range(100):
        lora_fx.unfold(lora_fx.fold(gm, inplace=True))
    return torch.equal(world.extra["base"][0].weight, before)


def train_folded(world: World) -> object:
    lora_fx.lora_parameters(world.extra["own"])
    return False


def double_fold(world: World) -> object:
    lora_fx.fold(world.extra["own"])
    return False


def load_over_folded(world: World) -> object:
    gm = lora_fx.fold(lora_fx.load_adapter(lora_fx.trace(world.model, (IDS,)), world.adapter))
    again = lora_fx.load_adapter(gm, world.adapter)  # other base weights: the adapter's note says so
    return same(again(IDS), gm(IDS))


def onnx_file(change: Callable[[onnx.ModelProto], object], name: str = "base.onnx") -> Callable[[World], None]:
    def damage(world: World) -> None:
        model = onnx.load(world.here / name, load_external_data=False)
        change(model)
        (world.here / name).write_bytes(model.SerializeToString())

    return damage


def external(key: str, value: str) -> Callable[[World], None]:
    """Another entry for where a weight is."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
                return
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value

    return onnx_file(change, "external.onnx")


def into_external(world: World) -> object:
    exporters.fold_into_onnx(world.here / "external.onnx", world.adapter, world.here / "out.onnx")
    return False


def open_external(world: World) -> object:
    exporters.make_session(world.here / "external.onnx", provider="cpu")
    return False


def data_link(world: World) -> None:
    data = world.here / "external.onnx.data"
    data.rename(world.here.parent / f"{world.here.name}.moved")
    data.symlink_to(world.here.parent / f"{world.here.name}.moved")


def data_pipe(world: World) -> None:
    (world.here / "external.onnx.data").unlink()
    os.mkfifo(world.here / "external.onnx.data")


def session(world: World, name: str = "switch.onnx") -> exporters.AdapterSession:
    return exporters.AdapterSession(world.here / name, provider="cpu")


def run_with(
    change: Callable[[dict[str, Any]], Any], name: str = "switch.onnx", **options: Any
) -> Callable[[World], object]:
    """A run with other inputs."""

    def call(world: World) -> object:
        found = session(world, name)
        if name == "switch.onnx":
            found.load("one", world.here / "good.onnx_adapter")
        feed = dict(world.feed)
        feed = change(feed)
        found.run(feed, **options)
        return False

    return call


def load_file(world: World) -> object:
    session(world).load("one", world.here / "good.onnx_adapter")
    return False


def other_parameters(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], version: int | None = None
) -> Any:
    """An .onnx_adapter with other tensors, as another program might write it."""

    def damage(world: World) -> None:
        from exporters.onnx_adapters import read_onnx_adapter

        arrays, noted = read_onnx_adapter(world.here / "good.onnx_adapter")
        arrays = change(dict(arrays))
        kept = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        form = ort.AdapterFormat()
        form.set_adapter_version(1)
        form.set_model_version(noted if version is None else version)
        form.set_parameters(kept)
        form.export_adapter(str(world.here / "good.onnx_adapter"))

    return damage


def first(arrays: dict[str, np.ndarray]) -> str:
    return sorted(arrays)[0]


def changed(key: str | None, array: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = first(arrays) if key is None else key
        return arrays | {name: array(arrays[first(arrays)])}

    return change


def nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[0] = np.nan
    return array


def directory_in_the_way(world: World) -> None:
    (world.here / "out" / "adapter_config.json").mkdir(parents=True)


def wrong_way(world: World) -> object:
    lora_fx.save_adapter(world.adapted, world.here / "out")
    return False


def right_runs(world: World) -> object:
    found = session(world)
    found.load("one", world.here / "good.onnx_adapter")
    plain = exporters.make_session(world.here / "base.onnx", provider="cpu").run(None, world.feed)[0]
    return (
        np.array_equal(found.run(world.feed)[0], plain)
        and same(found.run(world.feed, "one")[0], world.adapted.eval()(IDS))
        and tuple(found.run({"ids": IDS.numpy()[:0]}, "one")[0].shape) == (0, 3, 5)
    )


def rows(world: World) -> object:
    found = session(world, "rows.onnx").run({**world.feed, "adapter_ids": np.array([0, 1])})[0]
    return same(found[0], world.gm(IDS)[0]) and same(found[1], world.adapted.eval()(IDS)[1])


NAMES = ["", "a/b", "../x", "/tmp/x", "a b", "ä", "x" * 65, None, 3, "a.b", "class", "\n", "training"]
CASES = [
    # folding
    Case("fold/NaN in A", folding(), ("fc0.lora_A.default.weight", "NaN"), broken("fc0.lora_A.default.weight", np.nan)),
    Case("fold/Inf in B", folding(), ("fc1.lora_B.default.weight", "Inf"), broken("fc1.lora_B.default.weight", np.inf)),
    Case("fold/NaN, in place", folding(inplace=True), ("NaN",), broken("fc1.lora_B.default.weight", np.nan)),
    Case("fold/NaN, for good", folding(inplace=True, reversible=False), ("NaN",),
         broken("fc1.lora_B.default.weight", np.nan)),
    Case("fold/beyond the type", folding(), ("fc0", "float32"), beyond),
    Case("fold/no adapter", lambda w: lora_fx.fold(w.gm), ("inject(gm, config)",)),
    Case("fold/an unknown adapter", folding(adapters=["defualt"]), ("defualt", "default")),
    Case("fold/no name", folding(adapters=[]), ("adapters=[]",)),
    Case("fold/a number", folding(adapters=3), ("adapters=3",)),
    Case("fold/accumulated in half", folding(accumulate=torch.float16), ("accumulate",)),
    Case("fold/for good, and not in place", folding(reversible=False), ("reversible",)),
    Case("fold/unfolded without a fold", lambda w: lora_fx.unfold(w.adapted), ("inplace=True",)),
    Case("fold/twice", double_fold, ("folded already",), folded_in_place),
    Case("fold/parameters of a folded graph", train_folded, ("inject",), folded_in_place),
    Case("fold/a plain module", lambda w: lora_fx.fold(w.model), ("lora_fx.trace",)),
    Case("fold/a hundred times, and back", fold_cycles, (), private),
    Case("fold/an adapter over the weights it is folded into", load_over_folded, ("base model", "fc0.weight")),
    Case("fold/a report without a fold", lambda w: lora_fx.fold_report(w.gm), ("fold(gm)",)),
    # names, saving, switching
    *(Case(f"save/an adapter named {name!r}"[:40], lambda w, n=name: lora_fx.inject(
        w.gm, {"r": 2, "target_modules": TARGETS}, adapter_name=n), ("adapter_name",)) for name in NAMES),
    Case("save/a taken name", lambda w: lora_fx.load_adapter(w.adapted, w.adapter), ("'default'",)),
    Case("save/an unknown adapter", lambda w: lora_fx.save_adapter(w.adapted, w.here / "x", adapter_name="two"), ("two",)),
    Case("save/no adapter", lambda w: lora_fx.save_adapter(w.gm, w.here / "x"), ("inject",)),
    Case("save/NaN", lambda w: lora_fx.save_adapter(w.extra["broken"], w.adapter), ("fc0.lora_A.weight",),
         broken("fc0.lora_A.default.weight", np.nan)),
    Case("save/into a file", lambda w: lora_fx.save_adapter(w.adapted, w.here / "base.onnx"), ("base.onnx",)),
    Case("save/below a file", lambda w: lora_fx.save_adapter(w.adapted, w.here / "base.onnx" / "x"), ("base.onnx",)),
    Case("save/into /proc", lambda w: lora_fx.save_adapter(w.adapted, "/proc/nope/x"), ("/proc/nope",)),
    Case("save/a number", lambda w: lora_fx.save_adapter(w.adapted, 3), ("directory=3",)),
    Case("save/a name that is too long", lambda w: lora_fx.save_adapter(w.adapted, w.here / ("x" * 300)), ("xxx",)),
    Case("save/over a directory of that name", wrong_way, ("out",), directory_in_the_way),
    Case("switch/an unknown adapter", lambda w: lora_fx.set_adapters(w.adapted, {"two": 1.0}), ("two",)),
    *(Case(f"switch/a weight of {value!r}", lambda w, v=value: lora_fx.set_adapters(w.adapted, {"default": v}),
           ("default",)) for value in (np.nan, np.inf, "1", None, True)),
    Case("switch/a list", lambda w: lora_fx.set_adapters(w.adapted, [3]), ("3",)),
    Case("switch/no graph", lambda w: lora_fx.set_adapters(w.model, {}), ("lora_fx.trace",)),
    Case("switch/delete an unknown one", lambda w: lora_fx.delete_adapter(w.adapted, "two"), ("two",)),
    Case("switch/swap in another rank", lambda w: lora_fx.swap_adapter(w.adapted, "default", w.here / "other"), ("fc0",)),
    Case("switch/swap in nothing", lambda w: lora_fx.swap_adapter(w.adapted, "default", {}), ("fc0",)),
    Case("switch/swap in a number", lambda w: lora_fx.swap_adapter(w.adapted, "default", {"a": 3}), ("'a'",)),
    Case("switch/swap in NaN", lambda w: lora_fx.swap_adapter(w.adapted, "default", {
        f"{n}.lora_{h}.weight": torch.full(s, np.nan) for n, h, s in (
            ("fc0", "A", (3, 7)), ("fc0", "B", (11, 3)), ("fc1", "A", (3, 11)), ("fc1", "B", (5, 3)))}), ("NaN",)),
    Case("switch/combine unknown ones", lambda w: lora_fx.combine_adapters(
        w.adapted, {"default": 1.0, "two": 1.0}, adapter_name="x"), ("two",)),
    # ONNX files
    Case("onnx/export what is not folded", lambda w: exporters.export_onnx(w.adapted, w.here / "x.onnx"), ("fold",)),
    Case("onnx/export to a directory", lambda w: exporters.export_onnx(w.gm, w.here), ("directory",)),
    Case("onnx/export to nowhere", lambda w: exporters.export_onnx(w.gm, "/proc/x/y.onnx"), ("/proc/x",)),
    Case("onnx/export to a number", lambda w: exporters.export_onnx(w.gm, 3), ("path",)),
    Case("onnx/opset 5", lambda w: exporters.export_onnx(w.gm, w.here / "x.onnx", opset=5), ("opset",)),
    Case("onnx/opset 99", lambda w: exporters.export_onnx(w.gm, w.here / "x.onnx", opset=99), ("opset",)),
    Case("onnx/opset of text", lambda w: exporters.export_onnx(w.gm, w.here / "x.onnx", opset="x"), ("opset",)),
    Case("onnx/an unknown type", lambda w: exporters.export_onnx(w.gm, w.here / "x.onnx", dtype="float8"), ("float8",)),
    Case("onnx/an unknown quantization", lambda w: exporters.export_onnx(w.gm, w.here / "x.onnx", quantize="int3"),
         ("int3",)),
    Case("onnx/a plain module", lambda w: exporters.export_onnx(w.model, w.here / "x.onnx"), ("lora_fx.trace",)),
    Case("onnx/no file", lambda w: exporters.fold_into_onnx(w.here / "no.onnx", w.adapter, w.here / "x.onnx"),
         ("no.onnx",)),
    *(Case(f"onnx/the base is {name}", into_onnx, ("base.onnx",), write("base.onnx", data))
      for name, data in {"empty": b"", "text": b"no model", "zeros": bytes(999), "json": b'{"a": 1}'}.items()),
    Case("onnx/the base is cut", into_onnx, ("base.onnx",), edit("base.onnx", lambda b: b[: len(b) // 2])),
    Case("onnx/ir version 99", into_onnx, ("base.onnx",), onnx_file(lambda m: setattr(m, "ir_version", 99))),
    Case("onnx/the record of names is damaged", into_onnx, ("record",), onnx_file(
        lambda m: [setattr(p, "value", "{") for p in m.metadata_props if p.key.startswith("lora_fx.")])),
    Case("onnx/weights of another model", into_external, ("external.onnx.data",),
         edit("external.onnx.data", lambda b: bytes([b[0] ^ 1]) + b[1:])),
    Case("onnx/a session on weights of another model", open_external, ("external.onnx.data",),
         edit("external.onnx.data", lambda b: bytes([b[0] ^ 1]) + b[1:])),
    Case("onnx/weights cut", into_external, ("external.onnx",), edit("external.onnx.data", lambda b: b[:-8])),
    Case("onnx/weights missing", into_external, ("external.onnx",),
         lambda w: (w.here / "external.onnx.data").unlink()),
    Case("onnx/weights are a pipe", into_external, ("external.onnx",), data_pipe),
    Case("onnx/weights elsewhere", into_external, ("external.onnx",), external("location", "../../etc/passwd")),
    Case("onnx/weights at an absolute path", into_external, ("external.onnx",), external("location", "/etc/passwd")),
    Case("onnx/weights at a negative offset", into_external, ("external.onnx",), external("offset", "-4096")),
    Case("onnx/weights past the end", into_external, ("external.onnx",), external("offset", "99999999")),
    Case("onnx/weights of another length", into_external, ("external.onnx",), external("length", "8")),
    Case("onnx/weights behind a link", into_external, ("external.onnx",), data_link),
    Case("onnx/the same adapter twice", lambda w: exporters.fold_into_onnx(w.here / "f.onnx", w.adapter, w.here / "g.onnx"),
         ("adapter", "f.onnx"), lambda w: exporters.fold_into_onnx(w.here / "base.onnx", w.adapter, w.here / "f.onnx")),
    Case("onnx/strength NaN", lambda w: exporters.fold_into_onnx(w.here / "base.onnx", w.adapter, w.here / "x.onnx",
         strength=np.nan), ("strength",)),
    Case("onnx/a mapping to nothing", lambda w: exporters.fold_into_onnx(w.here / "base.onnx", w.adapter,
         w.here / "x.onnx", mapping={"nope": "fc0"}), ("nope",)),
    Case("onnx/unfold what was not folded", lambda w: exporters.unfold_onnx(w.here / "base.onnx"), ("base.onnx",)),
    Case("onnx/inputs into the base", lambda w: exporters.add_adapter_inputs(w.here / "base.onnx", w.here / "base.onnx",
         w.adapter), ("base.onnx",)),
    Case("onnx/no adapters", lambda w: exporters.add_adapter_inputs(w.here / "base.onnx", w.here / "x.onnx", []), ("adapter",)),
    Case("onnx/rank 0", lambda w: exporters.add_adapter_inputs(w.here / "base.onnx", w.here / "x.onnx", w.adapter, rank=0),
         ("rank=0",)),
    Case("onnx/rank below the adapter's", lambda w: exporters.write_onnx_adapter(w.here / "s1.onnx", w.adapter,
         w.here / "x.onnx_adapter"), ("rank",), lambda w: exporters.add_adapter_inputs(
             w.here / "base.onnx", w.here / "s1.onnx", w.here / "other", rank=2)),
    Case("onnx/append a taken name", lambda w: exporters.append_adapter(w.here / "rows.onnx", "one", w.here / "other"),
         ("one",)),
    Case("onnx/append to a plain file", lambda w: exporters.append_adapter(w.here / "base.onnx", "x", w.adapter),
         ("base.onnx",)),
    # sessions
    Case("run/switching and rows are right", right_runs),
    Case("run/rows", rows),
    Case("run/an unknown provider", lambda w: exporters.make_session(w.here / "base.onnx", provider="cudda"), ("cudda", "cuda")),
    Case("run/CUDA that is not there", lambda w: exporters.make_session(w.here / "base.onnx", provider="cuda"), ("CUDA",)),
    Case("run/no places for adapters", lambda w: session(w, "base.onnx"), ("base.onnx",)),
    Case("run/an input missing", run_with(lambda f: {}), ("ids",)),
    Case("run/an input of no name", run_with(lambda f: {**f, "idz": f["ids"]}), ("idz",)),
    Case("run/an input of another type", run_with(lambda f: {"ids": f["ids"].astype(np.float32)}), ("'ids'", "int64")),
    Case("run/an input of another rank", run_with(lambda f: {"ids": f["ids"][0]}), ("inputs",)),
    Case("run/an index beyond the table", run_with(lambda f: {"ids": f["ids"] + 99}), ("inputs",)),
    Case("run/an unknown adapter", run_with(lambda f: f, adapter="onne"), ("onne", "one")),
    Case("run/an adapter twice", run_with(lambda f: f, adapter=["one", "one"]), ("one",)),
    Case("run/an output of no name", run_with(lambda f: f, outputs=["z"]), ("z",)),
    Case("run/numbers below 0", run_with(lambda f: {**f, "adapter_ids": np.array([-1, 0])}, "rows.onnx"), ("adapter_ids",)),
    Case("run/numbers too large", run_with(lambda f: {**f, "adapter_ids": np.array([0, 2])}, "rows.onnx"), ("adapter_ids",)),
    Case("run/too few numbers", run_with(lambda f: {**f, "adapter_ids": np.array([1])}, "rows.onnx"), ("adapter_ids",)),
    Case("run/numbers with a point", run_with(lambda f: {**f, "adapter_ids": np.array([0.0, 1.0])}, "rows.onnx"),
         ("adapter_ids",)),
    Case("run/an adapter for one's own weights", load_file, ("other base weights",), other_parameters(lambda a: a, 7)),
    Case("run/an adapter of another shape", load_file, ("shape",), other_parameters(changed(None, lambda a: a[:-1]))),
    Case("run/an adapter of another type", load_file, ("DOUBLE",), other_parameters(
        changed(None, lambda a: a.astype(np.float64)))),
    Case("run/an adapter that overrides the input", load_file, ("ids",), other_parameters(changed("ids", lambda a: a))),
    Case("run/an adapter that overrides a weight", load_file, ("fc0.weight",), other_parameters(
        changed("fc0.weight", lambda a: a))),
    Case("run/half an adapter", load_file, ("lacks",), other_parameters(
        lambda a: {n: v for n, v in a.items() if n != first(a)})),
    Case("run/NaN in an adapter", load_file, ("NaN",), other_parameters(changed(None, nan))),
    Case("run/a cut adapter", load_file, ("good.onnx_adapter",), edit("good.onnx_adapter", lambda b: b[: len(b) // 2])),
    Case("run/an empty adapter", load_file, ("good.onnx_adapter",), write("good.onnx_adapter", b"")),
    Case("run/an adapter of text", load_file, ("good.onnx_adapter",), write("good.onnx_adapter", b"hello" * 99)),
    Case("run/no adapter file", lambda w: session(w).load("x", w.here / "no.onnx_adapter"), ("no.onnx_adapter",)),
    Case("run/a nameless adapter", lambda w: session(w).load("", w.adapter), ("name",)),
    Case("run/an adapter of another model", lambda w: session(w).load("x", w.here / "far"), ("far",), lambda w: _far(w.here)),
]  # fmt: skip


def _far(here: Path) -> None:
    gm = lora_fx.trace(nn.Sequential(nn.Linear(3, 4)).eval(), (torch.randn(2, 3),))
    lora_fx.save_adapter(lora_fx.inject(gm, {"r": 2, "target_modules": ["0"]}), here / "far")

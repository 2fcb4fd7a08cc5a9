"""Checkpoints that are broken, hostile, or of something else, folded from shards to shards and bound to a graph."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from catalogue.files import WEIGHTS, WHOLE
from catalogue.harness import Case, World, both, edit, edit_config, edit_tensors
from safetensors.torch import load_file, save_file

import lora_fx

ONE, TWO = (f"base/model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX, CONFIG = "base/model.safetensors.index.json", "base/config.json"


def base(world: World) -> None:
    """The model in two shards: words and fc0, fc1."""
    (world.here / "base").mkdir()
    tensors = {name: tensor.detach().clone() for name, tensor in world.model.state_dict().items()}
    places = {name: Path(TWO if name.startswith("fc1") else ONE).name for name in tensors}
    for file in (ONE, TWO):
        own = {name: tensor for name, tensor in tensors.items() if places[name] == Path(file).name}
        save_file(own, world.here / file)
    (world.here / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (world.here / CONFIG).write_text(json.dumps({"model_type": "small"}))


def fold(world: World) -> object:
    lora_fx.fold_checkpoint(world.here / "base", world.adapter, world.here / "out")
    return False


def fold_into(out: str, **options: Any) -> Callable[[World], object]:
    return lambda world: bool(
        lora_fx.fold_checkpoint(world.here / "base", world.adapter, world.here / out, **options) is None
    )


def bind(world: World) -> object:
    lora_fx.bind_weights(world.gm, world.here / "base")
    return False


def index(change: Callable[[dict[str, str]], object]) -> Callable[[World], None]:
    def damage(world: World) -> None:
        fields = json.loads((world.here / INDEX).read_text())
        change(fields["weight_map"])
        (world.here / INDEX).write_text(json.dumps(fields))

    return damage


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[World], None]:
    def damage(world: World) -> None:
        found = load_file(world.here / file)
        change(found)
        save_file(found, world.here / file)

    return damage


def header(change: Callable[[str], str]) -> Callable[[World], None]:
    def changed(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        text = change(data[8 : 8 + size].decode()).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return edit(ONE, changed)


def text(name: str, content: str) -> Callable[[World], object]:
    return lambda world: (world.here / name).write_text(content)


def linked_out(name: str) -> Callable[[World], object]:
    def damage(world: World) -> None:
        secret = world.here.parent / f"{world.here.name}.secret"
        target = world.here / name
        if target.exists():
            target.rename(secret)
        else:
            secret.write_text("secret")
        target.symlink_to(secret)

    return damage


def as_type(dtype: torch.dtype) -> Callable[[World], None]:
    return tensors(ONE, lambda found: found.update({"fc0.weight": found["fc0.weight"].to(dtype)}))


# {what: (damage, fragments)}: of the base, for both who read it.
BROKEN: dict[str, tuple[Callable[[World], object], tuple[str, ...]]] = {
    "a shard missing": (lambda w: (w.here / TWO).unlink(), ("model-00002-of-00002.safetensors",)),
    "a shard cut": (edit(ONE, lambda data: data[:-1]), ("model-00001-of-00002.safetensors",)),
    "a shard of text": (text(TWO, "nothing"), ("model-00002-of-00002.safetensors",)),
    "a shape beyond the data": (
        header(lambda t: t.replace('"shape":[11,7]', '"shape":[11,8]')), ("model-00001-of-00002.safetensors",)),
    "offsets that lie": (
        header(lambda t: t.replace('"data_offsets":[0,', '"data_offsets":[4,')), ("model-00001-of-00002.safetensors",)),
    "a tensor twice in a header": (
        header(lambda t: t[:-1].rstrip().removesuffix("}") + ',"fc0.bias":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
               if t.rstrip().endswith("}") else t), ("model-00001-of-00002.safetensors",)),
    "a tensor in two shards": (
        tensors(TWO, lambda t: t.update({"fc0.bias": torch.zeros(11)})), ("fc0.bias", "model-00002-of-00002")),
    "an index that leaves": (index(lambda m: m.update({"fc0.weight": "../x.safetensors"})), ("../x.safetensors",)),
    "an index with a path": (index(lambda m: m.update({"fc0.weight": "/etc/x.safetensors"})), ("/etc/x.safetensors",)),
    "an index of something else": (index(lambda m: m.update({"fc2.weight": Path(ONE).name})), ("fc2.weight",)),
    "an index that errs": (index(lambda m: m.update({"fc0.weight": Path(TWO).name})), ("fc0.weight",)),
    "an index of no names": (text(INDEX, '{"weight_map": []}'), ("weight_map",)),
    "an index of no JSON": (text(INDEX, "{"), ("model.safetensors.index.json",)),
    "two sets of weights": (
        lambda w: save_file({"x": torch.ones(1)}, w.here / "base/model.safetensors"), ("model.safetensors",)),
    "no index": (lambda w: (w.here / INDEX).unlink(), ("model.safetensors.index.json",)),
    "no weights": (lambda w: [file.unlink() for file in (w.here / "base").iterdir()], ("base",)),
    "a shard that leads out": (linked_out(ONE), ("model-00001-of-00002.safetensors", "secret")),
    "a tokenizer that leads out": (linked_out("base/tokenizer.json"), ("tokenizer.json", "secret")),
    "a pipe": (lambda w: os.mkfifo(w.here / "base/pipe"), ("pipe",)),
    "a config of no JSON": (text(CONFIG, "nope"), ("config.json",)),
    "a config that is a list": (text(CONFIG, "[]"), ("config.json",)),
}  # fmt: skip

SAMPLE = ("weights cut by a byte", "header of 2^63", "shape of 2^62 twice", "a bit flipped", "type says int32")

WRONG: tuple[tuple[str, Any], ...] = (
    ("base", None), ("base", ""), ("adapter", None), ("adapter", 3), ("adapter", b"x"), ("out", None), ("out", b"x"),
    ("in_place", "no"), ("in_place", None), ("overwrite", 1), ("workers", True), ("workers", 1.5), ("workers", "2"),
    ("progress", 3), ("adapter_name", None), ("accumulate", "float32"), ("integrity", "any"),
)  # fmt: skip


def with_argument(name: str, value: object) -> Callable[[World], object]:
    def call(world: World) -> object:
        arguments: dict[str, Any] = {"base": world.here / "base", "adapter": world.adapter, "out": world.here / "out"}
        return lora_fx.fold_checkpoint(**arguments | {name: value}) is None

    return call


CASES = [
    *(Case(f"checkpoints/fold/{name}", fold, words, both(base, damage)) for name, (damage, words) in BROKEN.items()),
    *(Case(f"checkpoints/bind/{name}", bind, BROKEN[name][1], both(base, BROKEN[name][0]))
      for name in ("a shard cut", "a tensor in two shards", "an index that leaves", "a shard that leads out")),
    *(Case(f"checkpoints/adapter/{name}", fold, WHOLE[name][1], both(base, WHOLE[name][0])) for name in SAMPLE),
    Case("checkpoints/other shapes", fold, ("fc0", "[11, 9]"),
         both(base, tensors(ONE, lambda t: t.update({"fc0.weight": torch.zeros(11, 9)})))),
    Case("checkpoints/other names", fold, ("fc0.weight", "fc9.weight"),
         both(base, tensors(ONE, lambda t: t.update({"fc9.weight": t.pop("fc0.weight")})),
              index(lambda m: m.update({"fc9.weight": m.pop("fc0.weight")})))),
    Case("checkpoints/other values", fold, ("base model with other weights", "fc0.weight"),
         both(base, tensors(ONE, lambda t: t["fc0.weight"].add_(1)))),
    Case("checkpoints/NaN in the base", fold, ("fc0.weight", "NaN"),
         both(base, edit_tensors(lambda t: None), tensors(ONE, lambda t: t["fc0.weight"].view(-1)[5].fill_(float("nan"))))),
    Case("checkpoints/float8", fold, ("fc0.weight", "F8_E4M3"), both(base, as_type(torch.float8_e4m3fn))),
    Case("checkpoints/int8", fold, ("fc0.weight", "I8"), both(base, as_type(torch.int8))),
    Case("checkpoints/computed weight", fold, ("fc0.weight_v",),
         both(base, tensors(ONE, lambda t: t.update({"fc0.weight_v": t.pop("fc0.weight")})),
              index(lambda m: m.update({"fc0.weight_v": m.pop("fc0.weight")})))),
    Case("checkpoints/base weights in the adapter", fold, ("fc1.bias", "modules_to_save"),
         both(base, edit_tensors(lambda t: t.update({"base_model.model.fc1.bias": torch.ones(5)})))),
    Case("checkpoints/rank of the config", fold, ("fc0", "9"), both(base, edit_config(r=9))),
    Case("checkpoints/pissa's start", fold, ("pissa",), both(base, edit_config(init_lora_weights="pissa"))),
    Case("checkpoints/out in the base", fold_into("base/out"), ("base/out",), base),
    Case("checkpoints/out is the base", fold_into("base"), ("base", "in_place"), base),
    Case("checkpoints/base in out", fold_into("."), ("base",), base),
    Case("checkpoints/out is a file", fold_into(WEIGHTS), ("adapter_model.safetensors",), base),
    Case("checkpoints/out is not empty", fold_into("other"), ("other", "overwrite"), base),
    Case("checkpoints/out is no model", fold_into("other", overwrite=True), ("other", "config.json"), base),
    Case("checkpoints/in place elsewhere", fold_into("out", in_place=True), ("in_place",), base),
    Case("checkpoints/no workers", fold_into("out", workers=0), ("workers=0",), base),
    Case("checkpoints/half precision sums", fold_into("out", accumulate=torch.float16), ("accumulate",), base),
    Case("checkpoints/a zero byte", lambda w: lora_fx.fold_checkpoint("a\0", w.adapter, w.here / "out"), ("base=",)),
    Case("checkpoints/no directory", fold, ("base",)),
    Case("checkpoints/an adapter in place of the base", lambda w: lora_fx.fold_checkpoint(w.adapter, w.adapter, w.here / "out"),
         ("adapter", "give the directory of the base"), base),
    Case("checkpoints/in place of nothing", lambda w: lora_fx.fold_checkpoint("no", w.adapter, "no", in_place=True), ("'no'",)),
    *(Case(f"checkpoints/{name}={value!r}", with_argument(name, value), (f"{name}={value!r}",), base)
      for name, value in WRONG),
    Case("checkpoints/a number", lambda w: lora_fx.fold_checkpoint(3, w.adapter, w.here / "out"), ("base=3",)),
]  # fmt: skip

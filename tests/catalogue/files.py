"""Adapter files that are broken, that do not fit, or that somebody made on purpose."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from catalogue.harness import (
    IDS,
    TARGETS,
    Case,
    Small,
    World,
    edit,
    edit_config,
    edit_tensors,
    into_onnx,
    load,
    read,
    same,
    write,
)

import lora_fx

CONFIG, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
P = "base_model.model."
A0, B0, A1, B1 = (f"{P}{name}.lora_{half}.weight" for name in ("fc0", "fc1") for half in "AB")
NAN = float("nan")


def header(change: Callable[[dict[str, Any]], object], *, pad: bool = True) -> Callable[[World], None]:
    """Another header of the same data, without a seal."""

    def damage(world: World) -> None:
        data = (world.here / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        fields = json.loads(data[8 : 8 + size])
        fields.pop("__metadata__")
        change(fields)
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 8) if pad else b""
        (world.here / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def raw_header(text: bytes, data: bytes = b"") -> Callable[[World], None]:
    return write(WEIGHTS, struct.pack("<Q", len(text)) + text + data)


def swap_offsets(fields: dict[str, Any]) -> None:
    fields[A0]["data_offsets"], fields[B0]["data_offsets"] = fields[B0]["data_offsets"], fields[A0]["data_offsets"]


def put(key: str, tensor: torch.Tensor) -> Callable[[World], None]:
    return edit_tensors(lambda t: t.__setitem__(key, tensor))


def drop(*keys: str) -> Callable[[World], None]:
    return edit_tensors(lambda t: [t.pop(key) for key in keys])


def link(name: str, target: str) -> Callable[[World], None]:
    def damage(world: World) -> None:
        (world.here / name).unlink()
        (world.here / name).symlink_to(target)

    return damage


def directory(name: str) -> Callable[[World], None]:
    def damage(world: World) -> None:
        (world.here / name).unlink()
        (world.here / name).mkdir()

    return damage


def fifo(name: str) -> Callable[[World], None]:
    def damage(world: World) -> None:
        (world.here / name).unlink()
        os.mkfifo(world.here / name)

    return damage


def remove(name: str) -> Callable[[World], None]:
    return lambda world: (world.here / name).unlink()


def pickled(world: World) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (world.here / "owned",)

    remove(WEIGHTS)(world)
    torch.save({"x": Evil()}, world.adapter / "adapter_model.bin")


def deep(levels: int) -> bytes:
    return b'{"peft_type": "LORA", "r": 3, "x": ' + b"[" * levels + b"]" * levels + b"}"


def nothing_of_the_base(world: World) -> object:
    """Keys of the base in an adapter's file go nowhere."""
    lora_fx.load_adapter(world.gm, world.adapter)
    return False


# {what: (damage, fragments)}; every one is tried with all readers.
WHOLE: dict[str, tuple[Callable[[World], None], tuple[str, ...]]] = {
    "weights empty": (write(WEIGHTS, b""), ("adapter_model.safetensors",)),
    "weights of 4 bytes": (write(WEIGHTS, b"\1\2\3\4"), ("adapter_model.safetensors",)),
    "weights are text": (write(WEIGHTS, "this is no tensor file at all"), ("adapter_model.safetensors",)),
    "weights cut in the header": (edit(WEIGHTS, lambda b: b[:40]), ("adapter_model.safetensors",)),
    "weights cut by a byte": (edit(WEIGHTS, lambda b: b[:-1]), ("adapter_model.safetensors",)),
    "weights and more": (edit(WEIGHTS, lambda b: b + b"\0"), ("adapter_model.safetensors",)),
    "header of 100 MB": (edit(WEIGHTS, lambda b: struct.pack("<Q", 10**8 + 1) + b[8:]), ("adapter_model.safetensors",)),
    "header of 2^63": (edit(WEIGHTS, lambda b: struct.pack("<Q", 2**63) + b[8:]), ("adapter_model.safetensors",)),
    "header is no json": (raw_header(b"{nope"), ("adapter_model.safetensors",)),
    "header is a list": (raw_header(b"[1]     "), ("adapter_model.safetensors",)),
    "header is deep": (raw_header(b"[" * 50_000), ("adapter_model.safetensors",)),
    "header of no tensor": (raw_header(b"{}      "), ("holds no tensor",)),
    "unknown type": (header(lambda f: f[A0].update(dtype="F31")), ("adapter_model.safetensors",)),
    "negative shape": (header(lambda f: f[A0].update(shape=[-3, 7])), ("adapter_model.safetensors",)),
    "shape beyond the data": (header(lambda f: f[A0].update(shape=[3, 2**61])), ("adapter_model.safetensors",)),
    "shape of 2^62 twice": (header(lambda f: f[A0].update(shape=[2**62, 2**62])), ("adapter_model.safetensors",)),
    "offsets past the end": (header(lambda f: f[A0].update(data_offsets=[0, 10**6])), ("adapter_model.safetensors",)),
    "offsets backwards": (header(lambda f: f[A0].update(data_offsets=[84, 0])), ("adapter_model.safetensors",)),
    "offsets overlap": (header(lambda f: f[B0].update(data_offsets=f[A0]["data_offsets"])), ("adapter_model",)),
    "type says int32": (header(lambda f: f[A0].update(dtype="I32")), ("fc0.lora_A.weight",)),
    "a bit flipped": (edit(WEIGHTS, lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]), ("tensors", "sha256")),
    "a hole of zeros": (edit(WEIGHTS, lambda b: b[:-64] + bytes(64)), ("tensors", "sha256")),
    "tensors of another adapter": (
        lambda w: (w.adapter / "adapter_model.safetensors").write_bytes(
            (w.here / "other" / "adapter_model.safetensors").read_bytes()
        ) and None,
        ("adapter_config.json", "sha256"),
    ),
    "weights missing": (remove(WEIGHTS), ("adapter_model.safetensors",)),
    "weights are a directory": (directory(WEIGHTS), ("adapter_model.safetensors",)),
    "weights are a pipe": (fifo(WEIGHTS), ("adapter_model.safetensors",)),
    "weights link to nothing": (link(WEIGHTS, "nowhere"), ("adapter_model.safetensors",)),
    "weights link to themselves": (link(WEIGHTS, "adapter_model.safetensors"), ("adapter_model.safetensors",)),
    "weights are a pickle": (pickled, ("adapter_model.bin", "pickle")),
    "one NaN": (edit_tensors(lambda t: t[B0].view(-1).__setitem__(3, NAN)), ("fc0.lora_B.weight", "NaN or Inf")),
    "one Inf": (edit_tensors(lambda t: t[A1].view(-1).__setitem__(0, -float("inf"))), ("fc1.lora_A.weight",)),
    "int8 in place of floats": (put(A0, torch.ones(3, 7, dtype=torch.int8)), ("fc0.lora_A.weight",)),
    "bool in place of floats": (put(B0, torch.ones(11, 3, dtype=torch.bool)), ("fc0.lora_B.weight",)),
    "float8 in place of floats": (put(B0, torch.ones(11, 3).to(torch.float8_e4m3fn)), ("fc0.lora_B.weight",)),
    "a scalar": (put(B0, torch.ones(())), ("fc0",)),
    "no rank at all": (put(A0, torch.ones(0, 7)), ("fc0",)),
    "B missing": (drop(B0), ("fc0",)),
    "A missing": (drop(A1), ("fc1",)),
    "two spellings that differ": (put("fc0.lora_A.default.weight", torch.ones(3, 7)), ("lora_A",)),
    "an unknown kind": (put(f"{P}fc0.lora_diag", torch.ones(3)), ("lora_diag",)),
    "config empty": (write(CONFIG, b""), ("adapter_config.json",)),
    "config cut": (edit(CONFIG, lambda b: b[:100]), ("adapter_config.json",)),
    "config is a list": (write(CONFIG, b"[1]"), ("adapter_config.json", "list")),
    "config is a number": (write(CONFIG, b"3"), ("adapter_config.json",)),
    "config is no text": (write(CONFIG, b"\xff\xfe\x00"), ("adapter_config.json",)),
    "config says a key twice": (edit(CONFIG, lambda b: b.replace(b"{", b'{"lora_alpha": 9,', 1)), ("lora_alpha",)),
    "config with NaN": (edit(CONFIG, lambda b: b.replace(b'"lora_alpha": 7', b'"lora_alpha": NaN')), ("NaN",)),
    "config with 1e999": (
        edit(CONFIG, lambda b: b.replace(b'"lora_alpha": 7', b'"lora_alpha": 1e999')), ("lora_alpha",)
    ),
    "config is deep": (write(CONFIG, deep(100_000)), ("adapter_config.json",)),
    "config with a number of 10 MB": (
        write(CONFIG, b'{"peft_type": "LORA", "r": ' + b"9" * 10**7 + b"}"), ("adapter_config.json",)
    ),
    "config missing": (remove(CONFIG), ("adapter_config.json",)),
    "config is a directory": (directory(CONFIG), ("adapter_config.json",)),
    "config is a pipe": (fifo(CONFIG), ("adapter_config.json",)),
    "config without r": (edit(CONFIG, lambda b: b.replace(b'"r": 3', b'"s": 3')), ("'r'",)),
    "config without a type": (edit(CONFIG, lambda b: b.replace(b'"peft_type"', b'"peft_tipe"')), ("peft_type",)),
    "config of another tuner": (edit_config(peft_type="IA3"), ("IA3",)),
    "config of no tuner": (edit_config(peft_type="NOPE"), ("NOPE",)),
    "config in lower case": (edit_config(peft_type="lora"), ("LORA",)),
    "config with r as text": (edit_config(r="3"), ("r='3'",)),
    "config with r of a billion": (edit_config(r=10**9), ("fc0",)),
    "config with r of 2^80": (edit_config(r=2**80), ("fc0",)),
    "config with another r": (edit_config(r=4), ("fc0",)),
    "config with an unknown option": (edit_config(use_superlora=True), ("use_superlora",)),
    "config from the future": (edit_config(superlora_gain=2.0), ("superlora_gain",)),
    "config with dora": (edit_config(use_dora=True), ("magnitude",)),
    "config with rslora as text": (edit_config(use_rslora="false"), ("use_rslora",)),
    "config with dropout of one": (edit_config(lora_dropout=1.0), ("lora_dropout",)),
    "config with a bad expression": (edit_config(target_modules="(fc"), ("target_modules",)),
    "config that asks for an import": (
        edit_config(auto_mapping={"parent_library": "os"}, peft_type="os.system"), ("os.system",)
    ),
    "config edited by hand": (edit(CONFIG, lambda b: b.replace(b'"lora_alpha": 7', b'"lora_alpha": 8')), ("sha256",)),
    "config with rslora switched on": (
        edit(CONFIG, lambda b: b.replace(b'"use_rslora": false', b'"use_rslora": true')), ("sha256",)
    ),
    "the seal cut out": (
        edit(WEIGHTS, lambda b: b.replace(b"lora_fx.sha256.data", b"lora_fx.sha256.dada")), ("sha256",)
    ),
}  # fmt: skip
# Only where there is a model to fit.
WITH_MODEL: dict[str, tuple[Callable[[World], None], tuple[str, ...]]] = {
    "one module missing": (drop(A0, B0), ("fc0.lora_A.weight",)),
    "all B missing": (drop(B0, B1), ("lora_B",)),
    "of an unknown module": (put(f"{P}fc9.lora_A.weight", torch.ones(3, 7)), ("fc9",)),
    "with a weight of the base": (put(f"{P}fc1.weight", torch.zeros(5, 11)), ("fc1.weight",)),
    "with a bias of the base": (put(f"{P}fc1.bias", torch.full((5,), 9.0)), ("fc1.bias",)),
    "with a buffer that is not there": (put(f"{P}running_mean", torch.ones(3)), ("running_mean",)),
    "with an embedding of the base": (put(f"{P}words.weight", torch.zeros(13, 7)), ("words.weight",)),
    "of another rank": (put(A0, torch.ones(4, 7)), ("fc0.lora_A.weight",)),
    "of another width": (put(A0, torch.ones(3, 8)), ("fc0.lora_A.weight",)),
    "turned": (put(B0, torch.ones(3, 11)), ("fc0.lora_B.weight",)),
    "config with fewer targets": (edit_config(target_modules=["fc0"]), ("fc1",)),
    "config with more targets": (edit_config(target_modules=["fc0", "fc1", "words"]), ("words",)),
    "config without targets": (edit_config(target_modules=None), ("target_modules",)),
    "config with a saved module": (edit_config(modules_to_save=["words"]), ("words",)),
    "config with bias": (edit_config(bias="all"), ("bias",)),
    "config with rows": (edit_config(trainable_token_indices=[1]), ("words",)),
    "config with a residual base": (edit_config(init_lora_weights="corda"), ("corda",)),
    "config with a rank in a pattern": (edit_config(rank_pattern={"fc0": 9}), ("fc0",)),
}  # fmt: skip
READERS = {"load": load, "read": read, "into onnx": into_onnx}
# Errors that a reader without a model cannot see; what it does is below.
UNSEEN = {
    "read": {"config with another r", "config with r of a billion", "config with r of 2^80", "config with dora"},
    "into onnx": {"config with dora"},
}  # fmt: skip


def of_peft(world: World) -> object:
    """What PEFT saved, in the form that it has there."""
    torch.manual_seed(4)
    model = peft.get_peft_model(Small().eval(), peft.LoraConfig(r=2, target_modules=TARGETS))
    torch.manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(world.here / "pefts")
    return same(lora_fx.load_adapter(world.gm, world.here / "pefts").eval()(IDS), model(IDS))


def other_base(world: World) -> object:
    """Another model of the same shapes."""
    torch.manual_seed(99)
    lora_fx.load_adapter(lora_fx.trace(Small().eval(), (IDS,)), world.adapter)
    return False


def stale_pickle(world: World) -> object:
    """A newer .bin beside it is never read."""
    torch.save({A0: torch.zeros(3, 7)}, world.adapter / "adapter_model.bin")
    return same(lora_fx.load_adapter(world.gm, world.adapter).eval()(IDS), world.adapted.eval()(IDS))


def harmless_extras(world: World) -> object:
    (world.adapter / "README.md").write_text("hello")
    return same(lora_fx.load_adapter(world.gm, world.adapter).eval()(IDS), world.adapted.eval()(IDS))


CASES = [
    *(
        Case(f"files/{reader}/{name}", READERS[reader], words, damage)
        for reader in READERS
        for name, (damage, words) in WHOLE.items()
        if name not in UNSEEN.get(reader, ())
    ),
    *(Case(f"files/load/{name}", load, words, damage) for name, (damage, words) in WITH_MODEL.items()),
    *(
        Case(f"files/into onnx/{name}", into_onnx, (words[0].partition(".")[0],), damage)
        for name, (damage, words) in WITH_MODEL.items()
        if not name.startswith("config") and name not in ("one module missing",) and "of the base" not in name
    ),
    Case("files/no directory", lambda w: lora_fx.load_adapter(w.gm, w.here / "nope"), ("nope",)),
    Case("files/a name of the hub", lambda w: lora_fx.load_adapter(w.gm, "org/model"), ("org/model",)),
    Case("files/a file", lambda w: lora_fx.load_adapter(w.gm, w.here / CONFIG), ("adapter_config.json",)),
    Case("files/a number", lambda w: lora_fx.load_adapter(w.gm, 3), ("directory=3",)),
    Case("files/a zero byte", lambda w: lora_fx.load_adapter(w.gm, "a\0b"), ("directory=",)),
    Case("files/a name that leaves", lambda w: lora_fx.load_adapter(w.gm, w.adapter, adapter_name="../x"), ("../x",)),
    Case("files/no seal where one is wanted", lambda w: lora_fx.load_adapter(w.gm, w.adapter, integrity="required"),
         ("seal",), edit_tensors(lambda t: None)),
    Case("files/another base", other_base, ("base model", "fc0.weight")),
    Case("files/swapped offsets, sealed", load, ("adapter",),
         edit(WEIGHTS, lambda b: b.replace(b'"fc0', b'"fc2', 1) if b'"fc0' in b else b[:-1] + b"\0")),
    Case("files/PEFT's own", of_peft, changes=True),
    Case("files/a pickle beside it", stale_pickle, changes=True),
    Case("files/other files beside it", harmless_extras, changes=True),
    Case("files/both names of a tensor, equal", lambda w: same(lora_fx.load_adapter(w.gm, w.adapter).eval()(IDS),
         w.adapted.eval()(IDS)), (), edit_tensors(lambda t: t.__setitem__("fc0.lora_A.weight", t[A0].clone()))),
]  # fmt: skip

"""Large ONNX files: weights of every kind beside a graph, folded from file to file and in place in bounded memory."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.numpy import save_file

from .apart import Run, run_apart
from .checks import require
from .report import Table

Array = NDArray[Any]
MEBI = 1 << 20
R, SCALING, BLOCK_SIZE = 2, 1.5, 32
_NUMBERS = 1 << 20  # that are written again and again


@dataclass(frozen=True)
class Shapes:
    """One weight of each kind that an adapter may change: A and B, q, k and v packed, or all of it.

    Attributes:
        wide, deep: features; `deep` is a multiple of 32.
        vocabulary: rows of the table.
        channels: of each group of the convolutions.
        experts: of a mixture.
    """

    wide: int
    deep: int
    vocabulary: int
    channels: int
    experts: int

    @property
    def floats(self) -> dict[str, tuple[int, ...]]:
        """{initializer: shape} of what is stored as floats."""
        return {
            "table.weight": (self.vocabulary, self.wide),
            "up.weight": (self.deep, self.wide),  # of a Gemm with transB
            "down.weight": (self.deep, self.wide),  # of a MatMul, (in, out)
            "conv.weight": (2 * self.channels, self.channels, 3, 3),
            "back.weight": (2 * self.channels, self.channels, 3, 3),  # of a ConvTranspose, (in, out / 2, 3, 3)
            "experts.weight": (self.experts, self.deep, self.wide),
            "head.weight": (self.vocabulary, self.wide),  # of a Gemm with transB; saved as a whole
            "rest.weight": (self.deep, self.wide),  # which is not adapted
        }

    @property
    def quantized(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{initializer: (shape, type)} of MatMulNBits with zero points, 4 bits: (deep, wide) of the model."""
        blocks = -(-self.wide // BLOCK_SIZE)
        return {
            "few.weight_Q4": ((self.deep, blocks, BLOCK_SIZE // 2), np.uint8),
            "few.weight_scales": ((self.deep, blocks), np.float32),
            "few.weight_zero_points": ((self.deep * -(-blocks // 2),), np.uint8),
        }


LARGE = Shapes(wide=4096, deep=14336, vocabulary=32000, channels=1024, experts=8)  # 1.8 GB in float16
QUICK = Shapes(wide=96, deep=160, vocabulary=97, channels=8, experts=3)


def write_model(
    directory: Path, shapes: Shapes, dtype: ir.DataType = ir.DataType.FLOAT16, *, foreign: bool = False
) -> Path:
    """A graph with each weight in a place of its own, and random numbers of a standard deviation of 0.02 beside it.

    Args:
        foreign: it does not pass onnx's checker, as files of onnxruntime-genai do not, and opens in ONNX Runtime.
    """
    generator = np.random.default_rng(0)
    numbers = (0.02 * generator.standard_normal(_NUMBERS, dtype=np.float32)).astype(dtype.numpy())
    forms = {name: (shape, numbers) for name, shape in shapes.floats.items()}
    scales = np.abs(0.003 * generator.standard_normal(_NUMBERS, dtype=np.float32)) + np.float32(1e-3)
    bytes_ = generator.integers(0, 256, _NUMBERS, dtype=np.uint8)
    forms |= {n: (shape, scales if kind is np.float32 else bytes_) for n, (shape, kind) in shapes.quantized.items()}
    initializers, at = [], 0
    with open(directory / "base.onnx.data", "wb") as file:
        for i, (name, (shape, some)) in enumerate(forms.items()):
            kind = dtype if some is numbers else ir.DataType.from_numpy(some.dtype)
            tensor = TensorProto(name=name, data_type=int(kind), dims=shape, data_location=TensorProto.EXTERNAL)
            size = math.prod(shape) * some.itemsize
            for key, value in (("location", "base.onnx.data"), ("offset", at), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            _write_some(file, np.roll(some, 7919 * i).tobytes(), size)
            at += size
    graph = helper.make_graph(*_nodes(shapes, int(dtype), foreign=foreign), initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), directory / "base.onnx")
    return directory / "base.onnx"


def _write_some(file: Any, data: bytes, size: int) -> None:
    while size:
        size -= file.write(data[: min(len(data), size)])


def _nodes(shapes: Shapes, dtype: int, *, foreign: bool) -> tuple[list[onnx.NodeProto], str, list[Any], list[Any]]:
    """Each weight in an op of its own, with inputs and outputs of the graph's."""
    features = {
        "up": ("Gemm", [1, shapes.wide], {"transB": 1}), "down": ("MatMul", [1, shapes.deep], {}),
        "conv": ("Conv", [1, 2 * shapes.channels, 5, 5], {"group": 2}),
        "back": ("ConvTranspose", [1, 2 * shapes.channels, 5, 5], {"group": 2}),
        "experts": ("MatMul", [shapes.experts, 1, shapes.deep], {}), "head": ("Gemm", [1, shapes.wide], {"transB": 1}),
        "rest": ("MatMul", [1, shapes.deep], {}),
    }  # fmt: skip
    nodes = [helper.make_node("Gather", ["table.weight", "ids"], ["table.y"], name="/table/Gather")]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [3])]
    for name, (op, shape, options) in features.items():
        inputs.append(helper.make_tensor_value_info(f"{name}.x", dtype, shape))
        nodes.append(helper.make_node(op, [f"{name}.x", f"{name}.weight"], [f"{name}.y"], f"/{name}/{op}", **options))
    options = {"K": shapes.wide, "N": shapes.deep, "bits": 4, "block_size": BLOCK_SIZE}
    names = ["few.x", *shapes.quantized]
    inputs.append(helper.make_tensor_value_info("few.x", TensorProto.FLOAT, [1, shapes.wide]))
    nodes.append(
        helper.make_node("MatMulNBits", names, ["few.y"], "/few/MatMulNBits", domain="com.microsoft", **options)
    )
    axes = {"conv.y": 4, "back.y": 4, "experts.y": 3}
    outputs = [
        helper.make_tensor_value_info(
            y, TensorProto.FLOAT if y == "few.y" else dtype, None if foreign else [None] * axes.get(y, 2)
        )
        for node in nodes
        for y in node.output
    ]
    return nodes, "each", inputs, outputs


def write_adapter(directory: Path, shapes: Shapes, dtype: Any = np.float16) -> Path:
    """For all but `rest`, in PEFT's format."""
    generator = np.random.default_rng(1)
    channels = 2 * shapes.channels
    sizes: dict[str, tuple[int, ...]] = {
        "table.lora_embedding_A": (R, shapes.vocabulary), "table.lora_embedding_B": (shapes.wide, R),
        "up.lora_A.weight": (R, shapes.wide), "up.lora_B.weight": (shapes.deep, R),
        "down.lora_A.weight": (R, shapes.deep), "down.lora_B.weight": (shapes.wide, R),
        "conv.lora_A.weight": (R, shapes.channels, 3, 3), "conv.lora_B.weight": (channels, R // 2, 1, 1),
        "back.lora_A.weight": (R, shapes.channels, 3, 3), "back.lora_B.weight": (channels, R // 2, 1, 1),
        "few.lora_A.weight": (R, shapes.wide), "few.lora_B.weight": (shapes.deep, R),
        "experts.lora_A.weight": (R * shapes.experts, shapes.deep),
        "experts.lora_B.weight": (shapes.wide, R * shapes.experts),
        "head.weight": (shapes.vocabulary, shapes.wide),
    }  # fmt: skip
    tensors = {
        f"base_model.model.{name}": (0.1 * generator.standard_normal(shape, dtype=np.float32)).astype(dtype)
        for name, shape in sizes.items()
    }
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = ["table", "up", "down", "conv", "back", "few"]
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R * SCALING, "target_modules": targets}
    config |= {"target_parameters": ["experts.weight"], "modules_to_save": ["head"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def fold_table(root: Path, shapes: Shapes) -> Table:
    """Time and memory, side by side with copying; it takes five times the file's size on the disk for a while."""
    root.mkdir()
    base, adapter = write_model(root, shapes), write_adapter(root / "adapter", shapes)
    out, patched = root / "out.onnx", root / "patched" / "base.onnx"
    size = sum(file.stat().st_size for file in root.glob("base.onnx*"))
    started = time.perf_counter()
    shutil.copytree(root, patched.parent, ignore=shutil.ignore_patterns("patched", "adapter"))
    copied = time.perf_counter() - started
    before = {file.name: _sha256(file) for file in patched.parent.iterdir()}
    runs = {
        "into another file": fold_apart(base, adapter, out),
        "in place": fold_apart(patched, adapter, patched),
    }
    check_folded(base, out, patched)
    runs["unfolded"] = run_apart("exporters.unfold_onnx", MODULES, path=str(patched))
    after = {file.name: _sha256(file) for file in patched.parent.iterdir()}
    require(after == before, "a fold in place that was taken back left other files")
    shutil.rmtree(root)
    rows = [("cp", copied, 1.0, None, None, None)] + [
        (name, run.seconds, run.seconds / copied, run.processor, run.anonymous / MEBI, run.resident / MEBI)
        for name, run in runs.items()
    ]
    return Table(
        f"an ONNX file with {size / 1e9:.2f} GB of weights beside it, float16 and 4 bits: matrices, convolutions, a "
        f"table, experts, and a head that is saved whole, r = {R}",
        ("what", "wall s", "/ cp", "CPU s", "anonymous MiB above import", "resident MiB above import"),
        tuple(rows),
        (
            "checked: both folds give the same bytes, and sampled rows of a matrix are those of a float64 sum; what is "
            "not adapted is the base's; unfolding leaves the base's sha256",
        ),
    )


MODULES = "exporters.onnx_folding, exporters.onnx_in_place"


def fold_apart(base: Path, adapter: Path, out: Path) -> Run:
    """A fold in a process of its own."""
    return run_apart("exporters.fold_into_onnx", MODULES, base=str(base), adapter=str(adapter), out=str(out))


def check_folded(base: Path, out: Path, patched: Path) -> None:
    """Both folds are alike, all but one weight changed, and some rows are right."""
    was, now, other = (ir.load(file).graph.initializers for file in (base, out, patched))
    for name in was:
        old, new, same = (_digest(part[name].const_value) for part in (was, now, other))
        require(new == same, f"{name} is another in place")
        require((new == old) == name.startswith("rest."), f"{name} changed, or did not")
    before, after = (_rows(part["up.weight"].const_value) for part in (was, now))
    with safe_open(base.parent / "adapter" / "adapter_model.safetensors", "np") as low:
        a, b = (low.get_tensor(f"base_model.model.up.lora_{half}.weight").astype(np.float64) for half in "AB")
    exact = before + SCALING * _some(b) @ a
    require(bool(np.allclose(after, exact, rtol=2.0**-10, atol=1e-6)), "up.weight is another")


def _rows(tensor: ir.TensorProtocol | None) -> Array:
    """Some rows, as float64."""
    assert tensor is not None
    return _some(tensor.numpy()).astype(np.float64)


def _some(values: Array) -> Array:
    return values[:: max(1, len(values) // 5)]


def _digest(tensor: ir.TensorProtocol | None) -> str:
    assert isinstance(tensor, ir.ExternalTensor)
    digest, end = hashlib.sha256(), (tensor.offset or 0) + tensor.nbytes
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        while file.tell() < end:
            digest.update(file.read(min(MEBI, end - file.tell())))
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()

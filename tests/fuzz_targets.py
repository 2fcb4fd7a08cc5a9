"""What reads files that others wrote, as functions of bytes: each gives the file's contents to a reader.

    python tests/fuzz_targets.py adapter -runs=1000000 tests/fuzz/adapter     # with atheris, coverage-guided

A target returns, or raises an error of our tree; anything else is a finding.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lora_fx
from lora_fx import LoraFxError

_PLACE = "/dev/shm" if Path("/dev/shm").is_dir() else None
_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["fc"]}


class Targets:
    """Readers, and a good file of each kind."""

    def __init__(self) -> None:
        self.here = Path(tempfile.mkdtemp(dir=_PLACE))
        self.weights, self.config = self.here / "adapter_model.safetensors", self.here / "adapter_config.json"
        tensors = {
            "base_model.model.fc.lora_A.weight": np.arange(6, dtype="<f4").reshape(2, 3),
            "base_model.model.fc.lora_B.weight": np.ones((4, 2), "<f4"),
        }
        self.good_config = json.dumps(_CONFIG).encode()
        self.good_adapter = _safetensors(tensors)
        self.restore()

    def restore(self) -> None:
        self.weights.write_bytes(self.good_adapter)
        self.config.write_bytes(self.good_config)

    def adapter(self, data: bytes) -> object:
        """adapter_model.safetensors."""
        self.weights.write_bytes(data)
        return lora_fx.read_adapter(self.here)

    def configuration(self, data: bytes) -> object:
        """adapter_config.json."""
        self.weights.write_bytes(self.good_adapter)
        self.config.write_bytes(data)
        return lora_fx.read_adapter(self.here)

    def onnx(self, data: bytes) -> object:
        """A base's .onnx, into which an adapter is folded."""
        import exporters

        (self.here / "base.onnx").write_bytes(data)
        return exporters.fold_into_onnx(self.here / "base.onnx", self.here, self.here / "out.onnx")

    def onnx_adapter(self, data: bytes) -> object:
        """An .onnx_adapter."""
        from exporters.onnx_adapters import read_onnx_adapter

        file = self.here / "x.onnx_adapter"
        file.write_bytes(data)
        return read_onnx_adapter(file)

    def good(self, name: str) -> bytes:
        """A file that the target takes."""
        if name == "adapter":
            return self.good_adapter
        if name == "configuration":
            return self.good_config
        import onnx

        ports = [onnx.helper.make_tensor_value_info(n, 1, ["rows", k]) for n, k in (("x", 3), ("y", 4))]
        weight = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "fc.weight")
        node = onnx.helper.make_node("Gemm", ["x", "fc.weight"], ["y"], name="/fc/Gemm", transB=1)
        graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:], [weight])
        model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)])
        if name == "onnx":
            return bytes(model.SerializeToString())
        import exporters

        (self.here / "good.onnx").write_bytes(model.SerializeToString())
        exporters.add_adapter_inputs(self.here / "good.onnx", self.here / "switch.onnx", self.here)
        return exporters.write_onnx_adapter(
            self.here / "switch.onnx", self.here, self.here / "good.onnx_adapter"
        ).read_bytes()

    def close(self) -> None:
        shutil.rmtree(self.here)


NAMES = ("adapter", "configuration", "onnx", "onnx_adapter")


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    fields, data = {}, b""
    for name, array in tensors.items():
        fields[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def one(target: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """The target, for which an error of our tree is an answer."""

    def run(data: bytes) -> None:
        with contextlib.suppress(LoraFxError):
            target(data)

    return run


def main() -> None:
    """Fuzz with atheris: NAME, and libFuzzer's options."""
    import atheris

    name, sys.argv = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
    targets = Targets()
    for directory in sys.argv[1:]:
        if not directory.startswith("-"):
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / "good").write_bytes(targets.good(name))
    with atheris.instrument_imports(include=["lora_fx", "exporters"]):
        import lora_fx.adapter_arrays  # noqa: F401
    atheris.Setup(sys.argv, one(getattr(targets, name)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""What reads files that others wrote, as functions of bytes: each gives the file's contents to a reader.

A target returns, or raises an error of our tree; anything else is a finding. tests/fuzz.py drives them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lora_fx
from lora_fx import LoraFxError
from lora_fx.report_charts import make_chart
from lora_fx.training_log import read_training_log

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
        self.weights.write_bytes(self.good_adapter)
        self.config.write_bytes(self.good_config)
        self.arrays = lora_fx.read_adapter(self.here)

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
        """A base's .onnx, into which an adapter is folded; the result stays in memory."""
        from exporters.onnx_folding import session_values

        (self.here / "base.onnx").write_bytes(data)
        return session_values(self.here / "base.onnx", self.arrays)

    def onnx_adapter(self, data: bytes) -> object:
        """An .onnx_adapter."""
        from exporters.onnx_adapters import read_onnx_adapter

        file = self.here / "x.onnx_adapter"
        file.write_bytes(data)
        return read_onnx_adapter(file)

    def training_log(self, data: bytes) -> object:
        """trainer_state.json, and what is drawn of it."""
        file = self.here / "trainer_state.json"
        file.write_bytes(data)
        log = read_training_log(file)
        return [make_chart(series.name, [(series.name, series.points)]) for series in log.series], str(log)

    def good(self, name: str) -> list[bytes]:
        """Files that the target takes."""
        if name == "adapter":
            return [self.good_adapter, _sealed_adapter()]
        if name == "training_log":
            return [json.dumps({"log_history": _HISTORY, "global_step": 3}).encode(), _EDGES]
        if name == "configuration":
            return [self.good_config, *(json.dumps(_CONFIG | more).encode() for more in _OTHER_CONFIGS)]
        import onnx

        model = onnx.helper.make_model(_graph(), ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)])
        if name == "onnx":
            return [bytes(model.SerializeToString())]
        import onnxruntime

        import exporters

        (self.here / "good.onnx").write_bytes(model.SerializeToString())
        exporters.add_adapter_inputs(self.here / "good.onnx", self.here / "switch.onnx", self.here)
        file = exporters.write_onnx_adapter(self.here / "switch.onnx", self.here, self.here / "good.onnx_adapter")
        form = onnxruntime.AdapterFormat.read_adapter(str(file))
        form.set_adapter_version(1)  # as others write it: without our checksum, past which few mutations would get
        form.export_adapter(str(self.here / "plain.onnx_adapter"))
        return [file.read_bytes(), (self.here / "plain.onnx_adapter").read_bytes()]

    def close(self) -> None:
        shutil.rmtree(self.here)


_OTHER_CONFIGS = (
    {"use_dora": True, "use_rslora": True, "bias": "lora_only", "task_type": "CAUSAL_LM"},
    {
        "rank_pattern": {"^a.(b|c)$": 4},
        "alpha_pattern": {"fc": 8},
        "layers_to_transform": [0, 1],
        "layers_pattern": "h",
    },
    {"target_modules": ".*fc", "exclude_modules": ["x"], "modules_to_save": ["head"], "lora_dropout": 0.1},
    {"target_modules": "all-linear", "init_lora_weights": "pissa", "fan_in_fan_out": True, "auto_mapping": None},
    {"target_parameters": ["mlp.experts"], "loftq_config": {}, "megatron_config": None, "runtime_config": {}},
)
_HISTORY = [{"step": 1, "epoch": 0.1, "loss": 2.5}, {"step": 2, "loss": 1, "eval_f1": 0.5}, {"step": 3, "note": "x"}]
_EDGES = (
    b'{"log_history": [{"step": 1e308, "loss": NaN}, {"step": -1e308, "loss": -Infinity, "x": 1e-320}, {"step": 0}]}'
)
NAMES = ("adapter", "configuration", "onnx", "onnx_adapter", "training_log")


def _graph() -> Any:
    import onnx

    ports = [onnx.helper.make_tensor_value_info(n, 1, ["rows", k]) for n, k in (("x", 3), ("y", 4))]
    weight = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "fc.weight")
    node = onnx.helper.make_node("Gemm", ["x", "fc.weight"], ["y"], name="/fc/Gemm", transB=1)
    return onnx.helper.make_graph([node], "g", ports[:1], ports[1:], [weight])


def _sealed_adapter() -> bytes:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
    gm = lora_fx.inject(lora_fx.trace(model, (torch.randn(2, 3),)), {"r": 1, "target_modules": ["0"], "use_dora": True})
    with tempfile.TemporaryDirectory() as name:
        lora_fx.save_adapter(gm, name)
        return (Path(name) / "adapter_model.safetensors").read_bytes()


def kept(name: str) -> list[bytes]:
    """What 10,000,000 runs of `tests/fuzz.py` left: an input for each way through the code that they found."""
    with zipfile.ZipFile(Path(__file__).parent / "fuzz_corpus" / f"{name}.zip") as corpus:
        return [corpus.read(entry) for entry in corpus.namelist()]


def framed(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    fields, data = {}, b""
    for name, array in tensors.items():
        fields[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    return framed(json.dumps(fields).encode(), data)


def one(target: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """The target, for which an error of our tree is an answer."""

    def run(data: bytes) -> None:
        with contextlib.suppress(LoraFxError):
            target(data)

    return run

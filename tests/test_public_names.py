"""The public list, against reality and against the contract."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import exporters
import lora_fx

CONTRACT = {
    "trace", "LoraConfig", "find_sites", "find_all_linear_names", "make_plan", "inject", "fold", "unfold",
    "save_adapter", "load_adapter", "lora_parameters", "print_trainable_parameters", "trainable_parameters",
    "compare_graphs", "assert_equivalent", "trace_record",
    "LoraFxError", "ConfigError", "TargetError", "GraphError", "AdapterError", "FoldError", "ExportError",
}  # fmt: skip


def test_the_list_is_sorted_and_every_name_is_there() -> None:
    names = lora_fx.__all__
    assert list(names) == sorted(names, key=lambda name: (not name.isupper() and name[0].islower(), name)) or list(
        names
    ) == sorted(names)
    assert len(set(names)) == len(names)
    assert set(names) >= CONTRACT
    for name in names:
        assert getattr(lora_fx, name) is not None


def test_dir_is_the_list() -> None:
    assert dir(lora_fx) == sorted(lora_fx.__all__)


def test_every_public_name_has_a_docstring() -> None:
    for name in lora_fx.__all__:
        value = getattr(lora_fx, name)
        if callable(value):
            assert inspect.getdoc(value), name
            assert not inspect.getdoc(value).startswith(f"{name}("), name  # a dataclass's generated one
        if inspect.isfunction(value):
            hints = inspect.get_annotations(value)
            assert set(hints) >= set(inspect.signature(value).parameters), name


def test_the_errors_are_one_tree() -> None:
    for name in lora_fx.__all__:
        value = getattr(lora_fx, name)
        if inspect.isclass(value) and issubclass(value, Exception) and not issubclass(value, Warning):
            assert issubclass(value, lora_fx.LoraFxError), name
    for module in pkgutil.walk_packages(lora_fx.__path__, "lora_fx."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and issubclass(value, Exception) and value.__module__.startswith("lora_fx"):
                assert issubclass(value, (lora_fx.LoraFxError, Warning)), name


@pytest.mark.parametrize("package", [lora_fx, exporters], ids=lambda package: package.__name__)
def test_what_prints_as_a_report_is_shown_by_notebooks(package) -> None:
    shown = []
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) and not issubclass(value, Exception | torch.nn.Module):
            printing = next(each for each in value.__mro__ if "__str__" in vars(each))
            if printing.__module__.partition(".")[0] in ("lora_fx", "exporters"):
                shown.append(name)
                assert callable(getattr(value, "_repr_html_", None)), f"{name} prints as text alone"
    assert len(shown) >= 6


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lora_fx' has no attribute 'nope'"):
        _ = lora_fx.nope


def test_importing_it_imports_no_torch_and_never_what_is_beside_it() -> None:
    code = """
import sys, lora_fx
assert not {'torch', 'transformers', 'peft', 'onnx', 'onnxruntime', 'exporters'} & set(sys.modules), 'at import'
for name in lora_fx.__all__: getattr(lora_fx, name)
bad = {'transformers', 'peft', 'onnx', 'onnxruntime', 'exporters'} & set(sys.modules)
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_are_named_by_nouns_and_typed() -> None:
    root = Path(lora_fx.__file__).parent
    assert (root / "py.typed").exists()
    verbs = {"trace", "inject", "fold", "unfold", "plan_adapters"}
    assert not verbs & {path.stem for path in root.glob("*.py")}

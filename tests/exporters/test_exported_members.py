"""The public list is sorted, complete and loads on first use."""

from __future__ import annotations

import subprocess
import sys

import exporters


def test_public_list_is_sorted_and_everything_in_it_exists() -> None:
    assert exporters.__all__ == sorted(exporters.__all__)
    for name in exporters.__all__:
        value = getattr(exporters, name)
        assert value.__doc__, name
        assert value.__name__ == name


def test_unknown_name_raises_attribute_error() -> None:
    assert not hasattr(exporters, "export_tensorrt")


def test_sessions_and_comparison_need_no_torch() -> None:
    code = (
        "import sys; from exporters import make_session, compare_onnx, read_manifest; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""diagnose finds what is wrong with an installation, and names the command that mends it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

import exporters
from exporters import Diagnosis, Finding, cuda_libraries, diagnose, doctor
from lora_fx import cli

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
ROOT = Path(exporters.__file__).parents[1]


# A Python that has these packages and no others ----------------------------------------------------------


def install(site: Path, name: str, version: str, *requires: str, package: str = "onnxruntime") -> None:
    """A package's metadata, as pip leaves it; its files are written apart."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (folder / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {line}" for line in requires]) + "\n")
    (folder / "RECORD").write_text(f"{package}/__init__.py,,\n")


def write_runtime(site: Path, source: str) -> None:
    (site / "onnxruntime").mkdir()
    (site / "onnxruntime" / "__init__.py").write_text(source)


def diagnosed(site: Path) -> dict[str, Any]:
    """What is found by a Python without site-packages, but for `site`; {subject: finding}."""
    code = "import json; from exporters import diagnose; print(json.dumps(diagnose().to_dict()))"
    path = os.pathsep.join((str(site), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    printed = json.loads(done.stdout)
    assert not printed["ok"]
    return {finding["subject"]: finding for finding in printed["findings"]}


def test_nothing_installed(tmp_path: Path) -> None:
    found = diagnosed(tmp_path)
    assert found["onnxruntime"] == {
        "subject": "onnxruntime", "severity": "error", "what": "not installed", "fix": "pip install onnxruntime-gpu"
    }  # fmt: skip
    assert found["onnx"]["severity"] == found["onnxscript"]["severity"] == "error"
    assert found["python"]["severity"] == "ok"


def test_a_package_that_another_was_installed_over(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", "1.31.1")
    install(tmp_path, "onnxruntime", "1.32.0")
    install(tmp_path, "onnxruntime-genai", "0.18.0", "onnxruntime>=1.31.0", package="onnxruntime_genai")
    install(tmp_path, "optimum", "2.0", 'onnxruntime>=1.2; extra == "ort"', "onnxruntime-gpu", package="optimum")
    write_runtime(tmp_path, "__version__ = '1.32.0'\nget_available_providers = lambda: []")
    clash = diagnosed(tmp_path)["onnxruntime"]
    assert clash["severity"] == "error"
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 have written into one directory" in clash["what"]
    assert clash["what"].endswith("; onnxruntime-genai asks for onnxruntime")
    assert clash["fix"] == (
        "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1"
    )


BROKEN = {
    "hollow": (None, "hollow: its files were removed with another package's"),
    "damaged": ("raise ImportError('no pybind')", "ImportError: no pybind"),
    "of another version": (
        "__version__ = '1.32.0'\nget_available_providers = lambda: []",
        "is 1.32.0, but onnxruntime",
    ),
}


@pytest.mark.parametrize(("source", "what"), BROKEN.values(), ids=BROKEN)
def test_a_package_whose_files_are_not_its_own(source: str | None, what: str, tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", "1.31.1")
    if source is None:
        (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    else:
        write_runtime(tmp_path, source)
    found = diagnosed(tmp_path)
    assert found["onnxruntime-gpu"]["severity"] == "ok"
    assert found["import onnxruntime"]["severity"] == "error"
    assert what in found["import onnxruntime"]["what"]
    assert found["import onnxruntime"]["fix"] == "pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1"


# This Python ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    """Of this machine as it is."""
    return diagnose()


def test_this_machine(here: Diagnosis) -> None:
    found = {finding.subject: finding for finding in here.findings}
    for subject in ("python", "onnx", "onnxscript", "import onnxruntime", CPU):
        assert found[subject].severity == "ok", found[subject]
    if not cuda_libraries.find_gpus():
        assert here.ok
        assert not here.errors
        if CUDA in ort.get_available_providers():
            assert found[CUDA].severity == "warning"
            assert "there is no GPU" in found[CUDA].what
            assert found["libcublasLt.so.13"].what in ("missing", "loads")


def test_a_diagnosis_prints_and_is_json(here: Diagnosis) -> None:
    printed = json.loads(json.dumps(here.to_dict()))
    assert printed["ok"] is here.ok
    assert [finding["subject"] for finding in printed["findings"]] == [finding.subject for finding in here.findings]
    text = str(Diagnosis((Finding("a", "ok", "fine"), Finding("bcd", "error", "gone", "pip install bcd"))))
    assert text.splitlines() == [
        "       what  found", "ok     a     fine", "error  bcd   gone", "", "to mend  do", "bcd      pip install bcd"
    ]  # fmt: skip
    assert str(Diagnosis((Finding("a", "ok", "fine"),))).endswith("nothing to mend")


def test_it_needs_no_torch() -> None:
    code = "import sys; from exporters import diagnose; diagnose(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_versions_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"onnx": "1.19.1", "onnxscript": "0.7.0", "onnxruntime-gpu": "1.22.0"}
    monkeypatch.setattr(importlib.metadata, "version", old.__getitem__)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    found = {finding.subject: finding for finding in (*doctor._required_packages(), *doctor._owners())}
    assert found["onnx"] == Finding("onnx", "error", "1.19.1; lora-fx asks for >=1.20", "pip install 'onnx>=1.20'")
    assert found["onnxscript"].severity == "ok"
    assert found["onnxruntime-gpu"].fix == "pip install 'onnxruntime-gpu>=1.23'"


# Providers -----------------------------------------------------------------------------------------------


def runtime(session: Any = ort.InferenceSession, listed: tuple[str, ...] = (CUDA, CPU)) -> Any:
    """onnxruntime, but for what it lists and how it opens a session."""
    return SimpleNamespace(
        get_available_providers=lambda: list(listed), SessionOptions=ort.SessionOptions, InferenceSession=session
    )


def broken(data: bytes, options: Any, providers: list[str], enable_fallback: int) -> ort.InferenceSession:
    """A session that cannot be had on a GPU."""
    if providers == [CPU]:
        return ort.InferenceSession(data, options, providers=providers)
    os.write(
        2, b"Failed to load library libonnx_cuda.so with error: libcublasLt.so.13: cannot open shared object file\n"
    )
    raise RuntimeError("Create session failed")


def falling_back(data: bytes, options: Any, providers: list[str], **_: Any) -> ort.InferenceSession:
    """A session on the CPU, whatever was asked for, and although it was forbidden."""
    if providers != [CPU]:
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    return ort.InferenceSession(data, None, providers=[CPU])


@pytest.mark.parametrize(("gpus", "severity"), [([], "warning"), (["H100"], "error")])
def test_cuda_that_is_listed_and_does_not_work(
    gpus: list[str], severity: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cuda, tensorrt = sorted(
        (f for f in doctor._providers(runtime(broken, (TENSORRT, CUDA, CPU)), 13, gpus) if f.subject != CPU),
        key=lambda finding: finding.subject,
    )
    assert (cuda.severity, tensorrt.severity) == (severity, "warning")
    assert "listed, but does not work: libcublasLt.so.13 is missing" in cuda.what
    assert ("there is no GPU" in cuda.what) is not bool(gpus)
    assert cuda.fix == ("pip install 'nvidia-cublas~=13.0'" if gpus else 'make_session(path, provider="cpu")')
    assert capfd.readouterr() == ("", "")


def test_a_session_that_falls_back_does_not_count() -> None:
    found = {finding.subject: finding for finding in doctor._providers(runtime(falling_back), 13, ["H100"])}
    assert found[CPU].severity == "ok"
    assert found[CUDA].what == f"listed, but does not work: ExportError: the session runs on {CPU}"


def test_a_cpu_that_computes_something_else_is_broken() -> None:
    class Wrong:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return [CPU]

        def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
            return [feed["x"] * feed["x"]]

    (found,) = doctor._providers(runtime(Wrong, (CPU,)), None, [])
    assert found.severity == "error"
    assert "came out as [[4.0, 9.0], [25.0, 49.0]]" in found.what


def test_a_build_without_cuda_beside_a_gpu() -> None:
    cpu, cuda = doctor._providers(runtime(listed=("AzureExecutionProvider", CPU)), None, ["H100"])
    assert (cpu.severity, cuda.severity) == ("ok", "warning")
    assert f"which has AzureExecutionProvider, {CPU}" in cuda.what
    assert cuda.fix.endswith("&& pip install onnxruntime-gpu")


# Libraries of CUDA ---------------------------------------------------------------------------------------


@pytest.fixture
def provider_files(tmp_path: Path) -> Any:
    """A build for CUDA, with the files of its providers."""
    build = runtime(listed=(CUDA, CPU))
    build.__file__ = str(tmp_path / "__init__.py")
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    return build


def test_libraries_that_are_missing(provider_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["libcublasLt.so.13", "libcudart.so.13", "libcurand.so.10", cuda_libraries.DRIVER]
    monkeypatch.setattr(cuda_libraries, "needed_gpu_libraries", lambda file: needed)
    monkeypatch.setattr(cuda_libraries, "is_loadable", lambda name: name in ("libcudart.so.13", cuda_libraries.DRIVER))
    wheel = Path("site", "nvidia", "cu13", "lib")
    monkeypatch.setattr(cuda_libraries, "find_in_wheels", lambda n: wheel / n if n == "libcurand.so.10" else None)
    found = {finding.subject: finding for finding in doctor._libraries(provider_files, 13, ["H100"])}
    assert found["libcublasLt.so.13"] == Finding(
        "libcublasLt.so.13", "error", "missing", "pip install 'nvidia-cublas~=13.0'"
    )
    assert found["libcudart.so.13"] == Finding("libcudart.so.13", "ok", "loads")
    assert found["libcurand.so.10"].severity == "warning"
    assert found["libcurand.so.10"].fix == f"export LD_LIBRARY_PATH={wheel}:$LD_LIBRARY_PATH"
    assert doctor._gpu_fix("libcurand.so.10 is missing", 13) == found["libcurand.so.10"].fix
    assert "nvidia-smi" in doctor._gpu_fix("RuntimeError: CUDA failure 35", 13)
    assert found["libcudnn.so.9"] == Finding(
        "libcudnn.so.9", "warning", "missing", "pip install 'nvidia-cudnn-cu13~=9.0'"
    )
    assert {finding.severity for finding in doctor._libraries(provider_files, 13, [])} == {"ok", "warning"}
    assert not list(doctor._libraries(provider_files, None, ["H100"]))


def test_a_provider_whose_file_is_gone(provider_files: Any) -> None:
    (Path(provider_files.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so").unlink()
    (found,) = doctor._libraries(provider_files, 13, [])
    assert (found.severity, found.what) == ("error", "not where it belongs")


def test_what_a_shared_object_needs(tmp_path: Path) -> None:
    needed = cuda_libraries.needed_libraries(Path(onnxruntime_pybind11_state.__file__))
    assert {"libc.so.6", "libstdc++.so.6"} <= set(needed)
    assert all(".so" in name for name in needed)
    for content in (b"", b"\x7fELF", b"PK" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)):
        (tmp_path / "file.so").write_bytes(content)
        assert cuda_libraries.needed_libraries(tmp_path / "file.so") == []


def test_libraries_load_or_lie_in_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_libraries.is_loadable("libc.so.6")
    assert not cuda_libraries.is_loadable("libnowhere.so.13")
    monkeypatch.setattr(cuda_libraries.sysconfig, "get_path", lambda name: str(tmp_path))
    assert cuda_libraries.find_in_wheels("libcublas.so.13") is None
    file = tmp_path / "nvidia" / "cu13" / "lib" / "libcublas.so.13"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert cuda_libraries.find_in_wheels("libcublas.so.13") == file
    assert cuda_libraries.find_in_wheels("libcublasLt.so.13") is None


@pytest.mark.parametrize(
    ("library", "cuda", "line"),
    [
        ("libcublas.so.13", 13, "pip install 'nvidia-cublas~=13.0'"),
        ("libcublasLt.so.12", 12, "pip install 'nvidia-cublas-cu12~=12.0'"),
        ("libcurand.so.10", 13, "pip install 'nvidia-curand~=10.0'"),
        ("libcudnn.so.9", 13, "pip install 'nvidia-cudnn-cu13~=9.0'"),
        ("libnvinfer.so.10", 12, "pip install 'tensorrt-cu12~=10.0'"),
        (cuda_libraries.DRIVER, 13, "install NVIDIA's driver, and look at nvidia-smi"),
    ],
)
def test_what_brings_a_library(library: str, cuda: int, line: str) -> None:
    assert cuda_libraries.pip_line(library, cuda) == line


def test_gpus_are_those_of_nvidia_smi_unless_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100'\necho 'NVIDIA H200'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda_libraries.find_gpus() == ["NVIDIA H100", "NVIDIA H200"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_libraries.find_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert cuda_libraries.find_gpus() == []


@pytest.mark.parametrize(
    ("version", "requires", "cuda"),
    [
        ("2.13.0+cpu", [], None),
        ("2.13.0+cu126", [], 12),
        ("2.13.0", ["nvidia-cufft==12.0.0.61", 'nvidia-cuda-runtime==13.0.96; platform_system == "Linux"'], 13),
        ("2.13.0", ["cuda-toolkit[cublas,cudart]==13.0.2"], 13),
        ("2.7.0", ['nvidia-cuda-runtime-cu12==12.6.77; platform_system == "Linux"'], 12),
        ("2.13.0", ["sympy>=1.13.3"], None),
    ],
)
def test_the_cuda_of_torch(
    version: str, requires: list[str], cuda: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"torch": version}.__getitem__)
    monkeypatch.setattr(importlib.metadata, "requires", {"torch": requires}.__getitem__)
    (found,) = doctor._torch(13)
    assert found.severity == ("warning" if cuda == 12 else "ok")
    assert (f"CUDA {cuda}" if cuda else "without CUDA") in found.what
    assert found.fix == ("pip install torch --index-url https://download.pytorch.org/whl/cu130" if cuda == 12 else "")


@pytest.mark.parametrize(("newest", "severities"), [(12, ["error"]), (13, ["ok"]), (None, [])])
def test_a_driver_that_is_too_old(newest: int | None, severities: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_libraries, "driver_cuda", lambda: newest)
    assert [finding.severity for finding in doctor._driver(13, ["H100"])] == severities
    assert not list(doctor._driver(13, []))


# The command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", ["ok", "warning", "error"])
def test_the_command(severity: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: Diagnosis((Finding("cublas", severity, "missing", "pip"),)))
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["lora-fx", "doctor", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == (5 if severity == "error" else 0)
        printed = capsys.readouterr()
        assert printed.err == ("error: broken: cublas\n" if severity == "error" else "")
    assert json.loads(printed.out)["findings"][0]["severity"] == severity

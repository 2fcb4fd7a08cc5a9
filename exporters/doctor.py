"""What is wrong with an installation of ONNX Runtime, and the command that mends it.

Packages that fight over one directory, a list of providers that says what was compiled in and not what works,
and libraries of CUDA that no package asks for: each makes a session that runs on the CPU without a word, or no
session at all. Nothing here needs torch, nor an onnxruntime or onnx that can be imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata as metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_fx import ExportError

from . import cuda_libraries
from .quiet import stderr_caught
from .text import Shown, Table, reason, table

Severity = Literal["ok", "warning", "error"]

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_LIBRARY_OF = {
    _CUDA: "libonnxruntime_providers_cuda.so",
    _TENSORRT: "libonnxruntime_providers_tensorrt.so",
}
_CUDNN = "libcudnn.so.9"  # the CUDA provider opens it when a model has a convolution, and does not say so before
_PLAIN = "onnxruntime"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at.
        severity: "error" if something is broken, "warning" if it limits what works here, or will.
        what: what was found.
        fix: the command that mends it; empty if there is nothing to mend.
    """

    subject: str
    severity: Severity
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis(Shown):
    """What `diagnose` found. Prints as a table, and the commands below it."""

    findings: tuple[Finding, ...]
    between = "\n\n"

    @property
    def ok(self) -> bool:
        """Whether the CPU works and nothing is broken; warnings are all right."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What is broken."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": self.ok, "findings": [dataclasses.asdict(finding) for finding in self.findings]}

    def blocks(self) -> list[str | Table]:
        """What was found, and what mends it."""
        rows = [(finding.severity, finding.subject, finding.what) for finding in self.findings]
        found = table(("", "what", "found"), rows)
        mending = [finding for finding in self.findings if finding.fix]
        if not mending:
            return [found, "nothing to mend"]
        return [found, table(("to mend", "do"), [(finding.subject, finding.fix) for finding in mending])]


def diagnose() -> Diagnosis:
    """Look at the installation of ONNX Runtime: packages, versions, providers, libraries of CUDA, GPUs.

    Whatever is found is in the result; nothing is raised, nothing is changed, and torch is not imported. Providers
    are tried, which makes sessions in this process.
    """
    gpus = cuda_libraries.find_gpus()
    packages = [*_python(), *_required_packages(), *_owners()]
    runtime, broken = _import_runtime()
    if runtime is None:
        return Diagnosis((*packages, *broken, *_gpus(gpus)))
    cuda = _cuda_of(runtime)
    found = [*packages, *broken, *_providers(runtime, cuda, gpus), *_libraries(runtime, cuda, gpus)]
    return Diagnosis((*found, *_torch(cuda), *_gpus(gpus), *_driver(cuda, gpus)))


# Packages --------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _required_packages() -> Iterator[Finding]:
    """onnx and onnxscript, against the ranges that lora-fx asks for."""
    for name in ("onnx", "onnxscript"):
        asked, version = _asked_range(name), _version(name)
        fix = f"pip install '{name}{asked}'"
        if version is None:
            yield Finding(name, "error", "not installed; exporters need it", fix)
        elif not _is_within(version, asked):
            yield Finding(name, "error", f"{version}; lora-fx asks for {asked}", fix)
        else:
            yield Finding(name, "ok", version)


def _owners() -> Iterator[Finding]:
    """The packages whose files lie in the directory `onnxruntime`: there is room for one."""
    owners = _owners_of(_PLAIN)
    if not owners:
        yield Finding(_PLAIN, "error", "not installed", _install_line())
        return
    asked = _asked_range(_PLAIN)
    for name, version in owners.items():
        if not _is_within(version, asked):
            fix = f"pip install '{name}{asked}'"
            yield Finding(name, "error", f"{version}; lora-fx asks for {asked}", fix)
        elif len(owners) == 1:
            yield Finding(name, "ok", version)
    if len(owners) > 1:
        both = " and ".join(f"{name} {version}" for name, version in owners.items())
        yield Finding(
            _PLAIN,
            "error",
            f"{both} have written into one directory: the last one's files are there{_who_asks(owners)}",
            _repair_line(owners),
        )


def _who_asks(owners: dict[str, str]) -> str:
    """What has pulled the plain package over another: `, and onnxruntime-genai asks for onnxruntime`."""
    if _PLAIN not in owners:
        return ""
    names = sorted(
        {
            distribution.name
            for distribution in metadata.distributions()
            if any(re.match(rf"{_PLAIN}\b(?!-)(?!.*\bextra\b)", line) for line in distribution.requires or ())
        }
    )
    return f"; {', '.join(names)} {'asks' if len(names) == 1 else 'ask'} for {_PLAIN}" if names else ""


def _owners_of(package: str) -> dict[str, str]:
    """{distribution: version} of those that bring an importable package."""
    names = sorted(set(metadata.packages_distributions().get(package, ())))
    return {name: metadata.version(name) for name in names}


def _wanted(owners: dict[str, str]) -> str:
    """Which of several to keep: one for a GPU, if there is one."""
    special = [name for name in owners if name != _PLAIN]
    return special[0] if special else _install_line().split()[-1]


def _repair_line(owners: dict[str, str]) -> str:
    keep = _wanted(owners)
    pin = f"=={owners[keep]}" if keep in owners else ""
    others = [name for name in owners if name != keep]
    install = f"pip install --force-reinstall --no-deps {keep}{pin}"
    return f"pip uninstall -y {' '.join(others)} && {install}" if others else install


def _install_line() -> str:
    has_gpu_wheel = sys.platform == "linux" and platform.machine() == "x86_64"
    return "pip install onnxruntime-gpu" if has_gpu_wheel else f"pip install {_PLAIN}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _asked_range(name: str) -> str:
    """The versions of a package that lora-fx asks for; empty where its own metadata is not to be had."""
    try:
        lines = metadata.requires("lora-fx") or []
    except metadata.PackageNotFoundError:
        lines = []
    found = (re.match(rf"{name}\s*([<>=!~][^;]*)", line) for line in lines)
    return next((match[1].strip() for match in found if match), "")


def _is_within(version: str, asked: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # onnxruntime brings it
        return True
    return SpecifierSet(asked).contains(version, prereleases=True)


# The runtime -----------------------------------------------------------------------------------------


def _import_runtime() -> tuple[Any, list[Finding]]:
    """The module, if it can be used at all, and what is wrong with it."""
    owners = _owners_of(_PLAIN)
    if not owners:
        return None, []
    try:
        with stderr_caught():
            runtime = importlib.import_module(_PLAIN)
    except Exception as error:
        return None, [Finding(f"import {_PLAIN}", "error", reason(error), _repair_line(owners))]
    version = getattr(runtime, "__version__", None)
    if version is None:
        what = "hollow: its files were removed with another package's, whose directory was the same"
        return None, [Finding(f"import {_PLAIN}", "error", what, _repair_line(owners))]
    if version not in owners.values():
        what = f"is {version}, but {' and '.join(owners)} say they brought {' and '.join(owners.values())}"
        return runtime, [Finding(f"import {_PLAIN}", "error", what, _repair_line(owners))]
    return runtime, [Finding(f"import {_PLAIN}", "ok", version)]


def _directory(runtime: Any) -> Path:
    return Path(runtime.__file__).parent / "capi"


def _cuda_of(runtime: Any) -> int | None:
    """The major version of CUDA that a build is for; None if it is for none."""
    try:
        information = importlib.import_module(f"{runtime.__name__}.capi.build_and_package_info")
    except ImportError:
        return None
    found = re.match(r"\d+", str(getattr(information, "cuda_version", "") or ""))
    return int(found[0]) if found else None


def _providers(runtime: Any, cuda: int | None, gpus: list[str]) -> Iterator[Finding]:
    """What works, by a small model that may not fall back on the CPU."""
    listed = list(runtime.get_available_providers())
    for provider in (_CPU, _CUDA, _TENSORRT):
        if provider not in listed:
            continue
        problem = _why_not(runtime, provider)
        if not problem:
            yield Finding(provider, "ok", "works")
        elif provider == _CPU:
            yield Finding(provider, "error", f"listed, but does not work: {problem}", _repair_line(_owners_of(_PLAIN)))
        else:
            # Without TensorRT, which nobody installs by accident, CUDA is what runs.
            severity: Severity = "error" if gpus and provider == _CUDA else "warning"
            without = "" if gpus else "; there is no GPU"
            fix = _gpu_fix(problem, cuda or 0) if gpus else 'make_session(path, provider="cpu")'
            yield Finding(provider, severity, f"listed, but does not work: {problem}{without}", fix)
    if _CPU not in listed:
        yield Finding(_CPU, "error", "not listed", _repair_line(_owners_of(_PLAIN)))
    if gpus and _CUDA not in listed:
        what = f"not in this build, which has {', '.join(listed)}"
        fix = f"pip uninstall -y {' '.join(_owners_of(_PLAIN))} && pip install onnxruntime-gpu"
        yield Finding(_CUDA, "warning", what, fix)


def _gpu_fix(problem: str, cuda: int) -> str:
    """The command for the library that a provider lacks; where it lacks none, where to look."""
    missing = re.match(r"(lib\S+) is missing", problem)
    return _library(missing[1], cuda, "error").fix if missing else "look at nvidia-smi, and at the libraries below"


def _why_not(runtime: Any, provider: str) -> str:
    """Why a provider does not run a product of two matrices; empty if it does."""
    with stderr_caught() as caught:
        try:
            _multiply(runtime, provider)
            return ""
        except Exception as error:
            failure = error
    missing = re.search(r"(lib[^\s/]+): cannot open", caught.text)
    return f"{missing[1]} is missing" if missing else reason(failure, 200)


def _multiply(runtime: Any, provider: str) -> None:
    """Raises unless a session on `provider`, and on nothing else, computes what it should."""
    import numpy as np

    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if provider != _CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = runtime.InferenceSession(_product(), options, providers=[provider], enable_fallback=0)
    if provider not in session.get_providers():
        raise ExportError(f"the session runs on {' and '.join(session.get_providers())}")
    x = np.array([[2, 3], [5, 7]], np.float32)
    (y,) = session.run(None, {"x": x})
    if not np.array_equal(y, x @ x):
        raise ExportError(f"the square of {x.tolist()} came out as {y.tolist()}")


def _product() -> bytes:
    """A model that multiplies a 2 × 2 matrix with itself, in a form that every onnxruntime in range reads."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "product", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    data: bytes = model.SerializeToString()
    return data


# CUDA ------------------------------------------------------------------------------------------------


def _libraries(runtime: Any, cuda: int | None, gpus: list[str]) -> Iterator[Finding]:
    """What the GPU providers need, library by library."""
    if cuda is None or sys.platform != "linux":
        return
    seen: set[str] = set()
    for provider, name in _LIBRARY_OF.items():
        file = _directory(runtime) / name
        if provider not in runtime.get_available_providers():
            continue
        if not file.is_file():
            yield Finding(name, "error", "not where it belongs", _repair_line(_owners_of(_PLAIN)))
            continue
        needed = [*cuda_libraries.needed_gpu_libraries(file), *([_CUDNN] if provider == _CUDA else [])]
        for library in needed:
            if library not in seen:
                seen.add(library)
                yield _library(library, cuda, severity="error" if gpus and provider == _CUDA else "warning")


def _library(library: str, cuda: int, severity: Severity) -> Finding:
    if cuda_libraries.is_loadable(library):
        return Finding(library, "ok", "loads")
    place = cuda_libraries.find_in_wheels(library)
    if place is not None:
        what = f"lies in {place.parent}, where the loader does not look by itself"
        return Finding(library, "warning", what, f"export LD_LIBRARY_PATH={place.parent}:$LD_LIBRARY_PATH")
    if library == _CUDNN:
        severity = "warning"  # only models with convolutions and the like ask for it
    return Finding(library, severity, "missing", cuda_libraries.pip_line(library, cuda))


def _torch(cuda: int | None) -> Iterator[Finding]:
    """Whether torch's libraries of CUDA are those that onnxruntime needs; read from the package, not imported."""
    version = _version("torch")
    if version is None:
        yield Finding("torch", "ok", "not installed; sessions need none")
        return
    theirs = _cuda_of_torch(version)
    if theirs is None or cuda is None or theirs == cuda:
        yield Finding("torch", "ok", f"{version}, " + (f"CUDA {theirs}" if theirs else "without CUDA"))
        return
    what = f"{version} brings CUDA {theirs}, and onnxruntime needs CUDA {cuda}: each needs libraries of its own"
    yield Finding("torch", "warning", what, f"pip install torch --index-url https://download.pytorch.org/whl/cu{cuda}0")


def _cuda_of_torch(version: str) -> int | None:
    """The major version of CUDA that the installed torch is for, from `+cu130` or from what it asks for."""
    local = re.search(r"\+(?:cu(\d\d)\d|\w+)", version)
    if local:
        return int(local[1]) if local[1] else None
    lines = metadata.requires("torch") or []
    asked = (re.match(r"(?:nvidia-cuda-runtime|cuda-toolkit)\b[^;]*?==(\d+)\.", line) for line in lines)
    return next((int(match[1]) for match in asked if match), None)


def _gpus(gpus: list[str]) -> Iterator[Finding]:
    yield Finding("GPU", "ok", ", ".join(gpus) if gpus else "none to be seen: sessions run on the CPU")


def _driver(cuda: int | None, gpus: list[str]) -> Iterator[Finding]:
    newest = cuda_libraries.driver_cuda()
    if not gpus or cuda is None or newest is None:
        return
    if newest < cuda:
        what = f"goes up to CUDA {newest}, and onnxruntime needs CUDA {cuda}"
        yield Finding("driver", "error", what, f"install a driver of NVIDIA for CUDA {cuda}, and look at nvidia-smi")
    else:
        yield Finding("driver", "ok", f"goes up to CUDA {newest}")

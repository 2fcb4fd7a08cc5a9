"""The shared libraries that ONNX Runtime's GPU providers need: which, where they are, and what brings them."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

# What a library's name begins with → the wheel that brings it, without the ending that names its CUDA.
_WHEELS = {
    "libcublas": "nvidia-cublas",
    "libcudart": "nvidia-cuda-runtime",
    "libcudnn": "nvidia-cudnn",
    "libcufft": "nvidia-cufft",
    "libcurand": "nvidia-curand",
    "libnvinfer": "tensorrt",
    "libnvonnxparser": "tensorrt",
    "libnvrtc": "nvidia-cuda-nvrtc",
}
_ALWAYS_WITH_CUDA = {"nvidia-cudnn", "tensorrt"}  # the others have no such ending from CUDA 13 on
DRIVER = "libcuda.so.1"
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed_gpu_libraries(file: Path) -> list[str]:
    """NVIDIA's libraries among those that a shared object needs, the driver's included."""
    return [name for name in needed_libraries(file) if name == DRIVER or name.startswith(tuple(_WHEELS))]


def needed_libraries(file: Path) -> list[str]:
    """The DT_NEEDED entries of an ELF file of 64 bits, little-endian; none of a file of another kind."""
    if os.path.getsize(file) < 64:
        return []
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            return []
        table, size, count = struct.unpack_from("<Q14xHH", data, 32)  # e_phoff, e_phentsize, e_phnum
        # p_type, p_offset, p_vaddr, p_filesz
        segments = [struct.unpack_from("<I4xQQ8xQ", data, table + size * i) for i in range(count)]
        start, length = next(((at, n) for kind, at, _, n in segments if kind == _PT_DYNAMIC), (0, 0))
        entries = [(tag, value) for tag, value in struct.iter_unpack("<qQ", data[start : start + length])]
        strings = next((value for tag, value in entries if tag == _DT_STRTAB), 0)  # an address, not an offset
        loaded = [s for s in segments if s[0] == _PT_LOAD and s[2] <= strings < s[2] + s[3]]
        if not loaded:
            return []
        base = strings - loaded[0][2] + loaded[0][1]
        names = [base + value for tag, value in entries if tag == _DT_NEEDED]
        return [data[at : data.find(b"\0", at)].decode() for at in names]


def is_loadable(library: str) -> bool:
    """Whether the loader finds `library`, and what it needs itself."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def find_in_wheels(library: str) -> Path | None:
    """Where a wheel has put `library`: below site-packages/nvidia, where the loader does not look by itself."""
    root = Path(sysconfig.get_path("purelib"))
    found = [path for top in ("nvidia", "tensorrt_libs") for path in sorted((root / top).rglob(library))]
    return found[0] if found else None


def pip_line(library: str, cuda: int) -> str:
    """The command that installs `library` for a major version of CUDA; for the driver, what to look at."""
    wheel = next((wheel for prefix, wheel in _WHEELS.items() if library.startswith(prefix)), None)
    if wheel is None:
        return "install NVIDIA's driver, and look at nvidia-smi"
    ending = f"-cu{cuda}" if cuda < 13 or wheel in _ALWAYS_WITH_CUDA else ""
    version = re.search(r"\.so\.(\d+)", library)
    pin = f"~={version[1]}.0" if version else ""
    return f"pip install '{wheel}{ending}{pin}'"


def find_gpus() -> list[str]:
    """Names of the GPUs that nvidia-smi lists; where there is no nvidia-smi, as many as the driver counts.

    None where CUDA_VISIBLE_DEVICES hides them all.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return []
        return done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [f"GPU {index}" for index in range(_count_by_driver())]


def _count_by_driver() -> int:
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL(DRIVER)
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else count.value


def driver_cuda() -> int | None:
    """The major version of CUDA that the driver goes up to; None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000

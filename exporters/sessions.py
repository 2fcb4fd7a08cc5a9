"""ONNX Runtime sessions that run where they say they run.

`get_available_providers()` lists what was compiled in, not what works, and a CUDA session on a machine
without CUDA is a CPU session with a line in the log. So: make the session, look at what it got, and
read the log for the reason.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from lora_fx import AdapterArrays, ExportError

from .external_data import DATA_HASH_KEY, check_external_data
from .paths import path_of
from .quiet import quiet, stderr_caught
from .text import plain_lines, reason, some

if TYPE_CHECKING:
    from .onnx_sites import Mapped
    from .onnx_weights import Array

logger = logging.getLogger("exporters")

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_NAMES = ("auto", *_PROVIDERS)
_MEANT = {name.lower(): short for short, name in _PROVIDERS.items()} | {
    "gpu": "cuda",
    "nvidia": "cuda",
    "trt": "tensorrt",
}
# A model whose products run on the CPU does not "run on CUDA", whatever its shape arithmetic does.
_HEAVY = {"Attention", "Conv", "ConvTranspose", "Einsum", "FusedMatMul", "GRU", "Gemm", "LSTM", "MatMul"}


def make_session(
    path: str | os.PathLike[str],
    *,
    provider: str = "auto",
    adapter: str | os.PathLike[str] | AdapterArrays | None = None,
    adapter_name: str = "default",
    mapping: Mapped | None = None,
    cuda_graph: bool = False,
) -> ort.InferenceSession:
    """Open an ONNX file on the provider asked for, or raise.

    Args:
        adapter: an adapter's directory, to be folded into the weights as the session loads them. Nothing is written.
        adapter_name, mapping: as for `fold_into_onnx`.
        cuda_graph: record the kernels once and replay them: on CUDA, with bound inputs of one shape
            (`AdapterSession.bind`), of a file without dimensions that are free inside. On the CPU it means nothing.
        provider: "cuda" or "tensorrt" runs there or raises with the reason; "cpu"; "auto" takes CUDA if it
            works and the CPU otherwise, and says to the logger "exporters" which it took and why.

    Raises:
        ExportError: for an unknown provider, a missing or damaged file, external weights that are not those
            the file was written with, or a provider that does not work here.
        AdapterError: if the adapter does not fit the file.
    """
    check_provider(provider)
    file = checked_file(path)
    if cuda_graph and provider not in ("cuda", "auto"):
        raise ExportError(f'cuda_graph=True needs provider="cuda" or "auto", not {provider!r}')
    options = {"enable_cuda_graph": "1"} if cuda_graph else None
    overrides = None if adapter is None else Overrides.of_adapter(file, adapter, adapter_name, mapping)
    return open_session(file, provider, options, overrides)


class Overrides:
    """A file's graph, and values that a session takes in place of some of its initializers.

    ONNX Runtime keeps neither the arrays nor what wraps them, and reads freed memory without a word: they live here
    until the session is made. They are given as external initializers, since `add_initializer` replaces what is in the
    file only after optimisers have used it: weights of convolutions, and what is folded, would stay the base's.
    """

    def __init__(self, graph: bytes, given: Mapping[str, ir.TensorProtocol]) -> None:
        self.graph = graph
        self._arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in given.values()]
        self._names = list(given)
        self._values = [self._value(array) for array in self._arrays]

    @classmethod
    def of_adapter(
        cls, file: Path, adapter: str | os.PathLike[str] | AdapterArrays, adapter_name: str, mapping: Mapped | None
    ) -> Overrides:
        """The weights of `file` with an adapter folded into them."""
        from .onnx_folding import session_values

        return cls(*session_values(file, adapter, adapter_name, mapping))

    @staticmethod
    def _value(array: Array) -> ort.OrtValue:
        if array.dtype.name == "bfloat16":  # which onnxruntime's numpy has not
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(ir.DataType.BFLOAT16))
        return ort.OrtValue.ortvalue_from_numpy(array)

    def give_to(self, options: ort.SessionOptions, file: Path) -> None:
        """Hand the values to a session that is to be made of `graph` with these options."""
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.fspath(file.parent.resolve())
        )
        options.add_external_initializers(self._names, self._values)


def check_provider(provider: str) -> None:
    """Raises ExportError unless `provider` is one of "auto", "cpu", "cuda" and "tensorrt"."""
    if provider in _NAMES:
        return
    meant = _MEANT.get(str(provider).lower())
    near = [meant] if meant else difflib.get_close_matches(str(provider).lower(), _NAMES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ExportError(f"provider={provider!r} is unknown; choose one of {', '.join(map(repr, _NAMES))}.{hint}")


def checked_file(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path. Raises ExportError if there is no file."""
    file = path_of(path)
    if not os.path.isfile(file):  # not Path.is_file, which raises for a name that is too long
        if os.path.isdir(f"{file}.undo"):
            raise ExportError(
                f"the ONNX file {file} is away, since a fold in place was interrupted; unfold_onnx({str(file)!r}) puts "
                "everything back as it was"
            )
        if os.path.isdir(file):
            found = sorted(str(each) for each in file.glob("*.onnx"))
            inside = f"; it holds {some(found)}" if found else ""
            raise ExportError(
                f"{str(file)!r} is a directory, where an ONNX file is meant{inside}; give the path of the file"
            )
        raise ExportError(f"the ONNX file {file} does not exist; export_onnx(gm, {str(file)!r}) writes one")
    return file


def open_session(
    file: Path, provider: str, options: Mapping[str, str] | None = None, overrides: Overrides | None = None
) -> ort.InferenceSession:
    """`make_session` on checked arguments; `options` go to the GPU provider."""
    source = _Source(file, overrides)
    if provider == "cpu":
        session = _open(source, ["CPUExecutionProvider"])
    elif provider == "auto":
        session = _automatic(source, options or {})
    else:
        session = _on_gpu(source, _PROVIDERS[provider], options or {})
    if DATA_HASH_KEY in session.get_modelmeta().custom_metadata_map:
        check_external_data(file, onnx.load(file, load_external_data=False))
    return session


@dataclass(frozen=True)
class _Source:
    """What a session is made from."""

    file: Path
    overrides: Overrides | None


_told: set[str] = set()
_OR_AUTO = ' or "auto"'


def _automatic(source: _Source, options: Mapping[str, str]) -> ort.InferenceSession:
    cuda = _PROVIDERS["cuda"]
    if cuda not in ort.get_available_providers():
        logger.info("auto took the CPU: this build of onnxruntime has no CUDA provider")
        return _open(source, ["CPUExecutionProvider"])
    try:
        session = _on_gpu(source, cuda, options)
    except ProviderError as error:
        # A service opens many sessions, and needs to hear of its machine once.
        level = logging.INFO if str(error) in _told else logging.WARNING
        _told.add(str(error))
        logger.log(level, "auto took the CPU for %s: %s", source.file.name, str(error).removesuffix(_OR_AUTO))
        return _open(source, ["CPUExecutionProvider"])
    logger.info("auto took CUDA for %s", source.file.name)
    return session


class ProviderError(ExportError):
    """The provider does not work here; the file may be all right."""


def _on_gpu(source: _Source, provider: str, options: Mapping[str, str]) -> ort.InferenceSession:
    if provider not in ort.get_available_providers():
        raise ProviderError(
            f"{provider} is not in this build of onnxruntime {ort.__version__} (it has "
            f"{some(ort.get_available_providers())}); pip install onnxruntime-gpu, and not onnxruntime beside it"
        )
    _preload()
    _open(source, ["CPUExecutionProvider"])  # a file that cannot be read at all is not the provider's fault
    wanted: list[Any] = [(provider, dict(options))]
    with stderr_caught() as caught:
        try:
            # Nothing at all on the CPU: as strict as it gets. Not every good model passes, because ONNX Runtime
            # keeps the arithmetic of free dimensions on the CPU on purpose.
            return _create(source, wanted, {"session.disable_cpu_ep_fallback": "1"})
        except Exception as error:
            first = error
        try:
            session = _create(source, wanted, {"session.record_ep_graph_assignment_info": "1"})
        except Exception as error:
            first, session = error, None
    log = plain_lines(caught.text)
    if session is None or provider not in session.get_providers():
        raise ProviderError(
            f"{provider} does not work here: {_why(log) or reason(first)}. {_fix(log, provider)}"
        ) from first
    _refuse_heavy_on_cpu(session, provider)
    return session


@functools.cache
def _preload() -> None:
    """Load CUDA's libraries from the wheels that they came in, where the loader does not look of its own accord."""
    if hasattr(ort, "preload_dlls"):
        with quiet(), stderr_caught(), contextlib.suppress(Exception):  # the session says what is missing
            ort.preload_dlls()


def _refuse_heavy_on_cpu(session: ort.InferenceSession, provider: str) -> None:
    assigned = session.get_provider_graph_assignment_info()
    on_cpu = [node.op_type for part in assigned if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()]
    heavy = sorted(_HEAVY & set(on_cpu))
    if heavy:
        raise ProviderError(
            f"{provider} leaves {some(heavy)} of this model to the CPU; it cannot run them in this dtype or form. "
            'Run with provider="cpu", or export the model in float32 or float16'
        )
    if on_cpu:
        logger.info("%s runs the model; %d nodes of shape arithmetic stay on the CPU", provider, len(on_cpu))


def _open(source: _Source, providers: Sequence[Any]) -> ort.InferenceSession:
    with stderr_caught():
        try:
            return _create(source, providers, {})
        except Exception as error:
            raise _unopened(source.file, error) from error


def check_opens(file: Path) -> None:
    """Whether ONNX Runtime takes a file, without a copy of its weights: those beside it stay there.

    Raises:
        ExportError: if not.
    """
    with stderr_caught():
        try:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
            ort.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:
            raise _unopened(file, error) from error


def _unopened(file: Path, error: Exception) -> ExportError:
    return ExportError(
        f"ONNX Runtime {ort.__version__} cannot open {file}: {reason(error)}. The file may be damaged, cut off, apart "
        "from its .data file, or newer than this onnxruntime; export it again"
    )


def _create(source: _Source, providers: Sequence[Any], config: Mapping[str, str]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    model: str | bytes = os.fspath(source.file)
    if source.overrides is not None:
        source.overrides.give_to(options, source.file)
        model = source.overrides.graph
    # enable_fallback is Python's own retry on other providers, which prints to stdout and goes on.
    return ort.InferenceSession(model, options, providers=list(providers), enable_fallback=0)


def _why(log: Sequence[str]) -> str:
    for line in log:
        missing = re.search(r"Failed to load library \S*?([^/\s]+\.so\S*) with error: (.*)", line)
        if missing:
            return f"{missing[1]} needs {missing[2]}"
    failed = [line for line in log if "Failed to create" in line or "CUDA failure" in line or "CUDA error" in line]
    return re.sub(r"^.*?\] ", "", failed[0])[:300] if failed else ""


def _fix(log: Sequence[str], provider: str) -> str:
    required = next((found[1] for line in log if (found := re.search(r"(Require .+?)\. Please", line))), "")
    needs = f"{required}. " if required else ""
    cuda = "the CUDA libraries (pip install onnxruntime-gpu[cuda,cudnn])"
    libraries = f"{cuda} and TensorRT 10" if "Tensorrt" in provider else cuda
    return f'{needs}Install a driver and {libraries} and look at nvidia-smi, or pass provider="cpu"{_OR_AUTO}'


def silent_run() -> ort.RunOptions:
    """For a run whose error is raised: ONNX Runtime writes it to the terminal, too."""
    options = ort.RunOptions()
    options.log_severity_level = 4
    return options

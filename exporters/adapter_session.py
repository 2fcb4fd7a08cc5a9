"""A session that switches adapters from call to call, and does not answer with the wrong one's weights.

ONNX Runtime's own way, `RunOptions.add_active_adapter`, keeps a bare pointer to an adapter that Python may have freed,
lets the first of two adapters win, ignores them all under IOBinding and run_async, and never asks whether an adapter
was made for the model. Here an adapter's tensors are inputs like any others: they live as long as the call, and they
are checked when they are loaded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from lora_fx import AdapterArrays, AdapterError, ExportError, read_adapter
from lora_fx.errors import closest

from .lora_places import adapter_arrays
from .lora_slots import Slots, read_slots
from .made_up_inputs import DTYPES
from .named_weights import OnnxWeights
from .onnx_adapters import Adapter, check_arrays, read_onnx_adapter
from .onnx_files import open_model
from .onnx_weights import Array
from .paths import path_of
from .sessions import checked_file, make_session, silent_run
from .text import reason, some

Adapters = str | Sequence[str] | None


@dataclass(frozen=True, eq=False)
class _Loaded:
    """An adapter's tensors: the arrays, and values on the session's device, which on the CPU refer to the arrays."""

    arrays: Mapping[str, Array]
    there: Mapping[str, ort.OrtValue]


class AdapterSession:
    """Runs a file of `export_onnx_adapters`, `export_onnx_batched` or `add_adapter_inputs`.

        session = AdapterSession("model.onnx")
        session.load("french", "french.onnx_adapter")       # or a directory that PEFT wrote
        session.run({"input_ids": ids, ...}, adapter="french")
        session.run({"input_ids": ids, ...})                # the base, bit for bit

    All methods may be called from several threads; a call that runs keeps the adapters that it began with.

    Args:
        path: the file.
        provider, cuda_graph: as for `make_session`.

    Raises:
        ExportError: if the file has no places for adapters, or as `make_session`.
    """

    def __init__(self, path: str | os.PathLike[str], *, provider: str = "auto", cuda_graph: bool = False) -> None:
        self._file = checked_file(path)
        self.session = make_session(self._file, provider=provider, cuda_graph=cuda_graph)
        self.slots: Slots = read_slots(self.session.get_modelmeta().custom_metadata_map, self._file.name)
        self.inputs = tuple(port.name for port in self.session.get_inputs())
        self.outputs = tuple(port.name for port in self.session.get_outputs())
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.Lock()

    @property
    def provider(self) -> str:
        """Where it runs: ONNX Runtime's name of the provider."""
        return str(self.session.get_providers()[0])

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that may be chosen."""
        return self.slots.adapters if self.slots.ids is not None else tuple(self._loaded)

    def load(self, name: str, adapter: Adapter, *, adapter_name: str = "default", partial: bool = False) -> None:
        """Make an adapter known under a name; one that has the name already is replaced.

        Args:
            adapter: an .onnx_adapter file made for this model, or a directory that PEFT or `save_adapter` wrote.
            adapter_name: the sub-directory to take of a PEFT directory of several adapters.
            partial: of a directory, leave out what the file has no input for: it is one part of the model.

        Raises:
            AdapterError: if it does not fit this file, or was made for other base weights.
        """
        if self.slots.ids is not None:
            raise AdapterError(
                f"{self._file.name} holds its adapters itself; append_adapter(file, {name!r}, directory) adds one"
            )
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is {name!r}; it must be a string that is not empty")
        loaded = self._from_file(adapter) if _is_file(adapter) else self._from_directory(adapter, adapter_name, partial)
        with self._lock:
            self._loaded = {**self._loaded, name: loaded}

    def unload(self, name: str) -> None:
        """Forget an adapter; calls that run with it go on.

        Raises:
            AdapterError: if there is none of that name.
        """
        self._find(name)
        with self._lock:
            self._loaded = {other: loaded for other, loaded in self._loaded.items() if other != name}

    def run(
        self, feed: Mapping[str, Array], adapter: Adapters = None, outputs: Sequence[str] | None = None
    ) -> list[Array]:
        """The outputs, for one adapter, several that adapt different modules, or the base (None).

        Args:
            feed: {input: array}; of a file that holds its adapters, without `adapter_ids` if all rows take `adapter`.
            outputs: names of those that are wanted; None for all.

        Raises:
            AdapterError: for an adapter that is unknown, or two that adapt the same module.
            ExportError: if inputs are missing or unknown, or ONNX Runtime cannot run with them.
        """
        arrays, _ = self._feed(feed, adapter)
        try:
            return list(self.session.run(None if outputs is None else list(outputs), arrays, silent_run()))
        except Exception as error:
            raise ExportError(f"{self._file.name} cannot run with these inputs: {reason(error)}") from error

    def run_async(self, feed: Mapping[str, Array], adapter: Adapters = None) -> Future[list[Array]]:
        """`run` on ONNX Runtime's own threads. The future has the outputs, or the error."""
        arrays, kept = self._feed(feed, adapter)
        future: Future[list[Array]] = Future()

        def done(results: Any, held: Any, error: str) -> None:
            del held
            if error:
                future.set_exception(ExportError(f"{self._file.name} cannot run with these inputs: {error}"))
            else:
                future.set_result(list(results))

        try:
            self.session.run_async(None, arrays, done, (arrays, kept), silent_run())
        except Exception as error:
            raise ExportError(f"{self._file.name} cannot run with these inputs: {reason(error)}") from error
        return future

    def bind(self, feed: Mapping[str, Array], adapter: Adapters = None) -> BoundRun:
        """An IOBinding with the inputs and the adapter on the provider's device: run it as often as you like.

        Raises:
            AdapterError, ExportError: as `run`.
        """
        arrays, kept = self._feed(feed, adapter)
        values = {name: value for loaded in kept for name, value in loaded.there.items()}
        return BoundRun(self, {name: array for name, array in arrays.items() if name not in values}, values, kept)

    def ids_of(self, adapters: Sequence[str | None]) -> Array:
        """`adapter_ids`, int64 (batch,), of the adapters that the rows are to take; None for the base.

        Raises:
            AdapterError: for an unknown name.
        """
        return np.array([0 if name is None else self._number(name) for name in adapters], np.int64)

    def _feed(self, feed: Mapping[str, Array], adapter: Adapters) -> tuple[dict[str, Array], tuple[_Loaded, ...]]:
        """All inputs as arrays, and what keeps them alive."""
        arrays = _as_arrays(feed)
        if not (adapter is None or isinstance(adapter, str)) and not _are_names(adapter):
            raise AdapterError(f"adapter={adapter!r} must be an adapter's name, several names, or None for the base")
        if self.slots.ids is not None:
            arrays = self._with_ids(arrays, adapter)
        self._check_names(arrays)
        self._check_types(arrays)
        if self.slots.ids is not None or adapter is None:
            return arrays, ()
        chosen = [adapter] if isinstance(adapter, str) else list(adapter)
        loaded = tuple(self._find(name) for name in chosen)
        for i, each in enumerate(loaded):
            for j, other in enumerate(loaded[:i]):
                if both := sorted(set(each.arrays) & set(other.arrays)):
                    raise AdapterError(
                        f"{chosen[j]!r} and {chosen[i]!r} both have {both[0]!r}, and inputs do not add up: one would "
                        "be left out. Combine them into one adapter: lora_fx.combine_adapters"
                    )
        return arrays | {name: array for each in loaded for name, array in each.arrays.items()}, loaded

    def _with_ids(self, arrays: dict[str, Array], adapter: Adapters) -> dict[str, Array]:
        assert self.slots.ids is not None
        if self.slots.ids not in arrays:
            if adapter is not None and not isinstance(adapter, str):
                raise AdapterError(f"rows choose adapters here: pass {self.slots.ids!r}, or one adapter for all rows")
            number = 0 if adapter is None else self._number(adapter)
            return arrays | {self.slots.ids: np.full(self._rows(arrays), number, np.int64)}
        if adapter is not None:
            raise AdapterError(f"both adapter={adapter!r} and {self.slots.ids!r} were given; pass one of them")
        return arrays | {self.slots.ids: self.checked_ids(arrays[self.slots.ids], self._rows(arrays))}

    def checked_ids(self, ids: Array, count: int) -> Array:
        """`adapter_ids` as the file takes them. A negative number would count from the end.

        Raises:
            AdapterError: unless they are one number of an adapter, or 0, for each of `count` rows.
        """
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise AdapterError(
                f"{self.slots.ids!r} must be one integer for each row, not {ids.dtype} {list(ids.shape)}"
            )
        if len(ids) != count:
            raise AdapterError(f"{self.slots.ids!r} has {len(ids)} numbers for {count} rows; give one for each")
        wrong = [int(number) for number in ids if not 0 <= number <= len(self.slots.adapters)]
        if wrong:
            raise AdapterError(
                f"{self.slots.ids!r} holds {wrong[0]}; give 0 for the base and 1 to {len(self.slots.adapters)} "
                f"for {some(self.slots.adapters)}"
            )
        return ids.astype(np.int64)

    def _rows(self, arrays: Mapping[str, Array]) -> int:
        """How many rows the batch has: it is in front of the first input, as `adapter_ids` was declared."""
        others = (arrays[name] for name in self.inputs if name in arrays and name != self.slots.ids)
        return next((len(array) for array in others if array.ndim), 1)

    def _check_names(self, arrays: Mapping[str, Array]) -> None:
        missing = [name for name in self.inputs if name not in arrays]
        unknown = [name for name in arrays if name not in self.inputs]
        if missing:
            raise ExportError(f"{self._file.name} also needs {some(missing)}; it takes {', '.join(self.inputs)}")
        if unknown:
            what = " It is an adapter's: load the adapter and name it" if unknown[0] in self.slots.inputs else ""
            raise ExportError(
                f"{self._file.name} takes no input {unknown[0]!r}.{closest(unknown[0], self.inputs)}{what}"
            )

    def _check_types(self, arrays: Mapping[str, Array]) -> None:
        for port in self.session.get_inputs():
            wanted, given = DTYPES.get(port.type), arrays[port.name].dtype
            if wanted is not None and given != wanted:
                raise ExportError(
                    f"{self._file.name} takes {port.name!r} as {np.dtype(wanted)}, not {given}; "
                    f"array.astype({np.dtype(wanted).name!r}) converts it"
                )

    def _find(self, name: str) -> _Loaded:
        loaded = self._loaded.get(name)
        if loaded is None:
            have = f"it has {some(self._loaded)}" if self._loaded else "none is loaded"
            raise AdapterError(
                f"there is no adapter {name!r}; {have}.{closest(str(name), self._loaded)} session.load(name, file) "
                "loads one"
            )
        return loaded

    def _number(self, name: str) -> int:
        if self.slots.ids is None:
            raise AdapterError(
                f"{self._file.name} holds no adapters for rows to choose from; exporters.export_onnx_batched "
                "writes such a file, and run(feed, adapter=name) chooses one for all rows of this"
            )
        if name not in self.slots.adapters:
            raise AdapterError(
                f"{self._file.name} holds no adapter {name!r}; it has {some(self.slots.adapters)}."
                f"{closest(str(name), self.slots.adapters)}"
            )
        return self.slots.adapters.index(name) + 1

    def _from_file(self, adapter: Any) -> _Loaded:
        file = path_of(adapter)
        arrays, version = read_onnx_adapter(file)
        described = {name: (array.shape, _type_of(array)) for name, array in arrays.items()}
        check_arrays(described, version, self.slots, repr(str(adapter)))
        return self._placed(arrays)

    def _from_directory(self, adapter: Any, adapter_name: str, partial: bool) -> _Loaded:
        arrays = adapter if isinstance(adapter, AdapterArrays) else read_adapter(adapter, adapter_name=adapter_name)
        model = open_model(self._file)
        if read_slots(model.metadata_props, self._file.name).fingerprint != self.slots.fingerprint:
            raise AdapterError(
                f"{self._file} holds other weights than it did when the session was opened; open it anew"
            )
        found = adapter_arrays(OnnxWeights(model, arrays, partial=partial), self.slots)
        if any(array.dtype.name == "bfloat16" for array in found.values()):
            raise AdapterError(
                "ONNX Runtime's Python interface feeds no bfloat16; export the model in float16 or float32"
            )
        return self._placed(found)

    def _placed(self, arrays: Mapping[str, Array]) -> _Loaded:
        """With a copy on the GPU, if that is where the session runs."""
        device = "cpu" if self.provider == "CPUExecutionProvider" else "cuda"
        return _Loaded(arrays, {name: ort.OrtValue.ortvalue_from_numpy(a, device, 0) for name, a in arrays.items()})


class BoundRun:
    """Inputs, an adapter and outputs that are bound to a session. Made by `AdapterSession.bind`; not for two threads.

    It holds whatever the binding refers to, and ONNX Runtime does not.
    """

    def __init__(
        self,
        owner: AdapterSession,
        feed: Mapping[str, Array],
        adapter: Mapping[str, ort.OrtValue],
        kept: tuple[_Loaded, ...],
    ) -> None:
        self._owner, self._kept = owner, kept
        self._device = "cpu" if owner.provider == "CPUExecutionProvider" else "cuda"
        self._arrays = {name: np.array(array, order="C") for name, array in feed.items()}  # `update` writes into them
        self._inputs = {name: self._value(array) for name, array in self._arrays.items()}
        self._adapter = dict(adapter)
        self._binding = owner.session.io_binding()
        for name, value in {**self._inputs, **self._adapter}.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in owner.outputs:
            self._binding.bind_output(name, self._device)
        if self._device != "cpu":
            self._fix_outputs()

    def _fix_outputs(self) -> None:
        """Keep the outputs where the first run put them: a CUDA graph writes where it did when it was recorded."""
        self._run("-1")
        self._outputs = self._binding.get_outputs()
        for name, value in zip(self._owner.outputs, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def _value(self, array: Array) -> ort.OrtValue:
        try:
            return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        except Exception as error:
            raise ExportError(f"an array of {array.dtype} cannot be bound: {reason(error)}") from error

    def update(self, feed: Mapping[str, Array]) -> None:
        """Other values for inputs, of the same shapes: they are copied to where the old ones lie.

        Raises:
            ExportError: if there is no such input, or it has another shape or type.
            AdapterError: if it is `adapter_ids`, and there is no such adapter.
        """
        arrays = _as_arrays(feed)
        for name, array in arrays.items():
            old = self._arrays.get(name)
            if old is None or old.shape != array.shape or old.dtype != array.dtype:
                raise ExportError(f"{name!r} is not bound with shape {list(array.shape)} and {array.dtype}; bind anew")
            if name == self._owner.slots.ids:
                self._owner.checked_ids(array, len(old))
        for name, array in arrays.items():
            self._arrays[name][...] = array
            if self._device != "cpu":
                self._inputs[name].update_inplace(self._arrays[name])

    def run(self) -> list[Array]:
        """The outputs, copied to the CPU.

        Raises:
            ExportError: if ONNX Runtime cannot run with what is bound.
        """
        self.run_in_place()
        return list(self._binding.copy_outputs_to_cpu())

    def run_in_place(self) -> None:
        """Run, and leave the outputs on the device: what to time."""
        self._run("0")

    def _run(self, graph: str) -> None:
        """One run; `graph` numbers the CUDA graph that is recorded, or replayed, and -1 is a run without."""
        options = silent_run()
        if self._device != "cpu":
            options.add_run_config_entry("gpu_graph_id", graph)
        try:
            self._owner.session.run_with_iobinding(self._binding, options)
        except Exception as error:
            raise ExportError(f"the session cannot run with what is bound: {reason(error)}") from error


def _as_arrays(feed: Mapping[str, Any]) -> dict[str, Array]:
    if not isinstance(feed, Mapping):
        raise ExportError(f"inputs are given as {{name: array}}, and not as {type(feed).__name__}")
    try:
        return {name: np.asarray(array) for name, array in feed.items()}
    except Exception as error:  # ragged lists, tensors on a GPU, ...
        raise ExportError(f"an input cannot be read as an array: {reason(error)}") from error


def _are_names(adapters: Any) -> bool:
    return isinstance(adapters, list | tuple) and all(isinstance(name, str) for name in adapters)


def _is_file(adapter: Adapter) -> bool:
    return isinstance(adapter, str | os.PathLike) and not Path(adapter).is_dir()


def _type_of(array: Array) -> str:
    return ir.DataType.from_numpy(array.dtype).name

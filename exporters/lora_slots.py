"""Places for LoRA in an ONNX graph: which inputs there are, of what shape, and what an adapter's arrays are in them.

A slot is a plain value that is written into the file's metadata, so that adapters can be made for the file, and checked
against it, with nothing else at hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_fx import AdapterArrays, AdapterError, ExportError, LowRankArrays
from lora_fx.errors import closest

from .onnx_deltas import gain, kernel_factors, low_rank_delta
from .onnx_sites import Form
from .onnx_weights import Array
from .text import reason, some

if TYPE_CHECKING:
    import onnx_ir as ir

SLOTS_KEY = "lora_fx.slots"
_VERSION = 1


@dataclass(frozen=True)
class Slot:
    """One place for A and B.

    Attributes:
        path: the module's name, or the parameter's.
        form: how the weight lies in the file.
        shape: of the weight, as it lies.
        weight: the initializer that holds it.
        dtype: the ONNX type of A and B.
        r: the rank that the file has; None if every adapter brings its own.
        is_on_weight: A and B are added to the weight, and not beside the op.
        start, stop: the outputs of the weight that are meant, if the module is packed with others.
        parts: {what: name of the graph's input} of "a", "b", and "gain" and "bias" if the file has them.
        names: other names of the module.
    """

    path: str
    form: Form
    shape: tuple[int, ...]
    weight: str
    dtype: str
    r: int | None
    is_on_weight: bool
    start: int
    stop: int
    parts: Mapping[str, str]
    names: tuple[str, ...] = ()

    @property
    def in_features(self) -> int:
        """Size of what the op takes."""
        if self.form.kind == "kernel":
            return self.shape[0] if self.form.is_transposed else self.shape[1] * self.form.groups
        return self.shape[-2] if self.form.stored_in_out else self.shape[-1]

    @property
    def out_features(self) -> int:
        """Size of what the op gives, with all that is packed in it."""
        if self.form.kind == "kernel":
            return self.shape[1] * self.form.groups if self.form.is_transposed else self.shape[0]
        return self.shape[-1] if self.form.stored_in_out else self.shape[-2]

    @property
    def empty_rank(self) -> int:
        """The smallest rank that the op can have: none, or one of zeros for each group of a convolution."""
        return self.form.groups if self.form.kind == "kernel" else 0

    def shape_of(self, part: str, r: Any) -> tuple[Any, ...]:
        """Shape of one of the slot's inputs for rank r, which may be a name."""
        n_out, extent = self.out_features, self.shape[2:]
        if part in ("gain", "bias"):
            return (n_out,) if self.form.kind != "kernel" else (1, n_out, *(1 for _ in extent))
        if self.form.kind == "kernel":
            down = (r, self.shape[1], *extent)
            if self.form.is_transposed:  # as ConvTranspose takes it
                down = (self.in_features, r if self.form.groups == 1 else r // self.form.groups, *extent)
            ranks = r if self.form.groups == 1 else r // self.form.groups
            return down if part == "a" else (n_out, ranks, *(1 for _ in extent))
        if self.is_on_weight:
            rows, columns = self.shape[-2:]
            return (*self.shape[:-2], rows, r) if part == "a" else (*self.shape[:-2], r, columns)
        return (self.in_features, r) if part == "a" else (r, n_out)

    def default(self, part: str) -> Array:
        """The value that leaves the base as it is."""
        if part in ("gain", "bias"):
            return np.zeros([1] * len(self.shape_of(part, 1)) if self.r is None else self.shape_of(part, 1), np.float32)
        return np.zeros(self.shape_of(part, self.empty_rank if self.r is None else self.r), np.float32)

    def arrays(self, low: LowRankArrays, scaling: float, weight: Array | None) -> dict[str, Array]:
        """{part: float32 array} of an adapter; the scaling is in B, and lower ranks than the file's are filled up.

        Args:
            weight: the base's, in its stored shape: what DoRA's norms are taken of.

        Raises:
            AdapterError: if the adapter needs what the slot has not, or does not fit it.
        """
        for part, given, option in (("bias", low.bias, "lora_bias"), ("gain", low.magnitude, "use_dora")):
            if given is not None and part not in self.parts:
                raise AdapterError(
                    f"the adapter has {option} for {low.path!r}, and the file no input for it: it was made for "
                    f"adapters without; make it again with one that has {option} among its adapters"
                )
        a, b = self._factors(low)  # one of the two is PEFT's B, and the scaling may go onto either
        found = {part: self.default(part) for part in self.parts} | {"a": a, "b": b * scaling}
        if low.bias is not None:
            found["bias"] = self._per_output(low.bias.reshape(-1) * scaling)
        if low.magnitude is not None:
            assert weight is not None
            scale = gain(low, weight + low_rank_delta(low, self.form, weight.shape) * scaling, self.form)
            found["gain"] = self._per_output(scale.reshape(-1) - 1)
        return {part: np.ascontiguousarray(self._padded(part, array)) for part, array in found.items()}

    def _per_output(self, values: Array) -> Array:
        return self._widened(values, 0).reshape(self.shape_of("bias", 1))

    def _factors(self, low: LowRankArrays) -> tuple[Array, Array]:
        if self.form.kind == "kernel":
            low_rank_delta(low, self.form, self.shape)  # raises if it does not fit
            return kernel_factors(low, self.form, self.shape)
        count = self.shape[0] if len(self.shape) == 3 else 1
        if low.a.ndim != 2 or low.a.shape[1] != self.in_features or len(low.b) != self.stop - self.start:
            raise AdapterError(
                f"A {list(low.a.shape)} and B {list(low.b.shape)} of {low.path!r} do not fit the file's slot, which "
                f"takes {self.in_features} and gives {self.stop - self.start}; is this adapter of this model?"
            )
        if len(self.shape) == 3:  # PEFT's order: the expert is slowest in A and fastest in B
            a = low.a.reshape(count, -1, self.in_features)
            b = low.b.reshape(len(low.b), -1, count).transpose(2, 0, 1)
            return (a.swapaxes(1, 2), b.swapaxes(1, 2)) if self.form.stored_in_out else (b, a)
        if self.is_on_weight and not self.form.stored_in_out:
            return low.b, low.a
        return low.a.T, self._widened(low.b.T, 1)

    def _widened(self, array: Array, axis: int) -> Array:
        """With zeros at the outputs that are packed with the slot's."""
        pad = [(0, 0)] * array.ndim
        pad[axis] = (self.start, self.out_features - self.stop)
        return np.pad(array, pad) if (self.start, self.stop) != (0, self.out_features) else array

    def _padded(self, part: str, array: Array) -> Array:
        """Filled up with ranks of zeros, if the file has a rank of its own."""
        if self.r is None or part not in ("a", "b"):
            return array
        wanted_shape = self.shape_of(part, self.r)
        if self.form.kind == "kernel" and not self.form.is_transposed and part == "a":  # ranks of its own
            array = array.reshape(self.form.groups, -1, *array.shape[1:])
            wanted_shape = (self.form.groups, self.r // self.form.groups, *wanted_shape[1:])
        missing = [wanted - size for wanted, size in zip(wanted_shape, array.shape, strict=True)]
        if min(missing) < 0:
            raise AdapterError(
                f"the adapter has a higher rank for {self.path!r} than the {self.r} that the file was made with; make "
                "it again with rank= that, or with rank=None"
            )
        return np.pad(array, [(0, more) for more in missing]).reshape(self.shape_of(part, self.r))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Slots:
    """All that a file says about its slots.

    Attributes:
        slots: by path.
        tensors: {full name in the model: initializer} of weights that adapters may bring as a whole.
        fingerprint: of the base's weights at the slots, sha256.
        ids: the graph's input of one adapter number for each row; None if a file's adapters are switched as a whole.
        adapters: names of the adapters in the file, 1 the first, if rows choose.
    """

    slots: tuple[Slot, ...]
    tensors: Mapping[str, str]
    fingerprint: str
    ids: str | None = None
    adapters: tuple[str, ...] = ()

    @property
    def model_version(self) -> int:
        """The fingerprint, as far as an .onnx_adapter file has room for it: 31 bits."""
        return int(self.fingerprint[:8], 16) & 0x7FFFFFFF

    @property
    def inputs(self) -> dict[str, str]:
        """{the graph's input: ONNX type} of all that an adapter may bring."""
        return {name: slot.dtype for slot in self.slots for name in slot.parts.values()}

    def find(self, path: str) -> Slot | None:
        """The slot of a module."""
        return next((slot for slot in self.slots if path == slot.path or path in slot.names), None)

    def write_to(self, model: ir.Model) -> None:
        """Record them in the file's metadata."""
        fields = dataclasses.asdict(self) | {"version": _VERSION}
        model.metadata_props[SLOTS_KEY] = json.dumps(fields, sort_keys=True)


def read_slots(metadata: Mapping[str, str], file: str) -> Slots:
    """The slots that a file's metadata records.

    Raises:
        ExportError: if it has none, or the record is damaged.
    """
    if SLOTS_KEY not in metadata:
        raise ExportError(
            f"{file} has no places for adapters (no record {SLOTS_KEY!r}); export_onnx_adapters and "
            "export_onnx_batched write such files, add_adapter_inputs makes one of an existing file, and "
            "fold_into_onnx needs none"
        )
    try:
        fields = json.loads(metadata[SLOTS_KEY])
        slots = tuple(
            Slot(
                **(each | {"form": Form(**each["form"]), "shape": tuple(each["shape"]), "names": tuple(each["names"])})
            )
            for each in fields["slots"]
        )
        return Slots(slots, fields["tensors"], fields["fingerprint"], fields["ids"], tuple(fields["adapters"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"the record {SLOTS_KEY!r} of {file} is damaged ({reason(error)}); export it again"
        ) from error


def fingerprint_of(weights: Iterable[tuple[str, bytes]]) -> str:
    """One hash of named weights."""
    digest = hashlib.sha256()
    for name, data in sorted(weights):
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def check_covered(slots: Slots, adapter: AdapterArrays, paths: Sequence[str]) -> None:
    """Raises AdapterError if the adapter has something for which the file has no slot."""
    missing = [path for path in paths if slots.find(path) is None]
    if missing:
        raise AdapterError(
            f"the file has no slot for {some(missing)} of {str(adapter.directory)!r}."
            f"{closest(missing[0], [slot.path for slot in slots.slots])} It was made for other target_modules; make it "
            "again with this adapter among its adapters"
        )

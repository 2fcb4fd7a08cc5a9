"""The tensors of safetensors files, by their places: read in pieces, with no more memory than a piece takes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from .errors import FoldError, LoraFxError

# safetensors' names of types.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SHORTER = "the checkpoint changed while it was read; let nobody write to it meanwhile, and call again"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name, shape: its.
        kind: safetensors' name of its type.
        path: the file.
        start, nbytes: where it lies in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements, if it is one that torch has."""
        return DTYPES[self.kind]


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file.

    Attributes:
        path, size: of the file.
        header: its bytes, without the eight before it that say how many they are.
        tensors: in the order in which they lie.
    """

    path: Path
    size: int
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def data_start(self) -> int:
        """Where the tensors begin."""
        return 8 + len(self.header)


def read_stored(path: Path, error: type[LoraFxError]) -> StoredFile:
    """The header of a file. safetensors looks at all of it: tensors tile the data, without holes or overlaps.

    Raises:
        error: if it is no readable safetensors file, or names a tensor twice.
    """
    try:
        with safetensors.safe_open(path, "np"):
            pass
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            size = os.fstat(file.fileno()).st_size
        entries = json.loads(header, object_pairs_hook=_without_doubles)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as cause:
        raise error(
            f"{str(path)!r} is no readable safetensors file: {cause}; copy it whole, or save it again"
        ) from cause
    entries.pop("__metadata__", None)
    first = 8 + len(header)
    tensors = (_stored(name, entry, path, first) for name, entry in entries.items())
    return StoredFile(path, size, header, tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes))))


def _stored(name: str, entry: dict[str, Any], path: Path, first: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    return StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, first + start, stop - start)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands twice in its header")
        found[key] = value
    return found


def with_tensor(file: StoredFile, name: str, like: StoredTensor) -> bytes:
    """The header of the file with one tensor more, as long as `like`, behind all others."""
    entries = json.loads(file.header)
    end = file.size - file.data_start
    entries[name] = {"dtype": like.kind, "shape": list(like.shape), "data_offsets": [end, end + like.nbytes]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def read_into(descriptor: int, start: int, buffer: memoryview) -> None:
    """Fill a buffer from a place in a file.

    Raises:
        FoldError: if the file ends before.
    """
    while len(buffer):
        count = os.preadv(descriptor, [buffer], start)
        if count == 0:
            raise FoldError(SHORTER)
        start, buffer = start + count, buffer[count:]


def read_rows(descriptor: int, tensor: StoredTensor, first: int, count: int) -> torch.Tensor:
    """Elements `first` to `first + count` of a tensor, flat."""
    into = torch.empty(count, dtype=tensor.dtype)
    read_into(descriptor, tensor.start + first * into.itemsize, bytes_of(into))
    return into


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def is_numbered(name: str, stem: str) -> bool:
    """Whether a file is called like a shard: `model-00001-of-00002.safetensors`."""
    return re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.safetensors", name) is not None

"""The seal of an adapter's two files: hashes in safetensors' metadata, which PEFT leaves alone, and which we verify.

safetensors looks at neither values nor checksums: 99 % of the bits of a file may flip and it still loads, as another
function. So `save_adapter` writes sha256 of the tensors' bytes, of the header, and of adapter_config.json into the
header. A file that has the seal is verified whenever it is read; one that PEFT wrote has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Literal

from .errors import AdapterError

Integrity = Literal["checked", "required", "ignored"]

_DATA, _CONFIG, _HEADER = (f"lora_fx.sha256.{part}" for part in ("data", "config", "header"))
_BLANK = "0" * 64
# What goes into the metadata before the file is laid out; `sealed` fills it in. A header cannot hold its own hash, so
# it is hashed with that one blank.
BLANK_SEAL = {_DATA: _BLANK, _CONFIG: _BLANK, _HEADER: _BLANK}
# Who wrote a file.
WRITER, OURS = "writer", "lora_fx"

_PIECE = 1 << 24  # bytes that are hashed in one go


def sealed(weights: bytes, config: bytes) -> bytes:
    """A safetensors file, whose metadata has `BLANK_SEAL`, with the hashes filled in."""
    header, data = split(weights)
    fields = json.loads(header)
    # safetensors writes the metadata in another order every time, and the same adapter is to be the same file.
    fields["__metadata__"] = dict(sorted((fields.get("__metadata__") or {}).items()))
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    header = text + b" " * (-len(text) % 8)
    header = _filled(header, _HEADER, _BLANK)
    header = _filled(header, _DATA, sha256_of(data))
    header = _filled(header, _CONFIG, sha256_of(config))
    header = _filled(header, _HEADER, sha256_of(header))
    return len(header).to_bytes(8, "little") + header + data


def check_seal(
    weights: bytes | memoryview,
    config: bytes,
    where: str,
    integrity: Integrity,
    after_each: Callable[[], object] | None = None,
) -> None:
    """Whether the two files are those that were written together.

    Args:
        weights: adapter_model.safetensors, which is known to be one.
        where: the directory, for messages.
        integrity: "checked" verifies a seal that is there, "required" wants one, "ignored" looks for none.
        after_each: as for `sha256_of`.

    Raises:
        AdapterError: if not.
    """
    if integrity not in ("checked", "required", "ignored"):
        raise AdapterError(f"integrity={integrity!r} must be 'checked', 'required' or 'ignored'")
    if integrity == "ignored":
        return
    header, data = split(weights)
    noted = metadata_of(weights)
    if not any(key in noted for key in BLANK_SEAL):
        if integrity == "required":
            raise AdapterError(
                f"{where} has no seal (sha256 in its metadata), and integrity='required' asks for one; "
                "lora_fx.save_adapter writes it"
            )
        return
    found = {
        _DATA: sha256_of(data, after_each),
        _CONFIG: sha256_of(config),
        _HEADER: sha256_of(_filled(header, _HEADER, _BLANK)),
    }
    for key, what in ((_HEADER, "the header"), (_DATA, "the tensors"), (_CONFIG, "adapter_config.json")):
        if noted.get(key) != found[key]:
            raise AdapterError(
                f"{where}: {what} is not what was saved (sha256 differs): a file was damaged, changed or replaced "
                "since. Take both files from where they were saved; if the change is meant, integrity='ignored' reads "
                "them, and save_adapter seals them anew"
            )


def digest_of(tensors: Iterable[bytes | memoryview]) -> str:
    """sha256 of the tensors' bytes, in whatever order and under whatever names a file or a graph has them."""
    return sha256_of(b"".join(sorted(hashlib.sha256(tensor).digest() for tensor in tensors)))


def sha256_of(data: bytes | memoryview, after_each: Callable[[], object] | None = None) -> str:
    """Hash of some bytes; of a mapped file, `after_each` lets go of the piece that was read."""
    digest, view = hashlib.sha256(), memoryview(data)
    for start in range(0, len(view), _PIECE):
        digest.update(view[start : start + _PIECE])
        if after_each is not None:
            after_each()
    return digest.hexdigest()


def split(weights: bytes | memoryview) -> tuple[bytes, memoryview]:
    """(header, data) of a safetensors file: 8 bytes say how long the header is. The data is not copied."""
    size = int.from_bytes(weights[:8], "little")
    return bytes(weights[8 : 8 + size]), memoryview(weights)[8 + size :]


def metadata_of(weights: bytes | memoryview) -> dict[str, str]:
    """The metadata in the header of a safetensors file, which is known to be one."""
    found = json.loads(split(weights)[0]).get("__metadata__") or {}
    return {str(key): str(value) for key, value in found.items()}


def views_of(weights: bytes | memoryview) -> dict[str, tuple[str, list[int], memoryview]]:
    """{name: (safetensors' name of the type, shape, bytes)} of a readable file, in its order; nothing is copied."""
    header, data = split(weights)
    entries = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
    return {
        key: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for key, entry in entries.items()
    }


def _filled(header: bytes, key: str, value: str) -> bytes:
    """The header with another value of the same length for a key of the seal."""
    start = header.find(f'"{key}":"'.encode())
    if start < 0:
        return header
    start += len(key) + 4
    return header[:start] + value.encode() + header[start + len(value) :]
